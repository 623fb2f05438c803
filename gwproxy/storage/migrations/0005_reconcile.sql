-- What a request was corrected by is asked for by its reservation. Few lines are corrections: all
-- others cost nothing here.
CREATE INDEX entry_of_correction ON entry (reservation) WHERE type = 'reconcile';
