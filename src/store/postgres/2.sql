-- The second schema: functions look for names in the catalog only, the session's own temporary objects last, and call
-- each other with the very types, so that nobody else's function of the same name is taken. {schema} is the name of the
-- schema, quoted.

CREATE OR REPLACE FUNCTION {schema}.tell(changed bytea[]) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $tollgate$
DECLARE
    now_ms constant bigint := (extract(epoch FROM clock_timestamp()) * 1000)::bigint;
    channel constant text := (SELECT v.channel FROM {schema}.version v);
BEGIN
    -- A gateway notes last uses, and need not be allowed to write more than those.
    IF cardinality(changed) = 0 THEN
        RETURN;
    END IF;
    IF changed IS NULL OR cardinality(changed) > 1000 THEN
        INSERT INTO {schema}.change (digest, at_ms) VALUES (NULL, now_ms);
        PERFORM pg_notify(channel, '*');
    ELSE
        INSERT INTO {schema}.change (digest, at_ms) SELECT digest, now_ms FROM unnest(changed) AS c (digest);
        PERFORM pg_notify(channel, encode(digest, 'hex') || ' ' || now_ms) FROM unnest(changed) AS c (digest);
    END IF;
END
$tollgate$;

CREATE OR REPLACE FUNCTION {schema}.token_added() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    IF current_setting('tollgate.bulk', true) = 'on' THEN
        PERFORM {schema}.tell(NULL::bytea[]);
    ELSE
        PERFORM {schema}.tell(ARRAY(SELECT digest FROM new_rows LIMIT 1001)::bytea[]);
    END IF;
    RETURN NULL;
END
$tollgate$;

CREATE OR REPLACE FUNCTION {schema}.token_removed() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    IF current_setting('tollgate.bulk', true) = 'on' THEN
        PERFORM {schema}.tell(NULL::bytea[]);
    ELSE
        PERFORM {schema}.tell(ARRAY(SELECT digest FROM old_rows LIMIT 1001)::bytea[]);
    END IF;
    RETURN NULL;
END
$tollgate$;

CREATE OR REPLACE FUNCTION {schema}.token_emptied() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    PERFORM {schema}.tell(NULL::bytea[]);
    RETURN NULL;
END
$tollgate$;

CREATE OR REPLACE FUNCTION {schema}.token_altered() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $tollgate$
BEGIN
    IF current_setting('tollgate.bulk', true) = 'on' THEN
        PERFORM {schema}.tell(NULL::bytea[]);
        RETURN NULL;
    END IF;
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
        ) AS differing LIMIT 1001
    )::bytea[]);
    RETURN NULL;
END
$tollgate$;
