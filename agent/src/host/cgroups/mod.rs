//! Control groups: what a container may use, what it uses, and who belongs to it.
//!
//! ```text
//! /sys/fs/cgroup/<memory, cpu, pids, …>/ostler/<handle>/    v1: a directory in each hierarchy
//! /sys/fs/cgroup/ostler/<handle>/                           v2: one directory
//! ```
//!
//! v2 is the main road; v1 and hybrid hosts work too (see [`layout`]). Everything here is synchronous
//! and belongs on the blocking pool: a rmdir can wait for the kernel.
//!
//! Limits, device rules and the freezer are written through `cgroups-rs`, which knows both
//! generations' file names. Making, finding, reading and removing groups is done here, since that
//! crate ignores a failed mkdir, leaves parents behind, and panics when a group vanishes under a read.
//!
//! Not set: `memory.oom.group`. v1 has nothing like it, and it would kill the container's init before
//! that could report how the app ended; that one kill ends the instance is decided further up.

mod devices;
mod layout;
mod limits;
mod members;
#[cfg(test)]
pub(crate) mod tests;
mod usage;

use devices::Confinement;
pub use layout::Controller;
use layout::{Layout, Place, Version};
pub use limits::Limits;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
pub use usage::Usage;

/// What the first process of a container needs to join its groups, all close-on-exec.
#[derive(Debug)]
pub struct JoinFiles {
    /// `tasks` of each v1 group. Writing `0` moves the calling *thread* and takes no global lock;
    /// a number, or `cgroup.procs`, waits for an RCU grace period.
    pub v1_tasks: Vec<OwnedFd>,
    /// The v2 group itself, for `CLONE_INTO_CGROUP`.
    pub v2_dir: Option<OwnedFd>,
}

/// Why something could not be done with a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A parent or handle that is no path of plain names.
    #[error("'{0}' does not name a control group: use letters, digits, '-', '_' and '.'")]
    BadName(String),
    /// The host has no memory controller that we could use.
    #[error(
        "no writable hierarchy has the memory controller: boot with 'cgroup_enable=memory', or, \
         inside a container, run that one privileged so that its cgroups are not read-only"
    )]
    NoMemory,
    /// Neither v1's device files nor a v2 hierarchy, where a filter does the same.
    #[error(
        "no writable hierarchy can confine devices: mount cgroup2, or cgroup with the controller 'devices'"
    )]
    NoDevices,
    /// No controller counts processes: a fork bomb would take the host.
    #[error(
        "no writable hierarchy has the controller 'pids', processes cannot be limited: mount it, or boot with a pure cgroup v2 hierarchy"
    )]
    NoPids,
    /// No controller shares processors: weights and caps would bind nobody.
    #[error(
        "no writable hierarchy has the controller 'cpu', processor time cannot be shared or capped: mount it, or boot with a pure cgroup v2 hierarchy"
    )]
    NoCpu,
    /// v2 hands controllers on only from groups without processes, the root excepted.
    #[error(
        "'{0}' has processes of its own, so its children cannot have controllers: move them into a \
         group of their own, such as '{0}/init', before the agent starts"
    )]
    Occupied(PathBuf),
    /// Two agents would take each other's containers for leftovers.
    #[error(
        "the control groups in '{0}' are another agent's, in another network namespace: give this one a `cgroup.parent` of its own"
    )]
    Claimed(PathBuf),
    /// A group with this name is there already.
    #[error("control group '{0}' exists already: its handle is in use")]
    Taken(PathBuf),
    /// A memory limit below what is in use and cannot be reclaimed. Nothing was changed.
    #[error(
        "a limit of {limit} bytes does not fit: {usage} bytes of memory are in use, the smallest limit that is safe has {smallest}"
    )]
    MemoryInUse {
        /// The limit that was asked for, in bytes.
        limit: u64,
        /// What is in use after an attempt to reclaim, in bytes.
        usage: u64,
        /// The smallest limit that fits with a little room, in bytes.
        smallest: u64,
    },
    /// No controller, or one that only knows shares (a kernel without `CONFIG_CFS_BANDWIDTH`).
    #[error(
        "this host cannot cap processor time, its control groups have no quota: leave `instance.max_cpu_percent` out"
    )]
    NoCpuCap,
    /// Processes were still there when the time was up.
    #[error("control group '{group}' still has processes after {waited:?}")]
    Busy {
        /// One of the group's directories.
        group: PathBuf,
        /// How long it was waited.
        waited: Duration,
    },
    /// A call to the kernel failed.
    #[error("cannot {act} '{path}'")]
    Refused {
        /// What was tried, such as `write 5000000 to`.
        act: String,
        /// On which file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl CgroupError {
    /// For `map_err`: what was tried, on what.
    fn refused(act: impl Into<String>, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Refused {
            act: act.into(),
            path: path.to_owned(),
            source,
        }
    }
}

