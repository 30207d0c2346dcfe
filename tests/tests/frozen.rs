//! A disk that hangs without an error: whoever writes to it waits in the kernel. Whatever can be done without it is done
//! and answered, and what it must know is said once it does.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tests::{Droplet, Frozen, Host, Output, Process, Setup, Tree, patience, tool};

/// A host whose base directory can be frozen.
async fn host() -> Host {
    host_with("").await
}

/// The same, with more in its configuration.
async fn host_with(more: &str) -> Host {
    let config = format!("[instance]\nstop_grace = 5\n{more}[network]");
    Host::with(Setup {
        config: &[("[network]", &config)],
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await
}

/// Whether a heartbeat has this app in this state; `None`: whether it does not have it.
fn tells(beat: &Value, droplet: &str, state: Option<&str>) -> bool {
    let entries = beat["droplets"].as_array().unwrap();
    let of_it = entries.iter().find(|entry| entry["droplet"] == droplet);
    of_it.map(|entry| entry["state"].as_str().unwrap()) == state
}

/// An answer that owns to what is not on disk.
fn is_unrecorded(answer: &Value) -> bool {
    let error = &answer["error"];
    let words = error["message"].as_str().unwrap_or_default();
    error["code"] == "internal"
        && error["retryable"] == true
        && words.contains("could not be recorded: the disk of the base directory does not answer")
}

/// What is kept of all instances.
fn records(host: &Host) -> Vec<Value> {
    let instances = std::fs::read_dir(host.base.join("instances")).unwrap();
    // One may be going.
    let read = instances.filter_map(|entry| {
        let bytes = std::fs::read(entry.unwrap().path().join("record.json")).ok()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    });
    read.collect()
}

/// Nothing is kept of any instance.
async fn no_records(host: &Host) {
    let instances = host.base.join("instances");
    let empty = |_: &Tree| std::fs::read_dir(&instances).unwrap().next().is_none();
    host.tree_until("no record", empty).await;
}

#[tokio::test]
async fn stops_are_done_and_answered_and_their_exits_said_once_they_are_recorded() {
    // Any text is a hook: these are not begun.
    let hook = "/etc/debian_version";
    let hooks = format!("[hooks]\nbefore_stop = \"{hook}\"\nafter_stop = \"{hook}\"\n");
    let mut host = host_with(&hooks).await;
    host.run(host.message("one", &Droplet::sample("sleeper")))
        .await;
    let own = Droplet::shell("trap 'exit 7' TERM; while :; do sleep 0.1; done");
    host.run(host.message("two", &own)).await;
    let mut exits = host.watch("droplet.exited").await;
    let mut beats = host.watch("dea.heartbeat").await;
    let frozen = Frozen::base(&host);
    let waits = json!({"droplet": "two", "wait": "stopped", "request_id": "two"});
    let nobody = json!({"droplet": "nobody", "request_id": "nobody"});
    let asked = [
        ("dea.stop", json!({"droplet": "one"})),
        ("dea.stop", waits),
        ("dea.stop", nobody),
    ];
    let answers = host.burst(&asked).await;
    assert!(is_unrecorded(&answers[0]), "{answers:?}");
    assert!(is_unrecorded(&answers[1]), "{answers:?}");
    assert_eq!(answers[2]["matched"], 0, "{answers:?}");
    host.tree_until("no container", |tree| tree.named("wshd").is_empty())
        .await;
    let gone = |beat: &Value| tells(beat, "one", None) && tells(beat, "two", None);
    beats.until("neither", gone).await;
    let left_out = "a hook is left out";
    let log = host.log();
    let mut hooks = log.lines().filter(|line| line.contains(left_out));
    assert!(
        hooks.all(|line| line.contains("the disk of the base directory does not answer")),
        "{log}"
    );
    assert!(log.contains(left_out), "{log}");
    // An agent that died now would know of none of it.
    assert_eq!(exits.arrived(), Vec::<Value>::new());
    drop(frozen);
    for _ in 0..2 {
        let exit = exits.next().await;
        assert_eq!(exit["reason"], "STOPPED", "{exit}");
        let own = exit["exit_status"] == 7;
        assert_eq!(own, exit["droplet"] == "two", "{exit}");
    }
    no_records(&host).await;
    host.restart().await;
    beats.arrived();
    beats.next().await;
    assert_eq!(exits.arrived(), Vec::<Value>::new(), "each is said once");
}

#[tokio::test]
async fn what_would_have_to_be_recorded_is_answered_and_everything_else_goes_on() {
    let host = host().await;
    let sleeper = Droplet::sample("sleeper");
    host.run(host.message("old", &sleeper)).await;
    let large = host.message("large", &app("large", "1", "1"));
    let large = host.run(large).await;
    let has_begun = |tree: &Tree| tree.named("large").len() == 1;
    let tree = host.tree_until("large", has_begun).await;
    let before = left_to(tree.one("large"));
    let mut exits = host.watch("droplet.exited").await;
    let mut beats = host.watch("dea.heartbeat").await;
    let mut adverts = host.watch("dea.advertise").await;
    let frozen = Frozen::base(&host);
    let start = host.message("new", &sleeper);
    let update = json!({"droplet": "old", "uris": [], "version": "v2"});
    let scale = json!({"droplet": "old", "instances": 1, "limits": {"fds": 500}});
    let enlarge = json!({"droplet": "large", "instances": 1, "limits": {"disk": 320}});
    let (started, scaled) = (host.subject("start"), host.subject("scale"));
    let asked = [
        ("dea.update", update),
        (&*scaled, scale),
        (&*started, start.clone()),
        (&*scaled, enlarge.clone()),
        ("dea.find.droplet", json!({"droplet": "new"})),
    ];
    let answers = host.burst(&asked).await;
    // It was here, and could be asked.
    assert_eq!(answers[4]["state"], "BORN", "{answers:?}");
    for answer in &answers[..3] {
        assert!(is_unrecorded(answer), "{answers:?}");
    }
    let words = |answer: &Value| answer["error"]["message"].as_str().unwrap().to_owned();
    assert!(words(&answers[0]).starts_with("done"), "{answers:?}");
    assert!(words(&answers[2]).starts_with("the start"), "{answers:?}");
    assert_eq!(
        answers[3]["refused"],
        json!([large["handle"]]),
        "{answers:?}"
    );
    let refused = exits.next().await;
    assert_eq!(
        (&refused["droplet"], &refused["exit_status"]),
        (&json!("new"), &json!(-1))
    );
    beats.arrived();
    adverts.arrived();
    for _ in 0..3 {
        let beat = beats.next().await;
        assert!(tells(&beat, "old", Some("RUNNING")), "{beat}");
        adverts.next().await;
    }
    // Nobody is to place here what would be refused, and why it would be is known, too.
    let full = |advert: &Value| advert["available_memory"] == 0;
    adverts.until("no place", full).await;
    let mut too_large = start.clone();
    too_large["limits"]["disk"] = json!(8192);
    let answer = host.request(&started, &too_large).await;
    assert_eq!(answer["error"]["code"], "not_enough_disk", "{answer}");
    drop(frozen);
    adverts.until("places", |advert| !full(advert)).await;
    // Nothing of the refused start is left to come back.
    let found = host
        .request("dea.find.droplet", &json!({"droplet": "old"}))
        .await;
    assert_eq!(found["version"], "v2", "{found}");
    host.run(start).await;
    // The change that was refused is taken back, and can be had.
    let back = |tree: &Tree| left_to(tree.one("large")).abs_diff(before) < 1 << 20;
    host.tree_until("its old limit", back).await;
    let end = Instant::now() + patience();
    while host
        .request(&scaled, &enlarge)
        .await
        .get("refused")
        .is_some()
    {
        assert!(Instant::now() < end, "it is refused still");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for app in ["new", "old", "large"] {
        host.stop(app).await;
    }
    no_records(&host).await;
}

/// Bytes that a process may still write to its disk.
fn left_to(process: &Process) -> u64 {
    let root = format!("/proc/{}/root", process.pid);
    let numbers = tool("stat", &["--file-system", "--format=%a %S", &root]);
    let numbers: Vec<u64> = numbers
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    numbers[0] * numbers[1]
}

/// Tells `app`'s process to do what it does on USR1; that process.
async fn poke(host: &Host, app: &str) -> Process {
    let tree = host
        .tree_until(app, |tree| tree.named(app).len() == 1)
        .await;
    tree.one(app).signal(Signal::SIGUSR1);
    tree.one(app).clone()
}

/// An app that is called `name`, does `then` on USR1, and `meanwhile` again and again.
fn app(name: &str, then: &str, meanwhile: &str) -> Droplet {
    Droplet::shell(&format!(
        "exec perl -e '$SIG{{USR1}} = sub {{ {then} }}; $0 = \"{name}\"; $| = 1; print \"ready\\n\"; \
         while (1) {{ {meanwhile}; select undef, undef, undef, 0.05 }}'"
    ))
}

#[tokio::test]
async fn apps_that_end_are_crashes_soon_and_their_ends_said_once_with_their_own_status() {
    let host = host().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut beats = host.watch("dea.heartbeat").await;
    // Of one that prints nothing, nobody would notice that the disk hangs who does not look.
    for (name, then, meanwhile, status) in [
        ("silent", "exit 3", "1", 3),
        ("chatty", "print \"bye\\n\"; exit 4", "print \"on\\n\"", 4),
    ] {
        let mut output = host.output(name).await;
        let message = host.message(name, &app(name, then, meanwhile));
        let answer = host.run(message).await;
        host.confirmed(answer["handle"].as_str().unwrap()).await;
        let speaks = |output: &Output| output.text(0, "stdout").contains("ready");
        output.until("a word", speaks).await;
        let frozen = Frozen::base(&host);
        poke(&host, name).await;
        let crashed = |beat: &Value| tells(beat, name, Some("CRASHED"));
        beats.until("a crash", crashed).await;
        assert_eq!(exits.arrived(), Vec::<Value>::new());
        drop(frozen);
        let exit = exits.next().await;
        assert_eq!(exit["reason"], "CRASHED", "{exit}");
        assert_eq!(exit["exit_status"], status, "{exit}");
        assert_eq!(exit["exit_description"], "app instance exited", "{exit}");
        if name == "chatty" {
            let all = |output: &Output| output.text(0, "stdout").ends_with("bye\n");
            output.until("its last word", all).await;
            assert_eq!(output.stream(0, "stdout").holes.len(), 0);
        }
        host.tree_until("no container", |tree| tree.named("wshd").is_empty())
            .await;
        assert_eq!(exits.arrived(), Vec::<Value>::new(), "each is said once");
    }
}

#[tokio::test]
async fn a_kill_for_memory_is_said_once_before_its_exit_when_it_is_recorded() {
    // The kernel may wait for what is still to be written before it kills anybody: in an image it always does.
    let host = host_with("disk = \"unlimited\"\n").await;
    let greedy = app("greedy", "my $n = 1 << 30; my $x = \"x\" x $n", "1");
    let mut output = host.output("greedy").await;
    host.run(host.message("greedy", &greedy)).await;
    // What its start has to write is written.
    let is_ready = |output: &Output| output.text(0, "stdout") == "ready\n";
    output.until("its word", is_ready).await;
    let mut told = host.watch("droplet.*").await;
    let mut beats = host.watch("dea.heartbeat").await;
    let frozen = Frozen::base(&host);
    let victim = poke(&host, "greedy").await;
    let mut waited = 0;
    let end = Instant::now() + patience();
    while !tells(&beats.next().await, "greedy", Some("CRASHED")) && waited < 10 {
        assert!(Instant::now() < end, "neither killed nor waiting");
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", victim.pid));
        waited += u32::from(stat.is_ok_and(|stat| stat.contains(") D ")));
    }
    assert_eq!(told.arrived(), Vec::<Value>::new());
    drop(frozen);
    let (oom, exit) = (told.next().await, told.next().await);
    assert_eq!(oom["level"], "instance", "{oom}");
    assert_eq!(oom["survived"], false, "{oom}");
    assert_eq!(exit["exit_description"], "out of memory", "{exit}");
    host.tree_until("no container", |tree| tree.named("wshd").is_empty())
        .await;
    assert_eq!(told.arrived(), Vec::<Value>::new(), "each is said once");
}

#[tokio::test]
async fn an_agent_that_shall_end_ends_its_apps_and_says_what_stays() {
    let mut host = host().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let frozen = Frozen::base(&host);
    host.agent().signal(Signal::SIGTERM);
    goodbyes.next().await;
    host.tree_until("no container", |tree| tree.named("wshd").is_empty())
        .await;
    // Not at once: the disk may answer again.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let gives_up = "some of what the agent keeps there stays";
    assert!(!host.log().contains(gives_up), "{}", host.log());
    host.logged(0, gives_up).await;
    drop(frozen);
    assert!(host.ended().await.success());
    assert!(host.clean().await.success());
}

#[tokio::test]
async fn an_agent_that_is_killed_meanwhile_leaves_a_stop_undone_or_one_exit() {
    let mut host = host().await;
    let mut exits = host.watch("droplet.exited").await;
    // Before its TERM, at about that time, and when it is dead for certain.
    for (app, seconds) in [("first", 1), ("second", 4), ("third", 9)] {
        host.run(host.message(app, &Droplet::sample("sleeper")))
            .await;
        let frozen = Frozen::base(&host);
        host.publish("dea.stop", &json!({"droplet": app})).await;
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        host.agent().signal(Signal::SIGKILL);
        assert_eq!(exits.arrived(), Vec::<Value>::new());
        drop(frozen);
        host.ended().await;
        let lived = host.tree().named("wshd").len() == 1;
        host.start_agent().await;
        if lived {
            host.stop(app).await;
        }
        let exit = exits.next().await;
        assert_eq!(exit["droplet"], app, "{exit}");
        // The one that tells of a crash has it until it is old.
        let told = |_: &Tree| records(&host).iter().all(|one| one["unsent"] == json!([]));
        host.tree_until("its being known to be told", told).await;
    }
    host.restart().await;
    let mut beats = host.watch("dea.heartbeat").await;
    beats.next().await;
    assert_eq!(exits.arrived(), Vec::<Value>::new(), "each is said once");
}
