//! The hygiene of any backend's answer, interim ones included: which fields end here, and which URLs lose credentials.
//! Pure. A token of the request must never leave in a field of an answer that tollgate looks at.

use super::UpstreamFault;
use super::limit_fields::LimitFields;
use crate::problem::Problem;
use crate::request::head::content_length;
use crate::request::query::{Key, Names};
use crate::request::route::{HeaderEdits, Route};
use crate::request::seeded::{self, Rule};
use crate::request::target::escape;
use smallvec::SmallVec;
use std::ops::Range;

/// Interim responses to one request. A backend that sends more never answers.
const MAX_INTERIM_ANSWERS: usize = 64;

/// The head of a backend's response, independent of the lane that read it.
pub trait AnswerView {
    fn status(&self) -> u16;

    /// HTTP/1.1, which brought chunks; false for the versions before it.
    fn knows_chunks(&self) -> bool;

    /// The fields that anything depends on: what each one is, its name as it came, and its value.
    fn known_fields(&self) -> impl Iterator<Item = (AnswerName, &[u8], &[u8])>;
}

/// What a field of an answer is, as far as anything depends on it. Told once for each field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerName {
    Other,
    Connection,
    ContentLength,
    TransferEncoding,
    Upgrade,
    Date,
    RequestId,
    Deprecation,
    /// `RateLimit` or `RateLimit-Policy`.
    LimitFields,
    StrictTransportSecurity,
    /// It holds URLs.
    Urls(UrlField),
    /// It is for a server behind the gateway, or for one hop only: it ends here.
    EndsHere,
}

impl AnswerName {
    /// Tells it from a name in any letter case. The first letter and the length leave few names to compare with.
    pub fn of(name: &[u8]) -> Self {
        // The names are short: byte by byte is quicker than what is made for long text.
        let is = |known: &str| name.iter().zip(known.as_bytes()).all(|(a, b)| a.to_ascii_lowercase() == *b);
        let Some(first) = name.first() else { return Self::Other };
        let known = match (first.to_ascii_lowercase(), name.len()) {
            (b'c', 10) => ("connection", Self::Connection),
            (b'c', 14) => ("content-length", Self::ContentLength),
            (b'c', 16) => ("content-location", Self::Urls(UrlField::ContentLocation)),
            (b'd', 4) => ("date", Self::Date),
            (b'd', 11) => ("deprecation", Self::Deprecation),
            (b'k', 10) => ("keep-alive", Self::EndsHere),
            (b'l', 4) => ("link", Self::Urls(UrlField::Link)),
            (b'l', 8) => ("location", Self::Urls(UrlField::Location)),
            (b'p', 16) => ("proxy-connection", Self::EndsHere),
            (b'r', 9) => ("ratelimit", Self::LimitFields),
            (b'r', 16) => ("ratelimit-policy", Self::LimitFields),
            (b'r', 7) => ("refresh", Self::Urls(UrlField::Refresh)),
            (b's', 25) => ("strict-transport-security", Self::StrictTransportSecurity),
            (b't', 2) => ("te", Self::EndsHere),
            (b't', 7) => ("trailer", Self::EndsHere),
            (b't', 17) => ("transfer-encoding", Self::TransferEncoding),
            (b'u', 7) => ("upgrade", Self::Upgrade),
            (b'x', 12) => ("x-request-id", Self::RequestId),
            // These make a front server act (send a file, fetch a blob); a client must neither see nor trigger them.
            (b'g', 16..) if name[..16].eq_ignore_ascii_case(b"gitlab-workhorse") => return Self::EndsHere,
            (b'x', 10) => ("x-sendfile", Self::EndsHere),
            (b'x', 13) => ("x-reproxy-url", Self::EndsHere),
            (b'x', 14) => ("x-reproxy-file", Self::EndsHere),
            (b'x', 16) => ("x-accel-redirect", Self::EndsHere),
            (b'x', 20) if is("x-lighttpd-send-file") => return Self::EndsHere,
            (b'x', 20) => ("x-litespeed-location", Self::EndsHere),
            (b'x', 24) => ("x-lighttpd-send-tempfile", Self::EndsHere),
            _ => return Self::Other,
        };
        if is(known.0) { known.1 } else { Self::Other }
    }
}

/// Whether a response can be forwarded: its framing must be unambiguous, it must not switch protocols unless the client asked
/// for it, and `interim`, the number of interim responses before it, is bounded.
pub fn judge(view: &impl AnswerView, asked_to_switch: bool, interim: usize) -> Result<AnswerKind, UpstreamFault> {
    let (mut lengths, mut codings, mut in_doubt) = (0, 0, false);
    for (name, _, value) in view.known_fields() {
        match name {
            AnswerName::ContentLength => {
                lengths += 1;
                in_doubt |= content_length(value).is_err();
            }
            AnswerName::TransferEncoding => {
                codings += 1;
                in_doubt |= !value.eq_ignore_ascii_case(b"chunked");
            }
            _ => {}
        }
    }
    // Who sends chunks under a version that does not know them may mean something else.
    let kind = AnswerKind::of(view.status());
    // An interim answer has no body, and both fields end here.
    let both = lengths > 0 && codings > 0 && kind != AnswerKind::Interim;
    let in_doubt = in_doubt || lengths > 1 || codings > 1 || both || (codings > 0 && !view.knows_chunks());
    let unasked = kind == AnswerKind::Switching && !asked_to_switch;
    let too_many = kind == AnswerKind::Interim && interim >= MAX_INTERIM_ANSWERS;
    if in_doubt || unasked || too_many { Err(UpstreamFault::Malformed) } else { Ok(kind) }
}

