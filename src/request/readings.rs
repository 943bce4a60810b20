//! How other servers could read a path: with an escaped slash as a slash, without what follows a `;`, decoded twice, cut at an
//! escaped `?`, without regard to letter case. Used only to find that a path would have a stricter route with one of them; what is
//! forwarded are the client's own bytes. Pure; knows no routes.

use super::target;
use smallvec::SmallVec;

/// A slash that was escaped. No path has this byte: [`target::check`] refuses it, raw and escaped.
const ESCAPED_SLASH: u8 = 0;

/// Whether a path in its canonical form can be read in another way at all, beside letter case.
pub(super) fn is_equivocal(canonical: &[u8]) -> bool {
    let hidden = |at: usize| {
        target::escape(&canonical[at + 1..]).is_some_and(|byte| matches!(byte, b'/' | b';' | b'%' | b'?' | b'#'))
    };
    memchr::memchr2_iter(b';', b'%', canonical).any(|at| canonical[at] == b';' || hidden(at))
}

/// Whether all servers read a path as it stands.
pub(super) fn is_plain(canonical: &[u8]) -> bool {
    static OTHER: [bool; 256] = byte_set!(is_other);
    const fn is_other(byte: u8) -> bool {
        byte.is_ascii_uppercase() || matches!(byte, b'%' | b';')
    }
    !canonical.iter().any(|byte| OTHER[usize::from(*byte)])
}

/// The paths that others see in one that has the canonical form, each in the form of [`fold`]. `None`: some see a dot segment.
pub(super) fn of(canonical: &[u8]) -> Option<SmallVec<[Vec<u8>; 4]>> {
    let mut readings: SmallVec<[Vec<u8>; 4]> = SmallVec::new();
    for decoded in [fold(canonical), decode(canonical, Escapes::Once)] {
        let whole = decoded.as_slice();
        let ended = memchr::memchr2(b'?', b'#', whole).map(|end| &whole[..end]);
        for path in [Some(whole), ended].into_iter().flatten() {
            let (apart, cut) = (split(path), without_parameters(path));
            for read in [path.to_vec(), without_parameters(&apart), split(&cut), apart, cut] {
                if read.split(|byte| *byte == b'/').any(|segment| matches!(segment, b"." | b"..")) {
                    return None;
                }
                let read = target::canonical(&read);
                if !readings.iter().any(|known| **known == *read) {
                    readings.push(read.into_owned());
                }
            }
        }
    }
    Some(readings)
}

/// Small letters, and all escapes decoded, also those that appear by it; an escaped slash is told from a raw one.
pub(super) fn fold(path: &[u8]) -> Vec<u8> {
    decode(path, Escapes::All)
}

#[derive(Clone, Copy, PartialEq)]
enum Escapes {
    Once,
    All,
}

fn decode(path: &[u8], escapes: Escapes) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    // What stands before was decoded.
    let mut done = 0;
    for byte in path {
        out.push(byte.to_ascii_lowercase());
        while let [.., b'%', high, low] = out[done..]
            && let Some(decoded) = target::escape(&[high, low])
        {
            out.truncate(out.len() - 3);
            out.push(if decoded == b'/' { ESCAPED_SLASH } else { decoded.to_ascii_lowercase() });
            // It may be the end of another escape.
            if escapes == Escapes::Once {
                done = out.len();
            }
        }
    }
    out
}

fn split(path: &[u8]) -> Vec<u8> {
    // A backslash can only have been escaped twice.
    path.iter().map(|byte| if matches!(*byte, ESCAPED_SLASH | b'\\') { b'/' } else { *byte }).collect()
}

fn without_parameters(path: &[u8]) -> Vec<u8> {
    let mut within = false;
    let is_left = |byte: &u8| {
        within = *byte == b';' || (within && *byte != b'/');
        !within
    };
    path.iter().copied().filter(is_left).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn sees(path: &str, expected: &[&str]) {
        let read: Vec<String> =
            of(path.as_bytes()).unwrap().iter().map(|path| String::from_utf8_lossy(path).replace('\0', "|")).collect();
        assert_eq!(read, expected, "{path}");
    }

    #[test]
    fn the_readings_of_a_path() {
        sees("/a/b", &["/a/b"]);
        sees("/A/%C3%84", &["/a/Ä"]);
        sees("/a%2Fb", &["/a|b", "/a/b"]);
        sees("/a;x/b", &["/a;x/b", "/a/b"]);
        sees("/a%3Bx%2Fc/b", &["/a;x|c/b", "/a/c/b", "/a/b", "/a;x/c/b"]);
        sees("/g%2Fa;x%2Fc", &["/g|a;x|c", "/g/a/c", "/g/a", "/g/a;x/c", "/g|a"]);
        sees("/a%252Fb", &["/a|b", "/a/b", "/a%2Fb"]);
        sees("/%2561", &["/a"]);
        sees("/%25%36%31", &["/a"]);
        sees("/a;%252F%2Fb", &["/a;||b", "/a/b", "/a", "/a;/b", "/a;%2F|b", "/a;%2F/b"]);
        sees("/a%255Cb", &["/a\\b", "/a/b", "/a%5Cb"]);
        sees("/a%3Fb%2Fc", &["/a?b|c", "/a?b/c", "/a"]);
        sees("/a%23", &["/a#", "/a"]);
        sees("/a;.json", &["/a;", "/a"]);
        sees("/a%2F%2Fb%2F", &["/a||b|", "/a/b"]);
        sees("/a%2F.JSON", &["/a|", "/a/.json"]);
        for dots in ["/a/%252e%252e/b", "/a/%252E;x/b", "/a%2F%252e", "/..%3Fx", "/%252e%3Bx", "/a/%25%32%45"] {
            assert_eq!(of(dots.as_bytes()), None, "{dots}");
        }
        assert!(
            ["/a%2Fb", "/a;x", "/a%3Bx", "/a%25", "/a%3F", "/a%23"].iter().all(|path| is_equivocal(path.as_bytes()))
        );
        assert!(
            ["/", "/a/b", "/a:b@c", "/a.json"]
                .iter()
                .all(|path| is_plain(path.as_bytes()) && of(path.as_bytes()).unwrap().len() == 1)
        );
        assert!(!["/A", "/a%20b", "/a;"].iter().any(|path| is_plain(path.as_bytes())));
        assert!(!["/", "/a/B", "/a%20b", "/%C3%A4", "/a:b@c"].iter().any(|path| is_equivocal(path.as_bytes())));
    }

    #[test]
    fn decoding_takes_time_by_length_only() {
        // Each level of it takes two bytes off; this many levels would take hours one after the other.
        let deep = [b"/%".as_slice(), &b"25".repeat(30_000), b"2F"].concat();
        assert_eq!(fold(&deep), [b'/', ESCAPED_SLASH]);
    }
}
