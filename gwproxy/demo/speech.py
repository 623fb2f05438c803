"""What the demo upstream says, and how many tokens that is. Pure and deterministic: the same
request always gets the same answer.

A token here is a piece of text: a word with the space before it, or a punctuation mark. One delta
carries one piece, so the tokens that were sent are the deltas that were sent. The made-up prose
uses words that are one token to OpenAI's own vocabulary as well, so that a count made with that
vocabulary agrees with the usage reported here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_OPENERS: Final = ("The", "A", "Every", "This", "Our", "One", "Some", "That", "What", "Each")
_PLAIN: Final = """
    stream token answer river light budget paper garden window letter morning careful simple
    steady quiet number measure balance engine signal ocean golden honest message gently under
    over between because quickly every little great small money slowly proxy model cloud gateway
    history future question reason together water stone table music summer winter across coffee
    bridge market forest silver always never often without through before after around
"""
# Characters of two and three bytes, so that a cut can fall inside one anywhere.
_FOREIGN: Final = """
    café für über está também déjà größer señor mañana первый года человек мир
    世界 数据 東京 한국 שלום
"""
_WORDS: Final = tuple(f"{_PLAIN} {_FOREIGN}".split())
_READABLE: Final = {
    "Why do people put a proxy in front of an AI gateway?": (
        "To know who is calling, to stop the spending before the money is gone, and to see what "
        "each answer cost. This answer cost nothing: it comes from the built-in demo upstream, "
        "one word at a time, through the proxy that you have just started."
    ),
    "Hello": (
        "Hello! I am the built-in demo upstream, and no model at all. To most questions I answer "
        "in made-up words, so that you can try the proxy without an account. "
        "Ask for the model mock/echo, and you will hear yourself."
    ),
}
"""What a newcomer asks first deserves words that can be read."""
_PIECE: Final = re.compile(r"\s*(?:\w+|[^\w\s]+)|\s+")

_BURST: Final = " river"

_MESSAGE_OVERHEAD: Final = 3
_ATTACHMENT_TOKENS: Final = 100
_ARGUMENT_PIECE: Final = 4


def pieces(text: str) -> list[str]:
    """The text cut into tokens; joined they are the text again."""
    return _PIECE.findall(text)


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """Pieces of all messages and tools, 3 a message for its frame and 100 for a part that is not
    text."""
    total = _MESSAGE_OVERHEAD
    for message in _list(body.get("messages")):
        total += _MESSAGE_OVERHEAD
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        if isinstance(content, str):
            total += len(pieces(content))
        else:
            for part in _list(content):
                text = part.get("text") if isinstance(part, dict) else None
                total += len(pieces(text)) if isinstance(text, str) else _ATTACHMENT_TOKENS
    if body.get("tools"):
        total += len(pieces(json.dumps(body["tools"], ensure_ascii=False)))
    return total


def last_user_text(body: Mapping[str, Any]) -> str:
    for message in reversed(_list(body.get("messages"))):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = (part.get("text") for part in _list(content) if isinstance(part, dict))
            return "".join(part for part in parts if isinstance(part, str))
    return ""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: its arguments stream in pieces."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers. `pieces` are text, or the arguments where there is a call."""

    index: int
    thoughts: tuple[str, ...]
    pieces: tuple[str, ...]
    call: Call | None
    cut: bool
    """The limit was reached before the answer was."""
    burst: int = 1
    """So many of the pieces come at once, in the first delta."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def deltas(self) -> list[tuple[str, int]]:
        """The answer as it streams: text and how many tokens it is."""
        if not self.pieces:
            return []
        burst = max(self.burst, 1)
        first = self.pieces[:burst]
        return [("".join(first), len(first)), *((piece, 1) for piece in self.pieces[burst:])]


@dataclass(frozen=True, slots=True)
class Speech:
    """A whole answer, before any provider's clothes."""

    choices: tuple[Choice, ...]
    prompt: int
    cached: int
    cache_write: int

    @property
    def reasoning(self) -> int:
        return sum(len(choice.thoughts) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the faults ask of the answer. None: as the request has it."""

    length: int | None = None
    ignore_max: bool = False
    reasoning: int = 0
    cached: int = 0
    cache_write: int = 0
    burst_bytes: int = 0
    """The first delta is so long; the limit is not honoured then."""


def compose(model: str, body: Mapping[str, Any], wish: Wish) -> Speech:
    """The answer to this request: a tool call if one is wanted, an echo for the model `echo`,
    else prose."""
    said = last_user_text(body)
    call = _call(model, body)
    n = body.get("n")
    choices = []
    for index in range(n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 1):
        # The seed knows nothing of the modifiers: a faulty answer begins as the healthy one does.
        seed = hashlib.sha256(f"{model}\n{index}\n{said}".encode(errors="replace")).digest()
        if call is not None:
            whole = _argument_pieces(call[1], seed)
        elif model == "echo":
            whole = pieces(said)
        elif said in _READABLE and wish.length is None:
            whole = pieces(_READABLE[said])
        else:
            whole = prose(seed, wish.length if wish.length is not None else 24 + seed[0] % 25)
        burst = wish.burst_bytes // len(_BURST)
        whole = [_BURST] * burst + whole
        limit = None if wish.ignore_max or burst else _limit(body)
        thinking = wish.reasoning if limit is None else min(wish.reasoning, limit)
        spoken = whole if limit is None else whole[: limit - thinking]
        choices.append(
            Choice(
                index=index,
                thoughts=tuple(prose(seed[::-1], thinking)),
                pieces=tuple(spoken),
                call=call[0] if call else None,
                cut=len(spoken) < len(whole),
                burst=burst,
            )
        )
    prompt = prompt_tokens(body)
    cached = min(wish.cached, prompt)
    return Speech(
        choices=tuple(choices),
        prompt=prompt,
        cached=cached,
        cache_write=min(wish.cache_write, prompt - cached),
    )


def prose(seed: bytes, length: int) -> list[str]:
    """`length` pieces of sentences."""
    out: list[str] = []
    until_stop = 0
    state = int.from_bytes(seed[:8], "big")
    while len(out) < length:
        # A linear congruential step (Knuth's MMIX constants): cheap, and the same everywhere.
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        pick = state >> 33
        if until_stop == 0:
            word = _OPENERS[pick % len(_OPENERS)]
            out.append(f" {word}" if out else word)
            until_stop = 5 + pick % 7
        elif until_stop == 1:
            out.append(".")
            until_stop = 0
        else:
            out.append(" " + _WORDS[pick % len(_WORDS)])
            until_stop -= 1
    return out


def _limit(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        limit = body.get(name)
        if isinstance(limit, int) and not isinstance(limit, bool):
            return max(limit, 0)
    return None


def _call(model: str, body: Mapping[str, Any]) -> tuple[Call, Mapping[str, Any]] | None:
    """The tool that is called, with its parameters' schema, if one is."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    functions = [
        tool["function"]
        for tool in _list(tools)
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    if not functions or choice == "none":
        return None
    wanted = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    if wanted is None and choice != "required" and "tool" not in model:
        return None
    function = next((f for f in functions if f.get("name") == wanted), functions[0])
    name = str(function.get("name"))
    parameters = function.get("parameters")
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()
    return Call(f"call_{digest[:24]}", name), parameters if isinstance(parameters, dict) else {}


def _argument_pieces(schema: Mapping[str, Any], seed: bytes) -> list[str]:
    properties = schema.get("properties")
    arguments: dict[str, Any] = {}
    for name, kind in (properties if isinstance(properties, dict) else {}).items():
        match kind.get("type") if isinstance(kind, dict) else None:
            case "integer" | "number":
                arguments[name] = seed[1]
            case "boolean":
                arguments[name] = True
            case "array":
                arguments[name] = []
            case "object":
                arguments[name] = {}
            case _:
                arguments[name] = "".join(prose(seed, 3))
    text = json.dumps(arguments, ensure_ascii=False)
    return [text[i : i + _ARGUMENT_PIECE] for i in range(0, len(text), _ARGUMENT_PIECE)]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
