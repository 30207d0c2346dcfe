//! Unpacks a droplet that may be hostile: nothing outside the given directory is touched.
//!
//! It runs outside the app's limits, as root, so an entry is trusted in nothing. Its path is taken apart
//! into plain names; its parent is opened through `openat2` that refuses symlinks; its last name is only
//! ever created, linked or unlinked relative to that descriptor. A symlink's target is text: it means
//! something in the container only.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat,
};
use tar::{Archive, Entry};

use super::error::DropletError;
use super::meter::{Budget, Meter};
use super::stop::Stop;
use super::toll::{ENTRY, Toll};
use super::tree::{open_below, open_directory};
use super::{FetchOptions, Owner};

/// Directories below one another: more would make the tree hard to remove again, as each level of a walk
/// holds a descriptor.
const MAX_DEPTH: usize = 200;

/// Unpacks the gzip-compressed tar `archive` into the empty directory `home`. Blocks.
///
/// Everything belongs to `owner`; permission bits and modification times are those of the archive,
/// set-id bits and extended attributes are dropped.
///
/// # Errors
/// At the first entry that is not acceptable, at every bound of `options`, at a damaged or truncated
/// archive, at a full disk. What was unpacked stays for the caller to remove.
pub(crate) fn unpack(
    archive: File,
    home: &Path,
    owner: Owner,
    options: &FetchOptions,
    stop: &Stop,
) -> Result<(), DropletError> {
    let root = open_directory(home).map_err(|e| DropletError::disk("open", home, e))?;
    let decoder = MultiGzDecoder::new(BufReader::with_capacity(128 * 1024, archive));
    let (meter, budget) = Meter::new(decoder, options.max_unpacked_bytes, stop.clone());
    let mut archive = Archive::new(meter);
    let mut unpacker = Unpacker {
        root,
        home,
        owner: (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid)),
        options,
        made: 0,
        written: 0,
        toll: Toll::of(options.space.as_ref()),
        buffer: vec![0; 64 * 1024],
    };
    let mut entries = archive.entries().map_err(|error| budget.reason(&error))?;
    while let Some(entry) = budget.metadata(|| entries.next()) {
        let mut entry = entry.map_err(|error| budget.reason(&error))?;
        unpacker.entry(&mut entry, &budget)?;
    }
    // To the end of the stream: only there its checksum is compared.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|error| budget.reason(&error))?;
    Ok(())
}

struct Unpacker<'a> {
    root: OwnedFd,
    home: &'a Path,
    owner: (Uid, Gid),
    options: &'a FetchOptions,
    /// Files, links and directories so far.
    made: u64,
    /// Bytes written so far; holes of sparse entries count, as they are written out.
    written: u64,
    toll: Toll<'a>,
    buffer: Vec<u8>,
}

/// Where an entry goes: a name in an open directory.
struct Spot {
    parent: OwnedFd,
    name: OsString,
    /// For error texts.
    path: PathBuf,
}

