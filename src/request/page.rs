//! Keeps `page` and `per_page` within bounds, parsing them as the backend does (Ruby's `String#to_i`) so that both see
//! the same number. Pure: decides on an action for each parameter; `query` writes the result.

use super::query::{Key, Param, ParamAction, Scan, Spelling, form_decode};
use super::route::Pattern;
use crate::problem::Problem;
use smallvec::SmallVec;

/// GitLab's own bounds: the configuration of Kaminari in every release with API v3.
pub const DEFAULT_PER_PAGE: u64 = 20;
pub const MAX_PER_PAGE: u64 = 100;

/// No `page` and no `per_page` above this is forwarded, whatever is configured: the product of two such numbers fits
/// a 64-bit OFFSET (PostgreSQL returns an error for larger ones), and each fits a 32-bit signed integer.
pub const HIGHEST: u64 = i32::MAX as u64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRules {
    pub first_page: u64,
    pub default_per_page: u64,
    /// `None`: bounded by [`HIGHEST`] only.
    pub max_per_page: Option<u64>,
    /// `None`: bounded by [`HIGHEST`] only.
    pub max_page: Option<u64>,
    pub too_deep: TooDeep,
    pub inject_defaults: bool,
}

impl PageRules {
    /// Keys of `[pagination]` and of `[[pagination.route]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let highest = format!("use at most {HIGHEST}, the highest number that is forwarded");
        for (key, value) in [("first_page", self.first_page), ("default_per_page", self.default_per_page)] {
            if value > HIGHEST {
                problems.push(Problem::error(key, "is out of range", highest.clone()));
            }
        }
        if self.default_per_page == 0 {
            problems.push(Problem::error("default_per_page", "is out of range", "use 1 or more"));
        }
        if self.max_per_page.is_some_and(|max| max < self.default_per_page) {
            let what = "is less than default_per_page";
            let instead = format!("use {} or more, or a lower default_per_page", self.default_per_page);
            problems.push(Problem::error("max_per_page", what, instead).with("default_per_page"));
        }
        if self.max_page.is_some_and(|max| max < self.first_page) {
            let instead = format!("use {} or more: no page would be left", self.first_page);
            problems.push(Problem::error("max_page", "is below first_page", instead).with("first_page"));
        }
        problems
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooDeep {
    Clamp,
    Refuse,
}

/// The page rules for each path.
#[derive(Clone, Debug)]
pub struct Pagination {
    pub default: PageRules,
    /// In the order of the configuration; the first match applies. `None` turns the checks off for the path.
    pub overrides: Vec<(Pattern, Option<PageRules>)>,
}

impl Pagination {
    pub fn rules_for(&self, canonical: &[u8]) -> Option<&PageRules> {
        let overriding = self.overriding(canonical).and_then(|place| self.overrides.get(place));
        overriding.map_or(Some(&self.default), |(_, rules)| rules.as_ref())
    }

    /// The place of the override that applies.
    pub fn overriding(&self, canonical: &[u8]) -> Option<usize> {
        self.overrides.iter().position(|(pattern, _)| pattern.matches(canonical))
    }
}

/// Which parameters were changed, for the metric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clamped {
    pub page: bool,
    pub per_page: bool,
}

/// The page is beyond `max_page`, with `beyond_max_page = "refuse"`.
#[derive(Debug, PartialEq, Eq)]
pub struct PastDepth;

/// Parameters to append to the query.
pub type Appended = SmallVec<[(Key, u64); 2]>;

/// Decides on every page parameter of a scan and leaves the actions of the others unchanged. Also returns what to
/// append.
pub fn settle(
    scan: &Scan<'_>,
    actions: &mut [ParamAction],
    rules: &PageRules,
    query: &[u8],
) -> Result<(Clamped, Appended), PastDepth> {
    let mut append = SmallVec::new();
    let page = settle_key(scan, actions, Key::Page, |number| rules.page(number))?;
    let per_page = settle_key(scan, actions, Key::PerPage, |number| Ok(rules.per_page(number)))?;
    if rules.inject_defaults {
        // A list by keys goes on behind a cursor, and has no numbers.
        if page.is_none() && !is_keyset(query) {
            append.push((Key::Page, rules.first_page));
        }
        if per_page.is_none() {
            append.push((Key::PerPage, rules.default_per_page));
        }
    }
    Ok((Clamped { page: page == Some(true), per_page: per_page == Some(true) }, append))
}

/// Whether a query asks for GitLab's keyset pagination, in whatever spelling.
fn is_keyset(query: &[u8]) -> bool {
    query.split(|b| matches!(b, b'&' | b';')).any(|segment| {
        let (name, value) = segment.split_at(memchr::memchr(b'=', segment).unwrap_or(segment.len()));
        match &*form_decode(name) {
            b"pagination" => &*form_decode(value) == b"=keyset",
            name => name == b"cursor",
        }
    })
}

