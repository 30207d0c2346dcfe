//! What bad input gets: an answer or an exit that says what was wrong and where, and an unharmed agent.

use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tar_entry::{DEVICE, DIRECTORY, FILE, LINK, SYMLINK};
use tests::{Body, Droplet, Host, patience};

/// Kinds of tar entries, by the letters of the format.
mod tar_entry {
    pub(super) const FILE: u8 = b'0';
    pub(super) const LINK: u8 = b'1';
    pub(super) const SYMLINK: u8 = b'2';
    pub(super) const DEVICE: u8 = b'3';
    pub(super) const DIRECTORY: u8 = b'5';
}

/// Sends a start that must be refused; gives the error's code and message.
async fn refused(host: &Host, message: &str) -> (String, String) {
    let answer = host.request_bytes(&host.subject("start"), message).await;
    let body: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(body["ok"], false, "{message}: {body}");
    let error = &body["error"];
    assert!(error["retryable"].is_boolean(), "{body}");
    let headers = answer.headers.expect("an error has headers");
    let code: u16 = headers
        .get("Nats-Service-Error-Code")
        .unwrap()
        .as_str()
        .parse()
        .unwrap();
    assert!((400..600).contains(&code), "{code}");
    assert!(
        !headers
            .get("Nats-Service-Error")
            .unwrap()
            .as_str()
            .is_empty()
    );
    (
        error["code"].as_str().unwrap().to_owned(),
        error["message"].as_str().unwrap().to_owned(),
    )
}

#[tokio::test]
async fn a_bad_start_message_is_refused_with_the_reason() {
    let host = Host::start().await;
    let good = host.message("good", &Droplet::sample("sleeper"));
    for broken in ["", "{", "[]", "7", "\u{0}", "{\"droplet\":"] {
        let (code, message) = refused(&host, broken).await;
        assert!(!code.is_empty() && !message.is_empty(), "{broken:?}");
    }
    for required in [
        "droplet",
        "index",
        "version",
        "name",
        "limits",
        "services",
        "cc_partition",
    ] {
        let mut bad = good.clone();
        bad.as_object_mut().unwrap().remove(required);
        let (_, message) = refused(&host, &bad.to_string()).await;
        assert!(
            message.contains(required),
            "{required} is missing: {message}"
        );
    }
    for (field, value, word) in [
        ("droplet", json!("a.b"), "droplet"),
        ("droplet", json!(""), "droplet"),
        ("droplet", json!("x".repeat(129)), "droplet"),
        ("droplet", json!("*"), "droplet"),
        ("droplet", json!([]), "droplet"),
        ("index", json!("0"), "index"),
        ("index", json!(-1), "index"),
        ("index", json!(2_147_483_648_u64), "index"),
        ("uris", json!("a.example.net"), "uris"),
        ("version", json!("v".repeat(65)), "version"),
        ("cc_partition", json!("\u{1}".repeat(20)), "cc_partition"),
        ("limits", json!({"mem": 128, "disk": 256}), "fds"),
        (
            "limits",
            json!({"mem": "128", "disk": 256, "fds": 1024}),
            "mem",
        ),
        ("limits", json!({"mem": 0, "disk": 256, "fds": 1024}), "mem"),
        ("services", json!({}), "services"),
        ("services", json!([{"label": "no name"}]), "name"),
        ("env", json!("A=b"), "env"),
        ("stack", json!("cflinuxfs2"), "cflinuxfs2"),
        ("sha1", json!("../../etc/passwd"), "sha1"),
    ] {
        let mut bad = good.clone();
        bad[field] = value.clone();
        let (_, message) = refused(&host, &bad.to_string()).await;
        assert!(message.contains(word), "{field} = {value}: {message}");
    }
    // Nothing of all that is there, and the agent works.
    let found = host
        .request_all(
            "dea.find.droplet",
            &json!({"droplet": "good"}),
            (0, Duration::from_millis(300)),
        )
        .await;
    assert_eq!(found, Vec::<Value>::new());
    host.run(good).await;
    host.stop("good").await;
}

