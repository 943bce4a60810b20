//! tollgate, an authenticating gateway for token-authenticated REST APIs in GitLab's style.
//!
//! A request walks through the modules in the order in which they are declared here, and a module uses only what is
//! declared above it. `tests/architecture.rs` holds this.
//!
//! ```text
//! socket -> edge/connection -> pipeline::admit - request -> identity -> policy -> forward -> edge/proxied -> upstream
//!                                   `----------- any Fault -> reply::Refusal -> edge/connection -> socket
//! ```

pub mod clock;

pub mod problem;

pub mod telemetry;

pub mod request;

pub mod store;

pub mod identity;

pub mod policy;

pub mod upstream;

pub mod forward;

pub mod reply;

pub mod pipeline;

pub mod admin;

pub mod edge;

pub mod config;

pub mod assembly;

pub mod cli;
