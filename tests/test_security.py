"""docs/SECURITY.md tells the truth, and those lines of its table that no other file tests."""

import ast
import asyncio
import functools
import json
import os
import re
import resource
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import unused_port
from multidict import CIMultiDict, CIMultiDictProxy

from gwproxy.admin.auth import AdminAuth
from gwproxy.cloudflare.api import session
from gwproxy.core.errors import InvalidApiKey
from gwproxy.core.identity import digest
from gwproxy.state.keyring import Keyring
from gwproxy.storage.database import HAS_WAL_RESET_BUG
from tests.conftest import Front, StartGateway
from tests.harness import (
    ADMIN,
    ADMIN_KEY,
    ANSWER,
    CONFIG,
    DONE,
    UPSTREAM_TOKEN,
    Received,
    Upstream,
    Wire,
    bearer,
    chat,
    delta,
    make_key,
    usage_only,
)
from tests.raw import connect, get, head, post, prompt, refused
from tests.scene import assert_nothing_left, metric, until
from tests.test_isolation import filled, served

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "SECURITY.md").read_text()

# -- the page --------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@functools.cache
def functions_of(name: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / name).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, functions))


def named() -> Iterator[tuple[str, str]]:
    yield from re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)


def test_each_test_that_the_page_names_exists() -> None:
    pairs = list(named())
    assert len(pairs) > 80
    assert not [pair for pair in pairs if pair[1] not in functions_of(pair[0])]
    files = set(re.findall(r"`(test_\w+\.py)", TEXT))
    assert not [name for name in files if not (ROOT / "tests" / name).exists()]


def test_each_attack_has_its_test() -> None:
    attacks = rows("Attacks, and what happens")
    assert len(attacks) > 40
    for attack, answer, tests in attacks:
        assert attack and answer
        assert re.search(r"`test_\w+\.py::test_\w+`", tests), attack


def pinned(name: str) -> tuple[int, ...]:
    found = re.search(rf"^{name}==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert found, name
    return tuple(map(int, found[1].split(".")))


def test_the_pinned_server_has_every_fix_that_is_listed() -> None:
    advisories = rows("Advisories of aiohttp, reviewed")
    assert len(advisories) > 10
    for ids, fixed, what, why in advisories:
        assert re.search(r"CVE-\d{4}-\d+|GHSA-", ids) and what and why
        assert tuple(map(int, fixed.split("."))) <= pinned("aiohttp"), ids
    [reviewed] = re.findall(r"reviewed for ([\d.]+\d)", TEXT)
    again = "a new version of it wants this table read again"
    assert pinned("aiohttp") == tuple(map(int, reviewed.split("."))), again


def test_the_readme_counts_what_is_installed() -> None:
    locked = re.findall(r"^([a-z][\w.-]*)==", (ROOT / "requirements.txt").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = project["dependencies"]
    said = re.search(r"(\d+) packages, (\d+) of them", (ROOT / "README.md").read_text())
    assert said and (int(said[1]), int(said[2])) == (len(set(locked)), len(direct))


def test_each_dependency_says_why_it_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'^    "[\w-]+[=><~][^"]*",(.*)$', text, re.M)
    assert len(listed) > 20
    assert all(re.search(r"# .{8}", rest) for rest in listed), listed


AUDITOR = """#!{python}
import json, sys
out = next(word for word in sys.argv if word.startswith("--output="))[9:]
said = {said!r}
if said is None:
    sys.exit("ERROR: nobody to ask")
open(out, "w").write(json.dumps({{"dependencies": said}}))
sys.exit(any(each.get("vulns") for each in said))
"""
"""What pip-audit does in each case, as it was seen: no file where it could not ask."""
ISSUE = {"id": "CVE-1", "fix_versions": ["2"]}


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (None, 3, "NOT AUDITED: ERROR: nobody to ask"),
        ([], 3, "NOT AUDITED"),
        ([{"name": "a", "skip_reason": "not found"}], 3, "NOT AUDITED"),
        ([{"name": "a", "version": "1", "vulns": [ISSUE]}], 1, "a 1: CVE-1, fixed in 2"),
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 packages audited, 0 known"),
    ],
)
def test_an_audit_that_asked_nobody_is_no_pass(
    tmp_path: Path, said: Any, code: int, words: str
) -> None:
    auditor = tmp_path / "pip-audit"
    auditor.write_text(AUDITOR.format(python=sys.executable, said=said))
    auditor.chmod(0o700)
    command = [sys.executable, ROOT / ".ci" / "audit.py", auditor]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done
    assert words in done.stdout


