"""A disk that is only played: what a program wrote, what of it has reached the disk, and all that
can go wrong between the two. `gwproxy.storage.files.Files` for one life of a process.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from gwproxy.storage.scan import BOOT_ID
from tests.simulator.loop import Killed

SECTOR = 512
"""What a disk writes whole or not at all."""


class Weather:
    """How likely each call is to fail at the moment."""

    def __init__(self) -> None:
        self.full = False
        """No room can be reserved."""
        self.pwrite = self.short = self.sync = self.truncate = self.read = self.directory = 0.0
        self.lie = 0.0
        """A sync that says it was done and was not."""

    def clear(self) -> None:
        lie = self.lie
        self.__init__()
        self.lie = lie  # a disk that lies does so all its life

    @property
    def fine(self) -> bool:
        return not (
            self.full
            or self.pwrite
            or self.short
            or self.sync
            or self.truncate
            or self.read
            or self.directory
        )


class Node:
    """A file. `data` is what programs see, `disk` what a power cut leaves for certain."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.disk = bytearray()
        self.dirty: dict[int, list[bytes]] = {}
        """By sector: its contents since it was last brought to the disk, the newest last."""
        self.sizes: list[int] = []
        """The file's lengths since its length was last brought to the disk."""

    def write(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        if end > len(self.data):
            self.resize(end)
        self.data[offset:end] = data
        self.soil(offset, end)

    def soil(self, start: int, end: int) -> None:
        for sector in range(start // SECTOR, -(-end // SECTOR)):
            content = bytes(self.data[sector * SECTOR : (sector + 1) * SECTOR])
            self.dirty.setdefault(sector, []).append(content)

    def resize(self, length: int) -> None:
        before = len(self.data)
        if length < before:
            del self.data[length:]
            for sector in [s for s in self.dirty if s * SECTOR >= length]:
                del self.dirty[sector]
            if length % SECTOR:
                self.soil(length, length + 1)
        else:
            self.data.extend(bytes(length - before))
        self.sizes.append(length)

    def put(self, sector: int, content: bytes) -> None:
        start = sector * SECTOR
        if start >= len(self.disk):
            return
        content = content.ljust(SECTOR, b"\0")[: len(self.disk) - start]
        self.disk[start : start + len(content)] = content

    def set_disk_size(self, length: int) -> None:
        if length < len(self.disk):
            del self.disk[length:]
        else:
            self.disk.extend(bytes(length - len(self.disk)))

    def cut(self, random: Random, kept: float) -> None:
        """The power fails: of what was not synced each sector comes through or not, by itself."""
        if self.sizes:
            self.set_disk_size(random.choice([len(self.disk), *self.sizes]))
        for sector, contents in self.dirty.items():
            if random.random() < kept:
                self.put(sector, random.choice(contents) if random.random() < 0.2 else contents[-1])
        self.data = bytearray(self.disk)
        self.dirty = {}
        self.sizes = []


class Disk:
    """The machine's disk. It outlives processes, and power cuts as far as they let it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.names: dict[Path, Node] = {}
        self.lasting: dict[Path, Node] = {}
        """The names that a power cut leaves."""
        self.moves: list[tuple[tuple[Path, Node | None], ...]] = []
        """Changes of names since then, each whole or not at all; None: it went."""
        self.weather = Weather()
        self.faults = 0
        """How many calls failed."""

    def rot(self) -> bool:
        """One byte that had reached the disk is another one from now on."""
        written = [
            (node, place)
            for node in self.names.values()
            for place in [len(node.disk.rstrip(b"\0"))]
            if place
        ]
        if not written:
            return False
        node, length = self.random.choice(written)
        place = self.random.randrange(length)
        flip = self.random.randrange(1, 256)
        for content in (node.disk, node.data):
            if place < len(content):
                content[place] ^= flip
        return True

    def cut(self) -> None:
        kept = self.random.choice((0.0, 0.3, 0.7, 1.0))
        moves = self.moves
        if self.random.random() < 0.5:  # a file system that keeps their order
            moves = moves[: self.random.randint(0, len(moves))]
        else:
            moves = [move for move in moves if self.random.random() < 0.5]
        for move in moves:
            for path, node in move:
                self._move(self.lasting, path, node)
        self.moves = []
        self.names = dict(self.lasting)
        for node in dict.fromkeys(self.names.values()):
            node.cut(self.random, kept)

    @staticmethod
    def _move(names: dict[Path, Node], path: Path, node: Node | None) -> None:
        if node is None:
            names.pop(path, None)
        else:
            names[path] = node

    def bind(self, *move: tuple[Path, Node | None]) -> None:
        for path, node in move:
            self._move(self.names, path, node)
        self.moves.append(move)

    def sync_names(self, directory: Path) -> None:
        here = [move for move in self.moves if move[0][0].parent == directory]
        for move in here:
            for path, node in move:
                self._move(self.lasting, path, node)
        self.moves = [move for move in self.moves if move[0][0].parent != directory]


class DiskFiles:
    """`Files` of one process. Each call may be its last; `breathe` lets others run meanwhile."""

    def __init__(
        self,
        disk: Disk,
        boot_id: str,
        point: Callable[[], None],
        breathe: Callable[[], None],
        tempt: Callable[[float], None],
    ) -> None:
        """`tempt`: something rare has happened, and a crash soon would be of interest."""
        self.disk = disk
        self._tempt = tempt
        self.alive = True
        self._boot_id = boot_id
        self._point = point
        self._breathe = breathe
        self._open: dict[int, Node] = {}
        self._next = 3

    def _enter(self) -> None:
        if not self.alive:
            raise Killed
        self._point()
        self._breathe()
        if not self.alive:
            raise Killed

    def _fail(self, probability: float, number: int = errno.EIO) -> None:
        if probability and self.disk.random.random() < probability:
            self.disk.faults += 1
            self._tempt(0.02)
            raise OSError(number, os.strerror(number))

    def _new_fd(self, node: Node) -> int:
        self._next += 1
        self._open[self._next] = node
        return self._next

    # -- Files -------------------------------------------------------------------------------------

    def create(self, path: Path, /) -> int:
        self._enter()
        if path in self.disk.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if self.disk.weather.full:
            self._fail(1.0, errno.ENOSPC)
        self._tempt(0.05)
        node = Node()
        self.disk.bind((path, node))
        return self._new_fd(node)

    def open(self, path: Path, /) -> int:
        self._enter()
        node = self.disk.names.get(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return self._new_fd(node)

    def close(self, fd: int, /) -> None:
        if not self.alive:
            raise Killed
        del self._open[fd]

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        self._enter()
        self._fail(self.disk.weather.read)
        return bytes(self._open[fd].data[offset : offset + length])

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        if not self.alive:
            raise Killed
        node, weather = self._open[fd], self.disk.weather
        try:
            self._enter()
        except Killed:
            # Killed in the middle of the call: what was copied by then is there.
            if self.disk.random.random() < 0.5:
                node.write(data[: self.disk.random.randrange(len(data))], offset)
            raise
        if weather.pwrite and self.disk.random.random() < weather.pwrite:
            self.disk.faults += 1
            if self.disk.random.random() < 0.5:
                node.write(data[: self.disk.random.randrange(len(data) + 1)], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if weather.short and self.disk.random.random() < weather.short:
            self.disk.faults += 1
            data = data[: self.disk.random.randrange(len(data))]
        if data:
            node.write(data, offset)
        return len(data)

    def ftruncate(self, fd: int, length: int, /) -> None:
        self._enter()
        self._fail(self.disk.weather.truncate)
        self._open[fd].resize(length)

    def posix_fallocate(self, fd: int, offset: int, length: int, /) -> None:
        self._enter()
        if self.disk.weather.full:
            self._fail(1.0, errno.ENOSPC)
        node = self._open[fd]
        if offset + length > len(node.data):
            node.resize(offset + length)

    def size(self, fd: int, /) -> int:
        return len(self._open[fd].data)

    def fsync(self, fd: int, /) -> None:
        if not self.alive:
            raise Killed
        node, weather, random = self._open[fd], self.disk.weather, self.disk.random
        begun = {sector: len(contents) for sector, contents in node.dirty.items()}
        sizes = len(node.sizes)
        failed = bool(weather.sync) and random.random() < weather.sync
        lie = bool(weather.lie) and random.random() < weather.lie
        self._enter()
        if lie:
            return
        if sizes and node.sizes:
            node.set_disk_size(node.sizes[min(sizes, len(node.sizes)) - 1])
            del node.sizes[:sizes]
        for sector, count in begun.items():
            contents = node.dirty.get(sector)
            if contents is None:
                continue  # cut off meanwhile
            # After a failure the kernel takes all of it for clean: no later sync brings it back.
            if not failed or random.random() < 0.5:
                node.put(sector, contents[min(count, len(contents)) - 1])
            del contents[:count]
            if not contents:
                del node.dirty[sector]
        if failed:
            self.disk.faults += 1
            self._tempt(0.1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    fdatasync = fsync

    def fsync_directory(self, directory: Path, /) -> None:
        self._enter()
        self._fail(self.disk.weather.directory)
        self.disk.sync_names(directory)

    def listdir(self, directory: Path, /) -> list[str]:
        self._enter()
        self._fail(self.disk.weather.read)
        return [path.name for path in self.disk.names if path.parent == directory]

    def stands(self, fd: int, path: Path, /) -> bool:
        return self.disk.names.get(path) is self._open.get(fd)

    def there(self, path: Path, /) -> bool:
        return path in self.disk.names

    def rename(self, old: Path, new: Path, /) -> None:
        self._enter()
        node = self.disk.names.get(old)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(old))
        self.disk.bind((old, None), (new, node))

    def unlink(self, path: Path, /) -> None:
        self._enter()
        if path not in self.disk.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._tempt(0.05)
        self.disk.bind((path, None))

    def read(self, path: Path, /) -> bytes:
        self._enter()
        if path == BOOT_ID:
            return f"{self._boot_id}\n".encode()
        node = self.disk.names.get(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return bytes(node.data)
