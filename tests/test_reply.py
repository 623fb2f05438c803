"""An answer while it is undecided: how long it may take, what it may be, and who may walk away."""

import asyncio
import json
from typing import Any

import pytest

from gwproxy.core.chat import ChatRequest
from gwproxy.proxy.reply import Reply
from tests.conftest import Front, StartGateway
from tests.harness import (
    ANSWER,
    DONE,
    Received,
    Script,
    Upstream,
    Wire,
    chat,
    delta,
    event,
)
from tests.scene import (
    OK,
    WITH_USAGE,
    asked,
    assert_nothing_left,
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


def begins(data: bytes) -> Script:
    """Sends so much of an answer, and then nothing more."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.send(data)
        await until_hung_up(wire)

    return script


HALF_AN_ANSWER = OK + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"

# -- patience ------------------------------------------------------------------------------------


async def assert_timed_out(front: Front, upstream: Upstream, stream: bool, reason: str) -> None:
    async with asyncio.timeout(10):
        response = await front.chat(chat(stream))
    assert response.status == 502
    error = (await response.json())["error"]
    assert (error["type"], error["code"]) == ("server_error", "all_providers_failed")
    line = await front.gateway.request_line(least=len(upstream.received))
    assert (line["status"], line["error_type"]) == (502, "provider_timeout")
    assert [attempt["reason"] for attempt in line["attempts"]] == [reason]
    assert (line["outcome"], line["source"]) == ("unknown", "estimated")
    failed = await front.gateway.lines("All providers failed", len(upstream.received))
    assert failed[-1]["reason"] == reason
    await assert_nothing_left(front, upstream)
    assert upstream.open == 0


async def test_a_stream_whose_first_byte_does_not_come_is_given_up(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(
        GWPROXY__UPSTREAM__FIRST_BYTE_TIMEOUT_S="0.15", GWPROXY__UPSTREAM__IDLE_TIMEOUT_S="60"
    )
    for script in (stay_silent, stream_then_wait(), begins(b"HTTP/1.1 200 OK\r\nContent-")):
        upstream.script = script
        await assert_timed_out(front, upstream, True, "first_byte_timeout")
    name = "gwproxy_requests_total"
    assert await metric(front, name, error_type="provider_timeout", status_class="5xx") == 3


async def test_a_comment_is_a_first_byte(start_gateway: StartGateway, upstream: Upstream) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__FIRST_BYTE_TIMEOUT_S="30")

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(COMMENT)
        [pool] = pools(front)
        [connection] = pool.active
        reply = connection.exchange
        assert isinstance(reply, Reply)
        await until(lambda: reply.first_byte_at > 0)
        # As if a minute had passed: a limit that still held would end the attempt here.
        tick(front, 59)
        assert pool.active
        await wire.chunk(HELLO + delta(finish="stop") + DONE)
        await wire.end()

    upstream.script = script
    response = await front.chat(chat(True))
    assert response.status == 200
    assert await response.read() == COMMENT + HELLO + delta(finish="stop") + DONE


async def test_an_upstream_that_falls_silent_before_a_word_is_given_up(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__IDLE_TIMEOUT_S="0.15")
    for quiet in (COMMENT, ROLE):
        upstream.script = stream_then_wait(quiet)
        await assert_timed_out(front, upstream, True, "idle_timeout")
    upstream.script = begins(HALF_AN_ANSWER)
    await assert_timed_out(front, upstream, True, "idle_timeout")


async def comments_alone(wire: Wire, received: Received) -> None:
    """Alive, and without a word, until the gateway hangs up."""
    await wire.start()
    async with asyncio.TaskGroup() as group:
        gone = group.create_task(until_hung_up(wire))
        while not gone.done():
            await wire.chunk(COMMENT)
            await asyncio.wait((gone,), timeout=0.02)


async def test_a_stream_of_comments_alone_is_given_up_in_the_end(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(
        GWPROXY__UPSTREAM__ANSWER_TIMEOUT_S="0.3", GWPROXY__UPSTREAM__IDLE_TIMEOUT_S="0.2"
    )
    upstream.script = comments_alone
    await assert_timed_out(front, upstream, True, "answer_timeout")
    app = front.gateway.app
    assert app is not None
    assert [each.breaker.failures for each in app._providers.all()] == [1]


async def test_a_stream_that_has_begun_may_take_longer_than_an_answer(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(GWPROXY__UPSTREAM__ANSWER_TIMEOUT_S="0.1")
    later = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(HELLO)
        await later.wait()
        await wire.chunk(delta(finish="stop") + DONE)
        await wire.end()

    upstream.script = script
    response = await front.chat(chat(True))
    tick(front, 1)
    later.set()
    assert await response.read() == HELLO + delta(finish="stop") + DONE


async def test_an_answer_in_one_piece_has_a_time_of_its_own(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(
        GWPROXY__UPSTREAM__ANSWER_TIMEOUT_S="0.3",
        GWPROXY__UPSTREAM__FIRST_BYTE_TIMEOUT_S="0.05",
        GWPROXY__UPSTREAM__IDLE_TIMEOUT_S="0.05",
    )
    for script in (stay_silent, begins(HALF_AN_ANSWER)):
        upstream.script = script
        await assert_timed_out(front, upstream, False, "answer_timeout")


# -- what an answer may be -----------------------------------------------------------------------


@pytest.mark.parametrize("asked_for", [True, False], ids=["with usage", "without"])
async def test_a_whole_answer_to_a_stream_is_sent_as_one_chunk(
    front: Front, upstream: Upstream, asked_for: bool
) -> None:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(json.dumps(ANSWER).encode())

    upstream.script = script
    more: dict[str, Any] = WITH_USAGE if asked_for else {}
    async with asked(front, **more) as peer:
        answer = await peer.answer()
    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    *chunks, done, rest = answer.body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    first, *usage = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "Hello."},
            "finish_reason": "stop",
        }
    ]
    assert [each["usage"] for each in usage] == ([ANSWER["usage"]] if asked_for else [])
    line = await front.gateway.request_line()
    assert (line["outcome"], line["source"]) == ("completed", "provider")


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_an_error_status_in_answer_to_a_stream_keeps_its_status(
    front: Front, upstream: Upstream, status: int
) -> None:
    words = {"message": "too many", "type": "invalid_request_error", "param": "n", "code": "bad"}
    body = json.dumps({"error": words}).encode()

    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, f"{status} No")

    upstream.script = script
    for stream in (True, False):
        response = await front.chat(chat(stream))
        assert (response.status, await response.read()) == (status, body)
        assert response.headers["Content-Type"] == "application/json"
    line = await front.gateway.request_line(least=2)
    assert (line["error_type"], line["outcome"], line["cost_nanos"]) == (
        "caller_invalid",
        "failed",
        0,
    )


async def test_an_error_status_with_a_stream_for_a_body_is_an_error(
    front: Front, upstream: Upstream
) -> None:
    async def script(wire: Wire, received: Received) -> None:
        head = "HTTP/1.1 500 No\r\nContent-Type: text/event-stream\r\n"
        await wire.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        await wire.chunk(HELLO)
        await wire.end()

    upstream.script = script
    response = await front.chat(chat(True))
    assert response.status == 502
    assert b"Hello" not in await response.read()


async def test_an_answer_in_one_piece_passes_byte_for_byte(
    front: Front, upstream: Upstream
) -> None:
    body = b'{ "choices" : [ {} ] ,\n "x": 1.10, "y": "\\u00e9", "usage": {"prompt_tokens": 1,'
    body += b'"completion_tokens": 0, "total_tokens": 1} }\n'

    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body)

    upstream.script = script
    async with asked(front, stream=False) as peer:
        assert (await peer.answer()).body == body


async def test_an_answer_without_end_is_cut_off(front: Front, upstream: Upstream) -> None:
    sent = 0

    async def script(wire: Wire, received: Received) -> None:
        nonlocal sent
        await wire.start("application/json")
        block = b" " * (1 << 20)
        while True:
            await wire.chunk(block)
            sent += len(block)

    upstream.script = script
    response = await front.chat(chat())
    assert response.status == 502
    line = await front.gateway.request_line()
    assert line["attempts"][0]["reason"] == "too_large"
    await assert_nothing_left(front, upstream)
    assert sent < 2 * ChatRequest.answer_bytes


@pytest.mark.parametrize("ends", [b"\n\n", b"\n", b"x"], ids=["events", "lines", "one line"])
async def test_comments_without_end_are_cut_off(
    front: Front, upstream: Upstream, ends: bytes
) -> None:
    sent = 0

    async def script(wire: Wire, received: Received) -> None:
        nonlocal sent
        await wire.start()
        block = b": " + b"x" * (1 << 20) + ends
        while True:
            await wire.chunk(block)
            sent += len(block)

    upstream.script = script
    response = await front.chat(chat(True))
    assert response.status == 502
    line = await front.gateway.request_line()
    assert line["attempts"][0]["reason"] == "too_large"
    await assert_nothing_left(front, upstream)
    assert sent < 2 * ChatRequest.answer_bytes


# -- clients that walk away ----------------------------------------------------------------------

UNDECIDED: dict[str, tuple[Script, bool]] = {
    "before the head": (stay_silent, False),
    "before the head of a stream": (stay_silent, True),
    "in the middle of an answer": (begins(HALF_AN_ANSWER), False),
    "after the head of a stream": (stream_then_wait(), True),
    "after a comment": (stream_then_wait(COMMENT), True),
    "after a role": (stream_then_wait(COMMENT, ROLE), True),
}


async def test_a_client_that_leaves_before_anything_counts_takes_its_upstream_along(
    front: Front, upstream: Upstream
) -> None:
    for number, (case, (script, stream)) in enumerate(UNDECIDED.items(), start=1):
        gone = asyncio.Event()

        async def watched(wire: Wire, received: Received, script: Script = script) -> None:
            try:
                await script(wire, received)
            finally:
                gone.set()  # noqa: B023 awaited within the same turn

        upstream.script = watched
        async with asked(front, stream=stream) as peer:
            await until(lambda: len(upstream.received) == number)  # noqa: B023
            [active] = [each for pool in pools(front) for each in pool.active]
            if script is not stay_silent:
                await until(lambda: active._head_done)  # noqa: B023
            if number % 2:
                peer.reset()
            else:
                peer.writer.close()
            async with asyncio.timeout(2):
                await gone.wait()
        line = await front.gateway.request_line(least=number)
        assert (line["status"], line["outcome"]) == (499, "client_left"), case
        assert line["error_type"] == "caller_cancelled", case
        # The prompt was sent, and is paid for.
        assert line["tokens"]["input"] > 5 and line["tokens"]["output"] == 0, case
        assert line["cost_nanos"] == line["tokens"]["input"] * 1_000, case
        await assert_nothing_left(front, upstream)
        assert upstream.open == 0, case
    name = "gwproxy_settlements_total"
    assert await metric(front, name, outcome="client_left") == len(UNDECIDED)
    assert await metric(front, name) == len(UNDECIDED)


async def test_the_next_request_is_served_after_a_client_has_left(
    front: Front, upstream: Upstream
) -> None:
    upstream.queue = [stay_silent, sends()]
    async with asked(front) as peer:
        await until(lambda: bool(upstream.received))
        peer.reset()
    await front.gateway.request_line()
    upstream.queue.clear()
    response = await front.chat(chat())
    assert response.status == 200
