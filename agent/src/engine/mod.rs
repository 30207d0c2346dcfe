//! What makes containers and runs jobs in them, as asynchronous calls.
//!
//! ```text
//! Engine ── create, adopt ──▶ Container ── spawn, follow ──▶ a job's records
//!    └── sweep, close             └── signal, kill, limit, oom, died, destroy
//! ```
//!
//! The engine keeps no list: whoever holds a [`Container`] owns it, and what must survive the agent is
//! in [`Saved`]. Everything a container leaves on the machine bears its handle (directory, control
//! group, link, set elements), so that [`Engine::sweep`] finds what no record knows.

mod adopt;
mod apart;
mod container;
mod copy;
mod create;
mod destroy;
mod disk;
mod error;
mod follow;
mod identity;
mod launch;
mod lookout;
mod oom;
mod place;
mod supervisor;
mod sweep;
#[cfg(test)]
mod tests;

pub use adopt::{Adopted, REBOOTED};
pub use apart::unpack as unpack_apart;
pub use container::Container;
pub use copy::{Copied, CopyError, Inside, into as copy_into, out as copy_out, pour};
pub use error::EngineError;
pub use follow::Followed;
pub use identity::resolv_conf;
pub use oom::{Level, OomReport, total_of};
pub use place::Place;
pub use sweep::Swept;

pub use crate::host::cgroups::{Limits, Usage};
pub use crate::host::depot::SeedFile;
pub use crate::host::depot::disk::{
    Change as DiskChange, Limit as DiskLimit, Usage as DiskUsage, Wanted as DiskWay,
};
pub use crate::host::network::{Bandwidth, EgressRule, Lease, NetworkConfig, Traffic};
pub use ::container::launch::{Access, Bind};

use crate::chain;
use crate::host::cgroups::Cgroups;
use crate::host::depot::disk::{DiskError, Disks, Space};
use crate::host::depot::{self, Depot};
use crate::host::helpers::{Command, Ended, HelperError, Helpers, Leash};
use crate::host::network::{Attached, Network};
use crate::host::{Turns, blocking, in_background};
use lookout::Lookout;
use oom::KillLog;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What is removed from the disk at once, and what is changed there.
const TURNS: usize = 64;

/// Where the engine works and with what.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Holds the containers' directories.
    pub base: PathBuf,
    /// The directory of the helpers' programs.
    pub helpers: PathBuf,
    /// The control group above all containers, below the visible root of each hierarchy.
    pub cgroup_parent: String,
    /// Addresses, ports and how they are reached.
    pub network: NetworkConfig,
    /// Most bytes of output that are kept for one job.
    pub spool_bytes: u64,
    /// How many jobs of a container may have output that is kept.
    pub jobs: usize,
    /// How writable layers are bounded.
    pub disk: DiskWay,
}

impl EngineConfig {
    /// Most bytes of output that are kept of one container.
    #[must_use]
    pub fn output_bytes(&self) -> u64 {
        self.spool_bytes.saturating_mul(self.jobs as u64)
    }
}

/// What a container is to be.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name: eleven characters of `0-9a-v`, never used before.
    pub handle: String,
    /// The read-only directory at the bottom of its root.
    pub stack: PathBuf,
    /// Read-only directories between the stack and the writable layer, uppermost first.
    pub layers: Vec<PathBuf>,
    /// Its host name.
    pub hostname: String,
    /// What it may use.
    pub limits: Limits,
    /// What its writable layer may hold.
    pub disk: DiskLimit,
    /// Size of its `/dev/shm` in bytes.
    pub tmpfs_bytes: u64,
    /// Files that it finds in its writable layer. `etc/hostname`, `etc/hosts` and `etc/resolv.conf`
    /// are made unless they are among them.
    pub files: Vec<SeedFile>,
    /// Its name servers; empty: the host's, as far as they can be reached from inside.
    pub dns: Vec<Ipv4Addr>,
    /// Directories and files of the host that it sees.
    pub binds: Vec<Bind>,
    /// What it may reach outside; empty: what is configured.
    pub egress: Vec<EgressRule>,
    /// How much it may receive and send.
    pub bandwidth: Bandwidth,
}

