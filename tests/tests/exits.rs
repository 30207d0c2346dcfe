//! Every way to end has its own words: `exit_status`, `signal`, `oom`, once per instance.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tests::{Droplet, Frozen, Host, Process, Tree, rounds, tool};

/// Runs `script` under the id `droplet` until it ends by itself; gives its only exit message.
async fn exit_of(host: &Host, droplet: &str, script: &str) -> Value {
    let mut exits = host.watch("droplet.exited").await;
    host.publish(
        &host.subject("start"),
        &host.message(droplet, &Droplet::shell(script)),
    )
    .await;
    let exit = exits
        .until("exit of it", |exit| exit["droplet"] == droplet)
        .await;
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    assert_eq!(exits.arrived(), Vec::<Value>::new(), "one exit for one end");
    exit
}

#[tokio::test]
async fn the_apps_own_end_comes_through() {
    let host = Host::start().await;
    for (droplet, script, status, signal) in [
        ("zero", "exit 0", 0, json!(null)),
        ("one", "exit 1", 1, json!(null)),
        ("all-ones", "exit 255", 255, json!(null)),
        ("term", "kill -TERM $$; sleep 60", 143, json!(15)),
        ("kill", "kill -KILL $$; sleep 60", 137, json!(9)),
        ("segv", "kill -SEGV $$; sleep 60", 139, json!(11)),
        (
            "perl",
            "exec perl -e 'kill ABRT => $$; sleep 60'",
            134,
            json!(6),
        ),
    ] {
        let exit = exit_of(&host, droplet, script).await;
        assert_eq!(exit["reason"], "CRASHED", "{exit}");
        assert_eq!(exit["exit_status"], status, "{exit}");
        assert_eq!(exit["signal"], signal, "{exit}");
        assert_ne!(exit["oom"], true, "{exit}");
        assert_eq!(exit["exit_description"], "app instance exited", "{exit}");
        assert_eq!(exit["cc_partition"], "default");
        assert_eq!(exit["version"], Host::fixture("dea.start")["version"]);
        assert_eq!(exit["index"], 0);
        assert_eq!(exit["instance"].as_str().unwrap().len(), 32);
        assert!(exit["crash_timestamp"].is_u64());
    }
    // A crash stands in heartbeats and is found.
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let beat = heartbeats.next().await;
    let states: Vec<&Value> = beat["droplets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["state"])
        .collect();
    assert_eq!(states, vec!["CRASHED"; 7]);
}

#[tokio::test]
async fn running_out_of_memory_is_told_before_the_exit() {
    let host = Host::start().await;
    // One subscription for both: the order is the bus's.
    let mut events = host.watch("droplet.*").await;
    let mut message = host.message("hog", &Droplet::sample("hog"));
    message["limits"]["mem"] = json!(48);
    // It may be gone before it is known to run.
    let answer = host.request(&host.subject("start"), &message).await;
    let instance = answer["instance"].clone();
    let oom = events.next().await;
    assert_eq!(oom["instance"], instance, "{oom}");
    assert_eq!(oom["victim"]["comm"], "hog", "{oom}");
    assert!(oom["victim"]["pid"].is_i64());
    assert_eq!(oom["limit_bytes"], 50_331_648);
    assert!(
        oom["usage_bytes"].is_u64()
            && oom["peak_bytes"]
                .as_u64()
                .is_some_and(|peak| peak > 40 << 20)
    );
    assert_eq!(oom["level"], "instance");
    assert_eq!(oom["survived"], false);
    assert_eq!(oom["dea"], host.id);
    assert_eq!(oom["handle"].as_str().unwrap().len(), 11);
    let exit = events.next().await;
    assert_eq!(exit["instance"], instance, "{exit}");
    assert_eq!(exit["reason"], "CRASHED");
    assert_eq!(exit["exit_description"], "out of memory");
    assert_eq!(exit["oom"], true, "{exit}");
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    assert_eq!(events.arrived(), Vec::<Value>::new());
}

#[tokio::test]
async fn an_end_while_the_agent_is_down_is_told_afterwards() {
    let mut host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let droplet = Droplet::shell("exec perl -e '$0 = \"theapp\"; sleep 1000'");
    let answer = host.run(host.message("app", &droplet)).await;
    let tree = host
        .tree_until("app", |tree| !tree.named("theapp").is_empty())
        .await;
    host.kill9().await;
    tree.one("theapp").signal(Signal::SIGSEGV);
    host.tree_until("end of the app", |tree| tree.named("theapp").is_empty())
        .await;
    host.start_agent().await;
    let exit = exits.next().await;
    assert_eq!(
        (&exit["exit_status"], &exit["signal"]),
        (&json!(139), &json!(11)),
        "{exit}"
    );
    assert_eq!(exit["exit_description"], "app instance exited");
    host.confirmed(answer["handle"].as_str().unwrap()).await;
    host.restart().await;
    let mut beats = host.watch("dea.heartbeat").await;
    for _ in 0..3 {
        beats.next().await;
    }
    assert_eq!(
        exits.arrived(),
        Vec::<Value>::new(),
        "a restart announces no old crash"
    );
}

#[tokio::test]
async fn what_was_printed_before_a_death_that_no_agent_saw_arrives() {
    let mut host = Host::start().await;
    let mut output = host.output("app").await;
    let mut exits = host.watch("droplet.exited").await;
    let script = "trap 'head -c 300000 /dev/zero | tr \"\\0\" x; echo done' USR1\necho up\nwhile :; do sleep 0.05; done";
    host.run(host.message("app", &Droplet::shell(script))).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    let tree = host.tree();
    let job = tree.one("iomux-spawn").argv[1].clone();
    let shell = tree
        .0
        .iter()
        .find(|process| process.title() == "bash main.sh");
    host.kill9().await;
    shell.expect("the app").signal(Signal::SIGUSR1);
    let spooled = || {
        let entries = std::fs::read_dir(&job).unwrap().map(|entry| entry.unwrap());
        let spool =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("spool"));
        spool
            .map(|entry| entry.metadata().unwrap().len())
            .sum::<u64>()
    };
    host.tree_until("all of it on the disk", |_| spooled() > 300_000 + 8)
        .await;
    tree.one("wshd").signal(Signal::SIGKILL);
    host.tree_until("dead container", |tree| tree.named("wshd").is_empty())
        .await;
    host.start_agent().await;
    let exit = exits.next().await;
    assert_eq!(exit["exit_description"], "its init died", "{exit}");
    assert_eq!(exit["output"]["stdout"], 300_000 + 8, "{exit}");
    output
        .until("all of it", |output| {
            output.stream(0, "stdout").next >= 300_008
        })
        .await;
    let stream = output.stream(0, "stdout");
    assert_eq!(
        (stream.next, stream.dropped, stream.holes.len()),
        (300_008, 0, 0)
    );
}

