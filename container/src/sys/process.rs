//! Processes: fork, wait, signals, limits, inherited descriptors.

use crate::fault::{Context, SysError};
use crate::job::Rlimit;
use crate::status::Status;
use nix::Result;
use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Uid, setresuid};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes possession of a descriptor that came through `exec` under a fixed number, and makes it
/// close-on-exec. To be called once for each number, before anything else is opened.
///
/// # Errors
/// `EBADF`: whoever started us did not give it.
pub fn inherited(fd: RawFd) -> std::result::Result<OwnedFd, SysError> {
    // SAFETY: F_SETFD takes an integer and touches no memory; it fails for a number that is not open.
    let answer = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(answer).context("fcntl", format_args!("inherited descriptor {fd}"))?;
    // SAFETY: it is open (the call above), and by this function's contract nobody owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor from this number on. Only for a program that owns none of them yet.
///
/// # Errors
/// None is known.
pub fn close_from(first: u32) -> Result<()> {
    // SAFETY: close_range(2) takes integers; by this function's contract no owner is left behind.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    Errno::result(answer).map(drop)
}

/// Closes every descriptor but these, which are sorted. Only for a process that drops none that it owns: it
/// ends by [`exit_now`].
///
/// # Errors
/// None is known (Linux 5.9).
pub fn close_all_but(kept: &mut [RawFd]) -> Result<()> {
    kept.sort_unstable();
    let mut first = 0;
    for kept in kept.iter().filter_map(|fd| u32::try_from(*fd).ok()) {
        if let Some(last) = kept.checked_sub(1).filter(|last| *last >= first) {
            // SAFETY: close_range(2) takes integers; by this function's contract no owner is left behind.
            let answer = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            Errno::result(answer)?;
        }
        first = kept + 1;
    }
    close_from(first)
}

/// Marks every descriptor from this number on to be closed by `exec`.
///
/// # Errors
/// None is known (Linux 5.11).
pub fn close_on_exec_from(first: u32) -> Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: close_range(2) takes integers, and with this flag closes nothing now.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    Errno::result(answer).map(drop)
}

/// Forks; the child runs `child`, which executes a program, and ends with 127 should it return. The
/// child's number comes back: it stays its own until [`reap`] has named it.
///
/// # Errors
/// `EAGAIN`: the pids limit is reached. `ENOMEM`: no memory, or the pid namespace is ending.
pub fn fork(child: impl FnOnce()) -> Result<i32> {
    // SAFETY: the programs of this crate have one thread, so the child may do whatever its parent may.
    match Errno::result(unsafe { libc::fork() })? {
        0 => {
            child();
            exit_now(127)
        }
        pid => Ok(pid),
    }
}

/// Ends this process at once: no destructor, no buffer, no handler of the parent's runs twice.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

/// A child that ended: its number and [`Status::Exited`] or [`Status::Signaled`]; `None` when no more
/// have ended. Never blocks. (nix's own refuses a child that a real-time signal ended, after reaping it.)
pub fn reap() -> Option<(i32, Status)> {
    let mut raw = 0;
    // SAFETY: waitpid(2) writes one int.
    let pid = unsafe { libc::waitpid(-1, &raw mut raw, libc::WNOHANG | libc::__WALL) };
    if pid <= 0 {
        return None;
    }
    let status = if libc::WIFSIGNALED(raw) {
        Status::Signaled(libc::WTERMSIG(raw))
    } else {
        Status::Exited(u8::try_from(libc::WEXITSTATUS(raw)).unwrap_or(u8::MAX))
    };
    Some((pid, status))
}

/// Signals every process of our pid namespace but its init (us) once.
///
/// # Errors
/// `ESRCH`: there is none. `EINVAL`: no such signal. Refused with `EPERM` outside of an init.
pub fn signal_all(signal: i32) -> Result<()> {
    if std::process::id() != 1 {
        return Err(Errno::EPERM);
    }
    // SAFETY: kill(2) takes integers. -1 stays within our pid namespace, whose init we are.
    Errno::result(unsafe { libc::kill(-1, signal) }).map(drop)
}

/// Signals the process group of a child that has not been reaped, so its number is still its own.
///
/// # Errors
/// `ESRCH`: the group is empty. `EINVAL`: no such signal.
pub fn signal_group(leader: i32, signal: i32) -> Result<()> {
    if leader <= 1 {
        return Err(Errno::ESRCH);
    }
    // SAFETY: kill(2) takes integers; the number is above 1, so it is one group and not everybody.
    Errno::result(unsafe { libc::kill(-leader, signal) }).map(drop)
}

/// Gives every signal its default action again: an ignored one would stay ignored through `exec`.
pub fn default_signals() {
    /// The kernel's own `struct sigaction`; all zeros: `SIG_DFL`, no flags, nothing masked. The C
    /// library's call would not touch the two signals that it keeps for itself, 32 and 33.
    #[repr(C)]
    struct Action {
        handler: usize,
        flags: libc::c_ulong,
        restorer: usize,
        mask: u64,
    }
    let default = Action {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let none: *mut Action = std::ptr::null_mut();
    for signal in 1..=64 {
        // SAFETY: rt_sigaction(2) reads one kernel sigaction with a mask of eight bytes, and installs no
        // code of ours. It refuses KILL and STOP, which cannot be ignored either.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                none,
                size_of::<u64>(),
            )
        };
    }
}

