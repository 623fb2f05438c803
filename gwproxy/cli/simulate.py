"""`gwproxy simulate`: what other limits, prices or providers would have made of the same calls."""

import argparse
import asyncio
import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import orjson

from gwproxy import assets
from gwproxy.cli.printing import print_json, say, table
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.money import format_rate, format_usd, parse_rate, parse_usd
from gwproxy.core.period import rfc3339, start_ms
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE, Routes
from gwproxy.core.simulate import Call, Outcome, Price, Scenario, example, simulate
from gwproxy.core.usage import Usage
from gwproxy.parts import build_routes
from gwproxy.storage import inspect, reports
from gwproxy.storage.database import DatabaseRefused

FINE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2

_EXAMPLE_FAILOVER: Final = Fraction(1, 20)
"""The five per cent that a team should reckon with."""


_MOST: Final = 10
"""Limits that are named one by one."""


class _Wrong(Exception):
    """An argument or a file that cannot be used; the words name it and the cure."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="what other limits, prices or providers would have made of the calls there were",
        description="Goes through the calls of a month, of a file, or of an example (100 issues a "
        "month, 1,000 tokens in and 500 out, one in twenty failing over), and changes nothing. "
        "What was charged a hold, an estimate or a correction stays as charged, and is scaled "
        "where its price or provider changes.",
    )
    parser.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--month", metavar="M", help='calls of the ledger, such as "2026-11"')
    which.add_argument("--file", type=Path, metavar="USAGE", help="JSON lines or CSV")
    which.add_argument("--example", action="store_true", help="the example; the default")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="ACCOUNT=USD",
        help='a month\'s: "user:alice=5", "org:acme=100", or "user=5" for each; may be repeated',
    )  # fmt: skip
    parser.add_argument(
        "--price", action="append", default=[], metavar="MODEL=IN,OUT",
        help='USD per million tokens: "openai/gpt-4o-mini=0.2,0.8"; may be repeated',
    )  # fmt: skip
    parser.add_argument("--prices", type=Path, metavar="FILE", help="another compiled price table")
    parser.add_argument(
        "--chain", metavar="MODELS", help='"gemini/gemini-2.5-flash,openai/gpt-4o-mini", or "auto"'
    )
    parser.add_argument("--failover", metavar="PERCENT", help="of the chain's calls; default: 0")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    try:
        config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
        stands, book = _book(config), _book(config, args)
        routes = build_routes(config, book)
        of_example = args.month is None and args.file is None
        scenario = Scenario(
            _limits(args.limit),
            _chain(routes, args.chain or ("auto" if of_example else "")),
            _failover(args.failover, _EXAMPLE_FAILOVER if of_example else Fraction(0)),
        )
        if args.failover is not None and scenario.failover and len(scenario.chain) < 2:
            raise _Wrong(
                "--failover: there is nothing to go on to. Name two models or more: "
                "--chain gemini/gemini-2.5-flash,openai/gpt-4o-mini"
            )
        asked: set[str] = set()
        price = _price(routes, book, asked)
        standing = _price(routes, stands, set())
        outcome = _run(args, config, scenario, price, standing)
    except (ConfigError, _Wrong) as error:
        say(str(error))
        return WRONG_USAGE
    except DatabaseRefused as error:
        say(str(error))
        return FAILED
    _tell(args, outcome, charged=args.month is not None)
    for words in _without_effect(args, scenario, outcome, book, asked):
        say(words)
    return FINE


def _run(
    args: argparse.Namespace, config: Config, scenario: Scenario, price: Price, standing: Price
) -> Outcome:
    if args.file is not None:
        return simulate(_of_file(args.file), scenario, price, standing)
    if args.month is None:
        today = datetime.now(UTC)
        start = int(datetime(today.year, today.month, 1, tzinfo=UTC).timestamp()) * 1000
        return simulate(example(start, scenario.chain), scenario, price, standing)
    try:
        start_ms(args.month)
    except ValueError:
        raise _Wrong(f'--month: write a month such as "2026-11", not {args.month!r}.') from None
    with inspect.tables(config.storage.path) as tables:
        return asyncio.run(
            tables.run(
                lambda c: simulate(
                    _of_month(reports.as_charged(c, args.month)), scenario, price, standing
                )
            )
        )


# -- the calls -------------------------------------------------------------------------------------


def _of_month(charged: Iterable[reports.AsCharged]) -> Iterator[Call]:
    for each in charged:
        found = each.request
        if found.cost or each.added:
            who = (found.user_id, found.org_id, found.key_id)
            place = (found.provider, found.upstream_model)
            yield Call(found.t, *who, *place, Usage(*found.tokens), each.cost, each.by_tokens)


def _of_file(path: Path) -> Iterator[Call]:
    """Rows with model, input and output tokens; time, user, organization and key where they are
    known. In the order of the file."""
    number = 0
    try:
        with path.open(newline="") as stream:
            json_lines = path.suffix in (".json", ".jsonl", ".ndjson")
            rows: Iterable[Mapping[str, Any]] = (
                map(orjson.loads, filter(str.strip, stream))
                if json_lines
                else csv.DictReader(stream)
            )
            for number, row in enumerate(rows, 1):
                yield _call(row, number)
    except OSError as error:
        raise _Wrong(f"{path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Wrong(
            f"{path}: row {number + 1 if isinstance(error, orjson.JSONDecodeError) else number}: "
            "needs model (as in openai/gpt-4o-mini), input_tokens and output_tokens; may have "
            "created_at, user_id, org_id, key_id, cost_usd."
        ) from error
    if not number:
        raise _Wrong(f"{path} has no rows.")


def _call(row: Mapping[str, Any], number: int) -> Call:
    if "request_count" in row:
        raise _Wrong(
            f"row {number} is a sum of many requests (it has a request_count): limits and prices "
            "are of single ones. Use --month, or a file with a row for each request."
        )
    provider, slash, model = str(row["model"]).partition("/")
    if not slash:
        provider, model = str(row["provider"]), provider
    tokens = [int(row.get(name) or row[other]) for name, other in _TOKENS]
    if min(tokens) < 0:
        raise ValueError("fewer tokens than none")
    made = row.get("created_at")
    moment = datetime.fromisoformat(str(made)) if made else datetime.fromtimestamp(number, UTC)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    cost = row.get("cost_usd")
    return Call(
        int(moment.timestamp() * 1000),
        str(row.get("user_id") or "-"),
        str(row.get("org_id") or "-"),
        str(row.get("key_id") or "-"),
        provider,
        model,
        Usage(input=tokens[0], output=tokens[1]),
        parse_usd(str(cost)) if cost not in (None, "") else None,
    )


_TOKENS: Final = (("input_tokens", "tokens_in"), ("output_tokens", "tokens_out"))

# -- what is different -----------------------------------------------------------------------------


def _limits(written: Iterable[str]) -> dict[str, int]:
    limits = {}
    for text in written:
        account, equals, amount = text.rpartition("=")
        kind = account.partition(":")[0]
        try:
            if not equals or kind not in ("key", "user", "org"):
                raise ValueError
            limits[account] = int(parse_usd(amount))
        except ValueError:
            raise _Wrong(
                f'--limit: write "user:alice=5", "org:acme=100" or "user=5", not {text!r}.'
            ) from None
    return limits


def _book(config: Config, args: argparse.Namespace | None = None) -> PriceBook:
    """As prices are, or as `args` would have them."""
    overrides: dict[str, Mapping[str, object]] = {
        name: price.row() for name, price in config.prices.models.items()
    }
    if args is None:
        return PriceBook(assets.prices(), overrides)
    for text in args.price:
        name, equals, rates = text.rpartition("=")
        try:
            rate_in, rate_out = (format_rate(parse_rate(rate)) for rate in rates.split(","))
            if not equals or "/" not in name:
                raise ValueError
        except ValueError:
            raise _Wrong(f'--price: write "openai/gpt-4o-mini=0.2,0.8", not {text!r}.') from None
        overrides[name] = {"input": rate_in, "output": rate_out}
    try:
        prices = (
            assets.prices()
            if args.prices is None
            else assets.parse_prices(args.prices.read_bytes())
        )
        return PriceBook(prices, overrides)
    except (OSError, ValueError, assets.AssetError) as error:
        raise _Wrong(f"{args.prices}: {error}") from error


def _chain(routes: Routes, written: str) -> list[tuple[str, str]]:
    chain = []
    for name in filter(None, written.split(",")):
        found = routes.resolve(name.strip())
        if found is None:
            raise _Wrong(
                f'--chain: {name!r} is no model here: write "openai/gpt-4o-mini" or an alias.'
            )
        chain += [(candidate.provider.name, candidate.model) for candidate in found]
    return chain


def _failover(written: str | None, default: Fraction) -> Fraction:
    if written is None:
        return default
    try:
        percent = float(written.removesuffix("%"))
        if not 0 <= percent <= 100:
            raise ValueError
    except ValueError:
        raise _Wrong(f"--failover: a number from 0 to 100, not {written!r}.") from None
    # As it was written: 0.1 is a tenth, and not the float beside it.
    return Fraction(repr(percent)) / 100


def _price(routes: Routes, book: PriceBook, asked: set[str]) -> Price:
    """`asked` gets the names of the models whose price was needed."""

    def price(provider: str, model: str, usage: Usage, at_ms: int) -> int | None:
        known = routes.providers.get(provider)
        slug = known.prices if known else CATALOGUE.get(provider, provider)
        asked.add(book.canonical(f"{slug}/{model}"))
        rate = book.rate(slug, model, at_ms / 1000)
        return None if rate is None else rate.cost(usage)

    return price


def _without_effect(
    args: argparse.Namespace,
    scenario: Scenario,
    outcome: Outcome,
    book: PriceBook,
    asked: set[str],
) -> Iterator[str]:
    """What was asked for and changed nothing: a name that no call has, as a rule."""
    if args.month is not None and not asked:
        yield (
            f"--month {args.month}: the ledger has no settled call of it with a cost. Older months "
            "may have been archived."
        )
        return
    for account in scenario.limits:
        if account not in outcome.limited:
            yield f"--limit {account}: no call is of this account, so it changes nothing."
    for text in args.price:
        name = text.rpartition("=")[0]
        wanted = book.canonical(name)
        whole = wanted.endswith("/*")
        if not any(one.startswith(wanted[:-1]) if whole else one == wanted for one in asked):
            yield f"--price {name}: no call is of this model, so it changes nothing."


# -- telling ---------------------------------------------------------------------------------------


def _tell(args: argparse.Namespace, outcome: Outcome, *, charged: bool) -> None:
    if args.json:
        print_json(_row(outcome))
        return
    rows = []
    for (provider, model), served in sorted(outcome.served.items()):
        row: dict[str, Any] = {
            "provider": provider,
            "model": model,
            "calls": served.calls,
            "tokens in": served.input,
            "tokens out": served.output,
        }
        if charged:
            row["was"] = _usd(served.was)
        rows.append(row | {"would be": _usd(served.would_be)})
    print("\n".join(table(rows)) or "No call would have been served.")
    before = f", and was {_usd(outcome.was)}" if charged else ""
    print(f"\nIn all it would be {_usd(outcome.would_be)}{before}.")
    otherwise = outcome.otherwise
    if charged and otherwise.calls:
        print(
            f"Of these {_usd(otherwise.would_be)} for {_count(otherwise.calls, 'call')} charged a "
            "hold, an estimate or a correction: kept so, and scaled where a price or provider "
            "changes."
        )
    fullest = sorted(outcome.refused.items(), key=lambda one: -one[1].calls)
    for account, refused in fullest[:_MOST]:
        calls = _count(refused.calls, "call")
        print(f"The limit of {account} would have refused {calls}{_first(refused.first)}.")
    if len(fullest) > _MOST:
        print(f"So would {len(fullest) - _MOST:,} other limits; --json has all.")
    every = outcome.all_refused
    if every.calls:
        calls, users = _count(every.calls, "call"), _count(len(every.users), "user")
        print(f"It would have refused {calls} of {users}{_first(every.first)}.")
    elif args.limit:
        print("It would have refused no call.")
    for (provider, model), count in sorted(outcome.unpriced.items()):
        say(f"no price for {provider}/{model} ({count:,} calls): taken as it was charged")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _first(at_ms: int | None) -> str:
    return "" if at_ms is None else f", first at {rfc3339(at_ms // 1000 * 1000)}"


def _row(outcome: Outcome) -> dict[str, Any]:
    refused = outcome.all_refused
    return {
        "served": [
            {
                "provider": provider,
                "model": model,
                "calls": served.calls,
                "input_tokens": served.input,
                "output_tokens": served.output,
                "was_usd": format_usd(served.was),
                "would_be_usd": format_usd(served.would_be),
            }
            for (provider, model), served in sorted(outcome.served.items())
        ],
        "was_usd": format_usd(outcome.was),
        "would_be_usd": format_usd(outcome.would_be),
        "not_by_tokens": {
            "calls": outcome.otherwise.calls,
            "was_usd": format_usd(outcome.otherwise.was),
            "would_be_usd": format_usd(outcome.otherwise.would_be),
        },
        "refused": {
            "calls": refused.calls,
            "users": len(refused.users),
            "first_at": None if refused.first is None else rfc3339(refused.first),
            "by_account": {name: one.calls for name, one in sorted(outcome.refused.items())},
        },
        "unpriced": {f"{p}/{m}": count for (p, m), count in sorted(outcome.unpriced.items())},
    }


def _usd(amount: int) -> str:
    whole, _, fraction = format_usd(amount).partition(".")
    return f"${whole}.{fraction.rstrip('0'):0<2}"
