"""Outages of the database and of the journal, over real sockets and on real files: who is served,
within which bound, what monitors are told, and that all of it is in the ledger afterwards, once.
"""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gwproxy.cli import check
from gwproxy.demo import DemoUpstream
from gwproxy.storage.verify import findings
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, UPSTREAM_TOKEN, bearer, chat, make_key
from tests.kills import Place, Strike, Where, why_no_tracing
from tests.outages import (
    MODEL,
    Apart,
    JournalApart,
    assert_ledger,
    assert_told_the_truth,
    crowd,
    deleted,
    failing,
    full,
    keep_older,
    locked,
    overwritten,
    prepared,
    replaced,
    small_disk,
)
from tests.scene import until

COST = 15_000
"""Nano-USD of the harness's answer: 11 tokens in, 2 out."""


@contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    """The database is gone, and what could take its place cannot be put there."""
    obstacle = folder / "gwproxy.db.unfinished"
    obstacle.mkdir()
    away = folder / "away"
    away.mkdir()
    for file in folder.glob("gwproxy.db*"):
        if file.is_file() and not file.name.endswith(".lock"):
            file.rename(away / file.name)
    yield
    for file in away.iterdir():
        file.rename(folder / file.name)
    obstacle.rmdir()


async def organization(front: Front, org_id: str, **fields: Any) -> str:
    """A key of a user of a new organization."""
    made = await front.client.post(
        "/admin/organizations", json={"org_id": org_id, **fields}, headers=ADMIN
    )
    assert made.status == 201, await made.text()
    user = {"user_id": f"{org_id}-user", "org_id": org_id}
    assert (await front.client.post("/admin/users", json=user, headers=ADMIN)).status == 201
    return await make_key(front.client, f"{org_id}-user")


async def ask(front: Front, key: str, **fields: Any) -> Any:
    answer = await front.client.post(
        "/v1/chat/completions", json=chat(**fields), headers=bearer(key)
    )
    await answer.read()
    return answer


async def ready(front: Front) -> tuple[int, dict[str, str]]:
    answer = await front.client.get("/health/ready")
    return answer.status, await answer.json()


async def metric(front: Front, name: str) -> float:
    text = await (await front.client.get("/metrics", headers=ADMIN)).text()
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def rows(front: Front, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(front.gateway.database)) as connection:
        assert [*findings(connection)] == []
        return connection.execute(sql).fetchall()


async def caught_up(front: Front) -> None:
    assert front.gateway.app is not None
    store = front.gateway.app._store
    await until(lambda: store.writer.applied == store.ledger.state.lsn, 10)


