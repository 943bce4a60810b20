//! Shows bytes of a request without its secrets: what may be one is replaced by its length, and the one token by its id as well.
//! All other bytes stand as they are, so that what is shown can be compared with what was sent. It must never show a value that
//! it does not know to be harmless because of where it stands.

use crate::request::head;
use crate::request::query::{Key, Names, form_decode};
use crate::request::token::{TokenRules, bearer, is_basic, is_token_header};
use crate::request::view::{Field, FieldKind, RequestView, split_target};
use crate::store::credential::TokenId;
use crate::telemetry::access_log::SecretWords;
use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// Shorter ones stand in other text by chance.
const FOUND_ANYWHERE: usize = 6;
/// Words in the name of a header whose value is nobody's business, beside those of the log.
const TELLING: [&[u8]; 6] = [b"auth", b"session", b"credential", b"cookie", b"key", b"signature"];

/// What must not be shown of one request.
pub(super) struct Mask<'a> {
    token: &'a TokenRules,
    names: &'a Names,
    /// `None`: they could not be made, so that everything is hidden.
    words: Option<SecretWords>,
    /// Values that stand where tokens do.
    values: Vec<Vec<u8>>,
    /// The one token.
    known: Option<(Vec<u8>, TokenId)>,
}

/// What tollgate makes anew for each request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Made {
    pub request_id: bool,
    pub trace: bool,
}

impl<'a> Mask<'a> {
    /// Of a request that may not be readable.
    pub(super) fn of(view: Option<&RequestView<'_>>, token: &'a TokenRules, names: &'a Names) -> Self {
        let mut values = Vec::new();
        for field in view.iter().flat_map(|view| &view.fields) {
            if is_token_header(field.name, token) || matches!(field.kind, FieldKind::OtherToken | FieldKind::Alias) {
                values.push(field.value.to_vec());
            }
            if field.kind == FieldKind::Authorization {
                values.push(bearer(field.value).unwrap_or(field.value).to_vec());
                values.extend(passwords(field.value));
            }
        }
        for piece in pieces(view.and_then(RequestView::query).unwrap_or_default()) {
            if let Some(at) = memchr::memchr(b'=', piece)
                && is_credential(names, &piece[..at])
            {
                let raw = piece[at + 1..].strip_suffix(b"&").or(piece[at + 1..].strip_suffix(b";"));
                let raw = raw.unwrap_or(&piece[at + 1..]);
                values.push(form_decode(raw).into_vec());
                values.push(raw.to_vec());
            }
        }
        values.retain(|value| value.len() >= FOUND_ANYWHERE);
        Self { token, names, words: SecretWords::beside(&names.token).ok(), values, known: None }
    }

    /// The one token that was presented.
    pub(super) fn knows(&mut self, token: &[u8], id: TokenId) {
        self.known = Some((token.to_vec(), id));
    }

    /// A head of HTTP/1, its empty line included. One that cannot be read is not shown.
    pub(super) fn head(&self, bytes: &[u8], made: Made) -> String {
        let Ok(view) = head::parse(bytes) else { return hidden(bytes.len()) };
        let mut out = format!("{} {} HTTP/1.1\r\n", text(view.method_bytes), self.target(view.target));
        for field in &view.fields {
            out.push_str(&text(field.name));
            out.push_str(": ");
            out.push_str(&self.value(field, made));
            out.push_str("\r\n");
        }
        out.push_str("\r\n");
        out
    }

    /// A target in origin form.
    pub(super) fn target(&self, target: &[u8]) -> String {
        let (path, query) = split_target(target);
        let mut out = self.path(path);
        if let Some(query) = query {
            out.push('?');
            pieces(query).for_each(|piece| out.push_str(&self.parameter(piece)));
        }
        out
    }

    pub(super) fn path(&self, path: &[u8]) -> String {
        let says_value = |b: &u8| matches!(b, b'=' | b':' | b';' | b'&' | b'?' | b'#' | b'%');
        let mut out = String::new();
        for (place, segment) in path.split(|b| *b == b'/').enumerate() {
            if place > 0 {
                out.push('/');
            }
            let hides = segment.iter().any(says_value) && self.may_be_secret(segment) || self.holds_known(segment);
            out.push_str(&if hides { hidden(segment.len()) } else { text(segment) });
        }
        out
    }

    /// A piece of a query, with the separator behind it.
    fn parameter(&self, piece: &[u8]) -> String {
        let (piece, separator) = match piece {
            [piece @ .., b'&'] => (piece, "&"),
            [piece @ .., b';'] => (piece, ";"),
            piece => (piece, ""),
        };
        let hides = self.may_be_secret(piece) || self.holds_known(piece);
        let shown = match memchr::memchr(b'=', piece) {
            Some(at) if hides || is_credential(self.names, &piece[..at]) => {
                let (name, value) = (&piece[..at], &piece[at + 1..]);
                let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'[' | b']');
                match name.iter().all(plain) && name.len() <= 64 && !self.holds_known(name) {
                    true => format!("{}={}", text(name), self.secret(value)),
                    false => hidden(piece.len()),
                }
            }
            None if hides => hidden(piece.len()),
            _ => text(piece),
        };
        shown + separator
    }

    fn value(&self, field: &Field<'_>, made: Made) -> String {
        match field.kind {
            FieldKind::RequestId if made.request_id => return new(field.value.len()),
            FieldKind::TraceParent if made.trace => return new(field.value.len()),
            // Written by tollgate: an id, and names of users and scopes.
            FieldKind::Identity => return text(field.value),
            FieldKind::Authorization | FieldKind::Cookie | FieldKind::OtherToken => return self.secret(field.value),
            _ if is_token_header(field.name, self.token) => return self.secret(field.value),
            _ => {}
        }
        let name = field.name.to_ascii_lowercase();
        let tells = TELLING.iter().any(|word| memchr::memmem::find(&name, word).is_some());
        match tells || self.may_be_secret(&name) || self.may_be_secret(field.value) || self.holds_known(field.value) {
            true => self.secret(field.value),
            false => text(field.value),
        }
    }

    fn secret(&self, value: &[u8]) -> String {
        match &self.known {
            Some((token, id)) if token == value => format!("<token {id}, {} bytes>", value.len()),
            _ => hidden(value.len()),
        }
    }

    fn may_be_secret(&self, text: &[u8]) -> bool {
        self.words.as_ref().is_none_or(|words| words.may_stand_in(text))
    }

    fn holds_known(&self, text: &[u8]) -> bool {
        self.values.iter().any(|value| memchr::memmem::find(text, value).is_some())
    }
}

