"""From the configuration's words to what the parts are made with: one function for each of them.

Rule of the room: the configuration goes in, values come out; nothing is opened, and no socket.
"""

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final, TypedDict

from gwproxy.admin.ask import Route
from gwproxy.admin.providers import Providers as ProviderPlane
from gwproxy.admin.routes import routes as admin_routes
from gwproxy.config import Config
from gwproxy.core import breaker as breakers
from gwproxy.core.identity import FailureMode
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE, OPENAI, Link, Provider, Routes, max_tokens_field
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.state.accounts import Accounts, Terms
from gwproxy.state.providers import Providers
from gwproxy.state.store import Kept, Store, Synchronous

PASSTHROUGH: Final = "upstream"
"""The provider's name where an OpenAI-compatible server takes model names as they come."""


def build_routes(config: Config, prices: PriceBook) -> Routes:
    """What resolution reads, from the providers and models of the configuration."""
    providers = {}
    for name, table in config.providers.items():
        if table.flavour == "openai":
            prefix = table.prefix or ""
        else:
            prefix = CATALOGUE.get(name, name) if table.prefix is None else table.prefix
        slug = CATALOGUE.get(prefix) or CATALOGUE.get(name) or prefix or name
        providers[name] = Provider(
            name,
            prefix,
            slug,
            model=table.model,
            max_tokens_field=table.max_tokens_field or max_tokens_field(slug),
            flavour=table.flavour,
        )
    aliases = {
        name: tuple(Link(entry.provider, entry.model, entry.weight) for entry in model.chain)
        for name, model in config.models.items()
    }
    as_openai = config.upstream.flavour == "openai"
    return Routes(
        providers,
        aliases,
        passthrough=Provider(PASSTHROUGH, "", "openai", flavour=OPENAI) if as_openai else None,
        serves_catalogue=not as_openai,
        flavour=config.upstream.flavour,
        catalogue={
            provider.prices: frozenset(prices.models(provider.prices))
            for provider in providers.values()
        },
    )


def build_providers(config: Config, store: Store, metrics: Metrics, log: Log) -> Providers:
    """How the providers stand, from what was recorded of them and what is configured."""
    return Providers(
        store.ledger,
        time.monotonic,
        **of_providers(config),
        draw=random.random,
        durable=store.durable,
        metrics=metrics,
        log=log,
    )


class OfProviders(TypedDict):
    names: Iterable[str]
    known: Iterable[str]
    terms: breakers.Terms
    rpm: Mapping[str, int]
    ceiling: int | None


def of_providers(config: Config) -> OfProviders:
    """What the configuration says about the providers' breakers and rates."""
    upstream, breaker = config.upstream, config.breaker
    as_openai = upstream.flavour == "openai"
    return {
        "names": [*config.providers, *([PASSTHROUGH] if as_openai else [])],
        "known": () if as_openai else CATALOGUE.values(),
        "terms": breakers.Terms(
            failure_threshold=breaker.failure_threshold,
            success_threshold=breaker.success_threshold,
            open_s=breaker.open_timeout_ms / 1000,
            probe_s=upstream.connect_timeout_s + upstream.first_byte_timeout_s,
        ),
        "rpm": {name: each.rpm for name, each in config.providers.items() if each.rpm is not None},
        "ceiling": upstream.rpm_ceiling,
    }


def admin_plane(config: Config, store: Store, log: Log) -> tuple[Route, ...]:
    """All that can be asked of the admin plane, for a command that has opened the store itself."""
    metrics = Metrics(frozenset(config.providers), frozenset())
    providers = build_providers(config, store, metrics, log)
    accounts = Accounts(store.keyring, terms(config))
    return admin_routes(store, ProviderPlane(providers, accounts, store.ledger, store.gateway_side))


def fixed(config: Config) -> dict[str, object]:
    """What cannot change while the process runs."""
    return {
        "[server] listen": config.server.listen,
        "[admin] listen": config.admin.listen,
        "[upstream] connect_timeout_s": config.upstream.connect_timeout_s,
        "[upstream] idle_connection_s": config.upstream.idle_connection_s,
        "[upstream] ca_file": config.upstream.ca_file,
        "[quota] alert_webhook": (config.quota.alert_webhook, config.quota.alert_webhook_secret),
        "[storage]": config.storage,
    }


def as_started(found: Config, started: Config) -> Config:
    """The configuration that was found, with what cannot change as it was at the start."""
    upstream = replace(
        found.upstream,
        connect_timeout_s=started.upstream.connect_timeout_s,
        idle_connection_s=started.upstream.idle_connection_s,
        ca_file=started.upstream.ca_file,
    )
    return replace(
        found,
        server=replace(found.server, listen=started.server.listen),
        admin=replace(found.admin, listen=started.admin.listen),
        upstream=upstream,
        quota=replace(
            found.quota,
            alert_webhook=started.quota.alert_webhook,
            alert_webhook_secret=started.quota.alert_webhook_secret,
        ),
        storage=started.storage,
    )


def kept(config: Config) -> Kept:
    """Where the configuration keeps things."""
    storage = config.storage
    return Kept(
        storage.path,
        storage.journal,
        Synchronous(storage.synchronous),
        storage.journal_segment_bytes,
        storage.journal_max_bytes,
        storage.backup_every_h,
        storage.keep_backups,
        storage.keep_months,
    )


def terms(config: Config) -> Terms:
    """What the configuration says about money."""
    return Terms(
        default_max_output_tokens=config.quota.default_max_output_tokens,
        provider_daily={
            name: provider.daily_usd
            for name, provider in config.providers.items()
            if provider.daily_usd is not None
        },
        failure_mode=FailureMode(config.failure.mode),
        outage_daily=config.failure.fallback_daily_limit_usd,
    )


def labels(routes: Routes, prices: PriceBook) -> tuple[frozenset[str], frozenset[str]]:
    """The providers and the models that may stand in a metric's labels."""
    providers = {PASSTHROUGH, *routes.providers}
    if routes.serves_catalogue:
        providers |= set(CATALOGUE.values())
    slugs = {provider.prices for provider in routes.providers.values()} | set(prices.providers())
    models = {model for slug in slugs for model in prices.models(slug)}
    return frozenset(providers), frozenset(models)
