"""Reports, exports and imports from the command line, with a server and without one."""

import asyncio
import csv
import hashlib
import io
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gwproxy.cli import main
from tests.conftest import Front
from tests.harness import ADMIN, ADMIN_KEY, chat


class Command:
    """Runs `gwproxy` as a person would, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *argv: str) -> int:
        self._capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return code

    async def beside(self, *argv: str) -> int:
        """While the server in this test's loop goes on serving."""
        return await asyncio.to_thread(self, *argv)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Command:
    for name in [*os.environ]:
        if name.startswith(("GWPROXY", "STATE_DIRECTORY", "CLOUDFLARE_", "AI_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "state"
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(
        '[server]\nlisten = "127.0.0.1:9"\n[upstream]\nflavour = "openai"\n'
        'base_url = "http://127.0.0.1:9/v1"\n[storage]\njournal_segment_bytes = 1048576\n'
    )
    monkeypatch.setenv("GWPROXY_CONFIG", str(config))
    return Command(capsys)


ROWS = "user_id,email,monthly_limit_usd\nann,ann@example.org,5\nbob,,\n"


def test_a_file_is_imported_and_exported_without_a_server(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "people.csv"
    table.write_text(ROWS)
    assert command("import", str(table), "--dry-run") == 0
    assert command.out == "checked, nothing was imported: 2 created\n"
    assert command("users", "show", "ann") == 1
    assert command("import", str(table), "--json") == 0
    assert json.loads(command.out)["committed"] is True
    assert command("import", str(table)) == 0
    assert command.out == "imported: 2 unchanged\n"

    copy = tmp_path / "copy.ndjson"
    assert command("export", "all", "--output", str(copy)) == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line)["kind"] for line in copy.read_text().splitlines()] == [
        *("organization", "user", "user")
    ]
    assert command("import", str(copy)) == 0
    assert command.out == "imported: 3 unchanged\n"
    assert command("export", "all", "--format", "csv") == 2

    table.write_text(ROWS + "no good,,\n,,\n")
    assert command("import", str(table)) == 1
    assert "line 4: `user_id` must be" in command.out
    assert "nothing was imported: 2 of 4 rows are wrong" in command.out
    assert command("import", str(tmp_path / "none.csv")) == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"user_id":"eve"}\n')))
    assert command("import", "-") == 0
    assert command("users", "show", "eve") == 0


async def test_all_of_it_beside_a_running_server(
    front: Front, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    assert (await front.chat(chat())).status == 200
    at = ("--url", front.url)

    assert await command.beside("usage", *at, "--by", "user") == 0
    head, alice, total = command.out.splitlines()
    assert head.split()[:2] == ["ORG", "ID"]
    assert "alice" in alice and "0.000015" in alice
    assert total.split()[0] == "all"
    assert await command.beside("usage", *at, "--json", "--month", "2020-01") == 0
    assert json.loads(command.out)["total"]["request_count"] == 0
    assert await command.beside("usage", *at, "--month", "2020-13") == 2
    assert "`month`" in command.err

    assert await command.beside("requests", *at, "--user", "alice", "--limit", "5") == 0
    assert "completed" in command.out
    assert await command.beside("requests", *at, "--user", "bob", "--json") == 0
    assert json.loads(command.out)["data"] == []

    assert await command.beside("audit", *at, "--noun", "user") == 0
    assert "bootstrap" in command.out and "alice" in command.out

    table = tmp_path / "people.csv"
    table.write_text(ROWS)
    assert await command.beside("import", str(table), *at) == 0, command.err
    assert await command.beside("export", "users", "--format", "csv", *at) == 0
    found = [row["user_id"] for row in csv.DictReader(io.StringIO(command.out))]
    assert found == ["alice", "ann", "bob"]

    folder = tmp_path / "bundle"
    assert await command.beside("export", "usage", "--output", str(folder), *at) == 0, command.err
    names = sorted(path.name for path in folder.iterdir())
    month = names[-1][-11:-4]
    assert names == [
        *("SHA256SUMS", f"adjustments-{month}.csv", f"totals-{month}.csv", f"usage-{month}.csv")
    ]
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    totals = [*csv.DictReader(io.StringIO((folder / f"totals-{month}.csv").read_text()))]
    assert {row["of"] for row in totals} == {"organization", "user", "provider", "model", "all"}
    assert {row["cost_usd"] for row in totals} == {"0.000015000"}
    assert totals[-1]["behind"] == "0" and int(totals[-1]["as_of_lsn"]) > 0
    key = front.key.encode()
    assert all(key not in path.read_bytes() for path in folder.iterdir())

    wrong = ("--url", "http://127.0.0.1:9")
    for argv in (("usage",), ("export", "users"), ("import", str(table))):
        assert await command.beside(*argv, *wrong) == 3, argv
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY[::-1])
    for argv in (("usage",), ("export", "users"), ("import", str(table))):
        assert await command.beside(*argv, *at) == 2, argv


