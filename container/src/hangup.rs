//! The end of whoever started a helper: what must die with the agent holds the read end of a pipe
//! from it.

use crate::{
    fault::{Context, SysError},
    sys::inherit,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// One of the descriptors: ask them.
    Ready,
    /// The agent is gone, or nobody reads standard output any more.
    HungUp,
    /// The time is over.
    TimedOut,
}

/// Watches for the end of the agent and of whoever reads standard output.
#[derive(Debug)]
pub(crate) struct Hangup {
    pipe: Option<OwnedFd>,
    stdout: io::Stdout,
}

impl Hangup {
    /// Takes over the descriptor in `OSTLER_HANGUP_FD`. Without one only standard output is
    /// watched.
    pub(crate) fn inherit() -> Result<Self, SysError> {
        Ok(Self {
            pipe: inherit::descriptor("OSTLER_HANGUP_FD")?,
            stdout: io::stdout(),
        })
    }

    /// Waits for events on any of `others` (two at most).
    pub(crate) fn wait<const N: usize>(
        &self,
        others: [(BorrowedFd<'_>, PollFlags); N],
        timeout: PollTimeout,
    ) -> Result<Woken, SysError> {
        const { assert!(N <= 2) }
        let quiet = |fd| PollFd::new(fd, PollFlags::empty());
        let stdout = self.stdout.as_fd();
        let pipe = self.pipe.as_ref().map_or(stdout, AsFd::as_fd);
        let mut fds = [stdout, pipe, stdout, stdout].map(quiet);
        for (slot, (fd, events)) in fds.iter_mut().skip(2).zip(others) {
            *slot = PollFd::new(fd, events);
        }
        loop {
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("poll", ""),
                Ok(0) => return Ok(Woken::TimedOut),
                Ok(_) => break,
            }
        }
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        let hung_up = fds
            .iter()
            .take(2)
            .any(|fd| fd.revents().is_some_and(|seen| seen.intersects(gone)));
        Ok(if hung_up { Woken::HungUp } else { Woken::Ready })
    }
}
