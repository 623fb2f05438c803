"""Kill -9 in the middle of an import: a real process, at moments spread over its whole way."""

import asyncio
import io
import time
from pathlib import Path

import aiohttp
import pytest

from gwproxy.log import Log
from gwproxy.state.store import Kept, opened
from tests.harness import ADMIN
from tests.kills import Life, Place

ROWS = 4000
KILLS = 6

CONFIG = """
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "openai"
base_url = "http://127.0.0.1:9/v1"
token = "env:UPSTREAM_TOKEN"
[storage]
journal_segment_bytes = 1048576
"""


def body(generation: int) -> bytes:
    """The same users each time, with another limit."""
    return b"".join(
        b'{"user_id":"u%05d","email":"u%05d@example.org","rpm":%d}\n' % (n, n, generation)
        for n in range(ROWS)
    )


async def send(life: Life, generation: int) -> bool:
    """Whether the import was acknowledged; False when the process was gone before."""
    headers = {**ADMIN, "Content-Type": "application/x-ndjson"}
    url = f"{life.url}/admin/import"
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=body(generation), headers=headers) as response,
        ):
            answer = await response.json()
            return response.status == 200 and bool(answer["committed"])
    except aiohttp.ClientError:
        return False


async def generations(place: Place) -> set[int | None]:
    """The limits in memory and in the database, which have to be the same."""
    kept = Kept(place.database, place.journal, segment_bytes=1 << 20)
    async with opened(kept, Log(io.StringIO(), "error")) as store:
        await store.catch_up(30.0)
        users = [*store.keyring.users_after("")]
        rows = await store.database.read("SELECT rpm, count(*) FROM user GROUP BY rpm")
        assert [tuple(row) for row in rows] == ([(users[0].rpm, len(users))] if users else [])
        assert len(users) in (0, ROWS)
        return {user.rpm for user in users}


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_an_import_that_is_killed_at_any_moment_is_there_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(CONFIG)
    config.chmod(0o600)
    place = Place(folder, {})
    async with place.life() as life:
        assert await life.ready()
        started = time.monotonic()
        assert await send(life, 1)
        whole_s = time.monotonic() - started
        await life.stop()
    assert await generations(place) == {1}
    now, seen = 1, {"old": 0, "new": 0}
    for number in range(KILLS):
        async with place.life() as life:
            assert await life.ready()
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(send(life, now + 1))
                await asyncio.sleep(whole_s * (number + 0.5) / KILLS)
                life.kill()
        [found] = await generations(place)
        assert found in (now, now + 1)
        assert found == now + 1 or not sending.result(), "what was acknowledged is there"
        seen["new" if found == now + 1 else "old"] += 1
        now = found or 0
    assert seen["old"], f"killed too late to show anything: {seen}"
