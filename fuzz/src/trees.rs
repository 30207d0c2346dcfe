//! Archives, unpacked for real into a directory beside which something lies that must stay as it is.

use container::copy::{Limits, Naming, unpack};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ostler::foreign;

/// Bytes of all files of one archive.
const MOST: u64 = 1 << 20;

/// A directory that is gone afterwards.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "ostler-fuzz-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        assert!(fs::create_dir(&path).is_ok(), "{path:?} cannot be made");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.0);
        assert!(removed.is_ok(), "{:?} stays: {removed:?}", self.0);
    }
}

/// What lies outside: unpacking changes none of it.
fn beside(scratch: &Scratch, unpack: impl FnOnce(&Path)) {
    let root = scratch.path();
    let (home, outside) = (root.join("home"), root.join("outside"));
    let made = fs::create_dir(&home).and_then(|()| fs::write(&outside, "untouched"));
    assert!(made.is_ok());
    unpack(&home);
    assert_eq!(fs::read(&outside).ok().as_deref(), Some(&b"untouched"[..]));
    let names = fs::read_dir(root).into_iter().flatten().flatten();
    assert_eq!(names.count(), 2, "something is beside the directory");
    let linked = fs::metadata(&outside).map(|file| std::os::unix::fs::MetadataExt::nlink(&file));
    assert_eq!(linked.ok(), Some(1), "what is outside was linked");
}

/// A droplet: the bytes are its tar, compressed here, for a checksum that does not match would end it at once.
pub(crate) fn droplet(bytes: &[u8]) {
    let scratch = Scratch::new();
    beside(&scratch, |home| {
        let Ok(archive) = compressed(bytes) else {
            return;
        };
        let _unpacked_or_refused = foreign::droplet(archive, home, MOST);
    });
    // As they are, too.
    let scratch = Scratch::new();
    beside(&scratch, |home| {
        let archive = unnamed().and_then(|mut file| {
            file.write_all(bytes)?;
            file.seek(SeekFrom::Start(0))?;
            Ok(file)
        });
        if let Ok(archive) = archive {
            let _unpacked_or_refused = foreign::droplet(archive, home, MOST);
        }
    });
}

fn compressed(bytes: &[u8]) -> std::io::Result<File> {
    let mut encoder = GzEncoder::new(unnamed()?, Compression::none());
    encoder.write_all(bytes)?;
    let mut file = encoder.finish()?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn unnamed() -> std::io::Result<File> {
    // O_TMPFILE of open(2): it never has a name.
    const O_TMPFILE: i32 = 0o20_200_000;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true).custom_flags(O_TMPFILE);
    options.open(std::env::temp_dir())
}

/// A stream of `ostler cp`.
pub(crate) fn copy(bytes: &[u8]) {
    let limits = Limits {
        bytes: MOST,
        entries: 1000,
        modes: 0o777,
    };
    let scratch = Scratch::new();
    beside(&scratch, |home| {
        let _unpacked_or_refused = unpack(bytes, home, Naming::AsGiven, limits, &mut |_| ());
    });
}
