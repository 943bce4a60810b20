//! Writing tokens to tollgate's own tables. Used by the command line, never by a gateway.

use super::super::{AdminError, Confirmations, Imported, REPLICA_GONE, Records, TokenAdmin, TokenRecord, Visitor};
use super::connect::{self, QueryFailure, Reached, Target};
use super::schema::{self, Parameters};
use super::{PostgresSettings, Source};
use crate::hex;
use crate::store::credential::Digest;
use crate::store::query::{QueryDialect, QueryParameter, TokenQuery};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, GenericClient};
use tokio_util::task::AbortOnDropHandle;

const CONNECT: Duration = Duration::from_secs(10);
/// Timeout of a command; the statements of an import have none.
const STATEMENT: Duration = Duration::from_secs(30);
/// How long rows of `change` are kept: longer than a gateway after a restart asks for.
pub(super) const CHANGES_KEPT: Duration = Duration::from_secs(3_600);

/// A connection of the command line.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) place: String,
    _driver: AbortOnDropHandle<()>,
}

impl Session {
    pub(super) async fn open(settings: &PostgresSettings) -> Result<Self, AdminError> {
        let target = Target::new(settings)?;
        let place = target.to_string();
        let failed = |why: String| AdminError::Store(format!("{place}: {why}"));
        // A change that was reported as done must survive a power failure.
        let sql = format!("SET statement_timeout = {}; SET synchronous_commit = on", STATEMENT.as_millis());
        let reached = tokio::time::timeout(CONNECT, target.reach(&sql, CONNECT)).await;
        let reached = reached.map_err(|_| failed(format!("no connection within {CONNECT:?}")))?;
        let Reached { client, driver, .. } = reached.map_err(|why| failed(why.to_string()))?;
        let driver = AbortOnDropHandle::new(connect::drive(driver));
        Ok(Self { client, place, _driver: driver })
    }

    pub(super) fn failed(&self, error: &Error) -> AdminError {
        failed(&self.place, error)
    }
}

fn failed(place: &str, error: &Error) -> AdminError {
    match error.code() {
        Some(&SqlState::UNIQUE_VIOLATION) => AdminError::Exists,
        Some(&SqlState::CHECK_VIOLATION) => {
            AdminError::Store(format!("{place}: the record does not hold the rules of its table (SQLSTATE 23514)"))
        }
        _ => AdminError::Store(format!("{place}: {}", connect::say(error))),
    }
}

pub struct PostgresAdmin {
    session: Session,
    schema: String,
    /// Of the tables.
    version: i32,
}

/// The result of a migration.
pub struct Migrated {
    pub version: u32,
    /// The notification channel before and after, if it changed.
    pub moved: Option<(String, String)>,
}

impl PostgresAdmin {
    /// Read-only: listing tokens needs only SELECT, and works on a standby.
    pub async fn open(settings: &PostgresSettings) -> Result<Self, AdminError> {
        let schema = own_schema(settings)?;
        let session = Session::open(settings).await?;
        let version = schema::check(&session.client, schema).await;
        let version = version.map_err(|failure| garbled(&session.place, &failure))?;
        Ok(Self { session, schema: schema.to_owned(), version })
    }

    /// Creates or migrates tollgate's own tables, and sets the configured channel for all gateways.
    pub async fn migrate(settings: &PostgresSettings) -> Result<Migrated, AdminError> {
        let schema = own_schema(settings)?;
        let mut session = Session::open(settings).await?;
        let tables = schema::migrate(&mut session.client, schema, settings.channel.as_deref()).await;
        let tables = tables.map_err(|failure| garbled(&session.place, &failure))?;
        Ok(Migrated { version: u32::try_from(tables.version).unwrap_or(0), moved: tables.moved })
    }

    /// The SQL that [`Self::migrate`] would run; empty if there is nothing to do.
    pub async fn migration_sql(settings: &PostgresSettings) -> Result<String, AdminError> {
        let schema = own_schema(settings)?;
        let session = Session::open(settings).await?;
        let sql = schema::migration_sql(&session.client, schema, settings.channel.as_deref()).await;
        sql.map_err(|failure| garbled(&session.place, &failure))
    }

