"""The shipped alert rules and dashboard: they name what there is, and Prometheus takes them."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient

from gwproxy.demo import DemoUpstream
from tests.conftest import Front
from tests.harness import ADMIN, ADMIN_KEY, Gateway, bearer, chat, make_key
from tests.raw import PATIENCE_S
from tests.sdk import config, demo_upstream
from tests.test_metrics import CONTRACT, families, used

MONITORING = Path(__file__).parent.parent / "monitoring"
ALERTS = (MONITORING / "alerts.yml").read_text()

# What Prometheus itself adds to each series, or makes of it.
ANYWHERE = {"job", "instance", "le"}


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} comes with Prometheus, which this machine does not have")
    return found


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def queries() -> Iterator[tuple[str, str]]:
    """Every expression of alerts and dashboard, with where it stands."""
    for name, text in re.findall(
        r"- alert: (\w+)\n\s+expr: (?:>\n)?(.*?)\n\s+(?:for|labels):", ALERTS, re.DOTALL
    ):
        yield name, " ".join(text.split())
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def metric_of(name: str) -> str:
    return name if name in CONTRACT else re.sub(r"_(bucket|sum|count)$", "", name)


@pytest.mark.parametrize(("place", "query"), list(queries()))
def test_a_query_names_metrics_and_labels_that_there_are(place: str, query: str) -> None:
    there = families(used())
    named = re.findall(r"\b((?:gwproxy|process)_\w+)(?:\{([^}]*)\})?", query)
    assert named or query.startswith("up{")
    for name, selector in named:
        metric = metric_of(name)
        assert metric in there, (place, name)
        selected = set(re.findall(r"(\w+)=", selector))
        assert selected <= {*CONTRACT[metric], *ANYWHERE}, (place, name)
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by ?\(([^)]*)\)", query))))
    known = set().union(*(CONTRACT[metric_of(name)] for name, _ in named))
    assert grouped <= known | ANYWHERE, place


def test_a_label_that_a_legend_or_an_alert_shows_is_in_its_query() -> None:
    for panel in panels():
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]) or (
                    "gwproxy_build_info" in target["expr"]
                ), panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {
            (at["x"] + across, at["y"] + down)
            for across in range(at["w"])
            for down in range(at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


# -- alerts ----------------------------------------------------------------------------------------


def test_prometheus_own_tool_accepts_the_rules() -> None:
    promtool = tool("promtool")
    checked = subprocess.run(
        [promtool, "check", "rules", str(MONITORING / "alerts.yml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_has_been_seen_to_fire_and_to_be_silent() -> None:
    promtool = tool("promtool")
    tests = (MONITORING / "alerts_test.yml").read_text()
    names = re.findall(r"- alert: (\w+)", ALERTS)
    assert len(names) == len(set(names)) >= 20
    assert set(re.findall(r'alertname="(\w+)"', tests)) == set(names)
    ran = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"],
        cwd=MONITORING,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_alert_says_what_it_means_and_what_to_do() -> None:
    for block in ALERTS.split("- alert: ")[1:]:
        for word in ("severity: page", "severity: ticket"):
            block = block.replace(word, "severity")
        assert "labels: {severity}" in block, block
        assert "summary: " in block, block
        assert "action: " in block, block


# -- a gateway that has seen everything ------------------------------------------------------------


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    upstream = demo_upstream()
    await upstream.start()
    yield upstream
    await upstream.stop()


async def test_prometheus_own_tool_accepts_what_a_gateway_says_after_traffic_of_all_kinds(
    tmp_path: Path, demo: DemoUpstream
) -> None:
    promtool = tool("promtool")
    gateway = Gateway(
        tmp_path,
        config(demo, "cloudflare-compat"),
        {"GWPROXY__BREAKER__FAILURE_THRESHOLD": "2", "GWPROXY__FAILURE__MODE": "open"},
    )
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    async with TestClient(gateway) as client:
        key = await make_key(client)

        async def ask(path: str, model: str, body: dict[str, Any], key: str = key) -> int:
            sent = {"model": model, **body}
            async with client.post(f"/v1/{path}", json=sent, headers=bearer(key)) as answer:
                await answer.read()
                return answer.status

        assert await ask("chat/completions", "mock/prose", said) == 200
        assert await ask("chat/completions", "mock/prose", {**said, "stream": True}) == 200
        assert await ask("embeddings", "openai/text-embedding-3-small", {"input": "Hello"}) == 200
        assert await ask("responses", "openai/gpt-4o-mini", {"input": "Hello"}) == 200
        assert await ask("messages", "anthropic/claude-3-haiku", said) == 200
        assert await ask("chat/completions", "mock/prose", said, key="gw_live_0") == 401
        assert await ask("chat/completions", "nobody/has-this", said) == 404
        broken = {**said, "stream": True}
        assert await ask("chat/completions", "mock/prose+close-after-2", broken) == 200
        for _ in range(2):
            assert await ask("chat/completions", "mock/prose+status-500", said) == 502
        assert await ask("chat/completions", "mock/prose", said) == 503  # its breaker is open
        gateway.database.rename(tmp_path / "away")
        await gateway.lines("database lost")
        assert await ask("messages", "anthropic/claude-3-haiku", said) == 200
        async with client.get("/metrics", headers=ADMIN) as answer:
            text = await answer.text()
    checked = await asyncio.create_subprocess_exec(
        *(promtool, "check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    wrong, _ = await checked.communicate(text.encode())
    assert (checked.returncode, wrong) == (0, b"")
    for metric in (
        "gwproxy_storage_state 1",
        'gwproxy_breaker_state{provider="mock"} 2',
        'gwproxy_settlements_total{outcome="truncated"} 1',
        *(f'gwproxy_requests_total{{route="{api}"' for api in ("chat", "embeddings")),
        *(f'gwproxy_requests_total{{route="{api}"' for api in ("responses", "messages")),
    ):
        assert metric in text


# -- the real one ----------------------------------------------------------------------------------


class Prometheus:
    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def get(self, path: str, **parameters: str) -> Any:
        async with self._session.get(f"{self._url}/api/v1/{path}", params=parameters) as answer:
            found = await answer.json()
            assert found["status"] == "success", (parameters, found)
            return found["data"]

    async def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        found = await self.get("query", query=query)
        return [(row["metric"], float(row["value"][1])) for row in found["result"]]

    async def until(self, query: str, value: float) -> None:
        async with asyncio.timeout(PATIENCE_S * 2):
            while True:
                if [number for _, number in await self.ask(query)] == [value]:
                    return
                await asyncio.sleep(0.1)  # until the next scrape


@asynccontextmanager
async def prometheus(folder: Path, scraped: str) -> AsyncIterator[Prometheus]:
    """Scrapes four times a second, with the shipped rules, as docs/OPERATIONS.md has it."""
    program = tool("prometheus")
    (folder / "admin-key").write_text(ADMIN_KEY)
    shutil.copy(MONITORING / "alerts.yml", folder)
    (folder / "prometheus.yml").write_text(
        f"""
