//! Real clients of API v3, through the gateway to a Grape application that behaves like GitLab. They must see the same as
//! without the gateway.

use crate::harness::*;
use crate::support::*;
use std::process::Command;

/// Longer than 20 characters: the Ruby client sends it as `Authorization: Bearer`.
const LONG: &str = "long-token-0000-0000-0000-0001";
/// A personal access token of today, which names its cell and is longer than 255 bytes.
const PAT: &str = "glpat-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\
                   AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\
                   AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.01.0z1abcdef";

struct Setup {
    gateway: Gateway,
    puma: Puma,
    _store: Store,
}

impl Setup {
    fn new() -> Self {
        // The backend knows a token that tollgate does not, so that only tollgate can refuse it.
        let puma = Puma::start("gitlab.ru", &format!("{GOOD}=alice,{LONG}=bob,{BAD}=mallory,{LONG}x=mallory"));
        let store = Store::with([(GOOD, "alice"), (LONG, "bob")]);
        let gateway = Gateway::start(puma.address, &store.section());
        Self { gateway, puma, _store: store }
    }

    /// With the preset for API v4, whose listeners and servers are the test's.
    fn of_v4() -> Self {
        let preset = std::fs::read_to_string(repository("config/gitlab-v4.toml")).unwrap();
        let section = |name: &str| {
            let from = preset.find(&format!("\n[{name}]\n")).unwrap() + 1;
            let rest = &preset[from..];
            rest[..rest.find("\n[").map_or(rest.len(), |end| end + 1)].to_owned()
        };
        let puma = Puma::start("gitlab.ru", &format!("{GOOD}=alice,{PAT}=bob,{BAD}=mallory"));
        let store = Store::with([(GOOD, "alice"), (PAT, "bob")]);
        let sections = ["api", "token", "pagination"].map(section).concat();
        let gateway = Gateway::start(puma.address, &format!("{}{sections}", store.section()));
        Self { gateway, puma, _store: store }
    }

    fn base(&self) -> String {
        format!("http://{}", self.gateway.address)
    }

    /// Runs a client, which must report this number of checks, all passed.
    fn wants(&self, client: &mut Command, checks: usize) {
        let output = run(client);
        let (out, err) = (stdout(&output), stderr(&output));
        assert_eq!(output.status.code(), Some(0), "{out}{err}\n(if a package is missing: {HINT})");
        assert_eq!(out.lines().filter(|line| line.starts_with("ok ")).count(), checks, "{out}");
        self.every_request_came_with_one_plain_credential();
    }

    /// Puma's requests must have a valid token in the token header, and no other credential.
    fn every_request_came_with_one_plain_credential(&self) {
        let mut direct = Client::connect(self.puma.address);
        direct.send_head("GET /__seen HTTP/1.1\nHost: h\n\n");
        let seen: Vec<serde_json::Value> = serde_json::from_slice(&direct.answer().body).unwrap();
        assert!(seen.len() > 10, "{} requests", seen.len());
        for request in seen {
            let token = request["headers"]["HTTP_PRIVATE_TOKEN"].as_str();
            assert!(matches!(token, Some(GOOD | LONG | PAT)), "{request}");
            assert!(request["headers"]["HTTP_AUTHORIZATION"].is_null(), "{request}");
            let query = request["query"].as_str().unwrap();
            assert!(!query.contains("token"), "{request}");
            assert!(!query.contains("=5000"), "{request}");
            // A list by keys has no numbers.
            assert!(!query.contains("keyset") || !query.split('&').any(|pair| pair.starts_with("page=")), "{request}");
        }
    }
}

fn python(script: &str) -> Command {
    let venv = std::env::var_os("TOLLGATE_PY_VENV").map_or_else(|| repository("target/py-clients"), Into::into);
    let python = venv.join("bin/python");
    assert!(python.exists(), "{} is not there: {HINT}", python.display());
    let mut command = Command::new(python);
    // No bytecode beside the scripts.
    command.arg("-B").arg(repository("tests/clients").join(script));
    command
}

