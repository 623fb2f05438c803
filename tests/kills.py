"""What the drills that kill the gateway share: its real process, a folder that outlives it, clients
who expect the connection to break, and the question whether the books are right afterwards.

The upstream lives in the test's own process, so that it outlives the gateway: what it has received
and sent is believed, and no word of the gateway about that.
"""

import asyncio
import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.test_utils import TestClient

from gwproxy.demo import DemoUpstream
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.scan import boot_id, scan
from gwproxy.storage.segments import segment_name
from gwproxy.storage.verify import findings
from tests.harness import ADMIN, ADMIN_KEY, UPSTREAM_TOKEN, Gateway, bearer, make_key
from tests.sdk import config

ROOT = Path(__file__).parent.parent
PATIENCE_S = 90.0
"""For what takes a second: other things may be going on on the machine."""

INPUT_NANOS, OUTPUT_NANOS = 1000, 2000
"""A token of `mock/...`, by the price that `tests.sdk` configures."""

_UPSTREAM = """
first_byte_timeout_s = 600
answer_timeout_s = 600
idle_timeout_s = 600
connect_timeout_s = 300
"""
"""Who waits in these drills waits until he is killed."""

_MORE = """
[providers.closed]
flavour = "openai"
base_url = "http://127.0.0.1:{closed}/v1"
[prices.models."closed/*"]
input = "1.00"
output = "2.00"
[prices.models."deepseek/*"]
input = "1.00"
output = "2.00"
reasons = true
[models.second]
chain = [
    {{ provider = "mock", model = "prose+status-503" }},
    {{ provider = "mock", model = "prose+stall-after-5" }},
]
[models.third]
chain = [
    {{ provider = "mock", model = "prose+reset-before-headers" }},
    {{ provider = "groq", model = "llama-3.3-70b-versatile+status-500" }},
    {{ provider = "mock", model = "prose" }},
]
[breaker]
failure_threshold = 1000
[storage]
journal_segment_bytes = 1048576
journal_max_bytes = 67108864
[log]
level = "warning"
"""


# -- the process and its folder --------------------------------------------------------------------


class Life:
    """One process of the gateway, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""

    async def ready(self) -> bool:
        """True once it serves; False when it ended before that."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = (await self.process.stdout.readline()).decode()
        self.url = line.strip().rpartition(" ")[2]
        return bool(self.url)

    def kill(self) -> None:
        """At once, unless it has ended already."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group: a tracer goes with it

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()

    def ask_to_end(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()

    async def stop(self) -> None:
        """In order, so that the database has all that the journal has."""
        self.ask_to_end()
        assert await self.ended() == 0, "it did not end in order"


@dataclass(frozen=True)
class Place:
    """The folder of one ledger. `keys` are API keys by their users' names."""

    folder: Path
    keys: dict[str, str]

    @property
    def database(self) -> Path:
        return self.folder / "gwproxy.db"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    @property
    def log(self) -> Path:
        return self.folder / "serve.log"

    def copy(self, folder: Path) -> "Place":
        shutil.copytree(self.folder, folder)
        return Place(folder, self.keys)

    @asynccontextmanager
    async def life(self, *wrapper: str) -> AsyncIterator[Life]:
        """`gwproxy serve` as a process of its own, which does not outlive the `with`."""
        command = [*wrapper, sys.executable, "-m", "gwproxy", "serve"]
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(*command, "--config", str(self.folder / "config.toml")),
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(ROOT),
                    "GWPROXY_ADMIN_KEY": ADMIN_KEY,
                    "UPSTREAM_TOKEN": UPSTREAM_TOKEN,
                },
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=_dies_with_its_parent,
            )
        life = Life(process)
        try:
            yield life
        finally:
            life.kill()
            await life.ended()


