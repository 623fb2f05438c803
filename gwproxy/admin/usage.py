"""What was used and by whom: how an account stands, from memory; reports and a look back at
requests, from the database.

A report waits a moment for the database to have what memory has, and says what it still lacks:
`as_of_lsn` is the last record in it, `behind` the number of records that came after.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from gwproxy.admin import body
from gwproxy.admin.query import Query, cursor_of, day_out
from gwproxy.core.errors import NotFound
from gwproxy.core.ledger import Account, Request
from gwproxy.core.money import Nanos, format_usd
from gwproxy.core.period import rfc3339
from gwproxy.state.accounts import figures
from gwproxy.state.store import Store
from gwproxy.storage import reports
from gwproxy.storage.reports import Chosen, Sought

GROUPS: Final = ("provider", "model", "user", "org", "day")

_TYPES: Final[dict[str, type]] = {"day": int}
_FILTERS: Final = ("org_id", "user_id", "provider", "model")
_REPORT: Final = ("group_by", "month", "from", "to", "limit", "cursor", *_FILTERS)
_OUTCOMES: Final = (
    *("completed", "failed", "client_left", "truncated", "cut", "void", "unknown", "recovered"),
)


class Usage:
    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[tuple[str, str, Callable[..., Awaitable[web.StreamResponse]]]]:
        return [
            ("GET", "/admin/usage", self.report),
            ("GET", "/admin/users/{user_id}/usage", self.of_user),
            ("GET", "/admin/organizations/{org_id}/usage", self.of_organization),
            ("GET", "/admin/requests", self.requests),
        ]

    # -- how an account stands -------------------------------------------------------------------

    async def of_user(self, request: web.BaseRequest, user_id: str) -> web.StreamResponse:
        user = self._store.keyring.user(user_id)
        if user is None:
            raise NotFound("There is no user with this id.")
        stands = {"user_id": user_id, "org_id": user.org_id}
        stands |= self._stands("user", user_id, user.monthly_limit)
        return await self._with_report(request, stands, user_id=user_id)

    async def of_organization(self, request: web.BaseRequest, org_id: str) -> web.StreamResponse:
        organization = self._store.keyring.organization(org_id)
        if organization is None:
            raise NotFound("There is no organization with this id.")
        stands = {"org_id": org_id}
        stands |= self._stands("org", org_id, organization.monthly_budget)
        return await self._with_report(request, stands, org_id=org_id)

    def _stands(self, scope: str, of: str, limit: Nanos | None) -> dict[str, Any]:
        ledger = self._store.ledger
        account = Account(f"{scope}:{of}", ledger.periods()[0], limit)
        shown = figures(ledger.state, account).json()
        del shown["scope"], shown["id"]
        return {**shown, "last_update": rfc3339(ledger.state.t) if ledger.state.lsn else None}

    async def _with_report(
        self, request: web.BaseRequest, stands: dict[str, Any], **whose: str
    ) -> web.StreamResponse:
        """With a report when the query asks for one: it needs the database, the rest does not."""
        query = Query(request, [name for name in _REPORT if name not in whose])
        if request.query:
            stands["report"] = await self._report(query, **whose)
        return body.answer(200, stands)

    # -- reports ---------------------------------------------------------------------------------

    async def report(self, request: web.BaseRequest) -> web.StreamResponse:
        return body.answer(200, await self._report(Query(request, _REPORT)))

    async def _report(
        self, query: Query, *, org_id: str | None = None, user_id: str | None = None
    ) -> dict[str, Any]:
        store = self._store
        group_by = query.one_of("group_by", GROUPS, "provider")
        columns = reports.GROUPS[group_by]
        after = query.cursor(*(_TYPES.get(name, str) for name in columns))
        limit = query.limit()
        days = query.days(store.ledger.now_ms())
        chosen = Chosen(
            days.first,
            days.last,
            org_id or query.id("org_id"),
            user_id or query.id("user_id"),
            query.name("provider"),
            query.name("model"),
        )
        await store.catch_up()
        async with store.database.reader() as reader:
            rows = await reports.usage(reader, chosen, group_by, after, limit + 1)
            total = await reports.used(reader, chosen)
            attempted = {}
            if group_by == "provider" and chosen == Chosen(days.first, days.last):
                attempted = await reports.attempted(reader, chosen)
        data = [_group(row, columns) for row in rows[:limit]]
        for line in data:
            if found := attempted.get(line.get("provider", "")):
                line["attempts"] = _attempts(*found)
        more = cursor_of([rows[limit - 1][name] for name in columns]) if len(rows) > limit else None
        return {
            "group_by": group_by,
            **days.json(),
            "data": data,
            "total": _sums(total),
            "next_cursor": more,
            **self._freshness(reader.as_of_lsn),
        }

    def _freshness(self, as_of_lsn: int) -> dict[str, int]:
        behind = max(0, self._store.ledger.state.lsn - as_of_lsn)
        return {"as_of_lsn": as_of_lsn, "behind": behind}

    # -- looking back ----------------------------------------------------------------------------

    async def requests(self, request: web.BaseRequest) -> web.StreamResponse:
        query = Query(request, ("from", "to", "key_id", "outcome", *_FILTERS, "limit", "cursor"))
        sought = Sought(
            since=query.moment("from", 0),
            until=query.moment("to", 1 << 62),
            org_id=query.id("org_id"),
            user_id=query.id("user_id"),
            key_id=query.id("key_id"),
            provider=query.name("provider"),
            model=query.name("model"),
            outcome=query.one_of("outcome", _OUTCOMES, "completed") if "outcome" in query else None,
        )
        before, limit = query.cursor(int), query.limit()
        await self._store.catch_up()
        async with self._store.database.reader() as reader:
            found, more = await reports.requests(
                reader, sought, before[0] if before else None, limit
            )
        return body.answer(
            200,
            {
                "data": [_line(each) for each in found],
                "next_cursor": None if more is None else cursor_of([more]),
                **self._freshness(reader.as_of_lsn),
            },
        )


def _group(row: Any, columns: tuple[str, ...]) -> dict[str, Any]:
    named = {name: day_out(row[name]) if name == "day" else row[name] for name in columns}
    return {**named, **_sums(row)}


def _sums(row: Any) -> dict[str, Any]:
    count = row["requests"] or 0
    return {
        "request_count": count,
        "succeeded_count": row["succeeded"] or 0,
        "failed_count": row["failed"] or 0,
        "cost_usd": format_usd(row["cost"] or 0),
        "overrun_usd": format_usd(row["overrun"] or 0),
        "tokens": {
            name: row[f"{name}_tokens"] or 0
            for name in ("input", "cache_read", "cache_write", "output", "reasoning")
        },
        "mean_duration_ms": _mean(row["duration_ms"], count),
    }


def _attempts(count: int, failed: int, duration_ms: int) -> dict[str, Any]:
    return {"count": count, "failed": failed, "mean_duration_ms": _mean(duration_ms, count)}


def _mean(total: int | None, count: int) -> int | None:
    return round((total or 0) / count) if count else None


def _line(found: Request) -> dict[str, Any]:
    fresh, read, write, output, reasoning = found.tokens
    return {
        "request_id": found.id,
        "created_at": rfc3339(found.t),
        "user_id": found.user_id,
        "org_id": found.org_id,
        "key_id": found.key_id,
        "model_requested": found.model,
        "provider": found.provider,
        "model": found.upstream_model,
        "stream": found.stream,
        "outcome": found.outcome,
        "status": found.status or None,
        "source": found.source,
        "tokens": {
            "input": fresh,
            "cache_read": read,
            "cache_write": write,
            "output": output,
            "reasoning": reasoning,
        },
        "held_usd": format_usd(found.held),
        "cost_usd": None if found.cost is None else format_usd(found.cost),
        "overrun_usd": format_usd(found.overrun),
        "duration_ms": None if found.settled_at is None else found.settled_at - found.t,
        "attempts": len(found.attempts),
        "degraded": found.degraded,
    }
