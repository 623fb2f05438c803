"""Budgets over real sockets: what is let in, what is refused and how, and what it all came to."""

import asyncio
import json
from decimal import Decimal
from typing import Any

import openai
import pytest

from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, DONE, Received, Upstream, Wire, chat, delta, make_key, usage_only
from tests.raw import connect
from tests.scene import ask, assert_nothing_left, until

DEAR = """
[prices.models."mock/dear"]
input = "0"
output = "10000"
max_output_tokens = 1000
"""
"""A cent for each token: a hundred of them are a dollar."""

DOLLAR = 100
TEXT = "Hello" + " there" * 99
"""A hundred tokens."""


class Crowd:
    """An upstream whose answers cost a dollar each and wait until they are let go."""

    def __init__(self, upstream: Upstream) -> None:
        self.arrived = 0
        self.go = asyncio.Event()
        upstream.script = self.answer

    async def answer(self, wire: Wire, received: Received) -> None:
        self.arrived += 1
        await self.go.wait()
        most = received.json.get("max_tokens", DOLLAR)
        tokens = min(DOLLAR, most)
        usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
        if received.json.get("stream"):
            await wire.start()
            for word in ["Hello", *[" there"] * (tokens - 1)]:
                await wire.chunk(delta(word))
            await wire.chunk(delta(finish="stop"))
            await wire.chunk(usage_only(**usage))
            await wire.chunk(DONE)
            await wire.end()
            return
        message = {"role": "assistant", "content": TEXT}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        await wire.answer(json.dumps({"choices": [choice], "usage": usage}).encode())


async def send(front: Front, key: str | None = None, **fields: Any) -> tuple[int, str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = await front.chat(chat(model="mock/dear", **fields), **headers)
    text = await response.text()
    return response.status, text, response.headers


async def at_once(front: Front, crowd: Crowd, number: int, **fields: Any) -> list[Any]:
    """So many calls at the same time; nobody is answered before everybody was let in or not."""
    crowd.go.clear()
    refused = 0

    async def one() -> tuple[int, str, Any]:
        nonlocal refused
        result = await send(front, **fields)
        refused += result[0] == 429
        return result

    before = crowd.arrived
    calls = asyncio.gather(*[one() for _ in range(number)])
    await until(lambda: crowd.arrived - before + refused >= number, 30)
    crowd.go.set()
    return await calls


async def usage(front: Front, scope: str = "user") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {front.key}"}
    answer = await (await front.client.get("/v1/usage", headers=headers)).json()
    (found,) = [each for each in answer["scopes"] if each["scope"] == scope]
    return dict(found)


async def limited(start_gateway: StartGateway, limit: str, more: str = DEAR) -> Front:
    """A gateway whose user may spend `limit` dollars."""
    front = await start_gateway(more)
    user = {"user_id": "bob", "monthly_limit_usd": limit}
    assert (await front.client.post("/admin/users", json=user, headers=ADMIN)).status == 201
    front.key = await make_key(front.client, "bob")
    return front


def completed(results: list[Any]) -> int:
    return sum(
        status == 200
        and ("[DONE]" in text or '"choices"' in text[:20] or '"usage"' in text)
        and '"error"' not in text
        for status, text, _ in results
    )


# -- five dollars ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_of_fifty_dollar_calls_at_once_five_dollars_admit_exactly_five(
    start_gateway: StartGateway, upstream: Upstream, stream: bool
) -> None:
    front, crowd = await limited(start_gateway, "5"), Crowd(upstream)
    results = await at_once(front, crowd, 50, stream=stream, max_tokens=DOLLAR)
    assert sorted(status for status, _, _ in results) == [200] * 5 + [429] * 45
    assert completed(results) == 5
    stands = await usage(front)
    assert (stands["month_usage_usd"], stands["held_usd"]) == ("5.000000000", "0.000000000")
    assert stands["request_count"] == 5
    await assert_nothing_left(front, upstream)


@pytest.mark.parametrize(("stream", "least"), [(True, 4), (False, 2)])
async def test_without_a_maximum_what_was_learned_lets_most_of_the_money_be_used(
    start_gateway: StartGateway, upstream: Upstream, stream: bool, least: int
) -> None:
    front, crowd = await limited(start_gateway, "10"), Crowd(upstream)
    crowd.go.set()
    for _ in range(5):
        assert (await send(front, stream=stream))[0] == 200
    results = await at_once(front, crowd, 50, stream=stream)
    assert completed(results) >= least
    spent = Decimal((await usage(front))["month_usage_usd"])
    assert Decimal(5 + least) <= spent <= 10
    await assert_nothing_left(front, upstream)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_by_one_all_are_admitted_while_money_is_left(
    start_gateway: StartGateway, upstream: Upstream, stream: bool
) -> None:
    front, crowd = await limited(start_gateway, "5"), Crowd(upstream)
    crowd.go.set()
    for number in range(5):
        status, text, _ = await send(front, stream=stream)
        assert status == 200, number
        assert '"error"' not in text, number
    assert (await send(front, stream=stream))[0] == 429
    assert (await usage(front))["month_usage_usd"] == "5.000000000"