def _dies_with_its_parent() -> None:
    """Also a test that is killed itself leaves no gateway behind (prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def configured(folder: Path, demo: DemoUpstream, closed: int) -> Place:
    """A folder in which there was no gateway yet. `closed` is the port of `never_accepting`."""
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text(config(demo, "cloudflare-compat", _UPSTREAM) + _MORE.format(closed=closed))
    path.chmod(0o600)
    return Place(folder, {})


async def found(
    folder: Path, demo: DemoUpstream, closed: int, limits: Mapping[str, str | None]
) -> Place:
    """A new ledger: a user for each name, with a key and his monthly limit in dollars."""
    place = configured(folder, demo, closed)
    text = (folder / "config.toml").read_text()
    async with TestClient(Gateway(folder, text)) as client:
        for name, limit in limits.items():
            user = {"user_id": name, "monthly_limit_usd": limit}
            assert (await client.post("/admin/users", json=user, headers=ADMIN)).status == 201
            place.keys[name] = await make_key(client, name)
    return place


@contextmanager
def never_accepting() -> Iterator[int]:
    """A port to which every connection stays half open: the queue is full, and stays so."""
    with socket.socket() as listening, socket.socket() as first:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port: int = listening.getsockname()[1]
        first.connect(("127.0.0.1", port))
        yield port


# -- death by system call --------------------------------------------------------------------------


class Where(Enum):
    """Some of the files of a ledger."""

    JOURNAL = "the segments that are written to, and the next ones"
    OLD = "the segments before those, which go once a backup has them"
    LOG = "SQLite's write-ahead log"

    def files(self, place: Place) -> list[Path]:
        if self is Where.LOG:
            return [place.folder / "gwproxy.db-wal"]
        there = sorted(place.journal.glob("*.journal"))
        if self is Where.OLD:
            return there[:-2]
        last = int(there[-1].stem)
        return [place.journal / segment_name(last + i) for i in range(-1, 8)]  # it and its spare


@functools.cache
def why_no_tracing() -> str:
    """Why a running process cannot be traced on this machine; empty if it can."""
    if shutil.which("strace") is None:
        return "there is no strace on this machine"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        command = ["strace", "-o", "/dev/null", "-p", str(sleeper.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            tracer.kill()
        sleeper.kill()
    return "" if "attached" in said else f"strace cannot trace here: {said.strip()}"


@dataclass(frozen=True)
class Strike:
    """Death of the process when one of its threads is about to make a system call for the
    `when`th time, counted for each thread; where `where` is given, on its files alone."""

    call: str
    when: int
    where: Where | None = None

    def tracer(self, place: Place) -> list[str]:
        """The command up to what is to be traced."""
        inject = f"inject={self.call}:signal=SIGKILL:when={self.when}"
        command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={self.call}", "-e", inject]
        for path in self.where.files(place) if self.where else ():
            command += ["-P", str(path)]
        return command

    def from_the_start(self, place: Place) -> list[str]:
        """What to put in front of a command. The tracer is a child of its child (-D): the process
        is the same as without it."""
        return [*self.tracer(place), "-qq", "-D"]

    def from_now_on(self, place: Place, life: Life) -> AbstractAsyncContextManager[None]:
        return attached(life, self.tracer(place))


def syncs_take(seconds: float, life: Life) -> AbstractAsyncContextManager[None]:
    """Within, the disk is slow to sync: what is recorded is neither known to be on the disk nor in
    the database, which waits for that."""
    delay = f"inject=fdatasync:delay_enter={int(seconds * 1e6)}"
    return attached(life, ["strace", "-f", "-o", "/dev/null", "-e", "fdatasync", "-e", delay])


@asynccontextmanager
async def attached(life: Life, tracer: Sequence[str]) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *(*tracer, "-p", str(life.process.pid)),
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=_dies_with_its_parent,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            said = await process.stderr.readline()
        assert b"attached" in said, said
        yield
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# -- clients ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Got:
    """What a client got of one answer."""

    user: str
    model: str
    stream: bool
    status: int = 0
    """0: no head came."""
    request_id: str = ""
    tokens: int = 0
    """Events with text in them: the upstream sends one for each token."""
    usage: bool = False
    whole: bool = False

    @property
    def served(self) -> bool:
        """All of an answer, and not a refusal."""
        return self.whole and self.status == 200


class Client:
    """Users who ask, and remember what they got."""

    def __init__(self, place: Place, session: aiohttp.ClientSession) -> None:
        self.place = place
        self.session = session
        self.got: list[Got] = []

    async def ask(
        self,
        user: str,
        model: str,
        stream: bool,
        *,
        most: int | None = None,
        leaves_after: int = 0,
    ) -> Got:
        """Until the answer is whole or its connection breaks. `most`: the maximum that is declared;
        `leaves_after`: tokens after which the client hangs up."""
        got = Got(user, model, stream)
        self.got.append(got)
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": f"Question {len(self.got)}?"}],
        }
        if most is not None:
            body["max_tokens"] = most
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        with suppress(aiohttp.ClientError, ConnectionError):
            async with self.session.post(
                "/v1/chat/completions", json=body, headers=bearer(self.place.keys[user])
            ) as response:
                got.status, got.request_id = response.status, response.headers["x-request-id"]
                if not stream or got.status != 200:
                    await response.read()
                    got.whole = True
                    return got
                async for line in response.content:
                    _hear(got, line)
                    if leaves_after and got.tokens >= leaves_after:
                        response.close()
                        return got
        return got

    async def usage(self, user: str) -> Any:
        headers = bearer(self.place.keys[user])
        async with self.session.get("/v1/usage", headers=headers) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def receipt(self, user: str, request_id: str) -> Any:
        headers = bearer(self.place.keys[user])
        async with self.session.get(f"/v1/receipts/{request_id}", headers=headers) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def authenticates(self, key: str) -> bool:
        async with self.session.get("/v1/usage", headers=bearer(key)) as response:
            assert response.status in (200, 401), await response.text()
            return response.status == 200

    async def held(self, user: str) -> int:
        """Nano-USD, the same on each of his own two accounts."""
        scopes = {each["scope"]: each for each in (await self.usage(user))["scopes"]}
        assert scopes["key"]["held_usd"] == scopes["user"]["held_usd"]
        return nanos(scopes["user"]["held_usd"])


def _hear(got: Got, line: bytes) -> None:
    if line.startswith(b"data: [DONE]"):
        got.whole = True
    elif line.startswith(b"data: {") and line.endswith(b"\n"):
        event = json.loads(line[6:])
        got.usage |= event.get("usage") is not None
        for choice in event.get("choices", ()):
            if choice["delta"].get("content"):
                got.tokens += 1


@dataclass(slots=True)
class Office:
    """An administrator, who makes keys and revokes them. What he was told has to stay so."""

    valid: list[tuple[str, str]]
    """Keys and their ids."""
    revoked: list[str]

    async def work(self, client: Client, user: str) -> None:
        """Until the gateway is gone."""
        url = f"/admin/users/{user}/api-keys"
        with suppress(aiohttp.ClientError, ConnectionError):
            while True:
                async with client.session.post(url, json={}, headers=ADMIN) as response:
                    made = await response.json()
                    if response.status == 503:
                        return  # it is about to end
                    self.valid.append((made["api_key"], made["key_id"]))
                if len(self.valid) > 3:
                    key, key_id = self.valid.pop(0)
                    async with client.session.delete(f"{url}/{key_id}", headers=ADMIN) as response:
                        if response.status == 503:
                            return
                        assert response.status == 204, await response.text()
                        self.revoked.append(key)

    async def assert_kept(self, client: Client) -> None:
        for key, _ in self.valid:
            assert await client.authenticates(key)
        for key in self.revoked[-3:]:
            assert not await client.authenticates(key)


@asynccontextmanager
async def clients(place: Place, life: Life) -> AsyncIterator[Client]:
    """Of a gateway that has to become ready."""
    assert await life.ready(), "it did not start"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(life.url, connector=connector) as session:
        yield Client(place, session)


def nanos(usd: str) -> int:
    return int(Decimal(usd) * 10**9)


def price(usage: dict[str, Any]) -> int:
    """What the upstream's own figures cost at `mock`, in nano-USD."""
    return int(usage["prompt_tokens"] * INPUT_NANOS + usage["completion_tokens"] * OUTPUT_NANOS)


