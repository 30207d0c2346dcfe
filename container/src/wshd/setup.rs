//! The making of the container, by its init, from the clone to `Ready`: with the host's rights until
//! [`cross`], with those of the container's root from then on.

use super::launcher::Given;
use super::measure::Measure;
use super::root::Root;
use super::{mounts, network, root, seccomp};
use crate::client::with_address;
use crate::fault::{Context, SysError};
use crate::launch::{Event, GO, MAX_EVENT};
use crate::sys::{caps, fdpass, process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::{set_dumpable, set_name, set_no_new_privs};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, bind, listen, socket,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fchdir, pivot_root, setgroups,
    sethostname, setresgid, setresuid, setsid, write,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Connections that may wait to be accepted; the init is never away for longer than a fork.
const BACKLOG: i32 = 128;

/// What the init needs to serve; all that it keeps.
pub(super) struct Server {
    pub(super) listener: OwnedFd,
    pub(super) signals: SignalFd,
}

/// Makes the container around this process, which is pid 1 of it.
pub(super) fn make(
    control: &OwnedFd,
    given: Given,
    users: OwnedFd,
    listener: OwnedFd,
) -> Result<Server, SysError> {
    let Given {
        launch,
        v1_tasks,
        v2_dir,
        disk,
    } = given;
    drop(v2_dir);
    for tasks in v1_tasks {
        // "0" is the writing thread itself, and the write does not wait as one of a pid would.
        write(&tasks, b"0").context("write", "tasks of a v1 control group")?;
    }
    if Measure::CgroupNamespace.holds() {
        unshare(CloneFlags::CLONE_NEWCGROUP).context("unshare", "CLONE_NEWCGROUP")?;
    }
    let signals = detach_from_host()?;

    if Measure::PrivateMounts.holds() {
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .context("mount", "/ private")?;
    }
    network::leave_out_ipv6()?;
    root::place_disk(disk, &launch)?;
    let root = root::mount_overlay(&launch, &users)?;
    mounts::mount_kernel(&root, launch.tmpfs_bytes)?;
    mounts::mount_binds(&root, &launch.binds)?;
    mounts::mask(&root)?;
    sethostname(&launch.hostname).context("sethostname", &launch.hostname)?;
    enter(root)?;
    process::prepare_limits();

    wait_for_go(control)?;
    network::configure(&launch.handle, launch.network.as_ref())?;
    // With the host's rights still: what the kernel has for compiled filters is one store for the whole machine
    // (net.core.bpf_jit_limit), which apps can use up, and which only the host's root may go beyond
    // (`bpf_jit_charge_modmem` in kernel/bpf/core.c). Later, no container could be made then.
    seccomp::shut()?;
    cross(users)?;
    // By pid 1 itself, as the container's root: that is what a peer's SO_PEERPIDFD and SO_PEERCRED tell.
    let backlog = Backlog::new(BACKLOG).context("listen", BACKLOG)?;
    listen(&listener, backlog).context("listen", launch.socket.display())?;
    renounce()?;
    fdpass::send(control, &Event::Ready.encode(), &[], MsgFlags::empty())
        .context("sendmsg", "control")?;
    Ok(Server { listener, signals })
}

/// Own session, name, mask, groups and keys; signals come by descriptor from here on.
fn detach_from_host() -> Result<SignalFd, SysError> {
    setsid().context("setsid", "init")?;
    set_name(c"wshd").context("prctl", "PR_SET_NAME")?;
    umask(Mode::from_bits_truncate(0o022));
    setgroups(&[]).context("setgroups", "none")?;
    if Measure::Keyring.holds() {
        process::new_session_keyring().context("keyctl", "KEYCTL_JOIN_SESSION_KEYRING")?;
    }
    process::default_signals();
    // All but SIGCHLD would be ignored anyway: the kernel spares an init what it has no handler for.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
        .context("sigprocmask", "all")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let ended = SigSet::from(Signal::SIGCHLD);
    SignalFd::with_flags(&ended, flags).context("signalfd", "SIGCHLD")
}

/// Makes the socket on which the init will listen.
pub(super) fn bind_to(path: &Path) -> Result<OwnedFd, SysError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
        .context("socket", "AF_UNIX")?;
    // The mode is right from birth, not after a chmod.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = with_address(path, |address| bind(listener.as_raw_fd(), address));
    umask(before);
    bound.context("bind", path.display())?;
    Ok(listener)
}

/// Makes the root ours and lets go of the host's.
fn enter(root: Root) -> Result<(), SysError> {
    fchdir(&root.fd).context("fchdir", "root")?;
    drop(root);
    // The old root comes to lie over the new one, and is taken off (pivot_root(2), "pivot_root(., .)").
    pivot_root(".", ".").context("pivot_root", ".")?;
    umount2(".", MntFlags::MNT_DETACH).context("umount2", "the host's root")?;
    chdir("/").context("chdir", "/")?;
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .context("open", "/dev/null")?;
    dup2_stdin(&null).context("dup2", 0)?;
    dup2_stdout(&null).context("dup2", 1)?;
    dup2_stderr(&null).context("dup2", 2)
}

/// Blocks until the container's link is in our network namespace.
fn wait_for_go(control: &OwnedFd) -> Result<(), SysError> {
    let mut buffer = [0; MAX_EVENT];
    let packet = fdpass::receive(control, &mut buffer, MsgFlags::empty());
    let packet = packet.context("recvmsg", "control")?;
    match buffer.get(..packet.length) {
        Some(GO) => Ok(()),
        Some([]) => Err(Errno::ECONNRESET).context("recvmsg", "the agent left before the start"),
        _ => Err(Errno::EBADMSG).context("recvmsg", "control"),
    }
}

/// Becomes the container's root: all rights that are left are those of its user namespace, and there is no
/// way back.
fn cross(users: OwnedFd) -> Result<(), SysError> {
    if Measure::Users.holds() {
        setns(&users, CloneFlags::CLONE_NEWUSER).context("setns", "user")?;
    }
    drop(users);
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).context("setresgid", 0)?;
    setresuid(uid, uid, uid).context("setresuid", 0)?;
    // Neither core dumps nor a job between fork and exec let anybody look into this memory.
    set_dumpable(false).context("prctl", "PR_SET_DUMPABLE")
}

/// Keeps of the rights over its own user namespace those that it uses or gives on: it reads files of the tenant.
fn renounce() -> Result<(), SysError> {
    if Measure::Capabilities.holds() {
        let others = caps::Set(u64::MAX).without(caps::Set::INIT);
        caps::unbound(others).context("prctl", "PR_CAPBSET_DROP")?;
        let held = caps::held().context("capget", "init")?;
        caps::limit(caps::Set(caps::Set::INIT.0 & held.permitted.0)).context("capset", "init")?;
    }
    if Measure::NoNewPrivileges.holds() {
        set_no_new_privs().context("prctl", "PR_SET_NO_NEW_PRIVS")?;
    }
    Ok(())
}
