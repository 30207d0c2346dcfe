//! The process that the agent starts: it makes the init, names it, and ends, so that the init becomes a
//! child of the host's init.

use super::{serve, setup};
use crate::fault::{Context, SysError};
use crate::launch::{CONTROL_FD, Event, FIRST_GROUP_FD, LAUNCH_FD, Launch};
use crate::sys::clone::{Side, into_namespaces};
use crate::sys::{fdpass, process};
use nix::fcntl::{OFlag, open};
use nix::sys::socket::MsgFlags;
use nix::sys::stat::Mode;
use nix::unistd::execve;
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
}

/// Makes the container's init. Returns in the launcher, and in an init that could not be made; the agent
/// has been told of an error by then.
pub(super) fn launch() -> Result<(), SysError> {
    drop_environment()?;
    let control = process::inherited(CONTROL_FD)?;
    let side = given().and_then(|given| {
        let side = into_namespaces(given.v2_dir.as_ref().map(AsFd::as_fd));
        side.map(|side| (side, given))
    });
    let outcome = match side {
        // A later issue re-executes this program from a sealed memory file before the clone, so that
        // /proc/1/exe of the container leads to no file of the host, and adds the user namespace to it.
        Ok((Side::Child, given)) => match setup::make(&control, given) {
            Ok(server) => {
                drop(control);
                serve::serve(server)
            }
            Err(error) => Err(error),
        },
        Ok((Side::Parent { pidfd, pid }, _)) => tell_clone(&control, &pidfd, pid),
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
    let first_foreign = end + i32::from(launch.v2_dir);
    process::close_from(first_foreign.cast_unsigned()).context("close_range", first_foreign)?;
    Ok(Given {
        launch,
        v1_tasks,
        v2_dir,
    })
}

fn tell_clone(control: &OwnedFd, pidfd: &OwnedFd, pid: i32) -> Result<(), SysError> {
    let path = format!("/proc/{pid}/ns/net");
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let namespace = open(path.as_str(), flags, Mode::empty()).context("open", path)?;
    let fds = [pidfd.as_fd(), namespace.as_fd()];
    fdpass::send(control, &Event::Cloned.encode(), &fds, MsgFlags::empty())
        .context("sendmsg", "control")
}
