//! What a crash left, as `dea.<id>.logs` tells it and as a host keeps it.

use serde::{Deserialize, Serialize};

/// A crash, and the ends of what its instance wrote.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Crash {
    /// The instance's handle.
    pub handle: String,
    /// The app.
    pub droplet: String,
    /// The index.
    pub index: u64,
    /// The instance id.
    pub instance: String,
    /// The app's version.
    pub version: String,
    /// When it crashed, in seconds since the epoch.
    pub time: f64,
    /// As in `droplet.exited`; so are the next two.
    pub exit_status: i32,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// In words; `droplet.exited` may have less of them.
    pub exit_description: String,
    /// Whether it ended for want of memory.
    pub oom: bool,
    /// What is kept.
    pub files: Vec<CrashFile>,
    /// How many things in the directory of logs are not kept, at least.
    pub left_out: u64,
}

/// The end of a stream or of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrashFile {
    /// `stdout`, `stderr`, or `logs/` and a path.
    pub name: String,
    /// The first byte that is kept, counted from the beginning of the stream or file.
    pub from: u64,
    /// The byte behind the last one.
    pub to: u64,
}
