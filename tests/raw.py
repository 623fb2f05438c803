"""A client that sends exactly the bytes a test gives it, and reads answers without forgiving
anything: what a proxy, an attacker or a broken program does on a socket no HTTP library will."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.conftest import Front
from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN, Upstream, chat

PATIENCE_S = 10.0
"""No answer of a gateway on the same machine takes so long; what does is a hang."""


@dataclass(frozen=True)
class Answered:
    """One response. `names` keeps the headers as they came, `body` is out of its chunks."""

    status: int
    version: str
    fields: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        found = [value for other, value in self.fields if other.lower() == name.lower()]
        assert len(found) < 2, (name, found)
        return found[0] if found else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        code: str | None = self.json["error"]["code"]
        return code


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def flood(self, data: bytes) -> bool:
        """Send as far as the other side takes it; False when it has hung up."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            return False
        return not self.writer.is_closing()

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """RST: leave without a word."""
        self.writer.transport.abort()

    async def head(self) -> tuple[int, str, list[tuple[str, str]]]:
        async with asyncio.timeout(PATIENCE_S):
            block = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = block[:-4].decode("latin-1").split("\r\n")
        version, status, _reason = first.split(" ", 2)
        fields = []
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon, line
            fields.append((name, value))
        return int(status), version, fields

    async def answer(self, *, to_head: bool = False) -> Answered:
        """The next response, whole. `to_head`: it answers a HEAD and has no body."""
        status, version, fields = await self.head()
        table = {name.lower(): value for name, value in fields}
        assert len(table) == len(fields), fields
        async with asyncio.timeout(PATIENCE_S):
            if to_head or status in (100, 204, 304):
                body = b""
            elif table.get("transfer-encoding") == "chunked":
                assert "content-length" not in table, fields
                body = b"".join([part async for part in self.chunks()])
            elif "content-length" in table:
                body = await self.reader.readexactly(int(table["content-length"]))
            else:
                assert table.get("connection") == "close", fields
                body = await self.reader.read()
        return Answered(status, version, fields, body)

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
            assert data.endswith(b"\r\n"), data
            if not size:
                return
            yield data[:-2]

    async def rest(self) -> bytes:
        """All that comes until the other side closes; it must close."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                # A close while we were still sending; nothing was lost that we had not read.
                return b""


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = Peer(reader, writer)
    try:
        yield peer
    finally:
        writer.transport.abort()


CHAT = "/v1/chat/completions"


def head(
    *lines: str, key: str | None = None, line: str = f"POST {CHAT} HTTP/1.1", host: bool = True
) -> bytes:
    """A request's head: its line, Host, the key, and `lines`."""
    every = [line, *(["Host: gateway"] if host else [])]
    if key is not None:
        every.append(f"Authorization: Bearer {key}")
    return ("\r\n".join([*every, *lines]) + "\r\n\r\n").encode("latin-1")


def post(body: bytes, *lines: str, key: str | None, path: str = CHAT) -> bytes:
    """A well-formed POST of a JSON body."""
    return (
        head(
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *lines,
            key=key,
            line=f"POST {path} HTTP/1.1",
        )
        + body
    )


def get(path: str, *lines: str, key: str | None = None, method: str = "GET") -> bytes:
    return head(*lines, key=key, line=f"{method} {path} HTTP/1.1")


# -- what holds for every refusal ----------------------------------------------------------------

CANARY = "canary-8c1f"
"""Stands in prompts and headers of these tests, and may stand in no log and no refusal."""


def prompt(**fields: Any) -> bytes:
    """The body of a chat request whose prompt must not be seen again."""
    return json.dumps(chat(messages=[{"role": "user", "content": CANARY}], **fields)).encode()


def assert_refusal(
    answer: Answered, status: int, code: str | None, param: str | None = None
) -> None:
    """OpenAI's envelope, our headers, and not a word of what was sent."""
    assert (answer.status, answer.version) == (status, "HTTP/1.1"), answer
    assert answer.json.keys() == {"error"}, answer
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}, answer
    assert (error["code"], error["param"]) == (code, param), answer
    assert error["message"] and isinstance(error["type"], str), answer
    assert answer.header("content-type") == "application/json", answer
    assert answer.header("server") == "gwproxy", answer
    assert re.fullmatch(r"req_[0-9a-f]{24}", answer.header("x-request-id") or ""), answer
    assert (answer.header("www-authenticate") is not None) == (status == 401), answer
    assert CANARY.encode() not in answer.body, answer


async def refused(
    port: int,
    data: bytes,
    status: int,
    code: str | None,
    *,
    closes: bool = False,
    param: str | None = None,
) -> Answered:
    """Send `data` and see it refused in just this way, on a connection that ends or goes on."""
    async with connect(port) as peer:
        peer.send(data)
        answer = await peer.answer()
        assert_refusal(answer, status, code, param)
        assert answer.header("connection") == ("close" if closes else None), answer
        if closes:
            assert await peer.rest() == b""
        else:
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
        return answer


async def assert_unharmed(front: Front, upstream: Upstream) -> None:
    """Nothing reached the upstream, the next caller is served, and the log keeps its secrets."""
    assert upstream.received == []
    async with connect(front.port) as peer:
        peer.send(post(json.dumps(chat()).encode(), key=front.key))
        answer = await peer.answer()
    assert answer.status == 200
    written = await logged(front, answer)
    for secret in (front.key, front.key[17:49], CANARY, ADMIN_KEY, UPSTREAM_TOKEN):
        assert secret not in written


async def logged(front: Front, answer: Answered) -> str:
    """The log's text, once it has the line of this answer."""
    request_id = answer.header("x-request-id")
    assert request_id is not None
    async with asyncio.timeout(PATIENCE_S):
        while True:
            written = front.gateway.written.getvalue()
            if request_id in written:
                return written
            await asyncio.sleep(0.02)  # the log's thread writes ten times a second
