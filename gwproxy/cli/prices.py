"""`gwproxy prices`: look into the price table, override it, and compile the one that is shipped.

The library that the prices come from is imported by `prices build` alone: it costs 30 MiB and a
quarter of a second, and the serving process needs neither it nor its data.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from gwproxy import assets
from gwproxy.config import Config, ConfigError, Prices, find_config, load
from gwproxy.core.money import format_rate, parse_rate
from gwproxy.core.pricing import Price, PriceBook, Rate
from gwproxy.core.routing import CATALOGUE
from gwproxy.storage.files import OS_FILES

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

_HEAD = ("USD PER MILLION TOKENS", "INPUT", "CACHE READ", "CACHE WRITE", "OUTPUT", "")


class _Refused(Exception):
    """The command ends here, with these words."""


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
    listing.set_defaults(func=_runs(_list))

    show = commands.add_parser(
        "show", parents=[config, moment], help="one model: its prices, tiers, dates and limits"
    )
    show.add_argument("model", metavar="PROVIDER/MODEL")
    show.set_defaults(func=_runs(_show))

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
    override.set_defaults(func=_runs(_set))

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
    diff.set_defaults(func=_runs(_diff))

    build = commands.add_parser(
        "build", parents=[as_json], help="compile the table from the installed genai-prices"
    )
    build.add_argument("--out", type=Path, help="where to write it (default: into the package)")
    build.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the table is out of date"
    )
    build.set_defaults(func=_build)


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
        except (assets.AssetError, ConfigError, _Refused) as error:
            print(error, file=sys.stderr)
            return WRONG_USAGE

    return run


# -- list and show -------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    book = _book(args)
    at_s = time.time() if args.at is None else args.at
    rates = {
        f"{provider}/{model}": rate
        for provider in ([args.provider] if args.provider else book.providers())
        for model in book.models(provider)
        if (rate := book.rate(provider, model, at_s)) is not None
    }
    if args.json:
        models = {name: _as_json(rate) for name, rate in rates.items()}
        print(json.dumps({"version": book.version, "models": models}))
        return FINE if rates else NOTHING_THERE
    if not rates:
        print(f"No priced models at {args.provider}.", file=sys.stderr)
        return NOTHING_THERE
    rows: list[tuple[str, ...]] = [_HEAD]
    for name, rate in rates.items():
        notes = ["tiers"] if len(rate.tiers) > 1 else []
        notes += ["override"] if rate.overridden else []
        rows.append((name, *_cells(_figures(rate, 0)), ", ".join(notes)))
    _print_table(rows)
    print(f"\n{len(rates)} models, prices {book.version}")
    return FINE


def _show(args: argparse.Namespace) -> int:
    provider, slash, model = args.model.partition("/")
    if not slash or not provider or not model:
        print("The model's name is PROVIDER/MODEL, such as openai/gpt-4o-mini.", file=sys.stderr)
        return WRONG_USAGE
    book = _book(args)
    rate = book.rate(provider, model, time.time() if args.at is None else args.at)
    history = book.history(provider, model)
    if rate is None:
        print(
            f"{args.model} has no price. Give it one in the configuration, under "
            f'[prices.models."{args.model}"]: gwproxy prices set {args.model} --input USD '
            "--output USD",
            file=sys.stderr,
        )
        return NOTHING_THERE
    if args.json:
        dated = [
            {**when, "holds": price.rate is rate}
            for when, price in zip(_dated_json(history), history, strict=True)
        ]
        found = {"model": args.model, "version": book.version, **_as_json(rate), "history": dated}
        print(json.dumps(found))
        return FINE
    origin = "overridden" if rate.overridden else f"listed as {rate.listed_as}"
    print(f"{args.model}, {origin}\n")
    rows: list[tuple[str, ...]] = [_HEAD]
    holds = "now" if args.at is None else "then"
    for price in history:
        note = holds if len(history) > 1 and price.rate is rate else ""
        rows += _rate_rows(_when(price, history), price.rate, note)
    _print_table(rows)
    _print_traits(rate)
    print(f"price table        {book.version}")
    return FINE


def _book(args: argparse.Namespace) -> PriceBook:
    """The built-in table under the overrides of the configuration, where there is one."""
    try:
        path = find_config(args.config, os.environ)
    except ConfigError:
        return _built_in()
    try:
        return _configured(load(path, os.environ, catalogue=CATALOGUE))
    except ConfigError:
        if args.config is not None:
            raise
        # Who only wants to look something up need not have the server's secrets at hand.
        print(
            f"Without the overrides of {path}, which cannot be used as it is: "
            "`gwproxy check-config` says why.",
            file=sys.stderr,
        )
        return _built_in()


@cache  # every book of one command lies on top of it
def _built_in() -> PriceBook:
    return PriceBook(assets.prices())


def _configured(config: Config) -> PriceBook:
    rows = {name: price.row() for name, price in config.prices.models.items()}
    return _built_in().with_overrides(rows)


def _named(name: str) -> tuple[str, str]:
    """A name's provider and model, as the book asks for them; a name can do without a provider."""
    provider, slash, model = name.partition("/")
    return (provider, model) if slash else ("", name)


