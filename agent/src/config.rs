//! The configuration: one TOML file as people write it, then as the agent uses it.
//!
//! Unknown keys are refused with their line. Command-line flags win over the environment (`NATS_*`, see
//! `bus/access.rs`), which wins over the file. Every key stands with its default in `packaging/ostler.toml`, and a test
//! holds that file to this one.

use crate::engine::{Access, Bind, DiskWay};
use crate::host::network::{Bandwidth, HostService, Posture, Transport};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest base directory, in bytes: below it stands `/containers/<handle>/jobs/<n>/link.sock`, and a
/// socket's path has 108 bytes (`sun_path` in unix(7)).
pub const BASE_MAX: usize = 56;

/// How long a router keeps a route that nobody repeats (gorouter's `droplet_stale_threshold`), in seconds.
pub const ROUTER_FORGETS: u64 = 120;

/// What a person wrote wrong, where, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("cannot read the configuration {path}: {source}; a sample is packaging/ostler.toml")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a wrong type; the text names the line.
    #[error("{path}: {message}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// The parser's words, with line and column.
        message: String,
    },
    /// A stack is not there, or not yet: its file system may be mounted later.
    #[error("{path}: `stacks` names {stack} for `{name}`, which is no directory")]
    NoStack {
        /// Which file.
        path: PathBuf,
        /// The stack's name.
        name: String,
        /// Its directory.
        stack: PathBuf,
    },
    /// A value that cannot be used.
    #[error("{path}: `{key}` {problem}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// The configuration after validation: every value is usable as it stands.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything is kept; absolute.
    pub base: PathBuf,
    /// Where `wshd`, `wsh`, `iomux-spawn`, `iomux-link` and `oom` stand; absolute.
    pub helpers: PathBuf,
    /// The component's index, told to the router as `dea-<index>`.
    pub index: u32,
    /// The placement zone told in advertisements.
    pub zone: String,
    /// The bus.
    pub nats: Nats,
    /// Root file systems by the name that a start message gives.
    pub stacks: BTreeMap<String, PathBuf>,
    /// What all instances together may reserve.
    pub resources: Resources,
    /// The clock of everything that is sent again and again.
    pub intervals: Intervals,
    /// What each instance gets.
    pub instance: Instance,
    /// Addresses and ports.
    pub network: Network,
    /// Downloads.
    pub droplets: Droplets,
    /// Bytes of output kept per job before the oldest are dropped.
    pub spool_bytes: u64,
    /// How long an evacuation may wait until others have taken the instances' places.
    pub bail_out: Duration,
    /// What is kept of crashes.
    pub crashes: Crashes,
    /// Where metrics and health are served over HTTP; nowhere if absent.
    pub metrics: Option<SocketAddr>,
    /// What runs in containers at certain moments of their instances' lives.
    pub hooks: Hooks,
    /// Directories and files of the host that every container sees.
    pub bind_mounts: Vec<Bind>,
    /// The control groups' parent, below the root of each hierarchy.
    pub cgroup_parent: String,
}

/// Files of this host whose text runs in containers, and the bounds of that.
#[derive(Debug, Clone)]
pub struct Hooks {
    /// Before the app is started; if it fails, so does the start.
    pub before_start: Option<PathBuf>,
    /// Once the app is RUNNING; if it fails, so does the start.
    pub after_start: Option<PathBuf>,
    /// Before TERM, when no router sends anybody any more.
    pub before_stop: Option<PathBuf>,
    /// Once the app has ended because it was stopped.
    pub after_stop: Option<PathBuf>,
    /// Shell text that the startup script has before the app's start command.
    pub post_setup: Option<String>,
    /// Longest time that one may take.
    pub timeout: Duration,
}

impl Hooks {
    /// Those that are jobs of their own.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let start = [&self.before_start, &self.after_start];
        let stop = [&self.before_stop, &self.after_stop];
        start.into_iter().chain(stop).flatten()
    }

    /// Longest time that the hooks of a stop may take together.
    #[must_use]
    pub fn longest_stop(&self) -> Duration {
        let hooks = [&self.before_stop, &self.after_stop];
        hooks.into_iter().flatten().map(|_| self.timeout).sum()
    }
}

/// How to reach the bus and as whom, as one place says it: the file, the environment, or a context of
/// the `nats` command. What it means is found out in `bus/access.rs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nats {
    /// One or more server addresses, separated by commas; may hold a user and a password.
    pub url: Option<Secret>,
    /// The name of a context of the `nats` command, or the absolute path of its file.
    pub context: Option<String>,
    /// A user; without a password it is a token, as for the `nats` command.
    pub user: Option<Secret>,
    /// Its password.
    pub password: Option<Secret>,
    /// A token.
    pub token: Option<Secret>,
    /// A `.creds` file: a user's JWT and seed.
    pub creds: Option<PathBuf>,
    /// A file with an nkey's seed.
    pub nkey: Option<PathBuf>,
    /// A user's JWT itself.
    pub jwt: Option<Secret>,
    /// Its seed.
    pub seed: Option<Secret>,
    /// This client's certificates, in PEM.
    pub cert: Option<PathBuf>,
    /// Their key, in PEM.
    pub key: Option<PathBuf>,
    /// Whom to trust, in PEM; else whom the host trusts.
    pub ca: Option<PathBuf>,
    /// Whether TLS begins before the server's first word.
    pub tls_first: Option<bool>,
    /// What subjects for answers to this host begin with.
    pub inbox_prefix: Option<String>,
    /// How long one attempt to connect may take, as `5s`.
    pub timeout: Option<String>,
    /// `--nats`, which wins over every `url`.
    #[serde(skip)]
    pub flag: Option<Secret>,
}

