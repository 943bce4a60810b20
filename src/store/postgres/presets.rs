//! GitLab's tables: the queries that read them, and the triggers that send notifications of changes in them or in other
//! tables. A notification never contains a token, because every user of the database can listen on a channel.

use super::super::AdminError;
use super::admin::Session;
use super::connect::SEARCH_PATH;
use super::{Bind, PostgresSettings, Source, schema};
use crate::problem::Problem;
use crate::store::credential::Digest;

/// Columns that change with every use of a token, or with every change of a row.
const BUSY: &str = "{last_used_at,last_used,last_used_on,updated_at}";

const TOKENS: &str = "personal_access_tokens";

/// The schema of GitLab's tables, and of tables named without a schema.
const SCHEMA: &str = "public";

// Every name in these queries is qualified with its schema, including operators: if other users may create operators,
// one of theirs that fits the types better would be used. IS DISTINCT FROM searches for an operator as well, and cannot
// be qualified. The casts to text do not prevent the use of an index.

/// The private token of each user. A user that is not active is blocked.
pub(super) const GITLAB_LEGACY: &str = "SELECT u.username::text AS \"user\", \
    coalesce(NOT u.state::text OPERATOR(pg_catalog.=) 'active'::text, true) AS blocked \
    FROM public.users u WHERE u.authentication_token::text OPERATOR(pg_catalog.=) $1::text";

/// Personal access tokens, by one of their columns. GitLab accepts a token only if `revoked` is false; the column of
/// scopes was added later than the table.
pub(super) fn gitlab_pat(column: &str) -> String {
    format!(
        "SELECT u.username::text AS \"user\", \
        pg_catalog.row_to_json(t) OPERATOR(pg_catalog.->>) 'scopes'::text AS scopes, t.expires_at, \
        t.revoked IS NOT FALSE AS revoked, \
        coalesce(NOT u.state::text OPERATOR(pg_catalog.=) 'active'::text, true) AS blocked \
        FROM {SCHEMA}.{TOKENS} t JOIN {SCHEMA}.users u ON u.id OPERATOR(pg_catalog.=) t.user_id \
        WHERE t.{column}::text OPERATOR(pg_catalog.=) $1::text"
    )
}

/// Why triggers cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum NoTriggers {
    #[error("notify = false: nobody listens to triggers")]
    NotifyIsOff,
    #[error("{0}")]
    Channel(Problem),
    #[error("tollgate's own tables have theirs from `tollgate store migrate`")]
    OwnTables,
    #[error("give --table and --column: the ones that the lookup query compares with $1")]
    TableUnknown,
    #[error("a preset knows its tables: remove --table and --column")]
    TableKnown,
    #[error("{0:?} cannot be used as the name of a table or column")]
    Name(String),
}

/// SQL that creates the triggers, and can be repeated: for GitLab's tables, or for the table and column that a custom
/// query compares with `$1`.
pub fn triggers_sql(settings: &PostgresSettings, table: Option<&(String, String)>) -> Result<String, NoTriggers> {
    let channel = channel_of(settings)?;
    let users = ["authentication_token", "state", "username"];
    let triggers = match (&settings.source, table) {
        (Source::Own { .. }, _) => return Err(NoTriggers::OwnTables),
        (Source::Lookup { .. }, None) => return Err(NoTriggers::TableUnknown),
        (Source::Lookup { bind, .. }, Some((table, column))) => for_column(table, column, bind, None, channel)?,
        (_, Some(_)) => return Err(NoTriggers::TableKnown),
        (Source::GitlabLegacy, None) => {
            for_column("users", "authentication_token", &Bind::Plain, Some(&users), channel)?
        }
        (Source::GitlabPat, None) => {
            for_column(TOKENS, "token", &Bind::Plain, None, channel)? + &for_owners("token", &Bind::Plain, channel)
        }
        (Source::GitlabPatDigest(secret), None) => {
            let bind = Bind::Gitlab(secret.clone());
            for_column(TOKENS, "token_digest", &bind, None, channel)? + &for_owners("token_digest", &bind, channel)
        }
    };
    Ok(format!(
        "-- Tells tollgate of changes, on channel {channel}. Needs PostgreSQL 11 or later and the tables' owner.\n\
        BEGIN;\n\
        SET LOCAL lock_timeout = '5s';\n\
        SET LOCAL search_path = {SEARCH_PATH};\n\
        CREATE SCHEMA IF NOT EXISTS tollgate;\n\
        {triggers}COMMIT;\n"
    ))
}

