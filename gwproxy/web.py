"""The listener: aiohttp's server facing the clients, our routes behind it, and the one place where
an error becomes a response and a request becomes a log line.

aiohttp's low-level server is used without its Application, whose router and middlewares cost more
than the whole of our own work on a request. What its parser lets through and must not pass is
refused here, before any route is looked at.
"""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import orjson
from aiohttp import web
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from gwproxy.core.errors import (
    BadRequest,
    Draining,
    GatewayError,
    MethodNotAllowed,
    NotFound,
    RequestTooLarge,
)
from gwproxy.core.trace import Trace
from gwproxy.log import Log
from gwproxy.metrics import Metrics

SERVER: Final = "gwproxy"

Handler = Callable[..., Awaitable[web.StreamResponse]]
"""`async def handler(request, **parameters)`; a parameter is a segment of the path, unquoted.

A traced route's gets the trace as well, to fill in as the request goes on.
"""

_PARAMETER = re.compile(r"\{(\w+)(:path)?\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table. `name` is its label in metrics and logs."""

    method: str
    path: str
    handler: Handler
    name: str
    traced: bool = False
    guard: Callable[[web.BaseRequest], None] | None = None
    """Asked before the handler, and before anybody learns whether the method was right."""


class Router:
    """Exact paths by a dict, the others by pattern, both on the path as it was sent: what a
    proxy in front of us saw is what we route by, dots and doubled slashes included."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._exact: dict[str, dict[str, Route]] = {}
        patterns: dict[str, dict[str, Route]] = {}
        for route in self.routes:
            table = patterns if "{" in route.path else self._exact
            table.setdefault(route.path, {})[route.method] = route
        for methods in (*self._exact.values(), *patterns.values()):
            if "GET" in methods:
                # RFC 9110, 9.3.2: the same answer; aiohttp leaves its body out.
                methods.setdefault("HEAD", methods["GET"])
        self._patterns = [(_compile(path), methods) for path, methods in patterns.items()]

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """The route of a path as it was sent, and its parameters; NotFound or MethodNotAllowed."""
        if "?" in path:
            path = path.partition("?")[0]
        methods = self._exact.get(path)
        parameters: dict[str, str] = {}
        if methods is None:
            for pattern, candidates in self._patterns:
                match = pattern.fullmatch(path)
                if match is not None:
                    methods = candidates
                    parameters = {name: unquote(text) for name, text in match.groupdict().items()}
                    break
            else:
                raise NotFound("There is no such route. The API lives under /v1.")
        route = methods.get(method)
        if route is None:
            guard = next(iter(methods.values())).guard
            raise _WrongMethod(", ".join(sorted(methods)), guard)
        return route, parameters


class _WrongMethod(MethodNotAllowed):
    def __init__(self, allowed: str, guard: Callable[[web.BaseRequest], None] | None) -> None:
        super().__init__(f"This route answers to {allowed} only.", headers={"Allow": allowed})
        self.guard = guard


def _compile(path: str) -> re.Pattern[str]:
    pattern = ""
    position = 0
    for match in _PARAMETER.finditer(path):
        pattern += re.escape(path[position : match.start()])
        pattern += f"(?P<{match[1]}>{'.+' if match[2] else '[^/]+'})"
        position = match.end()
    return re.compile(pattern + re.escape(path[position:]))


class Front:
    """Answers every request of one listener."""

    def __init__(
        self,
        router: Router,
        *,
        request_ids: Callable[[], str],
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
        max_header_bytes: int,
    ) -> None:
        """`clock` gives monotonic seconds."""
        self.router = router
        self._request_ids = request_ids
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._max_header_bytes = max_header_bytes
        self._draining = False
        self._idle = asyncio.Event()
        self._open_requests = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        trace = Trace(self._request_ids(), self._clock())
        self._open_requests += 1
        try:
            self._check_framing(request)
            route, parameters = self.router.find(request.method, request.raw_path)
            trace.route = route.name
            if route.guard is not None:
                route.guard(request)
            if route.traced:
                if self._draining:
                    raise Draining("This gateway is shutting down.", retry_after_s=1, close=True)
                response = await route.handler(request, trace, **parameters)
            else:
                response = await route.handler(request, **parameters)
                response.headers["Server"] = SERVER
                response.headers["x-request-id"] = trace.request_id
            trace.status = response.status
            return response
        except _WrongMethod as error:
            # Whoever may not use a path does not learn its methods either.
            try:
                if error.guard is not None:
                    error.guard(request)
            except GatewayError as refused:
                return self._refuse(request, trace, refused)
            return self._refuse(request, trace, error)
        except GatewayError as error:
            return self._refuse(request, trace, error)
        except web.RequestPayloadError:
            broken = BadRequest("The body's framing is broken.", close=True)
            return self._refuse(request, trace, broken)
        except (ConnectionError, asyncio.CancelledError):
            if trace.outcome == "completed":
                trace.status = 200  # the client left with all that there was
            else:
                # 499 is nginx's word for a client that left; no response carries it.
                trace.status, trace.error_type = 499, "caller_cancelled"
            raise
        except Exception as error:
            # The border of the request's task: whatever it is, this request ends with it.
            return self._refuse(request, trace, self._internal(trace, error))
        finally:
            self._open_requests -= 1
            if self._draining and not self._open_requests:
                self._idle.set()
            self._record(trace)

    def drain(self) -> None:
        """On the way out: what is open may finish, what is new is told to come back."""
        self._draining = True
        if not self._open_requests:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is open any more."""
        await self._idle.wait()

    def _check_framing(self, request: web.BaseRequest) -> None:
        """What aiohttp's parser accepts and a proxy must not."""
        version = request._version
        if version != (1, 1) and version != (1, 0):
            request._version = HttpVersion11  # an answer's first line says what we speak
            raise BadRequest("HTTP/1.1 or HTTP/1.0, please.", status=505, close=True)
        headers = request.headers
        encoding = headers.get("Transfer-Encoding")
        if encoding is not None and (encoding.lower() != "chunked" or version == (1, 0)):
            raise BadRequest("Transfer-Encoding may only be chunked.", status=501, close=True)
        if request._message.upgrade and ("Upgrade" in headers or request.method == "CONNECT"):
            # What follows such a request may belong to another protocol: it is never parsed.
            raise BadRequest("This server speaks HTTP/1.1 alone.", close=True)
        protocol = request.protocol
        assert isinstance(protocol, ListenerProtocol)
        if protocol.largest_head <= self._max_header_bytes:
            return
        if sum(len(name) + len(value) for name, value in request.raw_headers) > (
            self._max_header_bytes
        ):
            raise RequestTooLarge(
                f"The headers are larger than {self._max_header_bytes} bytes.",
                status=431,
                close=True,
            )

    def _refuse(
        self, request: web.BaseRequest, trace: Trace, error: GatewayError
    ) -> web.StreamResponse:
        trace.status, trace.error_type, trace.error_code = (
            error.status,
            error.error_type,
            error.code,
        )
        if error.error_type == "caller_auth" and error.status == 401:
            self._metrics.auth_failures.value += 1
        if request.writer.output_size > 0:
            # Headers are out: a second response would be read as part of the first one's body.
            self._log.event("error", "error after headers", request_id=trace.request_id)
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the response had begun")
        return error_response(error, trace.request_id, unread=not request.content.is_eof())

    def refuse_unreadable(
        self, request: web.BaseRequest, error: GatewayError | BaseException | None
    ) -> web.StreamResponse:
        """Answer what never became a request for `handle`, counted and logged like one."""
        trace = Trace(self._request_ids(), self._clock())
        if not isinstance(error, GatewayError):
            error = self._internal(trace, error)
        response = self._refuse(request, trace, error)
        self._record(trace)
        return response

    def count_turned_away(self) -> None:
        """A connection too many. No log line: they come by the thousand."""
        self._metrics.request("other", "", "", 503, "other").value += 1

    def _internal(self, trace: Trace, error: BaseException | None) -> GatewayError:
        self._log.event(
            "error",
            "internal error",
            request_id=trace.request_id,
            exception=type(error).__name__,
            where="" if error is None else _where(error),
        )
        return GatewayError("The gateway failed. The operator has been told.")

    def _record(self, trace: Trace) -> None:
        """The one log line of a request, and its count."""
        trace.ended_at = self._clock()
        status = trace.status or 500
        self._metrics.request(
            trace.route, trace.provider, trace.provider_model, status, trace.error_type
        ).value += 1
        if trace.route not in _QUIET or status != 200:
            self._log.members("request", trace.json())


_QUIET: Final = frozenset({"health", "metrics"})
"""Asked every few seconds by machines: their successes are counted, not logged."""


def error_response(error: GatewayError, request_id: str, *, unread: bool) -> web.Response:
    """An error in OpenAI's shape. `unread`: the request's body was not read to its end."""
    headers = {
        "Server": SERVER,
        "Content-Type": "application/json",
        "Cache-Control": "no-store",
        "x-request-id": request_id,
        **error.headers,
    }
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    body = error.body if error.body is not None else orjson.dumps(error.envelope())
    response = web.Response(status=error.status, body=body, headers=headers)
    if error.close or unread:
        # What follows on this connection could be the rest of a body, and must not be parsed.
        response.force_close()
    return response


def _where(error: BaseException) -> str:
    """File and line of the innermost frame: enough to find a bug, nothing of the request."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f"{traceback.tb_frame.f_code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno}"


# -- the listener's protocol ---------------------------------------------------------------------


class Listener(web.Server):
    """aiohttp's server with our protocol, a limit on connections, and a time-out for heads."""

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
            raise RuntimeError(
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
        self._header_timeout_s = header_timeout_s
        self.request_ids = request_ids
        self._protocol_options: Mapping[str, Any] = {
            # A compressed body would be inflated before anybody knows who sent it.
            "auto_decompress": False,
            "keepalive_timeout": keepalive_timeout_s,
            "access_log": None,
            # After an early answer the rest of a body is not waited for.
            "lingering_time": LINGER_S,
        }
        self._sweep_s = min(1.0, header_timeout_s / 2)
        self._sweep = loop.call_later(self._sweep_s, self._close_slow)

    def __call__(self) -> "ListenerProtocol":
        return ListenerProtocol(self, loop=self._loop, **self._protocol_options)

    def stop_sweeping(self) -> None:
        self._sweep.cancel()

    def _close_slow(self) -> None:
        """Connections whose request's head has been coming for too long."""
        due = self._loop.time() - self._header_timeout_s
        for protocol in tuple(self._connections):
            assert isinstance(protocol, ListenerProtocol)
            if protocol.head_since and protocol.head_since < due:
                protocol.force_close()
        self._sweep = self._loop.call_later(self._sweep_s, self._close_slow)


LINGER_S: Final = 1.0
"""After a last answer the client may go on sending for so long. A close with its bytes unread is a
reset, which can destroy the answer before it is seen (RFC 9112, 9.6)."""

TURNED_AWAY_AT_ONCE: Final = 256
"""So many of those beyond the limit get an answer; more would be a crowd of their own."""

_BUSY: Final = orjson.dumps(GatewayError("Too many connections.", code="overloaded").envelope())

_TOO_MANY_HEADERS: Final = "Too many headers received"  # the parser's word, which has no class


class ListenerProtocol(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_body", "_since_head", "deaf", "head_since", "largest_head", "turned_away")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_since = 0.0
        """When the head under way began to come; 0 while none is."""
        self.largest_head = 0
        """No head on this connection was larger; with bodies in the count, it may be far less."""
        self._since_head = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        """Of the last request whose head came: the one that may still be on its way."""
        self.deaf = False
        """Whatever still comes is thrown away."""
        self.turned_away = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.head_since = self._loop.time()
        manager = self._manager
        assert isinstance(manager, Listener)
        if len(manager._connections) - manager.turned_away > manager.max_connections:
            self.turned_away = self.deaf = True
            manager.turned_away += 1
            self._turn_away(manager)

    def _turn_away(self, manager: "Listener") -> None:
        transport = self.transport
        assert transport is not None
        manager.front.count_turned_away()
        if manager.turned_away > TURNED_AWAY_AT_ONCE:
            transport.abort()
            return
        head = (
            f"HTTP/1.1 503 Service Unavailable\r\nServer: {SERVER}\r\n"
            f"x-request-id: {manager.request_ids()}\r\nContent-Type: application/json\r\n"
            "Retry-After: 1\r\nConnection: close\r\n"
            f"Content-Length: {len(_BUSY)}\r\n\r\n"
        )
        transport.write(head.encode() + _BUSY)
        transport.write_eof()
        self._loop.call_later(LINGER_S, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        manager = self._manager
        if self.turned_away and isinstance(manager, Listener):
            manager.turned_away -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        before = self._request_count
        self._since_head += len(data)
        super().data_received(data)
        if self._request_count != before:
            self.largest_head = max(self.largest_head, self._since_head)
            self._since_head = len(data)  # the next head may have begun in this very piece
            self.head_since = 0.0
            message, body = self._messages[-1]
            if isinstance(message, RawRequestMessage):
                self._body = body
            else:
                self._give_up()
        elif not self.head_since and self._waiter is not None and not self._waiter.done():
            # Only while the next request is waited for; else it is a body, or a head to come.
            self.head_since = self._loop.time()

    def _give_up(self) -> None:
        """The parser cannot read on, and its last message is an error to be answered."""
        self.deaf = True
        failure, _ = self._messages.pop()
        if not self._body.is_eof():
            # aiohttp lets whoever reads it wait for a rest that will never come.
            self._body.set_exception(web.RequestPayloadError("broken"))
            self._body.feed_eof()
        # A body without an end: the connection lingers after its answer.
        self._messages.append((failure, StreamReader(self, 1, loop=self._loop)))

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp calls this after each read, paused or not, and then parses nothing and resumes
        # nothing, for the price of a parser call.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A request that aiohttp's parser could not read. Its text, which may hold a key and a
        prompt, goes nowhere."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response had begun")
        manager = self._manager
        if not isinstance(manager, Listener):
            raise ConnectionError("the client is gone")
        error: GatewayError | BaseException | None = exc
        if isinstance(exc, LineTooLong):
            error = RequestTooLarge("A header or the path is too long.", status=431)
        elif isinstance(exc, BadHttpMessage) and exc.message == _TOO_MANY_HEADERS:
            error = RequestTooLarge("There are too many headers.", status=431)
        elif status == 400:
            error = BadRequest("The request is not valid HTTP/1.1.", close=True)
        request._version = HttpVersion11  # an answer's first line says what we speak
        return manager.front.refuse_unreadable(request, error)


def request_ids(prefix: str) -> Callable[[], str]:
    """Ids for one process: `prefix` is random, what follows counts. Cheaper than a random each."""
    counter = itertools.count(1)
    return lambda: f"req_{prefix}{next(counter):08x}"
