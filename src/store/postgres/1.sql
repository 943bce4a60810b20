-- The first schema. {schema} is the name of the schema, quoted.

CREATE TABLE {schema}.version (
    one          boolean PRIMARY KEY DEFAULT true CHECK (one),
    version      integer NOT NULL,
    -- The oldest version of these tables that a gateway must know to read them.
    readers_from integer NOT NULL,
    channel      text NOT NULL,
    -- Changes are noted since.
    since_ms     bigint NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000)::bigint
);
INSERT INTO {schema}.version (version, readers_from, channel) VALUES (1, 1, 'tollgate_change');

-- Times are unix seconds.
CREATE TABLE {schema}.token (
    digest      bytea PRIMARY KEY CHECK (length(digest) = 32),
    "user"      text NOT NULL CHECK ("user" <> ''),
    scopes      text[] NOT NULL DEFAULT '{}' CHECK (array_position(scopes, NULL) IS NULL),
    description text NOT NULL DEFAULT '',
    created     bigint NOT NULL DEFAULT extract(epoch FROM clock_timestamp())::bigint CHECK (created >= 0),
    not_before  bigint CHECK (not_before >= 0),
    expires     bigint CHECK (expires >= 0),
    revoked     bigint CHECK (revoked >= 0),
    blocked     boolean NOT NULL DEFAULT false,
    superseded  bigint CHECK (superseded >= 0),
    replaces    bytea CHECK (length(replaces) = 32),
    last_used   bigint CHECK (last_used >= 0)
) WITH (fillfactor = 90);
CREATE INDEX token_user ON {schema}.token ("user");

-- What changed, for a gateway that asks later. No digest: everything may have changed.
CREATE TABLE {schema}.change (
    seq    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    digest bytea,
    at_ms  bigint NOT NULL
);
CREATE INDEX change_at ON {schema}.change (at_ms);

-- The gateways that use this store, and what they have confirmed.
CREATE TABLE {schema}.replica (
    id   text PRIMARY KEY,
    name text NOT NULL,
    seen timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);
CREATE TABLE {schema}.wait (
    id    text PRIMARY KEY,
    asked timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE {schema}.confirmation (
    wait    text NOT NULL REFERENCES {schema}.wait ON DELETE CASCADE,
    replica text NOT NULL,
    PRIMARY KEY (wait, replica)
);

-- Notes which tokens changed, and tells whoever listens. NULL, or more than a thousand: everything.
CREATE FUNCTION {schema}.tell(changed bytea[]) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog AS $tollgate$
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

CREATE FUNCTION {schema}.token_added() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $tollgate$
BEGIN
    IF current_setting('tollgate.bulk', true) = 'on' THEN
        PERFORM {schema}.tell(NULL);
    ELSE
        PERFORM {schema}.tell(ARRAY(SELECT digest FROM new_rows LIMIT 1001));
    END IF;
    RETURN NULL;
END
$tollgate$;

CREATE FUNCTION {schema}.token_removed() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $tollgate$
BEGIN
    IF current_setting('tollgate.bulk', true) = 'on' THEN
        PERFORM {schema}.tell(NULL);
    ELSE
        PERFORM {schema}.tell(ARRAY(SELECT digest FROM old_rows LIMIT 1001));
    END IF;
    RETURN NULL;
END
$tollgate$;

-- TRUNCATE has no rows to name.
CREATE FUNCTION {schema}.token_emptied() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $tollgate$
BEGIN
    PERFORM {schema}.tell(NULL);
    RETURN NULL;
END
$tollgate$;

-- A token's last use is no change.
CREATE FUNCTION {schema}.token_altered() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $tollgate$
BEGIN
    IF current_setting('tollgate.bulk', true) = 'on' THEN
        PERFORM {schema}.tell(NULL);
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
    ));
    RETURN NULL;
END
$tollgate$;

CREATE TRIGGER tollgate_added AFTER INSERT ON {schema}.token
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_added();
CREATE TRIGGER tollgate_removed AFTER DELETE ON {schema}.token
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_removed();
CREATE TRIGGER tollgate_emptied AFTER TRUNCATE ON {schema}.token
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_emptied();
CREATE TRIGGER tollgate_altered AFTER UPDATE ON {schema}.token
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.token_altered();
