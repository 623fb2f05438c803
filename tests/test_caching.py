"""The gateway's cache: off unless an organization wants it, shared by no two, free when it hits."""

import json
from typing import Any

import pytest

from gwproxy.core.upstream_words import cache_key
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, ANSWER, Received, Upstream, Wire, bearer, chat, events, make_key
from tests.scene import CHUNKED, in_chunks, sends

CLOUDFLARE = """
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "{flavour}"
base_url = "{upstream}"
token = "env:UPSTREAM_TOKEN"
[providers.first]
prefix = "mock"
model = "echo"
[prices.models."mock/echo"]
input = "1.00"
output = "2.00"
"""


class CachingGateway:
    """What is promised of the real one: a request that says so is never answered from the cache,
    and one with a key of its own from what was kept under this key alone."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.served = 0

    async def __call__(self, wire: Wire, received: Received) -> None:
        key = received.header("cf-aig-cache-key")
        skip = received.header("cf-aig-skip-cache")
        assert (key is None) is (skip == "true"), "one of the two, and never both"
        hit = key is not None and key in self.kept
        if not hit:
            self.served += 1
            # As a provider would: no two answers are the same.
            answer = {**ANSWER, "id": f"chatcmpl-{self.served}"}
            body = json.dumps(answer).encode()
            if key is not None:
                self.kept[key] = body
        else:
            assert key is not None
            body = self.kept[key]
        status = "HIT" if hit else "MISS"
        await wire.answer(body, more=f"cf-aig-cache-status: {status}\r\n")


async def start(
    start_gateway: StartGateway, upstream: Upstream, flavour: str = "cloudflare-compat"
) -> Front:
    config = CLOUDFLARE.format(flavour=flavour, upstream=upstream.url)
    front = await start_gateway(config=config)
    for org_id, cache in (("acme", True), ("zeta", True), ("plain", False)):
        made = await front.client.post(
            "/admin/organizations", json={"org_id": org_id, "cache": cache}, headers=ADMIN
        )
        assert made.status == 201
        for user in ("1", "2"):
            user_id = f"{org_id}-{user}"
            await front.client.post(
                "/admin/users", json={"user_id": user_id, "org_id": org_id}, headers=ADMIN
            )
    return front


async def ask(front: Front, user_id: str, **fields: Any) -> tuple[str, str, Any]:
    """Whose answer it is, where it came from, and its receipt."""
    front.key = await make_key(front.client, user_id)
    response = await front.chat(chat(model="first/echo", **fields))
    answer = await response.json()
    assert response.status == 200, answer
    shown = await front.client.get(
        f"/v1/receipts/{response.headers['x-request-id']}", headers=bearer(front.key)
    )
    return answer["id"], response.headers["cf-aig-cache-status"], await shown.json()


async def test_nobody_is_served_from_a_cache_unless_his_organization_wants_it(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    upstream.script = CachingGateway()
    front = await start(start_gateway, upstream)
    found = [await ask(front, user) for user in ("plain-1", "plain-1", "plain-2")]
    assert [(who, status) for who, status, _ in found] == [
        ("chatcmpl-1", "MISS"),
        ("chatcmpl-2", "MISS"),
        ("chatcmpl-3", "MISS"),
    ]
    assert {received.header("cf-aig-skip-cache") for received in upstream.received} == {"true"}


async def test_an_organization_shares_its_cache_with_nobody(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    upstream.script = CachingGateway()
    front = await start(start_gateway, upstream)
    found = {
        user: (await ask(front, user))[:2]
        for user in ("acme-1", "acme-2", "zeta-1", "zeta-2", "plain-1")
    }
    assert found == {
        "acme-1": ("chatcmpl-1", "MISS"),
        "acme-2": ("chatcmpl-1", "HIT"),
        "zeta-1": ("chatcmpl-2", "MISS"),
        "zeta-2": ("chatcmpl-2", "HIT"),
        "plain-1": ("chatcmpl-3", "MISS"),
    }
    assert (await ask(front, "acme-1", temperature=1))[1] == "MISS"


async def test_what_a_client_says_about_caches_changes_nothing(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    upstream.script = CachingGateway()
    front = await start(start_gateway, upstream)
    front.key = await make_key(front.client, "acme-1")
    await (await front.chat(chat(model="first/echo"))).read()
    theirs = upstream.received[0].header("cf-aig-cache-key") or ""
    front.key = await make_key(front.client, "zeta-1")
    named = {"cf-aig-cache-key": theirs, "cf-aig-skip-cache": "false", "cf-aig-cache-ttl": "9"}
    response = await front.chat(chat(model="first/echo"), **named)
    assert (await response.json())["id"] == "chatcmpl-2"
    received = upstream.received[1]
    assert received.header("cf-aig-cache-key") not in (None, theirs)
    assert received.header("cf-aig-cache-ttl") is None


async def test_a_hit_costs_nothing_and_its_receipt_says_why(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    upstream.script = CachingGateway()
    front = await start(start_gateway, upstream)
    _, _, miss = await ask(front, "acme-1")
    _, _, hit = await ask(front, "acme-2")
    assert (miss["cost_usd"], miss["edits"]) == ("0.000015000", [])
    assert hit["cost_usd"] == "0.000000000"
    assert hit["edits"] == ["answered by the upstream's cache, which costs nothing"]
    assert (hit["tokens"], hit["outcome"]) == (miss["tokens"], "completed")
    assert "x 0.00 + " in hit["formula"]
    assert (await front.gateway.request_line(least=2))["cost_nanos"] == 0
    app = front.gateway.app
    assert app is not None
    state = app._store.ledger.state
    assert [b.spent for (name, _), b in state.balances.items() if name == "org:acme"] == [15_000]


async def test_a_stream_from_the_cache_costs_nothing_either(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start(start_gateway, upstream)
    head = CHUNKED[:-2] + b"cf-aig-cache-status: HIT\r\n\r\n"
    upstream.script = sends(head + in_chunks(events("Hel", "lo.")))
    front.key = await make_key(front.client, "acme-1")
    response = await front.chat(chat(True, model="first/echo"))
    assert b"lo." in await response.read()
    line = await front.gateway.request_line()
    assert (line["cost_nanos"], line["outcome"], line["tokens"]["output"]) == (0, "completed", 2)


async def test_only_cloudflare_is_believed_to_have_a_cache(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start(start_gateway, upstream, "openai")
    upstream.script = sends(
        b"HTTP/1.1 200 OK\r\ncf-aig-cache-status: HIT\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body := json.dumps(ANSWER).encode()), body)
    )
    _, _, receipt = await ask(front, "acme-1")
    assert receipt["cost_usd"] == "0.000015000"
    assert upstream.received[0].header("cf-aig-cache-key") is None


@pytest.mark.parametrize(
    "other",
    [("acme", "chat/b", b"{}"), ("acm", "echat/a", b"{}"), ("acme", "chat/a", b"{ }")],
)
def test_a_key_is_of_one_organization_one_place_and_one_body(other: tuple[str, str, bytes]) -> None:
    key = cache_key("acme", "chat/a", b"{}")
    assert key == cache_key("acme", "chat/a", b"{}")
    assert key != cache_key(*other)
    assert len(key) == 64
    assert key.isalnum()
