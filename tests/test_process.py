"""The process itself: a new configuration in force without a dropped stream, backups when asked."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gwproxy.app import App
from gwproxy.config import Config, load
from gwproxy.core.routing import CATALOGUE
from gwproxy.storage.backup import checked
from tests.conftest import Front, StartGateway
from tests.harness import (
    ADMIN,
    ADMIN_KEY,
    CONFIG,
    DONE,
    UPSTREAM_TOKEN,
    Received,
    Upstream,
    Wire,
    bearer,
    chat,
    delta,
    usage_only,
)
from tests.kills import ROOT
from tests.scene import until


def rewritable(front: Front, upstream: Upstream) -> Any:
    """What gives the running gateway another configuration file."""
    app = front.gateway.app
    assert app is not None
    path = front.gateway.database.parent / "config.toml"

    def source() -> Config:
        return load(path, front.gateway._environ, catalogue=CATALOGUE)

    app._source = source

    def write(more: str, text: str = CONFIG) -> App:
        path.write_text(text.format(upstream=upstream.url, more=more))
        return app

    return write


async def test_new_limits_and_a_new_provider_are_in_force_and_no_stream_is_dropped(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    write = rewritable(front, upstream)
    go_on = asyncio.Event()

    async def slow(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(delta("Hel"))
        await go_on.wait()
        for data in (delta("lo."), delta(finish="stop"), usage_only(), DONE):
            await wire.chunk(data)
        await wire.end()

    upstream.queue = [slow] * 20
    streams = [await front.chat(chat(True)) for _ in range(20)]
    write(
        f"""
[providers.second]
base_url = "{upstream.url}"
flavour = "openai"
model = "other"
daily_usd = "0.000001"
[prices.models."second/*"]
input = "3.00"
output = "4.00"
[limits]
max_body_bytes = 2048
"""
    )
    answer = await front.client.post("/admin/reload", headers=ADMIN)
    assert (answer.status, await answer.json()) == (200, {"needs_restart": []})
    [line] = await front.gateway.lines("configuration reloaded")
    assert line["level"] == "info"

    too_large = await front.chat(chat(messages=[{"role": "user", "content": "x" * 4096}]))
    assert too_large.status == 413
    refused = await front.chat(chat(model="second/other", max_tokens=1))
    error = (await refused.json())["error"]
    assert (refused.status, error["gateway"]["scope"]) == (429, "provider")
    listed = await front.client.get("/v1/models", headers=bearer(front.key))
    assert "second/other" in await listed.text()
    go_on.set()
    for stream in streams:
        text = await stream.text()
        assert text.endswith("data: [DONE]\n\n") and '"lo."' in text
    write('[prices.models."mock/none"]\ninput = "1"\noutput = "1"')
    await front.client.post("/admin/reload", headers=ADMIN)
    gone = await front.chat(chat(model="second/other"))
    assert (await gone.json())["error"]["code"] == "model_not_priced"


async def test_a_file_that_is_wrong_changes_nothing_and_says_what_is_wrong(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    app = rewritable(front, upstream)("[limits]\nmax_body_byte = 1\n")
    before = app.config
    answer = await front.client.post("/admin/reload", headers=ADMIN)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "invalid_configuration")
    assert "max_body_bytes" in error["message"]
    assert app.config is before
    assert (await front.chat(chat())).status == 200
    assert (await front.client.post("/admin/reload")).status == 401


async def test_what_cannot_change_while_it_runs_is_named_and_stays(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    text = CONFIG.replace('"127.0.0.1:0"', '"127.0.0.1:1"')
    rewritable(front, upstream)('[storage]\npath = "other.db"', text)
    answer = await front.client.post("/admin/reload", headers=ADMIN)
    assert (await answer.json())["needs_restart"] == ["[server] listen", "[storage]"]
    assert (await front.chat(chat())).status == 200
    answer = await front.client.post("/admin/reload", headers=ADMIN)
    assert (await answer.json())["needs_restart"] == ["[server] listen", "[storage]"]


async def test_a_signal_reloads_too_and_a_wrong_file_does_not_end_the_process(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    app = rewritable(front, upstream)("[limits]\nmax_body_bytes = 0\n")
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(app.run(stopping))
        app.ask_to_reload()
        [line] = await front.gateway.lines("configuration not reloaded")
        assert "max_body_bytes" in line["message"]
        rewritable(front, upstream)("[limits]\nmax_body_bytes = 1024\n")
        app.ask_to_reload()
        await front.gateway.lines("configuration reloaded")
        stopping.set()
    assert app.config.limits.max_body_bytes == 1024


async def test_a_hangup_while_it_starts_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(upstream="http://127.0.0.1:9/v1", more=""))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gwproxy", "serve", "--config", str(path)),
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "GWPROXY_ADMIN_KEY": ADMIN_KEY,
            "UPSTREAM_TOKEN": UPSTREAM_TOKEN,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None

    async def hang_up() -> None:
        await until(lambda: _heeds(process.pid, signal.SIGTERM))  # before, it is no server yet
        while process.returncode is None:
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.01)

    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            hanging_up = group.create_task(hang_up())
            assert (await process.stdout.readline()).startswith(b"gwproxy ready")
            hanging_up.cancel()
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _heeds(pid: int, number: int) -> bool:
    """Whether the process catches or ignores the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn", "SigCgt"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


async def test_a_backup_is_made_when_it_is_asked_for(front: Front) -> None:
    assert (await front.chat(chat())).status == 200
    assert front.gateway.app is not None
    store = front.gateway.app._store
    await until(lambda: store.writer.applied == store.ledger.state.lsn, 10)
    answer = await front.client.post("/admin/backup", headers=ADMIN)
    made = await answer.json()
    assert answer.status == 201
    assert checked(Path(made["file"])).lsn == made["as_of_lsn"] > 0
    assert Path(made["file"]).parent == front.gateway.database.parent / "journal"
