"""A chat request: what is refused and why, what is left alone, what goes upstream."""

import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from gwproxy.core.chat import ChatRequest, as_stream
from gwproxy.core.errors import InvalidRequest
from gwproxy.core.routing import Candidate, Provider, candidate_of
from gwproxy.core.sse import SseScanner
from tests.harness import tokenizer

HELLO = [{"role": "user", "content": "Hello."}]
GEMINI = candidate_of(Provider("gemini", "google-ai-studio", "google-ai-studio"), "gemini-2.5-pro")


def body(**fields: Any) -> bytes:
    value = {"model": "openai/gpt-4o", "messages": HELLO, **fields}
    return json.dumps({name: each for name, each in value.items() if each is not ...}).encode()


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def refusal(raw: bytes, allowed: frozenset[str] = frozenset()) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.parse(raw, allowed)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def nested(depth: int) -> bytes:
    return body(metadata=...)[:-1] + b',"metadata":' + b"[" * depth + b"]" * depth + b"}"


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"null",
        b"[]",
        b'"text"',
        b"12",
        b"{",
        body() + b"{}",
        body() + b"x",
        b"\xef\xbb\xbf" + body(),
        body().decode().encode("utf-16"),
        b'{"model":"\xff"}',
        b'{"model":"\\ud800","messages":[]}',
        b'{"temperature":NaN}',
        b'{"temperature":Infinity}',
        b'{"temperature":1e400}',
        b"{'model':'x'}",
        b'{"a":1,}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    assert refusal(raw).code == "invalid_json"


@pytest.mark.parametrize(
    ("raw", "param", "code"),
    [
        (body(model=...), "model", "missing_required_parameter"),
        (body(model=None), "model", "missing_required_parameter"),
        (body(model=7), "model", "invalid_value"),
        (body(model=["gpt-4o"]), "model", "invalid_value"),
        (body(model=""), "model", "invalid_value"),
        (body(model="x" * 257), "model", "invalid_value"),
        (body(model="gpt\n4o"), "model", "invalid_value"),
        (body(model="gpt\u202e4o"), "model", "invalid_value"),
        (body(messages=...), "messages", "missing_required_parameter"),
        (body(messages=[]), "messages", "invalid_value"),
        (body(messages="Hello"), "messages", "invalid_value"),
        (body(messages=["Hello"]), "messages[0]", "invalid_value"),
        (body(messages=[*HELLO, 5]), "messages[1]", "invalid_value"),
        (body(messages=user(5)), "messages[0].content", "invalid_value"),
        (body(messages=user({"text": "x"})), "messages[0].content", "invalid_value"),
        (body(messages=user([7])), "messages[0].content[0]", "invalid_value"),
        (body(stream="true"), "stream", "invalid_value"),
        (body(stream=1), "stream", "invalid_value"),
        (body(stream=True, stream_options=[]), "stream_options", "invalid_value"),
        (body(stream_options={}), "stream_options", "invalid_value"),
        (body(stream=False, stream_options={}), "stream_options", "invalid_value"),
        (
            body(stream=True, stream_options={"include_usage": 1}),
            "stream_options.include_usage",
            "invalid_value",
        ),
        *((body(max_tokens=n), "max_tokens", "invalid_value") for n in (0, -1, 1.0, "5", True)),
        (body(max_tokens=10_000_001), "max_tokens", "invalid_value"),
        (body(max_tokens=10**30), "max_tokens", "invalid_value"),
        (body(max_completion_tokens=0), "max_completion_tokens", "invalid_value"),
        (body(max_tokens=5, max_completion_tokens=6), "max_tokens", "invalid_value"),
        *((body(n=n), "n", "invalid_value") for n in (0, -1, 129, 1.0, "2", True)),
        (body(tools={}), "tools", "invalid_value"),
    ],
)
def test_a_bad_field_is_named(raw: bytes, param: str, code: str) -> None:
    error = refusal(raw)
    assert (error.param, error.code) == (param, code)
    assert param in error.message


