"""`python -m gwproxy demo` as somebody new to it would run it: real processes, their real output,
the printed commands typed in as they stand, and nothing left behind.
"""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from gwproxy.cli.demo import QUESTION

ROOT = Path(__file__).parent.parent
DEMO = [sys.executable, "-m", "gwproxy", "demo"]
PATIENCE_S = 60.0
SAID = "To know who is calling, to stop the spending before the money is gone"
HELLO = "Hello! I am the built-in demo upstream"


class Home:
    """A machine of one's own: a home and a temporary folder, both empty."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.scratch = folder / "scratch"
        self.home.mkdir()
        self.scratch.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        self.environ = {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.scratch),
            "PYTHONPATH": str(ROOT),
        }

    @property
    def left(self) -> list[Path]:
        return [*self.home.rglob("*"), *self.scratch.rglob("*")]

    def once(self, *more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*DEMO, "--once", *more],
            env=self.environ,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: int = taken.getsockname()[1]
        yield port


class Running:
    """A demo that stays up, and what it printed until it was ready."""

    def __init__(self, home: Home) -> None:
        self.home = home
        # A port of its own, so that these tests do not mind what else runs here.
        self.process = subprocess.Popen(
            [*DEMO, "--port", "0", "--quick"],
            env=home.environ,
            cwd=home.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.printed = self._until("Stop: Ctrl-C")

    def _until(self, words: str) -> str:
        assert self.process.stdout is not None
        printed = ""
        for line in self.process.stdout:
            printed += line
            if words in line:
                return printed
        raise AssertionError(f"it ended before it was ready:\n{printed}")

    @property
    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    @property
    def pair(self) -> dict[str, str]:
        return dict(re.findall(r"export (OPENAI_\w+)=(\S+)", self.printed))

    @property
    def curl(self) -> str:
        found = re.search(r"curl .*?'\n", self.printed.replace("\\\n", ""), re.DOTALL)
        assert found is not None
        return found[0]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def demo(home: Home) -> Iterator[Running]:
    running = Running(home)
    yield running
    running.end()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One demo for the tests that only use it."""
    running = Running(Home(tmp_path_factory.mktemp("lasting")))
    yield running
    running.end()


def gone(pids: list[int]) -> bool:
    """Whether all of them end, each watched by a descriptor of its own."""
    assert pids
    for pid in pids:
        try:
            watched = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ready, _, _ = select.select([watched], [], [], PATIENCE_S)
        os.close(watched)
        if not ready:
            return False
    return True


def test_it_shows_a_chat_and_how_to_go_on(home: Home) -> None:
    ran = home.once()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"> {QUESTION}\n{SAID}" in ran.stdout
    assert re.search(r"^gateway +http://127\.0\.0\.1:\d+$", ran.stdout, re.MULTILINE)
    assert "created   organization acme, user alice, key key_" in ran.stdout
    assert "x-gateway-provider: openai\n" in ran.stdout
    assert "x-gateway-mode: normal\n" in ran.stdout
    receipt = re.search(
        r"receipt: completed, \((\d+) input x 0.15 \+ (\d+) output x 0.60\) .* = (\S+) USD",
        ran.stdout,
    )
    assert receipt is not None
    assert int(receipt[1]) > 10
    assert int(receipt[2]) > 40
    assert float(receipt[3]) > 0
    assert "admitted 5, refused 45, spent 5.000000000 USD\n" in ran.stdout
    assert re.search(r"its receipt: recovered, \S+ USD of \S+ USD held\n", ran.stdout)
    assert "an open organization: 200, x-gateway-mode: degraded, at most 0.10 USD" in ran.stdout
    assert "a closed one: 503 storage_unavailable, Retry-After: 5\n" in ran.stdout
    assert ran.stdout.count("ledger verify: ok") == 2
    assert re.search(r"^ +curl -N http://127.0.0.1:\d+/v1/chat/completions", ran.stdout, re.M)
    assert re.search(r"export OPENAI_BASE_URL=http://127.0.0.1:\d+/v1\n", ran.stdout)
    assert re.search(r"export OPENAI_API_KEY=gw_live_\w{46}\n", ran.stdout)
    assert "None" not in ran.stdout
    assert home.left == []


