//! The readers of a job, as far as its supervisor knows them: sockets that get a byte when there is
//! more.

use crate::fault::{Context, SysError};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollEvent, EpollFlags},
        socket::{MsgFlags, send},
        stat::{Mode, umask},
    },
    unistd::{UnlinkatFlags, unlinkat},
};
use std::{
    io::ErrorKind,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
};

/// Most readers at a time; each costs a system call per record.
pub(super) const MAX_READERS: usize = 64;

/// The name of the socket in the job's directory.
pub(crate) const SOCKET: &str = "link.sock";

/// The byte that tells one reader too many that it is refused; any other means "look at the spool".
pub(crate) const REFUSED: u8 = b'F';

const MORE: u8 = b'.';

#[derive(Debug)]
pub(super) struct Readers {
    dir: OwnedFd,
    pub(super) listener: UnixListener,
    slots: Vec<Option<UnixStream>>,
}

impl Readers {
    /// Listens in the job's directory, in the place of whoever did before.
    pub(super) fn listen(dir: OwnedFd) -> Result<Self, SysError> {
        match unlinkat(&dir, SOCKET, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno).context("unlink", SOCKET),
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path_in(&dir));
        umask(before);
        let listener = listener.context("bind", SOCKET)?;
        listener.set_nonblocking(true).context("fcntl", SOCKET)?;
        let mut slots = Vec::new();
        slots.resize_with(MAX_READERS, || None);
        Ok(Self {
            dir,
            listener,
            slots,
        })
    }

    /// Takes whoever waits. Its events come with the number of its slot added to `first_token`.
    pub(super) fn accept(&mut self, epoll: &Epoll, first_token: u64) -> Result<(), SysError> {
        loop {
            let reader = match self.listener.accept() {
                Ok((reader, _)) => reader,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // It went away again (accept(2), "Error handling"), or descriptors are short: it
                // will be back.
                Err(_) => return Ok(()),
            };
            let Some((slot, token)) = self
                .slots
                .iter_mut()
                .zip(first_token..)
                .find(|(slot, _)| slot.is_none())
            else {
                tell(&reader, REFUSED);
                continue;
            };
            epoll
                .add(&reader, EpollEvent::new(EpollFlags::EPOLLRDHUP, token))
                .context("epoll_ctl", "reader")?;
            // It may have read to the end before a record that came before this moment, when nobody
            // could tell it yet.
            tell(&reader, MORE);
            *slot = Some(reader);
        }
    }

    /// Forgets one that went away.
    pub(super) fn remove(&mut self, slot: u64) {
        let slot = usize::try_from(slot)
            .ok()
            .and_then(|slot| self.slots.get_mut(slot));
        slot.into_iter().for_each(|slot| *slot = None);
    }

    /// Tells all that there is more, and waits for none.
    pub(super) fn wake(&self) {
        self.slots
            .iter()
            .flatten()
            .for_each(|reader| tell(reader, MORE));
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        // One that stays does no harm: it refuses connections, and a successor replaces it.
        let _ = unlinkat(&self.dir, SOCKET, UnlinkatFlags::NoRemoveDir);
    }
}

/// The socket's path by way of its directory's descriptor: never too long for `sun_path`.
pub(crate) fn path_in(dir: &OwnedFd) -> String {
    format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd())
}

/// Whatever fails is of no interest: a full socket holds wake-ups enough, and a closed one reports
/// itself.
fn tell(reader: &UnixStream, byte: u8) {
    let _ = send(
        reader.as_raw_fd(),
        &[byte],
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
    );
}