# -- keys ------------------------------------------------------------------------------------------


async def test_what_is_nearly_a_key_opens_nothing(front: Front, upstream: Upstream) -> None:
    key = front.key
    for wrong in (
        "",
        "null",
        UPSTREAM_TOKEN,
        ADMIN_KEY,
        digest(key).hex(),
        key[:16],
        key[:-1],
        key + "0",
        key.swapcase(),
        key.replace("gw_live_", "gw_admin_"),
        key[:-1] + ("0" if key[-1] != "0" else "1"),
        "' OR 1=1 --",
        f"{key},{key}",
        f"{key}%00",
        "A" * 4000,
    ):
        await refused(front.port, post(prompt(), key=wrong), 401, "invalid_api_key")
    for line in (f"Authorization: Basic {key}", f"Authorization: {key}", f"Cookie: key={key}"):
        data = post(prompt(), line, key=None)
        await refused(front.port, data, 401, "invalid_api_key")
    assert upstream.received == []


class Watched(str):
    """A secret that must not be compared, searched or taken apart, but hashed."""

    __slots__ = ()

    def _never(self, *args: object) -> Any:
        raise AssertionError("a secret was compared, for a time that says how near a guess came")

    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = _never
    startswith = endswith = find = index = count = __getitem__ = __iter__ = _never
    __hash__ = str.__hash__


class WatchedBytes(bytes):
    __slots__ = ()

    def _never(self, *args: object) -> Any:
        raise AssertionError("a digest was compared, for a time that says how near a guess came")

    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _never
    startswith = find = __getitem__ = __iter__ = _never
    __hash__ = bytes.__hash__


def test_no_comparison_takes_a_time_that_depends_on_the_admin_key() -> None:
    auth = AdminAuth(Watched(ADMIN_KEY), Keyring(), lambda: 0.0, lambda: 0.0)
    assert auth._digest is not None
    auth._digest = WatchedBytes(auth._digest)
    assert auth.check(CIMultiDictProxy(CIMultiDict(ADMIN)), None)
    for guess in (ADMIN_KEY[:-1] + "x", "x" + ADMIN_KEY[1:], "x" * len(ADMIN_KEY)):
        with pytest.raises(InvalidApiKey):
            auth.check(CIMultiDictProxy(CIMultiDict(bearer(guess))), None)


# -- names and ids ---------------------------------------------------------------------------------

STAR = """
[providers.own]
flavour = "openai"
base_url = "{upstream}"
[prices.models."own/*"]
input = "1"
output = "2"
"""


