//! Heads of requests: read by tollgate and by httparse, and forwarded whole.

use crate::spellings;
use httparse::{EMPTY_HEADER, Header, Status};
use std::sync::{Arc, LazyLock};
use tollgate::clock::Now;
use tollgate::config::{Probe, Settings, parse};
use tollgate::forward::{Http1Head, plan};
use tollgate::identity::{TokenStatus, judge};
use tollgate::request::head;
use tollgate::request::origin::{Arrival, Origin};
use tollgate::request::query::Names;
use tollgate::request::trace::{NewIds, TraceContext, TraceMode};
use tollgate::request::view::{FieldKind, Framing, Method, RequestView, Version};
use tollgate::request::{examine, target};
use tollgate::store::TokenRecord;
use tollgate::store::credential::Digest;

/// The settings of a small configuration.
pub static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let text =
        "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[[store]]\nkind = \"file\"\npath = \"t.toml\"\n";
    match parse(text, "/nonexistent/tollgate.toml".as_ref(), Probe::Settings) {
        Ok(settings) => settings,
        Err(found) => panic!("{found:?}"),
    }
});

/// A head as another author's parser reads it: method, target, minor version, fields.
pub struct Reread<'b> {
    pub method: &'b str,
    pub target: &'b str,
    pub minor: u8,
    pub fields: Vec<Header<'b>>,
}

/// `None`: httparse does not read exactly these bytes as one head.
pub fn reread(head: &[u8]) -> Option<Reread<'_>> {
    let mut fields = [EMPTY_HEADER; 512];
    let mut request = httparse::Request::new(&mut fields);
    let Ok(Status::Complete(length)) = request.parse(head) else { return None };
    let (method, target, minor) = (request.method?, request.path?, request.version?);
    let fields = request.headers.to_vec();
    (length == head.len()).then_some(Reread { method, target, minor, fields })
}

impl<'b> Reread<'b> {
    pub fn values(&self, name: &str) -> Vec<&'b [u8]> {
        self.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value).collect()
    }

    /// Where the body ends, by RFC 9112 alone. `None`: in doubt.
    fn framing(&self) -> Option<Framing> {
        match (self.values("content-length")[..].as_ref(), self.values("transfer-encoding")[..].as_ref()) {
            ([], []) => Some(Framing::Empty),
            ([length], []) => match std::str::from_utf8(length).ok()?.parse().ok()? {
                0 => Some(Framing::Empty),
                length => Some(Framing::Length(length)),
            },
            ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") && self.minor == 1 => Some(Framing::Chunked),
            _ => None,
        }
    }
}

/// What tollgate reads must be what httparse reads.
pub fn compare(view: &RequestView<'_>, head: &[u8]) {
    // Bytes of a target are judged later, and httparse refuses some of them at once.
    if target::check(view.target).is_err() || view.method == Method::Other {
        return;
    }
    let other = reread(head).expect("httparse does not read a head that tollgate reads");
    assert_eq!(other.method.as_bytes(), view.method_bytes, "method");
    let reduced = match other.target.find("://").filter(|_| !other.target.starts_with('/')) {
        Some(at) => {
            let rest = &other.target[at + 3..];
            let path = rest.find('/').expect("an absolute target without a path");
            assert!(rest.as_bytes()[..path].eq_ignore_ascii_case(view.host), "another host in the target");
            &rest[path..]
        }
        None => other.target,
    };
    assert_eq!(reduced.as_bytes(), view.target, "target");
    assert_eq!(other.minor == 1, view.version == Version::Http11, "version");
    assert_eq!(other.fields.len(), view.fields.len(), "number of fields");
    for (theirs, ours) in other.fields.iter().zip(&view.fields) {
        assert_eq!((theirs.name.as_bytes(), theirs.value), (ours.name, ours.value), "a field");
        assert!(!ours.value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)), "a line end in a value");
    }
    assert_eq!(other.values("host"), [view.host], "host");
    assert_eq!(other.framing(), Some(view.body), "framing");
    let folded = |field: &Header<'_>| field.name.to_ascii_lowercase().replace(['_', '.'], "-");
    let framing = ["content-length", "transfer-encoding"];
    let aliases = other.fields.iter().filter(|field| framing.contains(&folded(field).as_str()));
    assert!(aliases.count() <= 1, "an alias of a field that frames");
    let options = other.values("connection").concat().to_ascii_lowercase();
    let says = |word: &[u8]| options.windows(word.len()).any(|found| found == word);
    assert!(!(view.keep_alive && other.minor == 0 && !says(b"keep-alive")), "HTTP/1.0 kept alive unasked");
}

/// Finds the head in a stream, and reads it.
pub fn read(data: &[u8]) {
    let Some(end) = head::end_of_head(data, 0) else { return };
    for scanned in [end / 3, end / 2, end.saturating_sub(1)] {
        assert_eq!(head::end_of_head(data, scanned), Some(end), "the end of a head depends on what came when");
    }
    let bytes = &data[..end];
    let Ok(view) = head::parse(bytes) else { return };
    compare(&view, bytes);
    for cut in 0..end.min(256) {
        assert!(!head::is_invalid_prefix(&bytes[..cut], 0), "given up on a good head after {cut} bytes");
    }
    assert_eq!(head::asks_for_head(bytes), view.method == Method::Head, "HEAD");
    let origins: Vec<&[u8]> = view.fields_of(FieldKind::Origin).map(|field| field.value).collect();
    assert_eq!(head::origins_of_unparsed(bytes).collect::<Vec<_>>(), origins, "origins");
}

const NOW: Now = Now { mono_ms: 1_000_000, unix_ms: 1_800_000_000_000 };