#[tokio::test]
async fn a_start_without_room_is_refused_and_told() {
    let host = Host::with(tests::Setup {
        config: &[("memory_mb = 4096", "memory_mb = 300")],
        ..Default::default()
    })
    .await;
    let sleeper = Droplet::sample("sleeper");
    let mut exits = host.watch("droplet.exited").await;
    host.run(host.message("first", &sleeper)).await;
    host.run(host.message("second", &sleeper)).await;
    let (code, message) = refused(&host, &host.message("third", &sleeper).to_string()).await;
    assert_eq!(code, "not_enough_memory");
    assert!(
        message.contains("256 of 300 MB"),
        "how much there is: {message}"
    );
    let exit = exits.next().await;
    assert_eq!(exit["droplet"], "third");
    assert_eq!(exit["reason"], "CRASHED");
    assert_eq!(exit["exit_status"], -1);
    assert_eq!(
        exit["exit_description"],
        "Not enough memory resource available."
    );
    let mut big = host.message("big", &sleeper);
    big["limits"]["mem"] = json!(16);
    big["limits"]["disk"] = json!(99999);
    assert_eq!(refused(&host, &big.to_string()).await.0, "not_enough_disk");
    assert_eq!(
        exits.next().await["exit_description"],
        "Not enough disk resource available."
    );
    // What fits exactly fits; what is freed is free.
    let mut rest = host.message("rest", &sleeper);
    rest["limits"]["mem"] = json!(44);
    host.run(rest).await;
    host.stop("first").await;
    host.run(host.message("third", &sleeper)).await;
    for droplet in ["second", "third", "rest"] {
        host.stop(droplet).await;
    }
}

/// On a host with two places of a kind, for which there is a word.
async fn a_third_is_refused(pool: (&str, &str), word: &str) {
    let host = Host::with(tests::Setup {
        config: &[pool],
        ..Default::default()
    })
    .await;
    let sleeper = Droplet::sample("sleeper");
    host.run(host.message("first", &sleeper)).await;
    host.run(host.message("second", &sleeper)).await;
    // Refused, not accepted and then failed; more than once: a refusal uses nothing up.
    for _ in 0..3 {
        let (code, why) = refused(&host, &host.message("third", &sleeper).to_string()).await;
        assert_eq!(code, "host_full", "{why}");
        assert!(why.contains(word), "{why}");
    }
    let more = json!({"droplet": "first", "instances": 3});
    let answer = host.request(&host.subject("scale"), &more).await;
    assert_eq!(answer["error"]["code"], "host_full", "{answer}");
    assert_eq!(host.tree().named("wshd").len(), 2);
    let first = json!({"droplet": "first"});
    let found = host.request("dea.find.droplet", &first).await;
    assert_eq!(found["state"], "RUNNING");
    host.stop("first").await;
    host.stop("second").await;
}

#[tokio::test]
async fn a_start_without_a_port_is_refused_and_harms_no_other() {
    let ports = ("[network]", "[network]\nports = \"61001-61002\"");
    a_third_is_refused(ports, "no free port: 2 in use").await;
}

#[tokio::test]
async fn a_start_without_an_address_is_refused_and_harms_no_other() {
    let addresses = ("10.254.0.0/16", "10.254.0.0/29");
    a_third_is_refused(addresses, "no free address: 2 in use").await;
}

#[tokio::test]
async fn a_heartbeat_tells_of_all_instances_within_what_the_bus_takes() {
    let config = std::env::temp_dir().join(format!("ostler-payload-{}", std::process::id()));
    std::fs::write(&config, "max_payload: 2000\n").unwrap();
    let host = Host::with(tests::Setup {
        bus: &["--config", config.to_str().unwrap()],
        ..Default::default()
    })
    .await;
    std::fs::remove_file(&config).unwrap();
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let message = |index: usize| {
        let mut message = host.message("app", &Droplet::sample("sleeper"));
        message["index"] = json!(index);
        message["version"] = json!("v".repeat(64));
        message["limits"] = json!({"mem": 16, "disk": 16, "fds": 64});
        message
    };
    let mut count = 0;
    let why = loop {
        let start = message(count);
        let answer = host.request(&host.subject("start"), &start).await;
        if answer["ok"] == false {
            break answer["error"].clone();
        }
        count += 1;
    };
    assert_eq!(why["code"], "host_full", "{why}");
    assert!(why["message"].as_str().unwrap().contains("2000"), "{why}");
    assert!(count >= 6, "{count} instances in 2000 bytes");
    let told = |beat: &Value, state: &str| {
        let entries = beat["droplets"].as_array().unwrap().iter();
        entries.filter(|entry| entry["state"] == state).count()
    };
    heartbeats
        .until("all of them", |beat| told(beat, "RUNNING") == count)
        .await;
    // All of them in one answer are more than the bus takes: that is the answer.
    let find = json!({"droplet": "app"});
    let found = host.request(&host.subject("find"), &find).await;
    assert_eq!(found["error"]["code"], "too_large", "{found}");
    // What crashed is told, until its place is wanted.
    host.tree().named("wshd")[0].signal(nix::sys::signal::Signal::SIGKILL);
    heartbeats
        .until("a crash", |beat| {
            (told(beat, "RUNNING"), told(beat, "CRASHED")) == (count - 1, 1)
        })
        .await;
    host.run(message(count)).await;
    heartbeats
        .until("a crash less", |beat| told(beat, "RUNNING") == count)
        .await;
    let (code, _) = refused(&host, &message(count + 1).to_string()).await;
    assert_eq!(code, "host_full");
    host.stop("app").await;
}

