//! Bounding a container's writable layer: which way works here, and going it.

use super::{EngineError, blocking};
use crate::chain;
use crate::host::depot::disk::{Disk, DiskError, Disks, Limit, Space, Wanted};
use crate::host::depot::{Depot, Directory};
use crate::host::helpers::{Command, Ended, HelperError, Helpers, Leash};
use container::launch::Ids;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// How long it may take to make a file system. It takes some ten milliseconds.
const MKFS: Duration = Duration::from_secs(30);

/// What the way of images is tried with.
const TRIAL: Limit = Limit {
    bytes: 1 << 20,
    inodes: 64,
};

/// Looks which way of bounding works in this depot.
pub(super) async fn open(
    space: Space,
    depot: &Depot,
    helpers: &Helpers,
    wanted: Wanted,
) -> Result<Disks, EngineError> {
    let disks = match wanted {
        Wanted::Quota => quota(&space).await,
        Wanted::Image => image(&space, depot, helpers).await,
        Wanted::Unlimited => Ok(Disks::unlimited(space.clone())),
        Wanted::Auto => match quota(&space).await {
            Ok(disks) => Ok(disks),
            Err(no_quota) => {
                tracing::info!(no_quota, "project quotas are not used");
                image(&space, depot, helpers).await.or_else(|no_image| {
                    tracing::warn!(no_quota, no_image, "nothing here can limit disk space");
                    Ok(Disks::unlimited(space.clone()))
                })
            }
        },
    };
    let disks = disks.map_err(|why| DiskError::Unusable {
        wanted,
        base: space.base().to_owned(),
        why,
    })?;
    if !disks.bind() {
        tracing::warn!("disk space of instances is unlimited, and what they use is unknown");
    }
    Ok(disks)
}

async fn quota(space: &Space) -> Result<Disks, String> {
    let space = space.clone();
    blocking(move || Disks::quota(space)).await
}

/// Makes one and looks at it.
async fn image(space: &Space, depot: &Depot, helpers: &Helpers) -> Result<Disks, String> {
    let disks = Disks::image(space.clone())?;
    let (begun, ended) = (depot.clone(), depot.clone());
    let tried = async {
        let (directory, ids) = blocking(move || begun.trial()).await?;
        make(&disks, helpers, (&directory, ids), TRIAL).await
    };
    let tried = tried.await;
    blocking(move || {
        let tried = tried.map(drop);
        ended.tried();
        match tried {
            Err(error) if says_nothing(&error) => {
                tracing::warn!(error = %chain(&error), "a trial of images was given up");
                Ok(disks)
            }
            other => other.map(|()| disks).map_err(|error| error.to_string()),
        }
    })
    .await
}

/// Whether a trial has failed for what tells nothing of what works here: a slow machine, a full depot. Each start will.
fn says_nothing(error: &EngineError) -> bool {
    if let EngineError::Refused(refused)
    | EngineError::Disk(DiskError::Refused(refused))
    | EngineError::Helper(HelperError::Start {
        source: refused, ..
    }) = error
    {
        return refused.is_passing();
    }
    matches!(
        error,
        EngineError::Deadline { .. }
            | EngineError::Disk(
                DiskError::NotEnough { .. }
                    | DiskError::Mkfs {
                        ended: Ended::Signaled(_),
                        ..
                    }
            )
    )
}

/// Makes and bounds the writable layer of a container whose directory is fresh.
pub(super) async fn make(
    disks: &Disks,
    helpers: &Helpers,
    (directory, ids): (&Directory, Ids),
    limit: Limit,
) -> Result<Arc<Disk>, EngineError> {
    let (begun, place) = (disks.clone(), directory.clone());
    let (mkfs, log) = blocking(move || {
        let mkfs = begun.begin(&place, limit)?;
        Ok::<_, DiskError>((mkfs, place.log()?))
    })
    .await?;
    if let Some(mkfs) = mkfs {
        let command = Command {
            program: mkfs.program,
            argv0: None,
            args: mkfs.args,
            env: Vec::new(),
            fds: vec![(log.into(), 2)],
        };
        let child = Leash(helpers.spawn(command).await?);
        let ended = timeout(MKFS, child.0.wait()).await;
        let ended = ended.map_err(|_elapsed| EngineError::Deadline {
            what: "the file system of the container",
            waited: MKFS,
        })?;
        if ended != Ended::Exited(0) {
            let (program, place) = (mkfs.program, directory.clone());
            let said = blocking(move || place.last_words()).await;
            return Err(DiskError::Mkfs {
                program,
                ended,
                said,
            }
            .into());
        }
    }
    let (disks, place) = (disks.clone(), directory.clone());
    Ok(Arc::new(
        blocking(move || disks.complete(&place, ids, limit)).await?,
    ))
}
