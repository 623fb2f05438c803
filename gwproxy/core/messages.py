"""A request in Anthropic's Messages format: what must be understood is checked, the rest is left
alone. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from gwproxy.core.api import Api
from gwproxy.core.estimate import Form
from gwproxy.core.messages_stream import MessagesMeter, MessagesStream, as_stream
from gwproxy.core.meter import Meter
from gwproxy.core.request import (
    ELSEWHERE,
    FREE_TIERS,
    MAX_TOKENS_LIMIT,
    OTHER_PRICE,
    OTHERS_STATE,
    UNBOUNDED,
    UNKNOWN_LENGTH,
    Feature,
    ModelRequest,
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

VERSION = "2023-06-01"
"""Of the API, where the caller names none; Anthropic wants one with every request."""

_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_BETAS = re.compile(r"[A-Za-z0-9._-]{1,64}(?: ?, ?[A-Za-z0-9._-]{1,64}){0,31}")

FORM = Form(
    "messages",
    ("tools", "output_config", "output_format"),
    # "system" is not among them: it is text.
    frozenset(
        {
            "model", "messages", "tools", "output_config", "output_format", "max_tokens", "stream",
            "temperature", "top_p", "top_k", "stop_sequences", "metadata", "service_tier",
            "tool_choice", "thinking", "cache_control", "context_management", "inference_geo",
            "speed",
        }
    ),
    # Claude is told what tools are in words of its own: 313 to 530 tokens by model, and some
    # hundred more for each of the tools that it knows by name.
    schema_tokens=2_048,
    nested=True,
)  # fmt: skip

_CLIENT_TOOLS = re.compile(r"custom|(?:bash|text_editor|memory)_[0-9]+")
"""Tools that the client runs itself; a tool without a type is one, too."""

_HOSTED_BLOCKS = re.compile(r"server_tool_use|mcp_tool_use|[a-z_]+_tool_result")
"""What the tools that run upstream have left in a conversation; `tool_result` is the client's."""

_STATE = ("diagnostics", "fallback_credit_token", "billing_policy")
"""More of what points at state kept upstream: `diagnostics` compares with an earlier request's
prompt, the last two with what somebody was billed."""

_WATCHED = frozenset(
    {
        *OTHERS_STATE,
        *_STATE,
        "mcp_servers",
        "compaction",
        "service_tier",
        "speed",
        "inference_geo",
        "context_management",
        "fallbacks",
        "cache_control",
        "background",
        "tools",
    }
)
"""Fields that may ask for more than tokens in and out; a body without them is not looked into."""


class MessagesRequest(ModelRequest, frozen=True):
    """A checked request. `headers`: the two that the API has, as lines to be sent on."""

    api: ClassVar[Api] = Api.MESSAGES
    form: ClassVar[Form] = FORM
    meter: ClassVar[type[Meter]] = MessagesMeter

    headers: bytes

    @classmethod
    def parse(
        cls,
        raw: bytes,
        allowed: frozenset[str] = frozenset(),
        version: str | None = None,
        betas: Sequence[str] = (),
    ) -> "MessagesRequest":
        """Check `raw` and the headers `anthropic-version` and `anthropic-beta`. `allowed`: features
        that the organization has switched on."""
        headers = _header_lines(version, betas)
        body, size_bytes = parse_object(raw)
        model = model_of(body)
        maximum = count_of(body, "max_tokens", 0, MAX_TOKENS_LIMIT)
        if maximum is None:
            raise wrong("max_tokens", "", missing=True)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise wrong("messages", "must be a non-empty array", missing=messages is None)
        for index, message in enumerate(messages):
            name = f"messages[{index}]"
            if not isinstance(message, dict):
                raise wrong(name, "must be an object")
            _check_content(message.get("content"), f"{name}.content", allowed)
        _check_content(body.get("system"), "system", allowed)
        stream = flag_of(body, "stream")
        if not _WATCHED.isdisjoint(body):
            _refuse_unpriced(body, allowed)
        return cls(model, stream, maximum, 1, body, size_bytes, headers)

    @property
    def thinks(self) -> bool:
        thinking = self.body.get("thinking")
        # What is shown of a thought is a summary, and all of it is billed.
        return isinstance(thinking, dict) and thinking.get("type") != "disabled"

    @property
    def header_lines(self) -> bytes:
        return self.headers

    def maximum_field(self, candidate: Candidate) -> str:
        return "max_tokens"

    def events(self, meter: Meter) -> MessagesStream:
        return MessagesStream(meter)

    def is_answer(self, answer: Mapping[str, Any]) -> bool:
        return answer.get("type") == "message" and isinstance(answer.get("content"), list)

    def as_stream(self, answer: Mapping[str, Any]) -> bytes:
        return as_stream(answer)


