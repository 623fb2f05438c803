-- Keys of requests are forgotten in the order in which they came.
CREATE UNIQUE INDEX idempotency_by_lsn ON idempotency (lsn);
