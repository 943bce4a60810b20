//! curl's arguments as the bytes that curl sends: so that a line from a terminal or a ticket can be explained as it is. A test
//! compares with the real curl. What is not known is refused by name: a flag that is left out could change the request.

use base64::Engine as _;
use std::fmt::Write as _;
use std::path::Path;

/// A request as curl sends it.
#[derive(Debug, PartialEq, Eq)]
pub struct CurlRequest {
    pub bytes: Vec<u8>,
    pub https: bool,
    /// The port that it connects to.
    pub port: u16,
}

/// Larger bodies are sent only after the server has said 100.
const EXPECTS_ABOVE: usize = 1024 * 1024;
/// The real one is random.
const BOUNDARY: &str = "------------------------0000000000000000";

/// Flags without a value that say nothing about the request, by their short and long names.
const IGNORED: [(char, &str); 44] = [
    ('k', "insecure"),
    ('s', "silent"),
    ('S', "show-error"),
    ('i', "include"),
    ('v', "verbose"),
    ('L', "location"),
    ('f', "fail"),
    ('N', "no-buffer"),
    ('#', "progress-bar"),
    ('O', "remote-name"),
    ('J', "remote-header-name"),
    ('R', "remote-time"),
    ('4', "ipv4"),
    ('6', "ipv6"),
    ('a', "append"),
    ('q', "disable"),
    ('1', "tlsv1"),
    ('\0', "fail-with-body"),
    ('\0', "fail-early"),
    ('\0', "http1.1"),
    ('\0', "no-progress-meter"),
    ('\0', "location-trusted"),
    ('\0', "tlsv1.2"),
    ('\0', "tlsv1.3"),
    ('\0', "tcp-nodelay"),
    ('\0', "no-keepalive"),
    ('\0', "no-sessionid"),
    ('\0', "retry-connrefused"),
    ('\0', "retry-all-errors"),
    ('\0', "create-dirs"),
    ('\0', "styled-output"),
    ('\0', "no-styled-output"),
    ('\0', "basic"),
    ('\0', "post301"),
    ('\0', "post302"),
    ('\0', "post303"),
    ('\0', "raw"),
    ('\0', "remove-on-error"),
    ('\0', "ssl-reqd"),
    ('\0', "parallel"),
    ('\0', "trace-time"),
    ('\0', "no-clobber"),
    ('\0', "cert-status"),
    ('\0', "tcp-fastopen"),
];

/// The same with a value.
const IGNORED_VALUES: [(char, &str); 27] = [
    ('o', "output"),
    ('w', "write-out"),
    ('m', "max-time"),
    ('c', "cookie-jar"),
    ('D', "dump-header"),
    ('E', "cert"),
    ('Y', "speed-limit"),
    ('y', "speed-time"),
    ('\0', "connect-timeout"),
    ('\0', "retry"),
    ('\0', "retry-delay"),
    ('\0', "retry-max-time"),
    ('\0', "max-redirs"),
    ('\0', "cacert"),
    ('\0', "capath"),
    ('\0', "key"),
    ('\0', "key-type"),
    ('\0', "cert-type"),
    ('\0', "pass"),
    ('\0', "resolve"),
    ('\0', "connect-to"),
    ('\0', "interface"),
    ('\0', "limit-rate"),
    ('\0', "trace"),
    ('\0', "trace-ascii"),
    ('\0', "stderr"),
    ('\0', "unix-socket"),
];

