//! Tokens as passwords of HTTP Basic (`[token] basic`, `[[route]] basic`), and credentials that a route leaves to the backend
//! (`[[route]] unchecked`): what reaches the backend byte for byte, and the programs that need it, which are the real ones.

use crate::harness::*;
use crate::support::*;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

/// One route with Basic beside the API without.
fn config(users: &str) -> String {
    format!("[token]\nbasic = {users}\n[[route]]\npath = \"/g/*\"\nbasic = true\n")
}

fn basic(pair: &str) -> String {
    format!("Authorization: Basic {}\n", STANDARD.encode(pair))
}

fn ask(gateway: &Gateway, target: &str, lines: &str) -> Answer {
    gateway.ask(&format!("GET {target} HTTP/1.1\nHost: h\n{lines}\n"))
}

fn challenges(answer: &Answer) -> Vec<&str> {
    let all = answer.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("www-authenticate"));
    all.map(|(_, value)| value.as_str()).collect()
}

const BOTH: [&str; 2] = ["Bearer realm=\"api\"", "Basic realm=\"api\", charset=\"UTF-8\""];

#[test]
fn the_backend_gets_one_credential_of_the_kind_that_came() {
    let upstream = Upstream::start();
    let mut seen = 0;
    for (users, sent, name) in
        [("\"any\"", "x", "user-0001"), ("\"user\"", "user-0001", "user-0001"), ("[\"oauth2\"]", "oauth2", "oauth2")]
    {
        let gateway = Gateway::start(upstream.address, &config(users));
        let wanted = format!("Basic {}", STANDARD.encode(format!("{name}:{GOOD}")));
        let with_more = format!(
            "{}PRIVATE-TOKEN: {GOOD}\nJOB-TOKEN: j\nCookie: _gitlab_session=x\nX-Tollgate-User: root\nAuthorization: Bearer {GOOD}\n",
            basic(&format!("{sent}:{GOOD}"))
        );
        for lines in [basic(&format!("{sent}:{GOOD}")), with_more] {
            assert_eq!(ask(&gateway, "/g/x?private_token=good-token-0001&a=1", &lines).status, 200, "{users} {lines}");
            let request = upstream.only();
            assert_eq!(request.target, "/g/x?a=1");
            assert_eq!(request.header("Authorization"), Some(wanted.as_str()), "{users}");
            for gone in ["PRIVATE-TOKEN", "JOB-TOKEN", "Cookie", "X-Tollgate-User"] {
                assert_eq!(request.header(gone), None, "{gone}");
            }
            upstream.forget();
            seen += 1;
        }
        // One that came as a header goes on as one.
        assert_eq!(ask(&gateway, "/g/x", &format!("PRIVATE-TOKEN: {GOOD}\n")).status, 200);
        assert_eq!(
            (upstream.only().header("Authorization"), upstream.only().header("PRIVATE-TOKEN")),
            (None, Some(GOOD))
        );
        upstream.forget();
    }
    assert_eq!(seen, 6);
}

#[test]
fn what_another_switch_lets_pass_is_not_beside_the_token() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(
        upstream.address,
        &config("\"any\"").replace("[token]\n", "[token]\nauthorization = \"allow\"\n"),
    );
    let both = format!("{}Authorization: Digest x\n", basic(&format!("root:{GOOD}")));
    let wanted = format!("Basic {}", STANDARD.encode(format!("user-0001:{GOOD}")));
    assert_eq!(ask(&gateway, "/g/x", &both).status, 200);
    assert_eq!(upstream.only().all("Authorization"), ["Digest x", wanted.as_str()]);
}

