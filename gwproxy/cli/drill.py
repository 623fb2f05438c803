"""`gwproxy drill`: a fault made on purpose, to a gateway of its own in a scratch folder in front of
the demo upstream, and a report of what its callers met.

The configuration says how outages are met (`[failure]`); its ledger is copied, so that what is
rebuilt is as large as it would be. Neither it nor a running server is touched.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from gwproxy.cli.children import STOPS, Failed, address, child, clean_environ, last_words
from gwproxy.cli.printing import print_json, say
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.money import format_usd
from gwproxy.core.routing import CATALOGUE
from gwproxy.state.ledger import BELIEVED_AFTER_MS
from gwproxy.storage import inspect
from gwproxy.storage.backup import copy_of
from gwproxy.storage.database import BackupRefused

FINE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2

CALLERS: Final = 4
"""Of each organization; each asks as soon as it has its answer."""

PAUSE_S: Final = 0.05
"""After a refusal: nobody learns anything from thousands of them."""

LOOK_EVERY_S: Final = 0.05
"""At a process of its own, which nothing here is told of. Figures are of tenths of a second."""

BACK_WITHIN_S: Final = 60.0
PATIENCE_S: Final = 30.0
JUMP_S: Final = 32 * 86_400
"""Into another month, from whatever day."""

SLOW_S: Final = 3
"""What a slow provider takes; the drill's gateway gives up after a third of that."""

_GOOD, _BAD = "mock/prose+len-20", "prose+status-503"
_SLOW: Final = f"prose+len-20+delay-{SLOW_S * 1000}"

