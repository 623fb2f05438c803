"""What can go wrong with a configuration, and in which words it is told.

Rule of the room: a problem has its place, what is wrong and the cure; of a value no more is shown
than fits on one line, and nothing unprintable.
"""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to correct: `file` is a path or "environment", `key` dotted or a variable."""

    file: str
    key: str
    what: str
    cure: str

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else self.file
        return f"{place}: {self.what}; {self.cure}"


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has all of them, `str()` one on each line."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class Wrong(Exception):
    """Raised by a parser about its value alone; the reader adds the file and the key."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what)
        self.what = what
        self.cure = cure


def kind(value: object) -> str:
    """A TOML type in words."""
    words: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),
        (int, "a number"),
        (Decimal, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "a table"),
    )
    return next((word for kind, word in words if isinstance(value, kind)), "a date or time")


def show(value: object) -> str:
    """A value for an error's text: short, on one line, nothing unprintable."""
    if isinstance(value, str):
        short = value if len(value) <= 60 else value[:57] + "..."
        return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short) + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if -(10**18) < value < 10**18 else "a huge number"
    if isinstance(value, Decimal):
        text = format(value, "g") if not value.is_finite() or -30 < value.adjusted() < 30 else ""
        return text[:60] or "a number of absurd size"
    return kind(value)


def between(low: int | str, high: int) -> str:
    return f"write a number from {low} to {high}"


def dotted(*steps: str) -> str:
    return ".".join(one if re.fullmatch(r"[A-Za-z0-9_-]+", one) else show(one) for one in steps)


def nearest(word: str, known: Collection[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return near[0] if near else None
