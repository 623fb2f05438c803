"""The books: who pays for what, exactly once, on every way out of a request."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from gwproxy.core.chat import ChatRequest
from gwproxy.core.errors import ModelNotPriced, UpstreamFailed
from gwproxy.core.meter import Meter
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import Candidate, Provider
from gwproxy.core.trace import Trace
from gwproxy.metrics import Metrics
from gwproxy.state.books import Books, Outcome, Priced, Reservation
from tests.conftest import Front
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
    events,
    tokenizer,
    usage_only,
)
from tests.scene import (
    CHUNKED,
    OK,
    asked,
    assert_nothing_left,
    in_chunks,
    metric,
    sends,
    stay_silent,
    stream_then_wait,
    until,
)

PROMPT = 10
"""Tokens of the harness's prompt: 3 words and a dot, its role, and the form of the chat."""

TEXT = "The quick brown fox jumps over the lazy dog."
TEXT_TOKENS = 10

INPUT, OUTPUT = 1_000, 2_000
"""Nano-USD a token, as the harness's configuration prices them."""


# -- through HTTP: the table of who pays ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What an upstream does, and what the request then costs."""

    script: Script
    outcome: str
    source: str | None
    input: int = 0
    output: int = 0
    stream: bool = True
    status: int = 200
    more: tuple[int, int, int] = (0, 0, 0)
    """Cache reads, cache writes, reasoning."""


def whole(**changes: Any) -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(json.dumps({**ANSWER, **changes}).encode())

    return script


def refuses(status: str, body: bytes = b'{"error":{"message":"no"}}') -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, status)

    return script


def streams(
    *parts: bytes, then: Callable[[Wire], None] | None = None, clean: bool = True
) -> Script:
    framed = CHUNKED + in_chunks(parts)
    return sends(framed if clean else framed[:-5], then=then)


STOP = delta(finish="stop")
BIG = usage_only(prompt_tokens=100, completion_tokens=50, total_tokens=150)
RUNNING = [  # a provider that gives a running total with each chunk
    delta("a", usage={"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}),
    delta("b", usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 60}),
]

TABLE = {
    "an answer with usage": Case(
        whole(), "completed", "provider", 11, 2, stream=False
    ),
    "an answer without usage": Case(
        whole(usage=None), "completed", "counted", PROMPT, 2, stream=False
    ),
    "usage of zero is a value": Case(
        whole(usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}),
        "completed", "provider", 0, 0, stream=False,
    ),
    "usage that is nonsense is none": Case(
        whole(usage={"prompt_tokens": "many", "completion_tokens": True}),
        "completed", "counted", PROMPT, 2, stream=False,
    ),
    "cached and hidden tokens": Case(
        whole(usage={
            "prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 130,
            "prompt_tokens_details": {"cached_tokens": 60},
            "completion_tokens_details": {"reasoning_tokens": 15},
        }),
        "completed", "provider", 40, 30, stream=False, more=(60, 0, 15),
    ),
    "a stream with usage": Case(streams(*events(TEXT)), "completed", "provider", 11, 2),
    "a stream whose last usage counts": Case(
        streams(delta(TEXT), STOP, usage_only(), BIG, DONE), "completed", "provider", 100, 50
    ),
    "running totals are never added up": Case(
        streams(*RUNNING, STOP, DONE), "completed", "provider", 7, 53, more=(0, 0, 51)
    ),
    "a stream without usage": Case(
        streams(delta(TEXT), STOP, DONE), "completed", "counted", PROMPT, TEXT_TOKENS
    ),
    "a stream of nothing but its end": Case(streams(STOP, DONE), "completed", "counted", PROMPT, 0),
    "a whole answer to a stream": Case(whole(), "completed", "provider", 11, 2),
    "a stream cut off": Case(
        streams(delta(TEXT), clean=False, then=Wire.hang_up),
        "truncated", "counted", PROMPT, TEXT_TOKENS,
    ),
    "a stream cut off after its usage": Case(
        streams(delta(TEXT), STOP, BIG, clean=False, then=Wire.hang_up),
        "truncated", "provider", 100, 50,
    ),
    "a stream that went on after its last running total": Case(
        streams(RUNNING[0], delta(TEXT), clean=False, then=Wire.hang_up),
        "truncated", "counted", 7, TEXT_TOKENS + 1,
    ),
    "an error in mid-stream": Case(
        streams(delta(TEXT), event({"error": {"message": "x"}})),
        "truncated", "counted", PROMPT, TEXT_TOKENS,
    ),
    "an error before anything": Case(
        streams(event({"error": {"message": "x"}})), "failed", None, status=502
    ),
    "a caller's error": Case(refuses("400 Bad"), "failed", None, status=400),
    "a caller's error, no stream": Case(
        refuses("400 Bad"), "failed", None, stream=False, status=400
    ),
    "a refused token": Case(refuses("401 No"), "failed", None, status=502),
    "an overloaded upstream": Case(refuses("529 Busy", b"busy"), "failed", None, status=502),
    "a reset before the head": Case(
        sends(then=Wire.reset), "unknown", "estimated", PROMPT, status=502
    ),
    "a reset in the head": Case(
        sends(b"HTTP/1.1 2", then=Wire.hang_up), "unknown", "estimated", PROMPT, status=502
    ),
    "half an answer": Case(
        sends(OK + b"Content-Length: 99\r\n\r\n{", then=Wire.hang_up),
        "unknown", "estimated", PROMPT, stream=False, status=502,
    ),
    "a stream without a word": Case(streams(), "unknown", "estimated", PROMPT, status=502),
    "an answer that is none": Case(
        sends(OK + b"Content-Length: 2\r\n\r\n{}"),
        "unknown", "estimated", PROMPT, stream=False, status=502,
    ),
}  # fmt: skip


