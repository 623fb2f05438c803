"""The meter: exact however the text was split, and unmoved by whatever an upstream sends."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gwproxy import assets
from gwproxy.core.meter import ERROR, FINISH, TEXT, TOOL, USAGE, USAGE_ONLY, Meter
from gwproxy.core.tokens import PIECE_CHARS, Tokenizer, estimate_by_bytes
from gwproxy.core.usage import Usage

# How long an example takes says nothing here, on a machine that is busy with other things.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WORDS = [
    *("the", "The", "don't", "we'll", "it'S", "HTML", "naïve", "e\u0301", "a", "deadbeef01", "x9"),
    *(" ", "  ", "\n", "\r\n", "\n\n", "\t", "\xa0", "\u3000", "\x1c", " " * 40, "\n" * 9),
    *("0", "12", "3456", "3.14159", "½", "'", '"', ".", ",", "!", "//", "/", "{", "};", "_", "->"),
    *("我们的猫", "太阳下", "。", "、", "日本語", "한국어", "Привет", "مرحبا", "नमस्ते", "ไทย"),
    *("😀", "👩‍👩‍👧", "🇫🇷", "…", "—", "\ud83d", "\ude00", "\0"),
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\n",
    '{"city":"Paris","days":[1,2,3],"metric":true}',
    "The quick brown fox jumps over the lazy dog, and it didn't mind at all. ",
    "0123456789abcdef" * 8,
    "QmFzZTY0IHRleHQgaXMgbG9uZw==" * 6,
]
# Longer than what is held of a field, so that cuts are made; shrinks to few words.
texts = st.lists(
    st.tuples(st.sampled_from(WORDS), st.integers(1, 30)).map(lambda pair: pair[0] * pair[1]),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.ranks())


@pytest.fixture
def meter(tokenizer: Tokenizer) -> Meter:
    return Meter(tokenizer.count)


def chunk(delta: object, index: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o",
        "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
        "usage": None,
        **more,
    }


def split(text: str, sizes: list[int]) -> Iterator[str]:
    start = turn = 0
    while start < len(text):
        size = sizes[turn % len(sizes)]
        yield text[start : start + size]
        start += size
        turn += 1


# -- exactness -------------------------------------------------------------------------------------


@settings(PATIENT, max_examples=250)
@given(text=texts, sizes=st.lists(st.integers(1, 700), min_size=1, max_size=6))
@example(text="word " * 300, sizes=[511, 1])
@example(text="don't " * 300, sizes=[4])
@example(text=" " * 3_000, sizes=[7])
@example(text="x\n" * 1_000, sizes=[1])
@example(text="}\n/" * 500, sizes=[2])
def test_any_split_into_deltas_counts_as_the_whole_text(
    tokenizer: Tokenizer, text: str, sizes: list[int]
) -> None:
    meter = Meter(tokenizer.count)
    for piece in split(text, sizes):
        meter.observe(chunk({"content": piece}))
    assert meter.counted() == tokenizer.count(text)


FIELDS = ["content", "reasoning_content", "reasoning", "refusal"]


@settings(PATIENT, max_examples=100)
@given(data=st.data())
def test_fields_choices_and_tool_calls_in_any_order_are_counted_each_for_itself(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    meter = Meter(tokenizer.count)
    whole: dict[tuple[int, str, int], str] = {}
    streams = st.tuples(
        st.integers(0, 3), st.sampled_from([*FIELDS, "name", "arguments"]), st.integers(0, 2)
    )
    for index, field, tool in data.draw(st.lists(streams, max_size=12)):
        text = data.draw(texts)
        if field in FIELDS:
            delta: dict[str, Any] = {field: text}
            tool = 0
        else:
            delta = {"tool_calls": [{"index": tool, "function": {field: text}}]}
        meter.observe(chunk(delta, index))
        whole[index, field, tool] = whole.get((index, field, tool), "") + text
    assert meter.counted() == sum(map(tokenizer.count, whole.values()))


@pytest.mark.parametrize("one", [*FIELDS, "name", "arguments"])
@pytest.mark.parametrize("other", [*FIELDS, "name", "arguments"])
def test_texts_that_arrive_in_turns_are_never_joined(meter: Meter, one: str, other: str) -> None:
    """Three digits in a row are one token, and in three texts they would be three."""
    for tool, field in enumerate([one, other]):
        for index in (0, 1):
            delta: dict[str, Any] = {field: "7"}
            if field not in FIELDS:
                delta = {"tool_calls": [{"index": tool, "function": delta}]}
            meter.observe(chunk(delta, index))
    same_text = one == other and one in FIELDS
    assert meter.counted() == (2 if same_text else 4)


@settings(PATIENT, max_examples=60)
@given(text=texts, sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_every_way_to_write_the_events_gives_the_same_count(
    tokenizer: Tokenizer, text: str, sizes: list[int]
) -> None:
    """Escaped, a surrogate pair can be split over two events; only a lenient parser reads those."""
    plain, escaped = Meter(tokenizer.count), Meter(tokenizer.count)
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    for piece in split(mended, sizes):
        plain.observe(orjson.loads(orjson.dumps(chunk({"content": piece}))))
    units = text.encode("utf-16-be", "surrogatepass")
    for start in range(0, len(units), 2):
        half = units[start : start + 2].hex()
        event = json.dumps(chunk({"content": "@"})).replace("@", "\\u" + half)
        escaped.observe(json.loads(event))
    assert plain.counted() == escaped.counted() == tokenizer.count(mended)


@pytest.mark.parametrize("unit", ["😀", " ", "7", "é", "\u0301", "=-", "\n", "ไทย"])
@pytest.mark.parametrize("size", [1_000, 100_000])
def test_unbroken_text_is_cut_by_force_in_the_same_places_whatever_the_split(
    tokenizer: Tokenizer, unit: str, size: int
) -> None:
    text = "A start. " + unit * (100_000 // len(unit)) + " And an end."
    meter = Meter(tokenizer.count)
    for piece in split(text, [size]):
        meter.observe(chunk({"content": piece}))
    assert meter.counted() == tokenizer.count(text)
    assert meter.forced == 3


@pytest.mark.parametrize(
    "unit", ["3f9a0c7be1d24586", "word ", "word\n", "我们的猫。", '{"a":[1]},']
)
def test_text_with_places_to_cut_is_never_cut_by_force(meter: Meter, unit: str) -> None:
    for _ in range(1_000):
        meter.observe(chunk({"content": unit * 5}))
    assert meter.forced == 0


def test_a_million_characters_of_white_space_do_not_stop_the_meter(meter: Meter) -> None:
    meter.observe(chunk({"content": " " * 1_000_000}))
    for _ in range(20):
        meter.observe(chunk({"content": "\t" * 5_000}))
    assert 0 < meter.counted() < 1_100_000


def test_asking_for_the_count_changes_nothing(tokenizer: Tokenizer) -> None:
    meter = Meter(tokenizer.count)
    text = "The proxy doesn't look behind; it counts what has passed. " * 40
    for start in range(0, len(text), 3):
        meter.observe(chunk({"content": text[start : start + 3]}))
        if start % 99 == 0:
            assert meter.counted() == meter.counted() == tokenizer.count(text[: start + 3])
    assert meter.counted() == tokenizer.count(text)


def test_the_running_value_needs_no_tokenizer_and_is_near(tokenizer: Tokenizer) -> None:
    calls = 0

    def count(text: str) -> int:
        nonlocal calls
        calls += 1
        return tokenizer.count(text)

    meter = Meter(count)
    for seen in range(1, 2_001):
        meter.observe(chunk({"content": " token"}))
        before = calls
        approx = meter.approx()
        assert calls == before
        assert abs(approx - seen) <= 512
        calls = before
    assert calls <= 2_000 * 6 // 400
    assert meter.counted() == 2_000


def test_a_stream_costs_less_than_four_kib(tokenizer: Tokenizer) -> None:
    deltas = [orjson.dumps(chunk({"content": word})) for word in ["太阳", "下", "睡觉", "。"]]
    meters = [Meter(tokenizer.count) for _ in range(100)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for meter in meters:
            for _ in range(84):
                for delta in deltas:
                    meter.observe(orjson.loads(delta))
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used / len(meters) < 4_096


# -- what an event was -----------------------------------------------------------------------------

CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
USED = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


@pytest.mark.parametrize(
    ("event", "flags"),
    [
        (chunk({"role": "assistant", "content": ""}), 0),
        (chunk({"role": "assistant", "content": None, "refusal": None}), 0),
        (chunk({"content": "Hi"}), TEXT),
        (chunk({"reasoning_content": "Hm"}), TEXT),
        (chunk({"reasoning": "Hm"}), TEXT),
        (chunk({"refusal": "No"}), TEXT),
        (chunk({"content": [{"type": "text", "text": "Hi"}]}), TEXT),
        (chunk({"content": [{"type": "text", "text": ""}]}), 0),
        (chunk({"tool_calls": []}), 0),
        (chunk({"tool_calls": [CALL]}), TOOL),
        (chunk({"function_call": {"name": "f"}}), TOOL),
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, FINISH),
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": ""}]}, 0),
        ({"choices": [{"index": 0, "delta": {}, "finish_reason": 3}]}, 0),
        ({"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]}, FINISH),
        ({"choices": [], "usage": USED}, USAGE | USAGE_ONLY),
        ({"choices": None, "usage": USED}, USAGE),
        ({"usage": USED}, USAGE),
        ({"choices": [], "usage": None}, 0),
        ({"choices": [{"delta": {"content": "x"}}], "usage": USED}, TEXT | USAGE),
        ({"choices": [], "x_groq": {"usage": USED}}, USAGE),
        ({"choices": [], "x_groq": {"id": "req_1"}}, 0),
        ({"error": {"message": "overloaded"}}, ERROR),
        ({"choices": [{"finish_reason": "error"}], "error": {"code": 502}}, FINISH | ERROR),
        ({"error": None, "choices": []}, 0),
        ({}, 0),
        ([], 0),
        ("[DONE]", 0),
        (None, 0),
        (7, 0),
    ],
)
def test_an_event_tells_what_it_was(meter: Meter, event: Any, flags: int) -> None:
    assert meter.observe(event) == flags
    assert meter.finished is bool(flags & FINISH)
    assert meter.has_output is bool(flags & (TEXT | TOOL))
    assert (meter.usage is not None) is bool(flags & USAGE)


def test_an_answer_in_one_piece_is_read_like_a_stream(tokenizer: Tokenizer) -> None:
    meter = Meter(tokenizer.count)
    flags = meter.observe_answer(
        {
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello there.", "refusal": None},
                    "finish_reason": "stop",
                },
                {
                    "index": 1,
                    "message": {
                        "content": [{"type": "text", "text": "One "}, {"type": "x"}, "two"],
                        "tool_calls": [
                            {"id": "a", "function": {"name": "add", "arguments": '{"a":1}'}},
                            {"id": "b", "function": {"name": "sub", "arguments": '{"b":2}'}},
                        ],
                    },
                },
            ],
            "usage": USED,
        }
    )
    assert flags == TEXT | TOOL | FINISH | USAGE
    assert meter.finished
    assert meter.usage == Usage(input=5, output=7)
    texts = ["Hello there.", "One two", "add", '{"a":1}', "sub", '{"b":2}']
    assert meter.counted() == sum(map(tokenizer.count, texts))


def test_tool_calls_and_function_calls_are_counted_by_name_and_arguments(
    tokenizer: Tokenizer,
) -> None:
    meter = Meter(tokenizer.count)
    meter.observe(chunk({"tool_calls": [CALL]}))
    for piece in ['{"ci', 'ty":"Pa', 'ris"}']:
        meter.observe(chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}))
    meter.observe(chunk({"function_call": {"name": "look_up", "arguments": '{"q":'}}))
    meter.observe(chunk({"function_call": {"arguments": "1}"}}))
    # Some servers do not encode the arguments.
    meter.observe(chunk({"tool_calls": [{"index": 1, "function": {"arguments": {"a": [1, 2]}}}]}))
    texts = ["f", '{"city":"Paris"}', "look_up", '{"q":1}', '{"a":[1,2]}']
    assert meter.counted() == sum(map(tokenizer.count, texts))


def test_the_parts_of_a_thought_are_counted(tokenizer: Tokenizer) -> None:
    meter = Meter(tokenizer.count)
    inner = [{"type": "text", "text": "let me "}, {"type": "text", "text": "think"}]
    parts = [{"type": "thinking", "thinking": inner}, {"type": "text", "text": " it over"}]
    meter.observe(chunk({"content": parts}))
    assert meter.counted() == tokenizer.count("let me think it over")


def test_a_thought_sent_under_both_its_names_is_counted_once(tokenizer: Tokenizer) -> None:
    meter = Meter(tokenizer.count)
    for word in ["Let", " me", " think"]:
        meter.observe(chunk({"reasoning": word, "reasoning_content": word}))
    assert meter.counted() == tokenizer.count("Let me think")


def test_an_event_too_big_to_parse_counts_a_token_for_each_four_bytes(meter: Meter) -> None:
    meter.observe(chunk({"content": "Hello"}))
    meter.observe_unparsed(1_001)
    assert meter.counted() == 1 + 251
    assert meter.approx() >= 251
    assert meter.unparsed_bytes == 1_001
    assert meter.has_output


# -- usage -----------------------------------------------------------------------------------------


@settings(PATIENT)
@given(st.lists(st.none() | st.integers(0, 10_000), max_size=8))
def test_the_last_usage_wins_and_is_never_a_sum(reports: list[int | None]) -> None:
    meter = Meter(estimate_by_bytes)
    for count in reports:
        usage = None if count is None else {"prompt_tokens": 3, "completion_tokens": count}
        meter.observe(chunk({"content": "x"}, usage=usage))
    seen = [count for count in reports if count is not None]
    assert meter.usage == (Usage(input=3, output=seen[-1]) if seen else None)


def test_groqs_own_object_is_used_only_where_there_is_no_other(meter: Meter) -> None:
    meter.observe({"choices": [], "x_groq": {"usage": {**USED, "completion_tokens": 9}}})
    assert meter.usage == Usage(input=5, output=9)
    meter.observe({"choices": [], "usage": USED})
    meter.observe({"choices": [], "x_groq": {"usage": {**USED, "completion_tokens": 9}}})
    assert meter.usage == Usage(input=5, output=7)


def test_a_usage_of_zero_is_a_usage_and_an_empty_one_is_none(meter: Meter) -> None:
    zero = {"prompt_tokens": 0, "completion_tokens": 0}
    meter.observe({"choices": [], "usage": zero})
    meter.observe({"choices": [], "usage": {}})
    assert meter.usage_raw == zero
    assert meter.usage == Usage(input=0, output=0)


# -- hostile upstreams -----------------------------------------------------------------------------

# fmt: off
KEYS = st.sampled_from([
    "choices", "delta", "message", "index", "content", "reasoning", "reasoning_content", "refusal",
    "tool_calls", "function", "function_call", "name", "arguments", "finish_reason", "usage",
    "x_groq", "error", "text", "thinking",
])
# fmt: on
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(0),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
choices = st.lists(st.fixed_dictionaries({"delta": anything, "index": anything}), max_size=3)


@settings(PATIENT, max_examples=150)
@given(st.lists(anything | st.fixed_dictionaries({"choices": choices}), max_size=3))
def test_no_json_value_makes_the_meter_raise(events: list[Any]) -> None:
    meter = Meter(estimate_by_bytes)
    for event in events:
        assert 0 <= meter.observe(event) < 64
        assert 0 <= meter.observe_answer(event) < 64
    assert meter.counted() >= 0
    assert meter.approx() >= 0
    assert meter.usage is None or meter.usage.output >= 0


# fmt: off
NEAR = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries(
        {"delta": st.fixed_dictionaries(
            {"content": st.text(max_size=8) | anything},
            optional={key: anything for key in ("role", "reasoning", "refusal", "tool_calls")},
        )},
        optional={"index": st.integers(0, 1) | anything, "finish_reason": st.none() | anything},
    ), min_size=1, max_size=2)},
    optional={key: st.none() | anything for key in ("usage", "x_groq", "error", "id")},
)
# fmt: on


@settings(PATIENT)
@given(NEAR | anything)
@example({"choices": [{"delta": {"content": "a", "reasoning_content": "b"}}]})
@example({"choices": [{"delta": {"content": "a", "function_call": {"name": "b"}}}]})
@example({"choices": [{"delta": {"content": "a"}, "index": 1}]})
@example({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]})
@example({"choices": [{"delta": {"content": "a"}}], "usage": {"prompt_tokens": 1}})
@example({"choices": [{"delta": {"content": "a"}}], "x_groq": {"usage": {"prompt_tokens": 1}}})
@example({"choices": [{"delta": {"content": "a"}}], "error": {"message": "b"}})
@example({"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}, "index": 1}]})
def test_a_piece_of_text_is_read_the_short_way_as_it_is_the_long_way(event: Any) -> None:
    payload = json.dumps(event).encode()
    short, long = Meter(estimate_by_bytes), Meter(estimate_by_bytes)
    flags = long.observe(json.loads(payload))
    if short.observe_text(payload):
        assert flags == TEXT
        assert {key: text.held for key, text in short._texts.items()} == {
            key: text.held for key, text in long._texts.items()
        }
        assert (short.bound(), short.finished, short.has_output, short.usage) == (
            *(long.bound(), long.finished, long.has_output, long.usage),
        )
    else:
        assert (short.bound(), short.counted(), short.has_output) == (0, 0, False)


def test_the_usual_event_is_read_the_short_way_and_what_is_no_event_is_not(meter: Meter) -> None:
    assert meter.observe_text(json.dumps(chunk({"content": "Hello"})).encode())
    deep = b'{"choices":[{"delta":{"content":"a"}}],"x":' + b"[" * 5000 + b"]" * 5000 + b"}"
    for payload in (b"", b"[DONE]", b"[]", b'{"choices":', b'{"choices":[{"delta":null}]}', deep):
        assert not meter.observe_text(payload)
    assert meter.counted() == 1


def test_arguments_nested_beyond_all_measure_are_passed_over(meter: Meter) -> None:
    deep: Any = {}
    for _ in range(900):
        deep = {"a": deep}
    flags = meter.observe(chunk({"content": deep, "tool_calls": [{"function": deep}]}))
    assert flags == TOOL
    assert meter.counted() == 0


def test_an_upstream_that_opens_new_fields_without_end_costs_bounded_memory() -> None:
    meter = Meter(estimate_by_bytes)
    for number in range(2_000):
        meter.observe(chunk({"content": "x" * 400}, index=number))
    assert len(meter._texts) <= 513
    assert meter._held_chars <= 512 * 512 + PIECE_CHARS
    assert meter.counted() >= 2_000 * 100


def test_an_upstream_that_fills_every_field_with_unbroken_text_costs_bounded_memory() -> None:
    meter = Meter(estimate_by_bytes)
    for _ in range(6):
        for number in range(500):
            meter.observe(chunk({"content": "é" * 500}, index=number))
    assert meter._held_chars <= 1_000_000
    assert meter._held_chars == sum(len(text.held) for text in meter._texts.values())
    assert meter.forced
