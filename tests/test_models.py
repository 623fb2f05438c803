"""`GET /v1/models`: what a key may call, and nothing about what it may not."""

from typing import Any
from urllib.parse import quote

import pytest
from openai.types import Model

from gwproxy import assets
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import Routes, candidate_of, known
from gwproxy.parts import build_routes
from gwproxy.proxy.models import _names
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, ADMIN_KEY, Upstream, bearer, chat, make_key, prices

COMPAT = """
[server]
listen = "127.0.0.1:0"
drain_s = 1
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "cloudflare-compat"
base_url = "{root}"
token = "env:UPSTREAM_TOKEN"
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.hf]
prefix = "custom-hf"
model = "org/model:x"
[providers.local]
flavour = "openai"
base_url = "{root}"
model = "qwen3"
[models.fast]
chain = ["gemini", "hf"]
[models.unpriced]
chain = [{{ provider = "hf", model = "org/unpriced" }}]
[prices.models."custom-hf/org/model:x"]
input = "1"
output = "2"
[prices.models."local/*"]
input = "0"
output = "0"
[prices.models."openai/house-model"]
input = "1"
output = "2"
[prices.models."nobody/model"]
input = "1"
output = "2"
"""


@pytest.fixture
async def compat(start_gateway: StartGateway, upstream: Upstream) -> Front:
    root = upstream.url.removesuffix("/v1")
    return await start_gateway(config=COMPAT.format(root=root))


async def listed(front: Front, key: str | None = None) -> dict[str, str]:
    """The models that a key is told of, with whose they are."""
    answer = await front.client.get("/v1/models", headers=bearer(key or front.key))
    assert answer.status == 200, await answer.text()
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-gateway-mode"] == "normal"
    value = await answer.json()
    assert value["object"] == "list"
    models = [Model.model_validate(each, strict=True) for each in value["data"]]
    names = [model.id for model in models]
    assert len(names) == len(set(names))
    return {model.id: model.owned_by for model in models}


async def shown(front: Front, path: str, key: str | None = None) -> tuple[int, Any]:
    answer = await front.client.get(f"/v1/models/{path}", headers=bearer(key or front.key))
    return answer.status, await answer.json()


async def test_an_openai_compatible_server_has_the_models_with_a_price_of_ours(
    front: Front,
) -> None:
    assert await listed(front) == {"mock/echo": "upstream"}


async def test_behind_the_gateway_each_configured_provider_has_its_own(compat: Front) -> None:
    found = await listed(compat)
    assert found["fast"] == "gwproxy"
    assert found["google-ai-studio/gemini-2.5-flash"] == "gemini"
    assert found["custom-hf/org/model:x"] == "hf"
    assert found["local/qwen3"] == "local"
    assert "unpriced" not in found
    assert not any("nobody" in name or "*" in name for name in found)
    assert set(found.values()) == {"gwproxy", "gemini", "hf", "local"}


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.mark.parametrize(
    ("name", "routes"),
    [
        ("openai/gpt-4o", [CHAT, RESPONSES]),
        ("anthropic/claude-sonnet-4-5", [CHAT, "/v1/messages"]),
        ("groq/llama-3.3-70b-versatile", [CHAT]),
        ("openai/text-embedding-3-small", ["/v1/embeddings"]),
        ("google-ai-studio/gemini-embedding-001", ["/v1/embeddings"]),
        ("workers-ai/@cf/baai/bge-m3", ["/v1/embeddings"]),
        ("google-ai-studio/gemini-2.5-flash", [CHAT]),
        # No route is for these: pictures, sound, ranks; and Cohere's embeddings have none here.
        ("openai/gpt-image-1", None),
        ("openai/gpt-realtime", None),
        ("openai/gpt-4o-mini-tts", None),
        ("openai/gpt-4o-transcribe", None),
        ("openai/gpt-audio", None),
        ("google-ai-studio/gemini-2.5-flash-image", None),
        ("google-ai-studio/gemini-live-2.5-flash", None),
        ("workers-ai/@cf/baai/bge-reranker-base", None),
        ("cohere/embed-v4.0", None),
    ],
)
def test_each_model_is_listed_with_the_routes_that_it_can_be_called_by(
    catalogue: dict[str, Any], name: str, routes: list[str] | None
) -> None:
    assert catalogue.get(name) == routes


def test_a_model_that_answers_in_pictures_has_no_price_of_tokens_alone() -> None:
    google = known("google-ai-studio")
    assert prices().rate_of(candidate_of(google, "gemini-2.5-flash-image")) is None
    assert prices().rate_of(candidate_of(google, "gemini-2.5-flash")) is not None


@pytest.fixture(scope="module")
def catalogue() -> dict[str, Any]:
    """What is offered where no provider is configured, each name with its routes."""
    offers = dict(_names(Routes({}), prices(), ()))
    return {name: offer.model(name)["routes"] for name, offer in offers.items()}


