//! A host that is emptied serves until others have taken its instances' places, and then it ends.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;
use tests::{Droplet, Host, Setup, Tree, Watch, patience};

/// Prints, waits for USR1, then serves on its port; always the same process.
const SLOW: &str = "exec perl -MIO::Socket::INET -e '$0 = \"slowapp\"; $SIG{USR1} = sub { $go = 1 }; $| = 1; print \"up\\n\"; select undef, undef, undef, 0.05 until $go; $s = IO::Socket::INET->new(Listen => 5, LocalPort => $ENV{PORT}) or die; while (1) { $c = $s->accept }'";

/// Hears TERM and lives on.
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 0.1; done";

/// The states in a heartbeat, by droplet.
fn states(beat: &Value) -> Vec<(&str, &str)> {
    let entries = beat["droplets"].as_array().unwrap().iter();
    entries
        .map(|entry| {
            (
                entry["droplet"].as_str().unwrap(),
                entry["state"].as_str().unwrap(),
            )
        })
        .collect()
}

fn signal_app(tree: &Tree, title: &str, signal: Signal) {
    let app = tree.0.iter().find(|process| process.title() == title);
    app.unwrap_or_else(|| panic!("no {title} in\n{tree}"))
        .signal(signal);
}

/// Runs a script under the id `droplet`, and waits until it has said `up`.
async fn up(host: &Host, droplet: &str, script: &str) -> Value {
    let mut output = host.output(droplet).await;
    let mut message = host.message(droplet, &Droplet::shell(script));
    message["uris"] = json!([format!("{droplet}.example.net")]);
    message["request_id"] = json!(droplet);
    let answer = host.request(&host.subject("start"), &message).await;
    assert_eq!(answer["ok"], true, "{answer}");
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    answer
}

/// Asserts that this host offers itself to nobody and takes no start, and that a trigger or a query changes
/// nothing about that. `adverts` was heard out before.
async fn takes_no_starts(host: &Host, adverts: &mut Watch) {
    let mut exits = host.watch("droplet.exited").await;
    let start = host.message("more", &Droplet::sample("sleeper"));
    let answer = host.request(&host.subject("start"), &start).await;
    assert_eq!(answer["error"]["code"], "shutting_down", "{answer}");
    assert_eq!(answer["error"]["retryable"], true, "{answer}");
    let exit = exits
        .until("refusal", |exit| exit["droplet"] == "more")
        .await;
    assert_eq!(exit["exit_status"], -1, "{exit}");
    let fits = json!({"droplet": "more", "limits": {"mem": 1, "disk": 1}});
    let bids = host
        .request_all("dea.discover", &fits, (0, Duration::from_secs(1)))
        .await;
    assert_eq!(bids, Vec::<Value>::new());
    // Heard one after the other: what is said to the first is here before the answer to the second.
    host.publish("dea.locate", &json!({})).await;
    let nobody = json!({"droplet": "nobody"});
    host.request(&host.subject("find"), &nobody).await;
    assert_eq!(adverts.arrived(), Vec::<Value>::new(), "{}", host.log());
}

