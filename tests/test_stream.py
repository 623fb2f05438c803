"""A chat stream as it passes: the bytes that leave, what was metered, and how it ended."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy.core import sse
from gwproxy.core.meter import Meter
from gwproxy.core.stream import COMMENT_LIMIT, HOLD_LIMIT, INTERRUPTED, ChatStream
from gwproxy.core.usage import Usage
from tests.harness import DONE, delta, event, tokenizer, usage_only

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLES = {
    path.stem: path.read_bytes()
    for path in sorted((Path(__file__).parent / "data" / "sse").glob("*.sse"))
}


class Passed(NamedTuple):
    out: bytes
    stream: ChatStream


def run(pieces: list[bytes], *, drop_usage: bool = False) -> Passed:
    """Feed a whole body and finish it; at each step nothing is held that could have left."""
    stream = ChatStream(Meter(tokenizer().count), drop_usage=drop_usage)
    out = []
    for piece in pieces:
        out.append(stream.feed(piece))
        held = b"".join(stream._held)
        assert stream._held_size == len(held) <= HOLD_LIMIT
        if stream.at_boundary and out[-1]:
            assert ends_an_event(out[-1])
    out.append(stream.finish())
    assert not stream._held
    return Passed(b"".join(out), stream)


def ends_an_event(data: bytes) -> bool:
    return data.replace(b"\r", b"").endswith(b"\n\n") or data in (b"\n", b"\r\n")


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


# -- the oracle: events as a test would cut them by hand ------------------------------------------


def payload_of(block: bytes) -> str | None:
    """What a block's data lines say, as text; None for a comment."""
    lines = block.replace(b"\r\n", b"\n").decode("utf-8", "replace").split("\n")
    data = [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]
    return "\n".join(data) if data else None


@cache
def value_of(block: bytes) -> Any:
    try:
        return json.loads(payload_of(block) or "")
    except ValueError:
        return None


def is_usage_only(block: bytes) -> bool:
    value = value_of(block)
    if not isinstance(value, dict) or value.get("error"):
        return False
    usage = value.get("usage")
    return value.get("choices") == [] and isinstance(usage, dict) and bool(usage)


def commits(block: bytes) -> bool:
    """Text in a delta, a tool call, a finish_reason, usage, or [DONE]."""
    if (payload_of(block) or "").strip() == "[DONE]":
        return True
    value = value_of(block)
    if not isinstance(value, dict):
        return False
    if value.get("usage") or (value.get("x_groq") or {}).get("usage"):
        return True
    for choice in value.get("choices") or ():
        change = choice.get("delta") or {}
        if choice.get("finish_reason") or change.get("tool_calls"):
            return True
        if any(change.get(field) for field in TEXTS):
            return True
    return False


TEXTS = ("content", "reasoning_content", "refusal")


def exact_tokens(blocks: list[bytes]) -> int:
    """Each field's whole text, tokenised at once."""
    whole: dict[Any, str] = {}
    for block in blocks:
        value = value_of(block)
        for choice in value.get("choices") or () if isinstance(value, dict) else ():
            change = choice.get("delta") or {}
            for field in TEXTS:
                key = choice["index"], field
                whole[key] = whole.get(key, "") + (change.get(field) or "")
            for call in change.get("tool_calls") or ():
                for field in ("name", "arguments"):
                    key = choice["index"], field, call["index"]
                    whole[key] = whole.get(key, "") + (call["function"].get(field) or "")
    return sum(tokenizer().count(text) for text in whole.values())


def blocks_of(data: bytes) -> list[bytes]:
    """The samples are written with one kind of line end each."""
    end = b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n"
    blocks = [block + end for block in data.split(end)]
    assert blocks.pop() == end
    return blocks


# -- the samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_usage", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_leaves_as_it_came_save_the_usage_that_only_we_asked_for(
    name: str, drop_usage: bool
) -> None:
    data = SAMPLES[name]
    blocks = blocks_of(data)
    kept = [block for block in blocks if not (drop_usage and is_usage_only(block))]
    whole = run([data], drop_usage=drop_usage)
    assert whole.out == b"".join(kept)
    for place in range(1, len(data)):
        assert run([data[:place], data[place:]], drop_usage=drop_usage).out == whole.out
    slow = run(bytewise(data), drop_usage=drop_usage)
    assert slow.out == whole.out
    assert slow.stream.meter.counted() == whole.stream.meter.counted() == exact_tokens(blocks)
    assert slow.stream.meter.usage == whole.stream.meter.usage
    assert run(blocks, drop_usage=drop_usage).out == whole.out


