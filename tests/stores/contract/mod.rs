//! The contract that every store must keep: one suite, run against each store and its real server. A store implements
//! [`Subject`]; features of a single kind of store are tested in that store's file.

mod embedded;
mod introspect;
mod postgres;
mod redis;

use crate::servers::{Fault, Folder, Server as _};
use async_trait::async_trait;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tollgate::identity::{Authenticator, CacheSettings, Checked, Invalid, Mode, TokenStatus, judge};
use tollgate::store::chain::{Chain, Link};
use tollgate::store::credential::{Credential, Digest};
use tollgate::store::query::{TokenOrder, TokenQuery, TokenState};
use tollgate::store::terms::{SaidTerms, TokenTerms};
use tollgate::store::{AdminError, Change, Event, Imported, Named, StoreError, TokenAdmin, TokenRecord, TokenStore};
use tollgate::telemetry::metrics::CacheResult;

/// A gateway's timeout for a lookup: long enough that a machine which is busy with other tests is no outage.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long a change notification may take while all other tests run on the same cores. The documented bound of one second
/// is tested by `tests/stores/revocation.rs`, and by the median here.
const LAG: Duration = Duration::from_secs(3);
const PROMISED_LAG: Duration = Duration::from_secs(1);
/// How long a store may take to recover, or to detect that its server is gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a kind of store supports, which selects the parts of the suite.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Notifies of changes.
    pub hears: bool,
    /// Stores every field of a record; otherwise only the user and whether the token is valid.
    pub keeps_all: bool,
    /// `TokenAdmin` is complete; otherwise the tests have a minimal one that fills another program's tables.
    pub is_ours: bool,
    /// Keeps a register of gateways.
    pub waits: bool,
    /// Runs on a server into which faults can be injected.
    pub has_server: bool,
    /// A single record can be invalid.
    pub spoils: bool,
    /// Distinguishes these from unknown: expired, revoked, not yet valid, blocked.
    pub tells_why: bool,
}

/// A kind of store under test.
#[async_trait]
pub trait Subject: Send + Sync {
    fn name(&self) -> &'static str;
    fn features(&self) -> Features;
    /// Writes to the store; for another program's tables, an implementation of the tests.
    async fn admin(&self) -> Box<dyn TokenAdmin>;
    fn open(&self) -> Arc<dyn TokenStore>;
    /// Makes a token's record invalid.
    async fn spoil(&self, token: &str);
    async fn fault(&self, fault: Fault);
}

pub fn record(token: &str) -> TokenRecord {
    TokenRecord {
        scopes: vec!["api".into(), "read_user".into()],
        description: "quote \" backslash \\ newline-free é".into(),
        created: 1_700_000_000,
        ..TokenRecord::new(Digest::of(token.as_bytes()), format!("user of {}", token.len()))
    }
}

pub fn credential(token: &[u8]) -> Credential {
    Credential::new(token, Digest::of(token))
}

/// A lookup as a gateway does it, with its timeout.
pub async fn ask(store: &dyn TokenStore, token: &[u8]) -> Result<Option<TokenRecord>, StoreError> {
    tokio::time::timeout(TIMEOUT, store.lookup(&credential(token))).await.unwrap_or(Err(StoreError::Timeout))
}

