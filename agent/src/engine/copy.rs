//! Trees of files into a container and out of it.
//!
//! ```text
//! this process ◀── tar stream, a pipe ──▶ a job of the container's init, as the user (container::copy)
//! ```
//!
//! No program of the container's root file system takes part. The other side is taken for hostile: what it
//! sends is a stream for [`super::apart::unpack`], its complaints are cleaned, and every wait for it has a
//! deadline.

use super::{Container, EngineError, blocking};
use ::container::client::{Client, DEADLINE_SECONDS, Report, Stdio};
use ::container::copy::{Fault, Links, Naming};
use ::container::fault::{Context, SysError};
use ::container::job::{Copy, JobRequest};
use ::container::status::Status;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, read, write};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// How long the other side may be silent. It may have a large directory to list, or a slow disk.
const IDLE: Duration = Duration::from_secs(60);

/// Most bytes of complaints that are read: what their pipe holds.
const MAX_COMPLAINTS: usize = 64 * 1024;

/// A path in a container, and as whom it is reached.
#[derive(Debug, Clone, Copy)]
pub struct Inside<'a> {
    /// The container's socket.
    pub socket: &'a Path,
    /// A name or number of its `/etc/passwd`.
    pub user: &'a str,
    /// A relative one starts in the user's home.
    pub path: &'a Path,
}

/// What was copied.
#[derive(Debug)]
pub struct Copied<T> {
    /// What this side made of it.
    pub done: T,
    /// What the container's side passed over or could not read, one line each.
    pub complaints: Vec<String>,
    /// Some of what was there could not be read.
    pub damaged: bool,
}

/// Why nothing, or not everything, was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// This side stopped.
    #[error(transparent)]
    Here(#[from] Fault),
    /// The process that unpacks for this side did.
    #[error("{0}")]
    Apart(String),
    /// The container's side did.
    #[error("in the container: {0}")]
    Inside(String),
    /// The container could not be asked.
    #[error(transparent)]
    Refused(#[from] SysError),
}

/// Copies what is at a path of a container: `take` gets the tar stream.
///
/// # Errors
/// [`CopyError`]. What was taken until then stays.
pub fn out<T, E: Into<CopyError>>(
    from: &Inside<'_>,
    links: Links,
    take: impl FnOnce(&mut Patient) -> Result<T, E>,
) -> Result<Copied<T>, CopyError> {
    let (stream, theirs) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "copy")?;
    let mut stream = Patient::new(stream)?;
    let path = from.path.as_os_str().as_bytes().to_vec();
    let talk = Talk::begin(from, Copy::Out { path, links }, [None, Some(&theirs)])?;
    drop(theirs);
    let here = take(&mut stream);
    drop(stream);
    talk.end(here)
}

/// Copies to a path of a container: `give` writes a tar stream.
///
/// # Errors
/// [`CopyError`]. What was copied until then stays.
pub fn into<T>(
    to: &Inside<'_>,
    naming: Naming,
    give: impl FnOnce(&mut Patient) -> Result<T, Fault>,
) -> Result<Copied<T>, CopyError> {
    let (theirs, stream) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "copy")?;
    let mut stream = Patient::new(stream)?;
    let path = to.path.as_os_str().as_bytes().to_vec();
    let talk = Talk::begin(to, Copy::In { path, naming }, [Some(&theirs), None])?;
    drop(theirs);
    let here = give(&mut stream);
    drop(stream);
    talk.end(here)
}

/// Copies a stream to its end, `most` bytes of it.
///
/// # Errors
/// [`Fault::Stream`]; [`Fault::TooMuch`]: it goes on.
pub fn pour(from: &mut impl Read, to: &mut impl Write, most: u64) -> Result<u64, Fault> {
    let fault =
        |error: io::Error| Fault::Stream(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw));
    let bytes = io::copy(&mut from.take(most), to).map_err(fault)?;
    to.flush().map_err(fault)?;
    if bytes == most && from.read(&mut [0]).map_err(fault)? > 0 {
        return Err(Fault::TooMuch("bytes", most));
    }
    Ok(bytes)
}

impl Container {
    /// Unpacks a tar stream into a directory of the container, as `user`.
    ///
    /// # Errors
    /// [`CopyError`]. What was unpacked until then stays.
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "a call of the engine that no command of the bus needs yet"
        )
    )]
    pub async fn copy_in(
        &self,
        user: &str,
        path: &Path,
        mut stream: impl Read + Send + 'static,
    ) -> Result<Copied<u64>, EngineError> {
        let (socket, user, path) = self.place(user, path);
        let copied = blocking(move || {
            let inside = Inside {
                socket: &socket,
                user: &user,
                path: &path,
            };
            into(&inside, Naming::AsGiven, |to| {
                pour(&mut stream, to, u64::MAX)
            })
        });
        Ok(copied.await?)
    }

    /// Writes what is at a path of the container as a tar stream, as `user` sees it.
    ///
    /// # Errors
    /// [`CopyError`]; the stream then lacks its end.
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "a call of the engine that no command of the bus needs yet"
        )
    )]
    pub async fn copy_out(
        &self,
        user: &str,
        path: &Path,
        links: Links,
        mut stream: impl Write + Send + 'static,
    ) -> Result<Copied<u64>, EngineError> {
        let (socket, user, path) = self.place(user, path);
        let copied = blocking(move || {
            let inside = Inside {
                socket: &socket,
                user: &user,
                path: &path,
            };
            out(&inside, links, |from| pour(from, &mut stream, u64::MAX))
        });
        Ok(copied.await?)
    }

    fn place(&self, user: &str, path: &Path) -> (std::path::PathBuf, String, std::path::PathBuf) {
        let socket = self.inner.directory.socket();
        (socket, user.to_owned(), path.to_owned())
    }
}

