"""How one answer is played onto a connection: whole, in events, from a script, or as a refusal,
with the faults that were asked for. What went out is noted as it goes.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import orjson

from . import refusals
from .faults import Faults
from .native import Embeddings, Kind, Message, Response
from .providers import Answer, Dialect, Event
from .record import Served
from .refusals import Refusal
from .scripts import End, Script
from .speech import Speech
from .wire import Framing, Headers, Wire

_BLOCK: Final = b"a" * (1 << 16)
_COMMENT: Final = b": OPENROUTER PROCESSING"


class Flavour(Enum):
    COMPAT = "the gateway's own address: its compat endpoint, and its providers' routes"
    REST = "the gateway by the REST API"
    OPENAI = "a plain OpenAI-compatible server"


Streamed = Answer | Message | Response


class Over(Exception):
    """The answer ended before its end; the word says how."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to a chat endpoint, read."""

    kind: Kind
    flavour: Flavour
    headers: Mapping[str, str]
    body: dict[str, Any]
    """In chat's words, whatever the API."""
    asked: dict[str, Any]
    """As it came."""
    token: str
    faults: Faults
    manners: Dialect
    model: str
    carried: int
    """Requests that its connection had carried before."""

    @property
    def streams(self) -> bool:
        return self.body.get("stream") is True

    @property
    def note(self) -> str:
        """What error texts end in: the received token where a careless server would echo it."""
        return f": {self.token}" if "echo-token" in self.faults else ""


async def stream(
    ask: Ask, answer: Streamed, wire: Wire, served: Served, headers: Headers, pause_s: float
) -> None:
    faults, manners = ask.faults, ask.manners
    newline = b"\r\n" if "crlf" in faults else manners.newline
    framing = Framing.CLOSE if "close-delimited" in faults else Framing.CHUNKED
    head = [("content-type", "text/event-stream"), ("cache-control", "no-cache"), *headers]
    await wire.start(200, head, framing, "gzip" in faults)
    served.status = 200
    for _ in range(faults.get("comments", manners.comments)):
        await wire.send(_COMMENT + newline * 2)
    if "endless" in faults:
        await _endless(wire, faults["endless"])
    if "error-first" in faults:
        await _last_event(wire, served, newline, answer.trouble(ask.note), "error-first")
    served.tokens = _nothing_yet(answer.speech)
    for event in answer.events():
        await _interrupt(ask, answer, wire, served, newline)
        await wire.send(_frame(event, newline))
        _note(served, event)
        if pause_s:
            await asyncio.sleep(pause_s)
    await _interrupt(ask, answer, wire, served, newline, at_the_end=True)
    if "no-done" in faults:
        await wire.finish()
        raise Over("no-done")
    if ask.kind is Kind.CHAT:
        await wire.send(b"data: [DONE]" + newline * 2)
    served.completed = True
    await wire.finish()
    served.end = "complete"


