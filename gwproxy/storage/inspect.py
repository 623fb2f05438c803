"""Looking at what is kept without touching it, also while a server runs: the database through a
connection that only reads, the journal as it stands on the disk.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from gwproxy.core.ledger import State, apply
from gwproxy.core.records import decode
from gwproxy.storage.database import DatabaseRefused, no_file
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.ledger import Mark, load_state, mark_of
from gwproxy.storage.scan import Scan, boot_id, scan
from gwproxy.storage.segments import CHUNK_BYTES, JournalRefused

T = TypeVar("T")


class Tables:
    """The database as of one moment."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.mark: Mark = mark_of(connection)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return work(self._connection)


@contextmanager
def tables(path: Path) -> Iterator[Tables]:
    """DatabaseRefused where there is none that could be read."""
    words = no_file(path)
    if words is not None:
        raise DatabaseRefused(f"{path}: {words}.")
    try:
        uri = f"file:{quote(str(path))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            yield Tables(connection)
    except sqlite3.Error as error:
        raise DatabaseRefused(f"{path}: {error}.{_likely(error)}") from error


def _likely(error: sqlite3.Error) -> str:
    """SQLite does not say why it cannot open a file."""
    if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_CANTOPEN:
        return ""
    return (
        " Nothing was served here yet, its disk is not mounted, another folder is meant, or only "
        "the service's user may read it: check [storage] path, and run it as that user."
    )


async def state(tables: Tables, found: Scan) -> State:
    """The ledger at the journal's end; Gap, JournalRefused or BrokenLedger."""
    stored = await load_state(tables, breathe=_at_once)
    trail, mark = found.trail, tables.mark
    if not trail.segments or trail.end.lsn < mark.lsn:
        return stored
    cursor = trail.find(mark.lsn)
    if found.ledger_id != mark.ledger_id or cursor.chain != mark.chain:
        raise JournalRefused(
            f"{trail.directory}: is not the journal of this database. "
            "Set [storage] path and journal to two that belong together."
        )
    while cursor.lsn < trail.end.lsn:
        payloads, cursor = trail.read(cursor, _PAGE, CHUNK_BYTES)
        for payload in payloads:
            apply(stored, decode(payload))
    return stored


_PAGE: Final = 1000


async def _at_once() -> None:
    """Nobody else waits for this process."""


def journal(directory: Path, applied_lsn: int) -> Scan:
    """The journal as it stands: what is written at this moment may be there in part."""
    return scan(OS_FILES, directory, boot_id(OS_FILES), applied_lsn)
