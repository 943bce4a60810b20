//! `[[listener]]`, asked by clients that nobody here wrote: curl and the openssl command. TLS and certificates, client
//! certificates, the PROXY protocol, redirects, and what a reload does to all of it.

use crate::harness::{BAD, Client, Folder, GOOD, Gateway, Upstream, eventually, free_port};
use crate::servers::tls::Authority;
use crate::support::{stderr, stdout};
use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// An address that nobody listens on.
fn free() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}

/// A gateway with the harness's own listener and one more.
fn gateway(upstream: &Upstream, at: SocketAddr, keys: &str) -> Gateway {
    Gateway::start(upstream.address, &format!("[[listener]]\naddress = \"{at}\"\n{keys}"))
}

fn files(pair: &(PathBuf, PathBuf)) -> String {
    format!("{{ chain = \"{}\", key = \"{}\" }}", pair.0.display(), pair.1.display())
}

/// curl to a name that is this machine; what it prints is the body, the status and the protocol.
fn curl(ca: &Path, name: &str, at: SocketAddr, more: &[&str]) -> Output {
    let url = format!("https://{name}:{}/api/v3/projects", at.port());
    Command::new("curl")
        .args(["-sS", "--max-time", "10", "--cacert"])
        .arg(ca)
        .args(["--resolve", &format!("{name}:{}:127.0.0.1", at.port())])
        .args(["-H", &format!("PRIVATE-TOKEN: {GOOD}"), "-w", "\n%{http_code} %{http_version}"])
        .args(more)
        .arg(url)
        .output()
        .unwrap()
}

