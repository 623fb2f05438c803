"""Anthropic's own Python SDK against the running gateway, the built-in upstream behind it.

What the upstream recorded is what is believed.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic

from gwproxy.demo import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, bearer, make_key
from tests.sdk import NATIVE_FLAVOURS, config, demo_upstream

QUESTION: Any = [{"role": "user", "content": "Why is the sky blue? Grüße, 世界 😀"}]
TOOL: Any = {
    "name": "weather",
    "description": "The weather of the coming days",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}


class Stage:
    """A running gateway, the upstream behind it, and the SDK's client in front."""

    def __init__(self, front: Front, demo: DemoUpstream, client: AsyncAnthropic) -> None:
        self.front, self.demo, self.client = front, demo, client
        self.model = "anthropic/claude-sonnet-4-5"

    async def ask(self, model: str = "", **body: Any) -> Any:
        body = {"messages": QUESTION, "max_tokens": 100, **body}
        return await self.client.messages.create(model=model or self.model, **body)

    async def receipt(self, request_id: str) -> dict[str, Any]:
        found = await self.front.client.get(
            f"/v1/receipts/{request_id}", headers=bearer(self.front.key)
        )
        told: dict[str, Any] = await found.json()
        return told


@pytest_asyncio.fixture(params=NATIVE_FLAVOURS)
async def stage(request: Any, start_gateway: StartGateway) -> AsyncIterator[Stage]:
    demo = demo_upstream()
    await demo.start()
    front = await start_gateway(config=config(demo, request.param))
    http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
    client = AsyncAnthropic(
        base_url=front.url, api_key=front.key, http_client=http, max_retries=0, timeout=20
    )
    yield Stage(front, demo, client)
    await client.close()
    await demo.stop()


def settled(told: dict[str, Any], truth: dict[str, Any]) -> None:
    """The receipt has what the upstream knows that it has served, bucket by bucket."""
    tokens, real = told["tokens"], truth["tokens"]
    assert tokens["cache_read"] == real["cached"]
    assert tokens["cache_write"] == real["cache_write"]
    assert tokens["input"] == real["input"] - real["cached"] - real["cache_write"]
    assert tokens["output"] == real["output"]
    assert (told["source"], told["outcome"]) == ("provider", "completed")


async def test_a_message_comes_whole_and_costs_what_was_served(stage: Stage) -> None:
    message = await stage.ask(
        model=f"{stage.model}+cached-5+cache-write-3",
        system="Be brief.",
        extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14,other"},
    )
    assert message.stop_reason == "end_turn"
    assert message.content[0].text
    [line] = await stage.demo.recorded(1)
    assert line["completed"]
    assert message._request_id is not None
    settled(await stage.receipt(message._request_id), line)
    [sent] = stage.demo.requests
    headers = dict(sent["headers"])
    lower = {name.lower(): value for name, value in headers.items()}
    assert lower["anthropic-version"] == stage.client.default_headers["anthropic-version"]
    assert lower["anthropic-beta"] == "interleaved-thinking-2025-05-14,other"
    assert stage.front.key not in json.dumps(sent)
    assert "user-agent" in lower and "anthropic" not in lower["user-agent"].lower()


async def test_a_stream_is_heard_to_its_end(stage: Stage) -> None:
    text = ""
    async with stage.client.messages.stream(
        model=f"{stage.model}+cached-5", messages=QUESTION, max_tokens=100
    ) as stream:
        async for event in stream:
            if event.type == "text":
                text += event.text
        message = await stream.get_final_message()
    assert (message.content[0].text, message.stop_reason) == (text, "end_turn")
    [line] = await stage.demo.recorded(1)
    assert message.usage.output_tokens == line["tokens"]["output"]
    settled(await stage.receipt(stream.response.headers["x-request-id"]), line)


