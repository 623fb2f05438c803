"""How long the gateway's loop keeps everybody waiting: `python -m bench.stalls`.

Thousands of streams are open, and beside them go on, one after the other and then all at once:
bodies of up to 1 MiB, scrapes, lists by an administrator, an import, requests that are committed.
A loop with nothing to do, in a process of its own, is watched the same way in the same run: what
it waits for, the machine is to blame.
"""

import argparse
import asyncio
import dataclasses
import http.client
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bench import probes, wire
from bench.admin import Administrator
from bench.children import ChildFailed, Children, Talker
from bench.contestants import PYTHON, gwproxy
from bench.entrant import MODEL, Contestant, Site, Unavailable, free_port
from bench.links import Calls, Streams, Target, ask_upstream
from bench.run import last_words

RESULTS = Path(__file__).resolve().parent / "STALLS.md"
ALLOWED_MS = 10.0
"""Above the control, in the same phase: what is wanted of the gateway."""
READY_WITHIN_S = 90.0
BODY_SIZES = (64 << 10, 256 << 10, 1 << 20)
PAUSE_S = 0.2
"""Between two of the same: five scrapes, lists and bodies of each size a second."""
STACKS_SHOWN = 3
"""Of each phase."""
LISTS = (
    "users?limit=1000",
    "usage?group_by=user&limit=1000",
    "requests?limit=1000",
    "audit?limit=100",
)


@dataclass(frozen=True, slots=True)
class Settings:
    streams: int = 5000
    event_rate: float = 1000
    seconds: float = 15
    users: int = 20_000
    request_rate: float = 100
    stacks: bool = False


SMOKE = Settings(streams=20, event_rate=100, seconds=0.5, users=200, request_rate=20)


@dataclass(slots=True)
class Late:
    """What one loop's watch wrote during a phase."""

    worst_ms: float = 0.0
    worked_ms: float = 0.0
    """The longest that its thread worked at a stretch, whatever else the machine did."""
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def between(cls, lines: Sequence[dict[str, Any]], began: float, ended: float) -> "Late":
        mine = [line for line in lines if began <= line["t"] < ended and "late_ms" in line]
        return cls(
            max((line["late_ms"] for line in mine), default=0.0),
            max((line["worked_ms"] for line in mine), default=0.0),
            mine,
        )


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    began: float
    ended: float
    did: str
    ticks: int
    """Of the gateway's own metric, and how many of them came more than 10 ms late."""
    late_ticks: int


# -- the gateway from outside ----------------------------------------------------------------------


