//! What is said to other proxies that ask whether they may forward a request (`[[listener]] mode = "verdict"`). The question is
//! taken apart by `request::verdict` and judged by the pipeline as if the request had come here; nothing is forwarded.

use super::client::{After, ClientStream};
use super::exchange::{Asker, End, Exchange};
use crate::forward::Plan;
use crate::reply::cors::CorsGrant;
use crate::reply::{Envelope, Http1Answer, allow};
use crate::request::verdict::VerdictRules;
use crate::request::view::{Method, RequestView};
use crate::request::{RequestFault, Rules};
use crate::telemetry::access_log::By;
use pingora::protocols::http::date::get_cached_date;

/// A proxy that is about to ask.
pub(super) const fn asker(rules: &VerdictRules) -> Asker {
    Asker { source: rules.source, head_only: false, allowed: false }
}

/// Puts the request that is asked about in the place of the one that asks. Returns why it cannot be told which one that is.
pub(super) fn take_question<'r>(
    view: &mut RequestView<'r>,
    verdict: &VerdictRules,
    rules: &Rules,
    exchange: &mut Exchange,
) -> Option<RequestFault> {
    if let Some(asker) = &mut exchange.asker {
        asker.head_only = view.method == Method::Head;
    }
    match verdict.asked(view, rules) {
        Ok(asked) => {
            *view = asked;
            None
        }
        Err(fault) => Some(fault),
    }
}

/// A permission, written down.
pub(super) struct Allowed {
    exchange: Box<Exchange>,
    answer: Vec<u8>,
    close: bool,
}

impl Allowed {
    pub(super) fn new(mut exchange: Box<Exchange>, plan: &Plan<'_>, close: bool) -> Self {
        let date = get_cached_date();
        let mut answer = Vec::with_capacity(384);
        let envelope = Envelope {
            date: date.to_str().unwrap_or_default(),
            request_id: &exchange.request_id,
            cors: &exchange.snapshot.pipeline.cors,
            grant: CorsGrant::Off,
            hsts: None,
            limits: exchange.limit_fields(),
            location: None,
            basic: false,
            asker: exchange.asker.map(|asker| asker.source),
        };
        allow(plan, &envelope, &mut Http1Answer { out: &mut answer, head_only: true, close });
        if let Some(asker) = &mut exchange.asker {
            asker.allowed = true;
        }
        Self { exchange, answer, close }
    }

    /// The exchange is over with it: what the proxy does then is not seen.
    pub(super) async fn tell(self, client: &mut ClientStream) -> After {
        let Self { mut exchange, answer, close } = self;
        let written = client.write(&answer).await.is_ok();
        exchange.over(End {
            status: 200,
            by: Some(By::Gate),
            bytes_received: exchange.head.len() as u64,
            bytes_sent: answer.len() as u64,
            failed: !written,
        });
        if close || !written { After::Close } else { After::Next }
    }
}
