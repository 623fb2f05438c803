"""`gwproxy prices build`: compile the table that is shipped from the price list it comes from.

That library is imported here alone, when it is needed: it costs 30 MiB and a quarter of a second,
and the serving process needs neither it nor its data.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from gwproxy import assets
from gwproxy.cli.prices.table import Row
from gwproxy.core.pricing import PriceBook


def build_table(args: argparse.Namespace) -> int:
    try:
        from genai_prices.data import providers
    except ImportError:
        print(
            "genai-prices is not installed: pip install '.[prices]' in the checkout",
            file=sys.stderr,
        )
        return 2
    table = compile_table(providers, metadata.version("genai-prices"))
    PriceBook(table)  # a table that cannot be read is never written
    written = serialise(table)
    out: Path = args.out or Path(assets.__file__).parent / "data" / assets.PRICES
    before = out.read_bytes() if out.exists() else b""
    models = sum(len(listing["models"]) for listing in table["providers"].values())
    if not args.check and written != before:
        out.write_bytes(written)
    current = written == before
    if args.json:
        print(
            json.dumps(
                {
                    "version": table["version"],
                    "models": models,
                    "file": str(out),
                    "changed": not current,
                    "written": not current and not args.check,
                }
            )
        )
    else:
        state = "up to date" if current else "out of date" if args.check else "written"
        print(f"{out}: {state}, {models} models, prices {table['version']}")
    return 1 if args.check and not current else 0


SOURCES = {
    "anthropic": "anthropic",
    "aws-bedrock": "aws",
    "azure-openai": "azure",
    "baseten": "baseten",
    "cerebras": "cerebras",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "fireworks": "fireworks",
    "google-ai-studio": "google",
    "google-vertex-ai": "google",
    "grok": "x-ai",
    "groq": "groq",
    "mistral": "mistral",
    "openai": "openai",
    "openrouter": "openrouter",
    "perplexity-ai": "perplexity",
    "workers-ai": "cloudflare",
}
"""Cloudflare's name of a provider, and the one under which its prices are listed."""

ALIASES = {
    "custom-huggingface": "custom-hf",
    "google": "google-ai-studio",
    "huggingface": "custom-hf",
    "perplexity": "perplexity-ai",
    "x-ai": "grok",
    "xai": "grok",
}

# These serve other vendors' models at those vendors' prices.
FALLBACK = {
    "azure-openai": ["openai", "anthropic", "deepseek", "grok"],
    "google-vertex-ai": ["anthropic"],
}

# Prefixes that callers write before a name and the price list does not.
STRIP = {"google-ai-studio": ["models/"], "google-vertex-ai": ["google/"]}

# The price list has one page for both of Google's shops, and Claude is sold in one of them alone:
# with a price in the other, the bare name of a Claude model would have two owners.
NOT_SERVED = {"google-ai-studio": ("claude-",)}
"""By provider: how the names begin of what its page lists and it does not serve."""

HUGGINGFACE = "huggingface_"

_TOKEN_KEYS = ("input_mtok", "cache_read_mtok", "cache_write_mtok", "output_mtok")


def compile_table(sources: Iterable[Any], source_version: str) -> Row:
    """The table as `PriceBook` takes it, from genai-prices' providers.

    Each model keeps the order and the ways of matching names of the source, so that a name means
    the same model here and there. Models without a price per token are left out, unless their
    names would then be taken for another model's.
    """
    by_id = {source.id: source for source in sources}
    providers: Row = {}
    for slug, source_id in SOURCES.items():
        listing: Row = {}
        if slug in FALLBACK:
            listing["fallback"] = FALLBACK[slug]
        if slug in STRIP:
            listing["strip"] = STRIP[slug]
        served = [
            model
            for model in by_id[source_id].models
            if not model.id.startswith(NOT_SERVED.get(slug, ()))
        ]
        listing["models"] = _models(served)
        providers[slug] = listing
    providers["custom-hf"] = {
        "models": _routed_models(
            {
                source_id.removeprefix(HUGGINGFACE): source.models
                for source_id, source in by_id.items()
                if source_id.startswith(HUGGINGFACE)
            }
        )
    }
    providers = dict(sorted(providers.items()))
    content = orjson.dumps([ALIASES, providers])
    digest = hashlib.sha256(content).hexdigest()[:12]
    return {
        "version": f"genai-prices-{source_version}-{digest}",
        "unit": "pico-USD per token: [above_input_tokens, input, cache_read, cache_write, output]",
        "aliases": ALIASES,
        "providers": providers,
    }


