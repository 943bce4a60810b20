//! Limits by amount: how many requests a token, a user, an address … may send. Pure; the time is an argument. What the limits
//! of one request have in common is decided here: which apply, whose buckets they are, and that a request is counted by all of
//! them or, if one refuses it, by none.
//!
//! Of the limits that are asked at once, all buckets are locked, then checked, then taken from. A request that waits for the
//! token store is asked about its address before, and about the rest after that: what it took before is given back then, unless
//! others took from the same bucket meanwhile.

use super::limit_bucket::{LimitAmounts, LimitBucket, LimitedBy, RefillRate, Shortage};
use super::limit_table::LimitTable;
use crate::clock::Now;
use crate::identity::Principal;
use crate::problem::Problem;
use crate::request::route::Methods;
use crate::request::routes::Routes;
use crate::request::view::{Method, RequestView};
use crate::share::{LeaseEngine, LeaseOutcome};
use crate::store::credential::{Digest, TokenId};
use crate::store::terms::TokenTerms;
use parking_lot::RwLock;
use siphasher::sip::SipHasher13;
use smallvec::SmallVec;
use std::hash::Hasher as _;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

/// A `[[limit]]`. Other sources of limits, like a plan or a token's record, have other amounts and the same rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitSettings {
    /// Log field and metric label.
    pub name: String,
    pub buckets: BucketSettings,
    pub applies: LimitScope,
    pub costs: LimitCosts,
    /// Counts, and refuses nothing.
    pub dry_run: bool,
    /// All replicas count together.
    pub shared: bool,
}

/// What the state of a limit depends on: a reload that leaves these as they are keeps the buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketSettings {
    pub key: Vec<LimitKeyPart>,
    /// An address stands for its network of so many bits.
    pub prefix_v4: u8,
    pub prefix_v6: u8,
    pub amounts: LimitAmounts,
    /// Of tokens whose record names one of these, in place of the amounts; and of tokens with a rate of their own. `None`: the
    /// amounts are for all.
    pub plans: Option<Vec<LimitPlan>>,
    /// How many keys have a bucket of their own.
    pub most: usize,
}

/// A `[plan.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitPlan {
    pub name: String,
    pub amounts: LimitAmounts,
}

/// What a bucket belongs to; none of these: one bucket for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitKeyPart {
    Token,
    User,
    Address,
    Route,
    /// The first one of the limit's scopes that the token has.
    Scope,
    /// The value of a field of the request, in lower case.
    Header(String),
}

/// Which requests a limit is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitScope {
    /// Names of routes; none: all.
    pub routes: Vec<String>,
    pub methods: Methods,
    /// Those of the token; none: all, and requests without a token.
    pub scopes: Vec<String>,
    pub users: Vec<String>,
}

/// What a request counts as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitCosts {
    /// By method, as [`Method::index`] counts them.
    pub methods: [u32; 7],
    /// By name of the route, in place of its method's.
    pub routes: Vec<(String, u32)>,
}

impl Default for LimitCosts {
    fn default() -> Self {
        Self { methods: [1; 7], routes: Vec::new() }
    }
}

impl LimitCosts {
    pub fn of(&self, route: &str, method: Method) -> u32 {
        let own = self.routes.iter().find(|(name, _)| name == route).map(|(_, cost)| *cost);
        own.unwrap_or_else(|| self.methods.get(method.index()).copied().unwrap_or(1))
    }

    pub fn highest(&self) -> u32 {
        self.methods.iter().chain(self.routes.iter().map(|(_, cost)| cost)).copied().max().unwrap_or(1)
    }
}

impl BucketSettings {
    pub const LEAST: u64 = 16;
    pub const MOST: u64 = 16_777_216;

    /// Whether the buckets can be told before the token store is asked, and are about who is not known yet.
    fn is_early(&self, applies: &LimitScope) -> bool {
        let known =
            |part: &LimitKeyPart| matches!(part, LimitKeyPart::Address | LimitKeyPart::Route | LimitKeyPart::Header(_));
        // A limit for all would else be used up by those who have no token.
        self.key.contains(&LimitKeyPart::Address)
            && self.key.iter().all(known)
            && applies.scopes.is_empty()
            && applies.users.is_empty()
    }
}

impl LimitSettings {
    /// Buckets of a table: what is one for all needs no table, and what is shared is counted elsewhere.
    fn most(&self) -> usize {
        if self.buckets.key.is_empty() || self.shared { 1 } else { self.buckets.most }
    }

    /// What the tables take when they are full: 64 bytes a bucket, which are two slots.
    pub fn bytes(&self) -> usize {
        let tables = 1 + self.buckets.plans.as_ref().map_or(0, Vec::len);
        self.most().saturating_mul(tables).saturating_mul(64)
    }

