"""The ledger's tables: what the writer makes of a journal, and what becomes of it in a fault."""

import asyncio
import json
import os
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.identity import ApiKey, Organization, Status, User
from gwproxy.core.ledger import VOID, Request, State, apply
from gwproxy.core.period import periods
from gwproxy.core.records import Adjust, Admin, Alert, Close, Mark, decode
from gwproxy.storage import directory
from gwproxy.storage import ledger as storage_ledger
from gwproxy.storage.database import CHECKPOINT_BYTES, Database
from gwproxy.storage.ledger import LOADED_MS, begin_epoch, load_state, read_mark, retry_after_s
from gwproxy.storage.verify import verify
from tests.ledgers import (
    DAY,
    MOVES,
    START,
    Place,
    catch_up,
    no_breath,
    play,
    settled,
    tables,
    truth,
)
from tests.scene import until

moves = st.lists(
    st.tuples(st.sampled_from(MOVES), st.integers(0, 50), st.integers(0, 50)),
    min_size=30,
    max_size=120,
)


def replayed(place: Place) -> State:
    """The whole journal, read back."""
    state = State()
    cursor = place.journal.find(0)
    while True:
        payloads, cursor = place.journal.read(cursor, 1000, 1 << 20)
        if not payloads:
            return state
        for payload in payloads:
            apply(state, decode(payload))


def figures(state: State, since: str = "") -> dict:
    """What a state knows, as values, but balances of before `since` only where a hold is open."""
    return {
        "lsn": state.lsn,
        "t": state.t,
        "balances": {
            key: balance.figures()
            for key, balance in state.balances.items()
            if key[1] >= since or balance.held
        },
        "holds": {
            r: (h.reserve, h.attempt, h.holds, h.hidden, h.mark, h.tokens)
            for r, h in state.holds.items()
        },
        "alerts": {alert for alert in state.alerts if alert[1] >= since},
        "breakers": {
            name: (b.lsn, b.t, b.before, b.after, b.until, b.why)
            for name, b in state.breakers.items()
        },
        "idempotency": [*state.idempotency.items()],
    }


@given(moves=moves, size=st.integers(1, 12), life=st.integers(1, 6))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_any_history_in_any_batches_leads_to_the_same_rows(
    tmp_path_factory, moves, size, life
):
    """In batches of `size` moves, by writers that each live for a few, as in one batch from the
    first record on; and all of it adds up."""
    place = await Place(tmp_path_factory.mktemp("one")).open()
    for turn, start in enumerate(range(0, len(moves), size)):
        if turn % life == 0:
            writer = place.writer()
        play(place.live, moves[start : start + size])
        await catch_up(writer)
    assert place.heard == []
    assert await verify(place.database) == []

    fresh = await Place(tmp_path_factory.mktemp("two")).open()
    await fresh.database.commit(lambda c: c.execute("UPDATE organization SET created_at = 1"))
    await place.database.commit(lambda c: c.execute("UPDATE organization SET created_at = 1"))
    writer = place.writer(fresh.database)
    await catch_up(writer)
    assert await tables(fresh.database) == await tables(place.database)

    since = periods(place.live.state.t - LOADED_MS)[0]
    loaded = await load_state(place.database, breathe=no_breath)
    assert figures(loaded, since) == figures(place.live.state, since)
    assert figures(replayed(place)) == figures(place.live.state)
    await fresh.close()
    await place.close()


# -- what fails, and what comes of it ------------------------------------------------------------


@pytest.fixture
async def place(tmp_path):
    async with await Place(tmp_path).open() as place:
        yield place


async def assert_exact(place: Place, folder: Path) -> None:
    assert settled(await tables(place.database)) == await truth(place, folder)
    assert await verify(place.database) == []


