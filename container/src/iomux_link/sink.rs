//! Where a followed job's records go.

use crate::{
    exit,
    fault::{Context, SysError},
    frames,
    hangup::{Hangup, Woken},
    spool::{Cursor, Record, Stream},
    status::{Status, Step},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFlags, PollTimeout},
    unistd::write,
};
use std::{
    io::{self, Write},
    os::fd::AsFd,
};

/// Frames that are written with one call, in bytes: two records of the largest size.
const BATCH: usize = 128 * 1024;

#[derive(Debug)]
pub(super) enum Sink {
    /// Frames to descriptor 1, for the agent.
    Frames { waiting: Vec<u8> },
    /// Bytes to descriptors 1 and 2, for a person.
    Person,
}

impl Sink {
    pub(super) fn frames() -> Self {
        Self::Frames {
            waiting: Vec::with_capacity(2 * BATCH),
        }
    }

    /// Takes a record; waits if nobody takes it from here.
    pub(super) fn put(
        &mut self,
        record: &Record<&[u8]>,
        next: &Cursor,
        hangup: &Hangup,
    ) -> Result<Woken, SysError> {
        match self {
            Self::Frames { waiting } => {
                frames::encode(record, next, waiting);
                if waiting.len() >= BATCH {
                    self.flush(hangup)
                } else {
                    Ok(Woken::Ready)
                }
            }
            Self::Person => show(record),
        }
    }

    /// Writes what waits.
    pub(super) fn flush(&mut self, hangup: &Hangup) -> Result<Woken, SysError> {
        let Self::Frames { waiting } = self else {
            return Ok(Woken::Ready);
        };
        let stdout = io::stdout();
        let mut rest = waiting.as_slice();
        if !rest.is_empty() {
            // Else a reader that stopped would keep us from hearing the agent's hang-up.
            fcntl(&stdout, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl", "stdout")?;
        }
        while !rest.is_empty() {
            match write(&stdout, rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let writable = (stdout.as_fd(), PollFlags::POLLOUT);
                    if hangup.wait([writable], PollTimeout::NONE)? == Woken::HungUp {
                        return Ok(Woken::HungUp);
                    }
                }
                Err(Errno::EPIPE) => return Ok(Woken::HungUp),
                Err(errno) => return Err(errno).context("write", "stdout"),
            }
        }
        waiting.clear();
        Ok(Woken::Ready)
    }
}

/// Writes a record as a person wants it.
fn show(record: &Record<&[u8]>) -> Result<Woken, SysError> {
    let written = match record {
        Record::Output {
            stream: Stream::Stdout,
            bytes,
            ..
        } => {
            let mut stdout = io::stdout();
            stdout.write_all(bytes).and_then(|()| stdout.flush())
        }
        Record::Output {
            stream: Stream::Stderr,
            bytes,
            ..
        } => io::stderr().write_all(bytes),
        Record::Gap {
            stream,
            offset,
            bytes,
            certain,
        } => {
            let amount = if *certain { "" } else { "at least " };
            let mut stderr = io::stderr();
            writeln!(
                stderr,
                "iomux-link: {amount}{bytes} bytes of {stream} are missing from offset {offset} on"
            )
        }
        Record::Exit { status, .. } => {
            if let Status::Failed { step, errno } = status {
                let (step, why) = (step.describe(), Errno::from_raw(*errno).desc());
                eprintln!("iomux-link: the job never ran: could not {step}: {why}");
            }
            Ok(())
        }
        Record::Started | Record::End { .. } => Ok(()),
    };
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Woken::HungUp),
        done => done
            .context("write", "what the job wrote")
            .map(|()| Woken::Ready),
    }
}

/// The code with which a shell would report this end.
pub(super) fn code_of(status: Status) -> u8 {
    match status {
        Status::Started { .. } => exit::OWN_FAILURE,
        Status::Exited(code) => code,
        Status::Signaled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        Status::Failed {
            step: Step::Exec,
            errno,
        } if errno == Errno::ENOENT as i32 => 127,
        Status::Failed {
            step: Step::Exec, ..
        } => 126,
        Status::Failed { .. } => exit::OWN_FAILURE,
    }
}
