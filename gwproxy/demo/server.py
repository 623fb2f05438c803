"""The demo upstream itself: where requests come in, who may ask, and how an answer is played.

Order of one request: the gateway's own refusals, then a script if one waits, then the faults in
the model name, then the provider's answer. Each request to a chat endpoint ends as one line in the
books, also when its client left.
"""

import asyncio
import ssl
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import orjson
from aiohttp import StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from . import control, play, providers, refusals
from .faults import Faults, UnknownFault, parse_text, split_model
from .management import PREFIX as MANAGEMENT
from .management import Management
from .native import (
    PATHS,
    Embeddings,
    Kind,
    Message,
    Response,
    as_chat,
    dressed,
    native_kind,
    rest_name,
    wants,
)
from .play import Ask, Flavour, Over, Streamed
from .providers import Answer, Dialect
from .record import Books, Served, metadata
from .refusals import Refusal
from .scripts import Scripts
from .speech import Wish, compose, prompt_tokens
from .wire import ClientLeft, Spoken, Wire

_BODY_LIMIT_BYTES: Final = 64 << 20
_STOP_WITHIN_S: Final = 1.0
_UNASKED: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nunasked-\n"
_DYNAMIC: Final = ("openai", "gpt-4o-mini")
_MODELS: Final = {
    "openai": ("gpt-4o-mini", "gpt-5-mini", "o3"),
    "anthropic": ("claude-sonnet-4-5", "claude-haiku-4-5"),
    "google-ai-studio": ("gemini-2.5-flash", "gemini-2.5-pro"),
    "workers-ai": ("@cf/meta/llama-3.3-70b-instruct-fp8-fast",),
    "groq": ("llama-3.3-70b-versatile",),
    "grok": ("grok-4",),
    "mistral": ("mistral-small-latest",),
    "deepseek": ("deepseek-chat", "deepseek-reasoner"),
    "mock": ("echo", "prose", "tool"),
}


_KEY_HEADERS: Final = ("authorization", "x-api-key", "api-key", "x-goog-api-key")


@dataclass(frozen=True, slots=True)
class Door:
    """By which way a request came in. `gateway` is None where there is none, "" for a strange one;
    `slug` is set where the path says the provider."""

    kind: Kind
    flavour: Flavour
    gateway: str | None
    slug: str = ""