/// What a value of Basic says, whole and behind each colon, whether or not it is in the one form that is taken.
fn passwords(value: &[u8]) -> Vec<Vec<u8>> {
    if !is_basic(value) {
        return Vec::new();
    }
    let encoded = value[5..].trim_ascii();
    let lenient = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new()
            .with_decode_padding_mode(DecodePaddingMode::Indifferent)
            .with_decode_allow_trailing_bits(true),
    );
    let mut found = vec![encoded.to_vec()];
    if let Ok(pair) = lenient.decode(encoded) {
        found.extend(memchr::memchr_iter(b':', &pair).map(|colon| pair[colon + 1..].to_vec()));
        found.push(pair);
    }
    found
}

fn is_credential(names: &Names, name: &[u8]) -> bool {
    matches!(names.key_of(name), Some((Key::Token | Key::AccessToken | Key::JobToken, _)))
}

/// Parameters, each with the separator behind it.
fn pieces(query: &[u8]) -> impl Iterator<Item = &[u8]> {
    query.split_inclusive(|b| matches!(b, b'&' | b';'))
}

fn hidden(length: usize) -> String {
    format!("<hidden, {length} bytes>")
}

fn new(length: usize) -> String {
    format!("<made for each request, {length} bytes>")
}

/// Bytes as text: what is no visible ASCII, and what would be taken for a placeholder, is written `\xNN`.
pub(super) fn text(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'<' | 0..=8 | 10..=31 | 127.. => out.push_str(&format!("\\x{byte:02x}")),
            b'\\' => out.push_str("\\\\"),
            byte => out.push(char::from(*byte)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::token::BasicUsers;
    use crate::store::credential::Digest;

    fn shown(head: &str) -> String {
        let bytes = head.replace('\n', "\r\n").into_bytes();
        let view = head::parse(&bytes).unwrap();
        let rules =
            TokenRules { header: "PRIVATE-TOKEN".into(), bearer: true, max_bytes: 255, basic: BasicUsers::Nobody };
        let names = Names { token: "private_token".into() };
        let mut mask = Mask::of(Some(&view), &rules, &names);
        mask.knows(b"good-token-1", Digest::of(b"good-token-1").id());
        mask.head(&bytes, Made { request_id: true, trace: false }).replace('\r', "")
    }

    #[test]
    fn what_may_be_a_secret_is_its_length() {
        let id = Digest::of(b"good-token-1").id();
        let said = shown(
            "GET /a;token=x/b%3Fprivate?page=1&private_token=good-token-1;x=good-token-1&q=1&%70assword=abc HTTP/1.1\nHost: h\n\
             PRIVATE-TOKEN: good-token-1\nAuthorization: Bearer other-token-2\nX-Copy: other-token-2\nX-Api-Key: k\n\
             Referer: http://x/?private_token=y\nX-Request-Id: 12345678\nX-Plain: a<b\\c\u{e9}\nCookie: a=b\n\n",
        );
        let expected = format!(
            "GET /<hidden, 9 bytes>/<hidden, 11 bytes>?page=1&private_token=<token {id}, 12 bytes>;x=<token {id}, 12 bytes>&q=1&\
             <hidden, 14 bytes> HTTP/1.1\nHost: h\nPRIVATE-TOKEN: <token {id}, 12 bytes>\nAuthorization: <hidden, 20 bytes>\n\
             X-Copy: <hidden, 13 bytes>\nX-Api-Key: <hidden, 1 bytes>\nReferer: <hidden, 25 bytes>\n\
             X-Request-Id: <made for each request, 8 bytes>\nX-Plain: a\\x3cb\\\\c\\xc3\\xa9\nCookie: <hidden, 3 bytes>\n\n"
        );
        assert_eq!(said, expected);
    }

    #[test]
    fn the_password_of_basic_is_hidden_wherever_it_stands() {
        // `me:basic-token-3`, with and without padding, and a token behind a second colon.
        let said = shown(
            "GET /p?a=basic-token-3 HTTP/1.1\nHost: h\nAuthorization: Basic bWU6YmFzaWMtdG9rZW4tMw==\nX-Copy: basic-token-3\n\
             X-Encoded: bWU6YmFzaWMtdG9rZW4tMw==\nX-Pair: me:basic-token-3\n\n",
        );
        assert!(!said.contains("basic-token-3") && !said.contains("bWU6"), "{said}");
        let said =
            shown("GET /p HTTP/1.1\nHost: h\nAuthorization: basic bWU6YTpiYXNpYy10b2tlbi0z\nX-Copy: basic-token-3\n\n");
        assert!(!said.contains("basic-token-3") && !said.contains("bWU6"), "{said}");
    }
}
