//! The feed, over a scripted store and a paused clock: what is said when, whatever the store does.

use super::*;
use crate::store::Named;
use crate::store::credential::Digest;

fn lost(why: &str) -> Loss {
    StoreError::Unavailable(why.into()).into()
}

const BEAT: Duration = Duration::from_millis(300);
const SILENCE: Duration = Duration::from_millis(500);
const UPKEEP: Duration = Duration::from_secs(1);

/// What a scripted source does, and what happened to it, in one order with what the driver said.
struct Stage {
    trace: Mutex<Vec<(Instant, String)>>,
    /// How beginnings turn out, one after the other; behind the last one, all are fine.
    beginnings: Mutex<VecDeque<Result<Coverage, Loss>>>,
    /// The inbox of the session.
    inbox: Mutex<Option<Inbox<u32>>>,
    answers: Mutex<Answers>,
    /// Arrives right before the next answer to a beat.
    before_answer: Mutex<Vec<Message<u32>>>,
    /// What the next upkeep finds.
    upkeep: Mutex<Option<Result<Coverage, Loss>>>,
    /// How many confirmations fail first.
    unconfirmed: Mutex<usize>,
    may_be_untold: bool,
    silence: Option<Duration>,
}

enum Answers {
    AtOnce,
    Never,
    Error,
    After(Duration),
}

impl Stage {
    fn new() -> Self {
        Self {
            trace: Mutex::default(),
            beginnings: Mutex::default(),
            inbox: Mutex::default(),
            answers: Mutex::new(Answers::AtOnce),
            before_answer: Mutex::default(),
            upkeep: Mutex::default(),
            unconfirmed: Mutex::default(),
            may_be_untold: false,
            silence: Some(SILENCE),
        }
    }

    fn begins(self, beginnings: impl IntoIterator<Item = Result<Coverage, Loss>>) -> Self {
        self.beginnings.lock().extend(beginnings);
        self
    }

    fn note(&self, what: impl Into<String>) {
        self.trace.lock().push((Instant::now(), what.into()));
    }

    fn put(&self, messages: impl IntoIterator<Item = Message<u32>>) {
        let inbox = self.inbox.lock();
        messages.into_iter().for_each(|message| inbox.as_ref().unwrap().put(message));
    }

    /// Everything but signs of life, upkeep, and why nothing is heard.
    fn said(&self) -> Vec<String> {
        let quiet = |what: &String| !["Alive", "upkeep", "Unheard"].contains(&what.as_str());
        self.trace.lock().iter().map(|(_, what)| what.clone()).filter(quiet).collect()
    }

    fn times_of(&self, wanted: &str) -> Vec<Instant> {
        self.trace.lock().iter().filter(|(_, what)| what == wanted).map(|(at, _)| *at).collect()
    }
}

struct Scripted(Arc<Stage>);

#[async_trait]
impl ChangeSource for Scripted {
    type Subscription = Played;

    fn label(&self) -> String {
        "scripted".into()
    }

    fn pace(&self) -> Pace {
        Pace { beat: BEAT, silence: self.0.silence, upkeep: Some(UPKEEP) }
    }

    async fn begin(&mut self, inbox: Inbox<u32>) -> Result<Begun<Played>, Loss> {
        self.0.note("begin");
        let coverage = self.0.beginnings.lock().pop_front().unwrap_or(Ok(Coverage::Told))?;
        *self.0.inbox.lock() = Some(inbox);
        *self.0.answers.lock() = Answers::AtOnce;
        Ok(Begun { coverage, ..Begun::new(Played(Arc::clone(&self.0))) })
    }

    fn may_be_untold(&self) -> bool {
        self.0.may_be_untold
    }

    fn on_hearing(&mut self) {
        self.0.note("on_hearing");
    }

    fn on_lost(&mut self) {
        self.0.note("on_lost");
    }

    fn sign_off(&mut self) {
        self.0.note("sign_off");
    }
}

struct Played(Arc<Stage>);

