//! What a group uses, read from its files.

use super::layout::Version;
use super::{CgroupError, Group};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What a container uses now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The working set in bytes: memory without the page cache that was not used lately.
    pub memory_bytes: u64,
    /// What the limit counts, in bytes: with all page cache, which gives way before anything is killed.
    pub charged_bytes: u64,
    /// Processor time since it was made, in nanoseconds; 0 where v1 lacks `cpuacct`.
    pub cpu_ns: u64,
    /// Processes and threads.
    pub pids: u64,
}

impl Group {
    /// What it uses now.
    ///
    /// # Errors
    /// [`CgroupError::Refused`], e.g. because the group is gone.
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        let charged_bytes = self.charged()?;
        Ok(Usage {
            memory_bytes: charged_bytes.saturating_sub(self.inactive()?),
            charged_bytes,
            cpu_ns: self.cpu_ns()?,
            pids: read_number(&self.directory(&self.layout.pids).join("pids.current"))?,
        })
    }

    /// The directory that the `oom` helper watches.
    #[must_use]
    pub fn memory_dir(&self) -> PathBuf {
        self.directory(&self.layout.memory)
    }

    /// How many of its processes the kernel killed for memory, since the group was made. v1 counts a
    /// kill in the victim's group only.
    ///
    /// # Errors
    /// As reading the file: `NotFound` or `ENODEV` when the group is gone. Never 0 for "unknown".
    pub fn oom_kills(&self) -> io::Result<u64> {
        let file = match self.layout.memory.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        read_key(&self.memory_dir().join(file), "oom_kill")
    }

    /// The most memory it ever used (v1: since its limit was last made smaller), in bytes, page cache included;
    /// `None` if the kernel does not say.
    #[must_use]
    pub fn memory_peak(&self) -> Option<u64> {
        let file = match self.layout.memory.version {
            Version::V1 => "memory.max_usage_in_bytes",
            Version::V2 => "memory.peak",
        };
        fs::read_to_string(self.memory_dir().join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Whether it was ever at its own limit of today: v1 says no more (its `failcnt` stays 0), v2 that an allocation
    /// failed there. `false` if the group is gone.
    #[must_use]
    pub fn memory_ran_out(&self) -> bool {
        /// An allocation of so many bytes may fail and leave the peak below the limit: the kernel kills for
        /// none that is larger (`PAGE_ALLOC_COSTLY_ORDER` is 3).
        const LARGEST: u64 = 8 * 4096;
        let directory = self.memory_dir();
        let file = |name: &str| directory.join(name);
        let reached = |peak: &str, limit: &str| {
            let (peak, limit) = (read_number(&file(peak)), read_number(&file(limit)));
            matches!((peak, limit), (Ok(peak), Ok(limit)) if peak.saturating_add(LARGEST) >= limit)
        };
        match self.layout.memory.version {
            Version::V1 => {
                reached("memory.max_usage_in_bytes", "memory.limit_in_bytes")
                    || reached(
                        "memory.memsw.max_usage_in_bytes",
                        "memory.memsw.limit_in_bytes",
                    )
            }
            // Not memory.events: there a group below would count, too (Linux 5.2).
            Version::V2 => read_key(&file("memory.events.local"), "oom").is_ok_and(|ooms| ooms > 0),
        }
    }

    /// The memory limit in bytes; `None` if there is none or the group is gone.
    #[must_use]
    pub fn memory_limit(&self) -> Option<u64> {
        let file = match self.layout.memory.version {
            Version::V1 => "memory.limit_in_bytes",
            Version::V2 => "memory.max",
        };
        let text = fs::read_to_string(self.memory_dir().join(file)).ok()?;
        // v1 spells "none" as the largest signed number rounded down to pages, v2 as `max`.
        text.trim()
            .parse()
            .ok()
            .filter(|limit| *limit < V1_UNLIMITED)
    }

    fn charged(&self) -> Result<u64, CgroupError> {
        read_number(&self.memory_dir().join(match self.layout.memory.version {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        }))
    }

    /// Page cache that was not used lately.
    fn inactive(&self) -> Result<u64, CgroupError> {
        let key = match self.layout.memory.version {
            Version::V1 => "total_inactive_file",
            Version::V2 => "inactive_file",
        };
        let stat = self.memory_dir().join("memory.stat");
        read_key(&stat, key).map_err(CgroupError::refused("read", &stat))
    }

    fn cpu_ns(&self) -> Result<u64, CgroupError> {
        if let Some(place) = &self.layout.cpuacct {
            return read_number(&self.directory(place).join("cpuacct.usage"));
        }
        // Every v2 group has it, also without the controller.
        let Some(place) = &self.layout.unified else {
            return Ok(0);
        };
        let stat = self.directory(place).join("cpu.stat");
        let us = read_key(&stat, "usage_usec").map_err(CgroupError::refused("read", &stat))?;
        Ok(us.saturating_mul(1000))
    }
}

/// `PAGE_COUNTER_MAX` in bytes (page_counter.h) with the largest pages of any architecture, 64 KiB.
const V1_UNLIMITED: u64 = i64::MAX as u64 / 65536 * 65536;

pub(super) fn read_number(path: &Path) -> Result<u64, CgroupError> {
    let text = fs::read_to_string(path);
    text.and_then(|text| parse(text.trim()))
        .map_err(CgroupError::refused("read", path))
}

/// The number behind `key` in a file of `key number` lines.
pub(super) fn read_key(path: &Path, key: &str) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    parse(line.ok_or_else(|| io::Error::other(format!("no line '{key}'")))?)
}

fn parse(number: &str) -> io::Result<u64> {
    number
        .parse()
        .map_err(|_| io::Error::other(format!("'{number}' is no number")))
}
