//! The DEA protocol as its callers know it: the reference's own messages, and everything said when it must be.
//!
//! Most hosts here have no timer: what is heard was caused.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Instant;
use tests::{Body, Droplet, Host, Process, Setup, Watch};

/// The app of the reference, and its version.
const APP: &str = "5c1f7a0e-33d2-4b68-9a3f-0c6c7f1b2a91";
const V1: &str = "b7f0c2de-8f1e-4c55-8d0b-6a1e0f9d4c22";
const V2: &str = "0f9d4c22-8f1e-4c55-8d0b-b7f0c2de6a1e";

/// Listens on its port at once.
const WEB: &str = "exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 9, LocalPort => $ENV{PORT}, ReuseAddr => 1) or die; while (1) { $c = $s->accept }'";

/// Ignores TERM.
const DEAF: &str = "trap '' TERM; exec sleep 1000";

async fn quiet() -> Host {
    Host::with(Setup {
        config: &[Setup::NO_TIMER],
        ..Default::default()
    })
    .await
}

/// A start of `script` under the id `droplet`; with URIs it must open its port.
fn app(host: &Host, droplet: &str, script: &str, uris: &[&str]) -> Value {
    let mut message = host.message(droplet, &Droplet::shell(script));
    message["uris"] = json!(uris);
    message
}

/// The entries of `droplet` in a heartbeat.
fn entries<'a>(beat: &'a Value, droplet: &str) -> Vec<&'a Value> {
    let all = beat["droplets"].as_array().unwrap().iter();
    all.filter(|entry| entry["droplet"] == droplet).collect()
}

/// Whether a heartbeat has one instance of `droplet`, in this state.
fn has(beat: &Value, droplet: &str, state: &str) -> bool {
    matches!(entries(beat, droplet)[..], [one] if one["state"] == state)
}

/// The only instance of `droplet`, as its host tells of it.
async fn the_one(host: &Host, droplet: &str) -> Value {
    let find = json!({"droplet": droplet});
    let found = host.request(&host.subject("find"), &find).await;
    assert_eq!(found["matched"], 1, "{found}");
    found["instances"][0].clone()
}

/// What was said before this has arrived, and is forgotten.
async fn hush(host: &Host, watches: &mut [&mut Watch]) {
    host.request("dea.status", &json!({})).await;
    for watch in watches {
        watch.arrived();
    }
}

/// Whatever the reference's message has, ours has in the same place, of the same type.
#[track_caller]
fn like(ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, value) in theirs {
                like(
                    ours.get(key)
                        .unwrap_or_else(|| panic!("no {key} in {ours:?}")),
                    value,
                );
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            if let (Some(ours), Some(theirs)) = (ours.first(), theirs.first()) {
                like(ours, theirs);
            }
        }
        (ours, theirs) => assert_eq!(
            std::mem::discriminant(ours),
            std::mem::discriminant(theirs),
            "{ours} for {theirs}"
        ),
    }
}

