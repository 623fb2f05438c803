"""Usage: what one answer consumed, in buckets that do not overlap. Pure: an object comes in as it
was parsed, a value goes out, and whatever a provider may have sent, nothing is raised."""

from typing import Any

import msgspec

MOST_TOKENS = 10**9
"""A larger count is a fault of the sender, not a usage: no model reads or writes that much."""

_OTHER_PLACES = frozenset(
    {
        "cached_tokens",
        "prompt_cache_hit_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "reasoning_tokens",
    }
)
"""Where providers other than OpenAI put the details."""

_NO_DETAILS: dict[str, Any] = {}


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer. The input buckets are disjoint; the output includes the reasoning."""

    input: int = 0
    """Fresh input: neither read from a provider's cache nor written to it."""
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0

    def __post_init__(self) -> None:
        if (
            self.input < 0
            or self.cache_read < 0
            or self.cache_write < 0
            or not 0 <= self.reasoning <= self.output
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
        if type(reported) is not dict:
            return None
        plain = cls._from_plain(reported)
        if plain is not None:
            return plain
        get = reported.get
        prompt = _count(get("prompt_tokens"))
        completion = _count(get("completion_tokens"))
        total = _count(get("total_tokens"))
        if prompt is None:
            if completion is None or total is None or total < completion:
                return None
            prompt = total - completion
        spoken = completion or 0
        # Gemini and xAI leave reasoning out of completion_tokens but not out of total_tokens.
        output = spoken
        if total is not None and total - prompt > spoken:
            output = total - prompt

        details = get("prompt_tokens_details")
        inner = details.get if type(details) is dict else _nothing
        read = _count(inner("cached_tokens"))
        if read is None:
            read = _first(
                get("prompt_cache_hit_tokens"),  # DeepSeek
                get("cached_tokens"),
                get("cache_read_input_tokens"),
            )
        write = _count(inner("cache_write_tokens"))
        if write is None:
            write = _first(get("cache_creation_input_tokens"))
        if read > prompt:
            read = prompt
        if write > prompt - read:
            write = prompt - read

        details = get("completion_tokens_details")
        inner = details.get if type(details) is dict else _nothing
        reasoning = _count(inner("reasoning_tokens"))
        if reasoning is None:
            reasoning = _first(get("reasoning_tokens"))
        if completion is not None and reasoning < output - completion:
            reasoning = output - completion
        return cls(prompt - read - write, read, write, output, min(reasoning, output))

    @classmethod
    def from_responses(cls, reported: object) -> "Usage | None":
        """Normalise the `usage` object of OpenAI's Responses: chat's in other words."""
        if type(reported) is not dict:
            return None
        return cls.from_openai(
            {
                "prompt_tokens": reported.get("input_tokens"),
                "completion_tokens": reported.get("output_tokens"),
                "total_tokens": reported.get("total_tokens"),
                "prompt_tokens_details": reported.get("input_tokens_details"),
                "completion_tokens_details": reported.get("output_tokens_details"),
            }
        )

    @classmethod
    def from_messages(cls, reported: object) -> "Usage | None":
        """Normalise the `usage` object of Anthropic's API, whose input leaves out what was read
        from its cache or written to it."""
        if type(reported) is not dict:
            return None
        fresh, output = _count(reported.get("input_tokens")), _count(reported.get("output_tokens"))
        if fresh is None and output is None:
            return None
        details = reported.get("output_tokens_details")
        thought = _first(details.get("thinking_tokens")) if type(details) is dict else 0
        return cls(
            fresh or 0,
            _first(reported.get("cache_read_input_tokens")),
            _first(reported.get("cache_creation_input_tokens")),
            output or 0,
            min(thought, output or 0),
        )

    @classmethod
    def _from_plain(cls, reported: dict[str, Any]) -> "Usage | None":
        """The same for what nearly all say: whole numbers that agree, in OpenAI's places alone.
        Half the price; None when it is anything else."""
        get = reported.get
        prompt, completion = get("prompt_tokens"), get("completion_tokens")
        inner = get("prompt_tokens_details") or _NO_DETAILS
        outer = get("completion_tokens_details") or _NO_DETAILS
        if type(prompt) is type(completion) is int and type(inner) is type(outer) is dict:
            read, reasoning = inner.get("cached_tokens", 0), outer.get("reasoning_tokens", 0)
            if (
                type(read) is type(reasoning) is int
                and 0 <= read <= prompt <= MOST_TOKENS
                and 0 <= reasoning <= completion <= MOST_TOKENS
                and get("total_tokens") == prompt + completion
                and "cache_write_tokens" not in inner
                and _OTHER_PLACES.isdisjoint(reported)
            ):
                return cls(prompt - read, read, 0, completion, reasoning)
        return None


def _count(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)  # some servers write 12.0
    if type(value) is int and 0 <= value <= MOST_TOKENS:
        return value
    return None


def _first(*values: Any) -> int:
    """The first that is a count, else 0."""
    for value in values:
        if value is not None:
            count = _count(value)
            if count is not None:
                return count
    return 0


def _nothing(name: str) -> None:
    """The look-up in details that are not there."""
