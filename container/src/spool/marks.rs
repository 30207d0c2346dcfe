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
//! A killed process has done a system call wholly or not at all as far as the page cache can tell
//! (these words are in one page), so a plain write before and after each call is enough. A write, and no
//! store to a mapping: where a file system cannot take a changed page any more (XFS after a shutdown,
//! `iomap_page_mkwrite`), that is a SIGBUS (`do_page_mkwrite` in mm/memory.c), and this is an errno.

use super::{Stream, files};
use crate::fault::{Context, SysError};
use nix::{
    fcntl::OFlag,
    sys::uio::{pread, pwrite},
};
use std::{
    cell::Cell,
    fs,
    os::fd::{BorrowedFd, OwnedFd},
};

const MAGIC: u64 = u64::from_le_bytes(*b"OSTLSPL1");

/// How large the file is, so that its block is taken at its beginning.
const BYTES: usize = 4096;

/// What a writer was doing when it was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    Idle,
    /// Moving bytes of this stream behind the last record; whatever stands there is of this stream.
    Moving(Stream),
    /// Throwing bytes of this stream away because they cannot be kept.
    Discarding(Stream),
}

/// The words of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Words {
    magic: u64,
    boot: u64,
    busy: u64,
    stdout: u64,
    stderr: u64,
    uncertain: u64,
}

#[derive(Debug)]
pub(super) struct Marks {
    file: OwnedFd,
    now: Cell<Words>,
    /// What is in the file, as far as that is known.
    kept: Cell<Option<Words>>,
}

impl Marks {
    /// Reads the file, made if need be, and stamps it with this boot. Marks of an earlier boot cannot be
    /// trusted, nor can the log's tail: what is left of them is that output may be missing.
    pub(super) fn open(dir: BorrowedFd<'_>) -> Result<Self, SysError> {
        let file = files::open_in(dir, "state", OFlag::O_RDWR | OFlag::O_CREAT)?;
        let mut found = [0; BYTES];
        let size = pread(&file, &mut found, 0).context("pread", "state")?;
        if size < BYTES {
            pwrite(&file, &found, 0).context("pwrite", "state")?;
        }
        let words = Words::decode(&found);
        let known = words.magic == MAGIC;
        let boot = boot_stamp();
        if known && words.boot == boot {
            return Ok(Self {
                file,
                now: Cell::new(words),
                kept: Cell::new(Some(words)),
            });
        }
        let both = Stream::ALL.into_iter().map(bit).sum();
        let words = Words {
            magic: MAGIC,
            boot,
            uncertain: if known { both } else { words.uncertain },
            ..Words::default()
        };
        pwrite(&file, &words.encode(), 0).context("pwrite", "state")?;
        Ok(Self {
            file,
            now: Cell::new(words),
            kept: Cell::new(Some(words)),
        })
    }

    pub(super) fn set(&self, busy: Busy) {
        self.change(|words| words.busy = word(busy));
    }

    pub(super) fn busy(&self) -> Busy {
        match self.now.get().busy {
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
        match stream {
            Stream::Stdout => self.now.get().stdout,
            Stream::Stderr => self.now.get().stderr,
        }
    }

    /// Nothing is being done any more, and so many bytes have been taken.
    pub(super) fn set_taken(&self, stream: Stream, bytes: u64) {
        self.change(|words| {
            words.busy = word(Busy::Idle);
            match stream {
                Stream::Stdout => words.stdout = bytes,
                Stream::Stderr => words.stderr = bytes,
            }
        });
    }

    /// Whether a hole of unknown size waits for its record.
    pub(super) fn uncertain(&self, stream: Stream) -> bool {
        self.now.get().uncertain & bit(stream) != 0
    }

    pub(super) fn set_uncertain(&self, stream: Stream) {
        self.change(|words| words.uncertain |= bit(stream));
    }

    pub(super) fn clear_uncertain(&self, stream: Stream) {
        self.change(|words| words.uncertain &= !bit(stream));
    }

    /// Changes the words, here and in the file. Where that fails, a successor finds older ones until the next change.
    fn change(&self, change: impl FnOnce(&mut Words)) {
        let mut words = self.now.get();
        change(&mut words);
        self.now.set(words);
        if self.kept.get() != Some(words) {
            let written = pwrite(&self.file, &words.encode(), 0);
            self.kept
                .set((written == Ok(Words::BYTES)).then_some(words));
        }
    }
}

impl Words {
    const BYTES: usize = 48;

    fn encode(&self) -> [u8; Self::BYTES] {
        let words = [
            self.magic,
            self.boot,
            self.busy,
            self.stdout,
            self.stderr,
            self.uncertain,
        ];
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        bytes
    }

    /// Of a file that ends early the rest is 0.
    fn decode(bytes: &[u8; BYTES]) -> Self {
        let mut words = bytes
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word));
        let mut next = || words.next().unwrap_or(0);
        Self {
            magic: next(),
            boot: next(),
            busy: next(),
            stdout: next(),
            stderr: next(),
            uncertain: next(),
        }
    }
}

fn word(busy: Busy) -> u64 {
    match busy {
        Busy::Idle => 0,
        Busy::Moving(stream) => 2 * stream as u64 + 1,
        Busy::Discarding(stream) => 2 * stream as u64 + 2,
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
