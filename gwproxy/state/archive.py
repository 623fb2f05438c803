"""The archive's keeper: lets months that are long over leave the tables, one step after another.

A month is written to a file, then each of its accounts is closed by a record, then what stands in
the file is removed from the tables. A process may be killed between any two steps: the next look
finds from file and tables which one comes next.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.ledger import Balance, Key, State
from gwproxy.core.period import DAY_MS, end_ms, months_between, periods
from gwproxy.core.records import Close
from gwproxy.log import Log
from gwproxy.state.ledger import Ledger, RecordUncertain
from gwproxy.storage import archive, archive_file
from gwproxy.storage.archive_file import Archived, ArchiveRefused, Head
from gwproxy.storage.files import Files, make_private
from gwproxy.storage.ledger import Storage, Store, Writer, fetch_balance

CLOSED_FOR_MS: Final = 35 * DAY_MS
"""So long after a month its last corrections have come: an invoice's, a reconciliation's."""

FIRST_LOOK_S: Final = 60.0
LOOK_EVERY_S: Final = 3600.0

PAGE_PAUSE_S: Final = 0.01
"""After each page that is read: whoever serves requests has the processor in between."""

CLOSE_RECORDS: Final = 16
"""Posted in one go on the event loop: a third of a millisecond."""

ERASE_PAUSE_S: Final = 0.02
ERASE_SHARE: Final = 4
"""Removing rests four times as long as it has worked: the writer's commits come first."""

MOST_BEHIND: Final = 5000
"""With more records waiting than that, the writer is left alone."""

CATCH_UP_S: Final = 60.0


def is_over(month: str, now_ms: int) -> bool:
    """Whether it has been over for long enough to be closed."""
    return end_ms(month) + CLOSED_FOR_MS <= now_ms


def is_due(month: str, now_ms: int, keep_months: int) -> bool:
    """Whether it should leave the tables; `keep_months` 0: none ever does."""
    kept = months_between(month, periods(now_ms)[0]) <= keep_months
    return keep_months > 0 and not kept and is_over(month, now_ms)


