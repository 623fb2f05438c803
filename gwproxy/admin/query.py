"""Checked parameters of a query: what a report is about, and which page of it.

Whatever is wrong is a 400 that names the parameter in words of our own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Final

import msgspec

from gwproxy.admin.body import wrong
from gwproxy.core.identity import is_id
from gwproxy.core.period import DAY_MS, end_ms

_LONGEST_NAME: Final = 200
_LONGEST_CURSOR: Final = 2000
_EPOCH: Final = date(1970, 1, 1).toordinal()
_MONTH: Final = re.compile(r"(19[7-9][0-9]|[2-8][0-9]{3})-(0[1-9]|1[0-2])")
"""From 1970 on, and not so far that a calendar would end."""
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Query:
    """The parameters of one request. Which there are, a Struct says; what each may be, is said
    here."""

    def __init__(self, sent: msgspec.Struct) -> None:
        self._sent: dict[str, str] = {
            name: value for name, value in msgspec.to_builtins(sent).items() if value is not None
        }

    def id(self, name: str) -> str | None:
        value = self._sent.get(name)
        if value is not None and not is_id(value):
            raise wrong(name, "must be 1 to 64 characters out of A-Z, a-z, 0-9, _ and -")
        return value

    def name(self, name: str) -> str | None:
        value = self._sent.get(name)
        if value is not None and not (0 < len(value) <= _LONGEST_NAME and value.isprintable()):
            raise wrong(name, f"must be 1 to {_LONGEST_NAME} printable characters")
        return value

    # -- where to go on --------------------------------------------------------------------------

    def cursor(self, *types: type) -> tuple[Any, ...]:
        """The key after which the page begins, made by `cursor_of`; empty for the first page."""
        value = self._sent.get("cursor", "")
        if not value:
            return ()
        try:
            if len(value) > _LONGEST_CURSOR:
                raise ValueError(value)
            return msgspec.json.decode(bytes.fromhex(value), type=tuple[types])  # type: ignore[valid-type]
        except ValueError as error:
            raise wrong("cursor", "must be the `next_cursor` of the page before") from error

    # -- spans of time ---------------------------------------------------------------------------

    def month(self, default: str) -> str:
        value = self._sent.get("month", default)
        if not _MONTH.fullmatch(value):
            raise wrong("month", 'must be a month such as "2026-11"')
        return value

    def days(self, now_ms: int) -> "Days":
        """`month`, or `from` and `to`, dates that are both included; this month by default."""
        if "month" in self._sent and ("from" in self._sent or "to" in self._sent):
            raise wrong("month", "cannot be combined with `from` and `to`")
        today = now_ms // DAY_MS
        this_month = _date(today).isoformat()[:7]
        month = self.month(this_month)
        begin = _day(date.fromisoformat(f"{month}-01"))
        end = end_ms(month) // DAY_MS - 1
        if "month" not in self._sent and "to" in self._sent:
            end = self._date("to")
            begin = _day(_date(end).replace(day=1))
        if "from" in self._sent:
            begin = self._date("from")
            if "to" not in self._sent:
                end = max(begin, today)
        if begin > end:
            raise wrong("from", "must not be after `to`")
        return Days(begin, end)

    def _date(self, name: str) -> int:
        try:
            if not _DATE.fullmatch(self._sent[name]):
                raise ValueError(name)
            return _day(date.fromisoformat(self._sent[name]))
        except ValueError as error:
            raise wrong(name, 'must be a date such as "2026-11-21"') from error

    def moment(self, name: str, default: int) -> int:
        """Milliseconds since 1970, of a time with its zone or of a date: of its beginning, and of
        `to` its end."""
        value = self._sent.get(name)
        if value is None:
            return default
        if _DATE.fullmatch(value):
            return (self._date(name) + (name == "to")) * DAY_MS
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                raise ValueError(name)
            return int(moment.timestamp() * 1000)
        except (ValueError, OverflowError) as error:
            words = 'must be a date such as "2026-11-21" or a time such as "2026-11-21T12:00:00Z"'
            raise wrong(name, words) from error


@dataclass(frozen=True, slots=True)
class Days:
    """Both included, counted from 1970-01-01."""

    first: int
    last: int

    def json(self) -> dict[str, str]:
        return {"from": day_out(self.first), "to": day_out(self.last)}


def cursor_of(key: Sequence[Any]) -> str:
    return msgspec.json.encode(key).hex()


def day_out(day: int) -> str:
    return _date(day).isoformat()


def _day(of: date) -> int:
    return of.toordinal() - _EPOCH


def _date(day: int) -> date:
    return date.fromordinal(day + _EPOCH)
