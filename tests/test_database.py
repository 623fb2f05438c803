"""The database file: its modes, its lock, its checks at opening, its transactions."""

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.identity import (
    ApiKey,
    FailureMode,
    OnClientGone,
    OnExhausted,
    Organization,
    Status,
    UnboundedPolicy,
    User,
)
from gwproxy.core.money import Nanos
from gwproxy.storage import directory, inspect
from gwproxy.storage.backup import checked
from gwproxy.storage.database import (
    SQLITE_VERSION,
    TRUNCATE_BYTES,
    BackupRefused,
    Database,
    DatabaseDamaged,
    DatabaseInUse,
    DatabaseRefused,
    FileChanged,
    Migration,
    RolledBack,
    packaged,
)
from gwproxy.storage.directory import Use

ORG = Organization(
    org_id="acme",
    name="Acme",
    status=Status.SUSPENDED,
    monthly_budget=Nanos(10**18),
    failure_mode=FailureMode.OPEN,
    fallback_daily_limit=Nanos(0),
    allowed_features=("web_search_options",),
    prices={"openai/gpt-4o": {"input": "2.50", "output": "10.00"}},
    unbounded_policy=UnboundedPolicy.STRICT,
    on_exhausted=OnExhausted.FINISH,
    on_client_gone=OnClientGone.DRAIN,
    cache=True,
    created_at=1,
)
ANN = User(
    user_id="ann",
    org_id="acme",
    email="ann@example.org",
    monthly_limit=Nanos(5),
    rpm=1,
    tpm=2,
    max_parallel=3,
    created_at=2,
)
KEY = ApiKey(
    key_id="key_1",
    user_id="ann",
    prefix="gw_live_abcdefgh",
    digest=b"d" * 32,
    name="laptop",
    allowed_models=("a/b", "c"),
    monthly_limit=Nanos(7),
    rpm=4,
    tpm=5,
    max_parallel=6,
    created_at=3,
    expires_at=4,
    revoked_at=5,
    last_used_at=6,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gwproxy.db"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name + "*"))


async def opened(path: Path, migrations: list[Migration] | None = None) -> None:
    """Open and close: a database that opens against all expectation is not left behind."""
    await (await Database.open(path, migrations)).close()


async def put(database: Database, row: directory.Row) -> directory.Row | None:
    return await database.commit(lambda connection: directory.put(connection, row))


async def tables(database: Database) -> set[str]:
    return {row[0] for row in await database.read("SELECT name FROM sqlite_schema")}


# -- opening -------------------------------------------------------------------------------------


async def test_a_new_database_has_the_newest_schema_and_the_default_organization(path):
    async with await Database.open(path) as database:
        assert database.schema_version == packaged()[-1].version
        assert {"organization", "user", "api_key"} <= await tables(database)
        [default] = await directory.load(database)
    assert isinstance(default, Organization)
    assert (default.org_id, default.status) == ("default", Status.ACTIVE)
    assert default.created_at > 1_700_000_000


async def test_opening_again_changes_nothing(path):
    async with await Database.open(path) as database:
        await put(database, ORG)
    async with await Database.open(path) as database:
        assert ORG in await directory.load(database)


@pytest.mark.parametrize("mask", [0o000, 0o022])
async def test_nobody_else_may_read_any_of_its_files(path, mask):
    before = os.umask(mask)
    try:
        async with await Database.open(path) as database:
            await put(database, ORG)
            names = [file.name for file in files(path)]
            assert names == [
                "gwproxy.db",
                "gwproxy.db-shm",
                "gwproxy.db-wal",
                "gwproxy.db.lock",
            ]
            assert [mode(file) for file in files(path)] == [0o600] * 4
    finally:
        os.umask(before)


async def test_a_file_that_others_could_read_is_closed_to_them(path):
    await opened(path)
    path.chmod(0o644)
    async with await Database.open(path) as database:
        await put(database, ORG)
        assert {mode(file) for file in files(path)} == {0o600}


async def test_the_connection_is_set_as_promised(path):
    async with await Database.open(path) as database:
        for name, value in [
            ("journal_mode", "wal"),
            ("synchronous", 2),
            ("wal_autocheckpoint", 0),
            ("journal_size_limit", 0),
            ("foreign_keys", 1),
            ("trusted_schema", 0),
            ("cell_size_check", 1),
        ]:
            assert (await database.read(f"PRAGMA {name}"))[0][0] == value
        assert 0 < (await database.read("PRAGMA busy_timeout"))[0][0] < 1000
    assert sqlite3.sqlite_version == SQLITE_VERSION


async def test_a_second_opening_is_refused_until_the_first_is_closed(path):
    async with await Database.open(path) as first:
        with pytest.raises(DatabaseInUse, match=f"in use by another process \\({os.getpid()}\\)"):
            await opened(path)
        await put(first, ORG)  # the refused one has not disturbed it
        await first.close()  # and a second closing, on leaving, does no harm
    async with await Database.open(path) as second:
        assert ORG in await directory.load(second)


OPEN_AND_SAY = """
import asyncio, sys
from pathlib import Path
from gwproxy.storage.database import Database, DatabaseInUse

async def main():
    try:
        async with await Database.open(Path(sys.argv[1])):
            print("opened", flush=True)
            sys.stdin.read()
    except DatabaseInUse as refused:
        print(f"refused: {refused}", flush=True)

asyncio.run(main())
"""


async def test_two_processes_never_share_a_database(path):
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_SAY, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        assert first.stdout.readline() == "opened\n"
        with start() as second:
            assert second.stdout.readline().startswith(f"refused: {path}: in use")
        with pytest.raises(DatabaseInUse, match=str(first.pid)):
            await opened(path)
        first.kill()
        first.wait()
    # The lock ends with its process, however that ended.
    await opened(path)


async def test_a_newer_schema_is_refused_and_left_alone(path):
    await opened(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseRefused, match=r"newer gwproxy .schema 99"):
        await opened(path)
    assert path.read_bytes() == before


async def test_the_database_of_another_program_is_refused(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cookies (x)")
    connection.close()
    with pytest.raises(DatabaseRefused, match="another program"):
        await opened(path)


async def test_a_file_that_is_no_database_is_refused_with_the_cure(path):
    path.write_bytes(b"these are not the pages you are looking for" * 100)
    with pytest.raises(DatabaseRefused, match=r"not a database.*Restore a backup"):
        await opened(path)
    assert path.read_bytes().startswith(b"these are not")


async def test_a_damaged_page_is_found_at_opening(path):
    async with await Database.open(path) as database:
        for number in range(400):
            await put(database, replace(ORG, org_id=f"org-{number}"))
    pages = path.read_bytes()
    assert len(pages) > 20 * 4096
    path.write_bytes(pages[: 15 * 4096] + b"\xa5" * 4096 + pages[16 * 4096 :])
    with pytest.raises(DatabaseRefused, match="Restore a backup"):
        await opened(path)


async def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DatabaseRefused, match="no such folder"):
        await opened(tmp_path / "missing" / "gwproxy.db")


async def test_a_folder_in_the_place_of_the_file_is_refused(path):
    path.mkdir()
    with pytest.raises(DatabaseRefused, match="directory"):
        await opened(path)


@pytest.mark.timeout(10)
async def test_a_fifo_in_the_place_of_the_file_is_refused_and_nobody_waits_for_it(path):
    os.mkfifo(path)
    with pytest.raises(DatabaseRefused, match=r"is not a regular file\. Move it away"):
        await opened(path)
    with pytest.raises(BackupRefused, match="not a regular file"):
        checked(path)
    with pytest.raises(DatabaseRefused, match="not a regular file"), inspect.tables(path):
        pass


async def test_a_refused_database_is_let_go(path):
    path.write_bytes(b"no" * 1000)
    with pytest.raises(DatabaseRefused):
        await opened(path)
    path.unlink()
    await opened(path)


# -- migrations ----------------------------------------------------------------------------------

ONE = Migration(1, "0001_one.sql", "CREATE TABLE one (x); INSERT INTO one VALUES ('kept');")
TWO = Migration(2, "0002_two.sql", "CREATE TABLE two (x); ALTER TABLE one ADD COLUMN y;")
BROKEN = Migration(2, "0002_two.sql", "CREATE TABLE two (x); CREATE TABLE one (x);")


async def test_migrations_run_in_order_and_only_once(path):
    async with await Database.open(path, [ONE]) as database:
        assert (database.schema_version, await tables(database)) == (1, {"one"})
    async with await Database.open(path, [ONE, TWO]) as database:
        assert (database.schema_version, await tables(database)) == (2, {"one", "two"})
        assert [tuple(row) for row in await database.read("SELECT * FROM one")] == [("kept", None)]


async def test_the_old_schema_is_kept_beside_before_a_migration(path):
    await opened(path, [ONE])
    await opened(path, [ONE, TWO])
    copy = path.with_name("gwproxy.db.schema-1")
    assert mode(copy) == 0o600
    async with await Database.open(copy, [ONE]) as database:
        assert await tables(database) == {"one"}


async def test_a_migration_that_fails_leaves_the_schema_as_it_was(path):
    await opened(path, [ONE])
    with pytest.raises(DatabaseRefused, match="already exists"):
        await opened(path, [ONE, BROKEN])
    async with await Database.open(path, [ONE]) as database:
        assert await tables(database) == {"one"}
    await opened(path, [ONE, TWO])


def test_the_packaged_migrations_are_numbered_without_a_gap():
    assert [migration.version for migration in packaged()] == list(range(1, len(packaged()) + 1))


# -- rows ----------------------------------------------------------------------------------------


async def test_rows_come_back_as_they_went_in(path):
    async with await Database.open(path) as database:
        for row in (ORG, ANN, KEY):
            await put(database, row)
        assert (await directory.load(database))[1:] == [ORG, ANN, KEY]


async def test_a_changed_row_takes_the_place_of_the_one_before_which_is_told(path):
    later = replace(ANN, status=Status.SUSPENDED, email=None, version=2)
    async with await Database.open(path) as database:
        assert [await put(database, row) for row in (ORG, ANN, KEY)] == [None, None, None]
        assert await put(database, later) == ANN
        assert await put(database, later) == later
        assert (await directory.load(database))[1:] == [ORG, later, KEY]


async def test_when_a_key_was_last_used_is_not_undone_by_a_change_of_it(path):
    async with await Database.open(path) as database:
        for row in (ORG, ANN, KEY):
            await put(database, row)
        await directory.update_uses(database, [Use("key_1", 77, "::1", 3)])
        await put(database, replace(KEY, name="desktop", version=2))
        assert (await directory.load(database))[-1] == replace(
            KEY, name="desktop", version=2, last_used_at=77, last_used_from="::1", use_count=3
        )


async def test_addresses_and_digests_are_unique_in_the_file_itself(path):
    bob = replace(ANN, user_id="bob", email="ANN@example.org")
    async with await Database.open(path) as database:
        for row in (ORG, ANN, KEY):
            await put(database, row)
        for duplicate in (bob, replace(KEY, key_id="key_2")):
            with pytest.raises(StorageUnavailable) as caught:
                await put(database, duplicate)
            assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)
        await put(database, replace(ANN, deleted_at=9, version=2))
        await put(database, bob)


