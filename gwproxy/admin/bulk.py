"""The whole directory at once: `GET /admin/export` and `POST /admin/import`.

Both go by in slices and hold no more than the rows that are at hand, and of an import what has to
be in memory anyway. An import is checked to its last row before anything of it is in force; a row
that is found again is changed, so that the same file sent twice changes nothing twice.
"""

import asyncio
import tempfile
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import msgspec
import orjson
from aiohttp import web

from gwproxy.admin import body as checked
from gwproxy.admin import organizations, users
from gwproxy.admin.ask import Route, Streams
from gwproxy.admin.auth import AdminAuth
from gwproxy.admin.body import UNSET, Unset
from gwproxy.admin.query import Query, day_out
from gwproxy.admin.rows import (
    MEDIA_TYPES,
    BadRow,
    Columns,
    Cutter,
    Format,
    csv_line,
    csv_row,
    text_of,
)
from gwproxy.core.errors import (
    GatewayError,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from gwproxy.core.identity import Organization, User
from gwproxy.core.money import format_usd
from gwproxy.core.period import rfc3339
from gwproxy.state.directory import Author
from gwproxy.state.imports import Draft, Unfit
from gwproxy.state.store import Store
from gwproxy.storage import reports

MOST_ROWS: Final = 500_000
"""Half a gigabyte of memory for a moment."""
MOST_BYTES: Final = 256 << 20
_SLICE: Final = 16
"""Rows in one go: half a millisecond, in which no stream moves."""
_PAGE: Final = 1000
_SILENCE_S: Final = 30.0
_ACCOUNTS_WAIT_S: Final = 2.0
"""For the database to have all that a month's accounts are made of: nobody watches a screen."""

Kind = Literal["user", "organization"]


# -- rows ----------------------------------------------------------------------------------------


class UserRow(users.NewUser, kw_only=True):
    kind: Literal["user"] | Unset = UNSET
    created_at: datetime | Unset | None = UNSET


class OrganizationRow(organizations.NewOrganization, kw_only=True):
    kind: Literal["organization"] | Unset = UNSET
    created_at: datetime | Unset | None = UNSET


class _Kind(msgspec.Struct):
    kind: Kind = "user"


USER_COLUMNS: Final = (
    *("user_id", "org_id", "email", "status", "monthly_limit_usd", "rpm", "tpm", "max_parallel"),
    "created_at",
)
ORGANIZATION_COLUMNS: Final = (
    *("org_id", "name", "status", "monthly_budget_usd", "failure_mode"),
    *("fallback_daily_limit_usd", "allowed_features", "prices", "unbounded_policy"),
    *("on_exhausted", "on_client_gone", "cache", "created_at"),
)
_COLUMNS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "user": USER_COLUMNS,
    "organization": ORGANIZATION_COLUMNS,
}
_NUMBERS: Final = frozenset(("rpm", "tpm", "max_parallel"))
_DIGITS: Final = 18
"""As many as JSON takes for a number; what is longer is refused as the text that it is."""
_JSON: Final = frozenset(("allowed_features", "prices"))
_NULLS: Final = frozenset(
    (
        *("email", "monthly_limit_usd", "rpm", "tpm", "max_parallel", "name"),
        *("monthly_budget_usd", "failure_mode", "fallback_daily_limit_usd", "prices"),
    )
)
"""Columns of which an empty field means null: no limit. Of all others it means nothing at all."""


def _from_csv(fields: Mapping[str, str]) -> bytes:
    """A row of cells as the JSON that the API would be sent."""
    row: dict[str, Any] = {}
    for name, cell in fields.items():
        if cell == "":
            if name in _NULLS:
                row[name] = None
        elif name in _NUMBERS and cell.isascii() and cell.isdigit() and len(cell) <= _DIGITS:
            row[name] = int(cell)
        elif name in _JSON or name == "cache":
            try:
                row[name] = orjson.loads(cell.lower() if name == "cache" else cell)
            except ValueError:
                raise BadRow(f"`{name}` must be JSON.") from None
        else:
            row[name] = cell
    return orjson.dumps(row)


class Line(msgspec.Struct, omit_defaults=True, gc=False):
    """What becomes of one row."""

    line: int
    result: str
    kind: str = ""
    id: str = ""
    message: str = ""


