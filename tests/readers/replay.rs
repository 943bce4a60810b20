//! Sends recorded requests of real clients (tests/bodies/captures) through the gateway to every application: one that
//! understands a body without tollgate must get it with tollgate, except for a list with reasons.

use super::backends::{Kind, Reader};
use super::generate::Case;
use super::{Outcome, Sender};
use crate::harness::*;
use crate::support::repository;

pub struct Capture {
    pub name: String,
    /// The request's method, type and coding, and its body without chunk framing.
    pub method: String,
    pub content_type: Option<Vec<u8>>,
    pub content_encoding: Option<Vec<u8>>,
    pub body: Vec<u8>,
    /// Only the beginning of the body was recorded.
    cut: bool,
}

pub fn captures() -> Vec<Capture> {
    crate::bodies::captures().into_iter().map(|(name, bytes)| Capture::of(name, bytes)).collect()
}

impl Capture {
    fn of(name: &str, bytes: &[u8]) -> Self {
        let end = memchr::memmem::find(bytes, b"\r\n\r\n").unwrap();
        let (head, body) = (&bytes[..end], &bytes[end + 4..]);
        let mut lines = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
        let request_line = String::from_utf8_lossy(lines.next().unwrap()).into_owned();
        let fields: Vec<(String, &[u8])> = lines
            .filter_map(|line| {
                let (name, value) = line.split_at(memchr::memchr(b':', line)?);
                Some((String::from_utf8_lossy(name).to_ascii_lowercase(), value[1..].trim_ascii()))
            })
            .collect();
        let field = |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.to_vec());
        let length = field("content-length").and_then(|text| String::from_utf8(text).ok()?.parse::<usize>().ok());
        Self {
            name: name.to_owned(),
            method: request_line.split(' ').next().unwrap_or_default().to_owned(),
            content_type: field("content-type"),
            content_encoding: field("content-encoding"),
            cut: length.is_some_and(|length| length != body.len()),
            body: body.to_vec(),
        }
    }

    fn case(&self, id: usize) -> Option<Case> {
        let methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
        let method = methods.into_iter().find(|known| *known == self.method)?;
        let mut headers = vec![format!("PRIVATE-TOKEN: {GOOD}").into_bytes()];
        let mut add = |name: &[u8], value: &Option<Vec<u8>>| {
            if let Some(value) = value {
                headers.push([name, value.as_slice()].concat());
            }
        };
        add(b"Content-Type: ", &self.content_type);
        add(b"Content-Encoding: ", &self.content_encoding);
        Some(Case {
            id,
            method,
            path: "/api/v3/projects/1/uploads",
            query: None,
            headers,
            body: Some(self.body.clone()),
            chunks: None,
            no_token_may_stay: true,
        })
    }
}

/// Requests that are refused deliberately, one per line: name, tab, reason.
fn refused_knowingly() -> Vec<String> {
    let text = std::fs::read_to_string(repository("tests/bodies/refused.tsv")).unwrap();
    let names = text.lines().map(|line| line.split_once('\t').unwrap().0.to_owned());
    names.collect()
}

#[test]
fn no_real_client_is_refused_that_a_reader_understands() {
    let captures = captures();
    assert_eq!(captures.len(), 763);
    let knowingly = refused_knowingly();
    assert!(knowingly.iter().all(|name| captures.iter().any(|capture| capture.name == *name)), "{knowingly:?}");
    println!("| reader | sent | understood without tollgate | with tollgate | refused knowingly | refused falsely |");
    let mut false_refusals = Vec::new();
    for kind in Kind::ALL {
        let reader = Reader::start(kind);
        let gateway = Gateway::start(reader.address, "");
        let (mut direct, mut through) = (Sender::new(reader.address), Sender::new(gateway.address));
        let (mut sent, mut understood, mut passed, mut known, mut falsely) = (0, 0, 0, 0, 0);
        for (id, capture) in captures.iter().enumerate().filter(|(_, capture)| !capture.cut) {
            let Some(case) = capture.case(id) else { continue };
            sent += 1;
            let reads = |outcome: Outcome| match outcome {
                Outcome::Forwarded(report) if report["e"].is_null() => Some(report["n"].as_u64().unwrap()),
                _ => None,
            };
            let without = reads(direct.send(&case));
            if without.is_none() {
                continue;
            }
            understood += 1;
            let outcome = through.send(&case);
            let status = match &outcome {
                Outcome::Refused(status) => Some(*status),
                _ => None,
            };
            match reads(outcome) {
                // Better than without: a boundary that needs quotes is forwarded with them.
                with if with >= without => passed += 1,
                _ if knowingly.contains(&capture.name) => known += 1,
                with => {
                    falsely += 1;
                    false_refusals.push(format!(
                        "{kind:?}: {}: {without:?} fields, with tollgate {with:?} {status:?}",
                        capture.name
                    ));
                }
            }
        }
        println!("| {kind:?} | {sent} | {understood} | {passed} | {known} | {falsely} |");
        assert!(understood > 500, "{kind:?} understood {understood} of {sent}");
    }
    assert!(false_refusals.is_empty(), "{}", false_refusals.join("\n"));
}
