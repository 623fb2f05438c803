"""The archive: a closed month of the ledger in one compressed file, and how it leaves the tables.

A file says of itself whether it is whole and adds up. It is made from tables that nobody changes
any more, in pages, so that no commit waits for it; and what is removed from them afterwards is
what stands in the file, row by row, and nothing else.

One JSON object a line, gzip: what it is (`archive`), the accounts' lines (`entry`), the requests
(`request`), the sums (`balance`), and how many of each (`end`).
"""

import asyncio
import re
import sqlite3
import threading
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from gwproxy.core.ledger import VOID, Key
from gwproxy.core.period import DAY_MS, end_ms, start_ms
from gwproxy.storage.database import assert_in_transaction
from gwproxy.storage.files import Files
from gwproxy.storage.ledger import Tables, mark_of

VERSION: Final = 1

PAGE_LSNS: Final = 2000
"""Looked at in one go by the one connection: some milliseconds, in which no commit is made."""

PAGE_ROWS: Final = 500

SLICE_ROWS: Final = 200
"""Removed in one transaction: two milliseconds or so, and a sync of the disk."""

CHUNK_BYTES: Final = 256 << 10

_NAME: Final = re.compile(r"\d{4}-\d{2}-\d+\.ndjson\.gz")
_UNFINISHED: Final = "unfinished"


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
_encode: Final = msgspec.json.Encoder().encode


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


# -- making one ------------------------------------------------------------------------------------


async def make(
    files: Files, folder: Path, tables: Tables, month: str, pause: Callable[[], Awaitable[None]]
) -> Archived | None:
    """Write what the tables have of `month`; None: nothing. Nobody may still hold anything in it.

    ArchiveRefused where the file does not add up, as when an adjustment came in between.
    """
    found = await tables.run(partial(_begin, month=month))
    if found is None:
        return None
    head = found
    out = await asyncio.to_thread(_Out, files, folder / _UNFINISHED, head)
    try:
        entries = requests = balances = 0
        after = 0
        while True:
            page = await tables.run(partial(_entries, month=month, after=after, last=head.lsn))
            if page is None:
                break
            after, rows = page
            entries += len(rows)
            await asyncio.to_thread(out.add, rows, _entry_line)
            await pause()
        place: tuple[int, int] | None = (0, 0)
        while place is not None:
            place, found_rows = await tables.run(partial(_requests, month=month, after=place))
            requests += len(found_rows)
            await asyncio.to_thread(out.add, found_rows, _request_line)
            await pause()
        key: Key | None = ("", "")
        while key is not None:
            key, sums = await tables.run(partial(balances_of, month=month, after=key))
            balances += len(sums)
            await asyncio.to_thread(out.add, sums, _encode)
        end = End(entries=entries, requests=requests, balances=balances)
        path = folder / f"{month}-{head.lsn}.ndjson.gz"
        return await asyncio.to_thread(_finish, out, path, end)
    finally:
        out.close()


def _finish(out: "_Out", path: Path, end: End) -> Archived:
    """It gets its name when what has reached the disk is whole and adds up."""
    out.finish(end)
    found = check(out.files, out.path)
    out.files.rename(out.path, path)
    out.files.fsync_directory(path.parent)
    return Archived(path, found.head, found.hash, found.end, found.balances)


class _Out:
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
        self._write(self._compressor.compress(_encode(head) + b"\n"))

    def add(self, rows: Sequence[Any], line: Callable[[Any], bytes]) -> None:
        with self._lock:
            self._write(self._compressor.compress(b"".join([line(row) + b"\n" for row in rows])))

    def finish(self, end: End) -> None:
        with self._lock:
            last = self._compressor.compress(_encode(end) + b"\n")
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
        if self.files.pwrite(self._fd, data, self._offset) != len(data):
            raise ArchiveRefused(f"{self.path}: there is no room for it on the disk.")
        self._offset += len(data)


def _begin(connection: sqlite3.Connection, month: str) -> Head | None:
    last = connection.execute(
        "SELECT account, period FROM balance WHERE period >= ? AND period < ?"
        " ORDER BY period DESC, account DESC LIMIT 1",
        _range(month),
    ).fetchone()
    if last is None:
        return None
    mark = mark_of(connection)
    return Head(
        version=VERSION,
        ledger_id=mark.ledger_id or "",
        month=month,
        lsn=mark.lsn,
        t=mark.t,
        last=(last[0], last[1]),
    )


_ARCHIVED: Final = """EXISTS (
    SELECT 1 FROM closed WHERE closed.account = line.account
        AND closed.period = line.period AND closed.lsn > line.lsn)"""


