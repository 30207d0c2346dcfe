//! The agent may die at any moment; no instance, no byte and no reason is lost.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tests::{
    Dice, Droplet, Frozen, Host, Network, Output, Tree, Watch, numbered, patience, rounds, tool,
};

/// A directory that goes with it.
struct Scratch(std::path::PathBuf);

impl Scratch {
    /// The helpers of `real`, one of them a script with the stamp of their build. To be dropped after the host that has them.
    fn with_helper(real: &str, name: &str, script: &str) -> Self {
        let helpers = std::env::temp_dir().join(format!("ostler-helpers-{}", std::process::id()));
        std::fs::create_dir(&helpers).unwrap();
        let scratch = Self(helpers);
        for helper in ["wshd", "wsh", "iomux-spawn", "iomux-link", "oom"] {
            std::fs::copy(format!("{real}/{helper}"), scratch.0.join(helper)).unwrap();
        }
        let own = scratch.0.join(name);
        let stamp = tests::tool(&format!("{real}/wsh"), &["--version"]);
        std::fs::write(&own, format!("#!/bin/sh\n# {stamp}\n{script}\n")).unwrap();
        std::fs::set_permissions(&own, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        scratch
    }
}

impl Scratch {
    /// [`Scratch::with_helper`], where whoever follows a job says nothing of it until the gate is open.
    fn with_gate(real: &str) -> Self {
        let script = format!(
            "while [ -e $0 ] && [ ! -e $0.gate ]; do sleep 0.1; done; exec {real}/iomux-link \"$@\""
        );
        Self::with_helper(real, "iomux-link", &script)
    }

    fn open_gate(&self) {
        std::fs::write(self.0.join("iomux-link.gate"), "").unwrap();
    }

