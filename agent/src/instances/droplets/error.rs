//! Why a droplet cannot be had.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::digest::Digest;

/// Why a droplet cannot be had. Cheap to clone: everybody who waits for one download gets its error.
///
/// A `uri` in here never holds credentials or a query, which may be a signature.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DropletError {
    /// The URI is not one that droplets are fetched from.
    #[error("droplet URI {uri:?} cannot be used: {why}")]
    Uri {
        /// The URI without its secrets.
        uri: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The server answered, but not with the droplet.
    #[error("{uri} answered with status {status} instead of 200: check that the droplet is there")]
    Status {
        /// Where it was asked for.
        uri: String,
        /// The HTTP status.
        status: u16,
    },
    /// Nothing came for too long.
    #[error("{uri} sent nothing for {after:?} ({got} bytes had come)")]
    Stalled {
        /// Where it was asked for.
        uri: String,
        /// How long nothing came.
        after: Duration,
        /// Bytes received before.
        got: u64,
    },
    /// It came, but not to an end in time.
    #[error("{uri} was not complete within {after:?} ({got} bytes had come)")]
    Late {
        /// Where it was asked for.
        uri: String,
        /// The time that it had, retries included.
        after: Duration,
        /// Bytes received.
        got: u64,
    },
    /// The archive is larger than allowed.
    #[error("{uri} is larger than the {max} bytes that a droplet may have")]
    TooLarge {
        /// Where it was asked for.
        uri: String,
        /// The bound in bytes.
        max: u64,
    },
    /// The connection failed or broke.
    #[error("cannot fetch {uri}: {why}")]
    Transfer {
        /// Where it was asked for.
        uri: String,
        /// What happened.
        why: String,
        /// Whether another try may succeed.
        transient: bool,
    },
    /// What came is something else.
    #[error("{uri} has the wrong digest: wanted {wanted}, got {got}")]
    WrongDigest {
        /// Where it was asked for.
        uri: String,
        /// What the start asked for.
        wanted: Digest,
        /// What came.
        got: Digest,
    },
    /// The archive ends too early.
    #[error("the droplet is truncated: {at}")]
    Truncated {
        /// Where the end was found.
        at: String,
    },
    /// The archive is no gzip-compressed tar.
    #[error("the droplet is no sound gzip-compressed tar archive: {why}")]
    Corrupt {
        /// What the decoder said.
        why: String,
    },
    /// One entry of the archive is not what a droplet may hold.
    #[error("the droplet's entry {entry:?} is refused: {why}")]
    Entry {
        /// Its path as the archive has it, shortened.
        entry: String,
        /// Why it is refused.
        why: &'static str,
    },
    /// The archive makes more files and directories than allowed.
    #[error("the droplet has more than {max} entries")]
    TooManyEntries {
        /// The bound.
        max: u64,
    },
    /// The archive unpacks to more bytes than allowed.
    #[error("the droplet unpacks to more than {max} bytes")]
    TooMuchUnpacked {
        /// The bound in bytes.
        max: u64,
    },
    /// A file that tells how to run the droplet cannot be understood.
    #[error("the droplet's {file} cannot be read: {why}")]
    Text {
        /// Its path in the droplet.
        file: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The rest of the disk was promised to instances.
    #[error("the droplet was given up: {why}")]
    NoRoom {
        /// How much there is, and where.
        why: String,
    },
    /// No space, no inodes, or a quota is used up.
    #[error("the disk is full: cannot {doing} {path:?}; free bytes or inodes there")]
    DiskFull {
        /// What was being done.
        doing: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// The host's file system refused something else.
    #[error("cannot {doing} {path:?}")]
    Disk {
        /// What was being done.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// The kernel's reason.
        source: Arc<io::Error>,
    },
    /// No thread could be started, or the agent is ending.
    #[error("the agent gave the download up: {0}")]
    Abandoned(&'static str),
}

impl DropletError {
    /// What `doing` something to `path` came to; a full disk is told from the rest.
    pub(super) fn disk(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let path = path.to_owned();
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC | Errno::EDQUOT) => Self::DiskFull { doing, path },
            _ => Self::Disk {
                doing,
                path,
                source: Arc::new(source),
            },
        }
    }

    /// Whether the same request may well succeed if made again.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Stalled { .. } => true,
            // What proxies and stores say while they restart or are overloaded.
            Self::Status { status, .. } => matches!(status, 429 | 500 | 502 | 503 | 504),
            Self::Transfer { transient, .. } => *transient,
            Self::Uri { .. }
            | Self::Late { .. }
            | Self::TooLarge { .. }
            | Self::WrongDigest { .. }
            | Self::Truncated { .. }
            | Self::Corrupt { .. }
            | Self::Entry { .. }
            | Self::TooManyEntries { .. }
            | Self::TooMuchUnpacked { .. }
            | Self::NoRoom { .. }
            | Self::Text { .. }
            | Self::DiskFull { .. }
            | Self::Disk { .. }
            | Self::Abandoned(_) => false,
        }
    }
}
