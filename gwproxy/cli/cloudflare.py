"""`gwproxy cloudflare`: the account's gateways and the provider keys that are stored there.

A provider key is read from the terminal or from stdin and goes to Cloudflare: it is never an
argument, never on the disk, never printed.
"""

import argparse
import asyncio
import getpass
import os
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from gwproxy.cli.cloudflare_account import NoAccount, account
from gwproxy.cli.printing import print_json, say, table
from gwproxy.cloudflare.api import DEFAULT_ALIAS, Api, Refused, served_slugs
from gwproxy.config import FAMILIES, Config, ConfigError, find_config, load
from gwproxy.core.routing import CATALOGUE

FINE: Final = 0
REFUSED: Final = 1
WRONG_USAGE: Final = 2
UNREACHABLE: Final = 3

Settings = dict[str, Any]

RECOMMENDED: Final[Mapping[str, Any]] = {
    "authentication": True,  # else whoever knows the address uses the stored keys
    "collect_logs": True,  # else nothing can be reconciled
    "cache_ttl": None,  # one tenant's answer is not another's
    "cache_invalidate_on_update": True,
    "retry_max_attempts": 1,  # else hidden attempts are billed
    "log_management_strategy": "DELETE_OLDEST",  # a full log would otherwise take no more
    "rate_limiting_interval": None,
    "rate_limiting_limit": None,
}
_UNSAID: Final[Mapping[str, Any]] = {"retry_max_attempts": 1}
"""What a setting amounts to that a gateway says nothing of."""
_REQUIRED: Final = (
    *("cache_invalidate_on_update", "cache_ttl", "collect_logs"),
    *("rate_limiting_interval", "rate_limiting_limit"),
)
_WRITABLE: Final = (
    *_REQUIRED,
    *("authentication", "byok_only", "dlp", "guardrails", "log_classification", "log_management"),
    *(
        "log_management_strategy",
        "logpush",
        "logpush_public_key",
        "otel",
        "rate_limiting_technique",
    ),
    *("retry_backoff", "retry_delay", "retry_max_attempts", "spend_limits", "store_id", "stripe"),
    *("workers_ai_billing_mode", "zdr"),
)
"""What an update may say. It replaces a gateway whole, so all of it is said again."""

_GATEWAY_ID: Final = re.compile(r"(?=.{1,64}\Z)[a-z0-9_]+(?:-[a-z0-9_]+)*")
_STORE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEY: Final = re.compile(r"[\x21-\x7e]{8,4096}")
_LONGEST_CACHE_S: Final = 30 * 86_400
_MOST_ATTEMPTS: Final = 5
_MOST_LOGS: Final = 10_000_000
"""What Cloudflare accepts: said here, before anything is asked or sent."""


class _Stop(Exception):
    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


Command = Callable[[argparse.Namespace, Config, Api, str], Awaitable[int]]

# -- the words of the command line -----------------------------------------------------------------


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--yes", action="store_true", help="do not ask before a change")
    on_gateway = argparse.ArgumentParser(add_help=False)
    on_gateway.add_argument("--gateway", metavar="ID", help="default: the configured one")

    family = subparsers.add_parser(
        "cloudflare", help="the account's gateways and provider keys"
    ).add_subparsers(metavar="COMMAND", required=True)

    setup = family.add_parser(
        "setup",
        parents=[common, on_gateway],
        help="make the gateway as it should be, store the keys it lacks",
        description="Makes the gateway, or changes what does not suit; asks for the provider keys "
        "that are missing; prints the lines to put into the configuration. May be run again.",
    )
    _add_store_id(setup)
    setup.set_defaults(func=_runs(_setup))

    gateways = family.add_parser("gateways", help="list, show, create, update, delete")
    verbs = gateways.add_subparsers(metavar="COMMAND", required=True)
    verbs.add_parser("list", parents=[common], help="list them").set_defaults(
        func=_runs(_list_gateways)
    )
    show = verbs.add_parser("show", parents=[common], help="all settings of one")
    show.add_argument("id", metavar="ID")
    show.set_defaults(func=_runs(_show_gateway))
    for verb, command in (("create", _create_gateway), ("update", _update_gateway)):
        parser = verbs.add_parser(verb, parents=[common], help=f"{verb} one")
        parser.add_argument("id", metavar="ID")
        _add_settings(parser)
        parser.set_defaults(func=_runs(command))
    delete = verbs.add_parser("delete", parents=[common], help="delete one, with its keys and log")
    delete.add_argument("id", metavar="ID")
    delete.set_defaults(func=_runs(_delete_gateway))

    keys = family.add_parser("keys", help="provider keys stored at Cloudflare: list, store, delete")
    verbs = keys.add_subparsers(metavar="COMMAND", required=True)
    verbs.add_parser("list", parents=[common, on_gateway], help="list them").set_defaults(
        func=_runs(_list_keys)
    )
    store = verbs.add_parser(
        "store", parents=[common, on_gateway], help="store a provider's key",
        description="Asks for the key, or reads it from stdin: pass show openai | gwproxy "
        "cloudflare keys store openai",
    )  # fmt: skip
    _add_provider(store)
    store.set_defaults(func=_runs(_store_key))
    delete = verbs.add_parser("delete", parents=[common, on_gateway], help="delete a stored key")
    _add_provider(delete)
    delete.set_defaults(func=_runs(_delete_key))

    rotate = family.add_parser(
        "rotate", parents=[common, on_gateway], help="put a new key in the place of a stored one",
        description="The next call uses the new key; nothing has to be restarted. Revoke the old "
        "one at the provider afterwards.",
    )  # fmt: skip
    _add_provider(rotate)
    rotate.set_defaults(func=_runs(_rotate))


