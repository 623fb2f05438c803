"""The audit: who changed what, one row a change, written by the ledger's writer and read in pages.

What is written are rows as a person may see them: never the digest of a key.
"""

import sqlite3
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gwproxy.core.records import Adjust, Admin, Breaker, Import
from gwproxy.storage import directory
from gwproxy.storage.database import Reader, assert_in_transaction

_INSERT: Final = "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_NOUNS: Final = {"user": "user", "org": "organization"}
_DISABLED: Final = "disabled"
_AUDITED: Final = ("grant", "reset")
"""Of adjustments: the others are made by the program, many at a time."""


def changed(
    connection: sqlite3.Connection,
    record: Admin | Import,
    action: str,
    row: directory.Row,
    place: int = 0,
) -> None:
    """Store a row that a record has changed, and what it was before."""
    assert_in_transaction(connection)
    before = directory.put(connection, row)
    assert_in_transaction(connection)
    noun, name = directory.named(row)
    shown = None if before is None else directory.shown(before)
    _insert(connection, record, action, noun, name, shown, directory.shown(row), place)


def imported(connection: sqlite3.Connection, record: Import) -> None:
    """Store that there was an import, by the name of its file; its rows have been stored."""
    after = {"digest": record.digest, "rows": record.rows}
    assert_in_transaction(connection)
    shown = msgspec.json.encode(after).decode()
    _insert(connection, record, "import", "import", record.file, None, shown)


def adjusted(connection: sqlite3.Connection, record: Adjust) -> None:
    """Store a grant or a reset, which is about one account."""
    if record.type not in _AUDITED:
        return
    [(account, period)] = record.accounts
    scope, _, name = account.partition(":")
    after = {"period": period, "delta": record.delta, "reason": record.reason}
    assert_in_transaction(connection)
    shown = msgspec.json.encode(after).decode()
    _insert(connection, record, record.type, _NOUNS.get(scope, scope), name, None, shown)


def operated(connection: sqlite3.Connection, record: Breaker) -> None:
    """Store what somebody has done to a provider; what came about by itself is not his change."""
    if not record.actor:
        return
    assert_in_transaction(connection)
    if _DISABLED in (record.before, record.after):
        action = "disable" if record.after == _DISABLED else "enable"
    else:
        action = "reset"
    before, after = (
        msgspec.json.encode({"state": state}).decode() for state in (record.before, record.after)
    )
    _insert(connection, record, action, "provider", record.provider, before, after)


def _insert(
    connection: sqlite3.Connection,
    record: Admin | Adjust | Import | Breaker,
    action: str,
    noun: str,
    name: str,
    before: str | None,
    after: str,
    place: int = 0,
) -> None:
    connection.execute(
        _INSERT,
        (
            record.lsn,
            place,
            record.t,
            record.actor,
            action,
            noun,
            name,
            before,
            after,
            record.request_id,
            record.address,
        ),
    )


# -- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    lsn: int
    place: int
    """Among the rows of an import, from 1; 0: the record's only one, or what is said of all."""
    t: int
    actor: str
    action: str
    noun: str
    id: str
    before: str | None
    after: str
    request_id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """What is looked for; None: any."""

    since: int
    until: int
    """Milliseconds since 1970, not included."""
    actor: str | None
    action: str | None
    noun: str | None
    id: str | None


async def lines(
    reader: Reader, sought: Sought, before: tuple[int, int] | None, limit: int
) -> list[Line]:
    """The newest ones before that record and place, newest first."""
    wanted: dict[str, Any] = {
        name: value
        for name in ("actor", "action", "noun", "id")
        if (value := getattr(sought, name)) is not None
    }
    # The names are ours, never a caller's.
    where = "".join(f" AND {name} = ?" for name in wanted)
    end = (1 << 62, 0) if before is None else before
    rows = await reader.read(
        f"SELECT * FROM audit WHERE (lsn, place) < (?, ?) AND t >= ? AND t < ?{where}"
        " ORDER BY lsn DESC, place DESC LIMIT ?",
        (*end, sought.since, sought.until, *wanted.values(), limit),
    )
    return [Line(*row) for row in rows]
