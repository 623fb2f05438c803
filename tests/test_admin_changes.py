"""Changes over the admin plane: what a PATCH and a DELETE do, and that nobody overwrites what
somebody else has changed meanwhile."""

import pytest
from multidict import CIMultiDict

from gwproxy.admin.ask import Ask, versions
from gwproxy.admin.routes import ask_directly, routes
from gwproxy.core.errors import AccountSuspended, GatewayError, InvalidApiKey, NotFound
from gwproxy.state.directory import Author
from tests.plane import ADMIN_KEY, Plane, make_key, reopened
from tests.scene import until

ANN = {"user_id": "ann", "email": "ann@example.org", "monthly_limit_usd": "5", "rpm": 60}


async def audit(plane: Plane) -> list[dict]:
    await until(lambda: plane.store.writer.applied == plane.store.ledger.state.lsn)
    return [dict(row) for row in await plane.store.database.read("SELECT * FROM audit")]


# -- a change ------------------------------------------------------------------------------------


async def test_a_patch_changes_what_is_sent_and_nothing_else(plane):
    _, before, _ = await plane.call("POST", "/admin/users", ANN)
    status, after, headers = await plane.call(
        "PATCH", "/admin/users/ann", {"monthly_limit_usd": 2.5, "tpm": 7, "rpm": None}
    )
    assert (status, headers["ETag"]) == (200, '"2"')
    assert after == {**before, "monthly_limit_usd": "2.500000000", "tpm": 7, "rpm": None}
    assert (await plane.call("GET", "/admin/users/ann"))[1] == after
    assert (await reopened(plane)).user("ann") == plane.keyring.user("ann")


async def test_a_patch_of_nothing_changes_nothing_and_is_no_change(plane):
    _, before, _ = await plane.call("POST", "/admin/users", ANN)
    for body in (None, {}, {"rpm": 60}, {"monthly_limit_usd": "5.0"}):
        status, after, headers = await plane.call("PATCH", "/admin/users/ann", body)
        assert (status, after, headers["ETag"]) == (200, before, '"1"')
    assert [row["action"] for row in await audit(plane)] == ["create"]


async def test_every_field_of_an_organization_and_a_key_can_be_changed(plane):
    await plane.call("POST", "/admin/organizations", {"org_id": "acme", "name": "Acme"})
    change = {
        "name": "Acme GmbH",
        "status": "suspended",
        "monthly_budget_usd": "9.000000000",
        "failure_mode": "open",
        "fallback_daily_limit_usd": "1.000000000",
        "allowed_features": ["background"],
        "prices": {"m": {"input": "1.00", "output": "2.00"}},
        "unbounded_policy": "bounded",
        "on_exhausted": "finish",
        "on_client_gone": "drain",
        "cache": True,
    }
    status, changed, _ = await plane.call("PATCH", "/admin/organizations/acme", change)
    assert (status, change.items() <= changed.items()) == (200, True)
    back = dict.fromkeys(("name", "monthly_budget_usd", "failure_mode", "prices"))
    _, changed, _ = await plane.call("PATCH", "/admin/organizations/acme", back)
    assert back.items() <= changed.items()

    key = await make_key(plane, {"name": "one"})
    path = f"/admin/users/ann/api-keys/{key['key_id']}"
    change = {
        "name": "two",
        "expires_at": "2027-02-01T00:00:00Z",
        "allowed_models": ["a"],
        "monthly_limit_usd": "1.000000000",
        "rpm": 1,
        "tpm": 2,
        "max_parallel": 3,
    }
    status, changed, _ = await plane.call("PATCH", path, change)
    assert (status, change.items() <= changed.items()) == (200, True)
    assert "api_key" not in changed
    assert (await plane.call("GET", path))[1] == changed
    status, answer, _ = await plane.call("PATCH", path, {"expires_at": "2020-01-01T00:00:00Z"})
    assert (status, answer["error"]["param"]) == (400, "expires_at")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("users/ann", {"user_id": "bob"}, "user_id"),
        ("users/ann", {"created_at": "2020-01-01T00:00:00Z"}, "created_at"),
        ("users/ann", {"monthly_limit_usd": "-1"}, "monthly_limit_usd"),
        ("users/ann", b'{"monthly_limit_usd":1' + b"0" * 30 + b"}", "monthly_limit_usd"),
        ("users/ann", {"org_id": "nobody"}, "org_id"),
        ("users/ann", {"status": None}, "status"),
        ("organizations/default", {"org_id": "other"}, "org_id"),
        ("organizations/default", {"cache": None}, "cache"),
        ("organizations/default", {"allowed_features": None}, "allowed_features"),
        ("organizations/default", {"name": "a\u0007"}, "name"),
    ],
)
async def test_whatever_is_wrong_in_a_change_names_the_field(plane, path, body, param):
    await plane.call("POST", "/admin/users", ANN)
    status, answer, _ = await plane.call("PATCH", f"/admin/{path}", body)
    assert (status, answer["error"]["param"]) == (400, param)


