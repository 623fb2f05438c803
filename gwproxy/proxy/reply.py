"""One upstream answer while it is undecided: read, metered and held back until it counts.

An answer is decided when the whole of it is there, when it failed, or when a stream committed:
its first event with text, a tool call, a finish reason, usage or `[DONE]`. Until then another
provider may still be tried and the client has seen nothing; at most 64 KiB wait here. A stream that
is passed on without a word yet is still watched for it.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gwproxy.core.meter import Meter
from gwproxy.core.request import ModelRequest
from gwproxy.core.stream import EventStream
from gwproxy.proxy.upstream import (
    ANSWER_TIMEOUT,
    ENCODED,
    FIRST_BYTE_TIMEOUT,
    IDLE_TIMEOUT,
    TOO_LARGE,
    TOTAL_TIMEOUT,
    Connection,
    Failure,
)

HELD_BACK_BYTES = 64 * 1024
"""A stream whose events come to this much without a word of answer is passed on as it is. Comments
alone never do: `core.stream` lets go of them before."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an upstream may be silent, in seconds."""

    first_byte_s: float
    answer_s: float
    idle_s: float
    early_commit_s: float
    """0: never. Above: a stream whose head came counts after so long, whatever it has said."""
    total_s: float = math.inf
    """From a request's arrival until an answer counts, over all its attempts."""


class Reply:
    """The answer of one attempt. `events` is set for a stream, `body()` is there for the rest."""

    # What holds until it is known better: class attributes cost a new reply nothing.
    _held_bytes = 0
    _wordless_bytes = 0
    events: EventStream | None = None
    status = 0
    headers: Mapping[str, str] = MappingProxyType({})
    failure: Failure | None = None
    ended = False
    wanted = True
    """False: we were the ones to end it."""
    deadline = math.inf
    """When it has to count at the latest, in monotonic seconds."""
    answer: Mapping[str, Any] = MappingProxyType({})
    """A whole answer parsed, and `whole` its bytes; set by whoever judged it."""
    whole = b""
    on_words: Callable[[], None] | None = None
    """Of a stream that is passed on without a word yet: called when the first one comes."""
    first_byte_at = 0.0
    longest_gap_s = 0.0

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        connection: Connection,
        meter: Meter,
        patience: Patience,
        *,
        request: ModelRequest,
        on_accepted: Callable[[], None],
    ) -> None:
        """`on_accepted` is called when a success status comes: from there on what is answered is
        billed."""
        self.decided: asyncio.Future[None] = loop.create_future()
        self._now = now
        self._patience = patience
        self._request = request
        self._asked_stream = request.stream
        self._on_accepted = on_accepted
        self._held: list[bytes] = []
        self.connection = connection
        self.meter = meter
        self.sent_at = self.last_byte_at = now()

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 300

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def body(self) -> bytes:
        """What has been held so far, taken: a whole answer, or the head of a stream."""
        body = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held = []
        self._held_bytes = 0
        return body

    def close(self) -> None:
        """No more of this answer is wanted."""
        if not self.ended:
            self.ended = True
            self.wanted = False
            self.connection.abort()

    # -- the connection's side ---------------------------------------------------------------

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        if self.succeeded:
            self._on_accepted()
            if self.headers.get("content-encoding", "identity").lower() != "identity":
                # Neither can it be metered, nor does the client know what it would get.
                self.connection.fail(ENCODED)
            elif self._asked_stream and self.content_type == "text/event-stream":
                self.events = self._request.events(self.meter)

    def on_body(self, data: bytes) -> None:
        now = self._now()
        if not self.first_byte_at:
            self.first_byte_at = now
        self.last_byte_at = now
        size = len(data)
        if self.events is not None:
            data = self.events.feed(data)
        if data:
            self._held.append(data)
            self._held_bytes += len(data)
        if self.events is None:
            if self._held_bytes > self._request.answer_bytes:
                self.connection.fail(TOO_LARGE)
        elif self.events.committed or self.events.error or self._held_bytes > HELD_BACK_BYTES:
            self._decide()
        else:
            self._count_wordless(size)

    def on_end(self, failure: Failure | None) -> None:
        self.ended = True
        self.failure = failure
        if failure is None and self.events is not None:
            self._held.append(self.events.finish())
        self._decide()

    def tick(self, now: float) -> None:
        patience = self._patience
        if now > self.deadline:
            if not self.decided.done():
                self.connection.fail(TOTAL_TIMEOUT)
        elif not self._asked_stream:
            if now - self.sent_at > patience.answer_s:
                self.connection.fail(ANSWER_TIMEOUT)
        elif self.events is not None and 0 < patience.early_commit_s < now - self.sent_at:
            # Whatever came so far, the client has heard nothing yet.
            self.first_byte_at = self.first_byte_at or now
            self._decide()
        elif not self.first_byte_at:
            if now - self.sent_at > patience.first_byte_s:
                self.connection.fail(FIRST_BYTE_TIMEOUT)
        elif now - self.last_byte_at > patience.idle_s:
            self.connection.fail(IDLE_TIMEOUT)
        elif now - self.sent_at > patience.answer_s and not self.decided.done():
            # Comments alone keep a connection up for ever: a thought may take as long as a whole
            # answer, and then somebody else is asked.
            self.connection.fail(ANSWER_TIMEOUT)

    # -- a stream that is passed on without a word ---------------------------------------------

    def look_for_words(self, received: int) -> None:
        """So many bytes more have come."""
        assert self.events is not None
        if not self.events.committed:
            self._count_wordless(received)
        elif self.on_words is not None:
            on_words, self.on_words = self.on_words, None
            on_words()

    def is_overdue(self, now: float) -> bool:
        return self.on_words is not None and now - self.sent_at > self._patience.answer_s

    def _count_wordless(self, received: int) -> None:
        """However slowly they come: no answer is that long without a word."""
        self._wordless_bytes += received
        if self._wordless_bytes > self._request.answer_bytes:
            self.connection.fail(TOO_LARGE)

    def _decide(self) -> None:
        if not self.decided.done():
            self.decided.set_result(None)
