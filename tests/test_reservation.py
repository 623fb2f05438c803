"""One admitted request: what it holds while it runs, and what it costs whatever becomes of it."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.errors import (
    Draining,
    GatewayError,
    InsufficientQuota,
    StorageUnavailable,
    UpstreamFailed,
)
from gwproxy.core.identity import OnExhausted, UnboundedPolicy
from gwproxy.core.meter import Meter
from gwproxy.core.period import end_ms
from gwproxy.core.records import Attempt, Held, Mark, Settle
from gwproxy.core.tokens import family_factor, scale
from gwproxy.state.accounts import Terms
from gwproxy.state.reservation import Outcome, Reservation
from tests.harness import tokenizer
from tests.office import (
    DAY,
    INPUT,
    MONTH,
    OUTPUT,
    PROMPT,
    USD,
    Office,
    amounts,
    answered,
    at_once,
    attempt,
    ends,
    give_spare,
    relays,
    says,
    text,
    unanswered,
    uses,
)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "journal", limit=5 * USD)


def settlement(office: Office) -> Settle:
    """The last request's end."""
    return [record for record in office.records() if isinstance(record, Settle)][-1]


def marks(office: Office) -> list[Mark]:
    return [record for record in office.records() if isinstance(record, Mark)]


# -- every way out ---------------------------------------------------------------------------------


async def test_a_finished_answer_costs_what_its_provider_says(office: Office) -> None:
    async with office.reserve() as reservation:
        meter = answered(reservation)
        says(meter, 3)
        uses(meter, 50, prompt=100)
        assert office.held > 0
    record = settlement(office)
    assert (record.outcome, record.source, record.status) == ("completed", "provider", 200)
    assert (record.cost, record.tokens) == (100 * INPUT + 50 * OUTPUT, (100, 0, 0, 50, 0))
    assert [(tried.provider, tried.cost) for tried in record.attempts] == [("a", record.cost)]
    trace = reservation.trace
    assert (trace.outcome, trace.source, trace.cost_nanos) == ("completed", "provider", record.cost)
    assert (trace.tokens, trace.price_version) == (record.tokens, reservation.quote.price_version)
    assert office.balance("provider:a", DAY) == (record.cost, 0)
    office.assert_in_order()


async def test_what_was_not_sent_costs_nothing(office: Office) -> None:
    with pytest.raises(UpstreamFailed):
        async with office.reserve() as reservation:
            reservation.attempt(reservation.chain[0])
            raise UpstreamFailed("no connection")
    record = settlement(office)
    assert (record.outcome, record.source, record.cost, record.status) == ("failed", "", 0, 502)
    assert office.spent == 0
    office.assert_in_order()


async def test_an_attempt_that_was_refused_costs_nothing(office: Office) -> None:
    async with office.reserve() as reservation:
        attempt(reservation)
        reservation.refused()
    assert (settlement(office).outcome, settlement(office).cost) == ("failed", 0)
    office.assert_in_order()


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ConnectionResetError("gone")])
@pytest.mark.parametrize("stage", ["before", "sent", "answering", "usage"])
async def test_a_client_that_is_gone_pays_for_what_he_got(
    office: Office, error: BaseException, stage: str
) -> None:
    with pytest.raises(type(error)):
        async with office.reserve() as reservation:
            if stage != "before":
                meter = attempt(reservation)
                if stage != "sent":
                    reservation.answering()
                    says(meter, 20)
                if stage == "usage":
                    uses(meter, 30)
            raise error
    record = settlement(office)
    assert (record.outcome, record.status) == ("client_left", 499)
    assert (record.source, record.cost) == {
        "before": ("", 0),
        "sent": ("estimated", PROMPT * INPUT),
        "answering": ("counted", PROMPT * INPUT + 20 * OUTPUT),
        "usage": ("provider", PROMPT * INPUT + 30 * OUTPUT),
    }[stage]
    office.assert_in_order()


async def test_an_outcome_that_is_known_already_stays(office: Office) -> None:
    """SDKs hang up on reading [DONE]."""
    with pytest.raises(asyncio.CancelledError):
        async with office.reserve() as reservation:
            uses(answered(reservation), 30)
            reservation.outcome = Outcome.COMPLETED
            raise asyncio.CancelledError
    assert (settlement(office).outcome, settlement(office).status) == ("completed", 200)


