//! 5 WHAT WE SAY BACK. Every no in one place, and what must not leave in a backend's answer. Pure: bytes out, no socket.

pub mod answer;
pub mod cors;
pub mod head;
mod limit_fields;
mod refusal;

pub use limit_fields::LimitFields;
pub use refusal::{AnswerSink, Cause, Envelope, Http1Answer, Refusal, UpstreamFault, allow};
