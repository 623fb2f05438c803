"""The gateway as systemd starts it: the environment of the shipped unit, an inherited socket, the
secrets as credentials, and somebody who listens to what it tells. Only the supervisor is ours."""

import asyncio
import configparser
import ctypes
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN
from tests.raw import PATIENCE_S

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "systemd" / "gwproxy.service"
SOCKET = ROOT / "systemd" / "gwproxy.socket"

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65  # Linux 6.3; elsewhere it is refused, and the process runs without


class Unit(configparser.RawConfigParser):
    """A unit file, in which a key may stand more than once."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, dict_type=_Many, comment_prefixes=("#",), delimiters=("=",))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read(path)

    def all(self, section: str, key: str) -> list[str]:
        return [line for line in self.get(section, key, fallback="").split("\n") if line]


class _Many(dict):  # type: ignore[type-arg]
    """Where a value is given twice, both are kept: one line each, as configparser joins them."""

    def __setitem__(self, key: object, value: object) -> None:
        if isinstance(value, list) and isinstance(self.get(key), list):
            value = self[key] + value
        super().__setitem__(key, value)


def environment_of_the_unit() -> dict[str, str]:
    pairs = (line.partition("=") for line in Unit(SERVICE).all("Service", "Environment"))
    return {name: value for name, _, value in pairs}


class Process:
    """One life of the service. `told` is what it has said to its supervisor, word by word."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


class Supervisor:
    """What stays while the service comes and goes: its socket, its state, its ear."""

    def __init__(self, folder: Path, upstream: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.told: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self.ear = folder / "notify"
        self.credentials = folder / "credentials"
        self.state = folder / "state"
        for made in (self.credentials, self.state):
            made.mkdir()
        for name, secret in (("cloudflare-token", UPSTREAM_TOKEN), ("admin-key", ADMIN_KEY)):
            (self.credentials / name).write_text(secret + "\n")
        self.listening = socket.socket()
        self.listening.bind(("127.0.0.1", 0))
        self.listening.listen(4096)
        self.port: int = self.listening.getsockname()[1]
        self._upstream = upstream

    @property
    def environ(self) -> dict[str, str]:
        """What systemd would set, besides the listening socket's own variables."""
        return {
            **environment_of_the_unit(),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "CREDENTIALS_DIRECTORY": str(self.credentials),
            "STATE_DIRECTORY": str(self.state),
            "NOTIFY_SOCKET": str(self.ear),
            "CLOUDFLARE_ACCOUNT_ID": "0" * 32,
            "CLOUDFLARE_GATEWAY_ID": "default",
            "GWPROXY__UPSTREAM__BASE_URL": self._upstream,
            "GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES": "1048576",
            "GWPROXY__SERVER__DRAIN_S": "2",
            "GWPROXY__PROVIDERS__OPENAI__RPM": "1000000",  # a load is not what it limits here
        }

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "gwproxy", "serve", "--config", str(ROOT / "config.toml")]

    @asynccontextmanager
    async def life(self, *wrapper: str, **environ: str) -> AsyncIterator[Process]:
        """The service, from its start on; it does not outlive the `with`."""
        number = self.listening.fileno()
        # The shell becomes the service: its number is the one that the variables have to name.
        shell = f'export LISTEN_PID=$$ LISTEN_FDS=1 WATCHDOG_PID=$$; exec "$@" 3<&{number}'
        async with self.process("bash", "-c", shell, "sh", *wrapper, **environ) as process:
            yield process

    @asynccontextmanager
    async def process(self, *wrapper: str, **environ: str) -> AsyncIterator[Process]:
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(*wrapper, *self.command),
                env=self.environ | environ,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                pass_fds=(self.listening.fileno(),),
                start_new_session=True,
                preexec_fn=_confined,
            )
        try:
            yield Process(process)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def hears(self, word: str) -> dict[str, str]:
        """The next message that has this word."""
        async with asyncio.timeout(PATIENCE_S):
            while word not in (message := await self.told.get()):
                pass
        return message


class _Ear(asyncio.DatagramProtocol):
    def __init__(self, told: asyncio.Queue[dict[str, str]]) -> None:
        self.told = told

    def datagram_received(self, data: bytes, addr: object) -> None:
        lines = (line.partition("=") for line in data.decode().splitlines())
        self.told.put_nowait({name: value for name, _, value in lines})


@asynccontextmanager
async def supervising(folder: Path, upstream: str) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(folder, upstream)
    with _bound(supervisor.ear) as ear:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Ear(supervisor.told), sock=ear
        )
        try:
            yield supervisor
        finally:
            transport.close()
            supervisor.listening.close()


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    ear.bind(str(path))
    yield ear


def _confined() -> None:
    """Of the unit's confinement, what a process can lay upon itself: no new privileges, no memory
    that is both written and run. And it does not outlive a test that is killed."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(_PR_SET_MDWE, 1, 0, 0, 0)
