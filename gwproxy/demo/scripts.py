"""Answers written in advance: exact bytes or a fault, for the next requests that match.

A script is a JSON object. Which requests: `model` (the whole name asked for), `provider` (its
prefix), neither for any; `count` of them (1; 0 until cleared). What they get: `fault` (words as in
a model name), or `writes` with `status`, `headers`, `framing`, `end` and `delay_ms`.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from .faults import Faults, UnknownFault, parse_text
from .wire import Framing


class ScriptError(Exception):
    """A script that cannot be played; the words say why."""


class End(Enum):
    CLEAN = "clean"
    RESET = "reset"
    CLOSE = "close"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that go out in one write, after a pause."""

    data: bytes
    delay_ms: float = 0


@dataclass(slots=True)
class Script:
    """`left` is counted down as requests are answered; None lasts until it is cleared."""

    id: int
    model: str | None
    provider: str | None
    left: int | None
    faults: Faults | None
    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    framing: Framing | None = Framing.CHUNKED
    """None: the writes are the whole answer, status line and all."""
    end: End = End.CLEAN
    delay_ms: float = 0
    usage: dict[str, Any] | None = None
    tokens: dict[str, int] | None = None

    def content_type(self) -> str:
        """What the bytes look like, where no header says it."""
        start = self.writes[0].data[:1] if self.writes else b""
        if start in (b"{", b"["):
            return "application/json"
        return "text/html" if start == b"<" else "text/event-stream"


_WHICH: Final = frozenset({"model", "provider", "count"})
_WHAT: Final = frozenset(
    {"fault", "status", "headers", "writes", "framing", "end", "delay_ms", "usage", "tokens"}
)


class Scripts:
    """The scripts that wait, first come first played."""

    def __init__(self) -> None:
        self._waiting: list[Script] = []
        self._last_id = 0

    def add(self, wish: Mapping[str, Any]) -> Script:
        self._last_id += 1
        script = _read(self._last_id, wish)
        self._waiting.append(script)
        return script

    def take(self, model: str | None, provider: str | None) -> Script | None:
        for script in self._waiting:
            if script.model not in (None, model) or script.provider not in (None, provider):
                continue
            if script.left is not None:
                script.left -= 1
                if script.left == 0:
                    self._waiting.remove(script)
            return script
        return None

    def clear(self) -> None:
        self._waiting.clear()

    def waiting(self) -> list[dict[str, Any]]:
        return [
            {"id": s.id, "model": s.model, "provider": s.provider, "left": s.left}
            for s in self._waiting
        ]


def _read(number: int, wish: Mapping[str, Any]) -> Script:
    if unknown := set(wish) - _WHICH - _WHAT:
        raise ScriptError(f"a script has no {sorted(unknown)[0]!r}")
    count = wish.get("count", 1)
    if not isinstance(count, int) or count < 0:
        raise ScriptError("count must be a whole number; 0 means until cleared")
    script = Script(number, wish.get("model"), wish.get("provider"), count or None, None)
    if "fault" in wish:
        try:
            script.faults = parse_text(str(wish["fault"]))
        except UnknownFault as unknown_fault:
            raise ScriptError(str(unknown_fault)) from None
        return script
    if not isinstance(wish.get("writes"), list):
        raise ScriptError("a script needs a fault or a list of writes")
    headers = wish.get("headers", {})
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    framing = wish.get("framing", "chunked")
    try:
        script.status = int(wish.get("status", 200))
        script.headers = [(str(name), str(value)) for name, value in pairs]
        script.writes = [_write(write) for write in wish["writes"]]
        script.framing = None if framing == "raw" else Framing(framing)
        script.end = End(wish.get("end", "clean"))
        script.delay_ms = float(wish.get("delay_ms", 0))
    except (ValueError, TypeError, KeyError, binascii.Error) as wrong:
        raise ScriptError(f"the script cannot be read: {wrong}") from None
    script.usage, script.tokens = wish.get("usage"), wish.get("tokens")
    return script


def _write(wish: Any) -> Write:
    if isinstance(wish, bytes):
        return Write(wish)
    if isinstance(wish, str):
        return Write(wish.encode())
    if not isinstance(wish, Mapping):
        raise TypeError("a write is a text or an object")
    delay_ms = float(wish.get("delay_ms", 0))
    if "base64" in wish:
        return Write(base64.b64decode(wish["base64"], validate=True), delay_ms)
    return Write(str(wish["text"]).encode(), delay_ms)
