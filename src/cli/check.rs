//! `tollgate check`: every problem of a configuration, or every way around the token.

use super::Failure;
use crate::request::route::{Auth, Methods, Route};
use std::path::Path;

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let settings = super::load(path)?;
    println!("{}: ok", path.display());
    let preflight = settings.rules.preflight.iter();
    let open: Vec<&Route> =
        settings.rules.routes.iter().filter(|route| route.auth != Auth::Required).chain(preflight).collect();
    if open.is_empty() {
        println!("nothing can be reached without a token");
    } else {
        println!("can be reached without a token:");
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
        let path = if route.pattern.is_everything() && !route.is_web_page() {
            "every path (CORS preflight)"
        } else {
            &route.name
        };
        println!("  {path}  ({methods}; {how}): {}", route.reason);
    }
    Ok(())
}