#[async_trait]
impl Subscription for Played {
    type Wait = u32;

    async fn beat(&self) -> Result<Option<Mark>, Loss> {
        let wait = match *self.0.answers.lock() {
            Answers::AtOnce => Duration::ZERO,
            Answers::Never => Duration::MAX,
            Answers::Error => return Err(lost("the beat failed")),
            Answers::After(wait) => wait,
        };
        sleep(wait).await;
        let messages = std::mem::take(&mut *self.0.before_answer.lock());
        self.0.put(messages);
        Ok(Some("mark".into()))
    }

    async fn upkeep(&self) -> Result<Option<Coverage>, Loss> {
        self.0.note("upkeep");
        self.0.upkeep.lock().take().transpose()
    }

    async fn confirm(&self, waits: &mut Vec<u32>) -> Result<(), Loss> {
        let mut unconfirmed = self.0.unconfirmed.lock();
        if *unconfirmed > 0 {
            *unconfirmed -= 1;
            return Ok(());
        }
        self.0.note(format!("confirm {waits:?}"));
        waits.clear();
        Ok(())
    }
}

/// A clock that stands: `asked_ms` is checked for being read before the beat in a test of its own.
fn stands() -> Now {
    Now { unix_ms: 5, mono_ms: 7 }
}

fn play(stage: Stage) -> (Arc<Stage>, tokio::task::JoinHandle<()>) {
    play_by(stage, stands)
}

fn play_by(stage: Stage, clock: fn() -> Now) -> (Arc<Stage>, tokio::task::JoinHandle<()>) {
    let stage = Arc::new(stage);
    let (source, listener) = (Scripted(Arc::clone(&stage)), Arc::clone(&stage));
    let following = tokio::spawn(async move {
        follow(source, clock, &move |event| {
            listener.note(match event {
                Event::Changed(changes) => format!("Changed {}", changes.len()),
                Event::Alive { asked_ms: 7, .. } => "Alive".into(),
                Event::Alive { asked_ms, .. } => format!("Alive {asked_ms}"),
                Event::Untold => "Untold".into(),
                Event::Deaf => "Deaf".into(),
                Event::Silent => "Silent".into(),
                Event::Unheard(..) => "Unheard".into(),
                Event::Hearing => "Hearing".into(),
            });
        })
        .await;
    });
    (stage, following)
}

fn changed(name: &[u8]) -> Message<u32> {
    Message::Changed(vec![Change { token: Named::Token(Digest::of(name)), at_ms: 1 }])
}

async fn pass(time: Duration) {
    sleep(time).await;
}

const A_WHILE: Duration = Duration::from_millis(5_050);

#[tokio::test(start_paused = true)]
async fn a_session_begins_with_hearing_and_its_first_sign_of_life_comes_at_once() {
    let (stage, _following) = play(Stage::new());
    let begin = Instant::now();
    pass(A_WHILE).await;
    assert_eq!(stage.said(), ["begin", "on_hearing", "Hearing"]);
    let alive = stage.times_of("Alive");
    assert!(alive[0] - begin <= Duration::from_millis(5), "{:?}", alive[0] - begin);
    assert!(alive.windows(2).all(|pair| pair[1] - pair[0] <= Duration::from_millis(500)), "at least twice a second");
    assert!(stage.times_of("upkeep")[0] - begin <= Duration::from_millis(5), "registered at once");
    assert_eq!(stage.times_of("upkeep").len(), 6);
}

