//! Droplets: fetched once, checked, unpacked safely, and kept by digest.
//!
//! A droplet becomes a directory that lies between the stack and an instance's own changes, so unpacking
//! costs nothing per instance and does not count against the app's limits. On disk:
//!
//! ```text
//! <base>/droplets/<digest>/<uid>-<gid>/        a whole layer: app -> /home/vcap/app, home/vcap/…
//! <base>/droplets/.new-<life>-<try>/           one in the making; worthless in another life of the agent
//! <base>/droplets/.trash-<digest>              one on its way out
//! ```
//!
//! A layer gets its final name by a rename, after everything in it has reached the disk. So whatever
//! bears such a name is whole, however the agent ended.

mod digest;
mod error;
mod fetch;
mod meter;
mod staging;
pub(crate) mod stop;
mod toll;
pub(crate) mod tree;
pub(crate) mod unpack;
pub(crate) mod uri;
pub(crate) mod yaml;

use crate::host::depot::disk::Space;
use crate::host::in_background;
use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use stop::Stop;
use tokio::sync::{Semaphore, oneshot, watch};

pub use digest::Digest;
pub use error::DropletError;
pub use staging::{StagingInfo, staging_info, state_file};
pub(crate) use uri::{base64, percent_decode};

/// Downloads at the same time. More would only share the same network and disk, and each one may hold
/// `max_bytes` of the disk.
const PARALLEL: usize = 16;
/// Before the first retry of a download; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest time between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// How long an agent that ends waits for downloads to notice.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Longer than any download; a configured time above it counts as this.
const A_DAY: Duration = Duration::from_secs(24 * 3600);

/// Whom files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The user's number.
    pub uid: u32,
    /// The number of the user's first group.
    pub gid: u32,
}

/// The bounds of a download and of what comes out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOptions {
    /// Directories below which `file` URIs may lie.
    pub files: Vec<PathBuf>,
    /// How long nothing may come: also for resolving and connecting.
    pub inactivity: Duration,
    /// For a whole download, retries included, unpacking not.
    pub total: Duration,
    /// The size of the archive, in bytes.
    pub max_bytes: u64,
    /// Further tries after a failure that may pass: a broken connection, a stall, an overloaded server.
    pub retries: u32,
    /// Files, links and directories in the droplet.
    pub max_entries: u64,
    /// The size of the droplet when unpacked, in bytes.
    pub max_unpacked_bytes: u64,
    /// Where a droplet may only have what nobody was promised; `None`: whatever there is.
    pub space: Option<Space>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            inactivity: Duration::from_secs(30),
            total: Duration::from_secs(600),
            max_bytes: 2 << 30,
            retries: 2,
            max_entries: 200_000,
            max_unpacked_bytes: 8 << 30,
            space: None,
        }
    }
}

/// The droplets of this host. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Droplets {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// `<base>/droplets`.
    dir: PathBuf,
    options: FetchOptions,
    running: Mutex<HashMap<Wanted, Running>>,
    /// When each droplet was last asked for: an instance may just be about to use it.
    asked: Mutex<HashMap<Digest, Instant>>,
    /// The names of those that are being moved out of the way, by a disk that may take its time.
    leaving: watch::Sender<HashSet<String>>,
    slots: Arc<Semaphore>,
    /// Tells the tries of one life of the agent from those of another,
    life: String,
    /// and from each other.
    tries: AtomicU64,
}

/// A task that provides a droplet.
#[derive(Debug)]
struct Running {
    outcome: watch::Sender<Option<Result<PathBuf, DropletError>>>,
    stop: Stop,
}

/// What one task provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Wanted {
    digest: Digest,
    owner: Owner,
}

/// `None` until the task is done.
type Outcome = watch::Receiver<Option<Result<PathBuf, DropletError>>>;

