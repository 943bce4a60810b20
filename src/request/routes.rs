//! All routes, and the index that finds the one of a request: its cost depends on the path, and hardly on how many routes there
//! are. Pure; knows no identities.
//!
//! Of the routes that match a request, the one with the most specific path applies; of these, the one with the most specific
//! host: a name, then `*.` before most labels, then every host. The path comes first because clients choose their Host: a route
//! for a host and all paths must not open a path that has a route of its own. So a wider route never takes a request from a
//! narrower one; a route with several hosts is as many routes with one each. Two routes of the same rank for one request are an
//! error of the configuration ([`Route::answers_the_same`]).

use super::host::{self, ByHost};
use super::origin::AddressRules;
use super::readings;
use super::route::{Auth, Route, Segment};
use super::view::Method;
use std::borrow::Cow;

#[derive(Clone, Debug)]
pub struct Routes {
    /// The most specific path first.
    routes: Vec<Route>,
    tree: Tree,
    /// `None`: no route guards more than a wider one.
    guards: Option<Guards>,
    any_hosts: bool,
}

/// To find whether a path that came on an open route has another reading.
#[derive(Clone, Debug)]
struct Guards {
    /// By the route's place: whether a narrower one may guard more.
    wide: Vec<bool>,
    /// The patterns in the form of [`readings::fold`].
    tree: Tree,
    /// All patterns have that form.
    are_plain: bool,
}

impl Guards {
    /// `routes`: the narrowest first.
    fn of(routes: &[Route]) -> Option<Self> {
        let (mut least_open, mut by_address) = (u8::MAX, false);
        let is_wide = |route: &Route| {
            let is_wide = least_open < route.openness() || by_address || !route.unchecked.is_empty();
            least_open = least_open.min(route.openness());
            by_address |= route.addresses != AddressRules::default();
            is_wide
        };
        let wide: Vec<bool> = routes.iter().map(is_wide).collect();
        let is_plain = |segment: &Segment| match segment {
            Segment::Any => true,
            Segment::Literal(literal) => readings::is_plain(literal),
        };
        wide.contains(&true).then(|| Self {
            wide,
            tree: Tree::new(routes, readings::fold),
            are_plain: routes.iter().flat_map(|route| &route.pattern.segments).all(is_plain),
        })
    }
}

