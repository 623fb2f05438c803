"""Accounts: whose money a request is, what is left of it, and how that is told."""

from dataclasses import replace
from pathlib import Path

import pytest

from gwproxy.core.identity import FailureMode, Organization
from gwproxy.core.ledger import Account, Balance, State
from gwproxy.core.period import end_ms
from gwproxy.state import accounts
from gwproxy.state.accounts import Accounts, Figures, Payer, Terms, fields, figures, tightest
from tests.office import DAY, MONTH, NOW_S, USD, Office

NOW_MS = int(NOW_S * 1000)
TOMORROW, NEXT_MONTH = "2026-11-22T00:00:00Z", "2026-12-01T00:00:00Z"


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "journal", limit=5 * USD, terms=Terms(outage_daily=2 * USD))


def of(office: Office, *, degraded: bool = False) -> tuple[Account, ...]:
    return office.accounts.payer(office.principal, (MONTH, DAY), degraded=degraded).accounts


def state(**balances: Balance) -> State:
    """Balances by scope, of those whom `of` names."""
    made = State()
    names = {"key": "key_1", "user": "alice", "org": "acme", "outage": "acme", "provider": "a"}
    for scope, balance in balances.items():
        period = DAY if scope in ("outage", "provider") else MONTH
        made.balances[f"{scope}:{names[scope]}", period] = balance
    return made


# -- which accounts --------------------------------------------------------------------------------


def test_a_request_is_charged_to_the_key_the_user_and_the_organization(office: Office) -> None:
    office.change_organization(monthly_budget=50 * USD)
    assert of(office) == (
        Account("key:key_1", MONTH, None),
        Account("user:alice", MONTH, 5 * USD),
        Account("org:acme", MONTH, 50 * USD),
    )


def test_a_changed_limit_holds_for_the_next_request(office: Office) -> None:
    office.change_key(monthly_limit=USD)
    office.change_user(monthly_limit=0)
    office.change_organization(monthly_budget=3)
    assert [account.limit for account in of(office)] == [USD, 0, 3]


def test_a_payer_is_kept_until_a_row_the_month_or_the_caller_is_another(office: Office) -> None:
    def payer(month: str = MONTH) -> Payer:
        return office.accounts.payer(office.principal, (month, f"{month}-01"))

    kept = payer()
    assert payer() is kept
    for change in (office.change_key, office.change_user, office.change_organization):
        change(version=2)
        assert payer() is not kept
        kept = payer()
        assert payer() is kept
    assert payer("2026-12").accounts[0].period == "2026-12"
    assert payer().accounts[0].period == MONTH
    office.keyring.apply(Organization(org_id="other", monthly_budget=7, created_at=1))
    office.change_user(org_id="other")
    assert payer().accounts[2].name == "org:acme"  # a request that was let in before the move
    office.principal = office.principal_of(office.key)
    assert payer().accounts[2] == Account("org:other", MONTH, 7)


def test_a_payer_has_the_limits_of_the_rows_as_they_are(office: Office) -> None:
    def payer() -> Payer:
        return office.accounts.payer(office.principal, (MONTH, DAY))

    assert payer().limits == ()
    assert [account.name for account in payer().limited] == ["user:alice"]
    office.change_key(rpm=3, monthly_limit=9)
    assert [limit.rpm for limit in payer().limits] == [3]
    assert [account.name for account in payer().limited] == ["key:key_1", "user:alice"]
    degraded = office.accounts.payer(office.principal, (MONTH, DAY), degraded=True)
    assert degraded.limited[-1] == degraded.accounts[-1] == Account("outage:acme", DAY, 2 * USD)
    office.accounts.terms = Terms(outage_daily=USD)
    degraded = office.accounts.payer(office.principal, (MONTH, DAY), degraded=True)
    assert degraded.limited[-1].limit == USD


def test_callers_who_are_kept_do_not_fill_the_memory(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "REMEMBERED", 3)
    for number in range(8):
        key = replace(office.key, key_id=f"key_{number}", digest=b"%d" % number)
        office.keyring.apply(key)
        office.accounts.payer(office.principal_of(key), (MONTH, DAY))
    assert len(office.accounts._payers) <= 3


@pytest.mark.parametrize(
    ("own", "limit"),
    [(None, 2 * USD), (7 * USD, 7 * USD), (0, 0)],  # none of his own is never no limit at all
)
def test_in_an_outage_the_organization_has_one_account_more(
    office: Office, own: int | None, limit: int
) -> None:
    office.change_organization(fallback_daily_limit=own)
    assert of(office, degraded=True) == (*of(office), Account("outage:acme", DAY, limit))