async def test_a_stream_that_the_budget_cannot_carry_to_its_end_is_cut_and_says_so(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front, crowd = await limited(start_gateway, "0.80"), Crowd(upstream)
    crowd.go.set()
    status, text, _ = await send(front, stream=True)
    assert status == 200
    assert "[DONE]" not in text
    error = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["gateway"]["scope"]) == ("insufficient_quota", "user")
    assert 60 <= text.count(" there") + 1 <= 80
    line = await front.gateway.request_line()
    assert line["outcome"] == "cut"
    assert line["cost_nanos"] <= 800_000_000


# -- exactly seven ---------------------------------------------------------------------------------

CHAIN = """
[providers.first]
prefix = "first"
[providers.second]
prefix = "second"
[models.pair]
chain = [{ provider = "first", model = "dear" }, { provider = "second", model = "dear" }]
[prices.models."first/dear"]
input = "0"
output = "10000"
[prices.models."second/dear"]
input = "0"
output = "10000"
"""


@pytest.mark.parametrize("kind", ["whole", "stream", "fallback", "two keys"])
async def test_of_five_hundred_at_once_a_budget_of_seven_quotes_admits_exactly_seven(
    start_gateway: StartGateway, upstream: Upstream, kind: str
) -> None:
    front = await start_gateway(DEAR + CHAIN)
    org = {"org_id": "acme", "monthly_budget_usd": "7.07"}
    assert (await front.client.post("/admin/organizations", json=org, headers=ADMIN)).status == 201
    keys = []
    for user_id in ("ann", "ben"):
        user = {"user_id": user_id, "org_id": "acme"}
        assert (await front.client.post("/admin/users", json=user, headers=ADMIN)).status == 201
        keys.append(await make_key(front.client, user_id))
    front.key = keys[0]
    crowd = Crowd(upstream)
    sent = {"max_tokens": DOLLAR + 1, "stream": kind == "stream"}
    refused: list[Any] = []

    async def fail_first(wire: Wire, received: Received) -> None:
        if received.json["model"].startswith("first/"):
            await wire.answer(b'{"error":{"message":"busy"}}', "503 Service Unavailable")
        else:
            await crowd.answer(wire, received)

    if kind == "fallback":
        upstream.script = fail_first

    async def one(number: int) -> int:
        model = "pair" if kind == "fallback" else "mock/dear"
        key = keys[number % 2 if kind == "two keys" else 0]
        response = await front.client.post(
            "/v1/chat/completions",
            json=chat(**{**sent, "model": model}),
            headers={"Authorization": f"Bearer {key}"},
        )
        text = await response.text()
        if response.status == 429:
            refused.append((text, response.headers))
        return int(response.status)

    calls = asyncio.gather(*[one(number) for number in range(500)])
    await until(lambda: crowd.arrived + len(refused) >= 500, 60)
    crowd.go.set()
    results = await calls
    assert results.count(200) == 7
    assert results.count(429) == 493
    stands = await usage(front, "org")
    # Seven answers of a hundred tokens each, of which 101 were quoted.
    assert stands["month_usage_usd"] == "7.000000000"
    error = json.loads(refused[0][0])["error"]["gateway"]
    assert (error["scope"], error["limit_usd"]) == ("org", "7.070000000")
    await assert_nothing_left(front, upstream)


# -- a refusal -------------------------------------------------------------------------------------


