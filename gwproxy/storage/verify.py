"""The proof that the ledger's tables add up: everything that stands in them twice is compared.

SQL over one connection, a row at a time, sorted on the disk: it may be of any size.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from gwproxy.storage.database import Database

MOST_FINDINGS: Final = 1000
"""A person reads the first ten. One fault in the code may have as many as there are requests."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Two things that should be the same, and are not."""

    what: str
    where: str
    difference: int | None = None
    """The first less the second, in nano-USD or requests, where they are figures."""

    def __str__(self) -> str:
        difference = "" if self.difference is None else f" ({self.difference:+d})"
        return f"{self.what}: {self.where}{difference}"


async def verify(database: Database) -> list[Finding]:
    """All that does not add up, up to a thousand. It takes its time, and the database for itself:
    of one that is in use a backup is verified instead."""
    return await database.run(lambda connection: list(islice(findings(connection), MOST_FINDINGS)))


def findings(connection: sqlite3.Connection) -> Iterator[Finding]:
    yield from unbalanced(connection)
    for sql in _CHECKS:
        yield from (Finding(*row) for row in connection.execute(sql))


def unbalanced(connection: sqlite3.Connection) -> Iterator[Finding]:
    """Balances that are not the sums of their lines."""
    yield from (Finding(*row) for row in connection.execute(_BALANCES))


_ARCHIVED: Final = """EXISTS (
    SELECT 1 FROM closed WHERE closed.account = line.account
        AND closed.period = line.period AND closed.lsn > line.lsn)"""
"""A line that was archived does not count, whether it is still there or not."""

_BALANCES: Final = f"""
    SELECT iif(spent <> 0, 'spent and the sum of its lines', 'credited and the sum of its grants'),
        account || ' ' || period, iif(spent <> 0, spent, credited)
    FROM (
        SELECT account, period, sum(spent) AS spent, sum(credited) AS credited FROM (
            SELECT account, period, spent, credited FROM balance
            UNION ALL
            SELECT account, period, iif(type = 'grant', 0, -amount), iif(type = 'grant', -amount, 0)
            FROM entry AS line WHERE NOT {_ARCHIVED}
        ) GROUP BY account, period
    ) WHERE spent <> 0 OR credited <> 0"""

_CHARGED: Final = """
    SELECT lsn, period, 'key:' || key_id AS account, cost, overrun, outcome FROM request
    WHERE settled_at IS NOT NULL
    UNION ALL
    SELECT lsn, period, 'user:' || user_id, cost, overrun, outcome FROM request
    WHERE settled_at IS NOT NULL
    UNION ALL
    SELECT lsn, period, 'org:' || org_id, cost, overrun, outcome FROM request
    WHERE settled_at IS NOT NULL"""
"""Each settled request, once for each of its own accounts."""

_UNARCHIVED: Final = """NOT EXISTS (
    SELECT 1 FROM closed WHERE closed.account = found.account AND closed.period = found.period)"""

_REQUESTS: Final = f"""
    SELECT iif(cost <> 0, 'the cost of a request and its lines', 'its overrun and its lines'),
        coalesce((SELECT id FROM request WHERE lsn = reservation), reservation) || ' ' || account,
        iif(cost <> 0, cost, overrun)
    FROM (
        SELECT reservation, account, max(period) AS period,
            sum(cost) AS cost, sum(overrun) AS overrun
        FROM (
            SELECT lsn AS reservation, period, account, cost, overrun FROM ({_CHARGED})
            UNION ALL
            SELECT reservation, period, account, -amount, iif(type = 'overrun', -amount, 0)
            FROM entry
            WHERE type IN ('settle', 'overrun')
                AND substr(account, 1, 4) IN ('key:', 'user', 'org:')
        ) GROUP BY reservation, account
    ) AS found
    WHERE (cost <> 0 OR overrun <> 0) AND {_UNARCHIVED}"""

_COUNTS: Final = f"""
    SELECT 'the count of an account and its requests', account || ' ' || period, count FROM (
        SELECT account, period, sum(count) AS count FROM (
            SELECT account, period, count FROM balance
            WHERE substr(account, 1, 4) IN ('key:', 'user', 'org:')
            UNION ALL
            SELECT account, period, -1 FROM ({_CHARGED}) WHERE outcome <> 'void'
        ) GROUP BY account, period
    ) AS found
    WHERE count <> 0 AND {_UNARCHIVED}"""