impl Droplets {
    /// Opens `<base>/droplets`, made with mode 0700 if need be, and clears away what an agent that was
    /// killed left unfinished. Blocks. One agent per base: the caller sees to that.
    ///
    /// # Errors
    /// If the directory cannot be made or read.
    pub fn open(base: &Path, options: FetchOptions) -> Result<Self, DropletError> {
        let dir = base.join("droplets");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|error| DropletError::disk("make directory", &dir, error))?;
        let mut left = names_in(&dir)?;
        left.retain(|name| name.starts_with('.'));
        let there = dir.clone();
        // Beside what comes next: there may be millions of files. What is made from now on has another name, and what is
        // removed is to be removed.
        in_background(move || {
            for name in left {
                logged(remove_tree(&there.join(name)));
            }
        });
        let running = Mutex::new(HashMap::new());
        let slots = Arc::new(Semaphore::new(PARALLEL));
        Ok(Self {
            inner: Arc::new(Inner {
                dir,
                options,
                running,
                asked: Mutex::default(),
                leaving: watch::Sender::default(),
                slots,
                life: crate::random::hex(4),
                tries: AtomicU64::new(0),
            }),
        })
    }

    /// The directory of the unpacked droplet, a lower layer for an overlay: `app` and `home/vcap/…`,
    /// where all in `home/vcap` belongs to `owner`. Nobody may write to it.
    ///
    /// Fetches and unpacks if it is not there. Many may ask at the same time: one task does the work, and
    /// all get its result, errors as well. Whoever stops waiting disturbs nobody. Put the digest into the
    /// set that [`Droplets::reap`] spares before asking.
    ///
    /// # Errors
    /// Whatever went wrong; nothing of a failed try stays on the disk, and the next call tries again.
    pub async fn layer(
        &self,
        uri: &str,
        digest: &Digest,
        owner: Owner,
    ) -> Result<PathBuf, DropletError> {
        lock(&self.inner.asked).insert(*digest, Instant::now());
        let mut outcome = self.outcome(
            uri,
            Wanted {
                digest: *digest,
                owner,
            },
        )?;
        let ended = Err(DropletError::Abandoned("the agent is ending"));
        match outcome.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(ended),
            Err(_) => ended,
        }
    }

    /// Removes the droplets whose names ([`Digest`]'s `Display`) are not in `in_use`, and says how many.
    /// Spares those that a task is working on, and those that were asked for no longer than `soon` ago:
    /// an instance may just be about to use them. Blocks, for seconds where much is to be removed. One
    /// that cannot be removed is logged and tried again by the next call or the next start.
    pub fn reap(&self, in_use: &HashSet<String>, soon: Duration) -> usize {
        lock(&self.inner.asked).retain(|_, asked| asked.elapsed() < soon);
        let names = names_in(&self.inner.dir).unwrap_or_else(|error| {
            tracing::warn!(error = cause(&error), "droplets could not be listed");
            Vec::new()
        });
        // First all are moved out of the way, which is quick: `in_use` grows old while files are removed.
        let unused = |name: &String| !name.starts_with('.') && !in_use.contains(name);
        let moved: Vec<_> = names
            .into_iter()
            .filter(unused)
            .filter_map(|n| self.trash(&n))
            .collect();
        moved
            .iter()
            .filter(|trash| logged(remove_tree(trash)).is_some())
            .count()
    }

    /// Ends whatever is being fetched or unpacked, and waits for it, but not for a server that is silent.
    pub async fn stop(&self) {
        for task in lock(&self.inner.running).values() {
            task.stop.ask();
        }
        let all = u32::try_from(PARALLEL).unwrap_or(u32::MAX);
        let ended = self.inner.slots.acquire_many(all);
        drop(tokio::time::timeout(STOP_PATIENCE, ended).await);
    }

    /// Removes everything, `<base>/droplets` included. Blocks. For an agent that leaves nothing behind,
    /// after [`Self::stop`].
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn remove_all(&self) -> Result<(), DropletError> {
        remove_tree(&self.inner.dir)
    }

    /// Joins the task for `wanted`, or starts it.
    fn outcome(&self, uri: &str, wanted: Wanted) -> Result<Outcome, DropletError> {
        let mut running = lock(&self.inner.running);
        if let Some(task) = running.get(&wanted) {
            return Ok(task.outcome.subscribe());
        }
        let source = uri::parse(uri)?;
        let (tell, outcome) = watch::channel(None);
        let stop = Stop::default();
        let task = Running {
            outcome: tell.clone(),
            stop: stop.clone(),
        };
        running.insert(wanted, task);
        drop(running);
        let droplets = self.clone();
        tokio::spawn(async move {
            let mut work = pin!(droplets.provide(Arc::new(source), wanted, stop.clone()));
            loop {
                tokio::select! {
                    result = &mut work => {
                        lock(&droplets.inner.running).remove(&wanted);
                        tell.send_replace(Some(result));
                        return;
                    }
                    // Whoever waits may leave; when all have, nobody shall wait for its slot.
                    () = tell.closed() => {
                        let mut running = lock(&droplets.inner.running);
                        if tell.receiver_count() == 0 {
                            stop.ask();
                            running.remove(&wanted);
                            return;
                        }
                    }
                }
            }
        });
        Ok(outcome)
    }

    async fn provide(
        &self,
        source: Arc<uri::Source>,
        wanted: Wanted,
        stop: Stop,
    ) -> Result<PathBuf, DropletError> {
        let (layer, name) = (self.inner.layer(wanted), wanted.digest.to_string());
        let mut leaving = self.inner.leaving.subscribe();
        // An error: the agent is ending.
        drop(leaving.wait_for(|leaving| !leaving.contains(&name)).await);
        if tokio::fs::metadata(&layer).await.is_ok() {
            return Ok(layer);
        }
        // The thread holds it, which may go on for a while after whoever wanted it.
        let slot = Arc::clone(&self.inner.slots).acquire_owned().await;
        let slot = Arc::new(slot);
        let deadline = Instant::now() + self.inner.options.total.min(A_DAY);
        let mut pause = FIRST_PAUSE;
        let mut retries = self.inner.options.retries;
        loop {
            let (inner, source, stop) =
                (Arc::clone(&self.inner), Arc::clone(&source), stop.clone());
            let slot = Arc::clone(&slot);
            let work = move || {
                let _slot = slot;
                inner.provide(&source, wanted, deadline, &stop)
            };
            let error = match on_a_thread(work).await {
                Ok(layer) => return Ok(layer),
                Err(error) => error,
            };
            if retries == 0 || !error.is_transient() || Instant::now() + pause >= deadline {
                return Err(error);
            }
            tracing::warn!(digest = %wanted.digest, error = cause(&error), retries, "download failed");
            retries -= 1;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Takes the name of one droplet away, if nobody works on it, so that no task finds it any more.
    fn trash(&self, name: &str) -> Option<PathBuf> {
        let trash = self.inner.dir.join(format!(".trash-{name}"));
        // Left by a removal that failed.
        logged(remove_tree(&trash))?;
        if !self.leaves(name) {
            return None;
        }
        let path = self.inner.dir.join(name);
        let moved = fs::rename(&path, &trash).map_err(|e| DropletError::disk("rename", &path, e));
        self.inner.leaving.send_modify(|leaving| {
            leaving.remove(name);
        });
        logged(moved)?;
        Some(trash)
    }

    /// Whether nobody works on a droplet. Whoever wants to from now on waits until it has been moved out of the way.
    fn leaves(&self, name: &str) -> bool {
        let running = lock(&self.inner.running);
        let asked = lock(&self.inner.asked);
        let mut used = running
            .keys()
            .map(|wanted| &wanted.digest)
            .chain(asked.keys());
        let is_used = used.any(|digest| digest.to_string() == name);
        if !is_used {
            self.inner.leaving.send_modify(|leaving| {
                leaving.insert(name.to_owned());
            });
        }
        !is_used
    }
}

/// What the holders do is too short to leave a half-changed value behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Where a whole layer is, once it is there.
    fn layer(&self, wanted: Wanted) -> PathBuf {
        let Wanted { digest, owner } = wanted;
        let name = format!("{}-{}", owner.uid, owner.gid);
        self.dir.join(digest.to_string()).join(name)
    }

    /// One try, on a thread of its own.
    fn provide(
        &self,
        source: &uri::Source,
        wanted: Wanted,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<PathBuf, DropletError> {
        let digest = wanted.digest;
        let droplet = self.dir.join(digest.to_string());
        let layer = self.layer(wanted);
        // Its own: a try that was given up may still be at work on another one.
        let number = self.tries.fetch_add(1, Ordering::Relaxed);
        let new = self.dir.join(format!(".new-{}-{number}", self.life));
        make_directory(&new, 0o700)?;
        let began = Instant::now();
        let made = self.make(source, wanted, &new, deadline, stop);
        let kept = made.and_then(|(made, bytes)| {
            stop.check()?;
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&droplet)
                .map_err(|error| DropletError::disk("make directory", &droplet, error))?;
            match fs::rename(&made, &layer) {
                // A try that was given up in the last moment was quicker.
                Err(_) if layer.is_dir() => {}
                renamed => renamed.map_err(|e| DropletError::disk("rename", &made, e))?,
            }
            sync(&droplet)?;
            sync(&self.dir)?;
            let elapsed_ms = began.elapsed().as_millis();
            tracing::info!(%digest, bytes, elapsed_ms, "fetched and unpacked");
            Ok(layer)
        });
        // The result stands whatever this comes to: the next try or the next start removes the rest.
        if let Err(error) = remove_tree(&new) {
            tracing::warn!(error = cause(&error), "a download left something behind");
        }
        kept
    }

    /// Makes the layer in `new`, whole and on the disk; says where, and how large the archive was.
    fn make(
        &self,
        source: &uri::Source,
        wanted: Wanted,
        new: &Path,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<(PathBuf, u64), DropletError> {
        let path = new.join("droplet.tgz");
        let mut archive = unnamed(&path)?;
        let into = (&mut archive, path.as_path());
        let bytes = fetch::fetch(source, &wanted.digest, into, &self.options, deadline, stop)?;
        io::Seek::rewind(&mut archive).map_err(|e| DropletError::disk("rewind", &path, e))?;
        let layer = new.join("layer");
        let home = layer.join("home/vcap");
        make_directory(&layer, 0o755)?;
        make_directory(&layer.join("home"), 0o755)?;
        make_owned(&home, wanted.owner)?;
        let app = layer.join("app");
        symlink("/home/vcap/app", &app)
            .map_err(|error| DropletError::disk("make symlink", &app, error))?;
        // Instances expect these also where a droplet lacks them.
        for directory in ["app", "logs", "tmp"] {
            make_owned(&home.join(directory), wanted.owner)?;
        }
        unpack::unpack(archive, &home, wanted.owner, &self.options, stop)?;
        // One flush for thousands of files, instead of one for each.
        let flushed = tree::open_directory(&layer)
            .and_then(|directory| nix::unistd::syncfs(directory).map_err(io::Error::from));
        flushed.map_err(|error| DropletError::disk("flush", &layer, error))?;
        Ok((layer, bytes))
    }
}

/// Runs `work`, which may wait for a server for minutes, where it holds up neither the runtime's blocking
/// threads nor its end.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DropletError> + Send + 'static,
) -> Result<T, DropletError> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new()
        .name("droplet".to_owned())
        .spawn(move || tell.send(work()))
        .map_err(|_| DropletError::Abandoned("no thread could be started"))?;
    told.await
        .unwrap_or(Err(DropletError::Abandoned("its thread ended early")))
}

