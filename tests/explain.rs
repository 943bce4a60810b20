//! `tollgate explain` and `tollgate routes`. What is told must be what happens: every case of the tables is served by a real
//! gateway and explained by it, and both must agree. Curl's arguments are compared with the bytes of the real curl.

use crate::harness::*;
use crate::support::{Store, run, stderr, stdout};
use crate::{attacks, bodies, names};
use base64::Engine as _;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};

/// Asks the running gateway.
fn asked(gateway: &Gateway, call: &Value) -> Value {
    let (status, text) = posted(gateway, &call.to_string(), "Content-Type: application/json\n");
    assert_eq!(status, 200, "{text}");
    let mut answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["result"], "explained");
    answer["explanation"].take()
}

fn posted(gateway: &Gateway, body: &str, fields: &str) -> (u16, String) {
    let mut client = Client::connect(gateway.admin);
    client.send_head(&format!("POST /explain HTTP/1.1\nHost: localhost\n{fields}Content-Length: {}\n\n", body.len()));
    client.send(body.as_bytes());
    let answer = client.answer();
    (answer.status, answer.text())
}

fn told(gateway: &Gateway, bytes: &[u8]) -> Value {
    asked(gateway, &json!({ "base64": base64::engine::general_purpose::STANDARD.encode(bytes) }))
}

/// Whether bytes are those that a text with placeholders stands for.
fn stands_for(template: &str, bytes: &[u8]) -> Result<(), String> {
    let (mut rest, mut left) = (template, bytes);
    while let Some(character) = rest.bytes().next() {
        let off = || format!("{:?} does not stand for {:?}", rest, String::from_utf8_lossy(left));
        // How much of the text stands for how many bytes, and for which, if that is said.
        let (said, count, expected) = match (character, rest.as_bytes().get(1)) {
            (b'<', _) => {
                let end = rest.find('>').unwrap();
                let (what, length) = rest[1..end].strip_suffix(" bytes").unwrap().rsplit_once(", ").unwrap();
                let count = length.parse().unwrap();
                if let (Some(id), Some(part)) = (what.strip_prefix("token "), left.get(..count))
                    && sha256_hex(&String::from_utf8_lossy(part))[..12] != *id
                {
                    return Err(format!("another token than {id}"));
                }
                (end + 1, count, None)
            }
            (b'\\', Some(b'\\')) => (2, 1, Some(b'\\')),
            (b'\\', _) => (4, 1, Some(u8::from_str_radix(&rest[2..4], 16).unwrap())),
            (character, _) => (1, 1, Some(character)),
        };
        let part = left.get(..count).ok_or_else(off)?;
        if expected.is_some_and(|expected| part != [expected]) {
            return Err(off());
        }
        (rest, left) = (&rest[said..], &left[count..]);
    }
    if left.is_empty() { Ok(()) } else { Err(format!("{} bytes more than told", left.len())) }
}

#[test]
fn placeholders_stand_for_bytes() {
    assert_eq!(stands_for("a<hidden, 2 bytes>b\\x3c\\\\", b"a??b<\\"), Ok(()));
    let id = &sha256_hex(GOOD)[..12];
    assert_eq!(stands_for(&format!("<token {id}, 15 bytes>"), GOOD.as_bytes()), Ok(()));
    assert!(stands_for(&format!("<token {id}, 15 bytes>"), OTHER.as_bytes()).is_err());
    for wrong in ["a", "abc", "<hidden, 3 bytes>", "a\\x62c"] {
        assert!(stands_for(wrong, b"ab").is_err(), "{wrong}");
    }
}

