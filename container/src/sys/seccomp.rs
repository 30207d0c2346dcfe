//! System call filters (seccomp(2)).

use nix::Result;
use nix::errno::Errno;
use nix::libc::{self, sock_filter, sock_fprog};

/// What `Seccomp:` of `/proc/self/status` and [`mode`] say of a filtered process.
pub const FILTERED: libc::c_int = 2;

/// Puts this process, which has one thread, behind a filter for ever; whatever it executes, too.
///
/// # Errors
/// `EACCES`: neither `no_new_privs` nor `CAP_SYS_ADMIN`. `EINVAL`: no valid program, or a kernel without
/// filters.
pub fn install(program: &[sock_filter]) -> Result<()> {
    let program = sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?,
        filter: program.as_ptr().cast_mut(),
    };
    let filter = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: seccomp(2) reads one sock_fprog and the instructions it counts, and writes neither.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, filter, 0, &raw const program) };
    Errno::result(answer).map(drop)
}

/// How this process is filtered: 0 not at all, [`FILTERED`] by a program.
///
/// # Errors
/// `EINVAL`: a kernel without seccomp.
pub fn mode() -> Result<libc::c_int> {
    // SAFETY: PR_GET_SECCOMP takes no further argument and touches no memory.
    Errno::result(unsafe { libc::prctl(libc::PR_GET_SECCOMP) })
}