def test_a_row_is_shown_without_the_digest_of_its_key():
    assert directory.named(KEY) == ("api_key", "key_1")
    assert json.loads(directory.shown(KEY)) == {
        "key_id": "key_1",
        "user_id": "ann",
        "prefix": "gw_live_abcdefgh",
        "name": "laptop",
        "allowed_models": ["a/b", "c"],
        "monthly_limit": 7,
        "rpm": 4,
        "tpm": 5,
        "max_parallel": 6,
        "created_at": 3,
        "expires_at": 4,
        "revoked_at": 5,
        "previous": [],
        "version": 1,
    }


async def test_a_row_whose_owner_is_missing_is_not_stored(path):
    async with await Database.open(path) as database:
        with pytest.raises(StorageUnavailable):
            await put(database, ANN)
        assert len(await directory.load(database)) == 1


async def test_the_last_use_of_keys_is_stored(path):
    async with await Database.open(path) as database:
        for row in (ORG, ANN, KEY):
            await put(database, row)
        assert await directory.update_uses(database, [Use("key_1", 77, None, 2)])
        assert (await directory.load(database))[-1] == replace(KEY, last_used_at=77, use_count=2)


async def test_a_last_use_that_cannot_be_stored_just_now_is_told_and_no_fault(path):
    async with await Database.open(path) as database:
        assert not await directory.update_uses(database, [Use("key_1", 77, None, 2)])
        path.rename(path.with_name("away"))
        assert not await directory.update_uses(database, [Use("key_1", 77, None, 2)])