/// Starts `message`, which is accepted and then fails; gives `exit_description`.
async fn fails(host: &Host, message: &Value) -> String {
    let mut exits = host.watch("droplet.exited").await;
    host.publish(&host.subject("start"), message).await;
    let exit = exits
        .until("exit of it", |exit| exit["droplet"] == message["droplet"])
        .await;
    assert_eq!(exit["reason"], "CRASHED", "{exit}");
    assert!(exit["crash_timestamp"].is_u64(), "{exit}");
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    exit["exit_description"].as_str().unwrap().to_owned()
}

/// A host with this limit of what a download may take.
async fn with_limit(limit: &str) -> Host {
    let limits = format!("[droplets]\n{limit}\n[network]");
    Host::with(tests::Setup {
        config: &[("[network]", &limits)],
        ..Default::default()
    })
    .await
}

/// Starts a droplet that is served as this, which fails with a description that has these words.
async fn fails_with(host: &Host, name: &str, body: Body, words: &str) {
    let mut message = host.message(name, &Droplet::sample("sleeper"));
    message["executableUri"] = json!(host.files.put(name, body));
    let why = fails(host, &message).await;
    assert!(why.contains(words), "{name}: {why}");
}

#[tokio::test]
async fn a_step_of_a_start_that_is_refused_is_told_with_its_cause() {
    let stack = std::env::temp_dir().join(format!("ostler-test-stack-{}", std::process::id()));
    std::fs::create_dir_all(stack.join("etc")).unwrap();
    let users = "root:x:0:0::/root:/bin/sh\nvcap:x:1000:1000::/home/vcap:/bin/sh\n";
    std::fs::write(stack.join("etc/passwd"), users).unwrap();
    // A file in the place of a directory.
    std::fs::write(stack.join("proc"), "").unwrap();
    let stacks = format!("[stacks]\nbroken = {stack:?}");
    let host = Host::with(tests::Setup {
        config: &[("[stacks]", &stacks)],
        ..Default::default()
    })
    .await;
    let mut message = host.message("app", &Droplet::sample("sleeper"));
    message["stack"] = json!("broken");
    let why = fails(&host, &message).await;
    std::fs::remove_dir_all(&stack).unwrap();
    assert!(why.contains("refused ") && why.contains("ENOTDIR"), "{why}");
    let why = why.trim_start_matches("failed to start: ");
    host.logged(0, &why.replace('"', "\\\"")).await;
}

/// Each on a host with that limit alone: where the other is long, a pause of the machine is not taken for it.
#[tokio::test]
async fn a_droplet_that_takes_too_long_is_a_crash_that_says_why() {
    let host = with_limit("inactivity = 1").await;
    fails_with(&host, "silent", Body::Silent, "0 bytes").await;
    drop(host);
    let host = with_limit("total = 3").await;
    let bytes = Droplet::sample("sleeper").0;
    let slow = Body::Slow(bytes, Duration::from_secs(60));
    fails_with(&host, "slow", slow, "3s").await;
}

