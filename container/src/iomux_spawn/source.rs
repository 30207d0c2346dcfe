//! One of the two pipes that a job writes to.

use super::line::{Patience, cut};
use crate::{
    fault::{Context, SysError},
    spool::{MAX_PAYLOAD, SpoolWriter, Stream},
    sys::pipe,
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{pipe2, read},
};
use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

/// How long the beginning of a line waits for its end.
const LINE_WAIT: Duration = Duration::from_millis(20);

/// Longest beginning that may wait. The app must not be stopped by it: a pipe of 16 pages holds at
/// least half of its 64 KiB when it is full, however the app cuts its writes (pipe(7); the kernel
/// fills up a page as long as the next write fits).
const HOLD_MAX: usize = 32 * 1024;

/// Records taken from one pipe before the other has its turn.
const TURN: u32 = 16;

/// A pipe of the job, and what is known about it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) stream: Stream,
    pub(super) pipe: OwnedFd,
    /// It may hold bytes that nobody has looked at.
    pub(super) ready: bool,
    /// Somebody may still write to it, or it is not empty.
    pub(super) open: bool,
    /// Nobody can write to it any more.
    pub(super) hung_up: bool,
    /// It holds the beginning of a line.
    pub(super) held: Option<Held>,
    hold_max: usize,
}

/// The beginning of a line that waits for its end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// When it is taken without.
    pub(super) until: Instant,
    /// Its length when it was last looked at.
    bytes: usize,
}

/// Looks at what is at the front of a pipe, without taking it.
#[derive(Debug)]
pub(super) struct Peek {
    read: OwnedFd,
    write: OwnedFd,
    buffer: Box<[u8]>,
}

/// What a look saw.
enum Seen<'a> {
    Bytes(&'a [u8]),
    /// Buffers without a byte, which are gone now.
    Hollow,
    Empty,
    Closed,
}

impl Source {
    pub(super) fn new(stream: Stream, pipe: OwnedFd) -> Result<Self, SysError> {
        let size = fcntl(&pipe, FcntlArg::F_GETPIPE_SZ).context("F_GETPIPE_SZ", stream)?;
        let half = usize::try_from(size).unwrap_or(0) / 2;
        let hold_max = half.min(HOLD_MAX);
        Ok(Self {
            stream,
            pipe,
            ready: true,
            open: true,
            hung_up: false,
            held: None,
            hold_max,
        })
    }

    /// Moves whole lines, and beginnings that have waited long enough, to the spool. How many bytes.
    pub(super) fn pump(
        &mut self,
        spool: &mut SpoolWriter,
        peek: &mut Peek,
        now: Instant,
    ) -> Result<usize, SysError> {
        let mut moved = 0;
        for _ in 0..TURN {
            let waiting = match peek.look(&self.pipe)? {
                Seen::Bytes(waiting) => waiting,
                Seen::Hollow => continue,
                nothing @ (Seen::Empty | Seen::Closed) => {
                    self.open = matches!(nothing, Seen::Empty);
                    self.ready = false;
                    self.held = None;
                    return Ok(moved);
                }
            };
            let due = self.held.is_some_and(|held| held.until <= now);
            let known = self.held.map_or(0, |held| held.bytes);
            let patience = if self.hung_up || due {
                Patience::Spent
            } else {
                Patience::Hold
            };
            let Some(bytes) = cut(waiting, known, self.hold_max, patience) else {
                self.held = Some(Held {
                    until: self.held.map_or(now + LINE_WAIT, |held| held.until),
                    bytes: waiting.len(),
                });
                self.ready = false;
                return Ok(moved);
            };
            moved += spool.take(self.stream, self.pipe.as_fd(), bytes)?;
            self.held = None;
        }
        self.ready = true;
        Ok(moved)
    }

    /// Moves what the pipe holds at this moment, lines or not, but nothing that comes meanwhile.
    pub(super) fn drain(&mut self, spool: &mut SpoolWriter) -> Result<(), SysError> {
        let mut left = pipe::waiting(self.pipe.as_fd()).context("FIONREAD", self.stream)?;
        while left > 0 {
            let taken = spool.take(self.stream, self.pipe.as_fd(), left.min(MAX_PAYLOAD))?;
            if taken == 0 {
                break;
            }
            left -= taken.min(left);
        }
        self.held = None;
        self.ready = true;
        Ok(())
    }
}

impl Peek {
    pub(super) fn new() -> Result<Self, SysError> {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let (read, write) = pipe2(flags).context("pipe2", "peek")?;
        Ok(Self {
            read,
            write,
            buffer: vec![0; MAX_PAYLOAD].into_boxed_slice(),
        })
    }

    fn look(&mut self, source: &OwnedFd) -> Result<Seen<'_>, SysError> {
        let copied = match pipe::tee(source.as_fd(), self.write.as_fd(), MAX_PAYLOAD) {
            Ok(0) => return self.look_at_nothing(source),
            Ok(copied) => copied,
            Err(Errno::EAGAIN) => return Ok(Seen::Empty),
            Err(errno) => return Err(errno).context("tee", "a job's pipe"),
        };
        let mut filled = 0;
        while filled < copied {
            let rest = self.buffer.get_mut(filled..copied).unwrap_or_default();
            filled += read(&self.read, rest).context("read", "peek")?;
        }
        Ok(Seen::Bytes(self.buffer.get(..copied).unwrap_or_default()))
    }

    /// What it means that not one byte was copied: only a pipe that is empty, too, has nobody who may write.
    fn look_at_nothing(&mut self, source: &OwnedFd) -> Result<Seen<'_>, SysError> {
        // Else the copies of hollow buffers would take the room of the next look.
        while read(&self.read, &mut self.buffer).is_ok() {}
        let mut fds = [PollFd::new(source.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).context("poll", "a job's pipe")?;
        let [polled] = fds;
        let seen = polled.revents().unwrap_or(PollFlags::empty());
        if seen.contains(PollFlags::POLLHUP) && !seen.contains(PollFlags::POLLIN) {
            return Ok(Seen::Closed);
        }
        pipe::skip_hollow(source.as_fd()).context("read", "a job's pipe")?;
        Ok(Seen::Hollow)
    }
}
