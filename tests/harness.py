"""What several test files need: the whole gateway in the test's own event loop, with its real
listener, database and log, and an upstream that sends exactly the bytes a test gives it.

The upstream shares no code with the gateway: what it received and sent is what is believed.
"""

import asyncio
import functools
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import BaseTestServer
from yarl import URL

from gwproxy import assets
from gwproxy.admin.auth import AdminAuth
from gwproxy.admin.routes import BODY_LIMIT_BYTES, over_http, routes
from gwproxy.app import App
from gwproxy.config import Config, load
from gwproxy.core.api import Api
from gwproxy.core.errors import GatewayError
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE
from gwproxy.core.tokens import Tokenizer, choose_counter
from gwproxy.intake import Intake
from gwproxy.log import Log
from gwproxy.state.keyring import Keyring
from gwproxy.state.store import Store
from gwproxy.web import Route, Router, error_response

ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
UPSTREAM_TOKEN = "upstream-token-that-nobody-may-see"
MODEL = "mock/echo"

CONFIG = """
[server]
listen = "127.0.0.1:0"
drain_s = 1
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "openai"
base_url = "{upstream}"
token = "env:UPSTREAM_TOKEN"
[prices.models."mock/echo"]
input = "1.00"
output = "2.00"
{more}
"""


class Gateway(BaseTestServer):
    """A gateway as `gwproxy serve` runs it. `config` is the text of its file."""

    def __init__(self, folder: Path, config: str, environ: dict[str, str] | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._config = config
        self._environ = {
            "GWPROXY_ADMIN_KEY": ADMIN_KEY,
            "UPSTREAM_TOKEN": UPSTREAM_TOKEN,
            "GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES": "1048576",
            # Most tests make a provider fail on purpose, and again and again.
            "GWPROXY__BREAKER__FAILURE_THRESHOLD": "1000",
            **(environ or {}),
        }
        self.written = io.StringIO()
        self.log = Log(self.written, "debug")
        self.app: App | None = None

    async def start_server(self, loop: Any = None, **kwargs: Any) -> None:
        if self.app is not None:
            return
        path = self._folder / "config.toml"
        path.write_text(self._config)
        path.chmod(0o600)

        def source() -> Config:
            return load(path, self._environ, catalogue=CATALOGUE)

        self.log.start()
        self.app = await App.start(source(), self.log, tokenizer(), prices(), source=source)
        self._root = URL(self.app.addresses[0])
        self.host, self.port, self.scheme = self._root.host or "", self._root.port, "http"

    async def _make_runner(self, **kwargs: Any) -> Any:
        raise AssertionError("the gateway runs itself")

    @property
    def started(self) -> bool:
        return self.app is not None

    async def close(self) -> None:
        if self.app is not None and not self._closed:
            self._closed = True
            await self.app.stop()
            self.log.stop()

    @property
    def database(self) -> Path:
        return self._folder / "gwproxy.db"

    async def lines(self, event: str | None = None, least: int = 1) -> list[dict[str, Any]]:
        """The log so far, once it has `least` lines of this event."""
        async with asyncio.timeout(5):
            while True:
                found = [json.loads(line) for line in self.written.getvalue().splitlines()]
                if event is not None:
                    found = [line for line in found if line["event"] == event]
                if len(found) >= least:
                    return found
                await asyncio.sleep(0.02)  # the log's thread writes ten times a second

    async def request_line(
        self, number: int = -1, least: int = 1, route: str = "chat"
    ) -> dict[str, Any]:
        """The log line of a request of this route: the last one, once there are `least`."""
        async with asyncio.timeout(5):
            while True:
                lines = await self.lines("request", 0)
                found = [line for line in lines if line["route"] == route]
                if len(found) >= least:
                    return found[number]
                await asyncio.sleep(0.02)


@functools.cache
def prices() -> PriceBook:
    """One for all tests, too."""
    return PriceBook(assets.prices())


@functools.cache
def tokenizer() -> Tokenizer:
    """One for all tests: it takes half a second to load."""
    counter = choose_counter(assets.ranks())
    assert isinstance(counter, Tokenizer), counter.fault
    return counter


def admin_plane(
    store: Store, auth: AdminAuth
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """The admin plane alone, behind as much of a front as it needs: the router and errors."""
    intake = Intake(max_body_bytes=BODY_LIMIT_BYTES, body_timeout_s=5)
    repeats = store.directory.repeats
    router = Router(
        Route(
            each.method,
            each.path,
            over_http(each, auth, intake, repeats),
            "admin",
            identified=True,
        )
        for each in routes(store)
    )

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            route, parameters = router.find(request.method, request.raw_path)
            return await route.handler(request, request_id="req_test", **parameters)
        except GatewayError as error:
            unread = not request.content.is_eof()
            return error_response(error, "req_test", Api.CHAT, unread=unread, degraded=False)

    return handle


def admin_auth(
    key: str | None,
    now: Callable[[], float] = lambda: 0.0,
    keyring: Keyring | None = None,
    wall: Callable[[], float] = lambda: 0.0,
) -> AdminAuth:
    return AdminAuth(key, keyring or Keyring(), now, wall)


async def make_key(client: Any, user_id: str = "alice", **fields: Any) -> str:
    """A user with a key, made through the admin API."""
    made = await client.post("/admin/users", json={"user_id": user_id}, headers=ADMIN)
    assert made.status in (201, 409), await made.text()
    made = await client.post(f"/admin/users/{user_id}/api-keys", json=fields, headers=ADMIN)
    assert made.status == 201, await made.text()
    key: str = (await made.json())["api_key"]
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def chat(stream: bool = False, **fields: Any) -> dict[str, Any]:
    """The body of a small chat request."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello there."}]}
    return {**body, **({"stream": True} if stream else {}), **fields}


# -- the upstream --------------------------------------------------------------------------------


@dataclass
class Received:
    """One request as it came, head and body, byte for byte."""

    head: bytes
    body: bytes
    connection: int

    @property
    def headers(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [
            (n.lower(), v.strip()) for n, _, v in (line.partition(":") for line in lines if line)
        ]

    def header(self, name: str) -> str | None:
        found = [value for other, value in self.headers if other == name.lower()]
        assert len(found) < 2, found
        return found[0] if found else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Wire:
    """What a script writes to: the upstream's end of the connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def start(self, content_type: str = "text/event-stream", more: str = "") -> None:
        """The head of a chunked 200."""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{more}"
        await self.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode("latin-1"))

    async def answer(self, body: bytes, status: str = "200 OK", more: str = "") -> None:
        """A whole JSON answer."""
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{more}"
        await self.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)

    def reset(self) -> None:
        """RST: what a killed server's kernel sends."""
        self.writer.transport.abort()

    def hang_up(self) -> None:
        self.writer.close()


