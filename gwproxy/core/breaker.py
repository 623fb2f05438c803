"""A provider's circuit breaker: when it is left alone, and how it is found to be back. Pure.

Time comes in as monotonic seconds and chance as a draw from [0, 1). Who asks is let in under a
number, and hands it back with what came of it: so an outcome counts for the time in which its
request was let in, and a straggler changes nothing.
"""

import enum
from collections.abc import Mapping
from typing import Final

import msgspec


class State(enum.StrEnum):
    CLOSED = "closed"  # everybody is let in
    OPEN = "open"  # nobody is, until its time is over
    HALF_OPEN = "half_open"  # one at a time is, as a probe
    DISABLED = "disabled"  # nobody is, until an admin says so


class Event(enum.Enum):
    FAILED_ENOUGH = enum.auto()
    DUE = enum.auto()
    PROBE_FAILED = enum.auto()
    SUCCEEDED_ENOUGH = enum.auto()
    RESET = enum.auto()
    DISABLE = enum.auto()
    ENABLE = enum.auto()


MOVES: Final[Mapping[State, Mapping[Event, State]]] = {
    State.CLOSED: {
        Event.FAILED_ENOUGH: State.OPEN,
        Event.RESET: State.CLOSED,
        Event.DISABLE: State.DISABLED,
    },
    State.OPEN: {
        Event.DUE: State.HALF_OPEN,
        Event.RESET: State.CLOSED,
        Event.DISABLE: State.DISABLED,
    },
    State.HALF_OPEN: {
        Event.PROBE_FAILED: State.OPEN,
        Event.SUCCEEDED_ENOUGH: State.CLOSED,
        Event.RESET: State.CLOSED,
        Event.DISABLE: State.DISABLED,
    },
    State.DISABLED: {
        Event.ENABLE: State.CLOSED,
    },
}
"""All there is: an event that a state does not know changes nothing."""

JITTER: Final = 0.1
"""An open time is up to a tenth shorter than configured: many gateways that lost a provider in the
same second must not all come back to it in the same one."""


class Terms(msgspec.Struct, frozen=True):
    failure_threshold: int = 3
    success_threshold: int = 2
    open_s: float = 60.0
    probe_s: float = 60.0
    """A probe that has said nothing for so long gives its place to another."""


class Breaker:
    """One provider's. `state` and `number` are all that the usual request reads."""

    __slots__ = (
        "_opened_at",
        "broken",
        "failures",
        "number",
        "state",
        "successes",
        "terms",
        "until",
    )

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.state = State.CLOSED
        self.number = 0
        """Under which whoever is let in now goes; of a half-open one, its last probe's."""
        self.failures = 0
        """In a row, of requests that got no answer."""
        self.broken = 0
        """In a row, of answers that broke off."""
        self.successes = 0
        """Of probes, since it is half-open."""
        self.until = 0.0
        """Open: when it is due. Half-open: when the place of the probe under way is free again."""
        self._opened_at = 0
        """The number that was current when it opened: probes have higher ones."""

    # -- before an attempt -------------------------------------------------------------------------

    def may_ask(self, now: float) -> bool:
        """Whether `ask` would let one in."""
        state = self.state
        return state is State.CLOSED or (state is not State.DISABLED and now >= self.until)

    def ask(self, now: float) -> int | None:
        """The number to go under; None: the provider is to be left alone."""
        if self.state is State.CLOSED:
            return self.number
        if not self.may_ask(now):
            return None
        self._on(Event.DUE)
        self.number += 1
        self.until = now + self.terms.probe_s
        return self.number

    def wait_s(self, now: float) -> float | None:
        """How long until somebody may be let in; None: nobody can say."""
        if self.state is State.DISABLED:
            return None
        return 0.0 if self.state is State.CLOSED else max(0.0, self.until - now)

    # -- what came of it ---------------------------------------------------------------------------

    def answered(self, number: int) -> None:
        """An answer came: all of one, or the first words of a stream."""
        if self.state is not State.CLOSED:
            self._probe_succeeded(number)
        elif number == self.number:
            self.failures = 0

    def alive(self, number: int) -> None:
        """It refused the request, and so is there; that says nothing about failures before."""
        if self.state is not State.CLOSED:
            self._probe_succeeded(number)

    def failed(self, number: int, now: float, draw: float) -> None:
        """No answer came, or one that only a provider in trouble gives."""
        if number != self.number:
            return
        if self.state is State.CLOSED:
            self.failures += 1
            self._open_at_last(self.failures, now, draw)
        elif self._on(Event.PROBE_FAILED):
            self._open(now, draw)

    def completed(self, number: int) -> None:
        """A stream came to its end."""
        if number == self.number:
            self.broken = 0

    def broke(self, number: int, now: float, draw: float) -> None:
        """An answer broke off in the middle."""
        if number == self.number and self.state is State.CLOSED:
            self.broken += 1
            self._open_at_last(self.broken, now, draw)

    def left(self, number: int) -> None:
        """Nothing was learned: the client left, or the provider had too much to do."""
        if number == self.number and self.state is State.HALF_OPEN:
            self.until = 0.0

    # -- an admin's word ---------------------------------------------------------------------------

    def reset(self) -> None:
        """As if nothing had happened. What is disabled stays so."""
        if self._on(Event.RESET):
            self._close()

    def disable(self) -> None:
        self._on(Event.DISABLE)

    def enable(self) -> None:
        if self._on(Event.ENABLE):
            self._close()

    # -- across a restart --------------------------------------------------------------------------

    def restore(self, state: State, until: float) -> None:
        """As it was recorded: an open one waits on until `until`; a probe has died with its
        process, so that one is due."""
        if state is State.HALF_OPEN:
            state, until = State.OPEN, 0.0
        self.state = state
        self.until = until

    # ----------------------------------------------------------------------------------------------

    def _on(self, event: Event) -> bool:
        after = MOVES[self.state].get(event)
        if after is None:
            return False
        if after is State.HALF_OPEN:
            self.successes = 0
        self.state = after
        return True

    def _open_at_last(self, count: int, now: float, draw: float) -> None:
        if count >= self.terms.failure_threshold:
            self._on(Event.FAILED_ENOUGH)
            self._open(now, draw)

    def _open(self, now: float, draw: float) -> None:
        self.until = now + self.terms.open_s * (1 - JITTER * draw)
        self._opened_at = self.number

    def _probe_succeeded(self, number: int) -> None:
        if self.state is not State.HALF_OPEN or number <= self._opened_at:
            return
        self.successes += 1
        self.left(number)
        if self.successes >= self.terms.success_threshold:
            self._on(Event.SUCCEEDED_ENOUGH)
            self._close()

    def _close(self) -> None:
        # A number of its own for each time that it is closed: what was let in before is history.
        self.number += 1
        self.failures = self.broken = self.successes = 0
        self.until = 0.0
