//! Removing what an agent that was killed has left, and no record knows.

use super::{EngineError, Saved, Shared, blocking, destroy};
use crate::chain;
use crate::host::depot::is_handle;
use crate::host::network::Attached;
use std::collections::{BTreeSet, HashSet};

/// A container as the network knows it.
pub(super) fn attached(saved: &Saved) -> Attached {
    Attached {
        handle: saved.handle.clone(),
        lease: saved.lease.clone(),
        ports: saved.ports.clone(),
        egress: saved.egress.clone(),
        bandwidth: saved.bandwidth,
    }
}

/// What came of a sweep.
#[derive(Debug, Default)]
pub struct Swept {
    /// Handles of which nothing is left.
    pub cleared: usize,
    /// What resisted, and why.
    pub left: Vec<String>,
    /// The handles among that.
    pub(super) resisting: BTreeSet<String>,
}

/// Handles that nobody knows, and what went wrong in finding them. What bears no handle is not ours.
#[derive(Debug, Default)]
pub(super) struct Strays {
    handles: BTreeSet<String>,
    trouble: Vec<String>,
}

impl Strays {
    /// Takes out those that are in `some`.
    pub(super) fn split(&mut self, some: &HashSet<String>) -> Self {
        let handles = std::mem::take(&mut self.handles);
        let (taken, rest) = handles.into_iter().partition(|one| some.contains(one));
        self.handles = rest;
        Self {
            handles: taken,
            trouble: Vec::new(),
        }
    }
}

/// Finds them. Their links go at once: later, a link without a record may be a new container's.
pub(super) async fn strays(shared: &Shared, known: &HashSet<String>) -> Strays {
    let mut strays = Strays::default();
    match unknown(shared, known).await {
        Ok(found) => strays.handles = found,
        Err(error) => strays.trouble.push(error.to_string()),
    }
    if let Err(error) = shared.network.sweep_links(known).await {
        strays.trouble.push(error.to_string());
    }
    strays
}

/// The handles of directories and control groups that are not in `known`.
async fn unknown(
    shared: &Shared,
    known: &HashSet<String>,
) -> Result<BTreeSet<String>, EngineError> {
    let (depot, cgroups) = (shared.depot.clone(), shared.cgroups.clone());
    let found = blocking(move || Ok::<_, EngineError>([depot.list()?, cgroups.list()?])).await?;
    let names = found.into_iter().flatten();
    Ok(names
        .filter(|name| is_handle(name) && !known.contains(name))
        .collect())
}

/// Removes what nobody knows now nor knew when it was `sighted`; what to look for the next time.
pub(super) async fn orphans(
    shared: &Shared,
    known: &HashSet<String>,
    sighted: BTreeSet<String>,
) -> BTreeSet<String> {
    let found = match unknown(shared, known).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(error = %chain(&error), "whether something is nobody's is not known");
            return sighted;
        }
    };
    let (again, mut first) = found.into_iter().partition(|one| sighted.contains(one));
    let orphans = Strays {
        handles: again,
        trouble: Vec::new(),
    };
    first.extend(clear(shared, orphans).await.resisting);
    first
}

/// Removes them.
pub(super) async fn clear(shared: &Shared, strays: Strays) -> Swept {
    let mut swept = Swept {
        cleared: 0,
        left: strays.trouble,
        resisting: BTreeSet::new(),
    };
    // All processes first: a directory in use is not to be pulled away, and a disk may hang.
    let mut ended = Vec::new();
    for handle in strays.handles {
        let dead = destroy::end_processes(shared, &handle).await;
        ended.push((handle, dead));
    }
    for (handle, dead) in ended {
        let removed = match dead {
            Ok(()) => destroy::remains(shared, &handle).await,
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) => {
                swept.cleared += 1;
                tracing::info!(handle, "leftover container removed");
            }
            Err(error) => {
                swept.left.push(format!("container {handle}: {error}"));
                swept.resisting.insert(handle);
            }
        }
    }
    for left in &swept.left {
        tracing::warn!(left, "something was not removed");
    }
    swept
}

/// Removes them, however long that takes: what waits in the kernel, or is in use, need not for ever.
pub(super) async fn clear_all(shared: &Shared, mut strays: Strays) {
    let mut again = destroy::Again::new();
    loop {
        let handles = clear(shared, strays).await.resisting;
        if handles.is_empty() {
            return;
        }
        again.wait().await;
        strays = Strays {
            handles,
            trouble: Vec::new(),
        };
    }
}

/// Removes what was put out of sight.
pub(super) async fn empty_trash(shared: &Shared) -> Result<(), String> {
    let depot = shared.depot.clone();
    let emptied = blocking(move || depot.empty_trash()).await;
    shared.lookout.ask();
    emptied.map_err(|error| format!("trash: {error}"))
}
