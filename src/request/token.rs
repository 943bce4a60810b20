//! Finds the single token of a request, or the reason why it has no acceptable one. Pure; performs no lookups.
//! Two different tokens are refused rather than ranked, because the backend's precedence may differ.

use super::head::trim_blanks;
use super::query::{Key, Scan, Spelling, form_decode};
use super::view::{FieldKind, RequestView};
use crate::problem::Problem;
use crate::telemetry::metrics::TokenSource;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::borrow::Cow;
use std::ops::RangeInclusive;

/// No configuration accepts longer tokens.
pub const MAX_TOKEN_BYTES: usize = 2048;

/// Where tokens are accepted, and which.
#[derive(Clone, Debug)]
pub struct TokenRules {
    /// The header's name, compared case-insensitively.
    pub header: String,
    /// Whether `Authorization: Bearer` is accepted as well.
    pub bearer: bool,
    /// Longer values are refused. GitLab's tokens have 20 to 64 bytes, those that name their cell up to about 300.
    pub max_bytes: usize,
    /// Whether a token is accepted as the password of HTTP Basic, on routes that say so.
    pub basic: BasicUsers,
}

/// The user names with which a token may be the password of HTTP Basic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BasicUsers {
    /// It may not.
    Nobody,
    /// Any name. The backend gets the token's user in its place: it must not act for a name that nobody has checked.
    Any,
    /// The token's own user.
    Own,
    /// These, which go on as they are.
    Listed(Vec<String>),
}

impl BasicUsers {
    fn accept(&self, user: String) -> Result<BasicUser, TokenFault> {
        match self {
            Self::Any => Ok(BasicUser::Replaced),
            Self::Own => Ok(BasicUser::Claimed(user.into())),
            Self::Listed(names) if names.contains(&user) => Ok(BasicUser::Listed(user.into())),
            Self::Listed(_) | Self::Nobody => Err(TokenFault::BasicUser),
        }
    }
}

impl TokenRules {
    const LENGTHS: RangeInclusive<usize> = 1..=MAX_TOKEN_BYTES;

    /// Keys of `[token]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if !Self::LENGTHS.contains(&self.max_bytes) {
            let instead = format!("use a number from 1 to {MAX_TOKEN_BYTES}");
            problems.push(Problem::error("max_bytes", "is out of range", instead));
        }
        if let BasicUsers::Listed(names) = &self.basic {
            let bad = names.iter().position(|name| !is_basic_user(name));
            if names.is_empty() {
                let instead = "write the names, or \"none\"";
                problems.push(Problem::error("basic", "is an empty list: no name would be accepted", instead));
            }
            if let Some(index) = bad {
                let what = "has an entry that is empty, or has a colon or a control character";
                problems.push(Problem::error("basic", what, "write it like \"oauth2\"").element(index));
            }
        }
        problems
    }
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
    /// Credentials of HTTP Basic that are not strict base64 of one user name, a colon and a password.
    Basic,
    /// A user name of HTTP Basic that is not accepted.
    BasicUser,
}

/// A well-formed token, not yet validated.
pub struct Presented<'a> {
    pub value: Cow<'a, [u8]>,
    /// Never [`TokenSource::None`].
    pub source: TokenSource,
    /// The query contains it, where it may leak into logs, perhaps beside another place.
    pub in_query: bool,
    /// It came as the password of HTTP Basic, perhaps beside another place, and goes on as one.
    pub basic: Option<BasicUser>,
}

/// The user name of a token that came as the password of HTTP Basic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BasicUser {
    /// Whatever the client sent, the backend gets the token's user.
    Replaced,
    /// What the client sent, which has to be the token's user.
    Claimed(Box<str>),
    /// What the client sent, which is one of those in the configuration.
    Listed(Box<str>),
}

impl BasicUser {
    /// The name that the backend gets with the token of this user. `None`: the client claimed another one, or HTTP Basic cannot
    /// carry it.
    pub fn upstream<'a>(&'a self, user: &'a str) -> Option<&'a str> {
        match self {
            Self::Listed(sent) => Some(sent),
            Self::Claimed(sent) if **sent != *user => None,
            Self::Claimed(_) | Self::Replaced => Some(user).filter(|user| is_basic_user(user)),
        }
    }

