//! What is written to the disk, by threads that a disk which hangs may hold: nobody else waits for it longer than he likes.
//!
//! A call that waits in the kernel cannot be given up, only left behind. So each thing has one [`Scribe`], with one write
//! under way and the newest of what came since behind it: of a disk that hangs it holds one thread, and nothing old
//! overtakes what is newer.

use super::blocking;
use nix::libc;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fmt, fs, io};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{Instrument, error, info, warn};

/// Writes that are under way at once: a quarter of tokio's blocking threads. A disk that hangs must not hold every thread
/// that may block.
const TURNS: usize = 128;

/// How long one write may take until the disk is called late. It takes milliseconds. No record is given up before, and others are
/// asked from then on what the disk would have told.
const LATE: Duration = Duration::from_secs(2);

/// Between two looks whether the disk answers.
const LOOK: Duration = Duration::from_secs(5);

/// What may be said of something that is not written in time.
pub const UNANSWERED: &str = "the disk of the base directory does not answer";

/// What is said of a disk that answers, and writes nothing.
const REFUSED: &str = "the disk of the base directory refuses what is written to it";

/// The writers of records and cursors, and what is known from them of the disk. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Scribes {
    turns: Arc<Semaphore>,
    /// The writes that are late: when each was begun, and its number.
    late: Arc<watch::Sender<BTreeSet<(Instant, u64)>>>,
    /// Of the last look.
    refuses: Arc<AtomicBool>,
}

impl Default for Scribes {
    fn default() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(TURNS)),
            late: Arc::new(watch::Sender::new(BTreeSet::new())),
            refuses: Arc::default(),
        }
    }
}

impl Scribes {
    /// One that writes by `write`, which may block.
    pub fn scribe<T: Send + 'static>(
        &self,
        write: impl Fn(T) -> Result<(), String> + Send + Sync + 'static,
    ) -> Scribe<T> {
        Scribe {
            desk: Arc::new(Desk {
                scribes: self.clone(),
                write: Box::new(write),
                next: Mutex::new(Next {
                    number: 0,
                    what: None,
                    busy: false,
                }),
                written: watch::Sender::new(Written {
                    number: 0,
                    outcome: Ok(()),
                }),
            }),
            late: false,
        }
    }

    async fn watched<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let begun = Instant::now();
        let mut work = std::pin::pin!(blocking(work));
        if let Ok(done) = timeout(LATE, &mut work).await {
            return done;
        }
        let _overdue = Overdue::since(begun, &self.late);
        work.await
    }

    /// Waits until all is written that has been given.
    pub async fn rest(&self) {
        drop(self.all_turns().await);
    }

    /// The same, and nothing is written any more: who still gives something gets no word.
    pub async fn close(&self) {
        if let Some(turns) = self.all_turns().await {
            turns.forget();
        }
    }

    /// Turns come in the order in which they are asked for.
    async fn all_turns(&self) -> Option<SemaphorePermit<'_>> {
        let all = u32::try_from(TURNS).unwrap_or(u32::MAX);
        self.turns.acquire_many(all).await.ok()
    }

    /// Whether the disk is late, now and whenever that changes.
    #[must_use]
    pub fn lateness(&self) -> Lateness {
        Lateness(self.late.subscribe())
    }

    /// Finds out again and again whether a file is still written to the disk, for nobody else may be writing.
    pub async fn look_after(self, file: PathBuf) {
        loop {
            let path = file.clone();
            let looked = self.watched(move || touch(&path)).await;
            self.heard(looked);
            sleep(LOOK).await;
        }
    }

    /// Whether the last look was refused, as everything is on a file system that became read-only. A full one mostly takes it:
    /// there is room for what it overwrites.
    #[must_use]
    pub fn refuses(&self) -> bool {
        self.refuses.load(Ordering::Relaxed)
    }

    /// Says it once, however many looks find the same.
    fn heard(&self, looked: io::Result<()>) {
        // It says nothing of the disk that somebody removed the file, or that there is no descriptor or no memory.
        let beside = [libc::ENOENT, libc::EMFILE, libc::ENFILE, libc::ENOMEM].map(Some);
        if looked
            .as_ref()
            .is_err_and(|error| beside.contains(&error.raw_os_error()))
        {
            return;
        }
        let refused = self.refuses.swap(looked.is_err(), Ordering::Relaxed);
        match looked {
            Err(error) if !refused => {
                error!(%error, "{REFUSED}: no start can be recorded, so none is asked for, and apps run on; no restart of the agent mends it");
            }
            Ok(()) if refused => info!("the disk takes what is written again"),
            Ok(()) | Err(_) => {}
        }
    }
}

