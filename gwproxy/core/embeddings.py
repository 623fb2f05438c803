"""A request for embeddings, and its answer. Pure.

All of its cost is its prompt, and all of the prompt is in the body: texts, or tokens counted
already. The answer is passed on as it came, whatever its encoding; only its usage is read.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar

import msgspec

from gwproxy.core.api import Api
from gwproxy.core.request import (
    FREE_TIERS,
    UNBOUNDED,
    ModelRequest,
    model_of,
    one_of,
    parse_object,
    unsupported,
    wrong,
)
from gwproxy.core.tokens import PIECE_CHARS, pieces, scale

MOST_INPUTS = 2048
"""As many as OpenAI takes; each is an embedding of its own to be held in the answer."""

_OWN_TOKENS = 2
"""What a tokenizer may put around each input: one token before it and one behind."""

_FARTHEST = 2_500
"""Older vocabularies, which embeddings use, make up to 2.1 times as many tokens of a text as ours
(Arabic; English is at 1.0). Measured over scripts, hence with a margin; never above the bytes."""


class EmbeddingsRequest(ModelRequest, frozen=True):
    """A checked request. Each input is a text or a list of tokens."""

    api: ClassVar[Api] = Api.EMBEDDINGS
    # 2,048 embeddings of 3,072 dimensions are 34 MB in base64, which the SDKs ask for by default,
    # and four times that in decimals.
    answer_bytes: ClassVar[int] = 160 * 1024 * 1024

    @classmethod
    def parse(cls, raw: bytes, allowed: frozenset[str] = frozenset()) -> "EmbeddingsRequest":
        """Check `raw`. `allowed`: features that the organization has switched on."""
        body, size_bytes = parse_object(raw)
        model = model_of(body)
        _check_input(body.get("input"))
        if body.get("stream"):
            raise wrong("stream", "is not a parameter of embeddings")
        tier = body.get("service_tier")
        if tier is not None and not one_of(tier, FREE_TIERS) and "service_tier" not in allowed:
            raise unsupported("service_tier", UNBOUNDED)
        return cls(model, False, 0, 1, body, size_bytes)

    @property
    def inputs(self) -> list[Any]:
        value = self.body["input"]
        return value if type(value) is list and type(value[0]) is not int else [value]

    @property
    def text_alone(self) -> bool:
        return False

    def prompt_bound(self) -> int:
        """Each token of text stands for at least one byte of it, each token given as a number for
        a digit and a comma or bracket; the quotes pay for what is put around a text."""
        return self.size_bytes

    def prompt_slices(self, count: Callable[[str], int]) -> Generator[None, None, int]:
        total = done = 0
        for each in self.inputs:
            total += _OWN_TOKENS
            if type(each) is list:
                total += len(each)
                continue
            for piece in pieces(each):
                if done and done + len(piece) > PIECE_CHARS:
                    yield
                    done = 0
                total += count(piece)
                done += len(piece) + 32  # the call itself
        return total

    def held_prompt(self, counted: int, factor: int) -> int:
        return min(self.prompt_bound(), scale(counted, max(factor, _FARTHEST)))

    def read_answer(self, body: bytes) -> Any:
        # The numbers themselves are nobody's business here: megabytes that need not become objects.
        found = _decode(body)
        return {"data": found.data, "usage": found.usage, "error": found.error}

    def is_answer(self, answer: Mapping[str, Any]) -> bool:
        # Nothing for so many inputs is nothing, whatever the status says.
        return bool(answer["data"])


class _Answer(msgspec.Struct, gc=False):
    data: list[msgspec.Raw] | None = None
    usage: Any = None
    error: Any = None


_decode = msgspec.json.Decoder(_Answer).decode


def _check_input(value: Any) -> None:
    if isinstance(value, str):
        if not value:
            raise wrong("input", "cannot be an empty string")
        return
    if not isinstance(value, list) or not value:
        raise wrong("input", "must be a string or a non-empty array", missing=value is None)
    if type(value[0]) is int:
        _check_tokens(value, "input")
        return
    if len(value) > MOST_INPUTS:
        raise wrong("input", f"may have at most {MOST_INPUTS} entries")
    for index, each in enumerate(value):
        if isinstance(each, list) and each:
            _check_tokens(each, f"input[{index}]")
        elif not isinstance(each, str) or not each:
            raise wrong(f"input[{index}]", "must be a non-empty string or array of tokens")


def _check_tokens(tokens: list[Any], name: str) -> None:
    # A body may hold millions of them, and everybody waits for this: no loop of our own.
    if set(map(type, tokens)) != {int} or min(tokens) < 0:
        raise wrong(name, "must hold tokens, which are integers from 0 on, and nothing else")
