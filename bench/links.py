"""Client connections of the load generator: keep-alive callers and listeners of streams.

Raw protocols, so that the generator costs little; each answer is checked as it comes.
"""

import asyncio
import hashlib
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import httptools
import orjson

from bench import wire

LAST_ANSWERS_WITHIN_S = 45
"""A rate that a proxy cannot keep leaves it a queue, which it is given time to work off."""
HOPELESS = 32
"""So many streams that could not be opened, one after the other, and the rest is not tried."""
OPENING_AT_ONCE = 32
"""Connections that are being opened at a time: a listen queue must not become what is measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to call; `pid` is the process whose CPU and memory count, 0 on the direct way."""

    port: int
    model: str
    headers: dict[str, str]
    pid: int
    upstream_pid: int
    upstream_port: int
    ca: str | None = None
    rewrites: bool = False

    @property
    def complaint(self) -> Callable[[bytes], str]:
        """How a non-stream answer is judged."""
        return wire.complaint_of_meaning if self.rewrites else wire.complaint_of_bytes

    def request(self, body: bytes) -> bytes:
        return wire.request_bytes(f"127.0.0.1:{self.port}", self.headers, body)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p99, p99.9 and the largest; empty when there is nothing to sort."""
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "p50": ordered[round(last * 0.5)],
        "p99": ordered[round(last * 0.99)],
        "p999": ordered[round(last * 0.999)],
        "max": ordered[last],
        "count": len(ordered),
    }


class Link(asyncio.Protocol):
    """One client connection; the parser calls the subclass's on_* methods."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.lost(f"not HTTP: {type(error).__name__}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.lost("connection closed")

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def lost(self, reason: str) -> None:
        """The connection is gone: the subclass knows what that means for it."""
        raise NotImplementedError


LinkT = TypeVar("LinkT", bound=Link)


async def connect(target: Target, make: Callable[[], LinkT]) -> LinkT:
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context(cafile=target.ca) if target.ca else None
    name = "localhost" if context else None
    async with asyncio.timeout(10):
        _, link = await loop.create_connection(
            make, "127.0.0.1", target.port, ssl=context, server_hostname=name
        )
    return link


class Caller(Link):
    """A keep-alive connection that asks the same thing again and again."""

    def __init__(self, calls: "Calls", request: bytes, complaint: Callable[[bytes], str]) -> None:
        super().__init__()
        self._calls = calls
        self._request = request
        self._complaint = complaint
        self._body: list[bytes] = []
        self.asking = False
        self.since_ns = 0
        self.first_ns = 0

    def ask(self, since_ns: int) -> None:
        self.asking = True
        self.since_ns = since_ns
        self.first_ns = 0
        self.write(self._request)

    def on_message_begin(self) -> None:
        self._body.clear()

    def on_body(self, data: bytes) -> None:
        if not self.first_ns:
            self.first_ns = time.monotonic_ns()
        self._body.append(data)

    def on_message_complete(self) -> None:
        self.asking = False
        body = b"".join(self._body)
        status = self.parser.get_status_code()
        if status != 200:
            self._calls.failed(self, f"status {status}")
        elif wrong := self._complaint(body):
            self._calls.failed(self, wrong)
        else:
            self._calls.answered(self)

    def lost(self, reason: str) -> None:
        self._calls.gone(self, reason)


