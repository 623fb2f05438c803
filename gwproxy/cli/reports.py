"""`gwproxy usage`, `gwproxy requests` and `gwproxy audit`: what was used, asked and changed."""

import argparse
from typing import Any, Final

from gwproxy.cli.plane import FINE, Ask, Call, common_arguments, print_rows, runs
from gwproxy.cli.printing import print_json, say

_FILTERS: Final = {"user": "user_id", "org": "org_id", "provider": "provider", "model": "model"}
_MOST: Final = 1000
"""Rows on one page of the API."""

_GROUPS: Final = {
    "provider": ("provider",),
    "model": ("provider", "model"),
    "user": ("org_id", "user_id"),
    "org": ("org_id",),
    "day": ("day",),
}
_SUMS: Final = ("request_count", "failed_count", "input", "output", "mean_duration_ms", "cost_usd")


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = common_arguments()
    span = argparse.ArgumentParser(add_help=False)
    span.add_argument("--from", dest="since", metavar="DATE", help='such as "2026-11-01"')
    span.add_argument("--to", dest="until", metavar="DATE", help="this day included")
    for name in _FILTERS:
        span.add_argument(f"--{name}", metavar="NAME" if name in ("provider", "model") else "ID")

    usage = subparsers.add_parser(
        "usage", parents=[common, span], help="what was used, by provider, model, user, org or day"
    )
    usage.add_argument("--by", choices=sorted(_GROUPS), default="provider")
    usage.add_argument("--month", metavar="YYYY-MM", help="default: this one")
    usage.set_defaults(func=runs(_usage))

    requests = subparsers.add_parser(
        "requests", parents=[common, span], help="look back at requests, newest first"
    )
    requests.add_argument("--key", metavar="ID")
    requests.add_argument("--outcome", metavar="WORD", help="completed, failed, client_left, ...")
    requests.add_argument("--limit", type=int, default=20, help="how many; default: 20")
    requests.set_defaults(func=runs(_requests))

    audit = subparsers.add_parser("audit", parents=[common], help="who changed what, newest first")
    audit.add_argument("--from", dest="since", metavar="TIME")
    audit.add_argument("--to", dest="until", metavar="TIME")
    for name in ("actor", "action", "noun", "id"):
        audit.add_argument(f"--{name}")
    audit.add_argument("--limit", type=int, default=20, help="how many; default: 20")
    audit.set_defaults(func=runs(_audit))


async def _usage(args: argparse.Namespace, call: Call) -> int:
    sent = _sent(args, group_by=args.by, month=args.month)
    rows, last = await _pages(call, "usage", sent, None)
    if args.json:
        print_json({**last, "data": rows, "next_cursor": None})
        return FINE
    columns = (*_GROUPS[args.by], *_SUMS)
    shown = [{**row, **row["tokens"]} for row in rows]
    total = {**last["total"], **last["total"]["tokens"]}
    name = _GROUPS[args.by][-1]
    print_rows([*shown, {**dict.fromkeys(_GROUPS[args.by], ""), **total, name: "all"}], columns)
    say("As charged at the time; corrections and resets are not in it: gwproxy export usage")
    if last["behind"]:
        say(f"{last['behind']} records are not in the database yet, and not in these sums.")
    return FINE


async def _requests(args: argparse.Namespace, call: Call) -> int:
    sent = _sent(args, key_id=args.key, outcome=args.outcome)
    rows, last = await _pages(call, "requests", sent, args.limit)
    if args.json:
        print_json({**last, "data": rows})
        return FINE
    print_rows(
        [{**row, "outcome": row["outcome"] or "open"} for row in rows],
        ("created_at", "request_id", "user_id", "provider", "model", "outcome", "cost_usd"),
    )
    return FINE


async def _audit(args: argparse.Namespace, call: Call) -> int:
    sent = {name: getattr(args, name) for name in ("actor", "action", "noun", "id")}
    sent |= {"from": args.since, "to": args.until}
    rows, last = await _pages(call, "audit", sent, args.limit)
    if args.json:
        print_json({**last, "data": rows})
        return FINE
    print_rows(rows, ("at", "actor", "action", "noun", "id", "request_id"))
    return FINE


def _sent(args: argparse.Namespace, **more: str | None) -> dict[str, str | None]:
    filters = {field: getattr(args, name) for name, field in _FILTERS.items()}
    return {**filters, "from": args.since, "to": args.until, **more}


async def _pages(
    call: Call, path: str, sent: dict[str, Any], most: int | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and what came with the last page."""
    query = [(name, str(value)) for name, value in sent.items() if value is not None]
    rows: list[dict[str, Any]] = []
    cursor: str | None = ""
    page: dict[str, Any] = {}
    while cursor is not None and (most is None or len(rows) < most):
        limit = _MOST if most is None else min(_MOST, most - len(rows))
        part = (*query, ("limit", str(limit)), ("cursor", cursor))
        page = await call(Ask("GET", (path,), query=part))
        rows += page["data"]
        cursor = page["next_cursor"]
    return rows, page
