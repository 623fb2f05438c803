"""What was used and by whom: how an account stands, from memory; reports and a look back at
requests, from the database.

A report waits a moment for the database to have what memory has, and says what it still lacks:
`as_of_lsn` is the last record in it, `behind` the number of records that came after.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.admin.body import UNSET, Id, PerPage, ShownTime, ShownUsd, Unset
from gwproxy.admin.query import Query, cursor_of, day_out
from gwproxy.core.ledger import Account, Request
from gwproxy.core.money import Nanos, format_usd
from gwproxy.core.period import rfc3339
from gwproxy.state.accounts import figures, last_update
from gwproxy.state.store import Store
from gwproxy.storage import reports
from gwproxy.storage.gateway_sums import Sum
from gwproxy.storage.reports import Chosen, Sought

_TYPES: Final[dict[str, type]] = {"day": int}

Group = Literal["provider", "model", "user", "org", "day"]
Outcome = Literal[
    "completed", "failed", "client_left", "truncated", "cut", "void", "unknown", "recovered"
]

# -- what is asked -------------------------------------------------------------------------------


class _Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`month`, or `from` and `to`, dates that are both included; this month by default."""

    group_by: Group = "provider"
    month: str | None = None
    since: str | None = msgspec.field(default=None, name="from")
    until: str | None = msgspec.field(default=None, name="to")
    limit: PerPage = checked.PER_PAGE
    cursor: str = ""
    provider: str | None = None
    model: str | None = None


class ReportQuery(_Report, frozen=True):
    org_id: str | None = None
    user_id: str | None = None


class UserReportQuery(_Report, frozen=True):
    org_id: str | None = None


class OrganizationReportQuery(_Report, frozen=True):
    user_id: str | None = None


class RequestQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`from` and `to` are dates, both included, or times."""

    since: str | None = msgspec.field(default=None, name="from")
    until: str | None = msgspec.field(default=None, name="to")
    key_id: str | None = None
    outcome: Outcome | None = None
    org_id: str | None = None
    user_id: str | None = None
    provider: str | None = None
    model: str | None = None
    limit: PerPage = checked.PER_PAGE
    cursor: str = ""


# -- what is answered ----------------------------------------------------------------------------


class Tokens(msgspec.Struct):
    """Fresh input, cache reads and writes, output, and the reasoning that is part of the output."""

    input: int
    cache_read: int
    cache_write: int
    output: int
    reasoning: int


class Attempts(msgspec.Struct):
    count: int
    failed: int
    mean_duration_ms: int | None


class Sums(msgspec.Struct, kw_only=True):
    """Costs are those charged at the time: later corrections and resets are not in them."""

    request_count: int
    succeeded_count: int
    failed_count: int
    cost_usd: ShownUsd
    overrun_usd: ShownUsd
    tokens: Tokens
    mean_duration_ms: int | None


class Gateway(msgspec.Struct):
    """The same by the gateway's own log, as far as it was reconciled: `covered_s` is how many
    seconds of the report's days were. Its cost is an estimate."""

    request_count: int
    failed_count: int
    cached_count: int
    input_tokens: int
    output_tokens: int
    cost_usd: ShownUsd
    mean_duration_ms: int | None
    covered_s: int

    @classmethod
    def of(cls, found: Sum) -> "Gateway":
        return cls(
            found.requests,
            found.failed,
            found.cached,
            found.input,
            found.output,
            format_usd(found.cost),
            _mean(found.duration_ms, found.requests),
            found.covered_ms // 1000,
        )


class Line(Sums, kw_only=True):
    """One group: named by what it was grouped by."""

    provider: str | Unset = UNSET
    model: str | Unset = UNSET
    org_id: str | Unset = UNSET
    user_id: str | Unset = UNSET
    day: str | Unset = UNSET
    attempts: Attempts | Unset = UNSET
    gateway: Gateway | Unset = UNSET


class Report(msgspec.Struct, kw_only=True):
    group_by: Group
    since: str = msgspec.field(name="from")
    until: str = msgspec.field(name="to")
    data: list[Line]
    total: Sums
    next_cursor: str | None
    as_of_lsn: int
    behind: int


