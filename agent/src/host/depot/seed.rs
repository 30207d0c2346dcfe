//! Files that a container finds when it starts, put into its writable layer before the mount.

use super::DepotError;
use container::fault::{Context, SysError};
use container::launch::Ids;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

/// A file to be put into a container.
#[derive(Clone)]
pub struct SeedFile {
    /// Where, relative to the root, e.g. `home/vcap/startup`.
    pub path: PathBuf,
    /// Permission bits, e.g. `0o755`.
    pub mode: u32,
    /// Owner, as the container sees it.
    pub uid: u32,
    /// Group, as the container sees it.
    pub gid: u32,
    /// Its content, which may be secret.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for SeedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ({} bytes, mode {:o})",
            self.path.display(),
            self.bytes.len(),
            self.mode
        )
    }
}

/// Who may do what with a file; the owners are ids of the container.
#[derive(Debug, Clone, Copy)]
struct Rights {
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Writes one file below `upper`. Directories on the way take the rights that they have in the
/// uppermost layer that holds them, as the overlay's own copy-up does; one that is in no layer belongs
/// to the file's owner.
pub(super) fn write(
    upper: &Path,
    ids: Ids,
    lowers: &[PathBuf],
    file: &SeedFile,
) -> Result<(), DepotError> {
    let mut way = components(&file.path)?;
    let name = way
        .pop()
        .ok_or_else(|| DepotError::SeedPath(file.path.clone()))?;
    let mut directory = open(upper, DIRECTORY, Mode::empty()).context("open", upper.display())?;
    let mut below = Below::open(lowers)?;
    let own = Rights {
        mode: 0o755,
        uid: file.uid,
        gid: file.gid,
    };
    let mut walked = PathBuf::new();
    for component in way {
        walked.push(&component);
        let rights = below.enter(&component).map_err(|stop| match stop {
            Stop::Obstacle(layer) => DepotError::SeedObstacle {
                path: file.path.clone(),
                obstacle: walked.clone(),
                layer,
            },
            Stop::Refused(error) => error.into(),
        })?;
        let place = upper.join(&walked);
        directory = make_directory(&directory, &component, ids, rights.unwrap_or(own))
            .context("mkdir", place.display())?;
    }
    Ok(write_file(&directory, &name, ids, file)
        .context("write", upper.join(&file.path).display())?)
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// The names of a plain relative path.
fn components(path: &Path) -> Result<Vec<OsString>, DepotError> {
    path.components()
        .map(|component| match component {
            Component::Normal(name) => Ok(name.to_owned()),
            Component::Prefix(_)
            | Component::RootDir
            | Component::CurDir
            | Component::ParentDir => Err(DepotError::SeedPath(path.to_owned())),
        })
        .collect()
}

/// Opens the directory, making it first if it is not there.
fn make_directory(
    parent: &OwnedFd,
    name: &OsStr,
    ids: Ids,
    rights: Rights,
) -> nix::Result<OwnedFd> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        Err(Errno::EEXIST) => return openat(parent, name, DIRECTORY, Mode::empty()),
        other => other?,
    }
    let directory = openat(parent, name, DIRECTORY, Mode::empty())?;
    grant(&directory, ids, rights)?;
    Ok(directory)
}

fn write_file(directory: &OwnedFd, name: &OsStr, ids: Ids, file: &SeedFile) -> std::io::Result<()> {
    // EXCL follows no link and meets no other file.
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mut target = File::from(openat(directory, name, flags, Mode::empty())?);
    target.write_all(&file.bytes)?;
    let rights = Rights {
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
    };
    Ok(grant(&target, ids, rights)?)
}

/// Owner first: `chown` takes the set-user-ID bit away.
fn grant(file: impl std::os::fd::AsFd, ids: Ids, rights: Rights) -> nix::Result<()> {
    let (uid, gid) = (ids.on_host(rights.uid), ids.on_host(rights.gid));
    fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    fchmod(&file, Mode::from_bits_truncate(rights.mode))
}

/// The same directory in every layer below that has it, uppermost first.
struct Below<'a> {
    layers: Vec<(&'a Path, OwnedFd)>,
}

enum Stop {
    Obstacle(PathBuf),
    Refused(SysError),
}

impl<'a> Below<'a> {
    fn open(lowers: &'a [PathBuf]) -> Result<Self, SysError> {
        let layers = lowers.iter().map(|path| {
            // The layer itself may be reached by a link: it is the operator's.
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let fd = open(path, flags, Mode::empty()).context("open", path.display())?;
            Ok((path.as_path(), fd))
        });
        Ok(Self {
            layers: layers.collect::<Result<_, SysError>>()?,
        })
    }

    /// Goes one directory down and tells the rights that it has there, if any layer has it. Something
    /// that is no directory hides the layers below it; on top, it stands in the way.
    fn enter(&mut self, name: &OsStr) -> Result<Option<Rights>, Stop> {
        let mut rights = None;
        let mut deeper = Vec::new();
        for (layer, directory) in self.layers.drain(..) {
            match openat(&directory, name, DIRECTORY, Mode::empty()) {
                Ok(inner) => {
                    let stat = fstat(&inner).context("fstat", layer.display());
                    let stat = stat.map_err(Stop::Refused)?;
                    let (mode, uid, gid) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
                    rights = rights.or(Some(Rights { mode, uid, gid }));
                    deeper.push((layer, inner));
                }
                Err(Errno::ENOENT) => {}
                Err(Errno::ENOTDIR | Errno::ELOOP) if deeper.is_empty() => {
                    return Err(Stop::Obstacle(layer.to_owned()));
                }
                Err(Errno::ENOTDIR | Errno::ELOOP) => break,
                Err(errno) => {
                    let on = layer.join(name).display().to_string();
                    return Err(Stop::Refused(SysError {
                        call: "open",
                        on,
                        errno,
                    }));
                }
            }
        }
        self.layers = deeper;
        Ok(rights)
    }
}