/// The last scalar that Rack reads is kept. Every other one, every array or hash, and every spelling that only other
/// parsers read as this key is dropped, so that all parsers see one plain number or none. Returns whether a parameter
/// of this key changed, or `None` if no scalar is left.
fn settle_key(
    scan: &Scan<'_>,
    actions: &mut [ParamAction],
    key: Key,
    bound: impl Fn(i64) -> Result<u64, PastDepth>,
) -> Result<Option<bool>, PastDepth> {
    let read = |param: &Param<'_>| matches!(param.spelling, Spelling::Plain | Spelling::Variant);
    let last = scan.params.iter().rposition(|param| param.key == key && read(param));
    let mut changed = false;
    for (index, (param, action)) in
        scan.params.iter().zip(actions.iter_mut()).enumerate().filter(|(_, (p, _))| p.key == key)
    {
        if Some(index) == last {
            let wanted = bound(param.value.map_or(0, |raw| to_i(&form_decode(raw))))?;
            if !is_plain_number(param, wanted) {
                *action = ParamAction::Number(key, wanted);
            }
        } else {
            *action = ParamAction::Drop;
        }
        changed |= *action != ParamAction::Keep;
    }
    Ok(last.map(|_| changed))
}

/// Whether every parser reads the parameter's bytes as this number, so that nothing needs to change.
fn is_plain_number(param: &Param<'_>, number: u64) -> bool {
    let plain = |digits: &[u8]| {
        !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) && (digits.len() == 1 || digits[0] != b'0')
    };
    param.spelling == Spelling::Plain
        && !param.ends_at_semicolon
        && param.value.is_some_and(|raw| plain(raw) && u64::try_from(to_i(raw)) == Ok(number))
}

impl PageRules {
    fn page(&self, asked: i64) -> Result<u64, PastDepth> {
        let page = u64::try_from(asked).unwrap_or(0).max(self.first_page);
        let depth = self.max_page.unwrap_or(HIGHEST).min(HIGHEST);
        if page > depth && self.too_deep == TooDeep::Refuse { Err(PastDepth) } else { Ok(page.min(depth)) }
    }

    fn per_page(&self, asked: i64) -> u64 {
        match u64::try_from(asked) {
            Ok(0) | Err(_) => self.default_per_page,
            Ok(number) => number.min(self.max_per_page.unwrap_or(HIGHEST)).min(HIGHEST),
        }
    }
}

