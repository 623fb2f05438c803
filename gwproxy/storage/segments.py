"""The journal's files as they stand on the disk: lines, segments, and how to read along them.

The disk is reached through `Files` alone. Nothing here writes, and everything is a value.

A line is `crc8hex SP json LF`, where crc = crc32(json, crc of the line before): a chain over all
segments. A segment begins with a header, a line of its own outside the chain, which tells where in
the segment before it the journal goes over into this one; what that one has beyond does not count.
After the last line there are zeros, reserved and not yet used. No file is ever used twice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

import msgspec

from gwproxy.storage import locks
from gwproxy.storage.files import Files

VERSION: Final = 1
HEADER_BYTES: Final = 512
"""One sector: what a disk writes whole or not at all."""
CHUNK_BYTES: Final = 1 << 20
"""Read at once: a few thousand records."""


class JournalRefused(Exception):
    """The journal cannot be opened as it is. The message names the file and what to do."""


class JournalInUse(JournalRefused):
    """Another process holds it: most often the running server."""

    def __init__(self, path: Path, holder: locks.Held) -> None:
        self.fact = f"{path}: in use by another process{holder}."
        super().__init__(
            f"{self.fact} Stop it first, or give this one a [storage] journal of its own."
        )


class Corrupt(JournalRefused):
    """A file holds something else than was written to it."""

    def __init__(self, file: Path, offset: int, why: str) -> None:
        super().__init__(
            f"{file}: damaged at byte {offset}: {why}. Nothing was changed. Put a good copy of the "
            "file back, or move the journal's folder aside and go on from the database alone with "
            "`gwproxy ledger accept-loss`."
        )
        self.file = file
        self.offset = offset
        self.why = why


class Gap(Exception):
    """Records that were asked for are not in the journal: not any more, or not yet."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """The place just after the record `lsn`, whose crc is `chain`."""

    segment: int
    offset: int
    chain: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Segment:
    number: int
    first_lsn: int
    chain: int
    """The crc of the record before its first."""
    length: int
    """Where its last record ends."""
    size: int
    """What it takes on the disk."""

    @property
    def name(self) -> str:
        return segment_name(self.number)

    @property
    def start(self) -> Cursor:
        return Cursor(self.number, HEADER_BYTES, self.chain, self.first_lsn - 1)


class Header(msgspec.Struct, frozen=True, kw_only=True, tag_field="k", tag="segment"):
    version: int
    ledger_id: str
    epoch: int
    boot_id: str
    first_lsn: int
    chain: int
    synced: int
    previous: str
    """The name of the segment before, empty in the first one."""
    previous_length: int


@dataclass(frozen=True, slots=True)
class Trail:
    """What can be read at one moment: a value, good in any thread while records are written.

    OSError where the disk fails, Corrupt where the chain does, Gap where records are missing.
    """

    files: Files
    directory: Path
    segments: tuple[Segment, ...]
    end: Cursor
    """After the last whole record."""

    def find(self, lsn: int) -> Cursor:
        """The place just after record `lsn`. It reads the segment up to there."""
        for segment in reversed(self.segments):
            if segment.first_lsn <= lsn + 1:
                cursor = segment.start
                while cursor.lsn < lsn and cursor.offset < segment.length:
                    _, cursor = self.read_in(segment, cursor, lsn - cursor.lsn, CHUNK_BYTES)
                if cursor.lsn == lsn:
                    return cursor
                break
        first = self.segments[0].first_lsn if self.segments else self.end.lsn + 1
        raise Gap(f"the journal goes from {first} to {self.end.lsn}, and has no {lsn + 1}")

    def read(
        self, cursor: Cursor, most_records: int, most_bytes: int
    ) -> tuple[list[bytes], Cursor]:
        """The next records, at least one unless there is none; and the place after them."""
        if cursor.lsn >= self.end.lsn:
            return [], cursor
        if not any(s.number == cursor.segment and cursor.offset <= s.length for s in self.segments):
            # That segment was given up, or is covered and gone: the records stand in another one.
            cursor = self.find(cursor.lsn)
        for segment in self.segments:
            if segment.number > cursor.segment:
                if segment.first_lsn != cursor.lsn + 1:
                    raise Gap(f"the journal has no {cursor.lsn + 1} to {segment.first_lsn - 1}")
                if segment.chain != cursor.chain:
                    raise Corrupt(self.directory / segment.name, 0, "it continues another journal")
                cursor = segment.start
            if segment.number == cursor.segment and cursor.offset < segment.length:
                return self.read_in(segment, cursor, most_records, most_bytes)
        return [], cursor

    def read_in(
        self, segment: Segment, cursor: Cursor, most_records: int, most_bytes: int
    ) -> tuple[list[bytes], Cursor]:
        """The next records of this segment, which has some."""
        path = self.directory / segment.name
        fd = self.files.open(path)
        try:
            while True:
                length = min(most_bytes, segment.length - cursor.offset)
                data = pread(self.files, fd, length, cursor.offset)
                payloads, used, chain = records(data, cursor.chain, most_records)
                if payloads:
                    lsn = cursor.lsn + len(payloads)
                    return payloads, Cursor(segment.number, cursor.offset + used, chain, lsn)
                if length < most_bytes or b"\n" in data or data.startswith(b"\0"):
                    raise Corrupt(path, cursor.offset, f"this is not record {cursor.lsn + 1}")
                most_records, most_bytes = 1, most_bytes * 2  # one record is longer than that
        finally:
            self.files.close(fd)


def records(data: bytes, chain: int, most: int) -> tuple[list[bytes], int, int]:
    """The whole and good lines at the start of `data`: payloads, their bytes, the chain's end."""
    payloads: list[bytes] = []
    start = 0
    while len(payloads) < most and (stop := data.find(b"\n", start)) >= 0:
        payload = data[start + 9 : stop]
        crc = crc32(payload, chain)
        if data[start : start + 9] != b"%08x " % crc:
            break
        payloads.append(payload)
        start, chain = stop + 1, crc
    return payloads, start, chain


def remainder(files: Files, path: Path, offset: int) -> bytes:
    """What a file holds from `offset` on, without the zeros at its end."""
    fd = files.open(path)
    try:
        return pread(files, fd, files.size(fd) - offset, offset).rstrip(b"\0")
    finally:
        files.close(fd)


def pread(files: Files, fd: int, length: int, offset: int) -> bytes:
    data = files.pread(fd, length, offset)
    while len(data) < length and (more := files.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def segment_name(number: int) -> str:
    return f"{number:010}.journal"
