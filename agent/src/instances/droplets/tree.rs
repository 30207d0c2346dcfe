//! Files below a directory that somebody else filled: nothing here follows a symlink out of it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

/// The longest file that is read whole: far above any passwd or staging_info.yml.
const MAX_TEXT_BYTES: u64 = 1024 * 1024;

/// Which symlinks on the way to a file are followed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Symlinks {
    /// None: every component is what the archive made of it.
    Refused,
    /// Those of directories, as if the tree were the root of the file system. The last component must
    /// not be one.
    InsideTree,
}

/// The directory `path` itself.
pub(crate) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)?
        .into())
}

/// The directory `path` below `root`, through no symlink and no mount (openat2(2), Linux 5.6).
pub(crate) fn open_below(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    openat2(root, path, how)
}

/// The file `path` below `root`, to read, wherever its symlinks lead within `root`. Never waits for the
/// other end of a fifo.
pub(crate) fn open_file_below(root: impl AsFd, path: &Path) -> Result<File, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how).map(File::from)
}

/// The file `path` below `root`, whole; `None` if it is not there.
///
/// # Errors
/// If it is no regular file, larger than 1 MiB, or behind a symlink that is not followed.
pub(crate) fn read_text(
    root: &Path,
    path: &str,
    symlinks: Symlinks,
) -> io::Result<Option<Vec<u8>>> {
    let resolve = match symlinks {
        Symlinks::Refused => ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS,
        Symlinks::InsideTree => ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    };
    // Nonblocking: opening a fifo would wait for its writer.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let how = OpenHow::new()
        .flags(flags)
        .mode(Mode::empty())
        .resolve(resolve);
    let file = match openat2(open_directory(root)?, path, how) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT) => return Ok(None),
        Err(Errno::ELOOP | Errno::EXDEV) => return Err(io::Error::other("it is a symlink")),
        Err(errno) => return Err(errno.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(Some(bytes))
}
