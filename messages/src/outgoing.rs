//! What a host publishes (protocol 2.5 to 2.11, and `droplet.oom`).
//!
//! Decoders of DEA's time are strict: a number in the place of a string, or a fraction in the place of
//! a whole number, makes them drop the whole message.

use crate::state::State;
use serde::Serialize;
use std::collections::BTreeMap;

/// The bytes of a message.
pub trait ToBytes: Serialize {
    /// Its JSON.
    fn to_bytes(&self) -> Vec<u8> {
        // Plain structures of strings, numbers, lists and maps with text keys always become JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl<T: Serialize> ToBytes for T {}

/// `dea.start`, and the answer to `dea.discover`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hello {
    /// The host.
    pub id: String,
    /// Its address.
    pub ip: String,
    /// Of a file server; none here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its agent's version.
    pub version: String,
}

/// The answer to `dea.status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StatusReply {
    /// As in the hello.
    #[serde(flatten)]
    pub hello: Hello,
    /// Capacity in MB.
    pub max_memory: u64,
    /// Reserved MB.
    pub reserved_memory: u64,
    /// Measured MB.
    pub used_memory: u64,
    /// Always null in dea_ng.
    pub num_clients: Option<u64>,
}

/// One answer to `droplet.status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DropletStatus {
    /// The app's name.
    pub name: String,
    /// Its URIs.
    pub uris: Vec<String>,
}

/// `dea.advertise`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Advertise {
    /// The host.
    pub id: String,
    /// Stacks it has.
    pub stacks: Vec<String>,
    /// Always null: a URL would make controllers send starts by HTTP.
    pub url: Option<String>,
    /// Free MB; negative when overcommitted.
    pub available_memory: i64,
    /// Free MB; negative when overcommitted.
    pub available_disk: i64,
    /// Instances of each app, in any state.
    pub app_id_to_count: BTreeMap<String, u64>,
    /// Where it stands.
    pub placement_properties: PlacementProperties,
}

/// Where a host stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlacementProperties {
    /// Its zone.
    pub zone: String,
}

/// `dea.shutdown`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Goodbye {
    /// The host.
    pub id: String,
    /// Its address.
    pub ip: String,
    /// Its agent's version.
    pub version: String,
    /// Instances of each app, in any state.
    pub app_id_to_count: BTreeMap<String, u64>,
}

/// `vcap.component.announce`, and the answer to `vcap.component.discover` (protocol 2.13): where a host tells over HTTP how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// What it is.
    pub r#type: &'static str,
    /// Its index.
    pub index: u32,
    /// `<index>-<32hex>`: its index and id.
    pub uuid: String,
    /// Address and port.
    pub host: String,
    /// User and password for it, which everybody on the bus can read.
    pub credentials: [String; 2],
    /// When its agent began: see [`usage_time`].
    pub start: String,
    /// For how long it has run: see [`uptime`]. Not announced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uptime: Option<String>,
}

/// So many seconds as `0d:0h:5m:12s`.
#[must_use]
pub fn uptime(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    format!(
        "{days}d:{}h:{}m:{}s",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// `dea.heartbeat`: the complete state of a host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Heartbeat {
    /// The host.
    pub dea: String,
    /// Every instance that counts.
    pub droplets: Vec<HeartbeatEntry>,
}

/// One instance in a heartbeat.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeartbeatEntry {
    /// As it came.
    pub cc_partition: String,
    /// The app.
    pub droplet: String,
    /// Its version.
    pub version: String,
    /// The instance.
    pub instance: String,
    /// Its index.
    pub index: u64,
    /// Its state.
    pub state: State,
    /// Since when, in seconds since the epoch.
    pub state_timestamp: f64,
}

