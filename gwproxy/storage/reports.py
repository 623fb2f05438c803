"""What is read from the database about requests: rows as values, and nothing decided."""

import asyncio
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import orjson

from gwproxy.core.ledger import Request
from gwproxy.core.records import Alert, Tried
from gwproxy.storage.database import Database, Reader
from gwproxy.storage.usage import SUMS

_read_attempts: Final = msgspec.json.Decoder(tuple[Tried, ...]).decode
_read_edits: Final = msgspec.json.Decoder(tuple[str, ...]).decode
_read_rates: Final = msgspec.json.Decoder(tuple[int, int, int, int]).decode


async def find_request(database: Database, request_id: str) -> Request | None:
    """One request by its id; StorageUnavailable when the database cannot be read."""
    async with database.reader() as reader:
        rows = await reader.read("SELECT * FROM request WHERE id = ?", (request_id,))
    return _request(dict(rows[0])) if rows else None


@dataclass(frozen=True, slots=True)
class Corrected:
    """A correction of a request: when, by how much, and why."""

    t: int
    amount: int
    reason: str


async def corrections(database: Database, lsn: int) -> list[Corrected]:
    """Those of the request at `lsn`, the oldest first; StorageUnavailable."""
    async with database.reader() as reader:
        rows = await reader.read(
            "SELECT entry.t, amount, reason FROM entry JOIN request ON request.lsn = reservation"
            " WHERE type = 'reconcile' AND reservation = ? AND account = 'key:' || key_id"
            " ORDER BY entry.lsn",
            (lsn,),
        )
    return [Corrected(row["t"], row["amount"], row["reason"]) for row in rows]


# -- what was charged ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Charged:
    """A settled request as it stands with its corrections: `cost` has them in it."""

    lsn: int
    t: int
    period: str
    id: str
    key_id: str
    user_id: str
    org_id: str
    provider: str
    cost: int
    corrections: int


async def charged(database: Database, request_ids: Sequence[str]) -> dict[str, Charged]:
    """The settled ones of these requests, by their ids; none of a month that was closed."""
    async with database.reader() as reader:
        rows = await reader.read(_CHARGED, (orjson.dumps(list(request_ids)).decode(),))
    return {row["id"]: Charged(**dict(row)) for row in rows}


_CHARGED: Final = """
    SELECT request.lsn, request.t, request.period, id, key_id, user_id, org_id, provider,
        cost + coalesce(sum(amount), 0) AS cost, count(amount) AS corrections
    FROM request LEFT JOIN entry ON type = 'reconcile' AND reservation = request.lsn
        AND account = 'key:' || key_id
    WHERE id IN (SELECT value FROM json_each(?)) AND settled_at IS NOT NULL AND outcome <> 'void'
        AND NOT EXISTS (
            SELECT 1 FROM closed
            WHERE closed.account = 'key:' || key_id AND closed.period = request.period)
    GROUP BY request.lsn"""


# -- what was used -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """Whose use is added up: the days from the first to the last one, both included, counted from
    1970-01-01; of everybody and everything where nothing else is said."""

    first_day: int
    last_day: int
    org_id: str | None = None
    user_id: str | None = None
    provider: str | None = None
    model: str | None = None

    @property
    def grain(self) -> int:
        """The coarsest sums that still tell what was chosen from the rest."""
        return 2 if self.user_id is not None else 1 if self.org_id is not None else 0

    def where(self, grain: int) -> tuple[str, list[Any]]:
        owned, values = self.owned(grain)
        conditions = [owned, "day BETWEEN ? AND ?"]
        values += (self.first_day, self.last_day)
        for name in ("provider", "model"):
            if (value := getattr(self, name)) is not None:
                conditions.append(f"{name} = ?")
                values.append(value)
        return " AND ".join(conditions), values

    def owned(self, grain: int) -> tuple[str, list[Any]]:
        """The same of every day and every model."""
        conditions = [f"grain = {grain}"]
        values: list[Any] = []
        for name in _OWNERS:
            if (value := getattr(self, name)) is not None:
                conditions.append(f"{name} = ?")
                values.append(value)
        return " AND ".join(conditions), values


GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "provider": ("provider",),
    "model": ("provider", "model"),
    "day": ("day",),
    "org": ("org_id",),
    "user": ("org_id", "user_id"),
    "line": ("org_id", "user_id", "provider", "model"),
}
"""The columns that each grouping goes by. A model's name means something at its provider only."""

