"""The database: real SQLite in memory, on a file that is only played.

What was committed is an image of the whole; a power cut, a swapped file, a full disk or an older
backup are other images. Its calls are those that the gateway makes of `storage.database.Database`.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

from gwproxy.storage.backup import BackupRefused
from gwproxy.storage.database import FileChanged, _mapped, packaged, transaction
from gwproxy.storage.ledger import Mark, Mismatch, mark_of
from gwproxy.storage.segments import Gap
from tests.simulator.loop import Killed, Loop

T = TypeVar("T")


def empty() -> bytes:
    """A database as the migrations leave it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for migration in packaged():
            connection.executescript(
                f"BEGIN;\n{migration.sql}\nPRAGMA user_version = {migration.version};\nCOMMIT;"
            )
        return connection.serialize()
    finally:
        connection.close()


def beginning(ledger_id: str) -> bytes:
    """A database of this ledger in which there is nothing yet."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.deserialize(empty())
        connection.execute("UPDATE meta SET ledger_id = ?", (ledger_id,))
        return connection.serialize()
    finally:
        connection.close()


class DatabaseWeather:
    def __init__(self) -> None:
        self.busy = self.io = self.commit = self.rollback = 0.0

    clear = __init__

    @property
    def fine(self) -> bool:
        return not (self.busy or self.io or self.commit or self.rollback)


class DatabaseFile:
    """The file. It outlives processes."""

    def __init__(self, random: Random, image: bytes) -> None:
        self.random = random
        self.image = image
        """All that was committed."""
        self.fault: str | None = None
        """What somebody has done to the file."""
        self.weather = DatabaseWeather()
        self.faults = 0
        self.foreign = False
        """It is an older copy than it should be, and nobody has noticed."""
        self.backups: list[bytes] = []
        """Oldest first."""

    def swap(self) -> None:
        """Somebody puts an older copy in its place, while it is open."""
        if self.backups:
            self.image = self.random.choice(self.backups)
            self.foreign = True
            self.fault = "another file stands in its place"


def mark_in(image: bytes) -> Mark:
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(image)
        return mark_of(connection)
    finally:
        connection.close()


class _Connection:
    """What work gets for a connection: the real one, with bad luck."""

    def __init__(self, real: sqlite3.Connection, owner: "PlayedDatabase") -> None:
        self._real = real
        self._owner = owner

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction

    def rollback(self) -> None:
        self._owner.enter()
        self._real.rollback()

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        owner = self._owner
        owner.enter()
        if sql.startswith("BEGIN"):
            owner.fail(owner.file.weather.busy, "database is locked")
        elif sql == "COMMIT":
            return self._commit()
        else:
            self._trouble()
        return self._done(self._real.execute(sql, parameters))

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        self._owner.enter()
        self._trouble()
        return self._done(self._real.executemany(sql, rows))

    def _done(self, cursor: sqlite3.Cursor) -> sqlite3.Cursor:
        if cursor.rowcount > 0 and not self._real.in_transaction:
            self._owner.committed()  # outside a transaction each statement is one
        if (
            cursor.rowcount > 0
            and self._real.in_transaction
            and self._owner.chance(self._owner.file.weather.rollback)
        ):
            self._real.rollback()  # without a word
        return cursor

    def _trouble(self) -> None:
        self._owner.fail(self._owner.file.weather.io, "disk I/O error")

    def _commit(self) -> sqlite3.Cursor:
        owner = self._owner
        weather = owner.file.weather
        fails = owner.chance(weather.commit)
        if fails and owner.chance(0.5):
            raise _error("disk I/O error")
        cursor = self._real.execute("COMMIT")
        owner.committed()
        owner.enter()  # killed just now: it is committed
        if fails:
            raise _error("disk I/O error")
        return cursor


def _error(words: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(words)
    error.sqlite_errorcode = (
        sqlite3.SQLITE_BUSY if words == "database is locked" else sqlite3.SQLITE_IOERR
    )
    error.sqlite_errorname = "SQLITE_IOERR"
    return error


class PlayedDatabase:
    """One process's connection to the file."""

    def __init__(self, file: DatabaseFile, loop: Loop, point: Callable[[], None]) -> None:
        self.file = file
        self.alive = True
        file.fault = None  # whatever stands there is taken
        self._loop = loop
        self._point = point
        self._working = asyncio.Lock()
        self._real = self._connect()

    def enter(self) -> None:
        if not self.alive:
            raise Killed
        self._point()
        self._loop.breathe()
        if not self.alive:
            raise Killed

    def chance(self, probability: float) -> bool:
        if probability and self.file.random.random() < probability:
            self.file.faults += 1
            return True
        return False

    def fail(self, probability: float, words: str) -> None:
        if self.chance(probability):
            raise _error(words)

    def committed(self) -> None:
        """Where the file was swapped meanwhile the commit went into one that nobody will find."""
        if self.file.fault is None:
            self.file.image = self._real.serialize()

    def _connect(self) -> sqlite3.Connection:
        real = sqlite3.connect(":memory:", isolation_level=None)
        real.deserialize(self.file.image)
        real.execute("PRAGMA foreign_keys = ON")
        real.row_factory = sqlite3.Row
        return real

    # -- what the gateway asks ---------------------------------------------------------------------

    async def run(self, work: Callable[[Any], T]) -> T:
        if not self.alive:
            raise Killed
        async with self._working:
            with _mapped():
                result: T = await self._loop.run_in_executor(
                    None, work, _Connection(self._real, self)
                )
                return result

    async def commit(self, work: Callable[[Any], T]) -> T:
        def check() -> None:
            fault = self.fault()
            if fault is not None:
                raise FileChanged(fault)

        return await self.run(lambda connection: transaction(connection, work, check))

    async def read(self, sql: str, parameters: Any = ()) -> list[Any]:
        return await self.run(lambda connection: connection.execute(sql, parameters).fetchall())

    async def checkpoint(self) -> None:
        self.enter()

    def keep_lock(self) -> bool:
        """Nobody deletes it here."""
        return False

    def fault(self) -> str | None:
        return self.file.fault

    async def reopen(self, *, check: bool = False) -> None:
        fault = self.fault()
        if fault is not None:
            raise FileChanged(fault)
        async with self._working:
            self._real.close()
            self._real = self._connect()

    async def replace(self, image: bytes) -> None:
        async with self._working:
            self.enter()
            self.file.image, self.file.fault, self.file.foreign = image, None, False

    async def close(self) -> None:
        self._real.close()


