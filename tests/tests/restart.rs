//! The agent may die at any moment; no instance, no byte and no reason is lost.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tests::{Droplet, Host, Output, Process, Tree, numbered, rounds};

/// Everything that must outlive an agent, by number and birth.
fn survivors(tree: &Tree) -> BTreeSet<(i32, u64, String)> {
    let mortal = ["ostler", "iomux-link", "oom"];
    let lasting = tree
        .0
        .iter()
        .filter(|process| !mortal.contains(&process.comm.as_str()));
    lasting
        .map(
            |Process {
                 pid, started, comm, ..
             }| (*pid, *started, comm.clone()),
        )
        .collect()
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn milliseconds(&mut self, below: u64) -> Duration {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis((self.0 >> 33) % below)
    }
}

/// A directory that goes with it.
struct Scratch(std::path::PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
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
    assert_eq!(survivors(&before), survivors(&after), "\n{before}\n{after}");
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
        let seen = output.stream(0, "stdout").next;
        output
            .until("more", |output| output.stream(0, "stdout").next > seen)
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
async fn hang_up_is_a_goodbye_that_leaves_the_apps() {
    let mut host = Host::start().await;
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    // RUNNING without a port to wait for: the shells may still be on their way to the app.
    let tree = host
        .tree_until("app", |tree| !tree.named("sleep").is_empty())
        .await;
    let before = survivors(&tree);
    let status = host.end(Signal::SIGHUP).await;
    assert!(status.success(), "{status}");
    let alone = host
        .tree_until("end of its followers", |tree| {
            tree.named("iomux-link").is_empty()
        })
        .await;
    assert_eq!(survivors(&alone), before);
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
                    .timeout(Some(Duration::from_secs(5)));
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
    let mut host = Host::start().await;
    let mut message = host.message("app", &Droplet::sample("sinatra"));
    message["uris"] = json!(["app.example.net"]);
    let handle = host.run(message).await["handle"]
        .as_str()
        .unwrap()
        .to_owned();
    let find = json!({"droplet": "app", "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    let address = format!("127.0.0.1:{}", found["stats"]["port"]);
    host.kill9().await;
    let record = host
        .base
        .join("instances")
        .join(&handle)
        .join("record.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"format\":1", "\"format\":2")).unwrap();
    host.start_agent().await;
    assert!(
        host.log().contains("a record cannot be used"),
        "{}",
        host.log()
    );
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
    host.stop("app").await;
}

#[tokio::test]
async fn a_host_has_one_agent() {
    let mut host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let status = host.clean().await;
    assert!(!status.success(), "it would take the agent's apps away");
    assert!(
        host.log().contains("is the agent of this host"),
        "{}",
        host.log()
    );
    // Also with a base directory of its own.
    let base = host.base.with_file_name("other");
    let status = host.end_of_second_agent(&base).await;
    assert!(!status.success());
    assert!(host.tree().one("wshd").lives());
    host.stop("app").await;
    let _ = host.restart().await;
}

#[tokio::test]
async fn a_start_that_was_cut_off_before_its_job_begins_again() {
    let real = std::env::var("OSTLER_HELPERS").expect("the runner says where the helpers are");
    let helpers = std::env::temp_dir().join(format!("ostler-helpers-{}", std::process::id()));
    std::fs::create_dir(&helpers).unwrap();
    // Dropped after the host, also if the test fails.
    let _scratch = Scratch(helpers.clone());
    for helper in ["wshd", "wsh", "iomux-link", "oom"] {
        std::fs::copy(format!("{real}/{helper}"), helpers.join(helper)).unwrap();
    }
    // A supervisor that takes its time: the job has its directory, and nobody has begun it.
    let spawn = helpers.join("iomux-spawn");
    std::fs::write(&spawn, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    std::fs::set_permissions(&spawn, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let own = helpers.to_str().unwrap();
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
    host.stop("app").await;
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
    let before = survivors(&host.tree());
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
        for droplet in ["old", "new"] {
            let find = json!({"droplet": droplet, "include_stats": true});
            let found = host
                .request_all("dea.find.droplet", &find, Duration::from_millis(500))
                .await;
            ports.extend(found.iter().map(|one| one["stats"]["port"].as_u64()));
        }
        assert_eq!(ports.len(), 15, "round {round}: a port each: {ports:?}");
        host.stop("new").await;
        host.tree_until("the old ones alone", |tree| tree.named("wshd").len() == 12)
            .await;
    }
    let after = survivors(&host.tree());
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
            .request_all("dea.find.droplet", &find, Duration::from_millis(300))
            .await;
        assert!(found.len() <= 1, "{found:?}");
        host.stop(&droplet).await;
        host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
            .await;
    }
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
    let status = host.clean().await;
    assert!(status.success(), "{status}\n{}", host.log());
    assert_eq!(host.leftovers(), Vec::<String>::new());
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
