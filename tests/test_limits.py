"""The window of a minute: never above the limit in any 60 seconds, and room as soon as there is."""

import copy
import math
import re
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.identity import ApiKey, User
from gwproxy.core.limits import (
    SHARED_S,
    WINDOW_S,
    Limit,
    Tally,
    Window,
    duration,
    limits_of,
    whole_s,
)


def admitted(window: Window, times: Iterable[float], limit: int) -> list[float]:
    """The times at which one more was let in."""
    found = []
    for now in times:
        if window.wait_s(now, 1, limit) == 0:
            window.add(now, 1)
            found.append(now)
    return found


# -- sixty a minute --------------------------------------------------------------------------------


def test_sixty_a_minute_are_sixty_at_once_and_the_next_when_these_are_a_minute_old() -> None:
    window = Window()
    assert len(admitted(window, [10.0] * 100, 60)) == 60
    assert admitted(window, [10.5, 40.0, 69.0, 69.996], 60) == []
    assert admitted(window, [70.0] * 100, 60) == [70.0] * 60


def test_a_minute_may_begin_anywhere() -> None:
    # What a counter per minute of the clock gets wrong: 60 in its last second, 60 in its next.
    window = Window()
    assert len(admitted(window, [59.0] * 60, 60)) == 60
    assert admitted(window, [60.0, 61.0, 118.0], 60) == []


def test_nothing_refills_while_the_minute_runs() -> None:
    # What a bucket gets wrong: 60 at once and then one a second.
    window = Window()
    assert len(admitted(window, [0.0] * 60 + [float(s) for s in range(1, 60)], 60)) == 60


@pytest.mark.parametrize(("limit", "every_s"), [(1, 60.0), (60, 1.0), (120, 0.5)])
def test_a_caller_who_keeps_the_pace_is_never_refused(limit: int, every_s: float) -> None:
    times = [n * every_s for n in range(5 * limit)]
    assert admitted(Window(), times, limit) == times


def test_a_faster_pace_loses_less_than_a_hundredth() -> None:
    times = [n / 16 for n in range(16 * 3600)]
    assert 0.99 < len(admitted(Window(), times, 960)) / len(times) <= 1


def test_those_who_came_within_half_a_second_leave_with_the_last_of_them() -> None:
    window = Window()
    assert len(admitted(window, [0.0, 0.25, 0.375, 0.5], 4)) == 4
    assert admitted(window, [60.0, 60.25], 4) == []
    assert len(admitted(window, [60.375] * 4, 4)) == 3
    assert len(admitted(window, [60.5] * 4, 4)) == 1


# -- waiting ---------------------------------------------------------------------------------------


def test_the_wait_ends_when_enough_has_left_and_not_before() -> None:
    window = Window()
    for at, amount in ((0.0, 500), (10.0, 300), (20.0, 200)):
        window.add(at, amount)
    waits = [(1, 40.0), (500, 40.0), (501, 50.0), (800, 50.0), (801, 60.0), (1000, 60.0)]
    for amount, wait_s in waits:
        assert window.wait_s(20.0, amount, 1000) == wait_s
    assert window.wait_s(20.0, 0, 1000) == 0
    assert window.wait_s(20.0, 1, 1001) == 0


def test_what_is_larger_than_the_limit_never_fits() -> None:
    window = Window()
    assert window.wait_s(0.0, 1001, 1000) == math.inf
    assert window.wait_s(0.0, 1000, 1000) == 0


def test_what_was_counted_beyond_a_limit_is_waited_for_as_well() -> None:
    window = Window()
    window.add(0.0, 5000)
    window.add(30.0, 10)
    assert window.wait_s(30.0, 1, 1000) == 30.0
    assert window.used(59.0) == 5010
    assert window.used(60.0) == 10


def test_the_reset_is_when_nothing_is_left() -> None:
    window = Window()
    assert window.reset_s(5.0) == 0
    window.add(5.0, 1)
    window.add(25.0, 1)
    assert window.reset_s(25.0) == 60.0
    assert window.reset_s(66.0) == 19.0
    assert window.reset_s(85.0) == 0


# -- taking back -----------------------------------------------------------------------------------


def test_what_is_taken_back_makes_room_at_once() -> None:
    window = Window()
    tallies = [window.add(0.0, 1) for _ in range(3)]
    assert window.wait_s(0.0, 1, 3) > 0
    window.take_back(tallies[1], 1)
    assert window.used(0.0) == 2
    assert window.wait_s(0.0, 1, 3) == 0
    window.take_back(tallies[0], 1)
    window.take_back(tallies[2], 1)
    assert (window.used(0.0), window.reset_s(0.0)) == (0, 0.0)


def test_what_has_left_is_not_taken_back_a_second_time() -> None:
    window = Window()
    tally = window.add(0.0, 700)
    window.add(61.0, 100)
    window.take_back(tally, 700)
    assert window.used(61.0) == 100


