"""What the drills of outages share: faults that are made to the files of a running gateway, callers
of an open and of a closed organization, and the question whether everybody was told the truth.
"""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gwproxy.cli.children import Failed
from gwproxy.cli.drill import another_clock, set_clock
from gwproxy.demo import DemoUpstream
from tests.harness import ADMIN, bearer
from tests.kills import (
    PATIENCE_S,
    Got,
    Life,
    Place,
    assert_books,
    attached,
    configured,
    record_of,
)
from tests.scene import until

BOUND_USD = "0.01"
BOUND_NANOS = 10_000_000
"""Two hundred of the requests below, or so."""

MODEL = "mock/prose+len-20"


@dataclass(frozen=True)
class Apart(Place):
    """A ledger whose database is kept in a folder of its own."""

    kept: Path

    @property
    def database(self) -> Path:
        return self.kept / "gwproxy.db"


@dataclass(frozen=True)
class JournalApart(Place):
    """A ledger whose journal is kept in a folder of its own."""

    kept: Path

    @property
    def journal(self) -> Path:
        return self.kept / "journal"


def prepared(folder: Path, demo: DemoUpstream, segment_mib: int = 16, **storage: Path) -> Place:
    """A folder in which there was no gateway yet; `storage` says what is kept elsewhere. Each open
    request keeps 8 KiB of a segment."""
    place = configured(folder, demo, 1)
    path = folder / "config.toml"
    lines = "".join(f'{name} = "{where}"\n' for name, where in storage.items())
    text = path.read_text().replace("[storage]\n", f"[storage]\n{lines}")
    text = text.replace("segment_bytes = 1048576", f"segment_bytes = {segment_mib << 20}")
    path.write_text(text.replace('level = "warning"', 'level = "info"'))
    return place


class MovedClock:
    """The wall clock of one gateway, which goes by a file and not by the machine."""

    def __init__(self, stamp: Path) -> None:
        self._stamp = stamp
        try:
            self._environ = another_clock(stamp)
        except Failed as failed:
            pytest.skip(str(failed))

    def set(self, when: datetime) -> None:
        set_clock(self._stamp, round((when - datetime.now(UTC)).total_seconds()))

    @property
    def wrapper(self) -> list[str]:
        """What comes before the gateway's command."""
        return ["env", *(f"{name}={value}" for name, value in self._environ.items())]


def unprivileged() -> list[str]:
    """What comes before the gateway's command, so that modes of files hold for it as for any user:
    root's own rights are left behind."""
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of that size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# -- faults ----------------------------------------------------------------------------------------

Fault = Callable[[Place, Life], AbstractAsyncContextManager[None]]
"""Within it, something is wrong with the ledger's files."""


@asynccontextmanager
async def deleted(place: Place, life: Life) -> AsyncIterator[None]:
    for end in ("", "-wal", "-shm"):
        place.database.with_name(f"gwproxy.db{end}").unlink(missing_ok=True)
    yield


@asynccontextmanager
async def overwritten(place: Place, life: Life) -> AsyncIterator[None]:
    """With noise, in place."""
    with place.database.open("r+b") as file:
        file.write(random.Random(1).randbytes(place.database.stat().st_size))
    yield


@asynccontextmanager
async def replaced(place: Place, life: Life) -> AsyncIterator[None]:
    """By an older copy, such as a backup."""
    older = place.folder / "older.db"
    assert older.exists()
    os.replace(older, place.database)
    yield


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
    # The file last: opened before its log is there it would be given another one.
    for file in sorted(away.iterdir(), reverse=True):
        file.rename(folder / file.name)
    away.rmdir()
    obstacle.rmdir()


def why_not_immutable(folder: Path) -> str:
    """Why no file of this folder can be made immutable; empty if it can."""
    if shutil.which("chattr") is None:
        return "there is no chattr on this machine"
    file = folder / "immutable"
    file.touch()
    if subprocess.run(["chattr", "+i", str(file)], capture_output=True).returncode:
        return "this file system, or this user, cannot make a file immutable"
    subprocess.run(["chattr", "-i", str(file)], check=True)
    return ""