/// A change of an answer's head.
#[derive(Debug, PartialEq, Eq)]
pub enum AnswerEdit<'v> {
    /// All fields of the name, in any letter case.
    Remove(&'v [u8]),
    /// All fields of the name get other values.
    Replace(&'v str, Vec<Vec<u8>>),
}

/// What must change in an answer before a client gets it: fields that end here, fields that servers behind the gateway say to
/// each other, credentials in URLs, and what the route says. Looks at every field once: most answers need no change.
pub fn edits<'v>(
    view: &'v impl AnswerView,
    kind: AnswerKind,
    credentials: &Credentials<'_>,
    own: &'v HeaderEdits,
) -> SmallVec<[AnswerEdit<'v>; 4]> {
    let mut edits: SmallVec<[AnswerEdit<'v>; 4]> = SmallVec::new();
    edits.extend(own.remove.iter().map(|name| AnswerEdit::Remove(name.as_bytes())));
    // An interim answer is only a message about the final one.
    let set = own.set.iter().filter(|_| kind != AnswerKind::Interim);
    edits.extend(set.map(|(name, value)| AnswerEdit::Replace(name, vec![value.clone().into_bytes()])));
    let mut urls: SmallVec<[UrlField; 4]> = SmallVec::new();
    let interim = kind == AnswerKind::Interim;
    for (known, name, value) in view.known_fields() {
        match known {
            AnswerName::Urls(field) if urls.contains(&field) => {}
            AnswerName::Urls(field) => urls.push(field),
            AnswerName::EndsHere => edits.push(AnswerEdit::Remove(name)),
            AnswerName::Upgrade if kind != AnswerKind::Switching => edits.push(AnswerEdit::Remove(name)),
            AnswerName::ContentLength | AnswerName::TransferEncoding if interim => {
                edits.push(AnswerEdit::Remove(name));
            }
            AnswerName::Connection if kind != AnswerKind::Switching => {
                let options = value.split(|b| *b == b',').map(<[u8]>::trim_ascii);
                edits.extend(options.filter(|name| may_nominate(name)).map(AnswerEdit::Remove));
                // The lane writes its own.
                edits.push(AnswerEdit::Remove(name));
            }
            _ => {}
        }
    }
    for field in urls {
        let name = field.name();
        let values =
            || view.known_fields().filter(|(known, ..)| *known == AnswerName::Urls(field)).map(|(.., value)| value);
        let cleaned: SmallVec<[Option<Vec<u8>>; 2]> =
            values().map(|value| without_credentials(value, field, credentials)).collect();
        if cleaned.iter().any(Option::is_some) {
            let values = values().zip(cleaned).map(|(value, clean)| clean.unwrap_or_else(|| value.to_vec()));
            edits.push(AnswerEdit::Replace(name, values.collect()));
        }
    }
    edits
}

/// Whether a route may write or take out a field of an answer. `Err`: why not.
fn may_edit(name: &str) -> Result<(), &'static str> {
    let lower = name.to_ascii_lowercase();
    match AnswerName::of(name.as_bytes()) {
        AnswerName::Other if ["content-encoding", "content-range", "content-type"].contains(&lower.as_str()) => {
            Err("says how the body is to be read")
        }
        AnswerName::Other if lower == "set-cookie" => Err("is the backend's to say"),
        AnswerName::Other if lower.starts_with("x-tollgate-") || lower.starts_with("proxy-") => {
            Err("is written by servers")
        }
        AnswerName::Other => Ok(()),
        _ => Err("is written or judged by tollgate"),
    }
}

/// Keys of a `[[route]]`.
pub fn problems_of(route: &Route) -> Vec<Problem> {
    route.response_headers.problems("response_headers", may_edit)
}

/// What tollgate says in every final answer of a backend.
pub fn own_fields<'a>(
    request_id: &'a str,
    query_token_deprecated: bool,
    hsts: Option<&'a str>,
    limits: Option<&'a LimitFields>,
) -> impl Iterator<Item = (&'static str, &'a str)> {
    let deprecation = query_token_deprecated.then_some(("Deprecation", "true"));
    let hsts = hsts.map(|value| ("Strict-Transport-Security", value));
    let limits = limits.into_iter().flat_map(LimitFields::fields);
    std::iter::once(("X-Request-Id", request_id)).chain(deprecation).chain(hsts).chain(limits)
}

/// What sort of answer a head belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    Final,
    /// 1xx, of which any number may come before the final one: it has fields and nothing else.
    Interim,
    /// 101, which ends HTTP on the connection.
    Switching,
}

impl AnswerKind {
    pub const fn of(status: u16) -> Self {
        match status {
            101 => Self::Switching,
            100..=199 => Self::Interim,
            _ => Self::Final,
        }
    }
}

/// A field that holds URLs, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrlField {
    /// `<URL>; rel="next", <URL>; …`
    Link,
    /// One URL.
    Location,
    /// The same.
    ContentLocation,
    /// `5; url=URL`
    Refresh,
}

