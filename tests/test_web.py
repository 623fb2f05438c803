"""The listener over plain sockets: routes, methods, versions, limits, time-outs, the way out."""

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from gwproxy.app import App
from tests.conftest import Front, StartGateway
from tests.harness import (
    ADMIN_KEY,
    ANSWER,
    DONE,
    MODEL,
    Received,
    Upstream,
    Wire,
    delta,
    event,
    events,
)
from tests.raw import (
    CANARY,
    CHAT,
    Answered,
    Peer,
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

# -- routes and methods --------------------------------------------------------------------------


async def test_a_path_below_an_apis_own_is_not_found_in_that_apis_words(front: Front) -> None:
    for path, shape in (("messages/count_tokens", "error"), ("responses/x", None)):
        response = await front.client.post(f"/v1/{path}", json={})
        assert response.status == 404
        answer = await response.json()
        assert (answer.get("type"), "There is no such route" in answer["error"]["message"]) == (
            shape,
            True,
        )


async def test_a_path_of_the_admin_plane_that_is_none_is_sent_to_its_description(
    front: Front,
) -> None:
    for path, words in (("/admin/nope", "/admin/openapi.json"), ("/nope", "under /v1")):
        answer = await (await front.client.get(path)).json()
        assert words in answer["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v1/nothing",
        "/v2/models",
        "/V1/models",
        "/v1/models/",
        "//v1/models",
        "/v1//models",
        "/v1/../v1/models",
        "/v1/./models",
        "/x/../v1/models",
        "/v1/%2e%2e/v1/models",
        "/v1/%6dodels",
        "/v1%2fmodels",
        "/v1/models;x=1",
        "/v1/models.json",
        "/v1/models%20",
        "/v1/models%00",
        "/v1\\models",
        "/v1/chat/completions/",
        "/chat",
        "/health/",
        "/metrics/",
        "/admin",
        "/admin/users/",
        "/v1/models#fragment",
        "http://gateway/v1/models",
        "http://127.0.0.1:1/v1/models",
    ],
)
async def test_a_path_is_matched_as_it_was_sent_or_not_at_all(front: Front, path: str) -> None:
    for key in (front.key, None):
        answer = await refused(front.port, get(path, key=key), 404, "not_found")
        assert path.strip("/") == "" or len(path) < 4 or path.encode() not in answer.body


async def test_a_models_name_is_decoded_once(front: Front) -> None:
    async with connect(front.port) as peer:
        for path in ("mock/echo", "mock%2Fecho", "mock%2fecho", "%6d%6f%63%6b%2Fecho?a=b"):
            peer.send(get(f"/v1/models/{path}", key=front.key))
            answer = await peer.answer()
            assert (answer.status, answer.json["id"]) == (200, MODEL), path
        for path in ("mock%252Fecho", "mock/echo/", "mock/../mock/echo", "%ff%00", CANARY, "/"):
            peer.send(get(f"/v1/models/{path}", key=front.key))
            assert_refusal(await peer.answer(), 404, "model_not_found", "model")


