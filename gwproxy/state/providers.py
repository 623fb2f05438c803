"""The providers as they are right now: who is left alone, who is asked how often, how they answer.

Memory first; a breaker that changes its state is one record of the journal, and nothing else is.
Who wants to ask a provider enters, and tells at the end what came of it.
"""

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from gwproxy.core import breaker as breakers
from gwproxy.core.breaker import MOVES, Breaker, Event, State
from gwproxy.core.errors import (
    GatewayError,
    NoProviderAvailable,
    NotFound,
    RateLimited,
    StorageUnavailable,
)
from gwproxy.core.limits import Tally, Window, whole_s
from gwproxy.core.outcomes import Effect, Meaning, Outcome
from gwproxy.core.records import Breaker as BreakerRecord
from gwproxy.core.routing import Candidate
from gwproxy.core.trace import Trace
from gwproxy.log import Log
from gwproxy.metrics import Count, Metrics
from gwproxy.state.directory import NOBODY, Author
from gwproxy.state.ledger import Ledger, NotRecorded, RecordUncertain

LOOKED_BACK: Final = 64
"""Attempts of which the recent rates are: as many as one integer has room for."""

PROBE_S: Final = 1.0
"""What a caller is asked to wait for a probe under way: most are over long before they must be."""

_RECENT_MASK: Final = (1 << LOOKED_BACK) - 1

_SMOOTHING: Final = 1 / 16
"""The weight of the newest latency in their running mean."""

GAUGE: Final[Mapping[State, int]] = {
    State.CLOSED: 0,
    State.HALF_OPEN: 1,
    State.OPEN: 2,
    State.DISABLED: 3,
}

OPEN, DISABLED, BUSY = "breaker open", "disabled", "requests a minute"
NOT_ALLOWED, OVER_BUDGET = "not allowed for this key", "over budget"
NO_API, NOT_PRICED = "no such API", "not priced"
"""Why a candidate is passed over."""


class Skip(msgspec.Struct, frozen=True):
    """A candidate that is not asked. `wait_s` is None where waiting does not help."""

    provider: str
    why: str
    wait_s: float | None = None

    def __str__(self) -> str:
        return f"skipped {self.provider}: {self.why}"


class Standing:
    """How one provider stands."""

    __slots__ = ("breaker", "latency_s", "name", "recent", "requests", "rpm", "seen", "successes")

    def __init__(self, name: str, terms: breakers.Terms, rpm: int | None, successes: Count) -> None:
        self.name = name
        self.successes = successes
        self.breaker = Breaker(terms)
        self.requests: Window | None = None
        self.limit(rpm)
        self.recent = 0
        """The last attempts, one bit each, the newest lowest: 1 is one that failed."""
        self.seen = 0
        """Attempts that are told by `recent`, and all before them."""
        self.latency_s = 0.0

    def limit(self, rpm: int | None) -> None:
        """To so many requests a minute."""
        self.rpm = rpm
        self.requests = None if rpm is None else self.requests or Window()

    def count(self, failed: bool) -> None:
        self.recent = (self.recent << 1 | failed) & _RECENT_MASK
        self.seen += 1

    @property
    def failure_rate(self) -> float | None:
        """Of the last attempts that were answered or failed; None before there is one."""
        seen = min(self.seen, LOOKED_BACK)
        return self.recent.bit_count() / seen if seen else None


