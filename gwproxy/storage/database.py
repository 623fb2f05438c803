"""The database file: opened under a lock, made safe, migrated; one connection that writes to it,
and a few that read, through a gate.

The only room that knows aiosqlite. What SQLite says goes out as StorageUnavailable, so that nobody
above depends on it, with the error itself as its cause; what stands in the way of opening goes out
as DatabaseRefused, with the cure.
"""

import asyncio
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiosqlite

from gwproxy.core.errors import StorageUnavailable
from gwproxy.storage import locks

T = TypeVar("T")

SQLITE_VERSION: Final = sqlite3.sqlite_version
HAS_WAL_RESET_BUG: Final = sqlite3.sqlite_version_info < (3, 51, 3)
"""Until 3.51.2 a commit by one connection during a checkpoint by another could corrupt the file.

It cannot happen here, where one single connection does both; a second program that writes to the
file while it is open would bring it back, so an old version is worth a line in the log.
"""

CHECKPOINT_BYTES: Final = 4 << 20
"""The log's pages are brought into the file when there are so many: SQLite's own measure."""

TRUNCATE_BYTES: Final = 64 << 20
"""A log this long has a reader that keeps it from starting anew: no more are let in till it has."""

READERS: Final = 2
READ_S: Final = 5.0
"""Bounds on reports: what reads for long keeps the log from being emptied."""

_INTERRUPTIBLE_OPS: Final = 10_000
"""A report looks up from its work after so many of SQLite's steps: several times in a
millisecond."""

_BUSY_TIMEOUT_MS: Final = (
    900  # below 1 s: whoever waits for us is told so before he gives up himself
)

