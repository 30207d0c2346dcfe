//! How much of the disk is left: a task of its own looks, so that whoever asks waits for no disk.
//!
//! A look tells which containers it has counted. Those that are being made and are not among them are kept here until
//! they are; those that are only planned are known to whoever asks.

use super::{blocking, lock};
use crate::chain;
use crate::host::depot::disk::{Free, Limit};
use container::fault::SysError;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// Between two looks that nobody asked for: others write to that file system, too.
const PAUSE: Duration = Duration::from_secs(5);

/// After so many of these what was seen says no more what is there.
const OLD: Duration = Duration::from_secs(20);

/// How long somebody who gave something back waits until that has been seen. It takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// Cheap to clone. Looks are made until the last clone is dropped.
#[derive(Debug, Clone)]
pub(super) struct Lookout {
    /// How often a look was asked for.
    asked: Arc<watch::Sender<u64>>,
    seen: watch::Receiver<Seen>,
    /// What is being made, and has not been counted by a look for certain.
    making: Arc<Mutex<BTreeMap<String, Limit>>>,
}

/// What the last look that saw something has seen.
#[derive(Debug)]
struct Seen {
    /// What had been asked for when it began.
    number: u64,
    /// When it had been made.
    when: Instant,
    /// `None` where nothing is bounded.
    free: Option<Arc<Free>>,
}

impl Seen {
    fn now(number: u64, free: Option<Free>) -> Self {
        Self {
            number,
            when: Instant::now(),
            free: free.map(Arc::new),
        }
    }

    fn is_old(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.when) >= OLD
    }
}

/// A container that is being made; until this is dropped it is reckoned with.
#[derive(Debug)]
pub(super) struct Making {
    lookout: Lookout,
    handle: String,
}

impl Lookout {
    /// Makes the first look, and has more made.
    ///
    /// # Errors
    /// That of the first look. Where a later one fails, what was seen before it stays.
    pub(super) async fn open<L>(look: L) -> Result<Self, SysError>
    where
        L: Fn() -> Result<Option<Free>, SysError> + Clone + Send + 'static,
    {
        let free = blocking(look.clone()).await?;
        let (asked, heard) = watch::channel(0);
        let (tell, seen) = watch::channel(Seen::now(0, free));
        tokio::spawn(keep_looking(look, heard, tell));
        Ok(Self {
            asked: Arc::new(asked),
            seen,
            making: Arc::default(),
        })
    }

    /// Bytes that `more` new containers can have together beside those that are `here`, and beside what is being made;
    /// `None` where nothing is bounded.
    pub(super) fn left<'a>(
        &self,
        here: impl Iterator<Item = (&'a str, Limit)>,
        more: u64,
        needs: impl Fn(Limit) -> u64,
    ) -> Option<u64> {
        // Before what was seen: what leaves it has been counted by then.
        let making = lock(&self.making).clone();
        let free = self.seen.borrow().free.clone()?;
        let mut all: BTreeMap<&str, Limit> = here.collect();
        for (handle, limit) in &making {
            all.entry(handle).or_insert(*limit);
        }
        Some(free.left(&all, more, needs))
    }

    /// Whether nothing has been seen for so long that nobody knows what is left.
    pub(super) fn is_old(&self) -> bool {
        self.seen.borrow().is_old(Instant::now())
    }

    /// Reckons with a container that is going to be made.
    pub(super) fn making(&self, handle: &str, limit: Limit) -> Making {
        lock(&self.making).insert(handle.to_owned(), limit);
        Making {
            lookout: self.clone(),
            handle: handle.to_owned(),
        }
    }

    /// Has a look made, of what is there now.
    pub(super) fn ask(&self) -> u64 {
        let mut number = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            number = *asked;
        });
        number
    }

    /// The same, and waits until it has been made, if that does not take too long.
    pub(super) async fn glance(&self) {
        drop(timeout(PATIENCE, self.look()).await);
    }

    /// However long it takes.
    pub(super) async fn look(&self) {
        let number = self.ask();
        let mut seen = self.seen.clone();
        // An error: the runtime is shutting down.
        drop(seen.wait_for(|seen| seen.number >= number).await);
    }
}