class Archive:
    """The files of one ledger, and what goes into them."""

    def __init__(
        self,
        files: Files,
        folder: Path,
        database: Store,
        ledger: Ledger,
        writer: Writer,
        log: Log,
        *,
        since: str,
        keep_months: int,
    ) -> None:
        """`since`: balances of months from then on are in memory."""
        self._files = files
        self._folder = folder
        self._database = database
        self._ledger = ledger
        self._writer = writer
        self._log = log
        ledger.since = since
        self._keep_months = keep_months
        self._working = asyncio.Lock()
        self._closing = asyncio.Lock()
        self.in_a_hurry = False
        """Nobody is served meanwhile: no need to rest."""
        self.until: str | None = None
        """The last month of which requests are here and not in the tables."""
        self._look_for_months()

    async def run(self) -> None:
        """Look at once an hour, until it is cancelled."""
        await asyncio.sleep(FIRST_LOOK_S)
        while True:
            try:
                await self.look()
            except (StorageUnavailable, ArchiveRefused, OSError) as error:
                self._log.event("error", "nothing archived", message=str(error))
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> list[str]:
        """Go on with what was begun, then archive what is due: which months."""
        done = []
        async with self._working:
            await self._go_on()
            while (month := await self._oldest()) is not None:
                now_ms = self._ledger.now_ms()
                if not is_due(month, now_ms, self._keep_months) or self._is_held(month):
                    break
                if not await self._archive(month):
                    break
                done.append(month)
        return done

    async def month(self, month: str) -> bool:
        """Archive one month, whether it is due or not. ArchiveRefused where that is too early;
        False: there is nothing of it."""
        if not is_over(month, self._ledger.now_ms()):
            raise ArchiveRefused(f"{month}: is not over for {CLOSED_FOR_MS // DAY_MS} days yet.")
        if self._is_held(month):
            raise ArchiveRefused(f"{month}: has requests that are still open.")
        async with self._working:
            await self._go_on()
            return await self._archive(month)

    async def fetch(self, keys: Sequence[Key]) -> None:
        """Have balances in memory that may be too old to be kept there, before an adjustment of
        them is posted. What was closed and archived begins anew."""
        state = self._ledger.state
        async with self._closing:
            for key in keys:
                if key[1] < self._ledger.since and key not in state.balances:
                    await self._caught_up()
                    found = State()
                    await fetch_balance(self._database, found, key)
                    for known, balance in found.balances.items():
                        state.balances.setdefault(known, balance)
                    self._ledger.fetched.add(key)

    # -- the steps -----------------------------------------------------------------------------

    async def _go_on(self) -> None:
        """With files whose month has not left the tables yet, as after a crash or a rebuilding."""
        files, run = self._files, self._database.run
        paths = await asyncio.to_thread(archive_file.archives, files, self._folder)
        if paths:
            await self._caught_up()
        for path in paths:
            head, first = await asyncio.to_thread(archive_file.beginning, files, path)
            if head.ledger_id != self._ledger.journal.ledger_id:
                raise ArchiveRefused(f"{path}: belongs to another ledger.")
            closed_with = await run(partial(archive.closed_with, head=head))
            if closed_with is not None and first is not None:
                if await run(partial(archive.stands, row=first)):
                    await self._erase(path, closed_with)
            elif closed_with is None:
                found = await asyncio.to_thread(archive_file.check, files, path)
                if await run(partial(archive.is_named, hash=found.hash)):
                    await self._close_and_erase(found)
                elif first is not None and not await run(partial(archive.stands, row=first)):
                    raise ArchiveRefused(f"{path}: what is in it was never in these tables.")
                else:
                    # All of it is still there, and no account was closed with it: it is made anew.
                    await asyncio.to_thread(files.unlink, path)
        self._look_for_months()

    async def _archive(self, month: str) -> bool:
        await self._caught_up()
        await asyncio.to_thread(make_private, self._folder)
        found = await archive.make(
            self._files, self._folder, self._database, month, partial(asyncio.sleep, PAGE_PAUSE_S)
        )
        if found is None:
            return False
        await self._close_and_erase(found)
        self._log.event(
            "info",
            "month archived",
            month=month,
            file=found.path.name,
            requests=found.end.requests,
            sha256=found.hash,
        )
        self._look_for_months()
        return True

    async def _close_and_erase(self, found: Archived) -> None:
        async with self._closing:
            await self._close(found.head, found.hash)
        await self._caught_up()
        await self._erase(found.path, found.hash)

    async def _close(self, head: Head, hash: str) -> None:
        """Post what remains of each account. The one that the head names is the last."""
        after: Key | None = ("", "")
        while after is not None:
            after, page = await self._database.run(
                partial(archive.balances_of, month=head.month, after=after)
            )
            lines = [line for line in page if (line.period, line.account) <= head.last[::-1]]
            for start in range(0, len(lines), CLOSE_RECORDS):
                self._ledger.admit()  # the room of those who are open is not ours
                for line in lines[start : start + CLOSE_RECORDS]:
                    self._post(line.key, Balance(line.spent, line.credited, line.count), hash)
                await asyncio.sleep(0)

    def _post(self, key: Key, stored: Balance, hash: str) -> None:
        """Memory's figures count, where it has any: an adjustment may have come in between, whose
        line then stays in the tables."""
        state = self._ledger.state
        balance = state.balances.setdefault(key, stored)
        if balance.held:
            raise ArchiveRefused(f"{key[0]} {key[1]}: something is held on it.")
        with contextlib.suppress(RecordUncertain):  # it counts
            self._ledger.post(
                Close(
                    **self._ledger.stamp(),
                    account=key[0],
                    period=key[1],
                    spent=balance.spent,
                    credited=balance.credited,
                    count=balance.count,
                    hash=hash,
                )
            )

    async def _erase(self, path: Path, hash: str) -> None:
        """Remove from the tables what stands in the file, when it is the one that was meant."""
        files = self._files
        if await asyncio.to_thread(archive_file.digest_of, files, path) != hash:
            raise ArchiveRefused(f"{path}: is not the file that its accounts were closed with.")
        slices = archive_file.slices(files, path)
        while (rows := await asyncio.to_thread(next, slices, None)) is not None:
            await self._caught_up(MOST_BEHIND)
            started = time.monotonic()
            await self._database.commit(partial(archive.erase, rows=rows))
            await self._database.checkpoint()
            took_s = time.monotonic() - started
            if not self.in_a_hurry:
                await asyncio.sleep(max(ERASE_PAUSE_S, ERASE_SHARE * took_s))

    # -- what is looked at ---------------------------------------------------------------------

    async def _oldest(self) -> str | None:
        return await self._database.run(archive.oldest_month)

    def _is_held(self, month: str) -> bool:
        return any(
            held.period[:7] == month
            for hold in self._ledger.state.holds.values()
            for held in hold.holds
        )

    async def _caught_up(self, but: int = 0) -> None:
        """The tables have all that memory has, but for so many records. StorageUnavailable where
        they do not get it."""
        if self._writer.state is Storage.LOST:
            raise StorageUnavailable("The database is not available.")
        try:
            async with asyncio.timeout(CATCH_UP_S):
                await self._writer.reached(self._ledger.state.lsn - but)
        except TimeoutError as error:
            raise StorageUnavailable("The database is far behind.") from error

    def _look_for_months(self) -> None:
        with contextlib.suppress(OSError):  # it is a hint, and the next look tells
            months = [path.name[:7] for path in archive_file.archives(self._files, self._folder)]
            self.until = max(months, default=None)
