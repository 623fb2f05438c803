"""The command `python -m fuzz`: one target after the other, each in a process of its own, for a
given time. What breaks a rule is left in `.fuzz/` and named."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from fuzz import TARGETS

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--inside", metavar="TARGET", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run(args.inside, args.seconds)
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    broken = []
    for target in args.targets:
        print(f"== {target}: {args.seconds} s", flush=True)
        command = [sys.executable, "-m", "fuzz", "--inside", target, "--seconds"]
        if subprocess.run([*command, str(args.seconds)], cwd=ROOT).returncode:
            broken.append(target)
    if broken:
        print(f"a rule was broken: {', '.join(broken)}; the input is in {KEPT}", file=sys.stderr)
    return 1 if broken else 0


def run(target: str, seconds: int) -> None:
    """Until the time is up or a rule is broken; this process ends with it."""
    import atheris  # a tool of development, which the package does not need

    with atheris.instrument_imports(include=["gwproxy"]):
        module = importlib.import_module(f"fuzz.{target}")
    corpus = KEPT / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(module.SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=1024"]
    found = f"-artifact_prefix={KEPT / target}-"
    atheris.Setup([sys.argv[0], *options, found, "-print_final_stats=1", str(corpus)], module.check)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
