//! The origin of a request: the client's address and the scheme, host and port that it used, from the socket and from
//! trusted proxies. Pure. Headers of a peer that is not a trusted proxy are never used.

use super::verdict::VerdictRules;
use super::view::{Field, FieldKind, RequestView};
use crate::problem::Problem;
use ipnet::{IpNet, Ipv4Net};
use smallvec::SmallVec;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// Maximum number of addresses read from X-Forwarded-For, from the right. Real chains have a handful; a longer list is
/// forged.
const MAX_HOPS: usize = 64;

/// Peers whose X-Forwarded-* fields are accepted. None by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies {
    pub networks: Vec<IpNet>,
    /// Peers on a Unix socket.
    pub unix_peers: bool,
}

impl TrustedProxies {
    /// Wider networks hold a large part of the Internet.
    const WIDEST_V4: u8 = 8;
    const WIDEST_V6: u8 = 7;

    /// Keys of `[server]`.
    pub fn problems(&self) -> Vec<Problem> {
        let wide = |network: &&IpNet| match network {
            IpNet::V4(network) => network.prefix_len() < Self::WIDEST_V4,
            IpNet::V6(network) => network.prefix_len() < Self::WIDEST_V6,
        };
        let warning = |network: &IpNet| {
            let everybody = if network.prefix_len() == 0 { "everybody" } else { "a large part of the Internet" };
            let what = format!("trusts {everybody} ({network}): clients can claim any address in X-Forwarded-For");
            Problem::warning("trusted_proxies", what, "list the networks of your own proxies alone")
        };
        self.networks.iter().filter(wide).map(warning).collect()
    }

    pub fn trusts(&self, peer: Option<IpAddr>) -> bool {
        match peer {
            Some(ip) => self.networks.iter().any(|network| network.contains(&ip)),
            None => self.unix_peers,
        }
    }
}

/// Whom an address stands for where clients are counted: itself, or its IPv6 network of 64 bits. Whoever has an IPv6 address has
/// 2^64 of them.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// Networks, and peers on a Unix socket, which have no address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressList {
    pub networks: Vec<IpNet>,
    pub unix_peers: bool,
}

impl AddressList {
    fn is_empty(&self) -> bool {
        self.networks.is_empty() && !self.unix_peers
    }

    /// Takes the client as [`Origin`] says it.
    pub fn has(&self, client: Option<IpAddr>) -> bool {
        match client {
            Some(ip) => self.networks.iter().any(|network| network.contains(&ip)),
            None => self.unix_peers,
        }
    }
}

/// IPv4 written as IPv6 is IPv4, as are the addresses that are looked for in it.
pub fn canonical_network(network: IpNet) -> IpNet {
    match network {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => {
            let v4 = v6.addr().to_ipv4_mapped().and_then(|ip| Ipv4Net::new(ip, v6.prefix_len() - 96).ok());
            v4.map_or(network, IpNet::V4)
        }
        _ => network,
    }
}

/// Whose requests are refused for the address that they come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRules {
    /// If there are any, all others are refused.
    pub allow: AddressList,
    /// These are refused, whatever is allowed.
    pub deny: AddressList,
}

impl AddressRules {
    /// Takes the client as [`Origin`] says it.
    pub fn admit(&self, client: Option<IpAddr>) -> bool {
        !self.deny.has(client) && (self.allow.is_empty() || self.allow.has(client))
    }

    /// Keys of `[limits]` and of a `[[route]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (index, network) in self.allow.networks.iter().enumerate() {
            if let Some(denied) = self.deny.networks.iter().find(|denied| denied.contains(network)) {
                let what = format!("{network} is within {denied}, which is denied: it lets nobody in");
                problems
                    .push(Problem::error("allow", what, "remove it from one of the lists").element(index).with("deny"));
            }
        }
        if self.allow.unix_peers && self.deny.unix_peers {
            let instead = "remove it from one of the lists";
            problems.push(Problem::error("allow", "has \"unix\", which is denied as well", instead).with("deny"));
        }
        problems
    }
}

/// How a connection came, which is the same for all of its requests.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// The socket's other end; `None` for a Unix socket.
    pub peer: Option<IpAddr>,
    /// The client's address, as a load balancer said it by the PROXY protocol.
    pub announced: Option<IpAddr>,
    /// Over HTTP/2.
    pub http2: bool,
    /// `None`: in plain text.
    pub tls: Option<Arc<TlsArrival>>,
    /// The port with TLS that requests are sent to in place of an answer.
    pub redirect: Option<u16>,
    /// Its requests are those of another proxy, which asks about others.
    pub verdict: Option<Arc<VerdictRules>>,
}

