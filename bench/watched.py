"""A loop under watch: how long it goes without giving anybody a turn.

    python -m bench.watched FILE idle                 # a loop with nothing to do: the control
    python -m bench.watched [--stacks] FILE serve ... # gwproxy with these arguments, and the watch

A timer of a millisecond runs in the loop itself. A turn that comes late is written to FILE as a
line of JSON, with the CPU time that the loop's own thread spent since the turn before: what other
programs of the machine do makes a turn late, but does not make this thread work.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import IO, Any

import orjson
import uvloop

TICK_S = 0.001
WORTH_A_LINE_MS = 3.0
"""Of shorter waits there would be thousands of lines; ten milliseconds are what is looked for."""
SAMPLE_S = 0.002
"""A wait of ten milliseconds, the shortest that is looked for, is seen about five times."""
STACKS_KEPT = 2_000
FRAMES = 8


class Stacks:
    """What the loop's thread was doing, sampled from another thread, for the last few seconds."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._seen: deque[tuple[float, tuple[str, ...]]] = deque(maxlen=STACKS_KEPT)
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            time.sleep(SAMPLE_S)
            frame = sys._current_frames().get(self._thread)
            stack = []
            while frame is not None and len(stack) < FRAMES:
                code = frame.f_code
                stack.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
                frame = frame.f_back
            self._seen.append((time.monotonic(), tuple(stack)))

    def since(self, began: float) -> list[str]:
        """The stacks of a stall, each once, the innermost frame first."""
        seen = dict.fromkeys(" < ".join(stack) for at, stack in list(self._seen) if at >= began)
        return list(seen)[:3]


class Watch:
    """The timer, and the lines it writes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, out: IO[bytes], stacks: Stacks | None):
        self._loop = loop
        self._out = out
        self._stacks = stacks
        self._turns = 0
        self._last = time.monotonic()
        self._worked = time.thread_time()
        self._said = self._last
        loop.call_later(TICK_S, self._turn)

    def _turn(self) -> None:
        now, worked = time.monotonic(), time.thread_time()
        self._turns += 1
        late_ms = (now - self._last - TICK_S) * 1000
        if late_ms > WORTH_A_LINE_MS:
            line: dict[str, Any] = {
                "t": now,
                "late_ms": round(late_ms, 2),
                "worked_ms": round((worked - self._worked) * 1000, 2),
            }
            if self._stacks is not None:
                line["stacks"] = self._stacks.since(self._last)
            self._out.write(orjson.dumps(line) + b"\n")
        if now - self._said > 1:
            # Flushed once a second: a file that is read while it grows.
            self._out.write(orjson.dumps({"t": now, "turns": self._turns}) + b"\n")
            self._out.flush()
            self._turns, self._said = 0, now
            now, worked = time.monotonic(), time.thread_time()
        self._last, self._worked = now, worked
        self._loop.call_later(TICK_S, self._turn)


def watching(main: Coroutine[Any, Any, Any], out: IO[bytes], *, stacks: bool) -> Any:
    """Runs `main` on uvloop with a watch beside it; the server itself is the one that ships."""

    async def both() -> Any:
        watch = Watch(
            asyncio.get_running_loop(), out, Stacks(threading.get_ident()) if stacks else None
        )
        try:
            return await main
        finally:
            del watch
            out.flush()

    return _run(both())


_run = uvloop.run


async def _idle() -> None:
    print("watching", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.watched")
    parser.add_argument("--stacks", action="store_true", help="say what a long turn was doing")
    parser.add_argument("file", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="idle, or gwproxy's arguments")
    args = parser.parse_args()
    with args.file.open("ab") as out:
        if args.command == ["idle"]:
            watching(_idle(), out, stacks=args.stacks)
            return 0
        from gwproxy.cli import main as gwproxy

        # The one place where the server meets its loop.
        uvloop.run = lambda coroutine: watching(coroutine, out, stacks=args.stacks)
        sys.argv = ["gwproxy", *args.command]
        return gwproxy()


if __name__ == "__main__":
    sys.exit(main())
