"""Tables as bytes: NDJSON and CSV, cut into their rows as they come, and written so that no
spreadsheet runs what is in them.

Nothing here is kept but the row at hand. What a row means is said elsewhere.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Final

import orjson

from gwproxy.core.errors import InvalidRequest

LONGEST_ROW_BYTES: Final = 256 * 1024
"""As much as a single body may have. A quote that is never closed ends here."""

_DELIMITERS: Final = ",;\t"
"""What spreadsheets write, by the country they are in."""


class Format(StrEnum):
    NDJSON = "ndjson"
    CSV = "csv"


MEDIA_TYPES: Final[Mapping[Format, str]] = {
    Format.NDJSON: "application/x-ndjson",
    Format.CSV: "text/csv",
}


class BadRow(Exception):
    """One that cannot be read. The message says why."""


class Cutter:
    """Cuts a body into rows: (number of its first line, its text)."""

    def __init__(self, form: Format) -> None:
        self._quoted = form is Format.CSV
        self._rest = b""
        self._row = b""
        self._begun = 0
        self._line = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            yield from self._take(line + b"\n")
        self._check(len(self._rest) + len(self._row))

    def end(self) -> Iterator[tuple[int, bytes]]:
        if self._rest:
            yield from self._take(self._rest)
        if self._row.strip():
            yield self._begun, self._row

    def _take(self, line: bytes) -> Iterator[tuple[int, bytes]]:
        self._line += 1
        if self._line == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # as Windows begins its text files
        if not self._row:
            self._begun = self._line
        self._row += line
        self._check(len(self._row))
        # RFC 4180: within quotes a line may end, and a quote is written twice.
        if self._quoted and self._row.count(b'"') % 2:
            return
        row, self._row = self._row, b""
        if row.strip():
            yield self._begun, row

    def _check(self, length: int) -> None:
        if length > LONGEST_ROW_BYTES:
            raise InvalidRequest(
                f"The row that begins in line {max(1, self._begun)} is longer than "
                f"{LONGEST_ROW_BYTES} bytes: a quote may not be closed, or this is no such file.",
                close=True,
            )


def text_of(row: bytes) -> str:
    try:
        return row.decode()
    except UnicodeDecodeError:
        raise BadRow("This is not UTF-8: save the file as UTF-8.") from None


class Columns:
    """The header of a CSV file, and how its rows are read."""

    def __init__(self, header: str, known: Iterable[str]) -> None:
        """InvalidRequest names a column that is not `known`."""
        counts = {each: header.count(each) for each in _DELIMITERS}
        self._delimiter = max(counts, key=lambda each: counts[each])
        names = [*known]
        self.names = [name.strip().lower() for name in self._cells(header)]
        for name in self.names:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                shown = f"`{name}`" if re.fullmatch(r"[a-z0-9_ .-]{1,64}", name) else "One of them"
                raise InvalidRequest(
                    f"{shown} is not a column here.{hint} There are {', '.join(names)}.",
                    param=name if shown[0] == "`" else None,
                )
            if self.names.count(name) > 1:
                raise InvalidRequest(f"There are two columns `{name}`.", param=name)

    def read(self, row: str) -> dict[str, str]:
        cells = self._cells(row)
        if len(cells) != len(self.names):
            raise BadRow(f"There are {len(self.names)} columns, and {len(cells)} fields here.")
        return {name: restored(cell) for name, cell in zip(self.names, cells, strict=True)}

    def _cells(self, row: str) -> list[str]:
        try:
            [cells] = csv.reader([row], delimiter=self._delimiter, strict=True)
        except (csv.Error, ValueError):
            raise BadRow("The quotes of this row are not in order.") from None
        return cells


_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet take text for a formula (OWASP, CSV Injection)."""

_AMOUNT: Final = "_usd"
"""So the names of columns end that have numbers written as text: these are never escaped, for a
spreadsheet has to add them up."""


def neutral(cell: str) -> str:
    """Text that no spreadsheet runs: it takes what follows an apostrophe for text.

    Text that has apostrophes before its formula gets one more, or `restored` would take its own.
    """
    return f"'{cell}" if cell.lstrip("'").startswith(_FORMULA) else cell


def restored(cell: str) -> str:
    """What `neutral` had been given."""
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'").startswith(_FORMULA) else cell


def csv_line(cells: Iterable[Any]) -> bytes:
    """One row, lists and objects as JSON, with the line end that RFC 4180 asks for."""
    return _written(_cell(each) for each in cells)


def csv_row(columns: Iterable[str], cells: Iterable[Any]) -> bytes:
    """The same under these columns, amounts as the numbers they are."""
    return _written(
        each if name.endswith(_AMOUNT) else _cell(each)
        for name, each in zip(columns, cells, strict=True)
    )


def _written(cells: Iterable[Any]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().encode()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        return neutral(value)
    if isinstance(value, (list, tuple, dict)):
        return orjson.dumps(value).decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    return value