def _header_lines(version: str | None, betas: Sequence[str]) -> bytes:
    """Both go into a head of ours, so they are let in by their grammar and not otherwise."""
    if version is None:
        version = VERSION
    elif not _VERSION.fullmatch(version):
        raise wrong("anthropic-version", f"must be a date such as {VERSION}")
    lines = f"anthropic-version: {version}\r\n"
    if betas:
        joined = ",".join(betas)
        if not _BETAS.fullmatch(joined):
            raise wrong("anthropic-beta", "must be names with commas between them, 32 at the most")
        lines += f"anthropic-beta: {joined}\r\n"
    return lines.encode("ascii")


# -- checks --------------------------------------------------------------------------------------


def _check_content(content: Any, name: str, allowed: frozenset[str]) -> None:
    if isinstance(content, list):
        for index, block in enumerate(content):
            _check_block(block, f"{name}[{index}]", allowed)
    elif content is not None and not isinstance(content, str):
        raise wrong(name, "must be a string or an array of blocks")


def _check_block(block: Any, name: str, allowed: frozenset[str]) -> None:
    if not isinstance(block, dict):
        raise wrong(name, "must be an object")
    if "cache_1h" not in allowed and lasts(block):
        raise unsupported(f"{name}.cache_control.ttl", OTHER_PRICE)
    kind = block.get("type")
    if kind == "container_upload" or block.get("file_id") is not None:
        raise unsupported(f"{name}.file_id", ELSEWHERE)
    if (
        isinstance(kind, str)
        and kind != "tool_result"
        and _HOSTED_BLOCKS.fullmatch(kind)
        and "hosted_tools" not in allowed
    ):
        raise unsupported(name, UNBOUNDED)
    source = block.get("source")
    if isinstance(source, dict):
        if source.get("type") == "file" or source.get("file_id") is not None:
            raise unsupported(f"{name}.source.file_id", ELSEWHERE)
        if kind == "document" and source.get("type") == "url":
            raise unsupported(f"{name}.source.url", UNKNOWN_LENGTH)
        _check_content(source.get("content"), f"{name}.source.content", allowed)
    if isinstance(block.get("content"), list):
        _check_content(block["content"], f"{name}.content", allowed)


def _refuse_unpriced(body: Mapping[str, Any], allowed: frozenset[str]) -> None:
    for name in (*OTHERS_STATE, *_STATE):
        if body.get(name) is not None:
            raise unsupported(name, ELSEWHERE)
    for name, feature in _unpriced(body):
        if feature not in allowed:
            raise unsupported(name, UNBOUNDED)


def _unpriced(body: Mapping[str, Any]) -> Iterator[tuple[str, Feature]]:
    """What the body asks for beyond tokens: (the field, the feature that would allow it)."""
    if body.get("mcp_servers"):
        yield "mcp_servers", "hosted_tools"
    tier = body.get("service_tier")
    if tier is not None and not one_of(tier, FREE_TIERS):
        yield "service_tier", "service_tier"
    # Both have prices of their own: six times the usual one, and a tenth more.
    if body.get("speed") not in (None, "standard"):
        yield "speed", "speed"
    if body.get("inference_geo") not in (None, "global"):
        yield "inference_geo", "inference_geo"
    if body.get("fallbacks"):
        yield "fallbacks", "fallbacks"  # another model would answer, at its own price
    if body.get("background"):
        yield "background", "background"
    if lasts(body):
        yield "cache_control.ttl", "cache_1h"
    management = body.get("context_management")
    if body.get("compaction") is not None:
        yield "compaction", "context_management"
    if management is not None:
        edits = management.get("edits") if isinstance(management, dict) else None
        for edit in edits if isinstance(edits, list) else [None]:
            kind = edit.get("type") if isinstance(edit, dict) else None
            if not isinstance(kind, str) or not kind.startswith("clear_"):
                # A summary is written by the model, and is not in the answer's usage.
                yield "context_management", "context_management"
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise wrong("tools", "must be an array")
        for index, tool in enumerate(tools):
            kind = tool.get("type") if isinstance(tool, dict) else ""
            if kind is not None and not (isinstance(kind, str) and _CLIENT_TOOLS.fullmatch(kind)):
                yield f"tools[{index}]", "hosted_tools"
            elif lasts(tool):
                yield f"tools[{index}].cache_control.ttl", "cache_1h"
