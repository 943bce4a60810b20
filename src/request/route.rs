//! A route: the requests that it is for, by path, host and method, and what is asked of them. Pure; knows no identities.
//! `routes` finds the one of a request.

use super::host::HostPattern;
use super::origin::AddressRules;
use super::token::{OtherKind, TakesBasic};
use super::view::Method;
use crate::problem::Problem;
use siphasher::sip::SipHasher13;
use std::hash::Hasher as _;
use std::time::Duration;

/// A path pattern: literal segments, `:name` for any one segment, and a final `*` for everything below.
/// `/` alone matches every path, like nginx's `location /`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    pub(super) segments: Vec<Segment>,
    pub(super) below: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Segment {
    Any,
    Literal(Vec<u8>),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("a pattern begins with `/`")]
    NoLeadingSlash,
    #[error("`*` matches the rest of the path and must come last")]
    StarInside,
    #[error(
        "write the pattern in its canonical form: no `//`, no trailing `/`, no `.json`, no escapes of plain letters, other \
         escapes in capitals, and none of `[]|^`"
    )]
    NotCanonical,
}

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let path = text.strip_prefix('/').ok_or(PatternError::NoLeadingSlash)?;
        if path.is_empty() || path == "*" {
            return Ok(Self::everything());
        }
        let (path, below) = path.strip_suffix("/*").map_or((path, false), |stem| (stem, true));
        if super::target::canonical(text.as_bytes()).as_ref() != text.as_bytes()
            || super::target::check(text.as_bytes()).is_err()
            || super::target::has_two_forms(text.as_bytes())
        {
            return Err(PatternError::NotCanonical);
        }
        let segments = path
            .split('/')
            .map(|segment| match segment {
                "*" => Err(PatternError::StarInside),
                _ if segment.starts_with(':') => Ok(Segment::Any),
                _ => Ok(Segment::Literal(segment.as_bytes().to_vec())),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { segments, below })
    }
}

impl Pattern {
    /// Every path.
    pub const fn everything() -> Self {
        Self { segments: Vec::new(), below: true }
    }

    /// A prefix and everything below it, as in `[api] prefixes`.
    pub fn subtree(prefix: &str) -> Result<Self, PatternError> {
        let mut pattern: Self = prefix.parse()?;
        pattern.below = true;
        Ok(pattern)
    }

    /// Expects the canonical form of a path. A `*` also matches the path above it: `/a/*` matches `/a`.
    pub fn matches(&self, canonical: &[u8]) -> bool {
        let mut rest = canonical;
        for segment in &self.segments {
            let Some(tail) = rest.strip_prefix(b"/") else { return false };
            let end = memchr::memchr(b'/', tail).unwrap_or(tail.len());
            let fits = match segment {
                Segment::Any => end > 0,
                Segment::Literal(literal) => &tail[..end] == literal.as_slice(),
            };
            if !fits {
                return false;
            }
            rest = &tail[end..];
        }
        self.below || rest.is_empty()
    }

    pub fn is_everything(&self) -> bool {
        self.segments.is_empty()
    }

    /// Whether some path matches both.
    pub fn meets(&self, other: &Self) -> bool {
        let differ = |(a, b): (&Segment, &Segment)| a != b && *a != Segment::Any && *b != Segment::Any;
        let (own, others) = (self.segments.len(), other.segments.len());
        let goes_on = own == others || if own < others { self.below } else { other.below };
        goes_on && !self.segments.iter().zip(&other.segments).any(differ)
    }

    /// Whether every path that matches the other one matches this one.
    pub fn covers(&self, other: &Self) -> bool {
        let (own, others) = (self.segments.len(), other.segments.len());
        let is_met = |(a, b): (&Segment, &Segment)| *a == Segment::Any || a == b;
        let ends = self.below || (own == others && !other.below);
        own <= others && ends && self.segments.iter().zip(&other.segments).all(is_met)
    }

    /// Whether it comes first by its shape, whatever its literals are.
    fn is_narrower(&self, than: &Self) -> bool {
        let shape = |pattern: &Self| (pattern.segments.len(), !pattern.below);
        let literal = |segment: &Segment| *segment != Segment::Any;
        shape(self)
            .cmp(&shape(than))
            .then_with(|| self.segments.iter().map(literal).cmp(than.segments.iter().map(literal)))
            .is_gt()
    }

