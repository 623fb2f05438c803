"""`gwproxy ledger`: is it right, how does an account stand, how did it stand, what would other
prices have made of it. Nothing here changes anything but `accept-loss` (and `archive`, next door).
"""

import argparse
import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from gwproxy import assets
from gwproxy.cli import archive
from gwproxy.cli.offline import opened
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.ledger import BrokenLedger, State, apply
from gwproxy.core.money import format_usd
from gwproxy.core.pricing import PriceBook
from gwproxy.core.proof import differences, unlawful
from gwproxy.core.records import AnyRecord, decode
from gwproxy.core.routing import CATALOGUE
from gwproxy.core.usage import Usage
from gwproxy.parts import kept
from gwproxy.storage import archive_file, inspect, reports
from gwproxy.storage.backup import Backups
from gwproxy.storage.database import BackupRefused, DatabaseRefused
from gwproxy.storage.files import OS_FILES
from gwproxy.storage.ledger import Older, fetch_balance, load_state, loaded_since
from gwproxy.storage.scan import Scan
from gwproxy.storage.segments import CHUNK_BYTES, Gap, JournalRefused
from gwproxy.storage.verify import findings

FINE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2

_PAGE: Final = 1000
_MOST: Final = 20
"""Faults that are shown: who has more needs the first ones."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    common.add_argument("--json", action="store_true", help="print JSON")
    family = subparsers.add_parser(
        "ledger", help="the ledger: verify, show, replay, rerate, archive"
    ).add_subparsers(metavar="COMMAND", required=True)

    verify = family.add_parser(
        "verify",
        parents=[common],
        help="prove that it adds up",
        description="Makes each decision of the journal again, compares the balances with the sums "
        "of their lines, and the journal with the database. Also while the server runs.",
    )
    verify.set_defaults(func=_runs(_verify))

    show = family.add_parser("show", parents=[common], help="how accounts stand now")
    show.add_argument("account", nargs="?", metavar="ACCOUNT", help='such as "user:alice"')
    show.set_defaults(func=_runs(_show))

    replay = family.add_parser("replay", parents=[common], help="how accounts stood at a moment")
    replay.add_argument(
        "--at", metavar="TIME", required=True, help='such as "2026-11-20T12:00:00Z"'
    )
    replay.add_argument("account", nargs="?", metavar="ACCOUNT", help='such as "user:alice"')
    replay.set_defaults(func=_runs(_replay))

    rerate = family.add_parser(
        "rerate",
        parents=[common],
        help="what other prices would have made of a month",
        description="Prices the recorded tokens anew. Changes nothing.",
    )
    rerate.add_argument(
        "--prices",
        metavar="FILE",
        required=True,
        help="a table made by `gwproxy prices build`, or `built-in` for the one that is shipped",
    )
    rerate.add_argument("--month", metavar="YYYY-MM", help="default: all that is there")
    rerate.set_defaults(func=_runs(_rerate))

    archived = family.add_parser(
        "archive",
        parents=[common],
        help="months that are long over, out of the database and into files",
        description="Archives what is due by [storage] keep_months, while no server runs: a "
        "running one does it by itself. With --list, --verify or --find it only looks.",
    )
    archive.add_arguments(archived)
    archived.set_defaults(func=_runs(archive.run))

    accept = family.add_parser(
        "accept-loss",
        parents=[common],
        help="go on without a journal that is gone",
        description="Begins a new journal behind the database. What only the lost journal knew "
        "stays lost: the last requests and changes before it went.",
    )
    accept.set_defaults(func=_runs(_accept_loss))


def _runs(
    command: Callable[[argparse.Namespace, Config], int],
) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        try:
            config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
            return command(args, config)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return WRONG_USAGE
        except (DatabaseRefused, JournalRefused, BrokenLedger, Gap) as error:
            print(error, file=sys.stderr)
            return FAILED

    return run


# -- verify ----------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace, config: Config) -> int:
    with inspect.tables(config.storage.path) as tables:
        found = inspect.journal(config.storage.journal, tables.mark.lsn)
        backup = Backups(config.storage.journal, every_s=0, keep=1).newest()
        covered = 0 if backup is None else backup[1].lsn
        faults = asyncio.run(_journal_faults(found, tables, covered))
        faults += [str(each) for each in asyncio.run(tables.run(lambda c: [*findings(c)]))]
        lsn = tables.mark.lsn
    report = {
        "ok": not faults,
        "database_lsn": lsn,
        "journal_lsn": found.trail.end.lsn,
        "faults": faults,
    }
    if args.json:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    elif faults:
        for fault in faults[:_MOST]:
            print(fault, file=sys.stderr)
        print(f"ledger verify: {len(faults)} faults", file=sys.stderr)
    else:
        print(
            f"ledger verify: ok (journal up to record {found.trail.end.lsn}, database up to {lsn})"
        )
    return FAILED if faults else FINE


async def _journal_faults(found: Scan, tables: inspect.Tables, covered: int) -> list[str]:
    """The records that the database does not have yet are checked against it; where the journal
    goes back to its beginning without a gap, all of it is. The newest backup has those up to
    `covered`."""
    trail, mark = found.trail, tables.mark
    if not trail.segments:
        if not mark.lsn:
            return []
        return [
            f"{trail.directory}: the journal is missing, and the database has records up to "
            f"{mark.lsn}. Put its segments back; or go on without what only they knew: "
            "`gwproxy ledger accept-loss`"
        ]
    if trail.end.lsn < mark.lsn:
        return [f"the database has record {mark.lsn}, the journal ends with {trail.end.lsn}"]
    first = trail.segments[0].first_lsn
    missing = []
    if first > covered + 1:
        missing = [
            f"{trail.directory}: records {covered + 1} to {first - 1} are in no segment and in no "
            "backup, so that a lost database could not be made anew. Put the segments back, or "
            "make a backup: `gwproxy backup`"
        ]
    if first == 1:
        # There may be a gap where the database was ahead: it has what the journal never had.
        with suppress(Gap):
            return await _replayed(found, tables, from_the_start=True)
    try:
        return missing + await _replayed(found, tables, from_the_start=False)
    except Gap as gap:
        return [
            *missing,
            f"{trail.directory}: {gap}, nor has the database, which ends at {mark.lsn}",
        ]


async def _replayed(found: Scan, tables: inspect.Tables, *, from_the_start: bool) -> list[str]:
    """What is wrong with the journal's records, and with the database beside them; Gap."""
    mark = tables.mark
    stored = await load_state(tables, breathe=_breathe)
    since = loaded_since(mark.t)
    faults: list[str] = []

    async def compare() -> None:
        for key in state.balances:
            if key[1] < since and key not in stored.balances:
                await fetch_balance(tables, stored, key)
        faults.extend(differences(state, stored))

    state = State() if from_the_start else stored
    older = Older(tables, state, "" if from_the_start else since)
    for record in _records(found, state.lsn):
        if from_the_start and record.lsn == mark.lsn + 1:
            await compare()
        faults += unlawful(state, record)
        await older.ready(record)
        apply(state, record)
    if from_the_start and state.lsn == mark.lsn:
        await compare()
    return faults


