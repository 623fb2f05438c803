"""Requests, tokens and open calls a minute, per key and per user: what is admitted, what a refusal
says, and that nothing leaks.
"""

from typing import Any

import openai
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.api import Api
from gwproxy.core.errors import RateLimited
from gwproxy.core.limits import SHARED_S, WINDOW_S, Limit
from gwproxy.state.rates import LOOKS, PARALLEL_WAIT_S, Admission, Rates
from gwproxy.web import error_response


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return Rates(clock)


def refusal(rates: Rates, limits: tuple[Limit, ...], tokens: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        rates.admit(limits, tokens)
    return caught.value


KEY = Limit("key", "key_1", rpm=3)
USER = Limit("user", "user_1", rpm=5)
TOKENS = Limit("key", "key_1", tpm=1000)
PARALLEL = Limit("key", "key_1", max_parallel=2)


# -- what is admitted ------------------------------------------------------------------------------


def test_who_has_no_limits_is_not_counted(rates: Rates) -> None:
    one, other = rates.admit((), 10**9), rates.admit((), 10**9)
    assert one is other
    one.undo()
    other.finish(5)
    assert len(rates) == 0


def test_requests_a_minute(rates: Rates, clock: Clock) -> None:
    for _ in range(3):
        rates.admit((KEY,), 10**9).finish(10**9)
    clock.now += 10
    assert refusal(rates, (KEY,)).retry_after_s == 50
    clock.now += 50
    rates.admit((KEY,), 1)


def test_tokens_are_reserved_at_their_most_and_counted_as_they_were(rates: Rates) -> None:
    first = rates.admit((TOKENS,), 900)
    refusal(rates, (TOKENS,), 200)
    first.finish(150)
    rates.admit((TOKENS,), 850)
    refusal(rates, (TOKENS,), 1)


def test_tokens_used_beyond_what_was_reserved_count_from_the_end_of_the_call(
    rates: Rates, clock: Clock
) -> None:
    call = rates.admit((TOKENS,), 100)
    clock.now += 300
    call.finish(1500)
    error = refusal(rates, (TOKENS,))
    assert error.retry_after_s == 60
    assert error.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 60
    rates.admit((TOKENS,), 1000)


def test_a_call_that_is_longer_than_a_minute_gives_nothing_back_twice(
    rates: Rates, clock: Clock
) -> None:
    call = rates.admit((TOKENS,), 900)
    clock.now += 61
    rates.admit((TOKENS,), 400)
    call.finish(0)
    refusal(rates, (TOKENS,), 601)
    rates.admit((TOKENS,), 600)


def test_calls_at_the_same_time(rates: Rates, clock: Clock) -> None:
    one, _ = rates.admit((PARALLEL,), 1), rates.admit((PARALLEL,), 1)
    clock.now += 3600
    assert refusal(rates, (PARALLEL,)).retry_after_s == PARALLEL_WAIT_S
    one.finish(1)
    rates.admit((PARALLEL,), 1)
    refusal(rates, (PARALLEL,))


def test_all_the_keys_of_a_user_share_what_the_user_may(rates: Rates) -> None:
    other = Limit("key", "key_2", rpm=3)
    for _ in range(3):
        rates.admit((KEY, USER), 1)
    for _ in range(2):
        rates.admit((other, USER), 1)
    assert "this user" in refusal(rates, (other, USER)).message
    rates.admit((other,), 1)
    refusal(rates, (KEY,))


def test_a_key_and_a_user_of_one_name_are_two(rates: Rates) -> None:
    for scope in ("key", "user"):
        rates.admit((Limit(scope, "same", rpm=1),), 1)


def test_a_refused_request_is_counted_nowhere(rates: Rates) -> None:
    """It would keep out the requests that are within the limits."""
    user = Limit("user", "user_1", rpm=100, tpm=1000, max_parallel=2)
    open_call = rates.admit((user,), 900)
    for _ in range(200):
        refusal(rates, (KEY, user), 200)
    open_call.finish(0)
    for _ in range(3):
        rates.admit((KEY, user), 300).finish(300)


# -- how it ends -----------------------------------------------------------------------------------

ALL = Limit("key", "key_1", rpm=1, tpm=1000, max_parallel=1)


def test_what_a_later_check_refuses_was_never_there(rates: Rates) -> None:
    both = (ALL, Limit("user", "user_1", rpm=1, tpm=1000, max_parallel=1))
    for _ in range(10):
        rates.admit(both, 1000).undo()
    rates.admit(both, 1000)


@pytest.mark.parametrize("first", ["undo", "finish"])
@pytest.mark.parametrize("second", ["undo", "finish"])
def test_an_admission_ends_once(rates: Rates, first: str, second: str) -> None:
    limit = Limit("key", "key_1", tpm=1000, max_parallel=2)

    def end(admission: Admission, how: str) -> None:
        if how == "undo":
            admission.undo()
        else:
            admission.finish(100)

    rates.admit((limit,), 300)
    call = rates.admit((limit,), 300)
    end(call, first)
    end(call, second)
    used = 300 if first == "undo" else 400
    refusal(rates, (limit,), 1001 - used)
    rates.admit((limit,), 1000 - used)
    refusal(rates, (limit,), 0)


# -- changed limits --------------------------------------------------------------------------------


def test_a_limit_that_was_changed_holds_for_the_next_request(rates: Rates) -> None:
    rates.admit((KEY,), 1)
    rates.admit((KEY,), 1)
    lower, higher = Limit("key", "key_1", rpm=1), Limit("key", "key_1", rpm=10)
    refusal(rates, (lower,))
    rates.admit((higher,), 1)


def test_a_new_limit_on_parallel_calls_knows_those_that_any_limit_counted(rates: Rates) -> None:
    rates.admit((KEY,), 1)
    rates.admit((KEY,), 1)
    refusal(rates, (PARALLEL,))


# -- what a refusal says ---------------------------------------------------------------------------


def test_a_refusal_says_whose_limit_which_and_until_when(rates: Rates, clock: Clock) -> None:
    limit = Limit("key", "key_1", rpm=2, tpm=5000)
    rates.admit((limit,), 1000)
    clock.now += 1.5
    rates.admit((limit,), 500)
    clock.now += 20
    error = refusal(rates, (limit,), 100)
    assert (error.status, error.type, error.code) == (429, *["rate_limit_exceeded"] * 2)
    assert error.error_type == "policy_rate"
    assert error.message == (
        "Rate limit of this API key reached: 2 requests per minute. Try again in 39 s."
    )
    assert error.retry_after_s == 39
    assert error.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "40s",
        "x-ratelimit-limit-tokens": "5000",
        "x-ratelimit-remaining-tokens": "3500",
        "x-ratelimit-reset-tokens": "40s",
    }


