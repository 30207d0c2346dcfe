//! What became of a job, as fixed frames of [`Status::SIZE`] bytes.
//!
//! `wshd` writes them to the status pipe that came with the request (so a killed `wsh` loses nothing)
//! and to the request's own connection: [`Status::Started`] once `execve` succeeded, then exactly one
//! of the others. `Failed` may come without `Started`. End of file before the last frame means that
//! the container's init is dead.

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The program was executed; `job` is the number under which `wshd` knows it.
    Started {
        /// The job's number.
        job: u32,
    },
    /// It called `exit` with this value.
    Exited(u8),
    /// A signal ended it.
    Signaled(i32),
    /// It never ran: this step of its making failed with this errno.
    Failed {
        /// Which step.
        step: Step,
        /// Why, as `errno`.
        errno: i32,
    },
}

/// The steps between a request and `execve`, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The request itself was refused (`EINVAL`: not understood; `EEXIST`: the number is taken; `EPIPE`: the
    /// job's supervisor is gone).
    Request = 1,
    /// The user is not in the container's `/etc/passwd`.
    User = 2,
    /// `fork` failed.
    Fork = 3,
    /// Joining the job's control groups failed.
    Cgroup = 4,
    /// A new session or the controlling terminal could not be had.
    Session = 5,
    /// The descriptors could not be put in place or given to the user.
    Descriptors = 6,
    /// A resource limit was refused.
    Rlimit = 7,
    /// Groups, ids or capabilities could not be dropped (`EPERM`: or one was found that should have been).
    Privileges = 8,
    /// The working directory does not exist or is closed to the user.
    Directory = 9,
    /// `execve` itself failed.
    Exec = 10,
}

impl Step {
    const ALL: [Self; 10] = [
        Self::Request,
        Self::User,
        Self::Fork,
        Self::Cgroup,
        Self::Session,
        Self::Descriptors,
        Self::Rlimit,
        Self::Privileges,
        Self::Directory,
        Self::Exec,
    ];

    /// The step with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u8 == number)
    }

    /// What was being done, for a sentence such as "cannot … : ENOENT".
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Request => "understand the request",
            Self::User => "find the user in the container's /etc/passwd",
            Self::Fork => "fork",
            Self::Cgroup => "join the control groups",
            Self::Session => "start a session",
            Self::Descriptors => "put the descriptors in place",
            Self::Rlimit => "set the resource limits",
            Self::Privileges => "drop privileges",
            Self::Directory => "enter the working directory",
            Self::Exec => "execute the program",
        }
    }
}

impl Status {
    /// Bytes of a frame: kind, step, two zero bytes, then a little-endian `i32`.
    pub const SIZE: usize = 8;

    /// The frame's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let (kind, step, value) = match self {
            Self::Started { job } => (1, 0, job.cast_signed()),
            Self::Exited(code) => (2, 0, i32::from(code)),
            Self::Signaled(signal) => (3, 0, signal),
            Self::Failed { step, errno } => (4, step as u8, errno),
        };
        let [a, b, c, d] = value.to_le_bytes();
        [kind, step, 0, 0, a, b, c, d]
    }

    /// Reads a frame back; `None` if the bytes are none of ours.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Option<Self> {
        let [kind, step, 0, 0, a, b, c, d] = bytes else {
            return None;
        };
        let value = i32::from_le_bytes([a, b, c, d]);
        match kind {
            1 => Some(Self::Started {
                job: value.cast_unsigned(),
            }),
            2 => u8::try_from(value).ok().map(Self::Exited),
            3 => Some(Self::Signaled(value)),
            4 => Step::from_number(step).map(|step| Self::Failed { step, errno: value }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Status, Step};

    #[test]
    fn every_status_survives_its_frame() {
        let mut all = vec![
            Status::Started { job: 1 },
            Status::Started { job: u32::MAX },
        ];
        all.extend((0..=255).map(Status::Exited));
        all.extend((1..=64).map(Status::Signaled));
        all.extend(Step::ALL.map(|step| Status::Failed { step, errno: 2 }));
        for status in all {
            assert_eq!(Status::decode(status.encode()), Some(status));
        }
    }

    #[test]
    fn foreign_bytes_are_no_status() {
        for bytes in [
            [0; 8],
            [9, 0, 0, 0, 0, 0, 0, 0],
            [4, 99, 0, 0, 2, 0, 0, 0],
            [2, 0, 1, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(Status::decode(bytes), None);
        }
        assert_eq!(
            Status::decode([2, 0, 0, 0, 0, 1, 0, 0]),
            None,
            "an exit code above 255"
        );
    }
}