UNPRICED = [
    ({"service_tier": "flex"}, "service_tier", "service_tier"),
    ({"service_tier": "priority"}, "service_tier", "service_tier"),
    ({"service_tier": ["auto"]}, "service_tier", "service_tier"),
    ({"web_search_options": {}}, "web_search_options", "web_search"),
    ({"audio": {"voice": "x", "format": "wav"}}, "audio", "audio"),
    ({"modalities": ["text", "audio"]}, "modalities", "audio"),
    ({"modalities": "audio"}, "modalities", "audio"),
    ({"background": True}, "background", "background"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "hosted_tools"),
    ({"tools": [{"type": "function"}, {"type": "mcp"}]}, "tools[1]", "hosted_tools"),
    ({"tools": [{"google_search": {}}]}, "tools[0]", "hosted_tools"),
    ({"tools": [{"type": ["function"]}]}, "tools[0]", "hosted_tools"),
    ({"tools": ["function"]}, "tools[0]", "hosted_tools"),
    (
        {"messages": user([{"type": "input_audio", "input_audio": {"data": ""}}])},
        "messages[0].content[0]",
        "audio",
    ),
]


@pytest.mark.parametrize(("fields", "param", "feature"), UNPRICED)
def test_what_costs_more_than_tokens_is_refused_unless_switched_on(
    fields: dict[str, Any], param: str, feature: str
) -> None:
    error = refusal(body(**fields), frozenset({"something_else"}))
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert ChatRequest.parse(body(**fields), frozenset({feature})).body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(
            ({name: "x_1"}, name)
            for name in (
                *("previous_response_id", "conversation", "prompt", "item_reference", "file_id"),
                *("container", "thread", "thread_id"),
            )
        ),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        (
            {"extra_body": {"google": {"cached_content": "cachedContents/1"}}},
            "extra_body.google.cached_content",
        ),
        (
            {"messages": user([{"type": "file", "file": {"file_id": "file-1"}}])},
            "messages[0].content[0].file_id",
        ),
        (
            {"messages": user([{"type": "image_file", "file_id": "file-1"}])},
            "messages[0].content[0].file_id",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}, "messages[0].audio"),
    ],
)
def test_what_lies_outside_the_request_is_refused_whatever_is_switched_on(
    fields: dict[str, Any], param: str
) -> None:
    every = frozenset({"audio", "service_tier", "web_search", "hosted_tools", "background"})
    error = refusal(body(**fields), every)
    assert (error.param, error.code) == (param, "unsupported_parameter")


