"""The database file: opened under a lock, made safe, migrated; one connection that writes.

The only room that knows aiosqlite. What SQLite says goes out as StorageUnavailable, so that nobody
above depends on it; what stands in the way of opening goes out as DatabaseRefused, with the cure.
"""

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Self

import aiosqlite

from gwproxy.core.errors import AlreadyExists, StorageUnavailable

SQLITE_VERSION: Final = sqlite3.sqlite_version
HAS_WAL_RESET_BUG: Final = sqlite3.sqlite_version_info < (3, 51, 3)
"""Until 3.51.2 a commit by one connection during a checkpoint by another could corrupt the file.

It cannot happen here, where one single connection does both; a second program that writes to the
file while it is open would bring it back, so an old version is worth a line in the log.
"""

_BUSY_TIMEOUT_MS: Final = (
    900  # below 1 s: whoever waits for us is told so before he gives up himself
)

_PRAGMAS: Final[Sequence[tuple[str, str, object]]] = (
    # Readers never wait for the writer, and a killed process leaves a log that is replayed at open.
    ("journal_mode", "WAL", "wal"),
    # A commit that was reported has reached the disk. Nobody on the path of a request waits for it.
    ("synchronous", "FULL", 2),
    # A reader that came from outside (a backup, a shell) may hold us up for a moment, not for long.
    ("busy_timeout", str(_BUSY_TIMEOUT_MS), _BUSY_TIMEOUT_MS),
    # SQLite checks REFERENCES only when asked to, on each connection anew.
    ("foreign_keys", "ON", 1),
    # A schema that somebody tampered with cannot call functions with side effects.
    ("trusted_schema", "OFF", 0),
    # A damaged page is noticed when it is read, not when its content has been believed.
    ("cell_size_check", "ON", 1),
)


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: str


class DatabaseRefused(Exception):
    """The database cannot be opened as it is. The message names the file and what to do."""


class DatabaseInUse(DatabaseRefused):
    """Another process holds it: most often the running server."""


class Database:
    """An open database. Made by `open`, given back by `close` or by leaving an `async with`."""

    def __init__(
        self, path: Path, lock_fd: int, connection: aiosqlite.Connection, schema_version: int
    ) -> None:
        self.path = path
        self.schema_version = schema_version
        self._lock_fd = lock_fd
        self._connection = connection
        self._writing = asyncio.Lock()
        self._closed = False
        self._identity = _identity(path)

    @classmethod
    async def open(cls, path: Path, migrations: Iterable[Migration] | None = None) -> Self:
        """Open or create the database at `path`, for this process alone; else DatabaseRefused."""
        _refuse_foreign(path)
        lock_fd = _lock(path)
        try:
            _make_private(path)
            connection = await _connect(path)
            try:
                await _set_pragmas(path, connection)
                await _check(path, connection)
                version = await _migrate(
                    path, connection, packaged() if migrations is None else list(migrations)
                )
                return cls(path, lock_fd, connection, version)
            except BaseException:
                await connection.close()
                raise
        except sqlite3.Error as error:
            os.close(lock_fd)
            raise DatabaseRefused(f"{path}: {error}. {_cure(error)}") from error
        except BaseException:
            os.close(lock_fd)
            raise

    async def close(self) -> None:
        """Wait for the transaction that is under way, then close, then let go of the lock."""
        if self._closed:
            return
        self._closed = True
        async with self._writing:
            try:
                await self._connection.close()
            finally:
                os.close(self._lock_fd)  # closing gives the flock back

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        """All of what is done inside, or nothing of it. Leaving it without an error has committed.

        Raises AlreadyExists where a UNIQUE index is hit, StorageUnavailable for all else that
        SQLite refuses. Cancelled during the commit, it may have committed: whoever has to act on
        the outcome shields itself.
        """
        async with self._writing:
            self._assert_open()
            with _mapped():
                try:
                    await self._connection.execute("BEGIN IMMEDIATE")
                    yield self._connection
                    self._assert_same_file()
                    # Fails when a full disk has made SQLite roll back by itself, unasked.
                    await self._connection.execute("COMMIT")
                except BaseException:
                    # Does nothing outside a transaction. It queues behind a statement whose
                    # answer we were kept from awaiting, so it cannot come too early.
                    await self._connection.rollback()
                    raise

    async def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        self._assert_open()
        with _mapped():
            return list(await self._connection.execute_fetchall(sql, parameters))

    def _assert_open(self) -> None:
        if self._closed:
            raise _unavailable()

    def _assert_same_file(self) -> None:
        # Writes to a deleted file succeed, into a file that nobody will ever find again. Looked at
        # by stat alone: opening and closing the file here would drop SQLite's locks on it.
        try:
            same = _identity(self.path) == self._identity
        except OSError as error:
            raise _unavailable() from error
        if not same:
            raise _unavailable()


