//! The directories of containers: made, filled, found, and thrown away.
//!
//! ```text
//! <base>/containers/<handle>/run/wshd.sock    the init's socket
//!                           /jobs/<n>/        one job's spool, lock and socket
//!                           /disk/upper/ work/  the writable layer of the root; see [`disk`]
//!                           /root/            where the root is mounted, in the container's namespace only
//!                           /log              what its helpers complained about
//! <base>/trash/                               what is being removed
//! ```
//!
//! All functions block.

pub mod disk;
mod ids;
mod remove;
mod seed;

pub use seed::SeedFile;

use crate::host::open_or_make;
use container::fault::{Context, SysError};
use container::launch::Ids;
use container::sys::quota;
use ids::Ranges;
use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chown, mkdir};
use std::fs::{self, Permissions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Characters of a handle.
pub const HANDLE_LENGTH: usize = 11;

/// Longest path of a unix socket: `sun_path` is 108 bytes with its final zero (`unix(7)`).
const SOCKET_PATH_MAX: usize = 107;

/// Why a directory was not made, filled or removed.
#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    /// The base directory is too long for the sockets below it.
    #[error(
        "base directory \"{base}\" has {length} bytes, {most} are the most: the kernel's socket paths end at {SOCKET_PATH_MAX}; choose a shorter one"
    )]
    TooLong {
        /// The directory.
        base: PathBuf,
        /// Its length in bytes.
        length: usize,
        /// What would fit.
        most: usize,
    },
    /// A seed file's path is not a plain relative one.
    #[error(
        "file \"{0}\" cannot be put into a container: its path must be relative and without \"..\""
    )]
    SeedPath(PathBuf),
    /// The way to a seed file leads through something that is no directory in a layer below.
    #[error(
        "file \"{path}\" cannot be put into a container: \"{obstacle}\" is no directory in layer \"{layer}\""
    )]
    SeedObstacle {
        /// The file.
        path: PathBuf,
        /// What stands in its way.
        obstacle: PathBuf,
        /// The layer that holds it.
        layer: PathBuf,
    },
    /// Every range of ids is taken.
    #[error(
        "no range of user ids is free: each belongs to a container, or to files in \"{0}\" that were not removed yet"
    )]
    NoIds(PathBuf),
    /// A system call was refused.
    #[error(transparent)]
    Refused(#[from] SysError),
}

/// The base directory.
#[derive(Debug, Clone)]
pub struct Depot {
    base: PathBuf,
    ranges: Arc<Ranges>,
    trash: Arc<Trash>,
}

/// Who empties the trash.
#[derive(Debug, Default)]
struct Trash {
    /// Held by whoever is at it.
    turn: Mutex<()>,
    /// How often it was asked for.
    asked: AtomicU64,
}

/// The paths of one container.
#[derive(Debug, Clone)]
pub struct Directory {
    /// `<base>/containers/<handle>`.
    pub path: PathBuf,
}

impl Directory {
    /// Those of a container below this base directory, whether or not it exists.
    #[must_use]
    pub fn below(base: &Path, handle: &str) -> Self {
        Self {
            path: base.join("containers").join(handle),
        }
    }

    /// The ids of its container; `None` if it is gone.
    #[must_use]
    pub fn ids(&self) -> Option<Ids> {
        ids_of(&self.path).ok().flatten()
    }