@pytest.mark.parametrize(
    ("step", "outcome", "cost"),
    [
        (lambda reservation: None, "failed", 0),
        (attempt, "unknown", PROMPT * INPUT),
        (lambda reservation: says(answered(reservation), 20), "truncated",
         PROMPT * INPUT + 20 * OUTPUT),
    ],
    ids=["before", "sent", "answering"],
)  # fmt: skip
async def test_a_fault_of_ours_is_paid_for_and_is_no_success(
    office: Office, step: Callable[[Reservation], Any], outcome: str, cost: int
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with office.reserve() as reservation:
            step(reservation)
            raise ZeroDivisionError
    record = settlement(office)
    assert (record.outcome, record.cost, record.status) == (outcome, cost, 500)
    office.assert_in_order()


async def test_a_status_that_was_answered_is_kept(office: Office) -> None:
    with pytest.raises(Draining):
        async with office.reserve() as reservation:
            unanswered(reservation)
            raise Draining("going down")
    assert (settlement(office).outcome, settlement(office).status) == ("unknown", 503)


async def test_a_reservation_is_settled_once(office: Office) -> None:
    async with office.reserve() as reservation:
        meter = answered(reservation)
        uses(meter, 5)
        reservation.settle()
        cost = reservation.trace.cost_nanos
        # Whatever is heard after the settlement changes nothing any more.
        uses(meter, 500)
        reservation.outcome = Outcome.TRUNCATED
        reservation.settle()
    assert len([each for each in office.records() if isinstance(each, Settle)]) == 1
    assert (reservation.trace.outcome, reservation.trace.cost_nanos) == ("completed", cost)
    assert office.spent == cost
    assert office.metrics.settlement("completed").value == 1
    assert office.metrics.settlement("truncated").value == 0
    office.assert_in_order()


async def test_what_cannot_be_made_safe_is_voided(tmp_path: Path) -> None:
    async def cancelled(lsn: int) -> None:
        raise asyncio.CancelledError

    office = Office(tmp_path / "journal", durable=cancelled)
    with pytest.raises(asyncio.CancelledError):
        async with office.reserve():
            raise AssertionError("nothing may be sent")
    record = settlement(office)
    assert (record.outcome, record.cost, record.status) == ("void", 0, 0)
    assert {balance.count for balance in office.ledger.state.balances.values()} == {0}
    office.assert_in_order()


async def test_nothing_is_sent_before_its_record_is_safe(office: Office) -> None:
    reservation = office.reserve("a/cheap", "b/dear")
    assert office.waited_for == []
    async with reservation:
        assert office.waited_for == [reservation.lsn]
        unanswered(reservation)
        planned = await reservation.next(reservation.chain[1], "timeout")
        assert planned is not None
        assert office.waited_for == [reservation.lsn, office.ledger.state.lsn]
        assert isinstance(office.records()[-1], Attempt)


# -- what the upstream said ------------------------------------------------------------------------


async def test_an_answer_without_usage_is_counted(office: Office) -> None:
    async with office.reserve() as reservation:
        says(answered(reservation), 25)
    record = settlement(office)
    assert (record.source, record.tokens) == ("counted", (PROMPT, 0, 0, 25, 0))


async def test_a_stream_that_went_on_after_its_last_usage_is_counted(office: Office) -> None:
    async with office.reserve() as reservation:
        meter = answered(reservation)
        uses(meter, 3, prompt=7)
        says(meter, 25)
        reservation.outcome = Outcome.TRUNCATED
    record = settlement(office)
    assert (record.source, record.tokens) == ("counted", (7, 0, 0, 25, 0))


async def test_a_finished_answer_has_the_last_usage_however_much_was_counted(
    office: Office,
) -> None:
    async with office.reserve() as reservation:
        meter = answered(reservation)
        says(meter, 25)
        uses(meter, 3)
    assert settlement(office).tokens == (PROMPT, 0, 0, 3, 0)


async def test_a_count_of_ours_is_translated_into_the_models_tokens(office: Office) -> None:
    async with office.reserve("f/claude-4-7") as reservation:
        says(answered(reservation), 100)
    assert settlement(office).tokens == (15, 0, 0, 145, 0)


async def test_a_prompt_too_large_to_count_is_estimated_by_its_bytes(office: Office) -> None:
    content = "word " * 80_000
    office.change_user(monthly_limit=None)
    async with office.reserve(messages=[{"role": "user", "content": content}]) as reservation:
        attempt(reservation)
        reservation.outcome = Outcome.UNKNOWN
    assert settlement(office).tokens[0] == (reservation.quote.request.size_bytes + 3) // 4


async def test_a_price_of_zero_is_settled_like_any_other(office: Office) -> None:
    async with office.reserve("c/free") as reservation:
        uses(answered(reservation), 50, prompt=100)
    record = settlement(office)
    assert (record.outcome, record.source, record.cost) == ("completed", "provider", 0)
    assert record.tokens == (100, 0, 0, 50, 0)
    assert office.ledger.state.balances["user:alice", MONTH].count == 1


async def test_what_costs_more_than_was_held_is_posted_and_counted(office: Office) -> None:
    async with office.reserve(max_tokens=10) as reservation:
        held = office.held
        uses(answered(reservation), 1_000)
    record = settlement(office)
    assert record.cost == PROMPT * INPUT + 1_000 * OUTPUT
    assert record.overrun == record.cost - held > 0
    assert office.spent == record.cost
    assert office.metrics.overruns.value == 1


# -- several attempts ------------------------------------------------------------------------------


async def test_each_unanswered_attempt_is_paid_for_at_its_own_price(office: Office) -> None:
    async with office.reserve("a/cheap", "b/dear", "c/free") as reservation:
        unanswered(reservation)
        planned = await reservation.next(reservation.chain[1], "timeout")
        unanswered(reservation, planned)
        planned = await reservation.next(reservation.chain[2], "timeout")
        attempt(reservation, planned)
        reservation.refused()
    record = settlement(office)
    assert (record.outcome, record.source) == ("unknown", "estimated")
    assert (record.cost, record.tokens) == (PROMPT * 11_000, (2 * PROMPT, 0, 0, 0, 0))
    assert [tried.cost for tried in record.attempts] == [PROMPT * 1_000, PROMPT * 10_000, 0]
    assert office.balance("provider:a", DAY) == (PROMPT * 1_000, 0)
    assert office.balance("provider:b", DAY) == (PROMPT * 10_000, 0)
    assert office.balance("provider:c", DAY) == (0, 0)
    office.assert_in_order()


async def test_an_answer_after_unanswered_attempts_is_completed(office: Office) -> None:
    async with office.reserve("a/cheap", "b/dear") as reservation:
        unanswered(reservation)
        planned = await reservation.next(reservation.chain[1], "timeout")
        uses(answered(reservation, planned), 50, prompt=100)
    record = settlement(office)
    assert (record.outcome, record.source) == ("completed", "provider")
    assert record.cost == PROMPT * 1_000 + 100 * 10_000 + 50 * 20_000
    assert record.tokens == (PROMPT + 100, 0, 0, 50, 0)
    assert office.balance("provider:a", DAY) == (PROMPT * 1_000, 0)
    assert office.balance("provider:b", DAY) == (record.cost - PROMPT * 1_000, 0)
    office.assert_in_order()


async def test_a_request_sent_again_on_a_fresh_connection_is_one_attempt(office: Office) -> None:
    async with office.reserve() as reservation:
        attempt(reservation)
        meter = reservation.attempt(reservation.chain[0])
        reservation.sent()
        reservation.answering()
        says(meter, 3)
    record = settlement(office)
    assert (record.outcome, record.cost) == ("completed", PROMPT * INPUT + 3 * OUTPUT)
    assert len(record.attempts) == 1


async def test_holds_move_on_with_the_attempts_and_costs_stay(office: Office) -> None:
    async with office.reserve("a/cheap", "b/dear", "a/cheap", max_tokens=100) as reservation:
        dear = reservation.chain[1].plan.cost
        cheap = reservation.chain[0].plan.cost
        assert dear == 10 * cheap
        hold = office.ledger.state.holds[reservation.lsn]
        own = {"key:key_1": dear, "user:alice": dear, "org:acme": dear}
        assert amounts(hold.holds) == {**own, "provider:a": cheap}

        unanswered(reservation)
        planned = await reservation.next(reservation.chain[1], "timeout")
        paid = PROMPT * 1_000
        own = dict.fromkeys(own, dear + paid)
        assert amounts(hold.holds) == {**own, "provider:a": paid, "provider:b": dear}
        assert planned is not None and planned.plan.cost == dear

        unanswered(reservation, planned)
        await reservation.next(reservation.chain[2], "timeout")
        more = PROMPT * 10_000
        own = dict.fromkeys(own, cheap + paid + more)
        assert amounts(hold.holds) == {**own, "provider:a": cheap + paid, "provider:b": more}
    record = [each for each in office.records() if isinstance(each, Attempt)][-1]
    assert (record.n, record.provider, record.cost, record.why) == (3, "a", paid + more, "timeout")
    office.assert_in_order()


async def test_an_attempt_that_cost_nothing_leaves_no_hold_behind(office: Office) -> None:
    async with office.reserve("a/cheap", "b/dear") as reservation:
        attempt(reservation)
        reservation.refused()
        await reservation.next(reservation.chain[1], "http_500")
        assert office.balance("provider:a", DAY) == (0, 0)


async def test_the_lines_of_a_hold_tell_limits_and_totals(office: Office) -> None:
    office.accounts.terms = Terms(provider_daily={"a": USD, "b": 2 * USD})
    office.spend(100_000)
    other = office.reserve(max_tokens=100)
    async with office.reserve("a/cheap", "b/dear", max_tokens=100) as reservation:
        unanswered(reservation)
        await reservation.next(reservation.chain[1], "timeout")
        hold = office.ledger.state.holds[reservation.lsn]
        lines = {line.account: line for line in hold.holds}
        assert lines["user:alice"].limit == 5 * USD
        assert lines["provider:a"].limit == USD
        assert lines["provider:b"].limit == 2 * USD
        for line in hold.holds:
            assert line.total == sum(office.balance(line.account, line.period)), line
    ends(other)


async def test_a_candidate_that_does_not_fit_any_more_is_passed_over(office: Office) -> None:
    async with office.reserve("a/cheap", "b/dear", max_tokens=100) as reservation:
        unanswered(reservation)
        hold = office.ledger.state.holds[reservation.lsn]
        before, records = hold.holds, len(office.records())
        # The first attempt's prompt was not reckoned with, and somebody took all the rest.
        office.change_user(monthly_limit=hold.amount)
        assert await reservation.next(reservation.chain[1], "timeout") is None
        assert (hold.holds, len(office.records())) == (before, records)
        office.change_user(monthly_limit=hold.amount + PROMPT * INPUT)
        assert await reservation.next(reservation.chain[1], "timeout") is not None


@pytest.mark.parametrize("there_before", [0, 1])
async def test_a_provider_without_budget_is_passed_over(office: Office, there_before: int) -> None:
    """What was spent at one provider takes nothing of another's day."""
    office.accounts.terms = Terms(provider_daily={"a": USD, "b": 4_000_000})
    async with office.reserve("a/cheap", "b/dear", max_tokens=100) as reservation:
        unanswered(reservation)
        cost = reservation.chain[1].plan.cost
        office.accounts.terms = Terms(provider_daily={"a": USD, "b": cost - there_before})
        held = await reservation.next(reservation.chain[1], "timeout")
        assert (held is None) == bool(there_before)


async def test_an_attempt_that_cannot_be_recorded_is_not_made(office: Office) -> None:
    async with office.reserve("a/cheap", "b/dear") as reservation:
        unanswered(reservation)
        hold = office.ledger.state.holds[reservation.lsn]
        before = hold.holds
        with office.disk.broken(), pytest.raises(StorageUnavailable):
            await reservation.next(reservation.chain[1], "timeout")
        assert (hold.holds, hold.attempt) == (before, None)
        assert ("provider:b", DAY) not in office.ledger.state.balances
    assert settlement(office).cost == PROMPT * INPUT
    office.assert_in_order()


# -- how far our counts are off --------------------------------------------------------------------


async def answer_of(office: Office, *, counted: int, reported: int, prompt: int) -> None:
    async with office.reserve() as reservation:
        meter = answered(reservation)
        says(meter, counted)
        uses(meter, reported, prompt)
        reservation.outcome = Outcome.COMPLETED


async def test_what_a_provider_reports_corrects_what_is_counted(office: Office) -> None:
    """A model whose tokenizer makes half as many again is charged so, where its usage is missing
    too, and held so."""
    office.change_user(monthly_limit=100_000 * INPUT)  # low enough for prompts to be counted
    for _ in range(30):
        await answer_of(office, counted=100, reported=150, prompt=2 * PROMPT)
    async with office.reserve() as reservation:
        priced = reservation.chain[0].priced
        assert (priced.answer_factor, priced.prompt_factor) == (1500, 1000)  # a prompt too short
        says(answered(reservation), 100)
    end = settlement(office)
    assert (end.source, end.tokens[3]) == ("counted", 150)
    office.assert_in_order()


async def test_a_long_prompt_teaches_what_prompts_weigh(office: Office) -> None:
    office.change_user(monthly_limit=30_000 * INPUT)
    messages = [{"role": "user", "content": "word " * 60}]
    for _ in range(30):
        async with office.reserve(messages=messages) as reservation:
            counted = reservation.quote.counted
            assert counted is not None
            uses(answered(reservation), 1, 2 * counted)
    assert office.quote(messages=messages).priced[0].ask.prompt == 2 * counted
    with_an_image = [{"role": "user", "content": [{"type": "image_url", "image_url": "a:b"}]}]
    async with office.reserve(messages=with_an_image) as reservation:
        uses(answered(reservation), 1, 5_000)
    assert next(iter(office.factors.prompts)).answers == 30


async def test_an_answer_that_was_cut_teaches_nothing(office: Office) -> None:
    async with office.reserve() as reservation:
        meter = answered(reservation)
        says(meter, 100)
        uses(meter, 150)
        reservation.outcome = Outcome.TRUNCATED
    assert list(office.factors.answers) == []


# -- the watermark ---------------------------------------------------------------------------------


def relayed_is_covered(office: Office, reservation: Reservation, words: int) -> None:
    """Recovery would charge no less than what has been passed on."""
    hold = office.ledger.state.holds[reservation.lsn]
    priced = reservation.chain[0].priced
    said = scale(tokenizer().count(text(words)), priced.answer_factor)
    assert hold.tokens >= said
    assert hold.recovered_cost() >= priced.rate.worst_case(PROMPT, said)


SIZES = st.lists(
    st.sampled_from([1, 1, 1, 2, 3, 5, 20]) | st.integers(1, 700), min_size=1, max_size=60
)


@settings(max_examples=40, deadline=None)
@given(
    SIZES,
    st.sampled_from(["a/cheap", "f/claude-4-7", "d/unknown"]),
    st.none() | st.integers(1, 20_000),
    st.none() | st.integers(200, 20_000),
    st.sampled_from(OnExhausted),
    st.sampled_from(UnboundedPolicy),
    st.none() | st.integers(10, 3_000),
)
def test_the_watermark_is_never_below_what_was_relayed(
    sizes: list[int],
    model: str,
    declared: int | None,
    left: int | None,
    on_exhausted: OnExhausted,
    policy: UnboundedPolicy,
    learned: int | None,
) -> None:
    with TemporaryDirectory() as folder:
        office = Office(
            Path(folder) / "journal",
            limit=None if left is None else left * OUTPUT,
            on_exhausted=on_exhausted,
            unbounded_policy=policy,
        )
        if learned is not None:
            office.teach(learned, model.partition("/")[2])
        try:
            body = {} if declared is None else {"max_tokens": declared}
            reservation = office.reserve(model, **body)
        except InsufficientQuota:
            return
        answered(reservation)
        words = 0
        try:
            for size in sizes:
                relays(reservation, size)
                words += size
                relayed_is_covered(office, reservation, words)
                user = office.ledger.state.balances["user:alice", MONTH]
                assert left is None or user.spent + user.held <= left * OUTPUT
        except InsufficientQuota:
            reservation.outcome = Outcome.CUT
            assert declared is None and left is not None
            assert on_exhausted is OnExhausted.CUT and policy is UnboundedPolicy.CLAMP
        ends(reservation)
        office.assert_in_order()


ANY_TEXT = (
    st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs as well
    | st.text("aä€𝄞한 \n")
    | st.builds(lambda word, times: word * times, st.text(max_size=4), st.integers(0, 900))
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), ANY_TEXT), max_size=8), st.randoms())
def test_no_text_has_more_tokens_than_its_bound(
    texts: list[tuple[str, str]], random: Random
) -> None:
    """However it is split into events, and at any moment."""
    meter = Meter(tokenizer().count)
    said = {"a": "", "b": ""}
    for field, whole in texts:
        while whole:
            size = random.randint(1, len(whole))
            part, whole = whole[:size], whole[size:]
            said[field] += part
            index = "ab".index(field)
            meter.observe({"choices": [{"index": index, "delta": {"content": part}}]})
            exact = sum(tokenizer().count(each) for each in said.values())
            assert meter.bound() >= exact
            assert meter.bound() >= meter.counted() >= exact - meter.forced