class PlayedBackups:
    """Copies of the database, in the place of `gwproxy.storage.backup.Backups`."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    @property
    def any(self) -> bool:
        return bool(self._file.backups)

    def due(self, now: float, journal_bytes: int) -> bool:
        return not self._file.backups or self._file.random.random() < 0.5

    async def make(self, database: PlayedDatabase) -> tuple[str, Mark]:
        file = self._file
        database.enter()
        if file.fault is not None or file.foreign:
            raise BackupRefused(f"no backup was made: {file.fault}")
        file.backups = [*file.backups, file.image][-3:]
        return "an image", mark_in(file.image)

    def covered(self, applied_lsn: int) -> int:
        """Up to which record both the newest backup and the database go."""
        backups = self._file.backups
        return min(applied_lsn, mark_in(backups[-1]).lsn) if backups else 0

    async def rebuild(
        self,
        database: PlayedDatabase,
        ledger_id: str,
        can_follow: Callable[[Mark], Awaitable[object]],
        set_aside: bool = True,
    ) -> str:
        """The newest backup that the journal can go on from takes the file's place, or nothing at
        all where the journal has everything."""
        if not set_aside:
            raise BackupRefused("a damaged file was set aside less than an hour ago")
        for image in (*reversed(self._file.backups), beginning(ledger_id)):
            try:
                await can_follow(mark_in(image))
            except (Gap, Mismatch):
                continue
            await database.replace(image)
            return "an image"
        raise BackupRefused("there is no backup")
