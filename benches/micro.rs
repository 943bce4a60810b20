//! Micro-benchmarks without a socket: time and allocations of each stage, and of the whole decision on a cache hit.
//! `make bench-micro`; figures in benches/README.md.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use divan::counter::BytesCount;
use divan::{AllocProfiler, Bencher, black_box};
use tollgate::clock::Now;
use tollgate::forward::Http1Head;
use tollgate::identity::Mode;
use tollgate::pipeline::{Admission, Pipeline, Verdict};
use tollgate::policy::{LimitFacts, LimitStage, LimitSubject};
use tollgate::request::body::{BodyHead, BodyRules, BodyScanner, KeySet, UntypedBody};
use tollgate::request::origin::{Arrival, Origin, TrustedProxies};
use tollgate::request::view::{Method, RequestView};
use tollgate::request::{self, head, query};
use tollgate::store::credential::Digest;
use tollgate::upstream::{Tries, Upstream};
use tollgate::{config, edge};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

const GOOD: &str = "glpat-0123456789abcdef";

fn main() {
    divan::main();
}

fn header_request() -> Vec<u8> {
    format!(
        "GET /api/v3/projects?page=2&per_page=20 HTTP/1.1\r\nHost: api.example:8080\r\nUser-Agent: bench/1\r\nAccept: */*\r\n\
         Accept-Encoding: identity\r\nPRIVATE-TOKEN: {GOOD}\r\nX-Trace: abcdef0123456789\r\n\r\n"
    )
    .into_bytes()
}

fn query_request() -> Vec<u8> {
    format!(
        "GET /api/v3/projects?page=2&private_token={GOOD}&per_page=1000 HTTP/1.1\r\nHost: api.example:8080\r\nUser-Agent: bench/1\r\n\
         Accept: */*\r\nAccept-Encoding: identity\r\n\r\n"
    )
    .into_bytes()
}

fn bad_request() -> Vec<u8> {
    String::from_utf8(header_request()).unwrap().replace(GOOD, "bad-token-999999999999").into_bytes()
}

fn pipeline() -> &'static Pipeline {
    pipeline_with("")
}

/// A pipeline with a token file.
fn pipeline_with(more: &str) -> &'static Pipeline {
    let folder = std::env::temp_dir().join(format!("tollgate-micro-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let digest = Digest::of(GOOD.as_bytes()).to_hex();
    std::fs::write(folder.join("tokens.toml"), format!("[[token]]\nsha256 = \"{digest}\"\nuser = \"bench\"\n"))
        .unwrap();
    let text = "[store]\nkind = \"file\"\npath = \"tokens.toml\"\n[cache]\npositive_ttl = \"1day\"\nnegative_ttl = \"1day\"\n\
                [log]\naccess = \"off\"\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:9\"]\n";
    let settings =
        config::parse(&format!("{text}{more}"), &folder.join("tollgate.toml"), config::Probe::Settings).unwrap();
    let running = tollgate::assembly::assemble(settings, None).unwrap();
    let pipeline: &'static Pipeline = &Box::leak(Box::new(running.snapshot)).pipeline;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for bytes in [header_request(), bad_request()] {
        runtime.block_on(async {
            let bytes: &'static [u8] = bytes.leak();
            let view = head::parse(bytes).unwrap();
            match pipeline.admit(&view, &origin(&view), edge::now(), Mode::Serve) {
                Admission::Waiting(pending) => drop(pending.verdict().await),
                // A token file is in memory, and is asked at once.
                Admission::Decided(..) => {}
            }
        });
    }
    pipeline
}

/// As a client on this machine sends it.
fn origin<'a>(view: &RequestView<'a>) -> Origin<'a> {
    static LOCAL: std::sync::LazyLock<Arrival> =
        std::sync::LazyLock::new(|| Arrival::of(Some(std::net::Ipv4Addr::LOCALHOST.into())));
    Origin::of(view, &LOCAL, &TrustedProxies::default())
}

fn now() -> Now {
    edge::now()
}

#[divan::bench]
fn digest_of_a_token(bencher: Bencher<'_, '_>) {
    bencher.bench(|| Digest::of(black_box(GOOD.as_bytes())));
}

#[divan::bench]
fn read_a_head(bencher: Bencher<'_, '_>) {
    let bytes = header_request();
    bencher.bench(|| head::parse(black_box(&bytes)).unwrap().fields.len());
}

#[divan::bench]
fn examine_a_header_token(bencher: Bencher<'_, '_>) {
    let (bytes, pipeline) = (header_request(), pipeline());
    let view = head::parse(&bytes).unwrap();
    bencher.bench(|| request::examine(black_box(&view), &pipeline.rules).unwrap().presented.is_some());
}

