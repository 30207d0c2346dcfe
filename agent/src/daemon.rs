//! The agent's life from its configuration to its last word, as a list of steps.

use crate::bus;
use crate::config::{self, Config, Overrides};
use crate::engine::{Engine, EngineConfig, NetworkConfig};
use crate::host::{blocking, depot};
use crate::instances::droplets::{Droplets, FetchOptions};
use crate::instances::outlet;
use crate::instances::record::{Records, make_private, write_durably};
use crate::instances::stable::{self, Farewell, Stable};
use crate::instances::world::World;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use std::collections::HashSet;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

/// What a server may take to confirm the last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long the locks of an agent that was killed may still be held, and how often that is looked at.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The abstract socket that an agent holds.
const HOST_LOCK: &str = "ostler-agent";

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Threads that run tasks. The agent waits far more than it computes.
const WORKERS: usize = 2;

/// `ostler agent`.
///
/// # Errors
/// Whatever keeps the agent from starting; once it runs, nothing ends it but a signal.
pub fn agent(path: &Path, overrides: Overrides) -> Outcome<()> {
    let config = config::load(path, overrides, host_memory_mb())?;
    runtime()?.block_on(async {
        let _locks = prepare(&config.base).await?;
        run(config).await
    })
}

/// `ostler clean`.
///
/// # Errors
/// If an agent runs, or something could not be removed.
pub fn clean(path: &Path, overrides: Overrides) -> Outcome<()> {
    let config = config::load(path, overrides, host_memory_mb())?;
    runtime()?.block_on(async {
        let _locks = prepare(&config.base).await?;
        clear(&config).await
    })
}

/// Removes what an agent left, and what it keeps but for the host's id.
async fn clear(config: &Config) -> Outcome<()> {
    let engine = Engine::open(engine_config(config)).await?;
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
        "lock",
    ] {
        remove(&config.base.join(name))?;
    }
    println!(
        "removed {} containers and what an agent keeps in {}, but the host's id",
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

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
}

/// What an agent has for itself as long as it lives: the host and the base directory.
type Locks = (UnixListener, Flock<File>);

/// Makes the base directory and takes it and the host for this process. An agent that was killed a moment
/// ago may live on for as long as a helper of its takes to begin: that is waited for.
async fn prepare(base: &Path) -> Outcome<Locks> {
    if !nix::unistd::geteuid().is_root() {
        return Err("must be run as root: it makes namespaces, mounts and network links".into());
    }
    make_private(base)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let taken = take_host().and_then(|host| Ok((host, take_base(base)?)));
        if taken.is_ok() {
            return taken;
        }
        if Instant::now() >= deadline {
            return taken.map_err(|error| who_else().unwrap_or(error));
        }
        sleep(LOCK_PAUSE).await;
    }
}

fn take_base(base: &Path) -> Outcome<Flock<File>> {
    let path = base.join("lock");
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
            "process {pid} is the agent of this host already, or cleans it up: end it, or run this one in another network namespace"
        )
        .into(),
    )
}

/// The host's durable id: made once, kept in `<base>/id`.
fn host_id(base: &Path) -> Outcome<String> {
    match std::fs::read_to_string(base.join("id")) {
        Ok(id) if messages::subjects::is_token(id.trim()) => Ok(id.trim().to_owned()),
        Ok(id) => Err(format!(
            "{} holds {id:?}, which is no host id: remove the file to have a new one made",
            base.join("id").display()
        )
        .into()),
        Err(_) => {
            let id = crate::random::uuid();
            write_durably(base, "id", id.as_bytes())?;
            Ok(id)
        }
    }
}

