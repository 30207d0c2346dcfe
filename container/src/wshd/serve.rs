//! The init's loop. It waits in one place, for everything, and never comes back.
//!
//! A connection says one packet, whenever it likes; until then it costs a descriptor and blocks nobody.
//! Errors of peers are answered, errors of the kernel are survived: this process's death is the
//! container's.

use super::jobs::Jobs;
use super::measure::Measure;
use super::setup::Server;
use crate::request::{Answer, MAX_REQUEST, Request};
use crate::status::{Status, Step};
use crate::sys::{fdpass, process};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, SockFlag, getsockopt};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most connections that have not said anything yet; the oldest one goes when one more comes.
const MAX_VISITORS: usize = 64;

/// Most processes that are reaped before others have their turn: apps can leave orphans without end.
const MAX_REAPED: usize = 64;

/// What a ready descriptor belongs to.
#[derive(Clone, Copy)]
enum Source {
    Signals,
    Listener,
    Visitor(u64),
    Starting(u32),
}

/// Whether new connections are taken at the moment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Door {
    Open,
    /// No descriptor was left for one. The next event of another kind opens it again: without this a
    /// waiting connection would wake the loop for ever.
    Shut,
}

/// Serves for ever.
pub(super) fn serve(server: Server) -> ! {
    let mut hall = Hall::new(server);
    loop {
        hall.turn();
    }
}

struct Hall {
    server: Server,
    jobs: Jobs,
    /// Silent connections by the order of their arrival.
    visitors: BTreeMap<u64, OwnedFd>,
    arrivals: u64,
    door: Door,
    /// Processes may have ended of which no signal will tell any more.
    unreaped: bool,
    buffer: Vec<u8>,
}

impl Hall {
    fn new(server: Server) -> Self {
        Self {
            server,
            jobs: Jobs::default(),
            visitors: BTreeMap::new(),
            arrivals: 0,
            door: Door::Open,
            unreaped: false,
            buffer: vec![0; MAX_REQUEST],
        }
    }

    fn turn(&mut self) {
        let ready = self.wait();
        self.door = Door::Open;
        for source in ready {
            match source {
                Source::Starting(job) => self.jobs.settle(job),
                Source::Signals => self.reap(),
                Source::Visitor(visitor) => self.hear(visitor),
                Source::Listener => self.accept(),
            }
        }
    }

    /// Blocks until something is ready, if nothing is left of the last turn. A failed poll (no memory for it) is a
    /// turn without news.
    fn wait(&self) -> Vec<Source> {
        let starting = self
            .jobs
            .starting()
            .map(|(job, errors)| (Source::Starting(job), errors));
        let visitors = self
            .visitors
            .iter()
            .map(|(id, fd)| (Source::Visitor(*id), fd.as_fd()));
        let mut watched: Vec<(Source, BorrowedFd<'_>)> = starting.collect();
        watched.push((Source::Signals, self.server.signals.as_fd()));
        watched.extend(visitors);
        if self.door == Door::Open {
            watched.push((Source::Listener, self.server.listener.as_fd()));
        }
        let mut fds: Vec<PollFd<'_>> = watched
            .iter()
            .map(|(_, fd)| PollFd::new(*fd, PollFlags::POLLIN))
            .collect();
        let timeout = if self.unreaped {
            PollTimeout::ZERO
        } else {
            PollTimeout::NONE
        };
        if poll(&mut fds, timeout).is_err() {
            return Vec::new();
        }
        let ready = watched.iter().zip(&fds).filter(|((source, _), fd)| {
            let left = self.unreaped && matches!(source, Source::Signals);
            left || fd.any().unwrap_or(false)
        });
        ready.map(|((source, _), _)| *source).collect()
    }

    fn reap(&mut self) {
        // One signal may stand for many children, and one that comes from here on is in the descriptor again.
        let _ = self.server.signals.read_signal();
        self.unreaped = (0..MAX_REAPED).all(|_| {
            let ended = process::reap();
            if let Some((pid, status)) = ended {
                self.jobs.ended(pid, status);
            }
            ended.is_some()
        });
    }

    fn accept(&mut self) {
        match fdpass::accept(
            &self.server.listener,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        ) {
            Ok(visitor) => {
                // Whoever has no number here is outside of the container: root of the host, as the
                // socket's mode says. (Its user has no number here either, and shows as nobody.)
                let peer = getsockopt(&visitor, PeerCredentials);
                let outside = |pid| pid == 0 || !Measure::PidNamespace.holds();
                if peer.is_ok_and(|peer| outside(peer.pid())) {
                    if self.visitors.len() >= MAX_VISITORS {
                        self.visitors.pop_first();
                    }
                    self.arrivals += 1;
                    self.visitors.insert(self.arrivals, visitor);
                }
            }
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS)
                if self.visitors.pop_first().is_none() =>
            {
                self.door = Door::Shut;
            }
            Err(_) => {}
        }
    }

