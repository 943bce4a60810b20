//! The servers of one pool as they are at the moment: who gets requests, and who is next. Built anew when a server goes, comes
//! back or ramps up, and never changed; picking from it takes no lock and allocates nothing. It must not know a request.

use super::Server;
use super::ring::Ring;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// In how many steps a server that came back gets to its whole weight.
const STEPS: u32 = 10;

/// A server with its place in the configuration.
#[derive(Clone)]
pub struct Member {
    pub server: Arc<Server>,
    pub weight: u32,
    pub backup: bool,
    /// Its part of the requests, beside those of the others. 0: it gets none.
    pub(super) share: u32,
    /// How many times as many requests it gets as the server with the least weight.
    multiple: u32,
}

impl Member {
    pub(super) fn new(server: Arc<Server>, weight: u32, backup: bool) -> Self {
        Self { server, weight, backup, share: 0, multiple: 1 }
    }

    /// Whether it is not to be passed over for its silence.
    pub(super) fn has_room(&self, pool_answers: u64, many: u64) -> bool {
        self.server.has_room(1)
            || (self.multiple > 1 && self.server.has_room(self.multiple) && !self.server.is_suspect(pool_answers, many))
    }

    /// Whether a number of requests is less for this server than another number for another one.
    pub(super) fn is_less_loaded(&self, own: u32, other: &Self, others: u32) -> bool {
        u64::from(own) * u64::from(other.share) < u64::from(others) * u64::from(self.share)
    }
}

/// What a roster is made by.
#[derive(Clone, Copy)]
pub(super) struct RosterRules {
    pub(super) panic_below: u64,
    pub(super) slow_start: Option<Duration>,
}

pub(super) struct Roster {
    pub(super) members: Vec<Member>,
    /// The places of those that get requests, in turn: each as often as its share says.
    schedule: Vec<usize>,
    /// Too few are up: all of them get requests.
    pub(super) panics: bool,
    /// Where the choice goes by a hash.
    pub(super) ring: Option<Arc<Ring>>,
}

impl Roster {
    pub(super) fn of(mut members: Vec<Member>, ring: Option<Arc<Ring>>, rules: RosterRules, now: Instant) -> Self {
        let panics = give_shares(&mut members, rules, now);
        let shares: Vec<u32> = members.iter().map(|member| member.share).collect();
        Self { members, schedule: schedule(&shares), panics, ring }
    }

    /// What it has become by now. `None`: what it was.
    pub(super) fn renewed(&self, rules: RosterRules, now: Instant) -> Option<Self> {
        let mut members = self.members.clone();
        let panics = give_shares(&mut members, rules, now);
        let same = members.iter().zip(&self.members).all(|(new, old)| new.share == old.share);
        if same && panics == self.panics {
            return None;
        }
        Some(Self::of(members, self.ring.clone(), rules, now))
    }

    /// Whether one more request with a member leaves it within a quarter above its part of all that are in flight.
    pub(super) fn is_within_bound(&self, member: &Member) -> bool {
        let own = u64::from(member.server.in_flight());
        if own == 0 {
            return true;
        }
        let sums = |(requests, shares): (u64, u64), member: &Member| {
            (requests + u64::from(member.server.in_flight()), shares + u64::from(member.share))
        };
        let (requests, shares) = self.members.iter().fold((1, 0), sums);
        // Rounded up: own + 1 <= ceil(5/4 * requests * share / shares).
        own * 4 * shares < 5 * requests * u64::from(member.share)
    }

    /// Those of the schedule, from a turn on.
    pub(super) fn in_turn(&self, turn: usize) -> impl Iterator<Item = &Member> {
        let count = self.schedule.len();
        (0..count).filter_map(move |step| self.members.get(*self.schedule.get((turn % count + step) % count)?))
    }
}

/// Says which members get requests, and how many of them. True: too few are up, and all get some.
fn give_shares(members: &mut [Member], rules: RosterRules, now: Instant) -> bool {
    let count = |backups: bool, up: bool| {
        let counted = |member: &&Member| {
            member.backup == backups && !member.server.is_drained() && (!up || member.server.is_up())
        };
        members.iter().filter(counted).count() as u64
    };
    // Backups get requests only while nobody else is up.
    let backups = count(false, true) == 0 && count(true, true) > 0;
    let (all, up) = (count(backups, false), count(backups, true));
    let least = members.iter().map(|member| member.weight).min().unwrap_or(1).max(1);
    let panics = up == 0 || up * 100 < rules.panic_below * all;
    for member in members.iter_mut() {
        member.multiple = member.weight.div_ceil(least);
        let serves = match (up, panics) {
            (0, _) => member.server.is_usable(),
            (_, true) => member.backup == backups && member.server.is_usable(),
            (_, false) => member.backup == backups && member.server.is_up(),
        };
        member.share = if serves { member.weight * steps(&member.server, rules.slow_start, now) } else { 0 };
    }
    let divisor = members.iter().fold(0, |divisor, member| greatest_common_divisor(divisor, member.share)).max(1);
    members.iter_mut().for_each(|member| member.share /= divisor);
    panics
}

/// How many of the steps to its whole weight a server has taken.
fn steps(server: &Server, slow_start: Option<Duration>, now: Instant) -> u32 {
    let Some((ramp, back)) = slow_start.zip(slow_start.and_then(|_| server.back_since())) else { return STEPS };
    let passed = now.saturating_duration_since(back).as_micros() * u128::from(STEPS) / ramp.as_micros().max(1);
    u32::try_from(passed + 1).map_or(STEPS, |step| step.min(STEPS))
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// The order in which servers take turns: smooth weighted round robin as in nginx. Each turn goes to the one that is owed most.
fn schedule(shares: &[u32]) -> Vec<usize> {
    let total: i64 = shares.iter().copied().map(i64::from).sum();
    let serving: Vec<usize> = (0..shares.len()).filter(|place| shares[*place] > 0).collect();
    if total == serving.len() as i64 {
        return serving;
    }
    let mut owed = vec![0; shares.len()];
    let next = |_| {
        serving.iter().for_each(|place| owed[*place] += i64::from(shares[*place]));
        let most = serving.iter().copied().rev().max_by_key(|place| owed[*place])?;
        owed[most] -= total;
        Some(most)
    };
    (0..total).filter_map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_spread_as_nginx_spreads_them() {
        // nginx' own example: {a: 5, b: 1, c: 1}.
        assert_eq!(schedule(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(schedule(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(schedule(&[0, 2, 0, 1]), [1, 3, 1]);
        assert_eq!(schedule(&[0, 0]), [] as [usize; 0]);
    }

    /// In every stretch of turns, over the end of the schedule too, a server gets what it is owed, give or take one turn.
    #[test]
    fn every_stretch_of_turns_is_fair() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let shares: Vec<u32> = (0..random.usize(1..8)).map(|_| random.u32(0..12)).collect();
            let order = schedule(&shares);
            let total: u32 = shares.iter().sum();
            assert_eq!(order.len(), total as usize);
            for (place, share) in shares.iter().enumerate() {
                assert_eq!(order.iter().filter(|turn| **turn == place).count(), *share as usize);
                let mut got = 0;
                for (turn, next) in order.iter().cycle().take(order.len() * 2).enumerate() {
                    got += i64::from(*next == place);
                    let owed = (turn as f64 + 1.0) * f64::from(*share) / f64::from(total);
                    assert!((got as f64 - owed).abs() < shares.len() as f64, "{shares:?}: {place} got {got} of {owed}");
                }
            }
        }
    }
}