    /// Keys of a `[[limit]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if self.name.is_empty() || self.name.len() > 64 || !self.name.bytes().all(plain) {
            let what = "must be 1 to 64 letters, digits, `-`, `_` or `.`";
            problems.push(Problem::error("name", what, "write it like \"per-token\""));
        }
        let BucketSettings { key, prefix_v4, prefix_v6, amounts, plans, most } = &self.buckets;
        if plans.is_some() && !key.iter().any(|part| matches!(part, LimitKeyPart::Token | LimitKeyPart::User)) {
            let what = "has neither \"token\" nor \"user\", and `plans` is by token";
            problems.push(Problem::error("key", what, "add one of them, or remove `plans`").with("plans"));
        }
        for (index, part) in key.iter().enumerate() {
            if let Some(first) = key[..index].iter().position(|other| other == part) {
                let problem = Problem::error("key", "is in the list twice", "remove one of them");
                problems.push(problem.element(index).repeats("key", first));
            }
            match part {
                LimitKeyPart::Scope if self.applies.scopes.is_empty() => {
                    let problem = Problem::error("key", "has a scope, and `scopes` is empty", "list the scopes there");
                    problems.push(problem.element(index).with("scopes"));
                }
                LimitKeyPart::Header(_) => {
                    let what = "is what the client says: each other value is another bucket";
                    let instead = "use it only where a proxy in front writes this field";
                    problems.push(Problem::warning("key", what, instead).element(index));
                }
                _ => {}
            }
        }
        problems.extend(Problem::out_of_range("prefix_v4", (*prefix_v4).into(), 1..=32));
        problems.extend(Problem::out_of_range("prefix_v6", (*prefix_v6).into(), 1..=128));
        let buckets = u64::try_from(*most).unwrap_or(u64::MAX);
        problems.extend(Problem::out_of_range("buckets", buckets, BucketSettings::LEAST..=BucketSettings::MOST));
        if *amounts == LimitAmounts::default() {
            let what = "is missing, and so are quota and concurrency: it limits nothing";
            let problem = Problem::error("rate", what, "write rate, quota or concurrency");
            problems.push(problem.with("quota"));
        }
        if self.shared && amounts.concurrency.is_some() {
            let what = "is counted by each gateway for itself, and `shared` is for all of them together";
            let instead = "put it into a [[limit]] of its own";
            problems.push(Problem::error("concurrency", what, instead).with("shared"));
        }
        if amounts.concurrency == Some(0) {
            problems.push(Problem::error("concurrency", "is 0: nothing would pass", "use 1 or more, or \"none\""));
        }
        let highest = u64::from(self.costs.highest());
        if highest == 0 {
            problems.push(Problem::error("cost", "is 0 for all requests: it limits nothing", "use 1 or more for some"));
        }
        for plan in plans.iter().flatten() {
            if self.shared && plan.amounts.concurrency.is_some() {
                let what = format!(
                    "counts for all gateways together, and the concurrency of plan {} is counted by each for itself",
                    plan.name
                );
                let instead = "remove `concurrency` from the plan, or use a [[limit]] of its own for it";
                problems.push(Problem::error("shared", what, instead).with("plans"));
            }
            let burst = plan.amounts.rate.map(|rate| rate.burst());
            let quota = plan.amounts.quota.map(|quota| quota.requests);
            if let Some(most) =
                burst.into_iter().chain(quota).filter(|most| *most > 0).min().filter(|most| highest > *most)
            {
                let what = format!(
                    "is {highest} for some requests, and plan {} has {most} at once: they would never pass",
                    plan.name
                );
                problems.push(Problem::error("cost", what, "use less here, or more there"));
            }
        }
        if let Some(rate) = &amounts.rate
            && rate.burst() > 0
            && highest > rate.burst()
        {
            let what =
                format!("is {highest} for some requests, and the burst is {}: they would never pass", rate.burst());
            problems.push(Problem::error("cost", what, "use less here, or more there").with("burst"));
        }
        if let Some(rate) = amounts.rate.filter(|rate| rate.burst() > 0 && rate.is_too_fine()) {
            let what = "is no more than the rate has within a millisecond, a step of the clock: not all that is due would pass";
            let instead = format!("use {} or more", rate.requests_in(1) + 1);
            problems.push(Problem::error("burst", what, instead).with("rate"));
        }
        if let Some(quota) = &amounts.quota
            && quota.requests > 0
            && highest > quota.requests
        {
            let what =
                format!("is {highest} for some requests, and the quota is {}: they would never pass", quota.requests);
            problems.push(Problem::error("cost", what, "use less here, or more there").with("quota"));
        }
        if self.applies.methods == Methods::only([]) {
            problems.push(Problem::error(
                "methods",
                "is empty: the limit would match nothing",
                "remove it for all methods",
            ));
        }
        problems
    }
}

/// All limits, running.
#[derive(Debug, Default)]
pub struct RequestLimits {
    limits: Vec<Arc<RunningLimit>>,
    /// By the place of the route.
    routes: Vec<Box<[LimitUse]>>,
    /// Fields that keys are made from.
    headers: Vec<String>,
    /// Whether answers say what is left.
    told: bool,
    /// With whether the edge has said it.
    odd: RwLock<Vec<(OddTerms, bool)>>,
    /// Of limits that replicas share.
    engine: Option<Arc<LeaseEngine>>,
    /// The place in the order of locks for the next limit with buckets of its own.
    next_place: u64,
}