# -- the books -------------------------------------------------------------------------------------


@contextmanager
def explained(place: Place, **about: object) -> Iterator[None]:
    """Whatever fails inside tells where, and what stood last in the journal and in the log."""
    try:
        yield
    except Exception as error:
        lines = [line for path in sorted(place.journal.glob("*.journal")) for line in written(path)]
        log = place.log.read_text().splitlines() if place.log.exists() else []
        error.add_note("\n".join([repr(about), place.folder.name, *lines[-12:], *log[-8:]]))
        raise


def written(segment: Path) -> list[str]:
    """The lines of a segment, whether they are whole or not."""
    text = segment.read_bytes().rstrip(b"\0").decode(errors="replace")
    return [f"{segment.name}: {line}" for line in text.splitlines()]


def reserved(place: Place) -> dict[str, str]:
    """Which request of each user stands last in the journal: its id, also where no client was told
    it."""
    found = {}
    for path in sorted(place.journal.glob("*.journal")):
        for line in written(path):
            if '{"k":"reserve",' in line:
                record = json.loads(line[line.index("{") :])
                user = record["holds"][1][0].removeprefix("user:")
                found[user] = record["id"]
    return found


async def assert_settled(client: Client, before: Sequence[Got]) -> None:
    """A gateway that has just started: nothing is held, and every client finds what became of the
    requests of the life before: of all that were cut, and of the last that were not."""
    for user in client.place.keys:
        usage = await client.usage(user)
        assert [each["held_usd"] for each in usage["scopes"]] == ["0.000000000"] * 3, usage
        assert all(each["outcome"] for each in usage["requests"]), usage
    answered = [got for got in before if got.status == 200]
    cut = [got for got in answered if not got.whole]
    for got in (*cut, *answered[-10:]):
        receipt = await client.receipt(got.user, got.request_id)
        assert_charged(got, receipt["outcome"], nanos(receipt["cost_usd"]), receipt)


