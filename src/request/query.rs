//! Reads a query string as Rack would, in every version of Rack that a GitLab of the v3 era ran on, and edits it
//! without touching a byte that needs no change. Pure. Knows which names matter and nothing about what they mean.

use super::target::escape;
use smallvec::SmallVec;
use std::ops::Range;

/// The parameters that a gateway must see. All others are the backend's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Token,
    Page,
    PerPage,
    Sudo,
    /// `access_token`, `bearer_token`: OAuth's.
    AccessToken,
    JobToken,
    /// `_method`, which Rack::MethodOverride obeys in a form body.
    Method,
}

/// How a name was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// The name's own bytes.
    Plain,
    /// Other bytes that Rack reads as the name: escapes, brackets that it strips.
    Variant,
    /// An array or a hash: `name[]`, `name[x]`.
    Structured,
}

/// One `name=value` of a query that carries a [`Key`].
#[derive(Debug)]
pub struct Param<'a> {
    pub key: Key,
    pub spelling: Spelling,
    /// The bytes behind `=`, still encoded; `None` without `=`, which Rack reads as nil.
    pub value: Option<&'a [u8]>,
    /// A `;` stands on one side of it: Rack 1 and 2 split there, Rack 3 does not.
    pub beside_semicolon: bool,
    /// Where it stands in the query, without separators.
    pub range: Range<usize>,
}

pub type Params<'a> = SmallVec<[Param<'a>; 4]>;

/// The names that [`Key`]s go by. Only the token's is a matter of configuration.
#[derive(Clone, Debug)]
pub struct Names {
    pub token: String,
}

impl Names {
    /// Which key a name stands for when Rack reads it, and how it was spelled. The name is still encoded.
    pub fn key_of(&self, name: &[u8]) -> Option<(Key, Spelling)> {
        if !name.iter().any(|b| matches!(b, 0..=b' ' | b'%' | b'+' | b'[' | b']')) {
            return self.exact(name).map(|key| (key, Spelling::Plain));
        }
        self.key_of_decoded(&form_decode(name))
    }

    /// The same for a name that is plain text already, as in a multipart body.
    pub fn key_of_decoded(&self, decoded: &[u8]) -> Option<(Key, Spelling)> {
        let is_bracket = |b: u8| matches!(b, b'[' | b']');
        let is_blank = |b: u8| matches!(b, 0 | b' ' | 9..=13);
        let start = decoded.iter().position(|b| !is_bracket(*b) && !is_blank(*b)).unwrap_or(decoded.len());
        let end = decoded[start..].iter().position(|b| is_bracket(*b)).map_or(decoded.len(), |at| start + at);
        let blanks_behind = decoded[start..end].iter().rev().take_while(|b| is_blank(**b)).count();
        let (core, rest) = (&decoded[start..end - blanks_behind], &decoded[end..]);
        let blanks = blanks_behind > 0 || decoded[..start].iter().any(|b| is_blank(*b));
        let spelling = match rest {
            [] if start == 0 && !blanks => Spelling::Plain,
            _ if rest.iter().all(|b| *b == b']') => Spelling::Variant,
            _ => Spelling::Structured,
        };
        // Blanks around a credential's name are read differently by different parsers; a page key with blanks is
        // another key to all of them.
        match self.exact(core)? {
            Key::Page | Key::PerPage if blanks => None,
            key => Some((key, spelling)),
        }
    }

    /// The key that goes by exactly this name.
    pub fn exact(&self, name: &[u8]) -> Option<Key> {
        match name {
            b"page" => Some(Key::Page),
            b"per_page" => Some(Key::PerPage),
            b"sudo" => Some(Key::Sudo),
            b"access_token" | b"bearer_token" => Some(Key::AccessToken),
            b"job_token" => Some(Key::JobToken),
            b"_method" => Some(Key::Method),
            _ if name == self.token.as_bytes() => Some(Key::Token),
            _ => None,
        }
    }
}

