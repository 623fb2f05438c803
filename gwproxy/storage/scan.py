"""The journal at start-up: what is there, whether it is whole, and what has to be put aside.

The disk is reached through `Files` alone. `scan` reads and judges, and changes nothing; `inherit`
then does what was judged. Both take as long as the disk takes.

The kernel keeps what a killed process has written. So while the machine has been up, only the last
record may be unfinished, and all other damage stops the start. After a power cut anything may have
happened to what was not synced: there the journal is cut at the first damage, and the rest is kept.
"""

import errno
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final
from zlib import crc32

import msgspec

from gwproxy.storage import locks
from gwproxy.storage.files import Files, make_private
from gwproxy.storage.segments import (
    CHUNK_BYTES,
    HEADER_BYTES,
    VERSION,
    Corrupt,
    Cursor,
    Header,
    JournalInUse,
    JournalRefused,
    Segment,
    Trail,
    pread,
    records,
    remainder,
)

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_NAME: Final = re.compile(r"(\d{10})\.journal(\.aside)?")
_ASIDE: Final = ".aside"
_NOWHERE: Final = Cursor(0, 0, 0, 0)
_BEGINNING: Final = re.compile(rb"[0-9a-f]{0,8}|[0-9a-f]{8} [^\0-\x1f]*")


class _Mark(msgspec.Struct, frozen=True):
    """What the journal itself looks at in a record, at start-up only."""

    lsn: int
    synced: int


def boot_id(files: Files) -> str:
    """Which start of the machine this is: after another one, what was not synced may be gone."""
    try:
        return files.read(BOOT_ID).decode("ascii").strip()
    except OSError as error:
        raise JournalRefused(
            f"{BOOT_ID}: {error.strerror}. The journal has to know whether the machine itself was "
            "down: leave ProcSubset=pid out of the unit."
        ) from error


def claim(directory: Path) -> int:
    """Make the folder and lock it for this process; the descriptor whose close gives it back."""
    try:
        make_private(directory)
        return locks.take_folder(directory)
    except locks.Held as holder:
        raise JournalInUse(directory, holder) from holder
    except OSError as error:
        raise JournalRefused(f"{directory}: {error.strerror}. {CHECK_ACCESS}") from error


CHECK_ACCESS: Final = (
    "Check that [storage] journal is a folder that this user may write to, with room on its disk."
)


@dataclass(frozen=True, slots=True)
class Cut:
    """A power cut left damage among the records that were not synced: the rest is set aside."""

    file: Path
    offset: int
    why: str
    first_lsn: int
    last_lsn: int
    """The highest number that is still legible in the rest; first_lsn - 1 if none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What there is of a journal, judged and not yet touched. `trail.end` is its last record."""

    trail: Trail
    ledger_id: str
    """Empty when there is no journal yet."""
    epoch: int
    same_boot: bool
    synced: int
    """The last LSN that the journal itself knows to be on the disk."""
    torn_bytes: int
    """Of a last record whose writing was cut short: nobody was told that it was written."""
    cut: Cut | None
    aside: tuple[str, ...]
    """Files that hold only what is past the cut."""
    leftovers: tuple[str, ...]
    """Spare segments, and those that another one has replaced."""
    next_number: int

    def unsynced(self) -> tuple[Cursor, list[bytes]]:
        """The records that are not known to be on the disk, after the place before them."""
        trail = self.trail
        if not trail.segments:
            return trail.end, []
        synced_at = cursor = trail.find(max(self.synced, trail.segments[0].first_lsn - 1))
        for before, segment in reversed([*pairwise(trail.segments)]):
            if synced_at == segment.start:
                # Nothing of that one is needed, and its header need not be on the disk.
                synced_at = replace(synced_at, segment=before.number, offset=before.length)
        unsynced: list[bytes] = []
        while cursor.lsn < trail.end.lsn:
            payloads, cursor = trail.read(cursor, trail.end.lsn, CHUNK_BYTES)
            unsynced += payloads
        return synced_at, unsynced