/// Blocks.
fn touch(file: &Path) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(file)?;
    io::Write::write_all(&mut file, b"\n")?;
    file.sync_data()
}

/// Whether the disk is late.
#[derive(Debug, Clone)]
pub struct Lateness(watch::Receiver<BTreeSet<(Instant, u64)>>);

impl Lateness {
    /// For how long it has been; nothing where it is not.
    #[must_use]
    pub fn time(&self) -> Duration {
        let oldest = self.0.borrow().first().map(|(begun, _)| begun.elapsed());
        oldest.unwrap_or_default()
    }

    /// Resolves while it is.
    pub async fn begins(&mut self) {
        self.until(|late| !late.is_empty()).await;
    }

    /// Resolves when what is late now is written.
    pub async fn passes(&mut self) {
        let newest = self.0.borrow().last().copied();
        self.until(|late| late.first().copied() > newest || late.is_empty())
            .await;
    }

    /// Resolves when one and the same write has taken so long.
    pub async fn lasts(mut self, time: Duration) {
        loop {
            self.begins().await;
            let Some(oldest) = self.0.borrow().first().copied() else {
                continue;
            };
            tokio::select! {
                () = sleep_until(oldest.0 + time) => return,
                () = self.until(|late| !late.contains(&oldest)) => {}
            }
        }
    }

    /// The same, but not before so much time has passed from now on.
    pub async fn hangs(self, time: Duration) {
        sleep(time).await;
        self.lasts(time).await;
    }

    async fn until(&mut self, so: impl FnMut(&BTreeSet<(Instant, u64)>) -> bool) {
        let known = self.0.wait_for(so).await.is_ok();
        if !known {
            // The runtime is shutting down.
            std::future::pending().await
        }
    }
}

/// One write that is late, until this is dropped.
struct Overdue<'a> {
    this: (Instant, u64),
    late: &'a watch::Sender<BTreeSet<(Instant, u64)>>,
}

impl<'a> Overdue<'a> {
    fn since(begun: Instant, late: &'a watch::Sender<BTreeSet<(Instant, u64)>>) -> Self {
        let mut this = (begun, 0);
        late.send_modify(|late| {
            if late.is_empty() {
                warn!("{UNANSWERED}: what has to be written waits, and apps run on; no restart of the agent mends it");
            }
            while !late.insert(this) {
                this.1 += 1;
            }
        });
        Self { this, late }
    }
}

impl Drop for Overdue<'_> {
    fn drop(&mut self) {
        self.late.send_modify(|late| {
            late.remove(&self.this);
            if late.is_empty() {
                info!("the disk answers again");
            }
        });
    }
}

/// Writes one thing again and again; of what waits for its turn only the newest.
pub struct Scribe<T> {
    desk: Arc<Desk<T>>,
    /// What was given last is not written, as far as its giver knows.
    late: bool,
}

impl<T> fmt::Debug for Scribe<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scribe")
            .field("late", &self.late)
            .finish_non_exhaustive()
    }
}

struct Desk<T> {
    scribes: Scribes,
    write: Box<dyn Fn(T) -> Result<(), String> + Send + Sync>,
    next: Mutex<Next<T>>,
    written: watch::Sender<Written>,
}