# -- clocks ----------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_stands_still() -> None:
    window = Window()
    window.add(100.0, 1)
    assert window.wait_s(40.0, 1, 1) == 60.0
    window.add(40.0, 1)
    assert window.used(159.0) == 2
    assert window.used(160.0) == 0
    window.add(90.0, 1)  # seen as 160
    assert window.used(219.0) == 1
    assert window.used(220.0) == 0


# -- properties ------------------------------------------------------------------------------------

# Multiples of 1/64 s are exact in floating point, and so are their differences. Most scripts are
# about what comes within moments, or just before and after a minute.
steps = st.one_of(st.integers(0, 40), st.integers(0, 64 * 70), st.integers(64 * 59, 64 * 61)).map(
    lambda n: n / 64
)
actions = st.one_of(
    st.tuples(st.just("wait"), steps),
    st.tuples(st.just("try"), st.integers(0, 12)),
    st.tuples(st.just("force"), st.integers(1, 12)),
    st.tuples(st.just("take back"), st.tuples(st.integers(0, 400), st.integers(0, 12))),
)
# Left to itself, Hypothesis makes lists of five or so.
scripts = st.integers(1, 120).flatmap(lambda n: st.lists(actions, min_size=n, max_size=n))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 20), scripts)
def test_never_more_than_the_limit_in_any_minute_and_never_long_too_few(
    limit: int, script: list[tuple[str, Any]]
) -> None:
    window, now = Window(), 1000.0
    counted: list[tuple[float, list[int], Tally]] = []

    def since(age_s: float) -> int:
        return sum(amount[0] for at, amount, _ in counted if at > now - age_s)

    for action, value in script:
        if action == "wait":
            now += value
        elif action == "take back":
            which, most = value
            if counted:
                _, amount, tally = counted[which % len(counted)]
                less = min(most, amount[0])
                window.take_back(tally, less)
                amount[0] -= less
        else:
            wait_s = window.wait_s(now, value, limit)
            if wait_s == 0:
                assert since(WINDOW_S) + value <= limit
            else:
                assert since(WINDOW_S + SHARED_S) + value > limit
                assert (wait_s == math.inf) == (value > limit)
            if 0 < wait_s < math.inf:
                assert wait_s <= WINDOW_S
                later = copy.deepcopy(window)
                assert later.wait_s(now + wait_s - 1 / 64, value, limit) > 0
                assert later.wait_s(now + wait_s, value, limit) == 0
            if wait_s == 0 or action == "force":
                counted.append((now, [value], window.add(now, value)))
        assert since(WINDOW_S) <= window.used(now) <= since(WINDOW_S + SHARED_S)
        assert (window.reset_s(now) > 0) >= (since(WINDOW_S) > 0)


def test_a_window_is_small_at_any_rate() -> None:
    window, now = Window(), 0.0
    tracemalloc.start()
    try:
        for _ in range(50_000):
            now += 1 / 256
            window.add(now, 1_000)
        assert tracemalloc.get_traced_memory()[0] < 40_000
    finally:
        tracemalloc.stop()
    assert window.used(now) == pytest.approx(256 * 60 * 1_000, rel=0.01)


# -- limits and words ------------------------------------------------------------------------------


def test_only_a_key_or_a_user_with_a_limit_is_looked_at() -> None:
    def limits(key: dict[str, int], user: dict[str, int]) -> tuple[Limit, ...]:
        return limits_of(
            ApiKey(key_id="k", user_id="u", prefix="gw", digest=b"", created_at=0, **key),
            User(user_id="u", created_at=0, **user),
        )

    assert limits({}, {}) == ()
    assert limits({"rpm": 1}, {}) == (Limit("key", "k", rpm=1),)
    assert limits({}, {"tpm": 2}) == (Limit("user", "u", tpm=2),)
    assert limits({"max_parallel": 3}, {"rpm": 4}) == (
        Limit("key", "k", max_parallel=3),
        Limit("user", "u", rpm=4),
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.9991, "1s"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (20.05, "20.05s"),
        (30.0, "30s"),
        (59.9999, "1m0s"),
        (60.0, "1m0s"),
        (13.9 + 60 - 13.9, "1m0s"),  # 60.00000000000001
        (90.951, "1m30.951s"),
        (360.0, "6m0s"),
    ],
)
def test_a_duration_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "whole"),
    [(1e-9, 1), (0.2, 1), (1.0, 1), (1.01, 2), (59.2, 60), (13.9 + 60 - 13.9, 60)],
)
def test_a_wait_in_whole_seconds_is_rounded_up(seconds: float, whole: int) -> None:
    assert whole_s(seconds) == whole


@given(st.integers(0, 64 * 3600).map(lambda n: n / 64))
def test_a_duration_reads_back_as_no_less_and_at_most_a_millisecond_more(seconds: float) -> None:
    found = re.fullmatch(r"(?:(\d+)m)?(?:([\d.]+)s)?|(\d+)ms", duration(seconds))
    assert found is not None
    minutes, rest, thousandths = found.groups()
    read = int(minutes or 0) * 60 + float(rest or 0) + int(thousandths or 0) / 1000
    assert seconds - 1e-9 <= read < seconds + 0.001