#[derive(Debug)]
struct RunningLimit {
    settings: LimitSettings,
    tables: Arc<LimitTables>,
    /// Of the buckets, which locks are taken in the order of: it stays when a reload keeps them. Else a request that came before
    /// the reload and one that came after it could wait for each other.
    place: u64,
    /// Keys cannot be chosen to meet in one bucket.
    seed: (u64, u64),
    early: bool,
    /// The key is the token, as this process counts it.
    is_by_token: bool,
    /// For each header of the key, its place in [`RequestLimits::headers`].
    headers: Vec<usize>,
    /// `None`: this process counts for itself.
    shared: Option<SharedLimit>,
}

/// The buckets of a limit. A bucket is always asked with the same amounts: those of a plan, and those of a rate that tokens have
/// of their own, have tables of their own.
#[derive(Debug)]
struct LimitTables {
    /// Buckets of a table.
    most: usize,
    common: Arc<LimitTable<LimitBucket>>,
    /// As the plans stand in the settings. A table is made when the first token of its plan comes.
    plans: Box<[OnceLock<Arc<LimitTable<LimitBucket>>>]>,
    own: RwLock<Vec<Arc<OwnRate>>>,
}

/// Tokens that have the same rate of their own.
#[derive(Debug)]
struct OwnRate {
    /// Those of the token's plan, but for the rate.
    amounts: LimitAmounts,
    table: Arc<LimitTable<LimitBucket>>,
}

/// Different rates that tokens have of their own. More of them: as if they had none.
pub const MOST_OWN_RATES: usize = 256;
/// Tokens with the same rate of their own that have a bucket each.
const OWN_BUCKETS: usize = 4_096;

/// What a request of one limit is measured by.
enum Chosen<'a> {
    /// By the settings, of which nothing is copied.
    Set(&'a LimitAmounts, &'a Arc<LimitTable<LimitBucket>>),
    Own(Arc<OwnRate>),
}

impl Chosen<'_> {
    fn parts(&self) -> (&LimitAmounts, &Arc<LimitTable<LimitBucket>>) {
        match self {
            Self::Set(amounts, table) => (amounts, table),
            Self::Own(own) => (&own.amounts, &own.table),
        }
    }
}

/// Terms of a token that cannot hold as its record says them. Each is to be said once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OddTerms {
    pub kind: OddKind,
    /// Of the plan, or of the limit.
    pub name: Box<str>,
    /// The first one.
    pub token: TokenId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OddKind {
    UnknownPlan,
    /// There are [`MOST_OWN_RATES`] in the limit.
    TooManyRates,
}

/// So many are said at most.
const MOST_ODD: usize = 64;

/// A limit on a route.
#[derive(Debug)]
struct LimitUse {
    limit: u16,
    /// By method; 0: it does not apply.
    costs: [u32; 7],
    /// Nothing but a rate, for whoever asks, that this process counts behind the token store and does not tell of.
    is_plain: bool,
}

/// What the limits of one request are told by.
#[derive(Clone, Copy, Debug)]
pub struct LimitSubject<'a> {
    pub route: usize,
    pub route_name: &'a str,
    pub method: Method,
    pub client: Option<IpAddr>,
    pub token: Option<&'a Digest>,
    /// `None` before the token store was asked, and without a token.
    pub principal: Option<&'a Principal>,
    /// From [`RequestLimits::header_keys`].
    pub headers: &'a [u64],
}

/// Which of the limits are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitStage {
    /// By address, before the token store.
    Early,
    /// The others.
    Late,
    Both,
}

/// The limit that refuses a request for the longest time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Excess {
    pub limit: u16,
    pub by: LimitedBy,
    /// Whole seconds, 1 or more.
    pub retry_after: u64,
    /// Unix seconds at which the same request would pass.
    pub reset: u64,
    /// What the limit allows in a minute, rounded up; `None` for requests in flight.
    pub per_minute: Option<u64>,
    pub remaining: u64,
}

/// What one limit made of a request, for metrics, the log and the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitFact {
    pub limit: u16,
    pub result: LimitResult,
    /// The key had no bucket of its own.
    pub shared: bool,
    /// [`RequestLimits::take_odd`] has something to say.
    pub odd: bool,
    /// Only where answers say so.
    pub remaining: u64,
    pub full_in: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LimitResult {
    #[default]
    Allowed,
    Refused,
    /// Would have been refused.
    DryRun,
}

pub type LimitFacts = SmallVec<[LimitFact; 2]>;

/// A place among the requests in flight, given back when it is dropped.
#[derive(Debug)]
pub struct InFlight {
    table: Arc<LimitTable<LimitBucket>>,
    key: u64,
    shared: bool,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.table.change(self.key, self.shared, LimitBucket::release);
    }
}

/// What a request has taken. To be kept as long as it goes on. Most limits have a rate alone, of which there is nothing to keep.
#[derive(Debug, Default)]
pub struct LimitsTaken(Option<Box<KeptTakings>>);

