"""A chat request as its body says it: what must be understood is checked, the rest is left alone.
Pure."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import orjson

from gwproxy.core.api import Api
from gwproxy.core.meter import Meter
from gwproxy.core.request import (
    ELSEWHERE,
    FREE_TIERS,
    MAX_TOKENS_LIMIT,
    OTHER_PRICE,
    OTHERS_STATE,
    UNBOUNDED,
    Feature,
    ModelRequest,
    cache_options,
    count_of,
    flag_of,
    lasts,
    model_of,
    one_of,
    parse_object,
    unsupported,
    wrong,
)
from gwproxy.core.routing import Candidate
from gwproxy.core.stream import ChatStream

MAX_CHOICES = 128

_WATCHED = frozenset(
    {
        *OTHERS_STATE,
        "service_tier",
        "web_search_options",
        "audio",
        "modalities",
        "background",
        "tools",
        "extra_body",
        "cache_control",
        "prompt_cache_options",
    }
)
"""Fields that may ask for more than tokens in and out; a body without them is not looked into."""

_MAXIMA = frozenset({"max_tokens", "max_completion_tokens"})

_CLIENT_TOOLS = frozenset({"function", "custom"})
"""Tools that the client runs itself. Any other kind runs upstream, at a price nobody can bound."""


class ChatRequest(ModelRequest, frozen=True):
    """A checked chat request."""

    api: ClassVar[Api] = Api.CHAT

    include_usage: bool

    @classmethod
    def parse(cls, raw: bytes, allowed: frozenset[str] = frozenset()) -> "ChatRequest":
        """Check `raw`. `allowed`: features that the organization has switched on."""
        body, size_bytes = parse_object(raw)
        model = model_of(body)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise wrong("messages", "must be a non-empty array", missing=messages is None)
        for index, message in enumerate(messages):
            if not isinstance(message, dict):
                raise wrong(f"messages[{index}]", "must be an object")
            if "cache_control" in message and "cache_1h" not in allowed and lasts(message):
                raise unsupported(f"messages[{index}].cache_control.ttl", OTHER_PRICE)
            content = message.get("content")
            if isinstance(content, list):
                _check_parts(content, index, allowed)
            elif content is not None and not isinstance(content, str):
                raise wrong(f"messages[{index}].content", "must be a string or an array of parts")
            if "audio" in message and message["audio"] is not None:
                # An earlier answer's, by its id: neither in the body nor of a known length.
                raise unsupported(f"messages[{index}].audio", ELSEWHERE)
        stream = flag_of(body, "stream")
        options = body.get("stream_options")
        include_usage = False
        if options is not None:
            if not isinstance(options, dict):
                raise wrong("stream_options", "must be an object")
            if not stream:
                raise wrong("stream_options", "is only allowed when stream is true")
            include_usage = flag_of(options, "include_usage", "stream_options.include_usage")
        if not _WATCHED.isdisjoint(body):
            _refuse_unpriced(body, allowed)
        maximum = None if _MAXIMA.isdisjoint(body) else _maximum(body)
        choices = (count_of(body, "n", 1, MAX_CHOICES) or 1) if "n" in body else 1
        return cls(model, stream, maximum, choices, body, size_bytes, include_usage)

    @property
    def thinks(self) -> bool:
        """The caller asks for reasoning of models that do not reason unasked."""
        return self.body.get("thinking") is not None

    def body_for(self, candidate: Candidate, lowered: int | None = None) -> bytes:
        """The body for one candidate: its name for the model, usage asked for in streams, and a
        maximum of output tokens where `lowered` says one."""
        changed = {**self.body, "model": candidate.sent}
        if lowered is not None:
            for field in _MAXIMA:
                changed.pop(field, None)  # null, or nothing would have been lowered
            changed[self.maximum_field(candidate)] = lowered
        if self.stream and not self.include_usage:
            options = changed.get("stream_options")
            changed["stream_options"] = {**(options or {}), "include_usage": True}
        return orjson.dumps(changed)

    def maximum_field(self, candidate: Candidate) -> str:
        return candidate.provider.max_tokens_field

    def events(self, meter: Meter) -> ChatStream:
        return ChatStream(meter, drop_usage=not self.include_usage)

    def is_answer(self, answer: Mapping[str, Any]) -> bool:
        choices = answer.get("choices")
        return isinstance(choices, list) and bool(choices)

    def as_stream(self, answer: Mapping[str, Any]) -> bytes:
        return as_stream(answer, include_usage=self.include_usage)


def as_stream(answer: Mapping[str, Any], *, include_usage: bool) -> bytes:
    """A whole completion as a stream of one chunk."""
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


def _maximum(body: Mapping[str, Any]) -> int | None:
    old = count_of(body, "max_tokens", 1, MAX_TOKENS_LIMIT)
    new = count_of(body, "max_completion_tokens", 1, MAX_TOKENS_LIMIT)
    if old is not None and new is not None and old != new:
        raise wrong("max_tokens", "cannot differ from max_completion_tokens")
    return new if new is not None else old


def _refuse_unpriced(body: Mapping[str, Any], allowed: frozenset[str]) -> None:
    for name, what in _unpriced(body):
        if what not in allowed:
            raise unsupported(name, UNBOUNDED)
    for name in OTHERS_STATE:
        if body.get(name) is not None:
            raise unsupported(name, ELSEWHERE)
    extra = body.get("extra_body")
    google = extra.get("google") if isinstance(extra, dict) else None
    if isinstance(google, dict) and google.get("cached_content") is not None:
        raise unsupported("extra_body.google.cached_content", ELSEWHERE)


def _unpriced(body: Mapping[str, Any]) -> Iterator[tuple[str, Feature]]:
    """What the body asks for beyond tokens: (the field, the feature that would allow it)."""
    tier = body.get("service_tier")
    if tier is not None and not one_of(tier, FREE_TIERS):
        yield "service_tier", "service_tier"
    if body.get("web_search_options") is not None:
        yield "web_search_options", "web_search"
    if lasts(body):
        yield "cache_control.ttl", "cache_1h"
    modalities = body.get("modalities")
    if body.get("audio") is not None:
        yield "audio", "audio"
    if modalities is not None and modalities not in ([], ["text"]):
        yield "modalities", "audio"
    if body.get("background"):
        yield "background", "background"
    yield from cache_options(body)
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise wrong("tools", "must be an array")
        for index, tool in enumerate(tools):
            if not isinstance(tool, dict) or not one_of(tool.get("type"), _CLIENT_TOOLS):
                yield f"tools[{index}]", "hosted_tools"
            elif lasts(tool) or (
                isinstance(tool.get("function"), dict) and lasts(tool["function"])
            ):
                yield f"tools[{index}].cache_control.ttl", "cache_1h"


def _check_parts(parts: list[Any], message: int, allowed: frozenset[str]) -> None:
    for index, part in enumerate(parts):
        if isinstance(part, str):
            continue
        name = f"messages[{message}].content[{index}]"
        if not isinstance(part, dict):
            raise wrong(name, "must be an object")
        if "cache_1h" not in allowed and lasts(part):
            raise unsupported(f"{name}.cache_control.ttl", OTHER_PRICE)
        if part.get("type") == "input_audio" and "audio" not in allowed:
            raise unsupported(name, UNBOUNDED)
        for field, value in part.items():
            within = value if isinstance(value, dict) else {}
            if (field == "file_id" and value is not None) or within.get("file_id") is not None:
                raise unsupported(f"{name}.file_id", ELSEWHERE)
