"""Records: what a line of the journal says, and that nothing is lost by writing it."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.identity import (
    AdminKey,
    ApiKey,
    FailureMode,
    OnClientGone,
    OnExhausted,
    Organization,
    Scope,
    Status,
    UnboundedPolicy,
    User,
)
from gwproxy.core.records import (
    NO_TOKENS,
    Adjust,
    Admin,
    Alert,
    AnyRecord,
    Attempt,
    Breaker,
    Close,
    Held,
    Import,
    Mark,
    Reserve,
    Settle,
    Stop,
    Storage,
    Tried,
    decode,
    encode,
)

HOLDS = (
    Held("key:key_5kX0bTq9", "2026-11", 2_200_000, None, 2_200_000),
    Held("user:alice", "2026-11", 2_200_000, 5_000_000_000, 1_234_567_890),
    Held("org:acme", "2026-11", 2_200_000, 100_000_000_000, 45_678_901_234),
    Held("provider:openai", "2026-11-21", 2_200_000, None, 12_345_678_901),
)
TRIED = Tried("openai", "gpt-4o-mini", 200, "", "", 1234, 182_500)

RESERVE = Reserve(
    lsn=1_234_567,
    t=1_795_270_800_123,
    synced=1_234_560,
    id="req_0123456789abcdef-12345",
    model="gpt-4o-mini",
    provider="openai",
    upstream_model="gpt-4o-mini",
    prices="2026-11-15+8f3e2a1b",
    holds=HOLDS,
    prompt=152,
    max=1024,
    stream=True,
)
SETTLE = Settle(
    lsn=1_234_570,
    t=1_795_270_801_456,
    synced=1_234_567,
    r=1_234_567,
    cost=182_500,
    tokens=(110, 40, 0, 260, 0),
    source="provider",
    outcome="completed",
    attempts=(TRIED,),
    status=200,
    rates=(150_000, 75_000, 150_000, 600_000),
)
STAMP: dict[str, Any] = {"lsn": 9, "t": 1_795_270_800_123, "synced": 7}

EXAMPLES: list[AnyRecord] = [
    RESERVE,
    Reserve(
        **STAMP,
        id="req_1",
        model="auto",
        provider="a",
        upstream_model="m",
        prices="v",
        holds=(*HOLDS, Held("outage:acme", "2026-11-21", 1, 5, 4)),
        hidden=True,
        degraded=True,
        edits=("max_tokens=512", "skipped b: over budget"),
    ),
    Mark(**STAMP, r=4, tokens=256, cost=512_000),
    Mark(**STAMP, r=4, tokens=256, cost=512_000, holds=HOLDS),
    Attempt(
        **STAMP,
        r=4,
        n=2,
        provider="b",
        upstream_model="m",
        cost=152_000,
        why="timeout",
        holds=HOLDS,
        hidden=True,
    ),
    SETTLE,
    Settle(
        **STAMP,
        r=4,
        cost=7,
        tokens=(1, 2, 3, 4, 4),
        source="counted",
        outcome="client_left",
        attempts=(TRIED, Tried("b", "m", None, "connect", "refused", 3, 0)),
        overrun=5,
        status=499,
        log_id="01HZX",
    ),
    Adjust(**STAMP, accounts=(("user:alice", "2026-11"),), delta=-5, type="reset", actor="admin",
           reason="paid in cash"),
    Adjust(
        **STAMP,
        accounts=(("user:alice", "2026-11"), ("org:acme", "2026-11")),
        delta=5,
        type="late",
        actor="",
        reason="",
        r=4,
        idempotency_key="once",
        tokens=NO_TOKENS,
    ),
    Close(**STAMP, account="org:acme", period="2026-09", spent=1, credited=2, count=3, hash="ab"),
    Admin(
        **STAMP,
        action="update",
        org=Organization(
            org_id="acme",
            name="Acme & Söhne",
            status=Status.SUSPENDED,
            monthly_budget=1,  # type: ignore[arg-type]
            failure_mode=FailureMode.OPEN,
            fallback_daily_limit=0,  # type: ignore[arg-type]
            allowed_features=("web_search",),
            prices={"a/m": {"input": "1.5", "output": "2"}},
            unbounded_policy=UnboundedPolicy.STRICT,
            on_exhausted=OnExhausted.FINISH,
            on_client_gone=OnClientGone.DRAIN,
            cache=True,
            created_at=1,
            deleted_at=2,
            version=3,
        ),
        actor="key_admin",
        address="127.0.0.1",
        request_id="req_9",
        idempotency_key="k",
    ),
    Admin(**STAMP, action="create", user=User(user_id="alice", email="a@b.c", rpm=3, created_at=1)),
    Admin(
        **STAMP,
        action="create",
        key=ApiKey(
            key_id="key_1",
            user_id="alice",
            prefix="gw_live_12345678",
            digest=bytes(range(32)),
            allowed_models=("a/m",),
            created_at=1,
            expires_at=5,
        ),
    ),
    Admin(
        **STAMP,
        action="create",
        admin_key=AdminKey(
            key_id="admin_1", prefix="gw_admin_1", digest=b"1", scope=Scope.READ, created_at=1
        ),
    ),
    Import(**STAMP, file="import-1.ndjson", digest="00ff", rows=2, actor="ann"),
    Breaker(**STAMP, provider="a", before="closed", after="open", until=3, why="timeout"),
    Alert(**STAMP, account="user:alice", period="2026-11", percent=80, spent=81, limit=100),
    Storage(**STAMP, part="database", state="lost", cause="disk full"),
    Stop(**STAMP),
]  # fmt: skip


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_what_is_read_back_is_what_was_written(record: AnyRecord) -> None:
    line = encode(record)
    assert decode(line) == record
    assert type(decode(line)) is type(record)
    assert b"\n" not in line
    fields = json.loads(line)
    assert fields["k"] == type(record).__name__.lower()
    assert (fields["lsn"], fields["t"], fields["synced"]) == (record.lsn, record.t, record.synced)


def test_every_kind_of_record_is_among_the_examples() -> None:
    assert {type(record) for record in EXAMPLES} == set(AnyRecord.__args__)  # type: ignore[attr-defined]


def test_the_two_lines_of_a_plain_request_are_short() -> None:
    """They are written for each one, and a journal of a gigabyte should take millions."""
    assert len(encode(RESERVE)) + len(encode(SETTLE)) < 740


def test_a_reserve_record_knows_whose_it_is() -> None:
    assert (RESERVE.key_id, RESERVE.user_id, RESERVE.org_id) == ("key_5kX0bTq9", "alice", "acme")


def test_an_admin_record_has_its_row() -> None:
    rows = [record.row for record in EXAMPLES if isinstance(record, Admin)]
    assert [type(row) for row in rows] == [Organization, User, ApiKey, AdminKey]
    with pytest.raises(AssertionError):
        _ = Admin(**STAMP, action="nothing").row


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"k":"stop"}',
        b'{"k":"nonsense","lsn":1,"t":1,"synced":0}',
        b'{"k":"stop","lsn":"1","t":1,"synced":0}',
        b'{"k":"mark","lsn":1,"t":1,"synced":0,"r":1,"tokens":1.5,"cost":0}',
        encode(SETTLE)[:-1],
        b"\xff" + encode(SETTLE),
    ],
)
def test_what_is_no_record_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line)


def test_fields_of_a_later_version_are_passed_over() -> None:
    line = json.dumps({**json.loads(encode(SETTLE)), "later": 1}).encode()
    assert decode(line) == SETTLE


@given(
    st.builds(
        Settle,
        lsn=st.integers(1, 2**53),
        t=st.integers(0, 2**53),
        synced=st.integers(0, 2**53),
        r=st.integers(1, 2**53),
        cost=st.integers(0, 2**62),
        tokens=st.tuples(*[st.integers(0, 10**9)] * 5),
        source=st.text(),
        outcome=st.text(),
        attempts=st.lists(
            st.builds(
                Tried,
                provider=st.text(),
                model=st.text(),
                status=st.none() | st.integers(100, 599),
                error_type=st.text(),
                reason=st.text(),
                duration_ms=st.integers(0, 2**40),
                cost=st.integers(0, 2**62),
            ),
            max_size=3,
        ).map(tuple),
        overrun=st.integers(0, 2**62),
        status=st.integers(0, 599),
        log_id=st.text(),
    )
)
def test_no_text_and_no_number_is_lost(record: Settle) -> None:
    line = encode(record)
    assert decode(line) == record
    assert b"\n" not in line and b"\r" not in line


def test_a_record_is_never_changed() -> None:
    with pytest.raises(AttributeError):
        SETTLE.cost = 1  # type: ignore[misc]
    assert msgspec.structs.replace(SETTLE, cost=1) != SETTLE