def _add_provider(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("provider", metavar="PROVIDER", help='such as "openai" or "gemini"')
    parser.add_argument("--alias", default=DEFAULT_ALIAS, help="default: default")
    # Taken so that it can be refused without being printed.
    parser.add_argument("extra", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--key", "--secret", dest="key", help=argparse.SUPPRESS)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for option, words in (
        ("--authentication", "ask callers for a token"),
        ("--collect-logs", "keep a log of requests"),
        ("--byok-only", "never fall back on bought credit"),
    ):
        parser.add_argument(option, choices=["on", "off"], help=words)
    parser.add_argument(
        "--cache-ttl", type=_cache_ttl, metavar="SECONDS", help="60 to 2592000; 0: no cache"
    )
    parser.add_argument(
        "--retries", type=_retries, metavar="N", help="attempts of its own, 1 to 5; 1: none again"
    )
    parser.add_argument("--rate-limit", metavar="N/SECONDS", help='such as "1000/60"; "off"')
    parser.add_argument("--log-limit", type=_log_limit, metavar="N", help="how many logs are kept")
    parser.add_argument("--when-full", choices=["delete-oldest", "stop"], help="of the log")
    _add_store_id(parser)


def _add_store_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store-id", type=_store_id, metavar="ID", help="the Secrets Store that holds its keys"
    )


def _cache_ttl(text: str) -> int:
    if text.isdecimal() and (int(text) == 0 or 60 <= int(text) <= _LONGEST_CACHE_S):
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}: a gateway keeps answers for 60 to {_LONGEST_CACHE_S} seconds; 0 is no cache"
    )


def _retries(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= _MOST_ATTEMPTS:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}: a gateway makes 1 to {_MOST_ATTEMPTS} attempts; 1 is none after the first"
    )


def _log_limit(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= _MOST_LOGS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: a gateway keeps 1 to {_MOST_LOGS} logs")


def _store_id(text: str) -> str:
    if _STORE_ID.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is no id of a Secrets Store: copy it from the dashboard, under Secrets Store"
    )


# -- how a command runs ----------------------------------------------------------------------------


def _runs(command: Command) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        try:
            environ = dict(os.environ)
            if not any(environ.get(name) for name in FAMILIES["gateway_id"]):
                # Whoever is about to make the first one has none to name yet.
                environ[FAMILIES["gateway_id"][0]] = "default"
            config = load(find_config(args.config, environ), environ, catalogue=CATALOGUE)
            return asyncio.run(_with_account(args, config, command))
        except (ConfigError, NoAccount) as error:
            say(str(error))
            return WRONG_USAGE
        except _Stop as stop:
            say(str(stop))
            return stop.code
        except Refused as refused:
            say(f"{refused.fault.cause}.\ndo:   {refused.fault.cure}\nsee:  {refused.curl}")
            return UNREACHABLE if refused.fault.status == 0 else REFUSED

    return run


async def _with_account(args: argparse.Namespace, config: Config, command: Command) -> int:
    async with account(config) as (api, gateway, _):
        named = getattr(args, "gateway", None)
        if named is not None:
            _check_id(named)
        return await command(args, config, api, named or gateway)