    /// Whoever waits at the gate looks for it now and then.
    async fn all_have_passed(host: &Host) {
        let followers = ["iomux-link", "sleep"];
        host.tree_until("end of the followers", |tree| {
            followers.iter().all(|name| tree.named(name).is_empty())
        })
        .await;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A host whose followers of jobs wait at a gate, with more in its configuration.
async fn behind_a_gate(more: &[(&str, &str)]) -> (Scratch, Host) {
    let real = std::env::var("OSTLER_HELPERS").expect("the runner says where the helpers are");
    let helpers = Scratch::with_gate(&real);
    let own = helpers.0.to_str().unwrap();
    let host = Host::with(tests::Setup {
        config: &[&[(&*real, own)], more].concat(),
        ..Default::default()
    })
    .await;
    (helpers, host)
}

/// Ends the lines app and checks that every line of both streams arrived once, up to the announced end.
async fn every_line_once(host: &Host, output: &mut Output) {
    let mut exits = host.watch("droplet.exited").await;
    host.tree().one("lines").signal(Signal::SIGKILL);
    let exit = exits.next().await;
    assert_eq!(exit["exit_status"], 137, "{exit}");
    for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
        let end = exit["output"][stream]
            .as_u64()
            .unwrap_or_else(|| panic!("final offsets in {exit}"));
        output
            .until("the end", |output| output.stream(0, stream).next >= end)
            .await;
        let got = output.stream(0, stream);
        assert_eq!(
            (got.next, got.dropped, &got.holes[..]),
            (end, 0, &[][..]),
            "{stream}"
        );
        // It was killed: the last line may be torn.
        let whole = got
            .bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let lines = numbered(word, &got.bytes[..whole]).unwrap();
        assert!(
            lines > 0 && got.bytes.len() - whole < 100,
            "{lines} lines of {word}"
        );
    }
}

#[tokio::test]
async fn numbered_lines_survive_kills_at_random_moments() {
    let mut host = Host::start().await;
    let mut output = host.output("lines").await;
    let answer = host
        .run(host.message("lines", &Droplet::sample("lines")))
        .await;
    let before = host
        .tree_until("app", |tree| tree.named("lines").len() == 1)
        .await;
    let mut dice = Dice(2);
    for round in 0..rounds() {
        // Also in the midst of starting up: sometimes the hello is not waited for.
        if round % 3 == 2 {
            host.kill9().await;
            host.spawn_agent();
        } else {
            host.restart().await;
        }
        let pause = tokio::time::Instant::now() + dice.milliseconds(400);
        let _ = tokio::time::timeout_at(pause, output.until("anything else", |_| false)).await;
    }
    host.restart().await;
    let after = host
        .tree_until("followers", |tree| tree.named("iomux-link").len() == 1)
        .await;
    assert_eq!(before.survivors(), after.survivors(), "\n{before}\n{after}");
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let beat = heartbeats
        .until("RUNNING", |beat| beat["droplets"][0]["state"] == "RUNNING")
        .await;
    assert_eq!(beat["dea"], host.id);
    assert_eq!(beat["droplets"][0]["instance"], answer["instance"]);
    every_line_once(&host, &mut output).await;
}

#[tokio::test]
async fn numbered_lines_survive_a_bus_that_comes_and_goes() {
    let mut host = Host::start().await;
    let mut output = host.output("lines").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    // Slow enough that what is printed while the bus is away stays in the spool.
    message["env"] = json!(["RATE=300000"]);
    host.run(message).await;
    let mut dice = Dice(3);
    for round in 0..rounds() {
        host.stop_bus().await;
        if round % 2 == 1 {
            host.kill9().await;
            host.spawn_agent();
        }
        tokio::time::sleep(dice.milliseconds(300)).await;
        host.start_bus().await;
        // More than is printed meanwhile: however many rounds, the rest stays small.
        let enough = output.stream(0, "stdout").next + 200_000;
        if enough > 9_984_000 {
            break;
        }
        output
            .until("more", |output| output.stream(0, "stdout").next >= enough)
            .await;
    }
    every_line_once(&host, &mut output).await;
}

#[tokio::test]
async fn a_server_that_stops_to_read_loses_nothing() {
    let host = Host::start().await;
    let mut output = host.output("lines").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=300000"]);
    host.run(message).await;
    output
        .until("lines", |output| output.stream(0, "stdout").next > 1000)
        .await;
    host.bus().signal(Signal::SIGSTOP);
    tokio::time::sleep(Duration::from_secs(1)).await;
    host.bus().signal(Signal::SIGCONT);
    every_line_once(&host, &mut output).await;
}

#[tokio::test]
async fn a_server_that_hangs_holds_no_shutdown_up_for_ever() {
    let mut host = Host::start().await;
    let mut message = host.message("sleeper", &Droplet::sample("sleeper"));
    message["stop_grace"] = json!(1);
    host.run(message).await;
    host.bus().signal(Signal::SIGSTOP);
    let status = host.end(Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    host.bus().signal(Signal::SIGCONT);
}

#[tokio::test]
async fn hang_up_is_a_goodbye_that_leaves_the_apps() {
    let mut host = Host::start().await;
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    // RUNNING without a port to wait for: the shells may still be on their way to the app.
    let tree = host
        .tree_until("app", |tree| !tree.named("sleep").is_empty())
        .await;
    let before = tree.survivors();
    let mut goodbyes = host.watch("dea.shutdown").await;
    let status = host.end(Signal::SIGHUP).await;
    assert!(status.success(), "{status}");
    let goodbye = goodbyes.next().await;
    assert_eq!(goodbye["id"], host.id);
    assert_eq!(goodbye["app_id_to_count"], json!({"sleeper": 1}));
    let alone = host
        .tree_until("end of its followers", |tree| {
            tree.named("iomux-link").is_empty()
        })
        .await;
    assert_eq!(alone.survivors(), before);
    host.start_agent().await;
    host.stop("sleeper").await;
}

#[tokio::test]
async fn an_agent_can_be_asked_from_its_first_word_on() {
    let mut host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    for round in 0..rounds() {
        host.kill9().await;
        let subject = ["dea.heartbeat", "dea.advertise"][usize::from(round % 2 == 1)];
        let mut first = host.watch(subject).await;
        // What the killed one has said last is on its way yet.
        tokio::time::sleep(Duration::from_millis(100)).await;
        first.arrived();
        host.spawn_agent();
        first.next().await;
        let find = json!({"droplet": "app"});
        let found = host.request(&host.subject("find"), &find).await;
        assert_eq!(found["matched"], 1, "{found}");
    }
    host.stop("app").await;
}

#[tokio::test]
async fn an_agent_that_leaves_answers_whoever_reached_it() {
    let mut host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let mut dice = Dice(7);
    for round in 0..rounds() {
        // Asks again and again, until the server says that nobody listens any more. One at a time: of
        // several that are on their way in the very moment in which the agent's NATS client forgets a
        // subscription, it forgets all but the first.
        let (nats, subject) = (host.nats().clone(), host.subject("stop"));
        let asker = tokio::spawn(async move {
            for count in 0.. {
                let body = json!({"droplet": "nobody", "request_id": format!("{round}-{count}")});
                let request = async_nats::Request::new()
                    .payload(body.to_string().into())
                    .timeout(Some(patience()));
                if let Err(error) = nats.send_request(subject.clone(), request).await {
                    let nobody = async_nats::RequestErrorKind::NoResponders;
                    assert_eq!(error.kind(), nobody, "after {count} answers");
                    return;
                }
            }
        });
        tokio::time::sleep(dice.milliseconds(60)).await;
        let status = host.end(Signal::SIGHUP).await;
        assert!(status.success(), "{status}");
        asker.await.unwrap();
        host.start_agent().await;
    }
    host.stop("app").await;
}

#[tokio::test]
async fn an_end_is_told_whole_whatever_cuts_the_agent_off() {
    let mut host = Host::start().await;
    let mut events = host.watch("droplet.*").await;
    let mut dice = Dice(11);
    for round in 0..rounds() {
        let droplet = format!("end-{round}");
        let eats = round % 2 == 0;
        let mut message = if eats {
            host.message(&droplet, &Droplet::sample("hog"))
        } else {
            host.message(&droplet, &Droplet::shell("echo last words; exit 7"))
        };
        message["limits"]["mem"] = json!(32);
        let answer = host.request(&host.subject("start"), &message).await;
        assert_eq!(answer["ok"], true, "{answer}");
        // Somewhere between the start and the last trace of it, once or twice.
        tokio::time::sleep(dice.milliseconds(350)).await;
        host.kill9().await;
        host.spawn_agent();
        if round % 3 == 0 {
            tokio::time::sleep(dice.milliseconds(60)).await;
            host.kill9().await;
            host.spawn_agent();
        }
        let exit = events
            .until("exit of it", |event| {
                event["droplet"] == *droplet && event["reason"].is_string()
            })
            .await;
        assert_eq!(exit["instance"], answer["instance"], "{exit}");
        assert_eq!(exit["oom"], eats, "{exit}");
        let (status, words) = if eats {
            (137, "out of memory")
        } else {
            (7, "app instance exited")
        };
        assert_eq!(exit["exit_status"], status, "{exit}");
        assert_eq!(exit["exit_description"], words, "{exit}");
        host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
            .await;
        let mut again = host.watch("dea.start").await;
        host.restart().await;
        drop(again.arrived());
        events.arrived();
        let of_it: Vec<&Value> = events
            .all()
            .iter()
            .filter(|event| event["droplet"] == *droplet)
            .collect();
        // Said again after a kill between the saying and the confirmation: the same, not another one.
        let (ooms, exits): (Vec<&Value>, Vec<&Value>) =
            of_it.iter().partition(|event| event["victim"].is_object());
        assert!(exits.iter().all(|other| **other == exit), "{of_it:#?}");
        assert_eq!(!ooms.is_empty(), eats, "{of_it:#?}");
        if eats {
            assert_eq!(of_it[0]["victim"]["comm"], "hog", "{of_it:#?}");
            // The kernel may kill more than one; each is told in one way.
            for oom in &ooms {
                let first = ooms.iter().find(|one| one["victim"] == oom["victim"]);
                assert_eq!(first, Some(oom), "{of_it:#?}");
            }
        }
        host.stop(&droplet).await;
    }
}

#[tokio::test]
async fn an_app_whose_record_is_another_agents_runs_on() {
    let mut host = Host::with(tests::Setup {
        config: &[("[intervals]", "[intervals]\ndroplets = 1")],
        ..Default::default()
    })
    .await;
    let mut message = host.message("app", &Droplet::sample("sinatra"));
    message["uris"] = json!(["app.example.net"]);
    let (handle, memory) = (host.run(message.clone()).await, &message["limits"]["mem"]);
    let handle = handle["handle"].as_str().unwrap().to_owned();
    let left = 4096 - memory.as_i64().unwrap();
    let droplets = host.base.join("droplets");
    let droplet = droplets.join(format!("sha1-{}", message["sha1"].as_str().unwrap()));
    let unused = droplets.join("sha1-of-nobody");
    let find = json!({"droplet": "app", "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    let address = format!("127.0.0.1:{}", found["stats"]["port"]);
    host.kill9().await;
    // No later scale holds its droplet.
    std::fs::remove_dir_all(host.base.join("templates")).unwrap();
    std::fs::create_dir(&unused).unwrap();
    let record = host
        .base
        .join("instances")
        .join(&handle)
        .join("record.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"format\":1", "\"format\":2")).unwrap();
    host.start_agent().await;
    host.logged(0, "a record cannot be used").await;
    offers(&host, left).await;
    host.tree_until("removal of droplets", |_| !unused.exists())
        .await;
    assert!(droplet.exists());
    // Nothing of it is taken away or given to another.
    let other = host
        .run(host.message("other", &Droplet::sample("sleeper")))
        .await;
    assert_ne!(other["handle"], *handle);
    assert_eq!(tests::get(&address, "/env/PORT").await.unwrap().0, 200);
    host.stop("other").await;
    // The agent that wrote it comes back.
    host.kill9().await;
    std::fs::write(&record, text).unwrap();
    host.start_agent().await;
    assert_eq!(tests::get(&address, "/env/PORT").await.unwrap().0, 200);
    // Nobody can read what runs, until it does not run.
    host.kill9().await;
    std::fs::remove_dir_all(host.base.join("templates")).unwrap();
    std::fs::create_dir(&unused).unwrap();
    std::fs::write(&record, "{").unwrap();
    host.start_agent().await;
    offers(&host, left).await;
    offers(&host, left).await;
    assert!(droplet.exists() && unused.exists());
    host.tree().one("wshd").signal(Signal::SIGKILL);
    offers(&host, 4096).await;
    host.tree_until("removal of droplets", |_| !unused.exists())
        .await;
}

/// The next two advertisements offer, or will, so many MB of memory.
async fn offers(host: &Host, memory: i64) {
    let mut adverts = host.watch("dea.advertise").await;
    adverts.next().await;
    let offers = |advert: &Value| advert["available_memory"] == memory;
    adverts.until("so much memory", offers).await;
}

#[tokio::test]
async fn a_host_has_one_agent() {
    let mut host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let status = host.clean().await;
    assert!(!status.success(), "it would take the agent's apps away");
    host.logged(0, "is the agent of this host").await;
    // Also with a base directory of its own.
    let base = host.base.with_file_name("other");
    let status = host.end_of_second_agent(&base).await;
    assert!(!status.success());
    assert!(host.tree().one("wshd").lives());
    host.stop("app").await;
    let _ = host.restart().await;
}

#[tokio::test]
async fn control_groups_have_one_agent() {
    let mut host = Host::with(tests::Setup {
        bus: Host::SHARED,
        ..Default::default()
    })
    .await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let mut other = host.place_beside(&[]).await;
    let config = |host: &Host| host.base.with_file_name("agent.toml");
    let text = |host: &Host| std::fs::read_to_string(config(host)).unwrap();
    let parent = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("parent = "));
        line.unwrap().to_owned()
    };
    let (own, theirs) = (text(&other), parent(&text(&host)));
    std::fs::write(config(&other), own.replace(&parent(&own), &theirs)).unwrap();
    assert!(!other.clean().await.success());
    other.spawn_agent();
    assert!(!other.ended().await.success());
    let log = other.logged(0, "are another agent's").await;
    assert_eq!(log.matches("are another agent's").count(), 2, "{log}");
    assert!(host.tree().one("wshd").lives());
    std::fs::write(config(&other), own).unwrap();
    let _ = other.start_agent().await;
    drop(other);
    host.stop("app").await;
    let _ = host.restart().await;
}

#[tokio::test]
async fn a_cloned_host_refuses_to_start() {
    let kept = std::env::temp_dir().join(format!("ostler-streams-{}", std::process::id()));
    let kept = Scratch(kept);
    let mut bus = Host::SHARED.to_vec();
    bus.extend(["-js", "-sd", kept.0.to_str().unwrap()]);
    let mut host = Host::with(tests::Setup {
        bus: &bus,
        ..Default::default()
    })
    .await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let tree = host
        .tree_until("app", |tree| !tree.named("sleep").is_empty())
        .await;
    let before = tree.survivors();
    let records = tests::tool(
        "find",
        &[
            host.base.join("instances").to_str().unwrap(),
            "-type",
            "f",
            "-exec",
            "sha1sum",
            "{}",
            "+",
        ],
    );
    let mut copy = host.place_beside(&[]).await;
    for round in 0..rounds() {
        if round == rounds() - 1 {
            // It answers whoever asks, before any agent can.
            let stream = json!({"name": "all", "subjects": ["dea.>"], "storage": "memory"});
            let made = host.request("$JS.API.STREAM.CREATE.all", &stream).await;
            assert_eq!(made["error"], Value::Null, "{made}");
        }
        let _ = std::fs::remove_dir_all(&copy.base);
        std::fs::create_dir(&copy.base).unwrap();
        for name in ["id", "instances", "templates"] {
            let from = host.base.join(name).display().to_string();
            tests::tool("cp", &["-a", &from, copy.base.to_str().unwrap()]);
        }
        let mut said = Vec::new();
        for subject in ["dea.*", "droplet.>", "router.*"] {
            said.push(host.watch(subject).await);
        }
        let mut advertised = host.watch("dea.advertise").await;
        copy.spawn_agent();
        let status = copy.ended().await;
        assert_eq!(status.code(), Some(79), "{status}");
        let log = copy.log();
        for word in [&host.id, Network::HOST, Network::BESIDE, "ostler clean"] {
            assert!(log.contains(word), "{word}\n{log}");
        }
        // Whatever it might have said has come before this.
        advertised.next().await;
        let said: Vec<Value> = said.iter_mut().flat_map(tests::Watch::arrived).collect();
        for word in ["version", "reason", "uris"] {
            // A hello or a goodbye, an exit, a route.
            let of_it = said.iter().filter(|one| !one[word].is_null());
            assert_eq!(of_it.count(), 0, "{word}, round {round}: {said:#?}");
        }
        let beats = said.iter().filter_map(|one| one["droplets"].as_array());
        for beat in beats {
            assert_eq!((beat.len(), &beat[0]["state"]), (1, &json!("RUNNING")));
        }
        let clean = copy.clean().await;
        assert!(clean.success(), "{clean}");
    }
    assert_eq!(host.tree().survivors(), before);
    let now = tests::tool(
        "find",
        &[
            host.base.join("instances").to_str().unwrap(),
            "-type",
            "f",
            "-exec",
            "sha1sum",
            "{}",
            "+",
        ],
    );
    assert_eq!(records, now);
    // The same host once more is no clone, however soon it comes back.
    host.restart().await;
    let gone = host.request("$JS.API.STREAM.DELETE.all", &json!({})).await;
    assert_eq!(gone["success"], true, "{gone}");
    for _ in 0..rounds() * 3 {
        host.restart().await;
    }
    // Somebody listens and says nothing, as one whose connection the server has not found broken yet.
    let silent = host.watch(&host.subject("find")).await;
    host.restart().await;
    drop(silent);
    // With an id of its own the copy is a host like others.
    let _ = std::fs::remove_file(copy.base.join("id"));
    copy.start_agent().await;
    assert_ne!(copy.id, host.id);
    host.stop("app").await;
}

#[tokio::test]
async fn an_agent_that_never_had_a_bus_leaves_as_it_is_told() {
    let mut host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    host.kill9().await;
    host.stop_bus().await;
    let linked = |tree: &Tree| tree.named("iomux-link").len() == 1;
    for signal in [Signal::SIGHUP, Signal::SIGTERM] {
        host.spawn_agent();
        host.tree_until("linker of an agent without a bus", linked)
            .await;
        let status = host.end(signal).await;
        assert!(status.success(), "{signal}: {status}");
        let left = usize::from(signal == Signal::SIGHUP);
        host.tree_until("end of what goes with it", |tree| {
            tree.named("iomux-link").is_empty() && tree.named("wshd").len() == left
        })
        .await;
    }
}

#[tokio::test]
async fn a_start_that_was_cut_off_before_its_job_begins_again() {
    let real = std::env::var("OSTLER_HELPERS").expect("the runner says where the helpers are");
    // A supervisor that takes its time: the job has its directory, and nobody has begun it.
    let helpers = Scratch::with_helper(&real, "iomux-spawn", "exec sleep 1000");
    let spawn = helpers.0.join("iomux-spawn");
    let own = helpers.0.to_str().unwrap();
    let mut host = Host::with(tests::Setup {
        config: &[(&real, own)],
        ..Default::default()
    })
    .await;
    let start = host.message("app", &Droplet::sample("sleeper"));
    let answer = host.request(&host.subject("start"), &start).await;
    let handle = answer["handle"].as_str().unwrap();
    let job = host.base.join("containers").join(handle).join("jobs/1");
    let tree = host
        .tree_until("a slow supervisor", |tree| {
            job.exists() && tree.named("sleep").len() == 1
        })
        .await;
    host.kill9().await;
    tree.one("sleep").signal(Signal::SIGKILL);
    std::fs::remove_file(&spawn).unwrap();
    std::fs::copy(format!("{real}/iomux-spawn"), &spawn).unwrap();
    // In the container that never ran its app a process was killed for memory, and told.
    let record = host.base.join("instances").join(handle);
    let record = record.join("record.json");
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains("\"oom_kills\":0"), "{text}");
    let told = text.replace("\"oom_kills\":0", "\"oom_kills\":1");
    std::fs::write(&record, told).unwrap();
    let mut exits = host.watch("droplet.exited").await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    host.start_agent().await;
    let beat = heartbeats
        .until("the end of the start", |beat| {
            beat["droplets"][0]["state"] != "STARTING"
        })
        .await;
    assert_eq!(beat["droplets"][0]["state"], "RUNNING", "{}", host.log());
    assert_eq!(beat["droplets"][0]["instance"], answer["instance"]);
    assert_eq!(exits.arrived(), Vec::<Value>::new());
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains("\"oom_kills\":0"), "another count: {text}");
    host.stop("app").await;
}

