"""Checked input and plain output of the admin plane: bodies, amounts, times, pages.

Whatever is wrong is a 400 that names the field in words of our own: neither what was sent nor what
a library says about it is repeated.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Annotated, Any, Final, TypeVar

import msgspec
import orjson
from aiohttp import web

from gwproxy.core.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType
from gwproxy.core.identity import is_id
from gwproxy.core.money import Nanos, format_usd, parse_usd

BODY_LIMIT_BYTES: Final = 256 * 1024
"""A single row, or an organization with a few hundred prices. Whole directories go by import."""

MOST_PER_PAGE: Final = 1000
_PER_PAGE: Final = 100
_TEXT_LIMIT_CHARS: Final = 200
_LONGEST_COUNT: Final = 10**9

T = TypeVar("T")
R = TypeVar("R")

# -- the types of fields -------------------------------------------------------------------------

Count = Annotated[int, msgspec.Meta(ge=1, le=_LONGEST_COUNT)]
"""A limit that counts. 0 is refused: some would mean "nothing" by it and others "no limit"."""

Moment = Annotated[datetime, msgspec.Meta(tz=True)]

Usd = msgspec.Raw
"""An amount as it was written, for `usd` to read: through a float it would lose digits."""

NULL: Final = msgspec.Raw(b"null")

_WORDS: Final = {
    "rpm": f"must be a whole number from 1 to {_LONGEST_COUNT}, or null for no limit",
    "tpm": f"must be a whole number from 1 to {_LONGEST_COUNT}, or null for no limit",
    "max_parallel": f"must be a whole number from 1 to {_LONGEST_COUNT}, or null for no limit",
    "status": 'must be "active" or "suspended"',
    "expires_at": 'must be a time with its zone, such as "2027-01-31T12:00:00Z", or null',
    "allowed_models": "must be a list of model names, or null for every model",
    "allowed_features": "must be a list of names",
    "prices": 'must be an object such as {"openai/gpt-4o":{"input":"2.50","output":"10"}}',
    "failure_mode": 'must be "open" or "closed", or null for the configured one',
    "unbounded_policy": 'must be "clamp", "strict" or "bounded"',
    "on_exhausted": 'must be "cut" or "finish"',
    "on_client_gone": 'must be "close" or "drain"',
    "cache": "must be true or false",
}

# -- bodies --------------------------------------------------------------------------------------


async def read(request: web.BaseRequest) -> bytes:
    """The body, if it is not larger than any admin body has to be."""
    if (request.content_length or 0) > BODY_LIMIT_BYTES:
        raise _too_large()
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > BODY_LIMIT_BYTES:
            raise _too_large()
    # A browser sends JSON to another site only after having asked; text or a form it just sends.
    if body and request.content_type != "application/json":
        raise UnsupportedMediaType("The body must be sent as Content-Type: application/json.")
    return bytes(body)


def _too_large() -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {BODY_LIMIT_BYTES} bytes.", close=True)


def decode(body: bytes, shape: type[T]) -> T:
    """`body` as a msgspec Struct; InvalidRequest names the first field that is wrong.

    No body at all means that every field has its default.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=shape)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), shape) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("The body is not valid JSON.", code="invalid_json") from error


_AT = re.compile(r" - at `\$\.([A-Za-z0-9_]+)[^`]*`$")
_UNKNOWN = re.compile(r"unknown field `([A-Za-z0-9_.-]{1,64})`")


