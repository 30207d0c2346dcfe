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

use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
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
