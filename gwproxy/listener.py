"""The listener: the side of the house that faces the clients' connections.

aiohttp's parser and request objects are used, its low-level server's loop around them is not: that
gives each request a task, a future and a timer of its own. What the parser lets through and must
not pass is found here and handed to whoever answers, as the error to answer with.
"""

import asyncio
import contextlib
import fcntl
import itertools
import termios
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
from aiohttp import web
from aiohttp.hdrs import TRANSFER_ENCODING, UPGRADE
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError, LineTooLong
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import ERROR, _ErrInfo
from multidict import CIMultiDict, CIMultiDictProxy

from gwproxy.core.errors import BadRequest, GatewayError, RequestTooLarge
from gwproxy.proxy.answer import SERVER, Answer


class Front(Protocol):
    """Who answers the requests; `web.Front`, whose room this one does not know."""

    max_header_bytes: int

    async def handle(
        self, request: web.BaseRequest, fault: GatewayError | None = None
    ) -> web.StreamResponse:
        """`fault`: what is wrong with the request already, if anything."""

    def count_turned_away(self) -> None: ...


class ParserRefused(Exception):
    """There is no parser here that may face clients. The message says the cure."""


class Listener(web.Server):
    """aiohttp's server with our protocol, a limit on connections, and time-outs."""

    def __init__(
        self,
        front: Front,
        *,
        loop: asyncio.AbstractEventLoop,
        max_connections: int,
        header_timeout_s: float,
        keepalive_timeout_s: float,
        request_ids: Callable[[], str],
    ) -> None:
        if HttpRequestParser is HttpRequestParserPy:
            # Smuggling holes of the past were in the parser written in Python.
            raise ParserRefused(
                "aiohttp runs without its C parser: install its wheel, unset AIOHTTP_NO_EXTENSIONS"
            )
        super().__init__(
            front.handle,
            # A client that leaves ends its request at once, and with it the upstream's.
            handler_cancellation=True,
            loop=loop,
        )
        self.front = front
        self.max_connections = max_connections
        self.turned_away = 0
        """Connections beyond the limit that are still being told so."""
        self.header_timeout_s = header_timeout_s
        self.keepalive_timeout_s = keepalive_timeout_s
        self.request_ids = request_ids
        self._protocol_options: Mapping[str, Any] = {
            # A compressed body would be inflated before anybody knows who sent it.
            "auto_decompress": False,
            # One timer sweeps all connections; aiohttp's would be one each.
            "keepalive_timeout": 0,
            "access_log": None,
        }
        self.handing_over = False
        self._empty = asyncio.Event()
        self._sweep_s = min(1.0, header_timeout_s / 2)
        self._sweep = loop.call_later(self._sweep_s, self._close_due)

    def __call__(self) -> "ListenerProtocol":
        return ListenerProtocol(self, loop=self._loop, **self._protocol_options)

    def stop_sweeping(self) -> None:
        self._sweep.cancel()

    # -- giving the socket to the next process -----------------------------------------------

    def hand_over(self) -> None:
        """Nobody new is accepted: get rid of the connections that are open, and lose no request.

        Idle ones are closed, so that their clients come back as new ones; on the others one more
        answer is given, which says that it is the last.
        """
        self.handing_over = True
        for protocol in tuple(self._connections):
            assert isinstance(protocol, ListenerProtocol)
            if protocol.is_idle():
                protocol.hang_up()
        self.lost_one()

    def lost_one(self) -> None:
        if self.handing_over and not self._connections:
            self._empty.set()

    async def emptied(self) -> None:
        """Wait, a while, for those who have not hung up yet or have connected and not asked."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._empty.wait()

    def _close_due(self) -> None:
        """Connections that are idle, or whose request's head has been coming, for too long."""
        now = self._loop.time()
        for protocol in tuple(self._connections):
            assert isinstance(protocol, ListenerProtocol)
            if protocol.due < now:
                protocol.force_close()
        self._sweep = self._loop.call_later(self._sweep_s, self._close_due)


LINGER_S: Final = 1.0
"""After a last answer the client may go on sending for so long. A close with its bytes unread is a
reset, which can destroy the answer before it is seen (RFC 9112, 9.6)."""

TURNED_AWAY_AT_ONCE: Final = 256
"""So many of those beyond the limit get an answer; more would be a crowd of their own."""

_BUSY: Final = orjson.dumps(GatewayError("Too many connections.", code="overloaded").envelope())

_TOO_MANY_HEADERS: Final = "Too many headers received"  # the parser's word, which has no class

_NEVER: Final = float("inf")

_NO_HEADERS: Final = CIMultiDictProxy(CIMultiDict[str]())


