"""OpenAI's own Python SDK, both of its clients, against the running gateway with the built-in
upstream behind it. What the upstream recorded is what is believed.
"""

import asyncio
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState

from gwproxy.demo import DemoUpstream
from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, UPSTREAM_TOKEN, delta, make_key
from tests.sdk import FLAVOURS, TOOLS, config, demo_upstream

MODEL = "openai/gpt-4o-mini"
QUESTION: Any = [{"role": "user", "content": "Why is the sky blue? Grüße, 世界 😀"}]
LONG = "mock/prose+len-5000+slow-5"
"""Half a minute of answer: nobody in these tests hears its end."""

_TLS = ssl.create_default_context()
"""Made once: it is never used, and each client would load the system's certificates anew."""


@dataclass
class Heard:
    """A stream as the SDK gave it: its chunks, and the error that ended it if one did."""

    chunks: list[Any] = field(default_factory=list)
    error: openai.APIError | None = None
    five: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there are five chunks, by the asynchronous client."""

    @property
    def text(self) -> str:
        return self.text_of(0)

    def text_of(self, index: int) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk.choices]
        return "".join(c.delta.content or "" for c in choices if c.index == index)

    @property
    def finish(self) -> list[str]:
        choices = [choice for chunk in self.chunks for choice in chunk.choices]
        return [choice.finish_reason for choice in choices if choice.finish_reason]

    @property
    def usage(self) -> list[Any]:
        return [chunk.usage for chunk in self.chunks if chunk.usage is not None]


class Sdk:
    """One of the SDK's two clients; both are used in the same words."""

    def __init__(self, kind: str, url: str, key: str, **options: Any) -> None:
        options = {"max_retries": 0, "timeout": 20, **options}
        # A proxy named in the environment is none of our business.
        if kind == "sync":
            http: Any = openai.DefaultHttpxClient(trust_env=False, verify=_TLS)
            self.sync: OpenAI | None = OpenAI(
                base_url=f"{url}/v1", api_key=key, http_client=http, **options
            )
        else:
            http = openai.DefaultAsyncHttpxClient(trust_env=False, verify=_TLS)
            self.sync = None
            self.asynchronous = AsyncOpenAI(
                base_url=f"{url}/v1", api_key=key, http_client=http, **options
            )

    async def call(self, method: str, *positional: Any, **named: Any) -> Any:
        """`method` is the path of a method in the SDK, such as `models.list`."""
        if self.sync is not None:
            return await asyncio.to_thread(attrgetter(method)(self.sync), *positional, **named)
        return await attrgetter(method)(self.asynchronous)(*positional, **named)

    async def chat(self, model: str = MODEL, messages: Any = QUESTION, **body: Any) -> Any:
        return await self.call("chat.completions.create", model=model, messages=messages, **body)

    async def stream(
        self,
        model: str = MODEL,
        messages: Any = QUESTION,
        *,
        leave_after: int = 0,
        heard: Heard | None = None,
        **body: Any,
    ) -> Heard:
        """Listens to the end, or goes after so many chunks."""
        heard = heard if heard is not None else Heard()
        body = {"model": model, "messages": messages, "stream": True, **body}

        def listen(client: OpenAI) -> None:
            with client.chat.completions.create(**body) as stream:
                for chunk in stream:
                    heard.chunks.append(chunk)
                    if len(heard.chunks) == leave_after:
                        break

        try:
            if self.sync is not None:
                await asyncio.to_thread(listen, self.sync)
            else:
                async with await self.asynchronous.chat.completions.create(**body) as stream:
                    async for chunk in stream:
                        heard.chunks.append(chunk)
                        if len(heard.chunks) == 5:
                            heard.five.set()
                        if len(heard.chunks) == leave_after:
                            break
        except openai.APIStatusError:
            raise  # it never became a stream
        except openai.APIError as error:
            heard.error = error
        return heard

    async def close(self) -> None:
        if self.sync is not None:
            self.sync.close()
        else:
            await self.asynchronous.close()


