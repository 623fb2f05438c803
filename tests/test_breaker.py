"""The breaker: thresholds, one probe at a time, and no way in which it never tries again."""

import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gwproxy.core.breaker import JITTER, MOVES, Breaker, Event, State, Terms

TERMS = Terms(failure_threshold=3, success_threshold=2, open_s=60.0, probe_s=10.0)


def failing(times: int, terms: Terms = TERMS, now: float = 100.0, draw: float = 0.0) -> Breaker:
    breaker = Breaker(terms)
    for _ in range(times):
        number = breaker.ask(now)
        if number is not None:
            breaker.failed(number, now, draw)
    return breaker


def asked(breaker: Breaker, now: float) -> int:
    number = breaker.ask(now)
    assert number is not None
    return number


# -- when it opens -------------------------------------------------------------------------------


def test_three_failures_in_a_row_open_it() -> None:
    assert failing(2).state is State.CLOSED
    breaker = failing(3)
    assert breaker.state is State.OPEN
    assert breaker.ask(100.0) is None
    assert breaker.ask(159.9) is None
    assert breaker.wait_s(110.0) == 50.0


@pytest.mark.parametrize("between", ["answered", "alive", "left"])
def test_only_an_answer_ends_the_row(between: str) -> None:
    breaker = failing(2)
    getattr(breaker, between)(asked(breaker, 100.0))
    breaker.failed(asked(breaker, 100.0), 100.0, 0.0)
    assert breaker.state is (State.CLOSED if between == "answered" else State.OPEN)


def test_many_at_once_open_it_once_and_the_rest_of_them_change_nothing() -> None:
    breaker = Breaker(TERMS)
    numbers = [asked(breaker, 100.0) for _ in range(50)]
    for later, number in enumerate(numbers):
        breaker.failed(number, 100.0 + later, 0.0)
    assert breaker.until == 102.0 + 60.0  # by the third; the others were under way already
    for number in numbers:
        breaker.answered(number)
        breaker.completed(number)
    assert breaker.state is State.OPEN


def test_answers_that_break_off_open_it_though_each_began_well() -> None:
    breaker = Breaker(TERMS)
    for times in range(3):
        assert breaker.state is State.CLOSED, times
        number = asked(breaker, 100.0)
        breaker.answered(number)
        breaker.broke(number, 100.0, 0.0)
    assert breaker.state is State.OPEN
    breaker = Breaker(TERMS)
    for broken in (True, True, False, True, True):
        number = asked(breaker, 100.0)
        breaker.answered(number)
        if broken:
            breaker.broke(number, 100.0, 0.0)
        else:
            breaker.completed(number)
    assert breaker.state is State.CLOSED


@given(st.floats(0, 1, exclude_max=True))
def test_an_open_time_is_as_configured_or_up_to_a_tenth_shorter(draw: float) -> None:
    until = failing(3, draw=draw).until
    assert 100.0 + 60.0 * (1 - JITTER) <= until <= 160.0


# -- how it comes back ---------------------------------------------------------------------------


def test_when_its_time_is_over_one_probe_at_a_time_and_two_successes_close_it() -> None:
    breaker = failing(3)
    first = asked(breaker, 160.0)
    assert breaker.state is State.HALF_OPEN
    assert [breaker.ask(160.0 + later) for later in range(9)] == [None] * 9
    breaker.answered(first)
    assert breaker.state is State.HALF_OPEN
    second = asked(breaker, 161.0)
    assert breaker.ask(161.0) is None
    breaker.alive(second)  # a 4xx: it is there
    assert breaker.state is State.CLOSED
    assert (breaker.failures, breaker.wait_s(161.0)) == (0, 0.0)


def test_a_probe_that_fails_opens_it_for_another_whole_time() -> None:
    breaker = failing(3)
    breaker.answered(asked(breaker, 160.0))
    breaker.failed(asked(breaker, 161.0), 165.0, 0.0)
    assert (breaker.state, breaker.until) == (State.OPEN, 225.0)
    breaker.answered(asked(breaker, 225.0))
    assert breaker.state is State.HALF_OPEN, "the success before that does not count any more"


def test_a_probe_of_which_nothing_is_learned_gives_its_place_to_the_next() -> None:
    breaker = failing(3)
    breaker.left(asked(breaker, 160.0))
    assert breaker.state is State.HALF_OPEN
    assert breaker.ask(160.0) is not None


def test_a_probe_that_never_ends_gives_its_place_away_and_may_still_bring_good_news() -> None:
    breaker = failing(3)
    lost = asked(breaker, 160.0)
    assert breaker.ask(169.9) is None
    other = asked(breaker, 170.0)
    breaker.failed(lost, 171.0, 0.0)
    assert breaker.state is State.HALF_OPEN, "it had no place any more"
    assert breaker.ask(171.0) is None, "nor did it free that of the other"
    breaker.answered(lost)
    breaker.answered(other)
    assert breaker.state is State.CLOSED


def test_what_was_let_in_before_it_opened_says_nothing_afterwards() -> None:
    breaker = Breaker(TERMS)
    old = [asked(breaker, 100.0) for _ in range(9)]
    for number in old[:3]:
        breaker.failed(number, 100.0, 0.0)
    probe = asked(breaker, 160.0)
    for number in old[3:6]:
        breaker.answered(number)
        breaker.alive(number)
    assert breaker.state is State.HALF_OPEN
    breaker.answered(probe)
    breaker.answered(asked(breaker, 161.0))
    for number in old:
        breaker.failed(number, 162.0, 0.0)
        breaker.broke(number, 162.0, 0.0)
    assert (breaker.state, breaker.failures, breaker.broken) == (State.CLOSED, 0, 0)