#[test]
fn whoever_is_not_who_the_token_says_gets_nothing() {
    let upstream = Upstream::start();
    let mut seen = 0;
    for (users, sent) in
        [("\"user\"", "user-0002"), ("\"user\"", ""), ("[\"oauth2\"]", "root"), ("[\"oauth2\"]", "user-0001")]
    {
        let gateway = Gateway::start(upstream.address, &config(users));
        let answer = ask(&gateway, "/g/x", &basic(&format!("{sent}:{GOOD}")));
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (401, "{\"message\":\"401 Unauthorized\"}"),
            "{users} {sent}"
        );
        assert_eq!(challenges(&answer), BOTH);
        seen += 1;
    }
    let gateway = Gateway::start(upstream.address, &config("\"any\""));
    for lines in [
        String::new(),
        basic(&format!("x:{BAD}")),
        basic("x:"),
        format!("Authorization: Basic {}\n", STANDARD.encode(format!("x:{GOOD}")).trim_end_matches('=')),
        format!("Authorization: Basic  {}\n", STANDARD.encode(format!("x:{GOOD}"))),
        basic(&format!("x:{GOOD}\r")),
        basic(GOOD),
        format!("{}PRIVATE-TOKEN: {OTHER}\n", basic(&format!("x:{GOOD}"))),
        format!("{}{}", basic(&format!("x:{GOOD}")), basic(&format!("x:{OTHER}"))),
    ] {
        let answer = ask(&gateway, "/g/x", &lines);
        assert_eq!((answer.status, challenges(&answer)), (401, BOTH.to_vec()), "{lines}");
        seen += 1;
    }
    // Elsewhere Basic is no credential, and nobody is asked for it.
    let answer = ask(&gateway, "/api/v3/user", &basic(&format!("x:{GOOD}")));
    assert_eq!((answer.status, challenges(&answer)), (401, BOTH[..1].to_vec()));
    assert_eq!(ask(&gateway, "/api/v3/user", &format!("PRIVATE-TOKEN: {GOOD}\n{}", basic("a:b"))).status, 200);
    assert_eq!(upstream.only().header("Authorization"), None);
    assert_eq!(seen, 13);
    let log = std::fs::read_to_string(gateway.folder.0.join("access.log")).unwrap();
    assert!(!log.contains(GOOD) && !log.contains(&STANDARD.encode(format!("x:{GOOD}"))[..20]), "{log}");
    assert!(gateway.metric("tollgate_auth_total{reason=\"unknown\",result=\"refused\",source=\"basic\"}") >= 1.0);
}

#[test]
fn with_identity_alone_no_password_goes_on() {
    let upstream = Upstream::start();
    let config = config("\"any\"").replace("[token]\n", "[token]\nforward = \"identity\"\n");
    let gateway = Gateway::start(upstream.address, &config);
    assert_eq!(ask(&gateway, "/g/x", &basic(&format!("x:{GOOD}"))).status, 200);
    let request = upstream.only();
    assert_eq!((request.header("Authorization"), request.header("X-Tollgate-User")), (None, Some("user-0001")));
}

#[test]
fn a_token_is_as_long_as_the_configuration_says() {
    let upstream = Upstream::start();
    let (fits, most, over) = ("t".repeat(300), "u".repeat(2048), "v".repeat(2049));
    let entry = |token: &String| format!("[[token]]\nsha256 = \"{}\"\nuser = \"alice\"\n", sha256_hex(token));
    let tokens: String = [&fits, &most, &over].into_iter().map(entry).collect();
    for (setting, statuses) in [("", [401, 401, 401]), ("max_bytes = 2048\n", [200, 200, 401])] {
        let more = format!(
            "{}[api]\nprefixes = [\"/api/v4\"]\n",
            config("\"any\"").replace("[token]\n", &format!("[token]\n{setting}"))
        );
        let gateway = Gateway::start_with_tokens(upstream.address, &tokens, &more);
        for (token, status) in [&fits, &most, &over].into_iter().zip(statuses) {
            for (target, lines) in [
                ("/api/v4/user".to_owned(), format!("PRIVATE-TOKEN: {token}\n")),
                ("/api/v4/user".to_owned(), format!("Authorization: Bearer {token}\n")),
                (format!("/api/v4/user?private_token={token}"), String::new()),
                ("/g/x".to_owned(), basic(&format!("x:{token}"))),
            ] {
                assert_eq!(ask(&gateway, &target, &lines).status, status, "{} {setting}", token.len());
            }
        }
    }
}