impl Unpacker<'_> {
    fn entry(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        budget: &Budget,
    ) -> Result<(), DropletError> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return drain(entry, budget);
        }
        let path = entry.path_bytes().into_owned();
        let names = names(&path)?;
        let Some(spot) = self.spot(&names)? else {
            // `./`, the directory itself: it is there.
            return drain(entry, budget);
        };
        let old_directory = kind.is_file() && path.ends_with(b"/");
        if kind.is_dir() || old_directory {
            self.directory(&spot, mode(entry)?)?;
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            return self.file(&spot, entry, budget);
        } else if kind.is_symlink() {
            self.symlink(&spot, &link_name(entry, &path)?)?;
        } else if kind.is_hard_link() {
            self.hard_link(&spot, &link_name(entry, &path)?)?;
        } else {
            return Err(refused(
                &path,
                "only files, directories and links may be in a droplet",
            ));
        }
        drain(entry, budget)
    }

    /// Opens the parent of what `names` lead to, making directories that the archive does not list.
    /// `None` for no names at all.
    fn spot(&mut self, names: &[&OsStr]) -> Result<Option<Spot>, DropletError> {
        let Some((name, parents)) = names.split_last() else {
            return Ok(None);
        };
        let parents: PathBuf = parents.iter().collect();
        let parent = if parents.as_os_str().is_empty() {
            open_below(&self.root, Path::new("."))
        } else {
            open_below(&self.root, &parents)
        };
        let parent = match parent {
            Ok(parent) => parent,
            Err(Errno::ENOENT) => self.make_parents(&parents)?,
            Err(errno) => return Err(self.unreachable(&parents, errno)),
        };
        Ok(Some(Spot {
            parent,
            name: (*name).to_owned(),
            path: parents.join(name),
        }))
    }

    fn make_parents(&mut self, parents: &Path) -> Result<OwnedFd, DropletError> {
        let mut path = PathBuf::new();
        let mut parent = open_below(&self.root, Path::new("."))
            .map_err(|errno| self.unreachable(&path, errno))?;
        for name in parents {
            path.push(name);
            match mkdirat(&parent, name, Mode::from_bits_truncate(0o700)) {
                Ok(()) => {
                    self.count()?;
                    parent = open_below(&parent, Path::new(name))
                        .map_err(|errno| self.unreachable(&path, errno))?;
                    self.own(&parent, &path, 0o755)?;
                }
                Err(Errno::EEXIST) => {
                    parent = open_below(&parent, Path::new(name))
                        .map_err(|errno| self.unreachable(&path, errno))?;
                }
                Err(errno) => return Err(self.disk("make directory", &path, errno)),
            }
        }
        Ok(parent)
    }

    fn directory(&mut self, spot: &Spot, mode: u32) -> Result<(), DropletError> {
        let make = || mkdirat(&spot.parent, &*spot.name, Mode::from_bits_truncate(0o700));
        let name = Path::new(&spot.name);
        match make() {
            Ok(()) => self.count()?,
            Err(Errno::EEXIST) => {
                // A later entry replaces an earlier one, but a directory keeps what is in it.
                if open_below(&spot.parent, name).is_err() {
                    self.unlink(spot)?;
                    make().map_err(|errno| self.disk("make directory", &spot.path, errno))?;
                }
            }
            Err(errno) => return Err(self.disk("make directory", &spot.path, errno)),
        }
        let directory =
            open_below(&spot.parent, name).map_err(|errno| self.disk("open", &spot.path, errno))?;
        // The app must get into its own directories, as root would when it unpacks.
        self.own(&directory, &spot.path, mode | 0o700)
    }

    fn file(
        &mut self,
        spot: &Spot,
        entry: &mut Entry<'_, impl Read>,
        budget: &Budget,
    ) -> Result<(), DropletError> {
        self.count()?;
        self.unlink(spot)?;
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(
            &spot.parent,
            &*spot.name,
            flags,
            Mode::from_bits_truncate(0o600),
        );
        let mut file = File::from(file.map_err(|errno| self.disk("make", &spot.path, errno))?);
        let wanted = entry.size();
        let mut copied = 0u64;
        loop {
            let count = match entry.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(budget.reason(&error)),
            };
            let chunk = self.buffer.get(..count).unwrap_or_default();
            copied = copied.saturating_add(chunk.len() as u64);
            self.written = self.written.saturating_add(chunk.len() as u64);
            if self.written > self.options.max_unpacked_bytes {
                return Err(DropletError::TooMuchUnpacked {
                    max: self.options.max_unpacked_bytes,
                });
            }
            self.toll.pay(chunk.len() as u64)?;
            file.write_all(chunk)
                .map_err(|error| self.disk("write", &spot.path, error))?;
        }
        if copied != wanted {
            let at = format!("{} has {copied} of its {wanted} bytes", shorten(&spot.path));
            return Err(DropletError::Truncated { at });
        }
        self.own(&file, &spot.path, mode(entry)?)?;
        // Interpreters compare the times of sources and of what they compiled from them.
        let seconds = entry
            .header()
            .mtime()
            .ok()
            .and_then(|mtime| i64::try_from(mtime).ok());
        let modified = TimeSpec::new(seconds.unwrap_or(0), 0);
        futimens(&file, &TimeSpec::UTIME_OMIT, &modified)
            .map_err(|errno| self.disk("date", &spot.path, errno))
    }

    fn symlink(&mut self, spot: &Spot, target: &OsStr) -> Result<(), DropletError> {
        self.count()?;
        self.unlink(spot)?;
        symlinkat(target, &spot.parent, &*spot.name)
            .map_err(|errno| self.disk("make symlink", &spot.path, errno))?;
        let (uid, gid) = self.owner;
        let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(&spot.parent, &*spot.name, Some(uid), Some(gid), flags)
            .map_err(|errno| self.disk("give away", &spot.path, errno))
    }

    fn hard_link(&mut self, spot: &Spot, target: &OsStr) -> Result<(), DropletError> {
        self.count()?;
        let path = spot.path.as_os_str().as_bytes();
        let missing = "it is a hard link to what is not in the droplet";
        let names = names(target.as_bytes())
            .map_err(|_| refused(path, "it is a hard link to outside of the droplet"))?;
        let Some((name, parents)) = names.split_last() else {
            return Err(refused(path, missing));
        };
        let parents: PathBuf = Path::new(".").join(parents.iter().collect::<PathBuf>());
        let parent = open_below(&self.root, &parents).map_err(|_| refused(path, missing))?;
        self.unlink(spot)?;
        // Without AT_SYMLINK_FOLLOW a link to a symlink is one more name of the symlink.
        let linked = linkat(
            &parent,
            *name,
            &spot.parent,
            &*spot.name,
            LinkatFlags::empty(),
        );
        if linked == Err(Errno::ENOENT) {
            return Err(refused(path, missing));
        }
        // So says link(2) of directories.
        if linked == Err(Errno::EPERM) {
            return Err(refused(path, "it is a hard link to a directory"));
        }
        linked.map_err(|errno| self.disk("make link", &spot.path, errno))
    }

    /// Makes room for a later entry of the same name.
    fn unlink(&self, spot: &Spot) -> Result<(), DropletError> {
        match unlinkat(&spot.parent, &*spot.name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => {
                let why = "a directory of that name came before it";
                Err(refused(spot.path.as_os_str().as_bytes(), why))
            }
            Err(errno) => Err(self.disk("replace", &spot.path, errno)),
        }
    }

    fn own(&self, fd: impl AsFd, path: &Path, mode: u32) -> Result<(), DropletError> {
        let (uid, gid) = self.owner;
        fchown(&fd, Some(uid), Some(gid)).map_err(|errno| self.disk("give away", path, errno))?;
        fchmod(&fd, Mode::from_bits_truncate(mode))
            .map_err(|errno| self.disk("set the mode of", path, errno))
    }

    fn count(&mut self) -> Result<(), DropletError> {
        self.made += 1;
        if self.made > self.options.max_entries {
            return Err(DropletError::TooManyEntries {
                max: self.options.max_entries,
            });
        }
        self.toll.pay(ENTRY)
    }

    fn unreachable(&self, parents: &Path, errno: Errno) -> DropletError {
        let path = parents.as_os_str().as_bytes();
        if matches!(errno, Errno::ELOOP | Errno::EXDEV) {
            return refused(path, "it leads through a symlink");
        }
        if errno == Errno::ENOTDIR {
            return refused(path, "it leads through what is no directory");
        }
        self.disk("open", parents, errno)
    }

    fn disk(&self, doing: &'static str, path: &Path, source: impl Into<io::Error>) -> DropletError {
        DropletError::disk(doing, &self.home.join(path), source)
    }
}

