"""Bodies on their way into the admin plane of a running gateway: size, time, expectations."""

import json

from tests.conftest import Front, StartGateway
from tests.harness import ADMIN, ADMIN_KEY
from tests.raw import connect

SOON = "[limits]\nbody_timeout_s = 0.2"


def post(*headers: str, key: str = ADMIN_KEY, path: str = "/admin/users") -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: gw", f"Authorization: Bearer {key}", *headers)
    return "\r\n".join((*lines, "Content-Type: application/json", "", "")).encode()


async def test_a_body_that_does_not_come_is_not_waited_for(start_gateway: StartGateway) -> None:
    front = await start_gateway(SOON)
    for framing in ("Content-Length: 10", "Transfer-Encoding: chunked"):
        async with connect(front.port) as peer:
            peer.send(post(framing) + (b"{" if "Length" in framing else b"1\r\n{\r\n"))
            answer = await peer.answer()
            assert (answer.status, answer.code) == (408, "request_timeout")
            assert await peer.rest() == b""


async def test_a_client_that_waits_to_be_asked_is_asked(front: Front) -> None:
    body = b'{"user_id":"bob"}'
    head = post(f"Content-Length: {len(body)}", "Expect: 100-continue")
    async with connect(front.port) as peer:
        peer.send(head)
        status, _, _ = await peer.head()
        assert status == 100
        peer.send(body)
        assert (await peer.answer()).status == 201
    # A stranger is refused before his body, and is not asked for it.
    async with connect(front.port) as peer:
        peer.send(post("Content-Length: 9", "Expect: 100-continue", key="x" * 40))
        assert (await peer.answer()).status == 401
    async with connect(front.port) as peer:
        peer.send(post("Content-Length: 9", "Expect: the-unexpected"))
        answer = await peer.answer()
        assert (answer.status, answer.code) == (417, "expectation_failed")


async def test_ten_megabytes_are_refused_before_they_have_come(front: Front) -> None:
    for framing in ("Content-Length: 10485760", "Transfer-Encoding: chunked"):
        async with connect(front.port) as peer:
            peer.send(post(framing))
            piece = b"a" * 65536
            if "chunked" in framing:
                piece = b"10000\r\n" + piece + b"\r\n"
            for _ in range(160):
                if not await peer.flood(piece):
                    break
            answer = await peer.answer()
            assert (answer.status, answer.code) == (413, "request_too_large")
    assert (await front.client.get("/admin/users", headers=ADMIN)).status == 200


async def test_a_compressed_body_is_refused(front: Front) -> None:
    sent = await front.client.post(
        "/admin/users", data=b"x", headers={**ADMIN, "Content-Encoding": "gzip"}
    )
    assert sent.status == 415


async def test_what_comes_twice_at_once_is_made_once(front: Front) -> None:
    """Two connections, one Idempotency-Key, not one awaited before the other."""
    body = json.dumps({"email": "bob@example.org"}).encode()
    head = post(f"Content-Length: {len(body)}", "Idempotency-Key: 7f")
    async with connect(front.port) as one, connect(front.port) as two:
        for peer in (one, two):
            peer.send(head + body)
        answers = [await peer.answer() for peer in (one, two)]
    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].json == answers[1].json
    replayed = [answer.header("Idempotency-Replayed") for answer in answers]
    assert sorted(replayed, key=str) == [None, "true"]
