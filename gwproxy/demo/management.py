"""The management API of the demo gateway: gateways, provider keys, logs, tokens and what each may
do, in the envelopes of the real one, with faults for the asking.

Faults are queued as `{"on": "logs", "fault": "status-429", "count": 1, "after": 0}`: `on` is the
noun asked for ("gateways", "provider_configs", "logs", "log", "tokens", or "any"), `after` lets so
many requests pass before.
"""

import asyncio
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from .logs import ORDERS, BadFilter, Logs

PREFIX: Final = "/client/v4/"
PERMISSIONS: Final = frozenset({"run", "read", "edit"})
MOST_PER_PAGE: Final = 50

_REQUIRED: Final[Mapping[str, tuple[type, ...]]] = {
    "cache_invalidate_on_update": (bool,),
    "cache_ttl": (int, type(None)),
    "collect_logs": (bool,),
    "rate_limiting_interval": (int, type(None)),
    "rate_limiting_limit": (int, type(None)),
}
_OPTIONAL: Final[Mapping[str, Any]] = {
    "authentication": False,
    "byok_only": False,
    "log_management": 100_000,
    "log_management_strategy": "STOP_INSERTING",
    "logpush": False,
    "rate_limiting_technique": "fixed",
    "retry_max_attempts": None,
    "retry_delay": None,
    "retry_backoff": None,
    "spend_limits": None,
    "store_id": "demo-store",
    "workers_ai_billing_mode": "postpaid",
    "zdr": False,
}
_GATEWAY_ID: Final = re.compile(r"(?=.{1,64}\Z)[a-z0-9_]+(?:-[a-z0-9_]+)*")
_FAULT: Final = re.compile(
    r"status-(?P<status>\d{3})|code-(?P<code>\d{4,5})|slow-(?P<slow>\d{1,5})"
    r"|(?P<edge>edge)|(?P<reset>reset)|(?P<garbage>garbage)"
)
_NOUNS: Final = ("gateways", "provider_configs", "logs", "log", "tokens", "any")
_CODES: Final = {
    # code: (status, message)
    7001: (400, "Input Validation Error"),
    7002: (404, "Not found"),
    9106: (400, "Authentication failed (status: 400) [code: 9106]"),
    10000: (401, "Authentication error"),
}


class FaultError(Exception):
    """A fault that cannot be queued; the words say why."""


@dataclass(slots=True)
class _Fault:
    on: str
    match: re.Match[str]
    left: int | None
    after: int
    retry_after_s: int | None


