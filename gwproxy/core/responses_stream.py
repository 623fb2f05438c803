"""Answers in the format of OpenAI's Responses: metered, their usage kept, their end recognised.
Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from gwproxy.core.errors import GatewayError
from gwproxy.core.meter import ERROR, FINISH, TOOL, Meter
from gwproxy.core.native_stream import NativeMeter, NativeStream
from gwproxy.core.usage import Usage

_NO_TEXT = frozenset({"response.audio.delta"})
"""Deltas that are data."""

_PART_TEXTS = ("text", "refusal")


class ResponsesMeter(NativeMeter):
    """Counts the text of each part of each item."""

    __slots__ = ()

    normalise = staticmethod(Usage.from_responses)

    def _observe_object(self, event: dict[str, Any]) -> int:
        kind = event.get("type")
        if type(kind) is not str:
            return 0
        if kind.endswith(".delta"):
            if kind in _NO_TEXT:
                return 0
            part = _number(event, "content_index") or _number(event, "summary_index")
            key = (_number(event, "output_index"), kind, part)
            return self._add_text(key, event.get("delta"))
        if kind == "response.output_item.added":
            return self._observe_call(_number(event, "output_index"), event.get("item"))
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            flags = ERROR if kind == "response.failed" else FINISH
            self.finished = flags == FINISH
            response = event.get("response")
            if type(response) is dict and not self.has_output:
                flags |= self._observe_output(response)  # a server that sends no deltas
            return flags | self._take_usage(response)
        return ERROR if kind == "error" else 0

    def _observe_output(self, response: dict[str, Any]) -> int:
        flags = 0
        output = response.get("output")
        for index, item in enumerate(output if type(output) is list else ()):
            if type(item) is not dict:
                continue
            flags |= self._observe_call(index, item)
            for field in ("arguments", "input"):
                flags |= self._add_text((index, field), item.get(field))
            for field in ("content", "summary"):
                parts = item.get(field)
                for at, part in enumerate(parts if type(parts) is list else ()):
                    if type(part) is dict:
                        for name in _PART_TEXTS:
                            flags |= self._add_text((index, f"{field}.{name}", at), part.get(name))
        return flags

    def _observe_call(self, index: int, item: object) -> int:
        if type(item) is not dict or not str(item.get("type")).endswith("_call"):
            return 0
        self._add_text((index, "name"), item.get("name"))
        return TOOL


class ResponsesStream(NativeStream):
    """A stream of a response's events, each of which has its number."""

    __slots__ = ("_number",)

    def __init__(self, meter: Meter) -> None:
        super().__init__(meter)
        self._number = -1

    def _event(self, payload: bytes) -> bool:
        if payload == b"[DONE]":  # some servers cannot leave it
            self.done = self.committed = True
            return True
        return super()._event(payload)

    def _heed(self, event: Any, flags: int) -> None:
        number = event.get("sequence_number")
        if type(number) is int:
            self._number = number
        if flags & FINISH:
            self.done = True
        elif flags & ERROR:
            response = event.get("response")
            within = response.get("error") if type(response) is dict else None
            self.error = within or event.get("error") or event

    def error_event(self, error: GatewayError) -> bytes:
        said: dict[str, Any] = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": self._number + 1,
        }
        if error.gateway is not None:
            said["gateway"] = error.gateway
        return _event(said)


def as_stream(answer: Mapping[str, Any]) -> bytes:
    """A whole response as the stream that it would have been, each part in one piece."""
    begun = {**answer, "status": "in_progress", "output": [], "usage": None}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for index, item in enumerate(answer.get("output") or ()):
        if type(item) is dict:
            events += _taken_apart(index, item)
    end = "incomplete" if answer.get("status") == "incomplete" else "completed"
    events.append({"type": f"response.{end}", "response": answer})
    return b"".join(
        _event({**event, "sequence_number": number}) for number, event in enumerate(events)
    )


def _taken_apart(index: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    place = {"output_index": index}
    at = {"item_id": item.get("id"), **place}
    parts = item.get("content")
    message = item.get("type") == "message" and type(parts) is list
    call = item.get("type") == "function_call"
    bare = {**item, "content": []} if message else {**item, "arguments": ""} if call else item
    yield {"type": "response.output_item.added", **place, "item": bare}
    if message:
        for number, part in enumerate(parts or ()):
            if type(part) is not dict:
                continue
            here = {**at, "content_index": number}
            field = "refusal" if part.get("type") == "refusal" else "text"
            kind = f"response.{'refusal' if field == 'refusal' else 'output_text'}"
            text = part.get(field)
            yield {"type": "response.content_part.added", **here, "part": {**part, field: ""}}
            yield {"type": f"{kind}.delta", **here, "delta": text, "logprobs": []}
            yield {"type": f"{kind}.done", **here, field: text, "logprobs": []}
            yield {"type": "response.content_part.done", **here, "part": part}
    elif call:
        kind, arguments = "response.function_call_arguments", item.get("arguments")
        yield {"type": f"{kind}.delta", **at, "delta": arguments}
        yield {"type": f"{kind}.done", **at, "arguments": arguments, "name": item.get("name")}
    yield {"type": "response.output_item.done", **place, "item": item}


def _event(data: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode("ascii"), orjson.dumps(data))


def _number(event: dict[str, Any], name: str) -> int:
    number = event.get(name)
    return number if type(number) is int else 0
