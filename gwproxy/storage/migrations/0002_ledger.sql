-- What was spent and who changed what: the journal, record by record, in tables.
--
-- Nothing here is decided or written by anybody but the one writer that reads the journal. `lsn` is
-- the number of the record that a row comes from; a reservation is named by the number of the record
-- that opened it.
-- Amounts are integers in nano-USD; times are integers in milliseconds since 1970, UTC, and never go
-- back from one record to the next.
-- A period is a month, '2026-11', or a day, '2026-11-21', UTC. An account is 'key:ID', 'user:ID',
-- 'org:ID' (a month each), 'provider:NAME' or 'outage:ORG' (a day each).

-- Up to which record of which journal these tables go. It moves in the transaction that writes the
-- rows, so the two can never differ.
CREATE TABLE meta (
    one           INTEGER PRIMARY KEY CHECK (one = 1),
    ledger_id     TEXT,              -- the journal this belongs to; NULL until the first start
    epoch         INTEGER NOT NULL,  -- counts the starts
    applied_lsn   INTEGER NOT NULL,
    applied_chain INTEGER NOT NULL,  -- the checksum of that record and of all before it
    applied_t     INTEGER NOT NULL
) STRICT;

INSERT INTO meta VALUES (1, NULL, 0, 0, 0, 0);

-- The lines of the accounts: what each was charged or given, for good.
CREATE TABLE entry (
    lsn         INTEGER NOT NULL,
    account     TEXT    NOT NULL,
    period      TEXT    NOT NULL,
    type        TEXT    NOT NULL,  -- 'settle', 'overrun' (the part of a cost that was above its hold), or an adjustment
    amount      INTEGER NOT NULL,  -- of a 'grant': added to what may be spent; of all others: to what is
    reservation INTEGER,  -- the request it is about; NULL where it is about none
    t           INTEGER,  -- NULL in this and the next two: of a request, which has its own time
    actor       TEXT,
    reason      TEXT,
    PRIMARY KEY (lsn, account, period, type)
) STRICT, WITHOUT ROWID;

-- The sums of the lines: spent is all but the grants, credited is the grants. What is held stands in
-- no table, it is the sum of the open holds. Periods first: what is written all the time lies close
-- together.
CREATE TABLE balance (
    account  TEXT    NOT NULL,
    period   TEXT    NOT NULL,
    spent    INTEGER NOT NULL,
    credited INTEGER NOT NULL,
    count    INTEGER NOT NULL,  -- requests
    PRIMARY KEY (period, account)
) STRICT, WITHOUT ROWID;

