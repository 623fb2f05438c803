"""Requests and answers in the format of OpenAI's Responses: what is refused and by which name, what
is sent, and what the meter makes of each event, whatever the split of the bytes."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.errors import GatewayError, InvalidRequest
from gwproxy.core.responses import ResponsesRequest
from gwproxy.core.responses_stream import ResponsesMeter, ResponsesStream
from gwproxy.core.routing import Candidate, Provider
from tests.harness import tokenizer

ASK: dict[str, Any] = {"model": "openai/gpt-4o-mini", "input": "Hello"}
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CANDIDATE = Candidate(
    Provider("openai", "openai", "openai"), "gpt-4o-mini", "openai/gpt-4o-mini", "gpt-4o-mini"
)


def parse(allowed: frozenset[str] = frozenset(), **fields: Any) -> ResponsesRequest:
    body = {name: value for name, value in {**ASK, **fields}.items() if value is not None}
    return ResponsesRequest.parse(orjson.dumps(body), allowed)


def said(**part: Any) -> list[Any]:
    return [{"role": "user", "content": [part]}]


# -- what a request must look like ---------------------------------------------------------------


@pytest.mark.parametrize("store", [None, True, False])
def test_nothing_is_kept_upstream_whatever_was_asked(store: bool | None) -> None:
    request = parse(store=store, unknown={"kept": [None, 1.5]}, instructions="Be brief.")
    sent = orjson.loads(request.body_for(CANDIDATE))
    assert sent == {**request.body, "model": "gpt-4o-mini", "store": False}
    assert request.edits == (("store=false",) if store else ())
    assert orjson.loads(request.body_for(CANDIDATE, 77))["max_output_tokens"] == 77


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 3}, "input", "invalid_value"),
        ({"input": ["Hi"]}, "input[0]", "invalid_value"),
        (
            {"input": [{"role": "user", "content": ["Hi"]}]},
            "input[0].content[0]",
            "invalid_value",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": True}, "max_output_tokens", "invalid_value"),
        ({"store": "no"}, "store", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_value"),
        ({"stream_options": []}, "stream_options", "invalid_value"),
        ({"instructions": 3}, "instructions", "invalid_value"),
        ({"tools": {}}, "tools", "invalid_value"),
    ],
)
def test_a_body_that_cannot_be_used_is_refused(
    fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**fields)
    assert (refused.value.param, refused.value.code) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "feature"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [FUNCTION, {"type": "file_search"}]}, "tools[1]", "hosted_tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [{"type": "image_generation"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [{"type": "mcp"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [{"type": "programmatic_tool_calling"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [{"type": "shell"}]}, "tools[0]", "hosted_tools"),
        ({"tools": [{"type": "tool_search"}]}, "tools[0]", "hosted_tools"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]},
            "tools[0].tools[0]",
            "hosted_tools",
        ),
        (
            {"input": [{"type": "additional_tools", "tools": [{"type": "mcp"}]}]},
            "input[0].tools[0]",
            "hosted_tools",
        ),
        ({"input": [{"type": "web_search_call", "id": "ws"}]}, "input[0]", "hosted_tools"),
        ({"input": [{"type": "something_new"}]}, "input[0]", "hosted_tools"),
        ({"input": [{"type": "compaction_trigger"}]}, "input[0]", "context_management"),
        (
            {"context_management": [{"type": "compaction"}]},
            "context_management",
            "context_management",
        ),
        ({"background": True}, "background", "background"),
        ({"background_options": {"completion_window": "8h"}}, "background_options", "background"),
        ({"service_tier": "flex"}, "service_tier", "service_tier"),
        ({"prompt_cache_options": {"ttl": "12h"}}, "prompt_cache_options.ttl", "cache_12h"),
        ({"modalities": ["text", "audio"]}, "modalities", "audio"),
        (
            {"input": said(type="input_audio", input_audio={})},
            "input[0].content[0]",
            "audio",
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


ALL = frozenset({"hosted_tools", "background", "context_management", "audio", "service_tier"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"container": "cntr_1"}, "container"),
        ({"thread": {"id": "thread_1"}}, "thread"),
        ({"thread_id": "thread_1"}, "thread_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": None, "id": "msg_1"}]}, "input[0]"),
        (
            {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]},
            "input[0].encrypted_content",
        ),
        ({"input": [{"type": "image_generation_call", "id": "ig_1"}]}, "input[0]"),
        ({"input": said(type="input_file", file_id="file_1")}, "input[0].content[0].file_id"),
        ({"input": said(type="input_image", file_id="file_1")}, "input[0].content[0].file_id"),
        (
            {"input": said(type="input_file", file_url="https://x")},
            "input[0].content[0].file_url",
        ),
        (
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_file", "file_id": "file_1"}],
                    }
                ]
            },
            "input[0].output[0].file_id",
        ),
        (
            {"input": [{"type": "computer_call_output", "output": {"file_id": "file_1"}}]},
            "input[0].output.file_id",
        ),
        (
            {"prompt_cache_options": {"comparison_response_id": "resp_1"}},
            "prompt_cache_options.comparison_response_id",
        ),
    ],
)
def test_what_others_have_left_upstream_cannot_be_reached(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(ALL, **fields)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [FUNCTION, {"type": "custom", "name": "x"}, {"type": "apply_patch"}]},
        {"tools": [{"type": "shell", "environment": {"type": "local"}}, {"type": "local_shell"}]},
        {"tools": [{"type": "tool_search", "execution": "client"}]},
        {"tools": [{"type": "namespace", "name": "n", "tools": [FUNCTION]}]},
        {"input": [{"type": "reasoning", "id": "rs", "encrypted_content": "x", "summary": []}]},
        {"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}]},
        {"input": [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}]},
        {"input": said(type="input_image", image_url="https://x")},
        {"input": said(type="input_file", file_data="data:application/pdf;base64,JVBERi0=")},
        {"service_tier": "default", "background": False, "prompt_cache_options": {"ttl": "30m"}},
        {"instructions": [{"role": "system", "content": "Be brief."}]},
    ],
)
def test_what_the_client_does_itself_is_nobodys_business(fields: dict[str, Any]) -> None:
    assert parse(**fields).body


@pytest.mark.parametrize(
    ("reasoning", "hidden"),
    [
        (None, False),
        ({"effort": "none"}, False),
        ({"summary": "auto"}, False),
        ({"effort": "low"}, True),
    ],
)
def test_an_effort_asked_for_counts_as_hidden(reasoning: Any, hidden: bool) -> None:
    assert parse(reasoning=reasoning).thinks is hidden


# -- what a prompt may come to -------------------------------------------------------------------

TEXT = st.text(min_size=1, max_size=40)
IMAGE = {"type": "input_image", "image_url": "x"}
ITEMS = st.one_of(
    TEXT.map(lambda text: {"role": "user", "content": text}),
    TEXT.map(
        lambda text: {"role": "user", "content": [{"type": "input_text", "text": text}, IMAGE]}
    ),
    TEXT.map(lambda text: {"type": "function_call", "name": "f", "arguments": text}),
    TEXT.map(
        lambda text: {
            "type": "function_call_output",
            "output": [{"type": "input_text", "text": text}, IMAGE],
        }
    ),
)


@settings(deadline=None)
@given(st.one_of(TEXT, st.lists(ITEMS, min_size=1, max_size=4)), TEXT, st.booleans())
def test_the_bound_is_above_the_count(given: Any, instructions: str, tools: bool) -> None:
    more = {"tools": [FUNCTION]} if tools else {}
    body = {**ASK, "input": given, "instructions": instructions, **more}
    request = ResponsesRequest.parse(orjson.dumps(body))
    counted = request.prompt_tokens(tokenizer().count)
    assert tokenizer().count(instructions) <= counted <= request.prompt_bound()


def test_a_text_alone_is_counted() -> None:
    long = parse(input="word " * 1000)
    assert long.prompt_tokens(tokenizer().count) >= 1000
    assert long.text_alone
    assert not parse(input="word", tools=[FUNCTION]).text_alone


# -- what the meter makes of a stream ------------------------------------------------------------


def event(kind: str, number: int, **data: Any) -> bytes:
    body = orjson.dumps({"type": kind, **data, "sequence_number": number})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)


def delta(number: int, kind: str, text: str, **more: Any) -> bytes:
    return event(f"response.{kind}.delta", number, delta=text, **more)


USAGE = {
    "input_tokens": 30,
    "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 5},
    "output_tokens": 45,
    "output_tokens_details": {"reasoning_tokens": 20},
    "total_tokens": 75,
}
CALL = {"type": "function_call", "name": "weather", "arguments": '{"city":"Paris"}'}
ANSWER = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "error": None,
    "output": [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Let me see: "}]},
        {
            "type": "message",
            "id": "msg_1",
            "content": [
                {"type": "output_text", "text": "Grüße, 世界! 😀", "annotations": []},
                {"type": "refusal", "refusal": "No, I won't."},
            ],
        },
        {**CALL, "id": "fc_1"},
    ],
    "usage": USAGE,
}
STREAM = [
    event("response.created", 0, response={"id": "resp_1", "usage": None}),
    event("response.in_progress", 1, response={"id": "resp_1"}),
    event("response.output_item.added", 2, output_index=0, item={"type": "reasoning"}),
    delta(3, "reasoning_summary_text", "Let me ", output_index=0, summary_index=0),
    delta(4, "reasoning_summary_text", "see: ", output_index=0, summary_index=0),
    event("response.output_item.added", 5, output_index=1, item={"type": "message"}),
    delta(6, "output_text", "Grüße, 世", output_index=1, content_index=0, logprobs=[]),
    delta(7, "output_text", "界! 😀", output_index=1, content_index=0, logprobs=[]),
    event("response.output_text.done", 8, output_index=1, text="Grüße, 世界! 😀"),
    delta(9, "refusal", "No, I won't.", output_index=1, content_index=1),
    event("response.output_item.added", 10, output_index=2, item={**CALL, "arguments": ""}),
    delta(11, "function_call_arguments", '{"city":"Pa', output_index=2),
    delta(12, "function_call_arguments", 'ris"}', output_index=2),
    event("response.output_item.done", 13, output_index=2, item=CALL),
    event("response.completed", 14, response=ANSWER),
]


def new() -> ResponsesStream:
    return ResponsesStream(ResponsesMeter(tokenizer().count))


def words() -> int:
    texts = ("Let me see: ", "Grüße, 世界! 😀", "No, I won't.", "weather", '{"city":"Paris"}')
    return sum(map(tokenizer().count, texts))


def test_an_answer_that_was_cut_at_its_maximum_is_whole() -> None:
    stream = new()
    stream.feed(STREAM[6] + event("response.incomplete", 7, response=ANSWER))
    assert (stream.done, stream.complete) == (True, True)


def test_a_stream_without_deltas_is_counted_at_its_end() -> None:
    stream = new()
    stream.feed(event("response.completed", 0, response={**ANSWER, "usage": None}))
    assert (stream.complete, stream.meter.usage, stream.meter.counted()) == (True, None, words())


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            {"type": "error", "code": "server_error", "message": "No", "param": None},
            {"type": "error", "code": "server_error", "message": "No", "param": None},
        ),
        (
            {"type": "response.failed", "response": {"error": {"code": "x", "message": "No"}}},
            {"code": "x", "message": "No"},
        ),
    ],
)
def test_both_ways_of_failing_are_seen(data: dict[str, Any], error: Any) -> None:
    stream = new()
    sent = b"data: %b\n\n" % orjson.dumps(data)
    assert stream.feed(sent) == sent
    assert (stream.error, stream.complete, stream.committed) == (error, False, False)


def test_our_own_error_follows_in_the_count_of_events() -> None:
    stream = new()
    for each in STREAM[:8]:
        stream.feed(each)
    told = stream.error_event(
        GatewayError("It broke.", code="stream_interrupted", gateway={"scope": "user"})
    )
    head, _, data = told.partition(b"\n")
    assert head == b"event: error"
    assert orjson.loads(data.removeprefix(b"data: ")) == {
        "type": "error",
        "code": "stream_interrupted",
        "message": "It broke.",
        "param": None,
        "sequence_number": 8,
        "gateway": {"scope": "user"},
    }
    assert told.endswith(b"\n\n")


def test_an_answer_that_failed_is_none() -> None:
    request = parse()
    assert request.is_answer(ANSWER)
    assert not request.is_answer({**ANSWER, "status": "failed"})
    assert not request.is_answer({"choices": []})