def test_a_long_text_is_bounded_closely() -> None:
    """By no more than what is held of it, or a stream would be asked about all the time."""
    meter = Meter(tokenizer().count)
    for words in range(1, 5_000):
        says(meter, 1)
        assert words <= meter.bound() <= words + 512 + 6


@pytest.mark.parametrize("declared", [64, 300, 1_000, 4_000, 8_000])
@pytest.mark.parametrize("model", ["a/cheap", "f/claude-4-7"])
def test_a_declared_hold_takes_nine_marks_or_so(office: Office, declared: int, model: str) -> None:
    reservation = office.reserve(model, max_tokens=declared)
    answered(reservation)
    said = declared * 1000 // family_factor(model.partition("/")[2])
    for _ in range(said):
        relays(reservation, 1)
    assert len(marks(office)) <= 10
    assert all(mark.holds == () for mark in marks(office))
    ends(reservation)
    office.assert_in_order()


def test_a_hold_grows_by_an_eighth_with_the_stream(office: Office) -> None:
    office.teach(4_096)
    reservation = office.reserve()
    answered(reservation)
    hold = office.ledger.state.holds[reservation.lsn]
    first = hold.amount
    for _ in range(8_000):
        relays(reservation, 1)
    raised = [amounts(mark.holds)["user:alice"] for mark in marks(office) if mark.holds]
    assert raised == sorted(set(raised))
    assert raised[0] > first
    steps = [after - before for before, after in pairwise(raised)]
    assert all(0 < each <= (512 + 520) * OUTPUT for each in steps)
    assert len(marks(office)) <= 18
    assert hold.amount >= reservation.chain[0].priced.rate.worst_case(PROMPT, 8_000)
    assert office.balance("provider:a", DAY) == (0, hold.amount)
    ends(reservation)
    assert settlement(office).overrun == 0
    office.assert_in_order()