/// What a removal came to, which nobody waits for.
fn logged<T>(removal: Result<T, DropletError>) -> Option<T> {
    removal
        .inspect_err(|error| tracing::warn!(error = cause(error), "unused droplet not removed"))
        .ok()
}

/// For a log: with the causes below it.
fn cause(error: &DropletError) -> &(dyn std::error::Error + 'static) {
    error
}

/// A file that has no name any more, so that it is gone however this ends.
fn unnamed(path: &Path) -> Result<File, DropletError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = file.map_err(|error| DropletError::disk("make", path, error))?;
    fs::remove_file(path).map_err(|error| DropletError::disk("unlink", path, error))?;
    Ok(file)
}

/// Makes one directory with exactly `mode`, whatever the umask.
fn make_directory(path: &Path, mode: u32) -> Result<(), DropletError> {
    fs::create_dir(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|error| DropletError::disk("make directory", path, error))
}

fn make_owned(path: &Path, owner: Owner) -> Result<(), DropletError> {
    make_directory(path, 0o755)?;
    chown(path, Some(owner.uid), Some(owner.gid))
        .map_err(|error| DropletError::disk("give away", path, error))
}

/// Removes `path` and all below it, following no symlink. It may be gone already.
fn remove_tree(path: &Path) -> Result<(), DropletError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DropletError::disk("remove", path, error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn sync(directory: &Path) -> Result<(), DropletError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| DropletError::disk("flush", directory, error))
}

fn names_in(directory: &Path) -> Result<Vec<String>, DropletError> {
    let unlisted = |error| DropletError::disk("list", directory, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(unlisted)? {
        // A name that is no text is none of ours.
        names.extend(entry.map_err(unlisted)?.file_name().into_string().ok());
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