#[tokio::test]
async fn an_end_that_can_be_recorded_nowhere_is_told_all_the_same() {
    let host = Host::start().await;
    let mut output = host.output("app").await;
    let mut exits = host.watch("droplet.exited").await;
    let script = "trap 'exit 3' USR1; echo up; while :; do sleep 0.05; done";
    let answer = host.run(host.message("app", &Droplet::shell(script))).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    let tree = host.tree();
    let supervisor = tree.one("iomux-spawn");
    // As on a disk that takes nothing any more: nobody can take its place.
    let lock = std::path::Path::new(&supervisor.argv[1]).join("lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    supervisor.signal(Signal::SIGKILL);
    let shell = { tree.0.iter() }.find(|process| process.title() == "bash main.sh");
    shell.expect("the app").signal(Signal::SIGUSR1);
    let exit = exits.next().await;
    assert_eq!(exit["instance"], answer["instance"]);
    assert_eq!(
        (&exit["reason"], &exit["exit_status"]),
        (&json!("CRASHED"), &json!(3))
    );
}

#[tokio::test]
async fn a_reboot_is_told_as_one() {
    let mut host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let instance = host
        .run(host.message("app", &Droplet::sample("sleeper")))
        .await["instance"]
        .clone();
    host.kill9().await;
    host.boot().await;
    let exit = exits.next().await;
    assert_eq!(exit["instance"], instance);
    assert_eq!(exit["reason"], "CRASHED");
    assert_eq!(exit["exit_description"], "host rebooted");
}

#[tokio::test]
async fn a_container_killed_from_outside_is_a_crash() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    host.tree().one("wshd").signal(Signal::SIGKILL);
    let exit = exits.next().await;
    assert_eq!(exit["reason"], "CRASHED");
    assert!(
        !exit["exit_description"].as_str().unwrap().is_empty(),
        "{exit}"
    );
    host.tree_until("empty machine", |tree| tree.named("iomux-spawn").is_empty())
        .await;
}

