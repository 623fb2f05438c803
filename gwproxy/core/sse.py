"""Server-sent events, cut out of a byte stream. Pure: bytes in, events out, whatever the split.

An event ends at an empty line (LF LF, CR LF CR LF, or a mixture). Its payload is the text of its
`data:` lines, joined by LF; comments and other fields have none, and of their names only `error`
matters. One event may not grow without bound: past `LINE_LIMIT` its content is let go and only its
length is counted.
"""

LINE_LIMIT = 8 * 1024 * 1024
"""Bytes of one event held for parsing. A model that answers with a picture sends megabytes in one
event; more than this is not a chat chunk, and would let an upstream fill our memory."""

_LINES_LIMIT = 65_536
"""Data lines of one event: each costs memory of its own, however short it is."""


class ErrorData(bytes):
    """The payload of an event that is named `error`: some servers say it nowhere else."""


class SseScanner:
    """Finds where events end. `feed` returns, for each event completed, `(payload, end)`.

    `payload` is `b""` for an event without data (a comment) and for one that was let go; `end` is
    the offset just past the event's empty line in the bytes given to this call.
    """

    __slots__ = (
        "_counting",
        "_data",
        "_error",
        "_line",
        "_line_size",
        "_size",
        "_skipped_counts",
        "_skipping",
        "unparsed",
    )

    def __init__(self) -> None:
        self._line: list[bytes] = []  # pieces of a line whose end has not come
        self._line_size = 0
        self._data: list[bytes] = []  # data lines of the event under way
        self._error = False  # it is named an error
        self._size = 0  # bytes of those lines
        self._counting = False  # the event under way is past the limit: only counted
        self._skipping = False  # the line under way is past it: a data line, or a comment
        self._skipped_counts = False  # it is a data line
        self.unparsed = 0
        """Bytes of data lines let go because of the limit, to be estimated by whoever counts;
        reset by them."""

    @property
    def silent(self) -> bool:
        """Whether the event under way has no data so far, nor is its line under way one of data."""
        if self._data or self._counting:
            return False
        if self._skipping:
            return not self._skipped_counts
        return not self._line or self._line[0].startswith(b":")

    def feed(self, chunk: bytes) -> list[tuple[bytes, int]]:
        lines = chunk.split(b"\n")
        rest = lines.pop()
        events: list[tuple[bytes, int]] = []
        end = 0
        for line in lines:
            end += len(line) + 1
            if self._line or self._skipping:
                line = self._complete(line)
            size = len(line)
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line:
                events.append((self._take(), end))
            elif line.startswith(b"data:"):
                # One space after the colon belongs to the syntax, not to the value.
                self._keep(line[6:] if line[5:6] == b" " else line[5:], size)
            elif line == b"data":
                self._keep(b"", size)
            elif line.startswith(b"event:"):
                self._error = line[6:].strip() == b"error"
        if rest:
            self._hold(rest)
        return events

    def flush(self) -> bytes:
        """The payload of an event that the end of the stream cut short of its empty line."""
        if self._line or self._skipping:
            for payload, _ in self.feed(b"\n"):
                return payload  # the stream ended between the CR and the LF of the empty line
        return self._take()

    def _take(self) -> bytes:
        self._counting = False
        self._size = 0
        error, self._error = self._error, False
        if not self._data:
            return b""
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data = []
        return ErrorData(payload) if error else payload

    def _keep(self, value: bytes, size: int) -> None:
        """A whole data line, of `size` bytes in all."""
        if self._counting:
            self.unparsed += size
        elif self._size + size > LINE_LIMIT or len(self._data) >= _LINES_LIMIT:
            self._let_go()
            self.unparsed += size
        else:
            self._size += size
            self._data.append(value)

    def _let_go(self) -> None:
        """The event is too big: what of it was kept is only counted from here on."""
        self.unparsed += self._size
        self._data = []
        self._counting = True

    def _hold(self, rest: bytes) -> None:
        """The beginning or a further piece of a line whose end has not come."""
        if self._skipping:
            if self._skipped_counts:
                self.unparsed += len(rest)
            return
        self._line.append(rest)
        self._line_size += len(rest)
        if self._line_size + self._size <= LINE_LIMIT:
            return
        # No piece is empty, so the line's first five bytes are in its first five pieces.
        is_data = b"".join(piece[:5] for piece in self._line[:5]).startswith(b"data:")
        if is_data:
            if not self._counting:
                self._let_go()
            self.unparsed += self._line_size
        elif self._line_size <= LINE_LIMIT:
            return  # a comment: what the event's data have taken is not counted against it
        self._line = []
        self._line_size = 0
        self._skipping = True
        self._skipped_counts = is_data

    def _complete(self, tail: bytes) -> bytes:
        """The line under way, now whole; a skipped one becomes a comment."""
        if self._skipping:
            if self._skipped_counts:
                self.unparsed += len(tail)
            self._skipping = False
            return b":"
        self._line.append(tail)
        line = b"".join(self._line)
        self._line = []
        self._line_size = 0
        return line
