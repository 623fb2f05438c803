"""The event scanner: one truth, however the bytes were split."""

import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuzz.sse import reference, scan
from gwproxy.core import sse
from gwproxy.core.sse import SseScanner

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLES = sorted((Path(__file__).parent / "data" / "sse").glob("*.sse"))


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted({place for place in places if 0 < place < len(stream)}), len(stream)]
    return [stream[start:end] for start, end in pairwise(bounds)]


LINES = st.one_of(
    st.sampled_from(
        [
            *(
                b"",
                b"",
                b"",
                b"data",
                b"data:",
                b"data: ",
                b"data:  two",
                b"data :no",
                b"dat",
                b"d",
            ),
            *(
                b"data: [DONE]",
                b"data:[DONE]",
                b"data: [DONE]  ",
                b":",
                b": keepalive",
                b":data: x",
            ),
            *(b"event: error", b"id: 7", b"retry: 10", b"\rdata: x", b"data: a\rb", b"data: \r"),
            *('data: {"a":"ü€😀"}'.encode(), b"data: \xff\xfe", b"\xef\xbb\xbfdata: x", b"Data: x"),
        ]
    ),
    st.binary(max_size=12).map(lambda noise: b"data: " + noise.replace(b"\n", b"")),
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n"])), max_size=24).flatmap(
    lambda lines: st.sampled_from([b"", b"data: tail", b"data: ", b"\r", b"dat", b": "]).map(
        lambda tail: b"".join(line + end for line, end in lines) + tail
    )
)


@PATIENT
@given(STREAMS, st.lists(st.integers(0, 400)))
@example(b"data: [DONE]\n\r", [])
@example(b"data: x\r\n\r\n", [8, 9, 10])
def test_any_split_gives_the_events_of_a_slow_reader(stream: bytes, places: list[int]) -> None:
    events, rest = reference(stream)
    assert scan([stream]) == (events, rest)
    assert scan([stream[i : i + 1] for i in range(len(stream))]) == (events, rest)
    assert scan(cut(stream, places)) == (events, rest)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_samples_read_the_same_at_every_split(path: Path) -> None:
    stream = path.read_bytes()
    expected = reference(stream)
    assert expected[0]
    for place in range(len(stream) + 1):
        assert scan([stream[:place], stream[place:]]) == expected
    assert scan([stream[i : i + 1] for i in range(len(stream))]) == expected


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"data: a\ndata: b\ndata\ndata: c\n\n", [b"a\nb\n\nc"]),
        (b": keepalive\n\n", [b""]),
        (b"event: error\ndata: x\nid: 1\nretry: 5\n\n", [b"x"]),
        (b"data: x\n\n\n\n", [b"x", b"", b""]),
        ("data: ü€\U0001f600\n\n".encode(), ["ü€\U0001f600".encode()]),
        (b"data: x\n\ndata: y", [b"x"]),
    ],
)
def test_what_an_event_is(stream: bytes, payloads: list[bytes]) -> None:
    assert [payload for payload, _ in SseScanner().feed(stream)] == payloads


@pytest.mark.parametrize(
    ("stream", "rest"),
    [
        (b"data: [DONE]", b"[DONE]"),
        (b"data: [DONE]\n", b"[DONE]"),
        (b"data: [DONE]\r\n", b"[DONE]"),
        (b"data: [DONE]\r\n\r", b"[DONE]"),
        (b"data: a\ndata: b", b"a\nb"),
        (b"data: a\n\n", b""),
        (b": com", b""),
        (b"", b""),
    ],
)
def test_the_end_of_a_stream_ends_its_last_event(stream: bytes, rest: bytes) -> None:
    for pieces in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
        assert scan(pieces)[1] == rest


def test_an_event_of_several_megabytes_is_read_whole() -> None:
    payload = random.Random(1).randbytes(5_000_000).replace(b"\n", b"").replace(b"\r", b"")
    stream = b"data: " + payload + b"\n\ndata: [DONE]\n\n"
    scanner = SseScanner()
    events = []
    for start in range(0, len(stream), 16_384):
        events += [payload for payload, _ in scanner.feed(stream[start : start + 16_384])]
    assert events == [payload, b"[DONE]"]
    assert scanner.unparsed == 0


# -- the limit -----------------------------------------------------------------------------------


def limited(stream: bytes, limit: int) -> tuple[list[bytes], int]:
    """What is read of `stream` under a limit, and how many bytes are let go: those of all data
    lines (without the LF) of each event in which they are more than `limit`."""
    payloads, unparsed = [], 0
    data: list[bytes] = []
    lines = stream.split(b"\n")
    for position, line in enumerate(lines):
        bare = line.removesuffix(b"\r")
        if bare == b"data" or bare.startswith(b"data:"):
            data.append(line)
        last = position == len(lines) - 1
        if last or not bare:
            size = sum(map(len, data))
            if size > limit:
                unparsed += size
                data = []
            if not last:
                payloads.append(reference(b"".join(line + b"\n" for line in data) + b"\n")[0][0][0])
            data = []
    return payloads, unparsed


@PATIENT
@given(STREAMS, st.lists(st.integers(0, 400)), st.integers(5, 60))
@example(b"data: aaaaaaaaaaaa\n: cccccccccccccccccccccc\ndata: b\n\n", [], 14)
def test_the_limit_holds_and_counts_the_same_at_any_split(
    stream: bytes, places: list[int], limit: int
) -> None:
    expected = limited(stream, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "LINE_LIMIT", limit)
        for pieces in (
            [stream],
            [stream[i : i + 1] for i in range(len(stream))],
            cut(stream, places),
        ):
            scanner = SseScanner()
            payloads = [payload for piece in pieces for payload, _ in scanner.feed(piece)]
            assert payloads == expected[0]
            scanner.flush()
            assert scanner.unparsed == expected[1]


@pytest.mark.parametrize(
    "endless",
    [
        b"data: " + b"x" * 65_530,  # one line, without an end
        b": " + b"x" * 65_534,  # a comment, without an end
        b"data: xx\n" * 7_000,  # short lines, an event without an end
        b"data:\n" * 10_000,  # lines that hold nothing
        b"event: x\n" * 7_000,
    ],
    ids=["line", "comment", "lines", "empty lines", "fields"],
)
def test_an_endless_event_takes_bounded_memory(
    endless: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "LINE_LIMIT", 256 * 1024)
    scanner = SseScanner()
    tracemalloc.start()
    try:
        for _ in range(100):
            rest = endless[6:] if scanner._line or scanner._skipping else endless
            assert scanner.feed(rest) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4_000_000


def test_lines_that_hold_nothing_are_limited_by_their_number() -> None:
    scanner = SseScanner()
    lines = 200_000
    events = scanner.feed(b"data:\n" * lines + b"\ndata: next\n\n")
    assert [payload for payload, _ in events] == [b"", b"next"]
    assert scanner.unparsed == lines * 5


def test_after_an_event_that_was_let_go_the_next_one_is_read() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "LINE_LIMIT", 20)
        scanner = SseScanner()
        assert scanner.feed(b"data: " + b"x" * 30) == []
        assert scanner.unparsed == 36
        scanner.unparsed = 0
        assert scanner.feed(b"yyyy\r\ndata: z\n\ndata: next\n\n") == [(b"", 15), (b"next", 27)]
        # The rest of the line with its CR, and the line after it: both of the event let go.
        assert scanner.unparsed == 5 + 7
