//! Trees of files as streams: into a container and out of it.
//!
//! One side makes a tar stream of a tree ([`pack`]), the other makes a tree of a tar stream ([`unpack`]).
//! In the container that is a job of `wshd`'s own code, run as the job's user and with nothing more
//! (`wshd::exec`): no program of the root file system has a part in it. On the host it is whoever asks, and a process without rights that unpacks
//! (the engine's `apart`).
//! Each side takes the other for hostile: no name, link, size or change of a tree leads out of the directory
//! that was named, makes a device, or waits for what never comes.
//!
//! Kept: names, permission bits, symlinks, times of files. Not kept: owners (everything belongs to whoever
//! unpacks), set-id bits, hard links (each name becomes a file), extended attributes. Fifos, sockets and
//! devices are passed over with a word.

mod inside;
mod pack;
mod tar;
#[cfg(test)]
mod tests;
mod unpack;

pub(crate) use inside::run;
pub use pack::pack;
pub use unpack::{destination, unpack, unpack_of};

use nix::errno::Errno;
use std::fmt;

/// Directories below one another: more would make a tree hard to remove again, as each level of a walk
/// holds descriptors.
const MAX_DEPTH: usize = 200;

/// A path of the kernel, with its final zero.
const PATH_MAX: usize = 4096;

/// What becomes of symlinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// They stay what they are.
    Keep,
    /// What they point to stands in their place.
    Follow,
}

/// Where a stream's entries go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// Below the directory that is named, under their own names.
    AsGiven,
    /// As `cp -r` does: into the directory that is named, or, if it does not exist, under its name.
    AsCopied,
}

/// What one stream may make at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Files, links, directories, and what is passed over.
    pub entries: u64,
    /// Bits of modes that are kept: all, or without a umask.
    pub modes: u32,
}

impl Limits {
    /// None: where a disk's own limit binds.
    pub const NONE: Self = Self {
        bytes: u64::MAX,
        entries: u64::MAX,
        modes: 0o777,
    };
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Files, links and directories.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Of what was there, so many could not be read as they were; why was told.
    pub damaged: u64,
}

/// Hears what was passed over or could not be read, one line each.
pub type Complain<'a> = &'a mut dyn FnMut(String);

/// Why a copy stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A call was refused.
    Refused {
        /// What was being done: `open`.
        doing: &'static str,
        /// To which path.
        path: Vec<u8>,
        /// Why.
        errno: Errno,
    },
    /// An entry that no tree of ours has: it would lead out, or it is no file, directory or link.
    Entry {
        /// Its path.
        path: Vec<u8>,
        /// Why it is not taken.
        why: &'static str,
    },
    /// The stream could not be read or written.
    Stream(Errno),
    /// What came is no tar stream, or the end of it is missing.
    Malformed(&'static str),
    /// More than [`Limits`] allow; what is counted, and how many may be.
    TooMuch(&'static str, u64),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { doing, path, errno } => {
                write!(f, "cannot {doing} \"{}\": {}", shown(path), errno.desc())
            }
            Self::Entry { path, why } => write!(f, "\"{}\" is refused: {why}", shown(path)),
            Self::Stream(errno) => write!(f, "the stream broke: {}", errno.desc()),
            Self::Malformed(why) => write!(f, "not a whole tar stream: {why}"),
            Self::TooMuch(what, most) => write!(f, "more than {most} {what}"),
        }
    }
}

impl std::error::Error for Fault {}

/// A path as a person may see it: no control character reaches a terminal, and 200 characters are enough.
pub fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}

/// The errno of an I/O error; `EIO` of one that has none.
fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