#[test]
fn a_credential_of_another_kind_passes_where_it_is_named_and_never_beside_a_token() {
    let upstream = Upstream::start();
    let config = "[[route]]\npath = \"/api/v3/job\"\nunchecked = [\"job_token\"]\nreason = \"the backend checks job tokens\"\n\
                  [[route]]\npath = \"/api/v3/both\"\nunchecked = [\"job_token\", \"deploy_token\"]\nreason = \"as above\"\n";
    let gateway = Gateway::start(upstream.address, config);
    let token = format!("PRIVATE-TOKEN: {GOOD}\n");
    for (target, lines, passes) in [
        ("/api/v3/job", "JOB-TOKEN: j\n", "JOB-TOKEN"),
        ("/api/v3/job?job_token=j", "", "query"),
        ("/api/v3/both", "Deploy-Token: d\nJob_Token: x\nCookie: a=b\nX-Tollgate-User: root\n", "Deploy-Token"),
        ("/api/v3/job", &format!("{token}Deploy-Token: d\n"), "PRIVATE-TOKEN"),
    ] {
        assert_eq!(ask(&gateway, target, lines).status, 200, "{target} {lines}");
        let request = upstream.only();
        for name in ["JOB-TOKEN", "Deploy-Token", "PRIVATE-TOKEN", "Cookie", "X-Tollgate-User", "Job_Token"] {
            assert_eq!(request.header(name).is_some(), name == passes, "{name}: {}", request.head);
        }
        assert_eq!(request.target, target);
        upstream.forget();
    }
    let mut seen = 0;
    for (target, lines, status) in [
        ("/api/v3/job", "", 401),
        ("/api/v3/job", "Deploy-Token: d\n", 401),
        ("/api/v3/other", "JOB-TOKEN: j\n", 401),
        ("/api/v3/other?job_token=j", "", 401),
        ("/api/v3/other?job_token=j", "PRIVATE-TOKEN: good-token-0001\n", 401),
        ("/api/v3/job?job_token=k", "JOB-TOKEN: j\n", 401),
        ("/api/v3/job?job_token[]=j", "", 401),
        ("/api/v3/job", "JOB-TOKEN:\n", 401),
        ("/api/v3/both", "JOB-TOKEN: j\nDeploy-Token: d\n", 401),
        ("/api/v3/job?sudo=root", "JOB-TOKEN: j\n", 403),
        ("/api/v3/job", "JOB-TOKEN: j\nSUDO: root\n", 403),
        ("/api/v3/job", "JOB-TOKEN: j\nPRIVATE-TOKEN: good-token-0001\n", 401),
        ("/api/v3/job?job_token=j", "PRIVATE-TOKEN: good-token-0001\n", 401),
        ("/api/v3/job?private_token=good-token-0001", "JOB-TOKEN: j\n", 401),
        ("/api/v3/job", "JOB-TOKEN: j\nPRIVATE-TOKEN: bad-token-9999\n", 401),
    ] {
        assert_eq!(ask(&gateway, target, lines).status, status, "{target} {lines}");
        seen += 1;
    }
    // A field of a body would outrank the header.
    let body = "private_token=good-token-0001";
    let mut client = gateway.client();
    client.send_head(&format!(
        "POST /api/v3/job HTTP/1.1\nHost: h\nJOB-TOKEN: j\nContent-Type: application/x-www-form-urlencoded\nContent-Length: {}\n\n{body}",
        body.len()
    ));
    assert_eq!((client.answer().status, seen), (401, 15));
    assert!(
        upstream.seen().iter().all(|request| !request.complete || request.method == "GET"),
        "{:?}",
        upstream.seen()
    );
    let check = run(tollgate().args(["check", "--offline", "--config"]).arg(gateway.folder.0.join("tollgate.toml")));
    assert!(
        stdout(&check).contains("  /api/v3/job  (any method; a token, or a credential that the backend checks itself)"),
        "{}",
        stdout(&check)
    );
}