/// The plain names of an entry's path: no `..`, nothing absolute, no NUL; `.` and doubled slashes fall
/// away.
fn names(path: &[u8]) -> Result<Vec<&OsStr>, DropletError> {
    if path.starts_with(b"/") {
        return Err(refused(path, "its path is absolute"));
    }
    if path.contains(&0) {
        return Err(refused(path, "its path holds a NUL"));
    }
    let names: Vec<&OsStr> = path
        .split(|byte| *byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(OsStr::from_bytes)
        .collect();
    if names.iter().any(|name| *name == "..") {
        return Err(refused(path, "its path leads upwards"));
    }
    // Limits of the kernel: NAME_MAX and PATH_MAX.
    if path.len() >= 4096 || names.iter().any(|name| name.len() > 255) {
        return Err(refused(path, "its path is too long"));
    }
    if names.len() > MAX_DEPTH {
        return Err(refused(path, "it lies too deep"));
    }
    Ok(names)
}

fn link_name(entry: &Entry<'_, impl Read>, path: &[u8]) -> Result<OsString, DropletError> {
    let target = entry.link_name_bytes().unwrap_or_default();
    if target.is_empty() || target.contains(&0) || target.len() >= 4096 {
        return Err(refused(path, "it is a link without a proper target"));
    }
    Ok(OsStr::from_bytes(&target).to_owned())
}

/// The permission bits; set-id and sticky bits are dropped.
fn mode(entry: &Entry<'_, impl Read>) -> Result<u32, DropletError> {
    let mode = entry.header().mode();
    let mode = mode.map_err(|error| DropletError::Corrupt {
        why: error.to_string(),
    })?;
    Ok(mode & 0o777)
}

/// Reads what an entry has no business to hold, so that it does not count as the next one's metadata.
fn drain(entry: &mut Entry<'_, impl Read>, budget: &Budget) -> Result<(), DropletError> {
    io::copy(entry, &mut io::sink())
        .map(|_| ())
        .map_err(|error| budget.reason(&error))
}

fn refused(path: &[u8], why: &'static str) -> DropletError {
    DropletError::Entry {
        entry: shorten(Path::new(OsStr::from_bytes(path))),
        why,
    }
}

/// At most 200 characters of `path`.
fn shorten(path: &Path) -> String {
    path.to_string_lossy().chars().take(200).collect()
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