/// The table and the column of GitLab's tokens; `None`: the tables are not GitLab's.
const fn gitlab_column(source: &Source) -> Option<(&'static str, &'static str)> {
    match source {
        Source::Own { .. } | Source::Lookup { .. } => None,
        Source::GitlabLegacy => Some(("users", "authentication_token")),
        Source::GitlabPat => Some((TOKENS, "token")),
        Source::GitlabPatDigest(_) => Some((TOKENS, "token_digest")),
    }
}

fn channel_of(settings: &PostgresSettings) -> Result<&str, NoTriggers> {
    let channel = settings.channel.as_deref().ok_or(NoTriggers::NotifyIsOff)?;
    schema::check_channel(channel).map_err(NoTriggers::Channel)?;
    Ok(channel)
}

/// SQL that removes what [`triggers_sql`] of the same arguments makes, and can be repeated.
pub fn removal_sql(settings: &PostgresSettings, table: Option<&(String, String)>) -> Result<String, NoTriggers> {
    let channel = channel_of(settings)?;
    let (table, column) = match (&settings.source, table) {
        (Source::Own { .. }, _) => return Err(NoTriggers::OwnTables),
        (Source::Lookup { .. }, None) => return Err(NoTriggers::TableUnknown),
        (Source::Lookup { .. }, Some((table, column))) => (table.as_str(), column.as_str()),
        (_, Some(_)) => return Err(NoTriggers::TableKnown),
        (source, None) => gitlab_column(source).ok_or(NoTriggers::TableUnknown)?,
    };
    let tag = tag(table, column, channel);
    let mut removal = drop_triggers(&["added", "altered", "emptied"], &tag, &qualified(table)?);
    let mut functions = vec!["told", "emptied"];
    if table == TOKENS {
        removal += &drop_triggers(&["owner", "owner_gone"], &tag, &format!("\"{SCHEMA}\".\"users\""));
        functions.push("owner");
    }
    removal.extend(functions.iter().map(|name| format!("DROP FUNCTION IF EXISTS tollgate.{name}_{tag}();\n")));
    Ok(format!(
        "-- Removes what tells tollgate of changes on channel {channel}.\n\
        BEGIN;\n\
        SET LOCAL lock_timeout = '5s';\n\
        SET LOCAL search_path = {SEARCH_PATH};\n\
        {removal}\
        -- The schema goes with the last of them.\n\
        DO $tollgate$ BEGIN\n    \
            IF EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = 'tollgate' AND NOT EXISTS (SELECT FROM \
            pg_catalog.pg_depend d WHERE d.refclassid = 'pg_catalog.pg_namespace'::regclass AND d.refobjid = n.oid)) \
            THEN\n        DROP SCHEMA tollgate;\n    END IF;\n\
        END $tollgate$;\n\
        COMMIT;\n"
    ))
}

/// Runs SQL that creates or removes triggers.
pub async fn run_triggers_sql(settings: &PostgresSettings, sql: &str) -> Result<(), AdminError> {
    let session = Session::open(settings).await?;
    session.client.batch_execute(sql).await.map_err(|error| session.failed(&error))
}

/// A query with one row: whether the triggers exist, fire and notify on the channel, whether some of them are of an older
/// version, whose functions use the search path and the rights of the session that changes the table, the other channels
/// on which tollgate's triggers notify, and which of them are switched off or have a function that somebody replaced. A gateway
/// may only read the tables, so that it looks at the path instead of writing through it.
pub(super) struct TriggerCheck(pub(super) String);