Script = Callable[[Wire, Received], Awaitable[None]]


class Upstream:
    """A server that runs a script for each request: the queued ones first, then `script`.

    A script that returns leaves the connection open for the next request.
    """

    def __init__(self) -> None:
        self.script: Script = answer_hello
        self.queue: list[Script] = []
        self.received: list[Received] = []
        self.arrived = asyncio.Event()
        """Set when a request came; a test clears it."""
        self.connections = 0
        self.open = 0
        self._server: asyncio.Server | None = None
        self.url = ""

    async def start(self, ssl: Any = None) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=ssl)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if ssl else 'http'}://127.0.0.1:{port}/v1"
        return self.url

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        wire = Wire(reader, writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                received = Received(head[:-4], b"", number)
                length = int(received.header("content-length") or 0)
                received.body = await reader.readexactly(length)
                self.received.append(received)
                self.arrived.set()
                script = self.queue.pop(0) if self.queue else self.script
                await script(wire, received)
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            wire.gone.set()
            writer.close()


USAGE = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1767225600,
    "model": "echo",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello."},
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}


async def answer_hello(wire: Wire, received: Received) -> None:
    """An answer of the kind that was asked for."""
    if not received.json.get("stream"):
        await wire.answer(json.dumps(ANSWER).encode())
        return
    await wire.start()
    for data in events("Hel", "lo."):
        await wire.chunk(data)
    await wire.end()


def event(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def delta(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One chunk of a stream, with text or with its end."""
    change = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": change, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1767225600}
    return event({**chunk, "model": "echo", "choices": [choice], **more})


def usage_only(**usage: int) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1767225600}
    return event({**chunk, "model": "echo", "choices": [], "usage": {**USAGE, **usage}})


DONE = event("[DONE]")


def events(*texts: str) -> list[bytes]:
    """A whole stream, as OpenAI sends it when usage is asked for."""
    return [*(delta(text) for text in texts), delta(finish="stop"), usage_only(), DONE]