class Faulty:
    """A database that fails as it is told: `before` and `after` are called around each commit, and
    `inside` in its transaction, after the rows; what they raise is what the writer gets."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.before = self.inside = self.after = lambda *_: None

    def __getattr__(self, name: str):
        return getattr(self.database, name)

    async def commit(self, work):
        def changed(connection):
            result = work(connection)
            self.inside(connection)
            return result

        self.before()
        try:
            return await self.database.commit(changed)
        finally:
            self.after()


def failing(error: BaseException, times: int = 1):
    left = [times]

    def fail(*_):
        if left[0]:
            left[0] -= 1
            raise error

    return fail


class Full(Faulty):
    """On a disk without room, for as long as `full` is set."""

    full = False

    async def commit(self, work):
        [[pages]] = await self.database.read("PRAGMA page_count")
        await self.database.read(f"PRAGMA max_page_count = {pages if self.full else 2**30}")
        return await super().commit(work)


async def test_a_full_disk_is_lost_at_once_and_over_when_there_is_room(place, tmp_path_factory):
    database = Full(place.database)
    writer = place.writer(database)
    place.live.requests(50)
    await catch_up(writer)
    database.full = True
    place.live.requests(2000)
    for _ in range(3):
        assert await writer.step() == 0
        assert place.heard == [("lost", "database or disk is full")]
        assert (await read_mark(place.database)).lsn == 100
    database.full = False
    assert await catch_up(writer) == 4000
    assert place.heard[1:] == [("ok", "")]
    await assert_exact(place, tmp_path_factory.mktemp("truth"))


async def test_a_lock_held_from_outside_is_lost_after_five_seconds_and_not_before(
    place, tmp_path_factory
):
    writer = place.writer()
    place.live.requests(10)
    other = sqlite3.connect(place.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert await writer.step() == 0
    place.now += 4.9
    writer.tick()
    assert await writer.step() == 0
    assert place.heard == []
    place.now += 0.2
    writer.tick()
    assert place.heard == [("lost", "database is locked")]
    other.close()
    assert await catch_up(writer) == 20
    assert place.heard[1:] == [("ok", "")]
    await assert_exact(place, tmp_path_factory.mktemp("truth"))


async def test_while_the_process_itself_stood_still_nobody_waited_for_the_database(place):
    writer = place.writer()
    place.live.requests(10)
    other = sqlite3.connect(place.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert await writer.step() == 0
    place.now += 31.0
    writer.tick(30.0)
    place.now += 3.9
    writer.tick()
    assert place.heard == []
    place.now += 0.2
    writer.tick()
    assert place.heard == [("lost", "database is locked")]
    other.close()


async def test_a_loop_that_was_held_up_is_noticed(place, monkeypatch):
    writer, stopping, late = place.writer(), asyncio.Event(), []
    monkeypatch.setattr(storage_ledger, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(writer, "tick", late.append)
    async with asyncio.TaskGroup() as group:
        group.create_task(writer.run(stopping))
        await until(lambda: bool(late))
        time.sleep(0.3)  # noqa: ASYNC251  nothing else runs meanwhile
        seen = len(late)
        await until(lambda: len(late) > seen)
        stopping.set()
    assert 0.2 < max(late) < 2


async def test_slow_with_progress_is_not_lost(place):
    """Something is always waiting, and something is always committed."""
    faulty = Faulty(place.database)
    writer = place.writer(faulty)

    def slow() -> None:
        place.live.requests(5)
        place.now += 4.5
        writer.tick()

    faulty.after = slow
    place.live.requests(5)
    for _ in range(4):
        assert await writer.step() == 10
        writer.tick()
    assert place.heard == []


async def test_a_commit_that_hangs_is_lost_while_it_hangs(place):
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    place.live.requests(5)

    def hang() -> None:
        place.now += 5.1
        writer.tick()
        assert place.heard == [("lost", "a commit is taking too long")]

    faulty.before = hang
    assert await writer.step() == 10
    assert len(place.heard) == 1  # what came before was committed, but too late to trust it again
    faulty.before = lambda: None
    assert await writer.step() == 0
    assert place.heard[1:] == [("ok", "")]


@pytest.mark.parametrize("when", ["before", "inside", "after"])
async def test_a_commit_whose_outcome_is_unknown_is_neither_lost_nor_made_twice(
    place, tmp_path_factory, when
):
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    play(place.live, [(move, a, 7 * a) for a, move in enumerate(MOVES * 3)])
    setattr(faulty, when, failing(sqlite3.OperationalError("disk I/O error")))
    assert await writer.step() == 0
    assert place.heard == [("lost", "disk I/O error")]
    entries = len(await place.database.read("SELECT 1 FROM entry"))
    assert (entries > 0) == (when == "after")
    await catch_up(writer)
    assert place.heard[1:] == [("ok", "")]
    await assert_exact(place, tmp_path_factory.mktemp("truth"))


async def test_a_transaction_that_sqlite_rolled_back_by_itself_is_not_taken_for_committed(
    place, tmp_path_factory
):
    """As on a full disk: what follows would be committed on its own, statement by statement."""
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    place.live.requests(20)
    faulty.inside = lambda connection: connection.execute("ROLLBACK")
    assert await writer.step() == 0
    assert place.heard == [("lost", "SQLite has rolled back")]
    assert (await read_mark(place.database)).lsn == 0
    faulty.inside = lambda _: None
    await catch_up(writer)
    await assert_exact(place, tmp_path_factory.mktemp("truth"))


# -- the file under the connection ---------------------------------------------------------------


def overwritten(path: Path) -> None:
    """In place: the same file, with another content of the same length."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:-1] + bytes([data[-1] ^ 1]))


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    copy.rename(path)


