"""What a long journal costs at a start, and what a month costs on its way into the archive:
`python -m bench.journal`, in one process and without sockets.
"""

import argparse
import asyncio
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from gwproxy.app import GIL_SWITCH_S
from gwproxy.core.ledger import Account, State, apply, held
from gwproxy.core.period import periods
from gwproxy.core.records import Reserve, Settle, Tried, decode, encode
from gwproxy.log import Log
from gwproxy.state.store import Kept, Store, opened
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.journal import Journal
from gwproxy.storage.scan import boot_id, scan
from gwproxy.storage.segments import CHUNK_BYTES

RESULTS = Path(__file__).resolve().parent / "JOURNAL.md"
USERS = 500
PAGE = 1000
BEGAN_MS = 1_790_000_000_000
CONTROL_S = 20.0


def write(folder: Path, most_bytes: int, most_requests: int) -> tuple[int, int]:
    """A journal of plain requests, a millisecond apart: how many, and its bytes."""
    booted = boot_id(OS_FILES)
    journal = Journal.start(
        OS_FILES,
        folder,
        scan(OS_FILES, folder, booted, 0),
        ledger_id="bench",
        epoch=1,
        boot_id=booted,
        applied_lsn=0,
        max_bytes=most_bytes * 4,
    )
    state, random, written, requests = State(), Random(1), 0, 0

    def post(record: Any) -> None:
        nonlocal written
        line = encode(record)
        journal.write(line)
        apply(state, record)
        written += len(line) + 10

    while written < most_bytes and requests < most_requests:
        requests += 1
        t, lsn = BEGAN_MS + requests, state.lsn + 1
        month, day = periods(t)
        name = f"user{random.randrange(USERS)}"
        accounts = (
            Account(f"key:key_{name}", month, None),
            Account(f"user:{name}", month, 10**15),
            Account("org:acme", month, 10**15),
            Account("provider:openai", day, 10**15),
        )
        post(
            Reserve(
                **{"lsn": lsn, "t": t, "synced": journal.synced},
                id=f"req_0123456789abcdef{lsn:08x}",
                model="gpt-4o-mini",
                provider="openai",
                upstream_model="gpt-4o-mini",
                prices="2026-11-01",
                holds=held(state, accounts, 614_400),
                prompt=120,
                max=1024,
                stream=True,
            )
        )
        cost = random.randrange(1, 614_400)
        post(
            Settle(
                **{"lsn": lsn + 1, "t": t, "synced": journal.synced},
                r=lsn,
                cost=cost,
                tokens=(118, 0, 0, cost // 600, 0),
                source="provider",
                outcome="completed",
                attempts=(Tried("openai", "gpt-4o-mini", 200, "", "", 912, cost),),
                status=200,
                rates=(150, 75, 150, 600),
            )
        )
        spare = journal.begin_spare()
        if spare is not None:
            spare.run()
            journal.end_spare(spare, None)
            sync(journal)
    sync(journal)
    journal.close()
    return requests, written


def sync(journal: Journal) -> None:
    ticket = journal.begin_sync()
    if ticket is not None:
        ticket.run()
        journal.end_sync(ticket, None)


def cpu_s(work: Callable[[], Any]) -> float:
    """What it takes of the processor: on a machine that others use, no clock on the wall says."""
    began = time.process_time()
    work()
    return time.process_time() - began


def replay(folder: Path) -> State:
    trail = scan(OS_FILES, folder, boot_id(OS_FILES), 0).trail
    state, cursor = State(), trail.find(0)
    while cursor.lsn < trail.end.lsn:
        payloads, cursor = trail.read(cursor, PAGE, CHUNK_BYTES)
        for payload in payloads:
            apply(state, decode(payload))
    return state


async def restart(folder: Path) -> None:
    """Until the database, of which there is none yet, has all of it."""
    async with opened(_kept(folder), Log(io.StringIO(), "error"), accept_loss=True) as store:
        await store.writer.reached(store.ledger.state.lsn)


def _kept(folder: Path) -> Kept:
    return Kept(folder / "gwproxy.db", folder / "journal", max_bytes=16 << 30, backup_every_h=0)


async def archive(folder: Path) -> tuple[float, list[float], list[float]]:
    """Seconds for the oldest month to leave the tables; how long commits took meanwhile, and in
    the time before, when there was nothing else to do."""
    month, _ = periods(BEGAN_MS)
    wall = time.time
    log = Log(io.StringIO(), "error")
    later_s = max(0.0, BEGAN_MS / 1000 + 100 * 86_400 - time.time())
    async with opened(_kept(folder), log, wall=lambda: wall() + later_s) as store:
        alone: list[float] = []
        beside: list[float] = []
        async with asyncio.TaskGroup() as group:
            working = group.create_task(_keep_committing(store))
            store.writer.committed = alone.append
            await asyncio.sleep(CONTROL_S)
            store.writer.committed = beside.append
            began = time.perf_counter()
            await store.archive.month(month)
            took = time.perf_counter() - began
            working.cancel()
        return took, sorted(beside), sorted(alone)


async def _keep_committing(store: Store) -> None:
    while True:
        await store.directory.create_user()
        await asyncio.sleep(0.02)


def scanned(folder: Path) -> list[tuple[str, str]]:
    looked = cpu_s(lambda: scan(OS_FILES, folder, boot_id(OS_FILES), 0))
    return [
        ("all of it is read and its chain checked, as at each start", f"{looked:.1f} s"),
        ("and applied to an empty state", f"{cpu_s(lambda: replay(folder)) - looked:.1f} s"),
    ]


def archived(folder: Path, number: int) -> list[tuple[str, str]]:
    took, beside, alone = asyncio.run(archive(folder))
    [file] = (folder / "gwproxy.db.archive").iterdir()
    return [
        (f"a month of {number:,} requests moves into the archive", f"{took:.0f} s on the wall"),
        ("its file", f"{file.stat().st_size / (1 << 20):.1f} MiB"),
        (
            "commits meanwhile, and before: median, p90, p99",
            f"{_shares(beside)}, and {_shares(alone)} ms",
        ),
    ]


def _shares(sorted_s: list[float]) -> str:
    return " / ".join(f"{sorted_s[int(len(sorted_s) * x)] * 1000:.1f}" for x in (0.5, 0.9, 0.99))


def report(gib: float, requests: int) -> str:
    rows = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place)
        (folder / "journal").mkdir()
        number, written = write(folder / "journal", int(gib * (1 << 30)), sys.maxsize)
        rows += [
            (f"a journal of {written / (1 << 30):.2f} GiB", f"{number:,} requests"),
            *scanned(folder / "journal"),
        ]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place)
        (folder / "journal").mkdir()
        number, _ = write(folder / "journal", 1 << 40, requests)
        took = cpu_s(lambda: asyncio.run(restart(folder)))
        rows.append((f"a database made anew of {number:,} requests", f"{took:.1f} s"))
        rows += archived(folder, number)
    lines = [
        "# What a long journal costs",
        "",
        f"Written by `python -m bench.journal`, Python {sys.version.split()[0]}, on a machine of",
        "two cores that others used too: seconds are of the processor. Plain requests, two records",
        "each, 500 users.",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.journal")
    parser.add_argument("--gib", type=float, default=1.0, help="of journal")
    parser.add_argument("--requests", type=int, default=100_000, help="of the month")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    sys.setswitchinterval(GIL_SWITCH_S)
    text = report(args.gib, args.requests)
    print(text)
    if args.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
