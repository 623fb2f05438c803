"""Whatever pieces a stream comes in, it leaves as the same bytes and says the same of itself, its
text, its usage and its end. Where nothing is to be left out, and no error is to be told in other
words, it leaves as it came but for an end that is no event. Nothing raises."""

import orjson

from fuzz.cuts import SHORT, seeded, split
from fuzz.sse import RECORDED
from gwproxy.core.messages_stream import MessagesMeter, MessagesStream
from gwproxy.core.meter import Meter
from gwproxy.core.responses_stream import ResponsesMeter, ResponsesStream
from gwproxy.core.stream import ChatStream, EventStream

SEEDS = [bytes([api]) + seeded(stream[:800]) for api in range(3) for stream in RECORDED]


def check(data: bytes) -> None:
    api = data[0] % 4 if data else 0
    pieces, whole = split(data[1:])
    out, said = run(api, [whole])
    assert (out, said) == run(api, pieces)
    if len(whole) <= SHORT:
        assert (out, said) == run(api, [whole[at : at + 1] for at in range(len(whole))])
    if api == CHAT or (api != DROPPING and said[0] == "None"):
        # An error in the words of another API is told in those of the stream. Two line feeds at
        # most are put behind what came, so that an error of ours can follow.
        assert whole.startswith(out) or whole.startswith(out.removesuffix(b"\n\n"))


CHAT, DROPPING = 0, 3


def reader(api: int) -> EventStream:
    """Characters for tokens: their number does not depend on where a text is cut."""
    if api == 1:
        return ResponsesStream(ResponsesMeter(len))
    if api == 2:
        return MessagesStream(MessagesMeter(len))
    return ChatStream(Meter(len), drop_usage=api == DROPPING)


def run(api: int, pieces: list[bytes]) -> tuple[bytes, tuple[object, ...]]:
    stream = reader(api)
    out = [stream.feed(piece) for piece in pieces if piece]
    out.append(stream.finish())
    meter = stream.meter
    orjson.dumps(stream.error, default=str, option=orjson.OPT_NON_STR_KEYS)
    said = (repr(stream.error), stream.done, stream.complete, stream.committed)
    return b"".join(out), (*said, meter.counted(), repr(meter.usage), meter.unparsed_bytes)
