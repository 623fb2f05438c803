"""All that is kept, opened in order and closed in order: locks, journal, database, ledger, keys.

The order is the guarantee. Nothing is written before both locks are held and everything inherited
has been judged; nobody is served before what a process before left open has been settled.
"""

import asyncio
import contextlib
import enum
import functools
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from gwproxy.core import records
from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.identity import AdminKey, ApiKey, Below, Organization, User
from gwproxy.core.ledger import BrokenLedger, Request, State, apply
from gwproxy.core.period import rfc3339
from gwproxy.core.records import Admin, Alert, Import, Settle, Stop, decode
from gwproxy.log import Log
from gwproxy.state.adjustments import Adjustments
from gwproxy.state.archive import Archive
from gwproxy.state.directory import Directory
from gwproxy.state.gateway_side import GatewaySide
from gwproxy.state.imports import Imports, put_all, put_in_force
from gwproxy.state.keyring import Keyring
from gwproxy.state.lately import Lately
from gwproxy.state.ledger import Clock, Ledger, Recent
from gwproxy.state.outage import Condition, Outage
from gwproxy.state.repeats import Repeats
from gwproxy.state.upkeep import Upkeep
from gwproxy.storage import directory as storage
from gwproxy.storage import imports, reports
from gwproxy.storage.backup import Backups, CanFollow, follow, following
from gwproxy.storage.database import (
    BackupRefused,
    Database,
    DatabaseGone,
    DatabaseRefused,
    refusal,
)
from gwproxy.storage.files import OS_FILES, Files
from gwproxy.storage.journal import Journal
from gwproxy.storage.ledger import (
    Mark,
    Mismatch,
    Older,
    Storage,
    Writer,
    begin_epoch,
    load_state,
    loaded_since,
    read_mark,
)
from gwproxy.storage.locks import Held
from gwproxy.storage.reports import Corrected
from gwproxy.storage.scan import Scan, boot_id, claim, scan
from gwproxy.storage.segments import CHUNK_BYTES, Gap, JournalRefused

CATCH_UP_S: Final = 10.0
"""On the way out the database gets so long to take what the journal has; the rest comes with the
next start."""

REPORT_WAITS_S: Final = 1.0
"""Twenty times the writer's pause between two commits: where nothing is wrong a report lacks
nothing, on a busy machine either; where the database is slow it comes all the same."""

BACKUP_LOOK_S: Final = 60.0
PAY_EVERY_S: Final = 1.0
LOCK_LOOK_S: Final = 1.0

_PAGE: Final = 1000


class Synchronous(enum.StrEnum):
    """What is waited for before a byte goes upstream or a change is acknowledged."""

    NORMAL = "normal"  # that it is written: it survives the process
    FULL = "full"  # that it is on the disk: it survives the machine