@dataclass(slots=True)
class Outcome:
    dry_run: bool
    committed: bool = False
    counts: dict[str, int] = field(
        default_factory=lambda: {"created": 0, "updated": 0, "unchanged": 0, "wrong": 0}
    )
    lines: list[Line] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.counts[line.result] += 1
        self.lines.append(line)

    @property
    def wrong(self) -> int:
        return self.counts["wrong"]

    @property
    def error(self) -> GatewayError | None:
        """Why nothing of it was done, where that was not meant."""
        if self.dry_run or not self.wrong:
            return None
        first = next(line for line in self.lines if line.result == "wrong")
        return InvalidRequest(
            f"{self.wrong} of {len(self.lines)} rows are wrong: nothing was imported. "
            f"Line {first.line}: {first.message}",
            code="invalid_rows",
        )

    def json(self) -> Iterator[bytes]:
        """One JSON object, in slices; each takes its lines with it, so that they need not all be
        freed at once."""
        head: dict[str, Any] = {"dry_run": self.dry_run, "committed": self.committed}
        if self.error is not None:
            head |= self.error.envelope()
        yield orjson.dumps({**head, "counts": self.counts})[:-1] + b',"rows":['
        self.lines.reverse()
        comma = b""
        while self.lines:
            part = [self.lines.pop() for _ in range(min(_PAGE, len(self.lines)))]
            yield comma + msgspec.json.encode(part)[1:-1]
            comma = b","
        yield b"]}\n"


class Reader:
    """Takes the rows of one import into a draft."""

    def __init__(self, draft: Draft, form: Format, kind: Kind, outcome: Outcome) -> None:
        self._draft = draft
        self._form = form
        self._kind = kind
        self._outcome = outcome
        self._columns: Columns | None = None

    def take(self, number: int, raw: bytes) -> None:
        """InvalidRequest, where nothing can be made of the file at all."""
        if self._form is Format.CSV and self._columns is None:
            try:
                header = text_of(raw)
                self._columns = _columns_of(header, self._kind)
            except BadRow as error:
                raise InvalidRequest(f"The header: {error}") from error
            except InvalidRequest as error:
                if not _fits(header, other := _OTHER[self._kind]):
                    raise
                raise InvalidRequest(
                    f"{error.message} This is a table of {other}s: import it with kind={other} "
                    f"(`gwproxy import --kind {_WORD[other]}`).",
                    param="kind",
                ) from error
            return
        if len(self._outcome.lines) == MOST_ROWS:
            raise RequestTooLarge(f"There are more than {MOST_ROWS} rows.", close=True)
        try:
            line = self._put(number, raw)
        except (BadRow, Unfit) as error:
            line = Line(number, "wrong", message=str(error))
        except InvalidRequest as error:
            line = Line(number, "wrong", message=error.message)
        self._outcome.add(line)

    def _put(self, number: int, raw: bytes) -> Line:
        kind = self._kind
        if self._columns is not None:
            raw = _from_csv(self._columns.read(text_of(raw)))
        else:
            text_of(raw)
            kind = checked.decode(raw, _Kind).kind
        if kind == "user":
            sent = checked.decode(raw, UserRow)
            result, name = self._draft.put_user(
                checked.identifier("user_id", sent.user_id), users.fields(sent), _moment(sent)
            )
        else:
            row = checked.decode(raw, OrganizationRow)
            result, name = self._draft.put_organization(
                checked.identifier("org_id", row.org_id), organizations.fields(row), _moment(row)
            )
        return Line(number, result, kind, name)


_OTHER: Final[Mapping[Kind, Kind]] = {"user": "organization", "organization": "user"}
_WORD: Final[Mapping[Kind, str]] = {"user": "users", "organization": "orgs"}


def _columns_of(header: str, kind: Kind) -> Columns:
    columns = Columns(header, _COLUMNS[kind])
    key = "org_id" if kind == "organization" else "user_id"
    if key not in columns.names and (kind == "organization" or "email" not in columns.names):
        raise InvalidRequest(f"There is no column `{key}`, to find a row again by.", param=key)
    return columns


def _fits(header: str, kind: Kind) -> bool:
    try:
        _columns_of(header, kind)
    except InvalidRequest:
        return False
    return True


def _moment(row: UserRow | OrganizationRow) -> int | None:
    sent = row.created_at
    if isinstance(sent, Unset) or sent is None:
        return None
    if sent.tzinfo is None:
        raise checked.wrong("created_at", 'must be a time such as "2026-11-21T12:00:00Z"')
    return checked.seconds("created_at", sent)


# -- the two routes ------------------------------------------------------------------------------


class ImportQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dry_run: bool = False
    kind: Kind = "user"


class ExportQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["user", "organization", "all", "usage"] = "all"
    format: Format = Format.NDJSON
    month: str | Unset = UNSET


class ImportReport(msgspec.Struct):
    dry_run: bool
    committed: bool
    counts: dict[str, int]
    rows: list[Line]