/// Flags that shape the request, with whether they take a value.
const SHAPING: [(char, &str, bool); 26] = [
    ('X', "request", true),
    ('H', "header", true),
    ('d', "data", true),
    ('\0', "data-ascii", true),
    ('\0', "data-raw", true),
    ('\0', "data-binary", true),
    ('\0', "data-urlencode", true),
    ('\0', "json", true),
    ('F', "form", true),
    ('\0', "form-string", true),
    ('T', "upload-file", true),
    ('u', "user", true),
    ('\0', "oauth2-bearer", true),
    ('b', "cookie", true),
    ('A', "user-agent", true),
    ('e', "referer", true),
    ('r', "range", true),
    ('\0', "url", true),
    ('\0', "url-query", true),
    ('G', "get", false),
    ('I', "head", false),
    ('g', "globoff", false),
    ('0', "http1.0", false),
    ('\0', "compressed", false),
    ('\0', "path-as-is", false),
    ('\0', "next", false),
];

/// What the arguments say.
#[derive(Default)]
struct CurlArguments {
    url: Option<String>,
    method: Option<String>,
    headers: Vec<String>,
    /// Joined already.
    data: Option<Vec<u8>>,
    json: bool,
    parts: Vec<FormPart>,
    upload: Option<(String, Vec<u8>)>,
    user: Option<String>,
    bearer: Option<String>,
    cookies: Vec<String>,
    agent: Option<String>,
    referer: Option<String>,
    range: Option<String>,
    get: bool,
    head: bool,
    globoff: bool,
    http10: bool,
    compressed: bool,
    path_as_is: bool,
}

/// A part of a form.
struct FormPart {
    name: String,
    filename: Option<String>,
    content_type: Option<String>,
    value: Vec<u8>,
}

/// The request of these arguments; the word `curl` before them is skipped. The error says what is wrong, and never a value.
pub fn request(arguments: &[String]) -> Result<CurlRequest, String> {
    let arguments = match arguments {
        [first, rest @ ..] if first == "curl" || first.ends_with("/curl") => rest,
        all => all,
    };
    let mut said = CurlArguments::default();
    let mut rest = arguments.iter();
    let mut only_urls = false;
    while let Some(argument) = rest.next() {
        let mut next = |name: &str| rest.next().cloned().ok_or_else(|| format!("{name} needs a value"));
        if only_urls || !argument.starts_with('-') || argument == "-" {
            said.url(argument)?;
        } else if argument == "--" {
            only_urls = true;
        } else if let Some(name) = argument.strip_prefix("--") {
            match flag(|(_, long)| long == name) {
                Some((long, true)) => {
                    let value = next(&format!("--{long}"))?;
                    said.take(long, value)?;
                }
                Some((long, false)) => said.take(long, String::new())?,
                None => return Err(format!("--{name}: not a flag that explain knows; a request may depend on it")),
            }
        } else {
            let letters = &argument[1..];
            for (at, letter) in letters.char_indices() {
                let Some((long, takes)) = flag(|(short, _)| short == letter) else {
                    return Err(format!("-{letter}: not a flag that explain knows; a request may depend on it"));
                };
                if takes {
                    let attached = &letters[at + letter.len_utf8()..];
                    let value = if attached.is_empty() { next(&format!("-{letter}"))? } else { attached.to_owned() };
                    said.take(long, value)?;
                    break;
                }
                said.take(long, String::new())?;
            }
        }
    }
    said.request()
}

/// A flag's long name, and whether it takes a value.
fn flag(is: impl Fn((char, &str)) -> bool) -> Option<(&'static str, bool)> {
    let ignored = IGNORED.iter().map(|(short, long)| (*short, *long, false));
    let valued = IGNORED_VALUES.iter().map(|(short, long)| (*short, *long, true));
    let mut all = SHAPING.iter().copied().chain(ignored).chain(valued);
    all.find(|(short, long, _)| is((*short, long))).map(|(_, long, takes)| (long, takes))
}

impl CurlArguments {
    fn url(&mut self, url: &str) -> Result<(), String> {
        if self.url.is_some() {
            return Err("there are two URLs: explain one request at a time".into());
        }
        self.url = Some(url.to_owned());
        Ok(())
    }

