"""`gwproxy simulate`: what other limits, prices and chains would have made of calls."""

from collections.abc import AsyncIterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.period import periods
from gwproxy.core.simulate import Call, Scenario, example, simulate
from gwproxy.core.usage import Usage
from gwproxy.demo import DemoUpstream
from tests.account import TOKEN, Shell, shell
from tests.test_cli_reconcile import History

NOVEMBER = 1_793_491_200_000
"""2026-11-01T00:00:00Z."""
DAY_MS = 86_400_000


def call(number: int, user: str = "alice", cost: int = 100) -> Call:
    at = NOVEMBER + number * DAY_MS
    return Call(at, user, "acme", f"key_{user}", "a", "m", Usage(input=cost), cost)


def same(provider: str, model: str, usage: Usage, at_ms: int) -> int | None:
    return usage.input if provider == "a" else None


def test_nothing_changed_is_what_was() -> None:
    outcome = simulate([call(n) for n in range(5)], Scenario(), same)
    assert (outcome.was, outcome.would_be) == (500, 500)
    assert outcome.refused == {}
    assert outcome.served["a", "m"].calls == 5


def test_a_limit_refuses_what_does_not_fit_and_no_more() -> None:
    calls = [call(0), call(1, cost=60), call(2, cost=40), call(3, cost=1), call(4, "bob")]
    outcome = simulate(calls, Scenario({"user": 140}), same)
    assert outcome.all_refused.calls == 2  # the 60 and the 1: the 40 in between fits exactly
    assert outcome.all_refused.users == {"alice"}
    assert outcome.all_refused.first == calls[1].t
    assert set(outcome.refused) == {"user:alice"}
    assert outcome.would_be == 240


def test_an_account_of_its_own_goes_before_its_kind() -> None:
    calls = [call(n, user) for n in range(3) for user in ("alice", "bob")]
    outcome = simulate(calls, Scenario({"user": 100, "user:bob": 300}), same)
    assert {name: one.calls for name, one in outcome.refused.items()} == {"user:alice": 2}
    outcome = simulate(calls, Scenario({"org:acme": 0}), same)
    assert outcome.all_refused.calls == 6


def test_a_limit_is_a_months() -> None:
    calls = [call(0), call(29), call(30), call(31)]  # two in November, two in December
    outcome = simulate(calls, Scenario({"user": 100}), same)
    assert outcome.all_refused.calls == 2
    assert outcome.all_refused.first == calls[1].t


def test_what_has_no_price_is_taken_as_it_was_charged() -> None:
    outcome = simulate([call(0), call(1)], Scenario(chain=[("b", "x")]), same)
    assert outcome.unpriced == {("b", "x"): 2}
    assert outcome.would_be == 200


def test_one_in_so_many_goes_on_to_the_next_of_the_chain() -> None:
    chain = [("a", "1"), ("a", "2"), ("a", "3")]
    calls = [call(0)] * 400
    outcome = simulate(calls, Scenario(chain=chain, failover=Fraction(1, 20)), same)
    assert {model: one.calls for (_, model), one in outcome.served.items()} == {
        "1": 380, "2": 19, "3": 1,
    }  # fmt: skip


@pytest.mark.parametrize("percent", [0, 1, 7, 33, 40, 50, 66, 99, 100])
def test_so_many_of_a_hundred_calls_fail_over_as_was_asked_for(percent: int) -> None:
    scenario = Scenario(chain=[("a", "1"), ("a", "2")], failover=Fraction(percent, 100))
    outcome = simulate([call(0)] * 300, scenario, same)
    found = {model: one.calls for (_, model), one in outcome.served.items()}
    assert found.get("2", 0) == 3 * percent
    assert found.get("1", 0) == 300 - 3 * percent


def test_the_example_is_the_plans() -> None:
    calls = list(example(NOVEMBER, [("a", "m")]))
    assert len(calls) == 100
    assert sum(one.usage.input_total for one in calls) == 100_000
    assert sum(one.usage.output for one in calls) == 50_000
    assert NOVEMBER <= calls[-1].t < NOVEMBER + 28 * DAY_MS


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=60),
    st.dictionaries(st.sampled_from(["user", "user:a", "org:acme", "key:key_b"]),
                    st.integers(0, 300)),
)  # fmt: skip
def test_no_limit_is_ever_passed_and_every_call_is_somewhere(
    made: list[tuple[str, int]], limits: dict[str, int]
) -> None:
    calls = [call(0, user, cost) for user, cost in made]
    outcome = simulate(calls, Scenario(limits), same)
    served = sum(one.calls for one in outcome.served.values())
    assert served + outcome.all_refused.calls == len(calls)
    assert outcome.was - outcome.would_be >= 0
    if "org:acme" in limits:
        assert outcome.would_be <= limits["org:acme"]
    if "user" in limits or "user:a" in limits:
        alone = simulate([c for c in calls if c.user_id == "a"], Scenario(limits), same)
        assert alone.would_be <= limits.get("user:a", limits.get("user", 0))


