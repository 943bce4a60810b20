//! The hosts that a route is limited to, and the form of a request's Host that they are compared with. Pure. The client's own
//! bytes are forwarded; the canonical form is used for matching only.

use std::borrow::Cow;

/// A host name, or `*.` and a name for every name below it. It has the canonical form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPattern {
    name: Box<[u8]>,
    /// Every name below `name`, and not `name` itself.
    below: bool,
}

impl std::str::FromStr for HostPattern {
    type Err = HostPatternError;

    fn from_str(text: &str) -> Result<Self, HostPatternError> {
        let (name, below) = text.strip_prefix("*.").map_or((text, false), |name| (name, true));
        let name = name.strip_suffix('.').unwrap_or(name);
        let plain = |label: &str| {
            !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        };
        if name.len() > LONGEST_NAME || !name.split('.').all(plain) {
            return Err(HostPatternError);
        }
        Ok(Self { name: name.to_ascii_lowercase().into_bytes().into(), below })
    }
}

const LONGEST_NAME: usize = 253;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not a host name")]
pub struct HostPatternError;

impl std::fmt::Display for HostPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, String::from_utf8_lossy(&self.name))
    }
}

/// Patterns with a value each, found by a host.
#[derive(Clone, Debug)]
pub(super) struct ByHost<T> {
    sorted: Vec<(HostPattern, T)>,
}

impl<T> Default for ByHost<T> {
    fn default() -> Self {
        Self { sorted: Vec::new() }
    }
}

impl<T: Default> ByHost<T> {
    pub(super) fn entry(&mut self, pattern: &HostPattern) -> &mut T {
        let place = self.sorted.binary_search_by(|(known, _)| known.cmp(pattern)).unwrap_or_else(|place| {
            self.sorted.insert(place, (pattern.clone(), T::default()));
            place
        });
        &mut self.sorted[place].1
    }

    /// What matches a host in its canonical form, the most specific first: its own name, then `*.` before ever fewer labels.
    pub(super) fn matching<'a>(&'a self, host: &'a [u8]) -> impl Iterator<Item = &'a T> {
        let of = |name: &[u8], below: bool| {
            let found = self.sorted.binary_search_by(|(known, _)| (&*known.name, known.below).cmp(&(name, below)));
            found.ok().map(|place| &self.sorted[place].1)
        };
        // Nothing is below the empty name in front of a dot at the beginning.
        let parents = memchr::memchr_iter(b'.', host).filter(|dot| *dot > 0).map(|dot| &host[dot + 1..]);
        of(host, false).into_iter().chain(parents.filter_map(move |name| of(name, true)))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }
}

/// The form of a Host that is compared: lower case, no port, no dots at its end, by which some servers find the same site.
pub(super) fn canonical(host: &[u8]) -> Cow<'_, [u8]> {
    let end = match host {
        // An IPv6 address; no pattern matches it.
        [b'[', ..] => memchr::memchr(b']', host).map_or(host.len(), |close| close + 1),
        _ => memchr::memchr(b':', host).unwrap_or(host.len()),
    };
    let mut name = &host[..end];
    while let [rest @ .., b'.'] = name {
        name = rest;
    }
    match name.iter().any(u8::is_ascii_uppercase) {
        true => Cow::Owned(name.to_ascii_lowercase()),
        false => Cow::Borrowed(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_compared_in_one_form() {
        for (host, form) in [
            ("api.test", "api.test"),
            ("API.Test:8080", "api.test"),
            ("api.test.", "api.test"),
            ("api.test..:80", "api.test"),
            ("10.0.0.1:80", "10.0.0.1"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            (".", ""),
        ] {
            assert_eq!(canonical(host.as_bytes()).as_ref(), form.as_bytes(), "{host}");
        }
    }

    #[test]
    fn the_most_specific_pattern_comes_first() {
        let mut hosts: ByHost<String> = ByHost::default();
        for text in ["*.test", "a.b.test", "*.b.test", "b.test", "*.a.b.test", "B.Other."] {
            let pattern: HostPattern = text.parse().unwrap();
            *hosts.entry(&pattern) = pattern.to_string();
        }
        let all = |host: &str| hosts.matching(host.as_bytes()).cloned().collect::<Vec<_>>().join(" ");
        for (host, expected) in [
            ("a.b.test", "a.b.test *.b.test *.test"),
            ("x.a.b.test", "*.a.b.test *.b.test *.test"),
            ("b.test", "b.test *.test"),
            ("test", ""),
            (".test", ""),
            (".b.test", "*.test"),
            ("xb.test", "*.test"),
            ("b.other", "b.other"),
            ("", ""),
        ] {
            assert_eq!(all(host), expected, "{host}");
        }
    }

    #[test]
    fn what_is_no_host_name() {
        for text in ["", "*", "*.", "a..b", ".a", "a:80", "a/b", "*a.b", "a.*.b", "[::1]", "é.test", "a b"] {
            assert_eq!(text.parse::<HostPattern>().err(), Some(HostPatternError), "{text:?}");
        }
        assert!("a.".repeat(127).parse::<HostPattern>().is_ok());
        assert!("a.".repeat(128).parse::<HostPattern>().is_err());
    }
}
