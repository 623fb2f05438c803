"""Health and metrics: what monitors ask, answered from memory."""

from collections.abc import Callable

import orjson
from aiohttp import web

from gwproxy.metrics import CONTENT_TYPE, Metrics

_OK = orjson.dumps({"status": "ok"})


class Health:
    """`draining` says whether the process is on its way out."""

    def __init__(self, metrics: Metrics, draining: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._draining = draining

    async def live(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=_OK, content_type="application/json")

    async def ready(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._draining():
            body = orjson.dumps({"status": "draining"})
            return web.Response(status=503, body=body, content_type="application/json")
        return web.Response(body=_OK, content_type="application/json")

    async def metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})
