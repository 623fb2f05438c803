"""`gwproxy ledger`: what it finds, how an account stood, and what moves to the archive."""

import argparse
import asyncio
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from gwproxy.cli.ledger import add_commands
from gwproxy.core.period import rfc3339
from gwproxy.core.records import Adjust, Close
from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from tests.ledgers import DAY, START, Place, catch_up
from tests.office import Disk
from tests.test_cli_directory import CONFIG

MONTH = "2025-11"


@dataclass
class Shell:
    folder: Path
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def run(self, *argv: str) -> int:
        parser = argparse.ArgumentParser(prog="gwproxy")
        add_commands(parser.add_subparsers(required=True))
        config = ["--config", str(self.folder / "config.toml")]
        self.capsys.readouterr()
        args = parser.parse_args(["ledger", argv[0], *config, *argv[1:]])
        code: int = args.func(args)
        self.out, self.err = self.capsys.readouterr()
        return code

    def json(self, *argv: str) -> dict:
        assert self.run(*argv, "--json") == 0, self.err
        found: dict = orjson.loads(self.out)
        return found


@pytest.fixture
async def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Requests on the last day of November 2025, some days later, and in the January after."""
    (tmp_path / "config.toml").write_text(
        CONFIG.format(listen="127.0.0.1:0", admin="") + "keep_months = 1\n"
    )
    async with await Place(tmp_path).open() as place:
        live = place.live
        live.settle(live.reserve("ann", 500), 300)
        live.settle(live.reserve("ben", 500), 600)
        live.post(
            Adjust,
            accounts=(("user:ann", MONTH),),
            delta=50,
            type="grant",
            actor="root",
            reason="a gift",
        )
        live.t += 5 * DAY
        live.settle(live.reserve("ann", 500), 200)
        live.t += 40 * DAY
        live.settle(live.reserve("ann", 500), 100)
        await catch_up(place.writer())
        live.sync()
    return Shell(tmp_path, capsys)


def rows(found: dict, account: str) -> dict[str, tuple[str, str, int]]:
    return {
        row["period"]: (row["spent_usd"], row["granted_usd"], row["requests"])
        for row in found["data"]
        if row["account"] == account
    }


NOVEMBER = ("0.000000300", "0.000000050", 1)
DECEMBER = ("0.000000200", "0.000000000", 1)


def test_how_accounts_stood_at_a_moment(shell: Shell) -> None:
    at = rfc3339(START + DAY)
    assert rows(shell.json("replay", "--at", at), "user:ann") == {MONTH: NOVEMBER}
    before = shell.json("replay", "--at", rfc3339(START - 1))
    assert before["data"] == []
    later = rows(shell.json("replay", "--at", rfc3339(START + 10 * DAY)), "user:ann")
    assert later == {MONTH: NOVEMBER, "2025-12": DECEMBER}
    provider = rows(shell.json("replay", "--at", at), "provider:openai")
    assert provider["2025-11-30"][0] == "0.000000900"


def test_a_month_is_archived_and_all_the_commands_know_it(shell: Shell) -> None:
    assert shell.run("archive", "--list") == 0
    assert shell.out == "Nothing was archived.\n"
    assert shell.json("archive") == {"archived": [MONTH, "2025-12", "2026-01"]}
    assert shell.run("archive") == 0
    assert shell.out == "Nothing to archive.\n"
    assert shell.run("verify") == 0, shell.err
    listed = shell.json("archive", "--list")["data"]
    assert [(row["month"], row["state"]) for row in listed] == [
        (month, "archived") for month in (MONTH, "2025-12", "2026-01")
    ]
    assert shell.run("archive", "--verify") == 0, shell.err
    assert shell.out.endswith("ledger archive: ok (3 files, 4 requests)\n")
    found = shell.json("archive", "--find", "req_00000003", "--month", MONTH)
    assert (found["id"], found["cost"], found["overrun"]) == ("req_00000003", 600, 100)
    assert shell.run("archive", "--find", "req_00000003", "--month", "2025-12") == 1
    assert "none of the files" in shell.err
    later = shell.json("replay", "--at", rfc3339(START + 10 * DAY))
    assert rows(later, "user:ann") == {MONTH: NOVEMBER}
    assert later["archived_months"] == ["2025-12"]
    assert shell.run("replay", "--at", rfc3339(START + 10 * DAY)) == 0
    assert "In the archive" in shell.err and "2025-12" in shell.err


def test_what_is_archived_is_not_priced_anew_and_that_is_told(shell: Shell) -> None:
    shell.run("archive", "--month", MONTH)
    assert shell.run("rerate", "--prices", "built-in") == 0
    assert MONTH in shell.err and "2025-12" not in shell.err
    assert shell.run("rerate", "--prices", "built-in", "--month", "2025-12") == 0
    assert MONTH not in shell.err


def test_one_month_is_archived_when_it_is_asked_for(shell: Shell) -> None:
    assert shell.run("archive", "--month", "2025-12") == 0
    assert "2025-12" in shell.out and MONTH not in shell.out
    assert shell.run("verify") == 0, shell.err
    assert shell.run("archive", "--month", "2025-12") == 0
    assert shell.out == "Nothing to archive.\n"
    assert shell.run("archive", "--month", "2999-01") == 1
    assert "35 days" in shell.err
    assert shell.run("archive", "--month", "2025-13") == 2


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize(("harm", "words"), [(_cut, "not whole"), (Path.unlink, "is missing")])
def test_a_file_that_is_not_good_any_more_is_told(
    shell: Shell, harm: Callable[[Path], None], words: str
) -> None:
    shell.run("archive")
    [file] = (shell.folder / "gwproxy.db.archive").glob(f"{MONTH}-*")
    harm(file)
    assert shell.run("archive", "--verify") == 1
    assert words in shell.err
    assert shell.run("verify") == 0, "the tables are right without it"


async def test_records_about_long_ago_are_understood_by_every_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start and the commands find what is adjusted or closed and not kept in memory any more."""
    (tmp_path / "config.toml").write_text(CONFIG.format(listen="127.0.0.1:0", admin=""))
    async with await Place(tmp_path).open() as place:
        live = place.live
        live.settle(live.reserve("ann", 500), 300)
        live.t += 100 * DAY
        live.settle(live.reserve("ann", 500), 100)
        await catch_up(place.writer())
        ann, key = ("user:ann", MONTH), ("key:key_ann", MONTH)
        late = {"type": "reconcile", "actor": "root", "reason": ""}
        live.post(Adjust, accounts=(ann,), delta=-100, **late)
        live.post(Close, account=key[0], period=MONTH, spent=300, credited=0, count=1, hash="0")
        live.post(Adjust, accounts=(ann, key), delta=-7, **late)
        live.sync()
    shell = Shell(tmp_path, capsys)
    assert await asyncio.to_thread(shell.run, "verify") == 0, shell.err
    assert await asyncio.to_thread(shell.run, "show", "user:ann", "--json") == 0
    assert rows(orjson.loads(shell.out), "user:ann")[MONTH] == ("0.000000193", "0.000000000", 1)
    kept = Kept(tmp_path / "gwproxy.db", tmp_path / "journal", segment_bytes=1 << 20)
    async with opened(kept, Log(io.StringIO(), "error"), files=Disk()) as store:
        balances = store.ledger.state.balances
        assert balances[ann].figures() == (193, 0, 1, 0)
        assert balances[key].figures() == (-7, 0, 0, 0)
    assert await asyncio.to_thread(shell.run, "verify") == 0, shell.err


