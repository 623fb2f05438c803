"""Checked input and plain output of the admin plane: bodies, amounts, times, pages.

Whatever is wrong is a 400 that names the field in words of our own: neither what was sent nor what
a library says about it is repeated.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Annotated, Any, Final, TypeVar

import msgspec

from gwproxy.core.errors import InvalidRequest
from gwproxy.core.identity import is_id
from gwproxy.core.money import (
    MAX_USD,
    MAX_USD_PER_MTOK,
    Nanos,
    Picos,
    format_usd,
    parse_rate,
    parse_usd,
)
from gwproxy.core.request import FEATURES

MOST_PER_PAGE: Final = 1000
PER_PAGE: Final = 100
_TEXT_LIMIT_CHARS: Final = 200
_LONGEST_COUNT: Final = 10**9
_MOST_LOOKED_AT: Final = 5_000
"""Rows of a list in one go: 2 ms."""
_SHAPED_AT_ONCE: Final = 100
"""Rows made into what the API shows, in one turn of the loop: 1 to 2 ms."""

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
R = TypeVar("R")

# -- the types of fields -------------------------------------------------------------------------

Count = Annotated[int, msgspec.Meta(ge=1, le=_LONGEST_COUNT)]
"""A limit that counts. 0 is refused: some would mean "nothing" by it and others "no limit"."""

PerPage = Annotated[int, msgspec.Meta(ge=1, le=MOST_PER_PAGE)]

Moment = Annotated[datetime, msgspec.Meta(tz=True)]

_USD_PATTERN: Final = r"^([0-9]{1,9}(\.[0-9]{1,9})?|10{9}(\.0{1,9})?)$"

Usd = Annotated[
    msgspec.Raw,
    msgspec.Meta(
        description="USD: a decimal string or a number, read digit by digit; at most 9 decimals. "
        "null: no limit.",
        extra_json_schema={
            "anyOf": [
                {"type": "string", "pattern": _USD_PATTERN},
                {"type": "number", "minimum": 0, "maximum": MAX_USD},
                {"type": "null"},
            ]
        },
    ),
]
"""An amount as it was written, for `usd` to read: through a float it would lose digits."""

SomeUsd = Annotated[
    msgspec.Raw,
    msgspec.Meta(
        description="USD above 0: a decimal string or a number, read digit by digit; at most 9 "
        "decimals.",
        extra_json_schema={
            "anyOf": [
                {
                    "type": "string",
                    "pattern": _USD_PATTERN,
                    # Not all of its digits are 0. A look-ahead is what not every client can read.
                    "not": {"pattern": r"^[0.]*$"},
                },
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_USD},
            ]
        },
    ),
]

_RATE_PATTERN: Final = r"^([0-9]{1,6}(\.[0-9]{1,6})?|10{6}(\.0{1,6})?)$"

UsdRate = Annotated[
    msgspec.Raw,
    msgspec.Meta(
        description="USD per million tokens: a decimal string or a number; at most 6 decimals.",
        extra_json_schema={
            "anyOf": [
                {"type": "string", "pattern": _RATE_PATTERN},
                {"type": "number", "minimum": 0, "maximum": MAX_USD_PER_MTOK},
            ]
        },
    ),
]

Id = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": "^[A-Za-z0-9_-]{1,64}$"})]

_TEXT_PATTERN: Final = (
    r"^[^\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb]+$"
)
"""No control, and nothing that turns the direction around or is not to be seen. The two joiners are
letters' own in Persian and in the languages of India, and make one emoji of several."""

Text = Annotated[
    str,
    msgspec.Meta(
        description=f"1 to {_TEXT_LIMIT_CHARS} printable characters",
        extra_json_schema={
            "minLength": 1,
            "maxLength": _TEXT_LIMIT_CHARS,
            "pattern": _TEXT_PATTERN,
        },
    ),
]
Email = Annotated[str, msgspec.Meta(extra_json_schema={"format": "email", "maxLength": 254})]

UNSET: Final = msgspec.UNSET
Unset = msgspec.UnsetType
"""A field that was not sent: of a change, one that stays as it is."""

# -- and of what is shown ------------------------------------------------------------------------

ShownUsd = Annotated[
    str,
    msgspec.Meta(
        description="USD with nine decimals.",
        extra_json_schema={"pattern": r"^-?[0-9]+\.[0-9]{9}$"},
    ),
]
ShownTime = Annotated[
    str, msgspec.Meta(description="RFC 3339, UTC.", extra_json_schema={"format": "date-time"})
]