class Entry:
    """Leave to ask a provider once. One of its methods is called with what came of it."""

    __slots__ = ("_number", "_providers", "_standing", "_tallies")

    def __init__(
        self,
        providers: "Providers",
        standing: Standing,
        number: int,
        tallies: tuple[tuple[Window, Tally], ...] = (),
    ) -> None:
        self._providers = providers
        self._standing = standing
        self._number = number
        self._tallies = tallies

    def answered(self, latency_s: float) -> None:
        """An answer came, or a stream's first words, so long after the attempt began."""
        standing = self._standing
        breaker, before = standing.breaker, standing.breaker.state
        breaker.answered(self._number)
        weight = _SMOOTHING if standing.latency_s else 1.0
        standing.latency_s += (latency_s - standing.latency_s) * weight
        standing.count(False)
        standing.successes.value += 1
        if before is not State.CLOSED:
            self._providers.moved(standing, before, "answered again")

    def ended(self, outcome: Outcome) -> None:
        """The attempt ended otherwise."""
        standing, providers = self._standing, self._providers
        breaker, before = standing.breaker, standing.breaker.state
        match outcome.effect:
            case Effect.ALIVE:
                breaker.alive(self._number)
                standing.count(False)
            case Effect.FAILED:
                breaker.failed(self._number, providers.now(), providers.draw())
                standing.count(True)
            case Effect.NOTHING:
                breaker.left(self._number)
        providers.count(standing.name, outcome)
        providers.moved(standing, before, outcome.reason)

    def completed(self) -> None:
        """A stream that counted came to its end."""
        self._standing.breaker.completed(self._number)

    def broke(self, reason: str) -> None:
        """A stream that counted broke off."""
        standing, providers = self._standing, self._providers
        before = standing.breaker.state
        standing.breaker.broke(self._number, providers.now(), providers.draw())
        providers.moved(standing, before, reason)

    def left(self) -> None:
        """Nothing was learned: the client has left, or we are shutting down."""
        self._standing.breaker.left(self._number)

    def withdraw(self) -> None:
        """The provider was not asked after all."""
        self.left()
        for window, tally in self._tallies:
            window.take_back(tally, 1)