impl HeartbeatEntry {
    /// Most bytes that the entry of an instance of this version can take in a heartbeat, whatever becomes of the version
    /// and of its state.
    #[must_use]
    pub fn bytes_at_most(droplet: &str, cc_partition: &str, index: u64, version: &str) -> usize {
        let entry = |version: String| Self {
            cc_partition: cc_partition.into(),
            droplet: droplet.into(),
            version,
            instance: "i".repeat(32),
            index,
            state: State::Evacuating,
            // No time of this century has more digits.
            state_timestamp: 4_102_444_800.123_456_7,
        };
        let bytes = |version| entry(version).to_bytes().len();
        let largest = bytes("v".repeat(crate::start::VERSION_MAX));
        // One that was accepted when there was no such bound.
        largest.max(bytes(version.into())) + ",".len()
    }
}

/// Why an instance is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// By itself, or never was.
    Crashed,
    /// On request.
    Stopped,
    /// The agent shut down.
    DeaShutdown,
    /// The host is being emptied.
    DeaEvacuation,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Crashed,
        Self::Stopped,
        Self::DeaShutdown,
        Self::DeaEvacuation,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Crashed => "CRASHED",
            Self::Stopped => "STOPPED",
            Self::DeaShutdown => "DEA_SHUTDOWN",
            Self::DeaEvacuation => "DEA_EVACUATION",
        }
    }
}

/// Characters of an `exit_description` that a controller keeps: the column `app_events.exit_description` is a
/// `varchar(255)`.
const DESCRIPTION_MAX: usize = 255;

/// Words as `exit_description` of a message. A controller on MySQL, in its strict mode, has nothing of an exit whose words are
/// longer than their column, or have characters of four bytes (`utf8` there has three at most).
#[must_use]
pub fn exit_description(words: &str) -> String {
    let kept = |this: char| if this.len_utf8() > 3 { '?' } else { this };
    words.chars().take(DESCRIPTION_MAX).map(kept).collect()
}

impl Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// `droplet.exited`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exited {
    /// As it came.
    pub cc_partition: String,
    /// The app.
    pub droplet: String,
    /// Its version.
    pub version: String,
    /// The instance.
    pub instance: String,
    /// Its index.
    pub index: u64,
    /// Why.
    pub reason: Reason,
    /// The job's exit status; 128+n after signal n; -1 if it never ran or nobody knows.
    pub exit_status: i32,
    /// In words.
    pub exit_description: String,
    /// Seconds since the epoch, if it crashed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crash_timestamp: Option<u64>,
    /// The signal that ended it (Ostler).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether the kernel killed it for memory (Ostler).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom: Option<bool>,
    /// Bytes of each stream in all, so that a reader can prove that it has them (Ostler).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputOffsets>,
    /// The handle in its output subjects (Ostler).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
}

/// Bytes since the job began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OutputOffsets {
    /// Of standard output.
    pub stdout: u64,
    /// Of standard error.
    pub stderr: u64,
}

/// `droplet.oom`: one kernel OOM kill.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DropletOom {
    /// The host.
    pub dea: String,
    /// The app.
    pub droplet: String,
    /// Its version.
    pub version: String,
    /// The instance.
    pub instance: String,
    /// Its index.
    pub index: u64,
    /// Its container.
    pub handle: String,
    /// The memory limit in bytes, if there is one.
    pub limit_bytes: Option<u64>,
    /// Bytes in use when it was reported.
    pub usage_bytes: Option<u64>,
    /// Most bytes ever in use.
    pub peak_bytes: Option<u64>,
    /// Whose limit was hit: `instance`, `ancestor`, `host`, `unknown`.
    pub level: String,
    /// Who was killed.
    pub victim: Victim,
    /// Whether the instance goes on.
    pub survived: bool,
    /// Kills between the one told before and this one that are not told one by one.
    #[serde(skip_serializing_if = "is_zero")]
    pub missed: u64,
    /// Seconds since the epoch.
    pub time: f64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A killed process; null where the kernel's log had overflowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Victim {
    /// Its pid, as the host counts.
    pub pid: Option<i32>,
    /// Its name.
    pub comm: Option<String>,
}

