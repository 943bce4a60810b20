//! Connections for statements that are not about tokens, with the same settings and errors. It must not know what they are for.

use super::PostgresSettings;
use super::connect::{self, Object, PostgresPool, QueryFailure, Reuse, Target};
use crate::problem::Problem;
use crate::store::StoreError;
use std::sync::Arc;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

pub struct PostgresStatements {
    pool: PostgresPool,
    target: Arc<Target>,
    /// What an error advises if a table or a right is missing.
    advice: String,
}

/// A connection that is closed if its question was given up: the answer would keep the next one waiting.
struct InUseConnection(Option<Object>);

impl Drop for InUseConnection {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}

impl PostgresStatements {
    /// Checks the settings. Connects with the first statement.
    pub fn new(settings: &PostgresSettings, advice: impl Into<String>) -> Result<Self, Problem> {
        let target = Arc::new(Target::new(settings)?);
        let pool = connect::pool(&target, settings.connections, settings.timeout)?;
        Ok(Self { pool, target, advice: advice.into() })
    }

    /// The rows of one statement. On a connection that was lost meanwhile it is put again: the server may have carried it out
    /// twice.
    pub async fn rows(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        loop {
            let mut connection = self.connection().await?;
            let Some(open) = &connection.0 else { return Err(StoreError::Overloaded) };
            let is_new = Object::metrics(open).recycle_count == 0;
            let answer = match open.prepare_cached(sql).await {
                Ok(statement) => open.query(&statement, parameters).await,
                Err(error) => Err(error),
            };
            match answer.map_err(|error| QueryFailure::of(&error, &self.advice)) {
                Ok(rows) => {
                    drop(connection.0.take());
                    return Ok(rows);
                }
                Err(failure) if failure.connection == Reuse::Replace && !is_new => {}
                Err(failure) => return Err(failure.error),
            }
        }
    }

    /// Runs several statements without parameters, as one transaction.
    pub async fn run(&self, sql: &str) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        let Some(open) = &connection.0 else { return Err(StoreError::Overloaded) };
        open.batch_execute(sql).await.map_err(|error| QueryFailure::of(&error, &self.advice).error)?;
        drop(connection.0.take());
        Ok(())
    }

    async fn connection(&self) -> Result<InUseConnection, StoreError> {
        let connection = self.pool.get().await.map_err(|error| connect::no_connection(error, &self.target))?;
        Ok(InUseConnection(Some(connection)))
    }
}