/// What else is known of a connection over TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsArrival {
    /// The subject of the client's certificate, which was verified.
    pub subject: Option<String>,
    /// The value of Strict-Transport-Security in every answer.
    pub hsts: Option<String>,
}

impl Arrival {
    /// A plain connection.
    pub fn of(peer: Option<IpAddr>) -> Self {
        Self { peer, ..Self::default() }
    }

    /// The nearest address that may be the client's.
    pub fn nearest(&self) -> Option<IpAddr> {
        self.announced.or(self.peer)
    }
}

/// Where a request came from. All addresses are canonical: `::ffff:a.b.c.d` is `a.b.c.d`.
#[derive(Clone, Debug)]
pub struct Origin<'a> {
    /// The connection's other end, or the one that a load balancer announced; `None` for a Unix socket.
    pub peer: Option<IpAddr>,
    /// The client's address in logs and limits.
    pub client: Option<IpAddr>,
    /// The hops before the peer, as reported by trusted proxies, the nearest first.
    told: SmallVec<[IpAddr; 4]>,
    https: bool,
    host: &'a [u8],
    port: Option<&'a [u8]>,
    /// What the listener knows of it, if it speaks TLS.
    pub tls: Option<Arc<TlsArrival>>,
}

impl<'a> Origin<'a> {
    /// Whether X-Forwarded-* is believed is judged by the socket's other end, never by an address that was announced over it.
    pub fn of(view: &RequestView<'a>, arrival: &Arrival, proxies: &TrustedProxies) -> Self {
        let peer = arrival.nearest().map(|ip| ip.to_canonical());
        let mut origin = Self {
            peer,
            client: peer,
            told: SmallVec::new(),
            https: arrival.tls.is_some(),
            host: view.host,
            port: None,
            tls: arrival.tls.clone(),
        };
        if proxies.trusts(arrival.peer.map(|ip| ip.to_canonical())) {
            origin.take_chain(view, proxies);
            origin.take_scheme_and_host(view);
        }
        origin
    }

    /// Reads X-Forwarded-For from the right, where the nearest proxy appends: skips trusted addresses up to the first
    /// untrusted one, which is the client. Addresses to the left of it are unverified, and forwarded as such. Reading
    /// stops at an element that is not an address: the same party wrote everything to the left of it as well.
    fn take_chain(&mut self, view: &RequestView<'a>, proxies: &TrustedProxies) {
        let lines = view.fields.iter().rev().filter(|field| field.kind == FieldKind::ForwardedFor);
        let elements = lines.flat_map(|field| field.value.rsplit(|b| *b == b',')).map(<[u8]>::trim_ascii);
        self.told = elements.take(MAX_HOPS).map_while(address).collect();
        let client = self.told.iter().find(|ip| !proxies.trusts(Some(**ip))).or(self.told.last());
        self.client = client.copied().or(self.peer);
    }

    fn take_scheme_and_host(&mut self, view: &RequestView<'a>) {
        // Unless the proxy reports a scheme, it is that of its own connection.
        self.https = agreed(view, FieldKind::ForwardedProto, scheme).unwrap_or(self.https);
        self.host = agreed(view, FieldKind::ForwardedHost, host).unwrap_or(view.host);
        self.port = agreed(view, FieldKind::ForwardedPort, port);
    }

    /// The addresses for X-Forwarded-For, the farthest first.
    pub fn chain(&self) -> impl Iterator<Item = IpAddr> {
        self.told.iter().rev().copied().chain(self.peer)
    }

    pub fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }

    /// The host that the client asked for, with its port if it named one.
    pub fn host(&self) -> &'a [u8] {
        self.host
    }

    pub fn port(&self) -> &'a [u8] {
        let default: &[u8] = if self.https { b"443" } else { b"80" };
        self.port.or_else(|| port_of(self.host)).unwrap_or(default)
    }
}

