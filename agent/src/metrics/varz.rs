//! `/varz`, for collectors of DEA's time. Pure.

use super::page::Process;
use crate::instances::stable::{Registry, Standing};
use messages::outgoing::Component;
use serde::Serialize;

/// What every component of that time tells (vcap-common, `component.rb`), and what a DEA does (collector,
/// `handlers/dea.rb`). What the stable did not say in time is left out, and what
/// nobody knows.
#[derive(Debug, Serialize)]
pub(super) struct Varz {
    #[serde(flatten)]
    component: Option<Component>,
    num_cores: usize,
    /// The agent's memory in KB, as `ps -o rss=` tells it; null where it cannot be read.
    mem: Option<u64>,
    /// The agent's share of one processor since it began, in percent, as `ps -o pcpu=` tells it.
    cpu: Option<f64>,
    #[serde(flatten)]
    dea: Option<Dea>,
}

#[derive(Debug, Serialize)]
struct Dea {
    stacks: Vec<String>,
    /// 0: it stages nothing.
    can_stage: u8,
    reservable_stagers: u8,
    available_memory_ratio: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_disk_ratio: Option<f64>,
    instance_registry: Registry,
}

impl Varz {
    /// Of an agent that has run for so many seconds.
    pub(super) fn of(
        component: Option<Component>,
        stacks: Vec<String>,
        standing: Option<(Standing, Registry)>,
        process: &Process,
        seconds: u64,
    ) -> Self {
        let dea = standing.map(|(standing, instance_registry)| Dea {
            stacks,
            can_stage: 0,
            reservable_stagers: 0,
            available_memory_ratio: ratio(standing.host.available_memory, standing.capacity.memory),
            available_disk_ratio: { standing.host.available_disk }
                .map(|disk| ratio(disk, standing.capacity.disk)),
            instance_registry,
        });
        Self {
            component,
            num_cores: std::thread::available_parallelism().map_or(1, usize::from),
            mem: process.resident_bytes.map(|bytes| bytes >> 10),
            cpu: process.cpu_microseconds.map(|cpu| percent(cpu, seconds)),
            dea,
        }
    }

    /// Its JSON.
    pub(super) fn body(&self) -> String {
        // Plain structures always become JSON.
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "megabytes are far below 2^52, and this is a ratio"
)]
fn ratio(available: i64, capacity: u64) -> f64 {
    available as f64 / capacity.max(1) as f64
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a processor's microseconds of a century are below 2^52"
)]
fn percent(cpu_microseconds: i64, seconds: u64) -> f64 {
    cpu_microseconds as f64 / 10_000.0 / seconds.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::{percent, ratio};

    #[test]
    fn shares_are_of_what_there_is() {
        assert!((ratio(1024, 4096) - 0.25).abs() < 1e-9);
        assert!((ratio(-1024, 4096) + 0.25).abs() < 1e-9);
        assert!(ratio(0, 0).abs() < 1e-9);
        assert!((percent(3_000_000, 60) - 5.0).abs() < 1e-9);
        assert!(percent(0, 0).abs() < 1e-9);
    }
}
