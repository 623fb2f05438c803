"""Answers in Anthropic's Messages format: metered, their usage kept, their end recognised. Pure."""

from collections.abc import Mapping
from typing import Any

import orjson

from gwproxy.core.api import Api, envelope
from gwproxy.core.errors import GatewayError
from gwproxy.core.meter import ERROR, FINISH, TEXT, TOOL, USAGE, Meter
from gwproxy.core.stream import UNREADABLE, EventStream, parse_event
from gwproxy.core.usage import Usage

_TEXTS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
"""The kinds of delta that the model has written, and where their text is."""


class MessagesMeter(Meter):
    """Counts each block's text as if it had been tokenised at once."""

    __slots__ = ("partial",)

    normalise = staticmethod(Usage.from_messages)

    def __init__(self, count: Any) -> None:
        super().__init__(count)
        self.partial = False

    def observe_event(self, event: object) -> int:
        """Reads one event of a stream and returns what was in it, as a sum of the meter's flags."""
        if type(event) is not dict:
            return 0
        kind = event.get("type")
        if kind == "content_block_delta":
            flags = self._observe_delta(event.get("index"), event.get("delta"))
        elif kind == "content_block_start":
            flags = self._observe_block(event.get("index"), event.get("content_block"))
        elif kind == "message_delta":
            self.partial = False
            flags = FINISH | self._merge(event.get("usage"))
            self.finished = True
        elif kind == "message_start":
            message = event.get("message")
            flags = self._merge(message.get("usage")) if type(message) is dict else 0
            self.partial = True  # its output tokens are those of its first words
        elif kind == "error":
            flags = ERROR
        else:
            flags = 0
        if flags & (TEXT | TOOL):
            self.has_output = True
        return flags

    def observe_answer(self, answer: object) -> int:
        if type(answer) is not dict:
            return 0
        flags = 0
        content = answer.get("content")
        for index, block in enumerate(content if type(content) is list else ()):
            flags |= self._observe_block(index, block)
        if flags:
            self.has_output = True
        return flags | self._merge(answer.get("usage"))

    def _observe_delta(self, index: object, delta: object) -> int:
        if type(delta) is not dict:
            return 0
        kind = delta.get("type")
        field = _TEXTS.get(kind) if type(kind) is str else None
        if field is None:
            return 0  # signatures and citations are not the model's own words
        at = index if type(index) is int else 0
        return self._add_text((at, field), delta.get(field))

    def _observe_block(self, index: object, block: object) -> int:
        if type(block) is not dict:
            return 0
        at = index if type(index) is int else 0
        flags = self._add_text((at, "text"), block.get("text"))
        flags |= self._add_text((at, "thinking"), block.get("thinking"))
        if block.get("type") == "tool_use":
            flags |= TOOL | self._add_text((at, "name"), block.get("name"))
            self._add_text((at, "partial_json"), block.get("input"))
        return flags

    def _merge(self, usage: object) -> int:
        """What was said before holds where a later object is silent; both are running totals."""
        if not usage or type(usage) is not dict:
            return 0
        said = {name: value for name, value in usage.items() if value is not None}
        self._usage = {**(self._usage or {}), **said}
        return USAGE


class MessagesStream(EventStream):
    """A stream in Anthropic's format."""

    __slots__ = ()

    meter: MessagesMeter

    def _event(self, payload: bytes) -> bool:
        value = parse_event(payload)
        if value is UNREADABLE:
            self.meter.observe_unparsed(len(payload))
            return True
        flags = self.meter.observe_event(value)
        if flags & (TEXT | TOOL | FINISH):
            # Usage alone does not commit: it comes before the first word, and a provider that is
            # overloaded says so after it.
            self.committed = True
        if flags & ERROR:
            self.error = value.get("error") or value
        elif type(value) is dict and value.get("type") == "message_stop":
            self.done = self.committed = True
        elif not flags and self._is_foreign_error(value):
            return False
        return True

    def error_event(self, error: GatewayError) -> bytes:
        return _event("error", envelope(error, Api.MESSAGES, None))


def as_stream(answer: Mapping[str, Any]) -> bytes:
    """A whole message as the stream that it would have been, each block in one piece."""
    usage = answer.get("usage")
    begun = {**answer, "content": [], "stop_reason": None, "stop_sequence": None}
    events = [_event("message_start", {"type": "message_start", "message": begun})]
    for index, block in enumerate(answer.get("content") or ()):
        if type(block) is not dict:
            continue
        bare, deltas = _taken_apart(block)
        place = {"index": index}
        start = {"type": "content_block_start", **place, "content_block": bare}
        events.append(_event("content_block_start", start))
        for delta in deltas:
            piece = {"type": "content_block_delta", **place, "delta": delta}
            events.append(_event("content_block_delta", piece))
        events.append(_event("content_block_stop", {"type": "content_block_stop", **place}))
    end = {name: answer.get(name) for name in ("stop_reason", "stop_sequence")}
    last = {"type": "message_delta", "delta": end, "usage": usage or {}}
    events.append(_event("message_delta", last))
    events.append(_event("message_stop", {"type": "message_stop"}))
    return b"".join(events)


def _taken_apart(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block without what a stream sends in deltas, and those. Other kinds come whole at once."""
    match block.get("type"):
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block.get("text")}]
        case "tool_use":
            arguments = orjson.dumps(block.get("input")).decode()
            delta = {"type": "input_json_delta", "partial_json": arguments}
            return {**block, "input": {}}, [delta]
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": block.get("thinking")}]
            if block.get("signature"):
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return {**block, "thinking": "", "signature": ""}, deltas
    return block, []


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), orjson.dumps(data))
