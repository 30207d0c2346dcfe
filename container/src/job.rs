//! What a job is asked to be: program, environment, limits.
//!
//! It travels as a sealed memory file from the agent through `iomux-spawn` and `wsh` to `wshd`, by
//! descriptor, so that no argument meets a shell and no secret shows in a process list.

use crate::copy::{Links, Naming};
use crate::fault::SysError;
use crate::fields::{Malformed, Reader, Writer, memfd, read_memfd, u32_of};
use std::os::fd::{AsFd, OwnedFd};

/// A resource limit, as `setrlimit(2)` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimit {
    /// The kernel's number of the resource, e.g. 7 for `RLIMIT_NOFILE`.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is infinity.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is infinity. Cut to `wshd`'s own where the host lacks
    /// `CAP_SYS_RESOURCE`.
    pub hard: u64,
}

/// One job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobRequest {
    /// The number under which `wshd` shall know it; 0: `wshd` chooses one (from 2³⁰ on).
    pub job: u32,
    /// The program and its arguments; empty: the user's shell. Without a `/` the program is searched
    /// in the job's `PATH`.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`. `HOME`, `USER` and `PATH` are added where they are missing; nothing else is.
    pub env: Vec<Vec<u8>>,
    /// Working directory; must exist. `None`: the user's home, or `/` where that is missing.
    pub cwd: Option<Vec<u8>>,
    /// Limits to set. On core files, where none is given, one byte, which lets nobody have one.
    pub rlimits: Vec<Rlimit>,
    /// File mode mask; 022 by default.
    pub umask: Option<u32>,
    /// Whether `wshd` keeps a reader of the job's output pipes, so that the job outlives its
    /// supervisor, and the job's end until it is told to forget it.
    pub keep_readers: bool,
    /// What it copies instead of executing a program.
    pub copy: Option<Copy>,
}

/// A job that executes nothing: `wshd`'s own code, as the job's user, copies a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Copy {
    /// What is at a path, to descriptor 1. A relative path starts in the job's working directory.
    Out {
        /// The path.
        path: Vec<u8>,
        /// What becomes of symlinks.
        links: Links,
    },
    /// From descriptor 0 to a path.
    In {
        /// The path.
        path: Vec<u8>,
        /// Under which names.
        naming: Naming,
    },
}

impl Copy {
    /// The job's exit code: everything was copied.
    pub const WHOLE: u8 = 0;
    /// Some of it could not be read; descriptor 2 says what.
    pub const DAMAGED: u8 = 1;
    /// It stopped; descriptor 2 says why.
    pub const FAILED: u8 = 2;

    /// One byte for what, and the path.
    fn encode(&self) -> Vec<u8> {
        let (what, path) = match self {
            Self::Out { path, links } => match links {
                Links::Keep => (1, path),
                Links::Follow => (2, path),
            },
            Self::In { path, naming } => match naming {
                Naming::AsGiven => (3, path),
                Naming::AsCopied => (4, path),
            },
        };
        [&[what], &path[..]].concat()
    }

    fn decode(value: &[u8]) -> Result<Self, Malformed> {
        let wrong = Malformed("a copy is of no kind");
        let (what, path) = value.split_first().ok_or(wrong)?;
        let path = string(path)?;
        let out = |path, links| Self::Out { path, links };
        let in_ = |path, naming| Self::In { path, naming };
        match what {
            1 => Ok(out(path, Links::Keep)),
            2 => Ok(out(path, Links::Follow)),
            3 => Ok(in_(path, Naming::AsGiven)),
            4 => Ok(in_(path, Naming::AsCopied)),
            _ => Err(wrong),
        }
    }
}

mod tag {
    pub(super) const JOB: u16 = 1;
    pub(super) const ARG: u16 = 2;
    pub(super) const ENV: u16 = 3;
    pub(super) const CWD: u16 = 4;
    pub(super) const RLIMIT: u16 = 5;
    pub(super) const UMASK: u16 = 6;
    pub(super) const KEEP_READERS: u16 = 7;
    pub(super) const COPY: u16 = 8;
}

