//! The numbers as Prometheus reads them: text format 0.0.4, names with base units.

use crate::instances::outlet::Mark;
use crate::instances::stable::Standing;
use messages::outgoing::Reason;
use messages::reply::ErrorCode;
use messages::service::Counts;
use messages::subjects::Incoming;
use nix::sys::resource::{UsageWho, getrusage};
use std::fmt::{Display, Write};
use std::time::Duration;

/// All that the page tells.
#[derive(Debug)]
pub(super) struct Numbers {
    /// `None`: the stable said nothing in time.
    pub(super) standing: Option<Standing>,
    /// Bytes of output that wait for the bus; `None`: not counted in time.
    pub(super) spooled: Option<u64>,
    /// For how long the disk has not answered.
    pub(super) late: Duration,
    /// Whether it refuses what is written to it.
    pub(super) refuses: bool,
    /// For how long the network has not been mended.
    pub(super) unmended: Duration,
    /// The connection as it is.
    pub(super) mark: Mark,
    /// Messages that came and were not read in time.
    pub(super) dropped: u64,
    /// Exits of refused starts that were not said.
    pub(super) left_out: u64,
    /// Instances that are no more.
    pub(super) exits: Vec<(Reason, u64)>,
    /// Processes that were killed for want of memory.
    pub(super) oom_kills: u64,
    /// Bytes of output that are missing.
    pub(super) missing: u64,
    /// Those of [`Incoming::answered`], in that order.
    pub(super) counts: Vec<Counts>,
    /// Requests that were refused.
    pub(super) refused: Vec<(ErrorCode, u64)>,
    /// When the agent began, in seconds since the epoch.
    pub(super) since: u64,
    /// What it uses itself.
    pub(super) process: Process,
}

/// What the agent's own process uses; what cannot be read is left out.
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) cpu_microseconds: Option<i64>,
    pub(super) resident_bytes: Option<u64>,
    open_files: Option<u64>,
}

impl Process {
    /// Reads `/proc`, which never waits for a disk.
    pub(super) fn read() -> Self {
        let usage = getrusage(UsageWho::RUSAGE_SELF).ok();
        let cpu = usage.map(|usage| usage.user_time() + usage.system_time());
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status.lines().find_map(|line| {
            let kilobytes = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            Some(kilobytes.parse::<u64>().ok()? << 10)
        });
        let files = std::fs::read_dir("/proc/self/fd");
        Self {
            cpu_microseconds: cpu.map(|cpu| cpu.tv_sec() * 1_000_000 + cpu.tv_usec()),
            resident_bytes: resident,
            // One of them is that directory.
            open_files: files
                .ok()
                .map(|files| (files.count() as u64).saturating_sub(1)),
        }
    }
}

/// How a number behaves.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Summary,
}

/// The whole page.
pub(super) fn page(numbers: &Numbers) -> String {
    let mut page = Text(String::new());
    page.family("ostler_build_info", Kind::Gauge, "The agent's version.");
    page.sample("ostler_build_info", &[("version", crate::VERSION)], 1);
    if let Some(standing) = &numbers.standing {
        host(&mut page, standing);
    }
    instances(&mut page, numbers);
    bus(&mut page, numbers);
    output(&mut page, numbers);
    page.gauge(
        "ostler_disk_late_seconds",
        numbers.late.as_secs(),
        "For how long the oldest write that is late has been under way; 0 if none is.",
    );
    page.gauge(
        "ostler_disk_refuses",
        u8::from(numbers.refuses),
        "Whether the disk refuses every write, as one that became read-only does; a full one mostly does not.",
    );
    page.gauge(
        "ostler_network_unmended_seconds",
        numbers.unmended.as_secs(),
        "For how long what others changed of the containers' network could not be put back; 0 if it could.",
    );
    requests(&mut page, &numbers.counts);
    let name = "ostler_refused_total";
    page.family(name, Kind::Counter, "Requests with an error, by its code.");
    for (code, count) in &numbers.refused {
        page.sample(name, &[("code", code.facts().0)], count);
    }
    process(&mut page, numbers);
    page.0
}

fn host(page: &mut Text, standing: &Standing) {
    let name = "ostler_instances";
    page.family(name, Kind::Gauge, "Instances on this host by their state.");
    for (state, count) in standing.states {
        page.sample(name, &[("state", state.name())], count);
    }
    page.gauge(
        "ostler_instances_unrecorded",
        standing.unrecorded,
        "Instances whose record could not be written, or not yet.",
    );
    page.gauge(
        "ostler_instances_stuck",
        standing.stuck,
        "Instances with processes that do not die.",
    );
    let (host, capacity) = (&standing.host, standing.capacity);
    let bytes = |megabytes: i64| megabytes.saturating_mul(1 << 20);
    let all = |megabytes: u64| bytes(i64::try_from(megabytes).unwrap_or(i64::MAX));
    for (name, value, help) in [
        (
            "ostler_memory_capacity_bytes",
            Some(all(capacity.memory)),
            "Memory that instances may reserve together.",
        ),
        (
            "ostler_memory_available_bytes",
            Some(bytes(host.available_memory)),
            "Memory that is not reserved; negative when overcommitted.",
        ),
        (
            "ostler_disk_capacity_bytes",
            Some(all(capacity.disk)),
            "Disk space that instances may reserve together.",
        ),
        (
            "ostler_disk_available_bytes",
            host.available_disk.map(bytes),
            "Disk space that is neither reserved nor used; negative when overcommitted.",
        ),
    ] {
        if let Some(value) = value {
            page.gauge(name, value, help);
        }
    }
}