GONE = {
    "deleted": (lambda path: path.rename(path.with_name("away")), "the file is gone"),
    "replaced": (replaced, "another file stands in its place"),
    "overwritten": (overwritten, "somebody else has written to the file"),
    "cut": (lambda path: os.truncate(path, 4096), "somebody else has written to the file"),
}


@pytest.mark.parametrize("how", GONE)
@pytest.mark.parametrize("seen_by", ["the look of each second", "a commit"])
async def test_a_file_that_is_not_ours_any_more_takes_no_commit(place, how, seen_by):
    writer = place.writer()
    place.live.requests(20)
    await catch_up(writer)
    harm, words = GONE[how]
    harm(place.path)
    if seen_by == "a commit":
        place.live.requests(20)
        assert await writer.step() == 0
    else:
        writer.tick()
    assert place.heard == [("lost", words)]
    assert writer.applied == 40
    for _ in range(3):  # it stays so, and does nothing to the file
        assert await writer.step() == 0
    assert len(place.heard) == 1


async def test_a_file_that_comes_back_is_the_same_database(place, tmp_path_factory):
    writer = place.writer()
    place.live.requests(20)
    await catch_up(writer)
    away = place.path.with_name("away")
    place.path.rename(away)
    place.live.requests(20)
    assert await writer.step() == 0
    assert await writer.step() == 0
    away.rename(place.path)
    await catch_up(writer)
    assert [state for state, _ in place.heard] == ["lost", "ok"]
    await assert_exact(place, tmp_path_factory.mktemp("truth"))


async def test_our_own_checkpoints_are_nobody_else(place):
    writer = place.writer()
    await catch_up(writer)
    before = os.stat(place.path)
    lengths = []
    for _ in range(12):
        place.live.requests(1000, users=1000)
        assert await catch_up(writer) == 2000
        writer.tick()
        lengths.append(place.path.with_name("gwproxy.db-wal").stat().st_size)
    assert os.stat(place.path).st_mtime_ns != before.st_mtime_ns, "nothing was brought in"
    assert max(lengths) < 2 * CHECKPOINT_BYTES, "the log was not begun anew"
    await place.database.reopen()  # closing brings the rest in
    writer.tick()
    assert place.heard == []


async def test_a_log_that_was_deleted_is_noticed_and_nothing_of_it_is_lost(place, tmp_path_factory):
    writer = place.writer()
    place.live.requests(20)
    await catch_up(writer)
    place.path.with_name("gwproxy.db-wal").unlink()
    place.live.requests(20)
    await writer.step()  # into a file without a name
    assert place.heard[0][0] == "lost"
    assert "write-ahead log is gone" in place.heard[0][1]
    await catch_up(writer)
    assert place.heard[1:] == [("ok", "")]
    await assert_exact(place, tmp_path_factory.mktemp("truth"))


# -- the mark ------------------------------------------------------------------------------------


async def change_meta(place: Place, sql: str) -> None:
    await place.database.commit(lambda c: c.execute(f"UPDATE meta SET {sql}"))


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("ledger_id = 'another'", "belongs to another ledger"),
        ("applied_chain = applied_chain + 1", "record 40 of the database is not that of"),
        ("applied_lsn = 39", "record 39 of the database is not that of"),
        ("applied_lsn = 41", "the database has record 41, which the journal has not"),
    ],
)
async def test_a_database_that_is_not_of_this_journal_is_lost(place, sql, words):
    place.live.requests(20)
    await catch_up(place.writer())
    await change_meta(place, sql)
    writer = place.writer()
    for _ in range(2):
        assert await writer.step() == 0
    assert [(state, words in cause) for state, cause in place.heard] == [("lost", True)]


