"""The ledger's tables: loaded into memory at the start, and written by one task that reads the
journal, so that live, catching up and rebuilding are one path.

The writer has a state of its own, as of its last commit, and goes through `core.ledger.apply` like
everybody else; nothing but it writes these tables. Up to where they go stands in `meta` and moves
in the same transaction. It takes its time from outside, and `Writer.step` waits only for what it
was handed, so that it can be driven without an event loop.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, Final, Protocol, TypeVar

import msgspec

from gwproxy.core.identity import Organization, User
from gwproxy.core.ledger import (
    Balance,
    BrokenLedger,
    Entry,
    Hold,
    Key,
    Request,
    State,
    Touched,
    apply,
)
from gwproxy.core.period import DAY_MS, periods
from gwproxy.core.records import (
    Adjust,
    Admin,
    Alert,
    AnyRecord,
    Attempt,
    Breaker,
    Close,
    Held,
    Import,
    Reserve,
    Settle,
    decode,
    encode,
)
from gwproxy.storage import audit, imports
from gwproxy.storage.database import (
    GONE,
    BackupRefused,
    DatabaseDamaged,
    FileChanged,
    RolledBack,
    assert_in_transaction,
)
from gwproxy.storage.journal import Journal
from gwproxy.storage.segments import Cursor, Gap
from gwproxy.storage.usage import Sums

T = TypeVar("T")

MOST_RECORDS: Final = 5000
"""In one transaction: a tenth of a second's work, so that a stop or a fault never waits longer."""

BATCH_S: Final = 0.5
"""A batch takes no more records after so long. Where the loop is busy its slices have to wait, and
5,000 records would be more than the time after which a database without a commit counts as lost."""

SLICE_RECORDS: Final = 32
SLICE_BYTES: Final = 32 << 10
"""Read and applied in one go on the event loop: 0.3 to 0.7 ms, in which no stream moves."""

LOADED_MS: Final = 62 * DAY_MS
"""Balances of the last two months are kept in memory. An older one is fetched when it is needed."""

LOST_AFTER_S: Final = 5.0
"""With records waiting, and no commit for so long, the database is lost: slow is not."""

BACK_WITHIN_S: Final = 1.0
"""It is back when no record has been waiting for longer than this."""

REBUILD_AFTER_S: Final = 3.0
"""A file that was moved may be put back, and a disk mounted again, which is better than a copy."""

REBUILD_AGAIN_S: Final = 10.0
"""After a rebuilding, and one that was not possible: to look at each backup takes its time."""

REBUILD_EVERY_S: Final = 3600.0
"""On a disk that damages one file after another each rebuilding would leave a file set aside. Where
none stands there, or a good one was put there, nothing is set aside as damaged and none waits."""

PUT_BACK: Final = "the file that was put there"
"""What a rebuilding took, where that was no backup."""

Rebuild = Callable[[Callable[["Mark"], Awaitable[object]], bool], Awaitable[str]]
"""Puts a good file in the place of one that is lost, and says from what: see `Backups.rebuild`."""

REST_S: Final = 0.05
"""After a commit, unless it was a full one. The first record after a silence is committed at once;
a thousand a second would make hundreds of commits, each of them dearer than its records."""

LOOK_EVERY_S: Final = 1.0
FIRST_RETRY_S: Final = 0.1

_PAGE: Final = 500
_ROWS: Final = 32
"""Rows in one statement. One each would let go of the interpreter's lock and fight for it again
for every row: with a busy event loop that doubles the time; more than 32 gain nothing."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Up to which record of which journal the tables go."""

    ledger_id: str | None
    """None before the first start."""
    epoch: int
    lsn: int
    chain: int
    t: int


class Mismatch(Exception):
    """The tables and the journal do not belong together."""