_GRAINS: Final = {"org": 1, "user": 2, "line": 2}
_SUMMED: Final = ", ".join(f"sum({name}) AS {name}" for name in SUMS)
_OWNERS: Final = ("org_id", "user_id")

_ADDED_UP: Final = 20_000
"""Rows of sums that one page reads, of any day, and what is left of the last one's owner: some
tens of milliseconds, however many users there are and however long they have been here."""


async def usage(
    reader: Reader, chosen: Chosen, group_by: str, after: Sequence[Any], most: int
) -> tuple[list[sqlite3.Row], list[Any] | None]:
    """The sums of each group after the key `after`, in the order of their keys, and the key to go
    on after: None at the end. There may be fewer than `most`, even none, though there are more to
    come. Of lines there are all that their users have: their key is the user's."""
    columns = GROUPS[group_by]
    names = ", ".join(columns)
    grain = max(chosen.grain, _GRAINS.get(group_by, 0))
    where, values = chosen.where(grain)
    key = [name for name in columns if name in _OWNERS] or [*columns]
    # One that all rows have alike leads nowhere: without it an index finds the place to begin at.
    walked = [name for name in key if getattr(chosen, name, None) is None]
    order, marks = ", ".join(walked), ", ".join("?" * len(walked))
    begin, so_far = "", []
    if walked and after:
        begin = f" AND ({order}) > ({marks})"
        so_far = [value for name, value in zip(key, after, strict=True) if name in walked]
    where, values = where + begin, [*values, *so_far]
    last: list[Any] | None = None
    if walked and group_by in _GRAINS:
        owned, owners = chosen.owned(grain)
        found = await reader.read(
            f"SELECT {order} FROM usage WHERE {owned}{begin} ORDER BY {order} LIMIT 1 OFFSET ?",
            (*owners, *so_far, _ADDED_UP - 1),
        )
        if found:
            where += f" AND ({order}) <= ({marks})"
            values += found[0]
            known = dict(zip(walked, found[0], strict=True))
            last = [known.get(name) or getattr(chosen, name) for name in key]
    limit = "" if group_by == "line" else f" LIMIT {most + 1}"
    rows = await reader.read(
        f"SELECT {names}, {_SUMMED} FROM usage WHERE {where}"
        f" GROUP BY {names} ORDER BY {names}{limit}",
        values,
    )
    if limit and len(rows) > most:
        rows = rows[:most]
        last = [rows[-1][name] for name in key]
    return rows, last


async def used(reader: Reader, chosen: Chosen) -> sqlite3.Row:
    """The sums over all that was chosen: NULL where there is nothing."""
    where, values = chosen.where(chosen.grain)
    return (await reader.read(f"SELECT {_SUMMED} FROM usage WHERE {where}", values))[0]


async def attempted(reader: Reader, chosen: Chosen) -> dict[str, tuple[int, int, int]]:
    """(attempts, those that failed, milliseconds) by provider, over the days that were chosen."""
    rows = await reader.read(
        "SELECT provider, sum(attempts), sum(failed), sum(duration_ms) FROM attempted"
        " WHERE day BETWEEN ? AND ? GROUP BY provider",
        (chosen.first_day, chosen.last_day),
    )
    return {row[0]: (row[1], row[2], row[3]) for row in rows}


async def adjustments(
    reader: Reader, month: str, after: Sequence[Any], most: int
) -> list[sqlite3.Row]:
    """The lines of a month's accounts that no request made by itself, after the key `after`; a
    correction with the request that it is about."""
    return await reader.read(
        "SELECT lsn, account, type, amount, t, actor, reason,"
        " (SELECT id FROM request WHERE request.lsn = entry.reservation) AS request_id FROM entry"
        " WHERE period = ? AND type NOT IN ('settle', 'overrun')"
        " AND (lsn, account, type) > (?, ?, ?) ORDER BY lsn, account, type LIMIT ?",
        (month, *(after or (0, "", "")), most),
    )


# -- looking back at requests --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sought:
    """Which requests are looked for. Times are milliseconds since 1970; `until` is not included."""

    since: int = 0
    until: int = 1 << 62
    org_id: str | None = None
    user_id: str | None = None
    key_id: str | None = None
    provider: str | None = None
    model: str | None = None
    outcome: str | None = None

    def where(self) -> tuple["_Where", "_Where"]:
        """What an index finds, and what has to be looked at row by row: all but the condition that
        leaves the fewest rows. The sign keeps an index from being taken for another one."""
        indexed, other = _Where(), _Where()
        indexed.add("t >= ? AND t < ?", self.since, self.until)
        where = indexed
        for name in ("key_id", "user_id", "outcome", "org_id"):
            if (value := getattr(self, name)) is None:
                continue
            if value == "completed" and name == "outcome":
                other.add("outcome = 'completed'")
            elif where is other:
                other.add(f"+{name} = ?", value)
            else:
                where.add(f"{name} = ?", value)
                if name == "outcome":
                    where.add("outcome <> 'completed'")
                where = other
        if self.provider is not None:
            other.add("provider = ?", self.provider)
        if self.model is not None:
            other.add("upstream_model = ?", self.model)
        return indexed, other


