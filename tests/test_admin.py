"""The admin plane over real sockets, on a real database: who may, what is checked, what is kept."""

import asyncio
import random
from itertools import pairwise

import pytest
from multidict import CIMultiDict

from gwproxy.admin import auth as auth_module
from gwproxy.admin import body as checked
from gwproxy.admin.auth import AdminAuth
from gwproxy.admin.routes import routes
from gwproxy.core.errors import (
    AccountSuspended,
    GatewayError,
    InvalidApiKey,
    StorageUnavailable,
)
from gwproxy.core.identity import KeyKind, Status, mint, well_formed
from tests.harness import admin_auth
from tests.plane import ADMIN, ADMIN_KEY, START, make_key, reopened
from tests.scene import until

# -- users ---------------------------------------------------------------------------------------


async def test_a_user_is_created_shown_and_kept(plane):
    sent = {
        "user_id": "ann",
        "email": "ann@example.org",
        "monthly_limit_usd": "12.34",
        "rpm": 60,
        "tpm": 100_000,
        "max_parallel": 4,
    }
    status, created, headers = await plane.call("POST", "/admin/users", sent)
    assert status == 201
    assert created == {
        **sent,
        "org_id": "default",
        "status": "active",
        "monthly_limit_usd": "12.340000000",
        "created_at": "2027-01-15T08:00:00Z",
        "deleted_at": None,
    }
    assert headers["Content-Type"].startswith("application/json")
    assert headers["Cache-Control"] == "no-store"
    assert (await plane.call("GET", "/admin/users/ann"))[:2] == (200, created)
    assert (await reopened(plane)).user("ann") == plane.keyring.user("ann")


async def test_a_user_needs_nothing_and_gets_an_id(plane):
    for body in (None, {}, b""):
        status, created, _ = await plane.call("POST", "/admin/users", body)
        assert status == 201
        assert created["user_id"].startswith("user_")
        assert created["monthly_limit_usd"] is None