def test_a_provider_holds_what_its_own_attempt_needs(office: Office) -> None:
    """On the caller's accounts there is room for a dearer candidate; on this provider's is not."""
    office.accounts.terms = Terms(provider_daily={"a": 3_500 * OUTPUT})
    reservation = office.reserve("a/cheap", "b/dear")
    answered(reservation)
    hold = office.ledger.state.holds[reservation.lsn]
    first = hold.amount
    with pytest.raises(InsufficientQuota) as caught:
        for _ in range(9_000):
            relays(reservation, 1)
            spent, held = office.balance("provider:a", DAY)
            assert spent + held <= 3_500 * OUTPUT
            assert held >= hold.tokens * OUTPUT
    assert caught.value.scope == "provider"
    assert hold.amount == first
    reservation.outcome = Outcome.CUT
    ends(reservation)
    assert office.balance("provider:a", DAY)[0] <= 3_500 * OUTPUT
    office.assert_in_order()


def cut_at(office: Office, reservation: Reservation, size: int) -> tuple[int, InsufficientQuota]:
    """How many words were relayed, in events of `size`, until the stream was cut; and why."""
    answered(reservation)
    words = 0
    while words < 10_000:
        try:
            relays(reservation, size)
        except InsufficientQuota as error:
            reservation.outcome = Outcome.CUT
            ends(reservation)
            return words, error
        words += size
        relayed_is_covered(office, reservation, words)
    raise AssertionError("it was never cut")


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("model", ["a/cheap", "f/claude-4-7"])
def test_a_stream_is_cut_where_the_exact_count_says_so(
    office: Office, model: str, size: int
) -> None:
    room = 2_000
    reservation = office.reserve(model)
    prompt = reservation.chain[0].priced.ask.prompt
    limit = prompt * INPUT + room * OUTPUT
    office.change_user(monthly_limit=limit)
    words, error = cut_at(office, reservation, size)
    fit = room * 1000 // family_factor(model)
    assert fit - size < words <= fit
    record = settlement(office)
    assert (record.outcome, record.source, record.overrun) == ("cut", "counted", 0)
    assert all(sum(line.total for line in mark.holds[1:2]) <= limit for mark in marks(office))
    assert office.spent <= limit
    assert (error.status, error.scope, error.code) == (429, "user", "insufficient_quota")
    assert error.gateway is not None and error.gateway["fits_max_tokens"] == 0
    assert error.retry_after_s == (end_ms(MONTH) - office.clocks.wall_ms()) // 1000
    office.assert_in_order()


