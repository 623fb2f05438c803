-- What was used, added up as it is settled: a report over a million requests reads sums of them.
--
-- Both tables are written in the transaction that settles the requests, and are at every moment what
-- the view `settled` adds up to. A request that was refused after its record (`void`) counts nowhere.

CREATE TABLE usage (
    grain              INTEGER NOT NULL CHECK (grain IN (0, 1, 2)),  -- of everybody, of an organization, of a user
    org_id             TEXT    NOT NULL,  -- '' where it is everybody's
    user_id            TEXT    NOT NULL,  -- '' where it is not a user's; one who moved has lines in both organizations
    day                INTEGER NOT NULL,  -- of the admission, counted from 1970-01-01, UTC
    provider           TEXT    NOT NULL,  -- the one that answered, or was the last to be asked
    model              TEXT    NOT NULL,  -- as that provider calls it
    requests           INTEGER NOT NULL,
    succeeded          INTEGER NOT NULL,  -- 'completed'
    failed             INTEGER NOT NULL,  -- 'failed', 'truncated', 'unknown'; what is left was ended by the client, a budget or us
    cost               INTEGER NOT NULL,
    overrun            INTEGER NOT NULL,
    input_tokens       INTEGER NOT NULL,
    cache_read_tokens  INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    output_tokens      INTEGER NOT NULL,
    reasoning_tokens   INTEGER NOT NULL,
    duration_ms        INTEGER NOT NULL,  -- from admission to settlement
    PRIMARY KEY (grain, org_id, user_id, day, provider, model)
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_by_user ON usage (user_id) WHERE grain = 2;

-- The same of each attempt: a provider that failed is not the one that its request is counted for.
CREATE TABLE attempted (
    day         INTEGER NOT NULL,
    provider    TEXT    NOT NULL,
    attempts    INTEGER NOT NULL,
    failed      INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL,
    PRIMARY KEY (day, provider)
) STRICT, WITHOUT ROWID;

-- A month ends with its last day also for what came while its clock struck: hence the min().
CREATE VIEW settled AS
    SELECT lsn, org_id, user_id, provider, upstream_model AS model,
        min(t / 86400000, strftime('%s', period || '-01', '+1 month') / 86400 - 1) AS day,
        outcome = 'completed' AS succeeded,
        outcome IN ('failed', 'truncated', 'unknown') AS failed,
        cost, overrun, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens,
        reasoning_tokens, settled_at - t AS duration_ms, attempts
    FROM request WHERE settled_at IS NOT NULL AND outcome <> 'void';

INSERT INTO usage
    SELECT grain, iif(grain > 0, org_id, ''), iif(grain > 1, user_id, ''), day, provider, model,
        count(*), sum(succeeded), sum(failed), sum(cost), sum(overrun), sum(input_tokens),
        sum(cache_read_tokens), sum(cache_write_tokens), sum(output_tokens), sum(reasoning_tokens),
        sum(duration_ms)
    FROM settled, (SELECT 0 AS grain UNION ALL SELECT 1 UNION ALL SELECT 2)
    GROUP BY 1, 2, 3, 4, 5, 6;

INSERT INTO attempted
    SELECT day, each.value ->> 0, count(*), sum(each.value ->> 3 <> ''), sum(each.value ->> 5)
    FROM settled, json_each(settled.attempts) AS each
    GROUP BY 1, 2;

-- Looking back at requests: by key, and at those few that did not end well.
CREATE INDEX request_by_key ON request (key_id, t);
CREATE INDEX request_by_outcome ON request (outcome, t) WHERE outcome <> 'completed';