/// A lookup in a healthy store, repeated on timeouts, which a busy machine may cause.
pub async fn lookup(store: &dyn TokenStore, token: &[u8]) -> Option<TokenRecord> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(store, token).await {
            Ok(found) => return found,
            Err(StoreError::Timeout | StoreError::Overloaded) if Instant::now() < deadline => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn verdict(record: Option<&TokenRecord>, token: &str) -> Result<String, Invalid> {
    let now = tollgate::edge::now();
    match judge(record, &Digest::of(token.as_bytes()), now).0 {
        TokenStatus::Valid(principal) => Ok(principal.user().to_owned()),
        TokenStatus::Invalid(why) => Err(why),
    }
}

/// Follows a store's changes until it is dropped.
pub struct Ear {
    events: Arc<Mutex<Vec<(Instant, Event)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Ear {
    pub fn on(store: &Arc<dyn TokenStore>) -> Self {
        let events: Arc<Mutex<Vec<(Instant, Event)>>> = Arc::default();
        let (heard, store) = (Arc::clone(&events), Arc::clone(store));
        let task = tokio::spawn(async move {
            store
                .follow(&move |event| {
                    // Probes are not recorded.
                    if !matches!(event, Event::Alive { .. } | Event::Unheard(..)) {
                        heard.lock().push((Instant::now(), event));
                    }
                })
                .await;
        });
        Self { events, task }
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().iter().map(|(_, event)| event.clone()).collect()
    }

    /// Waits for an event since `from`, and returns its time.
    pub async fn heard(&self, from: Instant, what: &str, is: impl Fn(&Event) -> bool) -> Instant {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.events.lock().iter().find(|(at, event)| *at >= from && is(event)).map(|(at, _)| *at);
            if let Some(at) = found {
                return at;
            }
            assert!(Instant::now() < deadline, "no event for {what}: {:?}", self.events());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn hearing(&self, from: Instant) -> Instant {
        self.heard(from, "hearing", |event| *event == Event::Hearing).await
    }

    /// Waits for a notification of a change of a token, by its digest or the store's handle, or of everything.
    pub async fn change_of(&self, from: Instant, store: &dyn TokenStore, token: &str) -> Instant {
        let (digest, handle) = (Digest::of(token.as_bytes()), store.handle(&credential(token.as_bytes())));
        let names = |change: &Change| match change.token {
            Named::Token(named) => named == digest,
            Named::Handle(named) => Some(named) == handle,
        };
        self.heard(from, token, |event| match event {
            Event::Changed(changes) => changes.iter().any(names),
            Event::Hearing => true,
            Event::Deaf | Event::Silent | Event::Unheard(..) | Event::Untold | Event::Alive { .. } => false,
        })
        .await
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs the whole suite against one store.
pub async fn run(subject: &dyn Subject) {
    records_come_out_as_they_went_in(subject).await;
    only_the_very_token_is_found(subject).await;
    records_are_judged(subject).await;
    many_are_answered_as_one_is(subject).await;
    if subject.features().is_ours {
        writing(subject).await;
        rotation(subject).await;
        users_are_blocked_as_they_are(subject).await;
        known_tokens_stay_as_they_are(subject).await;
        uses_outlive_a_change(subject).await;
    }
    if subject.features().hears {
        changes_are_heard(subject).await;
    }
    if subject.features().waits {
        gateways_confirm(subject).await;
    }
    what_is_asked_for_is_listed(subject).await;
    records_are_removed(subject).await;
    what_changed_meanwhile_is_not_removed(subject).await;
    many_rows(subject).await;
    if subject.features().spoils {
        nonsense_is_no_answer(subject).await;
    }
    if subject.features().has_server {
        a_read_only_server_answers(subject).await;
        cut_connections_are_made_anew(subject).await;
        a_frozen_server_is_cut_off(subject).await;
        a_server_that_is_gone_cannot_tell(subject).await;
    }
}

async fn records_come_out_as_they_went_in(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    let longest = "x".repeat(255);
    for token in ["known", &longest] {
        admin.create(&record(token)).await.unwrap();
        let found = lookup(&*store, token.as_bytes()).await.unwrap_or_else(|| panic!("{}: {token}", subject.name()));
        if subject.features().keeps_all {
            assert_eq!(found, record(token), "{}", subject.name());
        } else {
            assert_eq!((found.digest, found.user), (record(token).digest, record(token).user), "{}", subject.name());
        }
    }
    assert!(matches!(admin.create(&record("known")).await, Err(AdminError::Exists)), "a duplicate");
    assert!(lookup(&*store, b"known").await.is_some());
}

async fn only_the_very_token_is_found(subject: &dyn Subject) {
    let store = subject.open();
    // No prefix match, case folding, trimming or pattern, whatever the bytes.
    let long = [b'y'; 10_000];
    let tokens: [&[u8]; 14] = [
        b"knowN",
        b"KNOWN",
        b"know",
        b"known ",
        b" known",
        b"known\0",
        b"",
        b"%",
        b"*",
        b"' OR 1=1 --",
        b"\xff\xfe",
        b"kn\xc3\xb6wn",
        b"known\r\nX: y",
        &long,
    ];
    for token in tokens {
        assert_eq!(lookup(&*store, token).await, None, "{}: {:?}", subject.name(), String::from_utf8_lossy(token));
    }
}

async fn records_are_judged(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    let (now, hour) = (tollgate::edge::now().unix_ms / 1000, 3600);
    let of = |token: &str| TokenRecord { user: "judged".into(), ..record(token) };
    let table = [
        (of("in-force"), Ok(())),
        (TokenRecord { expires: Some(now + hour), ..of("ends-later") }, Ok(())),
        (TokenRecord { not_before: Some(now - hour), ..of("began") }, Ok(())),
        (TokenRecord { expires: Some(now - hour), ..of("expired") }, Err(Invalid::Expired)),
        (TokenRecord { revoked: Some(now - hour), ..of("revoked") }, Err(Invalid::Revoked)),
        (TokenRecord { not_before: Some(now + hour), ..of("not-yet") }, Err(Invalid::NotYetValid)),
        (TokenRecord { blocked: true, ..of("blocked") }, Err(Invalid::Blocked)),
        (TokenRecord { expires: Some(now - hour), revoked: Some(now - hour), ..of("both") }, Err(Invalid::Revoked)),
    ];
    for (record, expected) in table {
        let token = ["in-force", "ends-later", "began", "expired", "revoked", "not-yet", "blocked", "both"]
            .into_iter()
            .find(|token| Digest::of(token.as_bytes()) == record.digest)
            .unwrap();
        match admin.create(&record).await {
            // Another program's table may have no column for it.
            Err(AdminError::Store(why)) if why == NO_PLACE && !subject.features().is_ours => continue,
            result => result.unwrap(),
        }
        let found = verdict(lookup(&*store, token.as_bytes()).await.as_ref(), token).map(drop);
        if subject.features().tells_why {
            assert_eq!(found, expected, "{}: {token}", subject.name());
        } else {
            assert_eq!(found.is_ok(), expected.is_ok(), "{}: {token}: {found:?}", subject.name());
        }
    }
}

/// Lookups that wait for their turn are asked in bulk: one answer for each, in their order.
async fn many_are_answered_as_one_is(subject: &dyn Subject) {
    let store = subject.open();
    let tokens = ["in-force", "nobody", "known", "expired", "", "revoked", "known", "k\u{f6}wn", "not-yet", "blocked"];
    let credentials = tokens.map(|token| credential(token.as_bytes()));
    let mut one_by_one = Vec::new();
    for token in tokens {
        one_by_one.push(Ok(lookup(&*store, token.as_bytes()).await));
    }
    assert!(matches!(one_by_one[2], Ok(Some(_))) && one_by_one[1] == Ok(None), "{}", subject.name());
    assert_eq!(store.lookup_many(&credentials.each_ref()).await, one_by_one, "{}", subject.name());
    // More than a store is given at once.
    let many: Vec<_> = (0..600).map(|n| credential(if n == 577 { b"known" } else { b"nobody" })).collect();
    let limit = store.lookup_limits().tokens.min(many.len());
    let found = store.lookup_many(&many.iter().rev().take(limit).collect::<Vec<_>>()).await;
    assert_eq!(found.len(), limit);
    let known = found.iter().map(|one| one.as_ref().unwrap().is_some()).collect::<Vec<_>>();
    let expected = (0..limit).map(|n| 599 - n == 577).collect::<Vec<_>>();
    assert_eq!(known, expected, "{}", subject.name());
}

/// The error of a test-only writer for a record that its table cannot hold.
pub const NO_PLACE: &str = "no place for it";

async fn writing(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    assert!(matches!(admin.revoke(&Digest::of(b"nobody"), 1).await, Err(AdminError::Missing)));
    let id = Digest::of(b"known").to_hex();
    assert_eq!(admin.find(&id[..12]).await.unwrap(), [record("known")]);
    assert_eq!(admin.find(&Digest::of(b"nobody").to_hex()[..12]).await.unwrap(), []);
    let before = admin.list().await.unwrap().len();

    // A failed import changes nothing; a successful one skips known tokens.
    let mut broken = [Ok(record("new")), Err(AdminError::Input("broken".into()))].into_iter();
    assert!(matches!(admin.import(&mut broken).await, Err(AdminError::Input(_))));
    assert_eq!(admin.list().await.unwrap().len(), before, "{}", subject.name());
    let mut good = ["known", "new", "newer"].into_iter().map(|token| Ok(record(token)));
    assert_eq!(admin.import(&mut good).await.unwrap(), Imported { new: 2, ..Imported::default() });

    assert!(admin.revoke(&Digest::of(b"new"), 1_760_000_000).await.unwrap());
    assert!(!admin.revoke(&Digest::of(b"new"), 1_770_000_000).await.unwrap(), "the first revocation stays");
    assert_eq!(lookup(&*store, b"new").await.unwrap().revoked, Some(1_760_000_000));

    let user = record("newer").user;
    let all = admin.list().await.unwrap().iter().filter(|record| record.user == user && !record.blocked).count();
    assert_eq!(admin.block(&user, true).await.unwrap(), all as u64);
    assert!(lookup(&*store, b"newer").await.unwrap().blocked);
    assert_eq!(admin.block(&user, true).await.unwrap(), 0);
    assert!(admin.block(&user, false).await.unwrap() > 0);
    assert!(!lookup(&*store, b"newer").await.unwrap().blocked);
    assert_eq!(admin.block("nobody", true).await.unwrap(), 0);
}

async fn rotation(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    let now = tollgate::edge::now().unix_ms / 1000;
    let (old, next) = (record("old-one"), record("next-one"));
    admin.create(&old).await.unwrap();
    assert!(matches!(admin.rotate(&Digest::of(b"nobody"), &next, now, now + 60).await, Err(AdminError::Missing)));
    assert!(matches!(admin.rotate(&old.digest, &record("known"), now, now + 60).await, Err(AdminError::Exists)));
    assert_eq!(lookup(&*store, b"old-one").await, Some(old.clone()), "a failed rotation changes nothing");
    admin.rotate(&old.digest, &next, now, now + 60).await.unwrap();
    let ended = lookup(&*store, b"old-one").await.unwrap();
    assert_eq!((ended.superseded, ended.expires), (Some(now), Some(now + 60)));
    let begun = lookup(&*store, b"next-one").await.unwrap();
    assert_eq!((begun.replaces, begun.expires), (Some(old.digest), None));
    assert!(matches!(admin.rotate(&old.digest, &record("third"), now, now + 60).await, Err(AdminError::Ended)));
    // A token that expires before the end of the overlap keeps its expiry.
    admin.create(&TokenRecord { expires: Some(now + 5), ..record("short") }).await.unwrap();
    admin.rotate(&Digest::of(b"short"), &record("after-short"), now, now + 60).await.unwrap();
    assert_eq!(lookup(&*store, b"short").await.unwrap().expires, Some(now + 5));
    admin.revoke(&next.digest, now).await.unwrap();
    assert!(matches!(admin.rotate(&next.digest, &record("fourth"), now, now + 60).await, Err(AdminError::Ended)));
}

/// A user without tokens, one who is blocked twice, and one with expired and revoked tokens.
async fn users_are_blocked_as_they_are(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    let now = tollgate::edge::now().unix_ms / 1000;
    let of = |token: &str| TokenRecord { user: "leaver".into(), ..record(token) };
    assert_eq!(admin.of_user("leaver").await.unwrap(), []);
    assert_eq!(admin.block("leaver", true).await.unwrap(), 0);
    assert!(!admin.blocked_users().await.unwrap().contains("leaver"), "{}", subject.name());
    let revoked = TokenRecord { revoked: Some(now - 60), ..of("leaver-revoked") };
    let expired = TokenRecord { expires: Some(now - 60), created: 1_700_000_001, ..of("leaver-expired") };
    let working = TokenRecord { created: 1_700_000_002, ..of("leaver-working") };
    // Similar names are other users.
    let others = ["Leaver", "leaver ", "leave", "leaver%", "*"];
    for record in [&revoked, &expired, &working] {
        admin.create(record).await.unwrap();
    }
    for (n, user) in others.into_iter().enumerate() {
        admin.create(&TokenRecord { user: user.into(), ..record(&format!("not-leaver-{n}")) }).await.unwrap();
    }
    assert_eq!(admin.of_user("leaver").await.unwrap(), [working.clone(), expired.clone(), revoked.clone()]);
    for (blocked, changed) in [(true, 3), (true, 0), (false, 3), (false, 0)] {
        assert_eq!(admin.block("leaver", blocked).await.unwrap(), changed, "{}: {blocked}", subject.name());
        let with = |record: &TokenRecord| TokenRecord { blocked, ..record.clone() };
        // Nothing else changes: revoked and expired tokens stay so.
        let expected = [with(&working), with(&expired), with(&revoked)];
        assert_eq!(admin.of_user("leaver").await.unwrap(), expected, "{}", subject.name());
        let users = admin.blocked_users().await.unwrap();
        assert_eq!(users.contains("leaver"), blocked, "{}: {users:?}", subject.name());
        assert!(!others.iter().any(|user| users.contains(*user)), "{}: {users:?}", subject.name());
        let verdict = async |token: &str| verdict(lookup(&*store, token.as_bytes()).await.as_ref(), token);
        assert_eq!(verdict("leaver-revoked").await, Err(Invalid::Revoked), "{}", subject.name());
        assert_eq!(verdict("leaver-working").await.is_ok(), !blocked, "{}", subject.name());
        assert!(verdict("leaver-expired").await.is_err(), "{}", subject.name());
    }
}

/// An import changes no known token, and reports the differences.
async fn known_tokens_stay_as_they_are(subject: &dyn Subject) {
    let mut admin = subject.admin().await;
    let known = TokenRecord { expires: Some(1_900_000_000), ..record("kept") };
    admin.create(&known).await.unwrap();
    let id = known.digest.id().to_string();
    let same = TokenRecord { description: "other words".into(), expires: Some(1_950_000_000), ..known.clone() };
    for (given, part) in [
        (TokenRecord { user: "somebody else".into(), ..known.clone() }, "\"somebody else\" in the input"),
        (TokenRecord { revoked: Some(1_750_000_000), ..known.clone() }, "is revoked in the input"),
        (TokenRecord { blocked: true, ..known.clone() }, "is blocked in the input"),
        (TokenRecord { expires: Some(1_800_000_000), ..known.clone() }, "ends sooner"),
        (same.clone(), ""),
    ] {
        let new = record(&format!("beside-{part}"));
        let mut records = [given, new].into_iter().map(Ok);
        let Imported { new, differing } = admin.import(&mut records).await.unwrap();
        assert_eq!((new, differing.count), (1, u64::from(!part.is_empty())), "{}: {part}", subject.name());
        let named = differing.named.concat();
        assert!(named.contains(part) && (part.is_empty() || named.contains(&id)), "{}: {named}", subject.name());
        assert_eq!(
            admin.find(&known.digest.to_hex()).await.unwrap(),
            std::slice::from_ref(&known),
            "{}: {part}",
            subject.name()
        );
    }
    // Twice in one input: the first is imported, the second is compared with it.
    let twice = ["first", "second"].map(|user| Ok(TokenRecord { user: user.into(), ..record("twice") }));
    let imported = admin.import(&mut twice.into_iter()).await.unwrap();
    assert_eq!((imported.new, imported.differing.count), (1, 1), "{}", subject.name());
    // Differences beyond the listed ones are counted.
    let known = (0..30).map(|n| record(&format!("many-known-{n}")));
    admin.import(&mut known.clone().map(Ok)).await.unwrap();
    let mut others = known.map(|record| Ok(TokenRecord { user: "thief".into(), ..record }));
    let Imported { new, differing } = admin.import(&mut others).await.unwrap();
    assert_eq!((new, differing.count, differing.named.len()), (0, 30, 20), "{}", subject.name());
}

/// The recorded last use of a token survives every change of its record, and never decreases.
async fn uses_outlive_a_change(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    if !admin.notes_uses() {
        return;
    }
    let (token, now) = (Digest::of(b"in-use"), tollgate::edge::now().unix_ms / 1000);
    admin.create(&TokenRecord { user: "user of in-use".into(), ..record("in-use") }).await.unwrap();
    let note =
        async |at: u64| store.note_uses(vec![(token, at * 1000), (Digest::of(b"nobody"), at * 1000)]).await.unwrap();
    note(now).await;
    // An older use that another gateway writes later.
    note(now - 600).await;
    let last_used = async |admin: &mut Box<dyn TokenAdmin>| admin.find(&token.to_hex()).await.unwrap()[0].last_used;
    assert_eq!(last_used(&mut admin).await, Some(now), "{}", subject.name());
    admin
        .import(&mut std::iter::once(Ok(TokenRecord { user: "user of in-use".into(), ..record("in-use") })))
        .await
        .unwrap();
    assert_eq!(last_used(&mut admin).await, Some(now), "{}: import", subject.name());
    admin.block("user of in-use", true).await.unwrap();
    admin.block("user of in-use", false).await.unwrap();
    assert_eq!(last_used(&mut admin).await, Some(now), "{}: block", subject.name());
    admin.rotate(&token, &record("in-use-next"), now, now + 60).await.unwrap();
    assert_eq!(last_used(&mut admin).await, Some(now), "{}: rotate", subject.name());
    admin.revoke(&token, now).await.unwrap();
    assert_eq!(last_used(&mut admin).await, Some(now), "{}: revoke", subject.name());
    assert_eq!(lookup(&*store, b"in-use").await.unwrap().last_used, Some(now), "{}", subject.name());
}

fn terms(plan: &str, rate: &str, networks: &[&str], methods: &[&str]) -> Option<Arc<TokenTerms>> {
    let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let (networks, methods) = (list(networks), list(methods));
    TokenTerms::of(SaidTerms { plan: plan.into(), rate: rate.into(), networks, methods }).unwrap()
}

/// The list of any store, imported into any other, yields the same list.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_store_lists_every_other_imports() {
    use tollgate::store::portable::{Reading, ShownRecord};
    let now = tollgate::edge::now().unix_ms / 1000;
    let full = TokenRecord {
        not_before: Some(1_700_000_100),
        expires: Some(1_900_000_000),
        revoked: Some(1_750_000_000),
        blocked: true,
        superseded: Some(1_740_000_000),
        replaces: Some(Digest::of(b"long gone")),
        last_used: Some(1_749_999_999),
        terms: terms("gold", "600/min burst 5", &["10.0.0.0/8", "2001:db8::/32"], &["GET", "HEAD"]),
        ..record("full")
    };
    let only = |token: &str| TokenRecord { scopes: vec![], description: String::new(), ..record(token) };
    let mut records = vec![
        full,
        only("bare"),
        TokenRecord { created: 0, ..only("made-in-1970") },
        TokenRecord { not_before: Some(now + 60), ..only("not-yet") },
        TokenRecord { expires: Some(now - 60), ..only("expired") },
        TokenRecord { revoked: Some(now - 60), ..only("revoked") },
        TokenRecord { blocked: true, ..only("blocked") },
        TokenRecord { superseded: Some(now), expires: Some(now + 60), ..only("rotated") },
        TokenRecord { replaces: Some(Digest::of(b"rotated")), ..only("rotation") },
        TokenRecord { last_used: Some(now), ..only("used") },
        TokenRecord { terms: terms("", "", &["192.0.2.1"], &[]), ..only("at-home") },
        TokenRecord {
            scopes: vec!["é:ü/x".into(), "api".into()],
            user: "名前, \"x\" \\ 'y' ${z} #%".into(),
            ..only("odd")
        },
        TokenRecord { description: "two\nlines\r\n\ttab \u{1b}[2J \u{7f} ]}] , \"".into(), ..only("described") },
    ];
    records.sort_by_key(|record| *record.digest.as_bytes());
    let kinds = || embedded::kinds().into_iter().chain([postgres::kind(), redis::kind()]);
    let mut lists = Vec::new();
    for (kind, subject) in kinds() {
        let mut admin = subject.admin().await;
        let imported = admin.import(&mut records.iter().cloned().map(Ok)).await.unwrap();
        assert_eq!(imported.new, records.len() as u64, "{kind}");
        let shown: Vec<_> = admin.list().await.unwrap().iter().map(ShownRecord::from).collect();
        lists.push((kind, serde_json::to_string(&shown).unwrap()));
    }
    assert_eq!(lists.len(), 5);
    let mut pairs = 0;
    for (from, list) in &lists {
        for (to, subject) in kinds() {
            let mut admin = subject.admin().await;
            let imported = admin.import(&mut Reading::new(list.as_bytes(), now)).await.unwrap();
            assert_eq!((imported.new, imported.differing.count), (records.len() as u64, 0), "{from} to {to}");
            let mut listed = admin.list().await.unwrap();
            listed.sort_by_key(|record| *record.digest.as_bytes());
            assert_eq!(listed, records, "{from} to {to}");
            // The second time, every token is known and nothing differs.
            let again = admin.import(&mut Reading::new(list.as_bytes(), now)).await.unwrap();
            assert_eq!(again, Imported::default(), "{from} to {to}");
            pairs += 1;
        }
    }
    assert_eq!(pairs, 25);
}

async fn changes_are_heard(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    let begin = Instant::now();
    let ear = Ear::on(&store);
    ear.hearing(begin).await;
    let mut lags = Vec::new();
    for round in 0..5 {
        let token = format!("heard-{round}");
        let before = Instant::now();
        admin.create(&record(&token)).await.unwrap();
        ear.change_of(before, &*store, &token).await;
        let before = Instant::now();
        admin.revoke(&Digest::of(token.as_bytes()), 1_760_000_000).await.unwrap();
        let lag = ear.change_of(before, &*store, &token).await - before;
        assert!(lag < LAG, "{}: notified after {lag:?}", subject.name());
        let found = lookup(&*store, token.as_bytes()).await;
        assert!(
            verdict(found.as_ref(), &token).is_err(),
            "{}: a lookup after the notification returns the old record",
            subject.name()
        );
        lags.push(lag);
    }
    lags.sort();
    assert!(lags[2] < PROMISED_LAG, "{}: {lags:?}", subject.name());
}

async fn gateways_confirm(subject: &dyn Subject) {
    let mut admin = subject.admin().await;
    let stores = [subject.open(), subject.open()];
    let begin = Instant::now();
    let ears = stores.each_ref().map(Ear::on);
    for ear in &ears {
        ear.hearing(begin).await;
    }
    let deadline = Instant::now() + PATIENCE;
    while admin.wait(PATIENCE).await.unwrap().len() < 2 {
        assert!(Instant::now() < deadline, "{}: two gateways did not register", subject.name());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    admin.create(&record("waited-for")).await.unwrap();
    // Gateways of earlier parts that ended without signing off are waited for until they count as gone.
    admin.wait(PATIENCE).await.unwrap();
    let before = Instant::now();
    admin.revoke(&Digest::of(b"waited-for"), 1_760_000_000).await.unwrap();
    let confirmed = admin.wait(PATIENCE).await.unwrap();
    let took = before.elapsed();
    assert!(confirmed.len() >= 2, "{}: {confirmed:?}", subject.name());
    // A gateway that has confirmed has applied the change.
    let digest = Digest::of(b"waited-for");
    for ear in &ears {
        let names = |event: &Event| match event {
            Event::Changed(changes) => changes.iter().any(|change| change.token == Named::Token(digest)),
            Event::Hearing => true,
            Event::Deaf | Event::Silent | Event::Unheard(..) | Event::Untold | Event::Alive { .. } => false,
        };
        let told = ear.events.lock().iter().any(|(at, event)| *at >= before && names(event));
        assert!(told, "{}: confirmed before the change was applied", subject.name());
    }
    assert!(took < Duration::from_secs(5), "{}: {took:?}", subject.name());
}

/// A gateway's clock may be ahead of the store's, or behind it: its cache snapshot must not restore tokens that were revoked
/// while it was stopped. For stores that keep a list of changes; `age` makes the changes so far older than the period that
/// is always re-read.
pub async fn restored_by_any_clock(subject: &dyn Subject, age: impl Fn()) {
    fn skewed(minutes: i64) -> tollgate::clock::Now {
        let now = tollgate::edge::now();
        tollgate::clock::Now { unix_ms: now.unix_ms.saturating_add_signed(minutes * 60_000), ..now }
    }
    let clocks: [fn() -> tollgate::clock::Now; 3] = [|| skewed(0), || skewed(30), || skewed(-30)];
    let mut admin = subject.admin().await;
    let folder = Folder::new("restored");
    for (name, clock) in ["right", "ahead", "behind"].into_iter().zip(clocks) {
        let [steady, doomed] = ["steady", "doomed"].map(|token| format!("{token}-{name}"));
        admin.create(&record(&steady)).await.unwrap();
        admin.create(&record(&doomed)).await.unwrap();
        age();
        let gateway = || gateway(subject, clock, &folder.file(name));
        let status = async |authenticator: &Authenticator, token: &str| match authenticator.check(
            token.as_bytes(),
            &Digest::of(token.as_bytes()),
            clock(),
            Mode::Serve,
        ) {
            Checked::NotAsked => unreachable!(),
            Checked::Known(answer, _) => (true, Ok(answer)),
            Checked::Waiting(waiting) => (false, waiting.answer().await.0),
        };
        let first = gateway();
        let following = follow(&first);
        let deadline = Instant::now() + PATIENCE;
        // Until both are cached with their full TTL, and the store's position is known.
        while !(first.marks().iter().all(Option::is_some) && status(&first, &steady).await.0) {
            assert!(Instant::now() < deadline, "{}, {name}: the store was not followed", subject.name());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(matches!(status(&first, &doomed).await.1, Ok(TokenStatus::Valid(_))));
        first.save();
        following.abort();
        drop(following.await);
        admin.revoke(&Digest::of(doomed.as_bytes()), 1_760_000_000).await.unwrap();
        let second = gateway();
        let following = follow(&second);
        let deadline = Instant::now() + PATIENCE;
        // Without a lookup.
        let digest = Digest::of(steady.as_bytes());
        while !matches!(
            second.check(steady.as_bytes(), &digest, clock(), Mode::Observe),
            Checked::Known(_, CacheResult::PositiveHit)
        ) {
            assert!(Instant::now() < deadline, "{}, {name}: the snapshot was not restored", subject.name());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for _ in 0..3 {
            let (_, answer) = status(&second, &doomed).await;
            assert!(
                matches!(answer, Ok(TokenStatus::Invalid(Invalid::Revoked))),
                "{}, {name}: {answer:?}",
                subject.name()
            );
        }
        following.abort();
    }
}

fn gateway(
    subject: &dyn Subject,
    clock: fn() -> tollgate::clock::Now,
    snapshot: &std::path::Path,
) -> Arc<Authenticator> {
    let settings = CacheSettings {
        positive_ttl: Duration::from_secs(600),
        negative_ttl: Duration::from_secs(10),
        stale_if_error: Duration::ZERO,
        positive_capacity: 100,
        negative_capacity: 100,
    };
    let metrics = Arc::new(tollgate::telemetry::metrics::Metrics::new("test").unwrap());
    let link = Link::new("kept".into(), subject.open(), TIMEOUT, Arc::new(metrics.store("kept")));
    Arc::new(Authenticator::new(Chain::new(vec![link]), settings, metrics, clock).with_snapshot(snapshot, "here"))
}

fn follow(authenticator: &Arc<Authenticator>) -> tokio::task::JoinHandle<()> {
    let authenticator = Arc::clone(authenticator);
    tokio::spawn(async move { authenticator.follow_changes().await })
}

/// What a database selects is what the query says of each record.
async fn what_is_asked_for_is_listed(subject: &dyn Subject) {
    if !subject.features().is_ours {
        return;
    }
    let mut admin = subject.admin().await;
    let (now, day) = (1_800_000_000, 86_400);
    let mut records = Vec::new();
    for (index, user) in ["Zed", "alice", "Änne", "bob", "a'b\"c", "alice"].into_iter().enumerate() {
        let at = index as u64;
        let base = TokenRecord { user: user.into(), ..record(&format!("listed-{index}")) };
        records.extend([
            TokenRecord { created: now - at * day, last_used: Some(now - at * 10), ..base.clone() },
            TokenRecord {
                digest: Digest::of(format!("listed-expired-{index}").as_bytes()),
                expires: Some(now - at * day),
                scopes: vec!["api_more".into(), "é".into()],
                ..base.clone()
            },
            TokenRecord {
                digest: Digest::of(format!("listed-soon-{index}").as_bytes()),
                expires: Some(now + (at + 1) * day),
                superseded: (index % 2 == 0).then_some(now - 5),
                ..base.clone()
            },
            TokenRecord {
                digest: Digest::of(format!("listed-revoked-{index}").as_bytes()),
                revoked: Some(now - at * day),
                blocked: index == 3,
                scopes: Vec::new(),
                ..base.clone()
            },
            TokenRecord {
                digest: Digest::of(format!("listed-later-{index}").as_bytes()),
                not_before: Some(now + 5),
                blocked: index == 2,
                ..base
            },
        ]);
    }
    let known = admin.list().await.unwrap().len();
    admin.import(&mut records.iter().cloned().map(Ok)).await.unwrap();
    let all = admin.list().await.unwrap();
    assert_eq!(all.len(), known + 30, "{}", subject.name());
    let query = TokenQuery { now, ..TokenQuery::default() };
    let user = |name: &str| TokenQuery { user: Some(name.into()), ..query.clone() };
    let scope = |name: &str| TokenQuery { scope: Some(name.into()), ..query.clone() };
    let mut wanted = vec![
        user("alice"),
        user("Änne"),
        user("a'b\"c"),
        user("nobody"),
        scope("api"),
        scope("é"),
        scope("ap"),
        TokenQuery { unused_since: Some(now - 25), ..query.clone() },
        TokenQuery { unused_since: Some(now - 2 * day), ..query.clone() },
        TokenQuery { expires_by: Some(now + 3 * day), ..query.clone() },
        TokenQuery { ended_by: Some(now - 2 * day), ..query.clone() },
        TokenQuery {
            states: vec![TokenState::Active, TokenState::Rotated],
            scope: Some("api".into()),
            ..user("alice")
        },
    ];
    wanted.extend(TokenState::ALL.map(|state| TokenQuery { states: vec![state], ..query.clone() }));
    let orders = [TokenOrder::Created, TokenOrder::Expires, TokenOrder::LastUsed, TokenOrder::User];
    let mut pages = 0;
    for wanted in wanted {
        for order in orders {
            let mut expected: Vec<_> = all.iter().filter(|record| wanted.takes(record)).collect();
            expected.sort_by_key(|record| order.rank(record));
            // In pages that divide nothing evenly.
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let page = TokenQuery { order, after, limit: Some(7), ..wanted.clone() };
                let before = found.len();
                let mut each = |record: TokenRecord| {
                    found.push(record);
                    Ok(())
                };
                admin.select(&page, &mut each).await.unwrap();
                pages += 1;
                let Some(last) = found.get(before..).and_then(<[_]>::last) else { break };
                after = Some(order.rank(last));
            }
            let [found, expected]: [Vec<String>; 2] = [
                found.iter().map(|record| record.digest.to_hex()).collect(),
                expected.iter().map(|record| record.digest.to_hex()).collect(),
            ];
            assert_eq!(found, expected, "{}: {wanted:?} by {order:?}", subject.name());
        }
    }
    assert!(pages > 100, "{pages}");
    let digests: Vec<_> = records.iter().map(|record| record.digest).collect();
    assert_eq!(admin.remove(&digests, &TokenQuery::default()).await.unwrap(), 30, "{}", subject.name());
    assert_eq!(admin.list().await.unwrap().len(), known, "{}", subject.name());
}

/// A token whose record is gone is unknown, to a gateway that knew it as well; so is each of a user's that is revoked.
async fn records_are_removed(subject: &dyn Subject) {
    if !subject.features().is_ours {
        return;
    }
    let mut admin = subject.admin().await;
    let of = |token: &str| TokenRecord { user: "who-leaves".into(), ..record(token) };
    for token in ["leaver-1", "leaver-2", "leaver-3"] {
        admin.create(&of(token)).await.unwrap();
    }
    // A store that never saw a token has nothing to tell of its end.
    let store = subject.open();
    let begin = Instant::now();
    let ear = subject.features().hears.then(|| Ear::on(&store));
    if let Some(ear) = &ear {
        ear.hearing(begin).await;
    }
    let digest = |token: &str| Digest::of(token.as_bytes());
    assert!(admin.revoke(&digest("leaver-1"), 5).await.unwrap());
    assert_eq!(admin.revoke_user("who-leaves", 7).await.unwrap(), 2, "{}", subject.name());
    assert_eq!(admin.revoke_user("who-leaves", 8).await.unwrap(), 0, "{}", subject.name());
    assert_eq!(admin.revoke_user("nobody at all", 8).await.unwrap(), 0, "{}", subject.name());
    for (token, at) in [("leaver-1", 5), ("leaver-2", 7), ("leaver-3", 7)] {
        let found = lookup(&*store, token.as_bytes()).await.unwrap();
        assert_eq!(found.revoked, Some(at), "{}: {token}", subject.name());
    }
    assert_eq!(lookup(&*store, b"known").await.unwrap().revoked, None, "{}: only this user's", subject.name());
    let before = Instant::now();
    let gone = [digest("leaver-1"), digest("leaver-3"), digest("never there")];
    assert_eq!(admin.remove(&gone, &TokenQuery::default()).await.unwrap(), 2, "{}", subject.name());
    if let Some(ear) = &ear {
        for digest in &gone[..2] {
            let told = |event: &Event| match event {
                Event::Changed(changes) => changes.iter().any(|change| change.token == Named::Token(*digest)),
                event => *event == Event::Hearing,
            };
            ear.heard(before, "a removal", told).await;
        }
    }
    assert_eq!(lookup(&*store, b"leaver-1").await, None, "{}", subject.name());
    assert_eq!(lookup(&*store, b"leaver-2").await.map(|record| record.revoked), Some(Some(7)), "{}", subject.name());
    assert_eq!(admin.remove(&gone, &TokenQuery::default()).await.unwrap(), 0, "{}", subject.name());
    assert_eq!(admin.remove(&[digest("leaver-2")], &TokenQuery::default()).await.unwrap(), 1, "{}", subject.name());
}

/// What is meant to be removed is judged when it is removed: a token that was renewed, used, blocked or revoked since the list was
/// made stays.
async fn what_changed_meanwhile_is_not_removed(subject: &dyn Subject) {
    if !subject.features().is_ours {
        return;
    }
    let mut admin = subject.admin().await;
    let (now, day) = (1_800_000_000, 86_400);
    let made =
        |token: &str| TokenRecord { user: "pruned o'er \"all\"".into(), created: now - 90 * day, ..record(token) };
    let records = [
        TokenRecord { expires: Some(now - 9 * day), ..made("pruned-over") },
        TokenRecord { revoked: Some(now - 9 * day), scopes: vec!["é".into(), "b".into()], ..made("pruned-revoked") },
        // As somebody renewed it.
        TokenRecord { expires: Some(now + day), ..made("pruned-renewed") },
        TokenRecord { expires: Some(now - day), last_used: Some(now - 2 * day), ..made("pruned-late") },
        TokenRecord { revoked: Some(1), ..made("pruned-untimed") },
        TokenRecord { blocked: true, expires: Some(now + day), ..made("pruned-blocked") },
    ];
    admin.import(&mut records.iter().cloned().map(Ok)).await.unwrap();
    let digests: Vec<_> = records.iter().map(|record| record.digest).collect();
    let query = TokenQuery { now, ..TokenQuery::default() };
    let mut seen = 0;
    // Each removes one of those that are left, the first one first.
    for (still, gone) in [
        (TokenQuery { ended_by: Some(now - 10 * day), ..query.clone() }, None),
        (TokenQuery { ended_by: Some(now - 5 * day), user: Some("nobody".into()), ..query.clone() }, None),
        (TokenQuery { ended_by: Some(now - 5 * day), scope: Some("é".into()), ..query.clone() }, Some(1)),
        (TokenQuery { ended_by: Some(now - 5 * day), user: Some(records[0].user.clone()), ..query.clone() }, Some(0)),
        (TokenQuery { states: vec![TokenState::Blocked], ..query.clone() }, Some(5)),
        (TokenQuery { states: vec![TokenState::Active], unused_since: Some(now - 91 * day), ..query.clone() }, None),
        (TokenQuery { states: vec![TokenState::Expired], unused_since: Some(now - 3 * day), ..query.clone() }, None),
        (TokenQuery { states: vec![TokenState::Expired], unused_since: Some(now - day), ..query.clone() }, Some(3)),
        (TokenQuery { ended_by: Some(now), ..query.clone() }, None),
    ] {
        let before = stay(&mut *admin, &digests).await;
        let removed = admin.remove(&digests, &still).await.unwrap();
        let expected: Vec<_> = before.iter().copied().filter(|index| Some(*index) != gone).collect();
        assert_eq!(removed, u64::from(gone.is_some()), "{}: {still:?}", subject.name());
        assert_eq!(stay(&mut *admin, &digests).await, expected, "{}: {still:?}", subject.name());
        seen += 1;
    }
    assert_eq!(seen, 9);
    assert_eq!(admin.remove(&digests, &TokenQuery::default()).await.unwrap(), 2, "{}", subject.name());

    // Two at the same time: a token that was revoked, as its revoker was told, is there.
    let records: Vec<_> = (0..600).map(|index| record(&format!("raced-{index}"))).collect();
    let digests: Vec<_> = records.iter().map(|record| record.digest).collect();
    admin.import(&mut records.into_iter().map(Ok)).await.unwrap();
    let mut other = subject.admin().await;
    let still = TokenQuery { now, states: vec![TokenState::Active], ..TokenQuery::default() };
    let revoke = async {
        let mut revoked = Vec::new();
        // From the end, to meet in the middle.
        for digest in digests.iter().rev().take(if subject.features().has_server { 600 } else { 5 }) {
            match other.revoke(digest, now).await {
                Ok(done) => revoked.extend(done.then_some(*digest)),
                Err(AdminError::Missing) => {}
                Err(error) => panic!("{}: {error}", subject.name()),
            }
        }
        revoked
    };
    let (removed, revoked) = tokio::join!(admin.remove(&digests, &still), revoke);
    let left = stay(&mut *admin, &digests).await;
    assert_eq!(removed.unwrap() + left.len() as u64, 600, "{}", subject.name());
    for digest in &revoked {
        let found = admin.find(&digest.to_hex()).await.unwrap();
        assert_eq!(found.len(), 1, "{}: a token that was revoked is gone", subject.name());
    }
    assert_eq!(left.len(), revoked.len(), "{}", subject.name());
    admin.remove(&digests, &TokenQuery::default()).await.unwrap();
}

/// Which of these are there.
async fn stay(admin: &mut dyn TokenAdmin, digests: &[Digest]) -> Vec<usize> {
    let all: std::collections::HashSet<_> = admin.list().await.unwrap().iter().map(|record| record.digest).collect();
    (0..digests.len()).filter(|index| all.contains(&digests[*index])).collect()
}

async fn many_rows(subject: &dyn Subject) {
    if !subject.features().is_ours {
        return;
    }
    let rows: usize = std::env::var("TOLLGATE_CONTRACT_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(5_000);
    let (mut admin, store) = (subject.admin().await, subject.open());
    let mut records = (0..rows).map(|row| Ok(TokenRecord { user: "many".into(), ..record(&format!("row-{row}")) }));
    let before = Instant::now();
    assert_eq!(admin.import(&mut records).await.unwrap().new, rows as u64);
    println!("{}: {rows} rows imported in {:?}", subject.name(), before.elapsed());
    for row in [0, rows / 2, rows - 1] {
        assert!(lookup(&*store, format!("row-{row}").as_bytes()).await.is_some());
    }
    assert_eq!(lookup(&*store, format!("row-{rows}").as_bytes()).await, None);
    // Each once and newest first, as in the list.
    let mut visited = Vec::new();
    let mut each = |record: TokenRecord| {
        visited.push((record.created, record.digest));
        Ok(())
    };
    admin.visit(&mut each).await.unwrap();
    assert!(visited.windows(2).all(|pair| pair[0].0 >= pair[1].0), "{}", subject.name());
    let distinct: std::collections::HashSet<_> = visited.iter().map(|(_, digest)| *digest).collect();
    assert_eq!(
        (visited.len(), distinct.len()),
        (admin.list().await.unwrap().len(), visited.len()),
        "{}",
        subject.name()
    );
    let mut count = 0;
    let mut some = |_| {
        count += 1;
        if count < 10 { Ok(()) } else { Err(AdminError::Input("enough".into())) }
    };
    assert!(matches!(admin.visit(&mut some).await, Err(AdminError::Input(_))));
    assert_eq!(count, 10);
    assert!(admin.list().await.unwrap().len() >= rows, "and goes on as before");
}

async fn nonsense_is_no_answer(subject: &dyn Subject) {
    let (mut admin, store) = (subject.admin().await, subject.open());
    admin.create(&record("spoiled")).await.unwrap();
    subject.spoil("spoiled").await;
    let answer = ask(&*store, b"spoiled").await;
    assert!(matches!(answer, Err(StoreError::Garbage(_))), "{}: {answer:?}", subject.name());
    assert!(lookup(&*store, b"known").await.is_some(), "one invalid record does not affect others");
    let credentials = ["known", "spoiled", "nobody", "known"].map(|token| credential(token.as_bytes()));
    let found = store.lookup_many(&credentials.each_ref()).await;
    assert!(
        matches!(&found[..], [Ok(Some(_)), Err(StoreError::Garbage(_)), Ok(None), Ok(Some(_))]),
        "{}: in bulk: {found:?}",
        subject.name()
    );
}

async fn a_read_only_server_answers(subject: &dyn Subject) {
    let store = subject.open();
    subject.fault(Fault::ReadOnly).await;
    recovers(&*store, subject.name()).await;
    assert_eq!(lookup(&*store, b"nobody").await, None);
    drop(store.note_uses(vec![(Digest::of(b"known"), 1_700_000_000_000)]).await);
    assert!(lookup(&*store, b"known").await.is_some());
    subject.fault(Fault::Writable).await;
}

async fn cut_connections_are_made_anew(subject: &dyn Subject) {
    let store = subject.open();
    let begin = Instant::now();
    let ear = subject.features().hears.then(|| Ear::on(&store));
    if let Some(ear) = &ear {
        ear.hearing(begin).await;
    }
    recovers(&*store, subject.name()).await;
    let before = Instant::now();
    subject.fault(Fault::Cut).await;
    let cut = Instant::now();
    if let Some(ear) = &ear {
        ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
        let lag = ear.hearing(before).await.saturating_duration_since(cut);
        assert!(lag < LAG, "{}: notified again after {lag:?}", subject.name());
    }
    recovers(&*store, subject.name()).await;
}

async fn a_frozen_server_is_cut_off(subject: &dyn Subject) {
    let store = subject.open();
    recovers(&*store, subject.name()).await;
    let begin = Instant::now();
    let ear = subject.features().hears.then(|| Ear::on(&store));
    if let Some(ear) = &ear {
        ear.hearing(begin).await;
    }
    let before = Instant::now();
    subject.fault(Fault::Freeze).await;
    let answers = futures_util::future::join_all((0..50).map(|_| ask(&*store, b"known"))).await;
    assert!(answers.iter().all(Result::is_err), "{}: a frozen server answered", subject.name());
    assert!(before.elapsed() < TIMEOUT * 3, "{}: {:?}", subject.name(), before.elapsed());
    if let Some(ear) = &ear {
        let noticed = ear.heard(before, "deafness", |event| *event == Event::Deaf).await - before;
        assert!(noticed < LAG, "{}: detected after {noticed:?}", subject.name());
    }
    subject.fault(Fault::Thaw).await;
    recovers(&*store, subject.name()).await;
    if let Some(ear) = &ear {
        ear.hearing(before).await;
    }
}

async fn a_server_that_is_gone_cannot_tell(subject: &dyn Subject) {
    let store = subject.open();
    recovers(&*store, subject.name()).await;
    let begin = Instant::now();
    let ear = subject.features().hears.then(|| Ear::on(&store));
    if let Some(ear) = &ear {
        ear.hearing(begin).await;
    }
    // Killed during lookups: every answer must be correct.
    let asking = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let mut answers = Vec::new();
            let until = Instant::now() + Duration::from_secs(2);
            while Instant::now() < until {
                answers.extend(futures_util::future::join_all((0..20).map(|_| ask(&*store, b"known"))).await);
            }
            answers
        })
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = Instant::now();
    subject.fault(Fault::Stop).await;
    let answers = asking.await.unwrap();
    assert!(
        !answers.iter().any(|answer| matches!(answer, Ok(None))),
        "{}: a dying server said unknown",
        subject.name()
    );
    assert!(answers.iter().any(Result::is_ok) && answers.iter().any(Result::is_err), "{}", subject.name());
    for token in [&b"known"[..], b"nobody"] {
        let before = Instant::now();
        let answer = ask(&*store, token).await;
        let kinds = [StoreError::Timeout.kind(), StoreError::CircuitOpen.kind(), "unavailable"];
        assert!(answer.as_ref().is_err_and(|error| kinds.contains(&error.kind())), "{}: {answer:?}", subject.name());
        assert!(before.elapsed() < TIMEOUT * 2, "{}: {:?}", subject.name(), before.elapsed());
        assert!(!format!("{answer:?}").contains(std::str::from_utf8(token).unwrap()), "{answer:?}");
    }
    if let Some(ear) = &ear {
        ear.heard(before, "deafness", |event| *event == Event::Deaf).await;
    }
    // A store opened meanwhile fails as well, and recovers.
    let late = subject.open();
    assert!(ask(&*late, b"known").await.is_err());
    subject.fault(Fault::Start).await;
    let started = Instant::now();
    recovers(&*store, subject.name()).await;
    recovers(&*late, subject.name()).await;
    println!("{}: answers {:?} after the restart", subject.name(), started.elapsed());
    if let Some(ear) = &ear {
        let lag = ear.hearing(before).await.saturating_duration_since(started);
        println!("{}: notified {lag:?} after the restart", subject.name());
    }
}

/// Waits until the store answers again. It must not answer "unknown" meanwhile.
pub async fn recovers(store: &dyn TokenStore, name: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(store, b"known").await {
            Ok(Some(_)) => return,
            Ok(None) => panic!("{name}: answered \"unknown\" during the outage"),
            Err(error) => assert!(Instant::now() < deadline, "{name}: does not recover: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
