"""Rates: how many requests, tokens and open calls each limited key and user has right now.

Memory only. `admit` checks everything and counts everything in one step without waiting.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from gwproxy.core.errors import RateLimited
from gwproxy.core.limits import WINDOW_S, Limit, Tally, Window, duration, whole_s

PARALLEL_WAIT_S: Final = 1.0
"""Nobody knows when a call will end. A second is short for a person and no storm of retries."""

LOOKS: Final = 4
"""An admission may add two counters, of a key and of its user. Looking at more of the oldest than
that keeps the idle ones from piling up, and no admission has to clear away a thousand."""


class _Counter:
    """What one key or one user has used."""

    __slots__ = ("open", "requests", "tokens", "touched")

    def __init__(self, now: float) -> None:
        self.requests = Window()
        self.tokens = Window()
        self.open = 0
        self.touched = now

    def wait_s(self, limit: Limit, tokens: int, now: float) -> tuple[float, str]:
        """How long this limit keeps the request waiting, and which of its figures does."""
        longest, which = 0.0, ""
        if limit.max_parallel is not None and self.open >= limit.max_parallel:
            longest, which = PARALLEL_WAIT_S, "parallel"
        if limit.rpm is not None:
            wait_s = self.requests.wait_s(now, 1, limit.rpm)
            if wait_s > longest:
                longest, which = wait_s, "requests"
        if limit.tpm is not None:
            wait_s = self.tokens.wait_s(now, tokens, limit.tpm)
            if wait_s > longest:
                longest, which = wait_s, "tokens"
        return longest, which


_Part = tuple[Limit, _Counter, Tally | None, Tally | None]


class Admission:
    """One request that was let in. Whichever of `undo` and `finish` comes first ends it."""

    __slots__ = ("_parts", "_rates", "_tokens")

    def __init__(self, rates: "Rates", parts: tuple[_Part, ...], tokens: int) -> None:
        self._rates = rates
        self._parts = parts
        self._tokens = tokens

    def undo(self) -> None:
        """A later check refused: it never was a request, and no token of it was used."""
        parts, self._parts = self._parts, ()
        for _, counter, request, reserved in parts:
            counter.open -= 1
            if request is not None:
                counter.requests.take_back(request, 1)
            if reserved is not None:
                counter.tokens.take_back(reserved, self._tokens)

    def finish(self, tokens: int) -> None:
        """The call has ended and used `tokens`.

        What was reserved too much is given back where it was counted; what was used beyond counts
        from now on, when it has become known.
        """
        if not self._parts:
            return
        parts, self._parts = self._parts, ()
        excess = tokens - self._tokens
        for limit, counter, _, reserved in parts:
            counter.open -= 1
            if reserved is None:
                continue
            if excess < 0:
                counter.tokens.take_back(reserved, -excess)
            elif excess > 0:
                self._rates.count_late(limit, counter, excess)


class Rates:
    """A limit counts from the moment that it is set: what nothing limits is not counted."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` gives monotonic seconds."""
        self._now = now
        # In the order of their last use, so that the idle ones are found at the front.
        self._counters: OrderedDict[tuple[str, str], _Counter] = OrderedDict()
        # There is nothing to take back where nothing limits, so that all such calls share one.
        self._unlimited = Admission(self, (), 0)

    def __len__(self) -> int:
        """How many keys and users are being counted."""
        return len(self._counters)

    def admit(self, limits: tuple[Limit, ...], tokens: int) -> Admission:
        """Let one request in that may use `tokens`, or raise RateLimited (429) and count nothing.

        Of several reasons to refuse the one that lasts longest is told: whoever waits for it is
        not sent away again by the next.
        """
        if not limits:
            return self._unlimited
        now = self._now()
        self._drop_idle(now)
        longest, refusal = 0.0, None
        counted = []
        for limit in limits:
            counter = self._counter(limit, now)
            wait_s, which = counter.wait_s(limit, tokens, now)
            if wait_s > longest:
                longest, refusal = wait_s, (limit, counter, which)
            counted.append((limit, counter))
        if refusal is not None:
            raise _refused(*refusal, wait_s=longest, tokens=tokens, now=now)
        parts = []
        for limit, counter in counted:
            counter.open += 1
            request = counter.requests.add(now, 1) if limit.rpm is not None else None
            reserved = counter.tokens.add(now, tokens) if limit.tpm is not None else None
            parts.append((limit, counter, request, reserved))
        return Admission(self, tuple(parts), tokens)

    def replay(self, at: float, limits: tuple[Limit, ...], tokens: int) -> None:
        """Count a request of before the start: what its limits were and what it used. `at` is a
        time of this clock, negative perhaps; give the oldest first."""
        now = self._now()
        if at <= now - WINDOW_S:
            return
        for limit in limits:
            counter = self._counter(limit, now)
            if limit.rpm is not None:
                counter.requests.add(min(at, now), 1)
            if limit.tpm is not None:
                counter.tokens.add(min(at, now), tokens)

    def count_late(self, limit: Limit, counter: _Counter, tokens: int) -> None:
        """Tokens that an admitted request used beyond what it had reserved."""
        now = self._now()
        self._touch(limit, counter, now)
        counter.tokens.add(now, tokens)

    def _counter(self, limit: Limit, now: float) -> _Counter:
        counter = self._counters.get((limit.scope, limit.id))
        if counter is None:
            counter = self._counters[limit.scope, limit.id] = _Counter(now)
        else:
            self._touch(limit, counter, now)
        return counter

    def _touch(self, limit: Limit, counter: _Counter, now: float) -> None:
        counter.touched = max(counter.touched, now)
        self._counters.move_to_end((limit.scope, limit.id))

    def _drop_idle(self, now: float) -> None:
        for _ in range(LOOKS):
            oldest = next(iter(self._counters), None)
            if oldest is None:
                return
            counter = self._counters[oldest]
            if counter.touched + WINDOW_S > now:
                return
            if counter.open:
                # A call of more than a minute: its counter stays for as long as it is open.
                counter.touched = now
                self._counters.move_to_end(oldest)
            else:
                del self._counters[oldest]