def test_a_refusal_for_tokens_says_how_many_are_left(rates: Rates, clock: Clock) -> None:
    limit = Limit("user", "user_1", tpm=1000)
    rates.admit((limit,), 800)
    clock.now += 0.25
    error = refusal(rates, (limit,), 300)
    assert error.message == (
        "Rate limit of this user reached: 1000 tokens per minute, of which 200 are left, and this "
        "request may use 300, with its prompt and its longest answer. Try again in 60 s."
    )
    assert error.headers == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "59.75s",
    }


def test_a_request_that_can_never_fit_is_told_so_and_not_to_come_again(rates: Rates) -> None:
    error = refusal(rates, (KEY, Limit("user", "user_1", tpm=1000)), 1001)
    assert error.message == (
        "Rate limit of this user: 1000 tokens per minute, and this request may use 1001, with its "
        "prompt and its longest answer. It can never fit: shorten the prompt or ask for a lower "
        "maximum of output tokens."
    )
    assert error.retry_after_s is None
    assert error.headers["x-should-retry"] == "false"


def test_a_refusal_for_parallel_calls(rates: Rates) -> None:
    rates.admit((PARALLEL,), 1)
    rates.admit((PARALLEL,), 1)
    error = refusal(rates, (PARALLEL,))
    assert error.message == (
        "Rate limit of this API key reached: 2 requests at the same time. Try again in 1 s."
    )
    assert error.headers == {}


def test_of_several_reasons_the_one_that_lasts_longest_is_told(rates: Rates, clock: Clock) -> None:
    key = Limit("key", "key_1", rpm=1, max_parallel=1)
    user = Limit("user", "user_1", rpm=2, tpm=100)
    rates.admit((user,), 0)
    clock.now += 20
    rates.admit((user,), 100)
    error = refusal(rates, (user,))
    assert "this user reached: 100 tokens per minute" in error.message
    assert error.retry_after_s == 60
    clock.now += 20
    rates.admit((key,), 0)
    error = refusal(rates, (key, user))
    assert "this API key reached: 1 requests per minute" in error.message
    assert error.retry_after_s == 60
    clock.now += 59.5
    error = refusal(rates, (key, user))
    assert "this API key reached: 1 requests at the same time" in error.message
    assert "never fit" in refusal(rates, (key, user), 101).message


async def test_openais_sdk_sees_a_rate_limit_error(aiohttp_server: Any, rates: Rates) -> None:
    async def answer(request: web.Request) -> web.Response:
        try:
            rates.admit((KEY,), 1)
        except RateLimited as error:
            return error_response(error, "req_1", Api.CHAT, unread=False, degraded=False)
        return web.json_response({"object": "list", "data": []})

    app = web.Application()
    app.router.add_get("/v1/models", answer)
    server = await aiohttp_server(app)
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    url = str(server.make_url("/v1"))
    async with openai.AsyncOpenAI(
        base_url=url, api_key="k", http_client=http, max_retries=0
    ) as client:
        for _ in range(3):
            await client.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            await client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "60"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in caught.value.response.headers


