"""Every log line: JSON, one object a line, written off the event loop.

The loop only appends text to a queue; a thread empties it ten times a second. A reader of the log
that stands still costs lines, counted and told, never the loop and never memory without bound.
What is logged is decided by the caller, and no caller hands over a key, a prompt or an answer.
"""

import functools
import json
import logging
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
FLUSH_INTERVAL_S = 0.1
BACKLOG_LIMIT = 50_000
"""Lines that wait for a slow reader: about 30 MB at 600 bytes a line."""


class Log:
    """`event` from anywhere; `start` and `stop` around the life of the process."""

    def __init__(self, stream: TextIO | None = None, level: str = "info") -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._threshold = LEVELS[level]
        self.debugging = level == "debug"
        """For hot paths, which need not gather the fields of a line that nobody wants."""
        self._lines: deque[str] = deque()
        self._dropped = 0
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
            self._dropped += 1
        else:
            self._lines.append(line)

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
        parts: list[str] = []
        while self._lines:
            parts.append(self._lines.popleft())
            if len(parts) == 200:  # a bounded write, so that a burst does not hold the GIL
                self._write(parts)
                parts = []
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            parts.append(render(time.time(), "warning", "log lines dropped", {"count": dropped}))
        if parts:
            self._write(parts)

    def _write(self, parts: list[str]) -> None:
        try:
            self._stream.write("".join(parts))
            self._stream.flush()
        except (OSError, ValueError):
            # The reader is gone; the service matters more than its log.
            self._dropped += len(parts)


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