@dataclass
class Stage:
    """A running gateway, the upstream behind it, and SDK clients of one kind in front."""

    front: Front
    demo: DemoUpstream
    kind: str
    clients: list[Sdk]

    def sdk(self, *, url: str | None = None, key: str | None = None, **options: Any) -> Sdk:
        client = Sdk(self.kind, url or self.front.url, key or self.front.key, **options)
        self.clients.append(client)
        return client

    def straight(self) -> Sdk:
        """The same SDK with no gateway between it and the upstream."""
        return self.sdk(url=self.demo.url, key=UPSTREAM_TOKEN)

    async def lines(self, count: int) -> list[dict[str, Any]]:
        """The log lines of the chats so far, which must be `count`."""
        await self.front.gateway.request_line(least=count)
        lines = [
            line for line in await self.front.gateway.lines("request") if line["route"] == "chat"
        ]
        assert len(lines) == count
        return lines

    async def line(self) -> dict[str, Any]:
        (line,) = await self.lines(1)
        return line


SetUp = Callable[..., Awaitable[Stage]]

either = pytest.mark.parametrize("kind", ["async"], indirect=True)
"""For what both clients share: how they read an answer, and what is in it."""


@pytest.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    upstream = demo_upstream()
    await upstream.start()
    yield upstream
    await upstream.stop()


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def set_up(
    start_gateway: StartGateway, demo: DemoUpstream, kind: str
) -> AsyncIterator[SetUp]:
    """`upstream` is added to the table of that name; the rest is the environment."""
    clients: list[Sdk] = []

    async def start(
        flavour: str = "cloudflare-compat", upstream: str = "", **environ: str
    ) -> Stage:
        front = await start_gateway(config=config(demo, flavour, upstream), **environ)
        return Stage(front, demo, kind, clients)

    yield start
    for client in clients:
        await client.close()


@pytest.fixture
async def stage(set_up: SetUp) -> Stage:
    return await set_up()


# What is said.


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_an_answer_is_what_the_upstream_says(set_up: SetUp, flavour: str) -> None:
    stage = await set_up(flavour)
    answer = await stage.sdk().chat()
    straight = await stage.straight().chat()
    assert answer.choices == straight.choices
    assert answer.usage == straight.usage
    assert not answer.choices[0].message.content.isascii()
    assert answer.usage.model_dump(exclude_unset=True) == stage.demo.record[0]["usage"]
    assert answer._request_id == (await stage.line())["request_id"]


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_stream_is_what_the_upstream_says(set_up: SetUp, flavour: str) -> None:
    stage = await set_up(flavour)
    heard = await stage.sdk().stream()
    straight = await stage.straight().stream()
    assert heard.error is None
    assert heard.text == straight.text != ""
    assert heard.finish == ["stop"]
    # The usage that the gateway asked for on its own account stays with it.
    assert len(heard.chunks) == len(straight.chunks)
    assert heard.usage == []
    assert all(chunk.choices for chunk in heard.chunks)
    assert (await stage.line())["source"] == "provider"


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_usage_comes_last_for_who_asked(set_up: SetUp, flavour: str) -> None:
    stage = await set_up(flavour)
    heard = await stage.sdk().stream(stream_options={"include_usage": True})
    (usage,) = heard.usage
    assert heard.chunks[-1].choices == []
    (line,) = await stage.demo.recorded(1)
    assert usage.model_dump(exclude_unset=True) == line["usage"]
    tokens = (await stage.line())["tokens"]
    assert tokens["input"] + tokens["cache_read"] == usage.prompt_tokens
    assert tokens["output"] == usage.completion_tokens


@either
async def test_every_providers_manners_reach_the_sdk(stage: Stage) -> None:
    sdk = stage.sdk()
    for model in (
        "openai/gpt-5-mini",
        "anthropic/claude-sonnet-4-5",
        "gemini/gemini-2.5-flash",
        "groq/llama-3.3-70b-versatile",
        "deepseek/deepseek-chat",
        "mock/prose+crlf+comments",
        "mock/prose+split-3",
        "mock/prose+no-done",
        "mock/prose+close-delimited",
    ):
        answer = await sdk.chat(model)
        heard = await sdk.stream(model)
        assert (model, heard.error) == (model, None)
        assert heard.text == answer.choices[0].message.content != ""
        assert (model, heard.finish) == (model, ["stop"])