/// All groups of this agent. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cgroups {
    layout: Arc<Layout>,
    devices: Confinement,
}

/// What a host's control groups can do. `None`: no group shows it yet.
#[derive(Debug, Clone)]
pub struct Look {
    /// Each controller with its generation.
    pub controllers: Vec<Controller>,
    /// Whether swap is counted.
    pub swap: Option<bool>,
    /// Whether processor time can be capped.
    pub cpu_cap: Option<bool>,
    /// Whether memory in the queues of TCP connections counts for anybody.
    pub tcp: Option<bool>,
}

/// Whether the kernel was told to leave something out of what memory groups count (`cgroup.memory=`,
/// kernel-parameters.txt).
fn booted_with(left_out: &str) -> bool {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let mut options = line.split_whitespace();
    options.any(|option| {
        let options = option.strip_prefix("cgroup.memory=");
        options.is_some_and(|options| options.split(',').any(|one| one == left_out))
    })
}

/// Whether groups that have `sign` have `file`, too. The root of v2 has no limits; any group below it has that may
/// have some.
fn shown(mount: &Path, sign: &str, file: &str) -> Option<bool> {
    let groups = fs::read_dir(mount).into_iter().flatten().flatten();
    let groups = std::iter::once(mount.to_owned()).chain(groups.map(|group| group.path()));
    let shown: Vec<bool> = groups
        .filter(|group| group.join(sign).exists())
        .map(|group| group.join(file).exists())
        .collect();
    (!shown.is_empty()).then(|| shown.contains(&true))
}

impl Cgroups {
    /// Finds this host's hierarchies and makes the group `parent` (a path; slashes around it
    /// are ignored) below the visible root of each.
    ///
    /// # Errors
    /// [`CgroupError::BadName`], [`CgroupError::NoMemory`], [`CgroupError::NoPids`],
    /// [`CgroupError::NoDevices`], [`CgroupError::Occupied`] or [`CgroupError::Refused`].
    pub fn open(parent: &str) -> Result<Self, CgroupError> {
        let cgroups = Self::find(parent)?;
        let made = cgroups.make_parent();
        if made.is_err() {
            cgroups.remove_parent();
        }
        made.map(|()| cgroups)
    }