_PRAGMAS: Final[Sequence[tuple[str, str, object]]] = (
    # Readers never wait for the writer, and a killed process leaves a log that is replayed at open.
    ("journal_mode", "WAL", "wal"),
    # A commit that was reported has reached the disk. Nobody on the path of a request waits for it.
    ("synchronous", "FULL", 2),
    # The file itself is written to by our own checkpoints and by nothing else: see `fault`.
    ("wal_autocheckpoint", "0", 0),
    # A log that starts anew is cut, so that its length on the disk says how much is in it.
    ("journal_size_limit", "0", 0),
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


GONE: Final = "the file is gone"
SWAPPED: Final = "another file stands in its place"


class DatabaseRefused(Exception):
    """The database cannot be opened as it is. The message names the file and what to do."""


class DatabaseInUse(DatabaseRefused):
    """Another process holds it: most often the running server."""

    def __init__(self, path: Path, holder: locks.Held) -> None:
        self.pid = str(holder).strip(" ()")
        """Of the process that holds it; empty where it has not said so yet."""
        self.fact = f"{path}: in use by another process{holder}."
        super().__init__(
            f"{self.fact} Stop it first, or give this one a [storage] path of its own."
        )


class DatabaseGone(DatabaseRefused):
    """There is no file, or one that is no database: a backup may take its place."""


class DatabaseDamaged(DatabaseGone):
    """A page of it does not hold what SQLite has written there."""


class BackupRefused(Exception):
    """It could not be made, or is not to be trusted, or does not help. The message says which."""


class FileChanged(Exception):
    """The file is not the one that was opened, or somebody else has written to it."""


class RolledBack(Exception):
    """SQLite has ended a transaction by itself, as it does on a full disk, without a word."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """What tells a file from all others, and from itself after somebody wrote to it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        # By stat alone: to open the file and close it again would drop SQLite's locks on it.
        status = os.stat(path)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def same_file(self, other: "_Identity") -> bool:
        return (self.device, self.inode) == (other.device, other.inode)


class _Connection(aiosqlite.Connection):
    """An aiosqlite connection to whose thread a whole piece of work can be given at once: a hop
    between threads for each statement would cost more than the statements."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(work, self._conn)  # type: ignore[no-untyped-call]
        return result


def transaction(
    connection: sqlite3.Connection,
    work: Callable[[sqlite3.Connection], T],
    check: Callable[[], None],
) -> T:
    """All of what `work` does, or nothing of it; `check` is asked last, before the commit.

    An error of the commit itself leaves open whether it happened.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        assert_in_transaction(connection)
        check()
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.rollback()  # does nothing where there is nothing to roll back
        raise
    return result


def assert_in_transaction(connection: sqlite3.Connection) -> None:
    """RolledBack, where the next statement would be committed on its own."""
    if not connection.in_transaction:
        raise RolledBack("SQLite has rolled back")


class Reader:
    """One look at the database: all that is read through it is of one moment."""

    def __init__(self, connection: _Connection) -> None:
        self.as_of_lsn = 0
        """The last record that had reached the tables then."""
        self._connection = connection
        self._over = False

    async def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows: whoever may meet many asks for a page of them."""
        with _mapped():
            return await self._connection.run(lambda c: c.execute(sql, parameters).fetchall())

    async def begin(self) -> None:
        def begin(connection: sqlite3.Connection) -> int:
            connection.set_progress_handler(lambda: self._over, _INTERRUPTIBLE_OPS)
            connection.execute("BEGIN")
            lsn: int = connection.execute("SELECT applied_lsn FROM meta").fetchone()[0]
            return lsn

        with _mapped():
            self.as_of_lsn = await self._connection.run(begin)

    async def end(self) -> None:
        """What still runs is not waited for, nor is what has yet to begin: an interrupt would miss
        that."""
        self._over = True
        await self._connection.close()


class Database:
    """An open database. Made by `open`, given back by `close` or by leaving an `async with`."""

    def __init__(self, path: Path, lock_fd: int, migrations: Sequence[Migration]) -> None:
        self.path = path
        self.schema_version = 0
        self._lock_fd = lock_fd
        self._migrations = migrations
        self._connection: _Connection | None = None
        self._working = asyncio.Lock()
        self._closed = False
        self._identity: _Identity | None = None
        """None: whatever stands there is taken."""
        self._writes_itself = False
        """Our own checkpoint is under way, and changes size and time."""
        self._checkpoint_at_bytes = CHECKPOINT_BYTES
        self._places = asyncio.Semaphore(READERS)
        self._readers = 0
        self._gate = asyncio.Event()
        self._gate.set()
        self._truncate_after = 0.0

    @classmethod
    async def open(
        cls,
        path: Path,
        migrations: Iterable[Migration] | None = None,
        *,
        create: bool = True,
        rebuild: Callable[[DatabaseGone], Awaitable[Callable[[Path], None]]] | None = None,
    ) -> Self:
        """Open or create the database at `path`, for this process alone; else DatabaseRefused.

        `create=False` refuses one that is missing or empty: there has been one. `rebuild` is asked
        for what can put a good file in the place of one that is gone; see `replace`.
        """
        lock_fd = lock(path)
        database = cls(path, lock_fd, packaged() if migrations is None else list(migrations))
        try:
            try:
                await database._open_first(create)
            except DatabaseGone as gone:
                if rebuild is None:
                    raise
                try:
                    await asyncio.to_thread(await rebuild(gone), path)
                except BackupRefused as error:
                    raise DatabaseRefused(f"{gone} It could not be rebuilt: {error}") from error
                await database._open_first(create)
            return database
        except BaseException:
            os.close(lock_fd)
            raise

    async def _open_first(self, create: bool) -> None:
        _refuse_foreign(self.path, create)
        _make_private(self.path)
        await self._connect(check=True)

    async def close(self) -> None:
        """Wait for what is under way, then close, then let go of the lock."""
        if self._closed:
            return
        self._closed = True
        async with self._working:
            try:
                await self._drop_connection()
            finally:
                os.close(self._lock_fd)  # closing gives the lock back

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def keep_lock(self) -> bool:
        """Make the lock file anew where somebody has deleted it; whether that was so.

        locks.Held where another process was faster, OSError where it cannot be made.
        """
        path = _lock_of(self.path)
        if self._closed or locks.stands(self._lock_fd, path):
            return False
        before, self._lock_fd = self._lock_fd, locks.take(path)
        os.close(before)
        return True

    # -- work on the one connection ----------------------------------------------------------------

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in the connection's thread; StorageUnavailable for what SQLite raises."""
        async with self._working:
            if self._connection is None or self._closed:
                raise _unavailable()
            with _mapped():
                return await self._connection.run(work)

    async def commit(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` as one transaction. Cancelled, it may have been committed all the same."""
        return await self.run(lambda c: transaction(c, work, self._assert_unchanged))

    async def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        return await self.run(lambda c: c.execute(sql, parameters).fetchall())

    # -- readers -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def reader(self, within_s: float = READ_S) -> AsyncIterator[Reader]:
        """A look at the database, for 5 s at most and two at a time; else StorageUnavailable."""
        try:
            async with asyncio.timeout(within_s):
                await self._enter()
        except TimeoutError as error:
            raise _unavailable("Too many reports are being made at the moment.") from error
        try:
            if self._connection is None or self._closed:
                raise _unavailable()
            with _mapped():
                self._assert_unchanged()
                reader = Reader(await _open_connection(self.path, "ro"))
            try:
                async with asyncio.timeout(within_s):
                    await reader.begin()
                    yield reader
            except TimeoutError as error:
                raise _unavailable(
                    f"The report took longer than {within_s:g} s: ask for a shorter span of time."
                ) from error
            finally:
                await reader.end()
        finally:
            self._readers -= 1
            self._places.release()
            if not self._gate.is_set() and not self._readers:
                with suppress(StorageUnavailable):  # the writer will meet it too
                    await self._truncate()

    async def _enter(self) -> None:
        await self._places.acquire()
        try:
            await self._gate.wait()
        except BaseException:
            self._places.release()
            raise
        self._readers += 1

    # -- the write-ahead log -----------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Bring the log into the file, when it is long enough to be worth it.

        A log that has grown too long closes the gate to readers, and is cut once they have left.
        """
        with _mapped():
            length = _length_of_log(self.path)
        if length >= TRUNCATE_BYTES and asyncio.get_running_loop().time() >= self._truncate_after:
            self._gate.clear()
            if not self._readers:
                await self._truncate()
        elif length >= self._checkpoint_at_bytes:
            _, in_log, done = await self._write_file("PASSIVE")
            # Where a reader still needs it, trying again at each commit would change nothing.
            self._checkpoint_at_bytes = CHECKPOINT_BYTES + (0 if done == in_log else length)

    async def _truncate(self) -> None:
        try:
            busy, _, _ = await self._write_file("TRUNCATE")
        finally:
            self._gate.set()
        if busy:  # somebody from outside reads: ours are not kept waiting for him
            self._truncate_after = asyncio.get_running_loop().time() + READ_S

    async def _write_file(self, mode: str) -> tuple[int, int, int]:
        """A checkpoint: whether it was kept from finishing, pages in the log, those brought in."""

        def checkpoint(connection: sqlite3.Connection) -> tuple[int, int, int]:
            self._assert_unchanged()
            self._writes_itself = True
            try:
                # Readers from outside are not waited for: every commit would wait with us.
                connection.execute("PRAGMA busy_timeout = 0")
                busy, pages, done = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            finally:
                self._take_identity()  # also after an error: it may have come half-way
                self._writes_itself = False
                connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
            return busy, pages, done

        return await self.run(checkpoint)

    # -- the file ----------------------------------------------------------------------------------

    def fault(self) -> str | None:
        """What is wrong with the file, in words; None: it is as our own last checkpoint left it.

        Writes to a deleted file succeed, and so do those to a file that somebody has written over.
        """
        expected = self._identity
        if expected is None:
            return None
        try:
            found = _Identity.of(self.path)
        except FileNotFoundError:
            return GONE
        except OSError as error:
            return f"the file cannot be looked at ({error.strerror})"
        if not found.same_file(expected):
            return SWAPPED
        # Asked on the loop while a checkpoint may begin or end in its thread.
        ours = self._writes_itself or self._identity is not expected
        return None if found == expected or ours else "somebody else has written to the file"

    def _assert_unchanged(self) -> None:
        fault = self.fault()
        if fault is not None:
            raise FileChanged(fault)

    def _take_identity(self) -> None:
        """The file as it is now is how we left it, if it is still the same one."""
        with suppress(OSError):
            found = _Identity.of(self.path)
            if self._identity is None or found.same_file(self._identity):
                self._identity = found

    async def reopen(self, *, check: bool = False) -> None:
        """Begin anew with the same file, with `check` after looking at all of it.

        FileChanged or DatabaseRefused.
        """
        async with self._working:
            # First: closing would bring the log into a file that is not ours any more.
            self._assert_unchanged()
            await self._drop_connection()
            await self._connect(check)

    async def replace(self, place: Callable[[Path], None]) -> None:
        """Let `place` put another file here, in a thread; it has to move the one that is here.

        The next `reopen` takes what stands there.
        """
        async with self._working:
            await asyncio.to_thread(place, self.path)
            # SQLite leaves a file alone that has moved, and the log that now bears its name.
            await self._drop_connection()
            self._identity = None

    async def _connect(self, check: bool) -> None:
        """DatabaseRefused where that is not possible."""
        try:
            connection = await _open_connection(self.path, "rw")
            try:
                await _set_pragmas(self.path, connection)
                if check:
                    await _check(self.path, connection)
                self.schema_version = await _migrate(self.path, connection, self._migrations)
                self._connection = connection
                self._checkpoint_at_bytes = CHECKPOINT_BYTES
                self._take_identity()
            except BaseException:
                self._connection = None
                await connection.close()
                raise
        except sqlite3.Error as error:
            raise refusal(self.path, error) from error

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._writes_itself = True  # the last one to close brings the log into the file
        try:
            with suppress(sqlite3.Error):
                await connection.close()
        finally:
            self._take_identity()
            self._writes_itself = False


@contextmanager
def _mapped() -> Iterator[None]:
    """What SQLite raises, as what our callers expect. The cause stays attached, for the log."""
    try:
        yield
    except (sqlite3.Error, FileChanged, RolledBack) as error:
        raise _unavailable() from error


def _unavailable(
    message: str = "The gateway's storage is not available at the moment.",
) -> StorageUnavailable:
    return StorageUnavailable(message, retry_after_s=_RETRY_AFTER_S)


_RETRY_AFTER_S: Final = 5


def packaged() -> list[Migration]:
    """The migrations that ship with the package: `0001_directory.sql` leads to version 1."""
    folder = resources.files("gwproxy.storage") / "migrations"
    files = [file for file in folder.iterdir() if file.name.endswith(".sql")]
    found = [Migration(int(file.name[:4]), file.name, file.read_text("utf-8")) for file in files]
    return sorted(found, key=lambda migration: migration.version)


# -- opening, in order ---------------------------------------------------------------------------


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def lock(path: Path) -> int:
    """Take the lock beside the database; the descriptor, whose close gives it back."""
    lock_path = _lock_of(path)
    try:
        return locks.take(lock_path)
    except locks.Held as holder:
        raise DatabaseInUse(path, holder) from holder
    except FileNotFoundError as error:
        raise DatabaseRefused(
            f"{path.parent}: there is no such folder. Create it, or set [storage] path."
        ) from error
    except OSError as error:
        raise DatabaseRefused(f"{lock_path}: {error.strerror}.") from error


def no_file(path: Path) -> str | None:
    """What stands there in the place of a file, in words. Whoever opens a FIFO waits for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None  # told by whoever opens it
    if stat.S_ISREG(mode):
        return None
    return "is a directory, not a file" if stat.S_ISDIR(mode) else "is not a regular file"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _refuse_foreign(path: Path, create: bool) -> None:
    """A file that is plainly somebody else's is left exactly as it is."""
    words = no_file(path)
    if words is not None:
        raise DatabaseRefused(f"{path}: {words}. Move it away, or name another [storage] path.")
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            header = file.read(100)
            pages = os.fstat(file.fileno()).st_size // 4096
    except FileNotFoundError:
        header = b""
    except OSError:
        return  # it cannot be read: told by whoever opens it next
    if not header:
        if not create:
            raise DatabaseGone(f"{path}: is missing or empty. {_RESTORE}")
        return
    if not header.startswith(b"SQLite format 3\0"):
        raise DatabaseGone(f"{path}: file is not a database. {_RESTORE}")
    # Offset 60 is `user_version`, which our first migration sets (sqlite.org/fileformat2.html).
    # That may still be in the write-ahead log, beside a file of one page.
    version = int.from_bytes(header[60:64])
    if version == 0 and pages > 1 and not _log_of(path).exists():
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


async def _open_connection(path: Path, mode: str) -> _Connection:
    """`mode` is SQLite's: neither `rw` nor `ro` ever makes a file."""
    # isolation_level=None: sqlite3 itself never begins or ends a transaction behind our back.
    connection = _Connection(
        lambda: sqlite3.connect(
            f"file:{quote(str(path))}?mode={mode}",
            uri=True,
            isolation_level=None,
            timeout=_BUSY_TIMEOUT_MS / 1000,
        ),
        iter_chunk_size=64,
    )
    await connection
    connection.row_factory = sqlite3.Row
    return connection


async def _set_pragmas(path: Path, connection: _Connection) -> None:
    for name, value, expected in _PRAGMAS:
        await connection.execute_fetchall(f"PRAGMA {name} = {value}")
        # SQLite ignores what it cannot do without a word, so every one is read back.
        got = await _pragma(connection, name)
        if got != expected:
            raise DatabaseRefused(
                f"{path}: SQLite {SQLITE_VERSION} answers {name} = {got!r}, not {expected!r}. "
                "The file must be on a local disk that this process may write to."
            )


async def _check(path: Path, connection: _Connection) -> None:
    # A file with a damaged page still takes inserts: look at all of it before trusting any of it.
    verdict = await _pragma(connection, "quick_check(1)")
    if verdict != "ok":
        raise DatabaseDamaged(f"{path}: damaged ({verdict}). {_RESTORE}")


async def _migrate(path: Path, connection: _Connection, migrations: Sequence[Migration]) -> int:
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
    if 0 < version < newest:
        await _copy(path, connection, version)
    for migration in migrations:
        if migration.version <= version:
            continue
        if migration.version != version + 1:
            raise AssertionError(f"there is no migration between {version} and {migration.name}")
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


async def _copy(path: Path, connection: _Connection, version: int) -> None:
    """Keep the database as it was before its schema changes, as `<name>.schema-1`."""
    copy = path.with_name(f"{path.name}.schema-{version}")
    # VACUUM INTO fills an empty file and keeps its mode; what an interrupted run left is not empty.
    copy.unlink(missing_ok=True)
    os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    await connection.execute("VACUUM INTO ?", (str(copy),))


async def _pragma(connection: _Connection, name: str) -> Any:
    rows = list(await connection.execute_fetchall(f"PRAGMA {name}"))
    return rows[0][0]


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _length_of_log(path: Path) -> int:
    """After a commit there is one."""
    try:
        return os.stat(_log_of(path)).st_size
    except OSError as error:
        raise FileChanged(f"its write-ahead log is gone ({error.strerror})") from error


_CHECK_ACCESS: Final = "Check that this user may read and write the file and its folder."
_RESTORE: Final = "Restore a backup: `gwproxy restore FILE`. Or name another [storage] path."
_OWN_FILE: Final = "Give [storage] path a file of its own."


def refusal(path: Path, error: BaseException | None) -> DatabaseRefused:
    """What SQLite says, with the cure."""
    match getattr(error, "sqlite_errorname", "").split("_")[1:2]:
        case ["NOTADB"] | ["CORRUPT"]:
            return DatabaseDamaged(f"{path}: {error}. {_RESTORE}")
        case ["FULL"]:
            cure = "Make room on the disk."
        case ["BUSY"] | ["LOCKED"]:
            cure = "Close the other program that has the file open."
        case _:
            cure = _CHECK_ACCESS
    return DatabaseRefused(f"{path}: {error}. {cure}")