#[derive(Debug, Default)]
struct KeptTakings {
    in_flight: SmallVec<[InFlight; 1]>,
    /// Only of the early stage.
    changes: Vec<BucketChange>,
    /// Of limits that replicas share.
    shared: SharedTaken,
}

#[derive(Debug)]
struct BucketChange {
    limit: u16,
    key: u64,
    shared: bool,
    cost: u64,
    before: LimitBucket,
    after: LimitBucket,
}

impl RequestLimits {
    /// Takes over the buckets of limits that are running with the same settings. `seed` makes random numbers.
    pub fn new(
        settings: &[LimitSettings],
        told: bool,
        routes: &Routes,
        running: Option<&Self>,
        mut seed: impl FnMut() -> u64,
    ) -> Self {
        let mut headers: Vec<String> = Vec::new();
        let mut next_place = running.map_or(0, |running| running.next_place);
        let limits: Vec<_> = settings
            .iter()
            .map(|settings| {
                let kept = running.and_then(|running| running.buckets_of(settings));
                let names = settings.buckets.key.iter().filter_map(|part| match part {
                    LimitKeyPart::Header(name) => Some(name),
                    _ => None,
                });
                let places = names.map(|name| {
                    headers.iter().position(|known| known.eq_ignore_ascii_case(name)).unwrap_or_else(|| {
                        headers.push(name.clone());
                        headers.len() - 1
                    })
                });
                let places = places.collect();
                let place = kept.map_or(next_place, |kept| kept.place);
                next_place += u64::from(kept.is_none());
                Arc::new(RunningLimit {
                    tables: kept.map_or_else(
                        || {
                            Arc::new(LimitTables::new(
                                settings.most(),
                                settings.buckets.plans.as_ref().map_or(0, Vec::len),
                            ))
                        },
                        |kept| Arc::clone(&kept.tables),
                    ),
                    place,
                    seed: kept.map_or_else(|| (seed(), seed()), |kept| kept.seed),
                    early: settings.buckets.is_early(&settings.applies),
                    is_by_token: !settings.shared && settings.buckets.key.as_slice() == [LimitKeyPart::Token],
                    headers: places,
                    shared: None,
                    settings: settings.clone(),
                })
            })
            .collect();
        let uses = |name: &str, methods: Methods| {
            let on_route = |(limit, running): (u16, &Arc<RunningLimit>)| {
                let LimitSettings { applies, costs, .. } = &running.settings;
                let is_meant = applies.routes.is_empty() || applies.routes.iter().any(|route| route == name);
                let cost = |method: Method| {
                    let counts = is_meant && applies.methods.has(method) && methods.has(method);
                    if counts { costs.of(name, method) } else { 0 }
                };
                let costs = Method::FORWARDED.map(cost);
                let amounts = &running.settings.buckets.amounts;
                let is_rate_alone = (amounts.quota, amounts.concurrency) == (None, None) && amounts.rate.is_some();
                let is_meant_for_all = applies.scopes.is_empty() && applies.users.is_empty();
                let is_plain = is_rate_alone && is_meant_for_all && !(running.settings.shared || running.early || told);
                costs.iter().any(|cost| *cost > 0).then_some(LimitUse { limit, costs, is_plain })
            };
            let mut uses: Vec<LimitUse> = (0..).zip(&limits).filter_map(on_route).collect();
            uses.sort_by_key(|limit| limits.get(usize::from(limit.limit)).map(|limit| limit.place));
            uses.into()
        };
        let routes = routes.iter().map(|route| uses(&route.name, route.methods)).collect();
        Self { limits, routes, headers, told, odd: RwLock::default(), engine: None, next_place }
    }

    /// The running limit whose buckets fit these settings.
    fn buckets_of(&self, settings: &LimitSettings) -> Option<&RunningLimit> {
        let same = |limit: &&Arc<RunningLimit>| {
            let LimitSettings { name, buckets, shared, .. } = &limit.settings;
            (name, buckets, shared) == (&settings.name, &settings.buckets, &settings.shared)
        };
        self.limits.iter().find(same).map(|limit| &**limit)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.limits.iter().map(|limit| limit.settings.name.as_str())
    }

    pub fn settings(&self, limit: u16) -> Option<&LimitSettings> {
        self.limits.get(usize::from(limit)).map(|limit| &limit.settings)
    }

    /// What a limit allows to somebody.
    pub fn amounts(&self, limit: u16, principal: Option<&Principal>) -> Option<LimitAmounts> {
        self.limits.get(usize::from(limit)).map(|limit| *limit.choose(principal, false).0.parts().0)
    }

    /// Notes odd terms. Whether the edge has not said them yet.
    #[cold]
    fn is_unsaid(&self, (kind, name): (OddKind, &str), principal: Option<&Principal>) -> bool {
        let Some(token) = principal.map(Principal::token) else { return false };
        let place = |all: &[(OddTerms, bool)]| all.iter().position(|(odd, _)| odd.kind == kind && *odd.name == *name);
        let known = {
            let all = self.odd.read();
            place(&all).and_then(|place| all.get(place)).map(|(_, is_said)| !is_said)
        };
        known.unwrap_or_else(|| {
            let mut all = self.odd.write();
            if all.len() < MOST_ODD && place(&all).is_none() {
                all.push((OddTerms { kind, name: name.into(), token }, false));
                return true;
            }
            false
        })
    }

