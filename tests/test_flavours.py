"""All three flavours through one matrix: whole answers, streams, errors, fallback.

Each is spoken by the built-in upstream, and what that recorded is what is believed.
"""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import UPSTREAM_TOKEN, bearer
from tests.sdk import config, demo_upstream

FLAVOURS = ("cloudflare-compat", "cloudflare-rest", "openai")
HELLO: Any = [{"role": "user", "content": "Hello"}]
PATHS = {
    "cloudflare-compat": "/v1/demo/demo/compat/chat/completions",
    "cloudflare-rest": "/client/v4/accounts/demo/ai/v1/chat/completions",
    "openai": "/v1/chat/completions",
}
CLAUDE = {
    "cloudflare-compat": "anthropic/claude-sonnet-4-5",
    "cloudflare-rest": "anthropic/claude-sonnet-4.5",
    "openai": "anthropic/claude-sonnet-4-5",
}
GEMINI = {
    "cloudflare-compat": "google-ai-studio/gemini-2.5-flash",
    "cloudflare-rest": "google/gemini-2.5-flash",
    "openai": "google-ai-studio/gemini-2.5-flash",
}
PATIENT = """
[breaker]
failure_threshold = 100
"""
FALLBACK = """
[models.two]
chain = [
    { provider = "anthropic", model = "claude-sonnet-4-5" },
    { provider = "gemini", model = "gemini-2.5-flash" },
]
"""


class Stage:
    def __init__(self, front: Front, demo: DemoUpstream, flavour: str) -> None:
        self.front, self.demo, self.flavour = front, demo, flavour

    async def ask(self, model: str, path: str = "chat/completions", **fields: Any) -> Any:
        body = {"model": model, **fields}
        if path != "embeddings" and "input" not in body:
            body = {"messages": HELLO, **body}
        headers = bearer(self.front.key)
        return await self.front.client.post(f"/v1/{path}", json=body, headers=headers)

    def headers(self, number: int = -1) -> dict[str, str]:
        return {name.lower(): value for name, value in self.demo.requests[number]["headers"]}


@pytest_asyncio.fixture(params=FLAVOURS)
async def stage(request: Any, start_gateway: StartGateway) -> AsyncIterator[Stage]:
    demo = demo_upstream()
    await demo.start()
    text = config(demo, request.param, 'gateway_id = "demo"') + PATIENT
    if request.param == "openai":
        # A plain server's own names for its models have a provider's name before the slash.
        text += '[providers.anthropic]\nprefix = "anthropic"\n'
        text += '[providers.gemini]\nprefix = "google-ai-studio"\n'
    front = await start_gateway(config=text + FALLBACK)
    yield Stage(front, demo, request.param)
    await demo.stop()


async def test_each_has_its_address_its_credentials_and_its_names(stage: Stage) -> None:
    response = await stage.ask("anthropic/claude-sonnet-4-5")
    assert response.status == 200, await response.text()
    [sent] = stage.demo.requests
    headers = stage.headers()
    assert sent["path"] == PATHS[stage.flavour]
    assert orjson.loads(sent["body"])["model"] == CLAUDE[stage.flavour]
    gateway = stage.flavour == "cloudflare-compat"
    ours = "cf-aig-authorization" if gateway else "authorization"
    assert headers[ours] == f"Bearer {UPSTREAM_TOKEN}"
    assert ("authorization" in headers) is not gateway
    assert headers.get("cf-aig-gateway-id") == (
        "demo" if stage.flavour == "cloudflare-rest" else None
    )
    assert ("cf-aig-metadata" in headers) is (stage.flavour != "openai")
    assert response.headers["x-gateway-provider"] == "anthropic"
    [line] = await stage.demo.recorded(1)
    assert (line["provider"], line["model"]) == ("anthropic", "claude-sonnet-4-5")


async def test_whole_answers_and_streams_cost_what_was_served(stage: Stage) -> None:
    for number, fields in enumerate(({}, {"stream": True}, {"stream": True, "n": 2})):
        response = await stage.ask("gemini/gemini-2.5-flash", **fields)
        text = await response.text()
        assert response.status == 200, text
        assert text.endswith("data: [DONE]\n\n") is bool(fields)
        assert orjson.loads(stage.demo.requests[-1]["body"])["model"] == GEMINI[stage.flavour]
        real = (await stage.demo.recorded(number + 1))[number]["tokens"]
        receipt = await stage.front.client.get(
            f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(stage.front.key)
        )
        told = await receipt.json()
        assert (told["outcome"], told["source"]) == ("completed", "provider")
        tokens = told["tokens"]
        assert (tokens["input"], tokens["output"]) == (real["input"], real["output"])


