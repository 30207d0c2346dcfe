//! Many instances at once: what they take, and how soon a new agent has them.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{Droplet, Host};

use crate::message;
use crate::peers::APP;
use crate::report::{figure, milliseconds, percentile, progress};

/// What belongs to one instance and is not its app.
const HELPERS: [&str; 5] = ["wshd", "wsh", "iomux-spawn", "iomux-link", "oom"];

/// Memory of the helpers and of the agent, and the adoption of 50 instances.
pub async fn figures(host: &mut Host, rounds: usize) {
    progress("50 instances: memory, adoption");
    let mut message = message(host, "fleet", &Droplet::shell(APP));
    message["limits"]["mem"] = json!(32);
    host.run(message).await;
    figure("agent_rss_1", "KiB", agent_rss(host), None, 1);
    scale(host, 10).await;
    let helpers = HELPERS.map(|name| pss(host, name));
    let each = helpers.map(|kibibytes| format!("{:.0}", kibibytes / 10.0));
    progress(&format!("PSS in KiB of {HELPERS:?}: {each:?}"));
    let all: f64 = helpers.iter().sum();
    figure("instance_helpers_pss", "KiB", all / 10.0, None, 10);
    scale(host, 50).await;
    figure("agent_rss_50", "KiB", agent_rss(host), None, 50);
    let (mut beats, mut hellos) = (vec![], vec![]);
    for _ in 0..rounds.div_ceil(7) {
        let (beat, hello) = adoption(host).await;
        beats.push(beat);
        hellos.push(hello);
    }
    for (metric, times) in [
        ("adoption_50_heartbeat_p50", beats),
        ("adoption_50_hello_p50", hellos),
    ] {
        let median = milliseconds(percentile(&times, 50));
        figure(metric, "ms", median, None, times.len());
    }
    host.stop("fleet").await;
}

/// Makes the app `fleet` have so many instances, which run when this returns.
pub async fn scale(host: &Host, instances: usize) {
    let message = json!({"droplet": "fleet", "instances": instances, "wait": "running"});
    let answer = host.request(&host.subject("scale"), &message).await;
    assert_eq!(answer["ok"], true, "{answer}\n{}", host.log());
}

/// From the start of an agent to its first heartbeat with 50 instances RUNNING, and to its hello: from
/// then on it can be commanded.
async fn adoption(host: &mut Host) -> (Duration, Duration) {
    host.kill9().await;
    // Only now: what the killed agent has said does not count.
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut hellos = host.watch("dea.start").await;
    let begin = Instant::now();
    host.spawn_agent();
    let full = |beat: &Value| {
        beat["droplets"].as_array().is_some_and(|all| {
            let running = all.iter().filter(|one| one["state"] == "RUNNING");
            running.count() == 50
        })
    };
    let beat = async {
        heartbeats.until("heartbeat with 50 RUNNING", full).await;
        begin.elapsed()
    };
    let hello = async {
        hellos.next().await;
        begin.elapsed()
    };
    tokio::join!(beat, hello)
}

fn agent_rss(host: &Host) -> f64 {
    kibibytes(host.agent().pid(), "Rss:")
}

/// Of all processes called `name`.
fn pss(host: &Host, name: &str) -> f64 {
    let tree = host.tree();
    let processes = tree.named(name);
    assert!(processes.len() >= 10, "10 of {name} in\n{tree}");
    processes
        .iter()
        .map(|process| kibibytes(process.pid, "Pss:"))
        .sum()
}

fn kibibytes(pid: i32, field: &str) -> f64 {
    let file = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
    let value = value.and_then(|value| value.trim().parse().ok());
    value.unwrap_or_else(|| panic!("{file} has no {field}"))
}
