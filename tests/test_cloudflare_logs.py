"""Bringing the gateway's log in: pages that are slow, fail, repeat or shift, and exported files."""

import gzip
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from gwproxy.cloudflare.api import Api, Refused, session
from gwproxy.cloudflare.logs import ExportRefused, Fetched, bring, fetch, oldest, read
from gwproxy.demo import DemoUpstream
from gwproxy.storage.reconcile import Book, book
from tests.account import TOKEN
from tests.test_cloudflare_api import Waits

START = 1_795_219_200_000
"""2026-11-21T00:00:00Z."""
HOUR = 3_600_000


def stamp(at_ms: int) -> str:
    """As the log writes it: always with milliseconds."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def rows(count: int, every_ms: int = 100) -> list[dict[str, Any]]:
    return [
        {
            "id": f"log_{number:06d}", "created_at": stamp(START + number * every_ms),
            "provider": "openai", "model": "gpt-4o-mini", "success": True, "status_code": 200,
            "cached": False, "tokens_in": 10, "tokens_out": number, "cost": number / 10**6,
            "metadata": {"request_id": f"req_{number:06d}", "attempt": 1}, "duration": 5,
        }
        for number in range(count)
    ]  # fmt: skip


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=TOKEN)
    await demo.start()
    yield demo
    await demo.stop()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Book]:
    with book(tmp_path / "book.db") as made:
        made.begin("test")
        yield made


@pytest_asyncio.fixture
async def waits() -> Waits:
    return Waits()


class Bring:
    def __init__(self, api: Api, kept: Book, waits: Waits) -> None:
        self.api, self.kept, self.waits = api, kept, waits
        self.seen: list[tuple[int, int]] = []

    async def __call__(self, since: int = START, until: int = START + HOUR) -> Fetched:
        return await fetch(
            self.api, "demo", self.kept, since, until,
            now_ms=lambda: START + HOUR, progress=lambda *seen: self.seen.append(seen),
            sleep=self.waits,
        )  # fmt: skip


@pytest_asyncio.fixture
async def bring_in(demo: DemoUpstream, kept: Book, waits: Waits) -> AsyncIterator[Bring]:
    async with session(None) as made:
        yield Bring(Api(made, demo.api_url, "demo", TOKEN, sleep=waits), kept, waits)


def pages(demo: DemoUpstream) -> int:
    return sum(1 for request in demo.requests if "/logs?" in request["path"])


async def test_all_of_a_span_comes_and_nothing_beside(bring_in: Bring, demo: DemoUpstream) -> None:
    demo.management.logs.plant(rows(3_000, every_ms=1000))
    fetched = await bring_in(START + 1000, START + 2_900_000)
    assert bring_in.kept.count_theirs() == 2_899
    assert fetched == Fetched()
    assert bring_in.seen[-1] == (2_899, 2_899)
    assert pages(demo) < 70


@pytest.mark.parametrize(
    "fault", ["status-429", "status-503", "reset", "garbage", "slow-20", "code-10000"]
)
async def test_a_failure_costs_nothing_that_was_fetched(
    bring_in: Bring, demo: DemoUpstream, fault: str
) -> None:
    demo.management.logs.plant(rows(6_000))
    demo.management.fault({"on": "logs", "fault": fault, "after": 80, "count": 2})
    if fault == "code-10000":
        with pytest.raises(Refused, match="does not know the token"):
            await bring_in()
        assert 0 < bring_in.kept.count_theirs() < 6_000
        demo.clear()
        demo.management.logs.plant(rows(6_000))
        fetched = await bring_in()
        assert pages(demo) < 100  # of 120 and more: it went on where it had stopped
    else:
        fetched = await bring_in()
    assert bring_in.kept.count_theirs() == 6_000
    assert fetched == Fetched()
    assert bring_in.kept.gaps(START, START + HOUR) == []


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("page_rows", [7, 20, 1000])
async def test_a_page_has_as_many_rows_as_the_api_likes(
    bring_in: Bring, demo: DemoUpstream, page_rows: int, counted: bool
) -> None:
    logs = demo.management.logs
    logs.page_rows, logs.counted = page_rows, counted
    logs.plant(rows(130))
    assert await bring_in() == Fetched()
    assert bring_in.kept.count_theirs() == 130


async def test_a_log_that_does_not_say_how_long_it_is_is_read_in_spans(
    bring_in: Bring, demo: DemoUpstream
) -> None:
    demo.management.logs.counted = False
    demo.management.logs.plant(rows(5_500, every_ms=200))
    assert await bring_in() == Fetched()
    assert bring_in.kept.count_theirs() == 5_500


async def test_rows_that_come_and_go_meanwhile_push_none_out(
    bring_in: Bring, demo: DemoUpstream
) -> None:
    logs = demo.management.logs
    logs.plant(rows(400, every_ms=1000))

    def change() -> None:
        # A full log drops its oldest rows as new ones come: the others move up.
        if pages(demo) in (2, 4, 5):
            kept = logs.rows[30:]
            more = rows(400 + 10 * pages(demo), every_ms=1000)[-10:]
            logs.clear()
            logs.plant([*kept, *more])

    logs.before_page = change
    fetched = await bring_in()
    assert fetched == Fetched()
    found = {row.id for row, _ in bring_in.kept.unclaimed(START, START + HOUR)}
    assert {row["id"] for row in logs.rows} <= found


async def test_what_is_still_to_come_is_asked_for_again(bring_in: Bring) -> None:
    await bring_in(START, START + 2 * HOUR)  # it is one hour after the start
    assert bring_in.kept.gaps(START, START + 2 * HOUR) == [(START + HOUR, START + 2 * HOUR)]


async def test_repeated_and_disordered_rows_are_one_each(
    bring_in: Bring, demo: DemoUpstream
) -> None:
    planted = rows(400)
    demo.management.logs.in_order = False
    demo.management.logs.plant([*planted[200:], *planted[:200], *planted[50:60]])
    fetched = await bring_in()
    assert bring_in.kept.count_theirs() == 400
    assert (fetched.repeated, fetched.missing) == (10, 0)


async def test_rows_that_cannot_be_read_are_counted(bring_in: Bring, demo: DemoUpstream) -> None:
    planted = rows(5)
    planted[2]["id"] = ""
    demo.management.logs.plant(planted)
    fetched = await bring_in()
    assert (fetched.unreadable, fetched.missing) == (1, 0)
    assert bring_in.kept.count_theirs() == 4


async def test_figures_that_come_late_are_waited_for(bring_in: Bring, demo: DemoUpstream) -> None:
    logs = demo.management.logs
    [row] = rows(1)
    row["created_at"] = stamp(START + HOUR - 1000)
    logs.plant([row])
    logs._ready[row["id"]] = float("inf")
    waited = bring_in.waits

    async def look(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # a second and a half
            logs._ready.clear()

    fetched = await fetch(
        bring_in.api, "demo", bring_in.kept, START, START + HOUR,
        now_ms=lambda: START + HOUR, progress=lambda *_: None, sleep=look,
    )  # fmt: skip
    assert fetched.late == {}
    [(found, _)] = bring_in.kept.unclaimed(START, START + HOUR)
    assert (found.input, found.cost) == (10, 0)


async def test_the_oldest_row_is_found(bring_in: Bring, demo: DemoUpstream) -> None:
    assert await oldest(bring_in.api, "demo") is None
    demo.management.logs.plant(rows(3))
    assert await oldest(bring_in.api, "demo") == START


# -- one row ---------------------------------------------------------------------------------------


def test_a_row_is_read_in_either_sides_words() -> None:
    [row] = rows(1)
    first = read(row)
    other = {
        "log_id": row["id"], "timestamp": START, "provider": "openai", "model": "gpt-4o-mini",
        "status": "200", "request_tokens": "10", "response_tokens": "0", "cost_usd": "0",
        "metadata": orjson.dumps(row["metadata"]).decode(), "duration": "5", "cached": "false",
    }  # fmt: skip
    assert first == read(other)


@pytest.mark.parametrize(
    ("field", "value", "name", "found"),
    [
        ("cost", 1.1e-05, "cost", 11_000),
        ("cost", 0.1 + 0.2, "cost", 300_000_000),
        ("cost", float("nan"), "cost", None),
        ("cost", -1, "cost", None),
        ("tokens_in", float("inf"), "input", None),
        ("tokens_in", True, "input", None),
        ("metadata", "no json", "request_id", None),
        ("metadata", {"request_id": 7}, "request_id", None),
        ("success", None, "success", True),
        ("created_at", "2026-11-21 00:00:00", "t", START),
    ],
)
def test_odd_values_are_nobodys_figures(field: str, value: Any, name: str, found: Any) -> None:
    row = read({**rows(1)[0], field: value})
    assert getattr(row, name) == found


@pytest.mark.parametrize("value", [None, "yesterday", [], True, 10**30, -1])
def test_a_row_without_a_time_is_none(value: Any) -> None:
    assert read({**rows(1)[0], "created_at": value}) is None


# -- exported files --------------------------------------------------------------------------------


def as_lines(planted: list[dict[str, Any]]) -> bytes:
    return b"\n".join(map(orjson.dumps, planted)) + b"\n\n"


def as_csv(planted: list[dict[str, Any]]) -> bytes:
    names = list(planted[0])
    lines = ["\ufeff" + ",".join(names)]
    for row in planted:
        cells = [orjson.dumps(v).decode() if isinstance(v, dict) else str(v) for v in row.values()]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    "written",
    [
        as_lines,
        as_csv,
        lambda planted: gzip.compress(as_lines(planted)),
        lambda planted: gzip.compress(as_csv(planted)),
        orjson.dumps,
        lambda planted: orjson.dumps({"result": planted, "success": True}),
    ],
    ids=["lines", "csv", "gzip", "csv in gzip", "list", "answer"],
)
def test_an_export_is_read_whatever_it_is_written_in(
    tmp_path: Path, kept: Book, written: Any
) -> None:
    path, fetched = tmp_path / "export", Fetched()
    path.write_bytes(written(rows(30)))
    assert bring(path, kept, fetched) == (START, START + 2900)
    assert kept.count_theirs() == 30
    found = [row for row, _ in kept.unclaimed(START, START + HOUR)]
    assert found == [read(row) for row in rows(30)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no row"),
        (b"a,b\n1,2\n", "no row with an id and a time"),
        (as_lines(rows(2)) + b"garbage\n", "line 4"),
        (b"[{]", "export"),
        (gzip.compress(as_lines(rows(2)))[:40], "export"),
        (b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 40, "damaged"),
        (b"a\x80\rb\n\x00\n", "neither JSON nor CSV"),
        (b'{"result": 5}', "no list of rows"),
    ],
    ids=[
        *("empty", "other columns", "a broken line", "broken JSON", "cut in the middle"),
        *("damaged gzip", "binary", "no list"),
    ],
)
def test_a_file_that_is_no_export_is_told(
    tmp_path: Path, kept: Book, data: bytes, words: str
) -> None:
    path = tmp_path / "export"
    path.write_bytes(data)
    with pytest.raises(ExportRefused, match=words):
        bring(path, kept, Fetched())


def test_a_missing_file_is_told(tmp_path: Path, kept: Book) -> None:
    with pytest.raises(ExportRefused, match="No such file"):
        bring(tmp_path / "nowhere", kept, Fetched())
