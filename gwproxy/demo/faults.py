"""The faults a request can ask for, and the little language that names them. Pure.

A model name is `base+word+word`; each word is a modifier such as `fault-status-503` or
`fault-slow-20`, and the prefix `fault-` may be left off after a plus. A base that itself starts
with `fault-` is a modifier too, so `mock/fault-reset-after-5` needs no plus. A name that is not in
the table below is an error, never a model: a typing mistake in a test must not pass for health.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

MIB: Final = 1 << 20


class Arity(Enum):
    """Whether a modifier carries a number."""

    NONE = "no number"
    NUMBER = "a number"
    MAYBE = "a number or none"


@dataclass(frozen=True, slots=True)
class Modifier:
    """One word of the language: `default` stands where the number is left off."""

    arity: Arity
    does: str
    default: int = 1


_FLAG: Final = Arity.NONE
_NUMBER: Final = Arity.NUMBER

MODIFIERS: Final[dict[str, Modifier]] = {
    # Refusals: an answer instead of the answer.
    "status": Modifier(_NUMBER, "the provider's own error with this HTTP status; 520-526 as HTML"),
    "code": Modifier(_NUMBER, "the gateway's error with this code; 1010 is the edge's bot check"),
    "retry-after": Modifier(_NUMBER, "adds `retry-after: N` to whatever is answered"),
    "garbage": Modifier(_FLAG, "200 with an HTML page"),
    "bad-json": Modifier(_FLAG, "200 application/json that is cut in the middle"),
    "redirect": Modifier(_FLAG, "307 to /elsewhere on this server"),
    "guardrails": Modifier(_FLAG, "one JSON answer, also when a stream was asked for"),
    "echo-token": Modifier(_FLAG, "error text holds the received token; 401 unless another error"),
    # The connection's own troubles.
    "reset-before-headers": Modifier(_FLAG, "TCP reset instead of an answer"),
    "stall-before-headers": Modifier(_FLAG, "never answers"),
    "stale": Modifier(_FLAG, "TCP reset if this connection has carried a request before"),
    "close-idle": Modifier(_FLAG, "closes the connection after the answer, without saying so"),
    "extra-bytes": Modifier(_FLAG, "a second, unasked answer behind the first"),
    "delay": Modifier(_NUMBER, "waits N ms before the headers"),
    "interim": Modifier(_FLAG, "a 103 before the answer"),
    "close-delimited": Modifier(_FLAG, "no length, no chunks: the body ends with the connection"),
    # How a stream ends too early. N counts data events; of a JSON answer half the body is sent.
    "reset-after": Modifier(_NUMBER, "TCP reset after N events"),
    "close-after": Modifier(_NUMBER, "closes in the middle of the chunked body after N events"),
    "eof-after": Modifier(_NUMBER, "clean end of the body after N events, without [DONE]"),
    "stall-after": Modifier(_NUMBER, "falls silent after N events"),
    "error-event-after": Modifier(_NUMBER, "an in-stream error after N events, then the end"),
    "error-first": Modifier(_FLAG, "the first event is an error"),
    "bad-event-after": Modifier(_NUMBER, "an event that is no JSON after N events, then goes on"),
    "no-done": Modifier(_FLAG, "the end without [DONE]"),
    "no-finish": Modifier(_FLAG, "no finish_reason anywhere"),
    # Odd bytes.
    "crlf": Modifier(_FLAG, "lines end with CR LF"),
    "comments": Modifier(Arity.MAYBE, "N comment lines before the first event", 2),
    "split": Modifier(_NUMBER, "N bytes of the body a write"),
    "slow": Modifier(_NUMBER, "N ms between events"),
    "huge-event": Modifier(Arity.MAYBE, "one event with N bytes of content", MIB),
    "endless": Modifier(Arity.MAYBE, "one line of N MiB that never ends, then a clean end", 8),
    "gzip": Modifier(_FLAG, "compressed, whatever was accepted"),
    "header-bytes": Modifier(_NUMBER, "a response header of N bytes"),
    "set-cookie": Modifier(_FLAG, "the edge's cookies"),
    # What is said and counted.
    "no-usage": Modifier(_FLAG, "no usage anywhere"),
    "usage-bad": Modifier(_FLAG, "usage with values that are no token counts"),
    "len": Modifier(_NUMBER, "answers N tokens long"),
    "ignore-max": Modifier(_FLAG, "does not honour max_tokens"),
    "reasoning": Modifier(_NUMBER, "N tokens of reasoning before the answer"),
    "cached": Modifier(_NUMBER, "N tokens of the prompt came from the cache"),
    "cache-write": Modifier(_NUMBER, "N tokens of the prompt were written to the cache"),
    "cache-hit": Modifier(_FLAG, "says that the gateway's own cache answered"),
    # When.
    "times": Modifier(_NUMBER, "all of this for the first N requests of this model name only"),
}

_WORD: Final = re.compile(r"([a-z]+(?:-[a-z]+)*)(?:-([0-9]{1,9}))?")


class UnknownFault(Exception):
    """A modifier that is not in the table; the words name it."""


class Faults(dict[str, int]):
    """The modifiers asked for, each with its number; a flag's number is 1."""


def split_model(name: str) -> tuple[str, Faults]:
    """`gpt-4o+fault-slow-20` into the base name and its faults."""
    base, *words = name.split("+")
    if base.startswith("fault-"):
        words.insert(0, base)
    return base, parse(words)


def parse_text(text: str) -> Faults:
    """The same words as in a model name, as a header or a script writes them."""
    return parse(word for word in text.split("+") if word)


def parse(words: Iterable[str]) -> Faults:
    faults = Faults()
    for word in words:
        match = _WORD.fullmatch(word.removeprefix("fault-"))
        modifier = MODIFIERS.get(match[1]) if match else None
        if match is None or modifier is None:
            raise UnknownFault(f"there is no fault named {word!r}")
        number = match[2]
        if (modifier.arity is Arity.NONE and number) or (
            modifier.arity is Arity.NUMBER and not number
        ):
            raise UnknownFault(f"the fault {match[1]!r} takes {modifier.arity.value}")
        faults[match[1]] = int(number) if number else modifier.default
    return faults
