//! `tollgate reload`: ask the gateway that runs, wait, and say what is in force. Knows the configuration only for the
//! address of the admin listener.

use super::Failure;
use crate::config;
use crate::edge::Listen;
use anyhow::{Context as _, anyhow, bail};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The gateway's configuration, for the address of its admin listener. Without it: the default address.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The admin listener, `address:port` or `unix:/path`, where the file does not say the one of the running gateway.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
    /// How long to wait for the result.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// Larger answers are not the gateway's.
const MAX_ANSWER: u64 = 1024 * 1024;
const CONNECT: Duration = Duration::from_secs(5);
const NOT_REACHED: &str = "no gateway answers there, nothing changed. If [admin] listen was changed since the start, the old \
                           address still holds: name it with --admin";

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let address = address(arguments)?;
    // The shortest time there is: a read timeout of 0 would mean none.
    let timeout = arguments.timeout.max(Duration::from_millis(1));
    let answer = match &address {
        AdminAddress::Tcp(address) => TcpStream::connect_timeout(address, CONNECT)
            .and_then(|stream| stream.set_read_timeout(Some(timeout)).map(|()| stream))
            .context(NOT_REACHED)
            .and_then(|stream| ask(stream, timeout, &address.to_string())),
        AdminAddress::Unix(path) => UnixStream::connect(path)
            .and_then(|stream| stream.set_read_timeout(Some(timeout)).map(|()| stream))
            .context(NOT_REACHED)
            .and_then(|stream| ask(stream, timeout, "localhost")),
    };
    let answer = answer.with_context(|| format!("the admin listener at {address}"))?;
    let keys = |name: &str| -> Vec<&str> {
        answer[name].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str).collect()
    };
    let (applied, restart) = (keys("applied"), keys("restart_needed"));
    match answer["result"].as_str() {
        Some("reloaded" | "restart_needed") => {
            match applied.as_slice() {
                [] => say!("reloaded; the file holds no other change that can be put in force")?,
                applied => say!("reloaded; changed and in force: {}", applied.join(", "))?,
            }
            if restart.is_empty() {
                return Ok(());
            }
            say!("changed and not in force before a restart: {}", restart.join(", "))?;
            Err(Failure::Restart)
        }
        Some("failed") => Err(anyhow!("nothing changed\n{}", keys("errors").join("\n")).into()),
        _ => Err(anyhow!("the admin listener at {address}: an answer that is not of this version").into()),
    }
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

fn address(arguments: &Arguments) -> Result<AdminAddress, Failure> {
    if let Some(text) = &arguments.admin {
        return parse(text).ok_or_else(|| Failure::Usage(format!("{text}: not `address:port` or `unix:/path`")));
    }
    let Some(path) = &arguments.config else {
        return Ok(AdminAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 9090))));
    };
    let listen = config::admin_listener(path).map_err(|why| Failure::Usage(format!("nothing changed\n{why}")))?;
    let address = match listen {
        Some(Listen::Tcp(text)) => parse(&text),
        Some(Listen::Unix(path, _)) => Some(AdminAddress::Unix(path.into())),
        None => {
            let why = "admin.listen is \"none\": send SIGHUP to the gateway, its log says the result";
            return Err(Failure::Usage(format!("{}: {why}", path.display())));
        }
    };
    address.ok_or_else(|| Failure::Usage(format!("{}: admin.listen is no address", path.display())))
}

/// An address to connect to: that of all interfaces is reached on this machine.
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
fn ask(mut stream: impl Read + Write, timeout: Duration, host: &str) -> anyhow::Result<serde_json::Value> {
    let request = format!(
        "POST /reload HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            anyhow!("no answer within {timeout:?}: the reload may still take effect, see the gateway's log")
        }
        _ => error.into(),
    })?;
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").context("no HTTP answer")?;
    let (head, body) = (String::from_utf8_lossy(&answer[..end]), &answer[end + 4..]);
    match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(body) if body["result"].is_string() => Ok(body),
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