/// `router.register` and `router.unregister`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Route {
    /// The host.
    pub dea: String,
    /// The app.
    pub app: String,
    /// One entry each.
    pub uris: Vec<String>,
    /// The host's address.
    pub host: String,
    /// The mapped port.
    pub port: u16,
    /// `{"component":"dea-<index>"}`
    pub tags: BTreeMap<String, String>,
    /// For sticky sessions.
    pub private_instance_id: String,
    /// A string, as the router wants.
    pub private_instance_index: String,
}

/// One answer to `dea.find.droplet`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FindReply {
    /// The host.
    pub dea: String,
    /// The app.
    pub droplet: String,
    /// Its version.
    pub version: String,
    /// The instance.
    pub instance: String,
    /// Its index.
    pub index: u64,
    /// Its state.
    pub state: State,
    /// Since when, in seconds since the epoch.
    pub state_timestamp: f64,
    /// `/<instance>`
    pub staged: String,
    /// Measured, if asked for and it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// Limits and use of a running instance.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// The app's name.
    pub name: String,
    /// Its URIs.
    pub uris: Vec<String>,
    /// The host's address.
    pub host: String,
    /// The mapped port.
    pub port: u16,
    /// Seconds since STARTING.
    pub uptime: u64,
    /// Bytes.
    pub mem_quota: u64,
    /// Bytes; null: there is no limit.
    pub disk_quota: Option<u64>,
    /// Open files.
    pub fds_quota: u64,
    /// Measured.
    pub usage: Usage,
}

/// Measured use. What could not be read is left out: never 0 for that.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Usage {
    /// Of the answer, `YYYY-MM-DD HH:MM:SS +0000`.
    pub time: String,
    /// Fraction of one core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<f64>,
    /// Cores of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<usize>,
    /// The working set in bytes: without page cache that was not used lately.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem: Option<u64>,
    /// What the limit counts, in bytes: with all page cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_charged: Option<u64>,
    /// Of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskUse>,
}

/// Measured use of a disk: a number, or null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum DiskUse {
    /// So many bytes.
    Bytes(u64),
    /// Nothing counts them.
    Uncounted,
}

/// `YYYY-MM-DD HH:MM:SS +0000` of seconds since the epoch.
#[must_use]
pub fn usage_time(seconds: u64) -> String {
    format!("{} +0000", civil_time(seconds, ' '))
}

/// `YYYY-MM-DD` and `HH:MM:SS` of seconds since the epoch, in UTC, with `between` between them.
pub(crate) fn civil_time(seconds: u64, between: char) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}{between}{hour:02}:{minute:02}:{second:02}")
}

/// The date so many days after 1970-01-01: Howard Hinnant's `civil_from_days`, for days not before it.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::{DiskUse, ToBytes, Usage, exit_description, usage_time};

    #[test]
    fn words_of_an_exit_are_as_many_as_a_controller_keeps() {
        let long = "ü".repeat(300);
        assert_eq!(exit_description(&long), "ü".repeat(255));
        assert_eq!(exit_description("a \u{1f600} \u{fffd}"), "a ? \u{fffd}");
    }

    #[test]
    fn what_is_not_known_is_neither_0_nor_null() {
        let usage = |disk| {
            let usage = Usage {
                time: "t".into(),
                cpu: None,
                cores: None,
                mem: None,
                mem_charged: None,
                disk,
            };
            String::from_utf8(usage.to_bytes()).unwrap()
        };
        assert_eq!(usage(None), r#"{"time":"t"}"#);
        let uncounted = usage(Some(DiskUse::Uncounted));
        assert_eq!(uncounted, r#"{"time":"t","disk":null}"#);
        assert_eq!(usage(Some(DiskUse::Bytes(0))), r#"{"time":"t","disk":0}"#);
    }

    #[test]
    fn times_are_as_date_prints_them() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 +0000"),
            (951_782_399, "2000-02-28 23:59:59 +0000"),
            (951_782_400, "2000-02-29 00:00:00 +0000"),
            (1_471_351_290, "2016-08-16 12:41:30 +0000"),
            (4_102_444_799, "2099-12-31 23:59:59 +0000"),
        ] {
            assert_eq!(usage_time(seconds), text);
        }
    }
}
