//! `tollgate check`: every problem of a configuration, or every way around the token.

use super::Failure;
use crate::request::route::{Auth, Methods, Route};
use std::path::Path;

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let settings = super::load(path)?;
    println!("{}: ok", path.display());
    let open: Vec<&Route> = settings.rules.routes.iter().filter(|route| route.auth != Auth::Required).collect();
    let preflights = settings.rules.cors_preflight;
    if open.is_empty() && !preflights {
        println!("nothing can be reached without a token");
    } else {
        println!("can be reached without a token:");
    }
    if preflights {
        println!(
            "  every path  (CORS preflights only; no token): [api] cors_preflight, as browsers send no token with them"
        );
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
        println!("  {path}  ({methods}; {how}): {}", route.reason);
    }
    Ok(())
}
