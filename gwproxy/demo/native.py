"""The APIs besides chat that providers have on routes of their own: embeddings, OpenAI's Responses,
Anthropic's Messages. What they ask is put into chat's words, what is said into their clothes. Pure.
"""

import base64
import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import orjson

from . import refusals
from .providers import Event
from .speech import Choice, Speech, pieces

_DIMENSIONS: Final = 8
_DASHED_VERSION: Final = re.compile(r"-\d{1,2}-\d{1,2}(?:-|$)")


class Kind(Enum):
    """Which API a request is for; the value is how the gateway's log calls it."""

    CHAT = "chat"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"
    MESSAGES = "messages"


PATHS: Final[dict[tuple[str, ...], Kind]] = {
    ("chat", "completions"): Kind.CHAT,
    ("embeddings",): Kind.EMBEDDINGS,
    ("responses",): Kind.RESPONSES,
    ("messages",): Kind.MESSAGES,
}
"""Below the address of an OpenAI-compatible server, and of the REST API."""

_NATIVE: Final[dict[str, dict[tuple[str, ...], Kind]]] = {
    "openai": {("embeddings",): Kind.EMBEDDINGS, ("responses",): Kind.RESPONSES},
    "anthropic": {("v1", "messages"): Kind.MESSAGES},
    "google-ai-studio": {("v1beta", "openai", "embeddings"): Kind.EMBEDDINGS},
    "mistral": {("v1", "embeddings"): Kind.EMBEDDINGS},
    "workers-ai": {("v1", "embeddings"): Kind.EMBEDDINGS},
}


def native_kind(slug: str, path: list[str]) -> Kind | None:
    """What the gateway finds at a provider's own path."""
    if slug.startswith("custom-"):
        return PATHS.get(tuple(path[1:])) if path[:1] == ["v1"] else None
    return _NATIVE.get(slug, {}).get(tuple(path))


def rest_name(model: str) -> tuple[str, str] | None:
    """A model as the REST API calls it: the provider's slug, and its own name for the model."""
    if model.startswith("@cf/"):
        return "workers-ai", model
    author, _, name = model.partition("/")
    slug = {"google": "google-ai-studio", "xai": "grok"}.get(author, author)
    if not name or author in ("google-ai-studio", "grok", "workers-ai"):
        return None
    if author == "anthropic":
        if _DASHED_VERSION.search(name.partition("+")[0]):
            return None  # it has dots there, and nothing else is found
        name = re.sub(r"(?<=\d)\.(?=\d)", "-", name)
    return slug, name


def wants(kind: Kind, body: Mapping[str, Any]) -> bool:
    """Whether the body has what this API cannot do without."""
    field = {
        Kind.CHAT: "messages",
        Kind.MESSAGES: "messages",
        Kind.EMBEDDINGS: "input",
        Kind.RESPONSES: "input",
    }[kind]
    given = body.get(field)
    if kind is Kind.MESSAGES and not isinstance(body.get("max_tokens"), int):
        return False
    return isinstance(given, list) or (isinstance(given, str) and field == "input")


# -- into chat's words ---------------------------------------------------------------------------


def as_chat(kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request to a chat endpoint."""
    chat: dict[str, Any] = {"model": body.get("model"), "stream": body.get("stream") is True}
    messages: list[Any] = []
    if kind is Kind.MESSAGES:
        if body.get("system"):
            messages.append({"role": "system", "content": body["system"]})
        messages += body["messages"]
        chat["max_tokens"] = body.get("max_tokens")
        chat["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.get("name"), "parameters": tool.get("input_schema")},
            }
            for tool in body.get("tools") or ()
        ]
        choice = body.get("tool_choice") or {}
        if choice.get("type") == "any":
            chat["tool_choice"] = "required"
        elif choice.get("type") == "tool":
            chat["tool_choice"] = {"function": {"name": choice.get("name")}}
    elif kind is Kind.RESPONSES:
        if body.get("instructions"):
            messages.append({"role": "system", "content": body["instructions"]})
        given = body["input"]
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        messages += [item if "role" in item else {"content": str(item)} for item in given]
        chat["max_tokens"] = body.get("max_output_tokens")
        chat["tools"] = [{"type": "function", "function": tool} for tool in body.get("tools") or ()]
        choice = body.get("tool_choice")
        chat["tool_choice"] = {"function": choice} if isinstance(choice, dict) else choice
    else:
        return dict(body)
    return {**chat, "messages": messages}


# -- embeddings ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Numbers that depend on nothing but what was asked."""

    model: str
    body: Mapping[str, Any]
    usage_mode: str = "true"

    def whole(self) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._one(each)}
                for index, each in enumerate(self._inputs())
            ],
            "model": self.model,
        }
        if self.usage_mode == "true":
            answer["usage"] = {"prompt_tokens": self.prompt, "total_tokens": self.prompt}
        return answer

    @property
    def prompt(self) -> int:
        return sum(
            len(each) if isinstance(each, list) else len(pieces(each)) for each in self._inputs()
        )

    def _inputs(self) -> list[Any]:
        given = self.body["input"]
        return given if isinstance(given, list) and not isinstance(given[0], int) else [given]

    def _one(self, given: Any) -> Any:
        size = self.body.get("dimensions")
        size = size if isinstance(size, int) else _DIMENSIONS
        seed = hashlib.sha256(repr(given).encode(errors="replace")).digest()
        # Halves of small integers: the same number as a float of four bytes and as a decimal.
        numbers = [(seed[index % len(seed)] - 128) / 2 for index in range(size)]
        if self.body.get("encoding_format") == "base64":
            return base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode()
        return numbers