    /// What there is to be said of terms that do not hold. Each comes once.
    pub fn take_odd(&self) -> Vec<OddTerms> {
        let mut all = self.odd.write();
        let unsaid = all.iter_mut().filter(|(_, is_said)| !is_said);
        unsaid
            .map(|(odd, is_said)| {
                *is_said = true;
                odd.clone()
            })
            .collect()
    }

    pub fn name(&self, limit: u16) -> &str {
        self.settings(limit).map_or("", |settings| settings.name.as_str())
    }

    /// Names of limits whose buckets another one has as well.
    pub fn kept_from<'a>(&'a self, running: &'a Self) -> impl Iterator<Item = &'a str> {
        let is_kept = |limit: &&Arc<RunningLimit>| {
            let before = running.limits.iter().find(|other| Arc::ptr_eq(&other.tables, &limit.tables));
            // What is shared is kept by what leases it.
            before.is_some_and(|before| match (&limit.shared, &before.shared) {
                (Some(shared), Some(before)) => shared.is_same(before),
                (shared, before) => shared.is_none() && before.is_none(),
            })
        };
        self.limits.iter().filter(is_kept).map(|limit| limit.settings.name.as_str())
    }

    pub fn is_empty(&self) -> bool {
        self.limits.is_empty()
    }

    /// Whether answers say what is left.
    pub fn are_told(&self) -> bool {
        self.told
    }

    /// The values of the fields that keys are made from: a missing one is as good as an empty one, and several are one with commas.
    pub fn header_keys(&self, view: &RequestView<'_>) -> SmallVec<[u64; 2]> {
        let key = |name: &String| {
            let mut hash = SipHasher13::new();
            let fields = view.fields.iter().filter(|field| field.name.eq_ignore_ascii_case(name.as_bytes()));
            for (place, field) in fields.enumerate() {
                if place > 0 {
                    hash.write(b", ");
                }
                field.value.iter().for_each(|byte| hash.write_u8(byte.to_ascii_lowercase()));
            }
            hash.finish()
        };
        self.headers.iter().map(key).collect()
    }

    /// Whether limits of this route are asked before the token store.
    pub fn has_early(&self, route: usize) -> bool {
        self.uses(route).iter().any(|limit| self.limits.get(usize::from(limit.limit)).is_some_and(|limit| limit.early))
    }

    fn uses(&self, route: usize) -> &[LimitUse] {
        self.routes.get(route).map_or(&[], |uses| uses)
    }

    /// Whether the request is within its limits. Takes nothing. What each limit says of it is put behind `facts`; if one refuses
    /// it, only what refuses it, or would, is left there: the others have not counted it.
    pub fn check(
        &self,
        subject: &LimitSubject<'_>,
        stage: LimitStage,
        now: Now,
        facts: &mut LimitFacts,
    ) -> Result<LimitsTaken, Excess> {
        self.ask(subject, stage, now, false, &[], facts)
    }

    /// Takes what the request costs from all of its limits, or nothing from any. `paid`: what the limits have said whose leases
    /// were waited for. While there are leases to wait for, nothing is put behind `facts`.
    pub fn take(
        &self,
        subject: &LimitSubject<'_>,
        stage: LimitStage,
        now: Now,
        paid: &[(u16, LeaseOutcome)],
        facts: &mut LimitFacts,
    ) -> Result<LimitsTaken, Excess> {
        if let [only] = self.uses(subject.route)
            && only.is_plain
            && stage != LimitStage::Early
            && self.takes_plainly(only, subject, now, facts)
        {
            return Ok(LimitsTaken::default());
        }
        self.ask(subject, stage, now, true, paid, facts)
    }

    #[inline(never)]
    fn ask(
        &self,
        subject: &LimitSubject<'_>,
        stage: LimitStage,
        now: Now,
        takes: bool,
        paid: &[(u16, LeaseOutcome)],
        facts: &mut LimitFacts,
    ) -> Result<LimitsTaken, Excess> {
        let before = facts.len();
        let taken = LimitsTaken::default();
        let mut asked = Asked { subject, stage, now, takes, paid, excess: None, taken, facts };
        self.ask_rest(self.uses(subject.route), &mut asked);
        let Asked { excess, taken, facts, .. } = asked;
        if let Some((_, excess)) = excess {
            facts.retain(|fact| fact.result != LimitResult::Allowed);
            return Err(excess);
        }
        if taken.lacks() {
            // Asked again when they have come.
            facts.truncate(before);
        }
        Ok(taken)
    }