    fn take(&mut self, flag: &'static str, value: String) -> Result<(), String> {
        match flag {
            "request" => self.method = Some(value),
            "header" if value.starts_with('@') => {
                let text = String::from_utf8_lossy(&read(&value[1..])?).into_owned();
                self.headers.extend(text.lines().map(str::to_owned));
            }
            "header" => self.headers.push(value),
            "data" | "data-ascii" => {
                let data = match value.strip_prefix('@') {
                    // Line ends and NUL are taken out, as curl does with files.
                    Some(file) => read(file)?.into_iter().filter(|b| !matches!(b, b'\r' | b'\n' | 0)).collect(),
                    None => value.into_bytes(),
                };
                self.add_data(b"&", &data);
            }
            "data-raw" => self.add_data(b"&", value.as_bytes()),
            "data-binary" => {
                let data = value.strip_prefix('@').map_or_else(|| Ok(value.clone().into_bytes()), read)?;
                self.add_data(b"&", &data);
            }
            "data-urlencode" => {
                let data = url_encoded(&value)?;
                self.add_data(b"&", &data);
            }
            "json" => {
                let data = value.strip_prefix('@').map_or_else(|| Ok(value.clone().into_bytes()), read)?;
                self.add_data(b"", &data);
                self.json = true;
            }
            "form" => self.parts.push(form_part(&value)?),
            "form-string" => {
                let (name, text) = value.split_once('=').ok_or("--form-string needs NAME=VALUE")?;
                let value = text.as_bytes().to_vec();
                self.parts.push(FormPart { name: name.into(), filename: None, content_type: None, value });
            }
            "upload-file" => {
                let name = Path::new(&value).file_name().map(|name| name.to_string_lossy().into_owned());
                self.upload = Some((name.unwrap_or_default(), read(&value)?));
            }
            "user" => self.user = Some(value),
            "oauth2-bearer" => self.bearer = Some(value),
            "cookie" if !value.contains('=') => {
                return Err("-b with a file of cookies: give them as NAME=VALUE".into());
            }
            "cookie" => self.cookies.push(value),
            "user-agent" => self.agent = Some(value),
            "referer" => self.referer = Some(value),
            "range" => self.range = Some(value),
            "url" => self.url(&value)?,
            "url-query" | "next" => return Err(format!("--{flag} is not known here: write the request without it")),
            "get" => self.get = true,
            "head" => self.head = true,
            "globoff" => self.globoff = true,
            "http1.0" => self.http10 = true,
            "compressed" => self.compressed = true,
            "path-as-is" => self.path_as_is = true,
            // It says nothing about the request.
            _ => {}
        }
        Ok(())
    }

    fn add_data(&mut self, between: &[u8], more: &[u8]) {
        let data = self.data.get_or_insert_default();
        if !data.is_empty() {
            data.extend_from_slice(between);
        }
        data.extend_from_slice(more);
    }