class Calls:
    """Keep-alive connections asking: each again at once (closed loop), or all at a common rate."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._idle: deque[Caller] = deque()
        self._due: deque[int] = deque()
        self._asking = 0
        self._running = False
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.callers: list[Caller] = []
        self.clear()

    def clear(self) -> None:
        self.completed = 0
        self.waited = 0
        self.errors: Counter[str] = Counter()
        self.first_byte_us: list[float] = []

    async def open(
        self, target: Target, n: int, request: bytes, complaint: Callable[[bytes], str]
    ) -> None:
        for _ in range(n):
            caller = await connect(target, lambda: Caller(self, request, complaint))
            self.callers.append(caller)
            self._idle.append(caller)

    async def run(self, seconds: float) -> None:
        """Asks for that long, then waits for the last answers."""
        loop = asyncio.get_running_loop()
        self._running = True
        end = loop.time() + seconds
        if self._rate is None:
            while self._idle:
                self._ask(self._idle.popleft(), time.monotonic_ns())
            await asyncio.sleep(seconds)
        else:
            start, asked = loop.time(), 0
            while (now := loop.time()) < end:
                for _ in range(int((now - start) * self._rate) - asked):
                    asked += 1
                    self._ask_when_free()
                await asyncio.sleep(0.001)
        self._running = False
        try:
            async with asyncio.timeout(LAST_ANSWERS_WITHIN_S):
                await self._quiet.wait()
        except TimeoutError as error:
            words = f"{self._asking} requests were not answered within {LAST_ANSWERS_WITHIN_S} s"
            raise TimeoutError(words) from error

    async def ask_one_by_one(self, n: int) -> None:
        """One after the other on a single connection: nobody else is in the way."""
        for _ in range(n):
            if not self._idle:
                raise ConnectionError(f"no connection left: {dict(self.errors)}")
            self._ask(self._idle.popleft(), time.monotonic_ns())
            async with asyncio.timeout(10):
                await self._quiet.wait()

    def _ask_when_free(self) -> None:
        if self._idle:
            self._ask(self._idle.popleft(), time.monotonic_ns())
        else:
            # Counted from when it was due, else a slow proxy would hide its own queue.
            self.waited += 1
            self._due.append(time.monotonic_ns())

    def _ask(self, caller: Caller, since_ns: int) -> None:
        self._asking += 1
        self._quiet.clear()
        caller.ask(since_ns)

    def answered(self, caller: Caller) -> None:
        self.completed += 1
        self.first_byte_us.append((caller.first_ns - caller.since_ns) / 1000)
        self._freed(caller)

    def failed(self, caller: Caller, reason: str) -> None:
        self.errors[reason] += 1
        self._freed(caller)

    def _freed(self, caller: Caller) -> None:
        self._asking -= 1
        if self._due:
            self._ask(caller, self._due.popleft())
        elif self._running and self._rate is None:
            self._ask(caller, time.monotonic_ns())
        else:
            self._idle.append(caller)
            if not self._asking:
                self._quiet.set()

    def gone(self, caller: Caller, reason: str) -> None:
        if caller in self._idle:
            self._idle.remove(caller)
        if caller in self.callers:
            self.callers.remove(caller)
            if caller.asking:
                self.errors[reason] += 1
                self._asking -= 1
                if not self._asking:
                    self._quiet.set()

    def close(self) -> None:
        for caller in list(self.callers):
            caller.asking = False
            caller.close()


class Listener(Link):
    """A connection that carries one stream, and what came out of it."""

    def __init__(self, streams: "Streams", stream_id: int) -> None:
        super().__init__()
        self._streams = streams
        self.stream_id = stream_id
        self._digest = hashlib.sha256()
        self._text = hashlib.sha256()
        self._words = 0
        self._done = False
        self._tail = b""
        self._last_ns = 0
        self.size = 0
        self.events = 0
        self.error = ""
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    def heard(self, *, rewritten: bool) -> list[Any]:
        """What came, in the terms of the upstream's record."""
        if rewritten:
            return [self._words, self._text.hexdigest(), self._done]
        return [self.events, self.size, self._digest.hexdigest()]

    @property
    def open(self) -> bool:
        return self.started.is_set() and not self.ended.is_set()

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status != 200:
            self.lost(f"status {status}")

    def on_body(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._digest.update(data)
        self.size += len(data)
        *events, self._tail = (self._tail + data).split(b"\n\n")
        self.events += len(events)
        if self._streams.rewritten:
            self._read(events)
        if events:
            self.started.set()
            self._streams.arrived(events, now_ns, self._last_ns)
            self._last_ns = now_ns

    def _read(self, events: list[bytes]) -> None:
        for event in events:
            self._done |= event.strip() == wire.DONE.strip()
            if text := wire.text_of(event):
                self._words += 1
                self._text.update(text)

    def on_message_complete(self) -> None:
        self.started.set()
        self.ended.set()
        self.close()

    def lost(self, reason: str) -> None:
        if not self.ended.is_set():
            self.error = reason
            self.started.set()
            self.ended.set()


class Streams:
    """Many listeners at once, and the figures of the window in which they are recorded."""

    def __init__(self, target: Target, n_events: int, interval_ms: float) -> None:
        self._target = target
        self._n_events = n_events
        self._interval_ms = interval_ms
        self.rewritten = target.rewrites
        self._opening = asyncio.Semaphore(OPENING_AT_ONCE)
        self._open_until = float("inf")
        self._refused = 0
        self.listeners: list[Listener] = []
        self.recording = False
        self.events = 0
        self.delays_us: list[float] = []
        self.gaps_us: list[float] = []

    def arrived(self, events: list[bytes], now_ns: int, last_ns: int) -> None:
        self.events += len(events)
        if self.recording:
            for event in events:
                sent_ns = wire.stamp(event)
                if sent_ns is not None:
                    self.delays_us.append((now_ns - sent_ns) / 1000)
                    self.gaps_us.append((now_ns - last_ns) / 1000)
                last_ns = now_ns

    async def open(self, n: int, *, spread_s: float = 0.0, within_s: float = 120.0) -> None:
        """Opens `n` more streams and returns when each has its first event (or has failed)."""
        first = len(self.listeners) + 1
        self._open_until = time.monotonic() + within_s
        self._refused = 0
        async with asyncio.TaskGroup() as tasks:
            for at, stream_id in enumerate(range(first, first + n)):
                tasks.create_task(self._open_one(stream_id, at * spread_s / n))

    async def _open_one(self, stream_id: int, after_s: float) -> None:
        await asyncio.sleep(after_s)
        listener = Listener(self, stream_id)
        self.listeners.append(listener)
        body = wire.stream_body(
            self._target.model,
            stream_id=stream_id,
            n_events=self._n_events,
            interval_ms=self._interval_ms,
            stamped=self.rewritten,
        )
        async with self._opening:
            if self._refused >= HOPELESS or time.monotonic() > self._open_until:
                hopeless = self._refused >= HOPELESS
                listener.lost("not tried any more" if hopeless else "no time left to open it")
                return
            try:
                await connect(self._target, lambda: listener)
                listener.write(self._target.request(body))
                async with asyncio.timeout(20):
                    await listener.started.wait()
            except (OSError, TimeoutError) as error:
                listener.lost(f"not opened: {type(error).__name__}")
                listener.close()
            self._refused = self._refused + 1 if listener.error else 0

    async def finish(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                for listener in self.listeners:
                    await listener.ended.wait()
        except TimeoutError:
            for listener in self.listeners:
                listener.lost("did not end")
                listener.close()

    async def verdict(self) -> dict[str, Any]:
        """Each stream against the upstream's own record of what it sent."""
        sent = await ask_upstream(self._target, "/sent")
        errors: Counter[str] = Counter()
        whole = expected = received = 0
        for listener in self.listeners:
            record = sent.get(str(listener.stream_id))
            told = [*record[3:], True] if record and self.rewritten else record and record[:3]
            heard = listener.heard(rewritten=self.rewritten)
            expected += told[0] if told else wire.events_total(self._n_events)
            received += heard[0]
            if listener.error:
                errors[listener.error] += 1
            elif record is None:
                errors["never finished by the upstream"] += 1
            elif told != heard:
                errors["other words or bytes than were sent"] += 1
            else:
                whole += 1
        return {
            "streams": len(self.listeners),
            "whole": whole,
            "events_expected": expected,
            "events_received": received,
            "errors": dict(errors),
        }


async def ask_upstream(target: Target, path: str) -> dict[str, list[Any]]:
    """A word to the upstream itself, past every proxy."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", target.upstream_port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: upstream\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        answer: dict[str, list[Any]] = orjson.loads(await reader.readexactly(size))
        writer.close()
        return answer
