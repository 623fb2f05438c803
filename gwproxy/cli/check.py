"""`gwproxy check-config`: what the configuration means, or all that is wrong with it.

Rule of the room: commands read the world (arguments, environment, files), print, and return an
exit code; what they print never has a secret in it.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import orjson

from gwproxy.cli.prices.table import configured
from gwproxy.config import Config, ConfigError, Model, Problem, Provider, find_config, load
from gwproxy.core.identity import Organization
from gwproxy.core.money import format_usd
from gwproxy.core.routing import CATALOGUE
from gwproxy.core.upstream_words import CHAT_PATHS
from gwproxy.parts import build_routes, terms
from gwproxy.storage import inspect
from gwproxy.storage.database import DatabaseRefused
from gwproxy.storage.directory import organizations

FINE = 0
WRONG_CONFIGURATION = 2


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "check-config",
        help="check the configuration and say what it means",
        description="Reads the configuration, the environment and the database, starts nothing, "
        "sends nothing.",
    )
    parser.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=check_config)


def check_config(args: argparse.Namespace) -> int:
    try:
        config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
    except ConfigError as error:
        if args.json:
            _print_json({"ok": False, "problems": [_problem(one) for one in error.problems]})
        else:
            print(error, file=sys.stderr)
        return WRONG_CONFIGURATION
    if args.json:
        _print_json(summary(config))
    else:
        print("\n".join(lines(config)))
    return FINE


def lines(config: Config) -> list[str]:
    """The configuration for people to read."""
    upstream, storage, limits = config.upstream, config.storage, config.limits
    rows = [
        ("configuration", str(config.file or "the environment alone")),
        ("listen", str(config.server.listen)),
        ("admin", str(config.admin.listen or "on the same listener")),
        ("bootstrap key", "set" if config.admin.key else "off (GWPROXY_ADMIN_KEY is not set)"),
        ("upstream", f"{upstream.root}{CHAT_PATHS[upstream.flavour]} ({upstream.flavour})"),
        ("upstream token", "set" if upstream.token else "none"),
    ]
    rows += [
        (f"provider {provider.name}", _provider_line(provider, upstream.root))
        for provider in config.providers.values()
    ]
    rows += [(f"model {model.name}", _chain_line(model)) for model in config.models.values()]
    rows += [
        (f"price {name}", f"{price.input} in, {price.output} out, USD per million tokens")
        for name, price in config.prices.models.items()
    ]
    rows += [
        (
            "breaker",
            f"opens after {config.breaker.failure_threshold} failures for "
            f"{config.breaker.open_timeout_ms} ms, closes after "
            f"{config.breaker.success_threshold} successes",
        ),
        (
            "patience",
            f"{_seconds(upstream.total_timeout_s)} s until an answer counts, over all attempts; "
            + f"a chain's last provider is asked {_times(upstream.retries)}; "
            + (
                f"at most {upstream.rpm_ceiling} requests a minute over all providers"
                if upstream.rpm_ceiling
                else "no ceiling over all providers"
            ),
        ),
        (
            "failure mode",
            f"{config.failure.mode}; open costs at most "
            f"${_dollars(config.failure.fallback_daily_limit_usd)} per organization and day",
        ),
        ("outage, at worst", _worst_case_line(config)),
        ("database", str(storage.path)),
        ("journal", f"{storage.journal} (synchronous = {storage.synchronous})"),
        (
            "backups",
            f"every {storage.backup_every_h} h, {storage.keep_backups} kept"
            if storage.backup_every_h
            else "off",
        ),
        (
            "archive",
            f"{storage.path}.archive, of what is older than {storage.keep_months} months"
            if storage.keep_months
            else "off",
        ),
        (
            "limits",
            f"body {limits.max_body_bytes} bytes, headers {limits.max_header_bytes} bytes, "
            f"{limits.max_connections} connections",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    text = [f"{name:<{width}}  {value}" for name, value in rows]
    text += [f"warning: {warning}" for warning in _warnings(config)]
    return [*text, "The configuration is fine."]


def summary(config: Config) -> dict[str, Any]:
    """The same for programs. Money is a decimal string, as everywhere."""
    upstream, storage, limits = config.upstream, config.storage, config.limits
    return {
        "ok": True,
        "file": str(config.file) if config.file else None,
        "listen": str(config.server.listen),
        "admin": {
            "listen": str(config.admin.listen) if config.admin.listen else None,
            "key_set": config.admin.key is not None,
        },
        "upstream": {
            "flavour": upstream.flavour,
            "chat_url": upstream.root + CHAT_PATHS[upstream.flavour],
            "token_set": upstream.token is not None,
            "total_timeout_s": upstream.total_timeout_s,
            "retries": upstream.retries,
            "rpm_ceiling": upstream.rpm_ceiling,
        },
        "breaker": {
            "failure_threshold": config.breaker.failure_threshold,
            "success_threshold": config.breaker.success_threshold,
            "open_timeout_ms": config.breaker.open_timeout_ms,
        },
        "providers": {
            provider.name: {
                "prefix": provider.prefix,
                "model": provider.model,
                "rpm": provider.rpm,
                "daily_usd": None if provider.daily_usd is None else format_usd(provider.daily_usd),
                "flavour": provider.flavour,
                "chat_url": provider.root + CHAT_PATHS[provider.flavour],
                "token_set": provider.token is not None,
            }
            for provider in config.providers.values()
        },
        "models": {
            model.name: [
                {"provider": entry.provider, "model": entry.model, "weight": entry.weight}
                for entry in model.chain
            ]
            for model in config.models.values()
        },
        "prices": {
            name: {"input": str(price.input), "output": str(price.output)}
            for name, price in config.prices.models.items()
        },
        "failure": {
            "mode": config.failure.mode,
            "fallback_daily_limit_usd": format_usd(config.failure.fallback_daily_limit_usd),
            "worst_case": _worst_case(config),
        },
        "storage": {
            "path": str(storage.path),
            "journal": str(storage.journal),
            "synchronous": storage.synchronous,
        },
        "limits": {
            "max_body_bytes": limits.max_body_bytes,
            "max_header_bytes": limits.max_header_bytes,
            "max_connections": limits.max_connections,
        },
        "warnings": _warnings(config),
    }


def _warnings(config: Config) -> list[str]:
    """What the configuration says of itself, and the candidates that nobody will ever ask."""
    prices = configured(config)
    routes = build_routes(config, prices)
    unpriced = [
        f"{candidate.provider.name}/{candidate.model} has no price and is passed over in "
        f'models.{name}: add [prices.models."{candidate.provider.prices}/{candidate.model}"]'
        for name in config.models
        for candidate in routes.resolve(name) or ()
        if prices.rate_of(candidate) is None
    ]
    return [*config.warnings, *unpriced]


def _provider_line(provider: Provider, root: str) -> str:
    words = [f"prefix {provider.prefix}"] if provider.prefix else []
    words.append(f"model {provider.model}" if provider.model else "no model of its own")
    if provider.rpm is not None:
        words.append(f"{provider.rpm} requests a minute")
    if provider.daily_usd is not None:
        words.append(f"${_dollars(provider.daily_usd)} a day")
    if provider.root != root:
        words.append(f"at {provider.root}{CHAT_PATHS[provider.flavour]} ({provider.flavour})")
        words.append("with a token" if provider.token else "without a token")
    return ", ".join(words)


def _worst_case(config: Config) -> dict[str, Any]:
    """What a day without the database can cost, by the organizations that are there now; or the
    reason why that is not known."""
    storage = config.storage
    unknown: str | None = None
    found: Sequence[Organization] = ()
    try:
        with inspect.tables(storage.path) as tables:
            found = asyncio.run(tables.run(organizations))
    except DatabaseRefused as error:
        if storage.path.exists():
            unknown = f"{str(error).rstrip('.')}; `gwproxy doctor` says more"
        elif storage.journal.exists():  # else there was never one, and so no organization
            unknown = (
                f"{storage.path} is gone, and the organizations stand in it. A server that runs "
                "tells of it in `GET /admin/health`; one that starts makes it anew from "
                f"{storage.journal}"
            )
    if unknown is not None:
        return {"organizations_served": None, "usd_per_day": None, "unknown": unknown}
    count, nanos = terms(config).worst_case(found)
    return {"organizations_served": count, "usd_per_day": format_usd(nanos), "unknown": None}


def _worst_case_line(config: Config) -> str:
    found = _worst_case(config)
    if found["unknown"] is not None:
        return f"not known: {found['unknown']}"
    if not config.storage.path.exists():
        return "nothing yet: there is no database, and so no organization"
    count = found["organizations_served"]
    dollars = _dollars_of(found["usd_per_day"])
    plural = "" if count == 1 else "s"
    return f"${dollars} a day, with {count} organization{plural} served open"


def _chain_line(model: Model) -> str:
    return " -> ".join(
        f"{entry.provider}/{entry.model}" + (f" (weight {entry.weight})" if entry.weight else "")
        for entry in model.chain
    )


def _times(retries: int) -> str:
    if not retries:
        return "once"
    return "once more" if retries == 1 else f"up to {retries} times more"


def _seconds(seconds: float) -> str:
    return f"{seconds:g}"


def _dollars(amount: int) -> str:
    return _dollars_of(format_usd(amount))


def _dollars_of(text: str) -> str:
    """Exact, with at least two decimals."""
    whole, _, fraction = text.partition(".")
    return f"{whole}.{fraction.rstrip('0'):0<2}"


def _problem(problem: Problem) -> dict[str, str]:
    return {
        "file": problem.file,
        "key": problem.key,
        "problem": problem.what,
        "cure": problem.cure,
    }


def _print_json(value: dict[str, Any]) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
