//! The SQLite store as the command line writes to it.

use super::{COLUMNS, NOW_MS, last_seq, lookup, open, record};
use crate::store::credential::Digest;
use crate::store::query::{QueryDialect, QueryParameter, TokenQuery};
use crate::store::record::{FieldValue, RecordField};
use crate::store::{AdminError, Confirmations, Imported, REPLICA_GONE, Records, TokenAdmin, TokenRecord, Visitor};
use async_trait::async_trait;
use rusqlite::types::Value;
use rusqlite::{CachedStatement, Connection, params, params_from_iter};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

/// Rows of `change` are kept this long. A gateway that was away longer forgets everything instead.
const CHANGES_KEPT_MS: i64 = 3_600_000;
/// Records that one transaction removes.
const REMOVED_AT_ONCE: usize = 5_000;
/// Memory that an import may take, at most; a third of a database of ten million tokens.
const IMPORT_CACHE_KIB: i64 = 512 * 1024;

/// The store as the command line writes to it.
pub struct SqliteAdmin {
    db: Connection,
}

impl SqliteAdmin {
    pub fn open(path: &Path) -> Result<Self, AdminError> {
        let db = open(path).map_err(|error| AdminError::Store(error.to_string()))?;
        let oldest = "DELETE FROM change WHERE at_ms < CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) - ?1";
        db.execute(oldest, [CHANGES_KEPT_MS])?;
        Ok(Self { db })
    }

    /// A database without tokens that is on no disk.
    pub fn empty() -> Result<Self, AdminError> {
        let mut db = Connection::open_in_memory()?;
        super::prepare(&mut db).map_err(|error| AdminError::Store(error.to_string()))?;
        Ok(Self { db })
    }

    /// The gateways that were seen lately, and whether they have taken in all changes up to a number.
    fn replicas(&self, target: i64, gone: i64) -> rusqlite::Result<Vec<(String, bool)>> {
        let sql = format!("SELECT name, applied >= ?1 FROM replica WHERE seen_ms >= {NOW_MS} - ?2 ORDER BY name");
        let mut query = self.db.prepare_cached(&sql)?;
        query.query_map([target, gone], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
    }
}

impl From<rusqlite::Error> for AdminError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => Self::Exists,
            _ => Self::Store(error.to_string()),
        }
    }
}

/// With a parameter for each of [`COLUMNS`].
fn insert_sql() -> String {
    let parameters: Vec<_> = (1..=RecordField::ALL.len() + 1).map(|number| format!("?{number}")).collect();
    format!("INSERT INTO token ({COLUMNS}) VALUES ({})", parameters.join(", "))
}

fn insert(statement: &mut CachedStatement<'_>, record: &TokenRecord) -> rusqlite::Result<usize> {
    statement.execute(params_from_iter(
        std::iter::once(Value::Blob(record.digest.as_bytes().to_vec())).chain(
            RecordField::ALL.into_iter().map(|field| field.of(record).map_or_else(|| absent(field), Value::from)),
        ),
    ))
}

/// A record without terms says nothing of them in columns that are never NULL.
fn absent(field: RecordField) -> Value {
    if field.is_term() { Value::Text(String::new()) } else { Value::Null }
}

const DIALECT: QueryDialect = QueryDialect {
    parameter: '?',
    has_scope: |parameter| format!("instr(' ' || scopes || ' ', ' ' || {parameter} || ' ') > 0"),
    by_bytes: "",
};

fn list_sql() -> String {
    format!("SELECT {COLUMNS} FROM token ORDER BY created DESC, digest")
}

fn seconds(time: u64) -> i64 {
    i64::try_from(time).unwrap_or(i64::MAX)
}

impl From<QueryParameter> for Value {
    fn from(parameter: QueryParameter) -> Self {
        match parameter {
            QueryParameter::Text(text) => Self::Text(text),
            QueryParameter::Bytes(bytes) => Self::Blob(bytes),
        }
    }
}

impl From<FieldValue<'_>> for Value {
    fn from(value: FieldValue<'_>) -> Self {
        match value {
            FieldValue::Text(text) => Self::Text(text.to_owned()),
            FieldValue::Words(words) => Self::Text(words.join(" ")),
            FieldValue::Time(seconds) => Self::Integer(self::seconds(seconds)),
            FieldValue::Flag(flag) => flag.into(),
            FieldValue::Digest(digest) => Self::Blob(digest.as_bytes().to_vec()),
        }
    }
}

