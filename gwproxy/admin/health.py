"""Health and metrics: what monitors ask, answered from memory.

Readiness tells states and no causes: anybody may ask for it. The causes are in the log.
"""

import asyncio
from collections.abc import Callable

import orjson
from aiohttp import web

from gwproxy.metrics import CONTENT_TYPE, Metrics
from gwproxy.state.outage import Condition

_OK = orjson.dumps({"status": "ok"})


class Health:
    """`condition` says how the process stands."""

    def __init__(self, metrics: Metrics, condition: Callable[[], Condition]) -> None:
        self._metrics = metrics
        self._condition = condition

    async def live(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=_OK, content_type="application/json")

    async def ready(self, request: web.BaseRequest) -> web.StreamResponse:
        condition = self._condition()
        state = {
            "status": condition.status,
            "journal": "ok" if condition.journal is None else "lost",
            "database": "ok" if condition.database is None else "lost",
        }
        return web.Response(
            status=200 if condition.ready else 503,
            body=orjson.dumps(state),
            content_type="application/json",
        )

    async def metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        pages = []
        for page in self._metrics.pages():
            pages.append(page)
            await asyncio.sleep(0)  # streams go on in between
        return web.Response(body=b"".join(pages), headers={"Content-Type": CONTENT_TYPE})
