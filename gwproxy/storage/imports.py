"""The files of imports: many rows of the directory, which one record of the journal puts in force.

A file is on the disk before its record is written, and stays as long as the journal has the record:
whoever reads the record again reads the rows from it. One without a record is nothing.
"""

import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from gwproxy.core.identity import Organization, User
from gwproxy.core.records import Import
from gwproxy.storage.database import Database
from gwproxy.storage.files import Files
from gwproxy.storage.segments import JournalRefused

_NAME: Final = re.compile(r"import-(\d{20})\.ndjson")
_WRITE_BYTES: Final = 1 << 20


class Row(msgspec.Struct, omit_defaults=True, gc=False):
    """One line. An organization comes before its users."""

    org: Organization | None = None
    user: User | None = None

    @property
    def row(self) -> Organization | User:
        row = self.org or self.user
        assert row is not None, "a line has a row"
        return row


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Row).decode


def name_after(lsn: int) -> str:
    """A name for what will be recorded after `lsn`: a later import has a later one."""
    return f"import-{lsn:020}.ndjson"


def write(
    files: Files, directory: Path, name: str, rows: Iterable[Organization | User]
) -> tuple[str, int]:
    """Write the file and bring it to the disk: its SHA-256 and the number of rows. OSError."""
    path, digest, count, offset = directory / name, sha256(), 0, 0
    if name in files.listdir(directory):
        files.unlink(path)  # of an attempt that came to nothing
    fd = files.create(path)
    try:
        lines = bytearray()

        def flush() -> None:
            nonlocal offset
            while lines:
                written = files.pwrite(fd, bytes(lines), offset)
                digest.update(lines[:written])
                offset += written
                del lines[:written]

        for row in rows:
            lines += _encode(Row(org=row) if isinstance(row, Organization) else Row(user=row))
            lines += b"\n"
            count += 1
            if len(lines) >= _WRITE_BYTES:
                flush()
        flush()
        files.fsync(fd)
    finally:
        files.close(fd)
    files.fsync_directory(directory)
    return digest.hexdigest(), count


def read(files: Files, directory: Path, record: Import) -> Iterator[Organization | User]:
    """The rows of a record, once all of the file was found to be what was written."""
    path = directory / record.file
    try:
        data = files.read(path)
    except OSError as error:
        raise JournalRefused(
            f"{path}: {error.strerror}. Record {record.lsn} of the journal has its rows in there: "
            "put the file back."
        ) from error
    if sha256(data).hexdigest() != record.digest:
        raise JournalRefused(
            f"{path}: damaged. Record {record.lsn} of the journal has its rows in there: put a "
            "good copy of the file back."
        )
    start = 0
    while (stop := data.find(b"\n", start)) >= 0:
        yield _decode(data[start:stop]).row
        start = stop + 1


async def sweep(
    database: Database, files: Files, directory: Path, first_lsn: int, awaited: Iterable[str] | None
) -> None:
    """Remove the files whose records the journal has no longer, from before `first_lsn`; and those
    that no record names, where the names that the database does not know yet are `awaited`."""
    names = [name for name in files.listdir(directory) if _NAME.fullmatch(name)]
    if not names:
        return
    rows = await database.read("SELECT id, lsn FROM audit WHERE noun = 'import'")
    recorded = {row["id"]: row["lsn"] for row in rows}
    for name in names:
        lsn = recorded.get(name)
        unused = awaited is not None and name not in awaited if lsn is None else lsn < first_lsn
        if unused:
            files.unlink(directory / name)