async def test_null_is_the_default(plane):
    body = dict.fromkeys(
        ["user_id", "org_id", "email", "monthly_limit_usd", "rpm", "tpm", "max_parallel"]
    )
    status, created, _ = await plane.call("POST", "/admin/users", body)
    assert (status, created["org_id"], created["rpm"]) == (201, "default", None)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (b'"0"', "0.000000000"),
        (b"0", "0.000000000"),
        (b'"0.000000001"', "0.000000001"),
        (b"0.1", "0.100000000"),
        (b"123456789.123456789", "123456789.123456789"),
        (b"1e2", "100.000000000"),
        (b'"1000000000"', "1000000000.000000000"),
        (b"null", None),
    ],
)
async def test_money_is_read_digit_by_digit(plane, written, kept):
    body = b'{"monthly_limit_usd":' + written + b"}"
    status, created, _ = await plane.call("POST", "/admin/users", body)
    assert (status, created["monthly_limit_usd"]) == (201, kept)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"monthly_limit_usd":-1}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":"-0.01"}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":1e400}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":1e999999999}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":1e-400}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":0.0000000001}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":1000000001}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":' + b"9" * 10_000 + b"}", "monthly_limit_usd"),
        (b'{"monthly_limit_usd":"NaN"}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":"Infinity"}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":"1_000"}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":""}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":"\xd9\xa3"}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":"\xff"}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":true}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":[1]}', "monthly_limit_usd"),
        (b'{"monthly_limit_usd":{"usd":1}}', "monthly_limit_usd"),
        (b'{"rpm":0}', "rpm"),
        (b'{"rpm":-1}', "rpm"),
        (b'{"rpm":1.5}', "rpm"),
        (b'{"rpm":"60"}', "rpm"),
        (b'{"rpm":true}', "rpm"),
        (b'{"tpm":1e400}', "tpm"),
        (b'{"tpm":1000000001}', "tpm"),
        (b'{"max_parallel":99999999999999999999999999}', "max_parallel"),
        (b'{"status":"deleted"}', "status"),
        (b'{"status":null}', "status"),
        (b'{"user_id":""}', "user_id"),
        (b'{"user_id":"a b"}', "user_id"),
        (b'{"user_id":"ann\\n"}', "user_id"),
        (b'{"user_id":"../x"}', "user_id"),
        (b'{"user_id":"=1+1"}', "user_id"),
        ('{"user_id":"\u0430dmin"}'.encode(), "user_id"),
        (b'{"user_id":"' + b"x" * 65 + b'"}', "user_id"),
        (b'{"user_id":7}', "user_id"),
        (b'{"org_id":"nobody"}', "org_id"),
        (b'{"org_id":"a/b"}', "org_id"),
        (b'{"email":"ann"}', "email"),
        (b'{"email":"ann@example.org\\nBcc: x"}', "email"),
        (b'{"email":"ann\\u0000@example.org"}', "email"),
        (b'{"email":"ann\\u202e@example.org"}', "email"),
        (b'{"email":"' + b"a" * 300 + b'@b"}', "email"),
        (b'{"budget":1}', "budget"),
        (b'{"api_key":"gw_live_x"}', "api_key"),
    ],
)
async def test_whatever_is_wrong_in_a_user_is_a_400_that_names_the_field(plane, body, param):
    status, answer, _ = await plane.call("POST", "/admin/users", body)
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, param, "invalid_value")
    assert error["type"] == "invalid_request_error"
    assert f"`{param}`" in error["message"] or param == "org_id"
    assert (await plane.call("GET", "/admin/users"))[1]["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"user"',
        b"null",
        b"\xef\xbb\xbf{}",
        b'{"user_id":NaN}',
        b'{"user_id":"\xff"}',
        b'{"user_id":"\\ud800"}',
        b"{} {}",
        '{"user_id":"ann"}'.encode("utf-16"),
        b'{"monthly_limit_usd":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_what_is_no_json_object_is_said_to_be_none(plane, body):
    status, answer, _ = await plane.call("POST", "/admin/users", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


async def test_an_unknown_field_is_answered_with_the_nearest_known_one(plane):
    _, answer, _ = await plane.call("POST", "/admin/users", {"monthly_budget_usd": "5"})
    assert "Did you mean `monthly_limit_usd`?" in answer["error"]["message"]


async def test_an_unknown_field_that_is_no_name_is_not_repeated(plane):
    status, answer, _ = await plane.call("POST", "/admin/users", {"<script>\n": 1})
    assert (status, answer["error"]["param"]) == (400, None)
    assert "script" not in answer["error"]["message"]


async def test_a_duplicate_field_is_no_error_and_the_last_one_counts(plane):
    body = b'{"user_id":"one","user_id":"two"}'
    status, created, _ = await plane.call("POST", "/admin/users", body)
    assert (status, created["user_id"]) == (201, "two")


async def test_a_body_that_is_not_declared_as_json_is_refused(plane):
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        status, _, _ = await plane.call(
            "POST", "/admin/users", b"{}", **{"Content-Type": content_type}
        )
        assert status == 415


async def test_a_body_that_is_too_large_is_refused_declared_or_not(plane):
    large = b'{"email":"' + b"a" * 300_000 + b'"}'
    status, answer, _ = await plane.call("POST", "/admin/users", large)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")

    async def chunks():
        for _ in range(30):
            yield b"a" * 10_000

    headers = {**ADMIN, "Content-Type": "application/json"}
    async with plane.client.post("/admin/users", data=chunks(), headers=headers) as answer:
        assert answer.status == 413


async def test_a_body_that_is_declared_too_large_is_not_waited_for(plane):
    head = (
        "POST /admin/users HTTP/1.1\r\nHost: gw\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {ADMIN_KEY}\r\nContent-Length: 999999999999\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.client.port)
    writer.write(head.encode())
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("second", "param"),
    [
        ({"user_id": "ann"}, "user_id"),
        ({"user_id": "bob", "email": "ANN@Example.org"}, "email"),
    ],
)
async def test_a_duplicate_is_a_409_that_names_the_field(plane, second, param):
    await plane.call("POST", "/admin/users", {"user_id": "ann", "email": "ann@example.org"})
    status, answer, _ = await plane.call("POST", "/admin/users", second)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (
        409,
        "already_exists",
        param,
    )


async def test_of_many_creations_at_once_exactly_one_wins(plane):
    answers = await asyncio.gather(
        *(plane.call("POST", "/admin/users", {"user_id": "ann"}) for _ in range(20))
    )
    assert sorted(status for status, _, _ in answers) == [201] + [409] * 19


async def test_an_unknown_user_is_a_404(plane):
    for path in ("/admin/users/nobody", "/admin/users/nobody/api-keys"):
        status, answer, _ = await plane.call("GET", path)
        assert (status, answer["error"]["code"]) == (404, "not_found")
    assert (await plane.call("POST", "/admin/users/nobody/api-keys", {}))[0] == 404


# -- lists ---------------------------------------------------------------------------------------


async def test_lists_are_paged_and_nobody_is_missed_or_shown_twice(plane):
    for number in range(7):
        await plane.call("POST", "/admin/users", {"user_id": f"user-{number}"})
    seen, cursor, pages = [], "", 0
    while cursor is not None:
        _, page, _ = await plane.call("GET", f"/admin/users?limit=3&cursor={cursor}")
        seen += [user["user_id"] for user in page["data"]]
        cursor, pages = page["next_cursor"], pages + 1
    assert seen == [f"user-{number}" for number in range(7)]
    assert pages == 3


async def test_a_last_page_that_is_full_has_no_next(plane):
    for number in range(4):
        await plane.call("POST", "/admin/users", {"user_id": f"user-{number}"})
    _, page, _ = await plane.call("GET", "/admin/users?limit=2&cursor=user-1")
    assert (len(page["data"]), page["next_cursor"]) == (2, None)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("cursor=%00", "cursor"),
        ("cursor=a%20b", "cursor"),
        ("deleted=yes", "deleted"),
        ("limt=5", "limt"),
        ("limit=5&limit=6", "limit"),
    ],
)
async def test_a_query_that_is_not_understood_is_a_400(plane, query, param):
    status, answer, _ = await plane.call("GET", f"/admin/users?{query}")
    assert (status, answer["error"]["param"]) == (400, param)


