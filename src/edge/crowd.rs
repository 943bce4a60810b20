//! How many connections clients may have, in all and from one address. It must not know what is said over them.

use crate::problem::Problem;
use crate::request::origin::network_of;
use crate::telemetry::metrics::ConnectionLimit;
use foldhash::fast::RandomState;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Clients take three quarters of the descriptors at most: backends, stores, logs and the admin listener need some as well.
const FOR_CLIENTS: (u64, u64) = (3, 4);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// In all.
    pub total: Option<u64>,
    /// From one IPv4 address, or one IPv6 network of 64 bits.
    pub per_address: Option<u64>,
    /// Requests of one connection.
    pub requests: Option<u64>,
}

impl ConnectionLimits {
    /// Keys of `[limits]`.
    pub fn problems(&self) -> Vec<Problem> {
        let all = [
            ("connections", self.total),
            ("connections_per_address", self.per_address),
            ("requests_per_connection", self.requests),
        ];
        let zero = |(key, limit): (&'static str, Option<u64>)| {
            (limit == Some(0)).then(|| Problem::error(key, "would refuse everything", "use 1 or more, or \"none\""))
        };
        let mut problems: Vec<Problem> = all.into_iter().filter_map(zero).collect();
        if let (Some(wanted), Some(most)) = (self.total, most_for_clients())
            && wanted > most
        {
            let what = format!("is more than {most}, three quarters of the open files that this process may have");
            problems.push(Problem::warning("connections", what, "raise LimitNOFILE, or ulimit -n"));
        }
        problems
    }
}

/// `None`: the process may have any number of descriptors.
fn most_for_clients() -> Option<u64> {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()?;
    (soft != nix::sys::resource::RLIM_INFINITY).then(|| soft / FOR_CLIENTS.1 * FOR_CLIENTS.0)
}

/// The clients that are connected.
pub(super) struct Crowd {
    most: u64,
    addresses: Mutex<HashMap<IpAddr, u64, RandomState>>,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { most: most_for_clients().unwrap_or(u64::MAX), addresses: Mutex::default() }
    }
}

/// One connection of an address.
pub(super) struct Present {
    crowd: Arc<Crowd>,
    network: IpAddr,
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut addresses = self.crowd.addresses.lock();
        if let Some(count) = addresses.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(&self.network);
            }
        }
    }
}

impl Crowd {
    /// Whether one more may come when so many are there, itself included.
    pub(super) fn has_room(&self, limits: ConnectionLimits, open: i64) -> bool {
        u64::try_from(open).unwrap_or(0) <= limits.total.unwrap_or(u64::MAX).min(self.most)
    }

    /// Counts a connection of an address. `Ok(None)`: there is no limit, or no address.
    pub(super) fn enter(
        self: &Arc<Self>,
        limits: ConnectionLimits,
        client: Option<IpAddr>,
    ) -> Result<Option<Present>, ConnectionLimit> {
        let (Some(most), Some(client)) = (limits.per_address, client) else { return Ok(None) };
        let network = network_of(client);
        let mut addresses = self.addresses.lock();
        let count = addresses.entry(network).or_insert(0);
        if *count >= most {
            return Err(ConnectionLimit::Address);
        }
        *count += 1;
        Ok(Some(Present { crowd: Arc::clone(self), network }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_number_and_gets_it_back() {
        let crowd = Arc::new(Crowd::default());
        let limits = ConnectionLimits { per_address: Some(2), ..ConnectionLimits::default() };
        let enter = |address: &str| crowd.enter(limits, address.parse().ok());
        let (first, _second) = (enter("192.0.2.1").unwrap(), enter("::ffff:192.0.2.1").unwrap());
        assert!(first.is_some() && enter("192.0.2.1").is_err() && enter("192.0.2.2").is_ok());
        drop(first);
        let _again = enter("192.0.2.1").unwrap();
        assert!(enter("192.0.2.1").is_err());
        let _six = [enter("2001:db8::1").unwrap(), enter("2001:db8::ffff:2").unwrap()];
        assert!(enter("2001:db8::3").is_err() && enter("2001:db8:0:1::3").is_ok());
        assert!(enter("unix").unwrap().is_none());
        assert_eq!(crowd.addresses.lock().len(), 2, "who has gone is not remembered");
    }

    #[test]
    fn a_limit_holds_for_all_and_descriptors_are_kept_back() {
        let crowd = Crowd { most: 100, addresses: Mutex::default() };
        let limits = |total| ConnectionLimits { total, ..ConnectionLimits::default() };
        for (total, open, room) in
            [(Some(5), 5, true), (Some(5), 6, false), (None, 100, true), (None, 101, false), (Some(500), 101, false)]
        {
            assert_eq!(crowd.has_room(limits(total), open), room, "{total:?} {open}");
        }
    }
}