    /// Orders patterns from wide to narrow: more segments, then an exact end, then literals before `:name`.
    pub(super) fn specificity(&self) -> (usize, bool, &[Segment]) {
        (self.segments.len(), !self.below, &self.segments)
    }
}

/// Whether a request needs a valid token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// A valid token is needed.
    Required,
    /// A request without a token is forwarded without one. A token that is present is validated.
    Optional,
    /// No lookup. Tokens are removed, unless `pass_token`.
    None { pass_token: bool },
}

#[derive(Clone, Debug)]
pub struct Route {
    pub pattern: Pattern,
    /// The pattern as it was written: log field and metric label.
    pub name: String,
    /// Where it stands in the configuration, for people: `route[0]`, `api.prefixes[0]`.
    pub at: String,
    /// None: every host.
    pub hosts: Vec<HostPattern>,
    pub methods: Methods,
    pub auth: Auth,
    /// Why this route may be reached without a token; empty where one is required.
    pub reason: String,
    /// Refuse tokens in the query on this route.
    pub refuse_query_token: bool,
    /// A token is accepted as the password of HTTP Basic, and goes on as one.
    pub basic: bool,
    /// Credentials of other kinds that pass in the token's place, for the backend to check.
    pub unchecked: Vec<OtherKind>,
    /// Which `[[upstream]]` serves it, by its place in the configuration.
    pub upstream: usize,
    /// Other upstreams for tokens with a scope; the first one that fits.
    pub pools: Vec<ScopePool>,
    /// Another upstream that takes a share of what `upstream` would get.
    pub canary: Option<Canary>,
    /// Whom it is for, by address, among those whom the gateway lets in at all.
    pub addresses: AddressRules,
    /// The largest body; `None`: no limit.
    pub body_bytes: Option<u64>,
    /// In place of the upstream's own.
    pub timeouts: RouteTimeouts,
    /// What stands in place of the pattern's first segments when the request is forwarded.
    pub rewrite: Option<PrefixRewrite>,
    /// Of the request as the backend gets it, and of the backend's answer. What they may name is said by `forward` and `reply`.
    pub request_headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    /// The route's own place in the table; [`Routes::new`](super::routes::Routes::new) sets it.
    pub index: usize,
}

/// The upstream for tokens with a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScopePool {
    pub scope: String,
    pub upstream: usize,
}

/// What a request's side is chosen by. One without it goes to the main upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CanaryBy {
    User,
    Token,
    /// By chance.
    Request,
}

/// A share of a route's requests for another upstream.
#[derive(Clone, Debug)]
pub struct Canary {
    pub upstream: usize,
    pub by: CanaryBy,
    /// Of 2³², so that all of it is more than any hash.
    share: u64,
    hash: SipHasher13,
}

impl Canary {
    /// `name`: the upstream's. All routes with the same canary, on all gateways, send a key to the same side. `share`: from 0 to 1.
    pub fn new(upstream: usize, name: &str, by: CanaryBy, share: f64) -> Self {
        let mut hash = SipHasher13::new();
        hash.write(name.as_bytes());
        hash.write(b"\0canary\0");
        Self { upstream, by, share: (share * SHARES as f64).round() as u64, hash }
    }

    /// From 0 to 1.
    pub fn share(&self) -> f64 {
        self.share as f64 / SHARES as f64
    }

    /// Whether a key belongs to the canary. A larger share keeps all keys of a smaller one.
    pub fn takes(&self, key: &[u8]) -> bool {
        let mut hash = self.hash;
        hash.write(key);
        self.takes_place(hash.finish())
    }

    /// The same for any number, of which all are equally likely.
    pub fn takes_place(&self, place: u64) -> bool {
        place >> 32 < self.share
    }
}

const SHARES: u64 = 1 << 32;

/// Another prefix for the backend. What is behind it goes on byte for byte, as it was judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixRewrite {
    /// The literal segments that the pattern begins with; empty for none.
    from: Vec<u8>,
    /// Empty for `/`.
    to: Vec<u8>,
}

impl PrefixRewrite {
    /// `to`: a path in its canonical form.
    pub fn new(pattern: &Pattern, to: &str) -> Self {
        let mut from = Vec::new();
        for segment in &pattern.segments {
            let Segment::Literal(literal) = segment else { break };
            from.push(b'/');
            from.extend_from_slice(literal);
        }
        Self { from, to: to.trim_end_matches('/').into() }
    }

