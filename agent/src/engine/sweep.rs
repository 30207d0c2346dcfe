//! Removing what an agent that was killed has left, and no record knows.

use super::{EngineError, Saved, Shared, blocking, destroy};
use crate::host::depot::is_handle;
use crate::host::network::Attached;
use std::collections::{BTreeSet, HashSet};

/// A container as the network knows it.
pub(super) fn attached(saved: &Saved) -> Attached {
    Attached {
        handle: saved.handle.clone(),
        lease: saved.lease.clone(),
        ports: saved.ports.clone(),
    }
}

/// Removes what bears a handle that nobody knows. What bears no handle is not ours.
pub(super) async fn sweep(shared: &Shared, known: &HashSet<String>) -> usize {
    let strays = match strays(shared, known).await {
        Ok(strays) => strays,
        Err(error) => {
            tracing::warn!(%error, "leftovers could not be listed");
            return 0;
        }
    };
    let mut cleared = 0;
    for handle in strays {
        // Its processes first: a directory in use is not to be pulled away.
        match clear(shared, &handle).await {
            Ok(()) => {
                cleared += 1;
                tracing::info!(handle, "leftover container removed");
            }
            Err(error) => tracing::warn!(handle, %error, "leftover container was not removed"),
        }
    }
    if let Err(error) = shared.network.sweep_links(known).await {
        tracing::warn!(%error, "leftover links were not removed");
    }
    let depot = shared.depot.clone();
    if let Err(error) = blocking(move || depot.empty_trash()).await {
        tracing::warn!(%error, "trash was left");
    }
    cleared
}

async fn strays(shared: &Shared, known: &HashSet<String>) -> Result<BTreeSet<String>, EngineError> {
    let (depot, cgroups) = (shared.depot.clone(), shared.cgroups.clone());
    let found = blocking(move || Ok::<_, EngineError>([depot.list()?, cgroups.list()?])).await?;
    let found = found.into_iter().flatten();
    Ok(found
        .filter(|name| is_handle(name) && !known.contains(name))
        .collect())
}

async fn clear(shared: &Shared, handle: &str) -> Result<(), EngineError> {
    destroy::end_processes(shared, handle).await?;
    destroy::remains(shared, handle).await
}
