//! Following a job's output: a linker for as long as somebody listens, a supervisor for as long as the
//! job runs.
//!
//! ```text
//! spool ─▶ iomux-link ─ pipe ─▶ this task ─ bounded channel ─▶ receiver
//!              │ killed: another one from the last cursor
//!              │ exit GONE: iomux-spawn --takeover, then another one
//!              └ exit DONE: the End record has been sent; the channel closes
//! ```
//!
//! A slow receiver fills the channel, then the pipe, then stops the linker: never the app.

use super::container::Destroyed;
use super::{Container, blocking};
use crate::chain;
use crate::host::helpers::{Child, Command, Ended, HelperError, Leash};
use container::exit;
use container::fault::SysError;
use container::frames::{Frame, FrameReader};
use container::spool::Cursor;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

/// What comes of following a job.
#[derive(Debug)]
pub enum Followed {
    /// A record, and the cursor behind it.
    Frame(Frame),
    /// Nobody can follow this job any more; says why. The last thing that comes.
    Lost(String),
}

/// Records that wait for the receiver, of at most 63 KiB each.
const WAITING: usize = 16;

/// Bytes that are read from the linker at once: a pipe of the default size.
const PIECE: usize = 64 * 1024;

/// How often in a row a linker may end without a single record before the job is called lost. With the
/// pauses below this is some five seconds.
const ATTEMPTS: u32 = 12;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long a linker may live after it has closed its output.
const LAST_STEP: Duration = Duration::from_secs(5);

/// The numbers of the linker's descriptors beside the standard ones.
const HANGUP_FD: i32 = 3;

impl Container {
    /// Follows a job's records from a cursor on ([`Cursor::default`]: from its beginning). The channel
    /// closes after the job's `End`; dropping the receiver ends the linker.
    #[must_use]
    pub fn follow(&self, job: u32, from: Cursor) -> mpsc::Receiver<Followed> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let span = tracing::error_span!("follow", handle = self.handle(), job);
        let follower = Follower {
            container: self.clone(),
            job,
            cursor: from,
            sender,
        };
        tokio::spawn(follower.run().instrument(span));
        receiver
    }
}

struct Follower {
    container: Container,
    job: u32,
    cursor: Cursor,
    sender: mpsc::Sender<Followed>,
}

/// How one linker's life ended.
#[derive(Debug)]
enum Turn {
    /// The job's `End` came through.
    Finished,
    /// Nobody listens any more.
    Unwanted,
    /// The linker ended otherwise.
    Ended(Ended),
    /// What it sent was no frame.
    Garbled(SysError),
}

/// What makes it impossible to start or read a linker.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Helper(#[from] HelperError),
    #[error(transparent)]
    Refused(#[from] SysError),
    #[error("the linker's pipe failed")]
    Pipe(#[from] io::Error),
}

impl Follower {
    async fn run(mut self) {
        let (mut attempts, mut pause) = (0, FIRST_PAUSE);
        loop {
            let (before, mut unasked) = (self.cursor, true);
            let reason = match self.link().await {
                Ok(Turn::Finished | Turn::Unwanted) => return,
                Ok(Turn::Ended(Ended::Exited(code))) if code == i32::from(exit::GONE) => {
                    match self.container.supervise(self.job).await {
                        Ok(()) => {
                            unasked = false;
                            "its supervisor is gone and could not be replaced".to_owned()
                        }
                        Err(error) => chain(&error),
                    }
                }
                Ok(Turn::Ended(ended)) => format!("iomux-link {ended}, see its container's log"),
                Ok(Turn::Garbled(error)) => chain(&error),
                Err(error) => chain(&error),
            };
            if self.cursor != before {
                (attempts, pause) = (0, FIRST_PAUSE);
            }
            attempts += 1;
            // Its directory went from under the linker; if it is just going, this waits.
            let destroyed = *self.container.inner.destroyed.lock().await == Destroyed::Yes;
            let reason = if destroyed {
                "the container was destroyed".to_owned()
            } else {
                reason
            };
            if destroyed || attempts >= ATTEMPTS {
                tracing::warn!(reason, "job was lost");
                let _nobody_listens = self.sender.send(Followed::Lost(reason)).await;
                return;
            }
            if unasked {
                let handle = self.container.handle();
                tracing::warn!(
                    handle,
                    reason,
                    attempts,
                    "a linker ended, another one follows"
                );
            }
            tokio::select! {
                biased;
                // First: a receiver that left should not wait for the pause.
                () = self.sender.closed() => return,
                () = sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// Starts a linker and passes on what it sends until it ends or nobody listens.
    async fn link(&mut self) -> Result<Turn, LinkError> {
        let (mut frames, linker) = self.start().await?;
        let leash = Leash(linker);
        let mut reader = FrameReader::default();
        let mut piece = vec![0; PIECE];
        loop {
            let length = tokio::select! {
                biased;
                // First: what nobody reads need not be read.
                () = self.sender.closed() => return Ok(Turn::Unwanted),
                length = frames.read(&mut piece) => length?,
            };
            if length == 0 {
                break;
            }
            reader.push(piece.get(..length).unwrap_or_default());
            loop {
                match reader.next() {
                    Ok(None) => break,
                    Err(error) => return Ok(Turn::Garbled(error)),
                    Ok(Some(frame)) => {
                        let next = frame.next;
                        if self.sender.send(Followed::Frame(frame)).await.is_err() {
                            return Ok(Turn::Unwanted);
                        }
                        self.cursor = next;
                    }
                }
            }
        }
        match timeout(LAST_STEP, leash.0.wait()).await {
            Ok(Ended::Exited(code)) if code == i32::from(exit::DONE) => Ok(Turn::Finished),
            Ok(ended) => Ok(Turn::Ended(ended)),
            Err(_elapsed) => Ok(Turn::Ended(Ended::Unknown)),
        }
    }

    async fn start(&self) -> Result<(pipe::Receiver, Child), LinkError> {
        let inner = &self.container.inner;
        let (ours, theirs) = io::pipe()?;
        let directory = inner.directory.clone();
        let log = blocking(move || directory.log()).await?;
        let command = Command {
            program: "iomux-link",
            argv0: None,
            args: vec![inner.directory.job(self.job).into()],
            env: vec![
                ("IOMUX_FRAMES", "1".into()),
                ("IOMUX_FROM", self.cursor.to_string().into()),
                ("OSTLER_HANGUP_FD", HANGUP_FD.to_string().into()),
            ],
            fds: vec![
                (OwnedFd::from(theirs), 1),
                (log.into(), 2),
                (inner.shared.helpers.hangup()?, HANGUP_FD),
            ],
        };
        let linker = inner.shared.helpers.spawn(command).await?;
        Ok((pipe::Receiver::from_owned_fd(ours.into())?, linker))
    }
}
