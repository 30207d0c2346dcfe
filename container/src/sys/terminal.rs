//! Terminals.

use crate::request::Window;
use nix::Result;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A new terminal of the devpts instance at `/dev/pts`: its master and its slave, close-on-exec.
///
/// # Errors
/// `ENOSPC`: it has no terminals left. `ENOENT`: no devpts there.
pub fn new(window: Window) -> Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open("/dev/pts/ptmx", flags, Mode::empty())?;
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int (ioctl_tty(2)).
    let answer = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) };
    Errno::result(answer)?;
    // By ioctl and not by name: a name could be another file's by now.
    // SAFETY: TIOCGPTPEER takes the open flags as its value and touches no memory.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) };
    let slave = Errno::result(slave)?;
    // SAFETY: the call has just returned this descriptor to us alone.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    resize(&master, window)?;
    Ok((master, slave))
}

/// Makes the terminal the controlling one of this session, whose leader we are.
///
/// # Errors
/// `EPERM`: not a session leader, or it has one already.
pub fn control(slave: impl AsFd) -> Result<()> {
    // SAFETY: TIOCSCTTY takes an int as its value and touches no memory.
    let answer = unsafe { libc::ioctl(slave.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) };
    Errno::result(answer).map(drop)
}

/// The terminal's size.
///
/// # Errors
/// `ENOTTY`: not a terminal.
pub fn size(terminal: impl AsFd) -> Result<Window> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: TIOCGWINSZ writes one winsize.
    let answer = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size) };
    Errno::result(answer).map(|_| Window {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Sets the terminal's size; its foreground group gets `SIGWINCH` if it is another one.
///
/// # Errors
/// `ENOTTY`: not a terminal.
pub fn resize(terminal: impl AsFd, window: Window) -> Result<()> {
    let Window {
        rows: ws_row,
        columns: ws_col,
    } = window;
    let size = libc::winsize {
        ws_row,
        ws_col,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: TIOCSWINSZ reads one winsize.
    let answer = unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size) };
    Errno::result(answer).map(drop)
}
