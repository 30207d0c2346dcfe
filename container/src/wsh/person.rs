//! What a person's `wsh` has: signals to pass on, and a terminal to leave as it was.

use crate::fault::{Context, SysError};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsFd, BorrowedFd};

/// Signals, by descriptor: so that none of them ends this process without its terminal's restoration.
pub(super) struct Signals {
    fd: SignalFd,
    set: SigSet,
}

/// One that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    /// The terminal has another size.
    Resized,
    /// For the job.
    ForTheJob(i32),
}

impl Signals {
    /// Takes `TERM`, `INT`, `HUP`, `QUIT` and `WINCH` from here on.
    pub(super) fn take() -> Result<Self, SysError> {
        let mut set = SigSet::from(Signal::SIGWINCH);
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ] {
            set.add(signal);
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None).context("sigprocmask", "block")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&set, flags).context("signalfd", "wsh")?;
        Ok(Self { fd, set })
    }

    /// Lets them act on this process again; those that came and were not asked for do so at once.
    pub(super) fn release(&self) -> Result<(), SysError> {
        sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&self.set), None)
            .context("sigprocmask", "unblock")
    }

    /// The next one that came.
    pub(super) fn next(&self) -> Option<Came> {
        let signal = self
            .fd
            .read_signal()
            .ok()
            .flatten()?
            .ssi_signo
            .cast_signed();
        let resized = signal == Signal::SIGWINCH as i32;
        Some(if resized {
            Came::Resized
        } else {
            Came::ForTheJob(signal)
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The person's terminal in raw mode, until this is dropped: every key is the job's.
pub(super) struct Raw<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    /// Enters raw mode.
    pub(super) fn enter(terminal: &'a impl AsFd) -> Result<Self, SysError> {
        let terminal = terminal.as_fd();
        let before = tcgetattr(terminal).context("tcgetattr", "stdin")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal, SetArg::TCSADRAIN, &raw).context("tcsetattr", "stdin")?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoration.
        let _ = tcsetattr(self.terminal, SetArg::TCSADRAIN, &self.before);
    }
}
