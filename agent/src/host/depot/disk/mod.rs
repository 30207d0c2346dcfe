//! What bounds a container's writable layer: bytes and inodes.
//!
//! ```text
//! <base>/containers/<handle>/disk/upper work     quota: a directory with a project of its own
//!                           /disk.img loop       image: a file system of its own, mounted on disk/
//!                                                in the container's namespace only
//! ```
//!
//! A quota is the better way: it costs nothing. An image has all its bytes from the beginning. (The kernel may
//! give some back: a loop device makes a hole of zeros, which ext4 writes where an app fills preallocated files
//! on its full disk.) Neither way promises what the depot's file system does not have, and each counts
//! what the other has promised. Which way a container went shows in its
//! directory, so it is the same for every agent after the first.

mod free;
mod image;
mod pattern;
mod quota;
mod space;

pub use free::Free;
pub use quota::has_project_quotas;
pub use space::Space;

use super::{Directory, handles};
use crate::host::helpers::Ended;
use container::fault::{Context, SysError};
use container::launch::Ids;
use image::Image;
use nix::unistd::Uid;
use pattern::Patterns;
use quota::{Project, Projects};
use serde::Deserialize;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How writable layers are to be bounded, as the configuration names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// The first of the others that works here.
    Auto,
    /// Project quotas of the depot's file system.
    Quota,
    /// A file system in a file for each container.
    Image,
    /// Not at all.
    Unlimited,
}

/// What a container may have on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Bytes, what its directories take included.
    pub bytes: u64,
    /// Files, directories, links and so on. An image has at most one for each 4096 bytes.
    pub inodes: u64,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, {} inodes", self.bytes, self.inodes)
    }
}

/// What of a limit is to change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// Bytes; `None` leaves them.
    pub bytes: Option<u64>,
    /// Inodes; `None` leaves them.
    pub inodes: Option<u64>,
}

/// What a container has on the disk, and what it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// The most of both.
    pub limit: Limit,
}

/// Why a writable layer was not bounded as it was to be.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The depot's file system is too full.
    #[error(
        "not enough disk: {needed} bytes are needed and {free} are free in \"{base}\"; remove something there"
    )]
    NotEnough {
        /// Bytes.
        needed: u64,
        /// Bytes that are neither used nor promised.
        free: u64,
        /// The depot.
        base: PathBuf,
    },
    /// What is there does not fit into a smaller limit; nothing was changed.
    #[error("more is on the disk than the new limit allows: {smallest} is the smallest safe one")]
    InUse {
        /// What would do.
        smallest: Limit,
    },
    /// An image has an end; nothing was changed.
    #[error("the container's image can have {largest} at most; start it anew for more")]
    Beyond {
        /// What would do.
        largest: Limit,
    },
    /// The inodes of an image are made with it.
    #[error("the container's image has {have} inodes; start it anew for another number")]
    Inodes {
        /// So many.
        have: u64,
    },
    /// The configured way does not work here.
    #[error("`instance.disk` is {wanted:?}, which does not work in \"{base}\": {why}")]
    Unusable {
        /// The configured way.
        wanted: Wanted,
        /// The depot.
        base: PathBuf,
        /// What is missing.
        why: String,
    },
    /// The program that makes a file system failed.
    #[error("{program} {ended}: {said}")]
    Mkfs {
        /// Its path.
        program: &'static str,
        /// How it ended.
        ended: Ended,
        /// What it said last.
        said: String,
    },
    /// A system call was refused.
    #[error(transparent)]
    Refused(#[from] SysError),
}

/// How this depot bounds writable layers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Disks {
    space: Space,
    way: Way,
    /// Held from the look at what is free until it is taken.
    turn: Arc<Mutex<()>>,
}

#[derive(Debug, Clone)]
enum Way {
    Quota(Arc<Projects>),
    Image {
        mkfs: &'static str,
        patterns: Patterns,
    },
    Unlimited,
}

/// A program to be run between [`Disks::begin`] and [`Disks::complete`].
#[derive(Debug)]
pub struct Mkfs {
    /// Its path.
    pub program: &'static str,
    /// What follows `argv[0]`.
    pub args: Vec<OsString>,
}

