-- When an administrator's key was last used, from where, and how often in all, as of other keys:
-- written now and then.
ALTER TABLE admin_key ADD COLUMN last_used_at INTEGER;
ALTER TABLE admin_key ADD COLUMN last_used_from TEXT;
ALTER TABLE admin_key ADD COLUMN use_count INTEGER NOT NULL DEFAULT 0;
