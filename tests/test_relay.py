"""The relay: every byte as it came and when it came, whatever the upstream and the client do."""

import asyncio
import hashlib
import json
import re
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from gwproxy.proxy.upstream import Connection
from tests.conftest import Front, StartGateway
from tests.harness import DONE, Received, Upstream, Wire, chat, delta, event, events, usage_only
from tests.raw import Peer, connect, post
from tests.scene import (
    CHUNKED,
    INTERRUPTED,
    OK,
    RECORDED,
    STREAM,
    WITH_USAGE,
    ask,
    asked,
    assert_nothing_left,
    cut,
    flushed,
    in_chunks,
    metric,
    pools,
    sends,
    stream_then_wait,
    tick,
    until,
)

HELLO = delta("Hello")


def split_events(data: bytes) -> list[bytes]:
    """Whole events, each with its empty line."""
    return re.findall(rb".*?\n\r?\n", data, re.DOTALL)


def without_usage(data: bytes) -> bytes:
    """What a client sees that did not ask for usage."""
    kept = []
    for each in split_events(data):
        payload = each.removeprefix(b"data:").strip()
        is_json = each.startswith(b"data:") and payload != b"[DONE]"
        value = json.loads(payload) if is_json else {}
        if not (value.get("choices") == [] and value.get("usage")):
            kept.append(each)
    return b"".join(kept)


async def body_of(front: Front, **fields: Any) -> bytes:
    response = await front.chat(chat(True, **fields))
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    body: bytes = await response.read()
    return body


# -- byte for byte -------------------------------------------------------------------------------


def _one_chunk_each(data: bytes) -> tuple[list[bytes], bool]:
    return [CHUNKED, in_chunks(split_events(data))], False


def _one_chunk(data: bytes) -> tuple[list[bytes], bool]:
    return [CHUNKED + in_chunks([data])], False


def _with_length(data: bytes) -> tuple[list[bytes], bool]:
    head = OK + STREAM + b"Content-Length: %d\r\n\r\n" % len(data)
    return [head + data[:100], data[100:]], False


def _until_close(data: bytes) -> tuple[list[bytes], bool]:
    return [OK + STREAM + b"\r\n", *cut(data, Random(1), 90)], True


def _http_1_0(data: bytes) -> tuple[list[bytes], bool]:
    return [b"HTTP/1.0 200 OK\r\n" + STREAM + b"\r\n" + data], True


def _byte_by_byte(data: bytes) -> tuple[list[bytes], bool]:
    everything = CHUNKED + in_chunks(cut(data, Random(2), 40))
    return [everything[at : at + 1] for at in range(len(everything))], False


FRAMINGS = [_one_chunk_each, _one_chunk, _with_length, _until_close, _http_1_0, _byte_by_byte]


@pytest.mark.parametrize("framing", FRAMINGS, ids=lambda framing: framing.__name__[1:])
async def test_a_recorded_stream_arrives_as_it_was_sent(
    front: Front, upstream: Upstream, framing: Callable[[bytes], tuple[list[bytes], bool]]
) -> None:
    for path in RECORDED:
        data = path.read_bytes()
        added = INTERRUPTED if path.stem == "truncated" else b""
        pieces, closes = framing(data)
        upstream.script = sends(*pieces, then=Wire.hang_up if closes else None)
        assert await body_of(front, **WITH_USAGE) == data + added, path.stem
        assert await body_of(front) == without_usage(data) + added, path.stem
    options = [received.json["stream_options"] for received in upstream.received]
    assert options == [{"include_usage": True}] * 2 * len(RECORDED)


