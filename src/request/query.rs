//! Matches parameter names in a query string against the union of how backends parse them (Rack 1.4 to 3, PHP, Django,
//! Express and Go), and edits the query without changing any other byte. Pure. Knows which names matter, not what they
//! mean. `tests/names.tsv` records how those parsers read the edge cases.

use super::seeded::{self, Rule};
use super::target::escape;
use smallvec::SmallVec;
use std::ops::Range;

/// The parameters that the gateway must know. All others are left to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Token,
    Page,
    PerPage,
    Sudo,
    /// `access_token`, `bearer_token`: OAuth.
    AccessToken,
    JobToken,
    /// `_method`, which Rack::MethodOverride obeys in a form body, and Symfony and Laravel in a query too.
    Method,
}

/// No other name than the token's is longer.
const LONGEST_FIXED_NAME: usize = b"access_token".len();
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How a name was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// Exactly the name.
    Plain,
    /// Different bytes that Rack reads as the name: escapes, brackets that it strips.
    Variant,
    /// An array or a hash: `name[]`, `name[x]`.
    Structured,
    /// A different name to Rack, but this one to some other parser.
    Foreign,
}

/// One `name=value` of a query that carries a [`Key`].
#[derive(Debug)]
pub struct Param<'a> {
    pub key: Key,
    pub spelling: Spelling,
    /// The bytes after `=`, still encoded; `None` without `=`, which Rack reads as nil.
    pub value: Option<&'a [u8]>,
    /// Preceded or followed by `;`. Rack 1 and 2 split there; Rack 3 and the other parsers take what follows as a part
    /// of the value.
    pub begins_at_semicolon: bool,
    pub ends_at_semicolon: bool,
    /// Its position in the query, without separators.
    pub range: Range<usize>,
}

pub type Params<'a> = SmallVec<[Param<'a>; 4]>;

/// The names of the [`Key`]s. Only the token's name is configurable.
#[derive(Clone, Debug)]
pub struct Names {
    pub token: String,
}

/// Bytes that some parser strips, folds or cuts at, or that start an escape. Every parser reads a name without any of
/// them literally.
const fn is_odd(byte: u8) -> bool {
    matches!(byte, 0..=b' ' | b'%' | b'+' | b'.' | b'[' | b']')
}

impl Names {
    /// The key that any of the parsers reads a name as, and its spelling. The name is still encoded.
    pub fn key_of(&self, name: &[u8]) -> Option<(Key, Spelling)> {
        if !name.iter().any(|b| is_odd(*b)) && !name.starts_with(BYTE_ORDER_MARK) {
            return self.exact(name).map(|key| (key, Spelling::Plain));
        }
        // Most names with odd bytes are arrays or hashes and need no decoding.
        if memchr::memchr2(b'%', b'+', name).is_none() {
            return self.key_of_decoded(name);
        }
        self.key_of_decoded(&form_decode(name))
    }

    /// The same for a decoded name, as in a multipart body.
    pub fn key_of_decoded(&self, decoded: &[u8]) -> Option<(Key, Spelling)> {
        // body-parser (Express) drops a byte order mark at the beginning of a form. A loop: a client may send thousands.
        let mut name = decoded;
        while let Some(rest) = name.strip_prefix(BYTE_ORDER_MARK) {
            name = rest;
        }
        if name.len() < decoded.len() {
            let key = self.as_rack_reads(name).map(|(key, _)| key).or_else(|| self.as_php_reads(name))?;
            return Some((key, Spelling::Foreign));
        }
        self.as_rack_reads(name).or_else(|| Some((self.as_php_reads(name)?, Spelling::Foreign)))
    }

