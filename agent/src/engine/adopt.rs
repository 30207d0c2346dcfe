//! Finding a container of an earlier agent again, or telling why it is dead.

use super::{Container, EngineError, Saved, Shared, blocking, lock};
use container::client::Client;
use container::fault::SysError;
use container::sys::pidfd;
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// What became of a container while no agent looked.
#[derive(Debug)]
pub enum Adopted {
    /// It runs, and is this agent's now.
    Alive(Container),
    /// It is dead; [`super::Engine::destroy_handle`] removes what it left.
    Dead {
        /// Why, for a person and for `exit_description`.
        reason: &'static str,
    },
}

/// The machine was started anew since the container was.
pub const REBOOTED: &str = "host rebooted";
/// Its init was killed, or died.
pub const INIT_DIED: &str = "its init died";

pub(super) async fn adopt(shared: &Arc<Shared>, saved: &Saved) -> Result<Adopted, EngineError> {
    if saved.boot_id != shared.boot_id {
        return Ok(Adopted::Dead { reason: REBOOTED });
    }
    let directory = shared.depot.container(&saved.handle);
    let group = shared.cgroups.group(&saved.handle);
    let socket = directory.socket();
    let Some((init, pid)) = blocking(move || find_init(&socket)).await? else {
        return Ok(Adopted::Dead { reason: INIT_DIED });
    };
    let members = group.clone();
    if !blocking(move || members.pids()).await.contains(&pid) {
        return Err(EngineError::Astray {
            handle: saved.handle.clone(),
            pid,
        });
    }
    take(shared, saved)?;
    let (lease, ports) = (saved.lease.clone(), saved.ports.clone());
    let made = Container::new(
        Arc::clone(shared),
        &saved.handle,
        directory,
        group,
        lease,
        ports,
        init,
    );
    let container = made.inspect_err(|_| give_up(shared, saved, saved.ports.len()))?;
    let ports = lock(&container.inner.ports).len();
    tracing::info!(
        handle = saved.handle,
        pid = container.pid(),
        ports,
        "container adopted"
    );
    Ok(Adopted::Alive(container))
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
