//! From a tree to a stream.
//!
//! The tree may change at any moment, by somebody who means harm. So everything is looked at by descriptor,
//! no symlink is followed unless that was asked for, a fifo cannot block (`O_NONBLOCK`), and of a file exactly
//! as many bytes are written as its header says.

use super::tar::{Entry, Kind, Writer};
use super::{Complain, Done, Fault, Links, MAX_DEPTH, PATH_MAX, shown};
use nix::dir::{Dir, OwningIter};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// Writes what is at `path` to `to`, under the last name of the path. A path that ends in `/.` (and `/`)
/// stands for what is in the directory.
///
/// # Errors
/// It is not there, or nobody reads the stream. What cannot be read below it is told and counted.
pub fn pack(
    path: &Path,
    links: Links,
    to: impl Write,
    complain: Complain<'_>,
) -> Result<Done, Fault> {
    let mut packer = Packer {
        to: Writer::new(to),
        links,
        complain,
        done: Done::default(),
        ancestors: Vec::new(),
        buffer: vec![0; 64 * 1024],
    };
    let refused = |doing| {
        move |errno| Fault::Refused {
            doing,
            path: path.as_os_str().as_bytes().to_vec(),
            errno,
        }
    };
    let first = match last_name(path) {
        None => {
            let directory = open(path, DIRECTORY, Mode::empty()).map_err(refused("open"))?;
            packer.directory(directory, b".".to_vec())?
        }
        Some(name) => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            let parent = open(parent, DIRECTORY, Mode::empty()).map_err(refused("open"))?;
            // For its error: below the first one, what is missing is no failure.
            packer.look(parent.as_fd(), name).map_err(refused("find"))?;
            packer.entry(parent.as_fd(), name, name.as_bytes().to_vec())?
        }
    };
    packer.tree(first)?;
    let done = packer.done;
    packer.to.finish().map(|()| done)
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// `None`: the path names a directory for what is in it.
pub(super) fn last_name(path: &Path) -> Option<&OsStr> {
    let bytes = path.as_os_str().as_bytes();
    if bytes == b"." || bytes.ends_with(b"/.") {
        return None;
    }
    path.file_name()
}

struct Packer<'a, W> {
    to: Writer<W>,
    links: Links,
    complain: Complain<'a>,
    done: Done,
    /// Device and inode of the directories that are being read, outermost first.
    ancestors: Vec<(u64, u64)>,
    buffer: Vec<u8>,
}

/// A directory that is being read.
struct Level {
    directory: OwnedFd,
    entries: OwningIter,
    /// In the stream.
    path: Vec<u8>,
}

