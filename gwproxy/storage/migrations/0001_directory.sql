-- Who may call: organizations, their users, the users' keys.
--
-- Amounts are integers in nano-USD (1 USD = 1 000 000 000); times are integers in Unix seconds, UTC.
-- NULL in a limit means "no limit", save where a line says otherwise.
-- Nothing here is ever deleted: a row that was deleted or revoked bears the time of it, because the
-- ledger goes on pointing at it. Its id is never given out again.
-- `version` counts the changes of a row, so that a client can say which one it had seen.

CREATE TABLE organization (
    org_id               TEXT    PRIMARY KEY CHECK (length(org_id) BETWEEN 1 AND 64),
    name                 TEXT,
    status               TEXT    NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    monthly_budget       INTEGER CHECK (monthly_budget >= 0),
    failure_mode         TEXT    CHECK (failure_mode IN ('open', 'closed')),  -- NULL: as configured
    fallback_daily_limit INTEGER CHECK (fallback_daily_limit >= 0),  -- NULL: as configured, never unlimited
    allowed_features     TEXT    NOT NULL DEFAULT '[]',  -- JSON list
    prices               TEXT,  -- JSON: model -> USD per million tokens, as strings
    unbounded_policy     TEXT    NOT NULL DEFAULT 'clamp' CHECK (unbounded_policy IN ('clamp', 'strict', 'bounded')),
    on_exhausted         TEXT    NOT NULL DEFAULT 'cut'   CHECK (on_exhausted IN ('cut', 'finish')),
    on_client_gone       TEXT    NOT NULL DEFAULT 'close' CHECK (on_client_gone IN ('close', 'drain')),
    cache                INTEGER NOT NULL DEFAULT 0 CHECK (cache IN (0, 1)),
    created_at           INTEGER NOT NULL,
    deleted_at           INTEGER,
    version              INTEGER NOT NULL DEFAULT 1
) STRICT;

CREATE TABLE user (
    user_id       TEXT    PRIMARY KEY CHECK (length(user_id) BETWEEN 1 AND 64),
    org_id        TEXT    NOT NULL REFERENCES organization (org_id),
    email         TEXT,
    status        TEXT    NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    monthly_limit INTEGER CHECK (monthly_limit >= 0),
    rpm           INTEGER CHECK (rpm > 0),           -- requests a minute
    tpm           INTEGER CHECK (tpm > 0),           -- tokens a minute
    max_parallel  INTEGER CHECK (max_parallel > 0),  -- requests at once
    created_at    INTEGER NOT NULL,
    deleted_at    INTEGER,
    version       INTEGER NOT NULL DEFAULT 1
) STRICT;

CREATE INDEX user_by_org ON user (org_id);

-- One address, one account, whatever the capitals; a deleted account frees its address.
CREATE UNIQUE INDEX user_by_email ON user (email COLLATE NOCASE) WHERE email IS NOT NULL AND deleted_at IS NULL;

-- A key itself is never stored: only its SHA-256, which cannot be turned back, and the public
-- beginning by which its owner recognises it.
CREATE TABLE api_key (
    key_id         TEXT    PRIMARY KEY CHECK (length(key_id) BETWEEN 1 AND 64),
    user_id        TEXT    NOT NULL REFERENCES user (user_id),
    prefix         TEXT    NOT NULL,  -- 'gw_live_' and the 8 public characters
    digest         BLOB    NOT NULL UNIQUE CHECK (length(digest) = 32),
    name           TEXT,
    allowed_models TEXT,  -- JSON list; NULL: every model
    monthly_limit  INTEGER CHECK (monthly_limit >= 0),
    rpm            INTEGER CHECK (rpm > 0),
    tpm            INTEGER CHECK (tpm > 0),
    max_parallel   INTEGER CHECK (max_parallel > 0),
    created_at     INTEGER NOT NULL,
    expires_at     INTEGER,  -- refused from this second on
    revoked_at     INTEGER,
    last_used_at   INTEGER,  -- written now and then: may lag behind
    version        INTEGER NOT NULL DEFAULT 1
) STRICT;

CREATE INDEX api_key_by_user ON api_key (user_id);

-- Users who are given no organization belong to this one.
INSERT INTO organization (org_id, name, created_at) VALUES ('default', 'Default', CAST(strftime('%s', 'now') AS INTEGER));
