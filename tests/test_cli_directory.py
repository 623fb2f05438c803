"""The directory's commands, with a server and without one: what they print, how they end."""

import argparse
import asyncio
import io
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from aiohttp import web

from gwproxy.cli import admin_keys, directory
from gwproxy.core.identity import KeyKind, checksum, digest, mint, well_formed
from gwproxy.log import Log
from gwproxy.state.keyring import Keyring
from gwproxy.state.store import Kept, opened
from gwproxy.storage.database import Database, lock
from tests.harness import admin_auth, admin_plane
from tests.office import Disk

ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
KEY = mint(KeyKind.LIVE, random.Random(1).randrange)

CONFIG = """
[server]
listen = "{listen}"
[admin]
{admin}
[upstream]
flavour = "openai"
base_url = "http://127.0.0.1:9/v1"
[storage]
path = "gwproxy.db"
journal_segment_bytes = 1048576
"""


@dataclass
class Shell:
    """Runs commands as a person would, and keeps what they printed."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    @property
    def database(self) -> Path:
        return self.folder / "gwproxy.db"

    @property
    def kept(self) -> Kept:
        return Kept(self.database, self.folder / "journal", segment_bytes=1 << 20)

    def configure(self, listen: str, admin: str = f'key = "{ADMIN_KEY}"') -> None:
        config = self.folder / "config.toml"
        config.write_text(CONFIG.format(listen=listen, admin=admin))
        config.chmod(0o600)

    def run(self, *argv: str) -> int:
        parser = argparse.ArgumentParser(prog="gwproxy")
        families = parser.add_subparsers(required=True)
        directory.add_commands(families)
        admin_keys.add_commands(families)
        self.capsys.readouterr()
        try:
            args = parser.parse_args(argv)
            code = args.func(args)
        except SystemExit as stop:  # argparse's own way to say: wrong usage
            code = stop.code
        self.out, self.err = self.capsys.readouterr()
        return code

    async def run_beside(self, *argv: str) -> int:
        """From another thread, while the server of the test goes on serving."""
        return await asyncio.to_thread(self.run, *argv)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch, capsys) -> Shell:
    for name in [*os.environ]:
        if name.startswith(("GWPROXY", "STATE_DIRECTORY", "CLOUDFLARE_", "AI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GWPROXY_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    shell = Shell(tmp_path, capsys)
    shell.configure(f"127.0.0.1:{free_port()}")
    return shell


@pytest.fixture(params=["tcp", "unix"])
async def server(request, shell: Shell) -> AsyncIterator[list[tuple[str, str]]]:
    """A running server: it holds the database's lock. Gives the requests it has seen."""
    async with opened(shell.kept, Log(io.StringIO(), "error"), files=Disk()) as store:
        plane = admin_plane(store, admin_auth(ADMIN_KEY, time.monotonic, store.keyring))
        seen: list[tuple[str, str]] = []

        async def front(request: web.BaseRequest) -> web.StreamResponse:
            seen.append((request.method, request.path_qs))
            return await plane(request)

        runner = web.ServerRunner(web.Server(front))
        await runner.setup()
        if request.param == "unix":
            path = str(shell.folder / "gw.sock")
            await web.UnixSite(runner, path).start()
            shell.configure(f"unix:{path}")
        else:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            shell.configure(f"0.0.0.0:{port}")
        yield seen
        await runner.cleanup()


def restarted(shell: Shell) -> Keyring:
    """What a server that starts now would know."""

    async def read() -> Keyring:
        async with opened(shell.kept, Log(io.StringIO(), "error"), files=Disk()) as store:
            return store.keyring

    return asyncio.run(read())


# -- without a server ----------------------------------------------------------------------------


def test_a_user_an_organization_and_a_key_are_made_without_a_server(shell):
    assert shell.run("orgs", "create", "--id", "acme", "--monthly-budget-usd", "1000") == 0
    created = shell.run(
        "users", "create", "--id", "ann", "--email", "ann@example.org", "--org", "acme",
        "--monthly-limit-usd", "12.34", "--rpm", "60",
    )  # fmt: skip
    assert (created, shell.err) == (0, "")
    assert "monthly_limit_usd  12.34\n" in shell.out
    assert shell.run("keys", "create", "--user", "ann", "--name", "laptop") == 0
    key = shell.out.removesuffix("\n")
    assert well_formed(key)
    assert "not shown again" in shell.err and key not in shell.err
    keyring = restarted(shell)
    assert keyring.user("ann").org_id == "acme"
    assert keyring.user("ann").monthly_limit == 12_340_000_000
    assert keyring.key("key_" + key[8:16]).digest == digest(key)


