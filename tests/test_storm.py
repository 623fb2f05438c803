"""Ten thousand requests over a provider that fails three times in ten: nobody notices, and each is
settled once, at what the upstream's own record says it served."""

import asyncio
import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import pytest
import pytest_asyncio

from gwproxy.demo.server import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import bearer, chat
from tests.scene import metric, until

REQUESTS = 10_000
AT_ONCE = 20

CONFIG = """
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "cloudflare-compat"
base_url = "{compat}"
token = "demo-token"
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.openai]
model = "gpt-4o-mini"
[models.auto]
chain = ["gemini", "openai"]
[breaker]
open_timeout_ms = 50
[failure]
mode = "open"  # client, upstream and gateway share one busy loop: the database may fall behind
[prices.models."google-ai-studio/gemini-2.5-flash"]
input = "1.00"
output = "2.00"
[prices.models."openai/gpt-4o-mini"]
input = "3.00"
output = "4.00"
[log]
level = "error"
"""

PRICES = {"google-ai-studio": (1_000, 2_000), "openai": (3_000, 4_000)}
"""Nano-USD a token, as the configuration has them."""

FAULTS = (
    *("status-500", "status-503", "status-429", "status-524", "code-2005", "code-2003"),
    *("reset-before-headers", "garbage", "redirect"),
)
UNANSWERED = {"reset-before-headers", "garbage"}
"""Sent, and nothing came back that could be read: the prompt is charged, as an estimate."""


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream()
    await demo.start()
    yield demo
    await demo.stop()


def served(line: dict[str, Any]) -> int:
    """What one line of the upstream's record comes to, in nano-USD."""
    usage = line["usage"]
    if not usage or not line["completed"]:
        return 0
    price_in, price_out = PRICES[line["provider"]]
    prompt = usage["prompt_tokens"]
    output = max(usage["completion_tokens"], usage["total_tokens"] - prompt)
    return int(prompt * price_in + output * price_out)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_provider_that_fails_at_random_is_seen_by_nobody(
    start_gateway: StartGateway, demo: DemoUpstream
) -> None:
    front = await start_gateway(
        config=CONFIG.format(compat=demo.compat_url),
        GWPROXY__BREAKER__FAILURE_THRESHOLD="3",
        # As in real life: the tests' own small ones have to be followed by others all the time.
        GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES=str(64 << 20),
    )
    prompt_cost = await cost_of_a_prompt(front, demo)
    demo.clear()
    chance = random.Random(20261121)
    unanswered = 0
    for _ in range(REQUESTS):
        fault = chance.choice(FAULTS) if chance.random() < 0.3 else ""
        demo.script(provider="google-ai-studio", fault=fault)

    async def ask(numbers: Any) -> Counter[tuple[int, str]]:
        seen: Counter[tuple[int, str]] = Counter()
        for number in numbers:
            response = await front.chat(chat(number % 2 == 0, model="auto", max_tokens=8))
            body = await response.read()
            assert b"stream_interrupted" not in body
            who = response.headers.get("x-gateway-provider") or body.decode()
            seen[response.status, who] += 1
        return seen

    numbers = iter(range(REQUESTS))
    async with asyncio.TaskGroup() as group:
        callers = [group.create_task(ask(numbers)) for _ in range(AT_ONCE)]
    seen = sum((caller.result() for caller in callers), Counter())
    assert seen.total() == REQUESTS
    assert {status for status, _ in seen} == {200}, seen
    assert seen[200, "gemini"] > REQUESTS / 3, "its breaker kept it out for too long"
    assert seen[200, "openai"] > REQUESTS / 5

    # What the upstream says that it served, by request; what it played as a fault it calls so.
    oracle: defaultdict[str, int] = defaultdict(int)
    # A reset on a connection that was used before passes for one that had been hung up: the same
    # attempt is sent once more, and is what its last line says.
    for line in {(line["request_id"], line["attempt"]): line for line in demo.record}.values():
        oracle[line["request_id"]] += served(line)
        if line["provider"] == "google-ai-studio" and not line["completed"]:
            lost = line["end"] in UNANSWERED or (line["status"] == 200 and not line["usage"])
            unanswered += lost
            oracle[line["request_id"]] += prompt_cost * lost
    assert unanswered > REQUESTS / 50
    assert len(oracle) == REQUESTS

    moves = await metric(front, "gwproxy_breaker_transitions_total", provider="gemini")
    assert moves > 10
    assert await metric(front, "gwproxy_holds_open") == 0
    app = front.gateway.app
    assert app is not None
    store = app._store
    await until(lambda: store.writer.applied == store.ledger.state.lsn, within_s=120)
    await front.gateway.close()
    with closing(sqlite3.connect(front.gateway.database)) as database:
        rows = database.execute("SELECT id, outcome, cost FROM request WHERE model = 'auto'")
        ledger = {name: (outcome, cost) for name, outcome, cost in rows}
        twice = database.execute(
            "SELECT count(*) FROM (SELECT reservation FROM entry WHERE account LIKE 'user:%'"
            " GROUP BY reservation HAVING count(*) > 1)"
        ).fetchone()
        held = database.execute("SELECT count(*) FROM hold").fetchone()
        spent = database.execute(
            "SELECT sum(spent) FROM balance WHERE account = 'user:alice'"
        ).fetchone()
    assert {outcome for outcome, _ in ledger.values()} == {"completed"}
    assert {name: cost for name, (_, cost) in ledger.items()} == oracle
    assert (twice, held) == ((0,), (0,))
    assert spent == (sum(oracle.values()) + prompt_cost,)


async def cost_of_a_prompt(front: Front, demo: DemoUpstream) -> int:
    """What an attempt costs that is sent and never answered."""
    demo.script(provider="google-ai-studio", fault="reset-before-headers")
    response = await front.chat(chat(model="gemini/gemini-2.5-flash", max_tokens=8))
    assert response.status == 502
    shown = await front.client.get(
        f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(front.key)
    )
    receipt = await shown.json()
    assert receipt["source"] == "estimated"
    return round(float(receipt["cost_usd"]) * 10**9)
