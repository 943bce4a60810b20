//! What goes on, as one JSON value: `GET /status` sends it, the page and `tollgate status` show it. It changes nothing.

use super::{AdminAccess, Operator};
use crate::policy::GuessEpisode;
use crate::sandbox;
use crate::store::rfc3339;
use crate::telemetry::heavy_hitters::{HeavyHitter, HitterKind, HitterMeasure, HitterSums};
use crate::telemetry::history::{TrafficResults, TrafficTotals, TrafficWindow};
use crate::telemetry::metrics::CacheResult;
use crate::upstream::{Member, Upstream};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// The configuration as its file has it, for people. A value that may be a secret is not here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShownConfig {
    /// Where it was read from.
    pub file: String,
    pub sections: Vec<ShownSection>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownSection {
    /// As its header is written, with its name if it has one: `[[upstream]] api`.
    pub name: String,
    pub keys: Vec<ShownKey>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownKey {
    pub key: String,
    /// `None`: it is set, and not shown.
    pub value: Option<String>,
}

/// Of each list of who makes the traffic.
const MOST_CALLERS: usize = 8;
const MOST_GUESSING: usize = 20;
const CALLERS_OF: Duration = Duration::from_secs(60);
/// The names of the two windows.
const WINDOWS: [&str; 2] = ["last_15_minutes", "last_24_hours"];

/// `series`: with the numbers that the plots are drawn from.
pub(super) fn report(operator: &Operator<'_>, series: bool) -> Value {
    let (valid, invalid) = operator.pipeline.authenticator.cache_sizes();
    let mut cache = Map::new();
    cache.insert("valid".into(), valid.into());
    cache.insert("invalid".into(), invalid.into());
    for (result, count) in operator.metrics.cache_results() {
        let name = match result {
            CacheResult::PositiveHit => "hits",
            CacheResult::NegativeHit => "negative_hits",
            CacheResult::Miss => "misses",
            CacheResult::Stale => "stale",
        };
        cache.insert(name.into(), count.into());
    }
    let time = |unix_ms: u64| rfc3339(unix_ms / 1000);
    let windows = operator.metrics.traffic(operator.now.mono_ms);
    let traffic: Map<String, Value> =
        WINDOWS.iter().zip(&windows).map(|(name, seen)| ((*name).to_owned(), window(seen, operator, series))).collect();
    let reloads = operator.reloads.last();
    let loaded = reloads.iter().find(|note| note.result != "failed").map(|note| time(note.unix_ms));
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": operator.ready,
        "started": time(operator.started_unix_ms),
        "uptime_seconds": operator.now.unix_ms.saturating_sub(operator.started_unix_ms) / 1000,
        "time": time(operator.now.unix_ms),
        "pid": std::process::id(),
        "sandbox": match sandbox::current() {
            None => "off",
            Some(sandbox) if sandbox.is_partial => "partial",
            Some(_) => "on",
        },
        "reads_only": operator.terms.access == AdminAccess::ReadOnly,
        "store": operator.pipeline.authenticator.store_names(),
        "hears_of_changes": operator.pipeline.authenticator.hears(operator.now),
        "cache": cache,
        "requests_in_flight": operator.metrics.requests_in_flight(),
        "connections": operator.metrics.open_connections(),
        "routes": operator.pipeline.rules.routes.iter().map(|route| &route.name).collect::<Vec<_>>(),
        "traffic": traffic,
        "upstreams": upstreams(operator),
        "stores": stores(operator),
        "limits": limits(operator),
        "guessing": guessing(operator, MOST_GUESSING),
        "callers": top(operator, CALLERS_OF, MOST_CALLERS),
        "certificates": certificates(operator),
        "configuration": {
            "file": operator.config.file,
            "loaded": loaded,
            "sections": operator.config.sections.iter().map(section).collect::<Vec<_>>(),
        },
        "reloads": reloads.iter().map(|note| json!({
            "time": time(note.unix_ms),
            "by": note.by,
            "result": note.result,
            "applied": note.applied,
            "restart_needed": note.restart,
            "errors": note.errors,
        })).collect::<Vec<_>>(),
    })
}

