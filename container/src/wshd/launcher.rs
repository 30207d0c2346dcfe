//! The process that the agent starts: it makes the container's user namespace and then its init, names
//! that, and ends, so that the init becomes a child of the host's init.
//!
//! The init is born outside of the user namespace, into network, ipc and uts namespaces that belong to it: so
//! it makes the root file system with the host's rights (layers are mapped, devices bound), and crosses over
//! when that is done. Its mount namespace stays the host's: nothing inside can ever change it.

use super::measure::Measure;
use super::{serve, setup};
use crate::fault::{Context, SysError};
use crate::launch::{CONTROL_FD, Event, FIRST_GROUP_FD, Ids, LAUNCH_FD, Launch};
use crate::sys::clone::{Side, into_namespaces};
use crate::sys::{fdpass, process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_name;
use nix::sys::socket::MsgFlags;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, execve, pipe2, read, write};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

/// What the descriptors from 4 on said.
pub(super) struct Given {
    pub(super) launch: Launch,
    /// The `tasks` files of the v1 groups.
    pub(super) v1_tasks: Vec<OwnedFd>,
    /// The directory of the v2 group.
    pub(super) v2_dir: Option<OwnedFd>,
    /// The file system of the writable layer, if it has one of its own.
    pub(super) disk: Option<OwnedFd>,
}

/// The namespaces that belong to the container's root.
pub(super) struct Own {
    /// Its users.
    pub(super) users: OwnedFd,
    network: OwnedFd,
}

/// Makes the container's init. Returns in the launcher, and in an init that could not be made; the agent
/// has been told of an error by then.
pub(super) fn launch() -> Result<(), SysError> {
    drop_environment()?;
    // It may be executed from a memory file, whose number would be its name.
    set_name(c"wshd").context("prctl", "PR_SET_NAME")?;
    let control = process::inherited(CONTROL_FD)?;
    let side = given().and_then(|given| {
        // In the host's network namespace: /proc/net/unix inside would tell its path.
        let listener = setup::bind_to(&given.launch.socket)?;
        let own = namespaces(given.launch.ids)?;
        let mut ours = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
        if !Measure::PidNamespace.holds() {
            ours.remove(CloneFlags::CLONE_NEWPID);
        }
        let side = into_namespaces(ours, given.v2_dir.as_ref().map(AsFd::as_fd))?;
        Ok((side, given, own, listener))
    });
    let outcome = match side {
        Ok((Side::Child, given, Own { users, network }, listener)) => {
            drop(network);
            match setup::make(&control, given, users, listener) {
                Ok(server) => {
                    drop(control);
                    serve::serve(server)
                }
                Err(error) => Err(error),
            }
        }
        Ok((Side::Parent { pidfd, .. }, _, own, _)) => tell_clone(&control, &pidfd, &own.network),
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        // Nobody may be there to hear it; then the exit code tells.
        let event = Event::from(error.clone()).encode();
        let _ = fdpass::send(&control, &event, &[], MsgFlags::empty());
    }
    outcome
}

/// An environment would stay readable in `/proc/1/environ`; the kernel shows what `exec` was given.
fn drop_environment() -> Result<(), SysError> {
    if std::env::vars_os().next().is_none() {
        return Ok(());
    }
    let arguments = std::env::args_os().map(|argument| CString::new(argument.into_vec()));
    let arguments: Vec<CString> = arguments.flatten().collect();
    let nothing: [&CStr; 0] = [];
    match execve(c"/proc/self/exe", &arguments, &nothing).context("execve", "/proc/self/exe")? {}
}

fn given() -> Result<Given, SysError> {
    let launch = Launch::from_memfd(process::inherited(LAUNCH_FD)?)?;
    let count = i32::try_from(launch.v1_tasks).unwrap_or(i32::MAX).min(64);
    let end = FIRST_GROUP_FD + count;
    let v1_tasks = (FIRST_GROUP_FD..end)
        .map(process::inherited)
        .collect::<Result<Vec<_>, SysError>>()?;
    let v2_dir = if launch.v2_dir {
        Some(process::inherited(end)?)
    } else {
        None
    };
    let end = end + i32::from(launch.v2_dir);
    let disk = if launch.disk {
        Some(process::inherited(end)?)
    } else {
        None
    };
    let first_foreign = end + i32::from(launch.disk);
    if Measure::InitDescriptors.holds() {
        process::close_from(first_foreign.cast_unsigned()).context("close_range", first_foreign)?;
    }
    Ok(Given {
        launch,
        v1_tasks,
        v2_dir,
        disk,
    })
}

/// Makes the user namespace and those that belong to it, and joins all but the first.
///
/// A process that waits holds them while its ids are written, which takes rights that it no longer has.
fn namespaces(ids: Ids) -> Result<Own, SysError> {
    let others = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    let (held, hold) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "user namespace")?;
    // As the container's root already: whatever the kernel counts for a user namespace (inotify instances,
    // message queues, timers) it counts for whoever made it, too, and that must be nobody else.
    let (pidfd, pid, hold) = process::as_user(account(ids), || {
        match into_namespaces(others | CloneFlags::CLONE_NEWUSER, None)? {
            Side::Parent { pidfd, pid } => Ok((pidfd, pid, hold)),
            Side::Child => {
                drop(hold);
                let _hung_up = read(&held, &mut [0]);
                process::exit_now(0)
            }
        }
    })?;
    let owned = own(pid, ids);
    let joined = setns(&pidfd, others).context("setns", "network, ipc, uts");
    // It ends by our hang-up and is reaped; what it held stays, since we hold it now.
    drop((held, hold));
    while waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WALL)) == Err(Errno::EINTR) {}
    joined.and(owned)
}

/// On whose account the kernel puts what a container has.
pub(super) fn account(ids: Ids) -> u32 {
    if Measure::Account.holds() {
        ids.first
    } else {
        0
    }
}

/// Writes which ids the process's user namespace has, and opens what we want of it.
fn own(pid: i32, ids: Ids) -> Result<Own, SysError> {
    // user_namespaces(7): first inside, first outside, how many. Whoever writes it needs the rights of
    // the parent namespace, and may then leave setgroups(2) allowed.
    let map = format!("0 {} {}", ids.first, Ids::COUNT);
    for file in ["uid_map", "gid_map"] {
        let path = format!("/proc/{pid}/{file}");
        let opened = open(
            path.as_str(),
            OFlag::O_WRONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        );
        let opened = opened.context("open", &path)?;
        write(&opened, map.as_bytes()).context("write", format_args!("{path}: {map}"))?;
    }
    let namespace = |name: &str| {
        let path = format!("/proc/{pid}/ns/{name}");
        open(
            path.as_str(),
            OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .context("open", path)
    };
    Ok(Own {
        users: namespace("user")?,
        network: namespace("net")?,
    })
}

fn tell_clone(control: &OwnedFd, pidfd: &OwnedFd, network: &OwnedFd) -> Result<(), SysError> {
    let fds = [pidfd.as_fd(), network.as_fd()];
    fdpass::send(control, &Event::Cloned.encode(), &fds, MsgFlags::empty())
        .context("sendmsg", "control")
}