    /// Deletes changes that no gateway asks for any more. Done before a change, so that a failure here does not affect
    /// the result of the change.
    async fn prune(&self) -> Result<(), AdminError> {
        let kept = i64::try_from(CHANGES_KEPT.as_millis()).unwrap_or(i64::MAX);
        // Not clock_timestamp(), which may change while the statement runs: no index could be used.
        let sql = "DELETE FROM {schema}.change \
            WHERE at_ms < (extract(epoch FROM statement_timestamp()) * 1000)::bigint - $1::bigint";
        self.tidy(sql, &[&kept]).await
    }

    /// Deletes rows if it may; without the privilege, that is left to gateways and other users.
    async fn tidy(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<(), AdminError> {
        match self.session.client.execute(&self.fill(sql), parameters).await {
            Err(error) if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Err(self.session.failed(&error)),
            _ => Ok(()),
        }
    }

    fn fill(&self, sql: &str) -> String {
        schema::fill(sql, &self.schema)
    }

    async fn execute(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64, AdminError> {
        self.session.client.execute(sql, parameters).await.map_err(|error| self.session.failed(&error))
    }

    async fn records(&self, rest: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<TokenRecord>, AdminError> {
        let sql = self.fill(&format!("SELECT {} FROM {{schema}}.token {rest}", schema::columns_read(self.version, "")));
        let rows = self.session.client.query(&sql, parameters).await.map_err(|error| self.session.failed(&error))?;
        let records = rows.iter().map(|row| schema::record(row, 0)).collect::<Result<_, _>>();
        records.map_err(|failure| garbled(&self.session.place, &failure))
    }
}

const DIALECT: QueryDialect = QueryDialect {
    parameter: '$',
    has_scope: |parameter| format!("{parameter} = ANY (scopes)"),
    by_bytes: " COLLATE \"C\"",
};
const NEWEST_FIRST: &str = "ORDER BY created DESC, digest";
/// Records that one statement removes.
const REMOVED_AT_ONCE: usize = 5_000;
/// Rows in memory while all are visited.
const VISITED_AT_ONCE: i32 = 5_000;

fn own_schema(settings: &PostgresSettings) -> Result<&str, AdminError> {
    match &settings.source {
        Source::Own { schema } => Ok(schema),
        _ => Err(AdminError::Store("this store reads another program's tables: tokens are made there".into())),
    }
}

fn sql_value(parameter: &QueryParameter) -> &(dyn ToSql + Sync) {
    match parameter {
        QueryParameter::Text(text) => text,
        QueryParameter::Bytes(bytes) => bytes,
    }
}

fn garbled(place: &str, failure: &QueryFailure) -> AdminError {
    AdminError::Store(format!("{place}: {}", failure.error))
}

fn seconds(time: u64) -> i64 {
    i64::try_from(time).unwrap_or(i64::MAX)
}

fn insert_sql(version: i32) -> String {
    let columns = schema::columns_written(version);
    let parameters: Vec<_> = (1..=columns.split(", ").count()).map(|number| format!("${number}")).collect();
    format!("INSERT INTO {{schema}}.token ({columns}) VALUES ({})", parameters.join(", "))
}

/// What PostgreSQL, or tables of a version, cannot store.
fn check(record: &TokenRecord, version: i32) -> Result<(), AdminError> {
    schema::keeps(version, record).map_err(AdminError::Store)?;
    let texts = [&record.user, &record.description];
    if texts.into_iter().chain(&record.scopes).any(|text| text.contains('\0')) {
        return Err(AdminError::Store("a record with a NUL byte in its text".into()));
    }
    Ok(())
}

async fn insert(
    client: &impl GenericClient,
    schema: &str,
    version: i32,
    record: &TokenRecord,
    place: &str,
) -> Result<(), AdminError> {
    check(record, version)?;
    let sql = schema::fill(&insert_sql(version), schema);
    client.execute(&sql, &Parameters::of(record).written(version)).await.map_err(|error| failed(place, &error))?;
    Ok(())
}

#[async_trait]
impl TokenAdmin for PostgresAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        self.prune().await?;
        insert(&self.session.client, &self.schema, self.version, record, &self.session.place).await
    }

    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError> {
        self.prune().await?;
        let (version, written) = (self.version, schema::columns_written(self.version));
        let insert = self.fill(&format!(
            "INSERT INTO {{schema}}.token ({written}) SELECT {written} FROM pg_temp.tollgate_import ON CONFLICT DO NOTHING"
        ));
        // Of existing tokens: the fields that matter, in the input and in the table.
        let differ = self.fill(&format!(
            "SELECT {}, {} FROM pg_temp.tollgate_import g JOIN {{schema}}.token k ON k.digest = g.digest \
            WHERE g.\"user\" <> k.\"user\" OR g.revoked IS NOT NULL AND k.revoked IS NULL OR g.blocked AND NOT k.blocked \
            OR g.expires IS NOT NULL AND (k.expires IS NULL OR k.expires > g.expires){}",
            schema::columns_read(version, "k."),
            schema::columns_read(version, "g."),
            schema::differing_terms(version),
        ));
        let place = self.session.place.clone();
        let failed = |error: Error| failed(&place, &error);
        // Dropped, and so rolled back, on every return except the last.
        let transaction = self.session.client.transaction().await.map_err(failed)?;
        let prepare = "SET LOCAL statement_timeout = 0; \
            CREATE TEMPORARY TABLE tollgate_import (digest bytea, \"user\" text, scopes text[], description text, \
            created bigint, not_before bigint, expires bigint, revoked bigint, blocked boolean, superseded bigint, \
            replaces bytea, last_used bigint, plan text, rate text, networks text[], methods text[]) ON COMMIT DROP";
        transaction.batch_execute(prepare).await.map_err(failed)?;
        let copy = "COPY pg_temp.tollgate_import FROM STDIN (FORMAT binary)";
        let mut rows = pin!(BinaryCopyInWriter::new(transaction.copy_in(copy).await.map_err(failed)?, &schema::TYPES));
        for record in records {
            let record = record?;
            check(&record, version)?;
            rows.as_mut().write(&Parameters::of(&record).list()).await.map_err(failed)?;
        }
        rows.finish().await.map_err(failed)?;
        let mut imported =
            Imported { new: transaction.execute(&insert, &[]).await.map_err(failed)?, ..Imported::default() };
        let none: [&(dyn ToSql + Sync); 0] = [];
        let mut rows = pin!(transaction.query_raw(&differ, none).await.map_err(failed)?);
        while let Some(row) = rows.next().await {
            let row = row.map_err(failed)?;
            let [known, given] = [0, schema::COLUMNS_COUNT].map(|from| schema::record(&row, from));
            let garbled = |failure: QueryFailure| garbled(&place, &failure);
            imported.differing.compare(&known.map_err(garbled)?, &given.map_err(garbled)?);
        }
        transaction.commit().await.map_err(failed)?;
        Ok(imported)
    }

    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        self.records(NEWEST_FIRST, &[]).await
    }