# -- keys ----------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_works_at_once(plane):
    created = await make_key(
        plane,
        {
            "name": "laptop",
            "expires_at": "2027-01-15T09:00:00.9+00:30",
            "allowed_models": ["openai/gpt-4o-mini", "openai/gpt-4o-mini", "@cf/meta/llama"],
            "monthly_limit_usd": 5,
            "rpm": 1,
            "tpm": 2,
            "max_parallel": 3,
        },
    )
    key = created.pop("api_key")
    assert well_formed(key) and key.startswith("gw_live_")
    assert created == {
        "key_id": "key_" + key[8:16],
        "user_id": "ann",
        "prefix": key[:16],
        "name": "laptop",
        "allowed_models": ["openai/gpt-4o-mini", "@cf/meta/llama"],
        "monthly_limit_usd": "5.000000000",
        "rpm": 1,
        "tpm": 2,
        "max_parallel": 3,
        "created_at": "2027-01-15T08:00:00Z",
        "expires_at": "2027-01-15T08:30:00Z",
        "previous_valid_until": None,
        "last_used_at": None,
        "last_used_from": None,
        "use_count": 0,
        "revoked_at": None,
    }
    principal = plane.authenticate(key)
    assert (principal.user_id, principal.org_id, principal.key_name) == ("ann", "default", "laptop")
    with pytest.raises(InvalidApiKey):
        plane.authenticate(key, START + 1800)

    _, page, _ = await plane.call("GET", "/admin/users/ann/api-keys")
    assert page == {
        "data": [{**created, "last_used_at": "2027-01-15T08:00:00Z", "use_count": 1}],
        "next_cursor": None,
    }