async def test_an_emoji_is_a_character_like_others(plane):
    status, made, _ = await plane.call("POST", "/admin/organizations", {"name": "Acme 🚀"})
    assert (status, made["name"]) == (201, "Acme 🚀")


async def test_an_address_stays_with_one_account(plane):
    await plane.call("POST", "/admin/users", ANN)
    await plane.call("POST", "/admin/users", {"user_id": "bob"})
    status, answer, _ = await plane.call("PATCH", "/admin/users/bob", {"email": "ANN@example.org"})
    assert (status, answer["error"]["param"]) == (409, "email")
    assert (await plane.call("PATCH", "/admin/users/ann", {"email": "Ann@example.org"}))[0] == 200
    await plane.call("DELETE", "/admin/users/ann")
    assert (await plane.call("PATCH", "/admin/users/bob", {"email": "ann@example.org"}))[0] == 200


async def test_a_user_takes_his_keys_into_another_organization(plane):
    await plane.call("POST", "/admin/organizations", {"org_id": "acme"})
    key = (await make_key(plane))["api_key"]
    await plane.call("PATCH", "/admin/users/ann", {"org_id": "acme"})
    assert plane.authenticate(key).org_id == "acme"
    for org_id, members in (("acme", ["ann"]), ("default", [])):
        _, page, _ = await plane.call("GET", f"/admin/organizations/{org_id}/users")
        assert [user["user_id"] for user in page["data"]] == members


# -- nobody's change is lost ---------------------------------------------------------------------


async def test_a_change_for_another_version_than_there_is_is_refused(plane):
    _, _, headers = await plane.call("POST", "/admin/users", ANN)
    assert headers["ETag"] == '"1"'
    change = {"rpm": 1}
    status, _, headers = await plane.call(
        "PATCH", "/admin/users/ann", change, **{"If-Match": headers["ETag"]}
    )
    assert (status, headers["ETag"]) == (200, '"2"')
    for method in ("PATCH", "DELETE"):
        status, answer, _ = await plane.call(
            method, "/admin/users/ann", {"rpm": 2} if method == "PATCH" else None,
            **{"If-Match": '"1"'},
        )  # fmt: skip
        assert (status, answer["error"]["code"]) == (412, "precondition_failed")
    assert (await plane.call("GET", "/admin/users/ann"))[1]["rpm"] == 1
    for match in ("*", '"2"', '"1", "2"'):
        assert (await plane.call("PATCH", "/admin/users/ann", {}, **{"If-Match": match}))[0] == 200
    for match in ('W/"2"', '"x"', '"\u0662"', '""', '"2\u00b2"'):
        status, _, _ = await plane.call("DELETE", "/admin/users/ann", **{"If-Match": match})
        assert status == 412, match


@pytest.mark.parametrize("text", ["2", '"2', "", ",", '"1",', '"1" "2"' * 200])
def test_what_is_no_etag_is_an_error(text):
    with pytest.raises(GatewayError, match="If-Match"):
        versions(text)


async def test_organizations_and_keys_have_versions_too(plane):
    key = await make_key(plane)
    for path in (f"/admin/users/ann/api-keys/{key['key_id']}", "/admin/organizations/default"):
        _, _, headers = await plane.call("GET", path)
        assert headers["ETag"] == '"1"'
        stale = {"If-Match": '"7"'}
        assert (await plane.call("PATCH", path, {"name": "x"}, **stale))[0] == 412
        assert (await plane.call("DELETE", path, **stale))[0] == 412
        assert (await plane.call("PATCH", path, {"name": "x"}, **{"If-Match": '"1"'}))[0] == 200