#[tokio::test]
async fn a_start_of_which_nothing_can_be_learnt_is_a_crash() {
    let (helpers, mut host) = behind_a_gate(&[]).await;
    let mut start = host.message(
        "app",
        &Droplet::shell("exec perl -e '$0 = \"silentapp\"; sleep 1 while 1'"),
    );
    start["health_check_timeout"] = json!(1);
    let answer = host.request(&host.subject("start"), &start).await;
    host.tree_until("the app", |tree| tree.named("silentapp").len() == 1)
        .await;
    host.kill9().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    host.start_agent().await;
    // A minute is what it waits for.
    tokio::time::sleep(Duration::from_secs(50)).await;
    let exit = exits.next().await;
    assert_eq!(exit["handle"], answer["handle"], "{exit}");
    let why = exit["exit_description"].as_str().unwrap();
    assert!(why.contains("nothing is known of the app"), "{exit}");
    for beat in heartbeats.arrived() {
        for told in beat["droplets"].as_array().unwrap() {
            assert!(told["state"] != "RUNNING", "{beat}");
        }
    }
    helpers.open_gate();
    Scratch::all_have_passed(&host).await;
}

#[tokio::test]
async fn a_start_waits_for_its_turn_and_can_be_stopped_meanwhile() {
    // As long as the gate is shut the one turn is taken.
    let (helpers, host) = behind_a_gate(&[
        ("[resources]", "[resources]\nparallel_starts = 1"),
        ("[network]", "[instance]\nstop_grace = 1\n[network]"),
    ])
    .await;
    let sleeper = Droplet::sample("sleeper");
    let containers = host.base.join("containers");
    let mut handles = Vec::new();
    for droplet in ["first", "second", "third"] {
        let message = host.message(droplet, &sleeper);
        let answer = host.request(&host.subject("start"), &message).await;
        handles.push(answer["handle"].as_str().unwrap().to_owned());
        let job = containers.join(&handles[0]).join("jobs/1");
        host.tree_until("the first one's job", |_| job.exists())
            .await;
    }
    let mut beats = host.watch("dea.heartbeat").await;
    let starting = |beat: &Value| {
        let entries = beat["droplets"].as_array().unwrap();
        entries.len() == 3 && entries.iter().all(|entry| entry["state"] == "STARTING")
    };
    beats.until("three on their way", starting).await;
    for _ in 0..2 {
        let beat = beats.next().await;
        assert!(starting(&beat), "{beat}");
    }
    let third = containers.join(&handles[2]);
    assert!(!containers.join(&handles[1]).exists() && !third.exists());
    host.stop("second").await;
    assert!(!third.exists());
    host.stop("first").await;
    host.tree_until("the third one's turn", |_| third.exists())
        .await;
    helpers.open_gate();
    let runs = |beat: &Value| {
        let entries = beat["droplets"].as_array().unwrap();
        entries.len() == 1 && entries[0]["droplet"] == "third" && entries[0]["state"] == "RUNNING"
    };
    beats.until("the third one alone", runs).await;
    host.stop("third").await;
    Scratch::all_have_passed(&host).await;
}

