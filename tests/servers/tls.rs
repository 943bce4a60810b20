//! A certificate authority for the tests, made with the openssl command.

use super::{Folder, run};
use std::path::PathBuf;
use std::process::Command;

/// An authority, and a certificate of its for `localhost` and 127.0.0.1.
pub struct Authority {
    folder: Folder,
}

impl Authority {
    pub fn new() -> Self {
        Self::named("tollgate-test-ca")
    }

    /// By its subject, certificates tell which authority they are from.
    pub fn named(name: &str) -> Self {
        let folder = Folder::new("tls");
        let openssl = |arguments: &str| {
            run(Command::new("openssl").current_dir(&folder.0).args(arguments.split(' ')));
        };
        std::fs::write(folder.file("san"), "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
            .unwrap();
        openssl(&format!("req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN={name}"));
        openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost");
        openssl(
            "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out server.pem",
        );
        Self { folder }
    }

    /// A certificate for these names, like `DNS:localhost,IP:127.0.0.1`, and its key. With 0 days, it is of no use a second later.
    pub fn issue(&self, names: &str, days: u32) -> (PathBuf, PathBuf) {
        let stem = names.replace(|c: char| !c.is_ascii_alphanumeric(), "_") + &days.to_string();
        self.folder.write(&format!("{stem}.ext"), &format!("subjectAltName={names}\nbasicConstraints=CA:FALSE\n"));
        let openssl = |arguments: String| {
            run(Command::new("openssl").current_dir(&self.folder.0).args(arguments.split(' ')));
        };
        openssl(format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {stem}.key -out {stem}.csr -subj /CN=test"
        ));
        openssl(format!(
            "x509 -req -in {stem}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days {days} -extfile {stem}.ext \
             -out {stem}.pem"
        ));
        (self.folder.file(&format!("{stem}.pem")), self.folder.file(&format!("{stem}.key")))
    }

    pub fn ca(&self) -> PathBuf {
        self.folder.file("ca.pem")
    }

    pub fn certificate(&self) -> PathBuf {
        self.folder.file("server.pem")
    }

    pub fn key(&self) -> PathBuf {
        self.folder.file("server.key")
    }

    /// Another certificate of the same authority, as `name.pem` and `name.key`. `days` can be negative. `san` is like
    /// `DNS:a.test,DNS:*.b.test`.
    pub fn issue_named(&self, name: &str, san: &str, days: i32) -> (PathBuf, PathBuf) {
        let openssl = |arguments: &str| {
            run(Command::new("openssl").current_dir(&self.folder.0).args(arguments.split(' ')));
        };
        let extensions = format!("subjectAltName={san}\nbasicConstraints=CA:FALSE\n");
        std::fs::write(self.folder.file(&format!("{name}.ext")), extensions).unwrap();
        openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}.key -out {name}.csr -subj /O=tollgate/CN={name}"
        ));
        // `-days -1` makes one that has ended.
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days {days} -extfile {name}.ext -out {name}.pem"
        ));
        (self.folder.file(&format!("{name}.pem")), self.folder.file(&format!("{name}.key")))
    }
}