# -- after a restart -------------------------------------------------------------------------------


def test_the_last_minute_is_counted_again_after_a_restart(clock: Clock) -> None:
    limit = Limit("key", "key_1", rpm=4, tpm=1000, max_parallel=1)
    clock.now = 5.0  # a machine that has just started: the minute began before its clock did
    rates = Rates(clock)
    for ago_s in (90.0, 60.0, 59.0, 30.0, 2.0):
        rates.replay(clock.now - ago_s, (limit,), 250)
    rates.admit((limit,), 250).finish(250)
    assert refusal(rates, (limit,), 1).retry_after_s == 1
    clock.now += 1
    rates.admit((limit,), 250)


def test_what_is_replayed_from_the_future_or_out_of_order_is_counted_no_longer_than_a_minute(
    rates: Rates, clock: Clock
) -> None:
    # A wall clock that was set back while the records were written.
    for at in (clock.now + 900, clock.now - 20, clock.now + 30):
        rates.replay(at, (KEY,), 1)
    assert refusal(rates, (KEY,)).retry_after_s == 60
    clock.now += 30
    assert refusal(rates, (KEY,)).retry_after_s == 30
    clock.now += 30
    rates.admit((KEY,), 1)


def test_nothing_is_kept_of_what_is_old_or_without_limits(rates: Rates, clock: Clock) -> None:
    rates.replay(clock.now, (), 10)
    rates.replay(clock.now - 60, (KEY,), 10)
    assert len(rates) == 0


# -- memory ----------------------------------------------------------------------------------------


def limits_of_caller(number: int) -> tuple[Limit, ...]:
    return (Limit("key", f"key_{number}", rpm=9999), Limit("user", f"user_{number}", tpm=1000))


def test_who_has_been_idle_for_a_minute_is_forgotten(rates: Rates, clock: Clock) -> None:
    for number in range(20_000):
        rates.admit(limits_of_caller(number), 10).finish(5)
        clock.now += 0.5
    assert len(rates) <= 2 * 121 + LOOKS


def test_somebody_who_is_always_there_does_not_keep_the_idle_ones(
    rates: Rates, clock: Clock
) -> None:
    busy = Limit("key", "busy", rpm=9999)
    for number in range(1_000):
        rates.admit((busy,), 1).finish(1)
        rates.admit(limits_of_caller(number), 10).finish(5)
        clock.now += 1
    assert len(rates) <= 2 * 61 + LOOKS


def test_a_clock_that_was_set_back_does_not_make_anybody_idle(rates: Rates, clock: Clock) -> None:
    for _ in range(3):
        rates.admit((KEY,), 1).finish(1)
    clock.now -= 50
    refusal(rates, (KEY,))
    clock.now += 61
    refusal(rates, (KEY,))


def test_after_a_rush_the_idle_ones_go_a_few_at_a_time(rates: Rates, clock: Clock) -> None:
    for number in range(1_000):
        rates.admit(limits_of_caller(number), 10).undo()
    clock.now += 60
    for number in range(1_000):
        before = len(rates)
        rates.admit(limits_of_caller(number % 3), 10).finish(1)
        assert before - len(rates) <= LOOKS
    assert len(rates) == 6


def test_even_those_who_are_only_refused_are_forgotten(rates: Rates, clock: Clock) -> None:
    for number in range(1_000):
        refusal(rates, limits_of_caller(number), 1001)
        clock.now += 1
    assert len(rates) <= 2 * 61 + LOOKS


def test_who_has_a_call_open_is_not_forgotten(rates: Rates, clock: Clock) -> None:
    one = Limit("key", "slow", max_parallel=1, tpm=1000)
    call = rates.admit((one,), 10)
    for number in range(1_000):
        clock.now += 1
        rates.admit(limits_of_caller(number), 10).finish(10)
    refusal(rates, (one,))
    call.finish(1010)
    refusal(rates, (one,), 1)
    for number in range(200):
        clock.now += 1
        rates.admit(limits_of_caller(number), 10).finish(10)
    assert len(rates) <= 2 * 61 + LOOKS
    rates.admit((one,), 1000)


# -- properties ------------------------------------------------------------------------------------

