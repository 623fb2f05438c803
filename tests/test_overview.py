"""The process at a glance, as health and as figures: each of them is what was done."""

import os
from typing import Any

from gwproxy import __version__
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, Upstream, chat
from tests.scene import asked, metric, stream_then_wait, until


async def show(front: Front, path: str) -> Any:
    response = await front.client.get(path, headers=ADMIN)
    assert response.status == 200, await response.text()
    return await response.json()


async def test_health_says_how_it_stands_and_since_when(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    first = chat(stream=True)
    async with await front.chat(first) as answer:
        await answer.read()
    upstream.script = stream_then_wait(b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\n')
    async with asked(front) as peer:
        await peer.head()
        found = await show(front, "/admin/health")
        assert (found["streams_open"], found["holds_open"]) == (1, 1)
        assert 0 <= found["oldest_hold_s"] <= found["uptime_s"]
    assert found["status"] == "ok"
    assert found["version"] == __version__
    assert found["journal"] == found["database"] == {"state": "ok", "cause": None}
    assert found["tokenizer"] == "exact"
    assert found["started_at"].endswith("Z")
    assert (found["replayed_at_start"], found["settled_at_start"]) == (0, 0)
    assert found["journal_bytes"] >= 1 << 20
    assert found["last_record"] >= 5
    assert 10 << 20 < found["memory_bytes"] < 10 << 30
    assert 5 < found["open_files"] <= len(os.listdir("/proc/self/fd")) + 5
    app = front.gateway.app
    assert app is not None
    await app._store.back_up()
    assert (await show(front, "/admin/health"))["last_backup_at"] >= found["started_at"]


async def test_health_gives_the_cause_that_readiness_keeps_to_itself(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway(GWPROXY__FAILURE__MODE="closed")
    app = front.gateway.app
    assert app is not None
    database = front.gateway.database
    aside = database.with_suffix(".aside")
    database.rename(aside)
    await until(lambda: app._store.lost, 20)
    found = await show(front, "/admin/health")
    assert found["status"] == "unavailable"
    assert found["database"]["state"] == "lost"
    assert found["database"]["cause"]
    ready = await front.client.get("/health/ready")
    assert ready.status == 503
    assert found["database"]["cause"] not in await ready.text()


async def test_the_summary_counts_what_was_done(front: Front, upstream: Upstream) -> None:
    for body in (chat(), chat(stream=True), chat(max_tokens="many")):
        async with await front.chat(body) as answer:
            await answer.read()
    await front.client.get("/v1/usage")
    found = await show(front, "/admin/metrics")
    assert found["requests"]["2xx"] >= 2
    assert found["requests"]["4xx"] == 2
    assert found["errors"] == {"caller_invalid": 1, "caller_auth": 1}
    assert found["auth_failures"] == 1
    assert found["settlements"]["completed"] == 2
    assert found["settlements"]["client_left"] == 0
    assert (found["tokens"]["input"], found["tokens"]["output"]) == (22, 4)
    # 11 tokens in and 2 out, twice, at 1 and 2 dollars a million.
    assert found["month_usage_usd"] == "0.000030000"
    assert (found["held_usd"], found["degraded_exposure_usd"]) == ("0.000000000", "0.000000000")
    assert set(found["quota_refusals"]) == {"key", "user", "org", "provider", "outage"}
    assert await metric(front, "gwproxy_tokens_total", type="input") == 22


async def test_strangers_see_neither(front: Front) -> None:
    for path in ("/admin/health", "/admin/metrics"):
        assert (await front.client.get(path)).status == 401
        theirs = {"Authorization": f"Bearer {front.key}"}
        assert (await front.client.get(path, headers=theirs)).status == 401
