"""`gwproxy cloudflare` against the demo gateway: what it makes and changes there, and where the
providers' keys do not get to.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from tests.account import TOKEN, Shell, shell
from tests.test_layers import HOUSE

SECRET = "sk-secret-of-a-provider-0123456789"


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=TOKEN)
    await demo.start()
    yield demo
    await demo.stop()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoUpstream) -> Shell:
    return shell(tmp_path, monkeypatch, demo)


def names(demo: DemoUpstream) -> list[str]:
    return list(demo.management.gateways)


# -- gateways --------------------------------------------------------------------------------------


async def test_a_gateway_is_made_when_that_was_confirmed(run: Shell, demo: DemoUpstream) -> None:
    assert await run("cloudflare", "gateways", "create", "second", stdin="n\n") == 1
    assert "Nothing was changed." in run.err
    assert names(demo) == ["demo"]
    assert await run("cloudflare", "gateways", "create", "second", stdin="y\n") == 0
    assert names(demo) == ["demo", "second"]
    made = demo.management.gateways["second"]
    assert (made["authentication"], made["collect_logs"], made["cache_ttl"]) == (True, True, None)
    assert await run("cloudflare", "gateways", "list") == 0
    assert "second" in run.out and "AUTHENTICATION" in run.out


async def test_an_update_changes_what_was_asked_and_keeps_the_rest(
    run: Shell, demo: DemoUpstream
) -> None:
    demo.management.gateways["demo"] |= {
        "spend_limits": {"enabled": True, "rules": []}, "rate_limiting_limit": 5,
        "rate_limiting_interval": 60,
    }  # fmt: skip
    assert (
        await run(
            *("cloudflare", "gateways", "update", "demo", "--cache-ttl", "300", "--retries", "2"),
            stdin="y\n",
        )
        == 0
    ), run.err
    assert "off -> 300" in run.out
    changed = demo.management.gateways["demo"]
    assert (changed["cache_ttl"], changed["retry_max_attempts"]) == (300, 2)
    assert (changed["rate_limiting_limit"], changed["authentication"]) == (5, True)
    assert changed["spend_limits"] == {"enabled": True, "rules": []}
    assert await run("cloudflare", "gateways", "update", "demo", "--cache-ttl", "300") == 0
    assert "like that already" in run.out
    assert await run("cloudflare", "gateways", "update", "demo", "--rate-limit", "9") == 2
    assert '"1000/60"' in run.err
    assert await run("cloudflare", "gateways", "update", "demo") == 2


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--cache-ttl", "59", "60 to 2592000"),
        ("--cache-ttl", "2592001", "60 to 2592000"),
        ("--cache-ttl", "-5", "0 is no cache"),
        ("--cache-ttl", "a day", "0 is no cache"),
        ("--retries", "0", "1 to 5"),
        ("--retries", "6", "1 to 5"),
        ("--log-limit", "0", "1 to 10000000"),
        ("--store-id", "../other", "Secrets Store"),
    ],
)
async def test_a_setting_that_cloudflare_would_refuse_is_refused_here(
    run: Shell, demo: DemoUpstream, option: str, value: str, says: str
) -> None:
    before = len(demo.requests)
    words = ("cloudflare", "gateways", "update", "demo", f"{option}={value}", "--yes")
    assert await run(*words) == 2
    assert f"argument {option}: " in run.err and says in run.err
    assert len(demo.requests) == before


async def test_a_gateway_is_deleted_by_whoever_types_its_id(run: Shell, demo: DemoUpstream) -> None:
    assert await run("cloudflare", "gateways", "delete", "demo", stdin="y\n") == 1
    assert "its callers will be refused" in run.err
    assert names(demo) == ["demo"]
    assert await run("cloudflare", "gateways", "delete", "demo", stdin="demo\n") == 0
    assert names(demo) == []
    assert await run("cloudflare", "gateways", "delete", "demo", "--yes") == 1
    assert "nothing of this name" in run.err
    assert await run("cloudflare", "gateways", "show", "../other") == 2


async def test_tokens_of_other_systems_are_not_shown(run: Shell, demo: DemoUpstream) -> None:
    demo.management.gateways["demo"]["otel"] = [{"authorization": "other-secret"}]
    assert await run("cloudflare", "gateways", "show", "demo") == 0
    assert "collect_logs" in run.out
    assert "other-secret" not in run.out


async def test_a_refusal_says_what_to_do_and_shows_the_command(
    run: Shell, demo: DemoUpstream
) -> None:
    demo.management.tokens[TOKEN] = frozenset({"run", "read"})
    assert await run("cloudflare", "gateways", "create", "second", "--yes") == 1
    assert "may not do this" in run.err
    assert "AI Gateway Edit" in run.err
    assert 'Bearer $CLOUDFLARE_API_TOKEN"' in run.err
    assert TOKEN not in run.err


async def test_an_account_that_is_not_configured_is_told(run: Shell) -> None:
    run.monkeypatch.setenv("GWPROXY__UPSTREAM__ACCOUNT_ID", "")
    assert await run("cloudflare", "gateways", "list") == 2
    assert "CLOUDFLARE_ACCOUNT_ID" in run.err


# -- provider keys ---------------------------------------------------------------------------------


async def test_a_key_is_stored_and_replaced_and_nowhere_to_be_seen(
    run: Shell, demo: DemoUpstream
) -> None:
    demo.management.provider_configs["demo"].clear()
    demo.management.secrets.clear()
    assert await run("cloudflare", "keys", "list") == 0
    assert "missing: gwproxy cloudflare keys store google-ai-studio" in run.err
    assert await run("cloudflare", "keys", "store", "gemini", stdin=SECRET + "\n") == 0, run.err
    seen = run.out + run.err
    [row] = demo.management.provider_configs["demo"]
    assert (row["provider_slug"], row["alias"]) == ("google-ai-studio", "default")
    assert list(demo.management.secrets.values()) == [SECRET]
    assert await run("cloudflare", "keys", "store", "google", stdin=SECRET) == 1
    assert "gwproxy cloudflare rotate google-ai-studio" in run.err
    assert await run("cloudflare", "rotate", "gemini", stdin=SECRET[::-1]) == 0
    seen += run.out + run.err
    assert list(demo.management.secrets.values()) == [SECRET[::-1]]
    assert await run("cloudflare", "keys", "list", "--json") == 0
    seen += run.out
    assert SECRET not in seen and SECRET[::-1] not in seen
    assert SECRET.encode() not in run.files()
    assert await run("cloudflare", "keys", "delete", "gemini", stdin="google-ai-studio\n") == 0
    assert demo.management.provider_configs["demo"] == []
    assert await run("cloudflare", "rotate", "gemini", stdin=SECRET) == 1
    assert "keys store google-ai-studio" in run.err


@pytest.mark.parametrize(
    "words", [("openai", SECRET), ("openai", "--key", SECRET), ("openai", "--secret", SECRET)]
)
async def test_a_key_on_the_command_line_is_refused_and_not_repeated(
    run: Shell, demo: DemoUpstream, words: tuple[str, ...]
) -> None:
    assert await run("cloudflare", "keys", "store", *words) == 2
    assert "shell's history" in run.err
    assert SECRET not in run.out + run.err
    assert not [request for request in demo.requests if request["method"] == "POST"]


@pytest.mark.parametrize("text", ["", "short\n", "has a space in it\n", "gw_live_0123456789\n"])
async def test_what_is_no_key_is_not_sent(run: Shell, demo: DemoUpstream, text: str) -> None:
    assert await run("cloudflare", "rotate", "openai", stdin=text) == 2
    assert not [request for request in demo.requests if request["method"] == "PUT"]


async def test_a_failure_does_not_repeat_the_key(run: Shell, demo: DemoUpstream) -> None:
    demo.management.fault({"on": "provider_configs", "fault": "status-500", "after": 1})
    assert await run("cloudflare", "rotate", "openai", stdin=SECRET) == 1
    assert SECRET not in run.out + run.err
    assert '"secret":"..."' in run.err


async def test_an_unknown_provider_is_told_which_there_are(run: Shell) -> None:
    assert await run("cloudflare", "keys", "store", "opneai", stdin=SECRET) == 2
    assert "google-ai-studio" in run.err
    assert await run("cloudflare", "keys", "store", "custom-hf", stdin=SECRET) == 2
    assert "its own settings" in run.err


# -- setup -----------------------------------------------------------------------------------------


async def test_setup_makes_all_that_is_missing_and_says_what_to_paste(
    run: Shell, demo: DemoUpstream
) -> None:
    assert await run("cloudflare", "setup", "--gateway", "fresh", stdin="y\n") == 1
    assert "Make it? [y/N]" in run.err
    assert "CLOUDFLARE_GATEWAY_ID=fresh" in run.out
    assert "No key of openai is stored: gwproxy cloudflare keys store openai" in run.out
    for provider in ("gemini", "openai", "anthropic"):
        words = ("cloudflare", "keys", "store", provider, "--gateway", "fresh")
        assert await run(*words, stdin=SECRET) == 0
    assert await run("cloudflare", "setup", "--gateway", "fresh") == 0
    assert "is as it should be" in run.out
    run.monkeypatch.setenv("GWPROXY__UPSTREAM__GATEWAY_ID", "fresh")
    run.monkeypatch.setenv("GWPROXY__UPSTREAM__BASE_URL", f"{demo.url}/v1/demo/fresh")
    assert await run("doctor") == 0, run.out


async def test_setup_changes_what_does_not_suit(run: Shell, demo: DemoUpstream) -> None:
    demo.management.gateways["demo"] |= {"authentication": False, "cache_ttl": 60}
    assert await run("cloudflare", "setup", "--yes") == 0
    assert "authentication" in run.out and "off -> on" in run.out
    assert demo.management.gateways["demo"]["authentication"] is True
    assert demo.management.gateways["demo"]["cache_ttl"] is None


@pytest.mark.parametrize("tries", [3, None])
async def test_setup_turns_the_gateways_own_retries_off(
    run: Shell, demo: DemoUpstream, tries: int | None
) -> None:
    demo.management.gateways["demo"]["retry_max_attempts"] = tries
    demo.management.gateways["demo"]["log_management_strategy"] = "DELETE_OLDEST"
    assert await run("cloudflare", "setup", "--yes") == 0
    if tries is None:  # that is none already
        assert "is as it should be" in run.out
        return
    assert "3 -> 1" in run.out
    assert demo.management.gateways["demo"]["retry_max_attempts"] == 1


async def test_a_key_under_another_alias_is_missing(run: Shell, demo: DemoUpstream) -> None:
    for one in demo.management.provider_configs["demo"]:
        if one["provider_slug"] == "openai":
            one["alias"] = "mine"
    assert await run("cloudflare", "keys", "list") == 0
    assert "missing: gwproxy cloudflare keys store openai" in run.err
    assert await run("cloudflare", "setup", "--yes") == 1
    assert "No key of openai is stored" in run.out
    assert await run("doctor", "--json") == 1
    found = {row["name"]: row for row in run.json["checks"]}
    assert "alias `default` for openai" in found["keys stored"]["cause"]
    assert found["fallback provider openai"]["state"] == "fail"  # no call uses it
    assert await run("cloudflare", "keys", "store", "openai", stdin=SECRET) == 0
    assert await run("doctor") == 0, run.out


async def test_who_types_what_is_no_key_is_told_and_asked_again(
    run: Shell, demo: DemoUpstream
) -> None:
    configs = demo.management.provider_configs["demo"]
    configs[:] = [one for one in configs if one["provider_slug"] != "openai"]
    terminal, slave = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gwproxy", "cloudflare", "setup", "--yes"),
        stdin=slave, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(HOUSE.parent)},
    )  # fmt: skip
    os.close(slave)
    assert process.stderr is not None
    try:
        told = []
        for typed in ("gw_live_0123456789abcdef", "a bad key", SECRET):
            told.append(await asyncio.wait_for(process.stderr.readuntil(b"later): "), 10))
            os.write(terminal, typed.encode() + b"\n")
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        os.close(terminal)
    assert b"a key of gwproxy's own" in told[1] and b"no spaces" in told[2]
    assert configs[-1]["provider_slug"] == "openai"
    assert demo.management.secrets[configs[-1]["id"]] == SECRET


async def test_what_exists_is_not_made_again(run: Shell, demo: DemoUpstream) -> None:
    assert await run("cloudflare", "gateways", "create", "demo", "--yes") == 1
    assert "gwproxy cloudflare gateways update demo" in run.err


async def test_setup_names_the_store_that_holds_the_keys(run: Shell, demo: DemoUpstream) -> None:
    as_it_should_be = {"log_management_strategy": "DELETE_OLDEST", "store_id": None}
    demo.management.gateways["demo"] |= as_it_should_be
    demo.management.provider_configs["demo"].clear()
    assert await run("cloudflare", "setup") == 1
    assert "gwproxy cloudflare setup --store-id ID" in run.err
    assert await run("cloudflare", "keys", "store", "openai", stdin=SECRET) == 1
    assert "no Secrets Store" in run.err
    assert await run("cloudflare", "setup", "--store-id", "store_1", stdin="y\n") == 1
    assert "off -> store_1" in run.out
    assert demo.management.gateways["demo"]["store_id"] == "store_1"
    assert await run("cloudflare", "keys", "store", "openai", stdin=SECRET) == 0, run.err
    words = ("cloudflare", "setup", "--gateway", "third", "--store-id", "store_2", "--yes")
    assert await run(*words) == 1  # there are no keys yet
    assert demo.management.gateways["third"]["store_id"] == "store_2"
