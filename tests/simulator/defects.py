"""Rules of the ledger, each left out on purpose. A simulator that does not notice is worth nothing.

Every defect is a patch of the real modules for one run, or a switch of an actor (`World.defect`).
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec

import gwproxy.core.ledger as core
import gwproxy.state.accounts as accounts
import gwproxy.state.books as books
import gwproxy.state.directory as directory
import gwproxy.state.ledger as ledger
import gwproxy.state.store as store
import gwproxy.state.upkeep as upkeep
import gwproxy.storage.archive_file as archive_file
import gwproxy.storage.database as real
import gwproxy.storage.journal as journal
import gwproxy.storage.ledger as tables
import gwproxy.storage.scan as scan
import gwproxy.storage.segments as segments
from gwproxy.core.period import periods
from gwproxy.core.records import Settle, encode
from gwproxy.state.accounts import Accounts
from gwproxy.state.archive import Archive
from gwproxy.state.reservation import Outcome, Planned, Reservation
from tests.simulator import database as played
from tests.simulator.disk import DiskFiles
from tests.simulator.seams import instead

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True)
class Defect:
    rule: str
    """What is left out, in words."""
    within: int
    """So many seeds are enough to see it."""
    plan: Mapping[str, Any]
    """What the runs are like that can see it at all."""
    plant: Patch


DEFECTS: Final[dict[str, Defect]] = {}


def defect(name: str, rule: str, within: int = 60, **plan: Any) -> Callable[[Patch], Patch]:
    def add(plant: Patch) -> Patch:
        DEFECTS[name] = Defect(rule, within, plan, plant)
        return plant

    return add


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    with ExitStack() as stack:
        if name is not None:
            DEFECTS[name].plant(stack)
        yield


def _instead(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(instead(owner, name, value))


# -- admission -----------------------------------------------------------------------------------


@defect("check-then-await", "nothing is awaited between check, hold and record")
def _(stack: ExitStack) -> None:
    fresh, seen = books.left, {}

    def stale(state: Any, accounts: Any, least: int | None = None) -> int | None:
        names = tuple((each.name, each.period) for each in accounts)
        before = seen.get(names, fresh(state, accounts))
        seen[names] = fresh(state, accounts)
        return least if before is None or (least is not None and least < before) else before

    _instead(stack, books, "left", stale)


@defect("forward-before-record", "no byte goes upstream before its reservation is recorded")
def _(stack: ExitStack) -> None:
    """An actor's: see `actors.request`."""


@defect("attempt-not-recorded", "a later attempt is recorded before it is sent")
def _(stack: ExitStack) -> None:
    async def unrecorded(self: Reservation, planned: Planned, why: str) -> Planned:
        return planned

    _instead(stack, Reservation, "next", unrecorded)


@defect("extension-unchecked", "a hold grows only where the budget has room")
def _(stack: ExitStack) -> None:
    _instead(stack, Reservation, "_room", lambda self, hold, provider=None: None)


@defect("uncapped-outage", "an outage is paid from an account with a limit of its own")
def _(stack: ExitStack) -> None:
    _instead(stack, Accounts, "_in_outage", lambda self, payer, day: payer)


@defect(
    "lenient-in-an-outage", "no policy passes the bound of an outage", 200, database_faults=True
)
def _(stack: ExitStack) -> None:
    _instead(stack, accounts, "_bounded", lambda organization: organization)


@defect(
    "room-not-kept",
    "settlements have room kept for them in the journal",
    400,
    slow=True,
    disk_faults=False,
    small=False,
    crashes=0,
    segment_bytes=12 << 10,
    most_segments=20,
)
def _(stack: ExitStack) -> None:
    def admit(self: ledger.Ledger) -> None:
        if self._owed:
            self.pay()
        if self.journal.lost is not None:
            raise ledger.NotRecorded("no")

    _instead(stack, ledger.Ledger, "admit", admit)
    _instead(stack, journal, "LEAST_ROOM_BYTES", 0)
    begin_spare, asked = journal.Journal.begin_spare, itertools.count()

    def slowly(self: journal.Journal) -> Any:
        """However long the next segment takes."""
        return None if next(asked) % 20 else begin_spare(self)

    _instead(stack, journal.Journal, "begin_spare", slowly)


