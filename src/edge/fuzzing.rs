//! What the fuzz targets drive of what is private here. Only with the feature `fuzzing`; decides nothing itself.

use super::frame_watch::FramePosition;
use super::http1::{self, ClientSide};
use super::http2;
use crate::reply::answer::{AnswerKind, AnswerView as _, Credentials, judge};
use crate::reply::head::{AnswerBody, AnswerHead};
use crate::request::query::Names;
use crate::request::route::HeaderEdits;
use std::time::Instant;

/// The head of a request that came over HTTP/2, as HTTP/1 has it.
pub fn head_of_http2(parts: &http::request::Parts, ended: bool) -> Option<Vec<u8>> {
    http2::written_head(parts, ended)
}

/// Counts the frames of a connection, in these pieces, at one point in time. The kind of which there were too many, or whether
/// something is unfinished.
pub fn count_frames<'p>(pieces: impl Iterator<Item = &'p [u8]>) -> Result<bool, &'static str> {
    let now = Instant::now();
    let mut position = FramePosition::new(now);
    for piece in pieces {
        position.walk(piece, now)?;
    }
    Ok(position.is_unfinished())
}

/// What is known of the client of an answer.
#[derive(Clone, Copy, Debug)]
pub struct AnswerClient<'a> {
    pub names: &'a Names,
    pub token: Option<&'a [u8]>,
    pub head_only: bool,
    pub http10: bool,
    pub deprecated: bool,
    pub asked_to_switch: bool,
    pub response_headers: &'a HeaderEdits,
}

/// The head of a backend's answer as the client gets it, of which sort it is, and how its body ends. `None`: a 502.
pub fn answered(head: &[u8], client: &AnswerClient<'_>) -> Option<(Vec<u8>, AnswerKind, AnswerBody)> {
    let head = AnswerHead::parse(head).ok()?;
    let kind = judge(&head, client.asked_to_switch, 0).ok()?;
    let body = head.body(client.head_only);
    let to = ClientSide {
        credentials: Credentials { names: client.names, token: client.token, fragments_pass: false },
        response_headers: client.response_headers,
        http10: client.http10,
        deprecated: client.deprecated,
        hsts: None,
        limits: None,
        request_id: "fuzz",
        reusable: !client.http10 && head.status() != 500,
    };
    let mut out = Vec::new();
    http1::write_head(&mut out, &head, kind, body, &to);
    Some((out, kind, body))
}
