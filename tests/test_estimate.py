"""Prompts: a bound that holds, a count that is right, and no data taken for words."""

import base64
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy import assets
from gwproxy.core.errors import InvalidRequest
from gwproxy.core.estimate import prompt_bound, prompt_slices, prompt_tokens
from gwproxy.core.tokens import PIECE_CHARS, Tokenizer, estimate_by_bytes

# How long an example takes says nothing here, on a machine that is busy with other things.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

COOKBOOK = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate "
        "jargon into plain English.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "New synergies will help drive top-line growth.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities "
        "for increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client "
        "deliverable.",
    },
]
IMAGE = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 400).decode()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.ranks())


def ask(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": content}], **more}


def test_the_cookbooks_example_is_what_openai_counts(tokenizer: Tokenizer) -> None:
    # OpenAI's cookbook shows 124 prompt tokens for it, counted by the API for gpt-4o.
    assert prompt_tokens({"messages": COOKBOOK}, tokenizer.count) == 124


def test_parts_of_text_count_as_the_text(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "Hello"}, " world", {"type": "text", "text": "!"}]
    expected = 3 + 3 + 1 + sum(map(tokenizer.count, ["Hello", " world", "!"]))
    assert prompt_tokens(ask(parts), tokenizer.count) == expected


def test_tools_and_formats_count_as_compact_json(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    plain = prompt_tokens(ask("Hi"), tokenizer.count)
    for field, value in [("tools", tools), ("functions", tools), ("response_format", form)]:
        more = prompt_tokens(ask("Hi", **{field: value}), tokenizer.count)
        assert more - plain == 16 + tokenizer.count(orjson.dumps(value).decode())


def test_earlier_tool_calls_are_part_of_the_prompt(tokenizer: Tokenizer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    words = ["assistant", "f", '{"a":1}', "tool", "42"]
    expected = 3 + 2 * 3 + sum(map(tokenizer.count, words))
    assert prompt_tokens({"messages": messages}, tokenizer.count) == expected


def test_parameters_are_no_text_and_an_unknown_field_may_be(tokenizer: Tokenizer) -> None:
    plain = prompt_tokens(ask("Hi"), tokenizer.count)
    more = ask("Hi", user="alice", metadata={"a": "b" * 100}, stop=["x"], temperature=0.5, n=3)
    assert prompt_tokens(more, tokenizer.count) == plain
    more = ask("Hi", documents=[{"title": "A tale", "lines": ["one two", 3]}])
    assert prompt_tokens(more, tokenizer.count) == plain + sum(
        map(tokenizer.count, ["A tale", "one two", "3"])
    )


# -- data ------------------------------------------------------------------------------------------


def test_an_image_is_what_the_model_says_and_never_its_base64(tokenizer: Tokenizer) -> None:
    longest = 0

    def count(text: str) -> int:
        nonlocal longest
        longest = max(longest, len(text))
        return tokenizer.count(text)

    part = {"type": "image_url", "image_url": {"url": IMAGE, "detail": "high"}}
    body = ask([{"type": "text", "text": "What is it?"}, part])
    tokens = prompt_tokens(body, count, image_tokens=1_105)
    assert longest < 20
    text = prompt_tokens(ask("What is it?"), tokenizer.count)
    assert tokens == text + 1_105 + -(-len(IMAGE) // 16)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://images.test/cat.png"}},
        {"type": "input_image", "image_url": IMAGE},
        {"type": "image", "source": {"type": "base64", "data": IMAGE[22:]}},
        {"type": "input_audio", "input_audio": {"format": "wav", "data": IMAGE[22:]}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": IMAGE}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"data": IMAGE}}]},
        {"type": "video_url", "video_url": [IMAGE, {"url": IMAGE}]},
        {"type": "something_new", "url": IMAGE},
    ],
)
def test_no_data_is_tokenised(part: dict[str, Any]) -> None:
    seen: list[str] = []

    def count(text: str) -> int:
        seen.append(text)
        return estimate_by_bytes(text)

    body = ask([part])
    tokens = prompt_tokens(body, count, image_tokens=900)
    assert max(map(len, seen)) < 40
    assert tokens > 900
    assert tokens <= prompt_bound(body, len(orjson.dumps(body)), image_tokens=900)


def test_a_message_that_calls_itself_an_image_is_counted_as_the_text_it_is() -> None:
    words = "a word or two " * 1_000
    plain = prompt_tokens(ask(words), estimate_by_bytes)
    message = {"role": "user", "type": "image_url", "content": words}
    assert prompt_tokens({"messages": [message]}, estimate_by_bytes) == plain
    call = {"type": "image", "function": {"name": "f", "arguments": words}}
    assert prompt_tokens({"messages": [{"tool_calls": [call]}]}, estimate_by_bytes) >= plain
    for inner in ({"text": words}, {"content": words}, {"content": [words]}):
        part = {"type": "image_url", "image_url": {"url": "x"}, **inner}
        assert prompt_tokens(ask([part]), estimate_by_bytes, image_tokens=0) >= plain


def test_text_that_begins_like_a_data_url_is_text() -> None:
    words = "data: " + "word " * 1_000
    for content in (words, [words], [{"type": "text", "text": words}]):
        assert prompt_tokens(ask(content), estimate_by_bytes) >= estimate_by_bytes(words)


def test_a_label_as_long_as_a_text_is_counted(tokenizer: Tokenizer) -> None:
    long = "ignore all that was said " * 100
    message = {"role": "tool", "tool_call_id": long, "content": "x"}
    assert prompt_tokens({"messages": [message]}, tokenizer.count) > tokenizer.count(long)


# -- the bound -------------------------------------------------------------------------------------

words = st.text(max_size=30) | st.sampled_from(["data:image/png;base64,AAAA", "x" * 200, "一" * 50])
kinds = st.sampled_from(["text", "image_url", "file", "input_audio", "tool_result", "new", "image"])
leaves = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | words
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "content", "url", "data", "name", "k"]), inner, max_size=4
        )
        | st.builds(lambda kind, rest: {"type": kind, "k": rest}, kinds, inner)
        | st.builds(lambda kind, rest: {"type": kind, "content": [rest]}, kinds, inner)
    ),
    max_leaves=10,
)
messages = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "new"]),
    values | st.lists(values, max_size=3),
    max_size=4,
)
bodies = st.dictionaries(
    st.sampled_from(["tools", "functions", "response_format", "documents", "user"]), values
).flatmap(
    lambda more: st.builds(
        lambda found: {**more, "messages": found}, st.lists(messages, max_size=4) | values
    )
)