# -- Anthropic's Messages ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """A speech as Claude would have sent it."""

    speech: Speech
    id: str
    model: str
    finishes: bool = True
    usage_mode: str = "true"

    def whole(self) -> dict[str, Any]:
        choice = self.speech.choices[0]
        content: list[dict[str, Any]] = []
        if choice.thoughts:
            content.append({**_THOUGHT, "thinking": "".join(choice.thoughts), "signature": "c2ln"})
        if choice.call is not None:
            called = {"id": choice.call.id, "name": choice.call.name}
            content.append({"type": "tool_use", **called, "input": _arguments(choice)})
        elif choice.text:
            content.append({"type": "text", "text": choice.text})
        return {
            **self._begun(),
            "content": content,
            "stop_reason": self._stop(choice),
            **self._usage(self.spoken() + self.speech.reasoning),
        }

    def spoken(self) -> int:
        return len(self.speech.choices[0].pieces)

    def events(self) -> Iterator[Event]:
        choice = self.speech.choices[0]
        begun = {**self._begun(), **self._usage(1)}
        yield _event("message_start", usage=begun.get("usage"), message=begun)
        yield _event("ping")
        place = 0
        if choice.thoughts:
            yield _event("content_block_start", index=place, content_block=_THOUGHT)
            for piece in choice.thoughts:
                delta = {"type": "thinking_delta", "thinking": piece}
                yield _event("content_block_delta", 1, 1, index=place, delta=delta)
            delta = {"type": "signature_delta", "signature": "c2ln"}
            yield _event("content_block_delta", index=place, delta=delta)
            yield _event("content_block_stop", index=place)
            place += 1
        name = "text"
        block: dict[str, Any] = {"type": "text", "text": ""}
        if choice.call is not None:
            called = {"id": choice.call.id, "name": choice.call.name}
            name, block = "partial_json", {"type": "tool_use", **called, "input": {}}
        kind = "text_delta" if choice.call is None else "input_json_delta"
        yield _event("content_block_start", index=place, content_block=block)
        for text, tokens in choice.deltas:
            delta = {"type": kind, name: text}
            yield _event("content_block_delta", tokens, index=place, delta=delta)
        yield _event("content_block_stop", index=place)
        said = self._usage(self.spoken() + self.speech.reasoning)
        usage = {"output_tokens": said["usage"]["output_tokens"]} if said else None
        if self.finishes:
            stop = {"stop_reason": self._stop(choice), "stop_sequence": None}
            last = _event("message_delta", delta=stop)
            if usage:
                last.data["usage"] = usage
            yield last
            yield _event("message_stop")

    @staticmethod
    def trouble(note: str) -> Event:
        error = {"type": "overloaded_error", "message": f"Overloaded{note}"}
        return _event("error", error=error)

    def _begun(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self, output: int) -> dict[str, Any]:
        if self.usage_mode == "none":
            return {}
        if self.usage_mode == "bad":
            return {"usage": {"input_tokens": -3, "output_tokens": "many"}}
        speech = self.speech
        return {
            "usage": {
                "input_tokens": speech.prompt - speech.cached - speech.cache_write,
                "cache_creation_input_tokens": speech.cache_write,
                "cache_read_input_tokens": speech.cached,
                "output_tokens": output,
                "service_tier": "standard",
            }
        }

    def _stop(self, choice: Choice) -> str | None:
        if not self.finishes:
            return None
        if choice.cut:
            return "max_tokens"
        return "end_turn" if choice.call is None else "tool_use"


_THOUGHT: Final = {"type": "thinking", "thinking": "", "signature": ""}


