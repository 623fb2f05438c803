"""From one provider to the next, over real sockets: breakers at work, skipped candidates, retries,
limits of providers, and what the caller and the receipt are told."""

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio

from gwproxy.app import App
from gwproxy.demo.server import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import (
    ADMIN,
    ANSWER,
    Received,
    Script,
    Upstream,
    Wire,
    bearer,
    chat,
    delta,
    make_key,
    prices,
    tokenizer,
)
from tests.scene import asked, metric, sends, stay_silent, stream_then_wait, until

BOTH = """
[providers.first]
base_url = "{first}"
prefix = ""
model = "one"
{of_first}
[providers.second]
base_url = "{second}"
prefix = ""
model = "two"
{of_second}
[models.both]
chain = ["first", "second"]
[prices.models."first/one"]
input = "1.00"
output = "2.00"
[prices.models."second/two"]
input = "10.00"
output = "20.00"
"""


@pytest_asyncio.fixture
async def second() -> AsyncIterator[Upstream]:
    second = Upstream()
    await second.start()
    yield second
    await second.stop()


class Pair:
    """A gateway in front of two upstreams, `both` being the chain of them."""

    def __init__(self, start: StartGateway, first: Upstream, second: Upstream) -> None:
        self.start, self.first, self.second = start, first, second
        self.front: Front

    async def open(
        self, of_first: str = "", of_second: str = "", more: str = "", **environ: str
    ) -> Front:
        text = BOTH.format(
            first=self.first.url, second=self.second.url, of_first=of_first, of_second=of_second
        )
        settings = {"GWPROXY__BREAKER__FAILURE_THRESHOLD": "3", **environ}
        self.front = await self.start(text + more, **settings)
        return self.front

    async def ask(self, stream: bool = False, **fields: Any) -> Any:
        response = await self.front.chat(chat(stream, **{"model": "both", **fields}))
        await response.read()
        return response

    async def receipt(self, response: Any) -> Any:
        shown = await self.front.client.get(
            f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(self.front.key)
        )
        assert shown.status == 200, await shown.text()
        return await shown.json()

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.first.received), len(self.second.received)


@pytest.fixture
def pair(start_gateway: StartGateway, upstream: Upstream, second: Upstream) -> Pair:
    return Pair(start_gateway, upstream, second)


def refuses(status: str, more: str = "", body: bytes = b'{"error":{"message":"no"}}') -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, status, more)

    return script


DOWN = refuses("503 Service Unavailable")


def make_due(front: Front) -> None:
    """The open time of the first provider's breaker is over."""
    app = front.gateway.app
    assert app is not None and app._providers is not None
    app._providers.of("first").breaker.until = 0.0


# -- the plan's own ------------------------------------------------------------------------------

CLOUDFLARE = """
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
[providers.huggingface]
base_url = "{openai}"
flavour = "openai"
token = "demo-token"
prefix = ""
model = "meta-llama/Llama-3.3-70B-Instruct"
[providers.anthropic]
prefix = "anthropic"
model = "claude-sonnet-4-5"
[prices.models."huggingface/meta-llama/Llama-3.3-70B-Instruct"]
input = "0.60"
output = "0.80"
"""


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream()
    await demo.start()
    yield demo
    await demo.stop()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_should_failover_to_second_provider_huggingface_when_gemini_fails(
    start_gateway: StartGateway, demo: DemoUpstream, stream: bool
) -> None:
    """should failover to second provider (HuggingFace) when Gemini fails"""
    text = CLOUDFLARE.format(compat=demo.compat_url, openai=f"{demo.url}/openai/v1")
    front = await start_gateway(
        config=text,
        AI_PROVIDER="gemini",
        AI_FALLBACK_PROVIDERS="gemini,huggingface,anthropic",
    )
    demo.script(provider="google-ai-studio", fault="status-503", count=0)
    response = await front.chat(chat(stream, model="auto"))
    body = await response.read()
    assert response.status == 200, body
    assert response.headers["x-gateway-provider"] == "huggingface"
    assert b"content" in body
    gemini, huggingface = await demo.recorded(2)
    assert (gemini["provider"], gemini["status"]) == ("google-ai-studio", 503)
    assert (huggingface["model"], huggingface["completed"]) == (
        "meta-llama/Llama-3.3-70B-Instruct",
        True,
    )
    line = await front.gateway.request_line()
    assert [each["provider"] for each in line["attempts"]] == ["gemini", "huggingface"]
    # Priced as Hugging Face's, and nothing for the attempt that failed.
    usage = huggingface["usage"] or huggingface["tokens"]
    tokens = usage["prompt_tokens"] * 600 + usage["completion_tokens"] * 800
    assert line["cost_nanos"] == tokens
    said = await front.gateway.lines()
    told = [each for each in said if each["event"] in WORDS]
    assert [each["event"] for each in told] == [
        "Attempting provider",
        "Provider failed, trying next",
        "Attempting provider",
        "Provider succeeded",
    ]
    assert [(each["provider"], each["attempt"]) for each in told] == [
        ("gemini", 1),
        ("gemini", 1),
        ("huggingface", 2),
        ("huggingface", 2),
    ]
    assert {each["request_id"] for each in told} == {response.headers["x-request-id"]}