def _records(found: Scan, after_lsn: int) -> Iterator[AnyRecord]:
    trail = found.trail
    cursor = trail.find(after_lsn)
    while cursor.lsn < trail.end.lsn:
        payloads, cursor = trail.read(cursor, _PAGE, CHUNK_BYTES)
        for payload in payloads:
            yield decode(payload)


async def _breathe() -> None:
    """Nobody else waits for this process."""


# -- show and replay -------------------------------------------------------------------------------


def _show(args: argparse.Namespace, config: Config) -> int:
    with inspect.tables(config.storage.path) as tables:
        found = inspect.journal(config.storage.journal, tables.mark.lsn)
        state = asyncio.run(_state_now(found, tables))
    rows = [
        _row(account, period, balance.spent, balance.credited, balance.count, balance.held)
        for (account, period), balance in sorted(state.balances.items())
        if args.account in (None, account)
    ]
    _print_rows(args, rows, {"as_of_lsn": state.lsn})
    return FINE


async def _state_now(found: Scan, tables: inspect.Tables) -> State:
    state = await load_state(tables, breathe=_breathe)
    older = Older(tables, state, loaded_since(tables.mark.t))
    for record in _records(found, state.lsn):
        await older.ready(record)
        apply(state, record)
    return state


def _replay(args: argparse.Namespace, config: Config) -> int:
    try:
        at = datetime.fromisoformat(args.at)
    except ValueError:
        print(
            f'--at: write a time such as "2026-11-20T12:00:00Z", not {args.at!r}', file=sys.stderr
        )
        return WRONG_USAGE
    at_ms = int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    with inspect.tables(config.storage.path) as tables:
        stood = asyncio.run(tables.run(lambda c: reports.balances_at(c, at_ms)))
        archived = asyncio.run(tables.run(lambda c: reports.archived_within(c, at_ms)))
    rows = [
        _row(account, period, spent, credited, count, held)
        for account, period, spent, credited, count, held in stood
        if args.account in (None, account)
    ]
    more = {"at": args.at, "as_of_lsn": tables.mark.lsn, "archived_months": archived}
    _print_rows(args, rows, more)
    if archived and not args.json:
        print(
            f"In the archive, so that only its files tell how it stood then: {', '.join(archived)}",
            file=sys.stderr,
        )
    return FINE