@pytest.mark.parametrize(
    ("name", "done", "complete", "error", "usage"),
    [
        ("anthropic-compat", True, True, False, Usage(input=10, output=5)),
        ("gemini-compat", True, True, False, Usage(input=7, output=53, reasoning=51)),
        ("gemini-tool", True, True, False, Usage(input=7, output=53, reasoning=51)),
        ("groq-double-usage", True, True, False, Usage(input=20, output=9, reasoning=4)),
        ("midstream-error", False, False, True, None),
        ("openai-nousage", True, True, False, None),
        ("openai-usage", True, True, False, Usage(input=20, output=9, reasoning=4)),
        ("openrouter-comments", True, True, False, Usage(input=20, output=9, reasoning=4)),
        ("truncated", False, False, False, None),
        ("workersai-crlf", True, True, False, Usage(input=5, output=1)),
    ],
)
def test_how_a_sample_ended(
    name: str, done: bool, complete: bool, error: bool, usage: Usage | None
) -> None:
    for pieces in ([SAMPLES[name]], bytewise(SAMPLES[name])):
        stream = run(pieces).stream
        assert (stream.done, stream.complete, stream.error is not None) == (done, complete, error)
        assert stream.meter.usage == usage
        assert stream.at_boundary


# -- made-up streams ------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("ab c\n.1üé€我😀'"), max_size=40)


def _chunk(draw_delta: Any, **more: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", **more, "choices": draw_delta}


DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, WORDS),
    st.builds(lambda text: {"reasoning_content": text, "content": None}, WORDS),
    st.builds(lambda text: {"refusal": text}, WORDS),
    st.builds(
        lambda at, text: {"tool_calls": [{"index": at, "function": {"arguments": text}}]},
        st.integers(0, 2),
        WORDS,
    ),
    st.just({"role": "assistant"}),
    st.just({}),
)
VALUES = st.one_of(
    st.builds(
        lambda change, index, finish: _chunk(
            [{"index": index, "delta": change, "finish_reason": finish}]
        ),
        DELTAS,
        st.integers(0, 2),
        st.sampled_from([None, None, None, "stop"]),
    ),
    st.builds(
        lambda n: _chunk([], usage={"prompt_tokens": n, "completion_tokens": 3}),
        st.integers(0, 99),
    ),
    st.just(_chunk([], usage=None)),
    st.just(_chunk([], prompt_filter_results=[])),
    st.just({"error": {"message": "no", "code": 500}}),
    st.just({"error": {"message": "no"}, "choices": [], "usage": {"prompt_tokens": 1}}),
    st.sampled_from([None, 7, "text", [1, 2], {}]),
)


def _written(value: Any, spaced: bool, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only, separators=None if spaced else (",", ":"))


PAYLOADS = st.one_of(
    st.builds(_written, VALUES, st.booleans(), st.booleans()),
    st.sampled_from(["[DONE]", "[DONE] ", " [DONE]", "{garbage", "", '{"choices": [', "NaN"]),
    st.just(r'{"choices":[{"index":0,"delta":{"content":"\ud83d"},"finish_reason":null}]}'),
)
EVENTS = st.one_of(
    st.builds(
        lambda payload, colon, end, before: before + (colon + payload).encode() + end + end,
        PAYLOADS,
        st.sampled_from(["data: ", "data:"]),
        st.sampled_from([b"\n", b"\r\n"]),
        st.sampled_from([b"", b"", b"event: message\n", b": note\r\n", b"id: 4\n"]),
    ),
    st.sampled_from([b": keepalive\n\n", b":\r\n\r\n", b"\n", b"\r\n", b"event: ping\n\n"]),
)


@PATIENT
@given(st.lists(EVENTS, max_size=12), st.lists(st.integers(0, 900)), st.booleans())
def test_what_leaves_is_what_came_at_any_split(
    blocks: list[bytes], places: list[int], drop_usage: bool
) -> None:
    data = b"".join(blocks)
    kept = b"".join(block for block in blocks if not (drop_usage and is_usage_only(block)))
    first = None
    for pieces in (blocks, [data], cut(data, places), bytewise(data)):
        out, stream = run(pieces, drop_usage=drop_usage)
        assert out == kept
        assert stream.at_boundary
        says = (
            *(stream.done, stream.complete, stream.committed, stream.error),
            *(stream.meter.counted(), stream.meter.usage, stream.meter.finished),
        )
        first = first or says
        assert says == first


