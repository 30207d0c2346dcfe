//! Starting the program that starts the job.

use super::supervise::Pipes;
use crate::{
    fault::{Context, SysError},
    status::{Status, Step},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawnp},
    sys::{
        signal::{SigSet, Signal},
        stat::Mode,
    },
    unistd::pipe2,
};
use std::{
    ffi::CString,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
};

/// Starts `program` (searched for in PATH) with /dev/null, the two pipes, `WSH_STATUS_FD` and
/// `WSH_JOB_FD`, and returns the read ends. An exec that failed is an error here and not a child
/// that ended.
pub(super) fn start(program: &[CString], job: Option<OwnedFd>) -> Result<Pipes, SysError> {
    let null = open(
        "/dev/null",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .context("open", "/dev/null")?;
    let (stdout, out) = pipe("stdout")?;
    let (stderr, err) = pipe("stderr")?;
    let (status, status_end) = pipe("status")?;
    let kept = [
        Some(("WSH_STATUS_FD", &status_end)),
        job.as_ref().map(|job| ("WSH_JOB_FD", job)),
    ];

    let mut actions = PosixSpawnFileActions::init().context("posix_spawn", "file actions")?;
    let standard = [&null, &out, &err].into_iter().zip(0..);
    // A descriptor duplicated onto itself loses its close-on-exec mark
    // (posix_spawn_file_actions_adddup2(3p)).
    let same = kept.iter().flatten().map(|(_, fd)| (*fd, fd.as_raw_fd()));
    for (fd, number) in standard.chain(same) {
        actions
            .add_dup2(fd.as_raw_fd(), number)
            .context("posix_spawn", number)?;
    }
    let mut environment: Vec<CString> = std::env::vars_os()
        .filter(|(name, _)| !OURS.iter().any(|ours| name == ours))
        .filter_map(|(name, value)| {
            CString::new([name.into_vec(), value.into_vec()].join(&b'=')).ok()
        })
        .collect();
    for (name, fd) in kept.into_iter().flatten() {
        environment.extend(CString::new(format!("{name}={}", fd.as_raw_fd())));
    }
    let name = program
        .first()
        .ok_or(Errno::EINVAL)
        .context("posix_spawn", "no program")?;
    posix_spawnp(name, &actions, &attributes()?, program, &environment)
        .context("posix_spawn", name.to_string_lossy())?;
    Ok(Pipes {
        stdout,
        stderr,
        status,
    })
}

/// What the log says of a program that could not be started.
pub(super) fn failed(errno: Errno) -> Status {
    Status::Failed {
        step: Step::Exec,
        errno: errno as i32,
    }
}

/// A pipe: its read end does not block; the write end is for others.
pub(super) fn pipe(what: &str) -> Result<(OwnedFd, OwnedFd), SysError> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).context("pipe2", what)?;
    fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", what)?;
    Ok((read, write))
}

/// Variables that are meant for this process, or that it sets.
const OURS: [&str; 5] = [
    "IOMUX_JOB_FD",
    "IOMUX_SPOOL_BYTES",
    "OSTLER_HANGUP_FD",
    "WSH_JOB_FD",
    "WSH_STATUS_FD",
];

/// Undoes what this process and its runtime ignore, which exec would hand on.
fn attributes() -> Result<PosixSpawnAttr, SysError> {
    let flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK;
    let ignored = SigSet::from_iter([Signal::SIGPIPE, Signal::SIGCHLD]);
    let mut attributes = PosixSpawnAttr::init().context("posix_spawn", "attributes")?;
    attributes
        .set_sigdefault(&ignored)
        .context("posix_spawn", "signals")?;
    attributes
        .set_sigmask(&SigSet::empty())
        .context("posix_spawn", "signal mask")?;
    attributes
        .set_flags(flags)
        .context("posix_spawn", "flags")?;
    Ok(attributes)
}
