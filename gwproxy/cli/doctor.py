"""`gwproxy doctor`: does all from here to a provider's answer work, and if not, what to do."""

import argparse
import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import orjson

from gwproxy import __version__, assets
from gwproxy.cli.cloudflare_account import NoAccount, account, token_variable
from gwproxy.cloudflare.api import session
from gwproxy.cloudflare.doctor import Check, Doctor, Plan, State, all_good, seen_words
from gwproxy.cloudflare.probe import Target
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE, REST, Candidate, Routes, candidate_of
from gwproxy.core.upstream_words import CHAT_PATHS
from gwproxy.parts import build_routes

FINE: Final = 0
FAILED: Final = 1
WRONG_CONFIGURATION: Final = 2
UNREACHABLE: Final = 3

REPORT: Final = Path("gwproxy-doctor.json")


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="look for what is wrong between here and the providers",
        description="Looks at the configuration, this machine, the gateway, its keys and its log, "
        "and asks each configured provider one question of a few tokens. Changes nothing. Each "
        "failure comes with its cause, the cure, and the command that shows it.",
    )
    parser.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-models", action="store_true", help="ask no model: costs nothing")
    parser.add_argument(
        "--report", type=Path, default=REPORT, metavar="FILE",
        help=f"what the gateway was seen to send; default: {REPORT}",
    )  # fmt: skip
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    try:
        config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
    except ConfigError as error:
        if args.json:
            problems = [str(problem) for problem in error.problems]
            _print_json({"ok": False, "checks": [], "problems": problems})
        else:
            print(error, file=sys.stderr)
        return WRONG_CONFIGURATION
    return asyncio.run(_run(args, config))


async def _run(args: argparse.Namespace, config: Config) -> int:
    overrides = {name: price.row() for name, price in config.prices.models.items()}
    prices = PriceBook(assets.prices(), overrides)
    chain, candidates = _sent(build_routes(config, prices))
    variable = token_variable(config, os.environ)
    targets = [_target(config, candidate, variable) for candidate in chain]
    cloudflare = any(target.cloudflare for target in targets)
    checks: list[Check] = []
    async with AsyncExitStack() as stack:
        try:
            api, gateway, http = await stack.enter_async_context(account(config, tries=2))
        except NoAccount:
            api, gateway = None, ""
            http = await stack.enter_async_context(session(config.upstream.ca_file))
        plan = Plan(
            config,
            targets,
            candidates,
            prices,
            gateway if api is not None and cloudflare else None,
            ask_models=not args.no_models,
        )
        doctor = Doctor(plan, http, api, wall=time.time)
        if not args.json:
            print(f"configuration  {config.file or 'the environment alone'}\n")
        async for check in doctor.examine():
            checks.append(check)
            if not args.json:
                print("\n".join(_lines(check)), flush=True)
    report = _write_report(args.report, doctor, checks)
    good = all_good(checks)
    if args.json:
        rows = [check.row() for check in checks]
        _print_json({"ok": good, "checks": rows, "report": str(report) if report else None})
    else:
        _sum_up(checks, doctor, report)
    if good:
        return FINE
    return UNREACHABLE if doctor.unreachable else FAILED


def _sent(routes: Routes) -> tuple[list[Candidate], list[Candidate]]:
    """(one candidate a provider, in the order of `auto` where there is one; all there are)."""
    every: list[Candidate] = list(routes.resolve("auto") or ())
    for provider in routes.providers.values():
        if provider.model:
            every.append(candidate_of(provider, provider.model))
    for name in routes.aliases:
        every += routes.resolve(name) or ()
    first: dict[str, Candidate] = {}
    for candidate in every:
        first.setdefault(candidate.provider.name, candidate)
    return list(first.values()), every


def _target(config: Config, candidate: Candidate, variable: str) -> Target:
    table = config.providers.get(candidate.provider.name)
    root, flavour, token = config.upstream.root, config.upstream.flavour, config.upstream.token
    if table is not None:
        root, flavour, token = table.root, table.flavour, table.token
    own = token is not None and token != config.upstream.token
    return Target(
        candidate.provider.name,
        candidate.sent,
        root + CHAT_PATHS[flavour],
        token.reveal() if token else None,
        flavour.startswith("cloudflare"),
        candidate.provider.prefix or candidate.provider.prices,
        candidate.provider.max_tokens_field,
        f"{candidate.provider.name.upper().replace('-', '_')}_TOKEN" if own else variable,
        rest=flavour == REST,
    )


# -- printing --------------------------------------------------------------------------------------

_MARKS: Final = {State.PASS: "ok  ", State.FAIL: "FAIL", State.WARN: "warn", State.SKIP: "-   "}


def _lines(check: Check) -> list[str]:
    lines = [f"{_MARKS[check.state]}  {check.name:<28}  {check.cause}"]
    if check.state in (State.FAIL, State.WARN):
        if check.cure:
            lines.append(f"      do:   {check.cure}")
        if check.curl:
            lines.append(f"      see:  {check.curl}")
    return lines


def _sum_up(checks: list[Check], doctor: Doctor, report: Path | None) -> None:
    for line in seen_words(doctor.report.answers):
        print(f"seen  {line}")
    failed = [check.name for check in checks if check.state is State.FAIL]
    print()
    if report is not None:
        print(f"What the gateway was seen to send is in {report}.")
    if failed:
        print(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}.")
    else:
        print("All is well.")


def _write_report(path: Path, doctor: Doctor, checks: list[Check]) -> Path | None:
    if not doctor.report.answers and doctor.report.gateway is None:
        return None
    report = {
        "made_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gwproxy": __version__,
        "checks": [check.row() for check in checks],
        "gateway": doctor.report.gateway,
        "answers": doctor.report.answers,
        "logs": doctor.report.logs,
    }
    try:
        path.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as error:
        print(f"doctor: no report: {path}: {error.strerror}", file=sys.stderr)
        return None
    return path


def _print_json(value: object) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