class Request(web.BaseRequest):
    """aiohttp's request at a third of its price: what every route asks for is a plain attribute,
    where aiohttp has properties that look each up when it is first asked for. The others remain."""

    # As class attributes they take the place of aiohttp's properties, and are set for each.
    method = ""
    raw_path = ""
    version = HttpVersion11
    headers = _NO_HEADERS
    content = EMPTY_PAYLOAD
    keep_alive = True
    remote: str | None = None

    # aiohttp's constructor sets these for each; ours are the same for all.
    _client_max_size = 0
    _client_max_fields = 0
    _transport_sslcontext = _transport_peername = _transport_sockname = None

    def __init__(
        self,
        message: RawRequestMessage,
        body: StreamReader,
        protocol: "ListenerProtocol",
        task: asyncio.Task[None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # Not aiohttp's own initialisation: this is all of it that is asked for later.
        self._message = message
        self._protocol = protocol
        self._payload_writer = StreamWriter(protocol, loop)
        self._task = task
        self._loop = loop
        self._cache = {}
        self._state = {}
        self.content = self._payload = body
        self.headers = self._headers = message.headers
        self.method = self._method = message.method
        self.version = self._version = message.version
        self.raw_path = path = message.path
        self.keep_alive = not message.should_close
        self.remote = protocol.remote
        url = message.url
        # A whole URL in the place of a path is routed by as it came; its query is looked at.
        self._rel_url = url.relative() if path[:1] != "/" and url.absolute else url


class ListenerProtocol(web.RequestHandler):
    """One client's connection."""

    __slots__ = (
        "_body",
        "_listener",
        "_since_head",
        "deaf",
        "due",
        "largest_head",
        "quiet",
        "remote",
        "turned_away",
    )

    def __init__(self, listener: Listener, **options: Any) -> None:
        super().__init__(listener, **options)
        self._listener = listener
        self.due = _NEVER
        """When the connection is to be closed, should no request have come by then."""
        self.largest_head = 0
        """No head on this connection was larger; with bodies in the count, it may be far less."""
        self._since_head = 0
        self.quiet = False
        """All that came has been answered. Nothing has come yet: not quiet, but about to speak."""
        self._body: StreamReader = EMPTY_PAYLOAD
        """Of the last request whose head came: the one that may still be on its way."""
        self.deaf = False
        """Whatever still comes is thrown away."""
        self.turned_away = False
        self.remote: str | None = None
        """The client's address; of a socket in the file system, whatever it says."""

    # -- the connection's beginning and end --------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        listener = self._listener
        peer = self.peername
        if peer is not None:
            self.remote = str(peer[0] if isinstance(peer, list | tuple) else peer)
        self.due = self._loop.time() + listener.header_timeout_s
        if len(listener._connections) - listener.turned_away > listener.max_connections:
            self.turned_away = True
            listener.turned_away += 1
            self._turn_away()

    def _turn_away(self) -> None:
        transport, listener = self.transport, self._listener
        assert transport is not None
        listener.front.count_turned_away()
        if listener.turned_away > TURNED_AWAY_AT_ONCE:
            transport.abort()
            return
        head = (
            f"HTTP/1.1 503 Service Unavailable\r\nServer: {SERVER}\r\n"
            f"x-request-id: {listener.request_ids()}\r\nContent-Type: application/json\r\n"
            "Retry-After: 1\r\nConnection: close\r\n"
            f"Content-Length: {len(_BUSY)}\r\n\r\n"
        )
        transport.write(head.encode() + _BUSY)
        self.hang_up()

    def hang_up(self) -> None:
        """Say that no answer will come any more, and wait for the client to say the same."""
        assert self.transport is not None
        self.deaf = True
        self.transport.write_eof()
        self._loop.call_later(LINGER_S, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.turned_away:
            self._listener.turned_away -= 1
            self.turned_away = False
        super().connection_lost(exc)
        self._listener.lost_one()

    def is_idle(self) -> bool:
        """Whether nothing has come since its last answer, not even to the kernel."""
        transport = self.transport
        if not self.quiet or transport is None:
            return False
        unread = bytearray(4)
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, unread)
        return not any(unread)

    # -- what comes in -----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if self.deaf or self._force_close or parser is None:
            return
        self.quiet = False
        self._since_head += len(data)
        try:
            messages, upgraded, _ = parser.feed_data(data)
        except HttpProcessingError as error:
            self._give_up(error)
            return
        if not messages:
            if self.due != _NEVER:
                # The next head has begun; a byte now and then buys no more time.
                self.due = min(self.due, self._loop.time() + self._listener.header_timeout_s)
            return
        if self._since_head > self.largest_head:
            self.largest_head = self._since_head
        if data:  # else all of this was counted when it came
            self._since_head = len(data)  # the next head may have begun in this very piece
        self._body = messages[-1][1]
        # What follows an upgrade may belong to another protocol: it is never parsed.
        self.deaf = upgraded
        self._queue(messages)

    def _give_up(self, error: HttpProcessingError) -> None:
        """The parser cannot read on. What it has read is answered first, then this."""
        self.deaf = True
        if not self._body.is_eof():
            # aiohttp lets whoever reads it wait for a rest that will never come.
            self._body.set_exception(web.RequestPayloadError("broken"))
            self._body.feed_eof()
        # A body without an end: the connection lingers after its answer.
        endless = StreamReader(self, 1, loop=self._loop)
        self._queue([(_ErrInfo(status=400, exc=error, message=error.message), endless)])

    def _queue(self, messages: Sequence[tuple[RawRequestMessage | _ErrInfo, StreamReader]]) -> None:
        self.due = _NEVER
        self._messages += messages
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if len(self._messages) >= self._max_msg_queue_size and not self._buffer_paused:
            self._pause_reading_for_buffer()

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp calls this after each read, paused or not, and then parses nothing and resumes
        # nothing, for the price of a parser call.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    # -- what goes out -----------------------------------------------------------------------

    async def start(self) -> None:
        """Answer one request after the other, all in this task: a client that leaves cancels it,
        and with it the request under way."""
        listener, parser, messages = self._listener, self._parser, self._messages
        loop, front, task = self._loop, self._listener.front, asyncio.current_task()
        assert parser is not None and task is not None
        try:
            while not self._force_close:
                if not messages:
                    if self.due == _NEVER:
                        self.due = loop.time() + listener.keepalive_timeout_s
                        self.quiet = True
                    if listener.handing_over and self.is_idle():
                        self.hang_up()
                    self._waiter = loop.create_future()
                    try:
                        await self._waiter
                    finally:
                        self._waiter = None
                message, body = messages.popleft()
                parser.message_consumed()
                if self._buffer_paused and len(messages) <= self._msg_queue_resume_size:
                    self._resume_reading_if_drained()
                if isinstance(message, RawRequestMessage):
                    fault = self._fault(message)
                else:
                    fault = _unreadable(message.exc)
                    message = ERROR
                if fault is not None:
                    # An answer's first line says what we speak.
                    message = message._replace(version=HttpVersion11)
                if listener.handing_over:
                    message = message._replace(should_close=True)
                request = Request(message, body, self, task, loop)
                self._request_in_progress = True
                response = await front.handle(request, fault)
                if isinstance(response, Answer):
                    response.send(request)
                else:
                    await response.prepare(request)
                    await response.write_eof()
                self._request_in_progress = False
                if not body.is_eof() and not self._force_close:
                    await self._linger(body)
                if not response.keep_alive or not body.is_eof():
                    break
                # An idle connection keeps nothing of its last request.
                del message, body, fault, request, response
        except ConnectionError:
            pass  # the client is gone
        except Exception:
            # The border of the connection's task: whatever it is, this connection ends with it.
            self.log_exception("the listener failed")
        finally:
            self._task_handler = None
            self._request_in_progress = False
            if self._handler_waiter is not None and not self._handler_waiter.done():
                self._handler_waiter.set_result(None)  # whoever stops us waited for this request
            if self.transport is not None:
                self.transport.close()

    def _fault(self, message: RawRequestMessage) -> GatewayError | None:
        """What aiohttp's parser accepts and a proxy must not."""
        version, headers = message.version, message.headers
        if version is not HttpVersion11 and version != HttpVersion10:
            return BadRequest("HTTP/1.1 or HTTP/1.0, please.", status=505, close=True)
        encoding = headers.get(TRANSFER_ENCODING)
        if encoding is not None and (encoding.lower() != "chunked" or version == HttpVersion10):
            return BadRequest("Transfer-Encoding may only be chunked.", status=501, close=True)
        if message.upgrade and (UPGRADE in headers or message.method == "CONNECT"):
            return BadRequest("This server speaks HTTP/1.1 alone.", close=True)
        limit_bytes = self._listener.front.max_header_bytes
        if self.largest_head > limit_bytes and (
            sum(len(name) + len(value) for name, value in message.raw_headers) > limit_bytes
        ):
            return RequestTooLarge(
                f"The headers are larger than {limit_bytes} bytes.", status=431, close=True
            )
        return None

    async def _linger(self, body: StreamReader) -> None:
        """Throw away what still comes of a request that has its answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not body.is_eof():
                    await body.readany()


def _unreadable(error: BaseException) -> GatewayError:
    """A request that aiohttp's parser could not read. Its text, which may hold a key and a prompt,
    goes nowhere."""
    if isinstance(error, LineTooLong):
        return RequestTooLarge("A header or the path is too long.", status=431)
    if isinstance(error, BadHttpMessage) and error.message == _TOO_MANY_HEADERS:
        return RequestTooLarge("There are too many headers.", status=431)
    return BadRequest("The request is not valid HTTP/1.1.", close=True)


def request_ids(prefix: str) -> Callable[[], str]:
    """Ids for one process: `prefix` is random, what follows counts. Cheaper than a random each."""
    counter = itertools.count(1)
    return lambda: f"req_{prefix}{next(counter):08x}"
