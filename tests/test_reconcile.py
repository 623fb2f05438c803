"""The rules of the reconciliation: what one line of ours beside the log's is found to be."""

import pytest

from gwproxy.core.reconcile import (
    SETTLES_WITHIN_MS,
    Correction,
    Finding,
    Kind,
    Ours,
    Theirs,
    compare,
    correction,
    unclaimed,
)

NOW = 1_795_270_800_000
THEN = NOW - 86_400_000

OURS = Ours(
    1, THEN, "req_1", 1, True, "openai", "gpt", "completed", "provider", 100 * 1 + 50 * 2, 100, 50,
    10, (1000, 500, 1000, 2000), "log_1", 200,
)  # fmt: skip
"""100 tokens in at one nano-USD, 50 out at two."""
THEIRS = Theirs(
    "log_1", THEN, "openai", "gpt", True, False, 200, 100, 50, 200, "req_1", 1, 900
)  # fmt: skip


def price(ours: Ours, tokens_in: int, tokens_out: int) -> int | None:
    return tokens_in + 2 * tokens_out if ours.model == "gpt" else None


def ours(**changes: object) -> Ours:
    return Ours(**{name: changes.get(name, getattr(OURS, name)) for name in OURS.__struct_fields__})


def theirs(**changes: object) -> Theirs:
    return Theirs(
        **{name: changes.get(name, getattr(THEIRS, name)) for name in THEIRS.__struct_fields__}
    )


NONE = {"input": None, "output": None, "cost": None}
GUESS = {"outcome": "unknown", "source": "estimated", "cost": 100, "input": 100, "output": 0}

TABLE = [
    # ours, theirs (None: there is none), the kind, what it should have cost, words of why
    ({}, {}, Kind.EQUAL, None, ""),
    ({}, {"cost": 209}, Kind.EQUAL, None, ""),
    ({}, {"cost": 211}, Kind.PRICE_DIFFERS, None, "another price"),
    ({}, {"cost": None}, Kind.EQUAL, None, "no cost"),
    ({}, {"output": 40, "cost": 180}, Kind.EQUAL, None, "leaves reasoning out"),
    ({}, {"output": 40, "cost": 200}, Kind.PRICE_DIFFERS, None, "another price"),
    ({}, {"output": 45}, Kind.TOKENS_DIFFER, None, "50 out here"),
    ({}, {"input": 99}, Kind.TOKENS_DIFFER, None, "99 in"),
    ({}, None, Kind.OURS_ONLY, None, "no log of it"),
    ({"t": NOW - 1000}, None, Kind.PENDING, None, "younger"),
    ({"outcome": None, "source": "", "cost": 0}, {}, Kind.PENDING, None, "still open"),
    ({"outcome": None, "source": "", "cost": 0}, None, Kind.PENDING, None, ""),
    ({}, {"cached": True, "cost": 0, "input": 0, "output": 0}, Kind.CACHED, 0, "own cache"),
    ({"cost": 0}, {"cached": True, "cost": 0}, Kind.CACHED, None, "own cache"),
    # Nothing was sent, or it was refused.
    ({"outcome": "failed", "cost": 0}, None, Kind.EQUAL, None, "never got"),
    ({"outcome": "failed", "cost": 0}, {**NONE, "success": False}, Kind.EQUAL, None, "refused"),
    ({"final": False, "cost": 0}, None, Kind.EQUAL, None, "never got"),
    # Their side has no usage.
    ({}, NONE, Kind.NO_USAGE, None, "what was provider"),
    ({"source": "counted"}, NONE, Kind.NO_USAGE, None, "what was counted"),
    ({}, {**NONE, "t": NOW - 1000}, Kind.PENDING, None, "no figures yet"),
    # What was a guess gets what the log says, at our own prices.
    (GUESS, {}, Kind.TOKENS_DIFFER, 200, "charged as unknown"),
    (GUESS, {"output": 0, "cost": 100}, Kind.EQUAL, None, ""),
    ({**GUESS, "outcome": "recovered"}, {"cost": 5}, Kind.TOKENS_DIFFER, 200, "recovered"),
    ({**GUESS, "model": "unpriced"}, {"cost": 5}, Kind.TOKENS_DIFFER, 5, "unknown"),
    ({**GUESS, "model": "unpriced"}, {"cost": None}, Kind.NO_USAGE, None, "no price"),
    (GUESS, {**NONE, "success": False}, Kind.NO_USAGE, 0, "refused it"),
    (GUESS, None, Kind.OURS_ONLY, None, "never have reached"),
    ({"source": "counted"}, {"output": 60}, Kind.TOKENS_DIFFER, 220, "counted"),
    # Who left pays for what he got, whatever was made.
    (
        {"source": "counted", "outcome": "client_left"},
        {"output": 60},
        Kind.TOKENS_DIFFER,
        None,
        "passed on",
    ),
    # Of several attempts that cost something only the costs can be compared.
    ({"input": None}, {"input": 1, "output": 1}, Kind.EQUAL, None, ""),
    ({"input": None}, {"cost": 900}, Kind.PRICE_DIFFERS, None, "one attempt of several"),
]