@PATIENT
@given(st.lists(EVENTS, max_size=12))
def test_a_stream_is_committed_at_exactly_the_first_event_that_says_something(
    blocks: list[bytes],
) -> None:
    stream = ChatStream(Meter(tokenizer().count), drop_usage=False)
    expected = False
    for block in blocks:
        assert stream.committed == expected
        stream.feed(block)
        expected = expected or commits(block)
    assert stream.committed == expected


@PATIENT
@given(
    st.lists(
        st.builds(
            lambda change, index: event(
                _chunk([{"index": index, "delta": change, "finish_reason": None}])
            ),
            DELTAS.filter(lambda change: "\\ud83d" not in json.dumps(change)),
            st.integers(0, 2),
        ),
        max_size=40,
    ),
    st.lists(st.integers(0, 4000)),
)
def test_the_count_is_that_of_the_whole_text_whatever_the_split(
    blocks: list[bytes], places: list[int]
) -> None:
    assert run(cut(b"".join(blocks), places)).stream.meter.counted() == exact_tokens(blocks)


# -- one by one -----------------------------------------------------------------------------------


def new(*, drop_usage: bool = False) -> ChatStream:
    return ChatStream(Meter(tokenizer().count), drop_usage=drop_usage)


def test_a_whole_event_leaves_in_the_step_in_which_its_last_byte_came() -> None:
    stream = new()
    block = delta("Hello")
    for piece in bytewise(block[:-1]):
        assert stream.feed(piece) == b""
    assert stream.feed(block[-1:]) == block
    assert stream.feed(block) is block  # and nothing is copied where nothing was split


def test_of_two_events_in_one_piece_the_first_does_not_wait_for_the_second() -> None:
    stream = new()
    assert stream.feed(delta("one") + delta("two")[:20]) == delta("one")
    assert stream.feed(delta("two")[20:]) == delta("two")


def test_an_event_of_64_kib_is_held_and_a_longer_one_passes_in_pieces() -> None:
    exact = b"data: " + b"x" * (HOLD_LIMIT - 6)
    stream = new()
    assert stream.feed(exact[:1000]) == stream.feed(exact[1000:]) == b""
    assert stream.at_boundary
    assert stream.feed(b"y") == exact + b"y"
    assert not stream.at_boundary  # nothing of ours may follow here
    assert stream.feed(b"z\n") == b"z\n"
    assert stream.feed(b"\n") == b"\n"
    assert stream.at_boundary


