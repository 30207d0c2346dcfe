//! The agent's side of a container's making: the conversation with its `wshd`.
//!
//! ```text
//! start ─▶ Launcher ─ cloned ─▶ Born{init, netns, …} ─ go ─▶ Ready
//! ```
//!
//! Dropping any of them hangs up the control socket, which ends an init that does not serve yet.

use super::{EngineError, Shared, Spec, blocking};
use crate::host::cgroups::Group;
use crate::host::depot::Directory;
use crate::host::depot::disk::Disk;
use crate::host::helpers::{Command, Leash};
use crate::host::network::Lease;
use crate::host::watched;
use container::fault::{Context, SysError};
use container::launch::{
    CONTROL_FD, Event, FIRST_GROUP_FD, GO, Ids, LAUNCH_FD, Launch, Link, MAX_EVENT,
};
use container::sys::fdpass;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// How long a container's making may take in all. It takes some ten milliseconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// What the container's end of the veth is called inside.
const LINK_NAME: &str = "eth0";

/// A `wshd` that was started.
#[derive(Debug)]
pub(super) struct Launcher {
    control: Control,
}

/// A container's init that waits for its link.
#[derive(Debug)]
pub(super) struct Born {
    /// Its process.
    pub(super) init: OwnedFd,
    /// Its network namespace.
    pub(super) netns: OwnedFd,
    control: Control,
}

#[derive(Debug)]
struct Control {
    socket: AsyncFd<OwnedFd>,
    /// It has ended by itself once the init exists.
    launcher: Leash,
    patience: Duration,
    end: Instant,
}

/// What a container is made of, as its init understands it; its control groups follow.
fn launch(spec: &Spec, (directory, ids): (&Directory, Ids), lease: &Lease, mtu: u32) -> Launch {
    let lowers = spec.layers.iter().chain([&spec.stack]).cloned();
    Launch {
        handle: spec.handle.clone(),
        ids,
        hostname: spec.hostname.clone(),
        root: directory.root(),
        lowers: lowers.collect::<Vec<PathBuf>>(),
        upper: directory.upper(),
        work: directory.work(),
        socket: directory.socket(),
        binds: spec.binds.clone(),
        network: Some(Link {
            name: LINK_NAME.to_owned(),
            address: lease.container,
            prefix: lease.prefix,
            gateway: lease.host,
            mtu,
        }),
        tmpfs_bytes: spec.tmpfs_bytes,
        v1_tasks: 0,
        v2_dir: false,
        disk: false,
    }
}

/// Starts the container's `wshd` with everything that it needs, at the numbers that it expects.
pub(super) async fn start(
    shared: &Shared,
    spec: &Spec,
    (directory, ids, disk): (&Directory, Ids, &Arc<Disk>),
    group: &Group,
    lease: &Lease,
) -> Result<Launcher, EngineError> {
    let patience = shared.launch_patience;
    let end = Instant::now() + patience;
    let launch = launch(spec, (directory, ids), lease, shared.network.mtu());
    let (group, directory, disk) = (group.clone(), directory.clone(), Arc::clone(disk));
    let (ours, fds) = blocking(move || descriptors(launch, &group, &directory, &disk)).await?;
    let command = Command {
        program: "wshd",
        argv0: Some(format!("wshd: {}", spec.handle).into()),
        args: Vec::new(),
        env: Vec::new(),
        fds,
    };
    let launcher = shared.helpers.spawn(command).await?;
    let socket = watched(ours, Interest::READABLE | Interest::WRITABLE)
        .context("epoll_ctl", "control socket")?;
    Ok(Launcher {
        control: Control {
            socket,
            launcher: Leash(launcher),
            patience,
            end,
        },
    })
}

