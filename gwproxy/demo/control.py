"""The control API under /_demo/: scripts in, record and requests out. Loopback only, and not for
web pages: a browser names an origin, and a request that names one is refused.
"""

import ipaddress
from collections.abc import Mapping, MutableSequence
from typing import Any, Final, Protocol

import orjson
from aiohttp import hdrs, web

from .faults import MODIFIERS
from .providers import slugs
from .scripts import ScriptError, Scripts

_PREFIX: Final = "/_demo"
_WAIT_S: Final = 10.0


class Controlled(Protocol):
    """What the API works on: the running demo, or a stand-in for it."""

    scripts: Scripts
    event_interval_ms: float

    @property
    def record(self) -> list[dict[str, Any]]: ...
    @property
    def requests(self) -> list[dict[str, Any]]: ...
    async def recorded(self, count: int, timeout_s: float) -> list[dict[str, Any]]: ...
    async def received(self, count: int, timeout_s: float) -> list[dict[str, Any]]: ...
    def clear(self) -> None: ...


def owns(request: web.BaseRequest) -> bool:
    return request.path == _PREFIX or request.path.startswith(_PREFIX + "/")


async def serve(request: web.BaseRequest, demo: Controlled) -> web.StreamResponse:
    if not _is_local(request):
        return _json({"error": "loopback only"}, 403)
    noun = request.path[len(_PREFIX) :].strip("/")
    match request.method, noun:
        case hdrs.METH_GET, "":
            faults = {name: modifier.does for name, modifier in MODIFIERS.items()}
            return _json({"providers": slugs(), "faults": faults})
        case hdrs.METH_DELETE, "":
            demo.clear()
            return web.Response(status=204)
        case hdrs.METH_GET, "record" | "requests":
            return await _rows(request, demo, noun)
        case hdrs.METH_DELETE, "record" | "requests":
            rows: MutableSequence[Any] = demo.record if noun == "record" else demo.requests
            rows.clear()
            return web.Response(status=204)
        case hdrs.METH_POST, "script":
            return _add(await request.read(), demo)
        case hdrs.METH_GET, "script":
            return _json(demo.scripts.waiting(), 200)
        case hdrs.METH_DELETE, "script":
            demo.scripts.clear()
            return web.Response(status=204)
        case hdrs.METH_PUT, "pace":
            return _pace(await request.read(), demo)
    return _json({"error": "there is nothing here"}, 404)


async def _rows(request: web.BaseRequest, demo: Controlled, noun: str) -> web.StreamResponse:
    """`?count=N` waits until N rows are there; `?last=N` gives the newest only."""
    query = request.rel_url.query
    wait = demo.recorded if noun == "record" else demo.received
    try:
        count, last = int(query.get("count", 0)), int(query.get("last", 0))
    except ValueError:
        return _json({"error": "count and last are whole numbers"}, 400)
    try:
        rows = await wait(count, _WAIT_S)
    except TimeoutError:
        return _json({"error": f"{count} rows did not come within {_WAIT_S:g} s"}, 408)
    return _json(rows[-last:], 200)


def _add(raw: bytes, demo: Controlled) -> web.StreamResponse:
    try:
        wishes = orjson.loads(raw)
        wishes = wishes if isinstance(wishes, list) else [wishes]
        if not all(isinstance(wish, Mapping) for wish in wishes):
            raise ScriptError("a script is a JSON object")
        added = [demo.scripts.add(wish).id for wish in wishes]
    except (orjson.JSONDecodeError, ScriptError) as wrong:
        return _json({"error": str(wrong)}, 400)
    return _json({"ids": added}, 201)


def _pace(raw: bytes, demo: Controlled) -> web.StreamResponse:
    try:
        demo.event_interval_ms = max(float(orjson.loads(raw)["event_interval_ms"]), 0.0)
    except (ValueError, TypeError, KeyError):
        return _json({"error": "event_interval_ms is a number"}, 400)
    return web.Response(status=204)


def _is_local(request: web.BaseRequest) -> bool:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if not peer or hdrs.ORIGIN in request.headers:
        return False
    return ipaddress.ip_address(peer[0]).is_loopback


def _json(value: Any, status: int = 200) -> web.StreamResponse:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")