    /// The credentials as they are written for the backend.
    pub fn credentials(user: &str, token: &[u8]) -> String {
        STANDARD.encode([user.as_bytes(), b":", token].concat())
    }
}

/// A credential of another kind than the token's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherKind {
    /// JOB-TOKEN, and `job_token` in the query.
    Job,
    /// DEPLOY-TOKEN.
    Deploy,
}

impl OtherKind {
    pub fn is_header(self, name: &[u8]) -> bool {
        name.eq_ignore_ascii_case(match self {
            Self::Job => b"job-token",
            Self::Deploy => b"deploy-token",
        })
    }
}

impl std::fmt::Debug for Presented<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Presented(from {:?})", self.source)
    }
}

/// What the password of HTTP Basic can be on a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TakesBasic {
    /// A token.
    pub token: bool,
    /// With GitLab's own user name for it: a job's token, which the backend checks.
    pub job: bool,
}

/// The user name with which GitLab takes a password for a job's token. CI jobs clone with it.
const JOB_USER: &str = "gitlab-ci-token";

/// `None`: the request has no token.
pub fn find<'a>(
    view: &RequestView<'a>,
    scan: &Scan<'a>,
    rules: &TokenRules,
    takes: TakesBasic,
) -> Result<Option<Presented<'a>>, TokenFault> {
    let mut found = Finder { presented: None };
    for field in &view.fields {
        match field.kind {
            FieldKind::Authorization => match bearer(field.value) {
                Some(token) if rules.bearer => found.add(Cow::Borrowed(token), TokenSource::Bearer)?,
                None if takes.token && is_basic(field.value) => {
                    let (user, token) = basic(field.value)?;
                    if !(takes.job && user == JOB_USER) {
                        found.add_basic(rules.basic.accept(user)?, token)?;
                    }
                }
                _ => {}
            },
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
        Some(presented) => well_formed(&presented.value, rules.max_bytes).map(|()| Some(presented)),
        None => Ok(None),
    }
}

/// The one credential of another kind, out of those that are allowed: two different ones are refused as two tokens are. `None`:
/// there is none. Asked after [`find`], which has refused all that is no token in `Authorization`.
pub fn other(
    view: &RequestView<'_>,
    scan: &Scan<'_>,
    allowed: &[OtherKind],
    takes: TakesBasic,
    longest: usize,
) -> Result<Option<OtherKind>, TokenFault> {
    let mut found: Option<(OtherKind, Vec<u8>)> = None;
    let mut add = |kind: OtherKind, value: &[u8]| match &found {
        Some((known, same)) if *known == kind && same == value => Ok(()),
        Some(_) => Err(TokenFault::Conflict),
        None => {
            well_formed(value, longest)?;
            found = Some((kind, value.to_vec()));
            Ok(())
        }
    };
    for field in view.fields_of(FieldKind::OtherToken) {
        if let Some(kind) = allowed.iter().find(|kind| kind.is_header(field.name)) {
            add(*kind, field.value)?;
        }
    }
    for field in view.fields_of(FieldKind::Authorization).filter(|field| takes.job && is_basic(field.value)) {
        let (user, token) = basic(field.value)?;
        if user == JOB_USER {
            add(OtherKind::Job, &token)?;
        }
    }
    for param in scan.params.iter().filter(|param| param.key == Key::JobToken && allowed.contains(&OtherKind::Job)) {
        if param.spelling != Spelling::Plain || param.begins_at_semicolon || param.ends_at_semicolon {
            return Err(TokenFault::Spelling);
        }
        add(OtherKind::Job, &form_decode(param.value.unwrap_or_default()))?;
    }
    Ok(found.map(|(kind, _)| kind))
}