WORDS = {
    "Attempting provider",
    "Provider succeeded",
    "Provider failed, trying next",
    "All providers failed",
}


# -- breakers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_provider_that_fails_three_times_is_left_alone_and_comes_back(
    pair: Pair, stream: bool
) -> None:
    front = await pair.open()
    pair.first.script = DOWN
    for _ in range(6):
        response = await pair.ask(stream)
        assert (response.status, response.headers["x-gateway-provider"]) == (200, "second")
    assert pair.counts == (3, 6)
    assert await metric(front, "gwproxy_breaker_state", provider="first") == 2
    receipt = await pair.receipt(response)
    assert receipt["edits"] == ["skipped first: breaker open"]
    assert [each["provider"] for each in receipt["attempts"]] == ["second"]

    pair.first.script = answers
    make_due(front)
    for provider in ("first", "first", "first"):
        assert (await pair.ask(stream)).headers["x-gateway-provider"] == provider
    assert await metric(front, "gwproxy_breaker_state", provider="first") == 0
    closed = await front.gateway.lines("Circuit breaker closed after successful recovery")
    assert closed[0]["provider"] == "first"


async def answers(wire: Wire, received: Received) -> None:
    if received.json.get("stream"):
        await wire.start()
        await wire.chunk(delta("Hi") + delta(finish="stop") + b"data: [DONE]\n\n")
        await wire.end()
    else:
        await wire.answer(json.dumps(ANSWER).encode())


async def test_when_every_provider_is_open_nothing_is_sent_held_or_recorded(pair: Pair) -> None:
    front = await pair.open()
    pair.first.script = pair.second.script = DOWN
    for _ in range(3):
        response = await pair.ask()
        assert (response.status, (await response.json())["error"]["code"]) == (
            502,
            "all_providers_failed",
        )
    assert pair.counts == (3, 3)
    app = front.gateway.app
    assert app is not None
    before = app._store.ledger.state.lsn
    response = await pair.ask()
    error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"]) == (
        503,
        "no_provider_available",
        "server_error",
    )
    assert 20 <= int(response.headers["Retry-After"]) <= 60
    assert pair.counts == (3, 3)
    assert app._store.ledger.state.lsn == before
    line = await front.gateway.request_line(least=4)
    assert line["skipped"] == ["skipped first: breaker open", "skipped second: breaker open"]


async def test_one_probe_at_a_time_also_with_many_callers(pair: Pair) -> None:
    front = await pair.open(GWPROXY__BREAKER__SUCCESS_THRESHOLD="1")
    pair.first.script = DOWN
    for _ in range(3):
        await pair.ask()
    let_go = asyncio.Event()

    async def waits(wire: Wire, received: Received) -> None:
        await let_go.wait()
        await answers(wire, received)

    pair.first.script = waits
    make_due(front)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(pair.ask()) for _ in range(20)]
        await until(lambda: pair.counts[1] == 3 + 19)
        assert pair.counts[0] == 3 + 1
        alone = await pair.ask(model="first/one")
        assert (alone.status, alone.headers["Retry-After"]) == (503, "1")
        let_go.set()
    served = [call.result().headers["x-gateway-provider"] for call in calls]
    assert sorted(served) == ["first"] + ["second"] * 19
    assert await metric(front, "gwproxy_breaker_state", provider="first") == 0


