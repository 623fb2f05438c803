"""The store: what is kept is opened in order, or refused with the cure."""

import io
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from gwproxy.storage.database import BackupRefused, DatabaseRefused
from gwproxy.storage.ledger import Mark
from gwproxy.storage.segments import Gap, JournalRefused
from gwproxy.storage.verify import findings
from tests.office import Disk
from tests.scene import until


def at(folder: Path) -> Kept:
    return Kept(folder / "gwproxy.db", folder / "journal", segment_bytes=1 << 20)


def move(folder: Path, pattern: str) -> None:
    """As if the disk with these files were not mounted."""
    for file in list(folder.glob(pattern)):
        file.rename(folder / f"elsewhere-{file.name}")


async def live(folder: Path, *user_ids: str, accept_loss: bool = False) -> set[str]:
    """One life in which these users are made: all that are known at its end."""
    async with opened(
        at(folder),
        Log(io.StringIO(), "error"),
        below=random.Random(1).randrange,
        files=Disk(),
        accept_loss=accept_loss,
    ) as store:
        for user_id in user_ids:
            await store.directory.create_user(user_id=user_id)
        return {user.user_id for user in store.keyring.users_after("")}


async def test_what_was_recorded_is_there_in_the_next_life(tmp_path: Path) -> None:
    assert await live(tmp_path, "ann") == {"ann"}
    assert await live(tmp_path, "ben") == {"ann", "ben"}


LOSSES: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: move(path.parent, f"{path.name}*"),
    "empty": lambda path: path.write_bytes(b"") and None,
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(50_000)) and None,
    "damaged": lambda path: damage(path),
}


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 8192)


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_database_that_is_lost_is_made_again_from_the_journal(
    tmp_path: Path, loss: str
) -> None:
    await live(tmp_path, "ann", "ben")
    path = tmp_path / "gwproxy.db"
    LOSSES[loss](path)
    harmed = path.read_bytes() if path.exists() else b""
    assert await live(tmp_path, "cid") == {"ann", "ben", "cid"}
    assert await live(tmp_path) == {"ann", "ben", "cid"}
    if harmed:
        assert (tmp_path / "gwproxy.db.aside-1").read_bytes() == harmed  # never deleted
    with closing(sqlite3.connect(path)) as connection:
        assert [*findings(connection)] == []


async def back_up(folder: Path) -> None:
    """A backup, and the journal cut to what is behind it."""
    async with opened(at(folder), Log(io.StringIO(), "error"), files=Disk()) as store:
        await store.back_up()
        assert store.journal.trail().segments[0].first_lsn > 1


async def test_it_is_made_again_from_the_newest_backup(tmp_path: Path) -> None:
    await live(tmp_path, "ann")
    await live(tmp_path, "ben")
    await back_up(tmp_path)
    older = (tmp_path / "gwproxy.db").read_bytes()
    await live(tmp_path, "cid")
    move(tmp_path, "gwproxy.db*")
    assert await live(tmp_path) == {"ann", "ben", "cid"}
    # An older copy of it is brought up to now; one that is too old for that is no better than none.
    (tmp_path / "gwproxy.db").write_bytes(older)
    assert await live(tmp_path) == {"ann", "ben", "cid"}


async def test_a_copy_that_is_too_old_for_the_journal_makes_way_for_a_backup(
    tmp_path: Path,
) -> None:
    await live(tmp_path, "ann")
    older = (tmp_path / "gwproxy.db").read_bytes()
    await live(tmp_path, "ben")
    await back_up(tmp_path)
    (tmp_path / "gwproxy.db").write_bytes(older)
    assert await live(tmp_path) == {"ann", "ben"}
    assert (tmp_path / "gwproxy.db.aside-1").exists()


async def test_without_backup_and_beginning_a_database_that_is_gone_is_refused(
    tmp_path: Path,
) -> None:
    await live(tmp_path, "ann")
    await back_up(tmp_path)
    move(tmp_path, "gwproxy.db*")
    move(tmp_path / "journal", "backup-*")
    with pytest.raises(
        DatabaseRefused, match=r"could not be rebuilt: .*there is no backup.*has no 1\."
    ):
        await live(tmp_path)
    assert not (tmp_path / "gwproxy.db").exists()


async def test_where_a_good_database_cannot_be_placed_the_start_is_refused(tmp_path: Path) -> None:
    await live(tmp_path, "ann")
    move(tmp_path, "gwproxy.db*")
    (tmp_path / "gwproxy.db.unfinished").mkdir()
    with pytest.raises(DatabaseRefused, match=r"rebuilt: .*gwproxy\.db: it could not be put there"):
        await live(tmp_path)
    (tmp_path / "gwproxy.db.unfinished").rmdir()
    assert await live(tmp_path) == {"ann"}


async def test_why_a_lost_database_stays_lost_is_logged_once_and_told_with_the_cure(
    tmp_path: Path,
) -> None:
    lines = io.StringIO()
    log = Log(lines, "error")
    log.start()
    async with opened(at(tmp_path), log, below=random.Random(1).randrange, files=Disk()) as store:

        async def can_follow(mark: Mark) -> None:
            raise Gap("it does not go back so far")

        store.outage.begin("the file is damaged", 0.0, 0)
        for set_aside in (False, False, True, True):
            with pytest.raises(BackupRefused):
                await store._rebuild(can_follow, set_aside)
            words = store.condition(draining=False, closed=False).database or ""
            cure = "restart, or put a good file" if not set_aside else "does not go back so far"
            assert cure in words
            assert words.startswith("the file is damaged")
        store.outage.end(1.0, 0)
        assert store.condition(draining=False, closed=False).database is None
    log.stop()
    assert lines.getvalue().count("database not rebuilt") == 2


async def test_with_a_backup_and_nothing_else_nobody_begins_anew(tmp_path: Path) -> None:
    await live(tmp_path, "ann")
    await back_up(tmp_path)
    move(tmp_path, "gwproxy.db*")
    move(tmp_path / "journal", "*.journal")
    with pytest.raises(DatabaseRefused, match="is missing too"):
        await live(tmp_path)
    assert not (tmp_path / "gwproxy.db").exists()


async def test_a_journal_that_is_gone_is_done_without_only_when_told_to(tmp_path: Path) -> None:
    await live(tmp_path, "ann")
    move(tmp_path, "journal")
    with pytest.raises(JournalRefused, match="accept-loss"):
        await live(tmp_path)
    assert await live(tmp_path, "ben", accept_loss=True) == {"ann", "ben"}
    assert await live(tmp_path) == {"ann", "ben"}


async def test_where_neither_backup_nor_beginning_is_left_a_backup_is_made_at_once(
    tmp_path: Path,
) -> None:
    await live(tmp_path, "ann")
    await back_up(tmp_path)
    move(tmp_path / "journal", "backup-*")
    async with opened(at(tmp_path), Log(io.StringIO(), "error"), files=Disk()):
        await until(lambda: any((tmp_path / "journal").glob("backup-*.db")), 10)
    move(tmp_path, "gwproxy.db*")
    assert await live(tmp_path) == {"ann"}


async def test_a_journal_of_another_ledger_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        await live(tmp_path / name, name)
    (tmp_path / "one" / "journal").rename(tmp_path / "aside")
    (tmp_path / "other" / "journal").rename(tmp_path / "one" / "journal")
    with pytest.raises(JournalRefused, match="belong"):
        await live(tmp_path / "one")