#[tokio::test]
async fn an_evacuating_host_serves_until_it_is_relieved_whatever_happens_to_its_agent() {
    let mut host = Host::with(Setup {
        // A heartbeat that comes sooner has a reason.
        config: &[("heartbeat = 1", "heartbeat = 3600")],
        ..Default::default()
    })
    .await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let mut beats = host.watch("dea.heartbeat").await;
    let mut adverts = host.watch("dea.advertise").await;
    let mut routes = host.watch("router.register").await;
    let mut unrouted = host.watch("router.unregister").await;
    let mut exits = host.watch("droplet.exited").await;
    let mut serving = host.message("serving", &Droplet::probe());
    serving["uris"] = json!(["serving.example.net"]);
    host.run(serving).await;
    let slow = up(&host, "slow", SLOW).await;
    host.publish("healthmanager.start", &json!({})).await;
    beats
        .until("both", |beat| {
            states(beat) == [("serving", "RUNNING"), ("slow", "STARTING")]
                || states(beat) == [("slow", "STARTING"), ("serving", "RUNNING")]
        })
        .await;
    host.agent().signal(Signal::SIGUSR2);
    let goodbye = goodbyes.next().await;
    assert_eq!(goodbye["id"], host.id);
    adverts.arrived();
    // The first that tells of one tells of all, and it goes on.
    for _ in 0..2 {
        let beat = beats.next().await;
        let told = states(&beat);
        assert_eq!(told.len(), 2, "{beat}");
        assert!(
            told.iter().all(|(_, state)| *state == "EVACUATING"),
            "{beat}"
        );
    }
    let is_of = |droplet: &'static str| {
        move |route: &Value| route["uris"] == json!([format!("{droplet}.example.net")])
    };
    routes.arrived();
    routes.until("route again", is_of("serving")).await;
    takes_no_starts(&host, &mut adverts).await;
    // A second order is none.
    host.agent().signal(Signal::SIGUSR2);
    host.agent().signal(Signal::SIGUSR1);

    let before = host.tree().survivors();
    host.kill9().await;
    beats.arrived();
    goodbyes.arrived();
    host.spawn_agent();
    goodbyes.next().await;
    let beat = beats.next().await;
    assert!(
        states(&beat).len() == 2 && states(&beat).iter().all(|one| one.1 == "EVACUATING"),
        "{beat}"
    );
    host.tree_until("followers", |tree| tree.named("iomux-link").len() == 2)
        .await;
    let after = host.tree();
    assert!(before.is_subset(&after.survivors()), "{before:?}\n{after}");
    assert_eq!(unrouted.arrived(), Vec::<Value>::new());
    routes.arrived();
    routes.until("route again", is_of("serving")).await;
    takes_no_starts(&host, &mut adverts).await;
    // What was starting is finished, and told to whoever waits.
    let mut again = host.message("slow", &Droplet::shell(SLOW));
    again["request_id"] = json!("slow");
    again["wait"] = json!("running");
    let (nats, subject) = (host.nats().clone(), host.subject("start"));
    let asker = tokio::spawn(async move {
        let request = async_nats::Request::new()
            .payload(again.to_string().into())
            .timeout(Some(patience()));
        let answer = nats.send_request(subject, request).await.unwrap();
        serde_json::from_slice::<Value>(&answer.payload).unwrap()
    });
    host.tree().one("slowapp").signal(Signal::SIGUSR1);
    routes.until("new route", is_of("slow")).await;
    let answer = asker.await.unwrap();
    assert_eq!(
        (&answer["ok"], &answer["handle"]),
        (&json!(true), &slow["handle"]),
        "{answer}"
    );
    host.restart().await;
    routes.arrived();
    routes.until("route of the new one", is_of("slow")).await;

    // One that dies is seen to die.
    host.tree().one("ruby").signal(Signal::SIGKILL);
    unrouted.until("route taken back", is_of("serving")).await;
    let exit = exits
        .until("exit", |exit| exit["droplet"] == "serving")
        .await;
    assert_eq!(
        (&exit["reason"], &exit["signal"]),
        (&json!("CRASHED"), &json!(9)),
        "{exit}"
    );
    beats
        .until("crash beside it", |beat| {
            states(beat).contains(&("serving", "CRASHED"))
                && states(beat).contains(&("slow", "EVACUATING"))
        })
        .await;
    // Another host has the other.
    let stop = json!({"droplet": "slow", "wait": "stopped"});
    let answer = host.request("dea.stop", &stop).await;
    assert_eq!(answer["matched"], 1, "{answer}");
    unrouted.until("route taken back", is_of("slow")).await;
    let exit = exits.until("exit", |exit| exit["droplet"] == "slow").await;
    assert_eq!(exit["reason"], "STOPPED", "{exit}");
    let status = host.ended().await;
    assert!(status.success(), "{status}");
    assert_eq!(host.leftovers(), Vec::<String>::new());
    // The next agent is a new life.
    host.start_agent().await;
    adverts.next().await;
    host.run(host.message("more", &Droplet::sample("sleeper")))
        .await;
}

