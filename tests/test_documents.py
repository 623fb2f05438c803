"""The documents: what they tell people to type works, and what they cite is there."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient

from gwproxy.cli import main
from gwproxy.config import load
from gwproxy.core.routing import CATALOGUE
from gwproxy.demo import DemoUpstream
from gwproxy.web import Router
from tests.harness import ADMIN_KEY, UPSTREAM_TOKEN, Gateway, Upstream
from tests.sdk import config, demo_upstream
from tests.supervised import SERVICE, Unit, environment_of_the_unit

ROOT = Path(__file__).parent.parent
DOCS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def blocks(document: Path, kind: str = "sh") -> list[str]:
    """What stands between ```sh and ```, without the indentation of a list around it."""
    found = re.findall(rf"^( *)```{kind}\n(.*?)^ *```", document.read_text(), re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(text: str) -> Iterator[str]:
    """Each command on one line."""
    joined = re.sub(r"\\\n\s*", "", text)
    yield from (line for line in joined.splitlines() if line.strip())


async def run(script: str, folder: Path, **environ: str) -> str:
    """What bash made of it; any command that fails fails it."""
    said = folder.parent / "said"
    with said.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", script),
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **environ},
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(150):
            await process.wait()
    except TimeoutError:
        pytest.fail(f"not done after 150 s: {said.read_text()}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has left running
    assert process.returncode == 0, said.read_text()
    return said.read_text()


# -- commands --------------------------------------------------------------------------------------

# A refusal is a failure, and each command is shown, so that the one that failed is the last one.
CURL = """
set -euo pipefail
curl() { echo "curl $*" >&2; command curl -sS --fail-with-body "$@"; echo; }
"""


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    upstream = demo_upstream()
    await upstream.start()
    yield upstream
    await upstream.stop()


async def test_every_curl_of_the_api_works_and_no_route_is_without_one(
    tmp_path: Path, demo: DemoUpstream
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    gateway = Gateway(tmp_path, config(demo, "cloudflare-compat"))
    async with TestClient(gateway) as client:
        script = CURL + "".join(blocks(ROOT / "docs" / "API.md"))
        script = script.replace("/tmp/gwproxy-", f"{tmp_path}/")
        url = str(client.make_url("")).rstrip("/")
        out = await run(script, tmp_path, GW=url, ADMIN=ADMIN_KEY)
        app = gateway.app
        assert app is not None
        routes = app._fronts[0].router
    assert "data: [DONE]" in out
    assert '"status":"ok"' in out
    assert asked(routes) == {(route.method, route.path) for route in routes.routes}


def asked(routes: Router) -> set[tuple[str, str]]:
    """The routes that the commands of API.md ask for."""
    found = set()
    for line in commands("".join(blocks(ROOT / "docs" / "API.md"))):
        for path in re.findall(r"\$GW(/[^\s\"]*)", line):
            given = re.search(r"-X (\w+)", line)
            sends = " -d " in line or " --data-binary " in line
            method = given[1] if given else "POST" if sends else "GET"
            route, _ = routes.find(method, path)
            found.add((route.method, route.path))
    return found


# -- what they cite --------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        if heading:
            assert heading in {anchor(line) for line in file.read_text().splitlines()}, target


def anchor(line: str) -> str:
    """A heading's name in a link, as GitHub makes it."""
    words = re.sub(r"[^\w\- ]", "", line.lstrip("# ").strip().lower())
    return words.replace(" ", "-")


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_a_test_that_is_cited_is_there(document: Path) -> None:
    tests = ROOT / "tests"
    for file, name in re.findall(r"`(?:tests/)?(test_\w+)\.py(?:::(\w+))?`", document.read_text()):
        text = (tests / f"{file}.py").read_text()
        assert not name or re.search(rf"^(async )?def {name}\(", text, re.M), (file, name)


# -- an installed service --------------------------------------------------------------------------


def test_what_the_installation_changes_is_a_configuration_that_the_unit_starts_with(
    tmp_path: Path,
) -> None:
    """The secrets' files are root's: the service reads its credentials, and never looks there."""
    text = (ROOT / "config.toml").read_text()
    (changed,) = blocks(ROOT / "docs" / "OPERATIONS.md", "toml installed")
    for line in changed.splitlines():
        key, sign, _ = line.partition(" = ")
        if sign:
            text, found = re.subn(rf"^{key} = .*$", line, text, count=1, flags=re.M)
            assert found == 1, key
    (tmp_path / "config.toml").write_text(text)
    for name in ("cloudflare-token", "admin-key"):
        (tmp_path / name).write_text(ADMIN_KEY)
    environ = {**environment_of_the_unit(), "CREDENTIALS_DIRECTORY": str(tmp_path)}
    found = load(tmp_path / "config.toml", environ, catalogue=CATALOGUE)
    assert str(found.storage.journal) == "/var/lib/gwproxy/journal"
    assert Unit(SERVICE).all("Service", "StateDirectory") == ["gwproxy"]
    assert found.upstream.token is not None
    assert found.upstream.token.reveal() == ADMIN_KEY


# -- without gwproxy -------------------------------------------------------------------------------


