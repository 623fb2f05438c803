"""The gateway's log, brought in: span by span over its API, or from an exported file.

Rows come late, twice, in any order and while others are being added or deleted: what a span has is
counted, and what may still get its figures is asked for once more.
"""

import asyncio
import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Final, cast

import orjson

from gwproxy.cloudflare.api import Answer, Api, Sleep
from gwproxy.core.reconcile import SETTLES_WITHIN_MS, Theirs
from gwproxy.storage.reconcile import Book

PER_PAGE: Final = 50
"""So many rows are asked for; how many a page has is the API's to say."""
SPAN_ROWS: Final = 2_500
"""A span with more is halved: fifty pages are soon read again, and few rows shift under way."""
_SHORTEST_SPAN_MS: Final = 1_000
_READS: Final = 4
"""How often a span is read at the most while its rows shift from page to page."""
_LATE_WITHIN_S: Final = 6.0
_LATE_LOOK_S: Final = 0.5
_MOST_LATE: Final = 500
_EXPORT_ROWS: Final = 1_000
_MOST_TOKENS: Final = 1 << 40
_LAST_MS: Final = 253_402_300_800_000
"""The year 10000: no later moment can be written."""

Progress = Callable[[int, int], None]
"""(rows so far, rows expected)."""


class ExportRefused(Exception):
    """An exported file that cannot be read; the words say where and why."""


@dataclass(slots=True)
class Fetched:
    """What was odd about the log."""

    repeated: int = 0
    unreadable: int = 0
    missing: int = 0
    """Rows that the API counted and never gave."""
    late: dict[str, int] = field(default_factory=dict)
    """Rows whose figures were not there yet, and their times."""


async def oldest(api: Api, gateway: str) -> int | None:
    """The time of the first row that the log still has; None: it is empty."""
    answer = await api.logs(gateway, per_page=1)
    rows = [row for row in map(read, _rows(answer)) if row is not None]
    return rows[0].t if rows else None


async def fetch(
    api: Api,
    gateway: str,
    book: Book,
    since: int,
    until: int,
    *,
    now_ms: Callable[[], int],
    progress: Progress,
    sleep: Sleep = asyncio.sleep,
) -> Fetched:
    """Bring what the book does not have yet of a span. Each part is kept as soon as it is whole."""
    fetched = Fetched()
    spans = book.gaps(since, until)[::-1]
    expected = 0
    while spans:
        start, end = spans.pop()
        first = await api.logs(gateway, _between(start, end), per_page=PER_PAGE)
        expected = max(expected, book.count_theirs() + (first.total or 0))
        rows = None
        if (first.total or 0) <= SPAN_ROWS or end - start <= _SHORTEST_SPAN_MS:
            rows = await _span(api, gateway, start, end, first, fetched)
        if rows is None:
            middle = (start + end) // 2
            spans += [(middle, end), (start, middle)]
            continue
        fetched.late |= _late(rows.values(), now_ms())
        # What is still to come is not there, however often it was asked for.
        whole = start, min(end, now_ms())
        book.put(rows.values(), whole if whole[0] < whole[1] else None)
        progress(book.count_theirs(), expected)
    await _wait_for_late(api, gateway, book, fetched, sleep)
    return fetched


async def _span(
    api: Api, gateway: str, start: int, end: int, first: Answer, fetched: Fetched
) -> dict[str, Theirs] | None:
    """All rows of a span by their ids; None: there are too many to be read at once.

    Rows that come or go under way push others onto another page, which may then be missed or seen
    twice: a span is read until its count has stood still and nothing is lacking.
    """
    rows: dict[str, Theirs] = {}
    answer = first
    for number in range(_READS):
        if number:
            answer = await api.logs(gateway, _between(start, end), per_page=PER_PAGE)
        known, still, total = len(rows), True, answer.total
        page, received, unreadable = 1, 0, 0
        seen: set[str] = set()
        while more := _rows(answer):
            received += len(more)
            before = len(seen)
            for row in map(read, more):
                if row is None:
                    unreadable += 1
                else:
                    rows[row.id] = row
                    seen.add(row.id)
            if received >= total if total is not None else len(seen) == before:
                break  # all that were counted; or nobody counts, and the same page came again
            if len(rows) > 2 * SPAN_ROWS and end - start > _SHORTEST_SPAN_MS:
                return None
            page += 1
            answer = await api.logs(gateway, _between(start, end), page=page, per_page=PER_PAGE)
            still = still and answer.total == total
            total = answer.total
        whole = len(rows) + unreadable >= (total or 0)
        if still and (whole or (number and len(rows) == known)):
            break
    fetched.unreadable += unreadable
    if not whole:
        # Twice the same: the log itself repeats rows, or keeps some back.
        fetched.repeated += max(0, received - unreadable - len(rows))
        fetched.missing += max(0, (total or 0) - received)
    return rows


async def _wait_for_late(
    api: Api, gateway: str, book: Book, fetched: Fetched, sleep: Sleep
) -> None:
    waiting = [*islice(fetched.late, _MOST_LATE)]
    left_s = _LATE_WITHIN_S
    while waiting and left_s > 0:
        await sleep(_LATE_LOOK_S)
        left_s -= _LATE_LOOK_S
        for log_id in list(waiting):
            row = read(await api.log(gateway, log_id) or {})
            if row is not None and (row.cost is not None or row.has_usage):
                book.put([row])
                waiting.remove(log_id)
                del fetched.late[log_id]


