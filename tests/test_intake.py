"""Bodies as hostile and broken clients send them, over plain sockets: what is refused and how, and
that what is let in goes upstream as it was understood."""

import asyncio
import gzip
import json
import resource
from typing import Any

import pytest

from tests.conftest import Front, StartGateway
from tests.harness import MODEL, Upstream, chat
from tests.raw import (
    CANARY,
    assert_refusal,
    assert_unharmed,
    connect,
    get,
    head,
    post,
    prompt,
    refused,
)

JSON = "Content-Type: application/json"
MESSAGES = [{"role": "user", "content": CANARY}]

# -- what is no JSON object ----------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "white space": b"  \r\n ",
    "a word": CANARY.encode(),
    "cut off": prompt()[:-1],
    "trailing data": prompt() + b"x",
    "two objects": prompt() + prompt(),
    "a zero byte behind it": prompt() + b"\0",
    "a trailing comma": prompt()[:-1] + b",}",
    "single quotes": prompt().replace(b'"', b"'"),
    "a comment": prompt() + b"// " + CANARY.encode(),
    "a byte order mark": b"\xef\xbb\xbf" + prompt(),
    "UTF-16": prompt().decode().encode("utf-16"),
    "UTF-16 without a mark": prompt().decode().encode("utf-16-le"),
    "Latin-1": prompt().replace(b"canary", b"can\xe9ry"),
    "half a surrogate pair": prompt().replace(b"canary", b"\\ud800"),
    "a raw line break in a string": prompt().replace(b"canary", b"can\nary"),
    "NaN": prompt(temperature=float("nan")),
    "Infinity": prompt(temperature=float("inf")),
    "a number beyond a double": prompt(temperature=1).replace(b": 1}", b": 1e999}"),
    "an integer of 400 digits": prompt(seed=1).replace(b": 1}", b": " + b"1" * 400 + b"}"),
    "100,000 levels": b'{"model":"mock/echo","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 levels of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "600 levels": prompt(x=0).replace(b'"x": 0', b'"x": ' + b"[" * 600 + b"]" * 600),
    "an array": b"[" + prompt() + b"]",
    "a string": json.dumps(prompt().decode()).encode(),
    "a number": b"1",
    "null": b"null",
}


async def test_what_is_no_json_object_is_refused_without_repeating_it(
    front: Front, upstream: Upstream
) -> None:
    for name, body in NOT_JSON.items():
        answer = await refused(front.port, post(body, key=front.key), 400, "invalid_json")
        assert len(answer.json["error"]["message"]) < 100, name
    await assert_unharmed(front, upstream)


# -- fields --------------------------------------------------------------------------------------


def without(*names: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": MESSAGES, **fields}
    return {name: value for name, value in body.items() if name not in names}


def message(**fields: Any) -> dict[str, Any]:
    return without(messages=[MESSAGES[0], {"role": "user", **fields}])


MISSING, WRONG, REFUSED = "missing_required_parameter", "invalid_value", "unsupported_parameter"
NO_COUNTS = (0, -1, -(2**63), 1.0, 1.5, "1", True, False, [1], {}, 10**12, 2**64, 10**30)

FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, MISSING, "model"),
    (without("model"), MISSING, "model"),
    (without("messages"), MISSING, "messages"),
    *((without(model=value), WRONG, "model") for value in ("", 1, True, [], {}, "a\nb", "x" * 257)),
    (without(model=None), MISSING, "model"),
    (without(model="a\0b"), WRONG, "model"),
    (without(messages=None), MISSING, "messages"),
    *((without(messages=value), WRONG, "messages") for value in ([], {}, CANARY, 1, True)),
    *((without(messages=[value]), WRONG, "messages[0]") for value in (CANARY, 1, None, [])),
    *((message(content=value), WRONG, "messages[1].content") for value in (1, True, {}, 1.5)),
    *((message(content=[value]), WRONG, "messages[1].content[0]") for value in (1, None, [])),
    *((without(n=value), WRONG, "n") for value in (*NO_COUNTS, 129)),
    *((without(max_tokens=value), WRONG, "max_tokens") for value in NO_COUNTS),
    *((without(max_completion_tokens=v), WRONG, "max_completion_tokens") for v in NO_COUNTS),
    (without(max_tokens=5, max_completion_tokens=6), WRONG, "max_tokens"),
    *((without(stream=value), WRONG, "stream") for value in ("true", 1, 0, [], {})),
    (without(stream_options={"include_usage": True}), WRONG, "stream_options"),
    (without(stream=False, stream_options={}), WRONG, "stream_options"),
    (without(stream=True, stream_options=[]), WRONG, "stream_options"),
    (
        without(stream=True, stream_options={"include_usage": "yes"}),
        WRONG,
        "stream_options.include_usage",
    ),
    (without(tools={}), WRONG, "tools"),
]

