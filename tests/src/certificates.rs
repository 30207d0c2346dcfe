//! Certificates of an authority of the test's own, made by openssl.

use std::path::{Path, PathBuf};

/// In a directory: `ca.pem` signs `cert.pem` (a server at 127.0.0.1 or localhost, key `key.pem`) and
/// `client.pem` (key `client-key.pem`); `other.pem` is another authority, which signs nothing.
#[derive(Debug)]
pub struct Certificates(PathBuf);

impl Certificates {
    /// Makes them in `directory`, which is there.
    #[must_use]
    pub fn make(directory: &Path) -> Self {
        let script = r#"cd "$0" && exec 2>&1
            authority() { openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=$1 -keyout $1.key -out $1.pem; }
            signed() {
              openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout $2 -out request.pem &&
              printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n' >extensions &&
              openssl x509 -req -days 2 -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -extfile extensions -out $1
            }
            authority ca && authority other && signed cert.pem key.pem && signed client.pem client-key.pem"#;
        crate::tool("bash", &["-c", script, &directory.display().to_string()]);
        Self(directory.to_owned())
    }

    /// The path of one of the files.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}
