"""Kill -9, at each step of a request, at any moment under load, and before a chosen system call:
whatever was sent upstream stands in the ledger once, and nobody is charged less than he got.

Real processes on real files. The upstream's own record is what is believed.
"""

import asyncio
import io
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
from math import inf
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from tests.harness import UPSTREAM_TOKEN, make_key
from tests.kills import (
    OUTPUT_NANOS,
    PATIENCE_S,
    Client,
    Got,
    Office,
    Place,
    Strike,
    Where,
    assert_books,
    assert_settled,
    clients,
    configured,
    explained,
    found,
    nanos,
    never_accepting,
    record_of,
    reserved,
    syncs_take,
    why_no_tracing,
)
from tests.scene import until

pytestmark = pytest.mark.timeout(400)  # many starts, on a machine that may be busy

RECORD = "record.jsonl"

traced = pytest.mark.skipif(bool(why_no_tracing()), reason=why_no_tracing())


@asynccontextmanager
async def upstream(folder: Path) -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=UPSTREAM_TOKEN, record_file=folder / RECORD)
    await demo.start()
    try:
        yield demo
    finally:
        await demo.stop()


@pytest_asyncio.fixture
async def demo(tmp_path: Path) -> AsyncIterator[DemoUpstream]:
    async with upstream(tmp_path) as demo:
        yield demo


@pytest.fixture
def closed() -> Iterator[int]:
    with never_accepting() as port:
        yield port


# -- at each step ----------------------------------------------------------------------------------


class Charge(Enum):
    HOLD = "all that was held at first"
    MARK = "the last watermark, which is below it"
    RAISED = "the last watermark, and the hold was raised to it"


@dataclass(frozen=True)
class Step:
    """Where one request stands when the gateway is killed, and what it is charged for that."""

    user: str
    model: str
    stream: bool
    charge: Charge = Charge.HOLD
    tokens: int = 0
    """What the client has got."""
    most: int | None = None
    """The maximum that he has declared."""
    arrives: bool = True
    """The upstream receives it."""


STEPS = (
    Step("unsent", "closed/any", False, arrives=False),
    Step("unsent_stream", "closed/any", True, arrives=False),
    Step("unanswered", "mock/prose+stall-before-headers", False),
    Step("unanswered_stream", "mock/prose+stall-before-headers", True),
    Step("half_answered", "mock/prose+stall-after-1", False),
    Step("head_only", "mock/prose+stall-after-0", True),
    Step("first_token", "mock/prose+stall-after-1", True, Charge.MARK, 1),
    Step("middle", "mock/prose+len-60+stall-after-20", True, Charge.MARK, 20, 8000),
    Step("past_marks", "mock/prose+len-900+stall-after-700", True, Charge.MARK, 700, 8000),
    Step("past_the_hold", "mock/prose+len-2000+stall-after-1500", True, Charge.RAISED, 1500),
    Step("usage_told", "mock/prose+len-30+stall-after-99", True, Charge.MARK, 30, 8000),
    Step("out_of_sight", "deepseek/deepseek-chat+stall-after-5", True, Charge.HOLD, 4),
    Step("second_attempt", "second", True, Charge.MARK, 5),
)


LATE = tuple(
    Step(f"late_{n}", f"mock/prose+len-60+stall-after-4{n}", True, Charge.MARK, 40 + n, 8000)
    for n in range(3)
)