def _row(
    account: str, period: str, spent: int, credited: int, count: int, held: int
) -> dict[str, Any]:
    return {
        "account": account,
        "period": period,
        "spent_usd": format_usd(spent),
        "granted_usd": format_usd(credited),
        "held_usd": format_usd(held),
        "requests": count,
    }


def _print_rows(args: argparse.Namespace, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    if args.json:
        print(orjson.dumps({"data": rows, **more}, option=orjson.OPT_INDENT_2).decode())
        return
    if not rows:
        print("Nothing was spent or held.")
        return
    cells = [[name.upper().replace("_", " ") for name in rows[0]]]
    cells += [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    for line in cells:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        )


# -- rerate ----------------------------------------------------------------------------------------


def _rerate(args: argparse.Namespace, config: Config) -> int:
    overrides = {name: price.row() for name, price in config.prices.models.items()}
    try:
        table = (
            assets.prices()
            if args.prices == "built-in"
            else assets.parse_prices(Path(args.prices).read_bytes())
        )
        book = PriceBook(table, overrides)
    except (OSError, ValueError, assets.AssetError) as error:
        print(f"{args.prices}: {error}", file=sys.stderr)
        return WRONG_USAGE
    was: dict[str, int] = defaultdict(int)
    would: dict[str, int] = defaultdict(int)
    unpriced: dict[str, int] = defaultdict(int)
    as_charged = 0
    with inspect.tables(config.storage.path) as tables:
        for charged in asyncio.run(tables.run(lambda c: [*reports.as_charged(c, args.month)])):
            request = charged.request
            name = f"{request.provider}/{request.upstream_model}"
            provider = config.providers.get(request.provider)
            slug = CATALOGUE.get(
                (provider.prefix if provider else None) or request.provider, request.provider
            )
            rate = book.rate(slug, request.upstream_model, request.t / 1000)
            if rate is None:
                unpriced[name] += 1
                continue
            was[name] += charged.cost
            if charged.by_tokens:
                would[name] += rate.cost(Usage(*request.tokens))
            else:
                as_charged += 1
                would[name] += charged.cost
    rows = [
        {
            "model": name,
            "charged_usd": format_usd(was[name]),
            "would_be_usd": format_usd(would[name]),
            "difference_usd": format_usd(would[name] - was[name]),
        }
        for name in sorted(was)
    ]
    totals = {
        "model": "all",
        "charged_usd": format_usd(sum(was.values())),
        "would_be_usd": format_usd(sum(would.values())),
        "difference_usd": format_usd(sum(would.values()) - sum(was.values())),
    }
    more = {"prices": book.version, "unpriced": dict(unpriced), "left_as_charged": as_charged}
    _print_rows(args, [*rows, totals], more)
    if as_charged and not args.json:
        print(
            f"Left as charged, since no price makes their cost of their tokens (holds, estimates, "
            f"corrections, several attempts): {as_charged}",
            file=sys.stderr,
        )
    files = archive_file.archives(OS_FILES, kept(config).archive)
    archived = sorted({file.name[:7] for file in files if args.month in (None, file.name[:7])})
    if archived:
        print(f"In the archive, and not looked at: {', '.join(archived)}", file=sys.stderr)
    if unpriced and not args.json:
        for name, count in sorted(unpriced.items()):
            print(f"no price there: {name} ({count} requests)", file=sys.stderr)
    return FINE


# -- accept-loss -----------------------------------------------------------------------------------


def _accept_loss(args: argparse.Namespace, config: Config) -> int:
    async def accept() -> int:
        async with opened(config, accept_loss=True) as store:
            # The new journal does not go back to the beginning: without one, a loss of the
            # database could not be made good.
            try:
                await store.back_up()
            except BackupRefused as error:
                print(error, file=sys.stderr)  # the server that starts next tries again
            return store.recovery.settled

    settled = asyncio.run(accept())
    print(
        f"A new journal begins in {config.storage.journal}. "
        f"{settled} requests that were open were charged what was held for them."
    )
    return FINE
