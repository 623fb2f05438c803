"""Budget alerts to the operator's webhook: in their order, each at least once, also where the
process ends in between. Off the path of requests, which only ever puts an alert into a queue.

The database keeps all alerts; what has been told is one number in a file beside it. So the queue
may be short: what does not fit is read again from there.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from gwproxy import __version__
from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.money import format_usd
from gwproxy.core.period import periods, rfc3339, start_ms
from gwproxy.core.records import Alert
from gwproxy.log import Log
from gwproxy.storage import soft

QUEUE: Final = 1000
"""Alerts in memory: a hundred kilobytes."""
PAGE: Final = 100

TIMEOUT_S: Final = 10.0
FIRST_RETRY_S: Final = 1.0
LONGEST_RETRY_S: Final = 300.0
GIVE_UP_AFTER_S: Final = 86_400.0
"""An alert that nobody took for a day holds up the others no longer. The log has it in any case."""

Stored = Callable[[int, int, int], Awaitable[list[Alert]]]
"""The alerts after an LSN and from a moment on, so many at the most, oldest first."""


class Webhook:
    def __init__(
        self,
        url: str,
        secret: str | None,
        told: Path,
        ledger_id: str,
        *,
        stored: Stored,
        now_ms: Callable[[], int],
        monotonic: Callable[[], float],
        log: Log,
    ) -> None:
        """`told` is the file with the last alert that was delivered; `secret` goes into the
        Authorization header."""
        self._url = url
        self._secret = secret
        self._file = told
        self._ledger_id = ledger_id
        self._stored = stored
        self._monotonic = monotonic
        self._log = log
        self._queue: deque[Alert] = deque()
        self._behind = True
        """There may be alerts that are not in the queue."""
        self._newest = 0
        self._added = asyncio.Event()
        # For the first time, or where nobody knows: what this month has brought is told (again).
        self._told, self._since_ms = self._read() or (0, start_ms(periods(now_ms())[0]))

    def add(self, alert: Alert) -> None:
        """An alert was recorded."""
        self._newest = alert.lsn
        if not self._behind and len(self._queue) < QUEUE:
            self._queue.append(alert)
        else:
            self._behind = True
        self._added.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        await self._keep()
        headers = {"User-Agent": f"gwproxy/{__version__}"}
        if self._secret is not None:
            headers["Authorization"] = f"Bearer {self._secret}"
        async with aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=1, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            while True:
                alert = await self._next()
                await self._deliver(session, alert)
                self._told = alert.lsn
                await self._keep()

    async def _next(self) -> Alert:
        while not self._queue:
            self._added.clear()
            if not self._behind:
                await self._added.wait()
                continue
            try:
                page = await self._stored(self._told, self._since_ms, PAGE)
            except StorageUnavailable:
                await asyncio.sleep(TIMEOUT_S)
                continue
            self._queue.extend(page)
            last = page[-1].lsn if page else self._told
            # One that came while the tables were read is in neither.
            self._behind = len(page) == PAGE or last < self._newest
            if self._behind and not page:
                await asyncio.sleep(FIRST_RETRY_S)
        return self._queue.popleft()

    async def _deliver(self, session: aiohttp.ClientSession, alert: Alert) -> None:
        give_up_at = self._monotonic() + GIVE_UP_AFTER_S
        wait_s = FIRST_RETRY_S
        failed = False
        while (fault := await self._post(session, alert)) is not None:
            known = {"account": alert.account, "period": alert.period, "percent": alert.percent}
            if self._monotonic() >= give_up_at:
                self._log.event("error", "budget alert not delivered", fault=fault, **known)
                return
            if not failed:
                self._log.event("warning", "budget alert waits", fault=fault, **known)
            failed = True
            # Several gateways behind one address should not come back in step.
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)
        self._log.event("info", "budget alert delivered", account=alert.account, lsn=alert.lsn)

    async def _post(self, session: aiohttp.ClientSession, alert: Alert) -> str | None:
        """What went wrong; None: nothing. Its words never have the address, which may be secret."""
        try:
            # Where it is sent follows from the configuration alone: no redirect is followed.
            async with session.post(
                self._url,
                json=self._body(alert),
                headers={"Idempotency-Key": self._id(alert)},
                allow_redirects=False,
            ) as response:
                return None if 200 <= response.status < 300 else f"HTTP {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return type(error).__name__

    def _body(self, alert: Alert) -> dict[str, Any]:
        return {
            "type": "budget_alert",
            "id": self._id(alert),
            "account": alert.account,
            "period": alert.period,
            "percent": alert.percent,
            "spent_usd": format_usd(alert.spent),
            "limit_usd": format_usd(alert.limit),
            "created_at": rfc3339(alert.t),
        }

    def _id(self, alert: Alert) -> str:
        """The same each time that it is sent."""
        return f"{self._ledger_id}-{alert.lsn}"

    def _read(self) -> tuple[int, int] | None:
        try:
            match soft.read(self._file):
                case None:
                    return None
                case {"ledger_id": self._ledger_id, "told_lsn": int(lsn), "since_ms": int(since)}:
                    return lsn, since
            fault = "it is about another ledger"
        except soft.Broken as broken:
            fault = str(broken)
        self._log.event("warning", "what was told of alerts is not known", cause=fault)
        return None

    async def _keep(self) -> None:
        value = {
            "ledger_id": self._ledger_id,
            "told_lsn": self._told,
            "since_ms": self._since_ms,
        }
        try:
            await asyncio.to_thread(soft.write, self._file, value)
        except OSError as error:
            self._log.event("warning", "what was told of alerts is not kept", errno=error.errno)
