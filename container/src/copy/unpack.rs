//! From a stream to a tree.
//!
//! Whoever made the stream may mean harm. Every entry is made in a directory that is opened through no
//! symlink and not above the root of the copy (openat2(2), Linux 5.6), as something new (`O_EXCL`).

use super::pack::last_name;
use super::tar::{Entry, Kind, Reader};
use super::{Complain, Done, Fault, Limits, MAX_DEPTH, Naming, PATH_MAX, shown};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{LinkatFlags, UnlinkatFlags, linkat, symlinkat, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Makes what `from` holds at `path`. All of it belongs to the process that calls; directories that were
/// there keep their modes.
///
/// # Errors
/// At the first entry that is not taken, at a limit, at a damaged stream, at a full disk. What was made
/// until then stays.
pub fn unpack(
    from: impl Read,
    path: &Path,
    naming: Naming,
    limits: Limits,
    complain: Complain<'_>,
) -> Result<Done, Fault> {
    unpack_checked(from, None, (path, naming), limits, complain)
}

/// [`unpack`] as [`Naming::AsCopied`] of a stream that must be of `asked`, a path of another machine or
/// container: whoever makes it chooses no other name, for which something may be there.
///
/// # Errors
/// As [`unpack`], and at an entry by another name.
pub fn unpack_of(
    asked: &Path,
    from: impl Read,
    path: &Path,
    limits: Limits,
    complain: Complain<'_>,
) -> Result<Done, Fault> {
    let to = (path, Naming::AsCopied);
    unpack_checked(from, Some(asked), to, limits, complain)
}

fn unpack_checked(
    from: impl Read,
    asked: Option<&Path>,
    (path, naming): (&Path, Naming),
    limits: Limits,
    complain: Complain<'_>,
) -> Result<Done, Fault> {
    let (root, renamed) = match naming {
        Naming::AsGiven => (directory(path)?, None),
        Naming::AsCopied => destination(path)?,
    };
    let mut unpacker = Unpacker {
        root,
        renamed,
        asked: asked
            .map(|asked| last_name(asked).map_or(b".".to_vec(), |name| name.as_bytes().to_vec())),
        limits,
        complain,
        done: Done::default(),
        closed: Vec::new(),
        names: 0,
        buffer: vec![0; 64 * 1024],
    };
    let mut reader = Reader::new(from);
    while let Some(entry) = reader.next(MAX_HEADERS)? {
        unpacker.entry(entry, &mut reader)?;
    }
    unpacker.close_directories()?;
    Ok(unpacker.done)
}

/// Bytes of paths that are remembered at most.
const MOST_NAMES: u64 = 64 << 20;

/// Headers of one entry at most, the extended ones included.
const MAX_HEADERS: u64 = 16;

/// Where a copy to `path` goes, as with `cp -r`: the directory below which everything is made, and the name
/// that the first one of each of its paths gets there, unless `path` itself is that directory.
///
/// # Errors
/// [`Fault::Refused`]: the directory cannot be opened.
pub fn destination(path: &Path) -> Result<(OwnedFd, Option<OsString>), Fault> {
    match directory(path) {
        Ok(root) => return Ok((root, None)),
        Err(Fault::Refused {
            errno: Errno::ENOENT | Errno::ENOTDIR,
            ..
        }) => {}
        Err(fault) => return Err(fault),
    }
    let name = path
        .file_name()
        .ok_or(refused("open", path, Errno::ENOENT))?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let root = directory(parent.unwrap_or(Path::new(".")))?;
    Ok((root, Some(name.to_owned())))
}

fn directory(path: &Path) -> Result<OwnedFd, Fault> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|errno| refused("open", path, errno))
}

struct Unpacker<'a> {
    root: OwnedFd,
    renamed: Option<OsString>,
    /// What each path must begin with.
    asked: Option<Vec<u8>>,
    limits: Limits,
    complain: Complain<'a>,
    done: Done,
    /// Directories whose mode would keep us from filling them, and the mode that they get at the end.
    closed: Vec<(PathBuf, u32)>,
    /// Bytes of their paths.
    names: u64,
    buffer: Vec<u8>,
}

/// Where an entry goes: a name in an open directory.
struct Spot {
    parent: OwnedFd,
    name: OsString,
    /// Below the root.
    path: PathBuf,
}