#[divan::bench]
fn examine_a_query_token_and_clamp(bencher: Bencher<'_, '_>) {
    let (bytes, pipeline) = (query_request(), pipeline());
    let view = head::parse(&bytes).unwrap();
    bencher.bench(|| request::examine(black_box(&view), &pipeline.rules).unwrap().clamped);
}

#[divan::bench]
fn scan_a_query(bencher: Bencher<'_, '_>) {
    let names = query::Names { token: "private_token".into() };
    let text = format!("page=2&private_token={GOOD}&per_page=1000&search=abc&order_by=name");
    bencher.bench(|| query::scan(black_box(text.as_bytes()), &names).params.len());
}

fn verdict(bencher: Bencher<'_, '_>, bytes: &'static [u8]) {
    let pipeline = pipeline();
    bencher.bench(|| {
        let view = head::parse(black_box(bytes)).unwrap();
        match pipeline.admit(&view, &origin(&view), now(), Mode::Serve) {
            Admission::Decided(Verdict::Forward(_), facts) => facts.principal.is_some(),
            Admission::Decided(Verdict::Refuse(_), _) => false,
            Admission::Waiting(_) => panic!("it must be known"),
        }
    });
}

/// From raw bytes to the verdict.
#[divan::bench]
fn verdict_on_a_header_token(bencher: Bencher<'_, '_>) {
    verdict(bencher, header_request().leak());
}

#[divan::bench]
fn verdict_on_a_query_token_and_clamp(bencher: Bencher<'_, '_>) {
    verdict(bencher, query_request().leak());
}

#[divan::bench]
fn verdict_on_a_bad_token(bencher: Bencher<'_, '_>) {
    verdict(bencher, bad_request().leak());
}

/// What limits that refuse nothing cost a request, each with a key of its own. docs/limits.md has the instructions of the first.
#[divan::bench(args = ["token", "user", "address", "token, concurrency", "token user address"])]
fn take_from_limits(bencher: Bencher<'_, '_>, keys: &str) {
    let (keys, more) = keys.split_once(',').map_or((keys, ""), |(keys, _)| (keys, "concurrency = 1000\n"));
    let limit =
        |key| format!("[[limit]]\nname = \"{key}\"\nkey = [\"{key}\"]\nrate = \"1000000/s\"\nburst = 1000000\n{more}");
    let pipeline = pipeline_with(&keys.split(' ').map(limit).collect::<String>());
    let bytes = header_request();
    let view = head::parse(&bytes).unwrap();
    let Admission::Decided(_, facts) = pipeline.admit(&view, &origin(&view), now(), Mode::Serve) else {
        panic!("it must be known")
    };
    let subject = LimitSubject {
        route: 0,
        route_name: "/api/v3/*",
        method: Method::Get,
        client: facts.client,
        token: facts.token.as_ref(),
        principal: facts.principal.as_deref(),
        headers: &[],
    };
    // As much flows in as is taken.
    let mut now = now();
    bencher.bench_local(|| {
        now.mono_ms += 1;
        pipeline.limits.take(black_box(&subject), LimitStage::Both, now, &[], &mut LimitFacts::new()).is_ok()
    });
}

/// From raw bytes to the bytes for the upstream: strip, clamp, one credential, X-Forwarded-*.
#[divan::bench]
fn bytes_for_the_upstream(bencher: Bencher<'_, '_>) {
    let (bytes, pipeline) = (query_request(), pipeline());
    let mut out = Vec::with_capacity(2048);
    bencher.bench_local(|| {
        let view = head::parse(black_box(&bytes)).unwrap();
        let origin = origin(&view);
        let Admission::Decided(Verdict::Forward(plan), _) = pipeline.admit(&view, &origin, now(), Mode::Serve) else {
            panic!("it must be known")
        };
        out.clear();
        let id = "0123456789abcdef0123456789abcdef";
        plan.write_head(&view, &pipeline.forward, &origin, id, None, &mut Http1Head(&mut out));
        out.len()
    });
}