    fn request(mut self) -> Result<CurlRequest, String> {
        let kinds = [self.data.is_some() && !self.get, !self.parts.is_empty(), self.head, self.upload.is_some()];
        if kinds.iter().filter(|asked| **asked).count() > 1 {
            return Err("curl takes one of -d, -F, -I and -T".into());
        }
        if self.range.is_some() && (self.data.is_some() || self.upload.is_some() || !self.parts.is_empty()) {
            return Err("-r with a body is not known here: write the request without it".into());
        }
        let url = self.url.take().ok_or("there is no URL")?;
        let mut url = CurlUrl::parse(&url, self.globoff)?;
        if !self.path_as_is {
            url.path = without_dots(&url.path);
        }
        if let (true, Some(data)) = (self.get, &mut self.data) {
            if data.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) {
                return Err(
                    "curl refuses a URL with a blank or a control character, which -G makes of this data".into()
                );
            }
            url.add_query(&std::mem::take(data));
            self.data = None;
        }
        if let Some((name, _)) = &self.upload
            && url.path.ends_with('/')
        {
            url.path.push_str(&percent_encoded(name.as_bytes()));
        }
        if self.json {
            for (name, line) in
                [("content-type", "Content-Type: application/json"), ("accept", "Accept: application/json")]
            {
                if header(&self.headers, name).is_none() {
                    self.headers.push(line.into());
                }
            }
        }
        let method = self.method.clone().unwrap_or_else(|| {
            let posts = self.data.is_some() || !self.parts.is_empty();
            match (self.head, self.upload.is_some(), posts) {
                (true, ..) => "HEAD",
                (_, true, _) => "PUT",
                (_, _, true) => "POST",
                _ => "GET",
            }
            .into()
        });
        let mut bytes = self.head_lines(&method, &url).into_bytes();
        let body = self.body_lines(&mut bytes);
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&body);
        Ok(CurlRequest { bytes, https: url.https, port: url.port })
    }

    /// All but what is about the body.
    fn head_lines(&self, method: &str, url: &CurlUrl) -> String {
        let mut head = format!("{method} {} HTTP/1.{}\r\n", url.target(), u8::from(!self.http10));
        let mut line = |name: &str, value: &str| {
            // Nothing can fail that is written to a string.
            let _ = write!(head, "{name}: {value}\r\n");
        };
        match header(&self.headers, "host") {
            Some("") => {}
            Some(host) => line("Host", host),
            None => line("Host", &url.authority),
        }
        let asked = |name: &str| header(&self.headers, name).is_some();
        let user = self.user.clone().or(url.user.clone());
        match (&self.bearer, user) {
            _ if asked("authorization") => {}
            (Some(token), _) => line("Authorization", &format!("Bearer {token}")),
            (None, Some(user)) => {
                let user = if user.contains(':') { user } else { format!("{user}:") };
                line("Authorization", &format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(user)));
            }
            (None, None) => {}
        }
        if let Some(range) = &self.range {
            line("Range", &format!("bytes={range}"));
        }
        match &self.agent {
            _ if asked("user-agent") => {}
            Some(agent) if agent.is_empty() => {}
            Some(agent) => line("User-Agent", agent),
            None => line("User-Agent", "curl"),
        }
        if !asked("accept") {
            line("Accept", "*/*");
        }
        if self.compressed && !asked("accept-encoding") {
            line("Accept-Encoding", "deflate, gzip, br, zstd");
        }
        if let Some(referer) = self.referer.as_ref().filter(|text| !text.is_empty() && !asked("referer")) {
            line("Referer", referer);
        }
        if !self.cookies.is_empty() && !asked("cookie") {
            line("Cookie", &self.cookies.join(";"));
        }
        for custom in &self.headers {
            let own_type = !self.parts.is_empty();
            match (custom.split_once(':'), custom.strip_suffix(';')) {
                (Some((name, _)), _) if name.eq_ignore_ascii_case("host") => {}
                (Some((name, _)), _) if own_type && name.eq_ignore_ascii_case("content-type") => {}
                (Some((_, value)), _) if value.trim().is_empty() => {}
                (Some(_), _) => head.push_str(&format!("{custom}\r\n")),
                (None, Some(name)) if !name.contains(':') => head.push_str(&format!("{name}:\r\n")),
                (None, _) => {}
            }
        }
        head
    }

    /// Writes what is said of the body, and returns it.
    fn body_lines(&self, bytes: &mut Vec<u8>) -> Vec<u8> {
        let mut line = |name: &str, value: &str| bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        let asked = |name: &str| header(&self.headers, name).is_some();
        let expects = |body: &[u8]| body.len() > EXPECTS_ABOVE && !self.http10 && !asked("expect");
        let length = |body: &[u8]| body.len().to_string();
        if let Some((_, body)) = &self.upload {
            if !asked("content-length") {
                line("Content-Length", &length(body));
            }
            // Before curl 8.7 whatever the size, behind that for large ones only.
            if !self.http10 && !asked("expect") {
                line("Expect", "100-continue");
            }
            return body.clone();
        }
        if !self.parts.is_empty() {
            let body = multipart(&self.parts);
            if !asked("content-length") {
                line("Content-Length", &length(&body));
            }
            let kind = header(&self.headers, "content-type").unwrap_or("multipart/form-data");
            line("Content-Type", &format!("{kind}; boundary={BOUNDARY}"));
            if expects(&body) {
                line("Expect", "100-continue");
            }
            return body;
        }
        let Some(body) = &self.data else { return Vec::new() };
        if !asked("content-length") {
            line("Content-Length", &length(body));
        }
        if !asked("content-type") {
            line("Content-Type", "application/x-www-form-urlencoded");
        }
        if expects(body) {
            line("Expect", "100-continue");
        }
        body.clone()
    }
}

