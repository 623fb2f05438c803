"""The books: what is let in and at what price, that no budget is overdrawn, and who pays."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.chat import ChatRequest
from gwproxy.core.errors import (
    InsufficientQuota,
    InvalidRequest,
    ModelNotPriced,
    RateLimited,
    StorageUnavailable,
)
from gwproxy.core.identity import ApiKey, FailureMode, OnExhausted, UnboundedPolicy, User
from gwproxy.core.ledger import State
from gwproxy.core.period import end_ms
from gwproxy.core.records import Adjust, Alert, AnyRecord, Reserve, Settle
from gwproxy.core.trace import Trace
from gwproxy.state.accounts import Terms
from gwproxy.state.ledger import (
    BELIEVED_AFTER_MS,
    JUMP_MS,
    SETTLEMENT_ROOM_BYTES,
    Clock,
    Ledger,
    Recent,
)
from gwproxy.state.reservation import Outcome, Reservation
from tests.conftest import Front
from tests.harness import (
    ANSWER,
    DONE,
    Received,
    Script,
    Upstream,
    Wire,
    chat,
    delta,
    event,
    events,
    usage_only,
)
from tests.office import (
    DAY,
    INPUT,
    MONTH,
    OUTPUT,
    PROMPT,
    USD,
    Clocks,
    Office,
    amounts,
    answered,
    at_once,
    attempt,
    candidate,
    ends,
    figures_of,
    fold,
    give_spare,
    relays,
    says,
    unanswered,
    uses,
)
from tests.scene import (
    CHUNKED,
    OK,
    asked,
    assert_nothing_left,
    in_chunks,
    metric,
    sends,
    stay_silent,
    stream_then_wait,
    until,
)

TEXT = "The quick brown fox jumps over the lazy dog."
TEXT_TOKENS = 10


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "journal", limit=5 * USD)


def settlement(office: Office) -> Settle:
    """The last request's end."""
    return [record for record in office.records() if isinstance(record, Settle)][-1]


def refusal(office: Office, *names: str, **body: Any) -> InsufficientQuota:
    with pytest.raises(InsufficientQuota) as caught:
        office.reserve(*names, **body)
    return caught.value


# -- what a request may cost -----------------------------------------------------------------------


def test_what_has_no_price_is_not_quoted(office: Office) -> None:
    quote = office.quote("x/unknown", "b/dear")
    assert [each.candidate.model for each in quote.priced] == ["dear"]
    with pytest.raises(ModelNotPriced):
        office.quote("x/unknown")


def test_a_quote_is_what_was_asked(office: Office) -> None:
    office.teach(700)
    quote = office.quote("a/cheap", "e/thinker", "c/free", max_tokens=50, n=2)
    asks = {each.candidate.model: each.ask for each in quote.priced}
    assert [(ask.declared, ask.choices, ask.stream) for ask in asks.values()] == [(50, 2, True)] * 3
    assert [ask.hidden for ask in asks.values()] == [False, True, False]
    assert [ask.learned for ask in asks.values()] == [None] * 3  # nothing is left to be guessed
    quote = office.quote("a/cheap", "e/thinker")
    assert [each.ask.learned for each in quote.priced] == [700, None]
    assert quote.price_version.startswith("test+")


def test_who_asks_a_model_to_think_does_not_see_all_that_he_pays_for(office: Office) -> None:
    [priced] = office.quote(thinking={"type": "enabled"}).priced
    assert priced.ask.hidden


def test_a_prompt_is_counted_where_its_bytes_would_weigh(office: Office) -> None:
    """Up to a hundredth of what is left nobody cares what it is exactly."""
    office.change_user(monthly_limit=None)
    quote = office.quote()
    bound = quote.priced[0].ask.prompt
    assert quote.counted is None
    assert bound >= quote.request.prompt_bound()
    office.change_user(monthly_limit=100 * bound * INPUT)
    assert office.quote().counted is None
    office.change_user(monthly_limit=100 * bound * INPUT - 1)
    assert office.quote().counted == PROMPT
    assert office.quote("a/cheap", "f/claude-4-7").priced[1].ask.prompt == 15


@pytest.mark.parametrize("scope", ["key", "user", "org", "provider", "outage"])
def test_any_small_budget_is_a_reason_to_count(office: Office, scope: str) -> None:
    office.change_user(monthly_limit=USD if scope != "user" else 1_000)
    match scope:
        case "key":
            office.change_key(monthly_limit=1_000)
        case "org":
            office.change_organization(monthly_budget=1_000)
        case "provider":
            office.accounts.terms = Terms(provider_daily={"b": 1_000})
        case "outage":
            office.outage.lost = True
            office.change_organization(fallback_daily_limit=1_000)
    quote = office.quote("a/cheap", "b/dear")
    assert quote.counted == PROMPT


async def test_a_long_prompt_is_counted_while_others_go_on(office: Office) -> None:
    content = "word " * 40_000
    request = ChatRequest.parse(
        json.dumps(chat(messages=[{"role": "user", "content": content}])).encode()
    )
    turns = 0

    async def another() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(another())
        quote = await office.books.quote(office.principal, request, [candidate("a/cheap")])
        task.cancel()
    assert turns >= 6
    assert quote.counted == pytest.approx(40_000, abs=20)


def test_an_organization_may_have_prices_of_its_own(office: Office) -> None:
    usual = office.quote()
    office.change_organization(prices={"a/cheap": {"input": "5", "output": "7"}})
    own = office.quote()
    assert own.priced[0].rate.worst_case(1, 1) == 12_000
    assert own.price_version != usual.price_version
    assert office.quote().priced[0].rate is own.priced[0].rate
    office.change_organization(prices={"a/cheap": {"input": "6", "output": "7"}})
    assert office.quote().priced[0].rate.worst_case(1, 1) == 13_000
    office.change_organization(prices=None)
    assert office.quote().price_version == usual.price_version


# -- what is let in --------------------------------------------------------------------------------


def test_a_request_is_recorded_with_all_that_is_known_of_it(office: Office) -> None:
    office.change_organization(monthly_budget=50 * USD)
    reservation = office.reserve("a/cheap", "b/dear", max_tokens=100)
    [record] = office.records()
    assert isinstance(record, Reserve)
    cheap, dear = (each.plan.cost for each in reservation.chain)
    assert amounts(record.holds) == {
        "key:key_1": dear,
        "user:alice": dear,
        "org:acme": dear,
        "provider:a": cheap,
    }
    assert [line.limit for line in record.holds] == [None, 5 * USD, 50 * USD, None]
    assert [line.total for line in record.holds] == [dear, dear, dear, cheap]
    assert [line.period for line in record.holds] == [MONTH, MONTH, MONTH, DAY]
    assert (record.lsn, record.t) == (1, office.clocks.wall_ms())
    assert (record.model, record.provider, record.upstream_model) == ("mock/echo", "a", "cheap")
    assert (record.max, record.stream, record.hidden, record.degraded) == (100, True, False, False)
    assert record.prompt == reservation.chain[0].priced.ask.prompt
    assert record.prices == reservation.quote.price_version
    assert record.edits == ()


