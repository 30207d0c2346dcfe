//! A container's way to the world: a link of its own, an address, ports of the host that lead to it,
//! and one table of rules that says what may pass.
//!
//! An instance costs a few netlink messages and no process. Addresses come in blocks of four (/30):
//! network, host end, container, broadcast. What lives outlasts this agent: links hang on the
//! container's namespace, rules and elements on the host's, and the next agent takes both over.

mod conntrack;
#[cfg(test)]
mod crowd;
mod decode;
mod difference;
mod egress;
mod element;
mod error;
mod foreign;
#[cfg(test)]
mod gap;
mod here;
mod link;
mod look;
mod neighbour;
mod nfnetlink;
#[cfg(test)]
mod outward;
mod pool;
mod program;
#[cfg(test)]
mod released;
mod rules;
#[cfg(test)]
mod scale;
#[cfg(test)]
mod shaped;
mod shaper;
mod standing;
mod subnet;
mod sysctl;
mod table;
mod tend;
#[cfg(test)]
mod tended;
#[cfg(test)]
mod testbed;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod walls;
mod watch;

pub use egress::{EgressRule, Posture, Traffic};
pub use error::NetworkError;
pub use look::{
    dropping_chains, is_iptables, strange_links, try_accepts, try_bandwidth, try_link, try_rules,
};
pub use shaper::Bandwidth;
pub use standing::again as standing_again;
pub use subnet::Lease;
pub use table::{HostService, Transport};

use super::blocking;
use crate::random;
use here::Here;
use link::Links;
use nix::net::if_::if_nametoindex;
use pool::Pool;
use rules::Rules;
use standing::{Kept, Standing};
use std::collections::{BTreeSet, HashSet};
use std::error::Error;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use subnet::Subnet;
use table::{HostAccess, Policy, VISITS_MAX};
use tend::Tending;
use tokio::time::sleep;
use tracing::{debug, warn};
use watch::{Changes, Watch};

/// How long an address block rests: a namespace takes some 30 ms to go, packets in flight longer.
const ADDRESS_REST: Duration = Duration::from_secs(5);

/// How long a dead container's link is left to die with its namespace: less than its addresses rest.
const NAMESPACE_REST: Duration = Duration::from_secs(3);

/// What the operator decides.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Address and prefix length that the containers' /30 blocks are cut from, e.g. 10.254.0.0/22.
    /// No other address of this host may lie inside.
    pub pool: (Ipv4Addr, u8),
    /// Largest packet of a container's link in bytes; without it, that of the link with the local
    /// address.
    pub mtu: Option<u32>,
    /// TCP ports of the host to be mapped. Outside of `net.ipv4.ip_local_port_range`, and nobody else's.
    pub ports: RangeInclusive<u16>,
    /// How long a port rests before another instance gets it: as long as a router may go on using a
    /// route that it was not told the end of.
    pub port_quarantine: Duration,
    /// The address under which others reach this host; found out when `None`.
    pub local_ip: Option<Ipv4Addr>,
    /// Whether containers may open connections to all services of the host itself.
    pub allow_host_access: bool,
    /// To which, where not to all.
    pub host_allow: Vec<HostService>,
    /// What a container without rules may reach outside.
    pub egress: Posture,
    /// First and last addresses outside that all containers may reach.
    pub allow: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Those that none may reach without a rule of its own.
    pub deny: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// How many connections others may have open to a container at once.
    pub visits: u32,
    /// Where it is kept which address and port were given out last and which rest, so that the next agent
    /// does not give out what this one has just released; nowhere when `None`.
    pub standing: Option<PathBuf>,
}

impl Default for NetworkConfig {
    /// 256 containers, 4000 ports above the kernel's ephemeral ones; 150 s are gorouter's 120 s for
    /// a stale route and its 30 s between two looks.
    fn default() -> Self {
        Self {
            pool: (Ipv4Addr::new(10, 254, 0, 0), 22),
            mtu: None,
            ports: 61_001..=65_000,
            port_quarantine: Duration::from_secs(150),
            local_ip: None,
            allow_host_access: false,
            host_allow: Vec::new(),
            egress: Posture::Open,
            allow: Vec::new(),
            deny: Vec::new(),
            visits: VISITS_MAX,
            standing: None,
        }
    }
}

/// A container that has its place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The container.
    pub handle: String,
    /// Its addresses.
    pub lease: Lease,
    /// Host port and container port of every mapping.
    pub ports: Vec<(u16, u16)>,
    /// What it may reach outside.
    pub egress: Vec<EgressRule>,
    /// How much it may receive and send.
    pub bandwidth: Bandwidth,
}

