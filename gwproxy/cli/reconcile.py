"""`gwproxy reconcile`: the gateway's log beside the ledger, line by line, and what follows."""

import argparse
import asyncio
import csv
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from gwproxy import assets
from gwproxy.cli.cloudflare_account import NoAccount, account
from gwproxy.cli.plane import Ask, Call, runs
from gwproxy.cli.printing import print_json, say, table
from gwproxy.cloudflare.api import Api, Refused
from gwproxy.cloudflare.logs import ExportRefused, Fetched, Progress, bring, fetch, oldest
from gwproxy.cloudflare.reconcile import MARGIN_MS, Sink, Summary, nowhere, settle
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.money import format_usd, nanos_from_picos
from gwproxy.core.period import rfc3339
from gwproxy.core.pricing import PriceBook
from gwproxy.core.reconcile import (
    AGREED,
    SETTLES_WITHIN_MS,
    WORDS,
    Finding,
    Kind,
    Ours,
    Price,
    Theirs,
)
from gwproxy.core.routing import CATALOGUE
from gwproxy.core.usage import Usage
from gwproxy.parts import build_routes
from gwproxy.state.corrections import MOST
from gwproxy.storage import inspect
from gwproxy.storage.database import DatabaseRefused
from gwproxy.storage.ledger import Mark
from gwproxy.storage.reconcile import WHOLE, Book, BookRefused, beside, book, lines, one_run

FINE: Final = 0
DIFFERS: Final = 1
WRONG_USAGE: Final = 2
UNREACHABLE: Final = 3

_DAY_MS: Final = 86_400_000
_TAKEN_IN_MS: Final = 7 * _DAY_MS
"""A run that failed so long before the next one's span, and no longer, is finished with it: what a
broken week left is soon read."""
_STAYS_AFTER_MS: Final = 3_600_000
_LOOKS: Final = 20
_LOOK_S: Final = 0.1
"""Two seconds in all for a database that is a moment behind."""
_ADMITTED_BEFORE_MS: Final = 60_000
"""A request's row is older than its record at the gateway, by less than this."""


class _Stop(Exception):
    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "reconcile",
        help="compare the ledger with the gateway's log, line by line",
        description="Reads the gateway's log (or an exported file), matches it with our requests, "
        "and says where the two differ. With --apply, requests of which nobody knew what they used "
        "get their real cost, as an entry of its own. May be run again, and while the server runs.",
    )
    parser.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    parser.add_argument("--url", help="the server's admin address, where the configuration's fails")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--from", dest="since", metavar="TIME", help="default: a day before --to")
    parser.add_argument("--to", dest="until", metavar="TIME", help="default: two minutes ago")
    parser.add_argument("--file", type=Path, metavar="EXPORT", help="JSON lines, JSON or CSV")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the lines that differ")
    parser.add_argument("--all", action="store_true", help="with --csv: write all lines")
    parser.add_argument("--apply", action="store_true", help="correct what was only estimated")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    if args.all and args.csv is None:
        say("--all: say where all lines are to be written, too: --csv FILE")
        return WRONG_USAGE
    try:
        config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
        since, until = _moment("--from", args.since), _moment("--to", args.until)
        with one_run(beside(config.storage.path)):
            return _run(args, config, since, until)
    except (ConfigError, NoAccount, ExportRefused) as error:
        say(str(error))
        return WRONG_USAGE
    except (DatabaseRefused, BookRefused) as error:
        say(str(error))
        return DIFFERS
    except _Stop as stop:
        say(str(stop))
        return stop.code
    except Refused as refused:
        say(f"{refused.fault.cause}.\ndo:   {refused.fault.cure}\nsee:  {refused.curl}")
        say("What was read so far is kept: the same command goes on from there.")
        return UNREACHABLE if refused.fault.status == 0 else DIFFERS


def _run(args: argparse.Namespace, config: Config, since: int | None, until: int | None) -> int:
    with book(beside(config.storage.path)) as kept:
        summary = asyncio.run(_compare(args, config, kept, since, until))
    _tell(args, summary)
    if args.apply and summary.corrections:
        code = runs(_apply)(args)
        if code != FINE:
            return code
        return DIFFERS if summary.unexplained or summary.unfinished else FINE
    return FINE if summary.agrees else DIFFERS


