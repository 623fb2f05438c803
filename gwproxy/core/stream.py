"""What a stream says while its bytes pass: text metered, usage kept, its end recognised.

Pure: bytes in, the bytes that may leave now out. The unit that is passed on is the event: a whole
one leaves in the step in which its last byte arrives, an unfinished one waits for its end. So an
error event or a comment of our own can be put in at any moment without breaking one in two, and
the usage-only chunk that only we asked for can be left out.
"""

import json
from typing import Any

import orjson

from gwproxy.core.errors import GatewayError
from gwproxy.core.meter import ERROR, FINISH, TEXT, TOOL, USAGE, USAGE_ONLY, Meter
from gwproxy.core.sse import ErrorData, SseScanner

HOLD_LIMIT = 64 * 1024
"""Bytes of one unfinished event that wait for its end; a longer one is passed on in pieces."""

COMMENT_LIMIT = 16 * 1024
"""Bytes of comments that leave before a stream's first word; what is more is let go. Clients ignore
them, and a stream must not come to count by them."""

INTERRUPTED = GatewayError(
    "The upstream ended the stream before its answer was complete.",
    status=502,
    type="upstream_error",
    code="stream_interrupted",
)
"""A clean end would look like success to the SDKs; this makes them raise."""

_COMMIT = TEXT | TOOL | FINISH | USAGE


class EventStream:
    """One upstream stream, whatever its API.

    `committed`: an event came after which no other provider may be tried. `done`: the last event
    came. `error`: the value of an in-stream error event. `complete`: the answer came to its own
    end.
    """

    __slots__ = (
        "_comment_room",
        "_held",
        "_held_size",
        "_instead",
        "_part_sent",
        "_scanner",
        "committed",
        "done",
        "error",
        "meter",
    )

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._scanner = SseScanner()
        self._held: list[bytes] = []  # the unfinished event's bytes from earlier chunks
        self._held_size = 0
        self._part_sent = False  # the unfinished event outgrew the limit and is partly gone
        self._comment_room = COMMENT_LIMIT
        self._instead = b""  # what leaves in the place of an event that does not
        self.committed = False
        self.done = False
        self.error: Any = None

    def _event(self, payload: bytes) -> bool:
        """Read one event's payload; False: it is ours alone and is not passed on."""
        raise NotImplementedError

    def error_event(self, error: GatewayError) -> bytes:
        """An event that tells this API's clients that the stream has failed."""
        raise NotImplementedError

    def _read(self, payload: bytes) -> bool:
        """The same of an event that may be named an error. One that is, and in words that are not
        this API's, is told in those: its clients would overlook it, or fail to read it."""
        if type(payload) is not ErrorData:
            return self._event(payload)
        value = parse_event(payload)
        if value is not UNREADABLE:
            leaves = self._event(payload)
            if self.error is not None:
                return leaves
        self._tell_in_its_words(value)
        return False

    def _is_foreign_error(self, value: object) -> bool:
        """Whether an event that says nothing to this API is another one's error."""
        if type(value) is not dict:
            return False
        kind = value.get("type")
        if kind != "error" and (kind is not None or not value.get("error")):
            return False
        self._tell_in_its_words(value)
        return True

    def _tell_in_its_words(self, value: object) -> None:
        self.error = (value.get("error") or value) if value and type(value) is dict else "error"
        self._instead = self.error_event(INTERRUPTED)

    def _take_instead(self) -> bytes:
        instead, self._instead = self._instead, b""
        return instead

    @property
    def complete(self) -> bool:
        """The stream said that it is finished: some servers never send `[DONE]`."""
        return self.error is None and (self.done or self.meter.finished)

    @property
    def at_boundary(self) -> bool:
        """True when what has left ends with a whole event, so that one of ours may follow."""
        return not self._part_sent

    def feed(self, chunk: bytes) -> bytes:
        """Read `chunk` and return what may leave now (often the same object)."""
        # One whole event in one segment is what upstreams send nearly always.
        if not self._held and not self._part_sent:
            start = 6 if chunk.startswith(b"data: ") else _after_name(chunk)
            if start and chunk.find(b"\n", start) == len(chunk) - 2 and chunk.endswith(b"\n\n"):
                return chunk if self._event(chunk[start:-2]) else self._take_instead()
        return self._feed_any(chunk)

    def finish(self) -> bytes:
        """The body ended cleanly: what was held, if it is an event short of its empty line only.

        A fragment that does not parse is let go: it would swallow the error event that follows.
        Unless the answer is complete, the event gets the empty line that it lacks: without it an
        event of ours would become part of it, and a client would not see an error at all.
        """
        held = b"".join(self._held)
        self._held = []
        self._held_size = 0
        payload = self._scanner.flush()
        self._count_unparsed()
        if not payload:
            return b""
        if (
            type(payload) is not ErrorData
            and payload.strip() != b"[DONE]"
            and parse_event(payload) is UNREADABLE
        ):
            if self._part_sent:
                self.meter.observe_unparsed(len(payload))
            return b""
        if not self._read(payload) and not self._part_sent:
            return self._take_instead()
        if self.complete:
            return held
        self._part_sent = False
        return held + b"\n\n"

    def _feed_any(self, chunk: bytes) -> bytes:
        events = self._scanner.feed(chunk)
        let_go = self._count_unparsed()
        leaving: list[bytes] = []
        start = 0
        for payload, end in events:
            # A comment has no payload, and neither has an event that was too big to be read.
            if not payload and not (let_go or self._part_sent or self._may_leave(end - start)):
                pass
            elif not payload or self._read(payload) or self._part_sent:
                if self._held:
                    leaving += self._held
                leaving.append(chunk[start:end])
            elif self._instead:
                leaving.append(self._take_instead())
            self._held = []
            self._held_size = 0
            self._part_sent = False
            start = end
        if start < len(chunk):
            rest = chunk[start:] if start else chunk
            size = self._held_size + len(rest)
            if size > HOLD_LIMIT and not (self._part_sent or self.committed):
                rest = self._without_comments(rest)
                size = self._held_size + len(rest)
            if self._part_sent or size > HOLD_LIMIT:
                leaving += self._held
                leaving.append(rest)
                self._held = []
                self._held_size = 0
                self._part_sent = True
            else:
                self._held.append(rest)
                self._held_size = size
        return b"".join(leaving)

    def _may_leave(self, size: int) -> bool:
        """Whether an event without data may, whose last `size` bytes have come."""
        if self.committed:
            return True
        size += self._held_size
        if size > self._comment_room:
            return False
        self._comment_room -= size
        return True

    def _without_comments(self, rest: bytes) -> bytes:
        """What is held of the unfinished event, and `rest` of it, with its comments let go if it
        has nothing else to say so far. Of a comment under way its mark stays: the rest of it is
        none of an event's lines either."""
        if not self._scanner.silent:
            return rest
        *lines, last = b"".join((*self._held, rest)).split(b"\n")
        self._held = []
        self._held_size = 0
        kept = [line for line in lines if not line.startswith(b":")]
        return b"\n".join((*kept, last[:1]))

    def _count_unparsed(self) -> bool:
        """True: there was something."""
        unparsed, self._scanner.unparsed = self._scanner.unparsed, 0
        if unparsed:
            self.meter.observe_unparsed(unparsed)
        return unparsed > 0


