"""The database file: its modes, its lock, its checks at opening, its transactions."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gwproxy.core.errors import AlreadyExists, StorageUnavailable
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
from gwproxy.storage import directory
from gwproxy.storage.database import (
    SQLITE_VERSION,
    Database,
    DatabaseInUse,
    DatabaseRefused,
    Migration,
    packaged,
)

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
        await directory.insert(database, ORG)
    async with await Database.open(path) as database:
        assert ORG in await directory.load(database)


@pytest.mark.parametrize("mask", [0o000, 0o022])
async def test_nobody_else_may_read_any_of_its_files(path, mask):
    before = os.umask(mask)
    try:
        async with await Database.open(path) as database:
            await directory.insert(database, ORG)
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
        await directory.insert(database, ORG)
        assert {mode(file) for file in files(path)} == {0o600}


async def test_the_connection_is_set_as_promised(path):
    async with await Database.open(path) as database:
        for name, value in [
            ("journal_mode", "wal"),
            ("synchronous", 2),
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
        await directory.insert(first, ORG)  # the refused one has not disturbed it
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
    with pytest.raises(DatabaseRefused, match=r"not a database.*restore a backup"):
        await opened(path)
    assert path.read_bytes().startswith(b"these are not")


async def test_a_damaged_page_is_found_at_opening(path):
    async with await Database.open(path) as database:
        for number in range(400):
            await directory.insert(database, replace(ORG, org_id=f"org-{number}"))
    pages = path.read_bytes()
    assert len(pages) > 20 * 4096
    path.write_bytes(pages[: 15 * 4096] + b"\xa5" * 4096 + pages[16 * 4096 :])
    with pytest.raises(DatabaseRefused, match="restore a backup"):
        await opened(path)


async def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DatabaseRefused, match="no such folder"):
        await opened(tmp_path / "missing" / "gwproxy.db")


async def test_a_folder_in_the_place_of_the_file_is_refused(path):
    path.mkdir()
    with pytest.raises(DatabaseRefused, match="directory"):
        await opened(path)


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
            await directory.insert(database, row)
        assert (await directory.load(database))[1:] == [ORG, ANN, KEY]


async def test_a_changed_row_is_stored_and_may_be_stored_twice(path):
    later = replace(ANN, status=Status.SUSPENDED, email=None, version=2)
    async with await Database.open(path) as database:
        for row in (ORG, ANN):
            await directory.insert(database, row)
        await directory.update(database, later)
        await directory.update(database, later)
        assert later in await directory.load(database)
        with pytest.raises(StorageUnavailable):
            await directory.update(database, ANN)  # older than what is stored
        with pytest.raises(StorageUnavailable):
            await directory.update(database, replace(ANN, user_id="nobody"))
        assert later in await directory.load(database)


async def test_ids_addresses_and_digests_are_unique_in_the_file_itself(path):
    bob = replace(ANN, user_id="bob", email="ANN@example.org")
    async with await Database.open(path) as database:
        for row in (ORG, ANN, KEY):
            await directory.insert(database, row)
        for duplicate in (ORG, ANN, KEY, bob, replace(KEY, key_id="key_2")):
            with pytest.raises(AlreadyExists):
                await directory.insert(database, duplicate)
        await directory.update(database, replace(ANN, deleted_at=9, version=2))
        await directory.insert(database, bob)


async def test_a_row_whose_owner_is_missing_is_not_stored(path):
    async with await Database.open(path) as database:
        with pytest.raises(StorageUnavailable):
            await directory.insert(database, ANN)
        assert len(await directory.load(database)) == 1


async def test_the_last_use_of_keys_is_stored(path):
    async with await Database.open(path) as database:
        for row in (ORG, ANN, KEY):
            await directory.insert(database, row)
        await directory.update_last_used(database, [("key_1", 77)])
        assert (await directory.load(database))[-1] == replace(KEY, last_used_at=77)


# -- transactions --------------------------------------------------------------------------------


async def count(database: Database) -> int:
    return (await database.read("SELECT count(*) FROM organization"))[0][0]


INSERT = "INSERT INTO organization (org_id, created_at) VALUES (?, 1)"


async def test_a_transaction_that_fails_leaves_nothing(path):
    async with await Database.open(path) as database:
        with pytest.raises(RuntimeError):
            async with database.transaction() as connection:
                await connection.execute(INSERT, ["a"])
                raise RuntimeError
        assert await count(database) == 1
        async with database.transaction() as connection:
            await connection.execute(INSERT, ["a"])
        assert await count(database) == 2


async def test_a_transaction_that_sqlite_rolled_back_is_not_taken_for_committed(path):
    async with await Database.open(path) as database:
        with pytest.raises(StorageUnavailable):
            async with database.transaction() as connection:
                await connection.execute(INSERT, ["a"])
                await connection.execute("ROLLBACK")  # as SQLite itself does on a full disk
                await connection.execute(INSERT, ["b"])
        # The second statement ran on its own: that is why the caller must hear of it.
        assert await count(database) == 2


async def test_transactions_take_turns(path):
    async with await Database.open(path) as database:

        async def add(name: str) -> None:
            async with database.transaction() as connection:
                await connection.execute(INSERT, [name + "1"])
                await connection.execute(INSERT, [name + "2"])

        await asyncio.gather(*(add(name) for name in "abcdefgh"))
        assert await count(database) == 17


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancelled_transaction_leaves_the_connection_usable(path, steps):
    async with await Database.open(path) as database:

        async def add() -> None:
            async with database.transaction() as connection:
                await connection.execute(INSERT, ["a"])

        task = asyncio.get_running_loop().create_task(add())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        async with database.transaction() as connection:
            await connection.execute(INSERT, ["b"])
        assert await count(database) in (2, 3)


async def test_a_full_disk_is_storage_unavailable_and_over_when_there_is_room(path):
    async with await Database.open(path) as database:
        pages = (await database.read("PRAGMA page_count"))[0][0]
        await database.read(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageUnavailable) as caught:
            for number in range(1000):
                await directory.insert(database, replace(ORG, org_id=f"org-{number}"))
        assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
        assert caught.value.retry_after_s
        assert isinstance(caught.value.__cause__, sqlite3.Error)
        await database.read("PRAGMA max_page_count = 1000000")
        await directory.insert(database, replace(ORG, org_id="later"))


async def test_a_deleted_or_replaced_file_takes_no_more_writes(path):
    async with await Database.open(path) as database:
        await directory.insert(database, ORG)
        aside = path.with_name("aside")
        path.rename(aside)
        with pytest.raises(StorageUnavailable):
            await directory.insert(database, ANN)
        path.write_bytes(aside.read_bytes())
        with pytest.raises(StorageUnavailable):
            await directory.insert(database, ANN)
        aside.rename(path)
        await directory.insert(database, ANN)


async def test_a_lock_held_from_outside_is_told_in_less_than_a_second_or_so(path):
    async with await Database.open(path) as database:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable):
            await directory.insert(database, ORG)
        assert asyncio.get_running_loop().time() - started < 2
        other.close()
        await directory.insert(database, ORG)


async def test_a_closed_database_says_so(path):
    database = await Database.open(path)
    await database.close()
    with pytest.raises(StorageUnavailable):
        await database.read("SELECT 1")
    with pytest.raises(StorageUnavailable):
        await directory.insert(database, ORG)