async def test_who_pays_for_what(front: Front, upstream: Upstream) -> None:
    expected: dict[str, int] = {}
    money = 0
    for number, (name, case) in enumerate(TABLE.items(), start=1):
        upstream.script = case.script
        response = await front.chat(chat(case.stream))
        await response.read()
        assert response.status == case.status, name
        line = await front.gateway.request_line(least=number)
        assert (line["outcome"], line.get("source")) == (case.outcome, case.source), name
        cache_read, cache_write, reasoning = case.more
        # The price of a cached token is that of a fresh one where no other is set.
        nanos = (case.input + cache_read + cache_write) * INPUT + case.output * OUTPUT
        assert line["cost_nanos"] == nanos, name
        assert line["tokens"] == {
            "input": case.input,
            "cache_read": cache_read,
            "cache_write": cache_write,
            "output": case.output,
            "reasoning": reasoning,
        }, name
        assert line["price_version"], name
        expected[case.outcome] = expected.get(case.outcome, 0) + 1
        money += nanos
    for outcome, count in expected.items():
        assert await metric(front, "gwproxy_settlements_total", outcome=outcome) == count, outcome
    assert await metric(front, "gwproxy_settlements_total") == len(TABLE)
    assert await metric(front, "gwproxy_cost_usd_total") == pytest.approx(money / 1e9)
    await assert_nothing_left(front, upstream)


@pytest.mark.parametrize(
    ("script", "committed", "source", "output"),
    [
        (stay_silent, False, "estimated", 0),
        (stream_then_wait(b": comment\n\n"), False, "counted", 0),
        (stream_then_wait(delta(TEXT)), True, "counted", TEXT_TOKENS),
        (stream_then_wait(RUNNING[0], delta(TEXT)), True, "counted", TEXT_TOKENS + 1),
        (stream_then_wait(delta("Hi"), STOP, BIG), True, "provider", 50),
    ],
    ids=["before the head", "before a word", "after text", "after a total", "after usage"],
)
async def test_a_client_that_leaves_pays_for_what_it_got(
    front: Front, upstream: Upstream, script: Script, committed: bool, source: str, output: int
) -> None:
    upstream.script = script
    async with asked(front) as peer:
        await until(lambda: bool(upstream.received))
        if committed:
            await peer.head()
            parts = peer.chunks()
            came = await anext(parts)
            while (TEXT.encode() not in came) and (STOP not in came):
                came += await anext(parts)
        if source == "provider":
            # The usage chunk stays here: what shows that it came is the meter.
            app = front.gateway.app
            assert app is not None
            [pool] = app._upstream._pools.values()
            [connection] = pool.active
            await until(lambda: connection.exchange._reply.meter.usage is not None)
        elif source == "counted" and not committed:
            app = front.gateway.app
            assert app is not None
            [pool] = app._upstream._pools.values()
            [connection] = pool.active
            await until(lambda: connection._head_done)
        peer.reset()
    line = await front.gateway.request_line()
    assert (line["outcome"], line["source"], line["status"]) == ("client_left", source, 499)
    assert line["tokens"]["output"] == output
    assert line["tokens"]["input"] in (PROMPT, 7, 100)
    assert line["cost_nanos"] == line["tokens"]["input"] * INPUT + output * OUTPUT
    assert line["cost_nanos"] > 0
    assert await metric(front, "gwproxy_settlements_total") == 1
    await assert_nothing_left(front, upstream)