def test_a_provider_may_have_a_budget_a_day(office: Office) -> None:
    accounts = Accounts(office.keyring, Terms(provider_daily={"a": 10}))
    assert accounts.provider("a", DAY) == Account("provider:a", DAY, 10)
    assert accounts.provider("b", DAY) == Account("provider:b", DAY, None)


def test_a_providers_account_is_kept_until_its_limit_or_the_day_is_another(office: Office) -> None:
    accounts = Accounts(office.keyring, Terms(provider_daily={"a": 10}))
    assert accounts.provider("a", DAY) is accounts.provider("a", DAY)
    accounts.terms = Terms(provider_daily={"a": 11})
    assert accounts.provider("a", DAY).limit == 11
    accounts.terms = Terms()
    assert accounts.provider("a", DAY).limit is None
    assert accounts.provider("a", "2026-11-30").period == "2026-11-30"
    assert accounts.provider("a", DAY).period == DAY


def test_without_a_word_of_the_operator_an_outage_is_closed_and_costs_nothing() -> None:
    assert (Terms().failure_mode, Terms().outage_daily) == (FailureMode.CLOSED, 0)


# -- how they stand --------------------------------------------------------------------------------


def test_the_figures_of_an_account() -> None:
    made = state(user=Balance(spent=3 * USD, credited=USD, count=7, held=2 * USD))
    found = figures(made, Account("user:alice", MONTH, 5 * USD))
    assert found == Figures("user", "alice", MONTH, 3 * USD, 2 * USD, 6 * USD, USD, 7)
    assert found.resets_at == NEXT_MONTH
    assert found.json() == {
        "scope": "user",
        "id": "alice",
        "month_usage_usd": "3.000000000",
        "held_usd": "2.000000000",
        "limit_usd": "6.000000000",
        "remaining_usd": "1.000000000",
        "current_month": "2026-11",
        "request_count": 7,
        "resets_at": NEXT_MONTH,
    }


def test_the_figures_of_an_account_that_was_never_used() -> None:
    made = State()
    found = figures(made, Account("outage:acme", DAY, None))
    assert found == Figures("outage", "acme", DAY, 0, 0, None, None, 0)
    assert found.resets_at == TOMORROW
    assert (found.json()["limit_usd"], found.json()["remaining_usd"]) == (None, None)
    assert made.balances == {}


def test_nobody_has_less_than_nothing_left() -> None:
    made = state(user=Balance(spent=9))
    assert figures(made, Account("user:alice", MONTH, 5)).remaining == 0


@pytest.mark.parametrize(
    ("scope", "balances"),
    [
        ("user", {}),
        ("key", {"key": Balance(spent=6)}),
        ("key", {"key": Balance(spent=5)}),  # of two with as much left: the nearer one
        ("org", {"org": Balance(held=91)}),
        ("user", {"key": Balance(spent=6), "user": Balance(spent=1, held=1)}),
        ("key", {"key": Balance(spent=6), "user": Balance(spent=2, credited=1)}),
        ("org", {"org": Balance(spent=200)}),
        ("outage", {"outage": Balance(spent=9)}),
    ],
)
def test_the_tightest_is_the_one_with_the_least_left(
    scope: str, balances: dict[str, Balance]
) -> None:
    accounts = (
        Account("key:key_1", MONTH, 10),
        Account("user:alice", MONTH, 5),
        Account("org:acme", MONTH, 95),
        Account("outage:acme", DAY, 13),
    )
    assert tightest(state(**balances), accounts).scope == scope


def test_without_any_limit_it_is_the_users_own() -> None:
    accounts = (
        Account("key:key_1", MONTH, None),
        Account("user:alice", MONTH, None),
        Account("org:acme", MONTH, None),
    )
    assert tightest(state(org=Balance(spent=9)), accounts).scope == "user"
    assert tightest(State(), (Account("provider:a", DAY, None),)).scope == "provider"


# -- in header lines -------------------------------------------------------------------------------


def lines(text: str) -> dict[str, str]:
    assert text.endswith("\r\n")
    found = dict(line.split(": ", 1) for line in text.removesuffix("\r\n").split("\r\n"))
    assert len(found) == text.count("\r\n")
    return found


def test_header_lines_have_two_decimals() -> None:
    found = Figures("user", "alice", MONTH, 1_239_999_999, 5_000_000, 5 * USD, 3_755_000_001, 9)
    assert lines(fields(found)) == {
        "x-gateway-scope": "user",
        "x-gateway-usage-usd": "1.23",
        "x-gateway-held-usd": "0.00",
        "x-gateway-limit-usd": "5.00",
        "x-gateway-remaining-usd": "3.75",
        "x-gateway-reset": NEXT_MONTH,
    }


