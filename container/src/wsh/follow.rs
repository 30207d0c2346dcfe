//! Waiting for a job's end, and copying for a terminal.

use super::STATUS_FD;
use super::person::{Came, Signals};
use crate::client::{Client, DEADLINE_SECONDS};
use crate::fault::{Context, SysError};
use crate::status::Status;
use crate::sys::pipe::waiting;
use crate::sys::terminal as tty;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::unistd::{pipe2, read, write};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// This became of the job.
    Job(Status),
    /// The init closed the connection without a word: it is dead.
    ContainerGone,
    /// Nobody reads the status pipe any more.
    SupervisorGone,
    /// This signal came, and there was no job to pass it to.
    Interrupted(i32),
}

/// The init: our connection, and where to make another for a signal.
pub(super) struct Peer<'a> {
    pub(super) client: &'a Client,
    pub(super) socket: &'a Path,
}

/// How long the last output of a job is waited for in all, when a background process keeps its pipe or
/// terminal open. A terminal's is on its way for some time.
const TAIL: Duration = Duration::from_millis(100);

/// What a pipe or a terminal holds at most, in bytes, unless it says that it holds more.
const HELD: usize = 64 * 1024;

/// How long a signal waits for a job that has not begun. A healthy init begins one within milliseconds;
/// at one that is stopped the person wants to be rid of us.
const SIGNAL_WAIT: Duration = Duration::from_secs(1);

/// The one who reads the status pipe, watched without a hold on that: epoll knows the description, and that
/// lives as long as `wshd` has it (epoll(7), question 6).
pub(super) struct Supervisor(Epoll);

impl Supervisor {
    pub(super) fn watch(status: &OwnedFd) -> Result<Self, SysError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1", "")?;
        // No event asked for: EPOLLERR comes unasked when the pipe's last reader is gone.
        let event = EpollEvent::new(EpollFlags::empty(), 0);
        epoll.add(status, event).context("epoll_ctl", STATUS_FD)?;
        Ok(Self(epoll))
    }
}

/// Waits under a supervisor, for as long as that lives: a job that begins late is as good.
pub(super) fn supervised(
    peer: &Peer<'_>,
    supervisor: Option<&Supervisor>,
) -> Result<End, SysError> {
    loop {
        let mut fds = vec![PollFd::new(peer.client.as_fd(), PollFlags::POLLIN)];
        fds.extend(supervisor.map(|watch| PollFd::new(watch.0.0.as_fd(), PollFlags::POLLIN)));
        wait(&mut fds, PollTimeout::NONE)?;
        let [connection, pipe] = [0, 1].map(|at| fds.get(at).is_some_and(seen));
        // First: a successor of the supervisor makes `wshd` drop this connection, and that must not
        // look like the end of the container.
        if pipe {
            return Ok(End::SupervisorGone);
        }
        if connection {
            match Frame::read(peer)? {
                Frame::End(end) => return Ok(end),
                Frame::Started { .. } => {}
            }
        }
    }
}