def _moment(option: str, text: str | None) -> int | None:
    """Milliseconds since 1970."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _Stop(
            WRONG_USAGE, f'{option}: write a day or a time, such as "2026-11-20" or '
            f'"2026-11-20T12:00:00Z", not {text!r}.',
        ) from None  # fmt: skip
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if not 2000 <= moment.year < 3000:
        raise _Stop(WRONG_USAGE, f"{option}: no log is of the year {moment.year}.")
    return int(moment.timestamp() * 1000)


# -- comparing -------------------------------------------------------------------------------------


async def _compare(
    args: argparse.Namespace, config: Config, kept: Book, since: int | None, until: int | None
) -> Summary:
    now_ms = int(time.time() * 1000)
    fetched = Fetched()
    if args.file is not None:
        # Before anything is forgotten: a file that is not there says nothing.
        found = _stat(args.file)
        if _json(kept.note("about")):
            kept.put_aside()
        kept.begin(f"{args.file.absolute()} {found.st_mtime_ns, found.st_size}")
        first, last = bring(args.file, kept, fetched)
        begin = first - _ADMITTED_BEFORE_MS if since is None else since
        end = last + 1 if until is None else until
        oldest_ms: int | None = first
        known = first, last + 1
    else:
        async with account(config) as (api, gateway, _):
            kept.take_back()
            begin, end = _span(kept, f"{config.upstream.api_url} {gateway}", since, until, now_ms)
            oldest_ms = await oldest(api, gateway)
            fetched = await _fetch(args, api, gateway, kept, begin, end, now_ms)
            # Of what is older the log knows nothing any more; what it said once stays.
            known = now_ms if oldest_ms is None else oldest_ms, now_ms
    end = await _known_until(config, begin, end)
    with inspect.tables(config.storage.path) as tables:
        await tables.run(lambda c: kept.take_ours(lines(c, begin - MARGIN_MS, end + MARGIN_MS)))
    names = _names(config)
    with _csv(args.csv, args.all) as sink:
        summary = settle(
            kept,
            begin,
            end,
            oldest=oldest_ms,
            price=_price(config),
            now_ms=now_ms,
            fetched=fetched,
            sink=sink,
            named=lambda slug: names.get(slug, slug),
        )
    kept.add_up(max(begin, known[0]), min(end, known[1]), list(names.items()))
    at = {"at": rfc3339(now_ms), **summary.row()}
    kept.put_note("last", orjson.dumps(at).decode())
    # Long enough ago, a log says the same the next time: who has looked may apply at once.
    settled = end < now_ms - _STAYS_AFTER_MS and not fetched.late and not fetched.missing
    kept.put_note("done", WHOLE if settled else "ended")
    return summary


def _span(
    kept: Book, gateway: str, since: int | None, until: int | None, now_ms: int
) -> tuple[int, int]:
    """What is to be compared. A run that did not come to its end is taken in, so that the days
    since then are not left out, and neither are its own."""
    end = min(now_ms if until is not None else now_ms - SETTLES_WITHIN_MS, until or 1 << 62)
    begin = since if since is not None else end - _DAY_MS
    known_until = None
    before = _json(kept.note("about"))
    if before.get("gateway") == gateway and kept.note("done") is None:
        asked = since in (None, before["since"]) and until in (None, before["until"])
        if asked and begin - before["until"] <= _TAKEN_IN_MS:
            known_until = before["until"]
            begin, end = min(begin, before["since"]), max(end, before["until"])
        else:
            old = f"--from {rfc3339(before['since'])} --to {rfc3339(before['until'])}"
            say(f"An older run did not come to its end. Finish it: gwproxy reconcile {old}")
    if begin >= end:
        raise _Stop(
            WRONG_USAGE, f"Nothing is to be compared from {rfc3339(begin)} to {rfc3339(end)}: "
            "--from must be before --to.",
        )  # fmt: skip
    about = {"gateway": gateway, "since": begin, "until": end}
    words = orjson.dumps(about, option=orjson.OPT_SORT_KEYS).decode()
    if kept.begin(words, known_until=known_until):
        say(f"Going on with {rfc3339(begin)} to {rfc3339(end)} where it stopped.")
    return begin, end


def _stat(path: Path) -> os.stat_result:
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno())
    except OSError as error:
        raise ExportRefused(f"{path}: {error}") from error


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = orjson.loads(text or "")
    except orjson.JSONDecodeError:
        return {}  # the last run was of a file
    return value if isinstance(value, dict) else {}


async def _known_until(config: Config, since: int, until: int) -> int:
    """How far the database goes, where the journal has more than it: what came later is in neither
    of the two sides that are compared. A server's database is a moment behind, as a rule."""
    mark = _mark(config)
    if mark.t >= until:
        return until
    last = inspect.journal(config.storage.journal, mark.lsn).trail.end.lsn
    for _ in range(_LOOKS):
        if mark.lsn >= last:
            break
        await asyncio.sleep(_LOOK_S)
        mark = _mark(config)
    if (behind := last - mark.lsn) <= 0:
        return until
    say(f"The database is {behind:,} records behind: compared up to {rfc3339(mark.t)}.")
    if mark.t <= since:
        raise _Stop(DIFFERS, "Nothing is there yet: start the server, or run it again in a minute.")
    return mark.t


