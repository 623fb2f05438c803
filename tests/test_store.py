"""The store: what is kept is opened in order, or refused with the cure."""

import io
import random
from pathlib import Path

import pytest

from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from gwproxy.storage.database import DatabaseRefused
from gwproxy.storage.segments import JournalRefused
from tests.office import Disk


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


async def test_a_database_that_is_gone_is_no_fresh_start(tmp_path: Path) -> None:
    await live(tmp_path, "ann")
    move(tmp_path, "gwproxy.db*")
    with pytest.raises(DatabaseRefused):
        await live(tmp_path)
    assert not (tmp_path / "gwproxy.db").exists()


async def test_a_journal_that_is_gone_is_done_without_only_when_told_to(tmp_path: Path) -> None:
    await live(tmp_path, "ann")
    move(tmp_path, "journal")
    with pytest.raises(JournalRefused, match="accept-loss"):
        await live(tmp_path)
    assert await live(tmp_path, "ben", accept_loss=True) == {"ann", "ben"}
    assert await live(tmp_path) == {"ann", "ben"}


async def test_a_journal_of_another_ledger_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        await live(tmp_path / name, name)
    (tmp_path / "one" / "journal").rename(tmp_path / "aside")
    (tmp_path / "other" / "journal").rename(tmp_path / "one" / "journal")
    with pytest.raises(JournalRefused, match="belong"):
        await live(tmp_path / "one")
