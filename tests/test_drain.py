"""The end of a process: nobody is dropped who could be answered, and nothing is left unsaid."""

import asyncio
import os
import socket
import time
from pathlib import Path

import aiohttp
import pytest

from gwproxy.demo import DemoUpstream
from tests.conftest import StartGateway
from tests.harness import (
    ADMIN,
    CONFIG,
    DONE,
    UPSTREAM_TOKEN,
    Gateway,
    Received,
    Upstream,
    Wire,
    bearer,
    chat,
    delta,
    usage_only,
)
from tests.office import Disk
from tests.outages import Crowd, assert_ledger, crowd, prepared
from tests.raw import connect, get, post, prompt
from tests.scene import until


class Slow:
    """Streams that begin, and end when they are let."""

    def __init__(self) -> None:
        self.begun = 0
        self.go_on = asyncio.Event()

    async def __call__(self, wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(delta("Hel"))
        self.begun += 1
        await self.go_on.wait()
        for data in (delta("lo."), delta(finish="stop"), usage_only(), DONE):
            await wire.chunk(data)
        await wire.end()


async def test_an_inherited_socket_is_left_at_once_to_whoever_comes_next(
    tmp_path: Path, upstream: Upstream
) -> None:
    upstream.script = slow = Slow()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        _, port = listening.getsockname()

        async def started(name: str) -> Gateway:
            (tmp_path / name).mkdir()
            text = CONFIG.format(upstream=upstream.url, more="")
            fd = os.dup(listening.fileno())
            gateway = Gateway(tmp_path / name, text.replace('"127.0.0.1:0"', f'"fd:{fd}"'))
            await gateway.start_server()
            return gateway

        first = await started("first")
        key = await first_key(first)
        async with connect(port) as idle, connect(port) as streaming:
            idle.send(get("/health"))
            assert (await idle.answer()).status == 200
            streaming.send(post(prompt(stream=True), key=key))
            await until(lambda: slow.begun == 1)
            assert first.app is not None
            stop = asyncio.get_running_loop().create_task(first.close())
            assert await idle.rest() == b""  # it is closed, while the stream goes on
            async with connect(port) as waiting:
                waiting.send(get("/health"))
                await asyncio.sleep(0.05)  # nobody answers: that takes time to see
                assert not stop.done()
                second = await started("second")
                assert (await waiting.answer()).status == 200
            slow.go_on.set()
            answer = await streaming.answer()
            assert answer.body.endswith(DONE)
            assert await streaming.rest() == b""
            await stop
        await second.close()


async def first_key(gateway: Gateway) -> str:
    assert gateway.app is not None
    directory = gateway.app._store.directory
    await directory.create_user(user_id="alice")
    _, text = await directory.create_key("alice")
    return text


async def test_what_cannot_be_settled_at_the_end_is_named_and_settled_by_the_next(
    tmp_path: Path, start_gateway: StartGateway, upstream: Upstream
) -> None:
    upstream.script = slow = Slow()
    front = await start_gateway()
    streams = [await front.chat(chat(True, max_tokens=20)) for _ in range(2)]
    await until(lambda: slow.begun == 2)
    app = front.gateway.app
    assert app is not None
    ids = [stream.headers["x-request-id"] for stream in streams]
    disk = app._store.journal.files = Disk()
    disk.full = True
    front.gateway._closed = True
    assert sorted(await app.stop()) == sorted(ids)
    front.gateway.log.stop()

    again = Gateway(front.gateway.database.parent, front.gateway._config)
    await again.start_server()
    try:
        assert again.app is not None
        ledger = again.app._store.ledger
        found = [ledger.find(request_id) for request_id in ids]
        assert [each.outcome for each in found if each] == ["recovered", "recovered"]
    finally:
        await again.close()


async def test_all_streams_under_way_end_whole_within_the_limit(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    upstream.script = slow = Slow()
    front = await start_gateway(GWPROXY__SERVER__DRAIN_S="20")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(front.url, connector=connector) as session:

        async def ask() -> aiohttp.ClientResponse:
            return await session.post(
                "/v1/chat/completions", json=chat(True), headers=bearer(front.key)
            )

        answers = await asyncio.gather(*(ask() for _ in range(200)))
        await until(lambda: slow.begun == 200, 20)
        app = front.gateway.app
        assert app is not None
        front.gateway._closed = True
        stop = asyncio.get_running_loop().create_task(app.stop())
        await asyncio.sleep(0)
        slow.go_on.set()
        texts = await asyncio.gather(*(answer.text() for answer in answers))
        assert all(text.endswith("data: [DONE]\n\n") for text in texts)
        assert await stop == []
    front.gateway.log.stop()


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_two_hundred_streams_end_or_are_settled_when_the_process_is_told_to_stop(
    tmp_path: Path,
) -> None:
    """The real process: exit code 0, and every stream in the ledger at what its client got."""
    record = tmp_path / "record.jsonl"
    demo = DemoUpstream(token=UPSTREAM_TOKEN, record_file=record)
    await demo.start()
    place = prepared(tmp_path / "place", demo)
    config = place.folder / "config.toml"
    config.write_text(config.read_text().replace("drain_s = 1", "drain_s = 4"))
    models = ("mock/prose+len-60+slow-50", "mock/prose+len-2000+slow-50")
    async with place.life() as life:
        async with crowd(place, life, callers=0) as callers, asyncio.TaskGroup() as group:
            for number in range(200):
                asked = callers.ask("open", stream=True, model=models[number % 2])
                group.create_task(asked)
            async with asyncio.timeout(30):
                while True:
                    if await metric(callers, "gwproxy_streams_open") == 200:
                        break
                    await asyncio.sleep(0.05)  # no event tells of a stream
            began = time.monotonic()
            life.ask_to_end()
        assert await life.ended() == 0, place.log.read_text()
        took_s = time.monotonic() - began
    await demo.stop()
    outcomes = await assert_ledger(place, demo, record, callers.got)
    assert set(outcomes) == {"completed", "cut"} and outcomes.total() == 200, outcomes
    assert outcomes["cut"] >= 100, "half of them are too long for it"
    assert took_s < 12, took_s
    print(f"\n200 streams at SIGTERM: {dict(outcomes)}, ended after {took_s:.1f} s, exit code 0")


async def metric(callers: Crowd, name: str) -> float:
    async with callers.session.get("/metrics", headers=ADMIN) as answer:
        text = await answer.text()
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])