fn status(output: &Output) -> String {
    stdout(output).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn each_name_has_its_certificate_and_unknown_names_get_the_first() {
    let authority = Authority::new();
    let (upstream, at) = (Upstream::start(), free());
    let first = authority.issue_named("first", "DNS:first.test", 2);
    let wild = authority.issue_named("wild", "DNS:*.wild.test,DNS:second.test", 2);
    let exact = authority.issue_named("exact", "DNS:exact.wild.test", 2);
    let all = [&first, &wild, &exact].map(files).join(", ");
    let gateway = gateway(&upstream, at, &format!("certificates = [{all}]\nhsts = \"365d\"\n"));
    let served = |name: &str| {
        let connect = format!("127.0.0.1:{}", at.port());
        let output = Command::new("sh")
            .args(["-c", &format!("echo | openssl s_client -connect {connect} -servername {name} 2>/dev/null | openssl x509 -noout -subject")])
            .output()
            .unwrap();
        stdout(&output).trim().rsplit("CN = ").next().unwrap_or_default().to_owned()
    };
    for (name, certificate) in [
        ("first.test", "first"),
        ("second.test", "wild"),
        ("SECOND.test", "wild"),
        ("any.wild.test", "wild"),
        ("exact.wild.test", "exact"),
        ("a.b.wild.test", "first"),
        ("wild.test", "first"),
        ("other.test", "first"),
    ] {
        assert_eq!(served(name), certificate, "{name}");
    }
    let ca = authority.ca();
    let answer = curl(&ca, "any.wild.test", at, &["-i", "--http1.1"]);
    assert_eq!(status(&answer), "200 1.1", "{}", stderr(&answer));
    assert!(stdout(&answer).contains("Strict-Transport-Security: max-age=31536000\r\n"), "{}", stdout(&answer));
    let seen = upstream.only();
    assert_eq!(seen.all("X-Forwarded-Proto"), ["https"]);
    assert_eq!(seen.all("X-Forwarded-Port"), [at.port().to_string()]);
    // A refusal says it as well, and a name without a certificate is the client's to refuse.
    let refused = curl(&ca, "first.test", at, &["-i", "--http1.1", "-H", &format!("PRIVATE-TOKEN: {BAD}")]);
    assert!(
        stdout(&refused).contains("Strict-Transport-Security") && status(&refused) == "401 1.1",
        "{}",
        stdout(&refused)
    );
    let wrong = curl(&ca, "other.test", at, &[]);
    assert!(stderr(&wrong).contains("no alternative certificate subject name"), "{}", stderr(&wrong));
    let stranger = Authority::new();
    assert_eq!(status(&curl(&stranger.ca(), "first.test", at, &[])), "000 0");
    eventually("the client's alert is counted", || {
        gateway.metric("tollgate_handshakes_total{result=\"refused_by_client\"}") >= 1.0
    });
    assert!(gateway.metric("tollgate_handshakes_total{result=\"ok\"}") >= 10.0);
}

#[test]
fn versions_are_those_of_the_profile() {
    let authority = Authority::new();
    let (upstream, at) = (Upstream::start(), [free(), free()]);
    let certificate = files(&authority.issue_named("a", "DNS:a.test", 2));
    let listener = |at: SocketAddr, tls: &str| {
        format!("[[listener]]\naddress = \"{at}\"\ncertificates = [{certificate}]\ntls = \"{tls}\"\n")
    };
    let text = listener(at[0], "intermediate") + &listener(at[1], "modern");
    let gateway = Gateway::start(upstream.address, &text);
    let ca = authority.ca();
    let spoken = |at: SocketAddr, version: &str| {
        let connect = format!("127.0.0.1:{}", at.port());
        let mut command = Command::new("openssl");
        command
            .args(["s_client", "-connect", &connect, "-servername", "a.test", version])
            .stdin(std::process::Stdio::null());
        let output = command.arg("-CAfile").arg(&ca).output().unwrap();
        output.status.success() && stdout(&output).contains("Verify return code: 0")
    };
    for (version, intermediate, modern) in
        [("-tls1_3", true, true), ("-tls1_2", true, false), ("-tls1_1", false, false), ("-tls1", false, false)]
    {
        assert_eq!((spoken(at[0], version), spoken(at[1], version)), (intermediate, modern), "{version}");
    }
    assert!(gateway.metric("tollgate_handshakes_total{result=\"incompatible\"}") >= 1.0);
    // Plain text on a listener with TLS gets no answer, and is counted.
    let mut plain = Client::connect(at[0]);
    offer(&mut plain, b"GET /api/v3/projects HTTP/1.1\r\nHost: h\r\n\r\n");
    let alert = plain.next_bytes().unwrap_or_default();
    assert!(!alert.starts_with(b"HTTP"), "{alert:?}");
    eventually("it is counted", || gateway.metric("tollgate_handshakes_total{result=\"malformed\"}") >= 1.0);
    assert_eq!(upstream.seen().len(), 0);
}

#[test]
fn client_certificates_are_demanded_and_their_subject_is_told() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (upstream, at) = (Upstream::start(), [free(), free()]);
    let certificate = files(&authority.issue_named("a", "DNS:a.test", 2));
    let client = authority.issue_named("client", "DNS:client.test", 2);
    let other = stranger.issue_named("other", "DNS:client.test", 2);
    let ended = authority.issue_named("ended", "DNS:client.test", -1);
    let ca = authority.ca();
    let listener = |at: SocketAddr, mode: &str| {
        format!(
            "[[listener]]\naddress = \"{at}\"\ncertificates = [{certificate}]\nclient_ca = \"{}\"\nclient_certificate = \"{mode}\"\n",
            ca.display()
        )
    };
    let gateway = Gateway::start(upstream.address, &(listener(at[0], "required") + &listener(at[1], "optional")));
    let with = |at: SocketAddr, pair: Option<&(PathBuf, PathBuf)>| {
        let mut more = vec!["--http1.1", "-H", "X-Tollgate-Client-Certificate: CN=forged"];
        let paths = pair.map(|pair| [pair.0.to_str().unwrap(), pair.1.to_str().unwrap()]);
        if let Some([chain, key]) = &paths {
            more.extend(["--cert", chain, "--key", key]);
        }
        status(&curl(&ca, "a.test", at, &more))
    };
    assert_eq!(with(at[0], Some(&client)), "200 1.1");
    let subject = "CN=client,O=tollgate";
    assert_eq!(upstream.only().all("X-Tollgate-Client-Certificate"), [subject]);
    let line = gateway.access_log().pop().unwrap();
    assert_eq!(line["client_certificate"], subject);
    upstream.forget();
    for refused in [None, Some(&other), Some(&ended)] {
        assert_eq!(with(at[0], refused), "000 0", "{refused:?}");
    }
    assert_eq!(with(at[1], Some(&other)), "000 0", "optional is not for those of others");
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(with(at[1], None), "200 1.1");
    assert_eq!(upstream.only().all("X-Tollgate-Client-Certificate"), Vec::<&str>::new());
    for (result, least) in [("no_client_certificate", 1.0), ("client_certificate", 3.0)] {
        assert!(gateway.metric(&format!("tollgate_handshakes_total{{result=\"{result}\"}}")) >= least, "{result}");
    }
    // Without a certificate that counts, a token alone does not come in; with one, a bad token does not either.
    let more = ["--http1.1", "--cert", client.0.to_str().unwrap(), "--key", client.1.to_str().unwrap(), "-H"];
    let bad = curl(&ca, "a.test", at[0], &[&more[..], &[&format!("PRIVATE-TOKEN: {BAD}")]].concat());
    assert_eq!(status(&bad), "401 1.1");
}

