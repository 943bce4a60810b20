//! Says of a parameter's name whether some backend reads it as another one, in few lines and without a look at tollgate's own:
//! the rules of Rack and of PHP one after the other.

/// The name as Rack reads it: brackets and blanks around it go, and it ends at a bracket or NUL.
fn rack(name: &[u8]) -> Vec<u8> {
    let strips = |b: &u8| matches!(b, b'[' | b']' | b' ' | 0 | 9..=13);
    let name: Vec<u8> = name.iter().copied().skip_while(strips).collect();
    let end = name.iter().position(|b| matches!(b, b'[' | b']' | 0)).unwrap_or(name.len());
    let mut name = name[..end].to_vec();
    while name.last().is_some_and(|b| matches!(b, b' ' | 9..=13)) {
        name.pop();
    }
    name
}

/// The name as PHP reads it: it ends at NUL, spaces before it go, and dots, spaces and an open bracket are `_`.
fn php(name: &[u8]) -> Vec<u8> {
    let name: Vec<u8> =
        name.split(|b| *b == 0).next().unwrap_or_default().iter().copied().skip_while(|b| *b == b' ').collect();
    if name.first() == Some(&b'[') {
        return Vec::new();
    }
    name.iter().map(|b| if matches!(b, b'.' | b' ' | b'[') { b'_' } else { *b }).collect()
}

/// PHP's array: what is before the bracket.
fn php_array(name: &[u8]) -> Vec<u8> {
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    php(name.split(|b| *b == b'[').next().unwrap_or_default())
}

/// Whether a decoded name is this one to some backend.
pub fn reads_as(name: &[u8], known: &[u8]) -> bool {
    let mut name = name;
    while let Some(rest) = name.strip_prefix(b"\xef\xbb\xbf") {
        name = rest;
    }
    name == known
        || rack(name) == known
        || php(name) == known
        || (name.first() != Some(&b'[') && php_array(name) == known)
}

/// Every name and value of a query or a form, as it is written, split at `&` alone and at `;` too.
pub fn pairs(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let narrow = text.split(|b| matches!(b, b'&' | b';'));
    let wide = text.split(|b| *b == b'&');
    narrow.chain(wide)
}

/// The decoded name and value of a pair, by the `form_urlencoded` crate, which makes text of them.
pub fn decoded(pair: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (name, value) = match pair.iter().position(|b| *b == b'=') {
        Some(at) => (&pair[..at], &pair[at + 1..]),
        None => (pair, &pair[..0]),
    };
    (percent(name), percent(value))
}

/// Decodes by the `percent-encoding` that `url` brings, after `+`. The bytes stay, where the crate's own form decoder would
/// put U+FFFD.
fn percent(text: &[u8]) -> Vec<u8> {
    let spaced: Vec<u8> = text.iter().map(|b| if *b == b'+' { b' ' } else { *b }).collect();
    percent_encoding::percent_decode(&spaced).collect()
}
