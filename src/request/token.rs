//! Finds the single token of a request, or the reason why it has no acceptable one. Pure; performs no lookups.
//! Two different tokens are refused rather than ranked, because the backend's precedence may differ.

use super::head::trim_blanks;
use super::query::{Key, Scan, Spelling, form_decode};
use super::view::{FieldKind, RequestView};
use crate::telemetry::metrics::TokenSource;
use std::borrow::Cow;

/// Longer values are refused. GitLab's tokens have 20 to 64 bytes.
pub const MAX_TOKEN_BYTES: usize = 255;

/// Where tokens are accepted.
#[derive(Clone, Debug)]
pub struct TokenRules {
    /// The header's name, compared case-insensitively.
    pub header: String,
    /// Whether `Authorization: Bearer` is accepted as well.
    pub bearer: bool,
}

/// Why a presented token is not acceptable. All of these give the client the same response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenFault {
    Empty,
    TooLong,
    /// A byte outside visible ASCII.
    BadByte,
    /// Two different tokens.
    Conflict,
    /// A query parameter name that only some parsers read as the token's.
    Spelling,
}

/// A well-formed token, not yet validated.
pub struct Presented<'a> {
    pub value: Cow<'a, [u8]>,
    /// Never [`TokenSource::None`].
    pub source: TokenSource,
    /// The query contains it, where it may leak into logs, perhaps beside another place.
    pub in_query: bool,
}

impl std::fmt::Debug for Presented<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Presented(from {:?})", self.source)
    }
}

/// `None`: the request has no token.
pub fn find<'a>(
    view: &RequestView<'a>,
    scan: &Scan<'a>,
    rules: &TokenRules,
) -> Result<Option<Presented<'a>>, TokenFault> {
    let mut found = Finder { presented: None };
    for field in &view.fields {
        match field.kind {
            FieldKind::Authorization if rules.bearer => {
                if let Some(token) = bearer(field.value) {
                    found.add(Cow::Borrowed(token), TokenSource::Bearer)?;
                }
            }
            FieldKind::Alias => {}
            _ if is_token_header(field.name, rules) => found.add(Cow::Borrowed(field.value), TokenSource::Header)?,
            _ => {}
        }
    }
    for param in scan.params.iter().filter(|param| param.key == Key::Token) {
        if param.spelling != Spelling::Plain || param.begins_at_semicolon || param.ends_at_semicolon {
            return Err(TokenFault::Spelling);
        }
        let raw = param.value.unwrap_or_default();
        let decoded = match memchr::memchr2(b'%', b'+', raw) {
            Some(_) => Cow::Owned(form_decode(raw).into_vec()),
            None => Cow::Borrowed(raw),
        };
        found.add(decoded, TokenSource::Query)?;
    }
    match found.presented {
        Some(presented) => well_formed(&presented.value).map(|()| Some(presented)),
        None => Ok(None),
    }
}

/// Where a request carries tokens, well-formed or not, and whether the query is one of these places.
pub fn sources(view: &RequestView<'_>, scan: &Scan<'_>, rules: &TokenRules) -> (TokenSource, bool) {
    let header = view.fields.iter().any(|f| f.kind != FieldKind::Alias && is_token_header(f.name, rules));
    let bearer = rules.bearer && view.fields_of(FieldKind::Authorization).any(|field| bearer(field.value).is_some());
    let query = scan.params.iter().any(|param| param.key == Key::Token);
    let source = match (header, bearer, query) {
        (false, false, false) => TokenSource::None,
        (true, false, false) => TokenSource::Header,
        (false, true, false) => TokenSource::Bearer,
        (false, false, true) => TokenSource::Query,
        _ => TokenSource::Several,
    };
    (source, query)
}

/// Whether a field name is the token header's.
pub fn is_token_header(name: &[u8], rules: &TokenRules) -> bool {
    name.eq_ignore_ascii_case(rules.header.as_bytes())
}

/// The credentials after the scheme `Bearer`; `None` for another scheme.
pub fn bearer(value: &[u8]) -> Option<&[u8]> {
    let scheme = value.get(..6).filter(|scheme| scheme.eq_ignore_ascii_case(b"bearer"))?;
    match &value[scheme.len()..] {
        [] => Some(b""),
        rest @ [b' ' | b'\t', ..] => Some(trim_blanks(rest)),
        _ => None,
    }
}

fn well_formed(token: &[u8]) -> Result<(), TokenFault> {
    match token {
        [] => Err(TokenFault::Empty),
        _ if token.len() > MAX_TOKEN_BYTES => Err(TokenFault::TooLong),
        _ if !token.iter().all(u8::is_ascii_graphic) => Err(TokenFault::BadByte),
        _ => Ok(()),
    }
}