#[test]
fn a_job_clones_with_its_own_token_by_gitlabs_name_for_it() {
    let upstream = Upstream::start();
    let more = "[[route]]\npath = \"/j/*\"\nbasic = true\nunchecked = [\"job_token\"]\nreason = \"jobs clone\"\n";
    let gateway = Gateway::start(upstream.address, &(config("\"any\"") + more));
    let job = basic("gitlab-ci-token:job-1");
    for lines in
        [job.clone(), format!("{job}JOB-TOKEN: job-1\n"), format!("{job}{job}Cookie: a=b\nX-Tollgate-User: root\n")]
    {
        assert_eq!(ask(&gateway, "/j/x", &lines).status, 200, "{lines}");
        let seen = upstream.only();
        let wanted = job.trim_end().strip_prefix("Authorization: ").unwrap();
        assert!(seen.all("Authorization").iter().all(|value| *value == wanted), "{}", seen.head);
        let others = ["PRIVATE-TOKEN", "X-Tollgate-User", "Cookie"];
        assert!(
            !seen.all("Authorization").is_empty() && others.iter().all(|name| seen.header(name).is_none()),
            "{}",
            seen.head
        );
        upstream.forget();
    }
    let mut refused = 0;
    for (target, lines) in [
        ("/g/x", job.clone()),
        ("/api/v3/user", job.clone()),
        ("/j/x", format!("{job}PRIVATE-TOKEN: {GOOD}\n")),
        ("/j/x", format!("{job}{}", basic(&format!("x:{GOOD}")))),
        ("/j/x", format!("{job}Authorization: Bearer {GOOD}\n")),
        ("/j/x", format!("{job}JOB-TOKEN: job-2\n")),
        ("/j/x", format!("{job}{}", basic("gitlab-ci-token:job-2"))),
        ("/j/x", basic("gitlab-ci-token:")),
        ("/j/x", basic("GitLab-CI-Token:job-1")),
        ("/j/x", basic("x:job-1")),
        ("/j/x?private_token=good-token-0001", job.clone()),
    ] {
        assert_eq!(ask(&gateway, target, &lines).status, 401, "{target} {lines}");
        refused += 1;
    }
    assert_eq!(refused, 11);
    assert!(upstream.seen().is_empty());
    // Somebody's token stays a token, and goes on for its user.
    assert_eq!(ask(&gateway, "/j/x", &basic(&format!("x:{GOOD}"))).status, 200);
    let wanted = format!("Basic {}", STANDARD.encode(format!("user-0001:{GOOD}")));
    assert_eq!(upstream.only().header("Authorization"), Some(wanted.as_str()));
}

/// tests/backend/services.py, ended by its pid when it is dropped.
struct Services {
    address: SocketAddr,
    child: Child,
    folder: Folder,
}