async def test_a_refused_request_leaves_no_settlement(front: Front, upstream: Upstream) -> None:
    for body in (chat(model="nobody/knows"), chat(n=0), chat(messages=[])):
        response = await front.chat(body)
        assert response.status in (400, 404)
        await response.read()
    response = await front.client.post("/v1/chat/completions", json=chat())
    assert response.status == 401
    lines = await front.gateway.lines("request", 6)
    assert not [line for line in lines if "cost_nanos" in line or "outcome" in line]
    assert await metric(front, "gwproxy_settlements_total") == 0
    assert upstream.received == []


async def test_a_client_that_did_not_ask_for_usage_pays_by_it_all_the_same(
    front: Front, upstream: Upstream
) -> None:
    upstream.script = streams(delta(TEXT), STOP, BIG, DONE)
    response = await front.chat(chat(True))
    assert b'"usage"' not in await response.read()
    line = await front.gateway.request_line()
    assert (line["source"], line["tokens"]["input"], line["tokens"]["output"]) == (
        "provider", 100, 50,
    )  # fmt: skip


async def test_a_whole_answer_is_settled_before_its_headers_go_out(
    front: Front, upstream: Upstream
) -> None:
    """Whoever has the answer and asks for the figures sees it in them."""
    async with asked(front, stream=False) as peer:
        await peer.head()
        assert await metric(front, "gwproxy_settlements_total", outcome="completed") == 1


# -- the reservation by itself -------------------------------------------------------------------

PRICES = {
    "a/cheap": {"input": "1", "output": "2"},
    "b/dear": {"input": "10", "output": "20"},
    "c/free": {"input": "0", "output": "0"},
}


def candidate(name: str) -> Candidate:
    provider, _, model = name.partition("/")
    return Candidate(Provider(provider, "", provider), model, model)


@pytest.fixture
def books() -> Books:
    prices = PriceBook({"version": "test", "aliases": {}, "providers": {}}, PRICES)
    metrics = Metrics(frozenset("abc"), frozenset({"cheap", "dear", "free"}))
    return Books(prices, metrics, count=tokenizer().count, clock=lambda: 1_767_225_600.0)


def reserve(books: Books, *names: str) -> tuple[Reservation, Trace, tuple[Priced, ...]]:
    request = ChatRequest.parse(json.dumps(chat(True)).encode())
    quote = books.quote(request, [candidate(name) for name in names])
    trace = Trace("req_1", 0.0)
    return Reservation(books, quote, trace), trace, quote.priced


def observe(meter: Meter, *chunks: bytes) -> None:
    for each in chunks:
        meter.observe(json.loads(each.removeprefix(b"data: ")))


async def test_what_was_not_sent_costs_nothing(books: Books) -> None:
    reservation, trace, priced = reserve(books, "a/cheap")
    with pytest.raises(UpstreamFailed):
        async with reservation:
            assert books.metrics.holds_open.value == 1
            reservation.attempt(priced[0])
            raise UpstreamFailed("no connection")
    assert (trace.outcome, trace.cost_nanos, trace.source) == ("failed", 0, "")
    assert books.metrics.holds_open.value == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ConnectionResetError("gone")])
async def test_a_client_that_is_gone_has_left_however_that_was_noticed(
    books: Books, error: BaseException
) -> None:
    reservation, trace, priced = reserve(books, "a/cheap")
    with pytest.raises(type(error)):
        async with reservation:
            meter = reservation.attempt(priced[0])
            reservation.sent()
            reservation.answering()
            observe(meter, delta(TEXT))
            raise error
    assert (trace.outcome, trace.source) == ("client_left", "counted")
    assert trace.cost_nanos == PROMPT * 1_000 + TEXT_TOKENS * 2_000


