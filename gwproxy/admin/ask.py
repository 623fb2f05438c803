"""What is asked of the admin plane and what it answers, as values: over HTTP and without it alike.

A route is one line of the plane's table. Its types are what checks the body and the query, and what
the OpenAPI document is made of; there is no second description.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gwproxy.core.errors import InvalidRequest
from gwproxy.state.directory import NOBODY, Author, Versions


@dataclass(frozen=True, slots=True)
class Ask:
    """What every handler is told of a request, whatever its route."""

    by: Author = NOBODY
    match: Versions = None
    """The versions that `If-Match` names; None: it was not sent, or any is fine."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler made of it. `value` is the body, None for none."""

    value: msgspec.Struct | Mapping[str, Any] | None = None
    version: int | None = None
    """Of the row that is shown: its ETag."""


Handler = Callable[..., Awaitable[Any]]
"""Called with the Ask, the parameters of the path by their names, and, where the route has them,
`query` and `body`; it gives an Answer."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Of a route whose bodies fit neither in memory nor into one answer: it is called with the
    HTTP request and its id, checks who asks, and gives the response. In these media types:"""

    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    rows: tuple[type[msgspec.Struct], ...] = ()
    """What a line of it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """`method` and `path` with {parameters}; what it takes, what it does, what it answers."""

    method: str
    path: str
    do: Handler
    summary: str
    """One sentence for the OpenAPI document."""
    query: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    answers: type[msgspec.Struct] | None = None
    streams: Streams | None = None
    status: int = 200
    conditional: bool = False
    """It heeds `If-Match`."""
    refusals: tuple[int, ...] = ()
    """Statuses of its own, besides those that any route may answer with."""

    @property
    def writes(self) -> bool:
        return self.method != "GET"

    @property
    def repeatable(self) -> bool:
        """It heeds `Idempotency-Key`."""
        return self.method == "POST" and self.body is not None


def etag(version: int) -> str:
    return f'"{version}"'


_LONGEST_MATCH_CHARS: Final = 1000


def versions(if_match: str | None) -> Versions:
    """The versions of an If-Match header (RFC 9110, 13.1.1): `"3"`, `"3", "4"` or `*`.

    What we never gave out as an ETag matches nothing, but what is no list of them is an error.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    found = set()
    tags = if_match.split(",") if len(if_match) <= _LONGEST_MATCH_CHARS else [""]
    for tag in tags:
        text = tag.strip()
        if text.startswith("W/"):
            continue  # never equal here: a strong comparison is asked for
        if len(text) < 2 or text[0] != '"' or text[-1] != '"':
            raise InvalidRequest(
                '`If-Match` must be an ETag as it was given, such as "3", or *.', param="If-Match"
            )
        if text[1:-1].isascii() and text[1:-1].isdigit():
            found.add(int(text[1:-1]))
    return frozenset(found)


def given(route: Route, parameters: dict[str, str], query: Any, body: Any) -> dict[str, Any]:
    """What the route's handler is called with, besides the Ask."""
    words: dict[str, Any] = dict(parameters)
    if route.query is not None:
        words["query"] = query
    if route.body is not None:
        words["body"] = body
    return words