def test_what_goes_out_at_the_end_of_the_money_is_covered_too(office: Office) -> None:
    """The bound is above all that there is from the first event on, and the count is not."""
    office.change_user(monthly_limit=PROMPT * INPUT + 100 * OUTPUT)
    words, _ = cut_at(office, office.reserve(), 20)
    assert words == 100
    office.assert_in_order()


def test_a_stream_that_was_cut_short_by_others_goes_on_when_they_have_ended(
    office: Office,
) -> None:
    reservation = office.reserve()
    other = office.reserve(max_tokens=1_000)
    office.change_user(monthly_limit=office.held + 100 * OUTPUT)
    answered(reservation)
    for _ in range(1_000):
        relays(reservation, 1)
    ends(other)
    for _ in range(1_000):
        relays(reservation, 1)
    ends(reservation)
    assert settlement(office).outcome == "completed"
    office.assert_in_order()


def test_what_is_held_already_may_be_used_when_a_limit_is_lowered(office: Office) -> None:
    reservation = office.reserve()
    held = reservation.plan.output
    office.change_user(monthly_limit=0)
    words, error = cut_at(office, reservation, 1)
    assert held - 2 <= words <= held
    assert error.gateway is not None and error.gateway["limit_usd"] == "0.000000000"
    office.assert_in_order()