/// `None`: tollgate's own triggers are part of its schema. If the tables are unknown, any trigger on the channel
/// counts.
pub(super) fn trigger_check(source: &Source, channel: &str) -> Option<TriggerCheck> {
    if let Source::Own { .. } = source {
        return None;
    }
    let column = gitlab_column(source);
    let ours = "t.tgname LIKE 'tollgate\\_%'";
    let mut wanted = Vec::new();
    match column {
        None => wanted.push(ours.to_owned()),
        Some((table, column)) => {
            let mut want = |name: String, table: &str| {
                let table = format!("pg_catalog.to_regclass('{SCHEMA}.{table}'::text)");
                wanted.push(format!("t.tgname = 'tollgate_{name}' AND t.tgrelid = {table}"));
            };
            let tag = tag(table, column, channel);
            want(format!("added_{tag}"), table);
            want(format!("altered_{tag}"), table);
            want(format!("emptied_{tag}"), table);
            if table == TOKENS {
                want(format!("owner_{tag}"), "users");
                want(format!("owner_gone_{tag}"), "users");
            }
        }
    }
    let all = "FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid";
    let tells = format!("pg_catalog.strpos(p.prosrc, pg_catalog.quote_literal('{channel}'::text)) > 0");
    // An ordinary trigger does not fire for what a subscription writes into its table.
    let fires = "(t.tgenabled = 'A' OR t.tgenabled = 'O' AND NOT EXISTS (SELECT FROM pg_catalog.pg_subscription_rel s \
        WHERE s.srrelid = t.tgrelid))";
    let exists = |condition: &String| format!("EXISTS (SELECT {all} WHERE {condition} AND {fires} AND {tells})");
    let there = wanted.iter().map(exists).collect::<Vec<_>>().join(" AND ");
    let any = wanted.iter().map(|condition| format!("({condition})")).collect::<Vec<_>>().join(" OR ");
    let current = format!("coalesce('search_path={SEARCH_PATH}' = ANY (p.proconfig), false) AND p.prosecdef");
    // Functions of an older version say nothing of what they were.
    let said = "pg_catalog.obj_description(p.oid, 'pg_proc')";
    let replaced = format!(
        "pg_catalog.starts_with({said}, 'tollgate {channel} ') AND {said} <> 'tollgate {channel} ' || {FINGERPRINT}"
    );
    let other = r"pg_catalog.substring(p.prosrc, 'pg_notify\(''([^'']+)''')";
    let off = format!(
        "CASE WHEN {replaced} THEN pg_catalog.format('function %s is not as it was made: `tollgate store install-triggers \
        --config FILE` makes it again', p.oid::pg_catalog.regproc) \
        ELSE pg_catalog.format('trigger %I of %s is off: `ALTER TABLE %s ENABLE ALWAYS TRIGGER %I` switches it on', \
        t.tgname, t.tgrelid::pg_catalog.regclass, t.tgrelid::pg_catalog.regclass, t.tgname) END"
    );
    Some(TriggerCheck(format!(
        "SELECT {there}, EXISTS (SELECT {all} WHERE {ours} AND {tells} AND NOT ({current})), \
        (SELECT pg_catalog.string_agg(DISTINCT {other}, ', ') {all} WHERE {ours} AND NOT {tells}), \
        (SELECT pg_catalog.string_agg(DISTINCT {off}, '; ') {all} WHERE ({any}) AND ({tells} AND NOT {fires} OR {replaced}))"
    )))
}

/// Distinguishes the triggers of several stores or gateways in one database.
fn tag(table: &str, column: &str, channel: &str) -> String {
    let table = table.strip_prefix("public.").unwrap_or(table);
    Digest::of(format!("{table}\n{column}\n{channel}").as_bytes()).to_hex()[..8].to_owned()
}

/// A table's name in SQL.
fn qualified(table: &str) -> Result<String, NoTriggers> {
    Ok(match table.split_once('.') {
        Some((schema, table)) => format!("{}.{}", identifier(schema)?, identifier(table)?),
        None => format!("\"{SCHEMA}\".{}", identifier(table)?),
    })
}

