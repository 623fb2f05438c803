"""`gwproxy reconcile` over real sockets and a real ledger: each planted difference is found, and
nothing else; corrections are entries, made once, by whoever owns the ledger.
"""

import asyncio
import csv
import gzip
import io
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from gwproxy.core.ledger import Account, held
from gwproxy.core.records import Rates, Reserve, Settle, Tried
from gwproxy.demo import DemoUpstream
from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from gwproxy.storage.reconcile import beside, one_run
from tests.account import TOKEN, Shell, config_text, shell
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, ADMIN_KEY
from tests.office import Disk
from tests.scene import metric
from tests.test_layers import HOUSE

RATES: Rates = (150_000, 75_000, 150_000, 600_000)
"""Pico-USD a token of openai/gpt-4o-mini."""
DAY_MS = 86_400_000
EVERY_MS = 200
"""Between two requests: a hundred thousand are five hours and a half."""


def cost_of(tokens_in: int, tokens_out: int) -> int:
    return (tokens_in * RATES[0] + tokens_out * RATES[3]) // 1000


# -- a ledger and a log with planted differences ---------------------------------------------------


@dataclass
class Case:
    """One request as the ledger has it, and its rows of the log."""

    tokens: tuple[int, int]
    outcome: str = "completed"
    source: str = "provider"
    cost: int | None = None
    attempts: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    finding: str = "equal"
    corrected: int | None = None
    """What it should cost in the end, where that changes."""
    reasoning: int = 0


def row(tokens: tuple[int, int] | None, **changes: Any) -> dict[str, Any]:
    cost = None if tokens is None else cost_of(*tokens) / 10**9
    tokens_in, tokens_out = tokens or (None, None)
    return {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost, **changes}


def plain(tokens: tuple[int, int]) -> Case:
    return Case(tokens, rows=[row(tokens)])


def planted(name: str, tokens: tuple[int, int]) -> Case:
    """One of each kind of difference."""
    more = (tokens[0], tokens[1] + 7)
    guess = {"source": "estimated", "cost": cost_of(tokens[0], 0)}
    hit = {"cached": True, "cost": 0.0, "tokens_in": 0, "tokens_out": 0}
    failed = {"success": False, "status_code": 503, "attempt": 1}
    match name:
        case "forgotten":
            return Case(tokens, finding="ours_only")
        case "tokens":
            return Case(tokens, rows=[row(more)], finding="tokens_differ")
        case "price":
            return Case(tokens, rows=[row(tokens, cost=0.5)], finding="price_differs")
        case "hit":
            return Case(tokens, rows=[row(tokens, **hit)], finding="cached", corrected=0)
        case "no usage":
            return Case(tokens, source="counted", rows=[row(None)], finding="no_usage")
        case "unknown":
            real = cost_of(*more)
            return Case(
                tokens, "unknown", rows=[row(more)], finding="tokens_differ", corrected=real,
                **guess,
            )  # fmt: skip
        case "unknown and refused":
            rows = [row(None, success=False, status_code=500)]
            return Case(tokens, "unknown", rows=rows, finding="no_usage", corrected=0, **guess)
        case "recovered":
            return Case(
                tokens, "recovered", "estimated", 10**6, 0, [row(more)], "tokens_differ",
                cost_of(*more),
            )  # fmt: skip
        case "recovered, never sent":
            return Case(tokens, "recovered", "estimated", 10**6, 0, [], "ours_only", 0)
        case "counted":
            return Case(
                tokens, source="counted", rows=[row(more)], finding="tokens_differ",
                corrected=cost_of(*more),
            )  # fmt: skip
        case "left":
            return Case(tokens, "client_left", "counted", rows=[row(more)], finding="tokens_differ")
        case "second attempt":
            rows = [row(None, **failed), row(tokens, attempt=2)]
            return Case(tokens, attempts=2, rows=rows)
        case "tried twice":
            rows = [row(tokens), row(None, success=False, another=True)]
            return Case(tokens, rows=rows)
        case "billed twice":
            rows = [row(tokens), row(tokens, another=True)]
            return Case(tokens, rows=rows, finding="equal+theirs_only")
    raise AssertionError(name)


