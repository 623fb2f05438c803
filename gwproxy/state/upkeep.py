"""The journal's upkeep: what it needs of the disk, done in threads of its own, and whoever waits
for it. The event loop never waits for a disk.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

from gwproxy.core.errors import StorageUnavailable
from gwproxy.log import Log
from gwproxy.storage.journal import Journal

SYNC_EVERY_S: Final = 1.0
"""A power cut forgets at most what was written since the last sync."""

STALLED_AFTER_S: Final = 5.0
"""A sync that takes longer is no sync: nothing more is promised on its account."""

LOOK_EVERY_S: Final = 0.25

RETRY_AFTER_S: Final = 5

_LOST: Final = "The gateway's storage is not available at the moment."


class _Ticket(Protocol):
    def run(self) -> None: ...


class Upkeep:
    """Keeps a journal synced and with a spare segment. `run` it for as long as the journal is."""

    def __init__(self, journal: Journal, log: Log, now: Callable[[], float]) -> None:
        """`now` gives monotonic seconds."""
        self._journal = journal
        self._log = log
        self._now = now
        self._loop = asyncio.get_running_loop()
        # A sync must not wait until a segment has been reserved, which can take a second.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="journal")
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._wanted = asyncio.Event()
        self._unsynced_since: float | None = None
        """Since when something has been written and no sync has succeeded."""
        self._was_lost: str | None = None
        self._not_removed: str | None = None
        """The segment that could not be removed the last time; it is tried four times a second."""
        self.missing: set[str] = set()
        """Segments that somebody has taken away."""
        self.more_missing = asyncio.Event()
        """Set with each that is found; for whoever makes that good."""

    async def durable(self, lsn: int) -> None:
        """Return when the record `lsn` and all before it are on the disk: one sync for many.

        StorageUnavailable when the journal is lost meanwhile.
        """
        if self._journal.synced >= lsn:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((lsn, future))
        self._wanted.set()
        await future

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_synced())
            group.create_task(self._keep_spare())
            group.create_task(self._watch())

    async def sync(self) -> None:
        """One sync of all that is written; OSError where it failed."""
        journal = self._journal
        ticket = journal.begin_sync()
        if ticket is None:
            return
        async with self._thread(ticket) as error:
            if error is None:
                self._unsynced_since = None
            journal.end_sync(ticket, error)
        self._release()
        if error is not None:
            self._log.event("error", "journal sync failed", errno=error.errno)
            raise error

    async def drop(self, lsn: int) -> None:
        """Remove the segments that hold nothing after `lsn`."""
        ticket = self._journal.begin_drop(lsn)
        if ticket is None:
            return
        async with self._thread(ticket) as error:
            self._journal.end_drop(ticket, error)
            before, self._not_removed = self._not_removed, None
            if error is not None:
                name = self._not_removed = ticket.segments[ticket.done].name
                if name != before:
                    self._log.event(
                        "error", "journal segment not removed", file=name, errno=error.errno
                    )

    def close(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._threads.shutdown()

    # -- the loops -------------------------------------------------------------------------------

    async def _keep_synced(self) -> None:
        while True:
            try:
                async with asyncio.timeout(SYNC_EVERY_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            before = self._journal.synced
            with suppress(OSError):  # what became of it shows in what is synced
                await self.sync()
            if self._waiting:
                # Written while the sync before was under way; or nothing can be synced just now,
                # and the loop must not spin until something can.
                if self._journal.synced == before:
                    await asyncio.sleep(LOOK_EVERY_S)
                self._wanted.set()

    async def _keep_spare(self) -> None:
        journal = self._journal
        while True:
            spare = journal.begin_spare()
            if spare is not None:
                async with self._thread(spare) as error:
                    journal.end_spare(spare, error)
                if error is not None:
                    self._log.event("error", "journal cannot reserve a segment", errno=error.errno)
                    await asyncio.sleep(SYNC_EVERY_S)
            elif journal.lost is not None:
                await self.drop(0)  # of files that failed, which count too
            await asyncio.sleep(LOOK_EVERY_S)

    async def _watch(self) -> None:
        journal = self._journal
        while True:
            journal.look()
            if journal.synced == journal.next_lsn - 1:
                self._unsynced_since = None
            elif self._unsynced_since is None:
                self._unsynced_since = self._now()
            # Whatever keeps it: one sync that hangs, one after the other that fails, no segment.
            elif self._now() - self._unsynced_since > STALLED_AFTER_S:
                journal.stalled = f"the disk has not synced for {STALLED_AFTER_S:g} seconds"
            lost = journal.lost
            if lost != self._was_lost:
                self._was_lost = lost
                level, event = ("error", "journal lost") if lost else ("info", "journal recovered")
                self._log.event(level, event, cause=lost)
            if lost is not None:
                self._give_up()
            else:  # the folder is there
                self._look_around()
            await asyncio.sleep(LOOK_EVERY_S)

    def _look_around(self) -> None:
        try:
            names = self._journal.look_around()
        except OSError:  # what cannot be looked at is not known to be missing
            return
        before, self.missing = self.missing, names
        if names - before:
            self._log.event(
                "error",
                "journal segment missing",
                files=sorted(names),
                cure="a backup is made now, which does without it; where that fails, put it back",
            )
            self.more_missing.set()
        elif before and not names:
            self._log.event("info", "no journal segment missing any more")

    @asynccontextmanager
    async def _thread(self, ticket: _Ticket) -> AsyncIterator[OSError | None]:
        """Run the ticket; inside, its error. A ticket that is out has to come back, also to one who
        is cancelled meanwhile."""
        running = self._loop.run_in_executor(self._threads, ticket.run)
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait((running,))
            except asyncio.CancelledError as error:
                cancelled = error
        failure = running.exception()
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        yield failure
        if cancelled is not None:
            raise cancelled

    def _give_up(self) -> None:
        """Whoever waits for the disk is told that there is nothing to wait for."""
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(StorageUnavailable(_LOST, retry_after_s=RETRY_AFTER_S))

    def _release(self) -> None:
        synced, waiting = self._journal.synced, self._waiting
        self._waiting = [each for each in waiting if each[0] > synced]
        for lsn, future in waiting:
            if lsn <= synced and not future.done():
                future.set_result(None)
