//! What must not leave in a backend's answer: tokens in links, and headers that servers behind the gateway say to each
//! other. Pure.

use crate::request::query::{Key, Names, form_decode};

/// Headers that make a front server act (send a file, fetch a blob); a client must neither see nor trigger them.
pub const INTERNAL: [&str; 3] = ["x-sendfile", "x-accel-redirect", "gitlab-workhorse-send-data"];

/// Takes credentials out of the URLs of a Link or Location value, into which GitLab 8.5 and later copy every parameter
/// of the request. `None`: nothing to take out.
pub fn without_tokens(value: &[u8], names: &Names) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value;
    let mut changed = false;
    while let Some(at) = memchr::memchr3(b'?', b'&', b';', rest) {
        out.extend_from_slice(&rest[..at]);
        let separator = rest[at];
        let mut tail = &rest[at + 1..];
        rest = loop {
            // A parameter ends where the next one begins, or with the URL.
            let end = tail.iter().position(|b| b"&;>\"#, ".contains(b)).unwrap_or(tail.len());
            let name = tail[..end].split(|b| *b == b'=').next().unwrap_or_default();
            if !is_secret(names, name) && !holds_secret(names, &tail[..end]) {
                out.push(separator);
                out.extend_from_slice(&tail[..end]);
                break &tail[end..];
            }
            changed = true;
            match tail.get(end) {
                Some(b'&') => tail = &tail[end + 1..],
                _ => break &tail[end..],
            }
        };
    }
    out.extend_from_slice(rest);
    changed.then_some(out)
}

fn is_secret(names: &Names, name: &[u8]) -> bool {
    matches!(names.key_of(name), Some((Key::Token | Key::AccessToken | Key::JobToken, _)))
}

/// Whether a parameter's value is itself a URL with a credential in it, encoded once or twice.
fn holds_secret(names: &Names, parameter: &[u8]) -> bool {
    let once = form_decode(parameter);
    let twice = form_decode(&once);
    [&once, &twice].into_iter().any(|text| {
        let mut words = text.split(|b| matches!(b, b'?' | b'&' | b';' | b'='));
        // The parameter's own name was looked at before.
        words.next();
        words.any(|word| is_secret(names, word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lose_their_tokens() {
        let names = Names { token: "private_token".into() };
        let clean = |value: &str| without_tokens(value.as_bytes(), &names).map(|v| String::from_utf8(v).unwrap());
        assert_eq!(
            clean("<http://h/p?page=2&per_page=20&private_token=S>; rel=\"next\", <http://h/p?private_token=S&page=1>; rel=\"first\"").unwrap(),
            "<http://h/p?page=2&per_page=20>; rel=\"next\", <http://h/p?page=1>; rel=\"first\""
        );
        assert_eq!(clean("http://h/p?private_token=S").unwrap(), "http://h/p");
        assert_eq!(clean("/p?private_token=S&private_token=T&x=1").unwrap(), "/p?x=1");
        assert_eq!(clean("/p?a=1&private%5Ftoken=S&access_token=T#f").unwrap(), "/p?a=1#f");
        assert_eq!(clean("http://h/login?next=%2Fp%3Fprivate_token%3DS&x=1").unwrap(), "http://h/login?x=1");
        assert_eq!(clean("http://h/login?next=%252Fp%253Fprivate_token%253DS").unwrap(), "http://h/login");
        assert_eq!(clean("<http://h/p?page=2>; rel=\"next\""), None);
    }
}
