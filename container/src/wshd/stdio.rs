//! The descriptors that come with a job, and how they become its own.

use crate::request::{Io, Window};
use crate::sys::pipe::is_anonymous;
use crate::sys::terminal;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use nix::unistd::{Uid, fchown};
use std::os::fd::{AsRawFd, OwnedFd};

/// The descriptors of a run request, by what they are.
pub(super) struct Passed {
    pub(super) file: OwnedFd,
    pub(super) stdio: Stdio,
    pub(super) pipe: Option<OwnedFd>,
}

pub(super) enum Stdio {
    Given([OwnedFd; 3]),
    Terminal(Window),
}

pub(super) fn passed(io: Io, fds: Vec<OwnedFd>) -> Option<Passed> {
    let mut fds = fds.into_iter();
    let file = fds.next()?;
    let stdio = match io {
        Io::Descriptors => Stdio::Given([fds.next()?, fds.next()?, fds.next()?]),
        Io::Terminal(window) => Stdio::Terminal(window),
    };
    let pipe = fds.next();
    fds.next().is_none().then_some(Passed { file, stdio, pipe })
}

/// The job's three descriptors, which are its user's, and the master.
pub(super) fn open_terminal(window: Window, uid: u32) -> Result<([OwnedFd; 3], OwnedFd), Errno> {
    let (master, slave) = terminal::new(window)?;
    fchown(&slave, Some(Uid::from_raw(uid)), None)?;
    let copy = || slave.try_clone().map_err(|_| Errno::EMFILE);
    Ok(([copy()?, copy()?, slave], master))
}

/// A second reader of a pipe, so that it does not break when its first one dies.
pub(super) fn spare_reader(writer: &OwnedFd) -> Option<OwnedFd> {
    if kind(writer).ok()? != SFlag::S_IFIFO {
        return None;
    }
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty()).ok()
}

/// Makes a descriptor fit for the job: a pipe of its supervisor becomes its user's (else it could not reopen
/// `/dev/stdout`; a person's pipe may be others', too, and stays as it is), the host's null device becomes the container's own, and a directory is refused: it
/// would lead out (CVE-2024-21626). A person's files stay as they are.
pub(super) fn hand_over(fd: OwnedFd, user: Option<u32>) -> Result<OwnedFd, Errno> {
    let kind = kind(&fd)?;
    if kind == SFlag::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    let device = fstat(&fd)?.st_rdev;
    if kind == SFlag::S_IFCHR && (major(device), minor(device)) == (1, 3) {
        return open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
    }
    if let Some(user) = user
        && is_anonymous(&fd)?
    {
        fchown(&fd, Some(Uid::from_raw(user)), None)?;
    }
    Ok(fd)
}

fn kind(fd: &OwnedFd) -> Result<SFlag, Errno> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT)
}
