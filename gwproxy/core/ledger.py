"""The ledger: what is spent and held, per account and period, and how each record changes it.

Pure: `apply` reads nothing but its arguments. The running process, the start after a crash and the
writer of the database all go through it, so that they cannot come to different sums. Nobody else
changes a balance. Amounts are nano-USD.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import msgspec

from gwproxy.core.records import (
    NO_TOKENS,
    Adjust,
    Admin,
    Alert,
    AnyRecord,
    Attempt,
    Breaker,
    Close,
    Held,
    Import,
    Mark,
    Rates,
    Reserve,
    Settle,
    Stop,
    Storage,
    Tokens,
    Tried,
)

T = TypeVar("T")

VOID: Final = "void"
"""The outcome of a request that was refused after its record: it counts nowhere."""

REMEMBERED_MS: Final = 24 * 3600 * 1000
"""So long the keys of changes are known: who sends a request again does so soon."""
REMEMBERED: Final = 100_000
"""The newest of them at most: 30 MB."""

Key = tuple[str, str]
"""An account and a period: ("user:alice", "2026-11")."""


class Balance:
    """One account in one period. It may spend `limit + credited`."""

    __slots__ = ("count", "credited", "held", "spent", "t")

    def __init__(
        self, spent: int = 0, credited: int = 0, count: int = 0, t: int = 0, held: int = 0
    ) -> None:
        """`t`: when it was last charged, granted something or corrected; 0: nobody knows."""
        self.t = t
        self.spent = spent
        self.credited = credited
        self.count = count
        self.held = held

    def figures(self) -> tuple[int, int, int, int]:
        return self.spent, self.credited, self.count, self.held


class Hold(msgspec.Struct, eq=False, gc=False):
    """An open reservation."""

    reserve: Reserve
    holds: tuple[Held, ...]
    """As they stand now."""
    hidden: bool
    attempt: Attempt | None = None
    """The record of the attempt under way, where it is not the first."""
    mark: int | None = None
    """No more than this has been relayed, in nano-USD; None: nothing was said yet."""
    tokens: int = 0

    @classmethod
    def of(cls, reserve: Reserve) -> Self:
        """As it begins."""
        return cls(reserve, reserve.holds, reserve.hidden)

    @property
    def amount(self) -> int:
        """What is held on the caller's own accounts."""
        return self.holds[0].hold

    @property
    def provider(self) -> str:
        return self.attempt.provider if self.attempt else self.reserve.provider

    def recovered_cost(self) -> int:
        """What is charged when nobody is left to tell what was used: never less than that."""
        if self.mark is None:
            return self.amount
        # Of what is out of sight a mark says nothing, unless what is seen is beyond the hold.
        return max(self.amount, self.mark) if self.hidden else self.mark


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One line of an account. Lines are only ever added."""

    lsn: int
    reservation: int | None
    account: str
    period: str
    type: str
    """`settle`, `overrun` (what a request cost above its hold), or the type of an adjustment."""
    amount: int
    actor: str = ""
    reason: str = ""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request, from its admission to its settlement: what a receipt is made of."""

    lsn: int
    t: int
    id: str
    key_id: str
    user_id: str
    org_id: str
    model: str
    provider: str
    upstream_model: str
    prices: str
    held: int
    degraded: bool
    stream: bool
    edits: tuple[str, ...]
    settled_at: int | None = None
    outcome: str | None = None
    source: str | None = None
    cost: int | None = None
    overrun: int = 0
    tokens: Tokens = NO_TOKENS
    attempts: tuple[Tried, ...] = ()
    status: int = 0
    log_id: str = ""
    rates: Rates | None = None


class Touched(msgspec.Struct, frozen=True, gc=False):
    """The rows that a record changed, made when they are asked for: the path of a request does not.

    `balances` and `reservation` name them; the state has the rest.
    """

    record: AnyRecord
    hold: Hold | None = None
    keys: Sequence[Key] | None = None
    """The balances, where they are others than those that the hold is on."""

    @property
    def reserve(self) -> Reserve | None:
        """How the reservation began that it is about."""
        return None if self.hold is None else self.hold.reserve

    @property
    def entries(self) -> list[Entry]:
        """The new lines of the accounts."""
        record = self.record
        if isinstance(record, Settle):
            assert self.hold is not None, "what was settled had a hold"
            return list(_charges(record, self.hold))
        if isinstance(record, Adjust):
            return [
                Entry(
                    record.lsn,
                    record.r,
                    *key,
                    record.type,
                    record.delta,
                    record.actor,
                    record.reason,
                )
                for key in record.accounts
            ]
        return []

    @property
    def balances(self) -> Sequence[Key]:
        if self.keys is not None:
            return self.keys
        if self.hold is None:
            return ()
        return [(held.account, held.period) for held in self.hold.holds]

    @property
    def reservation(self) -> int | None:
        return None if self.reserve is None else self.reserve.lsn

    @property
    def request(self) -> Request | None:
        """The request's row, at its admission and at its settlement."""
        record, hold = self.record, self.hold
        if hold is None:
            return None
        if isinstance(record, Settle):
            return _settled(hold, record)
        return admitted(hold) if record is hold.reserve else None


