"""A chat request as its body says it: what must be understood is checked, the rest is left alone.

Pure. What is sent upstream is what was parsed and priced: the body is written anew from the parsed
object, so that a duplicate key or an odd encoding can hide nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import orjson

from gwproxy.core.errors import InvalidRequest
from gwproxy.core.routing import Candidate

MODEL_NAME_LIMIT = 256
MAX_TOKENS_LIMIT = 10_000_000
MAX_CHOICES = 128


_FREE_TIERS = frozenset({"auto", "default", "standard_only"})

_OTHERS_STATE = ("previous_response_id", "conversation", "prompt", "item_reference", "file_id")
"""Fields that point at state kept upstream, where all tenants share one account."""

_OTHER_PRICE = "only a cache of 5 minutes has a price"
_ELSEWHERE = "it points at state outside this request"

_WATCHED = frozenset(
    {
        *_OTHERS_STATE,
        "service_tier",
        "web_search_options",
        "audio",
        "modalities",
        "background",
        "tools",
        "extra_body",
        "cache_control",
    }
)
"""Fields that may ask for more than tokens in and out; a body without them is not looked into."""

_MAXIMUM = ("max_tokens", "max_completion_tokens")

_DEEPEST = 254

_CLIENT_TOOLS = frozenset({"function", "custom"})
"""Tools that the client runs itself. Any other kind runs upstream, at a price nobody can bound."""


class ChatRequest(msgspec.Struct, frozen=True):
    """A checked request. `body` is the parsed object and is never changed in place."""

    model: str
    stream: bool
    include_usage: bool
    max_output_tokens: int | None
    choices: int
    body: dict[str, Any]
    size_bytes: int

    @classmethod
    def parse(cls, raw: bytes, allowed: frozenset[str] = frozenset()) -> "ChatRequest":
        """Check `raw`. `allowed`: features that the organization has switched on."""
        body = parse_object(raw)
        model = body.get("model")
        if not isinstance(model, str):
            raise _wrong("model", "must be a string", missing=model is None)
        if not model or len(model) > MODEL_NAME_LIMIT or not model.isprintable():
            raise _wrong("model", f"must be 1 to {MODEL_NAME_LIMIT} printable characters")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _wrong("messages", "must be a non-empty array", missing=messages is None)
        for index, message in enumerate(messages):
            if not isinstance(message, dict):
                raise _wrong(f"messages[{index}]", "must be an object")
            if "cache_1h" not in allowed and _lasts(message):
                raise _unsupported(f"messages[{index}].cache_control.ttl", _OTHER_PRICE)
            content = message.get("content")
            if isinstance(content, list):
                _check_parts(content, index, allowed)
            elif content is not None and not isinstance(content, str):
                raise _wrong(f"messages[{index}].content", "must be a string or an array of parts")
            if message.get("audio") is not None:
                # An earlier answer's, by its id: neither in the body nor of a known length.
                raise _unsupported(f"messages[{index}].audio", _ELSEWHERE)
        stream = _flag(body, "stream")
        options = body.get("stream_options")
        include_usage = False
        if options is not None:
            if not isinstance(options, dict):
                raise _wrong("stream_options", "must be an object")
            if not stream:
                raise _wrong("stream_options", "is only allowed when stream is true")
            include_usage = _flag(options, "include_usage", "stream_options.include_usage")
        if not _WATCHED.isdisjoint(body):
            _refuse_unpriced(body, allowed)
        maximum = _maximum(body)
        choices = _count(body, "n", 1, MAX_CHOICES) or 1
        return cls(model, stream, include_usage, maximum, choices, body, len(raw))

    @property
    def thinks(self) -> bool:
        """The caller asks for reasoning of models that do not reason unasked."""
        return self.body.get("thinking") is not None

    def body_for(self, candidate: Candidate, lowered: int | None = None) -> bytes:
        """The body for one candidate: its name for the model, usage asked for in streams, and a
        maximum of output tokens where `lowered` says one."""
        changed = {**self.body, "model": candidate.sent}
        if lowered is not None:
            for field in _MAXIMUM:
                changed.pop(field, None)  # null, or nothing would have been lowered
            changed[candidate.provider.max_tokens_field] = lowered
        if self.stream and not self.include_usage:
            options = changed.get("stream_options")
            changed["stream_options"] = {**(options or {}), "include_usage": True}
        return orjson.dumps(changed)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, strictly: NaN, a byte order mark and trailing data are refused."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON (line {error.lineno}, column {error.colno}).",
            code="invalid_json",
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    if raw.count(b"[") + raw.count(b"{") >= _DEEPEST:
        # Values are read up to 1,024 levels deep and written up to 254: what cannot be sent is
        # refused before anything is held for it.
        try:
            orjson.dumps(body)
        except orjson.JSONEncodeError:
            raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None
    return body


def as_stream(answer: Mapping[str, Any], *, include_usage: bool) -> bytes:
    """A whole completion as a stream of one chunk, for a client that asked for a stream.

    An upstream that inspects answers (Cloudflare's Guardrails) sends them whole whatever was asked.
    """
    choices = []
    for position, choice in enumerate(answer.get("choices") or ()):
        if not isinstance(choice, dict):
            continue
        message = choice.get("message")
        delta = dict(message) if isinstance(message, dict) else {}
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            delta["tool_calls"] = [
                {**call, "index": _index(call, position)}
                for position, call in enumerate(calls)
                if isinstance(call, dict)
            ]
        rest = {key: value for key, value in choice.items() if key not in ("message", "index")}
        choices.append({"index": _index(choice, position), "delta": delta, **rest})
    chunk = {
        **{
            key: value for key, value in answer.items() if key not in ("choices", "usage", "object")
        },
        "object": "chat.completion.chunk",
        "choices": choices,
    }
    events = [chunk]
    usage = answer.get("usage")
    if include_usage and usage is not None:
        events.append({**chunk, "choices": [], "usage": usage})
    return b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events) + b"data: [DONE]\n\n"


def _index(item: Mapping[str, Any], position: int) -> int:
    """A stream's items are put together by their index, which a whole answer need not have."""
    index = item.get("index")
    return index if type(index) is int else position


# -- checks --------------------------------------------------------------------------------------


def _wrong(param: str, what: str, *, missing: bool = False) -> InvalidRequest:
    if missing:
        return InvalidRequest(
            f"Missing required parameter: '{param}'.",
            param=param,
            code="missing_required_parameter",
        )
    return InvalidRequest(f"Invalid value for '{param}': it {what}.", param=param)


def _flag(body: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(param or name, "must be true or false")


def _count(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    # A bool is an int to Python, and a float would make the price a matter of rounding.
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, f"must be an integer from {least} to {most}")
    return value


def _maximum(body: Mapping[str, Any]) -> int | None:
    if "max_tokens" not in body and "max_completion_tokens" not in body:
        return None
    old = _count(body, "max_tokens", 1, MAX_TOKENS_LIMIT)
    new = _count(body, "max_completion_tokens", 1, MAX_TOKENS_LIMIT)
    if old is not None and new is not None and old != new:
        raise _wrong("max_tokens", "cannot differ from max_completion_tokens")
    return new if new is not None else old


def _refuse_unpriced(body: Mapping[str, Any], allowed: frozenset[str]) -> None:
    for name, what in _unpriced(body):
        if what not in allowed:
            raise _unsupported(name, "its cost cannot be bounded")
    for name in _OTHERS_STATE:
        if body.get(name) is not None:
            raise _unsupported(name, _ELSEWHERE)
    extra = body.get("extra_body")
    google = extra.get("google") if isinstance(extra, dict) else None
    if isinstance(google, dict) and google.get("cached_content") is not None:
        raise _unsupported("extra_body.google.cached_content", _ELSEWHERE)


def _unpriced(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the body asks for beyond tokens: (the field, the feature that would allow it)."""
    tier = body.get("service_tier")
    if tier is not None and not _one_of(tier, _FREE_TIERS):
        yield "service_tier", "service_tier"
    if body.get("web_search_options") is not None:
        yield "web_search_options", "web_search"
    if _lasts(body):
        yield "cache_control.ttl", "cache_1h"
    modalities = body.get("modalities")
    if body.get("audio") is not None:
        yield "audio", "audio"
    if modalities is not None and modalities not in ([], ["text"]):
        yield "modalities", "audio"
    if body.get("background"):
        yield "background", "background"
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise _wrong("tools", "must be an array")
        for index, tool in enumerate(tools):
            if not isinstance(tool, dict) or not _one_of(tool.get("type"), _CLIENT_TOOLS):
                yield f"tools[{index}]", "hosted_tools"
            elif _lasts(tool) or (
                isinstance(tool.get("function"), dict) and _lasts(tool["function"])
            ):
                yield f"tools[{index}].cache_control.ttl", "cache_1h"


def _check_parts(parts: list[Any], message: int, allowed: frozenset[str]) -> None:
    for index, part in enumerate(parts):
        if isinstance(part, str):
            continue
        name = f"messages[{message}].content[{index}]"
        if not isinstance(part, dict):
            raise _wrong(name, "must be an object")
        if "cache_1h" not in allowed and _lasts(part):
            raise _unsupported(f"{name}.cache_control.ttl", _OTHER_PRICE)
        if part.get("type") == "input_audio" and "audio" not in allowed:
            raise _unsupported(name, "its cost cannot be bounded")
        for field, value in part.items():
            within = value if isinstance(value, dict) else {}
            if (field == "file_id" and value is not None) or within.get("file_id") is not None:
                raise _unsupported(f"{name}.file_id", _ELSEWHERE)


def _lasts(holder: Mapping[str, Any]) -> bool:
    """It asks for a cache of an hour, whose writes cost 2 times the input; the price book's rate is
    that of 5 minutes, 1.25 times."""
    control = holder.get("cache_control")
    return isinstance(control, dict) and control.get("ttl") not in (None, "5m")


def _one_of(value: Any, words: frozenset[str]) -> bool:
    # A list or an object cannot be looked up in a set at all.
    return isinstance(value, str) and value in words


def _unsupported(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{param}' is not supported here: {why}.", param=param, code="unsupported_parameter"
    )
