"""Each row of the table of outcomes over real sockets: what the caller gets, whether the next
provider is asked, and what the breaker makes of it. What is expected is written down here by hand.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from gwproxy.demo.server import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import Received, Upstream, Wire, chat
from tests.scene import assert_nothing_left, in_chunks, sends, tick
from tests.test_failover import Pair, pair, second  # noqa: F401 fixtures

CHAIN = """
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "cloudflare-compat"
base_url = "{compat}"
token = "demo-token"
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.openai]
prefix = "openai"
model = "gpt-4o-mini"
"""

CALLER, POLICY, OPERATOR = "caller_error", "policy_block", "operator_fault"
THROTTLED, FAILURE = "throttled", "upstream_failure"

BAD = (502, "upstream_misconfigured")
NOBODY = (502, "all_providers_failed")
SLOW = (429, "rate_limit_exceeded")

CASES: dict[str, tuple[str, tuple[int, str | None]]] = {
    # fault: its meaning, and what the caller is told where there is nobody else
    "status-400": (CALLER, (400, "INVALID_ARGUMENT")),
    "status-404": (CALLER, (404, "NOT_FOUND")),
    "status-413": (CALLER, (413, "INTERNAL")),
    "status-422": (CALLER, (422, "INTERNAL")),
    "status-401": (OPERATOR, BAD),
    "status-402": (OPERATOR, BAD),
    "status-403": (OPERATOR, BAD),
    "status-408": (FAILURE, NOBODY),
    "status-409": (THROTTLED, SLOW),
    "status-429": (THROTTLED, SLOW),
    **{f"status-{status}": (FAILURE, NOBODY) for status in (500, 501, 502, 503, 504, 529)},
    **{f"status-{status}": (FAILURE, NOBODY) for status in range(520, 527)},
    **{f"code-{code}": (OPERATOR, BAD) for code in (2001, 2008, 2009, 2019, 2021, 2040, 2044)},
    **{f"code-{code}": (OPERATOR, BAD) for code in (9106, 10000, 1010)},
    **{f"code-{code}": (THROTTLED, SLOW) for code in (2003, 2018, 2041, 2045)},
    **{f"code-{code}": (FAILURE, NOBODY) for code in (2005, 7013)},
    **{f"code-{code}": (POLICY, (424, "content_blocked")) for code in (2016, 2017, 2029, 2030)},
    **{f"code-{code}": (CALLER, (404, "model_not_found")) for code in (7003, 7010)},
    "reset-before-headers": (FAILURE, NOBODY),
    "stall-before-headers": (FAILURE, NOBODY),
    "garbage": (FAILURE, NOBODY),
    "bad-json": (FAILURE, NOBODY),
    "redirect": (FAILURE, NOBODY),
    "gzip": (FAILURE, NOBODY),
    "header-bytes-300000": (FAILURE, NOBODY),
}
ONLY_STREAMS: dict[str, tuple[str, tuple[int, str | None]]] = {
    "error-first": (FAILURE, NOBODY),
    "eof-after-0": (FAILURE, NOBODY),
    "close-after-0": (FAILURE, NOBODY),
    "reset-after-0": (FAILURE, NOBODY),
    "stall-after-0": (FAILURE, NOBODY),
}


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream()
    await demo.start()
    yield demo
    await demo.stop()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_every_row_of_the_table(
    start_gateway: StartGateway, demo: DemoUpstream, stream: bool
) -> None:
    front = await start_gateway(config=CHAIN.format(compat=demo.compat_url), AI_PROVIDER="gemini",
                                AI_FALLBACK_PROVIDERS="openai")  # fmt: skip
    for fault, (meaning, told) in {**CASES, **(ONLY_STREAMS if stream else {})}.items():
        demo.clear()
        demo.script(provider="google-ai-studio", fault=fault, count=0)
        before = state_of(front)

        alone = await ask(front, demo, fault, chat(stream, model="gemini/gemini-2.5-flash"))
        error = (await alone.json())["error"]
        assert (alone.status, error["code"]) == told, fault
        assert alone.headers["Content-Type"] == "application/json", fault

        response = await ask(front, demo, fault, chat(stream, model="auto"))
        body = await response.read()
        moves_on = meaning in (THROTTLED, FAILURE)
        if moves_on:
            served = (response.status, response.headers["x-gateway-provider"])
            assert served == (200, "openai"), fault
            assert b"content" in body, fault
        else:
            assert response.status == told[0], fault
        asked = [line["provider"] for line in await demo.recorded(3 if moves_on else 2)]
        assert asked.count("openai") == moves_on, fault

        attempts, failures = state_of(front)
        assert {
            name: count - before[0][name]
            for name, count in attempts.items()
            if count != before[0][name]
        } == {meaning: 2}, fault
        assert failures - before[1] == (2 if meaning == FAILURE else 0), fault
    await front.gateway.request_line()
    app = front.gateway.app
    assert app is not None
    assert not app._store.ledger.state.holds


async def ask(front: Front, demo: DemoUpstream, fault: str, body: Any) -> Any:
    """The answer; where the fault is silence, more than any patience passes in a moment."""
    if not fault.startswith("stall"):
        return await front.chat(body)
    arrived = len(demo.requests) + 1
    async with asyncio.TaskGroup() as group:
        call = group.create_task(front.chat(body))
        await demo.received(arrived)
        tick(front, 700)
    return call.result()


def state_of(front: Front) -> tuple[dict[str, int], int]:
    """How gemini's attempts ended so far, and its failures in a row."""
    app = front.gateway.app
    assert app is not None
    providers = app._providers
    return providers.attempts("gemini"), providers.of("gemini").breaker.failures


