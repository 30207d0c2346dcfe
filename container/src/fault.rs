//! The one error of the wall: a call, what it was about, and the errno.

use nix::errno::Errno;
use std::fmt;

/// A refused system call, e.g. `open("/proc/1/ns/net"): ENOENT: No such file or directory`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SysError {
    /// The call.
    pub call: &'static str,
    /// Its argument: a path, a number.
    pub on: String,
    /// Why.
    pub errno: Errno,
}

impl SysError {
    /// Whether it was refused for what may be otherwise in a moment, wherever it is: no room, too many open files, a disk with
    /// errors. What the kernel can do here, such a refusal does not say.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(
            self.errno,
            Errno::ENOSPC
                | Errno::EDQUOT
                | Errno::EROFS
                | Errno::EIO
                | Errno::ENOMEM
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::EAGAIN
                | Errno::EINTR
        )
    }
}

impl fmt::Display for SysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({}): {}", self.call, self.on, self.errno)
    }
}

impl std::error::Error for SysError {}

/// Names the call and its argument of a failed [`nix::Result`].
pub trait Context<T> {
    /// Turns the errno into a [`SysError`]; `on` is only formatted on failure.
    fn context(self, call: &'static str, on: impl fmt::Display) -> Result<T, SysError>;
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, call: &'static str, on: impl fmt::Display) -> Result<T, SysError> {
        self.map_err(|errno| SysError {
            call,
            on: on.to_string(),
            errno,
        })
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, call: &'static str, on: impl fmt::Display) -> Result<T, SysError> {
        self.map_err(|error| SysError {
            call,
            on: on.to_string(),
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        })
    }
}
