//! What a container may use, written to its groups.

use super::layout::Version;
use super::usage::read_number;
use super::{CgroupError, Group, errno_of, write};
use cgroups_rs::cpu::CpuController;
use cgroups_rs::devices::{DevicePermissions, DeviceType, DevicesController};
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;
use cgroups_rs::{Controller, MaxValue};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// What a container may use. `None` leaves a value as it is, which in a new group is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory in bytes, page cache and tmpfs included; the kernel rounds down to pages. It is the
    /// limit of memory and swap together: a container does not swap.
    pub memory_bytes: Option<u64>,
    /// Weight against other containers on the scale of v1, 2 to 262144, clamped; 1024 is usual.
    pub cpu_shares: Option<u64>,
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
        let (shares, pids) = (self.cpu_weight(), self.pids_max());
        self.apply(limits).inspect_err(|_| {
            // Memory comes last and undoes itself, so these two are all that can have changed. What
            // was accepted before is accepted again; if the group is gone nothing matters.
            if let (Some(cpu), Some(shares)) = (self.cpu(), shares) {
                let _gone = cpu.set_shares(shares);
            }
            if let (Some(controller), Some(pids)) = (self.pids_controller(), pids) {
                let _gone = controller.set_pid_max(pids);
            }
        })
    }

    /// Writes the limits; on failure those before it in the order cpu, pids, memory have changed.
    pub(super) fn apply(&self, limits: &Limits) -> Result<(), CgroupError> {
        if let (Some(cpu), Some(shares)) = (self.cpu(), limits.cpu_shares) {
            let value = match cpu.v2() {
                true => weight_of_shares(shares),
                false => shares.clamp(MIN_SHARES, MAX_SHARES),
            };
            cpu.set_shares(value).map_err(|error| {
                let act = format!("set the weight to {value} in");
                CgroupError::refused(act, cpu.path())(io_error(error))
            })?;
        }
        if let (Some(controller), Some(pids)) = (self.pids_controller(), limits.pids) {
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

    /// v1: reading and writing a few harmless devices, making none.
    pub(super) fn confine_devices(&self) -> Result<(), CgroupError> {
        /// null, zero, full, random, urandom, tty, ptmx and every pseudo-terminal (-1: all of them).
        const DEVICES: [(i64, i64); 8] = [
            (1, 3),
            (1, 5),
            (1, 7),
            (1, 8),
            (1, 9),
            (5, 0),
            (5, 2),
            (136, -1),
        ];
        const USE: [DevicePermissions; 2] = [DevicePermissions::Read, DevicePermissions::Write];
        let Some(place) = &self.layout.devices else {
            return Ok(());
        };
        let directory = self.directory(place);
        let refused =
            |error| CgroupError::refused("confine devices in", &directory)(io_error(error));
        let devices = DevicesController::new(directory.clone());
        devices
            .deny_device(DeviceType::All, -1, -1, &DevicePermissions::all())
            .map_err(refused)?;
        for (major, minor) in DEVICES {
            devices
                .allow_device(DeviceType::Char, major, minor, &USE)
                .map_err(refused)?;
        }
        Ok(())
    }

    pub(super) fn pids_controller(&self) -> Option<PidController> {
        let place = self.layout.pids.as_ref()?;
        Some(PidController::new(
            self.directory(place),
            place.version == Version::V2,
        ))
    }

    pub(super) fn pids_max(&self) -> Option<MaxValue> {
        self.pids_controller()?.get_pid_max().ok()
    }

    fn cpu(&self) -> Option<CpuController> {
        let place = self.layout.cpu.as_ref()?;
        Some(CpuController::new(
            self.directory(place),
            place.version == Version::V2,
        ))
    }

    /// As the kernel spells it: shares on v1, weight on v2.
    fn cpu_weight(&self) -> Option<u64> {
        self.cpu()?.shares().ok()
    }
}

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

/// The file whose presence says that swap is accounted, and can be limited, on this host.
pub(super) fn swap_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "memory.memsw.limit_in_bytes",
        Version::V2 => "memory.swap.max",
    }
}

/// One of v1's two limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    Memory,
    MemoryAndSwap,
}

/// In which order to set v1's two limits to `bytes`: memory must never be above memory and swap
/// together (now `both`; `None` where swap is not accounted), else the kernel says EINVAL.
fn order(bytes: u64, both: Option<u64>) -> &'static [Write] {
    match both {
        None => &[Write::Memory],
        Some(now) if bytes > now => &[Write::MemoryAndSwap, Write::Memory],
        Some(_) => &[Write::Memory, Write::MemoryAndSwap],
    }
}

/// v1 refuses by itself (EBUSY) what does not fit after reclaim.
fn limit_memory_v1(directory: &Path, bytes: u64) -> Result<(), CgroupError> {
    let both = directory.join(swap_file(Version::V1));
    let both = both.exists().then(|| read_number(&both)).transpose()?;
    let before = read_number(&directory.join("memory.limit_in_bytes"))?;
    let memory = MemController::new(directory.to_owned(), false);
    let set = |write: Write, bytes: u64| {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        match write {
            Write::Memory => memory.set_limit(bytes),
            Write::MemoryAndSwap => memory.set_memswap_limit(bytes),
        }
    };
    let mut done = Vec::new();
    for step in order(bytes, both) {
        let Err(error) = set(*step, bytes) else {
            done.push(*step);
            continue;
        };
        for step in done {
            let old = match step {
                Write::Memory => Some(before),
                Write::MemoryAndSwap => both,
            };
            // Back up, or back down before anything could have used it: the kernel has no reason to
            // refuse, and the first error is the one to tell.
            let _gone = old.map(|old| set(step, old));
        }
        let error = io_error(error);
        if errno_of(&error) == Some(Errno::EBUSY) {
            let usage = read_number(&directory.join("memory.usage_in_bytes"))?;
            return Err(CgroupError::MemoryInUse {
                limit: bytes,
                usage,
            });
        }
        return Err(CgroupError::refused(
            format!("limit memory to {bytes} bytes in"),
            directory,
        )(error));
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
        return Err(CgroupError::MemoryInUse {
            limit: bytes,
            usage,
        });
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

/// The kernel's answer behind an error of `cgroups-rs`.
fn io_error(error: cgroups_rs::error::Error) -> io::Error {
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
