//! The other side of `wshd.sock`: how `wsh`, `iomux-spawn` and the agent speak with a container's init.
//!
//! Blocking, and every wait has a deadline of [`DEADLINE_SECONDS`]: an init that lies or was stopped
//! cannot hang its caller. One connection carries one request.

use crate::fault::{Context, SysError};
use crate::fields::Malformed;
use crate::request::{Answer, Io, JobInfo, MAX_REQUEST, Request, Window};
use crate::status::{Status, Step};
use crate::sys::pipe::is_anonymous;
use crate::sys::{fdpass, pidfd};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd, ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket,
};
use nix::sys::stat::Mode;
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{Gid, Uid, fchown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// How long one wait for the init may take. It answers within microseconds; seconds are a loaded host.
pub const DEADLINE_SECONDS: i64 = 5;

/// A connection to a container's init.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

/// What a job gets as its descriptors 0, 1 and 2.
#[derive(Debug, Clone, Copy)]
pub enum Stdio<'a> {
    /// These, in this order.
    Descriptors([BorrowedFd<'a>; 3]),
    /// A new terminal of the container.
    Terminal(Window),
}

/// A frame from the init.
#[derive(Debug)]
pub struct Report {
    /// What became of the job.
    pub status: Status,
    /// The master of the job's terminal: with [`Status::Started`], if one was asked for.
    pub terminal: Option<OwnedFd>,
}

impl Client {
    /// Connects to the init that listens on this path, of any length.
    ///
    /// # Errors
    /// `ENOENT`, `ECONNREFUSED`: the container is gone. `ETIMEDOUT`: it takes no connections.
    pub fn connect(path: &Path) -> Result<Self, SysError> {
        let kind = SockType::SeqPacket;
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)
            .context("socket", "AF_UNIX")?;
        let deadline = TimeVal::seconds(DEADLINE_SECONDS);
        setsockopt(&socket, SendTimeout, &deadline).context("setsockopt", "SO_SNDTIMEO")?;
        setsockopt(&socket, ReceiveTimeout, &deadline).context("setsockopt", "SO_RCVTIMEO")?;
        let connected = with_address(path, |address| connect(socket.as_raw_fd(), address));
        connected
            .map_err(timed_out)
            .context("connect", path.display())?;
        Ok(Self { socket })
    }

    /// The init's process, by descriptor.
    ///
    /// # Errors
    /// `ESRCH`: it died meanwhile.
    pub fn peer_pidfd(&self) -> Result<OwnedFd, SysError> {
        match getsockopt(&self.socket, PeerPidfd) {
            // Before Linux 6.5 there is no SO_PEERPIDFD.
            Err(Errno::ENOPROTOOPT) => self.peer_by_number(),
            other => other.context("getsockopt", "SO_PEERPIDFD"),
        }
    }

    /// By the number that it had when it began to listen, with a second look: only that process holds the
    /// other end, so as long as there is no hang-up it lives, and its number cannot have gone to another
    /// one before we opened it.
    fn peer_by_number(&self) -> Result<OwnedFd, SysError> {
        let peer =
            getsockopt(&self.socket, PeerCredentials).context("getsockopt", "SO_PEERCRED")?;
        let fd = pidfd::open(peer.pid())?;
        let mut look = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut look, PollTimeout::ZERO).context("poll", "wshd.sock")?;
        let [look] = look;
        match look.revents() {
            Some(seen) if seen.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) => {
                Err(Errno::ESRCH).context("pidfd_open", peer.pid())
            }
            _ => Ok(fd),
        }
    }

    /// Asks for a job; its fate comes by [`Client::read_status`], and by `status_pipe` too if one is
    /// given. `job` is a memory file of [`JobRequest`](crate::job::JobRequest).
    ///
    /// # Errors
    /// The request could not be sent.
    pub fn run(
        &self,
        user: &str,
        job: BorrowedFd<'_>,
        stdio: Stdio<'_>,
        status_pipe: Option<BorrowedFd<'_>>,
    ) -> Result<(), SysError> {
        let mut fds = vec![job];
        let io = match stdio {
            Stdio::Descriptors(three) => {
                if status_pipe.is_some() {
                    three.iter().try_for_each(|fd| self.give_pipe(*fd))?;
                }
                fds.extend(three);
                Io::Descriptors
            }
            Stdio::Terminal(window) => Io::Terminal(window),
        };
        fds.extend(status_pipe);
        self.send(
            &Request::Run {
                user: user.as_bytes().to_vec(),
                io,
            },
            &fds,
        )
    }

    /// Gives a supervisor's pipe to the container's root, which passes it on to the job's user: else nobody
    /// inside could reopen `/dev/stdout`. A person's may be others', too, and they could read what is in it.
    fn give_pipe(&self, fd: BorrowedFd<'_>) -> Result<(), SysError> {
        if !is_anonymous(fd).context("fstatfs", "descriptor of a job")? {
            return Ok(());
        }
        let peer =
            getsockopt(&self.socket, PeerCredentials).context("getsockopt", "SO_PEERCRED")?;
        let root = (Uid::from_raw(peer.uid()), Gid::from_raw(peer.gid()));
        fchown(fd, Some(root.0), Some(root.1)).context("fchown", "pipe of a job")
    }

    /// The next frame of the job that was asked for; `None`: the init is gone, or the job has had its
    /// last frame. Waits [`DEADLINE_SECONDS`] at most, so poll the connection first.
    ///
    /// # Errors
    /// `ETIMEDOUT`: nothing came. `EBADMSG`: no frame of ours came.
    pub fn read_status(&self) -> Result<Option<Report>, SysError> {
        let mut buffer = [0; Status::SIZE + 1];
        let packet = self.receive(&mut buffer)?;
        let Some(bytes) = buffer
            .get(..packet.length)
            .filter(|bytes| !bytes.is_empty())
        else {
            return Ok(None);
        };
        let frame = bytes.try_into().ok().and_then(Status::decode);
        let status = frame.ok_or(Malformed("not a status frame"))?;
        Ok(Some(Report {
            status,
            terminal: packet.fds.into_iter().next(),
        }))
    }

    /// Takes a job over: its status goes to this pipe from now on (at once what it has had), and the
    /// readers of its stdout and stderr come back. They are non-blocking.
    ///
    /// # Errors
    /// `ENOENT`: no such job. `ENODATA`: its readers were not kept.
    pub fn attach(
        &self,
        job: u32,
        status_pipe: BorrowedFd<'_>,
    ) -> Result<(OwnedFd, OwnedFd), SysError> {
        let (_, fds) = self.ask(&Request::Attach { job }, &[status_pipe])?;
        let mut fds = fds.into_iter();
        match (fds.next(), fds.next()) {
            (Some(stdout), Some(stderr)) => Ok((stdout, stderr)),
            _ => Err(Errno::ENODATA).context("attach", format_args!("job {job}")),
        }
    }

    /// Lets the init drop what it retains of a job that ended.
    ///
    /// # Errors
    /// `ENOENT`: no such job. `EBUSY`: it has not ended.
    pub fn forget(&self, job: u32) -> Result<(), SysError> {
        self.ask(&Request::Forget { job }, &[]).map(drop)
    }

    /// Signals a job's process group; with job 0 every process of the container but its init, once.
    ///
    /// # Errors
    /// `ENOENT`: no such job. `ESRCH`: it ended, or there is no process. `EINVAL`: no such signal.
    pub fn signal(&self, job: u32, signal: i32) -> Result<(), SysError> {
        self.ask(&Request::Signal { job, signal }, &[]).map(drop)
    }

    /// The jobs that the init knows.
    ///
    /// # Errors
    /// It did not answer.
    pub fn info(&self) -> Result<Vec<JobInfo>, SysError> {
        self.ask(&Request::Info, &[]).map(|(jobs, _)| jobs)
    }

    fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Vec<JobInfo>, Vec<OwnedFd>), SysError> {
        self.send(request, fds)?;
        let mut buffer = vec![0; MAX_REQUEST];
        let packet = self.receive(&mut buffer)?;
        let bytes = buffer.get(..packet.length).unwrap_or_default();
        if bytes.is_empty() {
            return Err(Errno::ECONNRESET).context("recvmsg", "wshd.sock");
        }
        if let Some(Status::Failed {
            step: Step::Request,
            errno,
        }) = bytes.try_into().ok().and_then(Status::decode)
        {
            return Err(Errno::from_raw(errno)).context("wshd", format_args!("{request:?}"));
        }
        match Answer::decode(bytes)? {
            Answer::Done(jobs) => Ok((jobs, packet.fds)),
            Answer::Refused(errno) => {
                Err(Errno::from_raw(errno)).context("wshd", format_args!("{request:?}"))
            }
        }
    }

    fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), SysError> {
        fdpass::send(&self.socket, &request.encode(), fds, MsgFlags::empty())
            .map_err(timed_out)
            .context("sendmsg", "wshd.sock")
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<fdpass::Packet, SysError> {
        fdpass::receive(&self.socket, buffer, MsgFlags::empty())
            .map_err(timed_out)
            .context("recvmsg", "wshd.sock")
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Calls with the address of a socket's path. One that is too long for `sun_path` (108 bytes) is
/// named through its directory's descriptor.
pub(crate) fn with_address<T>(
    path: &Path,
    call: impl FnOnce(&UnixAddr) -> nix::Result<T>,
) -> nix::Result<T> {
    if let Ok(address) = UnixAddr::new(path) {
        return call(&address);
    }
    let name = path.file_name().ok_or(Errno::EINVAL)?;
    let parent = path.parent().ok_or(Errno::EINVAL)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = open(parent, flags, Mode::empty())?;
    let short = Path::new("/proc/self/fd")
        .join(parent.as_raw_fd().to_string())
        .join(name);
    call(&UnixAddr::new(&short)?)
}

/// A socket's deadline shows as `EAGAIN` (socket(7), `SO_RCVTIMEO`).
fn timed_out(errno: Errno) -> Errno {
    if errno == Errno::EAGAIN {
        Errno::ETIMEDOUT
    } else {
        errno
    }
}

#[cfg(test)]
mod tests {
    use super::{Client, with_address};
    use nix::errno::Errno;
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    use std::os::fd::AsRawFd;

    #[test]
    fn a_path_longer_than_sun_path_is_reached() {
        let base = std::env::temp_dir().join(format!("ostler-client-{}", std::process::id()));
        let long = base.join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&long).unwrap();
        let path = long.join("wshd.sock");
        assert!(UnixAddr::new(&path).is_err());
        let refused = Client::connect(&path).unwrap_err();
        let kind = SockType::SeqPacket;
        let listener = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        with_address(&path, |address| bind(listener.as_raw_fd(), address)).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let client = Client::connect(&path).unwrap();
        let peers = [
            client.peer_pidfd().unwrap(),
            client.peer_by_number().unwrap(),
        ];
        let us = std::process::id().cast_signed();
        drop(listener);
        let gone = client.peer_by_number().unwrap_err();
        std::fs::remove_dir_all(&base).unwrap();
        assert_eq!(refused.errno, Errno::ENOENT);
        for peer in peers {
            assert_eq!(crate::sys::pidfd::pid_of(&peer).unwrap(), Some(us));
        }
        assert_eq!(
            gone.errno,
            Errno::ESRCH,
            "a hang-up is seen before the number is believed"
        );
    }
}
