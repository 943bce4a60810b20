//! Who may ask what of the admin listener: hosts, origins, its token, and what a listener that others can reach refuses. It
//! must not know what is asked for beyond whether it changes something.

use super::{AdminResponse, text};
use crate::request::view::{FieldKind, Framing, Method, RequestView};
use crate::store::credential::Digest;
use crate::telemetry::metrics::AdminDenial;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::net::IpAddr;

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminAccess {
    Full,
    /// Others can reach it, and it has no token: it changes nothing.
    ReadOnly,
    /// Metrics and health.
    MetricsOnly,
}

/// What a listener asks of those who come over it.
#[derive(Clone, Copy)]
pub struct AdminTerms<'a> {
    pub access: AdminAccess,
    /// Host names that it accepts besides IP addresses and localhost, in lower case.
    pub hosts: &'a [String],
    /// The SHA-256 of its token, if it needs one.
    pub token: Option<&'a Digest>,
}

const BEARER: &[u8] = b"bearer ";
const BASIC: &[u8] = b"basic ";
/// Longer ones are no tokens.
const MOST_CREDENTIAL: usize = 8 * 1024;

/// `Err`: what the request gets, whatever it asks for.
pub(super) fn judge(view: &RequestView<'_>, terms: &AdminTerms<'_>) -> Result<(), (AdminDenial, AdminResponse)> {
    // DNS rebinding: a web page can make a browser send requests here under a host name that resolves to this machine.
    if !is_own_name(view.host, terms.hosts) {
        let why = "This listener accepts an IP address or localhost as Host. To use another name, add it to [admin] hosts \
                   and reload.\n";
        return Err((AdminDenial::Host, text(403, why)));
    }
    if view.fields_of(FieldKind::Origin).any(|origin| !is_own_origin(origin.value, view.host))
        || is_of_another_site(view)
    {
        let why = "This listener refuses requests of web pages from other origins. Send no Origin header, or http:// and \
                   the value of Host.\n";
        return Err((AdminDenial::Origin, text(403, why)));
    }
    let (path, reads) = (view.path(), matches!(view.method, Method::Get | Method::Head));
    if terms.access == AdminAccess::MetricsOnly {
        return match path {
            b"/metrics" | b"/healthz" | b"/readyz" if reads => Ok(()),
            b"/metrics" | b"/healthz" | b"/readyz" => {
                let answer = text(405, "Method not allowed; use GET, HEAD.\n").allowing("GET, HEAD");
                Err((AdminDenial::MetricsOnly, answer))
            }
            _ => {
                let why = "Not found. This listener has GET /metrics, /healthz and /readyz; the one of [admin] listen has the rest.\n";
                Err((AdminDenial::MetricsOnly, text(404, why)))
            }
        };
    }
    // They say one word, and probes have no token.
    let is_probe = reads && matches!(path, b"/healthz" | b"/readyz") || view.method == Method::Options && path == b"/";
    if is_probe {
        return Ok(());
    }
    if let Some(expected) = terms.token {
        match presented(view) {
            Some(token) if is_same(&Digest::of(&token), expected) => {}
            presented => {
                let why = "This listener needs its token: `Authorization: Bearer TOKEN`, or the token as the password of \
                           Basic with any user name. The commands of tollgate take --admin-token-file.\n";
                let denial = if presented.is_some() { AdminDenial::WrongToken } else { AdminDenial::NoToken };
                return Err((denial, text(401, why)));
            }
        }
    }
    if reads || view.method == Method::Options {
        return Ok(());
    }
    // What a browser sends from another page without asking first: a form always has a type, and none of these three.
    let mut types = view.fields_of(FieldKind::ContentType);
    let fits = match types.next() {
        None => view.body == Framing::Empty,
        Some(field) => is_json(field.value) && types.next().is_none(),
    };
    if !fits {
        let why = "A change is a POST without a body and without Content-Type, or with Content-Type: application/json. With curl: -X POST, \
                   not -d.\n";
        return Err((AdminDenial::ContentType, text(415, why)));
    }
    if terms.access == AdminAccess::ReadOnly {
        let why = "This listener only reads: it can be reached from other machines, and has no token. Set [admin] \
                   token_sha256, or give [admin] listen a loopback address or a Unix socket, and restart or send SIGHUP.\n";
        return Err((AdminDenial::ReadOnly, text(403, why)));
    }
    Ok(())
}

