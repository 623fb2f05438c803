"""Server-sent events, cut out of a byte stream. Pure: bytes in, events out, whatever the split.

An event ends at an empty line (LF LF, CR LF CR LF, or a mixture). Its payload is the text of its
`data:` lines, joined by LF; comments and other fields have none. One line may not grow without
bound: past `LINE_LIMIT` its content is let go and only its length is counted.
"""

LINE_LIMIT = 8 * 1024 * 1024
"""Bytes of one event held for parsing. A model that answers with a picture sends megabytes in one
event; more than this is not a chat chunk, and would let an upstream fill our memory."""


class SseScanner:
    """Finds where events end. `feed` returns, for each event completed, `(payload, end)`.

    `payload` is `b""` for an event without data (a comment); `end` is the offset just past the
    event's empty line in the bytes given to this call.
    """

    __slots__ = ("_data", "_line", "_line_size", "_open", "_skipping", "unparsed")

    def __init__(self) -> None:
        self._line: list[bytes] = []  # pieces of a line whose end has not come
        self._line_size = 0
        self._data: list[bytes] = []  # data lines of the event under way
        self._open = False  # a line of the event under way was seen
        self._skipping = False  # the line under way is past its limit
        self.unparsed = 0
        """Bytes let go because of the limit, to be estimated by whoever counts; reset by them."""

    @property
    def at_boundary(self) -> bool:
        """True between events: nothing of a next one has been seen."""
        return not self._open and not self._line and not self._skipping

    def feed(self, chunk: bytes) -> list[tuple[bytes, int]]:
        lines = chunk.split(b"\n")
        rest = lines.pop()
        events: list[tuple[bytes, int]] = []
        end = 0
        for line in lines:
            end += len(line) + 1
            if self._line or self._skipping:
                line = self._complete(line)
            if line.endswith(b"\r"):
                line = line[:-1]
            if line:
                self._open = True
                if line.startswith(b"data:"):
                    # One space after the colon belongs to the syntax, not to the value.
                    self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                elif line == b"data":
                    self._data.append(b"")
            else:
                events.append((self._take(), end))
        if rest:
            self._hold(rest)
        return events

    def flush(self) -> bytes:
        """The payload of an event that the end of the stream cut short of its empty line."""
        if self._line or self._skipping:
            self.feed(b"\n")
        return self._take()

    def _take(self) -> bytes:
        self._open = False
        if not self._data:
            return b""
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data = []
        return payload

    def _hold(self, rest: bytes) -> None:
        if self._skipping:
            self.unparsed += len(rest)
            return
        self._line.append(rest)
        self._line_size += len(rest)
        if self._line_size + sum(map(len, self._data)) > LINE_LIMIT:
            self.unparsed += self._line_size
            self._line = []
            self._line_size = 0
            self._data = []
            self._skipping = True

    def _complete(self, tail: bytes) -> bytes:
        """The line under way, now whole; a skipped one becomes a comment."""
        if self._skipping:
            self.unparsed += len(tail)
            self._skipping = False
            return b":"
        self._line.append(tail)
        line = b"".join(self._line)
        self._line = []
        self._line_size = 0
        return line
