"""`gwproxy drill`: each fault on a gateway of its own, and a report that says what it did."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gwproxy.cli import main
from gwproxy.cli.drill import Books, failures
from tests.conftest import StartGateway
from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN, chat
from tests.outages import MovedClock


@pytest.fixture
async def ledger(start_gateway: StartGateway) -> AsyncIterator[Path]:
    """The folder of a running gateway of somebody's own."""
    front = await start_gateway()
    assert (await front.chat(chat())).status == 200
    yield front.gateway.database.parent


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def drill(fault: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    code = main(["drill", fault, "--json", *words])
    told = capsys.readouterr()
    assert code == 0, told
    report: dict[str, object] = json.loads(told.out)
    assert report["passed"] is True
    assert str(report["ledger"]).startswith("ledger verify: ok")
    assert report["good_keys_refused"] == 0
    return report


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no configuration."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GWPROXY_CONFIG", raising=False)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("nowhere")
def test_a_lost_database_is_survived_open_and_closed(capsys: pytest.CaptureFixture[str]) -> None:
    report = drill("storage-lost", capsys, "--seconds", "2")
    assert "closed 503" in str(report["answers"]) and "open 200" in str(report["answers"])
    assert int(str(report["served_open"])) > 0
    assert report["readiness_was"] == 503
    exposure, bound = str(report["exposure_usd"]).removesuffix(" at most").split(" of ")
    assert 0 < float(exposure) <= float(bound)
    served, kept = str(report["upstream_served"]).split(", of which the ledger has ")
    assert int(served) == int(kept) > int(str(report["served_open"]))


SEEN: dict[str, Any] = {
    "noticed_after_s": 0.2,
    "recovery_s": 1.0,
    "breaker_was": "open",
    "month_before": "2026-01",
    "month_during": "2026-01",
}


@pytest.mark.parametrize(
    ("fault", "seen", "missed"),
    [
        ("storage-lost", {}, None),
        ("storage-lost", {"noticed_after_s": None}, "the fault was not noticed"),
        ("disk-full", {"refused": 0}, "the closed organization never got 503"),
        ("disk-full", {"recovery_s": None}, "it did not recover"),
        ("disk-full", {"exposure": 11}, "more was exposed than the bound"),
        ("disk-full", {"served": {"a": 4}}, "ledger and upstream's record differ"),
        ("disk-full", {"served": {"a": 3, "b": 3}}, "ledger and upstream's record differ"),
        ("provider-down", {"refused": 0}, None),
        ("provider-down", {"refused": 0, "breaker_was": "closed"}, "the breaker did not open"),
        ("provider-down", {}, "the next provider did not answer everybody"),
        ("slow-upstream", {"refused": 0}, None),
        ("slow-upstream", {"refused": 0, "breaker_was": "closed"}, "the breaker did not open"),
        ("slow-upstream", {}, "the next provider did not answer everybody"),
        (
            "slow-upstream",
            {"refused": 0, "took_s": 3.1},
            "somebody waited as long as a slow provider takes",
        ),
        ("clock-jump", {"month_during": "2026-02"}, "a short leap of the clock was believed"),
    ],
)
def test_a_drill_passes_only_where_what_it_is_about_was_seen(
    fault: str, seen: dict[str, Any], missed: str | None
) -> None:
    outcome = SEEN | seen
    books = Books(outcome.pop("exposure", 10), {"a": 3}, outcome.pop("served", {"a": 3}))
    during = [("open", 200, "degraded", outcome.pop("took_s", 0.1))]
    during += [("closed", 503, "", 0.1)] * outcome.pop("refused", 1)
    found = failures(fault, 8, 10, outcome, during, books)
    assert found == ([] if missed is None else [missed])


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("nowhere")
def test_a_provider_that_is_down_is_left_alone_and_comes_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = drill("provider-down", capsys, "--seconds", "2")
    assert report["refused"] == 0
    assert report["breaker_was"] in ("open", "half_open")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("nowhere")
def test_a_provider_that_is_slow_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = drill("slow-upstream", capsys, "--seconds", "3")
    assert report["refused"] == 0
    assert report["breaker_was"] in ("open", "half_open")
    # The first of them waited, until the gateway gave up; after that it did not ask any more.
    assert int(str(report["slowest_answer_ms"])) >= 1000
    assert int(str(report["median_answer_ms"])) < 1000


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("nowhere")
def test_a_short_leap_of_the_clock_begins_no_month(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MovedClock(tmp_path / "clock")  # or it is skipped
    report = drill("clock-jump", capsys, "--seconds", "2")
    assert report["month_before"] == report["month_during"] == report["month_after"]
    assert report["refused"] == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_drill_copies_the_ledger_and_touches_nothing_of_it(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("UPSTREAM_TOKEN", UPSTREAM_TOKEN)
    before = names(ledger)
    config = str(ledger / "config.toml")
    command = [sys.executable, "-m", "gwproxy", "drill", "storage-lost", "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, "--seconds", "2", "--config", config, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    report = json.loads(out)
    assert int(str(report["served_open"])) > 0
    assert names(ledger) == before


@pytest.mark.parametrize("seconds", ["0", "-1", "4000"])
def test_a_time_that_cannot_be_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "storage-lost", "--seconds", seconds]) == 2
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.usefixtures("nowhere")
def test_a_configuration_that_was_named_has_to_be_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["drill", "storage-lost", "--config", "none.toml"]) == 2
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.usefixtures("nowhere")
def test_a_configuration_that_is_there_and_wrong_is_not_passed_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("config.toml").write_text("[server]\nlisten = 5\n")
    assert main(["drill", "storage-lost"]) == 2
    assert "config.toml" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.usefixtures("nowhere")
def test_a_drill_that_is_told_to_stop_takes_its_file_system_away(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gwproxy", "drill", "disk-full"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}

    def mounted() -> bool:
        return str(tmp_path) in Path("/proc/self/mounts").read_text()

    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not mounted():
            time.sleep(0.02)  # no event tells of a mount
        if process.poll() is not None:
            assert process.stderr is not None
            told = process.stderr.read()
            assert "needs a small file system of its own" in told
            pytest.skip(told)  # a container may not mount
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (1, "gwproxy drill: stopped; nothing is left of it\n")
    assert not mounted()
    assert names(tmp_path) == []