/// Leaves the session keyring that we were started with for a new, empty one. A kernel without keys has
/// none to leave.
///
/// # Errors
/// `EDQUOT`: too many keys.
pub fn new_session_keyring() -> Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    let unnamed: *const libc::c_char = std::ptr::null();
    // SAFETY: keyctl(2) takes a null name for an anonymous keyring.
    let answer = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, unnamed) };
    match Errno::result(answer) {
        Err(Errno::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}

/// Does something as another user of the host, with all capabilities: what the kernel makes on the way is
/// that user's, and counts on its account.
///
/// # Errors
/// `EPERM`: no `CAP_SETPCAP` or `CAP_SETUID`; nothing was done. `work`'s own.
pub fn as_user<T>(
    uid: u32,
    work: impl FnOnce() -> std::result::Result<T, SysError>,
) -> std::result::Result<T, SysError> {
    /// `SECBIT_NO_SETUID_FIXUP`: ids change, capabilities stay (capabilities(7)).
    const NO_SETUID_FIXUP: libc::c_ulong = 4;
    let keep = |bits: libc::c_ulong| {
        // SAFETY: PR_SET_SECUREBITS takes a number and touches no memory.
        let answer = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) };
        Errno::result(answer).context("prctl", "PR_SET_SECUREBITS")
    };
    let become_ = |uid: u32| {
        // "Leave it" to setresuid(2): the real id stays, and with it the unlimited processes of root.
        let same = Uid::from_raw(u32::MAX);
        setresuid(same, Uid::from_raw(uid), same).context("setresuid", uid)
    };
    keep(NO_SETUID_FIXUP)?;
    become_(uid)?;
    let done = work();
    become_(0)?;
    keep(0)?;
    done
}

/// Readies what jobs inherit and cannot get once we have left the host's user namespace: the highest limit on
/// open files that may be had, one byte of a core file, also where the agent may have none (0 is no better: see
/// `wshd/exec.rs`), and no protection from the host's OOM killer, which the agent may have.
/// What is refused stays as it is.
pub fn prepare_limits() {
    let raised = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let most: Option<u64> = raised.ok().and_then(|text| text.trim().parse().ok());
    if let (Some(most), Ok((soft, _))) = (most, getrlimit(Resource::RLIMIT_NOFILE)) {
        let _as_it_was = setrlimit(Resource::RLIMIT_NOFILE, soft, most);
    }
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_CORE) {
        let _as_it_was = setrlimit(Resource::RLIMIT_CORE, 1, hard.max(1));
    }
    let _as_it_was = std::fs::write("/proc/self/oom_score_adj", "0");
}

/// The supplementary groups of this process, in ascending order. (nix's own asks the C library for the most
/// that there can be, which reads a file of the root file system's `/proc`.)
///
/// # Errors
/// None is known.
pub fn groups() -> Result<Vec<u32>> {
    // SAFETY: with no room getgroups(2) counts, and writes nothing.
    let count = Errno::result(unsafe { libc::getgroups(0, std::ptr::null_mut()) })?;
    let mut groups = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: getgroups(2) writes as many numbers as there is room for, or refuses.
    Errno::result(unsafe { libc::getgroups(count, groups.as_mut_ptr()) })?;
    groups.sort_unstable();
    Ok(groups)
}

/// A resource limit of a process, by its number in our pid namespace.
///
/// # Errors
/// `ESRCH`: there is none.
pub fn rlimit_of(pid: i32, resource: u32) -> Result<Rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: prlimit(2) with no new limit writes one rlimit.
    let answer = unsafe { libc::prlimit(pid, resource, std::ptr::null(), &raw mut limit) };
    Errno::result(answer)?;
    Ok(Rlimit {
        resource,
        soft: limit.rlim_cur,
        hard: limit.rlim_max,
    })
}

/// Sets a resource limit of a process, by its number in our pid namespace.
///
/// # Errors
/// `ESRCH`: there is none. `EPERM`: the hard limit may not be raised.
pub fn set_rlimit_of(pid: i32, limit: &Rlimit) -> Result<()> {
    let wanted = libc::rlimit {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: prlimit(2) reads one rlimit, and with a null pointer writes none.
    let answer =
        unsafe { libc::prlimit(pid, limit.resource, &raw const wanted, std::ptr::null_mut()) };
    Errno::result(answer).map(drop)
}

/// Sets a resource limit. Where we may not raise the hard limit (no `CAP_SYS_RESOURCE`), it and the soft
/// one end at the hard limit that we have.
///
/// # Errors
/// `EINVAL`: no such resource, or the soft limit is above the hard one.
pub fn set_rlimit(limit: &Rlimit) -> Result<()> {
    let wanted = libc::rlimit {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: prlimit(2) for ourselves reads one rlimit.
    let set = |limit_: &libc::rlimit| unsafe {
        libc::prlimit(0, limit.resource, limit_, std::ptr::null_mut())
    };
    match Errno::result(set(&wanted)) {
        Err(Errno::EPERM) => {}
        other => return other.map(drop),
    }
    let mut ours = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: prlimit(2) for ourselves with no new limit writes one rlimit.
    let answer = unsafe { libc::prlimit(0, limit.resource, std::ptr::null(), &raw mut ours) };
    Errno::result(answer)?;
    let hard = wanted.rlim_max.min(ours.rlim_max);
    let cut = libc::rlimit {
        rlim_cur: wanted.rlim_cur.min(hard),
        rlim_max: hard,
    };
    Errno::result(set(&cut)).map(drop)
}
