"""Every log line: JSON, one object a line, written off the event loop.

The loop only appends text to a queue; a thread empties it ten times a second. A reader of the log
that stands still costs lines, counted and told, never the loop and never memory without bound.
What is logged is decided by the caller, and no caller hands over a key, a prompt or an answer.
"""

import functools
import json
import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import orjson

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
FLUSH_INTERVAL_S = 0.1
STDERR: Final = 2
BACKLOG_LIMIT = 50_000
"""Lines that wait for a slow reader: about 30 MB at 600 bytes a line."""


class Torn(OSError):
    """Only a part was written; `lines` is how many were not."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines = lines


class Descriptor:
    """A file descriptor to write text to, with no buffer between: what could not be written now
    does not come out later, in the middle of other lines or as an error when the process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._torn = False

    def write(self, text: str) -> None:
        rest = text.encode("utf-8", "replace")
        try:
            if self._torn:
                os.write(self._fd, b"\n")  # half a line spoils itself alone
                self._torn = False
            while rest:
                written = os.write(self._fd, rest)
                self._torn = rest[written - 1 : written] != b"\n"
                rest = rest[written:]
        except OSError as error:
            raise Torn(rest.count(b"\n")) from error

    def flush(self) -> None:
        pass


class Sink(Protocol):
    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


class Log:
    """`event` from anywhere; `start` and `stop` around the life of the process."""

    def __init__(self, sink: Sink | None = None, level: str = "info") -> None:
        """`sink`: left out, stderr."""
        self._sink = Descriptor(STDERR) if sink is None else sink
        self._threshold = LEVELS[level]
        self.debugging = level == "debug"
        """For hot paths, which need not gather the fields of a line that nobody wants."""
        self._lines: deque[str] = deque()
        # Each is counted by one thread alone: the loop's, the writer's, the writer's.
        self._overflowed = 0
        self._unwritten = 0
        self._told = 0
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def set_level(self, level: str) -> None:
        self._threshold = LEVELS[level]
        self.debugging = level == "debug"

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Queue one line. `fields` are plain values: text, numbers, lists and dicts of them."""
        if LEVELS[level] >= self._threshold:
            self._queue(render(time.time(), level, event, fields))

    def members(self, event: str, text: str) -> None:
        """Queue one line of level info, its members given as JSON: for the line of each request."""
        if self._threshold <= LEVELS["info"]:
            stamp = _stamp(time.time())
            self._queue(f'{{"time":"{stamp}","level":"info","event":"{event}",{text}}}\n')

    def _queue(self, line: str) -> None:
        if len(self._lines) >= BACKLOG_LIMIT:
            self._overflowed += 1
        else:
            self._lines.append(line)

    @property
    def dropped(self) -> int:
        """Lines lost so far."""
        return self._overflowed + self._unwritten

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued and end; waits a second at most for a reader that stands still."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(FLUSH_INTERVAL_S)
            self._flush()
        self._flush()

    def _flush(self) -> None:
        untold = self.dropped - self._told
        parts: list[str] = []
        while self._lines:
            parts.append(self._lines.popleft())
            if len(parts) == 200:  # a bounded write, so that a burst does not hold the GIL
                self._unwritten += self._write(parts)
                parts = []
        if parts:
            self._unwritten += self._write(parts)
        if untold:
            notice = render(time.time(), "warning", "log lines dropped", {"count": untold})
            if not self._write([notice]):
                self._told += untold

    def _write(self, parts: list[str]) -> int:
        """How many were lost: the service matters more than its log."""
        try:
            self._sink.write("".join(parts))
            self._sink.flush()
        except Torn as torn:
            return torn.lines
        except (OSError, ValueError):
            return len(parts)
        return 0


def render(time_s: float, level: str, event: str, fields: dict[str, Any]) -> str:
    """One line. Foreign text is escaped by JSON, so that nobody can forge a second line."""
    line = {"time": _stamp(time_s), "level": level, "event": event, **fields}
    try:
        return orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE).decode()
    except TypeError:
        # Half a surrogate pair, or an integer beyond 64 bits: seldom, and no reason to lose a line.
        return json.dumps(line, default=str) + "\n"


def _stamp(time_s: float) -> str:
    second = int(time_s)
    return _second(second) + _MILLIS[int((time_s - second) * 1000)]


_MILLIS: Final = tuple(f".{number:03d}Z" for number in range(1000))
"""Looked up, because padding a number costs more than all else in a stamp."""


@functools.lru_cache(maxsize=4)
def _second(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class ForeignRecords(logging.Handler):
    """Lines of libraries, cut down to what cannot hold a secret.

    aiohttp's server logs a malformed request whole, credentials and prompt included, and others
    put their messages together themselves: so of a record only the place and the kind of the
    exception are kept.
    """

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        exception = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        self._log.event(
            "error" if record.levelno >= logging.ERROR else "warning",
            "library message",
            logger=record.name,
            exception=exception,
            where=f"{record.module}:{record.lineno}",
        )


def capture_libraries(log: Log) -> None:
    """Send what libraries log through `log`; nothing of theirs reaches stderr by itself."""
    root = logging.getLogger()
    root.handlers[:] = [ForeignRecords(log)]
    root.setLevel(logging.WARNING)