async def test_a_tool_is_called_and_its_result_taken_back(stage: Stage) -> None:
    async with stage.client.messages.stream(
        model=stage.model,
        messages=QUESTION,
        max_tokens=200,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather"},
    ) as stream:
        message = await stream.get_final_message()
    [call] = message.content
    assert (call.type, call.name, set(call.input)) == ("tool_use", "weather", {"city", "days"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
    again = [
        *QUESTION,
        {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    answer = await stage.ask(messages=again, tools=[TOOL])
    assert answer.stop_reason == "end_turn"


async def test_thinking_is_shown_signed_and_paid_for(stage: Stage) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    async with stage.client.messages.stream(
        model=f"{stage.model}+reasoning-7",
        messages=QUESTION,
        max_tokens=2000,
        thinking=thinking,
    ) as stream:
        message = await stream.get_final_message()
    thought, answer = message.content
    assert (thought.type, thought.signature, answer.type) == ("thinking", "c2ln", "text")
    [line] = await stage.demo.recorded(1)
    settled(await stage.receipt(stream.response.headers["x-request-id"]), line)


async def test_a_maximum_is_honoured_and_said(stage: Stage) -> None:
    message = await stage.ask(model=f"{stage.model}+len-50", max_tokens=5)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)


async def test_a_stream_that_breaks_off_raises(stage: Stage) -> None:
    for number, end in enumerate(("reset-after-6", "eof-after-6", "close-after-6", "no-finish")):
        with pytest.raises(anthropic.APIStatusError) as broken:
            async with stage.client.messages.stream(
                model=f"{stage.model}+{end}", messages=QUESTION, max_tokens=100
            ) as stream:
                async for _ in stream:
                    pass
        error: Any = broken.value.body
        assert error["error"]["code"] == "stream_interrupted", end
        line = (await stage.demo.recorded(number + 1))[number]
        told = await stage.receipt(stream.response.headers["x-request-id"])
        assert (told["outcome"], told["truncated"]) == ("truncated", True), end
        # The prompt as Anthropic counted it, and the words that came.
        assert told["tokens"]["input"] == line["tokens"]["input"], end
        assert told["tokens"]["output"] >= line["tokens"]["output"], end


async def test_an_error_event_of_theirs_comes_as_it_was_sent(stage: Stage) -> None:
    with pytest.raises(anthropic.APIStatusError) as broken:
        async with stage.client.messages.stream(
            model=f"{stage.model}+error-event-after-6", messages=QUESTION, max_tokens=100
        ) as stream:
            async for _ in stream:
                pass
    error: Any = broken.value.body
    assert error["error"]["type"] == "overloaded_error"
    assert "code" not in error["error"]


FAULTS: list[tuple[str, Any, str]] = [
    ("status-400", anthropic.BadRequestError, "invalid_request_error"),
    ("status-404", anthropic.NotFoundError, "not_found_error"),
    ("status-429", anthropic.RateLimitError, "rate_limit_error"),
    ("status-529", anthropic.InternalServerError, "api_error"),
    ("status-401", anthropic.InternalServerError, "api_error"),
    ("error-first", anthropic.InternalServerError, "api_error"),
    ("bad-json", anthropic.InternalServerError, "api_error"),
    ("code-2016", anthropic.APIStatusError, "invalid_request_error"),
]


async def test_errors_come_as_the_sdks_own_classes(stage: Stage) -> None:
    for fault, raised, kind in FAULTS:
        for streamed in (False, True):
            with pytest.raises(raised) as refused:
                await stage.ask(model=f"{stage.model}+{fault}", stream=streamed)
            body: Any = refused.value.body
            assert (body["type"], body["error"]["type"]) == ("error", kind), fault
            assert body["request_id"] == refused.value.request_id


async def test_refusals_of_ours_have_the_shape_too(stage: Stage) -> None:
    with pytest.raises((anthropic.NotFoundError, anthropic.BadRequestError)) as unknown:
        await stage.ask(model="nowhere")
    error: Any = unknown.value.body
    # A plain server might know any name, but the price book does not.
    assert error["error"]["code"] in ("model_not_found", "model_not_priced")
    with pytest.raises(anthropic.BadRequestError) as hosted:
        await stage.ask(tools=[{"type": "web_search_20250305", "name": "web_search"}])
    error = hosted.value.body
    assert (error["error"]["code"], error["error"]["param"]) == (
        "unsupported_parameter",
        "tools[0]",
    )
    stranger = stage.client.with_options(api_key="gw_live_nobody")
    with pytest.raises(anthropic.AuthenticationError):
        await stranger.messages.create(model=stage.model, messages=QUESTION, max_tokens=1)
    assert not stage.demo.record


async def test_a_budget_that_is_used_up_is_not_tried_again(stage: Stage) -> None:
    poor = {"user_id": "poor", "monthly_limit_usd": "0.0001"}
    made = await stage.front.client.post("/admin/users", json=poor, headers=ADMIN)
    assert made.status == 201
    key = await make_key(stage.front.client, "poor")
    client = stage.client.with_options(api_key=key, max_retries=2)
    with pytest.raises(anthropic.RateLimitError) as refused:
        await client.messages.create(model=stage.model, messages=QUESTION, max_tokens=1000)
    error: Any = refused.value.body
    assert error["error"]["gateway"]["scope"] == "user"
    lines = await stage.front.gateway.lines("request", 6)  # five of making users and keys
    assert len([line for line in lines if line["route"] == "messages"]) == 1
    assert not stage.demo.record
