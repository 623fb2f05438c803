"""Limits per minute: what a key and a user may do in one, and the window that counts it.

Pure: time comes in as an argument, in seconds of any clock; waits go out in seconds.
"""

import math
from typing import Final, Literal

import msgspec

from gwproxy.core.identity import ApiKey, User

WINDOW_S: Final = 60.0

SHARED_S: Final = 0.5
"""What comes within half a second is one tally, which leaves with the last that it holds. It keeps
a window to some 120 of them at any rate, and up to two a second are timed one by one."""


class Limit(msgspec.Struct, frozen=True):
    """What one key, or one user with all of its keys, may do. None means no limit."""

    scope: Literal["key", "user"]
    id: str
    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None


def limits_of(key: ApiKey, user: User) -> tuple[Limit, ...]:
    """What limits a call with this key. Most have no limits and cost no object."""
    limits: tuple[Limit, ...] = ()
    if not (key.rpm is None and key.tpm is None and key.max_parallel is None):
        limits += (Limit("key", key.key_id, key.rpm, key.tpm, key.max_parallel),)
    if not (user.rpm is None and user.tpm is None and user.max_parallel is None):
        limits += (Limit("user", user.user_id, user.rpm, user.tpm, user.max_parallel),)
    return limits


class Tally(msgspec.Struct, gc=False):
    """What was counted at one moment and shortly after it."""

    amount: int
    began: float
    leaves: float


class Window:
    """What was counted in the last 60 seconds, sliding.

    A limit of 60 lets 60 through at once and a 61st only when the first is 60 seconds old: in no
    span of 60 seconds are there more, wherever it begins. A bucket that refills would let 119
    through, a minute of the clock 120. Room comes back at most half a second late, never early.
    A clock that goes back is read as one that stands still.
    """

    __slots__ = ("_latest", "_tallies", "_total")

    def __init__(self) -> None:
        self._tallies: list[Tally] = []  # oldest first
        self._total = 0
        self._latest = -math.inf

    def used(self, now: float) -> int:
        self._advance(now)
        return self._total

    def wait_s(self, now: float, amount: int, limit: int) -> float:
        """How long until `amount` more fit: 0 when they do now, infinity when they never will."""
        now = self._advance(now)
        excess = self._total + amount - limit
        if excess <= 0:
            return 0.0
        for tally in self._tallies:
            excess -= tally.amount
            if excess <= 0:
                return tally.leaves - now
        return math.inf  # all that is counted could leave, and it would still be too much

    def reset_s(self, now: float) -> float:
        """How long until nothing is counted any more, if nothing is added."""
        now = self._advance(now)
        return self._tallies[-1].leaves - now if self._tallies else 0.0

    def add(self, now: float, amount: int) -> Tally:
        """Count `amount`, whatever the limit. The tally is where it can be taken back from."""
        now = self._advance(now)
        self._total += amount
        tallies = self._tallies
        if tallies:
            tally = tallies[-1]
            if now - tally.began < SHARED_S:
                tally.amount += amount
                tally.leaves = now + WINDOW_S
                return tally
        tally = Tally(amount, now, now + WINDOW_S)
        tallies.append(tally)
        return tally

    def take_back(self, tally: Tally, amount: int) -> None:
        """Count `amount` no more. What has left the window already is not taken back twice."""
        amount = min(amount, tally.amount)
        tally.amount -= amount
        self._total -= amount
        while self._tallies and not self._tallies[-1].amount:
            self._tallies.pop()

    def _advance(self, now: float) -> float:
        if now < self._latest:
            return self._latest
        self._latest = now
        tallies = self._tallies
        if tallies and tallies[0].leaves <= now:
            gone = 0
            while gone < len(tallies) and tallies[gone].leaves <= now:
                self._total -= tallies[gone].amount
                tallies[gone].amount = 0
                gone += 1
            del tallies[:gone]
        return now


def whole_s(seconds: float) -> int:
    """A wait for a `Retry-After` header, rounded up. It is never 0, which would make a storm."""
    # What is less than a microsecond is no part of the wait, but how floats add up.
    return max(1, math.ceil(round(seconds, 6)))


def duration(seconds: float) -> str:
    """A wait as OpenAI writes it in its headers, rounded up: `0s`, `120ms`, `8.64s`, `1m0s`."""
    rest_ms = math.ceil(round(seconds * 1000, 3))
    if 0 < rest_ms < 1000:
        return f"{rest_ms}ms"
    minutes, rest_ms = divmod(rest_ms, 60_000)
    whole, fraction = divmod(rest_ms, 1000)
    text = f"{whole}.{fraction:03d}".rstrip("0").rstrip(".") if fraction else str(whole)
    return f"{minutes}m{text}s" if minutes else f"{text}s"