# Multiples of 1/64 s are exact in floating point, and so are their differences. Most scripts are
# about what comes within moments, or just before and after a minute.
moments = st.one_of(st.integers(0, 40), st.integers(0, 64 * 70), st.integers(64 * 59, 64 * 61)).map(
    lambda n: n / 64
)
figures = st.none() | st.integers(1, 6)
tokens = st.integers(0, 9)
actions = st.one_of(
    st.tuples(st.just("wait"), moments),
    st.tuples(st.just("back"), moments),
    st.tuples(st.just("admit"), st.tuples(st.integers(0, 2), tokens)),
    st.tuples(st.just("admit"), st.tuples(st.integers(0, 2), tokens)),
    st.tuples(st.just("undo"), st.integers(0, 400)),
    st.tuples(st.just("finish"), st.tuples(st.integers(0, 400), tokens)),
)


def scripts(action: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    """Left to itself, Hypothesis makes lists of five or so."""
    return st.integers(1, most).flatmap(lambda n: st.lists(action, min_size=n, max_size=n))


class Call:
    """One admitted call, as whoever judges remembers it."""

    def __init__(self, at: float, limits: tuple[Limit, ...], tokens: int, call: Admission) -> None:
        self.at = at
        self.limits = limits
        self.reserved = tokens
        self.call = call
        self.open = True
        self.undone = False
        self.used = [(at, tokens)]


class Judge:
    """Keeps every call for ever and adds up anew at each question."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def of(self, limit: Limit) -> list[Call]:
        return [call for call in self.calls if limit in call.limits and not call.undone]

    def requests(self, limit: Limit, after: float) -> int:
        return sum(call.at > after for call in self.of(limit))

    def tokens(self, limit: Limit, after: float) -> int:
        return sum(n for call in self.of(limit) for at, n in call.used if at > after)

    def open(self, limit: Limit) -> int:
        return sum(call.open for call in self.of(limit))

    def allows(self, limit: Limit, tokens: int, now: float, window_s: float) -> bool:
        after = now - window_s
        return (
            (limit.rpm is None or self.requests(limit, after) < limit.rpm)
            and (limit.tpm is None or self.tokens(limit, after) + tokens <= limit.tpm)
            and (limit.max_parallel is None or self.open(limit) < limit.max_parallel)
        )


@settings(deadline=None, max_examples=150)
@given(
    st.tuples(*[st.tuples(figures, figures, figures)] * 3),
    scripts(actions, 100),
)
def test_no_limit_is_ever_passed_in_any_minute_whatever_happens(
    figures: tuple[tuple[int | None, ...], ...], script: list[tuple[str, Any]]
) -> None:
    """Two keys of one user, and a user's key without limits of its own. The judge's clock is the
    real time; the rates' clock may be set back, which may only cost room and never make some."""
    user = Limit("user", "u", *figures[2])
    callers = [(Limit("key", f"k{n}", *figures[n]), user) for n in range(2)] + [(user,)]
    real, clock, stepped = 1000.0, Clock(), False
    rates, judge = Rates(clock), Judge()
    for action, value in script:
        if action == "wait":
            real += value
            clock.now += value
        elif action == "back":
            clock.now -= value
            stepped = stepped or value > 0
        elif action == "admit":
            caller, wanted = value
            limits = callers[caller]
            try:
                admission = rates.admit(limits, wanted)
            except RateLimited as error:
                assert stepped or not all(
                    judge.allows(limit, wanted, real, WINDOW_S + SHARED_S) for limit in limits
                )
                never = any(each.tpm is not None and wanted > each.tpm for each in limits)
                assert (error.retry_after_s is None) == never
                assert never or 1 <= (error.retry_after_s or 0) <= 60
            else:
                assert all(judge.allows(limit, wanted, real, WINDOW_S) for limit in limits)
                judge.calls.append(Call(real, limits, wanted, admission))
        elif judge.calls and action == "undo":
            call = judge.calls[value % len(judge.calls)]
            call.call.undo()
            call.undone = call.undone or call.open
            call.open = False
        elif judge.calls and action == "finish":
            which, used = value
            call = judge.calls[which % len(judge.calls)]
            call.call.finish(used)
            if call.open:
                call.used = [(call.at, min(used, call.reserved))]
                call.used.append((real, max(0, used - call.reserved)))
            call.open = False


@settings(deadline=None, max_examples=100)
@given(scripts(st.tuples(moments, tokens), 60), st.integers(1, 6))
def test_whoever_waits_as_long_as_he_was_told_is_let_in(
    script: list[tuple[float, int]], figure: int
) -> None:
    clock = Clock()
    rates = Rates(clock)
    limits = (Limit("key", "k", rpm=figure), Limit("user", "u", tpm=9))
    for wait_s, wanted in script:
        clock.now += wait_s
        try:
            rates.admit(limits, wanted).finish(wanted)
        except RateLimited as error:
            assert error.retry_after_s is not None
            clock.now += error.retry_after_s
            rates.admit(limits, wanted).finish(wanted)
