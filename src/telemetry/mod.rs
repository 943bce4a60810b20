//! What the operator sees of the traffic: metrics, the access log and the process log. Uses nothing of ours; everybody
//! uses it.

pub mod access_log;
pub mod audit_log;
pub mod datagrams;
pub mod exemplars;
pub mod guess_metrics;
pub mod heavy_hitters;
pub mod history;
pub mod limit_metrics;
pub mod lines;
mod listener_metrics;
pub mod metrics;
mod openmetrics;
pub mod outage;
pub mod process_log;
mod process_metrics;
mod server_metrics;
pub mod share_metrics;
pub mod spans;
mod store_metrics;