async def test_a_models_name_changes_nothing_but_the_body_that_is_sent(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(STAR.format(upstream=upstream.url))
    for name in ("own/a\r\nX-Injected: y", "own/a\n", "own/a\0", "own/\u2028", "own/\u202ea"):
        body = json.dumps(chat(model=name)).encode()
        await refused(front.port, post(body, key=front.key), 400, "invalid_value", param="model")
    half = json.dumps(chat()).replace("mock/echo", "own/\\ud800").encode()
    await refused(front.port, post(half, key=front.key), 400, "invalid_json")
    assert upstream.received == []
    heads = set()
    for name in ("echo", "\u0435cho", "a b", "../../x", "%0d%0aX: y", "?#"):
        answer = await front.chat(chat(model=f"own/{name}"))
        assert answer.status == 200, (name, await answer.text())
        assert "X" not in answer.headers and "X-Injected" not in answer.headers
        sent = upstream.received[-1]
        assert sent.json["model"] == name
        text = re.sub(r"req_[0-9a-f]{24}|Content-Length: \d+", "", sent.head.decode())
        heads.add(text)
    assert len(heads) == 1


async def test_no_path_puts_a_line_into_an_answers_head(front: Front) -> None:
    hostile = "a%0d%0aX-Injected:%20y"
    tried = 0
    for route in served(front):
        names = re.findall(r"\{(\w+)", route.path)
        if not names:
            continue
        tried += 1
        path = filled(route.path, dict.fromkeys(names, hostile))
        key = ADMIN_KEY if path.startswith("/admin") else front.key
        async with connect(front.port) as peer:
            data = b"{}"
            lines = ("Content-Type: application/json", f"Content-Length: {len(data)}")
            peer.send(head(*lines, key=key, line=f"{route.method} {path} HTTP/1.1") + data)
            answer = await peer.answer(to_head=route.method == "HEAD")
        assert 400 <= answer.status < 500, route
        assert answer.header("x-injected") is None
        assert b"\r" not in answer.body
    assert tried > 10


async def test_hostile_requests_make_no_series_of_their_own(
    front: Front, upstream: Upstream
) -> None:
    async def names() -> set[str]:
        async with front.client.get("/metrics", headers=ADMIN) as response:
            text = await response.text()
        return {line.rpartition(" ")[0] for line in text.splitlines() if line[:1] != "#"}

    async def attack(turn: int) -> None:
        for data in (
            get(f"/x{turn}", key=front.key),
            get(f"/v1/models/mock%2F{turn}", key=front.key),
            get(f"/v1/models?a={turn}", key=f"gw_live_{turn}"),
            get("/v1/models", key=front.key, method=f"M{turn}"),
            post(json.dumps(chat(model=f'mock/x"}}\n{turn}')).encode(), key=front.key),
            post(json.dumps(chat(model=f"m{turn}")).encode(), key=front.key),
            post(json.dumps(chat(user=f"u{turn}")).encode(), key=front.key),
        ):
            async with connect(front.port) as peer:
                peer.send(data)
                await peer.answer()

    await attack(0)
    await attack(1)
    await names()  # a scrape has a series, too, from its second time on
    before = await names()
    for turn in range(2, 12):
        await attack(turn)
    assert await names() == before


# -- money -----------------------------------------------------------------------------------------


async def test_no_trick_gets_more_than_the_budget(front: Front, upstream: Upstream) -> None:
    """Many at once, `n`, huge and missing maxima, failures that are retried, clients that leave."""
    limit_nanos = 400_000
    made = {"user_id": "mallory", "monthly_limit_usd": "0.0004"}
    async with front.client.post("/admin/users", json=made, headers=ADMIN) as response:
        assert response.status == 201
    key = await make_key(front.client, "mallory")
    billed = 0

    async def greedy(wire: Wire, received: Received) -> None:
        """It always uses all that it may."""
        nonlocal billed
        asked = received.json
        most = asked.get("max_completion_tokens") or asked.get("max_tokens") or 6
        used = {"prompt_tokens": 5, "completion_tokens": most * asked.get("n", 1)}
        used["total_tokens"] = sum(used.values())
        if asked.get("user") == "fails":
            await wire.answer(b"{}", "500 No")
            return
        if asked.get("user") != "leaves":
            billed += used["prompt_tokens"] * 1_000 + used["completion_tokens"] * 2_000
        if asked.get("stream"):
            await wire.start()
            for data in (delta("Hel"), delta("lo."), delta(finish="stop"), usage_only(**used)):
                await wire.chunk(data)
            await wire.chunk(DONE)
            await wire.end()
        else:
            await wire.answer(json.dumps({**ANSWER, "usage": used}).encode())

    upstream.script = greedy
    tricks: list[dict[str, Any]] = [
        {"n": 5, "max_tokens": 3},
        {"n": 128, "max_tokens": 100_000},
        {"max_tokens": 10_000_000},
        {"max_completion_tokens": 12},
        {},
        {"stream": True},
        {"stream": True, "max_tokens": 9, "stream_options": {"include_usage": False}},
        {"user": "fails", "max_tokens": 9},
        {"stream": True, "user": "leaves", "max_tokens": 9},
    ]
    seen: list[int] = []

    async def ask(number: int) -> None:
        fields = tricks[number % len(tricks)]
        async with connect(front.port) as peer:
            peer.send(post(json.dumps(chat(**fields)).encode(), key=key))
            if fields.get("user") == "leaves":
                seen.append((await peer.head())[0])
                peer.reset()
            else:
                seen.append((await peer.answer()).status)

    async with asyncio.TaskGroup() as group:
        for number in range(12 * len(tricks)):
            group.create_task(ask(number))
    await assert_nothing_left(front, upstream)
    async with front.client.get("/v1/usage", headers=bearer(key)) as shown:
        [scope] = [each for each in (await shown.json())["scopes"] if each["scope"] == "user"]
    spent = int(scope["month_usage_usd"].replace(".", ""))
    assert billed <= spent <= limit_nanos
    assert spent > limit_nanos / 2 and {200, 429} <= set(seen)
    assert float(scope["held_usd"]) == 0
    assert await metric(front, "gwproxy_overruns_total") == 0


# -- where it connects to, and what it writes ------------------------------------------------------


async def test_no_proxy_of_the_environment_is_asked(
    start_gateway: StartGateway, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Upstream()
    await proxy.start()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.upper(), proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    told = unused_port()
    front = await start_gateway(f'[quota]\nalert_webhook = "http://127.0.0.1:{told}/alert"\n')
    assert (await front.chat(chat())).status == 200
    async with session(None) as client, client.post(f"{upstream.url}/x", json={}) as answer:
        assert answer.status == 200
    assert len(upstream.received) == 2
    assert proxy.connections == 0
    await proxy.stop()


async def test_no_cookie_of_the_management_api_is_kept(upstream: Upstream) -> None:
    async def biscuit(wire: Wire, received: Received) -> None:
        await wire.answer(b"{}", more="Set-Cookie: __cf_bm=tracked; Path=/\r\n")

    upstream.script = biscuit
    # A jar would take nothing from an address of numbers.
    url = upstream.url.replace("127.0.0.1", "localhost")
    async with session(None) as client:
        for _ in range(2):
            async with client.get(url) as answer:
                assert answer.status == 200
    assert [received.header("cookie") for received in upstream.received] == [None, None]


async def test_nobody_else_may_read_a_file_of_a_running_gateway(
    start_gateway: StartGateway,
) -> None:
    before = os.umask(0)
    try:
        front = await start_gateway()
        assert (await front.chat(chat())).status == 200
        async with front.client.post("/admin/backup", json={}, headers=ADMIN) as response:
            assert response.status in (200, 201), await response.text()
        await until(lambda: front.gateway.database.with_name("gwproxy.db-wal").exists())
    finally:
        os.umask(before)
    folder = front.gateway.database.parent
    seen = [path for path in folder.rglob("*") if path.name != "config.toml"]
    names = " ".join(path.name for path in seen)
    for part in ("gwproxy.db", "gwproxy.db-wal", "gwproxy.db-shm", "journal", "backup"):
        assert part in names, names
    open_to_others = [path for path in seen if stat.S_IMODE(path.stat().st_mode) & 0o077]
    # What is in a closed folder is closed.
    assert not [path for path in open_to_others if path.parent == folder], open_to_others


def test_without_the_parser_in_c_it_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(upstream="http://127.0.0.1:9/v1", more=""))
    path.chmod(0o600)
    environ = {
        "PATH": os.environ["PATH"],
        "AIOHTTP_NO_EXTENSIONS": "1",
        "GWPROXY_ADMIN_KEY": ADMIN_KEY,
        "UPSTREAM_TOKEN": UPSTREAM_TOKEN,
    }
    command = [sys.executable, "-m", "gwproxy", "serve", "--config", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=50
    )
    assert done.returncode != 0
    assert "AIOHTTP_NO_EXTENSIONS" in done.stderr
    assert "Traceback" not in done.stderr


async def test_an_old_sqlite_is_told_of_at_the_start(front: Front) -> None:
    lines = [line for line in await front.gateway.lines() if "old SQLite" in line["event"]]
    assert len(lines) == HAS_WAL_RESET_BUG


# -- crowds ----------------------------------------------------------------------------------------

IDLE = 3_000


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_thousands_of_idle_connections_cost_little_and_are_closed(
    start_gateway: StartGateway,
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    front = await start_gateway(
        f"[limits]\nmax_connections = {IDLE + 10}\nkeepalive_timeout_s = 20\n"
    )
    loop = asyncio.get_running_loop()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    peers = []
    for _ in range(IDLE):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get("/health"))
        await reader.readuntil(b'{"status":"ok"}')
        peers.append((reader, writer))
    # Both ends of each are in this process.
    assert (resident() - before) / IDLE < 48 * 1024
    async with connect(front.port) as peer:
        started = loop.time()
        for _ in range(100):
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
        assert loop.time() - started < 3
    async with asyncio.timeout(60):
        for reader, writer in peers:
            assert await reader.read() == b""
            writer.close()
    async with connect(front.port) as peer:
        peer.send(get("/health"))
        assert (await peer.answer()).status == 200