fn instances(page: &mut Text, numbers: &Numbers) {
    let name = "ostler_exits_total";
    page.family(name, Kind::Counter, "Instances that ended, by the reason.");
    for (reason, count) in &numbers.exits {
        page.sample(name, &[("reason", reason.name())], count);
    }
    page.counter(
        "ostler_oom_kills_total",
        numbers.oom_kills,
        "Processes of instances that were killed for want of memory.",
    );
}

fn bus(page: &mut Text, numbers: &Numbers) {
    let mark = numbers.mark;
    page.gauge(
        "ostler_bus_connected",
        u8::from(mark.up()),
        "Whether there is a connection to the bus.",
    );
    for (name, value, help) in [
        (
            "ostler_bus_connects_total",
            mark.connects(),
            "Connections to the bus that were made.",
        ),
        (
            "ostler_bus_refused_messages_total",
            mark.refused(),
            "Messages of this host that the bus did not take: without permission, or too large.",
        ),
        (
            "ostler_bus_dropped_messages_total",
            numbers.dropped,
            "Messages to this host that were dropped, because it read too slowly or the bus took its answers too slowly; not those that a server dropped when it closed a slow connection.",
        ),
        (
            "ostler_bus_left_out_exits_total",
            numbers.left_out,
            "Exits of refused starts that were not said, because too many waited for the bus.",
        ),
    ] {
        page.counter(name, value, help);
    }
}

fn output(page: &mut Text, numbers: &Numbers) {
    if let Some(spooled) = numbers.spooled {
        page.gauge(
            "ostler_output_spooled_bytes",
            spooled,
            "Output on disk that the bus has not confirmed, with the headers of its records.",
        );
    }
    page.counter(
        "ostler_output_missing_bytes_total",
        numbers.missing,
        "Output that is missing: the bus was told so, or did not come back before it went.",
    );
}

fn requests(page: &mut Text, counts: &[Counts]) {
    let endpoints: Vec<String> = Incoming::answered().map(Incoming::name).collect();
    let each = || endpoints.iter().map(String::as_str).zip(counts);
    let name = "ostler_requests_total";
    page.family(name, Kind::Counter, "Requests that were answered.");
    for (endpoint, counts) in each() {
        let good = counts.num_requests.saturating_sub(counts.num_errors);
        for (result, value) in [("ok", good), ("error", counts.num_errors)] {
            page.sample(name, &[("endpoint", endpoint), ("result", result)], value);
        }
    }
    let name = "ostler_request_seconds";
    page.family(name, Kind::Summary, "From a request to its answer.");
    for (endpoint, counts) in each() {
        let labels = [("endpoint", endpoint)];
        let (whole, rest) = (counts.processing_time / NANO, counts.processing_time % NANO);
        page.sample(
            &format!("{name}_sum"),
            &labels,
            format_args!("{whole}.{rest:09}"),
        );
        page.sample(&format!("{name}_count"), &labels, counts.num_requests);
    }
}

/// Nanoseconds in a second.
const NANO: u64 = 1_000_000_000;

fn process(page: &mut Text, numbers: &Numbers) {
    let name = "process_start_time_seconds";
    page.family(name, Kind::Gauge, "When the agent began, since the epoch.");
    page.sample(name, &[], numbers.since);
    let process = &numbers.process;
    if let Some(cpu) = process.cpu_microseconds {
        let name = "process_cpu_seconds_total";
        page.family(name, Kind::Counter, "Processor time of the agent itself.");
        let (whole, rest) = (cpu / 1_000_000, cpu % 1_000_000);
        page.sample(name, &[], format_args!("{whole}.{rest:06}"));
    }
    for (name, value, help) in [
        (
            "process_resident_memory_bytes",
            process.resident_bytes,
            "Memory of the agent itself.",
        ),
        (
            "process_open_fds",
            process.open_files,
            "Open files of the agent itself.",
        ),
    ] {
        if let Some(value) = value {
            page.gauge(name, value, help);
        }
    }
}

/// The text as it grows. Every name, help and label value is one of this program's own: none needs escapes.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Summary => "summary",
        };
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// One of which there is one.
    fn gauge(&mut self, name: &str, value: impl Display, help: &str) {
        self.family(name, Kind::Gauge, help);
        self.sample(name, &[], value);
    }

    /// Likewise.
    fn counter(&mut self, name: &str, value: impl Display, help: &str) {
        self.family(name, Kind::Counter, help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let pairs: Vec<String> = { labels.iter() }
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        match pairs.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", pairs.join(","))),
        }
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{line}");
    }
}