def _entries(
    connection: sqlite3.Connection, month: str, after: int, last: int
) -> tuple[int, list[Any]] | None:
    """Of the next records that have lines: the last, and those of their lines that belong here."""
    [upto] = connection.execute(
        "SELECT max(lsn) FROM (SELECT lsn FROM entry WHERE lsn > ? AND lsn <= ?"
        " ORDER BY lsn LIMIT ?)",
        (after, last, PAGE_LSNS),
    ).fetchone()
    if upto is None:
        return None
    rows = connection.execute(
        "SELECT lsn, account, period, type, amount, reservation, t, actor, reason"
        " FROM entry AS line WHERE lsn > ? AND lsn <= ? AND period >= ? AND period < ?"
        f" AND NOT {_ARCHIVED} ORDER BY lsn, account, period, type",
        (after, upto, *_range(month)),
    ).fetchall()
    return upto, rows


def _requests(
    connection: sqlite3.Connection, month: str, after: tuple[int, int]
) -> tuple[tuple[int, int] | None, list[Any]]:
    """The next requests that were admitted in the month, and the place after them."""
    rows = connection.execute(
        "SELECT * FROM request WHERE t >= ? AND t < ? AND (t, lsn) > (?, ?) AND period = ?"
        " AND NOT EXISTS (SELECT 1 FROM closed WHERE closed.account = 'org:' || org_id"
        " AND closed.period = request.period) ORDER BY t, lsn LIMIT ?",
        # A request whose month ended while it was let in has a time of the next one.
        (start_ms(month) - DAY_MS, end_ms(month) + DAY_MS, *after, month, PAGE_ROWS),
    ).fetchall()
    return ((rows[-1]["t"], rows[-1]["lsn"]) if len(rows) == PAGE_ROWS else None), rows


def balances_of(
    connection: sqlite3.Connection, month: str, after: Key
) -> tuple[Key | None, list[BalanceLine]]:
    """The next balances of a month and its days, after (period, account), and the place after."""
    rows = connection.execute(
        "SELECT account, period, spent, credited, count FROM balance"
        " WHERE (period, account) > (?, ?) AND period >= ? AND period < ?"
        " ORDER BY period, account LIMIT ?",
        (*after, *_range(month), PAGE_ROWS),
    ).fetchall()
    lines = [BalanceLine(*row) for row in rows]
    return ((lines[-1].period, lines[-1].account) if len(rows) == PAGE_ROWS else None), lines


def _range(month: str) -> tuple[str, str]:
    """A month and its days: "2026-09" <= period < "2026-09."."""
    return month, f"{month}."


def _entry_line(row: Sequence[Any]) -> bytes:
    return _encode(EntryLine(*row))


def _request_line(row: sqlite3.Row) -> bytes:
    fields: dict[str, Any] = {"k": "request", **dict(zip(row.keys(), row, strict=True))}
    for name in ("edits", "attempts", "rates"):
        if fields[name] is not None:
            fields[name] = msgspec.Raw(fields[name].encode())
    return _encode(fields)


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
    fd = files.open(path)
    try:
        offset = 0
        while data := files.pread(fd, CHUNK_BYTES, offset):
            offset += len(data)
            yield data
    finally:
        files.close(fd)


# -- out of the tables -----------------------------------------------------------------------------


def closed_with(connection: sqlite3.Connection, head: Head) -> str | None:
    """The hash of the file that the last of its accounts was closed with; None: not yet."""
    row = connection.execute(
        "SELECT hash FROM closed WHERE account = ? AND period = ? AND lsn > ? ORDER BY lsn LIMIT 1",
        (*head.last, head.lsn),
    ).fetchone()
    return None if row is None else str(row[0])


def is_named(connection: sqlite3.Connection, hash: str) -> bool:
    """Whether any account was closed with this file."""
    row = connection.execute("SELECT 1 FROM closed WHERE hash = ? LIMIT 1", (hash,)).fetchone()
    return row is not None


def stands(connection: sqlite3.Connection, row: Row) -> bool:
    """Whether a row of a file is in the tables too."""
    if isinstance(row, RequestLine):
        found = connection.execute(
            "SELECT 1 FROM request WHERE lsn = ? AND id = ?", (row.lsn, row.id)
        )
    else:
        found = connection.execute(
            "SELECT 1 FROM entry WHERE lsn = ? AND account = ? AND period = ? AND type = ?",
            (row.lsn, row.account, row.period, row.type),
        )
    return found.fetchone() is not None


def erase(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Remove them, within a transaction. Of those that are gone already nothing is said."""
    entries = [(r.lsn, r.account, r.period, r.type) for r in rows if isinstance(r, EntryLine)]
    requests = [(r.lsn, r.id) for r in rows if isinstance(r, RequestLine)]
    assert_in_transaction(connection)
    connection.executemany(
        "DELETE FROM entry WHERE lsn = ? AND account = ? AND period = ? AND type = ?", entries
    )
    assert_in_transaction(connection)
    connection.executemany("DELETE FROM request WHERE lsn = ? AND id = ?", requests)


def oldest_month(connection: sqlite3.Connection) -> str | None:
    """The first month of which the tables have a balance."""
    [period] = connection.execute("SELECT min(period) FROM balance").fetchone()
    return None if period is None else str(period)[:7]