def test_a_loss_that_is_accepted_leaves_a_backup(shell):
    """The new journal does not go back to the beginning."""
    [journal] = {each.parent for each in shell.folder.glob("*/*.journal")}
    journal.rename(shell.folder / "elsewhere")
    assert shell.run("accept-loss") == 0, shell.err
    assert len(list(journal.glob("backup-*.db"))) == 1


def segments(shell: Shell) -> list[Path]:
    return sorted(shell.folder.glob("*/*.journal"))


def test_a_journal_without_its_segments_does_not_verify_until_the_loss_is_accepted(shell):
    assert shell.run("verify") == 0, shell.err
    for file in segments(shell):
        file.rename(shell.folder / file.name)
    assert shell.run("verify") == 1
    assert "the journal is missing, and the database has records up to" in shell.err
    assert "accept-loss" in shell.err
    assert shell.run("accept-loss") == 0, shell.err
    assert shell.run("verify") == 0, shell.err
    # What went before is in a backup: without one, it is in nothing but the database.
    for file in shell.folder.glob("*/backup-*.db"):
        file.unlink()
    assert shell.run("verify") == 1
    assert "are in no segment and in no backup" in shell.err


@pytest.mark.parametrize("ahead", [True, False])
async def test_a_gap_in_the_journal_is_lawful_where_the_database_was_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ahead: bool
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.format(listen="127.0.0.1:0", admin=""))
    database, journal, older = tmp_path / "gwproxy.db", tmp_path / "journal", tmp_path / "older"

    async def go_on(cost: int) -> None:
        async with await Place(tmp_path).open() as place:
            live = place.live
            live.state.lsn = place.journal.end.lsn
            live.settle(live.reserve("ann", 500), cost)
            await catch_up(place.writer())
            live.sync()

    await go_on(100)
    shutil.copytree(journal, older)
    shutil.copy(database, older)
    await go_on(200)
    # The journal's end is lost, and the database has what was in it.
    shutil.rmtree(journal)
    shutil.copytree(older, journal, ignore=shutil.ignore_patterns("*.db*"))
    await go_on(300)
    if not ahead:
        shutil.copy(older / "gwproxy.db", database)
    shell = Shell(tmp_path, capsys)
    code = await asyncio.to_thread(shell.run, "verify")
    if ahead:
        assert code == 0, shell.err
    else:
        assert code == 1
        assert "the journal has no 3 to 4, nor has the database, which ends at 2" in shell.err