impl JobRequest {
    /// As framed fields.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Writer::default().put_u32(tag::JOB, self.job);
        for arg in &self.argv {
            fields = fields.put(tag::ARG, arg);
        }
        for variable in &self.env {
            fields = fields.put(tag::ENV, variable);
        }
        if let Some(cwd) = &self.cwd {
            fields = fields.put(tag::CWD, cwd);
        }
        for limit in &self.rlimits {
            let mut value = limit.resource.to_le_bytes().to_vec();
            value.extend(limit.soft.to_le_bytes());
            value.extend(limit.hard.to_le_bytes());
            fields = fields.put(tag::RLIMIT, &value);
        }
        if let Some(umask) = self.umask {
            fields = fields.put_u32(tag::UMASK, umask);
        }
        if self.keep_readers {
            fields = fields.put(tag::KEEP_READERS, b"");
        }
        if let Some(copy) = &self.copy {
            fields = fields.put(tag::COPY, &copy.encode());
        }
        fields.finish()
    }

    /// Reads framed fields back.
    ///
    /// # Errors
    /// Anything that is not exactly a job: unknown tags, zero bytes inside a string, a variable
    /// without a name.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let mut job = Self::default();
        while let Some((tag, value)) = reader.field()? {
            match tag {
                tag::JOB => job.job = u32_of(value)?,
                tag::ARG => job.argv.push(string(value)?),
                tag::ENV => job.env.push(variable(value)?),
                tag::CWD => job.cwd = Some(string(value)?),
                tag::RLIMIT => job.rlimits.push(rlimit(value)?),
                tag::UMASK => job.umask = Some(u32_of(value)? & 0o777),
                tag::KEEP_READERS => job.keep_readers = true,
                tag::COPY => job.copy = Some(Copy::decode(value)?),
                _ => return Err(Malformed("an unknown field in a job")),
            }
        }
        Ok(job)
    }

    /// As a sealed memory file.
    ///
    /// # Errors
    /// As [`memfd`].
    pub fn to_memfd(&self) -> Result<OwnedFd, SysError> {
        memfd(&self.encode(), "job")
    }

    /// From a sealed memory file.
    ///
    /// # Errors
    /// As [`read_memfd`]; `EBADMSG` for a content that is no job.
    pub fn from_memfd(fd: impl AsFd) -> Result<Self, SysError> {
        Ok(Self::decode(&read_memfd(fd)?)?)
    }
}

fn string(value: &[u8]) -> Result<Vec<u8>, Malformed> {
    if value.contains(&0) {
        return Err(Malformed("a zero byte inside a string"));
    }
    Ok(value.to_vec())
}

fn variable(value: &[u8]) -> Result<Vec<u8>, Malformed> {
    match value.iter().position(|byte| *byte == b'=') {
        None | Some(0) => Err(Malformed("an environment variable is not NAME=value")),
        Some(_) => string(value),
    }
}

fn rlimit(value: &[u8]) -> Result<Rlimit, Malformed> {
    let wrong = Malformed("a resource limit is not of twenty bytes");
    let (resource, rest) = value.split_first_chunk::<4>().ok_or(wrong)?;
    let (soft, rest) = rest.split_first_chunk::<8>().ok_or(wrong)?;
    let hard: [u8; 8] = rest.try_into().map_err(|_| wrong)?;
    Ok(Rlimit {
        resource: u32::from_le_bytes(*resource),
        soft: u64::from_le_bytes(*soft),
        hard: u64::from_le_bytes(hard),
    })
}

#[cfg(test)]
mod tests {
    use super::{Copy, JobRequest, Rlimit};
    use crate::copy::{Links, Naming};
    use crate::fields::{Malformed, Writer};

    fn full() -> JobRequest {
        JobRequest {
            job: 3,
            argv: vec![
                b"/bin/bash".to_vec(),
                b"-c".to_vec(),
                b"echo \xff".to_vec(),
                Vec::new(),
            ],
            env: vec![b"A=".to_vec(), b"B=c=d".to_vec()],
            cwd: Some(b"/home/vcap".to_vec()),
            rlimits: vec![Rlimit {
                resource: 7,
                soft: 1024,
                hard: u64::MAX,
            }],
            umask: Some(0o77),
            keep_readers: true,
            copy: None,
        }
    }

    #[test]
    fn a_job_comes_back_as_it_was() {
        let path = b"/a \xff".to_vec();
        let copies = [
            Copy::Out {
                path: path.clone(),
                links: Links::Keep,
            },
            Copy::Out {
                path: path.clone(),
                links: Links::Follow,
            },
            Copy::In {
                path: path.clone(),
                naming: Naming::AsGiven,
            },
            Copy::In {
                path,
                naming: Naming::AsCopied,
            },
        ];
        let copies = copies.map(|copy| JobRequest {
            copy: Some(copy),
            ..JobRequest::default()
        });
        for job in [JobRequest::default(), full()].into_iter().chain(copies) {
            assert_eq!(JobRequest::decode(&job.encode()), Ok(job.clone()));
            assert_eq!(JobRequest::from_memfd(job.to_memfd().unwrap()), Ok(job));
        }
    }

    #[test]
    fn what_no_exec_could_carry_is_refused() {
        let refused = |tag, value: &[u8]| {
            JobRequest::decode(&Writer::default().put(tag, value).finish()).unwrap_err()
        };
        assert_eq!(
            refused(2, b"a\0b"),
            Malformed("a zero byte inside a string")
        );
        let no_name = Malformed("an environment variable is not NAME=value");
        assert_eq!(refused(3, b"=x"), no_name);
        assert_eq!(refused(3, b"novalue"), no_name);
        assert_eq!(
            refused(5, b"123"),
            Malformed("a resource limit is not of twenty bytes")
        );
        for copy in [&b""[..], b"\x05/", b"\x00/"] {
            assert_eq!(refused(8, copy), Malformed("a copy is of no kind"));
        }
        assert_eq!(refused(99, b""), Malformed("an unknown field in a job"));
    }
}