def record_of(file: Path) -> list[dict[str, Any]]:
    """The upstream's own record, as it wrote it down line by line."""
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def assert_charged(got: Got, outcome: str, cost: int, about: object) -> None:
    """He is charged for what he got, and more than nothing."""
    least = INPUT_NANOS + got.tokens * OUTPUT_NANOS if got.model.startswith("mock/") else 1
    assert cost >= least, (got, about)
    if got.served:
        assert outcome in ("completed", "recovered"), (got, about)
        # A whole answer leaves only after its settlement.
        assert outcome == "completed" or got.stream, (got, about)


def assert_books(
    place: Place,
    demo: Sequence[dict[str, Any]],
    got: Sequence[Got],
    bounds: Mapping[str, int] | None = None,
) -> Counter[str]:
    """The books of a gateway that has stopped in order agree with themselves, with the record of
    the upstream and with what the clients got; how many requests had which outcome. `bounds` are
    those of outages, in nano-USD by account."""
    uri = f"{place.database.as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True)
    try:
        connection.row_factory = sqlite3.Row
        return _assert_books(place, connection, demo, got, bounds or {})
    finally:
        connection.close()


def _assert_books(
    place: Place,
    connection: sqlite3.Connection,
    demo: Sequence[dict[str, Any]],
    got: Sequence[Got],
    bounds: Mapping[str, int],
) -> Counter[str]:
    def rows(sql: str) -> list[sqlite3.Row]:
        return connection.execute(sql).fetchall()

    assert rows("PRAGMA integrity_check")[0][0] == "ok"
    assert [str(each) for each in findings(connection)] == []
    assert rows("SELECT * FROM hold") == []
    ledger = {row["id"]: row for row in rows("SELECT * FROM request")}
    assert all(row["outcome"] for row in ledger.values()), "a request without an end"

    _assert_sums(rows, list(ledger.values()), bounds)
    _assert_as_recorded(place, rows, {row["lsn"]: row for row in ledger.values()})

    # The upstream's record, line by line; a fallback has a line for each attempt.
    upstream: dict[str, list[dict[str, Any]]] = {}
    for line in demo:
        upstream.setdefault(line["request_id"], []).append(line)
    assert upstream.keys() <= ledger.keys(), "sent upstream, and not in the ledger"
    for request_id, row in ledger.items():
        lines = upstream.get(request_id, [])
        about = (dict(row), lines)
        if row["outcome"] == "recovered":
            assert 0 < row["cost"] <= row["held"], about
            assert row["overrun"] == 0, about
        elif row["outcome"] in ("failed", "void"):
            # Never sent, or refused each time: nobody pays for that.
            assert row["cost"] == 0, about
            assert all(line["end"] == "refused" for line in lines), about
        elif row["outcome"] == "client_left" and not lines:
            assert row["cost"] == 0, about  # cancelled before it was sent
        else:
            assert lines, about
            assert row["cost"] > 0, about
        if row["outcome"] == "completed":
            (last,) = [line for line in lines if line["completed"]]
            assert row["source"] == "provider", about
            if row["model"].startswith("mock/"):
                assert row["cost"] == price(last["usage"]), about

    for each in got:
        if each.status == 200:
            row = ledger[each.request_id]
            assert row["user_id"] == each.user
            assert_charged(each, row["outcome"], row["cost"], dict(row))
    return Counter(row["outcome"] for row in ledger.values())