async def park(client: Client, step: Step, demo: DemoUpstream) -> None:
    """Return when the request stands where it is to be killed."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await client.held(step.user):
                break
            await asyncio.sleep(0.02)  # no event tells of a hold
    (got,) = [each for each in client.got if each.user == step.user]
    last = "prose+stall-after-5" if step.model == "second" else step.model
    if step.arrives:
        await until(lambda: any(last in each["body"] for each in demo.requests), PATIENCE_S)
    await until(lambda: got.tokens >= step.tokens, PATIENCE_S)
    if step.user == "usage_told":
        await until(lambda: got.usage, PATIENCE_S)


@asynccontextmanager
async def all_parked(
    client: Client, demo: DemoUpstream, steps: Sequence[Step]
) -> AsyncIterator[None]:
    """Within, one request stands at each step; inside it the gateway has to be killed."""
    async with asyncio.TaskGroup() as group:
        for step in steps:
            group.create_task(client.ask(step.user, step.model, step.stream, most=step.most))
        async with asyncio.TaskGroup() as parking:
            for step in steps:
                parking.create_task(park(client, step, demo))
        yield


async def test_killed_at_any_step_each_request_is_charged_once_for_what_was_sent_at_the_most(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    limits = {step.user: "1" for step in STEPS} | {"settled": "1"}
    place = await found(tmp_path / "killed", demo, closed, limits)
    older = tmp_path / "older.db"
    shutil.copy(place.database, older)
    async with place.life() as life, clients(place, life) as client:
        async with all_parked(client, demo, STEPS):
            whole = [
                await client.ask("settled", "mock/prose", True),
                await client.ask("settled", "mock/prose", False),
            ]
            life.kill()  # in the very step in which the last answer was read
        await life.ended()
    assert all(got.served for got in whole)
    by_user = {got.user: got for got in client.got}
    for step in STEPS:
        assert by_user[step.user].tokens == step.tokens, step
        assert not by_user[step.user].whole, step
    sent = sum(step.arrives for step in STEPS) + 1 + len(whole)  # one has two attempts
    record = await demo.recorded(sent, PATIENCE_S)
    assert len(record) == sent

    # The same end twice: as it was left, and with a database that has seen nothing of all that.
    rebuilt = place.copy(tmp_path / "rebuilt")
    for path in rebuilt.folder.glob("gwproxy.db*"):
        path.unlink()
    shutil.copy(older, rebuilt.database)
    outcomes = []
    for each in (place, rebuilt):
        with explained(each):
            outcomes.append(await settled_after(each, client.got, STEPS))
            counts = assert_books(each, record, client.got)
            assert counts["recovered"] in (len(STEPS), len(STEPS) + 1)
            assert counts["recovered"] + counts["completed"] == len(STEPS) + len(whole)
    assert outcomes[0] == outcomes[1]


async def settled_after(
    place: Place, before: Sequence[Got], steps: Sequence[Step]
) -> dict[str, str]:
    """What each user is told after a restart, which ends in order: his cost."""
    costs, ids = {}, reserved(place)
    async with place.life() as life, clients(place, life) as client:
        await assert_settled(client, before)
        for step in steps:
            usage = await client.usage(step.user)
            assert {each["request_id"] for each in usage["requests"]} <= {ids[step.user]}, step
            receipt = await client.receipt(step.user, ids[step.user])
            assert receipt["outcome"] == "recovered", step
            assert (receipt["source"], receipt["overrun_usd"]) == ("estimated", "0.000000000")
            costs[step.user] = receipt["cost_usd"]
            cost, held = nanos(receipt["cost_usd"]), nanos(receipt["held_usd"])
            assert cost < held if step.charge is Charge.MARK else cost == held, step
            assert cost >= step.tokens * OUTPUT_NANOS, step
            for scope in usage["scopes"][:2]:
                assert scope["month_usage_usd"] == receipt["cost_usd"], step
                assert scope["request_count"] == 1, step
        await life.stop()
    return costs


async def test_a_receipt_is_there_before_the_database_has_caught_up(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    place = await found(tmp_path / "killed", demo, closed, {"ann": None})
    older = place.copy(tmp_path / "older")
    async with place.life() as life, clients(place, life) as client:
        got = await client.ask("ann", "mock/prose", False)
        life.kill()
        await life.ended()
    kept = Kept(older.database, place.journal)
    async with opened(kept, Log(io.StringIO())) as store:
        receipt = store.ledger.recent.find(got.request_id)  # before any task has had a turn
    assert receipt is not None
    assert receipt.outcome == "completed"


# -- at any moment ---------------------------------------------------------------------------------

LIMITS = {"ann": None, "ben": None, "poor": "0.02"}
"""Dollars a month. The last one's are soon spent."""

WISHES: tuple[tuple[int, str], ...] = (
    (30, "mock/prose"),
    (10, "mock/prose+slow-5"),
    (6, "mock/prose+len-700+slow-1"),
    (4, "mock/prose+len-1800"),
    (4, "deepseek/deepseek-chat+slow-2"),
    (4, "mock/prose+status-503"),
    (4, "second"),
    (4, "third"),
    (3, "mock/prose+reset-after-3"),
    (2, "mock/prose+stall-before-headers"),
    (2, "mock/prose+stall-after-7"),
    (1, "closed/any"),
)
"""What the clients ask for, and how often."""


async def ask_on(client: Client, random: Random, users: Sequence[str]) -> None:
    """One user after another, until the gateway is gone."""
    weights, models = zip(*WISHES, strict=True)
    while True:
        (model,) = random.choices(models, weights)
        user, stream = random.choice(users), random.random() < 0.6
        leaves = random.randint(1, 9) if stream and "slow" in model and random.random() < 0.2 else 0
        got = await client.ask(user, model, stream, leaves_after=leaves)
        if not got.status:
            return