def test_a_maximum_that_was_lowered_is_told(office: Office) -> None:
    reservation = office.reserve("d/unknown", stream=False)
    assert reservation.plan.lowered == 4_096
    [record] = office.records()
    assert isinstance(record, Reserve)
    assert record.edits == ("max_tokens=4096",)


def test_a_candidate_that_is_too_dear_is_passed_over_and_that_is_told(office: Office) -> None:
    office.change_user(monthly_limit=(100 + PROMPT) * OUTPUT)
    reservation = office.reserve("b/dear", "a/cheap", max_tokens=100)
    assert [each.priced.candidate.model for each in reservation.chain] == ["cheap"]
    [record] = office.records()
    assert isinstance(record, Reserve)
    assert (record.provider, record.edits) == ("a", ("skipped b: over budget",))


def test_a_provider_whose_day_is_spent_is_passed_over(office: Office) -> None:
    office.accounts.terms = Terms(provider_daily={"a": 10 * OUTPUT, "b": USD})
    reservation = office.reserve("a/cheap", "b/dear", max_tokens=100)
    assert [each.priced.candidate.model for each in reservation.chain] == ["dear"]


def test_the_budget_of_a_later_provider_is_looked_at_when_its_turn_comes(office: Office) -> None:
    office.accounts.terms = Terms(provider_daily={"b": 0})
    reservation = office.reserve("a/cheap", "b/dear", max_tokens=100)
    assert len(reservation.chain) == 2
    unanswered(reservation)
    assert at_once(reservation.next(reservation.chain[1], "timeout")) is None


@pytest.mark.parametrize("scope", ["key", "user", "org", "provider", "outage"])
def test_a_refusal_says_its_scope_and_what_would_fit_there(office: Office, scope: str) -> None:
    limit = PROMPT * INPUT + 123 * OUTPUT + 1
    match scope:
        case "key":
            office.change_key(monthly_limit=limit)
        case "user":
            office.change_user(monthly_limit=limit)
        case "org":
            office.change_organization(monthly_budget=limit)
        case "provider":
            office.accounts.terms = Terms(provider_daily={"a": limit})
        case "outage":
            office.outage.lost = True
            office.change_organization(fallback_daily_limit=limit, failure_mode=FailureMode.OPEN)
    error = refusal(office, max_tokens=124)
    assert (error.scope, error.code) == (scope, "request_exceeds_remaining")
    assert error.gateway is not None
    assert error.gateway["scope"] == scope
    assert error.gateway["fits_max_tokens"] == 123
    assert error.gateway["limit_usd"] == f"0.{limit:09d}"
    assert error.gateway["needed_usd"] == f"0.{PROMPT * INPUT + 124 * OUTPUT:09d}"
    period = DAY if scope in ("provider", "outage") else MONTH
    assert error.retry_after_s == (end_ms(period) - office.clocks.wall_ms()) // 1000
    assert office.metrics.quota_refusal(scope).value == 1
    # Nothing happened, and what is said to fit does.
    assert (office.ledger.state.lsn, office.ledger.state.balances) == (0, {})
    office.reserve(max_tokens=123)


def test_the_provider_is_the_reason_only_where_it_is_that_of_all(office: Office) -> None:
    office.accounts.terms = Terms(provider_daily={"a": 0, "b": 0})
    assert refusal(office, "a/cheap", "b/dear", max_tokens=100).scope == "provider"
    office.accounts.terms = Terms(provider_daily={"a": 0})
    office.change_user(monthly_limit=2_000_000)
    error = refusal(office, "a/cheap", "b/dear", max_tokens=100)
    assert error.scope == "user"
    assert error.gateway is not None
    fits = error.gateway["fits_max_tokens"]
    assert fits == (2_000_000 - PROMPT * 10_000) // 20_000
    office.reserve("a/cheap", "b/dear", max_tokens=fits)