/// The value of a header that is given by -H; empty for one that is taken out or sent without a value.
fn header<'a>(headers: &'a [String], name: &str) -> Option<&'a str> {
    headers.iter().find_map(|line| {
        let end = line.find([':', ';'])?;
        line[..end].eq_ignore_ascii_case(name).then(|| line[end + 1..].trim())
    })
}

fn read(path: &str) -> Result<Vec<u8>, String> {
    let read = match path {
        "-" => {
            use std::io::Read as _;
            let mut bytes = Vec::new();
            std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
        }
        path => std::fs::read(path),
    };
    read.map_err(|error| format!("{path}: cannot be read: {error}"))
}

/// `--data-urlencode`: `content`, `=content`, `name=content`, `@file`, `name@file`.
fn url_encoded(value: &str) -> Result<Vec<u8>, String> {
    let at = value.find(['=', '@']);
    let (name, content) = match at.map(|at| (&value[..at], value.as_bytes()[at], &value[at + 1..])) {
        None => ("", value.as_bytes().to_vec()),
        Some((name, b'@', file)) => (name, read(file)?),
        Some((name, _, content)) => (name, content.as_bytes().to_vec()),
    };
    // A blank becomes a plus sign, as in a form.
    let encoded = percent_encoded(&content).replace("%20", "+");
    Ok(if name.is_empty() { encoded.into_bytes() } else { format!("{name}={encoded}").into_bytes() })
}

fn percent_encoded(bytes: &[u8]) -> String {
    let mut out = String::new();
    for byte in bytes {
        match byte {
            b if b.is_ascii_alphanumeric() || b"-._~".contains(b) => out.push(char::from(*b)),
            b => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}

/// `-F`: `name=value`, `name=@file`, `name=<file`, with `;type=` and `;filename=`.
fn form_part(value: &str) -> Result<FormPart, String> {
    let (name, rest) = value.split_once('=').ok_or("-F needs NAME=VALUE")?;
    let mut pieces = rest.split(';');
    let content = pieces.next().unwrap_or_default();
    let (mut content_type, mut filename) = (None, None);
    for piece in pieces {
        match piece.trim_start().split_once('=') {
            Some(("type", kind)) => content_type = Some(kind.to_owned()),
            Some(("filename", name)) => filename = Some(name.trim_matches('"').to_owned()),
            _ => return Err("-F with other than `;type=` and `;filename=` is not known here".into()),
        }
    }
    let value = match content.chars().next() {
        Some('@') => {
            let path = &content[1..];
            let own = Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned());
            filename = filename.or(own);
            let named = filename.clone().unwrap_or_default();
            content_type = content_type.or_else(|| Some(type_of(&named).into()));
            read(path)?
        }
        Some('<') => read(&content[1..])?,
        _ => content.as_bytes().to_vec(),
    };
    Ok(FormPart { name: name.into(), filename, content_type, value })
}

/// The type of a file by its name, as curl has it.
fn type_of(name: &str) -> &'static str {
    let name = name.to_ascii_lowercase();
    let known = [
        (".gif", "image/gif"),
        (".jpg", "image/jpeg"),
        (".jpeg", "image/jpeg"),
        (".png", "image/png"),
        (".svg", "image/svg+xml"),
        (".txt", "text/plain"),
        (".htm", "text/html"),
        (".html", "text/html"),
        (".pdf", "application/pdf"),
        (".xml", "application/xml"),
    ];
    known.iter().find(|(end, _)| name.ends_with(end)).map_or("application/octet-stream", |(_, kind)| kind)
}

