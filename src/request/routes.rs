//! All routes, and the index that finds the one of a request: its cost depends on the path, and hardly on how many routes there
//! are. Pure; knows no identities.
//!
//! Of the routes that match a request, the one with the most specific path applies; of these, the one with the most specific
//! host: a name, then `*.` before most labels, then every host. The path comes first because clients choose their Host: a route
//! for a host and all paths must not open a path that has a route of its own. So a wider route never takes a request from a
//! narrower one; a route with several hosts is as many routes with one each. Two routes of the same rank for one request are an
//! error of the configuration ([`Route::answers_the_same`]).

use super::host::{self, ByHost};
use super::route::{Route, Segment};
use super::view::Method;
use std::borrow::Cow;

#[derive(Clone, Debug)]
pub struct Routes {
    /// The most specific path first.
    routes: Vec<Route>,
    /// A tree of the patterns' segments; the first one is its root.
    nodes: Vec<Node>,
    any_hosts: bool,
}

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
        let mut nodes = vec![Node::default()];
        for route in &routes {
            let at = route.pattern.segments.iter().fold(0, |at, segment| next(&mut nodes, at, segment));
            let ends = if route.pattern.below { &mut nodes[at].below } else { &mut nodes[at].exact };
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
        Self { routes, nodes, any_hosts }
    }

    /// The route of a request: its method, its Host as it came, and the canonical form of its path.
    pub fn find(&self, method: Method, host: &[u8], path: &[u8]) -> Option<usize> {
        let host = if self.any_hosts { host::canonical(host) } else { Cow::Borrowed(&b""[..]) };
        let mut search = Search { routes: self, method, host: &host, best: None };
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

/// The node behind a segment; made if there is none.
fn next(nodes: &mut Vec<Node>, at: usize, segment: &Segment) -> usize {
    let made = nodes.len();
    let known = match segment {
        Segment::Any => *nodes[at].any.get_or_insert(made),
        Segment::Literal(literal) => {
            let literals = &mut nodes[at].literals;
            let place = literals.binary_search_by(|(known, _)| known.cmp(literal)).unwrap_or_else(|place| {
                literals.insert(place, (literal.clone(), made));
                place
            });
            literals[place].1
        }
    };
    if known == made {
        nodes.push(Node::default());
    }
    known
}

struct Search<'s> {
    routes: &'s Routes,
    method: Method,
    host: &'s [u8],
    /// Its rank, and the route.
    best: Option<(usize, usize)>,
}

impl Search<'_> {
    /// Goes down every branch that the path fits: at most two at each segment, and none that no pattern has.
    fn walk(&mut self, mut at: usize, mut rest: &[u8]) {
        let routes = self.routes;
        loop {
            let node = &routes.nodes[at];
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
        let allows = |index: &&usize| self.routes.routes[**index].methods.has(self.method);
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
    use super::super::route::{Auth, Methods, Pattern};
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
}
