//! Synchronous work on this machine: control groups, network, directories, starting helpers.
//!
//! Nothing here knows what a container is for. Whatever may block in the kernel goes through
//! [`blocking`], the one door between the asynchronous rooms and this one.

pub mod cgroups;
pub mod depot;
pub mod helpers;
pub mod kmsg;
pub mod network;
pub mod probe;
pub mod scribe;

use std::fs::{File, OpenOptions};
use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use tracing::Span;

/// Runs `work` where blocking is allowed, inside the caller's span, and gives back what it returns.
///
/// The work runs to its end even when the returned future is dropped: what must be undone then has an
/// owner elsewhere. A panic goes on in the caller. Never returns when the runtime is shutting down.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let span = Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(value) => value,
        Err(error) => {
            if let Ok(panic) = error.try_into_panic() {
                std::panic::resume_unwind(panic);
            }
            // The runtime is shutting down.
            pending().await
        }
    }
}

/// Starts `work` where blocking is allowed; nobody waits for it. For what may be left half-done when
/// the agent dies, because the next start finishes it.
pub fn in_background(work: impl FnOnce() + Send + 'static) {
    let span = Span::current();
    drop(tokio::task::spawn_blocking(move || span.in_scope(work)));
}

/// So much blocking work of a kind is under way at once, and the rest waits for its turn. A disk that hangs must not hold
/// every thread that may block. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Semaphore>);

impl Turns {
    /// So many at once.
    #[must_use]
    pub fn of(many: usize) -> Self {
        Self(Arc::new(Semaphore::new(many)))
    }

    /// Runs `work` when it is its turn, like [`blocking`]. The turn goes with the work, not with whoever waits for it; who gives up before
    /// it is his takes the work with him.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        // Never closed.
        let turn = Arc::clone(&self.0).acquire_owned().await;
        blocking(move || {
            let _turn = turn;
            work()
        })
        .await
    }
}

/// Opens a file as `options` say, or makes it. To make one waits for a disk that takes nothing, whether or not it is there:
/// so that comes second. Blocks.
///
/// # Errors
/// As `open(2)`.
pub fn open_or_make(mut options: OpenOptions, path: &Path) -> io::Result<File> {
    match options.create(false).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => options.create(true).open(path),
        other => other,
    }
}

/// Lets the runtime wait for a descriptor to become ready.
///
/// # Errors
/// `EPERM`: a plain file, which is always ready. `ENOSPC`: `fs.epoll.max_user_watches` is reached.
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(
        deprecated,
        reason = "deprecated for types whose descriptor may close or change while it is registered; an OwnedFd's cannot, and its replacement is unsafe"
    )]
    AsyncFd::with_interest(fd, interest)
}