class ChatStream(EventStream):
    """A stream in the OpenAI chat format."""

    __slots__ = ("_drop_usage",)

    def __init__(self, meter: Meter, *, drop_usage: bool) -> None:
        """`drop_usage`: the usage-only chunk was not asked for by the client and stays here."""
        super().__init__(meter)
        self._drop_usage = drop_usage

    def _event(self, payload: bytes) -> bool:
        """Read one event's payload; False: it is ours alone and is not passed on."""
        if self.meter.observe_text(payload):
            self.committed = True
            return True
        if payload == b"[DONE]":
            self.done = self.committed = True
            return True
        value = parse_event(payload)
        if value is UNREADABLE:
            if payload.strip() == b"[DONE]":
                self.done = self.committed = True
            else:
                self.meter.observe_unparsed(len(payload))
            return True
        flags = self.meter.observe(value)
        if flags & _COMMIT:
            self.committed = True
        if flags & ERROR:
            self.error = value.get("error") or value
        elif not flags and self._is_foreign_error(value):
            return False
        return not (self._drop_usage and flags & (USAGE_ONLY | ERROR) == USAGE_ONLY)

    def error_event(self, error: GatewayError) -> bytes:
        return b"data: %b\n\n" % orjson.dumps(error.envelope())


def _after_name(chunk: bytes) -> int:
    """Where the value of the data line begins that follows an event's name; 0 where none does, and
    where the name is an error's, which is looked at closer."""
    if chunk.startswith(b"event: ") and not chunk.startswith(b"error", 7):
        line = chunk.find(b"\n") + 1
        if chunk.startswith(b"data: ", line):
            return line + 6
    return 0


UNREADABLE = object()


def parse_event(payload: bytes) -> Any:
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        try:
            # Half of a surrogate pair is legal JSON text, which orjson refuses.
            return json.loads(payload)
        except (ValueError, RecursionError):
            return UNREADABLE
