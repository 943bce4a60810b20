//! Consistent hashing: a key belongs to the server that owns the next point of a ring, and each server owns many points. When a
//! server comes or goes, only keys of its points move. The points depend on the pool's name, the servers' names and their
//! weights only, so that every gateway with these settings sends a key to the same server.

use super::roster::Member;
use siphasher::sip::SipHasher13;

/// Points for each server of average weight. Shares of keys differ from weights by about a tenth (1/√POINTS).
const POINTS: u64 = 160;

/// What the server of a request is chosen by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashBy {
    User,
    Token,
    /// In lower case.
    Header(String),
    Cookie(String),
}

/// Turns names and keys into places on the ring. Keyed by the pool, so that two pools do not send the same users to their first
/// servers; a token's place says nothing about the token.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyHash(SipHasher13);

impl KeyHash {
    pub(super) fn of_pool(name: &str) -> Self {
        let plain = SipHasher13::new();
        let (low, high) = (plain.hash(name.as_bytes()), plain.hash(&[name.as_bytes(), b"\0ring"].concat()));
        Self(SipHasher13::new_with_keys(low, high))
    }

    pub(super) fn of(&self, key: &[u8]) -> u64 {
        self.0.hash(key)
    }
}

pub(super) struct Ring {
    /// Sorted, each with the place of its server.
    points: Vec<(u64, u32)>,
}

impl Ring {
    pub(super) fn of(members: &[Member], hash: KeyHash) -> Self {
        let total: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
        let mut points = Vec::new();
        for (place, member) in (0..).zip(members) {
            let count = POINTS * members.len() as u64 * u64::from(member.weight) / total.max(1);
            let point = |index: u64| hash.of(&[member.server.label().as_bytes(), &index.to_le_bytes()].concat());
            points.extend((0..count.max(1)).map(|index| (point(index), place)));
        }
        points.sort_unstable();
        Self { points }
    }

    /// The places of the servers, beginning with the key's own. A place comes again and again.
    pub(super) fn from(&self, key: u64) -> impl Iterator<Item = usize> {
        let first = self.points.partition_point(|(point, _)| *point < key);
        self.points[first..].iter().chain(&self.points[..first]).map(|(_, place)| *place as usize)
    }
}