impl Services {
    fn start(user: &str) -> Self {
        let folder = Folder::new("test");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let child = Command::new("/usr/bin/python3")
            .arg("-B")
            .arg(repository("tests/backend/services.py"))
            .arg(address.port().to_string())
            .arg(&folder.0)
            .args([user, GOOD])
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("python3 cannot be started: {error}; {HINT}"));
        eventually("services.py listens", || TcpStream::connect(address).is_ok());
        Self { address, child, folder }
    }

    /// The fields of a name in all requests so far.
    fn seen(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.0.join("seen.jsonl")).unwrap_or_default();
        let requests = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let fields = requests.flat_map(|request| request["fields"].as_array().unwrap().clone());
        let named = fields.filter(|field| field[0].as_str().unwrap().eq_ignore_ascii_case(name));
        named.map(|field| field[1].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A user's machine: nothing of the one that the tests run on.
struct Home {
    folder: Folder,
    services: Services,
    gateway: Gateway,
}

impl Home {
    fn new() -> Self {
        let services = Services::start("user-0001");
        let config = "[token]\nbasic = \"any\"\n\
                      [[route]]\npath = \"/:group/:project/info/refs\"\nbasic = true\nquery_token = \"refuse\"\n\
                      [[route]]\npath = \"/:group/:project/git-upload-pack\"\nmethods = [\"POST\"]\nbasic = true\n\
                      [[route]]\npath = \"/:group/:project/git-receive-pack\"\nmethods = [\"POST\"]\nbasic = true\n\
                      [[route]]\npath = \"/api/v4/packages/*\"\nbasic = true\n";
        let gateway = Gateway::start(services.address, config);
        Self { folder: Folder::new("test"), services, gateway }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder.0)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", &self.folder.0);
        command.env("GIT_TERMINAL_PROMPT", "0").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
        command
    }

    fn ok(&self, command: &mut Command) -> Output {
        let output = run(command);
        assert!(output.status.success(), "{command:?}\n{}{}", stdout(&output), stderr(&output));
        output
    }

    fn url(&self, user_info: &str) -> String {
        format!("http://{user_info}{}", self.gateway.address)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    fn git(&self, arguments: &[&str]) -> Command {
        let mut command = self.command("git");
        command
            .args([
                "-c",
                "user.name=A",
                "-c",
                "user.email=a@b",
                "-c",
                "init.defaultBranch=main",
                "-c",
                "protocol.version=2",
            ])
            .args(arguments);
        command
    }
}

#[test]
fn git_clones_fetches_and_pushes() {
    let home = Home::new();
    let bare = home.services.folder.0.join("group/project.git");
    home.ok(&mut home.git(&["init", "-q", "--bare", bare.to_str().unwrap()]));
    home.ok(&mut home.git(&["-C", bare.to_str().unwrap(), "config", "http.receivepack", "true"]));
    let url = home.url(&format!("whoever:{GOOD}@")) + "/group/project.git";
    home.ok(&mut home.git(&["clone", "-q", &url, "one"]));
    // Small packs are sent with their length, large ones in chunks; requests with many names are compressed.
    let mut state = 20_261_129_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let noise: Vec<u8> = (0..3_000_000).map(|_| next()).collect();
    std::fs::write(home.at("one/noise"), noise).unwrap();
    std::fs::write(home.at("one/readme"), "private_token=x&job_token=y").unwrap();
    home.ok(&mut home.git(&["-C", "one", "add", "."]));
    home.ok(&mut home.git(&["-C", "one", "commit", "-q", "-m", "first"]));
    for number in 0..30 {
        home.ok(&mut home.git(&["-C", "one", "branch", &format!("branch-{number}")]));
    }
    home.ok(&mut home.git(&["-C", "one", "push", "-q", "origin", "--all"]));
    home.ok(&mut home.git(&["clone", "-q", &url, "two"]));
    assert_eq!(std::fs::read(home.at("one/noise")).unwrap(), std::fs::read(home.at("two/noise")).unwrap());
    for number in 0..60 {
        home.ok(&mut home.git(&["-C", "one", "commit", "-q", "--allow-empty", "-m", &number.to_string()]));
    }
    home.ok(&mut home.git(&["-C", "one", "push", "-q", "origin", "HEAD"]));
    home.ok(&mut home.git(&["-C", "two", "-c", "protocol.version=0", "pull", "-q"]));
    let wanted = format!("Basic {}", STANDARD.encode(format!("user-0001:{GOOD}")));
    let credentials = home.services.seen("Authorization");
    assert!(credentials.len() > 8 && credentials.iter().all(|seen| *seen == wanted), "{credentials:?}");
    assert!(home.services.seen("Transfer-Encoding").iter().any(|coding| coding == "chunked"), "no push in chunks");
    assert!(home.services.seen("Content-Encoding").iter().any(|coding| coding == "gzip"), "no compressed request");
    // Another token, and none.
    for user_info in [format!("alice:{BAD}@"), String::new(), format!("{GOOD}@")] {
        let url = home.url(&user_info) + "/group/project.git";
        let output = run(&mut home.git(&["clone", "-q", &url, "three"]));
        assert!(!output.status.success() && !home.at("three").exists(), "{user_info}");
    }
}

#[test]
fn curl_pip_and_npm_work_behind_basic() {
    let home = Home::new();
    let index = "/api/v4/packages/pypi/simple";
    let curl = |user: &str| {
        let arguments = ["-sS", "-o", "/dev/null", "-w", "%{http_code}", "-u", user];
        stdout(&home.ok(home.command("curl").args(arguments).arg(home.url("") + index + "/thing/")))
    };
    assert_eq!((curl(&format!("me:{GOOD}")).as_str(), curl(&format!("me:{BAD}")).as_str()), ("200", "401"));

    // As twine uploads.
    let file = "thing-1.0-py3-none-any.whl";
    let packages = home.url("") + "/api/v4/packages/pypi";
    home.ok(home
        .command("curl")
        .args(["-sS", "-f", "-o", file, "-u", &format!("me:{GOOD}")])
        .arg(format!("{packages}/files/{file}")));
    let form = [":action=file_upload", "name=thing", "version=1.0", "description=private", &format!("content=@{file}")];
    let mut upload = home.command("curl");
    upload.args(["-sS", "-w", "%{http_code}", "-u", &format!("__token__:{GOOD}")]);
    upload.args(form.iter().flat_map(|field| ["-F", *field])).arg(&packages);
    assert_eq!(stdout(&home.ok(&mut upload)), "201");

    let python = repository("target/py-clients/bin/python");
    let pip = |token: &str, folder: &str| {
        let url = home.url(&format!("__token__:{token}@")) + index;
        let mut command = home.command(python.to_str().unwrap());
        command.args([
            "-m",
            "pip",
            "install",
            "-q",
            "--no-input",
            "--no-cache-dir",
            "--disable-pip-version-check",
            "--isolated",
        ]);
        run(command.args(["--no-deps", "--target", folder, "--index-url", &url, "thing"]))
    };
    let output = pip(GOOD, "site");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(home.at("site/thing.py")).unwrap(), "VALUE = 7\n");
    assert!(!pip(BAD, "none").status.success());

    let registry = home.url("") + "/api/v4/packages/npm/";
    let place = registry.strip_prefix("http:").unwrap();
    let _ = std::fs::write(home.at("package.json"), "{}");
    let npm = |auth: &str| {
        let rc = format!(
            "@group:registry={registry}\n{place}:{auth}\nupdate-notifier=false\naudit=false\nfund=false\nfetch-retries=0\n"
        );
        std::fs::write(home.at(".npmrc"), rc).unwrap();
        let _ = std::fs::remove_dir_all(home.at("node_modules"));
        let output = run(home.command("npm").args(["install", "--no-save", "--no-package-lock", "@group/thing"]));
        (output.status.success(), home.at("node_modules/@group/thing/package.json").exists(), stderr(&output))
    };
    for (auth, works) in [
        (format!("_auth={}", STANDARD.encode(format!("me:{GOOD}"))), true),
        (format!("_authToken={GOOD}"), true),
        (format!("_auth={}", STANDARD.encode(format!("me:{BAD}"))), false),
    ] {
        let (succeeded, is_there, errors) = npm(&auth);
        assert_eq!((succeeded, is_there), (works, works), "{auth}: {errors}");
    }
    let wanted = format!("Basic {}", STANDARD.encode(format!("user-0001:{GOOD}")));
    assert!(home.services.seen("Authorization").iter().all(|seen| *seen == wanted));
    assert!(home.services.seen("PRIVATE-TOKEN").iter().all(|seen| seen == GOOD));
}
