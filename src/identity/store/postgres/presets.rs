//! GitLab's tables: the queries that read them, and the triggers that tell of changes in them or in anybody's. What a
//! trigger tells never holds a token: a channel is open to every user of the database.

use super::super::AdminError;
use super::admin::Session;
use super::{Bind, PostgresSettings, Source, schema};
use crate::identity::credential::Digest;

/// Columns that change with every use of a token, or with every change anyway.
const BUSY: &str = "{last_used_at,last_used,last_used_on,updated_at}";

const TOKENS: &str = "personal_access_tokens";

/// The one token that each user has. Who is not active may not come in.
pub(super) const GITLAB_LEGACY: &str = "SELECT username AS \"user\", state IS DISTINCT FROM 'active' AS blocked \
    FROM users WHERE authentication_token = $1";

/// Personal access tokens, by one of their columns. GitLab takes one only when it says that it is not revoked; the column
/// of scopes came later than the table.
pub(super) fn gitlab_pat(column: &str) -> String {
    format!(
        "SELECT u.username AS \"user\", row_to_json(t) ->> 'scopes' AS scopes, t.expires_at, \
        t.revoked IS NOT FALSE AS revoked, u.state IS DISTINCT FROM 'active' AS blocked \
        FROM {TOKENS} t JOIN users u ON u.id = t.user_id WHERE t.{column} = $1"
    )
}

/// SQL that makes the triggers, over and over if need be: for GitLab's tables, or for the table and column that a query
/// of one's own compares with `$1`.
pub fn triggers_sql(settings: &PostgresSettings, table: Option<&(String, String)>) -> Result<String, String> {
    let Some(channel) = &settings.channel else {
        return Err("notify = false: triggers would tell nobody".into());
    };
    schema::check_channel(channel)?;
    let users = ["authentication_token", "state", "username"];
    let triggers = match (&settings.source, table) {
        (Source::Own { .. }, _) => return Err("tollgate's own tables have theirs from `tollgate store migrate`".into()),
        (Source::Lookup { .. }, None) => {
            return Err("name the table and the column that the look-up compares with $1".into());
        }
        (Source::Lookup { bind, .. }, Some((table, column))) => for_column(table, column, bind, None, channel)?,
        (_, Some(_)) => return Err("a preset knows its tables: take --table and --column away".into()),
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
        CREATE SCHEMA IF NOT EXISTS tollgate;\n\
        {triggers}COMMIT;\n"
    ))
}

/// Makes the triggers.
pub async fn install_triggers(settings: &PostgresSettings, sql: &str) -> Result<(), AdminError> {
    let session = Session::open(settings).await?;
    session.client.batch_execute(sql).await.map_err(|error| session.failed(&error))
}

/// A query that says whether the triggers are there and tell on this channel; `None`: ours are part of the schema. Where
/// the tables are unknown, any that tells on the channel counts.
pub(super) fn trigger_check(source: &Source, channel: &str) -> Option<String> {
    let column = match source {
        Source::Own { .. } => return None,
        Source::Lookup { .. } => None,
        Source::GitlabLegacy => Some(("users", "authentication_token")),
        Source::GitlabPat => Some((TOKENS, "token")),
        Source::GitlabPatDigest(_) => Some((TOKENS, "token_digest")),
    };
    let mut wanted = Vec::new();
    match column {
        None => wanted.push("t.tgname LIKE 'tollgate\\_%'".to_owned()),
        Some((table, column)) => {
            let mut want = |name: String, table: &str| {
                wanted.push(format!("t.tgname = 'tollgate_{name}' AND t.tgrelid = to_regclass('{table}')"));
            };
            let tag = tag(table, column, channel);
            want(format!("added_{tag}"), table);
            want(format!("altered_{tag}"), table);
            if table == TOKENS {
                want(format!("owner_{tag}"), "users");
                want(format!("owner_gone_{tag}"), "users");
            }
        }
    }
    let exists = |condition: &String| {
        format!(
            "EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
            WHERE {condition} AND t.tgenabled IN ('O', 'A') AND strpos(p.prosrc, quote_literal('{channel}')) > 0)"
        )
    };
    Some(format!("SELECT {}", wanted.iter().map(exists).collect::<Vec<_>>().join(" AND ")))
}