fn section(section: &ShownSection) -> Value {
    let key = |key: &ShownKey| json!({ "key": key.key, "value": key.value, "hidden": key.value.is_none() });
    json!({ "section": section.name, "keys": section.keys.iter().map(key).collect::<Vec<_>>() })
}

fn millis(seconds: Option<f64>) -> Value {
    // Three digits are more than a bucket knows.
    seconds.map_or(Value::Null, |seconds| json!((seconds * 1e6).round() / 1e3))
}

fn results(of: &TrafficTotals<u64>) -> Map<String, Value> {
    let counts = of.results().in_order();
    TrafficResults::NAMES.iter().zip(counts).map(|(name, count)| ((*name).to_owned(), count.into())).collect()
}

const QUANTILES: [(&str, f64); 3] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)];

fn window(window: &TrafficWindow, operator: &Operator<'_>, series: bool) -> Value {
    let reasons = operator.metrics.refusal_reasons();
    let mut refusals: Vec<(&str, u16, u64)> = reasons
        .iter()
        .zip(window.all.reasons)
        .map(|((reason, status), count)| (*reason, *status, count))
        .filter(|(.., count)| *count > 0)
        .collect();
    refusals.sort_by(|one, other| other.2.cmp(&one.2).then(one.0.cmp(other.0)));
    let refusal =
        |(reason, status, count): &(&str, u16, u64)| json!({ "reason": reason, "status": status, "requests": count });
    let quantiles = |of: &TrafficTotals<u64>| -> Map<String, Value> {
        QUANTILES.iter().map(|(name, share)| ((*name).to_owned(), millis(of.quantile(*share)))).collect()
    };
    let seconds = (window.covered_ms as f64 / 1000.0).max(1.0);
    let mut seen = json!({
        "seconds": window.covered_ms / 1000,
        "requests": window.all.requests(),
        "requests_per_second": (window.all.requests() as f64 / seconds * 100.0).round() / 100.0,
        "results": results(&window.all),
        "latency_ms": quantiles(&window.all),
        "refusals": refusals.iter().map(refusal).collect::<Vec<_>>(),
    });
    if series {
        let slots: Vec<_> = window.slots.iter().map(|slot| slot.results().in_order()).collect();
        let mut all = Map::new();
        all.insert("step_seconds".into(), (window.step_ms / 1000).into());
        all.insert("last_step_seconds".into(), (window.last_ms as f64 / 1000.0).into());
        for (index, name) in TrafficResults::NAMES.iter().enumerate() {
            all.insert((*name).into(), slots.iter().map(|counts| counts[index]).collect());
        }
        for (name, share) in QUANTILES {
            all.insert(name.into(), window.slots.iter().map(|slot| millis(slot.quantile(share))).collect());
        }
        seen["series"] = all.into();
    }
    seen
}

/// The servers, whether they are up, and why not.
pub(super) fn upstreams(operator: &Operator<'_>) -> Value {
    let server = |upstream: &Upstream, Member { server, weight, backup, .. }: &Member| {
        let state = server.state();
        let (limit, adaptive) = upstream.limit_of(server);
        let age = operator.instant.saturating_duration_since(state.since).as_secs();
        json!({
            "server": server.label(),
            "addresses": server.addresses().map(|address| address.to_string()).collect::<Vec<_>>(),
            "up": state.down.is_none(),
            "reason": state.down.map(|reason| reason.as_str()),
            "since": rfc3339((operator.now.unix_ms / 1000).saturating_sub(age)),
            "unanswered": state.unanswered,
            "draining": server.is_drained(),
            "in_flight": server.in_flight(),
            "max_requests": limit,
            "adaptive": adaptive.map(|reading| json!({
                "unloaded_ms": reading.unloaded.map(|unloaded| unloaded.as_secs_f64() * 1000.0),
                "samples": reading.samples,
                "pinned": reading.is_pinned,
            })),
            "weight": weight,
            "backup": backup,
        })
    };
    let upstream = |upstream: &&Upstream| {
        let members = upstream.members();
        json!({
            "upstream": upstream.name(),
            "servers": members.iter().map(|member| server(upstream, member)).collect::<Vec<_>>(),
        })
    };
    Value::from(operator.upstreams.iter().map(upstream).collect::<Vec<_>>())
}

