"""Where to listen, and where upstreams are.

Rule of the room: an address is judged by its text; nothing is looked up.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from gwproxy.config.problems import Wrong, between, show
from gwproxy.config.values import Listen, Raw
from gwproxy.core.routing import REST
from gwproxy.core.upstream_words import COMPAT_ROOT, REST_ROOT


def base_url(raw: Raw) -> str:
    cure = 'write an address such as "https://gateway.example/v1"'
    text = raw.text().strip()
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Wrong("is not an address", cure) from None
    if parts.scheme not in ("http", "https"):
        raise Wrong("must begin with http:// or https://", cure)
    if parts.username is not None or parts.password is not None:
        raise Wrong("has a user name or password in it", "put the secret into `token`")
    if "?" in text or "#" in text:
        raise Wrong("has a query or a fragment", "write the address up to the path")
    if not host or port == 0 or not re.fullmatch(r"[\x21-\x7e]+", text) or "\\" in text:
        raise Wrong("is not an address", cure)
    text = text.rstrip("/")
    if text.endswith("/chat/completions"):
        raise Wrong("ends in /chat/completions, which is appended", "write what stands before it")
    return text


def listen(raw: Raw) -> Listen:
    cure = 'write "127.0.0.1:8080", "[::1]:8080", "unix:/path" or "fd:3"'
    text = raw.text().strip()
    wrong = Wrong(f"{show(text)} is not an address to listen on", cure)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        # The kernel's limit for the name of a socket is 108 bytes with the closing zero.
        if not path.startswith("/") or len(path.encode()) > 107 or "\0" in path:
            raise Wrong(
                f"{show(text)} is not a socket's path",
                'write an absolute path of at most 107 bytes, as in "unix:/run/gwproxy/gw.sock"',
            )
        return Listen("unix", path=path)
    if match := re.fullmatch(r"fd:([0-9]{1,4})", text):
        if int(match[1]) < 3:
            raise Wrong("file descriptors 0 to 2 are not sockets", 'inherited ones start at "fd:3"')
        return Listen("fd", fd=int(match[1]))
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if match is None:
        raise wrong
    if match[1] is not None:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise wrong from None
    if int(match[3]) > 65535:
        raise Wrong(f"port {match[3]} is out of range", between(0, 65535))
    return Listen("tcp", host=match[1] or match[2], port=int(match[3]))


def origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cloudflare_root(flavour: str, ids: Mapping[str, Any]) -> str:
    root = REST_ROOT if flavour == REST else COMPAT_ROOT
    return root.format(account=ids.get("account_id"), gateway=ids.get("gateway_id"))