async def test_a_mark_that_moved_under_the_writer_stops_its_commit(place):
    writer = place.writer()
    place.live.requests(20)
    await catch_up(writer)
    await change_meta(place, "applied_lsn = 39")
    place.live.requests(1)
    assert await writer.step() == 0
    assert place.heard == [("lost", "the database does not stand at record 40 of this ledger")]
    assert len(await place.database.read("SELECT 1 FROM request")) == 20


async def test_records_that_the_journal_has_no_more_are_a_gap_that_nothing_skips(tmp_path):
    place = await Place(tmp_path).open(segment_bytes=8192)
    for _ in range(20):
        place.live.requests(5)
        place.live.sync()
    drop = place.journal.begin_drop(150)
    drop.run()
    place.journal.end_drop(drop, None)
    writer = place.writer()
    assert await writer.step() == 0
    assert place.heard == [("lost", "the journal does not go back to record 1")]
    await place.close()


async def test_the_journal_is_on_the_disk_before_the_database_is(place):
    order = []

    async def synced(lsn: int) -> None:
        order.append(("journal", lsn))
        await place.synced(lsn)

    faulty = Faulty(place.database)
    faulty.before = lambda: order.append(("database", place.journal.synced))
    writer = place.writer(faulty, synced=synced)
    for n in (3, 4):
        place.live.requests(n)
        await writer.step()
    assert order == [("journal", 6), ("database", 6), ("journal", 14), ("database", 14)]


async def test_a_journal_that_cannot_be_synced_keeps_everything_out_of_the_database(place):
    async def synced(lsn: int) -> None:
        raise OSError("Input/output error")

    writer = place.writer(synced=synced)
    place.live.requests(3)
    assert await writer.step() == 0
    assert (await read_mark(place.database)).lsn == 0
    assert place.heard == []  # the database is not to blame, for as long as nobody waits
    place.now += 5
    assert await writer.step() == 0
    assert place.heard == [("lost", "OSError: Input/output error")]


async def test_each_start_is_an_epoch_past_all_that_was_seen(tmp_path):
    async with await Database.open(tmp_path / "gwproxy.db") as database:
        assert (await read_mark(database)).ledger_id is None
        first = await begin_epoch(database, "one")
        second = await begin_epoch(database, "two", seen_epoch=7)
        assert (first.ledger_id, first.epoch) == ("one", 1)
        assert (second.ledger_id, second.epoch) == ("one", 8)
        assert await read_mark(database) == second


async def test_an_epoch_is_never_forgotten_by_an_older_file(place):
    """A backup in the place of the database bears the epoch of when it was made."""
    await change_meta(place, "epoch = 0")
    place.live.requests(1)
    await catch_up(place.writer())
    assert (await read_mark(place.database)).epoch == place.journal.epoch == 1


# -- a killed process ----------------------------------------------------------------------------


async def test_whatever_a_crash_leaves_is_completed_from_the_journal(tmp_path_factory):
    """The files as they are at some moment, before, in and after each transaction."""
    place = await Place(tmp_path_factory.mktemp("first")).open()
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    snapshots = []

    def snapshot(*_) -> None:
        folder = tmp_path_factory.mktemp("crash")
        for name in ("gwproxy.db", "gwproxy.db-wal"):
            shutil.copyfile(place.path.with_name(name), folder / name)
        shutil.copytree(place.folder, folder / "journal")
        snapshots.append(folder)

    faulty.before = faulty.inside = faulty.after = snapshot
    for part in range(4):
        play(place.live, [(move, a + part, 5 * a) for a, move in enumerate(MOVES)])
        place.live.requests(300, users=300)
        await catch_up(writer)
        await place.database.checkpoint()
    marks = []
    for folder in snapshots:
        again = await Place(folder).open(create=False)
        writer = again.writer()
        await catch_up(writer)
        marks.append(again.live.journal.next_lsn)
        assert again.heard == []
        await assert_exact(again, tmp_path_factory.mktemp("truth"))
        await again.close()
    assert len(marks) == 12
    assert marks == sorted(marks)
    await place.close()


# -- the rows ------------------------------------------------------------------------------------


