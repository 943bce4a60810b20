//! Requests of HTTP/2: written down as HTTP/1, and their frames counted.

use crate::heads::{compare, reread};
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use tollgate::edge::fuzzing::{count_frames, head_of_http2};
use tollgate::request::head;
use tollgate::request::view::Framing;

/// A request from text: options, then method, scheme and authority, path, and `name:value` a line.
fn request(text: &[u8]) -> Option<Request<()>> {
    let mut lines = text.split(|b| *b == b'\n');
    let method = Method::from_bytes(lines.next()?).ok()?;
    let (authority, path) = (lines.next()?, lines.next()?);
    let mut uri = Uri::builder();
    if !authority.is_empty() {
        uri = uri.scheme("https").authority(authority);
    }
    let uri = uri.path_and_query(path).build().ok()?;
    let mut request = Request::builder().method(method).uri(uri).body(()).ok()?;
    for line in lines {
        let colon = line.iter().position(|b| *b == b':')?;
        let (name, value) = (HeaderName::from_lowercase(&line[..colon]).ok()?, &line[colon + 1..]);
        request.headers_mut().append(name, HeaderValue::from_bytes(value).ok()?);
    }
    Some(request)
}

pub fn written(data: &[u8]) {
    let Some((options, text)) = data.split_first() else { return };
    let Some(request) = request(text) else { return };
    let ended = options & 1 != 0;
    let (parts, ()) = request.into_parts();
    let Some(bytes) = head_of_http2(&parts, ended) else { return };
    assert_eq!(head::end_of_head(&bytes, 0), Some(bytes.len()), "more than one head");
    let Ok(view) = head::parse(&bytes) else { return };
    compare(&view, &bytes);
    let Some(read) = reread(&bytes) else { return };
    assert_eq!(read.method, parts.method.as_str(), "another method");
    let target = parts.uri.path_and_query().map(|target| target.as_str());
    assert!(parts.method == Method::CONNECT || Some(read.target) == target, "another target");
    if let Some(authority) = parts.uri.authority() {
        assert_eq!(view.host, authority.as_str().as_bytes(), "another host");
    }
    // Every field is there, byte for byte, as often as it came.
    for name in parts.headers.keys().filter(|name| !matches!(name.as_str(), "host" | "cookie")) {
        let given: Vec<&[u8]> = parts.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
        let mut written = read.values(name.as_str());
        if name.as_str() == "transfer-encoding" && !ended && !parts.headers.contains_key("content-length") {
            written.pop();
        }
        assert_eq!(written, given, "{name}");
    }
    let known = |name: &str| ["host", "transfer-encoding"].contains(&name) || parts.headers.contains_key(name);
    assert!(read.fields.iter().all(|field| known(field.name)), "a field that nobody sent");
    let cookies: Vec<&[u8]> = parts.headers.get_all("cookie").iter().map(HeaderValue::as_bytes).collect();
    // An empty one at the end leaves a blank, which no reader counts.
    assert_eq!(read.values("cookie").concat(), cookies.join(&b"; "[..]).trim_ascii_end(), "cookies");
    let length = parts.headers.contains_key("content-length");
    match view.body {
        Framing::Chunked => assert!(!ended && !length, "chunks"),
        Framing::Length(_) => assert!(length, "a length"),
        Framing::Empty => assert!(ended || length, "a body that nobody reads"),
    }
}

/// Burst of a kind, as docs/http2.md has them.
const BURSTS: [(&str, usize); 8] = [
    ("empty_data", 100),
    ("priority", 1_000),
    ("rst_stream", 400),
    ("settings", 50),
    ("ping", 1_000),
    ("window_update", 5_000),
    ("continuation", 500),
    ("unknown", 100),
];

/// Of a whole stream at once.
fn by_the_frame(stream: &[u8]) -> Result<bool, &'static str> {
    let Some(mut rest) = stream.get(24..) else { return Ok(false) };
    let (mut seen, mut block) = ([0; 8], false);
    while !rest.is_empty() {
        let Some(head) = rest.first_chunk::<9>() else { return Ok(true) };
        let length = usize::from(head[0]) * 65536 + usize::from(head[1]) * 256 + usize::from(head[2]);
        let (kind, flags) = (head[3], head[4]);
        let place = match kind {
            0 if length == 0 && flags & 1 == 0 => Some(0),
            0 | 1 | 7 => None,
            2 | 3 | 4 => Some(usize::from(kind) - 1),
            6 => Some(4),
            8 => Some(5),
            9 => Some(6),
            _ => Some(7),
        };
        if kind == 1 || kind == 9 {
            block = flags & 4 == 0;
        }
        if let Some(place) = place {
            seen[place] += 1;
            if seen[place] > BURSTS[place].1 {
                return Err(BURSTS[place].0);
            }
        }
        match rest.get(9 + length..) {
            Some(behind) => rest = behind,
            // A cut payload matters where it is a part of a head.
            None => return Ok(block || kind == 1 || kind == 9),
        }
    }
    Ok(block)
}

/// `times`, then a stream that is repeated as often.
pub fn frames(data: &[u8]) {
    let Some(([size, times], frames)) = data.split_first_chunk::<2>() else { return };
    let mut stream = vec![b'x'; 24];
    // Enough of them for every limit.
    let times = if frames.len() <= 32 { usize::from(*times) * 32 } else { usize::from(*times % 4) };
    (0..times.max(1)).for_each(|_| stream.extend_from_slice(frames));
    let expected = by_the_frame(&stream);
    assert_eq!(count_frames([stream.as_slice()].into_iter()), expected, "whole");
    assert_eq!(count_frames(stream.chunks(usize::from(*size).max(1))), expected, "in pieces of {size}");
}