impl Making {
    /// For one whose writable layer is bounded: lets go of it as soon as a look has counted it.
    pub(super) fn until_counted(self) {
        tokio::spawn(async move {
            self.lookout.look().await;
            drop(self);
        });
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        lock(&self.lookout.making).remove(&self.handle);
    }
}

/// One at a time: of a disk that hangs, nobody who asks makes more threads.
async fn keep_looking<L>(look: L, mut asked: watch::Receiver<u64>, tell: watch::Sender<Seen>)
where
    L: Fn() -> Result<Option<Free>, SysError> + Clone + Send + 'static,
{
    let mut said = false;
    loop {
        if let Ok(Err(_nobody_asks_any_more)) = timeout(PAUSE, asked.changed()).await {
            return;
        }
        let number = *asked.borrow_and_update();
        let mut looking = pin!(blocking(look.clone()));
        let looked = match timeout(OLD, &mut looking).await {
            Ok(looked) => looked,
            Err(_) => {
                tracing::error!("how much disk is left is not known: the disk does not answer");
                looking.await
            }
        };
        match looked {
            Ok(free) => {
                said = false;
                tell.send_replace(Seen::now(number, free));
            }
            Err(error) => {
                if !said {
                    tracing::error!(error = %chain(&error), "how much disk is left could not be seen");
                }
                said = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Free, Limit, Lookout, OLD, PATIENCE, PAUSE};
    use container::fault::Context;
    use nix::errno::Errno;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex, mpsc};
    use tokio::time::Instant;

    const LIMIT: Limit = Limit {
        bytes: 10,
        inodes: 1,
    };

    fn left(lookout: &Lookout) -> u64 {
        let none = std::iter::empty();
        lookout.left(none, 0, |limit| limit.bytes).unwrap()
    }

    #[tokio::test]
    async fn a_look_that_hangs_or_fails_leaves_what_was_seen_and_only_one_is_made() {
        let (go, gone) = mpsc::channel::<Result<u64, Errno>>();
        let (gone, looks) = (Arc::new(Mutex::new(gone)), Arc::new(AtomicU64::new(0)));
        let counter = Arc::clone(&looks);
        let look = move || {
            counter.fetch_add(1, Ordering::SeqCst);
            let Ok(told) = gone.lock().unwrap().recv() else {
                // The test is over.
                return Ok(None);
            };
            let seen = told.map(|bytes| Some(Free::of(bytes)));
            seen.context("statvfs", "nowhere")
        };
        go.send(Ok(100)).unwrap();
        let lookout = Lookout::open(look).await.unwrap();
        assert_eq!(left(&lookout), 100);
        // It hangs; however many ask, and however often, they are answered, and wait a moment at most.
        let began = Instant::now();
        let glances: Vec<_> = (0..20)
            .map(|_| {
                let lookout = lookout.clone();
                tokio::spawn(async move { lookout.glance().await })
            })
            .collect();
        for glance in glances {
            glance.await.unwrap();
        }
        assert!((PATIENCE..PAUSE).contains(&began.elapsed()));
        assert_eq!(left(&lookout), 100);
        assert_eq!(
            looks.load(Ordering::SeqCst),
            2,
            "the first one, and one that hangs"
        );
        // What is being made is reckoned with until a look has begun after it was bounded, and saw something.
        let making = lookout.making("new", LIMIT);
        assert_eq!(left(&lookout), 90);
        making.until_counted();
        tokio::task::yield_now().await;
        go.send(Ok(99)).unwrap();
        let mut seen = lookout.seen.clone();
        seen.changed().await.unwrap();
        assert_eq!(left(&lookout), 89);
        go.send(Err(Errno::EIO)).unwrap();
        go.send(Ok(50)).unwrap();
        lookout.ask();
        seen.changed().await.unwrap();
        while !lookout.making.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(left(&lookout), 50);
        // Known as old once there should have been several.
        let when = seen.borrow().when;
        assert!(!lookout.is_old() && !seen.borrow().is_old(when + OLD / 2));
        assert!(seen.borrow().is_old(when + OLD));
    }
}
