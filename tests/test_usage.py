"""Whatever a provider reports becomes disjoint buckets that add up, or nothing."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gwproxy.core.usage import MOST_TOKENS, Usage

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
near_counts = st.one_of(st.integers(-5, 50), st.integers(), st.floats(), json_values)
DETAILS = [
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "audio_tokens",
]
FIELDS = [
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "cached_tokens",
    "prompt_cache_hit_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "reasoning_tokens",
]
details = st.dictionaries(st.sampled_from(DETAILS), near_counts) | json_values
reports = st.builds(
    lambda counts, prompt, completion: {
        **counts,
        "prompt_tokens_details": prompt,
        "completion_tokens_details": completion,
    },
    st.dictionaries(st.sampled_from(FIELDS), near_counts),
    details,
    details,
)


@given(reports | json_values)
@example({"prompt_tokens": float("nan"), "completion_tokens": float("inf")})
@example({"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 10**400}})
def test_nothing_that_a_provider_sends_raises_and_what_comes_out_adds_up(reported: Any) -> None:
    usage = Usage.from_openai(reported)
    if usage is None:
        return
    buckets = (usage.input, usage.cache_read, usage.cache_write, usage.output, usage.reasoning)
    assert all(type(count) is int and 0 <= count <= MOST_TOKENS for count in buckets)
    assert usage.reasoning <= usage.output
    assert usage.input_total == usage.input + usage.cache_read + usage.cache_write
    prompt = reported.get("prompt_tokens")
    if type(prompt) is int and 0 <= prompt <= MOST_TOKENS:
        assert usage.input_total == prompt
    completion = reported.get("completion_tokens")
    if type(completion) is int and 0 <= completion <= MOST_TOKENS:
        assert usage.output >= completion


@given(
    st.integers(0, 20), st.integers(0, 20), st.integers(0, 25), st.integers(0, 25), st.booleans()
)
def test_the_quick_way_says_what_the_long_way_says(
    prompt: int, completion: int, read: int, reasoning: int, told: bool
) -> None:
    plain = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": read} if told else None,
    }
    if told:
        plain["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    # A detail that says nothing is one that the quick way does not know.
    assert Usage.from_openai(plain) == Usage.from_openai({**plain, "reasoning_tokens": None})


@pytest.mark.parametrize(
    ("name", "reported", "usage"),
    [
        (
            "OpenAI",
            {
                "prompt_tokens": 100,
                "completion_tokens": 50,
                "total_tokens": 150,
                "prompt_tokens_details": {"cached_tokens": 30, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 20},
            },
            Usage(input=70, cache_read=30, output=50, reasoning=20),
        ),
        (
            "Gemini and xAI leave reasoning out of completion_tokens",
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40},
            Usage(input=10, output=30, reasoning=25),
        ),
        (
            "reasoning that is told and also left out is counted once",
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 40,
                "completion_tokens_details": {"reasoning_tokens": 25},
            },
            Usage(input=10, output=30, reasoning=25),
        ),
        (
            "DeepSeek",
            {
                "prompt_tokens": 100,
                "completion_tokens": 1,
                "total_tokens": 101,
                "prompt_cache_hit_tokens": 60,
                "prompt_cache_miss_tokens": 40,
            },
            Usage(input=40, cache_read=60, output=1),
        ),
        (
            "cached_tokens at the top",
            {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 4},
            Usage(input=5, cache_read=4, output=1),
        ),
        (
            "cache counts under Anthropic's names",
            {
                "prompt_tokens": 100,
                "completion_tokens": 1,
                "cache_read_input_tokens": 20,
                "cache_creation_input_tokens": 30,
            },
            Usage(input=50, cache_read=20, cache_write=30, output=1),
        ),
        (
            "cache writes in the details",
            {
                "prompt_tokens": 100,
                "completion_tokens": 1,
                "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 30},
            },
            Usage(input=50, cache_read=20, cache_write=30, output=1),
        ),
        (
            "the details win, also with zero",
            {
                "prompt_tokens": 9,
                "completion_tokens": 1,
                "prompt_tokens_details": {"cached_tokens": 0},
                "cached_tokens": 4,
            },
            Usage(input=9, output=1),
        ),
        (
            "details that are null are no details",
            {
                "prompt_tokens": 9,
                "completion_tokens": 1,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
                "cached_tokens": 4,
            },
            Usage(input=5, cache_read=4, output=1),
        ),
        (
            "more cached than there was is cut to what there was",
            {
                "prompt_tokens": 10,
                "completion_tokens": 1,
                "cached_tokens": 8,
                "cache_creation_input_tokens": 8,
            },
            Usage(input=0, cache_read=8, cache_write=2, output=1),
        ),
        (
            "embeddings",
            {"prompt_tokens": 8, "total_tokens": 8},
            Usage(input=8),
        ),
        (
            "zero is a value",
            {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            Usage(),
        ),
        (
            "a prompt can be told by what is left of the total",
            {"completion_tokens": 5, "total_tokens": 12},
            Usage(input=7, output=5),
        ),
        (
            "a total that is too small changes nothing",
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 3},
            Usage(input=10, output=5),
        ),
        (
            "whole floats are counts",
            {"prompt_tokens": 10.0, "completion_tokens": 5.0},
            Usage(input=10, output=5),
        ),
        (
            "a wild total is not believed",
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 10**12},
            Usage(input=10, output=5),
        ),
        ("nothing", {}, None),
        ("not an object", [1], None),
        ("null", None, None),
        ("a total alone cannot be priced", {"total_tokens": 12}, None),
        ("an answer without a prompt", {"completion_tokens": 12}, None),
        ("text", {"prompt_tokens": "10", "completion_tokens": "5"}, None),
        ("booleans", {"prompt_tokens": True, "completion_tokens": True}, None),
        ("negative", {"prompt_tokens": -1, "completion_tokens": 5}, None),
        ("beyond belief", {"prompt_tokens": 10**10, "completion_tokens": 5}, None),
    ],
)
def test_each_dialect_of_usage_is_understood(name: str, reported: Any, usage: Usage | None) -> None:
    assert Usage.from_openai(reported) == usage, name


def test_buckets_that_cannot_be_are_refused() -> None:
    for impossible in ({"input": -1}, {"cache_read": -1}, {"output": 1, "reasoning": 2}):
        with pytest.raises(ValueError, match="cannot be"):
            Usage(**impossible)