# -- transactions --------------------------------------------------------------------------------


async def count(database: Database) -> int:
    return (await database.read("SELECT count(*) FROM organization"))[0][0]


def add(*names: str) -> Callable[[sqlite3.Connection], None]:
    def work(connection: sqlite3.Connection) -> None:
        for name in names:
            connection.execute(
                "INSERT INTO organization (org_id, created_at) VALUES (?, 1)", [name]
            )

    return work


async def test_a_transaction_that_fails_leaves_nothing(path):
    def fail(connection: sqlite3.Connection) -> None:
        add("a")(connection)
        raise RuntimeError

    async with await Database.open(path) as database:
        with pytest.raises(RuntimeError):
            await database.commit(fail)
        assert await count(database) == 1
        await database.commit(add("a"))
        assert await count(database) == 2


async def test_a_transaction_that_sqlite_rolled_back_is_not_taken_for_committed(path):
    def work(connection: sqlite3.Connection) -> None:
        add("a")(connection)
        connection.execute("ROLLBACK")  # as SQLite itself does on a full disk
        add("b")(connection)

    async with await Database.open(path) as database:
        with pytest.raises(StorageUnavailable) as caught:
            await database.commit(work)
        assert isinstance(caught.value.__cause__, RolledBack)
        # The second statement ran on its own: that is why the caller must hear of it.
        assert await count(database) == 2


