"""The command `python -m bench`: chooses how much to measure, prints and writes the report."""

import argparse
import dataclasses
import resource
import sys
from pathlib import Path

import orjson

from bench.children import ChildFailed
from bench.report import render
from bench.run import EVERYBODY, FULL, QUICK, SMOKE, Settings, as_json, run

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def settings_from(args: argparse.Namespace) -> Settings:
    chosen = SMOKE if args.smoke else QUICK if args.quick else FULL
    if args.only:
        chosen = dataclasses.replace(chosen, entrants=tuple(args.only))
    if args.plain:
        chosen = dataclasses.replace(chosen, kinds=("plain",))
    if args.rounds:
        chosen = dataclasses.replace(chosen, rounds=args.rounds)
    return dataclasses.replace(chosen, pin=args.pin)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures gwproxy, nginx, a naive proxy and other gateways in one run.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a shorter run, for a first look")
    size.add_argument("--smoke", action="store_true", help="seconds: does the tool itself work?")
    parser.add_argument("--only", nargs="+", choices=EVERYBODY, help="these contestants alone")
    parser.add_argument("--plain", action="store_true", help="leave the TLS upstream out")
    parser.add_argument("--rounds", type=int, help="windows for each contestant and phase")
    parser.add_argument("--pin", action="store_true", help="give the proxy a core of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all windows as JSON")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="write the report here (a full run with everybody: bench/RESULTS.md)",
    )
    args = parser.parse_args()
    settings = settings_from(args)

    # Thousands of streams are twice as many sockets; children inherit the limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        results = run(settings)
    except KeyboardInterrupt:
        print("stopped; every process of the run has ended", file=sys.stderr)
        return 130
    except (ChildFailed, TimeoutError) as error:
        print(f"the run broke off: {error}", file=sys.stderr)
        return 1
    report = render(results)
    print(report)
    if args.json:
        args.json.write_bytes(orjson.dumps(as_json(results), option=orjson.OPT_INDENT_2))
    # A short or partial run never overwrites the figures of a whole one unless told where to.
    whole = settings == dataclasses.replace(FULL, pin=settings.pin)
    target = args.results or (RESULTS if whole else None)
    if target:
        target.write_text(report)
        print(f"written: {target}", file=sys.stderr)
    return 0 if results.windows else 1


if __name__ == "__main__":
    sys.exit(main())