global: {{scrape_interval: 250ms, evaluation_interval: 250ms}}
rule_files: [alerts.yml]
scrape_configs:
  - job_name: gwproxy
    authorization: {{credentials_file: admin-key}}
    static_configs: [{{targets: ["{scraped}"]}}]
"""
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(PATIENCE_S * 2):
                while True:
                    try:
                        async with session.get(f"http://127.0.0.1:{port}/-/ready") as answer:
                            if answer.status == 200:
                                break
                    except aiohttp.ClientError:
                        pass
                    await asyncio.sleep(0.1)
            yield Prometheus(f"http://127.0.0.1:{port}", session)
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_a_real_prometheus_scrapes_it_during_load(front: Front, tmp_path: Path) -> None:
    over = asyncio.Event()
    answered = 0

    async def keep_asking(stream: bool) -> None:
        nonlocal answered
        while not over.is_set():
            async with await front.chat(chat(stream)) as answer:
                assert answer.status == 200
                await answer.read()
            answered += 1

    async with prometheus(tmp_path, f"127.0.0.1:{front.port}") as server:
        async with asyncio.TaskGroup() as clients:
            for number in range(8):
                clients.create_task(keep_asking(stream=bool(number % 2)))
            await server.until('up{job="gwproxy"}', 1)
            for _, query in queries():
                query = query.replace("$instance", ".*").replace("$__rate_interval", "5s")
                await server.ask(query)
            over.set()
        # What Prometheus has in the end is what was done, to the last request.
        await server.until(
            'sum(gwproxy_requests_total{route="chat", status_class="2xx"})', answered
        )
        await server.until('gwproxy_settlements_total{outcome="completed"}', answered)
        assert answered > 50
        groups = (await server.get("rules"))["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == len(re.findall("- alert:", ALERTS))
        assert {rule["health"] for rule in rules} == {"ok"}
        firing = await server.ask('ALERTS{alertstate="firing"}')
        assert firing == []
        (target,) = (await server.get("targets"))["activeTargets"]
        assert target["lastError"] == ""
