//! Mounts by descriptor: a path cannot be swapped between the look and the mount.

use crate::fault::{Context, SysError};
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `MOUNT_ATTR_RDONLY` of mount_setattr(2).
pub const READ_ONLY: u64 = 0x1;
/// `MOUNT_ATTR_NOSUID`.
pub const NO_SUID: u64 = 0x2;
/// `MOUNT_ATTR_NODEV`.
pub const NO_DEV: u64 = 0x4;
/// `MOUNT_ATTR_NOEXEC`.
pub const NO_EXEC: u64 = 0x8;

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
    /// `struct mount_attr` (linux/mount.h).
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns_fd: u64,
    }
    const OPEN_TREE_CLONE: libc::c_int = 1;
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_int = 0x04;
    const MOVE_MOUNT_T_EMPTY_PATH: libc::c_int = 0x40;

    let empty = c"".as_ptr();
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_RECURSIVE | libc::AT_EMPTY_PATH;
    // SAFETY: open_tree(2) reads a terminated string.
    let answer = unsafe { libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), empty, flags) };
    let tree = RawFd::try_from(Errno::result(answer).context("open_tree", what)?).unwrap_or(-1);
    // SAFETY: the call has just returned this descriptor to us alone.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };

    let change = MountAttr {
        set: attributes,
        clear: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: mount_setattr(2) reads a terminated string and one mount_attr of the size given.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty,
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const change,
            size_of::<MountAttr>(),
        )
    };
    Errno::result(answer).context("mount_setattr", what)?;

    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (tree.as_raw_fd(), target.as_raw_fd());
    // SAFETY: move_mount(2) reads two terminated strings.
    let answer = unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) };
    Errno::result(answer).map(drop).context("move_mount", what)
}
