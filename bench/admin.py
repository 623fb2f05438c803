"""What administration costs the streams, and how long it takes: `python -m bench.admin`.

A gateway with ten thousand users and a million requests behind it serves paced streams, while one
administrator does one thing after the other: changes, reports, and at last an import. Quiet and
busy stretches take turns, so that each is seen beside what the machine does by itself.
"""

import argparse
import asyncio
import http.client
import io
import sqlite3
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson
import uvloop

from bench import wire
from bench.children import ChildFailed, Children, Talker
from bench.entrant import free_port
from bench.ledger import loop_ns
from gwproxy.log import Log
from gwproxy.state.store import Kept, opened

RESULTS = Path(__file__).resolve().parent / "ADMIN.md"
MIGRATION = Path("gwproxy/storage/migrations/0003_usage.sql")
ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
INTERVAL_MS = 50.0
START_S = 60.0
ANSWER_S = 300.0
"""An import says nothing before its last row is checked, and a busy machine takes its time."""

CONFIG = """
[server]
listen = "127.0.0.1:{port}"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "openai"
base_url = "http://127.0.0.1:{upstream}/v1"
[prices.models."mock/echo"]
input = "0.01"
output = "0.01"
[storage]
path = "{folder}/gwproxy.db"
journal = "{folder}/journal"
"""

_REQUESTS = """
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
    INSERT INTO request (lsn, t, period, id, key_id, user_id, org_id, model, provider,
        upstream_model, prices, held, degraded, stream, settled_at, outcome, source, cost, overrun,
        input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
        attempts, status, log_id)
    SELECT -i, :now - i * 2000, strftime('%Y-%m', (:now - i * 2000) / 1000, 'unixepoch'),
        'req_' || i, 'key_' || i % :users, printf('user-%05d', i % :users), 'org-' || i % 100,
        'mock/echo', 'provider-' || i % 4, 'model-' || i % 20, 'v', 1000, 0, 1,
        :now - i * 2000 + 900,
        iif(i % 50, 'completed', 'failed'), 'provider', 1000, 0, 400, 0, 0, 10, 0,
        '[["provider-0","model-0",200,"","",900,1000]]', 200, ''
    FROM n"""


# -- what is there before ------------------------------------------------------------------------


async def fill(folder: Path, users: int) -> None:
    """Organizations, users and keys, through the journal as the admin plane writes them."""
    kept = Kept(folder / "gwproxy.db", folder / "journal")
    async with opened(kept, Log(io.StringIO(), "error")) as store:
        for number in range(100):
            await store.directory.create_organization(org_id=f"org-{number}")
        for number in range(users):
            name = f"user-{number:05}"
            await store.directory.create_user(user_id=name, org_id=f"org-{number % 100}")
            await store.directory.create_key(name)
            if number % 100 == 0:
                await asyncio.sleep(0)
        await store.catch_up(60)


def history(database: Path, users: int, requests: int) -> None:
    """A month of requests, put where the writer would have put them."""
    sql = MIGRATION.read_text()
    sums = sql[sql.index("INSERT INTO usage") : sql.index("-- Looking back")]
    with sqlite3.connect(database) as connection:
        now = int(time.time() * 1000)
        connection.execute(_REQUESTS, {"count": requests, "users": users, "now": now})
        connection.executescript(sums)