/// Waits for a job that has our own descriptors, and relays what it writes to a terminal or a file of ours, or reads
/// from a terminal.
///
/// # Errors
/// Not all that it wrote could be written there.
pub(super) fn descriptors(
    peer: &Peer<'_>,
    signals: &Signals,
    relays: &mut [Relay],
    keys: &mut Option<Keys>,
) -> Result<End, SysError> {
    let stdin = std::io::stdin();
    let mut post = Post::new();
    loop {
        let mut fds = vec![
            PollFd::new(peer.client.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(keys.as_ref().map(|keys| keys.watched(stdin.as_fd())));
        fds.extend(relays.iter().filter_map(Relay::watched));
        wait(&mut fds, post.timeout())?;
        let [connection, signalled, typed] = [0, 1, 2].map(|at| fds.get(at).is_some_and(seen));
        if keys
            .as_mut()
            .is_some_and(|keys| typed && keys.turn(stdin.as_fd()).is_none())
        {
            *keys = None;
        }
        relays.iter_mut().for_each(Relay::turn);
        if connection {
            match Frame::read(peer)? {
                Frame::Started { job, .. } => post.address(peer, job),
                Frame::End(end) => {
                    signals.release()?;
                    let written: Vec<_> = relays.iter().map(Relay::finish).collect();
                    return written.into_iter().collect::<Result<(), _>>().map(|()| end);
                }
            }
        }
        while let Some(came) = signalled.then(|| signals.next()).flatten() {
            if let Came::ForTheJob(signal) = came {
                post.send(peer, signal);
            }
        }
        if post.is_overdue() {
            return post.give_up(peer);
        }
    }
}

/// Waits for a job that has a terminal of its own, and copies between it and ours.
pub(super) fn terminal(peer: &Peer<'_>, signals: &Signals) -> Result<End, SysError> {
    let (mut post, mut pump) = (Post::new(), Pump::default());
    let stdin = std::io::stdin();
    loop {
        let mut fds = vec![
            PollFd::new(peer.client.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(master) = &pump.master {
            fds.push(PollFd::new(master.as_fd(), pump.wanted()));
            if pump.keys.is_empty() {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
        }
        wait(&mut fds, post.timeout())?;
        let [connection, signalled, output, input] =
            [0, 1, 2, 3].map(|at| fds.get(at).is_some_and(seen));
        if output {
            pump.turn();
        }
        if input {
            pump.take_keys(stdin.as_fd());
        }
        while let Some(came) = signalled.then(|| signals.next()).flatten() {
            match (came, &pump.master) {
                (Came::ForTheJob(signal), _) => post.send(peer, signal),
                (Came::Resized, Some(master)) => resize(master),
                (Came::Resized, None) => {}
            }
        }
        if connection {
            match Frame::read(peer)? {
                Frame::Started { job, terminal } => {
                    post.address(peer, job);
                    pump.begin(terminal)?;
                }
                Frame::End(end) => {
                    pump.finish();
                    return Ok(end);
                }
            }
        }
        if post.is_overdue() {
            return post.give_up(peer);
        }
    }
}

fn wait(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> Result<(), SysError> {
    match poll(fds, timeout) {
        // Stopped and continued.
        Err(Errno::EINTR) => Ok(()),
        other => other.map(drop).context("poll", "wsh"),
    }
}

fn seen(fd: &PollFd<'_>) -> bool {
    fd.revents().is_some_and(|events| !events.is_empty())
}

enum Frame {
    Started { job: u32, terminal: Option<OwnedFd> },
    End(End),
}

impl Frame {
    fn read(peer: &Peer<'_>) -> Result<Self, SysError> {
        Ok(match peer.client.read_status()? {
            None => Self::End(End::ContainerGone),
            Some(report) => match report.status {
                Status::Started { job } => Self::Started {
                    job,
                    terminal: report.terminal,
                },
                end @ (Status::Exited(_) | Status::Signaled(_) | Status::Failed { .. }) => {
                    Self::End(End::Job(end))
                }
            },
        })
    }
}

/// Signals on their way to the job; they wait until it has a number.
struct Post {
    job: Option<u32>,
    waiting: Vec<i32>,
    /// When a job that has no number yet is given up.
    until: Instant,
}

impl Post {
    fn new() -> Self {
        let patience = Duration::from_secs(DEADLINE_SECONDS.unsigned_abs());
        Self {
            job: None,
            waiting: Vec::new(),
            until: Instant::now() + patience,
        }
    }

    /// How long nothing may happen.
    fn timeout(&self) -> PollTimeout {
        if self.job.is_some() {
            return PollTimeout::NONE;
        }
        let left = self.until.saturating_duration_since(Instant::now());
        // A millisecond more: the last part of one would be spent spinning.
        PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::NONE)
    }

    fn is_overdue(&self) -> bool {
        self.job.is_none() && self.until <= Instant::now()
    }

    /// Why: a signal, or that the init is stopped. It will not begin the job later, for we are gone then.
    fn give_up(&self, peer: &Peer<'_>) -> Result<End, SysError> {
        if let Some(signal) = self.waiting.first() {
            return Ok(End::Interrupted(*signal));
        }
        let socket = peer.socket.display();
        Err(Errno::ETIMEDOUT).context(
            "wait",
            format_args!("{socket}: the container has not begun the job for {DEADLINE_SECONDS} s"),
        )
    }

    fn address(&mut self, peer: &Peer<'_>, job: u32) {
        self.job = Some(job);
        for signal in std::mem::take(&mut self.waiting) {
            self.send(peer, signal);
        }
    }

    fn send(&mut self, peer: &Peer<'_>, signal: i32) {
        match self.job {
            // A job that just ended has no use for it, and its end is on the way.
            Some(job) => {
                drop(Client::connect(peer.socket).and_then(|init| init.signal(job, signal)))
            }
            None => {
                if !self.waiting.contains(&signal) {
                    self.waiting.push(signal);
                }
                self.until = self.until.min(Instant::now() + SIGNAL_WAIT);
            }
        }
    }
}

/// Keys go in, output comes out. Never blocked by the job: it may stop reading while it writes.
#[derive(Default)]
struct Pump {
    /// The job's terminal, from its start until either side hung up.
    master: Option<OwnedFd>,
    /// Read from ours and not yet written; nothing more is read meanwhile.
    keys: Vec<u8>,
}

impl Pump {
    fn begin(&mut self, master: Option<OwnedFd>) -> Result<(), SysError> {
        if let Some(master) = &master {
            let flags = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
            fcntl(master, flags).context("fcntl", "O_NONBLOCK")?;
            // It may have changed since the request.
            resize(master);
        }
        self.master = master;
        Ok(())
    }

    fn wanted(&self) -> PollFlags {
        if self.keys.is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLIN | PollFlags::POLLOUT
        }
    }

    fn turn(&mut self) {
        self.put_keys();
        self.print();
    }

    /// Reads the person's keys; the end of them hangs the job's terminal up.
    fn take_keys(&mut self, stdin: BorrowedFd<'_>) {
        let mut buffer = [0; 4096];
        match read(stdin, &mut buffer) {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Ok(0) | Err(_) => self.master = None,
            Ok(length) => {
                self.keys.extend(buffer.get(..length).unwrap_or_default());
                self.put_keys();
            }
        }
    }

    fn put_keys(&mut self) {
        let Some(master) = &self.master else { return };
        if let Ok(written) = write(master, &self.keys) {
            self.keys.drain(..written.min(self.keys.len()));
        }
    }

    /// Copies what there is. The end is EIO: every process has closed the terminal, and all its output was
    /// read (pty(7)).
    fn print(&mut self) {
        let Some(master) = &self.master else { return };
        if !matches!(copy(master, Output::Stdout), Ok(Some(_))) {
            self.master = None;
        }
    }

    /// The job is over. Signals stay blocked: our terminal must be restored first.
    fn finish(&self) {
        if let Some(master) = &self.master {
            // A terminal that is gone.
            let _nobody_reads = copy_rest(master, Output::Stdout);
        }
    }
}

/// One of our own outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Stdout,
    Stderr,
}

/// A pipe in place of an output that is a terminal or a file. The job does not get that one itself: it could read
/// the person's keys from it, or write there as long as it likes.
pub(super) struct Relay {
    /// Until its end.
    reader: Option<OwnedFd>,
    to: Output,
    /// Why there is more than was written.
    failed: Option<Errno>,
}

impl Relay {
    /// The relay, and what the job writes to.
    pub(super) fn new(to: Output) -> Result<(Self, OwnedFd), SysError> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "relay")?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", "O_NONBLOCK")?;
        Ok((
            Self {
                reader: Some(reader),
                to,
                failed: None,
            },
            writer,
        ))
    }

    fn watched(&self) -> Option<PollFd<'_>> {
        self.reader
            .as_ref()
            .map(|reader| PollFd::new(reader.as_fd(), PollFlags::POLLIN))
    }

    fn turn(&mut self) {
        let Some(reader) = &self.reader else { return };
        match copy(reader, self.to) {
            Ok(Some(_)) => {}
            Ok(None) => self.reader = None,
            Err(errno) => {
                self.failed = Some(errno);
                self.reader = None;
            }
        }
    }

    /// Tells, too, if not all could be written that came.
    fn finish(&self) -> Result<(), SysError> {
        let rest = match (&self.reader, self.failed) {
            (_, Some(errno)) => Err(errno),
            (Some(reader), None) => copy_rest(reader, self.to),
            (None, None) => Ok(()),
        };
        let to = match self.to {
            Output::Stdout => "standard output",
            Output::Stderr => "standard error",
        };
        rest.context("write", to)
    }
}