async def test_a_key_is_nowhere_in_the_database(plane):
    keys = [(await make_key(plane))["api_key"] for _ in range(5)]
    await plane.call("DELETE", f"/admin/users/ann/api-keys/key_{keys[0][8:16]}")
    await until(lambda: plane.store.writer.applied == plane.store.ledger.state.lsn)
    await plane.store.store_key_use()
    folder = plane.path.parent
    files = [plane.path, *folder.glob("*-wal"), *folder.glob("*-shm"), *folder.glob("journal/0*")]
    assert len(files) > 4
    stored = b"".join(file.read_bytes() for file in files)
    assert (
        keys[0][8:16].encode() in stored
    )  # the public part is there: this looks in the right place
    for key in keys:
        for secret in (key, key[16:48], key[16:32], key[32:48], key[::-1]):
            assert secret.encode() not in stored


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"name":""}', "name"),
        (b'{"name":"a\\nb"}', "name"),
        (b'{"name":"\\u202egnp.exe"}', "name"),
        (b'{"name":"' + b"x" * 201 + b'"}', "name"),
        (b'{"expires_at":"2027-01-15T08:00:00Z"}', "expires_at"),
        (b'{"expires_at":"2020-01-01T00:00:00Z"}', "expires_at"),
        (b'{"expires_at":"2027-02-01T00:00:00"}', "expires_at"),
        (b'{"expires_at":"2027-02-30T00:00:00Z"}', "expires_at"),
        (b'{"expires_at":"tomorrow"}', "expires_at"),
        (b'{"expires_at":1900000000}', "expires_at"),
        (b'{"expires_at":"9999-12-31T23:59:59-12:00"}', "expires_at"),
        (b'{"allowed_models":[]}', "allowed_models"),
        (b'{"allowed_models":"gpt-4o"}', "allowed_models"),
        (b'{"allowed_models":["a",7]}', "allowed_models"),
        (b'{"allowed_models":["a\\u0000"]}', "allowed_models"),
        (b'{"allowed_models":[' + b'"a",' * 1000 + b'"b"]}', "allowed_models"),
        (b'{"monthly_limit_usd":"five"}', "monthly_limit_usd"),
        (b'{"rpm":0}', "rpm"),
        (b'{"user_id":"bob"}', "user_id"),
    ],
)
async def test_whatever_is_wrong_in_a_key_is_a_400_that_names_the_field(plane, body, param):
    await plane.call("POST", "/admin/users", {"user_id": "ann"})
    status, answer, _ = await plane.call("POST", "/admin/users/ann/api-keys", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert (await plane.call("GET", "/admin/users/ann/api-keys"))[1]["data"] == []


async def test_a_revoked_key_is_refused_from_the_next_request_on_and_after_a_restart(plane):
    created = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{created['key_id']}"
    assert plane.authenticate(created["api_key"])
    status, answer, headers = await plane.call("DELETE", path)
    assert (status, answer, headers["Cache-Control"]) == (204, None, "no-store")
    with pytest.raises(InvalidApiKey):
        plane.authenticate(created["api_key"])
    with pytest.raises(InvalidApiKey):
        (await reopened(plane)).authenticate(CIMultiDict({"x-api-key": created["api_key"]}), START)
    assert (await plane.call("DELETE", path))[0] == 404
    assert (await plane.call("GET", "/admin/users/ann/api-keys"))[1]["data"] == []
    _, page, _ = await plane.call("GET", "/admin/users/ann/api-keys?deleted=1")
    assert page["data"][0]["revoked_at"] == "2027-01-15T08:00:00Z"


async def test_a_key_is_only_revoked_through_its_own_user(plane):
    created = await make_key(plane)
    await plane.call("POST", "/admin/users", {"user_id": "bob"})
    path = f"/admin/users/bob/api-keys/{created['key_id']}"
    assert (await plane.call("DELETE", path))[0] == 404
    assert plane.authenticate(created["api_key"])


async def test_a_users_keys_are_paged_in_the_order_of_their_creation(plane):
    ids = [(await make_key(plane))["key_id"] for _ in range(5)]
    await plane.call("DELETE", f"/admin/users/ann/api-keys/{ids[2]}")
    _, first, _ = await plane.call("GET", "/admin/users/ann/api-keys?limit=2")
    cursor = first["next_cursor"]
    _, second, _ = await plane.call("GET", f"/admin/users/ann/api-keys?limit=2&cursor={cursor}")
    shown = [key["key_id"] for key in first["data"] + second["data"]]
    assert shown == [ids[0], ids[1], ids[3], ids[4]]
    assert second["next_cursor"] is None
    assert [key.key_id for key in (await reopened(plane)).keys_of("ann")] == ids


async def test_a_suspended_user_is_created_and_cannot_call(plane):
    await plane.call("POST", "/admin/users", {"user_id": "ann", "status": "suspended"})
    created = await make_key(plane)
    with pytest.raises(AccountSuspended):
        plane.authenticate(created["api_key"])


async def test_suspending_and_reactivating_hold_at_once_and_after_a_restart(plane):
    key = (await make_key(plane))["api_key"]
    for suspend in (
        lambda status: plane.directory.set_user_status("ann", status),
        lambda status: plane.directory.set_organization_status("default", status),
    ):
        await suspend(Status.SUSPENDED)
        for keyring in (plane.keyring, await reopened(plane)):
            with pytest.raises(AccountSuspended):
                keyring.authenticate(CIMultiDict({"x-api-key": key}), START)
        await suspend(Status.ACTIVE)
        for keyring in (plane.keyring, await reopened(plane)):
            assert keyring.authenticate(CIMultiDict({"x-api-key": key}), START)


# -- organizations -------------------------------------------------------------------------------


async def test_an_organization_is_created_shown_and_kept(plane):
    sent = {
        "org_id": "acme",
        "name": "Acme GmbH",
        "status": "active",
        "monthly_budget_usd": "1000",
        "failure_mode": "open",
        "fallback_daily_limit_usd": "0",
        "allowed_features": ["web_search"],
        "prices": {"openai/gpt-4o": {"input": "2.5", "output": 10, "cache_read": "1.25"}},
        "unbounded_policy": "strict",
        "on_exhausted": "finish",
        "on_client_gone": "drain",
        "cache": True,
    }
    status, created, _ = await plane.call("POST", "/admin/organizations", sent)
    assert status == 201
    assert created == {
        **sent,
        "monthly_budget_usd": "1000.000000000",
        "fallback_daily_limit_usd": "0.000000000",
        "prices": {"openai/gpt-4o": {"input": "2.50", "output": "10.00", "cache_read": "1.25"}},
        "created_at": "2027-01-15T08:00:00Z",
        "deleted_at": None,
    }
    assert (await plane.call("GET", "/admin/organizations/acme"))[:2] == (200, created)
    assert (await reopened(plane)).organization("acme") == plane.keyring.organization("acme")
    _, page, _ = await plane.call("GET", "/admin/organizations")
    assert [row["org_id"] for row in page["data"]] == ["acme", "default"]
    user = {"user_id": "ann", "org_id": "acme"}
    assert (await plane.call("POST", "/admin/users", user))[1]["org_id"] == "acme"
    assert (await plane.call("POST", "/admin/organizations", sent))[0] == 409


async def test_an_organization_needs_nothing(plane):
    status, created, _ = await plane.call("POST", "/admin/organizations", {})
    assert status == 201
    assert created["org_id"].startswith("org_")
    assert (created["failure_mode"], created["fallback_daily_limit_usd"]) == (None, None)
    assert (created["unbounded_policy"], created["on_exhausted"]) == ("clamp", "cut")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"monthly_budget_usd": -1}, "monthly_budget_usd"),
        ({"fallback_daily_limit_usd": "much"}, "fallback_daily_limit_usd"),
        ({"failure_mode": "ajar"}, "failure_mode"),
        ({"allowed_features": "all"}, "allowed_features"),
        ({"allowed_features": [""]}, "allowed_features"),
        ({"allowed_features": ["audio", "foo"]}, "allowed_features"),
        ({"prices": []}, "prices"),
        ({"prices": {"m": {"input": "1"}}}, "prices"),
        ({"prices": {"m": {"input": "1", "output": "-1"}}}, "prices"),
        ({"prices": {"m": {"input": "1", "output": True}}}, "prices"),
        ({"prices": {"m": {"input": "1", "output": "1", "image": "1"}}}, "prices"),
        ({"prices": {"m\n": {"input": "1", "output": "1"}}}, "prices"),
        ({"unbounded_policy": "none"}, "unbounded_policy"),
        ({"on_exhausted": 1}, "on_exhausted"),
        ({"on_client_gone": "stay"}, "on_client_gone"),
        ({"cache": "yes"}, "cache"),
        ({"cache": 1}, "cache"),
        ({"org_id": "a b"}, "org_id"),
        ({"name": "\u202e"}, "name"),
        ({"monthly_limit_usd": "1"}, "monthly_limit_usd"),
    ],
)
async def test_whatever_is_wrong_in_an_organization_names_the_field(plane, body, param):
    status, answer, _ = await plane.call("POST", "/admin/organizations", body)
    assert (status, answer["error"]["param"]) == (400, param)


