"""Connections to the upstream: reused, given up, protected; and what of HTTP is taken from one."""

import asyncio
import datetime
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme

from gwproxy.proxy.upstream import HEAD_LIMIT, Origin
from tests.conftest import Front, StartGateway
from tests.harness import ANSWER, Received, Upstream, Wire, answer_hello, chat
from tests.scene import (
    OK,
    asked,
    assert_nothing_left,
    in_chunks,
    metric,
    pools,
    sends,
    stay_silent,
    until,
)

BODY = json.dumps(ANSWER).encode()
JSON = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
WHOLE = OK + JSON + LENGTH + b"\r\n" + BODY


async def status_of(front: Front) -> int:
    response = await front.chat(chat())
    if response.status == 200:
        assert await response.json() == ANSWER
    else:
        assert (await response.json())["error"]["code"] == "all_providers_failed"
    status: int = response.status
    return status


# -- keep-alive ----------------------------------------------------------------------------------


async def test_requests_one_by_one_share_a_connection(front: Front, upstream: Upstream) -> None:
    for stream in (False, True, False, True, False):
        response = await front.chat(chat(stream))
        assert response.status == 200
        await response.read()
    assert upstream.connections == 1


async def test_the_connection_used_last_goes_first(front: Front, upstream: Upstream) -> None:
    gates = [asyncio.Event(), asyncio.Event()]

    def held(gate: asyncio.Event) -> Callable[[Wire, Received], Any]:
        async def script(wire: Wire, received: Received) -> None:
            await gate.wait()
            await wire.send(WHOLE)

        return script

    upstream.queue = [held(gate) for gate in gates]
    async with asyncio.TaskGroup() as group:
        first = group.create_task(status_of(front))
        await until(lambda: len(upstream.received) == 1)
        second = group.create_task(status_of(front))
        await until(lambda: len(upstream.received) == 2)
        gates[1].set()
        assert await second == 200
        gates[0].set()
        assert await first == 200
    for _ in range(3):
        assert await status_of(front) == 200
    assert [received.connection for received in upstream.received] == [1, 2, 1, 1, 1]


async def test_an_idle_connection_is_closed_before_the_upstream_does_it(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__IDLE_CONNECTION_S="5")
    assert await status_of(front) == 200
    [pool] = pools(front)
    pool.tick(pool.now() + 4)
    assert upstream.open == 1
    pool.tick(pool.now() + 6)
    await until(lambda: upstream.open == 0)
    assert await status_of(front) == 200
    assert upstream.connections == 2


async def test_a_connection_that_the_upstream_closed_is_not_used_again(
    front: Front, upstream: Upstream
) -> None:
    upstream.queue = [sends(WHOLE, then=Wire.hang_up)]
    assert await status_of(front) == 200
    await until(lambda: upstream.open == 0)
    [pool] = pools(front)
    await until(lambda: not pool._idle)
    assert await status_of(front) == 200


@pytest.mark.parametrize("end", [Wire.reset, Wire.hang_up], ids=["reset", "closed"])
async def test_a_connection_hung_up_at_the_moment_of_the_request_is_replaced(
    front: Front, upstream: Upstream, end: Callable[[Wire], None]
) -> None:
    upstream.queue = [answer_hello, sends(then=end)]
    assert await status_of(front) == 200
    assert await status_of(front) == 200
    assert [received.connection for received in upstream.received] == [1, 1, 2]
    line = await front.gateway.request_line(least=2)
    assert (line["outcome"], line["source"]) == ("completed", "provider")
    assert [attempt["status"] for attempt in line["attempts"]] == [200]
    # What the dead connection was sent is not charged a second time.
    assert line["tokens"]["input"] == ANSWER["usage"]["prompt_tokens"]


async def test_a_request_is_sent_once_more_and_not_twice(front: Front, upstream: Upstream) -> None:
    upstream.queue = [answer_hello, sends(then=Wire.reset), sends(then=Wire.reset)]
    assert await status_of(front) == 200
    assert await status_of(front) == 502
    assert len(upstream.received) == 3


