//! What is said on `wshd.sock`: one request for each connection, as framed fields in one packet.
//!
//! | request | descriptors with it | answer |
//! |---|---|---|
//! | [`Request::Run`] with [`Io::Descriptors`] | job file, stdin, stdout, stderr [, status pipe] | [`Status`] frames, one for each packet |
//! | [`Request::Run`] with [`Io::Terminal`] | job file [, status pipe] | the same; the terminal's master comes with `Started` |
//! | [`Request::Attach`] | status pipe | [`Answer`] with readers of stdout and stderr |
//! | all others | none | [`Answer`] |
//!
//! A packet that is none of these is answered `Failed { Request, EINVAL }`.

use crate::fields::{Malformed, Reader, Writer, u32_of};
use crate::status::Status;

/// Longest request, in bytes; a longer packet is refused.
pub const MAX_REQUEST: usize = 64 * 1024;

/// A terminal's size, as `TIOCSWINSZ` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// Where a job's descriptors 0, 1 and 2 come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    /// They came with the request.
    Descriptors,
    /// A new terminal of the container, of this size.
    Terminal(Window),
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Start a job as this user (a name or a number; empty: root).
    Run {
        /// The user.
        user: Vec<u8>,
        /// Its terminal or descriptors.
        io: Io,
    },
    /// Take a job over from a supervisor that died.
    Attach {
        /// The job.
        job: u32,
    },
    /// Drop what is retained of a job that ended.
    Forget {
        /// The job.
        job: u32,
    },
    /// Signal a job's process group, or with job 0 every process of the container but its init, once.
    Signal {
        /// The job, or 0.
        job: u32,
        /// The signal's number; 0 only asks.
        signal: i32,
    },
    /// Name the jobs.
    Info,
}

/// A job as [`Request::Info`] names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobInfo {
    /// Its number.
    pub job: u32,
    /// Its pid inside the container.
    pub pid: i32,
    /// `None` until it was executed, then [`Status::Started`] until it ended.
    pub status: Option<Status>,
}

/// The answer to everything but [`Request::Run`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done; the jobs, if they were asked for.
    Done(Vec<JobInfo>),
    /// Not done, and why, as `errno`: `ENOENT`, no such job; `EBUSY`, it has not ended; `ENODATA`, its
    /// readers were not kept; `ESRCH`, nothing to signal; `EINVAL`, no such signal.
    Refused(i32),
}

mod tag {
    pub(super) const VERB: u16 = 1;
    pub(super) const USER: u16 = 2;
    pub(super) const WINDOW: u16 = 3;
    pub(super) const JOB: u16 = 4;
    pub(super) const SIGNAL: u16 = 5;
    pub(super) const ERRNO: u16 = 16;
    pub(super) const INFO: u16 = 17;
}

mod verb {
    pub(super) const RUN: u32 = 1;
    pub(super) const ATTACH: u32 = 2;
    pub(super) const FORGET: u32 = 3;
    pub(super) const SIGNAL: u32 = 4;
    pub(super) const INFO: u32 = 5;
}

impl Request {
    /// The packet's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let fields = Writer::default();
        match self {
            Self::Run { user, io } => {
                let fields = fields.put_u32(tag::VERB, verb::RUN).put(tag::USER, user);
                match io {
                    Io::Descriptors => fields,
                    Io::Terminal(Window { rows, columns }) => {
                        let size = u32::from(*rows) << 16 | u32::from(*columns);
                        fields.put_u32(tag::WINDOW, size)
                    }
                }
            }
            Self::Attach { job } => fields
                .put_u32(tag::VERB, verb::ATTACH)
                .put_u32(tag::JOB, *job),
            Self::Forget { job } => fields
                .put_u32(tag::VERB, verb::FORGET)
                .put_u32(tag::JOB, *job),
            Self::Signal { job, signal } => fields
                .put_u32(tag::VERB, verb::SIGNAL)
                .put_u32(tag::JOB, *job)
                .put_u32(tag::SIGNAL, signal.cast_unsigned()),
            Self::Info => fields.put_u32(tag::VERB, verb::INFO),
        }
        .finish()
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// Anything that is not exactly one request.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let (mut verb, mut user, mut window, mut job, mut signal) = (None, None, None, None, None);
        while let Some((tag, value)) = reader.field()? {
            match tag {
                tag::VERB => verb = Some(u32_of(value)?),
                tag::USER => user = Some(value.to_vec()),
                tag::WINDOW => window = Some(u32_of(value)?),
                tag::JOB => job = Some(u32_of(value)?),
                tag::SIGNAL => signal = Some(u32_of(value)?.cast_signed()),
                _ => return Err(Malformed("an unknown field in a request")),
            }
        }
        let job = job.ok_or(Malformed("no job"));
        match verb.ok_or(Malformed("no verb"))? {
            verb::RUN => {
                let io = window.map_or(Io::Descriptors, |size| {
                    let [a, b, c, d] = size.to_be_bytes();
                    let (rows, columns) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                    Io::Terminal(Window { rows, columns })
                });
                Ok(Self::Run {
                    user: user.ok_or(Malformed("no user"))?,
                    io,
                })
            }
            verb::ATTACH => Ok(Self::Attach { job: job? }),
            verb::FORGET => Ok(Self::Forget { job: job? }),
            verb::SIGNAL => Ok(Self::Signal {
                job: job?,
                signal: signal.ok_or(Malformed("no signal"))?,
            }),
            verb::INFO => Ok(Self::Info),
            _ => Err(Malformed("an unknown verb")),
        }
    }
}