@dataclass(frozen=True, slots=True)
class Kept:
    """Where things are kept, and how."""

    database: Path
    journal: Path
    synchronous: Synchronous = Synchronous.NORMAL
    segment_bytes: int = 64 << 20
    max_bytes: int = 1 << 30
    backup_every_h: int = 24
    """0: only when the journal has grown so long that it has to be cut."""
    keep_backups: int = 7
    keep_months: int = 13
    """Months of requests that stay in the database, besides the current one; 0: all of them."""

    @property
    def archive(self) -> Path:
        return self.database.with_name(self.database.name + ".archive")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a start found."""

    replayed: int
    """Records of the journal that the database did not have yet."""
    settled: int
    """Requests that nobody had settled."""
    forgotten: str | None
    """After the machine itself went down: which records were lost, in words."""


class Store:
    """Everything that outlives the process. Made by `open`, given back by `close`."""

    def __init__(
        self,
        *,
        lock: int,
        database: Database,
        journal: Journal,
        ledger: Ledger,
        keyring: Keyring,
        directory: Directory,
        adjustments: Adjustments,
        imports: Imports,
        upkeep: Upkeep,
        backups: Backups,
        clock: Clock,
        recovery: Recovery,
        durable: Callable[[int], Awaitable[None]],
        files: Files,
        kept: Kept,
        since: str,
        lately: Lately,
        log: Log,
    ) -> None:
        self._lock = lock
        self.database = database
        self.gateway_side = GatewaySide(kept.database)
        self.journal = journal
        self.ledger = ledger
        self.keyring = keyring
        self.directory = directory
        self.adjustments = adjustments
        self.imports = imports
        self.clock = clock
        self.recovery = recovery
        self.lately = lately
        self.durable = durable
        self.outage = Outage()
        self._upkeep = upkeep
        self._backups = backups
        self._log = log
        self._backing_up = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self.unsettled: list[str] = []
        """After its close: requests whose settlement could not be recorded."""
        self.writer = Writer(
            database,
            journal,
            synced=upkeep.durable,
            breathe=_breathe,
            now=time.monotonic,
            on_change=self._database_changed,
            rebuild=self._rebuild,
        )
        ledger.posted = self.writer.wake
        self.archive = Archive(
            files,
            kept.archive,
            database,
            ledger,
            self.writer,
            log,
            since=since,
            keep_months=kept.keep_months,
        )

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    async def open(
        cls,
        kept: Kept,
        group: asyncio.TaskGroup,
        log: Log,
        *,
        below: Below = secrets.randbelow,
        wall: Callable[[], float] = time.time,
        files: Files = OS_FILES,
        accept_loss: bool = False,
    ) -> Self:
        """DatabaseRefused or JournalRefused, with the cure, where something is in the way.

        `group` runs what goes on in the background. `accept_loss`: a journal that should be there
        and is not is done without, and what only it knew is lost.
        """
        async with contextlib.AsyncExitStack() as undo:
            lock = -1

            def claimed() -> int:
                nonlocal lock
                if lock < 0:
                    lock = claim(kept.journal)
                    undo.callback(os.close, lock)
                return lock

            async def rebuild(gone: DatabaseGone) -> Callable[[Path], None]:
                claimed()
                return await _rebuilt_at_start(kept, files, log, gone)

            # Where there is a journal there has been a database: a disk that is not mounted must
            # not pass for a fresh start.
            fresh = not (any(kept.journal.glob("*.journal")) or _backups(kept).any)
            opening = Database.open(kept.database, create=fresh, rebuild=None if fresh else rebuild)
            database = await undo.enter_async_context(await opening)
            try:
                store = await cls._open(
                    kept,
                    database,
                    claimed(),
                    log,
                    files,
                    below=below,
                    wall=wall,
                    accept_loss=accept_loss,
                )
            except StorageUnavailable as error:
                raise refusal(kept.database, error.__cause__) from error
            undo.pop_all()
        store._start(group)
        return store

    @classmethod
    async def _open(
        cls,
        kept: Kept,
        database: Database,
        lock: int,
        log: Log,
        files: Files,
        *,
        below: Below,
        wall: Callable[[], float],
        accept_loss: bool,
    ) -> Self:
        booted = boot_id(files)
        mark = await read_mark(database)
        found = await asyncio.to_thread(scan, files, kept.journal, booted, mark.lsn)
        _check_pair(kept, found, mark, accept_loss)
        backups = _backups(kept)
        mark = await _not_older(database, backups, found, mark, log)
        mark = await begin_epoch(database, found.ledger_id or secrets.token_hex(8), found.epoch)

        keyring = Keyring()
        rows = await storage.load(database)
        put_all(keyring, (row for row in rows if isinstance(row, Organization | User)))
        for row in rows:
            if isinstance(row, ApiKey | AdminKey):
                keyring.apply(row)

        repeats = Repeats()
        for made in await storage.load_repeats(database):
            repeats.remember(*made)
        awaited: set[str] = set()

        def change(record: Admin | Import) -> None:
            if isinstance(record, Import):
                awaited.add(record.file)
                put_in_force(keyring, record, lambda: imports.read(files, kept.journal, record))
                return
            row = record.row
            keyring.apply(row)
            if record.idempotency_key is not None:
                name = storage.named(row)[1]
                repeats.remember(record.idempotency_key, record.lsn, record.t, name)

        state = await load_state(database, breathe=_breathe, directory=change)
        recent = Recent()
        lately = Lately(int(wall() * 1000))
        lately.stored(
            await database.run(functools.partial(reports.admitted_since, t=lately.since_ms)), state
        )
        since = loaded_since(mark.t)
        older = Older(database, state, since)
        replayed = await _replay(kept, found, mark, state, recent, older, lately)
        journal = await asyncio.to_thread(
            Journal.start,
            files,
            kept.journal,
            found,
            ledger_id=mark.ledger_id or "",
            epoch=mark.epoch,
            boot_id=booted,
            applied_lsn=mark.lsn,
            applied_chain=mark.chain,
            segment_bytes=kept.segment_bytes,
            max_bytes=kept.max_bytes,
        )
        clock = Clock(wall, time.monotonic)
        ledger = Ledger(state, journal, clock.now_ms, recent)
        for sent, (lsn, t) in state.idempotency.items():
            if lsn > mark.lsn:  # of adjustments that the database does not have yet
                repeats.remember(sent, lsn, t, None)
        settled = ledger.recover()
        await imports.sweep(database, files, kept.journal, journal.first_lsn, awaited)
        upkeep = Upkeep(journal, log, time.monotonic)
        await upkeep.sync()
        assert not state.holds, "a hold has outlived its process"
        recovery = Recovery(replayed, settled, _forgotten(found))
        _report(log, recovery, state, clock)
        full = kept.synchronous is Synchronous.FULL
        durable = upkeep.durable if full else _at_once
        return cls(
            lock=lock,
            database=database,
            journal=journal,
            ledger=ledger,
            keyring=keyring,
            directory=Directory(ledger, keyring, repeats, below, durable),
            adjustments=Adjustments(ledger, repeats, durable),
            imports=Imports(ledger, keyring, below, durable),
            upkeep=upkeep,
            backups=backups,
            clock=clock,
            recovery=recovery,
            durable=durable,
            files=files,
            kept=kept,
            since=since,
            lately=lately,
            log=log,
        )

    def _start(self, group: asyncio.TaskGroup) -> None:
        self._tasks = [
            group.create_task(self._upkeep.run()),
            group.create_task(self.writer.run(self._stopping)),
            group.create_task(self._keep_backups()),
            group.create_task(self._keep_paying()),
            group.create_task(self._keep_lock()),
            group.create_task(self.archive.run()),
        ]

    # -- while it runs -----------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the database is; the journal says for itself whether it is."""
        return self.outage.lost

    def condition(self, *, draining: bool, closed: bool) -> Condition:
        """How all of it stands. `closed`: as configured for organizations that do not say."""
        database = self.outage.words if self.outage.lost else None
        return Condition(draining, self.journal.lost, database, closed)

    @property
    def segments_missing(self) -> int:
        """How many of the journal's segments somebody has taken away."""
        return len(self._upkeep.missing)

    def last_backup_at(self) -> float | None:
        """When the newest backup was made, in seconds since 1970."""
        return self._backups.newest_at()

    async def find_request(self, request_id: str) -> Request | None:
        """A request that memory does not have any more."""
        return await reports.find_request(self.database, request_id)

    async def corrections_of(self, found: Request) -> list[Corrected] | None:
        """What was corrected of a request; None where the database cannot tell."""
        try:
            return await reports.corrections(self.database, found.lsn)
        except StorageUnavailable:
            return None

    async def catch_up(self, within_s: float = REPORT_WAITS_S) -> None:
        """Wait, but not for long, until the database has what memory has at this moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.writer.reached(self.ledger.state.lsn)

    async def alerts_after(self, lsn: int, since_ms: int, most: int) -> list[Alert]:
        """Those recorded by now, after a record and from a moment on, oldest first."""
        now = self.ledger.state.lsn
        await self.catch_up(within_s=CATCH_UP_S)
        if self.writer.applied < now:
            raise StorageUnavailable("The database does not have all of them yet.")
        return await reports.alerts_after(self.database, lsn, since_ms, most)

    async def store_key_use(self) -> None:
        """Keep when each key was last used: no record, since losing it costs nothing."""
        uses = self.keyring.used_since_stored()
        if uses and not await storage.update_uses(self.database, uses):
            self.keyring.not_stored(uses)

    async def back_up(self) -> tuple[str, Mark]:
        """Back the database up, and let go of the journal that it covers. BackupRefused."""
        async with self._backing_up:
            file, mark = await self._backups.make(self.database)
        self._log.event("info", "backed up", lsn=mark.lsn)
        await self._upkeep.drop(self._backups.covered(self.writer.applied))
        journal = self.journal
        with contextlib.suppress(StorageUnavailable, OSError):  # there is a next time
            await imports.sweep(
                self.database, journal.files, journal.directory, journal.first_lsn, None
            )
        return str(file), mark

    async def _keep_backups(self) -> None:
        """Back the database up when that is due, and when the journal has lost a part of what
        would be needed beside the backup before."""
        upkeep = self._upkeep
        # Without a backup nor a beginning a loss of the database could not be made good.
        at_once = self.journal.first_lsn > 1 and not self._backups.any
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0 if at_once else BACKUP_LOOK_S):
                    await upkeep.more_missing.wait()
            upkeep.more_missing.clear()
            at_once = False
            due = self._backups.due(time.time(), self.journal.size_bytes())
            if self.lost or not (due or upkeep.missing):
                continue
            try:
                await self.back_up()
            except BackupRefused as error:
                self._log.event("error", "no backup", message=str(error))

    async def _keep_paying(self) -> None:
        """Record what is owed as soon as the journal takes it, also while nobody asks for more."""
        while True:
            await asyncio.sleep(PAY_EVERY_S)
            if self.ledger.owes:
                with contextlib.suppress(StorageUnavailable):
                    self.ledger.pay()

    async def _keep_lock(self) -> None:
        """Without its lock file the database would be opened by a second process too."""
        told: str | None = None
        while True:
            await asyncio.sleep(LOCK_LOOK_S)
            try:
                if self.database.keep_lock():
                    told = None
                    self._log.event("warning", "lock file deleted, and put back")
            except OSError:
                continue  # the folder is away, or full: what else that means is told elsewhere
            except Held as holder:
                if told != str(holder):
                    told = str(holder)
                    self._log.event("error", f"the lock file is another process's{holder}")

    async def _rebuild(self, can_follow: CanFollow, set_aside: bool) -> str:
        """Put a good database in the place of one that is lost; BackupRefused."""
        try:
            source = await self._backups.rebuild(
                self.database, self.journal.ledger_id, can_follow, set_aside
            )
        except BackupRefused as error:
            if self.outage.stays != str(error):  # it is tried again and again
                self.outage.stays = str(error)
                self._log.event("error", "database not rebuilt", cause=str(error))
            raise
        self.outage.stays = ""
        self._log.event("warning", "database rebuilt", source=source)
        return source

    def _database_changed(self, state: Storage, cause: str) -> None:
        now_s, applied = time.monotonic(), self.writer.applied
        if state is Storage.LOST:
            self.outage.begin(cause, now_s, applied)
            failure = self.writer.failure
            exception = type(failure.__cause__ or failure).__name__ if failure else None
            self._log.event("error", "database lost", cause=cause, exception=exception)
        else:
            report = self.outage.end(now_s, applied)
            self._log.event("info", "database recovered", **report)
        with contextlib.suppress(StorageUnavailable):  # the log has it in any case
            self.ledger.admit()  # the room that is left may belong to settlements
            self.ledger.post(
                records.Storage(**self.ledger.stamp(), part="database", state=state, cause=cause)
            )

    # -- closing -----------------------------------------------------------------------------

    async def close(self) -> None:
        """Write that all is in order, if it is, and let the database catch up."""
        if self._closed:
            return
        self._closed = True
        upkeep, writing, *others = self._tasks
        for task in others:
            task.cancel()
        with contextlib.suppress(StorageUnavailable, OSError):
            self.ledger.pay()
            await self._upkeep.sync()
            if not self.ledger.state.holds:
                self.ledger.post(Stop(**self.ledger.stamp()))
                await self._upkeep.sync()
        self.unsettled = [hold.reserve.id for hold in self.ledger.state.holds.values()]
        self._stopping.set()
        self.writer.wake()
        try:
            async with asyncio.timeout(CATCH_UP_S):
                await asyncio.wait((writing,))
        except TimeoutError:
            writing.cancel()
        upkeep.cancel()
        await asyncio.wait(self._tasks)
        self._upkeep.close()
        self.journal.close()
        await self.database.close()
        os.close(self._lock)


@contextlib.asynccontextmanager
async def opened(kept: Kept, log: Log, **how: Any) -> AsyncIterator[Store]:
    """A store with a task group of its own, for whoever has none: see `Store.open`."""
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        store = None
        try:
            store = await Store.open(kept, group, log, **how)
            yield store
        except BaseException as error:
            failure = error  # the group would wrap it
        finally:
            if store is not None:
                await store.close()
    if failure is not None:
        raise failure


async def _breathe() -> None:
    await asyncio.sleep(0)


async def _at_once(lsn: int) -> None:
    """A record that is written survives the process, and that is what was asked for."""


def _check_pair(kept: Kept, found: Scan, mark: Mark, accept_loss: bool) -> None:
    """Refuse a journal and a database of which one is not the other's."""
    there = bool(found.trail.segments)
    if not there and mark.lsn and not accept_loss:
        raise JournalRefused(
            f"{kept.journal}: the journal of {kept.database} is missing. Put it back; or go on "
            "without what only it knew: `gwproxy ledger accept-loss`."
        )
    if there and mark.ledger_id not in (None, found.ledger_id):
        raise JournalRefused(
            f"{kept.journal}: belongs to ledger {found.ledger_id}, the database to "
            f"{mark.ledger_id}. Set [storage] path and journal to two that belong together."
        )