class Tables(Protocol):
    """What is asked of a database by whoever only reads."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T: ...


class Store(Tables, Protocol):
    """What the writer asks of a database: the real one, or one that is only played."""

    async def commit(self, work: Callable[[sqlite3.Connection], T]) -> T: ...

    async def checkpoint(self) -> None: ...

    def fault(self) -> str | None: ...

    async def reopen(self, *, check: bool = False) -> None: ...


# -- the mark ------------------------------------------------------------------------------------


def mark_of(connection: sqlite3.Connection) -> Mark:
    row = connection.execute(
        "SELECT ledger_id, epoch, applied_lsn, applied_chain, applied_t FROM meta"
    ).fetchone()
    return Mark(*row)


async def read_mark(database: Tables) -> Mark:
    return await database.run(mark_of)


async def begin_epoch(database: Store, new_ledger_id: str, seen_epoch: int = 0) -> Mark:
    """Count a start, past all that the journal has seen, and name the ledger if it has no name yet.

    The commit makes lasting what a killed process may have left in the write-ahead log.
    """

    def begin(connection: sqlite3.Connection) -> Mark:
        connection.execute(
            "UPDATE meta SET epoch = max(epoch, ?) + 1, ledger_id = coalesce(ledger_id, ?)",
            (seen_epoch, new_ledger_id),
        )
        return mark_of(connection)

    return await database.commit(begin)


# -- rows into a state ---------------------------------------------------------------------------


async def load_state(
    database: Tables,
    *,
    breathe: Callable[[], Awaitable[None]],
    directory: Callable[[Admin | Import], None] | None = None,
) -> State:
    """The state at the applied mark. It holds the balances of the last 62 days, and older ones that
    something is still held on. The directory's rows are loaded by `storage.directory.load`."""
    state = State(directory)
    mark = await read_mark(database)
    state.lsn, state.t = mark.lsn, mark.t
    since = loaded_since(mark.t)
    rows = partial(_rows, database, breathe)
    async for period, account, *figures in rows(
        "SELECT period, account, spent, credited, count, t FROM balance"
        " WHERE (period, account) > (?, ?) ORDER BY period, account",
        (since, ""),
    ):
        state.balances[account, period] = Balance(*figures)
    async for reservation, reserve, attempt, holds, watermark, tokens in rows(
        "SELECT reservation, reserve, attempt, holds, mark, tokens FROM hold"
        " WHERE reservation > ? ORDER BY reservation",
        (0,),
    ):
        hold = _hold(reserve, attempt, holds, watermark, tokens)
        state.holds[reservation] = hold
        for held in hold.holds:
            key = (held.account, held.period)
            if key not in state.balances:
                await fetch_balance(database, state, key)
            state.balance(key).held += held.hold
    async for period, account, percent in rows(
        "SELECT period, account, percent FROM alert"
        " WHERE (period, account, percent) > (?, ?, ?) ORDER BY period, account, percent",
        (since, "", 0),
    ):
        state.alerts.add((account, period, percent))
    async for lsn, key, t in rows(
        "SELECT lsn, key, t FROM idempotency WHERE lsn > ? ORDER BY lsn", (0,)
    ):
        state.idempotency[key] = lsn, t
    async for provider, lsn, t, before, after, until, why in rows(
        "SELECT provider, lsn, t, before, after, until, why FROM breaker"
        " WHERE provider > ? ORDER BY provider",
        ("",),
    ):
        state.breakers[provider] = Breaker(
            lsn=lsn, t=t, synced=0, provider=provider, before=before, after=after, until=until,
            why=why,
        )  # fmt: skip
    return state


async def fetch_balance(database: Tables, state: State, key: Key) -> None:
    """Load one balance that was too old to be loaded with the others, if it exists."""
    account, period = key
    found = await database.run(
        lambda c: c.execute(
            "SELECT spent, credited, count, t FROM balance WHERE period = ? AND account = ?",
            (period, account),
        ).fetchone()
    )
    if found is not None:
        state.balances[key] = Balance(*found)


def loaded_since(t: int) -> str:
    """The first month that a state of that time is loaded with, and its days."""
    return periods(t - LOADED_MS)[0]


def _keys(record: Adjust | Close) -> Sequence[Key]:
    """The balances it changes."""
    if isinstance(record, Close):
        return ((record.account, record.period),)
    return record.accounts


class Older:
    """Has the balances ready that a run of records changes and that `load_state` left out. Of that
    run the database must not have anything yet."""

    def __init__(self, database: Tables, state: State, since: str) -> None:
        """`since`: months from then on were loaded."""
        self._database = database
        self._state = state
        self._since = since
        self._closed: set[Key] = set()
        """What the run has closed begins anew, though its old row still stands."""

    async def ready(self, record: AnyRecord) -> None:
        """Before `record` is applied. Two kinds of record may be about long ago."""
        if not isinstance(record, (Adjust, Close)):
            return
        keys = _keys(record)
        for key in keys:
            known = key in self._state.balances or key in self._closed
            if key[1] < self._since and not known:
                await fetch_balance(self._database, self._state, key)
        if isinstance(record, Close):
            self._closed.update(keys)


