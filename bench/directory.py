"""What the admin plane costs at size: `python -m bench.directory`, in one process, without sockets.

A database of 10,000 users and 1,000,000 requests is built, every kind of report is asked for, and
100,000 users are imported, each beside an event loop that counts how late its turns come.
"""

import argparse
import asyncio
import gc
import io
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import orjson
import uvloop

from gwproxy.admin.ask import Ask, Route
from gwproxy.admin.bulk import Bulk, ExportQuery, ImportQuery
from gwproxy.admin.routes import ask_directly, routes
from gwproxy.admin.rows import Format
from gwproxy.app import GIL_SWITCH_S
from gwproxy.core.period import DAY_MS, periods
from gwproxy.log import Log
from gwproxy.state.directory import NOBODY
from gwproxy.state.store import Kept, Store, opened

RESULTS = Path(__file__).resolve().parent / "DIRECTORY.md"
TICK_S = 0.001
ORGS = 100
DAYS = 30
MODELS = [
    ("google", "gemini-2.5-flash"),
    ("openai", "gpt-4o-mini"),
    ("anthropic", "claude-3-haiku"),
]
LIMIT_MS = 200


@dataclass
class Stalls:
    """How long the loop worked without giving others a turn, in milliseconds of its own CPU time,
    which other programs of the machine do not change; and how late the turns came for all reasons.
    """

    worked: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    def line(self) -> str:
        return f"{_spread(self.worked)} of CPU at a stretch, {_spread(self.late)} late"


def _spread(values: list[float]) -> str:
    ordered = sorted(values) or [0.0]
    p99 = ordered[int(len(ordered) * 0.99)]
    return f"p50 {median(ordered):.2f}, p99 {p99:.2f}, worst {ordered[-1]:.1f} ms"


