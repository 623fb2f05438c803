"""The benchmark as a tool: it works, it counts CPU rightly, it leaves nobody behind.

No figure of speed is checked here, because a busy machine would decide the outcome.
"""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import peers, probes, wire
from bench.admin import run as admin_bench
from bench.cells import Table, ratios
from bench.children import ROOT, ChildFailed, Children, Talker
from bench.entrant import Site, Unavailable
from bench.growth import breakage
from bench.links import quantiles
from bench.report import remarks, render
from bench.run import SMOKE, Results, growth_phase
from bench.stalls import SMOKE as STALLS_SMOKE
from bench.stalls import Late, Outcome, Phase
from bench.stalls import report as stall_report
from bench.stalls import run as stalls
from bench.watched import watching

# Burns CPU in a thread that ends and in a child of its own, then tells what it has used itself.
_BURNER = """
import os, sys, threading, time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
thread = threading.Thread(target=burn, args=(0.15,))
thread.start()
thread.join()
reader, writer = os.pipe()
if os.fork() == 0:
    burn(0.1)
    os.write(writer, str(time.process_time_ns()).encode())
    sys.stdin.read()
    os._exit(0)
child = int(os.read(reader, 100))
print(time.process_time_ns() + child, flush=True)
sys.stdin.read()
"""


def test_cpu_of_ended_threads_and_of_child_processes_is_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _BURNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as burner:
        assert burner.stdout is not None and burner.stdin is not None
        told_ns = int(burner.stdout.readline())
        measured_ns = probes.cpu_ns(burner.pid)
        assert len(probes.process_tree(burner.pid)) == 2
        burner.stdin.close()
    assert told_ns > 250_000_000
    # What both spent on printing and waiting lies between the two readings.
    assert told_ns <= measured_ns < told_ns * 1.05


