"""What the tests of the proxy's own rooms share: scripts that send given bytes in given pieces,
a look at the metrics, and the question whether anything is left over."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from gwproxy.proxy.upstream import Pool
from tests.conftest import Front
from tests.harness import ADMIN, Received, Script, Upstream, Wire, chat
from tests.raw import Peer, connect, post

INTERRUPTED = (
    b'data: {"error":{"message":"The upstream ended the stream before its answer was complete.",'
    b'"type":"upstream_error","param":null,"code":"stream_interrupted"}}\n\n'
)

RECORDED = sorted((Path(__file__).parent / "data" / "sse").iterdir())
"""Streams as real providers send them."""

OK = b"HTTP/1.1 200 OK\r\n"
STREAM = b"Content-Type: text/event-stream\r\n"
CHUNKED = OK + STREAM + b"Transfer-Encoding: chunked\r\n\r\n"


# -- what an upstream sends ----------------------------------------------------------------------


def sends(
    *pieces: bytes, then: Callable[[Wire], None] | None = None, hold: asyncio.Event | None = None
) -> Script:
    """A script that sends each piece in a loop turn of its own, and then waits for `hold`."""

    async def script(wire: Wire, received: Received) -> None:
        for piece in pieces:
            await wire.send(piece)
            await asyncio.sleep(0)
        if hold is not None:
            await hold.wait()
        if then is not None:
            await flushed(wire)
            then(wire)

    return script


async def flushed(wire: Wire) -> None:
    """All that was written is in the kernel's hands: a reset would throw away what is not."""
    await until(lambda: not wire.writer.transport.get_write_buffer_size())


async def stay_silent(wire: Wire, received: Received) -> None:
    """No answer, until the gateway hangs up."""
    await until_hung_up(wire)


async def until_hung_up(wire: Wire) -> None:
    assert await wire.reader.read() == b""
    wire.hang_up()


def stream_then_wait(*events: bytes) -> Script:
    """Begins a stream and leaves it open until the gateway hangs up."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        for event in events:
            await wire.chunk(event)
        await until_hung_up(wire)

    return script


def in_chunks(parts: Iterable[bytes]) -> bytes:
    """HTTP chunks, the last one included."""
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part)
    return framed + b"0\r\n\r\n"


def cut(data: bytes, random: Random, longest: int) -> list[bytes]:
    """The same bytes in pieces of 1 to `longest`."""
    pieces = []
    while data:
        size = random.randint(1, longest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


# -- what a client does --------------------------------------------------------------------------


@asynccontextmanager
async def asked(front: Front, *, stream: bool = True, **fields: Any) -> AsyncIterator[Peer]:
    """A client that has sent a chat request and reads what it wants."""
    async with connect(front.port) as peer:
        ask(peer, front, stream=stream, **fields)
        yield peer


def ask(peer: Peer, front: Front, *, stream: bool = True, **fields: Any) -> None:
    peer.send(post(json.dumps(chat(stream, **fields)).encode(), key=front.key))


WITH_USAGE = {"stream_options": {"include_usage": True}}


# -- what is left --------------------------------------------------------------------------------


async def metric(front: Front, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    response = await front.client.get("/metrics", headers=ADMIN)
    assert response.status == 200
    families = text_string_to_metric_families(await response.text())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def assert_nothing_left(front: Front, *upstreams: Upstream) -> None:
    """No hold, no stream, and no upstream connection but those that wait for the next request."""
    await until(lambda: not [each for pool in pools(front) for each in pool.active])
    await until(lambda: sum(each.open for each in upstreams) == idle_connections(front))
    for name in ("gwproxy_holds_open", "gwproxy_streams_open"):
        assert await metric(front, name) == 0, name


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for what has no event to wait for: it happens in the gateway or in the kernel."""
    async with asyncio.timeout(within_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


def idle_connections(front: Front) -> int:
    return sum(len(pool._idle) for pool in pools(front))


def pools(front: Front) -> Sequence[Pool]:
    """The gateway's pools of upstream connections."""
    app = front.gateway.app
    assert app is not None
    return list(app._upstream._pools.values())


def tick(front: Front, later_s: float) -> None:
    """Tell the gateway's coarse timer that so many seconds more have passed."""
    for pool in pools(front):
        pool.tick(pool.now() + later_s)
