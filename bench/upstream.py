"""The bench's own AI provider: a fast server that answers and streams at the pace it is told.

    python -m bench.upstream [--cert FILE]

One process serves plain HTTP and, with a certificate, TLS; it prints one JSON line with both ports
and ends when its standard input closes, so it cannot outlive the run. Its CPU is nobody's cost.
"""

import argparse
import asyncio
import gc
import hashlib
import ssl
import sys
import time
from typing import Any, cast

import httptools
import orjson
import uvloop

from bench import wire

_HEAD_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_HEAD_SSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_ANSWER = _HEAD_JSON % len(wire.ANSWER) + wire.ANSWER


Record = tuple[int, int, str, int, str]
"""Events, bytes and their hash; words and the hash of the text that they make."""


class Sent:
    """What each stream was sent, for the far end to compare: events, bytes and their hash.

    While `held`, no paced stream ends: it goes on past its number of events until it is let go, so
    that thousands can be open at once however long a proxy takes to open them.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Record] = {}
        self.held = False

    def record(self, stream_id: int, record: "Record") -> None:
        self._streams[stream_id] = record

    def ask(self, url: bytes) -> bytes:
        """The load generator's own three requests, on the same port as everything else."""
        if url == b"/sent":
            return self._take()
        self.held = url == b"/hold"
        return b"{}"

    def _take(self) -> bytes:
        answer = orjson.dumps(self._streams, option=orjson.OPT_NON_STR_KEYS)
        self._streams.clear()
        return answer


class Stream:
    """One paced answer. Each event is a write of its own, hence a segment of its own."""

    __slots__ = (
        "_digest",
        "_interval_s",
        "_loop",
        "_n_events",
        "_next",
        "_provider",
        "_size",
        "_stamped",
        "_start",
        "_stream_id",
        "_text",
        "_timer",
    )

    def __init__(self, provider: "Provider", knobs: dict[str, Any]) -> None:
        self._provider = provider
        self._loop = asyncio.get_running_loop()
        self._stream_id = int(knobs.get("stream_id", 0))
        self._n_events = int(knobs.get("n_events", 16))
        self._interval_s = float(knobs.get("interval_ms", 0)) / 1000
        self._stamped = bool(knobs.get("stamped"))
        self._digest = hashlib.sha256()
        self._text = hashlib.sha256()
        self._size = 0
        self._next = 0
        self._start = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        provider.write(_HEAD_SSE)
        self._send(wire.role_event(time.monotonic_ns()))
        if self._interval_s:
            # The first word follows the role at once, as providers send it: a proxy may hold the
            # role back until it has seen a word, and a gap made up here would be on its bill.
            self._tick()
        else:
            for index in range(self._n_events):
                self._word(index)
            self._next = self._n_events
            self._finish()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _send(self, event: bytes) -> None:
        self._digest.update(event)
        self._size += len(event)
        self._provider.write(b"%x\r\n%b\r\n" % (len(event), event))

    def _word(self, index: int) -> None:
        now_ns = time.monotonic_ns()
        if self._stamped:
            self._text.update(wire.stamped_word(now_ns))
        self._send(wire.word_event(index, now_ns, stamped=self._stamped))

    def _tick(self) -> None:
        self._word(self._next)
        self._next += 1
        if self._next < self._n_events or self._provider.sent.held:
            # Counted from the start, so that a late tick is made up for and the rate holds.
            due = self._start + self._next * self._interval_s
            self._timer = self._loop.call_at(due, self._tick)
        else:
            self._finish()

    def _finish(self) -> None:
        self._send(wire.finish_event(time.monotonic_ns()))
        self._send(wire.usage_event(self._next))
        self._send(wire.DONE)
        # Recorded before the last byte leaves: whoever has the whole stream may ask at once.
        events = wire.events_total(self._next)
        self._provider.sent.record(
            self._stream_id,
            (events, self._size, self._digest.hexdigest(), self._next, self._text.hexdigest()),
        )
        self._provider.write(b"0\r\n\r\n")
        self._provider.stream = None


class Provider(asyncio.Protocol):
    """One connection of whoever calls us."""

    def __init__(self, sent: Sent) -> None:
        self.sent = sent
        self.stream: Stream | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.stream is not None:
            self.stream.stop()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.abort()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    # Called by the parser:

    def on_message_begin(self) -> None:
        self._url = b""
        self._body.clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._url in (b"/sent", b"/hold", b"/release"):
            answer = self.sent.ask(self._url)
            self.write(_HEAD_JSON % len(answer) + answer)
            return
        knobs = wire.knobs_of(b"".join(self._body))
        if knobs is not None:
            self.stream = Stream(self, knobs)
        else:
            self.write(_ANSWER)


async def serve(cert: str | None) -> None:
    loop = asyncio.get_running_loop()
    sent = Sent()
    plain = await loop.create_server(lambda: Provider(sent), "127.0.0.1", 0, backlog=4096)
    ports = {"plain": plain.sockets[0].getsockname()[1]}
    if cert is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert)
        tls = await loop.create_server(
            lambda: Provider(sent), "127.0.0.1", 0, backlog=4096, ssl=context
        )
        ports["tls"] = tls.sockets[0].getsockname()[1]
    print(orjson.dumps(ports).decode(), flush=True)
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    await stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.upstream")
    parser.add_argument("--cert", help="PEM file with certificate chain and key, for the TLS port")
    args = parser.parse_args()
    gc.disable()  # a collection here would look like a slow proxy; the run is short
    uvloop.run(serve(args.cert))


if __name__ == "__main__":
    main()
