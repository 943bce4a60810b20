//! tollgate, an authenticating gateway for token-authenticated REST APIs in GitLab's style.
//!
//! A request walks through the modules in the order in which they are declared here, and a module uses only what is
//! declared above it. `tests/architecture.rs` holds this.
//!
//! ```text
//! socket -> edge/connection -> pipeline::admit - request -> identity -> policy -> forward --> edge/http1 -> backend
//!              ^                   `---------- any Fault -> reply::Refusal --------.               |
//!              `------- edge/exchange: one ledger, counted and logged once --------+- reply::answer '
//! ```

// The time, and the one place that reads a clock.
pub mod clock;

// Bytes as hex digits.
pub mod hex;

// What can be wrong with a setting.
pub mod problem;

// Which files the process may touch.
pub mod sandbox;

// TLS to servers that tollgate connects to: trust and certificates.
pub mod tls;

// What the operator sees: metrics, access log, process log.
pub mod telemetry;

// 1 What is asked. Pure.
pub mod request;

// Where tokens are kept.
pub mod store;

// What replicas share: the budgets of limits.
pub mod share;

// 2 Who asks: cache, one lookup at a time for a token, principal.
pub mod identity;

// 3 May they. Pure.
pub mod policy;

// Who serves: the servers behind the gateway and their state. No socket.
pub mod upstream;

// 4 Where and how: what goes upstream. Pure.
pub mod forward;

// 5 What we say: refusals, and the hygiene of a backend's responses. Pure.
pub mod reply;

// The path: a request's verdict.
pub mod pipeline;

// The same path, told.
pub mod explain;

// The operator's requests.
pub mod admin;

// Where sockets are. The only module that names pingora.
pub mod edge;

// From a TOML file to settings.
pub mod config;

// From settings to running parts.
pub mod assembly;

// The command line.
pub mod cli;

// Many gateways on one store, simulated.
#[cfg(test)]
mod fleet_tests;
