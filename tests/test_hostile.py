"""Attacks over plain sockets: requests inside requests, protocols inside the protocol, storms of
clients that leave, and what of all that may be read in the log afterwards (nothing)."""

import asyncio
import logging
import os
from collections.abc import Iterator

import pytest

from gwproxy.log import capture_libraries
from tests.conftest import Front, StartGateway
from tests.harness import Received, Upstream, Wire, delta
from tests.raw import (
    CANARY,
    CHAT,
    assert_refusal,
    assert_unharmed,
    connect,
    get,
    head,
    logged,
    post,
    prompt,
    refused,
)

JSON = "Content-Type: application/json"
BODY = prompt()
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(autouse=True)
def captured(front: Front) -> Iterator[None]:
    """What libraries log goes to the gateway's log, as it does when it serves."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    capture_libraries(front.gateway.log)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def chat_head(*lines: str, key: str, version: str = "HTTP/1.1", host: bool = True) -> bytes:
    return head(
        JSON, f"X-Hidden: {CANARY}", *lines, key=key, line=f"POST {CHAT} {version}", host=host
    )


def malformed(key: str) -> dict[str, bytes]:
    """Requests on whose bounds two readers could disagree."""

    def one(*lines: str, body: bytes = BODY) -> bytes:
        return chat_head(*lines, key=key) + body

    ordinary = one(LENGTH)
    return {
        "both lengths": one(CHUNKED, LENGTH, body=CHUNKS),
        "both lengths, the other way": one(LENGTH, CHUNKED, body=CHUNKS),
        "the same length twice": one(LENGTH, LENGTH),
        "two lengths": one(LENGTH, "Content-Length: 3"),
        "a list of lengths": one(f"{LENGTH}, {len(BODY)}"),
        "a signed length": one(f"Content-Length: +{len(BODY)}"),
        "a negative length": one("Content-Length: -1"),
        "a hexadecimal length": one("Content-Length: 0x10"),
        "an empty length": one("Content-Length: "),
        "a length beyond 64 bits": one("Content-Length: 99999999999999999999999"),
        "a length with a unit": one(f"{LENGTH} bytes"),
        "chunked twice": one("Transfer-Encoding: chunked, chunked", body=CHUNKS),
        "chunked in two lines": one(CHUNKED, CHUNKED, body=CHUNKS),
        "chunked, then something": one("Transfer-Encoding: chunked, identity", body=CHUNKS),
        "identity": one("Transfer-Encoding: identity"),
        "a word that ends in chunked": one("Transfer-Encoding: xchunked", body=CHUNKS),
        "two codings in two lines": one("Transfer-Encoding: gzip", CHUNKED, body=CHUNKS),
        "a folded header": one("X-A: b\r\n c", LENGTH),
        "a folded coding": one("Transfer-Encoding:\r\n chunked", body=CHUNKS),
        "bare line feeds": ordinary.replace(b"\r\n", b"\n"),
        "one bare line feed": one("X-A: b\nX-B: c", LENGTH),
        "a bare carriage return": one("X-A: b\rX-B: c", LENGTH),
        "a zero byte in a value": one("X-A: b\0c", LENGTH),
        "a zero byte in a name": one("X-\0A: b", LENGTH),
        "a control character in a name": one("X-\x01A: b", LENGTH),
        "a space before the colon": one(f"Content-Length : {len(BODY)}"),
        "a tab before the colon": one("Transfer-Encoding\t: chunked", body=CHUNKS),
        "a space before the first name": one(" X-A: b", LENGTH),
        "no colon": one("X-A", LENGTH),
        "no name": one(": b", LENGTH),
        "no host": chat_head(LENGTH, key=key, host=False) + BODY,
        "two hosts": one("Host: other", LENGTH),
        "two media types": one("Content-Type: text/plain", LENGTH),
        "a method of lower case": ordinary.replace(b"POST", b"post"),
        "an unknown method": ordinary.replace(b"POST", b"STEAL"),
        "a tab for a space": ordinary.replace(b"POST ", b"POST\t"),
        "no path": ordinary.replace(CHAT.encode() + b" ", b""),
        "a path with a space": ordinary.replace(b"/v1/chat", b"/v1/ chat"),
        "a path with raw bytes": ordinary.replace(b"/v1/chat", b"/v1/\xe9chat"),
        "another version of 1": ordinary.replace(b"HTTP/1.1", b"HTTP/1.2"),
        "no protocol": ordinary.replace(b"HTTP/1.1", b"HTPT/1.1"),
        "words after the version": ordinary.replace(b"HTTP/1.1", b"HTTP/1.1 " + CANARY.encode()),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + CANARY.encode() + b"\r\n\r\n",
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + CANARY.encode(),
        "a body alone": BODY + b"\r\n\r\n",
        "SMTP": b"EHLO " + CANARY.encode() + b"\r\n\r\n",
        "chunks of no size": one(CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"),
        "chunks of a negative size": one(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"),
        "chunks of a size beyond 64 bits": one(CHUNKED, body=b"f" * 17 + b"\r\n" + BODY),
        "chunks with an 0x": one(CHUNKED, body=b"0x50\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "chunks with line feeds": one(CHUNKED, body=CHUNKS.replace(b"\r\n", b"\n")),
        "a chunk longer than it says": one(CHUNKED, body=b"5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    }


async def test_framing_in_doubt_is_refused_and_ends_the_connection(
    front: Front, upstream: Upstream
) -> None:
    behind = post(BODY, key=front.key)

    async def check(name: str, data: bytes, rest: bytes) -> None:
        try:
            await refused(front.port, data + rest, 400, "bad_request", closes=True)
        except AssertionError as error:
            raise AssertionError(name) from error

    async with asyncio.TaskGroup() as group:
        for name, data in malformed(front.key).items():
            group.create_task(check(name, data, b""))
            # A request behind it must not be answered, far less executed.
            group.create_task(check(name, data, behind))
    await assert_unharmed(front, upstream)
    lines = await front.gateway.lines()
    assert not [line for line in lines if line["level"] == "error"]
    assert not [line for line in lines if line["event"] == "library message"]
    told = [line for line in lines if line.get("error_code") == "bad_request"]
    assert len(told) == 2 * len(malformed("")), "each is counted and logged, without its content"


async def test_codings_and_versions_that_are_not_spoken_end_the_connection(
    front: Front, upstream: Upstream
) -> None:
    cases = [
        (chat_head("Transfer-Encoding: gzip, chunked", key=front.key) + CHUNKS, 501),
        (chat_head("Transfer-Encoding: deflate, chunked", key=front.key) + CHUNKS, 501),
        (chat_head("Transfer-Encoding: ", LENGTH, key=front.key) + BODY, 501),
        (chat_head(LENGTH, key=front.key, version="HTTP/2.0") + BODY, 505),
        (chat_head(LENGTH, key=front.key, version="HTTP/0.9") + BODY, 505),
        (b"GET /health\r\n\r\n", 505),
    ]
    for data, status in cases:
        await refused(front.port, data, status, "bad_request", closes=True)
    # HTTP/1.0 has no chunks (RFC 9112, 6.1): its connection ends without a word.
    async with connect(front.port) as peer:
        peer.send(chat_head(CHUNKED, "Connection: keep-alive", key=front.key, version="HTTP/1.0"))
        peer.send(CHUNKS + get("/health"))
        assert (await peer.answer()).status == 501
        assert await peer.rest() == b""
    await assert_unharmed(front, upstream)


async def test_no_tunnel_is_opened_and_no_other_protocol_spoken(
    front: Front, upstream: Upstream
) -> None:
    websocket = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    cleartext = ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMA")
    behind = post(BODY, key=front.key)
    for data in (
        get("example.org:443", key=front.key, method="CONNECT"),
        get("127.0.0.1:22", method="CONNECT"),
        get("/v1/models", *websocket, key=front.key),
        get("/health", *websocket),
        post(BODY, *websocket, key=front.key),
        get("/health", *cleartext),
        post(BODY, *cleartext, key=front.key),
    ):
        for rest in (b"", behind, behind[:20]):
            await refused(front.port, data + rest, 400, "bad_request", closes=True)
    async with connect(front.port) as peer:
        # Without its `Connection: Upgrade` the header says nothing to us (RFC 9110, 7.8).
        peer.send(get("/health", "Upgrade: h2c") + get("/health"))
        assert (await peer.answer()).status == 200
        assert (await peer.answer()).status == 200
    await assert_unharmed(front, upstream)


async def test_the_rest_of_a_refused_request_is_never_a_request(
    front: Front, upstream: Upstream
) -> None:
    inner = post(BODY, key=front.key)
    early = {
        "no key": head(JSON, "Content-Length: 100000"),
        "a wrong key": head(JSON, "Content-Length: 100000", key=CANARY),
        "too large": head(JSON, "Content-Length: 99999999999", key=front.key),
        "no JSON": head("Content-Type: text/plain", "Content-Length: 100000", key=front.key),
        "compressed": head(JSON, "Content-Encoding: gzip", "Content-Length: 100000", key=front.key),
        "no route": head(JSON, "Content-Length: 100000", line="POST /nothing HTTP/1.1"),
        "a wrong method": head(JSON, "Content-Length: 100000", line="PUT /v1/models HTTP/1.1"),
        "chunked, no key": head(JSON, CHUNKED) + b"ffff\r\n",
        "to the end of its body": head(JSON, f"Content-Length: {len(inner)}"),
    }

    async def check(name: str, data: bytes) -> None:
        async with connect(front.port) as peer:
            peer.send(data)
            answer = await peer.answer()
            assert 400 <= answer.status < 500, name
            assert answer.header("connection") == "close", name
            for _ in range(3):  # the body comes after its answer, and looks like requests
                await peer.flood(inner)
                await asyncio.sleep(0.05)
            assert await peer.rest() == b"", name

    async with asyncio.TaskGroup() as group:
        for name, data in early.items():
            group.create_task(check(name, data))
    await assert_unharmed(front, upstream)


async def test_a_body_that_looks_like_a_request_is_a_body(front: Front, upstream: Upstream) -> None:
    inner = get("/v1/models", key=front.key)
    for data in (
        post(inner, key=front.key),
        head(JSON, CHUNKED, key=front.key) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner),
    ):
        await refused(front.port, data, 400, "invalid_json")
    # A GET's body is read to its end and thrown away, or the connection ends.
    async with connect(front.port) as peer:
        peer.send(head(f"Content-Length: {len(inner)}", line="GET /health HTTP/1.1") + inner)
        peer.send(get("/nothing"))
        assert (await peer.answer()).status == 200
        assert (await peer.answer()).status == 404
    await assert_unharmed(front, upstream)


async def test_headers_of_a_client_reach_the_upstream_in_no_way(
    front: Front, upstream: Upstream
) -> None:
    hostile = (
        "cf-aig-authorization: Bearer mine",
        "cf-aig-metadata: {}",
        "cf-aig-skip-cache: false",
        "Cookie: a=b",
        "Proxy-Authorization: Basic YTpi",
        "Forwarded: for=1.2.3.4",
        "X-Forwarded-For: 1.2.3.4",
        "x-request-id: forged",
        f"X-Hidden: {CANARY}",
        "Connection: authorization, cf-aig-authorization, content-length",
        "Accept-Encoding: gzip",
        "User-Agent: mallory",
    )
    async with connect(front.port) as peer:
        peer.send(post(BODY, *hostile, key=front.key))
        answer = await peer.answer()
    assert answer.status == 200
    assert answer.header("x-request-id") != "forged"
    sent = upstream.received[0]
    for word in ("mine", "a=b", "YTpi", "1.2.3.4", "forged", CANARY, "mallory", "gzip", front.key):
        assert word not in sent.head.decode(), word
    assert sent.header("authorization") == "Bearer upstream-token-that-nobody-may-see"
    assert CANARY not in await logged(front, answer)


async def test_what_libraries_log_of_a_bad_request_holds_nothing_of_it(
    front: Front, upstream: Upstream
) -> None:
    log = logging.getLogger("aiohttp.server")
    try:
        raise ValueError(CANARY)
    except ValueError:
        log.exception("Error handling request from %s", CANARY)
    lines = await front.gateway.lines("library message")
    assert lines[-1]["exception"] == "ValueError"
    async with asyncio.TaskGroup() as group:
        for data in malformed(front.key).values():
            group.create_task(refused(front.port, data, 400, "bad_request", closes=True))
    await assert_unharmed(front, upstream)


# -- storms --------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_storm_of_clients_that_leave_leaves_nothing_behind(
    front: Front, upstream: Upstream
) -> None:
    async def endless(wire: Wire, received: Received) -> None:
        await wire.start()
        while not wire.writer.is_closing():
            await wire.chunk(delta("more and more "))
            await asyncio.sleep(0.01)

    async def silent(wire: Wire, received: Received) -> None:
        await wire.reader.read()

    async with connect(front.port) as peer:  # so that what is opened once is open
        peer.send(post(BODY, key=front.key))
        assert (await peer.answer()).status == 200
    await asyncio.sleep(0.1)
    upstream.received.clear()
    files, tasks = open_files(), len(asyncio.all_tasks())
    stream = post(prompt(stream=True), key=front.key)
    whole = post(prompt(), key=front.key)

    async def leave(number: int) -> None:
        async with connect(front.port) as peer:
            match number % 10:
                case 0:
                    pass  # before a word
                case 1:
                    peer.send(stream[: number % 100])
                case 2:
                    peer.send(stream[:-1])  # a byte before the end
                case 3:
                    peer.send(stream)  # at the same time as the request
                    await asyncio.sleep(0)
                case 4:
                    peer.send(whole)
                    await asyncio.sleep(0.05)
                case 5:
                    peer.send(stream)
                    await peer.head()
                case 6 | 7:
                    peer.send(stream)
                    await peer.head()
                    await peer.reader.readexactly(300)
                case 8:
                    peer.send(stream * 3)
                    await peer.head()
                case 9:
                    peer.send(stream)
                    await peer.head()
                    peer.half_close()
                    await asyncio.sleep(0.01)
            peer.reset()

    for script in (endless, silent):
        upstream.script = script
        numbers = [n for n in range(200) if script is endless or n % 10 < 5]
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(leave(number))
    async with asyncio.timeout(5):
        while True:
            if not upstream.open and open_files() <= files and len(asyncio.all_tasks()) <= tasks:
                break
            await asyncio.sleep(0.02)
    for line in await front.gateway.lines("request"):
        if line["route"] == "chat" and line["status"] == 499:
            assert line.get("outcome") in (None, "void", "client_left", "unknown"), line
    assert not [line for line in await front.gateway.lines() if line["level"] == "error"]
    upstream.received.clear()
    upstream.script = type(upstream)().script
    await assert_unharmed(front, upstream)


async def test_silent_connections_do_not_slow_the_others(start_gateway: StartGateway) -> None:
    # Long enough for all of them to have said their part, on a busy machine too.
    front = await start_gateway("[limits]\nheader_timeout_s = 3\n")
    loop = asyncio.get_running_loop()
    peers = []
    for number in range(300):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"POST / HTTP/1.1\r\n"[: number % 16])
        peers.append((reader, writer))
    async with connect(front.port) as peer:
        started = loop.time()
        for _ in range(50):
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
        assert loop.time() - started < 1.5
    async with asyncio.timeout(15):
        for reader, writer in peers:
            assert await reader.read() == b""
            writer.close()


async def test_nothing_of_an_internal_error_reaches_the_client(
    front: Front, upstream: Upstream
) -> None:
    """The deepest body that can be read but not written was such an error once."""
    for levels in (200, 251, 252, 253, 254, 255, 300, 1000):
        nested = b"[" * levels + b"]" * levels
        async with connect(front.port) as peer:
            peer.send(post(prompt(x=0).replace(b'"x": 0', b'"x": ' + nested), key=front.key))
            answer = await peer.answer()
        assert answer.status in (200, 400), levels
        if answer.status == 400:
            assert_refusal(answer, 400, "invalid_json")
    assert not [line for line in await front.gateway.lines() if line["level"] == "error"]