class Bulk:
    def __init__(self, store: Store) -> None:
        self._store = store

    # -- import ----------------------------------------------------------------------------------

    async def load(
        self, data: AsyncIterator[bytes], form: Format, query: ImportQuery, by: Author
    ) -> Outcome:
        """Import what `data` gives; everything, or nothing where this raises or a row is wrong."""
        outcome = Outcome(query.dry_run)
        with self._store.imports.draft() as draft:
            try:
                await self._load(draft, data, form, query, by, outcome)
            finally:
                for _ in draft.let_go():
                    await asyncio.sleep(0)
        return outcome

    async def _load(
        self,
        draft: Draft,
        data: AsyncIterator[bytes],
        form: Format,
        query: ImportQuery,
        by: Author,
        outcome: Outcome,
    ) -> None:
        reader, cutter = Reader(draft, form, query.kind, outcome), Cutter(form)
        count = 0
        async for part in data:
            for number, raw in cutter.feed(part):
                reader.take(number, raw)
                count += 1
                if count % _SLICE == 0:
                    await asyncio.sleep(0)
        for number, raw in cutter.end():
            reader.take(number, raw)
        if not outcome.wrong and not query.dry_run:
            await self._store.imports.commit(draft, by)
            outcome.committed = True

    # -- export ----------------------------------------------------------------------------------

    async def dump(self, query: ExportQuery) -> AsyncGenerator[bytes, None]:
        """The rows of an export, a slice at a time; what is deleted is left out, and whoever's
        organization is: no import could put him there again."""
        if query.kind == "usage":
            async for part in self._usage(query):
                yield part
            return
        if query.format is Format.CSV:
            if query.kind == "all":
                raise checked.wrong("kind", "must be user or organization where the format is csv")
            yield csv_line(_COLUMNS[query.kind])
        if query.kind in ("organization", "all"):
            async for part in self._rows("organization", query.format):
                yield part
        if query.kind in ("user", "all"):
            async for part in self._rows("user", query.format):
                yield part

    async def _rows(self, kind: Kind, form: Format) -> AsyncIterator[bytes]:
        keyring, columns = self._store.keyring, _COLUMNS[kind]
        last: str | None = ""
        while last is not None:
            part = bytearray()
            after, last = last, None
            rows: Iterable[Any] = (
                keyring.users_after(after) if kind == "user" else keyring.organizations_after(after)
            )
            for number, row in enumerate(rows):
                if number == _SLICE:
                    break
                last = row.user_id if kind == "user" else row.org_id
                if row.deleted_at is not None or self._homeless(row):
                    continue
                shown = users.shape(row) if kind == "user" else organizations.shape(row)
                values = [getattr(shown, name) for name in columns]
                if form is Format.CSV:
                    part += csv_row(columns, values)
                else:
                    named = dict(zip(columns, values, strict=True))
                    part += orjson.dumps({"kind": kind, **named}) + b"\n"
            yield bytes(part)
            await asyncio.sleep(0)

    def _homeless(self, row: User | Organization) -> bool:
        organization = self._store.directory.organization(row.org_id, deleted=True)
        return organization.deleted_at is not None

    async def _usage(self, query: ExportQuery) -> AsyncIterator[bytes]:
        """A month as one moment has it, whatever the speed at which it is fetched."""
        store = self._store
        days = Query(query).days(store.ledger.now_ms())
        month = day_out(days.first)[:7]
        chosen = reports.Chosen(days.first, days.last)
        form = query.format
        asked = store.ledger.state.lsn
        with tempfile.TemporaryFile() as spool:
            await store.catch_up(_ACCOUNTS_WAIT_S)
            async with store.database.reader() as reader:
                if form is Format.CSV:
                    spool.write(csv_line(USAGE_COLUMNS))
                last: Sequence[Any] | None = ()
                while last is not None:
                    rows, last = await reports.usage(reader, chosen, "line", last, _PAGE)
                    for number, row in enumerate(rows):
                        if number % _SLICE == 0:
                            await asyncio.sleep(0)
                        spool.write(self._line("usage", self._used(month, row), form))
                after: tuple[Any, ...] = ()
                while form is Format.NDJSON and (
                    rows := await reports.adjustments(reader, month, after, _PAGE)
                ):
                    for row in rows:
                        spool.write(self._line("adjustment", _adjusted(month, row), form))
                    after = tuple(rows[-1][name] for name in ("lsn", "account", "type"))
                total = await reports.used(reader, chosen)
            if form is Format.NDJSON:
                whole = {
                    "month": month,
                    "request_count": total["requests"] or 0,
                    "cost_usd": format_usd(total["cost"] or 0),
                    "as_of_lsn": reader.as_of_lsn,
                    # What came after it was asked for is none of it, and always more.
                    "behind": max(0, asked - reader.as_of_lsn),
                }
                spool.write(self._line("total", whole, form))
            spool.seek(0)
            while part := spool.read(1 << 16):
                yield part

    def _used(self, month: str, row: Any) -> dict[str, Any]:
        user = self._store.keyring.user(row["user_id"])
        return {
            "month": month,
            "org_id": row["org_id"],
            "user_id": row["user_id"],
            "email": None if user is None else user.email,
            "provider": row["provider"],
            "model": row["model"],
            "request_count": row["requests"],
            "succeeded_count": row["succeeded"],
            "failed_count": row["failed"],
            **{name: row[name] for name in USAGE_COLUMNS if name.endswith("_tokens")},
            "cost_usd": format_usd(row["cost"]),
            "overrun_usd": format_usd(row["overrun"]),
        }

    def _line(self, kind: str, fields: dict[str, Any], form: Format) -> bytes:
        if form is Format.CSV:
            return csv_row(USAGE_COLUMNS, (fields[name] for name in USAGE_COLUMNS))
        return orjson.dumps({"kind": kind, **fields}) + b"\n"