async def test_lines_are_only_ever_added(place):
    place.live.requests(5)
    await catch_up(place.writer())
    before = await place.database.read("SELECT * FROM entry")
    for sql in (
        "UPDATE entry SET amount = 0",
        "DELETE FROM entry",
        "INSERT INTO entry SELECT * FROM entry",
    ):
        with pytest.raises(StorageUnavailable) as caught:
            await place.database.commit(lambda c, sql=sql: c.execute(sql))
        assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)
    assert await place.database.read("SELECT * FROM entry") == before


@pytest.mark.parametrize("mark", [0, 4])
async def test_a_record_that_was_committed_already_is_not_passed_over(place, mark):
    """Should a mark ever lie, the same lines come a second time: a fault, not a second charge."""
    place.live.requests(5)
    await catch_up(place.writer())
    chain = place.journal.find(mark).chain
    await change_meta(place, f"applied_lsn = {mark}, applied_chain = {chain}")
    before = await tables(place.database)
    writer = place.writer()
    for _ in range(3):
        assert await writer.step() == 0
    assert [state for state, _ in place.heard] == ["lost"]
    assert await tables(place.database) == before


async def test_archived_lines_may_go_and_everything_still_adds_up(place):
    r = place.live.reserve("ann", 500)
    place.live.settle(r, 700)
    place.live.t += 40 * DAY
    key = ("user:ann", "2025-11")
    place.live.post(
        Close, account=key[0], period=key[1], spent=700, credited=0, count=1, hash="abc"
    )
    place.live.post(Adjust, accounts=(key,), delta=-5, type="credit", actor="root", reason="late")
    await catch_up(place.writer())
    for _ in range(2):
        assert await verify(place.database) == []
        await place.database.commit(
            lambda c: c.execute(
                "DELETE FROM entry WHERE account = ? AND period = ? AND lsn < 3", key
            )
        )
    with pytest.raises(StorageUnavailable):
        await place.database.commit(lambda c: c.execute("DELETE FROM entry WHERE lsn > 3"))
    [balance] = await place.database.read("SELECT * FROM balance WHERE account = 'user:ann'")
    assert tuple(balance) == ("user:ann", "2025-11", -5, 0, 0, place.live.t)


async def test_a_balance_too_old_to_be_in_memory_is_fetched_before_it_changes(place):
    r = place.live.reserve("ann", 500)
    place.live.settle(r, 400)
    place.live.t += 100 * DAY
    place.live.reserve("ann", 1)
    await catch_up(place.writer())
    state = await load_state(place.database, breathe=no_breath)
    assert ("user:ann", "2025-11") not in state.balances
    for delta in (-30, -3):
        place.live.post(
            Adjust,
            accounts=(("user:ann", "2025-11"),),
            delta=delta,
            type="reconcile",
            actor="root",
            reason="",
        )
        await catch_up(place.writer())
    [balance] = await place.database.read(
        "SELECT spent, count FROM balance WHERE account = 'user:ann' AND period = '2025-11'"
    )
    assert tuple(balance) == (367, 1)
    assert await verify(place.database) == []


async def test_an_account_knows_when_it_was_last_charged_or_corrected_also_after_a_restart(place):
    charged = place.live.t
    place.live.settle(place.live.reserve("ann", 500), 400)
    place.live.t += DAY
    place.live.settle(place.live.reserve("ann", 500), 0, outcome=VOID)  # it counts nowhere
    key = ("user:cat", "2025-11")
    place.live.post(Adjust, accounts=(key,), delta=5, type="grant", actor="root", reason="")
    await catch_up(place.writer())
    state = await load_state(place.database, breathe=no_breath)
    times = {account: state.balances[account, "2025-11"].t for account in ("user:ann", "user:cat")}
    assert times == {"user:ann": charged, "user:cat": place.live.t}


async def test_a_balance_that_was_archived_begins_anew_also_within_one_batch(place):
    """And is not fetched from where its old row still stands."""
    key = ("user:ann", "2025-11")
    place.live.settle(place.live.reserve("ann", 500), 400)
    place.live.t += 100 * DAY
    place.live.reserve("ann", 1)
    await catch_up(place.writer())
    place.live.post(Close, account=key[0], period=key[1], spent=400, credited=0, count=1, hash="")
    place.live.post(Adjust, accounts=(key,), delta=-3, type="late", actor="root", reason="")
    await catch_up(place.writer())
    [balance] = await place.database.read(
        "SELECT spent, count FROM balance WHERE account = ? AND period = ?", key
    )
    assert tuple(balance) == (-3, 0)
    assert await verify(place.database) == []


