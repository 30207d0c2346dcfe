//! Why the engine could not do what it was asked for.

use crate::host::cgroups::CgroupError;
use crate::host::depot::DepotError;
use crate::host::depot::disk::DiskError;
use crate::host::helpers::{Ended, HelperError};
use crate::host::network::NetworkError;
use container::fault::SysError;
use nix::errno::Errno;
use std::path::PathBuf;
use std::time::Duration;

/// The engine's one error; the causes are in `source`.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A handle that could not be the name of a link or a control group.
    #[error("handle \"{0}\" is not eleven characters of 0-9 and a-v")]
    Handle(String),
    /// The handle has a directory: the container exists, or was not destroyed.
    #[error("handle \"{0}\" is in use")]
    HandleInUse(String),
    /// A read-only layer of the root is missing.
    #[error("layer \"{path}\" of the root cannot be used: install the stack or correct its path")]
    Layer {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The container's init could not set it up.
    #[error("the container's init was refused {what}")]
    Init {
        /// The call and what it was about, e.g. `mount(/dev)`.
        what: String,
        /// Why.
        source: Errno,
    },
    /// The container's init ended without a word.
    #[error("the container's init died while it was made, its launcher {launcher}: was it killed?")]
    InitDied {
        /// How the process that starts it ended.
        launcher: Ended,
    },
    /// The container's init said something that it never says at this point.
    #[error(
        "the container's init is of another version: install the helpers that belong to this agent"
    )]
    Protocol,
    /// Something took too long.
    #[error("{what} was not done after {waited:?}: is the host overloaded?")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// Processes that do not die: they wait in the kernel, for a disk or a network file system.
    #[error(
        "processes {pids:?} of container \"{handle}\" do not die: look at their wchan and stack in /proc"
    )]
    Stuck {
        /// The container.
        handle: String,
        /// They, as the host counts.
        pids: Vec<i32>,
    },
    /// A process that serves as a container's init, but not where this agent keeps its containers.
    #[error(
        "process {pid} is the init of container \"{handle}\" but not in its control group: was the parent group in the configuration changed?"
    )]
    Astray {
        /// The container.
        handle: String,
        /// The process.
        pid: i32,
    },
    /// Another number of open files than its processes have.
    #[error("the number of open files was not changed: {0}")]
    OpenFiles(&'static str),
    /// The container is gone.
    #[error("container \"{0}\" was destroyed")]
    Destroyed(String),
    /// The job's number was used before.
    #[error("job {0} exists already")]
    JobInUse(u32),
    /// A job's supervisor ended before it could supervise.
    #[error("the supervisor of job {job} {ended}: {said}")]
    Supervisor {
        /// The job.
        job: u32,
        /// How it ended.
        ended: Ended,
        /// What it said last.
        said: String,
    },
    /// What starts helpers could not be had.
    #[error("helpers cannot be started")]
    Helpers(#[source] SysError),
    /// A copy into it or out of it.
    #[error(transparent)]
    Copy(#[from] super::CopyError),
    /// Control groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Directories.
    #[error(transparent)]
    Depot(#[from] DepotError),
    /// Bounds of writable layers.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Starting a helper.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// Links, addresses and ports.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A system call.
    #[error(transparent)]
    Refused(#[from] SysError),
}

impl EngineError {
    /// The smallest memory limit that would have been taken, in bytes, where one was refused.
    #[must_use]
    pub fn smallest_memory(&self) -> Option<u64> {
        if let Self::Cgroup(CgroupError::MemoryInUse { smallest, .. }) = self {
            Some(*smallest)
        } else {
            None
        }
    }
}
