//! `tollgate run`: serve until a signal ends it.

use super::Failure;
use crate::{assembly, edge};
use log::LevelFilter;
use std::path::Path;

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let settings = super::load(path)?;
    start_log(settings.level);
    settings.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let listen = settings.server.listen.clone();
    edge::check_free(&settings.server).map_err(anyhow::Error::msg)?;
    let running = assembly::assemble(settings, Some(path.to_owned()))?;
    log::info!("tollgate {} serves {listen:?}", env!("CARGO_PKG_VERSION"));
    edge::serve(running);
    log::info!("stopped");
    Ok(())
}

/// Starts the process log on stderr. The framework's own chatter is left out: what matters of it is told by us, and
/// its error texts may quote requests.
pub(super) fn start_log(level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Info);
    for module in ["pingora_core", "pingora_pool", "pingora_cache", "pingora_runtime"] {
        builder.filter_module(module, LevelFilter::Warn);
    }
    // A pooled connection that the backend closed at the moment of its reuse is an error to it; the request is tried
    // again, and failures of requests are logged with their request id.
    builder
        .filter_module("pingora_core::connectors", LevelFilter::Off)
        .filter_module("pingora_proxy", LevelFilter::Off);
    builder.init();
    log::set_max_level(level);
}
