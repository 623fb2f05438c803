"""`gwproxy backup` and `gwproxy restore`: a copy of the database, and a copy in its place."""

import argparse
import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from gwproxy.cli.printing import print_json, say
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.ledger import BrokenLedger, State
from gwproxy.core.proof import differences
from gwproxy.core.routing import CATALOGUE
from gwproxy.storage import inspect
from gwproxy.storage.backup import checked, copy_of, restore
from gwproxy.storage.database import BackupRefused, DatabaseRefused, lock
from gwproxy.storage.scan import Scan, claim
from gwproxy.storage.segments import Gap, JournalRefused
from gwproxy.storage.verify import findings

FINE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2

_MOST: Final = 20
"""Faults that are shown: who has more needs the first ones."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    common.add_argument("--json", action="store_true", help="print JSON")
    backup = subparsers.add_parser(
        "backup",
        parents=[common],
        help="copy the database to a file, also while the server runs",
        description="The copy is of one moment, is looked at before it gets its name, and is on "
        "the disk when this returns.",
    )
    backup.add_argument("file", metavar="FILE")
    backup.set_defaults(func=_runs(_backup))
    back = subparsers.add_parser(
        "restore",
        parents=[common],
        help="put a backup in the database's place; the server must not run",
        description="The journal behind the backup is replayed by the next start, so nothing is "
        "lost where it goes back that far. What stands there now is set aside, never deleted.",
    )
    back.add_argument("file", metavar="FILE")
    back.add_argument(
        "--verify",
        action="store_true",
        help="only if all balances are afterwards what they are now",
    )
    back.set_defaults(func=_runs(_restore))


def _runs(
    command: Callable[[argparse.Namespace, Config], int],
) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        os.umask(0o077)
        try:
            config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
            return command(args, config)
        except ConfigError as error:
            say(str(error))
            return WRONG_USAGE
        except (BackupRefused, DatabaseRefused, JournalRefused, BrokenLedger) as error:
            say(str(error))
            return FAILED

    return run


def _backup(args: argparse.Namespace, config: Config) -> int:
    file = Path(args.file)
    mark = copy_of(config.storage.path, file, config.storage.journal)
    size = file.stat().st_size
    if args.json:
        print_json({"file": str(file), "as_of_lsn": mark.lsn, "bytes": size})
    else:
        print(f"{file}: the ledger up to record {mark.lsn} ({size:,} bytes), looked at and good.")
    return FINE


def _restore(args: argparse.Namespace, config: Config) -> int:
    file, path = Path(args.file), config.storage.path
    with ExitStack() as stack:
        stack.callback(os.close, lock(path))
        stack.callback(os.close, claim(config.storage.journal))
        mark = checked(file)
        found = inspect.journal(config.storage.journal, mark.lsn)
        after = _state(file, found)
        before = why = None
        if args.verify:
            try:
                before = _state(path, found)
            except (DatabaseRefused, JournalRefused, BrokenLedger) as error:
                why = str(error)
        faults = [] if before is None else list(differences(after, before))
        if faults:
            for fault in faults[:_MOST]:
                say(fault)
            say(f"Nothing was changed: {len(faults)} balances would not be what they are now.")
            return FAILED
        restore(file, path)
        if args.verify:
            faults = [*_wrong(path)]
    report: dict[str, Any] = {
        "restored": str(file),
        "as_of_lsn": mark.lsn,
        "replayed_by_the_next_start": after.lsn - mark.lsn,
        "balances_compared": None if before is None else len(after.balances),
        "faults": faults,
    }
    if args.json:
        print_json(report)
    else:
        _tell(args, report, config, why, bool(found.trail.segments))
    return FAILED if faults else FINE


def _tell(
    args: argparse.Namespace,
    report: dict[str, Any],
    config: Config,
    why: str | None,
    journal: bool,
) -> None:
    print(f"restored   {report['restored']}, up to record {report['as_of_lsn']}")
    if journal:
        print(f"journal    {report['replayed_by_the_next_start']} records follow it")
    else:
        print(
            f"journal    none in {config.storage.journal}: `gwproxy ledger accept-loss` goes on "
            "without it"
        )
    if not args.verify:
        return
    if report["balances_compared"] is None:
        print(f"balances   not compared: {why}")
    else:
        print(f"balances   {report['balances_compared']}, each what it was before")
    for fault in report["faults"][:_MOST]:
        say(fault)
    count = len(report["faults"])
    print(f"verify     {f'{count} faults' if count else 'ok'}")


def _state(database: Path, found: Scan) -> State:
    """The ledger as a database and the journal behind it have it."""
    with inspect.tables(database) as tables:
        try:
            return asyncio.run(inspect.state(tables, found))
        except Gap as gap:
            raise JournalRefused(
                f"{database} goes up to record {tables.mark.lsn}, and {gap}: records between the "
                "two are missing. Take a newer backup."
            ) from gap


def _wrong(database: Path) -> Iterator[str]:
    with inspect.tables(database) as tables:
        yield from asyncio.run(tables.run(lambda c: [str(each) for each in findings(c)]))
