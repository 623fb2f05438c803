"""The archive and the tables: a closed month read out of them, page by page, and what is removed
from them once it stands in a file: row by row what is there, and nothing else.

No commit waits for any of it for more than some milliseconds.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from gwproxy.core.ledger import Key
from gwproxy.core.period import DAY_MS, end_ms, start_ms
from gwproxy.storage import archive_file as file
from gwproxy.storage.archive_file import (
    Archived,
    BalanceLine,
    End,
    EntryLine,
    Head,
    RequestLine,
    Row,
)
from gwproxy.storage.database import assert_in_transaction
from gwproxy.storage.files import Files
from gwproxy.storage.ledger import Tables, mark_of

PAGE_LSNS: Final = 2000
"""Looked at in one go by the one connection: some milliseconds, in which no commit is made."""

PAGE_ROWS: Final = 500


# -- making one ------------------------------------------------------------------------------------


async def make(
    files: Files, folder: Path, tables: Tables, month: str, pause: Callable[[], Awaitable[None]]
) -> Archived | None:
    """Write what the tables have of `month`; None: nothing. Nobody may still hold anything in it.

    ArchiveRefused where the file does not add up, as when an adjustment came in between.
    """
    found = await tables.run(partial(_begin, month=month))
    if found is None:
        return None
    head = found
    out = await asyncio.to_thread(file.Writing, files, folder / file.UNFINISHED, head)
    try:
        entries = requests = balances = 0
        after = 0
        while True:
            page = await tables.run(partial(_entries, month=month, after=after, last=head.lsn))
            if page is None:
                break
            after, rows = page
            entries += len(rows)
            await asyncio.to_thread(out.add, rows, file.entry_line)
            await pause()
        place: tuple[int, int] | None = (0, 0)
        while place is not None:
            place, found_rows = await tables.run(partial(_requests, month=month, after=place))
            requests += len(found_rows)
            await asyncio.to_thread(out.add, found_rows, file.request_line)
            await pause()
        key: Key | None = ("", "")
        while key is not None:
            key, sums = await tables.run(partial(balances_of, month=month, after=key))
            balances += len(sums)
            await asyncio.to_thread(out.add, sums, file.encode)
        end = End(entries=entries, requests=requests, balances=balances)
        path = folder / f"{month}-{head.lsn}.ndjson.gz"
        return await asyncio.to_thread(file.finish, out, path, end)
    finally:
        out.close()


def _begin(connection: sqlite3.Connection, month: str) -> Head | None:
    last = connection.execute(
        "SELECT account, period FROM balance WHERE period >= ? AND period < ?"
        " ORDER BY period DESC, account DESC LIMIT 1",
        _range(month),
    ).fetchone()
    if last is None:
        return None
    mark = mark_of(connection)
    return Head(
        version=file.VERSION,
        ledger_id=mark.ledger_id or "",
        month=month,
        lsn=mark.lsn,
        t=mark.t,
        last=(last[0], last[1]),
    )


_ARCHIVED: Final = """EXISTS (
    SELECT 1 FROM closed WHERE closed.account = line.account
        AND closed.period = line.period AND closed.lsn > line.lsn)"""


def _entries(
    connection: sqlite3.Connection, month: str, after: int, last: int
) -> tuple[int, list[Any]] | None:
    """Of the next records that have lines: the last, and those of their lines that belong here."""
    [upto] = connection.execute(
        "SELECT max(lsn) FROM (SELECT lsn FROM entry WHERE lsn > ? AND lsn <= ?"
        " ORDER BY lsn LIMIT ?)",
        (after, last, PAGE_LSNS),
    ).fetchone()
    if upto is None:
        return None
    rows = connection.execute(
        "SELECT lsn, account, period, type, amount, reservation, t, actor, reason"
        " FROM entry AS line WHERE lsn > ? AND lsn <= ? AND period >= ? AND period < ?"
        f" AND NOT {_ARCHIVED} ORDER BY lsn, account, period, type",
        (after, upto, *_range(month)),
    ).fetchall()
    return upto, rows


def _requests(
    connection: sqlite3.Connection, month: str, after: tuple[int, int]
) -> tuple[tuple[int, int] | None, list[Any]]:
    """The next requests that were admitted in the month, and the place after them."""
    rows = connection.execute(
        "SELECT * FROM request WHERE t >= ? AND t < ? AND (t, lsn) > (?, ?) AND period = ?"
        " AND NOT EXISTS (SELECT 1 FROM closed WHERE closed.account = 'org:' || org_id"
        " AND closed.period = request.period) ORDER BY t, lsn LIMIT ?",
        # A request whose month ended while it was let in has a time of the next one.
        # Its place bounds the time once more, or each page would pass over all those before it.
        (max(after[0], start_ms(month) - DAY_MS), end_ms(month) + DAY_MS, *after, month, PAGE_ROWS),
    ).fetchall()
    return ((rows[-1]["t"], rows[-1]["lsn"]) if len(rows) == PAGE_ROWS else None), rows


def balances_of(
    connection: sqlite3.Connection, month: str, after: Key
) -> tuple[Key | None, list[BalanceLine]]:
    """The next balances of a month and its days, after (period, account), and the place after."""
    rows = connection.execute(
        "SELECT account, period, spent, credited, count FROM balance"
        " WHERE (period, account) > (?, ?) AND period >= ? AND period < ?"
        " ORDER BY period, account LIMIT ?",
        (*after, *_range(month), PAGE_ROWS),
    ).fetchall()
    lines = [BalanceLine(*row) for row in rows]
    return ((lines[-1].period, lines[-1].account) if len(rows) == PAGE_ROWS else None), lines


def _range(month: str) -> tuple[str, str]:
    """A month and its days: "2026-09" <= period < "2026-09."."""
    return month, f"{month}."


# -- out of the tables -----------------------------------------------------------------------------


def closed_with(connection: sqlite3.Connection, head: Head) -> str | None:
    """The hash of the file that the last of its accounts was closed with; None: not yet."""
    row = connection.execute(
        "SELECT hash FROM closed WHERE account = ? AND period = ? AND lsn > ? ORDER BY lsn LIMIT 1",
        (*head.last, head.lsn),
    ).fetchone()
    return None if row is None else str(row[0])


def is_named(connection: sqlite3.Connection, hash: str) -> bool:
    """Whether any account was closed with this file."""
    row = connection.execute("SELECT 1 FROM closed WHERE hash = ? LIMIT 1", (hash,)).fetchone()
    return row is not None


def stands(connection: sqlite3.Connection, row: Row) -> bool:
    """Whether a row of a file is in the tables too."""
    if isinstance(row, RequestLine):
        found = connection.execute(
            "SELECT 1 FROM request WHERE lsn = ? AND id = ?", (row.lsn, row.id)
        )
    else:
        found = connection.execute(
            "SELECT 1 FROM entry WHERE lsn = ? AND account = ? AND period = ? AND type = ?",
            (row.lsn, row.account, row.period, row.type),
        )
    return found.fetchone() is not None


def erase(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Remove them, within a transaction. Of those that are gone already nothing is said."""
    entries = [(r.lsn, r.account, r.period, r.type) for r in rows if isinstance(r, EntryLine)]
    requests = [(r.lsn, r.id) for r in rows if isinstance(r, RequestLine)]
    assert_in_transaction(connection)
    connection.executemany(
        "DELETE FROM entry WHERE lsn = ? AND account = ? AND period = ? AND type = ?", entries
    )
    assert_in_transaction(connection)
    connection.executemany("DELETE FROM request WHERE lsn = ? AND id = ?", requests)


