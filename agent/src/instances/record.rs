//! What is kept on disk of an instance: `<base>/instances/<handle>/record.json`.
//!
//! Every live state is in it. It is written before anybody is told, to a temporary name, synced and
//! renamed, so a reader finds the old one or the new one. It holds the start message and so secrets:
//! the directory is 0700, the file 0600.

use super::droplets::Digest;
use crate::engine::Saved;
use crate::host::depot::is_handle;
use messages::start::{MEGABYTES_MAX, StartRequest};
use messages::state::State;
use messages::trace::Trace;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tracing::error;

/// The format that this agent writes and reads.
pub const FORMAT: u32 = 1;

/// How the name of a file ends that [`write_durably`] has not finished; worthless after a restart.
pub const UNFINISHED: &str = ".new";

/// One instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// The kernel's boot id when the instance was accepted.
    pub boot_id: String,
    /// The container's handle, for life.
    pub handle: String,
    /// The start message as it came.
    pub start: Value,
    /// The trace of the command that began it, told with its events.
    #[serde(default)]
    pub trace: Option<Trace>,
    /// The `request_id` that it came with.
    pub request_id: Option<String>,
    /// The instance id, 32 hexadecimal characters; an update of the version makes a new one.
    pub instance: String,
    /// 64 hexadecimal characters, for life.
    pub private_instance: String,
    /// The app's version, as last updated.
    pub version: String,
    /// The app's URIs, as last updated.
    pub uris: Vec<String>,
    /// Megabytes and counts, as last scaled.
    pub limits: Limits,
    /// The state.
    #[serde(with = "state_name")]
    pub state: State,
    /// When the state was entered, in seconds since the epoch.
    pub state_timestamp: f64,
    /// When STARTING was entered, in seconds since the epoch; 0 before.
    pub started_at: f64,
    /// The mapped port, the same outside and inside.
    pub port: Option<u16>,
    /// The container, once there is one.
    pub container: Option<Saved>,
    /// The job was handed to its supervisor.
    pub spawned: bool,
    /// Kernel OOM kills in the container that were reported.
    pub oom_kills: u64,
    /// One of those kills ends (or ended) the instance.
    pub out_of_memory: bool,
    /// It has passed its health check: also an EVACUATING one may still be starting.
    #[serde(default)]
    pub healthy: bool,
    /// It became healthy by accepting a connection at its port.
    #[serde(default)]
    pub listens: bool,
    /// Its hook `after_start` is still to be run to its end.
    #[serde(default)]
    pub after_start: bool,
    /// How it is being stopped, if it is.
    pub stopping: Option<Stopping>,
    /// Why it is CRASHED, in words, where the job itself does not know.
    #[serde(default)]
    pub failure: Option<String>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Events that the bus has not confirmed, oldest first.
    pub unsent: Vec<Event>,
    /// Routes that were taken back, and the bus has not confirmed it; oldest first.
    #[serde(default)]
    pub taken_back: Vec<TakenBack>,
}

/// The limits of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory in MB.
    pub mem: u64,
    /// Disk in MB.
    pub disk: u64,
    /// Open files.
    pub fds: u64,
}

/// Why and how an instance is being stopped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stopping {
    /// The `reason` of `droplet.exited`.
    pub reason: StopReason,
    /// Seconds between TERM and KILL.
    pub grace: f64,
}

/// Who wanted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// A message did.
    Stopped,
    /// The agent is shutting down.
    Shutdown,
    /// The host is being emptied, and it was not relieved in time.
    Evacuation,
}

/// How the job ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The job's status; -1 if it never ran or nobody knows.
    pub status: i32,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// In words.
    pub description: String,
    /// Seconds since the epoch.
    pub time: u64,
}

/// A route that routers may still have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenBack {
    /// The host's address, as it was told.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Some of the app's URIs, or all.
    pub uris: Vec<String>,
}

/// An event that must reach the bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its subject.
    pub subject: String,
    /// Its body, JSON.
    pub body: Value,
}

impl Record {
    /// Whether it serves: its route is open.
    #[must_use]
    pub fn serves(&self) -> bool {
        match self.state {
            State::Running => true,
            State::Evacuating => self.healthy,
            State::Born
            | State::Starting
            | State::Stopping
            | State::Stopped
            | State::Crashed
            | State::Resuming => false,
        }
    }
}