@defect("owed-later", "what is owed is recorded before anything new is let in")
def _(stack: ExitStack) -> None:
    def admit(self: ledger.Ledger) -> None:
        if self.journal.lost is not None:
            raise ledger.NotRecorded("no")

    _instead(stack, ledger.Ledger, "admit", admit)


@defect(
    "stall-not-noticed", "a sync that takes too long makes the journal lost", within=200, slow=True
)
def _(stack: ExitStack) -> None:
    _instead(stack, upkeep, "STALLED_AFTER_S", 1e9)


@defect("leap-believed", "a wall clock that leaps is not believed at once", within=60, clocks=True)
def _(stack: ExitStack) -> None:
    _instead(stack, ledger, "JUMP_MS", 1 << 60)


@defect("restriction-needs-its-record", "a restriction holds even when it cannot be recorded", 200)
def _(stack: ExitStack) -> None:
    _instead(stack, directory, "restricted", lambda before, after: before)


# -- settlement ----------------------------------------------------------------------------------


@defect("settle-twice", "a reservation is settled exactly once")
def _(stack: ExitStack) -> None:
    once = Reservation._settle

    def again(self: Reservation, outcome: Outcome) -> None:
        once(self, outcome)
        self._settled = False

    _instead(stack, Reservation, "_settle", again)


@defect("leaving-is-free", "a client that leaves pays for what it got")
def _(stack: ExitStack) -> None:
    settle = Reservation._settle

    def generous(self: Reservation, outcome: Outcome) -> None:
        if outcome is Outcome.CLIENT_LEFT:
            self.refused()
        settle(self, outcome)

    _instead(stack, Reservation, "_settle", generous)


@defect("room-released-unrecorded", "room is released when the settlement is recorded")
def _(stack: ExitStack) -> None:
    post = ledger.Ledger.post

    def hasty(self: ledger.Ledger, record: Any) -> Any:
        try:
            return post(self, record)
        except ledger.NotRecorded:
            if isinstance(record, Settle):
                return core.apply(self.state, record)
            raise

    _instead(stack, ledger.Ledger, "post", hasty)


@defect("unknown-is-not-written", "a record of unknown outcome counts as written", 200)
def _(stack: ExitStack) -> None:
    def post(self: ledger.Ledger, record: Any) -> Any:
        try:
            self.journal.write(encode(record))
        except (journal.NotWritten, journal.OutcomeUnknown) as error:
            raise ledger.NotRecorded("no") from error
        return core.apply(self.state, record)

    _instead(stack, ledger.Ledger, "post", post)


@defect("month-of-settlement", "a request belongs to the period in which it was reserved")
def _(stack: ExitStack) -> None:
    settle = core._settle

    def late(state: core.State, record: Settle) -> core.Touched:
        hold = state.holds.get(record.r)
        if hold is not None:
            month, day = periods(record.t)
            moved = []
            for held in hold.holds:
                period = month if len(held.period) == 7 else day
                state.balance((held.account, held.period)).held -= held.hold
                state.balance((held.account, period)).held += held.hold
                moved.append(msgspec.structs.replace(held, period=period))
            hold.holds = tuple(moved)
        return settle(state, record)

    _instead(stack, core, "_APPLY", {**core._APPLY, Settle: late})


@defect("late-watermark", "a watermark is recorded before anything above it is relayed")
def _(stack: ExitStack) -> None:
    extend = Reservation.extend

    def soon(self: Reservation) -> None:
        loop = asyncio.get_running_loop()

        def do() -> None:
            if not self._settled:
                try:
                    extend(self)
                except Exception:
                    return

        loop.call_later(0.2, do)

    _instead(stack, Reservation, "extend", soon)


# -- recovery ------------------------------------------------------------------------------------


@defect("recovery-past-the-journal", "recovery's settlements are records like all others")
def _(stack: ExitStack) -> None:
    recover = ledger.Ledger.recover

    def silent(self: ledger.Ledger) -> int:
        with instead(ledger.Ledger, "post", lambda self, record: core.apply(self.state, record)):
            return recover(self)

    _instead(stack, ledger.Ledger, "recover", silent)


