"""`gwproxy providers`: how the providers stand, and whether they are asked at all.

A running server is asked over its admin API; without one its store is opened here, and what is
changed holds from its next start on.
"""

import argparse
from typing import Any

from gwproxy.cli.plane import (
    FINE,
    Ask,
    Call,
    common_arguments,
    family,
    runs,
)
from gwproxy.cli.printing import print_json, table

_ACTIONS = {
    "reset": "close a provider's breaker and forget its failures",
    "enable": "ask a provider again that was disabled",
    "disable": "leave a provider alone until it is enabled",
}


_WORDS = {
    "closed": "asked",
    "open": "left alone until it is tried again",
    "half_open": "asked by one request at a time",
    "disabled": "disabled",
}


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = common_arguments()
    words = "how providers stand: list, reset, enable, disable"
    providers = family(subparsers, "providers", words)
    listing = providers.add_parser("list", parents=[common], help="list them")
    listing.set_defaults(func=runs(_list))
    for action, words in _ACTIONS.items():
        parser = providers.add_parser(action, parents=[common], help=words)
        parser.add_argument("provider", metavar="NAME")
        parser.set_defaults(func=runs(_change), action=action)


async def _list(args: argparse.Namespace, call: Call) -> int:
    found = await call(Ask("GET", ("providers",)))
    if args.json:
        print_json(found)
    else:
        print("\n".join(table([_row(each) for each in found["data"]])))
    return FINE


async def _change(args: argparse.Namespace, call: Call) -> int:
    found = await call(Ask("POST", ("providers", args.provider, args.action)))
    if args.json:
        print_json(found)
    else:
        print(f"{found['provider']} is {_WORDS[found['state']]}")
    return FINE


def _row(provider: dict[str, Any]) -> dict[str, Any]:
    failed, latency_ms, limit = (
        provider[name] for name in ("failure_rate", "latency_ms", "daily_limit_usd")
    )
    spent = f"${_short(provider['day_usage_usd'])}"
    return {
        "provider": provider["provider"],
        "state": provider["state"],
        "tried_again_at": provider["retry_at"],
        "attempts": sum(provider["attempts"].values()),
        "failing": None if failed is None else f"{failed:.0%}",
        "latency": None if latency_ms is None else f"{latency_ms:g} ms",
        "rpm": provider["rpm"],
        "today": spent if limit is None else f"{spent} of ${_short(limit)}",
    }


def _short(usd: str) -> str:
    """As many decimals as say something, at least two."""
    whole, _, fraction = usd.partition(".")
    return f"{whole}.{fraction.rstrip('0'):0<2}"