    /// Rack strips brackets before the name and ends it at the next one. Express (qs) and parsers without nesting find
    /// no name that this rule misses. Only some parsers strip blanks around a name or cut it at NUL.
    fn as_rack_reads(&self, decoded: &[u8]) -> Option<(Key, Spelling)> {
        let is_bracket = |b: u8| matches!(b, b'[' | b']');
        let is_blank = |b: u8| matches!(b, 0 | b' ' | 9..=13);
        let start = decoded.iter().position(|b| !is_bracket(*b) && !is_blank(*b)).unwrap_or(decoded.len());
        let end =
            decoded[start..].iter().position(|b| is_bracket(*b) || *b == 0).map_or(decoded.len(), |at| start + at);
        let trailing_blanks = decoded[start..end].iter().rev().take_while(|b| is_blank(**b)).count();
        let (core, rest) = (&decoded[start..end - trailing_blanks], &decoded[end..]);
        let cut = rest.first() == Some(&0);
        let blanks = cut || trailing_blanks > 0 || decoded[..start].iter().any(|b| is_blank(*b));
        let spelling = match rest {
            [] if start == 0 && !blanks => Spelling::Plain,
            _ if cut || rest.iter().all(|b| *b == b']') => Spelling::Variant,
            _ => Spelling::Structured,
        };
        match self.exact(core)? {
            // A different key to Rack, so its value must not replace one that Rack reads.
            key @ (Key::Page | Key::PerPage) if blanks => Some((key, Spelling::Foreign)),
            key => Some((key, spelling)),
        }
    }

    /// PHP cuts a name at NUL, strips leading spaces, and replaces a dot, a space and an unclosed `[` by `_`. Whether a
    /// `]` follows is not checked: a long name in a body may have been truncated before it.
    fn as_php_reads(&self, decoded: &[u8]) -> Option<Key> {
        if seeded::off(Rule::PhpNames) {
            return None;
        }
        let end = memchr::memchr(0, decoded).unwrap_or(decoded.len());
        let start = decoded[..end].iter().take_while(|b| **b == b' ').count();
        // PHP ignores names that begin with a bracket.
        let name = Some(&decoded[start..end]).filter(|name| !name.starts_with(b"["))?;
        // The part before the first bracket is the name of an array.
        let root = memchr::memchr(b'[', name).unwrap_or(name.len());
        self.folded(&name[..root]).or_else(|| self.folded(name))
    }

    /// The key whose name this is once PHP has replaced bytes by `_`.
    fn folded(&self, name: &[u8]) -> Option<Key> {
        // Most names are too long to match, and need no copy.
        if name.len() > LONGEST_FIXED_NAME && name.len() != self.token.len() {
            return None;
        }
        let fold = |b: &u8| if matches!(b, b' ' | b'.' | b'[') { b'_' } else { *b };
        let folded: SmallVec<[u8; 64]> = name.iter().map(fold).collect();
        self.exact(&folded)
    }

    /// The key with exactly this name. The configured token name takes precedence over the fixed names.
    pub fn exact(&self, name: &[u8]) -> Option<Key> {
        if name == self.token.as_bytes() {
            return Some(Key::Token);
        }
        match name {
            b"page" => Some(Key::Page),
            b"per_page" => Some(Key::PerPage),
            b"sudo" => Some(Key::Sudo),
            b"access_token" | b"bearer_token" => Some(Key::AccessToken),
            b"job_token" => Some(Key::JobToken),
            b"_method" => Some(Key::Method),
            _ => None,
        }
    }
}

/// The parameters of a query that matter here.
#[derive(Debug, Default)]
pub struct Scan<'a> {
    pub params: Params<'a>,
    /// Position of the first parameter without a key; `usize::MAX` if there is none.
    first_other: usize,
}

/// Splits a query at `&` and `;` and picks out the parameters with a [`Key`].
pub fn scan<'a>(query: &'a [u8], names: &Names) -> Scan<'a> {
    let mut found = Scan { params: Params::new(), first_other: usize::MAX };
    if query.is_empty() {
        return found;
    }
    let mut start = 0;
    loop {
        let end = memchr::memchr2(b'&', b';', &query[start..]).map_or(query.len(), |at| start + at);
        let segment = &query[start..end];
        let (name, value) = match memchr::memchr(b'=', segment) {
            Some(at) => (&segment[..at], Some(&segment[at + 1..])),
            None => (segment, None),
        };
        match names.key_of(name) {
            Some((key, mut spelling)) => {
                if spelling == Spelling::Plain && names.exact(name).is_none() {
                    spelling = Spelling::Variant;
                }
                let ends_at_semicolon = query.get(end) == Some(&b';');
                let begins_at_semicolon = start > 0 && query[start - 1] == b';';
                found.params.push(Param {
                    key,
                    spelling,
                    value,
                    begins_at_semicolon,
                    ends_at_semicolon,
                    range: start..end,
                });
            }
            None => found.first_other = found.first_other.min(start),
        }
        if end == query.len() {
            return found;
        }
        start = end + 1;
    }
}