/// A text that never stands in a log or an error.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// Capacity.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Megabytes of memory that instances may reserve, after overcommit.
    pub memory_mb: u64,
    /// Megabytes of disk that instances may reserve, after overcommit.
    pub disk_mb: u64,
    /// Most instances on this host, in any state.
    pub instances: usize,
    /// Most instances whose container is being made and whose app is not executed yet.
    pub parallel_starts: usize,
}

/// Repetition.
#[derive(Debug, Clone)]
pub struct Intervals {
    /// Between two `dea.heartbeat`.
    pub heartbeat: Duration,
    /// Between two `dea.advertise`.
    pub advertise: Duration,
    /// Between two `router.register` of one route.
    pub router_register: Duration,
    /// Between two looks for containers that are nobody's.
    pub orphans: Duration,
    /// Between two looks for droplets that nobody uses.
    pub droplets: Duration,
}

/// What each instance gets where its start message is silent.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Most processes and threads.
    pub pids: u64,
    /// Memory in MB per CPU share (integer division).
    pub memory_to_cpu_share_ratio: u64,
    /// Bounds of the CPU shares.
    pub cpu_shares: RangeInclusive<u64>,
    /// Most processor time, in hundredths of one processor; no cap if absent.
    pub max_cpu_percent: Option<u64>,
    /// How long an app may take to open its port.
    pub health_check_timeout: Duration,
    /// Between two looks at the port of a running app; nobody looks if absent.
    pub liveness_interval: Option<Duration>,
    /// Between TERM and KILL.
    pub stop_grace: Duration,
    /// How long a crashed instance is kept for whoever asks.
    pub crash_lifetime: Duration,
    /// The user inside the container.
    pub user: String,
    /// How much an instance may receive and send.
    pub bandwidth: Bandwidth,
    /// How disk space is limited.
    pub disk: DiskWay,
    /// Most files, directories and the like.
    pub disk_inodes: u64,
}

/// Addresses and ports.
#[derive(Debug, Clone)]
pub struct Network {
    /// First address and prefix length of the pool that containers are numbered from.
    pub pool: (Ipv4Addr, u8),
    /// Mapped ports.
    pub ports: RangeInclusive<u16>,
    /// How long a port rests after use; longer than the router's 120 s.
    pub port_quarantine: Duration,
    /// MTU of the containers' links; the uplink's if absent.
    pub mtu: Option<u32>,
    /// The address told to the router; found by asking the routing table if absent.
    pub local_ip: Option<Ipv4Addr>,
    /// Whether containers may reach all services on the host itself.
    pub allow_host_access: bool,
    /// Those that they may reach anyway.
    pub host_allow: Vec<HostService>,
    /// What an instance without egress rules may reach outside.
    pub egress: Posture,
    /// First and last addresses outside that every instance may reach.
    pub allow: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Those that none may reach without an egress rule of its own.
    pub deny: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Name servers of the containers; the host's if empty.
    pub dns: Vec<Ipv4Addr>,
}

/// Downloads.
#[derive(Debug, Clone)]
pub struct Droplets {
    /// A transfer that brings nothing for so long is given up.
    pub inactivity: Duration,
    /// Longest download.
    pub total: Duration,
    /// Largest tarball, in bytes.
    pub max_bytes: u64,
    /// Largest unpacked droplet, in bytes.
    pub max_unpacked_bytes: u64,
    /// Directories below which `file` URIs may lie.
    pub files: Vec<PathBuf>,
}

