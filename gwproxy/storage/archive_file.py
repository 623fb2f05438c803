"""An archive's file: a closed month of the ledger, compressed, that says of itself whether it is
whole and adds up. Written once, under another name until it is known to be good.

One JSON object a line, gzip: what it is (`archive`), the accounts' lines (`entry`), the requests
(`request`), the sums (`balance`), and how many of each (`end`).
"""

import re
import sqlite3
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from gwproxy.core.ledger import VOID, Key
from gwproxy.storage.files import Files

VERSION: Final = 1

SLICE_ROWS: Final = 200
"""Removed in one transaction: two milliseconds or so, and a sync of the disk."""

CHUNK_BYTES: Final = 256 << 10

UNFINISHED: Final = "unfinished"
_NAME: Final = re.compile(r"\d{4}-\d{2}-\d+\.ndjson\.gz")


class ArchiveRefused(Exception):
    """It could not be made, or is not to be trusted. The message names the file."""


# -- what stands in it -----------------------------------------------------------------------------


class Head(msgspec.Struct, frozen=True, kw_only=True, tag_field="k", tag="archive"):
    version: int
    ledger_id: str
    month: str
    lsn: int
    """Lines of later records are not in it."""
    t: int
    last: Key
    """The last of its balances: the one that is closed last."""


class EntryLine(msgspec.Struct, frozen=True, tag_field="k", tag="entry", gc=False):
    lsn: int
    account: str
    period: str
    type: str
    amount: int
    reservation: int | None
    t: int | None
    actor: str | None
    reason: str | None


class RequestLine(msgspec.Struct, frozen=True, tag_field="k", tag="request", gc=False):
    """What is looked at of a request; the line has all that the row had."""

    lsn: int
    id: str
    period: str
    key_id: str
    user_id: str
    org_id: str
    outcome: str


class BalanceLine(msgspec.Struct, frozen=True, tag_field="k", tag="balance", gc=False):
    account: str
    period: str
    spent: int
    credited: int
    count: int

    @property
    def key(self) -> Key:
        return self.account, self.period


class End(msgspec.Struct, frozen=True, kw_only=True, tag_field="k", tag="end"):
    entries: int
    requests: int
    balances: int


Row = EntryLine | RequestLine
_decode: Final = msgspec.json.Decoder(Head | EntryLine | RequestLine | BalanceLine | End).decode
encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Archived:
    """A file that is whole."""

    path: Path
    head: Head
    hash: str
    """SHA-256 of the file, in hexadecimal."""
    end: End
    balances: tuple[BalanceLine, ...]


def archives(files: Files, folder: Path) -> list[Path]:
    """The files of a folder, the oldest month first."""
    try:
        names = files.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if _NAME.fullmatch(name)]


# -- writing one ---------------------------------------------------------------------------------


class Writing:
    """The file while it is written, in one thread after the other."""

    def __init__(self, files: Files, path: Path, head: Head) -> None:
        self.files = files
        self.path = path
        # What closes it may come while a thread still writes, where the writing is called off.
        self._lock = threading.Lock()
        with suppress(FileNotFoundError):
            files.unlink(path)
        self._fd: int | None = files.create(path)
        self._offset = 0
        self._compressor = zlib.compressobj(wbits=31)  # gzip, without a name or a time in it
        self._write(self._compressor.compress(encode(head) + b"\n"))

    def add(self, rows: Sequence[Any], line: Callable[[Any], bytes]) -> None:
        with self._lock:
            self._write(self._compressor.compress(b"".join([line(row) + b"\n" for row in rows])))

    def finish(self, end: End) -> None:
        with self._lock:
            last = self._compressor.compress(encode(end) + b"\n")
            self._write(last + self._compressor.flush())
            assert self._fd is not None, "it is being written"
            self.files.fsync(self._fd)

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, None
            if fd is not None:
                self.files.close(fd)

    def _write(self, data: bytes) -> None:
        if self._fd is None:
            raise ArchiveRefused(f"{self.path}: was called off.")
        # What it is given to compress a compressor may keep for a while.
        if data and self.files.pwrite(self._fd, data, self._offset) != len(data):
            raise ArchiveRefused(f"{self.path}: there is no room for it on the disk.")
        self._offset += len(data)


def finish(out: Writing, path: Path, end: End) -> Archived:
    """It gets its name when what has reached the disk is whole and adds up."""
    out.finish(end)
    found = check(out.files, out.path)
    out.files.rename(out.path, path)
    out.files.fsync_directory(path.parent)
    return Archived(path, found.head, found.hash, found.end, found.balances)


def entry_line(row: Sequence[Any]) -> bytes:
    return encode(EntryLine(*row))


def request_line(row: sqlite3.Row) -> bytes:
    fields: dict[str, Any] = {"k": "request", **dict(zip(row.keys(), row, strict=True))}
    for name in ("edits", "attempts", "rates"):
        if fields[name] is not None:
            fields[name] = msgspec.Raw(fields[name].encode())
    return encode(fields)


