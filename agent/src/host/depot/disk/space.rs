//! What of the depot's file system writable layers may have.

use super::{Directory, DiskError, Free, handles, image, quota};
use container::fault::{Context, SysError};
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Bytes that no layer gets: records, logs and what else the agent keeps of its instances, but for output.
const OWN: u64 = 64 << 20;

/// The file system that holds the depot, shared with the agent's own files and with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    base: PathBuf,
    spool_bytes: u64,
}

/// What a container whose writable layer is bounded was promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Promise {
    /// Bytes of its limit; `u64::MAX` where nobody knows them.
    pub(super) limit: u64,
    /// Bytes of that which are still to be had from the depot.
    pub(super) owed: u64,
}

impl Promise {
    /// No promise: whatever it has is used.
    const NONE: Self = Self {
        limit: u64::MAX,
        owed: 0,
    };

    /// What this container was promised; `None` as long as nothing bounds it, for it is being made.
    fn to(directory: &Directory) -> Result<Option<Self>, SysError> {
        // Where the one cannot be read the other is asked all the same.
        let quota = quota::promise(directory);
        if let Ok(Some(quota)) = quota {
            return Ok(Some(quota));
        }
        if let Some(image) = image::promise(directory)? {
            return Ok(Some(image));
        }
        quota?;
        let upper = directory.upper();
        let whole = upper.try_exists().context("stat", upper.display())?;
        Ok(whole.then_some(Self::NONE))
    }
}

/// What the depot's directories say.
#[derive(Debug, Default)]
struct Survey {
    directories: usize,
    counted: BTreeMap<String, u64>,
    owed: u64,
}

impl Space {
    /// Of a depot where all output of a container may take `spool_bytes`.
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

    /// A look at what new containers may have.
    pub(super) fn look(&self) -> Result<Free, SysError> {
        let survey = self.survey()?;
        let bytes = self.beside(survey.counted.len())?;
        Ok(Free {
            bytes: bytes.saturating_sub(survey.owed),
            counted: survey.counted,
            spool_bytes: self.spool_bytes,
        })
    }

    /// Whether so many bytes are neither used nor promised nor kept, for a container that has its directory, or for the agent
    /// itself.
    ///
    /// # Errors
    /// [`DiskError::NotEnough`], or as statvfs(3).
    pub fn has_room(&self, needed: u64) -> Result<(), DiskError> {
        let free = self.left()?;
        if needed <= free {
            return Ok(());
        }
        Err(self.not_enough(needed, free))
    }

    /// Bytes that are neither used nor promised nor kept.
    pub(super) fn left(&self) -> Result<u64, SysError> {
        let survey = self.survey()?;
        let bytes = self.beside(survey.directories)?;
        Ok(bytes.saturating_sub(survey.owed))
    }

    fn survey(&self) -> Result<Survey, SysError> {
        let mut survey = Survey::default();
        for handle in handles(&self.base)? {
            survey.directories += 1;
            let promise = Promise::to(&Directory::below(&self.base, &handle));
            let promise = promise.unwrap_or_else(|error| {
                // One that is broken stops no other.
                tracing::warn!(handle, %error, "what it was promised is unknown");
                Some(Promise::NONE)
            });
            if let Some(promise) = promise {
                survey.owed = survey.owed.saturating_add(promise.owed);
                survey.counted.insert(handle, promise.limit);
            }
        }
        Ok(survey)
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