/// Where a request carries tokens, well-formed or not, and whether the query is one of these places.
pub fn sources(view: &RequestView<'_>, scan: &Scan<'_>, rules: &TokenRules, takes_basic: bool) -> (TokenSource, bool) {
    let header = view.fields.iter().any(|f| f.kind != FieldKind::Alias && is_token_header(f.name, rules));
    let bearer = rules.bearer && view.fields_of(FieldKind::Authorization).any(|field| bearer(field.value).is_some());
    let basic = takes_basic && view.fields_of(FieldKind::Authorization).any(|field| is_basic(field.value));
    let query = scan.params.iter().any(|param| param.key == Key::Token);
    let source = match (header, bearer, basic, query) {
        (false, false, false, false) => TokenSource::None,
        (true, false, false, false) => TokenSource::Header,
        (false, true, false, false) => TokenSource::Bearer,
        (false, false, true, false) => TokenSource::Basic,
        (false, false, false, true) => TokenSource::Query,
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

/// Whether the scheme is `Basic`, whatever follows.
pub fn is_basic(value: &[u8]) -> bool {
    let scheme = value.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic"));
    scheme && matches!(value.get(5), None | Some(b' ' | b'\t'))
}

/// User name and password behind the scheme `Basic`: one blank, then base64 in its one strict form, with padding and without
/// anything else. The name ends at the first colon.
fn basic(value: &[u8]) -> Result<(String, Vec<u8>), TokenFault> {
    let encoded = value.get(5..).and_then(|rest| rest.strip_prefix(b" ")).ok_or(TokenFault::Basic)?;
    let mut pair = STANDARD.decode(encoded).map_err(|_| TokenFault::Basic)?;
    let colon = memchr::memchr(b':', &pair).ok_or(TokenFault::Basic)?;
    let token = pair.split_off(colon + 1);
    pair.truncate(colon);
    let user = String::from_utf8(pair).map_err(|_| TokenFault::Basic)?;
    if user.chars().any(char::is_control) {
        return Err(TokenFault::Basic);
    }
    Ok((user, token))
}

/// Whether HTTP Basic carries this name in a way that all read alike.
fn is_basic_user(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c == ':' || c.is_control())
}

fn well_formed(token: &[u8], longest: usize) -> Result<(), TokenFault> {
    match token {
        [] => Err(TokenFault::Empty),
        _ if token.len() > longest => Err(TokenFault::TooLong),
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
            None => self.presented = Some(Presented { value, source, in_query, basic: None }),
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

    fn add_basic(&mut self, user: BasicUser, token: Vec<u8>) -> Result<(), TokenFault> {
        self.add(Cow::Owned(token), TokenSource::Basic)?;
        match self.presented.as_mut().map(|presented| &mut presented.basic) {
            // The backend gets one name.
            Some(Some(known)) if *known != user => Err(TokenFault::Conflict),
            Some(basic) => {
                *basic = Some(user);
                Ok(())
            }
            None => Ok(()),
        }
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
        let found = find(&view, &scan, &rules(BasicUsers::Nobody), TakesBasic::default())?;
        Ok(found.map(|p| (String::from_utf8_lossy(&p.value).into_owned(), p.source)))
    }

    fn rules(basic: BasicUsers) -> TokenRules {
        TokenRules { header: "PRIVATE-TOKEN".into(), bearer: true, max_bytes: 255, basic }
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

    /// The same on a route that takes Basic, and the name for the backend if the token is alice's.
    fn found_basic(users: BasicUsers, lines: &str) -> Result<(String, TokenSource, Option<String>), TokenFault> {
        let bytes = format!("GET /p HTTP/1.1\r\nHost: h\r\n{lines}\r\n").into_bytes();
        let view = head::parse(&bytes).unwrap();
        let found = find(&view, &Scan::default(), &rules(users), TakesBasic { token: true, job: false })?.unwrap();
        let name = found.basic.and_then(|basic| basic.upstream("alice").map(str::to_owned));
        Ok((String::from_utf8_lossy(&found.value).into_owned(), found.source, name))
    }

    fn line(pair: &str) -> String {
        format!("Authorization: Basic {}\r\n", STANDARD.encode(pair))
    }

    #[test]
    fn a_token_is_the_password_of_basic() {
        use BasicUsers::*;
        let listed = || Listed(vec!["oauth2".into(), "__token__".into()]);
        for (users, pair, name) in [
            (Any, "whoever:A-1", "alice"),
            (Any, ":A-1", "alice"),
            (Own, "alice:A-1", "alice"),
            (listed(), "oauth2:A-1", "oauth2"),
            (listed(), "__token__:A-1", "__token__"),
        ] {
            assert_eq!(
                found_basic(users, &line(pair)),
                Ok(("A-1".into(), TokenSource::Basic, Some(name.into()))),
                "{pair}"
            );
        }
        // The scheme's case does not matter; a token may have colons.
        assert_eq!(found_basic(Any, "authorization: bAsIc eDpB\r\n").unwrap().0, "A");
        assert_eq!(found_basic(Any, &line("x:A:B")).unwrap().0, "A:B");
        // Beside the same token elsewhere it is one, and goes on as Basic.
        let both = format!("PRIVATE-TOKEN: A-1\r\n{}", line("x:A-1"));
        assert_eq!(found_basic(Any, &both), Ok(("A-1".into(), TokenSource::Several, Some("alice".into()))));
        // Whoever claims to be somebody else gets no name.
        assert_eq!(found_basic(Own, &line("bob:A-1")).unwrap().2, None);
        assert_eq!(found_basic(Own, &line("Alice:A-1")).unwrap().2, None);
        assert_eq!(BasicUser::Replaced.upstream("a:b"), None);
        assert_eq!(BasicUser::Replaced.upstream(""), None);
        assert_eq!(BasicUser::credentials("alice", b"A-1"), "YWxpY2U6QS0x");
    }

    #[test]
    fn basic_has_one_strict_form() {
        use BasicUsers::*;
        for (value, fault) in [
            // `x:A-1` and `x:AB`; other padding, trailing bits, alphabets, blanks.
            ("Basic eDpBLTE=", Ok(())),
            ("Basic eDpBLTE", Err(TokenFault::Basic)),
            ("Basic eDpBQg", Err(TokenFault::Basic)),
            ("Basic eDpBQg==", Ok(())),
            ("Basic eDpBQg=", Err(TokenFault::Basic)),
            ("Basic eDpBQg===", Err(TokenFault::Basic)),
            ("Basic eDpBQh==", Err(TokenFault::Basic)),
            ("Basic eDo_Pz8_", Err(TokenFault::Basic)),
            ("Basic  eDpBQg==", Err(TokenFault::Basic)),
            ("Basic\teDpBQg==", Err(TokenFault::Basic)),
            ("Basic eDpB Qg==", Err(TokenFault::Basic)),
            ("Basic eDpBQg==, Basic eDpBQg==", Err(TokenFault::Basic)),
            ("Basic", Err(TokenFault::Basic)),
            // Without a colon, with control bytes, without a password, not UTF-8.
            ("Basic QUFB", Err(TokenFault::Basic)),
            ("Basic AHg6QQ==", Err(TokenFault::Basic)),
            ("Basic eH86QQ==", Err(TokenFault::Basic)),
            ("Basic eDo=", Err(TokenFault::Empty)),
            ("Basic eDpBAA==", Err(TokenFault::BadByte)),
            ("Basic eDpBCg==", Err(TokenFault::BadByte)),
            ("Basic /zpB", Err(TokenFault::Basic)),
        ] {
            let found = found_basic(Any, &format!("Authorization: {value}\r\n")).map(|_| ());
            assert_eq!(found, fault, "{value}");
        }
        let listed = || Listed(vec!["oauth2".into()]);
        for (users, lines, fault) in [
            (listed(), line("root:A-1"), TokenFault::BasicUser),
            (listed(), line("OAuth2:A-1"), TokenFault::BasicUser),
            (Any, line("x:A") + "PRIVATE-TOKEN: B\r\n", TokenFault::Conflict),
            (Any, line("x:A") + "Authorization: Bearer B\r\n", TokenFault::Conflict),
            (Any, line("x:A") + &line("x:B"), TokenFault::Conflict),
            (Any, line("x:") + "PRIVATE-TOKEN: B\r\n", TokenFault::Conflict),
            (Own, line("x:A") + &line("y:A"), TokenFault::Conflict),
            (Any, line(&format!("x:{}", "a".repeat(256))), TokenFault::TooLong),
        ] {
            assert_eq!(found_basic(users, &lines), Err(fault), "{lines}");
        }
    }

    #[test]
    fn one_credential_of_another_kind() {
        let of = |query: &str, lines: &str, allowed: &[OtherKind]| {
            let bytes = format!("GET /p?{query} HTTP/1.1\r\nHost: h\r\n{lines}\r\n").into_bytes();
            let view = head::parse(&bytes).unwrap();
            let names = query::Names { token: "private_token".into() };
            other(
                &view,
                &query::scan(view.query().unwrap(), &names),
                allowed,
                TakesBasic { token: true, job: true },
                255,
            )
        };
        let (job, both) = (&[OtherKind::Job][..], &[OtherKind::Job, OtherKind::Deploy][..]);
        for (query, lines, allowed, found) in [
            ("", "", both, Ok(None)),
            ("", "JOB-TOKEN: j\r\n", job, Ok(Some(OtherKind::Job))),
            ("job_token=j", "job-token: j\r\n", job, Ok(Some(OtherKind::Job))),
            ("", "Deploy-Token: d\r\n", both, Ok(Some(OtherKind::Deploy))),
            ("", "Deploy-Token: d\r\n", job, Ok(None)),
            ("", "Job_Token: j\r\n", both, Ok(None)),
            ("", "JOB-TOKEN: j\r\nJOB-TOKEN: k\r\n", job, Err(TokenFault::Conflict)),
            ("job_token=k", "JOB-TOKEN: j\r\n", job, Err(TokenFault::Conflict)),
            ("", "JOB-TOKEN: j\r\nDeploy-Token: j\r\n", both, Err(TokenFault::Conflict)),
            ("", "JOB-TOKEN:\r\n", job, Err(TokenFault::Empty)),
            // `gitlab-ci-token:j`, `x:j`.
            ("", "Authorization: Basic Z2l0bGFiLWNpLXRva2VuOmo=\r\n", job, Ok(Some(OtherKind::Job))),
            ("job_token=j", "Authorization: Basic Z2l0bGFiLWNpLXRva2VuOmo=\r\n", job, Ok(Some(OtherKind::Job))),
            ("job_token=k", "Authorization: Basic Z2l0bGFiLWNpLXRva2VuOmo=\r\n", job, Err(TokenFault::Conflict)),
            ("", "Authorization: Basic eDpq\r\n", job, Ok(None)),
            ("", "Authorization: Bearer j\r\n", job, Ok(None)),
            ("job_token[]=j", "", job, Err(TokenFault::Spelling)),
            ("job%5Ftoken=j", "", job, Err(TokenFault::Spelling)),
            ("job_token=a+b", "", job, Err(TokenFault::BadByte)),
        ] {
            assert_eq!(of(query, lines, allowed), found, "{query} {lines}");
        }
    }

    #[test]
    fn where_tokens_stand_whatever_they_are() {
        use TokenSource as S;
        for (query, lines, source, in_query) in [
            ("", "", S::None, false),
            ("", "PRIVATE-TOKEN: \r\n", S::Header, false),
            ("", "Authorization: Bearer a b\r\n", S::Bearer, false),
            ("", "Authorization: Basic ?\r\n", S::Basic, false),
            ("", "Authorization: Digest a\r\nPRIVATE_TOKEN: a\r\n", S::None, false),
            ("private_token", "", S::Query, true),
            ("private_token=a", "PRIVATE-TOKEN: a\r\n", S::Several, true),
            ("", "PRIVATE-TOKEN: a\r\nAuthorization: Bearer a\r\n", S::Several, false),
            ("", "Authorization: Bearer a\r\nAuthorization: Basic a\r\n", S::Several, false),
        ] {
            let bytes = format!("GET /p?{query} HTTP/1.1\r\nHost: h\r\n{lines}\r\n").into_bytes();
            let view = head::parse(&bytes).unwrap();
            let scan = query::scan(view.query().unwrap(), &query::Names { token: "private_token".into() });
            let of = |takes_basic| sources(&view, &scan, &rules(BasicUsers::Any), takes_basic);
            assert_eq!(of(true), (source, in_query), "{query} {lines}");
            let without_basic = if source == S::Basic { S::None } else { source };
            if !lines.contains("Bearer a\r\nAuthorization") {
                assert_eq!(of(false), (without_basic, in_query), "{query} {lines}");
            }
        }
    }
}
