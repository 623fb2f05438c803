"""OpenAI's own Node SDK against the running gateway: `tests/node/sdk.mjs` plays the scenarios once,
all of them, and each test here judges one of its lines.
"""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp.test_utils import TestClient

from gwproxy.demo import DemoUpstream
from tests.harness import ADMIN, UPSTREAM_TOKEN, Gateway, make_key
from tests.sdk import TOOLS, config, demo_upstream

NODE = shutil.which("node")
FOLDER = Path(__file__).parent / "node"
PATIENCE_S = 50.0

if NODE is None:
    pytest.skip("there is no node on this machine", allow_module_level=True)
if not (FOLDER / "node_modules" / "openai").is_dir():
    pytest.skip("the Node SDK is not installed: npm ci in tests/node", allow_module_level=True)

Line = dict[str, Any]


@pytest.fixture(scope="module")
def lines() -> dict[str, Line]:
    """What Node said, by scenario."""
    return uvloop.run(play())


async def play() -> dict[str, Line]:
    demo = demo_upstream()
    await demo.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(demo.stop)
        waiting = "idle_timeout_s = 1\nfirst_byte_timeout_s = 1\nanswer_timeout_s = 2"
        gateways = {
            name: await stack.enter_async_context(gateway(demo, text, token))
            for name, text, token in (
                ("compat", config(demo, "cloudflare-compat"), UPSTREAM_TOKEN),
                ("openai", config(demo, "openai"), UPSTREAM_TOKEN),
                ("impatient", config(demo, "cloudflare-compat", waiting), UPSTREAM_TOKEN),
                ("wrong_token", config(demo, "cloudflare-compat"), "a-token-that-was-revoked"),
            )
        }
        given = {
            "demo": demo.url,
            "token": UPSTREAM_TOKEN,
            "tools": TOOLS,
            "gateways": gateways,
        }
        node = await asyncio.create_subprocess_exec(
            str(NODE),
            "sdk.mjs",
            json.dumps(given),
            cwd=FOLDER,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                said, complaints = await node.communicate()
        finally:
            if node.returncode is None:
                node.kill()
                await node.wait()
    assert node.returncode == 0, complaints.decode()
    found = [json.loads(line) for line in said.splitlines()]
    return {line["scenario"]: line for line in found}


@asynccontextmanager
async def gateway(demo: DemoUpstream, text: str, token: str) -> AsyncIterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), text, {"UPSTREAM_TOKEN": token})
        async with TestClient(gateway) as client:
            suspended = {"user_id": "bob", "status": "suspended"}
            made = await client.post("/admin/users", json=suspended, headers=ADMIN)
            assert made.status == 201
            yield {
                "url": str(client.make_url("")).rstrip("/"),
                "key": await make_key(client),
                "suspended": await make_key(client, "bob"),
            }


@pytest.fixture
def line(request: pytest.FixtureRequest, lines: dict[str, Line]) -> Line:
    """The line of the scenario that the test is named after."""
    found = lines[request.function.__name__.removeprefix("test_")]
    assert "thrown" not in found, found["thrown"]
    return found


def test_every_scenario_is_judged(lines: dict[str, Line]) -> None:
    judged = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    parametrized = {*ERRORS, *DEATHS}
    assert set(lines) <= judged | parametrized


# What is said.


def test_chat(line: Line) -> None:
    assert line["answer"]["choices"] == line["straight"]["choices"]
    assert line["answer"]["usage"] == line["straight"]["usage"] == line["record"][0]["usage"]
    assert line["request_id"] == line["record"][0]["request_id"]


def test_chat_of_a_plain_server(line: Line) -> None:
    assert line["answer"]["choices"] == line["straight"]["choices"]


def test_stream(line: Line) -> None:
    heard = line["heard"]
    assert heard == line["straight"]
    assert heard["text"]
    assert not heard["text"].isascii()
    assert (heard["finish"], heard["usage"], heard["error"]) == (["stop"], [], None)
    # Asked for by the gateway, and kept.
    assert line["record"][0]["usage"]
    assert heard["empty"] == 0


def test_stream_of_a_plain_server(line: Line) -> None:
    assert line["heard"] == line["straight"]
    assert line["heard"]["finish"] == ["stop"]


def test_stream_with_usage(line: Line) -> None:
    assert line["usage"] == [line["record"][0]["usage"]]
    assert line["empty"] == 1


def test_stream_of_two(line: Line) -> None:
    assert len(set(line["texts"])) == 2
    assert line["finish"] == ["stop", "stop"]


def test_stream_in_crlf_and_pieces(line: Line) -> None:
    assert line["heard"]["text"] == line["said"]
    assert line["heard"]["error"] is None


def test_tools(line: Line) -> None:
    arguments = json.loads(line["call"]["function"]["arguments"])
    assert set(arguments) == {"city", "days", "wind"}
    assert json.loads(line["heard"]["tool"]["arguments"]) == arguments
    assert line["heard"]["tool"]["name"] == "weather"
    assert line["heard"]["finish"] == ["tool_calls"]


def test_geminis_signature_both_ways(line: Line) -> None:
    signature = line["call"]["extra_content"]["google"]["thought_signature"]
    assert signature
    assert line["heard"]["tool"]["extra_content"] == line["call"]["extra_content"]
    assert line["sent"] == line["messages"]
    assert line["sent"][1]["tool_calls"][0]["extra_content"] == line["call"]["extra_content"]


