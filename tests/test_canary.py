"""Secrets: what a key, a token, a prompt and an answer must never be found in again.

Each request carries strings that occur nowhere else; afterwards everything the gateway has
written or told is searched for them.
"""

import asyncio
import base64
import json
import logging

from tests.conftest import Front, StartGateway
from tests.harness import (
    ADMIN,
    ADMIN_KEY,
    ANSWER,
    Received,
    Script,
    Upstream,
    Wire,
    chat,
    delta,
    event,
    events,
    make_key,
)
from tests.raw import connect, get, head, post
from tests.scene import (
    CHUNKED,
    asked,
    assert_nothing_left,
    in_chunks,
    sends,
    stay_silent,
    stream_then_wait,
    until,
)

TOKEN = "canary-token-5b1f7c/with+signs=="
PROMPT = "canary-prompt-93ad"
REPLY = "canary-answer-77e0"


def answers(body: bytes, status: str = "200 OK", more: str = "") -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.answer(body, status, more)

    return script


def echoing_errors() -> list[Script]:
    """Error answers of all kinds with the token in them, plainly and in disguise."""
    scripts = []
    plain = {"message": f"bad {TOKEN}", "type": "t", "param": TOKEN, "code": TOKEN}
    for status in ("400 Bad", "401 No", "403 No", "404 No", "422 No", "429 No", "500 No", "503 No"):
        for value in (
            {"error": plain},
            {"error": {"message": f"Bearer {TOKEN}"}},
            {"error": TOKEN},
            {"success": False, "error": [{"code": 2009, "message": TOKEN}]},
            {"success": False, "errors": [{"code": 4711, "message": TOKEN}]},
            [TOKEN],
        ):
            body = json.dumps(value)
            escaped = body.replace("/", "\\/").replace("5b1f7c", "5b1f\\u0037c")
            scripts += [answers(body.encode(), status), answers(escaped.encode(), status)]
        scripts.append(answers(f"<h1>{TOKEN}</h1>".encode(), status))
    first = event({"error": {"message": f"no {TOKEN} for {PROMPT}", "code": 400}})
    scripts.append(sends(CHUNKED + in_chunks([first])))
    scripts.append(answers(json.dumps({"error": {"message": TOKEN, "code": 400}}).encode()))
    return scripts