#[tokio::test]
async fn a_droplet_that_cannot_be_had_is_a_crash_that_says_why() {
    let host = with_limit("max_mb = 1").await;
    let sleeper = Droplet::sample("sleeper");
    for (name, body, words) in [
        ("absent", Body::Status(404), "404"),
        ("broken", Body::Status(500), "500"),
        ("endless", Body::Endless, "1048576 bytes"),
    ] {
        fails_with(&host, name, body, words).await;
    }
    let mut nobody = host.message("nobody", &sleeper);
    nobody["executableUri"] = json!("http://127.0.0.1:9/x.tgz");
    assert!(fails(&host, &nobody).await.contains("127.0.0.1:9"));
    for (name, url, word) in [
        ("nowhere", json!(null), "executableUri"),
        ("strange", json!("gopher://x/y"), "gopher"),
    ] {
        let mut message = host.message(name, &sleeper);
        message["executableUri"] = url;
        let why = fails(&host, &message).await;
        assert!(why.contains(word), "{why}");
    }
    let mut wrong = host.message("wrong", &sleeper);
    wrong["sha1"] = json!("3f786850e387550fdab836ed7e6dc881de23001b");
    let why = fails(&host, &wrong).await;
    assert!(
        why.contains("3f786850e387550fdab836ed7e6dc881de23001b") && why.contains(&sleeper.sha1()),
        "{why}"
    );
    let noise = Droplet(b"this is no gzip".to_vec());
    assert!(
        !fails(&host, &host.message("noise", &noise))
            .await
            .is_empty()
    );
    let torn = Droplet(sleeper.0[..sleeper.0.len() / 2].to_vec());
    assert!(!fails(&host, &host.message("torn", &torn)).await.is_empty());
    host.run(host.message("fine", &sleeper)).await;
    host.stop("fine").await;
}

#[tokio::test]
async fn a_hostile_droplet_writes_nowhere() {
    let host = Host::start().await;
    let target = "/tmp/ostler-planted";
    for (name, kind, path, link) in [
        ("dots", FILE, "../../../../../../tmp/ostler-planted", ""),
        ("absolute", FILE, "/tmp/ostler-planted", ""),
        (
            "middle",
            FILE,
            "./app/../../../../../../tmp/ostler-planted",
            "",
        ),
        ("device", DEVICE, "./app/null", ""),
        ("hard", LINK, "./app/shadow", "/etc/shadow"),
        ("hard-up", LINK, "./app/shadow", "../../../../etc/shadow"),
        ("folder", DIRECTORY, "../../outside", ""),
    ] {
        let droplet = Droplet::with_entry(kind, path, link);
        let why = fails(&host, &host.message(name, &droplet)).await;
        assert!(
            why.contains(path.rsplit('/').next().unwrap()),
            "{name}: it names the entry: {why}"
        );
        assert!(!std::path::Path::new(target).exists(), "{name} got out");
    }
    // A link may point anywhere; writing through it may not.
    let through = Droplet::of_entries(&[
        (SYMLINK, "./app/out", "/tmp"),
        (FILE, "./app/out/ostler-planted", ""),
    ]);
    fails(&host, &host.message("through", &through)).await;
    assert!(!std::path::Path::new(target).exists());
}

#[tokio::test]
async fn an_app_that_cannot_run_is_a_crash_that_says_why() {
    let host = Host::start().await;
    let mut absent = host.message("absent", &Droplet::sample("sleeper"));
    absent["start_command"] = json!("exec /no/such/program");
    assert!(!fails(&host, &absent).await.is_empty());
    let silent =
        Droplet::of_entries(&[(DIRECTORY, "./app/", ""), (FILE, "./staging_info.yml", "")]);
    assert_eq!(
        fails(&host, &host.message("silent", &silent)).await,
        "missing start command"
    );
}

#[tokio::test]
async fn a_stop_for_nobody_is_answered() {
    let host = Host::start().await;
    for subject in ["dea.stop".to_owned(), host.subject("stop")] {
        let answer = host.request(&subject, &json!({"droplet": "nobody"})).await;
        assert_eq!(answer["ok"], true, "{answer}");
    }
    for broken in [
        "{",
        "[]",
        "{\"droplet\":\"a\",\"indices\":7}",
        "{\"droplet\":\"a\",\"states\":[\"FLYING\"]}",
    ] {
        let answer = host.request_bytes(&host.subject("stop"), broken).await;
        let body: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(body["ok"], false, "{broken}: {body}");
    }
    let strange = host.request(&host.subject("restart"), &json!({})).await;
    assert_eq!(strange["error"]["code"], "bad_subject", "{strange}");
    assert!(strange.to_string().contains("scale"), "{strange}");
    // Broadcasts that nobody can read harm nobody.
    for subject in [
        "dea.stop",
        "dea.find.droplet",
        "dea.update",
        "router.start",
        "dea.status",
        "dea.discover",
    ] {
        host.nats()
            .publish(subject, "{\"droplet\":".into())
            .await
            .unwrap();
    }
    host.run(host.message("fine", &Droplet::sample("sleeper")))
        .await;
    host.stop("fine").await;
}