# -- words and figures ---------------------------------------------------------------------------


def _figures(rate: Rate, above: int) -> Figures:
    """What a token costs where the input is just above so many."""
    tier = rate.tier(above + 1)
    return tier.input, tier.cache_read, tier.cache_write, tier.output


def _cells(figures: Figures) -> tuple[str, ...]:
    return tuple(map(format_rate, figures))


def _when(price: Price, among: Iterable[Price], above: int = 0) -> str:
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


def _rate_rows(label: str, rate: Rate, note: str = "") -> Iterator[tuple[str, ...]]:
    for tier in rate.tiers:
        reach = f"input above {tier.above_input_tokens} tokens" if tier.above_input_tokens else ""
        words = ", ".join(filter(None, (label, reach))) or "standard"
        yield words, *_cells(_figures(rate, tier.above_input_tokens)), note


def _traits(rate: Rate) -> dict[str, str]:
    """What a model is, beside what it costs."""
    return {
        "context window": str(rate.context_window or "not known"),
        "maximum output": str(rate.max_output_tokens or "not known"),
        "hides reasoning": "yes" if rate.hides_reasoning else "no",
        "also charges for": ", ".join(rate.extras) or "nothing else",
    }


def _print_traits(rate: Rate) -> None:
    print()
    for trait, value in _traits(rate).items():
        print(f"{trait:<17}  {value}")


def _as_json(rate: Rate) -> Row:
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


def _dated_json(history: History) -> list[Row]:
    return [
        {
            "from": None if price.from_day is None else _date(price.from_day),
            "hours_utc": None if price.hours_s is None else list(map(_clock, price.hours_s)),
            "tiers": _tiers_json(price.rate),
        }
        for price in history
    ]


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *figures, note in rows:
        cells = (cell.rjust(width) for cell, width in zip(figures, widths[1:-1], strict=True))
        print("  ".join((name.ljust(widths[0]), *cells, note)).rstrip())


# -- diff ----------------------------------------------------------------------------------------


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