async def _rows(
    database: Tables, breathe: Callable[[], Awaitable[None]], sql: str, after: tuple[Any, ...]
) -> AsyncIterator[Sequence[Any]]:
    """The rows of `sql` after the key `after`, with which each row begins, a page at a time."""
    paged = f"{sql} LIMIT {_PAGE}"
    while True:
        key = after
        page = await database.run(lambda c: c.execute(paged, key).fetchall())  # noqa: B023
        for row in page:
            yield row
        if len(page) < _PAGE:
            return
        after = tuple(page[-1][: len(after)])
        await breathe()


_read_reserve: Final = msgspec.json.Decoder(Reserve).decode
_read_attempt: Final = msgspec.json.Decoder(Attempt).decode
_read_holds: Final = msgspec.json.Decoder(tuple[Held, ...]).decode


def _hold(reserve: str, attempt: str | None, holds: str, mark: int | None, tokens: int) -> Hold:
    hold = Hold.of(_read_reserve(reserve))
    hold.holds = _read_holds(holds)
    if attempt is not None:
        hold.attempt = _read_attempt(attempt)
        hold.hidden = hold.attempt.hidden
    hold.mark, hold.tokens = mark, tokens
    return hold


# -- a state into rows ---------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """What a run of records has changed: the lines in order, of all else the names."""

    first: int
    """The LSN of its first record."""
    count: int = 0
    charges: list[Entry] = field(default_factory=list)
    balances: set[Key] = field(default_factory=set)
    reservations: set[int] = field(default_factory=set)
    requests: dict[int, Touched] = field(default_factory=dict)
    """What happened last to each: a row is made of that alone."""
    others: list[tuple[AnyRecord, Sequence[Entry]]] = field(default_factory=list)

    def add(self, record: AnyRecord, touched: Touched) -> None:
        self.count += 1
        self.balances.update(touched.balances)
        hold = touched.hold
        if hold is None:
            self.others.append((record, touched.entries))
            return
        reservation = hold.reserve.lsn
        self.reservations.add(reservation)
        if isinstance(record, Settle):
            self.charges += touched.entries
            self.requests[reservation] = touched
        elif record is hold.reserve:
            self.requests[reservation] = touched


class _Insert:
    """An INSERT of many rows, in statements of 32."""

    def __init__(self, table: str, columns: str, conflict: str = "") -> None:
        marks = f"({', '.join('?' * len(columns.split()))})"
        head = f"INSERT INTO {table} ({', '.join(columns.split())}) VALUES "
        self._one = f"{head}{marks} {conflict}"
        self._many = f"{head}{', '.join([marks] * _ROWS)} {conflict}"

    def __call__(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> None:
        whole = len(rows) - len(rows) % _ROWS
        several = (tuple(chain.from_iterable(rows[i : i + _ROWS])) for i in range(0, whole, _ROWS))
        if whole:
            assert_in_transaction(connection)
            connection.executemany(self._many, several)
        if whole < len(rows):
            assert_in_transaction(connection)
            connection.executemany(self._one, rows[whole:])


# Lines and requests come once: a second one of the same name is a fault, and is not passed over.
_insert_charges: Final = _Insert("entry", "lsn account period type amount reservation")
_charge: Final = attrgetter("lsn", "account", "period", "type", "amount", "reservation")
_INSERT_ADJUSTMENT: Final = "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_insert_requests: Final = _Insert(
    "request",
    "lsn t period id key_id user_id org_id model provider upstream_model prices held degraded"
    " stream edits settled_at outcome source cost overrun input_tokens cache_read_tokens"
    " cache_write_tokens output_tokens reasoning_tokens attempts status log_id rates",
)
_SETTLE_REQUEST: Final = """
    UPDATE request SET provider = ?9, upstream_model = ?10, held = ?12, settled_at = ?16,
        edits = ?15, outcome = ?17, source = ?18, cost = ?19, overrun = ?20, input_tokens = ?21,
        cache_read_tokens = ?22, cache_write_tokens = ?23, output_tokens = ?24,
        reasoning_tokens = ?25, attempts = ?26, status = ?27, log_id = ?28, rates = ?29
    WHERE lsn = ?1 AND settled_at IS NULL"""
