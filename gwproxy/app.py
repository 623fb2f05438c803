"""The application: every part built once, started and stopped in order.

Owns the clocks, the randomness and the one task group; everybody else is handed them.
"""

import asyncio
import contextlib
import functools
import gc
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from aiohttp import web

from gwproxy import assets
from gwproxy.admin.auth import AdminAuth
from gwproxy.admin.bulk import Bulk, BulkHandler
from gwproxy.admin.health import Health
from gwproxy.admin.overview import Overview
from gwproxy.admin.process import Process
from gwproxy.admin.providers import Providers as ProviderPlane
from gwproxy.admin.routes import BODY_LIMIT_BYTES, over_http
from gwproxy.admin.routes import routes as admin_routes
from gwproxy.config import Config, ConfigError, Listen
from gwproxy.core.api import Api
from gwproxy.core.chat import ChatRequest
from gwproxy.core.embeddings import EmbeddingsRequest
from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.identity import FailureMode
from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.core.messages import MessagesRequest
from gwproxy.core.pricing import PriceBook
from gwproxy.core.responses import ResponsesRequest
from gwproxy.core.routing import REST
from gwproxy.core.tokens import ByteEstimate, Counter, choose_counter
from gwproxy.intake import Intake
from gwproxy.listener import Listener, request_ids
from gwproxy.log import Log, capture_libraries
from gwproxy.metrics import Metrics
from gwproxy.notify import Notify
from gwproxy.parts import (
    as_started,
    build_providers,
    build_routes,
    fixed,
    kept,
    labels,
    of_providers,
    terms,
)
from gwproxy.proxy.account import AccountHandler
from gwproxy.proxy.dispatch import Dispatch, Endpoint
from gwproxy.proxy.handler import ModelHandler, Parse
from gwproxy.proxy.models import ModelsHandler
from gwproxy.proxy.reply import Patience
from gwproxy.proxy.upstream import Upstream
from gwproxy.state import gauges
from gwproxy.state.accounts import Accounts
from gwproxy.state.books import Books
from gwproxy.state.learned import Notebook
from gwproxy.state.outage import Condition
from gwproxy.state.providers import Providers
from gwproxy.state.rates import Rates
from gwproxy.state.store import Store
from gwproxy.storage.database import HAS_WAL_RESET_BUG, SQLITE_VERSION
from gwproxy.web import Front, Route, Router
from gwproxy.webhook import Webhook

BACKLOG: Final = 4096
"""Connections that the kernel keeps while the loop is busy; it cuts this to its own limit."""

PARSERS: Final[Mapping[Api, Parse]] = {
    Api.CHAT: lambda raw, allowed, headers: ChatRequest.parse(raw, allowed),
    Api.EMBEDDINGS: lambda raw, allowed, headers: EmbeddingsRequest.parse(raw, allowed),
    Api.RESPONSES: lambda raw, allowed, headers: ResponsesRequest.parse(raw, allowed),
    Api.MESSAGES: lambda raw, allowed, headers: MessagesRequest.parse(
        raw, allowed, headers.get("anthropic-version"), headers.getall("anthropic-beta", ())
    ),
}
"""Each API that is served; but for the chat's, its route is /v1/ and its name."""

GIL_SWITCH_S: Final = 0.0005
"""With Python's default of 5 ms one busy thread (the log, SQLite) holds up every stream so long."""

KEY_USE_STORED_EVERY_S: Final = 60.0

LEARNED_SAVED_EVERY_S: Final = 300.0
"""What a killed process forgets of it is learned again in as long."""

LAST_WORDS_S: Final = 1.0
"""For streams that are ended to tell their clients so, and to settle."""

STOP_AT_MOST_S: Final = 20.0
"""What a stop may take beyond `drain_s`: last words, and the database taking what it lacks."""


class ListenFailed(OSError):
    """A listener that cannot open; the words name it and the cure."""