#[tokio::test(start_paused = true)]
async fn silence_is_noticed_within_a_beat_and_its_silence_and_said_once() {
    let (stage, _following) =
        play(Stage::new().begins([Ok(Coverage::Told), Err(lost("refused")), Err(lost("refused"))]));
    pass(A_WHILE).await;
    *stage.answers.lock() = Answers::Never;
    let silent = Instant::now();
    pass(Duration::from_secs(3)).await;
    let deaf = stage.times_of("Deaf");
    assert!(deaf[0] - silent <= BEAT + SILENCE + Duration::from_millis(5), "{:?}", deaf[0] - silent);
    assert_eq!(
        stage.said(),
        [
            "begin",
            "on_hearing",
            "Hearing",
            "Silent",
            "Deaf",
            "on_lost",
            "begin",
            "begin",
            "begin",
            "on_hearing",
            "Hearing"
        ]
    );
    let last_alive = |before: Instant| stage.times_of("Alive").into_iter().rfind(|at| *at < before).unwrap();
    assert!(last_alive(deaf[0]) <= silent, "no sign of life without an answer");
}

/// The clock goes on, and nothing runs before it has.
async fn stand_still(time: Duration) {
    tokio::time::advance(time).await;
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// A machine without CPU time for this process: the timer fires late, and the answer may lie unread.
#[tokio::test(start_paused = true)]
async fn a_timer_that_fires_late_says_nothing_of_the_server() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    *stage.answers.lock() = Answers::After(SILENCE + LATE * 3);
    pass(BEAT / 2).await;
    stand_still(SILENCE + LATE).await;
    pass(SILENCE).await;
    assert_eq!(stage.said(), ["begin", "on_hearing", "Hearing"]);
}

/// On a machine that is always busy, a server that is down is noticed nevertheless.
#[tokio::test(start_paused = true)]
async fn lateness_excuses_a_server_only_so_often() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    *stage.answers.lock() = Answers::Never;
    pass(BEAT / 2).await;
    for _ in 0..EXCUSES {
        stand_still(SILENCE + LATE * 2).await;
        assert_eq!(stage.said(), ["begin", "on_hearing", "Hearing"]);
    }
    stand_still(SILENCE + LATE * 2).await;
    assert!(stage.said().contains(&"Silent".into()), "{:?}", stage.said());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_takes_its_time_is_none_of_silence_where_the_source_is_local() {
    let (stage, _following) = play(Stage { silence: None, ..Stage::new() });
    pass(A_WHILE).await;
    *stage.answers.lock() = Answers::After(Duration::from_secs(20));
    pass(Duration::from_secs(10)).await;
    let before = stage.times_of("Alive").len();
    assert_eq!(stage.said(), ["begin", "on_hearing", "Hearing"]);
    pass(Duration::from_secs(11)).await;
    assert!(stage.times_of("Alive").len() > before);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_changes_is_a_sign_of_life() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    *stage.answers.lock() = Answers::After(Duration::from_secs(4));
    for _ in 0..40 {
        stage.put([changed(b"a")]);
        pass(Duration::from_millis(100)).await;
    }
    assert!(!stage.said().contains(&"Deaf".into()), "{:?}", stage.said());
    *stage.answers.lock() = Answers::Never;
    pass(Duration::from_secs(2)).await;
    assert!(stage.said().contains(&"Deaf".into()), "nothing arrives any more");
}

#[tokio::test(start_paused = true)]
async fn a_sign_of_life_comes_behind_all_that_arrived_before_its_answer() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    stage.before_answer.lock().extend([changed(b"a"), changed(b"b"), Message::Wait(3)]);
    let from = stage.trace.lock().len();
    pass(BEAT).await;
    let trace: Vec<_> = stage.trace.lock()[from..].iter().map(|(_, what)| what.clone()).collect();
    assert_eq!(trace[..2], ["Changed 2", "Alive"], "{trace:?}");
}

#[test]
fn what_is_in_the_inbox_is_at_hand_at_once() {
    let (inbox, mut arriving) = Arriving::pair();
    inbox.put(changed(b"a"));
    inbox.put(changed(b"b"));
    let mut batch: Vec<Message<u32>> = Vec::new();
    arriving.ready(&mut batch).unwrap();
    assert_eq!(batch.len(), 2);
    arriving.ready(&mut batch).unwrap();
    assert_eq!(batch.len(), 2, "nothing twice");
}