def scan(files: Files, directory: Path, boot_id: str, applied_lsn: int) -> Scan:
    """Read and judge all of the journal; JournalRefused when it is damaged where it must not be.

    `applied_lsn` is the last record in the database, which gets none before it is synced.
    """
    try:
        return _scan(files, directory, boot_id, applied_lsn)
    except OSError as error:
        raise JournalRefused(f"{directory}: {error.strerror}. {CHECK_ACCESS}") from error


@dataclass(frozen=True, slots=True)
class _Found:
    """A segment's file, as its first sector shows it."""

    path: Path
    size: int
    sector: bytes
    header: Header | None
    unused: bool
    """Its header was not written, or not to its end: it is no part of the journal."""


@dataclass(slots=True)
class _Walk:
    """How far the chain holds, and what is wrong after that."""

    segments: list[Segment] = field(default_factory=list)
    end: Cursor = _NOWHERE
    synced: int = 0
    bad: Corrupt | None = None
    unfinished: bool = False
    """What is bad is the beginning of a record, with nothing after it."""


def _scan(files: Files, directory: Path, boot_id: str, applied_lsn: int) -> Scan:
    names = sorted(name for name in files.listdir(directory) if _NAME.fullmatch(name))
    found = [_look(files, directory / name) for name in names if not name.endswith(_ASIDE)]
    headers = [one.header for one in found if one.header is not None]
    newest = headers[-1] if headers else None
    if len({header.ledger_id for header in headers}) > 1:
        raise JournalRefused(
            f"{directory}: has segments of different ledgers. Leave those of one ledger here."
        )
    # Where a damaged header still says that it was written since the machine started, no power cut
    # has damaged it.
    same_boot = newest is None or newest.boot_id == boot_id
    same_boot |= any(one.header is None and boot_id.encode() in one.sector for one in found)
    path: list[_Found] = []
    leftovers: list[_Found] = []
    for one in found:
        while one.header and path and path[-1].path.name > one.header.previous:
            leftovers.append(path.pop())  # replaced by this one, which goes on from further up
        # Where a power cut took the header away, there may be records after it.
        spare = one.unused and (same_boot or not remainder(files, one.path, 0))
        (leftovers if spare else path).append(one)

    walk = _walk(files, directory, path)
    bad, end = walk.bad, walk.end
    beyond = path[len(walk.segments) :]
    torn = bad is not None and walk.unfinished and same_boot
    cut: Cut | None = None
    if bad is not None and not torn:
        marks = [mark for one in beyond for mark in _marks(files, one.path, 0)]
        if bad.offset:
            marks += _marks(files, bad.file, bad.offset)
        known = [walk.synced, *(one.header.synced for one in beyond if one.header)]
        known += [mark.synced for mark in marks]
        if not walk.unfinished:
            known.append(applied_lsn)
        if same_boot or not walk.segments or max(known) > end.lsn:
            raise bad
        last = max([end.lsn, *(mark.lsn for mark in marks)])
        cut = Cut(bad.file, bad.offset, bad.why, end.lsn + 1, last)
    return Scan(
        trail=Trail(files, directory, tuple(walk.segments), end),
        ledger_id=newest.ledger_id if newest else "",
        epoch=newest.epoch if newest else 0,
        same_boot=same_boot,
        synced=walk.synced,
        torn_bytes=len(remainder(files, bad.file, bad.offset)) if bad and torn else 0,
        cut=cut,
        aside=tuple(one.path.name for one in beyond),
        leftovers=tuple(one.path.name for one in leftovers),
        next_number=int(names[-1][:10]) + 1 if names else 1,
    )


def _look(files: Files, path: Path) -> _Found:
    fd = files.open(path)
    try:
        data, size = pread(files, fd, HEADER_BYTES, 0), files.size(fd)
    finally:
        files.close(fd)
    payloads, used, _ = records(data, 0, 1)
    if used < HEADER_BYTES:
        return _Found(path, size, data, None, _unfinished(data, 0))
    try:
        header = msgspec.json.decode(payloads[0], type=Header)
    except msgspec.MsgspecError:
        header = None
    if header is None or header.version != VERSION:
        raise JournalRefused(f"{path}: written by another version of gwproxy. Start that one.")
    return _Found(path, size, data, header, False)


