"""How the commands print what they found: tables for people, JSON for programs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import orjson


def say(words: str) -> None:
    """To the person at the terminal: stdout is for what was asked for."""
    print(words, file=sys.stderr)


def print_json(value: object) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a row under its names; numbers to the right. The first row says which columns."""
    if not rows:
        return []
    names = list(rows[0])
    cells = [[name.upper().replace("_", " ") for name in names]]
    cells += [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(names))]
    right = [
        all(_is_figure(row.get(name)) for row in rows if row.get(name) is not None)
        for name in names
    ]
    return [
        "  ".join(
            f"{cell:>{width}}" if to_right else f"{cell:<{width}}"
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _is_figure(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, str) and value[:1] in ("$", "+", "-"))
