//! The agent's life from its configuration to its last word, as a list of steps.

use crate::bus::{self, Access, AccessError, Surroundings};
use crate::cli;
use crate::config::{self, Config, ConfigError, Overrides};
use crate::engine::{DiskWay, Engine, EngineConfig, NetworkConfig};
use crate::host::cgroups::{CgroupError, Cgroups};
use crate::host::depot::disk::Space;
use crate::host::scribe::Scribes;
use crate::host::{blocking, depot};
use crate::instances::crashes::Crashes;
use crate::instances::depth::Depth;
use crate::instances::droplets::{Droplets, FetchOptions};
use crate::instances::instance::Change;
use crate::instances::outlet::{self, Outlet};
use crate::instances::record::{Records, make_private, write_durably};
use crate::instances::routes::Routes;
use crate::instances::stable::{self, Ask, Duty, Farewell, Stable};
use crate::instances::totals::Totals;
use crate::instances::world::World;
use crate::metrics::{self, Sources};
use crate::quiet;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use nix::unistd::User;
use std::collections::HashSet;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

/// What a server may take to confirm the last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What calls to the kernel may take that were begun.
const LAST_CALLS: Duration = Duration::from_secs(5);

/// How long the locks of an agent that was killed may still be held, and how often that is looked at.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The file in the base directory that its agent has locked.
const LOCK: &str = "lock";

/// The abstract socket that an agent holds.
const HOST_LOCK: &str = "ostler-agent";

/// Why an agent ends that a new start alone does not help. Each has an exit code of its own, which the systemd unit
/// names: such an agent is not started again.
#[derive(Debug, thiserror::Error)]
pub enum Hopeless {
    /// What the configuration file says.
    #[error(transparent)]
    Config(ConfigError),
    /// What the flag, the environment or a context say of the bus.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// Another agent has this host's id.
    #[error("{0}")]
    Cloned(String),
}

impl Hopeless {
    /// Of a wrong configuration: `EX_CONFIG` of sysexits.h(3head).
    pub const WRONG: u8 = 78;

    /// Of a cloned host: the first number behind those of sysexits.h(3head).
    pub const CLONED: u8 = 79;

    /// The exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Access(_) => Self::WRONG,
            Self::Cloned(_) => Self::CLONED,
        }
    }
}

/// A file or a directory that is not there may come: its disk may be mounted late.
fn unusable(error: ConfigError) -> Box<dyn Error> {
    match error {
        ConfigError::Unreadable { .. } | ConfigError::NoStack { .. } => error.into(),
        ConfigError::Malformed { .. } | ConfigError::Invalid { .. } => {
            Hopeless::Config(error).into()
        }
    }
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Threads that run tasks. The agent waits far more than it computes.
const WORKERS: usize = 2;

/// Where whoever runs this is at home, as the host's users say.
fn home() -> Option<String> {
    let user = User::from_uid(nix::unistd::geteuid()).ok().flatten()?;
    user.dir.into_os_string().into_string().ok()
}

/// `ostler agent`.
///
/// # Errors
/// Whatever keeps the agent from starting, [`Hopeless`] or not; once it runs, nothing ends it but a signal.
pub fn agent(path: &Path, overrides: Overrides) -> Outcome<()> {
    let config = config::load(path, overrides, host_memory_mb()).map_err(unusable)?;
    let access = access(&config).map_err(Hopeless::from)?;
    if nix::unistd::geteuid().is_root() {
        // While there is one thread: it forks.
        cli::refuse_weaker(&config)?;
    }
    within_runtime(async {
        let locks = prepare(&config).await?;
        let outcome = run(config, access).await;
        // They go with the process and the last of its threads: one that waits for the disk may still write.
        std::mem::forget(locks);
        outcome
    })
}

/// Where the bus is and as whom, from the configuration and this process's environment.
///
/// # Errors
/// What of that makes no sense.
pub fn access(config: &Config) -> Result<Access, AccessError> {
    let around = Surroundings::of(|name| {
        let said = std::env::var(name).ok();
        // systemd gives a service without `User=` no HOME (systemd.exec(5)).
        said.or_else(|| (name == "HOME").then(home).flatten())
    });
    Access::gather(&config.nats, around)
}

/// `ostler clean`.
///
/// # Errors
/// If an agent runs, or something could not be removed.
pub fn clean(path: &Path, overrides: Overrides) -> Outcome<()> {
    let config = config::load_to_clean(path, overrides, host_memory_mb())?;
    within_runtime(async {
        let _locks = prepare(&config).await?;
        clear(&config).await
    })
}

/// Removes what an agent left, and what it keeps but for the host's id.
async fn clear(config: &Config) -> Outcome<()> {
    let engine_config = EngineConfig {
        // Nothing is made that would want bounds: a way that has ceased to work here keeps nobody from cleaning up.
        disk: DiskWay::Auto,
        ..engine_config(config)
    };
    let engine = Engine::open(engine_config).await?;
    let swept = engine.sweep(&HashSet::new()).await;
    engine.close().await;
    if !swept.left.is_empty() {
        return Err(format!("not everything could be removed: {}", swept.left.join("; ")).into());
    }
    for name in [
        "instances",
        "containers",
        "droplets",
        "crashes",
        "answers",
        "templates",
        "trash",
        stable::KEPT,
        metrics::TRIAL,
        LOCK,
    ] {
        remove(&config.base.join(name))?;
    }
    println!(
        "removed {} containers and what an agent keeps in {}, but the host's id and which ports rest",
        swept.cleared,
        config.base.display()
    );
    Ok(())
}

fn remove(path: &Path) -> Outcome<()> {
    let result = if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", path.display()).into())
        }
        _ => Ok(()),
    }
}