async def test_every_field_of_a_request_has_its_column(place):
    place.live.reserve("ann", 5, edits=("max_tokens",), stream=True, degraded=True)
    place.live.retry(1, "gemini", 9)
    place.live.settle(1, 12, log_id="01ABC")
    await catch_up(place.writer())
    [row] = await place.database.read("SELECT * FROM request")
    request = replayed_request(place)
    columns = dict(row)
    for name, value in msgspec.structs.asdict(request).items():
        match name:
            case "tokens":
                found = tuple(columns.pop(f"{kind}_tokens") for kind in TOKENS)
            case "edits" | "rates":
                found = tuple(json.loads(columns.pop(name)))
            case "attempts":
                value = [list(msgspec.structs.astuple(each)) for each in value]
                found = json.loads(columns.pop(name))
            case _:
                found = columns.pop(name)
        assert found == value, name
    assert columns == {"period": "2025-11"}


TOKENS = ("input", "cache_read", "cache_write", "output", "reasoning")


def replayed_request(place: Place) -> Request:
    state, last = State(), None
    payloads, _ = place.journal.read(place.journal.find(0), 1000, 1 << 20)
    for payload in payloads:
        last = apply(state, decode(payload)).request or last
    return last


async def test_each_change_of_the_directory_leaves_a_trace(place):
    digest = b"\xdd" * 32
    user = User(user_id="ann", email="a@example.org", created_at=1)
    key = ApiKey(key_id="k", user_id="ann", prefix="gw_live_x", digest=digest, created_at=2)
    who = {"actor": "admin-key 1", "address": "127.0.0.1", "request_id": "req_1"}
    place.live.post(Admin, action="user.create", user=user, **who)
    place.live.post(Admin, action="key.create", key=key, **who)
    place.live.post(Admin, action="key.revoke", key=replace(key, revoked_at=9, version=2), **who)
    await catch_up(place.writer())
    rows = [dict(row) for row in await place.database.read("SELECT * FROM audit")]
    assert [(r["lsn"], r["t"], r["action"], r["noun"], r["id"]) for r in rows] == [
        (1, START, "user.create", "user", "ann"),
        (2, START, "key.create", "api_key", "k"),
        (3, START, "key.revoke", "api_key", "k"),
    ]
    assert {(r["actor"], r["address"], r["request_id"]) for r in rows} == {tuple(who.values())}
    befores = [r["before"] and json.loads(r["before"]) for r in rows]
    afters = [json.loads(r["after"]) for r in rows]
    assert befores == [None, None, afters[1]]
    assert afters[0]["email"] == "a@example.org"
    assert [after.get("revoked_at") for after in afters[1:]] == [None, 9]
    assert not any("digest" in after for after in afters)
    stored = await directory.load(place.database)
    assert [row for row in stored if not isinstance(row, Organization)] == [
        user,
        replace(key, revoked_at=9, version=2),
    ]


async def test_addresses_may_change_hands_within_one_batch(place):
    """Each change is written in its turn: of the last ones alone, two would have one address."""
    ann = User(user_id="ann", email="a@example.org", created_at=1)
    bob = User(user_id="bob", email="b@example.org", created_at=1)
    place.live.post(Admin, action="", user=bob)
    place.live.post(Admin, action="", user=ann)
    await catch_up(place.writer())
    for row in (
        replace(bob, status=Status.SUSPENDED),
        replace(ann, email="c@example.org"),
        replace(bob, email="a@example.org"),
        replace(ann, email="b@example.org"),
    ):
        place.live.post(Admin, action="", user=row)
    await catch_up(place.writer())
    assert place.heard == []
    rows = await directory.load(place.database)
    assert {row.email for row in rows if isinstance(row, User)} == {
        "a@example.org",
        "b@example.org",
    }


