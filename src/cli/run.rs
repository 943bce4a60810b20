//! `tollgate run`: serve until a signal ends it.

use super::Failure;
use crate::telemetry::process_log;
use crate::{assembly, edge};
use anyhow::Context as _;
use std::path::Path;

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let settings = super::load(path)?;
    process_log::start(settings.level, edge::FRAMEWORK_LOG_LEVELS).context("the process log cannot be started")?;
    settings.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let result = serve(settings, path);
    // Above all the lines that say why it ended.
    log::logger().flush();
    result
}

fn serve(settings: crate::config::Settings, path: &Path) -> Result<(), Failure> {
    let listen = settings.server.listen.clone();
    edge::check_free(&settings.server).map_err(anyhow::Error::msg)?;
    let running = assembly::assemble(settings, Some(path.to_owned()))?;
    log::info!("tollgate {} serves {listen:?}", env!("CARGO_PKG_VERSION"));
    edge::serve(running);
    log::info!("stopped");
    Ok(())
}