/// What becomes of a path when other servers read it.
#[derive(Clone, Copy, Debug)]
pub enum OtherReadings<'r> {
    /// For none of them is it more guarded than by the route that was found.
    AsOpen,
    /// Some have a route that needs a token, which the one that was found takes and does not need.
    WithToken(&'r Route),
    /// Some have one that guards it more than the one that was found can; `None`: some see a dot segment.
    Guarded(Option<&'r Route>),
}

/// The patterns' segments; the first node is the root.
#[derive(Clone, Debug)]
struct Tree(Vec<Node>);

/// Where patterns go on after the same segments.
#[derive(Clone, Debug, Default)]
struct Node {
    /// Sorted.
    literals: Vec<(Vec<u8>, usize)>,
    any: Option<usize>,
    /// Routes whose pattern ends here.
    exact: Option<SamePath>,
    /// Routes for all paths from here on.
    below: Option<SamePath>,
}

/// The routes with one pattern.
#[derive(Clone, Debug)]
struct SamePath {
    /// The place of the first one, which is also its rank: no route of another pattern lies between these.
    first: usize,
    by_host: ByHost<Vec<usize>>,
    for_all: Vec<usize>,
}

impl Routes {
    pub fn new(mut routes: Vec<Route>) -> Self {
        // Stable: of routes that answer the same, the one that was given first applies.
        routes.sort_by(|a, b| b.pattern.specificity().cmp(&a.pattern.specificity()));
        routes.iter_mut().enumerate().for_each(|(index, route)| route.index = index);
        let any_hosts = routes.iter().any(|route| !route.hosts.is_empty());
        let tree = Tree::new(&routes, <[u8]>::to_vec);
        let guards = Guards::of(&routes);
        Self { routes, tree, guards, any_hosts }
    }

    /// The route of a request: its method, its Host as it came, and the canonical form of its path.
    pub fn find(&self, method: Method, host: &[u8], path: &[u8]) -> Option<usize> {
        self.find_in(&self.tree, method, &self.canonical_host(host), path, |_| true)
    }

    /// Whether another server could read a path as one of a narrower route that is stricter than the one that was found: what is
    /// open beside a guarded path must not lead into it.
    pub fn other_readings(&self, found: &Route, method: Method, host: &[u8], path: &[u8]) -> OtherReadings<'_> {
        let is_wide = |guards: &&Guards| guards.wide.get(found.index).is_some_and(|wide| *wide);
        let Some(guards) = self.guards.as_ref().filter(is_wide) else { return OtherReadings::AsOpen };
        if guards.are_plain && readings::is_plain(path) {
            return OtherReadings::AsOpen;
        }
        let host = self.canonical_host(host);
        let Some(read) = readings::of(path) else { return OtherReadings::Guarded(None) };
        let find = |is_it: &dyn Fn(&Route) -> bool| {
            let found = read.iter().find_map(|path| self.find_in(&guards.tree, method, &host, path, is_it));
            found.and_then(|index| self.get(index))
        };
        let needs_only_token = |route: &Route| found.auth == Auth::Optional && !route.guards_beside_token(found);
        match find(&|route| route.guards_within(found) && !needs_only_token(route)) {
            Some(route) => OtherReadings::Guarded(Some(route)),
            None => find(&|route| route.guards_within(found)).map_or(OtherReadings::AsOpen, OtherReadings::WithToken),
        }
    }

    fn canonical_host<'h>(&self, host: &'h [u8]) -> Cow<'h, [u8]> {
        if self.any_hosts { host::canonical(host) } else { Cow::Borrowed(&b""[..]) }
    }

    /// The most specific route of those that are wanted.
    #[inline]
    fn find_in(
        &self,
        tree: &Tree,
        method: Method,
        host: &[u8],
        path: &[u8],
        wanted: impl Fn(&Route) -> bool,
    ) -> Option<usize> {
        let mut search = Search { routes: &self.routes, nodes: &tree.0, method, host, wanted, best: None };
        search.walk(0, path);
        search.best.map(|(_, route)| route)
    }

    pub fn get(&self, index: usize) -> Option<&Route> {
        self.routes.get(index)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter()
    }
}

impl Tree {
    /// `form`: how a literal segment stands in it.
    fn new(routes: &[Route], form: impl Fn(&[u8]) -> Vec<u8>) -> Self {
        let mut tree = Self(vec![Node::default()]);
        for route in routes {
            let at = route.pattern.segments.iter().fold(0, |at, segment| match segment {
                Segment::Any => tree.behind_any(at),
                Segment::Literal(literal) => tree.behind(at, form(literal)),
            });
            let node = &mut tree.0[at];
            let ends = if route.pattern.below { &mut node.below } else { &mut node.exact };
            let same = ends.get_or_insert_with(|| SamePath {
                first: route.index,
                by_host: ByHost::default(),
                for_all: Vec::new(),
            });
            if route.hosts.is_empty() {
                same.for_all.push(route.index);
            }
            route.hosts.iter().for_each(|host| same.by_host.entry(host).push(route.index));
        }
        tree
    }

    /// The node behind any segment; made if there is none.
    fn behind_any(&mut self, at: usize) -> usize {
        let made = self.0.len();
        let known = *self.0[at].any.get_or_insert(made);
        self.grow(made, known)
    }

    /// The node behind a segment; made if there is none.
    fn behind(&mut self, at: usize, segment: Vec<u8>) -> usize {
        let made = self.0.len();
        let literals = &mut self.0[at].literals;
        let known = match literals.binary_search_by(|(known, _)| known.cmp(&segment)) {
            Ok(place) => literals[place].1,
            Err(place) => {
                literals.insert(place, (segment, made));
                made
            }
        };
        self.grow(made, known)
    }