impl Attached {
    /// A container without ports, rules and limits.
    pub fn new(handle: &str, lease: Lease) -> Self {
        Self {
            handle: handle.to_owned(),
            lease,
            ports: Vec::new(),
            egress: Vec::new(),
            bandwidth: Bandwidth::default(),
        }
    }
}

/// The network of this host, in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Network {
    links: Arc<Links>,
    rules: Arc<Rules>,
    watch: Arc<Watch>,
    tending: Tending,
    pools: Arc<Mutex<Pools>>,
    standing: Arc<Standing>,
    pool: Subnet,
    first_port: u16,
    here: Arc<Here>,
}

#[derive(Debug)]
struct Pools {
    /// Number n is the n-th block of four addresses.
    blocks: Pool,
    /// Number n is the n-th port.
    ports: Pool,
}

impl Network {
    /// Makes this host ready: forwarding, the table, and accepts where others' rules would drop what
    /// ours let pass. Elements of a former agent stay until [`Network::rebuild`]. From here on a thread and a task
    /// mend what others take away, until this is dropped.
    ///
    /// # Errors
    /// When the pool is unfit, `nft` is missing or refuses, or `/proc/sys/net` is read-only.
    pub async fn open(config: &NetworkConfig) -> Result<Self, NetworkError> {
        let pool = Subnet::parse(config.pool)?;
        let links = Arc::new(Links::open().await?);
        let ends = links.host_ends().await?;
        if let Some(stranger) = ends.into_values().find(|end| end.handle.is_none()) {
            return Err(NetworkError::NameInUse(stranger.link));
        }
        let addresses = links.addresses().await?;
        if let Some(taken) = addresses.iter().find(|taken| pool.contains(taken.address)) {
            return Err(NetworkError::PoolInUse {
                pool: pool.to_string(),
                address: taken.address,
                link: taken.link.clone(),
            });
        }
        let here = Arc::new(Here::new(config.local_ip, config.mtu, &addresses));
        let uplinks = here.uplinks(&addresses).map(str::to_owned).collect();
        let policy = policy(config, uplinks);
        // Before the host is changed: what may fail.
        let events = tend::events().map_err(|errno| NetworkError::Watch(errno.into()))?;
        let ranges = config.clone();
        let (rules, watch, pools, standing) = blocking(move || {
            let changes = Changes::open()?;
            let (rules, so) = Rules::open(policy, &changes)?;
            let rules = Arc::new(rules);
            let kept = Arc::downgrade(&rules);
            let watch = Watch::start(changes, so, move |changes| {
                kept.upgrade().is_none_or(|rules| rules.mend(changes))
            })?;
            let (pools, standing) = Pools::open(pool, &ranges);
            Ok((rules, watch, pools, standing))
        })
        .await?;
        let watch = Arc::new(watch);
        Ok(Self {
            tending: Tending::start(
                events,
                Arc::clone(&links),
                Arc::clone(&here),
                &rules,
                &watch,
            ),
            links,
            rules,
            watch,
            pools: Arc::new(Mutex::new(pools)),
            standing: Arc::new(standing),
            pool,
            first_port: *config.ports.start(),
            here,
        })
    }

    /// The address under which others reach this host and what it maps. It changes where none is configured and
    /// the host has it no longer.
    pub fn local_ip(&self) -> Ipv4Addr {
        self.here.address()
    }

    /// For how long something that others changed has not been put back, though that was tried; nothing where all is
    /// as it shall be.
    pub fn unmended(&self) -> Duration {
        self.watch.unmended().max(self.tending.unmended())
    }

    /// Largest packet of a container's link, in bytes; the container's end must have the same.
    pub fn mtu(&self) -> u32 {
        self.here.mtu()
    }

    /// Addresses and a host port for a new container: both or none.
    ///
    /// # Errors
    /// [`NetworkError::NoAddress`], [`NetworkError::NoPort`].
    pub fn reserve(&self) -> Result<(Lease, u16), NetworkError> {
        let mut pools = self.pools();
        let now = Instant::now();
        let Some(block) = pools.blocks.take(now) else {
            return Err(NetworkError::NoAddress {
                in_use: pools.blocks.in_use(),
                resting: pools.blocks.resting(),
            });
        };
        match pools.ports.take(now) {
            Some(port) => {
                self.keep();
                Ok((self.pool.block(block), self.port(port)))
            }
            None => {
                pools.blocks.untake(block, now);
                Err(no_port(&pools))
            }
        }
    }