ERRORS: list[tuple[str, int, str | None]] = [
    ("status-400", 400, None),
    ("status-404", 404, "model_not_found"),
    ("status-429", 429, "rate_limit_exceeded"),
    ("status-401", 502, "upstream_misconfigured"),
    ("status-500", 502, "all_providers_failed"),
    ("status-524", 502, "all_providers_failed"),
    ("garbage", 502, "all_providers_failed"),
    ("reset-before-headers", 502, "all_providers_failed"),
    ("error-first", 502, "all_providers_failed"),
]
THEIRS: list[tuple[str, int, str | None]] = [
    ("code-2005", 502, "all_providers_failed"),
    ("code-2009", 502, "upstream_misconfigured"),
    ("code-2016", 424, "content_blocked"),
    ("code-7003", 404, "model_not_found"),
    ("code-10000", 502, "upstream_misconfigured"),
]


async def test_errors_are_told_alike(stage: Stage) -> None:
    for fault, status, code in ERRORS + (THEIRS if stage.flavour != "openai" else []):
        for stream in (False, True):
            stage.demo.scripts.clear()
            stage.demo.script(fault=fault, count=0)
            response = await stage.ask("anthropic/claude-sonnet-4-5", stream=stream)
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (status, code), (fault, stream)
            assert UPSTREAM_TOKEN not in str(error)


async def test_a_stream_that_breaks_off_says_so(stage: Stage) -> None:
    for fault in ("reset-after-3", "eof-after-3", "close-after-3"):
        stage.demo.scripts.clear()
        stage.demo.script(fault=fault, count=0)
        response = await stage.ask("anthropic/claude-sonnet-4-5", stream=True)
        text = await response.text()
        assert '"code":"stream_interrupted"' in text and "[DONE]" not in text, fault


async def test_the_next_of_a_chain_is_asked_where_the_first_fails(stage: Stage) -> None:
    for fault in ("status-503", "reset-before-headers", "error-first", "garbage"):
        for stream in (False, True):
            stage.demo.clear()
            stage.demo.script(model=CLAUDE[stage.flavour], fault=fault, count=0)
            response = await stage.ask("two", stream=stream)
            text = await response.text()
            assert (response.status, response.headers["x-gateway-provider"]) == (200, "gemini")
            assert "stream_interrupted" not in text
            asked = [orjson.loads(each["body"])["model"] for each in stage.demo.requests]
            assert asked[0] == CLAUDE[stage.flavour], fault
            assert asked[-1] == GEMINI[stage.flavour], fault


NATIVE: dict[str, dict[str, Any]] = {
    "messages": {"model": "anthropic/claude-sonnet-4-5", "max_tokens": 50},
    "responses": {"model": "openai/gpt-4o-mini", "input": "Hello"},
    "embeddings": {"model": "workers-ai/@cf/baai/bge-m3", "input": ["Hello", "there"]},
}
"""What even the smallest of the flavours has."""


def native(stage: Stage) -> list[tuple[str, dict[str, Any]]]:
    """Each of the other APIs, whole and in a stream where it has any."""
    asks = []
    for path, fields in NATIVE.items():
        for stream in (False, True) if path != "embeddings" else (False,):
            fields = {**fields, "stream": stream}
            if stage.flavour == "openai" and path == "embeddings":
                fields["model"] = "openai/text-embedding-3-small"
            asks.append((path, fields))
    return asks


async def test_the_other_apis_cost_what_was_served(stage: Stage) -> None:
    for number, (path, fields) in enumerate(native(stage)):
        response = await stage.ask(path=path, **fields)
        text = await response.text()
        assert response.status == 200, (path, text)
        served = (await stage.demo.recorded(number + 1))[number]["tokens"]
        receipt = await stage.front.client.get(
            f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(stage.front.key)
        )
        told = await receipt.json()
        assert (told["outcome"], told["source"]) == ("completed", "provider"), path
        tokens = told["tokens"]
        assert (tokens["input"], tokens["output"]) == (served["input"], served["output"]), path