    /// What there is, whether or not there is a parent; nothing is made.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn look(parent: &str) -> Result<Look, CgroupError> {
        let layout = Self::find(parent)?.layout;
        let (memory, cpu) = (&layout.memory, &layout.cpu);
        let (limit, swap) = (
            limits::memory_file(memory.version),
            limits::swap_file(memory.version),
        );
        let (shares, cap) = (
            limits::shares_file(cpu.version),
            limits::cpu_cap_file(cpu.version),
        );
        Ok(Look {
            controllers: layout.controllers().to_vec(),
            swap: shown(&memory.mount, limit, swap),
            cpu_cap: shown(&cpu.mount, shares, cap),
            tcp: match memory.version {
                Version::V1 => shown(&memory.mount, limit, limits::TCP_FILE),
                Version::V2 => Some(!booted_with("nosocket")),
            },
        })
    }

    /// Takes what is below the parent for this process, as long as the file is held: whoever has it takes groups that he
    /// does not know for leftovers. Makes the parent, which whoever had it may have removed.
    ///
    /// # Errors
    /// As [`Self::open`]; [`CgroupError::Claimed`]: another process has it.
    pub fn claim(parent: &str) -> Result<Flock<File>, CgroupError> {
        let layout = Self::open(parent)?.layout;
        let path = layout.memory.mount.join(&layout.parent);
        let directory = File::open(&path).map_err(CgroupError::refused("open", &path))?;
        let claimed = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|_taken| CgroupError::Claimed(path.clone()))?;
        // Whoever had it may have removed it in between.
        let number = |metadata: fs::Metadata| metadata.ino();
        let ours = claimed
            .metadata()
            .map(number)
            .map_err(CgroupError::refused("stat", &path))?;
        match fs::metadata(&path).map(number) {
            Ok(there) if there == ours => Ok(claimed),
            _ => Err(CgroupError::Claimed(path)),
        }
    }

    fn find(parent: &str) -> Result<Self, CgroupError> {
        let parent = parent.trim_matches('/');
        if !parent.split('/').all(is_plain) {
            return Err(CgroupError::BadName(parent.to_owned()));
        }
        let mountinfo = Path::new("/proc/self/mountinfo");
        let text =
            fs::read_to_string(mountinfo).map_err(CgroupError::refused("read", mountinfo))?;
        // An unreadable v2 mount counts as one without controllers: v1 may still do.
        let layout = Layout::decide(Path::new(parent), &text, |mount| {
            fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default()
        })?;
        Ok(Self {
            devices: Confinement::open(&layout)?,
            layout: Arc::new(layout),
        })
    }

    /// One line for the log: each controller's generation, and what cannot be kept on this host.
    #[must_use]
    pub fn describe(&self) -> String {
        let memory = &self.layout.memory;
        let swap = memory
            .mount
            .join(&self.layout.parent)
            .join(limits::swap_file(memory.version));
        let swap = if swap.exists() {
            "limited"
        } else {
            "not limited (no swap accounting)"
        };
        format!("{}, swap {swap}", self.layout.describe())
    }

    /// Makes the container's groups and limits them; on failure none of them is left.
    ///
    /// # Errors
    /// [`CgroupError::BadName`], [`CgroupError::Taken`] or [`CgroupError::Refused`].
    pub fn create(&self, handle: &str, limits: &Limits) -> Result<Group, CgroupError> {
        if !is_plain(handle) {
            return Err(CgroupError::BadName(handle.to_owned()));
        }
        let group = self.group(handle);
        let mut made = Vec::new();
        match self.build(&group, limits, &mut made) {
            Ok(()) => Ok(group),
            Err(error) => {
                for directory in made.iter().rev() {
                    if let Err(undo) = fs::remove_dir(directory) {
                        tracing::warn!(path = %directory.display(), %undo, "control group was left");
                    }
                }
                Err(error)
            }
        }
    }

    /// The container's groups, whether or not they exist. `handle` is one that
    /// [`create`](Self::create) accepted.
    #[must_use]
    pub fn group(&self, handle: &str) -> Group {
        Group {
            layout: Arc::clone(&self.layout),
            handle: handle.to_owned(),
        }
    }

    /// The handles that have a group in any hierarchy, sorted.
    ///
    /// # Errors
    /// [`CgroupError::Refused`] if a parent cannot be read; one that is gone has no children.
    pub fn list(&self) -> Result<Vec<String>, CgroupError> {
        let mut handles = Vec::new();
        for place in self.layout.places() {
            let parent = place.mount.join(&self.layout.parent);
            let entries = match fs::read_dir(&parent) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(CgroupError::refused("list", &parent))?,
            };
            for entry in entries {
                let entry = entry.map_err(CgroupError::refused("list", &parent))?;
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    handles.extend(entry.file_name().into_string());
                }
            }
        }
        handles.sort_unstable();
        handles.dedup();
        Ok(handles)
    }

    /// Removes the parent from every hierarchy, where no container is left in it.
    pub fn remove_parent(&self) {
        for place in self.layout.places() {
            for path in self
                .layout
                .parent
                .ancestors()
                .filter(|path| *path != Path::new(""))
            {
                // A group in use refuses, and so do those above it: nothing that others use goes.
                if fs::remove_dir(place.mount.join(path)).is_err() {
                    break;
                }
            }
        }
    }

    fn build(
        &self,
        group: &Group,
        limits: &Limits,
        made: &mut Vec<PathBuf>,
    ) -> Result<(), CgroupError> {
        for (_, directory) in group.directories() {
            let mut result = fs::create_dir(&directory);
            if result
                .as_ref()
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
            {
                // Somebody tidied up the empty parent.
                self.make_parent()?;
                result = fs::create_dir(&directory);
            }
            match result {
                Ok(()) => made.push(directory),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Taken(directory));
                }
                Err(error) => return Err(CgroupError::refused("make", &directory)(error)),
            }
        }
        self.devices.apply(group)?;
        group.apply(limits)
    }

    fn make_parent(&self) -> Result<(), CgroupError> {
        for place in self.layout.places() {
            let parent = place.mount.join(&self.layout.parent);
            fs::create_dir_all(&parent).map_err(CgroupError::refused("make", &parent))?;
            if place.version == Version::V2 {
                self.hand_controllers_down(place)?;
            }
        }
        Ok(())
    }

    /// v2: enables our controllers in every group from the mount point down to the parent.
    fn hand_controllers_down(&self, place: &Place) -> Result<(), CgroupError> {
        let mut group = place.mount.clone();
        let mut below = self.layout.parent.components();
        loop {
            let (available, enabled) = (
                group.join("cgroup.controllers"),
                group.join("cgroup.subtree_control"),
            );
            let read =
                |path: &Path| fs::read_to_string(path).map_err(CgroupError::refused("read", path));
            if let Some(line) = layout::to_enable(&read(&available)?, &read(&enabled)?) {
                // Asked before, not told by EBUSY: cpu and pids alone would be accepted here, and
                // make the group a threaded one, which spoils it for containers. Only the root,
                // which may have processes, lacks `cgroup.events`.
                if group.join("cgroup.events").exists() && !members::listed(&group).is_empty() {
                    return Err(CgroupError::Occupied(group));
                }
                write(&enabled, &line)
                    .map_err(CgroupError::refused(format!("write {line} to"), &enabled))?;
            }
            let Some(next) = below.next() else {
                return Ok(());
            };
            group.push(next);
        }
    }
}