async fn run(config: Config) -> Outcome<()> {
    let mut signals = Signals::listen()?;
    let id = host_id(&config.base)?;
    let engine = Engine::open(engine_config(&config)).await?;
    info!(id, local_ip = %engine.local_ip(), "the engine is ready");
    let droplets = Droplets::open(&config.base, fetch_options(&config))?;
    let records = Records::open(&config.base)?;
    let (outlet, inlet) = outlet::outlet();
    let link = inlet.link.subscribe();
    let client = bus::connect(&config.nats, &id, inlet.link.clone()).await?;
    let publisher = tokio::spawn(bus::publish(client.clone(), inlet));
    let (changes, changed) = mpsc::unbounded_channel();
    let world = Arc::new(World {
        id,
        boot_id: depot::boot_id()?,
        engine,
        droplets,
        records,
        outlet,
        changes,
        config,
    });
    let stable = Stable::open(Arc::clone(&world), changed).await?;
    let (asks, inbox) = mpsc::channel(stable::MAILBOX);
    let (farewell, farewell_asked) = tokio::sync::oneshot::channel();
    let stable = tokio::spawn(stable.run(inbox, link, farewell_asked));
    let (leave, leaving) = tokio::sync::oneshot::channel();
    let mut receiver = tokio::spawn(bus::receive(client, Arc::clone(&world), asks, leaving));
    let parting = tokio::select! {
        parting = signals.parting() => parting,
        ended = &mut receiver => {
            ended??;
            return Err("the bus client has closed: apps run on, start the agent again".into());
        }
    };
    info!(?parting, "leaving");
    let _ended = (farewell.send(parting), leave.send(()));
    if let Err(error) = stable.await {
        error!(%error, "the stable ended badly");
    }
    // The last answers and words reach the server, if there is one.
    drop(timeout(LAST_WORDS, receiver).await);
    if parting == Farewell::Shutdown {
        leave_nothing(&world).await;
    }
    drop(timeout(LAST_WORDS, world.outlet.settle()).await);
    publisher.abort();
    Ok(())
}

/// All instances are gone: so is everything else but the host's id.
async fn leave_nothing(world: &World) {
    world.engine.clone().close().await;
    world.droplets.stop().await;
    let (droplets, base) = (world.droplets.clone(), world.config.base.clone());
    blocking(move || {
        if let Err(error) = droplets.remove_all() {
            error!(%error, "something stays");
        }
        for name in ["answers", "templates", "instances", "trash"] {
            if let Err(error) = remove(&base.join(name)) {
                error!(%error, "something stays");
            }
        }
        // Not what is in it: a container that resisted may still use it, and is found by it.
        if let Err(error) = std::fs::remove_dir(base.join("containers")) {
            error!(%error, "the containers' directory stays");
        }
    })
    .await;
}

/// The signals that end the agent.
struct Signals {
    ending: [(Farewell, Signal); 4],
    /// The DEA's drain signals. Nothing is done at them yet, and they must not kill.
    ignored: [Signal; 2],
}

impl Signals {
    /// From here on they are noticed, also during the start.
    fn listen() -> std::io::Result<Self> {
        let ending = [
            (Farewell::Shutdown, signal(SignalKind::terminate())?),
            (Farewell::Shutdown, signal(SignalKind::interrupt())?),
            (Farewell::Shutdown, signal(SignalKind::quit())?),
            (Farewell::Leave, signal(SignalKind::hangup())?),
        ];
        let ignored = [
            signal(SignalKind::user_defined1())?,
            signal(SignalKind::user_defined2())?,
        ];
        Ok(Self { ending, ignored })
    }

    async fn parting(&mut self) -> Farewell {
        let [term, int, quit, hup] = &mut self.ending;
        let [usr1, usr2] = &mut self.ignored;
        loop {
            tokio::select! {
                _ = term.1.recv() => return term.0,
                _ = int.1.recv() => return int.0,
                _ = quit.1.recv() => return quit.0,
                _ = hup.1.recv() => return hup.0,
                _ = usr1.recv() => warn!("USR1 is not supported yet: nothing was done"),
                _ = usr2.recv() => warn!("USR2 (evacuation) is not supported yet: nothing was done"),
            }
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
            standing: None,
        },
        spool_bytes: config.spool_bytes,
    }
}

fn fetch_options(config: &Config) -> FetchOptions {
    FetchOptions {
        inactivity: config.droplets.inactivity,
        total: config.droplets.total,
        max_bytes: config.droplets.max_bytes,
        max_unpacked_bytes: config.droplets.max_unpacked_bytes,
        files: config.droplets.files.clone(),
        ..FetchOptions::default()
    }
}

/// `MemTotal` of /proc/meminfo, in MB.
fn host_memory_mb() -> u64 {
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