# -- words ---------------------------------------------------------------------------------------

_WHOSE: Final = {"key": "this API key", "user": "this user"}


def _refused(
    limit: Limit, counter: _Counter, which: str, *, wait_s: float, tokens: int, now: float
) -> RateLimited:
    whose = _WHOSE[limit.scope]
    headers: dict[str, str] = {}
    if limit.rpm is not None:
        headers |= _figures("requests", limit.rpm, counter.requests, now)
    if limit.tpm is not None:
        headers |= _figures("tokens", limit.tpm, counter.tokens, now)
    may_use = f"this request may use {tokens}, with its prompt and its longest answer"
    if wait_s == math.inf:
        # One request is never above a limit of requests, so these are tokens. An SDK would retry
        # in vain: it is told not to, and no time is named after which it might.
        return RateLimited(
            f"Rate limit of {whose}: {limit.tpm} tokens per minute, and {may_use}. It can never "
            "fit: shorten the prompt or ask for a lower maximum of output tokens.",
            headers={**headers, "x-should-retry": "false"},
        )
    retry_after_s = whole_s(wait_s)
    if which == "parallel":
        reached = f"{limit.max_parallel} requests at the same time"
    elif which == "requests":
        reached = f"{limit.rpm} requests per minute"
    else:
        left = headers["x-ratelimit-remaining-tokens"]
        reached = f"{limit.tpm} tokens per minute, of which {left} are left, and {may_use}"
    return RateLimited(
        f"Rate limit of {whose} reached: {reached}. Try again in {retry_after_s} s.",
        retry_after_s=retry_after_s,
        headers=headers,
    )


def _figures(noun: str, limit: int, window: Window, now: float) -> dict[str, str]:
    """OpenAI's three headers about requests or tokens. The reset is to the limit as a whole."""
    return {
        f"x-ratelimit-limit-{noun}": str(limit),
        f"x-ratelimit-remaining-{noun}": str(max(0, limit - window.used(now))),
        f"x-ratelimit-reset-{noun}": duration(window.reset_s(now)),
    }