/// Whether a Content-Type is JSON, whatever its parameters.
pub(super) fn is_json(value: &[u8]) -> bool {
    let essence = value.split(|byte| *byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

/// Browsers say what made them send a request. A link that is followed to here is the user's own doing.
fn is_of_another_site(view: &RequestView<'_>) -> bool {
    let has = |name: &[u8], values: &[&[u8]]| {
        let mut fields = view.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        fields.any(|field| values.iter().any(|value| field.value.eq_ignore_ascii_case(value)))
    };
    let is_link = matches!(view.method, Method::Get | Method::Head) && has(b"sec-fetch-mode", &[b"navigate"]);
    has(b"sec-fetch-site", &[b"cross-site", b"same-site"]) && !is_link
}

/// The token of a request. `None`: it has none that can be read, or several.
fn presented(view: &RequestView<'_>) -> Option<Vec<u8>> {
    let mut fields = view.fields_of(FieldKind::Authorization);
    let (Some(field), None) = (fields.next(), fields.next()) else { return None };
    let after = |scheme: &[u8]| {
        let (start, rest) = field.value.split_at_checked(scheme.len())?;
        start.eq_ignore_ascii_case(scheme).then(|| rest.trim_ascii())
    };
    if field.value.len() > MOST_CREDENTIAL {
        return None;
    }
    if let Some(token) = after(BEARER) {
        return Some(token.to_vec());
    }
    let pair = STANDARD.decode(after(BASIC)?).ok()?;
    let colon = memchr::memchr(b':', &pair)?;
    Some(pair[colon + 1..].to_vec())
}

/// Takes the same time wherever they differ.
fn is_same(one: &Digest, other: &Digest) -> bool {
    let pairs = one.as_bytes().iter().zip(other.as_bytes());
    std::hint::black_box(pairs.fold(0, |differs, (one, other)| differs | (one ^ other))) == 0
}

/// Whether a Host is an address, localhost or one of the configured names, with any port.
fn is_own_name(host: &[u8], hosts: &[String]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let plain = name.strip_suffix('.').unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok()
        || hosts.iter().any(|own| own.eq_ignore_ascii_case(plain))
}

/// Whether an origin is this listener's own: its scheme and the request's Host.
fn is_own_origin(origin: &[u8], host: &[u8]) -> bool {
    let lower = |bytes: &[u8]| bytes.to_ascii_lowercase();
    let (origin, host) = (lower(origin), lower(host));
    let without_port = |host: &[u8]| host.strip_suffix(b":80").unwrap_or(host).to_vec();
    origin.strip_prefix(b"http://").is_some_and(|own| !own.is_empty() && without_port(own) == without_port(&host))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::head;

    #[test]
    fn only_own_names() {
        let hosts = ["tollgate.internal".to_owned(), "tollgate".to_owned()];
        for host in [
            "localhost",
            "LocalHost:9090",
            "127.0.0.1:9090",
            "[::1]:9090",
            "10.0.0.5",
            "tollgate.internal:9090",
            "TOLLGATE.internal",
            "tollgate.internal.:9090",
            "tollgate",
        ] {
            assert!(is_own_name(host.as_bytes(), &hosts), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9090",
            "127.0.0.1.evil.example",
            "",
            ".",
            ":9090",
            "internal",
            "x.tollgate.internal",
            "tollgate.internal.evil.example",
            "tollgate.internal:9090:1",
        ] {
            assert!(!is_own_name(host.as_bytes(), &hosts), "{host}");
        }
        assert!(!is_own_name(b"tollgate", &[]));
    }

    #[test]
    fn an_origin_is_scheme_and_host() {
        for (origin, host) in [
            ("http://127.0.0.1:9090", "127.0.0.1:9090"),
            ("HTTP://LOCALHOST:9090", "localhost:9090"),
            ("http://[::1]:9090", "[::1]:9090"),
            ("http://tollgate", "tollgate:80"),
        ] {
            assert!(is_own_origin(origin.as_bytes(), host.as_bytes()), "{origin} {host}");
        }
        for (origin, host) in [
            ("https://127.0.0.1:9090", "127.0.0.1:9090"),
            ("http://127.0.0.1:9091", "127.0.0.1:9090"),
            ("http://127.0.0.1", "127.0.0.1:9090"),
            ("http://localhost:9090", "127.0.0.1:9090"),
            ("http://127.0.0.1:9090/", "127.0.0.1:9090"),
            ("http://evil.example", "127.0.0.1:9090"),
            ("http://", ""),
            ("null", "127.0.0.1:9090"),
            ("", "127.0.0.1:9090"),
        ] {
            assert!(!is_own_origin(origin.as_bytes(), host.as_bytes()), "{origin} {host}");
        }
    }

    #[test]
    fn a_token_is_read_from_bearer_and_from_the_password_of_basic() {
        let read = |fields: &str| {
            let head = format!("GET / HTTP/1.1\r\nHost: h\r\n{fields}\r\n");
            presented(&head::parse(head.as_bytes()).unwrap()).map(|token| String::from_utf8(token).unwrap())
        };
        let basic = |text: &str| format!("Authorization: Basic {}\r\n", STANDARD.encode(text));
        for (fields, token) in [
            ("Authorization: Bearer abc\r\n".to_owned(), Some("abc")),
            ("authorization: bEARER  abc \r\n".into(), Some("abc")),
            (basic("anybody:abc"), Some("abc")),
            (basic(":a:c"), Some("a:c")),
            (basic("abc"), None),
            ("Authorization: Basic abc!\r\n".into(), None),
            ("Authorization: abc\r\n".into(), None),
            ("Authorization: Bearer\r\n".into(), None),
            ("Authorization: Bearer a\r\nAuthorization: Bearer a\r\n".into(), None),
            (String::new(), None),
        ] {
            assert_eq!(read(&fields).as_deref(), token, "{fields}");
        }
    }

    #[test]
    fn every_byte_of_a_digest_counts() {
        let digest = Digest::of(b"token");
        assert!(is_same(&digest, &Digest::of(b"token")));
        for index in 0..32 {
            let mut bytes = *digest.as_bytes();
            bytes[index] ^= 0x10;
            assert!(!is_same(&digest, &Digest::from_bytes(bytes)), "{index}");
        }
    }
}