#[async_trait]
impl TokenAdmin for SqliteAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        insert(&mut self.db.prepare_cached(&insert_sql())?, record)?;
        Ok(())
    }

    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError> {
        // Digests come in no order: what is written to stays in memory, or millions of rows would take hours.
        self.db.pragma_update(None, "cache_size", -IMPORT_CACHE_KIB)?;
        let transaction = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut imported = Imported::default();
        {
            let mut statement = transaction.prepare_cached(&(insert_sql() + " ON CONFLICT DO NOTHING"))?;
            for record in records {
                let record = record?;
                let new = insert(&mut statement, &record)? as u64;
                imported.new += new;
                if new == 0
                    && let Some(known) = lookup(&transaction, &record.digest)?
                {
                    imported.differing.compare(&known, &record);
                }
            }
        }
        transaction.commit()?;
        Ok(imported)
    }

    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        let mut query = self.db.prepare(&list_sql())?;
        let records = query.query_map([], record)?.collect::<Result<_, _>>()?;
        Ok(records)
    }

    async fn select(&mut self, query: &TokenQuery, each: Visitor<'_>) -> Result<(), AdminError> {
        let (rest, parameters) = query.sql(&DIALECT);
        let mut query = self.db.prepare(&format!("SELECT {COLUMNS} FROM token {rest}"))?;
        for found in query.query_map(params_from_iter(parameters.into_iter().map(Value::from)), record)? {
            each(found?)?;
        }
        Ok(())
    }

    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        // The digests that begin with the prefix are a range of the primary key.
        let bound = |filler: char| {
            let hex: String = hex_prefix.chars().chain(std::iter::repeat(filler)).take(64).collect();
            Digest::from_hex(&hex).ok_or(AdminError::Missing)
        };
        let range = "WHERE digest BETWEEN ?1 AND ?2 LIMIT 100";
        let mut query = self.db.prepare(&format!("SELECT {COLUMNS} FROM token {range}"))?;
        let records =
            query.query_map([bound('0')?.as_bytes(), bound('f')?.as_bytes()], record)?.collect::<Result<_, _>>()?;
        Ok(records)
    }

    async fn of_user(&mut self, user: &str) -> Result<Vec<TokenRecord>, AdminError> {
        let mut records = Vec::new();
        let mut each = |record| {
            records.push(record);
            Ok(())
        };
        self.visit_user(user, &mut each).await?;
        Ok(records)
    }

    async fn visit_user(&mut self, user: &str, each: Visitor<'_>) -> Result<(), AdminError> {
        let sql = format!("SELECT {COLUMNS} FROM token WHERE user = ?1 ORDER BY created DESC, digest");
        for found in self.db.prepare(&sql)?.query_map([user], record)? {
            each(found?)?;
        }
        Ok(())
    }

    async fn blocked_users(&mut self) -> Result<BTreeSet<String>, AdminError> {
        let mut query = self.db.prepare("SELECT DISTINCT user FROM token WHERE blocked = 1")?;
        let users = query.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        Ok(users)
    }

    fn notes_uses(&self) -> bool {
        true
    }

    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        let changed = self.db.execute(
            "UPDATE token SET revoked = ?2 WHERE digest = ?1 AND revoked IS NULL",
            params![digest.as_bytes(), i64::try_from(at).unwrap_or(i64::MAX)],
        )?;
        if changed == 0 && lookup(&self.db, digest)?.is_none() {
            return Err(AdminError::Missing);
        }
        Ok(changed == 1)
    }

    async fn revoke_user(&mut self, user: &str, at: u64) -> Result<u64, AdminError> {
        let sql = "UPDATE token SET revoked = ?2 WHERE user = ?1 AND revoked IS NULL";
        Ok(self.db.execute(sql, params![user, seconds(at)])? as u64)
    }

    async fn remove(&mut self, digests: &[Digest], still: &TokenQuery) -> Result<u64, AdminError> {
        let mut removed = 0;
        let mut parameters = Vec::new();
        let mut conditions = still.conditions(&DIALECT, &mut parameters);
        conditions.push(format!("digest = ?{}", parameters.len() + 1));
        let sql = format!("DELETE FROM token WHERE {}", conditions.join(" AND "));
        let parameters: Vec<Value> = parameters.into_iter().map(Value::from).collect();
        // A gateway that notes uses waits for the lock, for no longer than this takes.
        for some in digests.chunks(REMOVED_AT_ONCE) {
            let transaction = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            for digest in some {
                let digest = Value::Blob(digest.as_bytes().to_vec());
                let all = params_from_iter(parameters.iter().chain([&digest]));
                removed += transaction.prepare_cached(&sql)?.execute(all)? as u64;
            }
            transaction.commit()?;
        }
        Ok(removed)
    }

    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        let transaction = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let end = lookup(&transaction, old)?.ok_or(AdminError::Missing)?.rotated_out(at, end)?;
        insert(&mut transaction.prepare_cached(&insert_sql())?, &TokenRecord { replaces: Some(*old), ..next.clone() })?;
        transaction.execute(
            "UPDATE token SET superseded = ?2, expires = ?3 WHERE digest = ?1",
            params![old.as_bytes(), seconds(at), seconds(end)],
        )?;
        Ok(transaction.commit()?)
    }

    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        let sql = "UPDATE token SET blocked = ?2 WHERE user = ?1 AND blocked <> ?2";
        Ok(self.db.execute(sql, params![user, blocked])? as u64)
    }

    async fn wait(&mut self, timeout: Duration) -> Result<Vec<String>, AdminError> {
        let target = last_seq(&self.db)?;
        let gone = i64::try_from(REPLICA_GONE.as_millis()).unwrap_or(i64::MAX);
        self.db.execute(&format!("DELETE FROM replica WHERE seen_ms < {NOW_MS} - 86400000"), [])?;
        let waiting = Confirmations::within(timeout);
        loop {
            let replicas = self.replicas(target, gone)?;
            if let Some(outcome) = waiting.outcome(replicas).await {
                return outcome;
            }
        }
    }
}