-- What remains of an account's period whose lines up to record `lsn` were moved to the archive.
CREATE TABLE closed (
    account  TEXT    NOT NULL,
    period   TEXT    NOT NULL,
    lsn      INTEGER NOT NULL,
    t        INTEGER NOT NULL,
    spent    INTEGER NOT NULL,
    credited INTEGER NOT NULL,
    count    INTEGER NOT NULL,
    hash     TEXT    NOT NULL,  -- of the archive
    PRIMARY KEY (account, period, lsn)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER entry_is_never_changed BEFORE UPDATE ON entry BEGIN
    SELECT RAISE(ABORT, 'a line of an account is never changed');
END;

CREATE TRIGGER entry_is_never_deleted BEFORE DELETE ON entry
WHEN NOT EXISTS (
    SELECT 1 FROM closed WHERE account = OLD.account AND period = OLD.period AND lsn > OLD.lsn
) BEGIN
    SELECT RAISE(ABORT, 'a line of an account is never deleted before it is archived');
END;

-- The open reservations: with these, a start after a crash knows what nobody has settled.
CREATE TABLE hold (
    reservation INTEGER PRIMARY KEY,
    reserve     TEXT    NOT NULL,  -- the journal's record, JSON
    attempt     TEXT,              -- the record of the attempt under way, JSON; NULL: it is the first
    holds       TEXT    NOT NULL,  -- JSON: [[account, period, amount, limit, total then], ...]
    mark        INTEGER,           -- no more than this has been relayed; NULL: nothing was said
    tokens      INTEGER NOT NULL   -- output tokens of the mark
) STRICT;

-- One request, from its admission to its settlement: what a receipt is made of.
CREATE TABLE request (
    lsn                INTEGER PRIMARY KEY,  -- of its reservation: also the order in time
    t                  INTEGER NOT NULL,
    period             TEXT    NOT NULL,  -- the month that it belongs to
    id                 TEXT    NOT NULL UNIQUE,
    key_id             TEXT    NOT NULL,
    user_id            TEXT    NOT NULL,
    org_id             TEXT    NOT NULL,
    model              TEXT    NOT NULL,  -- as the caller named it
    provider           TEXT    NOT NULL,
    upstream_model     TEXT    NOT NULL,
    prices             TEXT    NOT NULL,  -- the price book's version
    held               INTEGER NOT NULL CHECK (held >= 0),
    degraded           INTEGER NOT NULL CHECK (degraded IN (0, 1)),  -- served while the database was lost
    stream             INTEGER NOT NULL CHECK (stream IN (0, 1)),
    edits              TEXT,  -- JSON list: what was changed before it was sent on; NULL: nothing
    settled_at         INTEGER,  -- NULL in this and the next three: not settled yet
    outcome            TEXT,
    source             TEXT,  -- 'provider', 'counted' or 'estimated'
    cost               INTEGER CHECK (cost >= 0),
    overrun            INTEGER NOT NULL CHECK (overrun >= 0),
    input_tokens       INTEGER NOT NULL,
    cache_read_tokens  INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    output_tokens      INTEGER NOT NULL,
    reasoning_tokens   INTEGER NOT NULL,  -- part of the output
    attempts           TEXT,  -- JSON: [[provider, model, status, error type, reason, ms, cost], ...]
    status             INTEGER NOT NULL,  -- what the client was answered; 0: unknown
    log_id             TEXT    NOT NULL,  -- the upstream's name for its own log line
    rates              TEXT,  -- JSON list: pico-USD a token for fresh input, cache reads and writes, output
    CHECK ((settled_at IS NULL) = (outcome IS NULL) AND (settled_at IS NULL) = (source IS NULL) AND (settled_at IS NULL) = (cost IS NULL))
) STRICT;

CREATE INDEX request_by_user ON request (user_id, t);
CREATE INDEX request_by_org ON request (org_id, t);
CREATE INDEX request_by_time ON request (t);

-- Who changed what in the directory. A key's digest is left out: a row shows what a person may see.
CREATE TABLE audit (
    lsn        INTEGER PRIMARY KEY,
    t          INTEGER NOT NULL,
    actor      TEXT    NOT NULL,
    action     TEXT    NOT NULL,
    noun       TEXT    NOT NULL CHECK (noun IN ('organization', 'user', 'api_key')),
    id         TEXT    NOT NULL,
    before     TEXT,  -- JSON; NULL: it was created
    after      TEXT    NOT NULL,  -- JSON
    request_id TEXT    NOT NULL,
    address    TEXT    NOT NULL
) STRICT;

CREATE INDEX audit_by_row ON audit (noun, id, lsn);

-- An account has spent this much of its limit: told once for each period.
CREATE TABLE alert (
    account TEXT    NOT NULL,
    period  TEXT    NOT NULL,
    percent INTEGER NOT NULL,
    lsn     INTEGER NOT NULL,
    t       INTEGER NOT NULL,
    spent   INTEGER NOT NULL,
    budget  INTEGER NOT NULL,  -- the limit at that moment
    PRIMARY KEY (period, account, percent)
) STRICT, WITHOUT ROWID;

-- The circuit breakers, each as of its last change.
CREATE TABLE breaker (
    provider TEXT    PRIMARY KEY,
    lsn      INTEGER NOT NULL,
    t        INTEGER NOT NULL,
    before   TEXT    NOT NULL,
    after    TEXT    NOT NULL,
    until    INTEGER NOT NULL,  -- when an open one is due to be tried again; 0: it is not open
    why      TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

-- What was asked for under which key: the same request sent twice changes nothing twice.
CREATE TABLE idempotency (
    key TEXT    PRIMARY KEY,
    lsn INTEGER NOT NULL,
    t   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