# -- OpenAI's Responses --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Response:
    """A speech as OpenAI's newer API would have sent it."""

    speech: Speech
    id: str
    created: int
    model: str
    body: Mapping[str, Any] = field(default_factory=dict)
    finishes: bool = True
    usage_mode: str = "true"

    def whole(self) -> dict[str, Any]:
        choice = self.speech.choices[0]
        cut = {"reason": "max_output_tokens"} if choice.cut else None
        return {
            **self._begun(),
            "status": "incomplete" if choice.cut else "completed",
            "incomplete_details": cut,
            "output": [*self._thoughts("completed"), self._item("completed")],
            **self._usage(),
        }

    def spoken(self) -> int:
        return len(self.speech.choices[0].pieces)

    def events(self) -> Iterator[Event]:
        number = -1

        def event(
            name: str,
            output: int = 0,
            reasoning: int = 0,
            usage: dict[str, Any] | None = None,
            **data: Any,
        ) -> Event:
            nonlocal number
            number += 1
            return _event(name, output, reasoning, usage, **data, sequence_number=number)

        choice, thought = self.speech.choices[0], self.speech.reasoning
        # Reasoning is out of sight: done, and billable, before the first event can be.
        yield event("response.created", thought, thought, response=self._begun())
        yield event("response.in_progress", response=self._begun())
        place = 0
        for item in self._thoughts("in_progress"):
            yield event("response.output_item.added", output_index=0, item=item)
            yield event("response.output_item.done", output_index=0, item=item)
            place = 1
        item = self._item("in_progress")
        at = {"item_id": item["id"], "output_index": place}
        yield event("response.output_item.added", output_index=place, item=self._empty(item))
        if choice.call is None:
            at["content_index"] = 0
            part = {"type": "output_text", "annotations": [], "logprobs": []}
            yield event("response.content_part.added", **at, part={**part, "text": ""})
            for text, tokens in choice.deltas:
                more: dict[str, Any] = {"delta": text, "logprobs": [], "obfuscation": "x" * 8}
                yield event("response.output_text.delta", tokens, **at, **more)
            text = choice.text
            yield event("response.output_text.done", **at, text=text, logprobs=[])
            yield event("response.content_part.done", **at, part={**part, "text": text})
        else:
            for text, tokens in choice.deltas:
                yield event("response.function_call_arguments.delta", tokens, **at, delta=text)
            called: dict[str, Any] = {"arguments": choice.text, "name": choice.call.name}
            yield event("response.function_call_arguments.done", **at, **called)
        done = self._item("completed")
        yield event("response.output_item.done", output_index=place, item=done)
        if self.finishes:
            whole = self.whole()
            name = "response.incomplete" if choice.cut else "response.completed"
            yield event(name, usage=whole.get("usage"), response=whole)

    @staticmethod
    def trouble(note: str) -> Event:
        words: dict[str, Any] = {
            "code": "server_error",
            "message": f"The server had an error{note}",
        }
        return _event("error", **words, param=None, sequence_number=0)

    def _begun(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": self.body.get("instructions"),
            "max_output_tokens": self.body.get("max_output_tokens"),
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": self.body.get("previous_response_id"),
            "store": self.body.get("store") is not False,
            "temperature": 1.0,
            "tool_choice": self.body.get("tool_choice") or "auto",
            "tools": self.body.get("tools") or [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None,
            "metadata": self.body.get("metadata") or {},
        }

    def _thoughts(self, status: str) -> list[dict[str, Any]]:
        if not self.speech.reasoning:
            return []
        return [{"id": f"rs_{self.id[5:]}", "type": "reasoning", "summary": []}]

    def _item(self, status: str) -> dict[str, Any]:
        choice = self.speech.choices[0]
        if choice.call is not None:
            return {
                "id": f"fc_{self.id[5:]}",
                "type": "function_call",
                "status": status,
                "call_id": choice.call.id,
                "name": choice.call.name,
                "arguments": choice.text,
            }
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": choice.text}
        return {
            "id": f"msg_{self.id[5:]}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [part],
        }

    @staticmethod
    def _empty(item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "arguments": ""} if "arguments" in item else {**item, "content": []}

    def _usage(self) -> dict[str, Any]:
        if self.usage_mode == "none":
            return {"usage": None}
        if self.usage_mode == "bad":
            return {"usage": {"input_tokens": -1, "output_tokens": True, "total_tokens": "many"}}
        speech = self.speech
        output = self.spoken() + speech.reasoning
        return {
            "usage": {
                "input_tokens": speech.prompt,
                "input_tokens_details": {
                    "cached_tokens": speech.cached,
                    "cache_write_tokens": speech.cache_write,
                },
                "output_tokens": output,
                "output_tokens_details": {"reasoning_tokens": speech.reasoning},
                "total_tokens": speech.prompt + output,
            }
        }


def _event(
    name: str,
    output: int = 0,
    reasoning: int = 0,
    usage: dict[str, Any] | None = None,
    **data: Any,
) -> Event:
    return Event({"type": name, **data}, output, reasoning, name, usage)


def _arguments(choice: Choice) -> Any:
    try:
        return orjson.loads(choice.text)
    except orjson.JSONDecodeError:
        return {}  # the limit was reached in the middle of them


def dressed(refusal: refusals.Refusal, kind: Kind) -> refusals.Refusal:
    """A provider's own refusal in the envelope of its API."""
    if kind is not Kind.MESSAGES or refusal.edge or refusal.content_type != refusals.JSON:
        return refusal
    try:
        error = orjson.loads(refusal.body).get("error")
    except (orjson.JSONDecodeError, AttributeError):
        return refusal
    if not isinstance(error, dict):
        return refusal  # the gateway's own
    words = _ANTHROPIC_WORDS.get(refusal.status, "api_error")
    said = {"type": words, "message": error.get("message")}
    body = {"type": "error", "error": said, "request_id": "req_demo"}
    return refusals.Refusal(refusal.status, orjson.dumps(body))


_ANTHROPIC_WORDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
