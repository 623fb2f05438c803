"""Looking at what is kept without touching it, also while a server runs: the database through a
connection that only reads, the journal as it stands on the disk.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from gwproxy.storage.database import DatabaseRefused
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.ledger import Mark, mark_of
from gwproxy.storage.scan import Scan, boot_id, scan

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
    try:
        uri = f"file:{quote(str(path))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            yield Tables(connection)
    except sqlite3.Error as error:
        raise DatabaseRefused(f"{path}: {error}.") from error


def journal(directory: Path, applied_lsn: int) -> Scan:
    """The journal as it stands: what is written at this moment may be there in part."""
    return scan(OS_FILES, directory, boot_id(OS_FILES), applied_lsn)
