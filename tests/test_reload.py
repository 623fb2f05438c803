"""A new configuration for the real process, with streams under way: what changes, and what not."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gwproxy.demo import DemoUpstream
from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN
from tests.kills import ROOT, Life, Place
from tests.outages import Crowd, assert_ledger, crowd, prepared
from tests.scene import until

STREAMS = 40
TOKENS = 120
LONG = f"mock/prose+len-{TOKENS}+slow-50"
"""Six seconds: time for four reloads."""

SECOND = '[providers.second]\nprefix = "mock"\n'


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


@pytest_asyncio.fixture
async def demo(record: Path) -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=UPSTREAM_TOKEN, record_file=record)
    await demo.start()
    yield demo
    await demo.stop()


async def typed(place: Place, life: Life) -> tuple[int, str]:
    """`gwproxy reload`: its exit code, and what it says."""
    command = [sys.executable, "-m", "gwproxy", "reload", "--url", life.url]
    process = await asyncio.create_subprocess_exec(
        *(*command, "--config", str(place.folder / "config.toml")),
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "GWPROXY_ADMIN_KEY": ADMIN_KEY,
            "UPSTREAM_TOKEN": UPSTREAM_TOKEN,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_changed_bootstrap_key_is_taken_over_by_the_command_that_a_refusal_tells(
    tmp_path: Path, demo: DemoUpstream
) -> None:
    """The command reads the new key, and the server still has the old one."""
    place = prepared(tmp_path / "place", demo, 1)
    secret = tmp_path / "admin-key"
    secret.write_text(ADMIN_KEY)
    config = place.folder / "config.toml"
    config.write_text(config.read_text().replace("env:GWPROXY_ADMIN_KEY", f"file:{secret}"))
    new = "another-bootstrap-key-of-32-characters"
    async with place.life() as life:
        assert await life.ready()
        secret.write_text(new)
        code, said = await typed(place, life)
        assert code == 2, said
        [cure] = re.findall(r"kill -HUP \d+", said)
        assert cure == f"kill -HUP {life.process.pid}"
        os.kill(int(cure.split()[-1]), signal.SIGHUP)
        await told(place, "configuration reloaded")
        assert await typed(place, life) == (0, "The configuration is in force.\n")
        await life.stop()


async def told(place: Place, event: str, count: int = 1) -> str:
    """The log's last line of this event, as soon as there are so many of them."""
    found: list[str] = []

    def there() -> bool:
        lines = place.log.read_text().splitlines()
        found[:] = [line for line in lines if f'"event":"{event}"' in line]
        return len(found) == count

    await until(there, 20)
    return found[-1]


async def answered(callers: Crowd, model: str) -> tuple[int, str]:
    """The status, and whose limit it was that refused."""
    answer = await callers.ask("shut", model=model)
    assert answer is not None
    return answer.status, answer.scope


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_limits_and_providers_change_under_streams_and_not_one_is_dropped(
    tmp_path: Path, demo: DemoUpstream, record: Path
) -> None:
    place = prepared(tmp_path / "place", demo)
    config = place.folder / "config.toml"
    before = config.read_text()
    mock = '[providers.mock]\nprefix = "mock"\n'
    assert mock in before
    # Less than the streams have set aside already.
    after = before.replace(mock, f'{mock}daily_usd = "0.000001"\n{SECOND}')
    async with place.life() as life:
        async with crowd(place, life, callers=0) as callers, asyncio.TaskGroup() as group:
            streams = [
                group.create_task(callers.ask("open", stream=True, model=LONG))
                for _ in range(STREAMS)
            ]
            await until(lambda: sum(each.status == 200 for each in callers.got) == STREAMS, 20)
            assert await answered(callers, "mock/prose") == (200, "")
            assert await answered(callers, "second/prose") == (404, "")

            config.write_text(after)
            life.process.send_signal(signal.SIGHUP)
            await told(place, "configuration reloaded")
            assert await answered(callers, "mock/prose") == (429, "provider")
            assert await answered(callers, "second/prose") == (200, "")

            # What is wrong is refused with its reason, and what was in force stays so.
            config.write_text(before.replace('prefix = "mock"', 'prefixes = "mock"'))
            life.process.send_signal(signal.SIGHUP)
            assert "prefixes" in await told(place, "configuration not reloaded")
            code, said = await typed(place, life)
            assert code != 0 and "prefixes" in said and "Traceback" not in said, said
            assert await answered(callers, "mock/prose") == (429, "provider")
            assert await answered(callers, "second/prose") == (200, "")

            config.write_text(before)
            code, said = await typed(place, life)
            assert code == 0, said
            assert await answered(callers, "mock/prose") == (200, "")
            assert await answered(callers, "second/prose") == (404, "")
            assert not any(stream.done() for stream in streams), "they had ended before"
        await life.stop()
    long = [each for each in callers.got if each.model == LONG]
    # The crowd takes one event for the role's own, whether it is or not.
    assert [(each.whole, each.tokens) for each in long] == [(True, TOKENS - 1)] * STREAMS
    outcomes = await assert_ledger(place, demo, record, callers.got)
    assert outcomes == {"completed": STREAMS + 4}
