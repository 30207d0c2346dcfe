//! The parsers of this crate that take bytes of others: droplets and what stagers wrote into them, the stack's users,
//! the kernel's log with names that apps choose, the files by which apps say that they run, records that another agent
//! or a failing disk left, what comes to the port of the metrics. `fuzz/` throws bytes
//! at them; nothing else uses this module.

use crate::engine::total_of;
use crate::host::{kmsg, network};
use crate::instances::droplets::stop::Stop;
use crate::instances::droplets::{FetchOptions, Owner, unpack, uri, yaml};
use crate::instances::instance::health::says_running;
use crate::instances::stable::left_of_evacuation;
use crate::instances::startup::environment::{AppEnv, build};
use crate::instances::startup::passwd;
use crate::instances::{crashes, output, record};
use crate::metrics::http;
use serde_json::{Map, Value};
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

/// Unpacks a droplet, a gzip-compressed tar, into an empty directory: at most `most` bytes, and 1000 entries.
///
/// # Errors
/// Why it is refused.
pub fn droplet(archive: File, home: &Path, most: u64) -> Result<(), String> {
    let options = FetchOptions {
        max_entries: 1000,
        max_unpacked_bytes: most,
        ..FetchOptions::default()
    };
    let owner = Owner { uid: 0, gid: 0 };
    unpack::unpack(archive, home, owner, &options, &Stop::default())
        .map_err(|error| error.to_string())
}

/// A droplet's URI as logs show it.
///
/// # Errors
/// Why it is refused.
pub fn droplet_uri(text: &str) -> Result<String, String> {
    let source = uri::parse(text).map_err(|error| error.to_string())?;
    Ok(source.shown)
}

/// The text under a key of a stager's YAML.
///
/// # Errors
/// Why it is not understood.
pub fn stager_text(document: &str, key: &str) -> Result<Option<String>, String> {
    yaml::text(document, key).map_err(|error| error.to_string())
}

/// Whether an app's state file says that it runs.
#[must_use]
pub fn state_file(bytes: &[u8]) -> bool {
    says_running(bytes)
}

/// The page that the head of an HTTP request asks for.
#[must_use]
pub fn page(head: &[u8]) -> Option<&'static str> {
    match http::asked(head).ok()? {
        http::Page::Metrics => Some("/metrics"),
        http::Page::Health => Some("/health"),
        http::Page::Healthz => Some("/healthz"),
        http::Page::Varz => Some("/varz"),
    }
}

/// The ids of a user in a passwd file.
#[must_use]
pub fn user(file: &[u8], name: &str) -> Option<(u32, u32)> {
    passwd::find(file, name).map(|owner| (owner.uid, owner.gid))
}

/// The environment of an app with these services and variables of its own.
///
/// # Errors
/// Which variable no process can be given.
pub fn environment(
    services: &[Value],
    user: &[(String, String)],
) -> Result<Vec<(String, String)>, String> {
    let app = AppEnv {
        vcap_application: &Map::new(),
        services,
        user,
        application_id: "app",
        instance_id: "0123456789abcdef0123456789abcdef",
        index: 0,
        memory_mb: 64,
        host_ip: Ipv4Addr::LOCALHOST,
        host_port: 61_001,
        container_port: 61_001,
        started_at: 0,
        trace: None,
    };
    build(&app).map_err(|error| error.to_string())
}

/// An instance's record, written again.
///
/// # Errors
/// Why it is not understood, and whether its container is.
pub fn record(bytes: &[u8]) -> Result<Vec<u8>, (String, bool)> {
    let understood = record::understand(bytes)
        .and_then(|record| serde_json::to_vec(&record).map_err(|error| error.to_string()));
    understood.map_err(|why| (why, record::legible(bytes).container.is_some()))
}

/// How far an instance's output was told, written again.
#[must_use]
pub fn told_output(text: &str) -> Option<String> {
    output::read_kept(text).map(|(cursor, view)| output::write_kept(cursor, &view))
}

/// A crash's record, written again.
#[must_use]
pub fn crash(bytes: &[u8]) -> Option<Vec<u8>> {
    crashes::written(crashes::understand(bytes)?).ok()
}

/// Where the pools of addresses and ports stand, written again.
#[must_use]
pub fn pools(text: &str) -> String {
    network::standing_again(text)
}

/// What is left at a time of the evacuation of a boot that may take `all`.
#[must_use]
pub fn evacuation(kept: &[u8], boot_id: &str, all: Duration, now: f64) -> Option<Duration> {
    left_of_evacuation(kept, boot_id, all, now).ok().flatten()
}

/// How many kills a line of the `oom` helper counts.
#[must_use]
pub fn oom_line(line: &str) -> Option<u64> {
    total_of(line)
}

/// Whether a record of the kernel's log tells of a kill.
#[must_use]
pub fn kernel_log(bytes: &[u8]) -> bool {
    kmsg::parse(bytes).is_some()
}