def serialise(table: Row) -> bytes:
    """One model a line, so that a change of price is a change of one line."""

    def compact(value: object) -> str:
        return orjson.dumps(value).decode()

    providers = []
    for slug, listing in table["providers"].items():
        head = [
            f"{compact(key)}: {compact(value)},"
            for key, value in listing.items()
            if key != "models"
        ]
        models = ",\n".join(
            f"{compact(model_id)}: {compact(row)}" for model_id, row in listing["models"].items()
        )
        providers.append(
            "\n".join([f"{compact(slug)}: {{", *head, f'"models": {{\n{models}\n}}}}'])
        )
    head = [f"{compact(key)}: {compact(table[key])}," for key in ("version", "unit", "aliases")]
    body = ",\n".join(providers)
    return "\n".join(["{", *head, f'"providers": {{\n{body}\n}}}}\n']).encode()


def _models(models: list[Any]) -> Row:
    rows: Row = {}
    prices_of = [_prices(model) for model in models]
    priced = [model for model, prices in zip(models, prices_of, strict=True) if prices]
    for model, prices in zip(models, prices_of, strict=True):
        names, clauses = _matching(model.match)
        if not prices and not clauses:
            mistaken = any(other.is_match(name) for other in priced for name in names)
            if not mistaken:
                continue
        rows[model.id] = _row(
            model.id, names, clauses, model.context_window, _extras(model), prices
        )
    return rows


def _row(
    model_id: str,
    names: list[str],
    clauses: list[Row],
    context: int | None,
    extras: list[str],
    prices: list[Row],
) -> Row:
    row: Row = {"names": names}
    if clauses:
        row["match"] = clauses
    if context:
        row["context"] = context
    if most := _max_output(model_id):
        row["max_output"] = most
    if _HIDES_REASONING.search(model_id.lower()):
        row["reasons"] = True
    if extras:
        row["extras"] = extras
    row["prices"] = prices
    return row


def _matching(match: Any) -> tuple[list[str], list[Row]]:
    """A model's exact names, and what else its name may look like."""
    clause = _clause(match)
    parts: list[Row] = clause.get("or", [clause])
    names = [part["equals"] for part in parts if "equals" in part]
    return names, [part for part in parts if "equals" not in part]


def _clause(match: Any) -> Row:
    ((field, value),) = vars(match).items()
    if isinstance(value, list):
        return {field.rstrip("_"): [_clause(part) for part in value]}
    return {field: value}


def _prices(model: Any) -> list[Row]:
    """Every version of a model's price, in the order in which the later valid one wins."""
    if not isinstance(model.prices, list):
        tiers = _tiers(model.prices)
        return [{"tiers": tiers}] if tiers else []
    rows = []
    for conditional in model.prices:
        tiers = _tiers(conditional.prices)
        if not tiers:
            continue
        constraint = vars(conditional.constraint) if conditional.constraint else {}
        row: Row = {}
        if start := constraint.get("start_date"):
            row["from"] = start.isoformat()
        if start := constraint.get("start_time"):
            hours = (start, constraint["end_time"])
            if any(hour.utcoffset() for hour in hours):
                raise ValueError(f"{model.id}: hours that are not in UTC")
            row["hours"] = [hour.strftime("%H:%M") for hour in hours]
        rows.append(row | {"tiers": tiers})
    return rows


def _tiers(price: Any) -> list[list[int]]:
    given = {key: value for key in _TOKEN_KEYS if (value := vars(price).get(key)) is not None}
    if "input_mtok" not in given and "output_mtok" not in given:
        return []
    starts = sorted(
        {tier.start for value in given.values() for tier in getattr(value, "tiers", ())}
    )
    rows = []
    for start in (0, *starts):
        at_tier = {key: _picos(_value_at(value, start)) for key, value in given.items()}
        fresh = at_tier.get("input_mtok", 0)
        rows.append(
            [
                start,
                fresh,
                at_tier.get("cache_read_mtok", fresh),
                at_tier.get("cache_write_mtok", fresh),
                at_tier.get("output_mtok", 0),
            ]
        )
    return rows


def _value_at(value: Any, start: int) -> Decimal:
    if isinstance(value, Decimal):
        return value
    reached: Decimal = value.base
    for tier in value.tiers:
        if tier.start <= start:
            reached = tier.price
    return reached


def _picos(usd_per_mtok: Decimal) -> int:
    """Nearly all prices are exact; the rest are float noise such as 0.18000000000000002."""
    return int((usd_per_mtok * 10**6).to_integral_value(ROUND_HALF_EVEN))


def _extras(model: Any) -> list[str]:
    prices = model.prices if isinstance(model.prices, list) else [model]
    return sorted(
        {
            key
            for price in prices
            for key, value in vars(price.prices).items()
            if value is not None and key not in _TOKEN_KEYS
        }
    )