def random_stream(random: Random) -> bytes:
    """Events as providers might send them, in all the forms the format allows."""
    end = random.choice([b"\n", b"\r\n"])
    made = []
    for _ in range(random.randint(1, 12)):
        text = random.choice(["a", "naïve ", "我们的猫", "😀", "\u2028", "x" * 300, "", '\\"\n'])
        value = {"choices": [{"index": 0, "delta": {"content": text}}]}
        data = json.dumps(value, ensure_ascii=random.random() < 0.5).encode()
        prefix = random.choice([b"data: ", b"data:"])
        made.append(
            random.choice(
                [
                    prefix + data + end + end,
                    b"event: x" + end + b"id: 7" + end + prefix + data + end + end,
                    b": a comment" + end + end,
                    b": a comment before" + end + prefix + data + end + end,
                    b"retry: 10" + end + prefix + data + end + end,
                    prefix + b"{" + end + prefix + data[1:] + end + end,
                    prefix + b"not json" + end + end,
                    end,
                ]
            )
        )
    ended = delta(finish="stop").replace(b"\n", end)
    done = DONE.replace(b"\n", end)
    return b"".join(made) + ended + random.choice([done, done.rstrip(), b"", b": bye" + end + end])


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_stream_in_random_pieces_arrives_as_it_was_sent(
    front: Front, upstream: Upstream, seed: int
) -> None:
    random = Random(seed)
    for _ in range(60):
        data = random_stream(random)
        longest = random.choice([1, 3, 20, 400, 5000])
        framed = CHUNKED + in_chunks(cut(data, random, random.choice([1, 7, 60, 4000])))
        upstream.script = sends(*cut(framed, random, longest))
        assert await body_of(front, **WITH_USAGE) == data


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
async def test_the_usage_chunk_stays_here_wherever_it_is_cut(
    front: Front, upstream: Upstream, end: bytes
) -> None:
    before = (delta("Hi") + delta(finish="stop")).replace(b"\n", end)
    usage = usage_only().replace(b"\n", end)
    after = DONE.replace(b"\n", end)
    for at in range(0, len(usage) + 1, 3):
        first, second = before + usage[:at], usage[at:] + after
        upstream.script = sends(CHUNKED + in_chunks([first])[:-5], in_chunks([second]))
        assert await body_of(front) == before + after
    assert (await front.gateway.request_line())["tokens"]["output"] == 2


async def test_an_event_larger_than_what_is_held_passes_in_pieces(
    front: Front, upstream: Upstream
) -> None:
    big = delta("0123456789abcdef" * 20_000)
    half = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO)
        await wire.chunk(big[:200_000])
        await half.wait()
        await wire.chunk(big[200_000:])
        for last in (delta(finish="stop"), DONE):
            await wire.chunk(last)
        await wire.end()

    upstream.script = script
    async with asked(front) as peer:
        await peer.head()
        came = b""
        async for part in peer.chunks():
            came += part
            if len(came) == len(HELLO) + 200_000:
                half.set()  # the rest is sent only now: nothing waits for the event's end
    assert came == HELLO + big + delta(finish="stop") + DONE


async def test_a_client_of_http_1_0_gets_the_same_bytes_without_chunks(
    front: Front, upstream: Upstream
) -> None:
    body = json.dumps(chat(True, **WITH_USAGE)).encode()
    async with connect(front.port) as peer:
        peer.send(post(body, key=front.key).replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1))
        answer = await peer.answer()
        assert await peer.rest() == b""
    assert answer.header("transfer-encoding") is None
    assert answer.header("connection") == "close"
    assert answer.body == b"".join(events("Hel", "lo."))


# -- in time -------------------------------------------------------------------------------------


async def test_an_event_is_with_the_client_before_the_next_one_is_sent(
    front: Front, upstream: Upstream
) -> None:
    sent = [delta(str(number)) for number in range(50)]
    go_on = asyncio.Semaphore(0)

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        for each in sent:
            await wire.chunk(each)
            await go_on.acquire()
        await wire.chunk(DONE)
        await wire.end()

    upstream.script = script
    async with asked(front) as peer:
        await peer.head()
        came = []
        async for part in peer.chunks():
            came.append(part)
            go_on.release()
    assert came == [*sent, DONE]


async def test_an_unfinished_event_waits_for_its_end(front: Front, upstream: Upstream) -> None:
    seen = asyncio.Event()
    second = delta("the second")

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO + second[:20])
        await seen.wait()
        await wire.chunk(second[20:40])
        await wire.chunk(second[40:] + DONE)
        await wire.end()

    upstream.script = script
    async with asked(front) as peer:
        await peer.head()
        parts = peer.chunks()
        assert await anext(parts) == HELLO
        seen.set()
        assert b"".join([part async for part in parts]) == second + DONE