_WORDS: Final = {
    "rpm": f"must be a whole number from 1 to {_LONGEST_COUNT}, or null for no limit",
    "tpm": f"must be a whole number from 1 to {_LONGEST_COUNT}, or null for no limit",
    "max_parallel": f"must be a whole number from 1 to {_LONGEST_COUNT}, or null for no limit",
    "status": 'must be "active" or "suspended"',
    "expires_at": 'must be a time with its zone, such as "2027-01-31T12:00:00Z", or null',
    "allowed_models": "must be a list of model names, or null for every model",
    "allowed_features": f"must be a list of these: {', '.join(FEATURES)}",
    "prices": 'must be an object such as {"openai/gpt-4o":{"input":"2.50","output":"10"}}',
    "failure_mode": 'must be "open" or "closed", or null for the configured one',
    "unbounded_policy": 'must be "clamp", "strict" or "bounded"',
    "on_exhausted": 'must be "cut" or "finish"',
    "on_client_gone": 'must be "close" or "drain"',
    "cache": "must be true or false",
    "scope": 'must be "read" or "write"',
    "grace_s": "must be a whole number of seconds, from 0 to 7776000",
    "limit": f"must be a whole number from 1 to {MOST_PER_PAGE}",
    "deleted": "must be 0 or 1",
    "dry_run": "must be 0 or 1",
}

# -- bodies --------------------------------------------------------------------------------------


def decode(body: bytes, shape: type[T]) -> T:
    """`body` as a msgspec Struct; InvalidRequest names the first field that is wrong.

    No body at all means that every field has its default.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=shape)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), shape, "field") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(NOT_JSON, code="invalid_json") from error


NOT_JSON: Final = "The body is not valid JSON."


def query(sent: Iterable[tuple[str, str]], shape: type[S]) -> S:
    """The parameters of a query, checked like a body. One that is not known is an error, and so is
    one that is there twice: no surprise."""
    found: dict[str, str] = {}
    for name, value in sent:
        if name in found and name in shape.__struct_encode_fields__:
            raise wrong(name, "is there twice")
        found[name] = value
    try:
        return msgspec.convert(found, shape, strict=False)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), shape, "parameter") from error


_AT = re.compile(r" - at `\$\.([A-Za-z0-9_]+)[^`]*`$")
_MISSING = re.compile(r"missing required field `([A-Za-z0-9_]+)`")
_UNKNOWN = re.compile(r"unknown field `([A-Za-z0-9_.-]{1,64})`")


def _field_error(words: str, shape: type[Any], what: str) -> InvalidRequest:
    if at := _AT.search(words):
        name = at[1]
        return wrong(name, _WORDS.get(name) or _choices(shape, name) or "must be text, or null")
    if missing := _MISSING.search(words):
        name = missing[1]
        return InvalidRequest(
            f"`{name}` is required.", param=name, code="missing_required_parameter"
        )
    if "unknown field" in words:
        # Repeated only when it looks like a field's name, never as the free text it may be.
        unknown = _UNKNOWN.search(words)
        if unknown is None:
            return InvalidRequest(f"There is a {what} that is not known here.")
        near = get_close_matches(unknown[1], shape.__struct_encode_fields__, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return InvalidRequest(f"`{unknown[1]}` is not a {what} here.{hint}", param=unknown[1])
    return InvalidRequest("The body must be a JSON object.", code="invalid_json")


def _choices(shape: type[Any], name: str) -> str | None:
    """What this field may be, where its type has a few values."""
    for field in msgspec.structs.fields(shape):
        if field.encode_name == name:
            found = msgspec.inspect.type_info(field.type)
            for kind in found.types if isinstance(found, msgspec.inspect.UnionType) else [found]:
                if isinstance(kind, msgspec.inspect.LiteralType):
                    return f"must be one of {', '.join(map(str, kind.values))}"
                if isinstance(kind, msgspec.inspect.EnumType):
                    return f"must be one of {', '.join(each.value for each in kind.cls)}"
    return None


def wrong(field: str, words: str) -> InvalidRequest:
    return InvalidRequest(f"`{field}` {words}.", param=field)


_LAST_SECOND: Final = 253_402_300_799
"""9999-12-31T23:59:59Z. A time zone can push a moment beyond what may be written as a date."""

# -- fields that a type alone does not check -----------------------------------------------------


def idempotency_key(value: str) -> str:
    if not (0 < len(value) <= _TEXT_LIMIT_CHARS and value.isascii() and value.isprintable()):
        raise wrong(
            "Idempotency-Key", f"must be 1 to {_TEXT_LIMIT_CHARS} printable characters of ASCII"
        )
    return value


def usd(field: str, raw: msgspec.Raw) -> Nanos | None:
    """An amount: a decimal string, or a JSON number read digit by digit; null is None."""
    written = bytes(raw)
    if written == b"null":
        return None
    return _exact(field, written, parse_usd, _USD)


def rate(field: str, written: bytes) -> Picos:
    """A price, read in the same way."""
    return _exact(field, written, parse_rate, _RATE)


_USD: Final = re.compile(_USD_PATTERN)
_RATE: Final = re.compile(_RATE_PATTERN)
_PLAIN: Final = 'must be a decimal number such as "12.34"'


def _exact(field: str, written: bytes, parse: Callable[[str], R], plain: re.Pattern[str]) -> R:
    """Give `parse` the digits of a JSON number, or of a string that is `plain`; its ValueError
    becomes ours."""
    text = written.decode("utf-8", "replace")
    quoted = text[:1] == '"'
    try:
        if quoted:
            text = msgspec.json.decode(written, type=str)
    except ValueError as error:
        raise wrong(field, _PLAIN) from error
    try:
        found = parse(text)
    except ValueError as error:
        raise wrong(field, str(error)) from error
    if quoted and not plain.fullmatch(text):
        raise wrong(field, _PLAIN)
    return found


def identifier(field: str, value: str | None) -> str | None:
    if value is not None and not is_id(value):
        raise wrong(field, "must be 1 to 64 characters out of A-Z, a-z, 0-9, _ and -")
    return value


def text(field: str, value: str | None) -> str | None:
    """A name that people read: one line, and nothing that could disguise it."""
    if value is None or _is_text(value):
        return value
    raise wrong(field, f"must be 1 to {_TEXT_LIMIT_CHARS} printable characters, or null")


def _is_text(value: str) -> bool:
    return len(value) <= _TEXT_LIMIT_CHARS and _TEXT.fullmatch(value) is not None


_TEXT: Final = re.compile(_TEXT_PATTERN)


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


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which part of a list; filters are added by those who have some."""

    limit: PerPage = PER_PAGE
    cursor: Annotated[str, msgspec.Meta(description="`next_cursor` of the page before")] = ""
    deleted: Annotated[bool, msgspec.Meta(description="deleted and revoked ones too")] = False