struct Next<T> {
    /// Of what was given last.
    number: u64,
    /// That, unless it is being written or is written.
    what: Option<T>,
    /// Somebody writes.
    busy: bool,
}

/// What became of the newest that was tried.
#[derive(Debug, Clone)]
struct Written {
    number: u64,
    outcome: Result<(), String>,
}

impl<T: Send + 'static> Scribe<T> {
    /// Writes `what`, and what has been given before is not written any more if it was not begun. What became of it, or
    /// `None` where that is not known within `patience`, and the disk is late: it is written as soon as the disk takes
    /// it, see [`Self::landed`]. A disk that is only busy is waited for.
    pub async fn write(&mut self, what: T, patience: Duration) -> Option<Result<(), String>> {
        let number = self.desk.give(what);
        // Also where whoever waits here is given up.
        self.late = true;
        let mut disk = self.desk.scribes.lateness();
        let given_up = async {
            sleep(patience).await;
            disk.begins().await;
        };
        let outcome = tokio::select! {
            biased;
            outcome = self.desk.written(number) => outcome,
            () = given_up => return None,
        };
        self.late = false;
        Some(outcome)
    }

    /// The same; but whoever has waited once does not wait again as long as that is not written.
    pub async fn write_or_leave(
        &mut self,
        what: T,
        patience: Duration,
    ) -> Option<Result<(), String>> {
        let behind = self.late && self.desk.next().busy;
        let patience = if behind { Duration::ZERO } else { patience };
        self.write(what, patience).await
    }

    /// What became of what was late, once that is known. Never where nothing is.
    pub async fn landed(&mut self) -> Result<(), String> {
        if !self.late {
            std::future::pending::<()>().await;
        }
        let newest = self.desk.next().number;
        let outcome = self.desk.written(newest).await;
        self.late = false;
        outcome
    }
}

