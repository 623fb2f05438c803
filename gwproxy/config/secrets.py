"""Tokens, keys and what is kept beside them: in the file, or behind `env:`, `file:`, `credential:`.

Rule of the room: no error shows a value, for whatever stands here may be the secret.
"""

import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from gwproxy.config.addresses import is_loopback
from gwproxy.config.problems import Wrong, kind
from gwproxy.config.values import Parse, Raw, Secret
from gwproxy.config.variables import family

ADMIN_KEY_MIN_CHARS: Final = 32
SECRET_LIMIT_BYTES: Final = 1 << 16


class Unset(Wrong):
    """A secret's `env:NAME` whose variable is not set."""

    def __init__(self, variable: str) -> None:
        self.variable = variable
        names = " (or ".join(family(variable)) + (")" if len(family(variable)) > 1 else "")
        super().__init__(
            f"the environment variable {names} is not set",
            "set it, or write the secret as file:/path or credential:NAME",
        )


def identifier(pattern: str, form: str) -> Parse[str]:
    """An id that is kept beside the token, in the same ways: and so it is not shown either, since
    whoever mixes up the two would find the token in an error message."""

    def parse(raw: Raw) -> str:
        text = _dereference(raw).strip()
        if not re.fullmatch(pattern, text):
            raise Wrong("does not look like an id", form)
        return text

    return parse


def token(raw: Raw) -> Secret:
    value = _dereference(raw).strip()
    if value.lower().startswith("bearer "):
        raise Wrong('the token begins with "Bearer "', "write the token alone")
    # It is sent in a header: anything else could end the header or start another.
    if not re.fullmatch(r"[\x21-\x7e]{1,4096}", value):
        raise Wrong(
            "the token is empty or has characters that no header can carry",
            "copy it again, without spaces and line breaks",
        )
    return Secret(value)


def webhook(raw: Raw) -> Secret:
    """An address, which often is a secret too, so that it is not shown."""
    value = _dereference(raw).strip()
    cure = 'write an address such as "https://hooks.example/alerts"'
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Wrong("is not an address", cure) from None
    if not host or port == 0 or not re.fullmatch(r"[\x21-\x7e]{1,2048}", value):
        raise Wrong("is not an address", cure)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(value)):
        raise Wrong("must begin with https:// (http:// to this machine alone)", cure)
    if parts.username is not None or parts.password is not None:
        raise Wrong("has a user name or password in it", "use alert_webhook_secret")
    return Secret(value)


def optional_token(raw: Raw) -> Secret | None:
    """None where its variable is not set: what a person's commands use, a server does without."""
    try:
        return token(raw)
    except Unset:
        return None


def admin_key(raw: Raw) -> Secret | None:
    try:
        key = token(raw)
    except Unset as unset:
        if unset.variable == "GWPROXY_ADMIN_KEY":
            return None
        raise
    if len(key.reveal()) < ADMIN_KEY_MIN_CHARS:
        raise Wrong(
            f"the admin key has fewer than {ADMIN_KEY_MIN_CHARS} characters",
            "make one with: openssl rand -hex 32",
        )
    return key


def _dereference(raw: Raw) -> str:
    """The text behind `env:`, `file:` and `credential:`; other text stands for itself."""
    value = raw.value
    if not isinstance(value, str):
        # Not shown: it may be the secret itself, written without its quotes.
        raise Wrong(f"must be text, not {kind(value)}", "put it in quotes, or write env:NAME")
    if not is_reference(value):
        return value
    scheme, _, name = value.partition(":")
    if not name:
        raise Wrong(f'"{scheme}:" names nothing', f"write {scheme}:NAME")
    if scheme == "env":
        for variable in family(name):
            if text := raw.place.environ.get(variable):
                return text
        raise Unset(name)
    if scheme == "file":
        return _secret_file(raw.place.folder / name)
    folder = raw.place.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise Wrong(
            f"credential:{name} needs $CREDENTIALS_DIRECTORY, which is not set",
            f"start the service by systemd with LoadCredential={name}:/path",
        )
    if "/" in name or name in (".", ".."):
        raise Wrong("a credential's name has no slash", "write the name given to LoadCredential=")
    return _secret_file(Path(folder) / name)


def is_reference(text: str) -> bool:
    return text.startswith(("env:", "file:", "credential:"))


def _secret_file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(SECRET_LIMIT_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise Wrong(
            f"{path} cannot be read ({error.strerror})", "check its path and permissions"
        ) from None
    except UnicodeDecodeError:
        raise Wrong(f"{path} is not text", "put the secret alone into it") from None
    if len(data) > SECRET_LIMIT_BYTES:
        raise Wrong(f"{path} is larger than 64 KiB", "put the secret alone into it")
    if not text.strip():
        raise Wrong(f"{path} is empty", "put the secret into it")
    return text