def needles(secret: str) -> list[bytes]:
    """A secret as it is, and as what somebody might have made of it."""
    raw = secret.encode()
    return [
        raw,
        raw[: len(raw) * 2 // 3],
        raw[len(raw) // 3 :],
        base64.b64encode(raw),
        raw.hex().encode(),
    ]


async def test_no_secret_is_found_in_what_is_written_or_told(
    start_gateway: StartGateway, upstream: Upstream
) -> None:
    front = await start_gateway(UPSTREAM_TOKEN=TOKEN)
    told: list[bytes] = []

    async def ask_for(stream: bool, script: Script) -> int:
        upstream.script = script
        fields = {"messages": [{"role": "user", "content": PROMPT}], "user": PROMPT}
        response = await front.chat(chat(stream, **fields))
        told.append(str(response.headers).encode() + await response.read())
        status: int = response.status
        return status

    whole = json.dumps(ANSWER).replace("Hello.", REPLY).encode()
    full_stream = sends(CHUNKED + in_chunks(events(REPLY, "more")))
    # It works, and what is received is what is sent: the search below would find something.
    assert await ask_for(False, answers(whole)) == 200
    assert REPLY.encode() in told.pop()
    assert await ask_for(True, full_stream) == 200
    assert REPLY.encode() in told.pop()
    assert TOKEN.encode() in upstream.received[0].head

    for script in echoing_errors():
        for stream in (False, True):
            assert await ask_for(stream, script) >= 400
    for answer in told:
        assert PROMPT.encode() not in answer
    # Broken off, and broken in form: after the commit, before it, in HTTP itself.
    for script in (
        sends(CHUNKED + in_chunks([delta(REPLY), REPLY.encode()])[:-5], then=Wire.reset),
        sends(CHUNKED + in_chunks([delta(REPLY)])[:-5] + REPLY.encode() + b"\r\n"),
        sends(f"{REPLY} {TOKEN}\r\n\r\n".encode(), then=Wire.hang_up),
        sends(f"HTTP/1.1 200 OK\r\nBad Header {TOKEN}: 1\r\n\r\n".encode()),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + REPLY.encode()[:9]),
        answers(json.dumps({"choices": REPLY, "token": TOKEN}).encode()),
    ):  # fmt: skip
        await ask_for(True, script)
        await ask_for(False, script)
    await malformed_requests(front, told)
    await clients_that_leave(front, upstream)
    await other_routes(front, told)

    await front.gateway.lines("Attempting provider")  # debug lines are on
    metrics = await (await front.client.get("/metrics", headers=ADMIN)).read()
    database = front.gateway.database
    files = sorted(database.parent.glob(f"{database.name}*"))
    assert [file.suffix for file in files if file.suffix in (".db-wal", ".db-shm")]
    stored = b"".join(file.read_bytes() for file in files)
    assert b"alice" in stored
    await front.gateway.close()
    written = front.gateway.written.getvalue().encode()
    assert b"alice" in written
    stored += b"".join(file.read_bytes() for file in files if file.exists())

    key = front.key[17:49]  # the secret part: what is before it tells keys apart
    places = {"log": written, "metrics": metrics, "database": stored}
    for place, text in places.items():
        for secret in (TOKEN, PROMPT, REPLY, key, front.key, ADMIN_KEY):
            for needle in needles(secret):
                assert needle not in text, (place, needle)
    for answer in told:
        for secret in (TOKEN, key, ADMIN_KEY):
            assert not any(needle in answer for needle in needles(secret)[:3]), answer


async def malformed_requests(front: Front, told: list[bytes]) -> None:
    """What aiohttp's parser or ours refuses, with the key and the prompt in it."""
    body = json.dumps(chat(messages=[{"role": "user", "content": PROMPT}])).encode()
    good = post(body, key=front.key)
    requests = [
        good.replace(b"Content-Length: ", b"Content-Length: x"),
        good.replace(b"\r\n", b"\r\nBad Header\x00: " + PROMPT.encode() + b"\r\n", 1),
        good.replace(b"HTTP/1.1", b"HTTP/9.9", 1),
        good.replace(b"POST ", b"PO\x01ST ", 1),
        good.replace(b"application/json", PROMPT.encode()),
        post(body.replace(b'"messages"', b'"mess'), key=front.key),
        good.replace(b"/v1/chat", f"/{PROMPT}/{front.key}".encode(), 1),
        post(body.replace(b"mock/echo", b"no/such"), key=front.key),
        good.replace(front.key.encode(), front.key.encode()[:-1] + b"~"),
        good.replace(b"\r\n", b"\r\nTransfer-Encoding: chunked\r\n", 1),
        post(b'{"model":"' + PROMPT.encode() + b'"', key=front.key),
        post(json.dumps(chat(n=PROMPT)).encode(), key=front.key),
        post(json.dumps(chat(**{PROMPT: PROMPT, "tools": PROMPT})).encode(), key=front.key),
        get(f"/v1/models/{PROMPT}?key={front.key}", key=front.key),
        get(f"/admin/users/{PROMPT}", key=front.key),
        head(f"x-{PROMPT}: " + PROMPT * 5_000, key=front.key),
        f"{PROMPT} {front.key}\r\n\r\n".encode(),
    ]
    for request in requests:
        async with connect(front.port) as peer:
            peer.send(request)
            answer = await peer.answer()
            assert answer.status >= 400, request
            told.append(str(answer.fields).encode() + answer.body)


async def clients_that_leave(front: Front, upstream: Upstream) -> None:
    """Before anything came, and in the middle."""
    before = len(upstream.received)
    for number, script in enumerate((stay_silent, stream_then_wait(delta(REPLY))), start=1):
        upstream.script = script
        message = {"role": "user", "content": PROMPT}
        async with asked(front, messages=[message]) as peer:
            await until(lambda: len(upstream.received) == before + number)  # noqa: B023
            if number == 2:
                await peer.head()
            peer.reset()
        await assert_nothing_left(front, upstream)


async def other_routes(front: Front, told: list[bytes]) -> None:
    """Whatever else shows something of keys and requests."""
    await make_key(front.client, "alice", name="second")
    for path in ("/admin/users/alice/api-keys", "/admin/users/alice", "/admin/users"):
        response = await front.client.get(path, headers=ADMIN)
        told.append(await response.read())
    for path in ("/v1/models", "/health", "/health/ready"):
        response = await front.client.get(path, headers={"Authorization": f"Bearer {front.key}"})
        told.append(await response.read())


async def test_a_library_that_logs_what_it_could_not_read_is_kept_quiet(
    front: Front, upstream: Upstream
) -> None:
    """aiohttp logs a malformed request whole, through the logging module, unless it is kept."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    keep = Keep()
    logging.getLogger().addHandler(keep)
    try:
        await malformed_requests(front, [])
        upstream.script = sends(f"{PROMPT}\r\n\r\n".encode(), then=Wire.hang_up)
        await front.chat(chat())
        await asyncio.sleep(0)
    finally:
        logging.getLogger().removeHandler(keep)
    text = "".join(record.getMessage() + str(record.exc_info) for record in records)
    assert PROMPT not in text and front.key not in text