async def test_a_reset_of_a_fresh_connection_is_final(front: Front, upstream: Upstream) -> None:
    upstream.script = sends(then=Wire.reset)
    assert await status_of(front) == 502
    assert len(upstream.received) == 1
    line = await front.gateway.request_line()
    assert line["error_type"] == "provider_connect"
    assert [attempt["reason"] for attempt in line["attempts"]] == ["reset"]
    assert (line["outcome"], line["source"]) == ("unknown", "estimated")


async def test_a_reset_that_comes_late_is_final(front: Front, upstream: Upstream) -> None:
    """An upstream that had the request for more than a second may be working on it."""
    [pool] = pools(front)
    now = pool.now

    async def later(wire: Wire, received: Received) -> None:
        pool.now = lambda: now() + 1.1
        wire.reset()

    upstream.queue = [answer_hello, later]
    assert await status_of(front) == 200
    assert await status_of(front) == 502
    assert len(upstream.received) == 2


async def test_a_reset_after_the_first_byte_is_final(front: Front, upstream: Upstream) -> None:
    upstream.queue = [answer_hello, sends(b"HTTP/1.1 2", then=Wire.hang_up)]
    assert await status_of(front) == 200
    assert await status_of(front) == 502
    assert len(upstream.received) == 2
    line = await front.gateway.request_line(least=2)
    assert line["attempts"][0]["reason"] == "garbage"


# -- HTTP as upstreams speak it ------------------------------------------------------------------

SOUND = {
    "a length": (WHOLE, True),
    "chunks": (
        OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n" + in_chunks([BODY[:9], BODY[9:]]),
        True,
    ),
    "chunks with extensions and a trailer": (
        OK
        + JSON
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + in_chunks([BODY]).replace(b"\r\n", b";a=b\r\n", 1)[:-2]
        + b"x-request-id: late\r\n\r\n",
        True,
    ),
    "Connection: close": (WHOLE.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), False),
    "HTTP/1.0": (WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0", 1), False),
    "100 Continue before": (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, True),
    "103 Early Hints before": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + WHOLE, True),
    "junk after": (WHOLE + b"junk", False),
    "a second answer after": (WHOLE + WHOLE, False),
    "junk after the last word": (
        WHOLE.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"junk",
        False,
    ),
    "names in capitals": (WHOLE.replace(b"Content-", b"CONTENT-"), True),
    "an encoding that is none": (
        WHOLE.replace(b"\r\n", b"\r\nContent-Encoding: identity\r\n", 1),
        True,
    ),
}


async def test_what_is_sound_http_is_understood(front: Front, upstream: Upstream) -> None:
    for case, (answer, reusable) in SOUND.items():
        for pieces in ([answer], [answer[at : at + 1] for at in range(len(answer))]):
            upstream.received.clear()
            upstream.queue = [sends(*pieces)]
            response = await front.chat(chat())
            assert (response.status, await response.read()) == (200, BODY), case
            assert "x-upstream-request-id" not in response.headers, case  # a trailer is no header
            assert await status_of(front) == 200, case
            first, second = (received.connection for received in upstream.received)
            assert (first == second) is reusable, case


