//! A job's output on disk: an append-only log with one writer and any number of readers.
//!
//! ```text
//! <jobdir>/spool.0000000000000000      segment, named by the log position of its first byte
//! <jobdir>/spool.00000000001ffe31      the next: 0x1ffe31 bytes of log came before it
//! <jobdir>/next                        a segment until its head is whole, then renamed
//! <jobdir>/state                       what must outlive a killed writer (see `marks`)
//!
//! segment = head record, then records
//! record  = header (32 bytes), payload (`len` bytes)
//!
//! header, little-endian
//!   0  "OS"     4  len: u32        8  offset: u64      16 time_ns: u64     24 aux: u32    28 check: u32
//!   2  kind        payload bytes      of the stream       CLOCK_REALTIME      per kind       FNV-1a of
//!   3  stream                                                                                bytes 0..28
//! ```
//!
//! The writer moves an app's bytes from its pipe into the segment with `splice(2)`: the kernel
//! takes from the pipe exactly what it put into the file, so a writer killed at any instruction has
//! lost nothing and repeated nothing: its successor finds the bytes behind the last record, and in
//! `state` whose they are. The header is written last and commits the record, so a reader sees
//! whole records or none.
//!
//! Readers hold no lock and are unknown to the writer. Old segments are deleted when the log is
//! larger than its cap; every segment's head names the offsets of both streams, so a reader that
//! was left behind can say exactly what it missed. The exit status rides along in every later head
//! and cannot be lost.

mod codec;
mod files;
mod marks;
mod newest;
mod reader;
mod tail;
mod window;
mod writer;

use crate::status::Status;
use std::{fmt, num::ParseIntError, str::FromStr};

pub(crate) use codec::{HEADER_BYTES, Header, Kind, decode, encode, take_u64};
pub use files::extent;
pub(crate) use files::{open_dir, open_in};
pub use reader::SpoolReader;
pub use tail::Tail;
pub use writer::SpoolWriter;

/// Most bytes of output in one record: 63 KiB. With its header it stays below 64 KiB, so the record
/// is moved in one piece from a pipe of the default size, and fits a bus message with its headers.
pub const MAX_PAYLOAD: usize = 63 * 1024;

/// How large a spool grows unless told otherwise: 16 MiB.
pub const DEFAULT_CAP: u64 = 16 << 20;

/// Smallest segment: 256 KiB, so that a small cap does not become a file per few records.
pub const MIN_SEGMENT: u64 = 256 << 10;

/// Smallest spool: 1 MiB, so that most of it is kept when a segment goes.
pub const MIN_CAP: u64 = 4 * MIN_SEGMENT;

/// One of the two streams of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl Stream {
    /// Both, in the order of their descriptors.
    pub const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

/// One event of a job, in the order in which the supervisor saw them. `B` holds an output's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<B = Vec<u8>> {
    /// The job's program was executed.
    Started,
    /// Bytes that the job wrote.
    Output {
        /// Where to.
        stream: Stream,
        /// Bytes of this stream before these, since the job began.
        offset: u64,
        /// When they were taken from the pipe, in ns since 1970.
        time_ns: u64,
        /// At most [`MAX_PAYLOAD`]; they end with a line where that was possible.
        bytes: B,
    },
    /// Bytes of a stream that cannot be had any more.
    Gap {
        /// Whose.
        stream: Stream,
        /// Bytes of this stream before the gap.
        offset: u64,
        /// How many are missing; when not `certain`, how many are known to be.
        bytes: u64,
        /// False if more than `bytes` may be missing.
        certain: bool,
    },
    /// The job's first process ended. Others may still hold the streams open, so output can follow.
    Exit {
        /// How: never [`Status::Started`].
        status: Status,
        /// When the supervisor learned it, in ns since 1970.
        time_ns: u64,
        /// Bytes of stdout that the job wrote before it ended.
        stdout: u64,
        /// Bytes of stderr that the job wrote before it ended.
        stderr: u64,
    },
    /// Both streams are closed: nothing follows. Without an `Exit` before it the container's init
    /// died, or the job never began.
    End {
        /// All bytes of stdout.
        stdout: u64,
        /// All bytes of stderr.
        stderr: u64,
    },
}

impl Record<&[u8]> {
    /// The same record with bytes of its own.
    #[must_use]
    pub fn into_owned(self) -> Record {
        self.map(<[u8]>::to_vec)
    }
}

impl Record {
    /// The same record, lending its bytes.
    #[must_use]
    pub fn as_slice(&self) -> Record<&[u8]> {
        match self {
            Self::Output {
                stream,
                offset,
                time_ns,
                bytes,
            } => Record::Output {
                stream: *stream,
                offset: *offset,
                time_ns: *time_ns,
                bytes,
            },
            Self::Started | Self::Gap { .. } | Self::Exit { .. } | Self::End { .. } => {
                self.clone().map(|_| [].as_slice())
            }
        }
    }
}

impl<B> Record<B> {
    fn map<C>(self, bytes_of: impl FnOnce(B) -> C) -> Record<C> {
        match self {
            Self::Started => Record::Started,
            Self::Output {
                stream,
                offset,
                time_ns,
                bytes,
            } => Record::Output {
                stream,
                offset,
                time_ns,
                bytes: bytes_of(bytes),
            },
            Self::Gap {
                stream,
                offset,
                bytes,
                certain,
            } => Record::Gap {
                stream,
                offset,
                bytes,
                certain,
            },
            Self::Exit {
                status,
                time_ns,
                stdout,
                stderr,
            } => Record::Exit {
                status,
                time_ns,
                stdout,
                stderr,
            },
            Self::End { stdout, stderr } => Record::End { stdout, stderr },
        }
    }
}

/// How far a reader has come: a place in the log and the streams' offsets there. As text
/// `position:stdout:stderr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    /// Log position of the next record.
    pub position: u64,
    /// Offset of the next byte of stdout.
    pub stdout: u64,
    /// Offset of the next byte of stderr.
    pub stderr: u64,
}

impl Cursor {
    /// The offset of one stream.
    #[must_use]
    pub fn offset(&self, stream: Stream) -> u64 {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }

    pub(crate) fn set_offset(&mut self, stream: Stream, offset: u64) {
        match stream {
            Stream::Stdout => self.stdout = offset,
            Stream::Stderr => self.stderr = offset,
        }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.position, self.stdout, self.stderr)
    }
}

/// Text that is no [`Cursor`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CursorError;

impl fmt::Display for CursorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a cursor is three numbers, \"position:stdout:stderr\", as printed by iomux-link",
        )
    }
}

impl std::error::Error for CursorError {}

impl From<ParseIntError> for CursorError {
    fn from(_: ParseIntError) -> Self {
        Self
    }
}

impl FromStr for Cursor {
    type Err = CursorError;

    fn from_str(text: &str) -> Result<Self, CursorError> {
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().ok_or(CursorError);
        Ok(Self {
            position: part()?.parse()?,
            stdout: part()?.parse()?,
            stderr: part()?.parse()?,
        })
    }
}