def test_a_second_run_works_as_the_first(home: Home) -> None:
    with taken_port() as port:
        first = home.once("--quick", "--port", str(port))
        assert f"port {port} is taken" in first.stdout
        assert f"http://127.0.0.1:{port}" not in first.stdout
    second = home.once("--quick", "--port", str(port))
    assert f"gateway   http://127.0.0.1:{port}\n" in second.stdout
    for ran in (first, second):
        assert (ran.returncode, ran.stderr) == (0, "")
        assert SAID in ran.stdout
    assert home.left == []


def test_a_port_that_cannot_be_is_refused_in_words(home: Home) -> None:
    ran = home.once("--port", "99999")
    assert (ran.returncode, ran.stderr) == (1, "gwproxy demo: there is no port 99999\n")
    assert home.left == []


def test_settings_of_another_gateway_do_not_disturb_it(home: Home, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (home.home / "config.toml").write_text("this is no configuration")
    home.environ |= {
        "GWPROXY_CONFIG": "/nonexistent/config.toml",
        "GWPROXY__UPSTREAM__FLAVOUR": "openai",
        "GWPROXY_ADMIN_KEY": "short",
        "CLOUDFLARE_API_TOKEN": "a-real-one",
        "AI_GATEWAY_TOKEN": "another",
        "AI_PROVIDER": "anthropic",
        "STATE_DIRECTORY": str(state),
        "OPENAI_BASE_URL": "http://192.0.2.1/v1",
    }
    ran = home.once("--quick")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert SAID in ran.stdout
    assert "a-real-one" not in ran.stdout
    assert list(state.iterdir()) == []
    assert home.left == [home.home / "config.toml"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_the_printed_curl_works_as_it_stands(lasting: Running) -> None:
    ran = subprocess.run(
        ["bash", "-c", lasting.curl],
        env=lasting.home.environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stderr
    events = [line[6:] for line in ran.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas).startswith(HELLO)


def test_the_printed_pair_works_with_the_sdk(
    lasting: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(lasting.pair) == {"OPENAI_BASE_URL", "OPENAI_API_KEY"}
    for name, value in lasting.pair.items():
        monkeypatch.setenv(name, value)
    with openai.OpenAI(http_client=openai.DefaultHttpxClient(trust_env=False)) as client:
        answer = client.chat.completions.create(
            model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Hello"}]
        )
        echo = client.chat.completions.create(
            model="mock/echo", messages=[{"role": "user", "content": "Do I hear myself?"}]
        )
        assert "auto" in [model.id for model in client.models.list()]
    assert str(answer.choices[0].message.content).startswith(HELLO)
    assert echo.choices[0].message.content == "Do I hear myself?"


def test_a_signal_ends_it_and_leaves_nothing(demo: Running) -> None:
    children = demo.children
    assert len(children) == 2
    assert demo.home.left != []
    demo.process.send_signal(signal.SIGTERM)
    rest = demo.process.communicate(timeout=PATIENCE_S)[0]
    assert (demo.process.returncode, rest) == (0, "\nStopping.\n")
    assert gone(children)
    assert demo.home.left == []


def test_an_impatient_ctrl_c_leaves_nothing_either(demo: Running) -> None:
    children = demo.children
    while demo.process.poll() is None:
        demo.process.send_signal(signal.SIGINT)
        time.sleep(0.005)  # faster than a finger can
    rest = demo.process.communicate(timeout=PATIENCE_S)[0]
    assert (demo.process.returncode, rest) == (0, "\nStopping.\n")
    assert gone(children)
    assert demo.home.left == []


def test_it_can_be_stopped_while_it_starts(home: Home) -> None:
    process = subprocess.Popen(
        [*DEMO, "--port", "0"],
        env=home.environ,
        cwd=home.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.001)  # no event tells that a process has a child
    process.send_signal(signal.SIGHUP)
    try:
        assert process.communicate(timeout=PATIENCE_S)[0] == "\nStopping.\n"
    finally:
        process.kill()
    assert process.returncode == 0
    assert gone([int(pid) for pid in found])
    assert home.left == []


@pytest.mark.skipif(sys.platform != "linux", reason="children are tied to their parent on Linux")
def test_kill_9_leaves_no_process(demo: Running) -> None:
    children = demo.children
    demo.process.kill()
    demo.process.wait()
    assert gone(children)


def test_it_says_so_when_a_part_of_it_dies(demo: Running) -> None:
    children = demo.children
    os.kill(children[1], signal.SIGKILL)
    rest = demo.process.communicate(timeout=PATIENCE_S)[0]
    assert demo.process.returncode == 1
    assert "gwproxy demo: a process ended by itself" in rest
    assert gone(children)
    assert demo.home.left == []