impl<W: Write> Packer<'_, W> {
    fn tree(&mut self, first: Option<Level>) -> Result<(), Fault> {
        let mut levels: Vec<Level> = first.into_iter().collect();
        while let Some(level) = levels.last_mut() {
            let deeper = match level.entries.next() {
                None => {
                    levels.pop();
                    self.ancestors.pop();
                    continue;
                }
                Some(Err(errno)) => {
                    let path = level.path.clone();
                    self.damage(&path, "it cannot be listed", Some(errno));
                    levels.pop();
                    self.ancestors.pop();
                    continue;
                }
                Some(Ok(entry)) => {
                    let name = entry.file_name().to_bytes();
                    if matches!(name, b"." | b"..") {
                        continue;
                    }
                    let path = [&level.path[..], b"/", name].concat();
                    self.entry(level.directory.as_fd(), OsStr::from_bytes(name), path)?
                }
            };
            levels.extend(deeper);
        }
        Ok(())
    }

    /// Writes one entry; gives a directory back, to be read.
    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        path: Vec<u8>,
    ) -> Result<Option<Level>, Fault> {
        if path.len() >= PATH_MAX {
            self.damage(&path, "its path is too long", None);
            return Ok(None);
        }
        let stat = match self.look(parent, name) {
            Ok(stat) => stat,
            Err(errno) => {
                self.damage(&path, "it cannot be read", Some(errno));
                return Ok(None);
            }
        };
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        match kind {
            SFlag::S_IFDIR => match openat(parent, name, self.how(DIRECTORY), Mode::empty()) {
                Ok(directory) => return self.directory(directory, path),
                Err(errno) => self.damage(&path, "it cannot be read", Some(errno)),
            },
            SFlag::S_IFREG => return self.file(parent, name, path).map(|()| None),
            SFlag::S_IFLNK => match readlinkat(parent, name) {
                Ok(target) => {
                    let kind = Kind::Symlink(target.into_vec());
                    self.head(path, kind, 0, &stat)?;
                }
                Err(errno) => self.damage(&path, "it cannot be read", Some(errno)),
            },
            _ => {
                let shown = shown(&path);
                (self.complain)(format!(
                    "\"{shown}\" is passed over: no file, directory or link"
                ));
            }
        }
        Ok(None)
    }

    fn look(&self, parent: BorrowedFd<'_>, name: &OsStr) -> Result<FileStat, Errno> {
        let flags = match self.links {
            Links::Keep => AtFlags::AT_SYMLINK_NOFOLLOW,
            Links::Follow => AtFlags::empty(),
        };
        fstatat(parent, name, flags)
    }

    /// What was no symlink a moment ago may be one now.
    fn how(&self, flags: OFlag) -> OFlag {
        match self.links {
            Links::Keep => flags | OFlag::O_NOFOLLOW,
            Links::Follow => flags,
        }
    }

    fn directory(&mut self, directory: OwnedFd, path: Vec<u8>) -> Result<Option<Level>, Fault> {
        let opened = || -> Result<(FileStat, OwningIter), Errno> {
            let copy = directory.try_clone().map_err(|_| Errno::EMFILE)?;
            Ok((fstat(&directory)?, Dir::from_fd(copy)?.into_iter()))
        };
        let (stat, entries) = match opened() {
            Ok(opened) => opened,
            Err(errno) => {
                self.damage(&path, "it cannot be read", Some(errno));
                return Ok(None);
            }
        };
        let own = (stat.st_dev, stat.st_ino);
        if self.ancestors.contains(&own) {
            let shown = shown(&path);
            (self.complain)(format!("\"{shown}\" is passed over: it leads back up"));
            return Ok(None);
        }
        if self.ancestors.len() >= MAX_DEPTH {
            self.damage(&path, "it lies too deep", None);
            return Ok(None);
        }
        self.head([&path[..], b"/"].concat(), Kind::Directory, 0, &stat)?;
        self.ancestors.push(own);
        Ok(Some(Level {
            directory,
            entries,
            path,
        }))
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: Vec<u8>) -> Result<(), Fault> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let opened = openat(parent, name, self.how(flags), Mode::empty());
        let (mut file, stat) = match opened.and_then(|fd| fstat(&fd).map(|stat| (fd, stat))) {
            Ok((fd, stat)) => (File::from(fd), stat),
            Err(errno) => {
                self.damage(&path, "it cannot be read", Some(errno));
                return Ok(());
            }
        };
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            self.damage(&path, "it was a file a moment ago", None);
            return Ok(());
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.head(path.clone(), Kind::File, size, &stat)?;
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            let room = self.buffer.get_mut(..most).unwrap_or_default();
            let read = match file.read(room) {
                Ok(0) => {
                    self.damage(&path, "it became shorter; zeros stand for the rest", None);
                    break;
                }
                Ok(read) => read,
                Err(error) => {
                    let errno = super::errno_of(&error);
                    self.damage(&path, "zeros stand for what cannot be read", Some(errno));
                    break;
                }
            };
            self.to
                .content(self.buffer.get(..read).unwrap_or_default())?;
            left = left.saturating_sub(read as u64);
        }
        self.fill(left)?;
        self.done.bytes += size;
        self.to.pad(size)
    }

    /// The header has promised as many bytes.
    fn fill(&mut self, mut left: u64) -> Result<(), Fault> {
        self.buffer.fill(0);
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            self.to
                .content(self.buffer.get(..most).unwrap_or_default())?;
            left = left.saturating_sub(most as u64);
        }
        Ok(())
    }

    fn head(&mut self, path: Vec<u8>, kind: Kind, size: u64, stat: &FileStat) -> Result<(), Fault> {
        self.done.entries += 1;
        self.to.entry(&Entry {
            path,
            kind,
            size,
            mode: stat.st_mode & 0o777,
            modified: stat.st_mtime,
        })
    }

    fn damage(&mut self, path: &[u8], what: &str, errno: Option<Errno>) {
        self.done.damaged += 1;
        let why = errno.map_or(String::new(), |errno| format!(": {}", errno.desc()));
        (self.complain)(format!("\"{}\": {what}{why}", shown(path)));
    }
}
