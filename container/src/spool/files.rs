//! The segment files of a spool: their names, opening them, and how much of a log they hold.

use super::codec::HEAD_BYTES;
use crate::fault::{Context, SysError};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat},
    sys::stat::{Mode, fstatat},
};
use std::{
    ops::Range,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

const PREFIX: &str = "spool.";

/// Opens the directory of a job.
pub(crate) fn open_dir(dir: &Path) -> Result<OwnedFd, SysError> {
    open(dir, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .context("open", format_args!("{dir:?}"))
}

/// The name of the segment whose first byte has this log position.
pub(super) fn name(start: u64) -> String {
    format!("{PREFIX}{start:016x}")
}

/// Log positions at which segments start, oldest first.
pub(super) fn list(dir: BorrowedFd<'_>) -> Result<Vec<u64>, SysError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut entries =
        Dir::openat(dir, ".", flags, Mode::empty()).context("opendir", "the job's directory")?;
    starts(&mut entries)
}

fn starts(entries: &mut Dir) -> Result<Vec<u64>, SysError> {
    let mut starts = Vec::new();
    for entry in entries.iter() {
        let entry = entry.context("readdir", "the job's directory")?;
        let start = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|name| name.strip_prefix(PREFIX));
        starts.extend(start.and_then(|digits| u64::from_str_radix(digits, 16).ok()));
    }
    starts.sort_unstable();
    Ok(starts)
}

/// Which part of a job's log stands in its directory, as log positions: bytes of records with their headers, and of the heads
/// between them. Empty where there is no record, or no directory. Opens no segment; bytes that are just becoming a record
/// count as one.
pub fn extent(dir: &Path) -> Result<Range<u64>, SysError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut entries = match Dir::open(dir, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(0..0),
        opened => opened.context("open", format_args!("{dir:?}"))?,
    };
    loop {
        let starts = starts(&mut entries)?;
        let (Some(first), Some(last)) = (starts.first(), starts.last()) else {
            return Ok(0..0);
        };
        let name = name(*last);
        match fstatat(&entries, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            // Deleted since: there are newer ones, or none any more.
            Err(Errno::ENOENT) => {}
            stat => {
                let bytes = stat.context("stat", name)?.st_size.unsigned_abs();
                // A head without a record tells nothing new.
                let bytes = if bytes > HEAD_BYTES { bytes } else { 0 };
                return Ok(*first..last + bytes);
            }
        }
    }
}

/// Opens a segment to read; `None` if there is none that starts there.
pub(super) fn read(dir: BorrowedFd<'_>, start: u64) -> Result<Option<OwnedFd>, SysError> {
    match open_in(dir, &name(start), OFlag::O_RDONLY) {
        Err(SysError {
            errno: Errno::ENOENT,
            ..
        }) => Ok(None),
        opened => opened.map(Some),
    }
}

/// Opens (or, with `O_CREAT`, makes with mode 0600) a file of the job's directory.
pub(crate) fn open_in(dir: BorrowedFd<'_>, name: &str, flags: OFlag) -> Result<OwnedFd, SysError> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat(dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).context("open", name)
}