@pytest.mark.parametrize("size", [HOLD_LIMIT + 1, 1_000_000, 3_000_000])
def test_a_long_event_is_metered_although_it_left_in_pieces(size: int) -> None:
    text = ("All work and no play. " * (size // 20))[:size]
    data = delta(text) + delta(finish="stop") + DONE
    out, stream = run([data[i : i + 50_000] for i in range(0, len(data), 50_000)])
    assert out == data
    assert stream.complete
    assert abs(stream.meter.counted() - tokenizer().count(text)) <= 1


def test_what_is_too_long_to_be_parsed_is_counted_by_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "LINE_LIMIT", 100_000)
    data = delta("x" * 200_000) + delta("then") + DONE
    for pieces in ([data], [data[i : i + 9_999] for i in range(0, len(data), 9_999)]):
        out, stream = run(pieces)
        assert out == data
        assert stream.meter.unparsed_bytes == len(delta("x" * 200_000)) - 2
        assert stream.meter.counted() == (stream.meter.unparsed_bytes + 3) // 4 + 1
    _, stream = run([b"data: " + b"x" * 200_000])  # and also when the stream ends within it
    assert stream.meter.unparsed_bytes == 200_006


@pytest.mark.parametrize(
    "line", ["data: [DONE]", "data:[DONE]", "data: [DONE]   ", "data:  [DONE]"]
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r\n\r", "\n\n", "\r\n\r\n", "\r\n\n"])
def test_done_is_seen_however_it_is_written(line: str, end: str) -> None:
    data = delta("Hi") + (line + end).encode()
    for pieces in ([data], bytewise(data), [delta("Hi"), (line + end).encode()]):
        out, stream = run(pieces)
        assert out == data
        assert stream.done
        assert stream.complete


def test_a_finish_reason_completes_a_stream_that_never_says_done() -> None:
    out, stream = run([delta("Hi"), delta(finish="stop")])
    assert stream.complete
    assert not stream.done
    assert out == delta("Hi") + delta(finish="stop")


def test_an_error_event_leaves_and_is_told() -> None:
    block = event({"error": {"message": "no", "code": "overloaded"}})
    out, stream = run([delta("Hi"), block])
    assert out == delta("Hi") + block
    assert stream.error == {"message": "no", "code": "overloaded"}
    assert not stream.complete


@pytest.mark.parametrize(
    "block",
    [
        b'event: error\ndata: {"type":"error","message":"Overloaded"}\n\n',
        b'event:error\r\ndata:{"type":"error"}\r\n\r\n',
        b"event: error\ndata: upstream connect error\n\n",
        b"data: first\nevent: error\ndata: second\n\n",
        b"event: error\ndata: {}\n\n",
        b'data: {"type":"error","code":"overloaded"}\n\n',
    ],
)
def test_an_error_in_other_words_is_told_in_those_of_this_api(block: bytes) -> None:
    data = delta("Hi") + block + DONE
    for pieces in ([delta("Hi"), block, DONE], [data], bytewise(data)):
        out, stream = run(pieces)
        assert out == delta("Hi") + stream.error_event(INTERRUPTED) + DONE
        assert stream.error and not stream.complete
        assert stream.meter.counted() == 1  # what the provider says of itself is no answer
    short = delta("Hi") + block.rstrip(b"\r\n")
    for pieces in ([short], bytewise(short)):
        out, stream = run(pieces)
        assert out == delta("Hi") + stream.error_event(INTERRUPTED)
    first = new()
    first.feed(block)
    assert first.error and not first.committed


@pytest.mark.parametrize(
    "block",
    [
        b'event: error\ndata: {"error":{"message":"no"}}\n\n',
        b"event: error\n\n",
        b"event: errors\ndata: {}\n\n",
        b"event: message\nevent: ping\ndata: {}\n\n",
    ],
)
def test_an_event_that_this_apis_clients_understand_stays_as_it_came(block: bytes) -> None:
    for pieces in ([block], bytewise(block)):
        out, stream = run([delta("Hi"), *pieces])
        assert out == delta("Hi") + block
        assert (stream.error is None) == (b'"error"' not in block)


def test_an_error_stays_an_error_although_done_follows() -> None:
    _, stream = run([delta("Hi", finish="stop"), event({"error": "no"}), DONE])
    assert stream.error == "no"
    assert not stream.complete


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (delta("Hi"), True),
        (delta(finish="stop"), True),
        (usage_only(), True),
        (DONE, True),
        (b"data:[DONE] \n\n", True),
        (event(_chunk([{"index": 0, "delta": {"reasoning_content": "Hm"}}])), True),
        (event(_chunk([{"index": 0, "delta": {"refusal": "No"}}])), True),
        (event(_chunk([{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}])), True),
        (event(_chunk([], x_groq={"usage": {"prompt_tokens": 1}})), True),
        (event(_chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}])), False),
        (event(_chunk([{"index": 0, "delta": {}, "finish_reason": None}])), False),
        (event(_chunk([], usage=None, prompt_filter_results=[{}])), False),
        (event(_chunk([], x_groq={"id": "req"})), False),
        (event({"error": {"message": "no"}}), False),
        (b": OPENROUTER PROCESSING\n\n", False),
        (b"event: ping\ndata: {}\n\n", False),
        (b"data: {garbage\n\n", False),
    ],
)
def test_which_events_commit(block: bytes, expected: bool) -> None:
    stream = new()
    stream.feed(block)
    assert stream.committed == commits(block) == expected


def test_an_error_does_not_commit() -> None:
    stream = new()
    stream.feed(event({"error": {"message": "no"}}))
    assert stream.error
    assert not stream.committed


def test_an_error_that_comes_with_usage_and_no_choices_is_not_left_out() -> None:
    block = event({"error": {"message": "no"}, "choices": [], "usage": {"prompt_tokens": 1}})
    out, stream = run([delta("Hi"), block], drop_usage=True)
    assert out == delta("Hi") + block
    assert stream.error


def test_half_of_a_surrogate_pair_is_text_like_any_other() -> None:
    block = rb'data: {"choices":[{"index":0,"delta":{"content":"a\ud83d"}}]}' + b"\n\n"
    out, stream = run([block])
    assert out == block
    assert stream.committed
    assert stream.meter.unparsed_bytes == 0
    assert stream.meter.counted() == tokenizer().count("a\ud83d")
    assert run([block[:-2]]).out == block  # also at a stream's end, where the empty line is ours