async def test_transactions_take_turns(path):
    async with await Database.open(path) as database:
        await asyncio.gather(*(database.commit(add(name + "1", name + "2")) for name in "abcdefgh"))
        assert await count(database) == 17


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancelled_transaction_leaves_the_connection_usable(path, steps):
    async with await Database.open(path) as database:
        task = asyncio.get_running_loop().create_task(database.commit(add("a")))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await database.commit(add("b"))
        assert await count(database) in (2, 3)


async def test_a_full_disk_is_storage_unavailable_and_over_when_there_is_room(path):
    async with await Database.open(path) as database:
        pages = (await database.read("PRAGMA page_count"))[0][0]
        await database.read(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageUnavailable) as caught:
            for number in range(1000):
                await put(database, replace(ORG, org_id=f"org-{number}"))
        assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
        assert caught.value.retry_after_s
        assert isinstance(caught.value.__cause__, sqlite3.Error)
        await database.read("PRAGMA max_page_count = 1000000")
        await put(database, replace(ORG, org_id="later"))


async def test_a_lock_held_from_outside_is_told_in_less_than_a_second_or_so(path):
    async with await Database.open(path) as database:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable):
            await put(database, ORG)
        assert asyncio.get_running_loop().time() - started < 2
        other.close()
        await put(database, ORG)


async def test_a_closed_database_says_so(path):
    database = await Database.open(path)
    await database.close()
    with pytest.raises(StorageUnavailable):
        await database.read("SELECT 1")
    with pytest.raises(StorageUnavailable):
        await put(database, ORG)
    with pytest.raises(StorageUnavailable):
        async with database.reader():
            raise AssertionError("it reads what is closed")


