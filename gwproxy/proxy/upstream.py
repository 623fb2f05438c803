"""Connections to the upstream: a small HTTP/1.1 client whose bytes arrive by callback.

The one room that opens sockets for proxied requests. A connection hands each piece of an answer
to its exchange in the very call in which the event loop read it; nothing is queued on the way.
It never follows a redirect, keeps no cookie, asks no proxy from the environment.
"""

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import aiohappyeyeballs
import httptools

HEAD_LIMIT = 256 * 1024
"""Bytes of a response head. Cloudflare's are below 4 KiB; an endless one must not fill memory."""

STALE_WITHIN_S = 1.0
"""A reused connection that dies this soon, without a byte of answer, had been hung up already.

Later than that the upstream may have read the request and be working on it, so it is not sent
a second time.
"""

_FALLBACK_DELAY_S = 0.25  # RFC 8305's head start for the first address family


@dataclass(frozen=True, slots=True)
class Failure:
    """How an exchange failed below HTTP. `reason` is a label from a closed set."""

    reason: str
    error_type: str
    sent: bool
    """The request left, in part or whole: the upstream may have worked on it."""
    stale: bool = False
    """A reused connection had been hung up: the request may be sent once more."""
    hint: str = ""
    """What the operator should look at, where that can be said."""


CONNECT_FAILED = Failure("connect", "provider_connect", sent=False)
TLS_FAILED = Failure(
    "tls",
    "provider_connect",
    sent=False,
    hint="the upstream's certificate or its TLS was not accepted: check the host name, "
    "and [upstream] ca_file where its authority is a private one",
)
CONNECT_TIMEOUT = Failure("connect_timeout", "provider_timeout", sent=False)
RESET = Failure("reset", "provider_connect", sent=True)
STALE = Failure("reset", "provider_connect", sent=True, stale=True)
TRUNCATED = Failure("truncated", "provider_truncated", sent=True)
GARBAGE = Failure("garbage", "provider_error", sent=True)
ENCODED = Failure(
    "garbage",
    "provider_error",
    sent=True,
    hint="the upstream compressed its answer although it was asked not to",
)
TOO_LARGE = Failure("too_large", "provider_error", sent=True)
FIRST_BYTE_TIMEOUT = Failure("first_byte_timeout", "provider_timeout", sent=True)
ANSWER_TIMEOUT = Failure("answer_timeout", "provider_timeout", sent=True)
IDLE_TIMEOUT = Failure("idle_timeout", "provider_timeout", sent=True)
TOTAL_TIMEOUT = Failure("total_timeout", "provider_timeout", sent=True)
SHUTDOWN = Failure("shutdown", "other", sent=True)


class Exchange(Protocol):
    """Whoever receives an answer. Called on the event loop; none of these may raise."""

    def on_head(self, status: int, headers: dict[str, str]) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_end(self, failure: Failure | None) -> None:
        """Once, last. None: the body came to its end as HTTP says."""

    def tick(self, now: float) -> None:
        """Called a few times a second while the exchange lasts: time-outs are decided here."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a pool connects to: `https` or not, host, port."""

    tls: bool
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The Host header: without the port where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport
        self.exchange: Exchange | None = None
        self.lost = False
        self.idle_since = 0.0
        self._sent_at = 0.0
        self._reused = False
        self._paused = False
        self._body: list[bytes] = []
        # The parser asks for it once: a method of ours would be one more call for each event.
        self.on_body = self._body.append
        self._reset()
        self._parser = httptools.HttpResponseParser(self)

    def _reset(self) -> None:
        self._head_done = False
        self._head_bytes = 0
        self._headers: dict[str, str] = {}
        self._body.clear()
        self._complete = False
        self._keep_alive = False

    # -- our side ----------------------------------------------------------------------------

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        self.exchange = exchange
        self._sent_at = self._pool.now()
        self._pool.active.add(self)
        self._transport.write(head + body)

    def is_usable(self) -> bool:
        return not self.lost and not self._transport.is_closing()

    def pause(self) -> None:
        if not self._paused and not self.lost:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once. The exchange, if one is under way, hears nothing more."""
        self.exchange = None
        self._pool.active.discard(self)
        if not self.lost:
            self._transport.abort()

    def fail(self, failure: Failure) -> None:
        """Close at once and tell the exchange why."""
        exchange = self.exchange
        self.abort()
        if exchange is not None:
            exchange.on_end(failure)

    # -- the event loop's side ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            # Bytes that answer nothing: the connection's framing is lost.
            self.abort()
            return
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._body:
                self._deliver(self._body)
            if self._complete:
                # The answer is whole; what follows it answers nothing.
                self._keep_alive = False
                self._end()
            else:
                self.fail(TRUNCATED if self._head_done else GARBAGE)
            return
        pieces = self._body
        if pieces:
            self._deliver(pieces)
        elif self._head_bytes > HEAD_LIMIT:
            # A head without an end, or the trailer of a body.
            self.fail(TRUNCATED if self._head_done else GARBAGE)
            return
        if self._complete:
            self._end()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._pool.forget(self)
        exchange = self.exchange
        if exchange is None:
            return
        self.exchange = None
        self._pool.active.discard(self)
        if self._head_done:
            # A body without a length ends with its connection (RFC 9112, 6.3).
            whole = exc is None and self._until_close
            exchange.on_end(None if whole else TRUNCATED)
        elif self._head_bytes:
            exchange.on_end(GARBAGE)
        else:
            soon = self._pool.now() - self._sent_at < STALE_WITHIN_S
            exchange.on_end(STALE if self._reused and soon else RESET)

    def _deliver(self, pieces: list[bytes]) -> None:
        """What came of the body in one go, in one."""
        self._head_bytes = 0
        body = pieces.pop() if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        exchange = self.exchange
        if exchange is not None:
            exchange.on_body(body)

    def _end(self) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        self.exchange = None
        self._pool.active.discard(self)
        reusable = self._keep_alive and not self._transport.is_closing()
        self.resume()
        self._reset()
        self._reused = True
        if reusable:
            self._pool.release(self)
        else:
            self.abort()
        exchange.on_end(None)

    # -- the parser's side -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            # A second answer to one request: nothing on this connection can be trusted.
            raise ValueError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # a trailer is no header (RFC 9110, 6.5.1)
            self._headers[_lower(name)] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100:
                raise ValueError("no status of HTTP's: a body would follow that has no head")
            if status == 101:
                raise ValueError("a protocol switch that nobody asked for")
            if "content-length" in self._headers or "transfer-encoding" in self._headers:
                # RFC 9110, 8.6; 9112, 6.1. One reader would skip it and another read it as a head.
                raise ValueError("an interim answer with a body")
            self._headers = {}
            return
        headers = self._headers
        if self._head_bytes > HEAD_LIMIT and sum(map(len, headers.values())) > HEAD_LIMIT:
            raise ValueError("a head that came with its end in the last piece, and is too large")
        self._until_close = "content-length" not in headers and "transfer-encoding" not in headers
        self._head_done = True
        if self.exchange is not None:
            self.exchange.on_head(status, headers)

    def on_message_complete(self) -> None:
        if self._head_done:  # else an interim 1xx answer
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive() and not self._until_close


@functools.lru_cache(maxsize=512)
def _lower(name: bytes) -> str:
    """A header's name as it is looked up; the same few come with every answer."""
    return name.lower().decode("latin-1")