class _Where:
    def __init__(self) -> None:
        self.conditions: list[str] = []
        self.values: list[Any] = []

    def add(self, condition: str, *values: Any) -> None:
        self.conditions.append(condition)
        self.values += values


_LOOKED_AT: Final = 5_000
"""Rows that one page looks at: some milliseconds, also where a filter that no index serves finds
nothing among them."""

_READ_AT_ONCE: Final = 100
"""Rows made into requests in one turn of the loop: about a millisecond."""

_NEWEST: Final = "ORDER BY t DESC, lsn DESC"


async def requests(
    reader: Reader, sought: Sought, before: int | None, most: int
) -> tuple[list[Request], int | None]:
    """The newest requests before the LSN `before`, newest first, and from where to go on: None at
    the end. There may be fewer than `most` though there are more to come."""
    where, other = sought.where()
    if before is not None:
        # Time goes the same way as the LSN, and is what the indexes are in the order of.
        where.add(
            "lsn < ? AND t <= (SELECT t FROM request WHERE lsn <= ? ORDER BY lsn DESC LIMIT 1)",
            before,
            before,
        )
    lowest: int | None = None
    if other.conditions:
        last = await reader.read(
            f"SELECT lsn FROM request WHERE {' AND '.join(where.conditions)} {_NEWEST}"
            " LIMIT 1 OFFSET ?",
            (*where.values, _LOOKED_AT - 1),
        )
        where.add(" AND ".join(other.conditions), *other.values)
        if last:
            lowest = last[0][0]
            where.add("lsn >= ?", lowest)
    rows = await reader.read(
        f"SELECT * FROM request WHERE {' AND '.join(where.conditions)} {_NEWEST} LIMIT ?",
        (*where.values, most + 1),
    )
    found: list[Request] = []
    for row in rows[:most]:
        if found and len(found) % _READ_AT_ONCE == 0:
            await asyncio.sleep(0)
        found.append(_request(dict(row)))
    return found, found[-1].lsn if len(rows) > most else lowest


def _request(row: dict[str, Any]) -> Request:
    return Request(
        lsn=row["lsn"],
        t=row["t"],
        id=row["id"],
        key_id=row["key_id"],
        user_id=row["user_id"],
        org_id=row["org_id"],
        model=row["model"],
        provider=row["provider"],
        upstream_model=row["upstream_model"],
        prices=row["prices"],
        held=row["held"],
        degraded=bool(row["degraded"]),
        stream=bool(row["stream"]),
        edits=_read_edits(row["edits"]) if row["edits"] else (),
        settled_at=row["settled_at"],
        outcome=row["outcome"],
        source=row["source"],
        cost=row["cost"],
        overrun=row["overrun"],
        tokens=(
            row["input_tokens"],
            row["cache_read_tokens"],
            row["cache_write_tokens"],
            row["output_tokens"],
            row["reasoning_tokens"],
        ),
        attempts=_read_attempts(row["attempts"]) if row["attempts"] else (),
        status=row["status"],
        log_id=row["log_id"],
        rates=_read_rates(row["rates"]) if row["rates"] else None,
    )


def settled(connection: sqlite3.Connection, month: str | None) -> Iterator[Request]:
    """The settled requests of a month, or all of them, in the order of their admission."""
    connection.row_factory = sqlite3.Row
    rows = connection.execute(
        "SELECT * FROM request WHERE settled_at IS NOT NULL AND (?1 IS NULL OR period = ?1)"
        " ORDER BY lsn",
        (month,),
    )
    for row in rows:
        yield _request(dict(row))


class AsCharged(msgspec.Struct, frozen=True):
    """A settled request with what reconciliation added to its cost, in nano-USD."""

    request: Request
    added: int

    @property
    def cost(self) -> int:
        return (self.request.cost or 0) + self.added

    @property
    def by_tokens(self) -> bool:
        """Whether its tokens at its model's price come to its cost: not of a hold, an estimate or
        a correction, and not where several attempts had a cost."""
        costly = sum(1 for tried in self.request.attempts if tried.cost)
        return not self.added and self.request.source != "estimated" and costly <= 1


