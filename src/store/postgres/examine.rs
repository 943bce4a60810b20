//! What a PostgreSQL server says of itself and of the rights of its user: what a gateway needs, and what mends it.

use super::super::examine::Finding;
use super::admin::Session;
use super::{PostgresSettings, Source};
use crate::store::AdminError;
use std::time::SystemTime;

/// From here on the notification queue is worth a warning.
const QUEUE: f64 = 0.05;

impl PostgresSettings {
    pub(in crate::store) async fn examine(&self) -> Vec<Finding> {
        let session = match Session::open(self).await {
            Ok(session) => session,
            Err(error) => return vec![Finding::error(format!("no connection: {error}"), "")],
        };
        let mut found = Vec::new();
        found.push(server(&session).await.unwrap_or_else(cannot_tell));
        found.push(clock(&session).await.unwrap_or_else(cannot_tell));
        found.push(queue(&session).await.unwrap_or_else(cannot_tell));
        if let Source::Own { schema } = &self.source {
            match rights(&session, schema).await {
                Ok(rights) => found.extend(rights),
                Err(error) => found.push(cannot_tell(error)),
            }
        }
        found
    }
}

fn cannot_tell(error: AdminError) -> Finding {
    Finding::warning(format!("it could not be found out: {error}"), "")
}

async fn server(session: &Session) -> Result<Finding, AdminError> {
    let sql = "SELECT pg_catalog.current_setting('server_version'), pg_catalog.pg_is_in_recovery(), \
        coalesce(pg_catalog.host(pg_catalog.inet_server_addr()), 'a socket'), current_user::text";
    let failed = |error| session.failed(&error);
    let row = session.client.query_one(sql, &[]).await.map_err(failed)?;
    let (version, standby): (String, bool) = (row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?);
    let (place, user): (String, String) = (row.try_get(2).map_err(failed)?, row.try_get(3).map_err(failed)?);
    let what = format!("PostgreSQL {version} at {place}, as user {user}");
    Ok(match standby {
        false => Finding::fine(what),
        true => Finding::error(
            format!("{what}: a standby, which tells nobody of changes"),
            "name the primary in url, alone or among others",
        ),
    })
}

async fn clock(session: &Session) -> Result<Finding, AdminError> {
    let asked = SystemTime::now();
    let sql = "SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::bigint";
    let failed = |error| session.failed(&error);
    let ms: i64 = session.client.query_one(sql, &[]).await.and_then(|row| row.try_get(0)).map_err(failed)?;
    Ok(Finding::clock(u64::try_from(ms).unwrap_or(0), asked))
}

async fn queue(session: &Session) -> Result<Finding, AdminError> {
    let failed = |error| session.failed(&error);
    let sql = "SELECT pg_catalog.pg_notification_queue_usage()";
    let usage: f64 = session.client.query_one(sql, &[]).await.and_then(|row| row.try_get(0)).map_err(failed)?;
    if usage < QUEUE {
        return Ok(Finding::fine("the server's queue of notifications is empty"));
    }
    let what = format!("the server's queue of notifications is {:.0} % full", usage * 100.0);
    let mend = "end the session that listens and stays in a transaction: SELECT pid, usename, xact_start FROM \
        pg_stat_activity WHERE state LIKE 'idle in transaction%' ORDER BY xact_start";
    Ok(Finding::warning(what, mend))
}

/// What a gateway may do on tollgate's own tables.
async fn rights(session: &Session, schema: &str) -> Result<Vec<Finding>, AdminError> {
    let failed = |error| session.failed(&error);
    let needed: [(&str, &str, &str); 10] = [
        ("version", "SELECT", "SELECT"),
        ("token", "SELECT", "SELECT"),
        ("change", "SELECT", "SELECT"),
        ("replica", "SELECT", "SELECT"),
        ("wait", "SELECT", "SELECT"),
        ("confirmation", "SELECT", "SELECT"),
        ("replica", "INSERT", "INSERT, UPDATE"),
        ("replica", "UPDATE", "INSERT, UPDATE"),
        ("confirmation", "INSERT", "INSERT, UPDATE"),
        ("change", "DELETE", "DELETE"),
    ];
    let mut found = Vec::new();
    let may_use = "SELECT pg_catalog.has_schema_privilege($1::text, 'USAGE')";
    let usage: bool =
        session.client.query_one(may_use, &[&schema]).await.and_then(|row| row.try_get(0)).map_err(failed)?;
    if !usage {
        let mend = format!("GRANT USAGE ON SCHEMA {schema} TO current_user");
        return Ok(vec![Finding::error(format!("no right to use the schema {schema}"), mend)]);
    }
    for (table, right, grant) in needed {
        let sql = "SELECT pg_catalog.has_table_privilege($1::text, $2::text)";
        let name = format!("{schema}.{table}");
        let may: bool =
            session.client.query_one(sql, &[&name, &right]).await.and_then(|row| row.try_get(0)).map_err(failed)?;
        if may {
            continue;
        }
        let mend = format!("GRANT {grant} ON {name} TO the gateway's user");
        let what = format!("no right to {right} on {name}");
        found.push(match (table, right) {
            ("change", "DELETE") => {
                Finding::warning(format!("{what}: old changes stay until others delete them"), mend)
            }
            ("replica" | "confirmation", "INSERT" | "UPDATE") => {
                Finding::error(format!("{what}: the gateway cannot confirm revocations"), mend)
            }
            _ => Finding::error(what, mend),
        });
    }
    let sql = "SELECT pg_catalog.has_column_privilege($1::text, 'last_used', 'UPDATE')";
    let name = format!("{schema}.token");
    if !session.client.query_one(sql, &[&name]).await.and_then(|row| row.try_get::<_, bool>(0)).map_err(failed)? {
        let mend = format!("GRANT UPDATE (last_used) ON {name} TO the gateway's user");
        found.push(Finding::warning("no right to note when a token was last used", mend));
    }
    if found.is_empty() {
        found.push(Finding::fine(format!("the user may do what a gateway does in schema {schema}")));
    }
    Ok(found)
}
