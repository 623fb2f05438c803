"""OpenAI's own Python SDK through Responses and embeddings, and what one tenant can make of what
another has created upstream: nothing. What the upstream recorded is what is believed.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from gwproxy.demo import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import UPSTREAM_TOKEN, bearer, make_key
from tests.sdk import NATIVE_FLAVOURS, config, demo_upstream

QUESTION = "Why is the sky blue? Grüße, 世界 😀"
FUNCTION: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}


PATIENT = """
[breaker]
failure_threshold = 100
"""
"""So many failures are asked for on purpose."""


class Stage:
    """A running gateway, the upstream behind it, and the SDK's client in front."""

    def __init__(self, front: Front, demo: DemoUpstream, client: AsyncOpenAI, flavour: str) -> None:
        self.front, self.demo, self.client, self.flavour = front, demo, client, flavour
        self.model = "openai/gpt-4o-mini"

    async def ask(self, fault: str = "", **body: Any) -> Any:
        """`fault`: what the upstream is to do, until something else is asked."""
        self.next(fault)
        return await self.client.responses.create(
            **{"model": self.model, "input": QUESTION, **body}
        )

    def next(self, fault: str) -> None:
        self.demo.scripts.clear()
        if fault:
            self.demo.script(fault=fault, count=0)

    async def receipt(self, request_id: str) -> dict[str, Any]:
        found = await self.front.client.get(
            f"/v1/receipts/{request_id}", headers=bearer(self.front.key)
        )
        told: dict[str, Any] = await found.json()
        return told

    def sent(self) -> Any:
        """The body of the last request that reached the upstream."""
        return json.loads(self.demo.requests[-1]["body"])


@pytest_asyncio.fixture(params=NATIVE_FLAVOURS)
async def stage(request: Any, start_gateway: StartGateway) -> AsyncIterator[Stage]:
    demo = demo_upstream()
    await demo.start()
    front = await start_gateway(config=config(demo, request.param) + PATIENT)
    client = AsyncOpenAI(
        base_url=f"{front.url}/v1",
        api_key=front.key,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        max_retries=0,
        timeout=20,
    )
    yield Stage(front, demo, client, request.param)
    await client.close()
    await demo.stop()


def settled(told: dict[str, Any], truth: dict[str, Any]) -> None:
    """The receipt has what the upstream knows that it has served, bucket by bucket."""
    tokens, real = told["tokens"], truth["tokens"]
    assert tokens["cache_read"] == real["cached"]
    assert tokens["cache_write"] == real["cache_write"]
    assert tokens["input"] == real["input"] - real["cached"] - real["cache_write"]
    assert (tokens["output"], tokens["reasoning"]) == (real["output"], real["reasoning"])
    assert (told["source"], told["outcome"]) == ("provider", "completed")


# -- responses -----------------------------------------------------------------------------------


async def test_a_response_comes_whole_and_costs_what_was_served(stage: Stage) -> None:
    response = await stage.ask(
        "cached-5+cache-write-3+reasoning-9",
        instructions="Be brief.",
        max_output_tokens=200,
    )
    assert response.output_text
    assert (response.status, response.store) == ("completed", False)
    [line] = await stage.demo.recorded(1)
    settled(await stage.receipt(response._request_id), line)
    assert stage.sent()["store"] is False


async def test_a_stream_is_heard_to_its_end(stage: Stage) -> None:
    text = ""
    stage.next("reasoning-3")
    async with stage.client.responses.stream(model=stage.model, input=QUESTION) as stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
        response = await stream.get_final_response()
    assert (response.output_text, response.status) == (text, "completed")
    [line] = await stage.demo.recorded(1)
    lines = await stage.front.gateway.lines("request", 3)
    [request_id] = [each["request_id"] for each in lines if each["route"] == "responses"]
    settled(await stage.receipt(request_id), line)


async def test_a_tool_is_called_and_its_result_taken_back(stage: Stage) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    response = await stage.ask(tools=[FUNCTION], tool_choice=choice)
    [call] = response.output
    assert (call.type, set(json.loads(call.arguments))) == ("function_call", {"city", "days"})
    again = [
        {"role": "user", "content": QUESTION},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"},
    ]
    assert (await stage.ask(input=again, tools=[FUNCTION])).output_text


async def test_a_maximum_is_honoured_and_said(stage: Stage) -> None:
    events = [event async for event in await stage.ask("len-50", max_output_tokens=16, stream=True)]
    last: Any = events[-1]
    assert (last.type, last.response.usage.output_tokens) == ("response.incomplete", 16)
    lines = await stage.front.gateway.lines("request", 3)
    [line] = [each for each in lines if each["route"] == "responses"]
    assert line["outcome"] == "completed"


async def test_a_stream_that_breaks_off_ends_in_an_error(stage: Stage) -> None:
    for number, end in enumerate(("reset-after-8", "eof-after-8", "close-after-8", "no-finish")):
        events = [event async for event in await stage.ask(end, stream=True)]
        last: Any = events[-1]
        assert (last.type, last.code) == ("error", "stream_interrupted"), end
        assert last.sequence_number == events[-2].sequence_number + 1, end
        await stage.demo.recorded(number + 1)
    # What the SDK does for its users does not take it for an answer.
    stage.next("no-finish")
    with pytest.raises(RuntimeError, match=r"response\.completed"):
        async with stage.client.responses.stream(model=stage.model, input=QUESTION) as stream:
            await stream.get_final_response()


