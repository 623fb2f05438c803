"""Fixtures: a gateway with an upstream behind it, in the test's event loop, which is uvloop."""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest_asyncio
import uvloop
from aiohttp.test_utils import TestClient

from tests.harness import CONFIG, Gateway, Upstream, make_key
from tests.plane import Plane, open_plane


def pytest_asyncio_loop_factories() -> dict[str, Any]:
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    await upstream.start()
    yield upstream
    await upstream.stop()


StartGateway = Callable[..., Awaitable["Front"]]


class Front:
    """A client of a running gateway, with a key of its own."""

    def __init__(self, client: TestClient[Any, Any], gateway: Gateway, key: str) -> None:
        self.client = client
        self.gateway = gateway
        self.key = key

    @property
    def url(self) -> str:
        return str(self.client.make_url("")).rstrip("/")

    @property
    def port(self) -> int:
        return self.client.port

    async def chat(self, body: Any, **headers: str) -> Any:
        """POST a chat request; the caller reads the response."""
        sent = {"Authorization": f"Bearer {self.key}", **headers}
        return await self.client.post("/v1/chat/completions", json=body, headers=sent)


@pytest_asyncio.fixture
async def start_gateway(aiohttp_client: Any, upstream: Upstream, tmp_path: Path) -> StartGateway:
    """Starts a gateway in front of `upstream`; `more` is appended to its configuration."""

    async def start(more: str = "", *, config: str | None = None, **environ: str) -> Front:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        text = config or CONFIG.format(upstream=upstream.url, more=more)
        gateway = Gateway(folder, text, environ)
        client = await aiohttp_client(gateway)
        return Front(client, gateway, await make_key(client))

    return start


@pytest_asyncio.fixture
async def front(start_gateway: StartGateway) -> Front:
    return await start_gateway()


@pytest_asyncio.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with open_plane(tmp_path) as plane:
        yield plane
