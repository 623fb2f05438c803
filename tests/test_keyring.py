"""The keyring: who gets in, who does not, and what a stranger learns from it."""

import random
from dataclasses import replace

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from gwproxy.core.errors import AccountSuspended, InvalidApiKey
from gwproxy.core.identity import (
    ApiKey,
    KeyKind,
    Organization,
    Principal,
    Status,
    User,
    checksum,
    digest,
    mint,
    parse,
)
from gwproxy.state.keyring import Keyring
from gwproxy.storage.directory import Use

NOW = 1_800_000_000.0


def mint_seeded(seed: int, kind: KeyKind = KeyKind.LIVE) -> str:
    return mint(kind, random.Random(seed).randrange)


def row_of(text: str, user_id: str = "ann", **fields) -> ApiKey:
    parts = parse(text)
    return ApiKey(
        key_id=parts.key_id,
        user_id=user_id,
        prefix=parts.prefix,
        digest=digest(text),
        created_at=1,
        **fields,
    )


KEY = mint_seeded(1)
ORG = Organization(org_id="acme", created_at=1)
ANN = User(user_id="ann", org_id="acme", email="Ann@example.org", created_at=1)
ROW = row_of(KEY, name="laptop", allowed_models=("openai/gpt-4o-mini",))


def make(*more) -> Keyring:
    keyring = Keyring()
    for row in (ORG, ANN, ROW, *more):
        keyring.apply(row)
    return keyring


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


def bearer(key: str) -> CIMultiDictProxy[str]:
    return headers(("Authorization", f"Bearer {key}"))


@pytest.mark.parametrize(
    "sent",
    [
        [("Authorization", f"Bearer {KEY}")],
        [("authorization", f"bearer {KEY}")],
        [("AUTHORIZATION", f"BEARER {KEY}")],
        [("Authorization", f"Bearer  {KEY} ")],
        [("x-api-key", KEY)],
        [("X-Api-Key", KEY)],
        [("api-key", KEY)],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", KEY), ("api-key", KEY)],
    ],
)
def test_a_key_opens_whichever_header_carries_it(sent):
    principal = make().authenticate(headers(*sent), NOW)
    assert principal == Principal(
        key_id=ROW.key_id,
        user_id="ann",
        org_id="acme",
        key_name="laptop",
        allowed_models=("openai/gpt-4o-mini",),
    )


OTHER = mint_seeded(2)
NEAR_MISS = KEY[:-1] + ("0" if KEY[-1] != "0" else "1")
# One character of the secret changed and the checksum made right again: only the look-up can tell.
FORGED = KEY[:20] + ("0" if KEY[20] != "0" else "1") + KEY[21:-6]
FORGED += checksum(FORGED)


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Token {KEY}")],
        [("Authorization", f"Bearer {KEY} extra")],
        [("Authorization", f"Bearer {NEAR_MISS}")],
        [("Authorization", f"Bearer {FORGED}")],
        [("Authorization", f"Bearer {OTHER}")],
        [("Authorization", f"Bearer {KEY[:-1]}")],
        [("Authorization", f"Bearer {KEY}0")],
        [("Authorization", f"Bearer {KEY.swapcase()}")],
        [("Authorization", f"Bearer {digest(KEY).hex()}")],
        [("Authorization", f"Bearer {ROW.key_id}")],
        [("Authorization", "Bearer ' OR '1'='1")],
        [("Authorization", "Bearer gw_live_'; DROP TABLE api_key; --")],
        [("Authorization", "Bearer " + "gw_live_" + "A" * 292)],
        [("Authorization", "Bearer " + "A" * 10_000_000)],
        [("Authorization", "Bearer \udcff\udcfe")],
        [("x-api-key", "")],
        [("x-api-key", NEAR_MISS)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER}")],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", OTHER)],
        [("Authorization", f"Bearer {OTHER}"), ("x-api-key", KEY)],
        [("Authorization", f"Basic {KEY}"), ("x-api-key", KEY)],
        [("x-api-key", KEY), ("x-api-key", OTHER)],
        [("x-api-key", KEY), ("api-key", OTHER)],
        [("Proxy-Authorization", f"Bearer {KEY}")],
        [("Cookie", f"key={KEY}")],
        [("cf-aig-authorization", f"Bearer {KEY}")],
    ],
)
def test_everything_else_is_one_401_that_does_not_repeat_what_was_sent(sent):
    with pytest.raises(InvalidApiKey) as caught:
        make().authenticate(headers(*sent), NOW)
    error = caught.value
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.headers["WWW-Authenticate"].startswith("Bearer")
    words = str(error.envelope())
    assert KEY not in words and OTHER not in words and "DROP" not in words


def test_a_key_that_was_not_copied_whole_is_told_so_whether_or_not_it_is_known():
    """Its checksum says it, so nothing is looked up and nothing is given away."""
    words = []
    for key in (NEAR_MISS, KEY[:-1], FORGED):
        with pytest.raises(InvalidApiKey) as caught:
            make().authenticate(bearer(key), NOW)
        words.append(caught.value.message)
    assert words[0] == words[1] != words[2]
    assert "mistyped" in words[0]


