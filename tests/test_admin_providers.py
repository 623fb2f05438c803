"""`/admin/providers` and `gwproxy providers`: what they show, and what they change at once."""

import asyncio
import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import orjson
import pytest

from gwproxy.cli import main
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, ADMIN_KEY, Upstream, chat
from tests.scene import sends

PROVIDER = """
[providers.first]
base_url = "{upstream}"
prefix = ""
model = "one"
rpm = 100
daily_usd = "10"
[prices.models."first/one"]
input = "1.00"
output = "2.00"
"""

DOWN = sends(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")


async def start(start_gateway: StartGateway, upstream: Upstream) -> Front:
    return await start_gateway(
        PROVIDER.format(upstream=upstream.url), GWPROXY__BREAKER__FAILURE_THRESHOLD="3"
    )


async def asked(front: Front, method: str, path: str, status: int = 200) -> Any:
    response = await front.client.request(method, f"/admin/providers{path}", headers=ADMIN)
    answer = await response.json()
    assert response.status == status, answer
    return answer


async def status_of_a_call(front: Front) -> int:
    response = await front.chat(chat(model="first/one"))
    await response.read()
    status: int = response.status
    return status


async def test_how_a_provider_stands(start_gateway: StartGateway, upstream: Upstream) -> None:
    front = await start(start_gateway, upstream)
    page = await asked(front, "GET", "")
    assert page["next_cursor"] is None
    fresh, passed_through = page["data"]
    assert passed_through["provider"] == "upstream"
    assert fresh == {
        "provider": "first",
        "state": "closed",
        "enabled": True,
        "consecutive_failures": 0,
        "retry_at": None,
        "success_rate": None,
        "failure_rate": None,
        "latency_ms": None,
        "attempts": dict.fromkeys(
            ("success", "caller_error", "policy_block", "operator_fault", "throttled"), 0
        )
        | {"upstream_failure": 0},
        "rpm": 100,
        "requests_last_minute": 0,
        "daily_limit_usd": "10.000000000",
        "day_usage_usd": "0.000000000",
        "day_held_usd": "0.000000000",
        "resets_at": fresh["resets_at"],
        "gateway": None,
    }
    upstream.queue = [DOWN]
    assert [await status_of_a_call(front) for _ in range(4)] == [502, 200, 200, 200]
    shown = await asked(front, "GET", "/first")
    assert (shown["success_rate"], shown["failure_rate"]) == (0.75, 0.25)
    assert (shown["requests_last_minute"], shown["day_usage_usd"]) == (4, "0.000045000")
    assert shown["attempts"]["success"] == 3
    assert shown["latency_ms"] > 0
    upstream.script = DOWN
    assert [await status_of_a_call(front) for _ in range(4)] == [502, 502, 502, 503]
    shown = await asked(front, "GET", "/first")
    assert (shown["state"], shown["consecutive_failures"]) == ("open", 3)
    assert shown["retry_at"] > "2026"


async def test_an_operators_word_holds_for_the_next_request(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start(start_gateway, upstream)
    shown = await asked(front, "POST", "/first/disable")
    assert (shown["state"], shown["enabled"], shown["retry_at"]) == ("disabled", False, None)
    response = await front.chat(chat(model="first/one"))
    assert (response.status, "Retry-After" in response.headers) == (503, False)
    assert (await asked(front, "POST", "/first/reset"))["state"] == "disabled"
    assert (await asked(front, "POST", "/first/enable"))["state"] == "closed"
    assert await status_of_a_call(front) == 200
    upstream.script = DOWN
    assert [await status_of_a_call(front) for _ in range(4)] == [502, 502, 502, 503]
    assert (await asked(front, "POST", "/first/reset"))["state"] == "closed"
    assert await status_of_a_call(front) == 502
    told = await front.gateway.lines("Circuit breaker state transition", 4)
    assert [(each["from"], each["to"]) for each in told] == [
        ("closed", "disabled"),
        ("disabled", "closed"),
        ("closed", "open"),
        ("open", "closed"),
    ]
    assert told[0]["why"] == "disabled by bootstrap"


async def test_nobody_else_and_nothing_else(front: Front) -> None:
    for method, path in (("GET", ""), ("GET", "/upstream"), ("POST", "/upstream/disable")):
        response = await front.client.request(method, f"/admin/providers{path}")
        assert response.status == 401
    error = (await asked(front, "POST", "/nobody/disable", 404))["error"]
    assert "Known: upstream." in error["message"]
    assert (await asked(front, "POST", "/upstream/explode", 404))["error"]["code"] == "not_found"
    assert (await asked(front, "GET", "?colour=red", 400))["error"]["param"] == "colour"
    page = await asked(front, "GET", "?limit=1&cursor=upstream")
    assert page == {"data": [], "next_cursor": None}


# -- the command ---------------------------------------------------------------------------------


def run(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["providers", *argv])
    return code, out.getvalue(), err.getvalue()


async def test_the_command_asks_a_running_server(
    start_gateway: StartGateway, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = await start(start_gateway, upstream)
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("UPSTREAM_TOKEN", "x")
    assert await status_of_a_call(front) == 200
    where = ("--config", str(front.gateway._folder / "config.toml"), "--url", front.url)
    code, out, err = await asyncio.to_thread(run, "disable", "first", *where)
    assert code == 0, err
    assert "disabled" in out
    assert await status_of_a_call(front) == 503
    code, out, _ = await asyncio.to_thread(run, "list", *where)
    first, second = out.splitlines()[1:]
    assert code == 0
    assert first.split()[:2] == ["first", "disabled"]
    assert "$0.000015 of $10.00" in first
    assert second.split()[:2] == ["upstream", "closed"]
    code, out, err = await asyncio.to_thread(run, "reset", "nobody", *where)
    assert (code, out) == (1, "")
    assert "Known: first, upstream." in err
    code, out, _ = await asyncio.to_thread(run, "list", "--json", *where)
    assert orjson.loads(out)["data"][0]["state"] == "disabled"


def test_without_a_server_it_holds_from_the_next_start_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[upstream]\nflavour = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'
        "[storage]\njournal_segment_bytes = 1048576\n" + PROVIDER.format(upstream="http://[::1]:9")
    )
    for name in os.environ:
        if name.startswith(("GWPROXY", "AI_", "CLOUDFLARE")):
            monkeypatch.delenv(name)
    where = ("--config", str(config))
    code, _, err = run("disable", "first", *where)
    assert code == 0, err
    assert not err
    code, out, _ = run("list", *where)
    assert out.splitlines()[1].split()[:2] == ["first", "disabled"]
    assert run("enable", "first", *where)[0] == 0
    code, out, _ = run("list", "--json", *where)
    assert orjson.loads(out)["data"][0]["state"] == "closed"


async def test_what_an_operator_does_is_in_the_audit_and_what_a_breaker_does_is_not(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start(start_gateway, upstream)
    upstream.queue = [DOWN] * 3
    for _ in range(3):
        await status_of_a_call(front)
    for action in ("reset", "disable", "disable", "enable"):
        await asked(front, "POST", f"/first/{action}")
    answer = await front.client.get("/admin/audit?noun=provider&id=first", headers=ADMIN)
    lines = (await answer.json())["data"]
    told = [(line["action"], line["before"]["state"], line["after"]["state"]) for line in lines]
    assert told == [
        ("enable", "disabled", "closed"),
        ("disable", "closed", "disabled"),
        ("reset", "open", "closed"),
    ]
    assert {line["actor"] for line in lines} == {"bootstrap"}
    assert all(line["request_id"].startswith("req_") and line["address"] for line in lines)
