"""What the ledger itself costs: `python -m bench.ledger`, in one process and without sockets.

Three layers, each with the one below it: reserve and settle in memory, the same with the journal,
and all of it with the database behind, at a fixed rate beside an idle event loop.
"""

import argparse
import asyncio
import gc
import io
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import uvloop

from gwproxy.app import GIL_SWITCH_S
from gwproxy.core.chat import ChatRequest
from gwproxy.core.identity import (
    ApiKey,
    KeyKind,
    Organization,
    Principal,
    User,
    digest,
    mint,
    parse,
)
from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.core.ledger import Account, State, apply, held, left
from gwproxy.core.money import Nanos
from gwproxy.core.pricing import PriceBook
from gwproxy.core.records import Admin, Reserve, Settle, Tried
from gwproxy.core.routing import Candidate, Provider
from gwproxy.core.trace import Attempt, Trace
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.state.accounts import Accounts, Terms
from gwproxy.state.books import Books
from gwproxy.state.keyring import Keyring
from gwproxy.state.ledger import Ledger
from gwproxy.state.outage import Outage
from gwproxy.state.rates import Rates
from gwproxy.state.store import Kept, Store, opened

RESULTS = Path(__file__).resolve().parent / "LEDGER.md"
TICK_S = 0.001
LIMIT = Nanos(10**15)
ANSWER = {"usage": {"prompt_tokens": 12, "completion_tokens": 40, "total_tokens": 52}}
CANDIDATE = Candidate(Provider("mock", "mock", "mock"), "echo", "mock/echo", "echo")


class Counted:
    """In the journal's place: it takes records and keeps nothing."""

    synced = 0
    lost = None

    def __init__(self) -> None:
        self.next_lsn = 1

    def write(self, payload: bytes) -> None:
        self.next_lsn += 1

    def room(self) -> int:
        return 1 << 40


def _count(text: str) -> int:
    return len(text) // 4


async def _at_once(lsn: int) -> None:
    return None


class Desk:
    """Books with one user who has limits everywhere, and requests of his."""

    def __init__(self, ledger: Ledger, keyring: Keyring, principal: Principal) -> None:
        table: dict[str, Any] = {"version": "bench", "aliases": {}, "providers": {}}
        prices = PriceBook(table, {"mock/echo": {"input": "1", "output": "2"}})
        accounts = Accounts(keyring, Terms(provider_daily={"mock": LIMIT}))
        self.books = Books(
            ledger,
            keyring,
            accounts,
            prices,
            Rates(time.monotonic),
            OutputLengths(),
            Factors(),
            count=_count,
            durable=_at_once,
            outage=Outage(),
            metrics=Metrics(frozenset({"mock"}), frozenset({"echo"})),
            log=Log(io.StringIO(), "error"),
        )
        self.principal = principal
        body = b'{"model":"mock/echo","max_tokens":64,"messages":[{"role":"user","content":"Hi"}]}'
        self.chat = ChatRequest.parse(body)
        self.number = 0

    async def quote(self) -> Any:
        return await self.books.quote(self.principal, self.chat, (CANDIDATE,))

    def request(self, quote: Any) -> None:
        """Reserve and settle, as a request without a stream does it."""
        self.number += 1
        trace = Trace(f"req_0123456789abcdef{self.number:08x}", 0.0)
        reservation = self.books.reserve(self.principal, quote, trace)
        tried = Attempt("mock", "echo")
        tried.status = 200
        trace.attempts.append(tried)
        meter = reservation.attempt(reservation.chain[0])
        reservation.sent()
        reservation.answering()
        meter.observe_usage(ANSWER)
        reservation.settle()


def _people(keyring: Keyring) -> Principal:
    text = mint(KeyKind.LIVE, Random(1).randrange)
    keyring.apply(Organization(org_id="acme", monthly_budget=LIMIT, created_at=1))
    keyring.apply(User(user_id="alice", org_id="acme", monthly_limit=LIMIT, created_at=1))
    parts = parse(text)
    key = ApiKey(
        key_id=parts.key_id,
        user_id="alice",
        prefix=parts.prefix,
        digest=digest(text),
        monthly_limit=LIMIT,
        created_at=1,
    )
    keyring.apply(key)
    return Principal(key.key_id, "alice", "acme", None, None)


def _admin_into(keyring: Keyring) -> Callable[[Admin], None]:
    return lambda record: keyring.apply(record.row)


def alone(number: int) -> float:
    """Microseconds of CPU for check, hold and settlement by the ledger's own rules alone."""
    state = State()
    own = tuple(Account(name, "2026-11", LIMIT) for name in ("key:k", "user:u", "org:o"))
    provider = (Account("provider:p", "2026-11-21", LIMIT),)
    tried = (Tried("p", "m", 200, "", "", 12, 1_000),)
    rounds = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(number):
            assert left(state, own) is not None and left(state, provider) is not None
            lsn = state.lsn + 1
            holds = (*held(state, own, 2_000), *held(state, provider, 2_000))
            apply(
                state,
                Reserve(
                    lsn=lsn,
                    t=1,
                    synced=0,
                    id="req_0123456789abcdef00000001",
                    model="p/m",
                    provider="p",
                    upstream_model="m",
                    prices="v",
                    holds=holds,
                ),
            )
            apply(
                state,
                Settle(
                    lsn=lsn + 1,
                    t=1,
                    synced=0,
                    r=lsn,
                    cost=1_000,
                    tokens=(10, 0, 0, 20, 0),
                    source="provider",
                    outcome="completed",
                    attempts=tried,
                ),
            )
        rounds.append((time.thread_time() - began) / number * 1e6)
    return min(rounds)


