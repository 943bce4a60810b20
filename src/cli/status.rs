//! `tollgate status`: what a running gateway says of itself, as aligned text or as JSON. It shows what the page of the admin
//! listener shows, from the same source.

use super::Failure;
use super::reload::{self, AdminTarget};
use crate::admin::visible;
use serde_json::Value;

pub(super) fn run(target: &AdminTarget) -> Result<(), Failure> {
    let status = reload::get("/status", target)?;
    if target.json {
        return Ok(say!("{status:#}")?);
    }
    Ok(say!("{}", shown(&status).trim_end())?)
}

/// A table whose columns are as wide as they have to be. Numbers stand to the right.
#[derive(Default)]
pub(super) struct StatusColumns {
    rows: Vec<Vec<String>>,
}

impl StatusColumns {
    pub(super) fn of(heads: &[&str]) -> Self {
        Self { rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()] }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| visible(&cell).into_owned()).collect());
    }

    pub(super) fn write(&self, out: &mut String) {
        let wide = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.rows.first().map_or(0, Vec::len)).map(wide).collect();
        let is_number = |column: usize| {
            let cells = self.rows.iter().skip(1).filter_map(|row| row.get(column));
            cells.clone().count() > 0
                && cells.into_iter().all(|c| {
                    c == "-"
                        || c.starts_with(|first: char| first.is_ascii_digit()) && !c.contains(['.', ':', '-'])
                        || is_quantity(c)
                })
        };
        let right: Vec<bool> = (0..widths.len()).map(is_number).collect();
        for row in &self.rows {
            let mut line = String::from("  ");
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths.get(column).copied().unwrap_or(0).saturating_sub(cell.chars().count()));
                match right.get(column) {
                    Some(true) => line.extend([&pad, cell.as_str()]),
                    _ => line.extend([cell.as_str(), &pad]),
                }
                line += "  ";
            }
            *out += line.trim_end();
            out.push('\n');
        }
    }
}

/// `1.5 ms`, `12%`, `3.1/s`.
fn is_quantity(cell: &str) -> bool {
    let number = cell.trim_end_matches("ms").trim_end_matches('%').trim_end_matches("/s").trim();
    number.parse::<f64>().is_ok()
}