/// Bodies of every parsed format: ordinary ones, and worst cases that repeat the most expensive construct.
const BODIES: [(&str, &str, &str, &str, &str); 18] = [
    ("form", FORM, "", "title=hello+world&", ""),
    ("form of &", FORM, "", "&", ""),
    ("form of a&", FORM, "", "a&", ""),
    ("form of escapes", FORM, "", "%70%61%67&", ""),
    ("form of brackets", FORM, "", "abcd[x]&", ""),
    ("form, one value", FORM, "a=", "x", ""),
    ("JSON records", JSON, "{\"a\":[1", ",{\"id\":17,\"name\":\"issue\",\"ok\":true}", "]}"),
    ("JSON of tiny keys", JSON, "{\"a\":1", ",\"a\":1", "}"),
    ("JSON of escaped keys", JSON, "{\"a\":1", ",\"\\n\\u0070\":1", "}"),
    ("JSON of digits", JSON, "[1", ",1", "]"),
    ("JSON of brackets", JSON, "[1", ",[[[[]]]]", "]"),
    ("JSON of comments", "", "{", "//\n", "}"),
    ("JSON, one string", JSON, "\"", "x", "\""),
    ("multipart, empty parts", PARTS, "", PART, "--B--\r\n"),
    ("multipart, files", PARTS, "", FILE, "--B--\r\n"),
    ("multipart, near delimiters", PARTS, CONTENT, "\r\n--", "\r\n--B--\r\n"),
    ("multipart, odd file name", PARTS, ODD, " name;", "\"\r\n\r\n\r\n--B--\r\n"),
    ("multipart, one file", PARTS, CONTENT, "x", "\r\n--B--\r\n"),
];
const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";
const PARTS: &str = "multipart/form-data; boundary=B";
const PART: &str = "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n\r\n";
const FILE: &str = "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a b.txt\"\r\n\
                    Content-Type: text/plain\r\n\r\nhello world\r\n";
const CONTENT: &str = "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n";
const ODD: &str = "--B\r\nContent-Disposition: form-data; name=\"a\"; filename=\"";

/// A body of 4 MiB (12 KiB for a file name) in pieces of the size that a socket delivers.
#[divan::bench(args = BODIES.iter().map(|(name, ..)| *name))]
fn body(bencher: Bencher<'_, '_>, name: &str) {
    let (_, content_type, begin, unit, end) = *BODIES.iter().find(|body| body.0 == name).unwrap();
    let size = if begin == ODD { 12 << 10 } else { 4 << 20 };
    let body = [begin, &unit.repeat(size / unit.len()), end].concat().into_bytes();
    let forbidden = KeySet::default().with(query::Key::Token).with(query::Key::Method).with(query::Key::Sudo);
    let names = query::Names { token: "private_token".into() };
    let rules = std::sync::Arc::new(BodyRules { names, forbidden, untyped: UntypedBody::Watch });
    let content_type = Some(content_type.as_bytes()).filter(|value| !value.is_empty());
    let head = BodyHead { content_type, coded: false, is_post: true, lists: false };
    bencher.counter(BytesCount::of_slice(&body)).bench_local(|| {
        let (mut scanner, _) = BodyScanner::new(&head, std::sync::Arc::clone(&rules));
        for piece in body.chunks(16 << 10) {
            scanner.feed(black_box(piece)).unwrap();
        }
        scanner.finish().unwrap();
    });
}

/// A request's server, from the choice to the answer.
#[divan::bench(args = ["two", "weighted", "least_requests", "hash"])]
fn choose_a_server(bencher: Bencher<'_, '_>, how: &str) {
    let more = match how {
        "weighted" => "servers = [\"127.0.0.1:1\", { address = \"127.0.0.1:2\", weight = 3 }]",
        "least_requests" => "servers = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\nbalance = \"least_requests\"",
        "hash" => "servers = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\nbalance = \"hash\"",
        _ => "servers = [\"127.0.0.1:1\", \"127.0.0.1:2\"]",
    };
    let text = format!("[[upstream]]\nname = \"api\"\n{more}\n");
    let settings = config::parse(&text, std::path::Path::new("tollgate.toml"), config::Probe::Settings).unwrap();
    let metrics = std::sync::Arc::new(tollgate::telemetry::metrics::Metrics::new("bench").unwrap());
    let now = std::time::Instant::now();
    let (pool, _) = Upstream::build(&settings.upstreams[0], Vec::new(), None, &metrics, now);
    bencher.bench_local(|| {
        let mut tries = Tries::default();
        if pool.hash_by().is_some() {
            tries.keyed(Some(pool.key_of(b"alice")));
        }
        black_box(pool.pick(&mut tries, now).unwrap().fresh);
        pool.answered(&mut tries, 200, now);
    });
}

/// The route of a request among so many: half of them for paths of their own, half for a host each.
#[divan::bench(args = [1, 100, 10_000])]
fn find_a_route(bencher: Bencher<'_, '_>, count: usize) {
    let mut text = String::from("[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n");
    for number in 1..count {
        text += &match number % 2 {
            0 => format!("[[route]]\npath = \"/api/v3/projects/:id/part{number}\"\n"),
            _ => format!("[[route]]\npath = \"/api/v3/*\"\nhosts = [\"h{number}.test\"]\n"),
        };
    }
    let settings = config::parse(&text, std::path::Path::new("tollgate.toml"), config::Probe::Settings).unwrap();
    let routes = &settings.rules.routes;
    assert_eq!(routes.iter().count(), count);
    bencher.bench_local(|| routes.find(Method::Get, black_box(b"h51.test"), black_box(b"/api/v3/projects/7/part50")));
}
