//! File systems in files: loop devices that cannot outlive their use, mounts that are nowhere, and
//! where on its device a file lies.

use crate::fault::{Context, SysError};
use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};
use std::ffi::CStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

impl LoopInfo {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        names: [0; 160],
        init: [0; 2],
    };
}

/// Numbers of linux/loop.h, which are older than the scheme of ioctl numbers.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;

/// Opens a free loop device on a file; gives back the device and its number. The kernel takes the file
/// off the device with the last use of it (`LO_FLAGS_AUTOCLEAR`): whoever dies, it does not stay.
///
/// # Errors
/// `ENOENT`: no `/dev/loop-control`, or no node for the device.
pub fn attach(file: &File, block_size: u32) -> Result<(File, u32), SysError> {
    const AUTOCLEAR: u32 = 4;
    const DIRECT_IO: u32 = 16;
    let path = "/dev/loop-control";
    let control = open(path)?;
    loop {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let free = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let number = Errno::result(free).context("LOOP_CTL_GET_FREE", path)?;
        let path = format!("/dev/loop{number}");
        let device = open(&path)?;
        let config = LoopConfig {
            fd: file.as_raw_fd().cast_unsigned(),
            block_size,
            info: LoopInfo {
                flags: AUTOCLEAR | DIRECT_IO,
                ..LoopInfo::EMPTY
            },
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE (Linux 5.8) reads one loop_config.
        let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        match Errno::result(done) {
            // Somebody else was faster.
            Err(Errno::EBUSY) => {}
            other => {
                other.context("LOOP_CONFIGURE", path)?;
                return Ok((device, number.cast_unsigned()));
            }
        }
    }
}

/// Opens a loop device by its number if it stands on the file with this device and inode number;
/// `None` if it stands on another one, or on none. It cannot be given to another file while it is open.
///
/// # Errors
/// The device cannot be opened.
pub fn attached(number: u32, file: (u64, u64)) -> Result<Option<File>, SysError> {
    let path = format!("/dev/loop{number}");
    let device = open(&path)?;
    let mut info = LoopInfo::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 writes one loop_info64.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    match Errno::result(done) {
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno).context("LOOP_GET_STATUS64", path),
        Ok(_) => Ok(((info.device, info.inode) == file).then_some(device)),
    }
}

fn open(path: &str) -> Result<File, SysError> {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .open(path)
        .context("open", path)
}

/// Mounts a device at no place: the mount ends with the descriptor, or with the last place to which it
/// was moved. A device that is mounted already is the same file system once more. nosuid, nodev.
///
/// # Errors
/// As fsopen(2), fsconfig(2) and fsmount(2).
pub fn mount(kind: &CStr, device: &CStr, options: &[&CStr]) -> Result<OwnedFd, SysError> {
    const CLOSE_ON_EXEC: c_int = 1;
    const ATTRIBUTES: u64 = super::mount::NO_SUID | super::mount::NO_DEV;
    let on = || device.to_string_lossy().into_owned();
    // SAFETY: fsopen(2) reads a terminated string.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOSE_ON_EXEC) };
    let context = owned(context).context("fsopen", kind.to_string_lossy())?;
    configure(&context, SET_STRING, c"source", Some(device)).context("fsconfig", on())?;
    for option in options {
        configure(&context, SET_FLAG, option, None)
            .context("fsconfig", option.to_string_lossy())?;
    }
    configure(&context, CREATE, c"", None).context("fsconfig", on())?;
    let context = context.as_raw_fd();
    // SAFETY: fsmount(2) takes integers.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context, CLOSE_ON_EXEC, ATTRIBUTES) };
    owned(mount).context("fsmount", on())
}

/// Commands of fsconfig(2).
const SET_FLAG: c_int = 0;
const SET_STRING: c_int = 1;
const CREATE: c_int = 6;

fn configure(context: &OwnedFd, what: c_int, key: &CStr, value: Option<&CStr>) -> nix::Result<()> {
    let null = std::ptr::null();
    let key = if what == CREATE { null } else { key.as_ptr() };
    let value = value.map_or(null, CStr::as_ptr);
    // SAFETY: fsconfig(2) reads terminated strings; null where the command takes none.
    let answer =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), what, key, value, 0) };
    Errno::result(answer).map(drop)
}

