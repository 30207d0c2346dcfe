//! How much output of all instances stands on disk and waits for the bus.
//!
//! Counted where it stands: what the pumps know in memory ends where they have read, and they read no further than the
//! bus takes. It costs a few calls per instance and reads no output, but where some is given up.

use super::instance::JOB;
use super::output::CursorFile;
use super::record::Records;
use crate::host::blocking;
use crate::host::depot::Directory;
use container::spool::{self, SpoolReader, Stream};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tracing::warn;

/// How long what was counted is told again: whoever asks, and however often, a walk per second is the most.
const FRESH: Duration = Duration::from_secs(1);

/// Counts it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Depth {
    base: PathBuf,
    records: Records,
    /// What was counted last, and when; locked by whoever is at it.
    last: Arc<Mutex<Option<(Instant, u64)>>>,
}

impl Depth {
    /// Of the instances that have a record, and containers below `base`.
    #[must_use]
    pub fn of(records: Records, base: &Path) -> Self {
        Self {
            base: base.to_owned(),
            records,
            last: Arc::default(),
        }
    }

    /// Bytes of output that the bus has not confirmed, with the headers of their records: what they take of the disk. What was
    /// deleted from a full spool is none of them. `None` if they cannot be counted, or not within `patience`.
    ///
    /// One walk is made at a time, and goes on when nobody waits for it any more: a disk that hangs costs one thread,
    /// however often it is asked for.
    pub async fn bytes(&self, patience: Duration) -> Option<u64> {
        timeout(patience, self.count()).await.ok().flatten()
    }

    /// Bytes of the output of one instance that the bus has not confirmed, those included that its spool had no room for. `None`
    /// if they cannot be counted, or not within `patience`.
    pub async fn of_one(&self, handle: &str, patience: Duration) -> Option<u64> {
        let (cursor, job) = (self.records.cursor(handle), self.job(handle));
        let counted = blocking(move || unconfirmed(&cursor, &job));
        match timeout(patience, counted).await.ok()? {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                warn!(handle, %error, "the output that waits for the bus is not counted");
                None
            }
        }
    }

    fn job(&self, handle: &str) -> PathBuf {
        Directory::below(&self.base, handle).job(JOB)
    }

    async fn count(&self) -> Option<u64> {
        let mut last = Arc::clone(&self.last).lock_owned().await;
        if let Some((then, bytes)) = *last
            && then.elapsed() < FRESH
        {
            return Some(bytes);
        }
        let (records, base) = (self.records.clone(), self.base.clone());
        let counted = blocking(move || {
            let counted = walk(&records, &base);
            *last = { counted.as_ref().ok() }.map(|bytes| (Instant::now(), *bytes));
            counted
        });
        let counted = counted.await;
        if let Err(error) = &counted {
            warn!(%error, "the output that waits for the bus is not counted");
        }
        counted.ok()
    }
}

/// Instances may come and go meanwhile: of what is not there, nothing waits. Blocks.
fn walk(records: &Records, base: &Path) -> io::Result<u64> {
    let mut all = 0;
    for handle in records.handles()? {
        // Before its spool: an instance that goes loses that first, and without a cursor all of it would seem to wait.
        let confirmed = CursorFile::kept(&records.cursor(&handle))?.position;
        let job = Directory::below(base, &handle).job(JOB);
        let spool = spool::extent(&job).map_err(io::Error::other)?;
        all += spool.end.saturating_sub(confirmed.max(spool.start));
    }
    Ok(all)
}

/// Reads it to its end. Blocks.
fn unconfirmed(cursor: &Path, job: &Path) -> io::Result<u64> {
    if !job.try_exists()? {
        return Ok(0);
    }
    let confirmed = CursorFile::kept(cursor)?;
    let mut reader = SpoolReader::open(job, confirmed).map_err(io::Error::other)?;
    let mut end = confirmed;
    while let Some((_, next)) = reader.next().map_err(io::Error::other)? {
        end = next;
    }
    let of = |stream| end.offset(stream).saturating_sub(confirmed.offset(stream));
    Ok(of(Stream::Stdout) + of(Stream::Stderr))
}

#[cfg(test)]
mod tests {
    use super::{Depth, walk};
    use crate::host::depot::Directory;
    use crate::instances::instance::JOB;
    use crate::instances::output::{JobView, write_kept};
    use crate::instances::record::Records;
    use container::spool::{Cursor, MIN_CAP, SpoolReader, SpoolWriter, Stream};
    use nix::sys::stat::Mode;
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    /// A base directory that goes with the test.
    struct Base(PathBuf);

    impl Base {
        fn new(name: &str) -> (Self, Records) {
            let base =
                std::env::temp_dir().join(format!("ostler-depth-{name}-{}", std::process::id()));
            let records = Records::open(&base).unwrap();
            (Self(base), records)
        }

        fn job(&self, handle: &str) -> PathBuf {
            Directory::below(&self.0, handle).job(JOB)
        }

        /// A spool with nothing in it, and a record.
        fn spool(&self, records: &Records, handle: &str) -> SpoolWriter {
            let job = self.job(handle);
            fs::create_dir_all(&job).unwrap();
            fs::create_dir(records.dir(handle)).unwrap();
            SpoolWriter::open(&job, MIN_CAP).unwrap()
        }
    }

