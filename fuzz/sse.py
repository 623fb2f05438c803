"""The scanner of events finds in any pieces of a stream exactly the events, with exactly the
payloads and ends, that a slow reader finds who takes one byte after the other."""

from pathlib import Path

from fuzz.cuts import SHORT, seeded, split
from gwproxy.core.sse import SseScanner

RECORDED = [
    path.read_bytes()
    for path in sorted((Path(__file__).parent.parent / "tests/data/sse").glob("*.sse"))
]
SEEDS = [
    seeded(b'data: {"a":1}\n\ndata: [DONE]\n\n'),
    seeded(b"event: x\r\ndata:a\r\ndata: b\r\n\r\n: note\n\ndata"),
    *(seeded(stream[:800]) for stream in RECORDED),
]


def check(data: bytes) -> None:
    pieces, stream = split(data)
    expected = reference(stream)
    assert scan([stream]) == expected
    assert scan(pieces) == expected
    if len(stream) <= SHORT:
        assert scan([stream[at : at + 1] for at in range(len(stream))]) == expected


def reference(stream: bytes) -> tuple[list[tuple[bytes, int]], bytes]:
    """A slow reader, byte after byte as the standard's prose has it: the events with the offset
    after each, and the payload of what the end cut short."""
    events: list[tuple[bytes, int]] = []
    data: list[bytes] = []
    line = b""

    def process(line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value[1:] if value[:1] == b" " else value)

    for offset in range(len(stream)):
        byte = stream[offset : offset + 1]
        if byte != b"\n":
            line += byte
            continue
        if line[-1:] == b"\r":
            line = line[:-1]
        if line:
            process(line)
        else:
            events.append((b"\n".join(data), offset + 1))
            data.clear()
        line = b""
    if line[-1:] == b"\r":
        line = line[:-1]
    process(line)
    return events, b"\n".join(data)


def scan(pieces: list[bytes]) -> tuple[list[tuple[bytes, int]], bytes]:
    """The scanner's answer in the same words: offsets in the whole stream."""
    scanner = SseScanner()
    events: list[tuple[bytes, int]] = []
    before = 0
    for piece in pieces:
        found = scanner.feed(piece)
        assert all(0 < end <= len(piece) for _, end in found)
        events += [(payload, before + end) for payload, end in found]
        before += len(piece)
    return events, scanner.flush()