/// Ruby's `String#to_i`: leading white space, a sign, digits with single `_` between them. The rest is ignored; without
/// any digit the result is 0. Numbers that do not fit in 64 bits saturate.
pub fn to_i(text: &[u8]) -> i64 {
    let start = text.iter().position(|b| !matches!(b, b' ' | 9..=13)).unwrap_or(text.len());
    let (negative, digits) = match &text[start..] {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let mut number: i64 = 0;
    let mut after_digit = false;
    for byte in digits {
        match byte {
            b'0'..=b'9' => {
                number = number.saturating_mul(10).saturating_add(i64::from(byte - b'0'));
                after_digit = true;
            }
            b'_' if after_digit => after_digit = false,
            _ => break,
        }
    }
    if negative { -number } else { number }
}

#[cfg(test)]
mod tests {
    use super::super::query::{Edits, Names, scan};
    use super::*;

    fn rules() -> PageRules {
        PageRules {
            first_page: 1,
            default_per_page: 20,
            max_per_page: Some(100),
            max_page: None,
            too_deep: TooDeep::Clamp,
            inject_defaults: false,
        }
    }

    fn settled(query: &str, rules: &PageRules) -> Result<String, PastDepth> {
        let scan = scan(query.as_bytes(), &Names { token: "private_token".into() });
        let mut actions = vec![ParamAction::Keep; scan.params.len()];
        let (_, append) = settle(&scan, &mut actions, rules, query.as_bytes())?;
        let mut edits = Edits::plan(&scan, &actions, query.len());
        append.into_iter().for_each(|(key, number)| edits.append(key, number));
        let mut out = Vec::new();
        edits.write_target(b"", Some(query.as_bytes()), &mut out);
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn numbers_as_ruby_reads_them() {
        for (text, number) in [
            ("5", 5),
            ("5abc", 5),
            ("5.9", 5),
            ("+5", 5),
            (" 5", 5),
            ("\t5", 5),
            ("\n5", 5),
            ("5\n", 5),
            ("1_0", 10),
            ("010", 10),
            ("1e9", 1),
            ("0x10", 0),
            ("", 0),
            ("abc", 0),
            ("--5", 0),
            ("-5", -5),
            ("1__0", 1),
            ("_1", 0),
            ("2\u{0}", 2),
            ("+ 5", 0),
            ("\u{ff15}", 0),
            ("99999999999999999999", i64::MAX),
        ] {
            assert_eq!(to_i(text.as_bytes()), number, "{text:?}");
        }
    }

    #[test]
    fn bounds() {
        for (query, expected) in [
            ("per_page=5000", "?per_page=100"),
            ("per_page=100", "?per_page=100"),
            ("per_page=101&x=1", "?per_page=100&x=1"),
            ("per_page=0", "?per_page=20"),
            ("per_page=-5", "?per_page=20"),
            ("per_page=all", "?per_page=20"),
            ("per_page=", "?per_page=20"),
            ("per_page", "?per_page=20"),
            ("per_page=%0a5", "?per_page=5"),
            ("per_page=%2B500", "?per_page=100"),
            ("per_page=1_0", "?per_page=10"),
            ("per_page=05", "?per_page=5"),
            ("per_page=99999999999999999999", "?per_page=100"),
            ("page=0", "?page=1"),
            ("page=-1", "?page=1"),
            ("page=abc", "?page=1"),
            ("page=2", "?page=2"),
            ("page=2abc", "?page=2"),
            ("page=1e9", "?page=1"),
            ("page=99999999999999999999", "?page=2147483647"),
            ("page=1000000000", "?page=1000000000"),
            ("a=1&page=3&per_page=50&b=2", "?a=1&page=3&per_page=50&b=2"),
        ] {
            assert_eq!(settled(query, &rules()).unwrap(), expected, "{query}");
        }
    }

    #[test]
    fn one_plain_parameter_is_left() {
        for (query, expected) in [
            ("per_page=5&per_page=6", "?per_page=6"),
            ("per_page=5;per_page=600", "?per_page=100"),
            ("per_page[]=5", ""),
            ("per_page[a]=5&x=1", "?x=1"),
            ("per_page=5&per_page[]=6", "?per_page=5"),
            ("per_page]=500", "?per_page=100"),
            ("[per_page]=5", "?per_page=5"),
            ("per%5Fpage=500", "?per_page=100"),
            ("x=1;per_page=500", "?x=1;per_page=100"),
            ("Per_Page=500&per-page=500", "?Per_Page=500&per-page=500"),
            // Parsers that split at `&` alone read a `;` after the number as a part of it.
            ("per_page=5;x=1", "?per_page=5&x=1"),
            ("per_page=500;page=3;x=1", "?per_page=100&page=3&x=1"),
            // Different names to Rack: none of them may replace what it reads, or reach parsers that fold them into the
            // key.
            ("per.page=500", ""),
            ("per_page=5&per.page=500", "?per_page=5"),
            ("per+page=500&x=1", "?x=1"),
            ("+page=7", ""),
            ("page%20=7&page=3", "?page=3"),
            ("page%00x=7", ""),
            ("page%00;x=7", "?x=7"),
            ("per%5bpage=500", ""),
            ("page.x=7&perpage=500&page_=1", "?page.x=7&perpage=500&page_=1"),
        ] {
            assert_eq!(settled(query, &rules()).unwrap(), expected, "{query}");
        }
    }

    #[test]
    fn route_overrides() {
        let commits = PageRules { first_page: 0, max_per_page: None, ..rules() };
        assert_eq!(settled("page=0&per_page=5000", &commits).unwrap(), "?page=0&per_page=5000");
        assert_eq!(settled("page=-3", &commits).unwrap(), "?page=0");
        let deep = PageRules { max_page: Some(50), ..rules() };
        assert_eq!(settled("page=51", &deep).unwrap(), "?page=50");
        assert_eq!(settled("page=51", &PageRules { too_deep: TooDeep::Refuse, ..deep }), Err(PastDepth));
        // No configuration lets a number exceed a 32-bit signed integer.
        let deepest = PageRules { max_page: Some(u64::MAX), max_per_page: Some(u64::MAX), ..rules() };
        for query in ["page=2147483648&per_page=2147483648", "page=9223372036854775807&per_page=99999999999999999999"] {
            assert_eq!(settled(query, &deepest).unwrap(), "?page=2147483647&per_page=2147483647");
            let refuse = PageRules { too_deep: TooDeep::Refuse, ..deepest.clone() };
            assert_eq!(settled(query, &refuse), Err(PastDepth));
        }
        assert_eq!(settled("page=2147483647", &deepest).unwrap(), "?page=2147483647");
        let inject = PageRules { inject_defaults: true, ..rules() };
        assert_eq!(settled("x=1", &inject).unwrap(), "?x=1&page=1&per_page=20");
        assert_eq!(settled("per_page=7", &inject).unwrap(), "?per_page=7&page=1");
    }

    #[test]
    fn a_list_by_keys_gets_no_page() {
        let rules = PageRules { inject_defaults: true, ..rules() };
        for (query, forwarded) in [
            ("a=1", "a=1&page=1&per_page=20"),
            ("pagination=keyset", "pagination=keyset&per_page=20"),
            ("pagination=keyset&per_page=500", "pagination=keyset&per_page=100"),
            ("%70agination=key%73et&id_after=7", "%70agination=key%73et&id_after=7&per_page=20"),
            ("cursor=eyJpZCI6MX0&order_by=id", "cursor=eyJpZCI6MX0&order_by=id&per_page=20"),
            ("pagination=offset", "pagination=offset&page=1&per_page=20"),
            ("pagination=keyset&page=3", "pagination=keyset&page=3&per_page=20"),
        ] {
            assert_eq!(settled(query, &rules), Ok(format!("?{forwarded}")), "{query}");
        }
    }
}
