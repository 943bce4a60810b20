//! Tests from outside: the real binary between a raw client and a strict backend. One binary, so that it links once.
#![allow(unused_qualifications, elided_lifetimes_in_paths, unreachable_pub)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that fails says so"
)]

mod guessing;
mod harness;
mod servers;
mod support;

mod admin;
mod admin_access;
mod answers;
mod architecture;
mod attacks;
mod audit;
mod backend_faults;
mod basic;
mod bodies;
mod cli;
mod connections;
mod deadlines;
mod deploy;
mod exactness;
mod explain;
mod forwarding;
mod hardening;
mod http2;
mod http2_backends;
mod http2_clients;
mod lanes;
mod ledger;
mod lifecycle;
mod limits;
mod listeners;
mod logs;
mod method_override;
mod monitoring;
mod moving;
mod names;
mod operations;
mod overload;
mod page;
mod paging;
mod pipeline;
mod readers;
mod real_clients;
mod regressions;
mod reload;
mod routes;
mod sandbox;
mod scopes;
mod shared_limits;
mod slow;
mod smoke;
mod spans;
mod standing;
mod stores;
mod token;
mod trace;
mod under_load;
mod upgrade;
mod upstream_tls;
mod upstreams;
mod verdict;