# -- the file under the connection ---------------------------------------------------------------


async def test_a_deleted_or_replaced_file_takes_no_more_writes(path):
    async with await Database.open(path) as database:
        await put(database, ORG)
        aside = path.with_name("aside")
        path.rename(aside)
        assert database.fault() == "the file is gone"
        with pytest.raises(StorageUnavailable):
            await put(database, ANN)
        path.write_bytes(aside.read_bytes())
        assert database.fault() == "another file stands in its place"
        with pytest.raises(StorageUnavailable):
            await put(database, ANN)
        with pytest.raises(FileChanged):
            await database.reopen()
        aside.rename(path)
        await put(database, ANN)
        assert database.fault() is None


async def test_a_file_that_was_written_to_from_outside_takes_no_more_writes(path):
    async with await Database.open(path) as database:
        await put(database, ORG)
        os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))
        assert database.fault() == "somebody else has written to the file"
        with pytest.raises(StorageUnavailable):
            await put(database, ANN)
        before = path.read_bytes()
        with pytest.raises(FileChanged):
            await database.reopen()
        assert path.read_bytes() == before, "closing has brought the log into it"


async def test_a_database_that_was_there_is_never_made_anew(path):
    with pytest.raises(DatabaseRefused, match=r"missing or empty.*Restore a backup"):
        await Database.open(path, create=False)
    path.touch()
    with pytest.raises(DatabaseRefused, match="missing or empty"):
        await Database.open(path, create=False)
    async with await Database.open(path) as database:
        path.rename(path.with_name("away"))
        with pytest.raises(FileChanged):
            await database.reopen()
        assert not path.exists()


async def test_a_file_is_left_as_it_is_when_another_takes_its_place(path, tmp_path):
    async with await Database.open(tmp_path / "other.db") as other:
        await put(other, replace(ORG, org_id="other"))
    aside = path.with_name("aside")
    async with await Database.open(path) as database:
        await put(database, ORG)
        before, log = path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()

        def place(path: Path) -> None:
            path.rename(aside)
            path.with_name(path.name + "-wal").rename(aside.with_name("aside-wal"))
            (tmp_path / "other.db").rename(path)

        await database.replace(place)
        await database.reopen(check=True)
        assert database.fault() is None
        assert (await directory.load(database))[1].org_id == "other"
        await put(database, replace(ORG, org_id="more"))
    assert (aside.read_bytes(), aside.with_name("aside-wal").read_bytes()) == (before, log)
    async with await Database.open(aside) as database:
        assert ORG in await directory.load(database)


async def test_damage_is_found_when_it_is_looked_for(path):
    async with await Database.open(path) as database:
        for number in range(400):
            await put(database, replace(ORG, org_id=f"org-{number}"))
    async with await Database.open(path) as database:
        pages = path.read_bytes()
        stamp = os.stat(path)
        with path.open("r+b") as file:
            file.write(pages[: 15 * 4096] + b"\xa5" * 4096 + pages[16 * 4096 :])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the disk did it, nobody wrote
        await database.reopen()
        with pytest.raises(DatabaseDamaged):
            await database.reopen(check=True)


# -- checkpoints ---------------------------------------------------------------------------------