/// Runs it to its end. Calls that wait in the kernel (a disk that hangs) keep no agent from leaving.
fn within_runtime<T>(work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    crate::log::begin()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_timeout(LAST_CALLS);
    outcome
}

/// What an agent has for itself as long as it lives: the host, the base directory, and the parent of control groups.
type Locks = (UnixListener, [Flock<File>; 2]);

/// Makes the base directory and takes it, the host and the control groups for this process. An agent that was killed a moment
/// ago may live on for as long as a helper of its takes to begin: that is waited for.
async fn prepare(config: &Config) -> Outcome<Locks> {
    if !nix::unistd::geteuid().is_root() {
        return Err("must be run as root: it makes namespaces, mounts and network links".into());
    }
    make_private(&config.base)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let taken = take(config);
        if taken.is_ok() {
            return taken;
        }
        let lasting = taken.as_ref().err().and_then(|error| error.downcast_ref());
        let lasting = lasting.is_some_and(|error| !matches!(error, CgroupError::Claimed(_)));
        if lasting || Instant::now() >= deadline {
            return taken.map_err(|error| who_else().unwrap_or(error));
        }
        sleep(LOCK_PAUSE).await;
    }
}

/// The host first, as long as it is another's nothing is made.
fn take(config: &Config) -> Outcome<Locks> {
    let host = take_host()?;
    let base = take_base(&config.base)?;
    Ok((host, [base, Cgroups::claim(&config.cgroup_parent)?]))
}

fn take_base(base: &Path) -> Outcome<Flock<File>> {
    let path = base.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| format!("another agent holds {} ({errno})", path.display()).into())
}

/// Two agents in one network namespace would take each other's links and rules for leftovers. An
/// abstract socket belongs to the namespace and is free again when its holder has ended (unix(7)).
fn take_host() -> Outcome<UnixListener> {
    let name = SocketAddr::from_abstract_name(HOST_LOCK)?;
    Ok(UnixListener::bind_addr(&name)?)
}

/// Which process has the host, if one has. Never waits: whoever holds it answers nobody.
fn who_else() -> Option<Box<dyn Error>> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
    let address = UnixAddr::new_abstract(HOST_LOCK.as_bytes()).ok()?;
    let pid = match connect(socket.as_raw_fd(), &address) {
        Ok(()) => getsockopt(&socket, PeerCredentials).ok()?.pid().to_string(),
        Err(Errno::EAGAIN) => "?".to_owned(),
        Err(_) => return None,
    };
    Some(
        format!(
            "process {pid} is the agent of this host already, or cleans it up: end it, or run this one in another network namespace, with a `base` and a `cgroup.parent` of its own"
        )
        .into(),
    )
}

/// The host's durable id: made once, kept in `<base>/id`.
fn host_id(base: &Path) -> Outcome<String> {
    let path = base.join("id");
    match std::fs::read_to_string(&path) {
        Ok(id) if messages::subjects::is_token(id.trim()) => Ok(id.trim().to_owned()),
        Ok(id) => Err(format!(
            "{} holds {id:?}, which is no host id: remove the file to have a new one made",
            path.display()
        )
        .into()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = crate::random::uuid();
            write_durably(base, "id", id.as_bytes())?;
            Ok(id)
        }
        // Under another id nobody would find what is here.
        Err(error) => Err(format!(
            "this host's id in {} cannot be read: {error}",
            path.display()
        )
        .into()),
    }
}

