"""Secrets that change, administrators' keys, and what is known of how keys are used."""

import pytest
from multidict import CIMultiDict

from gwproxy.core.errors import InvalidApiKey
from gwproxy.core.identity import digest, well_formed
from tests.plane import ADMIN_KEY, START, Plane, make_key, reopened
from tests.scene import until

# -- rotation ------------------------------------------------------------------------------------


async def test_after_a_rotation_both_secrets_are_good_until_the_grace_ends(plane: Plane):
    made = await make_key(plane, {"name": "laptop"})
    path = f"/admin/users/ann/api-keys/{made['key_id']}"
    status, rotated, headers = await plane.call("POST", f"{path}/rotate", {"grace_s": 600})
    assert (status, headers["ETag"]) == (201, '"2"')
    old, new = made["api_key"], rotated["api_key"]
    assert well_formed(new) and new != old
    assert rotated["prefix"] == made["prefix"] == new[:16]
    assert rotated["previous_valid_until"] == "2027-01-15T08:10:00Z"
    for keyring in (plane.keyring, await reopened(plane)):
        principals = {keyring.authenticate(bearer(key), START) for key in (old, new)}
        assert [principal.key_id for principal in principals] == [made["key_id"]]
        assert keyring.authenticate(bearer(old), START + 599.9)
        with pytest.raises(InvalidApiKey):
            keyring.authenticate(bearer(old), START + 600)
        assert keyring.authenticate(bearer(new), START + 600)


async def test_a_rotation_without_grace_ends_the_old_secret_at_once(plane: Plane):
    made = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{made['key_id']}/rotate"
    _, second, _ = await plane.call("POST", path)  # a day, when nothing is said
    assert second["previous_valid_until"] == "2027-01-16T08:00:00Z"
    _, third, _ = await plane.call("POST", path, {"grace_s": 0})
    # Of the first one its own grace goes on: it was promised.
    assert plane.authenticate(made["api_key"])
    with pytest.raises(InvalidApiKey):
        plane.authenticate(second["api_key"])
    assert plane.authenticate(third["api_key"])


async def test_a_revocation_and_an_expiry_end_every_secret(plane: Plane):
    for change in ("revoke", "expire"):
        made = await make_key(plane)
        path = f"/admin/users/ann/api-keys/{made['key_id']}"
        _, rotated, _ = await plane.call("POST", f"{path}/rotate")
        if change == "revoke":
            await plane.call("DELETE", path)
        else:
            await plane.call("PATCH", path, {"expires_at": "2027-01-15T08:00:01Z"})
        for key in (made["api_key"], rotated["api_key"]):
            with pytest.raises(InvalidApiKey):
                plane.authenticate(key, START + 1)
        assert (await plane.call("POST", f"{path}/rotate"))[0] == (
            404 if change == "revoke" else 201
        )


async def test_secrets_that_are_good_are_only_so_many(plane: Plane):
    made = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{made['key_id']}/rotate"
    grace = {"grace_s": 60}
    assert [(await plane.call("POST", path, grace))[0] for _ in range(6)] == [201] * 5 + [409]
    plane.seconds[0] = 60
    assert (await plane.call("POST", path))[0] == 201
    assert len(plane.keyring.key(made["key_id"]).previous) == 1


@pytest.mark.parametrize("grace", [-1, 1.5, "600", True, None, 90 * 86_400 + 1])
async def test_a_grace_is_a_number_of_seconds(plane: Plane, grace):
    made = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{made['key_id']}/rotate"
    status, answer, _ = await plane.call("POST", path, {"grace_s": grace})
    assert (status, answer["error"]["param"]) == (400, "grace_s")


async def test_a_rotation_heeds_the_version_and_the_owner(plane: Plane):
    made = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{made['key_id']}/rotate"
    assert (await plane.call("POST", path, None, **{"If-Match": '"2"'}))[0] == 412
    await plane.call("POST", "/admin/users", {"user_id": "bob"})
    assert (await plane.call("POST", path.replace("ann", "bob")))[0] == 404
    assert plane.authenticate(made["api_key"])


# -- administrators ------------------------------------------------------------------------------


async def make_admin(plane: Plane, **fields: object) -> dict:
    status, made, _ = await plane.call("POST", "/admin/admin-keys", fields)
    assert status == 201
    return made


async def by(plane: Plane, key: str, method: str, path: str, body: object = None):
    status, answer, _ = await plane.call(method, path, body, Authorization=f"Bearer {key}")
    return status, answer


async def test_a_reading_key_reads_and_a_writing_one_writes(plane: Plane):
    reader = await make_admin(plane, name="dashboard")
    writer = await make_admin(plane, name="provisioning", scope="write")
    assert (reader["scope"], writer["scope"]) == ("read", "write")
    assert reader["admin_key"].startswith("gw_admin_") and well_formed(reader["admin_key"])
    for made in (reader, writer):
        assert (await by(plane, made["admin_key"], "GET", "/admin/users"))[0] == 200
    status, answer = await by(plane, reader["admin_key"], "POST", "/admin/users", {})
    assert (status, answer["error"]["code"]) == (403, "insufficient_scope")
    assert answer["error"]["type"] == "permission_error"
    assert (await plane.call("GET", "/admin/users"))[1]["data"] == []
    assert (await by(plane, writer["admin_key"], "POST", "/admin/users", {}))[0] == 201
    _, page, _ = await plane.call("GET", "/admin/audit?noun=user")
    assert page["data"][0]["actor"] == writer["key_id"]