def test_where_there_is_no_limit_there_is_no_line_of_it() -> None:
    found = Figures("org", "acme", MONTH, 10 * USD, 0, None, None, 1)
    assert lines(fields(found)) == {
        "x-gateway-scope": "org",
        "x-gateway-usage-usd": "10.00",
        "x-gateway-held-usd": "0.00",
        "x-gateway-reset": NEXT_MONTH,
    }


def test_a_limit_of_nothing_is_a_limit() -> None:
    found = lines(fields(Figures("outage", "acme", DAY, 0, 0, 0, 0, 0)))
    assert (found["x-gateway-limit-usd"], found["x-gateway-remaining-usd"]) == ("0.00", "0.00")
    assert found["x-gateway-reset"] == TOMORROW


# -- in words --------------------------------------------------------------------------------------


def test_a_refusal_says_whose_money_how_much_and_until_when(office: Office) -> None:
    made = state(user=Balance(spent=3_250_000_000, held=1_500_000_000))
    made.t = NOW_MS - 86_400_000  # nothing was recorded for a day
    error = office.accounts.refuse(made, of(office), 900_000_000, 123, NOW_MS)
    assert (error.status, error.type, error.scope) == (429, "insufficient_quota", "user")
    assert error.code == "request_exceeds_remaining"
    assert error.message == (
        "Your monthly budget has 0.25 USD left of 5.00, and this request may cost more than that. "
        f"A maximum of 123 output tokens would fit. It starts anew at {NEXT_MONTH}."
    )
    assert error.headers == {"x-should-retry": "false"}
    assert error.retry_after_s == (end_ms(MONTH) - NOW_MS) // 1000
    assert error.gateway == {
        "scope": "user",
        "limit_usd": "5.000000000",
        "settled_usd": "3.250000000",
        "held_usd": "1.500000000",
        "needed_usd": "0.900000000",
        "fits_max_tokens": 123,
        "resets_at": NEXT_MONTH,
    }


def test_a_refusal_where_nothing_would_fit(office: Office) -> None:
    made = state(user=Balance(spent=5 * USD))
    error = office.accounts.refuse(made, of(office), USD, 0, NOW_MS)
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert error.message == (
        "Your monthly budget is used up: 5.00 USD spent and 0.00 USD held of 5.00. "
        f"It starts anew at {NEXT_MONTH}."
    )


def test_a_refusal_at_the_bound_of_an_outage_says_that_it_may_be_over_soon(office: Office) -> None:
    outage = Account("outage:acme", DAY, USD)
    spent = state(outage=Balance(spent=USD))
    error = office.accounts.refuse(spent, (*of(office), outage), USD, 0, NOW_MS)
    assert error.message == (
        "What your organization may spend while the gateway's database is away is used up: "
        "1.00 USD spent and 0.00 USD held of 1.00. As soon as the database is back, the usual "
        f"budgets hold again, and this one does not count; otherwise it starts anew at {TOMORROW}."
    )
    assert error.headers == {"x-should-retry": "false"}


def test_a_budget_that_a_prompt_alone_is_too_much_for_is_not_called_used_up(
    office: Office,
) -> None:
    error = office.accounts.refuse(State(), of(office), 6 * USD, 0, NOW_MS)
    assert error.message.startswith(
        "Your monthly budget has no room for this: 0.00 USD spent and 0.00 USD held of 5.00."
    )


@pytest.mark.parametrize(
    ("account", "words", "retry_after_s"),
    [
        (Account("key:key_1", MONTH, 1), "The budget of this API key", 812_400),
        (Account("org:acme", MONTH, 1), "The monthly budget of your organization", 812_400),
        (Account("provider:a", DAY, 1), "Today's budget of the model's provider", 34_800),
        (Account("outage:acme", DAY, 1), "What your organization may spend while the", 34_800),
    ],
)
def test_a_refusal_names_its_scope(
    office: Office, account: Account, words: str, retry_after_s: int
) -> None:
    error = office.accounts.refuse(State(), (account,), 2, 0, NOW_MS)
    assert error.message.startswith(words)
    assert error.scope == account.name.partition(":")[0]
    assert error.retry_after_s == retry_after_s


def test_the_last_moment_of_a_period_has_a_wait_of_a_second(office: Office) -> None:
    last = end_ms(DAY) - 1
    error = office.accounts.refuse(State(), (Account("provider:a", DAY, 1),), 2, 0, last)
    assert error.retry_after_s == 1
