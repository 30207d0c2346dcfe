//! Making the container's processes.

use crate::fault::{Context, SysError};
use nix::errno::Errno;
use nix::libc;
use nix::sched::CloneFlags;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// On which side of the clone we are.
#[derive(Debug)]
pub enum Side {
    /// The new process.
    Child,
    /// The one that made it.
    Parent {
        /// The new process, close-on-exec.
        pidfd: OwnedFd,
        /// Its number as we see it.
        pid: i32,
    },
}

/// Clones this process into new namespaces, and into a v2 control group if one is given. Other
/// namespaces belong to the new user namespace, if one is among them. The child's end sends no signal
/// until init has adopted it.
///
/// # Errors
/// `EPERM`: no `CAP_SYS_ADMIN`. `EBUSY`, `EOPNOTSUPP`: the group takes no processes. `ENOSPC`: too many
/// namespaces (`/proc/sys/user/max_*_namespaces`). `EINVAL`: the kernel has no such namespace.
pub fn into_namespaces(
    namespaces: CloneFlags,
    group: Option<BorrowedFd<'_>>,
) -> Result<Side, SysError> {
    /// Not an `int`: clone3(2) only.
    const INTO_CGROUP: u64 = 0x2_0000_0000;

    let mut pidfd: RawFd = -1;
    let mut flags = u64::from((namespaces.bits() | libc::CLONE_PIDFD).cast_unsigned());
    let mut cgroup = 0;
    if let Some(group) = group {
        flags |= INTO_CGROUP;
        cgroup = u64::try_from(group.as_raw_fd()).unwrap_or(u64::MAX);
    }
    let arguments = libc::clone_args {
        flags,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    // SAFETY: clone3(2) reads one clone_args of this size and writes a descriptor to `pidfd`, which
    // lives until after the call. Without CLONE_VM and with stack 0 the child goes on in a copy of this
    // memory, like fork(2); the program has one thread, so no lock is held by another.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match Errno::result(answer).context("clone3", format_args!("{namespaces:?}"))? {
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent {
            // SAFETY: the kernel has just put this descriptor there for us alone.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
            pid: i32::try_from(pid).unwrap_or(0),
        }),
    }
}