    /// The init's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join("run/wshd.sock")
    }

    /// The directory of a job.
    #[must_use]
    pub fn job(&self, job: u32) -> PathBuf {
        self.path.join("jobs").join(job.to_string())
    }

    /// What holds the writable layer: the container's init may find a file system mounted here.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk")
    }

    /// The file with that file system.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.path.join("disk.img")
    }

    /// The file with the number of its loop device, the size of what it may not have, and its limit.
    #[must_use]
    pub fn loop_number(&self) -> PathBuf {
        self.path.join("loop")
    }

    /// The writable layer, as the container's init finds it.
    #[must_use]
    pub fn upper(&self) -> PathBuf {
        self.disk().join("upper")
    }

    /// The overlay's own working directory, as the container's init finds it.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.disk().join("work")
    }

    /// The mount point of the root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    /// The jobs that have a directory.
    ///
    /// # Errors
    /// The directory cannot be read; a container that is gone has no jobs.
    pub fn jobs(&self) -> Result<Vec<u32>, SysError> {
        let jobs = names(&self.path.join("jobs"))?;
        Ok(jobs.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Makes the directory of a new job.
    ///
    /// # Errors
    /// `EEXIST`: the job's number was used before.
    pub fn create_job(&self, job: u32) -> Result<PathBuf, SysError> {
        let path = self.job(job);
        make(&path, 0o700)?;
        Ok(path)
    }

    /// Opens the file into which the container's helpers write what went wrong.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn log(&self) -> Result<fs::File, SysError> {
        /// Complaints of an app that lives for months beside something that fails each second must not fill the disk.
        const MOST: u64 = 1 << 20;
        let path = self.path.join("log");
        let mut options = fs::File::options();
        options.append(true);
        let open = || {
            let log = open_or_make(options, &path)?;
            if log.metadata()?.len() > MOST {
                log.set_len(0)?;
            }
            Ok::<_, io::Error>(log)
        };
        open().context("open", path.display())
    }

    /// The end of the log, in one line: it goes with the container.
    #[must_use]
    pub fn last_words(&self) -> String {
        const MOST: u64 = 512;
        let read = || {
            let mut log = fs::File::open(self.path.join("log"))?;
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
            let mut end = Vec::new();
            log.take(MOST).read_to_end(&mut end).map(|_| end)
        };
        let end = read().unwrap_or_default();
        let end = String::from_utf8_lossy(&end);
        let lines: Vec<&str> = end
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        match lines.as_slice() {
            [] => "no word".to_owned(),
            lines => lines.join("; "),
        }
    }
}

impl Depot {
    /// Makes the base directory and what it holds, where it is missing, for root's eyes only.
    ///
    /// # Errors
    /// [`DepotError::TooLong`], or what the kernel refuses.
    pub fn open(base: &Path) -> Result<Self, DepotError> {
        let longest = "/containers//jobs/4294967295/link.sock".len() + HANDLE_LENGTH;
        let (length, most) = (base.as_os_str().len(), SOCKET_PATH_MAX - longest);
        if length > most {
            return Err(DepotError::TooLong {
                base: base.to_owned(),
                length,
                most,
            });
        }
        fs::create_dir_all(base).context("mkdir", base.display())?;
        let trash = base.join("trash");
        for path in [base, &base.join("containers"), &trash] {
            if !make_missing(path)? {
                set_mode(path, 0o700)?;
            }
        }
        take_anything(&trash);
        let ranges = Arc::new(ranges(base)?);
        Ok(Self {
            base: base.to_owned(),
            ranges,
            trash: Arc::default(),
        })
    }

    /// The paths of a container, whether or not it exists.
    #[must_use]
    pub fn container(&self, handle: &str) -> Directory {
        Directory::below(&self.base, handle)
    }

