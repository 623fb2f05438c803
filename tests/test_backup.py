"""Backups: made while the ledger is written to, doubted until looked at, put in place."""

import asyncio
import os
import sqlite3
import stat
from functools import partial
from pathlib import Path

import pytest

from gwproxy.storage.backup import (
    KEPT_JOURNAL_BYTES,
    BackupRefused,
    Backups,
    backup_to,
    checked,
    restore,
    set_aside,
)
from gwproxy.storage.database import Database
from gwproxy.storage.ledger import REBUILD_EVERY_S, read_mark
from gwproxy.storage.verify import verify
from tests.ledgers import MOVES, Place, catch_up, play, settled, tables, truth

DAY_S = 86_400


@pytest.fixture
async def place(tmp_path):
    async with await Place(tmp_path).open(segment_bytes=32768) as place:
        yield place


@pytest.fixture
def backups(place):
    return Backups(place.folder, every_s=DAY_S, keep=3)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if "backup" in file.name)


def some(place: Place, turn: int = 0) -> None:
    play(place.live, [(move, a + turn, 5 * a) for a, move in enumerate(MOVES * 2)])


# -- making one ----------------------------------------------------------------------------------


async def test_a_backup_is_the_database_as_of_one_moment(place, tmp_path):
    some(place)
    writer = place.writer()
    await catch_up(writer)
    before = await tables(place.database)
    file = tmp_path / "copy.db"
    mark = await backup_to(place.database, file)
    assert mark == await read_mark(place.database)
    assert mark.lsn == writer.applied > 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.glob("copy*")] == ["copy.db"]
    async with await Database.open(file) as copy:
        assert await tables(copy) == before


async def test_the_ledger_goes_on_being_written_while_a_backup_is_made(place, tmp_path):
    some(place)
    writer = place.writer(breathe=lambda: asyncio.sleep(0))
    await catch_up(writer)
    fill = "INSERT INTO filler SELECT randomblob(1000) FROM generate"
    many = (
        "WITH RECURSIVE generate (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM generate LIMIT 50000)"
    )
    await place.database.commit(lambda c: c.execute("CREATE TABLE filler (x)"))
    await place.database.commit(lambda c: c.execute(f"{many} {fill}"))
    making = asyncio.get_running_loop().create_task(backup_to(place.database, tmp_path / "b.db"))
    while not making.done():
        place.live.requests(2)
        assert await writer.step() == 4
    mark = await making
    assert mark.lsn <= writer.applied
    assert place.heard == []
    await asyncio.to_thread(checked, tmp_path / "b.db")


async def test_an_older_backup_of_that_name_stays_until_the_new_one_is_whole(place, tmp_path):
    file = tmp_path / "copy.db"
    file.write_bytes(b"old")
    some(place)
    await catch_up(place.writer())
    await place.database.commit(lambda c: c.execute("UPDATE balance SET spent = spent + 1"))
    with pytest.raises(BackupRefused, match="does not add up: spent and the sum of its lines"):
        await backup_to(place.database, file)
    assert file.read_bytes() == b"old"
    await place.database.commit(lambda c: c.execute("UPDATE balance SET spent = spent - 1"))
    await backup_to(place.database, file)
    checked(file)
    assert [each.name for each in tmp_path.glob("copy*")] == ["copy.db"]


async def test_a_file_that_is_not_ours_is_not_backed_up(place, tmp_path):
    other = tmp_path / "other.db"
    some(place)
    await catch_up(place.writer())
    await backup_to(place.database, other)
    place.path.rename(tmp_path / "away")
    with pytest.raises(BackupRefused, match="unable to open"):
        await backup_to(place.database, tmp_path / "copy.db")
    other.rename(place.path)
    with pytest.raises(BackupRefused, match="another file stands in its place"):
        await backup_to(place.database, tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy*"))


async def test_a_backup_that_is_called_off_leaves_nothing(place, tmp_path):
    many = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000)"
    await place.database.commit(
        lambda c: c.execute(f"CREATE TABLE filler AS {many} SELECT i, randomblob(300) FROM n")
    )
    file = tmp_path / "copy.db"
    task = asyncio.get_running_loop().create_task(backup_to(place.database, file))
    unfinished = tmp_path / "copy.db.unfinished"
    async with asyncio.timeout(20):
        while not unfinished.exists():  # noqa: ASYNC110 - a thread makes it
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        while unfinished.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert task.cancelled()
    assert not file.exists()


