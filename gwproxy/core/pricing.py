"""The price book: what a token costs, by provider, model and moment. Pure: the compiled table, the
operator's overrides and the time come in as arguments, integer rates go out.

Prices are a provider's standard ones. Batch, flex, priority and other service tiers are not in the
book, so a request for one of them has no price here and has to be refused.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from typing import Any

from gwproxy.core.money import PICOS_PER_NANO, Nanos, Picos, nanos_from_picos, parse_rate
from gwproxy.core.routing import CATALOGUE, Candidate
from gwproxy.core.usage import Usage

_DAY_S = 86_400
_EPOCH = date(1970, 1, 1).toordinal()
_MOST_KNOWN = 4096
"""Names are the callers' own words: past this many the cache starts anew instead of growing."""
_LONGEST_NAME = 256


_ALWAYS_DUE = frozenset({"requests_kcount", "output_image_mtok", "output_video_mtok"})
"""Extras that each call costs: a fee of its own, and answers that are not text."""


# -- rates ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tier:
    """Pico-USD per token for a whole request whose input is above `above_input_tokens`."""

    above_input_tokens: int
    input: Picos
    cache_read: Picos
    cache_write: Picos
    output: Picos
    dearest: Picos = field(init=False, repr=False, compare=False)
    """Of an input token, whichever bucket it comes to be in."""
    rates: tuple[Picos, Picos, Picos, Picos] = field(init=False, repr=False, compare=False)
    """All four, as a record of the ledger has them."""

    def __post_init__(self) -> None:
        rates = (self.input, self.cache_read, self.cache_write, self.output)
        object.__setattr__(self, "dearest", max(rates[:3]))
        object.__setattr__(self, "rates", rates)

    def cost(self, usage: Usage) -> Nanos:
        """Exact, then rounded upwards once."""
        return nanos_from_picos(
            usage.input * self.input
            + usage.cache_read * self.cache_read
            + usage.cache_write * self.cache_write
            + usage.output * self.output
        )


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of one model at one moment. Tiers ascend, and the first one always applies.

    Where a provider names no price for cache reads or writes, those tokens are charged as input.
    `reasoning` is part of the output and costs the same.
    """

    tiers: tuple[Tier, ...]
    hides_reasoning: bool = False
    """It may bill output tokens that never appear in the answer."""
    max_output_tokens: int | None = None
    context_window: int | None = None
    extras: tuple[str, ...] = ()
    """What this provider also charges for and this rate does not hold, by the names of the source:
    `requests_kcount` and what pictures cost are due on each call, others (`web_searches_kcount`,
    `input_audio_mtok`, `cache_write_1h_mtok`) only when the request asks for the thing."""
    listed_as: str = ""
    """The model's name in the table; empty where only an override knows it."""
    overridden: bool = False

    def cost(self, usage: Usage) -> Nanos:
        """What the answer costs."""
        return self.tier(usage.input_total).cost(usage)

    def worst_case(self, input_tokens: int, output_tokens: int) -> Nanos:
        """The most that up to so many tokens can cost: no usage within these bounds costs more.

        Looks at each tier the input can reach, because a dearer one need not be the last, and
        takes all input at its dearest bucket, because a cache is the provider's to use.
        """
        tier = self.tiers[0]
        most = input_tokens * tier.dearest + output_tokens * tier.output
        if len(self.tiers) > 1:
            for tier in self.tiers:
                if input_tokens > tier.above_input_tokens:
                    most = max(most, input_tokens * tier.dearest + output_tokens * tier.output)
        return nanos_from_picos(most)

    def affordable_output(self, input_tokens: int, amount: int) -> int | None:
        """The most output tokens whose worst case, with this input, is within `amount` nano-USD.

        Below 0 when not even the input is; None when output costs nothing.
        """
        most: int | None = None
        for index, tier in enumerate(self.tiers):
            if index == 0 or input_tokens > tier.above_input_tokens:
                rest = amount * PICOS_PER_NANO - input_tokens * tier.dearest
                if rest < 0:
                    return -1
                if tier.output:
                    fitting = rest // tier.output
                    most = fitting if most is None else min(most, fitting)
        return most

    def tier(self, input_total: int) -> Tier:
        """The tier of a whole request with so much input."""
        tiers = self.tiers
        if len(tiers) > 1:
            for tier in reversed(tiers):
                if input_total > tier.above_input_tokens:
                    return tier
        return tiers[0]


