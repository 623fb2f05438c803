"""Lock files: what they stand for has one process at a time.

A lock is a file of its own and never the guarded one: closing any descriptor of a database drops
the locks that SQLite holds on it.
"""

import fcntl
import os
from pathlib import Path


class Held(Exception):
    """Somebody else has it. Its text is who, to go into a sentence: ` (1234)`, or nothing."""


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