impl Unpacker<'_> {
    fn entry(&mut self, entry: Entry, reader: &mut Reader<impl Read>) -> Result<(), Fault> {
        let names = names(&entry.path)?;
        let first = entry.path.split(|byte| *byte == b'/').next();
        if self.asked.is_some() && self.asked.as_deref() != first {
            return Err(Fault::Entry {
                path: entry.path,
                why: "it is not what was asked for",
            });
        }
        if names.is_empty() && entry.kind != Kind::Directory {
            return Err(Fault::Entry {
                path: entry.path,
                why: "it would take the place of the directory that everything goes to",
            });
        }
        let names = self.rename(&entry.path, names);
        let Some((name, parents)) = names.split_last() else {
            // The directory itself: it is there.
            return self.count();
        };
        self.count()?;
        if entry.kind == Kind::Other {
            let shown = shown(&entry.path);
            (self.complain)(format!(
                "\"{shown}\" is passed over: no file, directory or link"
            ));
            return Ok(());
        }
        let spot = self.spot(name, &parents.iter().collect::<PathBuf>())?;
        match &entry.kind {
            Kind::Directory => self.directory(spot, entry.mode & self.limits.modes),
            Kind::File => self.file(&spot, &entry, reader),
            Kind::Symlink(target) => self.symlink(&spot, target),
            Kind::HardLink(target) => self.hard_link(&spot, target),
            Kind::Other => Ok(()),
        }
    }

    fn rename(&self, path: &[u8], names: Vec<OsString>) -> Vec<OsString> {
        let Some(renamed) = &self.renamed else {
            return names;
        };
        // What is in a directory, or something by its name.
        let skip = usize::from(!(path == b"." || path.starts_with(b"./")));
        let rest = names.into_iter().skip(skip);
        std::iter::once(renamed.clone()).chain(rest).collect()
    }

    /// Opens the parent, making directories that the stream does not name.
    fn spot(&mut self, name: &OsStr, parents: &Path) -> Result<Spot, Fault> {
        let parent = match below(&self.root, parents) {
            Err(Errno::ENOENT) => self.make_parents(parents)?,
            other => other.map_err(|errno| unreachable(parents, errno))?,
        };
        Ok(Spot {
            parent,
            name: name.to_owned(),
            path: parents.join(name),
        })
    }

    fn make_parents(&mut self, parents: &Path) -> Result<OwnedFd, Fault> {
        let mut path = PathBuf::new();
        let mut parent = below(&self.root, &path).map_err(|errno| unreachable(&path, errno))?;
        for name in parents {
            path.push(name);
            match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => self.count()?,
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(refused("make", &path, errno)),
            }
            parent = below(&parent, Path::new(name)).map_err(|errno| unreachable(&path, errno))?;
        }
        Ok(parent)
    }

    fn directory(&mut self, spot: Spot, mode: u32) -> Result<(), Fault> {
        let make = || mkdirat(&spot.parent, &*spot.name, Mode::S_IRWXU);
        let name = Path::new(&spot.name);
        match make() {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                if below(&spot.parent, name).is_ok() {
                    return Ok(());
                }
                unlink(&spot)?;
                make().map_err(|errno| refused("make", &spot.path, errno))?;
            }
            Err(errno) => return Err(refused("make", &spot.path, errno)),
        }
        if mode & 0o700 != 0o700 {
            let length = u64::try_from(spot.path.as_os_str().len()).unwrap_or(u64::MAX);
            self.names = self.names.saturating_add(length);
            if self.names > MOST_NAMES {
                let what = "bytes of names of closed directories";
                return Err(Fault::TooMuch(what, MOST_NAMES));
            }
            self.closed.push((spot.path, mode));
            return Ok(());
        }
        let directory =
            below(&spot.parent, name).map_err(|errno| unreachable(&spot.path, errno))?;
        fchmod(&directory, Mode::from_bits_truncate(mode))
            .map_err(|errno| refused("set the mode of", &spot.path, errno))
    }

    /// Innermost first.
    fn close_directories(&mut self) -> Result<(), Fault> {
        for (path, mode) in std::mem::take(&mut self.closed).into_iter().rev() {
            let directory = below(&self.root, &path).map_err(|errno| unreachable(&path, errno))?;
            fchmod(&directory, Mode::from_bits_truncate(mode))
                .map_err(|errno| refused("set the mode of", &path, errno))?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        spot: &Spot,
        entry: &Entry,
        reader: &mut Reader<impl Read>,
    ) -> Result<(), Fault> {
        let bytes = self.done.bytes.checked_add(entry.size);
        let bytes = bytes.filter(|bytes| *bytes <= self.limits.bytes);
        self.done.bytes = bytes.ok_or(Fault::TooMuch("bytes", self.limits.bytes))?;
        unlink(spot)?;
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(&spot.parent, &*spot.name, flags, mode);
        let mut file = File::from(file.map_err(|errno| refused("make", &spot.path, errno))?);
        loop {
            let read = reader.content(&mut self.buffer)?;
            if read == 0 {
                break;
            }
            let written = file.write_all(self.buffer.get(..read).unwrap_or_default());
            written.map_err(|error| refused("write", &spot.path, super::errno_of(&error)))?;
        }
        let modified = TimeSpec::new(entry.modified, 0);
        fchmod(
            &file,
            Mode::from_bits_truncate(entry.mode & self.limits.modes),
        )
        .and_then(|()| futimens(&file, &TimeSpec::UTIME_OMIT, &modified))
        .map_err(|errno| refused("set the mode of", &spot.path, errno))
    }

    fn symlink(&self, spot: &Spot, target: &[u8]) -> Result<(), Fault> {
        if target.is_empty() || target.contains(&0) || target.len() >= PATH_MAX {
            return Err(taken(&spot.path, "it is a link without a proper target"));
        }
        unlink(spot)?;
        symlinkat(OsStr::from_bytes(target), &spot.parent, &*spot.name)
            .map_err(|errno| refused("make", &spot.path, errno))
    }

    fn hard_link(&self, spot: &Spot, target: &[u8]) -> Result<(), Fault> {
        let missing = || taken(&spot.path, "it is a hard link to what is not in the stream");
        let names = names(target).map_err(|_| missing())?;
        let (name, parents) = names.split_last().ok_or_else(missing)?;
        let parents: PathBuf = parents.iter().collect();
        let parent = below(&self.root, &parents).map_err(|_| missing())?;
        unlink(spot)?;
        // Without AT_SYMLINK_FOLLOW a link to a symlink is one more name of the symlink.
        let flags = LinkatFlags::empty();
        match linkat(&parent, &**name, &spot.parent, &*spot.name, flags) {
            Err(Errno::ENOENT | Errno::EPERM) => Err(missing()),
            other => other.map_err(|errno| refused("make", &spot.path, errno)),
        }
    }

    fn count(&mut self) -> Result<(), Fault> {
        self.done.entries += 1;
        if self.done.entries > self.limits.entries {
            let what = "files, links and directories";
            return Err(Fault::TooMuch(what, self.limits.entries));
        }
        Ok(())
    }
}

