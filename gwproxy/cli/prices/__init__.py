"""`gwproxy prices`: look into the price table, override it, and compile the one that is shipped.

This file has the command line; each command has a file of its own.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from gwproxy import assets
from gwproxy.cli.prices.build import build_table
from gwproxy.cli.prices.diff import diff_tables
from gwproxy.cli.prices.look import list_prices, show_price
from gwproxy.cli.prices.override import set_price
from gwproxy.cli.prices.table import BUILT_IN, CONFIGURED, WRONG_USAGE, Refused
from gwproxy.config import ConfigError
from gwproxy.core.money import parse_rate


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `prices` with its commands; each sets `func(args) -> exit code`."""
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    config = argparse.ArgumentParser(add_help=False, parents=[as_json])
    config.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    moment = argparse.ArgumentParser(add_help=False)
    moment.add_argument("--at", type=_moment, help="as of this date or time in UTC (default: now)")

    prices = subparsers.add_parser(
        "prices", help="what models cost: list, show, set, diff; build the table"
    )
    commands = prices.add_subparsers(metavar="COMMAND", required=True)

    listing = commands.add_parser(
        "list", parents=[config, moment], help="the priced models and what they cost"
    )
    listing.add_argument("--provider", help="only this one")
    listing.set_defaults(func=_runs(list_prices))

    show = commands.add_parser(
        "show", parents=[config, moment], help="one model: its prices, tiers, dates and limits"
    )
    show.add_argument("model", metavar="PROVIDER/MODEL")
    show.set_defaults(func=_runs(show_price))

    override = commands.add_parser(
        "set",
        parents=[config],
        help="override a model's price in the configuration file",
        description="Writes one table of the configuration file, and nothing else in it. It "
        "replaces the model's whole price: what is left out here is left out there. Prices are in "
        "USD per million tokens.",
    )
    override.add_argument("model", metavar="NAME", help='"provider/model", or "provider/*" for all')
    override.add_argument("--input", type=_usd, metavar="USD", help="fresh input")
    override.add_argument("--output", type=_usd, metavar="USD", help="output, reasoning included")
    override.add_argument(
        "--cache-read", type=_usd, metavar="USD", help="input read from a cache; default: as input"
    )
    override.add_argument(
        "--cache-write", type=_usd, metavar="USD", help="input written to one; default: as input"
    )
    override.add_argument(
        "--max-output-tokens", type=int, metavar="N", help="where the built-in table knows none"
    )
    override.add_argument(
        "--reasons", action="store_true", help="the model reasons out of sight, and bills it"
    )
    override.add_argument("--unset", action="store_true", help="take the override out again")
    override.set_defaults(func=_runs(set_price))

    diff = commands.add_parser(
        "diff",
        parents=[config],
        help="what differs between two price tables",
        description="OLD and NEW are each a file that `prices build` made, "
        f'"{BUILT_IN}" (the shipped table), or "{CONFIGURED}" (the shipped table under the '
        "configuration's overrides). Exits with 0 where they agree and 1 where they do not.",
    )
    diff.add_argument(
        "old", metavar="OLD", nargs="?", default=BUILT_IN, help=f"default: {BUILT_IN}"
    )
    diff.add_argument(
        "new", metavar="NEW", nargs="?", default=CONFIGURED, help=f"default: {CONFIGURED}"
    )
    diff.set_defaults(func=_runs(diff_tables))

    build = commands.add_parser(
        "build", parents=[as_json], help="compile the table from the installed genai-prices"
    )
    build.add_argument("--out", type=Path, help="where to write it (default: into the package)")
    build.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the table is out of date"
    )
    build.set_defaults(func=build_table)


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a date such as 2026-01-31 or 2026-01-31T12:00"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _usd(text: str) -> Decimal:
    try:
        parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price: it {error}") from None
    return Decimal(text)


def _runs(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except (assets.AssetError, ConfigError, Refused) as error:
            print(error, file=sys.stderr)
            return WRONG_USAGE

    return run
