//! Metrics and health over HTTP: they tell what the bus tells, find out what is broken, and nobody who asks harms anybody.

use async_nats::{Message, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tests::{
    Droplet, Frozen, Host, Network, Output, Question, Running, Setup, Tree, get, patience, tool,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

const PAGE: &str = "127.0.0.1:9464";

/// Switches the page on.
const ON: (&str, &str) = (
    "[cgroup]",
    "[metrics]\nlisten = \"127.0.0.1:9464\"\n[cgroup]",
);

async fn watched() -> Host {
    let config = &[ON];
    Host::with(Setup {
        config,
        ..Default::default()
    })
    .await
}

/// The status of `/health`, and its body.
async fn health() -> (u16, Value) {
    let (status, body) = get(PAGE, "/health").await.unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    let mut failing = Vec::new();
    for (part, check) in body["checks"].as_object().unwrap() {
        assert!(check["ms"].as_f64().unwrap() >= 0.0, "{body}");
        if check["ok"] == true {
            assert!(check.get("error").is_none(), "{body}");
        } else {
            assert!(!check["error"].as_str().unwrap().is_empty(), "{body}");
            failing.push(part.clone());
        }
    }
    let mut told: Vec<String> = serde_json::from_value(body["failing"].clone()).unwrap();
    told.sort();
    assert_eq!(told, failing, "{body}");
    assert_eq!(body["ok"], failing.is_empty(), "{body}");
    assert_eq!(status, if failing.is_empty() { 200 } else { 503 }, "{body}");
    (status, body)
}

/// Asks until exactly these parts fail: a machine under load may be late with more.
async fn failing(parts: &[&str]) -> Value {
    let deadline = Instant::now() + patience();
    loop {
        let (_, body) = health().await;
        if body["failing"] == json!(parts) {
            return body;
        }
        assert!(Instant::now() < deadline, "not {parts:?}: {body}");
    }
}

/// The metrics by name and labels, as they stand before the value.
async fn metrics() -> BTreeMap<String, f64> {
    let (status, text) = get(PAGE, "/metrics").await.unwrap();
    assert_eq!(status, 200, "{text}");
    read(&text)
}

/// Reads the text format 0.0.4 as strictly as Prometheus does: each family once, told what it is before its samples.
fn read(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with('\n'));
    let (mut families, mut family, mut samples) = (BTreeSet::new(), "", BTreeMap::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split_once(' ').unwrap().0;
            assert!(families.insert(family), "{line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (of, kind) = kind.split_once(' ').unwrap();
            assert_eq!(of, family, "{line}");
            assert!(["counter", "gauge", "summary"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", of.ends_with("_total"), "{line}");
        } else {
            let (key, value) = line.rsplit_once(' ').unwrap();
            let name = key.split('{').next().unwrap();
            let of = name.strip_prefix(family).expect(line);
            assert!(["", "_sum", "_count"].contains(&of), "{line}");
            let value = value.parse().expect(line);
            assert_eq!(samples.insert(key.to_owned(), value), None, "{line}");
        }
    }
    samples
}

/// What `$SRV.STATS` and a heartbeat tell, as the names of the metrics that must tell the same.
fn told(stats: &Value, beat: &Value) -> BTreeMap<String, f64> {
    let mut told = BTreeMap::new();
    let endpoints = stats["endpoints"].as_array().unwrap();
    for endpoint in endpoints {
        let name = endpoint["name"].as_str().unwrap();
        let number = |key: &str| endpoint[key].as_f64().unwrap();
        let (all, errors) = (number("num_requests"), number("num_errors"));
        let seconds = number("processing_time") / 1e9;
        let labelled = |name: &str, more: &str| format!("{name}{more}}}");
        let total = format!("ostler_requests_total{{endpoint=\"{name}\",result=");
        told.insert(labelled(&total, "\"ok\""), all - errors);
        told.insert(labelled(&total, "\"error\""), errors);
        let of = format!("{{endpoint=\"{name}\"");
        told.insert(
            labelled(&format!("ostler_request_seconds_count{of}"), ""),
            all,
        );
        told.insert(
            labelled(&format!("ostler_request_seconds_sum{of}"), ""),
            seconds,
        );
    }
    let data = &endpoints[0]["data"];
    let dropped = data["dropped"].as_f64().unwrap();
    told.insert("ostler_bus_dropped_messages_total".into(), dropped);
    if let Some(spooled) = data["spooled"].as_f64() {
        told.insert("ostler_output_spooled_bytes".into(), spooled);
    }
    for (name, key) in [
        ("ostler_memory_available_bytes", "available_memory"),
        ("ostler_disk_available_bytes", "available_disk"),
    ] {
        // Left out by a host that is too busy.
        if let Some(mb) = data[key].as_f64() {
            told.insert(name.into(), mb * 1048576.0);
        }
    }
    for state in [
        "BORN",
        "STARTING",
        "RUNNING",
        "STOPPING",
        "STOPPED",
        "CRASHED",
        "RESUMING",
        "EVACUATING",
    ] {
        let entries = beat["droplets"].as_array().unwrap();
        let count = entries.iter().filter(|entry| entry["state"] == state);
        let name = format!("ostler_instances{{state=\"{state}\"}}");
        told.insert(name, f64::from(u32::try_from(count.count()).unwrap()));
    }
    told
}

/// Processes that listen for TCP connections, of one process: its addresses as in /proc/net/tcp.
fn listening(agent: &Running) -> Vec<String> {
    let files = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap();
    let sockets: BTreeSet<String> = files
        .filter_map(|file| std::fs::read_link(file.unwrap().path()).ok())
        .filter_map(|link| {
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    assert!(!sockets.is_empty(), "its lock is a socket");
    let tables = ["tcp", "tcp6"].map(|table| format!("/proc/{}/net/{table}", agent.pid()));
    let texts = tables.map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let lines = texts.iter().flat_map(|text| text.lines().skip(1));
    let fields = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields
        .filter(|fields| fields[3] == "0A" && sockets.contains(fields[9]))
        .map(|fields| fields[1].to_owned())
        .collect()
}

#[tokio::test]
async fn health_is_what_the_bus_does_and_comes_back_with_it() {
    let mut host = watched().await;
    failing(&[]).await;
    assert_eq!(listening(host.agent()), ["0100007F:24F8"]);

    // A server that is stopped takes everything and answers nothing: the connection stands.
    host.bus().signal(Signal::SIGSTOP);
    let began = Instant::now();
    let (status, body) = health().await;
    let took = began.elapsed();
    host.bus().signal(Signal::SIGCONT);
    assert_eq!(status, 503, "{body}");
    let named = body["failing"].as_array().unwrap();
    assert!(named.contains(&json!("bus")), "{body}");
    // Two seconds, and what a busy machine adds.
    assert!(took < Duration::from_secs(10), "{took:?}");
    failing(&[]).await;

    // One that ends while it is asked is not waited for. That takes a machine that is not busy for two seconds.
    let mut is_told = false;
    for connects in [1.0, 2.0, 3.0] {
        host.bus().signal(Signal::SIGSTOP);
        let ends = async {
            sleep(Duration::from_millis(100)).await;
            host.bus().signal(Signal::SIGKILL);
        };
        let (body, ()) = tokio::join!(failing(&["bus"]), ends);
        let why = body["checks"]["bus"]["error"].as_str().unwrap();
        is_told = why.contains("no connection");
        host.stop_bus().await;
        let before = metrics().await;
        assert_eq!(before["ostler_bus_connected"], 0.0);
        assert_eq!(before["ostler_bus_connects_total"], connects);
        host.start_bus().await;
        failing(&[]).await;
        let after = metrics().await;
        assert_eq!(after["ostler_bus_connected"], 1.0);
        assert_eq!(after["ostler_bus_connects_total"], connects + 1.0);
        if is_told {
            break;
        }
    }
    assert!(is_told, "{}", host.log());
}

#[tokio::test]
async fn an_agent_that_leaves_is_not_well() {
    let host = watched().await;
    let mut output = host.output("deaf").await;
    let script = "exec perl -e '$0 = \"deafapp\"; $SIG{TERM} = \"IGNORE\"; $| = 1; print \"up\\n\"; sleep 1 while 1'";
    let mut start = host.message("deaf", &Droplet::shell(script));
    start["stop_grace"] = json!(600);
    host.run(start).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    failing(&[]).await;
    host.agent().signal(Signal::SIGTERM);
    let body = failing(&["stable"]).await;
    assert_eq!(body["checks"]["stable"]["error"], "the agent is leaving");
    // The numbers that are not the stable's are told all the same.
    let numbers = metrics().await;
    assert_eq!(numbers["ostler_bus_connected"], 1.0);
    assert!(!numbers.contains_key("ostler_memory_available_bytes"));
    host.tree().one("deafapp").signal(Signal::SIGKILL);
    let ended = host.agent().ended(patience()).await;
    assert!(
        ended.is_some_and(|status| status.success()),
        "{}",
        host.log()
    );
}

/// Waits until what is told of a late disk is so.
async fn late_is(what: &str, so: impl Fn(f64) -> bool) {
    let end = Instant::now() + patience();
    loop {
        let late = metrics().await["ostler_disk_late_seconds"];
        if so(late) {
            return;
        }
        assert!(Instant::now() < end, "not {what}: {late} s");
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn a_disk_that_hangs_is_named_and_asking_again_and_again_adds_nothing_to_it() {
    let config = &[ON];
    let host = Host::with(Setup {
        config,
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    failing(&[]).await;
    let status = format!("/proc/{}/status", host.agent().pid());
    let threads = || -> u32 {
        let status = std::fs::read_to_string(&status).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Threads:"));
        line.unwrap().trim().parse().unwrap()
    };
    late_is("over", |late| late == 0.0).await;
    let frozen = Frozen::base(&host);
    let body = failing(&["disk"]).await;
    let before = threads();
    // Twenty at once, and again: each is answered, and only the first waits in the kernel.
    for _ in 0..2 {
        let asked: Vec<_> = (0..20).map(|_| tokio::spawn(health())).collect();
        for answer in asked {
            let (status, body) = answer.await.unwrap();
            assert_eq!(status, 503, "{body}");
            let named = body["failing"].as_array().unwrap();
            assert!(named.contains(&json!("disk")), "{body}");
        }
    }
    let after = threads();
    assert!(
        after < before + 10,
        "{before} threads, then {after}: {body}"
    );
    let mut beats = host.watch("dea.heartbeat").await;
    beats.next().await;
    late_is("told", |late| late >= 3.0).await;
    host.publish("dea.stop", &json!({"droplet": "app"})).await;
    let end = Instant::now() + patience();
    while metrics().await.get("ostler_instances_unrecorded") != Some(&1.0) {
        assert!(Instant::now() < end, "its record is on no disk");
        sleep(Duration::from_millis(200)).await;
    }
    drop(frozen);
    failing(&[]).await;
    late_is("over", |late| late == 0.0).await;
    assert!(!host.base.join("health").exists());
}

#[tokio::test]
async fn helpers_that_cannot_be_started_are_named() {
    let helpers = tests::path("OSTLER_HELPERS", "target/x86_64-unknown-linux-gnu/helpers");
    let helpers = helpers.display().to_string();
    // In the directory of this test's first host, which is removed with it.
    let copy = format!("/tmp/ostler-test-{}-0/helpers", std::process::id());
    let host = Host::with(Setup {
        config: &[ON, (&helpers, &copy)],
        before: &[&["cp", "-r", &helpers, &copy]],
        ..Default::default()
    })
    .await;
    failing(&[]).await;
    let (link, away) = (format!("{copy}/iomux-link"), format!("{copy}/away"));
    std::fs::rename(&link, &away).unwrap();
    let body = failing(&["helpers"]).await;
    let why = body["checks"]["helpers"]["error"].as_str().unwrap();
    assert!(
        why.contains("iomux-link") && why.contains("ENOENT"),
        "{why}"
    );
    std::fs::rename(&away, &link).unwrap();
    failing(&[]).await;
    drop(host);
}

#[tokio::test]
async fn whoever_does_not_switch_it_on_has_no_port_open() {
    let host = Host::start().await;
    assert_eq!(listening(host.agent()), Vec::<String>::new());
    assert!(TcpStream::connect(PAGE).await.is_err());
    assert_eq!(discovered(&host, 0).await, Vec::<Value>::new());
}

#[tokio::test]
async fn a_page_that_nobody_else_reaches_is_told_to_nobody_else() {
    let host = watched().await;
    failing(&[]).await;
    assert_eq!(discovered(&host, 0).await, Vec::<Value>::new());
}

/// What comes back if a collector asks, as one does: with nothing for a body.
async fn discovered(host: &Host, answers: usize) -> Vec<Value> {
    let question = Question {
        subject: "vcap.component.discover".into(),
        body: Vec::new(),
        answers,
    };
    let mut told = host.ask_each(&[question]).await.remove(0);
    // Where nobody listens, the server says so.
    told.retain(|message| message.status != Some(StatusCode::NO_RESPONDERS));
    let read = |message: Message| serde_json::from_slice(&message.payload).unwrap();
    told.into_iter().map(read).collect()
}

/// Asks until this is the answer: a machine under load may be late with more.
async fn until_healthz(status: u16, body: &str) {
    let deadline = Instant::now() + patience();
    loop {
        let told = get(PAGE, "/healthz").await.unwrap();
        if told == (status, body.to_owned()) {
            return;
        }
        assert!(Instant::now() < deadline, "not {status} {body}: {told:?}");
    }
}

/// What `/varz` says, once all of it is there.
async fn varz() -> Value {
    let deadline = Instant::now() + patience();
    loop {
        let (status, body) = get(PAGE, "/varz").await.unwrap();
        let varz: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200);
        if varz.get("instance_registry").is_some() {
            return varz;
        }
        assert!(Instant::now() < deadline, "{varz}");
    }
}

#[tokio::test]
async fn a_collector_finds_the_host_and_reads_its_pages() {
    let mut host = Host::with(Setup {
        config: &[("[cgroup]", "[metrics]\nlisten = \"0.0.0.0:9464\"\n[cgroup]")],
        ..Default::default()
    })
    .await;
    let mut announced = host.watch("vcap.component.announce").await;
    host.restart().await;
    // As a collector asks: with nothing for a body. Each host answers once.
    let [mut found] = discovered(&host, 1).await.try_into().unwrap();
    let uptime = found.as_object_mut().unwrap().remove("uptime").unwrap();
    assert!(uptime.as_str().unwrap().starts_with("0d:0h:"), "{uptime}");
    // The agent before may still have been about to say its own.
    let component = announced.until("the same", |one| *one == found).await;
    assert_eq!(component["type"], "DEA");
    assert_eq!(component["uuid"], format!("0-{}", host.id.replace('-', "")));
    // Where it can be reached by others.
    assert_eq!(component["host"], format!("{}:9464", Network::HOST));
    assert_eq!(component["credentials"], json!(["", ""]));

    let message = host.message("app", &Droplet::sample("sleeper"));
    let answer = host.run(message.clone()).await;
    until_healthz(200, "ok\n").await;
    let mut varz = varz().await;
    assert!(
        varz["mem"].as_u64().unwrap() > 1000 && varz["cpu"].is_number(),
        "{varz}"
    );
    assert!(varz["num_cores"].as_u64().unwrap() > 0, "{varz}");
    // What `handlers/dea.rb` of the collector reads.
    assert_eq!(varz["can_stage"], 0);
    assert_eq!(varz["reservable_stagers"], 0);
    assert_eq!(
        varz["stacks"],
        host.watch("dea.advertise").await.next().await["stacks"]
    );
    for ratio in ["available_memory_ratio", "available_disk_ratio"] {
        assert!(
            (0.0..1.0).contains(&varz[ratio].as_f64().unwrap()),
            "{ratio}: {varz}"
        );
    }
    let instance = answer["instance"].as_str().unwrap();
    let limits = &message["limits"];
    let registered = json!({"app": {instance: {"state": "RUNNING", "limits": {
        "mem": limits["mem"], "disk": limits["disk"], "fds": limits["fds"],
    }}}});
    assert_eq!(varz["instance_registry"], registered);
    for (key, value) in component.as_object().unwrap() {
        assert_eq!(varz[key].take(), *value, "{key}");
    }

    host.stop_bus().await;
    until_healthz(503, "failing: bus\n").await;
    host.start_bus().await;
    failing(&[]).await;
    host.stop("app").await;
}

#[tokio::test]
async fn an_address_that_somebody_else_has_ends_the_agent_with_words() {
    let mut host = watched().await;
    // The next agent finds the address free, however this one ended.
    host.kill9().await;
    host.start_agent().await;
    failing(&[]).await;
    host.kill9().await;
    let others = TcpListener::bind(PAGE).await.unwrap();
    let from = host.logged(0, "").await.len();
    host.spawn_agent();
    let ended = host.ended().await;
    assert!(!ended.success());
    let words = "cannot listen on 127.0.0.1:9464 (metrics.listen): Address already in use";
    host.logged(from, words).await;
    drop(others);
    host.start_agent().await;
    failing(&[]).await;
}

#[tokio::test]
async fn journald_reads_how_grave_a_line_is() {
    let host = Host::start().await;
    // As systemd says it; what is standard error, `stat` says.
    let script = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$0\" \"$@\"";
    // A second agent of the host, which says so and ends.
    let second = |wrapper: &[&str]| {
        let output = host.ostler_by(wrapper, "agent").output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let journal = second(&["sh", "-c", script]);
    let lines: Vec<&str> = journal.lines().collect();
    let (last, before) = lines.split_last().unwrap();
    assert!(last.starts_with("<3>ostler: "), "{journal}");
    let graded = |line: &&str| {
        line.starts_with("<6>") && line.contains(" INFO ")
            || line.starts_with("<4>") && line.contains(" WARN ")
    };
    assert!(before.iter().all(graded), "{journal}");
    let elsewhere = second(&["env", "JOURNAL_STREAM=1:2"]);
    assert!(!elsewhere.contains('<'), "{elsewhere}");
}

#[tokio::test]
async fn metrics_tell_what_the_bus_tells() {
    let host = watched().await;
    let sleeper = Droplet::sample("sleeper");
    host.run(host.message("app", &sleeper)).await;
    let mut exits = host.watch("droplet.exited").await;
    let crasher = host.message("crasher", &Droplet::shell("exit 3"));
    host.request(&host.subject("start"), &crasher).await;
    exits.next().await;
    for _ in 0..3 {
        host.request_bytes(&host.subject("start"), "{").await;
    }
    host.request("dea.stop", &json!({"droplet": "nobody"}))
        .await;
    host.request("dea.status", &Value::Null).await;

    // A request is counted a moment after its answer was sent, and an exit told before the crash is.
    let subject = format!("$SRV.STATS.ostler.{}", host.id);
    let mut beats = host.watch("dea.heartbeat").await;
    let deadline = Instant::now() + patience();
    let metrics = loop {
        let beat = beats.next().await;
        let stats = host.request(&subject, &Value::Null).await;
        let metrics = metrics().await;
        let told = told(&stats, &beat);
        let near = |key: &String, value: f64| {
            // What floating point makes of nanoseconds, and a disk that others use, too.
            let slack = if key.contains("disk") { 64e6 } else { 1e-6 };
            metrics
                .get(key)
                .is_some_and(|this| (this - value).abs() < slack)
        };
        let differing: Vec<_> = told
            .iter()
            .filter(|(key, value)| !near(key, **value))
            .collect();
        let data = &stats["endpoints"][0]["data"];
        let same = |key: &str, state: &str| {
            let metric = metrics.get(&format!("ostler_instances{{state=\"{state}\"}}"));
            metric.is_some() && data[key].as_f64() == metric.copied()
        };
        let counted = same("running", "RUNNING") && same("crashed", "CRASHED");
        let crashed = metrics.get("ostler_instances{state=\"CRASHED\"}");
        if differing.is_empty() && counted && crashed == Some(&1.0) {
            break metrics;
        }
        assert!(
            Instant::now() < deadline,
            "{differing:?} {metrics:?} {stats} {beat}"
        );
    };
    for (key, value) in [
        ("ostler_instances{state=\"RUNNING\"}", 1.0),
        ("ostler_memory_capacity_bytes", 4096.0 * 1048576.0),
        ("ostler_memory_available_bytes", 3968.0 * 1048576.0),
        ("ostler_disk_capacity_bytes", 16384.0 * 1048576.0),
        (
            "ostler_requests_total{endpoint=\"start\",result=\"ok\"}",
            2.0,
        ),
        (
            "ostler_requests_total{endpoint=\"start\",result=\"error\"}",
            3.0,
        ),
        ("ostler_request_seconds_count{endpoint=\"start\"}", 5.0),
        ("ostler_refused_total{code=\"bad_json\"}", 3.0),
        ("ostler_refused_total{code=\"not_enough_memory\"}", 0.0),
        (
            "ostler_requests_total{endpoint=\"dea-stop\",result=\"ok\"}",
            1.0,
        ),
        ("ostler_network_unmended_seconds", 0.0),
        ("ostler_bus_connected", 1.0),
        ("ostler_bus_connects_total", 1.0),
        ("ostler_bus_refused_messages_total", 0.0),
        ("ostler_bus_dropped_messages_total", 0.0),
    ] {
        assert_eq!(metrics.get(key), Some(&value), "{key}: {metrics:?}");
    }
    for key in [
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
    ] {
        assert!(metrics[key] > 0.0, "{key}: {metrics:?}");
    }
    host.stop("app").await;
}

#[tokio::test]
async fn what_became_of_instances_and_of_their_output_is_counted() {
    let config = &[ON, ("[network]", "[output]\nspool_mb = 4\n[network]")];
    let host = Host::with(Setup {
        config,
        ..Default::default()
    })
    .await;
    let mut events = host.watch("droplet.*").await;
    let mut hog = host.message("hog", &Droplet::sample("hog"));
    hog["limits"]["mem"] = json!(48);
    host.request(&host.subject("start"), &hog).await;
    let mut kills = 0;
    while events.next().await["exit_status"].is_null() {
        kills += 1;
    }
    let mut output = host.output("pour").await;
    let script = "trap go=1 USR1; echo; until [ \"$go\" ]; do sleep 0.05; done; \
        head -c 20M /dev/zero; exec sleep infinity";
    host.run(host.message("pour", &Droplet::shell(script)))
        .await;
    // The trap is set.
    output
        .until("a line", |output| output.text(0, "stdout") == "\n")
        .await;
    let tree = host.tree();
    let linker = tree.one("iomux-link");
    linker.signal(Signal::SIGSTOP);
    let app = tree.0.iter().find(|one| one.title() == "bash main.sh");
    app.unwrap().signal(Signal::SIGUSR1);
    let poured = |tree: &Tree| tree.0.iter().any(|one| one.title() == "sleep infinity");
    host.tree_until("end of the pouring", poured).await;
    linker.signal(Signal::SIGCONT);
    let whole = |output: &Output| output.stream(0, "stdout").next == 1 + (20 << 20);
    output.until("all", whole).await;
    host.stop("pour").await;
    events.next().await;

    let dropped = output.stream(0, "stdout").dropped;
    assert!(dropped > 10 << 20, "{}", output.summary());
    let metrics = metrics().await;
    for (key, value) in [
        ("ostler_exits_total{reason=\"CRASHED\"}", 1),
        ("ostler_exits_total{reason=\"STOPPED\"}", 1),
        ("ostler_exits_total{reason=\"DEA_SHUTDOWN\"}", 0),
        ("ostler_exits_total{reason=\"DEA_EVACUATION\"}", 0),
        ("ostler_oom_kills_total", kills),
        ("ostler_output_missing_bytes_total", dropped),
        ("ostler_bus_left_out_exits_total", 0),
    ] {
        let value = u32::try_from(value).unwrap().into();
        assert_eq!(metrics.get(key), Some(&value), "{key}: {metrics:?}");
    }
}

/// The status line that comes back for these bytes; nothing if the connection is closed without one.
async fn say(bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(PAGE).await.unwrap();
    // It may be closed before all is said.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(patience(), stream.read_to_end(&mut answer))
        .await
        .expect("it is closed");
    let answer = String::from_utf8(answer).unwrap();
    answer.lines().next().unwrap_or_default().to_owned()
}

/// The status that comes back for these bytes, once one does: on a slow machine whoever says something may be too late.
async fn status(bytes: &[u8]) -> String {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(status) = say(bytes).await.split(' ').nth(1) {
            return status.to_owned();
        }
        let said = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]);
        assert!(Instant::now() < deadline, "nothing for {said}");
    }
}

#[tokio::test]
async fn clients_that_are_slow_or_broken_harm_nobody() {
    let host = watched().await;
    let before = metrics().await["process_open_fds"];
    // More than are heard at once; they say a little, and nothing more.
    let mut silent = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(PAGE).await.unwrap();
        stream.write_all(b"GET /hea").await.unwrap();
        silent.push(stream);
    }
    // These ask, and never take the answer.
    for _ in 0..20 {
        let mut stream = TcpStream::connect(PAGE).await.unwrap();
        let request = "GET /metrics HTTP/1.1\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        silent.push(stream);
    }
    let mut beats = host.watch("dea.heartbeat").await;
    for _ in 0..3 {
        beats.next().await;
    }
    failing(&[]).await;

    for (bytes, wanted) in [
        (
            "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
            "405",
        ),
        ("HEAD /health HTTP/1.1\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("GET /../id HTTP/1.1\r\n\r\n", "404"),
        ("\x16\x03\x01\x02\r\n\r\n", "400"),
        ("GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n", "200"),
    ] {
        assert_eq!(status(bytes.as_bytes()).await, wanted, "{bytes:?}");
    }
    let large = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(60_000));
    assert_eq!(status(large.as_bytes()).await, "431");
    say("x".repeat(1 << 20).as_bytes()).await;

    // What they had is given back, though they stay.
    let deadline = Instant::now() + patience();
    loop {
        let now = metrics().await["process_open_fds"];
        if now <= before + 3.0 {
            break;
        }
        assert!(Instant::now() < deadline, "{before} open files, then {now}");
    }
    drop(silent);
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    host.stop("app").await;
}

/// Waits until the page tells that so many bytes of output wait for the bus.
async fn spooled(what: &str, wanted: impl Fn(f64) -> bool) -> f64 {
    let deadline = Instant::now() + patience();
    loop {
        let told = { metrics().await }.remove("ostler_output_spooled_bytes");
        if let Some(told) = told.filter(|told| wanted(*told)) {
            return told;
        }
        assert!(Instant::now() < deadline, "not {what}: {told:?}");
    }
}

#[tokio::test]
async fn output_that_waits_for_the_bus_is_counted_until_the_bus_has_it() {
    // What `seq 100000` prints.
    const PRINTED: u32 = 588_895;
    let mut host = watched().await;
    let mut output = host.output("app").await;
    let script = "until [ -e go ]; do sleep 0.1; done; seq 100000; exec sleep 1000000";
    host.run(host.message("app", &Droplet::shell(script))).await;
    spooled("nothing", |bytes| bytes == 0.0).await;

    host.stop_bus().await;
    let mut go = host.ostler("run");
    go.args(["app", "--", "touch", "/home/vcap/app/go"]);
    assert!(go.status().unwrap().success());
    let printed = f64::from(PRINTED);
    let told = spooled("all of it", |bytes| bytes >= printed).await;
    assert!(
        told < printed * 1.1,
        "{told}: with headers, and nothing else"
    );
    // It is on disk: the next agent knows it, too.
    host.kill9().await;
    let from = host.logged(0, "").await.len();
    host.spawn_agent();
    host.logged(from, "serving metrics").await;
    spooled("as much as before", |bytes| bytes >= told).await;

    host.start_bus().await;
    output
        .until("all of it", |output| {
            output.stream(0, "stdout").next == u64::from(PRINTED)
        })
        .await;
    spooled("nothing again", |bytes| bytes == 0.0).await;
    host.stop("app").await;
}

#[tokio::test]
async fn helpers_that_somebody_kills_are_named_with_how_they_ended() {
    let host = Host::start().await;
    let answer = host.message("app", &Droplet::sample("sleeper"));
    let answer = host.run(answer).await;
    let handle = answer["handle"].as_str().unwrap();
    for (name, words) in [
        ("oom", "a watcher of memory kills ended"),
        ("iomux-link", "a linker ended"),
        ("iomux-spawn", "a job's supervisor was gone"),
    ] {
        let is_there = |tree: &Tree| tree.named(name).len() == 1;
        let tree = host.tree_until(name, is_there).await;
        tree.one(name).signal(Signal::SIGKILL);
        let log = host.logged(0, words).await;
        let line = { log.lines() }.find(|line| line.contains(words)).unwrap();
        for word in ["WARN", handle, "ended by signal 9"] {
            assert!(line.contains(word), "{word}: {line}");
        }
    }
    host.stop("app").await;
    // What ends with its app is no news.
    let log = host.log();
    let news = { log.lines() }.filter(|line| line.contains("WARN"));
    assert_eq!(news.count(), 3, "{log}");
}

#[tokio::test]
async fn disk_space_that_nobody_can_look_at_is_not_told_as_if_it_were_there() {
    let host = watched().await;
    let mut adverts = host.watch("dea.advertise").await;
    let known = "ostler_disk_available_bytes";
    assert!(metrics().await[known] > 0.0);
    // A look counts what is in there.
    let (containers, away) = (host.base.join("containers"), host.base.join("away"));
    std::fs::rename(&containers, &away).unwrap();
    std::fs::write(&containers, "").unwrap();
    adverts
        .until("none", |advert| advert["available_disk"] == 0)
        .await;
    let told = metrics().await;
    assert!(!told.contains_key(known), "{told:?}");
    assert!(told["ostler_memory_available_bytes"] > 0.0, "{told:?}");
    let subject = format!("$SRV.STATS.ostler.{}", host.id);
    let stats = host.request(&subject, &Value::Null).await;
    let data = &stats["endpoints"][0]["data"];
    assert!(data.get("available_disk").is_none(), "{stats}");
    host.logged(0, "how much disk is left could not be seen")
        .await;
    std::fs::remove_file(&containers).unwrap();
    std::fs::rename(&away, &containers).unwrap();
    adverts
        .until("some", |advert| advert["available_disk"] != 0)
        .await;
    assert!(metrics().await[known] > 0.0);
}

#[tokio::test]
async fn output_that_the_bus_did_not_come_back_for_is_counted_and_named() {
    const PRINTED: u32 = 588_895;
    let config = &[
        ON,
        ("[network]", "[instance]\ncrash_lifetime = 2\n[network]"),
    ];
    let mut host = Host::with(Setup {
        config,
        ..Default::default()
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    let mut output = host.output("app").await;
    let script = "echo before; until [ -e go ]; do sleep 0.1; done; seq 100000; exit 3";
    let answer = host.message("app", &Droplet::shell(script));
    let answer = host.run(answer).await;
    let handle = answer["handle"].as_str().unwrap();
    output
        .until("a line", |output| output.text(0, "stdout") == "before\n")
        .await;
    host.confirmed(handle).await;
    host.stop_bus().await;
    let mut go = host.ostler("run");
    go.args(["app", "--", "touch", "/home/vcap/app/go"]);
    assert!(go.status().unwrap().success());
    let log = host.logged(0, "output is dropped").await;
    let line = { log.lines() }.find(|line| line.contains("output is dropped"));
    let line = line.unwrap();
    for word in [&format!("bytes={PRINTED}"), handle, "droplet=app"] {
        assert!(line.contains(word), "{word}: {line}");
    }
    let missing = metrics().await["ostler_output_missing_bytes_total"];
    assert_eq!(missing, f64::from(PRINTED));
    host.start_bus().await;
    let exit = exits.next().await;
    assert_eq!(exit["output"]["stdout"], 7 + PRINTED, "{exit}");
}

#[tokio::test]
async fn where_a_disk_hangs_all_is_told_but_the_output_on_it() {
    let host = watched().await;
    let answer = host.message("app", &Droplet::sample("sleeper"));
    let answer = host.run(answer).await;
    spooled("nothing", |bytes| bytes == 0.0).await;
    let record = host.base.join("instances");
    let record = record.join(answer["handle"].as_str().unwrap());
    let (cursor, kept) = (record.join("cursor"), record.join("kept"));
    std::fs::rename(&cursor, &kept).unwrap();
    // Whoever opens it waits until somebody writes.
    nix::unistd::mkfifo(&cursor, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let subject = format!("$SRV.STATS.ostler.{}", host.id);
    let asked: Vec<_> = (0..20).map(|_| (&subject[..], Value::Null)).collect();
    let without = async || {
        let deadline = Instant::now() + patience();
        loop {
            let answers = host.burst(&asked).await;
            let without = |answer: &Value| {
                let data = &answer["endpoints"][0]["data"];
                data["running"] == 1 && data.get("spooled").is_none()
            };
            if answers.iter().all(without) {
                break;
            }
            assert!(Instant::now() < deadline, "{answers:?}");
        }
        let tasks = format!("/proc/{}/task", host.agent().pid());
        std::fs::read_dir(tasks).unwrap().count()
    };
    // Twenty at once, and again: each is answered, and only the first waits in the kernel.
    let before = without().await;
    let after = without().await;
    assert!(after < before + 10, "{before} threads, then {after}");
    let metrics = metrics().await;
    let name = "ostler_output_spooled_bytes";
    assert!(!metrics.contains_key(name), "{metrics:?}");
    assert_eq!(metrics["ostler_bus_connected"], 1.0, "{metrics:?}");
    drop(std::fs::File::options().write(true).open(&cursor).unwrap());
    std::fs::rename(&kept, &cursor).unwrap();
    spooled("nothing, as before", |bytes| bytes == 0.0).await;
    host.stop("app").await;
}

/// A base directory that became read-only, as `errors=remount-ro` makes it, for whoever opens what is in it. Until this is
/// dropped.
struct ReadOnly<'a>(&'a str);

impl<'a> ReadOnly<'a> {
    fn base(base: &'a str) -> Self {
        tool("mount", &["--bind", base, base]);
        let made = Self(base);
        tool("mount", &["-o", "remount,bind,ro", base]);
        made
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        tool("umount", &[self.0]);
    }
}

/// Waits until the page tells this of a disk that refuses everything.
async fn refuses_is(value: f64) {
    let end = Instant::now() + patience();
    while metrics().await["ostler_disk_refuses"] != value {
        assert!(Instant::now() < end, "not {value}");
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn a_disk_that_became_read_only_is_named_and_no_memory_is_told_there() {
    let host = watched().await;
    let mut adverts = host.watch("dea.advertise").await;
    adverts
        .until("a place", |advert| advert["available_memory"] != 0)
        .await;
    refuses_is(0.0).await;
    let base = host.base.display().to_string();
    let read_only = ReadOnly::base(&base);
    refuses_is(1.0).await;
    adverts
        .until("none", |advert| advert["available_memory"] == 0)
        .await;
    let message = host.message("new", &Droplet::sample("sleeper"));
    let answer = host.request(&host.subject("start"), &message).await;
    assert_eq!(answer["error"]["code"], "internal", "{answer}");
    let refused = |log: &str| {
        let mut lines = log.lines();
        lines.any(|line| {
            [
                "ERROR",
                "could not be recorded",
                "handle=",
                "droplet=new",
                "os error 30",
            ]
            .iter()
            .all(|word| line.contains(word))
        })
    };
    let log = host.log();
    assert!(refused(&log), "{log}");
    // Many looks, and one line.
    let told = |log: &str| log.matches("refuses what is written to it").count();
    assert_eq!(told(&log), 1, "{log}");
    drop(read_only);
    refuses_is(0.0).await;
    adverts
        .until("a place", |advert| advert["available_memory"] != 0)
        .await;
    host.logged(0, "the disk takes what is written again").await;
    host.run(message).await;
    host.stop("new").await;
}