mod state_name {
    use messages::state::State;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(state: &State, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(state.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<State, D::Error> {
        let name = String::deserialize(from)?;
        State::parse(&name).ok_or_else(|| D::Error::custom(format!("no state {name:?}")))
    }
}

/// The directory of all records. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

/// Why a record could not be kept or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act} {path}: {source}")]
pub struct RecordError {
    act: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

/// What a start of the agent finds.
#[derive(Debug, Default)]
pub struct Found {
    /// The records of this format.
    pub records: Vec<Record>,
    /// Those that this agent cannot use. They stay as they are, for the agent that can.
    pub unread: Vec<Unread>,
}

/// A record that is of another format, or none at all.
#[derive(Debug)]
pub struct Unread {
    /// The instance, after its directory.
    pub handle: String,
    /// Where it is.
    pub path: PathBuf,
    /// Why it cannot be used.
    pub why: String,
    /// What it says all the same.
    pub legible: Legible,
}

/// What a record that cannot be used says as this agent would.
#[derive(Debug, Default)]
pub struct Legible {
    /// The container.
    pub container: Option<Saved>,
    /// The droplet that its start message wants.
    pub droplet: Option<Digest>,
    /// The limits.
    pub limits: Option<Limits>,
}

/// What becomes of a record.
#[derive(Debug)]
pub enum Entry {
    /// It is this one now.
    Save(Box<Record>),
    /// There is none of this handle any more.
    Remove(String),
}

impl Records {
    /// Makes the directory, readable to root alone.
    ///
    /// # Errors
    /// As `mkdir(2)`.
    pub fn open(base: &Path) -> Result<Self, RecordError> {
        let dir = base.join("instances");
        make_private(&dir)?;
        Ok(Self { dir })
    }

    /// The directory of one instance: its record, and the cursor of its output.
    #[must_use]
    pub fn dir(&self, handle: &str) -> PathBuf {
        self.dir.join(handle)
    }

    /// The file with the confirmed place of an instance's output.
    #[must_use]
    pub fn cursor(&self, handle: &str) -> PathBuf {
        self.dir(handle).join("cursor")
    }

    /// The handles that have a directory. Blocks.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn handles(&self) -> std::io::Result<Vec<String>> {
        let mut handles = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            handles.extend(entry?.file_name().into_string());
        }
        handles.retain(|name| is_handle(name));
        Ok(handles)
    }

    /// Makes it so. Blocks.
    ///
    /// # Errors
    /// What the file system says, in words.
    pub fn enter(&self, entry: Entry) -> Result<(), String> {
        let entered = match entry {
            Entry::Save(record) => self.save(&record),
            Entry::Remove(handle) => self.remove(&handle).inspect_err(|error| {
                error!(handle, %error, "a record stays, and the next agent will find it");
            }),
        };
        entered.map_err(|error| error.to_string())
    }

    /// Writes `record` durably. Blocks.
    ///
    /// # Errors
    /// What the file system says; the old record then still stands.
    pub fn save(&self, record: &Record) -> Result<(), RecordError> {
        let dir = self.dir(&record.handle);
        make_private(&dir)?;
        let bytes = serde_json::to_vec(record).map_err(|error| RecordError {
            act: "write",
            path: dir.clone(),
            source: error.into(),
        })?;
        write_durably(&dir, "record.json", &bytes)
    }

    /// Forgets an instance. Blocks. One that is gone already is no error.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self, handle: &str) -> Result<(), RecordError> {
        let dir = self.dir(handle);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(RecordError {
                act: "remove",
                path: dir,
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// Reads all records. One that cannot be used is told, and stops nobody else. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn load(&self) -> Result<Found, RecordError> {
        let failed = |source| RecordError {
            act: "list",
            path: self.dir.clone(),
            source,
        };
        let mut found = Found::default();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path().join("record.json");
            let unread = |why, legible| Unread {
                handle: entry.file_name().to_string_lossy().into_owned(),
                path: path.clone(),
                why,
                legible,
            };
            match std::fs::read(&path) {
                Ok(bytes) => match understand(&bytes) {
                    Ok(record) => found.records.push(record),
                    Err(why) => found.unread.push(unread(why, legible(&bytes))),
                },
                // An accepted start has a record; a directory without one was never answered.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    drop(std::fs::remove_dir_all(entry.path()));
                }
                Err(error) => found
                    .unread
                    .push(unread(error.to_string(), Legible::default())),
            }
        }
        Ok(found)
    }
}

/// What a record says that cannot be used otherwise.
pub(crate) fn legible(bytes: &[u8]) -> Legible {
    let record: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let part = |key: &str| record.get(key).unwrap_or(&Value::Null);
    let container = Saved::deserialize(part("container")).ok();
    let limits = Limits::deserialize(part("limits")).ok();
    Legible {
        container: container.filter(|saved| is_handle(&saved.handle)),
        droplet: Digest::wanted_by(part("start")),
        limits: limits.filter(|limits| limits.mem.max(limits.disk) <= MEGABYTES_MAX),
    }
}

pub(crate) fn understand(bytes: &[u8]) -> Result<Record, String> {
    let record: Record = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if record.format != FORMAT {
        return Err(format!(
            "format {}, and this agent reads format {FORMAT}",
            record.format
        ));
    }
    let handles = [
        Some(&record.handle),
        record.container.as_ref().map(|saved| &saved.handle),
    ];
    if let Some(handle) = handles
        .into_iter()
        .flatten()
        .find(|handle| !is_handle(handle))
    {
        // Directories and control groups are found by it: nothing else may stand there.
        return Err(format!("{handle:?} is no handle"));
    }
    StartRequest::from_kept(&record.start)
        .map_err(|bad| format!("its start message is not understood: {bad}"))?;
    Ok(record)
}

