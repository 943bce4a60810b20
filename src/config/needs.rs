//! Which files a gateway with a configuration needs, and for what: the rules of its sandbox, all in one place. Pure: what is on
//! this machine is looked up by those who use them. Whoever makes tollgate open a file of its own adds it here.

use super::Settings;
use crate::edge::Listen;
use crate::sandbox::{Extent, FileAccess, FileRule};
use crate::share::ShareStoreSettings;
use crate::store::{StoreSettings, TlsSettings};
use crate::telemetry::lines::LogTarget;
use crate::tls::{Authorities, PemFile};
use std::path::{Path, PathBuf};

/// What is not the configuration's, but the process's own.
#[derive(Clone, Debug, Default)]
pub struct ProcessNeeds {
    /// Which an upgrade starts. `None`: there is none.
    pub program: Option<PathBuf>,
    /// The folders of the libraries that it is linked to; empty for a static one.
    pub libraries: Vec<PathBuf>,
    /// Where the environment says that the certificates of authorities are.
    pub authorities: Vec<PathBuf>,
}

/// Files of the system that are read while a gateway runs. One that is replaced is another file: of those that this happens
/// to, the folder is needed.
const SYSTEM: [(&str, Extent, &str); 18] = [
    ("/etc/resolv.conf", Extent::Folder, "names of servers"),
    ("/etc/hosts", Extent::Folder, "names of servers"),
    ("/etc/nsswitch.conf", Extent::Itself, "names of servers"),
    ("/etc/host.conf", Extent::Itself, "names of servers"),
    ("/etc/gai.conf", Extent::Itself, "names of servers"),
    ("/etc/services", Extent::Itself, "names of servers"),
    ("/etc/protocols", Extent::Itself, "names of servers"),
    ("/etc/ssl/certs", Extent::Itself, "the system's authorities"),
    ("/etc/ssl/cert.pem", Extent::Itself, "the system's authorities"),
    ("/etc/pki/tls", Extent::Itself, "the system's authorities"),
    ("/etc/pki/ca-trust", Extent::Itself, "the system's authorities"),
    ("/usr/share/ca-certificates", Extent::Itself, "the system's authorities"),
    ("/usr/local/share/ca-certificates", Extent::Itself, "the system's authorities"),
    // Of other processes, Landlock and the kernel keep what is not public.
    ("/proc", Extent::Itself, "metrics of this process, and the name of this machine"),
    ("/sys/fs/cgroup", Extent::Itself, "the number of processors"),
    ("/sys/devices/system/cpu", Extent::Itself, "the number of processors"),
    ("/dev/urandom", Extent::Itself, "random numbers of SQLite"),
    ("/usr/share/zoneinfo", Extent::Itself, "the time zone"),
];

/// The rules for these settings; with `process`, those that every gateway needs as well. `why` is the key of a setting.
pub fn needs(settings: &Settings, process: Option<&ProcessNeeds>) -> Vec<FileRule> {
    let mut rules = Vec::new();
    let mut add = |key: &str, path: &Path, extent, access| {
        rules.push(FileRule { path: path.to_owned(), extent, access, why: key.to_owned(), is_setting: true });
    };
    for from in &settings.read_from {
        add(&from.key, &from.path, from.extent, FileAccess::Read);
    }
    listeners(settings, &mut add);
    for (index, upstream) in settings.upstreams.iter().enumerate() {
        if let Some(tls) = &upstream.tls {
            let ca = match &tls.authorities {
                Some(Authorities::File(file)) => Some(file),
                Some(Authorities::System(_)) | None => None,
            };
            certificates(&format!("upstream[{index}]"), ca, tls.client.as_ref(), &mut add);
        }
    }
    for (index, store) in settings.stores.iter().enumerate() {
        let key = format!("store[{index}]");
        match &store.kind {
            // With its journals.
            StoreSettings::Sqlite(path) => add(&format!("{key}.path"), path, Extent::Folder, FileAccess::Write),
            // Only the command line writes to it.
            StoreSettings::File(path) => add(&format!("{key}.path"), path, Extent::Folder, FileAccess::Read),
            // The sockets of servers need no rule.
            StoreSettings::Postgres(_) | StoreSettings::Redis(_) | StoreSettings::Introspection(_) => {}
        }
        if let Some(tls) = store.kind.tls() {
            of_store(&key, tls, &mut add);
        }
    }
    if let Some(share) = &settings.shared_limits {
        let tls = match &share.store {
            ShareStoreSettings::Redis(settings) => &settings.tls,
            ShareStoreSettings::Postgres(settings) => &settings.tls,
        };
        of_store("shared_limits", tls, &mut add);
    }
    for (key, log) in [("log.access", &settings.access_log), ("admin.audit", &settings.audit_log)] {
        match log {
            // Rotated, it is made again.
            LogTarget::File(path) => add(key, path, Extent::Folder, FileAccess::Write),
            LogTarget::Off | LogTarget::Stdout | LogTarget::Stderr | LogTarget::Syslog(_) | LogTarget::Journal(_) => {}
        }
    }
    if let Some(path) = &settings.snapshot {
        // Written beside it and renamed.
        add("cache.snapshot", path, Extent::Folder, FileAccess::Write);
    }
    if let Some(process) = process {
        rules.extend(of_process(process));
    }
    rules
}

