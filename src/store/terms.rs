//! How a token may be used, by its own record: the plan and the rate of its limits, the networks that it may come from, and the
//! methods that it may use. What cannot be understood is an error, and never read as "no bound". It must not know what a plan
//! allows, nor who is refused.

use super::record::RecordField;
use crate::request::origin::{AddressList, canonical_network};
use crate::request::route::Methods;
use crate::request::view::Method;
use ipnet::IpNet;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

/// Terms that are known to repeat. More different ones than this are begun anew: then some stand in memory twice.
const MAX_SHARED: usize = 1_024;
/// A request is compared with each of them.
const MOST_NETWORKS: usize = 64;

/// As a record has them. Empty: no bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SaidTerms {
    pub plan: String,
    pub rate: String,
    pub networks: Vec<String>,
    pub methods: Vec<String>,
}

/// The terms of a record that has any, understood.
#[derive(Debug)]
pub struct TokenTerms {
    said: SaidTerms,
    rate: Option<TokenRate>,
    networks: AddressList,
    methods: Methods,
}

// The rest follows from what is said.
impl PartialEq for TokenTerms {
    fn eq(&self, other: &Self) -> bool {
        self.said == other.said
    }
}

impl Eq for TokenTerms {}

/// So many requests in a time, and at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRate {
    pub requests: u64,
    pub period_ms: u64,
    pub burst: u64,
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TermFault {
    pub(super) field: RecordField,
    pub(super) what: &'static str,
}

const PLAN: &str = "must be a plan's name: 1 to 64 letters, digits, `-`, `_` or `.`";
const RATE: &str =
    "must be a rate like \"600/min\", or with a burst like \"600/min burst 100\", each from 1 to 1000000";
const NETWORKS: &str = "must be up to 64 networks like \"10.0.0.0/8\" or \"2001:db8::/32\", or addresses";
const METHODS: &str = "must be of GET, HEAD, POST, PUT, PATCH, DELETE and OPTIONS";

impl TokenTerms {
    /// Equal terms are kept once: a cache or a file of tokens holds few different ones. `None`: no terms.
    pub(super) fn shared(said: SaidTerms) -> Result<Option<Arc<Self>>, TermFault> {
        static SHARED: LazyLock<Mutex<HashMap<SaidTerms, Arc<TokenTerms>>>> = LazyLock::new(Mutex::default);
        if said == SaidTerms::default() {
            return Ok(None);
        }
        if let Some(known) = SHARED.lock().get(&said) {
            return Ok(Some(Arc::clone(known)));
        }
        let new = Arc::new(Self::read(said)?);
        let mut all = SHARED.lock();
        if all.len() >= MAX_SHARED {
            all.clear();
        }
        all.insert(new.said.clone(), Arc::clone(&new));
        Ok(Some(new))
    }

    fn read(said: SaidTerms) -> Result<Self, TermFault> {
        let fault = |field, what| TermFault { field, what };
        if !said.plan.is_empty() {
            check_plan(&said.plan).map_err(|what| fault(RecordField::Plan, what))?;
        }
        let rate = Some(said.rate.as_str()).filter(|rate| !rate.is_empty()).map(parse_token_rate).transpose();
        let networks = said.networks.iter().map(|network| parse_network(network)).collect::<Result<Vec<_>, _>>();
        let networks = networks.and_then(|all| if all.len() > MOST_NETWORKS { Err(NETWORKS) } else { Ok(all) });
        let methods = said.methods.iter().map(|method| parse_method(method)).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            rate: rate.map_err(|what| fault(RecordField::Rate, what))?,
            networks: AddressList {
                networks: networks.map_err(|what| fault(RecordField::Networks, what))?,
                unix_peers: false,
            },
            methods: match methods.map_err(|what| fault(RecordField::Methods, what))? {
                none if none.is_empty() => Methods::ALL,
                some => Methods::only(some),
            },
            said,
        })
    }

    /// From parts that somebody has checked. `None` if there are none, and `Err` if there is something wrong with them after
    /// all.
    pub fn of(said: SaidTerms) -> Result<Option<Arc<Self>>, &'static str> {
        Self::shared(said).map_err(|fault| fault.what)
    }

    pub fn said(&self) -> &SaidTerms {
        &self.said
    }

    pub fn plan(&self) -> Option<&str> {
        Some(self.said.plan.as_str()).filter(|plan| !plan.is_empty())
    }

    pub fn rate(&self) -> Option<TokenRate> {
        self.rate
    }

    /// Whether the token may come from there. A peer without an address is in no network.
    pub fn allow_client(&self, client: Option<IpAddr>) -> bool {
        self.networks.networks.is_empty() || self.networks.has(client)
    }

    pub fn allow_method(&self, method: Method) -> bool {
        self.methods.has(method)
    }
}