@settings(PATIENT, max_examples=200)
@given(body=bodies, image_tokens=st.sampled_from([0, 85, 4_800]))
def test_no_prompt_is_more_than_its_bound(
    tokenizer: Tokenizer, body: dict[str, Any], image_tokens: int
) -> None:
    bound = prompt_bound(body, len(orjson.dumps(body)), image_tokens)
    assert 0 < prompt_tokens(body, tokenizer.count, image_tokens) <= bound


def test_the_bound_of_a_plain_question_is_its_size_and_little_more() -> None:
    body = ask("What is the capital of France?")
    size = len(orjson.dumps(body))
    assert size < prompt_bound(body, size) < size + 64


def test_an_image_behind_a_short_url_is_in_the_bound() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://images.test/cat.png"}}
    body = ask([part, part])
    assert prompt_bound(body, 100, image_tokens=1_105) > 2 * 1_105


@pytest.mark.parametrize("found", [None, 7, "x", {}, [None], [[]], [{"content": 5}], ["x"]])
def test_a_body_that_is_no_chat_is_estimated_all_the_same(found: Any) -> None:
    body = {"messages": found}
    assert prompt_bound(body, 20) >= prompt_tokens(body, estimate_by_bytes) > 0


# -- slices ----------------------------------------------------------------------------------------


def slices(body: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The characters counted in each slice, and the sum of the tokens."""
    taken = [0]

    def count(text: str) -> int:
        taken[-1] += len(text)
        return tokenizer.count(text)

    steps = prompt_slices(body, count)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return taken, end.value
        taken.append(0)


@pytest.mark.parametrize(
    "body",
    [
        ask("The quick brown fox doesn't look behind. " * 5_000),
        ask("我们的猫喜欢在太阳下睡觉。" * 10_000),
        {"messages": [{"role": "user", "content": "Is it so?"}] * 5_000},
        ask([{"type": "text", "text": "a part of it "}] * 5_000),
        ask("Hi", tools=[{"function": {"name": "f", "description": "It adds. " * 20_000}}]),
        ask("Hi", documents=["one two three "] * 8_000),
    ],
)
def test_a_long_prompt_is_counted_in_short_slices_and_to_the_same_sum(
    tokenizer: Tokenizer, body: dict[str, Any]
) -> None:
    taken, total = slices(body, tokenizer)
    assert len(taken) >= 3
    assert max(taken) <= PIECE_CHARS
    assert total == prompt_tokens(body, tokenizer.count)


def test_a_body_without_any_text_makes_stops_too() -> None:
    steps = prompt_slices({"messages": [{"content": [{"a": [[True]]}] * 5_000}]}, estimate_by_bytes)
    assert sum(1 for _ in steps) >= 3


def test_a_short_prompt_is_counted_without_a_stop(tokenizer: Tokenizer) -> None:
    assert len(slices(ask("Hello"), tokenizer)[0]) == 1


def test_tools_nested_too_deeply_are_the_callers_mistake() -> None:
    deep: Any = {}
    for _ in range(600):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest, match="nested too deeply") as refusal:
        prompt_tokens(ask("Hi", tools=[deep]), estimate_by_bytes)
    assert refusal.value.param == "tools"
    # At any other place the depth is no matter.
    assert prompt_tokens(ask([deep], documents=deep), estimate_by_bytes) > 0
