"""Numbers, money, words and paths: each parser takes what was found and gives the value.

Rule of the room: a parser knows its value alone; the reader adds the file and the key.
"""

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from gwproxy.config.problems import Wrong, between, kind, show
from gwproxy.config.values import Parse, Raw
from gwproxy.core.money import Nanos, parse_rate, parse_usd


def flag(raw: Raw) -> bool:
    if raw.variable is not None and raw.text().lower() in ("true", "false"):
        return raw.text().lower() == "true"
    if isinstance(raw.value, bool):
        return raw.value
    raise Wrong(f"must be true or false, not {show(raw.value)}", "write true or false, no quotes")


def whole(low: int, high: int) -> Parse[int]:
    def parse(raw: Raw) -> int:
        value = raw.value
        # Bounded in length because Python refuses to convert very long numerals.
        if raw.variable is not None and re.fullmatch(r"[+-]?[0-9]{1,18}", raw.text()):
            value = int(raw.text())
        if not isinstance(value, int) or isinstance(value, bool):
            raise Wrong(f"must be a whole number, not {show(value)}", between(low, high))
        if not low <= value <= high:
            raise Wrong(f"{show(value)} is out of range", between(low, high))
        return value

    return parse


def seconds(low: str, high: int) -> Parse[float]:
    lowest = Decimal(low)

    def parse(raw: Raw) -> float:
        value = _decimal(raw)
        if value is None or not value.is_finite():
            raise Wrong(f"must be a number, not {show(raw.value)}", between(low, high))
        if not lowest <= value <= high:
            raise Wrong(f"{show(raw.value)} is out of range", between(low, high))
        return float(value)

    return parse


def usd(raw: Raw) -> Nanos:
    value = raw.value
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise Wrong(f"must be an amount, not {kind(value)}", 'write USD such as "12.50"')
    try:
        return parse_usd(value.strip() if isinstance(value, str) else value)
    except ValueError as error:
        what = f"{show(value)} is not an amount of money ({error})"
        raise Wrong(what, 'write USD such as "12.50"') from None


def rate(raw: Raw) -> Decimal:
    cure = 'write USD per million tokens such as "0.15"'
    value = raw.value
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise Wrong(f"must be a price, not {kind(value)}", cure)
    try:
        text = value.strip() if isinstance(value, str) else value
        parse_rate(text)
        return Decimal(text)
    except (ValueError, InvalidOperation) as error:
        raise Wrong(f"{show(value)} is not a price ({error})", cure) from None


def one_of(*choices: str) -> Parse[str]:
    listed = ", ".join(f'"{choice}"' for choice in choices)

    def parse(raw: Raw) -> str:
        text = raw.text()
        if text not in choices:
            raise Wrong(f"{show(text)} is not known", f"write one of {listed}")
        return text

    return parse


def matching(pattern: str, form: str) -> Parse[str]:
    compiled = re.compile(pattern)

    def parse(raw: Raw) -> str:
        text = raw.text().strip()
        if not compiled.fullmatch(text):
            raise Wrong(f"{show(text)} has the wrong form", form)
        return text

    return parse


def state_path(raw: Raw) -> Path:
    return raw.place.state_folder / _path(raw)


def existing_file(raw: Raw) -> Path:
    path = raw.place.folder / _path(raw)
    if not path.is_file():
        raise Wrong(f"there is no file {path}", "correct the path or leave the key out")
    return path


def _path(raw: Raw) -> str:
    text = raw.text()
    if not text.strip() or "\0" in text:
        raise Wrong("is not a path", "name a file or folder")
    return text


def _decimal(raw: Raw) -> Decimal | None:
    value = raw.value
    if raw.variable is not None:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?", raw.text()):
            return None
        return Decimal(raw.text())
    if isinstance(value, Decimal):
        return value
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else None