@pytest.mark.parametrize(("mine", "other", "kind", "real", "words"), TABLE)
def test_a_line_is_found_to_be(
    mine: dict[str, object], other: dict[str, object] | None, kind: Kind, real: int | None,
    words: str,
) -> None:  # fmt: skip
    rows = [] if other is None else [theirs(**other)]
    found = compare(ours(**mine), rows, price, NOW)
    assert (found.kind, found.real_cost) == (kind, real), found
    assert words in found.why
    assert found.ours_cost == ours(**mine).cost or kind is Kind.PENDING


def test_a_request_without_attempts_costs_what_all_its_records_say() -> None:
    recovered = ours(outcome="recovered", source="estimated", attempt=0, cost=1000)
    rows = [theirs(id="a"), theirs(id="b", success=False, **NONE), theirs(id="c", output=10)]
    found = compare(recovered, rows, price, NOW)
    assert found.real_cost == 200 + 120
    assert found.theirs_cost == 400


@pytest.mark.parametrize(
    ("row", "known", "kind", "words"),
    [
        ({"request_id": None}, False, Kind.THEIRS_ONLY, "not made by gwproxy"),
        ({}, False, Kind.THEIRS_ONLY, "does not have"),
        ({}, True, Kind.THEIRS_ONLY, "second record"),
        ({"cost": None}, True, Kind.EQUAL, "second try"),
        ({"cost": 0}, True, Kind.EQUAL, "second try"),
        ({"t": NOW - SETTLES_WITHIN_MS + 1}, False, Kind.PENDING, "too young"),
        ({"request_id": "doctor-1"}, False, Kind.DOCTOR, "gwproxy doctor"),
        ({"request_id": "doctor-1"}, True, Kind.THEIRS_ONLY, "second record"),
        ({"t": NOW - 1, "request_id": None}, False, Kind.THEIRS_ONLY, "not made by gwproxy"),
    ],
)
def test_a_record_that_nobody_claims(
    row: dict[str, object], known: bool, kind: Kind, words: str
) -> None:
    found = unclaimed(theirs(**row), known=known, now_ms=NOW)
    assert found.kind is kind
    assert words in found.why


def test_a_request_is_corrected_by_what_its_attempts_should_have_cost() -> None:
    first = ours(final=False, cost=30, outcome="unknown")
    last = ours(attempt=2, cost=100, outcome="unknown")
    kept = Finding(Kind.EQUAL, 30, 30)
    wrong = Finding(Kind.TOKENS_DIFFER, 100, 200, "the log has it", 200)
    found, done = correction([(first, kept), (last, wrong)], 0, log_is_whole=True)
    assert (found, done) == (Correction("req_1", 130, 230, "the log has it"), False)
    # Corrected before, by as much: in order now. By something else: the rest is due.
    assert correction([(first, kept), (last, wrong)], 100, log_is_whole=True) == (None, True)
    again, _ = correction([(first, kept), (last, wrong)], 50, log_is_whole=True)
    assert again == Correction("req_1", 180, 230, "the log has it")
    assert correction([(first, kept), (last, kept)], 0, log_is_whole=True) == (None, False)


def test_what_the_log_does_not_have_is_credited_only_where_the_log_was_whole() -> None:
    lost = ours(outcome="recovered", source="estimated", cost=500)
    missing = compare(lost, [], price, NOW)
    found, _ = correction([(lost, missing)], 0, log_is_whole=True)
    assert found == Correction("req_1", 500, 0, "the gateway never got it")
    assert correction([(lost, missing)], 0, log_is_whole=False) == (None, False)
    # A finished request was there, whatever the log has forgotten.
    gone = compare(OURS, [], price, NOW)
    assert correction([(OURS, gone)], 0, log_is_whole=True) == (None, False)