@dataclass(frozen=True, slots=True)
class Price:
    """A rate and when it is valid: from a day on, and within hours of the day (UTC)."""

    rate: Rate
    from_day: int | None = None
    """Days since 1970-01-01."""
    hours_s: tuple[int, int] | None = None
    """Seconds of the day, the end excluded; an end before the start goes past midnight."""

    def is_valid(self, at_s: float) -> bool:
        if self.from_day is not None and at_s < self.from_day * _DAY_S:
            return False
        if self.hours_s is None:
            return True
        start, end = self.hours_s
        second = at_s % _DAY_S
        return start <= second < end if start <= end else second >= start or second < end


def _choose(prices: Sequence[Price], at_s: float | None) -> Rate:
    """The last valid price wins, else the first. Without a time: the newest at its dearest hour."""
    if len(prices) == 1:
        return prices[0].rate
    if at_s is not None:
        for price in reversed(prices):
            if price.is_valid(at_s):
                return price.rate
        return prices[0].rate
    newest = []
    for price in reversed(prices):
        newest.append(price.rate)
        if price.hours_s is None:
            break
    return max(newest, key=lambda rate: rate.worst_case(1000, 1000))


# -- the compiled table --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    id: str
    names: tuple[str, ...]
    clauses: tuple[Callable[[str], bool], ...]
    prices: tuple[Price, ...]
    """Empty: the source knows the model and has no price per token for it."""


class _Shelf:
    """One provider's models. The first that matches a name is the one, as in the table's source."""

    def __init__(self, listing: Mapping[str, Any]) -> None:
        self.models = [_model(model_id, row) for model_id, row in listing["models"].items()]
        self.strip: tuple[str, ...] = tuple(listing.get("strip", ()))
        self.fallback: tuple[str, ...] = tuple(listing.get("fallback", ()))
        self._exact: dict[str, int] = {}
        self._patterns: list[tuple[int, Callable[[str], bool]]] = []
        for index, model in enumerate(self.models):
            for name in model.names:
                self._exact.setdefault(name.lower(), index)
            self._patterns += ((index, clause) for clause in model.clauses)

    def find(self, name: str) -> _Model | None:
        """`name` in lower case."""
        found = self._exact.get(name)
        for index, matches in self._patterns:
            if found is not None and index > found:
                break
            if matches(name):
                found = index
                break
        return None if found is None else self.models[found]


def _model(model_id: str, row: Mapping[str, Any]) -> _Model:
    traits = Rate(
        tiers=(),
        hides_reasoning=row.get("reasons", False),
        max_output_tokens=row.get("max_output"),
        context_window=row.get("context"),
        extras=tuple(row.get("extras", ())),
        listed_as=model_id,
    )
    return _Model(
        id=model_id,
        names=tuple(row.get("names", ())),
        clauses=tuple(map(_clause, row.get("match", ()))),
        prices=tuple(_price(price, traits) for price in row["prices"]),
    )


def _price(row: Mapping[str, Any], traits: Rate) -> Price:
    start, hours = row.get("from"), row.get("hours")
    return Price(
        rate=replace(traits, tiers=tuple(Tier(*tier) for tier in row["tiers"])),
        from_day=None if start is None else date.fromisoformat(start).toordinal() - _EPOCH,
        hours_s=None if hours is None else (_second_of_day(hours[0]), _second_of_day(hours[1])),
    )


def _second_of_day(clock: str) -> int:
    hours, minutes = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60


def _clause(clause: Mapping[str, Any]) -> Callable[[str], bool]:
    """A test of a lower-case name, from `{"starts_with": "gpt-4o"}` and its like."""
    ((kind, value),) = clause.items()
    match kind:
        case "regex":
            pattern = re.compile(value)
            return lambda name: pattern.search(name) is not None
        case "or" | "and":
            parts = tuple(map(_clause, value))
            if kind == "or":
                return lambda name: any(part(name) for part in parts)
            return lambda name: all(part(name) for part in parts)
    text = value.lower()
    match kind:
        case "equals":
            return lambda name: name == text
        case "starts_with":
            return lambda name: name.startswith(text)
        case "ends_with":
            return lambda name: name.endswith(text)
        case "contains":
            return lambda name: text in name
    raise ValueError(f"the price table has an unknown way to match a name: {kind}")


