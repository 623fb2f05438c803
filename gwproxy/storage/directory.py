"""The SQL of organizations, users and keys: rows from values, values from rows, nothing decided."""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import orjson

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.identity import (
    AdminKey,
    ApiKey,
    FailureMode,
    OldSecret,
    OnClientGone,
    OnExhausted,
    Organization,
    Scope,
    Status,
    UnboundedPolicy,
    User,
)
from gwproxy.core.money import Nanos
from gwproxy.storage.database import Database

Row = Organization | User | ApiKey | AdminKey


async def load(database: Database) -> list[Row]:
    """Every row, deleted ones too, in an order in which each one's owner comes before it."""
    # rowid is the order of creation, which the lists of a user's keys keep.
    organizations = await database.read("SELECT * FROM organization ORDER BY rowid")
    users = await database.read("SELECT * FROM user ORDER BY rowid")
    keys = await database.read("SELECT * FROM api_key ORDER BY rowid")
    admin_keys = await database.read("SELECT * FROM admin_key ORDER BY rowid")
    return [
        *(_organization(row) for row in organizations),
        *(_user(row) for row in users),
        *(_key(row) for row in keys),
        *(_admin_key(row) for row in admin_keys),
    ]


async def load_repeats(database: Database) -> list[tuple[str, int, int, str | None]]:
    """Of the last requests that were sent under a key of their own, oldest first: the mark, the
    record that it led to, its time, and the id of the row that this was about, if it was one."""
    rows = await database.read(
        "SELECT key, lsn, idempotency.t, iif(action IN ('grant', 'reset'), NULL, id) AS id"
        " FROM idempotency LEFT JOIN audit USING (lsn) ORDER BY lsn"
    )
    return [tuple(row) for row in rows]


def organizations(connection: sqlite3.Connection) -> list[Organization]:
    """Every organization, deleted ones too."""
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    return [_organization(row) for row in cursor.execute("SELECT * FROM organization")]


def put(connection: sqlite3.Connection, row: Row) -> Row | None:
    """Store a row as it stands now, within the caller's transaction; what stood there before."""
    table, id_column, columns = _columns(row)
    found = connection.execute(
        f"SELECT * FROM {table} WHERE {id_column} = ?", (columns[id_column],)
    ).fetchone()
    names = ", ".join(columns)
    marks = ", ".join(f":{name}" for name in columns)
    # How a key was used is written by `update_uses` alone: no record tells of it.
    changes = ", ".join(
        f"{name} = excluded.{name}" for name in columns if name not in (id_column, *_USE)
    )
    connection.execute(
        f"INSERT INTO {table} ({names}) VALUES ({marks})"
        f" ON CONFLICT ({id_column}) DO UPDATE SET {changes}",
        columns,
    )
    return None if found is None else _VALUES[table](found)


def named(row: Row) -> tuple[str, str]:
    """What kind of row it is, and its id."""
    table, id_column, columns = _columns(row)
    return table, columns[id_column]


def shown(row: Row) -> str:
    """The row as JSON, without what nobody needs to see."""
    fields = msgspec.to_builtins(row)
    for name in ("digest", *_USE):
        fields.pop(name, None)
    if "previous" in fields:
        fields["previous"] = [{"until": each["until"]} for each in fields["previous"]]
    return _json(fields)


_USE: Final = ("last_used_at", "last_used_from", "use_count")


@dataclass(frozen=True, slots=True)
class Use:
    """How a key was used so far."""

    key_id: str
    at: int
    address: str | None
    count: int


async def update_uses(database: Database, uses: Sequence[Use]) -> bool:
    """Store how keys were used; False when that could not be done for all of them just now.

    Not a change that anybody made: versions stay.
    """
    rows = [(use.key_id, use.at, use.address, use.count) for use in uses]

    def update(connection: sqlite3.Connection) -> int:
        # An id is in one of them: they begin differently.
        return sum(
            connection.executemany(
                f"UPDATE {table} SET last_used_at = ?2, last_used_from = ?3, use_count = ?4"
                " WHERE key_id = ?1",
                rows,
            ).rowcount
            for table in ("api_key", "admin_key")
        )

    try:
        done = await database.commit(update)
    except StorageUnavailable:
        return False  # whoever writes what counts will meet the same fault, and tell
    return done == len(rows)


# -- values into columns and back ----------------------------------------------------------------