/// What must be kept of a container so that another agent can adopt it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Its name.
    pub handle: String,
    /// Its addresses.
    pub lease: Lease,
    /// Its mapped ports: (on the host, inside).
    pub ports: Vec<(u16, u16)>,
    /// What it may reach outside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<EgressRule>,
    /// How much it may receive and send.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// The boot in which it was made.
    pub boot_id: String,
    /// The last record of the kernel's log of that boot before it had processes; `None`: not known.
    #[serde(default)]
    pub log_end: Option<u64>,
}

/// The engine. Cheap to clone. Dropping the last clone (and every [`Container`]) leaves the containers
/// running; what only serves this agent ends.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    helpers: Helpers,
    cgroups: Cgroups,
    network: Network,
    depot: Depot,
    disks: Disks,
    lookout: Lookout,
    kills: KillLog,
    /// Handles of containers that could not be adopted yet, and whose addresses and ports are kept for them.
    claims: Mutex<HashSet<String>>,
    /// What is taken off the disk.
    removals: Turns,
    /// What is changed there. Whoever begins something does not wait for removals.
    changes: Turns,
    boot_id: String,
    spool_bytes: u64,
    /// Shorter where a test waits for it.
    launch_patience: Duration,
}

impl Engine {
    /// Readies the machine: directories, control groups, the network's table.
    ///
    /// # Errors
    /// What is missing or refused, and what to do about it.
    pub async fn open(config: EngineConfig) -> Result<Self, EngineError> {
        let (base, parent) = (config.base.clone(), config.cgroup_parent.clone());
        let (depot, cgroups, boot_id) = blocking(move || {
            let (depot, boot_id) = (Depot::open(&base)?, depot::boot_id()?);
            Ok::<_, EngineError>((depot, Cgroups::open(&parent)?, boot_id))
        })
        .await?;
        let made = cgroups.clone();
        let opened = Self::open_in(config, depot, cgroups, boot_id).await;
        if opened.is_err() {
            blocking(move || made.remove_parent()).await;
        }
        opened
    }