fn multipart(parts: &[FormPart]) -> Vec<u8> {
    let quoted = |text: &str| text.replace('"', "%22").replace('\r', "%0D").replace('\n', "%0A");
    let mut body = Vec::new();
    for part in parts {
        let mut head = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{}\"", quoted(&part.name));
        if let Some(filename) = &part.filename {
            let _ = write!(head, "; filename=\"{}\"", quoted(filename));
        }
        head.push_str("\r\n");
        if let Some(kind) = &part.content_type {
            let _ = write!(head, "Content-Type: {kind}\r\n");
        }
        head.push_str("\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(&part.value);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

struct CurlUrl {
    https: bool,
    /// As it stands in Host.
    authority: String,
    port: u16,
    user: Option<String>,
    path: String,
    query: Option<Vec<u8>>,
}

impl CurlUrl {
    fn parse(url: &str, globoff: bool) -> Result<Self, String> {
        if !globoff && url.contains(['{', '}', '[', ']']) && !url.contains("://[") {
            return Err(
                "`{}` and `[]` in a URL stand for several requests to curl: use -g to send them as they are".into()
            );
        }
        if url.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err("curl refuses a URL with a blank or a control character".into());
        }
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let https = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err("only http and https can be explained".into()),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        let (user, authority) = match authority.rsplit_once('@') {
            Some((user, authority)) => {
                let decoded = percent_encoding::percent_decode_str(user).decode_utf8_lossy().into_owned();
                (Some(decoded), authority)
            }
            None => (None, authority),
        };
        let default = if https { 443 } else { 80 };
        let colon = authority.rfind(':').filter(|at| authority[at + 1..].bytes().all(|b| b.is_ascii_digit()));
        let (host, port) = match colon {
            Some(at) => (&authority[..at], authority[at + 1..].parse().unwrap_or(default)),
            None => (authority, default),
        };
        if host.is_empty() {
            return Err("the URL has no host".into());
        }
        let authority = if port == default { host.to_owned() } else { format!("{host}:{port}") };
        let (path, query) = match rest.split_once('?') {
            // As it is: curl escapes what is not ASCII in the path alone.
            Some((path, query)) => (path, Some(query.as_bytes().to_vec())),
            None => (rest, None),
        };
        let path = if path.is_empty() { "/".into() } else { escaped(path) };
        Ok(Self { https, authority, port, user, path, query })
    }

    fn add_query(&mut self, more: &[u8]) {
        match &mut self.query {
            Some(query) if !query.is_empty() => {
                query.push(b'&');
                query.extend_from_slice(more);
            }
            query => *query = Some(more.to_vec()),
        }
    }

    fn target(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{}", self.path, String::from_utf8_lossy(query)),
            None => self.path.clone(),
        }
    }
}

/// Bytes that are not ASCII are sent as escapes.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            0x80.. => out.push_str(&format!("%{byte:02x}")),
            byte => out.push(char::from(byte)),
        }
    }
    out
}

/// A path without `.` and `..`, which curl takes out before it sends it (RFC 3986, 5.2.4).
fn without_dots(path: &str) -> String {
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    let mut kept: Vec<&str> = Vec::new();
    for (place, segment) in segments.iter().enumerate() {
        let last = place + 1 == segments.len();
        match *segment {
            "." if last => kept.push(""),
            "." => {}
            ".." => {
                kept.pop();
                if last {
                    kept.push("");
                }
            }
            segment => kept.push(segment),
        }
    }
    format!("/{}", kept.join("/"))
}
