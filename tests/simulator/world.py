"""One run: a machine with a disk and a database, the lives of the process on it, and what becomes
of them. All that happens follows from the seed.
"""

import asyncio
import json
import os
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Final

import gwproxy.state.archive as real_archive
import gwproxy.state.ledger as real_ledger
import gwproxy.state.store as real_store
import gwproxy.storage.journal as real_journal
from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.core.ledger import State
from gwproxy.core.pricing import PriceBook
from gwproxy.metrics import Metrics
from gwproxy.state.accounts import Accounts, Terms
from gwproxy.state.books import Books
from gwproxy.state.ledger import Ledger
from gwproxy.state.rates import Rates
from gwproxy.state.store import Kept, Store, Synchronous
from gwproxy.storage import archive, archive_file
from gwproxy.storage.archive_file import ArchiveRefused
from gwproxy.storage.database import DatabaseRefused
from gwproxy.storage.journal import Journal, NotWritten, OutcomeUnknown
from gwproxy.storage.segments import CHUNK_BYTES, Gap, JournalRefused
from gwproxy.storage.verify import findings
from tests.simulator import actors
from tests.simulator.database import DatabaseFile, PlayedBackups, PlayedDatabase, empty
from tests.simulator.defects import DEFECTS, planted
from tests.simulator.disk import Disk, DiskFiles
from tests.simulator.life import Life
from tests.simulator.loop import Killed
from tests.simulator.oracle import Oracle, Wrong, check
from tests.simulator.seams import instead
from tests.simulator.upstream import TARIFFS, Upstream

JOURNAL: Final = Path("/journal")
ARCHIVE: Final = Path("/gwproxy.db.archive")
REST_S: Final = 300
"""A ledger that nobody uses and nothing ails has come to rest after so long."""

STALE_S: Final = 8.0
"""A sync begins within a second, is given five, and is looked at four times a second."""

BELIEVED_S: Final = 301.0
"""A clock that is ahead by five minutes may just be set right."""

SMALL_ROOM_BYTES: Final = 1024
"""In the place of 8 KiB, where segments are short."""

NEW_DATABASE: Final = lru_cache(maxsize=1)(empty)

MONTH_ENDS: Final = 1_793_491_200  # 2026-11-01T00:00:00Z

MOST_STEPS: Final = 100_000
"""Of the loop, in all lives of a seed: two hundred seeds took 5,000 at most."""


@dataclass(frozen=True)
class Plan:
    """What kind of run it is."""

    full: bool
    crashes: int
    power_cuts: bool
    at_boot: bool
    """Crashes come at start-up more often than not."""
    disk_faults: bool
    database_faults: bool
    slow: bool
    liar: bool
    clocks: bool
    rot: bool
    small: bool
    """Little room is kept in the journal, so that segments can be short and many."""
    segment_bytes: int
    most_segments: int

    @classmethod
    def draw(cls, random: Random) -> "Plan":
        small = random.random() < 0.4
        return cls(
            full=random.random() < 0.35,
            crashes=random.choice((0, 1, 2, 3, 5)),
            power_cuts=random.random() < 0.7,
            at_boot=random.random() < 0.35,
            disk_faults=random.random() < 0.5,
            database_faults=random.random() < 0.5,
            slow=random.random() < 0.2,
            liar=random.random() < 0.08,
            clocks=random.random() < 0.3,
            rot=random.random() < 0.06,
            small=small,
            segment_bytes=random.choice((6, 10, 16) if small else (24, 40, 64)) << 10,
            most_segments=random.choice((4, 6, 20)),
        )


class Log:
    """What the gateway would have logged."""

    debugging = False

    def __init__(self, trace: deque[str]) -> None:
        self._trace = trace

    def event(self, level: str, event: str, **fields: Any) -> None:
        words = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        self._trace.append(f"    log: {event} {words}")


class _Time:
    """In the place of the module `time`, where the gateway reads its monotonic clock."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.monotonic()

    def time(self) -> float:
        return self._world.wall()


class _Secrets:
    """In the place of the module `secrets`."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def token_hex(self, count: int) -> str:
        return self._random.randbytes(count).hex()