async def test_a_client_that_leaves_during_a_probe_does_not_keep_its_place(pair: Pair) -> None:
    front = await pair.open()
    pair.first.script = DOWN
    for _ in range(3):
        await pair.ask()
    make_due(front)
    pair.first.script = stay_silent
    async with asked(front, model="both"):
        await until(lambda: pair.counts[0] == 4)
    pair.first.script = answers
    app = front.gateway.app
    assert app is not None
    await until(lambda: not app._store.ledger.state.holds)
    assert (await pair.ask()).headers["x-gateway-provider"] == "first"


async def test_streams_that_die_in_the_middle_open_a_breaker_too(pair: Pair) -> None:
    await pair.open()
    pair.first.script = sends(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + delta("Hel"),
        then=Wire.reset,
    )
    for _ in range(3):
        response = await pair.ask(True)
        assert response.headers["x-gateway-provider"] == "first"
    assert (await pair.ask(True)).headers["x-gateway-provider"] == "second"
    assert pair.counts == (3, 1)


async def test_clients_that_leave_open_no_breaker(pair: Pair) -> None:
    front = await pair.open()
    pair.first.script = stream_then_wait(delta("Hel"))
    for number in range(1, 5):
        async with asked(front, model="both") as peer:
            await peer.head()
        await front.gateway.request_line(least=number)
    assert await metric(front, "gwproxy_breaker_state", provider="first") == 0


async def test_a_stream_that_the_budget_cuts_is_no_failure_of_its_provider(pair: Pair) -> None:
    front = await pair.open(GWPROXY__BREAKER__FAILURE_THRESHOLD="1")
    made = await front.client.post(
        "/admin/users", json={"user_id": "poor", "monthly_limit_usd": "0.0005"}, headers=ADMIN
    )
    assert made.status == 201
    front.key = await make_key(front.client, "poor")
    pair.first.script = stream_then_wait(*[delta(" hello" * 20) for _ in range(30)])
    response = await pair.ask(True, model="first/one")
    assert b"insufficient_quota" in await response.read()
    assert (await front.gateway.request_line())["outcome"] == "cut"
    assert await metric(front, "gwproxy_breaker_state", provider="first") == 0


async def test_an_open_breaker_outlives_the_process(
    start_gateway: StartGateway, pair: Pair
) -> None:
    front = await pair.open()
    pair.first.script = DOWN
    for _ in range(3):
        await pair.ask()
    await front.gateway.close()
    app = front.gateway.app
    assert app is not None
    again = await App.start(app.config, front.gateway.log, tokenizer(), prices())
    try:
        reader, writer = await asyncio.open_connection(*again.addresses[0][7:].split(":"))
        body = json.dumps(chat(model="both")).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Authorization: Bearer %b\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (front.key.encode(), len(body), body)
        )
        text = await reader.read()
        writer.close()
    finally:
        await again.stop()
    assert b"x-gateway-provider: second" in text
    assert pair.counts == (3, 4)


# -- money and limits of providers ---------------------------------------------------------------


async def test_a_fallback_to_a_dearer_model_never_passes_a_limit_and_the_receipt_says_so(
    pair: Pair,
) -> None:
    front = await pair.open()
    made = await front.client.post(
        "/admin/users", json={"user_id": "poor", "monthly_limit_usd": "0.0005"}, headers=ADMIN
    )
    assert made.status == 201
    front.key = await make_key(front.client, "poor")
    pair.first.script = DOWN
    # 100 tokens out: $0.0002 and a little at the first, ten times that at the second.
    response = await pair.ask(max_tokens=100)
    assert (response.status, pair.counts) == (502, (1, 0))
    receipt = await pair.receipt(response)
    assert receipt["edits"] == ["skipped second: over budget"]
    assert (receipt["outcome"], receipt["cost_usd"]) == ("failed", "0.000000000")
    assert Decimal(receipt["held_usd"]) <= Decimal("0.0005")
    assert receipt["attempts"][0]["reason"] == "status_503"


