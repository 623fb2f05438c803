"""What is read from the database about requests: rows as values, and nothing decided."""

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
