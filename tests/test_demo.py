"""The demo upstream over real sockets: each provider's manners, each fault, the scripts and the
record. What it reports must be what it sent, for everything else is judged by it."""

import asyncio
import gzip
import json
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from gwproxy import assets
from gwproxy.core.tokens import Tokenizer
from gwproxy.demo import DemoUpstream
from gwproxy.demo.faults import MODIFIERS, UnknownFault, split_model

TOKEN = "right-token"
SAMPLES = {
    path.stem: path.read_bytes()
    for path in sorted((Path(__file__).parent / "data" / "sse").glob("*.sse"))
}
PROVIDERS = {
    "openai": "gpt-4o-mini",
    "anthropic": "claude-sonnet-4-5",
    "google-ai-studio": "gemini-2.5-flash",
    "workers-ai": "@cf/meta/llama",
    "groq": "llama-3.3",
    "grok": "grok-4",
    "mistral": "mistral-small",
    "deepseek": "deepseek-reasoner",
    "custom-hf": "meta-llama/Llama-3.3:novita",
    "custom-openrouter": "any/model",
    "mock": "prose",
}
NAMES = [f"{slug}/{model}" for slug, model in PROVIDERS.items()]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]


@dataclass
class Got:
    """An answer as a client saw it. `broken` is how its connection ended, if it did."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    broken: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def blocks(self) -> list[bytes]:
        return [block for block in self.body.replace(b"\r\n", b"\n").split(b"\n\n") if block]

    @property
    def events(self) -> list[dict[str, Any]]:
        datas = [block[6:] for block in self.blocks if block.startswith(b"data: ")]
        return [json.loads(data) for data in datas if data != b"[DONE]"]

    @property
    def done(self) -> bool:
        return b"data: [DONE]" in self.body

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or ""
            for event in self.events
            for choice in event.get("choices", ())
        )


class Client:
    def __init__(self, demo: DemoUpstream, session: aiohttp.ClientSession) -> None:
        self.demo = demo
        self.session = session

    async def chat(
        self,
        model: str,
        said: str = "Why is the sky blue?",
        *,
        plain: bool = False,
        token: str = TOKEN,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> Got:
        url = self.demo.url + "/v1" if plain else self.demo.compat_url + "/compat"
        name = "authorization" if plain else "cf-aig-authorization"
        body = {"model": model, "messages": [{"role": "user", "content": said}], **body}
        return await self.post(
            url + "/chat/completions", {name: f"Bearer {token}", **(headers or {})}, body
        )

    async def post(self, url: str, headers: Mapping[str, str], body: Any) -> Got:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        got = Got(0, {}, b"")
        try:
            async with self.session.post(
                url, data=data, headers=headers, allow_redirects=False
            ) as response:
                got.status, got.headers = response.status, response.headers
                async for part in response.content.iter_any():
                    got.body += part
        except aiohttp.ClientError as broken:
            got.broken = type(broken).__name__
        return got

    async def script(self, **wish: Any) -> int:
        async with self.session.post(self.demo.url + "/_demo/script", json=wish) as response:
            return response.status


@pytest.fixture
async def demo(caplog: pytest.LogCaptureFixture) -> AsyncIterator[DemoUpstream]:
    upstream = DemoUpstream(token=TOKEN)
    await upstream.start()
    yield upstream
    await upstream.stop()
    # A fault is never an accident: whatever the demo does, it does on purpose.
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.fixture
async def client(demo: DemoUpstream) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield Client(demo, session)


def output(usage: Mapping[str, Any]) -> int:
    """What a provider bills: some leave reasoning out of completion_tokens."""
    return max(usage["completion_tokens"], usage["total_tokens"] - usage["prompt_tokens"])


def usages(got: Got) -> list[Any]:
    return [event["usage"] for event in got.events if "usage" in event]


# Who may ask.


@pytest.mark.parametrize("token", ["wrong", ""])
async def test_a_wrong_token_meets_the_gateways_envelope(client: Client, token: str) -> None:
    got = await client.chat("mock/echo", token=token)
    assert got.status == 401
    assert got.json["error"] == [{"code": 2009, "message": "Unauthorized"}]
    assert (got.json["success"], got.json["internalCode"]) == (False, 2009)
    assert "cf-ray" in got.headers


async def test_the_token_in_another_header_does_not_count(client: Client) -> None:
    url = client.demo.compat_url + "/compat/chat/completions"
    got = await client.post(url, {"authorization": f"Bearer {TOKEN}"}, {"model": "mock/echo"})
    assert got.status == 401


@pytest.mark.parametrize(
    ("model", "code"),
    [("google/gemini-2.5-flash", 2008), ("@cf/meta/llama", 2008), ("gpt-4o", 2019), ("", 2019)],
)
async def test_a_model_that_names_no_provider_is_refused(
    client: Client, model: str, code: int
) -> None:
    got = await client.chat(model)
    assert (got.status, got.json["error"][0]["code"]) == (400, code)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 1, "messages": []}', b'{"model":"a/b"}'])
async def test_a_body_that_is_no_chat_is_a_bad_format(client: Client, body: bytes) -> None:
    url = client.demo.compat_url + "/compat/chat/completions"
    got = await client.post(url, {"cf-aig-authorization": f"Bearer {TOKEN}"}, body)
    assert (got.status, got.json["error"][0]["code"]) == (400, 2019)
    plain = await client.post(
        client.demo.url + "/v1/chat/completions", {"authorization": f"Bearer {TOKEN}"}, body
    )
    assert (plain.status, plain.json["error"]["type"]) == (400, "invalid_request_error")


async def test_an_unknown_gateway_is_not_configured(client: Client) -> None:
    url = client.demo.url + "/v1/demo/elsewhere/compat/chat/completions"
    got = await client.post(url, {"cf-aig-authorization": f"Bearer {TOKEN}"}, {})
    assert (got.status, got.json["error"][0]["code"]) == (400, 2001)


async def test_the_plain_flavour_refuses_as_openai_does(client: Client) -> None:
    got = await client.chat("gpt-4o", plain=True, token="wrong")
    assert got.status == 401
    assert got.json["error"]["code"] == "invalid_api_key"


async def test_a_stray_authorization_header_goes_to_the_provider(client: Client) -> None:
    got = await client.chat("openai/gpt-4o", headers={"authorization": "Bearer gw_live_x"})
    assert (got.status, got.json["error"]["code"]) == (401, "invalid_api_key")


async def test_a_provider_key_that_it_knows_is_welcome() -> None:
    demo = DemoUpstream(token=TOKEN, provider_keys=frozenset({"sk-known"}))
    await demo.start()
    async with aiohttp.ClientSession() as session:
        got = await Client(demo, session).chat(
            "openai/gpt-4o", headers={"authorization": "Bearer sk-known"}
        )
    await demo.stop()
    assert got.status == 200


async def test_other_paths_and_methods_are_refused(client: Client) -> None:
    for path in ("/", "/v1/nothing", "/v2/chat/completions"):
        assert (await client.post(client.demo.url + path, {}, {})).status == 404
    async with client.session.get(client.demo.url + "/v1/chat/completions") as response:
        assert response.status == 405


async def test_models_are_listed_for_who_may_ask(client: Client) -> None:
    for url, name in (
        (client.demo.compat_url + "/compat/models", "cf-aig-authorization"),
        (client.demo.url + "/v1/models", "authorization"),
    ):
        async with client.session.get(url) as response:
            assert response.status == 401
        async with client.session.get(url, headers={name: f"Bearer {TOKEN}"}) as response:
            listed = await response.json()
        assert "openai/gpt-4o-mini" in [model["id"] for model in listed["data"]]


# What it says.


async def test_the_same_request_gets_the_same_answer(client: Client) -> None:
    whole = await client.chat("openai/gpt-4o")
    streamed = await client.chat("openai/gpt-4o", stream=True)
    other = await client.chat("openai/gpt-4o", "And the sea?")
    text = whole.json["choices"][0]["message"]["content"]
    assert text == streamed.text
    assert text != other.json["choices"][0]["message"]["content"]
    assert not text.isascii()


async def test_an_echo_gives_every_character_back(client: Client) -> None:
    said = "Grüße, 世界!\n\n  Zwei  Leerzeichen 😀👩‍👩‍👧 \t_und_ \u2028 Ende "
    assert (await client.chat("mock/echo", said, stream=True)).text == said
    parts = [{"type": "text", "text": said}, {"type": "image_url", "image_url": {"url": "data:"}}]
    messages = [{"role": "user", "content": parts}]
    got = await client.chat("mock/echo", messages=messages)
    assert got.json["choices"][0]["message"]["content"] == said


async def test_its_tokens_are_openais_tokens(client: Client) -> None:
    tokenizer = Tokenizer(assets.ranks())
    for number in range(30):
        got = await client.chat("openai/gpt-4o+len-200", f"Question {number}")
        text = got.json["choices"][0]["message"]["content"]
        assert tokenizer.count(text) == got.json["usage"]["completion_tokens"] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_is_honoured(client: Client, stream: bool, limit: str) -> None:
    got = await client.chat("mock/prose", stream=stream, **{limit: 5})
    choice = got.events[-1]["choices"][0] if stream else got.json["choices"][0]
    assert choice["finish_reason"] == "length"
    (line,) = await client.demo.recorded(1)
    assert line["tokens"]["output"] == 5
    unlimited = await client.chat("mock/prose+ignore-max", **{limit: 5})
    assert unlimited.json["usage"]["completion_tokens"] > 5


async def test_reasoning_uses_up_the_limit(client: Client) -> None:
    got = await client.chat("openai/gpt-4o+reasoning-4", max_completion_tokens=5)
    usage = got.json["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_n_answers_are_n_choices(client: Client, stream: bool) -> None:
    got = await client.chat(
        "openai/gpt-4o", stream=stream, n=3, stream_options={"include_usage": True}
    )
    if stream:
        indexes = {choice["index"] for event in got.events for choice in event["choices"]}
        finished = [
            choice["finish_reason"]
            for event in got.events
            for choice in event["choices"]
            if choice["finish_reason"]
        ]
        assert finished == ["stop"] * 3
        usage = got.events[-1]["usage"]
    else:
        indexes = {choice["index"] for choice in got.json["choices"]}
        usage = got.json["usage"]
    assert indexes == {0, 1, 2}
    (line,) = await client.demo.recorded(1)
    assert output(usage) == line["tokens"]["output"] > 3 * 20


@pytest.mark.parametrize("name", NAMES)
async def test_a_tool_call_streams_in_pieces_that_make_json(client: Client, name: str) -> None:
    got = await client.chat(name, stream=True, tools=TOOLS, tool_choice="required")
    calls = [
        call
        for event in got.events
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]
    assert calls[0]["function"]["name"] == "weather"
    arguments = json.loads("".join(call["function"]["arguments"] for call in calls))
    assert set(arguments) == {"city", "days"}
    finish = [c["finish_reason"] for e in got.events for c in e["choices"] if c["finish_reason"]]
    odd = name.startswith(("google", "workers"))
    assert finish == ["stop" if odd else "tool_calls"]
    if name.startswith("google"):
        assert len(calls) == 1
        assert calls[0]["extra_content"]["google"]["thought_signature"]
    else:
        assert len(calls) > 3
    whole = await client.chat(name, tools=TOOLS, tool_choice="required")
    message = whole.json["choices"][0]["message"]
    assert message["content"] is None
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == arguments


async def test_a_tool_is_called_when_the_model_or_the_choice_says_so(client: Client) -> None:
    for model, choice, called in (
        ("mock/prose", None, False),
        ("mock/prose", "none", False),
        ("mock/tool", None, True),
        ("mock/tool", "none", False),
        ("mock/prose", {"type": "function", "function": {"name": "weather"}}, True),
    ):
        got = await client.chat(model, tools=TOOLS, tool_choice=choice)
        assert ("tool_calls" in got.json["choices"][0]["message"]) is called


# How each provider says it.


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", NAMES)
async def test_what_a_provider_reports_is_what_the_record_says(
    client: Client, name: str, asked: bool
) -> None:
    got = await client.chat(name, stream=True, stream_options={"include_usage": asked})
    assert got.done
    (line,) = await client.demo.recorded(1)
    reported = [usage for usage in usages(got) if usage]
    assert line["usage"] == (reported[-1] if reported else None)
    truth = line["tokens"]
    if reported:
        assert output(reported[-1]) == truth["output"]
        assert reported[-1]["prompt_tokens"] == truth["input"]
    always = not name.startswith(("openai", "grok", "custom-hf", "mock"))
    assert bool(reported) == (asked or always)
    assert line["events_sent"] == len(got.events)
    assert (line["completed"], line["end"]) == (True, "complete")
    assert truth["output"] > truth["reasoning"]
    slug, _, model = name.partition("/")
    assert (line["provider"], line["model"], line["requested"]) == (slug, model, name)

    whole = await client.chat(name)
    line = (await client.demo.recorded(2))[1]
    assert line["usage"] == whole.json["usage"]
    assert output(line["usage"]) == line["tokens"]["output"] == truth["output"]
    assert line["events_sent"] == 0
    for headers in (got.headers, whole.headers):
        assert headers["cf-aig-log-id"]
        assert headers["cf-aig-cache-status"] == "MISS"
        assert headers["cf-aig-request-id"]
        assert headers["cf-ray"]


async def test_openai_nulls_usage_until_the_last_chunk_and_pads(client: Client) -> None:
    got = await client.chat("openai/gpt-4o", stream=True, stream_options={"include_usage": True})
    *others, last = usages(got)
    assert others
    assert set(others) == {None}
    assert got.events[-1]["choices"] == []
    assert last["completion_tokens_details"]["reasoning_tokens"] == 0
    assert got.events[0]["choices"][0]["delta"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }
    assert len({len(event["obfuscation"]) for event in got.events}) > 2
    assert got.headers["x-ratelimit-reset-tokens"] == "30ms"
    assert got.headers["openai-processing-ms"]
    bare = await client.chat("openai/gpt-4o", stream=True)
    assert usages(bare) == []
    slim = await client.chat(
        "openai/gpt-4o", stream=True, stream_options={"include_obfuscation": False}
    )
    assert "obfuscation" not in slim.events[1]


async def test_a_reasoning_model_of_openai_refuses_max_tokens(client: Client) -> None:
    got = await client.chat("openai/o3", max_tokens=5)
    assert (got.status, got.json["error"]["param"]) == (400, "max_tokens")
    got = await client.chat("openai/o3", max_completion_tokens=30)
    assert got.json["usage"]["completion_tokens_details"]["reasoning_tokens"] == 16


async def test_anthropic_reports_on_the_last_chunk_with_choices(client: Client) -> None:
    got = await client.chat("anthropic/claude", stream=True)
    assert [index for index, event in enumerate(got.events) if "usage" in event] == [
        len(got.events) - 1
    ]
    assert got.events[-1]["choices"][0]["finish_reason"] == "stop"
    assert set(got.events[-1]["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert (await client.chat("anthropic/claude", n=2)).status == 400


async def test_gemini_reports_more_and_more_and_hides_its_thinking(client: Client) -> None:
    got = await client.chat("google-ai-studio/gemini-2.5-flash", stream=True)
    reported = usages(got)
    assert len(reported) == len(got.events)
    completions = [usage["completion_tokens"] for usage in reported]
    assert completions == [*range(1, len(reported)), len(reported) - 1]
    assert {u["total_tokens"] - u["prompt_tokens"] - u["completion_tokens"] for u in reported} == {
        41
    }
    assert {event["choices"][0]["delta"]["role"] for event in got.events} == {"assistant"}


async def test_groq_reports_twice_and_once_more_beside(client: Client) -> None:
    got = await client.chat("groq/llama", stream=True, stream_options={"include_usage": True})
    finish, last = got.events[-2:]
    assert finish["usage"] == finish["x_groq"]["usage"] == last["usage"]
    assert last["choices"] == []


async def test_workers_ai_ends_lines_with_crlf_and_counts_neurons(client: Client) -> None:
    got = await client.chat("workers-ai/@cf/meta/llama", stream=True)
    assert got.body.count(b"\n") == got.body.count(b"\r\n") == 2 * (len(got.events) + 1)
    assert got.events[-1]["usage"]["neurons"] > 0


async def test_grok_leaves_reasoning_out_of_completion_tokens(client: Client) -> None:
    usage = (await client.chat("grok/grok-4")).json["usage"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert reasoning == 32
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] + reasoning


async def test_deepseek_shows_its_reasoning_and_its_cache_hits(client: Client) -> None:
    got = await client.chat("deepseek/deepseek-reasoner", stream=True)
    thoughts = [
        event["choices"][0]["delta"]["reasoning_content"]
        for event in got.events
        if "reasoning_content" in event["choices"][0]["delta"]
    ]
    usage = got.events[-1]["usage"]
    assert len(thoughts) == usage["completion_tokens_details"]["reasoning_tokens"] == 12
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert hit > 0
    assert hit + miss == usage["prompt_tokens"]
    (line,) = await client.demo.recorded(1)
    assert line["tokens"]["cached"] == hit


async def test_openrouter_behind_a_custom_provider_comments_first(client: Client) -> None:
    got = await client.chat("custom-openrouter/any/model", stream=True)
    assert got.body.startswith(b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\ndata: ")


async def test_a_dynamic_route_tells_who_served_it(client: Client) -> None:
    got = await client.chat("dynamic/cheap")
    assert got.headers["cf-aig-provider"] == "openai"
    assert got.headers["cf-aig-model"] == got.json["model"] == "gpt-4o-mini"
    (line,) = await client.demo.recorded(1)
    assert (line["provider"], line["model"]) == ("openai", "gpt-4o-mini")


@pytest.mark.parametrize("path", ["/v1", "/openai/v1"])
@pytest.mark.parametrize("model", ["gpt-4o", "meta-llama/Llama-3.3", "anthropic/claude"])
async def test_the_plain_flavour_takes_any_name(client: Client, path: str, model: str) -> None:
    got = await client.post(
        f"{client.demo.url}{path}/chat/completions",
        {"authorization": f"Bearer {TOKEN}"},
        {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": True},
    )
    assert got.done
    assert not [name for name in got.headers if name.lower().startswith("cf-aig")]
    (line,) = await client.demo.recorded(1)
    known = model.startswith("anthropic/")
    assert line["provider"] == ("anthropic" if known else "openai")
    assert line["model"] == ("claude" if known else model)


async def test_cached_tokens_are_reported_and_recorded(client: Client) -> None:
    got = await client.chat("openai/gpt-4o+cached-4+cache-write-3")
    details = got.json["usage"]["prompt_tokens_details"]
    assert (details["cached_tokens"], details["cache_write_tokens"]) == (4, 3)
    (line,) = await client.demo.recorded(1)
    assert (line["tokens"]["cached"], line["tokens"]["cache_write"]) == (4, 3)
    assert line["tokens"]["input"] > 7


# Faults.


def test_a_typing_mistake_in_a_fault_is_no_model() -> None:
    for name in ("fault-no-such", "gpt-4o+fault-slo-5", "gpt-4o+status", "gpt-4o+no-done-3", "a+"):
        with pytest.raises(UnknownFault):
            split_model(name)
    base, faults = split_model("gpt-4o-2024-08-06+fault-slow-20+reset-after-3+comments")
    assert base == "gpt-4o-2024-08-06"
    assert faults == {"slow": 20, "reset-after": 3, "comments": 2}
    assert split_model("claude-sonnet-4-5")[1] == {}


async def test_an_unknown_fault_is_refused(client: Client) -> None:
    got = await client.chat("mock/fault-no-such")
    assert (got.status, got.json["error"]["code"]) == (400, "demo_unknown_fault")
    got = await client.chat("mock/fault-code-2999")
    assert got.json["error"]["code"] == "demo_unknown_fault"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 502, 503, 529])
async def test_a_providers_error_comes_in_its_own_words(
    client: Client, status: int, stream: bool
) -> None:
    got = await client.chat(f"openai/gpt-4o+fault-status-{status}", stream=stream)
    assert got.status == status
    assert isinstance(got.json["error"]["message"], str)
    google = await client.chat(f"google-ai-studio/fault-status-{status}", stream=stream)
    assert google.json[0]["error"]["code"] == status
    line = (await client.demo.recorded(2))[0]
    assert (line["status"], line["end"], line["tokens"]) == (status, "refused", None)
    assert not line["completed"]


async def test_the_edges_errors_are_pages(client: Client) -> None:
    got = await client.chat("openai/fault-status-524")
    assert got.status == 524
    assert got.headers["content-type"].startswith("text/html")
    assert "cf-aig-log-id" not in got.headers
    got = await client.chat("openai/fault-code-1010")
    assert (got.status, got.body) == (403, b"error code: 1010")


@pytest.mark.parametrize(
    ("code", "status"), [(2003, 429), (2005, 400), (2016, 424), (2021, 402), (2045, 429)]
)
async def test_the_gateways_codes_come_in_its_envelope(
    client: Client, code: int, status: int
) -> None:
    got = await client.chat(f"openai/fault-code-{code}")
    assert got.status == got.json["httpCode"] == status
    assert [error["code"] for error in got.json["error"]] == [code]


async def test_the_rest_apis_codes_come_in_its_envelope(client: Client) -> None:
    got = await client.chat("openai/fault-code-7003")
    assert (got.status, got.json["errors"][0]["code"]) == (404, 7003)
    assert "error" not in got.json


async def test_garbage_redirects_cut_json_and_odd_headers(client: Client) -> None:
    got = await client.chat("openai/fault-garbage", stream=True)
    assert (got.status, got.headers["content-type"]) == (200, "text/html; charset=UTF-8")
    got = await client.chat("openai/fault-redirect")
    assert (got.status, got.headers["location"]) == (307, "/elsewhere")
    got = await client.chat("openai/fault-bad-json")
    assert (got.status, got.headers["content-type"]) == (200, "application/json")
    with pytest.raises(json.JSONDecodeError):
        _ = got.json
    got = await client.chat("openai/fault-status-429+retry-after-7+set-cookie+header-bytes-5000")
    assert got.headers["retry-after"] == "7"
    assert len(got.headers["x-demo-filling"]) == 5000
    assert "__cf_bm" in str(got.headers)


async def test_guardrails_answer_a_stream_with_one_payload(client: Client) -> None:
    got = await client.chat("openai/gpt-4o+guardrails", stream=True)
    assert got.headers["content-type"] == "application/json"
    assert got.json["object"] == "chat.completion"


@pytest.mark.parametrize(
    "fault", ["echo-token", "echo-token+status-500", "echo-token+code-2009", "echo-token+garbage"]
)
async def test_a_careless_server_echoes_the_token(client: Client, fault: str) -> None:
    assert TOKEN in (await client.chat(f"mock/echo+{fault}")).body.decode()
    assert TOKEN not in (await client.chat("mock/fault-status-401")).body.decode()


@pytest.mark.parametrize("fault", ["echo-token+error-first", "echo-token+error-event-after-2"])
async def test_a_careless_stream_echoes_the_token_too(client: Client, fault: str) -> None:
    got = await client.chat(f"mock/echo+{fault}", stream=True)
    assert got.status == 200
    assert TOKEN in got.events[-1]["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reset_before_headers_is_no_answer(client: Client, stream: bool) -> None:
    got = await client.chat("mock/fault-reset-before-headers", stream=stream)
    assert (got.status, got.broken) == (0, "ClientOSError")
    (line,) = await client.demo.recorded(1)
    assert (line["status"], line["end"], line["tokens"]) == (0, "reset-before-headers", None)


@pytest.mark.parametrize(
    ("fault", "how"), [("reset-after-3", "reset"), ("close-after-3", "closed")]
)
async def test_a_stream_that_breaks_has_sent_its_events_first(
    client: Client, fault: str, how: str
) -> None:
    body = {"model": f"mock/prose+{fault}", "stream": True, "messages": []}
    answer, end = await raw_answer(client.demo, body)
    assert (answer.count(b"data: "), end) == (3, how)
    assert not answer.endswith(b"0\r\n\r\n")
    (line,) = await client.demo.recorded(1)
    assert (line["events_sent"], line["tokens"]["output"], line["usage"]) == (3, 3, None)
    assert (line["completed"], line["end"]) == (False, fault.removesuffix("-3"))


@pytest.mark.parametrize(
    ("fault", "events"), [("eof-after-3", 3), ("eof-after-0", 0), ("error-event-after-2", 3)]
)
async def test_a_stream_that_ends_early_ends_cleanly(
    client: Client, fault: str, events: int
) -> None:
    got = await client.chat(f"mock/prose+{fault}", stream=True)
    assert (got.status, got.broken, got.done) == (200, "", False)
    assert len(got.events) == events
    assert ("error" in got.events[-1] if got.events else False) == fault.startswith("error")
    (line,) = await client.demo.recorded(1)
    assert (line["events_sent"], line["completed"]) == (events, False)


async def test_a_fault_beyond_the_last_event_strikes_at_the_end(client: Client) -> None:
    got = await client.chat("mock/prose+eof-after-9999", stream=True)
    assert not got.done
    assert got.events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_an_error_can_be_the_first_event(client: Client) -> None:
    got = await client.chat("mock/fault-error-first", stream=True)
    assert [set(event) for event in got.events] == [{"error"}]
    assert not got.done
    whole = await client.chat("mock/fault-error-first")
    assert (whole.status, set(whole.json)) == (200, {"error"})
    lines = await client.demo.recorded(2)
    assert [line["tokens"] for line in lines] == [None, None]


@pytest.mark.parametrize(
    ("fault", "how"), [("reset-after-1", "reset"), ("close-after-1", "closed")]
)
async def test_a_whole_answer_breaks_in_its_middle(client: Client, fault: str, how: str) -> None:
    answer, end = await raw_answer(client.demo, {"model": f"mock/prose+{fault}", "messages": []})
    head, _, half = answer.partition(b"\r\n\r\n")
    assert 0 < len(half) < content_length(head)
    assert end == how
    (line,) = await client.demo.recorded(1)
    assert (line["completed"], line["usage"]) == (False, None)


async def test_a_whole_answer_may_be_half_an_answer(client: Client) -> None:
    got = await client.chat("mock/prose+eof-after-1")
    assert (got.status, got.broken) == (200, "")
    with pytest.raises(ValueError):
        _ = got.json


@pytest.mark.parametrize("fault", ["stall-before-headers", "stall-after-3"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stall_lasts_until_the_client_leaves(
    client: Client, fault: str, stream: bool
) -> None:
    body = {"model": f"mock/prose+{fault}", "stream": stream, "messages": []}
    reader, writer = await raw_request(client.demo, body)
    await client.demo.received(1)
    if fault == "stall-after-3":
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        if stream:
            for _ in range(3):
                await reader.readuntil(b"\n\n\r\n")
    assert client.demo.record == []
    writer.close()
    await writer.wait_closed()
    (line,) = await client.demo.recorded(1)
    assert line["end"] == "client_left"
    assert line["events_sent"] == (3 if stream and fault == "stall-after-3" else 0)


async def test_no_usage_no_finish_no_done(client: Client) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for name in NAMES:
        got = await client.chat(f"{name}+no-usage", **options)
        assert [usage for usage in usages(got) if usage] == []
        assert got.done
        assert "usage" not in (await client.chat(f"{name}+no-usage")).json
    got = await client.chat("mock/prose+no-done", **options)
    assert not got.done
    assert usages(got)[-1]
    got = await client.chat("mock/prose+no-finish", **options)
    assert {c["finish_reason"] for e in got.events for c in e["choices"]} == {None}
    got = await client.chat("mock/prose+usage-bad", **options)
    assert usages(got)[-1]["total_tokens"] == "many"


async def test_bytes_can_be_odd_without_changing_what_is_said(client: Client) -> None:
    plain = await client.chat("mock/prose", stream=True)
    for fault in ("crlf", "split-1", "split-7", "close-delimited", "comments-3", "interim"):
        got = await client.chat(f"mock/prose+{fault}", stream=True)
        assert (got.text, got.done) == (plain.text, True), fault
    whole = (await client.chat("mock/prose")).json["choices"]
    for fault in ("split-3", "close-delimited", "interim", "delay-5"):
        assert (await client.chat(f"mock/prose+{fault}")).json["choices"] == whole, fault
    for stream in (False, True):
        got = await client.chat("mock/prose+gzip", stream=stream)
        assert got.headers["content-encoding"] == "gzip"
        got.body = gzip.decompress(got.body)
        assert got.text == plain.text if stream else got.json["choices"] == whole
    got = await client.chat("mock/prose+crlf", stream=True)
    assert got.body.count(b"\n") == got.body.count(b"\r\n")


async def test_a_body_in_pieces_is_so_many_chunks(client: Client) -> None:
    body = {"model": "mock/echo+split-1+len-2", "stream": True, "messages": []}
    reader, writer = await raw_request(client.demo, body)
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readuntil(b"\r\n") == b"1\r\n"
    assert await reader.readexactly(3) == b"d\r\n"
    assert await reader.readuntil(b"\r\n") == b"1\r\n"
    writer.close()
    await writer.wait_closed()


async def test_a_bad_event_is_followed_by_good_ones(client: Client) -> None:
    got = await client.chat("mock/prose+bad-event-after-2", stream=True)
    assert got.blocks[2] == b'data: {"id":"chatcmpl-'
    assert got.done


async def test_a_reset_comes_behind_every_byte_before_it(client: Client) -> None:
    model = "mock/prose+huge-event-6000000+reset-after-1"
    body = {"model": model, "stream": True, "messages": []}
    answer, how = await raw_answer(client.demo, body)
    assert (answer.count(b" river"), how) == (1_000_000, "reset")


async def test_a_huge_event_is_one_event_and_counts_in_full(client: Client) -> None:
    got = await client.chat(
        "mock/prose+huge-event-600000",
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=5,
    )
    assert len(got.events[0]["choices"][0]["delta"]["content"]) == 600_000
    assert usages(got)[-1]["completion_tokens"] >= 100_000
    (line,) = await client.demo.recorded(1)
    assert line["tokens"]["output"] == usages(got)[-1]["completion_tokens"]


async def test_an_endless_line_has_no_end(client: Client) -> None:
    got = await client.chat("mock/prose+endless-1", stream=True)
    assert len(got.body) > 1 << 20
    assert b"\n" not in got.body
    (line,) = await client.demo.recorded(1)
    assert line["end"] == "endless"


async def test_a_stale_connection_is_reset_and_a_fresh_one_serves(client: Client) -> None:
    body = {"model": "mock/echo+stale", "messages": []}
    reader, writer = await raw_request(client.demo, body)
    assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
    writer.write(request_bytes(client.demo, body))
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
    lines = await client.demo.recorded(2)
    assert [line["end"] for line in lines] == ["complete", "stale"]


async def test_an_idle_connection_is_closed_without_a_word(client: Client) -> None:
    reader, writer = await raw_request(
        client.demo, {"model": "mock/echo+close-idle", "messages": []}
    )
    head, _ = await read_answer(reader)
    assert b"connection: close" not in head.lower()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_extra_bytes_follow_the_answer(client: Client) -> None:
    reader, writer = await raw_request(
        client.demo, {"model": "mock/echo+extra-bytes", "messages": []}
    )
    await read_answer(reader)
    assert (await read_answer(reader))[1] == b"unasked-\n"
    writer.close()
    await writer.wait_closed()


async def test_an_interim_answer_comes_before_the_answer(client: Client) -> None:
    reader, writer = await raw_request(client.demo, {"model": "mock/echo+interim", "messages": []})
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 103 ")
    assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


async def test_a_fault_may_last_for_the_first_requests_only(client: Client) -> None:
    name = "mock/echo+status-503+times-2"
    assert [(await client.chat(name)).status for _ in range(4)] == [503, 503, 200, 200]
    client.demo.clear()
    assert (await client.chat(name)).status == 503


async def test_a_header_asks_for_faults_as_the_model_name_does(client: Client) -> None:
    got = await client.chat("openai/gpt-4o", headers={"x-demo-fault": "fault-status-502"})
    assert got.status == 502
    got = await client.chat("openai/gpt-4o+cache-hit", headers={"cf-aig-event-id": "e1"})
    assert got.headers["cf-aig-cache-status"] == "HIT"
    assert got.headers["cf-aig-event-id"] == "e1"


async def test_each_event_is_one_segment(client: Client) -> None:
    parts: list[bytes] = []
    ended = asyncio.Event()

    class Listener(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            parts.append(data)
            if b"[DONE]" in data:
                ended.set()

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(Listener, "127.0.0.1", client.demo.port)
    body = {"model": "mock/prose+slow-2", "stream": True, "messages": []}
    transport.write(request_bytes(client.demo, body))
    await ended.wait()
    transport.close()
    # The first event may be read together with the head: there is no pause between the two.
    assert all(part.count(b"data: ") == 1 for part in parts[1:])
    assert parts[0].count(b"data: ") <= 1
    assert len(parts) > 20


async def test_a_client_of_http_1_0_gets_no_chunks(client: Client) -> None:
    body = {"model": "mock/prose", "stream": True, "messages": []}
    reader, writer = await raw_request(client.demo, body, version="1.0")
    answer = await reader.read()
    assert b"transfer-encoding" not in answer.lower()
    assert answer.endswith(b"data: [DONE]\n\n")
    writer.close()
    await writer.wait_closed()


# Scripts.


@pytest.mark.parametrize("sample", SAMPLES)
async def test_a_script_plays_a_sample_byte_for_byte(client: Client, sample: str) -> None:
    assert await client.script(writes=[SAMPLES[sample].decode()]) == 201
    got = await client.chat("openai/gpt-4o", stream=True)
    assert got.body == SAMPLES[sample]
    assert got.headers["content-type"] == "text/event-stream"
    assert got.headers["cf-aig-log-id"]
    after = await client.chat("openai/gpt-4o", stream=True)
    assert after.text


async def test_scripts_match_by_model_and_provider_in_order(client: Client) -> None:
    demo = client.demo
    demo.script(model="mock/a", writes=[b'{"a":1}'])
    demo.script(provider="groq", fault="status-503", count=2)
    demo.script(writes=[b"<html>"], status=502, count=0)
    statuses = [(await client.chat("groq/x")).status for _ in range(3)]
    assert statuses == [503, 503, 502]
    assert (await client.chat("mock/a")).json == {"a": 1}
    got = await client.chat("mock/a")
    assert (got.status, got.headers["content-type"]) == (502, "text/html")
    async with client.session.get(demo.url + "/_demo/script") as response:
        assert [(row["id"], row["left"]) for row in await response.json()] == [(3, None)]
    async with client.session.delete(demo.url + "/_demo/script") as response:
        assert response.status == 204
    assert (await client.chat("mock/a")).status == 200


async def test_a_script_can_be_sent_as_base64_with_its_own_headers(client: Client) -> None:
    await client.script(
        status=418,
        headers=[["content-type", "application/x-odd"], ["x-two", "1"], ["x-two", "2"]],
        writes=[{"base64": "AP8="}, {"text": "ü", "delay_ms": 1}],
        framing="length",
        delay_ms=1,
    )
    got = await client.chat("mock/a")
    assert (got.status, got.headers["content-type"]) == (418, "application/x-odd")
    assert (got.body, got.headers["content-length"]) == (b"\x00\xff\xc3\xbc", "4")


async def test_a_script_can_be_the_whole_answer(client: Client) -> None:
    client.demo.script(
        framing="raw",
        writes=[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", b"X-Odd: \r\n\r\n{}"],
        usage={"prompt_tokens": 1},
    )
    got = await client.chat("mock/a")
    assert (got.status, got.body, got.headers["x-odd"]) == (200, b"{}", "")
    (line,) = await client.demo.recorded(1)
    assert line["usage"] == {"prompt_tokens": 1}
    assert (line["end"], line["events_sent"]) == ("script-clean", 2)


@pytest.mark.parametrize(("end", "how"), [("reset", "reset"), ("close", "closed")])
async def test_a_script_ends_as_it_is_told(client: Client, end: str, how: str) -> None:
    client.demo.script(writes=[b"data: {}\n\n"], end=end)
    answer, ended = await raw_answer(client.demo, {"model": "mock/a", "messages": []})
    assert (answer.count(b"data: {}"), ended) == (1, how)


async def test_a_script_can_stall(client: Client) -> None:
    client.demo.script(writes=[b"data: {}\n\n"], end="stall")
    reader, writer = await raw_request(client.demo, {"model": "mock/a", "messages": []})
    await reader.readuntil(b"data: {}\n\n\r\n")
    writer.close()
    await writer.wait_closed()
    (line,) = await client.demo.recorded(1)
    assert line["end"] == "client_left"


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"writes": "x"},
        {"writes": [], "end": "bang"},
        {"writes": [{"base64": "%"}]},
        {"writes": [{}]},
        {"writes": [5]},
        {"fault": "no-such"},
        {"writes": [], "oops": 1},
        {"writes": [], "count": -1},
        {"writes": [], "headers": [1]},
    ],
)
async def test_a_script_that_cannot_be_played_is_refused(
    client: Client, wish: dict[str, Any]
) -> None:
    assert await client.script(**wish) == 400
    assert (await client.chat("mock/echo")).status == 200


# The record and the control API.


async def test_the_record_takes_the_callers_ids_from_the_metadata(client: Client) -> None:
    about = {
        "user_id": "alice",
        "org_id": "acme",
        "key_id": "k1",
        "request_id": "req_1",
        "attempt": 2,
    }
    await client.chat("mock/echo", headers={"cf-aig-metadata": json.dumps(about)})
    await client.chat("mock/echo", headers={"cf-aig-metadata": json.dumps({**about, "x": None})})
    await client.chat("mock/echo", headers={"cf-aig-metadata": "{"})
    first, second, third = await client.demo.recorded(3)
    assert {name: first[name] for name in about} == about
    # One null drops them all, as the gateway does.
    assert (second["user_id"], second["attempt"]) == (None, 1)
    assert third["user_id"] is None


async def test_a_client_that_leaves_is_recorded_with_what_it_got(client: Client) -> None:
    body = {"model": "mock/prose+slow-5+len-5000", "stream": True, "messages": []}
    reader, writer = await raw_request(client.demo, body)
    for _ in range(3):
        await reader.readuntil(b"\n\n\r\n")
    writer.close()
    await writer.wait_closed()
    (line,) = await client.demo.recorded(1)
    assert (line["end"], line["completed"], line["usage"]) == ("client_left", False, None)
    assert 3 <= line["events_sent"] == line["tokens"]["output"] < 50


async def test_hidden_reasoning_is_spent_before_the_first_event(client: Client) -> None:
    await client.chat("grok/grok-4+eof-after-2", stream=True)
    (line,) = await client.demo.recorded(1)
    assert line["tokens"]["reasoning"] == 32
    # The first of the two events carried the role only.
    assert line["tokens"]["output"] == 33


async def test_the_record_is_appended_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"earlier": true}\n')
    demo = DemoUpstream(token=TOKEN, record_file=path)
    await demo.start()
    async with aiohttp.ClientSession() as session:
        await Client(demo, session).chat("mock/echo")
        _reader, writer = await raw_request(
            demo, {"model": "mock/fault-stall-before-headers", "messages": []}
        )
        await demo.received(2)
        await demo.stop()
        writer.close()
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[0] == {"earlier": True}
    assert lines[1:] == demo.record
    assert [line["end"] for line in demo.record] == ["complete", "stopped"]


async def test_requests_are_kept_as_they_came(client: Client) -> None:
    await client.chat("mock/echo", "ü", headers={"X-Odd": "1"})
    async with client.session.get(client.demo.url + "/_demo/requests?count=1") as response:
        (request,) = await response.json()
    assert request["method"] == "POST"
    assert request["path"] == "/v1/demo/demo/compat/chat/completions"
    names = [name for name, _ in request["headers"]]
    assert names[0] == "Host"
    assert ["X-Odd", "1"] in request["headers"]
    assert json.loads(request["body"])["messages"][0]["content"] == "ü"


async def test_rows_can_be_awaited_counted_and_cleared(client: Client) -> None:
    url = client.demo.url + "/_demo"

    async def last_of_two() -> list[dict[str, Any]]:
        async with client.session.get(url + "/record?count=2&last=1") as response:
            rows: list[dict[str, Any]] = await response.json()
            return rows

    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(last_of_two())
        await client.chat("mock/echo")
        await client.chat("mock/prose")
    assert [row["model"] for row in waiting.result()] == ["prose"]
    for noun in ("record", "requests"):
        async with client.session.delete(f"{url}/{noun}") as response:
            assert response.status == 204
    assert (client.demo.record, client.demo.requests) == ([], [])
    async with client.session.get(url + "/record?count=x") as response:
        assert response.status == 400
    async with client.session.delete(url) as response:
        assert response.status == 204
    async with client.session.get(url) as response:
        assert set((await response.json())["faults"]) == set(MODIFIERS)
    async with client.session.get(url + "/nothing") as response:
        assert response.status == 404
    with pytest.raises(TimeoutError):
        await client.demo.recorded(1, timeout_s=0)


async def test_the_pace_can_be_set_while_it_runs(client: Client) -> None:
    url = client.demo.url + "/_demo/pace"
    async with client.session.put(url, json={"event_interval_ms": 3.5}) as response:
        assert response.status == 204
    assert client.demo.event_interval_ms == 3.5
    async with client.session.put(url, json={}) as response:
        assert response.status == 400


async def test_a_web_page_cannot_reach_the_control_api(client: Client) -> None:
    url = client.demo.url + "/_demo/requests"
    async with client.session.get(url, headers={"origin": "http://evil.example"}) as response:
        assert response.status == 403


async def test_it_starts_again_after_a_stop(demo: DemoUpstream) -> None:
    await demo.stop()
    await demo.start()
    async with aiohttp.ClientSession() as session:
        assert (await Client(demo, session).chat("mock/echo")).status == 200


# As a process, and over TLS.


async def test_it_runs_as_a_process_until_told_to_stop(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gwproxy.demo", "--listen", "127.0.0.1:0"),
        *("--token", TOKEN, "--record", str(record), "--event-interval-ms", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith("demo upstream listening on http://127.0.0.1:")
    running = DemoUpstream(token=TOKEN)
    running.port = int(line.rsplit(":", 1)[1])
    body = {"model": "mock/prose+reset-after-4", "stream": True, "messages": []}
    answer, how = await raw_answer(running, body)
    assert (answer.count(b"data: "), how) == (4, "reset")
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
    assert json.loads(record.read_bytes())["events_sent"] == 4


async def test_arguments_that_make_no_sense_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    from gwproxy.demo import main

    assert main(["--listen", "nonsense"]) == 2
    assert main(["--tls-cert", "only.pem"]) == 2
    assert "--listen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "how"), [("", "whole"), ("+reset-after-4", "reset"), ("+close-after-4", "closed")]
)
async def test_it_speaks_tls(fault: str, how: str) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    demo = DemoUpstream(token=TOKEN, ssl_context=context)
    await demo.start()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    body = {"model": f"mock/prose{fault}", "stream": True, "messages": []}
    answer, end = await raw_answer(demo, body, tls=trusting)
    await demo.stop()
    assert demo.url.startswith("https://")
    assert end == how
    assert answer.count(b"data: ") == 4 if fault else answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")


# Below HTTP.


def request_bytes(demo: DemoUpstream, body: Mapping[str, Any], version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/{demo.account}/{demo.gateway}/compat/chat/completions HTTP/{version}\r\n"
        f"host: demo\r\ncf-aig-authorization: Bearer {demo.token}\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def raw_request(
    demo: DemoUpstream, body: Mapping[str, Any], version: str = "1.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", demo.port)
    writer.write(request_bytes(demo, body, version))
    return reader, writer


async def raw_answer(
    demo: DemoUpstream, body: Mapping[str, Any], tls: ssl.SSLContext | None = None
) -> tuple[bytes, str]:
    """Every byte that comes back, and how it ended: whole, reset or closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", demo.port, ssl=tls)
    writer.write(request_bytes(demo, body))
    answer, how = b"", "closed"
    try:
        while part := await reader.read(1 << 16):
            answer += part
            if answer.endswith(b"0\r\n\r\n"):
                how = "whole"
                break
    except ConnectionResetError:
        how = "reset"
    writer.transport.abort()
    return answer, how


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    return head, await reader.readexactly(content_length(head))


def content_length(head: bytes) -> int:
    (length,) = (
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    return length
