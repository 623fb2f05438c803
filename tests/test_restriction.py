"""What of a change holds even when it cannot be recorded: that which takes something away."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.identity import ApiKey, FailureMode, Organization, Status, User
from gwproxy.core.restriction import restricted

ORG = Organization(org_id="acme", created_at=1)
USER = User(user_id="ann", created_at=1)
KEY = ApiKey(key_id="key_1", user_id="ann", prefix="p", digest=b"1", created_at=1)


@pytest.mark.parametrize(
    ("row", "was", "becomes", "holds"),
    [
        (USER, {"status": Status.ACTIVE}, {"status": Status.SUSPENDED}, True),
        (USER, {"status": Status.SUSPENDED}, {"status": Status.ACTIVE}, False),
        (USER, {"monthly_limit": 5}, {"monthly_limit": 4}, True),
        (USER, {"monthly_limit": 5}, {"monthly_limit": 6}, False),
        (USER, {"monthly_limit": 5}, {"monthly_limit": None}, False),
        (USER, {"monthly_limit": None}, {"monthly_limit": 0}, True),
        (USER, {"deleted_at": None}, {"deleted_at": 9}, True),
        (USER, {"email": None}, {"email": "a@b"}, False),
        (KEY, {"revoked_at": None}, {"revoked_at": 9}, True),
        (KEY, {"expires_at": None}, {"expires_at": 9}, True),
        (KEY, {"expires_at": 9}, {"expires_at": None}, False),
        (KEY, {"allowed_models": None}, {"allowed_models": ("a",)}, True),
        (KEY, {"allowed_models": ("a",)}, {"allowed_models": ("a", "b")}, False),
        (KEY, {"rpm": 9}, {"rpm": 1}, True),
        (ORG, {"monthly_budget": 9}, {"monthly_budget": 1}, True),
        (ORG, {"failure_mode": None}, {"failure_mode": FailureMode.CLOSED}, True),
        (ORG, {"failure_mode": None}, {"failure_mode": FailureMode.OPEN}, False),
        (ORG, {"fallback_daily_limit": None}, {"fallback_daily_limit": 0}, True),
        (ORG, {"fallback_daily_limit": None}, {"fallback_daily_limit": 5}, False),
        (ORG, {"fallback_daily_limit": 5}, {"fallback_daily_limit": 4}, True),
        (ORG, {"fallback_daily_limit": 5}, {"fallback_daily_limit": None}, False),
        (ORG, {"allowed_features": ("a",)}, {"allowed_features": ()}, True),
    ],
)
def test_what_takes_something_away_holds_and_what_gives_does_not(row, was, becomes, holds):
    before = replace(row, **was)
    after = replace(before, **becomes, version=2)
    assert restricted(before, after) == (after if holds else before)


def test_of_a_mixed_change_only_the_restriction_is_left():
    before = replace(KEY, rpm=10, tpm=10, allowed_models=("a", "b"))
    after = replace(before, rpm=5, tpm=20, allowed_models=("b", "c"), name="new", version=2)
    assert restricted(before, after) == replace(before, rpm=5, allowed_models=("b",), version=2)


_NUMBER = st.none() | st.integers(0, 3)


@given(_NUMBER, _NUMBER, _NUMBER, _NUMBER)
def test_no_limit_ever_grows(rpm, tpm, new_rpm, new_tpm):
    before = replace(KEY, rpm=rpm, tpm=tpm)
    found = restricted(before, replace(before, rpm=new_rpm, tpm=new_tpm))
    for each in fields(KEY):
        was, now = getattr(before, each.name), getattr(found, each.name)
        assert was == now or was is None or now < was
