-- Keys that change their secret, keys of administrators, and an audit of all that they do.

-- Secrets that a key had before, and until when each is still accepted (Unix seconds).
-- JSON: [[base64 of the SHA-256, until], ...]; NULL: none.
ALTER TABLE api_key ADD COLUMN previous TEXT;

-- From where it was last used, and how often in all. Like `last_used_at` written now and then.
ALTER TABLE api_key ADD COLUMN last_used_from TEXT;
ALTER TABLE api_key ADD COLUMN use_count INTEGER NOT NULL DEFAULT 0;

-- Keys that open the admin plane, beside the configured one; they open nothing else.
CREATE TABLE admin_key (
    key_id     TEXT    PRIMARY KEY CHECK (length(key_id) BETWEEN 1 AND 64),
    prefix     TEXT    NOT NULL,
    digest     BLOB    NOT NULL UNIQUE CHECK (length(digest) = 32),
    name       TEXT,
    scope      TEXT    NOT NULL CHECK (scope IN ('read', 'write')),
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER,
    version    INTEGER NOT NULL DEFAULT 1
) STRICT;

-- Who changed what: the rows of the directory, and the grants and resets of accounts. It replaces a
-- table that knew the first alone.
CREATE TABLE audited (
    lsn        INTEGER PRIMARY KEY,
    t          INTEGER NOT NULL,
    actor      TEXT    NOT NULL,  -- 'bootstrap', the id of an admin key, 'cli:' and a name; '': the program
    action     TEXT    NOT NULL,
    noun       TEXT    NOT NULL,  -- 'organization', 'user', 'api_key', 'admin_key'
    id         TEXT    NOT NULL,
    before     TEXT,  -- JSON; NULL: it was created, or it is a grant or a reset
    after      TEXT    NOT NULL,  -- JSON; never a digest of a key
    request_id TEXT    NOT NULL,
    address    TEXT    NOT NULL
) STRICT;

INSERT INTO audited SELECT * FROM audit;
DROP TABLE audit;
ALTER TABLE audited RENAME TO audit;

CREATE INDEX audit_by_row ON audit (noun, id, lsn);
CREATE INDEX audit_by_actor ON audit (actor, lsn);