    async fn select(&mut self, query: &TokenQuery, each: Visitor<'_>) -> Result<(), AdminError> {
        let (rest, parameters) = query.sql(&DIALECT);
        let parameters: Vec<_> = parameters.iter().map(sql_value).collect();
        self.visit_those(&rest, &parameters, each).await
    }

    async fn visit_user(&mut self, user: &str, each: Visitor<'_>) -> Result<(), AdminError> {
        self.visit_those("WHERE \"user\" = $1", &[&user], each).await
    }

    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        // The digests that begin with the prefix are a range of the primary key.
        let bound = |filler: char| {
            let hex: String = hex_prefix.chars().chain(std::iter::repeat(filler)).take(64).collect();
            Digest::from_hex(&hex).ok_or(AdminError::Missing)
        };
        let (first, last) = (bound('0')?, bound('f')?);
        let range = "WHERE digest BETWEEN $1 AND $2 ORDER BY digest LIMIT 100";
        self.records(range, &[&first.as_bytes().as_slice(), &last.as_bytes().as_slice()]).await
    }

    async fn of_user(&mut self, user: &str) -> Result<Vec<TokenRecord>, AdminError> {
        self.records("WHERE \"user\" = $1 ORDER BY created DESC, digest", &[&user]).await
    }

    async fn blocked_users(&mut self) -> Result<BTreeSet<String>, AdminError> {
        let sql = self.fill("SELECT DISTINCT \"user\" FROM {schema}.token WHERE blocked");
        let failed = |error: Error| self.session.failed(&error);
        let rows = self.session.client.query(&sql, &[]).await.map_err(failed)?;
        rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(failed)
    }

    fn notes_uses(&self) -> bool {
        true
    }

    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        self.prune().await?;
        let key = digest.as_bytes().as_slice();
        let sql = self.fill("UPDATE {schema}.token SET revoked = $2 WHERE digest = $1 AND revoked IS NULL");
        let changed = self.execute(&sql, &[&key, &seconds(at)]).await?;
        if changed == 0 && self.records("WHERE digest = $1", &[&key]).await?.is_empty() {
            return Err(AdminError::Missing);
        }
        Ok(changed == 1)
    }

    async fn revoke_user(&mut self, user: &str, at: u64) -> Result<u64, AdminError> {
        let sql = "UPDATE {schema}.token SET revoked = $2 WHERE \"user\" = $1 AND revoked IS NULL";
        self.change_all(sql, &[&user, &seconds(at)]).await
    }

    /// A row that another transaction changes meanwhile is judged as that one leaves it.
    async fn remove(&mut self, digests: &[Digest], still: &TokenQuery) -> Result<u64, AdminError> {
        let mut removed = 0;
        let mut parameters = Vec::new();
        let mut conditions = still.conditions(&DIALECT, &mut parameters);
        conditions.push(format!("digest = ANY (${})", parameters.len() + 1));
        let sql = format!("DELETE FROM {{schema}}.token WHERE {}", conditions.join(" AND "));
        for some in digests.chunks(REMOVED_AT_ONCE) {
            let keys: Vec<&[u8]> = some.iter().map(|digest| digest.as_bytes().as_slice()).collect();
            let mut all: Vec<_> = parameters.iter().map(sql_value).collect();
            all.push(&keys);
            removed += self.change_all(&sql, &all).await?;
        }
        Ok(removed)
    }

    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        self.prune().await?;
        let (find, supersede) = (
            self.fill("SELECT revoked, superseded, expires FROM {schema}.token WHERE digest = $1 FOR UPDATE"),
            self.fill("UPDATE {schema}.token SET superseded = $2, expires = $3 WHERE digest = $1"),
        );
        let key = old.as_bytes().as_slice();
        let place = self.session.place.clone();
        let failed = |error: Error| failed(&place, &error);
        let transaction = self.session.client.transaction().await.map_err(failed)?;
        let row = transaction.query_opt(&find, &[&key]).await.map_err(failed)?.ok_or(AdminError::Missing)?;
        // The tables allow no time before 1970; a record that has one nevertheless has expired.
        let time = |at: usize| -> Result<Option<u64>, AdminError> {
            let seconds: Option<i64> = row.try_get(at).map_err(failed)?;
            Ok(seconds.map(|seconds| u64::try_from(seconds).unwrap_or(0)))
        };
        let (revoked, superseded, expires) = (time(0)?, time(1)?, time(2)?);
        let end = TokenRecord { revoked, superseded, expires, ..TokenRecord::new(*old, "") }.rotated_out(at, end)?;
        let next = TokenRecord { replaces: Some(*old), ..next.clone() };
        insert(&transaction, &self.schema, self.version, &next, &place).await?;
        transaction.execute(&supersede, &[&key, &seconds(at), &seconds(end)]).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        let sql = "UPDATE {schema}.token SET blocked = $2 WHERE \"user\" = $1 AND blocked <> $2";
        self.change_all(sql, &[&user, &blocked]).await
    }

    async fn wait(&mut self, timeout: Duration) -> Result<Vec<String>, AdminError> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| AdminError::Store(format!("no random numbers: {error}")))?;
        let id = hex::encode(&random);
        // One statement: the notification is sent when the row is visible, after all earlier ones. If the server has no
        // room for it, gateways find the row.
        let ask = self.fill(
            "WITH w AS (INSERT INTO {schema}.wait (id) VALUES ($1) RETURNING id) \
            SELECT pg_catalog.pg_notify(v.channel, 'wait '::text || w.id) FROM w, {schema}.version v \
            WHERE pg_catalog.pg_notification_queue_usage() < 0.5",
        );
        self.execute(&ask, &[&id]).await?;
        let answers = self.answers(&id, timeout).await;
        self.tidy("DELETE FROM {schema}.replica WHERE seen < clock_timestamp() - interval '1 day'", &[]).await?;
        let forget =
            self.fill("DELETE FROM {schema}.wait WHERE id = $1 OR asked < clock_timestamp() - interval '1 day'");
        self.execute(&forget, &[&id]).await?;
        answers
    }
}