@defect("recovery-forgives", "what nobody settled is charged its watermark or its hold")
def _(stack: ExitStack) -> None:
    _instead(stack, core.Hold, "recovered_cost", lambda self: self.mark or 0)


@defect("recovery-believes-hidden-marks", "what is out of sight is charged its hold", 200)
def _(stack: ExitStack) -> None:
    _instead(
        stack,
        core.Hold,
        "recovered_cost",
        lambda self: self.amount if self.mark is None else self.mark,
    )
    attempt = Reservation.attempt

    def marked(self: Reservation, planned: Planned) -> Any:
        meter = attempt(self, planned)
        seen = msgspec.structs.replace(planned.priced.ask, hidden=False)
        self._priced = msgspec.structs.replace(planned.priced, ask=seen)
        return meter

    _instead(stack, Reservation, "attempt", marked)


# -- the journal ---------------------------------------------------------------------------------


@defect(
    "fdatasync-tried-again",
    "a sync that failed is not tried again on that descriptor",
    within=100,
    disk_faults=True,
    power_cuts=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    end_sync = journal.Journal.end_sync

    def trusting(self: journal.Journal, sync: Any, error: OSError | None) -> None:
        if error is not None and sync is self._sync:
            self._sync = None
            self._syncs_running -= 1
            return
        end_sync(self, sync, error)

    _instead(stack, journal.Journal, "end_sync", trusting)


@defect("short-write-left", "what a failed write has left is cut off again", 100)
def _(stack: ExitStack) -> None:
    def leave(self: journal.Journal, payload: bytes, chain: int, why: str) -> None:
        self._offset += 7  # as a write at the file's end would
        raise journal.NotWritten(why)

    _instead(stack, journal.Journal, "_take_back", leave)


@defect("short-write-taken-for-whole", "a short write is no write", 100)
def _(stack: ExitStack) -> None:
    pwrite = DiskFiles.pwrite
    _instead(
        stack,
        DiskFiles,
        "pwrite",
        lambda self, fd, data, offset: pwrite(self, fd, data, offset) and len(data),
    )


@defect("written-later", "a record is in the journal when it is acknowledged")
def _(stack: ExitStack) -> None:
    write = journal.Journal.write

    def buffered(self: journal.Journal, payload: bytes) -> None:
        files = self.files
        self.files = _Buffered(files, self)
        try:
            write(self, payload)
        finally:
            self.files = files

    _instead(stack, journal.Journal, "write", buffered)


class _Buffered:
    """Keeps what is written for a while, as a buffered file does."""

    def __init__(self, files: Any, owner: Any) -> None:
        self._files = files
        self._loop = files._breathe.__self__

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        def flush() -> None:
            if fd in self._files._open:
                self._files.pwrite(fd, data, offset)

        self._loop.call_later(0.05, flush)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


@defect(
    "segment-dropped-early",
    "a segment stays until the database and a backup cover it",
    within=100,
    database_faults=True,
)
def _(stack: ExitStack) -> None:
    _instead(stack, played.PlayedBackups, "covered", lambda self, applied: 1 << 60)


@defect("backup-not-kept", "a segment stays until a backup covers it", 300, database_faults=True)
def _(stack: ExitStack) -> None:
    make = played.PlayedBackups.make

    async def once(self: played.PlayedBackups, database: Any) -> tuple[str, tables.Mark]:
        if not self._file.backups:
            return await make(self, database)
        return "an image", played.mark_in(self._file.image)

    _instead(stack, played.PlayedBackups, "make", once)
    _instead(stack, played.PlayedBackups, "covered", lambda self, applied: applied)


@defect(
    "dropped-newest-first",
    "segments go the oldest first, each for good",
    within=200,
    power_cuts=True,
    crashes=5,
    small=True,
    segment_bytes=6 << 10,
)
def _(stack: ExitStack) -> None:
    def run(self: journal.Drop) -> None:
        for segment in reversed(self.segments):
            self.files.unlink(self.directory / segment.name)
        self.done = len(self.segments)

    _instead(stack, journal.Drop, "run", run)


@defect("spare-name-not-synced", "a segment's name is on the disk before it is used", 100)
def _(stack: ExitStack) -> None:
    def run(self: journal.Spare) -> None:
        self.fd = self.files.create(self.directory / segments.segment_name(self.number))
        self.files.posix_fallocate(self.fd, 0, self.size)
        self.files.fsync(self.fd)

    _instead(stack, journal.Spare, "run", run)


@defect(
    "inherited-not-synced",
    "what was inherited is synced before it counts as synced",
    within=200,
    power_cuts=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    inherit = journal.inherit

    def trusting(files: Any, directory: Any, found: Any) -> Any:
        with instead(DiskFiles, "fsync", lambda self, fd: None):
            return inherit(files, directory, found)

    _instead(stack, journal, "inherit", trusting)


@defect("chain-not-checked", "each record is checked against the one before it", 100)
def _(stack: ExitStack) -> None:
    def records(data: bytes, chain: int, most: int) -> tuple[list[bytes], int, int]:
        payloads: list[bytes] = []
        start = 0
        while len(payloads) < most and (stop := data.find(b"\n", start)) >= 0:
            try:
                chain = int(data[start : start + 8], 16)
            except ValueError:
                break
            payloads.append(data[start + 9 : stop])
            start = stop + 1
        return payloads, start, chain

    _instead(stack, segments, "records", records)
    _instead(stack, scan, "records", records)


@defect("torn-tail-refused", "an unfinished last record was told to nobody, and is cut off", 200)
def _(stack: ExitStack) -> None:
    _instead(stack, scan, "_unfinished", lambda data, chain: False)


@defect(
    "damage-cut-off",
    "damage before the last synced record stops the start",
    within=200,
    rot=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    _instead(stack, scan, "_unfinished", lambda data, chain: True)
    stack.callback(delattr, scan, "max")
    scan.max = lambda *values: 0 if len(values) == 1 else max(*values)


@defect(
    "boot-id-ignored",
    "after a power cut what was not synced may be gone",
    within=60,
    power_cuts=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    _instead(stack, store, "boot_id", lambda files: "boot")


@defect(
    "number-used-again",
    "a number that the database has seen is not used again",
    within=400,
    liar=True,
    power_cuts=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    start = vars(journal.Journal)["start"].__func__

    def forgetful(cls: Any, files: Any, directory: Any, found: Any, **rest: Any) -> Any:
        return start(cls, files, directory, found, **{**rest, "applied_lsn": 0})

    _instead(stack, journal.Journal, "start", classmethod(forgetful))


@defect(
    "full-not-awaited",
    "in `full` nothing is sent before its record is on the disk",
    within=100,
    full=True,
    power_cuts=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    async def at_once(self: upkeep.Upkeep, lsn: int) -> None:
        return

    _instead(stack, upkeep.Upkeep, "durable", at_once)


# -- the database --------------------------------------------------------------------------------


@defect("commit-before-sync", "the database gets no record before it is on the disk", 1000)
def _(stack: ExitStack) -> None:
    init = tables.Writer.__init__

    def hasty(self: tables.Writer, *args: Any, **named: Any) -> None:
        async def at_once(lsn: int) -> None:
            return

        init(self, *args, **{**named, "synced": at_once})

    _instead(stack, tables.Writer, "__init__", hasty)


@defect("place-kept-after-a-fault", "after any fault the mark is read again", 200)
def _(stack: ExitStack) -> None:
    step = tables.Writer.step
    anywhere = tables._ADVANCE.replace("applied_lsn = ? AND", "? >= 0 AND")
    _instead(stack, tables, "_ADVANCE", anywhere)

    async def stubborn(self: tables.Writer) -> int:
        place = self._place
        count = await step(self)
        if self._place is None:
            self._place = place
        return count

    _instead(stack, tables.Writer, "step", stubborn)


@defect("half-a-batch-kept", "a batch is committed whole or not at all", 200)
def _(stack: ExitStack) -> None:
    def transaction(connection: Any, work: Any, check: Any) -> Any:
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            check()
        except Exception:
            if connection.in_transaction:
                connection.execute("COMMIT")
            raise
        connection.execute("COMMIT")
        return result

    _instead(stack, played, "transaction", transaction)


@defect("rollback-not-noticed", "a transaction that SQLite has ended by itself is noticed", 200)
def _(stack: ExitStack) -> None:
    for module in (real, tables):
        _instead(stack, module, "assert_in_transaction", lambda connection: None)


@defect(
    "file-not-looked-at",
    "a file that was swapped is noticed before the next commit",
    within=100,
    database_faults=True,
)
def _(stack: ExitStack) -> None:
    _instead(stack, played.PlayedDatabase, "fault", lambda self: None)


# -- what was really wrong once --------------------------------------------------------------------


@defect(
    "uncertain-watermark",
    "a watermark of unknown outcome allows for nothing",
    600,
    disk_faults=True,
    crashes=5,
)
def _(stack: ExitStack) -> None:
    set_mark = Reservation._set_mark

    def trusting(self: Reservation, hold: Any, account: Any, units: int, **how: Any) -> None:
        try:
            set_mark(self, hold, account, units, **how)
        except ledger.RecordUncertain:
            self.mark = units

    _instead(stack, Reservation, "_set_mark", trusting)


@defect(
    "another's-outcome",
    "what becomes of an owed record says nothing of one's own",
    100,
    disk_faults=True,
    clocks=False,
    crashes=0,
)
def _(stack: ExitStack) -> None:
    pay, decide = ledger.Ledger.pay, directory.Directory._record

    def unknown() -> None:
        raise ledger.RecordUncertain("It was written, or it was not.")

    async def late(self: directory.Directory, action: str, *args: Any, **fields: Any) -> Any:
        # By itself such a record is hardly ever owed just when somebody is to be shut out.
        if action == "revoke":
            self._ledger._owed.append(unknown)
        return await decide(self, action, *args, **fields)

    _instead(stack, directory.Directory, "_record", late)

    def mistaken(self: ledger.Ledger) -> None:
        try:
            pay(self)
        except ledger.NotRecorded as error:
            if isinstance(error.__cause__, ledger.RecordUncertain):
                raise error.__cause__ from None
            raise

    _instead(stack, ledger.Ledger, "pay", mistaken)


@defect("recovery-hides-overruns", "what recovery charges above the hold is an overrun too", 200)
def _(stack: ExitStack) -> None:
    post = ledger.Ledger.post

    def plain(self: ledger.Ledger, record: Any) -> Any:
        if isinstance(record, Settle) and record.outcome == "recovered":
            record = msgspec.structs.replace(record, overrun=0)
        return post(self, record)

    _instead(stack, ledger.Ledger, "post", plain)


@defect(
    "cut-beyond-the-hold",
    "what a cut stream is charged was held for it",
    600,
    disk_faults=False,
    database_faults=False,
    crashes=0,
)
def _(stack: ExitStack) -> None:
    extend, set_mark = Reservation.extend, Reservation._set_mark

    def careless(self: Reservation) -> None:
        kept: list[Any] = []
        with instead(
            Reservation,
            "_set_mark",
            lambda self, *args, **how: kept.append((args, how)),
        ):
            extend(self)  # where it refuses, nothing more is held
        for args, how in kept:
            set_mark(self, *args, **how)

    _instead(stack, Reservation, "extend", careless)


# -- the archive ---------------------------------------------------------------------------------


@defect("archive-not-synced", "a file has reached the disk before its accounts are closed", 300)
def _(stack: ExitStack) -> None:
    _instead(stack, archive_file, "finish", _unsynced(archive_file.finish))


def _unsynced(finish: Callable[..., Any]) -> Callable[..., Any]:
    def hasty(out: Any, path: Any, end: Any) -> Any:
        out.files.fsync = lambda fd: None
        try:
            return finish(out, path, end)
        finally:
            del out.files.fsync

    return hasty


@defect("archive-closes-by-the-tables", "an account is closed with the figures of memory", 300)
def _(stack: ExitStack) -> None:
    post = Archive._post

    def stale(self: Archive, key: Any, stored: Any, hash: str) -> None:
        self._ledger.state.balances.pop(key, None)
        stored.spent -= stored.spent // 2  # as if the tables were some way behind
        post(self, key, stored, hash)

    _instead(stack, Archive, "_post", stale)


@defect("archive-erases-first", "rows leave the tables when all accounts are closed", 300)
def _(stack: ExitStack) -> None:
    async def hasty(self: Archive, found: Any) -> None:
        await self._erase(found.path, found.hash)
        await self._close(found.head, found.hash)

    _instead(stack, Archive, "_close_and_erase", hasty)
