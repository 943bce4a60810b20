//! Lets pages of configured origins read tollgate's own answers, as GitLab's API lets them read its own. Pure. It never
//! says that credentials may be sent along, and it adds nothing to an answer of the backend.

use crate::problem::Problem;

/// Whose pages may read tollgate's own answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cors {
    /// Nothing is said of it.
    #[default]
    Off,
    Anybody,
    /// Exactly these origins, as browsers write them.
    Origins(Vec<Box<str>>),
}

/// What of [`Cors`] holds for one request. Says nothing without the rules that it came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CorsGrant {
    #[default]
    Off,
    /// There are rules, and none for this origin.
    None,
    Anybody,
    /// The place in the list.
    Origin(u16),
}

/// What GitLab's own answers expose, and what a refusal has beside.
const EXPOSED: &str = "Link, X-Total, X-Total-Pages, X-Per-Page, X-Page, X-Next-Page, X-Prev-Page, X-Request-Id, \
                       Retry-After, WWW-Authenticate, Allow, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset";

impl Cors {
    /// As `[api] cors_origins` lists them: none, `"*"` alone, or whole origins.
    pub fn new(origins: &[String]) -> Self {
        match origins {
            [] => Self::Off,
            [all] if all == "*" => Self::Anybody,
            origins => Self::Origins(origins.iter().map(|origin| origin.as_str().into()).collect()),
        }
    }

    /// Keys of `[api]`.
    pub fn problems(&self) -> Vec<Problem> {
        let Self::Origins(origins) = self else { return Vec::new() };
        let mut problems = Vec::new();
        for (index, origin) in origins.iter().enumerate() {
            let problem = |what: &str, instead| Problem::error("cors_origins", what, instead).element(index);
            if &**origin == "*" {
                let instead = "use \"*\" alone to let every page read, or name each origin";
                problems.push(problem("does not go with other origins", instead));
            } else if let Some((what, instead)) = wrong_origin(origin) {
                problems.push(problem(what, instead));
            } else if let Some(first) = origins[..index].iter().position(|other| other == origin) {
                problems.push(problem("is in the list twice", "remove one of them").repeats("cors_origins", first));
            }
        }
        problems
    }

    /// Takes the values of the request's Origin fields. Two of them are no origin.
    pub fn grant<'a>(&self, mut origins: impl Iterator<Item = &'a [u8]>) -> CorsGrant {
        match self {
            Self::Off => CorsGrant::Off,
            Self::Anybody => CorsGrant::Anybody,
            Self::Origins(allowed) => {
                let only = origins.next().filter(|_| origins.next().is_none());
                let place = only.and_then(|origin| allowed.iter().position(|known| known.as_bytes() == origin));
                place.and_then(|place| u16::try_from(place).ok()).map_or(CorsGrant::None, CorsGrant::Origin)
            }
        }
    }

    /// The fields that an answer gets. `Vary` stands there also when no origin is granted, or a shared cache would give
    /// that answer to a page that may read it.
    pub fn fields(&self, grant: CorsGrant) -> impl Iterator<Item = (&'static str, &str)> {
        let allowed = match (grant, self) {
            (CorsGrant::Anybody, _) => Some("*"),
            (CorsGrant::Origin(place), Self::Origins(origins)) => {
                origins.get(usize::from(place)).map(|origin| &**origin)
            }
            _ => None,
        };
        let vary = (grant != CorsGrant::Off).then_some(("Vary", "Origin"));
        let allow = allowed.map(|origin| ("Access-Control-Allow-Origin", origin));
        let expose = allowed.map(|_| ("Access-Control-Expose-Headers", EXPOSED));
        vary.into_iter().chain(allow).chain(expose)
    }
}