/// What to do with a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamAction {
    Keep,
    Drop,
    /// Write it as `page=N` or `per_page=N`, and a following `;` as `&`, so that every parser reads it in the same way.
    Number(Key, u64),
}

/// One change to a query: replaces the bytes of `range` by `with`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryEdit {
    range: Range<usize>,
    with: Option<(Key, u64)>,
}

/// All changes to one query, in order and without overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    changes: SmallVec<[QueryEdit; 4]>,
    appended: SmallVec<[(Key, u64); 2]>,
}

impl Edits {
    /// Works out what to cut so that the separators stay correct, given the action for each parameter of the scan.
    pub fn plan(scan: &Scan<'_>, actions: &[ParamAction], query_len: usize) -> Self {
        let mut edits = Self::default();
        let mut first_kept = scan.first_other;
        for (param, action) in scan.params.iter().zip(actions) {
            let Range { start, end } = param.range;
            match action {
                ParamAction::Keep => first_kept = first_kept.min(start),
                ParamAction::Number(key, number) => {
                    first_kept = first_kept.min(start);
                    edits.changes.push(QueryEdit { range: start..end, with: Some((*key, *number)) });
                }
                // A cut includes one separator: the one before, or the one after if nothing is kept before. Between a
                // `&` and a `;` it takes the `;`, because not every parser splits there.
                ParamAction::Drop => {
                    let stays_before = param.ends_at_semicolon && !param.begins_at_semicolon;
                    let is_taken = edits.changes.last().is_some_and(|edit| edit.range.end == start);
                    let range = if first_kept < start && !stays_before && !is_taken {
                        start - 1..end
                    } else {
                        start..(end + 1).min(query_len)
                    };
                    edits.changes.push(QueryEdit { range, with: None });
                }
            }
        }
        edits
    }

    /// Appends a parameter, also to a target without a query.
    pub fn append(&mut self, key: Key, number: u64) {
        self.appended.push((key, number));
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.appended.is_empty()
    }

    /// Writes the target with the changes applied. A query that the changes leave empty loses its `?`.
    pub fn write_target(&self, path: &[u8], query: Option<&[u8]>, out: &mut Vec<u8>) {
        out.extend_from_slice(path);
        let question_mark = out.len();
        if let Some(query) = query {
            out.push(b'?');
            let (mut done, mut after_number) = (0, false);
            for QueryEdit { range, with } in &self.changes {
                let between = &query[done..range.start];
                put_between(between, after_number, out);
                after_number = after_number && between.is_empty();
                done = range.end;
                if let Some((key, number)) = with {
                    write_number(*key, *number, out);
                    after_number = true;
                }
            }
            put_between(&query[done..], after_number, out);
            if out.len() == question_mark + 1 && !self.changes.is_empty() {
                out.truncate(question_mark);
            }
        }
        for (key, number) in &self.appended {
            out.push(if out.len() == question_mark { b'?' } else { b'&' });
            write_number(*key, *number, out);
        }
    }
}

/// Copies the bytes between two changes. A `;` after a rewritten number becomes `&`.
fn put_between(bytes: &[u8], after_number: bool, out: &mut Vec<u8>) {
    match bytes {
        [b';', rest @ ..] if after_number => {
            out.push(b'&');
            out.extend_from_slice(rest);
        }
        _ => out.extend_from_slice(bytes),
    }
}

fn write_number(key: Key, number: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(if key == Key::Page { b"page=" } else { b"per_page=" });
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// `application/x-www-form-urlencoded` decoding: `+` is a space, `%hh` a byte. An invalid escape is kept as it is; in a
/// query the target check has refused those before.
pub fn form_decode(bytes: &[u8]) -> SmallVec<[u8; 64]> {
    let mut out = SmallVec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        out.push(match (byte, escape(tail)) {
            (b'%', Some(decoded)) => {
                rest = &tail[2..];
                decoded
            }
            (b'+', _) => b' ',
            _ => *byte,
        });
    }
    out
}