def _assert_sums(
    rows: Callable[[str], list[sqlite3.Row]],
    requests: Sequence[sqlite3.Row],
    bounds: Mapping[str, int],
) -> None:
    """Balances are the sums of the lines, and of the requests' costs, added up here once more."""
    balances = {(row["account"], row["period"]): row for row in rows("SELECT * FROM balance")}
    lines: Counter[tuple[str, str]] = Counter()
    for row in rows("SELECT account, period, amount FROM entry"):
        lines[row["account"], row["period"]] += row["amount"]
    assert {key: row["spent"] for key, row in balances.items() if row["spent"]} == lines
    costs: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for row in requests:
        for scope in ("key", "user", "org"):
            account = (f"{scope}:{row[scope + '_id']}", row["period"])
            costs[account] += row["cost"]
            counts[account] += row["outcome"] != "void"
    others = ("provider:", "outage:")
    own = {key: row for key, row in balances.items() if not key[0].startswith(others)}
    assert {key: (row["spent"], row["count"]) for key, row in own.items()} == {
        key: (cost, counts[key]) for key, cost in costs.items()
    }
    for start, posted in zip(
        others, (requests, [row for row in requests if row["degraded"]]), strict=True
    ):
        spent = {key: row["spent"] for key, row in balances.items() if key[0].startswith(start)}
        assert sum(spent.values()) == sum(row["cost"] for row in posted), start
        assert all(nanos <= bounds.get(key[0], nanos) for key, nanos in spent.items()), spent
    limits = dict(rows("SELECT user_id, monthly_limit FROM user WHERE monthly_limit IS NOT NULL"))
    for (account, _), row in own.items():
        limit = limits.get(account.removeprefix("user:"))
        assert limit is None or row["spent"] <= limit, (account, limit, dict(row))


def _assert_as_recorded(
    place: Place, rows: Callable[[str], list[sqlite3.Row]], requests: dict[int, sqlite3.Row]
) -> None:
    """The journal ends in order, the tables go up to its end, and of each reservation that it
    tells of it has one settlement, which is the one in the tables."""
    found = scan(OS_FILES, place.journal, boot_id(OS_FILES), 0)
    trail = found.trail
    cursor = trail.segments[0].start
    records = []
    while cursor.lsn < trail.end.lsn:
        payloads, cursor = trail.read(cursor, 1000, 1 << 20)
        records += [json.loads(payload) for payload in payloads]
    assert records[-1]["k"] == "stop"
    (mark,) = rows("SELECT applied_lsn, applied_chain FROM meta")
    assert tuple(mark) == (trail.end.lsn, trail.end.chain)
    settled = Counter(record["r"] for record in records if record["k"] == "settle")
    assert set(settled.values()) <= {1}
    assert {record["lsn"] for record in records if record["k"] == "reserve"} <= settled.keys()
    for record in records:
        if record["k"] == "settle":
            row = requests[record["r"]]
            assert (row["cost"], row["outcome"]) == (record["cost"], record["outcome"])
