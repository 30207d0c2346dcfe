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