def _field_error(words: str, shape: type[Any]) -> InvalidRequest:
    if at := _AT.search(words):
        name = at[1]
        return wrong(name, _WORDS.get(name, "must be text, or null"))
    if "unknown field" in words:
        # Repeated only when it looks like a field's name, never as the free text it may be.
        unknown = _UNKNOWN.search(words)
        if unknown is None:
            return InvalidRequest("The body has an unknown field.")
        near = get_close_matches(unknown[1], shape.__struct_fields__, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return InvalidRequest(f"`{unknown[1]}` is not a field here.{hint}", param=unknown[1])
    return InvalidRequest("The body must be a JSON object.", code="invalid_json")


def wrong(field: str, words: str) -> InvalidRequest:
    return InvalidRequest(f"`{field}` {words}.", param=field)


_LAST_SECOND: Final = 253_402_300_799
"""9999-12-31T23:59:59Z. A time zone can push a moment beyond what may be written as a date."""

# -- fields that a type alone does not check -----------------------------------------------------


def usd(field: str, raw: msgspec.Raw) -> Nanos | None:
    """An amount: a decimal string, or a JSON number read digit by digit; null is None."""
    written = bytes(raw)
    if written == b"null":
        return None
    return exact(field, written, parse_usd)


def exact(field: str, written: bytes, parse: Callable[[str], R]) -> R:
    """Give `parse` the digits of a JSON string or number; its ValueError becomes ours."""
    text = written.decode("utf-8", "replace")
    if text[:1] == '"':
        try:
            text = msgspec.json.decode(written, type=str)
        except ValueError as error:
            raise wrong(field, 'must be a decimal number such as "12.34"') from error
    try:
        return parse(text)
    except ValueError as error:
        raise wrong(field, str(error)) from error


def identifier(field: str, value: str | None) -> str | None:
    if value is not None and not is_id(value):
        raise wrong(field, "must be 1 to 64 characters out of A-Z, a-z, 0-9, _ and -")
    return value


def text(field: str, value: str | None) -> str | None:
    """A name that people read: one line, nothing invisible that could disguise it."""
    if value is None or _is_text(value):
        return value
    raise wrong(field, f"must be 1 to {_TEXT_LIMIT_CHARS} printable characters, or null")


def _is_text(value: str) -> bool:
    return 0 < len(value) <= _TEXT_LIMIT_CHARS and value.isprintable()


_EMAIL = re.compile(r"[^@\s,;<>\"]{1,64}@[^@\s,;<>\"]{1,189}")


def email(field: str, value: str | None) -> str | None:
    """Nothing is ever sent there: it only has to look like an address and to be one line."""
    if value is None or (_EMAIL.fullmatch(value) and value.isprintable()):
        return value
    raise wrong(field, 'must be an e-mail address such as "ann@example.org", or null')


def names(field: str, values: list[str] | None, *, most: int = 1000) -> tuple[str, ...] | None:
    if values is None:
        return None
    if len(values) > most:
        raise wrong(field, f"must have at most {most} entries")
    if not all(_is_text(value) for value in values):
        raise wrong(field, f"must have names of 1 to {_TEXT_LIMIT_CHARS} printable characters")
    return tuple(dict.fromkeys(values))


def seconds(field: str, moment: datetime | None) -> int | None:
    """Unix seconds, rounded down: a key never lives longer than it was told to."""
    if moment is None:
        return None
    unix_s = int(moment.timestamp() // 1)
    if unix_s > _LAST_SECOND:
        raise wrong(field, _WORDS[field])
    return unix_s


# -- lists ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    limit: int
    cursor: str
    """The last id of the page before, or empty."""
    deleted: bool


def page(request: web.BaseRequest) -> Page:
    """`?limit=&cursor=&deleted=1`; anything else in the query is an error, not a surprise."""
    query = request.query
    for name in query:
        if name not in ("limit", "cursor", "deleted"):
            raise InvalidRequest("Lists know the parameters limit, cursor and deleted.")
    limit = query.get("limit", str(_PER_PAGE))
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= MOST_PER_PAGE:
        raise wrong("limit", f"must be a whole number from 1 to {MOST_PER_PAGE}")
    cursor = query.get("cursor", "")
    if cursor and not is_id(cursor):
        raise wrong("cursor", "must be the `next_cursor` of the page before")
    deleted = query.get("deleted", "0")
    if deleted not in ("0", "1"):
        raise wrong("deleted", "must be 0 or 1")
    return Page(int(limit), cursor, deleted == "1")


def listing(
    rows: Iterable[T], page: Page, shape: Callable[[T], dict[str, Any]], id_of: Callable[[T], str]
) -> dict[str, Any]:
    """The first rows of what comes after the cursor, and where to go on, if there is more."""
    data: list[dict[str, Any]] = []
    last = None
    for row in rows:
        if len(data) == page.limit:
            return {"data": data, "next_cursor": last}
        data.append(shape(row))
        last = id_of(row)
    return {"data": data, "next_cursor": None}


# -- output --------------------------------------------------------------------------------------


def answer(status: int, value: object) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(value),
        content_type="application/json",
        # Keys and limits belong into no cache on the way.
        headers={"Cache-Control": "no-store"},
    )


def no_content() -> web.Response:
    return web.Response(status=204, headers={"Cache-Control": "no-store"})


def usd_out(amount: Nanos | None) -> str | None:
    return None if amount is None else format_usd(amount)


def time_out(unix_s: int | None) -> str | None:
    """RFC 3339 in UTC, such as `2026-11-05T12:00:00Z`."""
    if unix_s is None:
        return None
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
