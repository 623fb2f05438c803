"""Money: exact integers, and the only place where a decimal becomes one or one becomes a decimal.

Pure. Amounts are nano-USD, prices are pico-USD per token; a binary float never gets in. There is
one rounding in the whole program, `nanos_from_picos`, and it goes upwards.
"""

import re
from decimal import Decimal
from functools import lru_cache
from typing import NewType

Nanos = NewType("Nanos", int)
"""An amount in nano-USD (10**-9 USD)."""

Picos = NewType("Picos", int)
"""A price in pico-USD (10**-12 USD) per token: 1 USD per million tokens is 1,000,000."""

NANOS_PER_USD = 10**9
PICOS_PER_NANO = 1000
_NANOS_PER_CENT = NANOS_PER_USD // 100
MAX_USD = 10**9
"""No budget or charge is larger, so that sums of amounts stay inside SQLite's 64-bit integers."""
MAX_USD_PER_MTOK = 10**6

# Decimal() itself would also take underscores, spaces, "Infinity" and the digits of other scripts.
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
_LONGEST_NUMBER = 64
_WIDEST_EXPONENT = 64
"""Beyond this a number is absurd, and scaling it would cost memory before it could be refused."""


def nanos_from_picos(total_picos: int) -> Nanos:
    """The one rounding: whole nano-USD, upwards, so that a fraction is never given away."""
    return Nanos(-(-total_picos // PICOS_PER_NANO))


def parse_usd(value: str | int | Decimal) -> Nanos:
    """An amount in USD, exactly. ValueError, in words a client may read, for everything else."""
    return Nanos(_scaled(value, 9, MAX_USD, "USD"))


def parse_rate(value: str | int | Decimal) -> Picos:
    """A price in USD per million tokens, exactly; at most six decimals. ValueError otherwise."""
    return Picos(_scaled(value, 6, MAX_USD_PER_MTOK, "USD per million tokens"))


def format_usd(amount: int) -> str:
    """All nine decimals: "12.340000000"."""
    sign = "-" if amount < 0 else ""
    whole, fraction = divmod(abs(amount), NANOS_PER_USD)
    return f"{sign}{whole}.{fraction:09d}"


def format_usd_short(amount: int) -> str:
    """Two decimals, rounded down: what remains of a budget is never shown as more than it is."""
    return _dollars(amount // _NANOS_PER_CENT)


@lru_cache(maxsize=4096)
def _dollars(cents: int) -> str:
    """Each answer shows four amounts, and most of them stand at the same cent as in the one before:
    kept for a thousand accounts, which is half a megabyte."""
    sign = "-" if cents < 0 else ""
    whole, fraction = divmod(abs(cents), 100)
    return f"{sign}{whole}.{fraction:02d}"


def format_rate(rate: int) -> str:
    """USD per million tokens in as few decimals as are exact, at least two: "0.15", "0.0375"."""
    sign = "-" if rate < 0 else ""
    whole, fraction = divmod(abs(rate), 10**6)
    return f"{sign}{whole}.{f'{fraction:06d}'.rstrip('0'):0<2}"


def _scaled(value: str | int | Decimal, decimals: int, largest: int, unit: str) -> int:
    """`value` times 10**decimals, digit by digit: a Decimal context would round to 28 of them."""
    scale: int = 10**decimals
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        # A float has already lost the digits that were meant; a bool is a mistake.
        raise ValueError('must be a decimal number such as "12.34"')
    if isinstance(value, str):
        if len(value) > _LONGEST_NUMBER or not _NUMBER.fullmatch(value):
            raise ValueError('must be a decimal number such as "12.34"')
        value = Decimal(value)
    if isinstance(value, int):
        if value < 0:
            raise ValueError("must not be negative")
        if value > largest:
            raise ValueError(f"must not be above {largest} {unit}")
        return value * scale
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise ValueError("must be a finite number")
    if not any(digits):
        return 0
    if sign:
        raise ValueError("must not be negative")
    if value.adjusted() > _WIDEST_EXPONENT or value > largest:
        raise ValueError(f"must not be above {largest} {unit}")
    if exponent < -_WIDEST_EXPONENT:
        raise ValueError(f"must not have more than {decimals} decimals")
    unscaled = int("".join(map(str, digits)))
    if exponent >= 0:
        return unscaled * scale * int(10**exponent)
    scaled, rest = divmod(unscaled * scale, int(10**-exponent))
    if rest:
        raise ValueError(f"must not have more than {decimals} decimals")
    return scaled