def _columns(row: Row) -> tuple[str, str, dict[str, Any]]:
    """Table, name of the id column, and the columns. The names are ours, never a caller's."""
    match row:
        case Organization():
            return (
                "organization",
                "org_id",
                {
                    "org_id": row.org_id,
                    "name": row.name,
                    "status": row.status,
                    "monthly_budget": row.monthly_budget,
                    "failure_mode": row.failure_mode,
                    "fallback_daily_limit": row.fallback_daily_limit,
                    "allowed_features": _json(row.allowed_features),
                    "prices": None if row.prices is None else _json(row.prices),
                    "unbounded_policy": row.unbounded_policy,
                    "on_exhausted": row.on_exhausted,
                    "on_client_gone": row.on_client_gone,
                    "cache": int(row.cache),
                    "created_at": row.created_at,
                    "deleted_at": row.deleted_at,
                    "version": row.version,
                },
            )
        case User():
            return (
                "user",
                "user_id",
                {
                    "user_id": row.user_id,
                    "org_id": row.org_id,
                    "email": row.email,
                    "status": row.status,
                    "monthly_limit": row.monthly_limit,
                    "rpm": row.rpm,
                    "tpm": row.tpm,
                    "max_parallel": row.max_parallel,
                    "created_at": row.created_at,
                    "deleted_at": row.deleted_at,
                    "version": row.version,
                },
            )
        case ApiKey():
            return (
                "api_key",
                "key_id",
                {
                    "key_id": row.key_id,
                    "user_id": row.user_id,
                    "prefix": row.prefix,
                    "digest": row.digest,
                    "previous": _old_secrets(row.previous),
                    "name": row.name,
                    "allowed_models": (
                        None if row.allowed_models is None else _json(row.allowed_models)
                    ),
                    "monthly_limit": row.monthly_limit,
                    "rpm": row.rpm,
                    "tpm": row.tpm,
                    "max_parallel": row.max_parallel,
                    "created_at": row.created_at,
                    "expires_at": row.expires_at,
                    "revoked_at": row.revoked_at,
                    "last_used_at": row.last_used_at,
                    "last_used_from": row.last_used_from,
                    "use_count": row.use_count,
                    "version": row.version,
                },
            )
        case AdminKey():
            return (
                "admin_key",
                "key_id",
                {
                    "key_id": row.key_id,
                    "prefix": row.prefix,
                    "digest": row.digest,
                    "name": row.name,
                    "scope": row.scope,
                    "created_at": row.created_at,
                    "expires_at": row.expires_at,
                    "revoked_at": row.revoked_at,
                    "last_used_at": row.last_used_at,
                    "last_used_from": row.last_used_from,
                    "use_count": row.use_count,
                    "version": row.version,
                },
            )


def _organization(row: sqlite3.Row) -> Organization:
    return Organization(
        org_id=row["org_id"],
        name=row["name"],
        status=Status(row["status"]),
        monthly_budget=_nanos(row["monthly_budget"]),
        failure_mode=None if row["failure_mode"] is None else FailureMode(row["failure_mode"]),
        fallback_daily_limit=_nanos(row["fallback_daily_limit"]),
        allowed_features=tuple(orjson.loads(row["allowed_features"])),
        prices=None if row["prices"] is None else orjson.loads(row["prices"]),
        unbounded_policy=UnboundedPolicy(row["unbounded_policy"]),
        on_exhausted=OnExhausted(row["on_exhausted"]),
        on_client_gone=OnClientGone(row["on_client_gone"]),
        cache=bool(row["cache"]),
        created_at=row["created_at"],
        deleted_at=row["deleted_at"],
        version=row["version"],
    )


def _user(row: sqlite3.Row) -> User:
    return User(
        user_id=row["user_id"],
        org_id=row["org_id"],
        email=row["email"],
        status=Status(row["status"]),
        monthly_limit=_nanos(row["monthly_limit"]),
        rpm=row["rpm"],
        tpm=row["tpm"],
        max_parallel=row["max_parallel"],
        created_at=row["created_at"],
        deleted_at=row["deleted_at"],
        version=row["version"],
    )


def _key(row: sqlite3.Row) -> ApiKey:
    models = row["allowed_models"]
    return ApiKey(
        key_id=row["key_id"],
        user_id=row["user_id"],
        prefix=row["prefix"],
        digest=row["digest"],
        previous=() if row["previous"] is None else _read_old_secrets(row["previous"]),
        name=row["name"],
        allowed_models=None if models is None else tuple(orjson.loads(models)),
        monthly_limit=_nanos(row["monthly_limit"]),
        rpm=row["rpm"],
        tpm=row["tpm"],
        max_parallel=row["max_parallel"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        last_used_at=row["last_used_at"],
        last_used_from=row["last_used_from"],
        use_count=row["use_count"],
        version=row["version"],
    )


def _admin_key(row: sqlite3.Row) -> AdminKey:
    return AdminKey(
        key_id=row["key_id"],
        prefix=row["prefix"],
        digest=row["digest"],
        name=row["name"],
        scope=Scope(row["scope"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        last_used_at=row["last_used_at"],
        last_used_from=row["last_used_from"],
        use_count=row["use_count"],
        version=row["version"],
    )


def _old_secrets(previous: tuple[OldSecret, ...]) -> str | None:
    if not previous:
        return None
    return msgspec.json.encode([(each.digest, each.until) for each in previous]).decode()


def _read_old_secrets(column: str) -> tuple[OldSecret, ...]:
    pairs = msgspec.json.decode(column, type=list[tuple[bytes, int]])
    return tuple(OldSecret(*pair) for pair in pairs)


_VALUES: Final[Mapping[str, Callable[[sqlite3.Row], Row]]] = {
    "organization": _organization,
    "user": _user,
    "api_key": _key,
    "admin_key": _admin_key,
}


def _nanos(column: int | None) -> Nanos | None:
    return None if column is None else Nanos(column)


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