def test_json_is_what_the_admin_plane_answers(shell):
    assert shell.run("users", "create", "--id", "ann", "--json") == 0
    user = orjson.loads(shell.out)
    assert (user["user_id"], user["monthly_limit_usd"]) == ("ann", None)
    assert shell.run("users", "show", "ann", "--json") == 0
    assert orjson.loads(shell.out) == user
    assert shell.run("users", "list", "--json") == 0
    assert orjson.loads(shell.out) == {"data": [user], "next_cursor": None}
    assert shell.run("keys", "create", "--user", "ann", "--json") == 0
    key = orjson.loads(shell.out)
    assert well_formed(key.pop("api_key"))
    assert shell.run("keys", "list", "--user", "ann", "--json") == 0
    assert orjson.loads(shell.out)["data"] == [key]
    assert shell.run("orgs", "list", "--json") == 0
    assert [org["org_id"] for org in orjson.loads(shell.out)["data"]] == ["default"]
    assert shell.run("orgs", "show", "default", "--json") == 0


def test_a_list_is_a_table_for_people(shell):
    shell.run("users", "create", "--id", "ann", "--monthly-limit-usd", "5")
    shell.run("users", "create", "--id", "bartholomew", "--email", "b@example.org")
    assert shell.run("users", "list") == 0
    head, ann, bart = shell.out.splitlines()
    assert head.split()[:3] == ["USER", "ID", "ORG"]
    assert ann.split()[:5] == ["ann", "default", "-", "active", "5.00"]
    assert bart.split()[:5] == ["bartholomew", "default", "b@example.org", "active", "-"]
    assert ann.index("default") == bart.index("default")


def test_a_list_has_everybody_however_long_it_is(shell):
    async def fill() -> None:
        async with opened(shell.kept, Log(io.StringIO(), "error"), files=Disk()) as store:
            for number in range(2500):
                await store.directory.create_user(user_id=f"user-{number:04}")

    asyncio.run(fill())
    assert shell.run("users", "list", "--json") == 0
    users = orjson.loads(shell.out)["data"]
    assert [user["user_id"] for user in users] == [f"user-{n:04}" for n in range(2500)]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["users", "create", "--id", "ann"], 1, "There is a user with this id."),
        (["users", "create", "--id", "a b"], 2, "`user_id` must be"),
        (["users", "create", "--monthly-limit-usd", "1e400"], 2, "`monthly_limit_usd`"),
        (["users", "create", "--monthly-limit-usd=-5"], 2, "must not be negative"),
        (["users", "create", "--rpm", "0"], 2, "`rpm`"),
        (["users", "create", "--org", "nobody"], 2, "no organization"),
        (["users", "show", "nobody"], 1, "no user with this id"),
        (["orgs", "show", "nobody"], 1, "no organization with this id"),
        (["keys", "create", "--user", "nobody"], 1, "no user with this id"),
        (["keys", "create", "--user", "ann", "--expires-at", "tomorrow"], 2, "`expires_at`"),
        (["keys", "list", "--user", "nobody"], 1, "no user with this id"),
        (["keys", "create"], 2, "--user"),
        (["users", "create", "--rpm", "many"], 2, "whole number"),
        (["users"], 2, "required"),
        (["users", "list", "--config", "/nonexistent.toml"], 2, "/nonexistent.toml"),
    ],
)
def test_a_refusal_says_why_on_stderr_and_ends_with_its_code(shell, argv, code, words):
    shell.run("users", "create", "--id", "ann")
    assert shell.run(*argv) == code
    assert words in shell.err
    assert shell.out == ""
    assert "Traceback" not in shell.err


def test_a_damaged_database_is_a_failure_not_a_traceback(shell):
    shell.database.write_bytes(b"nothing" * 1000)
    assert shell.run("users", "list") == 1
    assert "gwproxy restore" in shell.err


# -- with a server -------------------------------------------------------------------------------


