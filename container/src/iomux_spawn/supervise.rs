//! The loop.

use super::{
    pace::{Pace, REST},
    readers::Readers,
    source::{Peek, Source},
};
use crate::{
    fault::{Context, SysError},
    spool::{SpoolWriter, Stream},
    status::Status,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd::read,
};
use std::{
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

/// The read ends of a job's pipes, which do not block.
#[derive(Debug)]
pub(super) struct Pipes {
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    pub(super) status: OwnedFd,
}

#[derive(Debug)]
pub(super) struct Supervisor {
    spool: SpoolWriter,
    readers: Readers,
    epoll: Epoll,
    peek: Peek,
    sources: Vec<Source>,
    /// `None` once it has said everything or was closed.
    status: Option<StatusPipe>,
    /// The exit is in the log, but perhaps not on the disk.
    unsynced: bool,
    pace: Pace,
}

#[derive(Debug)]
struct StatusPipe {
    pipe: OwnedFd,
    frame: [u8; Status::SIZE],
    filled: usize,
}

const LISTENER: u64 = 0;
const STATUS: u64 = 1;
/// Plus the stream's number.
const SOURCE: u64 = 2;
/// Plus the reader's slot.
const READER: u64 = 16;

impl Supervisor {
    /// Without pipes there is nothing to wait for, and `run` only writes the end.
    pub(super) fn new(
        spool: SpoolWriter,
        readers: Readers,
        pipes: Option<Pipes>,
    ) -> Result<Self, SysError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1", "")?;
        let watch = |fd: &dyn AsFd, flags, token| {
            epoll
                .add(fd.as_fd(), EpollEvent::new(flags, token))
                .context("epoll_ctl", token)
        };
        watch(&readers.listener, EpollFlags::EPOLLIN, LISTENER)?;
        let mut sources = Vec::new();
        let mut status = None;
        if let Some(pipes) = pipes {
            watch(&pipes.status, EpollFlags::EPOLLIN, STATUS)?;
            for (stream, pipe) in [
                (Stream::Stdout, pipes.stdout),
                (Stream::Stderr, pipes.stderr),
            ] {
                // By edges: the beginning of a line stays in its pipe and must not be reported
                // again and again.
                watch(
                    &pipe,
                    EpollFlags::EPOLLIN | EpollFlags::EPOLLET,
                    SOURCE + stream as u64,
                )?;
                sources.push(Source::new(stream, pipe)?);
            }
            status = Some(StatusPipe {
                pipe: pipes.status,
                frame: [0; Status::SIZE],
                filled: 0,
            });
        }
        Ok(Self {
            spool,
            readers,
            epoll,
            peek: Peek::new()?,
            sources,
            status,
            unsynced: false,
            pace: Pace::default(),
        })
    }

    /// Until the job has ended and nobody holds its pipes any more. Everything is on the disk then.
    pub(super) fn run(mut self) -> Result<(), SysError> {
        let mut events = [EpollEvent::empty(); 16];
        while self.status.is_some() || !self.sources.is_empty() {
            let heeded = if self.has_begun() {
                self.sources.as_slice()
            } else {
                &[]
            };
            let timeout = timeout(heeded, Instant::now());
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                count => count.context("epoll_wait", "")?,
            };
            let mut exit = None;
            for event in events.iter().take(count) {
                exit = self.note(*event)?.or(exit);
            }
            let moved = self.work(exit)?;
            let ends = self.status.is_none() && self.sources.is_empty();
            let rests = |moved| self.pace.rests_after(moved, Instant::now());
            if !ends && moved.is_some_and(rests) {
                self.rest()?;
            }
        }
        if !self.spool.tail().ended {
            self.spool.end()?;
        }
        self.spool.sync()?;
        self.readers.wake();
        Ok(())
    }

    /// Takes note of an event; the job's last status, if that was it.
    fn note(&mut self, event: EpollEvent) -> Result<Option<Status>, SysError> {
        match event.data() {
            LISTENER => self.readers.accept(&self.epoll, READER)?,
            STATUS => return self.hear(),
            token @ READER.. => self.readers.remove(token - READER),
            token => {
                for source in self
                    .sources
                    .iter_mut()
                    .filter(|source| SOURCE + source.stream as u64 == token)
                {
                    source.ready = true;
                    source.hung_up |= event.events().contains(EpollFlags::EPOLLHUP);
                }
            }
        }
        Ok(None)
    }

    /// Reads the status pipe.
    fn hear(&mut self) -> Result<Option<Status>, SysError> {
        while let Some(status) = &mut self.status {
            match status.next()? {
                Heard::Nothing => break,
                Heard::Frame(Status::Started { .. }) => {
                    if !self.spool.tail().started() {
                        self.spool.started()?;
                        self.readers.wake();
                    }
                }
                Heard::Frame(last) => {
                    self.status = None;
                    return Ok(Some(last));
                }
                // The container's init died: it would have told.
                Heard::Closed => self.status = None,
            }
        }
        Ok(None)
    }

    /// Output waits in the pipes until the status pipe has spoken, so that the log begins with
    /// `Started`.
    fn has_begun(&self) -> bool {
        self.status.is_none() || self.spool.tail().started()
    }

    /// Looks at no output for a moment, and at once at what the job's init has to tell.
    fn rest(&self) -> Result<(), SysError> {
        let status = self.status.iter();
        let mut fds: Vec<PollFd<'_>> = status
            .map(|status| PollFd::new(status.pipe.as_fd(), PollFlags::POLLIN))
            .collect();
        let rest = PollTimeout::try_from(REST).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, rest) {
            Err(Errno::EINTR) => Ok(()),
            polled => polled.map(drop).context("poll", "status pipe"),
        }
    }

    /// Moves what there is to the spool, and records the exit behind what the job wrote before it. Bytes of output that
    /// were moved; `None`: no output was looked at.
    fn work(&mut self, exit: Option<Status>) -> Result<Option<usize>, SysError> {
        if let Some(status) = exit
            && !self.spool.tail().exited()
        {
            self.sources
                .iter_mut()
                .try_for_each(|source| source.drain(&mut self.spool))?;
            self.spool.exit(status)?;
            self.unsynced = true;
        }
        let now = Instant::now();
        let mut moved = None;
        let has_begun = self.has_begun();
        for source in self.sources.iter_mut().filter(|_| has_begun) {
            if source.ready || source.held.is_some_and(|held| held.until <= now) {
                *moved.get_or_insert(0) += source.pump(&mut self.spool, &mut self.peek, now)?;
            }
        }
        for closed in self.sources.extract_if(.., |source| !source.open) {
            // Not by dropping it: the init may hold the same description (epoll(7), question 6).
            self.epoll
                .delete(&closed.pipe)
                .context("epoll_ctl", closed.stream)?;
        }
        if self.unsynced && self.sources.is_empty() {
            // This was the end: one sync serves both records, and readers are told after it.
            return Ok(moved);
        }
        if self.unsynced {
            self.spool.sync()?;
        }
        if moved.is_some_and(|moved| moved > 0) || self.unsynced {
            self.readers.wake();
        }
        self.unsynced = false;
        Ok(moved)
    }
}

