"""The control API under /_demo/: scripts in, record and requests out. Loopback only, and not for
web pages: a browser names an origin, and a request that names one is refused.
"""

import ipaddress
from collections.abc import Mapping, MutableSequence
from typing import Any, Final, Protocol

import orjson
from aiohttp import hdrs, web

from .faults import MODIFIERS
from .management import PERMISSIONS, FaultError, Management
from .providers import slugs
from .scripts import ScriptError, Scripts

_PREFIX: Final = "/_demo"
_WAIT_S: Final = 10.0


class Controlled(Protocol):
    """What the API works on: the running demo, or a stand-in for it."""

    scripts: Scripts
    management: Management
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
        case hdrs.METH_POST, "management/faults":
            return _management_faults(await request.read(), demo)
        case hdrs.METH_PUT, "management/tokens":
            return _tokens(await request.read(), demo)
        case hdrs.METH_POST, "management/logs":
            return _plant(await request.read(), demo)
        case hdrs.METH_PUT, "management/logs":
            return _manners(await request.read(), demo)
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


def _management_faults(raw: bytes, demo: Controlled) -> web.StreamResponse:
    try:
        wishes = orjson.loads(raw)
        for wish in wishes if isinstance(wishes, list) else [wishes]:
            if not isinstance(wish, Mapping):
                raise FaultError("a fault is a JSON object")
            demo.management.fault(wish)
    except (orjson.JSONDecodeError, FaultError) as wrong:
        return _json({"error": str(wrong)}, 400)
    return web.Response(status=204)


def _tokens(raw: bytes, demo: Controlled) -> web.StreamResponse:
    """`{"TOKEN": ["run", "read", "edit"]}`: all the tokens there are, and what each may do."""
    try:
        tokens = {str(name): frozenset(may) for name, may in orjson.loads(raw).items()}
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        tokens = {}
    if not tokens or not all(may <= PERMISSIONS for may in tokens.values()):
        return _json({"error": "tokens are an object of lists of run, read and edit"}, 400)
    demo.management.tokens = tokens
    return web.Response(status=204)


def _plant(raw: bytes, demo: Controlled) -> web.StreamResponse:
    """Rows for the log, as its API will show them."""
    try:
        rows = orjson.loads(raw)
        if not all(isinstance(row["id"] and row["created_at"], str) for row in rows):
            raise TypeError
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return _json({"error": "rows are a list of objects with id and created_at"}, 400)
    demo.management.logs.plant(rows)
    return web.Response(status=204)


def _manners(raw: bytes, demo: Controlled) -> web.StreamResponse:
    """`{"cost_delay_s": 1.5, "in_order": false}`."""
    try:
        wish = orjson.loads(raw)
        delay_s = float(wish.get("cost_delay_s", demo.management.logs.cost_delay_s))
        in_order = bool(wish.get("in_order", demo.management.logs.in_order))
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
        return _json({"error": "cost_delay_s is a number, in_order true or false"}, 400)
    demo.management.logs.cost_delay_s = delay_s
    demo.management.logs.in_order = in_order
    return web.Response(status=204)


def _is_local(request: web.BaseRequest) -> bool:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if not peer or hdrs.ORIGIN in request.headers:
        return False
    return ipaddress.ip_address(peer[0]).is_loopback


def _json(value: Any, status: int = 200) -> web.StreamResponse:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")
