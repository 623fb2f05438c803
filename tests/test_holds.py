"""How much is set aside: the whole table of it, and what holds of every line of it."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gwproxy.core.holds import Ask, Plan, Short, plan, step
from gwproxy.core.identity import UnboundedPolicy
from gwproxy.core.money import Picos
from gwproxy.core.pricing import Rate, Tier

CLAMP, STRICT, BOUNDED = UnboundedPolicy.CLAMP, UnboundedPolicy.STRICT, UnboundedPolicy.BOUNDED

DEFAULT = 4_096
MOST = 16_384


def rate(
    input: int = 1_000, output: int = 1_000, most: int | None = MOST, cache_write: int | None = None
) -> Rate:
    """In nano-USD a token."""
    price, write = Picos(input * 1_000), Picos((cache_write or input) * 1_000)
    tier = Tier(0, price, price, write, Picos(output * 1_000))
    return Rate((tier,), max_output_tokens=most)


PLAIN = rate()  # 1,000 nano-USD for each token, in or out
UNKNOWN = rate(most=None)
FREE = rate(0, 0)


def ask(
    declared: int | None = None,
    *,
    stream: bool = False,
    learned: int | None = None,
    hidden: bool = False,
    choices: int = 1,
    prompt: int = 100,
) -> Ask:
    return Ask(prompt, declared, choices, stream, hidden, learned)


def room_for(output: int, prompt: int = 100) -> int:
    """What `PLAIN` costs at the most for so many tokens."""
    return (prompt + output) * 1_000


def planned(output: int, *, lowered: int | None = None, grows: bool = False) -> Plan:
    return Plan(room_for(output), output, lowered, grows)


def short(needed: int, fits: int = 0) -> Short:
    return Short(room_for(needed), fits)


UNLIMITED = None
PLENTY = room_for(10**9)

TABLE = {
    # A declared maximum fits, or is refused with the one that would: it is never lowered.
    "declared": (ask(500), PLAIN, CLAMP, room_for(500), planned(500)),
    "declared, strict": (ask(500), PLAIN, STRICT, room_for(500), planned(500)),
    "declared, bounded": (ask(500), PLAIN, BOUNDED, room_for(500), planned(500)),
    "declared, a stream": (ask(500, stream=True, learned=9), PLAIN, CLAMP, PLENTY, planned(500)),
    "declared, out of sight": (ask(500, hidden=True), PLAIN, CLAMP, PLENTY, planned(500)),
    "declared, above the model's own": (ask(99_999), PLAIN, CLAMP, UNLIMITED, planned(99_999)),
    "declared, a token too many": (ask(500), PLAIN, CLAMP, room_for(500) - 1, short(500, 499)),
    "declared, bounded, too many": (ask(500), PLAIN, BOUNDED, room_for(9), short(500, 9)),
    "declared, not even the prompt": (ask(500), PLAIN, CLAMP, room_for(0) - 1, short(500, 0)),
    "declared, less than nothing": (ask(500), PLAIN, CLAMP, -5, short(500, 0)),
    "declared, for each choice": (
        ask(500, choices=3), PLAIN, CLAMP, room_for(1_499), short(1_500, 499)
    ),
    "declared, three choices": (ask(500, choices=3), PLAIN, CLAMP, room_for(1_500), planned(1_500)),
    "declared, a single token": (ask(1), PLAIN, CLAMP, room_for(1), planned(1)),
    # Strict: the model's own maximum, or nothing.
    "strict": (ask(), PLAIN, STRICT, room_for(MOST), planned(MOST)),
    "strict, unlimited": (ask(), PLAIN, STRICT, UNLIMITED, planned(MOST)),
    "strict, short": (ask(), PLAIN, STRICT, room_for(MOST) - 1, short(MOST, MOST - 1)),
    "strict, a stream": (ask(stream=True, learned=9), PLAIN, STRICT, PLENTY, planned(MOST)),
    "strict, choices": (ask(choices=2), PLAIN, STRICT, PLENTY, planned(2 * MOST)),
    "strict, no maximum known": (
        ask(), UNKNOWN, STRICT, PLENTY, planned(DEFAULT, lowered=DEFAULT)
    ),
    "strict, no maximum known, unlimited": (
        ask(choices=2), UNKNOWN, STRICT, UNLIMITED, planned(2 * DEFAULT, lowered=DEFAULT)
    ),
    # Streams: a first hold that grows.
    "stream": (ask(stream=True), PLAIN, CLAMP, PLENTY, planned(1_024, grows=True)),
    "stream, unlimited": (ask(stream=True), PLAIN, CLAMP, UNLIMITED, planned(1_024, grows=True)),
    "stream, learned": (
        ask(stream=True, learned=700), PLAIN, CLAMP, PLENTY, planned(700, grows=True)
    ),
    "stream, learned to be long": (
        ask(stream=True, learned=9_000), PLAIN, CLAMP, PLENTY, planned(9_000, grows=True)
    ),
    "stream, learned to be short": (
        ask(stream=True, learned=3), PLAIN, CLAMP, PLENTY, planned(64, grows=True)
    ),
    "stream, learned beyond the model": (
        ask(stream=True, learned=99_999), PLAIN, CLAMP, PLENTY, planned(MOST, grows=True)
    ),
    "stream, clipped": (
        ask(stream=True), PLAIN, CLAMP, room_for(500), planned(500, grows=True)
    ),
    "stream, learned and clipped": (
        ask(stream=True, learned=700), PLAIN, CLAMP, room_for(64), planned(64, grows=True)
    ),
    "stream, not worth it": (ask(stream=True), PLAIN, CLAMP, room_for(63), short(64, 63)),
    "stream, not even the prompt": (ask(stream=True), PLAIN, CLAMP, room_for(-1), short(64, 0)),
    "stream, choices": (
        ask(stream=True, choices=2), PLAIN, CLAMP, PLENTY, planned(2_048, grows=True)
    ),
    "stream, choices, learned for all": (
        ask(stream=True, choices=2, learned=700), PLAIN, CLAMP, PLENTY, planned(700, grows=True)
    ),
    "stream, choices, not worth it": (
        ask(stream=True, choices=2), PLAIN, CLAMP, room_for(63), short(64, 31)
    ),
    "stream, no maximum known": (
        ask(stream=True, learned=99_999), UNKNOWN, CLAMP, PLENTY, planned(99_999, grows=True)
    ),
    "stream, a model of few words": (
        ask(stream=True), rate(most=20), CLAMP, room_for(20), planned(20, grows=True)
    ),
    "stream, a model of few words, short": (
        ask(stream=True), rate(most=20), CLAMP, room_for(19), short(20, 19)
    ),
    "stream, bounded": (ask(stream=True), PLAIN, BOUNDED, PLENTY, planned(1_024, grows=True)),
    # Not a stream: the model's own maximum where that takes no more than a quarter of what is left.
    "whole": (ask(), PLAIN, CLAMP, 4 * room_for(MOST), planned(MOST)),
    "whole, unlimited": (ask(), PLAIN, CLAMP, UNLIMITED, planned(MOST)),
    "whole, choices": (ask(choices=2), PLAIN, CLAMP, 4 * room_for(2 * MOST), planned(2 * MOST)),
    "whole, more than a quarter": (
        ask(), PLAIN, CLAMP, 4 * room_for(MOST) - 1, planned(DEFAULT, lowered=DEFAULT)
    ),
    "whole, choices, more than a quarter": (
        ask(choices=2), PLAIN, CLAMP, 4 * room_for(MOST), planned(2 * DEFAULT, lowered=DEFAULT)
    ),
    "whole, learned": (
        ask(learned=700), PLAIN, CLAMP, room_for(MOST), planned(1_400, lowered=1_400)
    ),
    "whole, learned to be short": (
        ask(learned=10), PLAIN, CLAMP, room_for(MOST), planned(256, lowered=256)
    ),
    "whole, learned to be long": (
        ask(learned=9_000), PLAIN, CLAMP, room_for(MOST), planned(DEFAULT, lowered=DEFAULT)
    ),
    "whole, learned for all choices": (
        ask(learned=700, choices=2), PLAIN, CLAMP, room_for(MOST), planned(1_400, lowered=700)
    ),
    "whole, what fits": (
        ask(learned=700), PLAIN, CLAMP, room_for(900), planned(900, lowered=900)
    ),
    "whole, what fits for each choice": (
        ask(choices=3), PLAIN, CLAMP, room_for(1_000), planned(999, lowered=333)
    ),
    "whole, the least": (ask(), PLAIN, CLAMP, room_for(64), planned(64, lowered=64)),
    "whole, not worth it": (ask(), PLAIN, CLAMP, room_for(63), short(64, 63)),
    "whole, choices, not worth it": (
        ask(choices=2), PLAIN, CLAMP, room_for(127), short(128, 63)
    ),
    "whole, not even the prompt": (ask(), PLAIN, CLAMP, room_for(-1), short(64, 0)),
    "whole, less than nothing": (ask(), PLAIN, CLAMP, -5, short(64, 0)),
    "whole, a model of few words": (
        ask(), rate(most=20), CLAMP, room_for(20), planned(20, lowered=20)
    ),
    "whole, a model of few words, short": (
        ask(), rate(most=20), CLAMP, room_for(19), short(20, 19)
    ),
    "whole, no maximum known": (
        ask(), UNKNOWN, CLAMP, PLENTY, planned(DEFAULT, lowered=DEFAULT)
    ),
    "whole, no maximum known, learned": (
        ask(learned=700), UNKNOWN, CLAMP, PLENTY, planned(1_400, lowered=1_400)
    ),
    "whole, no maximum known, unlimited": (ask(), UNKNOWN, CLAMP, UNLIMITED, planned(DEFAULT)),
    # Bounded: what is usual, whatever may come of it.
    "bounded": (ask(), PLAIN, BOUNDED, PLENTY, planned(DEFAULT, grows=True)),
    "bounded, learned": (ask(learned=700), PLAIN, BOUNDED, PLENTY, planned(700, grows=True)),
    "bounded, unlimited": (ask(), PLAIN, BOUNDED, UNLIMITED, planned(DEFAULT, grows=True)),
    "bounded, clipped": (ask(), PLAIN, BOUNDED, room_for(70), planned(70, grows=True)),
    "bounded, short": (ask(), PLAIN, BOUNDED, room_for(63), short(64, 63)),
    # Out of sight: what was learned of such calls is no hold of theirs.
    "hidden stream": (
        ask(stream=True, hidden=True, learned=700), PLAIN, CLAMP, 4 * room_for(MOST), planned(MOST)
    ),
    "hidden stream, unlimited": (
        ask(stream=True, hidden=True, learned=700), PLAIN, CLAMP, UNLIMITED, planned(MOST)
    ),
    "hidden stream, more than a quarter": (
        ask(stream=True, hidden=True), PLAIN, CLAMP, room_for(MOST),
        planned(DEFAULT, lowered=DEFAULT),
    ),
    "hidden stream, learned, more than a quarter": (
        ask(stream=True, hidden=True, learned=700), PLAIN, CLAMP, room_for(MOST),
        planned(1_400, lowered=1_400),
    ),
    "hidden, bounded": (
        ask(hidden=True, learned=700), PLAIN, BOUNDED, 4 * room_for(MOST), planned(MOST)
    ),
    "hidden stream, bounded, more than a quarter": (
        ask(stream=True, hidden=True, learned=700), PLAIN, BOUNDED, room_for(MOST),
        planned(1_400, lowered=1_400),
    ),
    # What costs nothing always fits.
    "free": (ask(), FREE, CLAMP, 0, Plan(0, MOST)),
    "free, declared": (ask(500), FREE, CLAMP, -7, Plan(0, 500)),
    "free, strict": (ask(), FREE, STRICT, -7, Plan(0, MOST)),
    "free, a stream": (ask(stream=True), FREE, CLAMP, -7, Plan(0, 1_024, grows=True)),
    "free, bounded": (ask(), FREE, BOUNDED, -7, Plan(0, DEFAULT, grows=True)),
    "free output": (ask(), rate(output=0), CLAMP, room_for(0), Plan(room_for(0), DEFAULT, DEFAULT)),
    "free output, no room for the prompt": (
        ask(500), rate(output=0), CLAMP, room_for(0) - 1, Short(room_for(0), 0)
    ),
    "free input": (ask(), rate(input=0), CLAMP, 70_000, Plan(70_000, 70, 70)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_what_is_held(name: str) -> None:
    asked, price, policy, left, expected = TABLE[name]
    assert plan(asked, price, policy, left, DEFAULT) == expected


def test_a_default_below_the_least_is_the_operators_word() -> None:
    """He has said that forty tokens are an answer."""
    assert plan(ask(), PLAIN, CLAMP, room_for(500), 40) == planned(40, lowered=40)
    assert plan(ask(), PLAIN, CLAMP, room_for(39), 40) == short(40, 39)


def test_the_dearest_way_to_read_a_prompt_is_what_is_held() -> None:
    written = rate(cache_write=2_000)
    assert plan(ask(50), written, CLAMP, PLENTY, DEFAULT) == Plan(250_000, 50)


@pytest.mark.parametrize(
    ("output", "tokens"), [(0, 256), (2_048, 256), (2_056, 257), (8_000, 1_000)]
)
def test_a_watermark_moves_by_an_eighth_of_the_hold(output: int, tokens: int) -> None:
    assert step(output) == tokens


# -- whatever is asked -----------------------------------------------------------------------------

TIER = st.tuples(
    st.integers(0, 3_000), *[st.sampled_from([0, 1, 37, 1_000, 150_000, 2_000_000])] * 4
)
RATES = st.builds(
    lambda tiers, most: Rate(
        tuple(
            Tier(0 if index == 0 else above, *map(Picos, prices))
            for index, (above, *prices) in enumerate(sorted(tiers))
        ),
        max_output_tokens=most,
    ),
    st.lists(TIER, min_size=1, max_size=3),
    st.none() | st.integers(1, 200_000),
)
ASKS = st.builds(
    Ask,
    prompt=st.integers(0, 5_000),
    declared=st.none() | st.integers(1, 100_000),
    choices=st.integers(1, 5),
    stream=st.booleans(),
    hidden=st.booleans(),
    learned=st.none() | st.integers(0, 100_000),
)
POLICIES = st.sampled_from(list(UnboundedPolicy))
ROOM = st.integers(-(10**6), 10**9) | st.integers(0, 10**5)


@given(ASKS, RATES, POLICIES, ROOM, st.integers(1, 10_000))
def test_no_hold_is_above_what_is_left(
    asked: Ask, price: Rate, policy: UnboundedPolicy, left: int, default: int
) -> None:
    found = plan(asked, price, policy, left, default)
    if isinstance(found, Plan):
        assert found.cost <= left or found.cost == 0
        assert found.cost == price.worst_case(asked.prompt, found.output)
    else:
        assert found.needed > left
        assert found.needed > 0


@given(ASKS, RATES, POLICIES, ROOM, st.integers(1, 10_000))
def test_the_maximum_that_is_said_to_fit_does_and_no_larger_one(
    asked: Ask, price: Rate, policy: UnboundedPolicy, left: int, default: int
) -> None:
    found = plan(asked, price, policy, left, default)
    assume(isinstance(found, Short))
    assert isinstance(found, Short)

    def again(declared: int) -> Plan | Short:
        resent = Ask(
            asked.prompt, declared, asked.choices, asked.stream, asked.hidden, asked.learned
        )
        return plan(resent, price, policy, left, default)

    assert found.fits >= 0
    if found.fits:
        assert isinstance(again(found.fits), Plan)
    assert isinstance(again(found.fits + 1), Short)


@given(ASKS, RATES, POLICIES, st.none() | ROOM, st.integers(1, 10_000))
def test_what_a_plan_says_goes_together(
    asked: Ask, price: Rate, policy: UnboundedPolicy, left: int | None, default: int
) -> None:
    found = plan(asked, price, policy, left, default)
    assume(isinstance(found, Plan))
    assert isinstance(found, Plan)
    if asked.declared is not None:
        assert (found.output, found.lowered, found.grows) == (
            asked.declared * asked.choices,
            None,
            False,
        )
    if found.lowered is not None:
        # What is sent is what is held, and no more than the model can say.
        assert found.lowered * asked.choices == found.output
        assert found.lowered <= (price.max_output_tokens or default)
        assert not found.grows
    if found.grows:
        assert not asked.hidden, "a stream of which only a part is seen cannot be followed"


@given(ASKS, RATES, POLICIES, st.integers(1, 10_000))
def test_without_a_limit_nothing_is_refused(
    asked: Ask, price: Rate, policy: UnboundedPolicy, default: int
) -> None:
    assert isinstance(plan(asked, price, policy, None, default), Plan)


@given(ASKS, RATES, POLICIES, ROOM, st.integers(0, 10**6), st.integers(1, 10_000))
def test_what_fits_also_fits_where_there_is_more_room(
    asked: Ask, price: Rate, policy: UnboundedPolicy, left: int, more: int, default: int
) -> None:
    if isinstance(plan(asked, price, policy, left, default), Plan):
        assert isinstance(plan(asked, price, policy, left + more, default), Plan)