#[tokio::test]
async fn the_references_own_messages_are_understood_and_answered() {
    let mut host = quiet().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut registered = host.watch("router.register").await;
    let mut unregistered = host.watch("router.unregister").await;
    let mut exits = host.watch("droplet.exited").await;
    for index in 0..4 {
        let mut message = host.message(APP, &Droplet::sample("sleeper"));
        message["index"] = json!(index);
        host.run(message).await;
    }
    let find = Host::fixture_text("dea.find.droplet-request");
    // What an instance uses is left out while it is too busy to tell.
    let whole = |found: &[Value]| found.iter().all(|one| one["stats"]["usage"].is_object());
    let deadline = Instant::now() + tests::patience();
    let found = loop {
        let found = host.request_many("dea.find.droplet", &find, 4).await;
        if whole(&found) || Instant::now() > deadline {
            break found;
        }
    };
    for answer in &found {
        like(answer, &Host::fixture("dea.find.droplet-reply"));
    }
    let name = &Host::fixture("droplet.status-reply")["name"];
    for status in host.request_many("droplet.status", "", 4).await {
        assert_eq!(status, json!({"name": name, "uris": []}));
    }
    let status = host.request("dea.status", &json!({})).await;
    like(&status, &Host::fixture("dea.status-reply"));
    let discover = Host::fixture_text("dea.discover");
    let offer = &host.request_many("dea.discover", &discover, 1).await[0];
    let mut hello = Host::fixture("dea.hello");
    // Of a file server, and there is none.
    hello.as_object_mut().unwrap().remove("port");
    like(offer, &hello);

    hush(
        &host,
        &mut [&mut heartbeats, &mut registered, &mut unregistered],
    )
    .await;
    let update = Host::fixture_text("dea.update");
    host.publish_bytes("dea.update", &update).await;
    for _ in 0..4 {
        let route = registered.next().await;
        like(&route, &Host::fixture("router.register"));
        assert_eq!(route["uris"], json!(["orders.apps.example.net"]));
    }
    like(&heartbeats.next().await, &Host::fixture("dea.heartbeat"));
    hush(&host, &mut [&mut registered]).await;
    let router = Host::fixture_text("router.start");
    host.publish_bytes("router.start", &router).await;
    for _ in 0..4 {
        like(&registered.next().await, &Host::fixture("router.register"));
    }

    let mut advertised = host.watch("dea.advertise").await;
    host.publish_bytes("dea.locate", "").await;
    let advertisement = advertised.next().await;
    like(&advertisement, &Host::fixture("dea.advertise"));
    assert_eq!(advertisement["app_id_to_count"], json!({APP: 4}));

    let mut told = Host::fixture("droplet.exited");
    told.as_object_mut().unwrap().remove("crash_timestamp");
    let scale_down = Host::fixture_text("dea.stop-scale-down");
    host.publish_bytes("dea.stop", &scale_down).await;
    let mut gone = [exits.next().await, exits.next().await];
    gone.sort_by_key(|exit| exit["index"].as_u64());
    for (exit, index) in gone.iter().zip([2, 3]) {
        like(exit, &told);
        assert_eq!(
            (&exit["index"], &exit["reason"]),
            (&json!(index), &json!("STOPPED"))
        );
        like(
            &unregistered.next().await,
            &Host::fixture("router.register"),
        );
    }
    let one = found.iter().find(|answer| answer["index"] == 1).unwrap();
    let mut stop = Host::fixture("dea.stop-instance");
    stop["instances"] = json!([one["instance"]]);
    host.publish("dea.stop", &stop).await;
    assert_eq!(exits.next().await["instance"], one["instance"]);
    let stop = Host::fixture_text("dea.stop-app");
    host.publish_bytes("dea.stop", &stop).await;
    assert_eq!(exits.next().await["index"], 0);

    host.publish(&host.subject("start"), &app(&host, APP, "exit 3", &[]))
        .await;
    let exit = exits.next().await;
    like(&exit, &Host::fixture("droplet.exited"));
    assert_eq!(
        (&exit["reason"], &exit["exit_status"]),
        (&json!("CRASHED"), &json!(3))
    );
    let mut goodbyes = host.watch("dea.shutdown").await;
    like(&host.restart().await, &hello);
    host.end(Signal::SIGTERM).await;
    like(&goodbyes.next().await, &Host::fixture("dea.shutdown"));
}

/// The URIs of these messages about `droplet`, sorted.
fn uris(messages: &[Value], droplet: &str) -> Vec<String> {
    let of_app = messages.iter().filter(|message| message["app"] == droplet);
    let uris = of_app.flat_map(|message| message["uris"].as_array().unwrap());
    let mut uris: Vec<String> = uris.map(|uri| uri.as_str().unwrap().to_owned()).collect();
    uris.sort();
    uris
}

