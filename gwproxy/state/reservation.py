"""One admitted request: what is held for it, what it has consumed, and its one settlement.

An `async with` whose exit settles, so that no way out of a request can forget to. No `await`
between a decision and its effect.
"""

import asyncio
import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import msgspec
from msgspec.structs import astuple

from gwproxy.core.errors import GatewayError
from gwproxy.core.holds import Ask, Plan, Short, plan, step
from gwproxy.core.identity import OnExhausted, Organization, Principal, UnboundedPolicy
from gwproxy.core.ledger import Account, Balance, Hold, left
from gwproxy.core.meter import Meter
from gwproxy.core.pricing import Rate, Tier
from gwproxy.core.records import NO_TOKENS, Attempt, Held, Mark, Rates, Settle, Tokens, Tried
from gwproxy.core.request import ModelRequest
from gwproxy.core.routing import Candidate
from gwproxy.core.tokens import scale
from gwproxy.core.trace import Attempt as Trial
from gwproxy.core.trace import Trace
from gwproxy.core.usage import Usage
from gwproxy.state.accounts import Accounts, Figures, Payer, tightest
from gwproxy.state.keyring import Keyring
from gwproxy.state.ledger import Ledger
from gwproxy.state.rates import Admission

EXACT_PROMPT_BYTES: Final = 256 * 1024
"""A prompt that must be counted after the fact is counted exactly up to this size (about 15 ms);
a larger one by its bytes, so that one settlement cannot hold up every other stream."""

CLIENT_LEFT_STATUS: Final = 499
"""nginx's word for a client that left; no response carries it."""

_NEVER: Final = 1 << 62
"""A watermark that is never reached."""


