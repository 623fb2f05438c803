"""`gwproxy export` and `gwproxy import`: the directory as a file, and a month for whoever accounts
for it."""

import argparse
import os
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from gwproxy.admin.body import NOT_JSON
from gwproxy.admin.bulk import USAGE_COLUMNS
from gwproxy.admin.rows import Format, csv_line, csv_row
from gwproxy.cli.plane import FINE, REFUSED, WRONG_USAGE, Call, Stop, common_arguments, runs
from gwproxy.cli.printing import print_json, say
from gwproxy.core.money import format_usd, parse_usd

_PART_BYTES: Final = 1 << 16
_MOST_SHOWN: Final = 20
_BAR: Final = 30

_ADJUSTMENT_COLUMNS: Final = (
    *("month", "account", "type", "amount_usd", "created_at", "actor", "reason", "request_id"),
)
_TOTAL_COLUMNS: Final = ("of", "id", "request_count", "cost_usd", "as_of_lsn", "behind")
"""The last two of the whole alone: the last record that is in it, and how many are missing."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = common_arguments()
    export = subparsers.add_parser(
        "export",
        parents=[common],
        help="users and organizations as a file, or a month's usage for the accounts",
        description="`export users`, `export orgs` and `export all` write NDJSON or CSV; `export "
        "usage --month 2026-11` writes a folder: usage by user and model, corrections, totals, and "
        "SHA256SUMS to check them by. No export has a key in it.",
    )
    export.add_argument("what", choices=["users", "orgs", "all", "usage"])
    export.add_argument("--format", choices=["ndjson", "csv"], default="ndjson")
    export.add_argument("--month", metavar="YYYY-MM", help="of usage; default: this one")
    export.add_argument(
        "--output", metavar="PATH", help="a file, of usage a folder; default: stdout, `usage-MONTH`"
    )
    export.set_defaults(func=runs(_export))
    load = subparsers.add_parser(
        "import",
        parents=[common],
        help="users and organizations out of a file: all of it or nothing",
        description="Rows that are found again by id or e-mail address are changed, the others "
        "created. Where a row is wrong nothing is imported, and each wrong one is named.",
    )
    load.add_argument("file", metavar="FILE", help="NDJSON or CSV; - for stdin")
    load.add_argument("--format", choices=["ndjson", "csv"], help="default: by the file's name")
    load.add_argument("--kind", choices=["users", "orgs"], default="users", help="of a CSV file")
    load.add_argument("--dry-run", action="store_true", help="check it, and change nothing")
    load.set_defaults(func=runs(_import))


# -- export --------------------------------------------------------------------------------------

_KINDS: Final = {"users": "user", "orgs": "organization", "all": "all"}


async def _export(args: argparse.Namespace, call: Call) -> int:
    if args.what == "usage":
        return await _accounts(args, call)
    if args.what == "all" and args.format == "csv":
        raise Stop(WRONG_USAGE, "A CSV file has one kind of rows: export users, or orgs.")
    parts = call.export({"kind": _KINDS[args.what], "format": args.format})
    if args.output in (None, "-"):
        async for part in parts:
            sys.stdout.buffer.write(part)
        sys.stdout.flush()
        return FINE
    path, size = Path(args.output), 0
    with _written(path) as file:
        async for part in parts:
            size += file.write(part)
    say(f"{path}: {size} bytes.")
    return FINE


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that its owner alone may read, and that is there only once it is whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise Stop(REFUSED, f"{path}: {error.strerror}.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


async def _accounts(args: argparse.Namespace, call: Call) -> int:
    """A month as files, each one checked against the ledger's own total before it is left there."""
    query = {"kind": "usage", "format": "ndjson"}
    if args.month is not None:
        query["month"] = args.month
    usage: list[dict[str, Any]] = []
    adjustments: list[dict[str, Any]] = []
    total: dict[str, Any] | None = None
    async for line in _lines(call.export(query)):
        row = orjson.loads(line)
        match row["kind"]:
            case "usage":
                usage.append(row)
            case "adjustment":
                adjustments.append(row)
            case "total":
                total = row
    if total is None:
        raise Stop(REFUSED, "The export has no end: ask again.")
    cost = sum(parse_usd(row["cost_usd"]) for row in usage)
    if (format_usd(cost), sum(row["request_count"] for row in usage)) != (
        total["cost_usd"],
        total["request_count"],
    ):
        raise Stop(REFUSED, "The lines do not add up to the total: run `gwproxy ledger verify`.")
    month = total["month"]
    folder = Path(args.output or f"usage-{month}")
    files = {
        f"usage-{month}.csv": _table(USAGE_COLUMNS, usage),
        f"adjustments-{month}.csv": _table(_ADJUSTMENT_COLUMNS, adjustments),
        f"totals-{month}.csv": _table(_TOTAL_COLUMNS, _totals(usage, total)),
    }
    sums = "".join(f"{sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    files["SHA256SUMS"] = sums.encode()
    for name, data in files.items():
        with _written(folder / name) as file:
            file.write(data)
    if args.json:
        print_json({"folder": str(folder), "files": [*files], **total})
    else:
        print(f"{folder}: {total['request_count']} requests, {total['cost_usd']} USD")
        say(f"Check it later with: cd {folder} && sha256sum -c SHA256SUMS")
    if total["behind"]:
        say(
            f"These files are not complete: {total['behind']} records were not in the database yet "
            f"(it had those up to {total['as_of_lsn']}). Ask again when it has caught up."
        )
        return REFUSED
    return FINE


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        raise Stop(REFUSED, "The export was cut short: ask again.")


def _totals(usage: list[dict[str, Any]], total: dict[str, Any]) -> list[dict[str, Any]]:
    """By organization, user, provider and model, and of all: each of them the same sum."""
    sums: dict[tuple[str, str], list[int]] = {}
    for row in usage:
        for of, name in (
            ("organization", row["org_id"]),
            ("user", row["user_id"]),
            ("provider", row["provider"]),
            ("model", f"{row['provider']}/{row['model']}"),
        ):
            found = sums.setdefault((of, name), [0, 0])
            found[0] += row["request_count"]
            found[1] += parse_usd(row["cost_usd"])
    rows = [
        {
            **dict.fromkeys(_TOTAL_COLUMNS),
            **{"of": of, "id": name, "request_count": count, "cost_usd": format_usd(cost)},
        }
        for (of, name), (count, cost) in sorted(sums.items())
    ]
    return [*rows, {**total, "of": "all", "id": None}]


def _table(columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> bytes:
    lines = [csv_row(columns, (row[name] for name in columns)) for row in rows]
    return b"".join([csv_line(columns), *lines])


# -- import --------------------------------------------------------------------------------------


async def _import(args: argparse.Namespace, call: Call) -> int:
    form = Format(args.format or ("csv" if args.file.lower().endswith(".csv") else "ndjson"))
    query = {"dry_run": str(int(args.dry_run)), "kind": _KINDS[args.kind]}
    report = await call.load(lambda: _data(args.file), form, query)
    counts = report["counts"]
    unread = any(row.get("message") == NOT_JSON for row in report["rows"][:1])
    if args.format is None and form is Format.NDJSON and unread:
        say("This was read as NDJSON, by the file's name. If it is CSV, give --format csv.")
    if args.json:
        print_json(report)
    else:
        wrong = [row for row in report["rows"] if row["result"] == "wrong"]
        for row in wrong[:_MOST_SHOWN]:
            print(f"line {row['line']}: {row['message']}")
        if len(wrong) > _MOST_SHOWN:
            print(f"... and {len(wrong) - _MOST_SHOWN} more")
        words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if report["committed"]:
            print(f"imported: {words or 'no rows'}")
        elif args.dry_run:
            print(f"checked, nothing was imported: {words or 'no rows'}")
        else:
            print(f"nothing was imported: {len(wrong)} of {len(report['rows'])} rows are wrong")
    return REFUSED if counts["wrong"] else FINE


async def _data(name: str) -> AsyncIterator[bytes]:
    """The file's bytes, with a bar where somebody watches."""
    with _source(name) as file:
        size = os.fstat(file.fileno()).st_size if name != "-" else 0
        watched, done = bool(size) and sys.stderr.isatty(), 0
        while part := file.read(_PART_BYTES):
            yield part
            done += len(part)
            if watched:
                bar = f"{'#' * (_BAR * done // size):<{_BAR}}"
                end = "\n" if done >= size else ""
                print(f"\r[{bar}] {100 * done // size:3} %", end=end, file=sys.stderr)


def _source(name: str) -> BinaryIO:
    if name == "-":
        return sys.stdin.buffer
    try:
        return open(name, "rb")
    except OSError as error:
        raise Stop(WRONG_USAGE, f"{name}: {error.strerror}.") from error
