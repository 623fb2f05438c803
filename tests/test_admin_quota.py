"""Grants and resets, requests that are sent twice, and the audit of it all."""

import pytest

from gwproxy.core.errors import GatewayError
from gwproxy.core.money import Nanos
from gwproxy.core.request import FEATURES
from gwproxy.state.directory import Author
from gwproxy.storage.verify import verify
from tests.harness import ADMIN, chat
from tests.plane import Plane, make_key, reopened
from tests.scene import until

ANN = {"user_id": "ann", "email": "ann@example.org", "monthly_limit_usd": "5"}
ONCE = {"Idempotency-Key": "abc-1"}


# -- grants and resets ---------------------------------------------------------------------------


async def test_a_grant_raises_what_may_be_spent_this_month(plane: Plane):
    await plane.call("POST", "/admin/users", ANN)
    sent = {"amount_usd": "2.5", "reason": "a demo"}
    status, stands, _ = await plane.call("POST", "/admin/users/ann/grants", sent)
    assert status == 201
    assert (stands["limit_usd"], stands["remaining_usd"]) == ("7.500000000", "7.500000000")
    await plane.call("PATCH", "/admin/organizations/default", {"monthly_budget_usd": "1"})
    status, stands, _ = await plane.call("POST", "/admin/organizations/default/grants", sent)
    assert (status, stands["limit_usd"]) == (201, "3.500000000")
    await plane.store.catch_up(5)
    assert await verify(plane.store.database) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reason": "x"}, "amount_usd"),
        ({"amount_usd": "1"}, "reason"),
        ({"amount_usd": "0", "reason": "x"}, "amount_usd"),
        ({"amount_usd": None, "reason": "x"}, "amount_usd"),
        ({"amount_usd": "-1", "reason": "x"}, "amount_usd"),
        (b'{"reason":"x","amount_usd":1' + b"0" * 30 + b"}", "amount_usd"),
        ({"amount_usd": "1", "reason": ""}, "reason"),
        ({"amount_usd": "1", "reason": "x\n"}, "reason"),
        ({"amount_usd": "1", "reason": None}, "reason"),
        ({"amount_usd": "1", "reason": "x", "month": "2026-01"}, "month"),
    ],
)
async def test_what_is_wrong_in_a_grant_is_named(plane: Plane, body, param):
    await plane.call("POST", "/admin/users", ANN)
    status, answer, _ = await plane.call("POST", "/admin/users/ann/grants", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert plane.store.ledger.state.balances == {}


async def test_nobody_is_granted_anything_who_is_not_there(plane: Plane):
    sent = {"amount_usd": "1", "reason": "x"}
    for path in ("users/nobody/grants", "organizations/nobody/grants", "users/nobody/reset-quota"):
        body = None if path.endswith("quota") else sent
        assert (await plane.call("POST", f"/admin/{path}", body))[0] == 404


async def test_a_reset_takes_off_what_was_spent_and_keeps_the_entries(front):
    for _ in range(2):
        assert (await front.chat(chat())).status == 200
    answer = await front.client.get("/admin/users/alice/usage", headers=ADMIN)
    spent = await answer.json()
    assert (spent["month_usage_usd"], spent["request_count"]) == ("0.000030000", 2)
    reset = await front.client.post(
        "/admin/users/alice/reset-quota", json={"reason": "an apology"}, headers=ADMIN
    )
    stands = await reset.json()
    assert (reset.status, stands["month_usage_usd"]) == (200, "0.000000000")
    assert stands["request_count"] == 2
    await front.gateway.app._store.catch_up(5)
    # Only the user's own account: the organization has paid all the same.
    answer = await front.client.get("/admin/organizations/default/usage", headers=ADMIN)
    assert (await answer.json())["month_usage_usd"] == "0.000030000"
    answer = await front.client.get("/admin/audit?action=reset", headers=ADMIN)
    [line] = (await answer.json())["data"]
    assert (line["noun"], line["id"], line["actor"]) == ("user", "alice", "bootstrap")
    assert line["after"]["delta_usd"] == "-0.000030000"
    assert line["after"]["reason"] == "an apology"
    assert line["request_id"] == reset.headers["x-request-id"]
    assert await verify(front.gateway.app._store.database) == []


async def test_a_grant_that_cannot_be_recorded_has_not_happened(plane: Plane):
    await plane.call("POST", "/admin/users", ANN)
    sent = {"amount_usd": "1", "reason": "x"}
    with plane.disk.broken():
        assert (await plane.call("POST", "/admin/users/ann/grants", sent, **ONCE))[0] == 503
    await until(lambda: plane.store.journal.room() > 0)
    for _ in range(2):
        status, stands, _ = await plane.call("POST", "/admin/users/ann/grants", sent, **ONCE)
        assert (status, stands["limit_usd"]) == (201, "6.000000000")


async def test_a_grant_of_which_nobody_knows_is_made_once_all_the_same(plane: Plane):
    await plane.call("POST", "/admin/users", ANN)
    author = Author("x", once="name.print")
    with plane.disk.broken(uncertain=True), pytest.raises(GatewayError):
        await plane.store.adjustments.grant("user:ann", Nanos(10**9), "x", author)
    await plane.store.adjustments.grant("user:ann", Nanos(10**9), "x", author)
    _, stands, _ = await plane.call("GET", "/admin/users/ann/usage")
    assert stands["limit_usd"] == "6.000000000"


async def test_an_account_says_when_it_was_changed_itself_and_nobody_else(plane: Plane):
    for user_id in ("ann", "bob", "cat"):
        await plane.call("POST", "/admin/users", {"user_id": user_id})
    for user_id in ("ann", "bob"):
        plane.seconds[0] += 60
        sent = {"amount_usd": "1", "reason": "x"}
        await plane.call("POST", f"/admin/users/{user_id}/grants", sent)
    shown = {}
    for user_id in ("ann", "bob", "cat"):
        _, stands, _ = await plane.call("GET", f"/admin/users/{user_id}/usage")
        shown[user_id] = stands["last_update"]
    assert shown["ann"].startswith("2027-01-15T08:01:00")
    assert shown["bob"].startswith("2027-01-15T08:02:00")
    assert shown["cat"] is None


# -- the same request twice ----------------------------------------------------------------------


async def test_what_is_sent_twice_is_made_once(plane: Plane):
    for number in range(2):
        for path, sent in (
            ("/admin/users", {"email": "ann@example.org"}),
            ("/admin/organizations", {"name": "Acme"}),
        ):
            status, made, headers = await plane.call("POST", path, sent, **ONCE)
            assert status == 201
            assert ("Idempotency-Replayed" in headers) is bool(number)
            shown = await plane.call("GET", path)
            assert made in shown[1]["data"]
    assert len((await plane.call("GET", "/admin/users"))[1]["data"]) == 1
    assert len((await plane.call("GET", "/admin/organizations"))[1]["data"]) == 2


async def test_grants_and_keys_are_made_once_too(plane: Plane):
    await plane.call("POST", "/admin/users", ANN)
    texts = []
    for _ in range(2):
        _, key, _ = await plane.call("POST", "/admin/users/ann/api-keys", {}, **ONCE)
        texts.append(key["api_key"])
        path = f"/admin/users/ann/api-keys/{key['key_id']}/rotate"
        _, rotated, _ = await plane.call("POST", path, {}, **ONCE)
        texts.append(rotated["api_key"])
        sent = {"amount_usd": "1", "reason": "x"}
        _, stands, _ = await plane.call("POST", "/admin/users/ann/grants", sent, **ONCE)
        assert stands["limit_usd"] == "6.000000000"
    assert len((await plane.call("GET", "/admin/users/ann/api-keys"))[1]["data"]) == 1
    # A secret is told once: who has lost it makes another.
    assert texts[2:] == [None, None]
    assert plane.authenticate(texts[0]) and plane.authenticate(texts[1])


async def test_a_key_that_had_another_body_is_refused(plane: Plane):
    await plane.call("POST", "/admin/users", ANN, **ONCE)
    status, answer, _ = await plane.call("POST", "/admin/users", {"user_id": "bob"}, **ONCE)
    assert (status, answer["error"]["code"]) == (409, "idempotency_key_reused")
    # Elsewhere it is another key, and another administrator's is too.
    assert (await plane.call("POST", "/admin/organizations", {}, **ONCE))[0] == 201
    for wrong in ("", "x" * 201, "a\u00e9"):
        status, answer, _ = await plane.call(
            "POST", "/admin/users", {}, **{"Idempotency-Key": wrong}
        )
        assert (status, answer["error"]["param"]) == (400, "Idempotency-Key")


async def test_what_is_deleted_since_is_not_said_to_be_created(plane: Plane):
    made = []
    for path in ("/admin/users", "/admin/organizations", "/admin/users/ann/api-keys"):
        if made:
            await plane.call("POST", "/admin/users", ANN)
        _, row, _ = await plane.call("POST", path, {}, **ONCE)
        name = row.get("key_id") or row.get("user_id") or row["org_id"]
        made.append((path, f"{path}/{name}"))
    for path, one in made:
        assert (await plane.call("DELETE", one))[0] == 204
        status, answer, headers = await plane.call("POST", path, {}, **ONCE)
        assert (status, answer["error"]["param"]) == (409, "Idempotency-Key")
        assert "deleted" in answer["error"]["message"] and "Idempotency-Replayed" not in headers


async def test_a_second_answer_has_the_row_as_it_is_by_then(plane: Plane):
    await plane.call("POST", "/admin/users", ANN, **ONCE)
    await plane.call("PATCH", "/admin/users/ann", {"rpm": 5})
    status, row, headers = await plane.call("POST", "/admin/users", ANN, **ONCE)
    assert (status, row["rpm"], headers["Idempotency-Replayed"]) == (201, 5, "true")


async def test_what_was_refused_may_be_sent_again_under_its_key(plane: Plane):
    assert (await plane.call("POST", "/admin/users", {"org_id": "acme"}, **ONCE))[0] == 400
    await plane.call("POST", "/admin/organizations", {"org_id": "acme"})
    status, _, headers = await plane.call("POST", "/admin/users", {"org_id": "acme"}, **ONCE)
    assert (status, "Idempotency-Replayed" in headers) == (201, False)


@pytest.mark.parametrize("applied", [False, True])
async def test_a_restart_does_not_forget_what_was_made(plane: Plane, applied):
    await plane.call("POST", "/admin/users", ANN, **ONCE)
    sent = {"amount_usd": "1", "reason": "x"}
    await plane.call("POST", "/admin/users/ann/grants", sent, **ONCE)
    if applied:
        await plane.store.catch_up(5)
    before = plane.store.directory.repeats
    after = (await reopened(plane, repeats=True))._made
    assert {name: (made.lsn, made.id) for name, made in after.items()} == {
        name: (made.lsn, made.id) for name, made in before._made.items()
    }
    assert len(after) == 2


# -- the audit -----------------------------------------------------------------------------------


async def test_the_audit_is_filtered_paged_and_written_as_the_api_writes(plane: Plane):
    await plane.call("POST", "/admin/users", ANN)
    made = await make_key(plane, {"monthly_limit_usd": "1"}, "bob")
    await plane.call("PATCH", "/admin/users/ann", {"monthly_limit_usd": "7", "status": "suspended"})
    path = f"/admin/users/bob/api-keys/{made['key_id']}"
    await plane.call("POST", f"{path}/rotate")
    await plane.call("DELETE", path)

    async def lines(query: str = "") -> list[dict]:
        status, page, _ = await plane.call("GET", f"/admin/audit?{query}")
        assert status == 200, page
        return page["data"]

    everything = await lines()
    assert [line["action"] for line in everything] == [
        *("revoke", "rotate", "update", "create", "create", "create")
    ]
    [change] = await lines("noun=user&id=ann&action=update")
    assert change["before"]["monthly_limit_usd"] == "5.000000000"
    assert change["after"]["monthly_limit_usd"] == "7.000000000"
    assert (change["before"]["status"], change["after"]["status"]) == ("active", "suspended")
    assert change["before"]["created_at"] == change["at"] == "2027-01-15T08:00:00Z"
    assert (change["address"], change["request_id"]) == ("127.0.0.1", "req_test")
    assert [line["action"] for line in await lines("noun=api_key")] == [
        "revoke",
        "rotate",
        "create",
    ]
    assert await lines("actor=nobody") == []
    assert len(await lines("actor=bootstrap")) == 6
    assert await lines("to=2027-01-14") == []
    assert len(await lines("from=2027-01-15&to=2027-01-15")) == 6
    assert await lines("from=2027-01-15T08:00:01Z") == []
    paged, cursor = [], ""
    while cursor is not None:
        _, page, _ = await plane.call("GET", f"/admin/audit?limit=2&cursor={cursor}")
        paged += page["data"]
        cursor = page["next_cursor"]
    assert paged == everything
    assert "digest" not in str(everything) and made["api_key"] not in str(everything)
    for query in ("from=yesterday", "id=a%20b", "limit=0", "cursor=x", "who=me"):
        assert (await plane.call("GET", f"/admin/audit?{query}"))[0] == 400


@pytest.mark.parametrize(
    ("path", "param", "known"),
    [
        ("audit?noun=usr", "noun", "admin_key, api_key, import, organization, provider, user"),
        ("audit?action=zap", "action", "create, delete, disable, enable, grant"),
        ("export?format=xls", "format", "ndjson, csv"),
        ("export?kind=people", "kind", "all, organization, usage, user"),
        ("usage?group_by=week", "group_by", "day, model, org, provider, user"),
        ("requests?outcome=lost", "outcome", "client_left, completed, cut"),
    ],
)
async def test_a_word_that_is_none_of_a_few_is_refused_with_those(front, path, param, known):
    answer = await front.client.get(f"/admin/{path}", headers=ADMIN)
    error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, param)
    assert f"must be one of {known}" in error["message"]


async def test_a_feature_that_there_is_not_is_refused_with_those_that_there_are(plane: Plane):
    body = {"allowed_features": ["audio", "foo"]}
    status, answer, _ = await plane.call("POST", "/admin/organizations", body)
    assert (status, answer["error"]["param"]) == (400, "allowed_features")
    assert "audio, background, cache_12h" in answer["error"]["message"]
    body = {"allowed_features": [*FEATURES, "audio"]}
    status, made, _ = await plane.call("POST", "/admin/organizations", body)
    assert (status, made["allowed_features"]) == (201, [*FEATURES])
