//! Mounts by descriptor: a path cannot be swapped between the look and the mount.

use crate::fault::{Context, SysError};
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `MOUNT_ATTR_RDONLY` of mount_setattr(2).
pub const READ_ONLY: u64 = 0x1;
/// `MOUNT_ATTR_NOSUID`.
pub const NO_SUID: u64 = 0x2;
/// `MOUNT_ATTR_NODEV`.
pub const NO_DEV: u64 = 0x4;
/// `MOUNT_ATTR_NOEXEC`.
pub const NO_EXEC: u64 = 0x8;

/// `struct mount_attr` (linux/mount.h).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Shows what is at `source` at `target` too, with these attributes added, mounts below it included.
/// Both are `O_PATH` descriptors, both directories or both not.
///
/// # Errors
/// As open_tree(2), mount_setattr(2), move_mount(2); `what` names the mount.
pub fn bind(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attributes: u64,
    what: &str,
) -> Result<(), SysError> {
    let attributes = MountAttr {
        set: attributes,
        ..MountAttr::default()
    };
    attach(source, target, &attributes, libc::AT_RECURSIVE, what).map(drop)
}

/// Covers a directory with itself, its owners mapped as in this user namespace: a file of 0 on the disk
/// belongs to 0 of the namespace. Mounts below it do not show. Gives back the new mount.
///
/// # Errors
/// `EINVAL`: the file system of the directory cannot be mapped (mount_setattr(2); overlay never can,
/// tmpfs from Linux 6.3 on). `EPERM`: it is mapped already.
pub fn cover_idmapped(
    directory: BorrowedFd<'_>,
    users: BorrowedFd<'_>,
    what: &str,
) -> Result<OwnedFd, SysError> {
    /// `MOUNT_ATTR_IDMAP` (Linux 5.12).
    const IDMAP: u64 = 0x10_0000;
    let attributes = MountAttr {
        set: IDMAP | READ_ONLY | NO_DEV,
        userns_fd: u64::try_from(users.as_raw_fd()).unwrap_or(u64::MAX),
        ..MountAttr::default()
    };
    attach(directory, directory, &attributes, 0, what)
}

fn attach(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attributes: &MountAttr,
    recursive: libc::c_int,
    what: &str,
) -> Result<OwnedFd, SysError> {
    const OPEN_TREE_CLONE: libc::c_int = 1;

    let empty = c"".as_ptr();
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | recursive | libc::AT_EMPTY_PATH;
    // SAFETY: open_tree(2) reads a terminated string.
    let answer = unsafe { libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), empty, flags) };
    let tree = RawFd::try_from(Errno::result(answer).context("open_tree", what)?).unwrap_or(-1);
    // SAFETY: the call has just returned this descriptor to us alone.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };

    // SAFETY: mount_setattr(2) reads a terminated string and one mount_attr of the size given.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty,
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    };
    Errno::result(answer).context("mount_setattr", what)?;

    place(tree.as_fd(), target).context("move_mount", what)?;
    Ok(tree)
}

/// Puts a mount that is nowhere over a directory or file of this mount namespace.
///
/// # Errors
/// As move_mount(2).
pub fn place(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> nix::Result<()> {
    /// `MOVE_MOUNT_F_EMPTY_PATH` and `MOVE_MOUNT_T_EMPTY_PATH`.
    const BY_DESCRIPTOR: libc::c_int = 0x44;
    let (from, to, empty) = (mount.as_raw_fd(), target.as_raw_fd(), c"".as_ptr());
    // SAFETY: move_mount(2) reads two terminated strings.
    let answer =
        unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, BY_DESCRIPTOR) };
    Errno::result(answer).map(drop)
}