async def test_a_running_server_is_asked(shell, server):
    assert await shell.run_beside("users", "create", "--id", "ann", "--rpm", "5") == 0
    assert await shell.run_beside("keys", "create", "--user", "ann") == 0
    assert well_formed(shell.out.removesuffix("\n"))
    assert await shell.run_beside("users", "list") == 0
    assert "ann" in shell.out
    assert await shell.run_beside("keys", "list", "--user", "ann", "--deleted") == 0
    assert "REVOKED AT" in shell.out
    assert await shell.run_beside("orgs", "create", "--id", "acme") == 0
    assert await shell.run_beside("orgs", "show", "acme") == 0
    assert server[:2] == [("POST", "/admin/users"), ("POST", "/admin/users/ann/api-keys")]
    assert server[2] == ("GET", "/admin/users?limit=1000&cursor=&deleted=0")


async def test_a_running_servers_refusals_end_alike(shell, server):
    await shell.run_beside("users", "create", "--id", "ann")
    for argv, code, words in [
        (["users", "create", "--id", "ann"], 1, "There is a user with this id."),
        (["users", "create", "--monthly-limit-usd", "NaN"], 2, "`monthly_limit_usd`"),
        (["users", "show", "nobody"], 1, "no user with this id"),
        (["users", "show", "../../v1/models"], 2, "An id has"),
        (["keys", "list", "--user", "a b"], 2, "An id has"),
    ]:
        assert await shell.run_beside(*argv) == code
        assert words in shell.err


async def test_a_wrong_or_missing_admin_key_is_a_matter_of_configuration(shell, server):
    text = (shell.folder / "config.toml").read_text()
    (shell.folder / "config.toml").write_text(text.replace(ADMIN_KEY, "x" * 40))
    assert await shell.run_beside("users", "list") == 2
    assert "admin key is not valid" in shell.err
    (shell.folder / "config.toml").write_text(text.replace(f'key = "{ADMIN_KEY}"', ""))
    assert await shell.run_beside("users", "list") == 2
    assert "GWPROXY_ADMIN_KEY" in shell.err


@pytest.mark.parametrize("server", ["tcp"], indirect=True)
async def test_the_address_can_be_given(shell, server):
    listen = next(
        line
        for line in (shell.folder / "config.toml").read_text().splitlines()
        if "0.0.0.0" in line
    )
    port = listen.rpartition(":")[2].strip('"')
    shell.configure("fd:3")
    assert await shell.run_beside("users", "list") == 2
    assert "--url" in shell.err
    assert await shell.run_beside("users", "list", "--url", f"http://127.0.0.1:{port}") == 0
    for url in ("ftp://x", "http://", "localhost:1", "http://[", "http://127.0.0.1:99999"):
        assert await shell.run_beside("users", "list", "--url", url) == 2


async def test_a_busy_database_without_a_server_is_unreachable(shell):
    async with await Database.open(shell.database):
        assert await shell.run_beside("users", "list") == 3
    assert "No server answers" in shell.err
    assert f"in use by another process ({os.getpid()})" in shell.err
    # It may be the server, before it listens: nobody is told to stop that.
    assert "still starting" in shell.err and "Stop it" not in shell.err


def test_a_server_that_ends_while_the_text_is_read_is_not_said_to_be_there_still(
    shell, monkeypatch
):
    shell.run("users", "list")
    server = lock(shell.database)

    def read() -> bytes:
        os.close(server)
        return KEY.encode()

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=SimpleNamespace(read=read)))
    assert shell.run("keys", "revoke", "--from-stdin") == 3
    assert "No server answers" in shell.err and "run the command again" in shell.err
    assert "in use" not in shell.err


async def test_another_server_at_the_address_is_told_apart(shell):
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="It works!", status=200)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    assert await shell.run_beside("users", "list", "--url", url) == 3
    assert "is not gwproxy" in shell.err
    await runner.cleanup()


# -- keys check ----------------------------------------------------------------------------------


def test_a_whole_key_is_said_to_be_whole_without_any_configuration(shell, monkeypatch):
    monkeypatch.setenv("GWPROXY_CONFIG", "/nonexistent")
    assert shell.run("keys", "check", KEY) == 0
    assert shell.out == f"complete: a live key, {KEY[:16]}..., key_{KEY[8:16]}\n"
    assert KEY[16:48] not in shell.out + shell.err
    assert shell.run("keys", "check", KEY, "--json") == 0
    assert orjson.loads(shell.out) == {
        "ok": True,
        "kind": "live",
        "prefix": KEY[:16],
        "key_id": "key_" + KEY[8:16],
    }