class State:
    """All that the ledger knows. `directory` receives each record of a change of the directory."""

    def __init__(self, directory: Callable[[Admin | Import], None] | None = None) -> None:
        self.lsn = 0
        self.t = 0
        self.balances: dict[Key, Balance] = {}
        self.holds: dict[int, Hold] = {}
        self.alerts: set[tuple[str, str, int]] = set()
        self.breakers: dict[str, Breaker] = {}
        self.idempotency: dict[str, tuple[int, int]] = {}
        """Keys of adjustments and admin changes: the LSN that each one led to, and when. In that
        order, and no more of them than `forget` leaves."""
        self.directory = directory

    def balance(self, key: Key) -> Balance:
        """The balance to be changed: it is there from its first use."""
        balance = self.balances.get(key)
        if balance is None:
            balance = self.balances[key] = Balance()
        return balance


class BrokenLedger(Exception):
    """A record that cannot follow those before it: the journal is not what this program wrote."""


# -- the one function ------------------------------------------------------------------------------


def apply(state: State, record: AnyRecord) -> Touched:
    """Change `state` as `record` says. BrokenLedger, and no change, where it cannot follow."""
    lsn = record.lsn
    if lsn != state.lsn + 1:
        raise BrokenLedger(f"record {lsn} after record {state.lsn}")
    touched = _APPLY[type(record)](state, record)
    state.lsn = lsn
    state.t = record.t
    return touched


def _reserve(state: State, record: Reserve) -> Touched:
    hold = state.holds[record.lsn] = Hold(record, record.holds, record.hidden)
    balances = state.balances
    for held in record.holds:
        key = (held.account, held.period)
        balance = balances.get(key) or state.balance(key)
        balance.held += held.hold
    return Touched(record, hold)


def _mark(state: State, record: Mark) -> Touched:
    hold = _open(state, record.r, record.lsn)
    hold.mark = record.cost
    hold.tokens = record.tokens
    return Touched(record, hold, _hold_instead(state, hold, record.holds) if record.holds else ())


def _attempt(state: State, record: Attempt) -> Touched:
    hold = _open(state, record.r, record.lsn)
    hold.attempt = record
    hold.mark = None
    hold.tokens = 0
    hold.hidden = record.hidden
    return Touched(record, hold, _hold_instead(state, hold, record.holds))


def _settle(state: State, record: Settle) -> Touched:
    hold = _open(state, record.r, record.lsn)
    del state.holds[record.r]
    balances = state.balances
    cost, counts = record.cost, record.outcome != VOID
    first = hold.attempt is None  # as nearly always: what it cost is one provider's, and all of it
    for held in hold.holds:
        key = (held.account, held.period)
        balance = balances.get(key) or state.balance(key)
        balance.held -= held.hold
        balance.spent += cost if first else _cost_on(held, hold, record)
        balance.count += counts
        if counts:
            balance.t = record.t
    return Touched(record, hold)


def _charges(record: Settle, hold: Hold) -> Iterator[Entry]:
    """The lines of a settlement: what was above the hold stands on one of its own."""
    lsn, reservation = record.lsn, record.r
    for held in hold.holds:
        amount = _cost_on(held, hold, record)
        if amount > held.hold:
            over = amount - held.hold
            yield Entry(lsn, reservation, held.account, held.period, "overrun", over)
            amount = held.hold
        if amount:
            yield Entry(lsn, reservation, held.account, held.period, "settle", amount)


def _adjust(state: State, record: Adjust) -> Touched:
    for key in record.accounts:
        balance = state.balance(key)
        balance.t = record.t
        if record.type == "grant":
            balance.credited += record.delta
        else:
            balance.spent += record.delta
    _remember(state, record)
    return Touched(record, keys=record.accounts)


def _close(state: State, record: Close) -> Touched:
    key = (record.account, record.period)
    balance = state.balances.get(key, _UNUSED)
    if balance.figures() != (record.spent, record.credited, record.count, 0):
        raise BrokenLedger(f"record {record.lsn} closes {key} with other figures than it has")
    state.balances.pop(key, None)
    return Touched(record, keys=(key,))


def _admin(state: State, record: Admin) -> Touched:
    if state.directory is not None:
        state.directory(record)
    _remember(state, record)
    return Touched(record)


def _remember(state: State, record: Adjust | Admin) -> None:
    """The record's key, and at that occasion no longer those that are old by the record's time: so
    whoever reads the same records knows the same keys."""
    name = record.idempotency_key
    if name is None:
        return
    state.idempotency.pop(name, None)
    state.idempotency[name] = record.lsn, record.t
    forget(state.idempotency, record.t, lambda found: found[1])


def forget(known: dict[str, T], now: int, at: Callable[[T], int]) -> None:
    """Drop the oldest of `known`, which are first: those of before yesterday, and too many ones."""
    gone: list[str] = []
    for name, found in known.items():
        if at(found) >= now - REMEMBERED_MS and len(known) - len(gone) <= REMEMBERED:
            break
        gone.append(name)
    for name in gone:
        del known[name]