@pytest.mark.parametrize("policy", list(UnboundedPolicy))
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("limit", [100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("name", ["a/cheap", "b/dear", "e/thinker"])
def test_the_maximum_that_a_refusal_offers_is_accepted(
    tmp_path: Path, policy: UnboundedPolicy, stream: bool, limit: int, name: str
) -> None:
    office = Office(tmp_path / "journal", limit=limit, unbounded_policy=policy)
    bodies: list[dict[str, Any]] = [{}, {"max_tokens": 10_000_000}, {"n": 3}]
    for body in bodies:
        try:
            ends(office.reserve(name, stream=stream, **body))
        except InsufficientQuota as error:
            assert error.gateway is not None
            fits = error.gateway["fits_max_tokens"]
            if fits:
                ends(office.reserve(name, stream=stream, **{**body, "max_tokens": fits}))


def test_an_offer_also_holds_where_the_prompt_was_not_counted(tmp_path: Path) -> None:
    """What names a maximum is a little longer than what does not."""
    prices = {"a/long": {"input": "1", "output": "1", "max_output_tokens": 100_000}}
    office = Office(
        tmp_path / "journal",
        limit=50_000_000,
        prices=prices,
        unbounded_policy=UnboundedPolicy.STRICT,
    )
    error = refusal(office, "a/long")
    assert office.quote("a/long").counted is None
    assert error.gateway is not None
    fits = error.gateway["fits_max_tokens"]
    assert fits > 49_000
    office.reserve("a/long", max_completion_tokens=fits)


def test_a_model_for_nothing_is_served_when_the_money_is_gone(office: Office) -> None:
    office.change_user(monthly_limit=0)
    refusal(office)
    for stream in (True, False):
        reservation = office.reserve("c/free", stream=stream)
        uses(answered(reservation), 5)
        ends(reservation)
    # A chain goes on with what costs nothing.
    assert office.reserve("a/cheap", "c/free").chain[0].priced.candidate.model == "free"
    assert office.spent == 0


def test_a_limit_of_requests_comes_before_one_of_money(office: Office) -> None:
    office.change_user(monthly_limit=0, rpm=1)
    for _ in range(3):
        refusal(office)  # what was refused for money is no request
    office.reserve("c/free")
    with pytest.raises(RateLimited):
        office.reserve()


def test_tokens_a_minute_are_the_prompt_and_all_that_is_held_for(office: Office) -> None:
    prompt = office.quote(max_tokens=100).priced[0].ask.prompt
    office.change_key(tpm=prompt + 100)
    reservation = office.reserve(max_tokens=100)
    with pytest.raises(RateLimited):
        office.reserve(max_tokens=1)
    uses(answered(reservation), 5)
    ends(reservation)
    office.reserve(max_tokens=60)


def test_calls_at_once_are_let_go_on_every_way_out(office: Office) -> None:
    office.change_key(max_parallel=1)
    for outcome in (None, Outcome.CLIENT_LEFT, Outcome.CUT):
        reservation = office.reserve()
        with pytest.raises(RateLimited):
            office.reserve()
        reservation.outcome = outcome
        ends(reservation)


# -- fifty calls and five dollars ------------------------------------------------------------------

DOLLAR = {"x/dollar": {"input": "1000", "output": "1000", "max_output_tokens": 16_000}}
"""A call of 10 tokens in and 990 out is one dollar."""
WORDS = 990


@pytest.fixture
def five(tmp_path: Path) -> Office:
    """Alice has ten dollars, of which five were spent on calls that taught how long they are."""
    office = Office(tmp_path / "journal", limit=10 * USD, prices=DOLLAR)
    for _ in range(5):
        complete(office.reserve("x/dollar", max_tokens=WORDS))
    assert office.spent == 5 * USD
    return office


def complete(reservation: Reservation) -> bool:
    """The answer that it would have; False when its maximum was too low for it."""
    most = reservation.plan.output
    uses(answered(reservation), min(WORDS, most))
    ends(reservation)
    return most >= WORDS


def crowd(office: Office, number: int, **body: Any) -> list[Reservation]:
    """Those who are let in of so many who come at once."""
    found = []
    for _ in range(number):
        try:
            found.append(office.reserve("x/dollar", **body))
        except InsufficientQuota as error:
            assert error.gateway is not None
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_of_fifty_dollar_calls_five_dollars_admit_exactly_five(five: Office, stream: bool) -> None:
    admitted = crowd(five, 50, stream=stream, max_tokens=WORDS)
    assert len(admitted) == 5
    assert five.balance("user:alice") == (5 * USD, 5 * USD)
    assert all([complete(each) for each in admitted])
    assert five.balance("user:alice") == (10 * USD, 0)
    five.assert_in_order()


def test_of_fifty_without_a_maximum_two_complete_at_least(five: Office) -> None:
    admitted = crowd(five, 50, stream=False)
    assert sum(five.balance("user:alice")) <= 10 * USD
    assert sum([complete(each) for each in admitted]) >= 2
    assert five.spent <= 10 * USD
    five.assert_in_order()


@pytest.mark.parametrize("seed", range(8))
def test_of_fifty_streams_without_a_maximum_four_complete_at_least(five: Office, seed: int) -> None:
    """They come, are relayed a few words at a time, and end, all at the same time."""
    random = Random(seed)
    waiting, running, completed = 50, {}, 0
    while waiting or running:
        if waiting and random.random() < 0.2:
            waiting -= 1
            for reservation in crowd(five, 1, stream=True):
                answered(reservation)
                running[reservation] = 0
        if not running:
            continue
        reservation = random.choice(list(running))
        words = min(random.choice([1, 1, 2, 7]), WORDS - running[reservation])
        running[reservation] += words
        try:
            relays(reservation, words)
        except InsufficientQuota:
            reservation.outcome = Outcome.CUT
        if reservation.outcome is None and running[reservation] == WORDS:
            assert reservation.meter is not None
            uses(reservation.meter, WORDS)
            completed += 1
        elif reservation.outcome is None:
            continue
        del running[reservation]
        ends(reservation)
        assert sum(five.balance("user:alice")) <= 10 * USD
    assert completed >= 4
    assert five.spent <= 10 * USD
    five.assert_in_order()


@pytest.mark.parametrize("stream", [True, False])
def test_one_by_one_all_are_let_in_while_money_is_left(five: Office, stream: bool) -> None:
    for _ in range(5):
        assert complete(five.reserve("x/dollar", stream=stream))
    assert five.spent == 10 * USD
    refusal(five, "x/dollar", stream=stream)


def test_the_first_calls_of_all_know_nothing_and_are_not_blocked(tmp_path: Path) -> None:
    office = Office(tmp_path / "journal", limit=5 * USD, prices=DOLLAR)
    assert len(crowd(office, 50, stream=True)) >= 4
    office = Office(tmp_path / "another", limit=5 * USD, prices=DOLLAR)
    assert len(crowd(office, 50, stream=False)) >= 1


def test_only_what_came_to_its_own_end_teaches_how_long_answers_are(office: Office) -> None:
    for outcome in (Outcome.CUT, Outcome.TRUNCATED, Outcome.CLIENT_LEFT):
        for _ in range(3):
            reservation = office.reserve()
            uses(answered(reservation), 40)
            reservation.outcome = outcome
            ends(reservation)
    assert office.quote().priced[0].ask.learned is None
    for _ in range(3):
        reservation = office.reserve()
        uses(answered(reservation), 400)
        ends(reservation)
    assert office.quote().priced[0].ask.learned == 400


# -- any order of things ---------------------------------------------------------------------------

MODELS = ["a/cheap", "b/dear", "d/unknown", "e/thinker", "f/claude-4-7", "c/free"]
LIMITS = st.none() | st.integers(0, 20_000_000)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["reserve", "reserve", "reserve", "relay", "relay", "next", "end", "leave", "other"]
        ),
        st.integers(0, 10**6),
    ),
    max_size=40,
)


def assert_within_limits(office: Office, keys: list[ApiKey]) -> None:
    terms = office.accounts.terms
    limits = {
        "org:acme": office.organization.monthly_budget,
        "user:alice": office.user.monthly_limit,
        **{f"key:{key.key_id}": key.monthly_limit for key in keys},
        **{f"provider:{name}": limit for name, limit in terms.provider_daily.items()},
        "outage:acme": terms.outage_daily,
    }
    for (account, _), balance in office.ledger.state.balances.items():
        limit = limits.get(account)
        if limit is not None:
            assert balance.spent + balance.held <= limit, account


@settings(max_examples=150, deadline=None)
@given(
    STEPS,
    st.fixed_dictionaries({"key": LIMITS, "other": LIMITS, "user": LIMITS, "org": LIMITS}),
    st.fixed_dictionaries({}, optional=dict.fromkeys("abdef", st.integers(0, 20_000_000))),
    st.sampled_from([UnboundedPolicy.CLAMP, UnboundedPolicy.STRICT]),
    st.none() | st.integers(10, 3_000),
    st.booleans(),
)
def test_no_budget_is_ever_overdrawn(
    steps: list[tuple[str, int]],
    limits: dict[str, int | None],
    daily: dict[str, int],
    policy: UnboundedPolicy,
    learned: int | None,
    outage: bool,
) -> None:
    with TemporaryDirectory() as folder:
        office = Office(
            Path(folder) / "journal",
            limit=limits["user"],
            terms=Terms(provider_daily=daily, outage_daily=5_000_000),
            monthly_budget=limits["org"],
            unbounded_policy=policy,
            failure_mode=FailureMode.OPEN,
        )
        office.change_key(monthly_limit=limits["key"])
        office.outage.lost = outage
        other = ApiKey(
            key_id="key_2",
            user_id="alice",
            prefix="p",
            digest=b"2",
            monthly_limit=limits["other"],  # type: ignore[arg-type]
            created_at=1,
        )
        office.keyring.apply(other)
        callers = [office.principal, office.principal_of(other)]
        if learned is not None:
            office.teach(learned)
        running: dict[Reservation, int] = {}
        for what, draw in steps:
            random = Random(draw)
            if what == "other":
                office.principal = callers[draw % 2]
            elif what == "reserve":
                names = random.sample(MODELS, random.randint(1, 3))
                body = random.choice([{}, {}, {"max_tokens": 300}, {"max_tokens": 3_000, "n": 2}])
                reserve_or_be_refused(office, running, names, random.random() < 0.7, body)
            elif running:
                reservation = random.choice(list(running))
                over = go_on(reservation, running, what, random)
                if over:
                    del running[reservation]
                    ends(reservation)
            assert_within_limits(office, [office.key, other])
        for reservation in running:
            ends(reservation)
        assert_within_limits(office, [office.key, other])
        office.assert_in_order()