type AddRule<'a> = dyn FnMut(&str, &Path, Extent, FileAccess) + 'a;

fn listeners(settings: &Settings, add: &mut AddRule<'_>) {
    let server = &settings.server;
    for (index, listener) in server.listeners.iter().enumerate() {
        let key = match index.checked_sub(server.short) {
            None => format!("server.listen[{index}]"),
            Some(index) => format!("listener[{index}].address"),
        };
        socket(&key, &listener.address, add);
        if let Some(tls) = &listener.tls {
            let key = format!("listener[{}].certificates", index.saturating_sub(server.short));
            tls.files().for_each(|file| add(&key, file.path(), Extent::Folder, FileAccess::Read));
        }
    }
    let operators = [("admin.listen", &server.admin), ("admin.metrics_listen", &server.metrics)];
    operators.into_iter().for_each(|(key, listen)| listen.iter().for_each(|listen| socket(key, listen, add)));
}

fn socket(key: &str, listen: &Listen, add: &mut AddRule<'_>) {
    match listen {
        Listen::Unix(path, _) => add(key, Path::new(path), Extent::Folder, FileAccess::Socket),
        Listen::Tcp(_) => {}
    }
}

fn of_store(section: &str, tls: &TlsSettings, add: &mut AddRule<'_>) {
    certificates(section, tls.ca.as_ref(), tls.client.as_ref(), add);
}

fn certificates(section: &str, ca: Option<&PemFile>, client: Option<&(PemFile, PemFile)>, add: &mut AddRule<'_>) {
    let client = client.map(|(certificate, key)| [("tls_cert", certificate), ("tls_key", key)]);
    for (key, file) in ca.map(|ca| ("tls_ca", ca)).into_iter().chain(client.into_iter().flatten()) {
        add(&format!("{section}.{key}"), file.path(), Extent::Folder, FileAccess::Read);
    }
}

