"""Money and endings on the providers' own routes: what is held where no maximum was declared, how a
budget ends a stream, what a client pays that leaves, and that no fallback changes any of it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, bearer, make_key
from tests.scene import metric, until
from tests.sdk import config, demo_upstream

HELLO: Any = [{"role": "user", "content": "Hello"}]
ASK: dict[str, dict[str, Any]] = {
    "responses": {"model": "openai/gpt-4o-mini", "input": "Why is it so?"},
    "messages": {"model": "anthropic/claude-sonnet-4-5", "messages": HELLO, "max_tokens": 9000},
}
CHAINS = """
[breaker]
failure_threshold = 100
[models.words]
chain = [
    { provider = "mock", model = "echo" },
    { provider = "openai", model = "gpt-4o-mini" },
    { provider = "custom", model = "prose" },
]
[providers.custom]
prefix = "custom-own"
[prices.models."custom-own/*"]
input = "1.00"
output = "2.00"
"""


class Stage:
    def __init__(self, front: Front, demo: DemoUpstream) -> None:
        self.front, self.demo = front, demo

    async def ask(self, api: str, key: str | None = None, **fields: Any) -> Any:
        body = {**ASK[api], **fields}
        headers = bearer(key or self.front.key)
        return await self.front.client.post(f"/v1/{api}", json=body, headers=headers)

    async def poor(self, usd: str) -> str:
        """A key of a user with so much left."""
        user = {"user_id": "poor", "monthly_limit_usd": usd}
        made = await self.front.client.post("/admin/users", json=user, headers=ADMIN)
        assert made.status == 201
        return await make_key(self.front.client, "poor")

    async def receipt(self, response: Any, key: str | None = None) -> dict[str, Any]:
        found = await self.front.client.get(
            f"/v1/receipts/{response.headers['x-request-id']}",
            headers=bearer(key or self.front.key),
        )
        told: dict[str, Any] = await found.json()
        return told

    def sent(self) -> Any:
        return orjson.loads(self.demo.requests[-1]["body"])


@pytest_asyncio.fixture
async def stage(start_gateway: StartGateway) -> AsyncIterator[Stage]:
    demo = demo_upstream()
    await demo.start()
    front = await start_gateway(config=config(demo, "cloudflare-compat") + CHAINS)
    yield Stage(front, demo)
    await demo.stop()


def last_event(text: str) -> tuple[str, Any]:
    head, _, data = text.strip().rpartition("\n\n")[2].partition("\n")
    return head.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))


async def test_a_budget_that_ends_in_a_stream_says_so_in_each_form(stage: Stage) -> None:
    # 0.6 USD a million output tokens: some 160 of them, where 1,024 would be held at first.
    key = await stage.poor("0.0001")
    stage.demo.script(fault="len-3000", count=0)
    response = await stage.ask("responses", key, stream=True)
    assert response.status == 200
    name, said = last_event(await response.text())
    assert (name, said["type"], said["code"]) == ("error", "error", "insufficient_quota")
    assert said["gateway"]["scope"] == "user" and said["sequence_number"] > 100
    told = await stage.receipt(response, key)
    assert told["outcome"] == "cut"
    assert 0 < float(told["cost_usd"]) <= 0.0001
    usage = await (await stage.front.client.get("/v1/usage", headers=bearer(key))).json()
    [mine] = [scope for scope in usage["scopes"] if scope["scope"] == "user"]
    assert mine["month_usage_usd"] == told["cost_usd"] and mine["held_usd"] == "0.000000000"


async def test_a_whole_answer_without_a_maximum_gets_one_that_fits(stage: Stage) -> None:
    key = await stage.poor("0.002")
    response = await stage.ask("responses", key)
    assert response.status == 200, await response.text()
    lowered = int(response.headers["x-gateway-max-tokens"])
    assert stage.sent()["max_output_tokens"] == lowered < 4096
    told = await stage.receipt(response, key)
    assert told["edits"] == [f"max_output_tokens={lowered}"]


async def test_a_declared_maximum_fits_or_is_refused_with_the_one_that_would(stage: Stage) -> None:
    key = await stage.poor("0.01")
    for api, field in (("responses", "max_output_tokens"), ("messages", "max_tokens")):
        refused = await stage.ask(api, key, **{field: 100_000})
        error = (await refused.json())["error"]
        assert (refused.status, error["code"]) == (429, "request_exceeds_remaining")
        fits = error["gateway"]["fits_max_tokens"]
        assert 0 < fits < 100_000
        taken = await stage.ask(api, key, **{field: fits})
        assert taken.status == 200, await taken.text()
        assert stage.sent()[field] == fits
    assert len(stage.demo.requests) == 2


async def test_whoever_asks_to_store_is_told_that_it_was_not(stage: Stage) -> None:
    response = await stage.ask("responses", store=True)
    assert (await stage.receipt(response))["edits"] == ["store=false"]
    assert stage.sent()["store"] is False and not stage.demo.stored


async def test_a_client_that_leaves_pays_for_what_it_got(stage: Stage) -> None:
    stage.demo.script(fault="len-5000+slow-5", count=0)
    for number, api in enumerate(ASK):
        response = await stage.ask(api, stream=True)
        request_id = response.headers["x-request-id"]
        await response.content.readuntil(b".delta" if api == "responses" else b"_delta")
        response.close()
        line = (await stage.demo.recorded(number + 1))[number]
        assert line["end"] == "client_left"
        await until(lambda: not open_holds(stage))
        found = await stage.front.client.get(
            f"/v1/receipts/{request_id}", headers=bearer(stage.front.key)
        )
        told = await found.json()
        assert (told["outcome"], told["client_left"]) == ("client_left", True)
        # Claude's own tokens are estimated at 1.15 of ours.
        assert 0 < told["tokens"]["output"] <= 1.15 * line["tokens"]["output"] + 1
        assert told["tokens"]["input"] > 0
        if api == "messages":
            # Anthropic has said what the prompt was, before its first word.
            assert told["tokens"]["input"] == line["tokens"]["input"]


def open_holds(stage: Stage) -> int:
    app = stage.front.gateway.app
    assert app is not None
    return len(app._store.ledger.state.holds)


async def test_of_a_chain_those_are_asked_that_have_the_api(stage: Stage) -> None:
    # The first of the chain has no Responses; the second fails; the third is somebody's own server.
    stage.demo.script(provider="openai", fault="status-503", count=0)
    for stream in (False, True):
        stage.demo.requests.clear()
        response = await stage.ask("responses", model="words", stream=stream)
        text = await response.text()
        assert response.status == 200, text
        assert response.headers["x-gateway-provider"] == "custom"
        paths = [each["path"].removeprefix("/v1/demo/demo") for each in stage.demo.requests]
        assert (paths[0], paths[-1]) == ("/openai/responses", "/custom-own/v1/responses")
        told = await stage.receipt(response)
        assert [each["provider"] for each in told["attempts"]][-1] == "custom"
        assert told["outcome"] == "completed"


async def test_an_overload_after_the_first_event_costs_nothing(stage: Stage) -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 5}}}
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    events = b"".join(b"data: %b\n\n" % orjson.dumps(each) for each in (start, error))
    stage.demo.script(
        model="claude-sonnet-4-5",
        writes=[events],
        headers={"content-type": "text/event-stream"},
        count=0,
    )
    response = await stage.ask("messages", stream=True)
    body = await response.json()
    assert (response.status, body["error"]["type"]) == (502, "api_error")
    assert body["error"]["code"] == "all_providers_failed"
    told = await stage.receipt(response)
    assert (told["outcome"], told["cost_usd"]) == ("failed", "0.000000000")
    assert await metric(stage.front, "gwproxy_holds_open") == 0


async def test_thirty_at_once_never_pass_a_budget(stage: Stage) -> None:
    # Each may cost 0.0024 at the most, and 5 of these fit.
    key = await stage.poor("0.0125")
    asked = [stage.ask("responses", key, max_output_tokens=4000) for _ in range(30)]
    answers = await asyncio.gather(*asked)
    statuses = [answer.status for answer in answers]
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 5
    await stage.demo.recorded(statuses.count(200))
    usage = await (await stage.front.client.get("/v1/usage", headers=bearer(key))).json()
    [mine] = [scope for scope in usage["scopes"] if scope["scope"] == "user"]
    real = sum(
        line["tokens"]["input"] * 150 + line["tokens"]["output"] * 600 for line in stage.demo.record
    )
    assert mine["month_usage_usd"] == f"{real / 1e9:.9f}"
    assert float(mine["month_usage_usd"]) <= 0.0125
