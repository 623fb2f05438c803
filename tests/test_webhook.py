"""Budget alerts reach the operator's webhook: in order, at least once, and with nothing else."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from gwproxy import webhook
from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.records import Alert
from gwproxy.log import Log
from gwproxy.webhook import Webhook
from tests.conftest import StartGateway
from tests.harness import ADMIN, Upstream
from tests.test_budgets import DEAR, DOLLAR, Crowd, limited, send

NOW_MS = 1_795_270_800_000  # 2026-11-21T14:20:00Z
THIS_MONTH_MS = 1_793_491_200_000
SECRET = "of-more-than-nothing"


def alert(lsn: int, percent: int = 80, t: int = NOW_MS) -> Alert:
    return Alert(
        lsn=lsn,
        t=t,
        synced=0,
        account="user:alice",
        period="2026-11",
        percent=percent,
        spent=percent * 10**8,
        limit=10**10,
    )


@dataclass
class Receiver:
    """Somebody's endpoint. It answers with what `answers` says, then 204."""

    url: str = ""
    answers: list[web.Response] = field(default_factory=list)
    heard: asyncio.Queue[tuple[dict[str, Any], dict[str, str]]] = field(
        default_factory=asyncio.Queue
    )

    async def handle(self, request: web.Request) -> web.Response:
        answer = self.answers.pop(0) if self.answers else web.Response(status=204)
        self.heard.put_nowait((await request.json(), dict(request.headers)))
        return answer

    async def next(self) -> int:
        """The record that the next call is about."""
        body, _ = await asyncio.wait_for(self.heard.get(), 5)
        return int(body["id"].rpartition("-")[2])


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_post("/hook", found.handle)
    async with TestServer(app) as server:
        found.url = str(server.make_url("/hook"))
        yield found


@dataclass
class Tables:
    """The alerts that the database has."""

    alerts: list[Alert] = field(default_factory=list)
    lost: int = 0

    async def after(self, lsn: int, since_ms: int, most: int) -> list[Alert]:
        if self.lost:
            self.lost -= 1
            raise StorageUnavailable("lost")
        await asyncio.sleep(0)
        return [a for a in self.alerts if a.lsn > lsn and a.t >= since_ms][:most]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.5)


