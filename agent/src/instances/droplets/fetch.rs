//! Streams a droplet's archive to disk and checks its digest on the way.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ureq::Timeout;
use ureq::http::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::FetchOptions;
use super::digest::{Digest, Hasher};
use super::error::DropletError;
use super::stop::Stop;
use super::toll::Toll;
use super::tree::{open_directory, open_file_below};
use super::uri::{Place, Source};

/// How many times a server may send us elsewhere: a store behind a gateway needs one or two.
const MAX_REDIRECTS: u32 = 5;

/// Copies what `source` names into `into` and returns its size in bytes. Blocks.
///
/// # Errors
/// Every way in which it can fail; `into` then holds anything.
pub(super) fn fetch(
    source: &Source,
    digest: &Digest,
    into: (&mut File, &Path),
    options: &FetchOptions,
    deadline: Instant,
    stop: &Stop,
) -> Result<u64, DropletError> {
    let download = Download {
        shown: &source.shown,
        options,
        deadline,
        stop,
    };
    let (size, got) = match &source.place {
        Place::Web { uri, authorization } => {
            download.web(uri, authorization.as_deref(), digest, into)?
        }
        Place::File(path) => download.file(path, digest, into)?,
    };
    if got == *digest {
        return Ok(size);
    }
    Err(DropletError::WrongDigest {
        uri: source.shown.clone(),
        wanted: *digest,
        got,
    })
}

struct Download<'a> {
    shown: &'a str,
    options: &'a FetchOptions,
    deadline: Instant,
    stop: &'a Stop,
}

