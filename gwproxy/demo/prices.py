"""What the demo's models cost, as their makers publish it: the gateway's estimate in its log. Pure,
and on purpose no part of the proxy's price table: the one is compared with the other.
"""

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import orjson

# USD per million tokens: input, output, input read from the provider's cache.
_PRICES: Final = {
    "openai/gpt-4o-mini": ("0.15", "0.60", "0.075"),
    "openai/gpt-4o": ("2.50", "10.00", "1.25"),
    "openai/gpt-5-mini": ("0.25", "2.00", "0.025"),
    "openai/o3": ("2.00", "8.00", "0.50"),
    "anthropic/claude-sonnet-4-5": ("3.00", "15.00", "0.30"),
    "anthropic/claude-haiku-4-5": ("1.00", "5.00", "0.10"),
    "google-ai-studio/gemini-2.5-flash": ("0.30", "2.50", "0.03"),
    "google-ai-studio/gemini-2.5-pro": ("1.25", "10.00", "0.125"),
    "groq/llama-3.3-70b-versatile": ("0.59", "0.79", "0.59"),
    "mock/echo": ("1.00", "2.00", "1.00"),
}
_MILLION: Final = Decimal(1_000_000)


def cost(
    provider: str, model: str, tokens: Mapping[str, int], custom: str | None
) -> tuple[Decimal | None, bool]:
    """(USD, whether the caller's own prices made it). None: the model has no price here.

    As the gateway does it: from what `tokens_in` and `tokens_out` say, and no more.
    """
    if custom is not None and (own := _custom(custom, tokens)) is not None:
        return own, True
    found = _PRICES.get(f"{provider}/{model}")
    if found is None:
        return None, False
    rate_in, rate_out, rate_cached = (Decimal(rate) / _MILLION for rate in found)
    return _sum(tokens, rate_in, rate_out, rate_cached), False


def _custom(header: str, tokens: Mapping[str, int]) -> Decimal | None:
    """By `cf-aig-custom-cost`: USD per single token."""
    try:
        rates = orjson.loads(header)
        rate_in, rate_out = _rate(rates["per_token_in"]), _rate(rates["per_token_out"])
        rate_cached = _rate(rates.get("per_cache_read_token", rates["per_token_in"]))
    except (orjson.JSONDecodeError, KeyError, TypeError, InvalidOperation):
        return None
    return _sum(tokens, rate_in, rate_out, rate_cached)


def _rate(value: Any) -> Decimal:
    # A float's shortest words are what was written in the header.
    return Decimal(repr(value))


def _sum(
    tokens: Mapping[str, int], rate_in: Decimal, rate_out: Decimal, rate_cached: Decimal
) -> Decimal:
    cached = min(tokens["cached"], tokens["in"])
    return (tokens["in"] - cached) * rate_in + cached * rate_cached + tokens["out"] * rate_out
