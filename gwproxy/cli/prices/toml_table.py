"""One table of a TOML text: found, replaced or removed; every other byte stays as it is. Pure."""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

_NAME = r"""(?:"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[A-Za-z0-9_-]+)"""
_NAMES = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_STATEMENT = re.compile(
    rf"[ \t]*(?:\[\[?[ \t]*(?P<table>{_NAMES})|(?P<key>{_NAMES})[ \t]*=[ \t]*)?"
)
"""How a line begins that does not go on with the value of an earlier one. Matches every line."""

_WORD = re.compile(
    r"""
      "{3}(?:\\.|[^\\])*?"{3,5} | '{3}.*?'{3,5}         # text over several lines
    | "(?:\\.|[^"\\\n])*" | '[^'\n]*'
    | [\[\]{}] | \#[^\n]* | \n
    """,
    re.VERBOSE | re.DOTALL,
)
"""What decides where a value ends; whatever stands between two of these is part of it."""


@dataclass(frozen=True, slots=True)
class _Statement:
    """A `[table]` or a `key = value`: its names from the root on, and where it stands."""

    path: tuple[str, ...]
    start: int
    end: int
    """Past its last line's end, comment and line break included."""
    before: str = ""
    """What stands on its line before the last of its names."""
    value: tuple[int, int] | None = None
    """None for a `[table]`."""


def with_price(text: str, name: str, wanted: Mapping[str, str] | None) -> str:
    """A TOML text in which `[prices.models."NAME"]` has exactly the keys `wanted`, whose values
    are TOML; None takes the table out. Lines that are not its own stay as they are, and so do the
    comments on those of its lines that stay.

    The text must be valid TOML. ValueError where the table cannot be edited by lines.
    """
    place = ("prices", "models", name)
    statements = list(_statements(text))
    for one in statements:
        if one.value and len(one.path) < len(place) and one.path == place[: len(one.path)]:
            raise ValueError(
                f"{'.'.join(one.path)} is written as one value, {{ ... }}: "
                'write it as [prices.models."provider/model"], a table for each model'
            )
    own = [one for one in statements if one.path[: len(place)] == place]
    line_break = "\r\n" if "\r\n" in text else "\n"
    if wanted is None:
        edits = [(one.start, one.end, "") for one in own]
        unbroken = all(one.end == following.start for one, following in pairwise(own))
        if own and own[0].value is None and unbroken:
            before, after = text[: own[0].start], text[own[-1].end :]
            if before.endswith(line_break * 2) and (not after or after.startswith(line_break)):
                # The empty line before the table parts nothing any more.
                edits.append((own[0].start - len(line_break), own[0].start, ""))
        return _edited(text, edits)
    if own and own[0].value and own[0].path == place:
        pairs = ", ".join(f"{key} = {value}" for key, value in wanted.items())
        return _edited(text, [(*own[0].value, f"{{ {pairs} }}")])
    edits, known = [], set()
    for one in own:
        if one.value:
            key = one.path[-1]
            known.add(key)
            gone = (one.start, one.end, "")
            edits.append((*one.value, wanted[key]) if key in wanted else gone)
    lines = [f"{key} = {value}" for key, value in wanted.items() if key not in known]
    if own:
        end = own[-1].end
        lines = [own[-1].before + line for line in lines]
    else:
        end = len(text)
        lines = [*([""] if text else []), f"[prices.models.{json.dumps(name)}]", *lines]
    if lines and end and not text[:end].endswith("\n"):
        lines.insert(0, "")
    edits.append((end, end, "".join(line + line_break for line in lines)))
    return _edited(text, edits)


def _edited(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _statements(text: str) -> Iterator[_Statement]:
    table: tuple[str, ...] = ()
    start = 0
    while start < len(text):
        head = _STATEMENT.match(text, start)
        assert head is not None, "a line may also begin with nothing"
        stop = _value_end(text, head.end()) if head["key"] else head.end()
        end = text.find("\n", stop) + 1 or len(text)
        names = list(re.finditer(_NAME, head["table"] or head["key"] or ""))
        path = tuple(_plain(name[0]) for name in names)
        if head["table"]:
            table = path
            yield _Statement(path, start, end)
        elif head["key"]:
            before = text[start : head.start("key") + names[-1].start()]
            yield _Statement((*table, *path), start, end, before, (head.end(), stop))
        start = end


def _value_end(text: str, start: int) -> int:
    depth = 0
    for word in _WORD.finditer(text, start):
        first = word[0][0]
        if first in "[{":
            depth += 1
        elif first in "]}":
            depth -= 1
        elif not depth and first in "#\n":
            return start + len(text[start : word.start()].rstrip())
    return len(text.rstrip())


def _plain(name: str) -> str:
    """A name as TOML means it: the escapes of its quotes are all Python's as well."""
    if name.startswith('"'):
        plain: str = ast.literal_eval(name)
        return plain
    return name.strip("'")
