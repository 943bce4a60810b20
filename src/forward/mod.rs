//! 4 WHERE AND HOW. Says what goes upstream (`plan`), and writes its head (`head`). Pure. It must never forward a byte that
//! decides who the backend acts for and that no stage has judged.

mod head;
mod plan;
mod proxy_header;

pub use head::{FieldSink, Http1Head, Http2Head, RequestSink};
pub use plan::{Plan, plan, request_id};
pub use proxy_header::{PROXY_LOCAL, proxy_header};

use crate::problem::Problem;
use crate::request::Switches;
use crate::request::route::Route;
use crate::request::token::{TokenRules, is_token_header};
use crate::request::trace::TraceMode;
use crate::request::view::FieldKind;

/// What is configured about forwarding.
#[derive(Clone, Debug)]
pub struct ForwardRules {
    pub credential: BackendCredential,
    pub token: TokenRules,
    pub switches: Switches,
    /// Answer a query token with a `Deprecation` header.
    pub deprecate_query_token: bool,
    pub trace: TraceMode,
}

impl ForwardRules {
    /// Keys of a `[[route]]`.
    pub fn problems_of(&self, route: &Route) -> Vec<Problem> {
        route.request_headers.problems("request_headers", |name| self.may_edit(name))
    }

    /// A route must not write or take out what says who asks, where from, or how a body is to be read.
    fn may_edit(&self, name: &str) -> Result<(), &'static str> {
        if is_token_header(name.as_bytes(), &self.token) {
            return Err("carries the token");
        }
        match FieldKind::of(name.as_bytes()) {
            FieldKind::EndToEnd if name.to_ascii_lowercase().starts_with("content-") => {
                Err("says how the body is to be read, by which it was judged")
            }
            FieldKind::EndToEnd => Ok(()),
            FieldKind::PathOrUser => {
                Err("chooses a path or a user for some backends, see [token] path_and_user_headers")
            }
            FieldKind::Cookie | FieldKind::Authorization => Err("has a key of its own in [token]"),
            FieldKind::TraceParent | FieldKind::TraceState => Err("has a key of its own: [trace] context"),
            _ => Err("is written or judged by tollgate"),
        }
    }
}

/// What tells the backend who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendCredential {
    /// The validated token, in the token header.
    Token,
    /// X-Tollgate-User, X-Tollgate-Token-Id and X-Tollgate-Scopes.
    Identity,
    Both,
    None,
}
