//! Making a container: a chain of steps, each with an undo that is known before the step begins.

use super::container::Container;
use super::{EngineError, Place, Shared, Spec, blocking, destroy, identity, launch, owned};
use crate::host::cgroups::Group;
use crate::host::depot::{DepotError, Directory, is_handle};
use crate::host::network::Lease;
use container::fault::SysError;
use nix::errno::Errno;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tracing::Instrument;

pub(super) async fn create(
    shared: Arc<Shared>,
    spec: Spec,
    mut place: Place,
) -> Result<Container, EngineError> {
    if !is_handle(&spec.handle) {
        return Err(EngineError::Handle(spec.handle));
    }
    let span = tracing::info_span!("create", handle = %spec.handle);
    let work = async move {
        let began = Instant::now();
        let mut undo = Undo {
            shared: Arc::clone(&shared),
            steps: Vec::new(),
        };
        match build(shared, &spec, &mut place, &mut undo).await {
            Ok(container) => {
                container.keep(place);
                let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(pid = container.pid(), elapsed_ms, "container created");
                Ok(Unclaimed(Some(container)))
            }
            Err(error) => {
                undo.run(&spec.handle).await;
                Err(error)
            }
        }
    };
    let mut made = owned(work.instrument(span)).await?;
    // Only `Unclaimed` itself takes it out, and that is when it is dropped.
    made.0.take().ok_or(EngineError::Protocol)
}

/// A container on its way to its caller. If the caller is gone, nobody will ever destroy it: so it
/// goes too.
struct Unclaimed(Option<Container>);

impl Drop for Unclaimed {
    fn drop(&mut self) {
        let Some(container) = self.0.take() else {
            return;
        };
        // Without a runtime the agent is leaving; the next one sweeps.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            if let Err(error) = container.destroy().await {
                tracing::warn!(handle = container.handle(), %error, "unclaimed container was left");
            }
        });
    }
}

async fn build(
    shared: Arc<Shared>,
    spec: &Spec,
    place: &mut Place,
    undo: &mut Undo,
) -> Result<Container, EngineError> {
    let lowers: Vec<PathBuf> = spec.layers.iter().chain([&spec.stack]).cloned().collect();
    let lowers = blocking(move || check_layers(lowers)).await?;
    let lease = place.lease().ok_or(EngineError::Protocol)?;
    undo.steps.push(Step::Lease(lease.clone()));
    let directory = make_directory(&shared, spec, lowers, &lease, undo).await?;
    let group = make_group(&shared, spec).await?;
    // From here on processes may be in it.
    undo.steps.push(Step::Group(group.clone()));
    let launcher = launch::start(&shared, spec, &directory, &group, &lease).await?;
    let born = launcher.cloned().await?;
    undo.steps.push(Step::Attached(lease.clone()));
    shared
        .network
        .attach(&spec.handle, born.netns.as_fd(), &lease)
        .await?;
    let init = born.go().await?;
    Container::new(
        shared,
        &spec.handle,
        directory,
        group,
        lease,
        Vec::new(),
        init,
    )
}

/// The directory is what makes a handle ours: of two creations with the same one, one gets it.
async fn make_directory(
    shared: &Arc<Shared>,
    spec: &Spec,
    lowers: Vec<PathBuf>,
    lease: &Lease,
    undo: &mut Undo,
) -> Result<Directory, EngineError> {
    undo.steps.push(Step::Directory);
    let (depot, handle) = (shared.depot.clone(), spec.handle.clone());
    let directory = match blocking(move || depot.create(&handle)).await {
        Err(SysError {
            errno: Errno::EEXIST,
            ..
        }) => {
            // Another container's.
            undo.steps.pop();
            return Err(EngineError::HandleInUse(spec.handle.clone()));
        }
        other => other?,
    };
    let (depot, spec, address) = (shared.depot.clone(), spec.clone(), lease.container);
    blocking(move || {
        let files = identity::files(&spec, address);
        depot
            .seed(&spec.handle, &lowers, &files)
            .map_err(DepotError::into)
    })
    .await
    .map(|()| directory)
}

/// A missing one is named here, and not by an errno of `mount`.
fn check_layers(lowers: Vec<PathBuf>) -> Result<Vec<PathBuf>, EngineError> {
    for path in &lowers {
        let failed = |source| EngineError::Layer {
            path: path.clone(),
            source,
        };
        if !std::fs::metadata(path).map_err(failed)?.is_dir() {
            return Err(failed(Errno::ENOTDIR.into()));
        }
    }
    Ok(lowers)
}

/// Undoes itself when it fails.
async fn make_group(shared: &Arc<Shared>, spec: &Spec) -> Result<Group, EngineError> {
    let (cgroups, handle, limits) = (shared.cgroups.clone(), spec.handle.clone(), spec.limits);
    Ok(blocking(move || cgroups.create(&handle, &limits)).await?)
}

/// What a failed creation must take back, in the order in which it was begun.
struct Undo {
    shared: Arc<Shared>,
    steps: Vec<Step>,
}

enum Step {
    Lease(Lease),
    Directory,
    Group(Group),
    Attached(Lease),
}

impl Undo {
    /// Takes everything back, last thing first. A failure is logged, because the error that matters is
    /// the one that led here. It ends the undoing only where processes may still use what is left:
    /// that stays for [`super::Engine::sweep`].
    async fn run(self, handle: &str) {
        for step in self.steps.into_iter().rev() {
            let undone = match step {
                Step::Attached(lease) => {
                    self.shared.network.detach(handle, &lease, &[]).await;
                    Ok(())
                }
                Step::Group(group) => destroy::empty_and_remove(handle, group).await,
                Step::Directory => self.shared.discard(handle).await,
                Step::Lease(lease) => {
                    self.shared.network.release(lease);
                    Ok(())
                }
            };
            if let Err(error) = undone {
                tracing::warn!(%error, "creation was not undone");
                return;
            }
        }
    }
}
