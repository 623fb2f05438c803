"""Outages of the database and of the journal, over real sockets and on real files: who is served,
within which bound, what monitors are told, and that all of it is in the ledger afterwards, once.
"""

import asyncio
import io
import json
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient

from gwproxy.cli import check
from gwproxy.demo import DemoUpstream
from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from gwproxy.storage.database import Database, DatabaseInUse
from gwproxy.storage.segments import JournalInUse
from gwproxy.storage.verify import findings
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, UPSTREAM_TOKEN, Gateway, bearer, chat, make_key
from tests.kills import Place, Strike, Where, why_no_tracing
from tests.outages import (
    BOUND_NANOS,
    MODEL,
    Apart,
    Crowd,
    JournalApart,
    MovedClock,
    Told,
    assert_ledger,
    assert_told_the_truth,
    crowd,
    deleted,
    failing,
    full,
    keep_older,
    locked,
    moved_away,
    out_of_reach,
    overwritten,
    prepared,
    read_only,
    replaced,
    small_disk,
    unprivileged,
    unwritable,
    why_not_immutable,
)
from tests.scene import until

COST = 15_000
"""Nano-USD of the harness's answer: 11 tokens in, 2 out."""


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
        "unknown": None,
    }
    with moved_away(front.gateway.database.parent):
        await front.gateway.lines("database lost")
        line = await asyncio.to_thread(check._worst_case_line, front.gateway.app.config)
        assert line.startswith("not known: ") and "is gone" in line
        summary = await asyncio.to_thread(check.summary, front.gateway.app.config)
        assert summary["failure"]["worst_case"] == {
            "organizations_served": None,
            "usd_per_day": None,
            "unknown": line.removeprefix("not known: "),
        }
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