/// A pipe in place of an input that is a terminal, for the same reason (a file is the job's: it was given to be read, from where
/// the last one that read it stopped). The terminal stays as it is: what
/// is typed comes by lines, and the keys for signals make signals, which are the job's.
pub(super) struct Keys {
    writer: OwnedFd,
    /// Read and not yet written; nothing more is read meanwhile.
    waiting: Vec<u8>,
}

impl Keys {
    /// The relay, and what the job reads from.
    pub(super) fn new() -> Result<(Self, OwnedFd), SysError> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "keys")?;
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", "O_NONBLOCK")?;
        let waiting = Vec::new();
        Ok((Self { writer, waiting }, reader))
    }

    fn watched<'a>(&'a self, stdin: BorrowedFd<'a>) -> PollFd<'a> {
        if self.waiting.is_empty() {
            PollFd::new(stdin, PollFlags::POLLIN)
        } else {
            PollFd::new(self.writer.as_fd(), PollFlags::POLLOUT)
        }
    }

    /// Passes on what there is; `None`: there will be no more, or nobody to read it.
    fn turn(&mut self, stdin: BorrowedFd<'_>) -> Option<()> {
        if self.waiting.is_empty() {
            let mut buffer = [0; 4096];
            match read(stdin, &mut buffer) {
                Err(Errno::EINTR | Errno::EAGAIN) => return Some(()),
                Ok(0) | Err(_) => return None,
                Ok(length) => self
                    .waiting
                    .extend(buffer.get(..length).unwrap_or_default()),
            }
        }
        match write(&self.writer, &self.waiting) {
            Ok(written) => drop(self.waiting.drain(..written.min(self.waiting.len()))),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => return None,
        }
        Some(())
    }
}

