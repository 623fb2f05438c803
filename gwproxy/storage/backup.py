"""Backups of the database: made while it is written to, believed only after a look inside, and put
in its place when it is lost. A file that is set aside is never deleted.
"""

import asyncio
import os
import re
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final
from urllib.parse import quote

from gwproxy.storage.database import SWAPPED, BackupRefused, Database, no_file, packaged
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.ledger import PUT_BACK, Mark, Mismatch, mark_of
from gwproxy.storage.scan import Scan
from gwproxy.storage.segments import Cursor, Gap
from gwproxy.storage.verify import unbalanced

KEPT_JOURNAL_BYTES: Final = 256 << 20
"""With so much journal behind the newest backup the next one is due, whatever the hour: the journal
is not cut before there is one, and reading this much again takes half a minute."""

SOONEST_S: Final = 60.0
"""But not more often: where the writer has fallen behind, another backup does not help."""

_NAME: Final = re.compile(r"backup-(\d{20})\.db")
_UNFINISHED: Final = ".unfinished"


async def backup_to(database: Database, file: Path) -> Mark:
    """Write a copy of the database, as of one moment, to `file`; up to where its tables go.

    The database goes on being written to. Until the copy is found good and has reached the disk it
    has another name. BackupRefused.
    """

    def name(mark: Mark) -> Path:
        if file.exists() and not file.is_file():  # a device would be renamed over like a file
            raise BackupRefused(f"{file}: is there already, and is not a file.")
        return file

    return await _backup(database, file.with_name(file.name + _UNFINISHED), name)


def copy_of(path: Path, file: Path, journal: Path | None = None) -> Mark:
    """The same of a database that another process may be writing to. A name of the ledger's own,
    or one in its `journal`, is refused: a copy there would take the place of what it is made of."""
    unfinished = file.with_name(file.name + _UNFINISHED)
    for name in (file, unfinished):
        if _is_of_ledger(name, path, journal):
            raise BackupRefused(f"{name}: belongs to the ledger itself. Name another file.")
    if file.exists() and not file.is_file():
        raise BackupRefused(f"{file}: is there already, and is not a file.")
    return _copied(path, unfinished, lambda mark: file, fault=lambda: None, stopped=lambda: False)


def _is_of_ledger(file: Path, path: Path, journal: Path | None) -> bool:
    """Also by another way to it: a symbolic link, a hard link, a folder's other name."""
    own = [path.with_name(path.name + end) for end in (*_ENDS, ".lock", _UNFINISHED)]
    if journal is not None:
        with suppress(OSError):
            own += journal.iterdir()
        if file.resolve().is_relative_to(journal.resolve()):
            return True
    return any(file.resolve() == each.resolve() or _same(file, each) for each in own)


def _same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except OSError:  # one of them is not there
        return False


async def _backup(database: Database, unfinished: Path, name: Callable[[Mark], Path]) -> Mark:
    stopped = False
    make = partial(
        _copied, database.path, unfinished, name, fault=database.fault, stopped=lambda: stopped
    )
    try:
        return await asyncio.to_thread(make)
    finally:
        stopped = True  # of use only where this was cancelled


