"""One run: everything started, every phase measured in interleaved windows, everything ended."""

import http.client
import os
import platform
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import trustme

from bench import probes
from bench.children import ChildFailed, Children, Talker, stop
from bench.contestants import ENTRANTS, PYTHON
from bench.entrant import MODEL, SOME_KEY, Contestant, Entrant, Site, Unavailable, free_port

READY_WITHIN_S = 90.0
"""Some gateways load for many seconds; on a busy machine for many more."""
ANSWER_WITHIN_S = 600.0
"""A window of a slow proxy takes minutes where thousands of streams are opened."""
DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured; every figure here appears in the report."""

    name: str
    entrants: tuple[str, ...]
    kinds: tuple[str, ...] = ("plain", "tls")
    rounds: int = 5
    starts: int = 3
    connections: int = 64
    request_warm_s: float = 0.3
    request_window_s: float = 1.2
    request_linger_s: float = 0.3
    request_rate: float = 1000
    streams: int = 50
    stream_interval_ms: float = 10
    stream_warm_s: float = 0.4
    stream_window_s: float = 2.0
    held_steps: tuple[int, ...] = (1000, 2000)
    held_events: int = 10
    held_interval_ms: float = 500
    held_settle_s: float = 0.5
    first_bytes: int = 1000
    idle_s: float = 3.0
    calm_rate: float = 100
    calm_window_s: float = 10
    calm_rounds: int = 2
    growth_steps: tuple[int, ...] = (10, 100, 1000, 5000)
    growth_rate: float = 1000
    growth_warm_s: float = 1.0
    growth_window_s: float = 6.0
    open_within_s: float = 90
    limit_s: float = 7200
    pin: bool = False


EVERYBODY = tuple(entrant.name for entrant in ENTRANTS)
FULL = Settings("full", EVERYBODY)
QUICK = Settings(
    "quick",
    EVERYBODY,
    rounds=2,
    starts=1,
    request_warm_s=0.1,
    request_window_s=0.4,
    request_linger_s=0.15,
    stream_warm_s=0.1,
    stream_window_s=0.5,
    held_steps=(250, 500),
    held_events=4,
    held_interval_ms=250,
    held_settle_s=0.15,
    first_bytes=50,
    idle_s=0.5,
    calm_window_s=1,
    calm_rounds=1,
    growth_steps=(10, 500),
    growth_warm_s=0.2,
    growth_window_s=1.0,
    open_within_s=20,
    limit_s=600,
)
SMOKE = Settings(
    "smoke",
    ("naive",),
    kinds=("plain",),
    rounds=1,
    starts=1,
    connections=4,
    request_warm_s=0.05,
    request_window_s=0.2,
    request_linger_s=0.05,
    request_rate=100,
    streams=4,
    stream_warm_s=0.1,
    stream_window_s=0.3,
    held_steps=(5, 10),
    held_events=10,
    held_interval_ms=50,
    held_settle_s=0.05,
    first_bytes=10,
    idle_s=0.2,
    calm_rate=50,
    calm_window_s=0.2,
    calm_rounds=1,
    growth_steps=(2, 10),
    growth_rate=100,
    growth_warm_s=0.05,
    growth_window_s=0.2,
    open_within_s=5,
    limit_s=240,
)


@dataclass(slots=True)
class Results:
    """All that was measured, window by window; the report is made from this and nothing else."""

    settings: Settings
    machine: dict[str, Any] = field(default_factory=dict)
    took_part: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    starts_ms: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, dict[str, float]] = field(default_factory=dict)
    windows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, phase: str, who: str) -> dict[int, dict[str, Any]]:
        """The windows of one phase and contestant by round; those that failed are left out."""
        return {
            window["round"]: window
            for window in self.windows
            if window["phase"] == phase and window["who"] == who and "failed" not in window
        }


@dataclass(slots=True)
class Player:
    """A contestant with one kind of upstream, and its process while it lives."""

    label: str
    kind: str
    entrant: Entrant
    contestant: Contestant
    site: Site
    keys: dict[str, str] = field(default_factory=dict)
    """Headers that only the running server could give."""
    child: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None


def label(name: str, kind: str) -> str:
    return name if kind == "plain" else f"{name}+{kind}"


def growth_phase(streams: int) -> str:
    return f"{streams} streams"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def not_ready(player: Player) -> str:
    """Why it cannot serve yet, or nothing once its health route answers 200."""
    connection = http.client.HTTPConnection("127.0.0.1", player.site.port, timeout=1)
    try:
        connection.request("GET", player.contestant.ready_path)
        status = connection.getresponse().status
        return "" if status == 200 else f"{player.contestant.ready_path} answers {status}"
    except (OSError, http.client.HTTPException) as error:
        return f"{player.contestant.ready_path}: {type(error).__name__}"
    finally:
        connection.close()


def last_words(log: Path) -> str:
    """The last line a process printed, shortened: it goes into a sentence of the report."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it printed nothing"


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("aiohttp", "uvloop", "httptools", "orjson")}


