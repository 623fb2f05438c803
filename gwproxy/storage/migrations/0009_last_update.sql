-- When an account was last charged, granted something or corrected, in milliseconds since 1970; 0 for
-- the months before this was kept.
ALTER TABLE balance ADD COLUMN t INTEGER NOT NULL DEFAULT 0;