class Outcome(enum.StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"  # no provider answered
    CLIENT_LEFT = "client_left"
    TRUNCATED = "truncated"  # the upstream ended in the middle
    CUT = "cut"  # the budget or our own process ended in the middle
    UNKNOWN = "unknown"  # sent, and nothing came back
    VOID = "void"  # admitted, and never sent


class _Stage(enum.Enum):
    """How far the attempt under way has come: it decides who pays for what."""

    NOT_SENT = enum.auto()
    SENT = enum.auto()
    ANSWERING = enum.auto()


class Priced(msgspec.Struct, frozen=True):
    """A candidate with the rate of the moment of its quote, and what is asked of it."""

    candidate: Candidate
    rate: Rate
    ask: Ask
    answer_factor: int
    """What the model's provider reports for 1000 tokens of an answer that we count."""
    prompt_factor: int
    """And of a prompt."""


class Planned(msgspec.Struct, frozen=True):
    """A candidate that the budget has room for, and how much of it is set aside."""

    priced: Priced
    plan: Plan


class Quote(msgspec.Struct, frozen=True):
    """The candidates of one request that have a price, in the order to be tried."""

    request: ModelRequest
    priced: tuple[Priced, ...]
    price_version: str
    counted: int | None
    """The prompt's tokens by our own tokenizer, where they had to be counted."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What all reservations share."""

    ledger: Ledger
    keyring: Keyring
    accounts: Accounts
    count: Callable[[str], int]
    """The tokenizer's."""
    durable: Callable[[int], Awaitable[None]]
    """Returns when the record of this LSN is as safe as the configuration wants it."""
    settled: Callable[["Reservation", Sequence["Spent"], int], None]
    """Told of each settlement, with its overrun in nano-USD."""


class Spent(msgspec.Struct, frozen=True):
    """What one attempt has consumed, and who says so."""

    priced: Priced
    usage: Usage
    tokens: Tokens
    """The same as a record has it."""
    tier: Tier
    source: str
    cost: int

    @property
    def account(self) -> str:
        return f"provider:{self.priced.candidate.provider.name}"


class Reservation(msgspec.Struct, eq=False):
    """One admitted request. Leaving its `with` settles whatever was metered, once."""

    _desk: Desk
    principal: Principal
    quote: Quote
    chain: list[Planned]
    plan: Plan
    """Of the attempt under way, or of the first."""
    rates: Admission
    periods: tuple[str, str]
    lsn: int
    trace: Trace
    degraded: bool
    meter: Meter | None = None
    mark: int = 0
    """So many tokens may be relayed as it stands; before any more, `extend` is asked."""
    scarce: bool = False
    """The end of what is held is near: of several events at once some may fit and some not."""
    outcome: Outcome | None = None
    cached: bool = False
    """The upstream answered from its own cache, for which it charges nothing."""
    notes: tuple[str, ...] = ()
    """For the receipt: what has to be said beside the figures."""
    _priced: Priced | None = None
    _stage: _Stage = _Stage.NOT_SENT
    _settled: bool = False
    _status: int = 200
    _spent: list[Spent] = []
    """By attempts that were sent and never answered, and in the end by the one that was."""
    _fits: int = _NEVER

    async def __aenter__(self) -> Self:
        try:
            await self._desk.durable(self.lsn)
        except BaseException:
            self._status = 0
            self._settle(Outcome.VOID)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._broke_off(error)
        self.settle()

    def _broke_off(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            if self.outcome is None:
                # Cancelled by the server, or found out by us on writing to a closed connection.
                self.outcome = Outcome.CLIENT_LEFT
                self._status = CLIENT_LEFT_STATUS
        else:
            self._status = error.status if isinstance(error, GatewayError) else 500
            if self.outcome is None and self._stage is _Stage.ANSWERING:
                self.outcome = Outcome.TRUNCATED

    # -- told by dispatch and relay ----------------------------------------------------------

    def attempt(self, planned: Planned) -> Meter:
        """The attempt's bytes are about to leave, or to leave once more: with a meter anew."""
        self._priced = planned.priced
        self.plan = planned.plan
        self._stage = _Stage.NOT_SENT
        self._fits = _NEVER
        self.cached = False
        self.mark = 0
        meter = self.meter = self.quote.request.meter(self._desk.count)
        return meter

    async def next(self, planned: Planned, why: str) -> Planned | None:
        """Hold for a later candidate instead of the one before; None: it does not fit.

        Its record is in the journal when this returns. StorageUnavailable where it cannot be.
        """
        desk, priced = self._desk, planned.priced
        ledger, accounts = desk.ledger, desk.accounts
        provider = priced.candidate.provider.name
        ledger.pay()
        hold = self._hold()
        before = self._cost_so_far()
        account = accounts.provider(provider, self.periods[1])
        found = plan(
            priced.ask,
            priced.rate,
            self._payer().organization.unbounded_policy,
            self._room(hold, account),
            accounts.terms.default_max_output_tokens,
        )
        if isinstance(found, Short):
            return None
        ledger.post(
            Attempt(
                **ledger.stamp(),
                r=self.lsn,
                n=len(self.trace.attempts) + 1,
                provider=provider,
                upstream_model=priced.candidate.model,
                cost=before,
                why=why,
                holds=self._holds(hold, before + found.cost, account, found.cost),
                hidden=priced.ask.hidden,
            )
        )
        await desk.durable(ledger.state.lsn)
        return Planned(priced, found)

    def sent(self) -> None:
        """The attempt's bytes are leaving: from here on the upstream may bill."""
        self._stage = _Stage.SENT

    def answering(self) -> None:
        """The upstream accepted the request: what it answers is paid for."""
        self._stage = _Stage.ANSWERING

    def refused(self) -> None:
        """The upstream answered with an error status: it bills nothing."""
        self._stage = _Stage.NOT_SENT

    def unanswered(self) -> None:
        """The attempt ended without an answer: billed is what it says itself, or else its prompt
        may have been."""
        meter = self.meter
        if meter is not None and meter.usage is not None and not meter.partial:
            self._spend(meter.usage, "provider")
        else:
            self._spend(Usage(input=self._prompt_tokens()), "estimated")
        self._stage = _Stage.NOT_SENT

    def extend(self) -> None:
        """More is about to be relayed than the watermark allows: record a higher one first.

        Raises what the client is to be told where the budget has no room for it.
        """
        assert self.meter is not None and self._priced is not None
        rate, ask, candidate = self._priced.rate, self._priced.ask, self._priced.candidate
        factor = self._priced.answer_factor
        desk, hold = self._desk, self._hold()
        account = desk.accounts.provider(candidate.provider.name, self.periods[1])
        bound = self.meter.bound()
        wanted = bound + step(self.plan.output)

        within = _units(rate.affordable_output(ask.prompt, self._kept(hold, account)), factor)
        # Where a maximum was sent, what is held is enough. Near its end only the exact count can
        # tell: the bound is above it by some hundred tokens.
        if bound < within or (not self.plan.grows and self.meter.counted() <= within):
            self.scarce = self.plan.grows and within <= wanted
            if ask.hidden:
                self.mark = within  # recovery charges all that is held: no record says more
            elif self.mark < within:
                self._set_mark(hold, account, min(wanted, within))
            return
        if not self.plan.grows:
            # A declared or sent maximum, and the upstream goes beyond it: an overrun, and counted.
            self._set_mark(hold, account, wanted)
            return
        desk.ledger.pay()
        room = self._room(hold, account)
        most = _NEVER
        if room is not None:
            # What is held already stays, also where a limit was lowered since.
            most = max(within, _units(rate.affordable_output(ask.prompt, room), factor))
        self.scarce = most <= wanted
        if bound < most:
            self._set_mark(hold, account, min(wanted, most), raising=True)
            return
        organization = self._payer().organization
        if (
            organization.on_exhausted is OnExhausted.FINISH
            or organization.unbounded_policy is UnboundedPolicy.BOUNDED
        ):
            self._set_mark(hold, account, wanted)
            return
        # The bound may be above what was really said by some hundred tokens: now they are counted.
        counted = self.meter.counted()
        if self.mark < most:
            # Also where it does not do: what is charged in the end was held, and nobody else's.
            self._set_mark(hold, account, most, raising=True)
        if counted <= most:
            return  # the watermark stays below the bound, so that the next event is asked for too
        self._fits = most  # what came last is not passed on, and not charged
        more = rate.worst_case(ask.prompt, scale(counted + step(0), factor))
        raise desk.accounts.refuse(
            desk.ledger.state,
            (*self._own(), account),
            max(0, more - self._kept(hold, account)),
            0,
            desk.ledger.now_ms(),
        )

    # -- the end -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Fix what the request cost. A second call changes nothing."""
        outcome = self.outcome
        if outcome is None:
            if self._stage is _Stage.ANSWERING:
                outcome = Outcome.COMPLETED
            else:
                sent = self._spent or self._stage is _Stage.SENT
                outcome = Outcome.UNKNOWN if sent else Outcome.FAILED
        self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        if self._settled:
            return
        self._settled = True
        trace, ledger, spent = self.trace, self._desk.ledger, self._spent
        if self._stage is not _Stage.NOT_SENT:
            self._spend(*self._measure())
        cost, tokens = 0, NO_TOKENS
        for each in spent:
            # One attempt is all that nearly every request has.
            tokens = each.tokens if tokens is NO_TOKENS else _added(tokens, each.tokens)
            trace.source = each.source
            cost += each.cost
        trace.outcome = outcome
        trace.cost_nanos = cost
        trace.price_version = self.quote.price_version
        trace.tokens = tokens

        state, lsn = ledger.state, self.lsn
        overrun = max(0, cost - state.holds[lsn].holds[0].hold)
        rates: Rates | None = None
        notes = self.notes
        if self.cached:
            rates = 0, 0, 0, 0
            notes += ("answered by the upstream's cache, which costs nothing",)
        elif len(spent) == 1:
            rates = spent[0].tier.rates
        ledger.settle(
            Settle(
                lsn=state.lsn + 1,
                t=ledger.now_ms(),
                synced=ledger.journal.synced,
                r=lsn,
                cost=cost,
                tokens=tokens,
                source=trace.source,
                outcome=outcome,
                attempts=tuple([_tried(each) for each in trace.attempts]),
                overrun=overrun,
                status=self._status,
                log_id=trace.log_id,
                rates=rates,
                notes=notes,
            )
        )
        self.rates.finish(sum(tokens[:4]))
        self._desk.settled(self, spent, overrun)

    def _spend(self, usage: Usage, source: str) -> None:
        priced = self._priced
        assert priced is not None, "an attempt that was sent has a candidate"
        tier = priced.rate.tier(usage.input_total)
        cost = 0 if self.cached else tier.cost(usage)
        self._spent.append(Spent(priced, usage, astuple(usage), tier, source, cost))
        attempts = self.trace.attempts
        if attempts:
            attempts[-1].cost += cost

    def _measure(self) -> tuple[Usage, str]:
        """What the attempt under way has consumed, and who says so."""
        meter, priced = self.meter, self._priced
        assert meter is not None and priced is not None, "an attempt that was sent has both"
        reported = meter.usage
        if reported is not None and not meter.partial and self.outcome in (None, Outcome.COMPLETED):
            return reported, "provider"
        if self._stage is _Stage.SENT:
            return Usage(input=self._prompt_tokens()), "estimated"
        counted = scale(min(meter.counted(), self._fits), priced.answer_factor)
        if reported is None:
            return Usage(input=self._prompt_tokens(), output=counted), "counted"
        if counted <= reported.output:
            return reported, "provider"
        # The stream went on after the last running total that the provider gave.
        longer = Usage(
            input=reported.input,
            cache_read=reported.cache_read,
            cache_write=reported.cache_write,
            output=counted,
            reasoning=reported.reasoning,
        )
        return longer, "counted"

    def _prompt_tokens(self) -> int:
        assert self._priced is not None
        request, counted = self.quote.request, self.quote.counted
        if counted is None:
            if request.size_bytes > EXACT_PROMPT_BYTES:
                counted = (request.size_bytes + 3) // 4
            else:
                counted = request.prompt_tokens(self._desk.count)
        return scale(counted, self._priced.prompt_factor)

    @property
    def organization(self) -> Organization:
        """As it is now: a change of it holds for what is under way too."""
        return self._desk.keyring.organization_of(self.principal)

    def figures(self) -> Figures:
        """How the tightest account stands: of the caller's, and of the provider's day."""
        candidate = (self._priced or self.chain[0].priced).candidate
        account = self._desk.accounts.provider(candidate.provider.name, self.periods[1])
        payer = self._payer()
        limited = payer.limited if account.limit is None else (*payer.limited, account)
        return tightest(self._desk.ledger.state, limited or payer.accounts)

    # -- holds -------------------------------------------------------------------------------

    def _hold(self) -> Hold:
        return self._desk.ledger.state.holds[self.lsn]

    def _own(self) -> tuple[Account, ...]:
        """The caller's accounts: fixed by the reserve record, with their limits as they are now."""
        return self._payer().accounts

    def _payer(self) -> Payer:
        return self._desk.accounts.payer(self.principal, self.periods, degraded=self.degraded)

    def _kept(self, hold: Hold, provider: Account) -> int:
        """What is held for the attempt under way on its provider's account. On the caller's own it
        is as much or more: enough for the dearest candidate."""
        return _held_on(hold, provider) - self._cost_so_far(provider)

    def _room(self, hold: Hold, provider: Account) -> int | None:
        """What one attempt at this provider may cost, those before it paid for; None: anything."""
        state = self._desk.ledger.state
        room = left(state, self._own())
        if room is not None:
            room += hold.amount - self._cost_so_far()
        theirs = left(state, (provider,))
        if theirs is not None:
            theirs += self._kept(hold, provider)
            room = theirs if room is None else min(room, theirs)
        return room

    def _cost_so_far(self, provider: Account | None = None) -> int:
        """What the attempts before may have cost, at this provider or at all."""
        return sum(
            [each.cost for each in self._spent if provider is None or provider.name == each.account]
        )

    def _set_mark(self, hold: Hold, account: Account, units: int, *, raising: bool = False) -> None:
        """Record that no more than `units` tokens as the meter counts them will be relayed."""
        assert self._priced is not None
        ledger, ask = self._desk.ledger, self._priced.ask
        output = scale(units, self._priced.answer_factor)
        own = self._priced.rate.worst_case(ask.prompt, output)
        cost = self._cost_so_far() + own
        holds: tuple[Held, ...] = ()
        if raising and own > self._kept(hold, account):
            holds = self._holds(hold, max(hold.amount, cost), account, own)
        record = Mark(**ledger.stamp(), r=self.lsn, tokens=output, cost=cost, holds=holds)
        ledger.post(record)  # of unknown outcome it counts, and allows for nothing
        self.mark = units

    def _holds(self, hold: Hold, amount: int, provider: Account, own: int) -> tuple[Held, ...]:
        """All holds as they stand from now on: `amount` on the caller's accounts, `own` and what
        earlier attempts may have cost on their providers'."""
        state = self._desk.ledger.state
        limits = {each.name: each.limit for each in (*self._own(), provider)}
        wanted = {
            (held.account, held.period): amount
            for held in hold.holds
            if not held.account.startswith("provider:")
        }
        for each in self._spent:
            if each.cost:
                name = each.priced.candidate.provider.name
                earlier = self._desk.accounts.provider(name, provider.period)
                limits[earlier.name] = earlier.limit
                key = (earlier.name, earlier.period)
                wanted[key] = wanted.get(key, 0) + each.cost
        key = (provider.name, provider.period)
        wanted[key] = wanted.get(key, 0) + own
        already = {(held.account, held.period): held.hold for held in hold.holds}
        lines = []
        for key, value in wanted.items():
            balance = state.balances.get(key, _UNUSED)
            limit = limits.get(key[0])
            lines.append(
                Held(
                    *key,
                    value,
                    None if limit is None else limit + balance.credited,
                    balance.spent + balance.held - already.get(key, 0) + value,
                )
            )
        return tuple(lines)


_UNUSED: Final = Balance()


def _held_on(hold: Hold, account: Account) -> int:
    for held in hold.holds:
        if held.account == account.name and held.period == account.period:
            return held.hold
    return 0


def _tried(attempt: Trial) -> Tried:
    return Tried(
        attempt.provider,
        attempt.model,
        attempt.status,
        attempt.error_type,
        attempt.reason,
        int(attempt.duration_s * 1000),
        attempt.cost,
    )


def _units(output: int | None, factor: int) -> int:
    """Tokens as the meter counts them that are surely no more than `output` of the model's own."""
    return _NEVER if output is None else output * 1000 // factor


def _added(one: Tokens, other: Tokens) -> Tokens:
    a, b, c, d, e = (x + y for x, y in zip(one, other, strict=True))
    return a, b, c, d, e