# -- an end --------------------------------------------------------------------------------------


async def test_a_deleted_user_is_gone_and_still_there_for_those_who_ask(plane):
    key = (await make_key(plane))["api_key"]
    _, before, _ = await plane.call("GET", "/admin/users/ann")
    status, answer, _ = await plane.call("DELETE", "/admin/users/ann")
    assert (status, answer) == (204, None)
    with pytest.raises(InvalidApiKey):
        plane.authenticate(key)
    for method in ("GET", "PATCH", "DELETE"):
        assert (await plane.call(method, "/admin/users/ann"))[0] == 404
    assert (await plane.call("POST", "/admin/users/ann/api-keys", {}))[0] == 404
    assert (await plane.call("GET", "/admin/users"))[1]["data"] == []
    gone = {**before, "deleted_at": "2027-01-15T08:00:00Z"}
    assert (await plane.call("GET", "/admin/users/ann?deleted=1"))[:2] == (200, gone)
    assert (await plane.call("GET", "/admin/users?deleted=1"))[1]["data"] == [gone]
    _, keys, _ = await plane.call("GET", "/admin/users/ann/api-keys?deleted=1")
    assert len(keys["data"]) == 1
    # Its ledger goes on pointing at the id, which nobody else may have.
    assert (await plane.call("POST", "/admin/users", {"user_id": "ann"}))[0] == 409
    with pytest.raises(InvalidApiKey):
        (await reopened(plane)).authenticate(CIMultiDict({"x-api-key": key}), 0)


async def test_a_deleted_organization_ends_the_calls_of_its_users(plane):
    await plane.call("POST", "/admin/organizations", {"org_id": "acme"})
    key = (await make_key(plane))["api_key"]
    await plane.call("PATCH", "/admin/users/ann", {"org_id": "acme"})
    assert (await plane.call("DELETE", "/admin/organizations/acme"))[0] == 204
    with pytest.raises(InvalidApiKey):
        plane.authenticate(key)
    assert (await plane.call("GET", "/admin/organizations/acme"))[0] == 404
    assert (await plane.call("GET", "/admin/organizations/acme/users"))[0] == 404
    assert (await plane.call("GET", "/admin/organizations/acme?deleted=1"))[0] == 200
    assert (await plane.call("GET", "/admin/organizations/acme/users?deleted=1"))[0] == 200
    status, answer, _ = await plane.call("POST", "/admin/users", {"org_id": "acme"})
    assert (status, answer["error"]["param"]) == (400, "org_id")
    await plane.call("PATCH", "/admin/users/ann", {"org_id": "default"})
    assert plane.authenticate(key)


async def test_no_key_is_made_that_would_open_nothing_and_none_is_listed(plane):
    await plane.call("POST", "/admin/organizations", {"org_id": "acme"})
    await plane.call("POST", "/admin/users", {"user_id": "ann", "org_id": "acme"})
    keys = "/admin/users/ann/api-keys"
    key_id = (await plane.call("POST", keys, {}))[1]["key_id"]
    await plane.call("DELETE", "/admin/organizations/acme")
    for path in (keys, f"{keys}/{key_id}/rotate"):
        status, answer, _ = await plane.call("POST", path, {})
        assert status == 409 and "another organization first" in answer["error"]["message"]
    assert (await plane.call("GET", keys))[1]["data"] == []
    [shown] = (await plane.call("GET", f"{keys}?deleted=1"))[1]["data"]
    assert shown["key_id"] == key_id and shown["revoked_at"] is not None
    await plane.call("PATCH", "/admin/users/ann", {"org_id": "default"})
    assert (await plane.call("POST", keys, {}))[0] == 201
    assert len((await plane.call("GET", keys))[1]["data"]) == 2


async def test_the_organization_of_those_without_one_stays(plane):
    status, answer, _ = await plane.call("DELETE", "/admin/organizations/default")
    assert (status, answer["error"]["code"]) == (409, "conflict")


async def test_a_suspension_by_patch_holds_at_once(plane):
    key = (await make_key(plane))["api_key"]
    for path in ("/admin/users/ann", "/admin/organizations/default"):
        await plane.call("PATCH", path, {"status": "suspended"})
        with pytest.raises(AccountSuspended):
            plane.authenticate(key)
        await plane.call("PATCH", path, {"status": "active"})
        assert plane.authenticate(key)