/// Updates `droplet` twice, the second time without a version, looks for what there is by the new version, and stops
/// what has the old one and then what has the new one: all in one piece. The new id; `matched` of the last stop is
/// `stopped`.
async fn update_and_stop(host: &Host, droplet: &str, stopped: u64) -> String {
    let answers = host
        .burst(&[
            (
                "dea.update",
                json!({"droplet": droplet, "uris": ["b", "c"], "version": V2}),
            ),
            (
                "dea.update",
                json!({"droplet": droplet, "uris": ["c", "d"]}),
            ),
            (
                "dea.find.droplet",
                json!({"droplet": droplet, "version": V2, "include_stats": true}),
            ),
            ("dea.stop", json!({"droplet": droplet, "version": V1})),
            ("dea.stop", json!({"droplet": droplet, "version": V2})),
        ])
        .await;
    let matched: Vec<&Value> = answers.iter().map(|answer| &answer["matched"]).collect();
    let wanted = [json!(1), json!(1), json!(null), json!(0), json!(stopped)];
    assert_eq!(matched, wanted.iter().collect::<Vec<_>>(), "{answers:?}");
    let found = &answers[2];
    assert_eq!(
        (&found["droplet"], &found["version"]),
        (&json!(droplet), &json!(V2))
    );
    let id = found["instance"].as_str().unwrap();
    assert_eq!(found["staged"], format!("/{id}"));
    if found["state"] == "RUNNING" {
        assert_eq!(found["stats"]["uris"], json!(["c", "d"]), "{found}");
    }
    if stopped == 1 {
        assert_eq!(answers[4]["instances"], json!([id]), "{answers:?}");
    }
    id.to_owned()
}

/// Of all heartbeats about `droplet`, the first with a new version.
async fn told_of_update(
    heartbeats: &mut Watch,
    (droplet, version): (&str, &str),
    state: &str,
    id: &str,
) {
    let beat = heartbeats
        .until(
            "new version",
            |beat| matches!(entries(beat, droplet)[..], [one] if one["version"] == version),
        )
        .await;
    let entry = entries(&beat, droplet)[0];
    assert_eq!(
        (&entry["instance"], &entry["state"]),
        (&json!(id), &json!(state))
    );
}

/// An update is told in a heartbeat without its timer. (What follows it within 100 ms would be in the same one.)
async fn told_at_once(host: &Host, heartbeats: &mut Watch, droplet: &str, state: &str) {
    let update = json!({"droplet": droplet, "uris": ["a", "b"], "version": "between"});
    assert_eq!(host.request("dea.update", &update).await["matched"], 1);
    let id = the_one(host, droplet).await["instance"].clone();
    let told = (droplet, "between");
    told_of_update(heartbeats, told, state, id.as_str().unwrap()).await;
}

async fn ended(exits: &mut Watch, droplet: &str, id: &str) {
    let exit = exits.until("exit", |exit| exit["droplet"] == droplet).await;
    let told = (&exit["instance"], &exit["version"], &exit["reason"]);
    assert_eq!(told, (&json!(id), &json!(V2), &json!("STOPPED")));
}