    /// The short way, of nearly all requests: whether the only limit of the route, which is plain, has what the request costs, and
    /// has given it. `false`: nothing was done, and [`Self::ask`] says why.
    #[inline(always)]
    fn takes_plainly(&self, only: &LimitUse, subject: &LimitSubject<'_>, now: Now, facts: &mut LimitFacts) -> bool {
        let Some(limit) = self.limits.get(usize::from(only.limit)) else { return false };
        let Some(cost) = only.costs.get(subject.method.index()).filter(|cost| **cost > 0) else { return false };
        let BucketSettings { amounts, plans, .. } = &limit.settings.buckets;
        if plans.is_some() && subject.principal.and_then(Principal::terms).is_some() {
            return false;
        }
        let Some(key) = limit.key(subject) else { return false };
        let Some(mut locked) = limit.tables.common.lock(key, amounts, now) else { return false };
        let shared = locked.is_shared();
        let taken = locked.get().is_some_and(|bucket| bucket.takes_of_rate_alone(amounts, (*cost).into(), now));
        if taken {
            facts.push(LimitFact { limit: only.limit, shared, ..LimitFact::default() });
        }
        taken
    }

    /// Locks and checks the limits one after the other. On the way back, with all of them locked and none exceeded, takes.
    fn ask_rest(&self, uses: &[LimitUse], asked: &mut Asked<'_, '_>) {
        let Some((next, rest)) = uses.split_first() else { return };
        let Some((limit, cost)) = self.applies(next, asked.subject, asked.stage) else {
            return self.ask_rest(rest, asked);
        };
        let Some(key) = limit.key(asked.subject) else { return self.ask_rest(rest, asked) };
        let (chosen, odd) = limit.choose(asked.subject.principal, asked.takes);
        let (amounts, table) = chosen.parts();
        let is_odd = odd.is_some_and(|odd| asked.takes && self.is_unsaid(odd, asked.subject.principal));
        if let Some(shared) = &limit.shared {
            return self.ask_shared((next, rest), limit, shared, (key, cost), (amounts, is_odd), asked);
        }
        if !asked.takes {
            if let Some((bucket, shared)) = table.peek(key, amounts, asked.now) {
                let place = asked.facts.len();
                check_one(next, limit, amounts, cost, (&bucket, shared), asked);
                if let Some(fact) = asked.facts.get_mut(place) {
                    self.tell(fact, &bucket, amounts, asked.now);
                }
            }
            return self.ask_rest(rest, asked);
        }
        let Some(mut locked) = table.lock(key, amounts, asked.now) else { return self.ask_rest(rest, asked) };
        let shared = locked.is_shared();
        let Some(bucket) = locked.get() else { return self.ask_rest(rest, asked) };
        let place = asked.facts.len();
        let fits = check_one(next, limit, amounts, cost, (&*bucket, shared), asked);
        self.ask_rest(rest, asked);
        if fits && asked.excess.is_none() && !asked.taken.lacks() {
            let before = *bucket;
            bucket.take(amounts, cost, asked.now);
            let change = BucketChange { limit: next.limit, key, shared, cost, before, after: *bucket };
            asked.taken.keep(change, amounts, table, asked.stage);
        }
        if let Some(fact) = asked.facts.get_mut(place) {
            fact.odd = is_odd;
            self.tell(fact, bucket, amounts, asked.now);
        }
    }

    /// Notes what is left, where answers say so.
    #[inline]
    fn tell(&self, fact: &mut LimitFact, bucket: &LimitBucket, amounts: &LimitAmounts, now: Now) {
        if self.told {
            let level = bucket.level(amounts, now);
            (fact.remaining, fact.full_in) = (level.remaining, level.full_in_ms.div_ceil(1_000));
        }
    }

    #[inline(always)]
    fn applies(&self, next: &LimitUse, subject: &LimitSubject<'_>, stage: LimitStage) -> Option<(&RunningLimit, u64)> {
        let cost = next.costs.get(subject.method.index()).copied().filter(|cost| *cost > 0)?;
        let limit = self.limits.get(usize::from(next.limit))?;
        let is_asked = match stage {
            LimitStage::Both => true,
            LimitStage::Early => limit.early,
            LimitStage::Late => !limit.early,
        };
        (is_asked && limit.is_for(subject.principal)).then_some((limit, cost.into()))
    }

    /// What an early stage took, when a later one refuses.
    pub fn give_back(&self, taken: &LimitsTaken, now: Now) {
        self.give_back_leases(taken, now);
        for change in taken.0.iter().flat_map(|kept| &kept.changes) {
            if let Some(limit) = self.limits.get(usize::from(change.limit)) {
                let undo = |bucket: &mut LimitBucket| bucket.give_back(change.cost, &change.before, &change.after);
                // Early limits are by address, and know no plan.
                limit.tables.common.change(change.key, change.shared, undo);
            }
        }
    }
}

/// Whether the request fits into one bucket.
fn check_one(
    next: &LimitUse,
    limit: &RunningLimit,
    amounts: &LimitAmounts,
    cost: u64,
    (bucket, shared): (&LimitBucket, bool),
    asked: &mut Asked<'_, '_>,
) -> bool {
    let (number, now) = (next.limit, asked.now);
    let result = match bucket.check(amounts, cost, now) {
        Ok(()) => LimitResult::Allowed,
        Err(_) if limit.settings.dry_run => LimitResult::DryRun,
        Err(shortage) => {
            asked.exceeds(shortage.wait_ms, || shortage.exceeds(number, bucket, amounts, now));
            LimitResult::Refused
        }
    };
    asked.facts.push(LimitFact { limit: number, result, shared, ..LimitFact::default() });
    result == LimitResult::Allowed
}