def test_unknown_revoked_expired_and_deleted_look_the_same():
    revoked, expired, orphan = mint_seeded(3), mint_seeded(4), mint_seeded(5)
    keyring = make(
        row_of(revoked, revoked_at=2),
        row_of(expired, expires_at=int(NOW)),
        User(user_id="bob", org_id="acme", created_at=1, deleted_at=2),
        row_of(orphan, "bob"),
    )
    answers = []
    for key in (OTHER, revoked, expired, orphan):
        with pytest.raises(InvalidApiKey) as caught:
            keyring.authenticate(bearer(key), NOW)
        answers.append((caught.value.message, caught.value.headers))
    assert all(answer == answers[0] for answer in answers)


def test_a_key_expires_with_the_second_it_was_told():
    keyring = Keyring()
    for row in (ORG, ANN, row_of(KEY, expires_at=int(NOW))):
        keyring.apply(row)
    assert keyring.authenticate(bearer(KEY), NOW - 0.001)
    with pytest.raises(InvalidApiKey):
        keyring.authenticate(bearer(KEY), NOW)


def test_an_admin_key_is_refused_even_if_it_were_known():
    admin = mint_seeded(6, KeyKind.ADMIN)
    with pytest.raises(InvalidApiKey):
        make(row_of(admin)).authenticate(bearer(admin), NOW)


def test_a_test_key_opens_as_a_live_one_does():
    key = mint_seeded(7, KeyKind.TEST)
    assert make(row_of(key)).authenticate(bearer(key), NOW).user_id == "ann"


def test_a_revocation_holds_for_the_next_request():
    keyring = make()
    assert keyring.authenticate(bearer(KEY), NOW)
    keyring.apply(replace(ROW, revoked_at=int(NOW), version=2))
    with pytest.raises(InvalidApiKey):
        keyring.authenticate(bearer(KEY), NOW)


def test_a_suspension_holds_for_the_next_request_and_so_does_its_end():
    keyring = make()
    for suspended, active in [
        (replace(ANN, status=Status.SUSPENDED), ANN),
        (replace(ORG, status=Status.SUSPENDED), ORG),
    ]:
        keyring.apply(suspended)
        with pytest.raises(AccountSuspended) as caught:
            keyring.authenticate(bearer(KEY), NOW)
        assert (caught.value.status, caught.value.code) == (403, "account_suspended")
        keyring.apply(active)
        assert keyring.authenticate(bearer(KEY), NOW)


def test_only_the_owner_of_a_key_learns_of_a_suspension():
    keyring = make(replace(ANN, status=Status.SUSPENDED))
    with pytest.raises(InvalidApiKey):
        keyring.authenticate(bearer(FORGED), NOW)


def test_a_user_who_moves_is_charged_to_the_new_organization():
    keyring = make(Organization(org_id="other", created_at=1), replace(ANN, org_id="other"))
    assert keyring.authenticate(bearer(KEY), NOW).org_id == "other"


def test_applying_a_row_twice_changes_nothing():
    keyring = make(ORG, ANN, ROW, ROW)
    assert [key.key_id for key in keyring.keys_of("ann")] == [ROW.key_id]
    assert [user.user_id for user in keyring.users_after("")] == ["ann"]
    assert [org.org_id for org in keyring.organizations_after("")] == ["acme"]


def test_what_was_made_of_rows_is_good_for_one_version_of_them():
    keyring = make()
    versions = [keyring.version]
    for row in (replace(ORG, monthly_budget=5), replace(ROW, rpm=3)):
        keyring.apply(row)
        versions.append(keyring.version)
    with keyring.watch():
        for _ in keyring.prepare({}, {}, "file"):
            pass
        assert keyring.version == versions[-1]
        keyring.take(keyring.prepared)
    versions.append(keyring.version)
    assert len({*versions}) == 4


def test_addresses_are_found_whatever_their_capitals_and_freed_by_a_deletion():
    keyring = make()
    assert keyring.user_with_email("ann@EXAMPLE.org") == ANN
    gone = replace(ANN, deleted_at=2)
    keyring.apply(gone)
    assert keyring.user_with_email("ann@example.org") is None
    bob = User(user_id="bob", org_id="acme", email="ann@example.org", created_at=3)
    keyring.apply(bob)
    keyring.apply(gone)
    assert keyring.user_with_email("ann@example.org") == bob


def test_lists_go_on_after_the_last_id_seen():
    keyring = make(*(User(user_id=name, org_id="acme", created_at=1) for name in ("c", "b", "B")))
    assert [user.user_id for user in keyring.users_after("")] == ["B", "ann", "b", "c"]
    assert [user.user_id for user in keyring.users_after("ann")] == ["b", "c"]
    assert [user.user_id for user in keyring.users_after("az")] == ["b", "c"]
    assert list(keyring.users_after("c")) == []


def test_the_last_use_is_kept_for_storing_once():
    keyring = make()
    assert keyring.use(ROW.key_id) == Use(ROW.key_id, 0, None, 0)
    assert keyring.used_since_stored() == []
    keyring.authenticate(bearer(KEY), NOW, "192.0.2.1")
    keyring.authenticate(bearer(KEY), NOW + 0.7, "192.0.2.2")
    used = Use(ROW.key_id, int(NOW), "192.0.2.2", 2)
    assert keyring.use(ROW.key_id) == used
    assert keyring.used_since_stored() == [used]
    assert keyring.used_since_stored() == []
    keyring.not_stored([used])
    keyring.not_stored([used])
    assert keyring.used_since_stored() == [used]


def test_a_refused_request_is_no_use():
    keyring = make(replace(ANN, status=Status.SUSPENDED))
    with pytest.raises(AccountSuspended):
        keyring.authenticate(bearer(KEY), NOW)
    assert keyring.used_since_stored() == []