#[tokio::test]
async fn an_update_is_stored_in_every_state() {
    let host = quiet().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut registered = host.watch("router.register").await;
    let mut unregistered = host.watch("router.unregister").await;
    let mut exits = host.watch("droplet.exited").await;
    let start = host.subject("start");

    // Just accepted, and downloading.
    let silent = host.files.put("silent.tgz", Body::Silent);
    let mut born = app(&host, "born", "", &["a", "b"]);
    born["executableUri"] = json!(silent);
    host.publish(&start, &born).await;
    let old = the_one(&host, "born").await;
    let id = update_and_stop(&host, "born", 1).await;
    assert_ne!(old["instance"], id);
    ended(&mut exits, "born", &id).await;

    // Its app runs and has not opened its port yet.
    let starting = app(&host, "starting", "exec sleep 1000", &["a", "b"]);
    let mut output = host.output("starting").await;
    let mut script = starting.clone();
    script["start_command"] = json!("echo up; exec sleep 1000");
    host.publish(&start, &script).await;
    output
        .until("its app", |output| output.text(0, "stdout") == "up\n")
        .await;
    assert_eq!(the_one(&host, "starting").await["state"], "STARTING");
    told_at_once(&host, &mut heartbeats, "starting", "STARTING").await;
    let id = update_and_stop(&host, "starting", 1).await;
    ended(&mut exits, "starting", &id).await;

    let running = host.run(app(&host, "running", WEB, &["a", "b"])).await;
    told_at_once(&host, &mut heartbeats, "running", "RUNNING").await;
    let id = update_and_stop(&host, "running", 1).await;
    assert_ne!(running["instance"], id);
    ended(&mut exits, "running", &id).await;

    // Told to stop, and deaf.
    let mut deaf = app(&host, "deaf", DEAF, &[]);
    deaf["stop_grace"] = json!(600);
    let old = host.run(deaf).await;
    let tree = host
        .tree_until("deaf app", |tree| tree.named("sleep").len() == 1)
        .await;
    host.publish("dea.stop", &json!({"droplet": "deaf", "version": V1}))
        .await;
    let stopping = json!({"droplet": "deaf", "states": ["STOPPING"]});
    while host.request(&host.subject("find"), &stopping).await["matched"] == 0 {}
    let id = update_and_stop(&host, "deaf", 1).await;
    assert_ne!(old["instance"], id);
    let found = the_one(&host, "deaf").await;
    assert_eq!(
        (&found["state"], &found["instance"]),
        (&json!("STOPPING"), &json!(id))
    );
    assert!(tree.one("sleep").lives());
    tree.one("sleep").signal(Signal::SIGKILL);
    ended(&mut exits, "deaf", &id).await;

    host.publish(&start, &app(&host, "crashed", "exit 1", &["a", "b"]))
        .await;
    let exit = exits.next().await;
    assert_eq!(
        (&exit["droplet"], &exit["reason"]),
        (&json!("crashed"), &json!("CRASHED"))
    );
    let id = update_and_stop(&host, "crashed", 0).await;
    assert_ne!(exit["instance"], id);
    told_of_update(&mut heartbeats, ("crashed", V2), "CRASHED", &id).await;

    // A router was told of one app only: of what it had, of each difference, and at last that it is gone.
    hush(&host, &mut [&mut registered, &mut unregistered, &mut exits]).await;
    assert_eq!(uris(registered.all(), "running"), ["a", "b", "c", "d"]);
    assert_eq!(uris(unregistered.all(), "running"), ["a", "b", "c", "d"]);
    for droplet in ["born", "starting", "deaf", "crashed"] {
        let routes = [registered.all(), unregistered.all()].concat();
        assert_eq!(uris(&routes, droplet), Vec::<String>::new(), "{droplet}");
    }
    assert_eq!(exits.all().len(), 5, "one exit each: {:?}", exits.all());
}

#[tokio::test]
async fn what_was_updated_before_it_ran_comes_up_with_the_new_routes() {
    let host = quiet().await;
    let mut registered = host.watch("router.register").await;
    let late = format!("trap go=1 USR1\necho up\nwhile [ -z \"$go\" ]; do sleep 0.05; done\n{WEB}");
    let mut output = host.output("late").await;
    let message = app(&host, "late", &late, &["old.example.net"]);
    let old = host.request(&host.subject("start"), &message).await;
    output
        .until("its app", |output| output.text(0, "stdout") == "up\n")
        .await;
    let update = json!({"droplet": "late", "uris": ["new.example.net"], "version": V2});
    let answer = host.request("dea.update", &update).await;
    assert_eq!(answer["matched"], 1, "{answer}");
    let tree = host.tree();
    let waits = |process: &&Process| process.title() == "bash main.sh";
    tree.0.iter().find(waits).unwrap().signal(Signal::SIGUSR1);
    assert_eq!(registered.next().await["uris"], json!(["new.example.net"]));
    let found = the_one(&host, "late").await;
    assert_eq!(found["version"], V2);
    assert_ne!(found["instance"], old["instance"]);
    // What a scale adds is like what there is.
    let two = json!({"droplet": "late", "instances": 2});
    let scaled = host.request(&host.subject("scale"), &two).await;
    let added = json!({"droplet": "late", "version": V2, "indices": [1]});
    let found = host.request("dea.find.droplet", &added).await;
    assert_eq!(found["instance"], scaled["started"][0]["instance"]);
    host.stop("late").await;
}