def _copied(
    path: Path,
    unfinished: Path,
    name: Callable[[Mark], Path],
    *,
    fault: Callable[[], str | None],
    stopped: Callable[[], bool],
) -> Mark:
    try:
        # First: what is wrong with it is not to be told of the copy.
        _assert_readable(path)
        # VACUUM INTO fills an empty file and keeps its mode.
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # A connection of its own, that only reads: the writer's would be kept from writing.
        with closing(_opened(path, "mode=ro")) as connection:
            connection.set_progress_handler(stopped, _INTERRUPTIBLE_OPS)
            connection.execute("VACUUM INTO ?", (str(unfinished),))
        mark = checked(unfinished)
        wrong = fault()
        if wrong is not None:
            raise BackupRefused(f"{path}: no backup was made: {wrong}.")
        _to_disk(unfinished)
        unfinished.replace(name(mark))
        OS_FILES.fsync_directory(unfinished.parent)
        return mark
    except (sqlite3.Error, OSError) as error:
        raise BackupRefused(f"{unfinished}: no backup was made: {error}.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _assert_readable(path: Path) -> None:
    try:
        with closing(_opened(path, "mode=ro")) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise BackupRefused(f"{path}: no backup was made: {error}.") from error


def checked(file: Path) -> Mark:
    """Up to where a backup goes; BackupRefused when it is damaged or does not add up."""
    try:
        with closing(_opened(file, _ALONE)) as connection:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise BackupRefused(f"{file}: damaged ({verdict}).")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > packaged()[-1].version:
                raise BackupRefused(f"{file}: made by a newer gwproxy (schema {version}).")
            mark = mark_of(connection)
            wrong = next(unbalanced(connection), None)
    except sqlite3.Error as error:
        raise BackupRefused(f"{file}: {error}.") from error
    if mark.ledger_id is None:
        raise BackupRefused(f"{file}: has never been part of a ledger.")
    if wrong is not None:
        raise BackupRefused(f"{file}: does not add up: {wrong}.")
    return mark


def restore(backup: Path, path: Path) -> Mark:
    """Put a copy of `backup` at `path`. What stands there, and its log, is set aside under another
    name: `gwproxy.db.aside-1`. BackupRefused, and nothing has changed, or only that name.

    Whoever has the old one open must do this through `Database.replace`.
    """
    mark = checked(backup)
    _place(partial(_copy, backup), path)
    return mark


def _copy(backup: Path, file: Path) -> None:
    shutil.copyfile(backup, file)


def _begin(ledger_id: str, file: Path) -> None:
    """A database of this ledger in which there is nothing yet."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        for migration in packaged():
            connection.executescript(
                f"BEGIN;\n{migration.sql}\nPRAGMA user_version = {migration.version};\nCOMMIT;"
            )
        connection.execute("UPDATE meta SET ledger_id = ?", (ledger_id,))


def _place(fill: Callable[[Path], None], path: Path) -> None:
    """Put a file that `fill` writes at `path`, as `restore` does."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        fill(unfinished)
        _to_disk(unfinished)
        set_aside(path)
        unfinished.rename(path)
        OS_FILES.fsync_directory(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise BackupRefused(f"{path}: it could not be put there: {error}.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def set_aside(path: Path) -> None:
    """Give the database at `path`, and its log, names under which SQLite would find both."""
    for number in count(1):
        aside = path.with_name(f"{path.name}.aside-{number}")
        names = [
            (path.with_name(path.name + end), aside.with_name(aside.name + end)) for end in _ENDS
        ]
        if not any(os.path.lexists(new) for _, new in names):
            break
    # The database first: for a moment there is none, rather than one without the end of its log.
    for old, new in names:
        if os.path.lexists(old):
            old.rename(new)


CanFollow = Callable[[Mark], Awaitable[object]]


def follow(found: Scan, mark: Mark) -> Cursor:
    """Where the journal goes on after a database with this mark; Gap or Mismatch."""
    if mark.ledger_id != found.ledger_id:
        raise Mismatch("it belongs to another ledger than the journal")
    cursor = found.trail.find(mark.lsn)
    if cursor.chain != mark.chain:
        raise Mismatch(f"record {mark.lsn} is not the one of that number in the journal")
    return cursor


def following(found: Scan) -> CanFollow:
    """Whether that journal can go on after a database."""

    async def can_follow(mark: Mark) -> object:
        return await asyncio.to_thread(follow, found, mark)

    return can_follow


class Backups:
    """The backups in one folder, each named by the last record in it."""

    def __init__(self, folder: Path, *, every_s: float, keep: int) -> None:
        """`every_s` 0: only where there is too much journal behind the newest one."""
        self._folder = folder
        self._every_s = every_s
        self._keep = keep

    def due(self, now: float, journal_bytes: int) -> bool:
        """Whether one should be made; `now` in seconds since 1970. Without any, at once."""
        made = self.newest_at()
        if made is None:
            return True
        age_s = now - made
        if age_s < 0:  # by a clock that was ahead: it says nothing
            return True
        if journal_bytes >= KEPT_JOURNAL_BYTES and age_s >= SOONEST_S:
            return True
        return 0 < self._every_s <= age_s

    def newest_at(self) -> float | None:
        """When the newest one was made, in seconds since 1970; None: there is none."""
        try:
            return self._files()[0].stat().st_mtime
        except (IndexError, OSError):
            return None

    async def make(self, database: Database) -> tuple[Path, Mark]:
        """Make one, and remove the oldest of those that are too many. BackupRefused."""

        def name(mark: Mark) -> Path:
            return self._folder / f"backup-{mark.lsn:020}.db"

        mark = await _backup(database, self._folder / f"backup{_UNFINISHED}", name)
        for file in self._files()[self._keep :]:
            with suppress(OSError):
                file.unlink()
        return name(mark), mark

    def newest(self) -> tuple[Path, Mark] | None:
        """The newest one and up to where it goes. It was found good when it was made."""
        for file in self._files():
            with suppress(sqlite3.Error), closing(_opened(file, _ALONE)) as connection:
                return file, mark_of(connection)
        return None

    def covered(self, applied_lsn: int) -> int:
        """Up to which record the journal may be cut: those that stand both in the newest backup and
        in the database, by a commit of this process that has reached the disk."""
        newest = self.newest()
        return 0 if newest is None else min(applied_lsn, newest[1].lsn)

    async def rebuild(
        self,
        database: Database,
        ledger_id: str,
        can_follow: CanFollow,
        set_aside: bool = True,
    ) -> str:
        """Put what `chosen` finds in the place of a database that is lost; what it was.

        A good file that somebody has put there goes before all backups. Without `set_aside` a
        file that is no good stays where it is. BackupRefused.
        """
        if database.fault() == SWAPPED:
            with suppress(BackupRefused, Gap, Mismatch):
                await can_follow(await asyncio.to_thread(checked, database.path))
                # A copy, for the log that stands beside it may be that of the file before it.
                await database.replace(partial(_place, partial(_copy, database.path)))
                return PUT_BACK
        if not set_aside:
            raise BackupRefused(
                f"{database.path}: a damaged file was set aside less than an hour ago. Check the "
                "disk; then restart, or put a good file in its place"
            )
        source, place = await self.chosen(ledger_id, can_follow)
        await database.replace(place)
        return source

    async def chosen(
        self, ledger_id: str, can_follow: CanFollow
    ) -> tuple[str, Callable[[Path], None]]:
        """The newest good backup from which the journal can go on, else an empty database where the
        journal goes back to the ledger's beginning; and what puts it in a place. BackupRefused.

        `can_follow` raises Gap or Mismatch where the journal cannot.
        """
        refused = "there is no backup"
        for file in self._files():
            try:
                await can_follow(await asyncio.to_thread(checked, file))
            except (BackupRefused, Gap, Mismatch) as error:
                refused = str(error).rstrip(".")
                continue
            return str(file), partial(_place, partial(_copy, file))
        try:
            await can_follow(Mark(ledger_id, epoch=0, lsn=0, chain=0, t=0))
        except (Gap, Mismatch) as error:
            raise BackupRefused(f"{self._folder}: {refused}, and {error}.") from error
        return "the journal alone", partial(_place, partial(_begin, ledger_id))

    @property
    def any(self) -> bool:
        """Whether there is one, good or not."""
        return bool(self._files())

    def _files(self) -> list[Path]:
        """Newest first."""
        try:
            names = [name for name in os.listdir(self._folder) if _NAME.fullmatch(name)]
        except OSError:
            names = []  # told by whoever writes there
        return [self._folder / name for name in sorted(names, reverse=True)]


_ENDS: Final = ("", "-wal", "-shm")


_ALONE: Final = "mode=ro&immutable=1"
"""Nobody writes to it: SQLite need not lock it, nor put files of its own beside it."""

_INTERRUPTIBLE_OPS: Final = 10_000


def _opened(file: Path, how: str) -> sqlite3.Connection:
    words = no_file(file)
    if words is not None:
        raise sqlite3.OperationalError(words)  # as SQLite says what it cannot open
    return sqlite3.connect(f"file:{quote(str(file))}?{how}", uri=True, isolation_level=None)


def _to_disk(file: Path) -> None:
    fd = OS_FILES.open(file)
    try:
        OS_FILES.fsync(fd)
    finally:
        OS_FILES.close(fd)