    async fn open_in(
        mut config: EngineConfig,
        depot: Depot,
        cgroups: Cgroups,
        boot_id: String,
    ) -> Result<Self, EngineError> {
        let space = Space::new(&config.base, config.output_bytes());
        let helpers = Helpers::start(config.helpers).map_err(EngineError::Helpers)?;
        let disks = disk::open(space, &depot, &helpers, config.disk).await?;
        let looked_at = disks.clone();
        let lookout = Lookout::open(move || looked_at.look()).await;
        let lookout = lookout.map_err(DiskError::from)?;
        config.network.standing = Some(config.base.join("pools"));
        let network = Network::open(&config.network).await?;
        tracing::info!(cgroups = cgroups.describe(), disk = disks.describe(), base = %config.base.display(), "engine opened");
        let kills = KillLog::start();
        let spool_bytes = config.spool_bytes;
        let shared = Shared {
            helpers,
            cgroups,
            network,
            depot,
            disks,
            lookout,
            kills,
            claims: Mutex::default(),
            removals: Turns::of(TURNS),
            changes: Turns::of(TURNS),
            boot_id,
            spool_bytes,
            launch_patience: launch::DEADLINE,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Takes addresses and a port for a container that is to be made.
    ///
    /// # Errors
    /// A pool is empty; nothing was taken.
    pub fn reserve(&self) -> Result<Place, EngineError> {
        Place::take(&self.shared)
    }

    /// Whether [`Engine::reserve`] would have something to take.
    #[must_use]
    pub fn has_place(&self) -> bool {
        self.shared.network.has_room()
    }

    /// Makes a container in its place; when this returns, its init serves. It is made by a task of its
    /// own: if the caller goes away, the container does too.
    ///
    /// # Errors
    /// The first thing that failed; everything before it was undone.
    pub async fn create(&self, spec: Spec, place: Place) -> Result<Container, EngineError> {
        create::create(Arc::clone(&self.shared), spec, place).await
    }

    /// Finds a container of an earlier agent again. Addresses and ports of one that lives are taken
    /// from the pools, so adopt before creating; its traffic is not touched.
    ///
    /// # Errors
    /// Nobody knows whether it lives, or its addresses are taken.
    pub async fn adopt(&self, saved: &Saved) -> Result<Adopted, EngineError> {
        adopt::adopt(&self.shared, saved).await
    }

    /// For a container of which nobody can tell more than its handle: `None` if it is dead, else what lasts as long as
    /// it lives.
    ///
    /// # Errors
    /// Nobody knows whether it lives.
    pub async fn life_of(
        &self,
        handle: &str,
    ) -> Result<Option<impl Future<Output = ()> + Send + use<>>, EngineError> {
        adopt::life_of(&self.shared, handle).await
    }

    /// How many bytes of memory the kernel lets a container have; `None`: it has no control group here.
    pub async fn memory_limit(&self, handle: &str) -> Option<u64> {
        let group = self.shared.cgroups.group(handle);
        blocking(move || group.memory_limit()).await
    }

    /// Makes the network's table hold exactly these containers, without cutting their traffic: for the
    /// start, after all were adopted.
    ///
    /// # Errors
    /// The kernel or `nft` refused.
    pub async fn rebuild_network(&self, live: &[&Saved]) -> Result<(), EngineError> {
        let attached: Vec<Attached> = live.iter().map(|saved| sweep::attached(saved)).collect();
        Ok(self.shared.network.rebuild(&attached).await?)
    }

    /// Removes what no record knows: processes, control groups, links and directories that bear a
    /// handle which is not in `known`. (Their set elements go with [`Self::rebuild_network`].) `known`
    /// must name every container that is, or is being, made. What resists is logged, too.
    pub async fn sweep(&self, known: &HashSet<String>) -> Swept {
        let strays = sweep::strays(&self.shared, known).await;
        let mut swept = sweep::clear(&self.shared, strays).await;
        swept
            .left
            .extend(sweep::empty_trash(&self.shared).await.err());
        swept
    }

    /// [`Self::sweep`] of what is there now. Only handles in `again`, which are to be used again, are
    /// cleared when this returns; the rest is done beside whatever comes next.
    pub async fn sweep_beside(&self, known: &HashSet<String>, again: &HashSet<String>) {
        let mut strays = sweep::strays(&self.shared, known).await;
        sweep::clear(&self.shared, strays.split(again)).await;
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            sweep::clear_all(&shared, strays).await;
            if let Err(why) = sweep::empty_trash(&shared).await {
                tracing::warn!(why, "something was not removed");
            }
        });
    }

    /// [`Self::sweep`] for an agent at work, now and then: what is in no record now, and was in none when it was
    /// `sighted` by the call before this one. What this one has sighted. `known` must name every container
    /// that is, or was being, made when it was called.
    pub async fn sweep_orphans(
        &self,
        known: &HashSet<String>,
        sighted: BTreeSet<String>,
    ) -> BTreeSet<String> {
        sweep::orphans(&self.shared, known, sighted).await
    }

    /// Kills what is left of a container that cannot be adopted yet; then it can be, as a dead one.
    ///
    /// # Errors
    /// [`EngineError::Stuck`], or the kernel refused.
    pub async fn end_processes(&self, handle: &str) -> Result<(), EngineError> {
        destroy::end_processes(&self.shared, handle).await
    }