impl TokenRate {
    pub const MOST: u64 = 1_000_000;
}

/// The name of a plan.
pub fn check_plan(name: &str) -> Result<(), &'static str> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) { Err(PLAN) } else { Ok(()) }
}

/// `600/min`: requests, and their time in milliseconds. The one way in which text becomes a rate.
pub fn parse_rate(text: &str) -> Option<(u64, u64)> {
    let (count, unit) = text.split_once('/')?;
    let period_ms = match unit.trim() {
        "s" | "second" => 1_000,
        "min" | "minute" => 60_000,
        "h" | "hour" => 3_600_000,
        _ => return None,
    };
    Some((count.trim().parse().ok()?, period_ms))
}

/// `600/min`, or `600/min burst 100`.
pub fn parse_token_rate(text: &str) -> Result<TokenRate, &'static str> {
    let (rate, burst) = text.split_once(" burst ").map_or((text, None), |(rate, burst)| (rate, Some(burst.trim())));
    let (requests, period_ms) = parse_rate(rate).ok_or(RATE)?;
    let burst = burst.map_or(Ok(requests), |burst| burst.parse().map_err(|_| RATE))?;
    let fits = |number: u64| (1..=TokenRate::MOST).contains(&number);
    if fits(requests) && fits(burst) { Ok(TokenRate { requests, period_ms, burst }) } else { Err(RATE) }
}

/// A network, or one address.
pub fn parse_network(text: &str) -> Result<IpNet, &'static str> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(|_| NETWORKS)?;
    Ok(canonical_network(network))
}

pub fn parse_method(name: &str) -> Result<Method, &'static str> {
    Some(Method::of(name.as_bytes())).filter(|method| *method != Method::Other).ok_or(METHODS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(plan: &str, rate: &str, networks: &[&str], methods: &[&str]) -> SaidTerms {
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        SaidTerms { plan: plan.into(), rate: rate.into(), networks: list(networks), methods: list(methods) }
    }

    #[test]
    fn what_is_said_is_what_holds() {
        assert_eq!(TokenTerms::shared(SaidTerms::default()), Ok(None));
        let networks = ["10.0.0.0/8", "2001:db8::/32", "::ffff:192.0.2.0/120"];
        let terms = TokenTerms::shared(said("gold", "600/min burst 5", &networks, &["GET", "HEAD"])).unwrap().unwrap();
        assert_eq!(terms.plan(), Some("gold"));
        assert_eq!(terms.rate(), Some(TokenRate { requests: 600, period_ms: 60_000, burst: 5 }));
        for (client, allowed) in
            [("10.255.0.1", true), ("11.0.0.1", false), ("192.0.2.7", true), ("2001:db8::1", true), ("::1", false)]
        {
            assert_eq!(terms.allow_client(client.parse().ok()), allowed, "{client}");
        }
        assert!(!terms.allow_client(None), "a peer without an address is in no network");
        assert!(terms.allow_method(Method::Head) && !terms.allow_method(Method::Post));
        let plan = TokenTerms::shared(said("gold", "", &[], &[])).unwrap().unwrap();
        assert!(plan.allow_client(None) && plan.allow_method(Method::Delete) && plan.rate().is_none());
        let again = TokenTerms::shared(said("gold", "", &[], &[])).unwrap().unwrap();
        assert!(Arc::ptr_eq(&plan, &again), "kept once");
    }

    #[test]
    fn what_cannot_be_understood_is_no_missing_bound() {
        let many = vec!["10.0.0.1"; 65];
        for (bad, field) in [
            (said("a b", "", &[], &[]), RecordField::Plan),
            (said("", "600", &[], &[]), RecordField::Rate),
            (said("", "0/min", &[], &[]), RecordField::Rate),
            (said("", "600/day", &[], &[]), RecordField::Rate),
            (said("", "600/min burst", &[], &[]), RecordField::Rate),
            (said("", "600/min burst 0", &[], &[]), RecordField::Rate),
            (said("", "", &["10.0.0.0/33"], &[]), RecordField::Networks),
            (said("", "", &["unix"], &[]), RecordField::Networks),
            (said("", "", &many, &[]), RecordField::Networks),
            (said("", "", &[], &["get"]), RecordField::Methods),
            (said("", "", &[], &["GET", "TRACE"]), RecordField::Methods),
        ] {
            assert_eq!(TokenTerms::shared(bad.clone()).unwrap_err().field, field, "{bad:?}");
        }
    }
}