async def test_a_wrong_method_is_told_the_right_ones(front: Front) -> None:
    cases = [
        ("GET", CHAT, "POST"),
        ("DELETE", CHAT, "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("TRACE", CHAT, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("TRACE", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/mock/echo", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("PROPFIND", "/health", "GET, HEAD"),
    ]
    for method, path, allowed in cases:
        for key in (front.key, None):
            data = get(path, f"X-Secret: {CANARY}", key=key, method=method)
            answer = await refused(front.port, data, 405, "method_not_allowed")
            assert answer.header("allow") == allowed, (method, path)
    await refused(front.port, get("*", method="OPTIONS"), 404, "not_found")


async def test_a_head_is_answered_like_a_get_without_the_body(front: Front) -> None:
    cases = [
        ("/health", None),
        ("/health/ready", None),
        ("/v1/models", front.key),
        ("/v1/models/mock/echo", front.key),
        ("/v1/models/none", front.key),
        ("/v1/models", None),
        ("/admin/users", ADMIN_KEY),
        ("/metrics", None),
    ]
    async with connect(front.port) as peer:
        for path, key in cases:
            peer.send(get(path, key=key))
            whole = await peer.answer()
            peer.send(get(path, key=key, method="HEAD"))
            answer = await peer.answer(to_head=True)
            assert answer.status == whole.status, path
            volatile = ("x-request-id", "date")
            assert [field for field in answer.fields if field[0].lower() not in volatile] == [
                field for field in whole.fields if field[0].lower() not in volatile
            ]
            assert answer.header("content-length") == str(len(whole.body))
        peer.send(get(CHAT, key=front.key, method="HEAD"))
        answer = await peer.answer(to_head=True)
        assert (answer.status, answer.header("allow")) == (405, "POST")
        peer.send(get("/health"))
        assert (await peer.answer()).body == b'{"status":"ok"}'


async def test_who_may_not_use_an_admin_route_learns_nothing_of_it(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway()
    for method in ("GET", "POST", "DELETE", "PATCH", "TRACE", "HEAD"):
        for key in (None, front.key):
            async with connect(front.port) as peer:
                peer.send(get("/admin/users", key=key, method=method))
                answer = await peer.answer(to_head=method == "HEAD")
                if method == "HEAD":
                    assert answer.status in (401, 429)
                    continue
                # Guesses from one address end in a pause; the wrong door looks the same.
                code = "invalid_api_key" if answer.status == 401 else "rate_limit_exceeded"
                assert_refusal(answer, 401 if answer.status == 401 else 429, code)
                assert answer.header("allow") is None


async def test_each_key_opens_its_own_side_only(front: Front, upstream: Upstream) -> None:
    for path in ("/admin/users", "/admin/organizations", "/metrics"):
        await refused(front.port, get(path, key=front.key), 401, "invalid_api_key")
        await refused(front.port, get(path), 401, "invalid_api_key")
    for path in ("/v1/models", "/v1/models/mock/echo"):
        await refused(front.port, get(path, key=ADMIN_KEY), 401, "invalid_api_key")
        await refused(front.port, get(path), 401, "invalid_api_key")
    await refused(front.port, post(prompt(), key=ADMIN_KEY), 401, "invalid_api_key")
    await refused(front.port, post(prompt(), key=None), 401, "invalid_api_key")
    async with connect(front.port) as peer:
        peer.send(get("/metrics", key=ADMIN_KEY))
        answer = await peer.answer()
        assert answer.status == 200 and b"gwproxy_" in answer.body
        assert answer.header("server") == "gwproxy"
    await assert_unharmed(front, upstream)


async def test_metrics_may_be_left_open(start_gateway: StartGateway) -> None:
    front = await start_gateway("[metrics]\nopen = true\n")
    async with connect(front.port) as peer:
        peer.send(get("/metrics"))
        assert (await peer.answer()).status == 200


async def test_a_key_in_the_query_is_no_key_and_is_not_logged(
    front: Front, upstream: Upstream
) -> None:
    for name in ("api_key", "key", "api-key", "access_token", "Authorization"):
        data = post(prompt(), key=None, path=f"{CHAT}?{name}={front.key}")
        await refused(front.port, data, 401, "invalid_api_key")
    await refused(front.port, get(f"/v1/models?key={front.key}"), 401, "invalid_api_key")
    await refused(front.port, get(f"/{front.key}/{CANARY}"), 404, "not_found")
    await assert_unharmed(front, upstream)


async def test_two_credentials_are_none(front: Front, upstream: Upstream) -> None:
    other = front.key[:-1] + ("a" if front.key[-1] != "a" else "b")
    for more in (
        f"Authorization: Bearer {front.key}",
        f"Authorization: Bearer {other}",
        "Authorization: Basic YTpi",
        f"x-api-key: {other}",
        f"api-key: {CANARY}",
    ):
        await refused(front.port, post(prompt(), more, key=front.key), 401, "invalid_api_key")
    await assert_unharmed(front, upstream)


async def test_every_answer_names_the_request_and_the_server(front: Front) -> None:
    seen = set()
    async with connect(front.port) as peer:
        for data in (
            get("/health"),
            get("/v1/models", key=front.key),
            get("/admin/users", key=ADMIN_KEY),
            get("/nothing"),
            post(prompt(), key=front.key),
            post(prompt(stream=True), key=front.key),
        ):
            peer.send(data)
            answer = await peer.answer()
            assert answer.header("server") == "gwproxy"
            assert "python" not in str(answer.fields).lower()
            seen.add(answer.header("x-request-id"))
    assert len(seen) == 6 and None not in seen


# -- pipelining, HTTP/1.0, half-closed -----------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order(front: Front, upstream: Upstream) -> None:
    bad = post(b"{", key=front.key)
    good = post(prompt(), key=front.key)
    stream = post(prompt(stream=True), key=front.key)
    async with connect(front.port) as peer:
        peer.send(bad + good + stream + get("/nothing") + bad + stream + get("/health"))
        statuses = [(await peer.answer()).status for _ in range(7)]
        assert statuses == [400, 200, 200, 404, 400, 200, 200]
    assert len(upstream.received) == 3


async def test_hundreds_of_pipelined_requests_are_all_answered(front: Front) -> None:
    async with connect(front.port) as peer:
        peer.send(get("/health") * 500)
        for _ in range(500):
            assert (await peer.answer()).body == b'{"status":"ok"}'


async def test_each_pipelined_request_needs_its_own_key(front: Front, upstream: Upstream) -> None:
    async with connect(front.port) as peer:
        peer.send(get("/v1/models", key=front.key) + get("/v1/models") + post(prompt(), key=None))
        assert (await peer.answer()).status == 200
        assert_refusal(await peer.answer(), 401, "invalid_api_key")
        assert_refusal(await peer.answer(), 401, "invalid_api_key")
    await assert_unharmed(front, upstream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_http_1_0_is_served_without_chunks(front: Front, stream: bool, keep: bool) -> None:
    body = prompt(stream=stream)
    lines = [JSON, f"Content-Length: {len(body)}", *(["Connection: keep-alive"] if keep else [])]
    async with connect(front.port) as peer:
        peer.send(head(*lines, key=front.key, line=f"POST {CHAT} HTTP/1.0", host=False) + body)
        answer = await peer.answer()
        assert answer.status == 200
        assert answer.header("transfer-encoding") is None
        if stream:
            assert answer.body == b"".join([*events("Hel", "lo.")[:-2], DONE])
            assert answer.header("connection") == "close", "a body without length ends with it"
        else:
            assert answer.json == ANSWER
            assert answer.header("connection") == ("keep-alive" if keep else "close")
        if keep and not stream:
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
        else:
            assert await peer.rest() == b""


async def test_a_client_that_asks_for_it_is_left_after_the_answer(
    front: Front, upstream: Upstream
) -> None:
    for data, status in (
        (post(prompt(), "Connection: close", key=front.key), 200),
        (post(prompt(stream=True), "Connection: close", key=front.key), 200),
        (get("/health", "Connection: close"), 200),
        (get("/nothing", "Connection: close"), 404),
    ):
        async with connect(front.port) as peer:
            peer.send(data)
            answer = await peer.answer()
            assert (answer.status, answer.header("connection")) == (status, "close")
            peer.send(post(prompt(), key=front.key))
            assert await peer.rest() == b"", "what comes after it is no request"
    assert len(upstream.received) == 2
    # In one packet the parser takes neither: what came after the end was no request either.
    data = get("/health", "Connection: close") + post(prompt(), key=front.key)
    await refused(front.port, data, 400, "bad_request", closes=True)
    assert len(upstream.received) == 2


async def test_a_half_closed_connection_counts_as_a_client_that_left(
    front: Front, upstream: Upstream
) -> None:
    gone = asyncio.Event()

    async def hang(wire: Wire, received: Received) -> None:
        await wire.start()
        await wire.chunk(delta("Hel"))
        await wire.reader.read()
        gone.set()

    upstream.script = hang
    async with connect(front.port) as peer:
        peer.send(post(prompt(stream=True), key=front.key))
        assert (await peer.head())[0] == 200
        peer.half_close()
        await peer.rest()
        async with asyncio.timeout(5):
            await gone.wait()
    assert (await front.gateway.request_line())["outcome"] == "client_left"


# -- heads ---------------------------------------------------------------------------------------


async def test_heads_that_are_too_large_get_431(front: Front, upstream: Upstream) -> None:
    key = front.key
    cases = {
        "one field of 64 KB": get("/health", f"X-A: {CANARY * 5500}", key=key),
        "one name of 9 KB": get("/health", f"X-{'a' * 9000}: b", key=key),
        "64 KB in 65 fields": get("/health", *(f"X-{n}: {'a' * 1000}" for n in range(65)), key=key),
        "just over the limit": get("/health", *(f"X-{n}: {'a' * 8000}" for n in range(5))),
        "200 fields": get("/health", *(f"X-{n}: a" for n in range(200)), key=key),
        "20,000 fields": get("/health", *(f"X-{n}: a" for n in range(20_000)), key=key),
        "a path of 9 KB": get(f"/v1/models/{'a' * 9000}", key=key),
        "a query of 9 KB": get(f"/v1/models?{CANARY * 800}", key=key),
        "a key of 9 KB": get("/v1/models", key=CANARY * 800),
    }

    async def check(data: bytes) -> None:
        await refused(front.port, data, 431, "request_too_large", closes=True)

    async with asyncio.TaskGroup() as group:
        for data in cases.values():
            group.create_task(check(data))
    await assert_unharmed(front, upstream)


async def test_a_head_within_the_limits_is_served(front: Front) -> None:
    cookies = [f"X-{n}: {'a' * 7000}" for n in range(4)]
    async with connect(front.port) as peer:
        peer.send(get("/health", *cookies) + get("/health", *(f"X-{n}: a" for n in range(100))))
        assert (await peer.answer()).status == 200
        assert (await peer.answer()).status == 200


async def test_an_endless_header_is_cut_off_and_the_answer_arrives(front: Front) -> None:
    async with connect(front.port) as peer:
        peer.send(b"GET /health HTTP/1.1\r\nX-A: ")
        answering = asyncio.get_running_loop().create_task(peer.answer())
        while not answering.done() and await peer.flood(b"a" * 65536):
            pass
        assert_refusal(await answering, 431, "request_too_large")
        for _ in range(4):
            # A client that is still sending would lose the answer to a reset.
            assert await peer.flood(b"a" * 65536)
            await asyncio.sleep(0.05)
        assert await peer.rest() == b""


SLOW = "[limits]\nheader_timeout_s = 0.3\nkeepalive_timeout_s = 1.2\n"


@pytest.mark.parametrize(
    "begun", [b"", b"GET /", b"\r\nGET /", b"POST / HTTP/1.1\r\nHost: a\r\nX-A: "]
)
async def test_a_head_that_does_not_come_closes_the_connection(
    start_gateway: StartGateway, begun: bytes
) -> None:
    front = await start_gateway(SLOW)
    loop = asyncio.get_running_loop()
    async with connect(front.port) as slow, connect(front.port) as busy:
        started = loop.time()
        if begun:
            slow.send(begun)
        ended = loop.create_task(slow.rest())
        while not ended.done():
            if begun:
                slow.send(b"a")  # a byte now and then buys no more time
            busy.send(get("/health"))
            assert (await busy.answer()).status == 200, "others do not notice"
            await asyncio.wait([ended], timeout=0.05)
        assert ended.result() == b""
        assert 0.2 < loop.time() - started < 1.0


async def test_a_slow_second_head_closes_too_and_an_idle_connection_lives_longer(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway(SLOW)
    loop = asyncio.get_running_loop()
    async with connect(front.port) as slow, connect(front.port) as idle:
        for peer in (slow, idle):
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
        slow.send(b"GET /he")
        started = loop.time()
        assert await slow.rest() == b""
        assert loop.time() - started < 1.0
        assert await idle.rest() == b""
        assert 0.9 < loop.time() - started < 2.5


async def test_a_slow_answer_is_no_slow_head(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(SLOW)

    async def slow(wire: Wire, received: Received) -> None:
        await asyncio.sleep(1.0)
        await wire.answer(json.dumps(ANSWER).encode())

    upstream.script = slow
    body = prompt()
    async with connect(front.port) as peer:
        # Body and head in two packets: the second must not look like the head of a next request.
        peer.send(post(body, key=front.key)[: -len(body)])
        await asyncio.sleep(0.05)
        peer.send(body)
        assert (await peer.answer()).status == 200


async def test_a_slow_body_outlives_the_time_for_heads(start_gateway: StartGateway) -> None:
    front = await start_gateway(SLOW)
    body = prompt().ljust(300_000)
    async with connect(front.port) as peer:
        # So much that part of the body is read before the request's task has begun.
        peer.send(post(body, key=front.key)[:-4])
        for index in range(4):
            await asyncio.sleep(0.2)
            peer.send(body[-4 + index :][:1])
        assert (await peer.answer()).status == 200


# -- too many connections ------------------------------------------------------------------------


async def test_a_connection_too_many_gets_503(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway("[limits]\nmax_connections = 8\n")
    await front.client.session.close()
    async with AsyncExitStack() as stack:

        async def dial() -> Peer:
            return await stack.enter_async_context(connect(front.port))

        served: list[Peer] = []
        async with asyncio.timeout(5):
            while len(served) < 8:  # until the client's own connection is gone
                peer = await dial()
                peer.send(get("/health"))
                if (await peer.answer()).status == 200:
                    served.append(peer)
        for speaks in (False, True):
            peer = await dial()
            if speaks:
                peer.send(post(prompt(), key=front.key))
            answer = await peer.answer()
            assert_refusal(answer, 503, "overloaded")
            assert answer.header("retry-after") == "1"
            assert answer.header("connection") == "close"
            assert await peer.rest() == b""
        for peer in served:
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200, "those who came first are served on"
        served[0].reset()
        async with asyncio.timeout(5):
            while True:
                peer = await dial()
                peer.send(get("/health"))
                if (await peer.answer()).status == 200:
                    break
    assert upstream.received == []


async def test_a_burst_of_connections_does_not_pass_the_limit(start_gateway: StartGateway) -> None:
    front = await start_gateway("[limits]\nmax_connections = 20\n")

    async def try_one() -> int:
        async with connect(front.port) as peer:
            peer.send(get("/health"))
            answer = await peer.answer()
            while not all_answered.is_set():
                answered.append(answer.status)
                if len(answered) == 100:
                    all_answered.set()
                await all_answered.wait()
            return answer.status

    answered: list[int] = []
    all_answered = asyncio.Event()
    statuses = await asyncio.gather(*(try_one() for _ in range(100)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) in (19, 20), "one may be the client's own connection"


async def test_a_crowd_beyond_the_limit_is_gone_soon(start_gateway: StartGateway) -> None:
    front = await start_gateway("[limits]\nmax_connections = 8\nheader_timeout_s = 1.5\n")

    async with connect(front.port) as served, AsyncExitStack() as stack:
        served.send(get("/health"))
        assert (await served.answer()).status == 200
        # None of them hangs up by itself.
        crowd = [await stack.enter_async_context(connect(front.port)) for _ in range(500)]
        async with asyncio.timeout(5):
            heard = await asyncio.gather(*(peer.rest() for peer in crowd))
        told = [text for text in heard if text.startswith(b"HTTP/1.1 503")]
        assert 200 < len(told) < 400, "some are told, and the flood is just hung up on"
        assert set(heard) - set(told) == {b""}
        served.send(get("/health"))
        assert (await served.answer()).status == 200


# -- the way out ---------------------------------------------------------------------------------


class Slow:
    """A stream that goes on when the test says so."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.gone = asyncio.Event()

    async def __call__(self, wire: Wire, received: Received) -> None:
        first, *rest = events("Hel", "lo.")
        await wire.start()
        await wire.chunk(first)
        self.begun.set()
        waiting = asyncio.get_running_loop().create_task(self.go_on.wait())
        left = asyncio.get_running_loop().create_task(wire.reader.read())
        await asyncio.wait([waiting, left], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if left.done():
            self.gone.set()
            return
        left.cancel()
        for data in rest:
            await wire.chunk(data)
        await wire.end()


def stopping(app: App | None) -> "asyncio.Task[None]":
    assert app is not None
    return asyncio.get_running_loop().create_task(app.stop())


async def test_a_running_stream_ends_whole_while_new_requests_are_sent_away(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    slow = Slow()
    upstream.script = slow
    async with (
        connect(front.port) as streaming,
        connect(front.port) as waiting,
        connect(front.port) as asking,
        connect(front.port) as probing,
    ):
        for peer in (waiting, asking, probing):
            peer.send(get("/health"))
            assert (await peer.answer()).status == 200
        streaming.send(post(prompt(stream=True), key=front.key))
        await slow.begun.wait()
        stop = stopping(front.gateway.app)
        await asyncio.sleep(0)

        probing.send(get("/health/ready"))
        answer = await probing.answer()
        assert (answer.status, answer.json["status"]) == (503, "draining")
        probing.send(get("/health/live"))
        assert (await probing.answer()).status == 200
        for peer, data in (
            (waiting, post(prompt(), key=front.key)),
            (asking, get("/v1/models", key=front.key)),
        ):
            peer.send(data)
            answer = await peer.answer()
            assert_refusal(answer, 503, "draining")
            assert answer.header("retry-after") == "1"
            assert answer.header("connection") == "close"
            assert await peer.rest() == b""

        slow.go_on.set()
        answer = await streaming.answer()
        assert answer.body == b"".join([*events("Hel", "lo.")[:-2], DONE])
        async with asyncio.timeout(5):
            await stop
    assert len(upstream.received) == 1


async def test_a_stream_longer_than_the_drain_ends_with_an_error_event(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway()
    slow = Slow()
    upstream.script = slow
    async with connect(front.port) as peer:
        peer.send(post(prompt(stream=True), key=front.key))
        await slow.begun.wait()
        started = asyncio.get_running_loop().time()
        await stopping(front.gateway.app)
        assert 0.9 < asyncio.get_running_loop().time() - started < 3
        answer: Answered = await peer.answer()
        first, last = answer.body.removesuffix(b"\n\n").split(b"\n\n")
        assert first + b"\n\n" == delta("Hel")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"
        assert event("[DONE]") not in answer.body
        async with asyncio.timeout(5):
            await slow.gone.wait()
        assert await peer.rest() == b""
    line = await front.gateway.request_line()
    assert line["outcome"] in ("truncated", "cut") and line["tokens"]["output"] >= 1


async def test_stopping_an_idle_gateway_is_quick_and_closes_its_connections(
    start_gateway: StartGateway,
) -> None:
    front = await start_gateway()
    async with connect(front.port) as peer, connect(front.port) as silent:
        peer.send(get("/health"))
        assert (await peer.answer()).status == 200
        started = asyncio.get_running_loop().time()
        await stopping(front.gateway.app)
        assert asyncio.get_running_loop().time() - started < 0.9
        assert await peer.rest() == b""
        assert await silent.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        async with connect(front.port):
            pass
