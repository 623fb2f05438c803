"""What the gateway's log adds up to: the other side's figures in reports, kept in the book of a
reconciliation when its lines go.

The unit is a part: a span of time within one hour, looked at in one run. Parts never overlap, so
each record is in one of them, however the spans of the runs meet.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * HOUR_MS

SCHEMA: Final = """
-- What the log adds up to, by the names of our own providers, in parts of hours.
CREATE TABLE IF NOT EXISTS part (since INTEGER PRIMARY KEY, until INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS part_sum (
    since INTEGER NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL,
    failed INTEGER NOT NULL, cached INTEGER NOT NULL, input INTEGER NOT NULL,
    output INTEGER NOT NULL, cost INTEGER NOT NULL, duration_ms INTEGER NOT NULL,
    PRIMARY KEY (since, provider, model)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Sum:
    """What the gateway's log says of one provider and model."""

    provider: str
    model: str
    requests: int
    failed: int
    cached: int
    input: int
    output: int
    cost: int
    duration_ms: int
    covered_ms: int
    """How much of the time that was asked for the log was read of, whoever was asked in it."""

    def plus(self, other: "Sum") -> "Sum":
        """Both, under this one's provider."""
        return Sum(
            self.provider,
            "",
            self.requests + other.requests,
            self.failed + other.failed,
            self.cached + other.cached,
            self.input + other.input,
            self.output + other.output,
            self.cost + other.cost,
            self.duration_ms + other.duration_ms,
            self.covered_ms,
        )


def add_up(
    connection: sqlite3.Connection, since: int, until: int, named: Sequence[tuple[str, str]]
) -> None:
    """Add the book's lines of a span, within the caller's transaction. What an earlier run has seen
    of it is replaced where this one has seen all of the same part, and else left as it is: of half
    a part nobody knows the sums any more. `named` has the gateway's names of providers, each with
    ours."""
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS named (slug, name)")
    connection.execute("DELETE FROM named")
    connection.executemany("INSERT INTO named VALUES (?, ?)", named)
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS fresh (since INTEGER PRIMARY KEY, until)")
    connection.execute("DELETE FROM fresh")
    for table in ("part_sum", "part"):
        connection.execute(
            f"DELETE FROM {table} WHERE since IN "
            "(SELECT since FROM part WHERE since >= ? AND until <= ?)",
            (since, until),
        )
    left = connection.execute(
        "SELECT since, until FROM part WHERE since < ? AND until > ? ORDER BY since", (until, since)
    ).fetchall()
    connection.executemany("INSERT INTO fresh VALUES (?, ?)", _pieces(since, until, left))
    connection.execute("INSERT INTO part SELECT * FROM fresh")
    connection.execute(_ADD_UP)


def _pieces(since: int, until: int, left: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """A span without what is `left` of others, cut at the hours."""
    start = since
    for gone, back in (*left, (until, until)):
        while start < gone:
            end = min(gone, (start // HOUR_MS + 1) * HOUR_MS)
            yield start, end
            start = end
        start = max(start, back)


def of_days(connection: sqlite3.Connection, first_day: int, last_day: int) -> list[Sum]:
    """By provider and model over days, both included, counted from 1970-01-01."""
    span = first_day * _DAY_MS, (last_day + 1) * _DAY_MS
    return [Sum(*row) for row in connection.execute(_SUMS, (*span, *span))]


_SUMS: Final = """
    SELECT provider, model, sum(requests), sum(failed), sum(cached), sum(input), sum(output),
        sum(cost), sum(duration_ms),
        (SELECT sum(until - since) FROM part WHERE since >= ? AND since < ?)
    FROM part_sum WHERE since >= ? AND since < ?
    GROUP BY provider, model ORDER BY provider, model"""

_ADD_UP: Final = """
    INSERT INTO part_sum
    SELECT part, provider, model, count(*), sum(success = 0), sum(cached), sum(coalesce(input, 0)),
        sum(coalesce(output, 0)), sum(coalesce(cost, 0)), sum(coalesce(duration_ms, 0))
    FROM (
        SELECT (SELECT max(since) FROM fresh WHERE since <= theirs.t) AS part, theirs.t,
            coalesce(ours.provider, (SELECT name FROM named WHERE slug = theirs.provider),
                theirs.provider) AS provider,
            coalesce(ours.model, theirs.model) AS model, theirs.success, theirs.cached,
            theirs.input, theirs.output, theirs.cost, theirs.duration_ms
        FROM theirs LEFT JOIN pair ON pair.id = theirs.id
        LEFT JOIN ours ON ours.line = pair.line
    ) AS line JOIN fresh ON fresh.since = line.part
    WHERE line.t < fresh.until
    GROUP BY part, provider, model"""