async def test_accounts_that_lack_something_say_so_and_fail(
    front: Front, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    folder = tmp_path / "bundle"
    argv = ("export", "usage", "--output", str(folder), "--url", front.url)
    assert (await front.chat(chat())).status == 200
    assert await command.beside(*argv) == 0, command.err
    with closing(sqlite3.connect(front.gateway.database, isolation_level=None)) as busy:
        busy.execute("BEGIN IMMEDIATE")
        assert (await front.chat(chat())).status == 200
        assert await command.beside(*argv) == 1
        assert "not complete" in command.err and "not in the database yet" in command.err
        [path] = folder.glob("totals-*.csv")
        [*_, whole] = csv.DictReader(io.StringIO(path.read_text()))
        assert (whole["of"], whole["request_count"]) == ("all", "1")
        assert int(whole["behind"]) > 0
        busy.execute("ROLLBACK")
    assert await command.beside(*argv, "--json") == 0, command.err
    assert json.loads(command.out)["request_count"] == 2


async def test_a_correction_is_a_number_that_a_spreadsheet_can_add_up(
    front: Front, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    assert (await front.chat(chat())).status == 200
    reset = await front.client.post(
        "/admin/users/alice/reset-quota", json={"reason": "=1+1"}, headers=ADMIN
    )
    assert reset.status == 200
    folder = tmp_path / "bundle"
    assert await command.beside("export", "usage", "--output", str(folder), "--url", front.url) == 0
    [path] = folder.glob("adjustments-*.csv")
    [row] = csv.DictReader(io.StringIO(path.read_text()))
    assert (row["amount_usd"], row["reason"]) == ("-0.000015000", "'=1+1")


async def test_a_correction_names_its_request(
    front: Front, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    answer = await front.chat(chat())
    request_id = answer.headers["x-request-id"]
    receipt = await front.client.get(
        f"/v1/receipts/{request_id}", headers={"Authorization": f"Bearer {front.key}"}
    )
    one = {
        "request_id": request_id, "charged_usd": (await receipt.json())["cost_usd"],
        "cost_usd": "0.5", "reason": "the log has it",
    }  # fmt: skip
    done = await front.client.post("/admin/reconcile", json={"corrections": [one]}, headers=ADMIN)
    assert done.status == 200, await done.text()
    folder = tmp_path / "bundle"
    assert await command.beside("export", "usage", "--output", str(folder), "--url", front.url) == 0
    [path] = folder.glob("adjustments-*.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert {row["request_id"] for row in rows} == {request_id}
    assert await command.beside("usage", "--url", front.url) == 0
    assert "corrections and resets are not in it" in command.err


def test_a_table_of_the_other_kind_is_known_by_its_columns(
    command: Command, tmp_path: Path
) -> None:
    table = tmp_path / "orgs.csv"
    table.write_text("org_id,name\nacme,Acme\n")
    assert command("import", str(table)) == 2
    assert "gwproxy import --kind orgs" in command.err
    assert command("import", str(table), "--kind", "orgs") == 0
    table.write_text("org_id,status\nacme,active\n")
    assert command("import", str(table)) == 2
    assert "gwproxy import --kind orgs" in command.err
    table.write_text(ROWS)
    assert command("import", str(table), "--kind", "orgs") == 2
    assert "gwproxy import --kind users" in command.err
    table.write_text("what,ever\n1,2\n")
    assert command("import", str(table)) == 2
    assert "--kind" not in command.err


def test_a_table_that_is_not_called_one_is_told_how_it_is_read(
    command: Command, tmp_path: Path
) -> None:
    table = tmp_path / "users.txt"
    table.write_text(ROWS)
    assert command("import", str(table)) == 1
    assert "--format csv" in command.err
    assert command("import", str(table), "--format", "csv") == 0
    assert "--format" not in command.err


def test_an_id_that_begins_with_a_dash_is_told_its_place(command: Command) -> None:
    assert command("users", "create", "--id=-u7") == 0
    assert command("users", "show", "-u7") == 2
    assert "gwproxy users show -- -ID" in command.err
    assert command("users", "show", "--", "-u7") == 0
    assert "-u7" in command.out


async def test_an_import_whose_answer_is_lost_says_that_it_may_be_sent_again(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    table = tmp_path / "people.csv"
    table.write_text(ROWS)

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(die, "127.0.0.1") as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await command.beside("import", str(table), "--url", url) == 3
    assert "safe to send it again" in command.err
    assert await command.beside("import", str(table), "--url", url) == 3
    assert "No server answers" in command.err and "again" not in command.err