def oldest_month(connection: sqlite3.Connection) -> str | None:
    """The first month of which the tables have a balance."""
    [period] = connection.execute("SELECT min(period) FROM balance").fetchone()
    return None if period is None else str(period)[:7]


def named(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """The files that accounts were closed with, and the month of each."""
    return [
        (row[0], row[1])
        for row in connection.execute(
            "SELECT hash, substr(min(period), 1, 7) FROM closed GROUP BY hash"
        )
    ]


def faults(connection: sqlite3.Connection, found: Archived) -> list[str]:
    """Where a file is not what its accounts were closed with."""
    return [*_differences(connection, found)]


def _differences(connection: sqlite3.Connection, found: Archived) -> Iterator[str]:
    if not is_named(connection, found.hash):
        if closed_with(connection, found.head) is not None:
            yield f"{found.path}: its accounts were closed with another file"
        return
    for line in found.balances:
        closed = connection.execute(
            "SELECT spent, credited, count, lsn FROM closed"
            " WHERE account = ? AND period = ? AND hash = ? ORDER BY lsn LIMIT 1",
            (*line.key, found.hash),
        ).fetchone()
        spent, credited = line.spent, line.credited
        if closed is None or tuple(closed[:3]) == (spent, credited, line.count):
            continue
        # Lines that came too late for the file stand in the tables.
        late = connection.execute(
            "SELECT coalesce(sum(iif(type = 'grant', 0, amount)), 0),"
            " coalesce(sum(iif(type = 'grant', amount, 0)), 0) FROM entry"
            " WHERE lsn > ? AND lsn < ? AND account = ? AND period = ?",
            (found.head.lsn, closed[3], *line.key),
        ).fetchone()
        figures = (spent + late[0], credited + late[1], line.count)
        if tuple(closed[:3]) != figures:
            yield (
                f"{found.path}: {line.account} {line.period} has {figures} (spent, granted,"
                f" requests), and was closed with {tuple(closed[:3])}"
            )