#[tokio::test]
async fn a_background_child_delays_no_exit() {
    let host = Host::start().await;
    let start = Instant::now();
    let exit = exit_of(&host, "parent", "sleep 1000 & echo early; exit 4").await;
    assert_eq!(exit["exit_status"], 4);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn a_stop_is_no_crash_however_it_ends() {
    let host = Host::with(tests::Setup {
        config: &[("[network]", "[instance]\nstop_grace = 1\n[network]")],
        ..Default::default()
    })
    .await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut exits = host.watch("droplet.exited").await;
    for (droplet, script) in [
        ("willing", "trap 'exit 3' TERM; while :; do sleep 0.1; done"),
        ("deaf", "trap '' TERM; while :; do sleep 0.1; done"),
    ] {
        host.run(host.message(droplet, &Droplet::shell(script)))
            .await;
        host.stop(droplet).await;
        host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
            .await;
    }
    heartbeats
        .until("empty one", |beat| beat["droplets"] == json!([]))
        .await;
    for exit in exits.arrived() {
        assert_eq!(exit["reason"], "STOPPED", "{exit}");
    }
}

#[tokio::test]
async fn a_stopped_app_is_dead_also_if_it_was_frozen() {
    let host = Host::with(tests::Setup {
        config: &[("[network]", "[instance]\nstop_grace = 1\n[network]")],
        ..Default::default()
    })
    .await;
    let answer = host
        .run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let group = host.group("freezer", answer["handle"].as_str().unwrap());
    let (file, frozen) = if tests::is_cgroup_v2() {
        ("cgroup.freeze", "1")
    } else {
        ("freezer.state", "FROZEN")
    };
    std::fs::write(group.join(file), frozen).unwrap();
    host.stop("app").await;
    assert_eq!(host.tree().named("wshd"), Vec::<&tests::Process>::new());
}

/// The letter of a process's state (proc(5)).
fn state(process: &Process) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// An instance that has a process which no signal ends; its container, that process, and what holds it.
async fn stuck() -> (Host, String, Process, Frozen) {
    let instance = "[instance]\ndisk = \"image\"\nstop_grace = 1\n[network]";
    let host = Host::with(tests::Setup {
        config: &[("[network]", instance)],
        ..Default::default()
    })
    .await;
    let script = "exec perl -e '$0 = \"writer\"; open my $f, \">\", \"x\"; \
                  while (1) { syswrite $f, \"x\"; seek $f, 0, 0; select undef, undef, undef, 0.01 }'";
    let answer = host
        .run(host.message("stuck", &Droplet::shell(script)))
        .await;
    let handle = answer["handle"].as_str().unwrap().to_owned();
    let has_begun = |tree: &Tree| tree.named("writer").len() == 1;
    let writer = host.tree_until("writer", has_begun).await;
    let writer = writer.one("writer").clone();
    let frozen = Frozen::image(&host, &handle);
    host.tree_until("writer that waits", |_| state(&writer) == Some('D'))
        .await;
    (host, handle, writer, frozen)
}

#[tokio::test]
async fn what_waits_in_the_kernel_is_told_to_be_stuck_and_holds_nobody_up() {
    let (mut host, _, writer, frozen) = stuck().await;
    let mut exits = host.watch("droplet.exited").await;
    // Who waits for the end hears in time that there is none.
    let stop = json!({"droplet": "stuck", "wait": "stopped"});
    let answer = host.request(&host.subject("stop"), &stop).await;
    let error = &answer["error"];
    assert_eq!(
        (&error["code"], &error["retryable"]),
        (&json!("stuck"), &json!(true)),
        "{answer}"
    );
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(&writer.pid.to_string()), "{message}");
    host.logged(0, "do not die").await;
    // Others come and go meanwhile, under this agent and the next.
    let mut beats = host.watch("dea.heartbeat").await;
    for app in ["one", "two"] {
        host.run(host.message(app, &Droplet::sample("sleeper")))
            .await;
        host.stop(app).await;
        beats.next().await;
        let find = json!({"droplet": "stuck"});
        let found = host.request("dea.find.droplet", &find).await;
        assert_eq!(found["state"], "STOPPING", "{found}");
        if app == "one" {
            host.restart().await;
        }
    }
    // Asked again, it is as before.
    let answer = host.request(&host.subject("stop"), &stop).await;
    assert_eq!(answer["error"]["code"], "stuck", "{answer}");
    let told = exits.arrived();
    assert!(told.iter().all(|exit| exit["droplet"] != "stuck"));
    // It ends by itself as soon as it can.
    drop(frozen);
    let exit = exits
        .until("its exit", |exit| exit["droplet"] == "stuck")
        .await;
    assert_eq!(exit["reason"], "STOPPED", "{exit}");
    host.stop("stuck").await;
}