/// A directory at or below another one, through no symlink.
fn below(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    openat2(root, path, how)
}

/// Makes room for what comes in place of something else.
fn unlink(spot: &Spot) -> Result<(), Fault> {
    match unlinkat(&spot.parent, &*spot.name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(Errno::EISDIR) => Err(taken(&spot.path, "a directory of that name is there")),
        Err(errno) => Err(refused("replace", &spot.path, errno)),
    }
}

fn refused(doing: &'static str, path: &Path, errno: Errno) -> Fault {
    Fault::Refused {
        doing,
        path: path.as_os_str().as_bytes().to_vec(),
        errno,
    }
}

fn taken(path: &Path, why: &'static str) -> Fault {
    Fault::Entry {
        path: path.as_os_str().as_bytes().to_vec(),
        why,
    }
}

fn unreachable(path: &Path, errno: Errno) -> Fault {
    if matches!(errno, Errno::ELOOP | Errno::EXDEV) {
        return taken(path, "it leads through a symlink");
    }
    if errno == Errno::ENOTDIR {
        return taken(path, "it leads through what is no directory");
    }
    refused("open", path, errno)
}

/// The plain names of a path: no `..`, nothing absolute, no NUL; `.` and doubled slashes fall away.
fn names(path: &[u8]) -> Result<Vec<OsString>, Fault> {
    let refused = |why| {
        Err(Fault::Entry {
            path: path.to_vec(),
            why,
        })
    };
    if path.is_empty() || path.contains(&0) {
        return refused("its name is empty, or holds a NUL");
    }
    if path.starts_with(b"/") {
        return refused("its path is absolute");
    }
    let parts = path.split(|byte| *byte == b'/');
    let names: Vec<OsString> = parts
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(|name| OsString::from_vec(name.to_vec()))
        .collect();
    if names.iter().any(|name| name == "..") {
        return refused("its path leads upwards");
    }
    // NAME_MAX and PATH_MAX of the kernel.
    if path.len() >= PATH_MAX || names.iter().any(|name| name.len() > 255) {
        return refused("its path is too long");
    }
    // One more than a packer writes: a file in the deepest directory.
    if names.len() > MAX_DEPTH + 1 {
        return refused("it lies too deep");
    }
    Ok(names)
}