HOSTED = ("web_search", "web_search_preview", "file_search", "code_interpreter", "mcp")

UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    *((without(service_tier=value), "service_tier") for value in ("flex", "priority", "", 1, [])),
    *((without(web_search_options=v), "web_search_options") for v in ({}, {"a": 1}, True)),
    *((without(audio=value), "audio") for value in ({}, {"voice": "alloy", "format": "mp3"})),
    *(
        (without(modalities=value), "modalities")
        for value in (["text", "audio"], ["audio"], ["image"], "audio", {"0": "audio"}, 1)
    ),
    *((without(background=value), "background") for value in (True, 1, "yes")),
    *((without(tools=[{"type": kind}]), "tools[0]") for kind in (*HOSTED, "image_generation")),
    (without(tools=[{"type": "function", "function": {}}, {"type": "computer"}]), "tools[1]"),
    (without(tools=[{"google_search": {}}]), "tools[0]"),
    (without(tools=[{"type": ["function"]}]), "tools[0]"),
    (without(tools=["web_search"]), "tools[0]"),
    (without(previous_response_id="resp_1"), "previous_response_id"),
    (without(conversation={"id": "conv_1"}), "conversation"),
    (without(prompt={"id": "pmpt_1"}), "prompt"),
    (without(item_reference="item_1"), "item_reference"),
    (without(file_id="file_1"), "file_id"),
    (
        without(extra_body={"google": {"cached_content": "cachedContents/1"}}),
        "extra_body.google.cached_content",
    ),
    (message(audio={"id": "audio_1"}), "messages[1].audio"),
    (message(content=[{"type": "input_audio", "input_audio": {}}]), "messages[1].content[0]"),
    *(
        (message(content=[{"type": "text", "text": ""}, part]), "messages[1].content[1].file_id")
        for part in (
            {"type": "file", "file": {"file_id": "file_1"}},
            {"type": "input_file", "file_id": "file_1"},
            {"type": "image_file", "image_file": {"file_id": "file_1"}},
            {"type": "file", "file": {"file_id": ""}},
        )
    ),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_wrong_field_is_named_and_its_value_is_not(
    front: Front, upstream: Upstream, stream: bool
) -> None:
    cases = [*FIELDS, *((body, REFUSED, param) for body, param in UNSUPPORTED)]
    async with connect(front.port) as peer:
        for body, code, param in cases:
            if stream and "stream" not in body and "stream_options" not in body:
                body = {**body, "stream": True}
            peer.send(post(json.dumps(body).encode(), key=front.key))
            answer = await peer.answer()
            assert_refusal(answer, 400, code, param)
            assert answer.header("connection") is None, "a wrong field is no broken framing"
    await assert_unharmed(front, upstream)


async def test_null_is_as_good_as_absent(front: Front, upstream: Upstream) -> None:
    names = ("n", "max_tokens", "max_completion_tokens", "stream", "stream_options", "tools")
    more = ("service_tier", "web_search_options", "audio", "modalities", "background", "prompt")
    body = without(**dict.fromkeys((*names, *more, "previous_response_id")))
    response = await front.chat(body)
    assert response.status == 200
    assert upstream.received[0].json == body


async def test_the_two_maxima_may_be_sent_together_when_they_agree(front: Front) -> None:
    response = await front.chat(chat(max_tokens=7, max_completion_tokens=7, n=2))
    assert response.status == 200


async def test_what_is_sent_is_what_was_parsed_and_priced(front: Front, upstream: Upstream) -> None:
    body = (
        b'{"model":"mock/dear","mod\\u0065l":"mock/echo","messages":[],"stream":true,'
        b'"n":100,"\\u006e":2,"max_tokens":9999,"messages":[{"role":"user","content":"a",'
        b'"content":"b"}],"max_tokens":5,"stre\\u0061m":false,"service_tier":"flex",'
        b'"service_tier":"auto"}'
    )
    async with connect(front.port) as peer:
        peer.send(post(body, key=front.key))
        assert (await peer.answer()).status == 200
    sent = upstream.received[0].body
    for name in (b'"model"', b'"messages"', b'"content"', b'"n"', b'"max_tokens"', b'"stream"'):
        assert sent.count(name) == 1, name
    assert json.loads(sent) == {
        "model": "mock/echo",
        "messages": [{"role": "user", "content": "b"}],
        "stream": False,
        "n": 2,
        "max_tokens": 5,
        "service_tier": "auto",
    }
    assert (await front.gateway.request_line())["model"] == "mock/echo"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"mock/echo","mod\\u0065l":"mock/none","messages":[{"content":"a"}]}',
        b'{"n":1,"\\u006e":0,"model":"mock/echo","messages":[{"content":"a"}]}',
        b'{"service_tier":"auto","servic\\u0065_tier":"flex","model":"mock/echo","messages":[{}]}',
    ],
)
async def test_a_duplicate_key_hides_nothing(front: Front, upstream: Upstream, body: bytes) -> None:
    async with connect(front.port) as peer:
        peer.send(post(body, key=front.key))
        assert (await peer.answer()).status in (400, 404)
    await assert_unharmed(front, upstream)