/// The bounds of one container's writable layer. Dropping it changes nothing for the container.
#[derive(Debug)]
pub struct Disk {
    directory: PathBuf,
    bounds: Bounds,
}

#[derive(Debug)]
enum Bounds {
    Quota(Project),
    Image(Image),
    Unlimited,
}

/// Whether the program is there that makes file systems.
///
/// # Errors
/// For a person.
pub fn can_make_images() -> Result<(), String> {
    image::program().map(drop)
}

impl Disks {
    /// Quotas, if the depot's file system has them and holds them; else why not.
    ///
    /// # Errors
    /// For a person.
    pub fn quota(space: Space) -> Result<Self, String> {
        let projects = Projects::probe(space.base())?;
        Ok(Self::new(space, Way::Quota(Arc::new(projects))))
    }

    /// Images, if they can be made; whether they can be mounted is left to be tried.
    ///
    /// # Errors
    /// For a person.
    pub fn image(space: Space) -> Result<Self, String> {
        let (mkfs, patterns) = (image::program()?, Patterns::default());
        Ok(Self::new(space, Way::Image { mkfs, patterns }))
    }

    /// No bounds.
    #[must_use]
    pub fn unlimited(space: Space) -> Self {
        Self::new(space, Way::Unlimited)
    }

    fn new(space: Space, way: Way) -> Self {
        Self {
            space,
            way,
            turn: Arc::default(),
        }
    }

    /// In a word, for the log.
    #[must_use]
    pub fn describe(&self) -> &'static str {
        match self.way {
            Way::Quota(_) => "project quotas",
            Way::Image { .. } => "images",
            Way::Unlimited => "unlimited",
        }
    }

    /// A look at what new containers can have; `None` where nothing is bounded. It sees a container that is being
    /// made either without its bounds or with all that these take.
    ///
    /// # Errors
    /// As statvfs(3).
    pub fn look(&self) -> Result<Option<Free>, SysError> {
        if !self.bind() {
            return Ok(None);
        }
        let _turn = self.turn();
        self.space.look().map(Some)
    }

    /// Whether anything bounds the containers that are made now.
    #[must_use]
    pub fn bind(&self) -> bool {
        match self.way {
            Way::Quota(_) | Way::Image { .. } => true,
            Way::Unlimited => false,
        }
    }

    /// Most bytes that the depot must have for a new container with this limit, beside those for its output.
    #[must_use]
    pub fn needs(&self, limit: Limit) -> u64 {
        match self.way {
            Way::Image { .. } => image::needs(limit),
            Way::Quota(_) | Way::Unlimited => limit.bytes,
        }
    }

    /// The first half of bounding a fresh container's writable layer. The second comes when the program
    /// has ended well.
    ///
    /// # Errors
    /// [`DiskError::NotEnough`], or what the kernel refuses.
    pub fn begin(&self, directory: &Directory, limit: Limit) -> Result<Option<Mkfs>, DiskError> {
        let turn = self.turn();
        match &self.way {
            Way::Quota(projects) => {
                self.space.has_room(limit.bytes)?;
                projects.give(&directory.disk(), limit)?;
                Ok(None)
            }
            Way::Image { mkfs, patterns } => {
                self.space.has_room(limit.bytes)?;
                // Its bytes are taken by the second half, which looks again.
                drop(turn);
                let made = image::create(directory, limit, patterns)?;
                Ok((!made).then(|| image::mkfs(mkfs, directory, limit)))
            }
            Way::Unlimited => Ok(None),
        }
    }

    /// The second half: the writable layer is there, empty and bounded.
    ///
    /// # Errors
    /// [`DiskError::NotEnough`], or what the kernel refuses.
    pub fn complete(
        &self,
        directory: &Directory,
        ids: Ids,
        limit: Limit,
    ) -> Result<Disk, DiskError> {
        let _turn = self.turn();
        let disk = match &self.way {
            // From here on until the container's init has it, it lives by this descriptor alone.
            Way::Image { patterns, .. } => Disk {
                directory: directory.disk(),
                bounds: Bounds::Image(image::complete(&self.space, directory, limit, patterns)?),
            },
            Way::Quota(_) | Way::Unlimited => self.find(directory)?,
        };
        super::make(&disk.root().join("work"), 0o700)?;
        // The writable layer's own mode is the mode of `/` inside.
        super::make(&disk.upper(), 0o755)?;
        super::give(&disk.upper(), Uid::from_raw(ids.first), ids)?;
        Ok(disk)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bounds of a container that was made earlier, whatever this agent would do today.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn find(&self, directory: &Directory) -> Result<Disk, DiskError> {
        Self::with(directory, Image::find(&self.space, directory)?)
    }

    /// The same of a container whose init is dead, to read what it has left. An image that no kernel has
    /// unmounted is not `clean`, and holds anything.
    ///
    /// # Errors
    /// `EUCLEAN`, or what the kernel refuses.
    pub fn find_dead(&self, directory: &Directory, clean: bool) -> Result<Disk, DiskError> {
        Self::with(directory, Image::find_dead(&self.space, directory, clean)?)
    }

    fn with(directory: &Directory, image: Option<Image>) -> Result<Disk, DiskError> {
        let bounds = if let Some(image) = image {
            Bounds::Image(image)
        } else if let Some(project) = Project::find(&directory.disk())? {
            Bounds::Quota(project)
        } else {
            Bounds::Unlimited
        };
        Ok(Disk {
            directory: directory.disk(),
            bounds,
        })
    }
}