def _late(rows: Iterable[Theirs], now_ms: int) -> dict[str, int]:
    return {
        row.id: row.t
        for row in rows
        if now_ms - row.t < SETTLES_WITHIN_MS + (row.duration_ms or 0)
        if row.success and not row.cached and row.cost is None and not row.has_usage
    }


def _between(start: int, end: int) -> list[dict[str, Any]]:
    """From `start` on, before `end`."""
    return [
        {"key": "created_at", "operator": "gt", "value": [_time(start - 1)]},
        {"key": "created_at", "operator": "lt", "value": [_time(end)]},
    ]


def _time(at_ms: int) -> str:
    moment = datetime.fromtimestamp(at_ms // 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at_ms % 1000:03d}Z"


def _rows(answer: Answer) -> list[dict[str, Any]]:
    found = answer.result if isinstance(answer.result, list) else []
    return [row for row in found if isinstance(row, dict)]


# -- one row ---------------------------------------------------------------------------------------


def read(row: Mapping[str, Any]) -> Theirs | None:
    """A row in the API's words or in an export's; None where it has no name or no time."""
    log_id, made = _first(row, "id", "log_id"), _first(row, "created_at", "timestamp")
    at_ms = _milliseconds(made)
    if not isinstance(log_id, str) or not log_id or at_ms is None:
        return None
    about = _metadata(row.get("metadata"))
    status = _whole(_first(row, "status_code", "status"))
    success = row.get("success")
    request_id = about.get("request_id")
    return Theirs(
        log_id,
        at_ms,
        str(row.get("provider") or ""),
        str(row.get("model") or ""),
        _flag(success) if success is not None else status is not None and 200 <= status < 300,
        _flag(row.get("cached")),
        status,
        _whole(_first(row, "tokens_in", "request_tokens")),
        _whole(_first(row, "tokens_out", "response_tokens")),
        _nanos(_first(row, "cost", "cost_usd")),
        request_id if isinstance(request_id, str) and request_id else None,
        _whole(about.get("attempt")),
        _whole(row.get("duration")),
    )


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _metadata(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return {}
    return value if isinstance(value, dict) else {}


def _milliseconds(value: Any) -> int | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if 0 <= value < _LAST_MS else None
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1000 + moment.microsecond // 1000


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            value = float(value) if value else None
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Not a number, or one that no counter reaches.
    return int(value) if 0 <= value < _MOST_TOKENS else None


def _nanos(value: Any) -> int | None:
    """USD as they wrote it: the shortest words of a float are what was meant."""
    if value is None or isinstance(value, bool):
        return None
    try:
        usd = Decimal(str(value))
    except InvalidOperation:
        return None
    if not usd.is_finite() or not 0 <= usd < 10**9:
        return None
    return int((usd * 10**9).to_integral_value())


def _flag(value: Any) -> bool:
    return value.lower() in ("true", "1") if isinstance(value, str) else bool(value)


# -- an exported file ------------------------------------------------------------------------------


def bring(path: Path, book: Book, fetched: Fetched) -> tuple[int, int]:
    """All rows of an export into the book; the times of the first and the last."""
    first, last, count = 1 << 62, 0, 0
    rows = export(path)
    before = book.count_theirs()
    while batch := list(islice(rows, _EXPORT_ROWS)):
        found = [row for row in map(read, batch) if row is not None]
        fetched.unreadable += len(batch) - len(found)
        count += len(found)
        book.put(found)
        if found:
            first = min(first, *(row.t for row in found))
            last = max(last, *(row.t for row in found))
    if not count:
        raise ExportRefused(
            f"{path} has no row with an id and a time: export the gateway's log as JSON lines or "
            "CSV, with its id, created_at, provider, model, tokens_in, tokens_out, cost, metadata."
        )
    fetched.repeated += count - (book.count_theirs() - before)
    return first, last


def export(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file: JSON lines, a JSON list or answer of the API, CSV; gzipped or not."""
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as opened:
            yield from _parsed(path, cast("IO[bytes]", opened))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ExportRefused(f"{path}: the gzip file is damaged or cut off: {error}") from error
    except csv.Error as error:
        raise ExportRefused(
            f"{path} is neither JSON nor CSV ({error}): export the gateway's log as one of them."
        ) from error
    except OSError as error:
        raise ExportRefused(f"{path}: {error}") from error


def _parsed(path: Path, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    start = stream.readline()
    if start.lstrip()[:1] == b"{" and (row := _json(start)) is not None and "result" not in row:
        for number, line in enumerate(chain([start], stream), 1):
            if not line.strip():
                continue
            row = _json(line)
            if row is None:
                raise ExportRefused(f"{path}: line {number} is no JSON object")
            yield row
    elif start.lstrip()[:1] in (b"{", b"["):
        # One document: it is read whole, and an API's page or a day's log is not large.
        try:
            value = orjson.loads(start + stream.read())
        except orjson.JSONDecodeError as error:
            raise ExportRefused(f"{path}: {error}") from error
        found = value.get("result") if isinstance(value, dict) else value
        if not isinstance(found, list):
            raise ExportRefused(f"{path}: there is no list of rows, bare or as `result`, in it")
        yield from (row for row in found if isinstance(row, dict))
    else:
        names = next(csv.reader([start.decode("utf-8-sig", "replace")]), [])
        text = (line.decode(errors="replace") for line in stream)
        yield from csv.DictReader(text, [name.strip() for name in names])


def _json(line: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