_CONFIG: Final = """\
# Written by `gwproxy drill`; thrown away with its folder.
[server]
listen = "127.0.0.1:0"
drain_s = 2
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "cloudflare-compat"
base_url = "{upstream}/v1/demo/demo"
token = "env:CLOUDFLARE_API_TOKEN"
first_byte_timeout_s = 1
answer_timeout_s = 1
[providers.mock]
prefix = "mock"
[providers.groq]
prefix = "groq"
[models.drill]
chain = [
    {{ provider = "mock", model = "{first}" }},
    {{ provider = "groq", model = "prose+len-20" }},
]
[breaker]
open_timeout_ms = 1000
[failure]
fallback_daily_limit_usd = "{bound}"
[prices.models."mock/*"]
input = "1.00"
output = "2.00"
[prices.models."groq/*"]
input = "1.00"
output = "2.00"
[metrics]
open = true
[storage]
path = "{database}"
journal_segment_bytes = 4194304
"""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "drill",
        help="make a fault on purpose, on a scratch copy, and report what callers met",
        description="Starts a gateway of its own with the demo upstream on loopback, has callers "
        "of an open and of a closed organization ask all the time, makes the fault, and reports.",
    )
    parser.add_argument("fault", choices=sorted(_FAULTS))
    parser.add_argument("--seconds", type=float, default=8.0, help="how long it lasts; default 8")
    parser.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.seconds <= 3600:
        say("--seconds: more than 0, and an hour at most")
        return WRONG_USAGE
    try:
        config = _configured(args.config)
        with _stopped_in_order(), tempfile.TemporaryDirectory(prefix="gwproxy-drill-") as folder:
            report = _drill(args.fault, args.seconds, config, Path(folder))
    except ConfigError as error:
        say(str(error))
        return WRONG_USAGE
    except (Failed, BackupRefused) as failed:
        say(f"gwproxy drill: {failed}")
        return FAILED
    except KeyboardInterrupt:
        say("gwproxy drill: stopped; nothing is left of it")
        return FAILED
    if args.json:
        print_json(report)
    else:
        print("\n".join(f"{name.replace('_', ' '):<18} {value}" for name, value in report.items()))
    return FINE if report["passed"] else FAILED


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    before = {number: signal.signal(number, _stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(*_: object) -> None:
    """Each of the signals ends it as Ctrl-C does, and only once: what was made is then taken away,
    however often it is asked."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _configured(named: str | None) -> Config | None:
    """The caller's own; None where there is none, which a drill does not need."""
    try:
        path = find_config(named, os.environ)
    except ConfigError:
        return None
    return load(path, os.environ, catalogue=CATALOGUE, local=True)


@dataclass(frozen=True, slots=True)
class Books:
    """The ledger of the drill's own organizations, and what the upstream says it has served."""

    exposure: int
    """Of the open organization on one day without the database, in nano-USD."""
    requests: dict[str, int]
    """Output tokens by request, of those that were answered whole."""
    served: dict[str, int]


# -- the scratch gateway ---------------------------------------------------------------------------


@dataclass
class Scratch:
    """A gateway in a folder that is thrown away, and its callers."""

    folder: Path
    database: Path
    environ: dict[str, str]
    upstream: str
    bound: int
    url: str = ""
    organizations: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    answers: list[tuple[str, int, str, float]] = field(default_factory=list)
    """Organization, status (0: none came), mode, seconds."""

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def record(self) -> Path:
        """The demo upstream's own, a line a request."""
        return self.folder / "served.jsonl"

    def write(self, first: str) -> None:
        """`first` is the model of the chain's first provider."""
        text = _CONFIG.format(
            upstream=self.upstream,
            first=first,
            bound=format_usd(self.bound),
            database=self.database,
        )
        self.config.write_text(text)
        self.config.chmod(0o600)

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "gwproxy", *words, "--config", str(self.config)]
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=PATIENCE_S
        )

    def send(
        self, method: str, path: str, key: str, body: Any = None
    ) -> tuple[int, dict[str, str], Any]:
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE_S)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            raw = response.read()
            return response.status, dict(response.getheaders()), raw
        finally:
            connection.close()

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        key = self.environ["GWPROXY_ADMIN_KEY"]
        status, _, raw = self.send(method, f"/admin/{path}", key, body)
        if status >= 300:
            raise Failed(f"{method} /admin/{path} was answered {status}: {raw.decode()}")
        return json.loads(raw)

    def found(self) -> None:
        """An open and a closed organization, with a caller each. Names that no copy has already."""
        mark = secrets.token_hex(4)
        for mode in ("open", "closed"):
            name = f"drill-{mode}-{mark}"
            organization = {"org_id": name, "failure_mode": mode}
            self.admin("POST", "organizations", organization)
            self.admin("POST", "users", {"user_id": name, "org_id": name})
            self.organizations[mode] = name
            self.keys[mode] = self.admin("POST", f"users/{name}/api-keys", {})["api_key"]

    def ready(self) -> tuple[int, str]:
        """The status of readiness, and the state of the database that it tells."""
        with contextlib.suppress(OSError, HTTPException):
            status, _, raw = self.send("GET", "/health/ready", "")
            return status, json.loads(raw)["database"]
        return 0, ""

    def wait_for(self, state: str, within_s: float) -> float | None:
        """How long until readiness told this state of the database; None: it did not."""
        return _until(lambda: self.ready()[1] == state, within_s)

    def served(self, since: int) -> bool:
        """Whether the last answers to each organization were good, since so many answers."""
        answers = self.answers[since:]
        last = [[status for org, status, _, _ in answers if org == each] for each in self.keys]
        return all(statuses[-CALLERS:] == [200] * CALLERS for statuses in last)

    def caught_up(self) -> bool:
        """Whether the database has all that the journal has."""
        return bool(self.admin("GET", "health")["records_behind"] == 0)

    def books(self) -> "Books":
        """What the ledger has of the drill's own organizations, beside what the upstream has."""
        with inspect.tables(self.database) as tables:
            spent, requests = asyncio.run(tables.run(self._own))
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        served = {
            line["request_id"]: line["tokens"]["output"] for line in lines if line["completed"]
        }
        return Books(spent, requests, served)

    def _own(self, connection: Any) -> tuple[int, dict[str, int]]:
        spent = connection.execute(
            "SELECT coalesce(max(spent), 0) FROM balance WHERE account = ?",
            (f"outage:{self.organizations['open']}",),
        ).fetchone()[0]
        requests = connection.execute(
            "SELECT id, output_tokens FROM request WHERE outcome = 'completed'"
            " AND org_id IN (?, ?)",
            tuple(self.organizations.values()),
        ).fetchall()
        return spent, {request_id: tokens for request_id, tokens in requests}

    @contextlib.contextmanager
    def traffic(self, model: str) -> Iterator[None]:
        """Callers of both organizations, until the block is left."""
        over = threading.Event()
        body = {"model": model, "messages": [{"role": "user", "content": "Go on."}]}

        def call(mode: str) -> None:
            while not over.is_set():
                begun = time.monotonic()
                try:
                    status, headers, _ = self.send(
                        "POST", "/v1/chat/completions", self.keys[mode], body
                    )
                except (OSError, HTTPException):
                    status, headers = 0, {}
                took_s = time.monotonic() - begun
                degraded = headers.get("x-gateway-mode", "")
                self.answers.append((mode, status, degraded, took_s))
                if status != 200:
                    over.wait(PAUSE_S)

        threads = [
            threading.Thread(target=call, args=(mode,), daemon=True)
            for mode in self.keys
            for _ in range(CALLERS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE_S)


def _until(condition: Callable[[], bool], within_s: float) -> float | None:
    """How long until it held; None: it did not."""
    begun = time.monotonic()
    while time.monotonic() - begun < within_s:
        if condition():
            return time.monotonic() - begun
        time.sleep(LOOK_EVERY_S)
    return None


def _drill(name: str, seconds: float, config: Config | None, folder: Path) -> dict[str, Any]:
    prepare, fault, model = _FAULTS[name]
    token = secrets.token_hex(16)
    environ = {
        **clean_environ(),
        "GWPROXY_ADMIN_KEY": secrets.token_hex(32),
        "CLOUDFLARE_API_TOKEN": token,
        "PYTHONUNBUFFERED": "1",
    }
    with contextlib.ExitStack() as stack:
        kept = folder / "kept"
        kept.mkdir()
        environ |= prepare(kept, folder, stack)
        demo = [sys.executable, "-m", "gwproxy.demo", "--listen", "127.0.0.1:0"]
        demo += ["--token", token, "--account", "demo", "--gateway", "demo"]
        demo += ["--record", str(folder / "served.jsonl")]
        upstream = address(
            stack.enter_context(child(demo, environ, folder / "upstream.log")), folder
        )
        bound = 5_000_000_000 if config is None else config.failure.fallback_daily_limit_usd
        scratch = Scratch(folder, kept / "gwproxy.db", environ, upstream, bound)
        scratch.write("prose+len-20")
        copied = _copy_ledger(config, scratch)
        serve = [sys.executable, "-m", "gwproxy", "serve", "--config", str(scratch.config)]
        server = stack.enter_context(child(serve, environ, folder / "serve.log"))
        scratch.url = address(server, folder)
        scratch.found()
        if copied:
            scratch.admin("POST", "backup")
        with scratch.traffic(model):
            if _until(lambda: scratch.served(0), PATIENCE_S) is None:
                raise Failed(f"nobody was served before the fault:\n{last_words(folder)}")
            before = len(scratch.answers)
            outcome = fault(scratch, seconds)
            over = len(scratch.answers)
            during = scratch.answers[before:over]
            recovered = _until(lambda: scratch.served(over), PATIENCE_S) is not None
        _until(scratch.caught_up, PATIENCE_S)
        verified = scratch.command("ledger", "verify")
        words = (verified.stdout or verified.stderr).strip()
        if server.poll() is not None:
            raise Failed(f"the gateway ended by itself:\n{last_words(folder)}")
        return _report(
            name, seconds, scratch, outcome, during, recovered, verified.returncode, words
        )


def _copy_ledger(config: Config | None, scratch: Scratch) -> bool:
    """The caller's ledger, where there is one: as of one moment, without its journal."""
    if config is None or not config.storage.path.exists():
        return False
    copy_of(config.storage.path, scratch.database)
    accepted = scratch.command("ledger", "accept-loss")
    if accepted.returncode:
        raise Failed(f"the copy of the ledger cannot be opened: {accepted.stderr.strip()}")
    return True


def _report(
    name: str,
    seconds: float,
    scratch: Scratch,
    outcome: dict[str, Any],
    during: list[tuple[str, int, str, float]],
    recovered: bool,
    verify_code: int,
    words: str,
) -> dict[str, Any]:
    counts = Counter((mode, status) for mode, status, _, _ in during)
    served = sum(told == "degraded" and status == 200 for _, status, told, _ in during)
    times = sorted(took_s for _, status, _, took_s in during if status == 200)
    good_keys_refused = sum(status == 401 for _, status, _, _ in scratch.answers)
    books = scratch.books()
    failed = [
        *(["the ledger does not verify"] if verify_code else []),
        *(["good keys were refused"] if good_keys_refused else []),
        *([] if recovered else ["not everybody was served afterwards"]),
        *failures(name, seconds, scratch.bound, outcome, during, books),
    ]
    return {
        "drill": f"{name}, for {seconds:g} s",
        "answers": ", ".join(
            f"{mode} {status}: {count}" for (mode, status), count in sorted(counts.items())
        ),
        "refused": sum(count for (_, status), count in counts.items() if status != 200),
        "served_open": served,
        "exposure_usd": f"{format_usd(books.exposure)} of {format_usd(scratch.bound)} at most",
        "median_answer_ms": round(times[len(times) // 2] * 1000) if times else None,
        "slowest_answer_ms": round(times[-1] * 1000) if times else None,
        **outcome,
        "good_keys_refused": good_keys_refused,
        "served_afterwards": recovered,
        "ledger": words,
        "upstream_served": f"{len(books.served)}, of which the ledger has {len(books.requests)}",
        "failed": "; ".join(failed) or None,
        "passed": not failed,
    }


def failures(
    name: str,
    seconds: float,
    bound: int,
    outcome: dict[str, Any],
    during: Sequence[tuple[str, int, str, float]],
    books: Books,
) -> list[str]:
    """What this fault is about, and was not seen."""
    found = []
    if books.exposure > bound:
        found.append("more was exposed than the bound")
    if books.requests != books.served:
        found.append("ledger and upstream's record differ")
    if outcome.get("recovery_s", 0) is None:
        found.append("it did not recover")
    match name:
        case "storage-lost" | "disk-full":
            if outcome["noticed_after_s"] is None:
                found.append("the fault was not noticed")
            if not any(each[:2] == ("closed", 503) for each in during):
                found.append("the closed organization never got 503")
        case "provider-down" | "slow-upstream":
            if outcome["breaker_was"] not in ("open", "half_open"):
                found.append("the breaker did not open")
            if any(status != 200 for _, status, _, _ in during):
                found.append("the next provider did not answer everybody")
            if any(took_s >= SLOW_S for _, _, _, took_s in during):
                found.append("somebody waited as long as a slow provider takes")
        case "clock-jump":
            believed = outcome["month_during"] != outcome["month_before"]
            if believed and seconds * 1000 < BELIEVED_AFTER_MS:
                found.append("a short leap of the clock was believed")
    return found


# -- the faults ------------------------------------------------------------------------------------


def _storage_lost(scratch: Scratch, seconds: float) -> dict[str, Any]:
    """The database is deleted, and nothing can be put in its place for so long."""
    obstacle = scratch.database.with_name(f"{scratch.database.name}.unfinished")
    obstacle.mkdir()
    for end in ("", "-wal", "-shm"):
        scratch.database.with_name(scratch.database.name + end).unlink(missing_ok=True)
    return _outage(scratch, seconds, obstacle.rmdir)


def _disk_full(scratch: Scratch, seconds: float) -> dict[str, Any]:
    filler = scratch.database.with_name("filler")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return _outage(scratch, seconds, filler.unlink)


def _outage(scratch: Scratch, seconds: float, end: Callable[[], None]) -> dict[str, Any]:
    noticed_s = scratch.wait_for("lost", seconds)
    time.sleep(max(0.0, seconds - (noticed_s or 0.0)))
    readiness = scratch.ready()[0]
    end()
    recovery_s = scratch.wait_for("ok", BACK_WITHIN_S)
    return {
        "noticed_after_s": _rounded(noticed_s),
        "readiness_was": readiness,
        "recovery_s": _rounded(recovery_s),
    }


def _upstream_fault(first: str) -> Callable[[Scratch, float], dict[str, Any]]:
    """The first provider of the chain is at fault, until the configuration is reloaded."""

    def fault(scratch: Scratch, seconds: float) -> dict[str, Any]:
        scratch.write(first)
        scratch.admin("POST", "reload")
        time.sleep(seconds)
        state = _state_of_first(scratch)
        scratch.write("prose+len-20")
        scratch.admin("POST", "reload")
        recovery_s = _until(lambda: _state_of_first(scratch) == "closed", BACK_WITHIN_S)
        return {"breaker_was": state, "recovery_s": _rounded(recovery_s)}

    return fault


def _state_of_first(scratch: Scratch) -> str | None:
    """Of the breaker of the chain's first provider."""
    found = scratch.admin("GET", "providers")["data"]
    return {each["provider"]: each["state"] for each in found}.get("mock")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _clock_jump(scratch: Scratch, seconds: float) -> dict[str, Any]:
    """The wall clock leaps into another month and, after so long, back."""
    stamp = Path(scratch.environ["FAKETIME_TIMESTAMP_FILE"])
    key = scratch.keys["open"]

    def month() -> str:
        _, _, raw = scratch.send("GET", "/v1/usage", key)
        found: str = json.loads(raw)["scopes"][0]["current_month"]
        return found

    before = month()
    set_clock(stamp, JUMP_S)
    time.sleep(seconds)
    during = month()
    set_clock(stamp, 0)
    seen = "believed" if during != before else "not believed"
    return {
        "month_before": before,
        "month_during": during,
        "month_after": month(),
        "leap": f"{seen} after {seconds:g} s; it is believed once it has lasted for "
        f"{BELIEVED_AFTER_MS // 1000} s",
    }


# -- what a fault needs beforehand -----------------------------------------------------------------

Prepare = Callable[[Path, Path, contextlib.ExitStack], dict[str, str]]
"""Of the database's folder and the scratch folder; what it adds to the environment."""


def _nothing(kept: Path, folder: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    return {}


def _small_disk(kept: Path, folder: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """A file system that is small enough to be filled."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "none", str(kept)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Failed("disk-full needs a small file system of its own: run it as root")
    stack.callback(subprocess.run, ["umount", "-l", str(kept)], check=True)
    return {}


def _another_clock(kept: Path, folder: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    return another_clock(folder / "clock")


def another_clock(stamp: Path) -> dict[str, str]:
    """The environment of a process whose wall clock goes by this file: libfaketime in front of the
    C library's clocks, the monotonic one left alone, and the times of files."""
    library = next(
        (str(each) for each in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None
    )
    if shutil.which("faketime") is None or library is None:
        raise Failed("to move a clock needs libfaketime: apt install faketime")
    set_clock(stamp, 0)
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(stamp),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def set_clock(stamp: Path, ahead_s: int) -> None:
    """By so much ahead of the machine's, from now on. It is read with each look at the clock, and
    half a file would be another time."""
    new = stamp.with_name(f"{stamp.name}.new")
    new.write_text(f"{ahead_s:+}s\n")
    new.replace(stamp)


_FAULTS: Final[dict[str, tuple[Prepare, Callable[[Scratch, float], dict[str, Any]], str]]] = {
    "storage-lost": (_nothing, _storage_lost, _GOOD),
    "disk-full": (_small_disk, _disk_full, _GOOD),
    "provider-down": (_nothing, _upstream_fault(_BAD), "drill"),
    "slow-upstream": (_nothing, _upstream_fault(_SLOW), "drill"),
    "clock-jump": (_another_clock, _clock_jump, _GOOD),
}