    fn grow(&mut self, made: usize, known: usize) -> usize {
        if known == made {
            self.0.push(Node::default());
        }
        known
    }
}

struct Search<'s, W> {
    routes: &'s [Route],
    nodes: &'s [Node],
    method: Method,
    host: &'s [u8],
    wanted: W,
    /// Its rank, and the route.
    best: Option<(usize, usize)>,
}

impl<W: Fn(&Route) -> bool> Search<'_, W> {
    /// Goes down every branch that the path fits: at most two at each segment, and none that no pattern has.
    fn walk(&mut self, mut at: usize, mut rest: &[u8]) {
        let nodes = self.nodes;
        loop {
            let node = &nodes[at];
            self.consider(node.below.as_ref());
            let Some(tail) = rest.strip_prefix(b"/") else {
                if rest.is_empty() {
                    self.consider(node.exact.as_ref());
                }
                return;
            };
            let (segment, tail) = tail.split_at(memchr::memchr(b'/', tail).unwrap_or(tail.len()));
            if segment.is_empty() {
                return;
            }
            let literal = node.literals.binary_search_by(|(known, _)| known.as_slice().cmp(segment));
            let literal = literal.ok().map(|place| node.literals[place].1);
            at = match (literal, node.any) {
                (Some(literal), Some(any)) => {
                    self.walk(literal, tail);
                    any
                }
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => return,
            };
            rest = tail;
        }
    }

    fn consider(&mut self, same: Option<&SamePath>) {
        let Some(same) = same else { return };
        if self.best.is_some_and(|(rank, _)| rank < same.first) {
            return;
        }
        let allows = |index: &&usize| {
            let route = &self.routes[**index];
            route.methods.has(self.method) && (self.wanted)(route)
        };
        let mut found = None;
        if !same.by_host.is_empty() {
            found = same.by_host.matching(self.host).flatten().find(allows);
        }
        if let Some(route) = found.or_else(|| same.for_all.iter().find(allows)) {
            self.best = Some((same.first, *route));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::HostPattern;
    use super::super::origin::AddressList;
    use super::super::route::{Methods, Pattern};
    use super::super::target;
    use super::*;

    fn route(hosts: &[&str], pattern: &str, methods: Methods, auth: Auth) -> Route {
        let name = format!("{}{pattern}", hosts.join(","));
        let hosts = hosts.iter().map(|host| host.parse().unwrap()).collect();
        Route { hosts, methods, auth, ..Route::new(pattern.parse().unwrap(), name) }
    }

    const OPEN: Auth = Auth::None { pass_token: false };

    #[test]
    fn the_narrowest_route_decides() {
        let routes = Routes::new(vec![
            route(&[], "/", Methods::ALL, OPEN),
            route(&[], "/api/*", Methods::ALL, OPEN),
            route(&[], "/api/v3/*", Methods::ALL, Auth::Required),
            route(&[], "/api/v3/session", Methods::only([Method::Post]), OPEN),
            route(&[], "/api/v3/:kind/open", Methods::ALL, OPEN),
            route(&[], "/api/v3/closed/open", Methods::ALL, Auth::Required),
            // A path comes before a host: this opens nothing of the above.
            route(&["www.test"], "/", Methods::ALL, OPEN),
            route(&["*.test", "other"], "/api/v3/*", Methods::ALL, Auth::Required),
            route(&["a.test"], "/api/v3/*", Methods::only([Method::Get]), Auth::Required),
        ]);
        let name = |method, host: &str, path: &str| {
            routes.find(method, host.as_bytes(), path.as_bytes()).map(|i| routes.get(i).unwrap().name.clone()).unwrap()
        };
        for (method, host, path, expected) in [
            (Method::Get, "h", "/api/v3/projects", "/api/v3/*"),
            (Method::Get, "h", "/api/v3", "/api/v3/*"),
            (Method::Get, "h", "/api/v3x", "/api/*"),
            (Method::Post, "h", "/api/v3/session", "/api/v3/session"),
            (Method::Get, "h", "/api/v3/session", "/api/v3/*"),
            (Method::Post, "h", "/api/v3/session/x", "/api/v3/*"),
            (Method::Get, "h", "/api/v3/any/open", "/api/v3/:kind/open"),
            (Method::Get, "h", "/api/v3/closed/open", "/api/v3/closed/open"),
            (Method::Get, "h", "/users/sign_in", "/"),
            (Method::Get, "www.test", "/users/sign_in", "www.test/"),
            (Method::Get, "www.test", "/api/v4", "/api/*"),
            (Method::Get, "www.test", "/api/v3/x", "*.test,other/api/v3/*"),
            (Method::Get, "Other.:80", "/api/v3/x", "*.test,other/api/v3/*"),
            (Method::Get, "A.TEST:8080", "/api/v3/x", "a.test/api/v3/*"),
            (Method::Put, "a.test", "/api/v3/x", "*.test,other/api/v3/*"),
            (Method::Put, "test", "/api/v3/x", "/api/v3/*"),
            (Method::Post, "a.test", "/api/v3/session", "/api/v3/session"),
        ] {
            assert_eq!(name(method, host, path), expected, "{method:?} {host} {path}");
        }
        assert_eq!(routes.find(Method::Other, b"h", b"/api/v3"), None);
    }

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % n as u64) as usize
        }

        fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
            of[self.below(of.len())]
        }

        fn hosts(&mut self) -> Vec<&'static str> {
            let all = ["a", "a.t", "b.a.t", "*.t", "*.a.t", "*.a", "c.b.a.t", "*.b.a.t"];
            let mut hosts: Vec<_> = (0..[0, 0, 1, 1, 2, 3][self.below(6)]).map(|_| self.pick(&all)).collect();
            hosts.sort_unstable();
            hosts.dedup();
            hosts
        }

        fn methods(&mut self) -> Methods {
            match self.below(3) {
                0 => Methods::ALL,
                1 => Methods::only([Method::Get]),
                _ => Methods::only([Method::Get, Method::Post]),
            }
        }

        fn route(&mut self) -> Route {
            let depth = self.below(4);
            let path: String = (0..depth).map(|_| self.pick(&["/a", "/b", "/:x", "/ab"])).collect();
            let path = if depth == 0 { "/".into() } else { path + self.pick(&["", "/*"]) };
            route(&self.hosts(), &path, self.methods(), OPEN)
        }

        /// A configuration without an error.
        fn table(&mut self) -> Vec<Route> {
            let mut table: Vec<Route> = Vec::new();
            for _ in 0..=self.below(12) {
                let route = self.route();
                if !table.iter().any(|other| other.answers_the_same(&route)) {
                    table.push(route);
                }
            }
            table
        }

        /// A route for all that another one is for, and more: by its path, its hosts or both.
        fn wider(&mut self, than: &Route) -> Option<Route> {
            let Pattern { segments, below } = &than.pattern;
            let cut = self.below(segments.len() + 1);
            let mut pattern = Pattern { segments: segments[..cut].to_vec(), below: *below || cut < segments.len() };
            if let Some(segment) = pattern.segments.iter_mut().find(|_| self.below(2) == 0) {
                *segment = Segment::Any;
            }
            pattern.below |= pattern.segments.is_empty();
            let parent = |host: &HostPattern| {
                let text = host.to_string();
                let (_, parent) = text.trim_start_matches("*.").split_once('.')?;
                format!("*.{parent}").parse().ok()
            };
            let hosts = match self.below(3) {
                0 => Vec::new(),
                1 => than.hosts.clone(),
                _ => than.hosts.iter().map(parent).collect::<Option<Vec<_>>>()?,
            };
            Some(Route { pattern, hosts, methods: Methods::ALL, name: "wide".into(), ..than.clone() })
        }
    }

    const PATHS: [&str; 13] =
        ["/", "/a", "/b", "/ab", "/c", "/a/a", "/a/b", "/b/c", "/c/b", "/a/b/a", "/a/b/ab", "/b/b/b/b", "*"];
    const HOSTS: [&str; 10] = ["t", "a", "A.t:80", "b.a.t", "c.b.a.t", "d.c.b.a.t.", "x.t", "x.a", "other", "[::1]"];

    fn requests() -> impl Iterator<Item = (Method, &'static str, &'static str)> {
        let with_host = |host| PATHS.map(|path| (host, path));
        let all = HOSTS.into_iter().flat_map(with_host);
        all.flat_map(|(host, path)| [Method::Get, Method::Post, Method::Put].map(|method| (method, host, path)))
    }

    /// How specific a host pattern is for a host; `None`: it does not match.
    fn rank(pattern: &str, host: &str) -> Option<usize> {
        let host = host.split(':').next().unwrap().trim_end_matches('.').to_lowercase();
        match pattern.strip_prefix('*') {
            None => (pattern == host).then_some(usize::MAX),
            Some(end) => (host.len() > end.len() && host.ends_with(end)).then_some(end.len()),
        }
    }

    /// The rule as it is written, route by route.
    fn slowly<'t>(table: &'t [Route], method: Method, host: &str, path: &str) -> Option<&'t Route> {
        let mut best: Option<(&Route, usize)> = None;
        for route in table {
            if !route.methods.has(method) || !route.pattern.matches(path.as_bytes()) {
                continue;
            }
            let ranks = route.hosts.iter().filter_map(|pattern| rank(&pattern.to_string(), host));
            let Some(rank) = (if route.hosts.is_empty() { Some(0) } else { ranks.max() }) else { continue };
            let specific = (route.pattern.specificity(), rank);
            if best.is_none_or(|(best, rank)| specific > (best.pattern.specificity(), rank)) {
                best = Some((route, rank));
            }
        }
        best.map(|(route, _)| route)
    }

    type Found = Option<(String, Vec<HostPattern>, Methods)>;

    fn facts(route: Option<&Route>) -> Found {
        route.map(|route| (route.name.clone(), route.hosts.clone(), route.methods))
    }

    #[test]
    fn the_index_finds_what_a_walk_over_all_routes_finds() {
        let mut random = Random(20_261_128);
        let (mut found, mut none) = (0, 0);
        for _ in 0..3_000 {
            let table = random.table();
            let routes = Routes::new(table.clone());
            for (method, host, path) in requests() {
                let quick = routes.find(method, host.as_bytes(), path.as_bytes()).and_then(|i| routes.get(i));
                let slow = slowly(&table, method, host, path);
                assert_eq!(facts(quick), facts(slow), "{method:?} {host} {path} {table:#?}");
                *if slow.is_some() { &mut found } else { &mut none } += 1;
            }
        }
        assert!(found > 100_000 && none > 100_000, "{found} {none}");
    }

    #[test]
    fn a_wider_route_takes_nothing_from_a_narrower_one() {
        let mut random = Random(7);
        let (mut kept, mut added) = (0, 0);
        for _ in 0..20_000 {
            let mut table = random.table();
            let narrow = table[random.below(table.len())].clone();
            // One with several hosts is as many routes with one each: another may be wider than some and narrower than others.
            if narrow.hosts.len() > 1 {
                continue;
            }
            let before = Routes::new(table.clone());
            let Some(wide) = random.wider(&narrow) else { continue };
            if table.iter().any(|other| other.answers_the_same(&wide)) {
                continue;
            }
            added += 1;
            table.insert(random.below(table.len() + 1), wide);
            let after = Routes::new(table);
            for (method, host, path) in requests() {
                let of = |routes: &Routes| {
                    facts(routes.find(method, host.as_bytes(), path.as_bytes()).and_then(|index| routes.get(index)))
                };
                if of(&before) == facts(Some(&narrow)) {
                    assert_eq!(of(&after), facts(Some(&narrow)), "{method:?} {host} {path}");
                    kept += 1;
                }
            }
        }
        assert!(added > 3_000 && kept > 30_000, "{added} {kept}");
    }

    type Server = (&'static str, fn(&str) -> String);

    /// Servers as they read a path, each in its own way and none as tollgate does it.
    fn servers() -> Vec<Server> {
        fn decode(path: &str) -> String {
            let mut pieces = path.split('%');
            let first = pieces.next().unwrap().to_owned();
            pieces.fold(first, |path, piece| {
                path + &char::from(u8::from_str_radix(&piece[..2], 16).unwrap()).to_string() + &piece[2..]
            })
        }
        fn safely(path: &str) -> String {
            let twice = path
                .split('%')
                .skip(1)
                .all(|piece| piece.get(..2).is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok()));
            if twice { decode(path) } else { path.to_owned() }
        }
        fn parameters(path: &str) -> String {
            path.split('/').map(|segment| segment.split(';').next().unwrap()).collect::<Vec<_>>().join("/")
        }
        fn ended(path: &str) -> String {
            path.split(['?', '#']).next().unwrap().to_owned()
        }
        vec![
            ("Django", |path| decode(path)),
            ("nginx", |path| {
                let decoded = decode(path);
                decoded
                    .split('/')
                    .filter(|segment| !segment.is_empty())
                    .fold(String::new(), |path, segment| path + "/" + segment)
            }),
            ("Tomcat", |path| decode(&parameters(path))),
            ("Jetty", |path| parameters(&decode(path))),
            ("only parameters", |path| parameters(path)),
            ("IIS", |path| decode(path).to_ascii_lowercase()),
            ("only letters", |path| path.to_ascii_lowercase()),
            ("twice", |path| safely(&decode(path))),
            ("twice, and a query", |path| ended(&safely(&decode(path)))),
            ("decoded before it was parsed", |path| ended(&decode(path))),
        ]
    }

    fn guarded() -> Routes {
        let inside = "10.0.0.0/8".parse().unwrap();
        let near = AddressRules {
            allow: AddressList { networks: vec![inside], unix_peers: false },
            ..AddressRules::default()
        };
        Routes::new(vec![
            route(&[], "/", Methods::ALL, OPEN),
            route(&[], "/api/v3/*", Methods::ALL, Auth::Required),
            route(&[], "/api/v3/open/*", Methods::ALL, OPEN),
            route(&[], "/api/v3/open/group/secret", Methods::ALL, Auth::Required),
            route(&[], "/api/v3/open/may/*", Methods::ALL, Auth::Optional),
            Route { addresses: near, ..route(&[], "/api/v3/admin/*", Methods::ALL, Auth::Required) },
            route(&[], "/api/v3/projects/:id", Methods::only([Method::Get]), Auth::Optional),
            route(&[], "/api/v3/projects/:id/issues", Methods::ALL, Auth::Required),
        ])
    }

    #[test]
    fn no_server_finds_a_guarded_path_in_what_passed_as_an_open_one() {
        let routes = guarded();
        let mut random = Random(20_261_130);
        let (mut refused, mut passed, mut other) = (0, 0, 0);
        let names = ["api", "v3", "open", "group", "secret", "may", "admin", "projects", "x", "1", "issues"];
        for _ in 0..80_000 {
            let mut path = random
                .pick(&["/api/v3", "/api/v3/open", "/api/v3/open/group/secret", "/api/v3/admin/x", ""])
                .to_owned();
            (0..random.below(4)).for_each(|_| path = format!("{path}/{}", random.pick(&names)));
            for _ in 0..=random.below(3) {
                let at = random.below(path.len() + 1);
                match random.below(4) {
                    0 => path.insert_str(
                        at,
                        random
                            .pick(&[";", ";x", ";/", "%3B", "%3Bx", "%2F", "%252F", "%3F", "%23x", "%253b", "//", "/"]),
                    ),
                    1 => {
                        // A letter in another spelling.
                        let Some(byte) = path.as_bytes().get(at).copied().filter(u8::is_ascii_alphabetic) else {
                            continue;
                        };
                        let spelled = match random.below(3) {
                            0 => (byte as char).to_ascii_uppercase().to_string(),
                            1 => format!("%{byte:02x}"),
                            _ => format!("%25{byte:02X}"),
                        };
                        path.replace_range(at..=at, &spelled);
                    }
                    _ => {
                        let Some(at) =
                            path.bytes().enumerate().skip(at).find(|(_, byte)| *byte == b'/').map(|(at, _)| at)
                        else {
                            continue;
                        };
                        path.replace_range(at..=at, random.pick(&["%2F", "%2f", "//", "/;/", "%252f", ";/"]));
                    }
                }
            }
            if path
                .split('%')
                .skip(1)
                .any(|piece| piece.get(..2).is_none_or(|hex| u8::from_str_radix(hex, 16).is_err()))
                || !path.starts_with('/')
            {
                continue;
            }
            if target::check(path.as_bytes()).is_err() {
                continue;
            }
            let canonical = target::canonical(path.as_bytes());
            let found = routes.find(Method::Get, b"h", &canonical).and_then(|index| routes.get(index)).unwrap();
            let said = routes.other_readings(found, Method::Get, b"h", &canonical);
            if matches!(said, OtherReadings::Guarded(_)) {
                refused += 1;
                continue;
            }
            passed += 1;
            for (name, reads) in servers() {
                let read = reads(&path);
                let canonical = target::canonical(read.as_bytes());
                let Some(theirs) = routes.find(Method::Get, b"h", &canonical).and_then(|index| routes.get(index))
                else {
                    continue;
                };
                other += usize::from(theirs.index != found.index);
                assert!(
                    !theirs.guards_within(found)
                        || (matches!(said, OtherReadings::WithToken(_)) && !theirs.guards_beside_token(found)),
                    "{name} reads {path} as {read}, of {}: passed by {}",
                    theirs.name,
                    found.name
                );
            }
        }
        assert!(refused > 10_000 && passed > 20_000 && other > 1_000, "{refused} {passed} {other}");
    }

    #[test]
    fn what_reads_as_the_same_route_everywhere_passes() {
        let routes = guarded();
        for (path, said) in [
            ("/api/v3/projects/group%2Fproject", 0),
            ("/api/v3/projects/group%2Fissues", 1),
            ("/api/v3/projects/Group%2FProject/issues", 0),
            ("/api/v3/projects/group%2Fproject/repository/files/a%2Fb%3Bc%25.rb", 0),
            ("/api/v3/open/files/A%2Fb;v=1", 0),
            ("/Group/Project/blob/master/api%2Fv3/x%3Fy", 0),
            ("/api/v3/open/may/x%2Fy", 0),
            ("/api/v3/open/May/x", 2),
            ("/api/v3/open/may;x", 2),
            ("/api/v3/open/group%2Fsecret", 2),
            ("/api/v3/open/group%2Fsecret;x%2Fy", 2),
            ("/api/v3/open/group/secret;x", 2),
            ("/api/v3/open/group/SECRET", 2),
            ("/api/v3/open/x/%252e%252e/group/secret", 2),
            ("/api/v3/admin%2Fx", 2),
            ("/api/v3/admin;y/x", 2),
            ("/api/v3/Admin/x", 2),
            ("/api/v3/%2561dmin", 2),
            ("/API/v3/projects", 2),
            ("/api%2Fv3/projects", 2),
            ("/api;/v3", 2),
        ] {
            let canonical = target::canonical(path.as_bytes());
            let found = routes.find(Method::Get, b"h", &canonical).and_then(|index| routes.get(index)).unwrap();
            let rank = match routes.other_readings(found, Method::Get, b"h", &canonical) {
                OtherReadings::AsOpen => 0,
                OtherReadings::WithToken(_) => 1,
                OtherReadings::Guarded(_) => 2,
            };
            assert_eq!(rank, said, "{path}");
        }
        // Of a table in which nothing is guarded more than what is around it, nothing is looked at.
        assert!(
            Routes::new(vec![
                route(&[], "/api/v3/*", Methods::ALL, Auth::Required),
                route(&[], "/api/v3/open", Methods::ALL, OPEN)
            ])
            .guards
            .is_none()
        );
    }
}
