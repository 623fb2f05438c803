"""A response's head and body as bytes, handed to the client's connection in one write.

aiohttp's own response objects cost about as much CPU as all else that we do for a request: they
are kept for the routes where that does not matter.
"""

import time
from email.utils import formatdate
from typing import Final

import orjson
from aiohttp import web

SERVER: Final = "gwproxy"


class Answer(web.StreamResponse):
    """A 200 whose head we write. Nothing of aiohttp's own response is used.

    `whole` gives a response that the listener sends; `stream` one whose head is sent at once, whose
    body its owner writes, and which `end` ends.
    """

    # Set for each instance; as class attributes they take the place of aiohttp's properties.
    keep_alive: bool = True
    status: int = 200

    def __init__(self, request: web.BaseRequest) -> None:
        # Not aiohttp's own initialisation: cookies, header tables and compression are not ours.
        self._unsent: bytes = b""
        self.keep_alive = request.keep_alive
        self.in_chunks = False

    @classmethod
    def whole(cls, request: web.BaseRequest, fields: str, body: bytes) -> "Answer":
        """`fields` are header lines, each with its CR LF."""
        answer = cls(request)
        answer._unsent = answer._head(request, f"{fields}Content-Length: {len(body)}\r\n") + body
        return answer

    @classmethod
    def stream(cls, request: web.BaseRequest, fields: str) -> "Answer":
        answer = cls(request)
        answer.in_chunks = request.version >= (1, 1)
        if answer.in_chunks:
            fields += "Transfer-Encoding: chunked\r\n"
        else:
            # HTTP/1.0 knows no chunks: the body ends with the connection.
            answer.keep_alive = False
        answer._unsent = answer._head(request, fields)
        answer.send(request)
        return answer

    def end(self, request: web.BaseRequest) -> None:
        """The stream's body is complete."""
        if self.in_chunks:
            self._unsent = b"0\r\n\r\n"
            self.send(request)

    def send(self, request: web.BaseRequest) -> None:
        """What has not been sent yet, if anything."""
        if not self._unsent:
            return
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        # What tells that a response has begun, so that no second one is written after it.
        request.writer.output_size += len(self._unsent)
        transport.write(self._unsent)
        self._unsent = b""

    def _head(self, request: web.BaseRequest, fields: str) -> bytes:
        if not self.keep_alive:
            fields += "Connection: close\r\n"
        elif request.version < (1, 1):
            fields += "Connection: keep-alive\r\n"
        head = f"HTTP/1.1 200 OK\r\nServer: {SERVER}\r\nDate: {_date()}\r\n{fields}\r\n"
        return head.encode("latin-1")


def json_answer(value: object, request_id: str, *, degraded: bool = False) -> web.Response:
    """A small answer of our own, on the public routes that call no model."""
    return web.Response(
        body=orjson.dumps(value),
        headers={
            "Content-Type": "application/json",
            "Cache-Control": "no-store",
            "Server": SERVER,
            "x-request-id": request_id,
            "x-gateway-mode": "degraded" if degraded else "normal",
        },
    )


_second = 0
_text = ""


def _date() -> str:
    """The time as HTTP writes it (RFC 9110, 5.6.7), formatted once a second."""
    global _second, _text
    now = int(time.time())
    if now != _second:
        _second, _text = now, formatdate(now, usegmt=True)
    return _text
