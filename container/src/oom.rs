//! `oom`: tells how many processes of a memory group the kernel has killed for want of memory, as
//! soon as it is one more.
//!
//! A wake-up only means "read again": on cgroup v1 the event comes before the kill is counted, and
//! also to groups that only stand beside; on v2 it comes for every counter of `memory.events`.

use crate::{
    exit,
    fault::{Context, SysError},
    hangup::{Hangup, Woken},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    poll::{PollFlags, PollTimeout},
    sys::{
        eventfd::{EfdFlags, EventFd},
        stat::Mode,
        uio::pread,
    },
    unistd::write,
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    process::ExitCode,
};

const USAGE: &str = "\
usage: oom <directory of a memory cgroup>

Prints `baseline N` (processes of this group that the kernel has killed so far because memory ran out), then
`oom_kill N` whenever it is more. On cgroup v2 N counts the groups below too, and a line `local N` before it counts
this group alone. Ends when the group is removed (v1) or its last process ended (v2).

OSTLER_HANGUP_FD is a pipe whose end ends this process.
Exit: 3 the group is gone; 4 hang-up; 1 failure; 2 usage
";

/// First and longest pause, in ms, between two looks at whether v1 has counted the kill that it
/// announced; each is twice as long as the one before, so all together are twice the longest. A starved
/// victim takes its time to die.
const PAUSES_MS: (u16, u16) = (1, 2048);

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [group] = args.as_slice() else {
        eprint!("{USAGE}");
        return ExitCode::from(exit::USAGE);
    };
    if group == "--help" || group == "-h" {
        print!("{USAGE}");
        return ExitCode::from(exit::DONE);
    }
    ExitCode::from(
        Hangup::inherit()
            .and_then(|hangup| watch(Path::new(group), &hangup))
            .unwrap_or_else(|error| {
                eprintln!("oom: {error}");
                exit::FAILED
            }),
    )
}

/// A memory group, with what wakes us when it changes.
#[derive(Debug)]
enum Group {
    V1 {
        control: OwnedFd,
        event: EventFd,
    },
    V2 {
        events: OwnedFd,
        local: Option<OwnedFd>,
        life: OwnedFd,
    },
}

/// What the kernel counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    /// Kills in the group; on v2 in the groups below as well.
    total: u64,
    /// On v2: kills in the group alone.
    local: Option<u64>,
    /// Whether there is a process in the group or below; v1 does not tell and says yes.
    populated: bool,
}

/// Tells changes until there is nothing more to tell; why that is, as an exit code.
fn watch(path: &Path, hangup: &Hangup) -> Result<u8, SysError> {
    let group = match Group::open(path) {
        // Removed before we came, or between two files of it; a directory that stays is no memory group.
        Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENODEV) && !path.exists() => {
            return Ok(exit::GONE);
        }
        opened => opened?,
    };
    let Some(mut known) = group.count()? else {
        return Ok(exit::GONE);
    };
    if !say(&known, "baseline")? {
        return Ok(exit::HUNG_UP);
    }
    // On v1 a kill may have been announced before we listened, and not have been counted yet.
    let mut pause = group.first_pause();
    loop {
        match group.wait(hangup, pause)? {
            Woken::HungUp => return Ok(exit::HUNG_UP),
            // Every announcement may be followed late by its count, also one that came in a pause.
            Woken::Ready => pause = group.first_pause(),
            Woken::TimedOut => pause = pause.map(|ms| ms * 2).filter(|ms| *ms <= PAUSES_MS.1),
        }
        let Some(now) = group.count()? else {
            return Ok(exit::GONE);
        };
        if now.total != known.total {
            if !say(&now, "oom_kill")? {
                return Ok(exit::HUNG_UP);
            }
            // Several announcements are one event.
            pause = group.first_pause();
        }
        if known.populated && !now.populated {
            return Ok(exit::GONE);
        }
        known = now;
    }
}

