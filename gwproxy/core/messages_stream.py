"""Answers in Anthropic's Messages format: metered, their usage kept, their end recognised. Pure."""

from collections.abc import Mapping
from typing import Any

import orjson

from gwproxy.core.api import Api, envelope
from gwproxy.core.errors import GatewayError
from gwproxy.core.meter import ERROR, FINISH, TOOL
from gwproxy.core.native_stream import NativeMeter, NativeStream
from gwproxy.core.usage import Usage

_TEXTS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
"""The kinds of delta that the model has written, and where their text is."""


class MessagesMeter(NativeMeter):
    """Counts each block's text."""

    __slots__ = ("partial",)

    normalise = staticmethod(Usage.from_messages)

    def __init__(self, count: Any) -> None:
        super().__init__(count)
        self.partial = False

    def _observe_object(self, event: dict[str, Any]) -> int:
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._observe_delta(event.get("index"), event.get("delta"))
        if kind == "content_block_start":
            return self._observe_block(event.get("index"), event.get("content_block"))
        if kind == "message_delta":
            self.partial = False
            self.finished = True
            return FINISH | self._take_usage(event)
        if kind == "message_start":
            self.partial = True  # its output tokens are those of its first words
            return self._take_usage(event.get("message"))
        return ERROR if kind == "error" else 0

    def _observe_output(self, answer: dict[str, Any]) -> int:
        flags = 0
        content = answer.get("content")
        for index, block in enumerate(content if type(content) is list else ()):
            flags |= self._observe_block(index, block)
        return flags

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

    def _keep_usage(self, usage: dict[str, Any]) -> None:
        """What was said before holds where a later object is silent; both are running totals."""
        said = {name: value for name, value in usage.items() if value is not None}
        self._usage = {**(self._usage or {}), **said}


class MessagesStream(NativeStream):
    """A stream in Anthropic's format."""

    __slots__ = ()

    def _heed(self, event: Any, flags: int) -> None:
        if flags & ERROR:
            self.error = event.get("error") or event
        elif event.get("type") == "message_stop":
            self.done = self.committed = True

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