async def test_an_open_reservation_comes_back_as_it_was(place):
    """At each of its turns, and after two months."""
    r = place.live.reserve("ann", 500, hidden=True)
    place.live.settle(place.live.reserve("ann", 500), 400)
    turns = [
        lambda: None,
        lambda: place.live.post(Mark, r=r, tokens=5, cost=50),
        lambda: place.live.extend(r, 900),
        lambda: place.live.retry(r, "gemini", 700),
        lambda: place.live.retry(r, "openai", 800, hidden=True),
        lambda: place.live.post(Mark, r=r, tokens=7, cost=70),
    ]
    writer = place.writer()
    for days in (0, 100):
        place.live.t += days * DAY
        for turn in turns:
            turn()
            await catch_up(writer)
            loaded = await load_state(place.database, breathe=no_breath)
            since = periods(place.live.state.t - LOADED_MS)[0]
            assert figures(loaded, since) == figures(place.live.state, since)
            assert await verify(place.database) == []


async def test_more_rows_than_a_page_are_all_loaded(place):
    place.live.requests(1300, users=1300)
    for number in range(1300):
        place.live.reserve(f"user{number}")
        place.live.post(
            Adjust,
            accounts=(("org:acme", "2025-11"),),
            delta=1,
            type="grant",
            actor="root",
            reason="",
            idempotency_key=f"k{number}",
        )
        place.live.post(
            Alert, account=f"user:u{number}", period="2025-11", percent=80, spent=8, limit=10
        )
    await catch_up(place.writer())
    breaths = []

    async def breathe() -> None:
        breaths.append(1)

    state = await load_state(place.database, breathe=breathe)
    assert figures(state) == figures(place.live.state)
    assert len(breaths) > 8


# -- how it works --------------------------------------------------------------------------------


async def test_a_transaction_holds_no_more_than_5000_records_and_a_slice_no_more_than_32(place):
    seen = []

    async def breathe() -> None:
        seen.append(1)

    place.live.requests(4000)
    writer = place.writer(breathe=breathe)
    assert await writer.step() == 5000
    assert len(seen) >= 5000 // 32
    assert (await read_mark(place.database)).lsn == writer.applied == 5000
    assert await writer.step() == 3000
    assert await writer.step() == 0


async def test_a_busy_loop_makes_its_transactions_shorter_and_does_not_lose_the_database(place):
    async def breathe() -> None:
        place.now += 0.1  # everybody else comes first
        writer.tick()

    place.live.requests(1000)
    writer = place.writer(breathe=breathe)
    steps = 0
    while await writer.step():
        steps += 1
    assert writer.applied == 2000
    assert place.now > 5  # together they took longer than a database may be without a commit
    assert steps > 5
    assert place.heard == []


async def test_it_is_not_back_while_it_is_far_behind(place):
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    faulty.before = failing(sqlite3.OperationalError("disk I/O error"))
    place.live.requests(4000)
    assert await writer.step() == 0
    assert await writer.step() == 5000
    assert len(place.heard) == 1
    assert await writer.step() == 3000
    assert place.heard[1:] == [("ok", "")]


async def test_a_lost_database_is_back_only_after_a_commit_even_if_nothing_waits(place):
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    place.live.requests(1)
    faulty.after = failing(sqlite3.OperationalError("disk I/O error"))
    assert await writer.step() == 0  # it was committed: nothing waits any more
    faulty.before = failing(sqlite3.OperationalError("disk I/O error"), 2)
    for _ in range(2):
        assert await writer.step() == 0
        assert len(place.heard) == 1
    assert await writer.step() == 0
    assert place.heard[1:] == [("ok", "")]


async def test_its_task_commits_what_comes_and_ends_when_all_is_in(place):
    faulty = Faulty(place.database)
    committed = asyncio.Event()
    faulty.after = committed.set
    writer = place.writer(faulty, breathe=lambda: asyncio.sleep(0))
    stopping = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(writer.run(stopping))
        for n in range(1, 6):
            place.live.requests(2)
            writer.wake()
            await committed.wait()
            committed.clear()
            assert (await read_mark(place.database)).lsn == n * 4
        assert not running.done()
        place.live.requests(300)
        stopping.set()
        writer.wake()
    assert (await read_mark(place.database)).lsn == 620
    assert place.heard == []


async def test_its_task_tries_again_with_growing_pauses_and_a_stop_does_not_wait_for_it(place):
    faulty = Faulty(place.database)
    writer = place.writer(faulty)
    faulty.before = failing(sqlite3.OperationalError("disk I/O error"), 2)
    stopping = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(writer.run(stopping))
        place.live.requests(2)
        writer.wake()
        assert [await place.hearing.get(), await place.hearing.get()] == ["lost", "ok"]
        assert writer.applied == 4
        faulty.before = failing(sqlite3.OperationalError("disk I/O error"), 1000)
        place.live.requests(2)
        writer.wake()
        assert await place.hearing.get() == "lost"
        stopping.set()
        writer.wake()
    assert writer.applied == 4