    impl Drop for Base {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// The job prints so many bytes, at most as many as a pipe holds.
    fn print(spool: &mut SpoolWriter, bytes: usize) {
        let (from, mut to) = std::io::pipe().unwrap();
        to.write_all(&vec![b'x'; bytes]).unwrap();
        let taken = spool.take(Stream::Stdout, from.as_fd(), bytes).unwrap();
        assert_eq!(taken, bytes);
    }

    fn keep(records: &Records, handle: &str, cursor: Cursor) {
        let text = write_kept(cursor, &JobView::default());
        fs::write(records.cursor(handle), text).unwrap();
    }

    /// The cursor after so many records.
    fn after(job: &Path, count: usize) -> Cursor {
        let mut reader = SpoolReader::open(job, Cursor::default()).unwrap();
        let mut cursor = Cursor::default();
        for _ in 0..count {
            cursor = reader.next().unwrap().unwrap().1;
        }
        cursor
    }

    #[test]
    fn what_waits_is_what_stands_behind_the_cursors() {
        let (base, records) = Base::new("waits");
        let count = || walk(&records, &base.0).unwrap();
        assert_eq!(count(), 0, "no instance");
        let [one, two] = ["00000000001", "00000000002"];
        let mut first = base.spool(&records, one);
        assert_eq!(count(), 0, "a head is no output");
        print(&mut first, 1000);
        print(&mut first, 500);
        assert_eq!(count(), 96 + 32 + 1000 + 32 + 500, "nothing is confirmed");
        keep(&records, one, after(&base.job(one), 1));
        assert_eq!(count(), 32 + 500);
        print(&mut base.spool(&records, two), 7);
        assert_eq!(count(), 32 + 500 + 96 + 32 + 7);
        keep(&records, one, after(&base.job(one), 2));
        keep(&records, two, after(&base.job(two), 1));
        assert_eq!(count(), 0);
        // A cursor of nobody's, one that is torn, and an instance whose container is gone, or not there yet.
        let far = Cursor {
            position: u64::MAX,
            ..Cursor::default()
        };
        keep(&records, one, far);
        assert_eq!(count(), 0);
        fs::write(records.cursor(two), "nonsense").unwrap();
        assert_eq!(count(), 96 + 32 + 7);
        fs::remove_dir_all(Directory::below(&base.0, two).path).unwrap();
        fs::create_dir(records.dir("00000000003")).unwrap();
        fs::create_dir(records.dir("no handle")).unwrap();
        assert_eq!(count(), 0);
    }

    #[test]
    fn what_a_full_spool_lost_waits_no_more() {
        let (base, records) = Base::new("full");
        let handle = "00000000001";
        let mut spool = base.spool(&records, handle);
        for _ in 0..80 {
            print(&mut spool, 50_000);
        }
        let entries = fs::read_dir(base.job(handle)).unwrap();
        let stands: u64 = { entries.map(Result::unwrap) }
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("spool."))
            .map(|entry| entry.metadata().unwrap().len())
            .sum();
        assert!((500_000..=MIN_CAP).contains(&stands), "{stands}");
        assert_eq!(walk(&records, &base.0).unwrap(), stands);
        let behind = Cursor {
            position: 50_032 + 96,
            ..Cursor::default()
        };
        keep(&records, handle, behind);
        assert_eq!(walk(&records, &base.0).unwrap(), stands);
    }

    #[tokio::test]
    async fn of_what_is_given_up_each_byte_is_counted_and_nothing_else() {
        let (base, records) = Base::new("given-up");
        let handle = "00000000001";
        let depth = Depth::of(records.clone(), &base.0);
        let count = || depth.of_one(handle, Duration::from_secs(30));
        assert_eq!(count().await, Some(0), "no spool");
        let mut spool = base.spool(&records, handle);
        for _ in 0..80 {
            print(&mut spool, 50_000);
        }
        assert_eq!(count().await, Some(80 * 50_000), "what it lost, too");
        let confirmed = after(&base.job(handle), 5);
        keep(&records, handle, confirmed);
        let left = 80 * 50_000 - confirmed.stdout;
        assert_eq!(count().await, Some(left));
        let far = Cursor {
            position: u64::MAX,
            ..Cursor::default()
        };
        keep(&records, handle, far);
        assert_eq!(count().await, None, "of another spool");
    }

    /// Threads of this process.
    fn threads() -> usize {
        fs::read_dir("/proc/self/task").unwrap().count()
    }

    #[tokio::test]
    async fn a_disk_that_hangs_costs_one_thread_and_nobody_waits_for_it() {
        let (base, records) = Base::new("hangs");
        let handle = "00000000001";
        print(&mut base.spool(&records, handle), 10);
        // Whoever opens it waits until somebody writes.
        let cursor = records.cursor(handle);
        nix::unistd::mkfifo(&cursor, Mode::S_IRWXU).unwrap();
        let depth = Depth::of(records.clone(), &base.0);
        let short = Duration::from_millis(20);
        assert_eq!(depth.bytes(short).await, None);
        let before = threads();
        for _ in 0..10 {
            assert_eq!(depth.bytes(short).await, None);
        }
        let after = threads();
        drop(File::options().write(true).open(&cursor).unwrap());
        fs::remove_file(&cursor).unwrap();
        assert!(after < before + 5, "{before} threads, then {after}");
        // A pipe is no cursor, and what a walk ends at is not told.
        let told = depth.bytes(Duration::from_secs(30)).await;
        assert_eq!(told, Some(96 + 32 + 10));
    }
}
