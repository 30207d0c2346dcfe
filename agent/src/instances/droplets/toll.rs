//! A droplet on its way stops before it takes what containers were promised of the disk.

use super::error::DropletError;
use crate::host::depot::disk::Space;

/// Bytes that are written between two looks. Sixteen at once may so take twice of what the agent keeps for itself.
const STEP: u64 = 8 << 20;

/// What a file, a directory or a link takes beside its bytes, and at least.
pub(super) const ENTRY: u64 = 4096;

/// Looks from time to time whether there is room for more.
#[derive(Debug)]
pub(super) struct Toll<'a> {
    space: Option<&'a Space>,
    /// Bytes that may be written until the next look.
    ahead: u64,
}

impl<'a> Toll<'a> {
    /// Of this disk, if it is to be kept.
    pub(super) fn of(space: Option<&'a Space>) -> Self {
        Self { space, ahead: 0 }
    }

    /// Before so many bytes are written.
    ///
    /// # Errors
    /// [`DropletError::NoRoom`].
    pub(super) fn pay(&mut self, bytes: u64) -> Result<(), DropletError> {
        if let (Some(space), true) = (self.space, bytes > self.ahead) {
            let needed = STEP.max(bytes);
            space
                .has_room(needed)
                .map_err(|error| DropletError::NoRoom {
                    why: error.to_string(),
                })?;
            self.ahead = needed;
        }
        self.ahead = self.ahead.saturating_sub(bytes);
        Ok(())
    }
}