/// Why a text is no origin that a browser would send. `None`: it is one.
fn wrong_origin(text: &str) -> Option<(&'static str, &'static str)> {
    const LIKE: &str = "write it like \"https://app.example\" or \"http://localhost:3000\"";
    let wrong = |what| Some((what, LIKE));
    if text.eq_ignore_ascii_case("null") {
        return Some((
            "is the origin of every sandboxed page and local file",
            "name the pages' own origins, or use \"*\" alone",
        ));
    }
    let Some((scheme, authority)) = text.split_once("://") else { return wrong("is not an origin") };
    let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    if !scheme_ok {
        return wrong("is not an origin");
    }
    if authority.contains(['/', '?', '#', '@']) {
        return wrong("has more than scheme, host and port: a browser sends no path and no `/` at the end");
    }
    if text.contains('*') {
        return wrong("holds a `*`: origins are compared whole");
    }
    if !text.is_ascii() {
        return wrong("has other letters than ASCII: browsers write such hosts as xn--…");
    }
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return wrong("has capital letters: browsers write origins in lower case");
    }
    let (host, port) = match authority.rfind(':') {
        Some(at) if !authority.ends_with(']') => (&authority[..at], Some(&authority[at + 1..])),
        _ => (authority, None),
    };
    let host_ok = match host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok_and(|ip| ip.to_string() == inner),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
    };
    if !host_ok {
        return wrong("has no host as browsers write it");
    }
    match port {
        Some("80") if scheme == "http" => wrong("names the port that http has anyway, which browsers leave out"),
        Some("443") if scheme == "https" => wrong("names the port that https has anyway, which browsers leave out"),
        Some(port)
            if port.starts_with('0') || !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err() =>
        {
            wrong("has no port from 1 to 65535")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(cors: &Cors, origins: &[&str]) -> Vec<(&'static str, String)> {
        let grant = cors.grant(origins.iter().map(|origin| origin.as_bytes()));
        cors.fields(grant).map(|(name, value)| (name, value.to_owned())).collect()
    }

    #[test]
    fn an_origin_is_granted_whole_or_not_at_all() {
        let listed = Cors::Origins(vec!["https://app.example".into(), "http://localhost:3000".into()]);
        let vary = ("Vary", "Origin".to_owned());
        for origin in ["https://app.example", "http://localhost:3000"] {
            let expected = [
                vary.clone(),
                ("Access-Control-Allow-Origin", origin.to_owned()),
                ("Access-Control-Expose-Headers", EXPOSED.to_owned()),
            ];
            assert_eq!(fields(&listed, &[origin]), expected);
        }
        for origins in [
            &[][..],
            &["null"],
            &[""],
            &["https://app.example/"],
            &["https://app.example:443"],
            &["https://APP.example"],
            &["http://app.example"],
            &["https://app.example.evil"],
            &["https://evil.app.example"],
            &["https://app.example, https://app.example"],
            &["https://app.example", "https://app.example"],
            &["*"],
        ] {
            assert_eq!(fields(&listed, origins), std::slice::from_ref(&vary), "{origins:?}");
        }
        assert_eq!(fields(&Cors::Off, &["https://app.example"]), []);
        for origins in [&["null"][..], &["https://x.test"], &[]] {
            assert_eq!(fields(&Cors::Anybody, origins)[1], ("Access-Control-Allow-Origin", "*".to_owned()));
        }
    }

    #[test]
    fn what_a_browser_would_never_send() {
        for text in [
            "null",
            "NULL",
            "app.example",
            "https://",
            "https://app.example/",
            "https://app.example/x",
            "https://u@app.example",
            "https://*.app.example",
            "https://App.example",
            "HTTPS://app.example",
            "https://app.example:443",
            "http://app.example:80",
            "https://app.example:0",
            "https://app.example:",
            "https://app.example:99999",
            "https://app.example:x",
            "https://b\u{fc}cher.example",
            "://x",
            "1http://x",
            "https://[::1",
            "https://[0:0::1]",
            "https://a b",
            "",
            "https://app.example?x",
            "*,",
        ] {
            assert!(wrong_origin(text).is_some(), "{text}");
        }
        for text in [
            "https://app.example",
            "http://localhost:3000",
            "https://[::1]:8443",
            "http://127.0.0.1",
            "https://xn--bcher-kva.example",
            "capacitor://localhost",
            "chrome-extension://abcdefghijklmnop",
            "http://app.example:443",
            "https://a_b.example",
        ] {
            assert_eq!(wrong_origin(text), None, "{text}");
        }
    }
}
