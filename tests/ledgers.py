"""A ledger for tests: the live side, which decides and records as the gateway does, in a folder
with a real journal and a real database, and histories of it to be drawn by chance.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from gwproxy.core.identity import ApiKey, Organization, User
from gwproxy.core.ledger import Account, Balance, State, apply, held
from gwproxy.core.period import periods
from gwproxy.core.records import (
    Adjust,
    Admin,
    Alert,
    AnyRecord,
    Attempt,
    Breaker,
    Close,
    Mark,
    Reserve,
    Settle,
    Stop,
    Storage,
    Tried,
    encode,
)
from gwproxy.storage.database import Database
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.journal import Journal
from gwproxy.storage.ledger import Writer, begin_epoch, read_mark
from gwproxy.storage.scan import scan

START = 1_764_460_800_000
"""The last day of November 2025: histories of some hours cross into the next month."""
DAY = 86_400_000
BOOT = "11111111-2222-3333-4444-555555555555"


class Live:
    """The running gateway's side: a state, and the journal that it is recorded in."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.state = State()
        self.t = START

    def post(self, kind: type, **fields: Any) -> AnyRecord:
        lsn = self.state.lsn + 1
        record = kind(lsn=lsn, t=self.t, synced=self.journal.synced, **fields)
        self.journal.write(encode(record))
        apply(self.state, record)
        self._have_spare()
        return record

    def sync(self) -> None:
        ticket = self.journal.begin_sync()
        if ticket is not None:
            ticket.run()
            self.journal.end_sync(ticket, None)

    def _have_spare(self) -> None:
        spare = self.journal.begin_spare()
        if spare is not None:
            spare.run()
            self.journal.end_spare(spare, None)

    # -- one request -------------------------------------------------------------------------------

    def reserve(
        self, user: str = "ann", amount: int = 1000, provider: str = "openai", **fields: Any
    ) -> int:
        month, day = periods(self.t)
        own = [Account(f"key:key_{user}", month, None), Account(f"user:{user}", month, None)]
        own += [Account("org:acme", month, None)]
        if fields.get("degraded"):
            own.append(Account("outage:acme", day, None))
        own.append(Account(f"provider:{provider}", day, 10**12))
        fields.setdefault("id", f"req_{self.state.lsn + 1:08}")
        return self.post(
            Reserve,
            model="auto",
            provider=provider,
            upstream_model=f"{provider}/m",
            prices="2026-11",
            holds=held(self.state, own, amount),
            **fields,
        ).lsn

    def extend(self, r: int, amount: int) -> None:
        """A watermark above the hold."""
        hold = self.state.holds[r]
        accounts = [Account(line.account, line.period, line.limit) for line in hold.holds]
        self.post(Mark, r=r, tokens=amount, cost=amount, holds=held(self.state, accounts, amount))

    def retry(self, r: int, provider: str, amount: int, **fields: Any) -> None:
        """The next attempt, with another provider."""
        hold = self.state.holds[r]
        accounts = [Account(line.account, line.period, line.limit) for line in hold.holds[:-1]]
        accounts.append(Account(f"provider:{provider}", periods(self.t)[1], 10**12))
        self.post(
            Attempt,
            r=r,
            n=2,
            provider=provider,
            upstream_model=f"{provider}/m",
            cost=7,
            why="provider_error",
            holds=held(self.state, accounts, amount),
            **fields,
        )

    def settle(self, r: int, cost: int, outcome: str = "completed", **fields: Any) -> None:
        hold = self.state.holds[r]
        attempts: tuple[Tried, ...] = ()
        if hold.attempt is not None:
            first = min(7, cost)
            attempts = (
                Tried(hold.reserve.provider, "m", 500, "provider_error", "HTTP 500", 80, first),
                Tried(hold.provider, "m", 200, "", "", 900, cost - first),
            )
        self.post(
            Settle,
            r=r,
            cost=cost,
            tokens=(12, 0, 0, cost, 0),
            source="provider",
            outcome=outcome,
            attempts=attempts,
            overrun=max(0, cost - hold.amount),
            status=200,
            rates=(1000, 500, 1250, 1000),
            **fields,
        )

    def requests(self, n: int, users: int = 50) -> None:
        """Many plain ones, several open at a time."""
        chance = random.Random(n)
        open_ones: list[int] = []
        for _ in range(n):
            open_ones.append(self.reserve(f"user{chance.randrange(users)}", 500_000))
            if len(open_ones) > 20:
                self.settle(open_ones.pop(chance.randrange(20)), chance.randrange(500_000))
        for r in open_ones:
            self.settle(r, 100_000)


