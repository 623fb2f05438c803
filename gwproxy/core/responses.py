"""A request in the format of OpenAI's Responses: what must be understood is checked, the rest is
left alone. Pure.

This API can keep what it was asked and what it answered. Here it is told not to, and nothing that
was kept can be named: all tenants share one account upstream.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import orjson

from gwproxy.core.api import Api
from gwproxy.core.estimate import Form
from gwproxy.core.meter import Meter
from gwproxy.core.request import (
    ELSEWHERE,
    FREE_TIERS,
    MAX_TOKENS_LIMIT,
    OTHERS_STATE,
    UNBOUNDED,
    UNKNOWN_LENGTH,
    Feature,
    ModelRequest,
    cache_options,
    count_of,
    flag_of,
    model_of,
    one_of,
    parse_object,
    unsupported,
    wrong,
)
from gwproxy.core.responses_stream import ResponsesMeter, ResponsesStream, as_stream
from gwproxy.core.routing import Candidate

FORM = Form(
    "input",
    ("tools", "text"),
    # "instructions" is not among them: it is text.
    frozenset(
        {
            "model", "input", "tools", "text", "stream", "stream_options", "max_output_tokens",
            "max_tool_calls", "temperature", "top_p", "top_logprobs", "tool_choice",
            "parallel_tool_calls", "reasoning", "include", "store", "metadata", "service_tier",
            "truncation", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
            "prompt_cache_retention", "moderation", "access_programs", "image",
        }
    ),
    nested=True,
)  # fmt: skip

_CLIENT_TOOLS = frozenset({"function", "custom", "local_shell", "apply_patch"})
"""Tools that the client runs itself, whatever their settings."""

_CLIENT_ITEMS = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "local_shell_call",
        "local_shell_call_output",
        "shell_call",
        "shell_call_output",
        "apply_patch_call",
        "apply_patch_call_output",
        "tool_search_call",
        "tool_search_output",
        "additional_tools",
        "compaction",
    }
)
"""Items whose whole content is in the body."""

_WATCHED = frozenset(
    {
        *OTHERS_STATE,
        "background",
        "background_options",
        "service_tier",
        "context_management",
        "modalities",
        "audio",
        "prompt_cache_options",
        "tools",
    }
)
"""Fields that may ask for more than tokens in and out; a body without them is not looked into."""

_BARE_THOUGHT = (
    "without it the item points at state outside this request; ask for "
    'include=["reasoning.encrypted_content"] and send back what comes'
)


class ResponsesRequest(ModelRequest, frozen=True):
    """A checked request."""

    api: ClassVar[Api] = Api.RESPONSES
    form: ClassVar[Form] = FORM
    meter: ClassVar[type[Meter]] = ResponsesMeter

    @classmethod
    def parse(cls, raw: bytes, allowed: frozenset[str] = frozenset()) -> "ResponsesRequest":
        """Check `raw`. `allowed`: features that the organization has switched on."""
        body, size_bytes = parse_object(raw)
        model = model_of(body)
        if not _WATCHED.isdisjoint(body):
            _refuse_unpriced(body, allowed)
        given = body.get("input")
        if isinstance(given, list) and given:
            _check_items(given, "input", allowed)
        elif not isinstance(given, str) or not given:
            raise wrong(
                "input", "must be a non-empty string or array of items", missing=given is None
            )
        instructions = body.get("instructions")
        if isinstance(instructions, list):
            _check_items(instructions, "instructions", allowed)
        elif instructions is not None and not isinstance(instructions, str):
            raise wrong("instructions", "must be a string")
        stream = flag_of(body, "stream")
        flag_of(body, "store")
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise wrong("stream_options", "must be an object")
        maximum = count_of(body, "max_output_tokens", 1, MAX_TOKENS_LIMIT)
        return cls(model, stream, maximum, 1, body, size_bytes)

    @property
    def thinks(self) -> bool:
        reasoning = self.body.get("reasoning")
        return isinstance(reasoning, dict) and reasoning.get("effort") not in (None, "none")

    @property
    def edits(self) -> tuple[str, ...]:
        return ("store=false",) if self.body.get("store") else ()

    def body_for(self, candidate: Candidate, lowered: int | None = None) -> bytes:
        """As for the others, and nothing is kept upstream."""
        changed = {**self.body, "model": candidate.native, "store": False}
        if lowered is not None:
            changed[self.maximum_field(candidate)] = lowered
        return orjson.dumps(changed)

    def maximum_field(self, candidate: Candidate) -> str:
        return "max_output_tokens"

    def events(self, meter: Meter) -> ResponsesStream:
        return ResponsesStream(meter)

    def is_answer(self, answer: Mapping[str, Any]) -> bool:
        return (
            answer.get("object") == "response"
            and isinstance(answer.get("output"), list)
            and answer.get("status") != "failed"
        )

    def as_stream(self, answer: Mapping[str, Any]) -> bytes:
        return as_stream(answer)


# -- checks --------------------------------------------------------------------------------------


def _check_items(items: list[Any], name: str, allowed: frozenset[str]) -> None:
    for index, item in enumerate(items):
        at = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise wrong(at, "must be an object")
        kind = item.get("type")
        if kind == "item_reference" or (kind is None and "role" not in item):
            raise unsupported(at, ELSEWHERE)
        if kind == "reasoning":
            if not item.get("encrypted_content") and not item.get("content"):
                raise unsupported(f"{at}.encrypted_content", _BARE_THOUGHT)
        elif kind == "image_generation_call" and not item.get("result"):
            raise unsupported(at, ELSEWHERE)
        elif kind == "compaction_trigger":
            if "context_management" not in allowed:
                raise unsupported(at, UNBOUNDED)
        elif kind is not None and not one_of(kind, _CLIENT_ITEMS) and "hosted_tools" not in allowed:
            raise unsupported(at, UNBOUNDED)
        if "tools" in item and "hosted_tools" not in allowed:
            for tool in _hosted(item["tools"], f"{at}.tools"):
                raise unsupported(tool, UNBOUNDED)
        _check_parts(item, at, allowed)


def _check_parts(holder: Mapping[str, Any], name: str, allowed: frozenset[str]) -> None:
    """What an item or a part points at, in itself and in the parts that it has."""
    if holder.get("file_id") is not None:
        raise unsupported(f"{name}.file_id", ELSEWHERE)
    if holder.get("file_url") is not None:
        raise unsupported(f"{name}.file_url", UNKNOWN_LENGTH)
    if holder.get("type") == "input_audio" and "audio" not in allowed:
        raise unsupported(name, UNBOUNDED)
    for field in ("content", "output"):
        parts = holder.get(field)
        if isinstance(parts, dict):
            _check_parts(parts, f"{name}.{field}", allowed)
        elif isinstance(parts, list):
            for index, part in enumerate(parts):
                if not isinstance(part, dict):
                    raise wrong(f"{name}.{field}[{index}]", "must be an object")
                _check_parts(part, f"{name}.{field}[{index}]", allowed)


def _refuse_unpriced(body: Mapping[str, Any], allowed: frozenset[str]) -> None:
    for name in OTHERS_STATE:
        if body.get(name) is not None:
            raise unsupported(name, ELSEWHERE)
    for name, feature in _unpriced(body):
        if feature not in allowed:
            raise unsupported(name, UNBOUNDED)


def _unpriced(body: Mapping[str, Any]) -> Iterator[tuple[str, Feature]]:
    """What the body asks for beyond tokens: (the field, the feature that would allow it)."""
    for name in ("background", "background_options"):
        if body.get(name):
            yield name, "background"
    tier = body.get("service_tier")
    if tier is not None and not one_of(tier, FREE_TIERS):
        yield "service_tier", "service_tier"
    if body.get("context_management"):
        # What a summary costs is not in the answer's usage.
        yield "context_management", "context_management"
    if body.get("audio") is not None:
        yield "audio", "audio"
    if body.get("modalities") not in (None, [], ["text"]):
        yield "modalities", "audio"
    yield from cache_options(body)
    for tool in _hosted(body.get("tools"), "tools"):
        yield tool, "hosted_tools"


def _hosted(tools: Any, name: str) -> Iterator[str]:
    """The names of those that run upstream, at a price nobody can bound."""
    if tools is None:
        return
    if not isinstance(tools, list):
        raise wrong(name, "must be an array")
    for index, tool in enumerate(tools):
        at = f"{name}[{index}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind == "namespace":
            yield from _hosted(tool.get("tools"), f"{at}.tools")
        elif kind == "shell":
            place = tool.get("environment")
            if not isinstance(place, dict) or place.get("type") != "local":
                yield at
        elif kind == "tool_search":
            if tool.get("execution") != "client":
                yield at
        elif not one_of(kind, _CLIENT_TOOLS):
            yield at