def _mark(config: Config) -> Mark:
    with inspect.tables(config.storage.path) as tables:
        return tables.mark


async def _fetch(
    args: argparse.Namespace,
    api: Api,
    gateway: str,
    kept: Book,
    since: int,
    until: int,
    now_ms: int,
) -> Fetched:
    with _progress(not args.json) as progress:
        return await fetch(
            api,
            gateway,
            kept,
            since - MARGIN_MS,
            until + MARGIN_MS,
            now_ms=lambda: now_ms,
            progress=progress,
        )


def _names(config: Config) -> dict[str, str]:
    """The gateway's name of each configured provider, and ours."""
    names: dict[str, str] = {}
    for provider in config.providers.values():
        prefix = provider.prefix or CATALOGUE.get(provider.name, provider.name)
        names.setdefault(prefix, provider.name)
    return names


def _price(config: Config) -> Price:
    overrides = {name: price.row() for name, price in config.prices.models.items()}
    prices = PriceBook(assets.prices(), overrides)
    providers = build_routes(config, prices).providers

    def price(ours: Ours, tokens_in: int, tokens_out: int) -> int | None:
        if ours.rates is not None:
            return nanos_from_picos(tokens_in * ours.rates[0] + tokens_out * ours.rates[3])
        known = providers.get(ours.provider)
        slug = known.prices if known else CATALOGUE.get(ours.provider, ours.provider)
        rate = prices.rate(slug, ours.model, ours.t / 1000)
        return None if rate is None else rate.cost(Usage(input=tokens_in, output=tokens_out))

    return price


# -- the lines for whoever looks into them ---------------------------------------------------------

_COLUMNS: Final = (
    *("kind", "why", "request_id", "attempt", "created_at", "provider", "model", "outcome"),
    *("ours_in", "ours_out", "ours_usd", "log_id", "theirs_in", "theirs_out", "theirs_usd"),
    "correct_to_usd",
)


@contextmanager
def _csv(path: Path | None, every: bool) -> Iterator[Sink]:
    if path is None:
        yield nowhere
        return
    try:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(_COLUMNS)

            def sink(ours: Ours | None, theirs: Theirs | None, finding: Finding) -> None:
                if every or finding.kind not in AGREED or finding.real_cost is not None:
                    writer.writerow(_cells(ours, theirs, finding))

            yield sink
    except OSError as error:
        raise _Stop(DIFFERS, f"{path}: {error.strerror}") from error


def _cells(ours: Ours | None, theirs: Theirs | None, finding: Finding) -> list[object]:
    real = finding.real_cost
    head: list[object] = [finding.kind.value, finding.why]
    if ours is not None:
        head += [ours.request_id, ours.attempt or None, rfc3339(ours.t), ours.provider, ours.model]
        head += [ours.outcome, ours.input, ours.output, format_usd(ours.cost)]
    elif theirs is not None:
        head += [theirs.request_id, theirs.attempt, rfc3339(theirs.t), theirs.provider]
        head += [theirs.model, None, None, None, None]
    if theirs is not None:
        cost = None if theirs.cost is None else format_usd(theirs.cost)
        head += [_plain(theirs.id), theirs.input, theirs.output, cost]
    else:
        head += [None] * 4
    head.append(None if real is None else format_usd(real))
    return [_plain(cell) if isinstance(cell, str) else cell for cell in head]


def _plain(text: str) -> str:
    """A spreadsheet takes what begins like this for a formula, and some of it is others' words."""
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t", "\r") else text


# -- telling ---------------------------------------------------------------------------------------


@contextmanager
def _progress(wanted: bool) -> Iterator[Progress]:
    """A bar for who looks on."""
    shown = wanted and sys.stderr.isatty()

    def show(done: int, expected: int) -> None:
        if shown:
            part = min(1.0, done / expected) if expected else 1.0
            bar = "#" * round(part * 30)
            print(f"\r[{bar:<30}] {done:,} logs", end="", file=sys.stderr, flush=True)

    yield show
    if shown:
        print(file=sys.stderr)


def _tell(args: argparse.Namespace, summary: Summary) -> None:
    if args.json:
        print_json(summary.row() | {"agrees": summary.agrees})
        return
    print(f"{rfc3339(summary.since)} to {rfc3339(summary.until)}\n")
    rows = [
        {
            "lines": WORDS[kind],
            "count": line.count,
            "ours": _usd(line.ours),
            "theirs": _usd(line.theirs),
            "difference": _signed(line.drift),
        }
        for kind in Kind
        if (line := summary.kinds.get(kind)) is not None
    ]
    print("\n".join(table(rows)) or "Neither side has anything there.")
    apart = {name: drift for name, drift in summary.drift.items() if drift}
    if apart:
        print("\nTheirs less ours, by provider:")
        for name, drift in sorted(apart.items()):
            print(f"  {name or '-':<20}  {_signed(drift)}")
    print()
    for words in _notes(args, summary):
        print(words)