@pytest.mark.parametrize("scope", ["key", "user", "org", "provider"])
def test_every_budget_can_cut_a_stream_and_is_read_as_it_is_now(office: Office, scope: str) -> None:
    reservation = office.reserve()
    limit = office.held + 300 * OUTPUT
    match scope:
        case "key":
            office.change_key(monthly_limit=limit)
        case "user":
            office.change_user(monthly_limit=limit)
        case "org":
            office.change_organization(monthly_budget=limit)
        case "provider":
            office.accounts.terms = Terms(provider_daily={"a": limit})
    words, error = cut_at(office, reservation, 5)
    assert error.scope == scope
    assert 1_024 + 280 <= words <= 1_024 + 300
    office.assert_in_order()


def test_a_grant_lets_a_stream_go_on(office: Office) -> None:
    office.change_organization(monthly_budget=4_000_000)
    reservation = office.reserve()
    answered(reservation)
    for _ in range(900):
        relays(reservation, 1)
    office.change_organization(monthly_budget=40_000_000)
    for _ in range(4_000):
        relays(reservation, 1)
    ends(reservation)
    assert settlement(office).outcome == "completed"


@pytest.mark.parametrize(
    "organization",
    [
        {"on_exhausted": OnExhausted.FINISH},
        {"unbounded_policy": UnboundedPolicy.BOUNDED},
    ],
)
def test_who_may_finish_goes_on_at_the_price_of_an_overrun(
    tmp_path: Path, organization: dict[str, Any]
) -> None:
    office = Office(tmp_path / "journal", limit=1_500 * OUTPUT, **organization)
    reservation = office.reserve()
    answered(reservation)
    for words in range(1, 4_000):
        relays(reservation, 1)
        relayed_is_covered(office, reservation, words)
    assert office.held <= 1_500 * OUTPUT
    assert len(marks(office)) < 20
    ends(reservation)
    record = settlement(office)
    assert record.cost == PROMPT * INPUT + 3_999 * OUTPUT
    assert record.overrun >= record.cost - 1_500 * OUTPUT
    assert office.metrics.overruns.value == 1
    office.assert_in_order()