# -- histories -----------------------------------------------------------------------------------


def play(live: Live, moves: Iterable[tuple[str, int, int]]) -> None:
    """Make a history of `moves`: what is done, and two numbers that choose to whom and how much."""
    for move, a, b in moves:
        open_ones = list(live.state.holds)
        r = open_ones[a % len(open_ones)] if open_ones else 0
        user, amount = f"user{a % 3}", b * 997
        account = (f"user:user{a % 3}", periods(live.t)[0])
        match move:
            case "wait":
                live.t += 1 + a * b
            case "wait long":
                live.t += (1 + b % 40) * DAY
            case "reserve":
                live.reserve(
                    user,
                    amount,
                    ("openai", "gemini")[b % 2],
                    degraded=a % 5 == 0,
                    hidden=b % 5 == 0,
                )
            case "extend" if r:
                live.extend(r, live.state.holds[r].amount + amount)
            case "mark" if r:
                live.post(Mark, r=r, tokens=b, cost=min(amount, live.state.holds[r].amount))
            case "retry" if r:
                live.retry(r, ("openai", "gemini")[b % 2], amount, hidden=b % 3 == 0)
            case "settle" if r:
                live.settle(r, amount)
            case "void" if r:
                live.settle(r, 0, "void")
            case "adjust":
                kind = ("credit", "grant", "reset", "late")[a % 4]
                key = f"idem-{b % 5}" if b % 3 == 0 else None
                live.post(
                    Adjust,
                    accounts=(account,),
                    delta=-amount if kind in ("credit", "reset") else amount,
                    type=kind,
                    actor="root",
                    reason="because",
                    idempotency_key=key,
                )
            case "adjust old":
                if live.state.balances:
                    key = sorted(live.state.balances)[a % len(live.state.balances)]
                    live.post(
                        Adjust,
                        accounts=(key,),
                        delta=amount,
                        type="rerate",
                        actor="root",
                        reason="",
                    )
            case "close":
                _close(live, a)
            case "alert":
                live.post(
                    Alert, account=account[0], period=account[1], percent=80, spent=b, limit=100
                )
            case "breaker":
                live.post(
                    Breaker,
                    provider=("openai", "gemini")[a % 2],
                    before="closed",
                    after="open",
                    until=live.t + b,
                    why="3 failures",
                )
            case "admin":
                _admin(live, a, b)
            case "storage":
                live.post(Storage, part="database", state="lost", cause="full")
            case "stop":
                live.post(Stop)


MOVES = (
    *("reserve", "reserve", "reserve", "settle", "settle", "settle", "extend", "mark", "retry"),
    *("void", "adjust", "adjust old", "close", "alert", "breaker", "admin", "storage", "stop"),
    *("wait", "wait long"),
)


def _close(live: Live, a: int) -> None:
    """Archive one account of a month that is over, on which nothing is held."""
    busy = {(line.account, line.period) for h in live.state.holds.values() for line in h.holds}
    over = [
        key
        for key in sorted(live.state.balances)
        if key[1] < periods(live.t)[0] and key not in busy
    ]
    if over:
        account, period = over[a % len(over)]
        balance: Balance = live.state.balances[account, period]
        live.post(
            Close,
            account=account,
            period=period,
            spent=balance.spent,
            credited=balance.credited,
            count=balance.count,
            hash="00",
        )