    /// Removes a container of which only the record is left: dead, or not to be adopted. One that is
    /// gone already is fine.
    ///
    /// # Errors
    /// The first failure; what could be removed was. May be repeated.
    pub async fn destroy_handle(&self, saved: &Saved) -> Result<(), EngineError> {
        let (shared, saved) = (Arc::clone(&self.shared), saved.clone());
        owned(async move { destroy::from_record(&shared, &saved).await }).await
    }

    /// Removes at once what stays for a moment when a container is destroyed: for a handle that is to be
    /// used again.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn vacate(&self, handle: &str) -> Result<(), EngineError> {
        Ok(self.shared.network.remove_link(handle).await?)
    }

    /// Leaves the machine as it was before [`Self::open`], for an agent whose containers are all
    /// destroyed. To leave them running, drop the engine instead.
    pub async fn close(self) {
        let (cgroups, depot) = (self.shared.cgroups.clone(), self.shared.depot.clone());
        self.shared.network.close().await;
        blocking(move || {
            cgroups.remove_parent();
            if let Err(error) = depot.empty_trash() {
                tracing::warn!(error = %chain(&error), "trash was left");
            }
        })
        .await;
        // No look is under way when this returns: the file system may be unmounted.
        self.shared.lookout.glance().await;
    }

    /// Bytes that `more` new containers can have together for their writable layers, as last looked at: what is
    /// neither used nor promised to anybody, nor will be taken by those that are `here`, each with its limit. `None`
    /// where nothing bounds them. Waits for no disk.
    #[must_use]
    pub fn disk_left<'a>(
        &self,
        here: impl Iterator<Item = (&'a str, DiskLimit)>,
        more: u64,
    ) -> Option<u64> {
        let needs = |limit| self.disk_needs(limit);
        self.shared.lookout.left(here, more, needs)
    }

    /// Whether that was last looked at so long ago that nobody knows it: looks fail, or hang.
    #[must_use]
    pub fn is_disk_unknown(&self) -> bool {
        self.shared.lookout.is_old()
    }

    /// Most bytes that the writable layer of a new container takes from the disk.
    #[must_use]
    pub fn disk_needs(&self, limit: DiskLimit) -> u64 {
        self.shared.disks.needs(limit)
    }

    /// Starts a helper that ends at once with 0, and waits for that: whether others could be started.
    ///
    /// # Errors
    /// It was not started.
    pub async fn try_helper(&self) -> Result<Ended, HelperError> {
        let command = Command {
            program: "iomux-link",
            argv0: None,
            args: vec!["--help".into()],
            env: Vec::new(),
            fds: Vec::new(),
        };
        let child = Leash(self.shared.helpers.spawn(command).await?);
        Ok(child.0.wait().await)
    }

    /// For how long the network has not been as it shall be, though that was tried.
    #[must_use]
    pub fn network_unmended(&self) -> Duration {
        self.shared.network.unmended()
    }

    /// The address under which others reach the mapped ports.
    #[must_use]
    pub fn local_ip(&self) -> Ipv4Addr {
        self.shared.network.local_ip()
    }
}

impl Shared {
    /// Takes a container's directory out of sight at once and removes it when there is time.
    async fn discard(&self, handle: &str) -> Result<(), EngineError> {
        let (depot, name) = (self.depot.clone(), handle.to_owned());
        self.removals.run(move || depot.discard(&name)).await?;
        let (depot, lookout) = (self.depot.clone(), self.lookout.clone());
        in_background(move || {
            if let Err(error) = depot.empty_trash_beside() {
                tracing::warn!(error = %chain(&error), "trash was left");
            }
            lookout.ask();
        });
        self.lookout.ask();
        Ok(())
    }
}

/// Runs to its end what must not stop half-way when the caller goes away.
async fn owned<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    use tracing::Instrument;
    match tokio::spawn(work.in_current_span()).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and the caller with it.
            Err(_cancelled) => std::future::pending().await,
        },
    }
}

/// What the holders do is too short to leave a half-changed value behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