async def test_fields_that_nobody_here_knows_reach_the_upstream_unchanged(
    front: Front, upstream: Upstream
) -> None:
    body = chat(
        temperature=0.1,
        top_p=1.0,
        seed=18446744073709551615,
        stop=["\u0000", "\U0001f600", "\u2028"],
        extra_content={"google": {"thought_signature": "c2ln"}},
        reasoning_effort="high",
        tools=[
            {"type": "function", "function": {"name": "f", "parameters": {"x": [None, {}]}}},
            {"type": "custom", "custom": {"name": "g"}},
        ],
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
        api_base="http://127.0.0.1:1/",
        base_url="http://127.0.0.1:1/",
        fallbacks=["other"],
        user="mallory",
        a_parameter_of_next_year={"deep": [[[{"er": -0.0}]]]},
        modalities=["text"],
        service_tier="default",
        background=False,
    )
    body["messages"].append(
        {
            "role": "assistant",
            "content": None,
            "audio": None,
            "tool_calls": [{"id": "c", "type": "function", "extra_content": {"google": 1}}],
        }
    )
    body["messages"].append(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}},
                {"type": "file", "file": {"file_data": "data:,", "file_id": None}},
            ],
        }
    )
    response = await front.chat(body)
    assert response.status == 200, await response.text()
    assert upstream.received[0].json == body
    head = upstream.received[0].head
    assert b"127.0.0.1:1/" not in head and b"mallory" not in head


# -- framing, size and time ----------------------------------------------------------------------

SMALL = "[limits]\nmax_body_bytes = 4096\nbody_timeout_s = 0.5\n"


async def test_media_types_other_than_json_are_refused(front: Front, upstream: Upstream) -> None:
    body = prompt()
    length = f"Content-Length: {len(body)}"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "", "*/*"):
        data = head(f"Content-Type: {kind}", length, key=front.key) + body
        await refused(front.port, data, 415, "unsupported_media_type")
    await refused(front.port, head(length, key=front.key) + body, 415, "unsupported_media_type")
    await assert_unharmed(front, upstream)


async def test_the_media_type_may_be_written_in_any_way(front: Front) -> None:
    body = prompt()
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json ;a=b"):
        async with connect(front.port) as peer:
            peer.send(
                head(f"Content-Type: {kind}", f"Content-Length: {len(body)}", key=front.key) + body
            )
            assert (await peer.answer()).status == 200, kind


async def test_compressed_bodies_are_refused_unread(front: Front, upstream: Upstream) -> None:
    for coding in ("gzip", "deflate", "br", "zstd", "GZIP", "x-gzip", "identity, gzip", ""):
        data = post(gzip.compress(prompt()), f"Content-Encoding: {coding}", key=front.key)
        await refused(front.port, data, 415, "unsupported_media_type")
    # Half of it is on its way: the answer does not wait, and the connection ends.
    data = head(JSON, "Content-Encoding: gzip", "Content-Length: 1000", key=front.key)
    await refused(front.port, data, 415, "unsupported_media_type", closes=True)
    async with connect(front.port) as peer:
        peer.send(post(prompt(), "Content-Encoding: identity", key=front.key))
        assert (await peer.answer()).status == 200
    upstream.received.clear()
    await assert_unharmed(front, upstream)