@either
async def test_every_character_survives(stage: Stage) -> None:
    said = 'Grüße, 世界!\n\n  Zwei  Leerzeichen 😀👩‍👩‍👧 \t_und_ \u2028 \\ " \x7f Ende '
    heard = await stage.sdk().stream("mock/echo+split-1", [{"role": "user", "content": said}])
    assert heard.text == said


@either
async def test_two_choices_are_kept_apart(stage: Stage) -> None:
    answer = await stage.sdk().chat(n=2)
    heard = await stage.sdk().stream(n=2)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [heard.text_of(0), heard.text_of(1)]
    assert len(set(texts)) == 2
    assert heard.finish == ["stop", "stop"]


@either
async def test_a_limit_is_passed_on(stage: Stage) -> None:
    answer = await stage.sdk().chat(max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    heard = await stage.sdk().stream(max_completion_tokens=5)
    assert heard.finish == ["length"]
    assert answer.usage.completion_tokens == 5


@either
async def test_fields_that_we_do_not_know_reach_the_upstream(stage: Stage) -> None:
    await stage.sdk().chat(temperature=0.25, extra_body={"top_k": 40, "new": {"of": ["a", 1]}})
    sent = json.loads(stage.demo.requests[0]["body"])
    assert (sent["temperature"], sent["top_k"], sent["new"]) == (0.25, 40, {"of": ["a", 1]})


async def test_fifty_at_once_each_get_their_own(set_up: SetUp) -> None:
    stage = await set_up()
    sdk = stage.sdk()

    async def ask(number: int) -> None:
        said = f"This is number {number}, and no other."
        heard = await sdk.stream("mock/echo+slow-1", [{"role": "user", "content": said}])
        assert heard.text == said

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(ask(number))


# Tools.


def assembled(chunks: Iterable[Any]) -> dict[str, str]:
    """A streamed tool call put together as an application does it."""
    call = {"name": "", "arguments": ""}
    for chunk in chunks:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or ():
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    return call


async def test_a_tool_call_is_the_same_streamed_and_whole(stage: Stage) -> None:
    sdk = stage.sdk()
    wish = {"tools": TOOLS, "tool_choice": "required"}
    for model in (
        MODEL,
        "anthropic/claude-sonnet-4-5",
        "gemini/gemini-2.5-flash",
        "groq/llama-3.3-70b-versatile",
        "mock/tool",
    ):
        answer = await sdk.chat(model, **wish)
        (call,) = answer.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "days", "wind"}
        heard = await sdk.stream(model, **wish)
        got = assembled(heard.chunks)
        assert got["name"] == call.function.name == "weather"
        assert (model, json.loads(got["arguments"])) == (model, arguments)
        # The SDK's own accumulator agrees.
        state: Any = ChatCompletionStreamState(input_tools=TOOLS)
        for chunk in heard.chunks:
            state.handle_chunk(chunk)
        (helped,) = state.get_final_completion().choices[0].message.tool_calls
        assert json.loads(helped.function.arguments) == arguments


@either
@pytest.mark.parametrize("streamed", [False, True])
async def test_geminis_signature_survives_both_ways(stage: Stage, streamed: bool) -> None:
    wish = {"tools": TOOLS, "tool_choice": "required"}
    if streamed:
        heard = await stage.sdk().stream("gemini/gemini-2.5-flash", **wish)
        parts = [c for chunk in heard.chunks for c in chunk.choices if c.delta.tool_calls]
        (call,) = parts[0].delta.tool_calls
    else:
        answer = await stage.sdk().chat("gemini/gemini-2.5-flash", **wish)
        (call,) = answer.choices[0].message.tool_calls
    signature = call.model_extra["extra_content"]["google"]["thought_signature"]
    assert signature
    turn = call.model_dump(exclude={"index"})
    again = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [turn]},
        {"role": "tool", "tool_call_id": call.id, "content": "Rain."},
    ]
    await stage.sdk().chat("gemini/gemini-2.5-flash", again, tools=TOOLS)
    sent = json.loads(stage.demo.requests[-1]["body"])
    assert sent["messages"] == again
    assert sent["messages"][1]["tool_calls"][0]["extra_content"] == {
        "google": {"thought_signature": signature}
    }


# Around the answer.