async def test_the_other_apis_tell_errors_alike(stage: Stage) -> None:
    for fault, status, code in ERRORS + (THEIRS if stage.flavour != "openai" else []):
        for path, fields in native(stage):
            if fault == "error-first" and path == "embeddings":
                continue
            stage.demo.scripts.clear()
            stage.demo.script(fault=fault, count=0)
            response = await stage.ask(path=path, **fields)
            body = await response.json()
            where = fault, path, fields["stream"], body
            assert response.headers["Content-Type"] == "application/json", where
            # Anthropic's own words for an unknown model have no code.
            code_here = None if (fault, path) == ("status-404", "messages") else code
            assert (response.status, body["error"].get("code")) == (status, code_here), where
            assert (body.get("type") == "error") is (path == "messages"), where
            assert UPSTREAM_TOKEN not in str(body)


async def test_a_stream_of_another_api_that_breaks_off_says_so(stage: Stage) -> None:
    for path in ("messages", "responses"):
        for fault in ("reset-after-6", "eof-after-6", "close-after-6"):
            stage.demo.scripts.clear()
            stage.demo.script(fault=fault, count=0)
            response = await stage.ask(path=path, **{**NATIVE[path], "stream": True})
            text = await response.text()
            assert response.status == 200, (path, fault, text)
            name, _, data = text.strip().rpartition("\n\n")[2].partition("\n")
            assert name == "event: error", (path, fault)
            assert '"code":"stream_interrupted"' in data, (path, fault)


async def test_an_api_that_the_rest_flavour_has_not_is_refused_before_anything_is_sent(
    stage: Stage,
) -> None:
    if stage.flavour != "cloudflare-rest":
        return
    for path, fields in (
        ("messages", {"model": "openai/gpt-4o-mini", "max_tokens": 50}),
        ("responses", {"model": "anthropic/claude-sonnet-4-5", "input": "Hello"}),
        ("responses", {"model": "groq/llama-3.1-8b-instant", "input": "Hello", "stream": True}),
        ("embeddings", {"model": "openai/text-embedding-3-small", "input": "Hello"}),
    ):
        response = await stage.ask(path=path, **fields)
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (400, "model_not_supported"), fields
        assert f"no API for {path}" in error["message"] and "/v1/chat/completions" in str(error)
    assert stage.demo.requests == []


async def test_a_stranger_is_the_operators_fault(start_gateway: StartGateway) -> None:
    for flavour in FLAVOURS:
        demo = DemoUpstream(token="another-token-than-the-one-configured")
        await demo.start()
        front = await start_gateway(config=config(demo, flavour))
        response = await Stage(front, demo, flavour).ask("anthropic/claude-sonnet-4-5")
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (502, "upstream_misconfigured"), flavour
        await demo.stop()


async def test_the_other_apis_are_where_each_flavour_has_them(stage: Stage) -> None:
    message = await stage.ask("anthropic/claude-sonnet-4-5", "messages", max_tokens=50)
    assert message.status == 200, await message.text()
    response = await stage.ask("openai/gpt-4o-mini", "responses", input="Hello")
    assert response.status == 200, await response.text()
    openai_vectors = await stage.ask(
        "openai/text-embedding-3-small", "embeddings", input=["Hello", "there"]
    )
    own = await stage.ask("workers-ai/@cf/baai/bge-m3", "embeddings", input="Hello")
    paths = [each["path"] for each in stage.demo.requests]
    names = [orjson.loads(each["body"])["model"] for each in stage.demo.requests]
    match stage.flavour:
        case "cloudflare-compat":
            assert openai_vectors.status == 200
            root = "/v1/demo/demo"
            assert paths[:3] == [
                f"{root}/anthropic/v1/messages",
                f"{root}/openai/responses",
                f"{root}/openai/embeddings",
            ]
            assert names[:3] == ["claude-sonnet-4-5", "gpt-4o-mini", "text-embedding-3-small"]
        case "cloudflare-rest":
            error = (await openai_vectors.json())["error"]
            assert (openai_vectors.status, error["code"]) == (400, "model_not_supported")
            root = "/client/v4/accounts/demo/ai/v1"
            assert paths[:2] == [f"{root}/messages", f"{root}/responses"]
            assert names[:2] == ["anthropic/claude-sonnet-4.5", "openai/gpt-4o-mini"]
        case _:
            assert openai_vectors.status == 200
            assert paths[:3] == ["/v1/messages", "/v1/responses", "/v1/embeddings"]
            assert stage.headers(0)["x-api-key"] == UPSTREAM_TOKEN
    if stage.flavour != "openai":
        assert own.status == 200, await own.text()
        assert names[-1] == "@cf/baai/bge-m3"
    for number in range(len(stage.demo.requests)):
        assert stage.front.key not in str(stage.demo.requests[number])
