"""Child processes of the run: started with a small environment, and never left behind."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from bench import probes

ROOT = Path(__file__).resolve().parent.parent
"""Where `python -m bench.load` and `python -m gwproxy` are found."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child did not start, did not answer in time, or ended."""


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Only what a program needs: a PYTHONDEVMODE or a proxy setting of the caller would distort."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, **extra}


def _prepare(cores: set[int] | None) -> Callable[[], None]:
    def prepare() -> None:
        # Should the run itself be killed, the kernel ends the child: SIGTERM, because nginx's
        # master must still have the time to end its worker.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


class Children:
    """Everything that was started; leaving the `with` ends all of it, whatever happened inside."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in reversed(self._started):
            stop(child)

    def start(
        self,
        command: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        cores: set[int] | None = None,
        output: Path | None = None,
        piped: bool = False,
    ) -> subprocess.Popen[bytes]:
        """`output` takes what it prints; `piped` instead keeps its standard input and output."""
        with contextlib.ExitStack() as stack:
            log: IO[bytes] | int = subprocess.DEVNULL
            if output is not None:
                log = stack.enter_context(output.open("ab"))
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(environ or {}),
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                # A session of its own: Ctrl-C reaches the run alone, which then ends its children.
                start_new_session=True,
                preexec_fn=_prepare(cores),
            )
        self._started.append(child)
        return child


def stop(child: subprocess.Popen[bytes]) -> None:
    """Asks, waits five seconds, then kills it together with whatever it has started itself."""
    tree = probes.process_tree(child.pid) if child.poll() is None else []
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.wait(5)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


class Talker:
    """A child that is spoken to in JSON lines over its standard input and output."""

    def __init__(self, child: subprocess.Popen[bytes], name: str) -> None:
        self._child = child
        self._name = name
        self._buffer = b""
        self.pid = child.pid

    def ask(self, command: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._child.stdin is not None, "a talker is started with pipes"
        try:
            self._child.stdin.write(orjson.dumps(command) + b"\n")
            self._child.stdin.flush()
        except OSError as error:
            raise ChildFailed(f"{self._name} is gone") from error
        return self.hear(timeout_s)

    def hear(self, timeout_s: float) -> dict[str, Any]:
        assert self._child.stdout is not None, "a talker is started with pipes"
        pipe = self._child.stdout.fileno()
        end = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise ChildFailed(f"{self._name} said nothing for {timeout_s:.0f} s")
            data = os.read(pipe, 1 << 16)
            if not data:
                raise ChildFailed(f"{self._name} ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = orjson.loads(line)
        return answer