impl UrlField {
    const fn name(self) -> &'static str {
        match self {
            Self::Link => "Link",
            Self::Location => "Location",
            Self::ContentLocation => "Content-Location",
            Self::Refresh => "Refresh",
        }
    }
}

/// Whether an option of Connection takes a field away. It can't take what frames the response.
fn may_nominate(option: &[u8]) -> bool {
    let is_framing = |name: &str| option.eq_ignore_ascii_case(name.as_bytes());
    !option.is_empty() && !["content-length", "transfer-encoding", "date"].into_iter().any(is_framing)
}

/// What is a credential in the URLs of one answer.
#[derive(Clone, Copy)]
pub struct Credentials<'a> {
    /// Parameters of these names lose their place, whatever their value.
    pub names: &'a Names,
    /// The request's own token, which goes wherever it stands.
    pub token: Option<&'a [u8]>,
    /// A web page's fragment is between the page and its browser: OAuth hands tokens over there.
    pub fragments_pass: bool,
}

impl std::fmt::Debug for Credentials<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

/// Shorter tokens count only where they are a word of their own, or `2` would be found in every page's number.
const LEAST_EVIDENT_TOKEN: usize = 8;
/// How often a byte is looked for behind `%`: a URL within a URL within a URL encodes its parameters three times.
const MAX_DECODINGS: u8 = 8;
/// What stands for a token in the midst of a path, which would name something else without it.
const IN_ITS_PLACE: &[u8] = b"redacted";

/// Takes credentials out of a field's URLs, into which GitLab 8.5 and later copy every parameter of the request, and in
/// which a redirect to a log-in page carries the whole target. What is left is as well-formed as it was. `None`: nothing
/// to take out.
fn without_credentials(value: &[u8], field: UrlField, credentials: &Credentials<'_>) -> Option<Vec<u8>> {
    let mut cleaner = Cleaner::new(credentials);
    match field {
        UrlField::Link => cleaner.link(value),
        // No URL holds a `<`: what does is read by the brackets, whatever the field.
        _ if memchr::memchr(b'<', value).is_some() => cleaner.link(value),
        UrlField::Location | UrlField::ContentLocation => cleaner.url(value, 0..value.len()),
        UrlField::Refresh => cleaner.refresh(value),
    }
    if cleaner.cuts.is_empty() || seeded::off(Rule::AnswerToken) {
        return None;
    }
    let mut out = Vec::with_capacity(value.len());
    let mut done = 0;
    for (range, with) in cleaner.cuts {
        out.extend_from_slice(&value[done..range.start]);
        out.extend_from_slice(with);
        done = range.end;
    }
    out.extend_from_slice(&value[done..]);
    Some(out)
}

/// A byte of a URL as it reads after all decoding.
#[derive(Clone, Copy)]
struct Letter {
    byte: u8,
    /// How often it was encoded.
    depth: u8,
    start: usize,
    end: usize,
}

impl Letter {
    const fn is_separator(self) -> bool {
        matches!(self.byte, b'?' | b'&' | b';' | b'#')
    }
}

/// What is known of a parameter from where it stands.
struct Parameter {
    /// Its separator.
    at: usize,
    /// The separator is the one that the next parameter takes over when this one goes.
    opens: bool,
    by_name: bool,
    /// Inside another parameter's value or a fragment, the word alone is no parameter: it may be what somebody searches for.
    needs_value: bool,
    in_path: bool,
}