@asynccontextmanager
async def watched() -> AsyncIterator[Stalls]:
    stalls, running = Stalls(), True

    async def tick() -> None:
        while running:
            before, worked = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0)
            stalls.late.append((time.perf_counter() - before) * 1000)
            stalls.worked.append((time.thread_time() - worked) * 1000)
            await asyncio.sleep(TICK_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(tick())
        try:
            yield stalls
        finally:
            running = False


def kept(folder: Path) -> Kept:
    return Kept(folder / "gwproxy.db", folder / "journal", backup_every_h=0)


def people(count: int, prefix: str) -> Iterator[bytes]:
    """A file of users, in parts as a socket would give them."""
    for org in range(ORGS):
        yield orjson.dumps({"kind": "organization", "org_id": f"org-{org:03}"}) + b"\n"
    part = bytearray()
    for number in Random(1).sample(range(count), count):
        row = {
            "user_id": f"{prefix}-{number:06}",
            "org_id": f"org-{number % ORGS:03}",
            "email": f"{prefix}.{number}@example.org",
            "monthly_limit_usd": "25.00",
            "rpm": 60,
        }
        part += orjson.dumps(row) + b"\n"
        if len(part) > 1 << 16:
            yield bytes(part)
            part.clear()
    yield bytes(part)


async def as_it_comes(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
        await asyncio.sleep(0)


async def load(store: Store, count: int, prefix: str) -> tuple[float, float]:
    """Seconds until the import was in force, and until the database had it."""
    started = time.perf_counter()
    parts = as_it_comes(people(count, prefix))
    outcome = await Bulk(store).load(parts, Format.NDJSON, ImportQuery(), NOBODY)
    assert outcome.committed, outcome.error
    in_force = time.perf_counter() - started
    await store.catch_up(600.0)
    return in_force, time.perf_counter() - started


_ROW = f"INSERT INTO request VALUES ({', '.join('?' * 29)})"


def fill(path: Path, users: int, count: int, first_lsn: int) -> None:
    """A month of requests, straight into the tables: through the journal it would take an hour."""
    random = Random(2)
    now = int(time.time() * 1000)
    start = now - now % DAY_MS - (DAYS - 1) * DAY_MS

    def rows() -> Iterator[tuple[object, ...]]:
        for number in range(count):
            t = start + number * (DAYS * DAY_MS) // count
            user = random.randrange(users)
            provider, model = MODELS[random.randrange(3)]
            outcome = "failed" if random.random() < 0.02 else "completed"
            cost = random.randrange(1_000_000)
            attempts = f'[["{provider}","{model}",200,"","",900,{cost}]]'
            yield (
                *(first_lsn + number, t, periods(t)[0], f"req_{number:09}", f"key_{user:06}"),
                *(f"u-{user:06}", f"org-{user % ORGS:03}", "auto", provider, model, "v1", cost),
                *(0, 1, None, t + 900, outcome, "provider", cost, 0, 100, 0, 0, 200, 0),
                *(attempts, 200, "", None),
            )

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -200000")
        connection.execute("BEGIN")
        # Sorted at once an index takes a fraction of what it does row by row.
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_schema WHERE tbl_name = 'request' AND type = 'index'"
            " AND sql IS NOT NULL"
        ).fetchall()
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        connection.executemany(_ROW, rows())
        for _, sql in indexes:
            connection.execute(sql)
        connection.execute(
            "INSERT INTO usage SELECT grain, iif(grain > 0, org_id, ''),"
            " iif(grain > 1, user_id, ''), day, provider, model, count(*), sum(succeeded),"
            " sum(failed), sum(cost), sum(overrun), sum(input_tokens), sum(cache_read_tokens),"
            " sum(cache_write_tokens), sum(output_tokens), sum(reasoning_tokens), sum(duration_ms)"
            " FROM settled, (SELECT 0 AS grain UNION ALL SELECT 1 UNION ALL SELECT 2)"
            " GROUP BY 1, 2, 3, 4, 5, 6"
        )
        connection.execute("COMMIT")


QUESTIONS = (
    "users?limit=100",
    "users?limit=1000&cursor=u-000500",
    "organizations?limit=100",
    "users/u-000711",
    "users/u-000711/usage",
    "users/u-000711/usage?group_by=day&{span}",
    "organizations/org-042/usage?group_by=user&{span}",
    "usage?group_by=provider&{span}",
    "usage?group_by=model&{span}",
    "usage?group_by=day&{span}",
    "usage?group_by=org&{span}",
    "usage?group_by=user&limit=100&{span}",
    "usage?group_by=user&limit=1000&{span}",
    "usage?group_by=user&org_id=org-042&{span}",
    "usage?group_by=provider&user_id=u-000711&{span}",
    "requests?limit=100",
    "requests?user_id=u-000711",
    "requests?org_id=org-042",
    "requests?key_id=key_000711",
    "requests?outcome=failed",
    "requests?outcome=cut",
    "requests?provider=openai",
    "requests?model=none",
    "audit?limit=100",
)


async def ask(plane: Sequence[Route], question: str) -> float:
    path, _, query = question.partition("?")
    pairs = [
        (name, value) for name, _, value in (p.partition("=") for p in query.split("&")) if name
    ]
    started = time.perf_counter()
    answer = await ask_directly(plane, "GET", f"/admin/{path}", query=pairs, ask=Ask())
    assert answer.value is not None
    return (time.perf_counter() - started) * 1000


async def measure(users: int, requests: int, imported: int) -> list[str]:
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with opened(kept(folder), Log(io.StringIO(), "error")) as store:
            await load(store, users, "u")
        started = time.perf_counter()
        fill(folder / "gwproxy.db", users, requests, 1_000)
        print(f"{requests} requests in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        started = time.perf_counter()
        async with opened(kept(folder), Log(io.StringIO(), "error")) as store:
            print(f"opened in {time.perf_counter() - started:.1f} s", file=sys.stderr)
            gc.collect()
            gc.freeze()
            gc.set_threshold(10_000, 100, 20)
            sys.setswitchinterval(GIL_SWITCH_S)
            today = time.time() * 1000 // DAY_MS
            days = [time.strftime("%Y-%m-%d", time.gmtime((today - n) * 86_400)) for n in (29, 0)]
            span = f"from={days[0]}&to={days[1]}"
            lines += ["| question | median ms | worst ms |", "|---|---|---|"]
            slow, plane = [], routes(store)
            async with watched() as stalls:
                for question in QUESTIONS:
                    took = [await ask(plane, question.format(span=span)) for _ in range(5)]
                    shown = question.replace("{span}", "30 days").replace("|", "/")
                    lines.append(f"| `{shown}` | {median(took):.1f} | {max(took):.1f} |")
                    if max(took) > LIMIT_MS:
                        slow.append(f"`{shown}`")
            lines += ["", f"The loop meanwhile: {stalls.line()}."]
            lines.append(f"Above {LIMIT_MS} ms: {', '.join(slow) or 'none'}.")
            async with watched() as stalls:
                in_force, stored = await load(store, imported, "v")
            lines += [
                "",
                f"{imported} users imported: in force after {in_force:.1f} s, in the database "
                f"after {stored:.1f} s. The loop meanwhile: {stalls.line()}.",
            ]
            started, size = time.perf_counter(), 0
            async with watched() as stalls:
                async for part in Bulk(store).dump(ExportQuery()):
                    size += len(part)
            lines.append(
                f"All of them exported, {size >> 20} MiB: {time.perf_counter() - started:.1f} s. "
                f"The loop meanwhile: {stalls.line()}."
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.directory", description=__doc__)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--import", dest="imported", type=int, default=100_000)
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the report here")
    args = parser.parse_args()
    lines = uvloop.run(measure(args.users, args.requests, args.imported))
    head = f"# The admin plane at {args.users} users and {args.requests} requests"
    machine = f"{os.cpu_count()} cores, with a load of {os.getloadavg()[0]:.0f} at the end."
    report = "\n".join([head, "", machine, "", *lines, ""])
    print(report)
    if args.results:
        args.results.write_text(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
