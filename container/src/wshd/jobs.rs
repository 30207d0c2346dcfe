//! The jobs of the container: their table, and what is told of them.

use super::exec::{self, Plan, Session};
use super::stdio::{Passed, Stdio, hand_over, open_terminal, passed, spare_reader};
use super::users;
use crate::job::JobRequest;
use crate::request::{Answer, Io, JobInfo};
use crate::status::{Status, Step};
use crate::sys::{fdpass, process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nix::unistd::{pipe2, read, write};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most jobs at a time, ended ones that are not forgotten included. Each holds five descriptors at
/// most, which stays below the usual limit of 1024.
const MAX_JOBS: usize = 128;
/// The first number that we choose ourselves; the agent's are below.
const FIRST_OWN: u32 = 1 << 30;

/// Where a job's frames go. Nobody need be there to read them.
struct Ears {
    connection: Option<OwnedFd>,
    pipe: Option<OwnedFd>,
}

enum State {
    /// Forked; nothing yet from the error pipe. The terminal's master waits for `Started`.
    Starting {
        errors: OwnedFd,
        master: Option<OwnedFd>,
    },
    /// Executed.
    Running,
    /// It is over, in this way.
    Ended(Status),
}

/// Spare readers of stdout and stderr, where those are pipes.
type Readers = [Option<OwnedFd>; 2];

struct Job {
    /// Inside the container; 0 if it never had a process.
    pid: i32,
    state: State,
    ears: Ears,
    /// `Some`: kept until it is forgotten.
    readers: Option<Readers>,
}

/// All jobs that the init knows.
#[derive(Default)]
pub(super) struct Jobs {
    all: BTreeMap<u32, Job>,
    chosen: u32,
    /// Numbers of which a new supervisor was told that there is no such job, so that it has written the
    /// job's end. A request that was on its way must not make that untrue.
    ended_unseen: BTreeSet<u32>,
}

impl Jobs {
    /// Starts a job from a request and its descriptors; what becomes of it goes to the connection and to
    /// the status pipe.
    pub(super) fn run(&mut self, user: &[u8], io: Io, fds: Vec<OwnedFd>, connection: OwnedFd) {
        let Some(Passed { file, stdio, pipe }) = passed(io, fds) else {
            let ears = Ears {
                connection: Some(connection),
                pipe: None,
            };
            return ears.refuse(Errno::EINVAL);
        };
        let ears = Ears {
            connection: Some(connection),
            pipe,
        };
        let numbered = JobRequest::from_memfd(&file)
            .map_err(|error| error.errno)
            .and_then(|request| Ok((self.number(request.job)?, request)));
        let (number, request) = match ears.attended().and(numbered) {
            Ok(numbered) => numbered,
            Err(errno) => return ears.refuse(errno),
        };
        let mut readers = request.keep_readers.then_some([None, None]);
        let (pid, state) = match start(request, user, stdio, &mut readers, ears.pipe.is_some()) {
            Ok(started) => started,
            Err((step, errno)) => {
                let status = Status::Failed {
                    step,
                    errno: errno as i32,
                };
                ears.tell(status, None);
                (0, State::Ended(status))
            }
        };
        let job = Job {
            pid,
            state,
            ears,
            readers,
        };
        if job.is_worth_keeping() {
            self.all.insert(number, job);
        }
    }

    fn number(&mut self, asked: u32) -> Result<u32, Errno> {
        if self.all.len() >= MAX_JOBS {
            return Err(Errno::EAGAIN);
        }
        if asked != 0 {
            if self.ended_unseen.contains(&asked) {
                return Err(Errno::EPIPE);
            }
            return if self.all.contains_key(&asked) {
                Err(Errno::EEXIST)
            } else {
                Ok(asked)
            };
        }
        // Some are free: the table has far fewer entries than there are numbers.
        loop {
            let number = FIRST_OWN + self.chosen;
            self.chosen = (self.chosen + 1) % FIRST_OWN;
            if !self.all.contains_key(&number) {
                return Ok(number);
            }
        }
    }

    /// The error pipes of the jobs that are between fork and exec.
    pub(super) fn starting(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.all
            .iter()
            .filter_map(|(number, job)| match &job.state {
                State::Starting { errors, .. } => Some((*number, errors.as_fd())),
                State::Running | State::Ended(_) => None,
            })
    }

    /// Reads a job's error pipe: end of file is an `exec` that succeeded.
    pub(super) fn settle(&mut self, number: u32) {
        let Some(job) = self.all.get_mut(&number) else {
            return;
        };
        job.settle(number);
        if !job.is_worth_keeping() {
            self.all.remove(&number);
        }
    }

    /// Takes note of a process that ended; a stranger's (an orphan that came to us) is nobody's news.
    pub(super) fn ended(&mut self, pid: i32, status: Status) {
        let mut all = self.all.iter_mut();
        let Some((number, job)) = all.find(|(_, job)| job.pid == pid && job.lives()) else {
            return;
        };
        let number = *number;
        // It is dead, so its error pipe says all that it will ever say.
        job.settle(number);
        if job.lives() {
            job.ears.tell(status, None);
            job.state = State::Ended(status);
        }
        if !job.is_worth_keeping() {
            self.all.remove(&number);
        }
    }

    /// Gives a job to a new supervisor: its readers, and its frames from now on.
    pub(super) fn attach(
        &mut self,
        number: u32,
        fds: Vec<OwnedFd>,
    ) -> Result<[BorrowedFd<'_>; 2], Errno> {
        let mut fds = fds.into_iter();
        let (Some(pipe), None) = (fds.next(), fds.next()) else {
            return Err(Errno::EINVAL);
        };
        let Some(job) = self.all.get_mut(&number) else {
            self.ended_unseen.insert(number);
            return Err(Errno::ENOENT);
        };
        let Some([Some(stdout), Some(stderr)]) = &job.readers else {
            return Err(Errno::ENODATA);
        };
        job.ears = Ears {
            connection: None,
            pipe: Some(pipe),
        };
        match job.state {
            State::Starting { .. } => {}
            State::Running => job.ears.tell(Status::Started { job: number }, None),
            State::Ended(status) => {
                if !matches!(status, Status::Failed { .. }) {
                    job.ears.tell(Status::Started { job: number }, None);
                }
                job.ears.tell(status, None);
            }
        }
        Ok([stdout.as_fd(), stderr.as_fd()])
    }

    /// Drops what is retained of a job that ended.
    pub(super) fn forget(&mut self, number: u32) -> Result<(), Errno> {
        match self.all.get(&number) {
            None => Err(Errno::ENOENT),
            Some(job) if job.lives() => Err(Errno::EBUSY),
            Some(_) => {
                self.all.remove(&number);
                Ok(())
            }
        }
    }

    /// Signals a job's process group, or everybody.
    pub(super) fn signal(&self, number: u32, signal: i32) -> Result<(), Errno> {
        if number == 0 {
            return process::signal_all(signal);
        }
        match self.all.get(&number) {
            None => Err(Errno::ENOENT),
            Some(job) if job.lives() => process::signal_group(job.pid, signal),
            Some(_) => Err(Errno::ESRCH),
        }
    }

    /// Names all jobs.
    pub(super) fn info(&self) -> Answer {
        let info = |(number, job): (&u32, &Job)| JobInfo {
            job: *number,
            pid: job.pid,
            status: match job.state {
                State::Starting { .. } => None,
                State::Running => Some(Status::Started { job: *number }),
                State::Ended(status) => Some(status),
            },
        };
        Answer::Done(self.all.iter().map(info).collect())
    }
}

impl Job {
    fn lives(&self) -> bool {
        !matches!(self.state, State::Ended(_))
    }

    fn is_worth_keeping(&self) -> bool {
        self.lives() || self.readers.is_some()
    }

    fn settle(&mut self, number: u32) {
        let State::Starting { errors, master } = &self.state else {
            return;
        };
        let mut buffer = [0; 8];
        let status = match read(errors, &mut buffer) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(0) => Status::Started { job: number },
            Ok(length) => {
                let report = buffer.get(..length).and_then(exec::read_report);
                let (step, errno) = report.unwrap_or((Step::Exec, Errno::EIO as i32));
                Status::Failed { step, errno }
            }
            Err(errno) => Status::Failed {
                step: Step::Exec,
                errno: errno as i32,
            },
        };
        self.ears.tell(status, master.as_ref());
        let executed = matches!(status, Status::Started { .. });
        self.state = if executed {
            State::Running
        } else {
            State::Ended(status)
        };
    }
}