# -- what is served -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "x" * 256},
        {"model": "custom-hf/org/model:novita ü"},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": "assistant"}]},
        {"messages": user([])},
        {"messages": user(["bare text", {"type": "text", "text": "x"}])},
        {"messages": user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}])},
        {"messages": user([{"type": "file", "file": {"file_data": "data:,", "filename": "a"}}])},
        {"stream": None, "stream_options": None, "n": None, "max_tokens": None, "tools": None},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"max_tokens": 10_000_000, "n": 128},
        *({"service_tier": tier} for tier in ("auto", "default", None)),
        {"modalities": ["text"], "audio": None, "background": False, "web_search_options": None},
        {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "custom"}]},
        {"extra_body": {"google": {"thinking_config": {}}}, "prompt": None},
        {"metadata": {"user": "someone else"}, "user": "root", "unknown": [1, {"deep": None}]},
    ],
)
def test_the_rest_is_served_and_left_alone(fields: dict[str, Any]) -> None:
    raw = body(**fields)
    chat = ChatRequest.parse(raw)
    assert chat.body == json.loads(raw)
    assert chat.size_bytes == len(raw)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (False, False, None, 1)),
        ({"stream": True}, (True, False, None, 1)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True, None, 1)),
        ({"stream": True, "stream_options": {"include_usage": None}}, (True, False, None, 1)),
        ({"max_tokens": 7, "n": 3}, (False, False, 7, 3)),
        ({"max_completion_tokens": 8}, (False, False, 8, 1)),
        ({"max_tokens": None, "max_completion_tokens": 9}, (False, False, 9, 1)),
    ],
)
def test_what_is_read_of_it(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    chat = ChatRequest.parse(body(**fields))
    assert (chat.stream, chat.include_usage, chat.max_output_tokens, chat.choices) == expected


def test_of_a_key_written_twice_the_last_one_counts_and_is_the_only_one_sent() -> None:
    raw = (
        b'{"model":"cheap","messages":[{"role":"user","content":"a"}],"max_tokens":1,'
        b'"model":"dear","max_tokens":1000}'
    )
    chat = ChatRequest.parse(raw)
    assert (chat.model, chat.max_output_tokens) == ("dear", 1000)
    sent = chat.body_for(candidate_of(Provider("p", "", "p"), chat.model))
    assert sent.count(b'"model"') == sent.count(b'"max_tokens"') == 1
    assert json.loads(sent)["max_tokens"] == 1000


@pytest.mark.parametrize("depth", [1, 100, 252])
def test_what_can_be_read_can_be_written(depth: int) -> None:
    chat = ChatRequest.parse(nested(depth))
    assert json.loads(chat.body_for(GEMINI))["metadata"] == chat.body["metadata"]


@pytest.mark.parametrize("depth", [254, 1000])
def test_values_nested_too_deeply_to_be_written_are_refused(depth: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.parse(nested(depth))
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("number", [b"1e9", b"1E5", b"1e15", b"-1e15", b"9e99", b"1e-5"])
def test_numbers_that_are_longer_when_they_are_sent_are_in_the_bound(number: bytes) -> None:
    raw = (
        b'{"model":"a","messages":[{"role":"user","content":"x"}],'
        b'"tools":[{"type":"function","x":[%b]}]}' % b",".join([number] * 500)
    )
    chat = ChatRequest.parse(raw)
    assert chat.prompt_tokens(tokenizer().count) <= chat.prompt_bound()


# -- what goes upstream ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, None),
        ({"stream": False}, None),
        ({"stream": True}, {"include_usage": True}),
        ({"stream": True, "stream_options": None}, {"include_usage": True}),
        ({"stream": True, "stream_options": {}}, {"include_usage": True}),
        (
            {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": 0}},
            {"include_usage": True, "include_obfuscation": 0},
        ),
        (
            {"stream": True, "stream_options": {"include_usage": True, "x": [1]}},
            {"include_usage": True, "x": [1]},
        ),
    ],
)
def test_the_body_upstream_differs_in_its_model_and_in_asking_for_usage(
    fields: dict[str, Any], options: Any
) -> None:
    chat = ChatRequest.parse(body(**fields, unknown={"kept": [None, 1.5]}))
    before = json.dumps(chat.body)
    sent = json.loads(chat.body_for(GEMINI))
    assert sent.pop("model") == "google-ai-studio/gemini-2.5-pro"
    assert sent.pop("stream_options", None) == options
    as_given = json.loads(before)
    as_given.pop("model")
    as_given.pop("stream_options", None)
    assert sent == as_given
    assert json.dumps(chat.body) == before


def test_a_chain_gives_each_candidate_its_own_body() -> None:
    chat = ChatRequest.parse(body(stream=True))
    other = candidate_of(Provider("openai", "openai", "openai"), "gpt-4o")
    assert json.loads(chat.body_for(GEMINI))["model"] == "google-ai-studio/gemini-2.5-pro"
    assert json.loads(chat.body_for(other))["model"] == "openai/gpt-4o"


def test_google_signatures_in_tool_calls_come_through() -> None:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
        "extra_content": {"google": {"thought_signature": "CpQB=="}},
    }
    chat = ChatRequest.parse(body(messages=[{"role": "assistant", "tool_calls": [call]}, *HELLO]))
    assert json.loads(chat.body_for(GEMINI))["messages"][0]["tool_calls"] == [call]


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(NUMBERS, st.text(st.characters(exclude_categories=["Cs"])))
def test_numbers_and_text_reach_the_upstream_unchanged(number: float, text: str) -> None:
    chat = ChatRequest.parse(body(temperature=number, seed=[number], stop=text))
    sent = json.loads(chat.body_for(GEMINI))
    assert (sent["temperature"], sent["seed"], sent["stop"]) == (number, [number], text)
    assert type(sent["temperature"]) is type(number)
    if isinstance(number, float):
        assert math.copysign(1, sent["temperature"]) == math.copysign(1, number)


# -- a whole answer for a client that asked for a stream ------------------------------------------

USAGE = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}


def answer(*choices: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "echo",
        "choices": list(choices),
        "usage": USAGE,
        **more,
    }


def choice(index: Any = 0, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": None, **message},
        "logprobs": None,
        "finish_reason": finish,
    }