    /// The handles that have a directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<String>, SysError> {
        handles(&self.base)
    }

    /// An empty directory to try something in, to be removed by [`Self::tried`]; an agent that is killed
    /// leaves it to whoever empties the trash.
    ///
    /// # Errors
    /// As `mkdir(2)`.
    pub fn trial(&self) -> Result<(Directory, Ids), SysError> {
        let path = self.tried();
        make(&path, 0o700)?;
        make(&path.join("disk"), 0o700)?;
        Ok((Directory { path }, Ids::default()))
    }

    /// Removes the directory of a trial; gives back where it was.
    pub fn tried(&self) -> PathBuf {
        let path = self.base.join("trash/trial");
        let _gone = fs::remove_dir_all(&path);
        path
    }

    /// Makes the directory of a new container, all but its writable layer, and gives it ids of its own.
    ///
    /// # Errors
    /// `EEXIST`: the handle is in use; nothing was changed. After any other failure, part of it may
    /// be there.
    pub fn create(&self, handle: &str) -> Result<(Directory, Ids), DepotError> {
        let directory = self.container(handle);
        let taken = self.ranges.take();
        let ids = taken.ok_or_else(|| DepotError::NoIds(self.base.join("trash")))?;
        make(&directory.path, 0o700).inspect_err(|_| self.ranges.untake(ids))?;
        give(&directory.path, Uid::from_raw(0), ids).inspect_err(|_| self.ranges.untake(ids))?;
        for name in ["run", "jobs", "disk", "root"] {
            make(&directory.path.join(name), 0o700)?;
        }
        Ok((directory, ids))
    }

    /// Makes a range the next to be given out, if nobody has it.
    #[cfg(test)]
    pub fn prefer_range(&self, ids: Ids) {
        self.ranges.prefer(ids);
    }

    /// How many ranges of ids are taken.
    #[cfg(test)]
    pub fn ranges_taken(&self) -> usize {
        self.ranges.taken()
    }

    /// Takes a container's directory out of sight, for [`Self::empty_trash`]. One that is gone is
    /// fine.
    ///
    /// # Errors
    /// As `rename(2)`.
    pub fn discard(&self, handle: &str) -> Result<(), SysError> {
        let directory = self.container(handle);
        if let Err(error) = disk::release(&directory) {
            tracing::warn!(handle, %error, "a quota was left");
        }
        let from = directory.path;
        let Some(ids) = ids_of(&from).context("stat", from.display())? else {
            return Ok(());
        };
        // Somebody in want of room may have removed it.
        let trash = self.base.join("trash");
        if make_missing(&trash)? {
            take_anything(&trash);
        }
        match remove::move_into(&trash, &from, ids) {
            Err(Errno::ENOENT) => Ok(()),
            other => other.context("rename", from.display()),
        }?;
        self.ranges.discard(ids);
        Ok(())
    }

    /// Removes what was discarded, however deep a tenant has nested it, after whoever is at it.
    ///
    /// # Errors
    /// The first refusal, after everything else was removed.
    pub fn empty_trash(&self) -> Result<(), SysError> {
        let turn = self.trash.turn.lock();
        self.see_to_it(turn.unwrap_or_else(PoisonError::into_inner))
    }

    /// The same for who has just discarded something: whoever is at it already removes that, too.
    ///
    /// # Errors
    /// As [`Self::empty_trash`].
    pub fn empty_trash_beside(&self) -> Result<(), SysError> {
        self.trash.asked.fetch_add(1, Ordering::SeqCst);
        match self.trash.turn.try_lock() {
            Ok(turn) => self.see_to_it(turn),
            Err(_somebody_is_at_it) => Ok(()),
        }
    }

    /// Until nobody has asked meanwhile.
    fn see_to_it<'a>(&'a self, mut turn: MutexGuard<'a, ()>) -> Result<(), SysError> {
        loop {
            let asked = self.trash.asked.load(Ordering::SeqCst);
            let emptied = self.empty();
            drop(turn);
            if emptied.is_err() || self.trash.asked.load(Ordering::SeqCst) == asked {
                return emptied;
            }
            match self.trash.turn.try_lock() {
                Ok(next) => turn = next,
                Err(_somebody_is_at_it) => return emptied,
            }
        }
    }

    fn empty(&self) -> Result<(), SysError> {
        let trash = self.base.join("trash");
        let trashed = self.ranges.trashed();
        let emptied = match remove::empty(&trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.context("remove", trash.display()),
        };
        let left = names(&trash)?;
        let left = left.iter().filter_map(|name| remove::ids_of(name));
        self.ranges.release(trashed, left);
        emptied
    }
}