async def test_a_refusal_says_why_and_the_sdk_sends_one_request_only(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front, crowd = await limited(start_gateway, "0.50"), Crowd(upstream)
    crowd.go.set()
    async with openai.AsyncOpenAI(api_key=front.key, base_url=f"{front.url}/v1") as sdk:
        with pytest.raises(openai.RateLimitError) as raised:
            await sdk.chat.completions.create(
                model="mock/dear",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=DOLLAR,
            )
    error = raised.value
    assert error.code == "request_exceeds_remaining"
    assert error.response.headers["x-should-retry"] == "false"
    assert int(error.response.headers["retry-after"]) > 0
    body: Any = error.body
    assert body["gateway"] == {
        "scope": "user",
        "limit_usd": "0.500000000",
        "settled_usd": "0.000000000",
        "held_usd": "0.000000000",
        "needed_usd": "1.000000000",
        "fits_max_tokens": 50,
        "resets_at": (await usage(front))["resets_at"],
    }
    await front.gateway.request_line()
    lines = await front.gateway.lines("request")
    assert len([line for line in lines if line["route"] == "chat"]) == 1
    assert upstream.received == []
    assert (await send(front, max_tokens=50))[0] == 200


async def test_a_model_for_nothing_is_served_when_the_money_is_gone(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    free = '[prices.models."mock/free"]\ninput = "0"\noutput = "0"\n'
    front = await limited(start_gateway, "0", DEAR + free)
    Crowd(upstream).go.set()
    assert (await send(front))[0] == 429
    response = await front.chat(chat(model="mock/free"))
    assert response.status == 200


async def test_usage_headers_show_the_tightest_account(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front, crowd = await limited(start_gateway, "5"), Crowd(upstream)
    crowd.go.set()
    _, _, headers = await send(front, max_tokens=DOLLAR)
    assert headers["x-gateway-scope"] == "user"
    assert headers["x-gateway-usage-usd"] == "1.00"
    assert headers["x-gateway-limit-usd"] == "5.00"
    assert headers["x-gateway-remaining-usd"] == "4.00"
    assert headers["x-gateway-held-usd"] == "0.00"
    # A stream's head shows its admission: the dollar is held, and not spent yet.
    _, _, headers = await send(front, max_tokens=DOLLAR, stream=True)
    assert headers["x-gateway-usage-usd"] == "1.00"
    assert headers["x-gateway-held-usd"] == "1.00"
    assert headers["x-gateway-remaining-usd"] == "3.00"


async def test_a_lowered_maximum_is_sent_and_told(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front, crowd = await limited(start_gateway, "2"), Crowd(upstream)
    crowd.go.set()
    status, _, headers = await send(front)
    assert status == 200
    assert headers["x-gateway-max-tokens"] == "200"
    assert upstream.received[-1].json["max_tokens"] == 200
    receipt = await receipt_of(front, headers["x-request-id"])
    assert receipt["edits"] == ["max_tokens=200"]


# -- receipts --------------------------------------------------------------------------------------


async def receipt_of(front: Front, request_id: str, key: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {key or front.key}"}
    response = await front.client.get(f"/v1/receipts/{request_id}", headers=headers)
    return await response.json()


async def test_a_receipt_explains_the_charge_to_its_user_and_to_nobody_else(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front, crowd = await limited(start_gateway, "5"), Crowd(upstream)
    crowd.go.set()
    _, _, headers = await send(front, max_tokens=DOLLAR)
    found = await receipt_of(front, headers["x-request-id"])
    assert found["outcome"] == "completed"
    assert found["cost_usd"] == "1.000000000"
    assert found["held_usd"] == "1.000000000"
    assert found["tokens"]["output"] == DOLLAR
    assert found["formula"] == (
        "(10 input x 0.00 + 100 output x 10000.00) USD per 1,000,000 tokens, rounded up"
        " = 1.000000000 USD"
    )
    assert [each["status"] for each in found["attempts"]] == [200]
    stranger = await make_key(front.client, "carl")
    answer = await receipt_of(front, headers["x-request-id"], stranger)
    assert answer["error"]["code"] == "not_found"


# -- who pays --------------------------------------------------------------------------------------

PRICED = """
[prices.models."mock/both"]
input = "1000"
output = "10000"
"""


async def cost_of(front: Front) -> tuple[str, int]:
    line = await front.gateway.request_line()
    return line["outcome"], line["cost_nanos"]


@pytest.mark.parametrize("seen", [1, 7])
async def test_a_client_that_leaves_pays_for_the_prompt_and_what_it_was_sent(
    start_gateway: StartGateway, upstream: Upstream, seen: int
) -> None:
    front = await start_gateway(PRICED)

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        for word in ["Hello", *[" there"] * (seen - 1)]:
            await wire.chunk(delta(word))
        await wire.gone.wait()

    upstream.script = script
    async with connect(front.port) as peer:
        ask(peer, front, model="mock/both")
        await peer.reader.readuntil(b"Hello")
        for _ in range(seen - 1):
            await peer.reader.readuntil(b" there")
    outcome, cost = await cost_of(front)
    assert outcome == "client_left"
    prompt = 9  # three words and marks, and what the form of a chat takes
    least, most = prompt * 1_000_000, (prompt + 2) * 1_000_000 + seen * 10_000_000
    assert least < cost <= most, cost


async def test_an_error_costs_nothing_and_silence_costs_the_prompt(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(PRICED)

    async def busy(wire: Wire, received: Received) -> None:
        await wire.answer(b'{"error":{"message":"busy"}}', "503 Service Unavailable")

    upstream.queue = [busy]
    assert (await front.chat(chat(model="mock/both"))).status == 502
    assert await cost_of(front) == ("failed", 0)

    async def silent(wire: Wire, received: Received) -> None:
        await asyncio.sleep(1.1)  # later than a stale connection would have died
        wire.reset()

    upstream.queue = [silent]
    assert (await front.chat(chat(model="mock/both"))).status == 502
    line = await front.gateway.request_line(least=2)
    assert line["outcome"] == "unknown"
    assert line["source"] == "estimated"
    assert line["cost_nanos"] == 9_000_000 or 8_000_000 <= line["cost_nanos"] <= 11_000_000