async def test_in_an_outage_the_closed_are_refused_and_the_open_served_within_their_bound(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway()
    closed = await organization(front, "shut", failure_mode="closed")
    # Three answers and a bit; each is held at 20,000 or so before it is known to cost 15,000.
    served = await organization(
        front, "open", failure_mode="open", fallback_daily_limit_usd="0.00005"
    )
    assert (await ask(front, served)).headers["x-gateway-mode"] == "normal"
    await caught_up(front)
    assert front.gateway.app is not None
    told = await asyncio.to_thread(check.summary, front.gateway.app.config)
    assert told["failure"]["worst_case"] == {
        "organizations_served": 1,
        "usd_per_day": "0.000050000",
    }
    with moved_away(front.gateway.database.parent):
        await front.gateway.lines("database lost")
        told = await asyncio.to_thread(check._worst_case_line, front.gateway.app.config)
        assert told.startswith("not known: ") and "is gone" in told
        assert await ready(front) == (
            503,
            {"status": "unavailable", "journal": "ok", "database": "lost"},
        )
        assert (await front.client.get("/health/live")).status == 200
        assert await metric(front, "gwproxy_storage_state") == 1

        refused = await ask(front, closed)
        assert refused.status == 503
        assert (await refused.json())["error"]["code"] == "storage_unavailable"
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.headers["x-gateway-mode"] == "normal"

        answers = [await ask(front, served, max_tokens=2) for _ in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
        assert {answer.headers["x-gateway-mode"] for answer in answers} == {"degraded"}
        assert answers[0].headers["x-gateway-scope"] == "outage"
        error = (await answers[-1].json())["error"]
        assert error["gateway"]["scope"] == "outage"
        assert error["gateway"]["settled_usd"] == "0.000045000"
        assert await metric(front, "gwproxy_degraded_exposure_usd") == 0.000045

        usage = await front.client.get("/v1/usage", headers=bearer(served))
        assert usage.headers["x-gateway-mode"] == "degraded"
        shown = (await usage.json())["scopes"][-1]
        assert (shown["scope"], shown["limit_usd"]) == ("outage", "0.000050000")
        receipt = await front.client.get(
            f"/v1/receipts/{answers[0].headers['x-request-id']}", headers=bearer(served)
        )
        assert (await receipt.json())["degraded"] is True
    [report] = await front.gateway.lines("database recovered")
    assert (report["served"], report["refused"]) == (3, 1)
    assert await ready(front) == (200, {"status": "ok", "journal": "ok", "database": "ok"})
    assert await metric(front, "gwproxy_storage_state") == 0
    for key in (closed, served):
        answer = await ask(front, key)
        assert (answer.status, answer.headers["x-gateway-mode"]) == (200, "normal")
    await caught_up(front)
    assert rows(front, "SELECT degraded, count(*), sum(cost) FROM request GROUP BY degraded") == [
        (0, 3, 3 * COST),
        (1, 3, 3 * COST),
    ]
    assert rows(front, "SELECT spent FROM balance WHERE account = 'outage:open'") == [(3 * COST,)]
    lines = await front.gateway.lines("request")
    assert sum("degraded" in line for line in lines) == 5


async def test_where_all_are_served_in_an_outage_the_process_stays_ready(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway(GWPROXY__FAILURE__MODE="open")
    with moved_away(front.gateway.database.parent):
        await front.gateway.lines("database lost")
        assert await ready(front) == (
            200,
            {"status": "degraded", "journal": "ok", "database": "lost"},
        )
        assert (await ask(front, front.key)).headers["x-gateway-mode"] == "degraded"
        # Who calls is known from memory: an outage never makes a good key a bad one, or the other
        # way round; and what is forbidden now is forbidden at once.
        bad = await ask(front, front.key[:-1] + ("a" if front.key[-1] != "a" else "b"))
        assert bad.status == 401
        keys = await front.client.get("/admin/users/alice/api-keys", headers=ADMIN)
        [key] = (await keys.json())["data"]
        gone = await front.client.delete(
            f"/admin/users/alice/api-keys/{key['key_id']}", headers=ADMIN
        )
        assert gone.status == 204
        assert (await ask(front, front.key)).status == 401
    await front.gateway.lines("database recovered")
    await caught_up(front)
    assert rows(front, "SELECT count(*) FROM api_key WHERE revoked_at IS NULL") == [(0,)]


async def test_a_lost_database_is_made_anew_beside_the_traffic(start_gateway: StartGateway) -> None:
    front = await start_gateway(GWPROXY__FAILURE__MODE="open")
    assert (await ask(front, front.key)).status == 200
    front.gateway.database.unlink()
    await front.gateway.lines("database lost")
    assert (await ask(front, front.key)).headers["x-gateway-mode"] == "degraded"
    [line] = await front.gateway.lines("database rebuilt")
    assert line["source"] == "the journal alone"
    await front.gateway.lines("database recovered")
    assert (await ask(front, front.key)).headers["x-gateway-mode"] == "normal"
    await caught_up(front)
    assert rows(front, "SELECT count(*), sum(cost) FROM request") == [(3, 3 * COST)]


async def test_without_its_journal_nobody_is_served_in_either_mode(
    start_gateway: StartGateway,
) -> None:
    """Writes to a file that was deleted or moved succeed, and nobody would find them."""
    front = await start_gateway(GWPROXY__FAILURE__MODE="open")
    journal = front.gateway.database.parent / "journal"
    journal.rename(journal.with_name("away"))
    await front.gateway.lines("journal lost")
    status, state = await ready(front)
    assert (status, state["status"], state["journal"]) == (503, "unavailable", "lost")
    refused = await ask(front, front.key)
    assert (refused.status, (await refused.json())["error"]["code"]) == (503, "storage_unavailable")
    assert refused.headers["Retry-After"]
    journal.with_name("away").rename(journal)
    await front.gateway.lines("journal recovered")
    assert (await ask(front, front.key)).status == 200
    await until_ready(front)
    await caught_up(front)
    assert rows(front, "SELECT count(*), sum(cost) FROM request") == [(1, COST)]


async def until_ready(front: Front) -> None:
    while (await ready(front))[0] != 200:
        pass


# -- drills on the real process --------------------------------------------------------------------

traced = pytest.mark.skipif(bool(why_no_tracing()), reason=why_no_tracing())


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


@pytest_asyncio.fixture
async def demo(record: Path) -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=UPSTREAM_TOKEN, record_file=record)
    await demo.start()
    yield demo
    await demo.stop()


FAULTS = {
    "deleted": deleted,
    "overwritten": overwritten,
    "replaced": replaced,
    "locked": locked(30),
    "io-error": failing("EIO", "pwrite64"),
    "sync-error": failing("EIO", "fdatasync"),
    "read-only": failing("EROFS", "pwrite64"),
}


@pytest.mark.slow
@pytest.mark.timeout(180)
@traced
@pytest.mark.parametrize("name", FAULTS)
async def test_everybody_is_told_the_truth_and_the_ledger_is_whole(
    tmp_path: Path, demo: DemoUpstream, record: Path, name: str
) -> None:
    place = prepared(tmp_path / "place", demo)
    async with place.life() as life:
        async with crowd(place, life) as callers:
            await callers.burst(40)
            keep_older(place)
            await callers.burst(20)
            async with FAULTS[name](place, life):
                await callers.until("lost")
                await callers.burst(300)
            await callers.until("ok")
            await callers.burst(40)
        await life.stop()  # it is the same process
    counts = assert_told_the_truth(callers)
    assert counts["shut", 503, "normal"] and counts["open", 200, "degraded"], counts
    assert_ledger(place, record, callers.got)
    report(place, name, counts)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_full_disk_is_an_outage_until_there_is_room(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    with small_disk(tmp_path / "small", "2m") as small:
        base = prepared(tmp_path / "place", demo, path=small / "gwproxy.db")
        place = Apart(base.folder, base.keys, small)
        async with place.life() as life:
            async with crowd(place, life) as callers:
                await callers.burst(40)
                async with full(small):
                    await callers.until("lost")
                    await callers.burst(100)
                await callers.until("ok")
                await callers.burst(40)
            await life.stop()
        counts = assert_told_the_truth(callers)
        assert counts["shut", 503, "normal"] and counts["open", 200, "degraded"], counts
        assert_ledger(place, record, callers.got)
        report(place, "disk-full", counts)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_with_no_room_for_the_journal_nobody_is_let_in_in_either_mode(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    with small_disk(tmp_path / "small", "4m") as small:
        base = prepared(tmp_path / "place", demo, 1, journal=small / "journal")
        place = JournalApart(base.folder, base.keys, small)
        async with place.life() as life:
            async with crowd(place, life, callers=8) as callers:
                await callers.burst(40)
                async with full(small):
                    # What was reserved beforehand is used up first.
                    async with asyncio.timeout(60):
                        while callers.ready[-1][2] != 503:
                            await callers.burst(50)
                    before = len(callers.told)
                    await asyncio.sleep(1)
                    during = callers.told[before:]
                    assert {(told.org, told.status, told.code) for told in during} == {
                        ("open", 503, "storage_unavailable"),
                        ("shut", 503, "storage_unavailable"),
                    }
                    assert callers.ready[-1][2] == 503
                await until(lambda: callers.told[-1].status == 200, 20)
            await life.stop()
        assert 401 not in {told.status for told in callers.told}
        assert_ledger(place, record, callers.got)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_thousand_at_once_come_through_both_transitions(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    place = prepared(tmp_path / "place", demo)
    async with place.life() as life:
        async with crowd(place, life, callers=0) as callers, asyncio.TaskGroup() as group:
            # Let in before it, answered and settled in it.
            first = group.create_task(callers.burst(1000, f"{MODEL}+delay-4000"))
            await until(lambda: len(demo.requests) >= 1000, 60)
            async with deleted(place, life):
                await callers.until("lost")
            await first
            assert {(told.status, told.mode) for told in callers.told} == {(200, "normal")}
            # And on the other side some are let in before the end, some after it.
            while callers.ready[-1][3] == "lost":
                await callers.burst(250)
            await callers.burst(1000)
        await life.stop()
    counts = assert_told_the_truth(callers)
    assert sum(counts.values()) >= 2000
    assert_ledger(place, record, callers.got)
    report(place, "thousand", counts)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_kill_9_in_an_outage_loses_nothing_and_does_not_renew_the_bound(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    place = prepared(tmp_path / "place", demo)
    async with place.life() as life, crowd(place, life) as first, locked(9)(place, life):
        await first.until("lost")
        while not any(told.status == 429 for told in first.told):
            await first.burst(40)  # until the bound is reached
        life.kill()
    async with place.life() as life:
        async with crowd(place, life, callers=1) as second:
            async with locked(8)(place, life):
                await second.until("lost")
                # What was held when it was killed may leave a little: no more than that.
                while not any(told.status == 429 for told in second.told):
                    await second.burst(20)
            await second.until("ok")
        await life.stop()
    for each in (first, second):
        assert_told_the_truth(each)
    assert_ledger(place, record, [*first.got, *second.got])


@pytest.mark.slow
@pytest.mark.timeout(180)
@traced
async def test_kill_9_while_the_database_catches_up_books_nothing_twice(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    place = prepared(tmp_path / "place", demo)
    async with place.life() as life, crowd(place, life) as first, AsyncExitStack() as stack:
        async with locked(8)(place, life):
            await first.until("lost")
            await first.burst(400)
            strike = Strike("pwrite64", 3, Where.LOG)
            await stack.enter_async_context(strike.from_now_on(place, life))
        await life.ended()  # in the middle of the first commit
    async with place.life() as life:
        async with crowd(place, life, callers=1) as second:
            await second.until("ok")
        await life.stop()
    assert_ledger(place, record, [*first.got, *second.got])


def report(place: Place, name: str, counts: Counter[tuple[str, int, str]]) -> None:
    """The figures, for whoever runs this with -s."""
    lines = [json.loads(line) for line in place.log.read_text().splitlines() if line[0] == "{"]
    told = [
        {k: line[k] for k in ("event", "cause", "lost_s", "replayed", "source") if k in line}
        for line in lines
        if line["event"].startswith("database")
    ]
    print(f"\n{name}: {dict(counts)}\n{told}")