async def test_events_arrive_no_later_than_on_a_direct_connection(
    front: Front, upstream: Upstream
) -> None:
    count, apart_s = 60, 0.005
    sent_at: dict[str, float] = {}

    async def script(wire: Wire, received: Received) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await wire.start()
        for number in range(count):
            # A pace, not a wait for something: each event has its own moment.
            await asyncio.sleep(max(0.0, began + number * apart_s - loop.time()))
            mark = f"{received.json['user']}-{number}"
            sent_at[mark] = time.perf_counter()
            await wire.chunk(delta(mark))
        await wire.chunk(DONE)
        await wire.end()

    upstream.script = script

    async def delays(port: int, name: str) -> list[float]:
        body = json.dumps(chat(True, user=name)).encode()
        found = []
        async with connect(port) as peer:
            peer.send(post(body, key=front.key))
            await peer.head()
            async for part in peer.chunks():
                now = time.perf_counter()
                marks = re.findall(rb'"content":"([a-z]+-\d+)"', part)
                found += [now - sent_at[mark.decode()] for mark in marks]
        assert len(found) == count
        return found

    direct_port = int(upstream.url.rsplit(":", 1)[1].split("/")[0])
    proxied, direct = await asyncio.gather(
        delays(front.port, "proxied"), delays(direct_port, "direct")
    )
    added = statistics.median(proxied) - statistics.median(direct)
    assert added < 0.003, (proxied, direct)
    # A gateway that gathers events would hold most of them for at least one interval.
    late = [each for each in proxied if each > apart_s + max(direct)]
    assert len(late) < count / 10, late


# -- readers that are slower than the upstream ---------------------------------------------------


@asynccontextmanager
async def slow_client(front: Front, **fields: Any) -> AsyncIterator[Peer]:
    """A client that has asked for a stream and reads nothing yet; buffers on its way are small."""
    app = front.gateway.app
    assert app is not None
    for server in app._servers:
        for listening in server.sockets:
            # What is accepted from now on inherits it.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", front.port))
    peer = Peer(*await asyncio.open_connection(sock=sock, limit=1024))
    try:
        ask(peer, front, **fields)
        yield peer
    finally:
        peer.reset()


SMALL = 32 * 1024
BULK = delta("0123456789abcdef" * 500)


async def pour(wire: Wire, received: Received) -> None:
    """A stream without end, as fast as it is taken."""
    await wire.start()
    while not wire.writer.is_closing():
        await wire.chunk(BULK)
        await asyncio.sleep(0)


async def paused(front: Front) -> Connection:
    """The one upstream connection, once it is not read any more."""
    connections: list[Connection] = []

    def found() -> bool:
        connections[:] = [each for pool in pools(front) for each in pool.active if each._paused]
        return bool(connections)

    await until(found)
    [connection] = connections
    return connection


async def test_a_client_that_does_not_read_stops_the_upstream_and_loses_nothing(
    front: Front, upstream: Upstream
) -> None:
    count = 3_000  # 24 MB
    taken = 0
    stopped = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        nonlocal taken
        sock = wire.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        wire.writer.transport.set_write_buffer_limits(high=0)
        await wire.start()
        for _ in range(count):
            try:
                async with asyncio.timeout(0.3):
                    await wire.chunk(BULK)
            except TimeoutError:
                stopped.set()
                await wire.writer.drain()
            taken += len(BULK)
        stopped.set()
        await wire.chunk(DONE)
        await wire.end()

    upstream.script = script
    async with slow_client(front, **WITH_USAGE) as peer, asyncio.timeout(20):
        await stopped.wait()
        assert taken < 2_000_000, taken
        await paused(front)
        await peer.head()
        came, digest = 0, hashlib.sha256()
        async for part in peer.chunks():
            came += len(part)
            digest.update(part)
    assert came == count * len(BULK) + len(DONE)
    assert digest.digest() == hashlib.sha256(BULK * count + DONE).digest()
    assert (await front.gateway.request_line())["outcome"] == "completed"