def _admin(live: Live, a: int, b: int) -> None:
    version = live.state.lsn + 1
    who: dict[str, Any] = {"actor": "root", "address": "127.0.0.1", "request_id": f"req_a{version}"}
    if b % 4 == 0:
        who["idempotency_key"] = f"admin-{a % 5}"
    org = Organization(org_id=f"org{a % 2}", name=f"n{b}", created_at=1, version=version)
    user = User(user_id=f"u{a % 3}", org_id=org.org_id, rpm=b + 1, created_at=2, version=version)
    live.post(Admin, action="organization.put", org=org, **who)
    live.post(Admin, action="user.put", user=user, **who)
    key = ApiKey(
        key_id=f"k{a % 3}",
        user_id=user.user_id,
        prefix="gw_live_abcdefgh",
        digest=bytes([a % 3]) * 32,
        revoked_at=b or None,
        created_at=3,
        version=version,
    )
    live.post(Admin, action="key.put", key=key, **who)


# -- the whole of it -----------------------------------------------------------------------------


async def no_breath() -> None:
    """The writer's pauses, where nobody else wants to run."""


class Place:
    """A folder with a journal and a database, opened and begun as at a start."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gwproxy.db"
        self.folder = folder / "journal"
        self.folder.mkdir(exist_ok=True)
        self.now = 1000.0
        self.heard: list[tuple[str, str]] = []
        self.hearing: asyncio.Queue[str] = asyncio.Queue()
        self.database: Database
        self.journal: Journal
        self.live: Live

    async def open(self, *, create: bool = True, segment_bytes: int = 1 << 20) -> "Place":
        self.database = await Database.open(self.path, create=create)
        before = await read_mark(self.database)
        found = scan(OS_FILES, self.folder, BOOT, before.lsn)
        mark = await begin_epoch(self.database, "ledger-1", found.epoch)
        assert mark.ledger_id is not None
        self.journal = Journal.start(
            OS_FILES,
            self.folder,
            found,
            ledger_id=mark.ledger_id,
            epoch=mark.epoch,
            boot_id=BOOT,
            applied_lsn=mark.lsn,
            applied_chain=mark.chain,
            segment_bytes=segment_bytes,
        )
        self.live = Live(self.journal)
        return self

    async def close(self) -> None:
        await self.database.close()
        self.journal.close()

    async def __aenter__(self) -> "Place":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def synced(self, lsn: int) -> None:
        if self.journal.synced < lsn:
            self.live.sync()
        assert self.journal.synced >= lsn

    def writer(
        self,
        database: Any = None,
        *,
        synced: Callable[[int], Awaitable[None]] | None = None,
        breathe: Callable[[], Awaitable[None]] = no_breath,
        **more: Any,
    ) -> Writer:
        return Writer(
            database or self.database,
            self.journal,
            synced=synced or self.synced,
            breathe=breathe,
            now=lambda: self.now,
            on_change=self._hear,
            **more,
        )

    def _hear(self, state: str, cause: str) -> None:
        self.heard.append((state, cause))
        self.hearing.put_nowait(state)


async def catch_up(writer: Writer) -> int:
    """All that there is to commit; how many records."""
    total = 0
    while count := await writer.step():
        total += count
    return total


TABLES = (
    *("meta", "entry", "balance", "closed", "hold", "request", "audit", "alert", "breaker"),
    *("idempotency", "organization", "user", "api_key", "usage", "attempted"),
)


async def tables(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, in order."""
    return {
        name: sorted((tuple(row) for row in await database.read(f"SELECT * FROM {name}")), key=repr)
        for name in TABLES
    }


async def truth(place: Place, folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The tables as one undisturbed run over the whole journal makes them."""
    fresh = Place(folder)
    fresh.database = await Database.open(fresh.path)
    await begin_epoch(fresh.database, "ledger-1")
    await catch_up(place.writer(fresh.database))
    found = await tables(fresh.database)
    await fresh.database.close()
    return settled(found)


def settled(found: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[tuple[Any, ...]]]:
    """Without what differs from file to file: when it was made, and how often it was opened."""
    [meta] = found["meta"]
    default = [row for row in found["organization"] if row[0] != "default"]
    return found | {"meta": [(*meta[:2], *meta[3:])], "organization": default}