# -- the command -----------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    demo = DemoUpstream(token=TOKEN)
    await demo.start()
    yield shell(tmp_path, monkeypatch, demo)
    await demo.stop()


async def test_the_example_costs_what_the_plan_says(run: Shell) -> None:
    assert await run("simulate") == 0
    # 95 and 5 of 100 calls, at 0.30 and 2.50, and at 0.15 and 0.60 USD per million tokens.
    assert "$0.14725" in run.out
    assert "$0.00225" in run.out
    assert "In all it would be $0.1495." in run.out


async def test_nothing_changed_is_what_the_ledger_has(run: Shell) -> None:
    history = History(400, every=20)  # among them holds that a killed process left, and guesses
    await history.write(run.folder)
    month = periods(history.start)[0]
    ledgers = await _as_charged(run)
    assert (await _simulated(run, month))[:2] == (ledgers, ledgers)
    (run.folder / "log.json").write_bytes(orjson.dumps(history.log()))
    assert await run("reconcile", "--file", "log.json", "--apply") == 1
    assert "corrected" in run.err, run.err
    corrected = await _as_charged(run)
    assert corrected != ledgers
    assert await run("ledger", "rerate", "--prices", "built-in", "--json") == 0
    everything = run.json["data"][-1]
    charged, would_be_usd = everything["charged_usd"], everything["would_be_usd"]
    assert int(charged.replace(".", "")) == corrected
    assert charged == would_be_usd and run.json["left_as_charged"] > 0
    was, would_be, otherwise = await _simulated(run, month)
    assert (was, would_be) == (corrected, corrected)
    assert 0 < otherwise < was
    assert await run("simulate", "--month", month) == 0
    assert "charged a hold, an estimate or a correction: kept so" in run.out
    # The same price, written out, is no change; twice the price is twice all of it.
    same = "openai/gpt-4o-mini=0.15,0.60"
    assert (await _simulated(run, month, "--price", same))[1] == corrected
    twice = await _simulated(run, month, "--price", "openai/gpt-4o-mini=0.30,1.20")
    assert twice[1] == pytest.approx(2 * corrected, rel=1e-5)


async def _as_charged(run: Shell) -> int:
    assert await run("ledger", "show", "user:alice", "--json") == 0
    return sum(int(row["spent_usd"].replace(".", "")) for row in run.json["data"])


async def _simulated(run: Shell, month: str, *words: str) -> tuple[int, int, int]:
    assert await run("simulate", "--month", month, "--json", *words) == 0, run.err
    found = run.json
    figures = (found["was_usd"], found["would_be_usd"], found["not_by_tokens"]["was_usd"])
    was, would_be, otherwise = (int(figure.replace(".", "")) for figure in figures)
    return was, would_be, otherwise


@pytest.mark.parametrize(
    ("stood", "would_be"), [(50, 200), (0, 100), (None, 100)], ids=["scaled", "free", "no price"]
)
def test_what_was_not_charged_by_tokens_is_scaled(stood: int | None, would_be: int) -> None:
    made = [replace(call(0), by_tokens=False)]
    assert simulate(made, Scenario(), same, lambda *_: stood).would_be == would_be
    free = [replace(made[0], cost=0)]
    assert simulate(free, Scenario(), same, lambda *_: stood).would_be == 0


async def test_the_help_has_no_signs_of_its_making(run: Shell) -> None:
    assert await run("simulate", "--help") == 0
    assert "%" not in run.out