fn of_process(process: &ProcessNeeds) -> Vec<FileRule> {
    let rule = |path: &Path, extent, access, why: &str| FileRule {
        path: path.to_owned(),
        extent,
        access,
        why: why.to_owned(),
        is_setting: false,
    };
    let mut rules: Vec<_> =
        SYSTEM.iter().map(|(path, extent, why)| rule(Path::new(path), *extent, FileAccess::Read, why)).collect();
    let authorities = process.authorities.iter();
    rules.extend(authorities.map(|path| rule(path, Extent::Itself, FileAccess::Read, "the system's authorities")));
    rules.push(rule(Path::new("/dev/null"), Extent::Itself, FileAccess::Write, "no input of an upgraded process"));
    // An upgrade starts what is in the file's place by then.
    let program = process.program.iter();
    rules.extend(program.map(|path| rule(path, Extent::Folder, FileAccess::Run, "tollgate upgrade")));
    if !process.libraries.is_empty() {
        let cache = Path::new("/etc/ld.so.cache");
        rules.push(rule(cache, Extent::Itself, FileAccess::Read, "libraries, for tollgate upgrade"));
    }
    let libraries = process.libraries.iter();
    rules.extend(libraries.map(|path| rule(path, Extent::Itself, FileAccess::Run, "libraries, for tollgate upgrade")));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Probe, parse};

    #[test]
    fn every_file_of_a_configuration_has_its_rule() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let pair = rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap();
        std::fs::write(at("c.pem"), pair.cert.pem()).unwrap();
        std::fs::write(at("c.key"), pair.signing_key.serialize_pem()).unwrap();
        std::fs::write(at("secret"), "s3cret-s3cret-s3cret\n").unwrap();
        std::fs::create_dir(at("conf.d")).unwrap();
        std::fs::write(at("conf.d/a.toml"), "[cache]\nsnapshot = \"state/cache\"\n").unwrap();
        std::fs::write(at("one.toml"), "[server]\ndrain_delay = \"${file:delay}\"\nlisten = [\"unix:/run/a.sock\"]\n")
            .unwrap();
        std::fs::write(at("delay"), "1s\n").unwrap();
        let text = r#"
            include = ["conf.d/*.toml", "one.toml"]
            [admin]
            listen = "unix:/run/admin.sock"
            metrics_listen = "127.0.0.1:9100"
            audit = "logs/audit"
            [[listener]]
            address = "127.0.0.1:8443"
            certificates = [{ chain = "c.pem", key = "c.key" }]
            client_ca = "c.pem"
            [[listener]]
            address = "unix:/run/b.sock"
            [[upstream]]
            name = "plain"
            servers = ["unix:/run/backend.sock"]
            [[upstream]]
            name = "tls"
            servers = ["a.test:443"]
            tls = true
            tls_ca = "c.pem"
            tls_cert = "c.pem"
            tls_key = "c.key"
            [[store]]
            kind = "sqlite"
            path = "db/t.db"
            [[store]]
            kind = "file"
            path = "tokens.toml"
            [[store]]
            kind = "postgres"
            url = "host=db.test"
            password_file = "secret"
            tls = "verify-full"
            tls_ca = "c.pem"
            [[store]]
            kind = "redis"
            servers = ["cache.test:6379"]
            password_file = "secret"
            tls = "verify-full"
            tls_cert = "c.pem"
            tls_key = "c.key"
            [[limit]]
            name = "all"
            key = ["address"]
            rate = "5/s"
            shared = true
            [shared_limits]
            store = "redis"
            servers = ["cache.test:6379"]
            tls = "verify-full"
            tls_ca = "c.pem"
            secret_file = "secret"
            [log]
            access = "logs/access"
        "#;
        let settings = parse(text, &at("tollgate.toml"), Probe::Settings).unwrap();
        let mut found: Vec<_> = needs(&settings, None)
            .into_iter()
            .map(|rule| {
                assert!(rule.is_setting, "{rule:?}");
                let path = rule.path.strip_prefix(folder.path()).unwrap_or(&rule.path).display().to_string();
                format!(
                    "{} {} {path}{}",
                    rule.why,
                    rule.access.as_str(),
                    if rule.extent == Extent::Itself { "/" } else { "" }
                )
            })
            .collect();
        found.sort();
        let expected = [
            " read tollgate.toml",
            "admin.audit write logs/audit",
            "admin.listen socket /run/admin.sock",
            "cache.snapshot write state/cache",
            "include read conf.d/",
            "include read conf.d/a.toml",
            "include read one.toml",
            "include read one.toml",
            "listener[0].certificates read c.key",
            "listener[0].certificates read c.pem",
            "listener[0].certificates read c.pem",
            "listener[1].address socket /run/b.sock",
            "log.access write logs/access",
            "server.drain_delay read delay",
            "server.listen[0] socket /run/a.sock",
            "shared_limits.secret_file read secret",
            "shared_limits.tls_ca read c.pem",
            "store[0].path write db/t.db",
            "store[1].path read tokens.toml",
            "store[2].password_file read secret",
            "store[2].tls_ca read c.pem",
            "store[3].password_file read secret",
            "store[3].tls_cert read c.pem",
            "store[3].tls_key read c.key",
            "upstream[1].tls_ca read c.pem",
            "upstream[1].tls_cert read c.pem",
            "upstream[1].tls_key read c.key",
        ];
        assert_eq!(found, expected);
        // A process needs more, of which a reload is never asked.
        let process = ProcessNeeds {
            program: Some("/opt/tollgate".into()),
            libraries: vec!["/opt/lib".into()],
            authorities: vec!["/opt/ca".into()],
        };
        let all = needs(&settings, Some(&process));
        let own = |path: &str| {
            all.iter().find(|rule| !rule.is_setting && rule.path == Path::new(path)).map(|rule| rule.access)
        };
        assert_eq!(all.len(), expected.len() + SYSTEM.len() + 5);
        assert_eq!((own("/opt/tollgate"), own("/opt/lib")), (Some(FileAccess::Run), Some(FileAccess::Run)));
        assert_eq!((own("/opt/ca"), own("/dev/null")), (Some(FileAccess::Read), Some(FileAccess::Write)));
        // A static binary reads no libraries.
        let fixed = ProcessNeeds { libraries: Vec::new(), ..process };
        assert_eq!(needs(&settings, Some(&fixed)).len(), all.len() - 2);
    }
}
