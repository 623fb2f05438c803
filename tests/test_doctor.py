"""`gwproxy doctor` against the demo gateway: what it finds, what it says, how it ends."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from gwproxy.cloudflare.api import Api, session
from gwproxy.cloudflare.doctor import Doctor, Plan
from gwproxy.config import load
from gwproxy.demo import DemoUpstream
from tests.account import TOKEN, Shell, shell
from tests.harness import prices
from tests.test_cli_reconcile import History


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=TOKEN)
    await demo.start()
    yield demo
    await demo.stop()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoUpstream) -> Shell:
    return shell(tmp_path, monkeypatch, demo)


async def checks(run: Shell, *words: str) -> dict[str, dict[str, Any]]:
    await run("doctor", "--json", *words)
    assert TOKEN not in run.out + run.err
    return {row["name"]: row for row in run.json["checks"]}


SIX = (
    "gateway exists",
    "keys stored",
    "unified endpoint",
    "primary provider",
    "fallback provider openai",
    "fallback provider anthropic",
    "logs readable",
)


async def test_where_all_is_well_each_check_passes(run: Shell, demo: DemoUpstream) -> None:
    demo.management.logs.cost_delay_s = 0.6
    assert await run("doctor") == 0
    assert "All is well." in run.out
    for name in (*SIX, "token", "bad token refused", "clock", "database", "journal", "prices"):
        assert f"ok    {name}" in run.out, run.out
    assert TOKEN.encode() not in run.out.encode() + run.files()
    report = orjson.loads((run.folder / "gwproxy-doctor.json").read_bytes())
    [_, gemini, openai, anthropic] = report["answers"]
    assert (gemini["usage_without_choices"], openai["usage_without_choices"]) == (False, True)
    assert "cf-aig-log-id" in openai["headers"]
    assert openai["done"] and openai["usage"]["prompt_tokens"]
    assert anthropic["finish_reason"]
    # The log's late figures were waited for.
    assert report["logs"][openai["log_id"]]["cost"] is not None
    assert len(demo.record) == 5  # the four answers, and one refused for its token


Fault = tuple[str, Any, str, str]
"""The check that fails, what is wrong, what is said of it, what is to be done."""

ALONE: list[Fault] = [
    (
        "gateway exists",
        lambda demo: demo.management.gateways.clear(),
        'no gateway "demo"',
        "gwproxy cloudflare setup",
    ),
    (
        "keys stored",
        lambda demo: demo.management.provider_configs["demo"].clear(),
        "google-ai-studio, openai, anthropic",
        "gwproxy cloudflare keys store openai",
    ),
]
TOGETHER: list[Fault] = [
    (
        "unified endpoint",
        lambda demo: demo.script(provider="google-ai-studio", fault="code-2005"),
        "no answer from the provider",
        "try again",
    ),
    (
        "primary provider",
        lambda demo: demo.script(provider="google-ai-studio", fault="status-503"),
        "status 503",
        "try again",
    ),
    (
        "fallback provider anthropic",
        lambda demo: demo.script(provider="anthropic", fault="code-2008"),
        "does not know this provider prefix",
        "correct `prefix`",
    ),
    (
        "fallback provider openai",
        lambda demo: demo.script(provider="openai", fault="garbage"),
        "no chat completion",
        "check the address",
    ),
    (
        "logs readable",
        lambda demo: demo.management.fault({"on": "logs", "fault": "edge"}),
        "took this machine for a bot",
        "another network",
    ),
    (
        "bad token refused",
        lambda demo: demo.management.gateways["demo"].update(authentication=False),
        "answers whoever knows its address",
        "--authentication on",
    ),
]


@pytest.mark.parametrize("faults", [[ALONE[0]], [ALONE[1]], TOGETHER], ids=["1", "2", "others"])
async def test_each_failure_says_what_it_is_and_what_to_do(
    run: Shell, demo: DemoUpstream, faults: list[Fault]
) -> None:
    if len(faults) > 1:
        # Who comes with a wrong token is let in here, and must not use up a fault.
        demo.script(provider="google-ai-studio", fault="len-3")
    for _, break_it, _, _ in faults:
        break_it(demo)
    found = await checks(run)
    assert run.code == 1
    assert not run.json["ok"]
    for name, _, says, cure in faults:
        assert found[name]["state"] == "fail", found
        assert says in found[name]["cause"]
        assert cure in found[name]["cure"]
        assert found[name]["curl"].startswith("curl -sS")


async def test_a_token_that_is_not_known_is_told_once(run: Shell, demo: DemoUpstream) -> None:
    demo.management.tokens = {"another": frozenset({"run", "read", "edit"})}
    found = await checks(run, "--no-models")
    assert found["token"]["state"] == "fail"
    assert "$CLOUDFLARE_API_TOKEN" in found["token"]["curl"]
    for name in ("gateway exists", "keys stored", "logs readable"):
        assert (found[name]["state"], found[name]["cause"]) == (
            "skip",
            "the token is not accepted: see above",
        )


@pytest.mark.parametrize("fault", ["status-429", "edge", "garbage"])
async def test_a_token_of_which_nothing_was_heard_is_not_called_refused(
    run: Shell, demo: DemoUpstream, fault: str
) -> None:
    wait = {"retry_after_s": 3600}  # longer than anybody waits
    demo.management.fault({"on": "any", "fault": fault, "count": 0, **wait})
    found = await checks(run, "--no-models")
    assert found["token"]["state"] == "fail"
    for name in ("gateway exists", "keys stored", "logs readable"):
        assert found[name]["cause"] == "the token could not be verified: see above"


async def test_a_stream_that_broke_off_was_reached(run: Shell, demo: DemoUpstream) -> None:
    demo.script(provider="openai", fault="close-after-1")
    check = (await checks(run))["fallback provider openai"]
    assert check["state"] == "fail"
    assert "broke off after status 200" in check["cause"]
    assert "provider's status" in check["cure"] and "DNS" not in check["cure"]


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ("status-401", "gwproxy cloudflare rotate openai"),
        ("code-2003", "gwproxy cloudflare gateways update demo --rate-limit"),
        ("code-2018", "gwproxy cloudflare keys store openai"),
    ],
)
async def test_the_cure_is_a_command_that_can_be_typed(
    run: Shell, demo: DemoUpstream, fault: str, cure: str
) -> None:
    demo.script(provider="openai", fault=fault)
    check = (await checks(run))["fallback provider openai"]
    assert check["state"] == "fail"
    assert cure in check["cure"]


async def test_a_token_that_may_only_run_is_told_what_it_lacks(
    run: Shell, demo: DemoUpstream
) -> None:
    demo.management.tokens = {TOKEN: frozenset({"run"})}
    found = await checks(run)
    assert "may not read gateways" in found["token"]["cause"]
    assert found["primary provider"]["state"] == "pass"
    # An operator's own token for these, beside the one that may only run.
    demo.management.tokens["reads"] = frozenset({"read"})
    run.monkeypatch.setenv("CLOUDFLARE_OPERATOR_TOKEN", "reads")
    run.monkeypatch.setenv("GWPROXY__UPSTREAM__API_TOKEN", "env:CLOUDFLARE_OPERATOR_TOKEN")
    assert await run("doctor") == 0, run.out


async def test_nobody_there_ends_with_3(run: Shell, demo: DemoUpstream) -> None:
    await demo.stop()
    found = await checks(run, "--no-models")
    assert run.code == 3
    assert "cannot be reached" in found["token"]["cause"]


async def test_what_the_machine_itself_lacks(run: Shell, demo: DemoUpstream) -> None:
    run.monkeypatch.setenv("GWPROXY__PROVIDERS__OPENAI__MODEL", "gpt-9-nobody-has-priced")
    (run.folder / "gwproxy.db").write_bytes(b"this is no database" * 100)
    found = await checks(run, "--no-models")
    assert "openai/gpt-9-nobody-has-priced" in found["prices"]["cause"]
    assert '[prices.models."openai/gpt-9-nobody-has-priced"]' in found["prices"]["cure"]
    assert found["database"]["state"] == "fail"
    assert "accept-loss" in found["journal"]["cure"]
    assert found["primary provider"]["state"] == "skip"


async def test_a_lost_database_is_said_to_be_rebuilt_at_the_next_start(run: Shell) -> None:
    await History(3, every=10).write(run.folder)
    for file in run.folder.glob("gwproxy.db*"):
        file.unlink()
    found = await checks(run, "--no-models")
    assert found["database"]["state"] == "warn"
    assert "the next start rebuilds it from" in found["database"]["cause"]
    assert found["journal"]["state"] == "pass"
    assert "goes up to record" in found["journal"]["cause"]
    # Without the beginning, and without a backup, nothing can be made of the rest.
    for file in run.folder.glob("journal/backup-*.db"):
        file.unlink()
    first = min(run.folder.glob("journal/*.journal"))
    first.unlink()
    (run.folder / "journal" / "backup-00000000000000000001.db").write_bytes(b"no database")
    found = await checks(run, "--no-models")
    assert found["database"]["state"] == "fail"
    assert "cannot be rebuilt" in found["database"]["cause"]


@pytest.mark.parametrize(
    ("off_s", "state", "says"),
    [(-100, "fail", "s behind"), (100, "fail", "s ahead"), (3, "pass", "within")],
)
async def test_a_clock_that_is_off_is_told(
    run: Shell, demo: DemoUpstream, off_s: int, state: str, says: str
) -> None:
    config = load(run.folder / "config.toml", os.environ)
    plan = Plan(config, (), (), prices(), "demo", ask_models=False)
    async with session(None) as http:
        api = Api(http, demo.api_url, "demo", TOKEN)
        doctor = Doctor(plan, http, api, wall=lambda: time.time() + off_s)
        found = {check.name: check async for check in doctor.examine()}
    assert found["clock"].state == state
    assert says in found["clock"].cause


async def test_a_wrong_configuration_ends_with_2(run: Shell) -> None:
    run.monkeypatch.setenv("GWPROXY__UPSTREAM__FLAVOUR", "other")
    assert await run("doctor") == 2
    assert "is not known" in run.err
    assert await run("doctor", "--json") == 2
    assert run.json["problems"]


async def test_settings_that_do_not_suit_come_with_the_command_that_mends_them(
    run: Shell, demo: DemoUpstream
) -> None:
    demo.management.gateways["demo"] |= {
        "collect_logs": False, "cache_ttl": 300, "retry_max_attempts": 3, "authentication": False,
    }  # fmt: skip
    found = await checks(run, "--no-models")
    assert found["gateway exists"]["state"] == "warn"
    for option in ("--authentication on", "--collect-logs on", "--cache-ttl 0", "--retries 1"):
        assert option in found["gateway exists"]["cure"]
