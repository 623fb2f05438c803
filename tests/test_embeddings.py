"""Embeddings: what a request must look like, what its prompt may come to, and the whole way of one
through the gateway, byte for byte."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.embeddings import MOST_INPUTS, EmbeddingsRequest
from gwproxy.core.errors import InvalidRequest
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, Received, Upstream, Wire, bearer, chat, make_key, tokenizer
from tests.sdk import PAIR, config, demo_upstream

MODEL = "mock/echo"

# Spaced as no serialiser of ours would space it, so that only its own bytes can be equal to it.
BASE64 = (
    b'{ "object":"list", "data":[{"object":"embedding","index":0,'
    b'"embedding":"AACAPwAAAEAAAEBA+/8=" }],\n "model":"echo",'
    b'"usage":{"prompt_tokens":7,"total_tokens":7}}'
)


def parse(**fields: Any) -> EmbeddingsRequest:
    return EmbeddingsRequest.parse(orjson.dumps({"model": MODEL, "input": "Hello", **fields}))


# -- what a request must look like ---------------------------------------------------------------


@pytest.mark.parametrize("given", ["Hello", ["Hello", "Grüße"], [1, 2, 3], [[1, 2], [3]], ["a"]])
def test_texts_and_tokens_are_taken(given: Any) -> None:
    request = parse(input=given, encoding_format="base64", dimensions=3, unknown={"kept": 1})
    assert (request.stream, request.max_output_tokens, request.body["input"]) == (False, 0, given)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": {"image": "x"}}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": ["a", 1]}, "input[1]", "invalid_value"),
        ({"input": [1, "a"]}, "input", "invalid_value"),
        ({"input": [1, True]}, "input", "invalid_value"),
        ({"input": [1, -1]}, "input", "invalid_value"),
        ({"input": [[1], []]}, "input[1]", "invalid_value"),
        ({"input": [[1], [1.5]]}, "input[1]", "invalid_value"),
        ({"input": ["a", {"image": "x"}]}, "input[1]", "invalid_value"),
        ({"input": ["a"] * (MOST_INPUTS + 1)}, "input", "invalid_value"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 3}, "model", "invalid_value"),
        ({"stream": True}, "stream", "invalid_value"),
        ({"service_tier": "priority"}, "service_tier", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(
    fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**fields)
    assert (refused.value.param, refused.value.code) == (param, code)


INPUTS = st.one_of(
    st.text(min_size=1),
    st.lists(st.text(min_size=1), min_size=1, max_size=5),
    st.lists(st.integers(0, 200_000), min_size=1, max_size=50),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=5),
)


@settings(deadline=None)
@given(INPUTS)
def test_no_tokenizer_can_make_more_of_it_than_its_bytes(value: Any) -> None:
    raw = json.dumps({"model": "m", "input": value}, ensure_ascii=False, separators=(",", ":"))
    request = EmbeddingsRequest.parse(raw.encode("utf-8", "replace"))
    # The worst there can be: each byte a token, and one before and behind each input.
    worst = sum(
        2 + (len(each) if type(each) is list else len(str(each).encode()))
        for each in request.inputs
    )
    assert worst <= request.prompt_bound()
    counted = request.prompt_tokens(tokenizer().count)
    assert counted <= request.held_prompt(counted, 1000) <= request.prompt_bound()


def test_a_long_text_is_counted_in_slices() -> None:
    request = parse(input=["word " * 20_000, "word " * 20_000])
    steps = sum(1 for _ in request.prompt_slices(tokenizer().count))
    assert steps >= 6
    assert request.prompt_tokens(tokenizer().count) == 2 * (20_000 + 1 + 2)


# -- through the gateway -------------------------------------------------------------------------


async def embed(front: Front, key: str | None = None, **fields: Any) -> Any:
    body = {"model": MODEL, "input": "Hello", **fields}
    return await front.client.post("/v1/embeddings", json=body, headers=bearer(key or front.key))


def answers(body: bytes, status: str = "200 OK") -> Any:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, status)

    return script


async def test_an_answer_in_base64_comes_as_it_was_sent(front: Front, upstream: Upstream) -> None:
    upstream.script = answers(BASE64)
    response = await embed(front, input=["Hello", "there"], encoding_format="base64")
    assert (response.status, await response.read()) == (200, BASE64)
    [received] = upstream.received
    assert received.head.startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
    assert received.json == {
        "model": MODEL,
        "input": ["Hello", "there"],
        "encoding_format": "base64",
    }
    assert response.headers["x-gateway-usage-usd"] == "0.00"
    receipt = await front.client.get(
        f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(front.key)
    )
    told = await receipt.json()
    assert (told["outcome"], told["source"], told["cost_usd"]) == (
        "completed",
        "provider",
        "0.000007000",
    )
    assert told["tokens"] == {
        "input": 7,
        "cache_read": 0,
        "cache_write": 0,
        "output": 0,
        "reasoning": 0,
    }
    line = await front.gateway.request_line(route="embeddings")
    assert (line["route"], line["tokens"]["input"], line["outcome"]) == (
        "embeddings",
        7,
        "completed",
    )


async def test_an_answer_without_usage_costs_what_was_counted(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = answers(b'{"object":"list","data":[{"embedding":[1.0]}]}')
    response = await embed(front, input=[[1, 2, 3], [4]])
    assert response.status == 200
    receipt = await front.client.get(
        f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(front.key)
    )
    told = await receipt.json()
    assert (told["source"], told["tokens"]["input"]) == ("counted", 3 + 1 + 2 * 2)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"object":"list"}', 502, "all_providers_failed"),
        (b"<html>", 502, "all_providers_failed"),
        (b'{"choices":[]}', 502, "all_providers_failed"),
        (b'{"object":"list","data":[]}', 502, "all_providers_failed"),
        (b'{"error":{"message":"no","type":"server_error"}}', 502, "all_providers_failed"),
    ],
)
async def test_what_is_no_answer_of_this_api_is_none(
    front: Front, upstream: Upstream, body: bytes, status: int, code: str
) -> None:
    upstream.script = answers(body)
    response = await embed(front)
    assert (response.status, (await response.json())["error"]["code"]) == (status, code)


async def test_no_embedding_at_all_is_no_answer_and_costs_what_it_says(
    start_gateway: StartGateway,
) -> None:
    demo = demo_upstream()
    await demo.start()
    front = await start_gateway(config=config(demo, "cloudflare-compat") + PAIR)

    async def told(response: Any) -> Any:
        request_id = response.headers["x-request-id"]
        path = f"/v1/receipts/{request_id}"
        return await (await front.client.get(path, headers=bearer(front.key))).json()

    nothing = b'{"object":"list","data":[],"usage":{"prompt_tokens":9,"total_tokens":9}}'
    demo.script(provider="custom-one", writes=[nothing])
    response = await embed(front, model="pair", input=["Hello", "there"])
    assert (response.status, response.headers["x-gateway-provider"]) == (200, "two")
    assert len((await response.json())["data"]) == 2
    first, second = (await told(response))["attempts"]
    assert (first["reason"], first["cost_usd"]) == ("garbage", "0.000009000")
    assert (second["provider"], second["status"]) == ("two", 200)

    demo.script(writes=[nothing], count=0)
    response = await embed(front, model="pair", input=["Hello", "there"])
    assert (response.status, (await response.json())["error"]["code"]) == (
        502,
        "all_providers_failed",
    )
    receipt = await told(response)
    assert (receipt["outcome"], receipt["cost_usd"]) == ("unknown", "0.000018000")
    await demo.stop()


async def test_no_more_is_admitted_than_the_budget_has_room_for(
    front: Front, upstream: Upstream
) -> None:
    poor = {"user_id": "poor", "monthly_limit_usd": "0.000060"}
    made = await front.client.post("/admin/users", json=poor, headers=ADMIN)
    assert made.status == 201
    key = await make_key(front.client, "poor")
    upstream.script = answers(BASE64)
    # 100 tokens at 1 USD a million; the bytes would be five times as dear, the tokens are not.
    refused = await embed(front, key, input=list(range(100)))
    assert refused.status == 429
    error = (await refused.json())["error"]
    assert (error["code"], refused.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert not upstream.received
    assert (await embed(front, key, input=[1, 2, 3])).status == 200


async def test_nobody_talks_to_embeddings_or_embeds_with_what_talks(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(
        config=f"""
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
base_url = "{upstream.url}"
token = "env:UPSTREAM_TOKEN"
[providers.openai]
[prices.models."openai/own-embeddings"]
input = 1
output = 1
"""
    )
    talks = await embed(front, model="openai/gpt-4o-mini")
    embeds = await front.chat(chat(model="openai/text-embedding-3-small"))
    for refused in (talks, embeds):
        assert refused.status == 400
        error = (await refused.json())["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_supported")
        assert "GET /v1/models" in error["message"]
    assert not upstream.received
    # What the table does not know may be either.
    await embed(front, model="openai/own-embeddings")
    await front.chat(chat(model="openai/own-embeddings"))
    assert len(upstream.received) == 2


async def test_a_provider_without_embeddings_is_told_before_anything_is_held(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(
        config=f"""
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
base_url = "{upstream.url}"
token = "env:UPSTREAM_TOKEN"
[providers.anthropic]
[providers.openai]
[models.mixed]
chain = [
    {{ provider = "anthropic", model = "claude-haiku-4-5" }},
    {{ provider = "openai", model = "text-embedding-3-small" }},
]
"""
    )
    refused = await embed(front, model="anthropic/claude-sonnet-4-5")
    assert refused.status == 400
    assert (await refused.json())["error"]["code"] == "model_not_supported"
    unknown = await embed(front, model="nobody/nothing")
    assert (unknown.status, (await unknown.json())["error"]["code"]) == (404, "model_not_found")
    assert not upstream.received
    # Of a chain only those are asked that have the API, and by their own name for the model.
    upstream.script = answers(BASE64)
    mixed = await embed(front, model="mixed")
    assert mixed.status == 200
    receipt = await front.client.get(
        f"/v1/receipts/{mixed.headers['x-request-id']}", headers=bearer(front.key)
    )
    assert (await receipt.json())["edits"] == ["skipped anthropic: no such API"]
    [received] = upstream.received
    assert received.head.startswith(b"POST /v1/openai/embeddings HTTP/1.1\r\n")
    assert received.json["model"] == "text-embedding-3-small"
    assert received.header("cf-aig-authorization") is not None
    assert received.header("authorization") is None
