"""The sums of what was used, by day, provider and model, of everybody, each organization and each
user: added to by the one writer, in the transaction that settles the requests.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from operator import add
from typing import Any, Final

from gwproxy.core.ledger import VOID, Request
from gwproxy.core.period import DAY_MS, end_ms, periods
from gwproxy.storage.database import assert_in_transaction

_FAILED: Final = frozenset({"failed", "truncated", "unknown"})

SUMS: Final = (
    *("requests", "succeeded", "failed", "cost", "overrun", "input_tokens", "cache_read_tokens"),
    *("cache_write_tokens", "output_tokens", "reasoning_tokens", "duration_ms"),
)


def _upsert(table: str, keys: str, sums: tuple[str, ...]) -> str:
    names = [*keys.split(), *sums]
    changes = ", ".join(f"{name} = {name} + excluded.{name}" for name in sums)
    return (
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        f" ON CONFLICT DO UPDATE SET {changes}"
    )


_ADD_USAGE: Final = _upsert("usage", "grain org_id user_id day provider model", SUMS)
_ADD_ATTEMPTED: Final = _upsert("attempted", "day provider", ("attempts", "failed", "duration_ms"))


class Sums:
    """What one batch of settlements adds."""

    def __init__(self) -> None:
        self._used: dict[tuple[str, str, int, str, str], list[int]] = {}
        """By organization, user, day, provider and model: the finest grain."""
        self._attempted: dict[tuple[int, str], list[int]] = {}

    def add(self, request: Request, month: str) -> None:
        """A request of that month; nothing, as long as it is open."""
        if request.settled_at is None or request.outcome == VOID:
            return
        day = request.t // DAY_MS
        if periods(request.t)[0] != month:
            day = end_ms(month) // DAY_MS - 1  # its month ended while it was let in
        succeeded, failed = request.outcome == "completed", request.outcome in _FAILED
        sums = (
            *(1, succeeded, failed, request.cost or 0, request.overrun),
            *request.tokens,
            request.settled_at - request.t,
        )
        who = (request.org_id, request.user_id)
        _add(self._used, (*who, day, request.provider, request.upstream_model), sums)
        for tried in request.attempts:
            figures = (1, bool(tried.error_type), tried.duration_ms)
            _add(self._attempted, (day, tried.provider), figures)

    def write(self, connection: sqlite3.Connection) -> None:
        usage: dict[tuple[Any, ...], list[int]] = {}
        for (org_id, user_id, *where), sums in self._used.items():
            _add(usage, (0, "", "", *where), sums)
            _add(usage, (1, org_id, "", *where), sums)
            _add(usage, (2, org_id, user_id, *where), sums)
        assert_in_transaction(connection)
        connection.executemany(_ADD_USAGE, _rows(usage))
        assert_in_transaction(connection)
        connection.executemany(_ADD_ATTEMPTED, _rows(self._attempted))


def _add(table: dict[Any, list[int]], key: Any, figures: Sequence[int]) -> None:
    found = table.get(key)
    table[key] = [*figures] if found is None else [*map(add, found, figures)]


def _rows(table: dict[Any, list[int]]) -> Iterator[tuple[Any, ...]]:
    return ((*key, *sums) for key, sums in table.items())