_HOLDS_WITHOUT: Final = """
    SELECT 'an open hold of no open request', reservation, NULL
    FROM hold LEFT JOIN request ON lsn = reservation WHERE lsn IS NULL OR settled_at IS NOT NULL"""

_REQUESTS_WITHOUT: Final = """
    SELECT 'an open request without a hold', id, NULL
    FROM request LEFT JOIN hold ON lsn = reservation
    WHERE settled_at IS NULL AND reservation IS NULL"""

# As `core.records.Held` has them: account, period, amount.
_HELD: Final = """
    SELECT 'a hold that is not that of its request', id || ' ' || account, NULL
    FROM (
        SELECT request.*, held.key AS place,
            json_extract(held.value, '$[0]') AS account,
            json_extract(held.value, '$[1]') AS held_in,
            json_extract(held.value, '$[2]') AS amount
        FROM hold JOIN request ON lsn = reservation JOIN json_each(holds) AS held
    ) AS found
    WHERE amount < 0
        OR place < 3 AND (held_in <> period OR account <> CASE place
            WHEN 0 THEN 'key:' || key_id
            WHEN 1 THEN 'user:' || user_id
            ELSE 'org:' || org_id END)
        OR NOT EXISTS (
            SELECT 1 FROM balance
            WHERE balance.account = found.account AND balance.period = held_in)
    UNION ALL
    SELECT 'a hold that is not that of its request', id, NULL
    FROM hold JOIN request ON lsn = reservation
    WHERE json_extract(reserve, '$.lsn', '$.id') <> json_array(reservation, id)"""

_IMPOSSIBLE: Final = """
    SELECT 'a charge of nothing or less', lsn || ' ' || account, amount
    FROM entry WHERE type IN ('settle', 'overrun') AND amount <= 0
    UNION ALL
    SELECT 'fewer requests than none', account || ' ' || period, count
    FROM balance WHERE count < 0"""

_USED: Final = """
    SELECT grain, iif(grain > 0, org_id, ''), iif(grain > 1, user_id, ''), day, provider, model,
        count(*), sum(succeeded), sum(failed), sum(cost), sum(overrun), sum(input_tokens),
        sum(cache_read_tokens), sum(cache_write_tokens), sum(output_tokens), sum(reasoning_tokens),
        sum(duration_ms)
    FROM settled, (SELECT 0 AS grain UNION ALL SELECT 1 UNION ALL SELECT 2)
    GROUP BY 1, 2, 3, 4, 5, 6"""

_ATTEMPTED: Final = """
    SELECT day, each.value ->> 0 AS provider, count(*), sum(each.value ->> 3 <> ''),
        sum(each.value ->> 5)
    FROM settled, json_each(settled.attempts) AS each GROUP BY 1, 2"""


def _sums(what: str, table: str, right: str, where: str) -> str:
    return f"""
        SELECT DISTINCT '{what}', {where}, NULL FROM (
            SELECT * FROM (SELECT * FROM {table} EXCEPT {right})
            UNION ALL SELECT * FROM ({right} EXCEPT SELECT * FROM {table}))
        WHERE strftime('%Y-%m', day * 86400, 'unixepoch') NOT IN (SELECT period FROM closed)"""


_USAGE: Final = _sums(
    "used, and the sum of the requests",
    "usage",
    _USED,
    "trim(org_id || ' ' || user_id) || ' ' || day || ' ' || provider || ' ' || model",
)
_ATTEMPTS: Final = _sums(
    "attempts, and those of the requests", "attempted", _ATTEMPTED, "day || ' ' || provider"
)

_FUTURE: Final = """
    SELECT 'a row from after the mark', max(lsn), NULL FROM (
        SELECT max(lsn) AS lsn FROM entry UNION ALL
        SELECT max(lsn) FROM request UNION ALL
        SELECT max(lsn) FROM audit
    ) HAVING max(lsn) > (SELECT applied_lsn FROM meta)"""

_CHECKS: Final = (
    *(_REQUESTS, _COUNTS, _HOLDS_WITHOUT, _REQUESTS_WITHOUT, _HELD, _USAGE, _ATTEMPTS),
    *(_IMPOSSIBLE, _FUTURE),
)