BROKEN = {
    "nothing": (b"", "reset"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "garbage"),
    "half a head": (OK + b"Content-Type: appl", "garbage"),
    "half a body": (WHOLE[:-5], "truncated"),
    "half a chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc", "truncated"),
    "a length and chunks": (
        OK + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + in_chunks([BODY]),
        "garbage",
    ),
    "chunks and a length": (
        OK + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + in_chunks([BODY]),
        "garbage",
    ),
    "two lengths": (OK + LENGTH + LENGTH + b"\r\n" + BODY, "garbage"),
    "a negative length": (OK + b"Content-Length: -1\r\n\r\n", "garbage"),
    "a chunk size that is none": (
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        "truncated",
    ),
    "a transfer coding that nobody asked for": (
        OK + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
        "truncated",
    ),
    "a NUL in a header": (OK + b"openai-x: a\0b\r\n" + LENGTH + b"\r\n" + BODY, "garbage"),
    "a header in two lines": (OK + b"openai-x: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY, "garbage"),
    "a bare CR in a header": (OK + b"openai-x: a\rb\r\n" + LENGTH + b"\r\n" + BODY, "garbage"),
    "no answer's status": (b"HTTP/1.1 42 What\r\n\r\n", "garbage"),
    "another protocol": (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        "garbage",
    ),
    "an interim answer with a body": (
        b"HTTP/1.1 103 Hints\r\nContent-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE + WHOLE,
        "garbage",
    ),
    "an endless head": (OK + b"a: b\r\n" * (HEAD_LIMIT // 5), "garbage"),
    "an endless line": (OK + b"a: " + b"b" * (HEAD_LIMIT + 9), "garbage"),
    "interim answers without end": (b"HTTP/1.1 100 Continue\r\n\r\n" * 12_000, "garbage"),
    "a head too large": (
        OK + b"".join(b"x-%d: %b\r\n" % (n, b"y" * 4000) for n in range(70)) + LENGTH + b"\r\n",
        "garbage",
    ),
    "an endless trailer": (
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * (HEAD_LIMIT // 5),
        "truncated",
    ),
}


async def test_what_is_broken_http_is_the_upstreams_failure(
    front: Front, upstream: Upstream
) -> None:
    for number, (case, (answer, reason)) in enumerate(BROKEN.items(), start=1):
        upstream.queue = [sends(*answer.split(b"\x01"), then=Wire.hang_up)]
        assert await status_of(front) == 502, case
        line = await front.gateway.request_line(least=number)
        assert [attempt["reason"] for attempt in line["attempts"]] == [reason], case
        assert line["error_type"].startswith("provider_"), case
        await assert_nothing_left(front, upstream)


async def test_an_endless_head_is_cut_off_and_not_gathered(
    front: Front, upstream: Upstream
) -> None:
    sent = 0

    async def script(wire: Wire, received: Received) -> None:
        nonlocal sent
        wire.writer.transport.set_write_buffer_limits(high=0)
        wire.writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024
        )
        await wire.send(OK)
        while True:
            await wire.send(b"x-more: " + b"y" * 10_000 + b"\r\n")
            sent += 10_000

    upstream.script = script
    assert await status_of(front) == 502
    await assert_nothing_left(front, upstream)
    assert sent < 16 * HEAD_LIMIT


NO_COMPLETION = {
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", "garbage"),
    "an empty 200": (OK + b"Content-Length: 0\r\n\r\n", "garbage"),
    "a page": (
        OK + b"Content-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>",
        "garbage",
    ),
    "a list": (OK + JSON + b"Content-Length: 2\r\n\r\n[]", "garbage"),
    "304": (b"HTTP/1.1 304 Not Modified\r\n\r\n", "bad_upstream"),
}


async def test_a_success_that_is_no_completion_is_the_upstreams_failure(
    front: Front, upstream: Upstream
) -> None:
    for number, (case, (answer, reason)) in enumerate(NO_COMPLETION.items(), start=1):
        upstream.queue = [sends(answer)]
        assert await status_of(front) == 502, case
        line = await front.gateway.request_line(least=number)
        assert [attempt["reason"] for attempt in line["attempts"]] == [reason], case
        [failed] = (await front.gateway.lines("All providers failed", number))[-1:]
        assert "check its address" in failed["hint"], case


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed(front: Front, upstream: Upstream, status: int) -> None:
    elsewhere = Upstream()
    await elsewhere.start()
    target = f"{elsewhere.url}/chat/completions"
    upstream.script = sends(
        f"HTTP/1.1 {status} Moved\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    for stream in (False, True):
        response = await front.chat(chat(stream))
        assert response.status == 502
        assert "Location" not in response.headers
        assert target not in await response.text()
    assert elsewhere.connections == 0
    await elsewhere.stop()


async def test_a_compressed_answer_is_the_upstreams_failure(
    front: Front, upstream: Upstream
) -> None:
    for coding in (b"gzip", b"br", b"zstd", b"deflate", b"GZIP"):
        for kind in (b"application/json", b"text/event-stream"):
            head = OK + b"Content-Type: %b\r\nContent-Encoding: %b\r\n" % (kind, coding)
            upstream.queue = [sends(head + b"Content-Length: 4\r\n\r\n\x1f\x8b\x08\0")]
            response = await front.chat(chat(kind != b"application/json"))
            assert response.status == 502, coding
            assert "Content-Encoding" not in response.headers
    assert upstream.received[0].header("accept-encoding") == "identity"
    failed = await front.gateway.lines("All providers failed", 10)
    assert all("compressed" in line["hint"] for line in failed)
    await assert_nothing_left(front, upstream)


async def test_a_cookie_of_the_upstream_is_neither_passed_on_nor_kept(
    front: Front, upstream: Upstream
) -> None:
    cookie = b"\r\nSet-Cookie: session=secret; Path=/\r\n"
    upstream.queue = [sends(WHOLE.replace(b"\r\n", cookie, 1))]
    response = await front.chat(chat())
    assert response.status == 200
    assert "Set-Cookie" not in response.headers
    assert await status_of(front) == 200
    assert [received.header("cookie") for received in upstream.received] == [None, None]


# -- opening a connection ------------------------------------------------------------------------


@pytest_asyncio.fixture
async def closed_port() -> AsyncIterator[int]:
    """A port that nobody listens on, and that nobody else gets."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


async def test_an_upstream_that_refuses_connections_costs_nothing(
    start_gateway: StartGateway, closed_port: int
) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__BASE_URL=f"http://127.0.0.1:{closed_port}/v1")
    for stream in (False, True):
        response = await front.chat(chat(stream))
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "all_providers_failed"
    line = await front.gateway.request_line(least=2)
    assert line["error_type"] == "provider_connect"
    assert line["attempts"][0]["reason"] == "connect"
    assert (line["outcome"], line["cost_nanos"], line["source"]) == ("failed", 0, None)
    await assert_nothing_left(front)


async def test_a_connection_that_does_not_open_in_time_is_given_up(
    start_gateway: StartGateway,
) -> None:
    """A server whose backlog is full answers no SYN; a TLS server may also stay silent."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        front = await start_gateway(
            GWPROXY__UPSTREAM__BASE_URL=f"https://127.0.0.1:{silent.getsockname()[1]}/v1",
            GWPROXY__UPSTREAM__CONNECT_TIMEOUT_S="0.2",
        )
        assert await status_of(front) == 502
        line = await front.gateway.request_line()
        assert line["error_type"] == "provider_timeout"
        assert line["attempts"][0]["reason"] == "connect_timeout"
        assert line["cost_nanos"] == 0
        await assert_nothing_left(front)


async def test_a_client_that_leaves_while_the_connection_opens_costs_nothing(
    start_gateway: StartGateway,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.setblocking(False)
        front = await start_gateway(
            GWPROXY__UPSTREAM__BASE_URL=f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        )
        loop = asyncio.get_running_loop()
        async with asked(front) as peer:
            accepted, _ = await loop.sock_accept(silent)
            with accepted:
                peer.reset()
                line = await front.gateway.request_line()
                accepted.setblocking(False)
                async with asyncio.timeout(5):
                    while await loop.sock_recv(accepted, 4096):
                        pass  # the hello of TLS, and then the end
        assert (line["status"], line["outcome"], line["cost_nanos"]) == (499, "client_left", 0)
        await assert_nothing_left(front)


def test_the_host_header_has_a_port_where_it_is_not_the_schemes_own() -> None:
    assert Origin(True, "a.example", 443).authority == "a.example"
    assert Origin(False, "a.example", 80).authority == "a.example"
    assert Origin(True, "a.example", 80).authority == "a.example:80"
    assert Origin(False, "::1", 8080).authority == "[::1]:8080"
    assert Origin(False, "::1", 80).authority == "[::1]"


# -- TLS -----------------------------------------------------------------------------------------


class Secure:
    """An upstream behind TLS, and the file with its authority's certificate."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca_file))
        self.upstream = Upstream()

    async def start(self, *names: str, **dates: Any) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names, **dates).configure_cert(context)
        # Handshakes that fail are the subject here: asyncio's server would log each of them.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        return await self.upstream.start(ssl=context)


@pytest_asyncio.fixture
async def secure(tmp_path: Path) -> AsyncIterator[Secure]:
    secure = Secure(tmp_path)
    yield secure
    await secure.upstream.stop()


async def test_tls_works_with_the_authority_that_is_configured(
    start_gateway: StartGateway, secure: Secure
) -> None:
    url = await secure.start("127.0.0.1", "localhost")
    for address in (url, url.replace("127.0.0.1", "localhost")):
        front = await start_gateway(
            GWPROXY__UPSTREAM__BASE_URL=address, GWPROXY__UPSTREAM__CA_FILE=str(secure.ca_file)
        )
        assert await status_of(front) == 200
        response = await front.chat(chat(True))
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert (await front.gateway.request_line(least=2))["outcome"] == "completed"
    assert secure.upstream.connections == 2  # one for each gateway


async def test_a_certificate_that_is_not_right_gets_nothing(
    start_gateway: StartGateway, secure: Secure, tmp_path: Path
) -> None:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    right = {"GWPROXY__UPSTREAM__CA_FILE": str(secure.ca_file)}
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    other = {"GWPROXY__UPSTREAM__CA_FILE": str(tmp_path / "other.pem")}
    cases: list[tuple[str, dict[str, str], list[str], dict[str, Any]]] = [
        ("a private authority that is not configured", {}, ["127.0.0.1"], {}),
        ("another authority", other, ["127.0.0.1"], {}),
        ("another host's name", right, ["other.example"], {}),
        ("another address", right, ["127.0.0.2"], {}),
        ("expired", right, ["127.0.0.1"], {"not_before": past, "not_after": past}),
    ]
    for case, environ, names, dates in cases:
        if dates:
            dates["not_after"] = past + datetime.timedelta(days=1)
        url = await secure.start(*names, **dates)
        front = await start_gateway(GWPROXY__UPSTREAM__BASE_URL=url, **environ)
        for stream in (False, True):
            response = await front.chat(chat(stream))
            assert response.status == 502, case
            assert "certificate" not in await response.text(), case
        line = await front.gateway.request_line(least=2)
        assert line["attempts"][0]["reason"] == "tls", case
        assert (line["error_type"], line["cost_nanos"]) == ("provider_connect", 0), case
        failed = await front.gateway.lines("All providers failed")
        assert "ca_file" in failed[0]["hint"], case
        assert await metric(front, "gwproxy_holds_open") == 0
        await secure.upstream.stop()
    assert secure.upstream.received == []


async def test_old_versions_of_tls_are_not_spoken(
    start_gateway: StartGateway, secure: Secure
) -> None:
    url = await secure.start("127.0.0.1")
    front = await start_gateway(
        GWPROXY__UPSTREAM__BASE_URL=url, GWPROXY__UPSTREAM__CA_FILE=str(secure.ca_file)
    )
    [pool] = pools(front)
    assert pool._tls is not None
    assert pool._tls.minimum_version is ssl.TLSVersion.TLSv1_2
    assert pool._tls.check_hostname and pool._tls.verify_mode is ssl.CERT_REQUIRED


async def test_a_silent_upstream_holds_nothing_of_the_next_request(
    front: Front, upstream: Upstream
) -> None:
    upstream.queue = [stay_silent]
    async with asyncio.TaskGroup() as group:
        silent = group.create_task(front.chat(chat()))
        await until(lambda: len(upstream.received) == 1)
        assert await status_of(front) == 200
        silent.cancel()
    await assert_nothing_left(front, upstream)