/// All cases of the tables: attacks, names, and what real clients send.
fn cases() -> Vec<(String, Vec<u8>)> {
    let mut all = attacks::requests();
    let attacks = all.len();
    all.extend(names::requests());
    let names = all.len() - attacks;
    for (name, bytes) in bodies::captures() {
        let end = find(bytes, b"\r\n\r\n").unwrap();
        let (head, body) = (std::str::from_utf8(&bytes[..end]).unwrap(), &bytes[end + 4..]);
        let mut lines = head.split("\r\n");
        let method = lines.next().unwrap().split(' ').next().unwrap();
        let kept = ["content-type", "content-encoding", "content-range", "accept", "user-agent"];
        let fields = lines.filter(|line| kept.contains(&line.split(':').next().unwrap().to_ascii_lowercase().as_str()));
        let fields: String = fields.map(|line| format!("{line}\r\n")).collect();
        // Half of them in chunks.
        let mut request =
            format!("{method} /api/v3/projects HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n{fields}").into_bytes();
        if name.len() % 2 == 0 && !body.is_empty() {
            request.extend_from_slice(format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n", body.len()).as_bytes());
            request.extend_from_slice(&[body, b"\r\n0\r\n\r\n"].concat());
        } else {
            request.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
            request.extend_from_slice(body);
        }
        all.push((format!("client {name}"), request));
    }
    println!("{attacks} attacks, {names} names, {} requests of clients", all.len() - attacks - names);
    assert!(attacks >= 500 && names == 836 && all.len() - attacks - names >= 750, "{attacks} {names} {}", all.len());
    all
}

/// What is known is known as long as a test goes on.
const LONG: &str = "[cache]\npositive_ttl = \"1h\"\nnegative_ttl = \"1h\"\n";

/// Sends tokens until the cache knows them: until the store tells of its changes, what is cached is forgotten soon.
fn know(gateway: &Gateway, tokens: &[(&str, &str)]) {
    for (token, reason) in tokens {
        eventually("the cache knows the token", || {
            gateway.ask(&format!("GET /api/v3/user HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n"));
            std::thread::sleep(std::time::Duration::from_millis(50));
            told(gateway, format!("GET /api/v3/user HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {token}\r\n\r\n").as_bytes())
                ["reason"]
                == *reason
        });
    }
    std::thread::sleep(std::time::Duration::from_millis(800));
    for (token, _) in tokens {
        gateway.ask(&format!("GET /api/v3/user HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {token}\n\n"));
    }
}

/// What became of one case.
struct Outcome {
    name: String,
    told: Value,
    status: u16,
    request_id: Option<String>,
}

#[test]
fn what_is_told_is_what_happens() {
    let upstream = Upstream::start();
    let store = Store::with([(GOOD, "user-0001"), (OTHER, "user-0002")]);
    let gateway = Gateway::start(upstream.address, &(store.section() + LONG));
    know(&gateway, &[(GOOD, "ok"), (OTHER, "ok"), (BAD, "unknown")]);
    let (mut problems, mut outcomes) = (Vec::new(), Vec::new());
    let (mut forwarded, mut refused, mut unfinished, mut lossy, mut large, mut asked_first) = (0, 0, 0, 0, 0, 0);
    for (name, bytes) in cases() {
        // Explain takes 128 KiB of JSON.
        if bytes.len() > 90 * 1024 {
            large += 1;
            continue;
        }
        let mut told = told(&gateway, &bytes);
        if told["verdict"] == "unknown" {
            // Then it is in the cache, and known not to be valid.
            asked_first += 1;
            let mut client = gateway.client();
            let _: std::io::Result<()> = client.socket.write_all(&bytes);
            assert_eq!(client.answer().status, 401, "{name}");
            told = self::told(&gateway, &bytes);
        }
        let mut wrong = |what: String| problems.push(format!("{name}: {what}"));
        let all = told.to_string();
        if [GOOD, OTHER, BAD].iter().any(|token| all.contains(token)) {
            wrong(format!("a token is repeated: {all}"));
        }
        let part_only = told["notes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|note| note.as_str().unwrap().starts_with("the body is not whole"));
        if told["verdict"] == "incomplete" || (part_only && told["verdict"] == "forward") {
            unfinished += 1;
            continue;
        }
        upstream.forget();
        let mut client = gateway.client();
        let _: std::io::Result<()> = client.socket.write_all(&bytes);
        let method = if bytes.starts_with(b"HEAD ") { "HEAD" } else { "GET" };
        let Some(answer) = client.answer_to(method) else {
            wrong("no answer".into());
            continue;
        };
        let seen = upstream.seen();
        match told["verdict"].as_str().unwrap() {
            "forward" => {
                forwarded += 1;
                if seen.is_empty() || !matches!(answer.status, 200 | 101) {
                    wrong(format!("told to be forwarded, and answered {}", answer.status));
                    continue;
                }
                let template = told["upstream"]["head"].as_str().unwrap();
                // The head of an earlier request, whose body was refused, may have come only now.
                let is_it = |seen: &&Seen| stands_for(template, format!("{}\r\n\r\n", seen.head).as_bytes()).is_ok();
                let seen = seen.iter().find(is_it).unwrap_or(&seen[0]);
                if seen.head.contains('\u{fffd}') {
                    lossy += 1;
                } else if let Err(why) = stands_for(template, format!("{}\r\n\r\n", seen.head).as_bytes()) {
                    wrong(format!("other bytes upstream: {why}"));
                }
                if seen.complete && told["upstream"]["body_bytes"] != seen.body.len() {
                    wrong(format!("{} bytes of body, and {} came", told["upstream"]["body_bytes"], seen.body.len()));
                }
            }
            "refuse" => {
                refused += 1;
                if told["status"] != answer.status {
                    wrong(format!("told {} {}, and answered {}", told["status"], told["reason"], answer.status));
                }
                let phrase = told["answer"].as_str().unwrap();
                let lines: Vec<_> = answer.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
                let own =
                    format!("{}\r\n{}\r\n{}", phrase.split("\r\n").next().unwrap(), lines.concat(), answer.text());
                if let Err(why) = stands_for(phrase, own.as_bytes()) {
                    wrong(format!("another answer: {why}"));
                }
                if seen.iter().any(|seen| seen.complete) && !name.starts_with("pipelining") {
                    wrong("a whole request at the backend".into());
                }
            }
            other => wrong(format!("the verdict is {other}")),
        }
        let request_id = answer.header("X-Request-Id").map(str::to_owned);
        outcomes.push(Outcome { name, told, status: answer.status, request_id });
    }
    let mut lines: HashMap<String, Vec<Value>> = HashMap::new();
    for line in gateway.access_log() {
        lines.entry(line["request_id"].as_str().unwrap().to_owned()).or_default().push(line);
    }
    let mut compared = 0;
    for Outcome { name, told, status, request_id } in &outcomes {
        let Some([line]) = request_id.as_ref().and_then(|id| lines.get(id)).map(Vec::as_slice) else { continue };
        compared += 1;
        let log = (&line["reason"], &line["route"], &line["status"], &line["source"], &line["token"]);
        let said = (&told["reason"], &told["route"], &json!(status), &told["source"], &told["token"]);
        // A head that cannot be read has no source in the log.
        if log != said {
            problems.push(format!("{name}: the log has {log:?}, and told was {said:?}"));
        }
        if told["verdict"] == "refuse" || line["method"] != "other" {
            let method = (&line["method"], &told["method"]);
            if method.0 != method.1 && told["method"] != "other" {
                problems.push(format!("{name}: method {method:?}"));
            }
        }
    }
    println!("{asked_first} asked of the store first");
    println!(
        "{forwarded} forwarded, {refused} refused, {unfinished} not whole, {large} too large, {lossy} not compared, {compared} log lines"
    );
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
    assert!(
        forwarded > 900 && refused > 700 && unfinished < 40 && lossy < 20 && large < 60,
        "{forwarded} {refused} {unfinished} {lossy} {large}"
    );
    assert!(compared > 2_000, "{compared}");
}

/// Offline, the same stages say the same.
#[test]
fn without_a_gateway_the_same_is_told() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[api]\nscopes = \"gitlab\"\n");
    let config = gateway.folder.0.join("tollgate.toml");
    let mut compared = 0;
    for (method, target, scopes) in [
        ("GET", "/api/v3/user", vec!["read_user"]),
        ("POST", "/api/v3/user", vec!["read_user"]),
        ("GET", "/api/v3/projects?per_page=1000", vec!["api"]),
        ("GET", "/elsewhere", vec!["api"]),
        ("GET", "/api/v3/../x", vec!["api"]),
    ] {
        let text = format!("{method} {target} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n\r\n");
        let running = asked(&gateway, &json!({ "text": text, "as": { "user": "ann", "scopes": scopes } }));
        let raw = gateway.folder.write("request", &text);
        let mut command = tollgate();
        command.arg("explain").arg("--config").arg(&config).arg("--raw").arg(&raw);
        command.args(["--json", "--as", "ann", "--scopes", &scopes.join(",")]);
        let output = run(&mut command);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let offline: Value = serde_json::from_str(&stdout(&output)).unwrap();
        for key in ["verdict", "status", "reason", "route", "method", "request", "token", "user", "answer", "what_if"] {
            assert_eq!(offline[key], running[key], "{method} {target} {key}");
        }
        assert_eq!(offline["upstream"]["head"], running["upstream"]["head"]);
        compared += 1;
    }
    assert_eq!(compared, 5);
}