def test_a_key_is_read_from_stdin(shell, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(KEY + "\n"))
    assert shell.run("keys", "check") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert shell.run("keys", "check") == 2
    assert "gwproxy keys check < FILE" in shell.err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (KEY[:-1] + ("0" if KEY[-1] != "0" else "1"), "checksum"),
        (KEY[:-1], "shape"),
        ("sk-something-else", "shape"),
        (KEY * 10, "longer"),
    ],
)
def test_a_key_that_is_not_whole_says_why(shell, text, reason):
    assert shell.run("keys", "check", text) == 1
    assert reason in shell.out
    assert shell.run("keys", "check", text, "--json") == 1
    assert orjson.loads(shell.out)["ok"] is False


def test_rows_are_changed_and_deleted(shell):
    shell.run("orgs", "create", "--id", "acme", "--monthly-budget-usd", "5")
    shell.run("users", "create", "--id", "ann", "--org", "acme", "--rpm", "5", "--email", "a@b.c")
    assert shell.run("users", "set", "ann", "--rpm", "none", "--status", "suspended", "--json") == 0
    ann = orjson.loads(shell.out)
    assert (ann["rpm"], ann["status"], ann["email"]) == (None, "suspended", "a@b.c")
    assert shell.run("orgs", "set", "acme", "--cache", "true", "--prices", "{}", "--json") == 0
    assert orjson.loads(shell.out)["cache"] is True
    assert shell.run("orgs", "set", "acme", "--prices", "{") == 2
    assert "--prices must be JSON" in shell.err
    assert shell.run("users", "set", "ann") == 2
    assert "--monthly-limit-usd" in shell.err
    assert shell.run("users", "delete", "ann") == 0
    assert shell.run("users", "show", "ann") == 1
    assert shell.run("users", "show", "ann", "--deleted") == 0
    assert shell.run("users", "set", "ann", "--rpm", "1") == 1


def test_a_key_is_found_by_its_id_changed_rotated_and_revoked(shell):
    shell.run("users", "create", "--id", "ann")
    shell.run("keys", "create", "--user", "ann", "--json")
    key = orjson.loads(shell.out)
    name = key["key_id"]
    assert shell.run("keys", "set", name, "--name", "laptop", "--allow-model", "a/b", "--json") == 0
    assert orjson.loads(shell.out)["allowed_models"] == ["a/b"]
    assert shell.run("keys", "set", name, "--allow-model", "none", "--json") == 0
    assert orjson.loads(shell.out)["allowed_models"] is None
    assert shell.run("keys", "rotate", name, "--grace-s", "60") == 0
    second = shell.out.strip()
    assert well_formed(second) and second != key["api_key"]
    assert shell.run("keys", "revoke", name) == 0
    assert shell.run("keys", "show", name) == 1
    assert shell.run("keys", "show", name, "--deleted") == 0
    assert "laptop" in shell.out
    assert second not in shell.out


