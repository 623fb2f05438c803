"""What would have been: calls as they were made, under other limits, prices or providers. Pure.

A call is refused here when what it really cost would not have fitted; the gateway holds what it may
cost at most, so that it refuses no later than this says.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from gwproxy.core.period import periods
from gwproxy.core.usage import Usage


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it was. `t` is milliseconds since 1970."""

    t: int
    user_id: str
    org_id: str
    key_id: str
    provider: str
    model: str
    usage: Usage
    cost: int | None
    """Nano-USD, as charged; None: nobody charged it."""
    by_tokens: bool = True
    """False: a hold, an estimate or a correction, which `usage` at a price does not come to."""

    def accounts(self) -> tuple[str, ...]:
        return f"key:{self.key_id}", f"user:{self.user_id}", f"org:{self.org_id}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is to be different. `limits` are a month's, in nano-USD, by account (`user:alice`) or by
    kind (`user`, each of them); `chain` are (provider, model) in their order, empty: as it was."""

    limits: Mapping[str, int] = field(default_factory=dict)
    chain: Sequence[tuple[str, str]] = ()
    failover: Fraction = Fraction(0)
    """The part of the calls that goes on to the next of the chain."""


Price = Callable[[str, str, Usage, int], int | None]
"""What a provider's model would cost for a usage at a time, in nano-USD; None: no price."""


@dataclass(slots=True)
class Served:
    calls: int = 0
    input: int = 0
    output: int = 0
    was: int = 0
    would_be: int = 0


@dataclass(slots=True)
class Refused:
    calls: int = 0
    users: set[str] = field(default_factory=set)
    first: int | None = None
    """When, in milliseconds since 1970."""


@dataclass(slots=True)
class Outcome:
    served: dict[tuple[str, str], Served] = field(default_factory=dict)
    """By provider and model."""
    refused: dict[str, Refused] = field(default_factory=dict)
    """By the account that was full."""
    all_refused: Refused = field(default_factory=Refused)
    unpriced: dict[tuple[str, str], int] = field(default_factory=dict)
    limited: set[str] = field(default_factory=set)
    """The limits of which any call was."""
    otherwise: Served = field(default_factory=Served)
    """Of `served`, the calls that were not charged by their tokens."""
    was: int = 0
    would_be: int = 0


def simulate(
    calls: Iterable[Call], scenario: Scenario, price: Price, standing: Price | None = None
) -> Outcome:
    """`calls` in the order of their time; `standing` is the price as it is, where another is asked
    for."""
    outcome = Outcome()
    standing = standing or price
    spent: dict[tuple[str, str], int] = {}
    for number, call in enumerate(calls):
        was = call.cost or 0
        outcome.was += was
        provider, model = _served_by(call, number, scenario)
        asked = price(provider, model, call.usage, call.t)
        if asked is None:
            place = (provider, model)
            outcome.unpriced[place] = outcome.unpriced.get(place, 0) + 1
            cost = was
        else:
            stood = standing(call.provider, call.model, call.usage, call.t)
            same = (provider, model) == (call.provider, call.model) and asked == stood
            cost = _cost(call, asked, stood, same=same)
        month = periods(call.t)[0]
        outcome.limited.update(_limit_of(account, scenario.limits) for account in call.accounts())
        full = _full(call, cost, month, spent, scenario.limits)
        if full is not None:
            for refused in (outcome.refused.setdefault(full, Refused()), outcome.all_refused):
                refused.calls += 1
                refused.users.add(call.user_id)
                refused.first = call.t if refused.first is None else refused.first
            continue
        for account in call.accounts():
            spent[account, month] = spent.get((account, month), 0) + cost
        by_place = outcome.served.setdefault((provider, model), Served())
        for served in (by_place,) if call.by_tokens else (by_place, outcome.otherwise):
            served.calls += 1
            served.input += call.usage.input_total
            served.output += call.usage.output
            served.was += was
            served.would_be += cost
        outcome.would_be += cost
    return outcome


def _cost(call: Call, asked: int, stood: int | None, *, same: bool) -> int:
    """What a call would cost, whose tokens would be `asked` and are `stood` as prices are now. What
    nothing changes costs what was charged; what was not charged by its tokens is scaled."""
    if call.cost is None:
        return asked
    if same:
        return call.cost
    if call.by_tokens or (not stood and call.cost):
        return asked
    # Upwards, as every charge is rounded.
    return -(-call.cost * asked // stood) if stood else 0


def _served_by(call: Call, number: int, scenario: Scenario) -> tuple[str, str]:
    """The first of the chain; a part of the calls by the second, the same part of these by the
    third. Spread evenly, and exactly so many as the part says."""
    if not scenario.chain:
        return call.provider, call.model
    place = 0
    while place < len(scenario.chain) - 1:
        before = math.floor(number * scenario.failover)
        if math.floor((number + 1) * scenario.failover) == before:
            break
        place, number = place + 1, before
    return scenario.chain[place]


def _limit_of(account: str, limits: Mapping[str, int]) -> str:
    """The name of the limit that an account would have: its own, else that of its kind."""
    return account if account in limits else account.partition(":")[0]


def _full(
    call: Call,
    cost: int,
    month: str,
    spent: Mapping[tuple[str, str], int],
    limits: Mapping[str, int],
) -> str | None:
    """The account on which it would not have fitted."""
    for account in call.accounts():
        limit = limits.get(_limit_of(account, limits))
        if limit is not None and spent.get((account, month), 0) + cost > limit:
            return account
    return None


def example(start_ms: int, chain: Sequence[tuple[str, str]]) -> Iterable[Call]:
    """A month of a small team's: 100 issues, each with 1,000 tokens in and 500 out."""
    provider, model = chain[0]
    for number in range(100):
        # Spread over 28 days, which every month has.
        at = start_ms + number * 28 * 86_400_000 // 100
        usage = Usage(input=1_000, output=500)
        yield Call(at, f"user_{number % 4 + 1}", "team", "key", provider, model, usage, None)