@contextmanager
def _mapped() -> Iterator[None]:
    """What SQLite raises, as what our callers expect. The cause stays attached, for the log."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode in _DUPLICATE:
            raise AlreadyExists("This already exists.") from error
        raise _unavailable() from error
    except sqlite3.Error as error:
        raise _unavailable() from error


def _unavailable() -> StorageUnavailable:
    return StorageUnavailable(
        "The gateway's storage is not available at the moment.", retry_after_s=_RETRY_AFTER_S
    )


_RETRY_AFTER_S: Final = 5
_DUPLICATE: Final = (sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)


def packaged() -> list[Migration]:
    """The migrations that ship with the package: `0001_directory.sql` leads to version 1."""
    folder = resources.files("gwproxy.storage") / "migrations"
    files = [file for file in folder.iterdir() if file.name.endswith(".sql")]
    found = [Migration(int(file.name[:4]), file.name, file.read_text("utf-8")) for file in files]
    return sorted(found, key=lambda migration: migration.version)


# -- opening, in order ---------------------------------------------------------------------------


def _lock(path: Path) -> int:
    """Take the lock beside the database. It is a file of its own, because closing any descriptor of
    the database itself would drop the locks that SQLite holds on it."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise DatabaseRefused(
            f"{path.parent}: there is no such folder. Create it, or set [storage] path."
        ) from error
    except OSError as error:
        raise DatabaseRefused(f"{lock_path}: {error.strerror}.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise DatabaseInUse(
            f"{path}: in use by another process{f' ({holder})' if holder.isdigit() else ''}. "
            "Stop it first, or give this one a [storage] path of its own."
        ) from error
    os.fchmod(fd, 0o600)
    # For the message above only: what counts is the lock, which ends with its process.
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _refuse_foreign(path: Path) -> None:
    """A file that is plainly somebody else's is left exactly as it is."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
            pages = os.fstat(file.fileno()).st_size // 4096
    except OSError:
        return  # there is none, or it cannot be read: told by whoever opens it next
    if not header:
        return
    if not header.startswith(b"SQLite format 3\0"):
        raise DatabaseRefused(f"{path}: file is not a database. {_RESTORE}")
    # Offset 60 is `user_version`, which our first migration sets (sqlite.org/fileformat2.html).
    # That may still be in the write-ahead log, beside a file of one page.
    version = int.from_bytes(header[60:64])
    if version == 0 and pages > 1 and not path.with_name(path.name + "-wal").exists():
        raise DatabaseRefused(f"{path}: belongs to another program. {_OWN_FILE}")


def _make_private(path: Path) -> None:
    """Let nobody else read the database. SQLite gives its -wal and -shm the same mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)
        for suffix in ("-wal", "-shm"):
            leftover = path.with_name(path.name + suffix)
            if leftover.exists():
                os.chmod(leftover, 0o600)
    except OSError as error:
        raise DatabaseRefused(f"{path}: {error.strerror}. {_CHECK_ACCESS}") from error