/// The groups of one container. Cheap to clone; owns nothing, so dropping it removes nothing.
#[derive(Debug, Clone)]
pub struct Group {
    layout: Arc<Layout>,
    handle: String,
}

/// Between two attempts to remove a group that the kernel still calls busy.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

impl Group {
    /// Opens what the first process needs to join.
    ///
    /// # Errors
    /// [`CgroupError::Refused`].
    pub fn join_files(&self) -> Result<JoinFiles, CgroupError> {
        let mut files = JoinFiles {
            v1_tasks: Vec::new(),
            v2_dir: None,
        };
        for (version, directory) in self.directories() {
            match version {
                Version::V1 => {
                    let tasks = directory.join("tasks");
                    let file = OpenOptions::new().write(true).open(&tasks);
                    files
                        .v1_tasks
                        .push(file.map_err(CgroupError::refused("open", &tasks))?.into());
                }
                Version::V2 => {
                    let file = File::open(&directory);
                    let file = file.map_err(CgroupError::refused("open", &directory))?;
                    files.v2_dir = Some(file.into());
                }
            }
        }
        Ok(files)
    }

    /// Removes its directories; one that is gone already is as good. A group that the kernel calls
    /// busy is tried again for `patience`: there is no event for "can be removed now", and its last
    /// process may be counted for a moment after it was reaped. Blocks.
    ///
    /// # Errors
    /// [`CgroupError::Busy`] or [`CgroupError::Refused`]: the first one; the others are tried too.
    pub fn remove(&self, patience: Duration) -> Result<(), CgroupError> {
        let end = Instant::now() + patience;
        let mut outcome = Ok(());
        for (_, directory) in self.directories().into_iter().rev() {
            outcome = outcome.and(remove_directory(directory, patience, end));
        }
        outcome
    }

    /// Its directory in each hierarchy, v1 first.
    fn directories(&self) -> Vec<(Version, PathBuf)> {
        let places = self.layout.places();
        places
            .into_iter()
            .map(|place| (place.version, self.directory(place)))
            .collect()
    }

    fn directory(&self, place: &Place) -> PathBuf {
        place.mount.join(&self.layout.parent).join(&self.handle)
    }
}

fn remove_directory(group: PathBuf, waited: Duration, end: Instant) -> Result<(), CgroupError> {
    let mut pause = FIRST_PAUSE;
    loop {
        let Err(error) = fs::remove_dir(&group) else {
            return Ok(());
        };
        match errno_of(&error) {
            Some(Errno::ENOENT) => return Ok(()),
            Some(Errno::EBUSY) if Instant::now() < end => members::pause(pause),
            Some(Errno::EBUSY) => return Err(CgroupError::Busy { group, waited }),
            _ => return Err(CgroupError::refused("remove", &group)(error)),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Letters, digits, `-`, `_` and `.`, other than `.` and `..`. The kernel's own files (`cgroup.procs`)
/// need no care: nothing can be made in their place.
fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !["", ".", ".."].contains(&name) && name.bytes().all(plain)
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    io::Write::write_all(
        &mut OpenOptions::new().write(true).open(path)?,
        text.as_bytes(),
    )
}

fn errno_of(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}
