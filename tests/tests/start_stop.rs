//! From a command on the bus to a running app that answers, and back to an empty machine.

use futures_util::StreamExt;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests::{Body, Droplet, Host, Network, Process, Setup, get, patience, rounds};

/// The keys of a JSON object, sorted.
fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

/// An app that opens its port after two seconds, and says so when it is told to stop.
fn slow_to_open() -> Droplet {
    Droplet::shell(
        r#"sleep 2
exec perl -MIO::Socket::INET -e '
  $| = 1;
  $SIG{TERM} = sub { print "told to stop\n"; exit 0 };
  my $listener = IO::Socket::INET->new(LocalPort => $ENV{PORT}, Listen => 9, ReuseAddr => 1) or die "bind: $!";
  print "listening\n";
  while (1) { my $client = $listener->accept or next; close $client }
'
"#,
    )
}

#[tokio::test]
async fn a_web_app_starts_answers_and_stops() {
    let host = Host::start().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut registered = host.watch("router.register").await;
    let mut unregistered = host.watch("router.unregister").await;
    let mut output = host.output("sinatra").await;

    let mut message = host.message("sinatra", &Droplet::sample("sinatra"));
    message["uris"] = json!(["sinatra.example.net"]);
    let answer = host.run(message).await;
    assert_eq!(answer["instance"].as_str().unwrap().len(), 32);

    let route = registered.next().await;
    assert_eq!(
        keys(&route),
        [
            "app",
            "dea",
            "host",
            "port",
            "private_instance_id",
            "private_instance_index",
            "tags",
            "uris"
        ]
    );
    assert_eq!(route["dea"], host.id);
    assert_eq!(route["app"], "sinatra");
    assert_eq!(route["uris"], json!(["sinatra.example.net"]));
    assert_eq!(route["host"], Network::HOST);
    assert_eq!(route["private_instance_index"], "0");
    assert_eq!(route["private_instance_id"].as_str().unwrap().len(), 64);
    assert!(
        route["tags"]["component"]
            .as_str()
            .unwrap()
            .starts_with("dea-")
    );
    let port = route["port"].as_u64().unwrap();

    let beat = heartbeats
        .until("RUNNING", |beat| beat["droplets"][0]["state"] == "RUNNING")
        .await;
    assert_eq!(keys(&beat), ["dea", "droplets"]);
    assert_eq!(beat["dea"], host.id);
    let entry = &beat["droplets"][0];
    assert_eq!(
        keys(entry),
        [
            "cc_partition",
            "droplet",
            "index",
            "instance",
            "state",
            "state_timestamp",
            "version"
        ]
    );
    assert_eq!(entry["cc_partition"], "default");
    assert_eq!(entry["droplet"], "sinatra");
    assert_eq!(entry["version"], Host::fixture("dea.start")["version"]);
    assert_eq!(entry["index"], 0);
    assert_eq!(entry["instance"], answer["instance"]);
    assert!(entry["state_timestamp"].is_number());

    // On the host's address, on loopback, and from another machine.
    for address in [Network::HOST, "127.0.0.1"] {
        let (status, body) = get(&format!("{address}:{port}"), "/").await.unwrap();
        let facts: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200);
        assert_eq!(facts["index"], 0);
        assert_eq!(facts["port"], port);
        assert_eq!(facts["user"], 2000);
        assert_eq!(facts["home"], "/home/vcap/app");
        assert_eq!(facts["memory_limit"], "128m");
        assert_eq!(facts["address"], format!("{}:{port}", Network::HOST));
    }
    assert_eq!(
        host.network.get_from_outside(port, "/env/PORT"),
        (200, port.to_string())
    );

    get(&format!("127.0.0.1:{port}"), "/lines/3").await.unwrap();
    output
        .until("lines on both streams", |output| {
            output.text(0, "stdout").ends_with("out 1\nout 2\nout 3\n")
                && output.text(0, "stderr").ends_with("err 1\nerr 2\nerr 3\n")
        })
        .await;
    assert!(
        output
            .text(0, "stdout")
            .contains("sinatra: instance 0 boots")
    );

    host.publish("dea.stop", &json!({"droplet": "sinatra"}))
        .await;
    let gone = unregistered.next().await;
    for key in ["dea", "app", "uris", "host", "port", "private_instance_id"] {
        assert_eq!(gone[key], route[key], "{key}");
    }
    heartbeats
        .until("empty one", |beat| beat["droplets"] == json!([]))
        .await;
    host.tree_until("empty machine", |tree| {
        tree.named("wshd").is_empty() && tree.named("iomux-spawn").is_empty()
    })
    .await;
    assert!(get(&format!("127.0.0.1:{port}"), "/").await.is_err());
}

