//! Project quotas (ext4 with the feature `project`, XFS; mounted with `prjquota`).

use super::space::Promise;
use super::{Change, DiskError, Limit, Usage, open_directory, whole_mb};
use crate::host::depot::Directory;
use container::fault::{Context, SysError};
use container::sys::quota::{self, Quota};
use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The first number of a project of ours, and how many there are: more than containers, of which each has one as long as there are
/// files of it. XFS never gives up the record of a number that was used once (xfs_qm_dqread_alloc), so they come again.
const FIRST: u32 = 0x6f73_0000;
const NUMBERS: u32 = 1 << 14;

/// Projects for containers. Which numbers are in use the kernel knows: a project with files or limits.
#[derive(Debug)]
pub(super) struct Projects {
    /// The number to be tried next.
    next: Mutex<u32>,
}

/// The project of one container.
#[derive(Debug)]
pub(super) struct Project {
    directory: OwnedFd,
    number: u32,
}

impl Projects {
    /// Tries whether a directory in `base` can be bounded; why not, if it cannot. Where that cannot be tried now, it is believed of
    /// a file system that says so.
    pub(super) fn probe(base: &Path) -> Result<Self, String> {
        /// Enough for a directory.
        const LIMIT: Limit = Limit {
            bytes: 1 << 20,
            inodes: 16,
        };
        let projects = Self {
            next: Mutex::new(crate::random::u32()),
        };
        // Killed here, the agent leaves something that the next one throws away.
        let path = base.join("trash/probe");
        let tried = || {
            match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.context("mkdir", path.display())?,
            }
            let project = projects.assign(&path, LIMIT)?;
            // The kernel shows a limit here if it also holds it (ext4_statfs_project,
            // xfs_qm_statvfs), and not if it merely counts.
            let shown = fstatvfs(&project.directory).context("fstatvfs", path.display());
            project.release()?;
            shown
        };
        let shown = tried();
        let _gone = fs::remove_dir(&path);
        let shown = match shown {
            Err(error) if error.is_passing() && has_project_quotas(base) => {
                tracing::warn!(%error, "a trial of project quotas was given up");
                return Ok(projects);
            }
            other => other.map_err(|error| error.to_string())?,
        };
        if shown.blocks().saturating_mul(shown.fragment_size()) == LIMIT.bytes {
            Ok(projects)
        } else {
            Err("the file system counts for projects but does not limit them: mount it with prjquota".into())
        }
    }

    /// Bounds a fresh, empty directory.
    pub(super) fn give(&self, path: &Path, limit: Limit) -> Result<(), SysError> {
        self.assign(path, limit).map(drop)
    }

    /// Takes a number that nobody has, limits it, and gives the directory to it: from then on it shows as
    /// taken.
    fn assign(&self, path: &Path, limit: Limit) -> Result<Project, SysError> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = open_directory(path)?;
        for _ in 0..NUMBERS {
            *next = next.wrapping_add(1);
            let number = number(*next);
            let on = || format!("project {number} of {}", path.display());
            let taken = quota::quota(directory.as_fd(), number).context("quotactl_fd", on())?;
            if taken != Quota::default() {
                continue;
            }
            quota::set_quota(directory.as_fd(), number, limit.bytes, limit.inodes)
                .context("quotactl_fd", on())?;
            let project = Project { directory, number };
            return match quota::set_project(project.directory.as_fd(), number) {
                Ok(()) => Ok(project),
                Err(errno) => {
                    project.release()?;
                    Err(errno).context("FS_IOC_FSSETXATTR", on())
                }
            };
        }
        Err(Errno::ENOSPC).context("project", path.display())
    }
}

/// Whether the file system that holds this path is mounted with limits for projects (proc(5), `mountinfo`).
#[must_use]
pub fn has_project_quotas(path: &Path) -> bool {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo");
    limits_projects(&whole, &mounts.unwrap_or_default())
}

fn limits_projects(path: &Path, mountinfo: &str) -> bool {
    let holder = mountinfo
        .lines()
        .filter(|line| {
            let point = line.split(' ').nth(4);
            point.is_some_and(|point| path.starts_with(point))
        })
        // The last of the longest covers the others.
        .max_by_key(|line| line.split(' ').nth(4).map_or(0, str::len));
    let options = holder
        .and_then(|line| line.rsplit(' ').next())
        .unwrap_or("");
    options
        .split(',')
        .any(|option| matches!(option, "prjquota" | "pquota"))
}

/// The number of the `nth` project.
fn number(nth: u32) -> u32 {
    FIRST + nth % NUMBERS
}

