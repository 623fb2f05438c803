"""The audit: who changed what, and when, with what stood there before and after."""

from typing import Any, Literal

import msgspec
import orjson

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.admin.body import PerPage, ShownTime
from gwproxy.admin.query import Query, cursor_of
from gwproxy.core.money import Nanos, format_usd
from gwproxy.core.period import rfc3339
from gwproxy.state.store import Store
from gwproxy.storage import audit
from gwproxy.storage.audit import Sought

Action = Literal[
    "create",
    "update",
    "delete",
    "rotate",
    "revoke",
    "import",
    "grant",
    "reset",
    "disable",
    "enable",
]
Noun = Literal["user", "organization", "api_key", "admin_key", "provider", "import"]


class AuditQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`from` and `to` are dates, both included, or times."""

    since: str | None = msgspec.field(default=None, name="from")
    until: str | None = msgspec.field(default=None, name="to")
    actor: str | None = None
    action: Action | None = None
    noun: Noun | None = None
    id: str | None = None
    limit: PerPage = checked.PER_PAGE
    cursor: str = ""


class AuditLine(msgspec.Struct, kw_only=True):
    """`before` is null where something was created, granted or reset."""

    lsn: int
    at: ShownTime
    actor: str
    action: str
    noun: str
    id: str
    before: dict[str, Any] | None
    after: dict[str, Any]
    request_id: str
    address: str


class AuditPage(msgspec.Struct, kw_only=True):
    data: list[AuditLine]
    next_cursor: str | None
    as_of_lsn: int


class Audit:
    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> tuple[Route, ...]:
        return (
            Route(
                method="GET",
                path="/admin/audit",
                do=self.list,
                summary="Who changed what, newest first.",
                query=AuditQuery,
                answers=AuditPage,
            ),
        )

    async def list(self, ask: Ask, query: AuditQuery) -> Answer:
        sent = Query(query)
        sought = Sought(
            since=sent.moment("from", 0),
            until=sent.moment("to", 1 << 62),
            actor=sent.name("actor"),
            action=query.action,
            noun=query.noun,
            id=sent.id("id"),
        )
        before = sent.cursor(int, int)
        await self._store.catch_up()
        async with self._store.database.reader() as reader:
            found = await audit.lines(
                reader, sought, (before[0], before[1]) if before else None, query.limit + 1
            )
        shown = found[: query.limit]
        last = (shown[-1].lsn, shown[-1].place) if len(found) > query.limit else None
        return Answer(
            AuditPage(
                data=await checked.in_turns(shown, _line),
                next_cursor=None if last is None else cursor_of(last),
                as_of_lsn=reader.as_of_lsn,
            )
        )


def _line(found: audit.Line) -> AuditLine:
    return AuditLine(
        lsn=found.lsn,
        at=rfc3339(found.t),
        actor=found.actor,
        action=found.action,
        noun=found.noun,
        id=found.id,
        before=None if found.before is None else _row(found.before),
        after=_row(found.after),
        request_id=found.request_id,
        address=found.address,
    )


_AMOUNTS = {
    "monthly_limit": "monthly_limit_usd",
    "monthly_budget": "monthly_budget_usd",
    "fallback_daily_limit": "fallback_daily_limit_usd",
    "delta": "delta_usd",
}


def _row(column: str) -> dict[str, Any]:
    """A stored row with the names and the forms that the API has for it."""
    found: dict[str, Any] = {}
    for name, value in orjson.loads(column).items():
        if name in _AMOUNTS:
            found[_AMOUNTS[name]] = None if value is None else format_usd(Nanos(value))
        elif name.endswith("_at"):
            found[name] = checked.time_out(value)
        elif name == "previous":
            found["previous_valid_until"] = [checked.time_of(each["until"]) for each in value]
        else:
            found[name] = value
    return found