# -- reading one -----------------------------------------------------------------------------------


def check(files: Files, path: Path) -> Archived:
    """Read all of it; ArchiveRefused where it is damaged, not whole, or does not add up."""
    digest = sha256()
    head: Head | None = None
    end: End | None = None
    balances: list[BalanceLine] = []
    spent: dict[Key, int] = defaultdict(int)
    credited: dict[Key, int] = defaultdict(int)
    count: dict[Key, int] = defaultdict(int)
    entries = requests = 0
    for found in _values(files, path, digest.update):
        if head is None or end is not None:
            if not isinstance(found, Head) or head is not None:
                raise ArchiveRefused(f"{path}: is not an archive.")
            head = found
            continue
        match found:
            case EntryLine():
                entries += 1
                sums = credited if found.type == "grant" else spent
                sums[found.account, found.period] += found.amount
            case RequestLine():
                requests += 1
                if found.outcome != VOID:
                    for account in _own(found):
                        count[account, found.period] += 1
            case BalanceLine():
                balances.append(found)
            case End():
                end = found
    if head is None or end is None:
        raise ArchiveRefused(f"{path}: is not whole.")
    if end != End(entries=entries, requests=requests, balances=len(balances)):
        raise ArchiveRefused(f"{path}: lines are missing.")
    for line in balances:
        own = line.account.startswith(("key:", "user:", "org:"))
        sums_of = (spent.pop(line.key, 0), credited.pop(line.key, 0), count.pop(line.key, 0))
        if sums_of != (line.spent, line.credited, line.count if own else 0):
            raise ArchiveRefused(f"{path}: {line.account} {line.period} does not add up.")
    if spent or credited or count:
        raise ArchiveRefused(f"{path}: has lines of accounts that it has no sums of.")
    return Archived(path, head, digest.hexdigest(), end, tuple(balances))


def _own(line: RequestLine) -> tuple[str, str, str]:
    return f"key:{line.key_id}", f"user:{line.user_id}", f"org:{line.org_id}"


class Beginning(NamedTuple):
    head: Head
    first: Row | None
    """It is removed from the tables last: where it is gone, all are."""


def beginning(files: Files, path: Path) -> Beginning:
    """What a file is, from its first lines."""
    values = _values(files, path)
    head, first = next(values, None), next(values, None)
    if not isinstance(head, Head):
        raise ArchiveRefused(f"{path}: is not an archive.")
    return Beginning(head, first if isinstance(first, Row) else None)


def slices(files: Files, path: Path) -> Iterator[list[Row]]:
    """The rows that are to leave the tables, in the order in which they do."""
    first: list[Row] = []
    rows: list[Row] = []
    for value in _values(files, path):
        if not isinstance(value, Row):
            continue
        if not first:
            first.append(value)
            continue
        rows.append(value)
        if len(rows) == SLICE_ROWS:
            yield rows
            rows = []
    yield rows
    yield first


def find(files: Files, path: Path, request_id: str) -> dict[str, Any] | None:
    """A request that was archived, as its row was."""
    wanted = request_id.encode()
    for line in _lines(files, path):
        if wanted in line:
            found: dict[str, Any] = msgspec.json.decode(line)
            if found["k"] == "request" and found["id"] == request_id:
                return found
    return None


def digest_of(files: Files, path: Path) -> str:
    digest = sha256()
    for data in _chunks(files, path):
        digest.update(data)
    return digest.hexdigest()


def _values(
    files: Files, path: Path, seen: Callable[[bytes], None] = lambda data: None
) -> Iterator[Head | Row | BalanceLine | End]:
    for line in _lines(files, path, seen):
        try:
            yield _decode(line)
        except msgspec.MsgspecError as error:
            raise ArchiveRefused(f"{path}: is damaged ({error}).") from error


def _lines(
    files: Files, path: Path, seen: Callable[[bytes], None] = lambda data: None
) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=31)
    rest = b""
    for data in _chunks(files, path):
        seen(data)
        try:
            text = rest + decompressor.decompress(data)
        except zlib.error as error:
            raise ArchiveRefused(f"{path}: is damaged ({error}).") from error
        *lines, rest = text.split(b"\n")
        yield from lines
    # Its own checksum has been compared when gzip's end was reached, and only then.
    if rest or not decompressor.eof or decompressor.unused_data:
        raise ArchiveRefused(f"{path}: is not whole.")


def _chunks(files: Files, path: Path) -> Iterator[bytes]:
    offset = 0
    while True:
        # Opened for each: whoever reads may stop in the middle and leave no file open.
        fd = files.open(path)
        try:
            data = files.pread(fd, CHUNK_BYTES, offset)
        finally:
            files.close(fd)
        if not data:
            return
        offset += len(data)
        yield data
