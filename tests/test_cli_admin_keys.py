"""`gwproxy admin-keys`: the first administrator's way in, with a server and without."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gwproxy.cli import main
from gwproxy.core.identity import well_formed
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN_KEY, CONFIG, UPSTREAM_TOKEN, Gateway, bearer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(upstream="http://127.0.0.1:9/v1", more=""))
    config.chmod(0o600)
    monkeypatch.setenv("GWPROXY_CONFIG", str(config))
    monkeypatch.setenv("UPSTREAM_TOKEN", UPSTREAM_TOKEN)
    monkeypatch.setenv("GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES", "1048576")
    monkeypatch.delenv("GWPROXY_ADMIN_KEY", raising=False)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["admin-keys", *argv]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


async def test_a_key_made_without_a_server_opens_the_one_that_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], aiohttp_client: Any
) -> None:
    out, err = await asyncio.to_thread(
        said, capsys, "create", "--name", "first", "--scope", "write"
    )
    key = out.removesuffix("\n")
    assert well_formed(key) and key.startswith("gw_admin_")
    assert "not shown again" in err and key not in err
    out, _ = await asyncio.to_thread(said, capsys, "create", "--json")
    reader = json.loads(out)
    assert reader["scope"] == "read"
    out, _ = await asyncio.to_thread(said, capsys, "revoke", reader["key_id"], "--json")
    assert json.loads(out) == {"key_id": reader["key_id"], "revoked": True}

    text = CONFIG.format(upstream="http://127.0.0.1:9/v1", more="")
    client = await aiohttp_client(Gateway(folder, text))
    made = await client.post("/admin/users", json={"user_id": "ann"}, headers=bearer(key))
    assert made.status == 201
    revoked = bearer(reader["admin_key"])
    assert (await client.get("/admin/users", headers=revoked)).status == 401
    audit = await client.get("/admin/audit?noun=admin_key", headers=bearer(key))
    actors = {line["actor"] for line in (await audit.json())["data"]}
    assert len(actors) == 1 and actors.pop().startswith("cli:")


async def test_a_running_server_is_asked(
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
) -> None:
    front: Front = await start_gateway()
    monkeypatch.setenv("GWPROXY_ADMIN_KEY", ADMIN_KEY)
    url = ("--url", front.url)
    out, _ = await asyncio.to_thread(said, capsys, "create", "--name", "ops", *url)
    key = out.strip()
    assert (await front.client.get("/admin/users", headers=bearer(key))).status == 200
    out, _ = await asyncio.to_thread(said, capsys, "list", *url)
    head, line = out.splitlines()
    assert head.split()[:4] == ["KEY", "ID", "PREFIX", "NAME"]
    key_id = line.split()[0]
    assert (line.split()[2:4], key_id[6:]) == (["ops", "read"], key[9:17])
    _, err = await asyncio.to_thread(said, capsys, "revoke", key_id, *url)
    assert err == f"{key_id} is refused from now on.\n"
    assert (await front.client.get("/admin/users", headers=bearer(key))).status == 401
    out, _ = await asyncio.to_thread(said, capsys, "list", "--deleted", *url)
    assert "REVOKED AT" in out and key_id in out
    _, err = await asyncio.to_thread(lambda: said(capsys, "revoke", key_id, *url, code=1))
    assert "no admin key with this id" in err
