"""What was used: accounts, reports, the look back at requests, over HTTP and against the rows."""

import asyncio
import sqlite3
from collections import defaultdict
from contextlib import closing
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy.core.money import parse_usd
from gwproxy.core.period import DAY_MS
from gwproxy.storage import reports
from gwproxy.storage.database import Database, packaged
from gwproxy.storage.reports import GROUPS, Chosen, Sought
from gwproxy.storage.verify import findings, verify
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, Upstream, make_key
from tests.ledgers import MOVES, Place, catch_up, play, tables
from tests.scene import sends, until


async def ask(front: Front, path: str, status: int = 200) -> Any:
    response = await front.client.get(f"/admin/{path}", headers=ADMIN)
    answer = await response.json()
    assert response.status == status, answer
    return answer


async def used(start_gateway: StartGateway, upstream: Upstream) -> Front:
    """Two users of two organizations, three calls, one of which failed."""
    front = await start_gateway()
    await front.client.post("/admin/organizations", json={"org_id": "acme"}, headers=ADMIN)
    bob = {"user_id": "bob", "org_id": "acme", "monthly_limit_usd": "1"}
    await front.client.post("/admin/users", json=bob, headers=ADMIN)
    alice, front.key = front.key, await make_key(front.client, "bob")
    body = {"model": "mock/echo", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await front.chat(body)).status == 200
    front.key = alice
    assert (await front.chat(body)).status == 200
    upstream.queue.append(sends(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"))
    assert (await front.chat(body)).status == 502
    return front


async def test_an_account_is_shown_as_it_stands_and_with_a_report_where_one_is_asked_for(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await used(start_gateway, upstream)
    bob = await ask(front, "users/bob/usage")
    assert bob["month_usage_usd"] == "0.000015000"  # 11 tokens in, 2 out, at 1 and 2 USD a million
    assert bob["remaining_usd"] == "0.999985000"
    assert (bob["held_usd"], bob["limit_usd"]) == ("0.000000000", "1.000000000")
    assert (bob["request_count"], bob["org_id"]) == (1, "acme")
    assert set(bob) == {
        *("user_id", "org_id", "month_usage_usd", "held_usd", "limit_usd", "remaining_usd"),
        *("current_month", "request_count", "last_update", "resets_at"),
    }
    acme = await ask(front, "organizations/acme/usage?group_by=user")
    assert (acme["month_usage_usd"], acme["limit_usd"]) == ("0.000015000", None)
    [line] = acme["report"]["data"]
    assert (line["user_id"], line["cost_usd"]) == ("bob", "0.000015000")
    assert (await ask(front, "users/nobody/usage", 404))["error"]["code"] == "not_found"
    assert (await ask(front, "organizations/none/usage", 404))["error"]["code"] == "not_found"


async def test_a_caller_is_told_when_his_own_accounts_were_charged(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    bobs = await make_key(front.client, "bob")
    body = {"model": "mock/echo", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await front.chat(body)).status == 200
    shown = {}
    for key in (front.key, bobs):
        answer = await front.client.get("/v1/usage", headers={"Authorization": f"Bearer {key}"})
        for scope in (await answer.json())["scopes"]:
            shown[key, scope["scope"]] = scope["last_update"]
    assert shown[bobs, "key"] is shown[bobs, "user"] is None
    assert shown[front.key, "key"] == shown[front.key, "user"] == shown[bobs, "org"] is not None


async def test_a_report_has_what_was_settled_a_moment_before(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await used(start_gateway, upstream)
    report = await ask(front, "usage?group_by=provider")
    [line] = report["data"]
    assert line["provider"] == "upstream"
    assert (line["request_count"], line["succeeded_count"], line["failed_count"]) == (3, 2, 1)
    assert line["cost_usd"] == report["total"]["cost_usd"] == "0.000030000"
    assert line["tokens"] == {
        **{"input": 22, "cache_read": 0, "cache_write": 0, "output": 4, "reasoning": 0}
    }
    assert (line["attempts"]["count"], line["attempts"]["failed"]) == (3, 1)
    assert line["mean_duration_ms"] >= 0
    assert report["behind"] == 0 and report["as_of_lsn"] > 0
    assert report["from"][-2:] == "01"

    by_user = await ask(front, "usage?group_by=user&limit=1")
    assert [line["user_id"] for line in by_user["data"]] == ["bob"]  # acme comes before default
    rest = await ask(front, f"usage?group_by=user&cursor={by_user['next_cursor']}")
    assert [(line["org_id"], line["user_id"]) for line in rest["data"]] == [("default", "alice")]
    assert rest["next_cursor"] is None
    for group_by in ("provider", "model", "user", "org", "day"):
        report = await ask(front, f"usage?group_by={group_by}")
        assert total_of(report["data"]) == parse_usd(report["total"]["cost_usd"])
    none = await ask(front, "usage?month=2020-01")
    assert (none["data"], none["total"]["request_count"]) == ([], 0)
    assert none["total"]["mean_duration_ms"] is None


def total_of(lines: list[dict[str, Any]]) -> int:
    return sum(parse_usd(line["cost_usd"]) for line in lines)


async def test_requests_are_looked_back_at_newest_first(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await used(start_gateway, upstream)
    found = await ask(front, "requests")
    assert [line["user_id"] for line in found["data"]] == ["alice", "alice", "bob"]
    failed, alices, bobs = found["data"]
    assert (failed["outcome"], failed["status"], failed["cost_usd"]) == (
        "failed",
        502,
        "0.000000000",
    )
    assert (bobs["outcome"], bobs["org_id"], bobs["tokens"]["input"]) == ("completed", "acme", 11)
    assert alices["created_at"] <= failed["created_at"]

    async def seen(query: str) -> list[str]:
        lines, cursor = [], ""
        while cursor is not None:
            page = await ask(front, f"requests?{query}&limit=1&cursor={cursor}")
            lines += [line["request_id"] for line in page["data"]]
            cursor = page["next_cursor"]
        return lines

    first, second, third = bobs["request_id"], alices["request_id"], failed["request_id"]
    assert await seen("") == [third, second, first]
    assert await seen("user_id=alice") == [third, second]
    assert await seen("org_id=acme") == [first]
    assert await seen(f"key_id={alices['key_id']}") == [third, second]
    assert await seen("outcome=failed") == [third]
    assert await seen("outcome=completed") == [second, first]
    assert await seen("provider=upstream&outcome=completed&user_id=bob") == [first]
    assert await seen("model=mock/none") == []
    assert await seen("to=2020-01-01") == []
    assert await seen("from=2020-01-01T00:00:00Z") == [third, second, first]


async def test_a_request_under_way_is_shown_as_open(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    hold = asyncio.Event()
    upstream.script = sends(hold=hold)
    body = {"model": "mock/echo", "messages": [{"role": "user", "content": "Hi"}]}
    async with asyncio.TaskGroup() as group:
        call = group.create_task(front.chat(body))
        await until(lambda: bool(upstream.received))
        [line] = (await ask(front, "requests"))["data"]
        assert (line["outcome"], line["cost_usd"], line["duration_ms"]) == (None, None, None)
        assert (await ask(front, "usage"))["total"]["request_count"] == 0
        assert parse_usd((await ask(front, "users/alice/usage"))["held_usd"]) > 0
        call.cancel()
        hold.set()


WRONG = (
    ("usage?group_by=colour", "group_by"),
    ("usage?month=2026-13", "month"),
    ("usage?month=9999-12", "month"),
    ("usage?month=0000-01", "month"),
    ("usage?month=2026-11&from=2026-11-01", "month"),
    ("usage?from=2026-11-31", "from"),
    ("usage?from=yesterday", "from"),
    ("usage?from=2026-11-21&to=2026-11-01", "from"),
    ("usage?to=0000-00-00", "to"),
    ("usage?limit=0", "limit"),
    ("usage?limit=1001", "limit"),
    ("usage?cursor=zz", "cursor"),
    ("usage?group_by=day&cursor=5b2261225d", "cursor"),  # ["a"], which is no day
    ("usage?user_id=a/b", "user_id"),
    ("usage?model=", "model"),
    ("usage?from=2026-11-01&from=2026-11-02", "from"),
    ("requests?outcome=fine", "outcome"),
    ("requests?from=2026-11-21T12:00:00", "from"),
    ("requests?cursor=5b315d5d", "cursor"),
)


async def test_what_is_wrong_in_a_query_is_named(front: Front) -> None:
    for path, param in WRONG:
        error = (await ask(front, path, 400))["error"]
        assert error["param"] == param, path
        assert f"`{param}`" in error["message"]


async def test_a_parameter_that_is_not_known_is_refused_with_a_hint(front: Front) -> None:
    error = (await ask(front, "usage?groupby=day", 400))["error"]
    assert "Did you mean `group_by`?" in error["message"]
    error = (await ask(front, "users/alice/usage?user_id=bob", 400))["error"]
    assert "`user_id` is not a parameter here" in error["message"]


# -- against the rows ----------------------------------------------------------------------------

moves = st.lists(
    st.tuples(st.sampled_from(MOVES), st.integers(0, 50), st.integers(0, 50)),
    min_size=30,
    max_size=100,
)
DIMENSIONS = ("org_id", "user_id", "provider", "model", "day")


@given(moves=moves, data=st.data())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_every_grouping_adds_up_to_the_total_and_to_the_requests(
    tmp_path_factory, moves, data
) -> None:
    place = await Place(tmp_path_factory.mktemp("place")).open()
    play(place.live, moves)
    await catch_up(place.writer())
    async with place.database.reader() as reader:
        rows = [
            {
                "org_id": row["org_id"],
                "user_id": row["user_id"],
                "provider": row["provider"],
                "model": row["upstream_model"],
                "day": row["t"] // DAY_MS,
                "cost": row["cost"],
                "lsn": row["lsn"],
            }
            for row in await reader.read("SELECT * FROM request WHERE outcome <> 'void'")
        ]
        days = [row["day"] for row in rows] or [0]
        first = data.draw(st.integers(min(days), max(days)))
        last = data.draw(st.integers(first, max(days)))
        filters = {
            name: data.draw(st.sampled_from([None, *sorted({row[name] for row in rows})]))
            for name in DIMENSIONS[:4]
        }
        chosen = Chosen(first, last, **filters)
        wanted = [
            row
            for row in rows
            if first <= row["day"] <= last
            and all(value in (None, row[name]) for name, value in filters.items())
        ]
        total = await reports.used(reader, chosen)
        assert (total["requests"] or 0) == len(wanted)
        assert (total["cost"] or 0) == sum(row["cost"] for row in wanted)
        for (group_by, columns), added_up in product(GROUPS.items(), (1, 4, 20_000)):
            expected: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
            for row in wanted:
                sums = expected[tuple(row[name] for name in columns)]
                sums[0] += 1
                sums[1] += row["cost"]
            found: dict[Any, list[int]] = {}
            after: list[Any] | None = []
            while after is not None:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(reports, "_ADDED_UP", added_up)
                    page, after = await reports.usage(reader, chosen, group_by, after, 3)
                assert len(page) <= 3 or group_by == "line"
                for row in page:
                    key = tuple(row[name] for name in columns)
                    assert key not in found
                    found[key] = [row["requests"], row["cost"]]
            assert found == expected
    await place.close()


async def test_a_page_of_a_report_adds_up_so_many_rows_and_says_where_to_go_on(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(reports, "_ADDED_UP", 5)
    async with await Place(tmp_path).open() as place:
        place.live.requests(60, users=40)
        await catch_up(place.writer())
        async with place.database.reader() as reader:
            users = await reader.read("SELECT DISTINCT user_id FROM usage WHERE grain = 2")
            [days] = await reader.read("SELECT min(day), max(day) FROM usage")
            assert len(users) > 20
            for last, wanted in ((days[1], len(users)), (days[0] - 1, 0)):  # and of no day at all
                chosen, found, pages = Chosen(0, last), 0, 0
                after: list[Any] | None = []
                while after is not None:
                    page, after = await reports.usage(reader, chosen, "user", after, 1000)
                    assert len(page) <= 5
                    found += len(page)
                    pages += 1
                assert found == wanted
                assert pages > len(users) // 5


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        ({}, "request_by_time"),
        ({"provider": "openai"}, "request_by_time"),
        ({"outcome": "completed"}, "request_by_time"),
        ({"org_id": "acme", "user_id": "ann"}, "request_by_user"),
        ({"org_id": "acme", "user_id": "ann", "key_id": "key_ann"}, "request_by_key"),
        ({"key_id": "key_ann", "outcome": "failed"}, "request_by_key"),
        ({"user_id": "ann", "outcome": "failed", "model": "m"}, "request_by_user"),
        ({"org_id": "acme", "outcome": "failed"}, "request_by_outcome"),
        ({"org_id": "acme", "outcome": "completed"}, "request_by_org"),
    ],
)
async def test_of_several_filters_the_narrowest_is_looked_up_and_the_rest_page_by_page(
    tmp_path, asked: dict[str, str], index: str
) -> None:
    indexed, other = Sought(**asked).where()
    conditions = " AND ".join([*indexed.conditions, *other.conditions])
    async with await Place(tmp_path).open() as place, place.database.reader() as reader:
        plan = await reader.read(
            f"EXPLAIN QUERY PLAN SELECT * FROM request WHERE {conditions} {reports._NEWEST}",
            [*indexed.values, *other.values],
        )
    assert [row["detail"].split(" INDEX ")[1].split()[0] for row in plan] == [index]
    alike = len(asked) - (index != "request_by_time")
    assert len(other.conditions) == alike


async def test_a_search_without_an_index_looks_at_so_many_rows_and_says_where_to_go_on(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(reports, "_LOOKED_AT", 7)
    async with await Place(tmp_path).open() as place:
        place.live.requests(40)
        await catch_up(place.writer())
        async with place.database.reader() as reader:
            rows = await reader.read("SELECT lsn FROM request ORDER BY lsn DESC")
            for provider, wanted in (("openai", [row[0] for row in rows]), ("nobody", [])):
                found, before, pages = [], None, 0
                while True:
                    page, before = await reports.requests(
                        reader, Sought(provider=provider), before, 5
                    )
                    found += [each.lsn for each in page]
                    pages += 1
                    if before is None:
                        break
                assert found == wanted
                assert pages >= 40 // 7


class Held:
    """A reader that has its rows already, so that nothing else gives the loop a turn."""

    def __init__(self, rows: list[sqlite3.Row]) -> None:
        self.rows = rows

    async def read(self, sql: str, parameters: Any = ()) -> list[sqlite3.Row]:
        return self.rows


async def test_a_long_page_of_requests_is_read_while_others_have_their_turn(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(reports, "_READ_AT_ONCE", 10)
    async with await Place(tmp_path).open() as place:
        place.live.requests(40)
        await catch_up(place.writer())
        async with place.database.reader() as reader:
            rows = await reader.read("SELECT * FROM request ORDER BY t DESC, lsn DESC")
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        counting = group.create_task(others())
        page, _ = await reports.requests(Held(rows), Sought(), None, len(rows))
        counting.cancel()
    assert [each.lsn for each in page] == [row["lsn"] for row in rows]
    assert turns >= len(rows) // 10 - 1 > 0


async def test_sums_that_come_with_an_upgrade_are_those_of_the_requests_before(tmp_path) -> None:
    async with await Place(tmp_path).open() as place:
        place.live.requests(20)
        reservation = place.live.reserve()
        place.live.retry(reservation, "gemini", 2000)
        place.live.settle(reservation, 50)
        await catch_up(place.writer())
        before = await tables(place.database)
        assert before["usage"] and before["attempted"]
    [upgrade] = [each for each in packaged() if each.name == "0003_usage.sql"]
    with closing(sqlite3.connect(place.path)) as connection:
        connection.executescript(
            "DROP VIEW settled; DROP TABLE usage; DROP TABLE attempted;"
            "DROP INDEX request_by_key; DROP INDEX request_by_outcome;" + upgrade.sql
        )
    async with await Database.open(place.path) as database:
        assert await tables(database) == before
        assert await verify(database) == []


async def test_sums_that_are_wrong_are_found(tmp_path) -> None:
    async with await Place(tmp_path).open() as place:
        reservation = place.live.reserve()
        place.live.retry(reservation, "gemini", 2000)
        place.live.settle(reservation, 50)
        await catch_up(place.writer())
        assert await verify(place.database) == []
        for change in (
            "UPDATE usage SET cost = cost + 1 WHERE grain = 0",
            "UPDATE attempted SET failed = 2",
            "DELETE FROM usage WHERE grain = 2",
        ):
            with pytest.raises(_Undone):
                await place.database.commit(lambda c, change=change: _try(c, change))


class _Undone(Exception):
    pass


def _try(connection: sqlite3.Connection, change: str) -> None:
    connection.execute(change)
    assert list(findings(connection)), change
    raise _Undone
