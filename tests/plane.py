"""The admin plane over a real socket, on a real database, without the rest of the gateway."""

import io
import random
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp.test_utils import RawTestServer, TestClient
from multidict import CIMultiDict

from gwproxy.core.identity import Principal
from gwproxy.log import Log
from gwproxy.state.directory import Directory
from gwproxy.state.keyring import Keyring
from gwproxy.state.store import Kept, Store, opened
from tests.harness import admin_auth, admin_plane
from tests.office import Disk

ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
START = 1_800_000_000  # 2027-01-15T08:00:00Z


@dataclass
class Plane:
    client: TestClient
    store: Store
    disk: Disk
    directory: Directory
    keyring: Keyring
    path: Path
    seconds: list[float] = field(default_factory=lambda: [0.0])

    async def call(self, method: str, path: str, body: object = None, **headers: str):
        """Status, parsed body and headers of a call by the administrator."""
        sent = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        content_type = {} if sent is None else {"Content-Type": "application/json"}
        async with self.client.request(
            method, path, data=sent, headers={**ADMIN, **content_type, **headers}
        ) as answer:
            raw = await answer.read()
            return answer.status, orjson.loads(raw) if raw else None, answer.headers

    def authenticate(self, key: str, now: float = START) -> Principal:
        return self.keyring.authenticate(CIMultiDict({"x-api-key": key}), now)


@asynccontextmanager
async def open_plane(tmp_path: Path) -> AsyncIterator[Plane]:
    seconds = [0.0]
    disk = Disk()
    async with opened(
        at(tmp_path),
        Log(io.StringIO(), "error"),
        below=random.Random(1).randrange,
        wall=lambda: START + seconds[0],
        files=disk,
    ) as store:
        auth = admin_auth(ADMIN_KEY, lambda: seconds[0], store.keyring, lambda: START + seconds[0])
        async with (
            RawTestServer(admin_plane(store, auth), handler_cancellation=True) as server,
            TestClient(server) as client,
        ):
            path = tmp_path / "gwproxy.db"
            yield Plane(client, store, disk, store.directory, store.keyring, path, seconds)


def at(folder: Path) -> Kept:
    return Kept(folder / "gwproxy.db", folder / "journal", segment_bytes=1 << 20)


async def reopened(plane: Plane, *, repeats: bool = False) -> Any:
    """What a start after a crash at this moment would know of the directory, or of requests that
    were made before."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "state"
        shutil.copytree(plane.path.parent, copy)
        async with opened(at(copy), Log(io.StringIO(), "error"), files=Disk()) as store:
            return store.directory.repeats if repeats else store.keyring


async def make_key(plane: Plane, body: object = None, user_id: str = "ann"):
    await plane.call("POST", "/admin/users", {"user_id": user_id})
    status, created, _ = await plane.call("POST", f"/admin/users/{user_id}/api-keys", body)
    assert status == 201
    return created
