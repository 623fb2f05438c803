"""A request's body, let in only as far as it may come: framing, type, size and time are checked
before a byte of it is parsed, and big bodies are parsed one at a time."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from multidict import istr

from gwproxy.core.errors import (
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)

T = TypeVar("T")

BIG_BYTES = 1024 * 1024
"""From here on parsing takes milliseconds of everybody's time, so it is done in turn."""

_JSON = "application/json"
# `istr` has its casefold done already.
_TYPE = istr("Content-Type")
_ENCODING = istr("Content-Encoding")
_EXPECT = istr("Expect")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Intake:
    """Reads bodies of at most `max_body_bytes`, each within `body_timeout_s`."""

    def __init__(self, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._turn = asyncio.Lock()

    async def read(
        self, request: web.BaseRequest, parse: Callable[[bytes], T], *, optional: bool = False
    ) -> T:
        """The parsed body of a request whose caller is known; `optional`: there may be none."""
        if optional and not request.body_exists:
            return parse(b"")
        headers = request.headers
        kind = headers.get(_TYPE, "")
        if kind != _JSON and kind.partition(";")[0].strip().lower() != _JSON:
            # Also keeps out what a browser sends without asking its user first.
            raise UnsupportedMediaType("The Content-Type must be application/json.")
        if _ENCODING in headers and headers[_ENCODING].lower() != "identity":
            raise UnsupportedMediaType("Compressed request bodies are not accepted.")
        length = request.content_length
        if length is not None and length > self._max_body_bytes:
            raise self._too_large()
        expected = _EXPECT in headers and _continue_expected(request)
        content = request.content
        if content.is_eof():
            body = _taken(content)  # it came with its head, as nearly all do
        else:
            if expected and request.transport is not None:
                # Only now that the caller is known: whoever is not gets his answer instead.
                request.transport.write(_CONTINUE)
            body = await self._wait_for(request)
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        if len(body) <= BIG_BYTES:
            return parse(body)
        async with self._turn:
            return parse(body)

    async def _wait_for(self, request: web.BaseRequest) -> bytes:
        """The rest of the body, as it comes. Not `request.read()`: that waits without an end."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                async for part in request.content.iter_any():
                    size += len(part)
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    parts.append(part)
        except TimeoutError:
            raise RequestTimeout(
                f"The body did not arrive within {self._body_timeout_s:g} seconds.", close=True
            ) from None
        return b"".join(parts)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The body is larger than the limit of {self._max_body_bytes} bytes.", close=True
        )


def _taken(content: StreamReader) -> bytes:
    """All that a reader at its end holds. One piece is taken as it is: to read it is five calls
    deep, for what may have to be resumed and, with so little in it, was never paused."""
    if (
        content is not EMPTY_PAYLOAD
        and len(content._buffer) == 1
        and content._size < content._low_water
        and content._http_chunk_splits is None
        and content._exception is None
    ):
        return content._buffer.popleft()
    return content.read_nowait()


def _continue_expected(request: web.BaseRequest) -> bool:
    """RFC 9110, 10.1.1: 100-continue is the one expectation there is, and HTTP/1.0 has none."""
    if request.version < (1, 1):
        return False
    expectation = ", ".join(request.headers.getall(_EXPECT))
    if expectation.strip().lower() != "100-continue":
        raise InvalidRequest(
            "The one expectation met here is 100-continue.", status=417, code="expectation_failed"
        )
    return True
