//! The configuration: one TOML file as people write it, then as the agent uses it.
//!
//! Unknown keys are refused with their line. Command-line flags win over the environment (`NATS_URL`),
//! which wins over the file. Every key stands with its default in `packaging/ostler.toml`, and a test
//! holds that file to this one.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest base directory, in bytes: below it stands `/containers/<handle>/jobs/<n>/link.sock`, and a
/// socket's path has 108 bytes (`sun_path` in unix(7)).
pub const BASE_MAX: usize = 56;

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
    /// The control groups' parent, below the root of each hierarchy.
    pub cgroup_parent: String,
}

/// How to reach the bus.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nats {
    /// One or more server addresses, separated by commas.
    pub url: String,
    /// A `.creds` file.
    pub creds: Option<PathBuf>,
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
    /// How long an app may take to open its port.
    pub health_check_timeout: Duration,
    /// Between TERM and KILL.
    pub stop_grace: Duration,
    /// How long a crashed instance is kept for whoever asks.
    pub crash_lifetime: Duration,
    /// The user inside the container.
    pub user: String,
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
    /// Whether containers may reach services on the host itself.
    pub allow_host_access: bool,
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

impl Default for Nats {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".into(),
            creds: None,
        }
    }
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenIntervals {
    heartbeat: u64,
    advertise: u64,
    router_register: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenInstance {
    pids: u64,
    memory_to_cpu_share_ratio: u64,
    min_cpu_shares: u64,
    max_cpu_shares: u64,
    health_check_timeout: u64,
    stop_grace: u64,
    crash_lifetime: u64,
    user: String,
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
        }
    }
}

impl Default for WrittenIntervals {
    fn default() -> Self {
        Self {
            heartbeat: 10,
            advertise: 5,
            router_register: 20,
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
            health_check_timeout: 60,
            stop_grace: 10,
            crash_lifetime: 3600,
            user: "vcap".into(),
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
    /// `--nats`, else `NATS_URL`.
    pub nats_url: Option<String>,
    /// `--base`.
    pub base: Option<PathBuf>,
}

/// Reads and checks the file at `path`. `host_memory_mb` is what `memory_mb` is when it is absent.
///
/// # Errors
/// The first thing that is wrong, with its key or line and what would be right.
pub fn load(path: &Path, overrides: Overrides, host_memory_mb: u64) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.into(),
        source,
    })?;
    parse(path, &text, overrides, host_memory_mb)
}

fn parse(
    path: &Path,
    text: &str,
    overrides: Overrides,
    host_memory_mb: u64,
) -> Result<Config, ConfigError> {
    let mut written: Written = toml::from_str(text).map_err(|error| ConfigError::Malformed {
        path: path.into(),
        message: error.to_string().trim_end().to_owned(),
    })?;
    if let Some(url) = overrides.nats_url {
        written.nats.url = url;
    }
    if let Some(base) = overrides.base {
        written.base = base;
    }
    check(written, host_memory_mb).map_err(|(key, problem)| ConfigError::Invalid {
        path: path.into(),
        key,
        problem,
    })
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
        },
        intervals: Intervals {
            heartbeat: seconds("intervals.heartbeat", written.intervals.heartbeat)?,
            advertise: seconds("intervals.advertise", written.intervals.advertise)?,
            router_register: seconds(
                "intervals.router_register",
                written.intervals.router_register,
            )?,
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
        cgroup_parent: cgroup_parent(written.cgroup.parent)?,
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
            "holds one of `:`, `,`, `\\`, which overlayfs takes apart".into(),
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
            if path.is_dir() {
                return Ok((name, path));
            }
            Err((
                "stacks",
                format!(
                    "names {} for `{name}`, which is no directory",
                    path.display()
                ),
            ))
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
        health_check_timeout: seconds(
            "instance.health_check_timeout",
            written.health_check_timeout,
        )?,
        stop_grace: seconds("instance.stop_grace", written.stop_grace)?,
        crash_lifetime: seconds("instance.crash_lifetime", written.crash_lifetime)?,
        user: written.user,
    })
}

fn network(written: &WrittenNetwork) -> Result<Network, Problem> {
    Ok(Network {
        pool: pool(&written.pool)?,
        ports: ports(&written.ports)?,
        port_quarantine: Duration::from_secs(written.port_quarantine),
        mtu: written.mtu,
        local_ip: written.local_ip,
        allow_host_access: written.allow_host_access,
        dns: written.dns.clone(),
    })
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
    use super::{Config, Overrides, parse};
    use std::path::Path;

    fn read(text: &str) -> Result<Config, String> {
        parse(Path::new("ostler.toml"), text, Overrides::default(), 4096).map_err(|e| e.to_string())
    }

    #[test]
    fn an_empty_file_is_a_whole_configuration() {
        let config = read("").unwrap();
        assert_eq!(config.resources.memory_mb, 4096);
        assert_eq!(config.network.ports, 61001..=65000);
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
        assert_eq!(
            (config.nats.url.as_str(), config.base.as_path()),
            ("nats://b:1", Path::new("/b"))
        );
    }

    #[test]
    fn each_mistake_is_named_with_its_place() {
        let long = format!("base = '/{}'", "x".repeat(60));
        for (text, words) in [
            ("bsae = '/x'", "line 1"),
            ("\n[nats]\nurls = 'x'", "line 3"),
            ("base = 'relative'", "`base`"),
            (long.as_str(), "61 bytes"),
            ("base = '/a:b'", "overlayfs"),
            ("[network]\npool = '10.254.0.1/16'", "`network.pool`"),
            ("[network]\nports = '65000-61000'", "`network.ports`"),
            ("[intervals]\nheartbeat = 0", "`intervals.heartbeat`"),
            ("[instance]\npids = 2", "`instance.pids`"),
            ("[cgroup]\nparent = '../x'", "`cgroup.parent`"),
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
