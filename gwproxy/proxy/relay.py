"""A stream on its way to the client: from the upstream's callback straight into the client's.

No task wakes for a chunk. The handler's task sleeps until the stream ends or the client stops
reading; then it waits for the client while the upstream is not read, so that nothing piles up.
"""

import asyncio
import contextlib
from collections.abc import Callable

from aiohttp import web

from gwproxy.core.errors import GatewayError
from gwproxy.core.stream import INTERRUPTED, EventStream
from gwproxy.proxy.reply import Reply
from gwproxy.proxy.upstream import ANSWER_TIMEOUT, IDLE_TIMEOUT, SHUTDOWN, Failure
from gwproxy.state.reservation import Reservation

KEEP_ALIVE_AFTER_S = 15.0
"""Silence after which a comment is sent: proxies between us and the client hang up on quiet."""

CLIENT_STALL_S = 120.0
"""A client that reads nothing for so long is gone, whatever its socket says."""

DRAIN_S = 5.0
DRAIN_BYTES = 1024 * 1024
"""So much is read on of an answer whose client has left, for the sake of the usage at its end."""

_KEEP_ALIVE = b": keepalive\n\n"

_SHUT_DOWN = GatewayError(
    "This gateway is shutting down, and ended the stream before its answer was complete. "
    "Ask again.",
    status=503,
    type="server_error",
    code="stream_interrupted",
)


class Relay:
    """Receives what the reply's connection reads, once the client's headers are out."""

    __slots__ = (
        "_chunked",
        "_drained",
        "_events",
        "_idle_s",
        "_last_out_at",
        "_loop",
        "_meter",
        "_now",
        "_protocol",
        "_reply",
        "_reservation",
        "_stalled_at",
        "_transport",
        "_wake",
        "_writer",
        "failure",
        "refusal",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        request: web.BaseRequest,
        reply: Reply,
        events: EventStream,
        reservation: Reservation,
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
        self._meter = events.meter
        self._reservation = reservation
        self._drained: int | None = None
        """Bytes read since the client left; None: he is there."""
        self._chunked = chunked
        self._idle_s = idle_s
        self._wake: asyncio.Future[None] = loop.create_future()
        self._stalled_at = 0.0
        self._last_out_at = self._now()
        self.failure: Failure | None = None if events.done else reply.failure
        self.refusal: GatewayError | None = None
        """Why the stream was ended by us."""

    async def run(self) -> None:
        """Relay until the upstream's end. Cancelled when the client leaves."""
        reply = self._reply
        head = reply.body()
        if head and self._may_leave():
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

    async def drain(self) -> None:
        """Read on without a client, within bounds."""
        reply = self._reply
        self._drained = 0
        if reply.connection.exchange is not self:
            return  # it was not ours yet, or is not any more
        reply.connection.resume()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while not reply.ended and self._drained <= DRAIN_BYTES:
                    self._wake = self._loop.create_future()
                    await self._wake

    def finish(self) -> bool:
        """Say how the stream ended, if the client cannot see it. False: only by hanging up."""
        events = self._events
        if self.refusal is not None:
            if events.at_boundary:
                self._write(events.error_event(self.refusal))
            return events.at_boundary
        if self.failure is None and events.complete:
            return True
        if events.error is not None:
            return True  # the upstream told the client itself
        if not events.at_boundary:
            return False
        ours = self.failure is SHUTDOWN
        self._write(events.error_event(_SHUT_DOWN if ours else INTERRUPTED))
        return True

    # -- the connection's side ---------------------------------------------------------------

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        raise AssertionError("the head came before the relay began")

    def on_body(self, data: bytes) -> None:
        reply = self._reply
        size = len(data)
        now = self._now()
        gap = now - reply.last_byte_at
        if gap > reply.longest_gap_s:
            reply.longest_gap_s = gap
        reply.last_byte_at = now
        if self._drained is not None:
            self._events.feed(data)
            self._drained += len(data)
            if self._drained > DRAIN_BYTES:
                self._rouse()
            return
        if self._reservation.scarce:
            *whole, rest = data.split(b"\n\n")
            for event in whole:
                if not self._pass_on(event + b"\n\n", now):
                    return
            data = rest
        self._pass_on(data, now)
        if reply.on_words is not None:
            reply.look_for_words(size)

    def _pass_on(self, data: bytes, now: float) -> bool:
        """Read `data` and write what may leave now; False: the stream ends here."""
        leaving = self._events.feed(data)
        if leaving:
            if self._meter.bound() > self._reservation.mark and not self._may_leave():
                return False
            self._last_out_at = now
            self._write(leaving)
            if self._protocol.writing_paused:
                self._reply.connection.pause()
                self._rouse()
        return True

    def on_end(self, failure: Failure | None) -> None:
        # After [DONE] nothing can be missing, however the connection ended.
        self.failure = self._reply.failure = None if self._events.done else failure
        if failure is None and self._drained is None:
            last = self._events.finish()
            if last:
                self._write(last)
        self._reply.ended = True
        self._rouse()

    def tick(self, now: float) -> None:
        if self._drained is not None:
            return
        if self._stalled_at:
            if now - self._stalled_at > CLIENT_STALL_S:
                self._transport.abort()
            return
        if now - self._reply.last_byte_at > self._idle_s:
            self._reply.connection.fail(IDLE_TIMEOUT)
        elif self._reply.is_overdue(now):
            self._reply.connection.fail(ANSWER_TIMEOUT)
        elif now - self._last_out_at > KEEP_ALIVE_AFTER_S and self._events.at_boundary:
            self._last_out_at = now
            self._write(_KEEP_ALIVE)

    def _may_leave(self) -> bool:
        """Whether the watermark allows for all that was read, by now at the latest."""
        reservation = self._reservation
        if self._meter.bound() > reservation.mark:
            try:
                reservation.extend()
            except GatewayError as error:
                self.refusal = error
                self._reply.close()
                self._rouse()
                return False
        return True

    def _write(self, data: bytes) -> None:
        transport = self._transport
        # uvloop raises on a write to a transport that is closing.
        if not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _rouse(self) -> None:
        if not self._wake.done():
            self._wake.set_result(None)