/// For the tokens in a column. `watched`: the columns whose changes matter; `None`: all except the frequently changing
/// ones.
fn for_column(
    table: &str,
    column: &str,
    bind: &Bind,
    watched: Option<&[&str]>,
    channel: &str,
) -> Result<String, NoTriggers> {
    let table_sql = qualified(table)?;
    let column_sql = identifier(column)?;
    let tag = tag(table, column, channel);
    let changed = match watched {
        Some(columns) => {
            let differ = |column: &&str| format!("OLD.\"{column}\" IS DISTINCT FROM NEW.\"{column}\"");
            columns.iter().map(differ).collect::<Vec<_>>().join(" OR ")
        }
        None => format!("to_jsonb(OLD) - '{BUSY}'::text[] IS DISTINCT FROM to_jsonb(NEW) - '{BUSY}'::text[]"),
    };
    let values = format!("IN SELECT OLD.{column_sql}::text UNION SELECT NEW.{column_sql}::text");
    Ok([
        drop_triggers(&["added", "altered", "emptied"], &tag, &table_sql),
        function_that_tells(&format!("tollgate.told_{tag}"), &table_sql, &values, bind, channel),
        function(
            &format!("tollgate.emptied_{tag}"),
            &table_sql,
            channel,
            &format!(
                "BEGIN\n{QUEUE_IS_FULL}    PERFORM pg_catalog.pg_notify('{channel}', '*');\n    RETURN NULL;\nEND"
            ),
        ),
        trigger("added", &tag, "INSERT OR DELETE", &table_sql, "ROW", "told"),
        trigger("altered", &tag, "UPDATE", &table_sql, &format!("ROW WHEN ({changed})"), "told"),
        trigger("emptied", &tag, "TRUNCATE", &table_sql, "STATEMENT", "emptied"),
    ]
    .concat())
}

/// Before the functions, which are dropped and created, not replaced: a function of that name made by another user
/// would remain theirs to change.
fn drop_triggers(names: &[&str], tag: &str, table: &str) -> String {
    names.iter().map(|name| format!("DROP TRIGGER IF EXISTS tollgate_{name}_{tag} ON {table};\n")).collect()
}

/// The first lines of each trigger function: a transaction that notifies while the server's queue of notifications is full
/// fails when it commits. Gateways look at the queue themselves, and promise nothing long before it comes to this.
const QUEUE_IS_FULL: &str =
    "    IF pg_catalog.pg_notification_queue_usage() >= 0.5 THEN\n        RETURN NULL;\n    END IF;\n";

/// Of what a function does.
const FINGERPRINT: &str = "pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(p.prosrc, 'UTF8')), 'hex')";

/// A trigger function. It runs with the rights of the table's owner: who changes the table needs no right on what the
/// function reads. Its search path must not be controlled by users who may create objects in some schema, and nobody else
/// may attach it to a table of theirs.
fn function(name: &str, table: &str, channel: &str, body: &str) -> String {
    let table = table.replace('\'', "''");
    format!(
        "DROP FUNCTION IF EXISTS {name}();\n\
        CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = {SEARCH_PATH} AS \
        $tollgate$\n{body}\n$tollgate$;\n\
        REVOKE EXECUTE ON FUNCTION {name}() FROM PUBLIC;\n\
        -- Gateways compare the function with what it was when it was made.\n\
        DO $tollgate$ BEGIN\n    \
            EXECUTE (SELECT pg_catalog.format('COMMENT ON FUNCTION {name}() IS %L', 'tollgate {channel} ' || {FINGERPRINT}) \
            FROM pg_catalog.pg_proc p WHERE p.oid = '{name}()'::pg_catalog.regprocedure);\n\
        END $tollgate$;\n\
        -- A superuser's rights are not lent to whoever changes the table.\n\
        DO $tollgate$ BEGIN\n    \
            IF (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user) THEN\n        \
                EXECUTE (SELECT pg_catalog.format('ALTER FUNCTION {name}() OWNER TO %I', \
                pg_catalog.pg_get_userbyid(c.relowner)) FROM pg_catalog.pg_class c WHERE c.oid = '{table}'::regclass);\n    \
            END IF;\n\
        END $tollgate$;\n"
    )
}