@pytest.mark.parametrize(
    "payload",
    [
        b"{broken",
        b"\xff\xfe\x00",
        b"[" * 5_000,
        b"[" * 50_000 + b"]" * 50_000,
        b"9" * 10_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
    ],
)
def test_garbage_passes_and_is_counted_by_its_bytes(payload: bytes) -> None:
    block = b"data: " + payload + b"\n\n"
    out, stream = run([block, delta("Hi"), DONE])
    assert out == block + delta("Hi") + DONE
    assert stream.complete
    assert stream.meter.counted() in (1, 1 + (len(payload) + 3) // 4)


# -- the end of a body ----------------------------------------------------------------------------


def endings() -> Iterator[tuple[str, bytes, bytes, bytes]]:
    """(name, what is whole, what is left without its empty line, what leaves at the end)"""
    text, last = delta("Hi"), delta("there")
    yield "fragment", text, last[:-20], b""
    yield "comment", text, b": keep", b""
    yield "event without its empty line", text, last[:-2], last
    yield "with one line end", text, last[:-1], last + b"\n"
    yield "with a CR", text, last[:-2] + b"\r", last[:-2] + b"\r\n\n"
    yield "complete", text, delta(finish="stop")[:-2], delta(finish="stop")[:-2]
    yield "after done", text + DONE, last[:-2], last[:-2]
    error = event({"error": {"message": "no"}})
    yield "an error", text, error[:-2], error


@pytest.mark.parametrize(
    ("whole", "left", "leaves"),
    [pytest.param(*row[1:], id=row[0]) for row in endings()],
)
def test_at_the_end_of_a_body_what_was_held_leaves_only_if_it_is_whole(
    whole: bytes, left: bytes, leaves: bytes
) -> None:
    for pieces in ([whole + left], bytewise(whole + left), [whole, left]):
        out, stream = run(pieces)
        assert out == whole + leaves
        assert stream.at_boundary
        # One of our own may follow and is an event for itself.
        if not stream.complete:
            assert (out + b"data: ours\n\n").replace(b"\r", b"").split(b"\n\n")[-2].strip() == (
                b"data: ours"
            )


def test_the_usage_that_only_we_asked_for_stays_here_also_at_the_end() -> None:
    out, stream = run([delta("Hi"), usage_only()[:-2]], drop_usage=True)
    assert out == delta("Hi")
    assert stream.meter.usage == Usage(input=11, output=2)


def test_a_long_event_that_lacks_its_empty_line_is_metered_and_ended() -> None:
    block = delta("word " * 30_000)
    out, stream = run([block[:50_000], block[50_000:-2]])
    assert out == block
    assert stream.at_boundary
    assert stream.meter.counted() == tokenizer().count("word " * 30_000)


def test_of_a_long_event_that_was_cut_short_the_bytes_are_counted() -> None:
    block = delta("word " * 30_000)[:-100]
    out, stream = run([block[:70_000], block[70_000:]])
    assert out == block
    assert not stream.at_boundary
    assert stream.meter.unparsed_bytes == len(block) - len(b"data: ")


# -- comments before the first word --------------------------------------------------------------


@given(places=st.lists(st.integers(0, 100_000), max_size=8))
@PATIENT
def test_comments_beyond_a_bound_are_let_go_before_the_first_word_and_none_after(
    places: list[int],
) -> None:
    comment = b": waiting\n\n"
    many = comment * 3_000
    role, answer = delta(""), delta("Hello") + many + DONE
    passed = run(cut(many + role + many + answer, places))
    kept = COMMENT_LIMIT // len(comment)
    assert passed.out == comment * kept + role + answer


@pytest.mark.parametrize("line", [b": waiting\n", b": waiting\r\n", b":"], ids=repr)
def test_comments_that_end_in_no_empty_line_are_let_go_and_their_event_is_not(line: bytes) -> None:
    lines = b"event: chunk\n" + line * (2 * HOLD_LIMIT // len(line))
    body = lines + (b"\n" if line == b":" else b"") + delta("Hello")
    passed = run(cut(body, list(range(0, len(body), 7_001))))
    assert len(passed.out) < HOLD_LIMIT
    assert passed.out.startswith(b"event: chunk\n:")
    assert passed.out.endswith(b"\n" + delta("Hello"))
    assert passed.stream.committed


def test_an_event_too_big_to_be_read_is_no_comment() -> None:
    body = b"data: " + b"x" * (sse.LINE_LIMIT + 1) + b"\n\n"
    assert run([body]).out == body