async def test_a_client_that_reads_nothing_for_two_minutes_is_given_up(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = pour
    async with slow_client(front):
        await paused(front)
        tick(front, 119)
        assert await metric(front, "gwproxy_streams_open") == 1
        tick(front, 121)
        await assert_nothing_left(front, upstream)
    assert (await front.gateway.request_line())["outcome"] == "client_left"


async def test_a_long_wait_of_a_slow_client_is_not_taken_for_the_upstreams_silence(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__IDLE_TIMEOUT_S="1")
    upstream.script = pour
    async with slow_client(front):
        connection = await paused(front)
        tick(front, 30)
        assert connection.exchange is not None
        assert await metric(front, "gwproxy_streams_open") == 1
    await assert_nothing_left(front, upstream)


async def test_a_stalled_client_that_leaves_takes_its_upstream_along(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = pour
    async with slow_client(front):
        await paused(front)
    await assert_nothing_left(front, upstream)
    line = await front.gateway.request_line()
    assert (line["outcome"], line["source"]) == ("client_left", "counted")
    assert line["tokens"]["output"] > 1000


async def test_the_gateway_stops_although_a_client_does_not_read(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = pour
    async with slow_client(front):
        await paused(front)
        async with asyncio.timeout(8):
            await front.gateway.close()
    await until(lambda: upstream.open == 0)
    line = await front.gateway.request_line()
    assert line["cost_nanos"] > 0


# -- silence -------------------------------------------------------------------------------------


async def test_a_comment_is_sent_after_fifteen_seconds_of_silence(
    front: Front, upstream: Upstream
) -> None:
    go_on = asyncio.Event()
    second = delta("the second")

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO + second[:20])
        await go_on.wait()
        await wire.chunk(second[20:] + DONE)
        await wire.end()

    upstream.script = script
    async with asked(front) as peer:
        await peer.head()
        parts = peer.chunks()
        assert await anext(parts) == HELLO
        tick(front, 14)
        tick(front, 16)
        tick(front, 17)  # the comment itself broke the silence
        tick(front, 32)
        go_on.set()
        came = [part async for part in parts]
    # The event that was under way is not broken in two.
    assert came == [b": keepalive\n\n", b": keepalive\n\n", second + DONE]


async def test_no_comment_is_put_into_an_event_that_is_partly_out(
    front: Front, upstream: Upstream
) -> None:
    big = delta("x" * 300_000)
    go_on = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO)
        await wire.chunk(big[:200_000])
        await go_on.wait()
        await wire.chunk(big[200_000:] + DONE)
        await wire.end()

    upstream.script = script
    async with asked(front) as peer:
        await peer.head()
        came = b""
        async for part in peer.chunks():
            came += part
            if len(came) == len(HELLO) + 200_000:
                tick(front, 20)
                go_on.set()
    assert came == HELLO + big + DONE


async def test_an_upstream_that_falls_silent_in_mid_stream_is_given_up(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__IDLE_TIMEOUT_S="0.2")
    upstream.script = stream_then_wait(HELLO)
    assert await body_of(front) == HELLO + INTERRUPTED
    await assert_nothing_left(front, upstream)
    line = await front.gateway.request_line()
    assert (line["status"], line["outcome"], line["source"]) == (200, "truncated", "counted")


# -- ends ----------------------------------------------------------------------------------------


def _reset(wire: Wire) -> None:
    wire.reset()


def _hang_up(wire: Wire) -> None:
    wire.hang_up()


DEATHS = {
    "a reset": (_reset, b""),
    "a connection closed in mid-body": (_hang_up, b""),
    "a clean end without finish_reason or DONE": (None, b"0\r\n\r\n"),
    "a chunk size that is none": (None, b"zz\r\n"),
    "a chunk that is longer than it said": (None, b"1\r\nabc\r\n"),
}


async def test_an_answer_that_breaks_off_ends_with_an_error_event(
    front: Front, upstream: Upstream
) -> None:
    for number, (death, (how, last)) in enumerate(DEATHS.items()):
        await break_off(front, upstream, how, last)
        line = await front.gateway.request_line(2 * number, least=2 * number + 2)
        assert (line["status"], line["outcome"]) == (200, "truncated"), death
        assert (line["source"], line["tokens"]["output"]) == ("counted", 1), death
        await assert_nothing_left(front, upstream)


async def break_off(
    front: Front, upstream: Upstream, how: Callable[[Wire], None] | None, last: bytes
) -> None:
    """A stream that dies once its first event has arrived; then the next request."""
    arrived = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO)
        await arrived.wait()
        await wire.send(last)
        if how is not None:
            how(wire)

    upstream.queue = [script]
    async with asked(front) as peer:
        await peer.head()
        parts = peer.chunks()
        assert await anext(parts) == HELLO
        arrived.set()
        # A piece of the broken chunk is no event and is not passed on.
        assert b"".join([part async for part in parts]) == INTERRUPTED
        # The body ended as HTTP says: the client's connection is still good.
        ask(peer, front)
        assert (await peer.answer()).status == 200