impl PostgresAdmin {
    /// One statement for many records. Returns how many it changed.
    async fn change_all(&mut self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64, AdminError> {
        self.prune().await?;
        let sql = self.fill(sql);
        let place = self.session.place.clone();
        let failed = |error: Error| failed(&place, &error);
        let transaction = self.session.client.transaction().await.map_err(failed)?;
        // Of a user with a million tokens this takes about as long as the timeout; a lock is not waited for that long.
        let limits = format!("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = {}", STATEMENT.as_millis());
        transaction.batch_execute(&limits).await.map_err(failed)?;
        let changed = transaction.execute(&sql, parameters).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(changed)
    }

    /// In slices of one portal: the server sorts, and what arrives is what was asked for.
    async fn visit_those(
        &mut self,
        rest: &str,
        parameters: &[&(dyn ToSql + Sync)],
        each: Visitor<'_>,
    ) -> Result<(), AdminError> {
        let sql = self.fill(&format!("SELECT {} FROM {{schema}}.token {rest}", schema::columns_read(self.version, "")));
        let place = self.session.place.clone();
        let failed = |error: Error| failed(&place, &error);
        let transaction = self.session.client.transaction().await.map_err(failed)?;
        let portal = transaction.bind(&sql, parameters).await.map_err(failed)?;
        loop {
            let rows = transaction.query_portal(&portal, VISITED_AT_ONCE).await.map_err(failed)?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in &rows {
                each(schema::record(row, 0).map_err(|failure| garbled(&place, &failure))?)?;
            }
        }
    }

    /// Gateways in containers may have one name: then a part of the id tells them apart.
    async fn answers(&self, id: &str, timeout: Duration) -> Result<Vec<String>, AdminError> {
        let sql = self.fill(
            "SELECT CASE WHEN count(*) OVER (PARTITION BY r.name) = 1 THEN r.name \
            ELSE r.name || ' (' || substr(r.id, 10, 8) || ')' END, \
            EXISTS (SELECT FROM {schema}.confirmation c WHERE c.wait = $1 AND c.replica = r.id) \
            FROM {schema}.replica r WHERE r.seen > clock_timestamp() - make_interval(secs => $2) ORDER BY r.name, r.id",
        );
        let gone = REPLICA_GONE.as_secs_f64();
        let failed = |error: Error| self.session.failed(&error);
        let statement = self.session.client.prepare(&sql).await.map_err(failed)?;
        let waiting = Confirmations::within(timeout);
        loop {
            let rows = self.session.client.query(&statement, &[&id, &gone]).await.map_err(failed)?;
            let replicas = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, Error>>();
            if let Some(outcome) = waiting.outcome(replicas.map_err(failed)?).await {
                return outcome;
            }
        }
    }
}
