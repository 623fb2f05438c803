"""The book of a reconciliation: the gateway's log and our own lines in a file of its own beside the
database, matched there, so that neither has to fit into memory and what was fetched once is kept.

What the log adds up to stays when the lines go: that is `gateway_sums`.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from gwproxy.core.reconcile import Correction, Ours, Theirs
from gwproxy.core.records import Tried
from gwproxy.storage import gateway_sums, locks
from gwproxy.storage.gateway_sums import Sum

WHOLE: Final = "whole"
"""How a run ended that need not read the log again."""
_ROWS: Final = 1000

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- The log. What comes again is the same row: its figures may have come in between.
CREATE TABLE IF NOT EXISTS theirs (
    id TEXT PRIMARY KEY, t INTEGER NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL,
    success INTEGER NOT NULL, cached INTEGER NOT NULL, status INTEGER, input INTEGER,
    output INTEGER, cost INTEGER, request_id TEXT, attempt INTEGER, duration_ms INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS theirs_by_request ON theirs (request_id, attempt);

-- The spans of time that were fetched whole.
CREATE TABLE IF NOT EXISTS fetched (since INTEGER PRIMARY KEY, until INTEGER NOT NULL);

-- Our attempts, in the order of their requests.
CREATE TABLE IF NOT EXISTS ours (
    line INTEGER PRIMARY KEY, lsn INTEGER NOT NULL, t INTEGER NOT NULL, request_id TEXT NOT NULL,
    attempt INTEGER NOT NULL, final INTEGER NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL,
    outcome TEXT, source TEXT NOT NULL, cost INTEGER NOT NULL, input INTEGER,
    output INTEGER NOT NULL, reasoning INTEGER NOT NULL, rates TEXT, log_id TEXT NOT NULL,
    status INTEGER, adjusted INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS ours_by_log ON ours (log_id);
CREATE INDEX IF NOT EXISTS ours_by_request ON ours (request_id, attempt);

-- What an interrupted run has of the log, while an exported file is compared.
CREATE TABLE IF NOT EXISTS aside_theirs AS SELECT * FROM theirs WHERE 0;
CREATE TABLE IF NOT EXISTS aside_fetched AS SELECT * FROM fetched WHERE 0;

CREATE TABLE IF NOT EXISTS pair (id TEXT PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pair_by_line ON pair (line);

CREATE TABLE IF NOT EXISTS correction (
    request_id TEXT PRIMARY KEY, charged INTEGER NOT NULL, cost INTEGER NOT NULL,
    reason TEXT NOT NULL
) WITHOUT ROWID;
"""

_LINES: Final = ("theirs", "fetched", "ours", "pair", "correction")
_ASIDE: Final = ("theirs", "fetched")


class BookRefused(Exception):
    """The book cannot be used; the words say why."""


def beside(database: Path) -> Path:
    """Where the book of a database is."""
    return database.with_name(f"{database.stem}-reconcile.db")


@contextmanager
def one_run(path: Path) -> Iterator[None]:
    """While it lasts the book at `path` is this run's: another's lines would replace its own."""
    lock_path = path.with_suffix(".lock")
    try:
        held = locks.take(lock_path)
    except locks.Held as holder:
        raise BookRefused(
            f"Another gwproxy reconcile is under way{holder}: run it again when that has ended."
        ) from holder
    except OSError as error:
        raise BookRefused(
            f"{lock_path}: {error.strerror}. Run it as the service's user."
        ) from error
    try:
        yield
    finally:
        os.close(held)