@contextmanager
def immutable(*paths: Path) -> Iterator[None]:
    """Nobody may write to them, root neither."""
    files = [str(path) for path in paths]
    subprocess.run(["chattr", "+i", *files], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *files], check=True)


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """No file can be made in it, nor taken away."""
    mode = folder.stat().st_mode
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(mode)


def lasting(begin: Callable[[Place], AbstractContextManager[None]]) -> Fault:
    """What takes no time to begin and to end."""

    @asynccontextmanager
    async def fault(place: Place, life: Life) -> AsyncIterator[None]:
        with begin(place):
            yield

    return fault


out_of_reach = lasting(lambda place: moved_away(place.database.parent))
read_only = lasting(
    lambda place: immutable(place.database, place.database.with_name("gwproxy.db-wal"))
)


def locked(seconds: float) -> Fault:
    """By another process, for so long."""

    @asynccontextmanager
    async def fault(place: Place, life: Life) -> AsyncIterator[None]:
        code = (
            "import sqlite3, sys, time\n"
            "c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)\n"
            "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True)\n"
            "time.sleep(float(sys.argv[2])); c.execute('ROLLBACK')"
        )
        holder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, str(place.database), str(seconds)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"held\n"
        yield
        await holder.wait()

    return fault


def failing(error: str, *calls: str) -> Fault:
    """Each of these system calls fails on the database's files."""

    @asynccontextmanager
    async def fault(place: Place, life: Life) -> AsyncIterator[None]:
        tracer = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={','.join(calls)}"]
        for call in calls:
            tracer += ["-e", f"inject={call}:error={error}"]
        for end in ("", "-wal"):
            tracer += ["-P", str(place.database.with_name(f"gwproxy.db{end}"))]
        async with attached(life, tracer):
            yield

    return fault


