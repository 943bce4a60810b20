//! The pipeline without a socket: `admit` in mode Observe changes nothing, and a permitted request is written the same in
//! both versions of HTTP.

use crate::servers::Folder;
use crate::support::Store;
use tollgate::forward::{Http1Head, Http2Head};
use tollgate::identity::Mode;
use tollgate::pipeline::{Admission, Facts, Pipeline, Verdict};
use tollgate::request::head;
use tollgate::request::origin::{Arrival, Origin, TrustedProxies};
use tollgate::request::trace::TraceContext;
use tollgate::{assembly, clock, config};

/// A pipeline before a store that has one token.
fn pipeline(store: &Store, folder: &Folder) -> tollgate::edge::Snapshot {
    let text = store.section() + "[log]\naccess = \"off\"\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:9\"]\n";
    let settings = config::parse(&text, &folder.0.join("tollgate.toml"), config::Probe::Settings)
        .unwrap_or_else(|problems| panic!("{problems:?}"));
    assembly::assemble(settings, None).unwrap().snapshot
}

/// The refusal's reason or `forwarded`, and the facts.
async fn admit(pipeline: &Pipeline, token: &str, mode: Mode) -> (String, Facts) {
    let bytes = format!("GET /api/v3/user HTTP/1.1\r\nHost: t\r\nPRIVATE-TOKEN: {token}\r\n\r\n").into_bytes();
    let view = head::parse(&bytes).unwrap();
    let arrival = Arrival::default();
    let origin = Origin::of(&view, &arrival, &TrustedProxies::default());
    let (verdict, facts) = match pipeline.admit(&view, &origin, clock::now(), mode) {
        Admission::Decided(verdict, facts) => (verdict, facts),
        Admission::Waiting(pending) => {
            assert_eq!(mode, Mode::Serve, "mode Observe never waits");
            pending.verdict().await
        }
    };
    let said = match verdict {
        Verdict::Forward(plan) => {
            plan.write_head(&view, &pipeline.forward, &origin, "id", None, &mut Http1Head(&mut Vec::new()));
            "forwarded".to_owned()
        }
        Verdict::Refuse(refusal) => refusal.reason().to_owned(),
    };
    (said, facts)
}

#[test]
fn observing_changes_nothing() {
    let (folder, store) = (Folder::new("observe"), Store::with([("known", "ann")]));
    let snapshot = pipeline(&store, &folder);
    let pipeline = &snapshot.pipeline;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        // But for what the process itself uses.
        let metrics = || {
            let text = snapshot.metrics.render().unwrap();
            text.lines().filter(|line| !line.starts_with("process_")).map(str::to_owned).collect::<Vec<_>>()
        };
        let state = || (metrics(), pipeline.authenticator.cache_sizes());
        let before = state();
        for token in ["known", "unknown"] {
            let (said, facts) = admit(pipeline, token, Mode::Observe).await;
            assert_eq!((said.as_str(), facts.cache), ("store_not_asked", None), "{token}");
            assert_eq!(facts.token.unwrap().id().as_str(), &crate::harness::sha256_hex(token)[..12]);
        }
        // A task that was started would run now.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(state(), before, "mode Observe changed the state");

        assert_eq!(admit(pipeline, "known", Mode::Serve).await.0, "forwarded");
        assert_eq!(admit(pipeline, "unknown", Mode::Serve).await.0, "unknown");
        let before = state();
        assert_ne!(before.1, (0, 0));
        for (token, expected) in [("known", "forwarded"), ("unknown", "unknown")] {
            let (said, facts) = admit(pipeline, token, Mode::Observe).await;
            assert_eq!((said.as_str(), facts.principal.is_some()), (expected, token == "known"));
        }
        assert_eq!(state(), before, "mode Observe changed the state");
    });
}

#[test]
fn both_versions_get_the_same_fields() {
    let (folder, store) = (Folder::new("heads"), Store::with([("known", "ann")]));
    let snapshot = pipeline(&store, &folder);
    let pipeline = &snapshot.pipeline;
    let bytes =
        b"GET /api/v3/x?page=2&private_token=known HTTP/1.1\r\nHost: h.test\r\nAccept: */*\r\nX-A: 1\r\nx-a: 2\r\n\
                  X_B: 3\r\nConnection: X-C, upgrade\r\nUpgrade: h2c\r\nX-C: gone\r\nTE: trailers\r\n\
                  traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\ntracestate: a=1\r\n\r\n";
    let view = head::parse(bytes).unwrap();
    let trace = TraceContext::of(&view);
    assert!(trace.is_some());
    let arrival = Arrival::of("192.0.2.1".parse().ok());
    let origin = Origin::of(&view, &arrival, &TrustedProxies::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let verdict = match pipeline.admit(&view, &origin, clock::now(), Mode::Serve) {
            Admission::Decided(verdict, _) => verdict,
            Admission::Waiting(pending) => pending.verdict().await.0,
        };
        let Verdict::Forward(plan) = verdict else { panic!("refused") };
        let (mut http1, mut http2) = (Vec::new(), Http2Head::default());
        let dropped =
            plan.write_head(&view, &pipeline.forward, &origin, "id-1", trace.as_ref(), &mut Http1Head(&mut http1));
        assert_eq!(plan.write_head(&view, &pipeline.forward, &origin, "id-1", trace.as_ref(), &mut http2), dropped);
        assert_eq!(dropped, 1, "X_B");
        let text = String::from_utf8(http1).unwrap();
        let (line, fields) = text.split_once("\r\n").unwrap();
        assert_eq!(line, "GET /api/v3/x?page=2 HTTP/1.1");
        assert_eq!((http2.method.as_slice(), http2.path.as_slice()), (&b"GET"[..], &b"/api/v3/x?page=2"[..]));
        let mut of_http1: Vec<_> = fields.trim_end().split("\r\n").map(str::to_owned).collect();
        of_http1.iter_mut().for_each(|field| {
            let (name, value) = field.split_once(": ").unwrap();
            *field = format!("{}: {value}", name.to_ascii_lowercase());
        });
        let mut of_http2: Vec<_> =
            http2.fields.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        of_http1.sort();
        of_http2.sort();
        assert_eq!(of_http1, of_http2);
        assert!(!text.contains("gone") && text.contains("X-Forwarded-For: 192.0.2.1\r\n"), "{text}");
        assert!(text.contains("PRIVATE-TOKEN: known\r\n") && !http2.incomplete);
    });
}