impl LimitsTaken {
    /// Keeps what may have to be given back.
    fn keep(
        &mut self,
        change: BucketChange,
        amounts: &LimitAmounts,
        table: &Arc<LimitTable<LimitBucket>>,
        stage: LimitStage,
    ) {
        if amounts.concurrency.is_some() {
            let place = InFlight { table: Arc::clone(table), key: change.key, shared: change.shared };
            self.0.get_or_insert_default().in_flight.push(place);
        }
        if stage == LimitStage::Early {
            self.0.get_or_insert_default().changes.push(change);
        }
    }

    /// Keeps what another stage has taken as well.
    pub(super) fn join(&mut self, other: Self) {
        match &mut self.0 {
            None => *self = other,
            Some(own) => own.in_flight.extend(other.0.into_iter().flat_map(|other| other.in_flight)),
        }
    }
}

impl Shortage {
    #[cold]
    fn exceeds(self, limit: u16, bucket: &LimitBucket, amounts: &LimitAmounts, now: Now) -> Excess {
        Excess {
            limit,
            by: self.by,
            retry_after: self.wait_ms.div_ceil(1_000).max(1),
            // Rounded up, as the wait is: who waits until then must not be early.
            reset: now.unix_ms.saturating_add(self.wait_ms.max(1)).div_ceil(1_000),
            per_minute: amounts.per_minute(self.by),
            remaining: bucket.remaining(self.by, amounts, now),
        }
    }
}

impl LimitAmounts {
    /// What is allowed in a minute.
    fn per_minute(&self, by: LimitedBy) -> Option<u64> {
        const MINUTE_MS: u64 = 60_000;
        match by {
            LimitedBy::Rate => self.rate.map(|rate| rate.requests_in(MINUTE_MS)),
            LimitedBy::Quota => self.quota.map(|quota| (quota.requests * MINUTE_MS).div_ceil(quota.period.as_ms())),
            LimitedBy::Concurrency | LimitedBy::Store => None,
        }
    }
}

struct Asked<'a, 's> {
    subject: &'a LimitSubject<'s>,
    stage: LimitStage,
    now: Now,
    takes: bool,
    /// Of shared limits, what they have said already.
    paid: &'a [(u16, LeaseOutcome)],
    /// With its wait in milliseconds.
    excess: Option<(u64, Excess)>,
    taken: LimitsTaken,
    /// What the limits have said, behind what was said before.
    facts: &'a mut LimitFacts,
}

impl LimitTables {
    fn new(most: usize, plans: usize) -> Self {
        Self {
            most,
            common: Arc::new(LimitTable::new(most)),
            plans: (0..plans).map(|_| OnceLock::new()).collect(),
            own: RwLock::default(),
        }
    }

    fn of_plan(&self, place: usize) -> Option<&Arc<LimitTable<LimitBucket>>> {
        self.plans.get(place).map(|table| table.get_or_init(|| Arc::new(LimitTable::new(self.most))))
    }

    /// Those of a token's own rate. `None`: there are too many.
    fn of_rate(&self, amounts: &LimitAmounts, takes: bool) -> Option<Arc<OwnRate>> {
        let find = |own: &[Arc<OwnRate>]| own.iter().find(|known| known.amounts == *amounts).map(Arc::clone);
        let known = find(&self.own.read());
        known.or_else(|| {
            let mut own = self.own.write();
            if let Some(known) = find(&own) {
                return Some(known);
            }
            if own.len() >= MOST_OWN_RATES {
                return None;
            }
            // Who only looks sees a full bucket, as the first request would, and uses up no place.
            let buckets = if takes { self.most.min(OWN_BUCKETS) } else { 1 };
            let new = Arc::new(OwnRate { amounts: *amounts, table: Arc::new(LimitTable::new(buckets)) });
            if takes {
                own.push(Arc::clone(&new));
            }
            Some(new)
        })
    }
}

impl Asked<'_, '_> {
    /// Remembers the limit that refuses for the longest time.
    fn exceeds(&mut self, wait_ms: u64, excess: impl FnOnce() -> Excess) {
        if self.excess.is_none_or(|(longest, _)| longest < wait_ms) {
            self.excess = Some((wait_ms, excess()));
        }
    }
}

impl RunningLimit {
    /// The amounts for a token, and where its bucket is; and what is odd about the token's terms.
    /// `takes`: it is to be taken from.
    #[inline(always)]
    fn choose<'a>(&'a self, principal: Option<&'a Principal>, takes: bool) -> (Chosen<'a>, Option<(OddKind, &'a str)>) {
        let BucketSettings { amounts, plans, .. } = &self.settings.buckets;
        match (plans, principal.and_then(Principal::terms)) {
            (Some(plans), Some(terms)) => self.choose_by_terms(plans, terms, takes),
            _ => (Chosen::Set(amounts, &self.tables.common), None),
        }
    }

