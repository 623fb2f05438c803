"""Limits of so many a minute go on across a restart from what the last minute had."""

from pathlib import Path
from typing import Any

from gwproxy.core.errors import RateLimited
from gwproxy.core.identity import ApiKey, Organization, User
from gwproxy.core.ledger import Hold, State
from gwproxy.core.limits import limits_of
from gwproxy.core.records import Held, Reserve, Settle
from gwproxy.state.keyring import Keyring
from gwproxy.state.lately import WINDOW_MS, Lately
from gwproxy.state.rates import Rates
from tests.harness import CONFIG, Gateway, Upstream, bearer, chat, make_key

NOW_MS = 1_795_270_800_000
NOW = 5_000.0


def reserve(lsn: int, ago_ms: int, prompt: int = 10, maximum: int = 90) -> Reserve:
    return Reserve(
        lsn=lsn,
        t=NOW_MS - ago_ms,
        synced=0,
        id=f"req_{lsn}",
        model="auto",
        provider="a",
        upstream_model="m",
        prices="1",
        holds=tuple(
            Held(name, "2026-11", 5, None, 5) for name in ("key:key_1", "user:alice", "org:acme")
        ),
        prompt=prompt,
        max=maximum,
    )


def settle(lsn: int, r: int, output: int, outcome: str = "completed") -> Settle:
    return Settle(
        lsn=lsn,
        t=NOW_MS,
        synced=0,
        r=r,
        cost=1,
        tokens=(10, 0, 0, output, 0),
        source="provider",
        outcome=outcome,
    )


class Desk:
    def __init__(self, *, rpm: int | None = None, tpm: int | None = None) -> None:
        self.keyring = Keyring()
        self.key = ApiKey(
            key_id="key_1", user_id="alice", prefix="p", digest=b"1", rpm=rpm, created_at=1
        )
        self.user = User(user_id="alice", org_id="acme", tpm=tpm, created_at=1)
        for row in (Organization(org_id="acme", created_at=1), self.user, self.key):
            self.keyring.apply(row)
        self.now = NOW
        self.rates = Rates(lambda: self.now)
        self.lately = Lately(NOW_MS)

    def begin(self) -> None:
        self.lately.replay(self.rates, self.keyring, NOW_MS, NOW)

    def admitted(self, tokens: int = 0) -> bool:
        try:
            self.rates.admit(limits_of(self.key, self.user), tokens)
        except RateLimited:
            return False
        return True


def test_requests_of_the_last_minute_count() -> None:
    desk = Desk(rpm=3)
    desk.lately.stored([(1, NOW_MS - 50_000, "key_1", 20)], State())
    desk.lately.saw(reserve(2, 10_000))
    desk.lately.saw(reserve(3, WINDOW_MS))  # a minute ago: gone
    desk.begin()
    assert [desk.admitted(), desk.admitted()] == [True, False]
    desk.now += 10
    assert desk.admitted(), "the first one is a minute old"


def test_what_was_open_counts_what_it_may_use_until_its_settlement_is_seen() -> None:
    state = State()
    state.holds[4] = Hold.of(reserve(4, 9_000))
    desk = Desk(tpm=200)
    desk.lately.stored([], state)
    desk.lately.saw(reserve(5, 5_000))
    desk.lately.saw(settle(6, 5, 40))
    desk.begin()  # 100 that nobody settled, and 50
    assert not desk.admitted(51)
    assert desk.admitted(50)


def test_what_was_never_sent_does_not_count() -> None:
    desk = Desk(rpm=1)
    desk.lately.saw(reserve(5, 5_000))
    desk.lately.saw(settle(6, 5, 0, "void"))
    desk.lately.saw(settle(7, 3, 0))  # of one that was not let in within the minute
    desk.begin()
    assert desk.admitted()


def test_a_key_that_is_not_known_any_more_is_passed_over() -> None:
    desk = Desk(rpm=1)
    desk.lately.stored([(1, NOW_MS - 5_000, "key_9", 20)], State())
    desk.begin()
    assert desk.admitted()


async def test_a_restart_does_not_give_a_key_its_minute_anew(
    aiohttp_client: Any, upstream: Upstream, tmp_path: Path
) -> None:
    config = CONFIG.format(upstream=upstream.url, more="")
    client = await aiohttp_client(Gateway(tmp_path, config))
    key = await make_key(client, rpm=2)
    for _ in range(2):
        assert (await ask(client, key)).status == 200
    await client.close()
    client = await aiohttp_client(Gateway(tmp_path, config))
    answer = await ask(client, key)
    assert answer.status == 429
    assert (await answer.json())["error"]["code"] == "rate_limit_exceeded"


async def ask(client: Any, key: str) -> Any:
    answer = await client.post("/v1/chat/completions", json=chat(), headers=bearer(key))
    await answer.read()
    return answer