/// Copies what a job that is over has left: all that was written before, and what comes soon after it
/// from whoever keeps the pipe or terminal open, but no more than could have been there.
fn copy_rest(from: &OwnedFd, to: Output) -> Result<(), Errno> {
    let mut room = waiting(from.as_fd()).unwrap_or(0).max(HELD);
    let mut patience = TAIL;
    while room > 0 {
        let began = Instant::now();
        if !speaks(from, patience) {
            return Ok(());
        }
        patience = patience.saturating_sub(began.elapsed());
        match copy(from, to)? {
            Some(copied) => room = room.saturating_sub(copied),
            None => return Ok(()),
        }
    }
    Ok(())
}

/// Whether there is something to read, or its end, within this time.
fn speaks(fd: &OwnedFd, patience: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
    wait(&mut fds, timeout).is_ok() && fds.iter().any(seen)
}

/// Copies what there is without waiting for it, and tells how many bytes; `None`: there will be no more.
///
/// # Errors
/// It was not written.
fn copy(from: &OwnedFd, to: Output) -> Result<Option<usize>, Errno> {
    let mut buffer = [0; 16 * 1024];
    match read(from, &mut buffer) {
        Err(Errno::EINTR | Errno::EAGAIN) => Ok(Some(0)),
        Ok(0) | Err(_) => Ok(None),
        Ok(length) => {
            let bytes = buffer.get(..length).unwrap_or_default();
            let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
            let out: &mut dyn Write = if to == Output::Stdout {
                &mut stdout
            } else {
                &mut stderr
            };
            let written = out.write_all(bytes).and_then(|()| out.flush());
            let errno =
                |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
            written.map(|()| Some(length)).map_err(errno)
        }
    }
}

fn resize(master: &OwnedFd) {
    if let Ok(window) = tty::size(std::io::stdin()) {
        let _ = tty::resize(master, window);
    }
}