async def test_a_reservation_is_settled_once(books: Books) -> None:
    reservation, trace, priced = reserve(books, "a/cheap")
    async with reservation:
        meter = reservation.attempt(priced[0])
        reservation.sent()
        reservation.answering()
        observe(meter, delta(TEXT), STOP)
        reservation.settle()
        first = trace.cost_nanos
        # Whatever is heard after the settlement changes nothing any more.
        observe(meter, delta(TEXT), BIG)
        reservation.outcome = Outcome.TRUNCATED
        reservation.settle()
    assert (trace.outcome, trace.cost_nanos) == ("completed", first)
    assert books.metrics.holds_open.value == 0
    assert books.metrics.settlement("completed").value == 1
    assert books.metrics.settlement("truncated").value == 0


async def test_each_unanswered_attempt_is_paid_for_at_its_own_price(books: Books) -> None:
    reservation, trace, priced = reserve(books, "a/cheap", "b/dear", "c/free")
    async with reservation:
        for each in priced[:2]:
            reservation.attempt(each)
            reservation.sent()
            reservation.unanswered()
        reservation.attempt(priced[2])
        reservation.sent()
        reservation.refused()
    assert trace.outcome == "unknown"
    assert (trace.source, trace.cost_nanos) == ("estimated", PROMPT * 11_000)
    assert trace.tokens == (2 * PROMPT, 0, 0, 0, 0)


async def test_an_answer_after_unanswered_attempts_is_completed(books: Books) -> None:
    reservation, trace, priced = reserve(books, "a/cheap", "b/dear")
    async with reservation:
        reservation.attempt(priced[0])
        reservation.sent()
        reservation.unanswered()
        meter = reservation.attempt(priced[1])
        reservation.sent()
        reservation.answering()
        observe(meter, delta(TEXT), STOP, BIG)
    assert (trace.outcome, trace.source) == ("completed", "provider")
    assert trace.cost_nanos == PROMPT * 1_000 + 100 * 10_000 + 50 * 20_000
    assert trace.tokens == (PROMPT + 100, 0, 0, 50, 0)
    assert books.metrics.settlement("completed").value == 1


async def test_a_request_sent_again_on_a_fresh_connection_is_one_attempt(books: Books) -> None:
    reservation, trace, priced = reserve(books, "a/cheap")
    async with reservation:
        reservation.attempt(priced[0])
        reservation.sent()
        meter = reservation.attempt(priced[0])
        reservation.sent()
        reservation.answering()
        observe(meter, delta("Hi"), STOP)
    assert (trace.outcome, trace.cost_nanos) == ("completed", PROMPT * 1_000 + 2_000)


async def test_a_price_of_zero_is_settled_like_any_other(books: Books) -> None:
    reservation, trace, priced = reserve(books, "c/free")
    async with reservation:
        meter = reservation.attempt(priced[0])
        reservation.sent()
        reservation.answering()
        observe(meter, STOP, BIG)
    assert (trace.outcome, trace.source, trace.cost_nanos) == ("completed", "provider", 0)
    assert trace.tokens == (100, 0, 0, 50, 0)


async def test_a_prompt_too_large_to_count_is_estimated_by_its_bytes(books: Books) -> None:
    text = "word " * 80_000
    request = ChatRequest.parse(
        json.dumps(chat(messages=[{"role": "user", "content": text}])).encode()
    )
    quote = books.quote(request, [candidate("a/cheap")])
    trace = Trace("req_1", 0.0)
    async with books.reserve(None, quote, trace) as reservation:
        reservation.attempt(quote.priced[0])
        reservation.sent()
    assert trace.tokens is not None
    assert trace.tokens[0] == pytest.approx(100_000, rel=0.06)
    assert trace.tokens[0] >= (request.size_bytes + 3) // 4


def test_what_has_no_price_is_not_quoted(books: Books) -> None:
    request = ChatRequest.parse(json.dumps(chat()).encode())
    quote = books.quote(request, [candidate("x/unknown"), candidate("b/dear")])
    assert [each.candidate.model for each in quote.priced] == ["dear"]
    with pytest.raises(ModelNotPriced):
        books.quote(request, [candidate("x/unknown")])
