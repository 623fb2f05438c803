"""The few calls by which the journal reaches a disk: a protocol, and the real ones.

Whoever writes through `Files` can be run against a disk that is only played. Nothing here decides.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol


class Files(Protocol):
    """Every call raises OSError. A descriptor is a number that only the same Files knows."""

    def create(self, path: Path, /) -> int:
        """A new file that its owner alone may read and write; FileExistsError if there is one."""

    def open(self, path: Path, /) -> int:
        """A file that is there, to read, write and sync."""

    def close(self, fd: int, /) -> None: ...

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        """Up to `length` bytes; none at or past the end."""

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        """How many bytes were written: after a short write fewer than were given."""

    def ftruncate(self, fd: int, length: int, /) -> None: ...

    def posix_fallocate(self, fd: int, offset: int, length: int, /) -> None:
        """Reserve room on the disk; it reads as zeros, and the file is at least that long."""

    def size(self, fd: int, /) -> int: ...

    def fsync(self, fd: int, /) -> None: ...

    def fdatasync(self, fd: int, /) -> None: ...

    def fsync_directory(self, directory: Path, /) -> None:
        """Make the names in it last: those that came, changed or went."""

    def listdir(self, directory: Path, /) -> list[str]: ...

    def stands(self, fd: int, path: Path, /) -> bool:
        """Whether `path` is the file of this descriptor."""

    def there(self, path: Path, /) -> bool:
        """Whether there is a file of that name."""

    def rename(self, old: Path, new: Path, /) -> None: ...

    def unlink(self, path: Path, /) -> None: ...

    def read(self, path: Path, /) -> bytes:
        """The whole of a small file."""


class OsFiles:
    """The real ones. Descriptors do not outlive an exec, and nothing is opened with O_APPEND, under
    which Linux ignores the offset of a pwrite."""

    close: Callable[[int], None] = staticmethod(os.close)
    pread: Callable[[int, int, int], bytes] = staticmethod(os.pread)
    pwrite: Callable[[int, bytes, int], int] = staticmethod(os.pwrite)
    ftruncate: Callable[[int, int], None] = staticmethod(os.ftruncate)
    # The C library writes zeros itself where a file system cannot reserve.
    posix_fallocate: Callable[[int, int, int], None] = staticmethod(os.posix_fallocate)
    fsync: Callable[[int], None] = staticmethod(os.fsync)
    fdatasync: Callable[[int], None] = staticmethod(os.fdatasync)
    rename: Callable[[Path, Path], None] = staticmethod(os.replace)
    unlink: Callable[[Path], None] = staticmethod(os.unlink)

    def create(self, path: Path, /) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, path: Path, /) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def size(self, fd: int, /) -> int:
        return os.fstat(fd).st_size

    def fsync_directory(self, directory: Path, /) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def listdir(self, directory: Path, /) -> list[str]:
        return os.listdir(directory)

    def stands(self, fd: int, path: Path, /) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            return False

    def there(self, path: Path, /) -> bool:
        try:
            os.stat(path)
        except FileNotFoundError:
            return False
        return True

    def read(self, path: Path, /) -> bytes:
        return path.read_bytes()


OS_FILES: Final[Files] = OsFiles()


def make_private(directory: Path) -> None:
    """See to it that the folder is there, outlives a power cut, and is closed to everybody else."""
    try:
        directory.mkdir(mode=0o700)
        OS_FILES.fsync_directory(directory.parent)
    except FileExistsError:
        pass
    directory.chmod(0o700)