enum Heard {
    Frame(Status),
    Nothing,
    Closed,
}

impl StatusPipe {
    /// The next frame. What is no frame is treated as the end: nothing after it could be
    /// understood.
    fn next(&mut self) -> Result<Heard, SysError> {
        loop {
            let rest = self.frame.get_mut(self.filled..).unwrap_or_default();
            match read(&self.pipe, rest) {
                Ok(0) => return Ok(Heard::Closed),
                Ok(count) => self.filled += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Heard::Nothing),
                Err(errno) => return Err(errno).context("read", "status pipe"),
            }
            if self.filled == Status::SIZE {
                self.filled = 0;
                return Ok(Status::decode(self.frame).map_or(Heard::Closed, Heard::Frame));
            }
        }
    }
}

/// How long nothing may happen: until the next beginning of a line has waited long enough.
fn timeout(sources: &[Source], now: Instant) -> EpollTimeout {
    if sources.iter().any(|source| source.ready) {
        return EpollTimeout::ZERO;
    }
    let held = sources.iter().filter_map(|source| source.held);
    let next = held.map(|held| held.until).min();
    next.map_or(EpollTimeout::NONE, |until| {
        // Rounded up, or the last millisecond would be spent spinning.
        let wait = until
            .saturating_duration_since(now)
            .as_micros()
            .div_ceil(1000);
        u16::try_from(wait).unwrap_or(u16::MAX).into()
    })
}