/// Writes files into a fresh container's writable layer `upper`, as if they had been written through the
/// mount: directories on their way keep the mode and owner that they have in `lowers` (uppermost first),
/// which are ids of the container like those of the files.
///
/// # Errors
/// [`DepotError`].
pub fn seed(
    upper: &Path,
    ids: Ids,
    lowers: &[PathBuf],
    files: &[SeedFile],
) -> Result<(), DepotError> {
    files
        .iter()
        .try_for_each(|file| seed::write(upper, ids, lowers, file))
}

/// Whether this is the name of a container: eleven digits of base 32.
#[must_use]
pub fn is_handle(name: &str) -> bool {
    name.len() == HANDLE_LENGTH
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'v'))
}

/// The identity of this boot of the machine (`random(4)`): what lived in another one is dead.
///
/// # Errors
/// `/proc` is missing.
pub fn boot_id() -> Result<String, SysError> {
    let path = "/proc/sys/kernel/random/boot_id";
    fs::read_to_string(path)
        .map(|id| id.trim().to_owned())
        .context("read", path)
}

/// The ids that directories and the trash of an earlier agent have.
fn ranges(base: &Path) -> Result<Ranges, SysError> {
    let containers = base.join("containers");
    let mut living = Vec::new();
    for name in names(&containers)? {
        let path = containers.join(name);
        living.extend(ids_of(&path).context("stat", path.display())?);
    }
    let trash = names(&base.join("trash"))?;
    let trashed = trash.iter().filter_map(|name| remove::ids_of(name));
    let others =
        ["/etc/subuid", "/etc/subgid"].map(|path| fs::read_to_string(path).unwrap_or_default());
    Ok(Ranges::new(living.into_iter(), trashed, &others.join("\n")))
}

/// The ids of a container's directory, if it is there.
fn ids_of(path: &Path) -> io::Result<Option<Ids>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(Ids {
            first: metadata.gid(),
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lets what has a project of its own be moved into a directory, where an operator has given the depot to another.
fn take_anything(path: &Path) {
    let end = || {
        let directory = fs::File::open(path).context("open", path.display())?;
        quota::end_inheritance(directory.as_fd()).context("FS_IOC_FSSETXATTR", path.display())
    };
    if let Err(error) = end() {
        tracing::warn!(%error, "what has a project may stay where it is");
    }
}

/// Makes `user` and the container's root group the owners.
fn give(path: &Path, user: Uid, ids: Ids) -> Result<(), SysError> {
    let group = Gid::from_raw(ids.first);
    chown(path, Some(user), Some(group)).context("chown", path.display())
}

/// The handles that have a directory in this depot.
fn handles(base: &Path) -> Result<Vec<String>, SysError> {
    let mut names = names(&base.join("containers"))?;
    names.retain(|name| is_handle(name));
    Ok(names)
}

/// The names in a directory that are text; none if it is gone.
fn names(path: &Path) -> Result<Vec<String>, SysError> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.context("opendir", path.display())?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.context("readdir", path.display())?.file_name();
        names.extend(name.into_string());
    }
    Ok(names)
}

/// Makes a directory that may be there already; whether it was not.
fn make_missing(path: &Path) -> Result<bool, SysError> {
    match make(path, 0o700) {
        Err(SysError {
            errno: Errno::EEXIST,
            ..
        }) => Ok(false),
        other => other.map(|()| true),
    }
}

/// Makes a directory with exactly this mode, whatever the process's umask.
fn make(path: &Path, mode: u32) -> Result<(), SysError> {
    mkdir(path, Mode::S_IRWXU).context("mkdir", path.display())?;
    set_mode(path, mode)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), SysError> {
    fs::set_permissions(path, Permissions::from_mode(mode)).context("chmod", path.display())
}

#[cfg(test)]
mod tests;
