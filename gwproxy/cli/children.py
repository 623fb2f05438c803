"""Processes that a command starts for itself, and that end with it whatever happens to it."""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

START_WITHIN_S: Final = 20.0
STOP_WITHIN_S: Final = 5.0

STOPS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The caller's own gateway must not leak into this one: neither its settings nor its folders.
_NOT_OURS: Final = ("GWPROXY_", "AI_", "CLOUD", "STATE_DIR", "CREDENTIALS_DIR", "CONFIGURATION_DIR")

_PR_SET_PDEATHSIG: Final = 1


class Failed(Exception):
    """The command cannot go on; the words say why."""


def clean_environ() -> dict[str, str]:
    """The environment without what is about a gateway of the caller's own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_NOT_OURS)}


@contextlib.contextmanager
def child(
    command: list[str], environ: dict[str, str], log_file: Path
) -> Iterator["subprocess.Popen[str]"]:
    """A process that ends with the demo; what it says on stderr goes to a file."""
    with log_file.open("a") as log:
        # Asked to stop between the child's birth and our knowing of it, we would leave it behind.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Ctrl-C is the demo's to handle: the children are stopped in order.
            start_new_session=True,
            preexec_fn=_at_birth(os.getpid()),
        )
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _at_birth(parent: int) -> Callable[[], None]:
    """What a child does before it becomes another program. On Linux it asks to be killed when its
    parent dies, so that not even kill -9 leaves it behind; its state is thrown away anyway."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)  # it died before it was asked

    return prepare


def address(process: "subprocess.Popen[str]", folder: Path) -> str:
    """The address that a child prints when it is ready."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_WITHIN_S)
    found = re.search(r"https?://[^\s/]+", process.stdout.readline()) if ready else None
    if found is None:
        raise Failed(f"a process did not start:\n{last_words(folder)}")
    return found[0]


def last_words(folder: Path) -> str:
    lines: list[str] = []
    for log in sorted(folder.glob("*.log")):
        lines += log.read_text().splitlines()[-5:]
    return "\n".join(lines)