# -- streams -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What came of events, in ms: how long each took through the gateway, and how long after the
    one before it came."""

    taken: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, other: "Seen") -> None:
        self.taken += other.taken
        self.gaps += other.gaps


class Streams:
    """Open streams, and what is seen of them."""

    def __init__(self) -> None:
        self._seen = Seen()

    async def read(self, port: int, key: str, number: int, gone: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = wire.stream_body(
            "mock/echo", stream_id=number, n_events=1_000_000, interval_ms=INTERVAL_MS
        )
        headers = {"Authorization": f"Bearer {key}"}
        writer.write(wire.request_bytes("gateway", headers, body))
        before: int | None = None
        while not gone.is_set():
            line = await reader.readline()
            if not line:
                raise ChildFailed("a stream has ended")
            sent = wire.stamp(line)
            if sent is not None:
                now = time.monotonic_ns()
                self._seen.taken.append((now - sent) / 1e6)
                if before is not None:
                    self._seen.gaps.append((now - before) / 1e6)
                before = now
        writer.transport.abort()

    def take(self) -> Seen:
        seen, self._seen = self._seen, Seen()
        return seen


# -- the administrator ---------------------------------------------------------------------------


class Administrator:
    def __init__(self, port: int, key: str = ADMIN_KEY) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        self._key = key
        self.took: dict[str, list[float]] = defaultdict(list)

    def ask(self, name: str, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        sent = None if body is None else orjson.dumps(body)
        began = time.perf_counter()
        self._connection.request(method, f"/admin/{path}", sent, headers)
        answer = self._connection.getresponse()
        raw = answer.read()
        self.took[name].append((time.perf_counter() - began) * 1000)
        if answer.status >= 300:
            raise ChildFailed(f"{method} {path}: {raw.decode()}")
        return orjson.loads(raw) if raw else None

    def load(self, rows: bytes) -> None:
        """Import them; the report of each is read and not looked at."""
        headers = {
            "Authorization": f"Bearer {self._key}",
            "Content-Type": "application/x-ndjson",
        }
        self._connection.request("POST", "/admin/import", rows, headers)
        answer = self._connection.getresponse()
        raw = answer.read()
        if answer.status != 200 or b'"committed":true' not in raw[:100]:
            raise ChildFailed(f"the import: {raw[:1000].decode()}")

    def close(self) -> None:
        self._connection.close()


def changes(admin: Administrator, number: int, users: int) -> Iterator[None]:
    """A round of them; whoever drives it lets the streams breathe in between."""
    name, new = f"user-{number * 37 % users:05}", f"new-{number}"
    grant = {"amount_usd": "1", "reason": "bench"}
    for each in (
        ("create a user", "POST", "users", {"user_id": new}),
        ("show a user", "GET", f"users/{name}"),
        ("change a user", "PATCH", f"users/{name}", {"rpm": number + 1}),
        ("grant", "POST", f"users/{name}/grants", grant),
        ("list 100 users", "GET", f"users?cursor={name}"),
        ("list 1,000 users", "GET", "users?limit=1000"),
        ("look for suspended users", "GET", "users?status=suspended"),
        ("list an organization's users", "GET", f"organizations/org-{number % 100}/users"),
        ("delete a user", "DELETE", f"users/{new}"),
    ):
        admin.ask(*each)
        yield
    key = admin.ask("create a key", "POST", f"users/{name}/api-keys", {})
    yield
    path = f"users/{name}/api-keys/{key['key_id']}"
    admin.ask("rotate a key", "POST", f"{path}/rotate", {})
    yield
    admin.ask("revoke a key", "DELETE", path)
    yield


def reports(admin: Administrator, number: int, users: int) -> Iterator[None]:
    """A round of them."""
    name = f"user-{number * 37 % users:05}"
    for each in (
        ("how a user stands", "GET", f"users/{name}/usage"),
        ("a user's report by model", "GET", f"users/{name}/usage?group_by=model"),
        ("report by provider", "GET", "usage?group_by=provider"),
        ("report by organization", "GET", "usage?group_by=org"),
        ("report by user", "GET", "usage?group_by=user"),
        ("report by user, 1,000 a page", "GET", "usage?group_by=user&limit=1000"),
        ("report by day", "GET", "usage?group_by=day"),
        ("the last requests", "GET", "requests"),
        ("a user's last requests", "GET", f"requests?user_id={name}"),
        ("failed requests", "GET", "requests?outcome=failed"),
        ("requests of a model that there is not", "GET", "requests?model=none"),
        ("the audit", "GET", "audit"),
        ("the audit of a user", "GET", f"audit?noun=user&id={name}"),
    ):
        admin.ask(*each)
        yield


def newcomers(count: int) -> bytes:
    """A file of users who are not there yet, in no order."""
    return b"".join(
        orjson.dumps(
            {
                "user_id": f"imported-{number:06}",
                "org_id": f"org-{number % 100}",
                "email": f"imported.{number}@example.org",
                "monthly_limit_usd": "25.00",
                "rpm": 60,
            }
        )
        + b"\n"
        for number in Random(1).sample(range(count), count)
    )


# -- the run -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    admin: Administrator
    stretches: dict[str, Seen] = field(default_factory=lambda: defaultdict(Seen))
    import_s: float = 0.0
    stored_s: float = 0.0


QUIET: Final = "nobody administers"
CHANGES: Final = "changes, one after the other"
REPORTS: Final = "reports, one after the other"
BEFORE: Final = "nobody administers, before the import"
IMPORT: Final = "the import, until it is in force"
STORED: Final = "until the database has it"


async def measure(
    port: int, users: int, count: int, rounds: int, seconds: float, imported: int
) -> Measured:
    admin = Administrator(port)
    admin.ask("", "POST", "users", {"user_id": "streamer"})
    key = admin.ask("", "POST", "users/streamer/api-keys", {})["api_key"]
    del admin.took[""]
    measured, streams, gone = Measured(admin), Streams(), asyncio.Event()
    rows, number = newcomers(imported), 0
    async with asyncio.TaskGroup() as group:
        for each in range(count):
            group.create_task(streams.read(port, key, each, gone))
        await asyncio.sleep(2)
        for _ in range(rounds):
            for name, work in ((QUIET, None), (CHANGES, changes), (REPORTS, reports)):
                streams.take()
                end = time.monotonic() + seconds
                if work is None:
                    await asyncio.sleep(seconds)
                while time.monotonic() < end and work is not None:
                    steps = work(admin, number, users)
                    number += 1
                    # In a thread of its own: to wait for an answer would hold up the reading.
                    while await asyncio.to_thread(next, steps, "over") != "over":  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                measured.stretches[name].add(streams.take())
        if imported:
            await asyncio.sleep(seconds)
            measured.stretches[BEFORE] = streams.take()
            began = time.monotonic()
            await asyncio.to_thread(admin.load, rows)
            measured.import_s = time.monotonic() - began
            measured.stretches[IMPORT] = streams.take()
            while (await asyncio.to_thread(admin.ask, "", "GET", "usage"))["behind"]:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            del admin.took[""]
            measured.stored_s = time.monotonic() - began
            measured.stretches[STORED] = streams.take()
        gone.set()
    admin.close()
    return measured


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def report(measured: Measured, users: int, requests: int, imported: int) -> str:
    lines = [
        "# What administration costs",
        "",
        f"{users:,} users and {requests:,} requests in the database, paced streams under way;",
        "milliseconds, over HTTP on one connection. Written by `python -m bench.admin`, Python",
        f"{sys.version.split()[0]}; client, upstream and gateway shared the machine's cores. One",
        f"turn of an empty loop took {loop_ns():.0f} ns; on an idle machine of this kind about 20.",
        "",
        "| operation | p50 | slowest | times |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {at(took, 0.5):.1f} | {max(took):.1f} | {len(took)} |"
            for name, took in measured.admin.took.items()
        ),
        "",
    ]
    if imported:
        lines += [
            f"{imported:,} users imported: in force after {measured.import_s:.1f} s, in the",
            f"database after {measured.stored_s:.1f} s.",
            "",
        ]
    lines += [
        "What the streams notice: *through* is from the upstream's write of an event to its",
        f"arrival at the client, *gap* from one event to the next, sent {INTERVAL_MS:g} ms",
        "apart.",
        "",
        "| | through p50 | p99 | worst | gap p50 | p99 | worst | events |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seen in measured.stretches.items():
        cells = " | ".join(
            f"{at(values, share):.2f}"
            for values in (seen.taken, seen.gaps)
            for share in (0.5, 0.99, 1)
        )
        lines.append(f"| {name} | {cells} | {len(seen.taken):,} |")
    return "\n".join(lines) + "\n"


def started(port: int, alive: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and alive():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise ChildFailed("the gateway did not start")


def run(users: int, requests: int, streams: int, rounds: int, seconds: float, imported: int) -> str:
    with tempfile.TemporaryDirectory(prefix="gwproxy-bench-") as name, Children() as children:
        folder = Path(name)
        uvloop.run(fill(folder, users))
        history(folder / "gwproxy.db", users, requests)
        upstream = children.start((sys.executable, "-m", "bench.upstream"), piped=True)
        ports = Talker(upstream, "the upstream").hear(10)
        port = free_port()
        config = folder / "config.toml"
        config.write_text(CONFIG.format(port=port, upstream=ports["plain"], folder=folder))
        config.chmod(0o600)
        gateway = children.start(
            (sys.executable, "-m", "gwproxy", "serve", "--config", str(config)),
            environ={"GWPROXY_ADMIN_KEY": ADMIN_KEY},
            output=folder / "log",
        )
        started(port, lambda: gateway.poll() is None)
        measured = uvloop.run(measure(port, users, streams, rounds, seconds, imported))
    return report(measured, users, requests, imported)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.admin")
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stretch")
    parser.add_argument("--import", dest="imported", type=int, default=100_000, help="users")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    text = run(args.users, args.requests, args.streams, args.rounds, args.seconds, args.imported)
    print(text)
    if args.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
