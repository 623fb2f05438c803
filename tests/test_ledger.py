"""The ledger's one function: what each record does, that nothing gets lost, and what it refuses."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gwproxy.core.identity import User
from gwproxy.core.ledger import (
    REMEMBERED,
    REMEMBERED_MS,
    VOID,
    Account,
    Balance,
    BrokenLedger,
    Entry,
    Key,
    State,
    Touched,
    apply,
    forget,
    held,
    left,
)
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
    Mark,
    Reserve,
    Settle,
    Stop,
    Storage,
    Tried,
    decode,
    encode,
)
from tests.office import figures_of

MONTH, DAY = "2026-11", "2026-11-21"
OWN = (("key:k", MONTH), ("user:u", MONTH), ("org:o", MONTH))


def holds(amount: int, *providers: tuple[str, int]) -> tuple[Held, ...]:
    own = [Held(*key, amount, None, amount) for key in OWN]
    return (*own, *(Held(f"provider:{name}", DAY, each, None, each) for name, each in providers))


class Book:
    """A state, and the records that it came from."""

    def __init__(self) -> None:
        self.state = State()
        self.records: list[AnyRecord] = []
        self.entries: list[Entry] = []
        self.lines: dict[int, Sequence[Entry]] = {}

    def stamp(self) -> dict[str, Any]:
        lsn = self.state.lsn
        return {"lsn": lsn + 1, "t": 1_000 + 10 * lsn, "synced": lsn}

    def apply(self, record: AnyRecord) -> Touched:
        touched = apply(self.state, record)
        self.records.append(record)
        self.entries += touched.entries
        self.lines[record.lsn] = touched.entries
        return touched

    def reserve(self, amount: int = 100, provider: str = "a", **fields: Any) -> int:
        record = Reserve(
            **self.stamp(),
            **{
                "id": "req_1",
                "model": "auto",
                "provider": provider,
                "upstream_model": "m",
                "prices": "v1",
                "holds": holds(amount, (provider, amount)),
                **fields,
            },
        )
        self.apply(record)
        return record.lsn

    def attempt(self, r: int, provider: str, lines: tuple[Held, ...], **fields: Any) -> Touched:
        record = Attempt(
            **self.stamp(),
            **{
                "r": r,
                "n": 2,
                "provider": provider,
                "upstream_model": "m2",
                "cost": 0,
                "why": "timeout",
                "holds": lines,
                **fields,
            },
        )
        return self.apply(record)

    def settle(self, r: int, cost: int, *tried: tuple[str, int], **fields: Any) -> Touched:
        return self.apply(self.settlement(r, cost, *tried, **fields))

    def settlement(self, r: int, cost: int, *tried: tuple[str, int], **fields: Any) -> Settle:
        return Settle(
            **self.stamp(),
            **{
                "r": r,
                "cost": cost,
                "tokens": (1, 0, 0, 2, 0),
                "source": "provider",
                "outcome": "completed",
                "attempts": tuple(Tried(name, "m", 200, "", "", 5, own) for name, own in tried),
                **fields,
            },
        )

    def adjust(self, delta: int, kind: str, *keys: Key, **fields: Any) -> Touched:
        record = Adjust(
            **self.stamp(),
            accounts=keys or OWN[1:2],
            delta=delta,
            type=kind,
            actor="admin",
            reason="why",
            **fields,
        )
        return self.apply(record)

    def close(self, key: Key, spent: int, credited: int, count: int) -> Touched:
        record = Close(
            **self.stamp(),
            account=key[0],
            period=key[1],
            spent=spent,
            credited=credited,
            count=count,
            hash="h",
        )
        return self.apply(record)

    def figures(self, account: str, period: str = MONTH) -> tuple[int, int, int, int]:
        """(spent, credited, count, held)."""
        return self.state.balances[account, period].figures()

    def refuses(self, record: AnyRecord, words: str = "") -> None:
        """It is a broken ledger, and all is as it was."""
        before = figures_of(self.state)
        with pytest.raises(BrokenLedger) as caught:
            apply(self.state, record)
        assert words in str(caught.value)
        assert figures_of(self.state) == before


# -- one request -----------------------------------------------------------------------------------


def test_a_request_holds_and_then_costs() -> None:
    book = Book()
    r = book.reserve(100)
    for account, period in (*OWN, ("provider:a", DAY)):
        assert book.figures(account, period) == (0, 0, 0, 100)
    touched = book.settle(r, 40, ("a", 40))
    for account, period in (*OWN, ("provider:a", DAY)):
        assert book.figures(account, period) == (40, 0, 1, 0)
    assert list(touched.entries) == [
        Entry(2, 1, account, period, "settle", 40)
        for account, period in (*OWN, ("provider:a", DAY))
    ]
    assert list(touched.balances) == [*OWN, ("provider:a", DAY)]
    assert book.state.holds == {}
    assert (book.state.lsn, book.state.t) == (2, 1_010)


def test_a_request_at_no_cost_counts_and_has_no_line() -> None:
    book = Book()
    touched = book.settle(book.reserve(0), 0, ("a", 0), outcome="failed")
    assert list(touched.entries) == []
    assert book.figures("user:u") == (0, 0, 1, 0)


def test_a_voided_request_counts_nowhere() -> None:
    book = Book()
    r = book.reserve(100)
    touched = book.settle(r, 0, outcome=VOID, tokens=NO_TOKENS)
    assert list(touched.entries) == []
    for account, period in (*OWN, ("provider:a", DAY)):
        assert book.figures(account, period) == (0, 0, 0, 0)


def test_what_a_request_cost_above_its_hold_is_a_line_of_its_own() -> None:
    book = Book()
    r = book.reserve(100, holds=holds(100, ("a", 70)))
    touched = book.settle(r, 130, ("a", 130), overrun=30)
    lines = [(each.account, each.type, each.amount) for each in touched.entries]
    assert [line for line in lines if line[0] == "user:u"] == [
        ("user:u", "overrun", 30),
        ("user:u", "settle", 100),
    ]
    assert [line for line in lines if line[0] == "provider:a"] == [
        ("provider:a", "overrun", 60),
        ("provider:a", "settle", 70),
    ]
    assert book.figures("user:u") == (130, 0, 1, 0)


def test_a_cost_without_any_hold_is_all_overrun() -> None:
    book = Book()
    touched = book.settle(book.reserve(0), 5, ("a", 5), overrun=5)
    assert {(each.type, each.amount) for each in touched.entries} == {("overrun", 5)}


def test_a_mark_may_raise_what_is_held() -> None:
    book = Book()
    r = book.reserve(100)
    book.apply(Mark(**book.stamp(), r=r, tokens=10, cost=50))
    assert book.figures("user:u") == (0, 0, 0, 100)
    book.apply(Mark(**book.stamp(), r=r, tokens=30, cost=150, holds=holds(150, ("a", 150))))
    assert book.figures("user:u") == (0, 0, 0, 150)
    hold = book.state.holds[r]
    assert (hold.mark, hold.tokens, hold.amount) == (150, 30, 150)
    book.settle(r, 120, ("a", 120))
    assert book.figures("provider:a", DAY) == (120, 0, 1, 0)


def test_several_attempts_charge_each_provider_its_own() -> None:
    book = Book()
    r = book.reserve(100)
    book.attempt(r, "b", holds(130, ("a", 30), ("b", 100)), cost=30)
    assert book.figures("user:u") == (0, 0, 0, 130)
    assert book.figures("provider:a", DAY) == (0, 0, 0, 30)
    assert book.figures("provider:b", DAY) == (0, 0, 0, 100)
    book.attempt(r, "a", holds(150, ("b", 20), ("a", 80)), cost=50)
    book.settle(r, 90, ("a", 30), ("b", 20), ("a", 40))
    assert book.figures("user:u") == (90, 0, 1, 0)
    assert book.figures("provider:a", DAY) == (70, 0, 1, 0)
    assert book.figures("provider:b", DAY) == (20, 0, 1, 0)


def test_a_provider_that_charged_nothing_is_let_go() -> None:
    book = Book()
    r = book.reserve(100)
    book.attempt(r, "b", holds(100, ("b", 100)))
    assert book.figures("provider:a", DAY) == (0, 0, 0, 0)
    book.settle(r, 60, ("a", 0), ("b", 60))
    assert book.figures("provider:a", DAY) == (0, 0, 0, 0)
    assert book.figures("provider:b", DAY) == (60, 0, 1, 0)


def test_an_attempt_that_was_recorded_and_never_made_is_charged_nothing() -> None:
    """The client left while its record was on the way to the disk."""
    book = Book()
    r = book.reserve(100)
    book.attempt(r, "b", holds(130, ("a", 30), ("b", 100)), cost=30)
    book.settle(r, 30, ("a", 30))
    assert book.figures("provider:a", DAY) == (30, 0, 1, 0)
    assert book.figures("provider:b", DAY) == (0, 0, 1, 0)


@pytest.mark.parametrize("mark", [None, 90])
def test_a_recovered_request_charges_each_provider_what_was_kept_for_it(mark: int | None) -> None:
    book = Book()
    r = book.reserve(100)
    book.attempt(r, "b", holds(130, ("a", 30), ("b", 100)), cost=30)
    if mark is not None:
        book.apply(Mark(**book.stamp(), r=r, tokens=5, cost=mark))
    cost = book.state.holds[r].recovered_cost()
    assert cost == (130 if mark is None else mark)
    book.settle(r, cost, source="estimated", outcome="recovered")
    assert book.figures("user:u") == (cost, 0, 1, 0)
    assert book.figures("provider:a", DAY) == (30, 0, 1, 0)
    assert book.figures("provider:b", DAY) == (cost - 30, 0, 1, 0)


def test_what_is_recovered_is_the_watermark_or_else_the_hold() -> None:
    book = Book()
    r = book.reserve(100)
    hold = book.state.holds[r]
    assert hold.recovered_cost() == 100
    book.apply(Mark(**book.stamp(), r=r, tokens=10, cost=50))
    assert hold.recovered_cost() == 50
    # Of the next attempt nothing was said yet.
    book.attempt(r, "b", holds(180, ("a", 50), ("b", 130)), cost=50)
    assert (hold.recovered_cost(), hold.mark, hold.tokens) == (180, None, 0)


@pytest.mark.parametrize("through", ["reserve", "attempt"])
def test_of_a_model_that_reasons_out_of_sight_the_hold_is_recovered(through: str) -> None:
    book = Book()
    r = book.reserve(100, hidden=through == "reserve")
    if through == "attempt":
        book.attempt(r, "b", holds(100, ("b", 100)), hidden=True)
    book.apply(Mark(**book.stamp(), r=r, tokens=10, cost=50))
    assert book.state.holds[r].recovered_cost() == 100
    book.apply(Mark(**book.stamp(), r=r, tokens=30, cost=150))
    assert book.state.holds[r].recovered_cost() == 150


def test_a_request_is_seen_when_it_is_admitted_and_when_it_ends() -> None:
    book = Book()
    r = book.reserve(100, id="req_7", model="auto", stream=True, edits=("max_tokens=5",))
    [admitted] = [apply(State(), book.records[0]).request]
    assert admitted is not None
    assert (admitted.lsn, admitted.id, admitted.held, admitted.outcome) == (1, "req_7", 100, None)
    assert (admitted.key_id, admitted.user_id, admitted.org_id) == ("k", "u", "o")
    book.attempt(r, "b", holds(120, ("b", 120)))
    settled = book.settle(r, 130, ("a", 0), ("b", 130), overrun=10, log_id="x", status=200).request
    assert settled is not None
    assert (settled.lsn, settled.id, settled.t, settled.settled_at) == (1, "req_7", 1_000, 1_020)
    assert (settled.provider, settled.upstream_model, settled.held) == ("b", "m2", 120)
    assert (settled.cost, settled.overrun, settled.outcome) == (130, 10, "completed")
    assert (settled.stream, settled.edits, settled.log_id) == (True, ("max_tokens=5",), "x")


# -- corrections -----------------------------------------------------------------------------------


def test_a_grant_raises_what_may_be_spent_and_the_rest_changes_what_was() -> None:
    book = Book()
    book.settle(book.reserve(100), 90, ("a", 90))
    book.adjust(50, "grant")
    assert book.figures("user:u") == (90, 50, 1, 0)
    book.adjust(-90, "reset")
    assert book.figures("user:u") == (0, 50, 1, 0)
    book.adjust(7, "late", *OWN, ("provider:a", DAY))
    touched = book.adjust(-2, "credit", *OWN, r=1)
    assert book.figures("user:u") == (5, 50, 1, 0)
    assert book.figures("org:o") == (95, 0, 1, 0)
    assert list(touched.entries) == [Entry(6, 1, *key, "credit", -2, "admin", "why") for key in OWN]


def test_keys_of_idempotency_are_remembered() -> None:
    book = Book()
    book.adjust(5, "grant", idempotency_key="one")
    book.apply(Admin(**book.stamp(), action="x", user=_USER, idempotency_key="two"))
    book.adjust(5, "grant")
    assert [*book.state.idempotency] == ["one", "two"]
    assert [lsn for lsn, _ in book.state.idempotency.values()] == [1, 2]


def test_keys_of_idempotency_are_forgotten_a_day_later_by_the_time_of_the_records() -> None:
    state = State()

    def grant(lsn: int, t: int, key: str | None) -> list[str]:
        apply(
            state,
            Adjust(
                lsn=lsn, t=t, synced=0, accounts=(("user:u", "2026-11"),), delta=1, type="grant",
                actor="admin", reason="why", idempotency_key=key,
            ),
        )  # fmt: skip
        return [*state.idempotency]

    assert grant(1, 1000, "one") == ["one"]
    assert grant(2, 2000, "two") == ["one", "two"]
    assert grant(3, 1000 + REMEMBERED_MS, "three") == ["one", "two", "three"]
    assert grant(4, 9000 + REMEMBERED_MS, None) == ["one", "two", "three"]  # it has nothing to add
    assert grant(5, 2001 + REMEMBERED_MS, "one") == ["three", "one"]
    assert state.idempotency["one"] == (5, 2001 + REMEMBERED_MS)


def test_of_very_many_keys_the_newest_are_remembered() -> None:
    known = {f"{n}": n for n in range(REMEMBERED + 3)}
    forget(known, REMEMBERED, lambda found: found)
    assert (len(known), next(iter(known))) == (REMEMBERED, "3")


def test_a_closed_period_leaves_the_state() -> None:
    book = Book()
    book.settle(book.reserve(100), 90, ("a", 90))
    book.adjust(5, "grant")
    touched = book.close(OWN[1], 90, 5, 1)
    assert list(touched.balances) == [OWN[1]]
    assert OWN[1] not in book.state.balances
    assert book.figures("org:o") == (90, 0, 1, 0)
    # What comes late begins anew.
    book.adjust(3, "late")
    assert book.figures("user:u") == (3, 0, 0, 0)


# -- the rest of what is known ---------------------------------------------------------------------

_USER = User(user_id="u", created_at=1)


def test_alerts_breakers_and_changes_of_the_directory() -> None:
    changes: list[Admin] = []
    state = State(changes.append)
    apply(state, Alert(lsn=1, t=1, synced=0, account="a", period="p", percent=80, spent=8, limit=9))
    apply(state, Breaker(lsn=2, t=1, synced=0, provider="a", before="closed", after="open"))
    admin = Admin(lsn=3, t=1, synced=0, action="create", user=_USER)
    apply(state, admin)
    apply(state, Storage(lsn=4, t=1, synced=0, part="database", state="lost"))
    apply(state, Stop(lsn=5, t=2, synced=0))
    assert state.alerts == {("a", "p", 80)}
    assert state.breakers["a"].after == "open"
    assert changes == [admin]
    assert (state.lsn, state.t) == (5, 2)


# -- what cannot follow ----------------------------------------------------------------------------


def test_a_record_that_cannot_follow_changes_nothing() -> None:
    book = Book()
    r = book.reserve(100)
    gone = book.reserve(50)
    book.settle(gone, 20, ("a", 20))
    stamp = book.stamp()
    for lsn in (0, 1, 3, 5, 100):
        book.refuses(Stop(**{**stamp, "lsn": lsn}), f"record {lsn} after record 3")
    # What would be lawful with the right number.
    late = replace(book.settlement(r, 1), lsn=stamp["lsn"] + 1)
    book.refuses(late, "record 5 after record 3")
    for unknown in (gone, 0, 3, 99):
        words = f"reservation {unknown}, which is not open"
        book.refuses(Mark(**stamp, r=unknown, tokens=1, cost=1, holds=holds(9, ("a", 9))), words)
        book.refuses(book.settlement(unknown, 5, ("a", 5)), words)
        book.refuses(
            Attempt(
                **stamp,
                r=unknown,
                n=2,
                provider="b",
                upstream_model="m",
                cost=0,
                why="x",
                holds=holds(9, ("b", 9)),
            ),
            words,
        )


@pytest.mark.parametrize(
    ("account", "spent", "credited", "count"),
    [
        ("user:u", 20, 0, 1),  # something is held on it
        ("user:v", 0, 4, 0),
        ("user:v", 1, 5, 0),
        ("user:v", 0, 5, 1),
        ("user:w", 1, 0, 0),
    ],
)
def test_a_period_is_closed_as_it_stands_or_not_at_all(
    account: str, spent: int, credited: int, count: int
) -> None:
    book = Book()
    book.settle(book.reserve(50), 20, ("a", 20))
    book.reserve(100)
    book.adjust(5, "grant", ("user:v", MONTH))
    record = Close(
        **book.stamp(),
        account=account,
        period=MONTH,
        spent=spent,
        credited=credited,
        count=count,
        hash="",
    )
    book.refuses(record, "other figures")


# -- any history -----------------------------------------------------------------------------------

AMOUNTS = st.integers(0, 1_000)
PROVIDERS = st.sampled_from("ab")


@st.composite
def histories(draw: st.DrawFn) -> Book:
    """A ledger after anything that may lawfully happen to it."""
    book = Book()
    costs: dict[int, dict[str, int]] = {}  # what the attempts before have cost, by provider
    for _ in range(draw(st.integers(0, 25))):
        what = draw(
            st.sampled_from(
                ["reserve", "reserve", "mark", "attempt", "settle", "settle", "void", "recover",
                 "adjust", "close", "alert"]
            )
        )  # fmt: skip
        r = draw(st.sampled_from(sorted(costs))) if costs else None
        if what == "reserve":
            costs[book.reserve(draw(AMOUNTS), draw(PROVIDERS))] = {}
        elif what == "adjust":
            kind = draw(st.sampled_from(["grant", "reset", "credit", "late"]))
            book.adjust(draw(st.integers(-500, 500)), kind, *draw(st.permutations(OWN))[:2])
        elif what == "alert":
            book.apply(Storage(**book.stamp(), part="database", state="lost"))
        elif what == "close":
            free = [k for k, b in book.state.balances.items() if not b.held]
            if free:
                key = draw(st.sampled_from(sorted(free)))
                spent, credited, count, _ = book.figures(*key)
                book.close(key, spent, credited, count)
                book.entries = [e for e in book.entries if (e.account, e.period) != key]
        elif r is None:
            continue
        elif what == "mark":
            lines = holds(draw(AMOUNTS), (book.state.holds[r].provider, draw(AMOUNTS)))
            more = [h for h in book.state.holds[r].holds[3:] if h.account != lines[3].account]
            lines = draw(st.sampled_from([(), (*lines[:3], *more, lines[3])]))
            book.apply(Mark(**book.stamp(), r=r, tokens=1, cost=draw(AMOUNTS), holds=lines))
        elif what == "attempt":
            before = book.state.holds[r].provider
            costs[r][before] = costs[r].get(before, 0) + draw(st.sampled_from([0, 7]))
            following = draw(PROVIDERS)
            own = dict(costs[r])
            own[following] = own.get(following, 0) + draw(AMOUNTS)
            kept = [(name, amount) for name, amount in own.items() if amount or name == following]
            total = sum(own.values())
            book.attempt(r, following, holds(total, *kept), cost=sum(costs[r].values()))
        else:
            tried = Counter(costs.pop(r))
            last = book.state.holds[r].provider
            if what == "settle":
                tried[last] += draw(AMOUNTS)
                several = [(name, amount) for name, amount in tried.items() if name != last]
                book.settle(r, tried.total(), *several, (last, tried[last]))
            elif what == "recover":
                book.settle(r, book.state.holds[r].recovered_cost(), outcome="recovered")
            else:
                book.settle(r, 0, outcome=VOID)
    return book


@given(histories())
def test_whatever_happens_no_nano_dollar_is_lost(book: Book) -> None:
    spent: Counter[Key] = Counter()
    credited: Counter[Key] = Counter()
    open_holds: Counter[Key] = Counter()
    for entry in book.entries:
        of = credited if entry.type == "grant" else spent
        of[entry.account, entry.period] += entry.amount
    for hold in book.state.holds.values():
        for line in hold.holds:
            open_holds[line.account, line.period] += line.hold
    for key, balance in book.state.balances.items():
        assert (balance.spent, balance.credited, balance.held) == (
            spent.pop(key, 0),
            credited.pop(key, 0),
            open_holds.pop(key, 0),
        ), key
    assert not +spent and not +credited and not +open_holds


@given(histories())
def test_each_request_is_paid_for_once_by_everybody(book: Book) -> None:
    """What the key, the user, the organization and the providers together are charged is the
    same, in lines that say so."""
    ends = [record for record in book.records if isinstance(record, Settle)]
    assert len({record.r for record in ends}) == len(ends)
    for record in ends:
        charged: Counter[str] = Counter()
        for entry in book.lines[record.lsn]:
            assert entry.amount > 0
            charged[entry.account.partition(":")[0]] += entry.amount
        for scope in ("key", "user", "org", "provider"):
            assert charged[scope] == record.cost, scope


@given(histories())
def test_the_lines_lead_to_the_same_state_again(book: Book) -> None:
    again = State()
    for record in book.records:
        apply(again, decode(encode(record)))
    assert figures_of(again) == figures_of(book.state)


@given(histories(), st.integers(-3, 3), AMOUNTS)
def test_no_state_takes_a_record_that_cannot_follow(book: Book, by: int, cost: int) -> None:
    lsn = book.state.lsn + 1
    if by:
        book.refuses(Stop(lsn=lsn + by, t=1, synced=0))
    closed = {record.r for record in book.records if isinstance(record, Settle)}
    for r in (*sorted(closed), lsn, 0):
        book.refuses(book.settlement(r, cost, ("a", cost)))


# -- what is left ----------------------------------------------------------------------------------


def state_with(*balances: tuple[str, str, Balance]) -> State:
    state = State()
    for account, period, balance in balances:
        state.balances[account, period] = balance
    return state


def test_what_is_left_is_what_the_tightest_account_has() -> None:
    state = state_with(
        ("key:k", MONTH, Balance(spent=10, held=5)),
        ("user:u", MONTH, Balance(spent=50, credited=30, held=20)),
    )
    key, user = Account("key:k", MONTH, 100), Account("user:u", MONTH, 70)
    free, new = Account("org:o", MONTH, None), Account("provider:a", DAY, 40)
    assert left(state, ()) is None
    assert left(state, (free,)) is None
    assert left(state, (key,)) == 85
    assert left(state, (key, user, free)) == 30
    assert left(state, (key, free, new)) == 40
    # A limit that was lowered may leave less than nothing.
    assert left(state, (key, Account("user:u", MONTH, 0))) == -40
    # Another period is another account.
    assert left(state, (Account("user:u", "2026-12", 70),)) == 70
    assert ("user:u", "2026-12") not in state.balances


def test_a_hold_tells_the_figures_of_its_decision() -> None:
    state = state_with(("user:u", MONTH, Balance(spent=50, credited=30, held=20)))
    accounts = (Account("user:u", MONTH, 100), Account("org:o", MONTH, None))
    assert held(state, accounts, 25) == (
        Held("user:u", MONTH, 25, 130, 95),
        Held("org:o", MONTH, 25, None, 25),
    )
    assert ("org:o", MONTH) not in state.balances