async def test_a_month_of_the_ledger_under_other_terms(run: Shell) -> None:
    history = History(60, every=1000)
    await history.write(run.folder)
    month = periods(history.start)[0]
    assert await run("simulate", "--month", month, "--json") == 0
    as_it_was = run.json
    assert as_it_was["would_be_usd"] == as_it_was["was_usd"] != "0.000000000"
    assert await run("simulate", "--month", month, "--limit", "user:alice=0.01") == 0
    assert "The limit of user:alice would have refused" in run.out
    assert "calls of 1 user, first at 20" in run.out
    assert await run(
        "simulate", "--month", month, "--price", "openai/gpt-4o-mini=0.30,1.20", "--json"
    ) == 0  # fmt: skip
    doubled = run.json
    one, two = (float(row["would_be_usd"]) for row in (as_it_was, doubled))
    assert two == pytest.approx(2 * one, rel=1e-4)
    assert await run("simulate", "--month", month, "--chain", "auto", "--failover", "10") == 0
    assert "gemini-2.5-flash" in run.out and "gpt-4o-mini" in run.out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "usage.csv",
            "created_at,user_id,model,input_tokens,output_tokens\n"
            "2026-11-01T10:00:00Z,ann,openai/gpt-4o-mini,1000000,0\n"
            "2026-11-02T10:00:00Z,bob,openai/gpt-4o-mini,1000000,1000000\n",
        ),
        (
            "usage.jsonl",
            '{"created_at":"2026-11-01T10:00:00Z","user_id":"ann","provider":"openai",'
            '"model":"gpt-4o-mini","tokens_in":1000000,"tokens_out":0}\n\n'
            '{"created_at":"2026-11-02","user_id":"bob","model":"openai/gpt-4o-mini",'
            '"tokens_in":1000000,"tokens_out":1000000}\n',
        ),
    ],
)
async def test_a_file_of_usage(run: Shell, name: str, text: str) -> None:
    (run.folder / name).write_text(text)
    assert await run("simulate", "--file", name, "--limit", "user=0.5", "--json") == 0, run.err
    assert run.json["would_be_usd"] == "0.150000000"
    assert run.json["refused"] == {
        "calls": 1, "users": 1, "first_at": run.json["refused"]["first_at"],
        "by_account": {"user:bob": 1},
    }  # fmt: skip
    assert run.json["refused"]["first_at"].startswith("2026-11-02T")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--limit", "alice"), "user:alice=5"),
        (("--limit", "user=-1"), "user:alice=5"),
        (("--price", "gpt=1"), "openai/gpt-4o-mini=0.2,0.8"),
        (("--failover", "101"), "from 0 to 100"),
        (("--month", "2026-11", "--failover", "5"), "--chain"),
        (("--month", "2026-13"), '"2026-11"'),
        (("--chain", "nobody/x"), "no model here"),
        (("--month", "November"), '"2026-11"'),
        (("--file", "nowhere.csv"), "No such file"),
        (("--file", "config.toml"), "row 1"),
    ],
)
async def test_what_cannot_be_used_is_told(run: Shell, words: tuple[str, ...], says: str) -> None:
    assert await run("simulate", *words) == 2
    assert says in run.err


async def test_what_changes_nothing_is_told(run: Shell) -> None:
    assert await run(
        "simulate", "--limit", "user:nosuch=1", "--limit", "user:user_1=5", "--limit", "org=100",
        "--price", "openai/nosuch=1,2", "--price", "openai/gpt-4o-mini=1,2",
    ) == 0  # fmt: skip
    assert run.err.splitlines() == [
        "--limit user:nosuch: no call is of this account, so it changes nothing.",
        "--price openai/nosuch: no call is of this model, so it changes nothing.",
    ]


async def test_a_folder_without_a_database_says_what_may_be_the_cause(run: Shell) -> None:
    assert await run("simulate", "--month", "2026-11") == 1
    assert "unable to open database file" in run.err
    assert "check [storage] path, and run it as that user" in run.err


async def test_a_month_without_calls_is_told(run: Shell) -> None:
    await History(1, every=1000).write(run.folder)
    assert await run("simulate", "--month", "2019-01") == 0
    assert "no settled call" in run.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "usage.csv",
            "user_id,model,request_count,input_tokens,output_tokens\nann,openai/gpt-4o-mini,9,9,9\n",
        ),
        (
            "usage.jsonl",
            '{"model":"openai/gpt-4o-mini","request_count":9,"input_tokens":9,"output_tokens":9}\n',
        ),
    ],
)
async def test_sums_are_not_taken_for_single_calls(run: Shell, name: str, text: str) -> None:
    (run.folder / name).write_text(text)
    assert await run("simulate", "--file", name) == 2
    assert "a sum of many requests" in run.err
