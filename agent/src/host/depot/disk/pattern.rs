//! What `mkfs` wrote into images, kept: the next image of the same size is made by writing the same, which takes a fraction
//! of the time that a program takes.
//!
//! The file systems then have the same UUID. Nothing here goes by it: an image is known by its file.

use nix::unistd::{Whence, lseek};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// As many are kept, the newest. Hosts have few sizes of instances.
const KEPT: usize = 16;

/// The largest that is kept, in bytes. One of 1 GiB with 65,536 inodes has some 150 KiB.
const LARGEST: u64 = 4 << 20;

/// Bytes and inodes.
pub(super) type Kind = (u64, u64);

/// Where there is data, and what.
type Pattern = Vec<(u64, Vec<u8>)>;

/// The newest first.
type Known = VecDeque<(Kind, Arc<Pattern>)>;

/// Those that are known. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Patterns(Arc<Mutex<Known>>);

impl Patterns {
    /// Writes the pattern of this kind into `image`, a hole of the right size; whether there is one.
    ///
    /// # Errors
    /// As pwrite(2) and fdatasync(2).
    pub(super) fn write(&self, kind: Kind, image: &File) -> io::Result<bool> {
        let Some(pattern) = self.find(kind) else {
            return Ok(false);
        };
        for (offset, bytes) in pattern.iter() {
            image.write_all_at(bytes, *offset)?;
        }
        // At once: the loop device reads past the page cache, and would wait for each piece.
        image.sync_data()?;
        Ok(true)
    }

    /// Keeps what a fresh image holds, unless that is known or too much.
    ///
    /// # Errors
    /// As lseek(2) and pread(2).
    pub(super) fn learn(&self, kind: Kind, image: &File) -> io::Result<()> {
        if self.find(kind).is_some() {
            return Ok(());
        }
        let Some(pattern) = read(image)? else {
            return Ok(());
        };
        let mut known = self.known();
        known.push_front((kind, Arc::new(pattern)));
        known.truncate(KEPT);
        Ok(())
    }

    fn find(&self, kind: Kind) -> Option<Arc<Pattern>> {
        let known = self.known();
        let mut found = known.iter().filter(|(of, _)| *of == kind);
        found.next().map(|(_, pattern)| Arc::clone(pattern))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All data of a file; `None` if that is too much.
fn read(image: &File) -> io::Result<Option<Pattern>> {
    let (mut pattern, mut offset, mut left) = (Pattern::new(), 0, LARGEST);
    loop {
        let begin = match lseek(image.as_fd(), offset, Whence::SeekData) {
            // There is none any more.
            Err(nix::errno::Errno::ENXIO) => return Ok(Some(pattern)),
            other => other?,
        };
        offset = lseek(image.as_fd(), begin, Whence::SeekHole)?;
        let length = u64::try_from(offset - begin).unwrap_or(u64::MAX);
        let (Some(rest), Ok(size)) = (left.checked_sub(length), usize::try_from(length)) else {
            return Ok(None);
        };
        left = rest;
        let mut bytes = vec![0; size];
        let begin = u64::try_from(begin).unwrap_or_default();
        image.read_exact_at(&mut bytes, begin)?;
        pattern.push((begin, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::{KEPT, LARGEST, Patterns};
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn hole(size: u64) -> File {
        let path = std::env::temp_dir().join(format!("ostler-pattern-{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        std::fs::remove_file(path).unwrap();
        let file = file.unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn an_image_is_made_after_another_one_as_sparse_as_that() {
        let (patterns, size) = (Patterns::default(), 64 << 20);
        let first = hole(size);
        assert!(!patterns.write((7, 8), &first).unwrap());
        for (at, text) in [(0, "begin"), (32 << 20, "middle"), (size - 3, "end")] {
            first.write_all_at(text.as_bytes(), at).unwrap();
        }
        patterns.learn((7, 8), &first).unwrap();
        let second = hole(size);
        assert!(!patterns.write((7, 9), &second).unwrap(), "another kind");
        assert!(patterns.write((7, 8), &second).unwrap());
        let mut all = [vec![0; 1 << 20], vec![0; 1 << 20]];
        for at in (0..size).step_by(1 << 20) {
            for (file, bytes) in [&first, &second].into_iter().zip(&mut all) {
                file.read_exact_at(bytes, at).unwrap();
            }
            assert!(all[0] == all[1], "{at}");
        }
        let blocks = second.metadata().unwrap().blocks();
        assert!(blocks <= first.metadata().unwrap().blocks(), "{blocks}");
    }

    #[test]
    fn what_is_kept_has_an_end() {
        let patterns = Patterns::default();
        let large = hole(LARGEST + 4096);
        let bytes = vec![1; usize::try_from(LARGEST + 1).unwrap()];
        large.write_all_at(&bytes, 0).unwrap();
        patterns.learn((0, 0), &large).unwrap();
        assert!(!patterns.write((0, 0), &large).unwrap(), "too large");
        let (small, kept) = (hole(4096), u64::try_from(KEPT).unwrap());
        for number in 1..=kept + 1 {
            patterns.learn((number, 0), &small).unwrap();
        }
        assert!(!patterns.write((1, 0), &small).unwrap(), "the oldest");
        assert!(patterns.write((2, 0), &small).unwrap());
    }
}