#[tokio::test]
async fn an_evacuation_ends_in_time_also_if_nobody_relieves_it() {
    let mut host = Host::with(Setup {
        config: &[(
            "[network]",
            "[instance]\nstop_grace = 1\n[evacuation]\nbail_out = 2\n[network]",
        )],
        ..Default::default()
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    up(&host, "deaf", DEAF).await;
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    host.agent().signal(Signal::SIGUSR2);
    let status = host.ended().await;
    assert!(status.success(), "{status}");
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let mut told = Vec::new();
    for _ in 0..2 {
        let exit = exits.next().await;
        told.push((exit["droplet"].to_string(), exit["reason"].to_string()));
    }
    assert_eq!(exits.arrived(), Vec::<Value>::new());
    told.sort_unstable();
    let reason = "\"DEA_EVACUATION\"".to_owned();
    let each = ["\"deaf\"", "\"sleeper\""].map(|droplet| (droplet.to_owned(), reason.clone()));
    assert_eq!(told, each, "each once");
}

#[tokio::test]
async fn an_agent_that_is_killed_at_the_very_end_of_an_evacuation_is_not_back_to_serve() {
    let mut host = Host::start().await;
    let mut adverts = host.watch("dea.advertise").await;
    let mut unrouted = host.watch("router.unregister").await;
    let mut exits = host.watch("droplet.exited").await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let mut message = host.message("deaf", &Droplet::shell(DEAF));
    message["stop_grace"] = json!(600);
    host.run(message).await;
    host.tree_until("app", |tree| {
        tree.0.iter().any(|one| one.title() == "bash main.sh")
    })
    .await;
    host.agent().signal(Signal::SIGUSR2);
    goodbyes.next().await;
    host.publish("dea.stop", &json!({"droplet": "deaf"})).await;
    unrouted.next().await;
    let tree = host.tree();
    host.kill9().await;
    adverts.arrived();
    signal_app(&tree, "bash main.sh", Signal::SIGKILL);
    host.tree_until("end of the app", |tree| {
        tree.0.iter().all(|one| one.title() != "bash main.sh")
    })
    .await;
    host.spawn_agent();
    let exit = exits.next().await;
    assert_eq!(exit["reason"], "STOPPED", "{exit}");
    let status = host.ended().await;
    assert!(status.success(), "{status}");
    assert_eq!(adverts.arrived(), Vec::<Value>::new());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn an_evacuated_host_ends_when_the_bus_has_its_last_word() {
    let mut host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    host.run(host.message("app", &Droplet::shell("exec sleep infinity")))
        .await;
    let tree = host
        .tree_until("app", |tree| !tree.named("sleep").is_empty())
        .await;
    host.agent().signal(Signal::SIGUSR2);
    goodbyes.next().await;
    host.stop_bus().await;
    tree.one("sleep").signal(Signal::SIGKILL);
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    // An agent that did not wait for the bus would have ended by now.
    let early = host.agent().ended(Duration::from_secs(6)).await;
    assert_eq!(early, None, "{}", host.log());
    host.start_bus().await;
    let exit = exits.next().await;
    assert_eq!(
        (&exit["reason"], &exit["signal"]),
        (&json!("CRASHED"), &json!(9)),
        "{exit}"
    );
    let status = host.ended().await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_host_that_is_booted_during_its_evacuation_serves_again() {
    let mut host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let mut adverts = host.watch("dea.advertise").await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    host.agent().signal(Signal::SIGUSR2);
    goodbyes.next().await;
    host.kill9().await;
    adverts.arrived();
    host.boot().await;
    let exit = exits.next().await;
    assert_eq!(exit["exit_description"], "host rebooted", "{exit}");
    adverts.next().await;
    host.run(host.message("more", &Droplet::sample("sleeper")))
        .await;
}

#[tokio::test]
async fn a_drain_ends_with_its_agent() {
    let mut host = Host::start().await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let mut adverts = host.watch("dea.advertise").await;
    for kills in [false, true] {
        goodbyes.arrived();
        host.agent().signal(Signal::SIGUSR1);
        goodbyes.next().await;
        adverts.arrived();
        takes_no_starts(&host, &mut adverts).await;
        if kills {
            host.kill9().await;
        } else {
            let status = host.end(Signal::SIGHUP).await;
            assert!(status.success(), "{status}");
        }
        adverts.arrived();
        host.start_agent().await;
        adverts.next().await;
        let sleeper = host.message("app", &Droplet::sample("sleeper"));
        host.run(sleeper).await;
        host.stop("app").await;
    }
}

#[tokio::test]
async fn a_drained_host_offers_itself_to_nobody_and_runs_on() {
    let mut host = Host::start().await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let mut adverts = host.watch("dea.advertise").await;
    let mut beats = host.watch("dea.heartbeat").await;
    let mut exits = host.watch("droplet.exited").await;
    for index in 0..2 {
        let mut message = host.message("app", &Droplet::sample("sleeper"));
        message["index"] = json!(index);
        host.run(message).await;
    }
    host.agent().signal(Signal::SIGUSR1);
    goodbyes.next().await;
    adverts.arrived();
    takes_no_starts(&host, &mut adverts).await;
    beats.arrived();
    let beat = beats.next().await;
    assert_eq!(
        states(&beat),
        [("app", "RUNNING"), ("app", "RUNNING")],
        "{beat}"
    );
    // Less is always possible, more is not.
    let scale = |instances: u64| json!({"droplet": "app", "instances": instances});
    let answer = host.request(&host.subject("scale"), &scale(3)).await;
    assert_eq!(answer["error"]["code"], "shutting_down", "{answer}");
    let answer = host.request(&host.subject("scale"), &scale(1)).await;
    assert_eq!(answer["ok"], true, "{answer}");
    let exit = exits
        .until("exit", |exit| exit["reason"] == "STOPPED")
        .await;
    assert_eq!(exit["index"], 1, "{exit}");
    // Whoever connects anew hears it again.
    host.stop_bus().await;
    host.start_bus().await;
    goodbyes.next().await;
    // More than drained; and an agent that hangs up hands that over.
    host.agent().signal(Signal::SIGUSR2);
    let evacuating = |beat: &Value| states(beat) == [("app", "EVACUATING")];
    beats.until("evacuation", evacuating).await;
    let status = host.end(Signal::SIGHUP).await;
    assert!(status.success(), "{status}");
    beats.arrived();
    host.start_agent().await;
    beats.until("evacuation", evacuating).await;
    assert_eq!(adverts.arrived(), Vec::<Value>::new());
    // An evacuation may be cut short.
    let status = host.end(Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    let exit = exits.until("last exit", |exit| exit["index"] == 0).await;
    assert_eq!(exit["reason"], "DEA_SHUTDOWN", "{exit}");
    host.start_agent().await;
    adverts.next().await;
}

/// Runs an app that is deaf to TERM, with a grace longer than any test.
async fn run_deaf(host: &Host) -> Tree {
    let mut message = host.message("deaf", &Droplet::shell(DEAF));
    message["stop_grace"] = json!(600);
    host.run(message).await;
    let is_there = |tree: &Tree| tree.0.iter().any(|one| one.title() == "bash main.sh");
    host.tree_until("app", is_there).await
}

#[tokio::test]
async fn heartbeats_go_on_as_long_as_a_shutdown_takes() {
    let mut host = Host::start().await;
    let mut unrouted = host.watch("router.unregister").await;
    let mut beats = host.watch("dea.heartbeat").await;
    let tree = run_deaf(&host).await;
    host.agent().signal(Signal::SIGTERM);
    unrouted.next().await;
    beats.arrived();
    for _ in 0..5 {
        beats
            .until("empty one", |beat| beat["droplets"] == json!([]))
            .await;
    }
    signal_app(&tree, "bash main.sh", Signal::SIGKILL);
    let status = host.ended().await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_bus_that_comes_back_during_a_shutdown_hears_the_goodbye_and_every_end() {
    let mut host = Host::start().await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let mut exits = host.watch("droplet.exited").await;
    let tree = run_deaf(&host).await;
    host.stop_bus().await;
    host.agent().signal(Signal::SIGTERM);
    // It is on its way out before there is a bus again.
    let stopping = async {
        while !host.log().contains("STOPPING") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let begun = tokio::time::timeout(patience(), stopping).await;
    begun.expect("it begins to stop");
    host.start_bus().await;
    assert_eq!(goodbyes.next().await["id"], host.id);
    signal_app(&tree, "bash main.sh", Signal::SIGKILL);
    assert_eq!(exits.next().await["reason"], "DEA_SHUTDOWN");
    let status = host.ended().await;
    assert!(status.success(), "{status}");
}
