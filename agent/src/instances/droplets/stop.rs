//! A word from outside to the thread that fetches and unpacks.

use super::error::DropletError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Asks a thread to give up, which it does between two pieces of its work. Clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// [`DropletError::Abandoned`] once it was asked.
    pub(super) fn check(&self) -> Result<(), DropletError> {
        if self.0.load(Ordering::Relaxed) {
            return Err(DropletError::Abandoned("nobody waits for it any more"));
        }
        Ok(())
    }
}
