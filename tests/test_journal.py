"""The journal: its format, what is refused, what a crash leaves, and what is read back of it."""

import errno
import itertools
import json
import os
import queue
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy.storage import scan as scanning
from gwproxy.storage.files import OS_FILES, Files
from gwproxy.storage.journal import HEADER_BYTES, Journal, NotWritten, OutcomeUnknown
from gwproxy.storage.scan import Scan, boot_id, claim, scan
from gwproxy.storage.segments import Corrupt, Cursor, Gap, JournalInUse, JournalRefused

SEGMENT = 4096
"""Small enough to be filled, and to be damaged at each of its bytes."""

EIO = OSError(errno.EIO, "Input/output error")
ENOSPC = OSError(errno.ENOSPC, "No space left on device")


# -- a disk that can be pulled out ---------------------------------------------------------------


class Inode:
    def __init__(self) -> None:
        self.cache = bytearray()
        self.disk = bytearray()
        self.dirty: set[int] = set()


class Disk:
    """A disk behind a page cache: what was not synced is lost with the power, page by page."""

    PAGE = 256

    def __init__(self) -> None:
        self.names: dict[Path, Inode] = {}
        self.lasting: dict[Path, Inode] = {}
        self.fds: dict[int, Inode] = {}
        self.last_fd = 2

    def create(self, path):
        if path in self.names:
            raise FileExistsError(errno.EEXIST, "File exists")
        self.names[path] = Inode()
        return self.open(path)

    def open(self, path):
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "No such file")
        self.last_fd += 1
        self.fds[self.last_fd] = self.names[path]
        return self.last_fd

    def close(self, fd):
        del self.fds[fd]

    def pread(self, fd, length, offset):
        return bytes(self.fds[fd].cache[offset : offset + length])

    def pwrite(self, fd, data, offset):
        inode = self.fds[fd]
        end = offset + len(data)
        inode.cache.extend(bytes(max(0, end - len(inode.cache))))
        inode.cache[offset:end] = data
        inode.dirty.update(range(offset // self.PAGE, (end - 1) // self.PAGE + 1))
        return len(data)

    def ftruncate(self, fd, length):
        inode = self.fds[fd]
        del inode.cache[length:]
        inode.cache.extend(bytes(length - len(inode.cache)))
        # A page that is cut loses its end on the disk too, once it is written.
        inode.dirty.add(length // self.PAGE)

    def posix_fallocate(self, fd, offset, length):
        inode = self.fds[fd]
        inode.cache.extend(bytes(max(0, offset + length - len(inode.cache))))

    def size(self, fd):
        return len(self.fds[fd].cache)

    def fsync(self, fd):
        inode = self.fds[fd]
        pages = {n: self._page(inode.cache, n) for n in inode.dirty}
        self._resize(inode)
        for n, page in pages.items():
            inode.disk[n * self.PAGE : n * self.PAGE + len(page)] = page
        inode.dirty.clear()

    fdatasync = fsync

    def fsync_directory(self, directory):
        self.lasting = dict(self.names)

    def listdir(self, directory):
        return [path.name for path in self.names if path.parent == directory]

    def stands(self, fd, path):
        return self.names.get(path) is self.fds[fd]

    def there(self, path):
        return path in self.names

    def rename(self, old, new):
        self.names[new] = self.names.pop(old)

    def unlink(self, path):
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "No such file")
        del self.names[path]

    def read(self, path):
        return bytes(self.names[path].cache)

    # what only a test does

    def forget(self, fd):
        """After a failed sync Linux takes the pages for clean."""
        self.fds[fd].dirty.clear()

    def kill(self):
        """The process ends; the kernel goes on."""
        self.fds.clear()

    def cut_power(self, chance: random.Random) -> None:
        self.fds.clear()
        names = {}
        for path in {*self.names, *self.lasting}:
            inode = chance.choice((self.names, self.lasting)).get(path)
            if inode is not None:
                names[path] = inode
        self.names, self.lasting = names, dict(names)
        for inode in names.values():
            pages = {n: self._page(inode.cache, n) for n in inode.dirty if chance.random() < 0.5}
            if chance.random() < 0.5:
                self._resize(inode)
            for n, page in pages.items():
                if n * self.PAGE < len(inode.disk):
                    inode.disk[n * self.PAGE : n * self.PAGE + len(page)] = page
            inode.cache = bytearray(inode.disk)
            inode.dirty.clear()

    def _page(self, data, n):
        return bytes(data[n * self.PAGE : (n + 1) * self.PAGE])

    def _resize(self, inode):
        del inode.disk[len(inode.cache) :]
        inode.disk.extend(bytes(len(inode.cache) - len(inode.disk)))


class Worst(random.Random):
    """Nothing that was not synced comes to the disk."""

    def random(self) -> float:
        return 1.0

    def choice(self, options):
        return options[-1]


class Killed(BaseException):
    """The process ends here, in the middle of a call."""


Fault = Callable[..., object]


def refuse(error: BaseException) -> Fault:
    """Nothing is done."""

    def fault(call, *args):
        raise type(error)(*error.args)

    return fault


def after(error: BaseException) -> Fault:
    """All is done, and nobody is told so."""

    def fault(call, *args):
        call(*args)
        raise type(error)(*error.args)

    return fault


def half(error: BaseException | None = None) -> Fault:
    """A write that ends in the middle."""

    def fault(call, fd, data, offset):
        written = call(fd, data[: len(data) // 2], offset)
        if error is not None:
            raise type(error)(*error.args)
        return written

    return fault


class Faulty:
    """Files that fail when they are told to, and remember what was asked of them."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.calls: list[tuple[str, object]] = []
        self.faults: dict[str, Fault] = {}
        """By the name of the call: each time, until it is taken out."""
        self.at: dict[int, Callable[[str], Fault | None]] = {}
        """By the number of the call."""

    def __getattr__(self, name: str):
        call = getattr(self.files, name)

        def made(*args):
            self.calls.append((name, args[0]))
            chosen = self.at.get(len(self.calls), lambda name: None)(name)
            fault = chosen or self.faults.get(name)
            if fault is None:
                return call(*args)
            if name == "fdatasync" and isinstance(self.files, Disk):
                self.files.forget(args[0])
            return fault(call, *args)

        return made

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


# -- one process after the other -----------------------------------------------------------------


def record(lsn: int, synced: int, words: str = "") -> bytes:
    return json.dumps({"lsn": lsn, "t": 1, "k": "stop", "synced": synced, "w": words}).encode()


class Owner:
    """What the running program does with its journal, one step at a time."""

    def __init__(self, files: Files, directory: Path, *, boot: str = "boot-1", **sizes) -> None:
        self.files = files
        self.directory = directory
        self.boot = boot
        self.sizes = {"segment_bytes": SEGMENT, "max_bytes": 1 << 20, **sizes}
        self.applied = Cursor(0, 0, 0, 0)
        self.epoch = 0
        self.start()

    def start(self) -> None:
        self.epoch += 1
        self.scan = scan(self.files, self.directory, self.boot, self.applied.lsn)
        self.journal = Journal.start(
            self.files,
            self.directory,
            self.scan,
            ledger_id="ledger-1",
            epoch=self.epoch,
            boot_id=self.boot,
            applied_lsn=self.applied.lsn,
            applied_chain=self.applied.chain,
            **self.sizes,
        )

    def write(self, words: str = "") -> bytes:
        payload = record(self.journal.next_lsn, self.journal.synced, words)
        self.journal.write(payload)
        return payload

    def sync(self) -> None:
        ticket = self.journal.begin_sync()
        if ticket is not None:
            self.journal.end_sync(ticket, ran(ticket))

    def spare(self) -> None:
        ticket = self.journal.begin_spare()
        if ticket is not None:
            self.journal.end_spare(ticket, ran(ticket))

    def drop(self, lsn: int) -> None:
        ticket = self.journal.begin_drop(lsn)
        if ticket is not None:
            self.journal.end_drop(ticket, ran(ticket))

    def segments(self) -> list[str]:
        return sorted(n for n in self.files.listdir(self.directory) if n.endswith(".journal"))


def ran(ticket) -> OSError | None:
    try:
        ticket.run()
    except OSError as error:
        return error
    return None


def everything(source: Journal | Scan, after: int = 0) -> list[bytes]:
    """All records after that one, read a few at a time."""
    trail = source.trail() if isinstance(source, Journal) else source.trail
    payloads, cursor = [], trail.find(after)
    while cursor.lsn < trail.end.lsn:
        some, cursor = trail.read(cursor, 7, 500)
        assert 1 <= len(some) <= 7
        payloads += some
    assert cursor.chain == trail.end.chain
    return payloads


FOLDER = Path("/journal")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def files(disk: Disk) -> Faulty:
    return Faulty(disk)


@pytest.fixture
def owner(files: Faulty) -> Owner:
    return Owner(files, FOLDER)


def refill(owner: Owner, count: int = 20, length: int = 300) -> list[bytes]:
    """Write that many records, over several segments."""
    written = []
    for _ in range(count):
        written.append(owner.write("x" * length))
        owner.spare()
    return written


# -- what is written -----------------------------------------------------------------------------


def test_a_line_is_a_crc_a_space_the_payload_and_a_line_feed_and_the_crcs_are_chained(tmp_path):
    owner = Owner(OS_FILES, tmp_path)
    first, second = owner.write("a"), owner.write("b")
    crc = crc32(first)
    lines = b"%08x %b\n%08x %b\n" % (crc, first, crc32(second, crc), second)
    data = (tmp_path / "0000000001.journal").read_bytes()
    assert data[HEADER_BYTES:] == lines + bytes(SEGMENT - HEADER_BYTES - len(lines))
    assert (owner.journal.next_lsn, owner.journal.chain) == (3, crc32(second, crc))
    assert owner.journal.end == Cursor(1, HEADER_BYTES + len(lines), owner.journal.chain, 2)
    assert owner.journal.room() == 2 * SEGMENT - 2 * HEADER_BYTES - len(lines)
    owner.journal.close()


def test_a_segment_begins_with_a_line_that_says_whose_it_is_and_what_it_continues(tmp_path):
    owner = Owner(OS_FILES, tmp_path)
    owner.write("a")
    owner.sync()
    end = owner.journal.end
    owner.write("b" * 2400)
    owner.write("c" * 1200)
    data = (tmp_path / "0000000002.journal").read_bytes()[:HEADER_BYTES]
    assert data.endswith(b"\n")
    assert data[:9] == b"%08x " % crc32(data[9:-1])
    header = json.loads(data[9:])
    length = len((tmp_path / "0000000001.journal").read_bytes().rstrip(b"\0"))
    assert header.pop("chain") != end.chain
    assert header == {
        **{"k": "segment", "version": 1, "ledger_id": "ledger-1", "epoch": 1, "boot_id": "boot-1"},
        **{"first_lsn": 3, "synced": 1},
        **{"previous": "0000000001.journal", "previous_length": length},
    }
    owner.journal.close()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nobody_else_may_read_any_of_it(tmp_path, mask):
    before = os.umask(mask)
    try:
        lock = claim(tmp_path / "journal")
        owner = Owner(OS_FILES, tmp_path / "journal")
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
        assert modes.pop("journal") == 0o700
        assert modes == dict.fromkeys(["lock", "0000000001.journal", "0000000002.journal"], 0o600)
        owner.journal.close()
        os.close(lock)
    finally:
        os.umask(before)


def test_a_file_is_never_used_twice_and_not_handed_on_to_other_programs(tmp_path):
    fd = OS_FILES.create(tmp_path / "a")
    again = OS_FILES.open(tmp_path / "a")
    assert not os.get_inheritable(fd)
    assert not os.get_inheritable(again)
    with pytest.raises(FileExistsError):
        OS_FILES.create(tmp_path / "a")
    os.close(fd)
    os.close(again)


def test_segments_are_on_the_disk_before_they_are_used(files, owner):
    # Header and names too: the calls of the start, from the first new file on.
    assert files.names()[files.names().index("create") :] == [
        *("create", "posix_fallocate", "fsync", "fsync_directory", "pwrite", "fsync"),
        *("create", "posix_fallocate", "fsync", "fsync_directory"),
    ]


def test_a_write_is_one_call_and_a_rotation_adds_one(files, owner):
    files.calls.clear()
    owner.write("a" * 1500)
    owner.write("b" * 1500)
    assert files.names() == ["pwrite", "pwrite"]
    owner.write("c" * 1500)
    assert files.names() == ["pwrite"] * 4
    assert len({fd for _, fd in files.calls}) == 2


def test_descriptors_are_closed_with_the_sync_that_covers_them(files, disk, owner):
    for _ in range(20):
        refill(owner)
        owner.sync()
    assert len(disk.fds) == 2
    owner.spare()
    owner.journal.close()
    assert not disk.fds


def test_a_segment_that_somebody_cuts_in_place_loses_the_journal(files, owner):
    """Also where more was written behind the cut since, and it is as long as before."""
    owner.start()
    journal = owner.journal
    owner.write("one")
    journal.look()
    assert journal.lost is None
    path = journal.directory / journal._segments[-1].name
    files.ftruncate(journal._fd, 700)
    for _ in range(2):
        journal.look()
        assert journal.lost is not None
        assert journal.lost.startswith(f"somebody has cut {path} to ")
        owner.write("x" * 300)
    files.ftruncate(journal._fd, journal._limit)
    journal.look()
    assert journal.lost is None


def test_without_a_spare_the_room_is_used_up_and_not_a_byte_more(files, owner):
    owner.spare()
    files.faults["posix_fallocate"] = refuse(ENOSPC)
    owner.write("a" * 2500)
    owner.write("b" * 2500)
    owner.spare()
    assert owner.journal.lost == (
        "the segment is full, and no spare could be reserved (No space left on device)"
    )
    room = owner.journal.room()
    with pytest.raises(NotWritten, match="no spare could be reserved"):
        owner.write("c" * 2500)
    assert (owner.journal.room(), owner.journal.next_lsn) == (room, 3)
    owner.write("short ones still fit")
    files.faults.clear()
    owner.spare()
    assert owner.journal.lost is None
    owner.write("c" * 2500)
    assert len(everything(owner.journal)) == 4


def test_room_for_one_more_settlement_is_room_enough(files):
    owner = Owner(files, FOLDER, segment_bytes=1 << 16)
    files.faults["create"] = refuse(ENOSPC)
    while owner.journal.room() > 1 << 16:
        owner.write("x" * 1000)
    owner.spare()
    while owner.journal.room() > 10_000:
        assert owner.journal.lost is None
        owner.write("x" * 1000)
    while owner.journal.room() > 8_000:
        owner.write("x" * 1000)
    assert "the segment is full" in owner.journal.lost


def test_a_record_that_is_longer_than_a_segment_is_refused_and_nothing_happens(files, owner):
    with pytest.raises(NotWritten, match="more than a segment holds"):
        owner.write("x" * SEGMENT)
    owner.write("y" * 3000)
    owner.write("z" * 3000)
    assert len(everything(owner.journal)) == 2


def test_at_most_max_bytes_are_kept_and_then_the_journal_is_lost_until_some_are_dropped(files):
    owner = Owner(files, FOLDER, max_bytes=4 * SEGMENT)
    while owner.journal.lost is None:
        owner.write("x" * 300)
        owner.spare()
    assert owner.journal.lost == f"the journal has come up to its {4 * SEGMENT} bytes"
    assert len(owner.segments()) == 4
    assert owner.journal.begin_spare() is None
    # What is left of the room belongs to what has been admitted.
    owner.write("a settlement")
    owner.sync()
    owner.drop(owner.journal.synced)
    assert len(owner.segments()) == 1
    owner.spare()
    assert owner.journal.lost is None


def test_the_owner_may_call_it_stalled_until_a_sync_succeeds(owner):
    owner.write()
    owner.journal.stalled = "the disk has not answered for 5 s"
    assert owner.journal.lost == "the disk has not answered for 5 s"
    owner.sync()
    assert owner.journal.lost is None


# -- writes that fail ----------------------------------------------------------------------------

WRITE_FAULTS = {
    "refused": refuse(EIO),
    "no space": refuse(ENOSPC),
    "short": half(),
    "short, then an error": half(EIO),
    "done, yet an error": after(EIO),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS.values(), ids=WRITE_FAULTS)
def test_a_failed_write_leaves_no_trace_and_the_next_one_goes_into_the_spare(files, owner, fault):
    first = owner.write("a")
    end, room = owner.journal.end, owner.journal.room()
    files.faults["pwrite"] = fault
    with pytest.raises(NotWritten, match=r"0000000001\.journal could not be written to"):
        owner.write("b")
    assert (owner.journal.end, owner.journal.next_lsn) == (end, 2)
    assert owner.journal.room() < room
    assert len(files.files.names[FOLDER / "0000000001.journal"].cache) == end.offset
    del files.faults["pwrite"]
    second = owner.write("c")
    assert everything(owner.journal) == [first, second]
    assert owner.journal.end.segment == 2
    files.files.kill()
    owner.start()
    assert everything(owner.journal) == [first, second]


@pytest.mark.parametrize("fault", WRITE_FAULTS.values(), ids=WRITE_FAULTS)
def test_what_can_be_neither_written_nor_cut_off_is_written_into_the_spare(files, owner, fault):
    written = [owner.write("a")]
    owner.sync()
    written.append(owner.write("b"))
    files.faults["ftruncate"] = refuse(EIO)
    files.at[len(files.calls) + 1] = lambda _: fault
    written.append(owner.write("c"))
    assert owner.journal.end.segment == 2
    owner.spare()
    assert owner.journal.lost is None
    written.append(owner.write("d"))
    assert everything(owner.journal) == written
    files.faults.clear()
    files.files.kill()
    owner.start()
    assert everything(owner.journal) == written


@pytest.mark.parametrize("fault", WRITE_FAULTS.values(), ids=WRITE_FAULTS)
def test_where_all_fails_the_outcome_is_unknown_and_the_next_spare_makes_it_known(
    files, owner, fault
):
    written = [owner.write("a")]
    files.faults = {"pwrite": fault, "ftruncate": refuse(EIO)}
    with pytest.raises(OutcomeUnknown, match="nor cut back"):
        owner.write("b")
    written.append(record(2, 0, "b"))
    assert owner.journal.next_lsn == 3
    assert owner.journal.room() == 0
    assert "nor cut back" in owner.journal.lost
    assert owner.journal.begin_sync() is None
    for _ in range(3):  # and the next spare is no better
        with pytest.raises(NotWritten, match="nor cut back"):
            owner.write("c")
        owner.spare()
    files.faults.clear()
    owner.spare()
    written.append(owner.write("c"))
    assert everything(owner.journal) == written
    owner.sync()
    owner.drop(0)  # the segments that came to nothing go
    owner.spare()
    assert owner.journal.lost is None
    assert len(owner.segments()) == 2  # the active one and the spare: the first was left empty
    files.files.kill()
    owner.start()
    assert everything(owner.journal) == written


def test_after_an_unknown_outcome_a_killed_process_leaves_the_record_or_does_not(files, owner):
    for fault, left in ((refuse(EIO), 1), (half(), 1), (after(EIO), 2)):
        disk = Disk()
        owner = Owner(Faulty(disk), FOLDER)
        owner.write("a")
        owner.files.faults = {"pwrite": fault, "ftruncate": refuse(EIO)}
        with pytest.raises(OutcomeUnknown):
            owner.write("b")
        owner.files.faults.clear()
        disk.kill()
        owner.start()
        assert len(everything(owner.journal)) == left


@pytest.mark.parametrize("fault", WRITE_FAULTS.values(), ids=WRITE_FAULTS)
@pytest.mark.parametrize("cut", [True, False])
def test_a_spare_that_cannot_be_begun_ends_the_segment_before_it(files, owner, fault, cut):
    written = [owner.write("a" * 3000)]
    files.faults = {"pwrite": fault}
    if not cut:
        files.faults["ftruncate"] = refuse(EIO)
    with pytest.raises(NotWritten, match="the spare segment cannot be written to"):
        owner.write("b" * 3000)
    files.faults.clear()
    # It would fit where we were. But what the broken spare says may be that this one has ended.
    with pytest.raises(NotWritten):
        owner.write("b")
    owner.spare()
    written.append(owner.write("c"))
    assert everything(owner.journal) == written
    files.files.kill()
    owner.start()
    assert everything(owner.journal) == written


# -- syncs that fail -----------------------------------------------------------------------------


def test_a_sync_moves_what_is_known_to_be_on_the_disk(files, disk, owner):
    written = refill(owner)
    assert owner.journal.synced == 0
    ticket = owner.journal.begin_sync()
    assert len(ticket.fds) > 1
    assert owner.journal.begin_sync() is None  # one at a time
    later = refill(owner)
    ticket.run()
    owner.journal.end_sync(ticket, None)
    assert owner.journal.synced == 20
    owner.sync()
    assert owner.journal.synced == 40
    assert owner.journal.begin_sync() is None
    disk.cut_power(Worst())
    owner.boot = "boot-2"
    owner.start()
    assert everything(owner.journal) == written + later


def test_after_a_failed_sync_everything_unsynced_is_written_anew_and_that_is_synced(
    files, disk, owner
):
    written = refill(owner, 12)
    owner.sync()
    written += refill(owner, 8)
    files.faults["fdatasync"] = refuse(EIO)
    ticket = owner.journal.begin_sync()
    error = ran(ticket)
    assert error is not None
    written.append(owner.write("while the sync failed"))
    chain, end = owner.journal.chain, owner.journal.end
    files.faults.clear()
    files.calls.clear()
    owner.journal.end_sync(ticket, error)
    assert (owner.journal.synced, owner.journal.next_lsn, owner.journal.chain) == (12, 22, chain)
    assert everything(owner.journal) == written
    # A reader that stood in what was given up goes on where it was.
    written.append(owner.write("d"))
    assert owner.journal.read(end, 9, 9999)[0] == written[21:]
    owner.sync()
    assert owner.journal.synced == 22
    synced = {fd for name, fd in files.calls if name == "fdatasync"}
    assert synced.isdisjoint(ticket.fds)
    disk.cut_power(Worst())
    owner.boot = "boot-2"
    owner.start()
    assert everything(owner.journal) == written


def test_a_reader_goes_on_where_the_segment_that_it_stood_in_was_given_up(files, owner):
    written = [owner.write("a")]
    owner.sync()
    written += [owner.write("b"), owner.write("c")]
    places = [owner.journal.find(lsn) for lsn in range(4)]
    assert {place.segment for place in places} == {1}
    files.faults["fdatasync"] = refuse(EIO)
    owner.sync()
    written.append(owner.write("d"))
    for lsn, place in enumerate(places):
        payloads, cursor = owner.journal.read(place, 1, 9999)
        assert payloads == [written[lsn]]
        assert cursor.lsn == lsn + 1
    assert owner.journal.find(2).segment == 2


def test_a_failed_sync_without_a_spare_loses_the_journal_until_there_is_one(files, owner):
    written = []
    files.faults = {"fdatasync": refuse(EIO), "create": refuse(ENOSPC)}
    while owner.journal.room() > 1000:
        written.append(owner.write("x" * 100))
    owner.spare()
    owner.sync()
    assert owner.journal.lost == (
        f"{owner.segments()[-1]} could not be synced (Input/output error), "
        "and no spare could be reserved (No space left on device)"
    )
    assert owner.journal.room() == 0
    assert owner.journal.begin_sync() is None
    with pytest.raises(NotWritten, match="could not be synced"):
        owner.write("b")
    # What is not synced may be gone from the cache as well: nobody gets to read it.
    assert everything(owner.journal) == []
    files.faults.clear()
    owner.spare()
    owner.spare()
    assert owner.journal.lost is None
    written.append(owner.write("b"))
    assert everything(owner.journal) == written
    owner.sync()
    assert owner.journal.synced == len(written)


def test_more_than_a_segment_of_unsynced_records_finds_room_in_a_larger_spare(files, owner):
    written = refill(owner, 60)
    files.faults["fdatasync"] = refuse(EIO)
    owner.sync()
    files.faults.clear()
    assert "could not be synced" in owner.journal.lost
    owner.spare()
    assert everything(owner.journal) == written
    owner.sync()
    assert owner.journal.synced == 60


def test_a_sync_of_what_was_given_up_meanwhile_counts_for_nothing(files, disk, owner):
    owner.write("a")
    stale = owner.journal.begin_sync()
    files.faults["ftruncate"] = refuse(EIO)
    files.at[len(files.calls) + 1] = lambda _: half()
    owner.write("b")
    files.faults.clear()
    assert all(fd in disk.fds for fd in stale.fds)  # not closed under the thread that uses them
    fresh = owner.journal.begin_sync()
    assert set(fresh.fds).isdisjoint(stale.fds)
    stale.run()
    owner.journal.end_sync(stale, None)
    assert owner.journal.synced == 0
    fresh.run()
    owner.journal.end_sync(fresh, None)
    assert owner.journal.synced == 2
    assert not any(fd in disk.fds for fd in stale.fds)


def test_no_descriptor_is_closed_under_a_sync_that_is_under_way(files, disk, owner):
    owner.write("a")
    stale = owner.journal.begin_sync()
    files.faults["ftruncate"] = refuse(EIO)
    files.at[len(files.calls) + 1] = lambda _: half()
    owner.write("b")
    files.faults.clear()
    owner.sync()
    assert owner.journal.synced == 2
    assert all(fd in disk.fds for fd in stale.fds)
    stale.run()
    owner.journal.end_sync(stale, None)
    assert not any(fd in disk.fds for fd in stale.fds)


def test_a_sync_that_fails_after_what_it_is_for_was_given_up_does_no_harm(files, disk, owner):
    owner.write("a")
    stale = owner.journal.begin_sync()
    files.faults["ftruncate"] = refuse(EIO)
    files.at[len(files.calls) + 1] = lambda _: half()
    owner.write("b")
    files.faults.clear()
    owner.journal.end_sync(stale, EIO)
    owner.spare()
    assert owner.journal.lost is None
    assert len(everything(owner.journal)) == 2


def test_a_restart_does_not_take_the_second_sync_for_the_first(files, disk, owner):
    # The process dies with the failure of its sync; the kernel holds the pages for clean.
    written = refill(owner, 5)
    files.faults["fdatasync"] = refuse(EIO)
    ran(owner.journal.begin_sync())
    files.faults.clear()
    disk.kill()
    owner.start()
    assert owner.journal.synced == 5
    disk.cut_power(Worst())
    owner.boot = "boot-2"
    owner.start()
    assert everything(owner.journal) == written


# -- reading -------------------------------------------------------------------------------------


def test_any_number_is_found_and_read_on_from(owner):
    written = refill(owner, 50)
    for lsn in range(51):
        cursor = owner.journal.find(lsn)
        assert cursor.lsn == lsn
        assert everything(owner.journal, lsn) == written[lsn:]
    assert owner.journal.find(50) == owner.journal.end
    assert owner.journal.read(owner.journal.end, 9, 999) == ([], owner.journal.end)
    with pytest.raises(Gap):
        owner.journal.find(51)


def test_a_read_stops_at_the_number_of_records_and_at_the_bytes_but_gives_one_at_least(owner):
    written = [owner.write("x" * n) for n in (10, 20, 2000, 10)]
    start = owner.journal.find(0)
    assert owner.journal.read(start, 1, 10_000)[0] == written[:1]
    assert owner.journal.read(start, 9, 200)[0] == written[:2]
    payloads, cursor = owner.journal.read(owner.journal.find(2), 9, 1)
    assert (payloads, cursor.lsn) == (written[2:3], 3)
    assert owner.journal.read(start, 9, 10_000)[0] == written


def test_a_cursor_of_another_journal_is_not_followed_into_the_next_segment(owner):
    refill(owner)
    second = owner.journal.trail().segments[1]
    place = owner.journal.find(second.first_lsn - 2)
    _, end = owner.journal.read(place, 1, 9999)
    assert end.segment == 1
    with pytest.raises(Corrupt, match="it continues another journal"):
        owner.journal.read(replace(end, chain=end.chain ^ 1), 1, 9999)


def test_damage_under_a_running_journal_is_told_with_its_place(disk, owner):
    refill(owner, 5)
    cursor = owner.journal.find(3)
    disk.names[FOLDER / "0000000001.journal"].cache[cursor.offset + 20] ^= 1
    payloads, cursor = owner.journal.read(owner.journal.find(0), 99, 9999)
    assert len(payloads) == 3
    with pytest.raises(Corrupt, match="this is not record 4") as refused:
        owner.journal.read(cursor, 99, 9999)
    assert (refused.value.file.name, refused.value.offset) == ("0000000001.journal", cursor.offset)


def test_another_thread_reads_along_while_records_are_written_and_segments_change(tmp_path):
    owner = Owner(OS_FILES, tmp_path, max_bytes=1 << 30)
    trails: queue.SimpleQueue = queue.SimpleQueue()
    read: list[bytes] = []

    def follow() -> None:
        cursor = None
        while (trail := trails.get()) is not None:
            cursor = cursor or trail.find(0)
            while cursor.lsn < trail.end.lsn:
                some, cursor = trail.read(cursor, 11, 2000)
                read.extend(some)

    reader = threading.Thread(target=follow)
    reader.start()
    written = []
    for n in range(3000):
        written.append(owner.write("x" * (n % 100)))
        if n % 5 == 0:
            trails.put(owner.journal.trail())
        owner.spare()
        if n % 100 == 0:
            owner.sync()
    trails.put(owner.journal.trail())
    trails.put(None)
    reader.join()
    assert read == written
    owner.journal.close()


# -- what is dropped -----------------------------------------------------------------------------


def test_only_segments_that_are_wholly_covered_are_dropped_and_never_the_active_one(owner):
    written = refill(owner, 50)
    owner.sync()
    names = owner.segments()
    firsts = [segment.first_lsn for segment in owner.journal.trail().segments]
    for kept, first in enumerate(firsts):
        owner.drop(first - 2)
        assert owner.segments() == names[max(0, kept - 1) :]
        owner.drop(first - 1)
        assert owner.segments() == names[kept:]
    assert everything(owner.journal, firsts[-1] - 1) == written[firsts[-1] - 1 :]
    with pytest.raises(Gap, match=f"goes from {firsts[-1]} to 50, and has no 1$"):
        owner.journal.find(0)
    owner.drop(50)
    assert owner.segments() == names[-2:]  # the active one, and the spare
    assert owner.journal.begin_drop(50) is None


def test_what_is_not_synced_is_not_dropped_whatever_the_caller_says(owner):
    refill(owner, 50)
    assert owner.journal.begin_drop(50) is None


def test_a_reader_in_a_segment_that_is_gone_goes_on_with_the_next(owner):
    written = refill(owner, 50)
    owner.sync()
    second = owner.journal.trail().segments[1]
    cursor = owner.journal.find(second.first_lsn - 2)
    _, at_the_end = owner.journal.read(cursor, 1, 9999)
    assert at_the_end.segment == 1
    owner.drop(second.first_lsn - 1)
    assert owner.journal.read(at_the_end, 1, 9999)[0] == [written[second.first_lsn - 1]]
    with pytest.raises(Gap):
        owner.journal.read(cursor, 1, 9999)


def test_a_segment_that_cannot_be_removed_is_tried_again_and_read_no_more(files, owner):
    refill(owner, 50)
    owner.sync()
    names = owner.segments()
    files.at[len(files.calls) + 3] = lambda name: refuse(EIO)  # the second unlink
    owner.drop(50)
    assert owner.segments() == names[1:]
    assert owner.journal.trail().segments[0].name == names[-2]
    owner.drop(0)
    assert owner.segments() == names[-2:]


def test_after_a_restart_the_records_begin_where_the_dropping_ended(files, disk, owner):
    written = refill(owner, 50)
    owner.sync()
    owner.drop(30)
    first = owner.journal.trail().segments[0].first_lsn
    assert 20 < first <= 31
    disk.kill()
    owner.start()
    assert everything(owner.journal, first - 1) == written[first - 1 :]


def test_nothing_is_removed_before_what_continues_it_is_on_the_disk(disk, owner):
    owner.write("x" * 3000)
    owner.sync()
    written = [owner.write("y" * 3000)]
    assert owner.journal.end.segment == 2
    owner.drop(1)  # covered, but the header of the next one is in the page cache alone
    assert "0000000001.journal" in owner.segments()
    disk.cut_power(Worst())
    owner.boot = "boot-2"
    owner.start()
    assert owner.journal.next_lsn == 2
    written = [owner.write("z")]
    owner.sync()
    owner.drop(1)
    assert "0000000001.journal" not in owner.segments()
    assert everything(owner.journal, 1) == written


def test_a_start_continues_a_segment_whose_header_is_on_the_disk(files, disk, owner):
    first = owner.write("x" * 3000)
    owner.sync()
    second = owner.write("y" * 3000)
    files.at[len(files.calls) + 2] = lambda name: refuse(EIO)
    assert ran(owner.journal.begin_sync())  # the header of the second segment never gets there
    assert files.names()[-2:] == ["fdatasync", "fdatasync"]
    for _ in range(2):
        disk.kill()
        owner.start()
        assert owner.journal.synced == 2
    disk.cut_power(Worst())
    owner.boot = "boot-2"
    owner.start()
    assert everything(owner.journal) == [first, second]


def test_a_segment_that_is_missing_in_the_middle_stops_the_start(disk, owner):
    refill(owner, 50)
    owner.sync()
    disk.kill()
    del disk.names[FOLDER / "0000000002.journal"]
    with pytest.raises(Corrupt, match=r"0000000002\.journal, which it continues, is missing"):
        owner.start()


# -- starting again ------------------------------------------------------------------------------


def test_an_empty_folder_is_a_new_journal(owner):
    assert (owner.scan.ledger_id, owner.scan.epoch, owner.scan.trail.segments) == ("", 0, ())
    assert (owner.journal.next_lsn, owner.journal.synced, owner.journal.chain) == (1, 0, 0)
    assert owner.journal.lost is None
    assert owner.journal.find(0) == owner.journal.end


def test_every_start_opens_a_new_segment_and_the_chain_goes_on(files, disk, owner):
    written = []
    for epoch in range(1, 6):
        assert (owner.journal.epoch, owner.scan.epoch) == (epoch, epoch - 1)
        written += refill(owner, 12)
        owner.sync()
        owner.write("not synced")
        written.append(record(owner.journal.next_lsn - 1, owner.journal.synced, "not synced"))
        end = owner.journal.end
        disk.kill()
        owner.start()
        assert owner.scan.ledger_id == "ledger-1"
        assert owner.scan.trail.end == end
        assert owner.journal.end.segment > end.segment
        assert owner.journal.end.chain == end.chain
        assert owner.journal.synced == end.lsn
        assert everything(owner.journal) == written


def test_a_restart_keeps_no_room_that_is_not_used(files, disk):
    owner = Owner(files, FOLDER, max_bytes=4 * SEGMENT)
    for _ in range(6):
        owner.write("a")
        disk.kill()
        owner.start()
        assert owner.journal.lost is None
        assert len(everything(owner.journal)) == owner.journal.next_lsn - 1


def test_a_leftover_spare_is_removed(disk, owner):
    owner.write("a")
    disk.kill()
    for name, content in {
        "0000000007.journal": b"",
        "0000000008.journal": bytes(10),
        "0000000009.journal": bytes(SEGMENT),
        "0000000010.journal": b'0123abcd {"k":"seg' + bytes(SEGMENT - 18),
        # The beginning of a move into the spare: the header would have come last.
        "0000000011.journal": bytes(HEADER_BYTES) + b"01234567 {}\n" + bytes(99),
    }.items():
        disk.names[FOLDER / name] = inode = Inode()
        inode.cache += content
    owner.start()
    assert len(owner.scan.leftovers) == 6
    assert not set(owner.segments()) & set(owner.scan.leftovers)
    assert min(set(owner.segments()) - {"0000000001.journal"}) == "0000000012.journal"
    assert len(everything(owner.journal)) == 1


def test_other_files_in_the_folder_are_left_alone(disk, owner):
    for name in ("lock", "backup-1.db", "1.journal", "0000000001.journal.aside"):
        disk.names[FOLDER / name] = inode = Inode()
        inode.cache += b"not a segment"
    disk.kill()
    owner.start()
    assert {"lock", "backup-1.db", "1.journal", "0000000001.journal.aside"} <= set(
        disk.listdir(FOLDER)
    )


def test_a_journal_of_another_ledger_is_refused(disk, owner):
    owner.write("a")
    disk.kill()
    found = scan(owner.files, FOLDER, owner.boot, 0)
    before = {path: bytes(inode.cache) for path, inode in disk.names.items()}
    with pytest.raises(JournalRefused, match=r"belongs to ledger ledger-1, the database to other"):
        Journal.start(
            *(owner.files, FOLDER, found),
            **{"ledger_id": "other", "epoch": 2, "boot_id": owner.boot, "applied_lsn": 0},
        )
    assert {path: bytes(inode.cache) for path, inode in disk.names.items()} == before


def rewrite_header(disk: Disk, number: int, old: bytes, new: bytes) -> None:
    """Change a header, and its crc with it."""
    cache = disk.names[FOLDER / f"{number:010}.journal"].cache
    payload = bytes(cache[9 : HEADER_BYTES - 1])
    assert payload.count(old) == 1
    payload = payload.replace(old, new).rstrip().ljust(HEADER_BYTES - 10)
    cache[:HEADER_BYTES] = b"%08x %b\n" % (crc32(payload), payload)


def test_segments_of_two_ledgers_in_one_folder_are_refused(disk, owner):
    refill(owner)
    rewrite_header(disk, 2, b"ledger-1", b"ledger-2")
    with pytest.raises(JournalRefused, match="segments of different ledgers"):
        owner.start()


@pytest.mark.parametrize("change", [(b'"version":1', b'"version":2'), (b'"epoch":1', b'"apoch":1')])
def test_a_journal_of_another_version_is_refused(disk, owner, change):
    rewrite_header(disk, 1, *change)
    with pytest.raises(JournalRefused, match=r"0000000001\.journal: written by another version"):
        owner.start()


@pytest.mark.parametrize(
    "change", [(b'"first_lsn":', b'"first_lsn":-'), (b'"chain":', b'"chain":1')]
)
def test_a_segment_that_does_not_follow_the_one_before_stops_the_start(disk, owner, change):
    refill(owner)
    rewrite_header(disk, 2, *change)
    with pytest.raises(Corrupt, match="its records do not follow those before it") as refused:
        owner.start()
    assert refused.value.file.name == "0000000002.journal"


def test_a_record_that_goes_by_another_number_than_its_place_stops_the_start(disk, owner):
    owner.journal.write(record(7, 0))
    with pytest.raises(Corrupt, match="record 1 goes by another number"):
        owner.start()


def test_a_number_that_the_database_has_seen_is_never_used_again(disk, owner):
    written = [owner.write("a"), owner.write("b")]
    disk.kill()
    owner.applied = Cursor(0, 0, 0xABCD, 10)  # the disk has lost what it said that it had written
    owner.start()
    assert (owner.journal.next_lsn, owner.journal.synced) == (11, 10)
    assert owner.journal.find(10).chain == 0xABCD
    later = owner.write("c")
    assert json.loads(later)["lsn"] == 11
    for _ in range(2):
        trail = owner.journal.trail()
        assert trail.read(trail.find(0), 9, 9999)[0] == written
        assert trail.read(trail.find(10), 9, 9999)[0] == [later]
        with pytest.raises(Gap, match="has no 3 to 10"):
            trail.read(trail.find(2), 9, 9999)
        with pytest.raises(Gap):
            trail.find(5)
        disk.kill()
        owner.start()
    assert owner.journal.next_lsn == 12


def test_what_was_inherited_is_synced_also_where_the_database_is_ahead(disk, owner):
    written = [owner.write("a"), owner.write("b")]
    disk.kill()
    owner.applied = Cursor(0, 0, 0xABCD, 10)
    owner.start()
    disk.cut_power(Worst())
    owner.boot = "boot-2"
    owner.start()
    trail = owner.journal.trail()
    assert trail.read(trail.find(0), 9, 9999)[0] == written


def test_a_journal_that_is_gone_begins_after_the_database_and_on_its_chain(files):
    owner = Owner(files, FOLDER)
    owner.directory, owner.applied = Path("/new"), Cursor(0, 0, 77, 1000)
    owner.start()
    assert owner.journal.find(1000) == owner.journal.end
    assert owner.journal.end.chain == 77
    assert json.loads(owner.write())["lsn"] == 1001


# -- what a killed process leaves ----------------------------------------------------------------


def test_a_last_record_that_is_cut_short_at_any_byte_was_never_written(disk, owner):
    written = [owner.write("a"), owner.write("b")]
    inode = disk.names[FOLDER / "0000000001.journal"]
    begin = owner.journal.end.offset
    owner.write("the last one")
    end = owner.journal.end.offset
    whole = bytes(inode.cache)
    for length in range(begin, end):
        inode.cache[:] = whole[:length] + bytes(len(whole) - length)
        found = scan(disk, FOLDER, "boot-1", 0)
        assert everything(found) == written
        assert found.torn_bytes == length - begin
        assert found.cut is None
    owner.start()
    assert everything(owner.journal) == written
    assert len(inode.cache) == begin


def test_records_that_are_gone_from_the_end_of_an_older_segment_stop_the_start(disk, owner):
    refill(owner)
    disk.kill()
    cache = disk.names[FOLDER / "0000000001.journal"].cache
    trail = owner.journal.trail()
    end = trail.segments[0].length
    last = trail.find(trail.segments[1].first_lsn - 2).offset
    # A whole record, as if it had never been; and half of one, as if its writing was cut short.
    for place in (last, last + 50):
        whole = bytes(cache)
        cache[place:] = bytes(len(cache) - place)
        with pytest.raises(Corrupt, match=f"damaged at byte {last}") as refused:
            owner.start()
        assert refused.value.file.name == "0000000001.journal"
        cache[:] = whole
    assert last + 50 < end


def test_a_last_record_that_has_lost_its_line_feed_was_written_and_stops_the_start(disk, owner):
    owner.write("a")
    place = owner.journal.end.offset - 1
    disk.kill()
    for file_place in (place, HEADER_BYTES - 1):
        cache = disk.names[FOLDER / "0000000001.journal"].cache
        for bit in range(8):
            cache[file_place] ^= 1 << bit
            with pytest.raises(Corrupt):
                owner.start()
            cache[file_place] ^= 1 << bit


SMALL = 1200


def flips(disk: Disk) -> Iterator[tuple[str, int]]:
    """Flip one bit of every byte of every segment, one after the other."""
    for path in sorted(disk.names):
        cache = disk.names[path].cache
        for place in range(len(cache)):
            bit = 1 << place % 8
            cache[place] ^= bit
            yield path.name, place
            cache[place] ^= bit


def test_on_the_same_boot_a_flipped_bit_stops_the_start_wherever_it_counts(disk):
    owner = Owner(disk, FOLDER, segment_bytes=SMALL)
    written = refill(owner, 4, 100)
    owner.sync()
    written += refill(owner, 3, 100)
    disk.kill()
    *older, active = owner.journal.trail().segments
    lengths = {segment.name: segment.length for segment in older}
    spare = owner.segments()[-1]
    refused = 0
    for name, place in flips(disk):
        harmless = place >= (HEADER_BYTES if name == spare else lengths.get(name, SMALL))
        if harmless:
            # Nothing is read there: behind the place where the next segment begins, and in a spare.
            if place % 50 == 0:
                assert everything(scan(disk, FOLDER, "boot-1", 7)) == written
            continue
        with pytest.raises(Corrupt, match="Put a good copy") as told:
            scan(disk, FOLDER, "boot-1", 7)
        assert told.value.file.name == name
        assert told.value.offset <= place
        refused += 1
    assert refused > 2 * SMALL
    assert active.name not in lengths


def test_after_a_power_cut_a_flipped_bit_cuts_the_journal_unless_it_was_synced(disk):
    owner = Owner(disk, FOLDER, segment_bytes=SMALL)
    refill(owner, 6, 100)
    owner.sync()
    refill(owner, 8, 100)  # the first of these says that 6 are synced
    written = everything(owner.journal)
    trail = owner.journal.trail()
    first = {segment.name: segment for segment in trail.segments}
    where = [(cursor.segment, cursor.offset) for cursor in map(trail.find, range(15))]
    files = {path: bytes(inode.cache) for path, inode in disk.names.items()}
    outcomes = set()
    for name, place in flips(disk):
        if name not in first or place >= first[name].length or place % 5:
            continue
        number = int(name[:10])
        # The record that is hit: all before it end before that place.
        good = max(lsn for lsn in range(15) if lsn == 0 or where[lsn] <= (number, place))
        if place < HEADER_BYTES:
            good = first[name].first_lsn - 1
        if good < 6 or (number == 1 and place < HEADER_BYTES):
            with pytest.raises(Corrupt):
                scan(disk, FOLDER, "boot-2", 0)
            outcomes.add("refused")
            continue
        found = scan(disk, FOLDER, "boot-2", 0)
        assert everything(found) == written[:good]
        assert (found.cut.first_lsn, found.cut.file.name) == (good + 1, name)
        assert found.cut.last_lsn >= good
        with pytest.raises(Corrupt):  # the database has it, so it was synced
            scan(disk, FOLDER, "boot-2", good + 1)
        copy = Disk()
        for path, inode in disk.names.items():
            copy.names[path] = other = Inode()
            other.cache += inode.cache
        again = Owner(copy, FOLDER, boot="boot-2")
        assert everything(again.journal) == written[:good]
        assert again.journal.next_lsn == good + 1
        # All that was set aside is still there, under another name.
        kept = b"".join(
            bytes(inode.cache)
            for path, inode in sorted(copy.names.items())
            if path.suffix == ".aside"
        )
        lost = disk.names[FOLDER / name].cache[found.cut.offset :]
        lost += b"".join(bytes(disk.names[FOLDER / n].cache) for n in first if n > name)
        assert kept.replace(b"\0", b"") == lost.replace(b"\0", b"")
        outcomes.add("cut")
    assert outcomes == {"refused", "cut"}
    assert files == {path: bytes(inode.cache) for path, inode in disk.names.items()}


def test_what_a_power_cut_left_of_unsynced_records_is_cut_and_its_span_told(disk, owner):
    written = [owner.write("a"), owner.write("b")]
    owner.sync()
    written.append(owner.write("c"))
    places = [owner.journal.end.offset]
    for _ in range(5):
        owner.write("y" * 200)
        places.append(owner.journal.end.offset)
    # A page in the middle has not come to the disk, later ones have.
    cache = disk.names[FOLDER / "0000000001.journal"].cache
    cache[places[1] + 5 : places[2]] = bytes(places[2] - places[1] - 5)
    owner.boot = "boot-2"
    owner.start()
    assert not owner.scan.same_boot
    assert (owner.scan.cut.first_lsn, owner.scan.cut.last_lsn) == (5, 8)
    assert (owner.scan.synced, owner.journal.next_lsn) == (2, 5)
    assert everything(owner.journal)[:3] == written
    # Their numbers are borne by others now, and the chain is another one.
    owner.write("d")
    owner.start()
    assert owner.scan.cut is None
    assert len(everything(owner.journal)) == 5


def test_a_record_that_the_power_cut_short_does_not_stop_a_database_that_is_ahead(disk, owner):
    written = [owner.write("a")]
    end = owner.journal.end.offset
    owner.write("b")
    cache = disk.names[FOLDER / "0000000001.journal"].cache
    cache[end + 30 :] = bytes(len(cache) - end - 30)
    owner.applied = Cursor(0, 0, 0xABCD, 2)
    owner.boot = "boot-2"
    owner.start()
    assert (owner.scan.cut.first_lsn, owner.journal.next_lsn) == (2, 3)
    trail = owner.journal.trail()
    assert trail.read(trail.find(0), 9, 9999)[0] == written


def test_damage_before_a_record_that_was_synced_stops_the_start_after_a_power_cut_too(disk, owner):
    owner.write("a")
    place = owner.journal.end.offset
    owner.write("b")
    owner.sync()
    end = owner.journal.end.offset
    owner.write("c")  # says that 2 is synced
    cache = disk.names[FOLDER / "0000000001.journal"].cache
    whole = bytes(cache)
    for damage in (b"#", bytes(end - place)):
        cache[place : place + len(damage)] = damage
        with pytest.raises(Corrupt, match=f"at byte {place}: this is not record 2") as refused:
            scan(disk, FOLDER, "boot-2", 0)
        assert "gwproxy ledger accept-loss" in str(refused.value)
        cache[:] = whole


def test_a_damaged_number_does_not_pass_for_a_record_that_was_synced(disk, owner):
    owner.write("a")
    place = owner.journal.end.offset
    owner.write("b")
    cache = disk.names[FOLDER / "0000000001.journal"].cache
    at = cache.index(b'"synced": 0', place) + len(b'"synced": ')
    cache[at : at + 1] = b"8"
    assert scan(disk, FOLDER, "boot-2", 0).cut.first_lsn == 2


def test_a_segment_that_has_lost_its_header_to_a_power_cut_is_kept_under_another_name(disk, owner):
    written = [owner.write("x" * 3000)]
    later = owner.write("y" * 3000)
    cache = disk.names[FOLDER / "0000000002.journal"].cache
    cache[:HEADER_BYTES] = bytes(HEADER_BYTES)
    owner.boot = "boot-2"
    owner.start()
    assert (owner.scan.cut.first_lsn, owner.scan.cut.last_lsn) == (2, 2)
    assert everything(owner.journal) == written
    assert later in disk.read(FOLDER / "0000000002.journal.aside")


@pytest.mark.parametrize("place", [3, 20, 90, HEADER_BYTES - 1])
def test_a_damaged_header_of_this_boot_is_not_taken_for_one_that_a_power_cut_took(place):
    disk = Disk()
    owner = Owner(disk, FOLDER)
    owner.write("x" * 3000)
    owner.boot = "boot-2"
    owner.start()
    owner.write("y" * 3000)
    newest = disk.names[FOLDER / owner.journal.trail().segments[-1].name].cache
    assert b"boot-2" in newest[:HEADER_BYTES]
    newest[place] ^= 8
    with pytest.raises(Corrupt, match="its header cannot be read"):
        owner.start()
    owner.boot = "boot-3"  # now it may have been the power cut's own
    owner.start()


def test_a_power_cut_in_the_middle_of_setting_aside_is_taken_up_again(disk, owner):
    written = refill(owner, 3)
    owner.sync()
    refill(owner, 20)
    cache = disk.names[FOLDER / "0000000001.journal"].cache
    end = owner.journal.find(5)
    lost = owner.journal.read(owner.journal.find(6), 1, 1)[0][0]
    assert lost in cache[end.offset :]
    cache[end.offset + 3] ^= 1
    for inode in disk.names.values():
        disk_image = bytearray(inode.cache)
        inode.disk[:] = disk_image
        inode.dirty.clear()
    disk.lasting = dict(disk.names)
    last_call = 0
    for call, chance in itertools.product(range(1, 200), range(8)):
        copy = Disk()
        copy.names = {path: Inode() for path in disk.names}
        for path, inode in disk.names.items():
            copy.names[path].cache[:] = copy.names[path].disk[:] = inode.cache
        copy.lasting = dict(copy.names)
        files = Faulty(copy)
        files.at[call] = lambda name: after(Killed())
        with suppress(Killed):
            Owner(files, FOLDER, boot="boot-2")
            break
        copy.cut_power(random.Random(chance))
        again = Owner(copy, FOLDER, boot="boot-3")
        assert everything(again.journal)[:3] == written
        assert len(everything(again.journal)) == 5
        assert any(lost in inode.cache for inode in copy.names.values())
        last_call = call
    assert last_call > 20


# -- the folder and its lock ---------------------------------------------------------------------

CLAIM_AND_SAY = """
import sys
from pathlib import Path
from gwproxy.storage.scan import JournalInUse, claim

try:
    claim(Path(sys.argv[1]))
    print("claimed", flush=True)
    sys.stdin.read()
except JournalInUse as refused:
    print(f"refused: {refused}", flush=True)
"""


def test_two_processes_never_share_a_journal(tmp_path):
    folder = tmp_path / "journal"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLAIM_AND_SAY, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        assert first.stdout.readline() == "claimed\n"
        with start() as second:
            assert second.stdout.readline().startswith(f"refused: {folder}: in use by another pro")
        with pytest.raises(JournalInUse, match=rf"\({first.pid}\)\. Stop it first, or give"):
            claim(folder)
        first.kill()
        first.wait()
    os.close(claim(folder))


def test_a_folder_that_cannot_be_made_or_used_is_named(tmp_path):
    with pytest.raises(JournalRefused, match=f"{tmp_path}/a/b: No such file or directory. Check"):
        claim(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalRefused, match=f"{tmp_path}/file: Not a directory"):
        claim(tmp_path / "file")
    with pytest.raises(JournalRefused, match="No such file or directory"):
        scan(OS_FILES, tmp_path / "nowhere", "boot-1", 0)


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path):
    (tmp_path / "journal").mkdir(mode=0o755)
    os.close(claim(tmp_path / "journal"))
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o700


def test_the_start_of_the_machine_has_an_id_that_a_unit_may_hide(monkeypatch, tmp_path):
    assert boot_id(OS_FILES) == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    monkeypatch.setattr(scanning, "BOOT_ID", tmp_path / "hidden")
    with pytest.raises(JournalRefused, match="leave ProcSubset=pid out of the unit"):
        boot_id(OS_FILES)


# -- anything, in any order ----------------------------------------------------------------------


class Run:
    """An owner whose disk fails and whose process dies, beside a list of what it was promised."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.files = Faulty(self.disk)
        self.boots = 1
        self.count = 0
        self.written: list[bytes] = []
        """Accepted, the record of LSN 1 first."""
        self.certain = 0
        """So many of them are written for sure; of the one after these nobody knows."""
        self.synced = 0
        self.refused: set[bytes] = set()
        self.in_flight: bytes | None = None
        self.tickets: list = []
        self.owner = Owner(self.files, FOLDER, max_bytes=40 * SEGMENT)

    def arm(self, calls: int, kind: str) -> None:
        """Let one of the next calls go wrong."""

        def fault(name: str) -> Fault | None:
            if name in ("close", "listdir"):
                return None
            if kind == "half" and name == "pwrite":
                return half()
            if kind == "torn" and name == "pwrite":
                return half(Killed())
            if kind == "after":
                return after(EIO)
            if kind == "killed":
                return refuse(Killed())
            return after(Killed()) if kind == "killed after" else refuse(EIO)

        self.files.at[len(self.files.calls) + calls] = fault

    def do(self, step: str, number: int) -> None:
        journal = self.owner.journal
        if step == "write":
            self.write(number)
        elif step == "begin sync":
            ticket = journal.begin_sync()
            if ticket is not None:
                self.tickets.append(ticket)
        elif step == "end sync":
            if self.tickets:
                ticket = self.tickets.pop(number % len(self.tickets))
                journal.end_sync(ticket, ran(ticket))
        elif step == "spare":
            self.owner.spare()
        elif step == "apply":
            if journal.synced > self.owner.applied.lsn:
                self.owner.applied = replace(journal.trail(), files=self.disk).find(journal.synced)
        elif step == "drop":
            self.owner.drop(self.owner.applied.lsn - number)
        assert journal.synced >= self.synced
        self.synced = journal.synced
        assert journal.synced <= journal.next_lsn - 1 == len(self.written)
        assert self.readable(journal.trail()) >= max(journal.synced, 0)

    def write(self, length: int) -> None:
        journal = self.owner.journal
        self.count += 1
        self.in_flight = record(journal.next_lsn, journal.synced, f"{self.count} " + "x" * length)
        try:
            journal.write(self.in_flight)
            self.written.append(self.in_flight)
            self.certain = len(self.written)
        except NotWritten:
            self.refused.add(self.in_flight)
        except OutcomeUnknown:
            self.written.append(self.in_flight)
        self.in_flight = None

    def readable(self, trail) -> int:
        """Check what can be read; the last number."""
        trail = replace(trail, files=self.disk)
        first = trail.segments[0].first_lsn
        cursor, payloads = trail.find(first - 1), []
        while cursor.lsn < trail.end.lsn:
            some, cursor = trail.read(cursor, 9, 2000)
            payloads += some
        assert payloads == self.written[first - 1 : trail.end.lsn]
        return trail.end.lsn

    def restart(self, power: int | None) -> None:
        if power is None:
            self.disk.kill()
        else:
            self.disk.cut_power(random.Random(power))
            self.boots += 1
            self.owner.boot = f"boot-{self.boots}"
            self.certain = max(self.synced, self.owner.applied.lsn)
        self.tickets.clear()
        found = scan(self.disk, FOLDER, self.owner.boot, self.owner.applied.lsn)
        end = found.trail.end.lsn
        assert self.certain <= end <= len(self.written) + 1
        if end and end >= found.trail.segments[0].first_lsn:
            last = found.trail.read(found.trail.find(end - 1), 1, 1)[0][0]
            if end > len(self.written):
                assert last == self.in_flight or (power is not None and last in self.refused)
                self.written.append(last)
            elif last != self.written[end - 1]:
                # The power went before it was on the disk that this one had been cut off again.
                assert power is not None and last in self.refused
                self.written[end - 1] = last
        del self.written[end:]
        self.certain = end
        self.in_flight = None
        self.readable(found.trail)
        while True:
            try:
                self.owner.start()
                break
            except JournalRefused as refused:  # by an armed fault: it goes off once
                assert not isinstance(refused, Corrupt)
                self.disk.kill()
        journal = self.owner.journal
        assert journal.next_lsn == end + 1
        self.synced = journal.synced
        assert self.synced == end
        assert self.readable(journal.trail()) == end
        applied = self.owner.applied
        if applied.lsn:
            trail = replace(journal.trail(), files=self.disk)
            assert trail.find(applied.lsn).chain == applied.chain

    def go(self, steps) -> None:
        power = None
        for step, number in steps:
            try:
                if step in FAULTS:
                    self.arm(1 + number % 12, step)
                elif step in ("kill", "cut power"):
                    power = number if step == "cut power" else None
                    self.restart(power)
                else:
                    self.do(step, number)
            except Killed:
                self.files.at.clear()
                self.restart(number if number % 2 else None)
        self.files.at.clear()
        self.restart(None)
        self.restart(1)


EVENTFUL = [
    *[("write", n) for n in (10, 900, 10, 900, 900, 700)],
    *[
        ("spare", 0),
        ("begin sync", 0),
        ("write", 900),
        ("end sync", 0),
        ("apply", 0),
        ("write", 900),
    ],
    *[("write", 900), ("spare", 0), ("begin sync", 0), ("write", 10), ("end sync", 0), ("drop", 0)],
    *[("write", 10), ("kill", 0), ("write", 10), ("apply", 0), ("begin sync", 0), ("end sync", 0)],
    *[("write", 900), ("spare", 0), ("drop", 0), ("write", 10)],
]


@pytest.mark.parametrize("kind", ["refuse", "after", "half", "torn", "killed", "killed after"])
def test_any_one_call_may_fail_or_be_the_last(kind):
    calls = 0
    for number in range(1, 1000):
        run = Run()
        before = len(run.files.calls)
        run.arm(number, kind)
        run.go(EVENTFUL)
        if len(run.files.calls) < before + number:
            break
        calls = number
    assert calls > 100


def test_two_calls_in_a_row_may_fail_anywhere():
    for number in range(1, 150):
        for kind in ("refuse", "half"):
            run = Run()
            for later in range(2 + number % 3):
                run.arm(number + later, kind)
            run.go(EVENTFUL)


FAULTS = ["refuse", "after", "half", "torn", "killed", "killed after"]
STEPS = [
    *["write"] * 12,
    *["spare"] * 3,
    *["begin sync"] * 3,
    *["end sync"] * 3,
    *("apply", "drop", "kill", "cut power"),
    *FAULTS,
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1200)), max_size=80))
def test_whatever_happens_what_was_acknowledged_is_read_again_and_nothing_else(steps):
    Run().go(steps)
