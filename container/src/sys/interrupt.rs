//! Calling back a thread from a system call that may take for ever.

use crate::fault::{Context, SysError};
use nix::libc::c_int;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The signal that does it: ignored where nobody asks for it, and of no other use here.
pub const SIGNAL: Signal = Signal::SIGURG;

/// Lets [`SIGNAL`] interrupt calls (`EINTR`) in the whole process, and do nothing else. Programs that are executed
/// have it ignored again, as by default (signal(7)).
///
/// # Errors
/// As `sigaction(2)`.
pub fn prepare() -> Result<(), SysError> {
    extern "C" fn nothing(_: c_int) {}
    // Without SA_RESTART: the call is not begun again.
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: a handler that does nothing is safe at any time, and nobody else handles this signal.
    unsafe { sigaction(SIGNAL, &action) }
        .map(drop)
        .context("sigaction", SIGNAL.as_str())
}
