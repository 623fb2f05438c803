"""One tiny question to one provider, and all that its answer shows: status, headers, usage, times.

What a real gateway sends is not written down anywhere in full; this looks. Of the answer itself
nothing is kept.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from uuid import uuid4

import aiohttp
import orjson

from gwproxy.cloudflare.api import broke_off, no_answer
from gwproxy.cloudflare.words import Fault, curl, explain
from gwproxy.core.reconcile import DOCTOR
from gwproxy.core.sse import SseScanner

MOST_TOKENS: Final = 16
"""Some providers refuse less; more is only more money."""
_TIMEOUT_S: Final = 60.0
_LARGEST_ANSWER_BYTES: Final = 1 << 20
_SHOWN: Final = (
    "cf-",
    "x-ratelimit-",
    "openai-",
    "content-type",
    "content-encoding",
    "date",
    "retry-after",
    "server",
    "transfer-encoding",
    "x-should-retry",
)
"""Headers whose values are kept; of the others the names alone, since one may be a cookie."""


@dataclass(frozen=True, slots=True)
class Target:
    """A provider as it is reached. `variable` is where its token came from."""

    name: str
    model: str
    """As it is sent: with the provider's prefix."""
    url: str
    token: str | None
    cloudflare: bool
    slug: str
    """The gateway's name for the provider."""
    max_tokens_field: str = "max_tokens"
    variable: str = "CLOUDFLARE_API_TOKEN"
    rest: bool = False
    """By Cloudflare's REST API, which takes its token where everybody else does."""

    @property
    def header(self) -> str:
        return "cf-aig-authorization" if self.cloudflare and not self.rest else "Authorization"

    def body(self, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Say OK."}],
            self.max_tokens_field: MOST_TOKENS,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def curl(self, stream: bool = True) -> str:
        headers = {} if self.token is None else {self.header: f"Bearer ${self.variable}"}
        return curl("POST", self.url, headers, self.body(stream), stream=stream)


@dataclass(slots=True)
class Seen:
    """What one answer showed. Times are milliseconds from the request."""

    provider: str
    model: str
    stream: bool
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    headers_not_shown: list[str] = field(default_factory=list)
    content_type: str = ""
    log_id: str | None = None
    events: int = 0
    comments: int = 0
    crlf: bool = False
    done: bool = False
    """`[DONE]` came."""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    """The last one, in the provider's words."""
    usage_events: int = 0
    usage_without_choices: bool = False
    fields: list[str] = field(default_factory=list)
    """The members of the chunks, or of the answer."""
    first_byte_ms: int = 0
    total_ms: int = 0
    fault: Fault | None = None

    @property
    def good(self) -> bool:
        return self.fault is None

    def row(self) -> dict[str, Any]:
        return asdict(self)


async def probe(
    session: aiohttp.ClientSession,
    target: Target,
    *,
    stream: bool,
    token: str | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Seen:
    """Ask `target`, with another token than its own where one is given."""
    seen = Seen(target.name, target.model, stream)
    secret = token or target.token
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if secret is not None:
        headers[target.header] = f"Bearer {secret}"
    if target.cloudflare:
        headers |= {
            "cf-aig-skip-cache": "true",
            "cf-aig-max-attempts": "1",
            "cf-aig-collect-log-payload": "false",
            # The log then tells this question from a stranger's.
            "cf-aig-metadata": orjson.dumps({"request_id": f"{DOCTOR}{uuid4().hex}"}).decode(),
        }
    start = now()
    try:
        async with session.post(
            target.url, data=orjson.dumps(target.body(stream)), headers=headers,
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), allow_redirects=False,
        ) as response:  # fmt: skip
            seen.status = response.status
            _keep_headers(seen, response.headers)
            raw = bytearray()
            async for chunk in response.content.iter_any():
                if not raw:
                    seen.first_byte_ms = round((now() - start) * 1000)
                raw += chunk
                if len(raw) > _LARGEST_ANSWER_BYTES:
                    break
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        begun = seen.status != 0
        seen.fault = broke_off(seen.status, error) if begun else no_answer(target.url, error)
        return seen
    finally:
        seen.total_ms = round((now() - start) * 1000)
    # An answer may repeat what it was asked with.
    _read(seen, bytes(raw).replace((secret or "\0").encode(), b"..."), not target.cloudflare)
    return seen


def _keep_headers(seen: Seen, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        name = name.lower()
        if name.startswith(_SHOWN):
            seen.headers[name] = value
        else:
            seen.headers_not_shown.append(name)
    seen.content_type = headers.get("content-type", "").partition(";")[0]
    seen.log_id = headers.get("cf-aig-log-id")


def _read(seen: Seen, raw: bytes, direct: bool) -> None:
    if not 200 <= seen.status < 300:
        seen.fault = explain(seen.status, raw, direct=direct)
        return
    if seen.content_type == "text/event-stream":
        _read_events(seen, raw, direct)
    else:
        with suppress(orjson.JSONDecodeError):
            _read_object(seen, orjson.loads(raw), direct)
    if not seen.fields:
        seen.fault = Fault(
            seen.status,
            None,
            "the answer is no chat completion",
            "check its `base_url` in config.toml"
            if direct
            else "check the address: [upstream] base_url and account_id, or its base_url",
        )


def _read_events(seen: Seen, raw: bytes, direct: bool) -> None:
    seen.crlf = b"\r\n" in raw
    seen.comments = sum(line.startswith(b":") for line in raw.splitlines())
    for payload, _ in SseScanner().feed(raw):
        if payload.strip() == b"[DONE]":
            seen.done = True
        elif payload:
            seen.events += 1
            with suppress(orjson.JSONDecodeError):
                _read_object(seen, orjson.loads(payload), direct)


def _read_object(seen: Seen, value: Any, direct: bool) -> None:
    if not isinstance(value, dict):
        return
    if "error" in value and "choices" not in value:
        seen.fault = explain(seen.status, orjson.dumps(value), direct=direct)
        return
    seen.fields = sorted({*seen.fields, *value})
    choices = value.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        seen.finish_reason = choices[0].get("finish_reason") or seen.finish_reason
    usage = value.get("usage")
    if isinstance(usage, dict):
        seen.usage = usage
        seen.usage_events += 1
        seen.usage_without_choices = choices == []
