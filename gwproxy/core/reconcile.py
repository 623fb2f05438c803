"""Reconciliation: our line for an attempt beside the gateway's log of it, and what follows. Pure.

The gateway's cost is an estimate, and what it says of tokens a hint: a provider's own usage, which
we have read, is never corrected by it. What we only estimated is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from gwproxy.core.records import Rates

SETTLES_WITHIN_MS: Final = 120_000
"""Until then a log may still get its figures, or the database its row."""


class Kind(StrEnum):
    """What a line is found to be."""

    EQUAL = "equal"
    OURS_ONLY = "ours_only"
    THEIRS_ONLY = "theirs_only"
    TOKENS_DIFFER = "tokens_differ"
    PRICE_DIFFERS = "price_differs"
    CACHED = "cached"
    NO_USAGE = "no_usage"
    DOCTOR = "doctor"
    TOO_OLD = "too_old"
    PENDING = "pending"


WORDS: Final = {
    Kind.EQUAL: "equal",
    Kind.OURS_ONLY: "ours only",
    Kind.THEIRS_ONLY: "theirs only",
    Kind.TOKENS_DIFFER: "tokens differ",
    Kind.PRICE_DIFFERS: "price differs",
    Kind.CACHED: "cached by the gateway",
    Kind.NO_USAGE: "no usage upstream",
    Kind.DOCTOR: "asked by the doctor",
    Kind.TOO_OLD: "too old for the log",
    Kind.PENDING: "not settled yet",
}
AGREED: Final = frozenset({Kind.EQUAL, Kind.CACHED, Kind.DOCTOR, Kind.TOO_OLD, Kind.PENDING})
"""Kinds that nobody has to look at."""
EXPLAINED: Final = AGREED | {Kind.NO_USAGE}
"""And those that nobody can do anything about: where the log has no tokens, ours stand."""
LEFT_OUT: Final = "the log leaves reasoning out"
"""Why a line is equal whose costs are not."""
DOCTOR: Final = "doctor-"
"""So the names begin that the doctor gives to its questions, which are in no ledger."""


class Ours(msgspec.Struct, frozen=True, gc=False):
    """One attempt of a request, as our ledger has it."""

    lsn: int
    t: int
    """Of the request's admission, in milliseconds since 1970."""
    request_id: str
    attempt: int
    """0: the request has no attempts on record, and any of the log's may be its own."""
    final: bool
    """The last one: the request's own log id and tokens are its."""
    provider: str
    model: str
    outcome: str | None
    """None: the request is open."""
    source: str
    cost: int
    """Nano-USD, of this attempt."""
    input: int | None
    """All input tokens; None: the request's tokens are of more than one attempt."""
    output: int
    reasoning: int
    rates: Rates | None
    log_id: str
    status: int | None


class Theirs(msgspec.Struct, frozen=True, gc=False):
    """One row of the gateway's log."""

    id: str
    t: int
    provider: str
    model: str
    success: bool
    cached: bool
    status: int | None
    input: int | None
    output: int | None
    cost: int | None
    """Nano-USD, rounded to the nearest."""
    request_id: str | None
    attempt: int | None
    duration_ms: int | None

    @property
    def has_usage(self) -> bool:
        return self.input is not None and self.output is not None and self.input + self.output > 0


Price = Callable[[Ours, int, int], int | None]
"""What so many tokens in and out cost by our own prices, in nano-USD; None: no price."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `theirs_cost` None: their side has none."""

    kind: Kind
    ours_cost: int
    theirs_cost: int | None
    why: str = ""
    real_cost: int | None = None
    """What our line should have cost; None: what it says, or nobody knows."""


# -- one line --------------------------------------------------------------------------------------

_UNSURE: Final = frozenset({"unknown", "recovered"})
"""Outcomes that nobody saw the end of: what is charged is a guess."""

_COUNTED: Final = frozenset({"completed", "truncated"})
"""Outcomes that are charged what the answer used; where the provider did not say how much, our own
count. Who left, or was cut off, pays for what he got, whatever else was made."""


def compare(ours: Ours, theirs: Sequence[Theirs], price: Price, now_ms: int) -> Finding:
    """One attempt and its rows of the log: one or none; several of a request without attempts."""
    if not theirs:
        return _alone(ours, now_ms)
    if ours.outcome is None:
        return Finding(Kind.PENDING, 0, _cost(theirs), "the request is still open")
    if all(row.cached for row in theirs):
        real = 0 if ours.cost else None
        return Finding(Kind.CACHED, ours.cost, 0, "the gateway's own cache answered", real)
    if not any(row.has_usage for row in theirs):
        return _without_usage(ours, theirs, now_ms)
    if corrects(ours):
        return _corrected(ours, theirs, price)
    return _both(ours, theirs[0])


def corrects(ours: Ours) -> bool:
    """Whether our cost is a guess that the log may better."""
    if ours.outcome in _UNSURE:
        return True
    return ours.source in ("counted", "estimated") and ours.outcome in _COUNTED


def _alone(ours: Ours, now_ms: int) -> Finding:
    if ours.outcome is None or now_ms - ours.t < SETTLES_WITHIN_MS:
        return Finding(Kind.PENDING, ours.cost, None, "younger than the log's delay")
    if not ours.cost and (ours.outcome in ("failed", "void") or not ours.final):
        return Finding(Kind.EQUAL, 0, None, "it never got as far as a provider")
    if ours.outcome in _UNSURE and ours.cost:
        return Finding(Kind.OURS_ONLY, ours.cost, None, "it may never have reached the gateway")
    return Finding(Kind.OURS_ONLY, ours.cost, None, "the gateway has no log of it")


