"""The archive: a month that is long over leaves the tables, and nothing is lost or there twice."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.ledger import apply
from gwproxy.core.records import Adjust, decode
from gwproxy.log import Log
from gwproxy.state.archive import Archive, is_due
from gwproxy.state.ledger import Ledger
from gwproxy.storage import archive_file
from gwproxy.storage.archive_file import SLICE_ROWS, ArchiveRefused, archives, check
from gwproxy.storage.database import Database
from gwproxy.storage.files import OS_FILES, OsFiles
from gwproxy.storage.ledger import Older, Writer, load_state, loaded_since, read_mark
from gwproxy.storage.verify import verify
from tests.harness import CONFIG, Gateway, Upstream, bearer, make_key
from tests.ledgers import DAY, START, Place, no_breath

MONTH = "2025-11"
ROWS = ("entry", "request", "closed", "balance")


class Killed(BaseException):
    """The process ends here."""


class Mortal:
    """Counts what is asked of the disk and the database, and ends the process at one of them."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.asked = 0

    def step(self) -> None:
        self.asked += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class MortalFiles(OsFiles):
    def __init__(self, mortal: Mortal) -> None:
        self._mortal = mortal

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name in ("create", "pwrite", "fsync", "rename", "unlink", "fsync_directory"):
            mortal = object.__getattribute__(self, "_mortal")

            def call(*args: Any) -> Any:
                mortal.step()
                return found(*args)

            return call
        return found


class MortalDatabase:
    """The real one, for the archive alone."""

    def __init__(self, database: Database, mortal: Mortal) -> None:
        self._database = database
        self._mortal = mortal
        self.between: Callable[[], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def commit(self, work: Callable[[Any], Any]) -> Any:
        self._mortal.step()
        result = await self._database.commit(work)
        self._mortal.step()
        if self.between is not None:
            await self.between()
        return result


class Office:
    """A ledger with an archive beside it, and its writer at work."""

    def __init__(self, place: Place, since: str | None = None) -> None:
        self.place = place
        self.live = place.live
        self.mortal = Mortal()
        self.ledger = Ledger(self.live.state, place.journal, lambda: self.live.t)
        self.writer: Writer = place.writer()
        self.ledger.posted = self._posted
        self.database = MortalDatabase(place.database, self.mortal)
        self.words = io.StringIO()
        self.archive = Archive(
            MortalFiles(self.mortal),
            place.path.with_name("archive"),
            self.database,  # type: ignore[arg-type]
            self.ledger,
            self.writer,
            Log(self.words, "debug"),
            since=since or loaded_since(self.live.t),
            keep_months=1,
        )
        self.archive.in_a_hurry = True

    @property
    def folder(self) -> Path:
        return self.place.path.with_name("archive")

    def files(self) -> list[Path]:
        return archives(OS_FILES, self.folder)

    def _posted(self) -> None:
        self.live._have_spare()
        self.writer.wake()
        self.mortal.step()

    async def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        return {
            name: sorted(
                (tuple(r) for r in await self.place.database.read(f"SELECT * FROM {name}")),
                key=repr,
            )
            for name in ROWS
        }

    async def adds_up(self) -> None:
        assert await verify(self.place.database) == []


@asynccontextmanager
async def at_work(place: Place) -> AsyncIterator[Office]:
    office = Office(place)
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(office.writer.run(stopping))
        try:
            yield office
        finally:
            stopping.set()
            office.writer.wake()


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Office]:
    """As at a start: the state is what the database has, and then the journal."""
    place = Place(folder)
    await place.open(create=not place.path.exists())
    try:
        place.live.state = await standing(place)
        place.live.t = max(place.live.state.t, START)
        async with at_work(place) as office:
            yield office
    finally:
        await place.close()


async def standing(place: Place) -> Any:
    state = await load_state(place.database, breathe=no_breath)
    mark = await read_mark(place.database)
    older = Older(place.database, state, loaded_since(mark.t))
    cursor = place.journal.find(mark.lsn)
    while True:
        payloads, cursor = place.journal.read(cursor, 1000, 1 << 20)
        if not payloads:
            return state
        for payload in payloads:
            record = decode(payload)
            await older.ready(record)
            apply(state, record)


