//! Records of one segment file, read many at a time into one buffer.

use super::{HEADER_BYTES, Header, MAX_PAYLOAD};
use crate::fault::{Context, SysError};
use nix::{errno::Errno, sys::uio::pread};
use std::os::fd::BorrowedFd;

/// Two records of the largest size.
const BUFFER: usize = 2 * (HEADER_BYTES + MAX_PAYLOAD);

/// The piece of a segment that was read last.
#[derive(Debug)]
pub(super) struct Window {
    buffer: Box<[u8]>,
    /// Offset in the file of the first byte.
    from: u64,
    filled: usize,
}

impl Window {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            from: 0,
            filled: 0,
        }
    }

    /// Forgets what was read: the next look is at another file, or must see what is there now.
    pub(super) fn forget(&mut self) {
        self.filled = 0;
    }

    /// Whether a whole record is at this offset of the file. Reads only if the buffer does not know
    /// it.
    pub(super) fn has(&mut self, file: BorrowedFd<'_>, at: u64) -> Result<bool, SysError> {
        if self.get(at).is_some() {
            return Ok(true);
        }
        // Not a whole record when it was read; it may be one now.
        self.from = at;
        self.filled = 0;
        while let Some(rest) = self.buffer.get_mut(self.filled..)
            && !rest.is_empty()
        {
            let offset = i64::try_from(at + self.filled as u64).unwrap_or(i64::MAX);
            match pread(file, rest, offset) {
                Ok(0) => break,
                Ok(read) => self.filled += read,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("pread", "spool segment"),
            }
        }
        Ok(self.get(at).is_some())
    }

    /// The record at this offset, if the buffer has it whole. The writer puts the header in place
    /// after the payload, so a valid header means a valid payload.
    pub(super) fn get(&self, at: u64) -> Option<(Header, &[u8])> {
        let skip = usize::try_from(at.checked_sub(self.from)?).ok()?;
        let bytes = self.buffer.get(..self.filled)?.get(skip..)?;
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::decode(header)?;
        Some((header, rest.get(..header.payload_len())?))
    }
}