/// Every number that a request would move.
fn counters(gateway: &Gateway) -> Vec<String> {
    let text = gateway.admin_get("/metrics").unwrap().text();
    let is_other = |line: &&str| {
        !line.starts_with('#')
            && !line.starts_with("process_")
            && !line.starts_with("tollgate_open")
            && !line.contains("log_lines_written")
    };
    text.lines().filter(is_other).map(str::to_owned).collect()
}

#[test]
fn a_thousand_explanations_change_nothing() {
    let upstream = Upstream::start();
    let more = "[cache]\npositive_ttl = \"1h\"\nnegative_ttl = \"1h\"\n\
                [[limit]]\nname = \"l\"\nkey = [\"token\"]\nrate = \"1/h\"\nburst = 20\n\
                [[limit]]\nname = \"a\"\nkey = [\"address\"]\nrate = \"1000/h\"\nbuckets = 16\n\
                [guessing]\nfailures = 10\n";
    // A store that has to be asked: what it does not know is kept in the cache.
    let store = Store::with([(GOOD, "user-0001")]);
    let gateway = Gateway::start(upstream.address, &(store.section() + more));
    know(&gateway, &[(GOOD, "ok"), (BAD, "unknown")]);
    let left = || 20 - upstream.seen().len();
    gateway.metrics();
    let before = counters(&gateway);
    assert!(before.len() > 100, "{}", before.len());
    let mut seen: HashMap<String, u32> = HashMap::new();
    for number in 0..1_000 {
        let token = [GOOD, BAD, "never-seen-token-1", "x y"][number % 4];
        let text = format!("GET /api/v3/user?n={number} HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {token}\r\n\r\n");
        let told =
            asked(&gateway, &json!({ "text": text, "client": format!("10.0.{}.{}", number / 250, number % 250) }));
        *seen.entry(told["reason"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    let expected = ["ok", "unknown", "store_not_asked", "bad_byte"].map(|reason| (reason.to_owned(), 250));
    assert_eq!(seen, HashMap::from(expected));
    assert_eq!(counters(&gateway), before, "a counter moved");
    // As many are left as before, for all that was told.
    let left = left();
    assert!(left > 3, "{left}");
    let statuses: Vec<_> = (0..=left).map(|_| gateway.get("/api/v3/user").status).collect();
    assert_eq!((&statuses[..left], statuses[left]), (vec![200; left].as_slice(), 429));
    let text = format!("GET /api/v3/user HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n\r\n");
    let told = asked(&gateway, &json!({ "text": text }));
    assert_eq!((&told["status"], &told["reason"]), (&json!(429), &json!("limit_rate")));
    let limits = told["stages"].as_array().unwrap().iter().find(|stage| stage["stage"] == "limits").unwrap().clone();
    assert_eq!(limits["outcome"], "refused");
    assert!(limits["rules"][0]["place"].as_str().unwrap().contains("tollgate.toml:"), "{limits}");
}

#[test]
fn an_explanation_is_audited_without_what_was_asked() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    gateway.rewrite(|text| text.replace("[admin]\n", "[admin]\naudit = \"audit.log\"\n"));
    gateway.admin_post("/reload");
    let text = format!(
        "POST /api/v3/very-own-path HTTP/1.1\r\nHost: very-own-host\r\nPRIVATE-TOKEN: {GOOD}\r\nContent-Length: 4\r\n\r\nbody"
    );
    let told = asked(&gateway, &json!({ "text": text, "as": { "user": "ann" } }));
    assert_eq!((&told["verdict"], &told["user"]), (&json!("forward"), &json!("ann")));
    for (body, fields, status) in [
        ("{}", "Content-Type: application/json\n", 400),
        ("{\"text\":\"x\",\"more\":1}", "Content-Type: application/json\n", 400),
        ("{\"base64\":\"?\"}", "Content-Type: application/json\n", 400),
        ("{\"text\":\"GET\"}", "Content-Type: text/plain\n", 415),
        ("text=x", "Content-Type: application/x-www-form-urlencoded\n", 415),
        ("{\"text\":\"GET\"}", "", 415),
        ("{\"text\":\"GET\"}", "Content-Type: application/json\nOrigin: http://evil.example\n", 403),
    ] {
        let (code, answer) = posted(&gateway, body, fields);
        assert_eq!(code, status, "{body} {fields} {answer}");
    }
    let big = format!("{{\"text\":\"{}\"}}", "x".repeat(200 * 1024));
    let mut client = Client::connect(gateway.admin);
    client.send_head(&format!(
        "POST /explain HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {}\n\n",
        big.len()
    ));
    assert_eq!(client.answer().status, 413);
    // Whoever may not ask is told at once: nobody waits for what they would send.
    let mut client = Client::connect(gateway.admin);
    client.send_head(
        "POST /explain HTTP/1.1\nHost: evil.example\nContent-Type: application/json\nContent-Length: 1000\n\n",
    );
    assert_eq!(client.answer().status, 403);
    assert_eq!(gateway.admin_get("/explain").unwrap().status, 405);
    let path = gateway.folder.0.join("audit.log");
    let entries = || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        text.lines().filter(|line| line.contains("\"explain\"")).map(str::to_owned).collect::<Vec<_>>()
    };
    // Those that the listener refuses whatever they ask for are counted, and nothing else.
    eventually("the audit log has all lines", || entries().len() == 4);
    for line in entries() {
        assert!(!line.contains(GOOD) && !line.contains("very-own") && !line.contains("ann"), "{line}");
    }
    let first: Value = serde_json::from_str(&entries()[0]).unwrap();
    assert_eq!(
        (&first["result"], &first["verdict"], &first["route"]),
        (&json!("ok"), &json!("forward"), &json!("/api/v3/*"))
    );
}

// ---- curl ----

/// What curl sends, and what explain takes it for: the bytes, but for what differs by nature.
fn both(arguments: &[String], port: u16, listener: &TcpListener) -> Result<(String, String), String> {
    let mut child = Command::new("curl")
        .args(["-q", "-sS", "--max-time", "5", "--noproxy", "*"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("curl cannot be started: {error}"));
    let mut socket = loop {
        match listener.accept() {
            Ok((socket, _)) => break socket,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
        if child.try_wait().unwrap().is_some() {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            return Err(format!("curl sends nothing: {said} {arguments:?}"));
        }
    };
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    let end = loop {
        let mut piece = [0; 16 * 1024];
        let read = socket.read(&mut piece).unwrap();
        assert!(read > 0, "curl sent half a head: {arguments:?}");
        bytes.extend_from_slice(&piece[..read]);
        if let Some(end) = find(&bytes, b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    if head.contains("\r\nExpect: 100-continue\r\n") {
        socket.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    }
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.trim().parse::<usize>().ok());
    while bytes.len() < end + length.unwrap_or(0) {
        let mut piece = [0; 16 * 1024];
        let read = socket.read(&mut piece).unwrap();
        bytes.extend_from_slice(&piece[..read]);
    }
    socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    drop(socket);
    child.wait().unwrap();
    let own = tollgate::cli::curl_request(arguments).unwrap_or_else(|why| panic!("{why}: {arguments:?}"));
    assert_eq!(own.port, port);
    Ok((same(&bytes), same(&own.bytes)))
}

/// Without curl's version, and the boundary that it makes up.
fn same(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let text = text.replace("User-Agent: curl/7.88.1\r\n", "User-Agent: curl\r\n");
    match text.split_once("; boundary=").map(|(_, rest)| rest.split("\r\n").next().unwrap().to_owned()) {
        Some(boundary) => text.replace(&boundary, "BOUNDARY"),
        None => text,
    }
}

#[test]
fn curls_arguments_are_the_bytes_that_curl_sends() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let folder = Folder::new("test");
    let file = folder.write("notes.txt", "line one\nline & two\n").display().to_string();
    let mut random = fastrand::Rng::with_seed(7);
    let pick = |random: &mut fastrand::Rng, of: &[&'static str]| of[random.usize(..of.len())];
    let words = |text: &str| text.replace("FILE", &file).split('|').map(str::to_owned).collect::<Vec<_>>();
    const ANY: [&str; 24] = [
        "-H|PRIVATE-TOKEN: a-b",
        "--header|X-A: 1",
        "-HX-B:2",
        "-H|Accept: text/x",
        "-H|Accept:",
        "-H|X-Empty;",
        "-H|Host: other.test",
        "-H|User-Agent: me",
        "-u|ann:pass",
        "-u|ann:",
        "--user|a:b:c",
        "--oauth2-bearer|tok",
        "-b|a=b",
        "--cookie|c=d; e=f",
        "-A|agent/1",
        "-A|",
        "-e|http://r/",
        "-k",
        "-sSL",
        "-i",
        "-v",
        "--compressed",
        "-r|0-9",
        "-H|Authorization: Bearer z",
    ];
    const BODY: [&str; 22] = [
        "-d|a=1",
        "-d|a=1|-d|b=2",
        "--data|x y&z",
        "--data-raw|@file",
        "--data-binary|a\nb",
        "-d|@FILE",
        "--data-binary|@FILE",
        "--data-urlencode|a=b c&d",
        "--data-urlencode|=x=y",
        "--data-urlencode|plain text",
        "--data-urlencode|n@FILE",
        "--json|{\"a\":1}",
        "--json|{\"a\":|--json|1}",
        "-F|a=b",
        "-F|a=b;type=text/x|-F|f=@FILE",
        "-F|f=@FILE;filename=x.png;type=image/png",
        "-F|f=<FILE",
        "--form-string|a=@b;c",
        "-T|FILE",
        "-I",
        "-d|a=1|-H|Content-Type: application/json",
        "-XPUT|-d|",
    ];
    const METHOD: [&str; 8] = ["", "", "", "-X|DELETE", "-XPATCH", "--request|PUT", "-G", "-X|POST"];
    const PATHS: [&str; 14] = [
        "",
        "/",
        "/api/v3/projects",
        "/a/../b",
        "/a/./b/",
        "/a/..",
        "/x?y=1",
        "?q",
        "/p?a=%20&b=+",
        "/p#frag",
        "/caf\u{e9}?\u{e9}=1",
        "/a//b",
        "/%2e%2e/x",
        "/p?a[]=1",
    ];
    let (mut compared, mut refused, mut problems) = (0, 0, Vec::new());
    for _ in 0..260 {
        let mut arguments = Vec::new();
        for _ in 0..random.usize(..4) {
            arguments.extend(words(pick(&mut random, &ANY)));
        }
        if random.usize(..2) == 0 {
            arguments.extend(words(pick(&mut random, &BODY)));
        }
        let method = pick(&mut random, &METHOD);
        // -G goes with data only, and not with -I, -F, -T.
        let takes = method != "-G" || arguments.iter().any(|word| word.starts_with("-d") || word.starts_with("--data"));
        if !method.is_empty() && takes {
            arguments.extend(words(method));
        }
        let scheme = pick(&mut random, &["http://", "", "HTTP://"]);
        let user = pick(&mut random, &["", "", "", "me:secret@"]);
        let path = pick(&mut random, &PATHS);
        if path.contains('[') {
            arguments.push("-g".into());
        }
        let url = format!("{scheme}{user}127.0.0.1:{port}{path}");
        match random.usize(..3) {
            0 => arguments.extend(["--url".to_owned(), url]),
            _ => arguments.push(url),
        }
        if tollgate::cli::curl_request(&arguments).is_err() {
            refused += 1;
            continue;
        }
        match both(&arguments, port, &listener) {
            Ok((curl, own)) if curl == own => compared += 1,
            Ok((curl, own)) => problems.push(format!("{arguments:?}\n  curl {curl:?}\n  own  {own:?}")),
            Err(why) => problems.push(why),
        }
    }
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
    println!("{compared} compared, {refused} refused");
    assert!(compared >= 200 && refused <= 30, "{compared} {refused}");
}

#[test]
fn what_curl_would_not_send_is_refused_by_name() {
    let refused = |words: &[&str]| {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        tollgate::cli::curl_request(&words).unwrap_err()
    };
    for (words, said) in [
        (&["--http3", "http://h/"][..], "--http3"),
        (&["-sZ", "http://h/"], "-Z"),
        (&["-x", "http://proxy", "http://h/"], "-x"),
        (&["http://h/a", "http://h/b"], "two URLs"),
        (&["http://h/{a,b}"], "-g"),
        (&["-H"], "-H needs a value"),
        (&["-d", "x"], "no URL"),
        (&["http://h/a b"], "blank"),
        (&["-d", "a", "-F", "b=c", "http://h/"], "one of"),
        (&["ftp://h/"], "http"),
        (&["-b", "cookies.txt", "http://h/"], "cookies"),
        (&["-d", "@/nonexistent/file", "http://h/"], "/nonexistent/file"),
    ] {
        assert!(refused(words).contains(said), "{words:?}: {}", refused(words));
    }
}

// ---- the command line ----

fn explain(gateway: &Gateway, arguments: &[&str]) -> Command {
    let mut command = tollgate();
    command.arg("explain").arg("--config").arg(gateway.folder.0.join("tollgate.toml")).args(arguments);
    command
}

#[test]
fn a_request_id_leads_to_the_reason() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(
        upstream.address,
        "[[limit]]\nname = \"per-token\"\nkey = [\"token\"]\nrate = \"2/h\"\nburst = 2\n",
    );
    let id = |answer: &Answer| answer.header("X-Request-Id").unwrap().to_owned();
    let fine = id(&gateway.get("/api/v3/user"));
    let unknown = id(&gateway.ask(&format!("GET /api/v3/user HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n\n")));
    gateway.get("/api/v3/user");
    let limited = id(&gateway.get("/api/v3/user"));
    gateway.access_log();
    let why = |id: &str, more: &[&str]| run(&mut explain(&gateway, &[&["--why", id], more].concat()));
    let output = why(&limited, &[]);
    let said = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for part in [
        "429 from tollgate itself",
        "`limit_rate`: more requests than",
        "`per-token`",
        "user user-0001",
        "client 127.0.0.1",
        "docs/operations.md#every-refusal-reason",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains(GOOD));
    let said = stdout(&why(&unknown[..8], &[]));
    assert!(said.contains("`unknown`: the store has no such token") && said.contains(&sha256_hex(BAD)[..12]), "{said}");
    let said = stdout(&why(&fine, &["--json"]));
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&told["line"]["reason"], &told["line"]["status"]), (&json!("ok"), &json!(200)));
    // Rotated, and then compressed.
    let log = gateway.folder.0.join("access.log");
    std::fs::rename(&log, gateway.folder.0.join("access.log.1")).unwrap();
    std::fs::write(&log, "").unwrap();
    assert!(stdout(&why(&limited, &[])).contains("limit_rate"));
    assert!(Command::new("gzip").arg(gateway.folder.0.join("access.log.1")).status().unwrap().success());
    assert!(stdout(&why(&limited, &[])).contains("limit_rate"));
    // From a journal, with what it writes in front.
    let mut child = tollgate()
        .args(["explain", "--log", "-", "--why", &limited])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let line = format!(
        "Nov 29 15:00:00 host tollgate[1]: {{\"request_id\":\"{limited}\",\"status\":403,\"by\":\"gate\",\"reason\":\"scope\"}}\nnoise {limited}\n"
    );
    child.stdin.take().unwrap().write_all(line.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(stdout(&output).contains("`scope`"), "{}", stdout(&output));
    // What is not there.
    let output = why("0000000000000000", &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("access.log, ") && said.contains("access.log.1.gz"), "{said}");
    assert_eq!(why("../x", &[]).status.code(), Some(64));
    // A line of the log can be explained itself.
    let line = told["line"].to_string();
    let output = run(&mut explain(&gateway, &["--json", "--log-line", &line]));
    let again: Value = serde_json::from_str(&stdout(&output)).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    assert_eq!((&again["verdict"], &again["user"]), (&json!("forward"), &json!("user-0001")));
    let notes = again["notes"].to_string();
    assert!(notes.contains("no header fields") && notes.contains("only the id of the token"), "{notes}");
}

#[test]
fn an_explanation_for_people_names_the_line() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "[api]\nscopes = \"gitlab\"\n");
    let request = ["--", "curl", "-H", "PRIVATE-TOKEN: any", "http://h.test/api/v3/projects"];
    let output = run(&mut explain(&gateway, &[&["--as", "ann", "--scopes", "read_user"], &request[..]].concat()));
    let said = stdout(&output);
    let text = std::fs::read_to_string(gateway.folder.0.join("tollgate.toml")).unwrap();
    let line = 1 + text.lines().position(|line| line == "scopes = \"gitlab\"").unwrap();
    assert!(said.contains(&format!("tollgate.toml:{line}")), "{said}");
    for part in [
        "Refused with 403",
        "NO policy",
        "-- forward",
        "with a valid token of scope api",
        "forwarded to api",
        "{\"message\":\"403 Forbidden\"}",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains('\u{1b}'), "no colours without a terminal");
    // Of the running gateway, whose cache does not know the token.
    let output = run(&mut explain(&gateway, &[&["--running"], &request[..]].concat()));
    assert!(stdout(&output).contains("the store was not asked"), "{}{}", stdout(&output), stderr(&output));
    // The store is asked when that is wanted.
    let request = ["--", "-H", &format!("PRIVATE-TOKEN: {GOOD}"), "http://h.test/api/v3/projects"];
    let said = stdout(&run(&mut explain(&gateway, &[&["--ask-store"], &request[..]].concat())));
    assert!(said.contains("the store was asked") && said.contains("user user-0001") && !said.contains(GOOD), "{said}");
    for (arguments, part) in [
        (&["--"][..], "what is to be explained"),
        (&["--", "--http3", "http://h/"], "--http3"),
        (&["--log-line", "no line"], "not a line of the access log"),
    ] {
        let output = run(&mut explain(&gateway, arguments));
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
}

/// Whoever is told `ambiguous_path` is told what the path was taken for.
#[test]
fn a_path_with_two_readings_names_the_route_that_is_meant() {
    let folder = Folder::new("test");
    let open = "auth = \"none\"\nreason = \"a test\"\n";
    let config = format!(
        "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[[route]]\npath = \"/\"\n{open}\
         [[route]]\npath = \"/api/v3/may/*\"\nauth = \"optional\"\nreason = \"a test\"\n[[route]]\npath = \"/api/v3/may/not\"\n"
    );
    let explain = |config: &str, url: &str| {
        let config = folder.write("tollgate.toml", config);
        let output = run(tollgate().args(["explain", "--config"]).arg(config).args(["--", url]));
        stdout(&output) + &stderr(&output)
    };
    for (url, reason, parts) in [
        ("http://h/api%2Fv3/x", "`ambiguous_path`", &["could read a path of /api/v3/*, a token is required"][..]),
        (
            "http://h/api/v3/may/NOT",
            "`missing`",
            &["could read a path of /api/v3/may/not", "but needed for what another server could read"],
        ),
        ("http://h/x/%252e%252e/y", "`ambiguous_path`", &["could read a dot segment in it"]),
    ] {
        let told = explain(&config, url);
        assert!(told.contains(reason) && parts.iter().all(|part| told.contains(part)), "{url}: {told}");
        assert!(!told.contains("preflight"), "{told}");
    }
    let told =
        explain(&config.replacen("[[route]]", "[api]\nambiguous_paths = \"refuse\"\n[[route]]", 1), "http://h/x%2Fy");
    assert!(told.contains("`ambiguous_path`") && told.contains("api.ambiguous_paths = refuse"), "{told}");
    assert!(!explain(&config, "http://h/x%2Fy").contains("ambiguous"));
}

// ---- routes ----

const ROUTES: &str = "[server]\nlisten = [\"127.0.0.1:8080\"]\n[api]\nscopes = \"gitlab\"\ncors_preflight = true\n\
[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\", { address = \"127.0.0.1:2\", weight = 3 }]\n\
[[upstream]]\nname = \"big\\\\\"\nservers = [\"127.0.0.1:3\"]\n\
[[limit]]\nname = \"per-token\"\nkey = [\"token\"]\nrate = \"10/s\"\n\
[[limit]]\nname = \"posts\"\nmethods = [\"POST\"]\nrate = \"1/s\"\ndry_run = true\n\
[[route]]\npath = \"/api/v3/session\"\nmethods = [\"POST\"]\nauth = \"none\"\nreason = \"log in here\"\n\
[[route]]\npath = \"/api/v3/big/*\"\nhosts = [\"big.test\"]\nupstream = \"big\\\\\"\npool = [{ scope = \"sudo\", upstream = \"api\" }]\n\
canary = { upstream = \"api\", share = 0.125, by = \"user\" }\n\
[[pagination.route]]\npath = \"/api/v3/big/x\"\nmax_per_page = 500\n";

#[test]
fn routes_as_a_table_as_json_and_as_a_graph() {
    let folder = Folder::new("test");
    let config = folder.write("tollgate.toml", ROUTES);
    let routes = |more: &[&str]| {
        let output = run(tollgate().args(["routes", "--config"]).arg(&config).args(more));
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    let table = routes(&[]);
    let line = |begin: &str| {
        table.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{table}")).to_owned()
    };
    let session = line("/api/v3/session");
    assert!(session.contains("POST") && session.contains("none") && session.contains("tollgate.toml:"), "{session}");
    assert!(table.contains("without a token because: log in here"), "{table}");
    let big = line("/api/v3/big/*");
    for part in [
        "big.test",
        "required",
        "api, read_api (GET HEAD)",
        "per-token, posts (dry run)",
        "big\\, scope sudo: api, 12.5 %: api",
        "20 of at most 100, 1 paths otherwise",
    ] {
        assert!(big.contains(part), "{part}: {big}");
    }
    let all = line("/api/v3/*");
    assert!(all.contains("read_user (GET, in part)") && all.contains("default of api.prefixes[0]"), "{all}");
    assert!(line("any other path").contains("404") && line("every path").contains("tollgate.toml:5"), "{table}");
    let json: Value = serde_json::from_str(&routes(&["--json"])).unwrap();
    let rows = json["routes"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!((&rows[0]["token"], &rows[0]["reason"]), (&json!("none"), &json!("log in here")));
    // Graphviz takes the graph, and draws every node of it.
    let dot = folder.write("routes.dot", &routes(&["--graph"]));
    let output = Command::new("dot")
        .arg("-Tsvg")
        .arg(&dot)
        .output()
        .unwrap_or_else(|error| panic!("dot cannot be started: {error}"));
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let svg = String::from_utf8(output.stdout).unwrap();
    assert_eq!(svg.matches("class=\"node\"").count(), 1 + 1 + 3 + 1 + 2 + 3, "{svg}");
    for part in ["127.0.0.1:8080", "big\\", "weight 3", "scope sudo", "12.5 %", "everything else"] {
        assert!(svg.contains(part), "{part}: {svg}");
    }
}