#[tokio::test(start_paused = true)]
async fn a_sign_of_life_is_as_old_as_its_question() {
    use std::sync::atomic::AtomicU64;
    static CLOCK: AtomicU64 = AtomicU64::new(1_000);
    let clock = || Now { unix_ms: 0, mono_ms: CLOCK.load(Ordering::Relaxed) };
    let (stage, _following) = play_by(Stage::new(), clock);
    pass(A_WHILE).await;
    *stage.answers.lock() = Answers::After(Duration::from_millis(400));
    CLOCK.store(2_000, Ordering::Relaxed);
    pass(BEAT).await;
    CLOCK.store(3_000, Ordering::Relaxed);
    pass(Duration::from_millis(350)).await;
    assert_eq!(stage.said().last().map(String::as_str), Some("Alive 2000"));
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_told_only_behind_the_changes_before() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    stage.put([Message::Wait(1), changed(b"a"), Message::Everything, Message::Wait(2)]);
    pass(Duration::from_millis(1)).await;
    assert_eq!(stage.said()[3..], ["Changed 1", "Hearing", "confirm [1, 2]"]);
}

#[tokio::test(start_paused = true)]
async fn a_confirmation_that_fails_is_tried_again_with_the_next_upkeep() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    *stage.unconfirmed.lock() = 1;
    stage.put([Message::Wait(1)]);
    pass(Duration::from_millis(10)).await;
    assert_eq!(stage.said().len(), 3);
    pass(UPKEEP).await;
    assert_eq!(stage.said()[3..], ["confirm [1]"]);
}

#[tokio::test(start_paused = true)]
async fn what_waits_while_nobody_confirms_is_bounded_and_keeps_the_newest() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    *stage.unconfirmed.lock() = 2;
    let many = u32::try_from(CONFIRMATIONS).unwrap() + 100;
    stage.put((0..many).map(Message::Wait));
    pass(UPKEEP * 3).await;
    let said = stage.said();
    let confirmed = said.iter().find(|what| what.starts_with("confirm")).unwrap();
    assert!(confirmed.starts_with("confirm [100, 101,") && confirmed.ends_with(&format!("{}]", many - 1)));
}

#[tokio::test(start_paused = true)]
async fn a_message_of_everything_means_hearing_again() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    stage.put([Message::Everything]);
    pass(Duration::from_millis(1)).await;
    assert_eq!(stage.said()[3..], ["Hearing"]);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_is_tried_again_slower_and_slower_and_at_once_when_it_had_worked() {
    let refused = || Err(lost("refused"));
    let (stage, _following) =
        play(Stage::new().begins([refused(), refused(), refused(), refused(), refused(), refused()]));
    pass(Duration::from_secs(5)).await;
    let begun = stage.times_of("begin");
    assert_eq!(begun.len(), 7);
    for (index, pause) in [100, 200, 300, 400, 400, 400].into_iter().enumerate() {
        let (least, waited) = (Duration::from_millis(pause), begun[index + 1] - begun[index]);
        assert!(waited >= least && waited <= least * 5 / 4 + Duration::from_millis(2), "{index}: {waited:?}");
    }
    // Nothing was known before: it is said that nothing can be heard, once.
    assert_eq!(stage.times_of("Deaf").len(), 1);
    *stage.answers.lock() = Answers::Error;
    pass(Duration::from_secs(1)).await;
    let (deaf, begun) = (stage.times_of("Deaf"), stage.times_of("begin"));
    assert_eq!((deaf.len(), begun.len()), (2, 8));
    assert!(begun[7] - deaf[1] <= Duration::from_millis(2), "at once: it had worked for a while");
}

