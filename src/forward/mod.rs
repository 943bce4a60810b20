//! 4 WHERE AND HOW. Says what goes upstream (`plan`), and writes its head (`head`). Pure. It must never forward a byte that
//! decides who the backend acts for and that no stage has judged.

mod head;
mod plan;

pub use head::{FieldSink, Http1Head, Http2Head, RequestSink};
pub use plan::{Plan, plan, request_id};

use crate::request::Switches;
use crate::request::token::TokenRules;

/// What is configured about forwarding.
#[derive(Clone, Debug)]
pub struct ForwardRules {
    pub credential: BackendCredential,
    pub token: TokenRules,
    pub switches: Switches,
    /// Answer a query token with a `Deprecation` header.
    pub deprecate_query_token: bool,
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