async def test_no_connection_is_a_failure_and_costs_nothing(
    start_gateway: StartGateway, demo: DemoUpstream
) -> None:
    text = CHAIN.format(compat=demo.compat_url).replace(
        'model = "gemini-2.5-flash"', 'model = "gemini-2.5-flash"\nbase_url = "http://127.0.0.1:9"'
    )
    front = await start_gateway(config=text, AI_PROVIDER="gemini", AI_FALLBACK_PROVIDERS="openai")
    alone = await front.chat(chat(model="gemini/gemini-2.5-flash"))
    assert (alone.status, (await alone.json())["error"]["code"]) == NOBODY
    line = await front.gateway.request_line()
    assert (line["attempts"][0]["reason"], line["cost_nanos"]) == ("connect", 0)
    response = await front.chat(chat(model="auto"))
    assert response.headers["x-gateway-provider"] == "openai"


# -- an upstream that plays games ----------------------------------------------------------------


async def pours(wire: Wire, received: Received) -> None:
    """Three gigabytes, if anybody takes them."""
    await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3221225472\r\n\r\n")
    block = b"x" * (1 << 20)
    for _ in range(3072):
        await wire.send(block)


async def never_ends_its_head(wire: Wire, received: Received) -> None:
    await wire.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await wire.send(b"X-More: " + b"x" * 8000 + b"\r\n")


CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GAMES: dict[str, tuple[Any, str]] = {
    "3 GB": (pours, "too_large"),
    "an endless head": (never_ends_its_head, "garbage"),
    "no number in a chunk": (sends(CHUNKS + b"zz\r\n{}\r\n0\r\n\r\n"), "truncated"),
    "a negative chunk": (sends(CHUNKS + b"-1\r\n{}\r\n0\r\n\r\n"), "truncated"),
    "a chunk without its end": (sends(CHUNKS + b"2\r\n{}x\r\n0\r\n\r\n"), "truncated"),
    "a chunk above 64 bits": (sends(CHUNKS + b"1" + b"0" * 20 + b"\r\n{}"), "truncated"),
    "two lengths": (
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
        "garbage",
    ),
    "a length that is no number": (
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}"),
        "garbage",
    ),
    "HTTP/2": (sends(b"HTTP/2 200 OK\r\n\r\n"), "garbage"),
    "a protocol switch": (sends(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "garbage"),
    "a page": (
        sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"),
        "garbage",
    ),
    "nothing": (sends(b"HTTP/1.1 204 No Content\r\n\r\n"), "garbage"),
    "an elsewhere": (
        sends(b"HTTP/1.1 301 Moved\r\nLocation: http://[::1]:1/\r\nContent-Length: 0\r\n\r\n"),
        "bad_upstream",
    ),
}


@pytest.mark.parametrize("game", GAMES)
async def test_an_upstream_that_plays_games_is_left_for_the_next(
    pair: Pair,  # noqa: F811
    upstream: Upstream,
    game: str,
) -> None:
    front = await pair.open(GWPROXY__BREAKER__FAILURE_THRESHOLD="1000")
    pair.first.script, reason = GAMES[game]
    for number, stream in enumerate((False, True), start=1):
        response = await pair.ask(stream)
        assert (response.status, response.headers["x-gateway-provider"]) == (200, "second")
        line = await front.gateway.request_line(least=number)
        assert line["attempts"][0]["reason"] == reason
    await assert_nothing_left(front, pair.first, pair.second)


HELLO = b'{"choices":[{"message":{"role":"assistant","content":"Hi"}}]}'


async def test_http_1_0_is_understood(pair: Pair) -> None:  # noqa: F811
    await pair.open()
    answers = (
        sends(b"HTTP/1.0 200 OK\r\n\r\n" + HELLO, then=Wire.hang_up),
        sends(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(HELLO), HELLO)),
    )
    for script in answers:
        pair.first.script = script
        for stream in (False, True):
            response = await pair.ask(stream)
            assert response.headers["x-gateway-provider"] == "first"
            assert b"Hi" in await response.read()


async def test_a_type_that_does_not_fit_is_judged_by_what_it_holds(
    pair: Pair,  # noqa: F811
) -> None:
    """A completion is one whatever it is called; events where none were asked for are none."""
    await pair.open()
    named = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b"
    pair.first.script = sends(named % (len(HELLO), HELLO))
    response = await pair.ask()
    assert response.headers["x-gateway-provider"] == "first"
    assert response.headers["Content-Type"] == "application/json"
    events = in_chunks([b"data: " + HELLO + b"\n\n"])
    pair.first.script = sends(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + events
    )
    assert (await pair.ask()).headers["x-gateway-provider"] == "second"