def _unfinished(data: bytes, chain: int) -> bool:
    """Whether `data` is the beginning of one line, and then zeros: a write that was cut short."""
    text = data.rstrip(b"\0")
    # A whole line with something else in place of its line feed was finished, and then damaged.
    return bool(_BEGINNING.fullmatch(text)) and text[:9] != b"%08x " % crc32(text[9:-1], chain)


def _walk(files: Files, directory: Path, path: Sequence[_Found]) -> _Walk:
    walk = _Walk()
    for one, following in zip(path, (*path[1:], None), strict=False):
        header = one.header
        why = _misfit(header, walk)
        if header is None or why:
            walk.bad = Corrupt(one.path, 0, why)
            break
        goes_on_at = None
        if following and following.header and following.header.previous == one.path.name:
            goes_on_at = following.header.previous_length
        length = one.size if goes_on_at is None else min(goes_on_at, one.size)
        whole = Segment(int(one.path.name[:10]), header.first_lsn, header.chain, length, one.size)
        trail = Trail(files, directory, (whole,), whole.start)
        end, last = whole.start, b""
        with suppress(Corrupt):
            while end.offset < length:
                payloads, end = trail.read_in(whole, end, length, CHUNK_BYTES)
                last = payloads[-1]
        walk.segments.append(replace(whole, length=end.offset))
        walk.end, walk.synced = end, max(walk.synced, header.synced)
        if last:
            mark = _mark(last)
            if mark is None or mark.lsn != end.lsn:
                raise Corrupt(one.path, end.offset, f"record {end.lsn} goes by another number")
            walk.synced = max(walk.synced, mark.synced)
        rest = b"" if end.offset == goes_on_at else remainder(files, one.path, end.offset)
        if rest or goes_on_at not in (None, end.offset):
            walk.bad = Corrupt(one.path, end.offset, f"this is not record {end.lsn + 1}")
            walk.unfinished = following is None and _unfinished(rest, end.chain)
            break
    return walk


def _misfit(header: Header | None, walk: _Walk) -> str:
    """Why a segment cannot stand where it does; empty if it can."""
    if header is None:
        return "its header cannot be read"
    if walk.segments and header.previous != walk.segments[-1].name:
        return f"{header.previous}, which it continues, is missing"
    gap = header.first_lsn - walk.end.lsn - 1  # a lawful one: the database was ahead
    if walk.segments and (gap < 0 or (gap == 0 and header.chain != walk.end.chain)):
        return "its records do not follow those before it"
    return ""


def _marks(files: Files, path: Path, offset: int) -> list[_Mark]:
    """What can be made out past the damage, where there is no chain any more to check it by."""
    lines = remainder(files, path, offset).split(b"\n")
    found = [_mark(line.lstrip(b"\0")[9:]) for line in lines]
    return [mark for mark in found if mark is not None and mark.synced < mark.lsn]


def _mark(payload: bytes) -> _Mark | None:
    try:
        return msgspec.json.decode(payload, type=_Mark)
    except msgspec.MsgspecError:
        return None


def inherit(files: Files, directory: Path, scan: Scan) -> list[Segment]:
    """Bring what is good to the disk, what is past a cut aside, and what is nothing away."""
    if scan.cut is not None and scan.cut.offset:
        rest = remainder(files, scan.cut.file, scan.cut.offset)
        _keep(files, scan.cut.file.with_name(scan.cut.file.name + _ASIDE), rest)
    for name in scan.aside:
        files.rename(directory / name, directory / (name + _ASIDE))
    files.fsync_directory(directory)
    # The newest first: then an older one may lose the part that a newer one has written anew.
    for segment in reversed(scan.trail.segments):
        fd = files.open(directory / segment.name)
        try:
            files.fsync(fd)
            files.ftruncate(fd, segment.length)
        finally:
            files.close(fd)
    for name in scan.leftovers:
        files.unlink(directory / name)
    return [replace(segment, size=segment.length) for segment in scan.trail.segments]


def _keep(files: Files, path: Path, data: bytes) -> None:
    with suppress(FileNotFoundError):
        files.unlink(path)  # of a start that did not come to its end
    fd = files.create(path)
    try:
        if files.pwrite(fd, data, 0) != len(data):
            raise OSError(errno.ENOSPC, "no room to set the damaged part aside")
        files.fsync(fd)
    finally:
        files.close(fd)