def _diff(args: argparse.Namespace) -> int:
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
    rows: list[tuple[str, ...]] = [_HEAD]
    for change in changes:
        for when, was, now in change.rows:
            label = ", ".join(filter(None, (f"{_MARKS[change.kind]} {change.name}", when)))
            rows.append((label, *_was_and_is(was, now), ""))
    if len(rows) > 1:
        _print_table(rows)
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
        return _built_in()
    if word == CONFIGURED:
        path = find_config(args.config, os.environ)
        return _configured(load(path, os.environ, catalogue=CATALOGUE))
    try:
        return PriceBook(orjson.loads(Path(word).read_bytes()))
    except OSError as error:
        raise _Refused(f"{word} cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, re.error):
        raise _Refused(f"{word} is not a price table as `gwproxy prices build` makes it") from None


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
    was, now = old.history(*_named(name)), new.history(*_named(name))
    traits: list[tuple[str, str, str]] = []
    if was and now:
        then = _traits(was[-1].rate)
        traits = [
            (trait, then[trait], value)
            for trait, value in _traits(now[-1].rate).items()
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
            before, after = (None if rate is None else _figures(rate, above) for rate in (was, now))
            if before != after:
                yield _when(beginning, both, above), before, after


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
    before, after = (_cells(figures) if figures else () for figures in (was, now))
    pairs = zip(before or after, after or before, strict=True)
    return [one if one == other else f"{one} -> {other}" for one, other in pairs]


def _model_json(history: History) -> Row:
    found = _as_json(history[-1].rate)
    del found["tiers"]
    return {**found, "history": _dated_json(history)}


# -- set -----------------------------------------------------------------------------------------


def _set(args: argparse.Namespace) -> int:
    row = _wanted(args)
    name: str = args.model
    # The file itself, where its name is a link: it is replaced by another one in its folder.
    path = find_config(args.config, os.environ).resolve()
    before = load(path, os.environ, catalogue=CATALOGUE)
    old = _configured(before)
    if variables := _standing(name):
        raise _Refused(
            f"{', '.join(variables)} in the environment would win over the file: unset it first"
        )
    if row is not None:
        _check_name(name, before, old)
    try:
        raw = path.read_bytes()
        edited = with_price(raw.decode(), name, row and _as_toml(row)).encode()
        if edited == raw:
            after = before
        else:
            after = _replace(path, raw, edited, lambda draft: _checked(draft, before, name, row))
    except ValueError as error:
        raise _Refused(f"{path} stays as it is: {error}") from None
    except OSError as error:
        raise _Refused(f"{path} stays as it is: {error.strerror}") from None
    _tell(args, path, old, _configured(after), written=edited != raw)
    return NOTHING_THERE if row is None and edited == raw else FINE


def _wanted(args: argparse.Namespace) -> Row | None:
    """The override as the command line says it; None to take it out."""
    given = ("input", "output", "cache_read", "cache_write", "max_output_tokens")
    row = {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    if args.unset:
        if row or args.reasons:
            raise _Refused("--unset takes the whole override out: give it no prices")
        return None
    if not {"input", "output"} <= row.keys():
        raise _Refused(
            "a price needs --input and --output, in USD per million tokens; --unset takes it out"
        )
    return {**row, "reasons": args.reasons}


def _as_toml(row: Row) -> dict[str, str]:
    """Prices go into quotes, as in the shipped file, so that no tool rounds them."""
    written = {}
    for key, value in row.items():
        if isinstance(value, Decimal):
            written[key] = f'"{format_rate(parse_rate(value))}"'
        elif value is not False:
            written[key] = json.dumps(value)
    return written


def _standing(name: str) -> list[str]:
    """The variables that price this model. Case, dashes and slashes are lost in their names."""

    def flat(text: str) -> str:
        return re.sub(r"[^a-z0-9]+", "_", text.lower())

    found = []
    for variable in sorted(os.environ):
        *table, model, _ = ["", "", *variable.upper().split("__")]
        if table[2:] == ["GWPROXY", "PRICES", "MODELS"] and flat(model) == flat(name):
            found.append(variable)
    return found


def _check_name(name: str, config: Config, book: PriceBook) -> None:
    """_Refused where no request would ever take the price from under this name."""
    for other in config.prices.models:
        if other != name and book.canonical(other) == book.canonical(name):
            raise _Refused(
                f'{config.file} prices this model as "{other}": change that one, or take it out '
                "with --unset first"
            )
    head, slash, model = name.partition("/")
    if slash and head in config.providers:
        prefix = config.providers[head].prefix or ""
        # The same rule by which the routes find a provider's prices.
        slug = CATALOGUE.get(prefix) or CATALOGUE.get(head) or prefix or head
        if book.canonical(f"{slug}/{model}") != book.canonical(name):
            raise _Refused(
                f'[providers.{head}] is "{slug}" upstream, and prices go by that: write '
                f'"{slug}/{model}"'
            )


def _checked(draft: Path, before: Config, name: str, row: Row | None) -> Config:
    """The configuration in `draft`, which differs from `before` in this one price alone."""

    def others(config: Config) -> Config:
        models = {key: price for key, price in config.prices.models.items() if key != name}
        return replace(config, file=None, prices=Prices(models), warnings=())

    try:
        after = load(draft, os.environ, catalogue=CATALOGUE)
    except ConfigError as error:
        raise _Refused(str(error).replace(str(draft), str(before.file))) from None
    found = after.prices.models.get(name)
    if others(after) != others(before) or (found and found.row()) != row:
        raise ValueError(f'[prices.models."{name}"] cannot be edited here; do it by hand')
    return after


def _replace(path: Path, raw: bytes, edited: bytes, check: Callable[[Path], Config]) -> Config:
    """Put `edited` in the place of `raw` once `check` has passed it; whoever reads the file, and
    whatever happens to the machine, finds either the old one or the new one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(edited)
            owner = path.stat()
            # A server that runs as somebody else must still be able to read it.
            os.fchown(stream.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(stream.fileno(), stat.S_IMODE(owner.st_mode))
            stream.flush()
            os.fsync(stream.fileno())
        config = check(draft)
        if path.read_bytes() != raw:
            raise ValueError("somebody else has just changed it; try again")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    OS_FILES.fsync_directory(path.parent)
    return config


def _tell(
    args: argparse.Namespace, path: Path, old: PriceBook, new: PriceBook, *, written: bool
) -> None:
    was, now = (book.rate(*_named(args.model), time.time()) for book in (old, new))
    if args.json:
        found = {
            "model": args.model,
            "file": str(path),
            "written": written,
            "before": was and _as_json(was),
            "now": now and _as_json(now),
        }
        print(json.dumps(found))
        return
    outcome = "taken out" if args.unset else "written"
    if not written:
        outcome = "is not there" if args.unset else "says so already"
    print(f'{path}: [prices.models."{args.model}"] {outcome}\n')
    rows: list[tuple[str, ...]] = [_HEAD]
    for label, rate in (("before", was), ("now", now))[not written :]:
        if rate is None:
            rows.append((f"{label}: no price", "-", "-", "-", "-", ""))
        else:
            rows += _rate_rows(label, rate, "override" if rate.overridden else BUILT_IN)
    _print_table(rows)
    if now is not None:
        _print_traits(now)
    if written:
        print("\nA server that is running keeps its prices until it is restarted.")


# -- one table of a TOML text --------------------------------------------------------------------

_NAME = r"""(?:"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[A-Za-z0-9_-]+)"""
_NAMES = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_STATEMENT = re.compile(
    rf"[ \t]*(?:\[\[?[ \t]*(?P<table>{_NAMES})|(?P<key>{_NAMES})[ \t]*=[ \t]*)?"
)
"""How a line begins that does not go on with the value of an earlier one. Matches every line."""

_WORD = re.compile(
    r"""
      "{3}(?:\\.|[^\\])*?"{3,5} | '{3}.*?'{3,5}         # text over several lines
    | "(?:\\.|[^"\\\n])*" | '[^'\n]*'
    | [\[\]{}] | \#[^\n]* | \n
    """,
    re.VERBOSE | re.DOTALL,
)
"""What decides where a value ends; whatever stands between two of these is part of it."""


@dataclass(frozen=True, slots=True)
class _Statement:
    """A `[table]` or a `key = value`: its names from the root on, and where it stands."""

    path: tuple[str, ...]
    start: int
    end: int
    """Past its last line's end, comment and line break included."""
    before: str = ""
    """What stands on its line before the last of its names."""
    value: tuple[int, int] | None = None
    """None for a `[table]`."""


def with_price(text: str, name: str, wanted: Mapping[str, str] | None) -> str:
    """A TOML text in which `[prices.models."NAME"]` has exactly the keys `wanted`, whose values
    are TOML; None takes the table out. Lines that are not its own stay as they are, and so do the
    comments on those of its lines that stay.

    The text must be valid TOML. ValueError where the table cannot be edited by lines.
    """
    place = ("prices", "models", name)
    statements = list(_statements(text))
    for one in statements:
        if one.value and len(one.path) < len(place) and one.path == place[: len(one.path)]:
            raise ValueError(
                f"{'.'.join(one.path)} is written as one value, {{ ... }}: "
                'write it as [prices.models."provider/model"], a table for each model'
            )
    own = [one for one in statements if one.path[: len(place)] == place]
    line_break = "\r\n" if "\r\n" in text else "\n"
    if wanted is None:
        edits = [(one.start, one.end, "") for one in own]
        unbroken = all(one.end == following.start for one, following in pairwise(own))
        if own and own[0].value is None and unbroken:
            before, after = text[: own[0].start], text[own[-1].end :]
            if before.endswith(line_break * 2) and (not after or after.startswith(line_break)):
                # The empty line before the table parts nothing any more.
                edits.append((own[0].start - len(line_break), own[0].start, ""))
        return _edited(text, edits)
    if own and own[0].value and own[0].path == place:
        pairs = ", ".join(f"{key} = {value}" for key, value in wanted.items())
        return _edited(text, [(*own[0].value, f"{{ {pairs} }}")])
    edits, known = [], set()
    for one in own:
        if one.value:
            key = one.path[-1]
            known.add(key)
            gone = (one.start, one.end, "")
            edits.append((*one.value, wanted[key]) if key in wanted else gone)
    lines = [f"{key} = {value}" for key, value in wanted.items() if key not in known]
    if own:
        end = own[-1].end
        lines = [own[-1].before + line for line in lines]
    else:
        end = len(text)
        lines = [*([""] if text else []), f"[prices.models.{json.dumps(name)}]", *lines]
    if lines and end and not text[:end].endswith("\n"):
        lines.insert(0, "")
    edits.append((end, end, "".join(line + line_break for line in lines)))
    return _edited(text, edits)


def _edited(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _statements(text: str) -> Iterator[_Statement]:
    table: tuple[str, ...] = ()
    start = 0
    while start < len(text):
        head = _STATEMENT.match(text, start)
        assert head is not None, "a line may also begin with nothing"
        stop = _value_end(text, head.end()) if head["key"] else head.end()
        end = text.find("\n", stop) + 1 or len(text)
        names = list(re.finditer(_NAME, head["table"] or head["key"] or ""))
        path = tuple(_plain(name[0]) for name in names)
        if head["table"]:
            table = path
            yield _Statement(path, start, end)
        elif head["key"]:
            before = text[start : head.start("key") + names[-1].start()]
            yield _Statement((*table, *path), start, end, before, (head.end(), stop))
        start = end


def _value_end(text: str, start: int) -> int:
    depth = 0
    for word in _WORD.finditer(text, start):
        first = word[0][0]
        if first in "[{":
            depth += 1
        elif first in "]}":
            depth -= 1
        elif not depth and first in "#\n":
            return start + len(text[start : word.start()].rstrip())
    return len(text.rstrip())


def _plain(name: str) -> str:
    """A name as TOML means it: the escapes of its quotes are all Python's as well."""
    if name.startswith('"'):
        plain: str = ast.literal_eval(name)
        return plain
    return name.strip("'")


# -- build ---------------------------------------------------------------------------------------


def _build(args: argparse.Namespace) -> int:
    try:
        from genai_prices.data import providers
    except ImportError:
        print(
            "genai-prices is not installed: pip install '.[prices]' in the checkout",
            file=sys.stderr,
        )
        return 2
    table = compile_table(providers, metadata.version("genai-prices"))
    PriceBook(table)  # a table that cannot be read is never written
    written = serialise(table)
    out: Path = args.out or Path(assets.__file__).parent / "data" / assets.PRICES
    before = out.read_bytes() if out.exists() else b""
    models = sum(len(listing["models"]) for listing in table["providers"].values())
    if not args.check and written != before:
        out.write_bytes(written)
    current = written == before
    if args.json:
        print(
            json.dumps(
                {
                    "version": table["version"],
                    "models": models,
                    "file": str(out),
                    "changed": not current,
                    "written": not current and not args.check,
                }
            )
        )
    else:
        state = "up to date" if current else "out of date" if args.check else "written"
        print(f"{out}: {state}, {models} models, prices {table['version']}")
    return 1 if args.check and not current else 0


SOURCES = {
    "anthropic": "anthropic",
    "aws-bedrock": "aws",
    "azure-openai": "azure",
    "baseten": "baseten",
    "cerebras": "cerebras",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "fireworks": "fireworks",
    "google-ai-studio": "google",
    "google-vertex-ai": "google",
    "grok": "x-ai",
    "groq": "groq",
    "mistral": "mistral",
    "openai": "openai",
    "openrouter": "openrouter",
    "perplexity-ai": "perplexity",
    "workers-ai": "cloudflare",
}
"""Cloudflare's name of a provider, and the one under which its prices are listed."""

ALIASES = {
    "custom-huggingface": "custom-hf",
    "google": "google-ai-studio",
    "huggingface": "custom-hf",
    "perplexity": "perplexity-ai",
    "x-ai": "grok",
    "xai": "grok",
}

# These serve other vendors' models at those vendors' prices.
FALLBACK = {
    "azure-openai": ["openai", "anthropic", "deepseek", "grok"],
    "google-vertex-ai": ["anthropic"],
}

# Prefixes that callers write before a name and the price list does not.
STRIP = {"google-ai-studio": ["models/"], "google-vertex-ai": ["google/"]}

HUGGINGFACE = "huggingface_"

_TOKEN_KEYS = ("input_mtok", "cache_read_mtok", "cache_write_mtok", "output_mtok")


def compile_table(sources: Iterable[Any], source_version: str) -> Row:
    """The table as `PriceBook` takes it, from genai-prices' providers.

    Each model keeps the order and the ways of matching names of the source, so that a name means
    the same model here and there. Models without a price per token are left out, unless their
    names would then be taken for another model's.
    """
    by_id = {source.id: source for source in sources}
    providers: Row = {}
    for slug, source_id in SOURCES.items():
        listing: Row = {}
        if slug in FALLBACK:
            listing["fallback"] = FALLBACK[slug]
        if slug in STRIP:
            listing["strip"] = STRIP[slug]
        listing["models"] = _models(by_id[source_id].models)
        providers[slug] = listing
    providers["custom-hf"] = {
        "models": _routed_models(
            {
                source_id.removeprefix(HUGGINGFACE): source.models
                for source_id, source in by_id.items()
                if source_id.startswith(HUGGINGFACE)
            }
        )
    }
    providers = dict(sorted(providers.items()))
    content = orjson.dumps([ALIASES, providers])
    digest = hashlib.sha256(content).hexdigest()[:12]
    return {
        "version": f"genai-prices-{source_version}-{digest}",
        "unit": "pico-USD per token: [above_input_tokens, input, cache_read, cache_write, output]",
        "aliases": ALIASES,
        "providers": providers,
    }


def serialise(table: Row) -> bytes:
    """One model a line, so that a change of price is a change of one line."""

    def compact(value: object) -> str:
        return orjson.dumps(value).decode()

    providers = []
    for slug, listing in table["providers"].items():
        head = [
            f"{compact(key)}: {compact(value)},"
            for key, value in listing.items()
            if key != "models"
        ]
        models = ",\n".join(
            f"{compact(model_id)}: {compact(row)}" for model_id, row in listing["models"].items()
        )
        providers.append(
            "\n".join([f"{compact(slug)}: {{", *head, f'"models": {{\n{models}\n}}}}'])
        )
    head = [f"{compact(key)}: {compact(table[key])}," for key in ("version", "unit", "aliases")]
    body = ",\n".join(providers)
    return "\n".join(["{", *head, f'"providers": {{\n{body}\n}}}}\n']).encode()


def _models(models: list[Any]) -> Row:
    rows: Row = {}
    prices_of = [_prices(model) for model in models]
    priced = [model for model, prices in zip(models, prices_of, strict=True) if prices]
    for model, prices in zip(models, prices_of, strict=True):
        names, clauses = _matching(model.match)
        if not prices and not clauses:
            mistaken = any(other.is_match(name) for other in priced for name in names)
            if not mistaken:
                continue
        rows[model.id] = _row(
            model.id, names, clauses, model.context_window, _extras(model), prices
        )
    return rows


def _row(
    model_id: str,
    names: list[str],
    clauses: list[Row],
    context: int | None,
    extras: list[str],
    prices: list[Row],
) -> Row:
    row: Row = {"names": names}
    if clauses:
        row["match"] = clauses
    if context:
        row["context"] = context
    if most := _max_output(model_id):
        row["max_output"] = most
    if _HIDES_REASONING.search(model_id.lower()):
        row["reasons"] = True
    if extras:
        row["extras"] = extras
    row["prices"] = prices
    return row


def _matching(match: Any) -> tuple[list[str], list[Row]]:
    """A model's exact names, and what else its name may look like."""
    clause = _clause(match)
    parts: list[Row] = clause.get("or", [clause])
    names = [part["equals"] for part in parts if "equals" in part]
    return names, [part for part in parts if "equals" not in part]


def _clause(match: Any) -> Row:
    ((field, value),) = vars(match).items()
    if isinstance(value, list):
        return {field.rstrip("_"): [_clause(part) for part in value]}
    return {field: value}


def _prices(model: Any) -> list[Row]:
    """Every version of a model's price, in the order in which the later valid one wins."""
    if not isinstance(model.prices, list):
        tiers = _tiers(model.prices)
        return [{"tiers": tiers}] if tiers else []
    rows = []
    for conditional in model.prices:
        tiers = _tiers(conditional.prices)
        if not tiers:
            continue
        constraint = vars(conditional.constraint) if conditional.constraint else {}
        row: Row = {}
        if start := constraint.get("start_date"):
            row["from"] = start.isoformat()
        if start := constraint.get("start_time"):
            hours = (start, constraint["end_time"])
            if any(hour.utcoffset() for hour in hours):
                raise ValueError(f"{model.id}: hours that are not in UTC")
            row["hours"] = [hour.strftime("%H:%M") for hour in hours]
        rows.append(row | {"tiers": tiers})
    return rows


def _tiers(price: Any) -> list[list[int]]:
    given = {key: value for key in _TOKEN_KEYS if (value := vars(price).get(key)) is not None}
    if "input_mtok" not in given and "output_mtok" not in given:
        return []
    starts = sorted(
        {tier.start for value in given.values() for tier in getattr(value, "tiers", ())}
    )
    rows = []
    for start in (0, *starts):
        at_tier = {key: _picos(_value_at(value, start)) for key, value in given.items()}
        fresh = at_tier.get("input_mtok", 0)
        rows.append(
            [
                start,
                fresh,
                at_tier.get("cache_read_mtok", fresh),
                at_tier.get("cache_write_mtok", fresh),
                at_tier.get("output_mtok", 0),
            ]
        )
    return rows


def _value_at(value: Any, start: int) -> Decimal:
    if isinstance(value, Decimal):
        return value
    reached: Decimal = value.base
    for tier in value.tiers:
        if tier.start <= start:
            reached = tier.price
    return reached


def _picos(usd_per_mtok: Decimal) -> int:
    """Nearly all prices are exact; the rest are float noise such as 0.18000000000000002."""
    return int((usd_per_mtok * 10**6).to_integral_value(ROUND_HALF_EVEN))


def _extras(model: Any) -> list[str]:
    prices = model.prices if isinstance(model.prices, list) else [model]
    return sorted(
        {
            key
            for price in prices
            for key, value in vars(price.prices).items()
            if value is not None and key not in _TOKEN_KEYS
        }
    )


def _routed_models(models_by_host: Mapping[str, list[Any]]) -> Row:
    """HuggingFace's router: `model:host` costs what that host asks. Without a host, or with one of
    the router's own policies, nobody knows beforehand which host it will be: the dearest counts."""
    rows: Row = {}
    hosts: dict[str, list[Any]] = {}
    for host, models in sorted(models_by_host.items()):
        for model in models:
            names, clauses = _matching(model.match)
            if clauses:
                raise ValueError(f"{host}: {model.id} matches more than exact names")
            prices = _prices(model)
            if not prices:
                continue
            names = [f"{name}:{host}" for name in names]
            model_id = f"{model.id}:{host}"
            rows[model_id] = _row(model_id, names, [], model.context_window, _extras(model), prices)
            hosts.setdefault(model.id, []).append(model)
    for model_id, models in hosts.items():
        names = sorted({name for model in models for name in _matching(model.match)[0]})
        names += [f"{name}:{policy}" for name in names for policy in ("fastest", "cheapest")]
        context = max((model.context_window or 0 for model in models), default=0)
        extras = sorted({extra for model in models for extra in _extras(model)})
        rows[model_id] = _row(model_id, names, [], context, extras, _dearest(models))
    return dict(sorted(rows.items()))


def _dearest(models: list[Any]) -> list[Row]:
    """For each day on which some price changed, the highest of each rate."""
    histories = [_prices(model) for model in models]
    if any("hours" in row or len(row["tiers"]) > 1 for rows in histories for row in rows):
        raise ValueError(f"{models[0].id}: tiers or hours, which cannot be combined")
    days = sorted({row.get("from", "") for rows in histories for row in rows})
    combined = []
    for day in days:
        valid = [
            next((row for row in reversed(rows) if row.get("from", "") <= day), rows[0])
            for rows in histories
        ]
        highest = [max(column) for column in zip(*(row["tiers"][0] for row in valid), strict=True)]
        combined.append(({"from": day} if day else {}) | {"tiers": [highest]})
    return combined


# -- what the price list does not say ------------------------------------------------------------

_HIDES_REASONING = re.compile(
    r"""(?:^|[/.~:])(?:
        o[134](?:-|$)                                    # OpenAI's o series
      | codex | gpt-(?:[5-9]|\d\d) | gpt-chat-latest     # GPT-5 and what came after it
      | gpt-rosalind | gpt-sol
      | gemini-(?!1|2\.0|pro$|pro-1|pro-vision|flash-1|flash-lite-1|embedding)
      | gemini-2\.0-flash-thinking
      | claude-(?:fable|mythos|(?:opus|sonnet|haiku)-(?:[5-9]|latest)|[5-9])
      | grok-(?:[4-9]|build|code)(?!.*non-reasoning)
      | sonar-deep-research
    )""",
    re.VERBOSE,
)
"""Models that think without being asked and bill it without showing all of it. Claude up to 4.8
thinks only when the request says so; open models show their reasoning in the answer."""

_MAX_OUTPUT: tuple[tuple[str, int], ...] = (
    (r"gpt-3\.5-turbo$|gpt-3\.5-turbo-1106$", 4096),
    (r"gpt-4$", 8192),
    (r"gpt-4-turbo|gpt-4-vision-preview|gpt-4o-2024-05-13$", 4096),
    (r"gpt-4o$|gpt-4o-mini$", 16384),
    (r"gpt-4\.1(?:-mini|-nano)?$", 32768),
    (
        r"gpt-5(?:-mini|-nano|\.1|\.2|\.4|\.4-mini|\.4-nano|\.5|\.6-sol|\.6-terra|\.6-luna)?$",
        128_000,
    ),
    (r"gpt-6\.1-sol$", 128_000),
    (r"o1$|o1-pro$|o3$|o3-pro$|o3-mini$|o4-mini$", 100_000),
    (r"o1-mini$", 65536),
    (r"o1-preview$", 32768),
    (r"claude-3-(?:haiku|sonnet|opus)", 4096),
    (r"claude-3[-.]5-(?:haiku|sonnet)", 8192),
    (r"claude-(?:opus-4-[01]|4-opus)", 32_000),
    (r"claude-(?:sonnet-4-[05]|4-sonnet|haiku-4-5|opus-4-5)", 64_000),
    (r"claude-opus-4-[678]", 128_000),
    (r"claude-(?:opus-5|opus-5-5|sonnet-5|sonnet-5-5|fable-5-1)$", 128_000),
    (r"gemini-1\.5-(?:flash|pro)|gemini-2\.0-flash(?:-lite)?$", 8192),
    (r"gemini-2\.5-(?:flash|flash-lite|pro)$|gemini-3-(?:pro|flash)-preview$", 65536),
)
"""The most that one answer can hold, by the vendors' own pages. What is not here is not known."""

_MAX_OUTPUT_OF = [(re.compile(rf"(?:^|[/.])(?:{names})"), most) for names, most in _MAX_OUTPUT]


def _max_output(model_id: str) -> int | None:
    for pattern, most in _MAX_OUTPUT_OF:
        if pattern.search(model_id.lower()):
            return most
    return None
