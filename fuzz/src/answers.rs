//! Heads of backends' answers, as the client gets them.

use crate::heads;
use httparse::{EMPTY_HEADER, Header, Status};
use tollgate::edge::fuzzing::{AnswerClient, answered};
use tollgate::reply::answer::AnswerKind;
use tollgate::reply::head::{AnswerBody, end_of_head};
use tollgate::request::route::HeaderEdits;

/// What the client sent; it stands in the dictionary too.
const TOKEN: &str = "good-token-0001";

fn reread(head: &[u8]) -> Option<(u16, Vec<(String, Vec<u8>)>)> {
    let mut fields = [EMPTY_HEADER; 512];
    let mut answer = httparse::Response::new(&mut fields);
    let Ok(Status::Complete(length)) = answer.parse(head) else { return None };
    let of = |field: &Header<'_>| (field.name.to_ascii_lowercase(), field.value.to_vec());
    (length == head.len()).then(|| (answer.code.unwrap_or_default(), answer.headers.iter().map(of).collect()))
}

/// Decoded until nothing changes, as whoever follows a URL within a URL does.
fn wholly_decoded(value: &[u8]) -> Vec<u8> {
    let mut value = value.to_vec();
    for _ in 0..8 {
        value = percent_encoding::percent_decode(&value).collect();
    }
    value
}

pub fn rewritten(data: &[u8]) {
    let Some((options, data)) = data.split_first() else { return };
    let Some(end) = end_of_head(data, 0) else { return };
    let head = &data[..end];
    let names = heads::names();
    let own = HeaderEdits { set: vec![("X-Site".into(), "main".into())], remove: vec!["Server".into()] };
    let is = |bit: u8| options & bit != 0;
    let client = AnswerClient {
        names: &names,
        token: Some(TOKEN.as_bytes()),
        head_only: is(1),
        http10: is(2),
        deprecated: is(4),
        asked_to_switch: is(8),
        response_headers: if is(16) { &own } else { const { &HeaderEdits { set: Vec::new(), remove: Vec::new() } } },
    };
    let Some((out, kind, body)) = answered(head, &client) else { return };
    let (status, sent) = reread(&out).expect("httparse does not read what the client gets");
    let (given_status, given) = reread(head).expect("httparse does not read a head that tollgate reads");
    assert_eq!(status, given_status, "another status");
    let lines: Vec<&[u8]> = out.split(|b| *b == b'\n').collect();
    let whole =
        |line: &&[u8]| line.strip_suffix(b"\r").is_some_and(|line| !line.iter().any(|b| matches!(b, b'\r' | 0)));
    assert!(lines[..lines.len() - 1].iter().all(whole), "a broken line");

    let values = |fields: &[(String, Vec<u8>)], name: &str| -> Vec<Vec<u8>> {
        fields.iter().filter(|(known, _)| known == name).map(|(_, value)| value.clone()).collect()
    };
    let urls = ["location", "content-location", "link", "refresh"];
    for (name, value) in &sent {
        let ours = ["x-request-id", "deprecation", "date", "connection", "transfer-encoding", "x-site"];
        let came = values(&given, name).contains(value);
        assert!(came || ours.contains(&name.as_str()) || urls.contains(&name.as_str()), "{name} is not the backend's");
        let ends_here = ["keep-alive", "te", "trailer", "proxy-connection", "x-sendfile", "x-accel-redirect"];
        assert!(!ends_here.contains(&name.as_str()) && !name.starts_with("gitlab-workhorse"), "{name} passes");
        assert!(name != "upgrade" || kind == AnswerKind::Switching, "an upgrade passes");
        if urls.contains(&name.as_str()) {
            let text = wholly_decoded(value);
            let found = text.windows(TOKEN.len()).any(|run| run == TOKEN.as_bytes());
            assert!(!found, "a token in {name}");
        }
    }
    // Nothing is lost that had no reason to be.
    let options: Vec<u8> = values(&given, "connection").join(&b',').to_ascii_lowercase();
    for (name, value) in given.iter().filter(|(name, _)| name.starts_with("x-a") && name != "x-accel-redirect") {
        let nominated = options.split(|b| *b == b',').any(|option| option.trim_ascii() == name.as_bytes());
        assert!(nominated || values(&sent, name).contains(value), "{name} is lost");
    }
    if kind != AnswerKind::Final {
        return;
    }
    assert_eq!(values(&sent, "x-request-id"), [b"fuzz"], "the id");
    let (lengths, codings) = (values(&sent, "content-length"), values(&sent, "transfer-encoding"));
    assert!(lengths.len() + codings.len() <= 1, "two framings");
    match body {
        AnswerBody::Length(length) => assert_eq!(lengths, [length.to_string().into_bytes()], "the length"),
        AnswerBody::Chunked | AnswerBody::UntilClose if client.http10 => assert!(codings.is_empty()),
        AnswerBody::Chunked | AnswerBody::UntilClose => {
            assert!(codings.len() == 1 && codings[0].eq_ignore_ascii_case(b"chunked"), "no end");
        }
        AnswerBody::Empty => {
            let nothing = client.head_only || matches!(status, 204 | 304);
            assert!(nothing || lengths == [b"0"], "a client would wait for a body");
        }
    }
}