impl Ears {
    /// Whether somebody is there to hear of the job; `EPIPE`: the status pipe's reader is gone, or without
    /// such a pipe whoever asked (we may have been stopped for longer than it waits).
    fn attended(&self) -> Result<(), Errno> {
        let Some(ear) = self.pipe.as_ref().or(self.connection.as_ref()) else {
            return Ok(());
        };
        // No event asked for: these come unasked.
        let mut look = [PollFd::new(ear.as_fd(), PollFlags::empty())];
        poll(&mut look, PollTimeout::ZERO)?;
        let [look] = look;
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
        match look.revents() {
            Some(seen) if seen.intersects(gone) => Err(Errno::EPIPE),
            _ => Ok(()),
        }
    }

    /// Tells that the request itself is refused.
    fn refuse(&self, errno: Errno) {
        let (step, errno) = (Step::Request, errno as i32);
        self.tell(Status::Failed { step, errno }, None);
    }

    /// Never waits: a peer that does not read, or is gone, loses its frame and nobody else's.
    fn tell(&self, status: Status, master: Option<&OwnedFd>) {
        let frame = status.encode();
        if let Some(connection) = &self.connection {
            let fds: Vec<BorrowedFd<'_>> = master.into_iter().map(AsFd::as_fd).collect();
            let _ = fdpass::send(connection, &frame, &fds, MsgFlags::MSG_DONTWAIT);
        }
        let Some(pipe) = &self.pipe else { return };
        // POLLOUT promises room for PIPE_BUF bytes (pipe(7)); the pipe's own flags are its owner's.
        let mut look = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut look, PollTimeout::ZERO) == Ok(1) {
            let _ = write(pipe, &frame);
        }
    }
}