def reserve_or_be_refused(
    office: Office,
    running: dict[Reservation, int],
    names: list[str],
    stream: bool,
    body: dict[str, Any],
) -> None:
    before = figures_of(office.ledger.state)
    try:
        reservation = office.reserve(*names, stream=stream, **body)
    except InsufficientQuota as error:
        assert figures_of(office.ledger.state) == before
        assert error.gateway is not None
        fits = error.gateway["fits_max_tokens"]
        if fits:
            ends(office.reserve(*names, stream=stream, **{**body, "max_tokens": fits}))
        return
    answered(reservation)
    running[reservation] = 0


def go_on(
    reservation: Reservation, running: dict[Reservation, int], what: str, random: Random
) -> bool:
    """One step of an attempt whose upstream keeps to what it was told; whether that was all."""
    plan = reservation.plan
    said = running[reservation]
    if what == "relay":
        words = random.choice([1, 5, 60])
        # Of Claude's tokens our own are two thirds.
        if not plan.grows and (said + words) * 3 // 2 >= plan.output:
            return True
        running[reservation] += words
        try:
            relays(reservation, words)
        except InsufficientQuota:
            reservation.outcome = Outcome.CUT
            return True
        return False
    if what == "next":
        index = len(reservation.trace.attempts)
        if index >= len(reservation.chain) or said:
            return False
        reservation.unanswered()
        planned = at_once(reservation.next(reservation.chain[index], "timeout"))
        if planned is None:
            return True
        answered(reservation, planned)
        return False
    if what == "leave":
        reservation.outcome = Outcome.CLIENT_LEFT
    elif not plan.grows:
        assert reservation.meter is not None
        uses(reservation.meter, random.randint(0, plan.output))
    return True


# -- alerts ----------------------------------------------------------------------------------------


def alerts(office: Office) -> list[tuple[str, int]]:
    return [
        (record.account, record.percent) for record in office.records() if isinstance(record, Alert)
    ]


def test_most_of_a_budget_spent_is_told_once(office: Office) -> None:
    office.change_user(monthly_limit=100_000_000)
    office.change_organization(monthly_budget=200_000_000)
    told = []
    for cost in (79_900_000, 100_000, 14_900_000, 100_000, 4_900_000, 100_000):
        office.spend(cost)
        told.append(alerts(office))
    user = "user:alice"
    first, second = [(user, 80)], [(user, 80), (user, 95)]
    assert told == [[], first, first, second, second, [*second, (user, 100)]]
    [_, _, alert] = [each for each in office.records() if isinstance(each, Alert)]
    assert (alert.period, alert.spent, alert.limit) == (MONTH, 100_000_000, 100_000_000)
    assert [office.metrics.budget_alert("user", each).value for each in (80, 95, 100)] == [1, 1, 1]
    office.log._flush()
    lines = [json.loads(line) for line in office.written.getvalue().splitlines()]
    assert [(line["event"], line["percent"]) for line in lines] == [
        ("budget alert", 80),
        ("budget alert", 95),
        ("budget alert", 100),
    ]
    assert lines[0]["account"] == user


def test_alerts_are_remembered_over_a_restart_and_forgotten_with_the_period(
    office: Office,
) -> None:
    office.change_user(monthly_limit=1_000_000)
    office.spend(810_000)
    assert fold(office.records()).alerts == {("user:alice", MONTH, 80)}
    office.spend(1_000)
    assert len(alerts(office)) == 1
    office.clocks.wall_s = end_ms(MONTH) / 1000
    office.spend(810_000)
    assert len(alerts(office)) == 2


def test_several_thresholds_and_accounts_may_be_crossed_at_once(office: Office) -> None:
    office.change_user(monthly_limit=1_000_000)
    office.change_key(monthly_limit=500_000)
    office.change_organization(monthly_budget=600_000)
    office.spend(500_000)
    assert sorted(alerts(office)) == [
        ("key:key_1", 80),
        ("key:key_1", 95),
        ("key:key_1", 100),
        ("org:acme", 80),
    ]


def test_a_grant_counts_before_an_alert(office: Office) -> None:
    office.change_user(monthly_limit=500_000)
    grant(office, 500_000)
    office.spend(799_000)
    assert alerts(office) == []


def test_what_is_free_is_no_reason_for_an_alert(office: Office) -> None:
    office.change_user(monthly_limit=0)
    reservation = office.reserve("c/free")
    uses(answered(reservation), 5)
    ends(reservation)
    assert alerts(office) == []


@pytest.mark.parametrize("uncertain", [False, True])
def test_an_alert_that_could_not_be_recorded_comes_later(office: Office, uncertain: bool) -> None:
    office.change_user(monthly_limit=1_000_000)
    reservation = office.reserve(max_tokens=1)
    uses(answered(reservation), 0, 810)
    with office.disk.broken(uncertain=uncertain):
        if uncertain:
            office.journal._spare = None
        ends(reservation)
    give_spare(office.journal)
    office.spend(1_000)
    assert alerts(office) == [("user:alice", 80)]
    assert office.metrics.budget_alert("user", 80).value == 1
    office.assert_in_order()


def test_two_requests_that_wait_for_the_journal_raise_one_alert(office: Office) -> None:
    office.change_user(monthly_limit=1_000_000)
    ones = [office.reserve(max_tokens=1) for _ in range(2)]
    with office.disk.broken():
        for each in ones:
            uses(answered(each), 0, 810)
            ends(each)
    give_spare(office.journal)
    office.ledger.pay()
    assert alerts(office) == [("user:alice", percent) for percent in (80, 95, 100)]
    office.assert_in_order()


# -- corrections -----------------------------------------------------------------------------------


def adjust(office: Office, delta: int, kind: str, *accounts: tuple[str, str]) -> None:
    ledger = office.ledger
    ledger.post(
        Adjust(
            **ledger.stamp(),
            accounts=accounts or (("user:alice", MONTH),),
            delta=delta,
            type=kind,
            actor="admin",
            reason="",
        )
    )


def grant(office: Office, amount: int) -> None:
    adjust(office, amount, "grant")


def test_a_grant_raises_what_may_be_spent(office: Office) -> None:
    office.change_user(monthly_limit=100_000)
    office.spend(100_000)
    refusal(office, max_tokens=10)
    grant(office, 50_000)
    reservation = office.reserve(max_tokens=10)
    found = reservation.figures()
    assert (found.limit, found.spent) == (150_000, 100_000)
    assert office.records()[-1].holds[1].limit == 150_000  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "delta"), [("reset", -100_000), ("credit", -60_000)])
