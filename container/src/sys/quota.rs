//! Project quotas: whom a directory's files are counted for, how much that may be, and how much it is.

use nix::Result;
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct fsxattr` (linux/fs.h).
#[repr(C)]
#[derive(Debug, Default)]
pub struct Fsxattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// `FS_XFLAG_PROJINHERIT`: what is made in the directory belongs to its project, too.
const INHERIT: u32 = 0x200;

mod call {
    nix::ioctl_read!(get_fsxattr, b'X', 31, super::Fsxattr);
    nix::ioctl_write_ptr!(set_fsxattr, b'X', 32, super::Fsxattr);
}

/// The project of a directory whose files inherit it (`FS_IOC_FSGETXATTR`); `None` if they do not.
///
/// # Errors
/// `ENOTTY`: the file system knows no projects.
pub fn project(directory: BorrowedFd<'_>) -> Result<Option<u32>> {
    let mut attributes = Fsxattr::default();
    // SAFETY: the kernel writes one fsxattr.
    unsafe { call::get_fsxattr(directory.as_raw_fd(), &raw mut attributes) }?;
    Ok((attributes.xflags & INHERIT != 0).then_some(attributes.projid))
}

/// Gives an empty directory, and whatever will be made in it, to a project (`FS_IOC_FSSETXATTR`).
/// Processes in a user namespace of their own can neither change nor leave it.
///
/// # Errors
/// `ENOTTY`, `EOPNOTSUPP`: the file system knows no projects.
pub fn set_project(directory: BorrowedFd<'_>, project: u32) -> Result<()> {
    let mut attributes = Fsxattr::default();
    // SAFETY: the kernel writes one fsxattr.
    unsafe { call::get_fsxattr(directory.as_raw_fd(), &raw mut attributes) }?;
    attributes.xflags |= INHERIT;
    attributes.projid = project;
    // SAFETY: the kernel reads one fsxattr.
    unsafe { call::set_fsxattr(directory.as_raw_fd(), &raw const attributes) }.map(drop)
}

/// What is made in a directory from now on belongs to no project, and what belongs to any may be moved there: into a
/// directory whose files inherit, ext4 and XFS let only what is its project's (`EXDEV`: `ext4_rename`, `xfs_rename`).
///
/// # Errors
/// As [`set_project`], where there was a project to inherit.
pub fn end_inheritance(directory: BorrowedFd<'_>) -> Result<()> {
    let mut attributes = Fsxattr::default();
    // SAFETY: the kernel writes one fsxattr.
    match unsafe { call::get_fsxattr(directory.as_raw_fd(), &raw mut attributes) } {
        Err(Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
        other => other?,
    };
    if attributes.xflags & INHERIT == 0 {
        return Ok(());
    }
    attributes.xflags &= !INHERIT;
    // SAFETY: the kernel reads one fsxattr.
    unsafe { call::set_fsxattr(directory.as_raw_fd(), &raw const attributes) }.map(drop)
}

/// What a project has, and what it may have (0: no limit).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Files, directories and the like.
    pub inodes: u64,
    /// Most bytes; the kernel keeps KiB.
    pub most_bytes: u64,
    /// Most inodes.
    pub most_inodes: u64,
}

/// `QIF_DQBLKSIZE` of linux/quota.h: limits are counted in it.
const UNIT: u64 = 1024;

/// Asks for the quota of a project on the file system of `on` (`Q_GETQUOTA`, Linux 5.14). XFS does not know one that has
/// neither files nor limits (`ENOENT`: fs/xfs/xfs_qm_syscalls.c, `xfs_qm_scall_getquota`), of which ext4 says just that.
///
/// # Errors
/// `ESRCH`: the file system keeps no project quotas.
pub fn quota(on: BorrowedFd<'_>, project: u32) -> Result<Quota> {
    let mut block = empty();
    // SAFETY: Q_GETQUOTA writes one if_dqblk, which is libc's dqblk.
    match unsafe { quotactl(on, libc::Q_GETQUOTA, project, (&raw mut block).cast()) } {
        Err(Errno::ENOENT) => return Ok(Quota::default()),
        other => other?,
    }
    Ok(Quota {
        bytes: block.dqb_curspace,
        inodes: block.dqb_curinodes,
        most_bytes: block.dqb_bhardlimit.saturating_mul(UNIT),
        most_inodes: block.dqb_ihardlimit,
    })
}

/// Sets the hard limits of a project (`Q_SETQUOTA`); 0 is none. Bytes are rounded up to KiB.
///
/// # Errors
/// `ESRCH`: the file system keeps no project quotas.
pub fn set_quota(on: BorrowedFd<'_>, project: u32, bytes: u64, inodes: u64) -> Result<()> {
    const BYTE_LIMITS: u32 = 1;
    const INODE_LIMITS: u32 = 4;
    let mut block = empty();
    block.dqb_bhardlimit = bytes.div_ceil(UNIT);
    block.dqb_ihardlimit = inodes;
    block.dqb_valid = BYTE_LIMITS | INODE_LIMITS;
    // SAFETY: Q_SETQUOTA reads one if_dqblk, which is libc's dqblk.
    unsafe { quotactl(on, libc::Q_SETQUOTA, project, (&raw mut block).cast()) }
}

fn empty() -> libc::dqblk {
    libc::dqblk {
        dqb_bhardlimit: 0,
        dqb_bsoftlimit: 0,
        dqb_curspace: 0,
        dqb_ihardlimit: 0,
        dqb_isoftlimit: 0,
        dqb_curinodes: 0,
        dqb_btime: 0,
        dqb_itime: 0,
        dqb_valid: 0,
    }
}

/// quotactl_fd(2) for projects.
///
/// # Safety
/// `block` must be what the command reads or writes.
unsafe fn quotactl(
    on: BorrowedFd<'_>,
    command: c_int,
    project: u32,
    block: *mut c_void,
) -> Result<()> {
    /// `PRJQUOTA`; a command and a kind of quota make one number (`QCMD` of linux/quota.h).
    const PROJECTS: u32 = 2;
    let command = command.cast_unsigned() << 8 | PROJECTS;
    // SAFETY: by this function's contract.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            on.as_raw_fd(),
            command,
            project,
            block,
        )
    };
    Errno::result(answer).map(drop)
}