impl<T: Send + 'static> Desk<T> {
    fn next(&self) -> MutexGuard<'_, Next<T>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(self: &Arc<Self>, what: T) -> u64 {
        let mut next = self.next();
        next.number += 1;
        next.what = Some(what);
        if !next.busy {
            next.busy = true;
            let desk = Arc::clone(self);
            tokio::spawn(async move { desk.write_all().await }.in_current_span());
        }
        next.number
    }

    async fn write_all(self: Arc<Self>) {
        // First: what is replaced while it waits for its turn is never written. Never closed.
        let _turn = self.scribes.turns.acquire().await;
        while let Some((number, what)) = self.take() {
            let desk = Arc::clone(&self);
            let outcome = self.scribes.watched(move || (desk.write)(what)).await;
            self.written.send_replace(Written { number, outcome });
        }
    }

    fn take(&self) -> Option<(u64, T)> {
        let mut next = self.next();
        let what = next.what.take();
        next.busy = what.is_some();
        what.map(|what| (next.number, what))
    }

    /// What became of `number`, or of what took its place.
    async fn written(&self, number: u64) -> Result<(), String> {
        let mut written = self.written.subscribe();
        let newest = written.wait_for(|written| written.number >= number).await;
        let outcome = newest.map(|written| written.outcome.clone());
        match outcome {
            Ok(outcome) => outcome,
            // The runtime is shutting down.
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LATE, Scribe, Scribes, TURNS};
    use crate::host::{Turns, blocking};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;
    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(60);

    /// One that writes a number when it is told what comes of that, and what it has written.
    fn gated(scribes: &Scribes) -> (Scribe<u32>, Sender<Result<(), String>>, Receiver<u32>) {
        let (go, gone) = channel();
        let (told, written) = channel();
        let both = Mutex::new((gone, told));
        let scribe = scribes.scribe(move |number| {
            let (gone, told) = &*both.lock().unwrap();
            // Its test is over.
            let outcome = gone.recv().unwrap_or(Ok(()));
            let _ = told.send(number);
            outcome
        });
        (scribe, go, written)
    }

    #[tokio::test]
    async fn of_what_waits_for_a_disk_that_hangs_the_newest_is_written_and_nobody_waits_twice() {
        let scribes = Scribes::default();
        let lateness = scribes.lateness();
        let (mut scribe, go, written) = gated(&scribes);
        go.send(Ok(())).unwrap();
        assert_eq!(scribe.write(1, LONG).await, Some(Ok(())));
        assert!(lateness.0.borrow().is_empty());
        assert_eq!(scribe.write(2, LATE / 2).await, None);
        assert!(!lateness.0.borrow().is_empty());
        // However long they would wait.
        for number in 3..6 {
            assert_eq!(scribe.write_or_leave(number, LONG).await, None);
        }
        // Whoever is given up has given it all the same.
        assert!(timeout(Duration::ZERO, scribe.landed()).await.is_err());
        go.send(Ok(())).unwrap();
        go.send(Err("it is full".into())).unwrap();
        assert_eq!(scribe.landed().await, Err("it is full".into()));
        assert!(
            timeout(Duration::from_millis(10), scribe.landed())
                .await
                .is_err()
        );
        go.send(Ok(())).unwrap();
        assert_eq!(scribe.write_or_leave(6, LONG).await, Some(Ok(())));
        drop((scribe, go));
        assert_eq!(written.iter().collect::<Vec<_>>(), [1, 2, 5, 6]);
        assert!(lateness.0.borrow().is_empty());
    }

    #[tokio::test]
    async fn what_has_landed_keeps_the_next_one_from_nothing_though_another_is_late() {
        let scribes = Scribes::default();
        let (mut other, _held, _) = gated(&scribes);
        let (mut scribe, go, written) = gated(&scribes);
        // Nobody waits for either.
        assert!(timeout(Duration::ZERO, other.write(0, LONG)).await.is_err());
        assert!(
            timeout(Duration::ZERO, scribe.write(1, LONG))
                .await
                .is_err()
        );
        go.send(Ok(())).unwrap();
        assert_eq!(blocking(move || written.recv()).await, Ok(1));
        while scribe.desk.next().busy {
            tokio::task::yield_now().await;
        }
        scribes.lateness().begins().await;
        // Nobody has asked what became of the first.
        go.send(Ok(())).unwrap();
        assert_eq!(scribe.write_or_leave(2, LONG).await, Some(Ok(())));
    }

    #[test]
    fn a_disk_refuses_from_a_look_that_failed_to_one_that_did_not() {
        let scribes = Scribes::default();
        assert!(!scribes.refuses());
        for failed in [true, true, false, true, false] {
            let looked = match failed {
                true => Err(std::io::ErrorKind::ReadOnlyFilesystem.into()),
                false => Ok(()),
            };
            scribes.heard(looked);
            assert_eq!(scribes.clone().refuses(), failed);
            // It says nothing of the disk.
            scribes.heard(Err(std::io::Error::from_raw_os_error(super::libc::EMFILE)));
            assert_eq!(scribes.refuses(), failed);
        }
    }

    #[tokio::test]
    async fn a_disk_that_hangs_leaves_threads_to_others() {
        let (scribes, turns) = (Scribes::default(), Turns::of(TURNS / 2));
        let (held, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..TURNS * 4 {
            let gate = Arc::clone(&gate);
            let wait = move |_| {
                let _over = gate.lock().unwrap().recv();
                Ok(())
            };
            let mut scribe = scribes.scribe(wait);
            tokio::spawn(async move { scribe.write(0, LONG).await });
        }
        let all: Vec<_> = (0..TURNS * 4)
            .map(|_| {
                let (turns, gate) = (turns.clone(), Arc::clone(&gate));
                let wait = move || gate.lock().unwrap().recv().is_err();
                tokio::spawn(async move { turns.run(wait).await })
            })
            .collect();
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(timeout(LONG, blocking(|| 1)).await, Ok(1));
        drop(held);
        for one in all {
            assert!(one.await.unwrap());
        }
    }
}