async def whole(
    ask: Ask, answer: Streamed | Embeddings, wire: Wire, served: Served, headers: Headers
) -> None:
    """One JSON answer. The faults that count events strike in the middle of its body."""
    faults = ask.faults
    served.tokens = _everything(answer)
    head = [("content-type", refusals.JSON), *headers]
    if {"error-event-after", "error-first"} & faults.keys():
        served.tokens = None
        trouble = Answer.trouble if isinstance(answer, Embeddings) else answer.trouble
        await refuse(wire, served, Refusal(200, orjson.dumps(trouble(ask.note).data)), headers)
        return
    message = answer.whole()
    body = orjson.dumps(message)
    ends = [name for name in ("reset", "close", "eof", "stall") if f"{name}-after" in faults]
    if ends:
        half = body[: len(body) // 2]
        length = len(half) if ends[0] == "eof" else len(body)
        served.status = 200
        await wire.answer(200, [*head, ("content-length", str(length))], half)
        if ends[0] == "reset":
            await wire.reset()
        elif ends[0] == "close":
            wire.close()
        elif ends[0] == "stall":
            await wire.stall()
        raise Over(f"{ends[0]}-after")
    served.status = 200
    if "close-delimited" in faults:
        await wire.start(200, head, Framing.CLOSE, "gzip" in faults)
        await wire.send(body)
        await wire.finish()
    else:
        await wire.answer(200, head, body, "gzip" in faults)
    usage = message.get("usage")
    served.usage = usage if isinstance(usage, dict) else None
    served.completed, served.end = True, "complete"


async def refuse(
    wire: Wire, served: Served, refusal: Refusal, headers: Headers, gzip: bool = False
) -> None:
    served.status, served.end = refusal.status, "refused"
    head = [("content-type", refusal.content_type), *headers]
    await wire.answer(refusal.status, head, refusal.body, gzip)


async def script(wire: Wire, served: Served, wish: Script, headers: Headers) -> None:
    """Plays the bytes of a script as they are."""
    if wish.delay_ms:
        await asyncio.sleep(wish.delay_ms / 1000)
    served.usage, served.tokens = wish.usage, wish.tokens
    if wish.framing is None:
        wire.raw()
    elif wish.status:
        own = {name.lower() for name, _ in wish.headers}
        head = [(name, value) for name, value in headers if name not in own]
        if "content-type" not in own:
            head.append(("content-type", wish.content_type()))
        if wish.framing is Framing.LENGTH and "content-length" not in own:
            head.append(("content-length", str(sum(len(write.data) for write in wish.writes))))
        await wire.start(wish.status, [*head, *wish.headers], wish.framing)
        served.status = wish.status
    for write in wish.writes:
        if write.delay_ms:
            await asyncio.sleep(write.delay_ms / 1000)
        await wire.send(write.data)
        served.events_sent += 1
    match wish.end:
        case End.CLEAN:
            await wire.finish()
            served.completed = True
        case End.RESET:
            await wire.reset()
        case End.CLOSE:
            wire.close()
        case End.STALL:
            await wire.stall()
    served.end = f"script-{wish.end.value}"


async def trouble_before_headers(ask: Ask, wire: Wire) -> None:
    faults = ask.faults
    if "stale" in faults and ask.carried:
        await wire.reset()
        raise Over("stale")
    if "reset-before-headers" in faults:
        await wire.reset()
        raise Over("reset-before-headers")
    if "interim" in faults:
        await wire.interim()
    if "delay" in faults:
        await asyncio.sleep(faults["delay"] / 1000)
    if "stall-before-headers" in faults:
        await wire.stall()


async def _interrupt(
    ask: Ask,
    answer: Streamed,
    wire: Wire,
    served: Served,
    newline: bytes,
    *,
    at_the_end: bool = False,
) -> None:
    """The faults that come after so many events, or where the events run out."""
    faults, sent = ask.faults, served.events_sent

    def due(name: str) -> bool:
        return name in faults and (sent == faults[name] or (at_the_end and sent < faults[name]))

    if due("bad-event-after"):
        await wire.send(b'data: {"id":"chatcmpl-' + newline * 2)
        served.events_sent += 1
    if due("error-event-after"):
        await _last_event(wire, served, newline, answer.trouble(ask.note), "error-event-after")
    if due("reset-after"):
        await wire.reset()
        raise Over("reset-after")
    if due("close-after"):
        wire.close()
        raise Over("close-after")
    if due("eof-after"):
        await wire.finish()
        raise Over("eof-after")
    if due("stall-after"):
        await wire.stall()


async def _last_event(wire: Wire, served: Served, newline: bytes, event: Event, end: str) -> None:
    await wire.send(_frame(event, newline))
    served.events_sent += 1
    await wire.finish()
    raise Over(end)


def _frame(event: Event, newline: bytes) -> bytes:
    name = b"event: %b%b" % (event.name.encode(), newline) if event.name else b""
    return b"%bdata: %b%b" % (name, orjson.dumps(event.data), newline * 2)


async def _endless(wire: Wire, mebibytes: int) -> None:
    await wire.send(b'data: {"id":"')
    for _ in range(mebibytes * (1 << 20) // len(_BLOCK)):
        await wire.send(_BLOCK)
    await wire.finish()
    raise Over("endless")


def _nothing_yet(speech: Speech) -> dict[str, int]:
    return {
        "input": speech.prompt,
        "cached": speech.cached,
        "cache_write": speech.cache_write,
        "output": 0,
        "reasoning": 0,
    }


def _everything(answer: Streamed | Embeddings) -> dict[str, int]:
    if isinstance(answer, Embeddings):
        nothing = dict.fromkeys(("cached", "cache_write", "output", "reasoning"), 0)
        return {"input": answer.prompt, **nothing}
    speech = answer.speech
    output = answer.spoken() + speech.reasoning
    return {**_nothing_yet(speech), "output": output, "reasoning": speech.reasoning}


def _note(served: Served, event: Event) -> None:
    """An event has gone out: so have its tokens and its usage."""
    served.events_sent += 1
    if served.tokens is not None:
        served.tokens["output"] += event.output
        served.tokens["reasoning"] += event.reasoning
    usage = event.usage or event.data.get("usage")
    if isinstance(usage, dict):
        served.usage = usage