    fn hear(&mut self, id: u64) {
        let Some(visitor) = self.visitors.remove(&id) else {
            return;
        };
        let packet = match fdpass::receive(&visitor, &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(packet) => packet,
            Err(Errno::EAGAIN) => {
                self.visitors.insert(id, visitor);
                return;
            }
            Err(_) => return refuse(&visitor),
        };
        let bytes = self.buffer.get(..packet.length).unwrap_or_default();
        if bytes.is_empty() {
            return;
        }
        match Request::decode(bytes) {
            Ok(request) => self.act(request, packet.fds, visitor),
            Err(_) => refuse(&visitor),
        }
    }

    fn act(&mut self, request: Request, fds: Vec<OwnedFd>, visitor: OwnedFd) {
        let done = |outcome: Result<(), Errno>| match outcome {
            Ok(()) => Answer::Done(Vec::new()),
            Err(errno) => Answer::Refused(errno as i32),
        };
        match request {
            Request::Run { user, io } => self.jobs.run(&user, io, fds, visitor),
            Request::Attach { job } => match self.jobs.attach(job, fds) {
                Ok(readers) => answer(&visitor, &done(Ok(())), &readers),
                Err(errno) => answer(&visitor, &done(Err(errno)), &[]),
            },
            Request::Forget { job } => answer(&visitor, &done(self.jobs.forget(job)), &[]),
            Request::Signal { job, signal } => {
                answer(&visitor, &done(self.jobs.signal(job, signal)), &[]);
            }
            Request::Info => answer(&visitor, &self.jobs.info(), &[]),
        }
    }
}

/// Whoever asked may be gone by now; that is its own matter.
fn answer(visitor: &OwnedFd, answer: &Answer, fds: &[BorrowedFd<'_>]) {
    let _ = fdpass::send(visitor, &answer.encode(), fds, MsgFlags::MSG_DONTWAIT);
}

fn refuse(visitor: &OwnedFd) {
    let status = Status::Failed {
        step: Step::Request,
        errno: Errno::EINVAL as i32,
    };
    let _ = fdpass::send(visitor, &status.encode(), &[], MsgFlags::MSG_DONTWAIT);
}

#[cfg(test)]
mod tests {
    use super::{Hall, MAX_REAPED, Server, Source};
    use crate::sys::process;
    use nix::fcntl::OFlag;
    use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    use nix::unistd::pipe2;
    use std::ffi::CStr;

    /// Waits until this many children have ended, and leaves them as they are.
    fn zombies(count: usize) {
        for _ in 0..count {
            let (actions, attributes) = (
                PosixSpawnFileActions::init().unwrap(),
                PosixSpawnAttr::init().unwrap(),
            );
            let nothing: [&CStr; 0] = [];
            let argv = [c"true"];
            let pid = posix_spawn("/bin/true", &actions, &attributes, &argv, &nothing).unwrap();
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        }
    }

    #[test]
    fn orphans_are_reaped_some_at_a_turn_and_none_is_forgotten() {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        // In the place of the socket something that nobody knocks at.
        let (listener, _writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let signals = SignalFd::with_flags(&SigSet::from(Signal::SIGCHLD), flags).unwrap();
        let mut hall = Hall::new(Server { listener, signals });
        zombies(2 * MAX_REAPED + 1);
        hall.reap();
        assert!(hall.unreaped);
        // No signal tells of them: this thread blocks none.
        let ready = hall.wait();
        assert!(ready.iter().any(|source| matches!(source, Source::Signals)));
        hall.turn();
        assert!(hall.unreaped);
        hall.turn();
        assert!(!hall.unreaped);
        assert_eq!(process::reap(), None);
    }
}