class Gateway:
    """What the activities ask of it, each over a connection of its own."""

    def __init__(self, port: int, contestant: Contestant) -> None:
        self.port = port
        self.headers = {**contestant.headers, "Content-Type": "application/json"}
        self.admin_key = contestant.environ["GWPROXY_ADMIN_KEY"]

    def scrape(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = {"Authorization": f"Bearer {self.admin_key}"}
            connection.request("GET", "/metrics", headers=sent)
            answer = connection.getresponse()
            page = answer.read().decode()
            if answer.status != 200:
                raise ChildFailed(f"/metrics answers {answer.status}")
            return page
        finally:
            connection.close()

    def ask(self, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", wire.PATH, body, self.headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ChildFailed(f"a body of {len(body)} B: {answer.read()[:300]!r}")
            answer.read()
        finally:
            connection.close()


def ticks(page: str) -> tuple[int, int]:
    """The metric's observations, and those of more than 10 ms."""
    name = "gwproxy_loop_stall_seconds"
    counts = [
        re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
        for series in (f"{name}_count", f'{name}_bucket{{le="0.01"}}')
    ]
    if None in counts:
        raise ChildFailed(f"{name} is not on the metrics page")
    total, in_time = (int(float(found.group(1))) for found in counts if found)
    return total, total - in_time


def body_of(size: int) -> bytes:
    sentence = "Our invoices are due on the first working day after the month in which they come. "
    messages = [{"role": "user", "content": sentence * (size // len(sentence))}]
    return orjson.dumps({"model": MODEL, "messages": messages, "max_completion_tokens": 64})


def people(count: int, prefix: str) -> bytes:
    rows = [{"kind": "organization", "org_id": "stalls"}]
    rows += [
        {"user_id": f"{prefix}-{number:06}", "org_id": "stalls", "monthly_limit_usd": "25"}
        for number in range(count)
    ]
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


# -- what goes on ----------------------------------------------------------------------------------


class Work:
    """The activities; each goes on until told, and says what it has done."""

    def __init__(self, gateway: Gateway, target: Target, wanted: Settings) -> None:
        self._gateway = gateway
        self._target = target
        self._wanted = wanted
        self._imports = 0

    async def _again(self, act: Callable[[], None], until: float) -> int:
        number = 0
        while time.monotonic() < until:
            await asyncio.to_thread(act)
            number += 1
            await asyncio.sleep(PAUSE_S)
        return number

    async def nothing(self, until: float) -> str:
        await asyncio.sleep(max(0.0, until - time.monotonic()))
        return "the streams alone"

    def _asking(self, size: int) -> Callable[[], None]:
        body = body_of(size)
        return lambda: self._gateway.ask(body)

    async def bodies(self, until: float) -> str:
        async with asyncio.TaskGroup() as tasks:
            sent = [
                tasks.create_task(self._again(self._asking(size), until)) for size in BODY_SIZES
            ]
        number = sum(task.result() for task in sent)
        return f"{number} bodies of {BODY_SIZES[0] >> 10} KiB to {BODY_SIZES[-1] >> 10} KiB"

    async def scrapes(self, until: float) -> str:
        def scrape() -> None:
            self._gateway.scrape()

        number = await self._again(scrape, until)
        return f"{number} scrapes"

    async def lists(self, until: float) -> str:
        admin = Administrator(self._gateway.port, self._gateway.admin_key)
        try:

            def ask() -> None:
                for path in LISTS:
                    admin.ask("list", "GET", path)

            number = await self._again(ask, until)
        finally:
            admin.close()
        return f"{number * len(LISTS)} lists, of up to 1,000 rows"

    async def importing(self, until: float) -> str:
        self._imports += 1
        rows = people(self._wanted.users, f"import{self._imports}")
        admin = Administrator(self._gateway.port, self._gateway.admin_key)
        try:
            await asyncio.to_thread(admin.load, rows)
        finally:
            admin.close()
        # What the import leaves to the database goes on after its answer.
        await self.nothing(until)
        return f"an import of {self._wanted.users} users"

    async def commits(self, until: float) -> str:
        calls = Calls(self._wanted.request_rate)
        try:
            request = self._target.request(wire.request_body(self._target.model))
            await calls.open(self._target, 16, request, self._target.complaint)
            await calls.run(max(0.1, until - time.monotonic()))
        finally:
            calls.close()
        if calls.errors:
            raise ChildFailed(f"requests: {dict(calls.errors)}")
        return f"{calls.completed} requests, committed"

    async def everything(self, until: float) -> str:
        async with asyncio.TaskGroup() as tasks:
            said = [
                tasks.create_task(act(until))
                for act in (self.bodies, self.scrapes, self.lists, self.importing, self.commits)
            ]
        return ", ".join(task.result() for task in said)


# -- the run ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    settings: Settings
    phases: list[Phase]
    gateway: list[dict[str, Any]]
    control: list[dict[str, Any]]
    open_streams: int
    rss: int
    whole: dict[str, Any]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _wait_ready(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if child.poll() is not None or time.monotonic() - began > READY_WITHIN_S:
                raise ChildFailed(f"gwproxy is not ready: {last_words(log)}") from None
            time.sleep(0.1)  # it is a process of its own; its start is not what is measured


async def measure(wanted: Settings, children: Children, folder: Path) -> Outcome:
    upstream_child = children.start((PYTHON, "-m", "bench.upstream"), piped=True)
    upstream = Talker(upstream_child, "bench.upstream")
    ports = await asyncio.to_thread(upstream.hear, READY_WITHIN_S)
    site = Site(folder, free_port(), ports["plain"], None)
    contestant = gwproxy(site)
    seen = {name: folder / f"{name}.jsonl" for name in ("gateway", "control")}
    watched = (PYTHON, "-m", "bench.watched")
    stacks = ("--stacks",) if wanted.stacks else ()
    control = Talker(
        children.start((*watched, str(seen["control"]), "idle"), piped=True), "bench.watched"
    )
    log = folder / "output.log"
    child = children.start(
        (*watched, *stacks, str(seen["gateway"]), *contestant.command[3:]),
        environ=contestant.environ,
        output=log,
    )
    await asyncio.to_thread(_wait_ready, site.port, child, log)
    target = Target(
        port=site.port,
        model=contestant.model,
        headers=contestant.headers,
        pid=child.pid,
        upstream_pid=upstream.pid,
        upstream_port=ports["plain"],
    )
    gateway = Gateway(site.port, contestant)
    work = Work(gateway, target, wanted)
    interval_ms = wanted.streams * 1000 / wanted.event_rate
    streams = Streams(target, 1, interval_ms)
    phases: list[Phase] = []

    async def phase(name: str, act: Callable[[float], Awaitable[str]]) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        before = ticks(await asyncio.to_thread(gateway.scrape))
        began = time.monotonic()
        did = await act(began + wanted.seconds)
        ended = time.monotonic()
        after = ticks(await asyncio.to_thread(gateway.scrape))
        phases.append(Phase(name, began, ended, did, after[0] - before[0], after[1] - before[1]))

    await ask_upstream(target, "/hold")
    try:
        began = time.monotonic()
        await streams.open(wanted.streams, spread_s=interval_ms / 1000)
        print(f"  open after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        await phase("streams alone", work.nothing)
        await phase("large bodies", work.bodies)
        await phase("scrapes", work.scrapes)
        await phase("an import", work.importing)
        await phase("lists", work.lists)
        await phase("commits", work.commits)
        await phase("all of it", work.everything)
        open_streams = sum(listener.open for listener in streams.listeners)
        rss = probes.memory(child.pid).rss
    finally:
        await ask_upstream(target, "/release")
    await streams.finish(interval_ms / 1000 + 60)
    whole = await streams.verdict()
    await asyncio.sleep(1.2)  # the watches write once a second
    del control
    return Outcome(
        wanted, phases, _lines(seen["gateway"]), _lines(seen["control"]), open_streams, rss, whole
    )


# -- the report ------------------------------------------------------------------------------------


def report(found: Outcome) -> str:
    wanted = found.settings
    lines = [
        "# How long the loop keeps everybody waiting",
        "",
        "Written by `python -m bench.stalls`; not edited by hand.",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; {probes.cpu_model()}, "
        f"{os.cpu_count()} cores, with a load of {os.getloadavg()[0]:.1f} at the end; "
        f"Python {sys.version.split()[0]}. {wanted.streams} streams, {wanted.event_rate:.0f} "
        f"events a second in all; {found.open_streams} of them open at the end of the last phase, "
        f"{found.whole['whole']} whole; the gateway then had {found.rss / 2**20:.0f} MiB (RSS).",
        "",
        "A timer of 1 ms runs in the gateway's loop and in that of a process that does nothing "
        "else, the control. *Late*: how much later than due its latest turn came, in milliseconds. "
        "*Above*: the gateway's latest beyond the control's; "
        f"{ALLOWED_MS:.0f} ms are allowed. *Worked*: the longest that the loop's thread itself was "
        "busy from one turn to the next, in milliseconds of CPU, which other programs do not "
        "change. *Ticks*: what the gateway's own metric, `gwproxy_loop_stall_seconds`, counted in "
        "the phase, and how many of these came more than 10 ms late.",
        "",
        "| what goes on | late | control | above | turns above | worked | ticks, late |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    stacks: list[str] = []
    late = busy = 0
    for phase in found.phases:
        mine = Late.between(found.gateway, phase.began, phase.ended)
        idle = Late.between(found.control, phase.began, phase.ended)
        bound = idle.worst_ms + ALLOWED_MS
        above = [line for line in mine.lines if line["late_ms"] > bound]
        lines.append(
            f"| {phase.name}: {phase.did} | {mine.worst_ms:.1f} | {idle.worst_ms:.1f} "
            f"| {max(0.0, mine.worst_ms - idle.worst_ms):.1f} | {len(above)} "
            f"| {mine.worked_ms:.1f} | {phase.ticks}, {phase.late_ticks} |"
        )
        late += bool(above)
        busy += mine.worked_ms > ALLOWED_MS
        longest = sorted(mine.lines, key=lambda line: -float(line["worked_ms"]))
        for line in longest[:STACKS_SHOWN]:
            if line.get("stacks"):
                head = f"- {phase.name}: {line['late_ms']} ms late, {line['worked_ms']} ms of work"
                stacks += [head, *(f"  - `{stack}`" for stack in line["stacks"])]
    lines += [
        "",
        f"Phases with a turn later than allowed: {late} of {len(found.phases)}. Phases in which "
        f"the thread worked for more than {ALLOWED_MS:.0f} ms at a stretch: {busy}.",
    ]
    if stacks:
        lines += ["", "## What the longest turns were doing", "", *stacks]
    return "\n".join(lines) + "\n"


def run(wanted: Settings) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="gwproxy-stalls-") as name, Children() as children:
        return uvloop.run(measure(wanted, children, Path(name)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stalls", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds: does the tool itself work?")
    parser.add_argument("--streams", type=int, help="open at once (5000)")
    parser.add_argument("--seconds", type=float, help="of each of the seven phases (15)")
    parser.add_argument("--users", type=int, help="rows of an import (20000)")
    parser.add_argument(
        "--rate", type=float, help="requests a second in the phase of commits (100)"
    )
    parser.add_argument("--stacks", action="store_true", help="say what the longest turns did")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    asked = {
        "streams": args.streams,
        "seconds": args.seconds,
        "users": args.users,
        "request_rate": args.rate,
    }
    wanted = dataclasses.replace(
        SMOKE if args.smoke else Settings(),
        stacks=args.stacks,
        **{name: value for name, value in asked.items() if value is not None},
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        found = run(wanted)
    except (ChildFailed, Unavailable) as error:
        print(f"the run broke off: {error}", file=sys.stderr)
        return 1
    text = report(found)
    print(text)
    if args.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
