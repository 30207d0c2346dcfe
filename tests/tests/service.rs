//! The NATS services API (ADR-32): what `nats micro ls`, `info`, `stats` and `ping` ask of every host.

use async_nats::RequestErrorKind;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tests::{Droplet, Host, Setup};

/// Silence after which nobody else answers.
const SILENCE: Duration = Duration::from_millis(500);

/// What goes with every answer: types as nats.go's `micro.ServiceIdentity` decodes them.
fn is_of(host: &Host, answer: &Value, kind: &str) {
    assert_eq!(answer["name"], "ostler", "{answer}");
    assert_eq!(answer["id"], host.id, "{answer}");
    assert_eq!(answer["type"], format!("io.nats.micro.v1.{kind}_response"));
    let version = answer["version"].as_str().unwrap();
    let numbers = version.split('.').map(str::parse::<u64>);
    assert_eq!(numbers.filter(Result::is_ok).count(), 3, "{version}");
    let metadata: BTreeMap<String, String> =
        serde_json::from_value(answer["metadata"].clone()).unwrap();
    for key in ["zone", "arch", "kernel", "hostname", "ip"] {
        assert!(!metadata[key].is_empty(), "{key}: {answer}");
    }
}

/// What a host says once it says all: how it stands is left out while it is too busy for that.
async fn stats(host: &Host) -> (BTreeMap<String, Value>, Value) {
    let subject = format!("$SRV.STATS.ostler.{}", host.id);
    let deadline = Instant::now() + tests::patience();
    let answer = loop {
        let answer = host.request(&subject, &Value::Null).await;
        is_of(host, &answer, "stats");
        let whole = answer["endpoints"][0]["data"]["running"].is_number();
        if whole || Instant::now() > deadline {
            break answer;
        }
    };
    let endpoints = answer["endpoints"].as_array().unwrap();
    let named = |endpoint: &Value| (endpoint["name"].as_str().unwrap().into(), endpoint.clone());
    let endpoints = endpoints.iter().map(named).collect();
    (endpoints, answer)
}

#[tokio::test]
async fn each_of_two_hosts_answers_for_itself() {
    let host = Host::with(Setup {
        bus: Host::SHARED,
        ..Setup::default()
    })
    .await;
    let other = host.beside(&[]).await;
    for kind in ["ping", "info", "stats"] {
        let subject = format!("$SRV.{}.ostler", kind.to_uppercase());
        let mut answers = host.request_all(&subject, &Value::Null, (2, SILENCE)).await;
        assert_eq!(answers.len(), 2, "{subject}: {answers:?}");
        answers.sort_by_key(|answer| answer["id"] != host.id);
        is_of(&host, &answers[0], kind);
        is_of(&other, &answers[1], kind);
    }
}

#[tokio::test]
async fn every_host_is_found_as_all_services_are() {
    let host = Host::start().await;
    for kind in ["ping", "info", "stats"] {
        let verb = kind.to_uppercase();
        for subject in [
            format!("$SRV.{verb}"),
            format!("$SRV.{verb}.ostler"),
            format!("$SRV.{verb}.ostler.{}", host.id),
        ] {
            let answers = host.request_all(&subject, &Value::Null, (1, SILENCE)).await;
            assert_eq!(answers.len(), 1, "{subject}: {answers:?}");
            is_of(&host, &answers[0], kind);
        }
        for subject in [
            format!("$SRV.{verb}.other"),
            format!("$SRV.{verb}.ostler.other"),
        ] {
            let answer = host.nats().request(subject.clone(), "".into()).await;
            let why = answer.map_err(|error| error.kind()).unwrap_err();
            assert_eq!(why, RequestErrorKind::NoResponders, "{subject}");
        }
    }

    // Every subject that is answered is an endpoint, and what an endpoint names answers.
    let info = host.request("$SRV.INFO", &Value::Null).await;
    assert!(!info["description"].as_str().unwrap().is_empty());
    let endpoints = info["endpoints"].as_array().unwrap();
    let text = |endpoint: &Value, key: &str| endpoint[key].as_str().unwrap().to_owned();
    let subjects: Vec<(String, String)> = endpoints
        .iter()
        .map(|endpoint| (text(endpoint, "name"), text(endpoint, "subject")))
        .collect();
    let here = ["start", "stop", "find", "scale"].map(|verb| (verb.into(), host.subject(verb)));
    assert!(here.iter().all(|one| subjects.contains(one)), "{info}");
    for subject in ["dea.stop", "dea.update", "dea.find.droplet", "dea.status"] {
        let one = (subject.replace('.', "-"), subject.to_owned());
        assert!(subjects.contains(&one), "{info}");
    }
    for (name, _) in &subjects {
        let safe = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        assert!(name.chars().all(safe), "{name}");
    }
    assert!(
        endpoints
            .iter()
            .all(|endpoint| endpoint["queue_group"] == "")
    );
}

