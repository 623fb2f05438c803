"""Requests and answers in Anthropic's format: what is refused and by which name, what a prompt may
come to, and what the meter makes of each event, whatever the split of the bytes."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.errors import GatewayError, InvalidRequest
from gwproxy.core.messages import VERSION, MessagesRequest
from gwproxy.core.messages_stream import MessagesMeter, MessagesStream
from gwproxy.core.routing import Candidate, Provider
from gwproxy.core.usage import Usage
from tests.harness import tokenizer

ASK: dict[str, Any] = {
    "model": "anthropic/claude-sonnet-4-5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello"}],
}
TOOL = {"name": "weather", "input_schema": {"type": "object"}}


def parse(allowed: frozenset[str] = frozenset(), **fields: Any) -> MessagesRequest:
    body = {name: value for name, value in {**ASK, **fields}.items() if value is not None}
    return MessagesRequest.parse(orjson.dumps(body), allowed)


def block(**fields: Any) -> list[Any]:
    return [{"role": "user", "content": [fields]}]


# -- what a request must look like ---------------------------------------------------------------


def test_what_is_not_understood_is_sent_as_it_came() -> None:
    request = parse(system="Be brief.", stream=True, unknown={"kept": [None, 1.5]}, top_k=3)
    provider = Provider("anthropic", "anthropic", "anthropic")
    candidate = Candidate(
        provider, "claude-sonnet-4-5", "anthropic/claude-sonnet-4-5", "claude-sonnet-4-5"
    )
    sent = orjson.loads(request.body_for(candidate))
    assert sent == {**request.body, "model": "claude-sonnet-4-5"}
    assert (request.max_output_tokens, request.choices, request.stream) == (100, 1, True)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": None}, "max_tokens", "missing_required_parameter"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": ["Hi"]}, "messages[0]", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"system": 3}, "system", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"tools": {}}, "tools", "invalid_value"),
    ],
)
def test_a_body_that_cannot_be_used_is_refused(
    fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**fields)
    assert (refused.value.param, refused.value.code) == (param, code)


HOUR = {"type": "ephemeral", "ttl": "1h"}


@pytest.mark.parametrize(
    ("fields", "param", "feature"),
    [
        ({"tools": [{"type": "web_search_20250305"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [TOOL, {"type": "code_execution_20250825"}]}, "tools[1]", "hosted_tools"),
        ({"tools": [{"type": "computer_20250124"}]}, "tools[0]", "hosted_tools"),
        ({"mcp_servers": [{"url": "https://x"}]}, "mcp_servers", "hosted_tools"),
        (
            {"messages": block(type="server_tool_use", name="web_search", input={})},
            "messages[0].content[0]",
            "hosted_tools",
        ),
        (
            {"messages": block(type="web_search_tool_result", content=[])},
            "messages[0].content[0]",
            "hosted_tools",
        ),
        ({"service_tier": "priority"}, "service_tier", "service_tier"),
        ({"speed": "fast"}, "speed", "speed"),
        ({"inference_geo": "us"}, "inference_geo", "inference_geo"),
        ({"fallbacks": ["other"]}, "fallbacks", "fallbacks"),
        ({"compaction": {}}, "compaction", "context_management"),
        (
            {"context_management": {"edits": [{"type": "compact_20260112"}]}},
            "context_management",
            "context_management",
        ),
        ({"cache_control": HOUR}, "cache_control.ttl", "cache_1h"),
        ({"tools": [{**TOOL, "cache_control": HOUR}]}, "tools[0].cache_control.ttl", "cache_1h"),
        (
            {"system": [{"type": "text", "text": "x", "cache_control": HOUR}]},
            "system[0].cache_control.ttl",
            "cache_1h",
        ),
        (
            {"messages": block(type="text", text="x", cache_control=HOUR)},
            "messages[0].content[0].cache_control.ttl",
            "cache_1h",
        ),
    ],
)
def test_what_has_no_price_is_refused_unless_it_is_switched_on(
    fields: dict[str, Any], param: str, feature: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**fields)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")
    assert parse(frozenset({feature}), **fields).body


ALL = frozenset(
    {"hosted_tools", "cache_1h", "context_management", "fallbacks", "speed", "service_tier"}
)
FILE = {"type": "file", "file_id": "file_1"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"container": "container_1"}, "container"),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "thread"),
        ({"diagnostics": {"previous_message_id": "msg_1"}}, "diagnostics"),
        ({"fallback_credit_token": "x"}, "fallback_credit_token"),
        ({"billing_policy": {"bill_to": "user_profile"}}, "billing_policy"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        (
            {"messages": block(type="container_upload", file_id="file_1")},
            "messages[0].content[0].file_id",
        ),
        (
            {"messages": block(type="image", source=FILE)},
            "messages[0].content[0].source.file_id",
        ),
        (
            {"messages": block(type="tool_result", content=[{"type": "document", "source": FILE}])},
            "messages[0].content[0].content[0].source.file_id",
        ),
        (
            {
                "messages": block(
                    type="document",
                    source={"type": "content", "content": [{"type": "image", "source": FILE}]},
                )
            },
            "messages[0].content[0].source.content[0].source.file_id",
        ),
        (
            {"messages": block(type="document", source={"type": "url", "url": "https://x"})},
            "messages[0].content[0].source.url",
        ),
    ],
)
def test_what_others_have_left_upstream_cannot_be_reached(
    fields: dict[str, Any], param: str
) -> None:
    for allowed in (frozenset[str](), ALL):
        with pytest.raises(InvalidRequest) as refused:
            parse(allowed, **fields)
        assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL, {"type": "custom", **TOOL}, {"type": "bash_20250124", "name": "bash"}]},
        {"tools": [{"type": "text_editor_20250728"}, {"type": "memory_20250818"}]},
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        {"service_tier": "standard_only", "speed": "standard", "inference_geo": "global"},
        {"cache_control": {"type": "ephemeral"}},
        {"messages": block(type="tool_use", id="t", name="n", input={"file_id": "mine"})},
        {"messages": block(type="image", source={"type": "url", "url": "https://x"})},
        {"messages": block(type="document", source={"type": "base64", "data": "JVBERi0="})},
        {"messages": block(type="thinking", thinking="Hm", signature="c2ln")},
    ],
)
def test_what_the_client_does_itself_is_nobodys_business(fields: dict[str, Any]) -> None:
    assert parse(**fields).body


def test_both_headers_are_let_in_by_their_grammar() -> None:
    raw = orjson.dumps(ASK)

    def lines(version: str | None, *betas: str) -> bytes:
        return MessagesRequest.parse(raw, frozenset(), version, betas).header_lines

    assert lines(None) == f"anthropic-version: {VERSION}\r\n".encode()
    assert lines("2026-10-21", "a-2025-01-01, b", "c") == (
        b"anthropic-version: 2026-10-21\r\nanthropic-beta: a-2025-01-01, b,c\r\n"
    )
    for version in (
        "",
        "2023-06-01\r\nx: y",
        "latest",
        "2023-06-01 ",
        "\u0662\u0660\u0662\u0663-06-01",
    ):
        with pytest.raises(InvalidRequest, match="anthropic-version"):
            lines(version)
    for betas in (("",), ("a\r\nx: y",), ("a;b",), ("a",) * 33, ("x" * 65,), ("a,,b",)):
        with pytest.raises(InvalidRequest, match="anthropic-beta"):
            lines(None, *betas)


@pytest.mark.parametrize(
    ("thinking", "hidden"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
    ],
)
def test_a_thought_that_is_shown_in_part_counts_as_hidden(thinking: Any, hidden: bool) -> None:
    assert parse(thinking=thinking).thinks is hidden


# -- what a prompt may come to -------------------------------------------------------------------

TEXT = st.text(max_size=40)
IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
BLOCKS = st.lists(
    st.one_of(
        TEXT.map(lambda text: {"type": "text", "text": text}),
        st.just(IMAGE),
        TEXT.map(lambda text: {"type": "tool_use", "name": "n", "id": "i", "input": {"a": text}}),
        st.just(
            {
                "type": "document",
                "source": {"type": "content", "content": [IMAGE, IMAGE, IMAGE]},
            }
        ),
        TEXT.map(
            lambda text: {"type": "tool_result", "content": [{"type": "text", "text": text}, IMAGE]}
        ),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(st.lists(st.one_of(TEXT, BLOCKS), min_size=1, max_size=4), TEXT, st.booleans())
def test_the_bound_is_above_the_count(contents: list[Any], system: str, tools: bool) -> None:
    body = {
        **ASK,
        "messages": [{"role": "user", "content": content} for content in contents],
        "system": system,
        **({"tools": [TOOL]} if tools else {}),
    }
    request = MessagesRequest.parse(orjson.dumps(body))
    assert 0 < request.prompt_tokens(tokenizer().count) <= request.prompt_bound()


def test_each_image_counts_however_deep_it_lies() -> None:
    plain = parse(messages=block(type="text", text="x")).prompt_bound()
    source = {"type": "content", "content": [IMAGE, IMAGE]}
    assert parse(messages=block(type="document", source=source)).prompt_bound() > plain + 3 * 4_800


# -- what the meter makes of a stream ------------------------------------------------------------


def event(kind: str, **data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **data}))


def delta(index: int, **fields: Any) -> bytes:
    return event("content_block_delta", index=index, delta=fields)


USAGE = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 20,
    "output_tokens": 1,
}
STREAM = [
    event("message_start", message={"id": "msg_1", "content": [], "usage": USAGE}),
    event("ping"),
    event("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
    delta(0, type="thinking_delta", thinking="Let me see: "),
    delta(0, type="signature_delta", signature="AAAA" * 50),
    event("content_block_stop", index=0),
    event("content_block_start", index=1, content_block={"type": "text", "text": ""}),
    delta(1, type="text_delta", text="Grüße, 世"),
    delta(1, type="text_delta", text="界! 😀"),
    event("content_block_stop", index=1),
    event(
        "content_block_start",
        index=2,
        content_block={"type": "tool_use", "id": "t", "name": "weather", "input": {}},
    ),
    delta(2, type="input_json_delta", partial_json='{"city":"Pa'),
    delta(2, type="input_json_delta", partial_json='ris"}'),
    event("content_block_stop", index=2),
    event("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 45}),
    event("message_stop"),
]


def new() -> MessagesStream:
    return MessagesStream(MessagesMeter(tokenizer().count))


def words() -> int:
    count = tokenizer().count
    texts = ("Let me see: ", "Grüße, 世界! 😀", "weather", '{"city":"Paris"}')
    return sum(map(count, texts))


def test_nothing_counts_before_the_first_word_and_usage_is_none() -> None:
    stream = new()
    for each in STREAM[:3]:
        stream.feed(each)
        assert not stream.committed
    assert stream.meter.partial
    assert stream.meter.usage == Usage(10, 20, 3, 1, 0)
    stream.feed(STREAM[3])
    assert stream.committed


def test_a_clean_end_after_the_last_usage_is_whole_and_before_it_is_not() -> None:
    for last, complete in ((-1, True), (-2, False)):
        stream = new()
        for each in STREAM[:last]:
            stream.feed(each)
        stream.finish()
        assert stream.complete is complete


def test_an_error_event_ends_it_and_is_kept() -> None:
    stream = new()
    error = {"type": "overloaded_error", "message": "Overloaded"}
    assert stream.feed(event("error", error=error)) == event("error", error=error)
    assert (stream.error, stream.complete, stream.committed) == (error, False, False)


def test_our_own_error_is_one_that_its_clients_understand() -> None:
    said = new().error_event(GatewayError("It broke.", status=502, code="stream_interrupted"))
    error = {"type": "api_error", "message": "It broke.", "code": "stream_interrupted"}
    assert said == event("error", error=error)


def whole_answer() -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [
            {"type": "thinking", "thinking": "Let me see: ", "signature": "AAAA"},
            {"type": "text", "text": "Grüße, 世界! 😀"},
            {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Paris"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {**USAGE, "output_tokens": 45},
    }