def _notes(args: argparse.Namespace, summary: Summary) -> Iterator[str]:
    kinds, fetched = summary.kinds, summary.fetched
    if summary.oldest is None:
        yield (
            "The gateway's log is empty. Turn it on: gwproxy cloudflare gateways update ID "
            "--collect-logs on"
        )
    elif Kind.OURS_ONLY in kinds and not summary.log_is_whole:
        yield (
            "The log has holes, so what it does not have is left as it is. It may be full, or off "
            "for a while: gwproxy doctor"
        )
    if Kind.TOO_OLD in kinds and summary.oldest is not None:
        begins = rfc3339(summary.oldest)
        yield f"The log goes back to {begins}: reconcile more often than it forgets."
    if Kind.THEIRS_ONLY in kinds and kinds[Kind.THEIRS_ONLY].count > summary.again:
        yield (
            "Theirs only: somebody uses the gateway beside gwproxy, or the ledger was restored "
            "from a backup."
        )
    if summary.again:
        yield (
            f"{_count(summary.again, 'second record')} of attempts of ours, billed too: the "
            "gateway tries by itself, or its log repeats. See --csv FILE, and turn its retries "
            "off: gwproxy cloudflare gateways update ID --retries 1"
        )
    if Kind.PRICE_DIFFERS in kinds:
        yield (
            "Prices differ: compare with the provider's page; set ours in [prices.models], or "
            "theirs in the gateway's settings."
        )
    if fetched.missing:
        yield f"The log held {_count(fetched.missing, 'row')} back: run it again."
    if fetched.unreadable:
        yield f"{_count(fetched.unreadable, 'row')} of the log could not be read."
    if summary.late:
        yield f"{_count(summary.late, 'row')} without figures yet: run it again in some minutes."
    if summary.hidden.count:
        yield (
            f"The log leaves reasoning out, which the provider bills: of "
            f"{_count(summary.hidden.count, 'equal line')} ours stands "
            f"({_signed(summary.hidden.drift)})."
        )
    if Kind.NO_USAGE in kinds:
        yield "No usage upstream: the log has no tokens there, so that what we counted stands."
    differing = sum(line.count for kind, line in kinds.items() if kind not in AGREED)
    if differing and args.csv is None:
        yield "The lines themselves: --csv FILE"
    if args.csv is not None:
        yield f"The lines are in {args.csv}."
    if summary.corrections and not args.apply:
        one = summary.corrections == 1
        yield (
            f"{_count(summary.corrections, 'request')} {'was' if one else 'were'} charged an "
            f"estimate and can get {'its' if one else 'their'} real cost "
            f"({_signed(summary.delta)}): --apply"
        )
    if summary.agrees:
        if summary.hidden.count or not kinds.keys() <= AGREED:
            yield "Nothing is left to look into: what differs is explained above."
        elif summary.drifts:
            yield (
                "Nothing is left to look into: sums differ by lines that are not settled yet, or "
                "where the log's estimate of a cost is not ours."
            )
        else:
            yield "Both sides agree."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _usd(amount: int) -> str:
    return f"${format_usd(amount)[:-3]}"


def _signed(amount: int) -> str:
    sign = "-" if amount < 0 else "+" if amount > 0 else ""
    return f"{sign}${format_usd(abs(amount))[:-3]}"


# -- applying --------------------------------------------------------------------------------------


async def _apply(args: argparse.Namespace, call: Call) -> int:
    """Send the corrections to the ledger's owner, some at a time."""
    config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
    results: dict[str, int] = {}
    after = ""
    with book(beside(config.storage.path)) as kept:
        while wanted := kept.corrections(after, MOST):
            after = wanted[-1].request_id
            body = [
                {
                    "request_id": one.request_id,
                    "charged_usd": format_usd(one.charged),
                    "cost_usd": format_usd(one.cost),
                    "reason": one.reason,
                }
                for one in wanted
            ]
            answer = await call(Ask("POST", ("reconcile",), orjson.dumps({"corrections": body})))
            for row in answer["data"]:
                results[row["result"]] = results.get(row["result"], 0) + 1
    return _applied(args, results)


_RESULTS: Final[Mapping[str, str]] = {
    "applied": "corrected",
    "already": "corrected before",
    "changed": "changed since then: run it again",
    "unknown": "not in the ledger any more",
}


def _applied(args: argparse.Namespace, results: Mapping[str, int]) -> int:
    say("; ".join(f"{count:,} {_RESULTS[name]}" for name, count in sorted(results.items())) + ".")
    say("Prove it: gwproxy ledger verify")
    return FINE if results.keys() <= {"applied", "already"} else DIFFERS