#[test]
fn a_reload_takes_a_new_certificate_and_keeps_the_old_one_if_the_new_one_is_broken() {
    let authority = Authority::new();
    let (old, new) = (authority.issue_named("old", "DNS:a.test", 2), authority.issue_named("new", "DNS:a.test", 2));
    let folder = Folder::new("certificates");
    let pair = (folder.0.join("api.pem"), folder.0.join("api.key"));
    let put = |from: &(PathBuf, PathBuf)| {
        std::fs::copy(&from.0, &pair.0).unwrap();
        std::fs::copy(&from.1, &pair.1).unwrap();
    };
    put(&old);
    let (upstream, at) = (Upstream::start(), free());
    let gateway = gateway(&upstream, at, &format!("certificates = [{}]\n", files(&pair)));
    let mut kept = TlsClient::connect(at, "a.test", &authority.ca());
    assert_eq!((kept.get().as_str(), subject(at).as_str()), ("HTTP/1.1 200 OK", "old"));
    // The key of another certificate.
    std::fs::copy(&new.0, &pair.0).unwrap();
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 500 && answer.text().contains("is not the key of the certificate"), "{}", answer.text());
    assert_eq!(subject(at), "old");
    put(&new);
    let answer = gateway.admin_post("/reload");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(subject(at), "new");
    assert_eq!(kept.get(), "HTTP/1.1 200 OK", "a connection outlives the certificate that it began with");
}

#[test]
fn certificates_that_change_are_noticed_without_a_reload() {
    let authority = Authority::new();
    let (old, new) = (authority.issue_named("old", "DNS:a.test", 2), authority.issue_named("new", "DNS:a.test", 2));
    let folder = Folder::new("certificates");
    let pair = (folder.0.join("api.pem"), folder.0.join("api.key"));
    let put = |from: &(PathBuf, PathBuf)| {
        std::fs::copy(&from.0, &pair.0).unwrap();
        std::fs::copy(&from.1, &pair.1).unwrap();
    };
    put(&old);
    let (upstream, at) = (Upstream::start(), free());
    let gateway = gateway(&upstream, at, &format!("certificates = [{}]\n", files(&pair)));
    std::fs::write(&pair.1, "broken").unwrap();
    eventually("the broken one is reported", || gateway.process_log().contains("the old ones stay in use"));
    assert_eq!(subject(at), "old");
    put(&new);
    eventually("the new one is used", || subject(at) == "new");
    assert!(gateway.process_log().contains("certificates reloaded"), "{}", gateway.process_log());
}

#[test]
fn tickets_do_not_outlive_the_authority_of_the_clients() {
    let (authority, next) = (Authority::new(), Authority::new());
    let (upstream, at) = (Upstream::start(), free());
    let certificate = files(&authority.issue_named("a", "DNS:a.test", 2));
    let client = authority.issue_named("client", "DNS:client.test", 2);
    let keys = format!("certificates = [{certificate}]\nclient_ca = \"{}\"\n", authority.ca().display());
    let gateway = gateway(&upstream, at, &keys);
    let folder = Folder::new("tickets");
    let session = folder.0.join("session");
    // Asks for an answer, so that the ticket of TLS 1.3 has come, and says whether the session was taken up again.
    let resumed = |how: &str| {
        let (session, connect) = (session.display(), format!("127.0.0.1:{}", at.port()));
        let (cert, key) = (client.0.display(), client.1.display());
        let script = format!(
            "(printf 'GET /api/v3/projects HTTP/1.1\\r\\nHost: a.test\\r\\nPRIVATE-TOKEN: {GOOD}\\r\\n\\r\\n'; sleep 0.5) | \
             openssl s_client -connect {connect} -servername a.test -cert {cert} -key {key} {how} {session} 2>&1"
        );
        let output = stdout(&Command::new("sh").args(["-c", &script]).output().unwrap());
        (output.contains("Reused, TLSv1.3"), output.contains("HTTP/1.1 200 OK"))
    };
    assert_eq!(resumed("-sess_out"), (false, true));
    assert_eq!(resumed("-sess_in"), (true, true), "sessions are taken up again");
    gateway.rewrite(|text| text.replace(&authority.ca().display().to_string(), &next.ca().display().to_string()));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    assert_eq!(resumed("-sess_in"), (false, false), "who is not trusted any more does not come in by a ticket");
}