/// The value that all elements of all lines of a field have in common. Consecutive proxies write a list or a line each.
/// If they differ, none is used, because an element written by the client cannot be distinguished from the others.
fn agreed<'a, T: Copy + PartialEq>(
    view: &RequestView<'a>,
    kind: FieldKind,
    read: fn(&'a [u8]) -> Option<T>,
) -> Option<T> {
    fn elements<'a>(field: &Field<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        field.value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
    }
    let mut elements = view.fields_of(kind).flat_map(elements);
    let first = read(elements.next()?)?;
    elements.all(|element| read(element) == Some(first)).then_some(first)
}

/// Whether a scheme is one with TLS. Traefik writes `ws` and `wss` for WebSockets.
fn scheme(text: &[u8]) -> Option<bool> {
    let is = |known: &str| text.eq_ignore_ascii_case(known.as_bytes());
    match () {
        () if is("https") || is("wss") => Some(true),
        () if is("http") || is("ws") => Some(false),
        () => None,
    }
}

fn host(text: &[u8]) -> Option<&[u8]> {
    text.iter().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(b)).then_some(text)
}

fn port(text: &[u8]) -> Option<&[u8]> {
    ((1..=5).contains(&text.len()) && text.iter().all(u8::is_ascii_digit)).then_some(text)
}

/// The port after the client's host, which is the port that the client uses, regardless of mappings in between.
fn port_of(host: &[u8]) -> Option<&[u8]> {
    let at = memchr::memrchr(b':', host)?;
    let port = &host[at + 1..];
    (!port.is_empty() && port.iter().all(u8::is_ascii_digit)).then_some(port)
}