/// What a container was promised; `None` if it has no project.
pub(super) fn promise(directory: &Directory) -> Result<Option<Promise>, SysError> {
    let Some(project) = Project::find(&directory.disk())? else {
        return Ok(None);
    };
    let quota = project.quota()?;
    Ok(Some(Promise {
        limit: quota.most_bytes,
        owed: quota.most_bytes.saturating_sub(quota.bytes),
    }))
}

impl Project {
    /// The project of a directory; `None` if it has none of its own, or is gone. What the directory above it
    /// has, too, is the operator's, who bounds the depot.
    pub(super) fn find(path: &Path) -> Result<Option<Self>, SysError> {
        let Some(found) = Self::of(path)? else {
            return Ok(None);
        };
        let above = path.parent().map_or(Ok(None), Self::of)?;
        let its_own = above.is_none_or(|above| above.number != found.number);
        Ok(its_own.then_some(found))
    }

    /// The project that a directory's files count for.
    fn of(path: &Path) -> Result<Option<Self>, SysError> {
        let directory = match open_directory(path) {
            Err(SysError {
                errno: Errno::ENOENT,
                ..
            }) => return Ok(None),
            other => other?,
        };
        match quota::project(directory.as_fd()) {
            // Nothing here counts.
            Err(Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::ENOSYS) | Ok(None | Some(0)) => Ok(None),
            Err(errno) => Err(errno).context("FS_IOC_FSGETXATTR", path.display()),
            Ok(Some(number)) => Ok(Some(Self { directory, number })),
        }
    }

    /// How much more it would be promised.
    pub(super) fn growth(&self, change: Change) -> Result<u64, SysError> {
        let bytes = change.bytes.unwrap_or(0);
        Ok(bytes.saturating_sub(self.quota()?.most_bytes))
    }

    fn quota(&self) -> Result<Quota, SysError> {
        quota::quota(self.directory.as_fd(), self.number)
            .context("quotactl_fd", format_args!("project {}", self.number))
    }

    pub(super) fn usage(&self) -> Result<Usage, SysError> {
        let quota = self.quota()?;
        Ok(Usage {
            bytes: quota.bytes,
            inodes: quota.inodes,
            limit: Limit {
                bytes: quota.most_bytes,
                inodes: quota.most_inodes,
            },
        })
    }

    /// Changes the limits; what is there must fit. (What is written between the look and the change may
    /// stand above the new limit; nothing can be added to it then.)
    pub(super) fn limit(&self, change: Change) -> Result<(), DiskError> {
        let quota = self.quota()?;
        let limit = Limit {
            bytes: change.bytes.unwrap_or(quota.most_bytes),
            inodes: change.inodes.unwrap_or(quota.most_inodes),
        };
        if quota.bytes > limit.bytes || quota.inodes > limit.inodes {
            return Err(DiskError::InUse {
                smallest: Limit {
                    bytes: whole_mb(quota.bytes),
                    inodes: quota.inodes,
                },
            });
        }
        Ok(self.set(limit)?)
    }

    /// Lifts the limits: with its last file, the kernel forgets the project.
    pub(super) fn release(&self) -> Result<(), SysError> {
        self.set(Limit {
            bytes: 0,
            inodes: 0,
        })
    }

    fn set(&self, limit: Limit) -> Result<(), SysError> {
        quota::set_quota(
            self.directory.as_fd(),
            self.number,
            limit.bytes,
            limit.inodes,
        )
        .context("quotactl_fd", format_args!("project {}", self.number))
    }
}

#[cfg(test)]
mod tests {
    use super::{FIRST, NUMBERS, limits_projects, number};
    use std::path::Path;

    #[test]
    fn quotas_are_those_of_the_file_system_that_holds_the_base() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /var/lib rw - xfs /dev/b rw,prjquota\n\
                      3 2 8:3 / /var/lib/other rw - ext4 /dev/c rw\n";
        let there = |path: &str| limits_projects(Path::new(path), mounts);
        let seen = [
            "/var/lib/ostler",
            "/var/lib",
            "/var",
            "/var/library",
            "/var/lib/other/x",
        ]
        .map(there);
        assert_eq!(seen, [true, true, false, false, false]);
    }

    #[test]
    fn numbers_come_again_and_none_is_left_out() {
        let last = FIRST + NUMBERS - 1;
        let given = [
            0,
            1,
            NUMBERS - 1,
            NUMBERS,
            u32::MAX,
            u32::MAX.wrapping_add(1),
        ]
        .map(number);
        assert_eq!(given, [FIRST, FIRST + 1, last, FIRST, last, FIRST]);
    }
}
