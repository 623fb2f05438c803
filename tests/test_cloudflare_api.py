"""The management API's client against the demo gateway: what it asks again, and what it says."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from gwproxy.cloudflare.api import TRIES, Api, Refused, session
from gwproxy.cloudflare.words import curl, explain
from gwproxy.demo import DemoUpstream
from tests.account import TOKEN


class Waits(list[float]):
    """What it would have slept."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest_asyncio.fixture
async def demo() -> AsyncIterator[DemoUpstream]:
    demo = DemoUpstream(token=TOKEN)
    await demo.start()
    yield demo
    await demo.stop()


@pytest_asyncio.fixture
async def waits() -> Waits:
    return Waits()


@pytest_asyncio.fixture
async def api(demo: DemoUpstream, waits: Waits) -> AsyncIterator[Api]:
    async with session(None) as made:
        yield Api(made, demo.api_url, "demo", TOKEN, sleep=waits)


@pytest.mark.parametrize("fault", ["status-429", "status-503", "reset", "garbage"])
async def test_what_may_pass_is_asked_again(
    api: Api, demo: DemoUpstream, waits: Waits, fault: str
) -> None:
    demo.management.fault({"on": "gateways", "fault": fault, "count": 4 if fault == "reset" else 2})
    assert [row["id"] for row in await api.gateways()] == ["demo"]
    assert waits == [0.5, 1.0]


async def test_retry_after_is_honoured_up_to_a_minute(
    api: Api, demo: DemoUpstream, waits: Waits
) -> None:
    demo.management.fault({"on": "gateways", "fault": "status-429", "retry_after_s": 7})
    await api.gateways()
    demo.management.fault({"on": "gateways", "fault": "status-429", "retry_after_s": 300})
    with pytest.raises(Refused):
        await api.gateways()
    assert waits == [7.0]


async def test_it_gives_up_after_some_tries(api: Api, demo: DemoUpstream, waits: Waits) -> None:
    demo.management.fault({"on": "gateways", "fault": "status-500", "count": 0})
    with pytest.raises(Refused) as refused:
        await api.gateways()
    assert len(waits) == TRIES - 1
    assert refused.value.fault.status == 500
    assert "cloudflarestatus" in refused.value.fault.cure


async def test_a_change_is_never_made_twice(api: Api, demo: DemoUpstream, waits: Waits) -> None:
    demo.management.fault({"on": "provider_configs", "fault": "status-503"})
    with pytest.raises(Refused) as refused:
        await api.store_key("demo", "openai", "second", "sk-secret-of-somebody")
    assert waits == []
    assert "sk-secret" not in refused.value.curl + str(refused.value)
    assert [row for row in await api.provider_keys("demo") if row["alias"] == "second"] == []


@pytest.mark.parametrize(
    ("fault", "says", "cure"),
    [
        ("edge", "took this machine for a bot", "another network"),
        ("code-10000", "does not know the token", "AI Gateway Run, Read and Edit"),
        ("code-9106", "malformed", "copy it again"),
        ("status-404", "nothing at this address", "check account"),
    ],
)
async def test_what_is_final_is_told_at_once_with_its_cure(
    api: Api, demo: DemoUpstream, waits: Waits, fault: str, says: str, cure: str
) -> None:
    demo.management.fault({"on": "gateways", "fault": fault})
    with pytest.raises(Refused) as refused:
        await api.gateways()
    assert waits == []
    assert says in refused.value.fault.cause
    assert cure in refused.value.fault.cure
    assert "$CLOUDFLARE_API_TOKEN" in refused.value.curl
    assert TOKEN not in refused.value.curl


async def test_a_token_without_the_permission_is_told_from_an_unknown_one(
    api: Api, demo: DemoUpstream
) -> None:
    demo.management.tokens = {TOKEN: frozenset({"run"})}
    with pytest.raises(Refused, match="may not do this"):
        await api.gateways()
    demo.management.tokens = {"other": frozenset({"run"})}
    with pytest.raises(Refused, match="does not know the token"):
        await api.verify_token()


async def test_nobody_there_is_told_with_the_address(demo: DemoUpstream, waits: Waits) -> None:
    url = demo.api_url
    await demo.stop()
    async with session(None) as made:
        with pytest.raises(Refused, match="cannot be reached") as refused:
            await Api(made, url, "demo", TOKEN, sleep=waits).gateways()
    assert refused.value.fault.status == 0
    assert url in str(refused.value)


async def test_all_pages_of_a_list_are_read(api: Api, demo: DemoUpstream) -> None:
    for number in range(120):
        demo.management.gateways[f"g{number}"] = {"id": f"g{number}"}
    assert len(await api.gateways()) == 121


def test_words_of_a_provider_are_shortened_and_of_one_line() -> None:
    fault = explain(400, b'{"error":{"message":"a\\nb' + b" c" * 250 + b'"}}')
    assert "a b c" in fault.cause
    assert "\n" not in fault.cause
    assert len(fault.cause) < 300


@pytest.mark.parametrize("wrapped", [b"%s", b"[%s]"])
def test_a_providers_own_refusal_is_not_laid_at_cloudflares_door(wrapped: bytes) -> None:
    said = b'{"error":{"message":"Incorrect API key provided: sk-proj-abcdefgh1234.","code":"x"}}'
    fault = explain(401, wrapped % said)
    assert "the provider refused (status 401): Incorrect API key provided" in fault.cause
    assert "gwproxy cloudflare rotate PROVIDER" in fault.cure
    assert "abcdefgh" not in str(fault)
    for status in (400, 404, 429, 503):
        fault = explain(status, b'{"error":{"message":"no such model"}}')
        assert "the provider refused" in fault.cause
        assert "loudflare.com" not in str(fault)
    assert "`model`" in explain(404, said).cure


def test_a_gateways_own_refusal_is_told_from_a_providers() -> None:
    ours = b'{"success":false,"result":[],"error":[{"code":2009,"message":"Unauthorized"}]}'
    fault = explain(401, ours)
    assert (fault.code, fault.cause) == (2009, "the gateway refused the token")
    assert "AI Gateway Run" in fault.cure


@pytest.mark.parametrize("status", [401, 404, 429, 500])
@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":"no"}', b'{"error":{"message":"m"}}'])
def test_a_provider_asked_by_itself_gets_no_word_of_cloudflare(status: int, body: bytes) -> None:
    assert "cloudflare" not in str(explain(status, body, direct=True)).lower()


def test_a_shown_command_survives_the_shell() -> None:
    words = curl("POST", "http://x/a?b=1&c", {"A": "Bearer $T"}, {"q": "it's"})
    assert words == (
        """curl -sS 'http://x/a?b=1&c' -H "A: Bearer $T" -H "Content-Type: application/json" """
        """-d '{"q":"it'"'"'s"}'"""
    )