struct Cleaner<'a> {
    names: &'a Names,
    /// Fully decoded, as what it is compared with.
    token: Option<SmallVec<[u8; 64]>>,
    fragments_pass: bool,
    letters: Vec<Letter>,
    text: Vec<u8>,
    /// Bytes of the value to take out, and what stands in their place, in their order.
    cuts: SmallVec<[(Range<usize>, &'static [u8]); 4]>,
}

impl<'a> Cleaner<'a> {
    fn new(credentials: &Credentials<'a>) -> Self {
        let mut cleaner = Self {
            names: credentials.names,
            token: None,
            fragments_pass: credentials.fragments_pass,
            letters: Vec::new(),
            text: Vec::new(),
            cuts: SmallVec::new(),
        };
        if let Some(token) = credentials.token.filter(|token| !token.is_empty()) {
            cleaner.read(token, 0..token.len());
            cleaner.token = Some(SmallVec::from_slice(&cleaner.text));
        }
        cleaner
    }

    /// URLs in angle brackets, and parameters between them.
    fn link(&mut self, value: &[u8]) {
        let mut at = 0;
        while let Some(open) = memchr::memchr(b'<', &value[at..]).map(|open| at + open + 1) {
            self.words(value, at..open);
            let close = memchr::memchr(b'>', &value[open..]).map_or(value.len(), |close| open + close);
            self.url(value, open..close);
            at = close;
        }
        self.words(value, at..value.len());
    }

    /// Seconds, then perhaps `url=`, then a URL with or without quotes, as the HTML standard reads it.
    fn refresh(&mut self, value: &[u8]) {
        let blanks = |at: usize| value[at..].iter().take_while(|b| b.is_ascii_whitespace()).count();
        let mut at = value.iter().take_while(|b| b.is_ascii_digit() || **b == b'.' || b.is_ascii_whitespace()).count();
        if matches!(value.get(at), Some(b';' | b',')) {
            at += 1;
            at += blanks(at);
        }
        if value.get(at..at + 3).is_some_and(|word| word.eq_ignore_ascii_case(b"url")) {
            let equals = at + 3 + blanks(at + 3);
            if value.get(equals) == Some(&b'=') {
                at = equals + 1 + blanks(equals + 1);
            }
        }
        let mut end = value.len();
        if let Some(quote @ (b'"' | b'\'')) = value.get(at).copied() {
            at += 1;
            end = memchr::memchr(quote, &value[at..]).map_or(end, |length| at + length);
        }
        self.url(value, at..end);
        self.words(value, end..value.len());
    }

    /// Text around URLs: each of its words may be one.
    fn words(&mut self, value: &[u8], range: Range<usize>) {
        let is_edge = |b: &u8| matches!(b, b'"' | b'\'' | b',' | b'<' | b'>') || b.is_ascii_whitespace();
        let mut start = range.start;
        for word in value[range].split(is_edge) {
            self.url(value, start..start + word.len());
            start += word.len() + 1;
        }
    }

    /// Decodes a part of the value into `letters` and `text`.
    fn read(&mut self, value: &[u8], range: Range<usize>) {
        let offset = range.start;
        let letter =
            |(at, byte): (usize, &u8)| Letter { byte: *byte, depth: 0, start: offset + at, end: offset + at + 1 };
        self.letters.clear();
        self.letters.extend(value[range].iter().enumerate().map(letter));
        for depth in 1..=MAX_DECODINGS {
            let (mut from, mut to) = (0, 0);
            while let Some(first) = self.letters.get(from).copied() {
                let digits = || Some([self.letters.get(from + 1)?.byte, self.letters.get(from + 2)?.byte]);
                let decoded = if first.byte == b'%' { digits().and_then(|digits| escape(&digits)) } else { None };
                (self.letters[to], from) = match decoded {
                    Some(byte) => (Letter { byte, depth, end: self.letters[from + 2].end, ..first }, from + 3),
                    None => (first, from + 1),
                };
                to += 1;
            }
            if to == self.letters.len() {
                break;
            }
            self.letters.truncate(to);
        }
        self.text.clear();
        self.text.extend(self.letters.iter().map(|letter| letter.byte));
    }

    /// Cuts what is a credential out of one URL, which stands in this range of the value.
    fn url(&mut self, value: &[u8], range: Range<usize>) {
        // Nothing to take apart, and no place for a token.
        let plain = memchr::memchr3(b'?', b'&', b';', &value[range.clone()]).is_none()
            && memchr::memchr2(b'%', b'#', &value[range.clone()]).is_none();
        if range.is_empty() || (plain && self.token.is_none()) {
            return;
        }
        self.read(value, range);
        let first = self.segment_end(0);
        self.replace_token(0..first);
        let (mut at, mut in_query, mut in_fragment) = (first, false, false);
        while let Some(separator) = self.letters.get(at).copied() {
            let outermost = separator.depth == 0;
            // A second `?` belongs to a parameter's value, which may be a URL itself.
            let second = outermost && separator.byte == b'?' && in_query;
            let opens = matches!(separator.byte, b'?' | b'#') && !second;
            if outermost && separator.byte == b'#' {
                (in_query, in_fragment) = (false, true);
            }
            in_query |= outermost && separator.byte == b'?';
            let parameter = Parameter {
                at,
                opens,
                by_name: !(in_fragment && self.fragments_pass),
                needs_value: !outermost || second || in_fragment,
                in_path: !in_query && !in_fragment,
            };
            let all_cut;
            (at, all_cut) = self.parameter(&parameter);
            // The query has not begun after all.
            in_query &= !(all_cut && opens && outermost && separator.byte == b'?');
        }
    }

    /// Judges a parameter. Returns where the next separator stands, and whether this one was cut.
    fn parameter(&mut self, parameter: &Parameter) -> (usize, bool) {
        let separator = self.letters[parameter.at];
        let mut start = parameter.at + 1;
        loop {
            let next = self.segment_end(start);
            // A parameter of a path ends with its segment; the path goes on behind it.
            let own_end = if parameter.in_path { self.slash(start..next) } else { next };
            let named = parameter.by_name
                && self.is_named_like_a_credential(start..own_end, separator.depth, parameter.needs_value);
            let has_token = self.tokens_in(start..own_end).next().is_some();
            if !named && (!has_token || separator.byte == b'#') {
                // A fragment's beginning is replaced, not cut: what follows would no longer stand in the fragment.
                self.replace_token(start..next);
                return (next, false);
            }
            let end = if own_end < next { own_end } else { self.parameter_end(next, separator.depth) };
            let follows = self.letters.get(end).filter(|next| next.depth == separator.depth);
            let takes_its_place = follows.is_some_and(|next| match next.byte {
                b'&' => true,
                // At the end, it separates the URL from what follows in a list.
                b';' => end + 1 < self.letters.len(),
                _ => false,
            });
            if parameter.opens && takes_its_place {
                self.cut(start..end + 1);
                start = end + 1;
                continue;
            }
            // With what opened it, unless a parameter before it went already: then that is cut up to here.
            self.cut(parameter.at..end);
            let next = self.segment_end(end);
            self.replace_token(end..next);
            return (next, true);
        }
    }

    fn slash(&self, range: Range<usize>) -> usize {
        let found = self.letters[range.clone()].iter().position(|letter| letter.byte == b'/' && letter.depth == 0);
        found.map_or(range.end, |at| range.start + at)
    }

    /// The next separator of any depth.
    fn segment_end(&self, from: usize) -> usize {
        let found = self.letters[from..].iter().position(|letter| letter.is_separator());
        found.map_or(self.letters.len(), |at| from + at)
    }

    /// Where a parameter of this depth ends: what was encoded more often belongs to its value.
    fn parameter_end(&self, from: usize, depth: u8) -> usize {
        let found = self.letters[from..].iter().position(|letter| letter.is_separator() && letter.depth <= depth);
        found.map_or(self.letters.len(), |at| from + at)
    }

    fn is_named_like_a_credential(&self, range: Range<usize>, depth: u8, needs_value: bool) -> bool {
        let letters = &self.letters[range];
        let equals = letters.iter().position(|letter| letter.byte == b'=' && letter.depth <= depth);
        if needs_value && equals.is_none_or(|at| at + 1 == letters.len()) {
            return false;
        }
        let name = &letters[..equals.unwrap_or(letters.len())];
        let decoded: SmallVec<[u8; 64]> = name
            .iter()
            .map(|letter| if letter.byte == b'+' && letter.depth <= depth { b' ' } else { letter.byte })
            .collect();
        matches!(self.names.key_of_decoded(&decoded), Some((Key::Token | Key::AccessToken | Key::JobToken, _)))
    }

    /// Where the request's token stands among these letters.
    fn tokens_in(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let text = &self.text[range.clone()];
        let is_word = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        self.token.as_deref().into_iter().flat_map(move |token| {
            let stands = move |at: &usize| {
                let before = at.checked_sub(1).and_then(|before| text.get(before));
                let alone = !is_word(before) && !is_word(text.get(at + token.len()));
                alone || token.len() >= LEAST_EVIDENT_TOKEN
            };
            let found = memchr::memmem::find_iter(text, token).filter(stands);
            found.map(move |at| range.start + at..range.start + at + token.len())
        })
    }

    fn replace_token(&mut self, range: Range<usize>) {
        let found: SmallVec<[Range<usize>; 2]> = self.tokens_in(range).collect();
        for place in found {
            self.push_cut(place, IN_ITS_PLACE);
        }
    }

    fn cut(&mut self, letters: Range<usize>) {
        self.push_cut(letters, b"");
    }

    fn push_cut(&mut self, letters: Range<usize>, with: &'static [u8]) {
        let (Some(first), Some(last)) = (self.letters.get(letters.start), letters.end.checked_sub(1)) else { return };
        let Some(last) = self.letters.get(last) else { return };
        let range = first.start..last.end;
        // A cut that begins before another one takes it in.
        while self.cuts.last().is_some_and(|(known, _)| known.start >= range.start) {
            self.cuts.pop();
        }
        self.cuts.push((range, with));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "good-token-0001";

    fn cleaned(value: &str, field: UrlField, token: &str, fragments_pass: bool) -> String {
        let names = Names { token: "private_token".into() };
        let credentials = Credentials { names: &names, token: Some(token.as_bytes()), fragments_pass };
        let clean = without_credentials(value.as_bytes(), field, &credentials);
        // What changed is changed once: a second look finds nothing.
        if let Some(clean) = &clean {
            assert_ne!(clean, value.as_bytes());
            assert_eq!(without_credentials(clean, field, &credentials), None, "{value}");
        }
        clean.map_or(value.to_owned(), |clean| String::from_utf8(clean).unwrap())
    }

    /// Status, whether chunks are known, and fields.
    struct Head(u16, bool, Vec<(&'static str, &'static str)>);

    impl AnswerView for Head {
        fn status(&self) -> u16 {
            self.0
        }

        fn knows_chunks(&self) -> bool {
            self.1
        }

        fn known_fields(&self) -> impl Iterator<Item = (AnswerName, &[u8], &[u8])> {
            self.2.iter().map(|(name, value)| (AnswerName::of(name.as_bytes()), name.as_bytes(), value.as_bytes()))
        }
    }

    #[test]
    fn an_answer_is_framed_in_one_way() {
        let (length, chunked) = (("content-length", "5"), ("transfer-encoding", "chunked"));
        let judged = |status, http11, fields: &[(&'static str, &'static str)]| {
            judge(&Head(status, http11, fields.to_vec()), false, 0)
        };
        let refused = Err(UpstreamFault::Malformed);
        for (http11, fields, expected) in [
            (true, vec![], Ok(AnswerKind::Final)),
            (true, vec![length], Ok(AnswerKind::Final)),
            (true, vec![chunked], Ok(AnswerKind::Final)),
            (true, vec![("transfer-encoding", "CHUNKED")], Ok(AnswerKind::Final)),
            (false, vec![length], Ok(AnswerKind::Final)),
            (false, vec![chunked], refused),
            (true, vec![length, length], refused),
            (true, vec![chunked, chunked], refused),
            (true, vec![("content-length", "+5")], refused),
            (true, vec![("content-length", "5, 5")], refused),
            (true, vec![("content-length", "")], refused),
            (true, vec![("transfer-encoding", "gzip, chunked")], refused),
            (true, vec![("transfer-encoding", "identity")], refused),
        ] {
            assert_eq!(judged(200, http11, &fields), expected, "{http11} {fields:?}");
        }
    }

    #[test]
    fn interim_answers_are_bounded_and_nobody_switches_unasked() {
        let judged = |status, asked, interim| judge(&Head(status, true, vec![]), asked, interim);
        assert_eq!(judged(103, false, MAX_INTERIM_ANSWERS - 1), Ok(AnswerKind::Interim));
        assert_eq!(judged(103, false, MAX_INTERIM_ANSWERS), Err(UpstreamFault::Malformed));
        assert_eq!(judged(200, false, MAX_INTERIM_ANSWERS), Ok(AnswerKind::Final), "the final one still comes");
        assert_eq!(judged(101, true, 0), Ok(AnswerKind::Switching));
        assert_eq!(judged(101, false, 0), Err(UpstreamFault::Malformed));
    }

    #[test]
    fn what_changes_in_a_head() {
        let names = Names { token: "private_token".into() };
        let credentials = Credentials { names: &names, token: Some(b"glpat-0001-0001"), fragments_pass: false };
        let fields = vec![
            ("server", "x"),
            ("connection", "keep-alive, X-Own,  Date"),
            ("x-own", "1"),
            ("date", "D"),
            ("x-sendfile", "/etc/passwd"),
            ("link", "</a?private_token=glpat-0001-0001&page=2>; rel=\"next\""),
            ("link", "</b>; rel=\"first\""),
            ("location", "/plain"),
        ];
        let (head, none) = (Head(200, true, fields), HeaderEdits::default());
        let removed = |name: &'static str| AnswerEdit::Remove(name.as_bytes());
        let expected = [
            removed("keep-alive"),
            removed("X-Own"),
            removed("connection"),
            removed("x-sendfile"),
            AnswerEdit::Replace("Link", vec![b"</a?page=2>; rel=\"next\"".to_vec(), b"</b>; rel=\"first\"".to_vec()]),
        ];
        assert_eq!(edits(&head, AnswerKind::Final, &credentials, &none).into_vec(), expected);
        let switching = edits(&head, AnswerKind::Switching, &credentials, &none);
        assert!(!switching.contains(&removed("connection")), "{switching:?}");
    }

    #[test]
    fn parameters_named_like_a_credential_go() {
        for (value, expected) in [
            ("http://h/p?private_token=S", "http://h/p"),
            ("http://h/p?private_token=S&page=2", "http://h/p?page=2"),
            ("http://h/p?page=2&private_token=S", "http://h/p?page=2"),
            ("http://h/p?a=1&private_token=S&b=2", "http://h/p?a=1&b=2"),
            ("/p?private_token=S&private_token=T&x=1", "/p?x=1"),
            ("/p?private_token=S&access_token=T", "/p"),
            ("/p?a=1&private%5Ftoken=S&access_token=T#f", "/p?a=1#f"),
            ("/p?private_token=S#f", "/p#f"),
            ("/p?private_token&page=2", "/p?page=2"),
            ("/p?private_token=&page=2", "/p?page=2"),
            ("/p?private_token=S,T&page=2", "/p?page=2"),
            ("/p?private_token[]=S&x", "/p?x"),
            ("/p?[private_token]=S&x", "/p?x"),
            ("/p?+private_token=S&x", "/p?x"),
            ("/p?x;private_token=S;y", "/p?x;y"),
            ("/p?bearer_token=S&job_token=T&x=1", "/p?x=1"),
            ("/p;private_token=S/x?y=1", "/p/x?y=1"),
            ("/p;private_token=S/x;private_token=S/y", "/p/x/y"),
            ("/p&private_token=S", "/p"),
            ("?private_token=S", ""),
            // A URL within a parameter, encoded once, twice and not at all.
            ("/login?next=%2Fp%3Fprivate_token%3DS&x=1", "/login?next=%2Fp&x=1"),
            ("/login?next=%2Fp%3Fprivate_token%3DS%26page%3D2&x=1", "/login?next=%2Fp%3Fpage%3D2&x=1"),
            ("/login?next=%2Fp%3Fpage%3D2%26private_token%3DS&x=1", "/login?next=%2Fp%3Fpage%3D2&x=1"),
            ("/login?next=%252Fp%253Fprivate_token%253DS", "/login?next=%252Fp"),
            ("/login?next=%2Fq%3Fu%3D%252Fp%253Fprivate_token%253DS%26x%3D1", "/login?next=%2Fq%3Fu%3D%252Fp%26x%3D1"),
            ("/login?next=/p?private_token=S&x=1", "/login?next=/p&x=1"),
            ("/login?x=1&next=%2fp%3fprivate%255ftoken%3dS", "/login?x=1&next=%2fp"),
            // A page's own address behind `#`.
            ("/#/p?private_token=S&x=1", "/#/p?x=1"),
            ("/#private_token=S&x=1", "/#x=1"),
            ("/#private_token=S", "/"),
            ("/?private_token?private_token=S", "/"),
            ("/p?private_token=S&", "/p?"),
        ] {
            assert_eq!(cleaned(value, UrlField::Location, TOKEN, false), expected, "{value}");
        }
        // OAuth's implicit grant hands a new token over in the fragment of a web page's redirect.
        let handed = "https://app/#access_token=T&token_type=bearer";
        assert_eq!(cleaned(handed, UrlField::Location, TOKEN, true), handed);
        assert_eq!(cleaned(handed, UrlField::Location, TOKEN, false), "https://app/#token_type=bearer");
        assert_eq!(cleaned("/p?access_token=T#x", UrlField::Location, TOKEN, true), "/p#x");
    }

    #[test]
    fn a_value_that_is_only_the_word_stays() {
        for value in [
            "/p?search=private_token&page=2",
            "/p?search=private_token%3D&page=2",
            "/p?search=private_token%3Dx&page=2",
            "/p?search=%3Fprivate_token&page=2",
            "/p?search=%3Fprivate_token%3D&page=2",
            "/p?search=a%26private_token&page=2",
            "/p?search=what%20is%20private_token%3F&page=2",
            "/p?scope=access_token&page=2",
            "/p?x=private%5Ftoken",
            "/p?my_private_token=1&private_tokens=2&private_token_id=3",
            "/private_token?page=2",
            "/p/private_token/x",
            "/p#private_token",
            "/p#x&private_token",
            "/p?x=1?private_token",
            "http://h/p?page=2&per_page=20",
            "http://private_token@h/p?page=2",
            "/p?q=100%&x=%zz",
            "",
            "?",
            "/p?&&x&",
        ] {
            assert_eq!(cleaned(value, UrlField::Location, TOKEN, false), value);
            let link = format!("<{value}>; rel=\"next\"");
            assert_eq!(cleaned(&link, UrlField::Link, TOKEN, false), link);
        }
    }

    #[test]
    fn the_requests_own_token_goes_wherever_it_stands() {
        for (value, expected) in [
            ("/p?key=good-token-0001&x=1", "/p?x=1"),
            ("/p?x=1&key=good%2Dtoken%2d0001", "/p?x=1"),
            ("/p?x=1&key=%67ood-token-000%31", "/p?x=1"),
            ("/p?x=1&key=good%252Dtoken-0001", "/p?x=1"),
            ("/p?x=1&key=good%25252Dtoken-0001", "/p?x=1"),
            ("/p?x=1&good-token-0001", "/p?x=1"),
            ("/p?x=1&good-token-0001=1", "/p?x=1"),
            ("/p?search=private_token%3Dgood-token-0001&page=2", "/p?page=2"),
            ("/p?state=xgood-token-0001x&page=2", "/p?page=2"),
            ("/login?next=%2Fp%3Fkey%3Dgood-token-0001%26page%3D2&x=1", "/login?next=%2Fp%3Fpage%3D2&x=1"),
            ("/login?next=%2Fp%2Fgood-token-0001%3Fpage%3D2&x=1", "/login?x=1"),
            ("/session/good-token-0001", "/session/redacted"),
            ("/session/good%2Dtoken%2D0001/x?y", "/session/redacted/x?y"),
            ("http://good-token-0001@h/p", "http://redacted@h/p"),
            ("http://oauth2:good-token-0001@h/p?x=1", "http://oauth2:redacted@h/p?x=1"),
            ("/p#good-token-0001", "/p#redacted"),
            ("/p?x=1#/s/good-token-0001?y=1", "/p?x=1#/s/redacted?y=1"),
            ("/p#access=good-token-0001&x=1", "/p#access=redacted&x=1"),
            ("/p?private_token=good-token-0001&page=2", "/p?page=2"),
            ("/good-token-0001/good-token-0001", "/redacted/redacted"),
            ("/p;x=1/good-token-0001?y=1", "/p;x=1/redacted?y=1"),
            ("/p;x=good-token-0001/good-token-0001?y=1", "/p/redacted?y=1"),
            ("/p;private_token=S/good-token-0001", "/p/redacted"),
        ] {
            assert_eq!(cleaned(value, UrlField::Location, TOKEN, false), expected, "{value}");
            assert!(!cleaned(value, UrlField::Location, TOKEN, true).contains("0001"), "{value}");
        }
        // A token that holds an escape is the same text decoded.
        assert_eq!(cleaned("/p?k=a%2541-long-token&x", UrlField::Location, "a%41-long-token", false), "/p?x");
        assert_eq!(cleaned("/p?k=a%41-long-token&x", UrlField::Location, "a%41-long-token", false), "/p?x");
        assert_eq!(cleaned("/p?k=a%2Blong-token&x", UrlField::Location, "a+long-token", false), "/p?x");
        // One that could stand anywhere by chance counts as a word of its own only.
        assert_eq!(cleaned("/p12?page=2&per_page=20", UrlField::Location, "2", false), "/p12?per_page=20");
        assert_eq!(cleaned("/projects?x=pro", UrlField::Location, "pro", false), "/projects");
        assert_eq!(cleaned("/p?a=x", UrlField::Location, "", false), "/p?a=x");
    }

    #[test]
    fn links_and_refreshes_keep_their_form() {
        for (value, expected) in [
            (
                "<http://h/p?page=2&per_page=20&private_token=S>; rel=\"next\", <http://h/p?private_token=S&page=1>; rel=\"first\"",
                "<http://h/p?page=2&per_page=20>; rel=\"next\", <http://h/p?page=1>; rel=\"first\"",
            ),
            ("<http://h/p?labels=a,b&private_token=S,T>; rel=next", "<http://h/p?labels=a,b>; rel=next"),
            ("<http://h/p?private_token=S;x>; rel=next; title=\"a;b\"", "<http://h/p?x>; rel=next; title=\"a;b\""),
            ("</style.css>; rel=preload; as=style", "</style.css>; rel=preload; as=style"),
            ("</p?private_token=S", "</p"),
            ("http://h/p?private_token=S; rel=next", "http://h/p; rel=next"),
            ("</p>; rel=next; anchor=\"/q?private_token=S\"", "</p>; rel=next; anchor=\"/q\""),
            ("</p>; rel=next; title=\"my good-token-0001\"", "</p>; rel=next; title=\"my redacted\""),
            ("</s/good-token-0001>; rel=self", "</s/redacted>; rel=self"),
        ] {
            assert_eq!(cleaned(value, UrlField::Link, TOKEN, false), expected, "{value}");
        }
        for (value, expected) in [
            ("5; url=http://h/p?private_token=S&x=1", "5; url=http://h/p?x=1"),
            ("5; URL = 'http://h/p?x=1&private_token=S'", "5; URL = 'http://h/p?x=1'"),
            ("0;url=\"/p?private_token=S\"; x", "0;url=\"/p\"; x"),
            ("5, /p?private_token=S", "5, /p"),
            ("5; url=/s/good-token-0001", "5; url=/s/redacted"),
            ("5;/p?key=good%2Dtoken-0001", "5;/p"),
            ("5; url=/p?search=private_token", "5; url=/p?search=private_token"),
            ("5", "5"),
            ("", ""),
            ("5; url=", "5; url="),
            ("5; url='", "5; url='"),
        ] {
            assert_eq!(cleaned(value, UrlField::Refresh, TOKEN, false), expected, "{value}");
        }
    }

    #[test]
    fn nothing_is_worse_than_slow_and_nothing_breaks() {
        // Every short text of these pieces, in every form: no panic, and no token left.
        let pieces = ["?", "&", ";", "#", "=", "%", "25", "3F", "26", "<", ">", "\"", "/", "private_token", TOKEN, "x"];
        let mut seen = 0;
        for a in pieces {
            for b in pieces {
                for c in pieces {
                    for d in pieces {
                        let value = [a, b, c, d].concat();
                        for field in [UrlField::Location, UrlField::Link, UrlField::Refresh] {
                            assert!(!cleaned(&value, field, TOKEN, false).contains(TOKEN), "{value}");
                            seen += 1;
                        }
                    }
                }
            }
        }
        assert_eq!(seen, 3 * 16_usize.pow(4));
        // Time of this thread's own, which other tests take nothing from. What grows with the square of a length would take minutes.
        let used = || std::time::Duration::from(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap());
        let before = used();
        for piece in
            ["?", "&", "%25", "%3F", "?private_token=S", "&private_token=S", "%26private_token%3DS", TOKEN, "<", ";"]
        {
            let long = piece.repeat(64 * 1024 / piece.len());
            for field in [UrlField::Location, UrlField::Link, UrlField::Refresh] {
                cleaned(&long, field, TOKEN, false);
            }
        }
        let took = used() - before;
        assert!(took.as_secs() < 20, "{took:?}");
    }

    #[test]
    fn every_sort_of_answer_has_its_fields() {
        use AnswerKind::{Final, Interim, Switching};
        let names = Names { token: "private_token".into() };
        let credentials = Credentials { names: &names, token: None, fragments_pass: false };
        // Which of a final, an interim and a switching answer lose it.
        for (name, expected) in [
            ("Content-Length", [false, true, false]),
            ("transfer-encoding", [false, true, false]),
            ("Upgrade", [true, true, false]),
            ("connection", [true, true, false]),
            ("Keep-Alive", [true; 3]),
            ("proxy-connection", [true; 3]),
            ("te", [true; 3]),
            ("Trailer", [true; 3]),
            ("X-Sendfile", [true; 3]),
            ("x-accel-redirect", [true; 3]),
            ("x-lighttpd-send-file", [true; 3]),
            ("x-lighttpd-send-tempfile", [true; 3]),
            ("X-LiteSpeed-Location", [true; 3]),
            ("x-reproxy-url", [true; 3]),
            ("x-reproxy-file", [true; 3]),
            ("Gitlab-Workhorse", [true; 3]),
            ("gitlab-workhorse-send-data", [true; 3]),
            ("gitlab-lb", [false; 3]),
            ("content-type", [false; 3]),
            ("content-location", [false; 3]),
            ("x-accel-buffering", [false; 3]),
            ("x-request-id", [false; 3]),
            ("date", [false; 3]),
            ("x", [false; 3]),
        ] {
            let head = Head(200, true, vec![(name, "")]);
            let lost = [Final, Interim, Switching].map(|kind| {
                edits(&head, kind, &credentials, &HeaderEdits::default()).contains(&AnswerEdit::Remove(name.as_bytes()))
            });
            assert_eq!(lost, expected, "{name}");
        }
        for (name, field) in [
            ("Link", UrlField::Link),
            ("LOCATION", UrlField::Location),
            ("content-location", UrlField::ContentLocation),
            ("Refresh", UrlField::Refresh),
        ] {
            assert_eq!(AnswerName::of(name.as_bytes()), AnswerName::Urls(field), "{name}");
        }
        for (status, kind) in
            [(100, Interim), (101, Switching), (103, Interim), (199, Interim), (200, Final), (304, Final)]
        {
            assert_eq!(AnswerKind::of(status), kind);
        }
    }
}
