//! `tollgate server`: drains a server of the running gateway, or ends that.

use super::Failure;
use super::reload::{self, AdminTarget};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

#[derive(clap::Subcommand)]
pub(super) enum ServerCommand {
    /// Send no new requests to a server; those in flight go on. `GET /upstreams` shows when they have ended. It stays so over
    /// reloads, until `undrain` or a restart of the gateway.
    Drain(ServerArguments),
    /// Send requests to a server again.
    Undrain(ServerArguments),
}

#[derive(clap::Args)]
pub(super) struct ServerArguments {
    /// Name of the upstream
    upstream: String,
    /// The server, as `servers` in the configuration names it; with `expand`, its address
    server: String,
    #[command(flatten)]
    target: AdminTarget,
}

pub(super) fn run(command: &ServerCommand) -> Result<(), Failure> {
    let (word, ServerArguments { upstream, server, target }) = match command {
        ServerCommand::Drain(arguments) => ("drain", arguments),
        ServerCommand::Undrain(arguments) => ("undrain", arguments),
    };
    let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
    let answer = reload::post(&format!("/upstreams/{}/servers/{}/{word}", encoded(upstream), encoded(server)), target)?;
    if target.json {
        say!("{answer}")?;
        return Ok(());
    }
    match answer["in_flight"].as_u64() {
        Some(count) if word == "drain" => say!("{server} gets no new requests; {count} are in flight")?,
        _ => say!("{server} gets requests again")?,
    }
    Ok(())
}
