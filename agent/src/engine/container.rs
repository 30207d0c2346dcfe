//! One container that this agent holds: its jobs, signals, limits, and its end.

use super::oom::Victims;
use super::{EngineError, Limits, Place, Saved, Shared, Usage, blocking, destroy, lock, owned};
use crate::host::cgroups::{CgroupError, Group};
use crate::host::depot::Directory;
use crate::host::helpers::Child;
use crate::host::network::Lease;
use crate::host::watched;
use container::client::Client;
use container::fault::{Context, SysError};
use container::sys::pidfd;
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

/// How long processes may take to die of SIGKILL. What takes longer waits in the kernel for something.
pub(super) const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long the death of its init may take to end all others, before they are killed one by one.
const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// A container. Cheap to clone; dropping it leaves the container running.
#[derive(Debug, Clone)]
pub struct Container {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) shared: Arc<Shared>,
    pub(super) handle: String,
    pub(super) directory: Directory,
    pub(super) group: Group,
    pub(super) lease: Lease,
    pub(super) ports: Mutex<Vec<(u16, u16)>>,
    /// Holds the port that is mapped first, until it is.
    place: Mutex<Option<Place>>,
    /// The supervisors that this agent started, by job.
    pub(super) supervisors: Mutex<BTreeMap<u32, Child>>,
    /// Whose deaths for memory were told.
    pub(super) victims: Mutex<Victims>,
    /// Held while it is being destroyed, and while a supervisor is being started.
    pub(super) destroyed: tokio::sync::Mutex<Destroyed>,
    init: AsyncFd<OwnedFd>,
    pid: i32,
}

/// Whether everything of a container was removed and given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destroyed {
    Yes,
    No,
}

impl Container {
    pub(super) fn new(
        shared: Arc<Shared>,
        handle: &str,
        directory: Directory,
        group: Group,
        lease: Lease,
        ports: Vec<(u16, u16)>,
        init: OwnedFd,
    ) -> Result<Self, EngineError> {
        // For logs only; what stands for a dead init has none.
        let pid = pidfd::pid_of(init.as_fd()).ok().flatten().unwrap_or(0);
        let init = watched(init, Interest::READABLE).context("epoll_ctl", "pidfd")?;
        let inner = Inner {
            shared,
            handle: handle.to_owned(),
            directory,
            group,
            lease,
            ports: Mutex::new(ports),
            place: Mutex::default(),
            supervisors: Mutex::default(),
            victims: Mutex::default(),
            destroyed: tokio::sync::Mutex::new(Destroyed::No),
            init,
            pid,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// What is left of its place: the port that [`Self::map_port`] takes first.
    pub(super) fn keep(&self, place: Place) {
        lock(&self.inner.place).replace(place);
    }

    /// Its name.
    #[must_use]
    pub fn handle(&self) -> &str {
        &self.inner.handle
    }

    /// Its init, as the host counts; for logs.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.inner.pid
    }

    /// Its directory on the host; `log` in it has what its helpers complained about.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.directory.path
    }

    /// What to keep so that another agent can adopt it. Changes with every mapped port.
    #[must_use]
    pub fn saved(&self) -> Saved {
        Saved {
            handle: self.inner.handle.clone(),
            lease: self.inner.lease.clone(),
            ports: lock(&self.inner.ports).clone(),
            boot_id: self.inner.shared.boot_id.clone(),
        }
    }

    /// Maps a port of the host to one of the container: the same number where `inside` is `None`.
    /// Returns (on the host, inside). It stays until the container is destroyed.
    ///
    /// # Errors
    /// No port is left, or the kernel refused the element.
    pub async fn map_port(&self, inside: Option<u16>) -> Result<(u16, u16), EngineError> {
        let network = &self.inner.shared.network;
        let reserved = lock(&self.inner.place).take();
        let host = match reserved.and_then(|mut place| place.port()) {
            Some(port) => port,
            None => network.take_port()?,
        };
        let pair = (host, inside.unwrap_or(host));
        // First: if this future is dropped, `destroy` knows of it.
        lock(&self.inner.ports).push(pair);
        let (handle, lease) = (&self.inner.handle, &self.inner.lease);
        if let Err(error) = network.map_port(handle, lease, pair.0, pair.1).await {
            lock(&self.inner.ports).retain(|known| *known != pair);
            network.release_port(host);
            return Err(error.into());
        }
        Ok(pair)
    }

