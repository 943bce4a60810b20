//! What the operator sees of the traffic: metrics and the access log. Uses nothing of ours; everybody uses it.

pub mod access_log;
pub mod metrics;
