-- The third schema. {schema} is the name of the schema, quoted. The triggers themselves are in triggers.sql.
--
-- Trigger functions run with the rights of their owner, who owns the tables as well: whoever may change a token needs no
-- right on the list of changes. Nobody else may attach them to tables of their own.

-- Changes are read behind a mark, by the transactions that a snapshot did not see. Several tokens of one statement are one
-- row: `digest` is NULL, which older gateways read as everything, and `digests` has their digests one after the other.
ALTER TABLE {schema}.change ADD COLUMN digests bytea;
ALTER TABLE {schema}.change ADD COLUMN tx bigint;
-- The server process that wrote it: a message of that process with the same digests and time tells of the same change.
ALTER TABLE {schema}.change ADD COLUMN pid integer;
CREATE INDEX change_tx ON {schema}.change (tx);

-- Notes which tokens changed, and notifies whoever listens. NULL: everything.
CREATE OR REPLACE FUNCTION {schema}.tell(changed bytea[]) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $tollgate$
DECLARE
    now_ms constant bigint := (extract(epoch FROM clock_timestamp()) * 1000)::bigint;
    -- Rows that a logical replica makes for itself must not collide with those that it may be sent.
    sign constant integer := CASE WHEN current_setting('session_replication_role') = 'replica' THEN -1 ELSE 1 END;
    channel text;
    named text;
BEGIN
    -- A gateway notes last uses, and that is no change.
    IF cardinality(changed) = 0 THEN
        RETURN;
    END IF;
    -- A transaction that notifies fails when it commits if the server's queue of notifications is full, which nobody can
    -- catch. Gateways read the list of changes anyway.
    IF pg_notification_queue_usage() < 0.5 THEN
        channel := (SELECT v.channel FROM {schema}.version v);
    END IF;
    IF changed IS NULL THEN
        INSERT INTO {schema}.change (seq, at_ms, tx, pid) OVERRIDING SYSTEM VALUE
            VALUES (sign * nextval('{schema}.change_seq_seq'::regclass), now_ms, txid_current(), pg_backend_pid());
        IF channel IS NOT NULL THEN
            PERFORM pg_notify(channel, '*');
        END IF;
        RETURN;
    END IF;
    -- So many at once that a row is not stored out of line, and a message has less than 8000 bytes.
    FOR named IN
        INSERT INTO {schema}.change (seq, digest, digests, at_ms, tx, pid) OVERRIDING SYSTEM VALUE
            SELECT sign * nextval('{schema}.change_seq_seq'::regclass),
                CASE WHEN count(*) = 1 THEN string_agg(c.digest, ''::bytea) END,
                CASE WHEN count(*) > 1 THEN string_agg(c.digest, ''::bytea) END,
                now_ms, txid_current(), pg_backend_pid()
            FROM unnest(changed) WITH ORDINALITY AS c (digest, at) GROUP BY (c.at - 1) / 50
            RETURNING encode(coalesce(digests, digest), 'hex')
    LOOP
        IF channel IS NOT NULL THEN
            PERFORM pg_notify(channel, named || ' ' || now_ms);
        END IF;
    END LOOP;
END
$tollgate$;

CREATE OR REPLACE FUNCTION {schema}.token_added() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    PERFORM {schema}.tell(ARRAY(SELECT digest FROM new_rows)::bytea[]);
    RETURN NULL;
END
$tollgate$;

CREATE OR REPLACE FUNCTION {schema}.token_removed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    PERFORM {schema}.tell(ARRAY(SELECT digest FROM old_rows)::bytea[]);
    RETURN NULL;
END
$tollgate$;

-- TRUNCATE has no rows to name.
CREATE OR REPLACE FUNCTION {schema}.token_emptied() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    PERFORM {schema}.tell(NULL::bytea[]);
    RETURN NULL;
END
$tollgate$;

-- A token's last use is no change.
CREATE OR REPLACE FUNCTION {schema}.token_altered() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    PERFORM {schema}.tell(ARRAY(
        SELECT DISTINCT digest FROM (
            (SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces FROM old_rows
             EXCEPT
             SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces FROM new_rows)
            UNION ALL
            (SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces FROM new_rows
             EXCEPT
             SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces FROM old_rows)
        ) AS differing
    )::bytea[]);
    RETURN NULL;
END
$tollgate$;

-- For changes that replication applies: row by row, and without the triggers of statements.
CREATE FUNCTION {schema}.token_replicated() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        PERFORM {schema}.tell(ARRAY(SELECT OLD.digest UNION SELECT NEW.digest)::bytea[]);
    ELSIF TG_OP = 'INSERT' THEN
        PERFORM {schema}.tell(ARRAY[NEW.digest]::bytea[]);
    ELSE
        PERFORM {schema}.tell(ARRAY[OLD.digest]::bytea[]);
    END IF;
    RETURN NULL;
END
$tollgate$;