def test_a_reset_and_a_credit_lower_what_was_spent(office: Office, kind: str, delta: int) -> None:
    office.change_user(monthly_limit=100_000)
    office.spend(100_000)
    refusal(office, max_tokens=10)
    adjust(office, delta, kind)
    assert office.spent == 100_000 + delta
    office.reserve(max_tokens=10)
    # The organization's own sum is what it was.
    assert office.balance("org:acme")[0] == 100_000


def test_what_comes_late_counts_against_what_is_left(office: Office) -> None:
    office.change_user(monthly_limit=100_000)
    adjust(office, 95_000, "late")
    refusal(office, max_tokens=10)


# -- when the journal fails ------------------------------------------------------------------------


def test_a_request_that_cannot_be_recorded_leaves_no_trace(office: Office) -> None:
    office.change_key(rpm=1, tpm=10_000, max_parallel=1)
    before = figures_of(office.ledger.state)
    for _ in range(2):
        with office.disk.broken(), pytest.raises(StorageUnavailable) as caught:
            office.reserve()
        assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
        assert caught.value.retry_after_s
        assert figures_of(office.ledger.state) == before
        assert office.ledger.owes == 0
    give_spare(office.journal)
    office.reserve()
    assert len(office.records()) == 1


def test_a_request_that_may_be_recorded_is_refused_and_taken_back(office: Office) -> None:
    office.change_key(rpm=1)
    with office.disk.broken(uncertain=True):
        office.journal._spare = None
        with pytest.raises(StorageUnavailable):
            office.reserve()
        # It may stand in the journal, so its room is kept until it is taken back.
        assert (office.ledger.owes, office.held > 0) == (1, True)
        with pytest.raises(StorageUnavailable):
            office.reserve()
    give_spare(office.journal)
    give_spare(office.journal)
    reservation = office.reserve()
    reserve, void, after = office.records()
    assert isinstance(void, Settle) and isinstance(after, Reserve)
    assert (void.r, void.outcome, void.cost) == (reserve.lsn, "void", 0)
    ends(reservation)
    assert office.ledger.state.balances["user:alice", MONTH].count == 1
    office.assert_in_order()


def test_the_journal_keeps_room_for_every_settlement(tmp_path: Path) -> None:
    office = Office(tmp_path / "journal", segment_bytes=64 * 1024)
    running = []
    with pytest.raises(StorageUnavailable):
        while True:
            running.append(office.reserve(max_tokens=1))
    assert len(running) == 15
    assert office.journal.room() < (len(running) + 1) * SETTLEMENT_ROOM_BYTES
    for reservation in running:
        uses(answered(reservation), 1)
        ends(reservation)
    assert office.ledger.owes == 0
    office.reserve(max_tokens=1)


def test_a_lost_journal_lets_nothing_in_whatever_the_mode(office: Office) -> None:
    office.change_organization(failure_mode=FailureMode.OPEN)
    reservation = office.reserve()
    office.journal.stalled = "the disk does not answer"
    with pytest.raises(StorageUnavailable):
        office.reserve()
    ends(reservation)  # what runs may end
    office.journal.stalled = None
    ends(office.reserve())
    office.assert_in_order()


# -- when the database is away ---------------------------------------------------------------------


def test_in_an_outage_the_closed_are_refused_and_the_open_have_a_budget_a_day(
    office: Office,
) -> None:
    office.accounts.terms = Terms(outage_daily=200_000)
    office.outage.lost = True
    with pytest.raises(StorageUnavailable) as caught:
        office.reserve(max_tokens=10)
    assert caught.value.retry_after_s
    office.change_organization(failure_mode=FailureMode.OPEN)
    reservation = office.reserve(max_tokens=10)
    assert reservation.degraded
    [record] = office.records()
    assert isinstance(record, Reserve)
    assert record.degraded
    assert [line.account for line in record.holds][3:] == ["outage:acme", "provider:a"]
    found = reservation.figures()
    assert (found.scope, found.period, found.limit) == ("outage", DAY, 200_000)
    uses(answered(reservation), 75)
    ends(reservation)
    assert office.balance("outage:acme", DAY) == (160_000, 0)
    assert refusal(office, max_tokens=20).scope == "outage"
    # Between two outages of one day nothing is counted there, and nothing forgotten.
    office.outage.lost = False
    office.spend(100_000)
    assert office.balance("outage:acme", DAY) == (160_000, 0)
    office.outage.lost = True
    assert refusal(office, max_tokens=20).scope == "outage"
    office.clocks.pass_s(86_400)
    office.reserve(max_tokens=20)


def test_the_mode_of_all_holds_for_who_has_none_of_his_own(office: Office) -> None:
    office.outage.lost = True
    office.accounts.terms = Terms(failure_mode=FailureMode.OPEN, outage_daily=USD)
    assert office.reserve(max_tokens=1).degraded
    office.change_organization(failure_mode=FailureMode.CLOSED)
    with pytest.raises(StorageUnavailable):
        office.reserve(max_tokens=1)


def test_a_stream_of_an_outage_extends_its_hold_there_too(office: Office) -> None:
    office.accounts.terms = Terms(failure_mode=FailureMode.OPEN, outage_daily=3_000 * OUTPUT)
    office.outage.lost = True
    reservation = office.reserve()
    answered(reservation)
    office.outage.lost = False
    for _ in range(1_500):
        relays(reservation, 1)
    assert office.balance("outage:acme", DAY)[1] >= 1_500 * OUTPUT
    with pytest.raises(InsufficientQuota) as caught:
        for _ in range(2_000):
            relays(reservation, 1)
    assert caught.value.scope == "outage"
    reservation.outcome = Outcome.CUT
    ends(reservation)
    assert office.balance("outage:acme", DAY)[0] <= 3_000 * OUTPUT
    office.assert_in_order()


LENIENT = [{"on_exhausted": OnExhausted.FINISH}, {"unbounded_policy": UnboundedPolicy.BOUNDED}]


@pytest.mark.parametrize("policy", LENIENT, ids=str)
def test_no_policy_takes_a_stream_past_the_bound_of_an_outage(
    office: Office, policy: dict[str, Any]
) -> None:
    bound = 3_000 * OUTPUT
    office.accounts.terms = Terms(failure_mode=FailureMode.OPEN, outage_daily=bound)
    office.change_organization(**policy)
    office.outage.lost = True
    one, other = office.reserve(), office.reserve()
    answered(one)
    answered(other)
    for reservation in (one, other):
        with pytest.raises(InsufficientQuota) as caught:
            for _ in range(4_000):
                relays(reservation, 1)
        assert caught.value.scope == "outage"
        reservation.outcome = Outcome.CUT
    # The outage is over, and what it has let in goes by its bound to the end.
    office.outage.lost = False
    ends(one)
    ends(other)
    assert bound - 10 * OUTPUT < office.balance("outage:acme", DAY)[0] <= bound
    office.assert_in_order()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("policy", LENIENT, ids=str)