/// Whether a query's ASCII bytes are still ASCII when decoded by the charset of this Content-Type, as Django does for
/// every method and type: in UTF-7, `private+AF8-token` is the token. The charsets listed here encode ASCII as itself
/// and nothing else as ASCII; any other charset counts as unsafe.
pub fn is_read_as_ascii(content_type: &[u8]) -> bool {
    const WORD: &[u8] = b"charset";
    let mut places = content_type.windows(WORD.len()).enumerate();
    places.all(|(at, word)| {
        !word.eq_ignore_ascii_case(WORD) || {
            let value = match content_type[at + WORD.len()..].trim_ascii_start() {
                [b'=', value @ ..] => value.trim_ascii_start(),
                [] | [b'-' | b'_' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z', ..] => return true,
                // `charset*` (RFC 2231) is read by Django as well, and it strips more kinds of blanks than these.
                _ => return false,
            };
            let value = value.strip_prefix(b"\"").unwrap_or(value);
            let ends = |b: &u8| matches!(b, b'"' | b';' | b',' | b' ' | b'\t');
            holds_ascii(&value[..value.iter().position(ends).unwrap_or(value.len())])
        }
    })
}

fn holds_ascii(charset: &[u8]) -> bool {
    let charset: SmallVec<[u8; 16]> = charset.iter().map(u8::to_ascii_lowercase).collect();
    let number_after = |prefixes: &[&str]| {
        let rest = prefixes.iter().find_map(|prefix| charset.strip_prefix(prefix.as_bytes()));
        rest.is_some_and(|rest| (1..=4).contains(&rest.len()) && rest.iter().all(u8::is_ascii_digit))
    };
    matches!(
        charset.as_slice(),
        b"utf-8"
            | b"utf8"
            | b"us-ascii"
            | b"ascii"
            | b"latin1"
            | b"latin-1"
            | b"koi8-r"
            | b"koi8-u"
            | b"shift_jis"
            | b"euc-jp"
            | b"euc-kr"
            | b"gbk"
            | b"gb2312"
            | b"gb18030"
            | b"big5"
    ) || number_after(&["iso-8859-", "iso8859-", "windows-125", "cp125"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names { token: "private_token".into() }
    }

    #[test]
    fn names_as_rack_reads_them() {
        use Spelling::*;
        for (name, spelling) in [
            ("private_token", Plain),
            ("%70rivate_token", Plain),
            ("private%5Ftoken", Plain),
            ("[private_token]", Variant),
            ("private_token]", Variant),
            ("]private_token", Variant),
            ("%5Bprivate_token%5D", Variant),
            ("[[private_token]]", Variant),
            ("private_token[]", Structured),
            ("private_token[x]", Structured),
            ("private_token%5B%5D", Structured),
            ("private_token[", Structured),
            ("+private_token", Variant),
            ("private_token%20", Variant),
            ("private_token%0a", Variant),
            ("+]private_token", Variant),
            ("private_token%00", Variant),
        ] {
            assert_eq!(names().key_of(name.as_bytes()), Some((Key::Token, spelling)), "{name}");
        }
        for name in [
            "PRIVATE_TOKEN",
            "private-token",
            "private_token.x",
            "?private_token",
            "private_token%3D",
            "private%255Ftoken",
        ] {
            assert_eq!(names().key_of(name.as_bytes()), None, "{name}");
        }
        assert_eq!(names().key_of(b"per_page]"), Some((Key::PerPage, Variant)));
    }

    #[test]
    fn names_that_only_other_readers_fold_into_ours() {
        let mut seen = 0;
        for (name, key) in [
            ("private_token%00100abc", Key::Token),
            ("private.token", Key::Token),
            ("private+token", Key::Token),
            ("private[token", Key::Token),
            ("+private%2etoken%00[", Key::Token),
            ("private.token[x]", Key::Token),
            ("per.page", Key::PerPage),
            ("per_page+", Key::PerPage),
            ("%20page", Key::Page),
            ("page%00x", Key::Page),
            (".method", Key::Method),
            ("access.token", Key::AccessToken),
            ("\u{feff}sudo", Key::Sudo),
        ] {
            let (found, spelling) = names().key_of(name.as_bytes()).unwrap();
            let expected = if name.starts_with("private_token%00") { Spelling::Variant } else { Spelling::Foreign };
            assert_eq!((found, spelling), (key, expected), "{name}");
            seen += 1;
        }
        assert_eq!(seen, 13);
        for name in ["[private.token]", "private_token.", ".page", "page.", "page.size", "private..token", "[method"] {
            assert_eq!(names().key_of(name.as_bytes()), None, "{name}");
        }
    }

    /// Drops every token parameter and sets every `per_page` to 7.
    fn edited(query: &str) -> String {
        let scan = scan(query.as_bytes(), &names());
        let actions: Vec<ParamAction> = scan
            .params
            .iter()
            .map(|p| match p.key {
                Key::Token => ParamAction::Drop,
                Key::PerPage => ParamAction::Number(Key::PerPage, 7),
                _ => ParamAction::Keep,
            })
            .collect();
        let mut out = Vec::new();
        Edits::plan(&scan, &actions, query.len()).write_target(b"/p", Some(query.as_bytes()), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn cuts_leave_the_rest_byte_for_byte() {
        for (query, expected) in [
            ("private_token=x", "/p"),
            ("a=1&private_token=x&b=2", "/p?a=1&b=2"),
            ("private_token=x&b=2", "/p?b=2"),
            ("a=1&private_token=x", "/p?a=1"),
            ("private_token=x&private_token=y&b", "/p?b"),
            ("", "/p?"),
            ("private_token=x&per_page=9&private_token=y", "/p?per_page=7"),
            ("a=%41&&b=+;c", "/p?a=%41&&b=+;c"),
            // A number is plain to readers that split at `&` alone, too.
            ("per_page=1;private_token=x;z=1", "/p?per_page=7&z=1"),
            ("per_page=1;z=1", "/p?per_page=7&z=1"),
            ("per_page=1&private_token=x;z", "/p?per_page=7&z"),
            ("a;per_page=1", "/p?a;per_page=7"),
            // Cuts side by side each take one separator, whatever they are.
            ("a=1&private_token=x;private_token=y;z", "/p?a=1&z"),
            ("a;private_token=x;private_token=y;z", "/p?a;z"),
            ("a&private_token=x;private_token=y&z", "/p?a&z"),
            ("private_token=x;private_token=y;z", "/p?z"),
            ("a&private_token=x;z", "/p?a&z"),
            ("a;private_token=x&z", "/p?a&z"),
            ("&private_token=x", "/p"),
            ("page=3&private_token=x", "/p?page=3"),
        ] {
            assert_eq!(edited(query), expected, "{query}");
        }
        let mut out = Vec::new();
        let mut edits = Edits::default();
        edits.append(Key::Page, 1);
        edits.append(Key::PerPage, 20);
        edits.write_target(b"/p", None, &mut out);
        assert_eq!(out, b"/p?page=1&per_page=20");
    }

    #[test]
    fn charsets_that_leave_names_as_they_are() {
        for (content_type, safe) in [
            ("text/plain", true),
            ("text/plain; charset=utf-8", true),
            ("text/plain; charset=UTF-8", true),
            ("text/plain; charset = utf-8 ; a=b", true),
            ("text/plain; charset=\"utf-8\"", true),
            ("text/plain; charset=utf-8,x", true),
            ("text/plain; charset=utf-8\tx", true),
            ("text/plain; charset=utf-7", false),
            ("text/plain; charset=utf-16", false),
            ("text/plain; CHARSET=utf-7", false),
            ("text/plain; charset=utf-8; charset=utf-7", false),
            ("text/plain; charset=", false),
            ("text/plain; charset*=utf-8''utf-7", false),
            ("text/plain; charset", true),
            ("text/plain; charsets=utf-7", true),
            ("text/plain; charset-a=utf-7", true),
            ("text/plain; charset_a=utf-7", true),
            ("text/plain; charset.a=utf-7", true),
            ("text/plain; charset7=utf-7", true),
            ("charset=utf-7", false),
            ("xcharset=utf-7", false),
        ] {
            assert_eq!(is_read_as_ascii(content_type.as_bytes()), safe, "{content_type}");
        }
    }
}