def piped(data: bytes) -> io.TextIOWrapper:
    """Standard input as Python opens it where nothing but UTF-8 will do."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="strict")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-be", "utf-32-le"])
def test_a_key_that_leaked_is_found_in_whatever_encoding_the_text_is(shell, monkeypatch, encoding):
    shell.run("users", "create", "--id", "ann")
    shell.run("keys", "create", "--user", "ann")
    log = f"M\u00fcller leaked {shell.out.strip()} again"
    monkeypatch.setattr("sys.stdin", piped(log.encode(encoding)))
    assert shell.run("keys", "revoke", "--from-stdin") == 0
    assert shell.out.split()[1:] == ["revoked"]


def test_a_key_is_revoked_for_good_though_its_organization_is_deleted(shell, monkeypatch):
    shell.run("orgs", "create", "--id", "acme")
    shell.run("users", "create", "--id", "ann", "--org", "acme")
    keys = []
    for _ in range(3):
        shell.run("keys", "create", "--user", "ann", "--json")
        keys.append(orjson.loads(shell.out))
    shell.run("orgs", "delete", "acme")
    shell.run("keys", "list", "--user", "ann", "--json")
    assert orjson.loads(shell.out)["data"] == []
    assert shell.run("keys", "revoke", keys[0]["key_id"]) == 0
    monkeypatch.setattr("sys.stdin", piped(keys[1]["api_key"].encode()))
    assert shell.run("keys", "revoke", "--from-stdin") == 0
    assert shell.out.split() == [keys[1]["key_id"], "revoked"]
    shell.run("users", "set", "ann", "--org", "default")
    shell.run("keys", "list", "--user", "ann", "--json")
    assert [each["key_id"] for each in orjson.loads(shell.out)["data"]] == [keys[2]["key_id"]]


def test_keys_that_leaked_are_found_in_any_text_and_revoked(shell, monkeypatch):
    shell.run("users", "create", "--id", "ann")
    texts = []
    for _ in range(3):
        shell.run("keys", "create", "--user", "ann", "--json")
        texts.append(orjson.loads(shell.out))
    leaked, rotated, kept = texts
    shell.run("keys", "rotate", rotated["key_id"], "--grace-s", "60")
    # Somebody else's, of the same public part: no reason to revoke ours.
    forged = kept["api_key"][:16] + "0" * 32
    forged += checksum(forged)
    broken = kept["api_key"][:-1] + ("0" if kept["api_key"][-1] != "0" else "1")
    log = (
        f'x="{leaked["api_key"]}" {leaked["api_key"]}\n{rotated["api_key"]}nbsp,{KEY} {forged} '
        f"{broken}"
    )
    monkeypatch.setattr("sys.stdin", piped(log.encode()))
    assert shell.run("keys", "revoke", "--from-stdin", "--json") == 0
    found = {each["key_id"]: each["result"] for each in orjson.loads(shell.out)["data"]}
    assert found.pop(leaked["key_id"]) == found.pop(rotated["key_id"]) == "revoked"
    assert set(found.values()) == {"not known here, or revoked before"}
    assert shell.run("keys", "show", kept["key_id"]) == 0
    for text in (leaked, rotated, kept):
        assert text["api_key"] not in shell.out + shell.err
    monkeypatch.setattr("sys.stdin", piped(b"nothing here"))
    assert shell.run("keys", "revoke", "--from-stdin") == 0
    assert "no key" in shell.err
    assert shell.run("keys", "revoke") == 2


def test_an_administrators_key_that_leaked_is_revoked_too_and_a_forged_one_revokes_nothing(
    shell, monkeypatch
):
    texts = []
    for _ in range(2):
        shell.run("admin-keys", "create", "--json")
        texts.append(orjson.loads(shell.out))
    leaked, kept = texts
    forged = kept["admin_key"][:17] + "0" * 32
    forged += checksum(forged)
    monkeypatch.setattr("sys.stdin", piped(f"{leaked['admin_key']}\n{forged}".encode()))
    assert shell.run("keys", "revoke", "--from-stdin", "--json") == 0
    assert orjson.loads(shell.out)["data"] == [
        {"key_id": leaked["key_id"], "result": "revoked"},
        {"key_id": kept["key_id"], "result": "not known here, or revoked before"},
    ]
    shell.run("admin-keys", "list", "--json")
    assert [each["key_id"] for each in orjson.loads(shell.out)["data"]] == [kept["key_id"]]


def test_an_unknown_id_does_not_keep_the_other_keys_alive(shell):
    shell.run("users", "create", "--id", "ann")
    keys = []
    for _ in range(2):
        shell.run("keys", "create", "--user", "ann", "--json")
        keys.append(orjson.loads(shell.out)["key_id"])
    assert shell.run("keys", "revoke", "key_00000000", keys[0], "no id", keys[1]) == 1
    assert shell.out.split() == [keys[0], "revoked", keys[1], "revoked"]
    assert "'key_00000000' is not known" in shell.err and "'no id' is not known" in shell.err
    for key_id in keys:
        assert shell.run("keys", "show", key_id) == 1
    assert shell.run("keys", "revoke", keys[0]) == 1


def test_what_only_the_upstream_needs_may_be_missing(shell):
    config = shell.folder / "config.toml"
    config.write_text(
        config.read_text().replace(
            'flavour = "openai"\nbase_url = "http://127.0.0.1:9/v1"',
            'account_id = "env:CLOUDFLARE_ACCOUNT_ID"\ngateway_id = "env:CLOUDFLARE_GATEWAY_ID"\n'
            'token = "env:CLOUDFLARE_API_TOKEN"\n[providers.other]\nbase_url = '
            '"http://127.0.0.1:9/v1"\nflavour = "openai"\ntoken = "env:OTHER_TOKEN"',
        )
    )
    assert shell.run("users", "list") == 0, shell.err


def test_an_empty_list_is_shown_as_none_without_a_server_too(shell):
    assert shell.run("orgs", "create", "--id", "acme") == 0
    [line] = [line for line in shell.out.splitlines() if line.startswith("allowed_features")]
    assert line.split() == ["allowed_features", "-"]
