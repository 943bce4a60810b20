//! `tollgate guessing`: lists the addresses that guess tokens, as a running gateway sees them, and lets one send failed tokens
//! again.

use super::Failure;
use super::reload::{self, AdminTarget};
use super::status::StatusColumns;
use anyhow::anyhow;
use serde_json::Value;
use std::net::IpAddr;

#[derive(clap::Subcommand)]
pub(super) enum GuessingCommand {
    /// List the addresses that guess tokens at the moment, those with the most refused requests first
    ///
    /// An address is there from the failed token that its budget had no room for until the budget is whole again.
    List(AdminTarget),
    /// Forget the failed tokens of an address: its pause is over, and it has its budget again
    Lift(LiftArguments),
}

#[derive(clap::Args)]
pub(super) struct LiftArguments {
    /// The address, as `list` shows it without the length of its network; for IPv6, its network of 64 bits is meant
    #[arg(required_unless_present = "all")]
    address: Option<IpAddr>,
    /// Of all addresses
    #[arg(long, conflicts_with = "address")]
    all: bool,
    #[command(flatten)]
    target: AdminTarget,
}

pub(super) fn run(command: &GuessingCommand) -> Result<(), Failure> {
    match command {
        GuessingCommand::List(target) => list(target),
        GuessingCommand::Lift(arguments) => lift(arguments),
    }
}

fn list(target: &AdminTarget) -> Result<(), Failure> {
    let answer = reload::get("/guessing", target)?;
    if target.json {
        return Ok(say!("{answer:#}")?);
    }
    Ok(say!("{}", shown(&answer).trim_end())?)
}

fn shown(answer: &Value) -> String {
    if answer["watching"] != true {
        return "nobody is watched: there is no [guessing] in the configuration".into();
    }
    let clients = answer["clients"].as_array().map_or(&[][..], Vec::as_slice);
    if clients.is_empty() {
        return "no address guesses tokens at the moment".into();
    }
    let mut columns = StatusColumns::of(&["client", "since", "failed tokens", "looked up", "refused", "pause ends in"]);
    for client in clients {
        let text = |name: &str| client[name].as_str().unwrap_or("-").to_owned();
        let count = |name: &str| client[name].as_u64().unwrap_or(0).to_string();
        let left = format!("{} s", count("pause_seconds_left"));
        columns.row([text("client"), text("since"), count("failed_tokens"), count("turns"), count("refused"), left]);
    }
    let mut out = String::new();
    columns.write(&mut out);
    let all = answer["addresses"].as_u64().unwrap_or(0);
    if all > clients.len() as u64 {
        out.push_str(&format!("and {} more addresses\n", all - clients.len() as u64));
    }
    out
}

fn lift(LiftArguments { address, all: _, target }: &LiftArguments) -> Result<(), Failure> {
    let what = match address {
        Some(address) => format!("/guessing/lift?client={address}"),
        None => "/guessing/lift".to_owned(),
    };
    let answer = reload::post(&what, target)?;
    let lifted = answer["addresses"].as_u64();
    if let (Some(address), Some(0)) = (address, lifted) {
        // Whoever names an address means one that is held back.
        return Err(anyhow!("{address} does not guess at the moment: see tollgate guessing list").into());
    }
    if target.json {
        return Ok(say!("{answer}")?);
    }
    match (address, lifted) {
        (Some(address), _) => say!("{address} may send failed tokens again")?,
        (None, Some(0)) => say!("no address guesses tokens at the moment")?,
        (None, Some(1)) => say!("1 address may send failed tokens again")?,
        (None, count) => say!("{} addresses may send failed tokens again", count.unwrap_or(0))?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_list_says_who_is_watched_and_what_is_left_out() {
        assert!(shown(&json!({ "watching": false, "addresses": 0, "clients": [] })).contains("no [guessing]"));
        assert!(shown(&json!({ "watching": true, "addresses": 0, "clients": [] })).contains("no address guesses"));
        let client = json!({
            "client": "2001:db8::/64", "since": "2026-11-29T10:00:00Z", "failed_tokens": 12, "turns": 3, "refused": 4567,
            "pauses": 1, "pause_seconds_left": 9,
        });
        let text = shown(&json!({ "watching": true, "addresses": 3, "clients": [client] }));
        assert!(text.contains("2001:db8::/64  2026-11-29T10:00:00Z"), "{text}");
        assert!(text.contains("4567") && text.contains("9 s") && text.ends_with("and 2 more addresses\n"), "{text}");
    }
}