_insert_holds: Final = _Insert("hold", "reservation reserve attempt holds mark tokens")
_CHANGE_HOLD: Final = """
    UPDATE hold SET attempt = ?3, holds = ?4, mark = ?5, tokens = ?6 WHERE reservation = ?1"""
_put_balances: Final = _Insert(
    "balance",
    "account period spent credited count t",
    "ON CONFLICT (period, account) DO UPDATE SET spent = excluded.spent,"
    " credited = excluded.credited, count = excluded.count, t = excluded.t",
)
_PUT_ALERT: Final = "INSERT INTO alert VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
_PUT_BREAKER: Final = "INSERT OR REPLACE INTO breaker VALUES (?, ?, ?, ?, ?, ?, ?)"
_PUT_KEY: Final = "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?)"
_ADVANCE: Final = """
    UPDATE meta SET epoch = ?, applied_lsn = ?, applied_chain = ?, applied_t = ?
    WHERE applied_lsn = ? AND ledger_id = ?"""


Rows = Callable[[Import], Iterable[Organization | User]]
"""The rows of an import, from its file."""


def write(
    connection: sqlite3.Connection, batch: Batch, state: State, mark: Mark, rows_of: Rows
) -> None:
    """Write what `batch` has changed, as `state` has it now, and the mark; within a transaction.

    That is looked at before each statement: where SQLite has rolled back by itself, all that follow
    would be committed one by one.
    """
    first = batch.first
    _insert_charges(connection, list(map(_charge, batch.charges)))

    requests, sums = [], Sums()
    for touched in batch.requests.values():
        reserve, request = touched.reserve, touched.request
        assert reserve is not None and request is not None, "it is about a request"
        month = reserve.holds[0].period
        requests.append(_request_row(request, month))
        sums.add(request, month)
    known = [row for row in requests if row[0] < first]
    _insert_requests(connection, [row for row in requests if row[0] >= first])
    _each(connection, _SETTLE_REQUEST, known)
    sums.write(connection)

    holds = state.holds
    opened = [_hold_row(r, holds[r]) for r in batch.reservations if r >= first and r in holds]
    changed = [_hold_row(r, holds[r]) for r in batch.reservations if r < first and r in holds]
    ended = [(r,) for r in batch.reservations if r < first and r not in holds]
    _insert_holds(connection, opened)
    _each(connection, _CHANGE_HOLD, changed)
    _each(connection, "DELETE FROM hold WHERE reservation = ?", ended)

    balances = state.balances
    _put_balances(
        connection, [_balance_row(k, balances[k]) for k in batch.balances if k in balances]
    )
    archived = batch.balances - balances.keys()
    if archived:
        assert_in_transaction(connection)
        connection.executemany("DELETE FROM balance WHERE account = ? AND period = ?", archived)
    for record, entries in batch.others:
        _write_other(connection, record, entries, rows_of)
    if any(isinstance(r, Admin | Adjust) and r.idempotency_key for r, _ in batch.others):
        oldest, _ = next(iter(state.idempotency.values()))
        assert_in_transaction(connection)
        connection.execute("DELETE FROM idempotency WHERE lsn < ?", (oldest,))

    assert_in_transaction(connection)
    moved = connection.execute(
        _ADVANCE, (mark.epoch, mark.lsn, mark.chain, mark.t, first - 1, mark.ledger_id)
    )
    if moved.rowcount != 1:
        raise Mismatch(f"the database does not stand at record {first - 1} of this ledger")


def _each(connection: sqlite3.Connection, sql: str, rows: Sequence[Sequence[Any]]) -> None:
    """Do `sql` for every row; each time it has to find one row to change."""
    if not rows:
        return
    assert_in_transaction(connection)
    cursor = connection.executemany(sql, rows)
    if cursor.rowcount != len(rows):
        raise Mismatch(
            f"{len(rows) - cursor.rowcount} rows are missing: {' '.join(sql.split()[:3])}"
        )


