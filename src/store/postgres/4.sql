-- The fourth schema: how a token may be used. {schema} is the name of the schema, quoted. The triggers and their functions are
-- in triggers.sql.

-- Empty: no bound. Without checks, for which the whole table would be read while nobody else can.
ALTER TABLE {schema}.token ADD COLUMN plan text NOT NULL DEFAULT '';
ALTER TABLE {schema}.token ADD COLUMN rate text NOT NULL DEFAULT '';
ALTER TABLE {schema}.token ADD COLUMN networks text[] NOT NULL DEFAULT '{}';
ALTER TABLE {schema}.token ADD COLUMN methods text[] NOT NULL DEFAULT '{}';
-- An older gateway would let tokens in from everywhere.
UPDATE {schema}.version SET readers_from = 4;