async def test_an_admin_key_is_shown_once_listed_and_revoked(plane: Plane):
    made = await make_admin(plane, name="one")
    text = made.pop("admin_key")
    assert (await plane.call("GET", "/admin/admin-keys"))[1]["data"] == [made]
    path = f"/admin/admin-keys/{made['key_id']}"
    assert (await plane.call("GET", path))[1] == made
    assert (await plane.call("DELETE", path, None, **{"If-Match": '"9"'}))[0] == 412
    assert (await plane.call("DELETE", path))[0] == 204
    assert (await by(plane, text, "GET", "/admin/users"))[0] == 401
    assert (await plane.call("GET", path))[0] == 404
    assert (await plane.call("GET", "/admin/admin-keys"))[1]["data"] == []
    _, page, _ = await plane.call("GET", "/admin/admin-keys?deleted=1&limit=1")
    assert page["data"][0]["revoked_at"] == "2027-01-15T08:00:00Z"
    assert (await plane.call("DELETE", path))[0] == 404


async def test_an_admin_key_expires_and_outlives_a_restart(plane: Plane):
    made = await make_admin(plane, expires_at="2027-01-15T08:01:00Z")
    assert (await by(plane, made["admin_key"], "GET", "/admin/users"))[0] == 200
    row = (await reopened(plane)).admin_key(made["key_id"])
    assert row == plane.keyring.admin_key(made["key_id"])
    plane.seconds[0] = 60
    assert (await by(plane, made["admin_key"], "GET", "/admin/users"))[0] == 401


async def test_an_admin_key_never_calls_a_model(plane: Plane):
    made = await make_admin(plane, scope="write")
    for key in (made["admin_key"], ADMIN_KEY):
        with pytest.raises(InvalidApiKey):
            plane.authenticate(key)


# -- use -----------------------------------------------------------------------------------------


async def test_how_a_key_was_used_is_shown_at_once_and_survives_a_restart(plane: Plane):
    made = await make_key(plane)
    path = f"/admin/users/ann/api-keys/{made['key_id']}"
    _, rotated, _ = await plane.call("POST", f"{path}/rotate")
    plane.keyring.authenticate(bearer(made["api_key"]), START + 1, "192.0.2.1")
    plane.keyring.authenticate(bearer(rotated["api_key"]), START + 2.9, "192.0.2.2")
    _, shown, _ = await plane.call("GET", path)
    assert (shown["use_count"], shown["last_used_from"]) == (2, "192.0.2.2")
    assert shown["last_used_at"] == "2027-01-15T08:00:02Z"
    await until(lambda: plane.store.writer.applied == plane.store.ledger.state.lsn)
    await plane.store.store_key_use()
    await plane.call("PATCH", path, {"name": "renamed"})  # it does not undo what was stored
    again = (await reopened(plane)).use(made["key_id"])
    assert again == plane.keyring.use(made["key_id"])
    assert (again.count, again.address) == (2, "192.0.2.2")


async def test_how_an_admin_key_was_used_is_shown_and_survives_a_restart(plane: Plane):
    made = await make_admin(plane)
    assert (made["last_used_at"], made["last_used_from"], made["use_count"]) == (None, None, 0)
    path = f"/admin/admin-keys/{made['key_id']}"
    plane.seconds[0] = 5
    for wanted in (1, 2):
        _, shown = await by(plane, made["admin_key"], "GET", path)
        assert (shown["use_count"], shown["last_used_from"]) == (wanted, "127.0.0.1")
        assert shown["last_used_at"] == "2027-01-15T08:00:05Z"
    await until(lambda: plane.store.writer.applied == plane.store.ledger.state.lsn)
    await plane.store.store_key_use()
    assert plane.keyring.used_since_stored() == []
    again = (await reopened(plane)).use(made["key_id"])
    assert again == plane.keyring.use(made["key_id"])
    assert (again.count, again.address) == (2, "127.0.0.1")


async def test_an_admin_key_is_found_by_its_secret(plane: Plane):
    made = await make_admin(plane)
    path = f"/admin/admin-keys/{made['key_id']}?sha256="
    assert (await plane.call("GET", path + digest(made["admin_key"]).hex()))[0] == 200
    assert (await plane.call("GET", path + digest("another").hex()))[0] == 404


async def test_a_key_ends_with_its_user(plane: Plane):
    made = await make_key(plane)
    path = f"/admin/api-keys/{made['key_id']}"
    assert (await plane.call("GET", path))[1]["revoked_at"] is None
    plane.seconds[0] = 60
    assert (await plane.call("DELETE", "/admin/users/ann"))[0] == 204
    assert (await plane.call("GET", path))[0] == 404
    status, shown, _ = await plane.call("GET", f"{path}?deleted=1")
    assert (status, shown["revoked_at"]) == (200, "2027-01-15T08:01:00Z")


def bearer(key: str) -> CIMultiDict[str]:
    return CIMultiDict({"Authorization": f"Bearer {key}"})
