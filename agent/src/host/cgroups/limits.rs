//! What a container may use, written to its groups.

use super::layout::Version;
use super::usage::read_number;
use super::{CgroupError, Group, errno_of, write};
use cgroups_rs::cpu::CpuController;
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;
use cgroups_rs::{Controller, MaxValue};
use container::sys::interrupt;
use nix::errno::Errno;
use nix::sys::pthread::pthread_kill;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// What a container may use. `None` leaves a value as it is, which in a new group is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory in bytes, page cache and tmpfs included; the kernel rounds down to pages. It is the
    /// limit of memory and swap together: a container does not swap.
    pub memory_bytes: Option<u64>,
    /// Weight against other containers on the scale of v1, 2 to 262144, clamped; 1024 is usual.
    pub cpu_shares: Option<u64>,
    /// Most processor time, in hundredths of one processor: 150 is one and a half. `u64::MAX`: no cap.
    pub cpu_percent: Option<u64>,
    /// Processes and threads together. Below what runs already, nothing is killed, but no fork works.
    pub pids: Option<u64>,
}

impl Group {
    /// Changes the limits, also of a running container: all of them, or none.
    ///
    /// A memory limit below what is in use makes the kernel reclaim first. What still does not fit
    /// is refused, on v2 as on v1: there the kernel itself would accept and kill until it fits.
    ///
    /// # Errors
    /// [`CgroupError::MemoryInUse`], or [`CgroupError::Refused`] for a value that the kernel does not
    /// take.
    pub fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        let (shares, cap, pids) = (self.cpu_weight(), self.cpu_cap(), self.pids_max());
        self.apply(limits).inspect_err(|_| {
            // Memory comes last and undoes itself, so these are all that can have changed. What was
            // accepted before is accepted again; if the group is gone nothing matters.
            if let Some(shares) = shares {
                let _gone = self.cpu().set_shares(shares);
            }
            if let Some((file, cap)) = cap {
                let _gone = write(&file, &cap);
            }
            if let Some(pids) = pids {
                let _gone = self.pids_controller().set_pid_max(pids);
            }
        })
    }

    /// Writes the limits; on failure those before it in the order shares, cap, pids, memory have changed.
    pub(super) fn apply(&self, limits: &Limits) -> Result<(), CgroupError> {
        if let Some(shares) = limits.cpu_shares {
            let cpu = self.cpu();
            let value = match cpu.v2() {
                true => weight_of_shares(shares),
                false => shares.clamp(MIN_SHARES, MAX_SHARES),
            };
            cpu.set_shares(value).map_err(|error| {
                let act = format!("set the weight to {value} in");
                CgroupError::refused(act, cpu.path())(io_error(error))
            })?;
        }
        if let Some(percent) = limits.cpu_percent {
            self.cap_cpu(percent)?;
        }
        if let Some(pids) = limits.pids {
            let controller = self.pids_controller();
            let value = MaxValue::Value(i64::try_from(pids).unwrap_or(i64::MAX));
            controller.set_pid_max(value).map_err(|error| {
                let act = format!("limit processes to {pids} in");
                CgroupError::refused(act, controller.path())(io_error(error))
            })?;
        }
        match (limits.memory_bytes, self.layout.memory.version) {
            (None, _) => Ok(()),
            (Some(bytes), Version::V1) => limit_memory_v1(&self.memory_dir(), bytes),
            (Some(bytes), Version::V2) => limit_memory_v2(&self.memory_dir(), bytes),
        }
    }

    pub(super) fn pids_controller(&self) -> PidController {
        let place = &self.layout.pids;
        PidController::new(self.directory(place), place.version == Version::V2)
    }

    pub(super) fn pids_max(&self) -> Option<MaxValue> {
        self.pids_controller().get_pid_max().ok()
    }

    fn cpu(&self) -> CpuController {
        let place = &self.layout.cpu;
        CpuController::new(self.directory(place), place.version == Version::V2)
    }

    /// The file with the cap on processor time, in kernels (`CONFIG_CFS_BANDWIDTH`) that have one, and its
    /// text.
    fn cpu_cap(&self) -> Option<(PathBuf, String)> {
        let place = &self.layout.cpu;
        let file = self.directory(place).join(cpu_cap_file(place.version));
        let text = fs::read_to_string(&file).ok()?;
        Some((file, text))
    }

    fn cap_cpu(&self, percent: u64) -> Result<(), CgroupError> {
        let unlimited = percent == u64::MAX;
        let Some((file, _)) = self.cpu_cap() else {
            return unlimited.then_some(()).ok_or(CgroupError::NoCpuCap);
        };
        let quota = percent.saturating_mul(CPU_PERIOD_US / 100);
        let text = match (self.layout.cpu.version, unlimited) {
            (Version::V2, true) => "max".to_owned(),
            (Version::V1, true) => "-1".to_owned(),
            // v1's period and v2's, which is kept when only one number is written, are never changed.
            (_, false) => quota.to_string(),
        };
        write(&file, &text).map_err(CgroupError::refused(
            format!("cap processor time at {text} us of {CPU_PERIOD_US} in"),
            &file,
        ))
    }

    /// As the kernel spells it: shares on v1, weight on v2.
    fn cpu_weight(&self) -> Option<u64> {
        self.cpu().shares().ok()
    }
}