# -- filters -------------------------------------------------------------------------------------


async def test_lists_are_filtered(plane):
    await plane.call("POST", "/admin/organizations", {"org_id": "acme", "status": "suspended"})
    for number in range(4):
        await plane.call(
            "POST",
            "/admin/users",
            {
                "user_id": f"user-{number}",
                "email": f"{number}@example.org",
                "org_id": "acme" if number % 2 else "default",
                "status": "suspended" if number > 1 else "active",
            },
        )

    async def users(query: str) -> list[str]:
        status, page, _ = await plane.call("GET", f"/admin/{query}")
        assert status == 200
        return [row["user_id"][-1] for row in page["data"]]

    assert await users("users?org_id=acme") == ["1", "3"]
    assert await users("users?org_id=acme&limit=1&cursor=user-1") == ["3"]
    assert await users("users?org_id=nobody") == []
    assert await users("users?status=suspended") == ["2", "3"]
    assert await users("users?email=2@EXAMPLE.org") == ["2"]
    assert await users("users?email=2@example.org&status=active") == []
    assert await users("users?email=2@example.org&org_id=acme") == []
    assert await users("users?email=nobody") == []
    assert await users("organizations/acme/users?status=active") == ["1"]
    _, page, _ = await plane.call("GET", "/admin/organizations?status=suspended")
    assert [row["org_id"] for row in page["data"]] == ["acme"]
    status, answer, _ = await plane.call("GET", "/admin/users?status=deleted")
    assert (status, answer["error"]["param"]) == (400, "status")


# -- while nothing can be recorded ---------------------------------------------------------------


async def test_of_a_change_that_cannot_be_recorded_only_what_it_takes_away_holds(plane):
    await plane.call("POST", "/admin/users", ANN)
    with plane.disk.broken():
        change = {"monthly_limit_usd": "1", "rpm": 100, "email": "new@example.org"}
        status, answer, _ = await plane.call("PATCH", "/admin/users/ann", change)
        assert (status, answer["error"]["code"]) == (503, "storage_unavailable")
        assert "In force at once" in answer["error"]["message"]
        _, now, _ = await plane.call("GET", "/admin/users/ann")
        assert (now["monthly_limit_usd"], now["rpm"]) == ("1.000000000", 60)
        assert now["email"] == "ann@example.org"
        status, answer, _ = await plane.call("PATCH", "/admin/users/ann", {"rpm": 100})
        assert "In force at once" not in answer["error"]["message"]
        assert status == 503
    await until(lambda: plane.store.journal.room() > 0)
    assert (await plane.call("POST", "/admin/users", {"user_id": "bob"}))[0] == 201
    assert (await reopened(plane)).user("ann") == plane.keyring.user("ann")


# -- who did it ----------------------------------------------------------------------------------


async def test_each_change_is_one_row_with_who_what_before_and_after(plane):
    await plane.call("POST", "/admin/users", ANN)
    await plane.call("PATCH", "/admin/users/ann", {"rpm": 1})
    await plane.call("DELETE", "/admin/users/ann")
    rows = await audit(plane)
    assert [(row["action"], row["noun"], row["id"]) for row in rows] == [
        ("create", "user", "ann"),
        ("update", "user", "ann"),
        ("delete", "user", "ann"),
    ]
    assert {(row["actor"], row["address"], row["request_id"]) for row in rows} == {
        ("bootstrap", "127.0.0.1", "req_test")
    }
    assert rows[0]["before"] is None
    assert rows[1]["before"] == rows[0]["after"]
    assert ADMIN_KEY not in str(rows)


async def test_the_same_table_answers_without_http(plane):
    table = routes(plane.store)
    ask = Ask(Author("cli:me"))
    made = await ask_directly(table, "POST", "/admin/users", body=b'{"user_id":"ann"}', ask=ask)
    assert (made.value.user_id, made.version) == ("ann", 1)
    shown = await ask_directly(table, "GET", "/admin/users/ann", ask=ask)
    assert shown == made
    with pytest.raises(NotFound):
        await ask_directly(table, "GET", "/admin/nothing", ask=ask)
    assert [row["actor"] for row in await audit(plane)] == ["cli:me"]