#[tokio::test]
async fn a_shutdown_waits_for_nothing_that_is_stuck_and_the_next_agent_removes_it() {
    let (mut host, handle, writer, frozen) = stuck().await;
    host.end(Signal::SIGTERM).await;
    // What it may still use is not pulled away.
    assert!(writer.lives() && host.base.join("containers").join(&handle).exists());
    host.start_agent().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    host.stop("app").await;
    // The next one has tried it in vain as well.
    let tries = |_: &Tree| host.log().matches("something was not removed").count() >= 2;
    host.tree_until("second try", tries).await;
    drop(frozen);
    removed(&host, &handle).await;
    assert!(!writer.lives());
}

/// Waits until nothing of a container is on the disk.
async fn removed(host: &Host, handle: &str) {
    let left = |_: &Tree| {
        ["containers", "instances"]
            .iter()
            .all(|place| !host.base.join(place).join(handle).exists())
    };
    host.tree_until("place without the container", left).await;
}

#[tokio::test]
async fn a_container_that_cannot_be_removed_is_tried_again_also_by_the_next_agent() {
    let mut host = Host::start().await;
    for restarted in [false, true] {
        let app = format!("app-{restarted}");
        let answer = host
            .run(host.message(&app, &Droplet::sample("sleeper")))
            .await;
        let handle = answer["handle"].as_str().unwrap();
        // Where something is mounted, nothing is moved.
        let place = host.base.join("containers").join(handle);
        let place = place.display().to_string();
        tool("mount", &["--bind", &place, &place]);
        // Its processes are dead, and that is what is asked for.
        host.stop(&app).await;
        let tried = |_: &Tree| host.log().contains("a container is not removed yet");
        host.tree_until("failure", tried).await;
        if restarted {
            host.restart().await;
        }
        assert!(host.base.join("instances").join(handle).exists());
        // Somebody may be looking.
        tool("umount", &["--lazy", &place]);
        removed(&host, handle).await;
    }
}