# -- an admin ------------------------------------------------------------------------------------


def test_a_disabled_one_lets_nobody_in_until_it_is_enabled() -> None:
    for breaker in (Breaker(TERMS), failing(3)):
        breaker.disable()
        breaker.reset()
        assert breaker.state is State.DISABLED
        assert breaker.ask(1e9) is None
        assert breaker.wait_s(1e9) is None
        breaker.enable()
        assert breaker.state is State.CLOSED
        assert breaker.ask(100.0) is not None


def test_a_reset_closes_it_and_forgets() -> None:
    breaker = failing(2)
    breaker.reset()
    breaker.failed(asked(breaker, 100.0), 100.0, 0.0)
    assert breaker.state is State.CLOSED
    breaker = failing(3)
    breaker.reset()
    assert breaker.ask(100.0) is not None
    breaker.enable()
    assert breaker.state is State.CLOSED


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_every_state_is_reached_and_left(state: State, event: Event) -> None:
    assert MOVES[state].get(event, state) in MOVES
    assert any(state in moves.values() for moves in MOVES.values())
    assert any(after is not state for after in MOVES[state].values())


# -- across a restart ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "state", "due"),
    [
        (State.CLOSED, State.CLOSED, 0.0),
        (State.OPEN, State.OPEN, 130.0),
        (State.HALF_OPEN, State.OPEN, 0.0),
        (State.DISABLED, State.DISABLED, 1e9),
    ],
)
def test_what_was_recorded_goes_on(recorded: State, state: State, due: float) -> None:
    breaker = Breaker(TERMS)
    breaker.restore(recorded, 130.0)
    assert breaker.state is state
    if due and state is State.OPEN:
        assert not breaker.may_ask(due - 0.1)
    assert breaker.may_ask(due) is (state is not State.DISABLED)
    if state is State.OPEN:
        assert breaker.ask(due) is not None
        assert breaker.state is State.HALF_OPEN


def test_its_state_is_small() -> None:
    breaker = failing(3)
    values = [getattr(breaker, name) for name in Breaker.__slots__ if name != "_terms"]
    assert sys.getsizeof(breaker) + sum(map(sys.getsizeof, values)) < 1024


# -- whatever happens ----------------------------------------------------------------------------


class Storm(RuleBasedStateMachine):
    """Requests come and go in any order beside a clock and an admin; a model of what was promised
    watches."""

    def __init__(self) -> None:
        super().__init__()
        self.terms = Terms(failure_threshold=2, success_threshold=2, open_s=5.0, probe_s=3.0)
        self.breaker = Breaker(self.terms)
        self.now = 1000.0
        self.under_way: list[tuple[int, float, State]] = []

    @rule()
    def ask(self) -> None:
        before = self.breaker.state
        may = self.breaker.may_ask(self.now)
        number = self.breaker.ask(self.now)
        assert (number is not None) is may
        if number is None:
            return
        if before is not State.CLOSED:
            probes = [
                each
                for each in self.under_way
                if each[2] is State.HALF_OPEN
                and self.now - each[1] < self.terms.probe_s
                and each[0] == number - 1
                and before is State.HALF_OPEN
            ]
            assert not probes, "a second probe while the first has its place"
        self.under_way.append((number, self.now, self.breaker.state))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), how=st.sampled_from(["answered", "alive", "failed", "left", "broke"]))
    def end(self, data: st.DataObject, how: str) -> None:
        place = data.draw(st.integers(0, len(self.under_way) - 1))
        number, _, _ = self.under_way.pop(place)
        before, current = self.breaker.state, number == self.breaker.number
        call: dict[str, Callable[[], None]] = {
            "answered": lambda: self.breaker.answered(number),
            "alive": lambda: self.breaker.alive(number),
            "left": lambda: self.breaker.left(number),
            "failed": lambda: self.breaker.failed(number, self.now, 0.5),
            "broke": lambda: self.breaker.broke(number, self.now, 0.5),
        }
        call[how]()
        after = self.breaker.state
        if before is State.CLOSED and after is State.OPEN:
            assert current
            assert how in ("failed", "broke")
        if after is State.CLOSED and before is not State.CLOSED:
            assert before is State.HALF_OPEN
            assert how in ("answered", "alive")
        if not current:
            assert (before, after) in {
                (before, before),
                (State.HALF_OPEN, State.CLOSED),
            }, "a straggler opened it"

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def reset(self) -> None:
        self.breaker.reset()

    @invariant()
    def it_never_wedges(self) -> None:
        """Somebody who waits as long as he is told is let in, even if nobody ever reports."""
        wait_s = self.breaker.wait_s(self.now)
        assert wait_s is not None
        assert wait_s <= max(self.terms.open_s, self.terms.probe_s)
        assert self.breaker.may_ask(self.now + wait_s + 1e-6)

    @invariant()
    def the_counts_stay_below_their_thresholds(self) -> None:
        if self.breaker.state is State.CLOSED:
            assert self.breaker.failures < self.terms.failure_threshold
            assert self.breaker.broken < self.terms.failure_threshold
        assert self.breaker.successes < self.terms.success_threshold


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