def _import(state: State, record: Import) -> Touched:
    if state.directory is not None:
        state.directory(record)
    return Touched(record)


def _breaker(state: State, record: Breaker) -> Touched:
    state.breakers[record.provider] = record
    return Touched(record)


def _alert(state: State, record: Alert) -> Touched:
    state.alerts.add((record.account, record.period, record.percent))
    return Touched(record)


def _nothing(state: State, record: AnyRecord) -> Touched:
    return Touched(record)


_APPLY: Mapping[type[AnyRecord], Callable[[State, Any], Touched]] = {
    Reserve: _reserve,
    Mark: _mark,
    Attempt: _attempt,
    Settle: _settle,
    Adjust: _adjust,
    Close: _close,
    Admin: _admin,
    Import: _import,
    Breaker: _breaker,
    Alert: _alert,
    Storage: _nothing,
    Stop: _nothing,
}


def _open(state: State, reservation: int, lsn: int) -> Hold:
    hold = state.holds.get(reservation)
    if hold is None:
        raise BrokenLedger(f"record {lsn} is about reservation {reservation}, which is not open")
    return hold


def _hold_instead(state: State, hold: Hold, holds: tuple[Held, ...]) -> list[Key]:
    keys = []
    for held in hold.holds:
        key = (held.account, held.period)
        keys.append(key)
        state.balance(key).held -= held.hold
    hold.holds = holds
    for held in holds:
        key = (held.account, held.period)
        keys.append(key)
        state.balance(key).held += held.hold
    return keys


def _cost_on(own_line: Held, hold: Hold, record: Settle) -> int:
    """What of the cost is one account's: of a provider's its own, of the others' all of it."""
    if hold.attempt is None or not own_line.account.startswith("provider:"):
        return record.cost
    provider = own_line.account[9:]
    if record.attempts:
        return sum(tried.cost for tried in record.attempts if tried.provider == provider)
    # Nobody is left to tell: each one before is charged what was kept for it, the last the rest.
    rest = record.cost
    for held in hold.holds:
        if held.account.startswith("provider:") and held.account[9:] != hold.provider:
            own = min(held.hold, rest)
            if held.account[9:] == provider:
                return own
            rest -= own
    return rest


def admitted(hold: Hold) -> Request:
    """The row of a request that is still open."""
    record = hold.reserve
    return Request(
        lsn=record.lsn,
        t=record.t,
        id=record.id,
        key_id=record.key_id,
        user_id=record.user_id,
        org_id=record.org_id,
        model=record.model,
        provider=record.provider,
        upstream_model=record.upstream_model,
        prices=record.prices,
        held=record.holds[0].hold,
        degraded=record.degraded,
        stream=record.stream,
        edits=record.edits,
    )


def _settled(hold: Hold, record: Settle) -> Request:
    reserve = hold.reserve
    attempt = hold.attempt or reserve
    return Request(
        lsn=reserve.lsn,
        t=reserve.t,
        id=reserve.id,
        key_id=reserve.key_id,
        user_id=reserve.user_id,
        org_id=reserve.org_id,
        model=reserve.model,
        provider=attempt.provider,
        upstream_model=attempt.upstream_model,
        prices=reserve.prices,
        held=hold.amount,
        degraded=reserve.degraded,
        stream=reserve.stream,
        edits=reserve.edits + record.notes,
        settled_at=record.t,
        outcome=record.outcome,
        source=record.source,
        cost=record.cost,
        overrun=record.overrun,
        tokens=record.tokens,
        attempts=record.attempts,
        status=record.status,
        log_id=record.log_id,
        rates=record.rates,
    )


# -- admission -------------------------------------------------------------------------------------


class Account(msgspec.Struct, frozen=True, gc=False):
    """An account as a request meets it: its name, the period that it is now, and its limit."""

    name: str
    period: str
    limit: int | None
    """None: no limit."""


_UNUSED: Final = Balance()


def left(state: State, accounts: Iterable[Account], least: int | None = None) -> int | None:
    """What may still be held on all of these accounts, in nano-USD; None: as much as one likes.

    `least` is what is left elsewhere, where that counts too.
    """
    for account in accounts:
        limit = account.limit
        if limit is None:
            continue
        balance = state.balances.get((account.name, account.period), _UNUSED)
        rest = limit + balance.credited - balance.spent - balance.held
        if least is None or rest < least:
            least = rest
    return least


def held(state: State, accounts: Iterable[Account], amount: int) -> tuple[Held, ...]:
    """The lines of a reserve record for a hold that fits."""
    lines = []
    for account in accounts:
        balance = state.balances.get((account.name, account.period), _UNUSED)
        limit = account.limit
        lines.append(
            Held(
                account.name,
                account.period,
                amount,
                None if limit is None else limit + balance.credited,
                balance.spent + balance.held + amount,
            )
        )
    return tuple(lines)
