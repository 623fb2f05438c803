"""How each provider dresses an answer: its chunks, its usage object and its oddities, as a
gateway's OpenAI-compatible endpoint lets them through. Pure.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from .refusals import in_stream
from .speech import Choice, Speech

SIGNATURE: Final = "CpQBAdHtim9rZXB0IGJ5dGUgZm9yIGJ5dGU="
_PADDING: Final = "Yk1qa3Z0dDNmOHg2cGwwYzd3"
_NEURONS_PER_TOKEN: Final = 0.06


class Role(Enum):
    """Where a stream names the assistant's role."""

    ALONE = "in a chunk of its own, with empty content"
    FIRST = "with the first content"
    EVERY = "in every chunk"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One provider's manners. The defaults are those of a plain OpenAI-compatible server."""

    slug: str
    role: Role = Role.FIRST
    usage_every: bool = False
    """Cumulative usage on each chunk."""
    usage_finish: bool = False
    """Usage on the chunk with the (last) finish_reason, asked for or not."""
    usage_last: str = "asked"
    """A last chunk with usage and no choices: "asked", "always" or "never"."""
    usage_null: bool = False
    """`usage: null` on the other chunks of a stream that was asked for usage."""
    details: bool = True
    """Usage tells cached and reasoning tokens apart."""
    hides_reasoning: bool = False
    """completion_tokens leaves reasoning out; only total_tokens holds it."""
    shows_reasoning: bool = False
    """Reasoning streams as `reasoning_content`."""
    reasons: tuple[str, int] | None = None
    """Models that match reason, for so many tokens unless a modifier says otherwise."""
    caches: bool = True
    whole_calls: bool = False
    """A tool call comes in one chunk."""
    call_finish: str = "tool_calls"
    newline: bytes = b"\n"
    comments: int = 0
    neurons: bool = False
    padding: bool = False
    groq: bool = False
    deepseek: bool = False


_DIALECTS: Final = {
    dialect.slug: dialect
    for dialect in (
        Dialect(
            "openai",
            role=Role.ALONE,
            usage_null=True,
            padding=True,
            reasons=(r"^(o\d|gpt-5)", 16),
        ),
        Dialect(
            "anthropic",
            usage_finish=True,
            usage_last="never",
            details=False,
            caches=False,
        ),
        Dialect(
            "google-ai-studio",
            role=Role.EVERY,
            usage_every=True,
            usage_last="never",
            details=False,
            hides_reasoning=True,
            reasons=(r"gemini-(2\.5|3)", 41),
            whole_calls=True,
            call_finish="stop",
        ),
        Dialect(
            "workers-ai",
            usage_last="always",
            details=False,
            caches=False,
            call_finish="stop",
            newline=b"\r\n",
            neurons=True,
        ),
        Dialect("groq", usage_finish=True, groq=True, reasons=(r"gpt-oss|qwen3", 4)),
        Dialect(
            "grok",
            role=Role.ALONE,
            hides_reasoning=True,
            reasons=(r"grok-(3-mini|4)", 32),
        ),
        Dialect("mistral", role=Role.ALONE, usage_finish=True, usage_last="never", details=False),
        Dialect(
            "deepseek",
            role=Role.ALONE,
            usage_finish=True,
            usage_last="never",
            shows_reasoning=True,
            reasons=(r"reasoner|r1", 12),
            deepseek=True,
        ),
        Dialect("custom-openrouter", usage_finish=True, usage_last="never", comments=2),
        Dialect("mock"),
        *(Dialect(slug) for slug in ("cerebras", "cohere", "baseten", "parallel", "perplexity")),
    )
}
_DIALECTS["google-vertex-ai"] = _DIALECTS["google-ai-studio"]


def dialect(slug: str) -> Dialect | None:
    """The provider behind a prefix; every `custom-...` is a plain OpenAI-compatible server."""
    if slug.startswith("custom-") and slug not in _DIALECTS:
        return Dialect(slug)
    return _DIALECTS.get(slug)


def slugs() -> list[str]:
    return sorted(_DIALECTS)


def default_reasoning(manners: Dialect, model: str) -> int:
    if manners.reasons is not None and re.search(manners.reasons[0], model):
        return manners.reasons[1]
    return 0


def default_cached(manners: Dialect, prompt: int) -> int:
    """DeepSeek's cache is on for everybody, so some of every longer prompt is a hit."""
    return prompt // 4 if manners.deepseek else 0