#[test]
fn what_is_wrong_with_certificates_is_an_error_of_the_configuration() {
    let authority = Authority::new();
    let [good, other] = ["good", "other"].map(|name| authority.issue_named(name, "DNS:a.test", 200));
    let ended = authority.issue_named("ended", "DNS:a.test", -1);
    let soon = authority.issue_named("soon", "DNS:a.test", 3);
    let folder = Folder::new("check");
    std::fs::write(folder.0.join("empty.pem"), "").unwrap();
    let empty = folder.0.join("empty.pem");
    let check = |keys: &str| {
        let text = format!(
            "[[upstream]]\nname = \"api\"\nservers = [\"127.0.0.1:1\"]\n[admin]\nlisten = \"none\"\n[[listener]]\naddress = \"{}\"\n{keys}",
            free()
        );
        let path = folder.write("c.toml", &text);
        let output = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["check", "--offline", "--config"])
            .arg(path)
            .output()
            .unwrap();
        (output.status.success(), stdout(&output) + &stderr(&output))
    };
    let certificates = |pair: &(PathBuf, PathBuf)| format!("certificates = [{}]\n", files(pair));
    let mut seen = 0;
    for (keys, ok, said) in [
        (certificates(&good), true, "ok"),
        (certificates(&ended), true, "listener[0].certificates: "),
        (certificates(&ended), true, "clients refuse it"),
        (certificates(&soon), true, "ends at"),
        (certificates(&(good.0.clone(), other.1.clone())), false, "is not the key of the certificate"),
        (certificates(&(empty.clone(), good.1.clone())), false, "holds no certificate"),
        (certificates(&(good.0.clone(), empty.clone())), false, "empty.pem"),
        (certificates(&(folder.0.join("none"), good.1.clone())), false, "No such file"),
        (certificates(&good) + &format!("client_ca = \"{}\"\n", empty.display()), false, "client_ca"),
        (certificates(&good) + "redirect_to_https = 443\n", false, "goes without certificates"),
        ("hsts = \"1d\"\n".into(), false, "goes with certificates only"),
        ("client_ca = \"x\"\n".into(), false, "goes with certificates only"),
        ("redirect_to_https = 0\n".into(), false, "is out of range"),
        ("handshake_timeout = \"1ms\"\n".into(), false, "is too short"),
        ("proxy_protocol = [\"x\"]\n".into(), false, "is not a network"),
    ] {
        let (succeeded, text) = check(&keys);
        assert!(succeeded == ok && text.contains(said), "{keys}: {text}");
        seen += 1;
    }
    assert_eq!(seen, 15);
}

pub(crate) fn announce(at: SocketAddr, header: &[u8]) -> Client {
    let mut client = Client::connect(at);
    offer(&mut client, header);
    client
}

/// Sends to a listener that may have closed the connection already.
pub(crate) fn offer(client: &mut Client, bytes: &[u8]) {
    let _ = client.socket.write_all(bytes);
}

pub(crate) fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x20 | command, family]);
    header.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
    header.extend(rest);
    header
}

