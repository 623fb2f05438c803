"""A soak: mixed traffic for an hour when asked for (`make soak`), a minute otherwise, against the
real process. What it takes of the machine stays flat, and the books agree with the upstream's
record."""

import asyncio
import os
import re
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from bench import probes
from gwproxy.demo import DemoUpstream
from gwproxy.state.ledger import RECENT
from tests.harness import ADMIN, UPSTREAM_TOKEN, bearer
from tests.kills import (
    ROOT,
    Client,
    Got,
    Life,
    assert_books,
    clients,
    explained,
    found,
    never_accepting,
    record_of,
)

SOAK_S = float(os.environ.get("SOAK_S", "48"))
ROUNDS = 8
"""Traffic, then a quiet moment in which everything is counted: the first three warm it up."""
WARM_UP = 3
AT_ONCE = 12
QUIET_S = 2.5
"""Unused connections to the upstream are closed after one second of these."""

MORE_PSS = 8 << 20
"""A page cache that fills, garbage that is collected now and then: no more with more time."""
REMEMBERED_BYTES = 5 << 10
"""What each of the last `RECENT` requests takes, which are kept in memory to be asked about."""

WISHES: tuple[tuple[int, str], ...] = (
    (30, "mock/prose"),
    (8, "mock/prose+slow-5"),
    (4, "mock/prose+len-1800"),
    (4, "deepseek/deepseek-chat+slow-2"),
    (6, "mock/prose+status-503"),
    (6, "third"),
    (4, "mock/prose+reset-after-3"),
    (4, "mock/prose+eof-after-3"),
    (3, "mock/prose+garbage"),
    (3, "mock/prose+crlf+split-7"),
    (3, "unknown/model"),
)

COUNTING = """
import asyncio, threading, time, pathlib
def count():
    name = "_all_tasks" if hasattr(asyncio.tasks, "_all_tasks") else "_scheduled_tasks"
    known = getattr(asyncio.tasks, name)
    file = pathlib.Path({file!r})
    while True:
        try:
            tasks = list(known)
        except RuntimeError:
            continue  # one came or went meanwhile
        file.with_suffix(".new").write_text(str(sum(not task.done() for task in tasks)))
        file.with_suffix(".new").replace(file)
        time.sleep(0.3)  # several looks between two of the test
threading.Thread(target=count, daemon=True).start()
"""
"""Python runs this at its start when it finds it as `sitecustomize`: the process itself is as it is
shipped, and its tasks are counted from inside all the same."""


@pytest.fixture
def closed() -> Iterator[int]:
    with never_accepting() as port:
        yield port


@pytest_asyncio.fixture
async def demo(tmp_path: Path) -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=UPSTREAM_TOKEN, record_file=tmp_path / "record.jsonl")
    await demo.start()
    yield demo
    await demo.stop()


@dataclass(frozen=True, slots=True)
class Taken:
    """What the process has of the machine while nothing is asked of it."""

    pss: int
    files: int
    threads: int
    tasks: int

    def __str__(self) -> str:
        mib = self.pss / 2**20
        return f"{mib:.1f} MiB, {self.files} files, {self.threads} threads, {self.tasks} tasks"


def taken(life: Life, tasks: Path) -> Taken:
    pid = life.process.pid
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Taken(probes.memory(pid).pss, files, probes.threads(pid), int(tasks.read_text()))


async def ask_on(client: Client, random: Random, stop: asyncio.Event) -> None:
    weights, models = zip(*WISHES, strict=True)
    while not stop.is_set():
        (model,) = random.choices(models, weights)
        user, stream = random.choice(list(client.place.keys)), random.random() < 0.6
        leaves = random.randint(1, 9) if stream and random.random() < 0.15 else 0
        got = await client.ask(user, model, stream, leaves_after=leaves)
        assert got.status, "the gateway did not answer"


async def administer(client: Client, random: Random, stop: asyncio.Event) -> None:
    """Limits go up and down, keys come and go, backups are made."""
    session, turn = client.session, 0

    async def do(method: str, path: str, body: Any = None) -> Any:
        asked = session.request(method, f"/admin/{path}", json=body, headers=ADMIN)
        async with asked as answer:
            assert answer.status < 300, (method, path, await answer.text())
            return await answer.json() if answer.status != 204 else None

    while not stop.is_set():
        turn += 1
        await do("PATCH", "users/ben", {"rpm": None if turn % 2 else 100_000})
        await do("PATCH", "users/poor", {"monthly_limit_usd": f"{1 + turn / 1000}"})
        await do("GET", f"users?limit={random.randint(1, 50)}")
        await do("GET", "requests?limit=20")
        if turn % 5 == 0:
            made = await do("POST", "users/ann/api-keys", {})
            await do("DELETE", f"users/ann/api-keys/{made['key_id']}")
        if turn % 20 == 0:
            await do("POST", "backup", {})
        await asyncio.sleep(0.2)


