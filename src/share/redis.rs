//! Shared limits in Redis or Valkey: a hash for each key, which a script changes in one step by the server's clock, and a sorted
//! set of the replicas. Keys expire when they are as good as new. It must not know what is leased for.
//!
//! The permissions of an ACL user, for `prefix = "tollgate:limit:"`: `~tollgate:limit:* +eval +evalsha +script|load +time +hgetall +hset +hdel
//! +pexpire +zadd +zrem +zremrangebyscore +zcard`.

use super::{BEATS_COUNT, LEASE, LeaseAnswer, LeaseRequest, ShareStore};
use crate::problem::Problem;
use crate::store::StoreError;
use crate::store::redis::{RedisCommands, RedisSettings};
use crate::telemetry::metrics::StoreMetrics;
use async_trait::async_trait;
use parking_lot::Mutex;
use redis::{Cmd, Pipeline, Value};
use std::sync::Arc;

const LEASE_SCRIPT: &str = include_str!("lease.lua");
/// KEYS: the set of replicas. ARGV: the replica, for how long it counts in microseconds. Answers how many there are.
const BEAT_SCRIPT: &str = "local time = redis.call('TIME') \
    local now = tonumber(time[1]) * 1000000 + tonumber(time[2]) \
    local mine = string.format('%.0f', now) \
    redis.call('ZADD', KEYS[1], mine, ARGV[1]) \
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - tonumber(ARGV[2]))) \
    redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[2]) / 1000)) \
    return redis.call('ZCARD', KEYS[1])";

pub(super) struct RedisShare {
    commands: RedisCommands,
    prefix: String,
    /// By which the server knows the script, once it was told.
    hash: Mutex<Option<String>>,
}

impl RedisShare {
    pub(super) fn new(settings: &RedisSettings, metrics: Arc<StoreMetrics>) -> Result<Self, Problem> {
        let commands = RedisCommands::new(settings, metrics)?;
        Ok(Self { commands, prefix: settings.prefix.clone(), hash: Mutex::default() })
    }

    fn replicas(&self) -> String {
        format!("{}replicas", self.prefix)
    }

    fn call(&self, hash: &str, replica: &str, requests: &[LeaseRequest]) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(hash).arg(requests.len());
        for request in requests {
            call.arg(format!("{}{}", self.prefix, request.key));
        }
        call.arg(LEASE.as_micros() as u64).arg(replica);
        for request in requests {
            for number in request.amounts.numbers() {
                call.arg(number);
            }
            let keeps = request.keeps.map_or(-1, |keeps| i64::try_from(keeps).unwrap_or(i64::MAX));
            call.arg(request.used).arg(keeps).arg(request.cost).arg(request.count).arg(request.ahead);
        }
        call
    }

    async fn one(&self, command: Cmd) -> Result<Value, StoreError> {
        let mut pipe = Pipeline::new();
        pipe.ignore_errors().add_command(command);
        let answers: Vec<Value> = self.commands.ask(&pipe).await?;
        answers.into_iter().next().ok_or_else(|| StoreError::Garbage("an answer is missing".into()))
    }

    async fn run(&self, replica: &str, requests: &[LeaseRequest]) -> Result<Vec<Vec<i64>>, StoreError> {
        let known = self.hash.lock().clone();
        if let Some(hash) = known {
            let answer = self.one(self.call(&hash, replica, requests)).await?;
            // A server that was restarted, or that is the master since, does not know it.
            if !matches!(&answer, Value::ServerError(error) if error.code() == "NOSCRIPT") {
                return RedisCommands::read(answer);
            }
        }
        let load = redis::cmd("SCRIPT").arg("LOAD").arg(LEASE_SCRIPT).take();
        let hash: String = RedisCommands::read(self.one(load).await?)?;
        *self.hash.lock() = Some(hash.clone());
        RedisCommands::read(self.one(self.call(&hash, replica, requests)).await?)
    }
}

#[async_trait]
impl ShareStore for RedisShare {
    async fn lease(&self, replica: &str, requests: &[LeaseRequest]) -> Result<Vec<LeaseAnswer>, StoreError> {
        let answers = self.run(replica, requests).await?;
        answers.iter().map(|numbers| answer(numbers)).collect()
    }

    async fn beat(&self, replica: &str) -> Result<u64, StoreError> {
        let mut call = redis::cmd("EVAL");
        call.arg(BEAT_SCRIPT).arg(1).arg(self.replicas()).arg(replica).arg(BEATS_COUNT.as_micros() as u64);
        RedisCommands::read(self.one(call).await?)
    }

    async fn leave(&self, replica: &str) -> Result<(), StoreError> {
        let mut call = redis::cmd("ZREM");
        call.arg(self.replicas()).arg(replica);
        RedisCommands::read::<i64>(self.one(call).await?).map(drop)
    }

    async fn examine(&self) -> Result<(), StoreError> {
        // Without a key, nothing is changed.
        self.run("check", &[]).await.map(drop)
    }
}

/// The numbers of a script's or a function's answer.
pub(super) fn answer(numbers: &[i64]) -> Result<LeaseAnswer, StoreError> {
    let number = |number: i64| u64::try_from(number).unwrap_or(0);
    match *numbers {
        [passed, ahead, wait_us, by_quota, rate_left, quota_left] => Ok(LeaseAnswer {
            passed: number(passed),
            ahead: number(ahead),
            wait_ms: number(wait_us).div_ceil(1_000),
            by_quota: by_quota > 0,
            rate_left: number(rate_left),
            quota_left: number(quota_left),
        }),
        _ => Err(StoreError::Garbage("an answer has not six numbers".into())),
    }
}
