//! What a container needs of this host's pools, taken before anything is made of it.

use super::{EngineError, Shared};
use crate::host::network::Lease;
use std::sync::Arc;

/// Addresses and a port that wait for their container. What no container took goes back to the pools
/// when this is dropped.
#[derive(Debug)]
pub struct Place {
    shared: Arc<Shared>,
    lease: Option<Lease>,
    port: Option<u16>,
}

impl Place {
    /// Takes both or none.
    pub(super) fn take(shared: &Arc<Shared>) -> Result<Self, EngineError> {
        let (lease, port) = shared.network.reserve()?;
        Ok(Self {
            shared: Arc::clone(shared),
            lease: Some(lease),
            port: Some(port),
        })
    }

    /// The addresses are the caller's now.
    pub(super) fn lease(&mut self) -> Option<Lease> {
        self.lease.take()
    }

    /// The port is the caller's now.
    pub(super) fn port(&mut self) -> Option<u16> {
        self.port.take()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let network = &self.shared.network;
        network.unreserve(self.lease.as_ref(), self.port);
    }
}
