//! Shared limits in PostgreSQL: a row for each key, which a function changes with the row locked, by the server's clock. Tables and
//! functions are made when they are missed. It must not know what is leased for.

use super::redis::answer;
use super::{BEATS_COUNT, LEASE, LeaseAnswer, LeaseRequest, ShareStore};
use crate::problem::Problem;
use crate::store::StoreError;
use crate::store::postgres::{PostgresSettings, PostgresStatements, Source};
use async_trait::async_trait;

const SCHEMA: &str = include_str!("lease.sql");
const EXAMINE: &str = "SELECT pg_catalog.to_regprocedure('{schema}.shared_limit_lease_1(bigint, text, text[], bigint[])') \
    IS NOT NULL OR CASE WHEN pg_catalog.to_regnamespace('{schema}') IS NULL \
    THEN pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE') \
    ELSE pg_catalog.has_schema_privilege('{schema}', 'CREATE') END";

pub(super) struct PostgresShare {
    statements: PostgresStatements,
    schema: String,
    lease: String,
    beat: String,
    leave: String,
}

impl PostgresShare {
    pub(super) fn new(settings: &PostgresSettings) -> Result<Self, Problem> {
        let Source::Own { schema } = &settings.source else {
            return Err(Problem::error("schema", "is missing", "write it like \"tollgate\""));
        };
        let advice = format!(
            "the user needs the right to use schema \"{schema}\" and to make it and its tables if they are not there: \
             see docs/limits.md"
        );
        let fill = |sql: &str| sql.replace("{schema}", &format!("\"{schema}\""));
        Ok(Self {
            statements: PostgresStatements::new(settings, advice)?,
            lease: fill("SELECT * FROM {schema}.shared_limit_lease_1($1, $2, $3, $4)"),
            beat: fill("SELECT {schema}.shared_limit_beat_1($1, $2)"),
            leave: fill("DELETE FROM {schema}.shared_limit_replica WHERE replica = $1"),
            schema: schema.clone(),
        })
    }

    /// Makes what is missed, once.
    async fn rows(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        match self.statements.rows(sql, parameters).await {
            Err(StoreError::Unusable(_)) => {
                self.statements.run(&SCHEMA.replace("{schema}", &format!("\"{}\"", self.schema))).await?;
                self.statements.rows(sql, parameters).await
            }
            other => other,
        }
    }
}

fn garbage(_: tokio_postgres::Error) -> StoreError {
    StoreError::Garbage("an answer is not of the kind that was asked for".into())
}

#[async_trait]
impl ShareStore for PostgresShare {
    async fn lease(&self, replica: &str, requests: &[LeaseRequest]) -> Result<Vec<LeaseAnswer>, StoreError> {
        let keys: Vec<&str> = requests.iter().map(|request| &*request.key).collect();
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mut numbers: Vec<i64> = Vec::with_capacity(requests.len() * 10);
        for request in requests {
            numbers.extend(request.amounts.numbers().map(number));
            numbers.push(number(request.used));
            numbers.push(request.keeps.map_or(-1, number));
            numbers.extend([request.cost, request.count, request.ahead].map(number));
        }
        let rows = self.rows(&self.lease, &[&(LEASE.as_micros() as i64), &replica, &keys, &numbers]).await?;
        rows.iter().map(|row| answer(&row.try_get::<_, Vec<i64>>(0).map_err(garbage)?)).collect()
    }

    async fn beat(&self, replica: &str) -> Result<u64, StoreError> {
        let rows = self.rows(&self.beat, &[&(BEATS_COUNT.as_micros() as i64), &replica]).await?;
        let count = rows.first().map(|row| row.try_get::<_, i64>(0).map_err(garbage)).transpose()?;
        Ok(count.and_then(|count| u64::try_from(count).ok()).unwrap_or(1))
    }

    async fn leave(&self, replica: &str) -> Result<(), StoreError> {
        self.statements.rows(&self.leave, &[&replica]).await.map(drop)
    }

    async fn examine(&self) -> Result<(), StoreError> {
        let rows = self.statements.rows(&EXAMINE.replace("{schema}", &self.schema), &[]).await?;
        match rows.first().map(|row| row.try_get::<_, bool>(0).map_err(garbage)).transpose()? {
            Some(true) => Ok(()),
            _ => Err(StoreError::Denied(format!(
                "the tables of schema \"{}\" are not there, and the user may not make them",
                self.schema
            ))),
        }
    }
}
