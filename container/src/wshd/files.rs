//! How many files the processes of a running container may have open: `wshd --open-files`.
//!
//! Not done by the init, which is of the container's user namespace: only a process of the host's may raise
//! a hard limit (`CAP_SYS_RESOURCE` there; kernel/sys.c, `do_prlimit`). Nor by the agent: prlimit(2) takes a
//! number, and outside numbers are everybody's. So a process of the host enters the container's pid
//! namespace: whatever number it uses there, it is one of the container. It enters the other namespaces, too,
//! as its /proc entry there would show the host's mounts and connections; it opens nothing in them.
//!
//! A child inherits its parent's limits, so after a pass that finds nothing to change only a fork that was
//! under way all the time can have the old ones; another pass looks for its child.

use crate::exit;
use crate::fault::{Context, SysError};
use crate::job::Rlimit;
use crate::status::Status;
use crate::sys::{pidfd, process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::libc;
use nix::poll::poll;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_name;
use nix::sys::stat::Mode;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The argument that asks for this.
pub(super) const OPTION: &str = "--open-files";

/// Where a descriptor of the container's init is passed.
pub const INIT_FD: i32 = 3;

/// Most passes; a fork storm needs three.
const PASSES: u32 = 100;

/// Milliseconds before each of the passes that must find nothing to change: a process that is being forked is in
/// no list, and has its parent's old limits. A fork takes some 0.1 ms, where a processor is emulated some 10, and
/// longer where its group has used up its processor time. One that takes longer than all of these is missed.
const PAUSES: [u16; 6] = [2, 4, 8, 16, 32, 64];

/// The program: `group` is a control group's directory, `before` and `after` are numbers of open files.
pub(super) fn main(arguments: &[OsString]) -> u8 {
    // Of a sealed file it has the name of a descriptor.
    let _as_it_is = set_name(c"wshd");
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse().ok());
    let [group, before, after] = arguments else {
        return exit::USAGE;
    };
    let (Some(before), Some(after)) = (number(before), number(after)) else {
        return exit::USAGE;
    };
    let done =
        process::inherited(INIT_FD).and_then(|init| inside(&init, Path::new(group), before, after));
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("wshd: open files: {error}");
            exit::FAILED
        }
    }
}

/// Does it from a child in the pid namespace of `init`; that child's exit code.
fn inside(init: &OwnedFd, group: &Path, before: u64, after: u64) -> Result<u8, SysError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let group = &open(group, flags, Mode::empty()).context("open", group.display())?;
    let all = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    setns(init, all).context("setns", "the container's namespaces")?;
    let child = process::fork(|| {
        let code = match change_somehow(init, group, before, after) {
            Ok(()) => exit::DONE,
            Err(error) if error.errno == Errno::EPERM => exit::REFUSED,
            Err(error) => {
                eprintln!("wshd: open files: {error}");
                exit::FAILED
            }
        };
        process::exit_now(code.into())
    });
    let child = pidfd::open(child.context("fork", "in the container's pid namespace")?)?;
    Ok(match pidfd::wait(child)? {
        Status::Exited(code) => code,
        // With the container.
        Status::Signaled(_) | Status::Started { .. } | Status::Failed { .. } => exit::GONE,
    })
}

/// As a process of the host's, or, where it has no `CAP_SYS_RESOURCE`, as one of the container's user
/// namespace: there we have it, which is enough for others' limits, though not to raise a hard one.
fn change_somehow(
    init: &OwnedFd,
    group: &OwnedFd,
    before: u64,
    after: u64,
) -> Result<(), SysError> {
    match change(group, before, after) {
        Err(error) if error.errno == Errno::EPERM => {
            // EINVAL: the init is of our own user namespace.
            setns(init, CloneFlags::CLONE_NEWUSER).map_err(|_| error)?;
            change(group, before, after)
        }
        other => other,
    }
}

/// Passes over all processes of the group until they are as they shall be.
fn change(group: &OwnedFd, before: u64, after: u64) -> Result<(), SysError> {
    let mut pauses = PAUSES.iter();
    for _ in 0..PASSES {
        let Some(pause) = pauses.next() else {
            return Ok(());
        };
        poll(&mut [], *pause).context("poll", "pause")?;
        if pass(group, before, after)? {
            pauses = PAUSES.iter();
        }
    }
    Err(Errno::EAGAIN).context("prlimit", "processes that fork all the time")
}

/// Looks at each process once; whether any had to be changed.
fn pass(group: &OwnedFd, before: u64, after: u64) -> Result<bool, SysError> {
    let mut changed = false;
    // The kernel writes the numbers of the reader's pid namespace, 0 for a process that has none there.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let file =
        openat(group, "cgroup.procs", flags, Mode::empty()).context("open", "cgroup.procs")?;
    let members = std::io::read_to_string(File::from(file)).context("read", "cgroup.procs")?;
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        // The init is the engine's.
        if pid > 1 {
            match change_one(pid, before, after) {
                // It ended meanwhile.
                Err(Errno::ESRCH) => {}
                one => changed |= one.context("prlimit", pid)?,
            }
        }
    }
    Ok(changed)
}

fn change_one(pid: i32, before: u64, after: u64) -> nix::Result<bool> {
    let has = process::rlimit_of(pid, libc::RLIMIT_NOFILE)?;
    let shall = wanted(has, before, after);
    if shall == has {
        return Ok(false);
    }
    process::set_rlimit_of(pid, &shall)?;
    Ok(true)
}

/// What a process gets that has `now`. One that had made a number smaller for itself keeps that, as far
/// as it is allowed to.
fn wanted(now: Rlimit, before: u64, after: u64) -> Rlimit {
    let one = |now: u64| if now < before { now.min(after) } else { after };
    Rlimit {
        soft: one(now.soft),
        hard: one(now.hard),
        ..now
    }
}

#[cfg(test)]
mod tests {
    use super::wanted;
    use crate::job::Rlimit;

    #[test]
    fn who_has_less_by_choice_keeps_it() {
        let limit = |(soft, hard)| Rlimit {
            resource: 7,
            soft,
            hard,
        };
        for (now, before, after, then) in [
            ((100, 100), 100, 50, (50, 50)),
            ((100, 100), 100, 200, (200, 200)),
            ((30, 100), 100, 200, (30, 200)),
            ((30, 100), 100, 50, (30, 50)),
            ((30, 30), 100, 200, (30, 30)),
            ((30, 30), 100, 20, (20, 20)),
            ((30, 30), 0, 200, (200, 200)),
            // Once more: it is as it shall be.
            ((50, 50), 100, 50, (50, 50)),
            ((200, 200), 100, 200, (200, 200)),
        ] {
            let got = wanted(limit(now), before, after);
            assert_eq!((got.soft, got.hard), then, "{now:?} {before} {after}");
            assert!(got.soft <= got.hard);
        }
    }
}