    /// What is behind the prefix of a path that the pattern matches. `None`: the prefix is spelled in another way than the pattern
    /// (with escapes, with `//`), or what is behind it would not be read as it was before.
    pub fn rest<'p>(&self, path: &'p [u8]) -> Option<&'p [u8]> {
        let rest = path.strip_prefix(self.from.as_slice())?;
        let goes_on = match rest {
            // Some would read a host behind `//` at the beginning.
            [b'/', b'/', ..] => !self.to.is_empty(),
            [] | [b'/', ..] => true,
            // Which is no part of the canonical form.
            _ => rest.starts_with(b".json") && !self.from.is_empty() && !self.to.is_empty(),
        };
        goes_on.then_some(rest)
    }

    /// Writes the prefix in front of what [`Self::rest`] gave.
    pub fn write_prefix(&self, rest: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(if self.to.is_empty() && rest.is_empty() { b"/" } else { &self.to });
    }
}

/// Fields that a route writes into a head in place of those of the same name, and fields that it takes out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub set: Vec<(String, String)>,
    pub remove: Vec<String>,
}

impl HeaderEdits {
    /// Whether a field of this name does not pass.
    pub fn takes_out(&self, name: &[u8]) -> bool {
        self.names().any(|known| known.as_bytes().eq_ignore_ascii_case(name))
    }

    /// What is wrong with them, beside the names that `may_name` refuses with a reason.
    pub fn problems(&self, key: &'static str, may_name: impl Fn(&str) -> Result<(), &'static str>) -> Vec<Problem> {
        let mut problems = Vec::new();
        let names: Vec<&str> = self.names().collect();
        for (place, name) in names.iter().enumerate() {
            let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            let what = match may_name(name) {
                _ if !plain => "has bytes other than letters, digits and `-`",
                _ if names[..place].iter().any(|other| other.eq_ignore_ascii_case(name)) => {
                    "is named twice; `set` replaces the field that came"
                }
                Err(why) => why,
                Ok(()) => continue,
            };
            problems.push(Problem::error(key, format!("`{}` {what}", name.escape_default()), "use another name"));
        }
        for (name, value) in &self.set {
            let visible =
                value.bytes().all(|b| (0x20..0x7f).contains(&b)) && value.trim() == value && !value.is_empty();
            if !visible {
                let what = format!(
                    "the value of `{}` is empty, or has other bytes than visible ASCII with blanks between",
                    name.escape_default()
                );
                problems.push(Problem::error(key, what, "write it like { \"X-Site\" = \"main\" }"));
            }
        }
        problems
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.set.iter().map(|(name, _)| name.as_str()).chain(self.remove.iter().map(String::as_str))
    }

    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }
}

/// `None`: the upstream's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteTimeouts {
    pub read: Option<Duration>,
    pub request: Option<RequestTimeout>,
}

/// The longest time for a whole exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestTimeout {
    After(Duration),
    Never,
}

impl Route {
    /// For all requests below a path, with a token.
    pub fn new(pattern: Pattern, name: String) -> Self {
        Self {
            pattern,
            name,
            at: String::new(),
            hosts: Vec::new(),
            methods: Methods::ALL,
            auth: Auth::Required,
            reason: String::new(),
            refuse_query_token: false,
            basic: false,
            unchecked: Vec::new(),
            upstream: 0,
            pools: Vec::new(),
            canary: None,
            addresses: AddressRules::default(),
            body_bytes: None,
            timeouts: RouteTimeouts::default(),
            rewrite: None,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            index: 0,
        }
    }