class Providers:
    """All of them, by name. Made on first use; names come from the configuration and the
    catalogue alone, so there are never many."""

    def __init__(
        self,
        ledger: Ledger,
        now: Callable[[], float],
        *,
        names: Iterable[str],
        known: Iterable[str] = (),
        terms: breakers.Terms,
        rpm: Mapping[str, int],
        ceiling: int | None,
        draw: Callable[[], float],
        durable: Callable[[int], Awaitable[None]],
        metrics: Metrics,
        log: Log,
    ) -> None:
        """`names` are configured, `known` those that are served without. `now` gives monotonic
        seconds, `draw` numbers from [0, 1). `ceiling` is of requests a minute over all."""
        self.now = now
        self.draw = draw
        self._ledger = ledger
        self._requests: Window | None = None
        self._durable = durable
        self._metrics = metrics
        self._log = log
        self._standings: dict[str, Standing] = {}
        self.configure(names=names, known=known, terms=terms, rpm=rpm, ceiling=ceiling)

    def configure(
        self,
        *,
        names: Iterable[str],
        known: Iterable[str],
        terms: breakers.Terms,
        rpm: Mapping[str, int],
        ceiling: int | None,
    ) -> None:
        """This holds from here on. How a provider stands, and what was asked of it in the last
        minute, stays."""
        self._known = frozenset(known)
        self._terms = terms
        self._rpm = rpm
        self._ceiling = ceiling
        self._requests = None if ceiling is None else self._requests or Window()
        for standing in self._standings.values():
            standing.breaker.terms = terms
            standing.limit(rpm.get(standing.name))
        for name in (*names, *(self._known & self._ledger.state.breakers.keys())):
            self.of(name)

    def of(self, name: str) -> Standing:
        standing = self._standings.get(name)
        if standing is None:
            successes = self._metrics.provider_attempt(name, Meaning.SUCCESS.value)
            standing = Standing(name, self._terms, self._rpm.get(name), successes)
            self._standings[name] = standing
            self._restore(standing)
            self._metrics.breaker_state(name).value = GAUGE[standing.breaker.state]
        return standing

    def all(self) -> list[Standing]:
        return [self._standings[name] for name in sorted(self._standings)]

    def named(self, name: str) -> Standing:
        """One that is there; NotFound."""
        if name not in self._standings and name not in self._known:
            shown = ", ".join(sorted(self._standings)) or "none"
            raise NotFound(f"There is no provider of this name. Known: {shown}.")
        return self.of(name)

    # -- before an attempt -------------------------------------------------------------------------

    def available(self, chain: Sequence[Candidate], trace: Trace) -> Sequence[Candidate]:
        """Those of a chain that may be asked now. Raises what the caller is told when it is none:
        nothing has been held or recorded for him then."""
        skips = []
        for candidate in chain:
            skip = self._passes_over(candidate.provider.name)
            if skip is not None:
                skips.append(skip)
        if not skips:
            return chain
        self.tell(trace, skips)
        if len(skips) == len(chain):
            raise unavailable(trace.wait_s, busy=all(skip.why == BUSY for skip in skips))
        over = {skip.provider for skip in skips}
        return [each for each in chain if each.provider.name not in over]

    def enter(self, name: str) -> Entry | Skip:
        """Leave to ask a provider, or why it is not asked."""
        standing = self.of(name)
        breaker = standing.breaker
        if breaker.state is State.CLOSED and standing.requests is None and self._requests is None:
            return Entry(self, standing, breaker.number)
        skip = self._passes_over(name)
        if skip is not None:
            return skip
        now, before = self.now(), breaker.state
        number = breaker.ask(now)
        assert number is not None, "it was looked at in this very step"
        windows = (standing.requests, self._requests)
        tallies = tuple([(each, each.add(now, 1)) for each in windows if each is not None])
        self.moved(standing, before, "the open time is over")
        return Entry(self, standing, number, tallies)

    def tell(self, trace: Trace, skips: Iterable[Skip]) -> None:
        """Note who was passed over, for the log, the metrics and the receipt."""
        for skip in skips:
            trace.skipped = (*trace.skipped, str(skip))
            self._metrics.skipped(skip.provider, skip.why).value += 1
            if skip.wait_s is not None:
                trace.wait_s = min(skip.wait_s, trace.wait_s)

    def _passes_over(self, name: str) -> Skip | None:
        standing = self.of(name)
        breaker, ours = standing.breaker, self._requests
        if breaker.state is State.CLOSED and standing.requests is None and ours is None:
            return None
        now = self.now()
        if not breaker.may_ask(now):
            why = DISABLED if breaker.state is State.DISABLED else OPEN
            until_s = breaker.wait_s(now)
            if until_s is not None and breaker.state is State.HALF_OPEN:
                until_s = min(until_s, PROBE_S)
            return Skip(name, why, until_s)
        wait_s = 0.0
        if standing.requests is not None and standing.rpm is not None:
            wait_s = standing.requests.wait_s(now, 1, standing.rpm)
        if ours is not None and self._ceiling is not None:
            wait_s = max(wait_s, ours.wait_s(now, 1, self._ceiling))
        return Skip(name, BUSY, wait_s) if wait_s else None

    # -- what came of it ---------------------------------------------------------------------------

    def count(self, name: str, outcome: Outcome) -> None:
        self._metrics.provider_attempt(name, outcome.meaning.value).value += 1

    def attempts(self, name: str) -> dict[str, int]:
        """How attempts ended since the start, by their meaning."""
        return {
            meaning.value: int(self._metrics.provider_attempt(name, meaning.value).value)
            for meaning in Meaning
        }

    def used(self, standing: Standing) -> int | None:
        """Requests of the last minute, where they are counted."""
        return None if standing.requests is None else standing.requests.used(self.now())

    # -- transitions -------------------------------------------------------------------------------

    def moved(self, standing: Standing, before: State, why: str) -> None:
        """Record and tell a transition, if there was one."""
        after = standing.breaker.state
        if after is before:
            return
        # What could not be recorded is only not known after a restart; the next one is, again.
        with contextlib.suppress(StorageUnavailable):
            self._record(standing, before, after, why)
        self._told(standing, before, why)

    async def disable(self, name: str, by: Author) -> Standing:
        """Leave a provider alone until further notice. It holds at once, recorded or not;
        StorageUnavailable says so where it is not."""
        standing = self.named(name)
        before = standing.breaker.state
        standing.breaker.disable()
        if standing.breaker.state is before:
            return standing
        why = f"disabled by {by.actor}"
        self._told(standing, before, why)
        ledger = self._ledger

        def record() -> None:
            if standing.breaker.state is State.DISABLED:
                self._record(standing, before, State.DISABLED, why, by)

        try:
            ledger.pay()
            record()
        except RecordUncertain as error:
            raise StorageUnavailable(_UNSURE, retry_after_s=error.retry_after_s) from error
        except NotRecorded as error:
            ledger.must(record)
            raise StorageUnavailable(_NOT_RECORDED, retry_after_s=error.retry_after_s) from error
        await self._durable(ledger.state.lsn)
        return standing

    async def enable(self, name: str, by: Author) -> Standing:
        """Undo `disable`: it starts as one that has never failed."""
        return await self._admit(name, Event.ENABLE, f"enabled by {by.actor}", by)

    async def reset(self, name: str, by: Author) -> Standing:
        """Forget the failures of a provider. One that is disabled stays so."""
        return await self._admit(name, Event.RESET, f"reset by {by.actor}", by)

    async def _admit(self, name: str, event: Event, why: str, by: Author) -> Standing:
        """What lets more in has to be recorded first; StorageUnavailable, and nothing changed."""
        standing = self.named(name)
        breaker, before = standing.breaker, standing.breaker.state
        after = MOVES[before].get(event, before)
        if after is not before:
            self._ledger.pay()
            try:
                self._record(standing, before, after, why, by)
            except RecordUncertain as error:
                self._apply(breaker, event)
                self._told(standing, before, why)
                raise StorageUnavailable(_UNSURE, retry_after_s=error.retry_after_s) from error
        self._apply(breaker, event)
        if after is not before:
            self._told(standing, before, why)
            await self._durable(self._ledger.state.lsn)
        return standing

    @staticmethod
    def _apply(breaker: Breaker, event: Event) -> None:
        if event is Event.ENABLE:
            breaker.enable()
        else:
            breaker.reset()

    def _record(
        self, standing: Standing, before: State, after: State, why: str, by: Author = NOBODY
    ) -> None:
        ledger = self._ledger
        until = 0
        if after is State.OPEN:
            until = ledger.now_ms() + int((standing.breaker.until - self.now()) * 1000)
        ledger.post(
            BreakerRecord(
                **ledger.stamp(),
                provider=standing.name,
                before=before,
                after=after,
                until=until,
                why=why,
                actor=by.actor,
                address=by.address,
                request_id=by.request_id,
            )
        )

    def _told(self, standing: Standing, before: State, why: str) -> None:
        name, after, log = standing.name, standing.breaker.state, self._log
        self._metrics.breaker_state(name).value = GAUGE[after]
        self._metrics.breaker_transition(name, before, after).value += 1
        level = "warning" if after in (State.OPEN, State.DISABLED) else "info"
        log.event(
            level,
            "Circuit breaker state transition",
            provider=name,
            why=why,
            **{"from": before.value, "to": after.value},
        )
        match before, after:
            case _, State.OPEN:
                log.event(
                    "error",
                    "Circuit breaker opened due to failures",
                    provider=name,
                    reason=why,
                    open_s=round(standing.breaker.until - self.now(), 3),
                )
            case State.OPEN, State.HALF_OPEN:
                log.event(
                    "info",
                    "Circuit breaker transitioning from OPEN to HALF_OPEN",
                    provider=name,
                )
            case State.HALF_OPEN, State.CLOSED if not why.startswith("reset"):
                log.event(
                    "info",
                    "Circuit breaker closed after successful recovery",
                    provider=name,
                )

    def _restore(self, standing: Standing) -> None:
        record = self._ledger.state.breakers.get(standing.name)
        if record is None:
            return
        remaining_s = (record.until - self._ledger.now_ms()) / 1000
        # Never longer than a whole open time, whatever clock the record was written by.
        until = self.now() + min(max(0.0, remaining_s), self._terms.open_s)
        standing.breaker.restore(State(record.after), until)


def unavailable(wait_s: float, *, busy: bool = False) -> GatewayError:
    """What a caller is told where every candidate was passed over. `busy`: all of them for the
    requests that they have had this minute."""
    retry_after_s = None if wait_s == math.inf else whole_s(wait_s)
    if busy:
        return RateLimited(
            "This gateway's own limit of requests a minute to the model's provider is reached.",
            retry_after_s=retry_after_s,
        )
    return NoProviderAvailable(
        "No provider of this model is available at the moment.", retry_after_s=retry_after_s
    )


_NOT_RECORDED: Final = "In force at once, but not recorded yet: a restart now would undo it."
_UNSURE: Final = "In force at once, but it is not known whether it was recorded: send it again."