/// What a query holds that matters here.
#[derive(Debug, Default)]
pub struct Scan<'a> {
    pub params: Params<'a>,
    /// Where the first parameter stands that is none of ours; the query's end if there is none.
    first_other: usize,
}

/// Splits a query at `&` and `;` and picks out the parameters with a [`Key`].
pub fn scan<'a>(query: &'a [u8], names: &Names) -> Scan<'a> {
    let mut found = Scan { params: Params::new(), first_other: usize::MAX };
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
                let beside_semicolon = query.get(end) == Some(&b';') || (start > 0 && query[start - 1] == b';');
                found.params.push(Param { key, spelling, value, beside_semicolon, range: start..end });
            }
            None => found.first_other = found.first_other.min(start),
        }
        if end == query.len() {
            return found;
        }
        start = end + 1;
    }
}

/// What becomes of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Keep,
    Drop,
    /// Write it as `page=N` or `per_page=N`.
    Number(Key, u64),
}

/// One change to a query: the bytes of `range` give way to `with`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    range: Range<usize>,
    with: Option<(Key, u64)>,
}

/// All changes to one query, in order and apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    changes: SmallVec<[Edit; 4]>,
    appended: SmallVec<[(Key, u64); 2]>,
}

impl Edits {
    /// Works out what to cut so that the separators stay right, given what becomes of each parameter of the scan.
    pub fn plan(scan: &Scan<'_>, fates: &[Fate], query_len: usize) -> Self {
        let mut edits = Self::default();
        let mut first_kept = scan.first_other;
        for (param, fate) in scan.params.iter().zip(fates) {
            let Range { start, end } = param.range;
            match fate {
                Fate::Keep => first_kept = first_kept.min(start),
                Fate::Number(key, number) => {
                    first_kept = first_kept.min(start);
                    edits.changes.push(Edit { range: start..end, with: Some((*key, *number)) });
                }
                // A cut takes one separator along: the one before, or the one behind while nothing stands before.
                Fate::Drop => {
                    let range = if first_kept < start { start - 1..end } else { start..(end + 1).min(query_len) };
                    edits.changes.push(Edit { range, with: None });
                }
            }
        }
        edits
    }

    /// Adds a parameter at the end, also to a target that has no query.
    pub fn append(&mut self, key: Key, number: u64) {
        self.appended.push((key, number));
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.appended.is_empty()
    }

    /// Writes the target with the changes made. A query that the changes leave empty loses its `?`.
    pub fn write_target(&self, path: &[u8], query: Option<&[u8]>, out: &mut Vec<u8>) {
        out.extend_from_slice(path);
        let question_mark = out.len();
        if let Some(query) = query {
            out.push(b'?');
            let mut done = 0;
            for Edit { range, with } in &self.changes {
                out.extend_from_slice(&query[done..range.start]);
                if let Some((key, number)) = with {
                    write_number(*key, *number, out);
                }
                done = range.end;
            }
            out.extend_from_slice(&query[done..]);
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

/// `application/x-www-form-urlencoded` decoding: `+` is a space, `%hh` a byte. A bad escape stays as it is; the target
/// check has refused those before anything is decided on a query.
pub fn form_decode(bytes: &[u8]) -> SmallVec<[u8; 64]> {
    let mut out = SmallVec::new();
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
        assert_eq!(names().key_of(b"per_page+"), None);
    }

    /// Drops every token parameter and sets every `per_page` to 7.
    fn edited(query: &str) -> String {
        let scan = scan(query.as_bytes(), &names());
        let fates: Vec<Fate> = scan
            .params
            .iter()
            .map(|p| match p.key {
                Key::Token => Fate::Drop,
                Key::PerPage => Fate::Number(Key::PerPage, 7),
                _ => Fate::Keep,
            })
            .collect();
        let mut out = Vec::new();
        Edits::plan(&scan, &fates, query.len()).write_target(b"/p", Some(query.as_bytes()), &mut out);
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
            ("per_page=1;private_token=x;z=1", "/p?per_page=7;z=1"),
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
}
