-- The third schema. {schema} is the name of the schema, quoted. The triggers and their functions are in triggers.sql.

-- Changes are read behind a mark, by the transactions that a snapshot did not see. Several tokens of one statement are one
-- row: `digest` is NULL, which older gateways read as everything, and `digests` has their digests one after the other.
ALTER TABLE {schema}.change ADD COLUMN digests bytea;
ALTER TABLE {schema}.change ADD COLUMN tx bigint;
-- The server process that wrote it: a message of that process with the same digests and time tells of the same change.
ALTER TABLE {schema}.change ADD COLUMN pid integer;
CREATE INDEX change_tx ON {schema}.change (tx);