async def test_half_an_event_is_let_go_before_the_error_event(
    front: Front, upstream: Upstream
) -> None:
    half = in_chunks([delta("never whole")[:50]])
    for how, last in ((_hang_up, half[:-5]), (None, half), (_reset, half[:-5])):
        await break_off(front, upstream, how, last)


async def test_a_death_inside_an_event_that_is_partly_out_breaks_the_connection(
    front: Front, upstream: Upstream
) -> None:
    big = delta("x" * 300_000)
    upstream.script = sends(CHUNKED + in_chunks([HELLO, big[:200_000]])[:-5], then=_hang_up)
    async with asked(front) as peer:
        await peer.head()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            # No end of the body, no event of ours: the client sees that something is missing.
            async for part in peer.chunks():
                assert INTERRUPTED not in part
    await assert_nothing_left(front, upstream)
    assert (await front.gateway.request_line())["outcome"] == "truncated"


COMPLETE = {
    "finish_reason and no DONE": delta("Hi") + delta(finish="stop"),
    "a last event without its empty line": delta("Hi") + delta(finish="stop").rstrip(),
    "DONE without its empty line": delta("Hi") + delta(finish="stop") + b"data: [DONE]",
    "DONE and no finish_reason": delta("Hi") + DONE,
}


async def test_a_clean_end_after_the_last_word_is_complete(
    front: Front, upstream: Upstream
) -> None:
    for case, body in COMPLETE.items():
        upstream.queue = [
            sends(CHUNKED + in_chunks([body])),
            sends(OK + STREAM + b"\r\n" + body, then=_hang_up),
        ]
        assert [await body_of(front), await body_of(front)] == [body] * 2, case
    lines = await front.gateway.lines("request", 2 * len(COMPLETE) + 2)
    outcomes = [line["outcome"] for line in lines if line["route"] == "chat"]
    assert outcomes == ["completed"] * 2 * len(COMPLETE)


async def test_nothing_can_be_missing_after_done(front: Front, upstream: Upstream) -> None:
    body = delta("Hi") + delta(finish="stop") + usage_only() + DONE
    upstream.script = sends(CHUNKED + in_chunks([body])[:-5], then=_hang_up)
    assert await body_of(front, **WITH_USAGE) == body
    line = await front.gateway.request_line()
    assert (line["outcome"], line["source"]) == ("completed", "provider")


async def test_a_finish_reason_does_not_make_a_broken_connection_clean(
    front: Front, upstream: Upstream
) -> None:
    body = delta("Hi") + delta(finish="stop")
    upstream.script = sends(CHUNKED + in_chunks([body])[:-5], then=_hang_up)
    assert await body_of(front) == body + INTERRUPTED


