//! What a program is given by the one that starts it: descriptors by number, and dispositions of
//! signals.

use crate::fault::{Context, SysError};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::{SigHandler, Signal, signal},
};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Takes over the descriptor whose number is the value of the environment variable `name`, and
/// keeps it from crossing the next exec. `None` if there is no such variable; `EBADF` or `EINVAL`
/// if its value is no open descriptor above 2. To be called once for each variable, before the
/// program opens anything.
pub fn descriptor(name: &'static str) -> Result<Option<OwnedFd>, SysError> {
    let Some(value) = std::env::var_os(name) else {
        return Ok(None);
    };
    let number = value
        .to_str()
        .and_then(|digits| digits.parse::<RawFd>().ok())
        .filter(|fd| *fd > 2);
    let number = number
        .ok_or(nix::errno::Errno::EINVAL)
        .context(name, format_args!("{value:?}"))?;
    // SAFETY: a BorrowedFd must not be -1 (above 2 here) and is used for fcntl only, which answers
    // EBADF if nothing is open there.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context(name, number)?;
    // SAFETY: it is open (fcntl succeeded), and ours by the contract of the variable: whoever
    // started this program left it for this purpose, and nobody in this process has wrapped it
    // before.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// Ignores `SIGCHLD`, so that the kernel reaps children by itself (waitpid(2), "NOTES").
pub fn reap_by_kernel() -> Result<(), SysError> {
    // SAFETY: signal(2) with SIG_IGN installs no handler, so no code can run at a bad moment.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }
        .context("signal", "SIGCHLD")
        .map(drop)
}