def _without_usage(ours: Ours, theirs: Sequence[Theirs], now_ms: int) -> Finding:
    their_cost = _cost(theirs)
    if not any(row.success for row in theirs):
        if not ours.cost:
            return Finding(Kind.EQUAL, 0, their_cost, "the provider refused it")
        if ours.outcome in _UNSURE:
            words = "the provider refused it, and nobody was there to hear it"
            return Finding(Kind.NO_USAGE, ours.cost, their_cost, words, 0)
    elif now_ms - max(row.t for row in theirs) < SETTLES_WITHIN_MS:
        return Finding(Kind.PENDING, ours.cost, their_cost, "the log has no figures yet")
    if not ours.cost and not their_cost:
        return Finding(Kind.EQUAL, 0, their_cost)
    return Finding(Kind.NO_USAGE, ours.cost, their_cost, f"we charged what was {ours.source}")


def _corrected(ours: Ours, theirs: Sequence[Theirs], price: Price) -> Finding:
    """What we guessed, by the log's tokens at our own prices; where we have none, by its cost."""
    real = 0
    for row in theirs:
        if row.cached or not row.has_usage:
            continue
        own = price(ours, row.input or 0, row.output or 0)
        if own is None and row.cost is None:
            return Finding(Kind.NO_USAGE, ours.cost, None, "there is no price for its tokens")
        real += own if own is not None else row.cost or 0
    if real == ours.cost:
        return Finding(Kind.EQUAL, ours.cost, _cost(theirs))
    words = f"charged as {ours.outcome}, {ours.source}; the log has what was used"
    return Finding(Kind.TOKENS_DIFFER, ours.cost, _cost(theirs), words, real)


def _both(ours: Ours, theirs: Theirs) -> Finding:
    expected = ours.cost
    if ours.input is None:
        # Which attempt used which tokens is not on record: the costs alone are compared.
        if theirs.cost is None or _near(theirs.cost, ours.cost):
            return Finding(Kind.EQUAL, ours.cost, theirs.cost)
        return Finding(
            Kind.PRICE_DIFFERS, ours.cost, theirs.cost, "costs of one attempt of several"
        )
    hidden = ours.output - (theirs.output or 0)
    if theirs.input != ours.input or hidden not in (0, ours.reasoning):
        words = (
            f"{ours.input} in and {ours.output} out here, "
            f"{theirs.input} in and {theirs.output} out there"
        )
        if ours.source != "provider":
            words += f"; {ours.outcome}: charged for what was passed on"
        return Finding(Kind.TOKENS_DIFFER, ours.cost, theirs.cost, words)
    if theirs.cost is None:
        return Finding(Kind.EQUAL, ours.cost, None, "the log has no cost")
    why = ""
    if hidden and ours.rates is not None:
        # Their figures leave reasoning out, and so does their cost.
        expected -= hidden * ours.rates[3] // 1000
        why = LEFT_OUT
    if _near(theirs.cost, expected):
        return Finding(Kind.EQUAL, ours.cost, theirs.cost, why)
    return Finding(Kind.PRICE_DIFFERS, ours.cost, theirs.cost, "the same tokens at another price")


def _near(one: int, other: int) -> bool:
    """Equal but for what a binary float and our rounding upwards make of it."""
    return abs(one - other) <= 10 + max(abs(one), abs(other)) // 1_000_000


def _cost(theirs: Sequence[Theirs]) -> int | None:
    costs = [row.cost for row in theirs if row.cost is not None]
    return sum(costs) if costs else None


# -- rows of theirs that no line of ours took ------------------------------------------------------


def unclaimed(theirs: Theirs, *, known: bool, now_ms: int) -> Finding:
    """A row of the log that belongs to no attempt of ours. `known`: its request is one of ours."""
    if not known and theirs.request_id is not None and theirs.request_id.startswith(DOCTOR):
        return Finding(Kind.DOCTOR, 0, theirs.cost, "asked by gwproxy doctor")
    if now_ms - theirs.t < SETTLES_WITHIN_MS and theirs.request_id is not None:
        return Finding(Kind.PENDING, 0, theirs.cost, "too young to be missed")
    if known and not theirs.cost:
        return Finding(Kind.EQUAL, 0, theirs.cost, "a second try of one of our requests, unbilled")
    if theirs.request_id is None:
        words = "not made by gwproxy, or without its metadata"
    elif known:
        words = "a second record of one of our attempts"
    else:
        words = "a request that our ledger does not have"
    return Finding(Kind.THEIRS_ONLY, 0, theirs.cost, words)


# -- one request -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Correction:
    """What a request is charged now and what it should be: nano-USD."""

    request_id: str
    charged: int
    cost: int
    reason: str


def correction(
    lines: Sequence[tuple[Ours, Finding]], adjusted: int, *, log_is_whole: bool
) -> tuple[Correction | None, bool]:
    """What follows for a request from the findings of its attempts, and whether that was done.

    `adjusted` is what was added to its cost before; `log_is_whole`: the log was there all the time
    around it, so that what it does not have never got there.
    """
    real = 0
    reasons = []
    for ours, finding in lines:
        guess = ours.outcome in _UNSURE and ours.cost
        if finding.real_cost is not None:
            real += finding.real_cost
            reasons.append(finding.why)
        elif log_is_whole and finding.kind is Kind.OURS_ONLY and guess:
            reasons.append("the gateway never got it")
        else:
            real += ours.cost
    charged = sum(ours.cost for ours, _ in lines) + adjusted
    if not reasons:
        return None, False
    if real == charged:
        return None, bool(adjusted)
    return Correction(lines[0][0].request_id, charged, real, reasons[-1]), False