/// One end of a pipe whose other end nobody may hold still for long.
#[derive(Debug)]
pub struct Patient(OwnedFd);

impl Patient {
    fn new(fd: OwnedFd) -> Result<Self, SysError> {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", "O_NONBLOCK")?;
        Ok(Self(fd))
    }

    fn wait(&self, event: PollFlags) -> io::Result<()> {
        wait(&self.0, event, IDLE).map_err(io::Error::from)
    }
}

impl AsRawFd for Patient {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::POLLIN)?;
        Ok(read(&self.0, buffer)?)
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::POLLOUT)?;
        Ok(write(&self.0, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `ETIMEDOUT` if nothing happens.
fn wait(fd: impl AsFd, event: PollFlags, patience: Duration) -> Result<(), Errno> {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(fd.as_fd(), event)];
    match poll(&mut fds, timeout) {
        Ok(0) => Err(Errno::ETIMEDOUT),
        Err(Errno::EINTR) | Ok(_) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The conversation about one job.
struct Talk<'a> {
    client: Client,
    socket: &'a Path,
    complaints: OwnedFd,
}

impl<'a> Talk<'a> {
    /// Asks for the job; its descriptors 0 and 1 are these, or the null device.
    fn begin(
        inside: &Inside<'a>,
        copy: Copy,
        stdio: [Option<&OwnedFd>; 2],
    ) -> Result<Self, SysError> {
        let request = JobRequest {
            copy: Some(copy),
            ..JobRequest::default()
        };
        let job = request.to_memfd()?;
        let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .context("open", "/dev/null")?;
        let (complaints, theirs) = pipe2(OFlag::O_CLOEXEC).context("pipe2", "complaints")?;
        fcntl(&complaints, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", "O_NONBLOCK")?;
        let client = Client::connect(inside.socket)?;
        let [stdin, stdout] = stdio.map(|fd| fd.unwrap_or(&null).as_fd());
        let three = Stdio::Descriptors([stdin, stdout, theirs.as_fd()]);
        client.run(inside.user, job.as_fd(), three, None)?;
        Ok(Self {
            client,
            socket: inside.socket,
            complaints,
        })
    }

    /// The outcome of both sides. Where both failed, that of the one who failed first.
    fn end<T>(self, here: Result<T, impl Into<CopyError>>) -> Result<Copied<T>, CopyError> {
        // Whoever is cut off ends at once; one that was stopped does not.
        let patience = if here.is_ok() {
            IDLE
        } else {
            Duration::from_secs(DEADLINE_SECONDS.unsigned_abs())
        };
        let end = self.last_status(patience);
        let mut complaints = self.complaints();
        let inside = match end {
            Ok(Some(Status::Exited(Copy::WHOLE))) => Ok(false),
            Ok(Some(Status::Exited(Copy::DAMAGED))) => Ok(true),
            Ok(Some(Status::Exited(Copy::FAILED))) => Err(complaints.pop()),
            Ok(Some(Status::Failed { step, errno })) => {
                let errno = Errno::from_raw(errno).desc();
                Err(Some(format!("cannot {}: {errno}", step.describe())))
            }
            Ok(Some(Status::Signaled(signal))) if here.is_ok() => {
                Err(Some(format!("signal {signal} ended the copy")))
            }
            Ok(None) => Err(Some("it died".to_owned())),
            Ok(Some(_)) => Err(None),
            Err(error) if here.is_ok() => return Err(error.into()),
            Err(_) => Err(None),
        };
        match (here, inside) {
            (Ok(done), Ok(damaged)) => Ok(Copied {
                done,
                complaints,
                damaged,
            }),
            (_, Err(Some(why))) => Err(CopyError::Inside(why)),
            (Err(here), _) => Err(here.into()),
            (Ok(_), Err(None)) => Err(CopyError::Inside("it failed without a word".to_owned())),
        }
    }

    /// How the job ended; one that does not end is ended.
    fn last_status(&self, patience: Duration) -> Result<Option<Status>, SysError> {
        let mut number = None;
        loop {
            if let Err(errno) = wait(&self.client, PollFlags::POLLIN, patience) {
                if let Some(job) = number {
                    // It may have ended just now.
                    drop(Client::connect(self.socket).and_then(|init| init.signal(job, 9)));
                }
                return Err(errno).context("wait", "the copying job");
            }
            match self.client.read_status()? {
                Some(Report {
                    status: Status::Started { job },
                    ..
                }) => number = Some(job),
                other => return Ok(other.map(|report| report.status)),
            }
        }
    }

    /// Line by line, as a terminal can bear them.
    fn complaints(&self) -> Vec<String> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        while bytes.len() < MAX_COMPLAINTS {
            match read(&self.complaints, &mut buffer) {
                Ok(length) if length > 0 => {
                    bytes.extend(buffer.get(..length).unwrap_or_default());
                }
                _ => break,
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let clean = |line: &str| line.chars().filter(shows).take(400).collect();
        text.lines().map(clean).collect()
    }
}

/// Whether a terminal may get it: Rust escapes what does not show as itself, direction marks among it; quotes
/// may stay.
pub(super) fn shows(one: &char) -> bool {
    matches!(one, '"' | '\'' | '\\') || one.escape_debug().count() == 1
}