/// Keeps apart what several stores or gateways put into one database.
fn tag(table: &str, column: &str, channel: &str) -> String {
    Digest::of(format!("{table}\n{column}\n{channel}").as_bytes()).to_hex()[..8].to_owned()
}

/// For the tokens that stand in a column. `watched`: the columns whose change matters; `None`: all but the busy ones.
fn for_column(
    table: &str,
    column: &str,
    bind: &Bind,
    watched: Option<&[&str]>,
    channel: &str,
) -> Result<String, String> {
    let table_sql = table.split('.').map(identifier).collect::<Result<Vec<_>, _>>()?.join(".");
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
        function_that_tells(&format!("tollgate.told_{tag}"), &values, bind, channel),
        format!(
            "CREATE OR REPLACE FUNCTION tollgate.emptied_{tag}() RETURNS trigger LANGUAGE plpgsql AS $tollgate$\n\
            BEGIN\n    PERFORM pg_notify('{channel}', '*');\n    RETURN NULL;\nEND\n$tollgate$;\n"
        ),
        trigger("added", &tag, "INSERT OR DELETE", &table_sql, "ROW", "told"),
        trigger("altered", &tag, "UPDATE", &table_sql, &format!("ROW WHEN ({changed})"), "told"),
        trigger("emptied", &tag, "TRUNCATE", &table_sql, "STATEMENT", "emptied"),
    ]
    .concat())
}

fn trigger(name: &str, tag: &str, event: &str, table: &str, each: &str, function: &str) -> String {
    format!(
        "DROP TRIGGER IF EXISTS tollgate_{name}_{tag} ON {table};\n\
        CREATE TRIGGER tollgate_{name}_{tag} AFTER {event} ON {table}\n    \
            FOR EACH {each}\n    EXECUTE FUNCTION tollgate.{function}_{tag}();\n"
    )
}

/// For the personal access tokens of a user who is blocked, renamed or gone.
fn for_owners(column: &str, bind: &Bind, channel: &str) -> String {
    let tag = tag(TOKENS, column, channel);
    // The tables are in one schema, whatever the search path is then.
    let tokens = format!(
        "IN EXECUTE format('SELECT {column}::text FROM %I.{TOKENS} WHERE user_id = $1', TG_TABLE_SCHEMA) USING OLD.id"
    );
    let changed = "ROW WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.username IS DISTINCT FROM NEW.username)";
    [
        function_that_tells(&format!("tollgate.owner_{tag}"), &tokens, bind, channel),
        trigger("owner", &tag, "UPDATE", "users", changed, "owner"),
        trigger("owner_gone", &tag, "DELETE", "users", "ROW", "owner"),
    ]
    .concat()
}

/// A trigger's function that tells of tokens by their digests. After a thousand in one transaction it says `*`:
/// everything. The server sends equal messages of a transaction once.
fn function_that_tells(function: &str, tokens: &str, bind: &Bind, channel: &str) -> String {
    // A digest that is none can't be asked for either.
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
    format!(
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $tollgate$\n\
        DECLARE\n    \
            token text;\n    \
            name text;\n    \
            told integer := coalesce(nullif(current_setting('tollgate.told', true), ''), '0')::integer;\n    \
            now_ms constant text := (extract(epoch FROM clock_timestamp()) * 1000)::bigint::text;\n\
        BEGIN\n    \
            FOR token {tokens} LOOP\n        \
                name := {name};\n        \
                CONTINUE WHEN name IS NULL;\n        \
                told := told + 1;\n        \
                IF told > 1000 THEN\n            \
                    PERFORM pg_notify('{channel}', '*');\n            \
                    RETURN NULL;\n        \
                END IF;\n        \
                PERFORM pg_notify('{channel}', name || ' ' || now_ms);\n    \
            END LOOP;\n    \
            PERFORM set_config('tollgate.told', told::text, true);\n    \
            RETURN NULL;\n\
        END\n$tollgate$;\n"
    )
}

fn identifier(name: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > 40 || name.contains(['"', '\0', '.']) {
        return Err(format!("{name:?} is no name of a table or column that can be used here"));
    }
    Ok(format!("\"{name}\""))
}