def some(office: Office, n: int = 12) -> None:
    """Requests of two months, and what else an account may have."""
    live = office.live
    live.post(
        Adjust,
        accounts=(("user:user1", MONTH),),
        delta=5000,
        type="grant",
        actor="root",
        reason="a gift",
    )
    live.requests(n, users=4)
    r = live.reserve("ann", 500)
    live.retry(r, "gemini", 600)
    live.settle(r, 700)
    r = live.reserve("ann", 500, degraded=True, edits=("max_tokens=5",))
    live.t += DAY  # it runs into the next month and stays what it is
    live.settle(r, 400)
    live.settle(live.reserve("ann", 10), 0, outcome="void")
    live.requests(n, users=3)
    live.settle(live.reserve("ann", 100), 90)
    live.t += 45 * DAY
    live.settle(live.reserve("ann", 100), 80)
    office.writer.wake()


async def standing_rows(office: Office) -> dict[str, list[tuple[Any, ...]]]:
    await office.writer.reached(office.live.state.lsn)
    return await office.rows()


def of_month(rows: list[tuple[Any, ...]], place: int) -> list[tuple[Any, ...]]:
    return [row for row in rows if row[place][:7] == MONTH]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


async def test_a_month_moves_into_a_file_with_all_that_it_had(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        some(office)
        before = await standing_rows(office)
        assert await office.archive.look() == [MONTH]
        await office.adds_up()
        after = await office.rows()
        assert after["entry"] == [row for row in before["entry"] if row[2][:7] != MONTH]
        assert after["request"] == [row for row in before["request"] if row[2] != MONTH]
        assert after["balance"] == [row for row in before["balance"] if row[1][:7] != MONTH]
        [file] = office.files()
        found = check(OS_FILES, file)
        assert {(c[0], c[1], c[4], c[5], c[6], c[7]) for c in after["closed"]} == {
            (*row[:5], found.hash) for row in of_month(before["balance"], 1)
        }
        there = lines(file)
        assert there[0]["k"] == "archive" and there[-1]["k"] == "end"
        entries = [tuple(line.values())[1:] for line in there if line["k"] == "entry"]
        assert sorted(entries, key=repr) == sorted(of_month(before["entry"], 2), key=repr)
        requests = {line["lsn"]: line for line in there if line["k"] == "request"}
        assert sorted(requests) == sorted(row[0] for row in of_month(before["request"], 2))
        assert sum(r["cost"] for r in requests.values()) == sum(
            row[18] for row in of_month(before["request"], 2)
        )
        assert any(r["edits"] == ["max_tokens=5"] for r in requests.values())
        assert office.archive.until == MONTH
        assert file.stat().st_mode & 0o777 == 0o600
        assert await office.archive.look() == []


@pytest.mark.parametrize(
    ("month", "day", "keep", "due"),
    [
        ("2025-11", "2026-01-04", 1, False),  # 34 days after it
        ("2025-11", "2026-01-05", 1, True),
        ("2025-11", "2026-01-05", 2, False),
        ("2025-11", "2026-02-01", 2, True),
        ("2025-11", "2026-12-31", 13, False),
        ("2025-11", "2027-01-01", 13, True),
        ("2025-11", "2035-01-01", 0, False),
    ],
)
def test_when_a_month_is_due(month: str, day: str, keep: int, due: bool) -> None:
    at = datetime.fromisoformat(day).replace(tzinfo=UTC)
    assert is_due(month, int(at.timestamp() * 1000), keep) is due


SLOW = pytest.mark.slow


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=SLOW) for part in (1, 2, 3))])
async def test_wherever_it_is_killed_nothing_is_lost_and_nothing_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(archive_file, "SLICE_ROWS", 11)
    (tmp_path / "whole").mkdir()
    async with opened(tmp_path / "whole") as office:
        some(office, 3)
        before = await standing_rows(office)
        await office.archive.look()
        steps = office.mortal.asked
    assert steps > 20
    for step in range(part, steps, 4):
        folder = tmp_path / f"{step:03}"
        folder.mkdir()
        async with opened(folder) as office:
            some(office, 3)
            await standing_rows(office)
            office.mortal.left = step
            with suppress(Killed):
                await office.archive.look()
            office.mortal.left = None
            await standing_rows(office)
            await office.adds_up()
        async with opened(folder) as office:
            await office.archive.look()
            await office.adds_up()
            after = await standing_rows(office)
            [file] = office.files()
            there = lines(file)
            entries = [tuple(line.values())[1:] for line in there if line["k"] == "entry"]
            assert sorted([*entries, *after["entry"]], key=repr) == before["entry"]
            requests = [line["lsn"] for line in there if line["k"] == "request"]
            every = sorted([*requests, *(row[0] for row in after["request"])])
            assert every == sorted(row[0] for row in before["request"])
            names = [row[:2] for row in [*after["closed"], *after["balance"]]]
            assert sorted(names) == sorted(row[:2] for row in before["balance"])
            assert not (office.folder / "unfinished").exists()


