//! How much of the framework's own logging, and the Redis library's, goes into the process log.

use log::LevelFilter;

/// The most verbose level for each module of the framework. Its messages may quote requests, and tollgate logs and
/// counts the failures itself. Connection and proxy errors are off entirely: to the framework, a pooled connection that
/// the backend closed just before its reuse is an error, although the request is then retried. While a node of a cluster is
/// missing, the Redis library writes a line for each attempt of each lookup.
pub const FRAMEWORK_LOG_LEVELS: &[(&str, LevelFilter)] = &[
    ("pingora_core::connectors", LevelFilter::Off),
    ("pingora_proxy", LevelFilter::Off),
    ("pingora_core", LevelFilter::Warn),
    ("pingora_pool", LevelFilter::Warn),
    ("pingora_cache", LevelFilter::Warn),
    ("pingora_runtime", LevelFilter::Warn),
    ("redis", LevelFilter::Off),
];
