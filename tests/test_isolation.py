"""Who may reach what: every route there is, with every wrong kind of key and with another tenant's
ids; and a change that holds for the very next request, while streams run."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gwproxy.web import Route
from tests.conftest import Front
from tests.harness import (
    ADMIN,
    ADMIN_KEY,
    MODEL,
    Received,
    Upstream,
    Wire,
    bearer,
    chat,
    delta,
    make_key,
)
from tests.harness import events as events_of
from tests.raw import Peer
from tests.scene import asked, assert_nothing_left

OPEN = {"/health", "/health/live", "/health/ready"}
"""What anybody may ask: they say nothing about anybody."""


def served(front: Front) -> list[Route]:
    app = front.gateway.app
    assert app is not None
    return [route for each in app._fronts for route in each.router.routes]


def filled(path: str, names: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)(:path)?\}", lambda match: names[match[1]], path)


async def status(front: Front, method: str, path: str, headers: dict[str, str]) -> int:
    body = {"json": {}} if method in ("POST", "PATCH", "PUT") else {}
    async with front.client.request(method, path, headers=headers, **body) as answer:
        return int(answer.status)


async def make_admin_key(front: Front, scope: str) -> dict[str, str]:
    made = await front.client.post("/admin/admin-keys", json={"scope": scope}, headers=ADMIN)
    return bearer((await made.json())["admin_key"])


async def test_no_route_opens_to_the_wrong_kind_of_key(front: Front) -> None:
    await make_key(front.client, "bob")
    reader, writer = [await make_admin_key(front, scope) for scope in ("read", "write")]
    names = {
        **{"user_id": "bob", "org_id": "default", "key_id": "key_00000000"},
        **{"provider": "upstream", "model_id": MODEL, "request_id": "req_1"},
    }
    seen = {"open": 0, "user": 0, "admin": 0}
    for route in served(front):
        path = filled(route.path, names)
        if path in OPEN:
            seen["open"] += 1
            assert await status(front, route.method, path, {}) == 200
        elif path.startswith("/v1/") or path == "/chat":
            seen["user"] += 1
            for wrong in ({}, ADMIN, reader, writer):
                assert await status(front, route.method, path, wrong) == 401, (path, wrong)
        else:
            assert path == "/metrics" or path.startswith("/admin/"), path
            seen["admin"] += 1
            for wrong in ({}, bearer(front.key)):
                # Straight to the route's own guard: ten of these would be taken for guesses.
                _forgive(front)
                assert await status(front, route.method, path, wrong) == 401, (path, wrong)
            if route.method != "GET":
                assert await status(front, route.method, path, reader) == 403, path
    assert seen["open"] == len(OPEN) and seen["user"] >= 5 and seen["admin"] > 30
    # Nothing of all this has had an effect.
    assert await status(front, "GET", "/admin/users/bob", ADMIN) == 200
    assert (await front.chat(chat())).status == 200


def _forgive(front: Front) -> None:
    for route in served(front):
        if route.guard is not None:
            auth = route.guard.__closure__[0].cell_contents  # type: ignore[index]
            auth._failures.clear()


async def test_another_tenants_ids_open_nothing(front: Front) -> None:
    """Of every route that names a user, a key or a request."""
    await front.client.post("/admin/organizations", json={"org_id": "other"}, headers=ADMIN)
    await front.client.post(
        "/admin/users", json={"user_id": "bob", "org_id": "other"}, headers=ADMIN
    )
    bobs = await make_key(front.client, "bob")
    answer = await front.chat(chat())
    assert answer.status == 200
    receipt = f"/v1/receipts/{answer.headers['x-request-id']}"
    assert await status(front, "GET", receipt, bearer(front.key)) == 200
    assert await status(front, "GET", receipt, bearer(bobs)) == 404
    async with front.client.get("/v1/usage", headers=bearer(bobs)) as shown:
        text = await shown.text()
    assert "alice" not in text and "default" not in text and '"requests":[]' in text

    alices = f"key_{front.key[8:16]}"
    tried = 0
    for route in served(front):
        if "{user_id}" in route.path and "{key_id}" in route.path:
            tried += 1
            path = filled(route.path, {"user_id": "bob", "key_id": alices})
            assert await status(front, route.method, path, ADMIN) == 404, route
    assert tried >= 4
    assert (await front.chat(chat())).status == 200


async def test_a_clients_own_words_choose_no_account(front: Front, upstream: Upstream) -> None:
    await make_key(front.client, "bob")
    for headers in (
        {"cf-aig-metadata": '{"user_id":"bob"}'},
        {"x-user-id": "bob"},
        {"openai-organization": "other"},
    ):
        assert (await front.chat(chat(user="bob"), **headers)).status == 200
    async with front.client.get("/admin/users/bob/usage", headers=ADMIN) as shown:
        assert (await shown.json())["request_count"] == 0


# -- in force for the very next request ----------------------------------------------------------


@asynccontextmanager
async def streaming(
    front: Front, upstream: Upstream, count: int = 3
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """So many streams that have begun and go on; the function lets them end and looks at them."""
    go_on = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(delta("Hel"))
        await go_on.wait()
        for data in events_of("lo."):
            await wire.chunk(data)
        await wire.end()

    upstream.queue = [script] * count
    async with AsyncExitStack() as stack:
        peers: list[Peer] = []
        for _ in range(count):
            peer = await stack.enter_async_context(asked(front))
            code, _, _ = await peer.head()
            assert code == 200
            peers.append(peer)

        async def finish() -> None:
            go_on.set()
            for peer in peers:
                text = b"".join([part async for part in peer.chunks()])
                assert b"lo." in text and text.endswith(b"data: [DONE]\n\n"), text

        yield finish


CHANGES: dict[str, tuple[str, str, Any, int, str]] = {
    "a key is revoked": ("DELETE", "/admin/users/alice/api-keys/{key}", None, 401, "invalid"),
    "its user is suspended": (
        *("PATCH", "/admin/users/alice", {"status": "suspended"}, 403, "account_suspended"),
    ),
    "its user is deleted": ("DELETE", "/admin/users/alice", None, 401, "invalid_api_key"),
    "its organization is suspended": (
        *("PATCH", "/admin/organizations/default", {"status": "suspended"}, 403, "suspended"),
    ),
    "its organization is out of money": (
        *("PATCH", "/admin/organizations/default", {"monthly_budget_usd": 0}, 429),
        "insufficient_quota",
    ),
    "its user's limit is lowered": (
        *("PATCH", "/admin/users/alice", {"monthly_limit_usd": "0.000001"}, 429),
        "insufficient_quota",
    ),
    "its own limit is lowered": (
        *("PATCH", "/admin/users/alice/api-keys/{key}", {"monthly_limit_usd": "0"}, 429),
        "insufficient_quota",
    ),
    "it may call fewer times a minute": (
        *("PATCH", "/admin/users/alice/api-keys/{key}", {"rpm": 1}, 429, "rate_limit"),
    ),
    "it may call fewer models": (
        *("PATCH", "/admin/users/alice/api-keys/{key}", {"allowed_models": ["x/y"]}, 404),
        "model_not_found",
    ),
    "its secret is replaced at once": (
        *("POST", "/admin/users/alice/api-keys/{key}/rotate", {"grace_s": 0}, 401),
        "invalid_api_key",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_a_change_holds_for_the_very_next_request_while_streams_run(
    front: Front, upstream: Upstream, what: str
) -> None:
    method, path, body, refused, code = CHANGES[what]
    key = f"key_{front.key[8:16]}"
    path = path.format(key=key)
    # Requests are counted by the minute from when there is a limit.
    own = f"/admin/users/alice/api-keys/{key}"
    assert (await front.client.patch(own, json={"rpm": 1000}, headers=ADMIN)).status == 200
    async with streaming(front, upstream) as finish:
        changed = await front.client.request(method, path, json=body, headers=ADMIN)
        assert changed.status in (200, 201, 204), await changed.text()
        answer = await front.chat(chat())
        assert (answer.status, code in await answer.text()) == (refused, True), what
        await finish()
    await assert_nothing_left(front, upstream)


async def test_what_is_given_back_holds_at_once_too(front: Front, upstream: Upstream) -> None:
    user = "/admin/users/alice"
    async with streaming(front, upstream) as finish:
        for change, expected in (
            ({"monthly_limit_usd": 0}, 429),
            ({"monthly_limit_usd": 1}, 200),
            ({"status": "suspended"}, 403),
            ({"status": "active"}, 200),
        ):
            assert (await front.client.patch(user, json=change, headers=ADMIN)).status == 200
            assert (await front.chat(chat())).status == expected, change
        await front.client.patch(user, json={"monthly_limit_usd": 0}, headers=ADMIN)
        assert (await front.chat(chat())).status == 429
        grant = {"amount_usd": "1", "reason": "more"}
        await front.client.post(f"{user}/grants", json=grant, headers=ADMIN)
        assert (await front.chat(chat())).status == 200
        await finish()


# -- the disk ------------------------------------------------------------------------------------


async def test_no_key_that_was_ever_made_is_on_the_disk(front: Front) -> None:
    keys = [front.key]
    path = f"/admin/users/alice/api-keys/key_{front.key[8:16]}"
    for _ in range(3):
        made = await front.client.post(f"{path}/rotate", headers={**ADMIN, "Idempotency-Key": "1"})
        keys.append((await made.json())["api_key"])
        made = await front.client.post(f"{path}/rotate", headers=ADMIN)
        keys.append((await made.json())["api_key"])
        made = await front.client.post("/admin/admin-keys", json={"scope": "write"}, headers=ADMIN)
        keys.append((await made.json())["admin_key"])
    texts = [key for key in keys if key is not None]
    assert len(texts) == 8  # a secret is told once, and that request was sent three times
    for key in texts:
        await status(front, "GET", "/admin/users", bearer(key))
        await front.chat(chat(), Authorization=f"Bearer {key}")
    folder = front.gateway.database.parent
    app = front.gateway.app
    assert app is not None
    await app._store.catch_up(5)
    await app._store.store_key_use()
    secrets = [text[-38:] for text in [*texts, ADMIN_KEY]]
    for closed in (False, True):
        if closed:
            await front.gateway.close()
        files = [file for file in folder.rglob("*") if file.is_file()]
        stored = b"".join(file.read_bytes() for file in files)
        stored += front.gateway.written.getvalue().encode()
        assert b"alice" in stored and texts[0][:16].encode() in stored
        for secret in secrets:
            for needle in (secret, secret[:20], secret[::-1], json.dumps(secret)[1:-1]):
                assert needle.encode() not in stored
