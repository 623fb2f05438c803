"""Many streams at once: each client gets every byte of its own stream, and nothing is left over."""

import asyncio
import json
import resource

import pytest

from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, DONE, Received, Upstream, Wire, chat, delta, usage_only

EVENTS = 10


def of_stream(number: int) -> list[bytes]:
    texts = [delta(f" {number}.{position}") for position in range(EVENTS)]
    return [*texts, delta(finish="stop"), usage_only(), DONE]


async def run(front: Front, upstream: Upstream, streams: int) -> None:
    """Open all, hold them open until the last one is, then let them end."""
    opened = 0
    all_open = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        nonlocal opened
        events = of_stream(received.json["seed"])
        await wire.start()
        await wire.chunk(events[0])
        opened += 1
        if opened == streams:
            all_open.set()
        await all_open.wait()
        for event in events[1:]:
            await wire.chunk(event)
        await wire.end()

    async def client(number: int) -> bool:
        response = await front.chat(chat(stream=True, seed=number))
        body = await response.read()
        events = of_stream(number)
        events.remove(usage_only())  # asked for by the gateway alone
        return response.status == 200 and body == b"".join(events)

    upstream.script = script
    whole = await asyncio.gather(*(client(number) for number in range(streams)))
    assert sum(whole) == streams
    lines = await front.gateway.request_line(least=streams)
    assert lines["outcome"] == "completed"
    scraped = await (await front.client.get("/metrics", headers=ADMIN)).text()
    assert "gwproxy_streams_open 0.0" in scraped
    assert "gwproxy_holds_open 0.0" in scraped
    assert f'gwproxy_settlements_total{{outcome="completed"}} {float(streams)}' in scraped


async def test_two_hundred_streams_at_once_are_whole(front: Front, upstream: Upstream) -> None:
    front.client.session.connector._limit = 0  # the test's own client keeps to 100 otherwise
    await run(front, upstream, 200)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_two_thousand_streams_at_once_are_whole(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 10_000:
        pytest.skip(f"needs 10,000 open files, and this machine allows {most}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # The journal keeps room for the settlement of each of them.
    front = await start_gateway(GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES=str(16 << 20))
    front.client.session.connector._limit = 0
    await run(front, upstream, 2_000)
    assert json.dumps(front.gateway.written.getvalue()).count("stream_interrupted") == 0