def test_of_many_at_once_none_goes_past_the_bound_of_an_outage(
    office: Office, policy: dict[str, Any], stream: bool
) -> None:
    bound = 3_000 * OUTPUT
    office.accounts.terms = Terms(failure_mode=FailureMode.OPEN, outage_daily=bound)
    office.change_organization(**policy)
    office.teach(64)
    office.outage.lost = True
    running = []
    for _ in range(6):
        with contextlib.suppress(InsufficientQuota):
            running.append(office.reserve(stream=stream))
    assert running
    for reservation in running:
        meter = answered(reservation)
        if stream:
            with contextlib.suppress(InsufficientQuota):
                for _ in range(2_000):
                    relays(reservation, 1)
            reservation.outcome = Outcome.CUT
        else:
            # No provider gives more than the maximum that it was sent, or has of its own.
            uses(meter, min(2_000, reservation.plan.lowered or 8_000))
        ends(reservation)
    assert office.balance("outage:acme", DAY)[0] <= bound
    office.assert_in_order()


def test_a_later_attempt_keeps_to_the_bound_of_an_outage_too(office: Office) -> None:
    bound = 3_000 * OUTPUT
    office.accounts.terms = Terms(failure_mode=FailureMode.OPEN, outage_daily=bound)
    office.change_organization(unbounded_policy=UnboundedPolicy.BOUNDED)
    office.teach(64)
    office.outage.lost = True
    reservation = office.reserve("a/cheap", "d/unknown", stream=False)
    unanswered(reservation)
    later = at_once(reservation.next(reservation.chain[1], "failed"))
    assert later is not None and not later.plan.grows
    assert later.plan.lowered == later.plan.output
    ends(reservation)
    office.assert_in_order()


# -- time ------------------------------------------------------------------------------------------


def test_a_new_month_begins_with_nothing_spent(office: Office) -> None:
    office.change_user(monthly_limit=100_000)
    office.spend(100_000)
    office.clocks.wall_s = end_ms(MONTH) / 1000 - 0.001
    refusal(office, max_tokens=10)
    office.clocks.wall_s += 0.001
    reservation = office.reserve(max_tokens=10)
    assert reservation.periods == ("2026-12", "2026-12-01")


def test_a_clock_that_goes_back_opens_no_period_again(office: Office) -> None:
    office.clocks.wall_s = end_ms(MONTH) / 1000
    office.spend(1_000)
    office.clocks.wall_s -= 3_600
    reservation = office.reserve()
    assert reservation.periods == ("2026-12", "2026-12-01")
    ends(reservation)
    times = [record.t for record in office.records()]
    assert times == sorted(times)
    assert set(times) == {end_ms(MONTH)}


def test_one_look_at_the_clock_says_time_and_periods(office: Office) -> None:
    """Between two of them a month may end."""
    looks = iter(range(end_ms(MONTH) - 1, end_ms(MONTH) + 100))
    quote = office.quote(max_tokens=1)
    office.ledger._clock = lambda: next(looks)
    office.books.reserve(office.principal, quote, Trace("req_1", 0.0))
    [record] = office.records()
    assert isinstance(record, Reserve)
    assert record.t == end_ms(MONTH) - 1
    assert {line.period for line in record.holds} == {MONTH, "2026-11-30"}


