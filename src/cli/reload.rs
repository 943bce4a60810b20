//! `tollgate reload`: asks the running gateway to reload, waits, and reports what is in force. Reads the configuration
//! only for the address of the admin listener.

use super::Failure;
use super::configuration::ConfigOption;
use super::progress::Progress;
use crate::config;
use crate::edge::Listen;
use anyhow::{Context as _, anyhow, bail};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the gateway's admin listener is.
#[derive(clap::Args)]
pub(super) struct AdminTarget {
    #[command(flatten)]
    pub(super) config: ConfigOption,
    /// Address of the admin listener, `address:port` or `unix:/path`, if it differs from the one in the file
    #[arg(long, value_name = "ADDRESS")]
    pub(super) admin: Option<String>,
    /// File with the token of the admin listener, if it asks for one; or set TOLLGATE_ADMIN_TOKEN
    #[arg(long, value_name = "FILE")]
    admin_token_file: Option<PathBuf>,
    /// How long to wait for the result
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print JSON: what the gateway answers
    #[arg(long)]
    pub(super) json: bool,
}

/// The gateway's responses are far smaller, but for the status of one with thousands of servers.
const MAX_ANSWER: u64 = 64 * 1024 * 1024;
const TOKEN_VARIABLE: &str = "TOLLGATE_ADMIN_TOKEN";
const CONNECT: Duration = Duration::from_secs(5);
const NOT_REACHED: &str = "the gateway cannot be reached, nothing changed. If [admin] listen was changed since the start, \
                           pass the old address with --admin";

/// Sends a POST to the admin listener, and reads its answer.
pub(super) fn post(what: &str, arguments: &AdminTarget) -> Result<serde_json::Value, Failure> {
    post_json(what, None, arguments)
}

/// The same with a body.
pub(super) fn post_json(
    what: &str,
    body: Option<&serde_json::Value>,
    arguments: &AdminTarget,
) -> Result<serde_json::Value, Failure> {
    let answer = call("POST", what, body, arguments)?;
    match answer["result"].is_string() {
        true => Ok(answer),
        false => Err(anyhow!("unknown response of the admin listener; is it another version?").into()),
    }
}

/// Asks the admin listener for something that changes nothing.
pub(super) fn get(what: &str, arguments: &AdminTarget) -> Result<serde_json::Value, Failure> {
    call("GET", what, None, arguments)
}

/// The field with the token. Its value is never printed.
fn authorization(arguments: &AdminTarget) -> Result<String, Failure> {
    let (from, token) = match &arguments.admin_token_file {
        Some(path) => {
            let read = std::fs::read_to_string(path);
            let read = read.map_err(|error| Failure::Usage(format!("{}: cannot be read: {error}", path.display())))?;
            (path.display().to_string(), read)
        }
        None => match std::env::var(TOKEN_VARIABLE) {
            Ok(token) => (TOKEN_VARIABLE.to_owned(), token),
            Err(_) => return Ok(String::new()),
        },
    };
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::Usage(format!("{from}: is no token; expected one line of ASCII without spaces")));
    }
    Ok(format!("Authorization: Bearer {token}\r\n"))
}

fn call(
    method: &str,
    what: &str,
    body: Option<&serde_json::Value>,
    arguments: &AdminTarget,
) -> Result<serde_json::Value, Failure> {
    let field = authorization(arguments)?;
    let address = address(arguments)?;
    // The shortest time there is: a read timeout of 0 would mean none.
    let timeout = arguments.timeout.max(Duration::from_millis(1));
    let kind = if body.is_some() { "Content-Type: application/json\r\n" } else { "" };
    let body = body.map(ToString::to_string).unwrap_or_default();
    let length = if method == "POST" { format!("{kind}Content-Length: {}\r\n", body.len()) } else { String::new() };
    let request = |host: &str| {
        format!(
            "{method} {what} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n{field}{length}Connection: close\r\n\r\n{body}"
        )
    };
    let _shown = Progress::new("waiting for the gateway");
    let answer = match &address {
        AdminAddress::Tcp(address) => TcpStream::connect_timeout(address, CONNECT)
            .and_then(|stream| stream.set_read_timeout(Some(timeout)).map(|()| stream))
            .context(NOT_REACHED)
            .and_then(|stream| ask(stream, &request(&address.to_string()), timeout)),
        AdminAddress::Unix(path) => UnixStream::connect(path)
            .and_then(|stream| stream.set_read_timeout(Some(timeout)).map(|()| stream))
            .context(NOT_REACHED)
            .and_then(|stream| ask(stream, &request("localhost"), timeout)),
    };
    Ok(answer.with_context(|| format!("the admin listener at {address}"))?)
}