/// A whole request, as a backend gets it.
pub fn forwarded(data: &[u8]) {
    let Some(end) = head::end_of_head(data, 0) else { return };
    let Ok(view) = head::parse(&data[..end]) else { return };
    let settings = &*SETTINGS;
    let Ok(examined) = examine(&view, &settings.rules) else { return };
    let presented = examined.presented.as_ref().expect("no token, and not refused").value.to_vec();
    assert!(!presented.is_empty() && presented.iter().all(u8::is_ascii_graphic), "a strange token");
    let digest = Digest::of(&presented);
    let (status, _) = judge(Some(&TokenRecord::new(digest, "ann")), &digest, NOW);
    let TokenStatus::Valid(principal) = status else { panic!("the record holds") };
    let Ok(permit) = settings.policy.decide(&examined, Some(principal), None) else { return };
    let method = examined.method;
    let route = examined.route.index;
    let plan = plan(permit, examined);
    let origin = Origin::of(&view, &Arrival::of(Some([192, 0, 2, 1].into())), &settings.rules.trusted_proxies);
    let mut out = Vec::new();
    plan.write_head(&view, &settings.forward, &origin, "fuzz", None, &mut Http1Head(&mut out));

    let sent = reread(&out).expect("httparse does not read what tollgate forwards");
    let again = head::parse(&out).expect("tollgate does not read what it forwards");
    compare(&again, &out);
    assert_eq!(again.body, view.body, "another body");
    assert_eq!(sent.values("private-token"), [presented.as_slice()], "the credential");
    assert_eq!(sent.values("authorization"), [b""; 0], "another credential");
    assert_eq!(sent.values("host"), [view.host], "another host");
    for (place, field) in sent.fields.iter().enumerate() {
        let name = field.name.to_ascii_lowercase();
        assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "an alias of a field: {name}");
        let overrides = ["x-http-method-override", "x-method-override", "x-http-method"];
        assert!(!overrides.contains(&name.as_str()), "a method override");
        assert!(!name.starts_with("x-tollgate-"), "an identity");
        let hop = ["proxy-authorization", "te", "trailer", "keep-alive", "sudo", "job-token", "cookie", "x-real-ip"];
        assert!(!hop.contains(&name.as_str()), "{name}");
        // What tollgate writes itself stands once.
        if ["x-request-id", "x-forwarded-for", "x-forwarded-proto", "content-type"].contains(&name.as_str()) {
            assert!(!sent.fields[..place].iter().any(|other| other.name.eq_ignore_ascii_case(&name)), "{name} twice");
        }
    }
    let query = again.query().unwrap_or_default();
    let named =
        |known: &[u8]| spellings::pairs(query).any(|pair| spellings::reads_as(&spellings::decoded(pair).0, known));
    assert!(!named(b"private_token"), "a token in the query");
    assert!(!named(b"_method"), "a method in the query");
    let once_more = examine(&again, &settings.rules).expect("what is forwarded is refused");
    assert_eq!((once_more.method, once_more.route.index), (method, route), "judged as something else");
    assert!(once_more.edits.is_empty(), "the query changes again");
    assert!(once_more.content_type.is_none(), "the type changes again");
}

/// traceparent: what goes on is what came, or a well-formed one of our own.
pub fn trace(data: &[u8]) {
    let Some((mode, value)) = data.split_first() else { return };
    let mut bytes = b"GET / HTTP/1.1\r\nHost: h\r\nTraceParent: ".to_vec();
    bytes.extend_from_slice(value);
    bytes.extend_from_slice(b"\r\n\r\n");
    let Ok(view) = head::parse(&bytes) else { return };
    let fields: Vec<&[u8]> =
        view.fields.iter().filter(|f| f.name.eq_ignore_ascii_case(b"traceparent")).map(|f| f.value).collect();
    // As the recommendation has version 00.
    let holds = |text: &[u8]| {
        let parts: Vec<&[u8]> = text.split(|b| *b == b'-').collect();
        let lower = |part: &[u8]| part.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
        let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let zero = |part: &[u8]| part.iter().all(|b| *b == b'0');
        lengths == [2, 32, 16, 2]
            && parts.iter().all(|part| lower(part))
            && parts[0] == b"00"
            && !zero(parts[1])
            && !zero(parts[2])
    };
    let good = fields.len() == 1 && holds(fields[0]);
    let found = TraceContext::of(&view);
    assert_eq!(found.is_some(), good, "a trace context");
    let mode = [TraceMode::Pass, TraceMode::Make, TraceMode::Restart, TraceMode::Drop][usize::from(mode & 3)];
    let ids = || NewIds { trace_id: 0xabc.try_into().unwrap(), span: 0xdef.try_into().unwrap(), sampled: true };
    let context = TraceContext::begin(mode, &view, ids);
    let mut out = Vec::new();
    if let Some(context) = &context {
        context.write(&mut out);
        assert!(holds(&out), "written: {}", String::from_utf8_lossy(&out));
    }
    match mode {
        TraceMode::Drop => assert!(context.is_none()),
        TraceMode::Pass if good => assert_eq!(out, fields[0], "changed"),
        TraceMode::Pass => assert!(context.is_none()),
        TraceMode::Make if good => assert_eq!(out[..35], fields[0][..35], "another trace"),
        TraceMode::Make | TraceMode::Restart => {
            assert_eq!(out, *b"00-00000000000000000000000000000abc-0000000000000def-03")
        }
    }
}

/// The names that a default configuration knows.
pub fn names() -> Names {
    Names { token: "private_token".into() }
}

/// The rules for bodies.
pub fn body_rules() -> Arc<tollgate::request::body::BodyRules> {
    SETTINGS.rules.body.clone().expect("bodies are checked by default")
}