#[tokio::test]
async fn an_app_that_loses_its_uris_while_it_starts_need_not_listen_any_more() {
    let host = quiet().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut exits = host.watch("droplet.exited").await;
    let mut registered = host.watch("router.register").await;
    let mute = app(&host, "mute", "exec sleep 1000", &["mute.example.net"]);
    host.publish(&host.subject("start"), &mute).await;
    host.tree_until("its app", |tree| tree.named("sleep").len() == 1)
        .await;
    let one = json!({"droplet": "mute", "uris": ["other.example.net"]});
    assert_eq!(host.request("dea.update", &one).await["matched"], 1);
    assert_eq!(the_one(&host, "mute").await["state"], "STARTING");
    let none = json!({"droplet": "mute", "uris": []});
    assert_eq!(host.request("dea.update", &none).await["matched"], 1);
    heartbeats
        .until("RUNNING", |beat| has(beat, "mute", "RUNNING"))
        .await;
    host.stop("mute").await;
    assert_eq!(exits.next().await["reason"], "STOPPED");
    registered.next().await;
    assert_eq!(uris(registered.all(), "mute"), Vec::<String>::new());
}

#[tokio::test]
async fn an_answered_update_is_never_lost() {
    let mut host = quiet().await;
    let mut exits = host.watch("droplet.exited").await;
    host.run(app(&host, "running", WEB, &["a"])).await;
    let mut deaf = app(&host, "deaf", DEAF, &[]);
    deaf["stop_grace"] = json!(600);
    host.run(deaf).await;
    // It is deaf by then.
    host.tree_until("sleep", |tree| tree.named("sleep").len() == 1)
        .await;
    host.publish(
        &host.subject("start"),
        &app(&host, "crashed", "exit 1", &[]),
    )
    .await;
    exits.next().await;
    let stop = json!({"droplet": "deaf"});
    let answer = host.request("dea.stop", &stop).await;
    assert_eq!(answer["matched"], 1, "{answer}");
    let mut told = Vec::new();
    for droplet in ["running", "deaf", "crashed"] {
        let update = json!({"droplet": droplet, "uris": ["b"], "version": V2});
        let answer = host.request("dea.update", &update).await;
        assert_eq!(answer["matched"], 1, "{droplet}: {answer}");
        told.push((droplet, the_one(&host, droplet).await["instance"].clone()));
    }
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut registered = host.watch("router.register").await;
    host.restart().await;
    for (droplet, id) in &told {
        let found = the_one(&host, droplet).await;
        assert_eq!(
            (&found["version"], &found["instance"]),
            (&json!(V2), id),
            "{droplet}"
        );
    }
    assert_eq!(registered.next().await["uris"], json!(["b"]));
    let beat = heartbeats.next().await;
    assert!(
        has(&beat, "running", "RUNNING") && has(&beat, "crashed", "CRASHED"),
        "{beat}"
    );
    host.tree().one("sleep").signal(Signal::SIGKILL);
    ended(&mut exits, "deaf", told[1].1.as_str().unwrap()).await;
    host.stop("running").await;
}