impl Download<'_> {
    fn web(
        &self,
        uri: &Uri,
        authorization: Option<&str>,
        digest: &Digest,
        into: (&mut File, &Path),
    ) -> Result<(u64, Digest), DropletError> {
        let roots = trusted();
        let mut request = agent(self.options.inactivity, self.left(0)?, roots).get(uri);
        if let Some(authorization) = authorization {
            request = request.header("Authorization", authorization);
        }
        let mut response = request.call().map_err(|error| self.broken(error, 0))?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(DropletError::Status {
                uri: self.shown.to_owned(),
                status,
            });
        }
        // Says so before a byte of it is on the disk.
        if response
            .body()
            .content_length()
            .is_some_and(|size| size > self.options.max_bytes)
        {
            return Err(self.too_large());
        }
        self.copy(&mut response.body_mut().as_reader(), digest, into)
    }

    fn file(
        &self,
        path: &Path,
        digest: &Digest,
        into: (&mut File, &Path),
    ) -> Result<(u64, Digest), DropletError> {
        let refused = |why: String| DropletError::Transfer {
            uri: self.shown.to_owned(),
            why,
            transient: false,
        };
        let allowed = &self.options.files;
        let below = |root: &'_ PathBuf| Some((root.clone(), path.strip_prefix(root).ok()?));
        let Some((root, rest)) = allowed.iter().find_map(below) else {
            return Err(refused(format!(
                "it lies in none of the directories of `droplets.files`, which are {allowed:?}"
            )));
        };
        let root = open_directory(&root).map_err(|error| refused(error.to_string()))?;
        let mut file = open_file_below(root, rest).map_err(|errno| {
            refused(if errno == Errno::EXDEV {
                "a symlink leads out of its directory of `droplets.files`".into()
            } else {
                std::io::Error::from(errno).to_string()
            })
        })?;
        let is_file = file
            .metadata()
            .map_err(|error| refused(error.to_string()))?
            .is_file();
        if !is_file {
            return Err(refused("it is no regular file".to_owned()));
        }
        self.copy(&mut file, digest, into)
    }

    fn copy(
        &self,
        from: &mut dyn Read,
        digest: &Digest,
        (file, path): (&mut File, &Path),
    ) -> Result<(u64, Digest), DropletError> {
        let mut hasher = Hasher::like(digest);
        let mut buffer = vec![0; 64 * 1024];
        let mut size = 0u64;
        let mut toll = Toll::of(self.options.space.as_ref());
        loop {
            let count = match from.read(&mut buffer) {
                Ok(0) => return Ok((size, hasher.finish())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.broken(error.into(), size)),
            };
            let chunk = buffer.get(..count).unwrap_or_default();
            size = size.saturating_add(chunk.len() as u64);
            if size > self.options.max_bytes {
                return Err(self.too_large());
            }
            // A server that never stops sending never lets a timeout of the socket pass.
            self.left(size)?;
            self.stop.check()?;
            hasher.update(chunk);
            toll.pay(chunk.len() as u64)?;
            file.write_all(chunk)
                .map_err(|error| DropletError::disk("store the droplet in", path, error))?;
        }
    }

    /// The time that is left.
    fn left(&self, got: u64) -> Result<Duration, DropletError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(self.late(got))
        } else {
            Ok(left)
        }
    }

    fn late(&self, got: u64) -> DropletError {
        DropletError::Late {
            uri: self.shown.to_owned(),
            after: self.options.total,
            got,
        }
    }

    fn too_large(&self) -> DropletError {
        DropletError::TooLarge {
            uri: self.shown.to_owned(),
            max: self.options.max_bytes,
        }
    }

    /// The HTTP client's error in our words. Some of its texts quote the address that it was
    /// redirected to, which may be signed: those are not passed on.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the client's list of errors is open and ours is not"
    )]
    fn broken(&self, error: ureq::Error, got: u64) -> DropletError {
        let (why, transient) = match error {
            ureq::Error::Timeout(Timeout::Global | Timeout::PerCall) => return self.late(got),
            ureq::Error::Timeout(_) => {
                let after = self.options.inactivity;
                return DropletError::Stalled {
                    uri: self.shown.to_owned(),
                    after,
                    got,
                };
            }
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => (
                format!("the connection closed early, after {got} bytes"),
                true,
            ),
            ureq::Error::Io(error) => (error.to_string(), true),
            ureq::Error::HostNotFound => ("its host is not found".to_owned(), true),
            ureq::Error::ConnectionFailed => ("no connection".to_owned(), true),
            ureq::Error::TooManyRedirects => (
                format!("it redirects more than {MAX_REDIRECTS} times"),
                false,
            ),
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => (
                "it redirects to an address that cannot be used".to_owned(),
                false,
            ),
            ureq::Error::Protocol(_) => ("the answer is not proper HTTP/1.1".to_owned(), false),
            ureq::Error::Rustls(error) => (format!("TLS: {error}"), false),
            ureq::Error::Tls(why) => (format!("TLS: {why}"), false),
            _ => ("the HTTP client failed".to_owned(), false),
        };
        DropletError::Transfer {
            uri: self.shown.to_owned(),
            why,
            transient,
        }
    }
}

/// Whose certificates a server's may be signed by: the host's own store, which an operator adds to with
/// `update-ca-certificates` or names in `SSL_CERT_FILE`. Read for each download, so that a change counts
/// at once. A host without a store has the public ones.
fn trusted() -> RootCerts {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a certificate of this host's store cannot be used");
    }
    if found.certs.is_empty() {
        return RootCerts::WebPki;
    }
    let certificates = found.certs.iter();
    RootCerts::from(certificates.map(|one| Certificate::from_der(one).to_owned()))
}

/// A client for one download. It takes no proxy from the environment: droplets come from inside, and
/// the DEA did not either.
fn agent(inactivity: Duration, total: Duration, roots: RootCerts) -> ureq::Agent {
    ureq::Agent::config_builder()
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .http_status_as_error(false)
        .proxy(None)
        .max_redirects(MAX_REDIRECTS)
        .max_redirects_will_error(true)
        .timeout_global(Some(total))
        .timeout_resolve(Some(inactivity))
        .timeout_connect(Some(inactivity))
        // A server that takes the request and never answers.
        .timeout_recv_response(Some(inactivity))
        .timeout_per_read(Some(inactivity))
        .timeout_per_write(Some(inactivity))
        .max_idle_connections(0)
        .user_agent("ostler")
        .build()
        .new_agent()
}