async def test_a_declared_length_over_the_limit_is_answered_at_once(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway("[limits]\nmax_body_bytes = 4096\nbody_timeout_s = 60\n")
    loop = asyncio.get_running_loop()
    for length in (4097, 999_999_999_999, 2**63, 2**64 - 1):
        for more in ((), ("Expect: 100-continue",)):
            async with connect(front.port) as peer:
                started = loop.time()
                peer.send(head(JSON, f"Content-Length: {length}", *more, key=front.key))
                answer = await peer.answer()
                assert loop.time() - started < 0.5
                assert_refusal(answer, 413, "request_too_large")
                assert answer.header("connection") == "close"
    await assert_unharmed(front, upstream)


async def test_a_body_of_exactly_the_limit_is_let_in(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(SMALL)
    body = prompt().ljust(4096)
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with connect(front.port) as peer:
        peer.send(post(body, key=front.key))
        assert (await peer.answer()).status == 200
        peer.send(head(JSON, "Transfer-Encoding: chunked", key=front.key) + chunked)
        assert (await peer.answer()).status == 200
    upstream.received.clear()
    await refused(
        front.port, post(body + b" ", key=front.key), 413, "request_too_large", closes=True
    )
    over = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) + 1, body + b" ")
    data = head(JSON, "Transfer-Encoding: chunked", key=front.key) + over
    await refused(front.port, data, 413, "request_too_large", closes=True)
    await assert_unharmed(front, upstream)


