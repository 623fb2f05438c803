"""Periods: which month and day a moment belongs to, and when they end."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.period import DAY_MS, end_ms, periods, rfc3339

MOMENTS = st.integers(0, 4_000_000_000_000)  # to the year 2096


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.mark.parametrize(
    ("moment", "month", "day"),
    [
        ("1970-01-01T00:00:00+00:00", "1970-01", "1970-01-01"),
        ("2026-11-30T23:59:59.999+00:00", "2026-11", "2026-11-30"),
        ("2026-12-01T00:00:00+00:00", "2026-12", "2026-12-01"),
        ("2026-12-31T23:59:59.999+00:00", "2026-12", "2026-12-31"),
        ("2027-01-01T00:00:00+00:00", "2027-01", "2027-01-01"),
        ("2028-02-29T12:00:00+00:00", "2028-02", "2028-02-29"),
        ("2026-12-01T00:30:00+02:00", "2026-11", "2026-11-30"),  # the calendar is UTC's
    ],
)
def test_a_moment_has_a_month_and_a_day(moment: str, month: str, day: str) -> None:
    assert periods(ms(moment)) == (month, day)


@pytest.mark.parametrize(
    ("period", "end"),
    [
        ("2026-11", "2026-12-01T00:00:00+00:00"),
        ("2026-12", "2027-01-01T00:00:00+00:00"),
        ("2028-02", "2028-03-01T00:00:00+00:00"),
        ("2026-11-21", "2026-11-22T00:00:00+00:00"),
        ("2026-12-31", "2027-01-01T00:00:00+00:00"),
        ("2027-02-28", "2027-03-01T00:00:00+00:00"),
    ],
)
def test_a_period_ends_where_the_next_begins(period: str, end: str) -> None:
    assert end_ms(period) == ms(end)


@given(MOMENTS)
def test_every_moment_lies_in_its_periods_and_not_in_the_next(at_ms: int) -> None:
    moment = datetime.fromtimestamp(at_ms // 1000, UTC)
    month, day = periods(at_ms)
    assert (month, day) == (f"{moment:%Y-%m}", f"{moment:%Y-%m-%d}")
    for period in (month, day):
        end = end_ms(period)
        assert at_ms < end
        before, after = periods(end - 1), periods(end)
        assert period in before and period not in after
    assert end_ms(day) - at_ms <= DAY_MS
    assert end_ms(month) - at_ms <= timedelta(days=31).total_seconds() * 1000


@pytest.mark.parametrize(
    ("at_ms", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_795_270_800_000, "2026-11-21T14:20:00Z"),
        (1_795_270_800_007, "2026-11-21T14:20:00.007Z"),
        (1_795_270_800_999, "2026-11-21T14:20:00.999Z"),
    ],
)
def test_a_moment_in_words(at_ms: int, text: str) -> None:
    assert rfc3339(at_ms) == text


@given(MOMENTS)
def test_the_words_say_the_moment_exactly(at_ms: int) -> None:
    assert ms(rfc3339(at_ms).replace("Z", "+00:00")) == at_ms
