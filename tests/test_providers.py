"""How the providers stand: breakers that are recorded and restored, requests a minute, and what is
told of both. Over a real journal, with a clock that stands still until it is moved."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gwproxy.core.breaker import State, Terms
from gwproxy.core.errors import (
    GatewayError,
    InsufficientQuota,
    NoProviderAvailable,
    NotFound,
    RateLimited,
    StorageUnavailable,
)
from gwproxy.core.outcomes import NO_CREDITS_429, STATUSES, Outcome
from gwproxy.core.records import Breaker as BreakerRecord
from gwproxy.core.records import encode
from gwproxy.core.routing import Candidate
from gwproxy.core.trace import Trace
from gwproxy.state.accounts import Terms as MoneyTerms
from gwproxy.state.directory import Author
from gwproxy.state.providers import BUSY, Entry, Providers, Skip
from tests.office import Office, at_once, candidate, ends, give_spare

FAILURE, THROTTLED, CALLER = STATUSES[503], STATUSES[429], STATUSES[403]

Open = Callable[..., Providers]


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "journal")


@pytest.fixture
def opened(office: Office) -> Open:
    def open_(
        *, rpm: dict[str, int] | None = None, ceiling: int | None = None, **terms: Any
    ) -> Providers:
        return Providers(
            office.ledger,
            office.clocks.monotonic,
            names=("a", "b"),
            terms=Terms(**{"open_s": 60.0, "probe_s": 10.0, **terms}),
            rpm=rpm or {},
            ceiling=ceiling,
            draw=lambda: 0.0,
            durable=office.durable,
            metrics=office.metrics,
            log=office.log,
        )

    return open_


def chain(*names: str) -> list[Candidate]:
    return [candidate(f"{name}/x") for name in names]


def trace() -> Trace:
    return Trace("req_1", 0.0)


def enter(providers: Providers, name: str = "a") -> Entry:
    entry = providers.enter(name)
    assert isinstance(entry, Entry), entry
    return entry


def fail(providers: Providers, times: int = 3, how: Outcome = FAILURE, name: str = "a") -> None:
    for _ in range(times):
        enter(providers, name).ended(how)


def transitions(office: Office) -> list[tuple[str, str, str]]:
    return [
        (record.before, record.after, record.why)
        for record in office.records()
        if isinstance(record, BreakerRecord)
    ]


def events(office: Office) -> list[dict[str, Any]]:
    office.log._flush()
    return [json.loads(line) for line in office.written.getvalue().splitlines()]


# -- breakers ------------------------------------------------------------------------------------


def test_each_transition_is_one_record_and_nothing_else_is(office: Office, opened: Open) -> None:
    providers = opened()
    for _ in range(20):
        enter(providers).answered(0.1)
    assert office.records() == []
    fail(providers)
    fail(providers, 3, name="b")
    office.clocks.pass_s(60)
    enter(providers).ended(FAILURE)
    office.clocks.pass_s(60)
    enter(providers).answered(0.1)
    enter(providers).answered(0.1)
    for _ in range(20):
        enter(providers).answered(0.1)
    assert transitions(office) == [
        ("closed", "open", "status_503"),
        ("closed", "open", "status_503"),
        ("open", "half_open", "the open time is over"),
        ("half_open", "open", "status_503"),
        ("open", "half_open", "the open time is over"),
        ("half_open", "closed", "answered again"),
    ]
    assert all(len(encode(record)) < 300 for record in office.records())
    office.assert_in_order()


def test_the_log_tells_each_transition_in_the_agreed_words(office: Office, opened: Open) -> None:
    providers = opened()
    fail(providers)
    office.clocks.pass_s(60)
    enter(providers).answered(0.1)
    enter(providers).answered(0.1)
    lines = events(office)
    assert [line["event"] for line in lines] == [
        "Circuit breaker state transition",
        "Circuit breaker opened due to failures",
        "Circuit breaker state transition",
        "Circuit breaker transitioning from OPEN to HALF_OPEN",
        "Circuit breaker state transition",
        "Circuit breaker closed after successful recovery",
    ]
    assert {line["provider"] for line in lines} == {"a"}
    moves = [(line["from"], line["to"]) for line in lines if "from" in line]
    assert moves == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]
    assert (lines[1]["reason"], lines[1]["open_s"]) == ("status_503", 60.0)
    metrics = office.metrics
    assert metrics.breaker_state("a").value == 0
    assert metrics.breaker_transition("a", "closed", "open").value == 1
    assert metrics.provider_attempt("a", "upstream_failure").value == 3
    assert metrics.provider_attempt("a", "success").value == 2


def test_what_does_not_count_does_not_open_it(office: Office, opened: Open) -> None:
    providers = opened()
    for outcome in (THROTTLED, STATUSES[409], CALLER, NO_CREDITS_429):
        fail(providers, 9, outcome)
    for _ in range(9):
        enter(providers).left()
    assert office.records() == []
    assert providers.attempts("a") == {
        "success": 0,
        "caller_error": 0,
        "policy_block": 0,
        "operator_fault": 18,
        "throttled": 18,
        "upstream_failure": 0,
    }


@pytest.mark.parametrize(
    ("waited_s", "due_s"), [(0.0, 60.0), (20.0, 40.0), (59.0, 1.0), (3600.0, 0.0), (-3600.0, 60.0)]
)
def test_after_a_restart_an_open_one_waits_for_what_remains(
    office: Office, opened: Open, waited_s: float, due_s: float
) -> None:
    """Also where the wall clock was set back in between: never longer than a whole open time."""
    fail(opened())
    office.clocks.monotonic_s = 5.0  # a new process, on another count of seconds
    office.clocks.wall_s += waited_s
    office.ledger.state.t = 0  # its ledger has loaded nothing but the breakers
    providers = opened()
    assert providers.of("a").breaker.state is State.OPEN
    assert office.metrics.breaker_state("a").value == 2
    assert providers.of("a").breaker.wait_s(5.0) == pytest.approx(due_s, abs=0.01)
    office.clocks.pass_s(due_s + 0.01)
    enter(providers).answered(0.1)


def test_a_probe_dies_with_its_process_and_the_next_one_is_due(
    office: Office, opened: Open
) -> None:
    providers = opened()
    fail(providers)
    office.clocks.pass_s(60)
    enter(providers)
    assert providers.of("a").breaker.state is State.HALF_OPEN
    again = opened()
    assert again.of("a").breaker.state is State.OPEN
    enter(again).answered(0.1)


def test_a_journal_that_cannot_be_written_does_not_keep_a_breaker_from_working(
    office: Office, opened: Open
) -> None:
    providers = opened()
    with office.disk.broken():
        fail(providers)
    assert providers.of("a").breaker.state is State.OPEN
    assert transitions(office) == []
    office.clocks.pass_s(60)
    enter(providers).ended(FAILURE)
    assert transitions(office)[-1] == ("half_open", "open", "status_503")
    office.assert_in_order()


def test_a_stream_that_breaks_off_counts_and_one_that_ends_does_not(
    office: Office, opened: Open
) -> None:
    providers = opened()
    for broken in (True, True, False, True, True, True):
        entry = enter(providers)
        entry.answered(0.1)
        if broken:
            entry.broke("truncated")
        else:
            entry.completed()
    assert transitions(office) == [("closed", "open", "truncated")]


def test_a_provider_that_is_skipped_costs_microseconds(opened: Open) -> None:
    providers = opened()
    fail(providers)
    candidates = chain("a", "b")
    began = time.process_time()
    for _ in range(200):
        assert [each.provider.name for each in providers.available(candidates, trace())] == ["b"]
    # Below a millisecond each also on a machine that does ten other things.
    assert (time.process_time() - began) / 200 < 0.001


# -- requests a minute ---------------------------------------------------------------------------


def test_a_provider_gets_so_many_requests_a_minute(office: Office, opened: Open) -> None:
    providers = opened(rpm={"a": 3})
    for _ in range(3):
        enter(providers).answered(0.1)
    assert providers.used(providers.of("a")) == 3
    assert providers.used(providers.of("b")) is None
    assert providers.enter("a") == Skip("a", BUSY, 60.0)
    assert [each.provider.name for each in providers.available(chain("a", "b"), trace())] == ["b"]
    with pytest.raises(RateLimited) as refusal:
        providers.available(chain("a"), trace())
    assert refusal.value.retry_after_s == 60
    office.clocks.pass_s(60)
    enter(providers)


def test_all_providers_together_get_no_more_than_the_ceiling(opened: Open) -> None:
    providers = opened(ceiling=3)
    for name in ("a", "b", "a"):
        enter(providers, name).answered(0.1)
    for name in ("a", "b", "new"):
        assert isinstance(providers.enter(name), Skip)
    with pytest.raises(RateLimited):
        providers.available(chain("a", "b"), trace())


def test_who_did_not_ask_after_all_was_not_counted(office: Office, opened: Open) -> None:
    providers = opened(rpm={"a": 1}, ceiling=1)
    for _ in range(3):
        enter(providers).withdraw()
    enter(providers)
    assert isinstance(providers.enter("a"), Skip)
    fail(opened())
    office.clocks.pass_s(60)
    again = opened(rpm={"a": 1})
    enter(again).withdraw()
    enter(again)  # nor does it keep the probe's place


# -- who is told what ----------------------------------------------------------------------------


def test_when_all_are_open_the_answer_says_when_the_first_is_due(
    office: Office, opened: Open
) -> None:
    providers = opened()
    fail(providers, name="a")
    office.clocks.pass_s(20)
    fail(providers, name="b")
    about = trace()
    with pytest.raises(NoProviderAvailable) as refusal:
        providers.available(chain("a", "b"), about)
    assert (refusal.value.status, refusal.value.retry_after_s) == (503, 40)
    assert about.skipped == ("skipped a: breaker open", "skipped b: breaker open")
    assert office.metrics.skipped("a", "breaker open").value == 1
    office.clocks.pass_s(40)
    assert [each.provider.name for each in providers.available(chain("a", "b"), trace())] == ["a"]


@pytest.mark.parametrize(
    ("disabled", "kind", "retry"),
    [(("a", "b"), NoProviderAvailable, None), (("a",), NoProviderAvailable, 60)],
)
def test_a_disabled_one_is_no_reason_to_wait(
    opened: Open, disabled: tuple[str, ...], kind: type[GatewayError], retry: int | None
) -> None:
    providers = opened(rpm={"b": 1})
    enter(providers, "b").answered(0.1)
    for name in disabled:
        at_once(providers.disable(name, Author("an admin")))
    with pytest.raises(kind) as refusal:
        providers.available(chain("a", "b"), trace())
    assert refusal.value.retry_after_s == retry


def test_a_provider_without_money_is_the_reason_only_where_no_other_may_come_back(
    tmp_path: Path, opened: Open
) -> None:
    office = Office(tmp_path / "other", terms=MoneyTerms(provider_daily={"b": 1}))
    quote = office.quote("b/dear", max_tokens=10)
    with pytest.raises(InsufficientQuota):
        office.books.reserve(office.principal, quote, trace())
    providers = opened()
    fail(providers)
    about = trace()
    providers.available(chain("a", "b"), about)
    with pytest.raises(NoProviderAvailable) as refusal:
        office.books.reserve(office.principal, quote, about)
    assert refusal.value.retry_after_s == 60
    assert office.records() == []


def test_the_receipt_of_a_request_names_whom_it_passed_over(office: Office, opened: Open) -> None:
    providers = opened()
    fail(providers)
    about = trace()
    providers.available(chain("a", "b"), about)
    reservation = office.books.reserve(office.principal, office.quote("b/dear"), about)
    reservation.notes += ("skipped c: over budget",)
    ends(reservation)
    request = office.ledger.find("req_1")
    assert request is not None
    assert request.edits == ("skipped a: breaker open", "skipped c: over budget")
    office.assert_in_order()


# -- an admin ------------------------------------------------------------------------------------


def test_an_admin_disables_enables_and_resets_and_each_is_recorded(
    office: Office, opened: Open
) -> None:
    providers = opened()
    at_once(providers.disable("a", Author("an admin")))
    at_once(providers.disable("a", Author("an admin")))  # a second time changes nothing
    at_once(providers.reset("a", Author("an admin")))
    assert opened().of("a").breaker.state is State.DISABLED
    at_once(providers.enable("a", Author("an admin")))
    at_once(providers.enable("a", Author("an admin")))
    assert opened().of("a").breaker.state is State.CLOSED
    fail(providers)
    at_once(providers.reset("a", Author("an admin")))
    enter(providers).answered(0.1)
    assert transitions(office) == [
        ("closed", "disabled", "disabled by an admin"),
        ("disabled", "closed", "enabled by an admin"),
        ("closed", "open", "status_503"),
        ("open", "closed", "reset by an admin"),
    ]
    assert office.waited_for == [1, 2, 4]
    office.assert_in_order()
    with pytest.raises(NotFound, match=r"Known: a, b\."):
        at_once(providers.disable("nobody", Author("an admin")))


def test_what_restricts_holds_unrecorded_and_what_permits_does_not(
    office: Office, opened: Open
) -> None:
    providers = opened()
    with office.disk.broken(), pytest.raises(StorageUnavailable, match="not recorded"):
        at_once(providers.disable("a", Author("an admin")))
    assert isinstance(providers.enter("a"), Skip)
    give_spare(office.journal)
    office.ledger.pay()
    assert opened().of("a").breaker.state is State.DISABLED
    with office.disk.broken(), pytest.raises(StorageUnavailable):
        at_once(providers.enable("a", Author("an admin")))
    assert isinstance(providers.enter("a"), Skip)


@pytest.mark.parametrize("action", ["disable", "reset"])
def test_a_change_that_may_be_recorded_holds_and_says_so(
    office: Office, opened: Open, action: str
) -> None:
    providers = opened()
    fail(providers)
    with office.disk.broken(uncertain=True), pytest.raises(StorageUnavailable, match="not known"):
        at_once(getattr(providers, action)("a", Author("an admin")))
    assert isinstance(providers.enter("a"), Entry) is (action == "reset")
    assert office.ledger.state.breakers["a"].after == providers.of("a").breaker.state


def test_the_rates_are_of_the_last_attempts(opened: Open) -> None:
    providers = opened(failure_threshold=1000)
    standing = providers.of("a")
    assert standing.failure_rate is None
    fail(providers, 16)
    for _ in range(48):
        enter(providers).answered(2.0)
    assert (standing.failure_rate, standing.latency_s) == (0.25, 2.0)
    for _ in range(200):
        enter(providers).answered(1.0)
    assert standing.failure_rate == 0
    assert standing.latency_s == pytest.approx(1.0, abs=0.01)
