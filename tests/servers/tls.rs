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
        let folder = Folder::new("tls");
        let openssl = |arguments: &str| {
            run(Command::new("openssl").current_dir(&folder.0).args(arguments.split(' ')));
        };
        std::fs::write(folder.file("san"), "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
            .unwrap();
        openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN=tollgate-test-ca");
        openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost");
        openssl(
            "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out server.pem",
        );
        Self { folder }
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
    pub fn issue(&self, name: &str, san: &str, days: i32) -> (PathBuf, PathBuf) {
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
