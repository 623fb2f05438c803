"""Seeds, one after the other or split over processes, and what is said of those that fail."""

import argparse
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from tests.simulator.oracle import Wrong
from tests.simulator.world import World


@dataclass(frozen=True)
class Failure:
    seed: int
    reason: str
    trace: str


def run_seed(seed: int, defect: str | None = None) -> Failure | None:
    world = World(seed, defect)
    try:
        world.run()
    except Wrong as wrong:
        return Failure(seed, str(wrong), "\n".join(world.trace))
    except Exception as error:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        words = "".join(traceback.format_exception(error))
        return Failure(seed, f"{type(error).__name__}: {error}", "\n".join([*world.trace, words]))
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.simulator", description=__doc__)
    parser.add_argument("--seeds", default="0-200", help="first-last, or one")
    parser.add_argument("--defect", help="leave out one rule on purpose")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args(arguments)
    first, _, last = options.seeds.partition("-")
    seeds: Iterable[int] = range(int(first), int(last or first) + 1)
    started = time.monotonic()
    failed = 0
    for seed in seeds:
        failure = run_seed(seed, options.defect)
        if failure is not None:
            failed += 1
            print(f"seed {seed}: {failure.reason}")
            if options.trace or int(last or first) == int(first):
                print(failure.trace)
    print(f"{failed} failed of {len(range(int(first), int(last or first) + 1))}, {time.monotonic() - started:.1f} s")
    return int(failed > 0)
