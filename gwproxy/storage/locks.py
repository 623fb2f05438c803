"""Locks: what they stand for has one process at a time.

A lock is a file of its own, or a folder, and never the guarded file: closing any descriptor of a
database drops the locks that SQLite holds on it.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class Held(Exception):
    """Somebody else has it. Its text is who, to go into a sentence: ` (1234)`, or nothing."""


def take_folder(folder: Path) -> int:
    """As `take`, of a folder that is one process's own: nobody deletes it beside what it holds. Who
    has it is written in its file `lock`, for the message only."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    note = folder / "lock"
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        note.write_text(f"{os.getpid()}\n")
        note.chmod(0o600)
    except BlockingIOError as error:
        os.close(fd)
        holder = ""
        with suppress(OSError, UnicodeDecodeError):
            holder = note.read_text("ascii").strip()
        raise Held(f" ({holder})" if holder.isdigit() else "") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def stands(fd: int, path: Path) -> bool:
    """Whether the lock file is still there: who finds none makes another one, and has the lock."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def take(path: Path) -> int:
    """Take the lock, making its file when there is none; the descriptor, whose close gives it back.

    Held when another process has it, OSError when the file cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(fd, 0o600)
        # For the message below only: what counts is the lock, which ends with its process.
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise Held(f" ({holder})" if holder.isdigit() else "") from error
    except BaseException:
        os.close(fd)
        raise
    return fd
