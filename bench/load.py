"""The load generator: raw protocols on uvloop in a process of its own, so its CPU is nobody's cost.

It reads one command a line from standard input and prints one result a line; it ends when the
input closes. It samples the proxy's CPU clock itself, at the very moments between which it counts
requests or events, so that neither runs ahead of the other.
"""

import asyncio
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import orjson
import uvloop

from bench import probes, wire
from bench.links import Calls, Streams, Target, ask_upstream, quantiles

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
        await calls.open(target, connections, request, target.complaint)
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
        await calls.open(target, 1, target.request(body), wire.complaint_of_stream)
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
    target: Target,
    *,
    steps: list[int],
    n_events: int,
    interval_ms: float,
    settle_s: float,
    open_within_s: float,
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
            await run.open(step - len(run.listeners), within_s=open_within_s)
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


async def many_streams(
    target: Target,
    *,
    streams: int,
    rate: float,
    warm_s: float,
    window_s: float,
    open_within_s: float,
) -> dict[str, Any]:
    """So many streams at once, all together at a fixed rate of events: what their number costs."""
    interval_ms = streams * 1000 / rate
    # Whole intervals: who took long to open them has their events unevenly spread over one.
    window_s = math.ceil(window_s * 1000 / interval_ms) * interval_ms / 1000
    base = asdict(probes.memory(target.pid))
    run = Streams(target, 1, interval_ms)
    began = time.monotonic()
    await ask_upstream(target, "/hold")
    try:
        # Spread over an interval at least, so that their events are.
        await run.open(streams, spread_s=interval_ms / 1000, within_s=open_within_s)
        opened_s = time.monotonic() - began
        await asyncio.sleep(warm_s)
        run.recording, run.events = True, 0
        start = read_clocks(target)
        await asyncio.sleep(window_s)
        end = read_clocks(target)
        events, run.recording = run.events, False
        still_open = sum(listener.open for listener in run.listeners)
        weight = asdict(probes.memory(target.pid))
    finally:
        await ask_upstream(target, "/release")
    await run.finish(interval_ms / 1000 + 60)
    window = between(start, end)
    return {
        **window,
        "streams": streams,
        "opened_s": opened_s,
        "events": events,
        "rate": events / window["wall_s"],
        "rate_asked": rate,
        "still_open": still_open,
        "delay_us": quantiles(run.delays_us),
        "base": base,
        "weight": weight,
        "verdict": await run.verdict(),
    }


COMMANDS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "requests": requests,
    "first_bytes": first_bytes,
    "paced_streams": paced_streams,
    "held_streams": held_streams,
    "many_streams": many_streams,
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
