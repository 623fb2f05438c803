"""Usage: what one answer consumed, in buckets that do not overlap. Pure: an object comes in as it
was parsed, a value goes out, and whatever a provider may have sent, nothing is raised."""

from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 10**9
"""A larger count is a fault of the sender, not a usage: no model reads or writes that much."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. The input buckets are disjoint; the output includes the reasoning."""

    input: int = 0
    """Fresh input: neither read from a provider's cache nor written to it."""
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.input, self.cache_read, self.cache_write, self.reasoning) < 0
            or self.reasoning > self.output
        ):
            raise ValueError(f"these buckets cannot be: {self}")

    @property
    def input_total(self) -> int:
        return self.input + self.cache_read + self.cache_write

    @classmethod
    def from_openai(cls, reported: object) -> "Usage | None":
        """Normalise the `usage` object of a chat completion; None when it says nothing usable.

        Zero is a usable value. Counts that are not whole numbers between 0 and 10**9 are read as
        if they were absent; details larger than the count they are part of are cut to it.
        """
        if not isinstance(reported, dict):
            return None
        prompt = _count(reported.get("prompt_tokens"))
        completion = _count(reported.get("completion_tokens"))
        total = _count(reported.get("total_tokens"))
        if prompt is None:
            if completion is None or total is None or total < completion:
                return None
            prompt = total - completion
        # Gemini and xAI leave reasoning out of completion_tokens but not out of total_tokens.
        output = max(completion or 0, (total or 0) - prompt)

        prompt_details = _details(reported, "prompt_tokens_details")
        cache_read = _first(
            prompt_details.get("cached_tokens"),
            reported.get("prompt_cache_hit_tokens"),  # DeepSeek
            reported.get("cached_tokens"),
            reported.get("cache_read_input_tokens"),
        )
        cache_write = _first(
            prompt_details.get("cache_write_tokens"),
            reported.get("cache_creation_input_tokens"),
        )
        cache_read = min(cache_read, prompt)
        cache_write = min(cache_write, prompt - cache_read)
        reasoning = _first(
            _details(reported, "completion_tokens_details").get("reasoning_tokens"),
            reported.get("reasoning_tokens"),
        )
        unspoken = output - (completion or 0) if completion is not None else 0
        usage = cls(
            input=prompt - cache_read - cache_write,
            cache_read=cache_read,
            cache_write=cache_write,
            output=output,
            reasoning=min(max(reasoning, unspoken), output),
        )
        assert usage.input_total == prompt, "the input buckets add up to the prompt"
        return usage


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some servers write 12.0
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS:
        return value
    return None


def _first(*values: Any) -> int:
    """The first that is a count, else 0."""
    for value in values:
        count = _count(value)
        if count is not None:
            return count
    return 0


def _details(reported: dict[Any, Any], name: str) -> dict[Any, Any]:
    details = reported.get(name)
    return details if isinstance(details, dict) else {}