async def scrape(client: Client, stop: asyncio.Event) -> None:
    while not stop.is_set():
        await metrics(client.session)
        async with client.session.get("/health/ready") as answer:
            assert answer.status == 200, await answer.text()
        headers = bearer(client.place.keys["ann"])
        async with client.session.get("/v1/usage", headers=headers) as answer:
            assert answer.status == 200
        await asyncio.sleep(0.5)


async def metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """Those without labels."""
    async with session.get("/metrics", headers=ADMIN) as answer:
        assert answer.status == 200
        found = re.findall(r"^(\w+) ([\d.e+-]+)$", await answer.text(), re.M)
    return {name: float(value) for name, value in found}


@pytest.mark.slow
@pytest.mark.timeout(2 * SOAK_S + 400)
async def test_what_is_taken_stays_flat_and_the_books_are_right(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    place = await found(tmp_path / "soaked", demo, closed, {"ann": None, "ben": None, "poor": "1"})
    config = place.folder / "config.toml"
    text = config.read_text().replace("journal_max_bytes = 67108864", "keep_backups = 2")
    config.write_text(text.replace("[upstream]\n", "[upstream]\nidle_connection_s = 1\n"))
    site, tasks = tmp_path / "site", tmp_path / "tasks"
    site.mkdir()
    (site / "sitecustomize.py").write_text(COUNTING.format(file=str(tasks)))
    random = Random(20261121)
    seen: list[Taken] = []
    got: list[Got] = []
    asked: list[int] = []
    wrapper = ("env", f"PYTHONPATH={site}:{ROOT}")
    with explained(place):
        async with place.life(*wrapper) as life, clients(place, life) as first:
            for _ in range(ROUNDS):
                async with aiohttp.ClientSession(life.url) as session:
                    client, stop = Client(place, session), asyncio.Event()
                    asyncio.get_running_loop().call_later(SOAK_S / ROUNDS, stop.set)
                    async with asyncio.TaskGroup() as group:
                        group.create_task(administer(client, random, stop))
                        group.create_task(scrape(client, stop))
                        for _ in range(AT_ONCE):
                            group.create_task(ask_on(client, random, stop))
                    got += client.got
                await settled(first.session)
                seen.append(taken(life, tasks))
                asked.append(len(got))
                print(f"{asked[-1]:7d} requests: {seen[-1]}")
            assert_flat(seen, asked)
            await life.stop()
        await demo.stop()  # all that it was still busy with is in its record now
        counts = assert_books(place, record_of(tmp_path / "record.jsonl"), got)
    print(dict(counts))
    assert {"completed", "client_left", "truncated"} <= counts.keys()
    statuses = Counter(each.status for each in got)
    assert {200, 404, 502} <= statuses.keys(), statuses


async def settled(session: aiohttp.ClientSession) -> None:
    """Nobody asks any more: nothing is open, and all of it is in the database."""
    async with asyncio.timeout(90):
        while True:
            now = await metrics(session)
            names = ("gwproxy_holds_open", "gwproxy_streams_open", "gwproxy_ledger_queue")
            if not any(now[name] for name in names):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(QUIET_S)


def assert_flat(seen: list[Taken], asked: list[int]) -> None:
    warm, last = seen[:WARM_UP], seen[-2:]
    assert max(each.files for each in last) <= max(each.files for each in warm) + 2, seen
    assert max(each.threads for each in last) <= max(each.threads for each in warm) + 2, seen
    assert max(each.tasks for each in last) <= max(each.tasks for each in warm) + 1, seen
    remembered = min(RECENT, asked[-1]) - min(RECENT, asked[WARM_UP - 1])
    grown = statistics.median(each.pss for each in last) - max(each.pss for each in warm)
    assert grown < MORE_PSS + remembered * REMEMBERED_BYTES, (grown, remembered, seen)


@pytest.mark.parametrize("what", ["pss", "files", "threads", "tasks"])
def test_what_goes_on_growing_is_noticed(what: str) -> None:
    def having(grown: dict[str, int]) -> Taken:
        return Taken(**{"pss": 1 << 27, "files": 29, "threads": 11, "tasks": 13} | grown)

    step = {"pss": 4 << 20, "files": 1, "threads": 1, "tasks": 1}[what]
    asked = [RECENT * (number + 1) for number in range(ROUNDS)]
    assert_flat([having({}) for _ in range(ROUNDS)], asked)
    with pytest.raises(AssertionError):
        leaking = [having({what: number * step}) for number in range(ROUNDS)]
        assert_flat(leaking, asked)
