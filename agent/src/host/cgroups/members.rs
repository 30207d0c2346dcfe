//! Who is in a group: listing, killing, and waiting until nobody is left.

use super::layout::Version;
use super::{CgroupError, Group, write};
use cgroups_rs::MaxValue;
use cgroups_rs::freezer::FreezerController;
use container::sys::pidfd;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the members of a v1 group are listed and killed before giving up. Nothing can be born
/// meanwhile, so two suffice; should the kernel not take the limit, a fork storm gets this many.
const KILL_PASSES: usize = 100;

/// Members that are killed at once: each takes a descriptor, and many containers may be killed at the same time.
const AT_ONCE: usize = 64;

/// Between two looks at a v1 group whose listed members are dead but not gone yet.
const PAUSE: Duration = Duration::from_millis(1);

impl Group {
    /// The processes in any of its directories, sorted; a process that is joining may be in some of
    /// them only. Empty if the group is gone. Those of a pid namespace that we cannot see are left out.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        let directories = self.directories();
        let pids: BTreeSet<i32> = directories
            .iter()
            .flat_map(|(_, directory)| members(directory))
            .collect();
        pids.into_iter().collect()
    }

    /// Whether it has no process, or is gone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pids().is_empty()
    }

    /// Sends SIGKILL to every process in it, frozen or not, and lets none escape by forking. Does not
    /// wait for their deaths: see [`wait_empty`](Self::wait_empty), which also tells whether it worked.
    /// Never kills the caller.
    pub fn kill(&self) {
        let mut all = true;
        for (version, directory) in self.directories() {
            // v2: one write for all, forks in flight included (Linux 5.14). v1 has no such file; and
            // who was joining when it went wrong may be in a v1 directory only.
            all &= version == Version::V2 && write(&directory.join("cgroup.kill"), "1").is_ok();
        }
        if !all {
            self.kill_one_by_one();
        }
    }

    /// Blocks until no process is left in it, or it is gone.
    ///
    /// # Errors
    /// [`CgroupError::Busy`] after `deadline`.
    pub fn wait_empty(&self, deadline: Duration) -> Result<(), CgroupError> {
        let end = Instant::now() + deadline;
        for (version, directory) in self.directories() {
            let left = match version {
                Version::V1 => wait_for_members(&directory, end),
                Version::V2 => wait_for_event(&directory, end),
            };
            match left.map_err(CgroupError::refused("wait for", &directory))? {
                Left::Nobody => {}
                Left::Somebody => {
                    return Err(CgroupError::Busy {
                        group: directory,
                        waited: deadline,
                    });
                }
            }
        }
        Ok(())
    }

    /// v1, or a hierarchy whose v2 group does not hold them all.
    fn kill_one_by_one(&self) {
        // With a limit of 0 forks fail, so who is listed from now on was there before; and a fork that
        // has passed that check aborts when the signal to its parent is seen.
        let before = self.pids_max();
        let pids = self.pids_controller();
        let hold = |max: MaxValue| pids.set_pid_max(max);
        let _gone = hold(MaxValue::Value(0));
        let mut killed = BTreeSet::new();
        for _ in 0..KILL_PASSES {
            let mut listed = self.pids();
            listed.retain(|pid| !killed.contains(pid) && pid.unsigned_abs() != std::process::id());
            if listed.is_empty() {
                break;
            }
            for some in listed.chunks(AT_ONCE) {
                killed.extend(self.kill_members(some));
            }
            self.thaw();
        }
        let _gone = before.map(hold);
    }

    /// Kills those that are members; the numbers of those that it reached.
    fn kill_members(&self, pids: &[i32]) -> Vec<i32> {
        let open = |pid: &i32| pidfd::open(*pid).ok().map(|fd| (*pid, fd));
        let mut found: Vec<(i32, OwnedFd)> = pids.iter().filter_map(open).collect();
        // A second look: a number that is still listed after its descriptor was opened was not
        // reused in between, or the descriptor's process is dead.
        let still = self.pids();
        found.retain(|(pid, _)| still.binary_search(pid).is_ok());
        for (_, fd) in &found {
            let _dead = pidfd::send_signal(fd, Signal::SIGKILL as i32);
        }
        found.into_iter().map(|(pid, _)| pid).collect()
    }

    /// v1: a frozen process does not even die. v2's do.
    fn thaw(&self) {
        if let Some(place) = &self.layout.freezer {
            let _gone = FreezerController::new(self.directory(place), false).thaw();
        }
    }
}

/// Outcome of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Nobody,
    Somebody,
}

/// v2: `cgroup.events` wakes a poll for POLLPRI when `populated` changes after it was last read.
fn wait_for_event(directory: &Path, end: Instant) -> io::Result<Left> {
    let gone = |error: &io::Error| {
        matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::ENOENT | Errno::ENODEV)
        )
    };
    let events = match File::open(directory.join("cgroup.events")) {
        Err(error) if gone(&error) => return Ok(Left::Nobody),
        events => events?,
    };
    loop {
        // Two short lines (`populated 1`, `frozen 0`).
        let mut text = [0; 256];
        let length = match events.read_at(&mut text, 0) {
            Err(error) if gone(&error) => return Ok(Left::Nobody),
            length => length?,
        };
        let text = text.get(..length).unwrap_or_default();
        if text
            .split(|byte| *byte == b'\n')
            .any(|line| line == b"populated 0")
        {
            return Ok(Left::Nobody);
        }
        if wait(&events, PollFlags::POLLPRI, end)? == Woken::Late {
            return Ok(Left::Somebody);
        }
    }
}

/// v1 has no event for an empty group but a program that the kernel starts for the whole host. So the
/// members are waited for, one after the other, by their descriptors. What remains is to look again
/// for a process that is dead but still listed, or that belongs to a pid namespace we cannot see.
fn wait_for_members(directory: &Path, end: Instant) -> io::Result<Left> {
    let mut waited_for = None;
    loop {
        // Not `members`: a process of another namespace reads as 0, and counts.
        let Some(pid) = listed(directory).into_iter().next() else {
            return Ok(Left::Nobody);
        };
        let pidfd = (waited_for != Some(pid))
            .then(|| pidfd::open(pid).ok())
            .flatten();
        waited_for = Some(pid);
        let woken = match pidfd {
            Some(pidfd) => wait(&pidfd, PollFlags::POLLIN, end)?,
            None if Instant::now() >= end => Woken::Late,
            None => {
                pause(PAUSE);
                Woken::InTime
            }
        };
        if woken == Woken::Late {
            return Ok(Left::Somebody);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    InTime,
    Late,
}

/// Waits for the descriptor's event, or until `end`.
fn wait(on: &impl AsFd, flags: PollFlags, end: Instant) -> io::Result<Woken> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Woken::Late);
        }
        match poll(&mut [PollFd::new(on.as_fd(), flags)], timeout(left)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(Woken::InTime),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives the processor away for a moment, where the kernel has no event to wait for.
pub(super) fn pause(time: Duration) {
    // Cut short by a signal it is as good.
    let _interrupted = poll(&mut [], timeout(time));
}

/// In whole milliseconds, rounded up: 0 would not wait at all.
fn timeout(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
}

fn members(directory: &Path) -> impl Iterator<Item = i32> {
    listed(directory).into_iter().filter(|pid| *pid > 0)
}

/// `cgroup.procs` as it is, or nothing if the group is gone.
pub(super) fn listed(directory: &Path) -> Vec<i32> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}