FAULTS: list[tuple[str, Any, str | None]] = [
    ("status-400", openai.BadRequestError, None),
    ("status-404", openai.NotFoundError, "model_not_found"),
    ("status-429", openai.RateLimitError, "rate_limit_exceeded"),
    ("status-503", openai.InternalServerError, "all_providers_failed"),
    ("status-401", openai.InternalServerError, "upstream_misconfigured"),
    ("error-first", openai.InternalServerError, "all_providers_failed"),
    ("bad-json", openai.InternalServerError, "all_providers_failed"),
    ("garbage", openai.InternalServerError, "all_providers_failed"),
    ("reset-before-headers", openai.InternalServerError, "all_providers_failed"),
    ("code-2016", openai.APIStatusError, "content_blocked"),
]


async def test_errors_come_as_the_sdks_own_classes(stage: Stage) -> None:
    for fault, raised, code in FAULTS:
        for streamed in (False, True):
            with pytest.raises(raised) as refused:
                await stage.ask(fault, stream=streamed)
            assert refused.value.code == code, fault


async def test_a_whole_answer_to_a_stream_is_told_as_one(stage: Stage) -> None:
    stage.next("guardrails")
    async with stage.client.responses.stream(model=stage.model, input=QUESTION) as stream:
        response = await stream.get_final_response()
    assert response.output_text


async def test_what_the_caller_asks_for_reaches_the_upstream(stage: Stage) -> None:
    await stage.ask(
        text={"format": {"type": "json_object"}, "verbosity": "low"},
        metadata={"tenant": "alice"},
        extra_body={"unknown": {"kept": [1.5, None]}},
        prompt_cache_key="mine",
    )
    sent = stage.sent()
    assert (sent["metadata"], sent["unknown"]) == ({"tenant": "alice"}, {"kept": [1.5, None]})
    assert (sent["text"]["verbosity"], sent["prompt_cache_key"]) == ("low", "mine")


# -- embeddings ----------------------------------------------------------------------------------


async def test_embeddings_are_the_same_in_both_encodings(stage: Stage) -> None:
    model = "openai/text-embedding-3-small"
    texts = ["Hello", QUESTION, "x " * 3000]
    packed = await stage.client.embeddings.create(model=model, input=texts)
    assert stage.sent()["encoding_format"] == "base64"
    plain = await stage.client.embeddings.create(model=model, input=texts, encoding_format="float")
    assert [each.embedding for each in packed.data] == [each.embedding for each in plain.data]
    assert len(packed.data) == 3
    for number, answer in enumerate((packed, plain)):
        line = (await stage.demo.recorded(number + 1))[number]
        assert answer.usage.prompt_tokens == line["tokens"]["input"]
    lines = await stage.front.gateway.lines("request", 4)
    first = next(each for each in lines if each["route"] == "embeddings")
    settled(await stage.receipt(first["request_id"]), line)


async def test_embeddings_fail_as_the_sdks_own_classes(stage: Stage) -> None:
    for fault, raised, code in FAULTS[:5]:
        stage.next(fault)
        with pytest.raises(raised) as refused:
            await stage.client.embeddings.create(model="openai/text-embedding-3-small", input="x")
        assert refused.value.code == code, fault


# -- what others have created --------------------------------------------------------------------


async def test_no_tenant_can_reach_what_another_has_created_upstream(stage: Stage) -> None:
    theirs = await stage.ask(store=True)
    assert not stage.demo.stored, "a response was kept, where everybody's key could find it"
    # Even one that the account does keep, made by somebody else's hand, is out of reach.
    stage.demo.stored["resp_theirs"] = {"id": "resp_theirs", "secret": "SECRET-OF-ALICE"}
    before = len(stage.demo.requests)
    bob = stage.client.with_options(api_key=await make_key(stage.front.client, "bob"))
    reaching: list[dict[str, Any]] = [
        {"previous_response_id": "resp_theirs"},
        {"previous_response_id": theirs.id},
        {"conversation": "conv_theirs"},
        {"prompt": {"id": "pmpt_theirs"}},
        {"input": [{"type": "item_reference", "id": theirs.output[0].id}]},
        {"input": [{"id": theirs.output[0].id}]},
        {"background": True},
    ]
    for fields in reaching:
        with pytest.raises(openai.BadRequestError) as refused:
            await bob.responses.create(**{"model": stage.model, "input": "And?", **fields})
        assert refused.value.code == "unsupported_parameter", fields
    for reach in (
        bob.responses.retrieve("resp_theirs"),
        bob.responses.delete("resp_theirs"),
        bob.responses.cancel("resp_theirs"),
        bob.responses.input_items.list("resp_theirs"),
        bob.conversations.retrieve("conv_theirs"),
        bob.files.retrieve("file_theirs"),
    ):
        with pytest.raises(openai.NotFoundError):
            await reach
    assert len(stage.demo.requests) == before, "something of it reached the upstream"
    # Nor does a key of another kind, the upstream's own, open anything.
    thief = stage.client.with_options(api_key=UPSTREAM_TOKEN)
    with pytest.raises(openai.AuthenticationError):
        await thief.responses.create(model=stage.model, input="Hi")
    bobs = await bob.get("/usage", cast_to=object)
    assert isinstance(bobs, dict) and bobs["requests"] == []
    assert all(scope["month_usage_usd"] == "0.000000000" for scope in _own(bobs))


def _own(usage: dict[str, Any]) -> list[Any]:
    return [scope for scope in usage["scopes"] if scope["scope"] in ("key", "user")]
