//! `tollgate cert`: a certificate of one's own, for trying. It must not know the gateway.

use super::Failure;
use anyhow::{Context as _, anyhow};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

#[derive(clap::Subcommand)]
pub(super) enum CertCommand {
    /// Write NAME.pem and NAME.key, a certificate that no client trusts by itself, for trying a listener with TLS.
    ///
    /// Existing files are not replaced. Exit codes: 0 written, 1 not written, 64 a name that cannot be in a certificate.
    SelfSigned {
        /// A host name or an IP address that the certificate is for; can be given several times.
        #[arg(long = "name", value_name = "NAME", default_value = "localhost")]
        names: Vec<String>,
        /// The days that it is valid.
        #[arg(long, default_value_t = 90, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// The folder of the two files.
        #[arg(long, default_value = ".", value_name = "FOLDER")]
        out: PathBuf,
    },
}

/// The certificate for this machine in a folder, and its key, made if they are not there.
pub(super) fn self_signed(folder: &Path) -> Result<(PathBuf, PathBuf), Failure> {
    let [certificate, key] = ["localhost.pem", "localhost.key"].map(|name| folder.join(name));
    if certificate.exists() && key.exists() {
        return Ok((certificate, key));
    }
    write(&["localhost", "127.0.0.1", "::1"].map(str::to_owned), 90, folder)
}

pub(super) fn run(command: &CertCommand) -> Result<(), Failure> {
    let CertCommand::SelfSigned { names, days, out } = command;
    let usable = |name: &String| {
        let plain = |label: &str| {
            !label.is_empty() && label.len() <= 63 && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        let host = name.strip_prefix("*.").unwrap_or(name);
        name.parse::<std::net::IpAddr>().is_ok() || (host.len() <= 253 && host.split('.').all(plain))
    };
    if let Some(name) = names.iter().find(|name| !usable(name)) {
        return Err(Failure::Usage(format!("{name}: not a host name or an IP address")));
    }
    let (certificate_path, key_path) = write(names, *days, out)?;
    say!("{}", certificate_path.display())?;
    say!("{}", key_path.display())?;
    Ok(())
}

fn write(names: &[String], days: u32, folder: &Path) -> Result<(PathBuf, PathBuf), Failure> {
    let first = names.first().map_or("localhost", String::as_str);
    let (certificate, key) =
        made(names, first, days).map_err(|error| anyhow!("no certificate can be made: {error}"))?;
    let stem = first.replace('*', "wildcard").replace(':', "-");
    let (certificate_path, key_path) = (folder.join(format!("{stem}.pem")), folder.join(format!("{stem}.key")));
    for path in [&certificate_path, &key_path] {
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(anyhow!("{} exists, and is not replaced: nothing was written", path.display()).into());
        }
    }
    // The key first: a certificate without its key is of no use.
    write_new(&key_path, &key, 0o600)?;
    write_new(&certificate_path, &certificate, 0o644)?;
    Ok((certificate_path, key_path))
}

fn made(names: &[String], first: &str, days: u32) -> Result<(String, String), rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, first);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    // A clock that is a little behind must not refuse it.
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(300)).into();
    params.not_after = (now + Duration::from_secs(u64::from(days) * 86_400)).into();
    let key = KeyPair::generate()?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file =
        options.write(true).create_new(true).mode(mode).open(path).with_context(|| path.display().to_string())?;
    file.write_all(text.as_bytes()).with_context(|| path.display().to_string())
}
