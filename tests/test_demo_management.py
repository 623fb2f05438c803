"""The demo's management API, over its wire: what the commands of the operator are tried on."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gwproxy.demo import DemoUpstream

TOKEN = "demo-token"


class Api:
    def __init__(self, demo: DemoUpstream, session: aiohttp.ClientSession) -> None:
        self.demo = demo
        self.session = session

    async def __call__(
        self, method: str, path: str, *, token: str | None = TOKEN, json: Any = None, **query: Any
    ) -> tuple[int, Any]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = f"{self.demo.api_url}{path}"
        async with self.session.request(
            method, url, headers=headers, json=json, params=query
        ) as answer:
            text = await answer.text()
            return answer.status, _json(text)

    async def gateways(self, method: str, path: str = "", **rest: Any) -> tuple[int, Any]:
        return await self(method, f"/accounts/demo/ai-gateway/gateways{path}", **rest)

    async def logs(self, filters: Any = (), **query: Any) -> list[dict[str, Any]]:
        status, body = await self.gateways(
            "GET", "/demo/logs", filters=json.dumps(list(filters)), **query
        )
        assert status == 200, body
        rows: list[dict[str, Any]] = body["result"]
        return rows

    async def chat(self, model: str, token: str = TOKEN, **headers: str) -> int:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello there."}]}
        headers["cf-aig-authorization"] = f"Bearer {token}"
        url = f"{self.demo.compat_url}/compat/chat/completions"
        async with self.session.post(url, json=body, headers=headers) as answer:
            await answer.read()
            return answer.status


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Api]:
    demo = DemoUpstream()
    await demo.start()
    async with aiohttp.ClientSession() as session:
        yield Api(demo, session)
    await demo.stop()


NEW = {
    "id": "second",
    "cache_invalidate_on_update": True,
    "cache_ttl": None,
    "collect_logs": True,
    "rate_limiting_interval": None,
    "rate_limiting_limit": None,
}


async def test_a_gateway_is_made_changed_and_deleted(api: Api) -> None:
    assert (await api.gateways("POST", json=NEW))[0] == 200
    status, body = await api.gateways("GET")
    assert status == 200
    assert [row["id"] for row in body["result"]] == ["demo", "second"]
    assert body["result_info"]["total_count"] == 2
    change = {**{name: value for name, value in NEW.items() if name != "id"}, "cache_ttl": 60}
    assert (await api.gateways("PUT", "/second", json=change))[1]["result"]["cache_ttl"] == 60
    assert (await api.gateways("DELETE", "/second"))[0] == 200
    status, body = await api.gateways("GET", "/second")
    assert (status, body["errors"][0]["code"]) == (404, 7002)


@pytest.mark.parametrize("name", [name for name in NEW if name != "id"])
async def test_what_is_required_of_a_gateway_is_named(api: Api, name: str) -> None:
    status, body = await api.gateways("POST", json={k: v for k, v in NEW.items() if k != name})
    assert status == 400
    assert name in body["errors"][0]["message"]
    assert not body["success"]


async def test_a_token_may_do_what_it_was_made_for(api: Api) -> None:
    api.demo.management.tokens = {
        "runs": frozenset({"run"}), "reads": frozenset({"read"}), "edits": frozenset({"edit"}),
    }  # fmt: skip
    assert await api.chat("mock/echo", "runs") == 200
    assert await api.chat("mock/echo", "reads") == 401
    assert (await api.gateways("GET", token="reads"))[0] == 200
    assert (await api.gateways("GET", token="runs"))[0] == 403
    assert (await api.gateways("POST", token="reads", json=NEW))[0] == 403
    assert (await api.gateways("POST", token="edits", json=NEW))[0] == 200
    status, body = await api.gateways("GET", token="nobody")
    assert (status, body["errors"][0]["code"]) == (401, 10000)
    assert (await api.gateways("GET", token=None))[1]["errors"][0]["code"] == 9106
    assert (await api("GET", "/user/tokens/verify", token="runs"))[1]["result"][
        "status"
    ] == "active"


async def test_who_has_no_key_stored_for_a_provider_has_no_credit_either(api: Api) -> None:
    _, body = await api.gateways("GET", "/demo/provider_configs", per_page=100)
    [openai] = [row for row in body["result"] if row["provider_slug"] == "openai"]
    assert "secret" not in openai
    assert (await api.gateways("DELETE", f"/demo/provider_configs/{openai['id']}"))[0] == 200
    assert await api.chat("openai/gpt-4o-mini") == 402
    key = {"provider_slug": "openai", "alias": "default", "secret": "sk-one"}
    status, body = await api.gateways("POST", "/demo/provider_configs", json=key)
    assert status == 200
    assert await api.chat("openai/gpt-4o-mini") == 200
    made = body["result"]["id"]
    change = {**key, "secret": "sk-two"}
    assert (await api.gateways("PUT", f"/demo/provider_configs/{made}", json=change))[0] == 200
    assert api.demo.management.secrets[made] == "sk-two"


async def test_an_open_gateway_lets_anybody_in(api: Api) -> None:
    assert await api.chat("mock/echo", "wrong") == 401
    api.demo.management.gateways["demo"]["authentication"] = False
    assert await api.chat("mock/echo", "wrong") == 200


async def test_what_was_served_is_in_the_log(api: Api) -> None:
    about = json.dumps({"request_id": "req_1", "attempt": 2})
    await api.chat("openai/gpt-4o-mini", **{"cf-aig-metadata": about})
    await api.chat("openai/gpt-4o-mini+status-503")
    await api.chat("mock/echo", "wrong")
    await api.chat("mock/echo", **{"cf-aig-collect-log": "false"})
    [served, *_] = await api.demo.recorded(4)
    failed, row = await api.logs()
    assert (row["id"], row["metadata"]) == (served["log_id"], {"request_id": "req_1", "attempt": 2})
    usage = served["usage"]
    assert (row["tokens_in"], row["tokens_out"]) == (
        usage["prompt_tokens"], usage["completion_tokens"],
    )  # fmt: skip
    usd = (usage["prompt_tokens"] * 15 + usage["completion_tokens"] * 60) / 10**8
    assert row["cost"] == pytest.approx(usd, rel=1e-12)
    assert (failed["status_code"], failed["success"], failed["cost"]) == (503, False, None)


async def test_the_callers_own_price_makes_the_cost(api: Api) -> None:
    cost = '{"per_token_in":0.001000000000,"per_token_out":0.000000000000}'
    await api.chat("mock/echo", **{"cf-aig-custom-cost": cost})
    [row] = await api.logs()
    assert row["custom_cost"]
    assert row["cost"] == pytest.approx(row["tokens_in"] / 1000)


async def test_a_hit_of_the_gateways_cache_is_free(api: Api) -> None:
    await api.chat("openai/gpt-4o-mini+cache-hit")
    [row] = await api.logs()
    assert (row["cached"], row["cost"], row["tokens_in"]) == (True, 0, 0)


async def test_pages_are_exact_and_filters_bite(api: Api) -> None:
    rows = [
        {
            "id": f"log_{n}", "created_at": f"2026-11-01T00:00:{n:02d}.000Z", "provider": "openai",
            "model": "m", "success": n % 2 == 0, "cached": False, "metadata": {"id": str(n)},
        }
        for n in range(60)
    ]  # fmt: skip
    api.demo.management.logs.plant(reversed(rows))
    seen = []
    for page in (1, 2, 3):
        more = await api.logs(page=page, per_page=25, order_by_direction="asc")
        seen += [row["id"] for row in more]
    assert seen == [row["id"] for row in rows]
    newest = await api.logs(per_page=2)
    assert [row["id"] for row in newest] == ["log_59", "log_58"]
    between = [
        {"key": "created_at", "operator": "gt", "value": ["2026-11-01T00:00:09.000Z"]},
        {"key": "created_at", "operator": "lt", "value": ["2026-11-01T00:00:13.000Z"]},
    ]
    assert [row["id"] for row in await api.logs(between)] == ["log_12", "log_11", "log_10"]
    about = [{"key": "metadata.value", "operator": "eq", "value": ["7"]}]
    assert [row["id"] for row in await api.logs(about)] == ["log_7"]
    status, body = await api.gateways("GET", "/demo/logs", filters='[{"key":"colour"}]')
    assert (status, body["errors"][0]["code"]) == (400, 7001)
    assert (await api.gateways("GET", "/demo/logs", per_page=51))[0] == 400


async def test_the_figures_of_a_log_come_late(api: Api) -> None:
    api.demo.management.logs.cost_delay_s = 0.1
    await api.chat("openai/gpt-4o-mini")
    [row] = await api.logs()
    assert (row["cost"], row["tokens_in"]) == (None, None)
    assert (await api.gateways("GET", f"/demo/logs/{row['id']}"))[0] == 404
    await asyncio.sleep(0.15)
    [row] = await api.logs()
    assert row["cost"] is not None
    assert (await api.gateways("GET", f"/demo/logs/{row['id']}"))[1]["result"] == row


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ("status-503", 503, "<html>"),
        ("status-429", 429, "<html>"),
        ("edge", 403, "error code: 1010"),
        ("code-10000", 401, "10000"),
        ("garbage", 200, "<html>"),
    ],
)
async def test_faults_come_when_they_were_asked_for(
    api: Api, fault: str, status: int, says: str
) -> None:
    api.demo.management.fault({"on": "logs", "fault": fault, "after": 1})
    assert await api.logs() == []
    found, body = await api.gateways("GET", "/demo/logs")
    assert found == status
    assert says in str(body)
    assert await api.logs() == []


async def test_a_reset_and_a_slow_page(api: Api) -> None:
    api.demo.management.fault(
        {"on": "logs", "fault": "reset", "count": 2}
    )  # the client tries twice
    with pytest.raises(aiohttp.ClientConnectionError):
        await api.logs()
    api.demo.management.fault({"on": "logs", "fault": "slow-1"})
    assert await api.logs() == []


async def test_the_control_api_does_the_same(api: Api) -> None:
    url = f"{api.demo.url}/_demo/management"
    row = {"id": "a", "created_at": "2026-11-01T00:00:00.000Z"}
    for method, path, body, status in [
        ("POST", "faults", {"on": "logs", "fault": "status-500"}, 204),
        ("POST", "faults", {"on": "colours", "fault": "status-500"}, 400),
        ("POST", "faults", {"fault": "thunder"}, 400),
        ("PUT", "tokens", {"other": ["read"]}, 204),
        ("PUT", "tokens", {"other": ["fly"]}, 400),
        ("POST", "logs", [row], 204),
        ("POST", "logs", [{}], 400),
        ("PUT", "logs", {"cost_delay_s": 1.5, "in_order": False}, 204),
        ("PUT", "logs", [], 400),
    ]:
        async with api.session.request(method, f"{url}/{path}", json=body) as answer:
            assert answer.status == status, (path, body)
    assert api.demo.management.tokens == {"other": frozenset({"read"})}
    assert api.demo.management.logs.rows == [row]
    assert api.demo.management.logs.cost_delay_s == 1.5
    assert (await api.gateways("GET", "/demo/logs", token="other"))[0] == 500
    assert (await api.gateways("GET", "/demo/logs", token="other"))[1]["result"] == [row]