    /// A plan that is not configured is as good as none: the limit's own amounts hold, so that a word that is wrong gives nobody
    /// more than somebody without a plan.
    fn choose_by_terms<'a>(
        &'a self,
        plans: &'a [LimitPlan],
        terms: &'a TokenTerms,
        takes: bool,
    ) -> (Chosen<'a>, Option<(OddKind, &'a str)>) {
        let BucketSettings { amounts, key, .. } = &self.settings.buckets;
        let (mut amounts, mut table, mut odd) = (amounts, &self.tables.common, None);
        if let Some(name) = terms.plan() {
            let place = plans.iter().position(|plan| plan.name == name);
            match place.and_then(|place| plans.get(place).zip(self.tables.of_plan(place))) {
                // It has a weight alone.
                Some((plan, _)) if plan.amounts == LimitAmounts::default() => {}
                Some((plan, of_plan)) => (amounts, table) = (&plan.amounts, of_plan),
                None => odd = Some((OddKind::UnknownPlan, name)),
            }
        }
        // A user may have other tokens: only a bucket that is the token's can have its rate.
        if let Some(rate) = terms.rate().filter(|_| key.contains(&LimitKeyPart::Token)) {
            // Less than the dearest request costs would never let it pass; nor would all that is due with less than comes in a step
            // of the clock.
            let burst = rate.burst.max(self.settings.costs.highest().into());
            let mut own = RefillRate::new(rate.requests, rate.period_ms, burst);
            if own.is_too_fine() {
                own = RefillRate::new(rate.requests, rate.period_ms, own.requests_in(1) + 1);
            }
            match self.tables.of_rate(&LimitAmounts { rate: Some(own), ..*amounts }, takes) {
                Some(own) => return (Chosen::Own(own), odd),
                None => odd = odd.or(Some((OddKind::TooManyRates, &self.settings.name))),
            }
        }
        (Chosen::Set(amounts, table), odd)
    }

    #[inline]
    fn is_for(&self, principal: Option<&Principal>) -> bool {
        let LimitScope { scopes, users, .. } = &self.settings.applies;
        if scopes.is_empty() && users.is_empty() {
            return true;
        }
        let Some(principal) = principal else { return false };
        let has_scope = scopes.is_empty() || scopes.iter().any(|scope| principal.scopes().contains(scope));
        has_scope && (users.is_empty() || users.iter().any(|user| user == principal.user()))
    }

    /// Whose bucket it is. `None`: the request has no such key, and the limit is not about it.
    #[inline(always)]
    fn key(&self, subject: &LimitSubject<'_>) -> Option<u64> {
        // The digest of a token is a hash already. It leaves this process as a hash with a key only.
        if self.is_by_token {
            return Some(subject.token?.spread() ^ self.seed.0);
        }
        self.hashed_key(subject)
    }

    #[inline(never)]
    fn hashed_key(&self, subject: &LimitSubject<'_>) -> Option<u64> {
        let mut hash = SipHasher13::new_with_keys(self.seed.0, self.seed.1);
        let mut headers = self.headers.iter();
        for part in &self.settings.buckets.key {
            match part {
                LimitKeyPart::Token => hash.write(subject.token?.as_bytes()),
                LimitKeyPart::User => write_text(&mut hash, subject.principal?.user()),
                LimitKeyPart::Address => self.write_address(&mut hash, subject.client),
                LimitKeyPart::Route => write_text(&mut hash, subject.route_name),
                LimitKeyPart::Scope => {
                    let held = subject.principal?.scopes();
                    let scopes = &self.settings.applies.scopes;
                    write_text(&mut hash, scopes.iter().find(|scope| held.contains(scope))?);
                }
                LimitKeyPart::Header(_) => {
                    let value = headers.next().and_then(|place| subject.headers.get(*place));
                    hash.write_u64(value.copied().unwrap_or_default());
                }
            }
        }
        Some(hash.finish())
    }

    /// All peers of Unix sockets are one.
    fn write_address(&self, hash: &mut SipHasher13, client: Option<IpAddr>) {
        match client {
            None => hash.write_u8(0),
            Some(IpAddr::V4(ip)) => {
                let cut = 32 - u32::from(self.settings.buckets.prefix_v4.min(32));
                hash.write_u8(4);
                hash.write_u32(ip.to_bits() & u32::MAX.checked_shl(cut).unwrap_or(0));
            }
            Some(IpAddr::V6(ip)) => {
                let cut = 128 - u32::from(self.settings.buckets.prefix_v6.min(128));
                hash.write_u8(6);
                hash.write_u128(ip.to_bits() & u128::MAX.checked_shl(cut).unwrap_or(0));
            }
        }
    }
}

/// With its end, so that two parts cannot be taken for others.
fn write_text(hash: &mut SipHasher13, text: &str) {
    hash.write(text.as_bytes());
    hash.write_u8(0xff);
}

#[path = "limit_shared.rs"]
mod shared;
pub use shared::{LeasesLacking, LimitLack, PaidLeases};
use shared::{SharedLimit, SharedTaken};

#[cfg(test)]
#[path = "limit_tests.rs"]
mod tests;
