"""The meter of one answer: reads each event as it passes and knows what it has cost so far.

Pure: parsed JSON comes in, integers go out. Whatever an upstream sends, nothing here raises.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import orjson

from gwproxy.core.tokens import PIECE_CHARS, safe_place
from gwproxy.core.usage import Usage

# What one event was, as `observe` tells it.
TEXT = 1
"""Some field of a delta had text in it."""
TOOL = 2
"""A tool or function call began or went on."""
FINISH = 4
"""A choice gave its finish_reason."""
USAGE = 8
"""There was a usage object."""
ERROR = 16
"""There was an error object."""
USAGE_ONLY = 32
"""There was a usage object, and the list of choices was there and empty."""

_HOLD_CHARS = 512
"""Text is held up to this length and then counted in one go: one call of the tokenizer for some
hundred events, and about 2 KiB a stream."""

_FIELDS_MAX = 512
"""A hostile upstream could open a new choice or tool call with each event. Beyond this many fields
they share one, which costs exactness and no memory. 128 choices with four fields each fit."""

_HELD_MAX_CHARS = 262_144
"""And it could hold back every place to cut in all of them: above this much, held text that has
none is cut by force."""

_SHARED = "shared"

_Key = str | tuple[int, str] | tuple[int, str, int]


class _Delta(msgspec.Struct, gc=False):
    content: Annotated[str, msgspec.Meta(min_length=1)]
    reasoning_content: None = None
    reasoning: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta
    index: Literal[0] = 0
    finish_reason: None = None


class _Chunk(msgspec.Struct, gc=False):
    """An event that is a piece of the first choice's text and nothing else that counts: any other
    does not decode, so that its decoder does all the looking."""

    choices: tuple[_Choice]
    usage: None = None
    x_groq: None = None
    error: None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class _Text:
    """What is held, not yet counted, of one field's text, and how long it may get."""

    __slots__ = ("cut_at", "held")

    def __init__(self) -> None:
        self.held = ""
        self.cut_at = _HOLD_CHARS