class App:
    """A running gateway: `async with await App.start(config, log)`; `addresses` are open."""

    def __init__(
        self,
        config: Config,
        log: Log,
        source: Callable[[], Config] | None,
        notify: Notify | None,
    ) -> None:
        self._source = source
        self._notify = notify
        self.config = config
        self.log = log
        self.draining = False
        self.addresses: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._cleanups: list[Callable[[], Awaitable[None] | None]] = []
        self._servers: list[asyncio.Server] = []
        self._handed_over: list[tuple[asyncio.Server, Listener]] = []
        """On sockets that are not ours: their clients wait in the kernel for the next process."""
        self._listeners: list[Listener] = []
        self._fronts: list[Front] = []
        self._providers: Providers | None = None
        self._reload_wanted = asyncio.Event()

    # -- building ----------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        config: Config,
        log: Log,
        counter: Counter | None = None,
        book: PriceBook | None = None,
        *,
        source: Callable[[], Config] | None = None,
        notify: Notify | None = None,
    ) -> "App":
        """`counter` and `book`, the prices without overrides, are for whoever starts several: to
        load the vocabulary and the table takes most of a second. `source` reads the configuration
        anew; `notify` is told when that begins and ends."""
        app = cls(config, log, source, notify)
        try:
            await app._build(counter or choose_counter(assets.ranks()), book)
        except BaseException:
            await app._clean_up()
            raise
        return app

    async def _build(self, counter: Counter, book: PriceBook | None) -> None:
        """All that lasts as long as the process."""
        config = self.config
        for warning in config.warnings:
            self.log.event("warning", "configuration", message=warning)
        if HAS_WAL_RESET_BUG:
            self.log.event(
                "info",
                "old SQLite: one writer keeps its WAL-reset bug (fixed in 3.51.3) out of reach",
                version=SQLITE_VERSION,
            )
        if config.admin.key is None:
            self.log.event("info", "admin key not set: the bootstrap key is off")
        self._book = book or PriceBook(assets.prices())
        metrics = self._metrics = Metrics()
        if isinstance(counter, ByteEstimate):
            metrics.tokenizer_fallback.value = 1
            self.log.event("error", "tokenizer failed: tokens are estimated", fault=counter.fault)

        self._group = group = asyncio.TaskGroup()
        await group.__aenter__()
        self._cleanups.append(self._end_background)
        store = self._store = await Store.open(kept(config), group, self.log)
        self._cleanups.append(store.close)
        self._cleanups.append(self._store_key_use)
        store.writer.committed = metrics.ledger_commit.observe

        self._upstream = self._open_upstream(metrics)
        lengths, factors = OutputLengths(), Factors()
        database = config.storage.path
        learned = database.with_name(f"{database.name}.learned")
        notebook = self._notebook = Notebook(learned, lengths, factors, self.log)
        notebook.load()
        self._cleanups.append(notebook.save)
        metrics.refresh.append(functools.partial(gauges.show_factors, metrics, factors))
        accounts = self._accounts = Accounts(store.keyring, terms(config))
        metrics.refresh.append(functools.partial(gauges.show_log, metrics, self.log))
        metrics.refresh.append(functools.partial(gauges.show_ledger, metrics, store, accounts))
        reconciled = functools.partial(gauges.show_reconciled, metrics, store.gateway_side)
        metrics.refresh.append(reconciled)
        rates = Rates(time.monotonic)
        store.lately.replay(rates, store.keyring, store.ledger.now_ms(), time.monotonic())
        self._books = Books(
            store.ledger,
            store.keyring,
            accounts,
            self._book,
            rates,
            lengths,
            factors,
            count=counter.count,
            durable=store.durable,
            outage=store.outage,
            metrics=metrics,
            log=self.log,
        )
        self._tell_alerts(store, self._books)
        public, admin = self._configured(config)
        ids = request_ids(secrets.token_hex(8))
        await self._listen(config.server.listen, public, ids, metrics)
        if config.admin.listen is not None:
            await self._listen(config.admin.listen, admin, ids, metrics)

    def _configured(self, config: Config) -> tuple[list[Route], list[Route]]:
        """What follows from the configuration, and may be made anew while requests are under way:
        the routes of the public listener, and those of the admin plane's own.

        Who is being served goes on with what he began with.
        """
        store, accounts, books, metrics = self._store, self._accounts, self._books, self._metrics
        keyring, ledger = store.keyring, store.ledger
        overrides = {name: price.row() for name, price in config.prices.models.items()}
        prices = self._book.with_overrides(overrides)
        routes = build_routes(config, prices)
        metrics.know(*labels(routes, prices))
        accounts.terms = terms(config)
        books.reprice(prices)
        if self._providers is None:
            self._providers = build_providers(config, store, metrics, self.log)
        else:
            self._providers.configure(**of_providers(config))
        providers = self._providers
        dispatch = self._build_dispatch(config, providers)
        intake = Intake(
            max_body_bytes=config.limits.max_body_bytes,
            body_timeout_s=config.limits.body_timeout_s,
        )
        calls = {
            api: ModelHandler(
                api,
                parse,
                keyring=keyring,
                intake=intake,
                routes=routes,
                prices=prices,
                books=books,
                dispatch=dispatch,
                providers=providers,
                metrics=metrics,
                clock=time.time,
            )
            for api, parse in PARSERS.items()
        }
        chat = calls[Api.CHAT]
        account = AccountHandler(
            keyring,
            accounts,
            ledger,
            store.outage,
            find=store.find_request,
            corrections=store.corrections_of,
            archived=lambda: store.archive.until,
            clock=time.time,
        )
        models = ModelsHandler(keyring, routes, prices, extra=config.prices.models, clock=time.time)
        auth = AdminAuth(
            config.admin.key.reveal() if config.admin.key else None,
            keyring,
            time.monotonic,
            time.time,
        )

        def condition() -> Condition:
            closed = accounts.terms.failure_mode is FailureMode.CLOSED
            return store.condition(draining=self.draining, closed=closed)

        health = Health(metrics, condition)
        public = [
            Route("POST", "/v1/chat/completions", chat.handle, "chat", traced=True),
            *(
                Route("POST", f"/v1/{api}", handler.handle, api, traced=True, api=api)
                for api, handler in calls.items()
                if api is not Api.CHAT
            ),
            Route("GET", "/v1/usage", account.usage, "usage", traced=True),
            Route("GET", "/v1/receipts/{request_id}", account.receipt, "usage", traced=True),
            Route("GET", "/v1/models", models.list, "models", traced=True),
            Route("GET", "/v1/models/{model_id:path}", models.show, "models", traced=True),
        ]
        if config.server.chat_alias:
            public.append(Route("POST", "/chat", chat.handle, "chat", traced=True))
        checks = [
            Route("GET", path, handler, "health")
            for path, handler in (
                ("/health", health.live),
                ("/health/live", health.live),
                ("/health/ready", health.ready),
            )
        ]

        def admins_only(request: web.BaseRequest) -> None:
            auth.check(request.headers, request.remote)

        small = Intake(max_body_bytes=BODY_LIMIT_BYTES, body_timeout_s=config.limits.body_timeout_s)
        admin = [
            Route(
                each.method,
                each.path,
                over_http(each, auth, small, store.directory.repeats),
                "admin",
                guard=admins_only,
                identified=True,
            )
            for each in admin_routes(
                store,
                ProviderPlane(providers, accounts, ledger, store.gateway_side),
                (
                    *Process(self.reload, store.back_up).routes(),
                    *Overview(store, metrics, condition).routes(),
                    *BulkHandler(Bulk(store), auth).routes(),
                ),
            )
        ]
        scrape_guard = None
        if config.admin.listen is None and not config.metrics.open:
            scrape_guard = admins_only
        scrape = Route("GET", "/metrics", health.metrics, "metrics", guard=scrape_guard)
        inside = [*checks, *admin, scrape]
        return [*public, *(inside if config.admin.listen is None else checks)], inside

    def _tell_alerts(self, store: Store, books: Books) -> None:
        quota = self.config.quota
        if quota.alert_webhook is None:
            return
        secret, database = quota.alert_webhook_secret, self.config.storage.path
        webhook = Webhook(
            quota.alert_webhook.reveal(),
            secret.reveal() if secret else None,
            database.with_name(f"{database.name}.alerts"),
            store.journal.ledger_id,
            stored=store.alerts_after,
            now_ms=store.ledger.now_ms,
            monotonic=time.monotonic,
            log=self.log,
        )
        books.alerted = webhook.add
        telling = self._group.create_task(webhook.run())
        self._cleanups.append(functools.partial(_ended, telling))

    def _open_upstream(self, metrics: Metrics) -> Upstream:
        config = self.config.upstream
        shortest_s = min(
            config.first_byte_timeout_s, config.answer_timeout_s, config.idle_timeout_s
        )
        ca_file = config.ca_file
        upstream = Upstream(
            self._loop,
            # Not the loop's own: uvloop's moves once a turn and in milliseconds.
            time.monotonic,
            connect_timeout_s=config.connect_timeout_s,
            idle_s=config.idle_connection_s,
            # Time-outs are found by looking: often enough to be late by a tenth at most.
            tick_s=min(0.5, max(0.02, shortest_s / 10)),
            ca_file=str(ca_file) if ca_file else None,
            late=metrics.loop_stall.observe,
        )
        self._cleanups.append(upstream.close)
        return upstream

    def _build_dispatch(self, config: Config, providers: Providers) -> Dispatch:
        upstream = self._upstream
        endpoints = {
            name: Endpoint.build(
                upstream,
                root=provider.root,
                flavour=provider.flavour,
                token=provider.token.reveal() if provider.token else None,
                gateway=config.upstream.gateway_id if provider.flavour == REST else None,
            )
            for name, provider in config.providers.items()
        }
        default = Endpoint.build(
            upstream,
            root=config.upstream.root,
            flavour=config.upstream.flavour,
            token=config.upstream.token.reveal() if config.upstream.token else None,
            gateway=config.upstream.gateway_id if config.upstream.flavour == REST else None,
        )
        patience = Patience(
            first_byte_s=config.upstream.first_byte_timeout_s,
            answer_s=config.upstream.answer_timeout_s,
            idle_s=config.upstream.idle_timeout_s,
            early_commit_s=config.upstream.early_commit_s,
            total_s=config.upstream.total_timeout_s,
        )
        return Dispatch(
            self._loop,
            time.monotonic,
            time.time,
            endpoints=endpoints,
            default=default,
            providers=providers,
            patience=patience,
            retries=config.upstream.retries,
            metrics=self._metrics,
            log=self.log,
        )

    async def _listen(
        self, where: Listen, routes: list[Route], ids: Callable[[], str], metrics: Metrics
    ) -> None:
        limits = self.config.limits
        front = Front(
            Router(routes),
            request_ids=ids,
            metrics=metrics,
            log=self.log,
            clock=time.monotonic,
            max_header_bytes=limits.max_header_bytes,
        )
        listener = Listener(
            front,
            loop=self._loop,
            max_connections=limits.max_connections,
            header_timeout_s=limits.header_timeout_s,
            keepalive_timeout_s=limits.keepalive_timeout_s,
            request_ids=ids,
        )
        self._cleanups.append(listener.stop_sweeping)
        try:
            server = await self._open_server(where, listener)
        except OSError as error:
            cure = "Stop whoever has it, or change [server] listen or [admin] listen."
            if where.kind == "fd":
                cure = "No socket was handed over: start gwproxy.socket, or listen on host:port."
            raise ListenFailed(
                f"cannot listen on {where}: {error.strerror or error}. {cure}"
            ) from error
        if where.kind == "fd":
            self._handed_over.append((server, listener))
        self._servers.append(server)
        self._cleanups.append(server.close)  # also when a later part does not start
        self._listeners.append(listener)
        self._fronts.append(front)
        for sock in server.sockets:
            self.addresses.append(_address(sock))

    async def _open_server(self, where: Listen, listener: Listener) -> asyncio.Server:
        if where.kind == "tcp":
            return await self._loop.create_server(listener, where.host, where.port, backlog=BACKLOG)
        if where.kind == "unix":
            _remove_socket(Path(where.path))
            return await self._loop.create_unix_server(listener, where.path, backlog=BACKLOG)
        inherited = socket.socket(fileno=where.fd)
        return await self._loop.create_server(listener, sock=inherited, backlog=BACKLOG)

    # -- running and stopping ----------------------------------------------------------------

    async def run(self, stopping: asyncio.Event) -> None:
        """Background work until `stopping` is set."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._keep_storing_key_use()),
                group.create_task(self._keep_saving()),
                group.create_task(self._keep_reloading()),
            ]
            await stopping.wait()
            for task in tasks:
                task.cancel()

    def ask_to_reload(self) -> None:
        """From a signal, which nobody waits for: what came of it is in the log."""
        self._reload_wanted.set()

    async def _keep_reloading(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            try:
                await self.reload()
            except ConfigError as error:
                self.log.event("error", "configuration not reloaded", message=str(error))

    async def _keep_storing_key_use(self) -> None:
        while True:
            await asyncio.sleep(KEY_USE_STORED_EVERY_S)
            await self._store_key_use()

    async def _keep_saving(self) -> None:
        while True:
            await asyncio.sleep(LEARNED_SAVED_EVERY_S)
            await self._notebook.save()

    async def _store_key_use(self) -> None:
        try:
            await self._store.store_key_use()
        except StorageUnavailable as error:
            # When keys were last used can wait; what serves requests is in memory.
            cause = type(error.__cause__).__name__ if error.__cause__ else None
            self.log.event("error", "storage unavailable", exception=cause)

    @property
    def status(self) -> str:
        """One line for whoever looks at the process from outside."""
        requests = sum(front.open_requests for front in self._fronts)
        words = f"{requests} request{'' if requests == 1 else 's'} open"
        if self._store.journal.lost is not None:
            words += ", journal lost"
        if self._store.lost:
            words += ", database lost"
        return words

    async def reload(self) -> list[str]:
        """Take the configuration as it is now, in one step; the settings that wait for a restart.

        ConfigError, and nothing has changed.
        """
        assert self._source is not None, "there is nowhere to read it from"
        if self._notify is not None:
            self._notify.reloading(time.monotonic())
        try:
            return await self._reload(self._source)
        finally:
            if self._notify is not None:
                self._notify.ready(self.status)

    async def _reload(self, source: Callable[[], Config]) -> list[str]:
        found = await asyncio.to_thread(source)
        config = as_started(found, self.config)
        waiting = [name for name, value in fixed(found).items() if value != fixed(config)[name]]
        public, admin = self._configured(config)
        for front, routes in zip(self._fronts, (public, admin), strict=False):
            front.router = Router(routes)
            front.max_header_bytes = config.limits.max_header_bytes
        for listener in self._listeners:
            listener.max_connections = config.limits.max_connections
            listener.header_timeout_s = config.limits.header_timeout_s
            listener.keepalive_timeout_s = config.limits.keepalive_timeout_s
        self.log.set_level(config.log.level)
        self.config = config
        for warning in config.warnings:
            self.log.event("warning", "configuration", message=warning)
        self.log.event("info", "configuration reloaded", needs_restart=waiting)
        return waiting

    async def stop(self) -> list[str]:
        """Refuse what is new, let streams finish for `drain_s`, end the rest and settle it.

        The ids of requests whose settlement could not be recorded: the next start settles them.
        """
        self.draining = True
        for front in self._fronts:
            front.drain()
        for server, listener in self._handed_over:
            server.close()
            listener.hand_over()
        await self._drained(self.config.server.drain_s)
        for server in self._servers:
            server.close()
        self._upstream.end_all()
        await self._drained(LAST_WORDS_S)
        for _, listener in self._handed_over:
            await listener.emptied()
        for listener in self._listeners:
            await listener.shutdown(0.5)
        await self._clean_up()
        return self._store.unsettled

    async def _drained(self, within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                for front in self._fronts:
                    await front.idle()

    async def _end_background(self) -> None:
        await self._group.__aexit__(None, None, None)

    async def _clean_up(self) -> None:
        while self._cleanups:
            result = self._cleanups.pop()()
            if result is not None:
                await result


async def serve(
    source: Callable[[], Config],
    config: Config,
    log: Log,
    announce: Callable[[list[str]], None],
    notify: Notify,
) -> list[str]:
    """Run until SIGTERM or SIGINT; `source` reads the configuration anew, on SIGHUP. `announce` is
    called with the addresses once they are open. See `App.stop` for what is returned.
    """
    capture_libraries(log)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    reload_early = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_early.set)
    app = await App.start(config, log, source=source, notify=notify)
    loop.add_signal_handler(signal.SIGHUP, app.ask_to_reload)
    if reload_early.is_set():
        app.ask_to_reload()
    # What was built so far lives as long as the process: the collector need not walk it again.
    gc.collect()
    gc.freeze()
    # A pass over 50,000 new objects, as an import makes them, took 11 ms. The older ones are walked
    # no more often for it: a hundred passes make a million, as twenty of 50,000 would.
    gc.set_threshold(10_000, 100, 20)
    sys.setswitchinterval(GIL_SWITCH_S)
    announce(app.addresses)
    log.event("info", "ready", addresses=app.addresses, pid=os.getpid())
    notify.ready(app.status)
    async with asyncio.TaskGroup() as group:
        beating = group.create_task(_keep_telling(notify, app))
        await app.run(stopping)
        drain_s = app.config.server.drain_s
        log.event("info", "stopping", drain_s=drain_s)
        notify.stopping(f"draining: {app.status}", drain_s + STOP_AT_MOST_S)
        unsettled = await app.stop()
        beating.cancel()
    if unsettled:
        log.event("error", "not settled: the next start does it", requests=unsettled)
    log.event("info", "stopped")
    return unsettled


async def _keep_telling(notify: Notify, app: App) -> None:
    """A loop that stands still cannot say that it is alive, and systemd starts another process."""
    while notify.every_s is not None:
        notify.alive(app.status)
        await asyncio.sleep(notify.every_s)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def _remove_socket(path: Path) -> None:
    """What a process that was killed has left behind; a database lock says that none runs."""
    if path.is_socket():
        path.unlink()


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"http://{host}:{name[1]}"
    return f"unix:{name}"