#[test]
fn the_ruby_client_works_through_the_gateway_with_short_and_long_tokens() {
    let setup = Setup::new();
    let script = repository("tests/clients/ruby_gitlab.rb");
    setup.wants(Command::new("ruby").arg(script).args([&setup.base(), GOOD, BAD, LONG]), 15);
    // Both headers were used.
    let valid = |source: &str| {
        setup.gateway.metric(&format!("tollgate_auth_total{{reason=\"ok\",result=\"valid\",source=\"{source}\"}}"))
    };
    assert!(valid("header") > 0.0 && valid("bearer") > 0.0);
}

#[test]
fn python_gitlab_works_through_the_gateway() {
    let setup = Setup::new();
    setup.wants(python("python_gitlab.py").args([&setup.base(), GOOD, BAD]), 12);
}

#[test]
fn pyapi_gitlab_works_through_the_gateway() {
    let setup = Setup::new();
    setup.wants(python("pyapi_gitlab.py").args([&setup.base(), GOOD, BAD]), 12);
}

/// Sends more requests than a limit allows at once: the client waits as it is told, and all of them succeed.
fn waits_and_goes_on(client: &mut Command, gateway: &Gateway) {
    const REQUESTS: usize = 5;
    let output = run(client.arg(format!("http://{}", gateway.address)).args([GOOD, &REQUESTS.to_string()]));
    let (out, err) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(0), "{out}{err}\n(if a package is missing: {HINT})");
    assert_eq!(out.lines().filter(|line| line.starts_with("ok ")).count(), REQUESTS, "{out}");
    let count = |result| gateway.metric(&format!("tollgate_limit_requests_total{{limit=\"l\",result=\"{result}\"}}"));
    assert_eq!(count("allowed"), REQUESTS as f64);
    // Two at once, then one a second: each of the others is refused once and comes again when it was told to.
    assert!((1.0..=3.0).contains(&count("refused")), "{} refused: {out}", count("refused"));
}

const ONE_A_SECOND: &str = "[[limit]]\nname = \"l\"\nrate = \"1/s\"\nburst = 2\n";

#[test]
fn python_gitlab_waits_by_itself_and_goes_on() {
    let upstream = Upstream::answering(|_| Reply::ok("{\"username\":\"alice\"}"));
    let gateway = Gateway::start(upstream.address, &format!("[api]\nprefixes = [\"/api/v4\"]\n{ONE_A_SECOND}"));
    let mut client = python("python_gitlab_limits.py");
    let venv = std::env::var_os("TOLLGATE_PY_VENV").map_or_else(|| repository("target/py-clients"), Into::into);
    waits_and_goes_on(client.env("PYTHONPATH", venv.join("python-gitlab-4")), &gateway);
}

#[test]
fn a_caller_of_the_ruby_client_can_wait_and_go_on() {
    let upstream = Upstream::answering(|_| Reply::ok("{\"username\":\"alice\"}"));
    let gateway = Gateway::start(upstream.address, ONE_A_SECOND);
    waits_and_goes_on(Command::new("ruby").arg(repository("tests/clients/ruby_gitlab_limits.rb")), &gateway);
}

#[test]
fn clients_of_v4_work_through_the_gateway() {
    let setup = Setup::of_v4();
    let venv = std::env::var_os("TOLLGATE_PY_VENV").map_or_else(|| repository("target/py-clients"), Into::into);
    let arguments = [&setup.base(), GOOD, BAD];
    let mut client = python("v4_python_gitlab.py");
    setup.wants(client.env("PYTHONPATH", venv.join("python-gitlab-8")).args(arguments), 13);
    setup.wants(Command::new("ruby").arg(repository("tests/clients/v4_ruby_gitlab.rb")).args(arguments), 11);
    let mut client = Command::new("node");
    client.env("NODE_MODULES", repository("target/node-clients"));
    setup.wants(client.arg(repository("tests/clients/v4_gitbeaker.mjs")).args(arguments), 11);
    setup.wants(Command::new(repository("target/node-clients/v4-go-gitlab")).args(arguments), 10);
    assert!(PAT.len() > 255);
    for lines in [format!("PRIVATE-TOKEN: {PAT}\n"), format!("Authorization: Bearer {PAT}\n")] {
        let answer = setup.gateway.ask(&format!("GET /api/v4/user HTTP/1.1\nHost: h\n{lines}\n"));
        assert!(answer.status == 200 && answer.text().contains("\"bob\""), "{}", answer.text());
    }
}