def _write_other(
    connection: sqlite3.Connection, record: AnyRecord, entries: Sequence[Entry], rows_of: Rows
) -> None:
    lsn, t = record.lsn, record.t
    assert_in_transaction(connection)
    match record:
        case Adjust():
            connection.executemany(
                _INSERT_ADJUSTMENT, [(*_charge(e), t, e.actor, e.reason) for e in entries]
            )
            audit.adjusted(connection, record)
        case Admin():
            audit.changed(connection, record, record.action, record.row)
        case Import():
            for place, row in enumerate(rows_of(record), start=1):
                audit.changed(connection, record, "import", row, place)
            audit.imported(connection, record)
        case Close():
            connection.execute(
                "INSERT INTO closed VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.account,
                    record.period,
                    lsn,
                    t,
                    record.spent,
                    record.credited,
                    record.count,
                    record.hash,
                ),
            )
        case Alert():
            connection.execute(
                _PUT_ALERT,
                (
                    record.account,
                    record.period,
                    record.percent,
                    lsn,
                    t,
                    record.spent,
                    record.limit,
                ),
            )
        case Breaker():
            connection.execute(
                _PUT_BREAKER,
                (record.provider, lsn, t, record.before, record.after, record.until, record.why),
            )
            audit.operated(connection, record)
    if isinstance(record, Admin | Adjust) and record.idempotency_key is not None:
        assert_in_transaction(connection)
        connection.execute(_PUT_KEY, (record.idempotency_key, lsn, t))


def _request_row(request: Request, month: str) -> tuple[Any, ...]:
    return (
        request.lsn,
        request.t,
        month,
        request.id,
        request.key_id,
        request.user_id,
        request.org_id,
        request.model,
        request.provider,
        request.upstream_model,
        request.prices,
        request.held,
        int(request.degraded),
        int(request.stream),
        _json(request.edits),
        request.settled_at,
        request.outcome,
        request.source,
        request.cost,
        request.overrun,
        *request.tokens,
        _json(request.attempts),
        request.status,
        request.log_id,
        _json(request.rates),
    )


def _hold_row(reservation: int, hold: Hold) -> tuple[Any, ...]:
    return (
        reservation,
        encode(hold.reserve).decode(),
        None if hold.attempt is None else encode(hold.attempt).decode(),
        encode(hold.holds).decode(),
        hold.mark,
        hold.tokens,
    )


def _balance_row(key: Key, balance: Balance) -> tuple[Any, ...]:
    return (*key, balance.spent, balance.credited, balance.count, balance.t)


def _json(values: Iterable[Any] | None) -> str | None:
    """Nothing is stored as NULL."""
    return encode(values).decode() if values else None


# -- the writer ----------------------------------------------------------------------------------


class Storage(StrEnum):
    OK = "ok"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class _Fault:
    """What kept a batch from being committed."""

    words: str
    at_once: bool = False
    """The database is lost; else it is after 5 s of this."""
    damaged: bool = False
    """All of the file is looked at before it is used again."""
    replace: bool = False
    """The file itself is to blame: a backup in its place would help, and trying again would not."""


def _diagnose(error: BaseException) -> _Fault:
    cause = error.__cause__
    if isinstance(cause, sqlite3.Error | FileChanged | RolledBack):
        error = cause
    match error:
        case FileChanged() | Mismatch() | Gap() | BrokenLedger():
            return _Fault(str(error), at_once=True, replace=True)
        case DatabaseDamaged():
            return _Fault("the file is damaged", at_once=True, damaged=True, replace=True)
        case RolledBack():
            return _Fault(str(error), at_once=True)
        case sqlite3.Error():
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            return _Fault(
                str(error),
                at_once=code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
                damaged=damaged,
                # A row that cannot be there: the tables are not those that the journal led to.
                replace=damaged or code == sqlite3.SQLITE_CONSTRAINT,
            )
        case _:
            return _Fault(f"{type(error).__name__}: {error}")


def retry_after_s(failures: int) -> float:
    """Twice as long after each, up to a second."""
    doublings = min(failures - 1, 10)  # a disk may stay full for days
    return min(FIRST_RETRY_S * (1 << doublings), LOOK_EVERY_S)


@dataclass(slots=True)
class _Place:
    """Where the writer stands."""

    state: State
    cursor: Cursor
    since: str
    """Balances of earlier months are not in the state until they are needed."""