async def test_without_a_provider_configured_the_catalogue_is_listed(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    head, _, rest = COMPAT.format(root=upstream.url).partition("[providers.gemini]")
    front = await start_gateway(config=head + rest[rest.index("[prices.models.") :])
    found = await listed(front)
    assert found["openai/house-model"] == "openai"
    # A price makes no provider: these have no address.
    assert not any(name.startswith(("nobody/", "custom-hf/", "local/")) for name in found)
    assert found["openai/gpt-4o"] == "openai"
    assert any(name.startswith("workers-ai/@cf/") for name in found)


@pytest.mark.parametrize("flavour", ["openai", "compat"])
async def test_every_model_that_is_listed_can_be_called(
    flavour: str, request: pytest.FixtureRequest, front: Front, compat: Front
) -> None:
    asked = front if flavour == "openai" else compat
    assert asked.gateway.app is not None
    config = asked.gateway.app.config
    overrides = {name: price.row() for name, price in config.prices.models.items()}
    prices = PriceBook(assets.prices(), overrides)
    routes = build_routes(config, prices)
    found = await listed(asked)
    for name, owner in found.items():
        chain = routes.resolve(name)
        assert chain, name
        assert owner in ("gwproxy", chain[0].provider.name)
    for name in (*list(found)[:2], *list(found)[-2:]):
        answer = await asked.chat(chat(model=name))
        assert answer.status == 200, (name, await answer.text())


@pytest.mark.parametrize("path", ["mock/echo", "mock%2Fecho", "mock%2fecho", "%6Dock/echo"])
async def test_one_model_is_shown_with_its_slash_as_it_is_or_encoded(
    front: Front, path: str
) -> None:
    status, value = await shown(front, path)
    assert status == 200
    assert value == {
        "id": "mock/echo",
        "object": "model",
        "created": 0,
        "owned_by": "upstream",
        "routes": ["/v1/chat/completions", "/v1/responses", "/v1/messages"],
    }


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("fast", "gwproxy"),
        ("google-ai-studio/gemini-2.5-flash", "gemini"),
        ("custom-hf/org/model:x", "hf"),
        # Names that can be called although they are not those that are listed.
        ("google/gemini-2.5-flash", "gemini"),
        ("gemini/gemini-2.5-flash", "gemini"),
        ("gemini-2.5-flash", "gemini"),
        ("hf/org/model:x", "hf"),
        ("openai/gpt-4o", "openai"),
        ("local/anything", "local"),
    ],
)
async def test_a_name_that_can_be_called_is_shown(compat: Front, name: str, owner: str) -> None:
    status, value = await shown(compat, quote(name, safe=""))
    assert (status, value.get("id"), value.get("owned_by")) == (200, name, owner)
    answer = await compat.chat(chat(model=name))
    assert answer.status == 200


@pytest.mark.parametrize(
    "name",
    ["nobody/model", "gpt-unheard-of", "unpriced", "custom-hf/org/unpriced", "x" * 300, "%00"],
)
async def test_a_name_that_cannot_be_called_is_not_there(compat: Front, name: str) -> None:
    status, value = await shown(compat, quote(name, safe=""))
    assert status == 404
    assert value["error"]["code"] == "model_not_found"
    assert value["error"]["param"] == "model"


async def test_a_keys_own_list_hides_the_others_with_the_same_answer(compat: Front) -> None:
    mine = ["fast", "google/gemini-2.5-pro", "nobody/model"]
    key = await make_key(compat.client, "bob", allowed_models=mine)
    assert await listed(compat, key) == {"fast": "gwproxy", "google/gemini-2.5-pro": "gemini"}
    assert (await shown(compat, "google/gemini-2.5-pro", key))[0] == 200
    hidden = await shown(compat, "custom-hf/org/model:x", key)
    unknown = await shown(compat, "custom-hf/there-is-no-such-model", key)
    assert hidden == unknown
    assert hidden[0] == 404
    # The chat answers alike, and both to the same words.
    for name in ("custom-hf/org/model:x", "custom-hf/there-is-no-such-model"):
        answer = await compat.client.post(
            "/v1/chat/completions", json=chat(model=name), headers=bearer(key)
        )
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")


async def test_a_key_with_an_empty_list_may_call_nothing(front: Front) -> None:
    made = await front.client.post(
        "/admin/users/alice/api-keys", json={"allowed_models": []}, headers=bearer(ADMIN_KEY)
    )
    if made.status == 400:
        return  # an empty list is refused rather than misread
    key = (await made.json())["api_key"]
    assert await listed(front, key) == {}
    assert (await shown(front, "mock/echo", key))[0] == 404


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/mock/echo", "/v1/models/x"])
async def test_a_stranger_learns_nothing(front: Front, path: str) -> None:
    for headers in ({}, bearer("gw_live_" + "0" * 46), bearer(ADMIN_KEY)):
        answer = await front.client.get(path, headers=headers)
        assert answer.status == 401
        assert (await answer.json())["error"]["code"] == "invalid_api_key"
    assert (await front.client.post("/v1/models", headers=bearer(front.key))).status == 405


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/v1/usage", "/v1/receipts/x"])
async def test_whoever_only_looks_does_not_hide_from_where_the_key_was_used(
    front: Front, path: str
) -> None:
    await (await front.client.get(path, headers=bearer(front.key))).read()
    shown = await front.client.get(f"/admin/api-keys/key_{front.key[8:16]}", headers=ADMIN)
    found = await shown.json()
    assert (found["last_used_from"], found["use_count"]) == ("127.0.0.1", 1)
