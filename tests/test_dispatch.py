"""Sending: what leaves for an upstream, which failure moves on to the next, and when none may."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest
import pytest_asyncio

from gwproxy.core.chat import ChatRequest
from gwproxy.proxy.relay import Relay
from tests.conftest import Front, StartGateway
from tests.harness import (
    ADMIN_KEY,
    ANSWER,
    DONE,
    UPSTREAM_TOKEN,
    USAGE,
    Received,
    Script,
    Upstream,
    Wire,
    chat,
    delta,
    event,
    events,
    usage_only,
)
from tests.raw import Peer, connect, head
from tests.scene import (
    CHUNKED,
    INTERRUPTED,
    OK,
    STREAM,
    WITH_USAGE,
    asked,
    assert_nothing_left,
    in_chunks,
    metric,
    pools,
    sends,
    stay_silent,
    stream_then_wait,
    tick,
    until,
    until_hung_up,
)

HELLO = delta("Hello")
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
COMMENT = b": PROCESSING\n\n"

CHAIN = """
[providers.first]
base_url = "{first}"
prefix = ""
model = "one"
[providers.second]
base_url = "{second}"
prefix = ""
model = "two"
token = "env:SECOND_TOKEN"
[models.both]
chain = ["first", "second"]
[prices.models."first/one"]
input = "1.00"
output = "2.00"
[prices.models."second/two"]
input = "10.00"
output = "20.00"
"""


@pytest_asyncio.fixture
async def second() -> AsyncIterator[Upstream]:
    second = Upstream()
    await second.start()
    yield second
    await second.stop()


@pytest_asyncio.fixture
async def both(start_gateway: StartGateway, upstream: Upstream, second: Upstream) -> Front:
    """A gateway whose model `both` is a chain of two providers."""
    return await start_chain(start_gateway, upstream, second)


async def start_chain(
    start_gateway: StartGateway, upstream: Upstream, second: Upstream, **environ: str
) -> Front:
    more = CHAIN.format(first=upstream.url, second=second.url)
    return await start_gateway(more, SECOND_TOKEN="the-second-token", **environ)


def both_chat(stream: bool, **fields: Any) -> dict[str, Any]:
    return chat(stream, **{"model": "both", **fields})


def refuses(status: str, body: bytes = b'{"error":{"message":"no"}}') -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, status)

    return script


# -- what commits --------------------------------------------------------------------------------

TOOL = event(
    {
        "choices": [
            {
                "index": 0,
                "delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
            }
        ]
    }
)
REASONING = event({"choices": [{"index": 0, "delta": {"reasoning_content": "Well"}}]})
COMMITTING = {
    "text": HELLO,
    "a thought": REASONING,
    "a tool call": TOOL,
    "a finish reason": delta(finish="stop"),
    "usage": usage_only(),
    "DONE": DONE,
}
NOT_COMMITTING = {
    "a role": ROLE,
    "a comment": COMMENT,
    "an empty delta": delta(),
    "an empty text": delta(""),
    "usage that is null": delta(usage=None),
    "a ping": event({"choices": []}),
    "an event without data": b"event: ping\n\n",
}


@pytest.mark.parametrize("stream_breaks", [True, False], ids=["reset", "clean end"])
async def test_what_says_nothing_does_not_commit(
    both: Front, upstream: Upstream, second: Upstream, stream_breaks: bool
) -> None:
    for case, quiet in NOT_COMMITTING.items():
        last = b"" if stream_breaks else b"0\r\n\r\n"
        upstream.script = sends(
            CHUNKED + in_chunks([COMMENT, ROLE, quiet])[:-5] + last,
            then=Wire.hang_up if stream_breaks else None,
        )
        response = await both.chat(both_chat(True))
        assert response.status == 200, case
        assert response.headers["x-gateway-provider"] == "second", case
        # Not a byte of the first one's is seen.
        assert await response.read() == b"".join(events("Hel", "lo.")[:-2]) + DONE, case
    assert len(upstream.received) == len(second.received) == len(NOT_COMMITTING)


async def test_what_says_something_commits(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    for case, loud in COMMITTING.items():
        go_on = asyncio.Event()
        # The client has it while the upstream has said no more: this is the moment.
        upstream.script = sends(CHUNKED + in_chunks([COMMENT, ROLE, loud])[:-5], hold=go_on)
        async with asked(both, model="both", **WITH_USAGE) as peer:
            status, _, _ = await peer.head()
            assert status == 200, case
            assert await anext(peer.chunks()) == COMMENT + ROLE + loud, case
        go_on.set()
    assert second.received == []


async def test_after_the_commit_nothing_falls_back(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    for case, loud in COMMITTING.items():
        upstream.script = sends(CHUNKED + in_chunks([loud])[:-5], then=Wire.hang_up)
        response = await both.chat(both_chat(True, **WITH_USAGE))
        ended = loud if case == "DONE" else loud + INTERRUPTED
        assert await response.read() == ended, case
        upstream.script = sends(CHUNKED + in_chunks([loud, event({"error": {"message": "x"}})]))
        response = await both.chat(both_chat(True, **WITH_USAGE))
        assert (response.status, INTERRUPTED in await response.read()) == (200, False), case
    assert second.received == []
    assert await metric(both, "gwproxy_fallbacks_total") == 0


WAITING = ROLE * 1_000  # more than 64 KiB of events, and not a word


async def test_however_many_comments_come_the_next_provider_has_its_turn(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    waiting = COMMENT * 5_000  # 70 KB
    second.script = sends(CHUNKED + in_chunks([HELLO + DONE]))
    for ends in (event({"error": {"message": "overloaded", "code": 503}}), b""):
        upstream.script = sends(CHUNKED + in_chunks([waiting + ends]))
        response = await both.chat(both_chat(True))
        assert (response.status, await response.read()) == (200, HELLO + DONE)
    assert len(second.received) == 2
    assert standing(both) == (0, 2)
    await assert_nothing_left(both, upstream, second)


def standing(front: Front) -> tuple[float, int]:
    """Of the first provider: answers booked, and failures in a row."""
    app = front.gateway.app
    assert app is not None
    first = app._providers.of("first")
    return first.successes.value, first.breaker.failures


@contextlib.asynccontextmanager
async def passed_on_without_a_word(front: Front) -> AsyncIterator[Peer]:
    async with asked(front, model="both") as peer:
        assert (await peer.head())[0] == 200
        parts = peer.chunks()
        came = b""
        while len(came) < len(WAITING):
            came += await anext(parts)
        assert came == WAITING
        yield peer


async def test_a_stream_whose_events_are_long_without_a_word_is_passed_on_as_it_is(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    more = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(WAITING)
        await more.wait()
        await wire.chunk(HELLO)
        await until_hung_up(wire)

    upstream.script = script
    async with passed_on_without_a_word(both) as peer:
        # It is no answer yet: the breaker hears of one with the first words.
        assert standing(both) == (0, 0)
        more.set()
        assert await anext(peer.chunks()) == HELLO
        assert standing(both) == (1, 0)
    assert second.received == []


async def test_a_stream_that_was_passed_on_still_owes_its_first_words(
    both: Front, upstream: Upstream
) -> None:
    upstream.script = stream_then_wait(WAITING)
    async with passed_on_without_a_word(both) as peer:
        app = both.gateway.app
        assert app is not None
        [connection] = [each for pool in pools(both) for each in pool.active]
        relay = connection.exchange
        assert isinstance(relay, Relay)
        relay._reply.last_byte_at += 601  # it is not silent, which would end it sooner
        tick(both, 601)
        assert b"stream_interrupted" in b"".join([part async for part in peer.chunks()])
    line = await both.gateway.request_line()
    assert (line["outcome"], line["error_type"]) == ("truncated", "provider_timeout")
    assert standing(both) == (0, 1)


async def test_a_stream_that_was_passed_on_and_broke_off_without_a_word_is_a_failure(
    both: Front, upstream: Upstream
) -> None:
    error = event({"error": {"message": "overloaded", "code": 503}})
    for number, ends in enumerate((b"", error, DONE), start=1):
        upstream.script = sends(CHUNKED + in_chunks([WAITING, ends]))
        await (await both.chat(both_chat(True))).read()
        assert standing(both) == ((0, number) if ends != DONE else (1, 0))


async def test_a_client_that_leaves_before_the_first_words_says_nothing_about_the_provider(
    both: Front, upstream: Upstream
) -> None:
    upstream.script = stream_then_wait(WAITING)
    async with passed_on_without_a_word(both):
        pass
    await both.gateway.request_line()
    assert standing(both) == (0, 0)


async def test_an_error_as_the_first_event_is_an_http_error(
    front: Front, upstream: Upstream
) -> None:
    cases = [
        ({"message": "boom", "type": "server_error"}, 502, "all_providers_failed"),
        ({"message": "slow down", "code": 429}, 429, "rate_limit_exceeded"),
        ({"message": "bad key", "code": 401}, 502, "upstream_misconfigured"),
        ({"message": "too long", "code": 400}, 400, None),
        ("boom", 502, "all_providers_failed"),
    ]
    for error, status, code in cases:
        for before in (b"", ROLE + COMMENT):
            upstream.script = sends(CHUNKED + in_chunks([before + event({"error": error})]))
            response = await front.chat(chat(True))
            answered = (response.status, (await response.json())["error"]["code"])
            assert answered == (status, code), error
            assert response.headers["Content-Type"] == "application/json"
    lines = await front.gateway.lines("request", 2 * len(cases) + 2)
    settled = {(line["outcome"], line["cost_nanos"]) for line in lines if line["route"] == "chat"}
    assert settled == {("failed", 0)}
    await assert_nothing_left(front, upstream)


@pytest.mark.parametrize("body", [b"", COMMENT, ROLE], ids=["nothing", "a comment", "a role"])
async def test_a_stream_that_ends_without_a_word_is_an_http_error(
    front: Front, upstream: Upstream, body: bytes
) -> None:
    for script in (
        sends(CHUNKED + in_chunks([body])),
        sends(OK + STREAM + b"\r\n" + body, then=Wire.hang_up),
        sends(OK + STREAM + b"Content-Length: %d\r\n\r\n" % len(body) + body),
    ):
        upstream.script = script
        response = await front.chat(chat(True))
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "all_providers_failed"
        line = await front.gateway.request_line(least=len(upstream.received))
        assert line["error_type"] == "provider_truncated"
        assert (line["outcome"], line["source"]) == ("unknown", "estimated")


# -- who is tried next ---------------------------------------------------------------------------


def gateway_error(code: int) -> bytes:
    errors = [{"code": code, "message": "words"}]
    return json.dumps({"success": False, "error": errors}).encode()


MOVES_ON = {
    "408": (refuses("408 Request Timeout"), "status_408"),
    "409": (refuses("409 Conflict"), "status_409"),
    "429": (refuses("429 Too Many Requests"), "status_429"),
    "500": (refuses("500 Internal Server Error"), "status_500"),
    "503 with a page": (refuses("503 Unavailable", b"<html>"), "status_503"),
    "524": (refuses("524 A Timeout Occurred"), "status_5xx"),
    "529": (refuses("529 Overloaded"), "status_5xx"),
    "400 with 2005": (refuses("400 Bad Request", gateway_error(2005)), "upstream_error"),
    "a reset": (sends(then=Wire.reset), "reset"),
    "no HTTP": (sends(b"what?\r\n\r\n"), "garbage"),
    "half an answer": (sends(OK + b"Content-Length: 99\r\n\r\n{", then=Wire.hang_up), "truncated"),
    "no completion": (sends(OK + b"Content-Length: 2\r\n\r\n{}"), "garbage"),
    "no choice": (sends(OK + b'Content-Length: 14\r\n\r\n{"choices":[]}'), "garbage"),
    "a redirect": (refuses("302 Found\r\nLocation: http://127.0.0.1:1/"), "bad_upstream"),
}


async def test_a_failure_of_the_upstream_moves_on_to_the_next(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    for stream in (False, True):
        for case, (script, reason) in MOVES_ON.items():
            upstream.script = script
            response = await both.chat(both_chat(stream))
            assert response.status == 200, case
            assert response.headers["x-gateway-provider"] == "second", case
            assert b"lo." in await response.read()
            line = await both.gateway.request_line(least=len(second.received))
            attempts = [(a["provider"], a["model"], a.get("reason")) for a in line["attempts"]]
            assert attempts == [("first", "one", reason), ("second", "two", None)], case
            assert line["outcome"] == "completed", case
    assert [received.json["model"] for received in upstream.received[:1]] == ["one"]
    assert {received.json["model"] for received in second.received} == {"two"}
    assert {received.header("authorization") for received in second.received} == {
        "Bearer the-second-token"
    }
    moved = await both.gateway.lines("Provider failed, trying next")
    assert len(moved) == 2 * len(MOVES_ON)
    assert moved[0]["provider"] == "first" and moved[0]["reason"] == "status_408"
    name = "gwproxy_fallbacks_total"
    assert await metric(both, name, reason="status_408", **{"from": "first", "to": "second"}) == 2
    await assert_nothing_left(both, upstream, second)


STAYS = {
    "400": (refuses("400 Bad Request"), 400),
    "404": (refuses("404 Not Found"), 404),
    "422": (refuses("422 Unprocessable"), 422),
    "401": (refuses("401 Unauthorized"), 502),
    "402": (refuses("402 Payment Required"), 502),
    "403": (refuses("403 Forbidden"), 502),
    **{
        f"400 with {code}": (refuses("400 Bad Request", gateway_error(code)), 400)
        for code in (2016, 2017)
    },
    **{
        f"424 with {code}": (refuses("424 Failed Dependency", gateway_error(code)), 424)
        for code in (2029, 2030)
    },
    "400 with 2009": (refuses("401 Unauthorized", gateway_error(2009)), 502),
}


async def test_what_another_provider_would_not_change_stays(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    for stream in (False, True):
        for case, (script, status) in STAYS.items():
            upstream.script = script
            response = await both.chat(both_chat(stream))
            assert response.status == status, case
            assert response.headers["Content-Type"] == "application/json"
            await response.read()
    assert second.received == []


def broken(status: str, told: str, more: bytes = b"") -> Script:
    """An error that says less than it promises, and hangs up."""
    answer = f"HTTP/1.1 {status}\r\n{told}\r\n\r\n".encode() + b'{"error":{"mess'
    return sends(answer + more, then=Wire.hang_up)


TOO_LONG = b" " * (ChatRequest.answer_bytes + 1)
BROKEN: dict[str, tuple[Script, str, int]] = {
    # what the first one sends: how its attempt is told, and what the caller gets
    "401": (broken("401 Unauthorized", "Content-Length: 100"), "status_401", 502),
    "401 in chunks": (
        broken("401 Unauthorized", "Transfer-Encoding: chunked", b"zz\r\n"), "status_401", 502
    ),
    "422": (broken("422 Unprocessable", "Content-Length: 100"), "caller_error", 422),
    "429": (broken("429 Too Many", "Content-Length: 100"), "status_429", 200),
    "503": (broken("503 Unavailable", "Content-Length: 100"), "status_503", 200),
    "too long": (
        sends(b"HTTP/1.1 402 Payment Required\r\nContent-Length: 99999999\r\n\r\n" + TOO_LONG),
        "status_402",
        502,
    ),
}  # fmt: skip


async def test_an_error_whose_body_breaks_off_is_told_by_its_status_and_costs_nothing(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    await (await both.chat(both_chat(False, model="second/two"))).read()
    plain = (await both.gateway.request_line())["cost_nanos"]
    lines = 1
    for stream in (False, True):
        for case, (script, reason, status) in BROKEN.items():
            upstream.script = script
            response = await both.chat(both_chat(stream))
            await response.read()
            assert response.status == status, case
            lines += 1
            line = await both.gateway.request_line(least=lines)
            assert line["attempts"][0]["reason"] == reason, case
            paid = ("completed", plain) if status == 200 else ("failed", 0)
            assert (line["outcome"], line["cost_nanos"]) == paid, case
    assert len(second.received) == 1 + 4
    app = both.gateway.app
    assert app is not None
    assert app._providers.of("first").breaker.failures == 2  # the 503s alone
    await assert_nothing_left(both, upstream, second)


async def test_when_all_fail_the_last_one_is_told(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    upstream.script = refuses("500 Internal Server Error")
    second.script = refuses("429 Too Many\r\nRetry-After: 7")
    for stream in (False, True):
        response = await both.chat(both_chat(stream))
        assert response.status == 429
        assert response.headers["Retry-After"] == "7"
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"
    line = await both.gateway.request_line(least=2)
    assert (line["provider"], line["error_type"]) == ("second", "provider_rate_limited")
    assert (line["outcome"], line["cost_nanos"]) == ("failed", 0)
    [failed, _] = await both.gateway.lines("All providers failed", 2)
    assert failed["reason"] == "status_429"


async def test_the_time_of_a_provider_that_failed_is_not_ours(
    both: Front, upstream: Upstream
) -> None:
    async def script(wire: Wire, received: Received) -> None:
        await asyncio.sleep(0.1)
        await wire.answer(b"{}", "503 No")

    upstream.script = script
    response = await both.chat(both_chat(False))
    told = re.fullmatch("gw;dur=(.+), up;dur=(.+)", response.headers["Server-Timing"])
    line = await both.gateway.request_line()
    failed_ms = line["attempts"][0]["duration_ms"]
    assert failed_ms >= 100
    assert told is not None
    for ours_ms, theirs_ms in (told.groups(), (line["gateway_ms"], line["upstream_ms"])):
        assert float(ours_ms) + failed_ms + float(theirs_ms) <= line["duration_ms"]


async def test_a_date_to_come_back_at_is_told_in_seconds(front: Front, upstream: Upstream) -> None:
    upstream.script = refuses(
        f"429 Too Many\r\nRetry-After: {formatdate(time.time() + 40, usegmt=True)}"
    )
    response = await front.chat(chat())
    assert response.status == 429
    assert 30 < int(response.headers["Retry-After"]) <= 40


async def test_a_first_byte_that_does_not_come_moves_on(
    start_gateway: StartGateway, upstream: Upstream, second: Upstream
) -> None:
    front = await start_chain(
        start_gateway, upstream, second, GWPROXY__UPSTREAM__FIRST_BYTE_TIMEOUT_S="0.2"
    )
    for script in (stay_silent, stream_then_wait()):
        upstream.script = script
        response = await front.chat(both_chat(True))
        assert (response.status, response.headers["x-gateway-provider"]) == (200, "second")
        await response.read()
    line = await front.gateway.request_line(least=2)
    assert line["attempts"][0]["reason"] == "first_byte_timeout"
    await assert_nothing_left(front, upstream, second)


async def test_an_attempt_without_an_answer_is_paid_for_beside_the_one_that_answers(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    upstream.script = sends(then=Wire.reset)
    for number, stream in enumerate((False, True), start=1):
        response = await both.chat(both_chat(stream))
        await response.read()
        line = await both.gateway.request_line(least=number)
        assert (line["outcome"], line["source"]) == ("completed", "provider")
        prompt = line["tokens"]["input"] - USAGE["prompt_tokens"]
        assert prompt > 5
        theirs = USAGE["prompt_tokens"] * 10_000 + USAGE["completion_tokens"] * 20_000
        assert line["cost_nanos"] == prompt * 1_000 + theirs
    cost = "gwproxy_cost_usd_total"
    assert await metric(both, cost, provider="first") == pytest.approx(2 * prompt * 1e-6)
    assert await metric(both, cost, provider="second") == pytest.approx(2 * theirs / 1e9)


async def test_the_gateways_own_end_is_no_failure_of_a_provider(
    both: Front, upstream: Upstream, second: Upstream
) -> None:
    upstream.script = stay_silent
    async with asked(both, model="both") as peer:
        await until(lambda: bool(upstream.received))
        closing = asyncio.ensure_future(both.gateway.close())  # noqa: TID251 the test's own
        answer = await peer.answer()
        await closing
    assert (answer.status, answer.code) == (503, "draining")
    assert answer.header("retry-after") == "1"
    assert second.received == []


# -- early commit --------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", COMMENT, ROLE], ids=["nothing", "a comment", "a role"])
async def test_a_silent_stream_is_committed_early_where_that_is_configured(
    start_gateway: StartGateway, upstream: Upstream, second: Upstream, said: bytes
) -> None:
    front = await start_chain(
        start_gateway, upstream, second, GWPROXY__UPSTREAM__EARLY_COMMIT_S="0.1"
    )
    go_on = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        if said:
            await wire.chunk(said)
        await go_on.wait()
        await wire.chunk(event({"error": {"message": "too late for another"}}))
        await wire.end()

    upstream.script = script
    async with asked(front, model="both") as peer:
        status, _, fields = await peer.head()
        assert (status, dict(fields)["x-gateway-provider"]) == (200, "first")
        parts = peer.chunks()
        if said:
            assert await anext(parts) == said
        tick(front, 16)
        assert await anext(parts) == b": keepalive\n\n"
        go_on.set()
        assert b"too late" in b"".join([part async for part in parts])
    assert second.received == []
    took = await metric(front, "gwproxy_upstream_ttfb_seconds_sum", provider="first")
    assert 0 < took < 5, "a time before the first byte is never negative"
    line = await front.gateway.request_line()
    assert line["upstream_ms"] >= 0


async def test_a_head_that_does_not_come_is_never_committed(
    start_gateway: StartGateway, upstream: Upstream, second: Upstream
) -> None:
    front = await start_chain(
        start_gateway,
        upstream,
        second,
        GWPROXY__UPSTREAM__EARLY_COMMIT_S="0.05",
        GWPROXY__UPSTREAM__FIRST_BYTE_TIMEOUT_S="0.3",
    )
    upstream.script = stay_silent
    response = await front.chat(both_chat(True))
    assert (response.status, response.headers["x-gateway-provider"]) == (200, "second")


# -- what leaves ---------------------------------------------------------------------------------

OTHERS_HEADERS = [
    "x-api-key: caller-canary",
    "Cookie: session=caller-canary",
    "cf-aig-authorization: Bearer caller-canary",
    "cf-aig-metadata: {\"user_id\":\"caller-canary\"}",
    "cf_aig_metadata: caller-canary",
    "cf-aig-cache-key: caller-canary",
    "cf-aig-skip-cache: false",
    "cf-aig-custom-cost: {\"per_token_in\":0}",
    "Proxy-Authorization: Basic caller-canary",
    "Forwarded: for=caller-canary",
    "X-Forwarded-For: caller-canary",
    "Via: 1.1 caller-canary",
    "OpenAI-Organization: caller-canary",
    "User-Agent: caller-canary",
    "Accept-Encoding: gzip",
    "x-request-id: caller-canary",
    "traceparent: caller-canary",
    "TE: trailers",
    "Connection: cf-aig-authorization, authorization, content-length",
]  # fmt: skip


async def sent_by_a_hostile_client(front: Front, upstream: Upstream) -> Received:
    """What reached the upstream of a request with headers of all kinds."""
    body = json.dumps(chat(True, model="mock/echo", user="caller-user")).encode()
    lines = [line for line in OTHERS_HEADERS if not line.startswith("x-api-key")]
    async with connect(front.port) as peer:
        peer.send(
            head(
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                *lines,
                key=front.key,
            )
            + body
        )
        answer = await peer.answer()
    assert answer.status == 200, answer
    [received] = upstream.received
    everything = received.head + received.body
    for secret in (b"caller-canary", front.key.encode(), ADMIN_KEY.encode()):
        assert secret not in everything
    return received


async def test_headers_for_an_openai_server_are_built_and_never_copied(
    front: Front, upstream: Upstream
) -> None:
    received = await sent_by_a_hostile_client(front, upstream)
    assert received.head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    headers = dict(received.headers)
    assert len(headers) == len(received.headers)
    agent = headers.pop("user-agent")
    assert re.fullmatch(r"gwproxy/[0-9.]+", agent)
    assert headers == {
        "host": upstream.url.split("/")[2],
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(received.body)),
        "authorization": f"Bearer {UPSTREAM_TOKEN}",
    }


async def test_a_key_in_either_place_is_the_gateways_own_and_goes_no_further(
    front: Front, upstream: Upstream
) -> None:
    for name in ("x-api-key", "api-key"):
        response = await front.client.post(
            "/v1/chat/completions", json=chat(), headers={name: front.key}
        )
        assert response.status == 200
        received = upstream.received[-1]
        assert front.key.encode() not in received.head + received.body
        assert received.header(name) is None


CLOUDFLARE = """
[server]
listen = "127.0.0.1:0"
drain_s = 1
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "cloudflare-compat"
base_url = "{root}"
token = "env:UPSTREAM_TOKEN"
[providers.mock]
prefix = "custom-mock"
{more}
"""

OVERRIDE = """
[prices.models."mock/echo"]
input = "1.25"
output = "10"
cache_read = "0.125"
[prices.models."custom-mock/echo"]
input = "1.25"
output = "10"
cache_read = "0.125"
"""


async def test_headers_for_cloudflare_are_built_and_never_copied(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    root = upstream.url.replace("/v1", "/v1/account-1/gateway-1")
    config = CLOUDFLARE.format(root=root, more=OVERRIDE)
    front = await start_gateway(config=config)
    received = await sent_by_a_hostile_client(front, upstream)
    assert received.head.startswith(
        b"POST /v1/account-1/gateway-1/compat/chat/completions HTTP/1.1\r\n"
    )
    assert received.json["model"] == "custom-mock/echo"
    headers = dict(received.headers)
    assert len(headers) == len(received.headers)
    line = await front.gateway.request_line()
    assert json.loads(headers.pop("cf-aig-metadata")) == {
        "user_id": "alice",
        "org_id": "default",
        "key_id": line["key_id"],
        "request_id": line["request_id"],
        "attempt": 1,
    }
    assert json.loads(headers.pop("cf-aig-custom-cost")) == {
        "per_token_in": 0.00000125,
        "per_token_out": 0.00001,
        "per_cache_read_token": 0.000000125,
        "per_cache_write_token": 0.00000125,
    }
    assert headers.pop("user-agent").startswith("gwproxy/")
    assert headers == {
        "host": upstream.url.split("/")[2],
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(received.body)),
        # No Authorization: the gateway would take it for the provider's key.
        "cf-aig-authorization": f"Bearer {UPSTREAM_TOKEN}",
        "cf-aig-skip-cache": "true",
        "cf-aig-max-attempts": "1",
        "cf-aig-collect-log-payload": "false",
    }


async def test_a_compiled_price_is_not_told_to_cloudflare(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    config = CLOUDFLARE.format(root=upstream.url, more="").replace("custom-mock", "openai")
    front = await start_gateway(config=config)
    response = await front.chat(chat(model="openai/gpt-4o-mini"))
    assert response.status == 200, await response.text()
    [received] = upstream.received
    assert received.header("cf-aig-custom-cost") is None
    assert received.json["model"] == "openai/gpt-4o-mini"


async def test_each_attempt_is_numbered_for_cloudflare(
    start_gateway: StartGateway, upstream: Upstream, second: Upstream
) -> None:
    more = CHAIN.format(first=upstream.url, second=second.url)
    config = CLOUDFLARE.format(root=upstream.url, more=more)
    front = await start_gateway(config=config, SECOND_TOKEN="the-second-token")
    upstream.script = refuses("500 Internal Server Error")
    response = await front.chat(both_chat(False))
    assert response.status == 200
    numbers = [
        json.loads(each.header("cf-aig-metadata") or "")["attempt"]
        for each in (*upstream.received, *second.received)
    ]
    assert numbers == [1, 2]
    assert second.received[0].header("cf-aig-authorization") == "Bearer the-second-token"
    assert UPSTREAM_TOKEN.encode() not in second.received[0].head


async def test_what_is_sent_is_what_was_parsed(front: Front, upstream: Upstream) -> None:
    body = (
        b'{"model":"other/model","mod\\u0065l":"mock/echo","messages":[{"role":"user",'
        b'"content":"Hello there."}],"x_new":{"deep":[1.5,null,"\\ud83d\\ude00"]},"seed":1}'
    )
    response = await front.client.post(
        "/v1/chat/completions",
        data=body,
        headers={"Authorization": f"Bearer {front.key}", "Content-Type": "application/json"},
    )
    assert response.status == 200
    [received] = upstream.received
    assert received.body.count(b'"model"') == 1
    assert received.json == json.loads(body)
    assert "stream_options" not in received.json


async def test_what_a_stream_asks_besides_usage_is_kept(front: Front, upstream: Upstream) -> None:
    response = await front.chat(chat(True, stream_options={"include_obfuscation": False}))
    await response.read()
    [received] = upstream.received
    assert received.json["stream_options"] == {"include_obfuscation": False, "include_usage": True}


# -- what comes back -----------------------------------------------------------------------------

SPOOFED = (
    "x-gateway-provider: spoofed\r\nx-gateway-mode: spoofed\r\nx-gateway-remaining-usd: 99\r\n"
    "Set-Cookie: spoofed=1\r\nServer: spoofed\r\nDate: spoofed\r\nVia: spoofed\r\n"
    "Server-Timing: spoofed\r\nx-upstream-request-id: spoofed\r\nAccess-Control-Allow-Origin: *\r\n"
    "Strict-Transport-Security: spoofed\r\nAlt-Svc: spoofed\r\nKeep-Alive: spoofed\r\n"
    "Location: http://spoofed/\r\ncf-ray: spoofed\r\ncf-aig-log-id: 01LOG\r\nTrailer: spoofed\r\n"
    "x-accel-redirect: /spoofed\r\nContent-Language: spoofed\r\nLink: <spoofed>\r\n"
)
PASSED = {
    "openai-processing-ms": "12",
    "openai-version": "2020-10-01",
    "x-ratelimit-remaining-tokens": "149000",
    "cf-aig-cache-status": "MISS",
    "x-request-id": "req_theirs",
}


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_for_the_client_are_a_short_list(
    front: Front, upstream: Upstream, stream: bool
) -> None:
    more = SPOOFED + "".join(f"{name}: {value}\r\n" for name, value in PASSED.items())

    async def script(wire: Wire, received: Received) -> None:
        if stream:
            await wire.start(more=more)
            await wire.chunk(HELLO + DONE)
            await wire.end()
        else:
            await wire.answer(json.dumps(ANSWER).encode(), more=more)

    upstream.script = script
    async with asked(front, stream=stream) as peer:
        answer = await peer.answer()
    headers = {name.lower(): value for name, value in answer.fields}
    assert "spoofed" not in str(headers)
    ours = headers["x-request-id"]
    assert headers.pop("x-upstream-request-id") == "req_theirs"
    assert {name: headers.pop(name) for name in PASSED} == {**PASSED, "x-request-id": ours}
    assert headers.pop("x-gateway-provider") == "upstream"
    assert headers.pop("x-gateway-mode") == "normal"
    assert re.fullmatch(r"gw;dur=[0-9.]+, up;dur=[0-9.]+", headers.pop("server-timing"))
    assert headers.pop("x-gateway-scope") == "user"
    assert headers.pop("x-gateway-usage-usd") == headers.pop("x-gateway-held-usd") == "0.00"
    assert re.fullmatch(r"\d{4}-\d\d-01T00:00:00Z", headers.pop("x-gateway-reset"))
    assert headers.pop("server") == "gwproxy"
    assert headers.pop("date").endswith(" GMT")
    framing = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "transfer-encoding": "chunked",
    }
    whole = {
        "content-type": "application/json",
        "content-length": str(len(json.dumps(ANSWER))),
    }
    assert headers == (framing if stream else whole)
    line = await front.gateway.request_line()
    assert (line["request_id"], line["cf_aig_log_id"]) == (ours, "01LOG")