#[tokio::test]
async fn what_was_asked_of_a_host_is_counted() {
    let mut host = Host::start().await;
    let (before, _) = stats(&host).await;
    assert!(
        before
            .values()
            .all(|endpoint| endpoint["num_requests"] == 0)
    );
    assert_eq!(before["start"]["data"]["running"], 0);
    let memory = before["start"]["data"]["available_memory"]
        .as_i64()
        .unwrap();

    let sleeper = Droplet::sample("sleeper");
    host.run(host.message("app", &sleeper)).await;
    let crasher = host.message("crasher", &Droplet::shell("exit 3"));
    let mut exits = host.watch("droplet.exited").await;
    host.request(&host.subject("start"), &crasher).await;
    exits.next().await;
    for _ in 0..3 {
        let broken = host.request_bytes(&host.subject("start"), "{").await;
        assert!(broken.headers.is_some());
    }
    let nobody = json!({"droplet": "nobody"});
    for _ in 0..4 {
        host.request("dea.stop", &nobody).await;
    }
    host.request("dea.status", &Value::Null).await;
    // A request without a reply-to counts, too.
    host.publish("dea.stop", &nobody).await;

    // Counted when it has been heard, or a moment after its answer; and an exit may be told before the crash is counted.
    let deadline = Instant::now() + tests::patience();
    let (after, answer) = loop {
        let (after, answer) = stats(&host).await;
        let heard =
            after["dea-stop"]["num_requests"] == 5 && after["dea-status"]["num_requests"] == 1;
        if heard && after["start"]["data"]["crashed"] == 1 || Instant::now() > deadline {
            break (after, answer);
        }
    };
    assert_eq!(after["dea-stop"]["num_requests"], 5, "{answer}");
    let count = |name: &str, what: &str| after[name][what].as_u64().unwrap();
    assert_eq!(count("start", "num_requests"), 5, "{answer}");
    assert_eq!(count("start", "num_errors"), 3, "{answer}");
    let last = after["start"]["last_error"].as_str().unwrap();
    assert!(last.starts_with("bad_json: "), "{last}");
    assert_eq!(count("dea-status", "num_requests"), 1, "{answer}");
    assert_eq!(count("dea-status", "num_errors"), 0, "{answer}");
    assert_eq!(after["dea-stop"]["last_error"], "");
    // Nanoseconds: the start that waited took more than one millisecond.
    assert!(count("start", "processing_time") > 1_000_000, "{answer}");
    let average = count("start", "processing_time") / 5;
    assert_eq!(count("start", "average_processing_time"), average);

    let data = &after["start"]["data"];
    assert_eq!(data["instances"], 1, "{answer}");
    assert_eq!(data["running"], 1, "{answer}");
    assert_eq!(data["crashed"], 1, "{answer}");
    assert_eq!(data["dropped"], 0, "{answer}");
    assert_eq!(data["available_memory"], memory - 128, "{answer}");
    assert!(data["available_disk"].is_i64(), "{answer}");
    let started = answer["started"].as_str().unwrap().to_owned();
    assert_eq!(started.len(), "2026-01-01T00:00:00Z".len(), "{started}");
    assert!(started.starts_with("20") && started.ends_with('Z') && started[10..].starts_with('T'));

    // Counts are of this agent's life, as all services tell theirs.
    host.restart().await;
    let (fresh, _) = stats(&host).await;
    assert_eq!(fresh["start"]["num_requests"], 0);
    assert_eq!(fresh["start"]["data"]["running"], 1);
    host.stop("app").await;
}