class World:
    def __init__(self, seed: int, defect: str | None = None) -> None:
        self.seed = seed
        self.defect = defect
        self.random = Random(seed)
        self.plan = Plan.draw(self.random)
        if defect is not None:
            self.plan = replace(self.plan, **DEFECTS[defect].plan)
        self.trace: deque[str] = deque(maxlen=60)
        """What happened last, for whoever has to find out why."""
        self.upstream = Upstream()
        self.oracle = Oracle(self.upstream)
        self.disk = Disk(self.random)
        self.file = DatabaseFile(self.random, NEW_DATABASE())
        self.boots = 1
        self.now_s = 1000.0
        self.true_at_0 = MONTH_ENDS - 1000 - self.random.choice((10, 60, 86400 - 30, 500000))
        self.skew_s = 0.0
        self.jumped_s = 0.0
        """How much of the time that passed was slept through in one go."""
        self.until_crash: int | None = None
        self.life: Life | None = None
        self.wrong: BaseException | None = None
        self.lost: set[str] = set()
        """Requests of whose records a power cut took some."""
        self.floor = 0
        """No record up to this one may ever be missing."""
        self.rotten = False
        self.cut = False
        """The power has failed since the ledger last stood."""
        self.serial = 0
        self.steps = 0
        self.compared = -1
        self.keys: dict[str, tuple[str, str]] = {}
        """Keys of the gateway by their names: id and text."""
        self.written_at: deque[tuple[int, float]] = deque()
        """When each record that is not synced was written."""
        self.synced_at = 0.0
        self.refused_keys: set[str] = set()
        """Ids of keys whose revocation was told to be in force."""
        if self.plan.liar:
            self.disk.weather.lie = 0.5
        outage = self.random.choice((0, 50_000_000, 400_000_000))
        self.terms = Terms(
            provider_daily={"alpha": 6_000_000_000, "beta": 2_000_000_000},
            outage_daily=outage,
        )
        self.oracle.provider_daily = dict(self.terms.provider_daily)
        self.oracle.outage_daily = outage

    # -- time and crashes --------------------------------------------------------------------------

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def monotonic(self) -> float:
        life = self.life
        if life is None:
            return self.now_s
        life.loop.now_s += 0.00001  # no two looks at a clock are at one moment
        return life.loop.now_s

    def true_s(self) -> float:
        return self.true_at_0 + (self.now_s if self.life is None else self.life.loop.now_s)

    def wall(self) -> float:
        return self.true_at_0 + self.monotonic() + self.skew_s

    def point(self) -> None:
        """Here the process may end."""
        if self.until_crash is not None:
            self.until_crash -= 1
            if self.until_crash <= 0:
                assert self.life is not None
                self.life.end()
                raise Killed

    def tempt(self, probability: float, within: int = 40) -> None:
        """Something rare has happened: let a crash that has to come anyway come soon."""
        if self.until_crash is not None and self.random.random() < probability:
            self.until_crash = min(self.until_crash, self.random.randint(1, within))

    def say(self, *words: object) -> None:
        self.trace.append(f"{self.true_s():.3f} " + " ".join(map(str, words)))

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Wrong, or whatever the gateway raised where nothing should be."""
        with planted(self.defect), _listening(self):
            crashes = self.plan.crashes
            while True:
                if crashes:
                    early = self.random.random() < (0.7 if self.plan.at_boot else 0.1)
                    self.until_crash = self.random.randint(1, 60 if early else 1200)
                else:
                    self.until_crash = None
                outcome = self._live(last=not crashes)
                self.say("life ended:", outcome)
                if outcome == "refused":
                    if self.plan.liar or self.rotten:
                        return
                    self.disk.weather.clear()
                    self.file.weather.clear()
                    if self.file.foreign:
                        self.say("the operator restores the newest backup")
                        self.file.image, self.file.foreign = self.file.backups[-1], False
                    continue
                if outcome == "rest":
                    return
                crashes = max(0, crashes - 1)
                if outcome == "crashed":
                    self.disk.weather.clear()
                    self.file.weather.clear()
                    # Nor after a byte has rotted that no start has met yet: the damage could be the
                    # power cut's own.
                    unclear = self.rotten
                    if self.plan.power_cuts and not unclear and self.random.random() < 0.6:
                        self.say("the power fails")
                        self.disk.cut()
                        self.boots += 1
                        self.cut = True
                    # Only after a kill, and when a start has taken over: what a power cut spared
                    # cannot always be told from what nobody had synced.
                    elif self.plan.rot and not self.cut and self.disk.rot():
                        self.say("a byte has rotted")
                        self.rotten = True

    def _live(self, *, last: bool) -> str:
        life = self.life = Life(self)
        self.skew_s = 0.0
        loop = life.loop
        main = asyncio.Task(self._main(life, last), loop=loop)
        outcome = "crashed"
        try:
            while not main.done():
                if not loop.step():
                    raise Wrong("the process waits for nothing at all")
                self._after_step(life)
            if life.files.alive:
                outcome = main.result()
        except Killed:
            if self.wrong is not None:
                raise self.wrong from None
        finally:
            self.until_crash = None
            life.end()
            if not main.done():
                loop._tasks.append(main)
            loop.abandon()
            self.now_s = loop.now_s + self.random.uniform(0.1, 30)
            self.life = None
        return outcome

    def _after_step(self, life: Life) -> None:
        self.steps += 1
        check(self.steps < MOST_STEPS, "goes on and on: the gateway does not come to rest")
        if self.wrong is not None:
            raise self.wrong
        if life.loop.failures and life.files.alive:
            raise life.loop.failures[0]
        if not life.files.alive:
            raise Killed
        if life.journal is not None and life.journal.synced > self.floor:
            self.floor = life.journal.synced
            self.synced_at = life.loop.now_s - self.jumped_s
        if life.ledger is not None and self.oracle.fold.lsn != self.compared:
            state = life.ledger.state
            self._compare(state)
            self.compared = self.oracle.fold.lsn

    # -- a life ------------------------------------------------------------------------------------

    async def _main(self, life: Life, last: bool) -> str:
        plan = self.plan
        kept = Kept(
            Path("/gwproxy.db"),
            JOURNAL,
            Synchronous.FULL if plan.full else Synchronous.NORMAL,
            plan.segment_bytes,
            plan.segment_bytes * plan.most_segments,
            keep_months=1,
        )
        log: Any = Log(self.trace)
        life.database = PlayedDatabase(self.file, life.loop, self.point)
        self.say("start", self.boot_id)
        try:
            store = await Store._open(
                kept,
                life.database,
                os.open(os.devnull, os.O_RDONLY),
                log,
                life.files,
                below=self.random.randrange,
                wall=self.wall,
                accept_loss=False,
            )
        except (JournalRefused, DatabaseRefused, StorageUnavailable, OSError) as error:
            if not self._may_refuse():
                raise
            self.say("refused:", error)
            return "refused"
        life.store = store
        async with asyncio.TaskGroup() as group:
            store._start(group)
            life.accounts = Accounts(store.keyring, self.terms)
            life.books = Books(
                store.ledger,
                store.keyring,
                life.accounts,
                PriceBook({"version": "1", "aliases": {}, "providers": {}}, OVERRIDES),
                Rates(self.monotonic),
                OutputLengths(),
                Factors(),
                count=lambda text: text.count(" "),
                durable=store.durable,
                outage=store.outage,
                metrics=Metrics(frozenset({"alpha", "beta", "gamma"}), frozenset()),
                log=log,
            )
            background = [
                group.create_task(self._guard(actor, life))
                for actor in (actors.weather, actors.clock)
            ]
            await self._guard(actors.directory, life)
            clients = [
                group.create_task(self._guard(actors.client, life))
                for _ in range(self.random.randint(2, 6))
            ]
            admin = group.create_task(self._guard(actors.admin, life))
            await asyncio.wait(clients)
            admin.cancel()
            for task in background:
                task.cancel()
            await asyncio.wait([admin, *background])
            if last:
                await self._rest(life)
            await store.close()
        if last:
            self._at_rest()
            return "rest"
        return "stopped"

    def _may_refuse(self) -> bool:
        """A start may fail while the disk or the database does; never for what a crash left."""
        if self.plan.liar or self.rotten:
            return True
        return not (self.disk.weather.fine and self.file.weather.fine) or self.file.foreign

    async def _guard(self, actor: Callable[[Life], Awaitable[None]], life: Life) -> None:
        try:
            await actor(life)
        except (Killed, GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as error:
            self.wrong = self.wrong or error

    async def _rest(self, life: Life) -> None:
        """Nothing fails any more: all that is owed is recorded, and the database has all of it."""
        self.disk.weather.clear()
        self.file.weather.clear()
        self.skew_s = 0.0
        life.loop.slow_threads = False
        plan, store = self.plan, life.store
        assert store is not None
        archived = False
        for _ in range(REST_S):
            ledger = store.ledger
            try:
                ledger.pay()
            except Exception as error:
                self.say("cannot pay:", error, store.journal.lost)
            if (
                not ledger.owes
                and store.journal.lost is None
                and store.journal.synced == ledger.state.lsn == store.writer.applied
                and not store.lost
                and self.file.fault is None
            ):
                if archived:
                    return
                # Whatever was begun is brought to its end, what is due is done.
                with suppress(*([ArchiveRefused] if self.rotten or plan.liar else [])):
                    await store.archive.look()
                archived = True
            await asyncio.sleep(1)
        raise Wrong(
            f"does not come to rest: owes {store.ledger.owes}, journal lost: {store.journal.lost}, "
            f"at {store.ledger.state.lsn}, synced {store.journal.synced}, "
            f"database at {store.writer.applied}, lost: {store.lost}"
        )

    def _at_rest(self) -> None:
        oracle = self.oracle
        oracle.at_rest(lost=self.lost, full=self.plan.full, liar=self.plan.liar)
        connection = sqlite3.connect(":memory:")
        try:
            connection.deserialize(self.file.image)
            self._compare_tables(connection)
            found = list(findings(connection))
            check(not found, "verify finds", "; ".join(map(str, found[:3])))
        finally:
            connection.close()

    def _compare_tables(self, connection: sqlite3.Connection) -> None:
        fold = self.oracle.fold
        lsn = connection.execute("SELECT applied_lsn FROM meta").fetchone()[0]
        check(lsn == fold.lsn, f"the database is at {lsn}, the journal at {fold.lsn}")
        rows = connection.execute("SELECT account, period, spent, credited, count FROM balance")
        tables = {(a, p): tuple(figures) for a, p, *figures in rows if any(figures)}
        ours = {
            key: (sums.spent, sums.credited, sums.count)
            for key, sums in fold.sums.items()
            if sums.spent or sums.credited or sums.count
        }
        differ = sorted(set(ours.items()) ^ set(tables.items()))
        check(not differ, "the database's balances differ:", differ)
        holds = connection.execute("SELECT count(*) FROM hold").fetchone()[0]
        check(holds == 0, "the database holds", holds)
        requests = dict(
            (lsn, (outcome, cost))
            for lsn, outcome, cost in connection.execute("SELECT lsn, outcome, cost FROM request")
        )
        ended = {r: (each.outcome, each.cost) for r, each in fold.ended.items()}
        archived = self._archived(connection)
        if archived is None:
            check(requests.items() <= ended.items(), "requests differ")
        else:
            check(requests.items() | archived.items() == ended.items(), "requests differ")

    def _archived(self, connection: sqlite3.Connection) -> dict[int, tuple[str, int]] | None:
        """The requests in the archive, whose files are whole and the ones that were meant; None
        where the disk has damaged them."""
        quiet = self._quiet_files()
        found: dict[int, tuple[str, int]] = {}
        hashes = set()
        try:
            for path in archive_file.archives(quiet, ARCHIVE):
                file = archive_file.check(quiet, path)
                hashes.add(file.hash)
                faults = archive.faults(connection, file)
                check(not faults, "the archive is not what was closed:", "; ".join(faults))
                for line in archive_file._lines(quiet, path):
                    row = json.loads(line)
                    if row["k"] == "request":
                        check(row["lsn"] not in found, "archived twice:", row)
                        found[row["lsn"]] = (row["outcome"], row["cost"])
            missing = {hash for hash, _ in archive.named(connection)} - hashes
            check(not missing, "closed, and its file is gone:", missing)
        except (ArchiveRefused, Wrong):
            if not (self.rotten or self.plan.liar):
                raise
            return None
        return found

    def _compare(self, state: State) -> None:
        self.oracle.compare(state.lsn, state.t, state.balances, state.holds, state.idempotency)

    # -- hooks -------------------------------------------------------------------------------------

    def heard(self, payload: bytes, *, certain: bool) -> None:
        """The journal has taken a record: was this the moment for it, and does it say the truth?"""
        life = self.life
        assert life is not None
        self.trace.append(f"  {'' if certain else '? '}{payload.decode()[:240]}")
        if not certain:
            self.tempt(0.4, 12)
        try:
            if life.ledger is not None:
                self._look_at_moment(life.loop.now_s - self.jumped_s, payload, life.ledger)
            self.oracle.wrote(payload, certain=certain, degraded=life.lost)
        except Wrong as wrong:
            self.wrong = self.wrong or wrong
            raise

    def _look_at_moment(self, now_s: float, payload: bytes, ledger: Ledger) -> None:
        journal, written = ledger.journal, self.written_at
        while written and written[0][0] <= journal.synced:
            written.popleft()
        if payload.startswith(b'{"k":"reserve"'):
            check(not ledger.owes, "let in before what is owed")
            since = max(written[0][1], self.synced_at) if written else now_s
            check(now_s - since < STALE_S, f"let in after {now_s - since:.1f} s without a sync")
        written.append((journal.next_lsn - 1, now_s))
        leads_s = json.loads(payload)["t"] / 1000 - self.true_s()
        check(leads_s < BELIEVED_S, f"ledger time is {leads_s:.0f} s ahead of the world's")

    def not_written(self, payload: bytes, error: NotWritten) -> None:
        """Settlements have room kept for them, unless the disk itself fails."""
        spared = self.plan.disk_faults or self.plan.small
        if payload.startswith(b'{"k":"settle"') and not spared:
            self.wrong = self.wrong or Wrong(f"no room for a settlement: {error}")

    def stands(self, ledger: Ledger) -> None:
        """The start has put the state together: is anything missing that had to last?"""
        try:
            self._stands(ledger)
        except Wrong as wrong:
            self.wrong = self.wrong or wrong
            raise

    def _stands(self, ledger: Ledger) -> None:
        life = self.life
        assert life is not None
        oracle, state = self.oracle, ledger.state
        before = list(oracle.history)
        oracle.survived(state.lsn, power_cut=self.cut, synced=self.floor, liar=self.plan.liar)
        for payload in before[state.lsn :] if self.cut else ():
            self.lost |= actors.request_of(payload, before)
        self._read_again(ledger.journal)
        # What was in force without a record is undone, as was told.
        self.refused_keys &= {
            name for (noun, name), row in oracle.fold.rows.items() if row.get("revoked_at")
        }
        self.written_at.clear()
        self.file.foreign = False
        self.compared = -1
        self.cut = False
        self.floor = state.lsn if not self.plan.liar else 0
        life.journal = ledger.journal
        life.ledger = ledger
        self._compare(state)
        self.say("stands at", state.lsn, "of", len(before))
        self.tempt(0.15)

    def _quiet_files(self) -> DiskFiles:
        return DiskFiles(
            self.disk, self.boot_id, lambda: None, lambda: None, lambda probability: None
        )

    def _read_again(self, journal: Journal) -> None:
        """What stands in the journal is what was acknowledged, byte for byte."""
        trail = journal.trail()
        if not trail.segments:
            return
        quiet = self._quiet_files()
        weather, self.disk.weather = self.disk.weather, type(self.disk.weather)()
        try:
            trail = type(trail)(quiet, trail.directory, trail.segments, trail.end)
            cursor = trail.segments[0].start
            while True:
                try:
                    payloads, cursor = trail.read(cursor, 1000, CHUNK_BYTES)
                except Gap:
                    # Where a disk has lied, the database may be all that is left of some records.
                    check(self.plan.liar, "records are missing in the journal")
                    break
                if not payloads:
                    break
                first = cursor.lsn - len(payloads)
                known = self.oracle.history[first : cursor.lsn]
                check(payloads == known, f"records {first + 1} to {cursor.lsn} are not as written")
        finally:
            self.disk.weather = weather


OVERRIDES: Final[dict[str, dict[str, object]]] = {
    name: {
        "input": str(tariff.input),
        "output": str(tariff.output),
        **({} if tariff.most is None else {"max_output_tokens": tariff.most}),
        **({"reasons": True} if tariff.hidden else {}),
    }
    for name, tariff in TARIFFS.items()
}


@contextmanager
def _listening(world: World) -> Iterator[None]:
    """The seams that the gateway has no argument for, and the oracle's ears."""
    write, recover = Journal.write, Ledger.recover

    def listening(journal: Journal, payload: bytes) -> None:
        world.oracle.tried.setdefault(journal.next_lsn, []).append(payload)
        try:
            write(journal, payload)
        except NotWritten as error:
            world.not_written(payload, error)
            raise
        except OutcomeUnknown:
            world.heard(payload, certain=False)
            raise
        world.heard(payload, certain=True)

    def standing(ledger: Ledger) -> int:
        world.stands(ledger)
        return recover(ledger)

    with ExitStack() as stack:
        for owner, name, value in (
            (Journal, "write", listening),
            (Ledger, "recover", standing),
            (real_store, "time", _Time(world)),
            (real_store, "secrets", _Secrets(world.random)),
            (real_store, "Backups", lambda folder, **how: PlayedBackups(world.file)),
            (real_store, "BACKUP_LOOK_S", 3.0),
            (real_archive, "time", _Time(world)),
            (real_archive, "make_private", lambda folder: None),
            (real_archive, "CLOSED_FOR_MS", 20_000),
            (real_archive, "is_due", lambda month, now, keep: real_archive.is_over(month, now)),
            (real_archive, "FIRST_LOOK_S", 3.0),
            (real_archive, "LOOK_EVERY_S", 5.0),
            (archive_file, "SLICE_ROWS", 9),
        ):
            stack.enter_context(instead(owner, name, value))
        if world.plan.small:
            stack.enter_context(instead(real_ledger, "SETTLEMENT_ROOM_BYTES", SMALL_ROOM_BYTES))
            stack.enter_context(instead(real_journal, "LEAST_ROOM_BYTES", SMALL_ROOM_BYTES))
        yield