#[tokio::test]
async fn a_host_says_at_once_what_somebody_waits_for() {
    let mut host = quiet().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut advertised = host.watch("dea.advertise").await;
    let mut registered = host.watch("router.register").await;
    let mut hellos = host.watch("dea.start").await;
    let running = |beat: &Value| has(beat, "web", "RUNNING");

    host.run(app(&host, "web", WEB, &["web.example.net"])).await;
    let beat = heartbeats.until("RUNNING", running).await;
    let since = entries(&beat, "web")[0]["state_timestamp"].clone();
    assert_eq!(registered.next().await["uris"], json!(["web.example.net"]));
    advertised
        .until("less memory", |one| one["available_memory"] == 4096 - 128)
        .await;

    hush(
        &host,
        &mut [&mut heartbeats, &mut advertised, &mut registered],
    )
    .await;
    // The bodies of triggers may be empty.
    host.publish_bytes("dea.locate", "").await;
    advertised.next().await;
    host.publish_bytes("healthmanager.start", "").await;
    assert!(running(&heartbeats.next().await));
    host.publish_bytes("router.start", "").await;
    registered.next().await;
    hush(
        &host,
        &mut [&mut heartbeats, &mut advertised, &mut registered],
    )
    .await;

    // A bus that comes back knows nobody; the host that it hears of is not new.
    host.stop_bus().await;
    host.start_bus().await;
    assert!(running(&heartbeats.next().await));
    assert_eq!(advertised.next().await["id"], host.id);
    assert_eq!(registered.next().await["uris"], json!(["web.example.net"]));
    assert_eq!(hellos.arrived(), Vec::<Value>::new());

    hush(
        &host,
        &mut [&mut heartbeats, &mut advertised, &mut registered],
    )
    .await;
    host.restart().await;
    let beat = heartbeats.until("RUNNING", running).await;
    assert_eq!(
        entries(&beat, "web")[0]["state_timestamp"],
        since,
        "nothing began anew"
    );
    assert_eq!(advertised.next().await["available_memory"], 4096 - 128);
    assert_eq!(registered.next().await["uris"], json!(["web.example.net"]));
    hush(&host, &mut [&mut hellos]).await;
    assert_eq!(hellos.all().len(), 1, "{:?}", hellos.all());
    host.stop("web").await;
    advertised
        .until("all memory", |one| one["available_memory"] == 4096)
        .await;
}

#[tokio::test]
async fn whatever_ends_an_agent_for_good_tells_of_each_instance() {
    let mut host = quiet().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        host.publish(
            &host.subject("start"),
            &app(&host, "crashed", "exit 1", &[]),
        )
        .await;
        assert_eq!(exits.next().await["droplet"], "crashed");
        host.run(app(&host, "runs", "exec sleep 1000", &[])).await;
        let silent = host.files.put("silent.tgz", Body::Silent);
        let mut starting = app(&host, "starts", "", &[]);
        starting["executableUri"] = json!(silent);
        host.request(&host.subject("start"), &starting).await;
        let status = host.end(signal).await;
        assert!(status.success(), "{signal}: {status}\n{}", host.log());
        let mut told = [exits.next().await, exits.next().await];
        told.sort_by_key(|exit| exit["droplet"].to_string());
        for (exit, droplet) in told.iter().zip(["runs", "starts"]) {
            assert_eq!(exit["droplet"], droplet, "{signal}: {exit}");
            assert_eq!(exit["reason"], "DEA_SHUTDOWN", "{signal}: {exit}");
        }
        let goodbye = goodbyes.next().await;
        assert_eq!(goodbye["id"], host.id);
        assert_eq!(
            goodbye["app_id_to_count"],
            json!({"crashed": 1, "runs": 1, "starts": 1})
        );
        assert_eq!(host.leftovers(), Vec::<String>::new());
        host.start_agent().await;
        assert_eq!(exits.arrived(), Vec::<Value>::new(), "told once");
    }
}

