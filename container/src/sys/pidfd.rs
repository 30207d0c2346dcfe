//! Processes by descriptor: a number is reused, a descriptor is not.

use crate::fault::{Context, SysError};
use crate::status::Status;
use nix::errno::Errno;
use nix::libc;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Opens the process with this number (`pidfd_open(2)`, close-on-exec).
///
/// # Errors
/// `ESRCH`: there is none.
pub fn open(pid: i32) -> Result<OwnedFd, SysError> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(answer).context("pidfd_open", pid)?;
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    // SAFETY: the call has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal; 0 only asks whether the process is there.
///
/// # Errors
/// `ESRCH`: it is dead.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> Result<(), SysError> {
    let fd = pidfd.as_fd().as_raw_fd();
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: pidfd_send_signal(2) accepts a null siginfo and then fills in its own.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) };
    Errno::result(answer)
        .map(drop)
        .context("pidfd_send_signal", format_args!("signal {signal}"))
}

/// Waits until this child of ours ends and reaps it; blocks. The status is [`Status::Exited`] or
/// [`Status::Signaled`].
///
/// # Errors
/// `ECHILD`: not our child, or somebody reaped it already.
pub fn wait(pidfd: impl AsFd) -> Result<Status, SysError> {
    let id = libc::id_t::try_from(pidfd.as_fd().as_raw_fd()).unwrap_or(libc::id_t::MAX);
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // __WALL too: a child cloned with exit signal 0 is not waited for without it.
        let options = libc::WEXITED | libc::__WALL;
        // SAFETY: waitid(2) writes one siginfo_t to the pointer, which has room for it.
        let answer = unsafe { libc::waitid(libc::P_PIDFD, id, info.as_mut_ptr(), options) };
        match Errno::result(answer) {
            Err(Errno::EINTR) => continue,
            other => other
                .map(drop)
                .context("waitid", format_args!("pidfd {id}"))?,
        }
        // SAFETY: zeroed is a valid siginfo_t (integers only), and the call has filled it.
        let info = unsafe { info.assume_init() };
        // SAFETY: for a child's state change the kernel fills the SIGCHLD member of the union.
        let value = unsafe { info.si_status() };
        return Ok(match info.si_code {
            libc::CLD_EXITED => Status::Exited(u8::try_from(value & 0xff).unwrap_or(u8::MAX)),
            _ => Status::Signaled(value),
        });
    }
}

/// The process's number as this process's pid namespace sees it; `None` once it was reaped.
///
/// # Errors
/// `/proc` is missing, or the descriptor is no pidfd (`EINVAL`).
pub fn pid_of(pidfd: impl AsFd) -> Result<Option<i32>, SysError> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd());
    let mut text = String::new();
    let file = std::fs::File::open(&path).context("open", &path)?;
    file.take(4096)
        .read_to_string(&mut text)
        .context("read", &path)?;
    // "Pid:\t4711", or -1 once it is gone; 0 in a foreign pid namespace (pidfd_open(2)).
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    match number.and_then(|number| number.trim().parse::<i32>().ok()) {
        None => Err(Errno::EINVAL).context("read", path),
        Some(pid) => Ok(Some(pid).filter(|pid| *pid > 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::{open, pid_of, send_signal, wait};
    use crate::status::Status;
    use nix::errno::Errno;
    use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
    use std::ffi::{CStr, CString};

    fn child(script: &str) -> i32 {
        let environment: [&CStr; 0] = [];
        let argv = [c"sh", c"-c", &CString::new(script).unwrap()];
        let (actions, attributes) = (
            PosixSpawnFileActions::init().unwrap(),
            PosixSpawnAttr::init().unwrap(),
        );
        posix_spawn("/bin/sh", &actions, &attributes, &argv, &environment)
            .unwrap()
            .as_raw()
    }

    #[test]
    fn ends_come_through() {
        let exits = open(child("exit 7")).unwrap();
        assert_eq!(wait(&exits).unwrap(), Status::Exited(7));
        assert_eq!(wait(&exits).unwrap_err().errno, Errno::ECHILD, "reaped");
        let killed = open(child("kill -9 $$")).unwrap();
        assert_eq!(wait(&killed).unwrap(), Status::Signaled(9));
    }

    #[test]
    fn a_signal_goes_to_the_process_and_not_to_its_number() {
        let pid = child("exec sleep 60");
        let fd = open(pid).unwrap();
        assert_eq!(pid_of(&fd).unwrap(), Some(pid));
        send_signal(&fd, 15).unwrap();
        assert_eq!(wait(&fd).unwrap(), Status::Signaled(15));
        assert_eq!(pid_of(&fd).unwrap(), None);
        assert_eq!(send_signal(&fd, 0).unwrap_err().errno, Errno::ESRCH);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(pid_of(&file).unwrap_err().errno, Errno::EINVAL);
    }
}
