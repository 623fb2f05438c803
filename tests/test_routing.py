"""From a model's name to its candidates: the order of resolution, and the draw by weight."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy import assets
from gwproxy.config import load
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import (
    CATALOGUE,
    Candidate,
    Link,
    Provider,
    Routes,
    candidate_of,
    max_tokens_field,
    ordered,
)
from gwproxy.parts import build_routes

GEMINI = Provider("gemini", "google-ai-studio", "google-ai-studio", model="gemini-2.5-flash")
OPENAI = Provider("openai", "openai", "openai", max_tokens_field="max_completion_tokens")
HF = Provider("huggingface", "custom-hf", "custom-hf", model="meta/llama-4:novita")
VERTEX = Provider("vertex", "google-vertex-ai/google", "google-vertex-ai")
OLLAMA = Provider("ollama", "", "ollama", model="qwen3")
UPSTREAM = Provider("upstream", "", "openai")

CHAIN = (Link("gemini"), Link("openai", "gpt-4o", 80), Link("nobody", "x"), Link("openai"))

COMPAT = Routes(
    providers={each.name: each for each in (GEMINI, OPENAI, HF, VERTEX)},
    aliases={
        "auto": CHAIN,
        "openai/gpt-4o": (Link("gemini"),),
        "nothing": (Link("nobody", "x"),),
        "claude": (Link("anthropic", "claude-sonnet-4-5"),),
    },
    catalogue={
        "google-ai-studio": {"gemini-2.5-flash", "gemini-2.5-pro", "both"},
        "openai": {"gpt-4o", "both"},
    },
)
AS_OPENAI = Routes(
    providers={each.name: each for each in (GEMINI, OLLAMA)},
    aliases={"auto": (Link("ollama"),)},
    passthrough=UPSTREAM,
    serves_catalogue=False,
)


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        # 1: an exact alias, whatever else its name could mean
        ("auto", [("gemini", "gemini-2.5-flash"), ("openai", "gpt-4o")]),
        ("openai/gpt-4o", [("gemini", "gemini-2.5-flash")]),
        ("claude", [("anthropic", "claude-sonnet-4-5")]),
        ("nothing", None),
        # 2: a provider's name, prefix or alias, and the model as it is named
        ("gemini/gemini-2.5-pro", [("gemini", "gemini-2.5-pro")]),
        ("google-ai-studio/gemini-2.5-pro", [("gemini", "gemini-2.5-pro")]),
        ("google/gemini-2.5-pro", [("gemini", "gemini-2.5-pro")]),
        ("openai/unheard-of", [("openai", "unheard-of")]),
        ("huggingface/org/model:x", [("huggingface", "org/model:x")]),
        ("custom-hf/org/model:x", [("huggingface", "org/model:x")]),
        ("vertex/gemini-2.5-pro", [("vertex", "gemini-2.5-pro")]),
        ("google-vertex-ai/google/gemini-2.5-pro", [("vertex", "gemini-2.5-pro")]),
        ("google-vertex-ai/gemini-2.5-pro", [("vertex", "gemini-2.5-pro")]),
        # ... of the catalogue, although it is not configured
        ("xai/grok-4", [("grok", "grok-4")]),
        ("x-ai/grok-4", [("grok", "grok-4")]),
        ("anthropic/claude-opus-4-5", [("anthropic", "claude-opus-4-5")]),
        ("workers-ai/@cf/meta/llama-3.1-8b", [("workers-ai", "@cf/meta/llama-3.1-8b")]),
        ("cloudflare/@cf/meta/llama-3.1-8b", [("workers-ai", "@cf/meta/llama-3.1-8b")]),
        ("nobody/model", None),
        ("OpenAI/gpt-4o", None),
        # 4: a bare name of the one provider that has it
        ("gemini-2.5-pro", [("gemini", "gemini-2.5-pro")]),
        ("gpt-4o", [("openai", "gpt-4o")]),
        ("both", None),
        ("gpt-4", None),
        ("meta/llama-4:novita", None),
        # and what is no name of a model at all
        *(
            (name, None)
            for name in ("", "/", "openai/", "/gpt-4o", "//", "google-vertex-ai/google/")
        ),
    ],
)
def test_where_a_name_leads_when_the_upstream_wants_a_prefix(
    name: str, chain: list[tuple[str, str]] | None
) -> None:
    found = COMPAT.resolve(name)
    assert (found and [(each.provider.name, each.model) for each in found]) == chain
    for candidate in found or ():
        assert candidate.sent == f"{candidate.provider.prefix}/{candidate.model}"
        assert not candidate.verbatim


@pytest.mark.parametrize(
    ("name", "provider", "model", "sent", "prices"),
    [
        ("auto", "ollama", "qwen3", "qwen3", "ollama"),
        ("ollama/qwen3:30b", "ollama", "qwen3:30b", "qwen3:30b", "ollama"),
        ("google/gemini-2.5-pro", "gemini", "gemini-2.5-pro", ..., "google-ai-studio"),
        # What is not configured goes as it came, slashes included, and is priced by what it says.
        ("gpt-4o", "upstream", "gpt-4o", "gpt-4o", "openai"),
        ("openai/gpt-4o", "upstream", "gpt-4o", "openai/gpt-4o", "openai"),
        ("xai/grok-4", "upstream", "grok-4", "xai/grok-4", "grok"),
        ("mock/echo", "upstream", "mock/echo", "mock/echo", "openai"),
        ("meta-llama/llama-4/x", "upstream", "meta-llama/llama-4/x", "meta-llama/llama-4/x", ...),
        ("qwen3", "upstream", "qwen3", "qwen3", "openai"),
        ("openai/", "upstream", "openai/", "openai/", "openai"),
        ("/x", "upstream", "/x", "/x", "openai"),
    ],
)
def test_where_a_name_leads_at_an_openai_compatible_server(
    name: str, provider: str, model: str, sent: object, prices: object
) -> None:
    (found,) = AS_OPENAI.resolve(name) or ()
    assert (found.provider.name, found.model) == (provider, model)
    if sent is not ...:
        assert found.sent == sent
    if prices is not ...:
        assert found.provider.prices == prices
    assert found.verbatim == (provider == "upstream")


SHIPPED = load(
    Path(__file__).parents[1] / "config.toml",
    {
        "CLOUDFLARE_ACCOUNT_ID": "0" * 32,
        "CLOUDFLARE_GATEWAY_ID": "gw",
        "CLOUDFLARE_API_TOKEN": "token",
    },
    catalogue=CATALOGUE,
)


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("claude-sonnet-4-5", "anthropic"),
        ("claude-opus-4-5", "anthropic"),  # that nobody has in its table, but one sells
        ("gpt-4o-mini", "openai"),
        ("gemini-2.5-flash", "gemini"),
        ("gemini-2.5-pro", "gemini"),
    ],
)
def test_a_bare_name_leads_to_its_seller_with_the_shipped_configuration(
    name: str, provider: str
) -> None:
    (found,) = build_routes(SHIPPED, PriceBook(assets.prices())).resolve(name) or ()
    assert (found.provider.name, found.model) == (provider, name)


def test_who_is_configured_for_a_model_comes_before_who_has_a_price_for_it() -> None:
    shops = {each: frozenset({"both", "else"}) for each in ("openai", "google-ai-studio")}
    routes = Routes({"openai": OPENAI, "gemini": replace(GEMINI, model="both")}, catalogue=shops)
    (found,) = routes.resolve("both") or ()
    assert found.provider.name == "gemini"
    assert routes.resolve("else") is None  # two sell it, and nobody said which


def test_a_provider_is_found_by_its_name_before_its_prefix_and_its_alias() -> None:
    named = Provider("google", "custom-g", "custom-g")
    routes = Routes({"gemini": GEMINI, "google": named})
    (found,) = routes.resolve("google/gemini-2.5-pro") or ()
    assert found.sent == "custom-g/gemini-2.5-pro"


def test_an_alias_may_name_a_provider_in_all_the_ways_that_a_caller_may() -> None:
    links = tuple(Link(word, "m") for word in ("gemini", "google-ai-studio", "google", "xai"))
    routes = Routes({"gemini": GEMINI}, {"mine": links})
    found = routes.resolve("mine") or ()
    assert [each.provider.name for each in found] == ["gemini", "gemini", "gemini", "grok"]


def test_a_link_without_a_model_and_a_provider_without_one_is_no_candidate() -> None:
    assert Routes({"openai": OPENAI}, {"mine": (Link("openai"),)}).resolve("mine") is None


def test_an_alias_does_not_lead_to_another_alias() -> None:
    routes = Routes({"openai": OPENAI}, {"a": (Link("openai", "b"),), "b": (Link("openai", "x"),)})
    (found,) = routes.resolve("a") or ()
    assert found.model == "b"


@pytest.mark.parametrize("alias", sorted(set(CATALOGUE) - set(CATALOGUE.values())))
def test_a_friendly_name_and_its_slug_are_the_same_provider(alias: str) -> None:
    routes = Routes({})
    assert routes.resolve(f"{alias}/m") == routes.resolve(f"{CATALOGUE[alias]}/m")
    (found,) = routes.resolve(f"{alias}/m") or ()
    assert found.sent == f"{CATALOGUE[alias]}/m"


def test_only_openai_takes_the_newer_field_for_the_maximum() -> None:
    assert {slug for slug in CATALOGUE.values() if max_tokens_field(slug) != "max_tokens"} == {
        "openai"
    }


PARTS = st.sampled_from(
    [
        *("openai", "gemini", "google", "google-ai-studio", "google-vertex-ai", "vertex", "xai"),
        *("custom-hf", "huggingface", "ollama", "upstream", "nobody", "gpt-4o", "gemini-2.5-flash"),
        *("both", "auto", "claude", "", "@cf", "m", "openai/gpt-4o"),
    ]
)


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join), st.sampled_from([COMPAT, AS_OPENAI]))
def test_nobody_gets_a_model_that_he_did_not_name(name: str, routes: Routes) -> None:
    found = routes.resolve(name)
    if found is None or name in routes.aliases:
        return
    (candidate,) = found  # no fallback that he did not ask for either
    assert name in (candidate.sent, candidate.model) or name.endswith(f"/{candidate.model}")
    if not candidate.verbatim:
        provider, model = candidate.provider, candidate.model
        named = name.removesuffix(model).removesuffix("/")
        words = {"", provider.name, provider.prefix}
        words |= {
            word for word, slug in CATALOGUE.items() if slug in (provider.prefix, provider.prices)
        }
        assert named in words
        if not named:
            assert model == provider.model or model in routes.catalogue[provider.prices]
        assert candidate.sent.endswith(model)


# -- the draw --------------------------------------------------------------------------------------


def chain(*weights: int) -> tuple[Candidate, ...]:
    return tuple(
        replace(candidate_of(OPENAI, f"m{number}"), weight=weight)
        for number, weight in enumerate(weights)
    )


def names(candidates: object) -> list[str]:
    return [each.model for each in candidates]


@pytest.mark.parametrize(
    ("weights", "draw", "order"),
    [
        ((0, 0, 0), 0.99, ["m0", "m1", "m2"]),
        ((5,), 0.5, ["m0"]),
        ((80, 20), 0.0, ["m0", "m1"]),
        ((80, 20), 0.7999, ["m0", "m1"]),
        ((80, 20), 0.8, ["m1", "m0"]),
        ((80, 20), 1 - 2**-53, ["m1", "m0"]),
        ((0, 0, 7), 0.0, ["m2", "m0", "m1"]),
        ((0, 0, 7), 1 - 2**-53, ["m2", "m0", "m1"]),
        ((1, 0, 1, 0), 0.5, ["m2", "m0", "m1", "m3"]),
        ((1, 0, 1, 0), 0.49, ["m0", "m1", "m2", "m3"]),
    ],
)
def test_the_order_in_which_a_chain_is_tried(
    weights: tuple[int, ...], draw: float, order: list[str]
) -> None:
    assert names(ordered(chain(*weights), draw)) == order


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
)
def test_one_is_drawn_and_the_rest_follow_as_listed(weights: list[int], draw: float) -> None:
    listed = chain(*weights)
    tried = list(ordered(listed, draw))
    assert sorted(names(tried)) == sorted(names(listed))
    if any(weights):
        assert len(listed) == 1 or tried[0].weight > 0
        assert tried[1:] == [each for each in listed if each != tried[0]]
    else:
        assert tried == list(listed)


def test_draws_fall_as_the_weights_say() -> None:
    listed = chain(80, 0, 15, 5)
    source = random.Random(7)
    drawn = Counter(ordered(listed, source.random())[0].model for _ in range(20_000))
    shares = [drawn[name] / 20_000 for name in names(listed)]
    assert shares == pytest.approx([0.80, 0, 0.15, 0.05], abs=0.01)