#[tokio::test]
async fn a_stop_reaches_every_state_and_nothing_comes_after_it() {
    let host = quiet().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut registered = host.watch("router.register").await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let start = host.subject("start");
    let stop = |droplet: &str| json!({"droplet": droplet});

    // Accepted a moment ago: in one piece with its start.
    let born = app(&host, "born", WEB, &["a"]);
    let answers = host
        .burst(&[(&start, born), ("dea.stop", stop("born"))])
        .await;
    assert_eq!(answers[1]["instances"], json!([answers[0]["instance"]]));
    let exit = exits.next().await;
    assert_eq!(
        (&exit["droplet"], &exit["reason"]),
        (&json!("born"), &json!("STOPPED"))
    );

    // With a health check that goes on for 90 s.
    let mut output = host.output("starting").await;
    let starting = app(&host, "starting", "echo up; exec sleep 1000", &["a"]);
    host.publish(&start, &starting).await;
    output
        .until("its app", |output| output.text(0, "stdout") == "up\n")
        .await;
    let others = json!({"droplet": "starting", "states": ["running", "stopping"]});
    assert_eq!(host.request("dea.stop", &others).await["matched"], 0);
    let nothing = json!({"droplet": "starting", "states": [null]});
    assert_eq!(host.request("dea.stop", &nothing).await["matched"], 0);
    let found = host.request("dea.find.droplet", &nothing).await;
    assert_eq!(
        found["state"], "STARTING",
        "no filter where something is only found"
    );
    let those = json!({"droplet": "starting", "states": ["starting", null], "wait": "stopped"});
    assert_eq!(host.request("dea.stop", &those).await["matched"], 1);
    assert_eq!(exits.next().await["reason"], "STOPPED");

    // Stopping already, and not to be hurried: each is answered, and it is stopped once.
    let mut deaf = app(&host, "deaf", DEAF, &[]);
    deaf["stop_grace"] = json!(600);
    host.run(deaf).await;
    let tree = host
        .tree_until("deaf app", |tree| tree.named("sleep").len() == 1)
        .await;
    for _ in 0..3 {
        let answer = host.request("dea.stop", &stop("deaf")).await;
        assert_eq!(answer["matched"], 1, "{answer}");
    }
    hush(&host, &mut [&mut heartbeats]).await;
    host.publish_bytes("healthmanager.start", "").await;
    assert_eq!(heartbeats.next().await["droplets"], json!([]));
    tree.one("sleep").signal(Signal::SIGKILL);
    assert_eq!(exits.next().await["reason"], "STOPPED");

    host.publish(&start, &app(&host, "crashed", "exit 1", &[]))
        .await;
    assert_eq!(exits.next().await["reason"], "CRASHED");
    for droplet in ["starting", "crashed", "nobody"] {
        let answer = host.request("dea.stop", &stop(droplet)).await;
        assert_eq!(answer["matched"], 0, "{droplet}: {answer}");
        assert_eq!(answer["instances"], json!([]), "{droplet}: {answer}");
    }
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    hush(&host, &mut [&mut exits, &mut registered]).await;
    assert_eq!(exits.all().len(), 4, "{:?}", exits.all());
    for droplet in ["born", "starting"] {
        assert_eq!(uris(registered.all(), droplet), Vec::<String>::new());
    }
}

#[tokio::test]
async fn of_an_app_the_newest_crash_is_kept() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    for (droplet, index) in [("app", 0), ("app", 1), ("other", 0), ("app", 2)] {
        let mut message = app(&host, droplet, "exit 1", &[]);
        message["index"] = json!(index);
        host.publish(&host.subject("start"), &message).await;
        exits.next().await;
    }
    let kept = |beat: &Value| {
        let of = |droplet| entries(beat, droplet);
        matches!(of("app")[..], [one] if one["index"] == 2) && of("other").len() == 1
    };
    heartbeats.until("newest crash alone", kept).await;
    let crashed = json!({"droplet": "app", "states": ["CRASHED"]});
    let found = host.request("dea.find.droplet", &crashed).await;
    assert_eq!(found["index"], 2);
}

#[tokio::test]
async fn a_crash_is_forgotten_when_its_time_is_over() {
    let host = Host::with(Setup {
        config: &[("[network]", "[instance]\ncrash_lifetime = 3\n[network]")],
        ..Default::default()
    })
    .await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut advertised = host.watch("dea.advertise").await;
    host.publish(&host.subject("start"), &app(&host, "app", "exit 1", &[]))
        .await;
    let beat = heartbeats
        .until("crash", |beat| has(beat, "app", "CRASHED"))
        .await;
    let since = entries(&beat, "app")[0]["state_timestamp"].as_f64();
    heartbeats
        .until("none", |beat| entries(beat, "app").is_empty())
        .await;
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    assert!(
        now.as_secs_f64() - since.unwrap() >= 3.0,
        "{since:?} {now:?}"
    );
    advertised
        .until("none", |one| one["app_id_to_count"] == json!({}))
        .await;
}