fn owned(answer: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = RawFd::try_from(Errno::result(answer)?).unwrap_or(-1);
    // SAFETY: the call has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

mod call {
    /// The number has the size of the structure without its extents.
    const FS_IOC_FIEMAP: nix::libc::Ioctl = nix::request_code_readwrite!(b'f', 11, 32);
    nix::ioctl_readwrite_bad!(fiemap, FS_IOC_FIEMAP, super::Fiemap);
    nix::ioctl_read!(ext4_shutdown, b'X', 125, u32);
    // Declared with a long; it is an int that is read and written (fs/ioctl.c).
    nix::ioctl_read!(get_flags, b'f', 1, nix::libc::c_long);
    nix::ioctl_write_ptr!(set_flags, b'f', 2, nix::libc::c_long);
}

/// `struct fiemap_extent` (linux/fiemap.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    more: [u32; 3],
}

/// Extents that are asked for at once.
const EXTENTS: usize = 64;

/// `struct fiemap` with room for extents.
#[repr(C)]
#[derive(Debug)]
pub struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// Where the bytes of a file from `start` on lie on its device, in the order of the file
/// (`FS_IOC_FIEMAP`). What was written must be on the disk.
///
/// # Errors
/// `EOPNOTSUPP`: the file system cannot tell.
pub fn extents(file: &File, start: u64) -> nix::Result<Vec<Range<u64>>> {
    const LAST: u32 = 1;
    let mut found = Vec::new();
    let mut next = start;
    loop {
        let mut map = Fiemap {
            start: next,
            length: u64::MAX - next,
            flags: 0,
            mapped: 0,
            count: 64,
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: the kernel writes one fiemap with at most `count` extents behind it, which is the room.
        unsafe { call::fiemap(file.as_raw_fd(), &raw mut map) }?;
        let mapped = usize::try_from(map.mapped).unwrap_or(0);
        let Some(extents) = map.extents.get(..mapped).filter(|some| !some.is_empty()) else {
            return Ok(found);
        };
        for extent in extents {
            // The first may begin before `start`.
            let skipped = start.saturating_sub(extent.logical);
            let end = extent.physical + extent.length;
            found.push(extent.physical + skipped..end);
            next = extent.logical + extent.length;
            if extent.flags & LAST != 0 {
                return Ok(found);
            }
        }
    }
}

/// Has an empty file written in place also on btrfs, which copies others: what is allocated for it is enough then,
/// however often it is written (`FS_NOCOW_FL`, ioctl_iflags(2)).
///
/// # Errors
/// As ioctl(2); `EPERM` on a zoned btrfs, which writes nothing in place.
pub fn write_in_place(file: &File) -> nix::Result<()> {
    const NOCOW: c_int = 0x0080_0000;
    // Inherited from the directory; each excludes the other, also in what was before (`check_fsflags` of fs/btrfs).
    const COMPRESSED: c_int = 0x4 | 0x400;
    if fstatfs(file)?.filesystem_type() != BTRFS_SUPER_MAGIC {
        return Ok(());
    }
    let mut flags: c_int = 0;
    // SAFETY: the kernel writes one int.
    unsafe { call::get_flags(file.as_raw_fd(), (&raw mut flags).cast()) }?;
    for flags in [flags & !COMPRESSED, flags & !COMPRESSED | NOCOW] {
        // SAFETY: the kernel reads one int.
        unsafe { call::set_flags(file.as_raw_fd(), (&raw const flags).cast()) }?;
    }
    Ok(())
}

/// Ends an ext4 file system at once, for all who use it: what was not written is thrown away
/// (`EXT4_IOC_SHUTDOWN`, `EXT4_GOING_FLAGS_NOLOGFLUSH`).
///
/// # Errors
/// As ioctl(2).
pub fn abandon_ext4(file: BorrowedFd<'_>) -> nix::Result<()> {
    let mut how: u32 = 2;
    // SAFETY: the kernel reads one u32.
    unsafe { call::ext4_shutdown(file.as_raw_fd(), &raw mut how) }.map(drop)
}
