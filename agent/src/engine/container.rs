//! One container that this agent holds: its jobs, signals, limits, and its end.

use super::oom::Victims;
use super::{
    DiskChange, DiskUsage, EngineError, Limits, Place, Saved, Shared, Usage, blocking, destroy,
    lock, owned,
};
use crate::host::cgroups::{CgroupError, Group};
use crate::host::depot::Directory;
use crate::host::depot::disk::Disk;
use crate::host::helpers::{Child, Command, Ended, Leash};
use crate::host::network::{Attached, Bandwidth, EgressRule, Lease};
use crate::host::watched;
use container::client::Client;
use container::exit;
use container::fault::{Context, SysError};
use container::status::Status;
use container::sys::pidfd;
use container::wshd::files::INIT_FD;
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

/// How long processes may take to die of SIGKILL. What takes longer waits in the kernel for something.
pub(super) const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long the death of its init may take to end all others, before they are killed one by one.
const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// How long another number of open files may take to reach every process. It takes milliseconds.
const OPEN_FILES_DEADLINE: Duration = Duration::from_secs(10);

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
    egress: Vec<EgressRule>,
    bandwidth: Mutex<Bandwidth>,
    /// Holds the port that is mapped first, until it is.
    place: Mutex<Option<Place>>,
    /// The bounds of its writable layer; `None` if it is dead, or they could not be found.
    pub(super) disk: Mutex<Option<Arc<Disk>>>,
    /// The supervisors that this agent started, by job.
    pub(super) supervisors: Mutex<BTreeMap<u32, Child>>,
    /// Where the kernel's log ended before it had processes.
    pub(super) log_end: Option<u64>,
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
        attached: Attached,
        directory: Directory,
        group: Group,
        init: OwnedFd,
        log_end: Option<u64>,
    ) -> Result<Self, EngineError> {
        // For logs only; what stands for a dead init has none.
        let pid = pidfd::pid_of(init.as_fd()).ok().flatten().unwrap_or(0);
        let init = watched(init, Interest::READABLE).context("epoll_ctl", "pidfd")?;
        let inner = Inner {
            shared,
            handle: attached.handle,
            directory,
            group,
            lease: attached.lease,
            ports: Mutex::new(attached.ports),
            egress: attached.egress,
            bandwidth: Mutex::new(attached.bandwidth),
            place: Mutex::default(),
            disk: Mutex::default(),
            supervisors: Mutex::default(),
            log_end,
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

    /// Holds its writable layer's bounds.
    pub(super) fn keep_disk(&self, disk: Arc<Disk>) {
        lock(&self.inner.disk).replace(disk);
    }

    /// The bounds of its writable layer, by which its files are found, too.
    #[must_use]
    pub fn disk(&self) -> Option<Arc<Disk>> {
        lock(&self.inner.disk).clone()
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

    /// The directory of a job, with its output in it.
    #[must_use]
    pub fn job(&self, job: u32) -> PathBuf {
        self.inner.directory.job(job)
    }

    /// Where its files are, also those of one that died since the machine was started (`clean`): as long as this
    /// is held, its writable layer can be read.
    ///
    /// # Errors
    /// They cannot be found any more.
    pub async fn layer(&self, clean: bool) -> Result<Arc<Disk>, EngineError> {
        if let Some(disk) = self.disk() {
            return Ok(disk);
        }
        let (disks, directory) = (
            self.inner.shared.disks.clone(),
            self.inner.directory.clone(),
        );
        Ok(Arc::new(
            blocking(move || disks.find_dead(&directory, clean)).await?,
        ))
    }

    /// What to keep so that another agent can adopt it. Changes with every mapped port.
    #[must_use]
    pub fn saved(&self) -> Saved {
        Saved {
            handle: self.inner.handle.clone(),
            lease: self.inner.lease.clone(),
            ports: lock(&self.inner.ports).clone(),
            egress: self.inner.egress.clone(),
            bandwidth: *lock(&self.inner.bandwidth),
            boot_id: self.inner.shared.boot_id.clone(),
            log_end: self.inner.log_end,
        }
    }

    /// Maps a TCP port of the host to one of the container: where `outside` is `None`, one that is free;
    /// where `inside` is `None`, to the same number. Returns (on the host, inside). It stays until the
    /// container is destroyed.
    ///
    /// # Errors
    /// No port is left, the one that was asked for is another container's, or the kernel refused the
    /// element.
    pub async fn map_port(
        &self,
        outside: Option<u16>,
        inside: Option<u16>,
    ) -> Result<(u16, u16), EngineError> {
        let network = &self.inner.shared.network;
        let host = match outside {
            Some(port) => {
                network.adopt_port(port)?;
                port
            }
            None => {
                let reserved = lock(&self.inner.place).take();
                match reserved.and_then(|mut place| place.port()) {
                    Some(port) => port,
                    None => network.take_port()?,
                }
            }
        };
        let pair = (host, inside.unwrap_or(host));
        // First: if this future is dropped, `destroy` knows of it.
        lock(&self.inner.ports).push(pair);
        if let Err(error) = network.map_port(&self.inner.handle, pair.0, pair.1).await {
            lock(&self.inner.ports).retain(|known| *known != pair);
            network.release_port(host);
            return Err(error.into());
        }
        Ok(pair)
    }

    /// What its helpers said last. Blocks.
    #[must_use]
    pub fn last_words(&self) -> String {
        self.inner.directory.last_words()
    }

    /// Changes how much it may receive and send while it runs. Kept by [`Self::saved`].
    ///
    /// # Errors
    /// The kernel refused; one of both may be as asked for.
    pub async fn limit_bandwidth(&self, bandwidth: Bandwidth) -> Result<(), EngineError> {
        let network = &self.inner.shared.network;
        network.limit(&self.inner.handle, bandwidth).await?;
        *lock(&self.inner.bandwidth) = bandwidth;
        Ok(())
    }

    /// How much it may receive and send, as the kernel has it.
    ///
    /// # Errors
    /// Its link is gone.
    pub async fn bandwidth(&self) -> Result<Bandwidth, EngineError> {
        let (network, inner) = (&self.inner.shared.network, &self.inner);
        Ok(network.bandwidth(&inner.handle, &inner.lease).await?)
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

    /// How a job has ended, as its init knows it; `None` as long as it has not, or if that cannot be asked.
    pub async fn job_end(&self, job: u32) -> Option<Status> {
        let socket = self.inner.directory.socket();
        let jobs = blocking(move || Client::connect(&socket)?.info())
            .await
            .ok()?;
        let status = jobs.iter().find(|one| one.job == job)?.status?;
        match status {
            Status::Started { .. } => None,
            Status::Exited(_) | Status::Signaled(_) | Status::Failed { .. } => Some(status),
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

    /// Changes what its writable layer may hold while it runs: all of it, or nothing.
    ///
    /// # Errors
    /// [`EngineError::Disk`]: what is there does not fit, or nobody has so much; nothing was changed.
    pub async fn limit_disk(&self, change: DiskChange) -> Result<(), EngineError> {
        let Some(disk) = self.disk() else {
            return Err(EngineError::Destroyed(self.inner.handle.clone()));
        };
        let disks = self.inner.shared.disks.clone();
        let shared = &self.inner.shared;
        let work = move || disk.limit(&disks, change);
        shared.changes.run(work).await?;
        // Whoever hears of it can have what this gave back.
        shared.lookout.glance().await;
        Ok(())
    }

    /// What its writable layer holds now; `None` where nothing bounds it.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn disk_usage(&self) -> Result<Option<DiskUsage>, EngineError> {
        let Some(disk) = self.disk() else {
            return Ok(None);
        };
        Ok(blocking(move || disk.usage()).await?)
    }

    /// Changes how many files its processes may have open from `before` to `after`: each that had not chosen
    /// fewer for itself. 0 as `before`: each, whatever it has.
    ///
    /// # Errors
    /// [`EngineError::OpenFiles`]; nothing was changed, but where processes fork without an end.
    pub async fn limit_open_files(&self, before: u64, after: u64) -> Result<(), EngineError> {
        let inner = &self.inner;
        let init = inner.init.get_ref().try_clone();
        let directory = inner.directory.clone();
        let log = blocking(move || directory.log()).await?;
        let [before, after] = [before, after].map(|number| number.to_string().into());
        let command = Command {
            program: "wshd",
            argv0: None,
            args: vec![
                "--open-files".into(),
                inner.group.memory_dir().into(),
                before,
                after,
            ],
            env: Vec::new(),
            fds: vec![(init.context("dup", "pidfd")?, INIT_FD), (log.into(), 2)],
        };
        let helper = Leash(inner.shared.helpers.spawn(command).await?);
        let refused = i32::from(exit::REFUSED);
        match timeout(OPEN_FILES_DEADLINE, helper.0.wait()).await {
            Ok(Ended::Exited(0)) => Ok(()),
            Ok(Ended::Exited(code)) if code == refused => Err(EngineError::OpenFiles(
                "more than a process was started with takes CAP_SYS_RESOURCE, which the agent lacks",
            )),
            Ok(_) => Err(EngineError::OpenFiles(
                "the helper failed, see the container's log",
            )),
            Err(_late) => Err(EngineError::OpenFiles("it took too long")),
        }
    }

    /// What it uses now.
    ///
    /// # Errors
    /// Its control group is gone.
    pub async fn usage(&self) -> Result<Usage, EngineError> {
        let group = self.inner.group.clone();
        Ok(blocking(move || group.usage()).await?)
    }

    /// Whether nothing runs in it beside its init.
    pub async fn is_idle(&self) -> bool {
        let (group, init) = (self.inner.group.clone(), self.pid());
        blocking(move || group.pids().into_iter().all(|pid| pid == init)).await
    }

    /// Waits until its init is dead. Every process of the container is dead then, too: the kernel
    /// sees to that before the init's end shows (`pid_namespaces(7)`).
    pub async fn died(&self) {
        dead(&self.inner.init).await;
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

/// Waits until this process is dead.
pub(super) async fn dead(process: &AsyncFd<OwnedFd>) {
    if process.readable().await.is_err() {
        // Only when the runtime is shutting down.
        std::future::pending::<()>().await;
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
