//! What all instances share.

use super::crashes::Crashes;
use super::depth::Depth;
use super::droplets::Droplets;
use super::instance::Change;
use super::outlet::Outlet;
use super::record::Records;
use super::routes::Routes;
use super::totals::Totals;
use crate::config::Config;
use crate::engine::Engine;
use crate::host::scribe::{Scribes, UNANSWERED};
use messages::outgoing::{Component, uptime, usage_time};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, clock_gettime};
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, mpsc};
use tracing::error;

/// How long one and the same write may take until an agent that leaves gives the disk up, and how long it waits at least.
const HANGS: Duration = Duration::from_secs(20);

/// What all instances share.
#[derive(Debug)]
pub struct World {
    /// The configuration.
    pub config: Config,
    /// The agent's id.
    pub id: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Containers and jobs.
    pub engine: Engine,
    /// Downloads.
    pub droplets: Droplets,
    /// What crashes left.
    pub crashes: Crashes,
    /// What is on disk.
    pub records: Records,
    /// How much of the output there waits for the bus.
    pub depth: Depth,
    /// Who writes that.
    pub scribes: Scribes,
    /// As many containers are made at once: a thousand starts together would all be too late.
    pub starts: Semaphore,
    /// The way to the bus.
    pub outlet: Outlet,
    /// What routers are told.
    pub routes: Routes,
    /// What has happened so far.
    pub totals: Totals,
    /// The way to the stable.
    pub changes: mpsc::UnboundedSender<Change>,
}

impl World {
    /// Does the last `work`, unless the disk hangs for so long that nobody can know whether it ends.
    pub async fn unless_disk_hangs(&self, work: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = work => {}
            () = self.scribes.lateness().hangs(HANGS) => {
                error!("{UNANSWERED}: some of what the agent keeps there stays, and `ostler clean` removes it once it does");
            }
        }
    }

    /// Where this host tells others over HTTP how it is, if it does; `since`: when its agent began, in seconds since the epoch.
    #[must_use]
    pub fn component(&self, since: u64) -> Option<Component> {
        // At a loopback address everybody would find himself.
        let mut address = { self.config.metrics }.filter(|address| !address.ip().is_loopback())?;
        if address.ip().is_unspecified() {
            address.set_ip(IpAddr::V4(self.engine.local_ip()));
        }
        let index = self.config.index;
        Some(Component {
            r#type: "DEA",
            index,
            uuid: format!("{index}-{}", self.id.replace('-', "")),
            host: address.to_string(),
            // Nobody is asked who he is.
            credentials: Default::default(),
            start: usage_time(since),
            uptime: Some(uptime(whole_seconds(now()).saturating_sub(since))),
        })
    }
}

/// Seconds since the epoch.
#[must_use]
pub fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// Seconds since the machine began, its sleep included: what is measured by it does not change when a clock is set.
#[must_use]
pub fn since_boot() -> f64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
    // Linux has that clock since 2.6.39.
    Duration::from(now.unwrap_or_else(|_| TimeSpec::zero())).as_secs_f64()
}

/// Whole seconds of a time or a span; 0 for a negative one (a clock that was set back).
#[must_use]
pub fn whole_seconds(seconds: f64) -> u64 {
    Duration::try_from_secs_f64(seconds)
        .unwrap_or_default()
        .as_secs()
}