impl Answer {
    /// The packet's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Refused(errno) => Writer::default()
                .put_u32(tag::ERRNO, errno.cast_unsigned())
                .finish(),
            Self::Done(jobs) => {
                let done = Writer::default().put_u32(tag::ERRNO, 0);
                jobs.iter()
                    .fold(done, |fields, info| fields.put(tag::INFO, &info.encode()))
                    .finish()
            }
        }
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// Anything that is not exactly one answer.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let (mut errno, mut jobs) = (None, Vec::new());
        while let Some((tag, value)) = reader.field()? {
            match tag {
                tag::ERRNO => errno = Some(u32_of(value)?.cast_signed()),
                tag::INFO => jobs.push(JobInfo::decode(value)?),
                _ => return Err(Malformed("an unknown field in an answer")),
            }
        }
        match errno.ok_or(Malformed("no outcome"))? {
            0 => Ok(Self::Done(jobs)),
            errno => Ok(Self::Refused(errno)),
        }
    }
}

impl JobInfo {
    fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let status = self.status.map_or([0; Status::SIZE], Status::encode);
        let parts = self
            .job
            .to_le_bytes()
            .into_iter()
            .chain(self.pid.to_le_bytes())
            .chain(status);
        bytes
            .iter_mut()
            .zip(parts)
            .for_each(|(to, from)| *to = from);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let wrong = Malformed("a job's state is not of sixteen bytes");
        let (job, rest) = bytes.split_first_chunk::<4>().ok_or(wrong)?;
        let (pid, rest) = rest.split_first_chunk::<4>().ok_or(wrong)?;
        let status: [u8; Status::SIZE] = rest.try_into().map_err(|_| wrong)?;
        Ok(Self {
            job: u32::from_le_bytes(*job),
            pid: i32::from_le_bytes(*pid),
            status: Status::decode(status),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer, Io, JobInfo, Request, Window};
    use crate::fields::{Malformed, Writer};
    use crate::status::Status;

    #[test]
    fn every_request_comes_back_as_it_was() {
        let size = Window {
            rows: 24,
            columns: 65535,
        };
        for request in [
            Request::Run {
                user: b"vcap".to_vec(),
                io: Io::Descriptors,
            },
            Request::Run {
                user: Vec::new(),
                io: Io::Terminal(size),
            },
            Request::Attach { job: 1 },
            Request::Forget { job: u32::MAX },
            Request::Signal { job: 0, signal: 15 },
            Request::Signal { job: 2, signal: -1 },
            Request::Info,
        ] {
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn every_answer_comes_back_as_it_was() {
        let jobs = [
            None,
            Some(Status::Started { job: 2 }),
            Some(Status::Exited(3)),
        ]
        .map(|status| JobInfo {
            job: 2,
            pid: 77,
            status,
        });
        for answer in [
            Answer::Done(Vec::new()),
            Answer::Done(jobs.to_vec()),
            Answer::Refused(2),
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn half_a_request_is_refused() {
        let decode = |fields: Writer| Request::decode(&fields.finish()).unwrap_err();
        assert_eq!(decode(Writer::default()), Malformed("no verb"));
        assert_eq!(
            decode(Writer::default().put_u32(1, 9)),
            Malformed("an unknown verb")
        );
        assert_eq!(decode(Writer::default().put_u32(1, 2)), Malformed("no job"));
        assert_eq!(
            decode(Writer::default().put_u32(1, 1)),
            Malformed("no user")
        );
        let no_signal = Writer::default().put_u32(1, 4).put_u32(4, 1);
        assert_eq!(decode(no_signal), Malformed("no signal"));
    }
}