def _backups(kept: Kept) -> Backups:
    return Backups(kept.journal, every_s=kept.backup_every_h * 3600, keep=kept.keep_backups)


async def _rebuilt_at_start(
    kept: Kept, files: Files, log: Log, gone: DatabaseGone
) -> Callable[[Path], None]:
    """What puts a database in the place of one that is gone; DatabaseRefused."""
    found = await asyncio.to_thread(scan, files, kept.journal, boot_id(files), 0)
    if not found.trail.segments:
        raise DatabaseRefused(f"{gone} It could not be rebuilt: {kept.journal} is missing too.")
    try:
        source, place = await _backups(kept).chosen(found.ledger_id, following(found))
    except BackupRefused as error:
        raise DatabaseRefused(f"{gone} It could not be rebuilt: {error}") from error
    log.event("warning", "database rebuilt", source=source, cause=str(gone))
    return place


async def _not_older(
    database: Database, backups: Backups, found: Scan, mark: Mark, log: Log
) -> Mark:
    """The database's mark; of an older copy, which the journal cannot bring up to now, that of the
    backup that takes its place."""
    if not found.trail.segments or found.trail.end.lsn < mark.lsn:
        return mark
    try:
        await asyncio.to_thread(found.trail.find, mark.lsn)
    except Gap as gap:
        try:
            source = await backups.rebuild(database, found.ledger_id, following(found))
        except BackupRefused:
            return mark  # which is told with what is missing
        await database.reopen(check=True)
        log.event("warning", "database rebuilt", source=source, cause=str(gap))
        return await read_mark(database)
    return mark