class Writer:
    """Takes the journal's records into the tables. `state` is whether that works."""

    def __init__(
        self,
        database: Store,
        journal: Journal,
        *,
        synced: Callable[[int], Awaitable[None]],
        breathe: Callable[[], Awaitable[None]],
        now: Callable[[], float],
        on_change: Callable[[Storage, str], None],
        rebuild: Rebuild | None = None,
    ) -> None:
        """`synced` returns when the journal is on the disk up to an LSN; `breathe` lets others run;
        `now` is monotonic, in seconds. `on_change` hears each change of `state`, with its cause.
        `rebuild` puts a backup in the place of a file that is lost, after asking whether the
        journal can go on from the backup's mark; with False, only where nothing has to be set aside
        for it but a good file. BackupRefused."""
        self.state = Storage.OK
        self.failure: BaseException | None = None
        """What ended the last batch, if it failed, for the log."""
        self.committed: Callable[[float], None] = _nobody
        """Told how long each commit took, in seconds."""
        self.applied = 0
        """The last record in the tables, by a commit that is on the disk; 0: not known yet."""
        self._database = database
        self._journal = journal
        self._synced = synced
        self._breathe = breathe
        self._now = now
        self._on_change = on_change
        self._rebuild = rebuild
        self._rebuild_after = now()
        self._set_aside_after = now()
        self._place: _Place | None = None
        self._fault: _Fault | None = None
        self._failures = 0
        self._waiting_since: float | None = None
        """Since when there have been records and no commit."""
        self._progressed = 0.0
        """When an import was last seen to go on."""
        self._woken = asyncio.Event()
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []

    # -- one batch ---------------------------------------------------------------------------------

    async def step(self) -> int:
        """Commit what waits, up to 5,000 records; how many. It raises nothing: a fault ends the
        batch, and the next step begins anew from what the database says of itself."""
        self._look()
        place, self._place = self._place, None  # a batch that does not end leaves none behind
        try:
            if place is None:
                place = await self._begin()
            count = await self._commit(place)
        except Exception as error:
            self._failures += 1
            self.failure = error
            self._fault = fault = _diagnose(error)
            if fault.at_once or self._stalled():
                self._change(Storage.LOST, fault.words)
            return 0
        self._place = place
        return count

    async def _begin(self) -> _Place:
        """Open the database anew after a fault, and find the place in the journal."""
        fault = self._fault
        if fault is not None:
            if fault.replace and self._rebuild is not None and self._now() >= self._rebuild_after:
                await self._replace(self._rebuild)
            await self._database.reopen(check=fault.damaged)
        mark = await read_mark(self._database)
        cursor = await self._find(mark)
        self.applied = mark.lsn
        self._tell()
        state = await load_state(self._database, breathe=self._breathe)
        return _Place(state, cursor, loaded_since(state.t))

    async def _replace(self, rebuild: Rebuild) -> None:
        gone = self._database.fault() == GONE
        with suppress(BackupRefused):  # it goes on with what there is
            source = await rebuild(self._find, gone or self._now() >= self._set_aside_after)
            if not gone and source != PUT_BACK:
                self._set_aside_after = self._now() + REBUILD_EVERY_S
        self._rebuild_after = self._now() + REBUILD_AGAIN_S

    async def _find(self, mark: Mark) -> Cursor:
        """The place in the journal just after the record of `mark`; Mismatch or Gap."""
        if mark.ledger_id != self._journal.ledger_id:
            raise Mismatch("the database belongs to another ledger")
        for segment in reversed(self._journal.trail().segments):
            if segment.first_lsn <= mark.lsn + 1:
                cursor = segment.start
                break
        else:
            raise Gap(f"the journal does not go back to record {mark.lsn + 1}")
        while cursor.lsn < mark.lsn:
            most = min(SLICE_RECORDS, mark.lsn - cursor.lsn)
            payloads, cursor = self._journal.read(cursor, most, SLICE_BYTES)
            if not payloads:
                raise Mismatch(f"the database has record {mark.lsn}, which the journal has not")
            await self._breathe()
        if cursor.chain != mark.chain:
            raise Mismatch(f"record {mark.lsn} of the database is not that of the journal")
        return cursor

    async def _commit(self, place: _Place) -> int:
        started = self._now()
        state, cursor = place.state, place.cursor
        batch = Batch(state.lsn + 1)
        older = Older(self._database, state, place.since)
        # What comes meanwhile is for the next batch: running after it is a read for each record.
        end = self._journal.end.lsn
        last = min(end, cursor.lsn + MOST_RECORDS)
        while cursor.lsn < last and self._now() - started < BATCH_S:
            most = min(SLICE_RECORDS, last - cursor.lsn)
            payloads, cursor = self._journal.read(cursor, most, SLICE_BYTES)
            if not payloads:
                break  # the end was taken back, to be written anew elsewhere
            for payload in payloads:
                record = decode(payload)
                if not isinstance(record, (Reserve, Settle)):  # as nearly all are
                    await older.ready(record)
                batch.add(record, apply(state, record))
            await self._breathe()
        if not batch.count and self.state is Storage.OK:
            return 0
        if batch.count:
            await self._synced(cursor.lsn)
        ledger_id, epoch = self._journal.ledger_id, self._journal.epoch
        mark = Mark(ledger_id, epoch, cursor.lsn, cursor.chain, state.t)
        committing = self._now()
        await self._database.commit(lambda c: write(c, batch, state, mark, self._rows_of))
        self.committed(self._now() - committing)
        place.cursor = cursor
        self.applied = cursor.lsn
        self._tell()
        caught_up = cursor.lsn >= min(end, self._journal.end.lsn)
        self._committed(caught_up and self._now() - started < BACK_WITHIN_S)
        await self._database.checkpoint()
        return batch.count

    def _rows_of(self, record: Import) -> Iterator[Organization | User]:
        """In the database's thread. However long it takes: slow is not lost."""
        for number, row in enumerate(
            imports.read(self._journal.files, self._journal.directory, record)
        ):
            if number % _ROWS == 0:
                self._progressed = self._now()
            yield row

    def _committed(self, in_time: bool) -> None:
        self._failures, self._fault, self._waiting_since = 0, None, None
        self.failure = None
        if in_time:
            self._change(Storage.OK, "")

    # -- the switch --------------------------------------------------------------------------------

    def tick(self, late_s: float = 0.0) -> None:
        """Each second, also while a step is under way: look at the file and at the time.

        For `late_s` before it this process did not run: that is no fault of the database.
        """
        if self._waiting_since is not None:
            self._waiting_since += late_s
        self._look()
        fault = self._database.fault()
        if fault is not None:
            self._change(Storage.LOST, fault)
        elif self._stalled():
            words = self._fault.words if self._fault else "a commit is taking too long"
            self._change(Storage.LOST, words)
        if self.state is Storage.LOST:
            self.wake()

    def _look(self) -> None:
        if self._journal.end.lsn <= self.applied:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self._now()

    def _stalled(self) -> bool:
        since = self._waiting_since
        return since is not None and self._now() - max(since, self._progressed) >= LOST_AFTER_S

    def _change(self, state: Storage, cause: str) -> None:
        if state is not self.state:
            self.state = state
            if state is Storage.LOST:
                self._rebuild_after = max(self._rebuild_after, self._now() + REBUILD_AFTER_S)
            self._on_change(state, cause)

    # -- its task ----------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to commit."""
        self._woken.set()

    async def reached(self, lsn: int) -> None:
        """Return when the tables have record `lsn`."""
        if self.applied < lsn:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaited.append((lsn, future))
            await future

    def _tell(self) -> None:
        for lsn, future in self._awaited:
            if lsn <= self.applied and not future.done():
                future.set_result(None)
        self._awaited = [each for each in self._awaited if not each[1].done()]

    async def run(self, stopping: asyncio.Event) -> None:
        """Commit whatever comes; after `stopping`, what is there, if that still works."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def tick() -> None:
            nonlocal timer
            late_s = max(0.0, loop.time() - timer.when())
            timer = loop.call_later(LOOK_EVERY_S, tick)
            self.tick(late_s)
            if stopping.is_set():
                self.wake()

        timer = loop.call_later(LOOK_EVERY_S, tick)
        try:
            while True:
                self._woken.clear()
                count = await self.step()
                if count == MOST_RECORDS or (count and stopping.is_set()):
                    continue
                if stopping.is_set():
                    return
                if count:
                    pause_s = REST_S
                elif self._failures:
                    pause_s = retry_after_s(self._failures)
                else:
                    await self._woken.wait()
                    continue
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), pause_s)
        finally:
            timer.cancel()


def _nobody(seconds: float) -> None:
    """Nobody counts them."""