def complaint(manners: Dialect, model: str, body: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What this provider refuses that others take: (message, param, code)."""
    if manners.slug == "anthropic" and isinstance(body.get("n"), int) and body["n"] > 1:
        return "n must be 1", "n", "invalid_request_error"
    if (
        manners.slug == "openai"
        and default_reasoning(manners, model)
        and body.get("max_tokens") is not None
    ):
        return (
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            "max_tokens",
            "unsupported_parameter",
        )
    return None


@dataclass(frozen=True, slots=True)
class Event:
    """One data event and what it adds to the truth: `output` counts `reasoning` in."""

    data: dict[str, Any]
    output: int = 0
    reasoning: int = 0
    name: str = ""
    """Its `event:` line, in the APIs that have one."""
    usage: dict[str, Any] | None = None
    """Where it is not the data's own field."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A speech in its provider's clothes, ready to be sent whole or in events."""

    manners: Dialect
    speech: Speech
    id: str
    created: int
    model: str
    asked_usage: bool = False
    padded: bool = True
    """OpenAI pads its chunks unless the client declines it."""
    finishes: bool = True
    usage_mode: str = "true"
    """ "true", "none" or "bad"."""

    def whole(self) -> dict[str, Any]:
        """The answer as one chat.completion."""
        speech = self.speech
        choices = [
            {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": None,
                "finish_reason": self._finish(choice),
            }
            for choice in speech.choices
        ]
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.usage_mode != "none":
            body["usage"] = self._usage(self.spoken(), speech.reasoning)
        if self.manners.padding:
            body["service_tier"] = "default"
            body["system_fingerprint"] = None
        if self.manners.groq:
            body["x_groq"] = {"id": f"req_{self.id[-12:]}"}
        return body

    @staticmethod
    def trouble(note: str) -> Event:
        """The event that says the stream has failed."""
        return Event(in_stream(note))

    def spoken(self) -> int:
        """Tokens that are not reasoning."""
        return sum(len(choice.pieces) for choice in self.speech.choices)

    def events(self) -> Iterator[Event]:
        """The answer as chunks, the choices taking turns."""
        manners, choices = self.manners, self.speech.choices
        spoken = thought = 0
        # Hidden reasoning is done, and billable, before the first chunk can be.
        unsaid = 0 if manners.shows_reasoning else self.speech.reasoning

        def event(
            choice: Choice, delta: dict[str, Any], finish: str | None = None, spoke: int = 0
        ) -> Event:
            nonlocal spoken, thought, unsaid
            shown = 1 if "reasoning_content" in delta else 0
            spoken, thought, new = spoken + spoke, thought + shown + unsaid, shown + unsaid
            unsaid = 0
            if manners.role is Role.EVERY:
                delta = {"role": "assistant", **delta}
            chunk = self._chunk(
                [{"index": choice.index, "delta": delta, "finish_reason": finish}],
            )
            last = choice is choices[-1]
            if manners.usage_every or (manners.usage_finish and last and finish == _LAST_WORD):
                self._put_usage(chunk, spoken, thought)
            if finish == _LAST_WORD:
                chunk["choices"][0]["finish_reason"] = self._finish(choice)
            return Event(chunk, spoke + new, new)

        if manners.role is Role.ALONE:
            for choice in choices:
                content = None if choice.call else ""
                yield event(choice, {"role": "assistant", "content": content, "refusal": None})
        fresh = {choice.index for choice in choices} if manners.role is Role.FIRST else set()

        def role(choice: Choice) -> dict[str, Any]:
            if choice.index not in fresh:
                return {}
            fresh.discard(choice.index)
            return {"role": "assistant"}

        if manners.shows_reasoning:
            for choice in choices:
                for piece in choice.thoughts:
                    delta = {**role(choice), "content": None, "reasoning_content": piece}
                    yield event(choice, delta)
        deltas = [choice.deltas for choice in choices]
        for turn in range(max((len(own) for own in deltas), default=0)):
            for choice, own in zip(choices, deltas, strict=True):
                if turn >= len(own):
                    continue
                text, tokens = own[turn]
                if choice.call is None:
                    yield event(choice, {**role(choice), "content": text}, spoke=tokens)
                elif not manners.whole_calls:
                    if turn == 0:
                        call = _call(choice, "")
                        yield event(choice, {**role(choice), "tool_calls": [call]})
                    part = {"index": 0, "function": {"arguments": text}}
                    yield event(choice, {"tool_calls": [part]}, spoke=tokens)
        for choice in choices:
            if choice.call is not None and manners.whole_calls:
                call = {
                    **_call(choice, choice.text),
                    "extra_content": {"google": {"thought_signature": SIGNATURE}},
                }
                tokens = len(choice.pieces)
                yield event(choice, {"tool_calls": [call]}, _LAST_WORD, spoke=tokens)
            else:
                delta = {"content": ""} if manners.role is Role.EVERY or manners.comments else {}
                yield event(choice, {**role(choice), **delta}, _LAST_WORD)
        if manners.usage_last == "always" or (manners.usage_last == "asked" and self.asked_usage):
            chunk = self._chunk([])
            if self.usage_mode != "none":
                self._put_usage(chunk, spoken, thought)
                yield Event(chunk)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.manners.padding:
            chunk["service_tier"] = "default"
        if self.manners.usage_null and self.asked_usage and self.usage_mode != "none":
            chunk["usage"] = None
        if self.manners.padding and self.padded:
            # Padding hides the length of the content from whoever watches the wire.
            size = len(str(choices))
            chunk["obfuscation"] = _PADDING[: size % len(_PADDING)] if choices else ""
        if self.manners.groq and choices:
            chunk["x_groq"] = {"id": f"req_{self.id[-12:]}"}
        return chunk

    def _put_usage(self, chunk: dict[str, Any], spoken: int, thought: int) -> None:
        if self.usage_mode == "none":
            return
        chunk["usage"] = self._usage(spoken, thought)
        if "x_groq" in chunk:
            chunk["x_groq"]["usage"] = chunk["usage"]

    def _usage(self, spoken: int, thought: int) -> dict[str, Any]:
        if self.usage_mode == "bad":
            return {
                "prompt_tokens": -5,
                "completion_tokens": True,
                "total_tokens": "many",
                "prompt_tokens_details": {"cached_tokens": 1e300},
                "completion_tokens_details": None,
            }
        return usage(self.manners, self.speech, spoken, thought)

    def _finish(self, choice: Choice) -> str | None:
        if not self.finishes:
            return None
        if choice.cut:
            return "length"
        return self.manners.call_finish if choice.call else "stop"

    def _message(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.call is not None:
            call = _call(choice, choice.text)
            del call["index"]
            if self.manners.whole_calls:
                call["extra_content"] = {"google": {"thought_signature": SIGNATURE}}
            message |= {"content": None, "tool_calls": [call]}
        if self.manners.shows_reasoning and choice.thoughts:
            message["reasoning_content"] = "".join(choice.thoughts)
        if self.manners.padding:
            message |= {"refusal": None, "annotations": []}
        return message


_LAST_WORD: Final = "last word"
"""Stands for whatever finish_reason the choice has, until the chunk is made."""


def usage(manners: Dialect, speech: Speech, spoken: int, thought: int) -> dict[str, Any]:
    """The provider's usage object for so many tokens spoken and thought."""
    completion = spoken if manners.hides_reasoning else spoken + thought
    said: dict[str, Any] = {
        "prompt_tokens": speech.prompt,
        "completion_tokens": completion,
        "total_tokens": speech.prompt + spoken + thought,
    }
    if manners.details:
        said["prompt_tokens_details"] = {"cached_tokens": speech.cached, "audio_tokens": 0}
        said["completion_tokens_details"] = {
            "reasoning_tokens": thought,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        }
    elif speech.cached:
        said["prompt_tokens_details"] = {"cached_tokens": speech.cached}
    if speech.cache_write:
        said.setdefault("prompt_tokens_details", {})["cache_write_tokens"] = speech.cache_write
    if manners.deepseek:
        said["prompt_cache_hit_tokens"] = speech.cached
        said["prompt_cache_miss_tokens"] = speech.prompt - speech.cached
    if manners.neurons:
        said["neurons"] = round(said["total_tokens"] * _NEURONS_PER_TOKEN, 2)
    return said


def _call(choice: Choice, arguments: str) -> dict[str, Any]:
    assert choice.call is not None
    function = {"name": choice.call.name, "arguments": arguments}
    return {"index": 0, "id": choice.call.id, "type": "function", "function": function}