# -- who may -------------------------------------------------------------------------------------


async def test_no_route_opens_without_the_admin_key(plane):
    user_key = (await make_key(plane))["api_key"]
    own_admin_key = mint(KeyKind.ADMIN, random.Random(9).randrange)
    wrong = (
        {},
        {"Authorization": f"Bearer {user_key}"},
        {"x-api-key": user_key},
        {"Authorization": f"Basic {ADMIN_KEY}"},
        {"Authorization": f"Bearer {ADMIN_KEY}x"},
        {"Authorization": f"Bearer {ADMIN_KEY[:-1]}"},
        {"Authorization": f"Bearer {own_admin_key}"},
        {"Authorization": f"Bearer {ADMIN_KEY}", "x-api-key": user_key},
        {"Authorization": "Bearer " + "x" * 5000},
    )
    for route in routes(plane.store):
        path = route.path.format(user_id="ann", key_id="key_" + user_key[8:16], org_id="default")
        for headers in wrong:
            plane.seconds[0] += 10  # slower than what is taken for guessing
            async with plane.client.request(route.method, path, headers=headers) as answer:
                assert answer.status == 401, (route, headers)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                assert (await answer.json())["error"]["code"] == "invalid_api_key"
    assert plane.authenticate(user_key)


async def test_the_key_in_the_query_opens_nothing(plane):
    async with plane.client.get(f"/admin/users?api_key={ADMIN_KEY}") as answer:
        assert answer.status == 401


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "authorization"])
async def test_the_admin_key_opens_from_any_of_its_headers(plane, name):
    value = f"bearer {ADMIN_KEY}" if name == "authorization" else ADMIN_KEY
    async with plane.client.get("/admin/users", headers={name: value}) as answer:
        assert answer.status == 200


