//! What a writer must leave to its successor beside the log itself: the file `state`.
//!
//! ```text
//! word 0  "OSTLSPL1"
//!      1  FNV-1a of the boot id under which the rest was written
//!      2  what is being done at this instant: 0, or 2 * stream + 1 (moving) or + 2 (discarding)
//!      3  bytes of stdout taken from its pipe, if larger than what the log accounts for
//!      4  the same of stderr
//!      5  whose hole of unknown size has no record yet: 1 stdout, 2 stderr, 3 both
//! ```
//!
//! A killed process has done a system call wholly or not at all as far as the page cache can tell,
//! so plain stores before and after each call are enough.

use super::{Stream, files};
use crate::{fault::SysError, sys::pages::SharedPage};
use nix::fcntl::OFlag;
use std::{
    fs,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

const MAGIC: u64 = u64::from_le_bytes(*b"OSTLSPL1");

/// What a writer was doing when it was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    Idle,
    /// Moving bytes of this stream behind the last record.
    Moving(Stream),
    /// Throwing bytes of this stream away because the disk is full.
    Discarding(Stream),
}

#[derive(Debug)]
pub(super) struct Marks {
    boot: &'static AtomicU64,
    busy: &'static AtomicU64,
    stdout: &'static AtomicU64,
    stderr: &'static AtomicU64,
    uncertain: &'static AtomicU64,
}

impl Marks {
    /// Maps the file, made if need be, and stamps it with this boot. Marks of an earlier boot cannot be
    /// trusted, nor can the log's tail: what is left of them is that output may be missing.
    pub(super) fn open(dir: BorrowedFd<'_>) -> Result<Self, SysError> {
        let file = files::open_in(dir, "state", OFlag::O_RDWR | OFlag::O_CREAT)?;
        let page = SharedPage::map(file.as_fd())?;
        let [magic, boot, busy, stdout, stderr, uncertain, ..] = page.words();
        let marks = Self {
            boot,
            busy,
            stdout,
            stderr,
            uncertain,
        };
        let known = magic.load(Ordering::Acquire) == MAGIC;
        let now = boot_stamp();
        if known && marks.boot.load(Ordering::Acquire) == now {
            return Ok(marks);
        }
        for stream in Stream::ALL {
            // Before the stamp: a writer that is killed in between has not forgotten it.
            if known {
                marks.set_uncertain(stream);
            }
            marks.set_taken(stream, 0);
        }
        marks.set(Busy::Idle);
        marks.boot.store(now, Ordering::Release);
        magic.store(MAGIC, Ordering::Release);
        Ok(marks)
    }

    pub(super) fn set(&self, busy: Busy) {
        let word = match busy {
            Busy::Idle => 0,
            Busy::Moving(stream) => 2 * stream as u64 + 1,
            Busy::Discarding(stream) => 2 * stream as u64 + 2,
        };
        self.busy.store(word, Ordering::Release);
    }

    pub(super) fn busy(&self) -> Busy {
        match self.busy.load(Ordering::Acquire) {
            1 => Busy::Moving(Stream::Stdout),
            2 => Busy::Discarding(Stream::Stdout),
            3 => Busy::Moving(Stream::Stderr),
            4 => Busy::Discarding(Stream::Stderr),
            _ => Busy::Idle,
        }
    }

    /// Bytes of a stream taken from its pipe; only of use where larger than what the log accounts
    /// for.
    pub(super) fn taken(&self, stream: Stream) -> u64 {
        self.taken_word(stream).load(Ordering::Acquire)
    }

    pub(super) fn set_taken(&self, stream: Stream, bytes: u64) {
        self.taken_word(stream).store(bytes, Ordering::Release);
    }

    /// Whether a hole of unknown size waits for its record.
    pub(super) fn uncertain(&self, stream: Stream) -> bool {
        self.uncertain.load(Ordering::Acquire) & bit(stream) != 0
    }

    pub(super) fn set_uncertain(&self, stream: Stream) {
        self.uncertain.fetch_or(bit(stream), Ordering::AcqRel);
    }

    pub(super) fn clear_uncertain(&self, stream: Stream) {
        self.uncertain.fetch_and(!bit(stream), Ordering::AcqRel);
    }

    fn taken_word(&self, stream: Stream) -> &AtomicU64 {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }
}

fn bit(stream: Stream) -> u64 {
    1 << stream as u64
}

/// A number that is the same until the host restarts, proc_sys_kernel(5) `random/boot_id`.
fn boot_stamp() -> u64 {
    let id = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
