//! What the gate itself costs, without a socket: nanoseconds and allocations of each step and of the whole verdict on a
//! cache hit. `make bench-micro`; figures in benches/README.md.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use divan::{AllocProfiler, Bencher, black_box};
use tollgate::identity::credential::Digest;
use tollgate::pipeline::{Admission, Pipeline, Verdict};
use tollgate::request::origin::Origin;
use tollgate::request::{self, head, query};
use tollgate::{Now, config, edge};

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

/// A pipeline over a file store, with the good and the bad token looked up before.
fn pipeline() -> &'static Pipeline {
    let folder = std::env::temp_dir().join(format!("tollgate-micro-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let digest = Digest::of(GOOD.as_bytes()).to_hex();
    std::fs::write(folder.join("tokens.toml"), format!("[[token]]\nsha256 = \"{digest}\"\nuser = \"bench\"\n"))
        .unwrap();
    let text = "[store]\nkind = \"file\"\npath = \"tokens.toml\"\n[cache]\npositive_ttl = \"1day\"\nnegative_ttl = \"1day\"\n\
                [log]\naccess = \"off\"\n[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:9\"]\n";
    let settings = config::parse(text, &folder).unwrap();
    let running = tollgate::assembly::assemble(settings, None).unwrap();
    let pipeline: &'static Pipeline = &Box::leak(Box::new(running.snapshot)).pipeline;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for bytes in [header_request(), bad_request()] {
        runtime.block_on(async {
            let bytes: &'static [u8] = bytes.leak();
            let view = head::parse(bytes).unwrap();
            match pipeline.admit(&view, edge::now()) {
                Admission::Waiting(pending) => drop(pending.verdict().await),
                Admission::Decided(_) => panic!("nothing can be known"),
            }
        });
    }
    pipeline
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
        match pipeline.admit(&view, now()) {
            Admission::Decided(Verdict::Forward(plan)) => plan.principal().is_some(),
            Admission::Decided(Verdict::Refuse(_)) => false,
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

/// From raw bytes to the bytes that go upstream: strip, clamp, one credential, X-Forwarded-*.
#[divan::bench]
fn bytes_for_the_upstream(bencher: Bencher<'_, '_>) {
    let (bytes, pipeline) = (query_request(), pipeline());
    let mut out = Vec::with_capacity(2048);
    bencher.bench_local(|| {
        let view = head::parse(black_box(&bytes)).unwrap();
        let Admission::Decided(Verdict::Forward(plan)) = pipeline.admit(&view, now()) else {
            panic!("it must be known")
        };
        let origin = Origin::of(&view, Some(std::net::Ipv4Addr::LOCALHOST.into()), &pipeline.forward.trusted);
        out.clear();
        plan.write_head(&view, &pipeline.forward, &origin, "0123456789abcdef0123456789abcdef", &mut out);
        out.len()
    });
}
