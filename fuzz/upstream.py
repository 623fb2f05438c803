"""Whatever bytes an upstream answers with, whole or in pieces: nothing is raised into the event
loop, the exchange hears a head at most once, its body after it, its end exactly once and nothing
behind it, and it hears the same in either case. No header that is passed on can break ours, and an
error of the upstream is told as one of ours."""

from typing import Any, cast

from fuzz.cuts import seeded, split
from gwproxy.core.upstream_words import classify, passed_on, to_error
from gwproxy.proxy.upstream import Connection, Failure, Pool

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-ratelimit-limit: 9\r\n"
_ANSWERS = [
    _HEAD + b"Content-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n\r\n",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nx: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + _HEAD + b"Connection: close\r\n\r\n{}",
    b'HTTP/1.0 429 No\r\nretry-after: 7\r\n\r\n{"error":{"message":"a","code":1}}',
    b"HTTP/1.1 401 No\r\nContent-Length: 51\r\n\r\n"
    b'{"success":false,"error":[{"code":2009,"message":""}]}',
    b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\nab",
    b"HTTP/1.1 302 Go\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
]
SEEDS = [seeded(answer) for answer in _ANSWERS]


def check(data: bytes) -> None:
    pieces, whole = split(data)
    heard = hear([whole] if whole else [])
    assert heard == hear(pieces)
    assert heard == hear([whole[at : at + 1] for at in range(len(whole))])
    for name, value in passed_on(heard.headers).items():
        assert "\r" not in name + value and "\n" not in name + value and "\0" not in name + value
    if heard.status >= 400:
        error = to_error(classify(heard.status, heard.headers, heard.body, (), 0.0))
        assert error.status >= 400 and error.status not in (401, 403)


class Heard:
    """An exchange that remembers what it was told, and insists on the order of it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ends: list[Failure | None] = []

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        assert not self.status and not self.ends
        self.status, self.headers = status, dict(headers)

    def on_body(self, data: bytes) -> None:
        assert self.status and data and not self.ends
        self.body += data

    def on_end(self, failure: Failure | None) -> None:
        assert not self.ends
        assert failure is not None or self.status >= 200
        self.ends.append(failure)

    def tick(self, now: float) -> None:
        raise AssertionError("nobody's clock runs here")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Heard) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Heard({self.status}, {self.headers}, {self.body!r}, {self.ends})"


class _Wire:
    """The transport, as far as a connection touches it."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None: ...

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


class _Pool:
    def __init__(self) -> None:
        self.active: set[Any] = set()
        self.idle: list[Any] = []

    def now(self) -> float:
        return 0.0

    def release(self, connection: Connection) -> None:
        self.idle.append(connection)

    def forget(self, connection: Connection) -> None: ...


def hear(pieces: list[bytes]) -> Heard:
    """What an exchange hears of an answer in these pieces, after which the upstream hangs up."""
    wire, pool, heard = _Wire(), _Pool(), Heard()
    connection = Connection(cast(Pool, pool))
    connection.connection_made(cast(Any, wire))
    connection.send(heard, b"POST / HTTP/1.1\r\n\r\n", b"")
    for piece in pieces:
        if wire.closed:
            break
        connection.data_received(piece)
    if not wire.closed:
        connection.eof_received()
    connection.connection_lost(None)
    assert len(heard.ends) == 1, heard
    assert not pool.active
    return heard
