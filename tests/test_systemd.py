"""The shipped units, and the service under a supervisor that speaks systemd's protocol."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gwproxy.cli.serve import REFUSED_START_S, WRONG_CONFIGURATION
from gwproxy.config import load
from gwproxy.core.routing import CATALOGUE
from gwproxy.notify import BEATS_PER_PERIOD
from tests import raw
from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN, Received, Upstream, Wire, chat, events
from tests.raw import PATIENCE_S, Peer, connect, get, post
from tests.scene import until
from tests.supervised import (
    ROOT,
    SERVICE,
    SOCKET,
    Unit,
    environment_of_the_unit,
    supervising,
)

MODEL = "openai/gpt-4o-mini"


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} comes with systemd, which this machine does not have")
    return found


async def ask(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own."""
    async with connect(port) as peer:
        peer.send(data)
        answer = await peer.answer()
    return answer.status, {name.lower(): value for name, value in answer.fields}, answer.body


async def new_key(port: int) -> str:
    """A user's key, made with the admin key that came as a credential."""
    user = json.dumps({"user_id": "alice"}).encode()
    assert (await ask(port, post(user, key=ADMIN_KEY, path="/admin/users")))[0] == 201
    made = post(b"{}", key=ADMIN_KEY, path="/admin/users/alice/api-keys")
    status, _, body = await ask(port, made)
    assert status == 201
    key: str = json.loads(body)["api_key"]
    return key


def question(stream: bool = False) -> bytes:
    return json.dumps(chat(stream, model=MODEL)).encode()


