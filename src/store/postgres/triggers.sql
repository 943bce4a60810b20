-- The triggers of the token table, and who may use their functions. Can be repeated: a migration runs it also to put
-- right what somebody switched off. {schema} is the name of the schema, quoted.

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
            OLD.blocked, OLD.superseded, OLD.replaces)
        IS DISTINCT FROM
        (NEW.digest, NEW."user", NEW.scopes, NEW.description, NEW.created, NEW.not_before, NEW.expires, NEW.revoked,
            NEW.blocked, NEW.superseded, NEW.replaces)
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
        AND p.proowner <> owner
    LOOP
        EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %I', ours, pg_catalog.pg_get_userbyid(owner));
    END LOOP;
END
$tollgate$;