fn start(
    request: JobRequest,
    user: &[u8],
    stdio: Stdio,
    readers: &mut Option<Readers>,
    supervised: bool,
) -> Result<(i32, State), (Step, Errno)> {
    let at = |step: Step| move |errno: Errno| (step, errno);
    if let (Some(readers), Stdio::Given([_, stdout, stderr])) = (readers, &stdio) {
        // First of all: whoever takes a failed job over wants its pipes, too.
        *readers = [spare_reader(stdout), spare_reader(stderr)];
    }
    let user = users::find(user).map_err(at(Step::User))?;
    let (stdio, master, session) = match stdio {
        Stdio::Given([stdin, stdout, stderr]) => {
            let owner = supervised.then_some(user.uid);
            let own = |fd| hand_over(fd, owner).map_err(at(Step::Descriptors));
            (
                [own(stdin)?, own(stdout)?, own(stderr)?],
                None,
                Session::Plain,
            )
        }
        Stdio::Terminal(window) => {
            let opened = open_terminal(window, user.uid).map_err(at(Step::Descriptors));
            let (stdio, master) = opened?;
            (stdio, Some(master), Session::Terminal)
        }
    };
    let plan = Plan::new(request, user, stdio, session).map_err(at(Step::Request))?;
    let (errors, theirs) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(at(Step::Descriptors))?;
    let pid = process::fork(|| exec::execute(&plan, &theirs)).map_err(at(Step::Fork))?;
    Ok((pid, State::Starting { errors, master }))
}
