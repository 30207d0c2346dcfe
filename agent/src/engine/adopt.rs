//! Finding a container of an earlier agent again, or telling why it is dead.

use super::container::dead;
use super::{Container, EngineError, Saved, Shared, blocking, lock, sweep};
use crate::chain;
use crate::host::cgroups::Group;
use crate::host::depot::Directory;
use crate::host::watched;
use container::client::Client;
use container::fault::{Context, SysError};
use container::sys::pidfd;
use nix::errno::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use tokio::io::Interest;

/// What became of a container while no agent looked.
#[derive(Debug)]
pub enum Adopted {
    /// It runs, and is this agent's now.
    Alive(Container),
    /// It is dead.
    Dead {
        /// Why, for a person and for `exit_description`.
        reason: &'static str,
        /// What is left of it: its jobs can be followed to their ends, and it wants to be destroyed.
        container: Container,
    },
}

/// The machine was started anew since the container was.
pub const REBOOTED: &str = "host rebooted";
/// Its init was killed, or died.
pub const INIT_DIED: &str = "its init died";

pub(super) async fn adopt(shared: &Arc<Shared>, saved: &Saved) -> Result<Adopted, EngineError> {
    claim(shared, saved)?;
    let directory = shared.depot.container(&saved.handle);
    let group = shared.cgroups.group(&saved.handle);
    let dead = |reason| {
        let container = hold(
            shared,
            saved,
            directory.clone(),
            group.clone(),
            dead_init()?,
        )?;
        tracing::info!(handle = saved.handle, reason, "container is dead");
        Ok(Adopted::Dead { reason, container })
    };
    if saved.boot_id != shared.boot_id {
        return dead(REBOOTED);
    }
    let socket = directory.socket();
    let Some((init, pid)) = blocking(move || find_init(&socket)).await? else {
        return dead(INIT_DIED);
    };
    let members = group.clone();
    if !blocking(move || members.pids()).await.contains(&pid) {
        return Err(EngineError::Astray {
            handle: saved.handle.clone(),
            pid,
        });
    }
    let container = hold(shared, saved, directory.clone(), group.clone(), init)?;
    find_disk(shared, &container, directory).await;
    let ports = lock(&container.inner.ports).len();
    tracing::info!(
        handle = saved.handle,
        pid = container.pid(),
        ports,
        "container adopted"
    );
    Ok(Adopted::Alive(container))
}

/// See [`super::Engine::life_of`].
pub(super) async fn life_of(
    shared: &Shared,
    handle: &str,
) -> Result<Option<impl Future<Output = ()> + Send + use<>>, EngineError> {
    let socket = shared.depot.container(handle).socket();
    let Some((init, _)) = blocking(move || find_init(&socket)).await? else {
        return Ok(None);
    };
    let init = watched(init, Interest::READABLE).context("epoll_ctl", "pidfd")?;
    Ok(Some(async move { dead(&init).await }))
}

/// Without it the container runs as it did; its limit cannot be changed and its use is not known.
async fn find_disk(shared: &Shared, container: &Container, directory: Directory) {
    let disks = shared.disks.clone();
    match blocking(move || disks.find(&directory)).await {
        Ok(disk) => container.keep_disk(Arc::new(disk)),
        Err(error) => {
            let handle = container.handle();
            tracing::warn!(handle, error = %chain(&error), "the bounds of its writable layer were not found");
        }
    }
}

/// For a container with this init, what the record says.
fn hold(
    shared: &Arc<Shared>,
    saved: &Saved,
    directory: Directory,
    group: Group,
    init: OwnedFd,
) -> Result<Container, EngineError> {
    let attached = sweep::attached(saved);
    let container = Container::new(
        Arc::clone(shared),
        attached,
        directory,
        group,
        init,
        saved.log_end,
    )?;
    lock(&shared.claims).remove(&saved.handle);
    Ok(container)
}

/// Stands for the init of a container that is dead: readable, as the descriptor of a dead process is,
/// and no process to signal.
fn dead_init() -> Result<OwnedFd, SysError> {
    let (reader, _closed) = io::pipe().context("pipe2", "dead init")?;
    Ok(reader.into())
}

/// The process that listens on the container's socket, by descriptor and number, if there is one.
fn find_init(socket: &Path) -> Result<Option<(OwnedFd, i32)>, SysError> {
    let init = match Client::connect(socket).and_then(|client| client.peer_pidfd()) {
        Err(SysError { errno, .. }) if is_dead(errno) => return Ok(None),
        other => other?,
    };
    Ok(pidfd::pid_of(&init)?.map(|pid| (init, pid)))
}

/// No socket, nobody behind it, or its owner died while we asked.
fn is_dead(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOENT | Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::ESRCH
    )
}

/// Keeps its addresses and ports from others, who could not be told from it, until a container has them: whatever becomes of the
/// adoption, and however often it is tried.
fn claim(shared: &Shared, saved: &Saved) -> Result<(), EngineError> {
    let mut claims = lock(&shared.claims);
    if !claims.contains(&saved.handle) {
        take(shared, saved)?;
        claims.insert(saved.handle.clone());
    }
    Ok(())
}

/// Takes its addresses and ports out of the pools: all, or none.
fn take(shared: &Shared, saved: &Saved) -> Result<(), EngineError> {
    shared.network.adopt_lease(&saved.lease)?;
    for (taken, (host, _)) in saved.ports.iter().enumerate() {
        if let Err(error) = shared.network.adopt_port(*host) {
            give_up(shared, saved, taken);
            return Err(error.into());
        }
    }
    Ok(())
}

fn give_up(shared: &Shared, saved: &Saved, ports: usize) {
    for (host, _) in saved.ports.iter().take(ports) {
        shared.network.release_port(*host);
    }
    shared.network.release(saved.lease.clone());
}