def test_what_is_said_beyond_a_declared_maximum_is_an_overrun(office: Office) -> None:
    reservation = office.reserve(max_tokens=100)
    held = office.held
    answered(reservation)
    for words in range(1, 1_000):
        relays(reservation, 1)
        relayed_is_covered(office, reservation, words)
    assert office.held == held
    ends(reservation)
    assert settlement(office).overrun == settlement(office).cost - held > 0


def test_near_the_end_of_a_declared_maximum_no_more_is_marked_than_is_held(office: Office) -> None:
    reservation = office.reserve(max_tokens=2_000)
    held = office.held
    meter = answered(reservation)
    for words in range(1, 2_001):
        relays(reservation, 1)
        relayed_is_covered(office, reservation, words)
    assert meter.bound() > 2_000, "text that is not counted yet is what this is about"
    hold = office.ledger.state.holds[reservation.lsn]
    assert hold.recovered_cost() <= held
    assert len(marks(office)) <= 9
    ends(reservation)


def test_what_a_thinker_shows_beyond_its_maximum_is_recovered_too(office: Office) -> None:
    reservation = office.reserve("e/thinker", max_tokens=100)
    held = office.held
    answered(reservation)
    for _ in range(90):
        relays(reservation, 1)
    assert marks(office) == []
    for words in range(91, 1_000):
        relays(reservation, 1)
        hold = office.ledger.state.holds[reservation.lsn]
        assert hold.recovered_cost() >= max(held, PROMPT * INPUT + words * OUTPUT)
    ends(reservation)
    office.assert_in_order()


def test_a_model_that_reasons_out_of_sight_is_never_asked(office: Office) -> None:
    office.teach(100, "thinker")
    reservation = office.reserve("e/thinker")
    assert reservation.plan.lowered is not None or reservation.plan.output == 8_000
    answered(reservation)
    for _ in range(3_000):
        relays(reservation, 1)
    assert marks(office) == []
    hold = office.ledger.state.holds[reservation.lsn]
    assert hold.recovered_cost() == hold.amount
    ends(reservation)


def test_a_thinker_may_follow_one_that_is_followed(office: Office) -> None:
    reservation = office.reserve("a/cheap", "e/thinker")
    attempt(reservation)
    reservation.refused()
    planned = at_once(reservation.next(reservation.chain[1], "http_500"))
    answered(reservation, planned)
    for _ in range(500):
        relays(reservation, 1)
    hold = office.ledger.state.holds[reservation.lsn]
    assert hold.hidden and hold.recovered_cost() == hold.amount
    ends(reservation)


def test_a_second_attempt_is_followed_from_its_start(office: Office) -> None:
    reservation = office.reserve("a/cheap", "b/dear")
    meter = answered(reservation)
    for _ in range(300):
        relays(reservation, 1)
    first = marks(office)
    assert first
    del meter
    reservation.unanswered()
    planned = at_once(reservation.next(reservation.chain[1], "reset"))
    answered(reservation, planned)
    hold = office.ledger.state.holds[reservation.lsn]
    assert hold.recovered_cost() == hold.amount
    relays(reservation, 1)
    assert len(marks(office)) == len(first) + 1
    paid = PROMPT * INPUT
    assert hold.recovered_cost() >= paid + PROMPT * 10_000 + 20_000
    ends(reservation)
    office.assert_in_order()


def test_a_stream_whose_watermark_cannot_be_recorded_is_ended(office: Office) -> None:
    reservation = office.reserve()
    answered(reservation)
    relays(reservation, 1)
    mark, hold = reservation.mark, office.ledger.state.holds[reservation.lsn]
    before = (hold.mark, hold.tokens, hold.holds)
    with office.disk.broken(), pytest.raises(StorageUnavailable):
        relays(reservation, 500)
    assert (hold.mark, hold.tokens, hold.holds) == before
    assert reservation.mark == mark
    ends(reservation)
    office.assert_in_order()


def test_a_watermark_that_may_be_recorded_counts_and_lets_nothing_pass(office: Office) -> None:
    reservation = office.reserve()
    answered(reservation)
    with office.disk.broken(uncertain=True), pytest.raises(StorageUnavailable):
        office.journal._spare = None  # or the record would be written there after all
        relays(reservation, 50)
    assert reservation.mark == 0
    assert office.ledger.state.holds[reservation.lsn].tokens >= 50
    give_spare(office.journal)
    ends(reservation)
    office.assert_in_order()


# -- when the journal fails at the end -------------------------------------------------------------


