"""The one table of outcomes: whole, consistent, and the same in the documentation."""

from pathlib import Path

import pytest

from gwproxy.core.outcomes import (
    FAILURES,
    GATEWAY_CODES,
    STATUSES,
    Effect,
    Meaning,
    of_status,
    rows,
)
from gwproxy.metrics import ERROR_TYPES
from gwproxy.proxy import upstream
from gwproxy.proxy.upstream import Failure

DOCUMENT = Path(__file__).parent.parent / "docs" / "PROVIDERS.md"

EFFECTS = {Effect.ALIVE: "alive", Effect.FAILED: "**failure**", Effect.NOTHING: "-"}


def documented() -> list[str]:
    """The table's rows as the document has to show them."""
    return [
        f"| {what} | {outcome.meaning.value.replace('_', ' ')} "
        f"| {'yes' if outcome.may_fall_back else 'no'} | {EFFECTS[outcome.effect]} |"
        for what, outcome in rows()
    ]


def test_the_document_shows_the_table_as_it_is() -> None:
    lines = DOCUMENT.read_text().splitlines()
    start = lines.index("| what happened | meaning | next provider | breaker |")
    end = lines.index("", start)
    assert lines[start + 2 : end] == documented()


def test_every_row_has_words_of_its_own_and_labels_from_the_closed_sets() -> None:
    words = [what for what, _ in rows()]
    assert len(words) == len(set(words))
    for what, outcome in rows():
        assert outcome.error_type in ERROR_TYPES, what
        assert bool(outcome.reason) is (outcome.meaning is not Meaning.SUCCESS), what
        assert "|" not in what


def test_every_way_in_which_a_connection_fails_is_in_the_table() -> None:
    failures = [value for value in vars(upstream).values() if isinstance(value, Failure)]
    assert len(failures) > 8
    for failure in failures:
        if failure is upstream.SHUTDOWN:
            continue  # ours, and no outcome of a provider's
        _, outcome = FAILURES[failure.reason]
        assert outcome.error_type == failure.error_type, failure
        assert outcome.may_fall_back is (failure is not upstream.TOTAL_TIMEOUT)


@pytest.mark.parametrize("status", range(100, 600))
def test_every_status_has_a_meaning(status: int) -> None:
    outcome = of_status(status)
    if status in (408, 409, 429) or status >= 500 or status < 400:
        assert outcome.may_fall_back
        counts = status not in (409, 429)
        assert outcome.effect is (Effect.FAILED if counts else Effect.NOTHING)
    else:
        assert not outcome.may_fall_back
        assert outcome.effect is Effect.ALIVE
        assert (outcome.meaning is Meaning.OPERATOR_FAULT) is (status in (401, 402, 403))


def test_blocked_content_never_goes_to_another_provider_and_2005_does() -> None:
    for code in (2016, 2017, 2029, 2030):
        assert GATEWAY_CODES[code].meaning is Meaning.POLICY_BLOCK
        assert not GATEWAY_CODES[code].may_fall_back
    assert GATEWAY_CODES[2005].may_fall_back
    assert GATEWAY_CODES[2005].effect is Effect.FAILED
    assert STATUSES[429].effect is Effect.NOTHING