USAGE_COLUMNS: Final = (
    *("month", "org_id", "user_id", "email", "provider", "model", "request_count"),
    *("succeeded_count", "failed_count", "input_tokens", "cache_read_tokens"),
    *("cache_write_tokens", "output_tokens", "reasoning_tokens", "cost_usd", "overrun_usd"),
)


def _adjusted(month: str, row: Any) -> dict[str, Any]:
    return {
        "month": month,
        "account": row["account"],
        "type": row["type"],
        "amount_usd": format_usd(row["amount"]),
        "created_at": None if row["t"] is None else rfc3339(row["t"]),
        "actor": row["actor"],
        "reason": row["reason"],
        "request_id": row["request_id"],
    }


# -- over HTTP -----------------------------------------------------------------------------------


class BulkHandler:
    """Both routes behind the admin key. Neither body fits in memory, nor into one answer."""

    def __init__(self, bulk: Bulk, auth: AdminAuth) -> None:
        self._bulk = bulk
        self._auth = auth

    def routes(self) -> tuple[Route, ...]:
        media_types = tuple(MEDIA_TYPES.values())
        return (
            Route(
                method="GET",
                path="/admin/export",
                do=self.export,
                summary="Export users and organizations, or what a month was used.",
                query=ExportQuery,
                streams=Streams(gives=media_types),
            ),
            Route(
                method="POST",
                path="/admin/import",
                do=self.import_,
                summary="Import users or organizations: all rows, or none.",
                query=ImportQuery,
                answers=ImportReport,
                streams=Streams(takes=media_types, rows=(UserRow, OrganizationRow)),
                refusals=(409,),
            ),
        )

    async def import_(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        by = self._auth.check(request.headers, request.remote, request_id)
        query = checked.query(request.query.items(), ImportQuery)
        self._auth.permit(by, writes=not query.dry_run)
        form = _format_of(request)
        outcome = await self._bulk.load(_body(request), form, query, by.author)
        response = _response(request_id, "application/json")
        response.set_status(400 if outcome.error is not None else 200)
        await response.prepare(request)
        for part in outcome.json():
            await response.write(part)
            await asyncio.sleep(0)
        await response.write_eof()
        return response

    async def export(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        self._auth.check(request.headers, request.remote, request_id)
        query = checked.query(request.query.items(), ExportQuery)
        response = _response(request_id, MEDIA_TYPES[query.format])
        name = f"gwproxy-{query.kind}.{query.format}"
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        async with aclosing(self._bulk.dump(query)) as parts:
            first = await anext(parts, b"")  # what is wrong is said before there are headers
            await response.prepare(request)
            await response.write(first)
            async for part in parts:
                if part:
                    await response.write(part)
        await response.write_eof()
        return response


def _response(request_id: str, media_type: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Cache-Control": "no-store", "x-request-id": request_id})
    response.content_type = media_type
    response.charset = "utf-8"
    return response


def _format_of(request: web.BaseRequest) -> Format:
    for form, media_type in MEDIA_TYPES.items():
        if request.content_type == media_type:
            return form
    raise UnsupportedMediaType(f"The Content-Type must be {' or '.join(MEDIA_TYPES.values())}.")


async def _body(request: web.BaseRequest) -> AsyncIterator[bytes]:
    """The body as it comes, no more of it than an import may have."""
    size = 0
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("Compressed request bodies are not accepted.")
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                part = await request.content.readany()
        except TimeoutError:
            raise RequestTimeout(
                f"Nothing of the body came for {_SILENCE_S:g} seconds.", close=True
            ) from None
        if not part:
            return
        size += len(part)
        if size > MOST_BYTES:
            raise RequestTooLarge(f"An import has at most {MOST_BYTES} bytes.", close=True)
        yield part