def as_charged(connection: sqlite3.Connection, month: str | None) -> Iterator[AsCharged]:
    """The settled requests of a month, or all of them, as their accounts were charged."""
    corrected = dict(
        connection.execute(
            "SELECT reservation, sum(amount) FROM entry"
            " WHERE (?1 IS NULL OR period = ?1) AND type = 'reconcile' AND account LIKE 'key:%'"
            " GROUP BY 1",
            (month,),
        ).fetchall()
    )
    for request in settled(connection, month):
        yield AsCharged(request, corrected.get(request.lsn, 0))


def balances_at(
    connection: sqlite3.Connection, at_ms: int
) -> list[tuple[str, str, int, int, int, int]]:
    """(account, period, spent, credited, requests, held) as all accounts stood at a moment.

    Of the caller's own accounts; what a provider's or an outage's held then is not kept.
    """
    return connection.execute(_BALANCES_AT, {"at": at_ms}).fetchall()


def archived_within(connection: sqlite3.Connection, at_ms: int) -> list[str]:
    """The months that were under way at a moment and have left the tables since."""
    rows = connection.execute(
        f"SELECT DISTINCT substr(period, 1, 7) FROM closed WHERE {_ENDED_MS} > ?1"
        " AND 1000 * strftime('%s', substr(period, 1, 7) || '-01') <= ?1 ORDER BY 1",
        (at_ms,),
    )
    return [row[0] for row in rows]


_ENDED_MS: Final = """1000 * iif(length(period) = 7,
    strftime('%s', period || '-01', '+1 month'), strftime('%s', period, '+1 day'))"""

# Of what was archived there is what it came to in the end.
_BALANCES_AT: Final = f"""
    SELECT account, period, sum(spent), sum(credited), sum(count), sum(held) FROM (
        SELECT account, period,
            iif(type = 'grant', 0, amount) AS spent, iif(type = 'grant', amount, 0) AS credited,
            0 AS count, 0 AS held
        FROM entry AS line
        WHERE coalesce(t, (SELECT settled_at FROM request WHERE request.lsn = reservation)) <= :at
            AND NOT EXISTS (
                SELECT 1 FROM closed WHERE closed.account = line.account
                    AND closed.period = line.period AND closed.lsn > line.lsn)
        UNION ALL
        SELECT account, period, 0, 0, settled_at <= :at AND outcome <> 'void',
            iif(settled_at IS NULL OR settled_at > :at, held, 0)
        FROM (
            SELECT 'key:' || key_id AS account, period, t, settled_at, outcome, held FROM request
            UNION ALL
            SELECT 'user:' || user_id, period, t, settled_at, outcome, held FROM request
            UNION ALL
            SELECT 'org:' || org_id, period, t, settled_at, outcome, held FROM request
        ) AS found
        WHERE t <= :at AND NOT EXISTS (
            SELECT 1 FROM closed
            WHERE closed.account = found.account AND closed.period = found.period)
        UNION ALL
        SELECT account, period, spent, credited, count, 0 FROM closed WHERE {_ENDED_MS} <= :at
    ) GROUP BY account, period ORDER BY account, period"""


async def alerts_after(database: Database, lsn: int, since_ms: int, most: int) -> list[Alert]:
    """The alerts after a record and from a moment on, oldest first."""
    async with database.reader() as reader:
        rows = await reader.read(
            "SELECT lsn, t, account, period, percent, spent, budget FROM alert"
            " WHERE lsn > ? AND t >= ? ORDER BY lsn LIMIT ?",
            (lsn, since_ms, most),
        )
    return [
        Alert(
            lsn=row["lsn"],
            t=row["t"],
            synced=0,
            account=row["account"],
            period=row["period"],
            percent=row["percent"],
            spent=row["spent"],
            limit=row["budget"],
        )
        for row in rows
    ]


def admitted_since(connection: sqlite3.Connection, t: int) -> list[tuple[int, int, str, int]]:
    """(lsn, t, key_id, tokens) of the requests admitted after a moment and settled; none of those
    that never were sent."""
    return connection.execute(
        "SELECT lsn, t, key_id,"
        " input_tokens + cache_read_tokens + cache_write_tokens + output_tokens"
        " FROM request WHERE t > ? AND settled_at IS NOT NULL AND outcome <> 'void' ORDER BY lsn",
        (t,),
    ).fetchall()
