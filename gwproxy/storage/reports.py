"""What is read from the database about requests: rows as values, and nothing decided."""

import sqlite3
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from gwproxy.core.ledger import Request
from gwproxy.core.records import Tried
from gwproxy.storage.database import Database

_read_attempts: Final = msgspec.json.Decoder(tuple[Tried, ...]).decode
_read_edits: Final = msgspec.json.Decoder(tuple[str, ...]).decode
_read_rates: Final = msgspec.json.Decoder(tuple[int, int, int, int]).decode


async def find_request(database: Database, request_id: str) -> Request | None:
    """One request by its id; StorageUnavailable when the database cannot be read."""
    async with database.reader() as reader:
        rows = await reader.read("SELECT * FROM request WHERE id = ?", (request_id,))
    return _request(dict(rows[0])) if rows else None


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


def balances_at(
    connection: sqlite3.Connection, at_ms: int
) -> list[tuple[str, str, int, int, int, int]]:
    """(account, period, spent, credited, requests, held) as all accounts stood at a moment.

    Of the caller's own accounts; what a provider's or an outage's held then is not kept.
    """
    return connection.execute(_BALANCES_AT, {"at": at_ms}).fetchall()


_BALANCES_AT: Final = """
    SELECT account, period, sum(spent), sum(credited), sum(count), sum(held) FROM (
        SELECT account, period,
            iif(type = 'grant', 0, amount) AS spent, iif(type = 'grant', amount, 0) AS credited,
            0 AS count, 0 AS held
        FROM entry WHERE t <= :at
        UNION ALL
        SELECT scope || ':' || id, period, 0, 0, settled_at <= :at AND outcome <> 'void',
            iif(settled_at IS NULL OR settled_at > :at, held, 0)
        FROM (
            SELECT 'key' AS scope, key_id AS id, period, t, settled_at, outcome, held FROM request
            UNION ALL
            SELECT 'user', user_id, period, t, settled_at, outcome, held FROM request
            UNION ALL
            SELECT 'org', org_id, period, t, settled_at, outcome, held FROM request
        ) WHERE t <= :at
    ) GROUP BY account, period ORDER BY account, period"""
