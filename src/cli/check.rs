//! `tollgate check`: every problem of a configuration, or where tokens are looked up and every way around them.

use super::Failure;
use crate::request::route::{Auth, Methods, Route};
use crate::store::StoreSettings;
use crate::store::postgres::Source;
use crate::store::redis::RedisChanges;
use std::path::Path;

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let settings = super::load(path)?;
    crate::edge::check_places(&settings.server).map_err(Failure::Usage)?;
    say!("{}: ok", path.display())?;
    for warning in &settings.warnings {
        say!("warning: {warning}")?;
    }
    say!("tokens are looked up in:")?;
    for store in &settings.stores {
        let bound = match &store.kind {
            StoreSettings::Introspection(_) => None,
            StoreSettings::Postgres(postgres) => postgres.channel.as_ref().map(|_| match &postgres.source {
                Source::Own { .. } => "within a second",
                _ => "within a second, once `tollgate store install-triggers` has been run",
            }),
            StoreSettings::Redis(redis) => (redis.changes != RedisChanges::None).then_some("within a second"),
            StoreSettings::Sqlite(_) | StoreSettings::File(_) => Some("within a second"),
        };
        let ttl = humantime::format_duration(settings.cache.positive_ttl);
        let bound = bound.map_or_else(|| format!("after up to {ttl} ([cache] positive_ttl)"), str::to_owned);
        say!("  {}  (a revoked token stops working {bound})", store.name)?;
    }
    let open: Vec<&Route> = settings.rules.routes.iter().filter(|route| route.auth != Auth::Required).collect();
    let preflights = settings.rules.cors_preflight;
    if open.is_empty() && !preflights {
        say!("nothing can be reached without a token")?;
    } else {
        say!("can be reached without a token:")?;
    }
    if preflights {
        say!(
            "  every path  (CORS preflights only; no token): [api] cors_preflight, as browsers send no token with them"
        )?;
    }
    for route in open {
        let how = match route.auth {
            Auth::Required => "token required",
            Auth::Optional => "token optional",
            Auth::None { pass_token: false } => "no token",
            Auth::None { pass_token: true } => "the backend checks tokens itself",
        };
        let methods = if route.methods == Methods::ALL {
            "any method".to_owned()
        } else {
            route.methods.names().collect::<Vec<_>>().join(" ")
        };
        let path = &route.name;
        say!("  {path}  ({methods}; {how}): {}", route.reason)?;
    }
    Ok(())
}
