//! What of the depot's file system writable layers may have.

use super::{Directory, DiskError, handles, image, quota};
use container::fault::{Context, SysError};
use nix::sys::statvfs::statvfs;
use std::path::{Path, PathBuf};

/// Bytes that no layer gets: records, logs and what else the agent keeps of its instances, but for output.
const OWN: u64 = 64 << 20;

/// The file system that holds the depot, shared with the agent's own files and with others.
#[derive(Debug, Clone)]
pub struct Space {
    base: PathBuf,
    spool_bytes: u64,
}

impl Space {
    /// Of a depot where each container's output may take `spool_bytes`.
    #[must_use]
    pub fn new(base: &Path, spool_bytes: u64) -> Self {
        Self {
            base: base.to_owned(),
            spool_bytes,
        }
    }

    /// The depot.
    #[must_use]
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Bytes that one more container could have: not used, and not kept for what the agent writes itself. Some may
    /// be promised.
    pub(super) fn free(&self) -> Result<u64, SysError> {
        self.beside(handles(&self.base)?.len() + 1)
    }

    /// Whether so many bytes are neither used nor promised nor kept, for a container that has its directory.
    pub(super) fn has_room(&self, needed: u64) -> Result<(), DiskError> {
        let mut promised = 0_u64;
        let handles = handles(&self.base)?;
        for handle in &handles {
            let path = self.base.join("containers").join(handle);
            let directory = Directory { path };
            for owed in [quota::owed(&directory), image::owed(&directory)] {
                match owed {
                    Ok(owed) => promised = promised.saturating_add(owed),
                    // One that is broken stops no other.
                    Err(error) => tracing::warn!(handle, %error, "what it was promised is unknown"),
                }
            }
        }
        let free = self.beside(handles.len())?.saturating_sub(promised);
        if needed <= free {
            return Ok(());
        }
        Err(self.not_enough(needed, free))
    }

    pub(super) fn not_enough(&self, needed: u64, free: u64) -> DiskError {
        DiskError::NotEnough {
            needed,
            free,
            base: self.base.clone(),
        }
    }

    /// What is left beside what so many containers make the agent write.
    fn beside(&self, containers: usize) -> Result<u64, SysError> {
        let space = statvfs(&self.base).context("statvfs", self.base.display())?;
        let available = space
            .blocks_available()
            .saturating_mul(space.fragment_size());
        let spools = self.spool_bytes.saturating_mul(containers as u64);
        Ok(available.saturating_sub(OWN.saturating_add(spools)))
    }
}