async def test_where_nothing_can_be_written_there_is_no_backup(place, tmp_path):
    some(place)
    await catch_up(place.writer())
    with pytest.raises(BackupRefused, match=r"no backup was made.*No such file or directory"):
        await backup_to(place.database, tmp_path / "missing" / "copy.db")
    assert not (tmp_path / "missing").exists()


async def test_what_is_no_file_is_not_replaced_by_one(place, tmp_path):
    some(place)
    await catch_up(place.writer())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(BackupRefused, match="is there already, and is not a file"):
            await backup_to(place.database, tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# -- keeping some --------------------------------------------------------------------------------


async def test_the_newest_are_kept_and_named_by_their_last_record(place, backups):
    assert backups.newest() is None
    writer = place.writer()
    marks = []
    for turn in range(5):
        some(place, turn)
        await catch_up(writer)
        marks.append((await backups.make(place.database))[1])
    assert names(place.folder) == [f"backup-{mark.lsn:020}.db" for mark in marks[-3:]]
    assert backups.newest() == (place.folder / f"backup-{marks[-1].lsn:020}.db", marks[-1])
    await backups.make(place.database)  # nothing new in it: it takes the place of the last
    assert len(names(place.folder)) == 3


async def test_the_newest_that_can_be_read_counts(place, backups):
    writer = place.writer()
    for turn in range(3):
        some(place, turn)
        await catch_up(writer)
        await backups.make(place.database)
    files = [place.folder / name for name in names(place.folder)]
    files[2].write_bytes(b"nothing of the kind")
    newest = backups.newest()
    assert newest is not None
    assert newest[0] == files[1]


@pytest.mark.parametrize(
    ("age_s", "journal_bytes", "every_s", "due"),
    [
        (10, 0, DAY_S, False),
        (DAY_S - 1, 0, DAY_S, False),
        (DAY_S, 0, DAY_S, True),
        (10 * DAY_S, 0, 0, False),
        (-10, 0, DAY_S, True),
        (61, KEPT_JOURNAL_BYTES, DAY_S, True),
        (61, KEPT_JOURNAL_BYTES, 0, True),
        (59, KEPT_JOURNAL_BYTES, DAY_S, False),
    ],
)
async def test_when_one_is_due(place, age_s, journal_bytes, every_s, due):
    backups = Backups(place.folder, every_s=every_s, keep=3)
    assert backups.due(1e9, 0), "there is none"
    await backups.make(place.database)
    [name] = names(place.folder)
    os.utime(place.folder / name, (1e9, 1e9))
    assert backups.due(1e9 + age_s, journal_bytes) is due


async def test_the_journal_is_kept_as_far_as_either_copy_needs_it(place, backups):
    assert backups.covered(100) == 0
    some(place)
    writer = place.writer()
    await catch_up(writer)
    _, mark = await backups.make(place.database)
    assert backups.covered(mark.lsn + 5) == mark.lsn
    assert backups.covered(mark.lsn - 5) == mark.lsn - 5


# -- putting one in place ------------------------------------------------------------------------


async def test_what_was_there_is_set_aside_with_its_log_and_never_deleted(place, tmp_path):
    some(place)
    await catch_up(place.writer())
    backup = tmp_path / "backup.db"
    mark = await backup_to(place.database, backup)
    some(place, 1)
    await catch_up(place.writer())
    late = await tables(place.database)
    folder = tmp_path / "again"
    folder.mkdir()
    path = folder / "gwproxy.db"
    for name in ("gwproxy.db", "gwproxy.db-wal"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    assert restore(backup, path) == mark
    assert sorted(file.name for file in folder.iterdir()) == [
        "gwproxy.db",
        "gwproxy.db.aside-1",
        "gwproxy.db.aside-1-wal",
    ]
    assert path.read_bytes() == backup.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with await Database.open(folder / "gwproxy.db.aside-1") as aside:
        assert await tables(aside) == late
    restore(backup, path)
    assert (folder / "gwproxy.db.aside-2").read_bytes() == backup.read_bytes()
    path.unlink()
    restore(backup, path)
    assert not (folder / "gwproxy.db.aside-3").exists()


def test_a_number_that_any_of_its_files_has_is_not_used_again(tmp_path):
    path = tmp_path / "gwproxy.db"
    (tmp_path / "gwproxy.db.aside-1-shm").touch()
    path.write_text("x")
    set_aside(path)
    assert (tmp_path / "gwproxy.db.aside-2").read_text() == "x"


@pytest.mark.parametrize("harm", ["cut", "flipped", "not one", "of nobody", "unbalanced"])
async def test_a_backup_that_is_not_good_changes_nothing(place, tmp_path, harm):
    place.live.requests(1000)
    await catch_up(place.writer())
    backup = tmp_path / "backup.db"
    await backup_to(place.database, backup)
    data = backup.read_bytes()
    match harm:
        case "cut":
            backup.write_bytes(data[: len(data) // 2])
        case "flipped":
            middle = len(data) // 2 // 4096 * 4096
            backup.write_bytes(data[:middle] + b"\xa5" * 4096 + data[middle + 4096 :])
        case "not one":
            backup.write_bytes(b"PK\x03\x04" * 1000)
        case "of nobody":
            with sqlite3.connect(backup) as connection:
                connection.execute("UPDATE meta SET ledger_id = NULL")
            connection.close()
        case "unbalanced":
            with sqlite3.connect(backup) as connection:
                connection.execute("UPDATE balance SET spent = 0 WHERE account = 'org:acme'")
            connection.close()
    path = tmp_path / "again.db"
    path.write_bytes(b"what was there")
    with pytest.raises(BackupRefused, match=str(backup)):
        restore(backup, path)
    assert path.read_bytes() == b"what was there"
    assert [file.name for file in tmp_path.glob("again*")] == ["again.db"]


async def test_a_folder_that_is_not_there_gets_no_database(place, tmp_path):
    """As where the disk is not mounted."""
    backup = tmp_path / "backup.db"
    await backup_to(place.database, backup)
    with pytest.raises(BackupRefused, match="could not be put there"):
        restore(backup, tmp_path / "missing" / "gwproxy.db")
    assert not (tmp_path / "missing").exists()


# -- a lost database, while running --------------------------------------------------------------


def drop(place: Place, lsn: int) -> None:
    ticket = place.journal.begin_drop(lsn)
    assert ticket is not None
    ticket.run()
    place.journal.end_drop(ticket, None)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xa5" * 8192)


def replace_with_older(path: Path) -> None:
    """By a copy, as `cp` would: the same file, with an older content of another length."""
    path.write_bytes(path.with_name("older.db").read_bytes())


def swap_with_older(path: Path) -> None:
    path.with_name("older.db").rename(path)


LOSSES = {
    "deleted": Path.unlink,
    "overwritten": overwrite,
    "copied over": replace_with_older,
    "swapped": swap_with_older,
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_lost_database_is_rebuilt_exactly_while_running(
    place, backups, tmp_path, tmp_path_factory, loss
):
    """From the newest backup and the journal behind it, of which the older part is gone."""
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    await backup_to(place.database, tmp_path / "older.db")
    for turn in range(1, 8):
        some(place, turn)
    await catch_up(writer)
    exact = await truth(place, tmp_path_factory.mktemp("truth"))
    await backups.make(place.database)
    drop(place, backups.covered(writer.applied))
    place.live.requests(30)
    await catch_up(writer)
    lost = place.path.read_bytes()

    LOSSES[loss](place.path)
    harmed = place.path.read_bytes() if place.path.exists() else None
    place.live.requests(30)
    writer.tick()
    assert place.heard[0][0] == "lost"
    async with asyncio.timeout(20):
        while len(place.heard) < 2:
            await writer.step()
            place.now += 1
    assert place.heard[1] == ("ok", "")
    assert writer.applied == place.live.state.lsn
    assert await verify(place.database) == []
    found = settled(await tables(place.database))
    for name in ("entry", "audit", "request"):
        assert set(exact[name]) <= set(found[name])
    assert found["meta"][0][2] == place.live.state.lsn
    asides = sorted(file.name for file in tmp_path.glob("gwproxy.db.aside*"))
    if harmed is None:
        assert "gwproxy.db.aside-1" not in asides
    else:
        assert (tmp_path / "gwproxy.db.aside-1").read_bytes() == harmed
        assert lost != harmed
    assert "gwproxy.db.aside-1-wal" in asides
    place.live.requests(10)
    await catch_up(writer)
    assert place.heard[2:] == []


def spoil(path: Path, first_page: int) -> None:
    """As a disk does it: nobody has written, and the time of the last change is what it was."""
    stamp = os.stat(path)
    with path.open("r+b") as file:
        file.seek(first_page * 4096)
        file.write(b"\xa5" * (stamp.st_size - first_page * 4096))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


async def test_damage_that_was_met_once_is_not_forgotten_by_opening_anew(place):
    """It lies where the writer has nothing to do, and so it could go on for years."""
    writer = place.writer()
    await catch_up(writer)
    await place.database.commit(
        lambda c: c.execute("CREATE TABLE filler AS SELECT zeroblob(1 << 20) AS x")
    )
    await place.database.reopen()  # all is in the file
    spoil(place.path, place.path.stat().st_size // 4096 - 100)
    assert place.database.fault() is None
    commit = place.database.commit

    async def met(work):
        await place.database.read("SELECT hex(x) FROM filler")
        return await commit(work)

    place.database.commit = met
    place.live.requests(10)
    assert await writer.step() == 0
    assert place.heard == [("lost", "database disk image is malformed")]
    place.database.commit = commit
    for _ in range(3):
        assert await writer.step() == 0
    assert len(place.heard) == 1


async def test_a_damaged_database_is_rebuilt_too(place, backups):
    place.live.requests(3000)
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    await catch_up(writer)
    await backups.make(place.database)
    await place.database.reopen()
    spoil(place.path, 60)
    await place.database.reopen()
    place.live.requests(10)
    for _ in range(6):
        await writer.step()
        place.now += 1
    assert [state for state, _ in place.heard] == ["lost", "ok"]
    assert await verify(place.database) == []
    assert writer.applied == place.live.state.lsn


async def test_a_rebuilding_that_does_not_last_is_not_tried_over_and_over(place, backups, tmp_path):
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    await backups.make(place.database)
    for _ in range(3):
        overwrite(place.path)
        for _ in range(6):
            await writer.step()
            writer.tick()
            place.now += 1
    assert [state for state, _ in place.heard] == ["lost", "ok", "lost"]
    assert len(list(tmp_path.glob("gwproxy.db.aside-*-wal"))) == 1
    place.now += REBUILD_EVERY_S
    for _ in range(3):
        await writer.step()
    assert [state for state, _ in place.heard] == ["lost", "ok", "lost", "ok"]
    assert len(list(tmp_path.glob("gwproxy.db.aside-*-wal"))) == 2


async def lose_and_wait(place: Place, writer) -> None:
    heard = len(place.heard)
    async with asyncio.timeout(20):
        while len(place.heard) < heard + 2:
            writer.tick()
            await writer.step()
            place.now += 1
    assert [state for state, _ in place.heard[heard:]] == ["lost", "ok"]
    assert writer.applied == place.live.state.lsn


async def test_a_file_that_is_gone_again_is_rebuilt_again(place, backups, tmp_path):
    """Nothing is set aside for it, and so nothing is to be waited for."""
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    await backups.make(place.database)
    for _ in range(3):
        place.path.unlink()
        began = place.now
        await lose_and_wait(place, writer)
        assert place.now - began < 30
    assert not [file for file in tmp_path.glob("*.aside-?") if file.is_file()]
    assert await verify(place.database) == []


async def test_a_good_file_that_is_put_back_within_the_hour_is_taken(place, backups, tmp_path):
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    await backups.make(place.database)
    overwrite(place.path)
    await lose_and_wait(place, writer)
    good = tmp_path / "good.db"
    await backup_to(place.database, good)
    some(place, 1)
    await catch_up(writer)

    bad = tmp_path / "bad.db"
    bad.write_bytes(b"\xa5" * 8192)
    bad.rename(place.path)
    for _ in range(60):
        writer.tick()
        await writer.step()
        place.now += 1
    assert place.heard[-1][0] == "lost"
    assert place.path.read_bytes() == b"\xa5" * 8192, "another that is no good waits"

    good.rename(place.path)
    for _ in range(15):
        await writer.step()
        place.now += 1
    assert place.heard[-1][0] == "ok"
    assert writer.applied == place.live.state.lsn
    assert await verify(place.database) == []


async def test_a_damaged_backup_is_passed_over_for_the_one_before(place, backups):
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    for turn in range(2):
        some(place, turn)
        await catch_up(writer)
        await backups.make(place.database)
    overwrite(place.folder / names(place.folder)[-1])
    place.path.unlink()
    async with asyncio.timeout(20):
        while len(place.heard) < 2:
            writer.tick()
            await writer.step()
            place.now += 1
    assert [state for state, _ in place.heard] == ["lost", "ok"]
    assert writer.applied == place.live.state.lsn
    assert await verify(place.database) == []


async def test_without_a_backup_that_the_journal_can_follow_nothing_is_touched(
    place, backups, tmp_path
):
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    await backups.make(place.database)
    for turn in range(1, 8):
        some(place, turn)
    await catch_up(writer)
    place.live.sync()
    drop(place, writer.applied)
    overwrite(place.path)
    harmed = place.path.read_bytes()
    for _ in range(8):
        await writer.step()
        writer.tick()
        place.now += 1
    assert [state for state, _ in place.heard] == ["lost"]
    assert place.path.read_bytes() == harmed
    assert not list(tmp_path.glob("*aside*"))
    assert not list(tmp_path.glob("*unfinished*"))


async def test_the_journal_alone_is_enough_where_it_goes_back_to_the_beginning(place, backups):
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    exact = settled(await tables(place.database))
    place.path.unlink()
    async with asyncio.timeout(20):
        while len(place.heard) < 2:
            writer.tick()
            await writer.step()
            place.now += 1
    assert [state for state, _ in place.heard] == ["lost", "ok"]
    found = settled(await tables(place.database))
    assert {name: found[name] for name in exact if name != "meta"} == {
        name: exact[name] for name in exact if name != "meta"
    }
    assert await verify(place.database) == []


async def test_a_file_that_is_put_back_soon_is_taken_as_it_is(place, backups, tmp_path):
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    place.path.rename(tmp_path / "elsewhere")
    for _ in range(3):
        writer.tick()
        await writer.step()
        place.now += 0.9
    (tmp_path / "elsewhere").rename(place.path)
    for _ in range(2):
        await writer.step()
    assert [state for state, _ in place.heard] == ["lost", "ok"]
    assert not list(tmp_path.glob("gwproxy.db.aside*"))


async def test_damage_outlasts_a_rebuilding_that_is_not_possible(place, backups):
    """The file is not taken for good because there is nothing better."""
    writer = place.writer(rebuild=partial(backups.rebuild, place.database, place.journal.ledger_id))
    some(place)
    await catch_up(writer)
    place.live.requests(3000)
    await catch_up(writer)
    place.live.sync()
    drop(place, writer.applied)
    await place.database.commit(
        lambda c: c.execute("CREATE TABLE filler AS SELECT zeroblob(1 << 20) AS x")
    )
    await place.database.reopen()  # all is in the file
    spoil(place.path, place.path.stat().st_size // 4096 - 100)
    commit = place.database.commit

    async def met(work):
        await place.database.read("SELECT hex(x) FROM filler")
        return await commit(work)

    place.database.commit = met
    place.live.requests(10)
    assert await writer.step() == 0
    place.database.commit = commit
    for _ in range(8):
        place.now += 1
        await writer.step()
    assert [state for state, _ in place.heard] == ["lost"]
