-- The triggers of the token table, their functions, and who may use those. Can be repeated: a migration runs it also to put
-- right what somebody switched off or replaced. {schema} is the name of the schema, quoted.
--
-- Trigger functions run with the rights of their owner, who owns the tables as well: whoever may change a token needs no
-- right on the list of changes. Nobody else may attach them to tables of their own.

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
                    replaces, plan, rate, networks, methods FROM old_rows
             EXCEPT
             SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces, plan, rate, networks, methods FROM new_rows)
            UNION ALL
            (SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces, plan, rate, networks, methods FROM new_rows
             EXCEPT
             SELECT digest, "user", scopes, description, created, not_before, expires, revoked, blocked, superseded,
                    replaces, plan, rate, networks, methods FROM old_rows)
        ) AS differing
    )::bytea[]);
    RETURN NULL;
END
$tollgate$;

-- For changes that replication applies: row by row, and without the triggers of statements.
CREATE OR REPLACE FUNCTION {schema}.token_replicated() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
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

DROP TRIGGER IF EXISTS tollgate_added ON {schema}.token;
DROP TRIGGER IF EXISTS tollgate_removed ON {schema}.token;
DROP TRIGGER IF EXISTS tollgate_emptied ON {schema}.token;
DROP TRIGGER IF EXISTS tollgate_altered ON {schema}.token;
DROP TRIGGER IF EXISTS tollgate_replicated ON {schema}.token;
DROP TRIGGER IF EXISTS tollgate_replicated_change ON {schema}.token;

CREATE TRIGGER tollgate_added AFTER INSERT ON {schema}.token
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_added();
CREATE TRIGGER tollgate_removed AFTER DELETE ON {schema}.token
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_removed();
CREATE TRIGGER tollgate_altered AFTER UPDATE ON {schema}.token
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_altered();

-- The apply process of logical replication fires the triggers of rows only, and like session_replication_role = replica
-- only those that are made for it. It fires the one of TRUNCATE, too.
CREATE TRIGGER tollgate_replicated AFTER INSERT OR DELETE ON {schema}.token
    FOR EACH ROW EXECUTE FUNCTION {schema}.token_replicated();
CREATE TRIGGER tollgate_replicated_change AFTER UPDATE ON {schema}.token
    FOR EACH ROW WHEN (
        (OLD.digest, OLD."user", OLD.scopes, OLD.description, OLD.created, OLD.not_before, OLD.expires, OLD.revoked,
            OLD.blocked, OLD.superseded, OLD.replaces, OLD.plan, OLD.rate, OLD.networks, OLD.methods)
        IS DISTINCT FROM
        (NEW.digest, NEW."user", NEW.scopes, NEW.description, NEW.created, NEW.not_before, NEW.expires, NEW.revoked,
            NEW.blocked, NEW.superseded, NEW.replaces, NEW.plan, NEW.rate, NEW.networks, NEW.methods)
    ) EXECUTE FUNCTION {schema}.token_replicated();
ALTER TABLE {schema}.token ENABLE REPLICA TRIGGER tollgate_replicated;
ALTER TABLE {schema}.token ENABLE REPLICA TRIGGER tollgate_replicated_change;
CREATE TRIGGER tollgate_emptied AFTER TRUNCATE ON {schema}.token
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_emptied();
ALTER TABLE {schema}.token ENABLE ALWAYS TRIGGER tollgate_emptied;

REVOKE EXECUTE ON FUNCTION {schema}.tell(bytea[]), {schema}.token_added(), {schema}.token_removed(),
    {schema}.token_emptied(), {schema}.token_altered(), {schema}.token_replicated() FROM PUBLIC;
-- If somebody else than the tables' owner migrates, like a superuser: their rights are not lent to whoever writes tokens.
DO $tollgate$
DECLARE
    ours regprocedure;
    owner constant oid := (SELECT c.relowner FROM pg_catalog.pg_class c WHERE c.oid = '{schema}.token'::regclass);
BEGIN
    FOR ours IN
        SELECT p.oid FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = (SELECT c.relnamespace FROM pg_catalog.pg_class c WHERE c.oid = '{schema}.token'::regclass)
        AND p.proname = ANY ('{tell,token_added,token_removed,token_emptied,token_altered,token_replicated}'::name[])
    LOOP
        -- Gateways compare a function with what it was when it was made.
        EXECUTE (SELECT pg_catalog.format('COMMENT ON FUNCTION %s IS %L', ours, 'tollgate '
            || pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(p.prosrc, 'UTF8')), 'hex'))
            FROM pg_catalog.pg_proc p WHERE p.oid = ours);
        IF (SELECT p.proowner <> owner FROM pg_catalog.pg_proc p WHERE p.oid = ours) THEN
            EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %I', ours, pg_catalog.pg_get_userbyid(owner));
        END IF;
    END LOOP;
END
$tollgate$;