def fill(megabytes: int) -> Callable[[sqlite3.Connection], None]:
    """Changes of so many megabytes: twice of nothing to see."""

    def work(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS filler (x BLOB)")
        connection.executemany("INSERT INTO filler VALUES (zeroblob(?))", [(1 << 20,)] * megabytes)

    return work


def log_bytes(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


async def test_the_log_is_brought_in_when_it_is_worth_it_and_then_begins_anew(path):
    async with await Database.open(path) as database:
        await database.commit(fill(3))
        size = path.stat().st_size
        await database.checkpoint()
        assert path.stat().st_size == size
        await database.commit(fill(2))
        await database.checkpoint()
        assert path.stat().st_size > 5 << 20
        await database.commit(add("a"))
        assert log_bytes(path) < 1 << 20
        assert database.fault() is None


async def test_a_reader_from_outside_holds_up_neither_commits_nor_checkpoints(path):
    async with await Database.open(path) as database:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN")
        other.execute("SELECT * FROM organization").fetchall()
        await database.commit(fill(65))
        assert log_bytes(path) > TRUNCATE_BYTES
        clock = asyncio.get_running_loop().time
        started = clock()
        await database.checkpoint()
        assert clock() - started < 0.85, "it has waited until the time for it was up"
        async with database.reader() as reader:  # ours are not kept waiting for it
            assert len(await reader.read("SELECT 1 FROM filler")) == 65
        await database.commit(add("a"))
        other.close()
        assert database.fault() is None


# -- readers -------------------------------------------------------------------------------------


async def test_a_reader_sees_one_moment_and_cannot_write(path):
    async with await Database.open(path) as database:
        await database.commit(lambda c: c.execute("UPDATE meta SET applied_lsn = 7"))
        async with database.reader() as reader:
            assert reader.as_of_lsn == 7
            await put(database, ORG)
            await database.commit(lambda c: c.execute("UPDATE meta SET applied_lsn = 8"))
            assert len(await reader.read("SELECT * FROM organization WHERE cache < ?", (9,))) == 1
            with pytest.raises(StorageUnavailable) as caught:
                await reader.read("DELETE FROM organization")
            assert "readonly" in str(caught.value.__cause__)
        async with database.reader() as reader:
            assert reader.as_of_lsn == 8
            assert len(await reader.read("SELECT * FROM organization")) == 2


async def test_two_read_at_a_time_and_the_third_waits_or_is_told_to_come_back(path):
    async with await Database.open(path) as database:
        async with database.reader(), database.reader() as second:
            with pytest.raises(StorageUnavailable, match="Too many reports"):
                async with database.reader(within_s=0.05):
                    raise AssertionError("there were three")
            third = asyncio.get_running_loop().create_task(anext(seen(database)))
            assert await second.read("SELECT 1")
        assert await third == 1


async def seen(database: Database) -> AsyncIterator[int]:
    async with database.reader() as reader:
        yield (await reader.read("SELECT 1"))[0][0]


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


async def test_a_report_that_takes_too_long_is_cut_short(path):
    async with await Database.open(path) as database:
        started = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable, match=r"longer than 0.2 s"):
            async with database.reader(within_s=0.2) as reader:
                await reader.read(ENDLESS)
        assert asyncio.get_running_loop().time() - started < 5
        async with database.reader(), database.reader():
            pass  # both places are free again


async def test_a_report_whose_client_leaves_is_cut_short(path):
    async with await Database.open(path) as database:

        async def report() -> None:
            async with database.reader() as reader:
                inside.set()
                await reader.read(ENDLESS)

        inside = asyncio.Event()
        task = asyncio.get_running_loop().create_task(report())
        await inside.wait()
        task.cancel()
        async with asyncio.timeout(3):
            await asyncio.wait([task])
        async with database.reader(), database.reader():
            pass


async def test_a_log_that_grew_too_long_lets_readers_out_but_none_in_until_it_is_cut(path):
    async with await Database.open(path) as database:
        async with database.reader() as reader:
            for _ in range(2):
                await database.commit(fill(35))
                await database.checkpoint()
            assert log_bytes(path) > TRUNCATE_BYTES
            with pytest.raises(StorageUnavailable, match="Too many reports"):
                async with database.reader(within_s=0.05):
                    raise AssertionError("the gate was open")
            assert await reader.read("SELECT 1")
            await database.commit(add("a"))  # commits go on
        assert log_bytes(path) == 0
        async with database.reader() as reader:
            assert len(await reader.read("SELECT 1 FROM filler")) == 70
        assert database.fault() is None


async def test_a_lost_file_is_not_read_from(path):
    async with await Database.open(path) as database:
        path.rename(path.with_name("away"))
        with pytest.raises(StorageUnavailable):
            async with database.reader():
                raise AssertionError("it reads another file")