class Hands:
    """The two clocks of a machine, set by hand."""

    def __init__(self) -> None:
        self.wall_s = 1_000_000.0
        self.monotonic_s = 500.0
        self.clock = Clock(lambda: self.wall_s, lambda: self.monotonic_s)

    def pass_s(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds


def test_a_clock_is_believed_while_it_keeps_pace() -> None:
    hands = Hands()
    for _ in range(10):
        hands.pass_s(3_600)
        hands.wall_s += 200 / 10  # it is put right now and then
        assert hands.clock.now_ms() == int(hands.wall_s * 1000)
        assert not hands.clock.doubted


@pytest.mark.parametrize("seconds", [400, 86_400 * 40])
def test_a_clock_that_leaps_ahead_is_believed_once_it_stays_there(seconds: int) -> None:
    hands = Hands()
    before = hands.wall_s
    hands.wall_s += seconds
    for passed in range(BELIEVED_AFTER_MS // 1000):
        assert hands.clock.now_ms() == int((before + passed) * 1000)
        assert hands.clock.doubted
        hands.pass_s(1)
    assert hands.clock.now_ms() == int(hands.wall_s * 1000)
    assert not hands.clock.doubted
    hands.pass_s(10)
    assert hands.clock.now_ms() == int(hands.wall_s * 1000)


def test_a_clock_that_leaps_and_comes_back_was_never_believed() -> None:
    hands = Hands()
    hands.wall_s += 86_400
    hands.clock.now_ms()
    hands.pass_s(30)
    hands.wall_s -= 86_400
    assert hands.clock.now_ms() == int(hands.wall_s * 1000)
    assert not hands.clock.doubted
    # And the next leap is as new.
    hands.pass_s(100)
    hands.wall_s += 86_400
    assert hands.clock.now_ms() == int((hands.wall_s - 86_400) * 1000)


def test_a_clock_that_leaps_about_is_not_stable() -> None:
    hands = Hands()
    before = hands.wall_s
    for passed in range(5):
        assert hands.clock.now_ms() == int((before + 40 * passed) * 1000)
        hands.pass_s(40)
        hands.wall_s += 86_400
    assert hands.clock.doubted


def test_a_leap_can_be_confirmed() -> None:
    hands = Hands()
    hands.wall_s += 86_400
    hands.clock.now_ms()
    assert hands.clock.doubted
    hands.clock.confirm()
    assert not hands.clock.doubted
    assert hands.clock.now_ms() == int(hands.wall_s * 1000)


def test_a_clock_that_is_put_back_is_believed_and_the_ledger_waits_for_it(office: Office) -> None:
    hands = Hands()
    hands.wall_s -= 86_400
    assert hands.clock.now_ms() == int(hands.wall_s * 1000)
    assert not hands.clock.doubted
    assert JUMP_MS < 86_400_000


def test_a_leap_of_the_clock_gives_nobody_a_new_month(tmp_path: Path) -> None:
    office = Office(tmp_path / "journal", limit=100_000)
    clocks: Clocks = office.clocks
    clock = Clock(lambda: clocks.wall_s, clocks.monotonic)
    office.ledger._clock = clock.now_ms
    office.spend(100_000)
    clocks.wall_s += 86_400 * 30
    refusal(office, max_tokens=10)
    clocks.pass_s(BELIEVED_AFTER_MS / 1000)
    office.reserve(max_tokens=10)


# -- after the process -----------------------------------------------------------------------------


def test_what_nobody_owns_any_more_is_charged_its_watermark_or_its_hold(office: Office) -> None:
    followed, silent, hidden = office.reserve(), office.reserve(), office.reserve("e/thinker")
    answered(followed)
    relays(followed, 50)
    answered(hidden)
    beyond = office.reserve(max_tokens=10)
    answered(beyond)
    for _ in range(100):
        relays(beyond, 1)
    expected = {
        lsn: (hold.recovered_cost(), max(0, hold.recovered_cost() - hold.amount))
        for lsn, hold in office.ledger.state.holds.items()
    }
    state = fold(office.records())
    ledger = Ledger(state, office.journal, office.clocks.wall_ms)
    assert ledger.recover() == 4
    settled = {each.r: each for each in office.records() if isinstance(each, Settle)}
    assert {r: (each.cost, each.overrun) for r, each in settled.items()} == expected
    assert {each.outcome for each in settled.values()} == {"recovered"}
    hold = office.ledger.state.holds
    assert settled[silent.lsn].cost == hold[silent.lsn].amount
    assert settled[hidden.lsn].cost == hold[hidden.lsn].amount
    least = PROMPT * INPUT + 50 * OUTPUT
    assert least <= settled[followed.lsn].cost < hold[followed.lsn].amount
    assert settled[beyond.lsn].overrun > 0
    assert not state.holds
    assert ledger.recover() == 0


def test_a_state_and_a_journal_that_have_parted_are_not_gone_on_with(office: Office) -> None:
    office.spend(1_000)
    with pytest.raises(AssertionError):
        Ledger(State(), office.journal, office.clocks.wall_ms)


def test_the_last_requests_can_be_asked_about(office: Office) -> None:
    office.change_user(monthly_limit=None)
    first = office.reserve()
    ids = [first.trace.request_id]
    for _ in range(3):
        reservation = office.reserve()
        ids.append(reservation.trace.request_id)
        ends(reservation)
    ledger = office.ledger
    assert [each.id for each in ledger.recent.of_key("key_1", 3)] == ids[:0:-1]
    assert ledger.recent.of_key("key_2", 3) == []
    found = ledger.find(ids[0])
    assert found is not None and found.outcome is None
    ends(first)
    found = ledger.find(ids[0])
    assert found is not None and found.outcome == "failed"


def test_no_more_requests_are_kept_than_that(office: Office) -> None:
    office.ledger.recent = recent = Recent(most=2)
    ids = []
    for _ in range(3):
        reservation = office.reserve()
        ids.append(reservation.trace.request_id)
        ends(reservation)
    assert [each.id for each in recent.of_key("key_1", 9)] == ids[:0:-1]
    assert recent.find(ids[0]) is None


# -- what is sent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    "body",
    [{}, {"max_tokens": None}, {"max_completion_tokens": None},
     {"max_tokens": None, "max_completion_tokens": None}],
)  # fmt: skip
def test_a_lowered_maximum_goes_out_in_the_providers_own_field_alone(
    field: str, body: dict[str, Any]
) -> None:
    request = ChatRequest.parse(json.dumps(chat(**body)).encode())
    assert request.max_output_tokens is None
    sent = orjson.loads(request.body_for(candidate("a/cheap", field=field), 512))
    fields = {name: value for name, value in sent.items() if name.startswith("max_")}
    assert fields == {field: 512}


def test_a_maximum_that_the_caller_declared_goes_out_as_it_came() -> None:
    for body in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        request = ChatRequest.parse(json.dumps(chat(**body)).encode())
        sent = orjson.loads(request.body_for(candidate("a/cheap")))
        assert {**sent, "model": "mock/echo"} == chat(**body)


@pytest.mark.parametrize("depth", [10, 240, 250, 251, 252, 253, 254, 255, 300, 1_020, 1_100])
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_nested_too_deeply_to_be_sent_is_refused_before_anything_is_held(
    office: Office, depth: int, stream: bool
) -> None:
    raw = json.dumps(chat(stream))[:-1] + ',"deep":' + "[" * depth + "]" * depth + "}"
    try:
        request = ChatRequest.parse(raw.encode())
    except InvalidRequest as error:
        assert (error.status, error.code) == (400, "invalid_json")
        assert depth > 250
        return
    assert depth < 256
    quote = at_once(office.books.quote(office.principal, request, [candidate("a/cheap")]))
    reservation = office.books.reserve(office.principal, quote, Trace("req_1", 0.0))
    assert request.body_for(candidate("a/cheap"), 512)
    attempt(reservation)
    ends(reservation)
    assert settlement(office).cost > 0


def test_users_do_not_pay_for_each_other(office: Office) -> None:
    office.keyring.apply(User(user_id="bob", org_id="acme", created_at=1))
    key = ApiKey(key_id="key_2", user_id="bob", prefix="p", digest=b"2", created_at=1)
    office.keyring.apply(key)
    office.spend(5_000)
    office.principal = office.principal_of(key)
    office.spend(7_000)
    assert office.balance("user:alice") == (5_000, 0)
    assert office.balance("user:bob") == (7_000, 0)
    assert office.balance("org:acme") == (12_000, 0)


def kinds(records: list[AnyRecord]) -> list[str]:
    return [type(record).__name__ for record in records]


def test_a_plain_request_is_two_lines(office: Office) -> None:
    reservation = office.reserve(stream=False, max_tokens=100)
    meter = answered(reservation)
    says(meter, 50)
    uses(meter, 50)
    ends(reservation)
    assert kinds(office.records()) == ["Reserve", "Settle"]


# -- through HTTP: the table of who pays ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What an upstream does, and what the request then costs."""

    script: Script
    outcome: str
    source: str | None
    input: int = 0
    output: int = 0
    stream: bool = True
    status: int = 200
    more: tuple[int, int, int] = (0, 0, 0)
    """Cache reads, cache writes, reasoning."""


def whole(**changes: Any) -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(json.dumps({**ANSWER, **changes}).encode())

    return script


def refuses(status: str, body: bytes = b'{"error":{"message":"no"}}') -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, status)

    return script


def streams(
    *parts: bytes, then: Callable[[Wire], None] | None = None, clean: bool = True
) -> Script:
    framed = CHUNKED + in_chunks(parts)
    return sends(framed if clean else framed[:-5], then=then)