async def test_the_budget_of_a_providers_day_moves_on_to_the_next(pair: Pair) -> None:
    front = await pair.open(of_first='daily_usd = "0.00002"')
    served = [(await pair.ask(max_tokens=2)).headers["x-gateway-provider"] for _ in range(3)]
    assert served == ["first", "second", "second"]
    response = await pair.ask(max_tokens=2)
    assert (await pair.receipt(response))["edits"] == ["skipped first: over budget"]
    alone = await pair.ask(model="first/one", max_tokens=2)
    error = (await alone.json())["error"]
    assert (alone.status, error["code"]) == (429, "insufficient_quota")
    assert error["gateway"]["scope"] == "provider"
    name = "gwproxy_candidates_skipped_total"
    assert await metric(front, name, provider="first", reason="over budget") == 4


async def test_a_fallback_into_a_spent_day_is_skipped(pair: Pair) -> None:
    await pair.open(of_second='daily_usd = "0.00001"')
    pair.first.script = DOWN
    response = await pair.ask(max_tokens=2)
    assert (response.status, pair.counts) == (502, (1, 0))
    assert (await pair.receipt(response))["edits"] == ["skipped second: over budget"]


async def test_requests_a_minute_move_on_and_then_are_refused(pair: Pair) -> None:
    front = await pair.open(of_first="rpm = 2", of_second="rpm = 1")
    served = [(await pair.ask()).headers["x-gateway-provider"] for _ in range(3)]
    assert served == ["first", "first", "second"]
    response = await pair.ask()
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (429, "rate_limit_exceeded")
    assert 20 <= int(response.headers["Retry-After"]) <= 60
    assert pair.counts == (2, 1)
    assert (await front.gateway.request_line(least=4))["error_type"] == "policy_rate"


async def test_who_finds_a_provider_busy_after_his_admission_moves_on_too(pair: Pair) -> None:
    """With a journal that is waited for, several are admitted before the first of them is sent."""
    front = await pair.open("rpm = 2", GWPROXY__STORAGE__SYNCHRONOUS="full")
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(pair.ask()) for _ in range(6)]
    responses = [call.result() for call in calls]
    served = [response.headers["x-gateway-provider"] for response in responses]
    assert sorted(served) == ["first"] * 2 + ["second"] * 4
    assert pair.counts == (2, 4)
    for response in responses:
        receipt = await pair.receipt(response)
        first = receipt["provider"] == "first"
        assert receipt["edits"] == ([] if first else ["skipped first: requests a minute"])
        assert [each["provider"] for each in receipt["attempts"]] == [receipt["provider"]]
    app = front.gateway.app
    assert app is not None
    assert not app._store.ledger.state.holds


async def test_who_finds_nobody_after_his_admission_is_told_and_pays_nothing(pair: Pair) -> None:
    front = await pair.open("rpm = 2", GWPROXY__STORAGE__SYNCHRONOUS="full")
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(pair.ask(model="first/one")) for _ in range(6)]
    statuses = sorted(call.result().status for call in calls)
    assert statuses == [200, 200, 429, 429, 429, 429]
    refused = next(call.result() for call in calls if call.result().status == 429)
    assert 20 <= int(refused.headers["Retry-After"]) <= 60
    app = front.gateway.app
    assert app is not None
    state = app._store.ledger.state
    assert not state.holds
    [counted] = [b.count for (name, _), b in state.balances.items() if name == "user:alice"]
    assert counted == 2


async def test_the_ceiling_is_of_all_attempts_at_all_providers(pair: Pair) -> None:
    await pair.open(GWPROXY__UPSTREAM__RPM_CEILING="3")
    pair.first.script = DOWN
    assert [(await pair.ask()).status for _ in range(3)] == [200, 502, 429]
    assert pair.counts == (2, 1)


async def test_a_key_gets_of_a_chain_what_it_may_use(pair: Pair) -> None:
    front = await pair.open()
    front.key = await make_key(front.client, allowed_models=["second/two"])
    response = await pair.ask()
    assert (response.status, response.headers["x-gateway-provider"]) == (200, "second")
    receipt = await pair.receipt(response)
    assert receipt["edits"] == ["skipped first: not allowed for this key"]
    assert (await pair.ask(model="first/one")).status == 404
    front.key = await make_key(front.client, allowed_models=["both"])
    assert (await pair.ask()).headers["x-gateway-provider"] == "first"
    front.key = await make_key(front.client, allowed_models=["nothing/else"])
    assert (await pair.ask()).status == 404