#[test]
fn the_proxy_protocol_names_the_client() {
    let (upstream, at) = (Upstream::start(), free());
    let gateway = gateway(&upstream, at, "proxy_protocol = [\"127.0.0.0/8\"]\n");
    let request =
        format!("GET /api/v3/projects HTTP/1.1\nHost: h\nX-Forwarded-For: 6.6.6.6\nPRIVATE-TOKEN: {GOOD}\n\n");
    let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 1, 2, 3, 4];
    for (header, client) in [
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 50000 443\r\n".to_vec(), "192.0.2.7"),
        (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1"),
        (binary(1, 0x11, &v4), "192.0.2.7"),
        (binary(0, 0x11, &v4), "127.0.0.1"),
        (binary(0, 0, &[]), "127.0.0.1"),
    ] {
        upstream.forget();
        let mut client_of = announce(at, &header);
        for _ in 0..2 {
            client_of.send_head(&request);
            assert_eq!(client_of.answer().status, 200);
        }
        // What the client says of itself is nobody's who is trusted.
        assert!(upstream.seen().iter().all(|seen| seen.all("X-Forwarded-For") == [client]), "{client}");
        assert_eq!(gateway.access_log().pop().unwrap()["client"], client);
    }
    upstream.forget();
    // It is mandatory, and nothing is read on behind one that is wrong.
    for header in [
        &b""[..],
        b"PROXY TCP4 192.0.2.7 10.0.0.1 50000\r\n",
        b"PROXY TCP4 192.0.2.7 10.0.0.1 50000 443\n",
        b"PROXY TCP6 192.0.2.7 10.0.0.1 50000 443\r\n",
        &binary(1, 0x12, &v4),
        &binary(1, 0x11, &v4[..8]),
        &[b"PROXY TCP4 ", &[b'1'; 200][..]].concat(),
    ] {
        let mut client = announce(at, header);
        offer(&mut client, request.replace('\n', "\r\n").as_bytes());
        assert!(client.try_answer().is_none(), "{header:?}");
    }
    // A client sees the end of its connection before the gateway has counted it.
    eventually("each is counted", || gateway.metric("tollgate_handshakes_total{result=\"proxy_protocol\"}") == 7.0);
    assert_eq!(upstream.seen().len(), 0);
    eventually("it is told", || gateway.process_log().contains("does not begin with a PROXY protocol header"));
}

#[test]
fn the_proxy_protocol_is_taken_from_named_networks_alone_and_in_pieces() {
    let (upstream, at) = (Upstream::start(), [free(), free()]);
    let authority = Authority::new();
    let certificate = files(&authority.issue_named("a", "DNS:a.test", 2));
    let text = format!(
        "[[listener]]\naddress = \"{}\"\nproxy_protocol = [\"10.0.0.0/8\"]\n\
         [[listener]]\naddress = \"{}\"\nproxy_protocol = [\"127.0.0.1\"]\nhandshake_timeout = \"3s\"\ncertificates = [{certificate}]\n",
        at[0], at[1]
    );
    let gateway = Gateway::start(upstream.address, &text);
    let header = b"PROXY TCP4 10.0.0.9 10.0.0.1 50000 443\r\n";
    let mut stranger = announce(at[0], header);
    offer(
        &mut stranger,
        format!("GET /api/v3/projects HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {GOOD}\r\n\r\n").as_bytes(),
    );
    assert!(stranger.try_answer().is_none());
    eventually("it is told", || gateway.process_log().contains("its network is not in proxy_protocol"));
    // In front of TLS, by haproxy's own words, which curl can say.
    let answer = curl(&authority.ca(), "a.test", at[1], &["--http1.1", "--haproxy-protocol"]);
    assert_eq!(status(&answer), "200 1.1", "{}", stderr(&answer));
    assert_eq!(upstream.only().all("X-Forwarded-Proto"), ["https"]);
    // One that does not go on is closed in time, before and within TLS.
    let silent = [&header[..10], header].map(|start| announce(at[1], start));
    for mut client in silent {
        assert!(client.is_closed_within(crate::harness::PATIENCE));
    }
    eventually("they are counted", || gateway.metric("tollgate_handshakes_total{result=\"timeout\"}") == 2.0);
}