class Meter:
    """Counts what one upstream answer shows, event by event.

    Each field of each choice is counted as if its whole text had been tokenised at once, however
    it was split into deltas: text is cut only where the count cannot change (see `tokens`).
    """

    __slots__ = (
        "_bound",
        "_count",
        "_groq_usage",
        "_held_chars",
        "_read",
        "_read_raw",
        "_texts",
        "_tokens",
        "_usage",
        "finished",
        "forced",
        "has_output",
        "unparsed_bytes",
    )

    normalise = staticmethod(Usage.from_openai)
    """How this API's usage object is read."""
    partial: bool = False
    """The usage so far is that of a beginning: more was answered than it says."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self._texts: dict[_Key, _Text] = {}
        self._tokens = 0
        self._held_chars = 0
        self._bound = 0
        self._usage: dict[str, Any] | None = None
        self._groq_usage: dict[str, Any] | None = None
        self._read_raw: dict[str, Any] | None = None  # the one that `_read` was made of
        self._read: Usage | None = None
        self.finished = False
        """Some choice has given a finish_reason."""
        self.has_output = False
        """Some event had text or a tool call in it, or was too big to be read."""
        self.forced = 0
        """How often unbroken text was cut where the count may have changed, by a token or two."""
        self.unparsed_bytes = 0

    def observe(self, chunk: object, part: str = "delta") -> int:
        """Reads one parsed event and returns what was in it, as a sum of the flags above."""
        if type(chunk) is not dict:
            return 0
        flags = 0
        choices = chunk.get("choices")
        if type(choices) is list:
            for choice in choices:
                if type(choice) is not dict:
                    continue
                delta = choice.get(part)
                if type(delta) is dict:
                    for field, value in delta.items():
                        # The plain delta, {"content": "..."} of choice 0, is nearly all there is.
                        if field == "content" and type(value) is str:
                            if value:
                                index = choice.get("index")
                                key = (index, field) if index and type(index) is int else field
                                self._add(key, value)
                                flags |= TEXT
                        elif value and field in _FIELDS:
                            flags |= self._observe_field(choice.get("index"), field, value, delta)
                reason = choice.get("finish_reason")
                if reason and type(reason) is str:
                    self.finished = True
                    flags |= FINISH
        if flags & (TEXT | TOOL):
            self.has_output = True
        usage = chunk.get("usage")
        if usage and type(usage) is dict:
            self._usage = usage
            flags |= USAGE_ONLY | USAGE if choices == [] else USAGE
        elif "x_groq" in chunk:
            # Groq repeats the usage in an object of its own, and sometimes only there.
            groq = chunk["x_groq"]
            usage = groq.get("usage") if type(groq) is dict else None
            if usage and type(usage) is dict:
                self._groq_usage = usage
                flags |= USAGE
        if chunk.get("error"):
            flags |= ERROR
        return flags

    def observe_text(self, payload: bytes) -> bool:
        """Reads an event that brings a piece of the first choice's text and nothing else, as nearly
        all do; False, and nothing read, when it is another. Of such an event only what counts is
        made into objects: that and reading them takes half as long as parsing the whole.
        """
        try:
            chunk = _decode(payload)
        except (ValueError, RecursionError):
            return False
        self.has_output = True
        self._add("content", chunk.choices[0].delta.content)
        return True

    def observe_usage(self, answer: dict[str, Any]) -> bool:
        """Reads of a whole answer only what the provider has counted; False when it has not."""
        usage = answer.get("usage")
        if not usage or type(usage) is not dict:
            return False
        self._usage = usage
        return True

    def observe_answer(self, answer: object) -> int:
        """Reads a whole chat completion, the answer to a request without `stream`."""
        return self.observe(answer, "message")

    def observe_unparsed(self, size_bytes: int) -> None:
        """An event too big to parse counts as a token for each four of its bytes."""
        self.unparsed_bytes += size_bytes
        self._bound += size_bytes
        self.has_output = True

    def approx(self) -> int:
        """Output tokens so far without a call of the tokenizer: held text at four characters each.

        Off by what the held text is, which is seldom more than 512 characters a field.
        """
        return self._tokens + (self._held_chars + self.unparsed_bytes + 3) // 4

    def bound(self) -> int:
        """Output tokens so far at the most: of text that is held not yet counted, a token for each
        of its bytes. Asked after each event, so it is kept and not summed up."""
        return self._bound

    def counted(self) -> int:
        """Output tokens that were to be seen so far. The held text is counted and stays held, so
        this may be asked at any time and as often as wanted."""
        tails = sum(self._count(text.held) for text in self._texts.values() if text.held)
        return self._tokens + tails + (self.unparsed_bytes + 3) // 4

    @property
    def usage_raw(self) -> dict[str, Any] | None:
        """The last usage object, as it came. Providers send running totals: never a sum."""
        return self._groq_usage if self._usage is None else self._usage

    @property
    def usage(self) -> Usage | None:
        """What the provider said it used, or None when it said nothing that can be used."""
        raw = self.usage_raw
        if raw is not self._read_raw:
            self._read_raw, self._read = raw, self.normalise(raw)
        return self._read

    def _observe_field(self, index: object, field: str, value: Any, delta: dict[str, Any]) -> int:
        at = index if type(index) is int else 0
        if field == "tool_calls":
            return self._observe_tool_calls(at, value)
        if field == "function_call":
            if type(value) is not dict:
                return 0
            self._add_text((at, "function_call.name", 0), value.get("name"))
            self._add_text((at, "function_call.arguments", 0), value.get("arguments"))
            return TOOL
        if field == "reasoning" and delta.get("reasoning_content"):
            # Some servers send the same thought under its old and its new name.
            return 0
        return self._add_text((at, field) if at else field, value)

    def _observe_tool_calls(self, at: int, calls: object) -> int:
        if type(calls) is not list:
            return 0
        flags = 0
        for position, call in enumerate(calls):
            if type(call) is not dict:
                continue
            flags = TOOL
            number = call.get("index")
            if type(number) is not int:
                number = position
            function = call.get("function")
            if type(function) is dict:
                self._add_text((at, "name", number), function.get("name"))
                self._add_text((at, "arguments", number), function.get("arguments"))
        return flags

    def _add_text(self, key: _Key, value: object) -> int:
        """Adds a string, the text of a list of parts, or JSON where a server did not encode it."""
        if type(value) is str:
            if not value:
                return 0
            self._add(key, value)
            return TEXT
        if type(value) is list:
            found = 0
            for part in value:
                if type(part) is str:
                    found |= self._add_text(key, part)
                elif type(part) is dict:
                    for name in _PART_TEXTS:
                        inner = part.get(name)
                        if type(inner) is str:
                            found |= self._add_text(key, inner)
                        elif type(inner) is list:
                            # One level of nesting is what providers send (parts of a thought).
                            for deep in inner:
                                if type(deep) is dict and type(deep.get("text")) is str:
                                    found |= self._add_text(key, deep["text"])
            return found
        if type(value) is dict and value:
            try:
                text = orjson.dumps(value).decode()
            except TypeError:  # nested deeper than it can be written again
                return 0
            self._add(key, text)
            return TEXT
        return 0

    def _add(self, key: _Key, value: str) -> None:
        text = self._texts.get(key)
        if text is None:
            text = self._open(key)
        chars = len(value)
        self._held_chars += chars
        self._bound += chars if value.isascii() else 4 * chars
        # Joined at once rather than kept as a list: hundreds of small strings are 20 KiB, their
        # text is half of one, and copying that is cheaper than a list's append is dear.
        text.held = held = text.held + value
        if len(held) >= text.cut_at:
            self._cut(text)

    def _open(self, key: _Key) -> _Text:
        if len(self._texts) >= _FIELDS_MAX:
            key = _SHARED
        return self._texts.setdefault(key, _Text())

    def _cut(self, text: _Text) -> None:
        """Counts what can be counted of the text held, and holds what cannot be yet."""
        held, count = text.held, self._count
        before = len(held)
        start = tokens = 0
        while len(held) - start >= PIECE_CHARS:
            end = start + PIECE_CHARS
            place = safe_place(held, start, end)
            if not place:
                self.forced += 1
                place = end
            tokens += count(held[start:place])
            start = place
        place = safe_place(held, start, before)
        if not place and self._held_chars > _HELD_MAX_CHARS:
            self.forced += 1
            place = before
        if place:
            tokens += count(held[start:place])
            start = place
        text.held = left = held[start:]
        # Text without a place to cut is tried again when it is twice as long, so that the tries
        # together cost no more than reading it twice.
        text.cut_at = min(max(_HOLD_CHARS, 2 * len(left)), PIECE_CHARS)
        self._tokens += tokens
        self._held_chars -= before - len(left)
        bound = self._tokens + self.unparsed_bytes
        for each in self._texts.values():
            chars = len(each.held)
            bound += chars if each.held.isascii() else 4 * chars
        self._bound = bound


_FIELDS = frozenset(
    {"content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call"}
)
"""The fields of a delta or a message that the model has written."""

_PART_TEXTS = ("text", "thinking", "refusal")
"""Where a part of a list-shaped content holds its words."""