    /// Sends a signal to every process of the container but its init, once. Nobody left to signal is
    /// fine.
    ///
    /// # Errors
    /// The init is dead or does not answer.
    pub async fn signal(&self, signal: i32) -> Result<(), EngineError> {
        let socket = self.inner.directory.socket();
        let sent = blocking(move || Client::connect(&socket)?.signal(0, signal)).await;
        match sent {
            Err(SysError {
                errno: Errno::ESRCH,
                ..
            }) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Changes its limits while it runs. Those that are `None` stay.
    ///
    /// # Errors
    /// [`CgroupError::MemoryInUse`]: what it uses does not fit; nothing was changed.
    pub async fn limit(&self, limits: Limits) -> Result<(), EngineError> {
        let group = self.inner.group.clone();
        Ok(blocking(move || group.limit(&limits)).await?)
    }

    /// What it uses now.
    ///
    /// # Errors
    /// Its control group is gone.
    pub async fn usage(&self) -> Result<Usage, EngineError> {
        let group = self.inner.group.clone();
        Ok(blocking(move || group.usage()).await?)
    }

    /// Waits until its init is dead. Every process of the container is dead then, too: the kernel
    /// sees to that before the init's end shows (`pid_namespaces(7)`).
    pub async fn died(&self) {
        if self.inner.init.readable().await.is_err() {
            // Only when the runtime is shutting down.
            std::future::pending::<()>().await;
        }
    }

    /// Kills every process in it and waits until they are dead. A dead one is fine.
    ///
    /// # Errors
    /// [`EngineError::Stuck`] after eleven seconds.
    pub async fn kill(&self) -> Result<(), EngineError> {
        // ESRCH: it is dead already.
        let _dead_already = pidfd::send_signal(self.inner.init.get_ref(), 9);
        if timeout(KILL_PATIENCE, self.died()).await.is_err() {
            // A group that somebody froze is thawed by it (v1), and a busy one dies at once.
            let group = self.inner.group.clone();
            blocking(move || group.kill()).await;
        }
        if timeout(KILL_DEADLINE, self.died()).await.is_err() {
            let group = self.inner.group.clone();
            let pids = blocking(move || group.pids()).await;
            return Err(stuck(&self.inner.handle, pids));
        }
        wait_empty(&self.inner.handle, self.inner.group.clone()).await
    }

    /// Kills it and removes everything of it from the machine, output included; gives back its addresses
    /// and ports. For a job's last output, [`Self::kill`] it first and follow the job to its `End`.
    /// Goes on to its end when the caller goes away. May be repeated; what is gone already is fine.
    ///
    /// # Errors
    /// The first failure, after everything else was done. [`EngineError::Stuck`]: its addresses and
    /// directory stay taken; try again.
    pub async fn destroy(&self) -> Result<(), EngineError> {
        let this = self.clone();
        owned(async move { destroy::container(&this).await }).await
    }
}

/// Kills what is in a control group and waits until nobody is.
pub(super) async fn wait_empty(handle: &str, group: Group) -> Result<(), EngineError> {
    let handle = handle.to_owned();
    blocking(move || {
        if !group.is_empty() {
            group.kill();
        }
        match group.wait_empty(KILL_DEADLINE) {
            Err(CgroupError::Busy { .. }) => Err(stuck(&handle, group.pids())),
            other => Ok(other?),
        }
    })
    .await
}

fn stuck(handle: &str, pids: Vec<i32>) -> EngineError {
    EngineError::Stuck {
        handle: handle.to_owned(),
        pids,
    }
}