class _Refused(Exception):
    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Management:
    """One account: its gateways with their provider keys, and one log for all of them."""

    def __init__(
        self, account: str, gateway: str, token: str, slugs: list[str], now: Callable[[], float]
    ) -> None:
        self.account = account
        self.tokens: dict[str, frozenset[str]] = {token: PERMISSIONS}
        """What each API token may do."""
        self.logs = Logs(now)
        self.gateways: dict[str, dict[str, Any]] = {}
        self.provider_configs: dict[str, list[dict[str, Any]]] = {}
        self.secrets: dict[str, str] = {}
        """The provider keys by the id of their configuration: never shown by the API."""
        self._faults: list[_Fault] = []
        self._first = (gateway, slugs)
        self._found()

    def _found(self) -> None:
        gateway, slugs = self._first
        self.gateways = {gateway: _settings(gateway, {"authentication": True})}
        self.provider_configs = {
            gateway: [self._config(gateway, slug, f"demo-key-of-{slug}") for slug in slugs]
        }

    def clear(self) -> None:
        """As it was at the start, tokens apart."""
        self._faults.clear()
        self.logs.clear()
        self.secrets.clear()
        self._found()

    def may(self, token: str, permission: str) -> bool:
        return permission in self.tokens.get(token, ())

    def has_key(self, gateway: str, slug: str) -> bool:
        """Whether a key is stored that calls use: of another alias none does."""
        wanted = (slug, "default")
        return any(
            (one["provider_slug"], one["alias"]) == wanted
            for one in self.provider_configs.get(gateway, ())
        )

    def fault(self, wish: Mapping[str, Any]) -> None:
        match = _FAULT.fullmatch(str(wish.get("fault", "")))
        on, count, after = wish.get("on", "any"), wish.get("count", 1), wish.get("after", 0)
        if match is None:
            raise FaultError(f"there is no management fault named {wish.get('fault')!r}")
        if on not in _NOUNS:
            raise FaultError(f"on must be one of {', '.join(_NOUNS)}")
        if not isinstance(count, int) or not isinstance(after, int) or min(count, after) < 0:
            raise FaultError("count and after are whole numbers")
        self._faults.append(_Fault(on, match, count or None, after, wish.get("retry_after_s")))

    # -- answering ---------------------------------------------------------------------------

    async def serve(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        parts = request.path.removeprefix(PREFIX).strip("/").split("/")
        try:
            if (early := await self._misbehave(request, _noun(parts))) is not None:
                return early
            return self._answer(request, parts, body)
        except _Refused as refused:
            return _refusal(refused)

    async def _misbehave(self, request: web.BaseRequest, noun: str) -> web.StreamResponse | None:
        for fault in self._faults:
            if fault.on not in ("any", noun):
                continue
            if fault.after:
                fault.after -= 1
                continue
            if fault.left is not None:
                fault.left -= 1
                if fault.left == 0:
                    self._faults.remove(fault)
            return await self._play(request, fault)
        return None

    async def _play(self, request: web.BaseRequest, fault: _Fault) -> web.StreamResponse | None:
        words = fault.match.groupdict()
        if words["slow"]:
            await asyncio.sleep(int(words["slow"]) / 1000)
            return None
        if words["reset"]:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError
        if words["edge"]:
            return web.Response(status=403, text="error code: 1010")
        if words["garbage"]:
            return web.Response(text="<html>Welcome</html>", content_type="text/html")
        if words["code"]:
            status, message = _CODES.get(int(words["code"]), (400, "Error"))
            raise _Refused(status, int(words["code"]), message)
        headers = {} if fault.retry_after_s is None else {"retry-after": str(fault.retry_after_s)}
        return web.Response(
            status=int(words["status"]), text="<html>Error</html>", headers=headers,
            content_type="text/html",
        )  # fmt: skip

    def _answer(
        self, request: web.BaseRequest, parts: list[str], body: bytes
    ) -> web.StreamResponse:
        token = self._known_token(request)
        match parts:
            case ["user" | "accounts", *_, "tokens", "verify"]:
                return _result({"id": "demo-token-id", "status": "active"})
            case ["accounts", account, "ai-gateway", "gateways", *rest] if account == self.account:
                permission = "read" if request.method == hdrs.METH_GET else "edit"
                if not self.may(token, permission):
                    raise _Refused(403, 10000, "Authentication error")
                return self._gateways(request, rest, body)
            case ["accounts", account, *_] if account != self.account:
                raise _Refused(403, 10000, "Authentication error")
        raise _Refused(404, 7003, "Could not route to the path given")

    def _known_token(self, request: web.BaseRequest) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _Refused(400, *_said(9106))
        if token not in self.tokens:
            raise _Refused(401, *_said(10000))
        return token

    def _gateways(
        self, request: web.BaseRequest, rest: list[str], body: bytes
    ) -> web.StreamResponse:
        match request.method, rest:
            case hdrs.METH_GET, []:
                return _listing(request, list(self.gateways.values()))
            case hdrs.METH_POST, []:
                return self._create(_object(body))
            case _, [gateway, *_] if gateway not in self.gateways:
                raise _Refused(404, *_said(7002))
            case hdrs.METH_GET, [gateway]:
                return _result(self.gateways[gateway])
            case hdrs.METH_PUT, [gateway]:
                wish = _object(body)
                _check(wish)
                self.gateways[gateway] = _settings(gateway, wish)
                return _result(self.gateways[gateway])
            case hdrs.METH_DELETE, [gateway]:
                self.provider_configs.pop(gateway, None)
                return _result(self.gateways.pop(gateway))
            case _, [gateway, "provider_configs", *more]:
                return self._configs(request, gateway, more, body)
            case hdrs.METH_GET, [_, "logs"]:
                return self._page(request)
            case hdrs.METH_GET, [_, "logs", log_id]:
                row = self.logs.find(log_id)
                if row is None:
                    raise _Refused(404, *_said(7002))
                return _result(row)
        raise _Refused(405, 10405, "Method not allowed for this path")

    def _create(self, wish: dict[str, Any]) -> web.StreamResponse:
        gateway = wish.get("id")
        if not isinstance(gateway, str) or not _GATEWAY_ID.fullmatch(gateway):
            raise _Refused(400, 7001, "id: Invalid")
        if gateway in self.gateways:
            raise _Refused(400, 7001, "id: a gateway with this id already exists")
        _check(wish)
        self.gateways[gateway] = _settings(gateway, wish)
        self.provider_configs[gateway] = []
        return _result(self.gateways[gateway])

    def _configs(
        self, request: web.BaseRequest, gateway: str, more: list[str], body: bytes
    ) -> web.StreamResponse:
        configs = self.provider_configs.setdefault(gateway, [])
        match request.method, more:
            case hdrs.METH_GET, []:
                return _listing(request, configs)
            case hdrs.METH_POST, []:
                wish = _object(body)
                if not self.gateways[gateway]["store_id"]:
                    raise _Refused(400, 7001, "store_id: the gateway has no Secrets Store")
                slug, secret = wish.get("provider_slug"), wish.get("secret")
                if not isinstance(slug, str) or not isinstance(secret, str) or not secret:
                    raise _Refused(400, 7001, "provider_slug, secret: Required")
                alias = wish.get("alias", "default")
                if any((c["provider_slug"], c["alias"]) == (slug, alias) for c in configs):
                    raise _Refused(400, 7001, "alias: this provider has a key with this alias")
                configs.append(self._config(gateway, slug, secret, alias))
                return _result(configs[-1])
            case ((hdrs.METH_PUT | hdrs.METH_DELETE), [config_id]):
                found = [one for one in configs if one["id"] == config_id]
                if not found:
                    raise _Refused(404, *_said(7002))
                if request.method == hdrs.METH_DELETE:
                    configs.remove(found[0])
                    self.secrets.pop(config_id, None)
                else:
                    secret = _object(body).get("secret")
                    if not isinstance(secret, str) or not secret:
                        raise _Refused(400, 7001, "secret: Required")
                    self.secrets[config_id] = secret
                    found[0]["secret_preview"] = f"...{secret[-4:]}"
                return _result(found[0])
        raise _Refused(405, 10405, "Method not allowed for this path")

    def _config(
        self, gateway: str, slug: str, secret: str, alias: str = "default"
    ) -> dict[str, Any]:
        config_id = str(uuid.uuid4())
        self.secrets[config_id] = secret
        return {
            "id": config_id,
            "gateway_id": gateway,
            "provider_slug": slug,
            "alias": alias,
            "default_config": alias == "default",
            "secret_id": f"{gateway}_{slug}_{alias}",
            "secret_preview": f"...{secret[-4:]}",
            "rate_limit": None,
            "rate_limit_period": None,
        }

    def _page(self, request: web.BaseRequest) -> web.StreamResponse:
        query = request.rel_url.query
        page, per_page = (
            _number(query, "page", 1),
            _number(query, "per_page", 20, MOST_PER_PAGE),
        )
        order_by = query.get("order_by", "created_at")
        direction = query.get("order_by_direction", "desc")
        if order_by not in ORDERS or direction not in ("asc", "desc"):
            raise _Refused(400, 7001, "order_by: Invalid")
        try:
            filters = orjson.loads(query.get("filters", "[]"))
            rows, total = self.logs.page(filters, order_by, direction == "desc", page, per_page)
        except (BadFilter, orjson.JSONDecodeError) as wrong:
            raise _Refused(400, 7001, f"filters: {wrong}") from None
        about = {"page": page, "per_page": per_page, "count": len(rows)}
        return _result(rows, {**about, "total_count": total} if self.logs.counted else about)


def _noun(parts: list[str]) -> str:
    match parts:
        case [_, _, "ai-gateway", "gateways", _, "logs", _]:
            return "log"
        case [_, _, "ai-gateway", "gateways", _, noun, *_]:
            return noun
        case [_, "tokens", *_]:
            return "tokens"
    return "gateways"


def _settings(gateway: str, wish: Mapping[str, Any]) -> dict[str, Any]:
    """A gateway as it is shown. What is not said has its default: an update replaces it whole."""
    settings: dict[str, Any] = {
        "id": gateway,
        "cache_invalidate_on_update": True,
        "cache_ttl": None,
        "collect_logs": True,
        "rate_limiting_interval": None,
        "rate_limiting_limit": None,
        **_OPTIONAL,
        "is_default": gateway == "default",
    }
    settings |= {name: value for name, value in wish.items() if name in settings}
    settings["id"] = gateway
    return settings


def _check(wish: Mapping[str, Any]) -> None:
    for name, kinds in _REQUIRED.items():
        if name not in wish:
            raise _Refused(400, 7001, f"{name}: Required")
        value = wish[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _Refused(400, 7001, f"{name}: Invalid")
    if wish["cache_ttl"] not in (None, 0) and not 60 <= wish["cache_ttl"] <= 2_592_000:
        raise _Refused(400, 7001, "cache_ttl: Invalid")
    if wish.get("retry_max_attempts") not in (None, 1, 2, 3, 4, 5):
        raise _Refused(400, 7001, "retry_max_attempts: Invalid")
    for name in wish.keys() - _REQUIRED.keys() - _OPTIONAL.keys() - {"id"}:
        raise _Refused(400, 7001, f"{name}: Unrecognized key")


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise _Refused(400, 7001, "the body must be a JSON object")
    return value


def _number(query: Mapping[str, str], name: str, default: int, most: int = 10**6) -> int:
    text = query.get(name, str(default))
    if not text.isdecimal() or not 0 < int(text) <= most:
        raise _Refused(400, 7001, f"{name}: Invalid")
    return int(text)


def _listing(request: web.BaseRequest, rows: list[dict[str, Any]]) -> web.StreamResponse:
    query = request.rel_url.query
    page, per_page = _number(query, "page", 1), _number(query, "per_page", 20, 100)
    chosen = rows[(page - 1) * per_page : page * per_page]
    info = {
        "page": page, "per_page": per_page, "count": len(chosen), "total_count": len(rows),
    }  # fmt: skip
    return _result(chosen, info)


def _result(value: Any, info: dict[str, int] | None = None) -> web.StreamResponse:
    body = {"success": True, "result": value, "errors": [], "messages": []}
    if info is not None:
        body["result_info"] = info
    return web.Response(body=orjson.dumps(body), content_type="application/json")


def _refusal(refused: _Refused) -> web.StreamResponse:
    errors = [{"code": refused.code, "message": refused.message}]
    body = {"success": False, "result": None, "errors": errors, "messages": []}
    return web.Response(
        status=refused.status, body=orjson.dumps(body), content_type="application/json"
    )


def _said(code: int) -> tuple[int, str]:
    return code, _CODES[code][1]