def _confirm(args: argparse.Namespace, question: str, wanted: str = "y") -> None:
    """_Stop unless the answer is the one that is wanted."""
    if args.yes:
        return
    print(question, end=" ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != wanted:
        raise _Stop(REFUSED, "Nothing was changed.")


def _check_id(gateway: str) -> None:
    if not _GATEWAY_ID.fullmatch(gateway):
        raise _Stop(
            WRONG_USAGE, "A gateway's id has at most 64 of a-z, 0-9, _ and single dashes between."
        )


# -- gateways --------------------------------------------------------------------------------------


async def _list_gateways(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    rows = await api.gateways()
    if args.json:
        print_json({"data": rows})
        return FINE
    shown = [
        {
            "id": row["id"],
            "configured": row["id"] == gateway,
            "authentication": bool(row.get("authentication")),
            "logs": bool(row.get("collect_logs")),
            "cache_s": row.get("cache_ttl") or None,
            "rate_limit": _rate_limit(row),
        }
        for row in rows
    ]
    print("\n".join(table(shown)) or "There is none yet: gwproxy cloudflare setup")
    return FINE


async def _show_gateway(args: argparse.Namespace, config: Config, api: Api, _: str) -> int:
    _check_id(args.id)
    row = await api.gateway(args.id)
    if args.json:
        print_json(row)
        return FINE
    # Others than these may hold tokens of the operator's other systems.
    for name in ("id", *(name for name in _WRITABLE if name not in ("otel", "stripe"))):
        if name in row:
            print(f"{name:<28}  {_shown(row[name])}")
    return FINE


async def _create_gateway(args: argparse.Namespace, config: Config, api: Api, _: str) -> int:
    _check_id(args.id)
    if any(row["id"] == args.id for row in await api.gateways()):
        raise _Stop(
            REFUSED,
            f"There is a gateway {args.id} already. See it: gwproxy cloudflare gateways show "
            f"{args.id}; change it: gwproxy cloudflare gateways update {args.id} --help",
        )
    settings = {**RECOMMENDED, **_settings(args)}
    _print_settings(args, f"A new gateway {args.id}:", settings)
    _confirm(args, "Make it? [y/N]")
    row = await api.create_gateway({"id": args.id, **settings})
    _told(args, f"Made {args.id}.", row)
    return FINE


async def _update_gateway(args: argparse.Namespace, config: Config, api: Api, _: str) -> int:
    _check_id(args.id)
    wish = _settings(args)
    if not wish:
        raise _Stop(WRONG_USAGE, "Say what to change: gwproxy cloudflare gateways update --help")
    row = await api.gateway(args.id)
    changed = _differing(row, wish)
    if not changed:
        _told(args, f"{args.id} is like that already.", row)
        return FINE
    _print_changes(args, args.id, row, changed)
    _confirm(args, "Change it? [y/N]")
    _told(args, f"Changed {args.id}.", await api.replace_gateway(args.id, _whole(row, changed)))
    return FINE


async def _delete_gateway(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    _check_id(args.id)
    await api.gateway(args.id)
    if args.id == gateway:
        say(f"{args.id} is the one that the configuration names: its callers will be refused.")
    _confirm(args, f"Deleting {args.id} takes its keys and its log with it. Type its id:", args.id)
    await api.delete_gateway(args.id)
    _told(args, f"Deleted {args.id}.", {"id": args.id, "deleted": True})
    return FINE


def _settings(args: argparse.Namespace) -> Settings:
    """What the options ask for."""
    wish: Settings = {}
    for name in ("authentication", "collect_logs", "byok_only"):
        if (value := getattr(args, name)) is not None:
            wish[name] = value == "on"
    if args.cache_ttl is not None:
        wish["cache_ttl"] = args.cache_ttl or None
    if args.retries is not None:
        wish["retry_max_attempts"] = args.retries
    if args.rate_limit is not None:
        wish |= _read_rate_limit(args.rate_limit)
    if args.log_limit is not None:
        wish["log_management"] = args.log_limit
    if args.when_full is not None:
        stop = args.when_full == "stop"
        wish["log_management_strategy"] = "STOP_INSERTING" if stop else "DELETE_OLDEST"
    if args.store_id is not None:
        wish["store_id"] = args.store_id
    return wish


def _read_rate_limit(text: str) -> Settings:
    if text == "off":
        return {"rate_limiting_limit": None, "rate_limiting_interval": None}
    match = re.fullmatch(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,5})", text)
    if match is None:
        raise _Stop(WRONG_USAGE, '--rate-limit: write requests and seconds, as in "1000/60".')
    return {"rate_limiting_limit": int(match[1]), "rate_limiting_interval": int(match[2])}


def _rate_limit(row: Mapping[str, Any]) -> str | None:
    limit, interval = row.get("rate_limiting_limit"), row.get("rate_limiting_interval")
    return f"{limit}/{interval} s" if limit and interval else None


def _differing(row: Mapping[str, Any], wish: Mapping[str, Any]) -> Settings:
    """Of a wish what is not so yet; nothing, 0 and false are the same."""
    now = {name: row.get(name) or _UNSAID.get(name) for name in wish}
    return {
        name: value for name, value in wish.items() if now[name] != value and (now[name] or value)
    }


def _whole(row: Mapping[str, Any], changed: Mapping[str, Any]) -> Settings:
    """All that an update has to say: what is so now, and what changes."""
    kept = {
        name: row[name]
        for name in _WRITABLE
        if name in row and (row[name] is not None or name in _REQUIRED)
    }
    return {**dict.fromkeys(_REQUIRED), **kept, **changed}


def _print_settings(args: argparse.Namespace, head: str, settings: Mapping[str, Any]) -> None:
    if not args.json:
        print(head)
        for name, value in settings.items():
            print(f"  {name:<28}  {_shown(value)}")


def _print_changes(
    args: argparse.Namespace, gateway: str, row: Mapping[str, Any], changed: Mapping[str, Any]
) -> None:
    lines = {name: f"{_shown(row.get(name))} -> {_shown(value)}" for name, value in changed.items()}
    _print_settings(args, f"Of the gateway {gateway}:", lines)


def _shown(value: Any) -> str:
    if value is True:
        return "on"
    return "off" if value in (None, False) else str(value)


def _told(args: argparse.Namespace, words: str, row: Mapping[str, Any]) -> None:
    if args.json:
        print_json(dict(row))
    else:
        print(words)


# -- provider keys ---------------------------------------------------------------------------------


async def _list_keys(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    rows = await api.provider_keys(gateway)
    shown = [
        {
            "provider": row.get("provider_slug"),
            "alias": row.get("alias") or DEFAULT_ALIAS,
            "ends_in": row.get("secret_preview") or None,
        }
        for row in rows
    ]
    if args.json:
        print_json({"data": shown})
        return FINE
    print("\n".join(table(shown)) or f"No provider key is stored for {gateway}.")
    stored = served_slugs(rows)
    for slug in _wanted(config):
        if slug not in stored:
            say(f"missing: gwproxy cloudflare keys store {slug}")
    return FINE


async def _store_key(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    slug = _slug(args, config)
    if await _stored(api, gateway, slug, args.alias) is not None:
        raise _Stop(
            REFUSED,
            f"A key of {slug} is stored already. Replace it: gwproxy cloudflare rotate {slug}",
        )
    await api.store_key(gateway, slug, args.alias, _ask_key(slug))
    _told(args, f"Stored the key of {slug}. Try it: gwproxy doctor", {"provider": slug})
    return FINE


async def _rotate(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    slug = _slug(args, config)
    row = await _stored(api, gateway, slug, args.alias)
    if row is None:
        raise _Stop(
            REFUSED, f"No key of {slug} is stored yet: gwproxy cloudflare keys store {slug}"
        )
    await api.replace_key(gateway, row, _ask_key(slug))
    _told(
        args,
        f"The next call to {slug} uses the new key. Try it: gwproxy doctor. Then revoke the old "
        "one at the provider.",
        {"provider": slug},
    )
    return FINE


async def _delete_key(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    slug = _slug(args, config)
    row = await _stored(api, gateway, slug, args.alias)
    if row is None:
        raise _Stop(REFUSED, f"No key of {slug} is stored under the alias {args.alias}.")
    _confirm(args, f"Calls to {slug} will fail without it. Type the provider's name:", slug)
    await api.delete_key(gateway, str(row["id"]))
    _told(args, f"Deleted the key of {slug}.", {"provider": slug, "deleted": True})
    return FINE


async def _stored(api: Api, gateway: str, slug: str, alias: str) -> dict[str, Any] | None:
    for row in await api.provider_keys(gateway):
        if (row.get("provider_slug"), row.get("alias") or DEFAULT_ALIAS) == (slug, alias):
            return row
    return None


def _slug(args: argparse.Namespace, config: Config) -> str:
    """The gateway's name for a provider, by that name, a common one, or the configuration's."""
    if args.extra or args.key is not None:
        raise _Stop(
            WRONG_USAGE,
            "A key is not given on the command line, where the shell's history and every user of "
            "this machine can read it: it is asked for, or read from stdin. If that was a real "
            "key, make a new one at the provider.",
        )
    name: str = args.provider
    provider = config.providers.get(name)
    if provider is not None and provider.prefix:
        name = provider.prefix
    slug = CATALOGUE.get(name)
    if slug is not None:
        return slug
    if name.startswith("custom-"):
        raise _Stop(
            WRONG_USAGE, "A custom provider has its key in its own settings, in the dashboard."
        )
    known = ", ".join(sorted(set(CATALOGUE.values())))
    raise _Stop(WRONG_USAGE, f"That is no provider of the gateway. Known: {known}.")


def _ask_key(slug: str) -> str:
    if sys.stdin.isatty():
        key = getpass.getpass(f"Key of {slug} (not shown): ")
    else:
        key = sys.stdin.readline(1 << 16)
    key = key.strip()
    if (why := _no_key(slug, key)) is not None:
        raise _Stop(WRONG_USAGE, why)
    return key


def _no_key(slug: str, text: str) -> str | None:
    """Why it cannot be a provider's key; None: it can."""
    if not _KEY.fullmatch(text):
        return "That is no key: it has 8 to 4,096 characters, and no spaces. Nothing was stored."
    if text.startswith(("gw_live_", "gw_test_", "gw_admin_")):
        return f"That is a key of gwproxy's own, not one of {slug}. Nothing was stored."
    return None


def _wanted(config: Config) -> list[str]:
    """The configured providers whose keys the gateway needs."""
    slugs = []
    for provider in config.providers.values():
        slug = CATALOGUE.get(provider.prefix or provider.name)
        # Workers AI is the account's own; who has an address of his own asks no gateway.
        if slug not in (None, "workers-ai") and provider.flavour.startswith("cloudflare"):
            slugs.append(str(slug))
    return list(dict.fromkeys(slugs))


# -- setup -----------------------------------------------------------------------------------------


async def _setup(args: argparse.Namespace, config: Config, api: Api, gateway: str) -> int:
    existing = {str(row["id"]): row for row in await api.gateways()}
    wish = {**RECOMMENDED, **({} if args.store_id is None else {"store_id": args.store_id})}
    row = existing.get(gateway)
    if row is None:
        if existing and not args.json:
            print(f"There is no gateway {gateway} yet; there are: {', '.join(existing)}")
        _print_settings(args, f"A new gateway {gateway}:", wish)
        _confirm(args, "Make it? [y/N]")
        row = await api.create_gateway({"id": gateway, **wish})
    elif changed := _differing(row, wish):
        _print_changes(args, gateway, row, changed)
        _confirm(args, "Change it? [y/N]")
        row = await api.replace_gateway(gateway, _whole(row, changed))
    elif not args.json:
        print(f"The gateway {gateway} is as it should be.")
    if not row.get("store_id"):
        say(
            f"The gateway {gateway} has no Secrets Store for its keys. Make one in the dashboard, "
            "under Secrets Store, and say which: gwproxy cloudflare setup --store-id ID"
        )
    missing = await _store_missing(config, api, gateway)
    lines = _lines_to_paste(config, gateway)
    if args.json:
        print_json({"gateway": gateway, "keys_missing": missing, "env": lines})
    else:
        for slug in missing:
            print(f"No key of {slug} is stored: gwproxy cloudflare keys store {slug}")
        print("\nFor .env, as .env.example has it:\n")
        print("\n".join(f"  {line}" for line in lines))
        print("\nFor config.toml:\n")
        print("\n".join(f"  {line}" for line in _toml(config)))
        print("\nThen: gwproxy doctor")
    return REFUSED if missing else FINE


async def _store_missing(config: Config, api: Api, gateway: str) -> list[str]:
    """Ask whoever is there for the keys that are not: which are still missing."""
    stored = served_slugs(await api.provider_keys(gateway))
    missing = [slug for slug in _wanted(config) if slug not in stored]
    if not sys.stdin.isatty():
        return missing
    for slug in list(missing):
        while key := getpass.getpass(f"Key of {slug} (not shown; empty: later): ").strip():
            if (why := _no_key(slug, key)) is None:
                await api.store_key(gateway, slug, DEFAULT_ALIAS, key)
                missing.remove(slug)
                break
            say(why)
    return missing


def _toml(config: Config) -> tuple[str, ...]:
    flavour = config.upstream.flavour
    return (
        "[upstream]",
        f'flavour = "{flavour if flavour.startswith("cloudflare") else "cloudflare-compat"}"',
        'account_id = "env:CLOUDFLARE_ACCOUNT_ID"',
        'gateway_id = "env:CLOUDFLARE_GATEWAY_ID"',
        'token = "env:CLOUDFLARE_API_TOKEN"',
    )


def _lines_to_paste(config: Config, gateway: str) -> list[str]:
    return [
        f"CLOUDFLARE_ACCOUNT_ID={config.upstream.account_id}",
        f"CLOUDFLARE_GATEWAY_ID={gateway}",
        "CLOUDFLARE_API_TOKEN=       # a token that may only AI Gateway Run is enough to serve",
    ]