async def _replay(
    kept: Kept,
    found: Scan,
    mark: Mark,
    state: State,
    recent: Recent,
    older: Older,
    lately: Lately,
) -> int:
    """Apply what the database does not have yet: how many records. Until it has them, the requests
    among them are found in `recent`."""
    trail = found.trail
    if not trail.segments or trail.end.lsn < mark.lsn:
        return 0
    try:
        cursor = follow(found, mark)
    except Gap as gap:
        raise JournalRefused(
            f"{kept.journal}: {gap}, and {kept.database} has none before. Restore the newest "
            "backup of the database: `gwproxy restore FILE`."
        ) from gap
    except Mismatch as mismatch:
        raise JournalRefused(
            f"{kept.database}: {mismatch}, {kept.journal}. "
            "Set [storage] path and journal to two that belong together."
        ) from mismatch
    while cursor.lsn < trail.end.lsn:
        payloads, cursor = trail.read(cursor, _PAGE, CHUNK_BYTES)
        for payload in payloads:
            try:
                record = decode(payload)
                await older.ready(record)
                touched = apply(state, record)
            except (ValueError, BrokenLedger) as error:
                raise JournalRefused(f"{kept.journal}: {error}.") from error
            lately.saw(record)
            if isinstance(record, Settle):
                recent.add(touched)
    return cursor.lsn - mark.lsn


def _forgotten(found: Scan) -> str | None:
    if found.cut is None:
        return None
    cut = found.cut
    return (
        f"records {cut.first_lsn} to {max(cut.last_lsn, cut.first_lsn)} in {cut.file.name}, from "
        f"byte {cut.offset}: {cut.why}"
    )


def _report(log: Log, recovery: Recovery, state: State, clock: Clock) -> None:
    if recovery.forgotten is not None:
        log.event("error", "records lost with the machine", what=recovery.forgotten)
    if recovery.replayed or recovery.settled:
        log.event(
            "info",
            "ledger recovered",
            replayed=recovery.replayed,
            settled=recovery.settled,
        )
    behind_ms = state.t - clock.now_ms()
    if behind_ms > 0:
        log.event(
            "warning",
            "the clock is behind the ledger, whose time stands still until it has caught up",
            ledger=rfc3339(state.t),
            behind_s=behind_ms // 1000,
        )