async def test_guessing_is_stopped_for_the_rest_of_the_minute_and_locks_nobody_out(plane):
    async def status(key: str) -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {key}"}
        async with plane.client.get("/admin/users", headers=headers) as answer:
            return answer.status, answer.headers.get("Retry-After")

    for _ in range(10):
        assert await status("x" * 40) == (401, None)
    plane.seconds[0] = 12.5
    assert await status("x" * 40) == (429, "48")
    assert await status(ADMIN_KEY) == (200, None)
    assert await status("x" * 40) == (429, "48")
    plane.seconds[0] = 60.0
    assert await status(ADMIN_KEY) == (200, None)
    assert await status("x" * 40) == (401, None)


# -- guessing, without a socket ------------------------------------------------------------------


def attempt(auth: AdminAuth, peer: str | None, key: str | None = "x" * 40) -> int:
    headers = CIMultiDict({} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        auth.check(headers, peer)
    except GatewayError as error:
        return error.status
    return 200


def test_addresses_are_counted_apart_and_an_ipv6_network_as_one():
    auth = admin_auth(ADMIN_KEY, lambda: 0.0)
    for number in range(10):
        assert attempt(auth, f"2001:db8:0:1::{number}") == 401
        assert attempt(auth, "::ffff:192.0.2.1") == 401
        assert attempt(auth, "fe80::1%eth0") == 401
    assert attempt(auth, "2001:db8:0:1:ffff::") == 429
    assert attempt(auth, "2001:db8:0:2::") == 401
    assert attempt(auth, "192.0.2.1") == 429
    assert attempt(auth, "192.0.2.2") == 401
    assert attempt(auth, "192.0.2.2", ADMIN_KEY) == 200


def test_a_request_without_a_key_is_no_guess():
    auth = admin_auth(ADMIN_KEY, lambda: 0.0)
    assert {attempt(auth, "192.0.2.1", None) for _ in range(50)} == {401}
    assert attempt(auth, "192.0.2.1", ADMIN_KEY) == 200


def test_the_table_of_guessers_is_bounded_and_forgets_the_oldest():
    auth = admin_auth(ADMIN_KEY, lambda: 0.0)
    for _ in range(11):
        attempt(auth, "192.0.2.1")
    for number in range(auth_module._MOST_ADDRESSES - 1):
        attempt(auth, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert attempt(auth, "192.0.2.1") == 429
    attempt(auth, "10.255.0.0")
    assert len(auth._failures) == auth_module._MOST_ADDRESSES
    assert attempt(auth, "192.0.2.1") == 401


def test_an_address_that_fails_anew_is_not_the_oldest_any_more():
    now = [0.0]
    auth = admin_auth(ADMIN_KEY, lambda: now[0])
    attempt(auth, "192.0.2.1")
    attempt(auth, "192.0.2.2")
    now[0] = 61.0
    attempt(auth, "192.0.2.1")
    assert [*auth._failures] == ["192.0.2.2", "192.0.2.1"]


def test_whoever_goes_on_guessing_is_stopped_again():
    now = [0.0]
    auth = admin_auth(ADMIN_KEY, lambda: now[0])
    for minute in range(5):
        now[0] = minute * 60.0
        assert [attempt(auth, "192.0.2.1") for _ in range(12)] == [401] * 10 + [429] * 2


def test_failures_spread_over_time_stop_nobody():
    now = [0.0]
    auth = admin_auth(ADMIN_KEY, lambda: now[0])
    for _ in range(100):
        assert attempt(auth, "192.0.2.1") == 401
        now[0] += 7


def test_without_a_configured_key_nothing_opens():
    auth = admin_auth(None, lambda: 0.0)
    for key in ("", "None", "x" * 40, None):
        assert attempt(auth, None, key) == 401


def test_a_users_key_opens_nothing_even_if_it_was_configured():
    key = mint(KeyKind.LIVE, random.Random(1).randrange)
    assert attempt(admin_auth(key, lambda: 0.0), None, key) == 401


def test_a_short_admin_key_is_refused():
    with pytest.raises(ValueError, match="32"):
        admin_auth("x" * 31, lambda: 0.0)
    admin_auth("x" * 32, lambda: 0.0)


# -- storage that fails --------------------------------------------------------------------------


async def test_a_change_that_cannot_be_recorded_is_a_503_and_has_not_happened(plane):
    with plane.disk.broken():
        status, answer, headers = await plane.call("POST", "/admin/users", {"user_id": "ann"})
        assert (status, answer["error"]["code"]) == (503, "storage_unavailable")
        assert int(headers["Retry-After"]) > 0
        assert (await plane.call("GET", "/admin/users/ann"))[0] == 404
    assert (await plane.call("POST", "/admin/users", {"user_id": "ann"}))[0] == 201


async def test_a_revocation_holds_even_when_it_cannot_be_recorded_and_is_recorded_later(plane):
    created = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{created['key_id']}"
    with plane.disk.broken():
        status, answer, _ = await plane.call("DELETE", path)
        assert (status, answer["error"]["code"]) == (503, "storage_unavailable")
        assert "In force at once" in answer["error"]["message"]
        with pytest.raises(InvalidApiKey):
            plane.authenticate(created["api_key"])
        assert (await reopened(plane)).key(created["key_id"]).revoked_at is None
    await until(lambda: plane.store.journal.room() > 0)  # a spare segment was used up meanwhile
    assert (await plane.call("POST", "/admin/users", {"user_id": "bob"}))[0] == 201
    assert (await reopened(plane)).key(created["key_id"]).revoked_at == START
    assert (await plane.call("DELETE", path))[0] == 404


async def test_what_is_owed_is_recorded_before_the_next_change(plane):
    created = await make_key(plane)
    with plane.disk.broken():
        with pytest.raises(StorageUnavailable):
            await plane.directory.set_user_status("ann", Status.SUSPENDED)
        with pytest.raises(StorageUnavailable):
            await plane.directory.set_user_status("ann", Status.ACTIVE)
        with pytest.raises(AccountSuspended):
            # What loosens holds only once it is recorded.
            plane.authenticate(created["api_key"])
    await until(lambda: plane.store.journal.room() > 0)  # a spare segment was used up meanwhile
    assert (await plane.call("POST", "/admin/users", {"user_id": "bob"}))[0] == 201
    assert (await reopened(plane)).user("ann").status is Status.SUSPENDED


async def test_a_client_that_leaves_in_mid_change_leaves_memory_and_storage_alike(plane):
    for number in range(12):
        task = asyncio.get_running_loop().create_task(
            plane.directory.create_user(user_id=f"user-{number}")
        )
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await plane.directory.create_user(user_id="last")  # waits for its turn behind all of them
    stored = await reopened(plane)
    assert list(stored.users_after("")) == list(plane.keyring.users_after(""))
    assert len(list(stored.users_after(""))) > 1


async def test_changes_at_once_are_made_one_after_the_other(plane):
    await plane.directory.create_user(user_id="ann")
    await asyncio.gather(
        *(
            plane.directory.set_user_status("ann", status)
            for status in (Status.SUSPENDED, Status.ACTIVE) * 10
        )
    )
    assert plane.keyring.user("ann").version == 21
    assert (await reopened(plane)).user("ann") == plane.keyring.user("ann")


async def test_the_last_use_survives_a_restart_once_it_is_flushed(plane):
    created = await make_key(plane)
    plane.authenticate(created["api_key"], START + 77.5)
    await plane.store.store_key_use()  # too early: the database does not have the key yet
    await until(lambda: plane.store.writer.applied == plane.store.ledger.state.lsn)
    await plane.store.store_key_use()
    await plane.store.store_key_use()
    assert (await reopened(plane)).use(created["key_id"]).at == START + 77
    await plane.directory.revoke_key("ann", created["key_id"])
    assert (await reopened(plane)).use(created["key_id"]).at == START + 77


async def test_a_long_page_is_made_while_others_have_their_turn() -> None:
    page = checked.MOST_PER_PAGE
    made, seen = 0, []

    def shape(row: int) -> int:
        nonlocal made
        made += 1
        return -row

    async def others() -> None:
        while made < page:
            seen.append(made)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(others())
        shaped = group.create_task(checked.in_turns(range(page), shape))
    assert shaped.result() == [-row for row in range(page)]
    assert max(after - before for before, after in pairwise(seen)) <= page / 10


async def test_a_list_that_changes_while_a_page_is_made_shows_no_row_twice() -> None:
    rows = list(range(300))

    def shape(row: int) -> int:
        if rows[0] == 0:
            rows.insert(0, -1)
        return row

    found = await checked.listing(
        rows, checked.Page(limit=250), lambda row: row % 2 == 0, shape, lambda row: str(row)
    )
    assert found == ([row for row in range(300) if row % 2 == 0], None)
    first = await checked.listing(
        rows, checked.Page(limit=3), lambda row: True, abs, lambda row: str(row)
    )
    assert first == ([1, 0, 1], "1")