/// Fires also for what a subscription or a loaded copy writes, where ordinary triggers stay silent.
fn trigger(name: &str, tag: &str, event: &str, table: &str, each: &str, function: &str) -> String {
    format!(
        "CREATE TRIGGER tollgate_{name}_{tag} AFTER {event} ON {table}\n    \
            FOR EACH {each}\n    EXECUTE FUNCTION tollgate.{function}_{tag}();\n\
        ALTER TABLE {table} ENABLE ALWAYS TRIGGER tollgate_{name}_{tag};\n"
    )
}

/// For the personal access tokens of a user who is blocked, renamed or removed.
fn for_owners(column: &str, bind: &Bind, channel: &str) -> String {
    let tag = tag(TOKENS, column, channel);
    let tokens_table = format!("\"{SCHEMA}\".\"{TOKENS}\"");
    let tokens = format!("IN SELECT t.{column}::text FROM {tokens_table} t WHERE t.user_id = OLD.id");
    let users = format!("\"{SCHEMA}\".\"users\"");
    let changed = "ROW WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.username IS DISTINCT FROM NEW.username)";
    [
        drop_triggers(&["owner", "owner_gone"], &tag, &users),
        function_that_tells(&format!("tollgate.owner_{tag}"), &tokens_table, &tokens, bind, channel),
        trigger("owner", &tag, "UPDATE", &users, changed, "owner"),
        trigger("owner_gone", &tag, "DELETE", &users, "ROW", "owner"),
    ]
    .concat()
}

/// A trigger function that notifies of tokens by their digests. The server sends equal messages of a transaction once;
/// before PostgreSQL 13 it compares each one with all others for that, so that after a thousand, `*` stands for all tokens.
fn function_that_tells(name_of_function: &str, table: &str, tokens: &str, bind: &Bind, channel: &str) -> String {
    // A value that is not a digest cannot be looked up either.
    let name = match bind {
        Bind::Plain => "encode(sha256(convert_to(token, 'UTF8')), 'hex')",
        Bind::Sha256Hex => "substring(lower(token) FROM '^(?:\\\\x)?([0-9a-f]{64})$')",
        Bind::Sha256Base64 => {
            "CASE WHEN token ~ '^[A-Za-z0-9+/]{43}=$' THEN encode(decode(token, 'base64'), 'hex') END"
        }
        Bind::Gitlab(_) => {
            "CASE WHEN token ~ '^[A-Za-z0-9+/]{43}=$' THEN 'h:' || encode(decode(token, 'base64'), 'hex') END"
        }
    };
    function(
        name_of_function,
        table,
        channel,
        &format!(
            "DECLARE\n    \
                token text;\n    \
                name text;\n    \
                told integer := coalesce(nullif(current_setting('tollgate.told', true), ''), '0')::integer;\n    \
                now_ms constant text := (extract(epoch FROM clock_timestamp()) * 1000)::bigint::text;\n\
            BEGIN\n{QUEUE_IS_FULL}    \
                FOR token {tokens} LOOP\n        \
                    name := {name};\n        \
                    CONTINUE WHEN name IS NULL;\n        \
                    told := told + 1;\n        \
                    IF told > 1000 AND current_setting('server_version_num')::integer < 130000 THEN\n            \
                        PERFORM pg_catalog.pg_notify('{channel}', '*');\n            \
                        RETURN NULL;\n        \
                    END IF;\n        \
                    PERFORM pg_catalog.pg_notify('{channel}', name || ' ' || now_ms);\n    \
                END LOOP;\n    \
                PERFORM set_config('tollgate.told', told::text, true);\n    \
                RETURN NULL;\n\
            END"
        ),
    )
}

fn identifier(name: &str) -> Result<String, NoTriggers> {
    if name.is_empty() || name.len() > 40 || name.contains(['"', '\0', '.']) {
        return Err(NoTriggers::Name(name.to_owned()));
    }
    Ok(format!("\"{name}\""))
}