UNPRICED = """
[models.mixed]
chain = [{ provider = "first", model = "new" }, "second"]
[models.unpriced]
chain = [{ provider = "first", model = "new" }, { provider = "second", model = "newer" }]
"""


async def test_who_has_no_price_is_passed_over_and_that_is_told(pair: Pair) -> None:
    front = await pair.open(more=UNPRICED)
    response = await pair.ask(model="mixed")
    assert (response.status, response.headers["x-gateway-provider"]) == (200, "second")
    assert (await pair.receipt(response))["edits"] == ["skipped first: not priced"]
    assert (await front.gateway.request_line())["skipped"] == ["skipped first: not priced"]
    name = "gwproxy_candidates_skipped_total"
    assert await metric(front, name, provider="first", reason="not priced") == 1
    refused = await pair.ask(model="unpriced")
    assert (refused.status, (await refused.json())["error"]["code"]) == (400, "model_not_priced")
    assert pair.counts == (0, 1)


async def test_a_price_is_not_missed_where_he_who_has_one_is_not_to_be_asked(pair: Pair) -> None:
    await pair.open(more=UNPRICED)
    pair.second.script = DOWN
    assert [(await pair.ask(model="mixed")).status for _ in range(3)] == [502] * 3
    refused = await pair.ask(model="mixed")
    error = (await refused.json())["error"]
    assert (refused.status, error["code"]) == (503, "no_provider_available")
    assert int(refused.headers["Retry-After"]) > 0


# -- retries and the time for all of it ----------------------------------------------------------


async def test_the_last_provider_is_asked_again_where_that_is_configured(pair: Pair) -> None:
    front = await pair.open(GWPROXY__UPSTREAM__RETRIES="2")
    pair.first.script = DOWN
    pair.second.queue = [DOWN, refuses("429 Too Many", "Retry-After: 0\r\n")]
    response = await pair.ask()
    assert (response.status, pair.counts) == (200, (1, 3))
    receipt = await pair.receipt(response)
    tried = [(each["provider"], each["reason"]) for each in receipt["attempts"]]
    assert tried == [
        ("first", "status_503"),
        ("second", "status_503"),
        ("second", "status_429"),
        ("second", None),
    ]
    name = "gwproxy_fallbacks_total"
    assert await metric(front, name, **{"from": "second", "to": "second"}) == 2


async def test_retries_are_bounded_and_end_where_more_patience_is_asked_for(pair: Pair) -> None:
    await pair.open(GWPROXY__UPSTREAM__RETRIES="1")
    pair.first.script = refuses("429 Too Many")
    pair.second.script = refuses("429 Too Many", "Retry-After: 0\r\n")
    response = await pair.ask()
    assert (response.status, pair.counts) == (429, (1, 2))
    pair.second.script = refuses("429 Too Many", "Retry-After: 30\r\n")
    response = await pair.ask()
    assert (response.status, response.headers["Retry-After"]) == (429, "30")
    assert pair.counts == (2, 3)
    pair.second.script = refuses("400 Bad Request")
    assert (await pair.ask()).status == 400
    assert pair.counts == (3, 4)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_all_attempts_together_have_one_deadline(pair: Pair, stream: bool) -> None:
    front = await pair.open(
        GWPROXY__UPSTREAM__TOTAL_TIMEOUT_S="0.3", GWPROXY__UPSTREAM__FIRST_BYTE_TIMEOUT_S="0.2"
    )
    pair.first.script = pair.second.script = stay_silent
    response = await pair.ask(stream)
    assert (response.status, (await response.json())["error"]["code"]) == (
        502,
        "all_providers_failed",
    )
    line = await front.gateway.request_line()
    reasons = [each["reason"] for each in line["attempts"]]
    assert reasons == (["first_byte_timeout"] if stream else []) + ["total_timeout"]
    assert line["duration_ms"] < 2000
    app = front.gateway.app
    assert app is not None
    # Who had all of the time has failed; who had the rest of it has not.
    failures = [app._providers.of(name).breaker.failures for name in ("first", "second")]
    assert failures == [1, 0]