async def _connect(path: Path) -> aiosqlite.Connection:
    # isolation_level=None: sqlite3 itself never begins or ends a transaction behind our back.
    connection = await aiosqlite.connect(
        path, isolation_level=None, timeout=_BUSY_TIMEOUT_MS / 1000
    )
    connection.row_factory = sqlite3.Row
    return connection


async def _set_pragmas(path: Path, connection: aiosqlite.Connection) -> None:
    for name, value, expected in _PRAGMAS:
        await connection.execute_fetchall(f"PRAGMA {name} = {value}")
        # SQLite ignores what it cannot do without a word, so every one is read back.
        got = await _pragma(connection, name)
        if got != expected:
            raise DatabaseRefused(
                f"{path}: SQLite {SQLITE_VERSION} answers {name} = {got!r}, not {expected!r}. "
                "The file must be on a local disk that this process may write to."
            )


async def _check(path: Path, connection: aiosqlite.Connection) -> None:
    # A file with a damaged page still takes inserts: look at all of it before trusting any of it.
    verdict = await _pragma(connection, "quick_check(1)")
    if verdict != "ok":
        raise DatabaseRefused(f"{path}: damaged ({verdict}). {_RESTORE}")


async def _migrate(
    path: Path, connection: aiosqlite.Connection, migrations: Sequence[Migration]
) -> int:
    """Bring the schema up to the newest migration, one transaction each; its version."""
    version = int(await _pragma(connection, "user_version"))
    newest = migrations[-1].version if migrations else 0
    if version > newest:
        raise DatabaseRefused(
            f"{path}: made by a newer gwproxy (schema {version}, this one knows up to {newest}). "
            "Run that one, or restore a backup made before the upgrade."
        )
    if version == 0:
        tables = list(await connection.execute_fetchall("SELECT name FROM sqlite_schema LIMIT 1"))
        if tables:
            raise DatabaseRefused(
                f"{path}: belongs to another program (it has a table {tables[0][0]!r}). {_OWN_FILE}"
            )
    for migration in migrations:
        if migration.version <= version:
            continue
        if migration.version != version + 1:
            raise AssertionError(f"there is no migration between {version} and {migration.name}")
        if version > 0:
            await _copy(path, connection, version)
        try:
            # The version is set in the same transaction: a kill leaves the old schema or the new.
            await connection.executescript(
                f"BEGIN IMMEDIATE;\n{migration.sql}\n"
                f"PRAGMA user_version = {migration.version};\nCOMMIT;"
            )
        except sqlite3.Error:
            if connection.in_transaction:
                await connection.execute("ROLLBACK")
            raise
        version = migration.version
    return version


async def _copy(path: Path, connection: aiosqlite.Connection, version: int) -> None:
    """Keep the database as it was before its schema changes, as `<name>.schema-1`."""
    copy = path.with_name(f"{path.name}.schema-{version}")
    # VACUUM INTO fills an empty file and keeps its mode; what an interrupted run left is not empty.
    copy.unlink(missing_ok=True)
    os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    await connection.execute("VACUUM INTO ?", (str(copy),))


async def _pragma(connection: aiosqlite.Connection, name: str) -> Any:
    rows = list(await connection.execute_fetchall(f"PRAGMA {name}"))
    return rows[0][0]


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


_CHECK_ACCESS: Final = "Check that this user may read and write the file and its folder."
_RESTORE: Final = "Move the file aside and restore a backup of it, or name another [storage] path."
_OWN_FILE: Final = "Give [storage] path a file of its own."


def _cure(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorname", "").split("_")[1:2]:
        case ["NOTADB"] | ["CORRUPT"]:
            return _RESTORE
        case ["FULL"]:
            return "Make room on the disk."
        case ["BUSY"] | ["LOCKED"]:
            return "Close the other program that has the file open."
        case _:
            return _CHECK_ACCESS
