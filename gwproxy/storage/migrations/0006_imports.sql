-- An import is one record with many rows, and each of them has its line in the audit.

CREATE TABLE audited (
    lsn        INTEGER NOT NULL,
    place      INTEGER NOT NULL,  -- among the rows of an import, from 1; 0: the only line, or the import's own
    t          INTEGER NOT NULL,
    actor      TEXT    NOT NULL,  -- 'bootstrap', the id of an admin key, 'cli:' and a name; '': the program
    action     TEXT    NOT NULL,
    noun       TEXT    NOT NULL,  -- 'organization', 'user', 'api_key', 'admin_key', 'import'
    id         TEXT    NOT NULL,  -- of an import the name of its file, which is kept as long as its record
    before     TEXT,  -- JSON; NULL: it was created, or it is a grant, a reset or an import
    after      TEXT    NOT NULL,  -- JSON; never a digest of a key
    request_id TEXT    NOT NULL,
    address    TEXT    NOT NULL,
    PRIMARY KEY (lsn, place)
) STRICT, WITHOUT ROWID;

INSERT INTO audited
    SELECT lsn, 0, t, actor, action, noun, id, before, after, request_id, address FROM audit;
DROP TABLE audit;
ALTER TABLE audited RENAME TO audit;

CREATE INDEX audit_by_row ON audit (noun, id, lsn);
CREATE INDEX audit_by_actor ON audit (actor, lsn);

-- Corrections of a month, for whoever accounts for it: few among the lines of its requests.
CREATE INDEX entry_by_hand ON entry (period, lsn) WHERE type NOT IN ('settle', 'overrun');
