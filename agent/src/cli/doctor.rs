//! `ostler doctor`: what this machine has and lacks.

use super::Outcome;
use crate::bus::AccessError;
use crate::config::{self, Config, Overrides};
use crate::daemon::{self, host_memory_mb};
use crate::engine;
use crate::host::network::{HostService, Transport};
use crate::host::probe::{self, Finding, Level, Wanted};
use std::path::Path;
use std::process::ExitCode;

/// Prints the report: one line for each finding, or JSON. The exit code is 1 if something is missing.
///
/// # Errors
/// Not root.
pub fn doctor(path: &Path, overrides: Overrides, json: bool) -> Outcome<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        return Err(
            "must be run as root, as the agent: what others may not do says nothing".into(),
        );
    }
    let (config, wrong) = match config::load(path, overrides.clone(), host_memory_mb()) {
        Ok(config) => (config, None),
        // Whoever has none yet wants to know what the machine is good for.
        Err(error) => (config::defaults(overrides, host_memory_mb())?, Some(error)),
    };
    let mut found: Vec<Finding> = wrong
        .map(|error| configuration(&error))
        .into_iter()
        .collect();
    found.extend(daemon::access(&config).err().map(|error| bus(&error)));
    found.extend(probe::all(&wanted(&config)));
    let missing = found.iter().any(|finding| finding.level == Level::Missing);
    if json {
        let report = serde_json::json!({ "ok": !missing, "findings": found });
        println!("{report}");
    } else {
        found
            .iter()
            .for_each(|finding| println!("{:<8} {finding}", word(finding.level)));
    }
    Ok(if missing {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn configuration(error: &config::ConfigError) -> Finding {
    Finding {
        name: "configuration".to_owned(),
        level: Level::Missing,
        meaning: format!("{error}; what follows is of the defaults"),
        advice: "Name a file with --config, or correct this one".to_owned(),
    }
}

fn bus(error: &AccessError) -> Finding {
    Finding {
        name: "bus".to_owned(),
        level: Level::Missing,
        meaning: format!("{error}: an agent with this environment would end at once"),
        advice: "Correct [nats] in the configuration, or NATS_* in the agent's environment (doctor sees that of its caller: `set -a; . /etc/ostler/ostler.env`)".to_owned(),
    }
}

/// What the agent refuses to start without. What is merely weaker is logged.
///
/// # Errors
/// What is missing, in the words of the report.
pub fn refuse_weaker(config: &Config) -> Outcome<()> {
    let found = probe::required(&wanted(config));
    let at = |level| found.iter().filter(move |finding| finding.level == level);
    for finding in at(Level::Warn) {
        tracing::warn!("{finding}");
    }
    let missing = at(Level::Missing);
    let lines: Vec<String> = missing.map(Finding::to_string).collect();
    if lines.is_empty() {
        return Ok(());
    }
    let lines = lines.join("\n  ");
    Err(format!("this host lacks what containers need (see `ostler doctor`):\n  {lines}").into())
}

fn wanted(config: &Config) -> Wanted<'_> {
    let stacks = config.stacks.iter();
    Wanted {
        base: &config.base,
        stacks: stacks.map(|(name, path)| (&**name, &**path)).collect(),
        cgroup_parent: &config.cgroup_parent,
        ports: config.network.ports.clone(),
        disk: config.instance.disk,
        cpu_cap: config.instance.max_cpu_percent,
        helpers: &config.helpers,
        resolv_conf: engine::resolv_conf(&config.network.dns),
        host_dns: allows_dns(&config.network),
    }
}

/// Whether containers may reach a name server on this host.
fn allows_dns(network: &config::Network) -> bool {
    let services = &network.host_allow;
    let dns = |service: &HostService| {
        service.protocol == Transport::Udp && (service.ports.0..=service.ports.1).contains(&53)
    };
    network.allow_host_access || services.iter().any(dns)
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Missing => "missing",
    }
}