/// Brings its own `./startup`, and says in a file that it runs once it is told to.
const OLD: &[(&str, &str)] = &[
    (
        "./startup",
        "#!/bin/bash\ntrap go=1 USR1\necho own in $PWD\nuntil [ \"$go\" ]; do sleep 0.05; done\n\
         echo '{\"state\": \"RUNNING\"}' >state.json\nexec sleep 1000\n",
    ),
    ("./droplet.yaml", "---\nstate_file: state.json\n"),
];

#[tokio::test]
async fn an_old_droplet_starts_itself_and_says_by_a_file_that_it_runs() {
    let host = quiet().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut output = host.output("old").await;
    let mut message = host.message("old", &Droplet::of_files(OLD));
    // It never opens its port, and the command is for droplets that were staged.
    (message["uris"], message["start_command"]) = (json!(["old.example.net"]), json!("exit 9"));
    // Nor is this meant for it: a file has five minutes.
    message["health_check_timeout"] = json!(1);
    host.publish(&host.subject("start"), &message).await;
    output
        .until("its own words", |output| {
            output.text(0, "stdout") == "own in /home/vcap\n"
        })
        .await;
    host.publish_bytes("healthmanager.start", "").await;
    heartbeats
        .until("STARTING", |beat| has(beat, "old", "STARTING"))
        .await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let tree = host
        .tree_until("script alone", |tree| tree.named("startup").len() == 1)
        .await;
    tree.one("startup").signal(Signal::SIGUSR1);
    heartbeats
        .until("RUNNING", |beat| has(beat, "old", "RUNNING"))
        .await;
    host.stop("old").await;
}

#[tokio::test]
async fn a_numeric_app_is_one_and_what_a_start_lacks_is_told() {
    let host = quiet().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let sleeper = Droplet::sample("sleeper");
    let mut message = host.message("17", &sleeper);
    message["droplet"] = json!(17);
    assert_eq!(host.run(message.clone()).await["droplet"], "17");
    heartbeats
        .until("RUNNING", |beat| has(beat, "17", "RUNNING"))
        .await;
    let answer = host.request("dea.stop", &json!({"droplet": 17})).await;
    assert_eq!(answer["matched"], 1, "{answer}");
    assert_eq!(exits.next().await["droplet"], "17");

    for (field, code) in [
        ("sha1", "bad_field"),
        ("executableUri", "bad_field"),
        ("stack", "unknown_stack"),
    ] {
        let mut lacks = host.message("app", &sleeper);
        lacks[field] = Value::Null;
        let absent = {
            let mut absent = lacks.clone();
            absent.as_object_mut().unwrap().remove(field);
            absent
        };
        for lacks in [lacks, absent] {
            let answer = host.request(&host.subject("start"), &lacks).await;
            assert_eq!(answer["error"]["code"], code, "{field}: {answer}");
            let exit = exits.next().await;
            assert_eq!(
                (&exit["reason"], &exit["exit_status"]),
                (&json!("CRASHED"), &json!(-1))
            );
        }
    }
    // What no health manager could read is not said.
    for (field, value, told) in [
        ("index", json!(2_147_483_648_u64), None),
        ("version", json!("v".repeat(65)), Some(("version", ""))),
        (
            "cc_partition",
            json!("\u{1}".repeat(20)),
            Some(("cc_partition", "default")),
        ),
    ] {
        let mut wrong = host.message("wrong", &sleeper);
        wrong[field] = value;
        let answer = host.request(&host.subject("start"), &wrong).await;
        assert_eq!(answer["error"]["code"], "bad_field", "{field}: {answer}");
        if let Some((field, told)) = told {
            assert_eq!(exits.next().await[field], told);
        }
    }
    hush(&host, &mut [&mut exits]).await;
    let wrong = |exit: &&Value| exit["droplet"] == "wrong";
    assert_eq!(
        exits.all().iter().filter(wrong).count(),
        2,
        "{:?}",
        exits.all()
    );
}