/// The period of a new group's cap on processor time, in microseconds (kernel/sched/fair.c,
/// `default_cfs_period`).
const CPU_PERIOD_US: u64 = 100_000;

const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;

/// v1's 2 … 1024 … 262144 on v2's scale of 1 … 100 … 10000, by the quadratic map that crun and runc
/// have moved to: it takes both defaults to each other, which their older linear one (1024 to 39) did
/// not. Rounded up like theirs, but for what the last bit of a logarithm adds: 100 is not 101.
fn weight_of_shares(shares: u64) -> u64 {
    #[expect(clippy::cast_precision_loss, reason = "at most 2^18 after the clamp")]
    let log = (shares.clamp(MIN_SHARES, MAX_SHARES) as f64).log2();
    let weight = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and 10000 for every clamped input"
    )]
    let weight = (weight - 1e-9).ceil() as u64;
    weight.clamp(1, 10_000)
}

/// A file of each group that can be limited.
pub(super) fn memory_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "memory.limit_in_bytes",
        Version::V2 => "memory.max",
    }
}

/// The file whose presence says that swap is accounted, and can be limited, on this host.
pub(super) fn swap_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "memory.memsw.limit_in_bytes",
        Version::V2 => "memory.swap.max",
    }
}

/// v1's file that limits memory in TCP's queues, which counts for nothing there else, and for no socket that was made
/// before it was first written (mm/memcontrol-v1.c, `memcg_update_tcp_max`). v2 counts it as memory.
pub(super) const TCP_FILE: &str = "memory.kmem.tcp.limit_in_bytes";

/// Its file with what is queued.
const TCP_USAGE_FILE: &str = "memory.kmem.tcp.usage_in_bytes";

/// The file with the shares of processor time.
pub(super) fn shares_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "cpu.shares",
        Version::V2 => "cpu.weight",
    }
}

/// The file with the cap on processor time, in kernels that have one.
pub(super) fn cpu_cap_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "cpu.cfs_quota_us",
        Version::V2 => "cpu.max",
    }
}

/// One of v1's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    Memory,
    MemoryAndSwap,
    Tcp,
}

impl Write {
    fn file(self) -> &'static str {
        match self {
            Self::Memory => memory_file(Version::V1),
            Self::MemoryAndSwap => swap_file(Version::V1),
            Self::Tcp => TCP_FILE,
        }
    }
}

/// In which order to set v1's limits on memory to `bytes`: memory must never be above memory and swap
/// together (now `both`; `None` where swap is not accounted), else the kernel says EINVAL.
fn order(bytes: u64, both: Option<u64>) -> &'static [Write] {
    match both {
        None => &[Write::Memory],
        Some(now) if bytes > now => &[Write::MemoryAndSwap, Write::Memory],
        Some(_) => &[Write::Memory, Write::MemoryAndSwap],
    }
}

/// How long the kernel may reclaim for a smaller limit. v1 goes on for as long as it finds anything
/// (mm/memcontrol-v1.c, `mem_cgroup_resize_max`), which an app that streams through the page cache can make last.
const RESIZE: Duration = Duration::from_secs(5);

/// What v1 takes for no limit, as any larger number.
const LARGEST: u64 = i64::MAX.unsigned_abs();

/// Between two interrupts: the first may come a moment before the call.
const INTERRUPTS: Duration = Duration::from_millis(20);

/// Makes a call that is interrupted (`EINTR`) when it has lasted for so long.
fn within(
    patience: Duration,
    call: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    interrupt::prepare().map_err(|error| error.errno)?;
    let (done, outcome) = mpsc::channel();
    let thread = std::thread::Builder::new().name("limit".to_owned());
    let thread = thread.spawn(move || drop(done.send(call())))?;
    let mut wait = patience;
    loop {
        match outcome.recv_timeout(wait) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err(Errno::EIO.into()),
            Err(RecvTimeoutError::Timeout) => {
                // It is not joined, so the number is still its own.
                pthread_kill(thread.as_pthread_t(), interrupt::SIGNAL)?;
                wait = INTERRUPTS;
            }
        }
    }
}