/// Everything, for people.
fn shown(status: &Value) -> String {
    let mut out = String::new();
    let text = |value: &Value| visible(value.as_str().unwrap_or("-")).into_owned();
    let count = |value: &Value| value.as_u64().map_or("-".to_owned(), |count| count.to_string());
    let ms = |value: &Value| {
        value
            .as_f64()
            .map_or("-".to_owned(), |ms| if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") })
    };
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut line = |text: String| {
        out += &text;
        out.push('\n');
    };
    let uptime =
        humantime::format_duration(std::time::Duration::from_secs(status["uptime_seconds"].as_u64().unwrap_or(0)));
    let state = if status["ready"] == true { "ready" } else { "draining" };
    let held = match status["sandbox"].as_str() {
        Some("on") => ", in its sandbox",
        Some("partial") => ", in its sandbox as far as the kernel can",
        _ => "",
    };
    line(format!(
        "tollgate {}, {state}, up {uptime}, process {}{held}",
        text(&status["version"]),
        count(&status["pid"])
    ));
    line(format!(
        "{} requests in flight, {} connections; configuration {} loaded {}",
        count(&status["requests_in_flight"]),
        count(&status["connections"]),
        text(&status["configuration"]["file"]),
        text(&status["configuration"]["loaded"])
    ));

    let windows = [&status["traffic"]["last_15_minutes"], &status["traffic"]["last_24_hours"]];
    line("\nrequests".into());
    let mut table = StatusColumns::of(&["", "15 min", "24 h"]);
    table.row(["all".to_owned()].into_iter().chain(windows.map(|window| count(&window["requests"]))));
    for (name, word) in [
        ("ok", "ok"),
        ("client_error", "client error (backend)"),
        ("refused", "refused by tollgate"),
        ("failed", "failed (5xx)"),
        ("client_gone", "client gone"),
    ] {
        table.row([word.to_owned()].into_iter().chain(windows.map(|window| count(&window["results"][name]))));
    }
    for name in ["p50", "p90", "p99"] {
        table.row([name.to_owned()].into_iter().chain(windows.map(|window| ms(&window["latency_ms"][name]))));
    }
    table.write(&mut out);

    let section = |out: &mut String, title: &str, heads: &[&str], rows: Vec<Vec<String>>| {
        if rows.is_empty() {
            return;
        }
        *out += &format!("\n{title}\n");
        let mut table = StatusColumns::of(heads);
        rows.into_iter().for_each(|row| table.row(row));
        table.write(out);
    };
    let recent = list(&windows[0]["refusals"]);
    let refusals = list(&windows[1]["refusals"]).into_iter().map(|row| {
        let of_15 = recent
            .iter()
            .find(|other| other["reason"] == row["reason"])
            .map_or("0".to_owned(), |row| count(&row["requests"]));
        vec![text(&row["reason"]), count(&row["status"]), of_15, count(&row["requests"])]
    });
    section(&mut out, "refusals by reason", &["reason", "status", "15 min", "24 h"], refusals.collect());
    let mut servers = Vec::new();
    for upstream in list(&status["upstreams"]) {
        for server in list(&upstream["servers"]) {
            let state = match (server["up"] == true, server["draining"] == true) {
                (true, false) => "up",
                (true, true) => "draining",
                (false, _) => "down",
            };
            servers.push(vec![
                text(&upstream["upstream"]),
                text(&server["server"]),
                state.to_owned(),
                text(&server["reason"]),
                text(&server["since"]),
                count(&server["in_flight"]),
                count(&server["max_requests"]),
                count(&server["weight"]),
            ]);
        }
    }
    section(
        &mut out,
        "servers",
        &["upstream", "server", "state", "why", "since", "in flight", "at most", "weight"],
        servers,
    );
    let stores = list(&status["stores"]).into_iter().map(|store| {
        let changes = match store["subscribed"].as_bool() {
            Some(true) => "heard".to_owned(),
            Some(false) => format!("not heard: {}", text(&store["subscription_problem"])),
            None => "no notifications".to_owned(),
        };
        let failed: u64 =
            store["errors"].as_object().into_iter().flat_map(|all| all.values()).filter_map(Value::as_u64).sum();
        let answers = if store["answers"] == false { "fails" } else { "answers" };
        vec![
            text(&store["store"]),
            answers.to_owned(),
            changes,
            ms(&store["revocation_lag_ms"]["p50"]),
            ms(&store["revocation_lag_ms"]["p99"]),
            count(&store["lookups"]["found"]),
            count(&store["lookups"]["unknown"]),
            failed.to_string(),
            ms(&store["lookup_ms"]["p50"]),
            ms(&store["lookup_ms"]["p99"]),
        ]
    });
    let heads = ["store", "lookups", "changes", "lag p50", "lag p99", "found", "unknown", "failed", "p50", "p99"];
    section(&mut out, "token stores", &heads, stores.collect());
    let cache = &status["cache"];
    let row = ["valid", "invalid", "hits", "negative_hits", "stale", "misses"].map(|name| count(&cache[name])).to_vec();
    section(&mut out, "cache", &["valid", "unknown", "hits", "hits, unknown", "stale", "lookups"], vec![row]);
    let limits = list(&status["limits"])
        .iter()
        .map(|limit| {
            vec![text(&limit["limit"]), count(&limit["allowed"]), count(&limit["refused"]), count(&limit["dry_run"])]
        })
        .collect();
    section(&mut out, "limits", &["limit", "allowed", "refused", "dry run"], limits);
    let guessing = list(&status["guessing"]["clients"])
        .iter()
        .map(|client| {
            vec![
                text(&client["client"]),
                text(&client["since"]),
                count(&client["failed_tokens"]),
                count(&client["refused"]),
            ]
        })
        .collect();
    section(&mut out, "addresses that guess tokens", &["client", "since", "failed tokens", "refused"], guessing);
    for kind in ["token", "user", "client", "route"] {
        let rows = list(&status["callers"][format!("{kind}s")]["by_requests"])
            .iter()
            .map(|row| vec![text(&row[kind]), count(&row["requests"]), count(&row["refusals"]), count(&row["bytes"])])
            .collect();
        section(&mut out, &format!("top {kind}s of the last minute"), &[kind, "requests", "refused", "bytes"], rows);
    }
    let certificates = list(&status["certificates"])
        .iter()
        .map(|row| {
            let days = row["days_left"].as_i64().unwrap_or(0).to_string();
            vec![text(&row["listener"]), text(&row["name"]), text(&row["ends"]), days]
        })
        .collect();
    section(&mut out, "certificates", &["listener", "name", "ends", "days left"], certificates);
    let reloads = list(&status["reloads"])
        .iter()
        .map(|row| {
            let join = |all: &Value| list(all).iter().map(text).collect::<Vec<_>>().join(", ");
            let restart = join(&row["restart_needed"]);
            let more =
                if restart.is_empty() { String::new() } else { format!(" (not in force until a restart: {restart})") };
            vec![
                text(&row["time"]),
                text(&row["result"]),
                text(&row["by"]),
                join(&row["applied"]) + &more + &join(&row["errors"]),
            ]
        })
        .collect();
    section(&mut out, "reloads", &["time", "result", "asked by", "what changed"], reloads);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_are_aligned_and_nothing_steers_the_terminal() {
        let status = json!({
            "version": "1.0", "ready": true, "uptime_seconds": 61, "pid": 7,
            "traffic": {"last_15_minutes": {"requests": 12_345, "latency_ms": {"p50": 1.25}}, "last_24_hours": {"requests": 9}},
            "upstreams": [{"upstream": "api", "servers": [
                {"server": "10.0.0.1:80", "up": true, "in_flight": 3, "weight": 1, "since": "2026-01-01T00:00:00Z"},
                {"server": "\u{1b}[31m\u{202e}x", "up": false, "reason": "connect", "in_flight": 12, "weight": 10},
            ]}],
        });
        let text = shown(&status);
        assert!(text.starts_with("tollgate 1.0, ready, up 1m 1s, process 7\n"), "{text}");
        assert!(text.contains(&format!("  {:<22}  {:>6}  {:>4}\n", "all", 12_345, 9)), "{text}");
        assert!(text.contains(&format!("  {:<22}  {:>6}  {:>4}\n", "p50", "1.2 ms", "-")), "{text}");
        assert!(text.contains("⟨U+001B⟩[31m⟨U+202E⟩x  down   connect"), "{text}");
        assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'), "{text:?}");
        assert!(!text.contains("limits"), "a section without rows is left out: {text}");
    }
}
