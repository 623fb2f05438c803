"""Kill -9, at each step of a request, at any moment under load, and before a chosen system call:
whatever was sent upstream stands in the ledger once, and nobody is charged less than he got.

Real processes on real files. The upstream's own record is what is believed.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from gwproxy.core.holds import FIRST_OUTPUT
from tests.kills import (
    OUTPUT_NANOS,
    PATIENCE_S,
    Client,
    Got,
    Life,
    Place,
    assert_books,
    assert_settled,
    clients,
    explained,
    found,
    nanos,
    never_accepting,
    stricken,
    watched,
    why_no_tracing,
)
from tests.scene import until
from tests.sdk import demo_upstream

pytestmark = pytest.mark.timeout(400)  # many starts, on a machine that may be busy

traced = pytest.mark.skipif(bool(why_no_tracing()), reason=why_no_tracing())


@pytest_asyncio.fixture
async def demo(tmp_path: Path) -> AsyncIterator[DemoUpstream]:
    demo = demo_upstream()
    await demo.start()
    yield demo
    await demo.stop()


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
    Step("middle", "mock/prose+len-60+stall-after-20", True, Charge.MARK, 20),
    Step("past_marks", "mock/prose+len-900+stall-after-700", True, Charge.MARK, 700, 8000),
    Step("past_the_hold", "mock/prose+len-2000+stall-after-1500", True, Charge.RAISED, 1500),
    Step("usage_told", "mock/prose+len-30+stall-after-99", True, Charge.MARK, 30),
    Step("out_of_sight", "deepseek/deepseek-chat+stall-after-5", True, Charge.HOLD, 4),
    Step("second_attempt", "second", True, Charge.MARK, 5),
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


async def test_killed_at_any_step_each_request_is_charged_once_for_what_was_sent_at_the_most(
    tmp_path: Path, demo: DemoUpstream, closed: int
) -> None:
    limits = {step.user: "1" for step in STEPS} | {"settled": "1"}
    place = await found(tmp_path / "killed", demo, closed, limits)
    older = tmp_path / "older.db"
    shutil.copy(place.database, older)
    async with place.life() as life, clients(place, life) as client:
        assert await life.ready()
        async with asyncio.TaskGroup() as group:
            for step in STEPS:
                group.create_task(client.ask(step.user, step.model, step.stream, most=step.most))
            async with asyncio.TaskGroup() as parking:
                for step in STEPS:
                    parking.create_task(park(client, step, demo))
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
    record = await demo.recorded(sent)
    assert len(record) == sent

    # The same end twice: as it was left, and with a database that has seen nothing of all that.
    rebuilt = place.copy(tmp_path / "rebuilt")
    for path in rebuilt.folder.glob("gwproxy.db*"):
        path.unlink()
    shutil.copy(older, rebuilt.database)
    outcomes = []
    for each in (place, rebuilt):
        with explained(each):
            outcomes.append(await settled_after(each, client.got))
            counts = assert_books(each, record, client.got)
            assert counts["recovered"] in (len(STEPS), len(STEPS) + 1)
            assert counts["recovered"] + counts["completed"] == len(STEPS) + len(whole)
    assert outcomes[0] == outcomes[1]


async def settled_after(place: Place, before: Sequence[Got]) -> dict[str, str]:
    """What each user of STEPS is told after a restart, which ends in order: his cost."""
    costs = {}
    async with place.life() as life, clients(place, life) as client:
        assert await life.ready()
        await assert_settled(client, before)
        for step in STEPS:
            usage = await client.usage(step.user)
            (line,) = usage["requests"]
            assert line["outcome"] == "recovered", step
            receipt = await client.receipt(step.user, line["request_id"])
            assert (receipt["source"], receipt["overrun_usd"]) == ("estimated", "0.000000000")
            costs[step.user] = receipt["cost_usd"]
            cost, held = nanos(receipt["cost_usd"]), nanos(receipt["held_usd"])
            assert cost < held if step.charge is Charge.MARK else cost == held, step
            if step.charge is Charge.RAISED:
                assert cost > FIRST_OUTPUT * OUTPUT_NANOS, step
            for scope in usage["scopes"][:2]:
                assert scope["month_usage_usd"] == receipt["cost_usd"], step
                assert scope["request_count"] == 1, step
        await life.stop()
    return costs