#[tokio::test]
async fn a_repeated_request_acts_once() {
    let mut host = Host::start().await;
    let mut message = host.message("once", &Droplet::sample("sleeper"));
    message["request_id"] = json!("r-1");
    let first = host.run(message.clone()).await;
    assert_eq!(
        host.run(message.clone()).await["instance"],
        first["instance"]
    );
    host.restart().await;
    assert_eq!(
        host.run(message.clone()).await["instance"],
        first["instance"]
    );
    message["request_id"] = json!("r-2");
    assert_ne!(
        host.run(message).await["instance"],
        first["instance"],
        "without it a start is one more instance"
    );
    host.stop("once").await;
}

#[tokio::test]
async fn a_flood_of_broken_commands_is_none_of_the_log() {
    let host = Host::start().await;
    let before = host.logged(0, "").await.lines().count();
    for number in 0..10_000 {
        let (subject, body) = match number % 4 {
            0 => (host.subject("start"), "{"),
            1 => (host.subject("start"), "{\"droplet\":1}"),
            2 => (host.subject("nothing"), "{}"),
            _ => ("dea.stop".to_owned(), "[]"),
        };
        host.nats().publish(subject, body.into()).await.unwrap();
    }
    // It has taken all of them before it answers.
    let found = json!({"droplet": "none"});
    assert_eq!(
        host.request(&host.subject("find"), &found).await["ok"],
        true
    );
    // Each place in the code has a line of its own for what was left out.
    let told = |log: &str| -> u64 {
        let numbers = log
            .lines()
            .filter_map(|line| line.split_once("left_out=")?.1.split(' ').next());
        numbers.map(|number| number.parse::<u64>().unwrap()).sum()
    };
    let deadline = Instant::now() + patience();
    let log = loop {
        let log = host.logged(0, "more lines of one kind were left out").await;
        if told(&log) > 9000 {
            break log;
        }
        assert!(Instant::now() < deadline, "{}\n{log}", told(&log));
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let lines = log.lines().count() - before;
    assert!(lines < 100, "{lines} lines\n{log}");
}

#[tokio::test]
async fn a_secret_of_a_start_is_in_no_log_and_no_exit() {
    const SECRET: &str = "s3cret-of-an-app";
    let host = Host::with(tests::Setup {
        agent_env: &[("RUST_LOG", "debug")],
        ..Default::default()
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    let sleeper = Droplet::sample("sleeper");
    let pair = format!("PASSWORD={SECRET}");
    let credentials = json!({"name": "db", "label": "db", "credentials": {"password": SECRET}});
    let mut right = host.message("right", &sleeper);
    right["env"] = json!([pair]);
    right["services"] = json!([credentials]);
    right["vcap_application"] = json!({"key": SECRET});
    let url = right["executableUri"].as_str().unwrap().to_owned();
    right["executableUri"] = json!(url.replace("http://", &format!("http://me:{SECRET}@")));
    host.run(right.clone()).await;
    host.stop("right").await;
    for (field, wrong) in [
        ("env", json!(pair)),
        ("env", json!([{"PASSWORD": SECRET}])),
        ("env", json!([SECRET])),
        ("env", json!([format!("A={SECRET}\0")])),
        ("services", json!(SECRET)),
        ("services", json!([SECRET])),
        ("services", json!([{"name": {"x": SECRET}, "label": "db"}])),
        ("services", json!([{"name": "db", "label": [SECRET]}])),
        ("vcap_application", json!(SECRET)),
        ("vcap_application", json!([SECRET])),
        ("executableUri", json!([SECRET])),
        (
            "executableUri",
            json!(format!("http://me:{SECRET}@127.0.0.1:1/x.tgz")),
        ),
        ("executableUri", json!(format!("http://me:{SECRET}@"))),
        ("executableUri", json!(format!("ftp://me:{SECRET}@h/x"))),
        ("executableUri", json!(SECRET)),
    ] {
        let mut message = right.clone();
        message["droplet"] = json!("wrong");
        // Of another package, so that it must be fetched.
        message["sha1"] = json!("0000000000000000000000000000000000000000");
        message[field] = wrong;
        host.publish(&host.subject("start"), &message).await;
        let exit = exits
            .until("an exit", |exit| exit["droplet"] == "wrong")
            .await;
        assert_eq!(exit["exit_status"], -1, "{field}: {exit}");
    }
    host.publish(
        &host.subject("start"),
        &json!({"droplet": "cut", "env": [SECRET]}),
    )
    .await;
    host.stop("right").await;
    let log = host.logged(0, "").await;
    assert!(!log.contains(SECRET), "{log}");
    for exit in exits.all() {
        assert!(!exit.to_string().contains(SECRET), "{exit}");
    }
}