struct Finder<'a> {
    presented: Option<Presented<'a>>,
}

impl<'a> Finder<'a> {
    fn add(&mut self, value: Cow<'a, [u8]>, source: TokenSource) -> Result<(), TokenFault> {
        let in_query = source == TokenSource::Query;
        match &mut self.presented {
            None => self.presented = Some(Presented { value, source, in_query }),
            Some(known) if known.value == value => {
                known.in_query |= in_query;
                if known.source != source {
                    known.source = TokenSource::Several;
                }
            }
            Some(_) => return Err(TokenFault::Conflict),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{head, query};
    use super::*;

    /// The token and its source, for a query and header lines.
    fn found(query: &str, lines: &str) -> Result<Option<(String, TokenSource)>, TokenFault> {
        let bytes = format!("GET /p?{query} HTTP/1.1\r\nHost: h\r\n{lines}\r\n").into_bytes();
        let view = head::parse(&bytes).unwrap();
        let names = query::Names { token: "private_token".into() };
        let scan = query::scan(view.query().unwrap(), &names);
        let rules = TokenRules { header: "PRIVATE-TOKEN".into(), bearer: true };
        let found = find(&view, &scan, &rules)?;
        Ok(found.map(|p| (String::from_utf8_lossy(&p.value).into_owned(), p.source)))
    }

    fn token(source: TokenSource) -> Result<Option<(String, TokenSource)>, TokenFault> {
        Ok(Some(("A-1".into(), source)))
    }

    #[test]
    fn one_token_anywhere() {
        assert_eq!(found("", ""), Ok(None));
        assert_eq!(found("", "PRIVATE-TOKEN: A-1\r\n"), token(TokenSource::Header));
        assert_eq!(found("", "private-Token:\tA-1 \r\n"), token(TokenSource::Header));
        assert_eq!(found("", "Authorization: bearer  A-1\r\n"), token(TokenSource::Bearer));
        assert_eq!(found("private_token=A%2D1", ""), token(TokenSource::Query));
        assert_eq!(
            found("private_token=A-1", "PRIVATE-TOKEN: A-1\r\nAuthorization: Bearer A-1\r\n"),
            token(TokenSource::Several)
        );
        assert_eq!(found("private_token=A-1&private_token=A-1", ""), token(TokenSource::Query));
        assert_eq!(
            found("", "Authorization: Basic eDp5\r\nCookie: private_token=A\r\nX-PRIVATE-TOKEN: A\r\n"),
            Ok(None)
        );
        assert_eq!(found("", "PRIVATE_TOKEN: A\r\nPrivate.Token: A\r\n"), Ok(None));
        assert_eq!(found("PRIVATE_TOKEN=A&private-token=A", ""), Ok(None));
    }

    #[test]
    fn what_is_no_token() {
        use TokenFault::*;
        for (query, lines, fault) in [
            ("", "PRIVATE-TOKEN:\r\n", Empty),
            ("private_token=", "", Empty),
            ("private_token", "", Empty),
            ("", "Authorization: Bearer\r\n", Empty),
            ("private_token=a+b", "", BadByte),
            ("private_token=%00", "", BadByte),
            ("", "PRIVATE-TOKEN: a b\r\n", BadByte),
            ("", "PRIVATE-TOKEN: \u{e9}\r\n", BadByte),
            ("private_token=A", "PRIVATE-TOKEN: B\r\n", Conflict),
            ("private_token=", "PRIVATE-TOKEN: A\r\n", Conflict),
            ("private_token", "PRIVATE-TOKEN: A\r\n", Conflict),
            ("private_token=A", "PRIVATE-TOKEN:\r\n", Conflict),
            ("", "PRIVATE-TOKEN: A\r\nprivate-token: B\r\n", Conflict),
            ("private_token=A&private_token=B", "", Conflict),
            ("", "PRIVATE-TOKEN: A\r\nAuthorization: Bearer B\r\n", Conflict),
            ("private_token=a", "PRIVATE-TOKEN: A\r\n", Conflict),
            ("private%5Ftoken=A", "", Spelling),
            ("[private_token]=A", "PRIVATE-TOKEN: A\r\n", Spelling),
            ("private_token[]=A", "", Spelling),
            ("x=1;private_token=A", "", Spelling),
            ("private_token=A;x", "", Spelling),
        ] {
            assert_eq!(found(query, lines), Err(fault), "{query} {lines}");
        }
        assert_eq!(found("", &format!("PRIVATE-TOKEN: {}\r\n", "a".repeat(256))), Err(TooLong));
        assert!(found("", &format!("PRIVATE-TOKEN: {}\r\n", "a".repeat(255))).is_ok());
    }
}