async def test_without_gwproxy_an_sdk_sends_token_and_key_as_the_page_says(
    tmp_path: Path, upstream: Upstream
) -> None:
    """The key goes to the provider, so that a made-up one would be refused there."""
    [variables] = blocks(ROOT / "docs" / "ROLLBACK.md", "sh direct")
    asks = """
import anthropic, openai
from openai import Omit, OpenAI
say = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
OpenAI().chat.completions.create(**say)
OpenAI().chat.completions.create(**say, extra_headers={"Authorization": Omit()})
anthropic.Anthropic().with_options(max_retries=0).messages.with_raw_response.create(
    **say, max_tokens=1)
"""
    script = f"{variables}\n{sys.executable} -W ignore - <<'END'\n{asks}\nEND"
    base = upstream.url.removesuffix("/")
    await run(
        script.replace("TOKEN", UPSTREAM_TOKEN),
        tmp_path,
        OPENAI_BASE_URL=f"{base}/compat",
        OPENAI_API_KEY="a-provider-key",
        ANTHROPIC_BASE_URL=f"{base}/anthropic",
        ANTHROPIC_API_KEY="a-provider-key",
    )
    sent = upstream.received
    assert [one.header("cf-aig-authorization") for one in sent] == [f"Bearer {UPSTREAM_TOKEN}"] * 3
    keys = [one.header("authorization") or one.header("x-api-key") for one in sent]
    assert ["a-provider-key" in (key or "") for key in keys] == [True, False, True]
    assert b"/anthropic/v1/messages" in sent[2].head.splitlines()[0]


# -- the command line ------------------------------------------------------------------------------

# Commands of the README that other runs have: `make run` never ends, and what it starts has
# tests of its own; CI makes the environment from the locked files as these lines do.
ELSEWHERE = ("make run", "python3 -m venv", "pip install --require-hashes")


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_every_command_of_the_readme_works(tmp_path: Path, demo: DemoUpstream) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    shutil.copy(ROOT / "config.toml", tmp_path)
    port = free_port()
    out = await run(
        readme(port),
        tmp_path,
        **programs(tmp_path / "bin"),
        CLOUDFLARE_ACCOUNT_ID=demo.account,
        CLOUDFLARE_GATEWAY_ID=demo.gateway,
        CLOUDFLARE_API_TOKEN=UPSTREAM_TOKEN,
        GWPROXY_ADMIN_KEY=ADMIN_KEY,
        GWPROXY__UPSTREAM__BASE_URL=demo.compat_url,
        GWPROXY__UPSTREAM__API_URL=demo.api_url,
        GWPROXY__SERVER__LISTEN=f"127.0.0.1:{port}",
        GWPROXY__STORAGE__JOURNAL_SEGMENT_BYTES="1048576",
        PRICES=str(ROOT / "gwproxy" / "data" / "prices.json"),
    )
    assert "gwproxy ready on" in out
    assert "data: [DONE]" in out
    assert "ok" in out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def programs(folder: Path) -> dict[str, str]:
    """An environment in which `gwproxy` is this tree's, and `python3` has what it needs."""
    folder.mkdir()
    for name, words in (("gwproxy", "-m gwproxy"), ("python3", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def readme(port: int) -> str:
    """Its commands as one script, on another port: first who makes the key, then who uses it."""
    texts = blocks(ROOT / "README.md")
    texts.sort(key=lambda text: "gw_live_..." in text or "$KEY" in text or "ledger" in text)
    script = "\n".join(
        line for line in "".join(texts).splitlines() if not line.startswith(ELSEWHERE)
    )
    for old, new in (
        ("gwproxy keys create --user alice", "KEY=$(gwproxy keys create --user alice)"),
        ("gwproxy serve", SERVE),
        ("gw_live_...", "$KEY"),
        ("127.0.0.1:8080", f"127.0.0.1:{port}"),
        ("--prices FILE", '--prices "$PRICES"'),
    ):
        assert old in script, old
        script = script.replace(old, new)
    return CURL + script


SERVE = """{
  gwproxy serve > ready 2> log & trap "kill $!" EXIT
  until grep ready ready; do sleep 0.05; kill -0 $! || { cat log; exit 1; }; done
}"""


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_each_promise_can_be_seen_as_the_page_says(tmp_path: Path) -> None:
    for name in ("curl", "strace", "openssl"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    text = (ROOT / "docs" / "GUARANTEES.md").read_text()
    assert set(re.findall(r"\| \(([A-Z])\)", text)) <= set(re.findall(r"\*\*\(([A-Z])\)", text))
    script = "\n".join(blocks(ROOT / "docs" / "GUARANTEES.md", "sh see"))
    for address in ("127.0.0.1:8080", "127.0.0.1:9000"):
        assert address in script
        script = script.replace(address, f"127.0.0.1:{free_port()}")
    folder = tmp_path / "empty"
    folder.mkdir()
    found = programs(tmp_path / "bin")
    out = await run(f"set -euxo pipefail\n{script}\necho all of it", folder, **found)
    assert "all of it" in out


def named() -> list[str]:
    """Every `gwproxy ...` that the documents tell people to type, up to its first argument."""
    found = set()
    for document in DOCS:
        text = document.read_text()
        code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"```sh.*?\n(.*?)```", text, re.S)]
        for words in re.findall(
            r"^ *(?:sudo )?gwproxy ((?:[a-z][a-z-]* ?)+)", "\n".join(code), re.M
        ):
            found.add(words.strip())
    return sorted(found)


@pytest.mark.parametrize("words", named())
def test_every_command_that_is_named_is_there(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--help"])
    assert ended.value.code == 0, capsys.readouterr().err