    /// Whether [`Self::reserve`] would have addresses and a port to take.
    pub fn has_room(&self) -> bool {
        let (pools, now) = (self.pools(), Instant::now());
        pools.blocks.has_free(now) && pools.ports.has_free(now)
    }

    /// Takes back what [`Self::reserve`] gave and nobody ever used: it need not rest.
    pub fn unreserve(&self, lease: Option<&Lease>, port: Option<u16>) {
        let mut pools = self.pools();
        let now = Instant::now();
        if let Some(lease) = lease {
            pools.blocks.untake(self.pool.number(lease.container), now);
        }
        if let Some(port) = port {
            pools.ports.untake(self.port_number(port), now);
        }
    }

    /// Claims the addresses of a container that lives already.
    ///
    /// # Errors
    /// [`NetworkError::Taken`] when another one has them.
    pub fn adopt_lease(&self, lease: &Lease) -> Result<(), NetworkError> {
        let adopted = self.pools().blocks.adopt(self.pool.number(lease.container));
        adopted.map_err(|pool::InUse| NetworkError::Taken(lease.container.to_string()))
    }

    /// Gives addresses back, to rest 5 s. After [`Network::detach`].
    pub fn release(&self, lease: Lease) {
        self.pools()
            .blocks
            .release(self.pool.number(lease.container), Instant::now());
        self.keep();
    }

    /// A host port for one more mapping.
    ///
    /// # Errors
    /// [`NetworkError::NoPort`].
    pub fn take_port(&self) -> Result<u16, NetworkError> {
        let mut pools = self.pools();
        match pools.ports.take(Instant::now()) {
            Some(number) => {
                self.keep();
                Ok(self.port(number))
            }
            None => Err(no_port(&pools)),
        }
    }

    /// Claims the port of a mapping that exists already, or existed until its container died.
    ///
    /// # Errors
    /// [`NetworkError::Taken`] when another one has it.
    pub fn adopt_port(&self, port: u16) -> Result<(), NetworkError> {
        let adopted = self.pools().ports.adopt(self.port_number(port));
        adopted.map_err(|pool::InUse| NetworkError::Taken(format!("port {port}")))
    }

    /// Gives a port back, to rest for [`NetworkConfig::port_quarantine`]. After [`Network::detach`].
    pub fn release_port(&self, port: u16) {
        self.pools()
            .ports
            .release(self.port_number(port), Instant::now());
        self.keep();
    }

    /// Links the namespace `netns` to this host: there is then a link `eth0` in it, down and without
    /// an address, and the container may speak from the lease's address, go where its rules allow, and
    /// receive and send as much as it may. Undone on failure, but not when the future is dropped half-way.
    ///
    /// # Errors
    /// When the kernel refuses, also when a link for this handle is there already.
    pub async fn attach(
        &self,
        container: Attached,
        netns: BorrowedFd<'_>,
    ) -> Result<(), NetworkError> {
        let (handle, into) = (container.handle.clone(), container.bandwidth.into);
        let link = link::name(&handle);
        let lease = &container.lease;
        self.links.create(&handle, netns, lease, self.mtu()).await?;
        let shaped = match into {
            Some(rate) => self.links.shape(&link, Some(rate)).await,
            None => Ok(()),
        };
        let added = match shaped {
            Ok(()) => self.with(move |rules| rules.attach(container)).await,
            refused => refused,
        };
        if added.is_err() {
            // The first error is the one to tell.
            let _ = self.links.delete(&link).await;
        }
        added
    }

    /// Changes how much an attached container may receive and send, without a moment in which it may do
    /// more than before and afterwards.
    ///
    /// # Errors
    /// When the kernel refuses; it may receive as much as was asked for then.
    pub async fn limit(&self, handle: &str, bandwidth: Bandwidth) -> Result<(), NetworkError> {
        let turn = self.links.turn().await;
        let link = link::name(handle);
        self.links.shape(&link, bandwidth.into).await?;
        let of = handle.to_owned();
        let limited = self.with(move |rules| {
            // Also where nobody waits for it any more.
            let _turn = turn;
            rules.limit(&of, bandwidth)
        });
        limited.await
    }

    /// How much a container may receive and send, as the kernel has it.
    ///
    /// # Errors
    /// When its link is gone.
    pub async fn bandwidth(&self, handle: &str, lease: &Lease) -> Result<Bandwidth, NetworkError> {
        let container = lease.container;
        Ok(Bandwidth {
            into: self.links.shaped(&link::name(handle)).await?,
            out: self.with(move |rules| rules.rate(container)).await?,
        })
    }