/// v1 refuses by itself (EBUSY) what does not fit after reclaim, of which TCP's queues have none: so they come first.
fn limit_memory_v1(directory: &Path, bytes: u64) -> Result<(), CgroupError> {
    let now = |write: Write| {
        let path = directory.join(write.file());
        path.exists().then(|| read_number(&path)).transpose()
    };
    let before = read_number(&directory.join(Write::Memory.file()))?;
    let (both, tcp) = (now(Write::MemoryAndSwap)?, now(Write::Tcp)?);
    let set = |write: Write, bytes: u64| {
        let path = directory.join(write.file());
        within(RESIZE, move || {
            let file = File::options().write(true).open(path)?;
            // Not by `write_all`, which begins again what was interrupted.
            nix::unistd::write(file, bytes.min(LARGEST).to_string().as_bytes())?;
            Ok(())
        })
    };
    let mut done = Vec::new();
    let first = tcp.map(|_| Write::Tcp);
    for step in first.iter().chain(order(bytes, both)) {
        let Err(error) = set(*step, bytes) else {
            done.push(*step);
            continue;
        };
        // Each socket may have a little beyond the limit, which can be more than one that is no smaller.
        if *step == Write::Tcp && tcp.is_some_and(|old| bytes >= old) {
            continue;
        }
        for step in done {
            let old = match step {
                Write::Memory => Some(before),
                Write::MemoryAndSwap => both,
                Write::Tcp => tcp,
            };
            // Back up, or back down before anything could have used it: the kernel has no reason to
            // refuse, and the first error is the one to tell.
            let _gone = old.map(|old| set(step, old));
        }
        if matches!(errno_of(&error), Some(Errno::EBUSY | Errno::EINTR)) {
            let usage = read_number(&directory.join("memory.usage_in_bytes"))?;
            let queued = tcp.and_then(|_| read_number(&directory.join(TCP_USAGE_FILE)).ok());
            return Err(in_use(bytes, usage.max(queued.unwrap_or(0))));
        }
        return Err(CgroupError::refused(
            format!("limit memory to {bytes} bytes in"),
            directory,
        )(error));
    }
    // What it used before says nothing of this limit: whether it was reached is told by the peak.
    if bytes < before {
        for peak in [
            "memory.max_usage_in_bytes",
            "memory.memsw.max_usage_in_bytes",
        ] {
            let _not_accounted = write(&directory.join(peak), "0");
        }
    }
    Ok(())
}

/// How often the kernel is asked to reclaim before a limit counts as one that does not fit; it asks
/// itself as often before it kills (MAX_RECLAIM_RETRIES in mm/memcontrol.c).
const RECLAIMS: u32 = 16;

/// Bytes that are reclaimed beyond what is asked for: each CPU holds up to 64 pages that count as used
/// (MEMCG_CHARGE_BATCH in mm/memcontrol.c).
const RECLAIM_MORE: u64 = 1 << 20;

/// v2 would kill until it fits, so what is in use is looked at, and reclaimed, before. An app that
/// grows in the instant between is killed as it would be for growing an instant later.
fn limit_memory_v2(directory: &Path, bytes: u64) -> Result<(), CgroupError> {
    let current = directory.join("memory.current");
    let mut usage = read_number(&current)?;
    for _ in 0..RECLAIMS {
        if usage <= bytes {
            break;
        }
        // EAGAIN means "not all of it"; it does not matter why, but how much is left. (Linux 5.19.)
        let wanted = usage - bytes + RECLAIM_MORE;
        let _partly = write(&directory.join("memory.reclaim"), &wanted.to_string());
        usage = read_number(&current)?;
    }
    if usage > bytes {
        return Err(in_use(bytes, usage));
    }
    let refused = |error| {
        let act = format!("limit memory to {bytes} bytes in");
        CgroupError::refused(act, directory)(io_error(error))
    };
    let memory = MemController::new(directory.to_owned(), true);
    // First, as it never changes again: nothing to undo if the other write fails.
    if directory.join(swap_file(Version::V2)).exists() {
        memory.set_memswap_limit(0).map_err(refused)?;
    }
    memory
        .set_limit(i64::try_from(bytes).unwrap_or(i64::MAX))
        .map_err(refused)
}

/// The refusal of a limit below `usage`, which is what could not be reclaimed. In whole MiB, the unit of
/// the bus, and with room for an app at rest to go on.
fn in_use(limit: u64, usage: u64) -> CgroupError {
    const MIB: u64 = 1 << 20;
    CgroupError::MemoryInUse {
        limit,
        usage,
        smallest: (usage.div_ceil(MIB) + 1) * MIB,
    }
}

/// The kernel's answer behind an error of `cgroups-rs`.
pub(super) fn io_error(error: cgroups_rs::error::Error) -> io::Error {
    let cause = std::error::Error::source(&error)
        .and_then(|cause| cause.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error);
    cause.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::{Write, order, weight_of_shares};

    #[test]
    fn the_memory_limit_never_passes_memory_and_swap() {
        for (bytes, both) in [(5, 9), (9, 9), (9, 5), (1, u64::MAX), (u64::MAX, 1)] {
            // Before, memory is at most `both`; the kernel checks after each write.
            let mut now = (both, both);
            for write in order(bytes, Some(both)) {
                match write {
                    Write::Memory => now.0 = bytes,
                    Write::MemoryAndSwap => now.1 = bytes,
                    Write::Tcp => panic!("it is no part of these"),
                }
                assert!(now.0 <= now.1, "{bytes} from {both}");
            }
            assert_eq!(now, (bytes, bytes));
        }
        assert_eq!(order(5, None), [Write::Memory]);
    }

    #[test]
    fn shares_become_weights_by_the_quadratic_map() {
        let table = [
            (0, 1),
            (2, 1),
            (102, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (262_144, 10_000),
        ];
        for (shares, weight) in table {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
        let all: Vec<u64> = (2..=262_144).map(weight_of_shares).collect();
        assert!(all.is_sorted());
    }
}