async def test_everything_adds_up_while_the_rows_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_file, "SLICE_ROWS", 7)
    async with opened(tmp_path) as office:
        some(office)
        await standing_rows(office)
        slices = 0

        async def look() -> None:
            nonlocal slices
            slices += 1
            await office.adds_up()

        office.database.between = look
        assert await office.archive.look() == [MONTH]
        assert slices > 8


async def test_no_transaction_removes_more_than_some_rows(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        some(office, 300)
        before = await standing_rows(office)
        counts = [len(before["entry"]) + len(before["request"])]

        async def look() -> None:
            [[n]] = await office.place.database.read(
                "SELECT (SELECT count(*) FROM entry) + (SELECT count(*) FROM request)"
            )
            counts.append(n)

        office.database.between = look
        await office.archive.look()
        assert max(a - b for a, b in pairwise(counts)) == SLICE_ROWS


async def test_an_open_request_keeps_its_month_where_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        r = office.live.reserve("late", 100)
        some(office, 3)
        await standing_rows(office)
        assert await office.archive.look() == []
        with pytest.raises(ArchiveRefused, match="still open"):
            await office.archive.month(MONTH)
        office.live.settle(r, 50)
        assert await office.archive.look() == [MONTH]
        await office.adds_up()


async def test_a_month_that_is_not_long_over_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        some(office, 3)
        with pytest.raises(ArchiveRefused, match="35 days"):
            await office.archive.month("2025-12")
        assert await office.archive.month("2024-01") is False


def late(office: Office, delta: int, account: str = "user:ann") -> None:
    office.ledger.post(
        Adjust(
            **office.ledger.stamp(),
            accounts=((account, MONTH),),
            delta=delta,
            type="reconcile",
            actor="root",
            reason="the invoice",
        )
    )


async def test_an_adjustment_after_the_archive_begins_anew_and_is_archived_in_its_turn(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as office:
        some(office)
        await standing_rows(office)
        await office.archive.look()
        await office.archive.fetch([("user:ann", MONTH)])
        late(office, -30)
        await standing_rows(office)
        await office.adds_up()
        balance = office.live.state.balances["user:ann", MONTH]
        assert balance.figures() == (-30, 0, 0, 0)
        assert await office.archive.look() == [MONTH]
        await office.adds_up()
        first, second = office.files()
        [line] = [line for line in lines(second) if line["k"] == "entry"]
        assert (line["amount"], line["reason"]) == (-30, "the invoice")
        assert check(OS_FILES, second).end.requests == 0
        assert of_month((await office.rows())["entry"], 2) == []
        assert check(OS_FILES, first).end.requests > 0


async def test_an_adjustment_while_a_month_is_closed_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line is in no file: it stays in the tables, and the sum that is closed has it."""
    async with opened(tmp_path) as office:
        some(office)
        await standing_rows(office)
        close = office.archive._close

        async def adjusted(*args: Any) -> None:
            late(office, -30)
            await close(*args)

        monkeypatch.setattr(office.archive, "_close", adjusted)
        assert await office.archive.look() == [MONTH]
        after = await standing_rows(office)
        [line] = of_month(after["entry"], 2)
        assert line[4] == -30
        [file] = office.files()
        [was] = [b for b in check(OS_FILES, file).balances if b.key == ("user:ann", MONTH)]
        [is_] = [row for row in after["closed"] if row[0] == "user:ann"]
        assert is_[4] == was.spent - 30
        await office.adds_up()


async def test_a_let_go_balance_is_fetched_before_it_is_adjusted(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        some(office, 3)
        office.live.t += 100 * DAY
        office.live.settle(office.live.reserve("ann", 100), 90)
        await standing_rows(office)
    async with opened(tmp_path) as office:
        key = ("user:ann", MONTH)
        assert key not in office.live.state.balances
        [[spent]] = await office.place.database.read(
            "SELECT spent FROM balance WHERE account = ? AND period = ?", key
        )
        for account in ("user:ann", "user:nobody"):
            with pytest.raises(AssertionError, match="is to be fetched"):
                late(office, -30, account)
        await office.archive.fetch([key, ("user:nobody", MONTH)])
        late(office, -30)
        late(office, -3, "user:nobody")
        assert office.live.state.balances[key].spent == spent - 30
        await standing_rows(office)
        assert await office.archive.look() == [MONTH, "2025-12", "2026-01"]
        await office.adds_up()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _change(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])


def _repack(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())))


HARM = {"cut": _cut, "changed": _change, "another": _repack}


@pytest.mark.parametrize("harm", HARM)
async def test_nothing_leaves_the_tables_for_a_file_that_is_not_good(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as office:
        some(office)
        before = await standing_rows(office)
        erase = office.archive._erase

        async def harmed(path: Path, hash: str) -> None:
            HARM[harm](path)
            await erase(path, hash)

        monkeypatch.setattr(office.archive, "_erase", harmed)
        with pytest.raises(ArchiveRefused):
            await office.archive.look()
        after = await standing_rows(office)
        assert (after["entry"], after["request"]) == (before["entry"], before["request"])
        await office.adds_up()
        with pytest.raises(ArchiveRefused):
            await office.archive.look()


async def test_a_full_disk_leaves_the_month_where_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        some(office)
        before = await standing_rows(office)

        def short(fd: int, data: bytes, offset: int) -> int:
            return OS_FILES.pwrite(fd, data[: len(data) // 2], offset)

        office.archive._files = Short(short)
        with pytest.raises(ArchiveRefused, match="no room"):
            await office.archive.look()
        assert await office.rows() == before
        assert office.files() == []
        office.archive._files = OS_FILES
        assert await office.archive.look() == [MONTH]


class Short(OsFiles):
    def __init__(self, pwrite: Callable[[int, bytes, int], int]) -> None:
        self.pwrite = pwrite


async def test_a_lost_database_is_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as office:
        some(office, 3)
        await standing_rows(office)
        office.place.path.rename(tmp_path / "elsewhere")
        office.writer.tick()
        with pytest.raises(StorageUnavailable):
            await office.archive.look()
        (tmp_path / "elsewhere").rename(office.place.path)
        office.live.settle(office.live.reserve("ann", 100), 90)
        await standing_rows(office)
        await office.writer.reached(office.live.state.lsn)


async def test_a_caller_is_told_where_his_old_requests_are(
    aiohttp_client: Any, upstream: Upstream, tmp_path: Path
) -> None:
    folder = tmp_path / "gwproxy.db.archive"
    folder.mkdir()
    for month in ("2024-12", "2025-02"):
        (folder / f"{month}-7.ndjson.gz").touch()
    client = await aiohttp_client(Gateway(tmp_path, CONFIG.format(upstream=upstream.url, more="")))
    key = await make_key(client)
    answer = await client.get("/v1/receipts/req_0123", headers=bearer(key))
    assert answer.status == 404
    error = (await answer.json())["error"]
    assert error["code"] == "not_found"
    assert "Requests of 2025-02 and before are in the operator's archive" in error["message"]