class DemoUpstream:
    """An AI gateway on a port of its own, and the record of what it served."""

    def __init__(
        self,
        token: str = "demo-token",
        account: str = "demo",
        gateway: str = "demo",
        *,
        provider_keys: frozenset[str] = frozenset(),
        event_interval_ms: float = 0,
        record_file: Path | None = None,
        ssl_context: ssl.SSLContext | None = None,
        keepalive_s: float = 75,
    ) -> None:
        self.token = token
        self.account = account
        self.gateway = gateway
        self.port = 0
        self.host = ""
        self.event_interval_ms = event_interval_ms
        self.scripts = Scripts()
        self.management = Management(account, gateway, token, providers.slugs(), time.monotonic)
        """The account's other side: gateways, provider keys, tokens and the log."""
        self.stored: dict[str, dict[str, Any]] = {}
        """Responses by their id, those kept that were not asked to be forgotten."""
        self._provider_keys = provider_keys
        self._books = Books(record_file)
        self._ssl = ssl_context
        self._keepalive_s = keepalive_s
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._wires: set[Wire] = set()
        self._carried: dict[RequestHandler, int] = {}
        self._uses: dict[str, int] = {}
        self._numbers = count(1)
        self._stopping = False

    @property
    def record(self) -> list[dict[str, Any]]:
        """One line a request to a chat endpoint, in the order in which they ended."""
        return self._books.lines

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every request that came in, the control API's own left out, in order of arrival."""
        return self._books.requests

    @property
    def idle(self) -> bool:
        """No answer is being played: each one that was begun has its line in the record."""
        return not self._wires

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._ssl else 'http'}://{host}:{self.port}"

    @property
    def compat_url(self) -> str:
        return f"{self.url}/v1/{self.account}/{self.gateway}"

    @property
    def rest_url(self) -> str:
        return f"{self.url}/client/v4/accounts/{self.account}/ai/v1"

    @property
    def api_url(self) -> str:
        return self.url + MANAGEMENT.rstrip("/")

    async def recorded(self, count: int, timeout_s: float = 5) -> list[dict[str, Any]]:
        """The record, as soon as it has so many lines: a line is written when an answer ends."""
        await self._books.until(self.record, count, timeout_s)
        return self.record

    async def received(self, count: int, timeout_s: float = 5) -> list[dict[str, Any]]:
        """The requests, as soon as so many have arrived."""
        await self._books.until(self.requests, count, timeout_s)
        return self.requests

    def script(self, **wish: Any) -> int:
        """Puts a script in the queue, in the words of `scripts`; writes may be bytes here."""
        return self.scripts.add(wish).id

    def clear(self) -> None:
        """Forgets scripts, record, requests, log, what was changed of the gateways, and how often
        a fault was used. The file stays."""
        self.scripts.clear()
        self.management.clear()
        self.record.clear()
        self.requests.clear()
        self._uses.clear()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        loop = asyncio.get_running_loop()
        self._stopping = False
        self._books.open()

        def make_request(
            message: RawRequestMessage,
            payload: StreamReader,
            protocol: RequestHandler,
            writer: AbstractStreamWriter,
            task: "asyncio.Task[None]",
        ) -> web.BaseRequest:
            return web.BaseRequest(
                message, payload, protocol, writer, task, loop, client_max_size=_BODY_LIMIT_BYTES
            )

        self._server = web.Server(
            self._serve,
            request_factory=make_request,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=self._keepalive_s,
        )
        self._listener = await loop.create_server(
            self._server, host, port, ssl=self._ssl, backlog=4096
        )
        self.host, self.port = self._listener.sockets[0].getsockname()[:2]
        return self.port

    async def stop(self) -> None:
        self._stopping = True
        if self._listener is not None and self._server is not None:
            self._listener.close()
            # A stalled answer would sit out any grace period: its connection goes first.
            for wire in list(self._wires):
                wire.abort()
            self._server.pre_shutdown()
            await self._server.shutdown(_STOP_WITHIN_S)
            await self._listener.wait_closed()
            self._listener = self._server = None
        self._books.close()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if control.owns(request):
            return await control.serve(request, self)
        try:
            body = await request.read()
        except ConnectionError:
            return Spoken(reusable=False)
        headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in request.raw_headers]
        self._books.enter_request(request.method, request.raw_path, headers, body)
        if request.path.startswith(MANAGEMENT) and "/ai/v1/" not in request.path:
            return await self._manage(request, body)
        gateway: str | None = None
        match request.path.strip("/").split("/"):
            case ["v1", account, named, "compat", *what]:
                flavour, known = Flavour.COMPAT, account == self.account
                gateway = named
            case ["v1", account, named, slug, *path] if native_kind(slug, path) is not None:
                return await self._native(request, account, named, slug, path, body)
            case ["client", "v4", "accounts", account, "ai", "v1", *what]:
                flavour, known = Flavour.REST, account == self.account
                gateway = request.headers.get("cf-aig-gateway-id", self.gateway)
            case ["openai", "v1", *what] | ["v1", *what]:
                flavour, known = Flavour.OPENAI, True
            case _:
                return _plain(refusals.openai(404, "There is nothing here", None, None))
        match request.method, what:
            case hdrs.METH_GET, ["models"]:
                return self._models(request, flavour, gateway if known else "")
            case hdrs.METH_GET, ["responses", stored] if flavour is not Flavour.COMPAT:
                return self._stored(request, flavour, gateway, stored)
            case hdrs.METH_POST, _ if tuple(what) in _paths(flavour):
                door = Door(PATHS[tuple(what)], flavour, gateway if known else "")
                return await self._call(request, door, body)
            case _, ["models"] | ["chat", "completions"]:
                return _plain(refusals.openai(405, "Method not allowed", None, None))
        return _plain(refusals.openai(404, "There is nothing here", None, None))

    async def _native(
        self,
        request: web.BaseRequest,
        account: str,
        gateway: str,
        slug: str,
        path: list[str],
        body: bytes,
    ) -> web.StreamResponse:
        """A provider's own route behind the gateway: its own wire, and bare names for models."""
        kind = native_kind(slug, path)
        if kind is None or request.method != hdrs.METH_POST:
            return _plain(refusals.openai(404, "There is nothing here", None, None))
        known = gateway if account == self.account else ""
        return await self._call(request, Door(kind, Flavour.COMPAT, known, slug), body)

    def _stored(
        self, request: web.BaseRequest, flavour: Flavour, gateway: str | None, stored: str
    ) -> web.StreamResponse:
        """A response that was not asked to be forgotten, to whoever has the account's key."""
        refusal = self._stranger(request, flavour, gateway)
        if refusal is None and stored not in self.stored:
            refusal = refusals.openai(404, f"Response with id '{stored}' not found.", None, None)
        if refusal is not None:
            return _plain(refusal)
        body = orjson.dumps(self.stored[stored])
        return web.Response(body=body, content_type="application/json")

    async def _manage(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        try:
            return await self.management.serve(request, body)
        except ConnectionResetError:
            return Spoken(reusable=False)

    def _models(
        self, request: web.BaseRequest, flavour: Flavour, gateway: str | None
    ) -> web.StreamResponse:
        refusal = self._stranger(request, flavour, gateway)
        if refusal is not None:
            return _plain(refusal)
        data = [
            {"id": f"{slug}/{name}", "object": "model", "created": 0, "owned_by": slug}
            for slug, names in _MODELS.items()
            for name in names
        ]
        body = orjson.dumps({"object": "list", "data": data})
        return web.Response(body=body, content_type="application/json")

    def _stranger(
        self, request: web.BaseRequest, flavour: Flavour, gateway: str | None
    ) -> Refusal | None:
        """The refusal for whoever is not let in. `gateway` is None where there is none."""
        if self.management.may(_token(request.headers, flavour), "run") and gateway is None:
            return None
        if flavour is not Flavour.OPENAI:
            settings = self.management.gateways.get(gateway or "")
            if settings is None:
                return refusals.gateway(2001)
            if not settings["authentication"]:
                return None
            if self.management.may(_token(request.headers, flavour), "run"):
                return None
            return refusals.gateway(2009 if flavour is Flavour.COMPAT else 10000)
        return refusals.openai(401, "Incorrect API key provided", None, "invalid_api_key")

    async def _call(self, request: web.BaseRequest, door: Door, body: bytes) -> web.StreamResponse:
        flavour, gateway = door.flavour, door.gateway
        number = next(self._numbers)
        about = metadata(request.headers.get("cf-aig-metadata"))
        attempt = about.get("attempt", 1)
        served = Served(
            request_id=str(
                about.get("request_id") or request.headers.get("x-request-id") or f"demo-{number}"
            ),
            attempt=attempt if isinstance(attempt, int) else 1,
            user_id=_text(about.get("user_id")),
            org_id=_text(about.get("org_id")),
            key_id=_text(about.get("key_id")),
            log_id=str(uuid.uuid4()),
            began=time.time(),
        )
        try:
            wire = Wire(request)
        except ClientLeft:
            served.end = "client_left"
            self._books.enter(served)
            return Spoken(reusable=False)
        self._wires.add(wire)
        carried = self._count_request(request)
        refusal: Refusal | None = None
        try:
            refusal = self._stranger(request, flavour, gateway)
            if refusal is None:
                await self._answer(request, door, body, wire, served, carried)
            else:
                refusal = dressed(refusal, door.kind)
                await play.refuse(wire, served, refusal, _edge_headers(served))
        except Over as over:
            served.end = str(over)
        except ConnectionError:
            served.end = "client_left"
            wire.abort()
        except asyncio.CancelledError:
            served.end = "stopped" if self._stopping else "client_left"
            raise
        finally:
            self._wires.discard(wire)
            self._books.enter(served)
            if refusal is None and gateway is not None and served.provider is not None:
                self._log(request, gateway, served, about)
        return Spoken(wire.reusable)

    def _log(
        self, request: web.BaseRequest, gateway: str, served: Served, about: Mapping[str, Any]
    ) -> None:
        headers = request.headers
        settings = self.management.gateways.get(gateway)
        wanted = headers.get("cf-aig-collect-log")
        if settings is None or wanted == "false" or (not settings["collect_logs"] and not wanted):
            return
        custom_cost = headers.get("cf-aig-custom-cost")
        # What is behind the gateway's own address.
        path = request.path.strip("/").split("/", 3)[-1]
        self.management.logs.enter(served, about, custom_cost, path)

    def _count_request(self, request: web.BaseRequest) -> int:
        """How many requests this connection has carried before."""
        if len(self._carried) > 4096:
            self._carried = {p: n for p, n in self._carried.items() if p.transport is not None}
        before = self._carried.get(request.protocol, 0)
        self._carried[request.protocol] = before + 1
        return before

    async def _answer(
        self,
        request: web.BaseRequest,
        door: Door,
        raw: bytes,
        wire: Wire,
        served: Served,
        carried: int,
    ) -> None:
        flavour, gateway, kind = door.flavour, door.gateway, door.kind
        edge = _edge_headers(served)
        body = _json_object(raw)
        name = body.get("model") if body is not None else None
        if body is None or not isinstance(name, str) or not wants(kind, body):
            await play.refuse(wire, served, dressed(_bad_format(door), kind), edge)
            return
        served.requested, served.stream = name, body.get("stream") is True
        prefix, _, rest = name.partition("/")
        if door.slug:
            prefix, rest = door.slug, name
        elif flavour is Flavour.REST:
            found = rest_name(name)
            if found is None:
                await play.refuse(wire, served, refusals.gateway(7003), edge)
                return
            prefix, rest = found
        script = self.scripts.take(name, prefix if rest else None)
        try:
            base, faults = split_model(rest or name)
            faults = Faults(faults | parse_text(request.headers.get("x-demo-fault", "")))
            if script is not None and script.faults is not None:
                faults = Faults(faults | script.faults)
        except UnknownFault as unknown:
            wrong = refusals.openai(400, str(unknown), "model", "demo_unknown_fault")
            await play.refuse(wire, served, dressed(wrong, kind), edge)
            return
        manners = _provider(flavour, prefix, rest, name)
        # In the OpenAI flavour a slash may be part of the model's own name.
        slashed = bool(rest) and providers.dialect(prefix) is not None
        served.provider = manners.slug if manners else prefix if rest else None
        served.model = base if slashed or not rest else f"{prefix}/{base}"
        if prefix == "dynamic" and rest:
            served.model = _DYNAMIC[1]
        if script is not None and script.faults is None:
            await play.script(wire, served, script, self._headers(request, flavour, served, faults))
            return
        if manners is None:
            await play.refuse(wire, served, refusals.gateway(2008 if rest else 2019), edge)
            return
        if gateway is not None and not self._pays(request, gateway, manners.slug):
            await play.refuse(wire, served, refusals.gateway(2021), edge)
            return
        if "times" in faults:
            self._uses[name] = self._uses.get(name, 0) + 1
            if self._uses[name] > faults["times"]:
                faults = Faults()
        ask = Ask(
            kind=kind,
            flavour=flavour,
            headers=request.headers,
            body=as_chat(kind, body),
            asked=body,
            token=_token(request.headers, flavour),
            faults=faults,
            manners=manners,
            model=served.model or "",
            carried=carried,
        )
        served.cached = "cache-hit" in faults
        headers = self._headers(request, flavour, served, faults)
        await play.trouble_before_headers(ask, wire)
        wire.piece_bytes = faults.get("split", 0)
        refusal = self._refusal(ask)
        if refusal is not None:
            if refusal.edge:
                headers = [*edge, *_wished_headers(faults)]
            refusal = dressed(refusal, kind)
            await play.refuse(wire, served, refusal, headers, "gzip" in faults)
        elif "redirect" in faults:
            moved = Refusal(307, b"", refusals.TEXT)
            await play.refuse(wire, served, moved, [*headers, ("location", "/elsewhere")])
        else:
            answer = self._compose(ask, served)
            if ask.streams and "guardrails" not in faults and not isinstance(answer, Embeddings):
                pause_s = faults.get("slow", self.event_interval_ms) / 1000
                await play.stream(ask, answer, wire, served, headers, pause_s)
            else:
                await play.whole(ask, answer, wire, served, headers)
        if "extra-bytes" in faults:
            await wire.write(_UNASKED)
        if "close-idle" in faults:
            wire.close()

    def _pays(self, request: web.BaseRequest, gateway: str, slug: str) -> bool:
        """Whether somebody's key is there for the provider: the caller's, or a stored one. A custom
        provider needs none, and there is no credit to fall back on."""
        if slug.startswith("custom-") or "authorization" in request.headers:
            return True
        return self.management.has_key(gateway, slug)

    def _refusal(self, ask: Ask) -> Refusal | None:
        """The error that a fault or the provider itself gives instead of an answer."""
        faults, slug = ask.faults, ask.manners.slug
        if "garbage" in faults:
            return Refusal(200, refusals.page("Welcome", ask.note), refusals.HTML)
        if "bad-json" in faults:
            return Refusal(200, b'{"id":"chatcmpl-X","object":"chat.compl')
        if "code" in faults:
            if not refusals.known_code(faults["code"]):
                message = f"there is no gateway code {faults['code']}"
                return refusals.openai(400, message, "model", "demo_unknown_fault")
            return refusals.gateway(faults["code"], ask.note)
        if "status" in faults:
            return refusals.provider(slug, faults["status"], ask.note)
        later = {"error-event-after", "error-first"} & faults.keys()
        if "echo-token" in faults and not later:
            return refusals.provider(slug, 401, ask.note)
        keys = {ask.headers[name] for name in _KEY_HEADERS if name in ask.headers}
        # Whatever comes in these headers goes on to the provider, which knows its own keys only.
        if ask.flavour is Flavour.COMPAT and any(
            key.removeprefix("Bearer ") not in self._provider_keys for key in keys
        ):
            return refusals.provider(slug, 401)
        if ask.kind is Kind.MESSAGES and "anthropic-version" not in ask.headers:
            return refusals.openai(400, "anthropic-version: header is required", None, None)
        before = ask.asked.get("previous_response_id")
        if before is not None and before not in self.stored:
            message = f"Previous response with id '{before}' not found."
            return refusals.openai(400, message, "previous_response_id", None)
        complaint = providers.complaint(ask.manners, ask.model, ask.body)
        if complaint is not None:
            return refusals.openai(400, *complaint)
        return None

    def _headers(
        self, request: web.BaseRequest, flavour: Flavour, served: Served, faults: Faults
    ) -> list[tuple[str, str]]:
        """What comes with an answer that got as far as the provider."""
        headers = _edge_headers(served)
        if flavour is not Flavour.OPENAI:
            headers += [
                ("cf-aig-log-id", served.log_id),
                ("cf-aig-request-id", served.log_id),
                ("cf-aig-step", "0"),
                ("cf-aig-cache-status", "HIT" if "cache-hit" in faults else "MISS"),
            ]
            if "cf-aig-event-id" in request.headers:
                headers.append(("cf-aig-event-id", request.headers["cf-aig-event-id"]))
            if (served.requested or "").startswith("dynamic/"):
                headers += [("cf-aig-provider", _DYNAMIC[0]), ("cf-aig-model", _DYNAMIC[1])]
        headers.append(("x-request-id", f"req_{served.log_id.replace('-', '')}"))
        if served.provider == "openai":
            headers += [
                ("openai-organization", "demo"),
                ("openai-processing-ms", "12"),
                ("openai-version", "2020-10-01"),
                ("x-ratelimit-limit-requests", "10000"),
                ("x-ratelimit-limit-tokens", "2000000"),
                ("x-ratelimit-remaining-requests", "9999"),
                ("x-ratelimit-remaining-tokens", "1999000"),
                ("x-ratelimit-reset-requests", "6ms"),
                ("x-ratelimit-reset-tokens", "30ms"),
            ]
        return headers + _wished_headers(faults)

    def _compose(self, ask: Ask, served: Served) -> Streamed | Embeddings:
        faults, manners = ask.faults, ask.manners
        mode = "none" if "no-usage" in faults else "bad" if "usage-bad" in faults else "true"
        if ask.kind is Kind.EMBEDDINGS:
            return Embeddings(ask.model, ask.asked, mode)
        cached = faults.get("cached", providers.default_cached(manners, prompt_tokens(ask.body)))
        caches = manners.caches or ask.kind is not Kind.CHAT
        speech = compose(
            ask.model,
            ask.body,
            Wish(
                length=faults.get("len"),
                ignore_max="ignore-max" in faults,
                reasoning=faults.get("reasoning", providers.default_reasoning(manners, ask.model)),
                cached=cached if caches else 0,
                cache_write=faults.get("cache-write", 0) if caches else 0,
                burst_bytes=faults.get("huge-event", 0),
            ),
        )
        options = ask.body.get("stream_options")
        options = options if isinstance(options, dict) else {}
        number, finishes = served.log_id.replace("-", ""), "no-finish" not in faults
        if ask.kind is Kind.MESSAGES:
            return Message(speech, f"msg_{number}", ask.model, finishes, mode)
        if ask.kind is Kind.RESPONSES:
            created = int(time.time())
            name = f"resp_{number}"
            response = Response(speech, name, created, ask.model, ask.asked, finishes, mode)
            if ask.asked.get("store") is not False:
                self.stored[name] = response.whole()
            return response
        return Answer(
            manners=manners,
            speech=speech,
            id=f"chatcmpl-{number}",
            created=int(time.time()),
            model=ask.model,
            asked_usage=options.get("include_usage") is True,
            padded=options.get("include_obfuscation") is not False,
            finishes=finishes,
            usage_mode=mode,
        )


def _token(headers: Mapping[str, str], flavour: Flavour) -> str:
    name = "cf-aig-authorization" if flavour is Flavour.COMPAT else "authorization"
    scheme, _, token = headers.get(name, "").partition(" ")
    if flavour is Flavour.OPENAI and not scheme:
        return headers.get("x-api-key", "")
    return token if scheme.lower() == "bearer" else ""


def _paths(flavour: Flavour) -> Iterable[tuple[str, ...]]:
    """What there is besides the providers' own routes; the compat endpoint has chat alone."""
    return [("chat", "completions")] if flavour is Flavour.COMPAT else PATHS


def _provider(flavour: Flavour, prefix: str, rest: str, name: str) -> Dialect | None:
    """Whose manners the answer has. A plain server knows any name; a gateway knows its prefixes."""
    if prefix == "dynamic" and rest:
        return providers.dialect(_DYNAMIC[0])
    known = providers.dialect(prefix) if rest else None
    if known is None and flavour is Flavour.OPENAI:
        return providers.dialect("openai")
    return known


def _bad_format(door: Door) -> Refusal:
    if door.flavour is Flavour.COMPAT and not door.slug:
        return refusals.gateway(2019)
    return refusals.openai(400, "model and messages are required in a JSON object", None, None)


def _edge_headers(served: Served) -> list[tuple[str, str]]:
    """What the network in front of the gateway puts on everything."""
    return [("server", "cloudflare"), ("cf-ray", f"{served.log_id.replace('-', '')[:16]}-FRA")]


def _wished_headers(faults: Faults) -> list[tuple[str, str]]:
    headers = []
    if "retry-after" in faults:
        headers.append(("retry-after", str(faults["retry-after"])))
    if "set-cookie" in faults:
        headers += [
            ("set-cookie", "__cf_bm=demo; path=/; HttpOnly; Secure"),
            ("set-cookie", "_cfuvid=demo; path=/; HttpOnly; Secure"),
        ]
    if "header-bytes" in faults:
        headers.append(("x-demo-filling", "f" * faults["header-bytes"]))
    return headers


def _plain(refusal: Refusal) -> web.StreamResponse:
    return web.Response(
        status=refusal.status, body=refusal.body, headers={"content-type": refusal.content_type}
    )


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)
