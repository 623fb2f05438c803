"""The words in which a contestant describes itself. Starts nothing."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MODEL = "openai/gpt-4o-mini"


class Unavailable(Exception):
    """This contestant cannot take part here; the words say why, and the run goes on without it."""


@dataclass(frozen=True, slots=True)
class Site:
    """What every contestant is given: a folder of its own, a port, and the upstream to speak to."""

    folder: Path
    port: int
    upstream_port: int
    ca: Path | None
    """The authority that signed the upstream; None where the upstream is plain HTTP."""

    @property
    def upstream(self) -> str:
        return f"{'https' if self.ca else 'http'}://127.0.0.1:{self.upstream_port}"


@dataclass(frozen=True, slots=True)
class Contestant:
    command: tuple[str, ...]
    ready_path: str
    """A GET here answers 200 as soon as requests can be served."""
    headers: dict[str, str]
    model: str = MODEL
    environ: dict[str, str] = field(default_factory=dict)
    rewrites: bool = False
    """It parses answers and writes them anew: what they say is compared, not their bytes."""
    once_ready: Callable[[], dict[str, str]] | None = None
    """Called when it serves; returns headers that only a running server can give (a key)."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A line of the table of contestants."""

    name: str
    what: str
    """What is switched on, for the report."""
    prepare: Callable[[Site], Contestant]
    version: Callable[[], str]
    kinds: tuple[str, ...] = ("plain", "tls")
    """The upstreams it is measured with."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Proxies that know no keys are sent one of the same length, so that all read equally many bytes.
SOME_KEY = {"Authorization": "Bearer gw_live_" + "0" * 46}
