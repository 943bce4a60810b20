//! `tollgate run`: serve until a signal ends it.

use super::configuration::{ConfigOption, FoundConfig};
use super::{Failure, check};
use crate::config::{self, Probe, Settings};
use crate::edge::{PassedSockets, Running};
use crate::telemetry::process_log;
use crate::{assembly, edge};
use anyhow::Context as _;

/// Open routes that the log names at the start.
const NAMED: usize = 10;

pub(super) fn run(option: &ConfigOption) -> Result<(), Failure> {
    let is_private = keep_memory_private();
    let passed = PassedSockets::of_this_process().context("sockets that this process was started with")?;
    let predecessor = passed.predecessor().cloned();
    let result = option.find().and_then(|found| start(&found, passed, is_private));
    if let (Some(predecessor), Err(failure)) = (predecessor, &result) {
        predecessor.gave_up(&failure.to_string());
    }
    result
}

/// Memory has tokens and passwords: no core dump has them, and no other process of this user may read them. Inherited by an
/// upgraded process only in part, which does the same again.
fn keep_memory_private() -> std::io::Result<()> {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // The limit does not bind a kernel that pipes dumps to a program, as systemd-coredump.
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?)
}

fn start(found: &FoundConfig, passed: PassedSockets, is_private: std::io::Result<()>) -> Result<(), Failure> {
    let settings = config::load(&found.path, Probe::Start(&passed)).map_err(|problems| {
        let report = super::report(&problems);
        // With a file that is right, the next start may succeed: the service manager should try again.
        match problems.iter().filter(|problem| problem.is_error()).all(|problem| problem.surroundings) {
            true => Failure::Failed(anyhow::Error::msg(report)),
            false => Failure::Usage(report),
        }
    })?;
    process_log::start(settings.level, edge::FRAMEWORK_LOG_LEVELS).context("the process log cannot be started")?;
    if let Err(error) = is_private {
        log::warn!("core dumps cannot be switched off, and would contain tokens: {error}");
    }
    settings.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let result = serve(settings, found, passed);
    // Above all the lines that say why it ended.
    log::logger().flush();
    result
}

fn serve(settings: Settings, found: &FoundConfig, passed: PassedSockets) -> Result<(), Failure> {
    let lines = summary(&settings, found);
    let running = Running { passed, ..assembly::assemble(settings, Some(found.path.clone()))? };
    lines.iter().for_each(|line| log::info!("{line}"));
    edge::serve(running)?;
    log::info!("stopped");
    Ok(())
}

/// What is being served, in a few lines.
fn summary(settings: &Settings, found: &FoundConfig) -> [String; 5] {
    let list = |all: Vec<String>| if all.is_empty() { "none".to_owned() } else { all.join(", ") };
    let listeners = settings.server.listeners.iter().map(ToString::to_string).collect();
    let admin = settings.server.admin.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
    let upstreams = settings.upstreams.iter().map(|upstream| {
        let servers = upstream.servers.iter().map(|server| server.address.to_string()).collect::<Vec<_>>().join(", ");
        format!("{} ({servers})", upstream.name)
    });
    let mut open: Vec<String> =
        check::open_routes(settings).map(|route| format!("{} ({})", route.name, check::requests(route))).collect();
    let more = open.len().saturating_sub(NAMED);
    open.truncate(NAMED);
    if more > 0 {
        open.push(format!("and {more} more, see `tollgate check`"));
    }
    if settings.rules.cors_preflight {
        open.push("every path (CORS preflights)".into());
    }
    let [listeners, upstreams, stores, open] = [
        format!("listeners: {}; admin listener: {admin}", list(listeners)),
        format!("upstreams: {}", list(upstreams.collect())),
        format!("token stores: {}", list(settings.stores.iter().map(|store| store.name.clone()).collect())),
        format!("paths without a token: {}", list(open)),
    ]
    .map(|line| settings.expansions.hide(&line));
    [format!("tollgate {}, configuration {found}", env!("CARGO_PKG_VERSION")), listeners, upstreams, stores, open]
}