#[test]
fn a_redirect_never_carries_a_token() {
    let (upstream, at) = (Upstream::start(), free());
    let gateway = gateway(&upstream, at, "redirect_to_https = 8443\n");
    let ask = |head: &str| {
        let mut client = Client::connect(at);
        client.send_head(head);
        let answer = client.answer();
        (answer.status, answer.header("Location").unwrap_or_default().to_owned())
    };
    let moved = |location: &str| (308, format!("https://{location}"));
    assert_eq!(
        ask("GET /api/v3/projects?page=2&x=%2F HTTP/1.1\nHost: h.test:80\n\n"),
        moved("h.test:8443/api/v3/projects?page=2&x=%2F")
    );
    assert_eq!(ask("GET /api/v3/projects HTTP/1.1\nHost: [::1]\n\n"), moved("[::1]:8443/api/v3/projects"));
    let refused = (403, String::new());
    for head in [
        format!("GET /api/v3/projects HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n"),
        format!("GET /api/v3/projects HTTP/1.1\nHost: h\nAuthorization: Bearer {GOOD}\n\n"),
        format!("GET /api/v3/projects?private_token={GOOD} HTTP/1.1\nHost: h\n\n"),
        format!("GET /api/v3/projects?%70rivate_token={GOOD} HTTP/1.1\nHost: h\n\n"),
        "GET /api/v3/projects?access_token=x HTTP/1.1\nHost: h\n\n".into(),
        "POST /api/v3/projects HTTP/1.1\nHost: h\nContent-Length: 0\n\n".into(),
        "GET /api/v3/projects HTTP/1.1\nHost: h\nContent-Length: 1\n\nx".into(),
    ] {
        assert_eq!(ask(&head), refused, "{head}");
    }
    assert_eq!(ask("GET /elsewhere HTTP/1.1\nHost: h\n\n").0, 404);
    assert_eq!(ask("GET /api/v3/a/../b HTTP/1.1\nHost: h\n\n").0, 400);
    assert_eq!(upstream.seen().len(), 0);
    let reasons: Vec<_> = gateway.access_log().iter().map(|line| line["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reasons[..3], ["redirect_to_https", "redirect_to_https", "plain_http"]);
}

#[test]
fn listeners_come_and_go_with_a_reload() {
    let (upstream, [kept, gone, new]) = (Upstream::start(), [free(), free(), free()]);
    let folder = Folder::new("sockets");
    let (first, second) = (folder.0.join("a.sock"), folder.0.join("b.sock"));
    let text = format!(
        "[[listener]]\naddress = \"{kept}\"\n[[listener]]\naddress = \"{gone}\"\n[[listener]]\naddress = \"unix:{}\"\n",
        first.display()
    );
    let gateway = Gateway::start(upstream.address, &text);
    let get = format!("GET /api/v3/projects HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n");
    let status = |at: SocketAddr| {
        let mut client = Client::try_connect(at)?;
        client.send_head(&get);
        client.try_answer().map(|answer| answer.status)
    };
    assert_eq!((status(kept), status(gone), status(new), first.exists()), (Some(200), Some(200), None, true));
    let mut old = Client::connect(gone);
    old.send_head(&get);
    assert_eq!(old.answer().status, 200);
    gateway.rewrite(|text| text.replace(&format!("\"{gone}\""), &format!("\"{new}\"")).replace("a.sock", "b.sock"));
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 200 && answer.text().contains("listener"), "{}", answer.text());
    assert_eq!((status(kept), status(new)), (Some(200), Some(200)));
    eventually("the old address is closed", || TcpStream::connect(gone).is_err());
    eventually("so is the old socket, and its file is gone", || !first.exists() && second.exists());
    old.send_head(&get);
    assert_eq!(old.answer().status, 200, "a connection outlives its listener");
    // One that cannot be bound changes nothing, the others included.
    let holder = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (before, taken) = (new.to_string(), holder.local_addr().unwrap().to_string());
    gateway.rewrite(|text| text.replace(&before, &taken).replace("[server]", "[server]\nshutdown_grace = \"9s\""));
    let answer = gateway.admin_post("/reload");
    assert!(answer.status == 500 && answer.text().contains("cannot be bound"), "{}", answer.text());
    assert_eq!((status(kept), status(new)), (Some(200), Some(200)));
    // The admin listener moves as well.
    let admin = free();
    gateway.rewrite(|text| text.replace(&taken, &before).replace(&gateway.admin.to_string(), &admin.to_string()));
    assert_eq!(gateway.admin_post("/reload").status, 200);
    let mut moved = Client::connect(admin);
    moved.send_head("GET /readyz HTTP/1.1\nHost: localhost\n\n");
    assert_eq!(moved.answer().status, 200);
    eventually("the old one is closed", || TcpStream::connect(gateway.admin).is_err());
}

/// The name in the certificate that a listener shows.
fn subject(at: SocketAddr) -> String {
    let connect = format!("127.0.0.1:{}", at.port());
    let script = format!(
        "echo | openssl s_client -connect {connect} -servername a.test 2>/dev/null | openssl x509 -noout -subject"
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    stdout(&output).trim().rsplit("CN = ").next().unwrap_or_default().to_owned()
}

/// A connection that stays open, by the openssl command.
struct TlsClient {
    child: std::process::Child,
    answers: std::io::BufReader<std::process::ChildStdout>,
}

impl TlsClient {
    fn connect(at: SocketAddr, name: &str, ca: &Path) -> Self {
        let connect = format!("127.0.0.1:{}", at.port());
        let mut command = Command::new("openssl");
        command.args([
            "s_client",
            "-quiet",
            "-verify_return_error",
            "-connect",
            &connect,
            "-servername",
            name,
            "-CAfile",
        ]);
        let piped = std::process::Stdio::piped;
        let mut child =
            command.arg(ca).stdin(piped()).stdout(piped()).stderr(std::process::Stdio::null()).spawn().unwrap();
        let answers = std::io::BufReader::new(child.stdout.take().unwrap());
        Self { child, answers }
    }

    /// The status line of an answer, which is read to its end.
    fn get(&mut self) -> String {
        let head = format!("GET /api/v3/projects HTTP/1.1\r\nHost: a.test\r\nPRIVATE-TOKEN: {GOOD}\r\n\r\n");
        self.child.stdin.as_mut().unwrap().write_all(head.as_bytes()).unwrap();
        let (mut status, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            self.answers.read_line(&mut line).unwrap();
            let line = line.trim_end();
            if status.is_empty() {
                status = line.to_owned();
            }
            if let Some(value) = line.strip_prefix("Content-Length: ") {
                length = value.parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        self.answers.read_exact(&mut body).unwrap();
        status
    }
}

impl Drop for TlsClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_changed_configuration_is_taken_if_that_is_wanted() {
    let (upstream, at) = (Upstream::start(), free());
    let gateway = Gateway::start(
        upstream.address,
        &format!("[server]\nlisten = [\"@LISTEN@\"]\nwatch = true\n[[listener]]\naddress = \"{at}\"\n"),
    );
    let moved = free();
    gateway.rewrite(|text| text.replace(&at.to_string(), &moved.to_string()));
    eventually("the change is taken", || TcpStream::connect(moved).is_ok() && TcpStream::connect(at).is_err());
    gateway.rewrite(|text| text.replace("[[listener]]", "[[listner]]"));
    eventually("a bad one is refused", || {
        gateway.process_log().contains("configuration not reloaded, nothing changed")
    });
    assert!(TcpStream::connect(moved).is_ok());
}

#[test]
fn connections_are_bounded_in_all_and_for_each_address() {
    let (upstream, at) = (Upstream::start(), free());
    let more = format!(
        "[limits]\nconnections = 6\nconnections_per_address = 2\nrequests_per_connection = 3\n[[listener]]\naddress = \"{at}\"\nproxy_protocol = [\"127.0.0.1\"]\n"
    );
    let gateway = Gateway::start(upstream.address, &more);
    let get = format!("GET /api/v3/projects HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {GOOD}\n\n");
    let from = |address: &str| {
        let mut client = announce(at, format!("PROXY TCP4 {address} 10.0.0.1 5 6\r\n").as_bytes());
        offer(&mut client, get.replace('\n', "\r\n").as_bytes());
        client.try_answer().map(|answer| (answer.status, client))
    };
    eventually("the harness's own connection has gone", || gateway.metric("tollgate_connections") == 0.0);
    let mut all: Vec<_> =
        ["192.0.2.1", "192.0.2.1", "192.0.2.2"].into_iter().map(|address| from(address).unwrap().1).collect();
    assert!(from("192.0.2.1").is_none(), "a third one of one address");
    assert_eq!(gateway.metric("tollgate_connections_limited_total{limit=\"max_connections_per_address\"}"), 1.0);
    drop(all.remove(0));
    eventually("one is given back", || gateway.metric("tollgate_connections") == 2.0);
    all.extend(["192.0.2.1", "192.0.2.3", "192.0.2.3", "192.0.2.4"].map(|address| from(address).unwrap().1));
    assert!(from("192.0.2.5").is_none(), "a seventh one in all");
    assert_eq!(gateway.metric("tollgate_connections_limited_total{limit=\"max_connections\"}"), 1.0);
    // The third request of a connection is its last.
    let client = &mut all[0];
    for (status, last) in [(200, None), (200, Some("close"))] {
        client.send_head(&get);
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("Connection")), (status, last));
    }
    assert!(client.is_closed_within(crate::harness::PATIENCE));
}