class _Stands(msgspec.Struct, kw_only=True):
    """How a month stands; with a report when the query asks for one."""

    org_id: Id
    month_usage_usd: ShownUsd
    held_usd: ShownUsd
    limit_usd: ShownUsd | None
    remaining_usd: ShownUsd | None
    current_month: str
    request_count: int
    resets_at: ShownTime
    last_update: ShownTime | None
    """When it was last charged, granted something or corrected; null: not this month."""
    report: Report | Unset = UNSET


class OrganizationUsage(_Stands):
    pass


class UserUsage(_Stands, kw_only=True):
    user_id: Id


class RequestLine(msgspec.Struct, kw_only=True):
    request_id: str
    created_at: ShownTime
    user_id: str
    org_id: str
    key_id: str
    model_requested: str
    provider: str
    model: str
    stream: bool
    outcome: str | None
    status: int | None
    source: str | None
    tokens: Tokens
    held_usd: ShownUsd
    cost_usd: ShownUsd | None
    overrun_usd: ShownUsd
    duration_ms: int | None
    attempts: int
    degraded: bool


class RequestPage(msgspec.Struct, kw_only=True):
    data: list[RequestLine]
    next_cursor: str | None
    as_of_lsn: int
    behind: int


class Usage:
    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET",
                path="/admin/usage",
                do=self.report,
                summary="Add up what was used, grouped.",
                query=ReportQuery,
                answers=Report,
            ),
            Route(
                method="GET",
                path="/admin/users/{user_id}/usage",
                do=self.of_user,
                summary="How a user's month stands.",
                query=UserReportQuery,
                answers=UserUsage,
            ),
            Route(
                method="GET",
                path="/admin/organizations/{org_id}/usage",
                do=self.of_organization,
                summary="How an organization's month stands.",
                query=OrganizationReportQuery,
                answers=OrganizationUsage,
            ),
            Route(
                method="GET",
                path="/admin/requests",
                do=self.requests,
                summary="Look back at requests, newest first.",
                query=RequestQuery,
                answers=RequestPage,
            ),
        ]

    # -- how an account stands -------------------------------------------------------------------

    async def of_user(self, ask: Ask, user_id: str, query: UserReportQuery) -> Answer:
        found = self.user(user_id)
        if query != UserReportQuery():
            # A report needs the database, the rest does not.
            found.report = await self._report(query, query.org_id, user_id)
        return Answer(found)

    async def of_organization(
        self, ask: Ask, org_id: str, query: OrganizationReportQuery
    ) -> Answer:
        found = self.organization(org_id)
        if query != OrganizationReportQuery():
            found.report = await self._report(query, org_id, query.user_id)
        return Answer(found)

    def user(self, user_id: str) -> UserUsage:
        """A deleted one's too: what was spent stays."""
        row = self._store.directory.user(user_id, deleted=True)
        stands = self._stands("user", user_id, row.monthly_limit)
        return UserUsage(user_id=user_id, org_id=row.org_id, **stands)

    def organization(self, org_id: str) -> OrganizationUsage:
        row = self._store.directory.organization(org_id, deleted=True)
        return OrganizationUsage(org_id=org_id, **self._stands("org", org_id, row.monthly_budget))

    def _stands(self, scope: str, of: str, limit: Nanos | None) -> dict[str, Any]:
        ledger = self._store.ledger
        account = Account(f"{scope}:{of}", ledger.periods()[0], limit)
        shown = figures(ledger.state, account).json()
        del shown["scope"], shown["id"]
        return {**shown, "last_update": last_update(ledger.state, account)}

    # -- reports ---------------------------------------------------------------------------------

    async def report(self, ask: Ask, query: ReportQuery) -> Answer:
        return Answer(await self._report(query, query.org_id, query.user_id))

    async def _report(self, sent: _Report, org_id: str | None, user_id: str | None) -> Report:
        store, query = self._store, Query(sent)
        columns = reports.GROUPS[sent.group_by]
        after = query.cursor(*(_TYPES.get(name, str) for name in columns))
        days = query.days(store.ledger.now_ms())
        chosen = Chosen(
            days.first,
            days.last,
            query.id("org_id") or org_id,
            query.id("user_id") or user_id,
            query.name("provider"),
            query.name("model"),
        )
        await store.catch_up()
        async with store.database.reader() as reader:
            rows, last = await reports.usage(reader, chosen, sent.group_by, after, sent.limit)
            total = await reports.used(reader, chosen)
            attempted = {}
            of_all = chosen == Chosen(days.first, days.last)
            if sent.group_by == "provider" and of_all:
                attempted = await reports.attempted(reader, chosen)
        data = await checked.in_turns(rows, lambda row: _group(row, columns))
        if of_all:
            await self._add_gateway(sent.group_by, data, days.first, days.last)
        for line in data:
            if not isinstance(line.provider, Unset) and (found := attempted.get(line.provider)):
                line.attempts = _attempts(*found)
        return Report(
            group_by=sent.group_by,
            since=day_out(days.first),
            until=day_out(days.last),
            data=data,
            total=Sums(**_sums(total)),
            next_cursor=None if last is None else cursor_of(last),
            **self._freshness(reader.as_of_lsn),
        )

    async def _add_gateway(self, group: Group, data: list[Line], first: int, last: int) -> None:
        """The other side's figures, where the report is of everybody and it knows the groups."""
        found: Mapping[Any, Sum] = {}
        if group == "provider":
            found = await self._store.gateway_side.by_provider(first, last)
        elif group == "model":
            found = await self._store.gateway_side.by_model(first, last)
        for line in data:
            named = line.provider if group == "provider" else (line.provider, line.model)
            if (one := found.get(named)) is not None:
                line.gateway = Gateway.of(one)

    def _freshness(self, as_of_lsn: int) -> dict[str, int]:
        behind = max(0, self._store.ledger.state.lsn - as_of_lsn)
        return {"as_of_lsn": as_of_lsn, "behind": behind}

    # -- looking back ----------------------------------------------------------------------------

    async def requests(self, ask: Ask, query: RequestQuery) -> Answer:
        sent = Query(query)
        sought = Sought(
            since=sent.moment("from", 0),
            until=sent.moment("to", 1 << 62),
            org_id=sent.id("org_id"),
            user_id=sent.id("user_id"),
            key_id=sent.id("key_id"),
            provider=sent.name("provider"),
            model=sent.name("model"),
            outcome=query.outcome,
        )
        before = sent.cursor(int)
        await self._store.catch_up()
        async with self._store.database.reader() as reader:
            found, more = await reports.requests(
                reader, sought, before[0] if before else None, query.limit
            )
        return Answer(
            RequestPage(
                data=await checked.in_turns(found, _line),
                next_cursor=None if more is None else cursor_of([more]),
                **self._freshness(reader.as_of_lsn),
            )
        )