/// One element of X-Forwarded-For: an address, also with a port or in brackets. The port is dropped.
fn address(element: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(element).ok()?;
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::from);
    let ip = text.parse::<IpAddr>().ok();
    let ip = ip.or_else(|| text.parse::<SocketAddr>().ok().map(|socket| socket.ip())).or_else(bracketed);
    ip.map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::super::head;
    use super::*;

    fn proxies() -> TrustedProxies {
        let networks = ["127.0.0.1/32", "10.0.0.0/8", "fd00::/8"].map(|text| text.parse().unwrap()).to_vec();
        TrustedProxies { networks, unix_peers: false }
    }

    /// Client, chain, scheme, host and port of a request that a peer sent.
    fn told(peer: &str, lines: &str) -> (String, String, &'static str, String, String) {
        let bytes = format!("GET / HTTP/1.1\r\nHost: h.test\r\n{}\r\n", lines.replace('\n', "\r\n")).into_bytes();
        let view = head::parse(&bytes).unwrap();
        let arrival = Arrival::of(peer.parse().ok());
        let origin = Origin::of(&view, &arrival, &proxies());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (
            origin.client.map_or("-".into(), |ip| ip.to_string()),
            origin.chain().map(|ip| ip.to_string()).collect::<Vec<_>>().join(", "),
            origin.scheme(),
            text(origin.host()),
            text(origin.port()),
        )
    }

    #[test]
    fn the_chain_is_read_from_the_right() {
        let cases = [
            ("192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("6.6.6.6, 192.0.2.7, 10.1.2.3", "192.0.2.7", "6.6.6.6, 192.0.2.7, 10.1.2.3"),
            // Written by the client, then appended to by a proxy.
            ("unknown, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("6.6.6.6, _hidden, 192.0.2.7, 10.1.2.3", "192.0.2.7", "192.0.2.7, 10.1.2.3"),
            (", 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("<script>, 192.0.2.7:4711", "192.0.2.7", "192.0.2.7"),
            ("caf\u{e9}, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("127.0.0.1 6.6.6.6, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("010.1.2.3, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("6.6.6.6, fe80::1%eth0, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("1.2.3.4/8, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("for=6.6.6.6, 192.0.2.7", "192.0.2.7", "192.0.2.7"),
            // The nearest element is not an address: the list is not used.
            ("192.0.2.7, unknown", "127.0.0.1", ""),
            ("192.0.2.7,", "127.0.0.1", ""),
            ("", "127.0.0.1", ""),
            ("192.0.2.7, 10.1.2.3, unknown, 10.1.2.4", "10.1.2.4", "10.1.2.4"),
            // Only proxies: the farthest of them.
            ("10.9.9.9, 10.1.2.3", "10.9.9.9", "10.9.9.9, 10.1.2.3"),
            // Addresses with ports, brackets, and IPv4 in IPv6.
            ("192.0.2.7:4711, 10.1.2.3:80", "192.0.2.7", "192.0.2.7, 10.1.2.3"),
            ("[2001:DB8::1]:4711", "2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1", "2001:db8::1"),
            ("2001:db8:0:0::1", "2001:db8::1", "2001:db8::1"),
            ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.7"),
            ("[::ffff:192.0.2.7]:1", "192.0.2.7", "192.0.2.7"),
            ("192.0.2.7, ::ffff:10.1.2.3", "192.0.2.7", "192.0.2.7, 10.1.2.3"),
            ("192.0.2.7, fd00::1", "192.0.2.7", "192.0.2.7, fd00::1"),
            ("6.6.6.6, [192.0.2.7]", "127.0.0.1", ""),
            ("6.6.6.6, 192.0.2.7:", "127.0.0.1", ""),
            ("6.6.6.6, 192.0.2.7:http", "127.0.0.1", ""),
            ("6.6.6.6, 192.0.2.7:99999", "127.0.0.1", ""),
            // Several lines are one list in their order.
            (
                "6.6.6.6\nX-Forwarded-For: 192.0.2.7\nx-forwarded-for: 10.1.2.3",
                "192.0.2.7",
                "6.6.6.6, 192.0.2.7, 10.1.2.3",
            ),
            ("6.6.6.6, junk\nX-Forwarded-For: 192.0.2.7,10.1.2.3", "192.0.2.7", "192.0.2.7, 10.1.2.3"),
            ("192.0.2.7\nX-Forwarded-For: junk", "127.0.0.1", ""),
        ];
        for (list, client, chain) in cases {
            let chain = if chain.is_empty() { "127.0.0.1".to_owned() } else { format!("{chain}, 127.0.0.1") };
            let (found, forwarded, ..) = told("127.0.0.1", &format!("X-Forwarded-For: {list}\n"));
            assert_eq!((found.as_str(), forwarded), (client, chain), "{list}");
        }
    }

    #[test]
    fn a_long_list_is_read_up_to_a_bound() {
        let list = "6.6.6.6, ".repeat(2_000) + "192.0.2.7, 10.1.2.3";
        let (client, chain, ..) = told("127.0.0.1", &format!("X-Forwarded-For: {list}\n"));
        assert_eq!((client.as_str(), chain.matches("6.6.6.6").count()), ("192.0.2.7", MAX_HOPS - 2));
    }

    #[test]
    fn who_is_no_proxy_is_not_believed() {
        let lies = "X-Forwarded-For: 6.6.6.6\nX-Forwarded-Proto: https\nX-Forwarded-Host: evil\nX-Forwarded-Port: 1\n";
        let own =
            |client: &str, host: &str| (client.to_owned(), client.to_owned(), "http", host.to_owned(), "80".to_owned());
        assert_eq!(told("192.0.2.1", lies), own("192.0.2.1", "h.test"));
        assert_eq!(told("::ffff:192.0.2.1", lies), own("192.0.2.1", "h.test"));
        // The same machine by its other name.
        assert_eq!(told("::ffff:127.0.0.1", lies).0, "6.6.6.6");
        assert_eq!(told("unix", lies).0, "-");
    }

    #[test]
    fn schemes_hosts_and_ports_that_agree() {
        for (lines, scheme) in [
            ("X-Forwarded-Proto: https", "https"),
            ("X-Forwarded-Proto: HTTPS", "https"),
            ("X-Forwarded-Proto: hTTp", "http"),
            ("X-Forwarded-Proto: wss", "https"),
            ("X-Forwarded-Proto: WS", "http"),
            ("X-Forwarded-Proto: https, https", "https"),
            ("X-Forwarded-Proto: https,wss , HTTPS", "https"),
            ("X-Forwarded-Proto: https\nX-Forwarded-Proto: https", "https"),
            ("X-Forwarded-Proto: https,", "https"),
            ("X-Forwarded-Proto: https, http", "http"),
            ("X-Forwarded-Proto: http, https", "http"),
            ("X-Forwarded-Proto: https\nX-Forwarded-Proto: http", "http"),
            ("X-Forwarded-Proto: https, gopher", "http"),
            ("X-Forwarded-Proto: gopher", "http"),
            ("X-Forwarded-Proto: https:", "http"),
            ("X-Forwarded-Proto: \"https\"", "http"),
            ("X-Forwarded-Proto:", "http"),
        ] {
            let (_, _, found, _, port) = told("127.0.0.1", &format!("{lines}\n"));
            assert_eq!((found, port.as_str()), (scheme, if scheme == "https" { "443" } else { "80" }), "{lines}");
        }
        for (lines, host, port) in [
            ("X-Forwarded-Host: a.test:8443", "a.test:8443", "8443"),
            ("X-Forwarded-Host: a.test, a.test", "a.test", "80"),
            ("X-Forwarded-Host: a.test, b.test", "h.test", "80"),
            ("X-Forwarded-Host: a b", "h.test", "80"),
            ("X-Forwarded-Port: 8080\nX-Forwarded-Port: 8080", "h.test", "8080"),
            ("X-Forwarded-Port: 8080, 80", "h.test", "80"),
            ("X-Forwarded-Port: x", "h.test", "80"),
        ] {
            let (.., found_host, found_port) = told("127.0.0.1", &format!("{lines}\n"));
            assert_eq!((found_host.as_str(), found_port.as_str()), (host, port), "{lines}");
        }
    }

    #[test]
    fn an_announced_address_is_the_clients_and_is_never_trusted_for_it() {
        let bytes = b"GET / HTTP/1.1\r\nHost: h.test\r\nX-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: http\r\n\r\n";
        let view = head::parse(bytes).unwrap();
        let client = |peer: &str, announced: &str| {
            let tls = Some(Arc::default());
            let arrival = Arrival { announced: announced.parse().ok(), tls, ..Arrival::of(peer.parse().ok()) };
            let origin = Origin::of(&view, &arrival, &proxies());
            let chain = origin.chain().map(|ip| ip.to_string()).collect::<Vec<_>>().join(", ");
            (origin.client.unwrap().to_string(), chain, origin.scheme())
        };
        let told = |client: &str, chain: &str, scheme| (client.to_owned(), chain.to_owned(), scheme);
        // The balancer is no trusted proxy: the announced address counts, though it claims to be one itself.
        assert_eq!(client("192.0.2.1", "198.51.100.7"), told("198.51.100.7", "198.51.100.7", "https"));
        assert_eq!(client("192.0.2.1", "10.0.0.1"), told("10.0.0.1", "10.0.0.1", "https"));
        // The balancer is one: what it forwards is read on behind the announced address.
        assert_eq!(client("127.0.0.1", "10.0.0.1"), told("6.6.6.6", "6.6.6.6, 10.0.0.1", "http"));
        assert_eq!(client("127.0.0.1", ""), told("6.6.6.6", "6.6.6.6, 127.0.0.1", "http"));
    }

    #[test]
    fn whom_lists_of_addresses_let_in() {
        let list = |networks: &[&str], unix_peers| AddressList {
            networks: networks.iter().map(|network| network.parse().unwrap()).collect(),
            unix_peers,
        };
        let (near, far) = (Some([10, 0, 0, 1].into()), Some([11, 0, 0, 1].into()));
        for (allow, deny, admitted) in [
            (list(&[], false), list(&[], false), [true, true, true]),
            (list(&["10.0.0.0/8"], false), list(&[], false), [true, false, false]),
            (list(&[], true), list(&[], false), [false, false, true]),
            (list(&["10.0.0.0/8"], true), list(&[], false), [true, false, true]),
            (list(&[], false), list(&["10.0.0.0/8"], false), [false, true, true]),
            (list(&[], false), list(&[], true), [true, true, false]),
            (list(&["10.0.0.0/8"], false), list(&["10.0.0.1/32"], false), [false, false, false]),
        ] {
            let rules = AddressRules { allow, deny };
            assert_eq!([near, far, None].map(|client| rules.admit(client)), admitted, "{rules:?}");
        }
    }

    #[test]
    fn proxies_that_are_too_many_to_be_trusted() {
        for (network, said) in [
            ("10.0.0.0/8", ""),
            ("10.0.0.0/7", "a large part of the Internet"),
            ("0.0.0.0/0", "everybody"),
            ("fc00::/7", ""),
            ("fc00::/6", "a large part of the Internet"),
            ("::/0", "everybody"),
        ] {
            let problems = TrustedProxies { networks: vec![network.parse().unwrap()], unix_peers: false }.problems();
            assert_eq!(problems.len(), usize::from(!said.is_empty()), "{network}");
            assert!(format!("{problems:?}").contains(said), "{network}: {problems:?}");
        }
    }
}