@either
@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_raw_response_has_our_headers(set_up: SetUp, flavour: str) -> None:
    stage = await set_up(flavour)
    raw = await stage.sdk().call(
        "chat.completions.with_raw_response.create", model=MODEL, messages=QUESTION
    )
    line = await stage.line()
    assert raw.headers["x-request-id"] == raw.request_id == line["request_id"]
    assert raw.parse()._request_id == raw.request_id
    (served,) = await stage.demo.recorded(1)
    assert raw.headers["x-upstream-request-id"] == f"req_{served['log_id'].replace('-', '')}"
    expected = {"cloudflare-compat": "openai", "openai": "upstream"}[flavour]
    assert raw.headers["x-gateway-provider"] == expected
    assert raw.headers["x-gateway-mode"] == "normal"
    assert raw.headers["server-timing"].startswith("gw;dur=")
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["x-ratelimit-remaining-requests"] == "9999"
    assert UPSTREAM_TOKEN not in str(raw.headers)
    if flavour == "cloudflare-compat":
        assert served["request_id"] == raw.request_id
        assert served["user_id"] == "alice"


async def test_a_raw_stream_has_our_headers(stage: Stage) -> None:
    raw = await stage.sdk().call(
        "chat.completions.with_raw_response.create", model=MODEL, messages=QUESTION, stream=True
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["x-gateway-provider"] == "openai"
    stream = raw.parse()
    if stage.kind == "sync":
        await asyncio.to_thread(list, stream)
    else:
        async for _ in stream:
            pass
    assert raw.headers["x-request-id"] == (await stage.line())["request_id"]


@either
async def test_models_are_listed_and_shown(stage: Stage) -> None:
    listed = await stage.sdk().call("models.list")
    models = {model.id: model for model in listed.data}
    assert models["auto"].owned_by == "gwproxy"
    assert models[MODEL].owned_by == "openai"
    assert "google-ai-studio/gemini-2.5-flash" in models
    shown = await stage.sdk().call("models.retrieve", MODEL)
    assert shown == models[MODEL]
    with pytest.raises(openai.NotFoundError) as caught:
        await stage.sdk().call("models.retrieve", "openai/no-such-model")
    assert caught.value.code == "model_not_found"


@either
async def test_an_alias_answers_from_the_next_provider(stage: Stage) -> None:
    stage.demo.script(fault="status-503", provider="google-ai-studio")
    raw = await stage.sdk().call(
        "chat.completions.with_raw_response.create", model="auto", messages=QUESTION
    )
    assert raw.headers["x-gateway-provider"] == "openai"
    stage.demo.script(fault="error-first", provider="google-ai-studio")
    heard = await stage.sdk().stream("auto")
    assert heard.error is None
    assert heard.text == raw.parse().choices[0].message.content
    assert [line["provider"] for line in stage.demo.record] == ["google-ai-studio", "openai"] * 2


# Errors, each as the class that applications catch.


async def test_a_wrong_key_is_an_authentication_error(stage: Stage) -> None:
    for method in ("models.list", "chat"):
        sdk = stage.sdk(key="gw_live_not-a-key", max_retries=2)
        with pytest.raises(openai.AuthenticationError) as caught:
            await (sdk.chat() if method == "chat" else sdk.call(method))
        error = caught.value
        assert (error.status_code, error.code) == (401, "invalid_api_key")
        assert error.request_id is not None
        assert error.request_id.startswith("req_")
    assert len(await stage.lines(1)) == 1


async def test_a_suspended_user_is_denied(stage: Stage) -> None:
    client = stage.front.client
    made = await client.post(
        "/admin/users", json={"user_id": "bob", "status": "suspended"}, headers=ADMIN
    )
    assert made.status == 201
    sdk = stage.sdk(key=await make_key(client, "bob"), max_retries=2)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await sdk.stream()
    assert caught.value.code == "account_suspended"
    assert caught.value.request_id == (await stage.line())["request_id"]
    assert stage.demo.requests == []


REFUSED: list[tuple[Any, str, str, dict[str, Any]]] = [
    (openai.NotFoundError, "model_not_found", "model", {"model": "no-such-model"}),
    (openai.BadRequestError, "model_not_priced", "model", {"model": "openai/no-price"}),
    (openai.BadRequestError, "invalid_value", "max_tokens", {"max_tokens": -1}),
    (openai.BadRequestError, "invalid_value", "messages", {"messages": []}),
    (openai.BadRequestError, "unsupported_parameter", "tools[0]", {"tools": [{"type": "x"}]}),
]


async def test_what_the_gateway_refuses_never_leaves_it(stage: Stage) -> None:
    sdk = stage.sdk(max_retries=2)
    refused = []
    for ask, (kind_of, code, param, body) in itertools.product((sdk.chat, sdk.stream), REFUSED):
        with pytest.raises(kind_of) as caught:
            await ask(**body)
        error = caught.value
        assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
        refused.append((error.request_id, error.status_code, code))
    lines = await stage.lines(len(refused))
    assert [(line["request_id"], line["status"], line["error_code"]) for line in lines] == refused
    assert stage.demo.requests == []


TROUBLES: list[tuple[str, Any, int, str | None]] = [
    # First, on a fresh connection: on one that has been idle it is only a connection too old.
    ("reset-before-headers", openai.InternalServerError, 502, "all_providers_failed"),
    ("code-2003", openai.RateLimitError, 429, "rate_limit_exceeded"),
    ("status-429+retry-after-7", openai.RateLimitError, 429, "rate_limit_exceeded"),
    ("code-2005", openai.InternalServerError, 502, "all_providers_failed"),
    ("status-500", openai.InternalServerError, 502, "all_providers_failed"),
    ("status-524", openai.InternalServerError, 502, "all_providers_failed"),
    ("garbage", openai.InternalServerError, 502, "all_providers_failed"),
    ("bad-json", openai.InternalServerError, 502, "all_providers_failed"),
    ("error-first", openai.InternalServerError, 502, "all_providers_failed"),
    ("eof-after-0", openai.InternalServerError, 502, "all_providers_failed"),
    ("code-2001", openai.InternalServerError, 502, "upstream_misconfigured"),
    ("code-2009", openai.InternalServerError, 502, "upstream_misconfigured"),
    ("code-2021", openai.InternalServerError, 502, "upstream_misconfigured"),
    ("code-1010", openai.InternalServerError, 502, "upstream_misconfigured"),
    ("status-401", openai.InternalServerError, 502, "upstream_misconfigured"),
    ("code-2016", openai.APIStatusError, 424, "content_blocked"),
    ("status-400", openai.BadRequestError, 400, None),
    ("status-404", openai.NotFoundError, 404, "model_not_found"),
    ("status-413", openai.APIStatusError, 413, "request_too_large"),
]
"""An upstream's fault, and the error that an application catches for it."""


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_upstreams_trouble_is_the_right_error(stage: Stage, streamed: bool) -> None:
    sdk = stage.sdk()
    ids = []
    for fault, kind_of, status, code in TROUBLES:
        stage.demo.script(fault=fault)
        with pytest.raises(kind_of) as caught:
            await (sdk.stream() if streamed else sdk.chat())
        error = caught.value
        assert (fault, error.status_code, error.code) == (fault, status, code)
        ids.append(error.request_id)
        assert error.response.headers.get("retry-after") == ("7" if "retry" in fault else None)
        # Nothing of the upstream's own words about itself.
        assert not any(word in str(error) for word in ("Cloudflare", "Unauthorized", "<html"))
        assert len(await stage.demo.recorded(len(ids))) == len(ids)
    assert [line["request_id"] for line in await stage.lines(len(ids))] == ids


@either
@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_wrong_upstream_token_is_never_the_callers_fault(
    set_up: SetUp, flavour: str
) -> None:
    stage = await set_up(flavour, UPSTREAM_TOKEN="a-token-that-was-revoked")
    with pytest.raises(openai.InternalServerError) as caught:
        await stage.sdk().chat()
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_misconfigured")
    assert "revoked" not in str(caught.value)
    (line,) = await stage.front.gateway.lines("All providers failed")
    assert "token" in line["hint"] or "credentials" in line["hint"]


@pytest.mark.parametrize(
    ("fault", "kind_of", "requests"),
    [
        ("status-400", openai.BadRequestError, 1),
        ("code-2016", openai.APIStatusError, 1),
        ("code-2003", openai.RateLimitError, 3),
        ("status-503", openai.InternalServerError, 3),
    ],
)
async def test_the_sdk_tries_again_what_may_pass(
    stage: Stage, fault: str, kind_of: Any, requests: int
) -> None:
    stage.demo.script(fault=fault, count=0)
    with pytest.raises(kind_of) as caught:
        await stage.sdk(max_retries=openai.DEFAULT_MAX_RETRIES).chat()
    assert len(await stage.demo.recorded(requests)) == requests
    lines = await stage.lines(requests)
    # Each try is a request of its own to us, and the error names the last one.
    assert len({line["request_id"] for line in lines}) == requests
    assert caught.value.request_id == lines[-1]["request_id"]


async def test_a_second_try_of_the_sdk_heals(stage: Stage) -> None:
    stage.demo.script(fault="status-503")
    answer = await stage.sdk(max_retries=2).chat()
    assert answer.choices[0].message.content
    assert [line["status"] for line in stage.demo.record] == [503, 200]


# A stream that dies.


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_stream_that_dies_is_an_error(set_up: SetUp, flavour: str) -> None:
    stage = await set_up(flavour)
    sdk = stage.sdk(max_retries=2)
    whole = (await sdk.chat()).choices[0].message.content
    faults = ("reset-after-5", "close-after-5", "eof-after-5", "no-finish+eof-after-999")
    for number, fault in enumerate(faults, start=2):
        stage.demo.script(fault=fault)
        heard = await sdk.stream()
        assert type(heard.error) is openai.APIError
        assert (fault, heard.error.code) == (fault, "stream_interrupted")
        assert heard.error.type == "upstream_error"
        assert heard.finish == []
        served = (await stage.demo.recorded(number))[-1]
        # All but the usage that only the gateway asked for.
        assert len(heard.chunks) == served["events_sent"] - (served["usage"] is not None)
        # What was said before is what an undisturbed stream says first.
        assert heard.text
        assert whole.startswith(heard.text)
    assert len(stage.demo.requests) == number
    for line, served in zip(await stage.lines(number), stage.demo.record, strict=True):
        whole_answer = served["end"] == "complete"
        assert line["outcome"] == ("completed" if whole_answer else "truncated")
        assert 0 < line["tokens"]["output"] <= served["tokens"]["output"]


TORN = [
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choi',
    delta("torn")[:-1],
    'data: {"choices":[{"index":0,"delta":{"content":"世'.encode()[:-1],
    b"data:",
    b"d",
]
"""The last bytes of a stream that ends in the middle of an event."""


async def test_a_stream_that_dies_inside_an_event_is_an_error(stage: Stage) -> None:
    sdk = stage.sdk()
    for torn, end in itertools.product(TORN, ("reset", "close", "clean")):
        stage.demo.script(writes=[delta("One "), delta("two "), torn], end=end)
        heard = await sdk.stream()
        assert heard.error is not None
        assert (torn, end, heard.error.code) == (torn, end, "stream_interrupted")
        # An event that lacks its empty line only is whole, where its end was a clean one.
        whole = torn.endswith(b"}\n") and end == "clean"
        assert heard.text == ("One two torn" if whole else "One two ")


async def test_an_error_event_of_the_upstream_is_raised_as_it_is(stage: Stage) -> None:
    stage.demo.script(fault="error-event-after-4")
    heard = await stage.sdk().stream()
    assert type(heard.error) is openai.APIError
    assert heard.error.message == "The server had an error"
    assert heard.error.code is None
    assert len(heard.chunks) == 4


async def test_a_stream_that_falls_silent_is_an_error(set_up: SetUp) -> None:
    stage = await set_up(upstream="idle_timeout_s = 0.3")
    stage.demo.script(fault="stall-after-4")
    heard = await stage.sdk().stream()
    assert heard.error is not None
    assert heard.error.code == "stream_interrupted"
    assert len(heard.chunks) == 4


# Answers in another form than asked for.


@pytest.mark.parametrize("asked", [False, True])
async def test_a_whole_answer_to_a_stream_is_heard_as_one(stage: Stage, asked: bool) -> None:
    stage.demo.script(fault="guardrails")
    heard = await stage.sdk().stream(stream_options={"include_usage": asked})
    assert heard.error is None
    assert heard.text == (await stage.sdk().chat()).choices[0].message.content
    assert heard.finish == ["stop"]
    usages = [usage.model_dump(exclude_unset=True) for usage in heard.usage]
    assert usages == ([stage.demo.record[0]["usage"]] if asked else [])


@either
async def test_a_whole_tool_call_to_a_stream_is_assembled(stage: Stage) -> None:
    stage.demo.script(fault="guardrails")
    heard = await stage.sdk().stream(tools=TOOLS, tool_choice="required")
    call = assembled(heard.chunks)
    assert call["name"] == "weather"
    assert set(json.loads(call["arguments"])) == {"city", "days", "wind"}
    assert heard.finish == ["tool_calls"]


# A client that goes.


async def paid_for(stage: Stage, least: int) -> None:
    """The one who left pays for the prompt and for what there was until the upstream knew."""
    (served,) = await stage.demo.recorded(1)
    assert served["end"] == "client_left"
    line = await stage.line()
    assert (line["status"], line["outcome"]) == (499, "client_left")
    assert line["cost_nanos"] > 0
    assert line["tokens"]["input"] > 0
    said = served["tokens"]["output"] if served["tokens"] is not None else 0
    assert least <= line["tokens"]["output"] <= said


async def test_a_stream_that_is_left_is_closed_upstream(stage: Stage) -> None:
    sdk = stage.sdk()
    heard = await sdk.stream(LONG, leave_after=5)
    assert len(heard.chunks) == 5
    await paid_for(stage, least=4)
    # The same client goes on.
    assert (await sdk.stream()).finish == ["stop"]


async def test_a_stream_whose_client_is_closed_is_closed_upstream(stage: Stage) -> None:
    body: Any = {"model": LONG, "messages": QUESTION, "stream": True}
    sdk = Sdk(stage.kind, stage.front.url, stage.front.key)
    stream = await sdk.call("chat.completions.create", **body)
    if stage.kind == "sync":
        iterator: Iterator[Any] = iter(stream)
        for _ in range(3):
            await asyncio.to_thread(next, iterator)
        stream.close()
    else:
        for _ in range(3):
            await anext(stream)
        await stream.close()
    await sdk.close()
    await paid_for(stage, least=2)


@pytest.mark.parametrize("kind", ["async"], indirect=True)
async def test_a_cancelled_stream_is_closed_upstream(stage: Stage) -> None:
    heard = Heard()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(stage.sdk().stream(LONG, heard=heard))
        await heard.five.wait()
        task.cancel()
    assert task.cancelled()
    await paid_for(stage, least=4)


@pytest.mark.parametrize("kind", ["async"], indirect=True)
async def test_a_cancelled_call_is_closed_upstream(stage: Stage) -> None:
    stage.demo.script(fault="stall-before-headers")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(stage.sdk().chat())
        await stage.demo.received(1)
        task.cancel()
    await paid_for(stage, least=0)


# Time-outs, the SDK's own and the gateway's.


async def test_an_sdk_that_waits_no_longer_has_left(stage: Stage) -> None:
    stage.demo.script(fault="stall-before-headers")
    with pytest.raises(openai.APITimeoutError):
        await stage.sdk(timeout=0.4).chat()
    await paid_for(stage, least=0)


async def test_an_sdk_that_waits_no_longer_for_the_next_word_has_left(stage: Stage) -> None:
    stage.demo.script(fault="stall-after-4")
    heard = await stage.sdk(timeout=0.4).stream()
    assert isinstance(heard.error, openai.APITimeoutError)
    assert len(heard.chunks) == 4
    await paid_for(stage, least=3)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_gateway_that_waits_no_longer_says_so(set_up: SetUp, streamed: bool) -> None:
    stage = await set_up(upstream="first_byte_timeout_s = 0.3\nanswer_timeout_s = 0.3")
    stage.demo.script(fault="stall-before-headers")
    sdk = stage.sdk()
    with pytest.raises(openai.InternalServerError) as caught:
        await (sdk.stream() if streamed else sdk.chat())
    assert caught.value.code == "all_providers_failed"
    assert (await stage.line())["error_type"] == "provider_timeout"
    (served,) = await stage.demo.recorded(1)
    assert served["end"] == "client_left"