class Shown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one row."""

    deleted: Annotated[bool, msgspec.Meta(description="also if it is deleted or revoked")] = False


async def listing(
    rows: Iterable[R],
    page: Page,
    wanted: Callable[[R], bool],
    shape: Callable[[R], T],
    id_of: Callable[[R], str],
) -> tuple[list[T], str | None]:
    """The first rows of what comes after the cursor, and where to go on, if there is more.

    Those not `wanted` are passed over. After so many rows the page ends early: the rest of a long
    list waits for the next one, and the streams do not. All are chosen in one turn of the loop, so
    that a change meanwhile neither doubles nor skips one.
    """
    chosen: list[R] = []
    last: str | None = None
    more: str | None = None
    for number, row in enumerate(rows):
        if len(chosen) == page.limit or number == _MOST_LOOKED_AT:
            more = last
            break
        if wanted(row):
            chosen.append(row)
        last = id_of(row)
    return await in_turns(chosen, shape), more


async def in_turns(rows: Sequence[R], shape: Callable[[R], T]) -> list[T]:
    """Each row's shape; the streams have their turn between every hundred of them."""
    shaped: list[T] = []
    for start in range(0, len(rows), _SHAPED_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        shaped += [shape(row) for row in rows[start : start + _SHAPED_AT_ONCE]]
    return shaped


def cursor(page: Page) -> str:
    """The last id of the page before, or empty."""
    if page.cursor and not is_id(page.cursor):
        raise wrong("cursor", "must be the `next_cursor` of the page before")
    return page.cursor


# -- output --------------------------------------------------------------------------------------


def usd_out(amount: Nanos | None) -> str | None:
    return None if amount is None else format_usd(amount)


def time_out(unix_s: int | None) -> str | None:
    return None if unix_s is None else time_of(unix_s)


def time_of(unix_s: int) -> str:
    """RFC 3339 in UTC, such as `2026-11-05T12:00:00Z`."""
    # A long list has thousands of them, and strftime takes five times as long.
    return f"{datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]}Z"