def loop_ns() -> float:
    """Nanoseconds for one turn of an empty loop: how fast this machine is at this moment."""
    began = time.thread_time()
    for _ in range(1_000_000):
        pass
    return (time.thread_time() - began) * 1e3


async def in_memory(number: int) -> float:
    """Microseconds of CPU for a reserve and its settlement, without a journal."""
    keyring = Keyring()
    journal: Any = Counted()
    ledger = Ledger(State(_admin_into(keyring)), journal, lambda: int(time.time() * 1000))
    return await _cpu_us(Desk(ledger, keyring, _people(keyring)), number)


async def with_journal(number: int) -> float:
    """The same with the journal's two writes; the database is not running yet."""
    with tempfile.TemporaryDirectory() as folder:
        async with _store(Path(folder)) as store:
            store.ledger.posted = lambda: None
            desk = Desk(store.ledger, store.keyring, _people(store.keyring))
            return await _cpu_us(desk, number)


def _store(folder: Path) -> Any:
    return opened(Kept(folder / "gwproxy.db", folder / "journal"), Log(io.StringIO(), "error"))


async def _cpu_us(desk: Desk, number: int) -> float:
    quote = await desk.quote()
    rounds = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(number):
            desk.request(quote)
        rounds.append((time.thread_time() - began) / number * 1e6)
    return min(rounds)


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of time: CPU of all threads, and how late a timer of 1 ms was."""

    seconds: float
    cpu_s: float
    late_ms: list[float]

    def late(self, share: float) -> float:
        return sorted(self.late_ms)[min(len(self.late_ms) - 1, int(len(self.late_ms) * share))]


async def _window(work: Callable[[], Awaitable[None]]) -> Window:
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            late.append((time.perf_counter() - due) * 1000)

    async with asyncio.TaskGroup() as group:
        ticking = group.create_task(tick())
        began, cpu = time.perf_counter(), time.process_time()
        await work()
        window = Window(time.perf_counter() - began, time.process_time() - cpu, late)
        ticking.cancel()
    return window


async def everything(rate: int, seconds: float) -> tuple[list[Window], list[Window], int]:
    """Windows with so many requests a second, and windows that only wake up as often, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        async with _store(Path(folder)) as store:
            desk = Desk(store.ledger, store.keyring, _people(store.keyring))
            quote = await desk.quote()

            async def paced(request: Callable[[], None]) -> None:
                began = time.perf_counter()
                for number in range(int(rate * seconds)):
                    ahead = began + number / rate - time.perf_counter()
                    # Behind or not, the loop has its turn after each: sockets would give it one.
                    await asyncio.sleep(max(0.0, ahead))
                    request()
                await _caught_up(store)

            busy, idle = [], []
            for _ in range(3):
                idle.append(await _window(lambda: paced(lambda: None)))
                busy.append(await _window(lambda: paced(lambda: desk.request(quote))))
            return busy, idle, int(rate * seconds)


async def _caught_up(store: Store) -> None:
    """What is deferred is paid for in the same window."""
    while store.writer.applied < store.ledger.state.lsn:  # noqa: ASYNC110 nothing announces it
        await asyncio.sleep(0.01)


def report(number: int, rate: int, seconds: float) -> str:
    speed = loop_ns()
    core = alone(number)
    memory = uvloop.run(in_memory(number))
    journal = uvloop.run(with_journal(number))
    busy, idle, requests = uvloop.run(everything(rate, seconds))
    added = [
        (with_.cpu_s - without.cpu_s * with_.seconds / without.seconds) / requests * 1e6
        for with_, without in zip(busy, idle, strict=True)
    ]
    rows = [
        ("the ledger alone: check, hold, settle", f"{core:.1f} us"),
        ("reserve and settle, from the quote to the metrics", f"{memory:.1f} us"),
        ("with the journal's two writes", f"{journal:.1f} us"),
        (
            f"with the database behind, at {rate} requests a second",
            f"{median(added):.1f} us of all threads ({min(added):.1f}-{max(added):.1f})",
        ),
        (
            "a 1 ms timer is late, p99.9, busy and idle loop",
            f"{median(w.late(0.999) for w in busy):.2f} ms and "
            f"{median(w.late(0.999) for w in idle):.2f} ms",
        ),
        (
            "the same, at its latest",
            f"{median(max(w.late_ms) for w in busy):.2f} ms and "
            f"{median(max(w.late_ms) for w in idle):.2f} ms",
        ),
    ]
    lines = [
        "# What the ledger costs",
        "",
        "CPU for each request on top of the proxy's own work, four accounts with limits, no",
        "sockets. Written by `python -m bench.ledger`; the busy and the idle windows take turns in",
        f"one process, Python {sys.version.split()[0]}. One turn of an empty loop took",
        f"{speed:.0f} ns in the same run: on an idle machine of this kind it takes about 20.",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger")
    parser.add_argument("--number", type=int, default=20_000, help="requests of a round")
    parser.add_argument("--rate", type=int, default=1_000, help="requests a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each window")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    # As the server does it: what lives as long as the process need not be walked again.
    gc.freeze()
    gc.set_threshold(10_000, 100, 20)
    sys.setswitchinterval(GIL_SWITCH_S)
    text = report(args.number, args.rate, args.seconds)
    print(text)
    if args.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