#[tokio::test(start_paused = true)]
async fn where_nobody_notifies_nothing_is_promised() {
    let untold = || Ok(Coverage::Untold("no triggers".into()));
    let stage = Stage { may_be_untold: true, ..Stage::new() };
    let (stage, _following) = play(stage.begins([Err(lost("down")), untold(), untold()]));
    pass(Duration::from_secs(1)).await;
    // What it says is passed on, and is no promise that there will be more.
    stage.put([changed(b"a"), Message::Everything]);
    pass(Duration::from_secs(1)).await;
    assert_eq!(stage.said(), ["begin", "begin", "Untold", "Changed 1"]);
    assert!(stage.times_of("Alive").is_empty());
    // A lost connection changes nothing, nor does one that is found again.
    *stage.answers.lock() = Answers::Error;
    pass(A_WHILE).await;
    assert_eq!(stage.said()[4..], ["begin"]);
    // Triggers are there, and gone, and there again.
    for (coverage, said) in [
        (Coverage::Told, &["on_hearing", "Hearing"]),
        (Coverage::Untold("gone".into()), &["Deaf", "on_lost"]),
        (Coverage::Told, &["on_hearing", "Hearing"]),
    ] {
        let from = stage.said().len();
        *stage.upkeep.lock() = Some(Ok(coverage));
        pass(UPKEEP).await;
        assert_eq!(stage.said()[from..], *said);
    }
    pass(BEAT).await;
    assert!(!stage.times_of("Alive").is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_ends_a_session_is_taken_in_before_it_ends() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    stage.put([changed(b"a"), Message::Ended(Loss::Closed)]);
    pass(Duration::from_millis(2)).await;
    assert_eq!(stage.said()[3..], ["Changed 1", "Deaf", "on_lost", "begin", "on_hearing", "Hearing"]);
    // Nobody is left who could put something in.
    *stage.inbox.lock() = None;
    pass(Duration::from_millis(1)).await;
    assert!(stage.said()[9..].starts_with(&["Deaf".into(), "on_lost".into()]), "{:?}", stage.said());
    pass(A_WHILE).await;
    let from = stage.said().len();
    *stage.upkeep.lock() = Some(Err(lost("the register is gone")));
    pass(UPKEEP).await;
    assert!(stage.said()[from..].starts_with(&["Deaf".into(), "on_lost".into()]));
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_falls_behind_begins_again() {
    let (stage, _following) = play(Stage::new());
    pass(A_WHILE).await;
    stage.put((0..=INBOX).map(|_| changed(b"a")));
    pass(Duration::from_millis(5)).await;
    assert_eq!(stage.said()[3..], ["Deaf", "on_lost", "begin", "on_hearing", "Hearing"]);
}

#[tokio::test(start_paused = true)]
async fn it_signs_off_when_it_ends_at_whatever_moment() {
    let (stage, following) = play(Stage::new());
    pass(A_WHILE).await;
    following.abort();
    assert!(following.await.unwrap_err().is_cancelled());
    assert_eq!(stage.said().last().map(String::as_str), Some("sign_off"));
    let (stage, following) = play(Stage::new().begins([Err(lost("down"))]));
    pass(Duration::from_millis(50)).await;
    following.abort();
    assert!(following.await.unwrap_err().is_cancelled());
    assert_eq!(stage.said(), ["begin", "Deaf", "on_lost", "sign_off"]);
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_logged_once_a_minute_for_each_reason() {
    let source = Scripted(Arc::new(Stage::new()));
    let mut following = Following { source, clock: stands, heard: &|_| (), state: State::Unknown, logged: Vec::new() };
    let reasons = |following: &Following<'_, Scripted>| -> Vec<String> {
        following.logged.iter().map(|(_, why)| why.clone()).collect()
    };
    for why in ["down", "down", "refused", "down", "refused"] {
        following.log(why);
    }
    assert_eq!(reasons(&following), ["down", "refused"], "a new reason is a new line");
    let first = following.logged[0].0;
    sleep(LOG_PAUSE * 2).await;
    following.log("down");
    assert!(reasons(&following) == ["down"] && following.logged[0].0 > first, "again after a minute");
    for number in 0..100 {
        following.log(&format!("another {number}"));
    }
    assert_eq!(following.logged.len(), LOG_REASONS, "not endlessly many");
    following.cover(Coverage::Told);
    assert!(following.logged.is_empty(), "the next loss is another one");
}