def test_helper_of_the_sdk(line: Line) -> None:
    assert line["text"] == line["pieces"] != ""


def test_twenty_at_once(line: Line) -> None:
    assert line["heard"] == line["said"]


# Around the answer.


def test_raw_response(line: Line) -> None:
    headers = line["headers"]
    (served,) = line["record"]
    assert headers["x-request-id"] == line["request_id"] == line["id"] == served["request_id"]
    assert headers["x-gateway-provider"] == "openai"
    assert headers["x-gateway-mode"] == "normal"
    assert headers["server-timing"].startswith("gw;dur=")
    assert UPSTREAM_TOKEN not in str(headers)


def test_models(line: Line) -> None:
    assert {"auto", "openai/gpt-4o-mini"} <= set(line["ids"])
    assert line["shown"]["id"] == "openai/gpt-4o-mini"
    assert line["shown"]["owned_by"] == "openai"
    assert (line["error"]["class"], line["error"]["code"]) == ("NotFoundError", "model_not_found")


def test_fallback_behind_an_alias(line: Line) -> None:
    assert line["provider"] == "openai"
    assert line["text"]
    assert [row["status"] for row in line["record"]] == [503, 200]


def test_guardrails(line: Line) -> None:
    heard = line["heard"]
    assert heard["text"] == line["text"]
    assert (heard["finish"], heard["error"]) == (["stop"], None)
    assert heard["usage"] == [line["record"][0]["usage"]]


# Errors: the class, the status, the code, and how many requests the upstream saw.

ERRORS: dict[str, tuple[str, int | None, str | None, int]] = {
    "wrong_key": ("AuthenticationError", 401, "invalid_api_key", 0),
    "suspended": ("PermissionDeniedError", 403, "account_suspended", 0),
    "unknown_model": ("NotFoundError", 404, "model_not_found", 0),
    "model_without_a_price": ("BadRequestError", 400, "model_not_priced", 0),
    "bad_field": ("BadRequestError", 400, "invalid_value", 0),
    "throttled": ("RateLimitError", 429, "rate_limit_exceeded", 1),
    "throttled_with_retries": ("RateLimitError", 429, "rate_limit_exceeded", 3),
    "failing_with_retries": ("InternalServerError", 502, "all_providers_failed", 3),
    "refused_with_retries": ("BadRequestError", 400, None, 1),
    "gateways_own_failure": ("InternalServerError", 502, "all_providers_failed", 1),
    "wrong_upstream_token": ("InternalServerError", 502, "upstream_misconfigured", 1),
    "blocked_by_policy": ("APIError", 424, "content_blocked", 1),
    "error_as_first_event": ("InternalServerError", 502, "all_providers_failed", 1),
    "gateway_waits_no_longer": ("InternalServerError", 502, "all_providers_failed", 1),
    "abort_a_call": ("APIUserAbortError", None, None, 1),
    "sdk_waits_no_longer": ("APIConnectionTimeoutError", None, None, 1),
}


@pytest.mark.parametrize("scenario", ERRORS)
def test_an_error_is_the_right_one(lines: dict[str, Line], scenario: str) -> None:
    line = lines[scenario]
    assert "thrown" not in line, line["thrown"]
    error = line["error"]
    seen = (error["class"], error["status"], error["code"], len(line["record"]))
    assert seen == ERRORS[scenario]
    if error["status"] is not None:
        assert error["request_id"].startswith("req_")
    else:
        assert line["record"][0]["end"] == "client_left"


def test_healed_by_a_retry(line: Line) -> None:
    assert line["text"]
    assert [row["status"] for row in line["record"]] == [503, 200]


# A stream that dies: what was heard before.

DEATHS = {
    "stream_reset": 5,
    "stream_closed": 5,
    "stream_cut_cleanly": 5,
    "stream_reset_inside_an_event": 2,
    "stream_cut_inside_an_event": 2,
    "stream_that_falls_silent": 4,
}


@pytest.mark.parametrize("scenario", DEATHS)
def test_a_stream_that_dies_is_an_error(lines: dict[str, Line], scenario: str) -> None:
    line = lines[scenario]
    assert "thrown" not in line, line["thrown"]
    assert (line["error"]["class"], line["error"]["code"]) == ("APIError", "stream_interrupted")
    assert line["error"]["type"] == "upstream_error"
    assert (line["chunks"], line["finish"]) == (DEATHS[scenario], [])
    assert line["text"]
    assert len(line["record"]) == 1
    if "inside" in scenario:
        assert line["text"] == "One two "


def test_error_in_the_middle(line: Line) -> None:
    assert line["error"]["class"] == "APIError"
    assert "The server had an error" in line["error"]["message"]
    assert line["chunks"] == 4


# A client that goes.


def test_break_out_of_a_stream(line: Line) -> None:
    assert line["heard"]["chunks"] == 5
    assert line["record"][0]["end"] == "client_left"
    assert line["again"]["finish"] == ["stop"]


def test_abort_a_stream(line: Line) -> None:
    assert line["chunks"] >= 5
    assert line["record"][0]["end"] == "client_left"