STOP = delta(finish="stop")
BIG = usage_only(prompt_tokens=100, completion_tokens=50, total_tokens=150)
RUNNING = [  # a provider that gives a running total with each chunk
    delta("a", usage={"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}),
    delta("b", usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 60}),
]

TABLE = {
    "an answer with usage": Case(
        whole(), "completed", "provider", 11, 2, stream=False
    ),
    "an answer without usage": Case(
        whole(usage=None), "completed", "counted", PROMPT, 2, stream=False
    ),
    "usage of zero is a value": Case(
        whole(usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}),
        "completed", "provider", 0, 0, stream=False,
    ),
    "usage that is nonsense is none": Case(
        whole(usage={"prompt_tokens": "many", "completion_tokens": True}),
        "completed", "counted", PROMPT, 2, stream=False,
    ),
    "cached and hidden tokens": Case(
        whole(usage={
            "prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 130,
            "prompt_tokens_details": {"cached_tokens": 60},
            "completion_tokens_details": {"reasoning_tokens": 15},
        }),
        "completed", "provider", 40, 30, stream=False, more=(60, 0, 15),
    ),
    "a stream with usage": Case(streams(*events(TEXT)), "completed", "provider", 11, 2),
    "a stream whose last usage counts": Case(
        streams(delta(TEXT), STOP, usage_only(), BIG, DONE), "completed", "provider", 100, 50
    ),
    "running totals are never added up": Case(
        streams(*RUNNING, STOP, DONE), "completed", "provider", 7, 53, more=(0, 0, 51)
    ),
    "a stream without usage": Case(
        streams(delta(TEXT), STOP, DONE), "completed", "counted", PROMPT, TEXT_TOKENS
    ),
    "a stream of nothing but its end": Case(streams(STOP, DONE), "completed", "counted", PROMPT, 0),
    "a whole answer to a stream": Case(whole(), "completed", "provider", 11, 2),
    "a stream cut off": Case(
        streams(delta(TEXT), clean=False, then=Wire.hang_up),
        "truncated", "counted", PROMPT, TEXT_TOKENS,
    ),
    "a stream cut off after its usage": Case(
        streams(delta(TEXT), STOP, BIG, clean=False, then=Wire.hang_up),
        "truncated", "provider", 100, 50,
    ),
    "a stream that went on after its last running total": Case(
        streams(RUNNING[0], delta(TEXT), clean=False, then=Wire.hang_up),
        "truncated", "counted", 7, TEXT_TOKENS + 1,
    ),
    "an error in mid-stream": Case(
        streams(delta(TEXT), event({"error": {"message": "x"}})),
        "truncated", "counted", PROMPT, TEXT_TOKENS,
    ),
    "an error before anything": Case(
        streams(event({"error": {"message": "x"}})), "failed", None, status=502
    ),
    "a caller's error": Case(refuses("400 Bad"), "failed", None, status=400),
    "a caller's error, no stream": Case(
        refuses("400 Bad"), "failed", None, stream=False, status=400
    ),
    "a refused token": Case(refuses("401 No"), "failed", None, status=502),
    "an overloaded upstream": Case(refuses("529 Busy", b"busy"), "failed", None, status=502),
    "a reset before the head": Case(
        sends(then=Wire.reset), "unknown", "estimated", PROMPT, status=502
    ),
    "a reset in the head": Case(
        sends(b"HTTP/1.1 2", then=Wire.hang_up), "unknown", "estimated", PROMPT, status=502
    ),
    "half an answer": Case(
        sends(OK + b"Content-Length: 99\r\n\r\n{", then=Wire.hang_up),
        "unknown", "estimated", PROMPT, stream=False, status=502,
    ),
    "a stream without a word": Case(streams(), "unknown", "estimated", PROMPT, status=502),
    "an answer that is none": Case(
        sends(OK + b"Content-Length: 2\r\n\r\n{}"),
        "unknown", "estimated", PROMPT, stream=False, status=502,
    ),
}  # fmt: skip


async def test_who_pays_for_what(front: Front, upstream: Upstream) -> None:
    expected: dict[str, int] = {}
    money = 0
    for number, (name, case) in enumerate(TABLE.items(), start=1):
        upstream.script = case.script
        response = await front.chat(chat(case.stream))
        await response.read()
        assert response.status == case.status, name
        line = await front.gateway.request_line(least=number)
        assert (line["outcome"], line.get("source")) == (case.outcome, case.source), name
        cache_read, cache_write, reasoning = case.more
        # The price of a cached token is that of a fresh one where no other is set.
        nanos = (case.input + cache_read + cache_write) * INPUT + case.output * OUTPUT
        assert line["cost_nanos"] == nanos, name
        assert line["tokens"] == {
            "input": case.input,
            "cache_read": cache_read,
            "cache_write": cache_write,
            "output": case.output,
            "reasoning": reasoning,
        }, name
        assert line["price_version"], name
        expected[case.outcome] = expected.get(case.outcome, 0) + 1
        money += nanos
    for outcome, count in expected.items():
        assert await metric(front, "gwproxy_settlements_total", outcome=outcome) == count, outcome
    assert await metric(front, "gwproxy_settlements_total") == len(TABLE)
    assert await metric(front, "gwproxy_cost_usd_total") == pytest.approx(money / 1e9)
    await assert_nothing_left(front, upstream)


@pytest.mark.parametrize(
    ("script", "committed", "source", "output"),
    [
        (stay_silent, False, "estimated", 0),
        (stream_then_wait(b": comment\n\n"), False, "counted", 0),
        (stream_then_wait(delta(TEXT)), True, "counted", TEXT_TOKENS),
        (stream_then_wait(RUNNING[0], delta(TEXT)), True, "counted", TEXT_TOKENS + 1),
        (stream_then_wait(delta("Hi"), STOP, BIG), True, "provider", 50),
    ],
    ids=["before the head", "before a word", "after text", "after a total", "after usage"],
)
async def test_a_client_that_leaves_pays_for_what_it_got(
    front: Front, upstream: Upstream, script: Script, committed: bool, source: str, output: int
) -> None:
    upstream.script = script
    async with asked(front) as peer:
        await until(lambda: bool(upstream.received))
        if committed:
            await peer.head()
            parts = peer.chunks()
            came = await anext(parts)
            while (TEXT.encode() not in came) and (STOP not in came):
                came += await anext(parts)
        if source == "provider":
            # The usage chunk stays here: what shows that it came is the meter.
            app = front.gateway.app
            assert app is not None
            [pool] = app._upstream._pools.values()
            [connection] = pool.active
            await until(lambda: connection.exchange._reply.meter.usage is not None)
        elif source == "counted" and not committed:
            app = front.gateway.app
            assert app is not None
            [pool] = app._upstream._pools.values()
            [connection] = pool.active
            await until(lambda: connection._head_done)
        peer.reset()
    line = await front.gateway.request_line()
    assert (line["outcome"], line["source"], line["status"]) == ("client_left", source, 499)
    assert line["tokens"]["output"] == output
    assert line["tokens"]["input"] in (PROMPT, 7, 100)
    assert line["cost_nanos"] == line["tokens"]["input"] * INPUT + output * OUTPUT
    assert line["cost_nanos"] > 0
    assert await metric(front, "gwproxy_settlements_total") == 1
    await assert_nothing_left(front, upstream)


async def test_a_refused_request_leaves_no_settlement(front: Front, upstream: Upstream) -> None:
    for body in (chat(model="nobody/knows"), chat(n=0), chat(messages=[])):
        response = await front.chat(body)
        assert response.status in (400, 404)
        await response.read()
    response = await front.client.post("/v1/chat/completions", json=chat())
    assert response.status == 401
    lines = await front.gateway.lines("request", 6)
    assert not [line for line in lines if "cost_nanos" in line or "outcome" in line]
    assert await metric(front, "gwproxy_settlements_total") == 0
    assert upstream.received == []


async def test_a_client_that_did_not_ask_for_usage_pays_by_it_all_the_same(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = streams(delta(TEXT), STOP, BIG, DONE)
    response = await front.chat(chat(True))
    assert b'"usage"' not in await response.read()
    line = await front.gateway.request_line()
    assert (line["source"], line["tokens"]["input"], line["tokens"]["output"]) == (
        "provider", 100, 50,
    )  # fmt: skip


async def test_a_whole_answer_is_settled_before_its_headers_go_out(
    front: Front, upstream: Upstream
) -> None:
    """Whoever has the answer and asks for the figures sees it in them."""
    async with asked(front, stream=False) as peer:
        await peer.head()
        assert await metric(front, "gwproxy_settlements_total", outcome="completed") == 1