#[tokio::test]
async fn a_kill_that_comes_before_the_app_is_known_to_run_ends_it() {
    let (helpers, mut host) = behind_a_gate(&[]).await;
    let mut events = host.watch("droplet.*").await;
    let worker = "perl -e '$SIG{USR1} = sub { push @held, \"x\" x (1 << 20) while 1 }; $0 = \"worker\"; sleep 1 while 1'";
    let app = format!("{worker} &\nwhile :; do sleep 1000 & wait; done");
    let mut message = host.message("app", &Droplet::shell(&app));
    message["limits"]["mem"] = json!(32);
    let answer = host.request(&host.subject("start"), &message).await;
    let tree = host
        .tree_until("worker", |tree| tree.named("worker").len() == 1)
        .await;
    host.kill9().await;
    tree.one("worker").signal(Signal::SIGUSR1);
    host.tree_until("end of the worker", |tree| tree.named("worker").is_empty())
        .await;
    host.start_agent().await;
    let oom = events.next().await;
    assert_eq!(oom["victim"]["comm"], "worker", "{oom}");
    assert_eq!(oom["survived"], false, "{oom}");
    helpers.open_gate();
    let exit = events.next().await;
    assert_eq!(exit["handle"], answer["handle"], "{exit}");
    assert_eq!(exit["exit_description"], "out of memory", "{exit}");
    Scratch::all_have_passed(&host).await;
}