#[tokio::test]
async fn an_instance_is_starting_until_its_port_accepts() {
    let host = Host::start().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let mut registered = host.watch("router.register").await;
    let mut message = host.message("slow", &slow_to_open());
    message["uris"] = json!(["slow.example.net"]);
    let answer = host.request(&host.subject("start"), &message).await;
    assert_eq!(answer["ok"], true, "{answer}");

    heartbeats
        .until("STARTING", |beat| {
            beat["droplets"][0]["state"] == "STARTING"
        })
        .await;
    assert_eq!(registered.arrived(), Vec::<Value>::new());
    heartbeats
        .until("RUNNING", |beat| beat["droplets"][0]["state"] == "RUNNING")
        .await;
    registered.next().await;
    // And again, by its interval and when a router asks.
    registered.next().await;
    host.publish(
        "router.start",
        &json!({"id": "r1", "hosts": [], "minimumRegisterIntervalInSeconds": 20}),
    )
    .await;
    registered.next().await;
    host.stop("slow").await;
}

#[tokio::test]
async fn a_port_that_never_opens_is_a_crash() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut message = host.message("mute", &Droplet::shell("sleep infinity"));
    message["uris"] = json!(["mute.example.net"]);
    message["health_check_timeout"] = json!(1);
    host.publish(&host.subject("start"), &message).await;
    let exit = exits.next().await;
    assert_eq!(exit["reason"], "CRASHED");
    assert_eq!(
        exit["exit_description"],
        "failed to accept connections within health check timeout"
    );
    host.tree_until("end of the container", |tree| tree.named("wshd").is_empty())
        .await;
    assert_eq!(exits.arrived(), Vec::<Value>::new());
}

#[tokio::test]
async fn a_slow_download_is_no_part_of_the_time_that_a_port_may_take() {
    let host = Host::start().await;
    let listens = "exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 9, LocalPort => $ENV{PORT}) or die; while (1) { $s->accept }'";
    let droplet = Droplet::shell(listens);
    let mut message = host.message("slow", &droplet);
    message["uris"] = json!(["slow.example.net"]);
    message["health_check_timeout"] = json!(7);
    let slow = Body::Slow(droplet.0, Duration::from_secs(10));
    message["executableUri"] = json!(host.files.put("slow.tgz", slow));
    // Nor does one that is stopped meanwhile end as something that ran.
    let mut exits = host.watch("droplet.exited").await;
    let mut other = message.clone();
    other["droplet"] = json!("other");
    host.request(&host.subject("start"), &other).await;
    host.stop("other").await;
    let exit = exits.next().await;
    assert_eq!(exit["exit_description"], "stopped before it ran", "{exit}");
    host.run(message).await;
    host.stop("slow").await;
}

#[tokio::test]
async fn an_app_that_ends_before_its_port_opens_has_its_own_end() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    for (script, status) in [("exit 3", 3), ("exec no-such-program", 127)] {
        let mut message = host.message("early", &Droplet::shell(script));
        message["uris"] = json!(["early.example.net"]);
        host.publish(&host.subject("start"), &message).await;
        let exit = exits.next().await;
        assert_eq!(exit["reason"], "CRASHED");
        assert_eq!(exit["exit_status"], status, "{exit}");
        assert_eq!(exit["exit_description"], "app instance exited");
    }
}

#[tokio::test]
async fn a_droplet_is_unpacked_outside_of_its_apps_memory() {
    let host = Host::start().await;
    let large = "0123456789abcdef".repeat(4 << 20);
    let droplet = Droplet::of_files(&[
        ("./app/large", &large),
        ("./staging_info.yml", "start_command: sleep infinity\n"),
    ]);
    let mut message = host.message("small", &droplet);
    // By its other digest, for once.
    message["sha1"] = Value::Null;
    message["sha256"] = json!(droplet.sha256());
    message["limits"]["mem"] = json!(24);
    host.run(message).await;
    host.stop("small").await;
}

/// An app with this name that opens its port, closes it after USR1, and lives on.
fn going_deaf(name: &str) -> Droplet {
    let script = r#"exec perl -MIO::Socket::INET -e '
  $0 = "NAME";
  $| = 1;
  my $deaf;
  $SIG{USR1} = sub { $deaf = 1 };
  my $listener = IO::Socket::INET->new(LocalPort => $ENV{PORT}, Listen => 9, ReuseAddr => 1) or die "bind: $!";
  until ($deaf) { my $client = $listener->accept or next; close $client }
  close $listener;
  print "deaf\n";
  sleep 1 while 1;
'
"#;
    Droplet::shell(&script.replace("NAME", name))
}