def test_memory_of_a_process_grows_by_what_it_keeps() -> None:
    command = "import sys; kept = b'x' * int(sys.argv[1]); print(flush=True); sys.stdin.read()"
    weights = []
    for size in (0, 64 << 20):
        with subprocess.Popen(
            [sys.executable, "-c", command, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stdin is not None
            process.stdout.readline()
            weights.append(probes.memory(process.pid))
            process.stdin.close()
    assert 60 << 20 < weights[1].pss - weights[0].pss < 68 << 20
    assert weights[1].rss >= weights[1].pss


def test_a_small_run_measures_the_naive_proxy_and_loses_nothing(tmp_path: Path) -> None:
    report, windows = tmp_path / "report.md", tmp_path / "all.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "--smoke"),
            *("--results", str(report), "--json", str(windows)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(windows.read_text())
    assert results["absent"] == {}
    by_phase = {window["phase"]: window for window in results["windows"]}
    assert by_phase.keys() == {
        *("held streams", "requests", "paced requests", "streams", "first byte", "calm requests"),
        *map(growth_phase, SMOKE.growth_steps),
    }
    for window in results["windows"]:
        assert "failed" not in window and not window.get("errors")
        verdict = window.get("verdict")
        if verdict:
            assert verdict["whole"] == verdict["streams"] > 0
            assert verdict["events_received"] == verdict["events_expected"] > 0
    for phase in ("requests", "paced requests", "streams"):
        assert by_phase[phase]["cpu_ns"] > 0
    assert report.read_text() in done.stdout
    assert "| naive " in report.read_text()


def test_ctrl_c_ends_every_process_of_the_run() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "--smoke"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as bench:
        assert bench.stderr is not None
        while not bench.stderr.readline().startswith("held streams"):
            assert bench.poll() is None
        tree = probes.process_tree(bench.pid)
        assert len(tree) == 4, "the run, the upstream, the load generator, the naive proxy"
        bench.send_signal(signal.SIGINT)
        assert bench.wait(20) == 130
        assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]


def test_a_child_that_says_nothing_is_given_up() -> None:
    with Children() as children:
        silent = children.start([sys.executable, "-c", "input()"], piped=True)
        with pytest.raises(ChildFailed, match="said nothing"):
            Talker(silent, "silent").hear(0.05)
    assert silent.poll() is not None


def test_a_request_has_the_size_the_report_states_whatever_it_asks_for() -> None:
    plain = wire.request_body("openai/gpt-4o-mini")
    stream = wire.stream_body("m", stream_id=1999, n_events=24, interval_ms=500)
    assert len(plain) == len(stream) == wire.REQUEST_BYTES
    assert wire.stamp(wire.word_event(3, 123456789)) == 123456789
    assert wire.stamp(wire.DONE) is None


def test_a_rewritten_answer_is_judged_by_what_it_says() -> None:
    rewritten = orjson.dumps({"id": "other", **orjson.loads(wire.ANSWER), "extra": None})
    assert wire.complaint_of_bytes(rewritten) and not wire.complaint_of_meaning(rewritten)
    for changed in (rewritten.replace(b"invoice", b"bill"), b"{}", b"no JSON"):
        assert wire.complaint_of_meaning(changed)


def test_a_stamped_word_survives_whoever_writes_the_event_anew() -> None:
    event = wire.word_event(0, 123456789, stamped=True)
    anew = orjson.loads(event.removeprefix(b"data: "))
    del anew["obfuscation"]
    rewritten = b"data: " + json.dumps(anew).encode()
    assert wire.stamp(rewritten) == wire.stamp(event) == 123456789
    assert wire.text_of(rewritten) == wire.stamped_word(123456789)
    assert wire.text_of(wire.DONE) == wire.text_of(wire.usage_event(3)) == b""


def _step(**changed: Any) -> dict[str, Any]:
    return {
        **{"streams": 10, "still_open": 10, "events": 100, "rate": 100.0, "rate_asked": 100.0},
        **{"wall_s": 1.0, "verdict": {"whole": 10, "errors": {}}},
        **changed,
    }


@pytest.mark.parametrize(
    ("window", "why"),
    [
        (_step(), ""),
        (_step(events=98), ""),
        (_step(still_open=7), "only 7 of 10 streams were open"),
        (_step(events=60, rate=60.0), "only 60% of the events came in time"),
        (_step(verdict={"whole": 9, "errors": {"cut": 1}}), "1 streams were not whole"),
        ({"failed": "TimeoutError"}, "the window failed"),
    ],
)
def test_a_number_of_streams_that_was_not_carried_is_called_broken(
    window: dict[str, Any], why: str
) -> None:
    assert breakage(window).startswith(why) and bool(breakage(window)) == bool(why)


def test_a_turn_that_comes_late_is_written_down_with_the_work_that_kept_it(tmp_path: Path) -> None:
    async def busy() -> None:
        await asyncio.sleep(0.02)
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        await asyncio.sleep(0.02)

    seen = tmp_path / "turns"
    began = time.monotonic()
    with seen.open("wb") as out:
        watching(busy(), out, stacks=True)
    lines = [json.loads(line) for line in seen.read_bytes().splitlines()]
    late = Late.between(lines, began, time.monotonic())
    assert late.worked_ms > 45 and late.worst_ms > 45
    longest = max(late.lines, key=lambda line: line["worked_ms"])
    assert any("busy" in stack for stack in longest["stacks"])
    assert Late.between(lines, began - 2, began - 1).worst_ms == 0


def test_the_stalls_of_the_gateway_are_told_from_those_of_the_machine() -> None:
    phases = [Phase("lists", 0.0, 1.0, "40 lists", 2, 1), Phase("scrapes", 1.0, 2.0, "5", 2, 0)]
    gateway = [
        {"t": 0.5, "late_ms": 25.0, "worked_ms": 12.0},
        {"t": 1.5, "late_ms": 25.0, "worked_ms": 1.0},
    ]
    control = [
        {"t": 0.5, "late_ms": 4.0, "worked_ms": 0.1},
        {"t": 1.5, "late_ms": 20.0, "worked_ms": 0.1},
    ]
    text = stall_report(Outcome(STALLS_SMOKE, phases, gateway, control, 20, 1 << 20, {"whole": 20}))
    assert "| lists: 40 lists | 25.0 | 4.0 | 21.0 | 1 | 12.0 | 2, 1 |" in text
    assert "| scrapes: 5 | 25.0 | 20.0 | 5.0 | 0 | 1.0 | 2, 0 |" in text
    assert "later than allowed: 1 of 2" in text and "at a stretch: 1." in text


@pytest.mark.slow
def test_the_bench_of_stalls_works() -> None:
    found = stalls(STALLS_SMOKE)
    assert len(found.phases) == 7 and found.open_streams == STALLS_SMOKE.streams
    assert found.whole["whole"] == STALLS_SMOKE.streams
    assert sum(phase.ticks for phase in found.phases) > 0
    assert "| all of it: " in stall_report(found)


def test_a_gateway_that_is_not_installed_is_left_out_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "HOME", tmp_path)
    site = Site(tmp_path, 1, 2, None)
    for entrant in peers.ENTRANTS:
        with pytest.raises(Unavailable, match=f"bench.peers install {entrant.name}|node is not"):
            entrant.prepare(site)
        assert entrant.version()[0].isdigit()


def test_ratios_are_formed_within_a_round_and_only_where_both_took_part() -> None:
    results = Results(SMOKE)
    for round_, mine, theirs in ((0, 20, 10), (1, 90, 30), (2, 50, None)):
        results.windows.append({"phase": "p", "round": round_, "who": "gwproxy", "us": mine})
        other = {"us": theirs} if theirs else {"failed": "TimeoutError"}
        results.windows.append({"phase": "p", "round": round_, "who": "nginx", **other})
    assert ratios(results, "p", "gwproxy", "nginx", lambda window: window["us"]) == [2.0, 3.0]


def test_a_reader_is_told_of_lost_streams_and_missed_rates() -> None:
    results = Results(SMOKE)
    results.windows.append(
        {
            **{"phase": "streams", "round": 0, "who": "naive", "still_open": SMOKE.streams},
            **{"rate": 300.0, "rate_asked": 400.0, "load_busy": 0.99, "upstream_busy": 0.1},
            "verdict": {"streams": 4, "whole": 3, "errors": {"did not end": 1}},
        }
    )
    said = " ".join(remarks(results))
    assert "75%" in said and "load process used 99%" in said and "1 streams were not whole" in said


def test_a_run_in_which_nobody_took_part_still_makes_a_report() -> None:
    results = Results(SMOKE, absent={"naive": "not here"})
    results.machine = dict.fromkeys(
        (
            *("date", "cpu", "cores", "memory_gib", "kernel", "python", "aiohttp", "uvloop"),
            *("httptools", "orjson", "openssl", "load_average_before"),
            *("stolen_percent", "idle_percent"),
        ),
        "?",
    )
    assert "naive did not take part: not here." in render(results)


def test_tables_are_aligned_and_quantiles_are_values_that_occurred() -> None:
    lines = str(Table("T", "words", ["a", "b"], [["long name", "1"]])).splitlines()[4:]
    assert len({len(line) for line in lines}) == 1
    assert quantiles([3, 1, 2]) == {"p50": 2, "p99": 3, "p999": 3, "max": 3, "count": 3}
    assert quantiles([]) == {}


@pytest.mark.slow
def test_the_bench_of_administration_works() -> None:
    text = admin_bench(users=100, requests=2_000, streams=2, rounds=1, seconds=0.5, imported=2_000)
    assert "| create a user |" in text and "| revoke a key |" in text
    assert "| report by user, 1,000 a page |" in text
    assert "| nobody administers |" in text and "| the import, until it is in force |" in text
    assert "2,000 users imported: in force after" in text
