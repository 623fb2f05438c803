"""A stream on its way to the client: from the upstream's callback straight into the client's.

No task wakes for a chunk. The handler's task sleeps until the stream ends or the client stops
reading; then it waits for the client while the upstream is not read, so that nothing piles up.
"""

import asyncio
from collections.abc import Callable

import orjson
from aiohttp import web

from gwproxy.core.stream import ChatStream
from gwproxy.proxy.reply import Reply
from gwproxy.proxy.upstream import IDLE_TIMEOUT, Failure

KEEP_ALIVE_AFTER_S = 15.0
"""Silence after which a comment is sent: proxies between us and the client hang up on quiet."""

CLIENT_STALL_S = 120.0
"""A client that reads nothing for so long is gone, whatever its socket says."""

_KEEP_ALIVE = b": keepalive\n\n"

INTERRUPTED = b"data: %b\n\n" % orjson.dumps(
    {
        "error": {
            "message": "The upstream ended the stream before its answer was complete.",
            "type": "upstream_error",
            "param": None,
            "code": "stream_interrupted",
        }
    }
)
"""A clean end would look like success to both OpenAI SDKs; this makes both raise."""


class Relay:
    """Receives what the reply's connection reads, once the client's headers are out."""

    __slots__ = (
        "_chunked",
        "_events",
        "_idle_s",
        "_last_out_at",
        "_loop",
        "_now",
        "_protocol",
        "_reply",
        "_stalled_at",
        "_transport",
        "_wake",
        "_writer",
        "failure",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        request: web.BaseRequest,
        reply: Reply,
        events: ChatStream,
        *,
        chunked: bool,
        idle_s: float,
    ) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._loop = loop
        self._now = now
        self._transport = transport
        self._protocol = request.protocol
        self._writer = request.writer
        self._reply = reply
        self._events = events
        self._chunked = chunked
        self._idle_s = idle_s
        self._wake: asyncio.Future[None] = loop.create_future()
        self._stalled_at = 0.0
        self._last_out_at = self._now()
        self.failure: Failure | None = None if events.done else reply.failure

    async def run(self) -> None:
        """Relay until the upstream's end. Cancelled when the client leaves."""
        reply = self._reply
        head = reply.body()
        if head:
            self._write(head)
        if not reply.ended:
            reply.connection.exchange = self
        while not reply.ended:
            if self._protocol.writing_paused:
                reply.connection.pause()
                self._stalled_at = self._now()
                await self._writer.drain()
                self._stalled_at = 0.0
                # Silence that we ordered is not the upstream's.
                reply.last_byte_at = self._now()
            # Also where the client had caught up before this task woke.
            reply.connection.resume()
            self._wake = self._loop.create_future()
            await self._wake

    def finish(self) -> bool:
        """Say how the stream ended, if the client cannot see it. False: only by hanging up."""
        events = self._events
        if self.failure is None and events.complete:
            return True
        if events.error is not None:
            return True  # the upstream told the client itself
        if not events.at_boundary:
            return False
        self._write(INTERRUPTED)
        return True

    # -- the connection's side ---------------------------------------------------------------

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        raise AssertionError("the head came before the relay began")

    def on_body(self, data: bytes) -> None:
        reply = self._reply
        now = self._now()
        gap = now - reply.last_byte_at
        if gap > reply.longest_gap_s:
            reply.longest_gap_s = gap
        reply.last_byte_at = now
        leaving = self._events.feed(data)
        if leaving:
            self._last_out_at = now
            self._write(leaving)
            if self._protocol.writing_paused:
                self._reply.connection.pause()
                self._rouse()

    def on_end(self, failure: Failure | None) -> None:
        # After [DONE] nothing can be missing, however the connection ended.
        self.failure = None if self._events.done else failure
        if failure is None:
            last = self._events.finish()
            if last:
                self._write(last)
        self._reply.ended = True
        self._rouse()

    def tick(self, now: float) -> None:
        if self._stalled_at:
            if now - self._stalled_at > CLIENT_STALL_S:
                self._transport.abort()
            return
        if now - self._reply.last_byte_at > self._idle_s:
            self._reply.connection.fail(IDLE_TIMEOUT)
        elif now - self._last_out_at > KEEP_ALIVE_AFTER_S and self._events.at_boundary:
            self._last_out_at = now
            self._write(_KEEP_ALIVE)

    def _write(self, data: bytes) -> None:
        # uvloop raises on a write to a transport that is closing.
        if not self._transport.is_closing():
            if self._chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self._transport.write(data)

    def _rouse(self) -> None:
        if not self._wake.done():
            self._wake.set_result(None)
