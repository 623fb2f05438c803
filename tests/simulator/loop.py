"""An event loop without real time: what is due runs in its order, sleeping takes no time, threads
are played. The same seed always runs the same steps.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any


class Killed(BaseException):
    """The process has ended at this very place. Nobody may catch it and go on."""


class Loop(asyncio.AbstractEventLoop):
    """Tasks, timers and executors. Killed comes through `step`; all else is kept in `failures`."""

    def __init__(self, random: Random, start_s: float) -> None:
        self.random = random
        self.now_s = start_s
        self.failures: list[BaseException] = []
        """What reached the loop and should not have."""
        self.slow_threads = False
        """A disk that takes seconds for everything."""
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.Handle]] = []
        self._count = 0
        self._depth = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self.closed = False

    # -- running -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one callback, letting time pass if none is due. False: there is nothing to run."""
        while self._timers and self._timers[0][0] <= self.now_s:
            self._ready.append(heapq.heappop(self._timers)[2])
        while not self._ready:
            if not self._timers:
                return False
            self.now_s = max(self.now_s, self._timers[0][0])
            self._ready.append(heapq.heappop(self._timers)[2])
        handle = self._ready.popleft()
        if not handle._cancelled:
            before = asyncio._get_running_loop()
            asyncio._set_running_loop(self)
            try:
                handle._context.run(handle._callback, *handle._args)
            except Killed:
                raise
            except BaseException as error:
                self.failures.append(error)
            finally:
                asyncio._set_running_loop(before)
        return True

    def breathe(self) -> None:
        """A thread waits in the kernel: meanwhile the loop goes on. Does nothing outside one."""
        if self._depth == 1 and self.random.random() < 0.3:
            self._depth += 1
            try:
                for _ in range(self.random.randrange(1, 12)):
                    if not self.step():
                        break
            finally:
                self._depth -= 1

    def abandon(self) -> None:
        """The process is gone: none of its tasks goes on, and what they leave behind is silent."""
        self.closed = True
        for _ in range(3):  # closing one may have made another
            tasks, self._tasks = self._tasks, []
            for task in tasks:
                task._log_destroy_pending = False
                if not task.done():
                    with suppress(BaseException):
                        task.get_coro().close()
                elif not task.cancelled():
                    task.exception()
        self._ready.clear()
        self._timers.clear()

    # -- what asyncio asks of a loop ---------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.closed

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> Any:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        if len(self._tasks) > 256:
            self._tasks = [each for each in self._tasks if not each.done()]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """A thread: it begins after a while, and its end is noticed after another."""
        future = self.create_future()
        longest = 8.0 if self.slow_threads else 0.02

        def begin() -> None:
            result, failure = None, None
            self._depth += 1
            try:
                result = func(*args)
            except Killed:
                raise
            except BaseException as error:
                failure = error
            finally:
                self._depth -= 1
            self.call_later(self.random.uniform(0, longest), end, result, failure)

        def end(result: Any, failure: BaseException | None) -> None:
            if future.cancelled():
                return
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

        self.call_later(self.random.uniform(0, longest), begin)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.closed:
            self.failures.append(error or RuntimeError(context["message"]))