# -- the files -------------------------------------------------------------------------------------


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    program = tmp_path / "gwproxy"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = SERVICE.read_text()
    installed = "/opt/gwproxy/.venv/bin/gwproxy"
    assert installed in text
    (tmp_path / SERVICE.name).write_text(text.replace(installed, str(program)))
    shutil.copy(SOCKET, tmp_path)
    files = [str(tmp_path / each.name) for each in (SERVICE, SOCKET)]
    checked = subprocess.run([analyze, "verify", *files], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_service_is_exposed_to_little() -> None:
    checked = subprocess.run(
        [tool("systemd-analyze"), "security", "--offline=true", "--threshold=15", str(SERVICE)],
        capture_output=True,
        text=True,
    )
    overall = re.search(r"Overall exposure level for \S+: ([\d.]+)", checked.stdout)
    assert overall is not None, checked.stderr
    assert float(overall[1]) <= 1.5
    assert checked.returncode == 0


def test_the_journal_can_still_tell_one_boot_of_the_machine_from_the_next() -> None:
    """With ProcSubset=pid there would be no /proc/sys to read the boot's id from."""
    assert not Unit(SERVICE).all("Service", "ProcSubset")


def test_the_units_own_settings_are_settings(tmp_path: Path) -> None:
    names = {line.partition(":")[0] for line in Unit(SERVICE).all("Service", "LoadCredential")}
    assert names == {"cloudflare-token", "admin-key"}
    for name in names:
        (tmp_path / name).write_text(ADMIN_KEY)
    environ = {
        **environment_of_the_unit(),
        "CREDENTIALS_DIRECTORY": str(tmp_path),
        "CLOUDFLARE_ACCOUNT_ID": "0" * 32,
        "CLOUDFLARE_GATEWAY_ID": "default",
    }
    config = load(ROOT / "config.toml", environ, catalogue=CATALOGUE)
    assert str(config.server.listen) == "fd:3"
    for secret in (config.upstream.token, config.admin.key):
        assert secret is not None
        assert secret.reveal() == ADMIN_KEY


def test_the_socket_is_where_the_configuration_has_the_server() -> None:
    """So that the commands, which read the configuration alone, find it."""
    (address,) = Unit(SOCKET).all("Socket", "ListenStream")
    assert f'listen = "{address}"' in (ROOT / "config.toml").read_text()


# -- a life of the service -------------------------------------------------------------------------


async def test_a_service_says_that_it_is_ready_alive_and_on_its_way_out(
    tmp_path: Path, upstream: Upstream
) -> None:
    period_s = 0.3
    async with (
        supervising(tmp_path, upstream.url) as supervisor,
        connect(supervisor.port) as early,
    ):
        early.send(get("/health/ready"))  # the kernel keeps it until there is somebody
        watchdog = str(int(period_s * 1e6))
        async with supervisor.life(WATCHDOG_USEC=watchdog) as service:
            ready = await supervisor.hears("READY")
            assert ready == {"READY": "1", "STATUS": "0 requests open"}
            assert (await early.answer()).status == 200

            loop = asyncio.get_running_loop()
            await supervisor.hears("WATCHDOG")
            began = loop.time()
            for _ in range(2 * BEATS_PER_PERIOD):
                beat = await supervisor.hears("WATCHDOG")
                assert beat["STATUS"].endswith("open")
            assert loop.time() - began < 4 * period_s

            # The secrets came as files, and are those of the two sides.
            key = await new_key(supervisor.port)
            status, fields, _ = await ask(supervisor.port, post(question(), key=key))
            assert (status, fields["x-gateway-provider"]) == (200, "openai")
            token = upstream.received[-1].header("cf-aig-authorization")
            assert token == f"Bearer {UPSTREAM_TOKEN}"
            assert (supervisor.state / "gwproxy.db").is_file()

            service.signal(signal.SIGHUP)
            reloading = await supervisor.hears("RELOADING")
            assert abs(int(reloading["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < PATIENCE_S
            await supervisor.hears("READY")

            service.signal(signal.SIGTERM)
            stopping = await supervisor.hears("STOPPING")
            assert stopping["STATUS"] == "draining: 0 requests open"
            assert 2e6 < int(stopping["EXTEND_TIMEOUT_USEC"]) <= 60e6
            assert await service.ended() == 0
    for secret in (ADMIN_KEY, UPSTREAM_TOKEN, key):
        assert secret not in supervisor.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_a_service_that_stands_still_gives_no_sign_and_what_it_had_is_settled_by_the_next(
    tmp_path: Path, upstream: Upstream
) -> None:
    began = asyncio.Event()

    async def never_ends(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(events("Hel", "lo.")[0])
        began.set()
        await wire.gone.wait()

    async with supervising(tmp_path, upstream.url) as supervisor:
        async with supervisor.life(WATCHDOG_USEC="300000") as service:
            await supervisor.hears("READY")
            key = await new_key(supervisor.port)
            upstream.script = never_ends
            async with connect(supervisor.port) as peer:
                peer.send(post(question(stream=True), key=key))
                await began.wait()
                await supervisor.hears("WATCHDOG")
                service.signal(signal.SIGSTOP)
                while not supervisor.told.empty():
                    supervisor.told.get_nowait()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.6):
                        await supervisor.told.get()
                service.signal(signal.SIGABRT)  # what systemd sends a service that is late
                service.signal(signal.SIGCONT)
                assert await service.ended() == -signal.SIGABRT
        async with connect(supervisor.port) as waiting:
            waiting.send(get("/v1/usage", key=key))
            async with supervisor.life() as service:
                answer = await waiting.answer()
                assert answer.status == 200
                usage = answer.json
                service.signal(signal.SIGTERM)
                assert await service.ended() == 0
    assert [one["outcome"] for one in usage["requests"]] == ["recovered"]
    assert {scope["held_usd"] for scope in usage["scopes"]} == {"0.000000000"}


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_the_service_makes_no_call_that_its_filter_forbids(
    tmp_path: Path, upstream: Upstream
) -> None:
    """From its start to its end, one chat and one stream included, as the kernel saw it."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    allowed = set(system_calls("@system-service"))
    for line in Unit(SERVICE).all("Service", "SystemCallFilter"):
        if line.startswith("~"):
            allowed.difference_update(*map(system_calls, line[1:].split()))
    seen = tmp_path / "calls"
    async with (
        supervising(tmp_path, upstream.url) as supervisor,
        supervisor.life(strace, "-f", "-qq", "-o", str(seen)) as service,
    ):
        await supervisor.hears("READY")
        key = await new_key(supervisor.port)
        for stream in (False, True):
            sent = post(question(stream), key=key)
            assert (await ask(supervisor.port, sent))[0] == 200
        pid = int(seen.read_text().partition(" ")[0])
        os.kill(pid, signal.SIGTERM)
        assert await service.ended() == 0
    calls = set(re.findall(r"^\d+ +(\w+)\(", seen.read_text(), re.MULTILINE))
    assert {"accept4", "pwrite64", "sendto", "execve"} <= calls
    # As root, SQLite gives its files to the database's owner; the service is not root.
    assert calls - {"fchown"} <= allowed


def system_calls(name: str) -> Iterator[str]:
    """The calls of one of systemd's sets, those of its inner sets included."""
    listed = subprocess.run(
        [tool("systemd-analyze"), "syscall-filter", name], capture_output=True, text=True
    )
    for line in listed.stdout.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            yield from system_calls(word)
        elif word and not word.startswith("#"):
            yield word


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_a_broken_configuration_is_no_tight_loop_of_starts(
    tmp_path: Path, upstream: Upstream
) -> None:
    """The socket unit would start the service again at once for each client that waits."""
    async with (
        supervising(tmp_path, upstream.url) as supervisor,
        connect(supervisor.port) as waiting,
    ):
        waiting.send(get("/health"))
        began = time.monotonic()
        async with supervisor.life(GWPROXY__SERVER__DRAIN_S="soon") as service:
            assert await service.ended() == WRONG_CONFIGURATION
        assert time.monotonic() - began >= REFUSED_START_S
        assert "SERVER__DRAIN_S" in supervisor.log.read_text()
        prevented = Unit(SERVICE).all("Service", "RestartPreventExitStatus")
        assert prevented == [str(WRONG_CONFIGURATION)]
        async with supervisor.life(GWPROXY__SERVER__DRAIN_S="soon") as service:
            await until(lambda: supervisor.log.read_text().count("SERVER__DRAIN_S") == 2)
            began = time.monotonic()
            service.signal(signal.SIGTERM)
            assert await service.ended() == -signal.SIGTERM
            assert time.monotonic() - began < REFUSED_START_S / 2
        async with supervisor.life():  # mended: whoever waited is served
            assert (await waiting.answer()).status == 200


async def test_typed_by_somebody_a_broken_configuration_is_told_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gwproxy", "serve", "--config", str(tmp_path / "none.toml")),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == WRONG_CONFIGURATION
    assert time.monotonic() - began < REFUSED_START_S


# -- restarts --------------------------------------------------------------------------------------


class Load:
    """Clients that never stop asking, half of them on connections that they keep."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self.seen: Counter[str] = Counter()
        self.over = asyncio.Event()
        self._answered = asyncio.Condition()

    async def answered(self, more: int) -> None:
        """Wait until so many more have their answer."""
        until = self.seen["200"] + more
        async with self._answered:
            await self._answered.wait_for(lambda: self.seen["200"] >= until)

    async def come_and_go(self, stream: bool) -> None:
        while not self.over.is_set():
            async with connect(self._port) as peer:
                await self._ask(peer, stream)

    async def stay(self) -> None:
        while not self.over.is_set():
            async with connect(self._port) as peer:
                keep = True
                while keep and not self.over.is_set():
                    try:
                        keep = await self._ask(peer, stream=False)
                    except asyncio.IncompleteReadError as nothing:
                        # Both ends spoke at once: RFC 9112, 9.3.1 has clients ask again.
                        assert nothing.partial == b""
                        self.seen["crossed"] += 1
                        break
                    await asyncio.sleep(0.002)

    async def _ask(self, peer: Peer, stream: bool) -> bool:
        """True while the connection may be used again."""
        peer.send(post(question(stream), key=self._key))
        answer = await peer.answer()
        assert answer.status in (200, 503), answer.body
        if answer.status == 200 and stream:
            assert answer.body.endswith(b"data: [DONE]\n\n")
        if answer.status == 503:
            assert answer.code == "draining"
            assert answer.header("retry-after") == "1"
            assert answer.header("connection") == "close"
        async with self._answered:
            self.seen[str(answer.status)] += 1
            self._answered.notify_all()
        return answer.header("connection") != "close"


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_restarts_under_load_refuse_and_reset_nobody(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "PATIENCE_S", 40.0)  # a drain and a start pass before an answer
    restarts = 3
    async with supervising(tmp_path, upstream.url) as supervisor, asyncio.TaskGroup() as clients:
        load = None
        for life in range(restarts + 1):
            async with supervisor.life() as service:
                await supervisor.hears("READY")
                if load is None:
                    load = Load(supervisor.port, await new_key(supervisor.port))
                    asking = [
                        clients.create_task(work)
                        for number in range(8)
                        for work in (load.come_and_go(stream=bool(number % 2)), load.stay())
                    ]
                await load.answered(200)
                if life == restarts:
                    load.over.set()
                    await asyncio.wait(asking)
                service.signal(signal.SIGTERM)
                assert await service.ended() == 0
    # A refusal or a reset is an exception in a client's task, and ends this test. 503 is for those
    # whose connection was open when the service was told to stop: one for each client at most.
    assert load is not None
    assert load.seen.keys() <= {"200", "503", "crossed"}
    assert load.seen["200"] >= 200 * (restarts + 1)
    assert load.seen["503"] + load.seen["crossed"] <= restarts * len(asking)


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_the_first_connection_starts_the_service(tmp_path: Path, upstream: Upstream) -> None:
    activate = tool("systemd-socket-activate")
    async with supervising(tmp_path, upstream.url) as supervisor:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = [f"--setenv={name}={value}" for name, value in supervisor.environ.items()]
        async with supervisor.process(activate, f"--listen=127.0.0.1:{port}", *settings) as service:
            for _ in range(500):
                try:
                    status, _, body = await ask(port, get("/health"))
                    break
                except ConnectionRefusedError:  # systemd's own part is not listening yet
                    await asyncio.sleep(0.01)
            assert (status, body) == (200, b'{"status":"ok"}')
            await supervisor.hears("READY")
            service.signal(signal.SIGTERM)
            assert await service.ended() == 0