def _group(row: Any, columns: tuple[str, ...]) -> Line:
    named: dict[str, Any] = {
        name: day_out(row[name]) if name == "day" else row[name] for name in columns
    }
    return Line(**named, **_sums(row))


def _sums(row: Any) -> dict[str, Any]:
    count = row["requests"] or 0
    return {
        "request_count": count,
        "succeeded_count": row["succeeded"] or 0,
        "failed_count": row["failed"] or 0,
        "cost_usd": format_usd(row["cost"] or 0),
        "overrun_usd": format_usd(row["overrun"] or 0),
        "tokens": Tokens(*(row[f"{name}_tokens"] or 0 for name in Tokens.__struct_fields__)),
        "mean_duration_ms": _mean(row["duration_ms"], count),
    }


def _attempts(count: int, failed: int, duration_ms: int) -> Attempts:
    return Attempts(count, failed, _mean(duration_ms, count))


def _mean(total: int | None, count: int) -> int | None:
    return round((total or 0) / count) if count else None


def _line(found: Request) -> RequestLine:
    return RequestLine(
        request_id=found.id,
        created_at=rfc3339(found.t),
        user_id=found.user_id,
        org_id=found.org_id,
        key_id=found.key_id,
        model_requested=found.model,
        provider=found.provider,
        model=found.upstream_model,
        stream=found.stream,
        outcome=found.outcome,
        status=found.status or None,
        source=found.source,
        tokens=Tokens(*found.tokens),
        held_usd=format_usd(found.held),
        cost_usd=None if found.cost is None else format_usd(found.cost),
        overrun_usd=format_usd(found.overrun),
        duration_ms=None if found.settled_at is None else found.settled_at - found.t,
        attempts=len(found.attempts),
        degraded=found.degraded,
    )
