"""A provider's error in the midst of a stream, in whatever words it comes: before the answer has
begun somebody else is asked, and afterwards the client is told, in its own API's words.
"""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import orjson
import pytest
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import bearer
from tests.sdk import PAIR, config, demo_upstream

HELLO: Any = [{"role": "user", "content": "Hello"}]
ASK: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": HELLO},
    "responses": {"input": "Hello"},
    "messages": {"messages": HELLO, "max_tokens": 100},
}


def event(data: Any, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: %b\n\n" % (data if isinstance(data, bytes) else orjson.dumps(data))


WORDS = {
    "chat/completions": event(
        {"choices": [{"index": 0, "delta": {"content": "one two three"}, "finish_reason": None}]}
    ),
    "responses": event(
        {"type": "response.output_text.delta", "output_index": 0, "delta": "one two three"},
        "response.output_text.delta",
    ),
    "messages": event(
        {
            "type": "content_block_delta", "index": 0,
            "delta": {"type": "text_delta", "text": "one two three"},
        },
        "content_block_delta",
    ),
}  # fmt: skip
ERRORS = {
    "no error key": event({"type": "error", "message": "the provider's own words"}, "error"),
    "plain text": event(b"the provider's own words", "error"),
    "empty": event(b"{}", "error"),
    "the gateway's": event({"error": {"message": "the provider's own words"}}),
}


OWN = {
    ("the gateway's", "chat/completions"),
    ("no error key", "responses"),
    ("no error key", "messages"),
}
"""What is in an API's own words already, and leaves as it came."""


class Stage:
    def __init__(self, front: Front, demo: DemoUpstream) -> None:
        self.front, self.demo = front, demo

    def answer(self, *writes: bytes) -> None:
        self.demo.script(
            provider="custom-one",
            writes=list(writes),
            headers={"content-type": "text/event-stream"},
        )

    async def ask(self, api: str) -> Any:
        body = {"model": "pair", "stream": True, **ASK[api]}
        return await self.front.client.post(f"/v1/{api}", json=body, headers=bearer(self.front.key))

    async def receipt(self, response: Any) -> Any:
        request_id = response.headers["x-request-id"]
        found = await self.front.client.get(
            f"/v1/receipts/{request_id}", headers=bearer(self.front.key)
        )
        return await found.json()


@pytest_asyncio.fixture
async def stage(start_gateway: StartGateway) -> AsyncIterator[Stage]:
    demo = demo_upstream()
    await demo.start()
    front = await start_gateway(config=config(demo, "cloudflare-compat") + PAIR)
    yield Stage(front, demo)
    await demo.stop()


@pytest.mark.parametrize("api", ASK)
async def test_before_the_answer_somebody_else_is_asked(stage: Stage, api: str) -> None:
    for name, error in ERRORS.items():
        stage.answer(error)
        response = await stage.ask(api)
        text = await response.text()
        assert (response.status, response.headers["x-gateway-provider"]) == (200, "two"), name
        assert "the provider's own words" not in text
        told = await stage.receipt(response)
        assert told["attempts"][0]["cost_usd"] == "0.000000000", name
        assert told["outcome"] == "completed"


@pytest.mark.parametrize("api", ASK)
async def test_afterwards_it_is_told_and_what_was_given_is_charged(stage: Stage, api: str) -> None:
    for name, error in ERRORS.items():
        for writes in ((WORDS[api], error), (WORDS[api] + error[:9], error[9:])):
            stage.answer(*writes)
            response = await stage.ask(api)
            body = await response.read()
            assert (response.status, response.headers["x-gateway-provider"]) == (200, "one")
            assert body.startswith(WORDS[api]), name
            told = body[len(WORDS[api]) :]
            # In place of theirs one of ours, or theirs where it is in this API's own words.
            if (name, api) not in OWN:
                assert b"stream_interrupted" in told and b"own words" not in told, (name, told)
            assert told.count(b"\n\n") == 1, (name, told)
            receipt = await stage.receipt(response)
            assert (receipt["outcome"], receipt["tokens"]["output"]) == ("truncated", 3), name
            assert receipt["source"] == "counted"


async def test_the_sdks_raise(stage: Stage) -> None:
    base_url = stage.front.url
    asked = openai.AsyncOpenAI(api_key=stage.front.key, base_url=f"{base_url}/v1", max_retries=0)
    theirs = anthropic.AsyncAnthropic(api_key=stage.front.key, base_url=base_url, max_retries=0)
    async with asked, theirs:
        for name, error in ERRORS.items():
            stage.answer(WORDS["chat/completions"], error)
            chunks = await asked.chat.completions.create(model="pair", messages=HELLO, stream=True)
            with pytest.raises(openai.APIError):
                async for _ in chunks:
                    pass
            stage.answer(WORDS["messages"], error)
            with pytest.raises(anthropic.APIStatusError):
                async for _ in await theirs.messages.create(
                    model="pair", messages=HELLO, max_tokens=100, stream=True
                ):
                    pass
            stage.answer(WORDS["responses"], error)
            kinds = [
                each.type
                async for each in await asked.responses.create(
                    model="pair", input="Hello", stream=True
                )
            ]
            assert kinds == ["response.output_text.delta", "error"], name