_COMPACT_DATE = re.compile(r"-(20\d\d)(\d\d)(\d\d)(?=-|:|$)")


def _dashed_date(name: str) -> str:
    """`gpt-4o-20240513` as `gpt-4o-2024-05-13`, which is how most of these names are listed."""

    def dashed(found: re.Match[str]) -> str:
        try:
            return f"-{date(*map(int, found.groups())).isoformat()}"
        except ValueError:
            return found[0]

    return _COMPACT_DATE.sub(dashed, name)


# -- the book ------------------------------------------------------------------------------------


class PriceBook:
    """Rates by provider and model: overrides first, then the compiled table.

    `table` is the package's `prices.json`. `overrides` maps a name to USD per million tokens,
    `{"input", "output", "cache_read"?, "cache_write"?}`, with `max_output_tokens` and `reasons`
    where the table does not know the model. A name is `provider/model`, or `provider/*` for all
    models of a provider that have no price of their own among the overrides. For a provider that
    the table does not know, the model's own full name (`mock/echo`) will do as well.

    An override replaces the whole price, extras included: the operator answers for it.
    """

    def __init__(
        self,
        table: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        """ValueError, naming the entry, for an override that cannot be read."""
        self._table_version: str = table["version"]
        # Whatever a caller may write before the slash, an operator will write in a price's name.
        self._aliases: Mapping[str, str] = {**CATALOGUE, **table["aliases"]}
        self._shelves = {slug: _Shelf(listing) for slug, listing in table["providers"].items()}
        self._put_on_top({}, overrides or {})

    def with_overrides(self, overrides: Mapping[str, Mapping[str, object]]) -> "PriceBook":
        """The same book with further overrides, which win over those it has. Cheap: the table is
        shared, so that each organization can have a book of its own."""
        if not overrides:
            return self
        book = object.__new__(PriceBook)
        book._table_version = self._table_version
        book._aliases = self._aliases
        book._shelves = self._shelves
        book._put_on_top(self._overrides, overrides)
        return book

    def _put_on_top(
        self, below: Mapping[str, Rate], overrides: Mapping[str, Mapping[str, object]]
    ) -> None:
        self._overrides = {
            **below,
            **{self.canonical(name): _override(name, row) for name, row in overrides.items()},
        }
        self._known: dict[tuple[str, str], tuple[Price, ...]] = {}
        self._lasting: dict[int, tuple[Candidate, Rate]] = {}
        """By the candidate's identity, which the value keeps alive: rates of those that have one
        price for all times, as most have. A path finds its candidates again as they are."""
        self.version = self._table_version
        """Of the table, and of the overrides where there are any: stored with each charge."""
        if self._overrides:
            written = repr(sorted((name, rate) for name, rate in self._overrides.items()))
            self.version += f"+{hashlib.sha256(written.encode()).hexdigest()[:8]}"

    def rate(self, provider: str, model: str, at_s: float | None = None) -> Rate | None:
        """The rate at `at_s` (seconds since 1970, UTC), None when there is no price.

        A request keeps the rate of the moment at which it was reserved. Without a time: the
        newest price, and where prices follow the hour, the dearest of the day.
        """
        prices = self.history(provider, model)
        return _choose(prices, at_s) if prices else None

    def history(self, provider: str, model: str) -> tuple[Price, ...]:
        """Every price of a model with its time, past and future: of those that are valid at some
        moment the last one holds. Empty when there is no price."""
        prices = self._known.get((provider, model))
        return self._look_up(provider, model) if prices is None else prices

    def rate_of(self, candidate: Candidate, at_s: float | None = None) -> Rate | None:
        """The rate of one candidate; None where a call of it could not be priced exactly."""
        lasting = self._lasting.get(id(candidate))
        if lasting is not None and lasting[0] is candidate:
            return lasting[1]
        prices = self.history("", candidate.sent) if candidate.verbatim else ()
        if not prices:
            prices = self.history(candidate.provider.prices, candidate.model)
        if not prices:
            return None
        rate = _choose(prices, at_s)
        # These stand outside the rate. An override replaces the whole price.
        if not rate.overridden and not _ALWAYS_DUE.isdisjoint(rate.extras):
            return None
        if len(prices) == 1:
            if len(self._lasting) >= _MOST_KNOWN:
                self._lasting.clear()
            self._lasting[id(candidate)] = candidate, rate
        return rate

    def providers(self) -> list[str]:
        """Every provider with a table or an override of its own."""
        named = {name.split("/", 1)[0] for name in self._overrides}
        return sorted(named | self._shelves.keys())

    def models(self, provider: str) -> list[str]:
        """The names, one for each priced model, that `rate` knows at this provider."""
        slug = self._aliases.get(provider, provider)
        shelf = self._shelves.get(slug)
        names = {
            name.removeprefix(f"{slug}/")
            for name in self._overrides
            if name.startswith(f"{slug}/") and name != f"{slug}/*"
        }
        for model in shelf.models if shelf else ():
            if not model.prices:
                continue
            for name in (model.id, *model.names):
                if shelf is not None and shelf.find(name.lower()) is model:
                    names.discard(name.lower())  # its override, which has no capitals
                    names.add(name)
                    break
        return sorted(names)

    def overrides(self) -> list[str]:
        """The canonical names of what is overridden, those with a star included."""
        return sorted(self._overrides)

    def canonical(self, name: str) -> str:
        """The name by which an override is found: the provider's one slug, whatever alias the
        operator wrote, and no capitals."""
        provider, slash, model = name.lower().partition("/")
        return f"{self._aliases.get(provider, provider)}{slash}{model}"

    def _look_up(self, provider: str, model: str) -> tuple[Price, ...]:
        if len(provider) + len(model) > _LONGEST_NAME:
            return ()
        slug = self._aliases.get(provider, provider)
        listed = self._listed(slug, model.lower())
        prices = listed.prices if listed else ()
        override = self._overrides.get(f"{slug}/{model}".lower())
        if override is None and slug not in self._shelves:
            override = self._overrides.get(self.canonical(model))
        if override is None:
            override = self._overrides.get(f"{slug}/*".lower())
        if override is not None:
            if listed is not None and listed.prices:
                override = _with_traits_of(listed.prices[-1].rate, override)
            prices = (Price(override),)
        if prices:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[provider, model] = prices
        return prices

    def _listed(self, slug: str, name: str) -> _Model | None:
        shelf = self._shelves.get(slug)
        if shelf is None:
            return None
        names = [name]
        names += (name.removeprefix(start) for start in shelf.strip if name.startswith(start))
        for spelling in dict.fromkeys((*names, *map(_dashed_date, names))):
            for place in (shelf, *(self._shelves[other] for other in shelf.fallback)):
                found = place.find(spelling)
                if found is not None:
                    return found
        return None


_RATES = ("input", "output", "cache_read", "cache_write")
_OVERRIDE_FIELDS = {*_RATES, "max_output_tokens", "reasons"}


def _override(name: str, row: Mapping[str, object]) -> Rate:
    unknown = sorted(set(row) - _OVERRIDE_FIELDS)
    if unknown:
        raise ValueError(f'the price of "{name}" has an unknown field: {unknown[0]}')
    rates: dict[str, Picos] = {}
    for kind in _RATES:
        value = row.get(kind)
        if value is None:
            if kind in ("input", "output"):
                raise ValueError(f'the price of "{name}" needs {kind}, in USD per million tokens')
            continue
        if not isinstance(value, (str, int, Decimal)):
            raise ValueError(f'{kind} of "{name}" must be a decimal number such as "12.34"')
        try:
            rates[kind] = parse_rate(value)
        except ValueError as error:
            raise ValueError(f'{kind} of "{name}" {error}') from None
    most = row.get("max_output_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f'max_output_tokens of "{name}" must be a whole number above 0')
    reasons = row.get("reasons", False)
    if not isinstance(reasons, bool):
        raise ValueError(f'reasons of "{name}" must be true or false')
    tier = Tier(
        above_input_tokens=0,
        input=rates["input"],
        cache_read=rates.get("cache_read", rates["input"]),
        cache_write=rates.get("cache_write", rates["input"]),
        output=rates["output"],
    )
    return Rate((tier,), hides_reasoning=reasons, max_output_tokens=most, overridden=True)


def _with_traits_of(listed: Rate, override: Rate) -> Rate:
    """An override changes what a model costs, not what it is."""
    return replace(
        override,
        hides_reasoning=override.hides_reasoning or listed.hides_reasoning,
        max_output_tokens=override.max_output_tokens or listed.max_output_tokens,
        context_window=listed.context_window,
        listed_as=listed.listed_as,
    )