@asynccontextmanager
async def telling(
    folder: Path,
    receiver: Receiver,
    tables: Tables,
    words: io.StringIO | None = None,
    monotonic: Callable[[], float] = lambda: 0.0,
    ledger: str = "ledger-1",
) -> AsyncIterator[Webhook]:
    log = Log(words or io.StringIO(), "debug")
    log.start()
    hook = Webhook(
        receiver.url,
        SECRET,
        folder / "told",
        ledger,
        stored=tables.after,
        now_ms=lambda: NOW_MS,
        monotonic=monotonic,
        log=log,
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(hook.run())
        yield hook
        task.cancel()
    log.stop()


async def told(folder: Path, lsn: int) -> None:
    """The file says so."""
    while json.loads((folder / "told").read_bytes())["told_lsn"] != lsn:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_an_alert_has_what_it_is_about_and_nothing_else(
    tmp_path: Path, receiver: Receiver
) -> None:
    tables = Tables([alert(7)])
    async with telling(tmp_path, receiver, tables):
        body, headers = await asyncio.wait_for(receiver.heard.get(), 5)
    assert body == {
        "type": "budget_alert",
        "id": "ledger-1-7",
        "account": "user:alice",
        "period": "2026-11",
        "percent": 80,
        "spent_usd": "8.000000000",
        "limit_usd": "10.000000000",
        "created_at": "2026-11-21T14:20:00Z",
    }
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["Idempotency-Key"] == "ledger-1-7"
    assert headers["User-Agent"].startswith("gwproxy/")


async def test_alerts_arrive_in_their_order_and_once(tmp_path: Path, receiver: Receiver) -> None:
    tables = Tables([alert(3), alert(5)])
    async with telling(tmp_path, receiver, tables) as hook:
        assert [await receiver.next() for _ in range(2)] == [3, 5]
        await told(tmp_path, 5)
        for lsn in (8, 9):
            tables.alerts.append(alert(lsn))
            hook.add(alert(lsn))
        assert [await receiver.next() for _ in range(2)] == [8, 9]
        await told(tmp_path, 9)
    async with telling(tmp_path, receiver, tables) as hook:
        hook.add(alert(12))
        tables.alerts.append(alert(12))
        assert await receiver.next() == 12
    assert receiver.heard.empty()


@pytest.mark.parametrize("status", [302, 400, 500])
async def test_what_is_not_taken_is_sent_again_and_no_redirect_is_followed(
    tmp_path: Path, receiver: Receiver, status: int
) -> None:
    elsewhere = {"Location": receiver.url}
    receiver.answers = [web.Response(status=status, headers=elsewhere) for _ in range(2)]
    words = io.StringIO()
    async with telling(tmp_path, receiver, Tables([alert(3), alert(4)]), words):
        assert [await receiver.next() for _ in range(4)] == [3, 3, 3, 4]
    assert f"HTTP {status}" in words.getvalue()
    assert receiver.url not in words.getvalue() and SECRET not in words.getvalue()


async def test_what_was_not_delivered_is_sent_after_a_restart(
    tmp_path: Path, receiver: Receiver
) -> None:
    tables = Tables([alert(3)])
    receiver.answers = [web.Response(status=500)] * 10_000
    async with telling(tmp_path, receiver, tables):
        assert await receiver.next() == 3
    receiver.answers = []
    receiver.heard = asyncio.Queue()
    async with telling(tmp_path, receiver, tables):
        assert await receiver.next() == 3
        await told(tmp_path, 3)


@pytest.mark.parametrize("written", [b"", b"{}", b"[1", b"\xff", None])
async def test_where_nobody_knows_what_was_told_this_month_is_told_again(
    tmp_path: Path, receiver: Receiver, written: bytes | None
) -> None:
    if written is not None:
        (tmp_path / "told").write_bytes(written)
    tables = Tables([alert(3, t=THIS_MONTH_MS - 1), alert(4, t=THIS_MONTH_MS), alert(5)])
    words = io.StringIO()
    async with telling(tmp_path, receiver, tables, words):
        assert [await receiver.next() for _ in range(2)] == [4, 5]
        await told(tmp_path, 5)
    assert ("not known" in words.getvalue()) is (written is not None)
    async with telling(tmp_path, receiver, tables, ledger="another"):
        assert await receiver.next() == 4


async def test_more_alerts_than_the_queue_holds_come_from_the_tables(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "QUEUE", 3)
    monkeypatch.setattr(webhook, "PAGE", 4)
    tables = Tables()
    async with telling(tmp_path, receiver, tables) as hook:
        for lsn in range(1, 20):
            tables.alerts.append(alert(lsn))
            hook.add(alert(lsn))
            if lsn % 5 == 0:
                await asyncio.sleep(0.002)
        assert [await receiver.next() for _ in range(19)] == list(range(1, 20))
        hook.add(alert(20))
        tables.alerts.append(alert(20))
        assert await receiver.next() == 20


async def test_a_lost_database_is_waited_for(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.01)
    async with telling(tmp_path, receiver, Tables([alert(3)], lost=3)):
        assert await receiver.next() == 3


async def test_an_alert_that_nobody_takes_for_a_day_holds_up_no_other(
    tmp_path: Path, receiver: Receiver
) -> None:
    receiver.answers = [web.Response(status=410) for _ in range(3)]
    clock = iter([0.0, 1.0, 2.0, webhook.GIVE_UP_AFTER_S + 1, *[0.0] * 100])
    words = io.StringIO()
    tables = Tables([alert(3), alert(4)])
    async with telling(tmp_path, receiver, tables, words, monotonic=lambda: next(clock)):
        assert [await receiver.next() for _ in range(4)] == [3, 3, 3, 4]
        await told(tmp_path, 4)
    assert "budget alert not delivered" in words.getvalue()


async def test_a_gateway_tells_whose_budget_is_nearly_spent(
    start_gateway: StartGateway, upstream: Upstream, receiver: Receiver
) -> None:
    hook = f'alert_webhook = "{receiver.url}"\nalert_webhook_secret = "{SECRET}"\n'
    more = f"{DEAR}\n[quota]\n{hook}"
    front = await limited(start_gateway, "5", more=more)
    crowd = Crowd(upstream)
    crowd.go.set()
    for _ in range(5):
        await send(front, max_tokens=DOLLAR)
    heard = [await asyncio.wait_for(receiver.heard.get(), 5) for _ in range(3)]
    assert [(body["account"], body["percent"], body["spent_usd"]) for body, _ in heard] == [
        ("user:bob", 80, "4.000000000"),
        ("user:bob", 95, "5.000000000"),
        ("user:bob", 100, "5.000000000"),
    ]
    answer = await front.client.get("/metrics", headers=ADMIN)
    assert SECRET not in await answer.text()