def describe_machine() -> dict[str, Any]:
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": probes.cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * page / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "openssl": ssl.OPENSSL_VERSION,
        "load_average_before": round(os.getloadavg()[0], 2),
        **_versions(),
    }


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """A run that hangs, or is told to end, unwinds like any other, so that its children end too."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the run took longer than {seconds:.0f} s")

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = {
        signal.SIGALRM: signal.signal(signal.SIGALRM, expire),
        signal.SIGTERM: signal.signal(signal.SIGTERM, leave),
        signal.SIGHUP: signal.signal(signal.SIGHUP, leave),
    }
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """The run in progress: who plays, and with what they are measured."""

    def __init__(self, settings: Settings, children: Children, folder: Path) -> None:
        self._settings = settings
        self._children = children
        self._folder = folder
        self.results = Results(settings)
        self._players: list[Player] = []
        # Asked for with --pin only: the proxy under test has a core to itself.
        cores = sorted(os.sched_getaffinity(0))
        pinned = settings.pin and len(cores) > 1
        self._proxy_cores = {cores[0]} if pinned else None
        self._other_cores = set(cores[1:]) if pinned else None
        self._ca, cert = self._certificates()
        self._upstream = self._talker("upstream", "--cert", str(cert))
        self._ports = self._upstream.hear(READY_WITHIN_S)
        self._load = self._talker("load")
        self._load.hear(READY_WITHIN_S)

    def _certificates(self) -> tuple[Path, Path]:
        """A throw-away authority and what it signed, made for this run and gone with it."""
        authority = trustme.CA()
        ca, cert = self._folder / "ca.pem", self._folder / "upstream.pem"
        authority.cert_pem.write_to_path(str(ca))
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
            str(cert)
        )
        return ca, cert

    def _talker(self, module: str, *arguments: str) -> Talker:
        command = (PYTHON, "-m", f"bench.{module}", *arguments)
        child = self._children.start(
            command, cores=self._other_cores, piped=True, output=self._folder / f"{module}.log"
        )
        return Talker(child, f"bench.{module}")

    # -- who plays

    def admit(self) -> None:
        """Starts everybody, each as often as asked, and keeps those that do serve."""
        wanted = [entrant for entrant in ENTRANTS if entrant.name in self._settings.entrants]
        for kind in self._settings.kinds:
            for entrant in wanted:
                if kind not in entrant.kinds:
                    continue
                name = label(entrant.name, kind)
                say(f"start-up: {name}")
                try:
                    player = self._prepare(entrant, kind, name)
                    self._start(player, self._settings.starts)
                    if player.contestant.once_ready is not None:
                        player.keys = player.contestant.once_ready()
                    self._try_out(player)
                except (Unavailable, ChildFailed) as error:
                    self.results.absent[name] = str(error)
                    say(f"  without {name}: {error}")
                    continue
                self._players.append(player)
                self.results.took_part.setdefault(
                    entrant.name, {"what": entrant.what, "version": entrant.version()}
                )

    def _prepare(self, entrant: Entrant, kind: str, name: str) -> Player:
        folder = self._folder / name
        folder.mkdir()
        ca = self._ca if kind == "tls" else None
        site = Site(folder, free_port(), self._ports[kind], ca)
        return Player(name, kind, entrant, entrant.prepare(site), site)

    def _start(self, player: Player, times: int) -> None:
        """The last start stays; the earlier ones only tell how long a start takes."""
        took_ms = self.results.starts_ms.setdefault(player.label, [])
        for _ in range(times):
            if player.child is not None:
                stop(player.child)
            log = player.site.folder / "output.log"
            began = time.monotonic()
            player.child = self._children.start(
                player.contestant.command,
                environ=player.contestant.environ,
                cores=self._proxy_cores,
                output=log,
            )
            while why := not_ready(player):
                if not player.alive:
                    raise ChildFailed(f"it ended at its start: {last_words(log)}")
                if time.monotonic() - began > READY_WITHIN_S:
                    stop(player.child)
                    raise ChildFailed(
                        f"not ready within {READY_WITHIN_S:.0f} s ({why}): {last_words(log)}"
                    )
                time.sleep(0.002)
            took_ms.append((time.monotonic() - began) * 1000)

    def _try_out(self, player: Player) -> None:
        """A proxy that does not serve is not measured: its refusals would look cheap."""
        target = self._target(player)
        for command, arguments in (
            ("first_bytes", {"n": 3}),
            (
                "requests",
                {"connections": 2, "warm_s": 0.02, "window_s": 0.05, "linger_s": 0.01},
            ),
        ):
            result = self._ask(command, target, arguments, 30)
            if "failed" in result or result["errors"]:
                assert player.child is not None, "it was just started"
                stop(player.child)
                raise ChildFailed(f"it does not serve: {result.get('failed') or result['errors']}")

    # -- measuring

    def _target(self, player: Player) -> dict[str, Any]:
        assert player.child is not None, "only what was started is measured"
        return {
            "port": player.site.port,
            "model": player.contestant.model,
            "headers": {**player.contestant.headers, **player.keys},
            "pid": player.child.pid,
            "upstream_pid": self._upstream.pid,
            "upstream_port": self._ports["plain"],
            "rewrites": player.contestant.rewrites,
        }

    def _direct(self, kind: str) -> dict[str, Any]:
        return {
            "port": self._ports[kind],
            "model": MODEL,
            "headers": SOME_KEY,
            "pid": 0,
            "upstream_pid": self._upstream.pid,
            "upstream_port": self._ports["plain"],
            "ca": str(self._ca) if kind == "tls" else None,
        }

    def _ask(
        self, command: str, target: dict[str, Any], arguments: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        return self._load.ask({"run": command, "target": target, "with": arguments}, timeout_s)

    def _window(
        self,
        phase: str,
        round_: int,
        who: str,
        target: dict[str, Any],
        command: str,
        arguments: dict[str, Any],
    ) -> bool:
        """Whether it held out."""
        result = self._ask(command, target, arguments, ANSWER_WITHIN_S)
        self.results.windows.append({"phase": phase, "round": round_, "who": who, **result})
        if "failed" in result:
            say(f"  {who}: {result['failed']}")
        return not ("failed" in result or result.get("verdict", {}).get("errors"))

    def _rounds(
        self,
        phase: str,
        command: str,
        arguments: dict[str, Any],
        *,
        direct: bool,
        rounds: int,
        kinds: tuple[str, ...] | None = None,
        gave_up: set[str] | None = None,
    ) -> set[str]:
        """One window each in turn, and again: what slows the machine slows neighbours alike.

        Who breaks is left out of what is left of the phase; `gave_up` says who did so before.
        """
        gave_up = set() if gave_up is None else gave_up
        for round_ in range(rounds):
            say(f"{phase}: round {round_ + 1} of {rounds}")
            for kind in kinds or self._settings.kinds:
                if direct:
                    who = label(DIRECT, kind)
                    self._window(phase, round_, who, self._direct(kind), command, arguments)
                for player in self._players:
                    if player.kind != kind or player.label in gave_up or not self._lives(player):
                        continue
                    target = self._target(player)
                    if not self._window(phase, round_, player.label, target, command, arguments):
                        gave_up.add(player.label)
                        self._start_anew(player)
        return gave_up

    def _start_anew(self, player: Player) -> None:
        """What broke in a window is not asked again in that phase, and comes fresh to the next."""
        assert player.child is not None, "it has just been measured"
        say(f"  {player.label} is started anew")
        stop(player.child)
        try:
            self._start(player, times=1)
        except ChildFailed as error:
            self.results.absent[player.label] = f"after it broke, {error}"

    def _lives(self, player: Player) -> bool:
        if not player.alive and player.label not in self.results.absent:
            self.results.absent[player.label] = "it ended in the middle of the run"
            say(f"  {player.label} has ended")
        return player.alive

    def measure(self) -> None:
        wanted = self._settings
        self._rest("rest at start")
        # Memory first, while each process is as it started.
        self._rounds(
            "held streams",
            "held_streams",
            {
                "steps": list(wanted.held_steps),
                "n_events": wanted.held_events,
                "interval_ms": wanted.held_interval_ms,
                "settle_s": wanted.held_settle_s,
                "open_within_s": wanted.open_within_s,
            },
            direct=False,
            rounds=1,
        )
        requests = {
            "connections": wanted.connections,
            "warm_s": wanted.request_warm_s,
            "window_s": wanted.request_window_s,
            "linger_s": wanted.request_linger_s,
        }
        rounds = wanted.rounds
        self._rounds("requests", "requests", requests, direct=False, rounds=rounds)
        paced = {**requests, "rate": wanted.request_rate}
        self._rounds("paced requests", "requests", paced, direct=True, rounds=rounds)
        streams = {
            "streams": wanted.streams,
            "interval_ms": wanted.stream_interval_ms,
            "warm_s": wanted.stream_warm_s,
            "window_s": wanted.stream_window_s,
        }
        self._rounds("streams", "paced_streams", streams, direct=True, rounds=rounds)
        one_by_one = {"n": wanted.first_bytes}
        self._rounds("first byte", "first_bytes", one_by_one, direct=True, rounds=rounds)
        calm = {**requests, "rate": wanted.calm_rate, "window_s": wanted.calm_window_s}
        # The plain upstream alone from here on: TLS costs the same however many there are.
        plain, often = wanted.kinds[:1], wanted.calm_rounds
        self._rounds("calm requests", "requests", calm, direct=True, rounds=often, kinds=plain)
        # Last, because it is what a proxy may not survive. One round: each step is a long window.
        gave_up: set[str] = set()
        for streams in wanted.growth_steps:
            growth = {
                "streams": streams,
                "rate": wanted.growth_rate,
                "warm_s": wanted.growth_warm_s,
                "window_s": wanted.growth_window_s,
                "open_within_s": wanted.open_within_s,
            }
            phase = growth_phase(streams)
            self._rounds(
                phase, "many_streams", growth, direct=True, rounds=1, kinds=plain, gave_up=gave_up
            )
        self._rest("rest at end")

    def _rest(self, when: str) -> None:
        """What each costs while nobody calls, all at once: the idle hardly disturb each other."""
        say(when)
        alive = [player for player in self._players if self._lives(player)]
        start = {player.label: self._cpu_ns(player) for player in alive}
        time.sleep(self._settings.idle_s)
        for player in alive:
            assert player.child is not None, "it is alive"
            weight = probes.memory(player.child.pid)
            spent_ns = self._cpu_ns(player) - start[player.label]
            self.results.idle.setdefault(player.label, {}).update(
                {
                    f"{when}: rss": weight.rss,
                    f"{when}: pss": weight.pss,
                    f"{when}: cpu_ms_per_s": spent_ns / 1e6 / self._settings.idle_s,
                    "threads": probes.threads(player.child.pid),
                    "processes": len(probes.process_tree(player.child.pid)),
                }
            )

    @staticmethod
    def _cpu_ns(player: Player) -> int:
        assert player.child is not None, "it is alive"
        return probes.cpu_ns(player.child.pid)


def run(settings: Settings) -> Results:
    """The whole run; whatever happens, no child survives it."""
    began = time.monotonic()
    before = probes.jiffies()
    machine = describe_machine()
    with (
        bounded(settings.limit_s),
        tempfile.TemporaryDirectory(prefix="gwproxy-bench-") as folder,
        Children() as children,
    ):
        playing = Run(settings, children, Path(folder))
        playing.admit()
        playing.measure()
    after = probes.jiffies()
    results = playing.results
    ticks = after.total - before.total
    results.machine = {
        **machine,
        "stolen_percent": round(100 * (after.stolen - before.stolen) / ticks, 2),
        "idle_percent": round(100 * (after.idle - before.idle) / ticks, 1),
    }
    results.seconds = round(time.monotonic() - began, 1)
    return results


def as_json(results: Results) -> dict[str, Any]:
    return asdict(results)