    /// Keys of a `[[route]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.addresses.problems();
        if self.auth != Auth::Required && self.reason.is_empty() {
            let what = "is missing: these paths can be reached without a token";
            let instead = "write the reason; `tollgate check` lists it with the path";
            problems.push(Problem::error("reason", what, instead));
        }
        let no_token = matches!(self.auth, Auth::None { .. });
        if !self.unchecked.is_empty() && self.reason.is_empty() && self.auth == Auth::Required {
            let what = "is missing: these paths can be reached with a credential that tollgate does not check";
            let instead = "write the reason; `tollgate check` lists it with the path";
            problems.push(Problem::error("reason", what, instead));
        }
        for (key, is_used) in [("basic", self.basic), ("unchecked", !self.unchecked.is_empty())] {
            if is_used && no_token {
                let what = "is for routes that look at tokens, and auth = \"none\" does not";
                problems.push(Problem::error(key, what, "remove it").with("auth"));
            }
        }
        if self.methods == Methods::only([]) {
            let instead = "remove it for all methods";
            problems.push(Problem::error("methods", "is empty: the route would match nothing", instead));
        }
        for (index, host) in self.hosts.iter().enumerate() {
            if let Some(first) = self.hosts[..index].iter().position(|other| other == host) {
                let problem = Problem::error("hosts", "is in the list twice", "remove one of them");
                problems.push(problem.element(index).repeats("hosts", first));
            }
        }
        if no_token && !self.pools.is_empty() {
            let what = "goes with a token, which auth = \"none\" does not look up";
            problems.push(Problem::error("pool", what, "use `upstream`").with("auth"));
        }
        if let Some(canary) = &self.canary {
            if no_token && canary.by != CanaryBy::Request {
                let what = "by: goes with a token, which auth = \"none\" does not look up";
                problems.push(Problem::error("canary", what, "use by = \"request\"").with("auth"));
            }
            if canary.upstream == self.upstream {
                let what = "upstream: is the upstream that serves the other requests of this route";
                problems.push(Problem::error("canary", what, "use another [[upstream]]").with("upstream"));
            }
        }
        let least = Duration::from_millis(1);
        problems.extend(self.timeouts.read.and_then(|time| Problem::too_short("read_timeout", time, least)));
        if let Some(RequestTimeout::After(time)) = self.timeouts.request {
            problems.extend(Problem::too_short("request_timeout", time, least));
        }
        problems
    }

    /// Whether it is for fewer paths than the other one, by the shape of its pattern, and keeps out somebody who may pass there.
    pub(super) fn guards_within(&self, wide: &Self) -> bool {
        (self.openness() < wide.openness() || self.guards_beside_token(wide)) && self.pattern.is_narrower(&wide.pattern)
    }

    /// More of it lets in more requests.
    pub(super) fn openness(&self) -> u8 {
        match self.auth {
            Auth::Required => 0,
            Auth::Optional => 1,
            Auth::None { .. } => 2,
        }
    }

    /// Whether somebody with a valid token may be kept out here, or somebody without one let in there, by other rules than `auth`.
    pub(super) fn guards_beside_token(&self, wide: &Self) -> bool {
        let checks = |kind: &OtherKind| !self.unchecked.contains(kind);
        (!matches!(self.auth, Auth::None { .. }) && wide.unchecked.iter().any(checks))
            || (self.addresses != AddressRules::default() && self.addresses != wide.addresses)
    }

    /// What the password of HTTP Basic can be.
    pub fn takes_basic(&self) -> TakesBasic {
        TakesBasic { token: self.basic, job: self.basic && self.unchecked.contains(&OtherKind::Job) }
    }

    /// Whether a request could match both with the same precedence.
    pub fn answers_the_same(&self, other: &Self) -> bool {
        let same_hosts = (self.hosts.is_empty() && other.hosts.is_empty())
            || self.hosts.iter().any(|host| other.hosts.contains(host));
        self.pattern == other.pattern && same_hosts && self.methods.overlaps(other.methods)
    }

    /// The pass-through for everything outside the API: what a browser sends to a web page is forwarded unchanged,
    /// including cookies and forms. Never true where a token is judged: there the whole request must act for that one
    /// identity.
    pub fn is_web_page(&self) -> bool {
        self.pattern.is_everything() && matches!(self.auth, Auth::None { .. })
    }
}

/// A set of methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Methods(u8);

impl Methods {
    pub const ALL: Self = Self(0x7f);

    pub fn only(methods: impl IntoIterator<Item = Method>) -> Self {
        Self(methods.into_iter().filter(|m| *m != Method::Other).fold(0, |set, m| set | 1 << m.index()))
    }

    pub fn has(self, method: Method) -> bool {
        self.0 & (1 << method.index()) != 0
    }

