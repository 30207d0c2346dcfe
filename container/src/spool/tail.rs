//! What a log says so far, which is all that its writer must know of it.

use super::{
    Record, Stream,
    codec::{Exit, Head},
};

/// What the log says so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tail {
    pub(super) head: Head,
    /// Whether the `End` record is there.
    pub ended: bool,
}

impl Tail {
    /// Bytes of a stream that the log accounts for, as output or as gaps.
    #[must_use]
    pub fn offset(&self, stream: Stream) -> u64 {
        match stream {
            Stream::Stdout => self.head.stdout,
            Stream::Stderr => self.head.stderr,
        }
    }

    /// Whether the job's program was executed.
    #[must_use]
    pub fn started(&self) -> bool {
        self.head.started.is_some()
    }

    /// Whether the job's exit status is in the log.
    #[must_use]
    pub fn exited(&self) -> bool {
        self.head.exit.is_some()
    }

    pub(super) fn advance(&mut self, stream: Stream, to: u64) {
        match stream {
            Stream::Stdout => self.head.stdout = to,
            Stream::Stderr => self.head.stderr = to,
        }
    }

    pub(super) fn apply(&mut self, position: u64, record: &Record<&[u8]>) {
        match *record {
            Record::Started => self.head.started = Some(position),
            Record::Output {
                stream,
                offset,
                bytes,
                ..
            } => self.advance(stream, offset + bytes.len() as u64),
            Record::Gap {
                stream,
                offset,
                bytes,
                ..
            } => self.advance(stream, offset.saturating_add(bytes)),
            Record::Exit {
                status,
                time_ns,
                stdout,
                stderr,
            } => {
                self.head.exit = Some((
                    position,
                    Exit {
                        status,
                        time_ns,
                        stdout,
                        stderr,
                    },
                ));
            }
            Record::End { .. } => self.ended = true,
        }
    }
}
