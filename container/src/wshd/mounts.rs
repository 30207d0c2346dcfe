//! What is mounted in a container's root: proc, dev, sys, bind mounts, masks. Everything by descriptor,
//! before the root is entered.

use super::measure::Measure;
use super::root::{Missing, Root, Symlinks, by_descriptor, resolve};
use crate::fault::{Context, SysError};
use crate::launch::{Access, Bind};
use crate::sys::mount::{NO_DEV, NO_EXEC, NO_SUID, READ_ONLY, bind};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use nix::unistd::symlinkat;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);
const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Devices that a container has, with their numbers (Linux's admin-guide/devices.txt). The host's nodes
/// are bound: a device group may forbid to make new ones.
const DEVICES: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];
/// What says too much of the host or does too much to it: hidden.
const MASKED: [&str; 19] = [
    "proc/acpi",
    "proc/asound",
    // Of neighbours' disks: how large each is, and what it reads and writes.
    "proc/diskstats",
    "proc/fs/ext4",
    "proc/fs/jbd2",
    "proc/interrupts",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/partitions",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/timer_stats",
    // Also by /sys/block, /sys/class/block and /sys/dev/block, which lead to it: loop devices name their files.
    "sys/devices/virtual/block",
    "sys/devices/virtual/powercap",
    "sys/firmware",
    "sys/fs/ext4",
    "proc/kmsg",
];
/// What may be read only.
const READ_ONLY_PATHS: [&str; 6] = [
    "proc/bus",
    "proc/fs",
    "proc/irq",
    // Whoever may write asks the kernel to watch the whole host.
    "proc/pressure",
    "proc/sys",
    "proc/sysrq-trigger",
];

/// Mounts `/proc`, `/sys` and `/dev`. Must be called in the container's pid, network and ipc namespaces.
pub(super) fn mount_kernel(root: &Root, shm_bytes: u64) -> Result<(), SysError> {
    fresh(root, "proc", "proc", SAFE, "")?;
    fresh(root, "sys", "sysfs", SAFE | MsFlags::MS_RDONLY, "")?;
    // Room for mount points and symlinks, and no store for files that no quota counts.
    let owner = format!("uid={first},gid={first}", first = root.ids.first);
    let small = format!("mode=755,size=64k,nr_inodes=256,{owner}");
    fresh(root, "dev", "tmpfs", SAFE, &small)?;
    fresh(
        root,
        "dev/pts",
        "devpts",
        // Terminals are devices. The host has 3,072 for all containers (kernel.pty.max - kernel.pty.reserve).
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=0600,max=32",
    )?;
    let shm = format!("mode=1777,size={shm_bytes},nr_inodes=65536,{owner}");
    fresh(root, "dev/shm", "tmpfs", SAFE, &shm)?;
    match fresh(root, "dev/mqueue", "mqueue", SAFE, "") {
        // A kernel without POSIX message queues.
        Err(error) if error.errno == Errno::ENODEV => {}
        other => other?,
    }
    for (name, major, minor) in DEVICES {
        let target = inside(root, &format!("dev/{name}"), Missing::File)?;
        // Read-only keeps the host's node from chmod and chown; the device is written as ever.
        let attributes = READ_ONLY | NO_SUID | NO_EXEC;
        bind(
            device(name, major, minor)?.as_fd(),
            target.as_fd(),
            attributes,
            name,
        )?;
    }
    let dev = inside(root, "dev", Missing::Refuse)?;
    for (to, name) in LINKS {
        symlinkat(to, &dev, name).context("symlinkat", name)?;
        root.own(&dev, name).context("fchownat", name)?;
    }
    Ok(())
}

/// Shows directories and files of the host in the container.
pub(super) fn mount_binds(root: &Root, binds: &[Bind]) -> Result<(), SysError> {
    for Bind {
        source,
        target,
        access,
    } in binds
    {
        let name = target.display().to_string();
        let source = open(source, PATH, Mode::empty()).context("open", source.display())?;
        let missing = if is_directory(&source)? {
            Missing::Directory
        } else {
            Missing::File
        };
        let target = resolve(root, target, missing, Symlinks::Follow)?;
        let read_only = if *access == Access::ReadOnly {
            READ_ONLY
        } else {
            0
        };
        bind(
            source.as_fd(),
            target.as_fd(),
            read_only | NO_SUID | NO_DEV,
            &name,
        )?;
    }
    Ok(())
}

/// Hides and write-protects what the kernel shows to everybody.
pub(super) fn mask(root: &Root) -> Result<(), SysError> {
    let present = |path| match inside(root, path, Missing::Refuse) {
        Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        other => other.map(Some),
    };
    let read_only = READ_ONLY_PATHS.iter();
    for path in read_only
        .copied()
        .filter(|_| Measure::WriteProtection.holds())
    {
        if let Some(target) = present(path)? {
            let attributes = READ_ONLY | NO_SUID | NO_DEV | NO_EXEC;
            bind(target.as_fd(), target.as_fd(), attributes, path)?;
        }
    }
    // Over those, which would show again what is below them.
    let null = device("null", 1, 3)?;
    let masked = MASKED.iter().filter(|_| Measure::Masks.holds());
    for path in masked.copied() {
        let Some(target) = present(path)? else {
            continue;
        };
        if is_directory(&target)? {
            over(
                &target,
                "tmpfs",
                SAFE | MsFlags::MS_RDONLY,
                "size=4k,nr_inodes=1",
                path,
            )?;
        } else {
            bind(
                null.as_fd(),
                target.as_fd(),
                READ_ONLY | NO_SUID | NO_EXEC,
                path,
            )?;
        }
    }
    Ok(())
}

/// A device of the host, proven to be it: a mask must not be somebody's ordinary file
/// (CVE-2025-31133).
fn device(name: &str, wanted_major: u64, wanted_minor: u64) -> Result<OwnedFd, SysError> {
    let path = format!("/dev/{name}");
    let flags = PATH | OFlag::O_NOFOLLOW;
    let fd = open(path.as_str(), flags, Mode::empty()).context("open", &path)?;
    let stat = fstat(&fd).context("fstat", &path)?;
    let character = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    if !character || (major(stat.st_rdev), minor(stat.st_rdev)) != (wanted_major, wanted_minor) {
        return Err(Errno::ENODEV).context("fstat", format_args!("{path} is another file"));
    }
    Ok(fd)
}

fn inside(root: &Root, path: &str, missing: Missing) -> Result<OwnedFd, SysError> {
    // A symlink here would mount the kernel's files somewhere else; no honest root has one.
    resolve(root, Path::new(path), missing, Symlinks::Refuse)
}

fn fresh(
    root: &Root,
    path: &str,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), SysError> {
    over(
        &inside(root, path, Missing::Directory)?,
        kind,
        flags,
        options,
        path,
    )
}

fn over(
    target: &OwnedFd,
    kind: &str,
    flags: MsFlags,
    options: &str,
    path: &str,
) -> Result<(), SysError> {
    mount(
        Some(kind),
        by_descriptor(target).as_str(),
        Some(kind),
        flags,
        Some(options),
    )
    .context("mount", format_args!("{kind} on {path}"))
}

fn is_directory(fd: &OwnedFd) -> Result<bool, SysError> {
    let mode = fstat(fd).context("fstat", "mount point")?.st_mode;
    Ok(SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
}