async fn run(mut config: Config, access: Access) -> Outcome<()> {
    let mut signals = Signals::listen()?;
    let page = metrics::listen(config.metrics).await?;
    // Its port may have been left to the kernel.
    config.metrics = page.as_ref().map(TcpListener::local_addr).transpose()?;
    tokio::spawn(quiet::tell());
    let id = host_id(&config.base)?;
    if config.stacks.is_empty() {
        warn!("no stack is named in [stacks]: every start is refused");
    }
    let engine = Engine::open(engine_config(&config)).await?;
    info!(id, local_ip = %engine.local_ip(), "the engine is ready");
    let (outlet, inlet) = outlet::outlet();
    let (changes, changed) = mpsc::unbounded_channel();
    let world = Arc::new(world(config, id, engine, (outlet, changes))?);
    let lock = world.config.base.join(LOCK);
    tokio::spawn(world.scribes.clone().look_after(lock));
    let link = inlet.link.subscribe();
    let (twin, twins) = oneshot::channel();
    let client = bus::open(access, &world.id, inlet, twin).await?;
    let stable = Stable::open(Arc::clone(&world), changed).await?;
    let (asks, inbox) = mpsc::channel(stable::MAILBOX);
    let (orders, ordered) = watch::channel(Duty::Serving);
    let (relief, mut relieved) = mpsc::channel(1);
    let stable = tokio::spawn(stable.run(inbox, link, ordered, relief));
    let (leave, leaving) = oneshot::channel();
    let tally = Arc::new(bus::Tally::begin());
    // Until this function ends.
    let _serving = serve(page, &world, &tally, &asks);
    let told = (Arc::clone(&world), tally);
    let mut receiver = tokio::spawn(bus::receive(client, told, asks, leaving));
    let parting = tokio::select! {
        parting = order(&mut signals, &orders, &mut relieved) => parting,
        twin = found(twins) => return Err(Hopeless::Cloned(cloned(&world, &twin)).into()),
        ended = &mut receiver => {
            ended??;
            return Err("the bus client has closed: apps run on, start the agent again".into());
        }
    };
    info!(?parting, "leaving");
    let _ended = leave.send(());
    if let Err(error) = stable.await {
        error!(%error, "the stable ended badly");
    }
    // The last answers and words reach the server, if there is one.
    drop(timeout(LAST_WORDS, receiver).await);
    if parting.stops().is_some() {
        world.unless_disk_hangs(leave_nothing(&world)).await;
    } else {
        // What is under way gets to the disk: the next agent shall not find what is gone.
        drop(timeout(LAST_WORDS, world.scribes.rest()).await);
    }
    drop(timeout(LAST_WORDS, world.outlet.settle()).await);
    Ok(())
}

/// What all instances share, with what stands on disk.
fn world(
    config: Config,
    id: String,
    engine: Engine,
    (outlet, changes): (Outlet, mpsc::UnboundedSender<Change>),
) -> Outcome<World> {
    let lifetime = config.instance.crash_lifetime;
    let records = Records::open(&config.base)?;
    Ok(World {
        id,
        droplets: Droplets::open(&config.base, fetch_options(&config, &engine))?,
        crashes: Crashes::open(&config.base, config.crashes.clone(), lifetime)?,
        depth: Depth::of(records.clone(), &config.base),
        records,
        boot_id: depot::boot_id()?,
        engine,
        scribes: Scribes::default(),
        starts: Semaphore::new(config.resources.parallel_starts),
        routes: Routes::new(outlet.clone()),
        totals: Totals::default(),
        outlet,
        changes,
        config,
    })
}

/// Answers for metrics and health, if `page` is a place for that, until what this returns is dropped.
fn serve(
    page: Option<TcpListener>,
    world: &Arc<World>,
    tally: &Arc<bus::Tally>,
    asks: &mpsc::Sender<Ask>,
) -> JoinSet<()> {
    let mut serving = JoinSet::new();
    if let Some(page) = page {
        let sources = Sources {
            world: Arc::clone(world),
            tally: Arc::clone(tally),
            asks: asks.downgrade(),
        };
        serving.spawn(metrics::serve(page, sources));
    }
    serving
}

/// Passes on what signals ask for, until the agent is to go: by a signal, or because an evacuation is over.
async fn order(
    signals: &mut Signals,
    orders: &watch::Sender<Duty>,
    relieved: &mut mpsc::Receiver<()>,
) -> Farewell {
    loop {
        let duty = tokio::select! {
            duty = signals.next() => duty,
            Some(()) = relieved.recv() => Duty::Parting(Farewell::Evacuated),
        };
        orders.send_modify(|ordered| *ordered = duty.max(*ordered));
        if let Duty::Parting(parting) = duty {
            return parting;
        }
    }
}

/// Why an agent does not start on a bus where another one has its id.
fn cloned(world: &World, twin: &bus::Twin) -> String {
    let (id, base) = (&world.id, world.config.base.display());
    let here = world.engine.local_ip();
    let there = twin
        .ip
        .as_deref()
        .unwrap_or("an address that it does not tell");
    format!(
        "another agent, at {there}, has the id of this one, at {here}: {id}. If this machine is a copy of that one, run `ostler clean` here, remove {base}/id and start again; else end that one first"
    )
}