@pytest.mark.timeout(30)
async def test_a_fifo_in_the_place_of_the_database_is_set_aside_and_waited_for_by_nobody(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway(GWPROXY__FAILURE__MODE="open")
    assert (await ask(front, front.key)).status == 200
    database = front.gateway.database
    database.unlink()
    os.mkfifo(database)
    await front.gateway.lines("database lost")
    assert (await ask(front, front.key)).headers["x-gateway-mode"] == "degraded"
    await front.gateway.lines("database recovered")
    assert database.with_name("gwproxy.db.aside-1").is_fifo()
    await caught_up(front)
    assert rows(front, "SELECT count(*), sum(cost) FROM request") == [(2, 2 * COST)]


async def test_a_journal_that_is_cut_under_the_running_server_lets_nobody_in(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway(GWPROXY__FAILURE__MODE="open")
    await caught_up(front)
    assert front.gateway.app is not None
    journal = front.gateway.app._store.journal
    active = journal.directory / journal._segments[-1].name
    size = active.stat().st_size
    os.truncate(active, 600)
    [line] = await front.gateway.lines("journal lost")
    assert line["cause"] == f"somebody has cut {active} to 600 of its {size} bytes"
    assert (await ask(front, front.key)).status == 503


async def test_deleted_lock_files_let_no_second_process_in_and_are_put_back(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway()
    lock = front.gateway.database.with_name("gwproxy.db.lock")
    journal = front.gateway.database.parent / "journal"
    second = Kept(front.gateway.database, journal, segment_bytes=1 << 20)
    lock.unlink()
    (journal / "lock").unlink()
    with pytest.raises(JournalInUse, match="in use by another process"):
        async with opened(second, Log(io.StringIO(), "error")):
            pytest.fail("a second one was let in")
    lock.unlink(missing_ok=True)
    await front.gateway.lines("lock file deleted, and put back")
    assert lock.read_text() == f"{os.getpid()}\n"
    with pytest.raises(DatabaseInUse):
        await Database.open(front.gateway.database)
    assert (await ask(front, front.key)).status == 200


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


async def test_a_segment_that_is_taken_away_is_told_and_made_good_beside_the_traffic(
    start_gateway: StartGateway,
) -> None:
    """A lost database would be made anew from it: so what it was needed for is backed up now."""
    before = await start_gateway()
    assert (await ask(before, before.key)).status == 200
    await before.client.close()
    folder = before.gateway.database.parent
    gateway = Gateway(folder, before.gateway._config)
    async with TestClient(gateway) as client:
        front = Front(client, gateway, before.key)
        assert await metric(front, "gwproxy_journal_segments_missing") == 0
        oldest, *_, active, spare = sorted((folder / "journal").glob("*.journal"))
        oldest.unlink()
        spare.unlink()
        [line] = await front.gateway.lines("journal segment missing")
        assert (line["level"], line["files"]) == ("error", [oldest.name])
        assert (await ask(front, front.key)).status == 200
        await front.gateway.lines("backed up")
        await front.gateway.lines("no journal segment missing any more")
        assert await metric(front, "gwproxy_journal_segments_missing") == 0
        assert (await ask(front, front.key)).headers["x-gateway-mode"] == "normal"
        # Another spare was prepared, and the active one is not touched.
        assert active.exists()
        assert len([*(folder / "journal").glob("*.journal")]) == 2
        assert (await ready(front))[0] == 200

        front.gateway.database.unlink()
        await front.gateway.lines("database recovered")
        await caught_up(front)
        assert rows(front, "SELECT count(*), sum(cost) FROM request") == [(3, 3 * COST)]


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
    "immutable": read_only,
}


@pytest.mark.slow
@pytest.mark.timeout(180)
@traced
@pytest.mark.parametrize("name", FAULTS)
async def test_everybody_is_told_the_truth_and_the_ledger_is_whole(
    tmp_path: Path, demo: DemoUpstream, record: Path, name: str
) -> None:
    if name == "immutable" and (why := why_not_immutable(tmp_path)):
        pytest.skip(why)
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
    await assert_ledger(place, demo, record, callers.got)
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
        await assert_ledger(place, demo, record, callers.got)
        report(place, "disk-full", counts)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["full", "unwritable"])
async def test_with_no_room_for_the_journal_nobody_is_let_in_in_either_mode(
    tmp_path: Path, demo: DemoUpstream, record: Path, how: str
) -> None:
    with small_disk(tmp_path / "small", "4m") as small:
        base = prepared(tmp_path / "place", demo, 1, journal=small / "journal")
        place = JournalApart(base.folder, base.keys, small)
        async with place.life(*unprivileged()) as life:
            async with crowd(place, life, callers=8) as callers:
                await callers.burst(40)
                async with AsyncExitStack() as stack:
                    if how == "full":
                        await stack.enter_async_context(full(small))
                    else:
                        stack.enter_context(unwritable(place.journal))
                    # What was reserved beforehand is used up first.
                    async with asyncio.timeout(120):
                        while callers.ready[-1][2] != 503:
                            await callers.burst(50)
                    before = len(callers.told)
                    await until(lambda: len(callers.told) >= before + 60, 20)
                    # Some of them may have been on their way when it happened.
                    during = callers.told[before + 20 :]
                    assert {(told.org, told.status, told.code) for told in during} == {
                        ("open", 503, "storage_unavailable"),
                        ("shut", 503, "storage_unavailable"),
                    }
                    assert callers.ready[-1][2] == 503
                await until(lambda: callers.told[-1].status == 200, 20)
            await life.stop()
        assert 401 not in {told.status for told in callers.told}
        await assert_ledger(place, demo, record, callers.got)


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
            async with out_of_reach(place, life):
                await callers.until("lost")
                await first
                assert {(told.status, told.mode) for told in callers.told} == {(200, "normal")}
                await callers.burst(1000)
                assert callers.ready[-1][3] == "lost"
            # And on the other side some are let in before the end, some after it.
            while callers.ready[-1][3] == "lost":
                await callers.burst(250)
            await callers.burst(1000)
        await life.stop()
    counts = assert_told_the_truth(callers)
    assert sum(counts.values()) >= 3000
    # Of five hundred at once a few are let in: what they set aside has to fit into the bound.
    assert counts["shut", 503, "normal"] >= 500 and counts["open", 200, "degraded"], counts
    await assert_ledger(place, demo, record, callers.got)
    report(place, "thousand", counts)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_kill_9_in_an_outage_loses_nothing_and_does_not_renew_the_bound(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    place = prepared(tmp_path / "place", demo)
    async with place.life() as life, crowd(place, life) as first, out_of_reach(place, life):
        await first.until("lost")
        while not any(told.status == 429 for told in first.told):
            await first.burst(40)  # until the bound is reached
        life.kill()
    async with place.life() as life:
        async with crowd(place, life, callers=1) as second:
            async with out_of_reach(place, life):
                await second.until("lost")
                # What was held when it was killed may leave a little: no more than that.
                while not any(told.status == 429 for told in second.told):
                    await second.burst(20)
            await second.until("ok")
        await life.stop()
    for each in (first, second):
        assert_told_the_truth(each)
    await assert_ledger(place, demo, record, [*first.got, *second.got])


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
    await assert_ledger(place, demo, record, [*first.got, *second.got])


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_folder_that_may_not_be_written_to_stays_lost_until_it_may(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    """What a process has open it may still write to: so the file goes as well, and for want of
    rights no other can be put there."""
    kept = tmp_path / "kept"
    kept.mkdir()
    base = prepared(tmp_path / "place", demo, path=kept / "gwproxy.db")
    place = Apart(base.folder, base.keys, kept)
    async with place.life(*unprivileged()) as life:
        async with crowd(place, life) as callers:
            await callers.burst(40)
            async with deleted(place, life):
                with unwritable(kept):
                    await callers.until("lost")
                    await until(lambda: '"database not rebuilt"' in place.log.read_text(), 30)
                    await callers.burst(100)
                    assert callers.ready[-1][3] == "lost"
            await callers.until("ok")
            await callers.burst(40)
        await life.stop()
    counts = assert_told_the_truth(callers)
    assert counts["shut", 503, "normal"] and counts["open", 200, "degraded"], counts
    await assert_ledger(place, demo, record, callers.got)
    report(place, "unwritable", counts)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_clock_that_leaps_over_a_month_in_an_outage_renews_the_bound_once(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    """A new day of the ledger has a bound of its own; one that has been is not begun again."""
    now = datetime.now(UTC)
    first = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    last = first - timedelta(days=1)
    clock = MovedClock(tmp_path / "clock")
    clock.set(first - timedelta(minutes=2))
    place = prepared(tmp_path / "place", demo)
    async with place.life(*clock.wrapper) as life:
        async with crowd(place, life) as callers:
            await callers.burst(40)
            async with out_of_reach(place, life):
                await callers.until("lost")
                await exhausted(callers)

                # As after a machine's sleep: little enough to be believed at once.
                clock.set(first + timedelta(minutes=2))
                assert any(told.status == 200 for told in await answers(callers))
                await exhausted(callers)

                # Back, months back, and on by a month, which nobody believes so soon.
                for moved in (timedelta(minutes=-2), timedelta(days=-70), timedelta(days=32)):
                    clock.set(first + moved)
                    assert {told.status for told in await answers(callers)} == {429}, moved
                clock.set(first + timedelta(minutes=3))
            await callers.until("ok")
            told = [await callers.ask("shut") for _ in range(3)]
            assert [each.status for each in told if each] == [200] * 3
        await life.stop()
    counts = assert_told_the_truth(callers)
    await assert_ledger(place, demo, record, callers.got)
    report(place, "clock", counts)
    with closing(sqlite3.connect(place.database)) as connection:
        spent = dict(
            connection.execute("SELECT period, spent FROM balance WHERE account = 'outage:open'")
        )
        assert spent.keys() == {f"{last:%Y-%m-%d}", f"{first:%Y-%m-%d}"}
        assert all(BOUND_NANOS * 0.9 < each <= BOUND_NANOS for each in spent.values()), spent
        # Each request was charged to the month of its own time, which never went back.
        times = connection.execute("SELECT t, period FROM request ORDER BY lsn").fetchall()
    assert times == sorted(times)
    assert {period for _, period in times} == {f"{last:%Y-%m}", f"{first:%Y-%m}"}
    for t, period in times:
        assert f"{datetime.fromtimestamp(t / 1000, UTC):%Y-%m}" == period


async def exhausted(callers: Crowd) -> None:
    """Ask until nothing is left of the bound, and nothing is held any more that may come back."""
    async with asyncio.timeout(30):
        while {told.status for told in await answers(callers)} != {429}:
            pass


async def answers(callers: Crowd) -> list[Told]:
    """To twenty questions of the open organization, one after the other."""
    told = [await callers.ask("open") for _ in range(20)]
    return [each for each in told if each is not None]


def report(place: Place, name: str, counts: Counter[tuple[str, int, str]]) -> None:
    """The figures, for whoever runs this with -s."""
    lines = [json.loads(line) for line in place.log.read_text().splitlines() if line[0] == "{"]
    told = [
        {k: line[k] for k in ("event", "cause", "lost_s", "replayed", "source") if k in line}
        for line in lines
        if line["event"].startswith("database")
    ]
    print(f"\n{name}: {dict(counts)}\n{told}")
