"""The load generator: raw protocols on uvloop in a process of its own, so its CPU is nobody's cost.

It reads one command a line from standard input and prints one result a line; it ends when the
input closes. It samples the proxy's CPU clock itself, at the very moments between which it counts
requests or events, so that neither runs ahead of the other.
"""

import asyncio
import gc
import hashlib
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import httptools
import orjson
import uvloop

from bench import probes, wire

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

    def request(self, body: bytes) -> bytes:
        return wire.request_bytes(f"127.0.0.1:{self.port}", self.headers, body)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest; empty when there is nothing to sort."""
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "p50": ordered[round(last * 0.5)],
        "p99": ordered[round(last * 0.99)],
        "max": ordered[last],
        "count": len(ordered),
    }


# -- windows -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    at_ns: int
    proxy_ns: int
    load_ns: int
    upstream_ns: int


def read_clocks(target: Target) -> Reading:
    return Reading(
        at_ns=time.monotonic_ns(),
        proxy_ns=probes.cpu_ns(target.pid) if target.pid else 0,
        load_ns=time.process_time_ns(),
        upstream_ns=probes.cpu_ns(target.upstream_pid),
    )


def between(start: Reading, end: Reading) -> dict[str, float]:
    """CPU of the proxy in the window, and how busy the two other processes were (1 = one core)."""
    wall_ns = end.at_ns - start.at_ns
    return {
        "wall_s": wall_ns / 1e9,
        "cpu_ns": end.proxy_ns - start.proxy_ns,
        "proxy_busy": (end.proxy_ns - start.proxy_ns) / wall_ns,
        "load_busy": (end.load_ns - start.load_ns) / wall_ns,
        "upstream_busy": (end.upstream_ns - start.upstream_ns) / wall_ns,
    }


# -- connections ---------------------------------------------------------------------------------


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

    def __init__(self, calls: "Calls", request: bytes, expected: bytes | None) -> None:
        super().__init__()
        self._calls = calls
        self._request = request
        self._expected = expected
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
        elif self._expected is None and not body.endswith(wire.DONE):
            self._calls.failed(self, "stream without [DONE]")
        elif self._expected is not None and body != self._expected:
            self._calls.failed(self, "another body than the upstream's")
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

    async def open(self, target: Target, n: int, request: bytes, expected: bytes | None) -> None:
        for _ in range(n):
            caller = await connect(target, lambda: Caller(self, request, expected))
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
        async with asyncio.timeout(15):
            await self._quiet.wait()

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
        self._tail = b""
        self._last_ns = 0
        self.size = 0
        self.events = 0
        self.error = ""
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

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
        if events:
            self.started.set()
            self._streams.arrived(events, now_ns, self._last_ns)
            self._last_ns = now_ns

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
        self._opening = asyncio.Semaphore(OPENING_AT_ONCE)
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

    async def open(self, n: int, *, spread_s: float = 0.0) -> None:
        """Opens `n` more streams and returns when each has its first event (or has failed)."""
        first = len(self.listeners) + 1
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
        )
        async with self._opening:
            try:
                await connect(self._target, lambda: listener)
                listener.write(self._target.request(body))
                async with asyncio.timeout(20):
                    await listener.started.wait()
            except (OSError, TimeoutError) as error:
                listener.lost(f"not opened: {type(error).__name__}")

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
            expected += record[0] if record else wire.events_total(self._n_events)
            received += listener.events
            if listener.error:
                errors[listener.error] += 1
            elif record is None:
                errors["never finished by the upstream"] += 1
            elif record != [listener.events, listener.size, listener.digest]:
                errors["other bytes than were sent"] += 1
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


# -- commands ------------------------------------------------------------------------------------


async def requests(
    target: Target,
    *,
    connections: int,
    warm_s: float,
    window_s: float,
    linger_s: float,
    rate: float | None = None,
) -> dict[str, Any]:
    """Non-stream requests. The window ends `linger_s` after the last answer, so that work a proxy
    puts off (a log line, a database commit) is on its bill all the same."""
    calls = Calls(rate)
    try:
        request = target.request(wire.request_body(target.model))
        await calls.open(target, connections, request, wire.ANSWER)
        await calls.run(warm_s)
        await asyncio.sleep(linger_s)
        early_errors = dict(calls.errors)
        calls.clear()
        start = read_clocks(target)
        await calls.run(window_s)
        busy = between(start, read_clocks(target))
        await asyncio.sleep(linger_s)
        end = read_clocks(target)
    finally:
        calls.close()
    return {
        **busy,
        "cpu_ns": end.proxy_ns - start.proxy_ns,
        "completed": calls.completed,
        "waited": calls.waited,
        "errors": calls.errors + Counter(early_errors),
        "first_byte_us": quantiles(calls.first_byte_us),
    }


async def first_bytes(target: Target, *, n: int) -> dict[str, Any]:
    """Time to the first body byte of a short stream, one at a time, nothing else going on."""
    calls = Calls(None)
    try:
        body = wire.stream_body(target.model, stream_id=0, n_events=3, interval_ms=0)
        await calls.open(target, 1, target.request(body), None)
        await calls.ask_one_by_one(max(5, n // 20))
        calls.clear()
        await calls.ask_one_by_one(n)
    finally:
        calls.close()
    return {"errors": calls.errors, "first_byte_us": quantiles(calls.first_byte_us)}


async def paced_streams(
    target: Target, *, streams: int, interval_ms: float, warm_s: float, window_s: float
) -> dict[str, Any]:
    """Streams at a fixed rate; CPU is read twice in mid-flow, never at their opening or end."""
    slack_s = 0.4 + streams * 0.006
    n_events = int((warm_s + window_s + slack_s) * 1000 / interval_ms)
    run = Streams(target, n_events, interval_ms)
    await run.open(streams, spread_s=interval_ms / 1000)
    await asyncio.sleep(warm_s)
    run.recording, run.events = True, 0
    start = read_clocks(target)
    await asyncio.sleep(window_s)
    end = read_clocks(target)
    events, run.recording = run.events, False
    still_open = sum(listener.open for listener in run.listeners)
    await run.finish(n_events * interval_ms / 1000 + 15)
    window = between(start, end)
    return {
        **window,
        "events": events,
        "rate": events / window["wall_s"],
        "rate_asked": streams * 1000 / interval_ms,
        "still_open": still_open,
        "delay_us": quantiles(run.delays_us),
        "gap_us": quantiles(run.gaps_us),
        "verdict": await run.verdict(),
    }


async def held_streams(
    target: Target, *, steps: list[int], n_events: int, interval_ms: float, settle_s: float
) -> dict[str, Any]:
    """Opens streams in steps, weighs the proxy at each, and hears them all to the end, which the
    upstream puts off until the last step is weighed."""
    # A first stream, so that what a process builds once is not counted as any stream's memory.
    first = Streams(target, 4, 1)
    await first.open(1)
    await first.finish(10)
    await asyncio.sleep(settle_s)
    weights = [{"streams": 0, "open": 0, **asdict(probes.memory(target.pid))}]
    run = Streams(target, n_events, interval_ms)
    start = time.monotonic()
    await ask_upstream(target, "/hold")
    try:
        for step in steps:
            await run.open(step - len(run.listeners))
            await asyncio.sleep(settle_s)
            still_open = sum(listener.open for listener in run.listeners)
            weight = probes.memory(target.pid)
            weights.append({"streams": step, "open": still_open, **asdict(weight)})
        opened_s = time.monotonic() - start
    finally:
        await ask_upstream(target, "/release")
    await run.finish(n_events * interval_ms / 1000 + 30)
    await asyncio.sleep(settle_s)
    after = asdict(probes.memory(target.pid))
    return {
        "weights": weights,
        "after": after,
        "opened_s": opened_s,
        "verdict": await run.verdict(),
    }


COMMANDS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "requests": requests,
    "first_bytes": first_bytes,
    "paced_streams": paced_streams,
    "held_streams": held_streams,
}


async def serve() -> None:
    stdin = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    print("{}", flush=True)
    while line := await stdin.readline():
        command = orjson.loads(line)
        run = COMMANDS[command["run"]]
        try:
            result = await run(Target(**command["target"]), **command["with"])
        except Exception as error:  # reported to whoever asked, who decides what to do without it
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(orjson.dumps(result).decode(), flush=True)


if __name__ == "__main__":
    gc.disable()  # a collection here would look like a slow proxy; the run is short
    uvloop.run(serve())