def test_the_pauses_between_tries_grow_to_a_second_and_no_further():
    pauses = [retry_after_s(failures) for failures in (1, 2, 3, 4, 5, 100_000)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


async def test_under_load_it_makes_few_commits_and_the_first_one_at_once(place):
    faulty = Faulty(place.database)
    commits = []
    faulty.before = lambda: commits.append(place.live.state.lsn)
    writer = place.writer(faulty, breathe=lambda: asyncio.sleep(0))
    stopping = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(writer.run(stopping))
        await asyncio.sleep(0)
        for _ in range(100):
            place.live.requests(1)
            writer.wake()
            await asyncio.sleep(0.002)
        stopping.set()
        writer.wake()
    assert writer.applied == 200
    assert commits[0] < 20
    assert len(commits) < 20


async def test_its_task_looks_at_the_file_while_there_is_nothing_to_do(place):
    writer = place.writer()
    stopping = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(writer.run(stopping))
        place.path.rename(place.path.with_name("away"))
        await place.hearing.get()
        stopping.set()
        writer.wake()
    assert place.heard == [("lost", "the file is gone")]


# -- verify --------------------------------------------------------------------------------------

PLANTED = {
    "UPDATE balance SET spent = spent + 1 WHERE account = 'user:ann'": "spent and the sum",
    "UPDATE balance SET credited = 1 WHERE account = 'user:ann'": "credited and the sum",
    "DELETE FROM balance WHERE account = 'org:acme'": "spent and the sum",
    "INSERT INTO balance VALUES ('user:zoe', '2025-11', 5, 0, 0, 0)": "spent and the sum",
    "UPDATE balance SET count = 2 WHERE account = 'key:key_ann'": "the count of an account",
    "UPDATE balance SET count = -1 WHERE account = 'provider:openai'": "fewer requests than none",
    "UPDATE request SET cost = cost + 1 WHERE lsn = 1": "the cost of a request",
    "UPDATE request SET overrun = 0 WHERE lsn = 1": "its overrun",
    "UPDATE request SET user_id = 'bob' WHERE lsn = 1": "the cost of a request",
    "INSERT INTO entry VALUES (2, 'user:ann', '2025-11', 'late', 0, 1, 0, '', '')": None,
    "INSERT INTO entry VALUES (2, 'user:bob', '2025-11', 'settle', 5, 1, NULL, NULL, NULL)": (
        "the cost of a request"
    ),
    "INSERT INTO entry VALUES (3, 'provider:x', '2025-11-30', 'settle', 0, 1, NULL, NULL, NULL)": (
        "a charge of nothing"
    ),
    "DELETE FROM hold": "an open request without a hold",
    "UPDATE hold SET reservation = 1": "an open hold of no open request",
    "UPDATE hold SET holds = replace(holds, 'user:bob', 'user:ann')": "a hold that is not that",
    "UPDATE hold SET holds = replace(holds, '2025-11\"', '2025-10\"')": "a hold that is not that",
    "UPDATE hold SET holds = replace(holds, '1000', '-1')": "a hold that is not that",
    "UPDATE hold SET reserve = replace(reserve, 'req_', 'rex_')": "a hold that is not that",
    "UPDATE meta SET applied_lsn = 2": "a row from after the mark",
}


@pytest.mark.parametrize("sql", PLANTED)
async def test_what_does_not_add_up_is_found(place, sql):
    place.live.settle(place.live.reserve("ann", 500), 700)
    place.live.reserve("bob", 1000)
    await catch_up(place.writer())
    assert await verify(place.database) == []
    await place.database.commit(lambda c: c.execute(sql))
    found = await verify(place.database)
    words = PLANTED[sql]
    assert any(words in finding.what for finding in found) if words else found == [], found


async def test_a_thousand_findings_are_enough(place):
    place.live.requests(400)
    await catch_up(place.writer())
    await place.database.commit(lambda c: c.execute("UPDATE request SET cost = cost + 1"))
    found = await verify(place.database)
    assert len(found) == 1000
    assert str(found[0]).startswith("the cost of a request and its lines: req_0000")
    assert str(found[0]).endswith(" (+1)")
