//! Looking into a pipe, and moving its bytes without passing them through this process.

use nix::{
    Result,
    errno::Errno,
    libc::{self, c_int},
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;

/// Copies up to `len` bytes from one pipe to another without taking them from the first, `tee(2)`;
/// does not block. Empty with writers is `EAGAIN`. 0: it is empty and has no writer, or [`skip_hollow`] has something to
/// do, and as many buffers without a byte are in `to` now.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> Result<usize> {
    // SAFETY: tee(2) takes no pointers; both descriptors are borrowed, hence open.
    let copied = unsafe {
        libc::tee(
            from.as_raw_fd(),
            to.as_raw_fd(),
            len,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    Errno::result(copied).map(isize::unsigned_abs)
}

/// Moves up to `len` bytes from a pipe to a file, at `offset` or (`None`) wherever it stands,
/// `splice(2)`; does not wait for the pipe. What the file did not get stays in the pipe. 0: it is
/// empty and has no writer; empty with writers is `EAGAIN`.
pub fn splice(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    offset: Option<i64>,
    len: usize,
) -> Result<usize> {
    let mut place = offset.unwrap_or(0);
    let place = if offset.is_some() {
        &raw mut place
    } else {
        ptr::null_mut()
    };
    let (from, to, flags) = (from.as_raw_fd(), to.as_raw_fd(), libc::SPLICE_F_NONBLOCK);
    // SAFETY: splice(2) reads and writes one off_t through `place`, which is null or points to a
    // local that outlives the call; both descriptors are borrowed, hence open.
    let moved = unsafe { libc::splice(from, ptr::null_mut(), to, place, len, flags) };
    Errno::result(moved).map(isize::unsigned_abs)
}

/// Takes the buffers without a byte from the front of a pipe whose read end does not block, and not one byte. Up to Linux
/// 6.14 a write(2) that fails (`EFAULT`) leaves such a buffer, which epoll reports and [`tee`] copies as 0 bytes (`pipe_write`
/// in fs/pipe.c, until ee5eda8ea595, "never add a zero-sized buffer").
pub fn skip_hollow(pipe: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: read(2) writes to nothing of this process: nobody maps the null page. It fails with EFAULT at the first byte,
    // which stays in the pipe, behind the buffers that have none; it wakes whoever waits for their room (`pipe_read`).
    let read = unsafe { libc::read(pipe.as_raw_fd(), ptr::null_mut(), 1) };
    match Errno::result(read) {
        Ok(_) | Err(Errno::EFAULT | Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Bytes that wait in a pipe, `FIONREAD` (pipe(7)).
pub fn waiting(pipe: BorrowedFd<'_>) -> Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer, which is to a local that outlives the
    // call.
    let done = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    Errno::result(done)?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Whether this is an end of a pipe of pipe(2). A named pipe is somebody's file.
///
/// # Errors
/// None is known.
pub fn is_anonymous(fd: impl AsFd) -> Result<bool> {
    const PIPEFS_MAGIC: i64 = 0x5049_5045;
    Ok(nix::sys::statfs::fstatfs(fd)?.filesystem_type().0 == PIPEFS_MAGIC)
}