async def kill_under_load(
    place: Place, demo: DemoUpstream, *, seed: int, rounds: int, until_s: float = inf
) -> None:
    """Lives that end at random moments, some before they are ready; then the sums."""
    random = Random(seed)
    loop = asyncio.get_running_loop()
    got: list[Got] = []
    before: list[Got] = []
    office = Office([], [])
    start_s = 1.0
    for number in range(rounds + 1):
        is_last = number == rounds or loop.time() > until_s
        in_its_start = not is_last and random.random() < 0.25
        with explained(place, seed=seed, round=number):
            if in_its_start:
                async with place.life():
                    await asyncio.sleep(random.uniform(0.4, 1.0) * start_s)
                continue
            began = loop.time()
            async with place.life() as life, clients(place, life) as client:
                start_s = loop.time() - began
                await assert_settled(client, before)
                await office.assert_kept(client)
                if is_last:
                    await life.stop()
                    break
                kill_after_s = random.uniform(0.0, 0.9)
                if random.random() < 0.2:
                    # It is about to end in order, which takes it a second while streams run.
                    loop.call_later(kill_after_s, life.ask_to_end)
                    kill_after_s += random.uniform(0.0, 1.5)
                loop.call_later(kill_after_s, life.kill)
                async with asyncio.TaskGroup() as group:
                    group.create_task(office.work(client, "ann"))
                    for _ in range(10):
                        group.create_task(ask_on(client, random, list(place.keys)))
                before = client.got
                got += before
    await demo.stop()  # all that it was still busy with is in its record now
    with explained(place, seed=seed):
        counts = assert_books(place, record_of(place.folder.parent / RECORD), got)
    assert counts["completed"] and counts["recovered"], counts


