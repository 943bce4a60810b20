//! What becomes of connections on both sides: clients that leave, wait or send ahead, and kept connections to backends that
//! have died.

use crate::harness::{GOOD, Gateway, Upstream, eventually};
use crate::servers::http::{HttpServer, Reply};
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

const TARGET: &str = "/api/v3/projects";

fn get(target: &str, fields: &str) -> String {
    format!("GET {target} HTTP/1.1\nHost: h.test\nPRIVATE-TOKEN: {GOOD}\n{fields}\n")
}

/// Who says that this is its last request may close its side and wait; who says nothing has gone, and the work for it ends.
#[test]
fn who_said_that_it_is_the_last_request_may_close_its_side() {
    let (upstream, latch) = Upstream::holding(|_| true, "done");
    let gateway = Gateway::start(upstream.address, "");
    let ask = |request: &str| {
        let mut client = gateway.client();
        client.send_head(request);
        client.finish_sending();
        client
    };
    let old = format!("GET {TARGET} HTTP/1.0\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n");
    let mut waiting = [ask(&get(TARGET, "Connection: close\n")), ask(&old)];
    let mut gone = ask(&get(TARGET, ""));
    assert!(gone.is_closed_within(Duration::from_secs(5)), "the gateway holds on to a client that has gone");
    eventually("two are in flight", || gateway.metric("tollgate_requests_in_flight") == 2.0);
    latch.open();
    for client in &mut waiting {
        assert_eq!(client.answer().status, 200);
    }
    let reasons: Vec<String> =
        gateway.access_log().iter().map(|line| line["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reasons.iter().filter(|reason| *reason == "client_gone").count(), 1, "{reasons:?}");
}

/// A flood behind a request is not kept, nor is its client once it has gone.
#[test]
fn clients_that_send_far_ahead_and_leave_are_not_held() {
    let (upstream, latch) = Upstream::holding(|_| true, "done");
    let gateway = Gateway::start(upstream.address, "");
    let flood = get("/api/v3/ahead", "").replace('\n', "\r\n").repeat(2_000);
    assert!(flood.len() > 128 * 1024);
    let mut clients: Vec<_> = (0..50)
        .map(|_| {
            let mut client = gateway.client();
            client.send_head(&get(TARGET, ""));
            client.send(flood.as_bytes());
            client
        })
        .collect();
    eventually("all are in flight", || gateway.metric("tollgate_requests_in_flight") == 50.0);
    // One stays: it is answered, and its connection ends.
    let mut stays = clients.pop().unwrap();
    drop(clients);
    eventually("who has gone is not held", || gateway.metric("tollgate_requests_in_flight") == 1.0);
    latch.open();
    assert_eq!(stays.answer().status, 200);
    assert!(stays.is_closed_within(Duration::from_secs(5)));
}

/// A backend that closes each kept connection when the next request comes. Counts what it was asked for by its id.
fn forgetful(seen: &Arc<AtomicUsize>) -> HttpServer {
    let seen = Arc::clone(seen);
    HttpServer::start_raw(move |mut socket| {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if socket.read(&mut byte).unwrap_or(0) == 0 {
                return;
            }
            head.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&head).to_lowercase();
        let length =
            text.split("content-length: ").nth(1).map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
        socket.read_exact(&mut vec![0; length]).unwrap();
        seen.fetch_add(1, SeqCst);
        socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        // The next request arrives, and the connection breaks.
        if socket.read(&mut byte).unwrap_or(0) > 0 {
            seen.fetch_add(100, SeqCst);
        }
    })
}

#[test]
fn a_dead_kept_connection_is_replaced_where_that_is_safe() {
    let seen = Arc::default();
    let backend = forgetful(&seen);
    let gateway = Gateway::start(backend.address(), "");
    assert_eq!(gateway.get(TARGET).status, 200);
    let body = "x=1";
    let with_body = |method: &str| {
        format!("{method} {TARGET} HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\nContent-Length: {}\n\n{body}", body.len())
    };
    for (request, status) in [
        (get(TARGET, ""), 200),
        (with_body("PUT"), 200),
        (with_body("DELETE"), 200),
        // It was sent, and nobody knows what became of it.
        (with_body("POST"), 502),
        (with_body("PATCH"), 502),
    ] {
        let before = seen.load(SeqCst);
        assert_eq!(gateway.ask(&request).status, status, "{request}");
        // Once over the dead connection, and once more if that is safe.
        assert_eq!(seen.load(SeqCst) - before, if status == 200 { 101 } else { 100 }, "{request}");
        if status != 200 {
            assert_eq!(gateway.get(TARGET).status, 200);
        }
    }
}

/// Unused connections are closed in time, without a request that would find them.
#[test]
fn unused_connections_to_backends_are_closed() {
    let upstream = HttpServer::start(|_| Reply::ok("{}"));
    let config =
        format!("[[upstream]]\nname = \"api\"\nservers = [\"{}\"]\nidle_timeout = \"1s\"\n", upstream.address());
    let gateway = Gateway::start(upstream.address(), &config);
    assert_eq!(gateway.get(TARGET).status, 200);
    assert_eq!(upstream.open(), 1, "it is kept");
    let begun = Instant::now();
    eventually("it is closed", || upstream.open() == 0);
    assert!(begun.elapsed() > Duration::from_millis(500), "{:?}", begun.elapsed());
}