/// The agent's end of the control socket, and everything for `wshd` with its numbers.
fn descriptors(
    mut launch: Launch,
    group: &Group,
    directory: &Directory,
    disk: &Disk,
) -> Result<(OwnedFd, Vec<(OwnedFd, RawFd)>), EngineError> {
    let join = group.join_files()?;
    launch.v1_tasks = u32::try_from(join.v1_tasks.len()).unwrap_or(u32::MAX);
    launch.v2_dir = join.v2_dir.is_some();
    let mount = disk.mount()?;
    launch.disk = mount.is_some();
    let kind = SockType::SeqPacket;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
        .context("socketpair", "AF_UNIX")?;
    let groups = join
        .v1_tasks
        .into_iter()
        .chain(join.v2_dir)
        .chain(mount)
        .zip(FIRST_GROUP_FD..);
    let mut fds: Vec<(OwnedFd, RawFd)> = groups.collect();
    fds.push((theirs, CONTROL_FD));
    fds.push((launch.to_memfd()?, LAUNCH_FD));
    fds.push((directory.log()?.into(), 2));
    Ok((ours, fds))
}

impl Launcher {
    /// Waits for the container's init.
    pub(super) async fn cloned(self) -> Result<Born, EngineError> {
        let (event, fds) = self
            .control
            .receive("the container's first process")
            .await?;
        let mut fds = fds.into_iter();
        match (event, fds.next(), fds.next()) {
            (Event::Cloned, Some(init), Some(netns)) => Ok(Born {
                init,
                netns,
                control: self.control,
            }),
            (Event::Failed { what, errno }, ..) => Err(failed(what, errno)),
            (Event::Cloned | Event::Ready, ..) => Err(EngineError::Protocol),
        }
    }
}

impl Born {
    /// Tells the init that its link is there and waits until it serves.
    pub(super) async fn go(self) -> Result<OwnedFd, EngineError> {
        self.control.send(GO).await?;
        match self.control.receive("the container's set-up").await?.0 {
            Event::Ready => Ok(self.init),
            Event::Failed { what, errno } => Err(failed(what, errno)),
            Event::Cloned => Err(EngineError::Protocol),
        }
    }
}

impl Control {
    async fn send(&self, packet: &[u8]) -> Result<(), EngineError> {
        let sent = self.socket.async_io(Interest::WRITABLE, |socket| {
            fdpass::send(socket, packet, &[], MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
        });
        match sent.await {
            Ok(()) => Ok(()),
            // Its reason is the next thing to be received.
            Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => Ok(()),
            Err(error) => Err(refused(&error).into()),
        }
    }

    /// The next event and the descriptors that came with it.
    async fn receive(&self, what: &'static str) -> Result<(Event, Vec<OwnedFd>), EngineError> {
        let mut buffer = [0; MAX_EVENT];
        let received = self.socket.async_io(Interest::READABLE, |socket| {
            let mut once = || fdpass::receive(socket.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
            // An init that ended before it read our packet leaves an error in front of its last words;
            // it is told once (unix(7), net/unix/af_unix.c: unix_release_sock).
            let first = once();
            let packet = if matches!(first, Err(Errno::ECONNRESET)) {
                once()
            } else {
                first
            };
            packet.map_err(io::Error::from)
        });
        let packet = match timeout_at(self.end, received).await {
            Err(_elapsed) => {
                return Err(EngineError::Deadline {
                    what,
                    waited: self.patience,
                });
            }
            Ok(packet) => packet.map_err(|error| refused(&error))?,
        };
        match buffer.get(..packet.length) {
            None | Some([]) => Err(self.hung_up().await),
            Some(bytes) => {
                let event = Event::decode(bytes).map_err(|_| EngineError::Protocol)?;
                Ok((event, packet.fds))
            }
        }
    }

    /// The launcher outlives the init's socket by no more than its own exit.
    async fn hung_up(&self) -> EngineError {
        match timeout_at(self.end, self.launcher.0.wait()).await {
            Ok(launcher) => EngineError::InitDied { launcher },
            Err(_elapsed) => EngineError::Deadline {
                what: "its launcher's end",
                waited: self.patience,
            },
        }
    }
}

fn failed(what: String, errno: i32) -> EngineError {
    EngineError::Init {
        what,
        source: Errno::from_raw(errno),
    }
}

fn refused(error: &io::Error) -> SysError {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    SysError {
        call: "recvmsg",
        on: "control socket".to_owned(),
        errno,
    }
}