class Pool:
    """Connections to one origin. The most recently used idle one goes first: it is the warmest."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        origin: Origin,
        *,
        tls: ssl.SSLContext | None,
        connect_timeout_s: float,
        idle_s: float,
    ) -> None:
        self.loop = loop
        self.now = now
        self.origin = origin
        self._tls = tls if origin.tls else None
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._idle: list[Connection] = []
        self.active: set[Connection] = set()

    def idle_connection(self) -> Connection | None:
        """A usable idle connection, at once; None: one has to be opened."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection | Failure:
        """A new connection, or why there is none."""
        origin = self.origin
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                addresses = await self.loop.getaddrinfo(
                    origin.host, origin.port, type=socket.SOCK_STREAM
                )
                sock = await aiohappyeyeballs.start_connection(
                    addresses, happy_eyeballs_delay=_FALLBACK_DELAY_S, interleave=1, loop=self.loop
                )
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    _, connection = await self.loop.create_connection(
                        lambda: Connection(self),
                        sock=sock,
                        ssl=self._tls,
                        server_hostname=origin.host if self._tls else None,
                    )
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            return CONNECT_TIMEOUT
        except ssl.SSLError:
            return TLS_FAILED
        except OSError:
            return CONNECT_FAILED
        return connection

    def release(self, connection: Connection) -> None:
        connection.idle_since = self.now()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def tick(self, now: float) -> None:
        """Time-outs of what is under way; idle connections closed before the upstream does it."""
        for connection in tuple(self.active):
            if connection.exchange is not None:
                connection.exchange.tick(now)
        while self._idle and now - self._idle[0].idle_since > self._idle_s:
            self._idle.pop(0).abort()

    def end_all(self) -> None:
        """End what is under way: each exchange is told, and each stream's client by it."""
        for connection in tuple(self.active):
            connection.fail(SHUTDOWN)

    def close(self) -> None:
        for connection in [*self._idle, *self.active]:
            connection.abort()
        self._idle.clear()


class Upstream:
    """All pools, one per origin, and the coarse timer that they share."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        *,
        connect_timeout_s: float,
        idle_s: float,
        tick_s: float,
        ca_file: str | None,
        late: Callable[[float], None],
    ) -> None:
        """`now` gives monotonic seconds. `late` is told by how many each tick came too late."""
        self._loop = loop
        self._now = now
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._tick_s = tick_s
        self._late = late
        self._pools: dict[Origin, Pool] = {}
        self._tls = _tls_context(ca_file)
        self._timer = loop.call_later(tick_s, self._tick, now() + tick_s)

    def pool(self, origin: Origin) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(
                self._loop,
                self._now,
                origin,
                tls=self._tls,
                connect_timeout_s=self._connect_timeout_s,
                idle_s=self._idle_s,
            )
        return pool

    def end_all(self) -> None:
        for pool in self._pools.values():
            pool.end_all()

    def close(self) -> None:
        self._timer.cancel()
        for pool in self._pools.values():
            pool.close()

    def _tick(self, due: float) -> None:
        now = self._now()
        self._late(max(0.0, now - due))
        for pool in self._pools.values():
            pool.tick(now)
        # One timer for all streams: a timer per chunk would cost more than the chunk.
        self._timer = self._loop.call_later(self._tick_s, self._tick, now + self._tick_s)


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Certificates are always checked; a private upstream's authority comes in addition."""
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