pub(super) fn run(target: &AdminTarget) -> Result<(), Failure> {
    let answer = post("/reload", target)?;
    let (applied, restart) = (texts(&answer, "applied"), texts(&answer, "restart_needed"));
    match answer["result"].as_str() {
        Some("reloaded" | "restart_needed") if target.json => {
            say!("{answer}")?;
            if restart.is_empty() { Ok(()) } else { Err(Failure::Restart) }
        }
        Some("reloaded" | "restart_needed") => {
            match applied.as_slice() {
                [] => say!("reloaded; no settings changed that can take effect without a restart")?,
                applied => say!("reloaded; changed and in force: {}", applied.join(", "))?,
            }
            if restart.is_empty() {
                return Ok(());
            }
            say!("changed, not in force until a restart: {}", restart.join(", "))?;
            Err(Failure::Restart)
        }
        _ => Err(not_done(&answer)),
    }
}

/// What the gateway's answer says if it did not do what it was asked for.
pub(super) fn not_done(answer: &serde_json::Value) -> Failure {
    match answer["result"].as_str() {
        Some("failed") => anyhow!("nothing changed\n{}", texts(answer, "errors").join("\n")).into(),
        _ => anyhow!("unknown response of the admin listener; is it another version?").into(),
    }
}

fn texts<'a>(answer: &'a serde_json::Value, name: &str) -> Vec<&'a str> {
    answer[name].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str).collect()
}

#[derive(Debug, PartialEq, Eq)]
enum AdminAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl std::fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

fn address(arguments: &AdminTarget) -> Result<AdminAddress, Failure> {
    if let Some(text) = &arguments.admin {
        return parse(text).ok_or_else(|| Failure::Usage(format!("{text}: not `address:port` or `unix:/path`")));
    }
    let Some(found) = arguments.config.search()? else {
        // The gateway may run with a configuration that is not here.
        return Ok(AdminAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 9090))));
    };
    let listen =
        config::admin_listener(&found.path).map_err(|why| Failure::Usage(format!("nothing changed\n{why}")))?;
    let address = match listen {
        Some(Listen::Tcp(text)) => parse(&text),
        Some(Listen::Unix(path, _)) => Some(AdminAddress::Unix(path.into())),
        None => {
            let why = "admin.listen is \"none\": send SIGHUP to the gateway; its log has the result";
            return Err(Failure::Usage(format!("{found}: {why}")));
        }
    };
    address.ok_or_else(|| Failure::Usage(format!("{found}: admin.listen is not an address")))
}

/// The address to connect to. A listener on all interfaces is reached through the loopback address.
fn parse(text: &str) -> Option<AdminAddress> {
    if let Some(path) = text.strip_prefix("unix:") {
        return path.starts_with('/').then(|| AdminAddress::Unix(Path::new(path).into()));
    }
    let mut address: SocketAddr = text.parse().ok()?;
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    Some(AdminAddress::Tcp(address))
}

/// Sends the request and reads the whole answer. `timeout` is only for the message: the stream has it set.
fn ask(mut stream: impl Read + Write, request: &str, timeout: Duration) -> anyhow::Result<serde_json::Value> {
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            let timeout = humantime::format_duration(timeout);
            anyhow!("no response within {timeout}: it may still take effect, see the gateway's log")
        }
        _ => error.into(),
    })?;
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").context("not an HTTP response")?;
    let (head, body) = (String::from_utf8_lossy(&answer[..end]), &answer[end + 4..]);
    match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(body) if body["result"].is_string() || head.starts_with("HTTP/1.1 200 ") && body.is_object() => Ok(body),
        _ => {
            let status = head.lines().next().unwrap_or_default();
            bail!("{status}: {}", String::from_utf8_lossy(body).trim())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_listener_is_reached() {
        for (listen, reached) in [
            ("127.0.0.1:9090", "127.0.0.1:9090"),
            ("0.0.0.0:9090", "127.0.0.1:9090"),
            ("[::]:9090", "[::1]:9090"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("unix:/run/a.sock", "unix:/run/a.sock"),
        ] {
            assert_eq!(parse(listen).unwrap().to_string(), reached, "{listen}");
        }
        for wrong in ["", "localhost", "unix:relative", "127.0.0.1"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