impl Disk {
    /// Where this process finds the file system or directory that holds the writable layer, as long as
    /// this is held.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        match &self.bounds {
            Bounds::Image(image) => image.root(),
            Bounds::Quota(_) | Bounds::Unlimited => self.directory.clone(),
        }
    }

    /// The writable layer, in the same way.
    #[must_use]
    pub fn upper(&self) -> PathBuf {
        self.root().join("upper")
    }

    /// The mount that the container's init puts on [`Directory::disk`]; `None` if it needs none.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn mount(&self) -> Result<Option<OwnedFd>, SysError> {
        match &self.bounds {
            Bounds::Image(image) => {
                let mount = image.mount().try_clone_to_owned();
                mount.map(Some).context("dup", "image")
            }
            Bounds::Quota(_) | Bounds::Unlimited => Ok(None),
        }
    }

    /// What is on it now; `None` if nobody counts.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn usage(&self) -> Result<Option<Usage>, DiskError> {
        match &self.bounds {
            Bounds::Quota(project) => Ok(Some(project.usage()?)),
            Bounds::Image(image) => Ok(Some(image.usage()?)),
            Bounds::Unlimited => Ok(None),
        }
    }

    /// Changes the limit, also of a running container: all of it, or nothing.
    ///
    /// # Errors
    /// [`DiskError::InUse`], [`DiskError::Beyond`], [`DiskError::NotEnough`].
    pub fn limit(&self, disks: &Disks, change: Change) -> Result<(), DiskError> {
        let _turn = disks.turn();
        match &self.bounds {
            Bounds::Quota(project) => {
                let grown = project.growth(change)?;
                if grown > 0 {
                    disks.space.has_room(grown)?;
                }
                project.limit(change)
            }
            Bounds::Image(image) => image.limit(change),
            Bounds::Unlimited => Ok(()),
        }
    }

    /// For a container that is dead and will be removed: what was not written is never written. Others
    /// who look at it meanwhile find errors.
    pub fn abandon(&self) {
        match &self.bounds {
            Bounds::Image(image) => image.abandon(),
            Bounds::Quota(_) | Bounds::Unlimited => {}
        }
    }
}

/// Gives back what counts a container's files, for a directory that is about to be removed. They are
/// counted as long as they are there.
pub(super) fn release(directory: &Directory) -> Result<(), SysError> {
    Project::find(&directory.disk())?.map_or(Ok(()), |project| project.release())
}

/// Opens a directory for its ioctls.
fn open_directory(path: &Path) -> Result<OwnedFd, SysError> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(path, flags, nix::sys::stat::Mode::empty()).context("open", path.display())
}

/// Smallest limit of whole MiB with so many bytes.
fn whole_mb(bytes: u64) -> u64 {
    bytes.next_multiple_of(1 << 20)
}
