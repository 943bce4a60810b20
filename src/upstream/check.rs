//! What an active check of a server asks for, and what it may find. Pure: `edge` carries checks out.

use crate::problem::Problem;
use crate::telemetry::metrics::UpstreamError;
use std::time::Duration;

/// The keys `check…` of an `[[upstream]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckSettings {
    /// `None`: that a connection can be made is enough.
    pub http: Option<HttpCheck>,
    /// Another port than the one for requests.
    pub port: Option<u16>,
    pub interval: Duration,
    pub timeout: Duration,
    /// Failures in a row that make a server down, and successes in a row that bring it back.
    pub failures: u32,
    pub successes: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCheck {
    pub path: String,
    pub statuses: Vec<u16>,
    /// What has to be in the body; empty for anything.
    pub body: String,
}

/// What was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckFault {
    Connect,
    Timeout,
    /// Closed, or no HTTP.
    Closed,
    Status,
    Body,
    TlsUntrusted,
    TlsName,
    TlsExpired,
    TlsHandshake,
    NoHttp2,
}

impl From<UpstreamError> for CheckFault {
    /// Of a connection that could not be made.
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::ConnectTimeout => Self::Timeout,
            UpstreamError::TlsUntrusted => Self::TlsUntrusted,
            UpstreamError::TlsName => Self::TlsName,
            UpstreamError::TlsExpired => Self::TlsExpired,
            UpstreamError::TlsHandshake => Self::TlsHandshake,
            UpstreamError::NoHttp2 => Self::NoHttp2,
            _ => Self::Connect,
        }
    }
}

impl CheckFault {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "check_connect",
            Self::Timeout => "check_timeout",
            Self::Closed => "check_closed",
            Self::Status => "check_status",
            Self::Body => "check_body",
            Self::TlsUntrusted => "check_tls_untrusted",
            Self::TlsName => "check_tls_name",
            Self::TlsExpired => "check_tls_expired",
            Self::TlsHandshake => "check_tls_handshake",
            Self::NoHttp2 => "check_no_http2",
        }
    }
}

impl CheckSettings {
    /// Keys of an `[[upstream]]`.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        problems.extend(Problem::too_short("check_interval", self.interval, Duration::from_millis(100)));
        problems.extend(Problem::too_short("check_timeout", self.timeout, Duration::from_millis(1)));
        problems.extend(Problem::out_of_range("check_failures", self.failures.into(), 1..=100));
        problems.extend(Problem::out_of_range("check_successes", self.successes.into(), 1..=100));
        if self.port == Some(0) {
            problems.push(Problem::error("check_port", "is out of range", "use a number from 1 to 65535, or \"none\""));
        }
        if let Some(http) = &self.http {
            if !http.path.starts_with('/') || !http.path.bytes().all(|byte| byte.is_ascii_graphic()) {
                let instead = "write it like \"/health\", with other characters than ASCII as %XX";
                problems.push(Problem::error("check_path", "is not the path of a request", instead));
            }
            if http.statuses.is_empty() {
                problems.push(Problem::error("check_statuses", "is empty", "write it like [200]"));
            }
            for (index, status) in http.statuses.iter().enumerate() {
                let problem = Problem::out_of_range("check_statuses", (*status).into(), 100..=599);
                problems.extend(problem.map(|problem| problem.element(index)));
            }
        }
        problems
    }
}

/// The verdict on a response to a check, as far as it has come; `None` while more is needed. `whole`: no more will come.
pub fn verdict(check: &HttpCheck, response: &[u8], whole: bool) -> Option<Result<(), CheckFault>> {
    let status = response.get(..12).filter(|line| line.starts_with(b"HTTP/1."));
    let Some(status) = status.and_then(|line| std::str::from_utf8(&line[9..]).ok()?.parse::<u16>().ok()) else {
        return (whole || response.len() >= 12).then_some(Err(CheckFault::Closed));
    };
    if !check.statuses.contains(&status) {
        return Some(Err(CheckFault::Status));
    }
    if check.body.is_empty() {
        return Some(Ok(()));
    }
    let end = memchr::memmem::find(response, b"\r\n\r\n").map(|end| end + 4);
    let Some((head, body)) = end.and_then(|end| response.split_at_checked(end)) else {
        return whole.then_some(Err(CheckFault::Body));
    };
    match memchr::memmem::find(body, check.body.as_bytes()) {
        Some(_) => Some(Ok(())),
        None => (whole || is_complete(head, body)).then_some(Err(CheckFault::Body)),
    }
}

/// For a server that keeps the connection open although it was asked to close it.
fn is_complete(head: &[u8], body: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.map_or(body.ends_with(b"0\r\n\r\n"), |length| body.len() >= length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_judged_as_soon_as_it_can_be() {
        let check =
            |statuses: &[u16], body: &str| HttpCheck { path: "/".into(), statuses: statuses.into(), body: body.into() };
        let (any, ready) = (check(&[200, 204], ""), check(&[200], "ready"));
        for (check, response, whole, expected) in [
            (&any, "", false, None),
            (&any, "HTTP/1.1 20", false, None),
            (&any, "HTTP/1.1 200", false, Some(Ok(()))),
            (&any, "HTTP/1.0 204 No Content\r\n", false, Some(Ok(()))),
            (&any, "HTTP/1.1 503 Service", false, Some(Err(CheckFault::Status))),
            (&any, "HTTP/1.1 20", true, Some(Err(CheckFault::Closed))),
            (&any, "SSH-2.0-OpenSSH_9", false, Some(Err(CheckFault::Closed))),
            (&any, "HTTP/1.1 abc", false, Some(Err(CheckFault::Closed))),
            (&ready, "HTTP/1.1 200 OK\r\nX: ready\r\n\r\nnot re", false, None),
            (&ready, "HTTP/1.1 200 OK\r\nX: ready\r\n\r\nnot re", true, Some(Err(CheckFault::Body))),
            (&ready, "HTTP/1.1 200 OK\r\n\r\nis ready now", false, Some(Ok(()))),
            (&ready, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfull", false, Some(Err(CheckFault::Body))),
            (&ready, "HTTP/1.1 200 OK\r\nA: b\r\n\r\n3\r\nnot\r\n0\r\n\r\n", false, Some(Err(CheckFault::Body))),
        ] {
            assert_eq!(verdict(check, response.as_bytes(), whole), expected, "{response:?}");
        }
    }
}
