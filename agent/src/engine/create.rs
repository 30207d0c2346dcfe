//! Making a container: a chain of steps, each with an undo that is known before the step begins.

use super::container::Container;
use super::destroy::Again;
use super::lookout::Making;
use super::{EngineError, Place, Shared, Spec, blocking, destroy, disk, identity, launch, owned};
use crate::host::cgroups::Group;
use crate::host::depot::disk::Disk;
use crate::host::depot::{DepotError, Directory, is_handle, seed};
use crate::host::network::{Attached, Lease};
use container::fault::SysError;
use container::launch::Ids;
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
            making: Some(shared.lookout.making(&spec.handle, spec.disk)),
            shared: Arc::clone(&shared),
            steps: Vec::new(),
        };
        match build(shared, &spec, &mut place, &mut undo).await {
            Ok(container) => {
                container.keep(place);
                let elapsed_us = began.elapsed().as_micros();
                tracing::info!(pid = container.pid(), elapsed_us, "container created");
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
            let mut again = Again::new();
            while let Err(error) = container.destroy().await {
                again.after(container.handle(), error).await;
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
    let (directory, ids, disk) = make_directory(&shared, spec, lowers, &lease, undo).await?;
    let log_end = shared.kills.end().await;
    let group = make_group(&shared, spec).await?;
    // From here on processes may be in it.
    undo.steps.push(Step::Group(group.clone()));
    let place_on_disk = (&directory, ids, &disk);
    let launcher = launch::start(&shared, spec, place_on_disk, &group, &lease).await?;
    let born = launcher.cloned().await?;
    let attached = Attached {
        egress: spec.egress.clone(),
        bandwidth: spec.bandwidth,
        ..Attached::new(&spec.handle, lease)
    };
    undo.steps.push(Step::Attached(attached.clone()));
    shared
        .network
        .attach(attached.clone(), born.netns.as_fd())
        .await?;
    let init = born.go().await?;
    let container = Container::new(shared, attached, directory, group, init, log_end)?;
    container.keep_disk(disk);
    Ok(container)
}

/// The directory is what makes a handle ours: of two creations with the same one, one gets it.
async fn make_directory(
    shared: &Arc<Shared>,
    spec: &Spec,
    lowers: Vec<PathBuf>,
    lease: &Lease,
    undo: &mut Undo,
) -> Result<(Directory, Ids, Arc<Disk>), EngineError> {
    undo.steps.push(Step::Directory);
    let (depot, handle) = (shared.depot.clone(), spec.handle.clone());
    let (directory, ids) = match blocking(move || depot.create(&handle)).await {
        Err(DepotError::Refused(SysError {
            errno: Errno::EEXIST,
            ..
        })) => {
            // Another container's.
            undo.steps.pop();
            return Err(EngineError::HandleInUse(spec.handle.clone()));
        }
        Err(error @ DepotError::NoIds(_)) => {
            undo.steps.pop();
            return Err(error.into());
        }
        other => other?,
    };
    let disk = disk::make(&shared.disks, &shared.helpers, (&directory, ids), spec.disk).await?;
    if let Some(making) = undo.making.take() {
        making.until_counted();
    }
    let (spec, address) = (spec.clone(), lease.container);
    blocking(move || {
        let files = identity::files(&spec, address);
        seed(&disk.upper(), ids, &lowers, &files)
            .map_err(DepotError::into)
            .map(|()| (directory, ids, disk))
    })
    .await
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
    /// Until its disk is bounded, or all of it is taken back.
    making: Option<Making>,
    steps: Vec<Step>,
}

enum Step {
    Lease(Lease),
    Directory,
    Group(Group),
    Attached(Attached),
}

impl Undo {
    /// Takes everything back, last thing first. What resists is tried again by a task of its own: the error that
    /// matters is the one that led here.
    async fn run(mut self, handle: &str) {
        let Err(error) = self.go_on(handle).await else {
            return;
        };
        let (handle, mut again) = (handle.to_owned(), Again::new());
        tokio::spawn(async move {
            again.after(&handle, error).await;
            while let Err(error) = self.go_on(&handle).await {
                again.after(&handle, error).await;
            }
        });
    }

    /// Up to what fails: what may still run keeps everything that it could use.
    async fn go_on(&mut self, handle: &str) -> Result<(), EngineError> {
        while let Some(step) = self.steps.last() {
            match step {
                Step::Attached(attached) => self.shared.network.detach(attached).await,
                Step::Group(group) => destroy::empty_and_remove(handle, group.clone()).await?,
                Step::Directory => self.shared.discard(handle).await?,
                Step::Lease(lease) => self.shared.network.release(lease.clone()),
            }
            self.steps.pop();
        }
        Ok(())
    }
}