def test_a_settlement_that_cannot_be_recorded_keeps_its_hold_and_is_paid_first(
    office: Office,
) -> None:
    reservation, other = office.reserve(), office.reserve(max_tokens=10)
    uses(answered(reservation), 50)
    with office.disk.broken():
        ends(reservation)
        assert office.ledger.owes
        assert reservation.lsn in office.ledger.state.holds
        assert (office.spent, office.held > 0) == (0, True)
        before = office.ledger.state.lsn
        with pytest.raises(StorageUnavailable):
            office.reserve()
        assert office.ledger.state.lsn == before
    assert reservation.trace.outcome == "completed"
    give_spare(office.journal)
    office.reserve(max_tokens=1)
    settle, reserve = office.records()[-2:]
    assert isinstance(settle, Settle)
    assert (settle.r, settle.cost) == (reservation.lsn, PROMPT * INPUT + 50 * OUTPUT)
    assert type(reserve).__name__ == "Reserve"
    assert office.ledger.owes == 0
    assert other.lsn in office.ledger.state.holds


def test_what_is_owed_is_recorded_in_its_order(office: Office) -> None:
    ones = [office.reserve(max_tokens=1) for _ in range(3)]
    with office.disk.broken():
        for each in ones:
            ends(each)
    # The disk is well again, and what comes now waits behind those.
    last = office.reserve(max_tokens=1)
    ends(last)
    settled = [each.r for each in office.records() if isinstance(each, Settle)]
    assert settled == [each.lsn for each in (*ones, last)]
    office.assert_in_order()


@pytest.mark.parametrize("step", ["extend", "next"])
def test_a_running_request_takes_no_room_that_is_owed_to_another(office: Office, step: str) -> None:
    """One that cost more than was held for it, and is not recorded yet."""
    office.change_user(monthly_limit=7_000 * OUTPUT)
    reservation = office.reserve("a/cheap", "d/unknown")
    dearer = office.reserve(max_tokens=10)
    uses(answered(dearer), 5_000)
    with office.disk.broken():
        ends(dearer)
    assert office.ledger.owes
    if step == "extend":
        _, error = cut_at(office, reservation, 1)
        assert error.scope == "user"
    else:
        unanswered(reservation)
        at_once(reservation.next(reservation.chain[1], "timeout"))
        ends(reservation)
    assert office.spent <= 7_000 * OUTPUT
    office.assert_in_order()


def test_a_settlement_that_may_be_recorded_is_not_recorded_twice(office: Office) -> None:
    reservation = office.reserve()
    uses(answered(reservation), 50)
    with office.disk.broken(uncertain=True):
        office.journal._spare = None
        ends(reservation)
        assert office.journal.lost
    assert office.ledger.owes == 0
    assert reservation.lsn not in office.ledger.state.holds
    give_spare(office.journal)
    ends(office.reserve(max_tokens=1))
    assert [each.r for each in office.records() if isinstance(each, Settle)] == [1, 3]
    office.assert_in_order()


# -- time ------------------------------------------------------------------------------------------


def test_a_request_belongs_to_the_month_and_the_day_that_it_began_in(office: Office) -> None:
    office.accounts.terms = Terms(provider_daily={"a": USD, "b": USD})
    office.clocks.wall_s = end_ms(MONTH) / 1000 - 1
    reservation = office.reserve("a/cheap", "b/dear")
    office.clocks.wall_s += 2
    unanswered(reservation)
    planned = at_once(reservation.next(reservation.chain[1], "timeout"))
    answered(reservation, planned)
    for _ in range(3_000):
        relays(reservation, 1)
    assert any(mark.holds for mark in marks(office))
    ends(reservation)
    assert settlement(office).t == end_ms(MONTH) + 1_000
    assert {period for _, period in office.ledger.state.balances} == {MONTH, "2026-11-30"}
    assert office.spent == settlement(office).cost
    # And the next one to the next.
    ends(office.reserve(max_tokens=1))
    assert office.balance("user:alice", "2026-12") == (0, 0)
    office.assert_in_order()


# -- what the caller is told -----------------------------------------------------------------------


def test_the_figures_are_those_of_the_tightest_account(office: Office) -> None:
    reservation = office.reserve(max_tokens=100)
    assert (reservation.figures().scope, reservation.figures().held) == ("user", office.held)
    office.change_key(monthly_limit=USD)
    assert reservation.figures().scope == "key"
    office.accounts.terms = Terms(provider_daily={"a": USD // 2})
    found = reservation.figures()
    assert (found.scope, found.id, found.limit) == ("provider", "a", USD // 2)
    uses(answered(reservation), 50)
    ends(reservation)
    assert reservation.figures().spent == settlement(office).cost
    assert reservation.figures().held == 0


def test_the_held_lines_are_never_more_than_the_limit_they_tell(office: Office) -> None:
    office.teach(700)
    for _ in range(3):
        reservation = office.reserve()
        answered(reservation)
        for _ in range(1_500):
            relays(reservation, 1)
        ends(reservation)
    lines: list[Held] = []
    for record in office.records():
        lines += getattr(record, "holds", ())
    assert all(line.limit is None or line.total <= line.limit for line in lines)


def test_an_error_on_the_way_out_is_not_swallowed(office: Office) -> None:
    error = GatewayError("x")
    reservation = office.reserve()
    assert at_once(reservation.__aexit__(GatewayError, error, None)) is None
    assert settlement(office).status == 500