    /// Leads a TCP port of every address of this host, 127.0.0.1 included, into a container: one
    /// netlink message.
    ///
    /// # Errors
    /// When the port leads elsewhere already, or the container is not attached.
    pub async fn map_port(
        &self,
        handle: &str,
        host_port: u16,
        container_port: u16,
    ) -> Result<(), NetworkError> {
        debug!(handle, host_port, container_port, "mapping a port");
        let handle = handle.to_owned();
        let pair = (host_port, container_port);
        self.with(move |rules| rules.map(&handle, pair)).await
    }

    /// Where blocking is allowed.
    async fn with<T: Send + 'static>(&self, work: impl FnOnce(&Rules) -> T + Send + 'static) -> T {
        let rules = Arc::clone(&self.rules);
        blocking(move || work(&rules)).await
    }

    /// Takes away what [`Network::attach`] and [`Network::map_port`] added to the table, and what the
    /// kernel remembers of its connections; what is not there is no error. The link dies with the
    /// container's namespace. One netlink message, or two when something was absent, and some more for
    /// many rules. A refusal is logged, and what was left goes with a mending at once: neither port nor
    /// connection must lead to the next one who gets the address.
    pub async fn detach(&self, container: &Attached) {
        let handle = &container.handle;
        let of = container.clone();
        let detached = self.with(move |rules| {
            let detached = rules.detach(&of);
            // Afterwards: until then it may make new ones.
            (detached, rules.forget(of.lease.container))
        });
        let (detached, forgotten) = detached.await;
        if let Err(error) = detached {
            warn!(
                handle,
                error = &error as &dyn Error,
                "a container's network rules were left"
            );
            self.watch.wake();
        }
        if let Err(error) = forgotten {
            warn!(
                handle,
                error = &error as &dyn Error,
                "connections of a container were not forgotten"
            );
        }
    }

    /// Makes the table say exactly what it shall for the containers in `live`: their connections go on,
    /// elements of all others are gone. Where the table was missing, connections that it refuses end. What
    /// others have changed of the links is put back soon.
    ///
    /// # Errors
    /// When `nft` refuses.
    pub async fn rebuild(&self, live: &[Attached]) -> Result<(), NetworkError> {
        let live = live.to_vec();
        let rebuilt = self.with(move |rules| rules.rebuild(live)).await;
        self.tending.look_at_all();
        rebuilt
    }

    /// Removes the link of a container that is dead, if it is still there: the kernel takes its namespace
    /// apart in its own time, and until then the name is taken.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn remove_link(&self, handle: &str) -> Result<(), NetworkError> {
        self.links.delete(&link::name(handle)).await
    }

    /// Sees to it that the link of a container that is dead goes before its addresses are somebody else's: whoever looks
    /// into the namespace (`nsenter`, a capture) keeps that. Never waits.
    pub fn see_off(&self, handle: &str) {
        let name = link::name(handle);
        let Ok(index) = if_nametoindex(name.as_str()) else {
            return;
        };
        let links = Arc::clone(&self.links);
        tokio::spawn(async move {
            sleep(NAMESPACE_REST).await;
            // By its number: a later one has the name, where a start was cut off and is made again.
            if if_nametoindex(name.as_str()) != Ok(index) {
                return;
            }
            warn!(
                link = name,
                "somebody holds the network namespace of a dead container: its link is removed"
            );
            if let Err(error) = links.delete(&name).await {
                let error = &error as &dyn Error;
                warn!(
                    error,
                    "the link of a dead container is left: who gets its addresses may not be reached"
                );
            }
        });
    }

    /// Removes the links of containers that nobody knows; gives back how many. Each takes the kernel
    /// tens of milliseconds.
    ///
    /// # Errors
    /// The first one, after all have been tried.
    pub async fn sweep_links(&self, known: &HashSet<String>) -> Result<usize, NetworkError> {
        let mut outcome = Ok(0);
        let ends = self.links.host_ends().await?.into_values();
        for handle in ends.filter_map(|end| end.handle) {
            if known.contains(&handle) {
                continue;
            }
            match (self.links.delete(&link::name(&handle)).await, &mut outcome) {
                (Ok(()), Ok(count)) => *count += 1,
                (Err(error), Ok(_)) => outcome = Err(error),
                (_, Err(_)) => {}
            }
        }
        outcome
    }

    /// Leaves the host as it was before the first agent came: no table, no accepts in others' chains,
    /// forwarding off if it was and nobody came who needs it. Links go with their containers. Only of ports that
    /// rest a word stays: routers do not forget them any sooner. What is refused is logged, and the rest done.
    pub async fn close(&self) {
        self.tending.end();
        let kept = {
            let mut pools = self.pools();
            // Routers may know a port whose container was removed without being asked (a shutdown without a bus).
            pools.ports.release_all(Instant::now());
            pools.kept(self.pool, self.first_port)
        };
        self.with(Rules::close).await;
        let watch = Arc::clone(&self.watch);
        blocking(move || watch.end()).await;
        // Last: it may wait for the disk.
        let standing = Arc::clone(&self.standing);
        if let Err(error) = blocking(move || standing.finish(&kept)).await {
            warn!(%error, "where the pools stand was not kept, or left");
        }
    }

    /// Keeps for the next agent what was given out last and what rests, in the background.
    fn keep(&self) {
        let (pools, pool, first_port) = (Arc::clone(&self.pools), self.pool, self.first_port);
        self.standing.keep(move || {
            let pools = pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools.kept(pool, first_port)
        });
    }

    fn port(&self, number: u32) -> u16 {
        nth_port(self.first_port, number)
    }

    fn port_number(&self, port: u16) -> u32 {
        u32::from(port).wrapping_sub(u32::from(self.first_port))
    }

    fn pools(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pools {
    /// Empty pools that begin behind what an agent gave out last, at random where it did not say or
    /// where the ranges were others, and let rest what rested. Blocks.
    fn open(pool: Subnet, config: &NetworkConfig) -> (Self, Standing) {
        let ports = u32::try_from(config.ports.len()).unwrap_or(u32::MAX);
        let mut pools = Self {
            blocks: Pool::new(pool.blocks(), ADDRESS_REST),
            ports: Pool::new(ports, config.port_quarantine),
        };
        let (standing, kept) = Standing::open(config.standing.clone());
        if config.standing.is_none() {
            return (pools, standing);
        }
        let block = |address: Ipv4Addr| pool.contains(address).then(|| pool.number(address));
        let port = |port: u16| {
            let ours = config.ports.contains(&port);
            ours.then(|| u32::from(port - config.ports.start()))
        };
        let (last_address, last_port) = kept.last.unzip();
        let last_block = last_address.and_then(block).unwrap_or_else(random::u32);
        pools.blocks.begin_behind(last_block);
        let last_port = last_port.and_then(port).unwrap_or_else(random::u32);
        pools.ports.begin_behind(last_port);
        let (now, today) = (Instant::now(), since_1970());
        // Where the clock was set back, all of it.
        let rested = |when| Duration::from_secs(today.saturating_sub(when));
        for (address, when) in kept.addresses {
            if let Some(number) = block(address) {
                pools.blocks.let_rest(number, rested(when), now);
            }
        }
        for (outer, when) in kept.ports {
            if let Some(number) = port(outer) {
                pools.ports.let_rest(number, rested(when), now);
            }
        }
        (pools, standing)
    }

    /// What the next agent should know.
    fn kept(&self, pool: Subnet, first_port: u16) -> Kept {
        let (now, today) = (Instant::now(), since_1970());
        let when = |rested: Duration| today.saturating_sub(rested.as_secs());
        let (blocks, ports) = (self.blocks.rested(now), self.ports.rested(now));
        let address = |number| pool.block(number).container;
        let port = |number| nth_port(first_port, number);
        Kept {
            last: Some((address(self.blocks.last()), port(self.ports.last()))),
            addresses: blocks
                .map(|(number, rested)| (address(number), when(rested)))
                .collect(),
            ports: ports
                .map(|(number, rested)| (port(number), when(rested)))
                .collect(),
        }
    }
}

fn policy(config: &NetworkConfig, uplinks: BTreeSet<String>) -> Policy {
    Policy {
        host: if config.allow_host_access {
            HostAccess::All
        } else {
            HostAccess::Only(config.host_allow.clone())
        },
        posture: config.egress,
        allow: config.allow.clone(),
        deny: config.deny.clone(),
        visits: config.visits,
        uplinks,
    }
}

fn nth_port(first: u16, number: u32) -> u16 {
    u16::try_from(number).map_or(u16::MAX, |number| first.wrapping_add(number))
}

/// By the host's clock, in seconds.
fn since_1970() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn no_port(pools: &Pools) -> NetworkError {
    NetworkError::NoPort {
        in_use: pools.ports.in_use(),
        resting: pools.ports.resting(),
    }
}
