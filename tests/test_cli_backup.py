"""`gwproxy backup`, `restore` and `reload`, as a person types them."""

import asyncio
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gwproxy.cli import main
from gwproxy.storage.backup import checked
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN, chat
from tests.scene import until


@pytest.fixture
async def stopped(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a gateway that has served, was backed up, has served again, and has ended."""
    front = await start_gateway()
    at_home(front, monkeypatch)
    folder = front.gateway.database.parent
    for _ in range(3):
        assert (await front.chat(chat())).status == 200
    await caught_up(front)
    assert await typed("backup", str(folder / "copy.db")) == 0
    for _ in range(2):
        assert (await front.chat(chat())).status == 200
    await front.gateway.close()
    return folder


def at_home(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GWPROXY_CONFIG", str(front.gateway.database.parent / "config.toml"))
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("UPSTREAM_TOKEN", UPSTREAM_TOKEN)


def set_listen(config: Path, address: str) -> None:
    config.write_text(re.sub(r'listen = "[^"]*"', f'listen = "{address}"', config.read_text()))


def segment_in(folder: Path) -> Path:
    return next(folder.glob("*/*.journal"))


async def caught_up(front: Front) -> None:
    assert front.gateway.app is not None
    store = front.gateway.app._store
    await until(lambda: store.writer.applied == store.ledger.state.lsn, 10)


async def typed(*words: str) -> int:
    """In a thread: a command has a loop of its own."""
    return await asyncio.to_thread(main, words)


def spent(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        found: int = connection.execute(
            "SELECT spent FROM balance WHERE account = 'user:alice'"
        ).fetchone()[0]
        return found


async def test_a_backup_while_it_runs_is_whole_and_private(
    front: Front,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_home(front, monkeypatch)
    assert (await front.chat(chat())).status == 200
    await caught_up(front)
    file = tmp_path / "copy.db"
    assert await typed("backup", str(file), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert checked(file).lsn == told["as_of_lsn"] > 0
    assert file.stat().st_mode & 0o077 == 0
    assert await typed("restore", str(file)) == 1
    assert "in use by another process" in capsys.readouterr().err


async def test_no_backup_takes_the_place_of_what_it_is_made_of(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = stopped / "gwproxy.db"
    segment = segment_in(stopped)
    journal = segment.parent
    (stopped / "by-link.db").symlink_to(database)
    (stopped / "by-hard-link.db").hardlink_to(database)
    (stopped / "by-folder").symlink_to(journal)
    (stopped / "by-segment").hardlink_to(segment)
    (stopped / "dangling").symlink_to(stopped / "gwproxy.db-wal")
    (stopped / "other.db.unfinished").hardlink_to(database)
    before = {each: each.read_bytes() for each in (database, segment)}
    names = ["gwproxy.db", "gwproxy.db-wal", "gwproxy.db-shm", "gwproxy.db.lock", "by-link.db"]
    names += ["by-hard-link.db", "by-folder/new.db", "by-segment", "dangling", "other.db"]
    names += [f"{journal.name}/new.db", f"{journal.name}/{segment.name}"]
    for name in names:
        capsys.readouterr()
        assert await typed("backup", str(stopped / name)) == 1, name
        assert "belongs to the ledger itself" in capsys.readouterr().err, name
        assert all(each.read_bytes() == content for each, content in before.items()), name
    assert (stopped / "other.db.unfinished").exists()
    assert not (journal / "new.db").exists()


async def test_a_database_that_cannot_be_opened_is_named_and_not_the_copy(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "gwproxy.db").rename(stopped / "away")
    capsys.readouterr()
    assert await typed("backup", str(stopped / "new.db")) == 1
    told = capsys.readouterr().err
    assert f"{stopped / 'gwproxy.db'}: no backup was made: unable to open" in told
    assert "new.db" not in told


async def test_what_is_restored_comes_to_the_same_balances(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    before = spent(stopped / "gwproxy.db")
    assert await typed("restore", str(stopped / "copy.db"), "--verify") == 0
    text = capsys.readouterr().out
    assert "each what it was before" in text
    assert "verify     ok" in text
    assert (stopped / "gwproxy.db.aside-1").exists()
    assert spent(stopped / "gwproxy.db") < before
    assert await typed("ledger", "verify") == 0  # the journal has the rest


async def test_a_backup_that_would_change_a_balance_is_not_put_in_place(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for segment in (stopped / "journal").glob("*.journal"):
        segment.unlink()
    before = (stopped / "gwproxy.db").read_bytes()
    assert await typed("restore", str(stopped / "copy.db"), "--verify") == 1
    words = capsys.readouterr().err
    assert "user:alice" in words and "Nothing was changed" in words
    assert (stopped / "gwproxy.db").read_bytes() == before


async def test_where_the_database_is_lost_there_is_nothing_to_compare_with(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    (stopped / "gwproxy.db").write_bytes(b"noise" * 5000)
    assert await typed("restore", str(stopped / "copy.db"), "--verify", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["balances_compared"] is None
    assert told["replayed_by_the_next_start"] > 0
    assert told["faults"] == []


@pytest.mark.parametrize("harm", ["noise", "newer", "missing"])
async def test_what_is_no_good_backup_is_refused(
    stopped: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped / "copy.db"
    before = (stopped / "gwproxy.db").read_bytes()
    if harm == "noise":
        file.write_bytes(b"noise" * 5000)
    elif harm == "missing":
        file.unlink()
    else:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA user_version = 99")
    assert await typed("restore", str(file)) == 1
    assert str(file) in capsys.readouterr().err
    assert (stopped / "gwproxy.db").read_bytes() == before


async def test_reload_needs_a_server(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await typed("reload", "--url", "http://127.0.0.1:1") == 3
    told = capsys.readouterr().err
    assert "No server answers" in told
    assert "SIGHUP" not in told


async def test_reload_at_a_new_address_hints_at_the_old_one(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_listen(stopped / "config.toml", "127.0.0.1:1")
    assert await typed("reload") == 3
    told = capsys.readouterr().err
    assert "No server answers at 127.0.0.1:1" in told
    assert "name the old one by --url" in told and "SIGHUP" in told
