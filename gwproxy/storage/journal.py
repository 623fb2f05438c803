"""The journal: every change of the ledger, one line each, in files that were reserved beforehand.

Rules of the room. The disk is reached through `Files` alone; no clock, no thread, no await. What
belongs on the event loop (`write`, `begin_...`, `end_...`) waits for no disk; what does wait is the
`run` of the tickets that they hand out, which works in any thread and touches nothing shared.

Three things go wrong, and each has its answer. A write that failed is cut off again: NotWritten.
Where even that fails, or a sync does, the file is not trusted any more: all that is not known to be
on the disk is written anew, under the same numbers, into the spare segment. Without a spare the
journal is lost until there is one.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, Self
from zlib import crc32

import msgspec

from gwproxy.storage.files import Files
from gwproxy.storage.scan import CHECK_ACCESS, Scan, inherit
from gwproxy.storage.segments import (
    HEADER_BYTES,
    VERSION,
    Cursor,
    Header,
    JournalRefused,
    Segment,
    Trail,
    segment_name,
)

SEGMENT_BYTES: Final = 64 << 20
MAX_BYTES: Final = 1 << 30
LEAST_ROOM_BYTES: Final = 8 << 10
"""What the ledger reckons with for one settlement: with less than that there is no room."""

_AROUND: Final = 10
"""Bytes of a line around its payload: the crc, a space, the line feed."""


class NotWritten(Exception):
    """Nothing of the record is in the journal, and its number is free."""


class OutcomeUnknown(Exception):
    """The record may be in the journal, or will be with the next spare: its number is taken."""


@dataclass(slots=True)
class Sync:
    """Bring what was written up to `end` to the disk."""

    files: Files
    fds: tuple[int, ...]
    end: Cursor

    def run(self) -> None:
        for fd in self.fds:
            self.files.fdatasync(fd)


@dataclass(slots=True)
class Spare:
    """Reserve a segment. When `run` has raised OSError, nothing of it is left."""

    files: Files
    directory: Path
    number: int
    size: int
    fd: int = -1

    def run(self) -> None:
        path = self.directory / segment_name(self.number)
        self.fd = self.files.create(path)
        try:
            self.files.posix_fallocate(self.fd, 0, self.size)
            self.files.fsync(self.fd)
            self.files.fsync_directory(self.directory)
        except OSError:
            self.files.close(self.fd)
            with suppress(OSError):
                self.files.unlink(path)
            raise


@dataclass(slots=True)
class Drop:
    """Remove segments, the oldest first and one by one: a power cut leaves no hole."""

    files: Files
    directory: Path
    segments: tuple[Segment, ...]
    done: int = 0

    def run(self) -> None:
        for segment in self.segments:
            with suppress(FileNotFoundError):
                self.files.unlink(self.directory / segment.name)
            self.files.fsync_directory(self.directory)
            self.done += 1


class Journal:
    """A journal that is being written. Made by `start`, given back by `close`."""

    def __init__(
        self,
        files: Files,
        directory: Path,
        segments: Sequence[Segment],
        end: Cursor,
        *,
        number: int,
        ledger_id: str,
        epoch: int,
        boot_id: str,
        segment_bytes: int,
        max_bytes: int,
    ) -> None:
        """One that stands at `end`, all of it on the disk, with no segment to write to as yet."""
        self.directory = directory
        self.ledger_id = ledger_id
        self.epoch = epoch
        self.next_lsn = end.lsn + 1
        self.chain = end.chain
        """The crc of the last record."""
        self.synced = end.lsn
        """The last LSN that is known to be on the disk."""
        self.stalled: str | None = None
        """Why the journal counts as lost though nothing failed: set by the owner, who has a clock,
        when a sync takes too long; taken back by the next one that succeeds."""
        self._gone: str | None = None
        self.files = files
        self._boot_id = boot_id
        self._segment_bytes = segment_bytes
        self._max_bytes = max_bytes
        self._number = number
        self._segments = tuple(segments)
        self._replaced: list[Segment] = []
        """Files that are no part of the journal any more: to be removed with the next drop."""
        self._fd = -1
        self._offset = self._limit = 0
        self._older: list[int] = []
        """Descriptors of segments before the active one that are not wholly synced yet."""
        self._unused: list[int] = []
        """Descriptors to be closed once no sync is under way, which might be using them."""
        self._unsynced: list[bytes] = []
        self._synced_at = end
        self._sync: Sync | None = None
        self._syncs_running = 0
        self._spare: Spare | None = None
        self._preparing = False
        self._no_spare = "there is no spare segment yet"
        self._distrusted: str | None = None
        """Why what is not synced must be written anew before anything else is."""

    @classmethod
    def start(
        cls,
        files: Files,
        directory: Path,
        scan: Scan,
        *,
        ledger_id: str,
        epoch: int,
        boot_id: str,
        applied_lsn: int,
        applied_chain: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        max_bytes: int = MAX_BYTES,
    ) -> Self:
        """Make what was inherited safe, and go on after it in a new segment. It takes its time.

        A number that the database has seen is not used again. Where the database is ahead, the
        chain goes on from its `applied_chain`.
        """
        if scan.ledger_id not in ("", ledger_id):
            raise JournalRefused(
                f"{directory}: belongs to ledger {scan.ledger_id}, the database to {ledger_id}. "
                "Set [storage] path and journal to two that belong together."
            )
        try:
            end = scan.trail.end
            synced_at, unsynced = scan.unsynced()
            if applied_lsn > end.lsn:
                chain = end.chain if applied_chain is None else applied_chain
                synced_at, unsynced = replace(end, lsn=applied_lsn, chain=chain), []
            journal = cls(
                files,
                directory,
                inherit(files, directory, scan),
                synced_at,
                number=scan.next_number,
                ledger_id=ledger_id,
                epoch=epoch,
                boot_id=boot_id,
                segment_bytes=segment_bytes,
                max_bytes=max_bytes,
            )
            if unsynced:
                # A sync of where they stand could be the second one, after a failure of which only
                # the process before knew: the kernel would report it as a success.
                journal._open(HEADER_BYTES + _length(unsynced), unsynced)
            journal._open(segment_bytes, ())  # even if max_bytes would not allow one more
            journal._prepare_spare()
        except OSError as error:
            raise JournalRefused(f"{directory}: {error.strerror}. {CHECK_ACCESS}") from error
        return journal

    def _open(self, size: int, payloads: Sequence[bytes]) -> None:
        """Go on in a new segment with `payloads`, and bring it to the disk."""
        before = self._fd
        self._spare = self._next(size)
        self._spare.run()
        if not self._go_on_in_spare(self._synced_at, payloads):
            raise JournalRefused(f"{self.directory}: cannot be written to. {CHECK_ACCESS}")
        self.files.fsync(self._fd)
        self.next_lsn += len(payloads)
        for payload in payloads:
            self.chain = crc32(payload, self.chain)
        self._synced_at, self.synced = self.end, self.end.lsn
        if before >= 0:
            self.files.close(before)

    def _prepare_spare(self) -> None:
        spare = self.begin_spare()
        if spare is None:
            return
        try:
            spare.run()
        except OSError as error:
            self.end_spare(spare, error)
        else:
            self.end_spare(spare, None)

    def close(self) -> None:
        """Close the files. It syncs nothing; no ticket may be out."""
        assert not self._syncs_running and not self._preparing, "a ticket is still out"
        fds = [*self._unused, *self._older, self._fd]
        if self._spare is not None:
            fds.append(self._spare.fd)
        for fd in fds:
            self.files.close(fd)

    # -- records --

    def write(self, payload: bytes) -> None:
        """Append the record `next_lsn`: JSON that has this number in it. No line feed, of course.

        Raises NotWritten or OutcomeUnknown.
        """
        assert b"\n" not in payload
        chain = crc32(payload, self.chain)
        line = b"%08x %b\n" % (chain, payload)
        if self._offset + len(line) > self._limit:
            self._rotate(len(line))
        try:
            written = self.files.pwrite(self._fd, line, self._offset)
        except OSError as error:
            self._take_back(payload, chain, f"{error.strerror}")
            return
        if written != len(line):
            self._take_back(payload, chain, f"{written} of {len(line)} bytes")
            return
        self._offset += written
        self.chain = chain
        self.next_lsn += 1
        self._unsynced.append(payload)

    def room(self) -> int:
        """Bytes left in the reserved segments."""
        spare = 0 if self._spare is None else self._spare.size - HEADER_BYTES
        return self._limit - self._offset + spare

    @property
    def lost(self) -> str | None:
        """Why nothing new should be let in, in words; None while all is well."""
        if self._gone is not None:
            return self._gone
        if self._distrusted is not None:
            return f"{self._distrusted}, and {self._no_spare}"
        if self.stalled is not None:
            return self.stalled
        if self._spare is None:
            if self.size_bytes() + self._segment_bytes > self._max_bytes:
                return f"the journal has come up to its {self._max_bytes} bytes"
            if self._limit - self._offset < LEAST_ROOM_BYTES:
                return f"the segment is full, and {self._no_spare}"
        return None

    def look(self) -> None:
        """See whether the file that is written to still stands in its folder, as long as it was
        reserved: writes to a deleted one succeed, and so do those behind the end of one that was
        cut, and nobody will ever read them. Once it is back, so is the journal."""
        path = self.directory / self._segments[-1].name
        try:
            there = self.files.stands(self._fd, path)
            size = self.files.size(self._fd)
        except OSError as error:
            self._gone = f"{path} cannot be looked at ({error.strerror})"
            return
        self._gone = None
        if not there:
            self._gone = f"{path} is gone, or another file stands there"
        elif size < self._limit:
            self._gone = f"somebody has cut {path} to {size} of its {self._limit} bytes"

    def look_around(self) -> set[str]:
        """See whether the files that are not written to just now still stand in the folder: the
        names of the segments that do not, without which a lost database could not be made anew. A
        spare that does not is given up, so that another one is prepared."""
        spare = self._spare
        if spare is not None and not self.files.stands(
            spare.fd, self.directory / segment_name(spare.number)
        ):
            self._spare, self._no_spare = None, "the spare segment is gone"
            self._unused.append(spare.fd)
        older = (segment.name for segment in self._segments[:-1])
        return {name for name in older if not self.files.there(self.directory / name)}

    @property
    def end(self) -> Cursor:
        """Where the last whole record ends that can be read."""
        if self._distrusted is not None:
            return self._synced_at
        return Cursor(self._segments[-1].number, self._offset, self.chain, self.next_lsn - 1)

    @property
    def first_lsn(self) -> int:
        """The first record that is still there, or would be."""
        return self._segments[0].first_lsn

    def trail(self) -> Trail:
        """What can be read now, as a value for another thread."""
        end = self.end
        segments = [s for s in self._segments if s.number <= end.segment]
        if segments and segments[-1].number == end.segment:
            segments[-1] = replace(segments[-1], length=end.offset)
        return Trail(self.files, self.directory, tuple(segments), end)

    def find(self, lsn: int) -> Cursor:
        """See Trail.find."""
        return self.trail().find(lsn)

    def read(
        self, cursor: Cursor, most_records: int, most_bytes: int
    ) -> tuple[list[bytes], Cursor]:
        """See Trail.read."""
        return self.trail().read(cursor, most_records, most_bytes)

    # -- syncing --

    def begin_sync(self) -> Sync | None:
        """Bring all that is written to the disk. None when it is there already, or a sync is under
        way: two at once on one descriptor would share out its errors between them."""
        if self._sync is not None or self._distrusted is not None or not self._unsynced:
            return None
        self._sync = Sync(self.files, (*self._older, self._fd), self.end)
        self._syncs_running += 1
        return self._sync

    def end_sync(self, sync: Sync, error: OSError | None) -> None:
        self._syncs_running -= 1
        # What was given up meanwhile has been written anew, and is not synced by this.
        if sync is self._sync:
            self._sync = None
            if error is None:
                del self._unsynced[: sync.end.lsn - self.synced]
                self._synced_at, self.synced = sync.end, sync.end.lsn
                self._unused += sync.fds[:-1]
                del self._older[: len(sync.fds) - 1]
                self.stalled = None
            else:
                # The kernel has dropped its pages and would report the next sync as a success.
                self._distrust(f"{self._segments[-1].name} could not be synced ({error.strerror})")
        if not self._syncs_running:
            for fd in self._unused:
                self.files.close(fd)
            self._unused.clear()

    # -- segments --

    def begin_spare(self) -> Spare | None:
        """Prepare a spare segment. None when there is one, or no more are allowed."""
        if self._spare is not None or self._preparing:
            return None
        size, most = self._segment_bytes, self._max_bytes
        if self._distrusted is not None:
            size += _length(self._unsynced)
            # One more than that: the database waits for what is not synced, and no segment is let
            # go of before the database has it.
            most += size
        if self.size_bytes() + size > most:
            self._no_spare = f"the journal has come up to its {self._max_bytes} bytes"
            return None
        self._preparing = True
        return self._next(size)

    def end_spare(self, spare: Spare, error: OSError | None) -> None:
        self._preparing = False
        if error is not None:
            self._no_spare = f"no spare could be reserved ({error.strerror})"
            return
        self._spare = spare
        if self._distrusted is not None:
            self._distrust(self._distrusted)

    def begin_drop(self, lsn: int) -> Drop | None:
        """Remove the segments that hold nothing after `lsn`, never the active one, and files that
        were replaced. None when there is nothing to remove."""
        # The segment up to which all is on the disk stays: what continues it may yet be lost.
        done = sum(
            one.number < self._synced_at.segment and following.first_lsn <= lsn + 1
            for one, following in pairwise(self._segments)
        )
        dropped = sorted((*self._replaced, *self._segments[:done]), key=lambda one: one.number)
        if not dropped:
            return None
        self._replaced, self._segments = [], self._segments[done:]
        return Drop(self.files, self.directory, tuple(dropped))

    def end_drop(self, drop: Drop, error: OSError | None) -> None:
        """What could not be removed counts as replaced: nobody reads it, and it is tried again."""
        assert error is not None or drop.done == len(drop.segments)
        self._replaced += drop.segments[drop.done :]

    def _next(self, size: int) -> Spare:
        spare = Spare(self.files, self.directory, self._number, size)
        self._number += 1
        return spare

    def size_bytes(self) -> int:
        spare = 0 if self._spare is None else self._spare.size
        return spare + sum(segment.size for segment in (*self._segments, *self._replaced))

    def _rotate(self, length: int) -> None:
        """Go on in the spare, for a line of `length` bytes; or NotWritten."""
        if self._distrusted is not None or self._spare is None:
            raise NotWritten(self.lost or f"no room for {length} bytes, and {self._no_spare}")
        if HEADER_BYTES + length > self._spare.size:
            raise NotWritten(f"{length} bytes are more than a segment holds")
        full = self._fd
        if not self._go_on_in_spare(self.end, ()):
            # The header may stand there all the same: after what it says, nothing may follow here.
            self._limit = self._offset
            raise NotWritten("the spare segment cannot be written to")
        self._older.append(full)

    def _take_back(self, payload: bytes, chain: int, why: str) -> None:
        """Cut off what a failed write has left: NotWritten. Returns when it is written after all,
        in the spare; else OutcomeUnknown."""
        active = self._segments[-1]
        why = f"{active.name} could not be written to ({why})"
        try:
            self.files.ftruncate(self._fd, self._offset)
        except OSError as error:
            self.chain = chain
            self.next_lsn += 1
            self._unsynced.append(payload)
            self._distrust(f"{why} nor cut back ({error.strerror})")
            if self._distrusted is not None:
                raise OutcomeUnknown(self._distrusted) from error
            return
        # What was reserved behind the cut is given away with it.
        self._limit = self._offset
        self._segments = (*self._segments[:-1], replace(active, size=self._offset))
        raise NotWritten(why)

    def _distrust(self, why: str) -> None:
        """Give up what is not synced where it stands, and write it anew as soon as that can be."""
        self._distrusted = why
        self._limit = self._offset
        given_up = [*self._older, self._fd]
        if self._spare is not None and self._go_on_in_spare(self._synced_at, self._unsynced):
            self._distrusted = None
            self._sync = None
            self._older = []
            self._unused += given_up

    def _go_on_in_spare(self, after: Cursor, payloads: Sequence[bytes]) -> bool:
        """Let the journal go over into the spare after the place `after`, with `payloads` in it
        from the start. False: it does not, and the spare is used up."""
        spare = self._spare
        assert spare is not None
        self._spare, self._no_spare = None, "there is no spare segment yet"
        kept = [one for one in self._segments if one.number <= after.segment]
        chain, lines = after.chain, []
        for payload in payloads:
            chain = crc32(payload, chain)
            lines.append(b"%08x %b\n" % (chain, payload))
        body = b"".join(lines)
        length = HEADER_BYTES + len(body)
        segment = Segment(spare.number, after.lsn + 1, after.chain, HEADER_BYTES, spare.size)
        try:
            # The header is what makes it a part of the journal, so it comes after all the rest.
            whole = (
                length <= spare.size
                and (not body or self.files.pwrite(spare.fd, body, HEADER_BYTES) == len(body))
                and self.files.pwrite(spare.fd, self._header(after), 0) == HEADER_BYTES
            )
        except OSError:
            whole = False
        if not whole:
            self._unused.append(spare.fd)
            self._replaced.append(segment)
            return False
        if kept and kept[-1].number == after.segment:
            kept[-1] = replace(kept[-1], length=after.offset)
        self._replaced += self._segments[len(kept) :]
        self._segments = (*kept, segment)
        self._fd, self._offset, self._limit = spare.fd, length, spare.size
        return True

    def _header(self, after: Cursor) -> bytes:
        header = Header(
            version=VERSION,
            ledger_id=self.ledger_id,
            epoch=self.epoch,
            boot_id=self._boot_id,
            first_lsn=after.lsn + 1,
            chain=after.chain,
            synced=self.synced,
            previous=segment_name(after.segment) if after.segment else "",
            previous_length=after.offset,
        )
        payload = msgspec.json.encode(header).ljust(HEADER_BYTES - _AROUND)
        return b"%08x %b\n" % (crc32(payload), payload)


def _length(payloads: Sequence[bytes]) -> int:
    return sum(map(len, payloads)) + _AROUND * len(payloads)