#[tokio::test]
async fn an_app_that_stops_listening_is_a_crash_with_its_own_reason_where_that_is_looked_at() {
    let mut host = Host::with(Setup {
        config: &[("[network]", "[instance]\nliveness_interval = 1\n[network]")],
        ..Default::default()
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    let mut unregistered = host.watch("router.unregister").await;
    // Without a route its port was never waited for: it need not have one.
    host.run(host.message("worker", &Droplet::sample("sleeper")))
        .await;
    // This one had a route, and a port, and has neither any more.
    let mut message = host.message("changed", &going_deaf("changed"));
    message["uris"] = json!(["changed.example.net"]);
    host.run(message).await;
    host.request("dea.update", &json!({"droplet": "changed", "uris": []}))
        .await;
    unregistered.next().await;
    host.tree().one("changed").signal(Signal::SIGUSR1);

    let mut output = host.output("deaf").await;
    let mut message = host.message("deaf", &going_deaf("deaf"));
    message["uris"] = json!(["deaf.example.net"]);
    let answer = host.run(message).await;
    // The next agent looks on, and as often as would be enough if it found nobody.
    host.restart().await;
    let mut beats = host.watch("dea.heartbeat").await;
    for _ in 0..6 {
        beats.next().await;
    }
    assert_eq!(exits.arrived(), Vec::<Value>::new());

    host.tree().one("deaf").signal(Signal::SIGUSR1);
    let exit = exits.next().await;
    assert_eq!(exit["droplet"], "deaf");
    assert_eq!(exit["reason"], "CRASHED");
    assert_eq!(exit["exit_description"], "stopped listening on its port");
    assert_eq!(exit["instance"], answer["instance"]);
    assert_eq!(
        (&exit["exit_status"], &exit["signal"]),
        (&json!(137), &json!(9))
    );
    unregistered
        .until("its route", |route| {
            route["uris"] == json!(["deaf.example.net"])
        })
        .await;
    output
        .until("last word", |output| output.text(0, "stdout") == "deaf\n")
        .await;
    assert_eq!(exits.arrived(), Vec::<Value>::new());
    host.stop("worker").await;
    host.stop("changed").await;
}

/// An app with this name that opens its port, and ends with 3 after USR1; with `rest`, it leaves a child behind.
fn going_away(name: &str, rest: bool) -> Droplet {
    let script = r#"exec perl -MIO::Socket::INET -e '
  $0 = "NAME";
  if (REST and not fork) { $0 = "rest"; sleep 1 while 1 }
  $SIG{USR1} = sub { exit 3 };
  my $listener = IO::Socket::INET->new(LocalPort => $ENV{PORT}, Listen => 9, ReuseAddr => 1) or die "bind: $!";
  while (1) { my $client = $listener->accept or next; close $client }
'
"#;
    let rest = if rest { "1" } else { "0" };
    Droplet::shell(&script.replace("NAME", name).replace("REST", rest))
}

#[tokio::test]
async fn an_end_of_its_own_says_more_than_a_port_that_closed_with_it() {
    let host = Host::with(Setup {
        config: &[("[network]", "[instance]\nliveness_interval = 1\n[network]")],
        ..Default::default()
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    for (name, rest) in [("alone", false), ("parent", true)] {
        let mut message = host.message(name, &going_away(name, rest));
        message["uris"] = json!([format!("{name}.example.net")]);
        host.run(message).await;
        // What it leaves behind bears its name at first.
        let tree = host
            .tree_until("the app", |tree| {
                tree.named("rest").len() == usize::from(rest) && tree.named(name).len() == 1
            })
            .await;
        let app = tree.one(name).clone();
        // As on a machine that is slow: the port is closed, and nobody has told of the end.
        let mut init = app.clone();
        while init.comm != "wshd" {
            init = Process::read(init.ppid).unwrap();
        }
        init.signal(Signal::SIGSTOP);
        app.signal(Signal::SIGUSR1);
        let mut beats = host.watch("dea.heartbeat").await;
        let in_state = |beat: &Value, state: &str| {
            let entries = beat["droplets"].as_array().unwrap();
            entries
                .iter()
                .any(|one| one["droplet"] == name && one["state"] == state)
        };
        if rest {
            // Whoever is left could listen, and does not.
            beats
                .until("its end", |beat| in_state(beat, "CRASHED"))
                .await;
        } else {
            // Nobody is left: its end must be on its way. Twice as many looks as would be enough.
            for _ in 0..6 {
                let beat = beats.next().await;
                assert!(in_state(&beat, "RUNNING"), "{beat}");
            }
        }
        assert_eq!(exits.arrived(), Vec::<Value>::new());
        init.signal(Signal::SIGCONT);
        let exit = exits.next().await;
        assert_eq!(
            (&exit["droplet"], &exit["exit_status"]),
            (&json!(name), &json!(3))
        );
        assert_eq!(exit["reason"], "CRASHED");
        assert_ne!(
            exit["exit_description"], "stopped listening on its port",
            "{exit}"
        );
    }
}

#[tokio::test]
async fn whatever_an_app_has_started_has_its_grace_too() {
    let host = Host::start().await;
    let mut output = host.output("app").await;
    let mut exits = host.watch("droplet.exited").await;
    // The shell ends at once by the TERM that all are sent.
    let script = r#"perl -e '
  $| = 1;
  $SIG{TERM} = sub { sleep 2; print "drained\n"; exit };
  print "up\n";
  sleep 1 while 1' &
wait
"#;
    host.run(host.message("app", &Droplet::shell(script))).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    host.stop("app").await;
    output
        .until("last line", |output| {
            output.text(0, "stdout") == "up\ndrained\n"
        })
        .await;
    let exit = exits.next().await;
    assert_eq!(
        (&exit["reason"], &exit["exit_status"]),
        (&json!("STOPPED"), &json!(143))
    );
}

/// A shell loses the TERM that comes to a child between fork and exec; that child would have the whole grace.
#[tokio::test]
async fn whoever_outlives_the_first_process_is_told_to_end_again() {
    let host = Host::start().await;
    let mut output = host.output("app").await;
    let script = r#"perl -e '
  $| = 1;
  my $lost;
  $SIG{TERM} = sub { exit if $lost++ };
  print "up\n";
  sleep 1 while 1' &
wait
"#;
    let mut message = host.message("app", &Droplet::shell(script));
    // More than anybody waits here.
    message["stop_grace"] = json!(600);
    host.run(message).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    host.stop("app").await;
}

/// All regular files below `directory` that hold `words`, on its own file system. Disks of apps are none of them.
fn holding(directory: &Path, words: &str) -> Vec<PathBuf> {
    let device = fs::metadata(directory).map(|about| about.dev()).ok();
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        // What is going away is nobody's.
        let Ok(about) = entry.metadata() else {
            continue;
        };
        if about.is_dir() && Some(about.dev()) == device {
            found.extend(holding(&entry.path(), words));
        } else if about.is_file() && about.len() < 1 << 20 {
            let bytes = fs::read(entry.path()).unwrap_or_default();
            if bytes
                .windows(words.len())
                .any(|piece| piece == words.as_bytes())
            {
                found.push(entry.path());
            }
        }
    }
    found
}

#[tokio::test]
async fn an_apps_secrets_are_on_no_disk_where_others_read_them() {
    const SECRET: &str = "s3cret-of-the-app";
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut message = host.message("app", &Droplet::sample("sleeper"));
    message["env"] = json!([format!("PASSWORD={SECRET}")]);
    message["request_id"] = json!("once");
    host.run(message).await;
    let mut message = host.message("crashed", &Droplet::shell("echo $PASSWORD; exit 3"));
    message["env"] = json!([format!("PASSWORD={SECRET}")]);
    host.publish(&host.subject("start"), &message).await;
    exits.next().await;
    host.logged(0, "kept what a crash left").await;
    let files = holding(&host.base, SECRET);
    let kinds = |kind: &str| {
        let mut relative = files
            .iter()
            .filter_map(|file| file.strip_prefix(&host.base).ok());
        relative.any(|file| file.starts_with(kind))
    };
    assert!(kinds("instances") && kinds("crashes"), "{files:?}");
    for file in &files {
        let modes: Option<Vec<u32>> = { file.ancestors() }
            .take_while(|path| path.starts_with(&host.base))
            .map(|path| fs::metadata(path).ok().map(|about| about.mode() & 0o777))
            .collect();
        // Of the one that crashed some of it goes meanwhile.
        let Some(modes) = modes else { continue };
        // A directory that nobody else enters, and the file itself, should somebody let others in.
        let (own, above) = modes.split_first().unwrap();
        assert!(
            above.iter().any(|mode| mode & 0o077 == 0),
            "{modes:?} {}",
            file.display()
        );
        assert_eq!(own & 0o077, 0, "{}", file.display());
    }
    host.stop("app").await;
}

#[tokio::test]
async fn what_a_host_says_of_an_instance_is_its_own_whatever_a_start_presets() {
    let host = Host::start().await;
    let mut registered = host.watch("router.register").await;
    let mut message = host.message("web", &going_away("web", false));
    message["uris"] = json!(["web.example.net"]);
    let preset = "5e".repeat(32);
    for key in [
        "instance",
        "instance_id",
        "private_instance_id",
        "private_instance",
        "handle",
        "warden_handle",
        "host",
        "dea",
        "staged",
    ] {
        message[key] = json!(preset);
    }
    for key in [
        "port",
        "host_port",
        "instance_host_port",
        "container_port",
        "state_timestamp",
    ] {
        message[key] = json!(22);
    }
    message["state"] = json!("CRASHED");
    message["exit_status"] = json!(3);
    message["unsent"] = json!([["droplet.exited", "{}"]]);
    let answer = host.run(message).await;
    let route = registered.next().await;
    let found = host
        .request("dea.find.droplet", &json!({"droplet": "web"}))
        .await;
    assert_eq!(found["state"], "RUNNING");
    assert_eq!(found["instance"], answer["instance"]);
    assert_ne!(route["port"], 22);
    for said in [&answer, &route, &found] {
        assert!(!said.to_string().contains(&preset), "{said}");
    }
    assert_eq!(
        (&answer["dea"], &route["host"]),
        (&json!(host.id), &json!(Network::HOST))
    );
    host.stop("web").await;
}

#[tokio::test]
async fn a_route_goes_before_the_app_is_told_to_stop() {
    let host = Host::start().await;
    let mut message = host.message("slow", &slow_to_open());
    message["uris"] = json!(["slow.example.net"]);
    host.run(message).await;

    let mut everything = host.nats().subscribe(">").await.unwrap();
    host.nats().flush().await.unwrap();
    host.publish("dea.stop", &json!({"droplet": "slow"})).await;
    let mut unregistered = false;
    loop {
        let message = tokio::time::timeout(patience(), everything.next())
            .await
            .unwrap()
            .unwrap();
        unregistered |= message.subject.as_str() == "router.unregister";
        if message
            .payload
            .windows(12)
            .any(|words| words == b"told to stop")
        {
            break;
        }
    }
    assert!(
        unregistered,
        "the app was told to stop while the router still knew it"
    );
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
}

#[tokio::test]
async fn commands_without_a_reply_work_as_ever() {
    let host = Host::start().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let sleeper = Droplet::sample("sleeper");
    for index in [0, 1, 2] {
        let mut message = host.message("sleeper", &sleeper);
        message["index"] = json!(index);
        host.publish(&host.subject("start"), &message).await;
    }
    let three = heartbeats
        .until("three RUNNING", |beat| {
            let droplets = beat["droplets"].as_array().unwrap();
            droplets.len() == 3 && droplets.iter().all(|entry| entry["state"] == "RUNNING")
        })
        .await;
    assert_eq!(
        host.files.requests("sleeper.tgz"),
        1,
        "one download for all who wait"
    );

    let version = &three["droplets"][0]["version"];
    // By index, by instance id, an empty list (nothing!), then the rest.
    host.publish(
        "dea.stop",
        &json!({"droplet": "sleeper", "version": version, "indices": [2]}),
    )
    .await;
    let two = |beat: &Value| beat["droplets"].as_array().unwrap().len() == 2;
    heartbeats.until("two", two).await;
    host.publish("dea.stop", &json!({"droplet": "sleeper", "indices": []}))
        .await;
    host.publish("dea.stop", &json!({"droplet": "sleeper", "version": "v2"}))
        .await;
    host.publish("dea.stop", &json!({"droplet": "other"})).await;
    let entries = three["droplets"].as_array().unwrap();
    let first = entries.iter().find(|entry| entry["index"] == 0).unwrap();
    host.publish(
        "dea.stop",
        &json!({"droplet": "sleeper", "instances": [first["instance"]]}),
    )
    .await;
    let left = heartbeats
        .until("one", |beat| {
            beat["droplets"].as_array().unwrap().len() == 1
        })
        .await;
    assert_eq!(left["droplets"][0]["index"], 1);
    host.publish("dea.stop", &json!({"droplet": "sleeper"}))
        .await;
    heartbeats
        .until("none", |beat| beat["droplets"] == json!([]))
        .await;
    // Only the empty list is most likely a mistake of its sender.
    let log = host.logged(0, "empty=\"indices\"").await;
    assert_eq!(log.matches("a stop matches nothing").count(), 1, "{log}");
}

#[tokio::test]
async fn commands_of_one_sender_are_done_in_his_order() {
    let host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let mut exits = host.watch("droplet.exited").await;
    let start = |index: u64| {
        let mut message = host.message("app", &sleeper);
        message["index"] = json!(index);
        (host.subject("start"), message)
    };
    let stop = |droplet: &str| ("dea.stop".to_owned(), json!({"droplet": droplet}));
    for round in 0..rounds() {
        // Without a flush between them: they come in one piece.
        let burst = [
            start(0),
            start(1),
            start(2),
            stop("app"),
            stop("nobody"),
            stop("app"),
            start(3),
        ];
        for (subject, message) in burst {
            let body = message.to_string().into();
            host.nats().publish(subject, body).await.unwrap();
        }
        host.nats().flush().await.unwrap();
        for _ in 0..3 {
            let exit = exits.next().await;
            assert_eq!(exit["reason"], "STOPPED", "round {round}: {exit}");
            assert_ne!(exit["index"], 3, "round {round}");
        }
        let last = json!({"droplet": "app", "wait": "stopped"});
        let answer = host.request(&host.subject("stop"), &last).await;
        assert_eq!(answer["ok"], true, "round {round}: {answer}");
        assert_eq!(exits.next().await["index"], 3, "round {round}");
    }
}

#[tokio::test]
async fn find_droplet_tells_one_answer_per_instance() {
    let begun = Instant::now();
    let host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    for index in [0, 1] {
        let mut message = host.message("sleeper", &sleeper);
        message["index"] = json!(index);
        host.run(message).await;
    }
    let find = json!({"droplet": "sleeper", "states": ["running"], "include_stats": true});
    // On a busy machine an instance is told without its use.
    let deadline = Instant::now() + patience();
    let mut found = loop {
        let found = host
            .request_all("dea.find.droplet", &find, (2, Duration::from_secs(1)))
            .await;
        let measured = |one: &Value| {
            ["cpu", "mem", "disk"]
                .iter()
                .all(|key| one["stats"]["usage"][key].is_number())
        };
        if found.iter().all(measured) || Instant::now() > deadline {
            break found;
        }
    };
    found.sort_by_key(|answer| answer["index"].as_u64());
    assert_eq!(found.len(), 2);
    for (index, answer) in found.iter().enumerate() {
        assert_eq!(answer["dea"], host.id);
        assert_eq!(answer["droplet"], "sleeper");
        assert_eq!(answer["version"], Host::fixture("dea.start")["version"]);
        assert_eq!(answer["index"], index);
        assert_eq!(answer["state"], "RUNNING");
        assert_eq!(
            answer["staged"],
            format!("/{}", answer["instance"].as_str().unwrap())
        );
        let stats = &answer["stats"];
        assert_eq!(
            keys(stats),
            [
                "disk_quota",
                "fds_quota",
                "host",
                "mem_quota",
                "name",
                "port",
                "uptime",
                "uris",
                "usage"
            ]
        );
        assert_eq!(stats["name"], "orders-api");
        assert_eq!(stats["uris"], json!([]));
        assert_eq!(stats["host"], Network::HOST);
        assert!(stats["port"].as_u64().is_some_and(|port| port > 1024));
        let uptime = stats["uptime"].as_u64().unwrap();
        assert!(uptime <= begun.elapsed().as_secs() + 1, "{uptime}");
        assert_eq!(stats["mem_quota"], 134_217_728);
        assert_eq!(stats["disk_quota"], 268_435_456);
        assert_eq!(stats["fds_quota"], 1024);
        assert_eq!(
            keys(&stats["usage"]),
            ["cores", "cpu", "disk", "mem", "mem_charged", "time"]
        );
        assert!(
            stats["usage"]["mem"]
                .as_u64()
                .is_some_and(|bytes| bytes > 100_000)
        );
        // "2016-08-16 12:41:30 +0000"
        assert_eq!(stats["usage"]["time"].as_str().unwrap().len(), 25);
    }
    for (filter, expected) in [
        (json!({"droplet": "sleeper"}), 2),
        (json!({"droplet": "sleeper", "indices": [1]}), 1),
        (json!({"droplet": "sleeper", "indices": []}), 2),
        (json!({"droplet": "sleeper", "states": ["CRASHED"]}), 0),
        (json!({"droplet": "sleeper", "version": "v9"}), 0),
        (json!({"droplet": "nobody"}), 0),
        (json!({}), 0),
    ] {
        let found = host
            .request_all(
                "dea.find.droplet",
                &filter,
                (expected, Duration::from_millis(500)),
            )
            .await;
        assert_eq!(found.len(), expected, "{filter}");
    }
    // Stats for whoever asks for them, of what runs; a path is for a DEA's file server.
    let mut mute = host.message("mute", &Droplet::shell("sleep infinity"));
    mute["uris"] = json!(["mute.example.net"]);
    host.request(&host.subject("start"), &mute).await;
    for find in [
        json!({"droplet": "sleeper", "indices": [0]}),
        json!({"droplet": "sleeper", "indices": [0], "include_stats": false}),
        json!({"droplet": "sleeper", "indices": [0], "path": "logs/"}),
        json!({"droplet": "sleeper", "indices": [0], "path": null}),
        json!({"droplet": "mute", "include_stats": true}),
    ] {
        let found = host.request("dea.find.droplet", &find).await;
        assert!(found["state"].is_string(), "{find}: {found}");
        for key in ["stats", "file_uri_v2"] {
            assert!(found.get(key).is_none(), "{find}: {found}");
        }
    }
    host.stop("sleeper").await;
    host.stop("mute").await;
}

#[tokio::test]
async fn a_query_is_answered_for_every_instance_however_many() {
    let host = Host::start().await;
    let url = host.files.put("silent.tgz", tests::Body::Silent);
    let many = 100;
    for index in 0..many {
        let mut message = host.message("app", &Droplet::sample("sleeper"));
        message["index"] = json!(index);
        message["executableUri"] = json!(url);
        message["limits"] = json!({"mem": 16, "disk": 16, "fds": 64});
        host.publish(&host.subject("start"), &message).await;
    }
    let mut heartbeats = host.watch("dea.heartbeat").await;
    heartbeats
        .until("all of them", |beat| {
            beat["droplets"].as_array().unwrap().len() == many
        })
        .await;
    for (subject, body) in [
        ("dea.find.droplet", json!({"droplet": "app"})),
        ("droplet.status", json!({})),
    ] {
        let answers = host
            .request_all(subject, &body, (many, Duration::from_secs(1)))
            .await;
        assert_eq!(answers.len(), many, "{subject}");
    }
    host.stop("app").await;
}

/// A server with TLS for `files`, whose certificate is signed by an authority of its own: its address,
/// and the file that makes a client trust it.
async fn https(
    directory: &std::path::Path,
    files: &[(&str, &[u8])],
) -> (tests::Running, String, String) {
    std::fs::create_dir_all(directory).unwrap();
    for (name, bytes) in files {
        std::fs::write(directory.join(name), bytes).unwrap();
    }
    let certificates = tests::Certificates::make(directory);
    let at = directory.display();
    let serve = format!(
        "cd {at} && exec setpriv --pdeathsig KILL openssl s_server -accept 127.0.0.1:8443 -cert cert.pem -key key.pem -WWW"
    );
    let log = directory.join("log");
    let server = tests::Running::start(std::path::Path::new("bash"), &["-c", &serve], &log);
    while tokio::net::TcpStream::connect("127.0.0.1:8443")
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let trust = certificates.path("ca.pem");
    (server, "https://127.0.0.1:8443".to_owned(), trust)
}

#[tokio::test]
async fn droplets_come_by_https_from_whom_the_host_trusts() {
    let mut host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let directory = host.base.with_file_name("https");
    let (server, url, trust) = https(&directory, &[("droplet.tgz", &sleeper.0)]).await;
    let mut message = host.message("app", &sleeper);
    message["executableUri"] = json!(format!("{url}/droplet.tgz"));
    let mut exits = host.watch("droplet.exited").await;
    host.publish(&host.subject("start"), &message).await;
    let exit = exits.next().await;
    let why = exit["exit_description"].as_str().unwrap();
    assert!(why.contains("UnknownIssuer"), "{why}");
    host.kill9().await;
    let mut hellos = host.watch("dea.start").await;
    host.spawn_agent_by(&["env", &format!("SSL_CERT_FILE={trust}")]);
    hellos.next().await;
    host.run(message).await;
    host.stop("app").await;
    server.end();
}

#[tokio::test]
async fn an_agent_told_to_end_in_the_midst_of_unpacking_leaves_nothing() {
    let host = Host::start().await;
    let entries: Vec<(u8, String, String)> = (0..60_000)
        .map(|n| (b'0', format!("./app/file-{n}"), String::new()))
        .collect();
    let entries: Vec<(u8, &str, &str)> = entries
        .iter()
        .map(|(kind, path, link)| (*kind, path.as_str(), link.as_str()))
        .collect();
    let droplet = Droplet::of_entries(&entries);
    host.publish(&host.subject("start"), &host.message("app", &droplet))
        .await;
    let droplets = host.base.join("droplets");
    let unpacking = || {
        let found = std::fs::read_dir(&droplets).into_iter().flatten().flatten();
        found
            .map(|entry| entry.path().join("layer/home/vcap/app"))
            .any(|app| app.exists())
    };
    host.tree_until("an unpacked file", |_| unpacking()).await;
    let mut host = host;
    let status = host.end(Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    let left: Vec<_> = std::fs::read_dir(&host.base)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    let mut left: Vec<&str> = left.iter().map(|name| name.to_str().unwrap()).collect();
    left.sort_unstable();
    assert_eq!(left, ["id", "lock"], "{}", host.log());
}

#[tokio::test]
async fn an_agent_tells_of_itself() {
    // As much as any machine has.
    let mut host = Host::with(tests::Setup {
        config: &[("disk_mb = 16384", "disk_mb = 1024")],
        ..Default::default()
    })
    .await;
    let mut advertised = host.watch("dea.advertise").await;
    let mut goodbyes = host.watch("dea.shutdown").await;
    let advertisement = advertised.next().await;
    for key in [
        "app_id_to_count",
        "available_disk",
        "available_memory",
        "id",
        "placement_properties",
        "stacks",
    ] {
        assert!(advertisement.get(key).is_some(), "{key}: {advertisement}");
    }
    assert_eq!(advertisement["id"], host.id);
    assert_eq!(advertisement["available_memory"], 4096);
    assert_eq!(advertisement["available_disk"], 1024);
    assert_eq!(advertisement["stacks"], json!(["debian"]));
    assert_eq!(advertisement["app_id_to_count"], json!({}));
    assert_eq!(advertisement["placement_properties"]["zone"], "default");

    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    let taken = advertised
        .until("less memory", |one| one["available_memory"] != 4096)
        .await;
    assert_eq!(taken["available_memory"], 4096 - 128);
    assert_eq!(taken["available_disk"], 1024 - 256);
    assert_eq!(taken["app_id_to_count"], json!({"sleeper": 1}));

    let hello = host.restart().await;
    assert_eq!(hello["id"], advertisement["id"], "the id is durable");
    assert_eq!(hello["ip"], Network::HOST);
    assert!(hello["version"].is_string());

    // SIGTERM: the apps stop, the agent says goodbye.
    let status = host.end(Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    let goodbye = goodbyes.next().await;
    assert_eq!(keys(&goodbye), ["app_id_to_count", "id", "ip", "version"]);
    assert_eq!(goodbye["id"], host.id);
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn an_agent_waits_for_a_bus_that_is_absent() {
    let mut host = Host::start().await;
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    let wshd = host.tree().one("wshd").clone();
    host.kill9().await;
    host.stop_bus().await;
    host.spawn_agent();
    host.tree_until("linker of an agent without a bus", |tree| {
        tree.named("iomux-link").len() == 1
    })
    .await;
    host.start_bus().await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let beat = heartbeats.next().await;
    assert_eq!(beat["dea"], host.id);
    assert_eq!(beat["droplets"][0]["state"], "RUNNING");
    assert!(wshd.lives());
    host.stop("sleeper").await;
}

#[tokio::test]
async fn an_app_finds_what_the_dea_gave() {
    let host = Host::start().await;
    let mut output = host.output("env").await;
    let mut message = host.message("env", &Droplet::shell("pwd; umask; id -u; id -G; hostname; env -0 | sort -z | tr '\\0' '\\n'; echo end; sleep infinity"));
    message["env"] = json!([
        "GREETING=hello = world",
        "EMPTY",
        "t=x",
        "ostler_term=x",
        "PAID=a\\$b\\\\c $HOME $PWD"
    ]);
    message["vcap_application"] = json!({"name": "env", "space_name": "prod"});
    message["services"] = json!([{"name": "db", "label": "pg-9", "plan": "small", "credentials": {"uri": "postgres://u:$x@h/db"}}]);
    host.run(message).await;
    output
        .until("the environment", |output| {
            output.text(0, "stdout").ends_with("end\n")
        })
        .await;
    let text = output.text(0, "stdout");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], ["/home/vcap/app", "0077", "2000", "2000"]);
    let variable = |name: &str| {
        let start = format!("{name}=");
        lines
            .iter()
            .find_map(|line| line.strip_prefix(&start))
            .unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    assert_eq!(variable("GREETING"), "hello = world");
    assert_eq!(variable("EMPTY"), "");
    assert_eq!(variable("PAID"), "a$b\\c /home/vcap/app /home/vcap");
    assert_eq!((variable("t"), variable("ostler_term")), ("x", "x"));
    assert_eq!(variable("HOME"), "/home/vcap/app");
    assert_eq!(variable("TMPDIR"), "/home/vcap/tmp");
    assert_eq!(variable("MEMORY_LIMIT"), "128m");
    assert_eq!(variable("VCAP_APP_HOST"), "0.0.0.0");
    assert_eq!(variable("VCAP_APP_PORT"), variable("PORT"));
    assert_eq!(variable("CF_INSTANCE_INDEX"), "0");
    assert_eq!(variable("CF_INSTANCE_IP"), Network::HOST);
    assert_eq!(variable("DATABASE_URL"), "postgres://u:$x@h/db");
    let application: Value = serde_json::from_str(variable("VCAP_APPLICATION")).unwrap();
    assert_eq!(application["application_id"], "env");
    assert_eq!(application["space_name"], "prod");
    assert_eq!(application["instance_index"], 0);
    assert_eq!(application["host"], "0.0.0.0");
    let services: Value = serde_json::from_str(variable("VCAP_SERVICES")).unwrap();
    assert_eq!(
        services["pg-9"][0]["credentials"]["uri"],
        "postgres://u:$x@h/db"
    );
    host.stop("env").await;
}