async def test_an_event_cut_short_of_its_empty_line_does_not_swallow_the_error_event(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = sends(CHUNKED + in_chunks([HELLO + HELLO.rstrip()]))
    body = await body_of(front)
    assert body == HELLO + HELLO + INTERRUPTED


async def test_an_error_event_of_the_upstream_ends_the_stream_in_its_own_words(
    front: Front, upstream: Upstream
) -> None:
    failed = event({"error": {"message": "overloaded", "type": "server_error", "code": None}})
    for last in (b"0\r\n\r\n", b""):
        upstream.script = sends(
            CHUNKED + in_chunks([HELLO, failed])[:-5] + last, then=None if last else _hang_up
        )
        assert await body_of(front) == HELLO + failed
        assert (await front.gateway.request_line())["outcome"] == "truncated"


# -- clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", ["reset", "closed"])
async def test_a_client_that_leaves_in_mid_stream_takes_its_upstream_along(
    front: Front, upstream: Upstream, leaving: str
) -> None:
    gone = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO)
        with_rest = await wire.reader.read()
        assert with_rest == b""
        gone.set()
        wire.hang_up()

    upstream.script = script
    async with asked(front) as peer:
        await peer.head()
        assert await anext(peer.chunks()) == HELLO
        if leaving == "reset":
            peer.reset()
        else:
            peer.writer.close()
        async with asyncio.timeout(2):
            await gone.wait()
    await assert_nothing_left(front, upstream)
    line = await front.gateway.request_line()
    assert line["status"] == 499
    assert (line["outcome"], line["source"]) == ("client_left", "counted")
    assert line["error_type"] == "caller_cancelled"
    assert line["tokens"]["input"] > 5 and line["tokens"]["output"] == 1
    assert await metric(front, "gwproxy_settlements_total", outcome="client_left") == 1
    assert await metric(front, "gwproxy_settlements_total") == 1


async def test_a_hundred_clients_that_leave_leave_nothing_behind(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = stream_then_wait(HELLO)

    async def come_and_go(number: int) -> None:
        async with asked(front) as peer:
            if number % 3:
                await peer.head()
            if number % 2:
                peer.reset()

    await asyncio.gather(*(come_and_go(number) for number in range(100)))
    await assert_nothing_left(front, upstream)
    lines = await front.gateway.lines("request", 100)
    outcomes = [line.get("outcome") for line in lines if line["route"] == "chat"]
    # Whoever left before his request was read has none.
    assert set(outcomes) <= {"client_left", None}
    assert await metric(front, "gwproxy_settlements_total") == outcomes.count("client_left")


# -- the gateway's own end -----------------------------------------------------------------------


async def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = stream_then_wait(HELLO)
    app = front.gateway.app
    assert app is not None
    async with asked(front) as peer:
        await peer.head()
        parts = peer.chunks()
        assert await anext(parts) == HELLO
        _, rest = await asyncio.gather(front.gateway.close(), _joined(parts))
    assert rest.startswith(b"data: ")
    error = json.loads(rest.removeprefix(b"data: ").partition(b"\n\n")[0])["error"]
    assert (error["type"], error["code"]) == ("server_error", "stream_interrupted")
    assert "gateway is shutting down" in error["message"]
    line = await front.gateway.request_line()
    assert (line["outcome"], line["error_type"]) == ("cut", "other"), "no fault of the provider"
    assert line["error_code"] == "stream_interrupted"


async def _joined(parts: Any) -> bytes:
    return b"".join([part async for part in parts])


async def test_what_came_before_a_reset_is_passed_on(front: Front, upstream: Upstream) -> None:
    """Between the decision and the client's headers the upstream may already be gone."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.send(CHUNKED + in_chunks([HELLO])[:-5] + b"not a chunk\r\n")
        await flushed(wire)

    upstream.script = script
    assert await body_of(front) == HELLO + INTERRUPTED
    line = await front.gateway.request_line()
    assert (line["outcome"], line["error_type"], line["error_code"]) == (
        "truncated",
        "provider_truncated",
        "stream_interrupted",
    )


async def test_a_client_that_hangs_up_on_done_got_a_whole_stream(
    front: Front, upstream: Upstream
) -> None:
    """Both SDKs do so: whether the last chunk's end was faster must not decide the outcome."""
    held = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        for data in events("Hel", "lo."):
            await wire.chunk(data)
        await held.wait()

    upstream.script = script
    response = await front.chat(chat(stream=True))
    body = b""
    while DONE not in body:
        body += await response.content.readany()
    response.close()
    line = await front.gateway.request_line()
    held.set()
    assert (line["status"], line["outcome"], line["source"]) == (200, "completed", "provider")
    assert "error_type" not in line
