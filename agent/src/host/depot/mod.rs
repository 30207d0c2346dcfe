//! The directories of containers: made, filled, found, and thrown away.
//!
//! ```text
//! <base>/containers/<handle>/run/wshd.sock    the init's socket
//!                           /jobs/<n>/        one job's spool, lock and socket
//!                           /upper/ work/     the writable layer of the root
//!                           /root/            where the root is mounted, in the container's namespace only
//!                           /log              what its helpers complained about
//! <base>/trash/                               what is being removed
//! ```
//!
//! All functions block.

mod remove;
mod seed;

pub use seed::SeedFile;

use container::fault::{Context, SysError};
use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::mkdir;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

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
    /// A system call was refused.
    #[error(transparent)]
    Refused(#[from] SysError),
}

/// The base directory.
#[derive(Debug, Clone)]
pub struct Depot {
    base: PathBuf,
}

/// The paths of one container.
#[derive(Debug, Clone)]
pub struct Directory {
    /// `<base>/containers/<handle>`.
    pub path: PathBuf,
}

impl Directory {
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

    /// The writable layer.
    #[must_use]
    pub fn upper(&self) -> PathBuf {
        self.path.join("upper")
    }

    /// The overlay's own working directory.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.path.join("work")
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
        let path = self.path.join("log");
        fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .context("open", path.display())
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
        for path in [base.to_owned(), base.join("containers"), base.join("trash")] {
            match make(&path, 0o700) {
                Err(SysError {
                    errno: Errno::EEXIST,
                    ..
                }) => set_mode(&path, 0o700)?,
                other => other?,
            }
        }
        Ok(Self {
            base: base.to_owned(),
        })
    }

    /// The paths of a container, whether or not it exists.
    #[must_use]
    pub fn container(&self, handle: &str) -> Directory {
        Directory {
            path: self.base.join("containers").join(handle),
        }
    }

    /// The handles that have a directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<String>, SysError> {
        let mut names = names(&self.base.join("containers"))?;
        names.retain(|name| is_handle(name));
        Ok(names)
    }

    /// Makes the directory of a new container.
    ///
    /// # Errors
    /// `EEXIST`: the handle is in use; nothing was changed. After any other failure, part of it may
    /// be there.
    pub fn create(&self, handle: &str) -> Result<Directory, SysError> {
        let directory = self.container(handle);
        make(&directory.path, 0o700)?;
        for name in ["run", "jobs", "work", "root"] {
            make(&directory.path.join(name), 0o700)?;
        }
        // The writable layer's own mode is the mode of `/` inside.
        make(&directory.upper(), 0o755)?;
        Ok(directory)
    }

    /// Writes files into a fresh container's writable layer, as if they had been written through the
    /// mount: directories on their way keep the mode and owner that they have in `lowers` (uppermost
    /// first).
    ///
    /// # Errors
    /// [`DepotError`].
    pub fn seed(
        &self,
        handle: &str,
        lowers: &[PathBuf],
        files: &[SeedFile],
    ) -> Result<(), DepotError> {
        files
            .iter()
            .try_for_each(|file| seed::write(&self.container(handle).upper(), lowers, file))
    }

    /// Takes a container's directory out of sight, for [`Self::empty_trash`]. One that is gone is
    /// fine.
    ///
    /// # Errors
    /// As `rename(2)`.
    pub fn discard(&self, handle: &str) -> Result<(), SysError> {
        let from = self.container(handle).path;
        match remove::move_into(&self.base.join("trash"), &from) {
            Err(Errno::ENOENT) => Ok(()),
            other => other.context("rename", from.display()),
        }
    }

    /// Removes what was discarded, however deep a tenant has nested it. May run several times at once.
    ///
    /// # Errors
    /// The first refusal, after everything else was removed.
    pub fn empty_trash(&self) -> Result<(), SysError> {
        let trash = self.base.join("trash");
        remove::empty(&trash).context("remove", trash.display())
    }
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