/// Makes `dir` for root alone. One that is there is no error.
///
/// # Errors
/// As `mkdir(2)`.
pub fn make_private(dir: &Path) -> Result<(), RecordError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| RecordError {
            act: "make",
            path: dir.into(),
            source,
        })
}

/// Replaces `dir/name` by `bytes`: temporary file, fsync, rename, fsync of the directory. Blocks.
///
/// # Errors
/// What the file system says; the old file then still stands.
pub fn write_durably(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
    let temporary = dir.join(format!("{name}{UNFINISHED}"));
    let failed = |source| RecordError {
        act: "write",
        path: dir.join(name),
        source,
    };
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        std::fs::rename(&temporary, dir.join(name))?;
        std::fs::File::open(dir)?.sync_data()
    };
    write().map_err(failed)
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Event, FORMAT, Limits, Record, Records, understand};
    use messages::state::State;

    pub(in crate::instances) fn record(handle: &str) -> Record {
        Record {
            format: FORMAT,
            boot_id: "b".into(),
            handle: handle.into(),
            start: serde_json::json!({
                "droplet": "a", "index": 0, "version": "v", "name": "a", "services": [],
                "limits": {"mem": 1, "disk": 2, "fds": 8}, "cc_partition": "default",
            }),
            trace: None,
            request_id: None,
            instance: "i".into(),
            private_instance: "p".into(),
            version: "v".into(),
            uris: vec!["u".into()],
            limits: Limits {
                mem: 1,
                disk: 2,
                fds: 3,
            },
            state: State::Running,
            state_timestamp: 1.5,
            started_at: 1.0,
            port: Some(61001),
            container: None,
            spawned: true,
            oom_kills: 0,
            out_of_memory: false,
            healthy: true,
            listens: true,
            after_start: false,
            stopping: None,
            failure: None,
            exit: None,
            unsent: vec![Event {
                subject: "s".into(),
                body: serde_json::json!(1),
            }],
            taken_back: Vec::new(),
        }
    }

    #[test]
    fn what_was_accepted_under_other_bounds_is_understood() {
        let mut kept = record("00000000001");
        kept.start["version"] = "v".repeat(1000).into();
        kept.start["cc_partition"] = "p".repeat(1000).into();
        kept.start["index"] = u64::MAX.into();
        let bytes = |record: &Record| serde_json::to_vec(record).unwrap();
        assert!(understand(&bytes(&kept)).is_ok());
        kept.start["index"] = "0".into();
        let why = understand(&bytes(&kept)).unwrap_err();
        assert!(why.contains("`index` is \"0\""), "{why}");
    }

    #[test]
    fn records_come_back_and_broken_ones_stop_nobody() {
        let base = std::env::temp_dir().join(format!("ostler-records-{}", std::process::id()));
        let records = Records::open(&base).unwrap();
        records.save(&record("00000000001")).unwrap();
        records.save(&record("00000000001")).unwrap();
        for (handle, text) in [
            ("00000000002", "{\"half\":".to_owned()),
            (
                "00000000003",
                serde_json::to_string(&record("../../etc00")).unwrap(),
            ),
            (
                "00000000004",
                serde_json::to_string(&Record {
                    format: 99,
                    start: serde_json::json!({"sha1": "0a".repeat(20), "index": "a"}),
                    ..record("00000000004")
                })
                .unwrap(),
            ),
        ] {
            std::fs::create_dir(records.dir(handle)).unwrap();
            std::fs::write(records.dir(handle).join("record.json"), text).unwrap();
        }
        std::fs::create_dir(records.dir("00000000005")).unwrap();
        for round in 0..2 {
            let found = records.load().unwrap();
            assert_eq!(found.records.len(), 1);
            assert_eq!(found.records[0].unsent, record("x").unsent);
            let mut unread: Vec<&str> = found.unread.iter().map(|one| &*one.handle).collect();
            unread.sort_unstable();
            let all = ["00000000002", "00000000003", "00000000004"];
            assert_eq!(unread, all, "round {round}: they stay");
            for one in &found.unread {
                // Torn, without a droplet in its start message, and of another format.
                let says = (one.legible.limits.is_some(), one.legible.droplet.is_some());
                let told = match &*one.handle {
                    "00000000002" => (false, false),
                    "00000000003" => (true, false),
                    _ => (true, true),
                };
                assert_eq!(says, told, "{}", one.handle);
            }
        }
        assert!(
            !records.dir("00000000005").exists(),
            "a start that was never accepted"
        );
        records.remove("00000000001").unwrap();
        records.remove("00000000001").unwrap();
        std::fs::remove_dir_all(&base).unwrap();
    }
}
