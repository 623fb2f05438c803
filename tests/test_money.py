"""Amounts and prices are exact both ways, and the one rounding goes upwards."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.money import (
    MAX_USD,
    NANOS_PER_USD,
    format_rate,
    format_usd,
    format_usd_short,
    nanos_from_picos,
    parse_rate,
    parse_usd,
)

amounts = st.integers(0, MAX_USD * NANOS_PER_USD)


@pytest.mark.parametrize(
    ("written", "nanos"),
    [
        ("12.34", 12_340_000_000),
        ("0", 0),
        ("-0", 0),
        ("-0.000", 0),
        ("0.000000001", 1),
        ("1000000000", 10**18),
        ("1e3", 1000 * 10**9),
        ("5E-9", 5),
        ("00.5", 500_000_000),
        ("1.00000000000", 10**9),  # ten zeros more are still exact
        (7, 7 * 10**9),
        (Decimal("0.1"), 100_000_000),
        (Decimal("1E+2"), 100 * 10**9),
        (Decimal("0E-5000"), 0),
    ],
)
def test_an_amount_is_read_exactly(written: Any, nanos: int) -> None:
    assert parse_usd(written) == nanos


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (0.1, "must be a decimal number"),
        (True, "must be a decimal number"),
        (None, "must be a decimal number"),
        ([], "must be a decimal number"),
        ("", "must be a decimal number"),
        (" 1", "must be a decimal number"),
        ("1_000", "must be a decimal number"),
        ("+1", "must be a decimal number"),
        ("1,5", "must be a decimal number"),
        (".5", "must be a decimal number"),
        ("1\n", "must be a decimal number"),
        ("٣", "must be a decimal number"),
        ("NaN", "must be a decimal number"),
        ("inf", "must be a decimal number"),
        ("1" * 65, "must be a decimal number"),
        (Decimal("NaN"), "finite"),
        (Decimal("sNaN"), "finite"),
        (Decimal("Infinity"), "finite"),
        (Decimal("-Infinity"), "finite"),
        ("-1", "negative"),
        (-1, "negative"),
        (Decimal("-0.5"), "negative"),
        ("0.0000000001", "9 decimals"),
        (Decimal("1e-300000"), "9 decimals"),
        (Decimal("0." + "1" * 5000), "9 decimals"),
        ("1000000000.000000001", "above 1000000000 USD"),
        ("1e999", "above 1000000000 USD"),
        (Decimal("1e300000"), "above 1000000000 USD"),
        (10**30, "above 1000000000 USD"),
    ],
)
def test_what_is_no_amount_is_refused_in_public_words(written: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        parse_usd(written)
    assert len(str(refusal.value)) < 80


def test_a_price_is_read_as_picos_per_token() -> None:
    assert parse_rate("1") == 1_000_000
    assert parse_rate("0.0375") == 37_500
    assert parse_rate(Decimal("0.000001")) == 1
    with pytest.raises(ValueError, match="6 decimals"):
        parse_rate("0.0000001")
    with pytest.raises(ValueError, match="above 1000000 USD per million tokens"):
        parse_rate("1000001")


@given(amounts)
def test_an_amount_survives_being_written_and_read(nanos: int) -> None:
    assert parse_usd(format_usd(nanos)) == nanos
    assert parse_usd(Decimal(nanos).scaleb(-9)) == nanos


@given(st.integers(0, 10**12))
def test_a_price_survives_being_written_and_read(picos: int) -> None:
    assert parse_rate(format_rate(picos)) == picos


@given(st.text())
def test_no_text_raises_anything_but_a_value_error(text: str) -> None:
    try:
        nanos = parse_usd(text)
    except ValueError:
        return
    assert Fraction(nanos, NANOS_PER_USD) == Fraction(text)


@given(st.decimals(allow_nan=True, allow_infinity=True))
def test_no_decimal_raises_anything_but_a_value_error(number: Decimal) -> None:
    try:
        nanos = parse_usd(number)
    except ValueError:
        return
    assert Fraction(nanos, NANOS_PER_USD) == Fraction(number)


@given(st.integers(-(10**18), 10**18))
def test_two_decimals_never_show_more_than_there_is(nanos: int) -> None:
    shown = Fraction(format_usd_short(nanos))
    assert 0 <= Fraction(nanos, NANOS_PER_USD) - shown < Fraction(1, 100)


@pytest.mark.parametrize(
    ("nanos", "full", "short"),
    [
        (0, "0.000000000", "0.00"),
        (12_340_000_000, "12.340000000", "12.34"),
        (76_559_999_999, "76.559999999", "76.55"),
        (-1, "-0.000000001", "-0.01"),
        (-12_340_000_000, "-12.340000000", "-12.34"),
    ],
)
def test_amounts_are_written_with_nine_decimals_or_two(nanos: int, full: str, short: str) -> None:
    assert format_usd(nanos) == full
    assert format_usd_short(nanos) == short


@given(st.integers(0, 10**30))
def test_the_one_rounding_goes_upwards_by_less_than_a_nano(picos: int) -> None:
    assert 0 <= nanos_from_picos(picos) * 1000 - picos < 1000


@pytest.mark.parametrize(
    ("picos", "written"),
    [(150_000, "0.15"), (37_500, "0.0375"), (15_000_000, "15.00"), (1, "0.000001"), (0, "0.00")],
)
def test_a_price_is_written_in_the_decimals_it_needs(picos: int, written: str) -> None:
    assert format_rate(picos) == written