/// Another agent with this id; never, if there is none.
async fn found(twins: oneshot::Receiver<bus::Twin>) -> bus::Twin {
    match twins.await {
        Ok(twin) => twin,
        Err(_) => std::future::pending().await,
    }
}

/// All instances are gone: so is everything else but the host's id and its answers.
async fn leave_nothing(world: &World) {
    world.engine.clone().close().await;
    world.droplets.stop().await;
    let (droplets, base) = (world.droplets.clone(), world.config.base.clone());
    blocking(move || {
        if let Err(error) = droplets.remove_all() {
            error!(%error, "something stays");
        }
        for name in [
            "templates",
            "instances",
            "crashes",
            "trash",
            stable::KEPT,
            metrics::TRIAL,
        ] {
            if let Err(error) = remove(&base.join(name)) {
                error!(%error, "something stays");
            }
        }
        // Not what is in it: it is repeated to whoever asks again.
        drop(std::fs::remove_dir(base.join("answers")));
        // Not what is in it: a container that resisted may still use it, and is found by it.
        if let Err(error) = std::fs::remove_dir(base.join("containers")) {
            error!(%error, "the containers' directory stays");
        }
    })
    .await;
}

/// The signals that say what the agent shall do.
struct Signals([(Duty, Signal); 6]);

impl Signals {
    /// From here on they are noticed, also during the start.
    fn listen() -> std::io::Result<Self> {
        let shutdown = Duty::Parting(Farewell::Shutdown);
        Ok(Self([
            (shutdown, signal(SignalKind::terminate())?),
            (shutdown, signal(SignalKind::interrupt())?),
            (shutdown, signal(SignalKind::quit())?),
            (
                Duty::Parting(Farewell::Leave),
                signal(SignalKind::hangup())?,
            ),
            (Duty::Evacuating, signal(SignalKind::user_defined2())?),
            (Duty::Drained, signal(SignalKind::user_defined1())?),
        ]))
    }

    async fn next(&mut self) -> Duty {
        let [term, int, quit, hup, usr2, usr1] = &mut self.0;
        tokio::select! {
            // The strongest of those that came together.
            biased;
            _ = term.1.recv() => term.0,
            _ = int.1.recv() => int.0,
            _ = quit.1.recv() => quit.0,
            _ = hup.1.recv() => hup.0,
            _ = usr2.1.recv() => usr2.0,
            _ = usr1.1.recv() => usr1.0,
        }
    }
}

fn engine_config(config: &Config) -> EngineConfig {
    EngineConfig {
        base: config.base.clone(),
        helpers: config.helpers.clone(),
        cgroup_parent: config.cgroup_parent.clone(),
        network: NetworkConfig {
            pool: config.network.pool,
            mtu: config.network.mtu,
            ports: config.network.ports.clone(),
            port_quarantine: config.network.port_quarantine,
            local_ip: config.network.local_ip,
            allow_host_access: config.network.allow_host_access,
            host_allow: config.network.host_allow.clone(),
            egress: config.network.egress,
            allow: config.network.allow.clone(),
            deny: config.network.deny.clone(),
            ..NetworkConfig::default()
        },
        spool_bytes: config.spool_bytes,
        jobs: 1 + config.hooks.files().count(),
        disk: config.instance.disk,
    }
}

fn fetch_options(config: &Config, engine: &Engine) -> FetchOptions {
    let space = Space::new(&config.base, engine_config(config).output_bytes());
    // Where nothing is bounded, nothing is promised.
    let bounded = engine.disk_left(std::iter::empty(), 1).is_some();
    FetchOptions {
        inactivity: config.droplets.inactivity,
        total: config.droplets.total,
        max_bytes: config.droplets.max_bytes,
        max_unpacked_bytes: config.droplets.max_unpacked_bytes,
        files: config.droplets.files.clone(),
        space: bounded.then_some(space),
        ..FetchOptions::default()
    }
}

/// `MemTotal` of /proc/meminfo, in MB.
pub fn host_memory_mb() -> u64 {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .map_or(8192, |kilobytes| kilobytes / 1024)
}

#[cfg(test)]
mod tests {
    use super::Hopeless;

    #[test]
    fn systemd_starts_no_hopeless_agent_again() {
        let unit = include_str!("../../packaging/ostler.service");
        let (wrong, cloned) = (Hopeless::WRONG, Hopeless::CLONED);
        let line = format!("RestartPreventExitStatus={wrong} {cloned}");
        assert!(unit.lines().any(|one| one == line), "no {line}");
        let text = include_str!("main.rs");
        for code in [wrong, cloned] {
            assert!(text.contains(&format!("with {code} if")), "--help: {code}");
        }
    }
}