#[tokio::test]
async fn many_are_adopted_beside_starts_that_were_cut_off() {
    let mut host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let message = |host: &Host, droplet: &str, index: u64| {
        let mut message = host.message(droplet, &sleeper);
        message["index"] = json!(index);
        message
    };
    let many = 12;
    for index in 0..many {
        host.run(message(&host, "old", index)).await;
    }
    host.tree_until("apps", |tree| tree.named("sleep").len() == 12)
        .await;
    let before = host.tree().survivors();
    let mut dice = Dice(13);
    let mut exits = host.watch("droplet.exited").await;
    for round in 0..rounds() {
        for index in 0..3 {
            let start = message(&host, "new", index);
            let answer = host.request(&host.subject("start"), &start).await;
            assert_eq!(answer["ok"], true, "{answer}");
        }
        tokio::time::sleep(dice.milliseconds(80)).await;
        host.restart().await;
        let mut heartbeats = host.watch("dea.heartbeat").await;
        heartbeats
            .until("all settled", |beat| {
                let entries = beat["droplets"].as_array().unwrap();
                entries.len() == 15 && entries.iter().all(|entry| entry["state"] != "STARTING")
            })
            .await;
        let crashes: Vec<Value> = exits
            .arrived()
            .into_iter()
            .filter(|exit| exit["reason"] == "CRASHED")
            .collect();
        assert_eq!(crashes, Vec::<Value>::new(), "{}", host.log());
        let mut ports = BTreeSet::new();
        for (droplet, least) in [("old", 12), ("new", 3)] {
            let find = json!({"droplet": droplet, "include_stats": true});
            let found = host
                .request_all(
                    "dea.find.droplet",
                    &find,
                    (least, Duration::from_millis(500)),
                )
                .await;
            ports.extend(found.iter().map(|one| one["stats"]["port"].as_u64()));
        }
        assert_eq!(ports.len(), 15, "round {round}: a port each: {ports:?}");
        host.stop("new").await;
        host.tree_until("the old ones alone", |tree| tree.named("wshd").len() == 12)
            .await;
    }
    let after = host.tree().survivors();
    assert!(before.is_subset(&after), "{before:?}\n{after:?}");
    host.stop("old").await;
}

#[tokio::test]
async fn a_stop_survives_the_agent() {
    let mut host = Host::start().await;
    let script = "trap '' TERM; echo up; while :; do sleep 0.1; done";
    host.run(host.message("deaf", &Droplet::shell(script)))
        .await;
    let mut unregistered = host.watch("router.unregister").await;
    host.publish("dea.stop", &json!({"droplet": "deaf"})).await;
    unregistered.next().await;
    host.restart().await;
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
}

#[tokio::test]
async fn a_start_is_accepted_for_good_or_leaves_nothing() {
    let mut host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let mut dice = Dice(5);
    for round in 0..rounds() {
        let droplet = format!("app-{round}");
        host.publish(&host.subject("start"), &host.message(&droplet, &sleeper))
            .await;
        tokio::time::sleep(dice.milliseconds(150)).await;
        host.restart().await;
        // Whatever came of it is in the heartbeat, alive or crashed; then it can be stopped.
        let find = json!({"droplet": droplet});
        let found = host
            .request_all("dea.find.droplet", &find, (0, Duration::from_millis(300)))
            .await;
        assert!(found.len() <= 1, "{found:?}");
        host.stop(&droplet).await;
        host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
            .await;
    }
}

#[tokio::test]
async fn no_loop_device_outlives_an_agent_that_dies_while_it_makes_disks() {
    let mut host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let loops = |host: &Host| {
        let found = host.leftovers();
        found
            .iter()
            .filter(|what| what.starts_with("loop "))
            .count()
    };
    let (mut dice, mut seen) = (Dice(17), 0);
    for round in 0..rounds() {
        for index in 0..4 {
            let mut message = host.message("app", &sleeper);
            message["index"] = json!(index);
            host.publish(&host.subject("start"), &message).await;
        }
        tokio::time::sleep(dice.milliseconds(150)).await;
        host.kill9().await;
        // What has an init has its disk; nothing else keeps one. The kernel detaches a moment after the exit.
        let only = |tree: &Tree| loops(&host) <= tree.named("wshd").len();
        host.tree_until("end of other loop devices", only).await;
        seen += loops(&host);
        let status = host.clean().await;
        assert!(status.success(), "{status}\n{}", host.log());
        assert_eq!(host.leftovers(), Vec::<String>::new(), "round {round}");
        host.start_agent().await;
    }
    host.run(host.message("last", &sleeper)).await;
    seen += loops(&host);
    assert!(seen > 0, "what is looked for is there to be found");
    host.stop("last").await;
}

