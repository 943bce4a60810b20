//! Series about connections of clients, before and beside their requests.

use super::metrics::{Families, labels};
use parking_lot::Mutex;
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec};

labels! {
    /// How a connection came through what stands before HTTP.
    HandshakeResult {
        Ok = "ok",
        /// Closed or reset by the client.
        Closed = "closed",
        TimedOut = "timeout",
        /// The PROXY protocol: missing, malformed, or from a peer that may not send it.
        ProxyProtocol = "proxy_protocol",
        /// From a network that may not ask for verdicts.
        Stranger = "stranger",
        /// Not TLS, or broken.
        Malformed = "malformed",
        /// No protocol version or cipher in common.
        Incompatible = "incompatible",
        /// The client did not accept the certificate of the listener.
        RefusedByClient = "refused_by_client",
        NoClientCertificate = "no_client_certificate",
        /// Not trusted, ended, or not for clients.
        ClientCertificate = "client_certificate",
    }
}

labels! {
    /// Why a connection was closed in the name of a limit.
    ConnectionLimit {
        Total = "max_connections",
        Address = "max_connections_per_address",
        /// An HTTP/2 connection with more frames of a kind than any client needs.
        Flood = "http2_flood",
    }
}

pub struct ListenerMetrics {
    handshakes: Vec<IntCounter>,
    limited: Vec<IntCounter>,
    certificate_ends: IntGaugeVec,
    /// What the series say, with names that are not labels.
    ends: Mutex<Vec<(String, String, u64)>>,
    http2_floods: IntCounterVec,
}

impl ListenerMetrics {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, prometheus::Error> {
        let handshakes = families.counters(
            "tollgate_handshakes_total",
            "TLS and PROXY protocol handshakes by result. Without either of them, nothing is counted.",
            &["result"],
        )?;
        let limited = families.counters(
            "tollgate_connections_limited_total",
            "Client connections that were closed because of a limit, by limit.",
            &["limit"],
        )?;
        Ok(Self {
            handshakes: HandshakeResult::ALL.iter().map(|r| handshakes.with_label_values(&[r.as_str()])).collect(),
            limited: ConnectionLimit::ALL.iter().map(|l| limited.with_label_values(&[l.as_str()])).collect(),
            certificate_ends: families.gauges(
                "tollgate_certificate_end_timestamp_seconds",
                "Time at which a certificate of a listener ends, by the first name in it.",
                &["listener", "name"],
            )?,
            ends: Mutex::default(),
            http2_floods: families.counters(
                "tollgate_http2_floods_total",
                "HTTP/2 connections that were cut for a flood, by the kind of frame.",
                &["frame"],
            )?,
        })
    }

    pub fn handshake(&self, result: HandshakeResult) {
        if let Some(counter) = self.handshakes.get(result as usize) {
            counter.inc();
        }
    }

    pub fn limited(&self, limit: ConnectionLimit) {
        if let Some(counter) = self.limited.get(limit as usize) {
            counter.inc();
        }
    }

    /// `frame` is one of a fixed set of words.
    pub fn http2_flood(&self, frame: &'static str) {
        self.limited(ConnectionLimit::Flood);
        self.http2_floods.with_label_values(&[frame]).inc();
    }

    /// Replaces what was said of all listeners.
    pub fn certificates(&self, all: impl Iterator<Item = (String, String, u64)>) {
        let all: Vec<_> = all.collect();
        self.certificate_ends.reset();
        for (listener, name, end) in &all {
            let end = i64::try_from(*end).unwrap_or(i64::MAX);
            self.certificate_ends.with_label_values(&[listener, name]).set(end);
        }
        *self.ends.lock() = all;
    }

    pub(super) fn certificate_ends(&self) -> Vec<(String, String, u64)> {
        self.ends.lock().clone()
    }
}