/// How much is kept of crashes.
#[derive(Debug, Clone)]
pub struct Crashes {
    /// Of so many of one app; of none if 0.
    pub per_app: usize,
    /// Bytes of one crash at most.
    pub max_bytes: u64,
    /// The share of their file system's blocks that may be used before the oldest are removed.
    pub max_block_usage: f64,
    /// The same of inodes.
    pub max_inode_usage: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    base: PathBuf,
    helpers: PathBuf,
    index: u32,
    zone: String,
    nats: Nats,
    stacks: BTreeMap<String, PathBuf>,
    resources: WrittenResources,
    intervals: WrittenIntervals,
    instance: WrittenInstance,
    network: WrittenNetwork,
    droplets: WrittenDroplets,
    output: WrittenOutput,
    evacuation: WrittenEvacuation,
    crashes: WrittenCrashes,
    metrics: WrittenMetrics,
    hooks: WrittenHooks,
    bind_mounts: Vec<WrittenBind>,
    cgroup: WrittenCgroup,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenResources {
    memory_mb: Option<u64>,
    memory_overcommit_factor: f64,
    disk_mb: u64,
    disk_overcommit_factor: f64,
    instances: usize,
    parallel_starts: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenIntervals {
    heartbeat: u64,
    advertise: u64,
    router_register: u64,
    orphans: u64,
    droplets: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenInstance {
    pids: u64,
    memory_to_cpu_share_ratio: u64,
    min_cpu_shares: u64,
    max_cpu_shares: u64,
    max_cpu_percent: Option<u64>,
    health_check_timeout: u64,
    liveness_interval: u64,
    stop_grace: u64,
    crash_lifetime: u64,
    user: String,
    bandwidth_in_kbit: u64,
    bandwidth_out_kbit: u64,
    disk: DiskWay,
    disk_inodes: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenNetwork {
    pool: String,
    ports: String,
    port_quarantine: u64,
    mtu: Option<u32>,
    local_ip: Option<Ipv4Addr>,
    allow_host_access: bool,
    host_allow: Vec<String>,
    egress: String,
    allow: Vec<String>,
    deny: Vec<String>,
    dns: Vec<Ipv4Addr>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenDroplets {
    inactivity: u64,
    total: u64,
    max_mb: u64,
    max_unpacked_mb: u64,
    files: Vec<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenOutput {
    spool_mb: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenEvacuation {
    bail_out: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenCrashes {
    per_app: usize,
    max_kb: u64,
    max_block_usage: f64,
    max_inode_usage: f64,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct WrittenMetrics {
    listen: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenHooks {
    before_start: Option<PathBuf>,
    after_start: Option<PathBuf>,
    before_stop: Option<PathBuf>,
    after_stop: Option<PathBuf>,
    post_setup: Option<String>,
    timeout: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenBind {
    src_path: PathBuf,
    dst_path: PathBuf,
    #[serde(default)]
    mode: WrittenMode,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum WrittenMode {
    #[default]
    Ro,
    Rw,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenCgroup {
    parent: String,
}

impl Default for Written {
    fn default() -> Self {
        Self {
            base: "/var/lib/ostler".into(),
            helpers: "/usr/local/lib/ostler".into(),
            index: 0,
            zone: "default".into(),
            nats: Nats::default(),
            stacks: BTreeMap::new(),
            resources: WrittenResources::default(),
            intervals: WrittenIntervals::default(),
            instance: WrittenInstance::default(),
            network: WrittenNetwork::default(),
            droplets: WrittenDroplets::default(),
            output: WrittenOutput::default(),
            evacuation: WrittenEvacuation::default(),
            crashes: WrittenCrashes::default(),
            metrics: WrittenMetrics::default(),
            hooks: WrittenHooks::default(),
            bind_mounts: Vec::new(),
            cgroup: WrittenCgroup::default(),
        }
    }
}

impl Default for WrittenResources {
    fn default() -> Self {
        Self {
            memory_mb: None,
            memory_overcommit_factor: 1.0,
            disk_mb: 16 * 1024 * 1024,
            disk_overcommit_factor: 1.0,
            instances: 1000,
            parallel_starts: 32,
        }
    }
}

impl Default for WrittenIntervals {
    fn default() -> Self {
        Self {
            heartbeat: 10,
            advertise: 5,
            router_register: 20,
            orphans: 600,
            // As the DEA.
            droplets: 60,
        }
    }
}

impl Default for WrittenInstance {
    fn default() -> Self {
        Self {
            pids: 512,
            memory_to_cpu_share_ratio: 8,
            min_cpu_shares: 1,
            max_cpu_shares: 256,
            max_cpu_percent: None,
            health_check_timeout: 60,
            liveness_interval: 0,
            stop_grace: 10,
            crash_lifetime: 3600,
            user: "vcap".into(),
            bandwidth_in_kbit: 0,
            bandwidth_out_kbit: 0,
            disk: DiskWay::Auto,
            disk_inodes: 200_000,
        }
    }
}

impl Default for WrittenNetwork {
    fn default() -> Self {
        Self {
            pool: "10.254.0.0/16".into(),
            ports: "61001-65000".into(),
            port_quarantine: 150,
            mtu: None,
            local_ip: None,
            allow_host_access: false,
            host_allow: Vec::new(),
            egress: "open".into(),
            allow: Vec::new(),
            deny: Vec::new(),
            dns: Vec::new(),
        }
    }
}

impl Default for WrittenDroplets {
    fn default() -> Self {
        Self {
            inactivity: 30,
            total: 600,
            max_mb: 2048,
            max_unpacked_mb: 8192,
            files: vec!["/srv".into()],
        }
    }
}

impl Default for WrittenOutput {
    fn default() -> Self {
        Self { spool_mb: 16 }
    }
}

impl Default for WrittenEvacuation {
    fn default() -> Self {
        Self { bail_out: 600 }
    }
}

impl Default for WrittenCrashes {
    fn default() -> Self {
        Self {
            per_app: 5,
            max_kb: 1024,
            max_block_usage: 0.8,
            max_inode_usage: 0.8,
        }
    }
}

impl Default for WrittenHooks {
    fn default() -> Self {
        Self {
            before_start: None,
            after_start: None,
            before_stop: None,
            after_stop: None,
            post_setup: None,
            timeout: 60,
        }
    }
}

impl Default for WrittenCgroup {
    fn default() -> Self {
        Self {
            parent: "ostler".into(),
        }
    }
}

/// What the command line and the environment put in the file's place.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--nats`.
    pub nats_url: Option<String>,
    /// `--base`.
    pub base: Option<PathBuf>,
}

/// Reads and checks the file at `path`. `host_memory_mb` is what `memory_mb` is when it is absent.
///
/// # Errors
/// The first thing that is wrong, with its key or line and what would be right.
pub fn load(path: &Path, overrides: Overrides, host_memory_mb: u64) -> Result<Config, ConfigError> {
    with_stacks(path, load_to_clean(path, overrides, host_memory_mb)?)
}

/// [`load`] for whoever starts nothing: stacks may be missing.
///
/// # Errors
/// As [`load`].
pub fn load_to_clean(
    path: &Path,
    overrides: Overrides,
    host_memory_mb: u64,
) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.into(),
        source,
    })?;
    parse(path, &text, overrides, host_memory_mb)
}

/// What holds where no file says otherwise.
///
/// # Errors
/// An override is wrong.
pub fn defaults(overrides: Overrides, host_memory_mb: u64) -> Result<Config, ConfigError> {
    let path = Path::new("defaults");
    with_stacks(path, parse(path, "", overrides, host_memory_mb)?)
}

fn parse(
    path: &Path,
    text: &str,
    overrides: Overrides,
    host_memory_mb: u64,
) -> Result<Config, ConfigError> {
    let mut written: Written = toml::from_str(text).map_err(|error| ConfigError::Malformed {
        path: path.into(),
        message: malformed(text, &error),
    })?;
    written.nats.flag = overrides.nats_url.map(Secret);
    if let Some(base) = overrides.base {
        written.base = base;
    }
    check(written, host_memory_mb).map_err(|(key, problem)| ConfigError::Invalid {
        path: path.into(),
        key,
        problem,
    })
}

fn with_stacks(path: &Path, config: Config) -> Result<Config, ConfigError> {
    match config.stacks.iter().find(|(_, stack)| !stack.is_dir()) {
        None => Ok(config),
        Some((name, stack)) => Err(ConfigError::NoStack {
            path: path.into(),
            name: name.clone(),
            stack: stack.clone(),
        }),
    }
}

/// The parser's words, which repeat the line that they are about: not where that may hold a secret.
fn malformed(text: &str, error: &toml::de::Error) -> String {
    let at = error.span().map_or(0, |span| span.start);
    let before = text.get(..at).unwrap_or_default();
    let line = text.lines().nth(before.matches('\n').count());
    let is_secret = line.is_some_and(|line| {
        let key = line.split('=').next().unwrap_or_default();
        line.contains('@')
            || ["user", "passw", "token", "jwt", "seed", "url"]
                .iter()
                .any(|secret| key.contains(secret))
    });
    if !is_secret {
        return error.to_string().trim_end().to_owned();
    }
    let number = before.matches('\n').count() + 1;
    format!(
        "line {number} is wrong, and is not shown because it may hold a secret: write key = \"text\", with a key of packaging/ostler.toml"
    )
}

type Problem = (&'static str, String);

fn check(written: Written, host_memory_mb: u64) -> Result<Config, Problem> {
    let resources = &written.resources;
    let memory = resources.memory_mb.unwrap_or(host_memory_mb);
    Ok(Config {
        base: base(written.base)?,
        helpers: absolute("helpers", written.helpers)?,
        index: written.index,
        zone: written.zone,
        nats: written.nats,
        stacks: stacks(written.stacks)?,
        resources: Resources {
            memory_mb: scaled(
                "resources.memory_overcommit_factor",
                memory,
                resources.memory_overcommit_factor,
            )?,
            disk_mb: scaled(
                "resources.disk_overcommit_factor",
                resources.disk_mb,
                resources.disk_overcommit_factor,
            )?,
            instances: resources.instances,
            parallel_starts: parallel(resources.parallel_starts)?,
        },
        intervals: Intervals {
            heartbeat: seconds("intervals.heartbeat", written.intervals.heartbeat)?,
            advertise: seconds("intervals.advertise", written.intervals.advertise)?,
            router_register: seconds(
                "intervals.router_register",
                written.intervals.router_register,
            )?,
            orphans: seconds("intervals.orphans", written.intervals.orphans)?,
            droplets: seconds("intervals.droplets", written.intervals.droplets)?,
        },
        instance: instance(written.instance)?,
        network: network(&written.network)?,
        droplets: Droplets {
            inactivity: seconds("droplets.inactivity", written.droplets.inactivity)?,
            total: seconds("droplets.total", written.droplets.total)?,
            max_bytes: megabytes("droplets.max_mb", written.droplets.max_mb)?,
            max_unpacked_bytes: megabytes(
                "droplets.max_unpacked_mb",
                written.droplets.max_unpacked_mb,
            )?,
            files: written
                .droplets
                .files
                .into_iter()
                .map(|path| absolute("droplets.files", path))
                .collect::<Result<_, _>>()?,
        },
        spool_bytes: megabytes("output.spool_mb", written.output.spool_mb)?,
        bail_out: seconds("evacuation.bail_out", written.evacuation.bail_out)?,
        crashes: crashes(&written.crashes)?,
        metrics: written.metrics.listen.as_deref().map(listen).transpose()?,
        hooks: hooks(written.hooks)?,
        bind_mounts: binds(written.bind_mounts)?,
        cgroup_parent: cgroup_parent(written.cgroup.parent)?,
    })
}

fn hooks(written: WrittenHooks) -> Result<Hooks, Problem> {
    let file = |key, path: Option<PathBuf>| path.map(|path| absolute(key, path)).transpose();
    Ok(Hooks {
        before_start: file("hooks.before_start", written.before_start)?,
        after_start: file("hooks.after_start", written.after_start)?,
        before_stop: file("hooks.before_stop", written.before_stop)?,
        after_stop: file("hooks.after_stop", written.after_stop)?,
        post_setup: written.post_setup,
        timeout: seconds("hooks.timeout", written.timeout)?,
    })
}

fn binds(written: Vec<WrittenBind>) -> Result<Vec<Bind>, Problem> {
    written.into_iter().map(bind).collect()
}

fn bind(written: WrittenBind) -> Result<Bind, Problem> {
    if written.dst_path.parent().is_none() {
        let problem = "is all that a container sees; write a path below it".to_owned();
        return Err(("bind_mounts.dst_path", problem));
    }
    Ok(Bind {
        source: absolute("bind_mounts.src_path", written.src_path)?,
        target: absolute("bind_mounts.dst_path", written.dst_path)?,
        access: match written.mode {
            WrittenMode::Ro => Access::ReadOnly,
            WrittenMode::Rw => Access::ReadWrite,
        },
    })
}

fn base(base: PathBuf) -> Result<PathBuf, Problem> {
    let base = absolute("base", base)?;
    let length = base.as_os_str().len();
    if length > BASE_MAX {
        return Err((
            "base",
            format!(
                "has {length} bytes; sockets stand below it, so at most {BASE_MAX} are possible"
            ),
        ));
    }
    if base
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .any(|byte| b":,\\".contains(byte))
    {
        return Err((
            "base",
            "holds one of `:`, `,`, `\\`, which mount options take apart".into(),
        ));
    }
    Ok(base)
}

fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, Problem> {
    if path.is_absolute() {
        return Ok(path);
    }
    Err((
        key,
        format!(
            "is {:?}; it must be an absolute path",
            path.display().to_string()
        ),
    ))
}

fn stacks(stacks: BTreeMap<String, PathBuf>) -> Result<BTreeMap<String, PathBuf>, Problem> {
    stacks
        .into_iter()
        .map(|(name, path)| {
            let path = absolute("stacks", path)?;
            Ok((name, path))
        })
        .collect()
}

fn scaled(key: &'static str, amount: u64, factor: f64) -> Result<u64, Problem> {
    if !(0.01..=1000.0).contains(&factor) {
        return Err((key, format!("is {factor}; it must be from 0.01 to 1000")));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "megabytes are far below 2^52, and a fraction of one is dropped as the DEA did"
    )]
    Ok((amount as f64 * factor) as u64)
}

fn seconds(key: &'static str, value: u64) -> Result<Duration, Problem> {
    if (1..=86_400).contains(&value) {
        return Ok(Duration::from_secs(value));
    }
    Err((
        key,
        format!("is {value}; it must be from 1 to 86400 seconds"),
    ))
}

fn parallel(starts: usize) -> Result<usize, Problem> {
    if (1..=100_000).contains(&starts) {
        return Ok(starts);
    }
    let problem = format!("is {starts}; it must be from 1 to 100000");
    Err(("resources.parallel_starts", problem))
}

fn megabytes(key: &'static str, value: u64) -> Result<u64, Problem> {
    if (1..=1 << 30).contains(&value) {
        return Ok(value << 20);
    }
    Err((
        key,
        format!("is {value}; it must be from 1 to {} megabytes", 1 << 30),
    ))
}

fn instance(written: WrittenInstance) -> Result<Instance, Problem> {
    if written.memory_to_cpu_share_ratio == 0 {
        return Err((
            "instance.memory_to_cpu_share_ratio",
            "is 0; it must be at least 1".into(),
        ));
    }
    if written.min_cpu_shares == 0 || written.min_cpu_shares > written.max_cpu_shares {
        return Err((
            "instance.min_cpu_shares",
            format!(
                "is {}; it must be from 1 to max_cpu_shares",
                written.min_cpu_shares
            ),
        ));
    }
    if written
        .max_cpu_percent
        .is_some_and(|percent| !(1..=1_000_000).contains(&percent))
    {
        return Err((
            "instance.max_cpu_percent",
            "must be from 1 to 1000000: 100 is one processor".into(),
        ));
    }
    if written.pids < 8 {
        return Err((
            "instance.pids",
            format!(
                "is {}; the container's own processes need at least 8",
                written.pids
            ),
        ));
    }
    Ok(Instance {
        pids: written.pids,
        memory_to_cpu_share_ratio: written.memory_to_cpu_share_ratio,
        cpu_shares: written.min_cpu_shares..=written.max_cpu_shares,
        max_cpu_percent: written.max_cpu_percent,
        health_check_timeout: seconds(
            "instance.health_check_timeout",
            written.health_check_timeout,
        )?,
        liveness_interval: match written.liveness_interval {
            0 => None,
            interval => Some(seconds("instance.liveness_interval", interval)?),
        },
        stop_grace: seconds("instance.stop_grace", written.stop_grace)?,
        crash_lifetime: seconds("instance.crash_lifetime", written.crash_lifetime)?,
        user: written.user,
        bandwidth: Bandwidth {
            into: rate("instance.bandwidth_in_kbit", written.bandwidth_in_kbit)?,
            out: rate("instance.bandwidth_out_kbit", written.bandwidth_out_kbit)?,
        },
        disk: written.disk,
        disk_inodes: inodes(written.disk_inodes)?,
    })
}

fn crashes(written: &WrittenCrashes) -> Result<Crashes, Problem> {
    let share = |key, value: f64| {
        let all = (0.0..=1.0).contains(&value);
        all.then_some(value)
            .ok_or_else(|| (key, format!("is {value}; it must be from 0.0 to 1.0")))
    };
    if written.per_app > 100 {
        let problem = format!("is {}; it must be at most 100", written.per_app);
        return Err(("crashes.per_app", problem));
    }
    if !(16..=65_536).contains(&written.max_kb) {
        let problem = format!("is {}; it must be from 16 to 65536", written.max_kb);
        return Err(("crashes.max_kb", problem));
    }
    Ok(Crashes {
        per_app: written.per_app,
        max_bytes: written.max_kb << 10,
        max_block_usage: share("crashes.max_block_usage", written.max_block_usage)?,
        max_inode_usage: share("crashes.max_inode_usage", written.max_inode_usage)?,
    })
}

fn listen(text: &str) -> Result<SocketAddr, Problem> {
    text.parse().map_err(|_| {
        let problem = format!("is {text:?}; write an address and a port, as 127.0.0.1:9464");
        ("metrics.listen", problem)
    })
}

fn inodes(value: u64) -> Result<u64, Problem> {
    if (64..=1 << 32).contains(&value) {
        return Ok(value);
    }
    let problem = format!("is {value}; it must be from 64 to {}", 1_u64 << 32);
    Err(("instance.disk_inodes", problem))
}

fn network(written: &WrittenNetwork) -> Result<Network, Problem> {
    Ok(Network {
        pool: pool(&written.pool)?,
        ports: ports(&written.ports)?,
        port_quarantine: quarantine(written.port_quarantine)?,
        mtu: written.mtu,
        local_ip: written.local_ip,
        allow_host_access: written.allow_host_access,
        host_allow: each(&written.host_allow, "network.host_allow", service)?,
        egress: match written.egress.as_str() {
            "open" => Posture::Open,
            "closed" => Posture::Closed,
            other => {
                let problem = format!("is {other:?}; write \"open\" or \"closed\"");
                return Err(("network.egress", problem));
            }
        },
        allow: each(&written.allow, "network.allow", addresses)?,
        deny: each(&written.deny, "network.deny", addresses)?,
        dns: written.dns.clone(),
    })
}

fn quarantine(value: u64) -> Result<Duration, Problem> {
    if (ROUTER_FORGETS + 1..=86_400).contains(&value) {
        return Ok(Duration::from_secs(value));
    }
    let problem = format!(
        "is {value}; it must be from {} to 86400 seconds: routers may send people to a port for {ROUTER_FORGETS} s after its app is gone",
        ROUTER_FORGETS + 1
    );
    Err(("network.port_quarantine", problem))
}

/// Bytes per second; 0 is no limit. Less than 64 kbit/s would be less than a packet now and then.
fn rate(key: &'static str, kilobits: u64) -> Result<Option<u64>, Problem> {
    match kilobits {
        0 => Ok(None),
        64..=1_000_000_000 => Ok(Some(kilobits * 125)),
        _ => Err((
            key,
            format!("is {kilobits}; it must be 0 (no limit), or from 64 to 1000000000"),
        )),
    }
}

fn each<T>(
    texts: &[String],
    key: &'static str,
    read: fn(&str) -> Result<T, &'static str>,
) -> Result<Vec<T>, Problem> {
    let texts = texts.iter();
    texts
        .map(|text| read(text).map_err(|wanted| (key, format!("names {text:?}; write {wanted}"))))
        .collect()
}

fn service(text: &str) -> Result<HostService, &'static str> {
    let read = || {
        let (protocol, ports) = text.split_once('/')?;
        let protocol = match protocol {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return None,
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let ports: (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        (1 <= ports.0 && ports.0 <= ports.1).then_some(HostService { protocol, ports })
    };
    read().ok_or("tcp/<port>, udp/<port> or tcp/<first>-<last>, as udp/53")
}

/// One address, a network, or first-last.
fn addresses(text: &str) -> Result<(Ipv4Addr, Ipv4Addr), &'static str> {
    messages::start::addresses(text).ok_or("an IPv4 address, a network, or first-last")
}

fn pool(text: &str) -> Result<(Ipv4Addr, u8), Problem> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let address: Ipv4Addr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let host_bits = 32_u32.checked_sub(u32::from(prefix))?;
        let aligned = host_bits < 32 && address.to_bits() & ((1 << host_bits) - 1) == 0;
        (8..=30).contains(&prefix).then_some(())?;
        aligned.then_some((address, prefix))
    });
    parsed.ok_or_else(|| {
        (
            "network.pool",
            format!("is {text:?}; write a network with /8 to /30, as 10.254.0.0/16"),
        )
    })
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, Problem> {
    let parsed = text.split_once('-').and_then(|(first, last)| {
        let range: RangeInclusive<u16> = first.trim().parse().ok()?..=last.trim().parse().ok()?;
        (*range.start() >= 1024 && !range.is_empty()).then_some(range)
    });
    parsed.ok_or_else(|| {
        (
            "network.ports",
            format!("is {text:?}; write first-last above 1023, as 61001-65000"),
        )
    })
}

fn cgroup_parent(parent: String) -> Result<String, Problem> {
    let clean = parent.split('/').all(|part| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    });
    if clean {
        return Ok(parent);
    }
    Err((
        "cgroup.parent",
        format!("is {parent:?}; write names of letters, digits, `-`, `_`, `.` with `/` between"),
    ))
}

#[cfg(test)]
mod tests {
    use super::{Config, HostService, Overrides, Posture, Secret, Transport, parse};
    use std::path::Path;
    use std::time::Duration;

    fn read(text: &str) -> Result<Config, String> {
        let path = Path::new("ostler.toml");
        let parsed = parse(path, text, Overrides::default(), 4096);
        let config = parsed.and_then(|config| super::with_stacks(path, config));
        config.map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_a_whole_configuration() {
        let config = read("").unwrap();
        assert_eq!(config.resources.memory_mb, 4096);
        assert_eq!(config.network.ports, 61001..=65000);
    }

    #[test]
    fn nobody_looks_at_running_apps_unless_he_is_told_how_often() {
        let interval = |text: &str| read(text).map(|config| config.instance.liveness_interval);
        assert_eq!(interval(""), Ok(None));
        assert_eq!(interval("[instance]\nliveness_interval = 0"), Ok(None));
        let ten = interval("[instance]\nliveness_interval = 10");
        assert_eq!(ten, Ok(Some(Duration::from_secs(10))));
        let error = interval("[instance]\nliveness_interval = 86401").unwrap_err();
        assert!(error.contains("`instance.liveness_interval`"), "{error}");
    }

    #[test]
    fn networks_services_and_rates_are_read() {
        let text = "[network]\negress = 'closed'\nallow = ['10.0.0.0/8', '192.0.2.7']\n\
                    deny = ['10.1.0.0-10.1.0.9']\nhost_allow = ['udp/53', 'tcp/8080-8090']\n\
                    [instance]\nbandwidth_in_kbit = 8000";
        let config = read(text).unwrap();
        let network = &config.network;
        assert_eq!(network.egress, Posture::Closed);
        assert_eq!(
            network.allow,
            [
                ([10, 0, 0, 0].into(), [10, 255, 255, 255].into()),
                ([192, 0, 2, 7].into(), [192, 0, 2, 7].into()),
            ]
        );
        assert_eq!(network.deny, [([10, 1, 0, 0].into(), [10, 1, 0, 9].into())]);
        let service = |protocol, ports| HostService { protocol, ports };
        assert_eq!(
            network.host_allow,
            [
                service(Transport::Udp, (53, 53)),
                service(Transport::Tcp, (8080, 8090)),
            ]
        );
        let bandwidth = config.instance.bandwidth;
        assert_eq!((bandwidth.into, bandwidth.out), (Some(1_000_000), None));
    }

    #[test]
    fn flags_win_over_the_file() {
        let overrides = Overrides {
            nats_url: Some("nats://b:1".into()),
            base: Some("/b".into()),
        };
        let config = parse(
            Path::new("x"),
            "base = '/a'\n[nats]\nurl = 'nats://a:1'",
            overrides,
            1,
        )
        .unwrap();
        assert_eq!(config.base.as_path(), Path::new("/b"));
        let url = |url: &str| Some(Secret(url.into()));
        let nats = config.nats;
        assert_eq!(
            (nats.flag, nats.url),
            (url("nats://b:1"), url("nats://a:1"))
        );
    }

    #[test]
    fn a_mistake_beside_a_secret_does_not_show_it() {
        for (text, line) in [
            ("[nats]\npassword = 4711", "line 2"),
            ("[nats]\npasswort = 'x4711'", "line 2"),
            ("[nats]\n\ntoken = ['4711']", "line 3"),
            ("[nats]\nurl = 'nats://u:4711@h", "line 2"),
            ("[nats]\nurls = 'nats://u:4711@h'", "line 2"),
            ("[nats]\nseed = 4711x", "line 2"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(line) && !error.contains("4711"), "{error}");
        }
        let config = read("[nats]\npassword = '4711'\nuser = 'u4711'\nurl = 'nats://u:4711@h'");
        assert!(!format!("{config:?}").contains("4711"));
    }

    #[test]
    fn each_mistake_is_named_with_its_place() {
        let long = format!("base = '/{}'", "x".repeat(60));
        for (text, words) in [
            ("bsae = '/x'", "line 1"),
            ("\n[nats]\nurls = 'x'", "line 3"),
            ("base = 'relative'", "`base`"),
            (long.as_str(), "61 bytes"),
            ("base = '/a:b'", "mount options"),
            ("[network]\npool = '10.254.0.1/16'", "`network.pool`"),
            ("[network]\nports = '65000-61000'", "`network.ports`"),
            ("[network]\negress = 'half'", "`network.egress`"),
            (
                "[network]\nport_quarantine = 120",
                "from 121 to 86400 seconds",
            ),
            ("[network]\nallow = ['10.0.0.0/33']", "`network.allow`"),
            ("[network]\ndeny = ['10.0.0.9-10.0.0.1']", "`network.deny`"),
            ("[network]\nhost_allow = ['udp/0']", "`network.host_allow`"),
            (
                "[instance]\nbandwidth_out_kbit = 7",
                "`instance.bandwidth_out_kbit`",
            ),
            ("[intervals]\nheartbeat = 0", "`intervals.heartbeat`"),
            ("[evacuation]\nbail_out = 0", "`evacuation.bail_out`"),
            ("[hooks]\nbefore_stop = 'x'", "`hooks.before_stop`"),
            (
                "[[bind_mounts]]\nsrc_path = 'x'\ndst_path = '/y'",
                "`bind_mounts.src_path`",
            ),
            (
                "[[bind_mounts]]\nsrc_path = '/x'\ndst_path = '/'",
                "`bind_mounts.dst_path`",
            ),
            (
                "[[bind_mounts]]\nsrc_path = '/x'\ndst_path = '/y'\nmode = 'wo'",
                "`ro`",
            ),
            (
                "[resources]\nparallel_starts = 0",
                "`resources.parallel_starts`",
            ),
            ("[instance]\npids = 2", "`instance.pids`"),
            (
                "[instance]\nmax_cpu_percent = 0",
                "`instance.max_cpu_percent`",
            ),
            ("[cgroup]\nparent = '../x'", "`cgroup.parent`"),
            ("[crashes]\nmax_kb = 1", "`crashes.max_kb`"),
            (
                "[crashes]\nmax_block_usage = 80",
                "`crashes.max_block_usage`",
            ),
            ("[stacks]\ndebian = '/does/not/exist'", "`debian`"),
            (
                "[resources]\nmemory_overcommit_factor = -1.0",
                "memory_overcommit_factor",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn metrics_are_served_at_an_address_or_not_at_all() {
        assert_eq!(read("").unwrap().metrics, None);
        let at = |place: &str| read(&format!("[metrics]\nlisten = '{place}'"));
        for place in ["127.0.0.1:9464", "[::1]:9464"] {
            assert_eq!(at(place).unwrap().metrics, Some(place.parse().unwrap()));
        }
        for place in ["9464", ":9464", "127.0.0.1", "host:9464", ""] {
            let error = at(place).unwrap_err();
            assert!(error.contains("`metrics.listen`"), "{error}");
        }
    }

    #[test]
    fn the_sample_shows_every_way_into_the_bus() {
        let sample = include_str!("../../packaging/ostler.toml");
        let (_, nats) = sample.split_once("[nats]").unwrap();
        let (nats, _) = nats.split_once("[stacks]").unwrap();
        let is_key = |line: &&str| {
            line.contains(" = ")
                && line
                    .split(" = ")
                    .next()
                    .unwrap()
                    .trim_start_matches("# ")
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'_')
        };
        let keys = nats
            .lines()
            .filter(is_key)
            .map(|line| line.trim_start_matches("# "));
        let text = keys.fold("[nats]\n".to_owned(), |all, line| all + line + "\n");
        let nats = format!("{:?}", read(&text).unwrap().nats);
        assert_eq!(nats.matches("None").count(), 1, "all but the flag: {nats}");
    }

    #[test]
    fn the_sample_says_every_key_with_its_default() {
        let sample = include_str!("../../packaging/ostler.toml");
        let uncommented: String = sample
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .fold(String::new(), |all, line| all + line + "\n");
        let from_sample = format!("{:?}", read(&uncommented).unwrap());
        let plain = format!("{:?}", read("").unwrap());
        // The two keys whose default is "what the host has" stand in the sample with an example.
        let blur = |text: String| text.replace("memory_mb: 8192", "memory_mb: 4096");
        assert_eq!(blur(from_sample), plain);
    }
}
