"""Rates: what a name costs is what the source says it costs, in integers, rounded once."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage as SourceUsage
from genai_prices.data import providers as source_providers
from genai_prices.types import (
    ClauseContains,
    ClauseEquals,
    ClauseStartsWith,
    ModelInfo,
    ModelPrice,
)
from hypothesis import given
from hypothesis import strategies as st

from gwproxy import assets
from gwproxy.cli.prices import build
from gwproxy.core.money import Picos, nanos_from_picos
from gwproxy.core.pricing import PriceBook, Rate, Tier
from gwproxy.core.routing import Candidate, Provider, Routes
from gwproxy.core.usage import Usage

BOOK = PriceBook(assets.prices())
NOW_S = datetime(2026, 11, 21, tzinfo=UTC).timestamp()
TOKEN_KEYS = ("input_mtok", "cache_read_mtok", "cache_write_mtok", "output_mtok")


# -- the shipped table against its source --------------------------------------------------------

SOURCE = {provider.id: provider for provider in source_providers}
WITH_FALLBACK = {"azure-openai", "google-vertex-ai"}


def source_model(slug: str, name: str) -> ModelInfo | None:
    if slug == "custom-hf":  # the router: `model:host`, each host a provider of the source
        name, _, host = name.rpartition(":")
        return SOURCE[f"{build.HUGGINGFACE}{host}"].find_model(name)
    provider = SOURCE[build.SOURCES[slug]]
    others = source_providers if slug in WITH_FALLBACK else None
    found = provider.find_model(name, all_providers=others)
    if found is not None and found.id.startswith(build.NOT_SERVED.get(slug, ())):
        return None
    return found


def source_cost(model: ModelInfo, usage: Usage, at_s: float) -> tuple[Fraction, bool] | None:
    """In nano-USD before rounding, by the source's own arithmetic in decimals, and whether its
    prices are whole pico-USD. None where it has no price per token."""
    price = model.get_prices(datetime.fromtimestamp(at_s, UTC))
    per_token = {key: vars(price)[key] for key in TOKEN_KEYS if vars(price).get(key) is not None}
    if "input_mtok" not in per_token and "output_mtok" not in per_token:
        return None
    reported = SourceUsage(
        input_tokens=usage.input_total,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write,
        output_tokens=usage.output,
    )
    total = ModelPrice(**per_token).calc_price(reported)["total_price"]
    figures = [
        figure
        for value in per_token.values()
        for figure in (
            [value]
            if isinstance(value, Decimal)
            else [value.base, *(tier.price for tier in value.tiers)]
        )
    ]
    return Fraction(total) * 10**9, all(figure * 10**6 % 1 == 0 for figure in figures)


def assert_priced_as_at_the_source(slug: str, name: str, usage: Usage, at_s: float) -> bool:
    model = source_model(slug, name)
    rate = BOOK.rate(slug, name, at_s)
    expected = source_cost(model, usage, at_s) if model else None
    if expected is None:
        assert rate is None, f"{slug}/{name} is priced here only"
        return False
    assert rate is not None, f"{slug}/{name} is priced at the source only"
    cost, exact = expected
    if exact:
        assert rate.cost(usage) == math.ceil(cost), f"{slug}/{name} {usage} at {at_s}"
    else:
        noise = Fraction(usage.input_total + usage.output, 2000)
        assert abs(rate.cost(usage) - cost) <= 1 + noise, f"{slug}/{name} {usage} at {at_s}"
    return True


def spellings(model: ModelInfo) -> Iterator[str]:
    """Names that a clause of this model was written for, and a few that it was not."""

    def texts(clause: Any) -> Iterator[tuple[str, str]]:
        for field, value in vars(clause).items():
            if isinstance(value, list):
                for part in value:
                    yield from texts(part)
            else:
                yield field, value

    yield model.id
    for field, text in texts(model.match):
        match field:
            case "equals":
                yield text
                yield text.upper()
                yield f"{text}-20251399"
            case "starts_with":
                yield from (text, f"{text}-20250115", f"{text}-2025-01-15", f"{text}-mini-next")
            case "ends_with":
                yield from (text, f"some/{text}")
            case "contains":
                yield from (text, f"some-{text}-20250115", f"eu.{text}")
            case "regex":
                dated = text.strip("^$").replace("\\.", ".").replace("[-@]", "@")
                yield dated.replace("\\d{8}", "20250115")
                yield dated.replace("\\d{4}-\\d{2}-\\d{2}", "2025-01-15").replace("\\d", "7")


NAMES = sorted(
    {
        (slug, name)
        for slug, source_id in build.SOURCES.items()
        for model in SOURCE[source_id].models
        for name in spellings(model)
    }
    | {("azure-openai", model.id) for model in SOURCE["openai"].models}
    | {("google-vertex-ai", model.id) for model in SOURCE["anthropic"].models}
    | {
        ("custom-hf", f"{name}:{source_id.removeprefix(build.HUGGINGFACE)}")
        for source_id, source in SOURCE.items()
        if source_id.startswith(build.HUGGINGFACE)
        for model in source.models
        for name in spellings(model)
    }
)

tokens = st.one_of(
    st.integers(0, 400),
    st.sampled_from([128_000, 128_001, 199_999, 200_000, 200_001, 272_000, 272_001]),
    st.integers(0, 2_000_000),
)
usages = st.builds(
    lambda fresh, read, write, output: Usage(fresh, read, write, output, output // 2),
    *[tokens] * 4,
)
moments = st.one_of(
    st.integers(int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()), int(NOW_S) + 10**7),
    st.datetimes(datetime(2025, 1, 1), datetime(2026, 12, 31)).map(
        lambda moment: moment.replace(minute=30, second=0, microsecond=0, tzinfo=UTC).timestamp()
    ),
)


def test_every_name_the_source_knows_costs_what_the_source_says() -> None:
    chance = random.Random(11)
    priced = 0
    for slug, name in NAMES:
        usage = Usage(*(chance.randrange(250_000) for _ in range(4)))
        at_s = NOW_S - chance.randrange(2 * 365 * 86_400)
        priced += assert_priced_as_at_the_source(slug, name, usage, at_s)
    assert priced > 3000


@given(st.sampled_from(NAMES), usages, moments)
def test_any_usage_at_any_time_costs_what_the_source_says(
    named: tuple[str, str], usage: Usage, at_s: float
) -> None:
    assert_priced_as_at_the_source(*named, usage, at_s)


def test_the_shipped_table_is_the_one_that_the_installed_source_gives() -> None:
    from importlib import metadata

    table = build.compile_table(source_providers, metadata.version("genai-prices"))
    shipped = Path(assets.__file__).parent / "data" / assets.PRICES
    assert build.serialise(table) == shipped.read_bytes()


def test_claude_is_sold_by_one_of_googles_shops_alone() -> None:
    assert BOOK.rate("google-vertex-ai", "claude-sonnet-4-5") is not None
    assert BOOK.rate("google-ai-studio", "claude-sonnet-4-5") is None


def test_a_model_without_a_price_is_not_taken_for_its_neighbour() -> None:
    unpriced = ModelPrice(input_mchars=Decimal(15))
    models = [
        ModelInfo(id="speech", match=ClauseStartsWith("speech-"), prices=unpriced),
        ModelInfo(id="clock-free", match=ClauseEquals("clock-free"), prices=unpriced),
        ModelInfo(
            id="clock", match=ClauseContains("clock"), prices=ModelPrice(input_mtok=Decimal(1))
        ),
        ModelInfo(id="bell", match=ClauseEquals("bell"), prices=unpriced),
    ]
    rows = build._models(models)
    book = PriceBook({"version": "t", "aliases": {}, "providers": {"p": {"models": rows}}})
    assert sorted(rows) == ["clock", "clock-free", "speech"]
    for name in ("speech-clock", "clock-free", "bell"):
        assert book.rate("p", name) is None
    assert book.rate("p", "clock-fast") is not None
    assert book.models("p") == ["clock"]


@pytest.mark.parametrize(
    ("provider", "model", "usd_per_mtok"),
    [
        ("openai", "gpt-4o-mini", ("0.15", "0.60")),
        ("openai", "gpt-4o-mini-2024-07-18", ("0.15", "0.60")),
        ("openai", "gpt-4o", ("2.50", "10")),
        ("openai", "gpt-4o-20240513", ("5", "15")),
        ("openai", "gpt-4", ("30", "60")),
        ("openai", "gpt-4-turbo", ("10", "30")),
        ("openai", "gpt-5-mini", ("0.25", "2")),
        ("anthropic", "claude-3-haiku", ("0.25", "1.25")),
        ("anthropic", "claude-3-haiku-20240307", ("0.25", "1.25")),
        ("anthropic", "claude-3-sonnet", ("3", "15")),
        ("anthropic", "claude-3-opus", ("15", "75")),
        ("anthropic", "claude-sonnet-4-5", ("3", "15")),
        ("google-ai-studio", "gemini-2.5-flash", ("0.30", "2.50")),
        ("google-ai-studio", "models/gemini-2.5-flash", ("0.30", "2.50")),
        ("google", "gemini-2.5-flash", ("0.30", "2.50")),
        ("google-vertex-ai", "google/gemini-2.5-flash", ("0.30", "2.50")),
        ("google-ai-studio", "gemini-1.5-pro", ("1.25", "5")),
        ("google-ai-studio", "gemini-1.5-flash", ("0.075", "0.30")),
        ("google-ai-studio", "gemini-2.0-flash-exp", ("0.10", "0.40")),
        ("workers-ai", "@cf/meta/llama-2-7b-chat-fp16", ("0.556", "6.667")),
        ("custom-hf", "meta-llama/Llama-3.3-70B-Instruct:groq", ("0.59", "0.79")),
    ],
)
def test_the_models_people_start_with_are_priced_under_the_names_they_send(
    provider: str, model: str, usd_per_mtok: tuple[str, str]
) -> None:
    rate = BOOK.rate(provider, model, NOW_S)
    assert rate is not None
    base = rate.tiers[0]
    assert (base.input, base.output) == tuple(int(Decimal(usd) * 10**6) for usd in usd_per_mtok)


# A Hugging Face model needs a provider of one's own in front of the router, and so a prefix.
ROUTES = Routes({"huggingface": Provider("huggingface", "custom-hf", "custom-hf")})


@pytest.mark.parametrize(
    "name",
    [
        "openai/gpt-4",
        "openai/gpt-4-turbo",
        "openai/gpt-4o",
        "openai/gpt-4o-mini",
        "anthropic/claude-3-haiku",
        "anthropic/claude-3-opus",
        "anthropic/claude-3-sonnet",
        "google/gemini-1.5-flash",
        "google/gemini-1.5-pro",
        "google/gemini-2.5-flash",
        "google/gemini-2.5-pro",
        "gemini/gemini-2.5-pro",
        "google-ai-studio/gemini-2.0-flash-exp",
        "workers-ai/@cf/meta/llama-2-7b-chat-fp16",
        "huggingface/meta-llama/Llama-3.3-70B-Instruct",
        "huggingface/meta-llama/Llama-3.3-70B-Instruct:groq",
    ],
)
def test_what_the_shipped_examples_ask_for_is_priced_as_it_is_asked_for(name: str) -> None:
    chain = ROUTES.resolve(name)
    assert chain is not None
    for at_s in (NOW_S, NOW_S + 365 * 86_400, None):
        rate = BOOK.rate_of(chain[0], at_s)
        assert rate is not None and not rate.overridden
        assert rate.cost(Usage(input=1000, output=1000)) > 0


def test_each_listed_model_has_a_price_under_the_name_it_is_listed_by() -> None:
    for provider in BOOK.providers():
        names = BOOK.models(provider)
        assert names == sorted(set(names))
        for name in names:
            rate = BOOK.rate(provider, name, NOW_S)
            assert rate is not None
            assert all(
                low.above_input_tokens < high.above_input_tokens
                for low, high in pairwise(rate.tiers)
            )


def test_a_router_that_does_not_name_its_host_is_charged_at_the_dearest() -> None:
    model = "meta-llama/Llama-3.3-70B-Instruct"
    hosts = [
        BOOK.rate("custom-hf", name, NOW_S)
        for name in BOOK.models("custom-hf")
        if name.startswith(f"{model}:")
    ]
    assert len(hosts) > 3
    usage = Usage(input=1000, cache_read=1000, cache_write=1000, output=1000)
    for unsaid in (model, model.lower(), f"{model}:fastest", f"{model}:cheapest"):
        rate = BOOK.rate("custom-hf", unsaid, NOW_S)
        assert rate is not None
        assert all(host is not None and host.cost(usage) <= rate.cost(usage) for host in hosts)


@pytest.mark.parametrize(
    ("provider", "model", "hides"),
    [
        ("openai", "o3", True),
        ("openai", "o4-mini", True),
        ("openai", "gpt-5-mini", True),
        ("openai", "gpt-6-sol", True),
        ("openai", "gpt-4o", False),
        ("openai", "gpt-4.1", False),
        ("openai", "gpt-oss-120b", False),
        ("google-ai-studio", "gemini-2.5-flash", True),
        ("google-ai-studio", "gemini-3-pro-preview", True),
        ("google-ai-studio", "gemini-flash-latest", True),
        ("google-ai-studio", "gemini-2.0-flash", False),
        ("google-ai-studio", "gemini-1.5-pro", False),
        ("anthropic", "claude-sonnet-4-5", False),
        ("anthropic", "claude-opus-5", True),
        ("grok", "grok-4", True),
        ("grok", "grok-4-fast-non-reasoning", False),
        ("grok", "grok-3", False),
        ("openrouter", "openai/o3", True),
        ("openrouter", "google/gemini-2.5-pro", True),
        ("openrouter", "openai/gpt-4o", False),
        ("groq", "llama-3.3-70b-versatile", False),
        ("workers-ai", "@cf/openai/gpt-oss-120b", False),
    ],
)
def test_models_that_think_out_of_sight_are_marked(provider: str, model: str, hides: bool) -> None:
    rate = BOOK.rate(provider, model)
    assert rate is not None
    assert rate.hides_reasoning is hides


@pytest.mark.parametrize(
    ("provider", "model", "most"),
    [
        ("openai", "gpt-4o-mini", 16384),
        ("openai", "gpt-4", 8192),
        ("anthropic", "claude-3-haiku", 4096),
        ("anthropic", "claude-opus-4-1", 32_000),
        ("google-ai-studio", "gemini-1.5-flash", 8192),
        ("workers-ai", "@cf/meta/llama-2-7b-chat-fp16", None),
    ],
)
def test_the_longest_answer_is_known_or_said_to_be_unknown(
    provider: str, model: str, most: int | None
) -> None:
    rate = BOOK.rate(provider, model)
    assert rate is not None
    assert rate.max_output_tokens == most


def test_what_a_rate_does_not_hold_is_told() -> None:
    sonar = BOOK.rate("perplexity-ai", "sonar")
    mini = BOOK.rate("openai", "gpt-4o-mini")
    assert sonar is not None and mini is not None
    assert "requests_kcount" in sonar.extras
    assert "requests_kcount" not in mini.extras


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "no-such-model"),
        ("openai", ""),
        ("", "gpt-4o"),
        ("no-such-provider", "gpt-4o"),
        ("openai", "tts-1"),  # priced by the character
        ("openai", "whisper-1"),  # priced by the hour
        ("openai", "gpt-4o" + "x" * 10_000),
        ("openai", "\ud800"),
    ],
)
def test_what_has_no_price_per_token_has_no_rate(provider: str, model: str) -> None:
    assert BOOK.rate(provider, model) is None


def test_names_that_callers_make_up_do_not_fill_the_memory() -> None:
    book = PriceBook(assets.prices())
    for number in range(10_000):
        assert book.rate("openai", f"unknown-{number}") is None
    assert len(book._known) == 0
    for number in range(10_000):
        assert book.rate("anthropic", f"claude-3-haiku-{number}") is not None
    assert len(book._known) <= 4096


# -- one rate ------------------------------------------------------------------------------------

picos = st.integers(0, 10**9).map(Picos)


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    starts = [0, *sorted(draw(st.sets(st.integers(1, 300_000), max_size=3)))]
    return Rate(tuple(Tier(start, *(draw(picos) for _ in range(4))) for start in starts))


@given(rates(), usages)
def test_a_cost_is_the_exact_sum_of_its_buckets_rounded_upwards_once(
    rate: Rate, usage: Usage
) -> None:
    tier = next(
        (t for t in reversed(rate.tiers) if usage.input_total > t.above_input_tokens),
        rate.tiers[0],
    )
    buckets = [
        (usage.input, tier.input),
        (usage.cache_read, tier.cache_read),
        (usage.cache_write, tier.cache_write),
        (usage.output, tier.output),
    ]
    exact = Fraction(sum(count * price for count, price in buckets), 1000)
    assert rate.cost(usage) == math.ceil(exact)
    assert rate.cost(usage) >= 0
    rounded_each = sum(nanos_from_picos(count * price) for count, price in buckets)
    assert rate.cost(usage) <= rounded_each <= rate.cost(usage) + 3


@given(rates(), usages, tokens, tokens)
def test_more_output_never_costs_less(rate: Rate, usage: Usage, more: int, still: int) -> None:
    low = Usage(usage.input, usage.cache_read, usage.cache_write, more)
    high = Usage(usage.input, usage.cache_read, usage.cache_write, more + still)
    assert rate.cost(low) <= rate.cost(high)


@given(rates(), usages, usages)
def test_more_of_everything_costs_no_less_within_one_tier(
    rate: Rate, usage: Usage, more: Usage
) -> None:
    one_tier = Rate(rate.tiers[:1])
    both = Usage(
        usage.input + more.input,
        usage.cache_read + more.cache_read,
        usage.cache_write + more.cache_write,
        usage.output + more.output,
    )
    assert one_tier.cost(usage) <= one_tier.cost(both)
    assert one_tier.cost(both) <= one_tier.cost(usage) + one_tier.cost(more)


@given(rates(), usages, tokens, tokens)
def test_nothing_within_the_bounds_costs_more_than_the_worst_case(
    rate: Rate, usage: Usage, spare_input: int, spare_output: int
) -> None:
    worst = rate.worst_case(usage.input_total + spare_input, usage.output + spare_output)
    assert rate.cost(usage) <= worst


def test_a_whole_request_is_at_the_tier_of_its_total_input() -> None:
    rate = BOOK.rate("anthropic", "claude-sonnet-4-5")
    assert rate is not None
    at = rate.cost(Usage(input=100_000, cache_read=100_000, output=10))
    above = rate.cost(Usage(input=100_000, cache_read=100_001, output=10))
    assert at == 100_000 * 3000 + 100_000 * 300 + 10 * 15_000
    assert above == 100_000 * 6000 + 100_001 * 600 + 10 * 22_500


def test_the_worst_case_takes_the_dearest_tier_the_input_can_reach() -> None:
    rate = Rate(
        (
            Tier(0, Picos(10_000), Picos(1000), Picos(20_000), Picos(5000)),
            Tier(100, Picos(30_000), Picos(1000), Picos(1000), Picos(5000)),
            Tier(200, Picos(2000), Picos(1000), Picos(1000), Picos(5000)),
        )
    )
    assert rate.worst_case(100, 10) == 100 * 20 + 10 * 5
    assert rate.worst_case(101, 10) == 101 * 30 + 10 * 5
    assert rate.worst_case(300, 10) == 300 * 30 + 10 * 5
    assert rate.worst_case(0, 0) == 0


# -- times ---------------------------------------------------------------------------------------


def day(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def table(*prices: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "t",
        "aliases": {"other": "one"},
        "providers": {"one": {"models": {"m": {"names": ["m"], "prices": list(prices)}}}},
    }


def input_price(book: PriceBook, at_s: float | None) -> int:
    rate = book.rate("one", "m", at_s)
    assert rate is not None
    return rate.tiers[0].input


def flat(price: int, **when: Any) -> dict[str, Any]:
    return {**when, "tiers": [[0, price, price, price, price]]}


def test_a_price_holds_from_its_first_day_until_the_next_one() -> None:
    book = PriceBook(
        table(flat(10), {"from": "2026-03-01", **flat(7)}, {"from": "2026-05-01", **flat(9)})
    )
    assert input_price(book, day("2020-01-01")) == 10
    assert input_price(book, day("2026-03-01") - 1) == 10
    assert input_price(book, day("2026-03-01")) == 7
    assert input_price(book, day("2026-05-01") - 1) == 7
    assert input_price(book, day("2026-05-01")) == 9
    assert input_price(book, None) == 9


def test_hours_of_the_day_change_the_price_also_over_midnight() -> None:
    book = PriceBook(
        table(
            flat(10),
            {"from": "2026-03-01", **flat(5)},
            {"hours": ["22:30", "02:00"], **flat(20)},
            {"hours": ["06:00", "10:00"], **flat(3)},
        )
    )
    for clock, price in [
        ("22:29", 5),
        ("22:30", 20),
        ("23:59", 20),
        ("00:00", 20),
        ("01:59", 20),
        ("02:00", 5),
        ("06:00", 3),
        ("09:59", 3),
        ("10:00", 5),
    ]:
        assert input_price(book, day(f"2026-04-01T{clock}")) == price, clock
    assert input_price(book, None) == 20


def test_a_candidates_rate_is_that_of_the_moment_and_of_the_book() -> None:
    candidate = Candidate(Provider("one", "one", "one"), "m", "one/m", "m")

    def price(book: PriceBook, at_s: float) -> int:
        rate = book.rate_of(candidate, at_s)
        assert rate is not None
        return rate.tiers[0].input

    changing = PriceBook(table(flat(10), {"from": "2026-03-01", **flat(7)}))
    assert price(changing, day("2026-02-28")) == 10
    assert price(changing, day("2026-03-01")) == 7
    lasting = PriceBook(table(flat(10)))
    assert price(lasting, day("2026-02-28")) == 10
    assert price(lasting, day("2026-03-01")) == 10
    assert price(lasting.with_overrides({"one/m": FREE}), day("2026-03-01")) == 0
    assert lasting.rate_of(replace(candidate, model="n"), day("2026-03-01")) is None


def test_candidates_that_callers_make_up_do_not_fill_the_memory() -> None:
    book = PriceBook(table(flat(10)), {"one/*": FREE})
    for number in range(10_000):
        made_up = Candidate(Provider("one", "one", "one"), f"m{number}", "", "")
        assert book.rate_of(made_up, 0.0) is not None
    assert len(book._lasting) <= 4096


def test_the_history_has_every_price_with_its_time() -> None:
    book = PriceBook(
        table(flat(10), {"from": "2026-03-01", "hours": ["22:30", "02:00"], **flat(7)})
    )
    always, nightly = book.history("one", "m")
    assert (always.from_day, always.hours_s, always.rate.tiers[0].input) == (None, None, 10)
    assert nightly.from_day is not None and nightly.from_day * 86_400 == day("2026-03-01")
    assert nightly.hours_s == (22 * 3600 + 30 * 60, 2 * 3600)
    assert book.rate("one", "m", day("2026-03-01")) is nightly.rate
    assert book.history("other", "m") == book.history("one", "m")
    assert book.history("one", "n") == ()
    overridden = book.with_overrides({"one/m": FREE}).history("one", "m")
    assert [price.rate.overridden for price in overridden] == [True]


def test_a_model_is_found_by_the_first_clause_that_matches() -> None:
    row = {"prices": [flat(1)]}
    book = PriceBook(
        {
            "version": "t",
            "aliases": {},
            "providers": {
                "p": {
                    "models": {
                        "early": {**row, "match": [{"starts_with": "gpt-9-"}]},
                        "exact": {**row, "names": ["gpt-9-mini", "gpt-8"]},
                        "again": {**row, "names": ["gpt-8"]},
                        "late": {**row, "match": [{"contains": "gpt"}, {"ends_with": "!"}]},
                        "both": {
                            **row,
                            "match": [
                                {"and": [{"contains": "a"}, {"or": [{"equals": "ab"}]}]},
                                {"regex": r"^\d{3}$"},
                            ],
                        },
                    }
                }
            },
        }
    )

    def listed(name: str) -> str | None:
        rate = book.rate("p", name)
        return rate.listed_as if rate else None

    assert listed("gpt-9-mini") == "early"
    assert listed("GPT-8") == "exact"
    assert listed("gpt-80") == "late"
    assert listed("oh!") == "late"
    assert listed("ab") == "both"
    assert listed("123") == "both"
    assert listed("1234") is None
    assert listed("a") is None


def test_a_table_with_an_unknown_clause_is_not_guessed_at() -> None:
    broken = table(flat(1))
    broken["providers"]["one"]["models"]["m"]["match"] = [{"sounds_like": "m"}]
    with pytest.raises(ValueError, match="sounds_like"):
        PriceBook(broken)


# -- overrides -----------------------------------------------------------------------------------

FREE = {"input": "0", "output": 0}


def test_an_override_wins_over_the_table_and_keeps_what_the_model_is() -> None:
    book = PriceBook(
        assets.prices(),
        {"google/gemini-2.5-flash": {"input": "1.00", "output": Decimal("2"), "cache_read": "0.1"}},
    )
    rate = book.rate("google-ai-studio", "gemini-2.5-flash")
    assert rate is not None
    assert rate.tiers == (Tier(0, Picos(10**6), Picos(10**5), Picos(10**6), Picos(2 * 10**6)),)
    assert rate.overridden
    assert rate.hides_reasoning
    assert rate.max_output_tokens == 65536
    assert rate.extras == ()
    assert book.rate("google", "Gemini-2.5-Flash") == rate
    other = book.rate("google-ai-studio", "gemini-1.5-flash")
    assert other is not None and not other.overridden


def test_a_star_prices_what_has_no_override_of_its_own() -> None:
    book = PriceBook(
        assets.prices(),
        {"openai/*": {"input": "1", "output": "1"}, "openai/gpt-4o": {"input": "2", "output": "2"}},
    )
    for model, picos_per_token in [("gpt-4o", 2 * 10**6), ("gpt-4", 10**6), ("unheard-of", 10**6)]:
        rate = book.rate("openai", model)
        assert rate is not None and rate.tiers[0].input == picos_per_token
    assert book.rate("anthropic", "unheard-of") is None


def test_a_provider_unknown_to_the_table_is_priced_by_its_models_full_name() -> None:
    book = PriceBook(assets.prices(), {"mock/echo": {"input": "1.00", "output": "2.00"}})
    for provider, model in [("mock", "echo"), ("local", "mock/echo"), ("", "mock/echo")]:
        rate = book.rate(provider, model)
        assert rate is not None and rate.overridden, (provider, model)
    assert book.rate("openrouter", "mock/echo") is None
    assert "mock" in book.providers()
    assert book.models("mock") == ["echo"]


@pytest.mark.parametrize(
    "name",
    [
        "google-ai-studio/gemini-2.5-flash",
        "google/gemini-2.5-flash",
        "gemini/gemini-2.5-flash",
        "Gemini/Gemini-2.5-Flash",
    ],
)
def test_an_override_may_call_a_provider_by_any_of_its_names(name: str) -> None:
    book = PriceBook(assets.prices(), {name: {"input": "1", "output": "1"}})
    assert book.overrides() == ["google-ai-studio/gemini-2.5-flash"]
    assert book.canonical(name) == "google-ai-studio/gemini-2.5-flash"
    for asked in ("google-ai-studio", "google", "gemini"):
        rate = book.rate(asked, "gemini-2.5-flash")
        assert rate is not None and rate.overridden


def test_a_model_of_another_server_may_have_a_known_providers_name_in_its_own() -> None:
    book = PriceBook(assets.prices(), {"gemini/tuned": {"input": "1", "output": "1"}})
    rate = book.rate("local", "gemini/tuned")
    assert rate is not None and rate.overridden


def test_an_overridden_model_is_listed_once_and_as_it_is_written_upstream() -> None:
    name = "meta-llama/Llama-3.3-70B-Instruct"
    book = PriceBook(assets.prices(), {f"custom-hf/{name}": {"input": "1", "output": "1"}})
    assert book.models("custom-hf") == BOOK.models("custom-hf")
    assert name in book.models("custom-hf")


def test_an_override_can_say_what_the_table_cannot_know() -> None:
    book = PriceBook(
        assets.prices(), {"local/thinker": {**FREE, "max_output_tokens": 99, "reasons": True}}
    )
    rate = book.rate("local", "thinker")
    assert rate is not None
    assert (rate.max_output_tokens, rate.hides_reasoning) == (99, True)
    assert rate.cost(Usage(input=10**6, output=10**6)) == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "1"}, "needs output"),
        ({"output": "1"}, "needs input"),
        ({"input": 1.5, "output": "1"}, "input of .* must be a decimal number"),
        ({"input": True, "output": "1"}, "input of .* must be a decimal number"),
        ({"input": [], "output": "1"}, "input of .* must be a decimal number"),
        ({"input": "-1", "output": "1"}, "input of .* must not be negative"),
        ({"input": "1", "output": "0.0000001"}, "output of .* more than 6 decimals"),
        ({**FREE, "outptu": "1"}, "unknown field: outptu"),
        ({**FREE, "max_output_tokens": 0}, "max_output_tokens"),
        ({**FREE, "max_output_tokens": True}, "max_output_tokens"),
        ({**FREE, "reasons": 1}, "reasons"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        PriceBook(assets.prices(), {"mock/echo": row})
    assert '"mock/echo"' in str(refusal.value)


def test_an_organizations_prices_lie_on_top_of_the_operators() -> None:
    operators = BOOK.with_overrides({"openai/gpt-4o": {"input": "1", "output": "1"}, "a/b": FREE})
    own = operators.with_overrides({"openai/gpt-4o": {"input": "9", "output": "9"}})
    for book, usd in [(operators, 1), (own, 9)]:
        rate = book.rate("openai", "gpt-4o")
        assert rate is not None and rate.tiers[0].input == usd * 10**6
        assert book.rate("a", "b") is not None
    assert BOOK.rate("a", "b") is None
    assert BOOK.with_overrides({}) is BOOK


def test_the_version_names_the_table_and_the_overrides() -> None:
    one = BOOK.with_overrides({"a/b": {"input": "1", "output": "2"}})
    same = BOOK.with_overrides({"a/b": {"input": "1.0", "output": 2, "cache_read": "1"}})
    other = BOOK.with_overrides({"a/b": {"input": "1", "output": "3"}})
    assert BOOK.version == assets.prices()["version"]
    assert one.version == same.version != other.version
    assert one.version.startswith(f"{BOOK.version}+")