async def test_an_endless_chunked_body_is_cut_at_the_limit(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway("[limits]\nmax_body_bytes = 1048576\n")
    piece = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    async with connect(front.port) as peer:
        peer.send(head(JSON, "Transfer-Encoding: chunked", key=front.key))
        answering = asyncio.get_running_loop().create_task(peer.answer())
        sent = 0
        while not answering.done() and await peer.flood(piece):
            sent += len(piece)
        assert_refusal(await answering, 413, "request_too_large")
        assert sent < 32 * 1024 * 1024, "what fits into the sockets' buffers, not much more"
    await assert_unharmed(front, upstream)


async def test_a_body_in_chunks_of_one_byte_is_read_in_linear_time(
    front: Front, upstream: Upstream
) -> None:
    body = prompt(padding="x" * 100_000)
    loop = asyncio.get_running_loop()
    async with connect(front.port) as peer:
        started = loop.time()
        peer.send(head(JSON, "Transfer-Encoding: chunked", key=front.key))
        peer.send(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert (await peer.answer()).status == 200
        assert loop.time() - started < 3
    assert upstream.received[0].json == json.loads(body)


async def test_a_body_that_comes_byte_by_byte_is_understood(
    front: Front, upstream: Upstream
) -> None:
    body = prompt()
    data = post(body, key=front.key)
    chunked = head(JSON, "Transfer-Encoding: chunked", key=front.key) + (
        b"%x;a=b\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(body), body)
    )
    for request in (data, chunked):
        async with connect(front.port) as peer:
            for index in range(len(request)):
                assert await peer.flood(request[index : index + 1])
                await asyncio.sleep(0)  # each byte a packet of its own: this is the test
            assert (await peer.answer()).status == 200
    assert [received.json for received in upstream.received] == [json.loads(body)] * 2


async def test_chunk_extensions_without_end_stop_at_the_time_out(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(SMALL)
    loop = asyncio.get_running_loop()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with connect(front.port) as peer:
        started = loop.time()
        peer.send(head(JSON, "Transfer-Encoding: chunked", key=front.key) + b"1;")
        answering = loop.create_task(peer.answer())
        sent = 0
        while not answering.done() and await peer.flood(b"a" * 65536):
            sent += 65536
        assert_refusal(await answering, 408, "request_timeout")
        assert loop.time() - started < 2
        assert sent > 40_000_000
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < 30_000, "they are thrown away as they come"
    await assert_unharmed(front, upstream)


@pytest.mark.parametrize("declared", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
async def test_a_slow_body_gets_408(
    start_gateway: StartGateway, upstream: Upstream, declared: str
) -> None:
    front = await start_gateway(SMALL)
    loop = asyncio.get_running_loop()
    async with connect(front.port) as peer:
        started = loop.time()
        peer.send(head(JSON, declared, key=front.key))
        answering = loop.create_task(peer.answer())
        while not answering.done():  # a byte now and then buys no more time
            peer.send(b"1\r\n \r\n" if declared.endswith("chunked") else b" ")
            await asyncio.wait([answering], timeout=0.05)
        assert 0.4 < loop.time() - started < 1.5
        answer = answering.result()
        assert_refusal(answer, 408, "request_timeout")
        assert answer.header("connection") == "close"
        assert await peer.rest() == b""
    await assert_unharmed(front, upstream)


@pytest.mark.parametrize(
    "rest", [b"zz\r\n", b"5\r\nhelloXX", b"-1\r\n", b"fffffffffffffffff\r\n", b"3\nabc\n0\n\n"]
)
@pytest.mark.parametrize("first", [b"", b"3\r\nabc\r\n"])
async def test_broken_chunks_are_told_at_once_and_end_the_connection(
    front: Front, upstream: Upstream, first: bytes, rest: bytes
) -> None:
    async with connect(front.port) as peer:
        peer.send(head(JSON, "Transfer-Encoding: chunked", key=front.key) + first)
        await asyncio.sleep(0.05)  # so that the body is waited for when its framing breaks
        peer.send(rest + get("/v1/models", key=front.key))
        answer = await peer.answer()
        assert_refusal(answer, 400, "bad_request")
        assert answer.header("connection") == "close"
        assert await peer.rest() == b""
    await assert_unharmed(front, upstream)
    assert not [line for line in await front.gateway.lines() if line["level"] == "error"]


async def test_a_broken_body_behind_another_request_is_told_too(front: Front) -> None:
    started = asyncio.get_running_loop().time()
    async with connect(front.port) as peer:
        peer.send(
            post(prompt(), key=front.key) + head(JSON, "Transfer-Encoding: chunked", key=front.key)
        )
        peer.send(b"1\r\n")
        assert (await peer.answer()).status == 200
        peer.send(b"broken")
        assert_refusal(await peer.answer(), 400, "bad_request")
    assert asyncio.get_running_loop().time() - started < 5


async def test_an_admin_body_with_broken_framing_is_no_fault_of_ours(front: Front) -> None:
    async with connect(front.port) as peer:
        peer.send(
            head(
                JSON,
                "Transfer-Encoding: chunked",
                key="an-admin-key-of-more-than-32-characters",
                line="POST /admin/users HTTP/1.1",
            )
        )
        await asyncio.sleep(0.05)
        peer.send(b"zz\r\n")
        assert_refusal(await peer.answer(), 400, "bad_request")


# -- Expect --------------------------------------------------------------------------------------


async def test_100_continue_comes_once_the_caller_is_known(
    front: Front, upstream: Upstream
) -> None:
    body = prompt()
    length = f"Content-Length: {len(body)}"
    for word in ("100-continue", "100-Continue"):
        async with connect(front.port) as peer:
            peer.send(head(JSON, length, f"Expect: {word}", key=front.key))
            assert (await peer.head())[0] == 100
            peer.send(body)
            assert (await peer.answer()).status == 200
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
    assert len(upstream.received) == 2
    assert b"xpect" not in upstream.received[0].head


async def test_whoever_is_not_known_gets_401_and_no_100(front: Front, upstream: Upstream) -> None:
    data = head(JSON, "Content-Length: 100", "Expect: 100-continue", key=front.key[:-1] + "_")
    await refused(front.port, data, 401, "invalid_api_key", closes=True)
    data = head("Content-Length: 100", "Expect: 100-continue", key=front.key)
    await refused(front.port, data, 415, "unsupported_media_type", closes=True)
    await assert_unharmed(front, upstream)


async def test_no_100_follows_a_body_that_is_there_already(front: Front) -> None:
    async with connect(front.port) as peer:
        peer.send(post(prompt(), "Expect: 100-continue", key=front.key))
        assert (await peer.answer()).status == 200


async def test_other_expectations_are_refused(front: Front, upstream: Upstream) -> None:
    for word in ("a miracle", "100-continue, a miracle", "200-ok"):
        data = post(prompt(), f"Expect: {word}", key=front.key)
        await refused(front.port, data, 417, "expectation_failed")
    data = head(JSON, "Content-Length: 10", "Expect: a miracle", key=front.key)
    await refused(front.port, data, 417, "expectation_failed", closes=True)
    await assert_unharmed(front, upstream)


async def test_http_1_0_knows_no_expectations(front: Front) -> None:
    body = prompt()
    lines = (JSON, f"Content-Length: {len(body)}", "Expect: 100-continue")
    async with connect(front.port) as peer:
        peer.send(head(*lines, key=front.key, line="POST /v1/chat/completions HTTP/1.0"))
        await asyncio.sleep(0.1)  # a wrong 100 would come now
        peer.send(body)
        assert (await peer.answer()).status == 200


# -- many at once --------------------------------------------------------------------------------


async def test_big_bodies_do_not_hold_up_small_ones(front: Front, upstream: Upstream) -> None:
    big = prompt(padding="x" * 3_000_000)

    async def send(body: bytes) -> int:
        async with connect(front.port) as peer:
            peer.send(post(body, key=front.key))
            return (await peer.answer()).status

    statuses = await asyncio.gather(*(send(big if n % 2 else prompt()) for n in range(12)))
    assert statuses == [200] * 12
    assert sorted(len(received.body) > 3_000_000 for received in upstream.received) == [
        *[False] * 6,
        *[True] * 6,
    ]
