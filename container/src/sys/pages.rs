//! Numbers in a file that survive the process that wrote them.

use crate::fault::{Context, SysError};
use nix::sys::{
    mman::{MapFlags, ProtFlags, mmap},
    stat::fstat,
    uio::pwrite,
};
use std::{
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

/// Numbers in a [`SharedPage`].
pub const WORDS: usize = 512;

const BYTES: NonZeroUsize = NonZeroUsize::new(WORDS * 8).unwrap();

/// The first 4096 bytes of a file, mapped shared and writable until the process ends. A store costs
/// no system call, and is in the page cache (so in the file, for whoever maps it next) at once: it
/// outlives a SIGKILL, though not the host.
#[derive(Debug)]
pub struct SharedPage {
    words: &'static [AtomicU64; WORDS],
}

impl SharedPage {
    /// Maps `file`, which must be open for reading and writing, after it was given 4096 bytes if it
    /// had fewer.
    pub fn map(file: BorrowedFd<'_>) -> Result<Self, SysError> {
        let size = fstat(file).context("fstat", "shared page")?.st_size;
        if size < i64::try_from(BYTES.get()).unwrap_or(i64::MAX) {
            // Written, not truncated to length: the blocks are taken now, not by a store later
            // (SIGBUS).
            pwrite(file, &[0; BYTES.get()], 0).context("pwrite", "shared page")?;
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: mmap(2) without MAP_FIXED takes an address that nothing else uses.
        let address = unsafe { mmap(None, BYTES, access, MapFlags::MAP_SHARED, file.as_fd(), 0) }
            .context("mmap", "shared page")?;
        let words: NonNull<[AtomicU64; WORDS]> = address.cast();
        // SAFETY: the mapping is 4096 bytes, page-aligned, readable and writable, is never unmapped
        // (so `'static` holds), lies within the file, and is only ever reached through atomics.
        let words = unsafe { words.as_ref() };
        Ok(Self { words })
    }

    /// The numbers.
    #[must_use]
    pub fn words(&self) -> &'static [AtomicU64; WORDS] {
        self.words
    }
}