    pub fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Method::FORWARDED.into_iter().filter(move |m| self.has(*m)).map(Method::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_that_meet_or_cover_each_other() {
        let of = |text: &str| text.parse::<Pattern>().unwrap();
        let all = ["/", "/a", "/a/*", "/:x", "/:x/*", "/a/b", "/a/:x", "/a/:x/*", "/b/c", "/a/b/c"];
        let paths = ["/", "/a", "/b", "/x", "/a/b", "/a/c", "/b/c", "/x/y", "/a/b/c", "/a/c/d", "/x/y/z", "/b/c/d/e"];
        let (mut met, mut covered) = (0, 0);
        for one in all {
            for other in all {
                let both = |path: &str| of(one).matches(path.as_bytes()) && of(other).matches(path.as_bytes());
                assert_eq!(of(one).meets(&of(other)), paths.iter().copied().any(both), "{one} {other}");
                let within = |path: &str| !of(other).matches(path.as_bytes()) || of(one).matches(path.as_bytes());
                assert_eq!(of(one).covers(&of(other)), paths.iter().copied().all(within), "{one} {other}");
                met += usize::from(of(one).meets(&of(other)));
                covered += usize::from(of(one).covers(&of(other)));
            }
        }
        assert!(met > 40 && covered > 25, "{met} {covered}");
    }

    #[test]
    fn a_share_is_met_and_only_grows_by_new_keys() {
        let keys: Vec<String> = (0..100_000).map(|number| format!("user-{number}")).collect();
        let of = |name: &str, share| {
            let canary = Canary::new(1, name, CanaryBy::User, share);
            keys.iter().map(|key| canary.takes(key.as_bytes())).collect::<Vec<bool>>()
        };
        let count = |taken: &[bool]| taken.iter().filter(|taken| **taken).count();
        let mut before = vec![false; keys.len()];
        for share in [0.0, 0.0001, 0.01, 0.05, 0.5, 0.95, 1.0] {
            let taken = of("next", share);
            assert_eq!(taken, of("next", share), "the same key, the same side");
            assert!(
                before.iter().zip(&taken).all(|(before, after)| after >= before),
                "a key left the canary at {share}"
            );
            // Five standard deviations.
            let (expected, spread) = (share * 100_000.0, 5.0 * (100_000.0 * share * (1.0 - share)).sqrt());
            let count = count(&taken) as f64;
            assert!((count - expected).abs() <= spread, "{count} at {share}");
            before = taken;
        }
        // Another canary tries other users: a quarter of all has both.
        let both = of("next", 0.5).iter().zip(of("other", 0.5)).filter(|(one, other)| **one && *other).count();
        assert!((24_000..26_000).contains(&both), "{both}");
        // All gateways of a fleet, whatever their version, agree.
        let known: String = of("next", 0.5)[..24].iter().map(|taken| if *taken { '1' } else { '0' }).collect();
        assert_eq!(known, "100010110111010100111001");
    }

    #[test]
    fn a_prefix_is_replaced_where_it_is_spelled_as_the_pattern() {
        for (pattern, to, path, expected) in [
            ("/api/v3/*", "/internal/api", "/api/v3/a//b%2Fc/", Some("/internal/api/a//b%2Fc/")),
            ("/api/v3/*", "/internal/api", "/api/v3", Some("/internal/api")),
            ("/api/v3/*", "/internal/api", "/api/v3/", Some("/internal/api/")),
            ("/api/v3/*", "/internal/api", "/api/v3.json", Some("/internal/api.json")),
            ("/api/v3/*", "/internal/api", "/api/v3//x", Some("/internal/api//x")),
            ("/api/v3/*", "/", "/api/v3/x", Some("/x")),
            ("/api/v3/*", "/", "/api/v3", Some("/")),
            ("/api/v3/*", "/", "/api/v3/", Some("/")),
            ("/api/v3/*", "/", "/api/v3.json", None),
            ("/api/v3/*", "/", "/api/v3//host/x", None),
            ("/api/:v/x", "/y", "/api/v3/x.json", Some("/y/v3/x.json")),
            ("/", "/y", "/a", Some("/y/a")),
            ("/", "/y", "/", Some("/y/")),
            ("/", "/y", "*", None),
            ("/:a", "/", "//a", None),
            ("/api/v3/*", "/x", "/%61pi/v3/a", None),
            ("/api/v3/*", "/x", "//api/v3/a", None),
            ("/api/v3/*", "/x", "/api//v3/a", None),
            ("/api/v3/*", "/x", "/api/v3%2Ejson", None),
        ] {
            let rewrite = PrefixRewrite::new(&pattern.parse().unwrap(), to);
            let written = rewrite.rest(path.as_bytes()).map(|rest| {
                let mut out = Vec::new();
                rewrite.write_prefix(rest, &mut out);
                String::from_utf8([&out, rest].concat()).unwrap()
            });
            assert_eq!(written.as_deref(), expected, "{pattern} {to} {path}");
        }
    }

    #[test]
    fn patterns_are_canonical() {
        for bad in ["api", "/a/", "/a//b", "/a.json", "/%61", "/a/*/b", "/a/../b", "/a[b]", "/a|b", "/a%5Eb", "/a%2fb"]
        {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }
}
