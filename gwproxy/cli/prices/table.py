"""What `gwproxy prices` is about: books of prices, and how a price is put in words and figures."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from gwproxy import assets
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.money import format_rate
from gwproxy.core.pricing import Price, PriceBook, Rate
from gwproxy.core.routing import CATALOGUE

FINE = 0
DIFFERENT = 1
NOTHING_THERE = 1
WRONG_USAGE = 2

BUILT_IN = "built-in"
CONFIGURED = "config"

Row = dict[str, Any]
History = Sequence[Price]
Figures = tuple[int, int, int, int]
"""Pico-USD per token, in the order of the columns."""

HEAD = ("USD PER MILLION TOKENS", "INPUT", "CACHE READ", "CACHE WRITE", "OUTPUT", "")


class Refused(Exception):
    """The command ends here, with these words."""


def configured_book(args: argparse.Namespace) -> PriceBook:
    """The built-in table under the overrides of the configuration, where there is one."""
    try:
        path = find_config(args.config, os.environ)
    except ConfigError:
        return built_in()
    try:
        return configured(load(path, os.environ, catalogue=CATALOGUE))
    except ConfigError:
        if args.config is not None:
            raise
        # Who only wants to look something up need not have the server's secrets at hand.
        print(
            f"Without the overrides of {path}, which cannot be used as it is: "
            "`gwproxy check-config` says why.",
            file=sys.stderr,
        )
        return built_in()


@cache  # every book of one command lies on top of it
def built_in() -> PriceBook:
    return PriceBook(assets.prices())


def configured(config: Config) -> PriceBook:
    rows = {name: price.row() for name, price in config.prices.models.items()}
    return built_in().with_overrides(rows)


def named(name: str) -> tuple[str, str]:
    """A name's provider and model, as the book asks for them; a name can do without a provider."""
    provider, slash, model = name.partition("/")
    return (provider, model) if slash else ("", name)


def figures(rate: Rate, above: int) -> Figures:
    """What a token costs where the input is just above so many."""
    tier = rate.tier(above + 1)
    return tier.input, tier.cache_read, tier.cache_write, tier.output


def cells(figures: Figures) -> tuple[str, ...]:
    return tuple(map(format_rate, figures))


def held_when(price: Price, among: Iterable[Price], above: int = 0) -> str:
    """The time and the tier of a price in words; empty for the standard one."""
    words = []
    if price.from_day is not None:
        words.append(f"from {_date(price.from_day)}")
    elif price.hours_s is None:
        days = [other.from_day for other in among if other.from_day is not None]
        words += [f"before {_date(min(days))}"] if days else []
    if price.hours_s is not None:
        words.append("{} to {} UTC".format(*map(_clock, price.hours_s)))
    if above:
        words.append(f"input above {above} tokens")
    return ", ".join(words)


def _date(day: int) -> str:
    return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()


def _clock(second: int) -> str:
    return f"{second // 3600:02d}:{second // 60 % 60:02d}"


def rate_rows(label: str, rate: Rate, note: str = "") -> Iterator[tuple[str, ...]]:
    for tier in rate.tiers:
        reach = f"input above {tier.above_input_tokens} tokens" if tier.above_input_tokens else ""
        words = ", ".join(filter(None, (label, reach))) or "standard"
        yield words, *cells(figures(rate, tier.above_input_tokens)), note


def traits_of(rate: Rate) -> dict[str, str]:
    """What a model is, beside what it costs."""
    return {
        "context window": str(rate.context_window or "not known"),
        "maximum output": str(rate.max_output_tokens or "not known"),
        "hides reasoning": "yes" if rate.hides_reasoning else "no",
        "also charges for": ", ".join(rate.extras) or "nothing else",
    }


def print_traits(rate: Rate) -> None:
    print()
    for trait, value in traits_of(rate).items():
        print(f"{trait:<17}  {value}")


def as_json(rate: Rate) -> Row:
    return {
        "listed_as": rate.listed_as,
        "overridden": rate.overridden,
        "tiers": _tiers_json(rate),
        "context_window": rate.context_window,
        "max_output_tokens": rate.max_output_tokens,
        "hides_reasoning": rate.hides_reasoning,
        "extras": list(rate.extras),
    }


def _tiers_json(rate: Rate) -> list[Row]:
    return [
        {
            "above_input_tokens": tier.above_input_tokens,
            "input": format_rate(tier.input),
            "cache_read": format_rate(tier.cache_read),
            "cache_write": format_rate(tier.cache_write),
            "output": format_rate(tier.output),
        }
        for tier in rate.tiers
    ]


def dated_json(history: History) -> list[Row]:
    return [
        {
            "from": None if price.from_day is None else _date(price.from_day),
            "hours_utc": None if price.hours_s is None else list(map(_clock, price.hours_s)),
            "tiers": _tiers_json(price.rate),
        }
        for price in history
    ]


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *figures, note in rows:
        cells = (cell.rjust(width) for cell, width in zip(figures, widths[1:-1], strict=True))
        print("  ".join((name.ljust(widths[0]), *cells, note)).rstrip())
