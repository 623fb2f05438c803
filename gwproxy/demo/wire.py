"""The bytes of one answer on one connection: heads, chunks, pieces, and every rude way of ending.

aiohttp reads the requests; what goes back is written here, straight to the transport, because a
demo of broken servers needs each byte under its own hand.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import time
import zlib
from collections.abc import Iterable
from email.utils import formatdate
from enum import Enum
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

Headers = Iterable[tuple[str, str]]

_RESET_AT_ONCE: Final = struct.pack("ii", 1, 0)
_LAST_CHUNK: Final = b"0\r\n\r\n"
_DELIVERY_WITHIN_S: Final = 2.0
_DELIVERY_LOOK_S: Final = 0.001


class ClientLeft(ConnectionError):
    """Nobody is there to write to."""


class Framing(Enum):
    CHUNKED = "chunked"
    LENGTH = "length"
    CLOSE = "close"


class Spoken(web.StreamResponse):
    """What aiohttp is given in the end: an answer that has been sent already."""

    def __init__(self, reusable: bool) -> None:
        super().__init__()
        self._reusable = reusable

    @property
    def keep_alive(self) -> bool:
        return self._reusable

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes | bytearray | memoryview = b"") -> None:
        return None


class Wire:
    """One answer being written. Every write raises ClientLeft when the connection is gone."""

    def __init__(self, request: web.BaseRequest) -> None:
        transport = request.transport
        if transport is None:
            raise ClientLeft
        self._transport = transport
        self._writer = request.writer
        self._framing = Framing.LENGTH
        self._deflate: zlib._Compress | None = None
        self.reusable = request.keep_alive
        self.http_1_1 = request.version >= (1, 1)
        self.piece_bytes = 0
        """The body goes out in pieces of so many bytes; 0 leaves it whole."""

    async def interim(self) -> None:
        await self.write(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n")

    async def answer(self, status: int, headers: Headers, body: bytes, gzip: bool = False) -> None:
        """A whole answer in one write, unless it is to go out in pieces."""
        headers = list(headers)
        if gzip:
            body = _gzip(body)
            headers.append(("content-encoding", "gzip"))
        if not any(name.lower() == "content-length" for name, _ in headers):
            headers.append(("content-length", str(len(body))))
        head = self._head(status, headers)
        if not self.piece_bytes:
            await self.write(head + body)
            return
        await self.write(head)
        await self.send(body)

    async def start(
        self, status: int, headers: Headers, framing: Framing, gzip: bool = False
    ) -> None:
        """The head of an answer whose body follows in `send`s."""
        headers = list(headers)
        if framing is Framing.CHUNKED and not self.http_1_1:
            framing = Framing.CLOSE
        if framing is Framing.CHUNKED:
            headers.append(("transfer-encoding", "chunked"))
        if framing is Framing.CLOSE:
            self.reusable = False
            headers.append(("connection", "close"))
        if gzip:
            self._deflate = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
            headers.append(("content-encoding", "gzip"))
        self._framing = framing
        await self.write(self._head(status, headers))

    def raw(self) -> None:
        """No head and no frames: what is sent next is the answer, byte for byte."""
        self._framing = Framing.LENGTH

    async def send(self, data: bytes) -> None:
        """Some of the body, in one write or in its pieces."""
        if self._deflate is not None:
            data = self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        step = self.piece_bytes or len(data)
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            if self._framing is Framing.CHUNKED:
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            await self.write(piece)

    async def finish(self) -> None:
        """The clean end of a body that was started."""
        if self._deflate is not None:
            tail, self._deflate = self._deflate.flush(), None
            await self.send(tail)
        if self._framing is Framing.CHUNKED:
            await self.write(_LAST_CHUNK)

    async def write(self, data: bytes) -> None:
        # One turn of the loop: a client that has left is noticed here, and no two writes meet in
        # one buffer as long as the kernel takes them. It comes before the write: what was written
        # is noted by the caller before a client that has read it can end the answer by leaving.
        await asyncio.sleep(0)
        if self._transport.is_closing():
            raise ClientLeft
        self._transport.write(data)
        await self._writer.drain()

    async def reset(self) -> None:
        """Ends the connection with a TCP reset, behind everything written so far."""
        await self._delivered()
        with contextlib.suppress(OSError), _dup(self._transport) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_ONCE)
        self.abort()

    def close(self) -> None:
        """Ends the connection in order, wherever the body stands."""
        self.reusable = False
        self._transport.close()

    def abort(self) -> None:
        self.reusable = False
        self._transport.abort()

    async def stall(self) -> None:
        """Says nothing more until the client has had enough; then this is cancelled."""
        await asyncio.Event().wait()

    async def _delivered(self) -> None:
        """Returns when the peer's kernel has everything: a reset discards what is still ours."""
        until = time.monotonic() + _DELIVERY_WITHIN_S
        while time.monotonic() < until and not self._transport.is_closing():
            if self._transport.get_write_buffer_size() == 0 and _unsent_bytes(self._transport) == 0:
                return
            await asyncio.sleep(_DELIVERY_LOOK_S)

    def _head(self, status: int, headers: Headers) -> bytes:
        try:
            reason = HTTPStatus(status).phrase
        except ValueError:
            reason = "Unknown"
        lines = [f"HTTP/1.1 {status} {reason}", f"date: {formatdate(usegmt=True)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if not self.reusable and "connection: close" not in lines:
            lines.append("connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _gzip(body: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return deflate.compress(body) + deflate.flush()


def _dup(transport: asyncio.Transport) -> socket.socket:
    """The transport's socket once more: event loops hide the real one."""
    own = transport.get_extra_info("socket")
    return socket.fromfd(own.fileno(), own.family, own.type)


def _unsent_bytes(transport: asyncio.Transport) -> int:
    try:
        with _dup(transport) as sock:
            answer = fcntl.ioctl(sock, termios.TIOCOUTQ, struct.pack("i", 0))
    except OSError:
        return 0
    left: int = struct.unpack("i", answer)[0]
    return left