#[tokio::test]
async fn each_app_has_its_own_grace() {
    let host = Host::with(tests::Setup {
        config: &[("[network]", "[instance]\nstop_grace = 12\n[network]")],
        ..Default::default()
    })
    .await;
    // What is ignored stays so in a program.
    let script = "trap '' TERM; exec sleep 1000";
    for (own, least, most) in [(json!(1), 1, 12), (json!(null), 12, 120), (json!(0), 0, 12)] {
        let mut message = host.message("app", &Droplet::shell(script));
        message["stop_grace"] = own;
        host.run(message).await;
        let begun = |tree: &Tree| tree.named("sleep").len() == 1;
        host.tree_until("app", begun).await;
        let began = Instant::now();
        host.stop("app").await;
        let took = began.elapsed();
        let expected = Duration::from_secs(least)..Duration::from_secs(most);
        assert!(expected.contains(&took), "{took:?}");
    }
}

#[tokio::test]
async fn term_reaches_each_process_of_a_job_once() {
    let host = Host::start().await;
    let mut output = host.output("family").await;
    let child = r#"perl -e '$| = 1; $SIG{TERM} = sub { print "term '$name'\n" }; print "up\n"; sleep 1 while 1'"#;
    let script = format!(
        "for name in a b; do {} & done; trap 'sleep 3; exit 0' TERM; while :; do wait; done",
        child.replace("'$name'", "'\"$name\"'")
    );
    host.run(host.message("family", &Droplet::shell(&script)))
        .await;
    output
        .until("both", |output| {
            output.text(0, "stdout").matches("up\n").count() == 2
        })
        .await;
    host.stop("family").await;
    output
        .until("both told", |output| {
            output.text(0, "stdout").matches("term ").count() >= 2
        })
        .await;
    let text = output.text(0, "stdout");
    assert_eq!(
        (
            text.matches("term a\n").count(),
            text.matches("term b\n").count()
        ),
        (1, 1),
        "{text}"
    );
}

#[tokio::test]
async fn the_last_bytes_before_an_end_all_arrive() {
    let host = Host::start().await;
    for round in 0..rounds() {
        for readers in [0, 1, 3] {
            let droplet = format!("last-{round}-{readers}");
            let mut output = host.output(&droplet).await;
            let mut exits = host.watch("droplet.exited").await;
            let script = "trap 'head -c 1048576 /dev/zero | tr \"\\0\" x; echo; exit 3' USR1\necho up\nwhile :; do sleep 0.05; done";
            host.run(host.message(&droplet, &Droplet::shell(script)))
                .await;
            output
                .until("first line", |output| output.text(0, "stdout") == "up\n")
                .await;

            let tree = host.tree();
            let job = tree.one("iomux-spawn").argv[1].clone();
            let link =
                std::path::Path::new(&tree.one("iomux-spawn").argv[2]).with_file_name("iomux-link");
            let log = host.base.join("reader.log");
            let readers: Vec<_> = (0..readers)
                .map(|_| tests::Running::start(&link, &[&job], &log))
                .collect();
            if let [stopped, _, _] = readers.as_slice() {
                stopped.signal(Signal::SIGSTOP);
            }
            tree.0
                .iter()
                .find(|process| process.title() == "bash main.sh")
                .expect("the app")
                .signal(Signal::SIGUSR1);
            let exit = exits
                .until("exit of it", |exit| exit["droplet"] == *droplet)
                .await;
            assert_eq!(exit["exit_status"], 3, "{exit}");
            output
                .until("all of it", |output| {
                    output.stream(0, "stdout").next >= 3 + 1_048_577
                })
                .await;
            let stream = output.stream(0, "stdout");
            assert_eq!(
                (stream.next, stream.dropped, stream.holes.len()),
                (3 + 1_048_577, 0, 0)
            );
            for reader in readers {
                reader.end();
            }
            let _ = std::fs::remove_file(log);
            host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
                .await;
        }
    }
}
