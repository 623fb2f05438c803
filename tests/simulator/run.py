"""Seeds, one after the other or split over processes, and what is said of those that fail."""

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from tests.simulator.defects import DEFECTS
from tests.simulator.oracle import Wrong
from tests.simulator.world import World

CHUNK = 10
"""Seeds that a process takes at a time."""


@dataclass(frozen=True)
class Failure:
    seed: int
    reason: str
    trace: str
    """The last steps before it."""

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.reason}"


def run_seed(seed: int, defect: str | None = None) -> Failure | None:
    world = World(seed, defect)
    try:
        world.run()
    except Exception as error:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Wrong):
            return Failure(seed, str(error), "\n".join(world.trace))
        words = "".join(traceback.format_exception(error))
        reason = f"{type(error).__name__}: {error}"
        return Failure(seed, reason, "\n".join([*world.trace, words]))
    return None


def _chunk(seeds: list[int], defect: str | None = None) -> list[Failure]:
    return [failure for seed in seeds if (failure := run_seed(seed, defect)) is not None]


def first_failure(defect: str) -> Failure | None:
    """Of a planted defect, within the seeds that are enough for it."""
    for seed in range(DEFECTS[defect].within):
        failure = run_seed(seed, defect)
        if failure is not None:
            return failure
    return None


def pool() -> ProcessPoolExecutor:
    # Spawned: a fork would copy whatever threads and loops the tests have at that moment.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), mp_context=context)


def survey(seeds: Iterable[int], defect: str | None = None) -> Iterator[Failure]:
    """The failures among many seeds, as they come, by as many processes as there are cores."""
    everything = list(seeds)
    chunks = [everything[i : i + CHUNK] for i in range(0, len(everything), CHUNK)]
    with pool() as processes:
        for failures in processes.map(partial(_chunk, defect=defect), chunks):
            yield from failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seeds", default="0-149", help="first-last, or one")
    parser.add_argument("--defect", choices=sorted(DEFECTS), help="leave out one rule on purpose")
    parser.add_argument("--trace", action="store_true", help="print the last steps of each failure")
    options = parser.parse_args(arguments)
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    if options.defect:
        print(f"left out: {DEFECTS[options.defect].rule}")
    started, failed = time.monotonic(), 0
    one = len(seeds) == 1
    for failure in _chunk(list(seeds), options.defect) if one else survey(seeds, options.defect):
        failed += 1
        print(failure, flush=True)
        if options.trace or one:
            print(failure.trace)
    print(f"{failed} of {len(seeds)} seeds failed in {time.monotonic() - started:.0f} s")
    return int(failed > 0)