fn stores(operator: &Operator<'_>) -> Value {
    let counts = |all: &[(String, u64)]| -> Map<String, Value> {
        all.iter().map(|(name, count)| (name.clone(), (*count).into())).collect()
    };
    let seconds = |(count, middle, slow): (u64, Option<f64>, Option<f64>)| json!({ "count": count, "p50": millis(middle), "p99": millis(slow) });
    let store = |name: &str| {
        let seen = operator.metrics.store_reading(name);
        json!({
            "store": name,
            "answers": !seen.breaker_open,
            "subscribed": seen.subscribed,
            "subscription_problem": seen.problem,
            "subscription_losses": seen.losses,
            "rechecks": seen.rechecks,
            "servers": seen.servers,
            "writable": seen.writable,
            "file_current": seen.file_current,
            "lookups": counts(&seen.lookups),
            "errors": counts(&seen.errors),
            "waiting": seen.waiting,
            "connections": counts(&seen.connections),
            "lookup_ms": seconds(seen.lookup_seconds),
            "revocation_lag_ms": seconds(seen.revocation_lag_seconds),
        })
    };
    operator.pipeline.authenticator.stores().map(store).collect()
}

fn limits(operator: &Operator<'_>) -> Value {
    let limit = |name: &str| {
        let [allowed, refused, dry_run, shared_bucket] = operator.metrics.limit_counts(name);
        json!({ "limit": name, "allowed": allowed, "refused": refused, "dry_run": dry_run, "shared_bucket": shared_bucket })
    };
    operator.pipeline.limits.names().map(limit).collect()
}

fn certificates(operator: &Operator<'_>) -> Value {
    let mut all = operator.metrics.certificate_ends();
    all.sort_by(|one, other| one.2.cmp(&other.2).then_with(|| one.cmp(other)));
    let now = operator.now.unix_ms / 1000;
    let certificate = |(listener, name, end): &(String, String, u64)| {
        let days = i64::try_from(*end).unwrap_or(i64::MAX).saturating_sub_unsigned(now) / 86_400;
        json!({ "listener": listener, "name": name, "ends": rfc3339(*end), "days_left": days })
    };
    all.iter().map(certificate).collect()
}

/// Who makes the traffic.
pub(super) fn top(operator: &Operator<'_>, last: Duration, most: usize) -> Value {
    let hitters = operator.metrics.heavy_hitters();
    let ranking = hitters.ranking(operator.instant, last, most);
    let numbers = |sums: &HitterSums| {
        json!({
            "requests": sums.requests,
            "bytes": sums.bytes,
            "refusals": sums.refusals,
            "backend_seconds": sums.backend.as_secs_f64(),
        })
    };
    let mut body = json!({
        "seconds": ranking.covers.as_secs(),
        "sampled": ranking.sampled,
        "all": numbers(&ranking.all),
    });
    for (kind, lists) in HitterKind::ALL.iter().zip(&ranking.lists) {
        for (measure, list) in HitterMeasure::ALL.iter().zip(lists) {
            let hitter = |hitter: &HeavyHitter| {
                let mut entry = numbers(&hitter.sums);
                entry[kind.as_str()] = hitter.name.as_str().into();
                entry
            };
            body[format!("{}s", kind.as_str())][format!("by_{}", measure.as_str())] = list.iter().map(hitter).collect();
        }
    }
    body
}

/// Addresses that guess tokens at the moment.
pub(super) fn guessing(operator: &Operator<'_>, most: usize) -> Value {
    let guard = &operator.pipeline.guessing;
    let mut episodes = guard.episodes(operator.now);
    // Those who are refused most first; a longer list helps nobody.
    episodes.sort_by_key(|episode| std::cmp::Reverse(episode.refused));
    let listed = episodes.iter().take(most).map(|episode| {
        json!({
            "client": GuessEpisode::name(&episode.network),
            "since": rfc3339(episode.began.unix_ms / 1000),
            "failed_tokens": episode.failures,
            "turns": episode.turns,
            "refused": episode.refused,
            "pauses": episode.pauses,
            "pause_seconds_left": episode.retry_after,
        })
    });
    json!({
        "watching": guard.settings().is_some(),
        "addresses": episodes.len(),
        "clients": listed.collect::<Vec<_>>(),
    })
}
