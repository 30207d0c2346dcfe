//! Taking a container off the machine: idempotent, goes on after a failure, reports the first one.
//!
//! ```text
//! kill ─▶ set elements ─▶ supervisors end ─▶ control group ─▶ directory ─▶ addresses and ports
//! ```
//!
//! The link goes with the network namespace, which the kernel takes apart in its own time.

use super::container::{Destroyed, KILL_DEADLINE, wait_empty};
use super::supervisor::listening;
use super::{Container, EngineError, Saved, Shared, blocking, lock, sweep};
use crate::chain;
use crate::host::cgroups::Group;
use crate::host::depot::Directory;
use crate::host::helpers::Child;
use crate::host::watched;
use container::client::Client;
use container::fault::Context;
use container::sys::pidfd;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::time::{sleep, timeout};

/// How long a job's supervisor may take to write the job's end once the container is dead.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long the kernel may call an empty control group busy.
const BUSY: Duration = Duration::from_secs(2);

/// Between two attempts at what resists.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// For what nobody else knows of and must be tried until it is done. An agent that leaves meanwhile leaves it to
/// the sweep of the next one.
#[derive(Debug)]
pub(super) struct Again {
    pause: Duration,
}

impl Again {
    pub(super) fn new() -> Self {
        Self { pause: FIRST_PAUSE }
    }

    /// Tells why, and waits before the next attempt.
    pub(super) async fn after(&mut self, handle: &str, error: EngineError) {
        tracing::error!(handle, error = %chain(&error), "a container is not removed yet");
        self.wait().await;
    }

    /// Waits before the next attempt, ever longer.
    pub(super) async fn wait(&mut self) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// Destroys a container that this agent holds.
pub(super) async fn container(container: &Container) -> Result<(), EngineError> {
    let inner = &container.inner;
    let mut destroyed = inner.destroyed.lock().await;
    if *destroyed == Destroyed::Yes {
        return Ok(());
    }
    let began = Instant::now();
    let killed = container.kill().await;
    let attached = sweep::attached(&container.saved());
    inner.shared.network.detach(&attached).await;
    // What may still run keeps everything that it could use.
    killed?;
    let children: Vec<Child> = lock(&inner.supervisors).values().cloned().collect();
    for child in children {
        if timeout(LAST_WORDS, child.wait()).await.is_err() {
            child.kill();
        }
    }
    let disk = lock(&inner.disk).take();
    // The last one who has it takes it off the machine, which may wait for the disk.
    let abandon = move || drop(disk.inspect(|disk| disk.abandon()));
    inner.shared.removals.run(abandon).await;
    remains(&inner.shared, &inner.handle).await?;
    give_back(&inner.shared, &container.saved());
    inner.shared.network.see_off(&inner.handle);
    // Whoever hears of it can have what it was promised.
    inner.shared.lookout.glance().await;
    *destroyed = Destroyed::Yes;
    let elapsed_us = began.elapsed().as_micros();
    tracing::info!(handle = inner.handle, elapsed_us, "container destroyed");
    Ok(())
}

/// Destroys what is left of a container of which there is only a record.
pub(super) async fn from_record(shared: &Shared, saved: &Saved) -> Result<(), EngineError> {
    end_processes(shared, &saved.handle).await?;
    // Addresses and ports that somebody else has by now are not ours to cut off.
    let held = retake(shared, saved);
    if let Some(held) = &held {
        shared.network.detach(&sweep::attached(held)).await;
    }
    let removed = remains(shared, &saved.handle).await;
    if let Some(held) = held {
        give_back(shared, &held);
    }
    shared.network.see_off(&saved.handle);
    shared.lookout.glance().await;
    removed
}

/// Removes what a container leaves behind on the machine when its processes are dead: supervisors,
/// control group, directory.
pub(super) async fn remains(shared: &Shared, handle: &str) -> Result<(), EngineError> {
    let supervisors = end_supervisors(&shared.depot.container(handle)).await;
    let group = empty_and_remove(handle, shared.cgroups.group(handle)).await;
    let directory = shared.discard(handle).await;
    supervisors.and(group).and(directory)
}

/// Kills what is left of a container that this agent does not hold: what is in its control group, and
/// the init that answers on its socket, wherever it is.
pub(super) async fn end_processes(shared: &Shared, handle: &str) -> Result<(), EngineError> {
    let socket = shared.depot.container(handle).socket();
    let init = blocking(move || Client::connect(&socket)?.peer_pidfd()).await;
    if let Ok(init) = init {
        let init = watched(init, Interest::READABLE).context("epoll_ctl", "pidfd")?;
        let _dead_already = pidfd::send_signal(init.get_ref(), 9);
        let _its_group_tells = timeout(KILL_DEADLINE, init.readable()).await;
    }
    wait_empty(handle, shared.cgroups.group(handle)).await
}

/// Kills what is in a control group and removes it.
pub(super) async fn empty_and_remove(handle: &str, group: Group) -> Result<(), EngineError> {
    wait_empty(handle, group.clone()).await?;
    Ok(blocking(move || group.remove(BUSY)).await?)
}

/// What of a record's addresses and ports nobody has, taken from the pools; `None` if the address is
/// somebody else's.
fn retake(shared: &Shared, saved: &Saved) -> Option<Saved> {
    if lock(&shared.claims).remove(&saved.handle) {
        return Some(saved.clone());
    }
    shared.network.adopt_lease(&saved.lease).ok()?;
    let mut held = saved.clone();
    held.ports
        .retain(|(host, _)| shared.network.adopt_port(*host).is_ok());
    Some(held)
}

fn give_back(shared: &Shared, saved: &Saved) {
    for (host, _) in &saved.ports {
        shared.network.release_port(*host);
    }
    shared.network.release(saved.lease.clone());
}

/// Waits until the supervisors of all jobs have ended by themselves, as they do when the container is
/// dead; kills those that do not.
async fn end_supervisors(directory: &Directory) -> Result<(), EngineError> {
    let directory = directory.clone();
    let supervisors = blocking(move || {
        let jobs = directory.jobs()?;
        let found = jobs.iter().filter_map(|job| listening(&directory, *job));
        Ok::<_, EngineError>(found.collect::<Vec<_>>())
    });
    for pidfd in supervisors.await? {
        if let Err(error) = end(pidfd).await {
            tracing::warn!(error = %chain(&error), "a supervisor could not be watched");
        }
    }
    Ok(())
}

async fn end(process: OwnedFd) -> io::Result<()> {
    let process = watched(process, Interest::READABLE)?;
    if timeout(LAST_WORDS, process.readable()).await.is_err() {
        let _dead_already = pidfd::send_signal(process.get_ref(), 9);
        let _stuck_in_the_kernel = timeout(LAST_WORDS, process.readable()).await;
    }
    Ok(())
}