def chunks(stream: bytes) -> list[ChatCompletionChunk]:
    """As the SDK reads them, but strictly: every field of its type."""
    payloads = [payload for payload, _ in SseScanner().feed(stream)]
    assert payloads.pop() == b"[DONE]"
    assert stream.endswith(b"\n\n")
    return [ChatCompletionChunk.model_validate_json(payload, strict=True) for payload in payloads]


def test_a_whole_answer_becomes_one_chunk_and_done() -> None:
    (chunk,) = chunks(as_stream(answer(choice(content="Hello.")), include_usage=False))
    assert (chunk.id, chunk.object, chunk.model) == ("chatcmpl-1", "chat.completion.chunk", "echo")
    assert chunk.usage is None
    (got,) = chunk.choices
    assert (got.index, got.delta.role, got.delta.content) == (0, "assistant", "Hello.")
    assert got.finish_reason == "stop"


def test_usage_comes_in_a_chunk_of_its_own_and_only_when_it_was_asked_for() -> None:
    first, last = chunks(as_stream(answer(choice(content="Hello.")), include_usage=True))
    assert first.usage is None
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 13
    without = answer(choice(content="Hello."), usage=None)
    assert len(chunks(as_stream(without, include_usage=True))) == 1


def test_tool_calls_get_the_index_that_a_stream_needs() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = [{"id": "a", **call}, {"id": "b", **call, "index": None}, {"id": "c", **call}]
    (chunk,) = chunks(
        as_stream(answer(choice(finish="tool_calls", tool_calls=calls)), include_usage=False)
    )
    found = chunk.choices[0].delta.tool_calls
    assert found is not None
    assert [(each.index, each.id) for each in found] == [(0, "a"), (1, "b"), (2, "c")]
    assert found[0].function is not None
    assert found[0].function.name == "f"


def test_several_choices_keep_their_index_or_get_one() -> None:
    bare = choice(content="b")
    del bare["index"]
    whole = answer(choice(content="a"), bare, choice(None, content="c"), "no choice at all")
    (chunk,) = chunks(as_stream(whole, include_usage=False))
    assert [(each.index, each.delta.content) for each in chunk.choices] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]


def test_unknown_fields_of_an_answer_come_through() -> None:
    whole = answer(
        {**choice(content="a"), "content_filter_results": {}}, system_fingerprint="fp", extra=[1]
    )
    stream = as_stream(whole, include_usage=False)
    value = orjson.loads(stream.partition(b"\n")[0].removeprefix(b"data: "))
    assert (value["system_fingerprint"], value["extra"]) == ("fp", [1])
    assert value["choices"][0]["content_filter_results"] == {}


@pytest.mark.parametrize(
    "whole",
    [{}, {"choices": None}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": 5}]}],
)
def test_an_odd_answer_is_still_a_stream(whole: dict[str, Any]) -> None:
    assert as_stream(whole, include_usage=True).endswith(b"\n\ndata: [DONE]\n\n")


def test_a_candidate_sent_as_it_came_keeps_its_whole_name() -> None:
    chat = ChatRequest.parse(body(model="mock/echo"))
    verbatim = Candidate(
        Provider("upstream", "", "mock"), "mock/echo", "mock/echo", "mock/echo", verbatim=True
    )
    assert json.loads(chat.body_for(verbatim))["model"] == "mock/echo"


HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (HOUR, "cache_control.ttl"),
        (
            {"messages": [{"role": "user", "content": "Hi", **HOUR}]},
            "messages[0].cache_control.ttl",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **HOUR}]}]},
            "messages[0].content[0].cache_control.ttl",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}, **HOUR}]},
            "tools[0].cache_control.ttl",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", **HOUR}}]},
            "tools[0].cache_control.ttl",
        ),
    ],
)
def test_a_cache_of_an_hour_has_no_price_of_its_own(body: dict[str, Any], param: str) -> None:
    whole = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **body}
    with pytest.raises(InvalidRequest) as refused:
        ChatRequest.parse(orjson.dumps(whole))
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", param)
    ChatRequest.parse(orjson.dumps(whole), frozenset({"cache_1h"}))
    minutes = orjson.dumps(whole).replace(b'"1h"', b'"5m"')
    ChatRequest.parse(minutes)
