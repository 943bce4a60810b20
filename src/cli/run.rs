//! `tollgate run`: serve until a signal ends it.

use super::configuration::{ConfigOption, FoundConfig};
use super::{Failure, check};
use crate::config::{self, Probe, ProcessNeeds, Settings};
use crate::edge::{PassedSockets, Running, SandboxMode};
use crate::sandbox::{self, Entered};
use crate::telemetry::process_log;
use crate::{assembly, edge};
use anyhow::Context as _;

/// Open routes that the log names at the start.
const NAMED: usize = 10;

pub(super) fn run(option: &ConfigOption) -> Result<(), Failure> {
    let is_private = keep_memory_private();
    let passed = PassedSockets::of_this_process().context("sockets that this process was started with")?;
    let predecessor = passed.predecessor().cloned();
    if predecessor.is_some() {
        sandbox::inherit().context("the sandbox of the process that started this one")?;
    }
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
    // Threads that run already would be outside of it: before the log's.
    let held = hold(&settings)?;
    process_log::start(settings.level, edge::FRAMEWORK_LOG_LEVELS).context("the process log cannot be started")?;
    if let Err(error) = is_private {
        log::warn!("core dumps cannot be switched off, and would contain tokens: {error}");
    }
    match held {
        Confinement::To(what) => log::info!("sandbox: {what}"),
        Confinement::Loosely(why) => log::warn!("sandbox: {why}"),
        Confinement::Not => {}
    }
    settings.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let result = serve(settings, found, passed);
    // Above all the lines that say why it ended.
    log::logger().flush();
    result
}

/// What came of `[server] sandbox`.
enum Confinement {
    Not,
    To(String),
    /// Not as it was asked for.
    Loosely(String),
}

/// Lets the kernel hold this process to the files that it needs. It cannot be undone.
fn hold(settings: &Settings) -> Result<Confinement, Failure> {
    let mode = settings.server.sandbox;
    if mode == SandboxMode::Off {
        let inherited =
            "server.sandbox is off, and this process stays in that of the one that it replaces until a restart";
        return Ok(sandbox::current().map_or(Confinement::Not, |_| Confinement::Loosely(inherited.into())));
    }
    let rules = process_needs().map(|process| config::needs(settings, Some(&process)));
    let rules = rules.context("server.sandbox").map_err(Failure::Failed)?;
    match sandbox::enter(&rules) {
        Ok(Entered::Inherited) => Ok(Confinement::Loosely(
            "the kernel nests no more of them, after so many upgrades: this process stays in that of the one that it replaces, \
             which is as strict; a restart makes a new one"
                .into(),
        )),
        Ok(Entered::Now) if sandbox::current().is_some_and(|sandbox| sandbox.is_partial) => Ok(Confinement::Loosely(
            "the kernel holds this process to the files that it needs as far as it can; Linux 6.12 can do all of it".into(),
        )),
        Ok(Entered::Now) => Ok(Confinement::To("the kernel holds this process to the files that it needs".into())),
        Err(error) if mode == SandboxMode::Try => Ok(Confinement::Loosely(format!("there is none: {error}"))),
        Err(error) => {
            let error = anyhow::anyhow!("server.sandbox = \"on\": {error}; set \"try\" to go on without");
            Err(Failure::Failed(error))
        }
    }
}

/// What this process needs besides its configuration.
pub(super) fn process_needs() -> std::io::Result<ProcessNeeds> {
    let lists = ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(std::env::var_os);
    Ok(ProcessNeeds {
        program: Some(edge::program()?),
        libraries: sandbox::libraries(),
        authorities: lists.flat_map(|list| std::env::split_paths(&list).collect::<Vec<_>>()).collect(),
    })
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