impl Group {
    fn open(path: &Path) -> Result<Self, SysError> {
        let dir = open(path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .context("open", path.display())?;
        let file = |name: &'static str, flags| {
            openat(&dir, name, flags | OFlag::O_CLOEXEC, Mode::empty())
                .context("open", path.join(name).display())
        };
        match file("memory.events", OFlag::O_RDONLY) {
            Ok(events) => {
                let local = file("memory.events.local", OFlag::O_RDONLY).ok();
                Ok(Self::V2 {
                    events,
                    local,
                    life: file("cgroup.events", OFlag::O_RDONLY)?,
                })
            }
            Err(error) if error.errno != Errno::ENOENT => Err(error),
            Err(_) => {
                let control = file("memory.oom_control", OFlag::O_RDONLY)?;
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                    .context("eventfd", "")?;
                // cgroup-v1/memory.rst, "OOM Control": "<event_fd> <fd of memory.oom_control>".
                let order = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
                write(
                    file("cgroup.event_control", OFlag::O_WRONLY)?,
                    order.as_bytes(),
                )
                .context("write", path.join("cgroup.event_control").display())?;
                Ok(Self::V1 { control, event })
            }
        }
    }

    /// After what time to look again without an event: v1 announces a kill before it counts it.
    fn first_pause(&self) -> Option<u16> {
        match self {
            Self::V1 { .. } => Some(PAUSES_MS.0),
            Self::V2 { .. } => None,
        }
    }

    /// Waits until a counter may have changed, or the pause (in ms) is over.
    fn wait(&self, hangup: &Hangup, pause: Option<u16>) -> Result<Woken, SysError> {
        let timeout = pause.map_or(PollTimeout::NONE, PollTimeout::from);
        match self {
            Self::V1 { event, .. } => {
                let woken = hangup.wait([(event.as_fd(), PollFlags::POLLIN)], timeout)?;
                match event.read() {
                    Ok(_) | Err(Errno::EAGAIN) => Ok(woken),
                    Err(errno) => Err(errno).context("read", "eventfd"),
                }
            }
            Self::V2 { events, life, .. } => {
                let changed = PollFlags::POLLPRI;
                hangup.wait(
                    [(events.as_fd(), changed), (life.as_fd(), changed)],
                    timeout,
                )
            }
        }
    }

    /// Reads the counters; `None` if the group was removed.
    fn count(&self) -> Result<Option<Count>, SysError> {
        let read = || match self {
            Self::V1 { control, .. } => Ok(Count {
                total: number(control, "oom_kill")?,
                local: None,
                populated: true,
            }),
            Self::V2 {
                events,
                local,
                life,
            } => {
                // In this order: what is killed after the first look empties the group later, and
                // wakes us again; what is in the total is in the group's own count already.
                let populated = number(life, "populated")? != 0;
                let total = number(events, "oom_kill")?;
                let local = local.as_ref().map(|local| number(local, "oom_kill"));
                Ok(Count {
                    total,
                    local: local.transpose()?,
                    populated,
                })
            }
        };
        match read() {
            // kernfs answers so for the files of a directory that was removed.
            Err(Errno::ENODEV) => Ok(None),
            counted => counted.context("read", "oom_kill").map(Some),
        }
    }
}

/// The value of one line of a file such as `memory.events`.
fn number(file: &OwnedFd, key: &str) -> nix::Result<u64> {
    let mut buffer = [0; 1024];
    let length = pread(file, &mut buffer, 0)?;
    let text = buffer
        .get(..length)
        .and_then(|bytes| std::str::from_utf8(bytes).ok());
    text.and_then(|text| value(text, key)).ok_or(Errno::EBADMSG)
}

fn value(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
}

/// Prints a change; false if nobody reads it.
fn say(count: &Count, what: &str) -> Result<bool, SysError> {
    let local = count
        .local
        .map_or(String::new(), |local| format!("local {local}\n"));
    match write(
        io::stdout(),
        format!("{local}{what} {}\n", count.total).as_bytes(),
    ) {
        Err(Errno::EPIPE) => Ok(false),
        written => written.context("write", "stdout").map(|_| true),
    }
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n";
        let v2 = "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(
            (value(v1, "oom_kill"), value(v2, "oom_kill")),
            (Some(7), Some(1))
        );
        assert_eq!(value("oom_kill_disable 0\n", "oom_kill"), None);
        assert_eq!(value("oom_kill x\n", "oom_kill"), None);
    }
}