@asynccontextmanager
async def full(folder: Path) -> AsyncIterator[None]:
    """Nothing fits on the disk of this folder any more."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


# -- callers ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Told:
    """One answer, and when it came."""

    org: str
    status: int
    code: str
    scope: str
    mode: str
    request_id: str
    begun: float
    ended: float


@dataclass(slots=True)
class Crowd:
    """Callers of both organizations, and somebody who looks at the readiness all the time."""

    place: Place
    session: aiohttp.ClientSession
    told: list[Told] = field(default_factory=list)
    got: list[Got] = field(default_factory=list)
    ready: list[tuple[float, float, int, str]] = field(default_factory=list)
    """From when to when, the status, and the state of the database."""

    async def found_organizations(self) -> None:
        for org_id in ("open", "shut"):
            mode = "open" if org_id == "open" else "closed"
            organization = {"org_id": org_id, "failure_mode": mode}
            if org_id == "open":
                organization["fallback_daily_limit_usd"] = BOUND_USD
            await self.admin("organizations", organization)
            await self.admin("users", {"user_id": org_id, "org_id": org_id})
            made = await self.admin(f"users/{org_id}/api-keys", {})
            self.place.keys[org_id] = made["api_key"]

    async def admin(self, path: str, body: dict[str, Any]) -> Any:
        async with self.session.post(f"/admin/{path}", json=body, headers=ADMIN) as answer:
            assert answer.status == 201, await answer.text()
            return await answer.json()

    async def ask(self, org: str, *, stream: bool = False, model: str = MODEL) -> Told | None:
        """None: the connection broke, as when the process was killed."""
        got = Got(org, model, stream)
        self.got.append(got)
        body = {"model": model, "messages": [{"role": "user", "content": "Go on."}]}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        begun = time.monotonic()
        with suppress(aiohttp.ClientError, ConnectionError):
            async with self.session.post(
                "/v1/chat/completions", json=body, headers=bearer(self.place.keys[org])
            ) as answer:
                got.status, got.request_id = answer.status, answer.headers["x-request-id"]
                raw = await answer.read()
                got.whole = not stream or b"data: [DONE]" in raw
                got.tokens = raw.count(b'"content":"') - 1 if stream and got.whole else 0
                error = {} if answer.status == 200 else (await answer.json())["error"]
                told = Told(
                    org,
                    answer.status,
                    error.get("code") or "",
                    (error.get("gateway") or {}).get("scope", ""),
                    answer.headers["x-gateway-mode"],
                    got.request_id,
                    begun,
                    time.monotonic(),
                )
                self.told.append(told)
                return told
        return None

    async def burst(self, count: int, model: str = MODEL) -> None:
        """So many at once, half of each organization."""
        await asyncio.gather(
            *(self.ask(("open", "shut")[n % 2], model=model) for n in range(count))
        )

    async def go_on(self, org: str) -> None:
        number = 0
        while True:
            number += 1
            told = await self.ask(org, stream=number % 2 == 0)
            if told is None or told.status != 200:
                await asyncio.sleep(0.05)

    async def look(self) -> None:
        while True:
            begun = time.monotonic()
            with suppress(aiohttp.ClientError, ConnectionError):
                async with self.session.get("/health/ready") as answer:
                    state = (await answer.json())["database"]
                    self.ready.append((begun, time.monotonic(), answer.status, state))
            await asyncio.sleep(0.05)

    async def until(self, state: str) -> float:
        """Readiness tells this state of the database; how long that took."""
        begun = time.monotonic()

        def said() -> bool:
            return bool(self.ready) and self.ready[-1][0] >= begun and self.ready[-1][3] == state

        await until(said, PATIENCE_S)
        return time.monotonic() - begun


@asynccontextmanager
async def crowd(place: Place, life: Life, *, callers: int = 3) -> AsyncIterator[Crowd]:
    """They come and ask; when the block is left they have gone."""
    assert await life.ready(), place.log.read_text()
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(life.url, connector=connector) as session,
        asyncio.TaskGroup() as group,
    ):
        crowd = Crowd(place, session)
        if not place.keys:
            await crowd.found_organizations()
        tasks = [group.create_task(crowd.look())]
        for _ in range(callers):
            tasks += [group.create_task(crowd.go_on(org)) for org in ("open", "shut")]
        yield crowd
        for task in tasks:
            task.cancel()


# -- afterwards ------------------------------------------------------------------------------------


def assert_told_the_truth(crowd: Crowd) -> Counter[tuple[str, int, str]]:
    """No good key was refused as a bad one, an outage showed in the headers and in the readiness,
    and each refusal was one that could be; how many answers there were of each kind."""
    for told in crowd.told:
        match (told.org, told.status):
            case ("shut", 200):
                assert told.mode == "normal", told
            case ("shut", 503):
                assert (told.code, told.mode) == ("storage_unavailable", "normal"), told
                assert_seen(crowd, told, 503)
            case ("open", 200):
                if told.mode == "degraded":
                    assert_seen(crowd, told, 503)
            case ("open", 429):
                assert (told.scope, told.mode) == ("outage", "degraded"), told
            case _:
                raise AssertionError(told)
    return Counter((told.org, told.status, told.mode) for told in crowd.told)


def assert_seen(crowd: Crowd, told: Told, status: int) -> None:
    """Readiness said so too, at most a second before or after."""
    assert any(
        seen == status and told.begun - 1 <= ended and begun <= told.ended + 1
        for begun, ended, seen, _ in crowd.ready
    ), (told, [each for each in crowd.ready if abs(each[1] - told.ended) < 3])


async def assert_ledger(
    place: Place, demo: DemoUpstream, record: Path, got: list[Got]
) -> Counter[str]:
    """All of it is in the ledger, once and at the upstream's figures, and the bound was kept."""
    # Who hears last of an answer that was cut is the upstream.
    await until(lambda: demo.idle, PATIENCE_S)
    return assert_books(place, record_of(record), got, bounds={"outage:open": BOUND_NANOS})


def keep_older(place: Place) -> None:
    shutil.copy(place.database, place.folder / "older.db")
