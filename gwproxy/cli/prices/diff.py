"""`gwproxy prices diff`: what differs between two price tables."""

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from gwproxy.cli.prices.table import (
    BUILT_IN,
    CONFIGURED,
    DIFFERENT,
    FINE,
    HEAD,
    Figures,
    History,
    Refused,
    Row,
    as_json,
    built_in,
    cells,
    configured,
    dated_json,
    figures,
    held_when,
    named,
    print_table,
    traits_of,
)
from gwproxy.config import find_config, load
from gwproxy.core.pricing import Price, PriceBook, Rate
from gwproxy.core.routing import CATALOGUE


@dataclass(frozen=True, slots=True)
class _Change:
    """What differs between one model's prices in two books."""

    name: str
    old: History
    new: History
    rows: Sequence[tuple[str, Figures | None, Figures | None]]
    """Time and tier, and what the four columns were and are there."""
    traits: Sequence[tuple[str, str, str]]

    @property
    def kind(self) -> str:
        return "changed" if self.old and self.new else "added" if self.new else "removed"


_MARKS = {"added": "+", "removed": "-", "changed": "~"}


def diff_tables(args: argparse.Namespace) -> int:
    old, new = _source(args.old, args), _source(args.new, args)
    changes = list(_changes(old, new))
    if args.json:
        found: Row = {
            "old": {"table": args.old, "version": old.version},
            "new": {"table": args.new, "version": new.version},
            **{kind: {} for kind in _MARKS},
        }
        for change in changes:
            sides = {"old": change.old, "new": change.new}
            models = {side: _model_json(history) for side, history in sides.items() if history}
            found[change.kind][change.name] = models
        print(json.dumps(found))
        return DIFFERENT if changes else FINE
    print(f"{args.old} ({old.version}) -> {args.new} ({new.version})\n")
    if not changes:
        print("They agree: every model costs the same.")
        return FINE
    rows: list[tuple[str, ...]] = [HEAD]
    for change in changes:
        for when, was, now in change.rows:
            label = ", ".join(filter(None, (f"{_MARKS[change.kind]} {change.name}", when)))
            rows.append((label, *_was_and_is(was, now), ""))
    if len(rows) > 1:
        print_table(rows)
        print()
    traits = [
        f"~ {change.name}: {trait} {was} -> {now}"
        for change in changes
        for trait, was, now in change.traits
    ]
    if traits:
        print("\n".join(traits), end="\n\n")
    counts = (f"{sum(one.kind == kind for one in changes)} {kind}" for kind in _MARKS)
    print(", ".join(counts))
    return DIFFERENT


def _source(word: str, args: argparse.Namespace) -> PriceBook:
    if word == BUILT_IN:
        return built_in()
    if word == CONFIGURED:
        path = find_config(args.config, os.environ)
        return configured(load(path, os.environ, catalogue=CATALOGUE))
    try:
        return PriceBook(orjson.loads(Path(word).read_bytes()))
    except OSError as error:
        raise Refused(f"{word} cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, re.error):
        raise Refused(f"{word} is not a price table as `gwproxy prices build` makes it") from None


def _changes(old: PriceBook, new: PriceBook) -> Iterator[_Change]:
    # The listed spelling of a name comes before that of its override, which has no capitals.
    names = {
        name.lower(): name
        for book in (old, new)
        for name in (
            *book.overrides(),
            *(f"{slug}/{model}" for slug in book.providers() for model in book.models(slug)),
        )
    }
    for name in sorted(names.values()):
        change = _change(name, old, new)
        if change.rows or change.traits:
            yield change


def _change(name: str, old: PriceBook, new: PriceBook) -> _Change:
    was, now = old.history(*named(name)), new.history(*named(name))
    traits: list[tuple[str, str, str]] = []
    if was and now:
        then = traits_of(was[-1].rate)
        traits = [
            (trait, then[trait], value)
            for trait, value in traits_of(now[-1].rate).items()
            if value != then[trait]
        ]
    return _Change(name, was, now, list(_differing(was, now)), traits)


def _differing(old: History, new: History) -> Iterator[tuple[str, Figures | None, Figures | None]]:
    """Wherever a new price begins on one side, or a tier, what both sides ask there."""
    both = (*old, *new)
    beginnings = {(price.from_day, price.hours_s): price for price in both}
    for beginning in sorted(
        beginnings.values(), key=lambda one: (one.from_day or 0, one.hours_s or ())
    ):
        was, now = _beside(beginning, old), _beside(beginning, new)
        tiers = {tier.above_input_tokens for rate in (was, now) if rate for tier in rate.tiers}
        for above in sorted(tiers):
            before, after = (None if rate is None else figures(rate, above) for rate in (was, now))
            if before != after:
                yield held_when(beginning, both, above), before, after


def _beside(beginning: Price, history: History) -> Rate | None:
    """What `history` asks for where `beginning` holds: at its hours, else at any hour."""
    standing = None
    for price in history:
        if (price.from_day, price.hours_s) == (beginning.from_day, beginning.hours_s):
            return price.rate
        # Hours without a date are of any day, and so of the newest price.
        timeless = beginning.from_day is None and beginning.hours_s is not None
        if standing is None or (
            price.hours_s is None
            and (timeless or (price.from_day or 0) <= (beginning.from_day or 0))
        ):
            standing = price.rate
    return standing


def _was_and_is(was: Figures | None, now: Figures | None) -> list[str]:
    """The four cells of a row that one side at least has."""
    before, after = (cells(figures) if figures else () for figures in (was, now))
    pairs = zip(before or after, after or before, strict=True)
    return [one if one == other else f"{one} -> {other}" for one, other in pairs]


def _model_json(history: History) -> Row:
    found = as_json(history[-1].rate)
    del found["tiers"]
    return {**found, "history": dated_json(history)}
