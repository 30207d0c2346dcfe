//! Many containers in a row: whatever one of them leaves behind is there many times.

use super::world::{World, create, deadline, fresh_handle, processes, run, shell, world_within};
use crate::engine::Engine;
use std::collections::BTreeMap;
use std::fs;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

/// How many at a time.
const AT_ONCE: usize = 5;

/// How long nothing may change before it counts as settled, and how long that may take: the kernel takes
/// groups and namespaces away in batches, also those of earlier tests.
const STILL: Duration = Duration::from_secs(3);
const SETTLING: Duration = Duration::from_secs(120);

/// Memory groups that others of the machine may have made meanwhile. Ours are all gone seconds after the last
/// round, also after a thousand containers, so that there is nothing to allow for each of them.
const STRANGERS: usize = 40;

#[test]
fn a_hundred_containers_leave_every_count_as_it_was() {
    let rounds = std::env::var("OSTLER_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    world_within(deadline() * (rounds / 5 + 4), move |world| async move {
        let mut config = world.config();
        // Fewer than will be asked for: each must come back.
        config.network.ports = 61_001..=61_010;
        config.network.port_quarantine = Duration::ZERO;
        let engine = Engine::open(config).await.unwrap();
        // Longer than all of this: a connection is forgotten with the container, or never.
        fs::write("/proc/sys/net/netfilter/nf_conntrack_udp_timeout", "100000").unwrap();
        // The first ones open what stays open, and charge what is shared to their groups.
        for _ in 0..3 {
            batch(&world, &engine).await;
        }
        settled(&world, &engine, &BTreeMap::new()).await;
        let (before, memory) = (counts(&world, &engine).await, memory_groups());
        for _ in 0..rounds {
            batch(&world, &engine).await;
        }
        settled(&world, &engine, &before).await;
        let most = memory + STRANGERS;
        let began = Instant::now();
        while memory_groups() > most {
            let now = memory_groups();
            assert!(
                began.elapsed() < SETTLING,
                "{now} memory groups, {memory} before"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        engine.close().await;
    });
}

/// Makes some containers with a job and a port each, and takes them away.
async fn batch(world: &World, engine: &Engine) {
    let lives = (0..AT_ONCE).map(|_| async {
        let container = create(engine, world.spec(&fresh_handle())).await.unwrap();
        container.map_port(None, None).await.unwrap();
        let script =
            "echo x > /tmp/x; dd if=/dev/zero of=/dev/shm/x bs=64k count=4 2>/dev/null; sleep 1000";
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        let (socket, address) = (
            UdpSocket::bind("0.0.0.0:0"),
            container.saved().lease.container,
        );
        socket.unwrap().send_to(b"x", (address, 9)).unwrap();
        container.destroy().await.unwrap();
        container.destroy().await.expect("once more is fine");
    });
    futures_util::future::join_all(lives).await;
}

/// Waits until every count is what it was (or, without any before, does not change any more): the kernel
/// takes links and groups away in its own time.
async fn settled(world: &World, engine: &Engine, before: &BTreeMap<&'static str, usize>) {
    let began = Instant::now();
    let (mut last, mut since) = (counts(world, engine).await, began);
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = counts(world, engine).await;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        let settled = if before.is_empty() {
            since.elapsed() >= STILL
        } else {
            last == *before
        };
        if settled {
            return;
        }
        assert!(
            began.elapsed() < SETTLING,
            "before {before:?}, now {last:?}"
        );
    }
}

/// v2: groups without a directory that something still holds, `nr_dying_descendants`.
fn dying(parent: &str) -> usize {
    let stats = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|mount| {
        fs::read_to_string(format!("{mount}/{parent}/cgroup.stat")).unwrap_or_default()
    });
    let number = |line: &str| {
        line.strip_prefix("nr_dying_descendants ")?
            .parse::<usize>()
            .ok()
    };
    stats
        .iter()
        .flat_map(|stat| stat.lines())
        .filter_map(number)
        .sum()
}

/// Memory groups of the whole machine, dying ones included (`/proc/cgroups`); v1 tells no other number.
fn memory_groups() -> usize {
    let all = fs::read_to_string("/proc/cgroups").unwrap_or_default();
    let line = all.lines().find(|line| line.starts_with("memory"));
    line.map_or(0, |line| {
        line.split_whitespace().nth(2).unwrap().parse().unwrap()
    })
}

async fn counts(world: &World, engine: &Engine) -> BTreeMap<&'static str, usize> {
    let home = world.base.parent().unwrap().display().to_string();
    let lines = |text: String, what: &str| text.lines().filter(|line| line.contains(what)).count();
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let entries = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
    let loops = fs::read_dir("/sys/block").unwrap().flatten();
    let backing = loops.map(|device| fs::read_to_string(device.path().join("loop/backing_file")));
    let shared = &engine.shared;
    let (depot, groups) = (shared.depot.clone(), shared.cgroups.clone());
    BTreeMap::from([
        ("mounts", lines(file("/proc/self/mountinfo"), &home)),
        ("control groups", groups.list().unwrap().len()),
        ("groups that are dying (v2)", dying(&world.parent)),
        ("links", lines(file("/proc/thread-self/net/dev"), ":")),
        (
            "rules and elements",
            run(&["nft", "list", "ruleset"]).split([',', '\n']).count(),
        ),
        (
            "connections",
            file("/proc/sys/net/netfilter/nf_conntrack_count")
                .trim()
                .parse()
                .unwrap(),
        ),
        (
            "loop devices",
            backing
                .flatten()
                .filter(|file| file.contains(&home))
                .count(),
        ),
        ("ranges of ids", depot.ranges_taken()),
        ("descriptors", entries("/proc/self/fd")),
        (
            "processes",
            processes(&home).len()
                + processes("wshd: ")
                    .iter()
                    .filter(|(_, title)| title.contains(&world.handle))
                    .count(),
        ),
        ("directories", entries(&format!("{home}/base/containers"))),
        ("trash", entries(&format!("{home}/base/trash"))),
    ])
}