async def test_whenever_it_is_killed_under_load_the_books_are_right(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    place = await found(tmp_path / "killed", demo, closed, LIMITS)
    await kill_under_load(place, demo, seed=1, rounds=4)


@pytest.mark.slow
async def test_however_often_it_is_killed_under_load_the_books_are_right(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    place = await found(tmp_path / "killed", demo, closed, LIMITS)
    until_s = asyncio.get_running_loop().time() + 180
    await kill_under_load(place, demo, seed=Random().randrange(10**9), rounds=40, until_s=until_s)


# -- before a system call --------------------------------------------------------------------------

TRAFFIC = (
    ("mock/prose", False),
    ("mock/prose", True),
    ("third", True),
    ("mock/prose+status-503", False),
    ("mock/prose+len-300", True),
)


async def traffic(client: Client, user: str) -> None:
    """The same requests again and again, until the gateway is gone."""
    for model, stream in cycle(TRAFFIC):
        if not (await client.ask(user, model, stream)).status:
            return


async def strike_again_and_again(
    folder: Path, closed: int, strikes: Iterable[Strike]
) -> Counter[str]:
    """A life for each strike, then the sums: how many requests had which outcome."""
    folder.mkdir()  # noqa: ASYNC240 (one of a test's own)
    got: list[Got] = []
    before: list[Got] = []
    async with upstream(folder) as demo:
        place = await found(folder / "killed", demo, closed, {"ann": None, "ben": None})
        for strike in (*strikes, None):
            with explained(place, strike=strike):
                async with place.life() as life, clients(place, life) as client:
                    await assert_settled(client, before)
                    if strike is None:
                        await life.stop()
                        break
                    async with strike.from_now_on(place, life), asyncio.TaskGroup() as group:
                        for user in place.keys:
                            group.create_task(traffic(client, user))
                    assert await life.ended() == -signal.SIGKILL
                before = client.got
                got += before
    with explained(place):
        return assert_books(place, record_of(folder / RECORD), got)


@traced
async def test_killed_before_any_of_its_first_writes_the_books_are_right(
    tmp_path: Path, closed: int
) -> None:
    journal = [Strike("pwrite64", when, Where.JOURNAL) for when in range(1, 7)]
    others = [Strike("pwrite64", 9, Where.LOG), Strike("fdatasync", 2)]
    others += [Strike("connect", 1)]  # recorded, and never sent
    # Side by side, each with a ledger of its own: most of the time goes into starts.
    async with asyncio.TaskGroup() as group:
        chains = [
            group.create_task(strike_again_and_again(tmp_path / name, closed, strikes))
            for name, strikes in (("odd", journal[::2]), ("even", journal[1::2]), ("other", others))
        ]
    assert all(chain.result()["recovered"] for chain in chains)


@traced
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "strikes",
    [
        [Strike("pwrite64", when, Where.JOURNAL) for when in (*range(7, 13), *range(13, 60, 3))],
        [Strike("pwrite64", when, Where.LOG) for when in (1, 2, *range(13, 120, 7))],
        [Strike("fdatasync", when) for when in (1, *range(3, 12))],
        # With these the first segment is full, and the next one is written to and one prepared.
        [Strike("fallocate", 1), Strike("fsync", 1), Strike("fsync", 2)],
        # A minute after its start: a backup that has no name yet, and one that has just got it.
        [Strike("rename", 1), Strike("unlink", 1, Where.OLD)],
    ],
    ids=["journal", "database", "sync", "rotation", "backup"],
)
async def test_killed_before_any_later_write_the_books_are_right(
    tmp_path: Path, closed: int, strikes: list[Strike]
) -> None:
    counts = await strike_again_and_again(tmp_path / "chain", closed, strikes)
    assert counts["recovered"]


# -- while it recovers -----------------------------------------------------------------------------


UNSETTLED = (*STEPS, *LATE)


async def left_open(folder: Path, demo: DemoUpstream, closed: int) -> tuple[Place, list[Got]]:
    """A gateway that was killed in the middle of many requests. Of the late ones neither disk nor
    database were told yet: they stand at the end of the journal alone."""
    place = await found(folder, demo, closed, {step.user: "1" for step in UNSETTLED})
    async with place.life() as life, clients(place, life) as client:
        async with (
            all_parked(client, demo, STEPS),
            syncs_take(2.0, life),  # with 5 s journal and database would count as lost
            all_parked(client, demo, LATE),
        ):
            life.kill()
        await life.ended()
    return place, client.got


async def strike_its_recovery(place: Place, strikes: Iterable[Strike]) -> int:
    """Each twice in a row; how many met a call. A start that does not make it so often becomes
    ready, and is killed then."""
    met = 0
    for strike in strikes:
        for _ in range(2):
            with explained(place, strike=strike):
                async with place.life(*strike.from_the_start(place)) as life:
                    if not await life.ready():
                        assert await life.ended() == -signal.SIGKILL
                        met += 1
    return met


async def assert_all_recovered(place: Place, demo: DemoUpstream, got: Sequence[Got]) -> None:
    with explained(place):
        await settled_after(place, got, UNSETTLED)
        counts = assert_books(place, demo.record, got)
    assert counts == {"recovered": len(UNSETTLED)}


@traced
async def test_killed_while_it_recovers_it_recovers_the_next_time(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    place, got = await left_open(tmp_path / "killed", demo, closed)
    # The last one lets some be settled, and some not.
    where = ((1, Where.LOG), (4, Where.JOURNAL))
    strikes = [Strike("pwrite64", when, files) for when, files in where]
    assert await strike_its_recovery(place, strikes) == 4
    await assert_all_recovered(place, demo, got)


@traced
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("call", "where", "times"),
    [
        ("pwrite64", Where.JOURNAL, 16),
        ("pwrite64", Where.LOG, 14),
        ("pwrite64", None, 10),
        ("fdatasync", None, 3),
        ("fsync", None, 12),
        ("ftruncate", None, 6),
        ("fallocate", None, 3),
        ("unlink", None, 1),
    ],
)
async def test_killed_before_any_call_of_its_recovery_it_recovers_the_next_time(
    tmp_path: Path, demo: DemoUpstream, closed: int, call: str, where: Where | None, times: int
) -> None:
    place, got = await left_open(tmp_path / "killed", demo, closed)
    strikes = [Strike(call, when, where) for when in range(1, times + 1)]
    assert await strike_its_recovery(place, strikes) > 0
    await assert_all_recovered(place, demo, got)


# -- the very first start --------------------------------------------------------------------------

FIRST = [
    Strike("pwrite64", 40),  # in the middle of the migrations
    Strike("fallocate", 1),  # a database that has a name, and no journal yet
]
OTHERS = [
    *(Strike("pwrite64", when) for when in (1, 2, 3, 4, 9, 13, 16, 17, 34, 60)),
    *(Strike("fdatasync", when) for when in range(1, 8)),
    *(Strike("fsync", when) for when in range(1, 6)),
    Strike("unlink", 1),  # SQLite's journal of the first change of all
    *(Strike("fallocate", 2), Strike("mkdir", 1)),
]


@traced
@pytest.mark.parametrize(
    "strike",
    [*FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)],
    ids=lambda strike: f"{strike.call}-{strike.when}",
)
async def test_killed_in_its_very_first_start_it_starts_the_next_time(
    tmp_path: Path, demo: DemoUpstream, closed: int, strike: Strike
) -> None:
    place = configured(tmp_path / "killed", demo, closed)
    with explained(place):
        async with place.life(*strike.from_the_start(place)) as life:
            assert not await life.ready()
            assert await life.ended() == -signal.SIGKILL
        async with place.life() as life, clients(place, life) as client:
            place.keys["ann"] = await make_key(client.session, "ann")
            assert (await client.ask("ann", "mock/prose", False)).served
            await life.stop()
        assert assert_books(place, demo.record, client.got) == {"completed": 1}
