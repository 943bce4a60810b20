//! Connections for commands that are not about tokens, with the same settings and errors. It must not know what they are for.

use super::RedisSettings;
use super::link::{Connector, RedisPool, failed, server_failed};
use crate::problem::Problem;
use crate::store::{StoreError, StoreMetrics};
use redis::{FromRedisValue, Pipeline, Value};
use std::sync::Arc;

pub struct RedisCommands {
    pool: RedisPool,
}

impl RedisCommands {
    /// Checks the settings. Connects with the first command.
    pub fn new(settings: &RedisSettings, metrics: Arc<StoreMetrics>) -> Result<Self, Problem> {
        let connector = Arc::new(Connector::new(settings)?);
        Ok(Self { pool: RedisPool::new(connector, settings.connections, metrics) })
    }

    /// Sends them, and once more on a new connection when the old one turns out to be closed: the server may have carried them
    /// out twice.
    pub async fn ask<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, StoreError> {
        self.pool.ask(commands).await
    }

    /// One answer of several that were asked for with `ignore_errors`.
    pub fn read<T: FromRedisValue>(answer: Value) -> Result<T, StoreError> {
        match answer {
            Value::ServerError(error) => Err(server_failed(&error)),
            answer => redis::from_redis_value(answer).map_err(|error| failed(&error.into())),
        }
    }

    /// Forgets all connections, since they may lead to a server that is the master no more.
    pub fn renew(&self) {
        self.pool.renew();
    }
}