def _routed_models(models_by_host: Mapping[str, list[Any]]) -> Row:
    """HuggingFace's router: `model:host` costs what that host asks. Without a host, or with one of
    the router's own policies, nobody knows beforehand which host it will be: the dearest counts."""
    rows: Row = {}
    hosts: dict[str, list[Any]] = {}
    for host, models in sorted(models_by_host.items()):
        for model in models:
            names, clauses = _matching(model.match)
            if clauses:
                raise ValueError(f"{host}: {model.id} matches more than exact names")
            prices = _prices(model)
            if not prices:
                continue
            names = [f"{name}:{host}" for name in names]
            model_id = f"{model.id}:{host}"
            rows[model_id] = _row(model_id, names, [], model.context_window, _extras(model), prices)
            hosts.setdefault(model.id, []).append(model)
    for model_id, models in hosts.items():
        names = sorted({name for model in models for name in _matching(model.match)[0]})
        names += [f"{name}:{policy}" for name in names for policy in ("fastest", "cheapest")]
        context = max((model.context_window or 0 for model in models), default=0)
        extras = sorted({extra for model in models for extra in _extras(model)})
        rows[model_id] = _row(model_id, names, [], context, extras, _dearest(models))
    return dict(sorted(rows.items()))


def _dearest(models: list[Any]) -> list[Row]:
    """For each day on which some price changed, the highest of each rate."""
    histories = [_prices(model) for model in models]
    if any("hours" in row or len(row["tiers"]) > 1 for rows in histories for row in rows):
        raise ValueError(f"{models[0].id}: tiers or hours, which cannot be combined")
    days = sorted({row.get("from", "") for rows in histories for row in rows})
    combined = []
    for day in days:
        valid = [
            next((row for row in reversed(rows) if row.get("from", "") <= day), rows[0])
            for rows in histories
        ]
        highest = [max(column) for column in zip(*(row["tiers"][0] for row in valid), strict=True)]
        combined.append(({"from": day} if day else {}) | {"tiers": [highest]})
    return combined


# -- what the price list does not say ------------------------------------------------------------

_HIDES_REASONING = re.compile(
    r"""(?:^|[/.~:])(?:
        o[134](?:-|$)                                    # OpenAI's o series
      | codex | gpt-(?:[5-9]|\d\d) | gpt-chat-latest     # GPT-5 and what came after it
      | gpt-rosalind | gpt-sol
      | gemini-(?!1|2\.0|pro$|pro-1|pro-vision|flash-1|flash-lite-1|embedding)
      | gemini-2\.0-flash-thinking
      | claude-(?:fable|mythos|(?:opus|sonnet|haiku)-(?:[5-9]|latest)|[5-9])
      | grok-(?:[4-9]|build|code)(?!.*non-reasoning)
      | sonar-deep-research
    )""",
    re.VERBOSE,
)
"""Models that think without being asked and bill it without showing all of it. Claude up to 4.8
thinks only when the request says so; open models show their reasoning in the answer."""

_MAX_OUTPUT: tuple[tuple[str, int], ...] = (
    (r"gpt-3\.5-turbo$|gpt-3\.5-turbo-1106$", 4096),
    (r"gpt-4$", 8192),
    (r"gpt-4-turbo|gpt-4-vision-preview|gpt-4o-2024-05-13$", 4096),
    (r"gpt-4o$|gpt-4o-mini$", 16384),
    (r"gpt-4\.1(?:-mini|-nano)?$", 32768),
    (
        r"gpt-5(?:-mini|-nano|\.1|\.2|\.4|\.4-mini|\.4-nano|\.5|\.6-sol|\.6-terra|\.6-luna)?$",
        128_000,
    ),
    (r"gpt-6\.1-sol$", 128_000),
    (r"o1$|o1-pro$|o3$|o3-pro$|o3-mini$|o4-mini$", 100_000),
    (r"o1-mini$", 65536),
    (r"o1-preview$", 32768),
    (r"claude-3-(?:haiku|sonnet|opus)", 4096),
    (r"claude-3[-.]5-(?:haiku|sonnet)", 8192),
    (r"claude-(?:opus-4-[01]|4-opus)", 32_000),
    (r"claude-(?:sonnet-4-[05]|4-sonnet|haiku-4-5|opus-4-5)", 64_000),
    (r"claude-opus-4-[678]", 128_000),
    (r"claude-(?:opus-5|opus-5-5|sonnet-5|sonnet-5-5|fable-5-1)$", 128_000),
    (r"gemini-1\.5-(?:flash|pro)|gemini-2\.0-flash(?:-lite)?$", 8192),
    (r"gemini-2\.5-(?:flash|flash-lite|pro)$|gemini-3-(?:pro|flash)-preview$", 65536),
)
"""The most that one answer can hold, by the vendors' own pages. What is not here is not known."""

_MAX_OUTPUT_OF = [(re.compile(rf"(?:^|[/.])(?:{names})"), most) for names, most in _MAX_OUTPUT]


def _max_output(model_id: str) -> int | None:
    for pattern, most in _MAX_OUTPUT_OF:
        if pattern.search(model_id.lower()):
            return most
    return None
