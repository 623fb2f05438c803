"""Requests that were made before: how they are known again, and how many of them."""

import pytest

from gwproxy.core.errors import Conflict
from gwproxy.core.ledger import REMEMBERED, REMEMBERED_MS
from gwproxy.state.repeats import Made, Repeats, once


def test_a_request_is_known_by_who_asks_for_what_under_which_key() -> None:
    marks = {
        once(actor, route, key, b"{}")
        for actor in ("ann", "bob")
        for route in ("/admin/users", "/admin/organizations")
        for key in ("1", "2")
    }
    assert len({mark.partition(".")[0] for mark in marks}) == 8
    assert once("ann", "/x", "1", b"{}") == once("ann", "/x", "1", b"{}")


def test_a_mark_tells_nothing_of_what_was_sent() -> None:
    mark = once("ann", "/admin/users", "my-secret-key", b'{"email":"ann@example.org"}')
    assert len(mark) == 32 + 1 + 16
    assert not {"ann", "secret", "email"} & {part for part in mark.split(".")}


def test_the_same_request_is_found_and_another_one_under_its_key_refused() -> None:
    made = Repeats()
    assert made.find(None) is None
    mark = once("ann", "/admin/users", "1", b"{}")
    assert made.find(mark) is None
    made.remember(mark, 7, 1000, "user_1")
    made.remember(mark, 8, 1001, "user_2")
    assert made.find(mark) == Made(7, 1000, "user_1", mark)
    with pytest.raises(Conflict) as refused:
        made.find(once("ann", "/admin/users", "1", b"[]"))
    assert refused.value.code == "idempotency_key_reused"


def test_only_the_newest_are_remembered() -> None:
    made = Repeats()
    for lsn in range(REMEMBERED + 2):
        made.remember(f"{lsn}.print", lsn, 1000, None)
    known = [made.find(f"{lsn}.print") is not None for lsn in range(4)]
    assert known == [False, False, True, True]
    assert made.find(f"{REMEMBERED + 1}.print") is not None


def test_a_day_later_a_key_may_be_used_for_something_else() -> None:
    made = Repeats()
    made.remember("a.print", 1, 1000, None)
    made.remember("b.print", 2, 1001, None)
    made.remember("c.print", 3, 1001 + REMEMBERED_MS, None)
    assert made.find("a.other") is None
    with pytest.raises(Conflict):
        made.find("b.other")
    made.remember("a.other", 4, 1002 + REMEMBERED_MS, "user_1")
    assert made.find("a.other") == Made(4, 1002 + REMEMBERED_MS, "user_1", "a.other")
