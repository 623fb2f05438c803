"""`gwproxy ledger archive`: months that are long over, out of the database and into files; what is
there, whether it is whole, and single requests of it.
"""

import argparse
import asyncio
import re
import sys
from functools import partial
from typing import Any, Final

import orjson

from gwproxy.cli.offline import opened
from gwproxy.config import Config
from gwproxy.parts import kept
from gwproxy.storage import archive, archive_file, inspect
from gwproxy.storage.archive_file import ArchiveRefused
from gwproxy.storage.database import DatabaseInUse
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.segments import JournalInUse

FINE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2

_MONTH: Final = re.compile(r"\d{4}-(0[1-9]|1[0-2])")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--month", metavar="YYYY-MM", help="this one, whether it is due or not")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="what is there; changes nothing")
    what.add_argument(
        "--verify", action="store_true", help="read every file and prove it; changes nothing"
    )
    what.add_argument("--find", metavar="REQUEST_ID", help="one request that was archived")


def run(args: argparse.Namespace, config: Config) -> int:
    if args.month is not None and not _MONTH.fullmatch(args.month):
        print(f'--month: write a month such as "2026-01", not {args.month!r}', file=sys.stderr)
        return WRONG_USAGE
    try:
        if args.find is not None:
            return _find(args, config)
        if args.list or args.verify:
            return _look(args, config)
        return _archive(args, config)
    except (DatabaseInUse, JournalInUse) as error:
        print(f"{error} A running server archives what is due by itself.", file=sys.stderr)
        return FAILED
    except (ArchiveRefused, OSError) as error:
        print(error, file=sys.stderr)
        return FAILED


def _archive(args: argparse.Namespace, config: Config) -> int:
    async def work() -> list[str]:
        async with opened(config) as store:
            store.archive.in_a_hurry = True
            if args.month is None:
                return await store.archive.look()
            return [args.month] if await store.archive.month(args.month) else []

    months = asyncio.run(work())
    if args.json:
        _print_json({"archived": months})
    elif months:
        print(f"Archived in {kept(config).archive}: {', '.join(months)}")
    else:
        print("Nothing to archive.")
    return FINE


def _files(args: argparse.Namespace, config: Config) -> list[Any]:
    files = archive_file.archives(OS_FILES, kept(config).archive)
    return [file for file in files if args.month in (None, file.name[:7])]


def _find(args: argparse.Namespace, config: Config) -> int:
    for file in _files(args, config):
        found = archive_file.find(OS_FILES, file, args.find)
        if found is not None:
            _print_json({"file": str(file), **found})
            return FINE
    print(f"{args.find}: in none of the files of {kept(config).archive}", file=sys.stderr)
    return FAILED


def _look(args: argparse.Namespace, config: Config) -> int:
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    with inspect.tables(config.storage.path) as tables:
        for file in _files(args, config):
            try:
                head, first = archive_file.beginning(OS_FILES, file)
                hash = asyncio.run(tables.run(partial(archive.closed_with, head=head)))
                there = first is not None and asyncio.run(
                    tables.run(partial(archive.stands, row=first))
                )
                row = {
                    "month": head.month,
                    "file": file.name,
                    "bytes": file.stat().st_size,
                    "state": "unfinished" if hash is None else "leaving" if there else "archived",
                    "sha256": hash,
                }
                if args.verify:
                    found = archive_file.check(OS_FILES, file)
                    row["requests"] = found.end.requests
                    faults += asyncio.run(tables.run(partial(archive.faults, found=found)))
                rows.append(row)
            except ArchiveRefused as error:
                faults.append(str(error))
        if args.verify and args.month is None:
            known = {row["sha256"] for row in rows}
            named = asyncio.run(tables.run(archive.named))
            faults += [
                f"{month}: the file with SHA-256 {hash} is missing"
                for hash, month in named
                if hash not in known
            ]
    if args.json:
        _print_json({"data": rows} | ({"faults": faults} if args.verify else {}))
    else:
        for row in rows:
            print(f"{row['month']}  {row['state']:<10}  {row['bytes']:>12}  {row['file']}")
        for fault in faults:
            print(fault, file=sys.stderr)
        if args.verify:
            requests = sum(row["requests"] for row in rows if "requests" in row)
            verdict = f"{len(faults)} faults" if faults else "ok"
            print(f"ledger archive: {verdict} ({len(rows)} files, {requests} requests)")
        elif not rows:
            print("Nothing was archived.")
    return FAILED if faults else FINE


def _print_json(value: object) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