class Book:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    # -- beginning ---------------------------------------------------------------------------

    def begin(self, about: str, *, known_until: int | None = None) -> bool:
        """Start what `about` describes; True where it had begun before, and may go on. What came to
        its end is kept as well, where nothing can have been added to it.

        `known_until`: this takes in the unfinished run before it, whose lines are whole so far.
        """
        with self._transaction():
            done = self.note("done")
            if known_until is not None and done is None and self.note("about") not in (None, about):
                self._connection.execute("DELETE FROM fetched WHERE since >= ?", (known_until,))
                self._connection.execute("UPDATE fetched SET until = min(until, ?)", (known_until,))
                self._put_note("about", about)
                return True
            if self.note("about") == about and done in (None, WHOLE):
                return done is None
            for table in _LINES:
                self._connection.execute(f"DELETE FROM {table}")
            self._connection.execute("DELETE FROM about WHERE name NOT IN ('last', 'aside')")
            self._put_note("about", about)
            return False

    def put_aside(self) -> None:
        """Keep what an unfinished run has of the log until `take_back`."""
        with self._transaction():
            about = self.note("about")
            if about is None or self.note("done") is not None or self.note("aside") is not None:
                return
            for table in _ASIDE:
                self._connection.execute(f"INSERT INTO aside_{table} SELECT * FROM {table}")
            self._put_note("aside", about)

    def take_back(self) -> None:
        """Go back to the run that was put aside, as it was left."""
        with self._transaction():
            about = self.note("aside")
            if about is None:
                return
            for table in _LINES:
                self._connection.execute(f"DELETE FROM {table}")
            for table in _ASIDE:
                self._connection.execute(f"INSERT INTO {table} SELECT * FROM aside_{table}")
                self._connection.execute(f"DELETE FROM aside_{table}")
            self._connection.execute("DELETE FROM about WHERE name IN ('aside', 'done')")
            self._put_note("about", about)

    def note(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def put_note(self, name: str, value: str) -> None:
        with self._transaction():
            self._put_note(name, value)

    def _put_note(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    # -- their side --------------------------------------------------------------------------

    def gaps(self, since: int, until: int) -> list[tuple[int, int]]:
        """The parts of a span that are still to be fetched."""
        gaps, start = [], since
        for done_since, done_until in self._connection.execute(
            "SELECT since, until FROM fetched ORDER BY since"
        ):
            if done_since > start:
                gaps.append((start, min(done_since, until)))
            start = max(start, done_until)
        if start < until:
            gaps.append((start, until))
        return gaps

    def put(self, rows: Iterable[Theirs], span: tuple[int, int] | None = None) -> None:
        """Rows of the log, and the span that is whole with them."""
        with self._transaction():
            self._connection.executemany(_PUT_THEIRS, map(msgspec.structs.astuple, rows))
            if span is not None:
                self._connection.execute("INSERT OR REPLACE INTO fetched VALUES (?, ?)", span)

    def count_theirs(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM theirs").fetchone()[0])

    # -- our side ----------------------------------------------------------------------------

    def take_ours(self, rows: Iterable[tuple[Ours, int]]) -> int:
        """Our lines, each with what its request was adjusted by before; how many."""
        with self._transaction():
            self._connection.execute("DELETE FROM ours")
            count = 0
            for count, (ours, adjusted) in enumerate(rows, 1):
                *head, rates, log_id, status = msgspec.structs.astuple(ours)
                written = None if rates is None else json.dumps(rates)
                self._connection.execute(
                    _PUT_OURS, (count, *head, written, log_id, status, adjusted)
                )
        return count

    # -- matching ----------------------------------------------------------------------------

    def match(self) -> None:
        """By the log's own id first, then by the request and the attempt that its metadata names.

        Of several records of one attempt the one with usage is it; the others stay unclaimed.
        """
        with self._transaction():
            self._connection.execute("DELETE FROM pair")
            for sql in _MATCH:
                self._connection.execute(sql)

    def paired(self) -> tuple[int, int, int, int]:
        """(lines with a record, answered ones without, the times of the first and the last with)"""
        row = self._connection.execute(_PAIRED).fetchone()
        return tuple(int(value or 0) for value in row)  # type: ignore[return-value]

    def requests(self, since: int, until: int) -> Iterator[list[tuple[Ours, int, list[Theirs]]]]:
        """Each request of a span: its attempts, what it was adjusted by, the records of each."""
        found: list[tuple[Ours, int, list[Theirs]]] = []
        last_line = None
        for row in self._connection.execute(_REQUESTS, (since, until)):
            line, ours, adjusted, theirs = _line(row)
            if found and found[-1][0].lsn != ours.lsn:
                yield found
                found = []
            if line != last_line:
                found.append((ours, adjusted, []))
                last_line = line
            if theirs is not None:
                found[-1][2].append(theirs)
        if found:
            yield found

    def unclaimed(self, since: int, until: int) -> Iterator[tuple[Theirs, bool]]:
        """The records of a span that belong to no line, and whether their request is ours."""
        for *row, known in self._connection.execute(_UNCLAIMED, (since, until)):
            yield _theirs(row), bool(known)

    # -- what follows ------------------------------------------------------------------------

    @contextmanager
    def noting_corrections(self) -> Iterator[Callable[[Correction], None]]:
        """Gathers corrections while the lines are read; all of them are kept, or none."""
        waiting: list[Correction] = []

        def write() -> None:
            self._connection.executemany(
                "INSERT INTO correction VALUES (?, ?, ?, ?)",
                [(c.request_id, c.charged, c.cost, c.reason) for c in waiting],
            )
            waiting.clear()

        def note(correction: Correction) -> None:
            waiting.append(correction)
            if len(waiting) == _ROWS:
                write()

        with self._transaction():
            self._connection.execute("DELETE FROM correction")
            yield note
            write()

    def corrections(self, after: str, most: int) -> list[Correction]:
        rows = self._connection.execute(
            "SELECT * FROM correction WHERE request_id > ? ORDER BY request_id LIMIT ?",
            (after, most),
        )
        return [Correction(*row) for row in rows]

    def add_up(self, since: int, until: int, named: Sequence[tuple[str, str]]) -> None:
        """Keep what the log's lines of a span add up to. `named` has the gateway's names of
        providers, each with ours."""
        with self._transaction():
            gateway_sums.add_up(self._connection, since, until, named)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._connection.commit()


@contextmanager
def book(path: Path) -> Iterator[Book]:
    """The book, made where there is none; BookRefused where it cannot be used."""
    try:
        # For this user alone, before anything is in it.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            # It can be made again from the log.
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA + gateway_sums.SCHEMA)
            yield Book(connection)
    except (OSError, sqlite3.Error) as error:
        raise BookRefused(
            f"{path}: {error}. It holds nothing that cannot be fetched again."
        ) from error


# -- what was seen last, for the server ------------------------------------------------------------


def last_run(path: Path) -> dict[str, Any] | None:
    """The summary of the last run that came to its end; None: there was none."""
    with _reading(path) as connection:
        if connection is None:
            return None
        row = connection.execute("SELECT value FROM about WHERE name = 'last'").fetchone()
    found: dict[str, Any] | None = None if row is None else json.loads(row[0])
    return found


def sums(path: Path, first_day: int, last_day: int) -> list[Sum]:
    """By provider and model over days, both included, counted from 1970-01-01."""
    with _reading(path) as connection:
        return [] if connection is None else gateway_sums.of_days(connection, first_day, last_day)


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection | None]:
    if not path.exists():
        yield None
        return
    uri = f"file:{quote(str(path))}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise BookRefused(f"{path}: {error}") from error


# -- our side, out of the database -----------------------------------------------------------------

_read_attempts: Final = msgspec.json.Decoder(tuple[Tried, ...]).decode


def lines(connection: sqlite3.Connection, since: int, until: int) -> Iterator[tuple[Ours, int]]:
    """Each attempt of the requests of a span, in their order, with what the request was adjusted
    by. A request that was refused after its record (`void`) has none."""
    for row in connection.execute(_OURS, (since, until)):
        yield from _attempts(row)


_OURS: Final = """
    SELECT lsn, t, id, provider, upstream_model, outcome, source, cost, input_tokens,
        cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, attempts, rates,
        log_id, (SELECT coalesce(sum(amount), 0) FROM entry
            WHERE type = 'reconcile' AND reservation = request.lsn
                AND account = 'key:' || key_id)
    FROM request WHERE t >= ? AND t < ? AND (outcome IS NULL OR outcome <> 'void') ORDER BY lsn"""


def _attempts(row: Sequence[Any]) -> Iterator[tuple[Ours, int]]:
    lsn, t, request_id, provider, model, outcome, source, cost, fresh, read, write, *rest = row
    output, reasoning, attempts, rates, log_id, adjusted = rest
    tried = _read_attempts(attempts) if attempts else ()
    used = None if rates is None else tuple(json.loads(rates))
    about = (lsn, t, request_id)
    cells: tuple[Any, ...]
    tokens: tuple[Any, ...]
    if not tried:
        # Open, or recovered: who settled it knew of no attempts.
        tokens = (fresh + read + write, output, reasoning)
        cells = (*about, 0, True, provider, model, outcome, source or "", cost or 0)
        yield Ours(*cells, *tokens, used, log_id, None), adjusted
        return
    costly = sum(1 for each in tried if each.cost)
    for number, each in enumerate(tried, 1):
        final = number == len(tried)
        mine = costly <= 1 and (each.cost > 0 or (final and not costly))
        nothing = not each.cost and not mine
        input_tokens = fresh + read + write if mine else 0 if nothing else None
        cells = (*about, number, final, each.provider, each.model, outcome, source or "", each.cost)
        tokens = (input_tokens, output, reasoning) if mine else (input_tokens, 0, 0)
        end: tuple[Any, ...] = (used if mine else None, log_id if final else "", each.status)
        yield Ours(*cells, *tokens, *end), adjusted


# -- rows and statements ---------------------------------------------------------------------------

_PUT_THEIRS: Final = """
    INSERT INTO theirs (id, t, provider, model, success, cached, status, input, output, cost,
        request_id, attempt, duration_ms)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET input = coalesce(excluded.input, input),
        output = coalesce(excluded.output, output), cost = coalesce(excluded.cost, cost)"""

_PUT_OURS: Final = f"INSERT INTO ours VALUES ({', '.join('?' * 18)})"

_MATCH: Final = (
    """INSERT INTO pair SELECT theirs.id, min(ours.line) FROM theirs JOIN ours
    ON ours.log_id = theirs.id GROUP BY theirs.id""",
    # Without attempts on record: every record that names the request.
    """INSERT INTO pair SELECT theirs.id, ours.line FROM ours JOIN theirs
    ON theirs.request_id = ours.request_id
    WHERE ours.attempt = 0 AND theirs.id NOT IN (SELECT id FROM pair)""",
    """INSERT INTO pair SELECT id, line FROM (
        SELECT theirs.id AS id, ours.line AS line, row_number() OVER (
            PARTITION BY ours.line
            ORDER BY theirs.success DESC, theirs.input IS NULL, theirs.t DESC, theirs.id
        ) AS place
        FROM ours JOIN theirs
            ON theirs.request_id = ours.request_id AND theirs.attempt = ours.attempt
        WHERE ours.attempt > 0 AND theirs.id NOT IN (SELECT id FROM pair)
            AND ours.line NOT IN (SELECT line FROM pair)
    ) WHERE place = 1""",
)

_PAIRED: Final = """
    SELECT count(paired), sum(paired IS NULL AND final AND outcome = 'completed'),
        min(iif(paired, t, NULL)), max(iif(paired, t, NULL))
    FROM (SELECT ours.*, iif(line IN (SELECT line FROM pair), 1, NULL) AS paired FROM ours)"""

_THEIRS: Final = (
    "theirs.id, theirs.t, theirs.provider, theirs.model, theirs.success, theirs.cached,"
    " theirs.status, theirs.input, theirs.output, theirs.cost, theirs.request_id, theirs.attempt,"
    " theirs.duration_ms"
)

_REQUESTS: Final = f"""
    SELECT ours.*, {_THEIRS} FROM ours LEFT JOIN pair ON pair.line = ours.line
    LEFT JOIN theirs ON theirs.id = pair.id
    WHERE ours.t >= ? AND ours.t < ? ORDER BY ours.line"""

_UNCLAIMED: Final = f"""
    SELECT {_THEIRS}, request_id IN (SELECT request_id FROM ours)
    FROM theirs WHERE t >= ? AND t < ? AND id NOT IN (SELECT id FROM pair) ORDER BY t, id"""


def _line(row: Sequence[Any]) -> tuple[int, Ours, int, Theirs | None]:
    line, *fields, adjusted = row[:18]
    fields[4] = bool(fields[4])
    if fields[13] is not None:
        fields[13] = tuple(json.loads(fields[13]))
    theirs = None if row[18] is None else _theirs(row[18:])
    return line, Ours(*fields), adjusted, theirs


def _theirs(row: Sequence[Any]) -> Theirs:
    log_id, t, provider, model, success, cached, *rest = row
    return Theirs(log_id, t, provider, model, bool(success), bool(cached), *rest)
