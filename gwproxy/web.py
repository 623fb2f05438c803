"""The front: our routes, and the one place where an error becomes a response and a request becomes
a log line.

aiohttp's Application is not used: its router and middlewares cost more than the whole of our own
work on a request.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

import orjson
from aiohttp import web

from gwproxy.core.api import Api, envelope
from gwproxy.core.errors import (
    BadRequest,
    Draining,
    GatewayError,
    MethodNotAllowed,
    NotFound,
)
from gwproxy.core.trace import Trace
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.proxy.answer import SERVER

Handler = Callable[..., Awaitable[web.StreamResponse]]
"""`async def handler(request, **parameters)`; a parameter is a segment of the path, unquoted.

A traced route's gets the trace as well, to fill in as the request goes on; an identified one's the
request's id, by its name.
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
    api: Api = Api.CHAT
    """Whose shape its errors have."""
    identified: bool = False
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
                below = (route.api for route in self.routes if path.startswith(f"{route.path}/"))
                own = any(route.path.startswith("/admin/") for route in self.routes)
                raise _NoRoute(next(below, Api.CHAT), admin=own and path.startswith("/admin/"))
        route = methods.get(method)
        if route is None:
            raise _WrongMethod(", ".join(sorted(methods)), next(iter(methods.values())))
        return route, parameters


class _NoRoute(NotFound):
    """`api`: whose clients ask for such a path, and read such an error."""

    def __init__(self, api: Api, *, admin: bool) -> None:
        where = "GET /admin/openapi.json has them all" if admin else "The API lives under /v1"
        super().__init__(f"There is no such route. {where}.")
        self.api = api


class _WrongMethod(MethodNotAllowed):
    def __init__(self, allowed: str, route: Route) -> None:
        super().__init__(f"This route answers to {allowed} only.", headers={"Allow": allowed})
        self.guard, self.api = route.guard, route.api


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
        self.max_header_bytes = max_header_bytes
        self._draining = False
        self._idle = asyncio.Event()
        self.open_requests = 0

    async def handle(
        self, request: web.BaseRequest, fault: GatewayError | None = None
    ) -> web.StreamResponse:
        """`fault`: what the listener found wrong with the request, if anything."""
        trace = Trace(self._request_ids(), self._clock())
        self.open_requests += 1
        api = Api.CHAT
        try:
            if fault is not None:
                raise fault
            route, parameters = self.router.find(request.method, request.raw_path)
            trace.route, api = route.name, route.api
            if route.guard is not None:
                route.guard(request)
            if route.traced:
                if self._draining:
                    raise Draining("This gateway is shutting down.", retry_after_s=1, close=True)
                response = await route.handler(request, trace, **parameters)
            else:
                if route.identified:
                    parameters["request_id"] = trace.request_id
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
                return self._refuse(request, trace, refused, error.api)
            return self._refuse(request, trace, error, error.api)
        except _NoRoute as error:
            return self._refuse(request, trace, error, error.api)
        except GatewayError as error:
            return self._refuse(request, trace, error, api)
        except web.RequestPayloadError:
            broken = BadRequest("The body's framing is broken.", close=True)
            return self._refuse(request, trace, broken, api)
        except (ConnectionError, asyncio.CancelledError):
            if trace.outcome == "completed":
                trace.status = 200  # the client left with all that there was
            else:
                # 499 is nginx's word for a client that left; no response carries it.
                trace.status, trace.error_type = 499, "caller_cancelled"
            raise
        except Exception as error:
            # The border of the request's task: whatever it is, this request ends with it.
            return self._refuse(request, trace, self._internal(trace, error), api)
        finally:
            self.open_requests -= 1
            if self._draining and not self.open_requests:
                self._idle.set()
            self._record(trace)

    def drain(self) -> None:
        """On the way out: what is open may finish, what is new is told to come back."""
        self._draining = True
        if not self.open_requests:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is open any more."""
        await self._idle.wait()

    def _refuse(
        self, request: web.BaseRequest, trace: Trace, error: GatewayError, api: Api
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
        unread = not request.content.is_eof()
        return error_response(error, trace.request_id, api, unread=unread, degraded=trace.degraded)

    def count_turned_away(self) -> None:
        """A connection too many. No log line: they come by the thousand."""
        self._metrics.request("other", "", "", 503, "other").value += 1

    def _internal(self, trace: Trace, error: Exception) -> GatewayError:
        self._log.event(
            "error",
            "internal error",
            request_id=trace.request_id,
            exception=type(error).__name__,
            where=_where(error),
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


def error_response(
    error: GatewayError, request_id: str, api: Api, *, unread: bool, degraded: bool
) -> web.Response:
    """An error in the shape of its API. `unread`: the request's body was not read to its end."""
    headers = {
        "Server": SERVER,
        "Content-Type": "application/json",
        "Cache-Control": "no-store",
        "x-request-id": request_id,
        "x-gateway-mode": "degraded" if degraded else "normal",
        **error.headers,
    }
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if api is Api.MESSAGES:
        headers["request-id"] = request_id  # where Anthropic's SDKs look for it
    body = error.body
    if body is None or api is Api.MESSAGES:
        body = orjson.dumps(envelope(error, api, request_id))
    response = web.Response(status=error.status, body=body, headers=headers)
    if error.close or unread:
        # What follows on this connection could be the rest of a body, and must not be parsed.
        response.force_close()
    return response


def _where(error: Exception) -> str:
    """File and line of the innermost frame: enough to find a bug, nothing of the request."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f"{traceback.tb_frame.f_code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno}"