#[tokio::test]
async fn clean_removes_what_a_killed_agent_left() {
    let mut host = Host::start().await;
    host.run(host.message("one", &Droplet::sample("sleeper")))
        .await;
    host.run(host.message("two", &Droplet::sample("lines")))
        .await;
    host.kill9().await;
    assert!(!host.leftovers().is_empty());
    // On a host that has lost what an agent needs.
    let config = host.base.with_file_name("agent.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let debian = text.lines().find(|line| line.starts_with("debian = "));
    let lost = text
        .replace(debian.unwrap(), "debian = \"/does/not/exist\"")
        .replace("[cgroup]", "[instance]\ndisk = \"quota\"\n[cgroup]");
    std::fs::write(&config, lost).unwrap();
    let status = host.clean().await;
    assert!(status.success(), "{status}\n{}", host.log());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_begin_leaves_nothing() {
    let mut host = Host::start().await;
    host.end(Signal::SIGTERM).await;
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let config = host.base.with_file_name("agent.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let helpers = text.lines().find(|line| line.starts_with("helpers = "));
    let lost = text.replace(helpers.unwrap(), "helpers = \"/does/not/exist\"");
    std::fs::write(&config, lost).unwrap();
    assert!(!host.clean().await.success());
    host.logged(0, "helpers cannot be started").await;
    assert_eq!(host.leftovers(), Vec::<String>::new());
    std::fs::write(&config, text).unwrap();
    host.start_agent().await;
}

/// Prints, waits for USR1, then serves on its port.
const SLOW: &str = "trap go=1 USR1\necho up\nwhile [ -z \"$go\" ]; do sleep 0.05; done\nexec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 5, LocalPort => $ENV{PORT}) or die; while (1) { $c = $s->accept }'";

#[tokio::test]
async fn a_start_goes_on_under_the_next_agent() {
    let mut host = Host::start().await;
    let mut output = host.output("slow").await;
    let mut message = host.message("slow", &Droplet::shell(SLOW));
    message["uris"] = json!(["slow.example.net"]);
    let subject = host.subject("start");
    let answer = host.request(&subject, &message).await;
    assert_eq!(answer["ok"], true, "{answer}");
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    // The confirmed cursor now stands behind the record that says the app was executed.
    for _ in 0..3 {
        host.restart().await;
    }
    let mut routes = host.watch("router.register").await;
    let tree = host.tree();
    tree.0
        .iter()
        .find(|process| process.title() == "bash main.sh")
        .expect("the app")
        .signal(Signal::SIGUSR1);
    let route = routes.next().await;
    assert_eq!(route["uris"], json!(["slow.example.net"]));
    host.stop("slow").await;
}

#[tokio::test]
async fn an_answered_stop_is_never_lost() {
    let mut host = Host::start().await;
    for round in 0..rounds() {
        let droplet = format!("stop-{round}");
        host.run(host.message(&droplet, &Droplet::sample("sleeper")))
            .await;
        let subject = host.subject("stop");
        let answer = host
            .request(
                &subject,
                &json!({"droplet": droplet, "request_id": droplet}),
            )
            .await;
        assert_eq!(answer["matched"], 1, "{answer}");
        host.restart().await;
        host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
            .await;
    }
}

#[tokio::test]
async fn what_ended_without_a_bus_is_told_in_full_by_the_next_agent() {
    let mut host = Host::start().await;
    let mut output = host.output("app").await;
    let mut exits = host.watch("droplet.exited").await;
    let script = "trap 'head -c 300000 /dev/zero | tr \"\\0\" x; exit 7' USR1\necho up\nwhile :; do sleep 0.05; done";
    host.run(host.message("app", &Droplet::shell(script))).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    host.stop_bus().await;
    let tree = host.tree();
    tree.0
        .iter()
        .find(|process| process.title() == "bash main.sh")
        .expect("the app")
        .signal(Signal::SIGUSR1);
    host.tree_until("the end of it", |tree| tree.named("wshd").is_empty())
        .await;
    host.end(Signal::SIGHUP).await;
    host.spawn_agent();
    host.start_bus().await;
    let exit = exits.next().await;
    assert_eq!(exit["exit_status"], 7, "{exit}");
    assert_eq!(exit["output"]["stdout"], 300_003, "{exit}");
    output
        .until("all of it", |output| {
            output.stream(0, "stdout").next >= 300_003
        })
        .await;
    let stream = output.stream(0, "stdout");
    assert_eq!(
        (stream.next, stream.dropped, stream.holes.len()),
        (300_003, 0, 0)
    );
}

#[tokio::test]
async fn an_end_is_known_however_slow_the_bus_is() {
    let mut host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut output = host.output("app").await;
    let script = "trap 'head -c 9000000 /dev/zero | tr \"\\0\" x; exit 5' USR1\necho up\nwhile :; do sleep 0.05; done";
    host.run(host.message("app", &Droplet::shell(script))).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    host.bus().signal(Signal::SIGSTOP);
    let tree = host.tree();
    tree.0
        .iter()
        .find(|process| process.title() == "bash main.sh")
        .expect("the app")
        .signal(Signal::SIGUSR1);
    // More than is sent without a confirmation: the end stands behind it, and is seen all the same.
    host.tree_until("the end of it", |tree| tree.named("wshd").is_empty())
        .await;
    host.bus().signal(Signal::SIGCONT);
    let exit = exits.next().await;
    assert_eq!(exit["exit_status"], 5, "{exit}");
    assert_eq!(exit["output"]["stdout"], 9_000_003, "{exit}");
    output
        .until("all of it", |output| {
            output.stream(0, "stdout").next >= 9_000_003
        })
        .await;
    assert_eq!(output.stream(0, "stdout").holes.len(), 0);
    let _ = host.restart().await;
}

/// Sends a command and gives the inbox of its answers.
async fn ask(host: &Host, subject: &str, body: &Value) -> Watch {
    let inbox = host.nats().new_inbox();
    let answers = host.watch(&inbox).await;
    let body = body.to_string().into();
    let sent = host
        .nats()
        .publish_with_reply(subject.to_owned(), inbox, body);
    sent.await.unwrap();
    answers
}

/// A start that the disk has no room for is refused.
async fn too_large(host: &Host) {
    let mut large = host.message("large", &Droplet::sample("sleeper"));
    large["limits"]["disk"] = json!(8192);
    let answer = host.request(&host.subject("start"), &large).await;
    let error = &answer["error"];
    assert_eq!(error["code"], "not_enough_disk", "{answer}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("are free in"), "{message}");
}

/// What each thread of the agent is at (proc(5)): a letter for each.
fn threads(host: &Host) -> Vec<char> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", host.agent().pid())).unwrap();
    let states = tasks.flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    });
    states.collect()
}

/// Leaves not a block to anybody.
fn fill(host: &Host) -> std::path::PathBuf {
    let filler = host.base.join("filler");
    std::fs::create_dir(&filler).unwrap();
    let script = "for size in 1G 64M 4M 256K 16K 4K; do i=0; \
                  while fallocate -l $size \"$0/$size.$i\" 2>/dev/null; do i=$((i+1)); done; done; \
                  i=0; while mkdir \"$0/$i\" 2>/dev/null; do i=$((i+1)); done";
    tool("sh", &["-c", script, &filler.display().to_string()]);
    filler
}

#[tokio::test]
async fn what_cannot_be_adopted_keeps_its_address_and_can_be_stopped() {
    let mut host = Host::with(tests::Setup {
        config: &[("10.254.0.0/16", "10.254.0.0/29")],
        ..Default::default()
    })
    .await;
    let sleeper = Droplet::sample("sleeper");
    let handle = host.run(host.message("app", &sleeper)).await["handle"].clone();
    let container = host.base.join("containers").join(handle.as_str().unwrap());
    let (run, away) = (container.join("run"), container.join("away"));
    let tree = host.tree_until("app", |tree| !tree.named("sleep").is_empty());
    let app = tree.await.named("sleep")[0].clone();
    host.kill9().await;
    // Whether its init lives cannot be asked.
    std::fs::rename(&run, &away).unwrap();
    std::fs::write(&run, "").unwrap();
    host.start_agent().await;
    host.logged(0, "cannot be adopted yet").await;
    // There are two addresses, and one of them is its own still.
    host.run(host.message("second", &sleeper)).await;
    let third = host.message("third", &sleeper);
    let answer = host.request(&host.subject("start"), &third).await;
    assert_eq!(answer["error"]["code"], "host_full", "{answer}");
    let mut exits = host.watch("droplet.exited").await;
    let answer = host.request("dea.stop", &json!({"droplet": "app"})).await;
    assert_eq!(answer["ok"], true, "{answer}");
    let dead = |tree: &Tree| tree.0.iter().all(|one| one.pid != app.pid);
    host.tree_until("its end", dead).await;
    // Whoever waits is not kept waiting for what may not come.
    let stop = json!({"droplet": "app", "wait": "stopped"});
    let answer = host.request("dea.stop", &stop).await;
    assert_eq!(answer["error"]["code"], "stuck", "{answer}");
    // Now it can be known that it is dead.
    std::fs::remove_file(&run).unwrap();
    std::fs::rename(&away, &run).unwrap();
    let exit = exits
        .until("its exit", |exit| exit["droplet"] == "app")
        .await;
    assert_eq!(exit["reason"], "STOPPED", "{exit}");
    host.stop("second").await;
}

#[tokio::test]
async fn an_agent_takes_over_where_the_disk_is_full() {
    let mut host = Host::with(tests::Setup {
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    let mut web = host.message("web", &Droplet::sample("sinatra"));
    web["uris"] = json!(["web.example.net"]);
    host.run(web).await;
    host.run(host.message("other", &Droplet::sample("sleeper")))
        .await;
    host.kill9().await;
    let filler = fill(&host);
    host.start_agent().await;
    host.logged(0, "is full").await;
    let find = json!({"droplet": "web", "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    assert_eq!(found["state"], "RUNNING", "{found}");
    let address = format!("127.0.0.1:{}", found["stats"]["port"]);
    assert_eq!(tests::get(&address, "/env/PORT").await.unwrap().0, 200);
    let mut exits = host.watch("droplet.exited").await;
    host.publish("dea.stop", &json!({"droplet": "web"})).await;
    exits
        .until("exit of it", |exit| exit["droplet"] == "web")
        .await;
    std::fs::remove_dir_all(filler).unwrap();
    // Somebody looks soon.
    let mut new = host.message("new", &Droplet::sample("sleeper"));
    new["limits"]["disk"] = json!(8);
    new["wait"] = json!("running");
    let end = Instant::now() + patience();
    while host.request(&host.subject("start"), &new).await["ok"] != true {
        assert!(Instant::now() < end, "there is no room still");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // It is bounded as if there had always been room.
    let find = json!({"droplet": "new", "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    assert_eq!(found["stats"]["disk_quota"], 8 << 20, "{found}");
    assert!(
        found["stats"]["usage"]["disk"].as_u64() > Some(0),
        "{found}"
    );
    host.stop("new").await;
    host.stop("other").await;
}

#[tokio::test]
async fn a_look_at_the_disk_that_hangs_keeps_no_answer_back() {
    let host = Host::with(tests::Setup {
        config: &[("[network]", "[instance]\ndisk = \"image\"\n[network]")],
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    let sleeper = Droplet::sample("sleeper");
    let answer = host.run(host.message("app", &sleeper)).await;
    let frozen = Frozen::image(&host, answer["handle"].as_str().unwrap());
    // Its image is to grow, and nobody can look at what is left as long as that is under way.
    let grow = json!({"droplet": "app", "instances": 1, "limits": {"disk": 320}});
    let mut grown = ask(&host, &host.subject("scale"), &grow).await;
    host.tree_until("thread that waits", |_| threads(&host).contains(&'D'))
        .await;
    let before = threads(&host).len();
    let mut beats = host.watch("dea.heartbeat").await;
    let wanted = json!({"droplet": "more", "limits": {"mem": 64, "disk": 64}});
    // Longer than it takes until somebody looks again.
    for _ in 0..8 {
        assert_eq!(host.request("dea.discover", &wanted).await["id"], host.id);
        too_large(&host).await;
        beats.next().await;
    }
    let after = threads(&host).len();
    assert!(after < before + 5, "{before} threads, then {after}");
    assert_eq!(grown.arrived(), Vec::<Value>::new());
    drop(frozen);
    let answer = grown.next().await;
    assert_eq!(answer["ok"], true, "{answer}");
    assert!(answer.get("refused").is_none(), "{answer}");
    host.run(host.message("more", &sleeper)).await;
    host.stop("more").await;
    host.stop("app").await;
}

#[tokio::test]
async fn a_start_that_cannot_be_recorded_is_refused_and_leaves_nothing() {
    let host = Host::with(tests::Setup {
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    let sleeper = Droplet::sample("sleeper");
    host.run(host.message("old", &sleeper)).await;
    let records = host.base.join("instances").display().to_string();
    let mut exits = host.watch("droplet.exited").await;
    tests::tool("chattr", &["+i", &records]);
    let start = host.message("new", &sleeper);
    let answer = host.request(&host.subject("start"), &start).await;
    exits.next().await;
    // Whoever asks for something else in the same moment gets it.
    let mut second = host.message("old", &sleeper);
    second["index"] = json!(1);
    let update = json!({"droplet": "old", "uris": [], "version": "newer"});
    let asked = [(&*host.subject("start"), second), ("dea.update", update)];
    let answers = host.burst(&asked).await;
    tests::tool("chattr", &["-i", &records]);
    assert_eq!(answers[0]["error"]["code"], "internal", "{answers:?}");
    assert_eq!(answers[1]["ok"], true, "{answers:?}");
    let error = &answer["error"];
    assert_eq!(error["code"], "internal", "{answer}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("could not be recorded"), "{message}");
    let exit = exits.next().await;
    assert_eq!(exit["droplet"], "old", "{exit}");
    assert_eq!(exits.all()[0]["droplet"], "new", "{exit}");
    assert!(exits.all().iter().all(|exit| exit["exit_status"] == -1));
    // It holds nothing, and the next one is another.
    let status = host.request("dea.status", &json!({})).await;
    assert_eq!(status["reserved_memory"], 128, "{status}");
    host.run(start).await;
    assert_eq!(exits.arrived(), Vec::<Value>::new());
    host.stop("new").await;
    host.stop("old").await;
}

#[tokio::test]
async fn what_cannot_be_recorded_is_done_and_not_answered_with_ok_until_it_is() {
    let mut host = Host::with(tests::Setup {
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    let answer = host
        .run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let handle = answer["handle"].as_str().unwrap();
    let records = host.base.join("instances").join(handle);
    let directory = records.display().to_string();
    let update = json!({"droplet": "app", "uris": [], "version": "newer"});
    tests::tool("chattr", &["+i", &directory]);
    let refused = host.request("dea.update", &update).await;
    let again = host.request("dea.update", &update).await;
    tests::tool("chattr", &["-i", &directory]);
    for refused in [refused, again] {
        let error = &refused["error"];
        assert_eq!(error["code"], "internal", "{refused}");
        assert_eq!(error["retryable"], true, "{refused}");
        let words = error["message"].as_str().unwrap();
        assert!(words.contains("could not be recorded"), "{words}");
    }
    // It is what it was told to be, and is recorded as soon as that can be, whether or not anybody asks.
    let found = host
        .request("dea.find.droplet", &json!({"droplet": "app"}))
        .await;
    assert_eq!(found["version"], "newer");
    let newer = |_: &Tree| host.record(handle)["version"] == "newer";
    host.tree_until("a record", newer).await;
    assert_eq!(host.request("dea.update", &update).await["ok"], true);
    host.restart().await;
    let after = host
        .request("dea.find.droplet", &json!({"droplet": "app"}))
        .await;
    assert_eq!(after["instance"], found["instance"]);
    host.stop("app").await;
}

#[tokio::test]
async fn a_repeated_start_can_be_scaled_also_if_its_first_agent_did_not_come_to_that() {
    let mut host = Host::start().await;
    let mut start = host.message("app", &Droplet::sample("sleeper"));
    start["version"] = json!("old");
    host.run(start.clone()).await;
    host.stop("app").await;
    // A controller that changes nothing else.
    start["version"] = json!("new");
    start["request_id"] = json!("once");
    // Whoever would keep what `scale` starts waits at this for ever.
    let stuck = host.base.join("templates/app.json.new");
    tests::tool("mkfifo", &[&stuck.display().to_string()]);
    host.publish(&host.subject("start"), &start).await;
    let mut beats = host.watch("dea.heartbeat").await;
    let runs = |beat: &Value| beat["droplets"][0]["state"] == "RUNNING";
    let first = beats.until("it runs", runs).await;
    host.kill9().await;
    std::fs::remove_file(&stuck).unwrap();
    host.start_agent().await;
    let answer = host.request(&host.subject("start"), &start).await;
    assert_eq!(answer["instance"], first["droplets"][0]["instance"]);
    host.restart().await;
    // What was changed since stays, also what apps read of it.
    let uris = json!(["new.example.net"]);
    let update = json!({"droplet": "app", "uris": uris});
    assert_eq!(host.request("dea.update", &update).await["ok"], true);
    std::fs::remove_dir_all(host.base.join("answers")).unwrap();
    host.restart().await;
    let answer = host.request(&host.subject("start"), &start).await;
    assert_eq!(answer["instance"], first["droplets"][0]["instance"]);
    let template = std::fs::read(host.base.join("templates/app.json")).unwrap();
    let template: Value = serde_json::from_slice(&template).unwrap();
    assert_eq!(template["uris"], uris);
    assert_eq!(template["vcap_application"]["uris"], uris);
    // It listens nowhere.
    let none = json!({"droplet": "app", "uris": []});
    assert_eq!(host.request("dea.update", &none).await["ok"], true);
    let scale = json!({"droplet": "app", "instances": 2, "wait": "running"});
    let scaled = host.request(&host.subject("scale"), &scale).await;
    assert_eq!(scaled["ok"], true, "{scaled}");
    let find = json!({"droplet": "app", "version": "new"});
    assert_eq!(
        host.request(&host.subject("find"), &find).await["matched"],
        2
    );
    host.stop("app").await;
}

#[tokio::test]
async fn an_id_that_cannot_be_read_is_not_replaced() {
    let mut host = Host::start().await;
    host.kill9().await;
    let path = host.base.join("id");
    let id = std::fs::read(&path).unwrap();
    std::fs::write(&path, b"\xff").unwrap();
    host.spawn_agent();
    let ended = host.agent().ended(tests::patience()).await;
    assert!(
        ended.is_some_and(|status| !status.success()),
        "{}",
        host.log()
    );
    host.kill9().await;
    assert_eq!(std::fs::read(&path).unwrap(), b"\xff");
    std::fs::write(&path, id).unwrap();
    host.start_agent().await;
}

#[tokio::test]
async fn what_is_nobodys_is_removed_by_the_second_look() {
    /// Seconds.
    const LOOK: u64 = 3;
    let host = Host::with(tests::Setup {
        config: &[("[intervals]", &format!("[intervals]\norphans = {LOOK}"))],
        ..Default::default()
    })
    .await;
    let answer = host
        .run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let app = answer["handle"].as_str().unwrap();
    // A container that no record knows, with a process; and what bears no handle.
    let (orphan, other) = ("orphan23456", "somebody-elses");
    let log = host.base.with_file_name("sleep.log");
    let process = tests::Running::start(std::path::Path::new("sleep"), &["1000"], &log);
    let groups = ["memory", "pids"].map(|controller| host.group(controller, orphan));
    for group in &groups {
        std::fs::create_dir_all(group).unwrap();
        let pid = process.pid().to_string();
        std::fs::write(group.join("cgroup.procs"), pid).unwrap();
    }
    let containers = host.base.join("containers");
    for name in [orphan, other] {
        std::fs::create_dir_all(containers.join(name).join("jobs")).unwrap();
    }
    let left =
        |_: &Tree| !containers.join(orphan).exists() && groups.iter().all(|group| !group.exists());
    host.tree_until("removal of the orphan", left).await;
    // That was a look. One that comes now is seen by the next, and not removed by it.
    std::fs::create_dir_all(containers.join(orphan)).unwrap();
    let began = Instant::now();
    host.tree_until("removal of another one", left).await;
    let looks = began.elapsed().as_secs_f64() / LOOK as f64;
    assert!(looks > 1.5, "it was there for {looks} intervals");
    let ended = process.ended(tests::patience()).await;
    assert!(!ended.unwrap().success(), "it was killed");
    // What somebody knows, and what is not ours, stays, however often one looks.
    let mut beats = host.watch("dea.heartbeat").await;
    for _ in 0..3 * LOOK {
        beats.next().await;
    }
    assert!(host.tree().one("wshd").lives());
    assert!(containers.join(app).exists());
    std::fs::remove_dir_all(containers.join(other)).unwrap();
    host.stop("app").await;
}