NAMES = (
    "forgotten", "tokens", "price", "hit", "no usage", "unknown", "unknown and refused",
    "recovered", "recovered, never sent", "counted", "left", "second attempt", "tried twice",
    "billed twice",
)  # fmt: skip


class History:
    """A ledger with so many requests of a day ago, and the log that the gateway would have."""

    def __init__(self, count: int, every: int, seed: int = 1) -> None:
        """Each `every`-th request is one of the planted ones, in turn."""
        draw = random.Random(seed)
        self.start = int(time.time() * 1000) - 2 * DAY_MS
        self.cases: list[Case] = []
        for number in range(count):
            tokens = (draw.randrange(1, 4000), draw.randrange(1, 2000))
            # The first and the last are in the log: what lies between them was its time.
            middle = every // 2
            if number % every == middle and number > every:
                self.cases.append(planted(NAMES[number // every % len(NAMES)], tokens))
            else:
                self.cases.append(plain(tokens))
        self.end = self.start + count * EVERY_MS

    def id(self, number: int) -> str:
        return f"req_{number:08d}"

    def t(self, number: int) -> int:
        return self.start + number * EVERY_MS

    def expected(self) -> Counter[str]:
        return Counter(
            kind for number, case in enumerate(self.cases) for kind in self._kinds(number, case)
        )

    def _kinds(self, number: int, case: Case) -> Iterator[str]:
        yield from case.finding.split("+")
        yield from ["equal"] * (max(case.attempts, 1) - 1)
        yield from ["equal" for row in case.rows if row.get("another") and not row["cost"]]

    def corrections(self) -> dict[str, int]:
        return {
            self.id(number): case.corrected
            for number, case in enumerate(self.cases)
            if case.corrected is not None
        }

    def log(self) -> list[dict[str, Any]]:
        rows = []
        for number, case in enumerate(self.cases):
            for place, each in enumerate(case.rows):
                made = self.t(number) + 3 + place
                attempt = each.get("attempt", 1)
                log_id = f"log_{number:08d}_{'x' if each.get('another') else attempt}"
                rows.append(
                    {
                        "id": log_id, "created_at": stamp(made), "provider": "openai",
                        "model": "gpt-4o-mini", "success": True, "status_code": 200,
                        "cached": False, "duration": 700,
                        "metadata": {"request_id": self.id(number), "attempt": attempt},
                        **{k: v for k, v in each.items() if k not in ("attempt", "another")},
                    }
                )  # fmt: skip
        return rows

    async def write(self, folder: Path, *, in_database: bool = True) -> None:
        kept = Kept(folder / "gwproxy.db", folder / "journal", segment_bytes=1 << 26)
        async with opened(kept, Log(io.StringIO(), "error"), files=Disk()) as store:
            ledger = store.ledger
            for number, case in enumerate(self.cases):
                t, tokens = self.t(number), case.tokens
                cost = cost_of(*tokens) if case.cost is None else case.cost
                month = stamp(t)[:7]
                accounts = (
                    Account(n, month, None) for n in ("key:key_1", "user:alice", "org:acme")
                )
                holds = held(ledger.state, accounts, cost)
                lsn = ledger.state.lsn + 1
                ledger.post(
                    Reserve(
                        lsn=lsn, t=t, synced=0, id=self.id(number), model="openai/gpt-4o-mini",
                        provider="openai", upstream_model="gpt-4o-mini", prices="1", holds=holds,
                    )
                )  # fmt: skip
                tried = tuple(
                    Tried(
                        "openai", "gpt-4o-mini", 200 if last else 503, "", "", 5,
                        cost if last else 0,
                    )
                    for place in range(case.attempts)
                    if (last := place == case.attempts - 1) in (True, False)
                )  # fmt: skip
                known = case.outcome in ("completed", "client_left") and case.rows
                name = f"log_{number:08d}_{case.attempts}"
                ledger.post(
                    Settle(
                        lsn=lsn + 1, t=t + 1, synced=0, r=lsn, cost=cost, source=case.source,
                        tokens=(tokens[0], 0, 0, tokens[1], case.reasoning), outcome=case.outcome,
                        attempts=tried, status=200, rates=RATES if case.attempts else None,
                        log_id=name if known and number % 3 else "",
                    )
                )  # fmt: skip
                if number % 500 == 0:
                    await asyncio.sleep(0)
            if in_database:
                await store.writer.reached(ledger.state.lsn)

    def words(self) -> tuple[str, ...]:
        return ("reconcile", "--from", stamp(self.start), "--to", stamp(self.end))


def stamp(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=TOKEN)
    await demo.start()
    yield demo
    await demo.stop()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoUpstream) -> Shell:
    return shell(tmp_path, monkeypatch, demo)


def counts(found: dict[str, Any]) -> Counter[str]:
    return Counter({kind: line["count"] for kind, line in found["kinds"].items()})


async def spent(run: Shell) -> int:
    assert await run("ledger", "show", "user:alice", "--json") == 0
    return sum(int(row["spent_usd"].replace(".", "")) for row in run.json["data"])


# -- what is found, and what is done about it ------------------------------------------------------


async def test_every_planted_difference_is_found_and_nothing_else(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(1_400, every=20)
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    demo.management.logs.plant(
        [{**history.log()[5], "id": "foreign", "metadata": {}}]  # not made by gwproxy
    )
    expected = history.expected() + Counter(theirs_only=1)
    assert await run(*history.words(), "--json", "--csv", "lines.csv") == 1
    found = run.json
    assert counts(found) == expected
    assert found["log_is_whole"]
    wanted = history.corrections()
    assert found["corrections"]["count"] == len(wanted)

    lines = list(csv.DictReader(io.StringIO((run.folder / "lines.csv").read_text())))
    by_kind = Counter(line["kind"] for line in lines if line["kind"] not in ("equal", "cached"))
    assert by_kind == Counter({k: n for k, n in expected.items() if k not in ("equal", "cached")})
    assert all(line["why"] for line in lines)

    before = await spent(run)
    asked = sum("/logs?" in request["path"] for request in demo.requests)
    assert await run(*history.words(), "--apply") == 1  # some differ beyond what can be corrected
    assert f"{len(wanted)} corrected." in run.err
    # A log that long ago says the same: only its first row was looked at.
    assert sum("/logs?" in request["path"] for request in demo.requests) == asked + 1
    after = await spent(run)
    charged = {history.id(n): c for n, c in enumerate(history.cases)}
    delta = sum(
        cost
        - (cost_of(*charged[name].tokens) if charged[name].cost is None else charged[name].cost)  # type: ignore[operator]
        for name, cost in wanted.items()
    )
    assert after - before == delta

    assert await run(*history.words(), "--apply", "--json") == 1
    assert run.json["corrections"]["count"] == 0
    assert "corrected" not in run.err
    assert await spent(run) == after
    assert await run("ledger", "verify") == 0, run.out
    assert await run("reconcile", "--from", stamp(history.start - 2 * DAY_MS), "--to",
                     stamp(history.start - DAY_MS), "--json") == 0  # fmt: skip
    assert run.json["kinds"] == {}


async def test_an_export_does_as_well_as_the_api(run: Shell, demo: DemoUpstream) -> None:
    history = History(300, every=20)
    await history.write(run.folder)
    export = run.folder / "export.jsonl"
    export.write_bytes(b"\n".join(map(orjson.dumps, history.log())))
    await demo.stop()
    run.monkeypatch.delenv("CLOUDFLARE_API_TOKEN")
    run.monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "any")
    assert await run("reconcile", "--file", str(export), "--json") == 1
    found = counts(run.json)
    assert found == history.expected()
    assert await run("reconcile", "--file", "nowhere") == 2
    assert "No such file" in run.err


async def test_what_is_older_than_the_log_is_not_missed(run: Shell, demo: DemoUpstream) -> None:
    history = History(100, every=1000)
    await history.write(run.folder)
    demo.management.logs.plant(history.log()[40:])
    assert await run(*history.words()) == 0
    assert "too old for the log     40" in run.out
    assert "The log goes back to" in run.out


async def test_a_log_with_holes_credits_nobody(run: Shell, demo: DemoUpstream) -> None:
    history = History(200, every=20)
    await history.write(run.folder)
    planted = history.log()
    demo.management.logs.plant(planted[:52] + planted[66:])
    assert await run(*history.words(), "--json") == 1
    assert not run.json["log_is_whole"]
    never_sent = [c for c in history.cases if c.outcome == "recovered" and not c.rows]
    assert never_sent
    assert run.json["corrections"]["count"] == len(history.corrections()) - len(never_sent)
    assert await run(*history.words()) == 1
    assert "The log has holes" in run.out


async def test_an_interrupted_run_goes_on_where_it_stopped(run: Shell, demo: DemoUpstream) -> None:
    history = History(3_000, every=10_000)
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    demo.management.fault({"on": "logs", "fault": "edge", "after": 50})
    assert await run(*history.words()) == 1
    assert "took this machine for a bot" in run.err
    assert "goes on from there" in run.err
    # A file in between, or one that is not there, takes nothing of that away.
    assert await run("reconcile", "--file", "nowhere.json") == 2
    (run.folder / "some.json").write_bytes(orjson.dumps(history.log()[:10]))
    assert await run("reconcile", "--file", "some.json", "--json") == 0, run.err
    assert counts(run.json) == Counter(equal=10)
    seen = len(demo.requests)
    assert await run("reconcile", "--json") == 0  # the same span, without being told
    assert "where it stopped" in run.err
    assert counts(run.json) == Counter(equal=3_000)
    assert len(demo.requests) - seen < 50


async def test_a_run_that_failed_yesterday_and_todays_are_one(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(200, every=1000)
    # The first half is older than the day that is compared when nothing is said.
    history.start = int(time.time() * 1000) - DAY_MS - 120_000 - 20_000
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    demo.management.fault({"on": "logs", "fault": "edge"})
    assert await run("reconcile") == 1
    shift_about(run, DAY_MS)
    assert await run("reconcile", "--json") == 0, run.err
    assert counts(run.json) == Counter(equal=200)
    assert "where it stopped" in run.err


async def test_a_run_that_failed_long_ago_is_told_and_left(run: Shell, demo: DemoUpstream) -> None:
    history = History(10, every=1000)
    await history.write(run.folder)
    demo.management.fault({"on": "logs", "fault": "edge"})
    assert await run("reconcile") == 1
    shift_about(run, 40 * DAY_MS)
    assert await run("reconcile", "--json") == 0, run.err
    assert "Finish it: gwproxy reconcile --from 20" in run.err
    span = [datetime.fromisoformat(run.json[name]) for name in ("from", "to")]
    assert (span[1] - span[0]).total_seconds() == 86_400


def shift_about(run: Shell, by_ms: int) -> None:
    """As if the last run had been so much earlier."""
    with sqlite3.connect(run.folder / "gwproxy-reconcile.db") as connection:
        (text,) = connection.execute("SELECT value FROM about WHERE name = 'about'").fetchone()
        about = orjson.loads(text)
        about = {**about, "since": about["since"] - by_ms, "until": about["until"] - by_ms}
        connection.execute(
            "UPDATE about SET value = ? WHERE name = 'about'", (orjson.dumps(about).decode(),)
        )
    connection.close()


async def test_two_runs_at_once_do_not_take_each_others_lines(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(3, every=10)
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    with one_run(beside(run.folder / "gwproxy.db")):
        assert await run(*history.words()) == 1
    assert f"under way ({os.getpid()})" in run.err
    assert await run(*history.words()) == 0, run.err


async def test_what_the_database_does_not_have_yet_is_not_compared(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(50, every=1000)
    await history.write(run.folder)
    # As a process that was killed leaves it: the journal knows more.
    with sqlite3.connect(run.folder / "gwproxy.db") as connection:
        connection.execute("DELETE FROM request WHERE lsn > 61")
        t = history.t(30) + 1
        connection.execute("UPDATE meta SET applied_lsn = 61, applied_t = ?", (t,))
    connection.close()
    demo.management.logs.plant(history.log())
    assert await run(*history.words(), "--json") == 0, run.out
    assert "records behind" in run.err
    assert counts(run.json) == Counter(equal=31)


async def test_what_needs_nothing_does_not_fail_and_is_not_called_equal(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(3, every=1000)
    history.cases[1] = planted("no usage", (100, 100))
    await history.write(run.folder)
    rows = history.log()
    demo.management.logs.plant(
        [*rows, {**rows[0], "id": "asked", "metadata": {"request_id": "doctor-1"}}]
    )
    assert await run(*history.words()) == 0, run.out
    assert "asked by the doctor" in run.out and "no usage upstream" in run.out
    assert "Both sides agree" not in run.out
    assert "Nothing is left to look into" in run.out
    assert await run(*history.words(), "--all") == 2
    assert "--csv FILE" in run.err


async def test_the_doctors_questions_are_no_strangers(run: Shell, demo: DemoUpstream) -> None:
    await History(1, every=1000).write(run.folder)
    await run("doctor")
    now = int(time.time() * 1000) + 1000
    assert await run(
        "reconcile", "--from", stamp(now - 60_000), "--to", stamp(now), "--json"
    ) == 0, run.out  # fmt: skip
    assert run.json["kinds"]["doctor"]["count"] >= 3
    assert "theirs_only" not in run.json["kinds"]
    assert run.json["kinds"]["doctor"]["drift_nanos"] > 0
    assert not any(run.json["drift_nanos"].values())  # what the alert is made of


async def test_what_has_no_figures_yet_is_not_called_settled(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(2, every=1000)
    history.start = int(time.time() * 1000) - 3_000
    await history.write(run.folder)
    first, second = history.log()
    demo.management.logs.plant([first, {**second, "tokens_in": 0, "tokens_out": 0, "cost": None}])
    span = ("reconcile", "--from", stamp(history.start), "--to", stamp(history.start + 2_000))
    assert await run(*span) == 1
    assert "1 row without figures yet: run it again" in run.out
    assert "Nothing is left" not in run.out and "agree" not in run.out
    demo.management.logs.clear()
    demo.management.logs.plant([first, second])
    assert await run(*span) == 0, run.out
    assert "Both sides agree." in run.out


async def test_a_second_record_of_our_own_is_no_stranger(run: Shell, demo: DemoUpstream) -> None:
    history = History(3, every=1000)
    history.cases[1] = planted("billed twice", (100, 100))
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    assert await run(*history.words()) == 1
    assert "1 second record of attempts of ours" in run.out
    assert "somebody uses the gateway" not in run.out


async def test_one_request_is_told_of_as_one(run: Shell, demo: DemoUpstream) -> None:
    history = History(3, every=1000)
    history.cases[1] = planted("counted", (100, 100))
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    assert await run(*history.words()) == 1
    assert "1 request was charged an estimate and can get its real cost" in run.out


async def test_reasoning_that_the_log_leaves_out_is_named(run: Shell, demo: DemoUpstream) -> None:
    history = History(3, every=1000)
    history.cases[1] = Case((100, 500), reasoning=400, rows=[row((100, 100))])
    await history.write(run.folder)
    demo.management.logs.plant(history.log())
    assert await run(*history.words()) == 0, run.out
    assert "leaves reasoning out, which the provider bills: of 1 equal line" in run.out
    assert "(-$0.00024" in run.out
    assert "explained above" in run.out


async def test_an_empty_log_says_how_to_turn_it_on(run: Shell, demo: DemoUpstream) -> None:
    history = History(3, every=10)
    await history.write(run.folder)
    assert await run(*history.words()) == 1
    assert "The gateway's log is empty" in run.out
    assert "--collect-logs on" in run.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--from", "yesterday"), "2026-11-20T12:00:00Z"),
        (("--from", "2026-11-20", "--to", "2026-11-19"), "--from must be before --to"),
        (("--from", "0001-01-01"), "--from: no log is of the year 1"),
        (("--to", "9999-12-31"), "--to: no log is of the year 9999"),
    ],
)
async def test_a_span_that_is_none_is_told(run: Shell, words: tuple[str, ...], says: str) -> None:
    assert await run("reconcile", *words) == 2
    assert says in run.err


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"{}" * 99)[:-20] + b"junk" * 9,
        b"\x1f\x8bno gzip",
        b"a\x00\xff\r\xfe\n\x00",
        b'{"result": 5}',
        b"5\n",
    ],
    ids=["damaged gzip", "no gzip", "binary", "no list", "a number"],
)
async def test_a_file_that_is_no_export_ends_with_2_and_one_line(run: Shell, data: bytes) -> None:
    (run.folder / "export").write_bytes(data)
    assert await run("reconcile", "--file", "export") == 2
    assert "export" in run.err
    assert len(run.err.splitlines()) == 1


# -- a running server ------------------------------------------------------------------------------


def beside_a_server(front: Front, monkeypatch: pytest.MonkeyPatch) -> Shell:
    run = Shell(front.gateway.database.parent, monkeypatch)
    monkeypatch.chdir(run.folder)
    for name, value in (
        ("GWPROXY_CONFIG", str(run.folder / "config.toml")),
        ("CLOUDFLARE_API_TOKEN", TOKEN),
        ("GWPROXY_ADMIN_KEY", ADMIN_KEY),
        ("GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES", "1048576"),
    ):
        monkeypatch.setenv(name, value)
    return run


async def test_a_running_server_corrects_itself_once(
    start_gateway: StartGateway,
    demo: DemoUpstream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prices = "".join(
        f'[prices.models."openai/gpt-4o-mini+{word}"]\ninput = "0.15"\noutput = "0.60"\n'
        for word in ("cache-hit", "reset-before-headers")
    )
    front = await start_gateway(config=config_text(demo, prices), CLOUDFLARE_API_TOKEN=TOKEN)
    for word in ("", "+cache-hit"):
        answer = await front.chat(
            {"model": f"openai/gpt-4o-mini{word}", "messages": [{"role": "user", "content": "Hi"}]}
        )
        assert answer.status == 200, await answer.text()
    # The provider answered the gateway, and the gateway's answer never came here.
    demo.script(
        writes=[], status=0, end="reset", usage={"prompt_tokens": 9, "completion_tokens": 50}
    )
    demo.script(fault="reset-before-headers")
    answer = await front.chat(
        {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
    )
    assert answer.status == 502
    for each in demo.management.logs.rows:
        if each["tokens_in"] is not None and not each["success"]:
            each["success"], each["status_code"] = True, 200

    run = beside_a_server(front, monkeypatch)
    to = stamp(int(time.time() * 1000) + 1000)
    words = ("reconcile", "--to", to, "--url", front.url, "--apply", "--json")
    await run(*words)
    found = run.json
    assert found["corrections"]["count"] == 1, run.out + run.err
    assert "1 corrected." in run.err
    assert found["kinds"]["cached"]["count"] == 1
    await run(*words)
    assert run.json["corrections"]["count"] == 0
    summary = run.out
    assert await run("ledger", "verify") == 0, run.out
    run.out = summary

    answer = await front.client.get("/admin/reconcile", headers=ADMIN)
    last = await answer.json()
    assert last["kinds"]["equal"]["count"] >= 2
    assert last["from"] and last["to"]

    # Both sides, one beside the other.
    served = [line for line in demo.record if line["tokens"] and line["completed"]]
    answer = await front.client.get("/admin/usage?group_by=provider", headers=ADMIN)
    [line] = (await answer.json())["data"]
    assert line["gateway"]["request_count"] == len(demo.management.logs)
    assert line["gateway"]["cached_count"] == 1
    assert line["gateway"]["failed_count"] == 1
    assert line["gateway"]["output_tokens"] >= served[0]["tokens"]["output"]
    answer = await front.client.get("/admin/usage?group_by=model", headers=ADMIN)
    models = {row["model"]: row for row in (await answer.json())["data"]}
    assert models["gpt-4o-mini+cache-hit"]["gateway"]["cost_usd"] == "0.000000000"
    answer = await front.client.get("/admin/usage?group_by=provider&user_id=alice", headers=ADMIN)
    assert "gateway" not in (await answer.json())["data"][0]
    answer = await front.client.get("/admin/providers/openai", headers=ADMIN)
    assert (await answer.json())["gateway"] == line["gateway"]
    answer = await front.client.get("/admin/providers/anthropic", headers=ADMIN)
    assert (await answer.json())["gateway"] is None
    assert await metric(front, "gwproxy_reconcile_lines", kind="cached") == 1
    drift = await metric(front, "gwproxy_reconcile_drift_usd")
    assert drift == pytest.approx(float(sum_of_drift(run)), abs=1e-12)


async def test_two_runs_that_meet_within_an_hour_show_all_of_both(
    start_gateway: StartGateway,
    demo: DemoUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front = await start_gateway(config=config_text(demo), CLOUDFLARE_API_TOKEN=TOKEN)
    run = beside_a_server(front, monkeypatch)
    made = []
    for _ in range(4):
        answer = await front.chat(
            {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
        )
        assert answer.status == 200, await answer.text()
        made.append(demo.management.logs.rows[-1]["created_at"])
        await asyncio.sleep(0.002)  # the log knows no more than milliseconds
    assert len(set(made)) == 4
    first, last = (int(datetime.fromisoformat(t).timestamp() * 1000) for t in (made[0], made[-1]))

    async def seen() -> dict[str, Any]:
        answer = await front.client.get("/admin/usage?group_by=provider", headers=ADMIN)
        [line] = (await answer.json())["data"]
        found: dict[str, Any] = line["gateway"]
        return found

    spans = [(stamp(first), made[2]), (made[2], stamp(last + 1)), (made[1], stamp(last + 1))]
    for span, count in zip(spans, (2, 4, 4), strict=True):
        await run("reconcile", "--from", span[0], "--to", span[1], "--url", front.url, "--json")
        found = await seen()
        assert found["request_count"] == count, run.err
        assert found["covered_s"] == 0  # it took less
    # A log that has forgotten takes nothing back.
    demo.management.logs.clear()
    await run("reconcile", "--from", stamp(first - 9000), "--to", stamp(last + 1), "--json")
    assert (await seen())["request_count"] == 4


async def test_corrections_are_checked_before_they_are_made(start_gateway: StartGateway) -> None:
    front = await start_gateway()
    answer = await front.chat(
        {"model": "mock/echo", "messages": [{"role": "user", "content": "Hello there."}]}
    )
    request_id = answer.headers["x-request-id"]
    receipt = await front.client.get(
        f"/v1/receipts/{request_id}", headers={"Authorization": f"Bearer {front.key}"}
    )
    cost = (await receipt.json())["cost_usd"]

    async def post(**changes: Any) -> tuple[int, Any]:
        one = {
            "request_id": request_id, "charged_usd": cost, "cost_usd": "0.5", "reason": "a test",
            **changes,
        }  # fmt: skip
        answer = await front.client.post(
            "/admin/reconcile", json={"corrections": [one]}, headers=ADMIN
        )
        return answer.status, await answer.json()

    async def result(**changes: Any) -> str:
        status, body = await post(**changes)
        assert status == 200, body
        [row] = body["data"]
        found: str = row["result"]
        return found

    assert await result(request_id="req_nobody") == "unknown"
    assert await result(charged_usd="0.1") == "changed"
    assert await result() == "applied"
    assert await result() == "already"
    assert await result(charged_usd="0.5", cost_usd="0.25") == "applied"
    assert await result(charged_usd="0.25", cost_usd="0.25") == "already"
    receipt = await front.client.get(
        f"/v1/receipts/{request_id}", headers={"Authorization": f"Bearer {front.key}"}
    )
    found = await receipt.json()
    assert found["cost_usd"] == cost  # as it was charged, and its formula says
    assert [(one["cost_usd"], one["reason"]) for one in found["corrections"]] == [
        ("0.500000000", "a test"), ("0.250000000", "a test"),
    ]  # fmt: skip
    for changes in ({"cost_usd": "-1"}, {"cost_usd": None}, {"reason": ""}, {"other": 1}):
        assert (await post(**changes))[0] == 400
    usage = await front.client.get("/admin/users/alice/usage", headers=ADMIN)
    assert (await usage.json())["month_usage_usd"] == "0.250000000"
    status = await front.client.post("/admin/reconcile", json={"corrections": []}, headers=ADMIN)
    assert status.status == 400
    assert (await front.client.post("/admin/reconcile", json={})).status == 401


def sum_of_drift(run: Shell) -> float:
    return sum(run.json["drift_nanos"].values()) / 10**9


# -- a hundred thousand ----------------------------------------------------------------------------

_MEASURED = """
import resource, sys
from gwproxy.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_hundred_thousand_records_fit_into_little_memory(
    run: Shell, demo: DemoUpstream
) -> None:
    history = History(100_000, every=500)
    await history.write(run.folder)
    log = history.log()
    random.Random(2).shuffle(log)
    logs = demo.management.logs
    logs.plant(sorted(log, key=lambda row: str(row["created_at"])))
    for after, fault in ((100, "status-429"), (700, "status-503"), (1500, "slow-500")):
        demo.management.fault({"on": "logs", "fault": fault, "after": after, "count": 3})

    async def measured(*words: str) -> tuple[int, Any, int]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _MEASURED, *words,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HOUSE.parent)},
        )  # fmt: skip
        out, err = await process.communicate()
        assert out, err.decode()
        return process.returncode or 0, orjson.loads(out), int(err.splitlines()[-1])

    small = ("reconcile", "--from", stamp(history.start - DAY_MS), "--to", stamp(history.start))
    _, _, base = await measured(*small, "--json")
    code, found, peak = await measured(*history.words(), "--json")
    assert code == 1
    assert counts(found) == history.expected()
    wanted = len(history.corrections())
    assert found["corrections"]["count"] == wanted
    assert peak - base < 32 * 1024, (base, peak)  # KiB
    # The log is in the book already: what is left is to compare, and to correct.
    code, found, _ = await measured(*history.words(), "--json", "--apply")
    assert (code, found["corrections"]["count"]) == (1, wanted)
    code, found, _ = await measured(*history.words(), "--json", "--apply")
    assert (code, found["corrections"]["count"]) == (1, 0)
    assert await run("ledger", "verify") == 0, run.out
