//! The harness itself: a ruler must be straight.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use futures_util::StreamExt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tests::{
    Body, Droplet, Files, Host, Network, Question, Running, fixtures, get, numbered, strict,
};

#[test]
fn a_failing_test_still_cleans_up() {
    struct Mark<'a>(&'a std::cell::Cell<bool>);
    impl Drop for Mark<'_> {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    // The workspace's profiles abort on panic; cargo builds tests to unwind all the same. Hosts rely on it.
    let cleaned = std::cell::Cell::new(false);
    let failed = catch_unwind(AssertUnwindSafe(|| {
        let _mark = Mark(&cleaned);
        panic!("on purpose");
    }));
    assert!(failed.is_err() && cleaned.get());
}

#[tokio::test]
async fn the_network_has_an_outside() {
    let network = Network::enter();
    let listener = tokio::net::TcpListener::bind((Network::HOST, 0))
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let from = network.outside(|| {
        std::net::TcpStream::connect(address)
            .unwrap()
            .local_addr()
            .unwrap()
    });
    assert_eq!(from.ip().to_string(), Network::OUTSIDE);
}

#[tokio::test]
async fn files_are_served_with_their_failures() {
    let _network = Network::enter();
    let files = Files::serve().await;
    let url = files.put("a.tgz", Body::Bytes(b"abc".to_vec()));
    let address = url
        .strip_prefix("http://")
        .unwrap()
        .split('/')
        .next()
        .unwrap();
    assert_eq!(
        get(address, "/a.tgz").await.unwrap(),
        (200, "abc".to_owned())
    );
    assert_eq!(get(address, "/b.tgz").await.unwrap().0, 404);
    assert_eq!(files.requests("a.tgz"), 1);
}

#[test]
fn numbered_lines_are_each_there_once() {
    assert_eq!(numbered("out", b"out 1\nout 2 ...\n"), Ok(2));
    assert!(
        numbered("out", b"out 1\nout 3\n")
            .unwrap_err()
            .contains("after line 1")
    );
    assert!(numbered("out", b"out 1\nout 1\n").is_err());
    assert!(numbered("out", b"out 1\nout 2").is_err());
    assert!(numbered("out", b"out 1\nerr 2\n").is_err());
}

#[test]
fn sample_apps_are_packed_to_the_same_bytes() {
    assert_eq!(
        Droplet::sample("sinatra").sha1(),
        Droplet::sample("sinatra").sha1()
    );
    assert_eq!(Droplet::shell("true").sha1().len(), 40);
    assert_eq!(Droplet::shell("true").sha256().len(), 64);
}

#[test]
fn a_process_is_ended_and_reaped_once() {
    let log = std::env::temp_dir().join(format!("ostler-harness-{}", std::process::id()));
    let sleeper = Running::start(Path::new("/bin/sleep"), &["1000"], &log);
    let process = tests::Process::read(sleeper.pid()).unwrap();
    assert!(process.lives());
    sleeper.end();
    assert!(!process.lives());
    std::fs::remove_file(log).unwrap();
}

#[test]
fn the_messages_of_the_reference_are_as_they_were_copied() {
    let directory = fixtures().join("messages");
    let sums = std::fs::read_to_string(directory.join("SHA256SUMS")).unwrap();
    let mut summed: Vec<&str> = Vec::new();
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        let bytes = std::fs::read(directory.join(name)).unwrap();
        let now: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(now, sum, "{name}");
        summed.push(name);
    }
    let here = std::fs::read_dir(directory).unwrap();
    let here = here.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut here: Vec<String> = here.filter(|name| name.ends_with(".json")).collect();
    here.sort();
    assert_eq!(here, summed);
}

/// The subject of what agents say, the fixture of it, and what must make a decoder refuse it: where, and what stands
/// there.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a Value)]);

#[test]
fn ears_are_as_strict_as_the_decoders_of_their_time() {
    let (inbox, text, number) = ("_INBOX.a", json!("1"), json!(1));
    let (null, fraction) = (Value::Null, json!(1.5));
    let cases: &[Case<'_>] = &[
        (
            "dea.start",
            "dea.hello",
            &[
                ("/id", &json!("a.b")),
                ("/port", &json!(65536)),
                ("/version", &json!(0.99)),
            ],
        ),
        (inbox, "dea.hello", &[("/ip", &null)]),
        (
            inbox,
            "dea.status-reply",
            &[("/max_memory", &text), ("/num_clients", &text)],
        ),
        (
            inbox,
            "droplet.status-reply",
            &[("/name", &null), ("/uris", &text)],
        ),
        (
            "dea.advertise",
            "dea.advertise",
            &[
                ("/stacks", &null),
                ("/app_id_to_count", &null),
                (
                    "/app_id_to_count/5c1f7a0e-33d2-4b68-9a3f-0c6c7f1b2a91",
                    &fraction,
                ),
                ("/available_memory", &json!(1.0)),
                ("/available_disk", &text),
                ("/placement_properties", &null),
                ("/url", &json!("https://10.0.0.1")),
            ],
        ),
        (
            "dea.shutdown",
            "dea.shutdown",
            &[("/id", &number), ("/app_id_to_count", &json!([]))],
        ),
        (
            "dea.heartbeat",
            "dea.heartbeat",
            &[
                ("/dea", &null),
                ("/droplets", &null),
                ("/droplets/1/droplet", &number),
                ("/droplets/1/version", &null),
                (
                    "/droplets/1/instance",
                    &json!("6E4C1F0B9A7D4853B2E1C0D9F8A7B6C5"),
                ),
                ("/droplets/1/index", &json!(0.0)),
                ("/droplets/1/index", &json!(1_u64 << 31)),
                ("/droplets/1/index", &json!(-1)),
                ("/droplets/1/state", &json!("STOPPING")),
                ("/droplets/1/state", &json!("running")),
                ("/droplets/1/state_timestamp", &text),
            ],
        ),
        (
            "droplet.exited",
            "droplet.exited",
            &[
                ("/exit_status", &fraction),
                ("/crash_timestamp", &json!(1_471_351_111.0)),
                ("/reason", &json!("STOPPED")),
                ("/reason", &json!("DOWN")),
                ("/exit_description", &null),
            ],
        ),
        (
            "router.register",
            "router.register",
            &[
                ("/port", &json!(65536)),
                ("/port", &json!(0)),
                ("/port", &text),
                ("/tags/component", &number),
                ("/tags", &null),
                ("/uris", &json!([1])),
                ("/private_instance_index", &number),
                ("/private_instance_id", &text),
            ],
        ),
        ("router.unregister", "router.register", &[("/port", &null)]),
        (
            inbox,
            "dea.find.droplet-reply",
            &[
                ("/index", &text),
                ("/state", &json!("FLYING")),
                ("/stats/uptime", &json!(86.2)),
                ("/stats/mem_quota", &fraction),
                ("/stats/usage/mem", &null),
                ("/stats/usage/cpu", &text),
                ("/stats/usage", &null),
            ],
        ),
    ];
    for (subject, fixture, wrong) in cases {
        let right = Host::fixture(fixture);
        assert_eq!(strict::check(subject, &right), Ok(()), "{subject}: {right}");
        for (place, value) in *wrong {
            let mut message = right.clone();
            *message.pointer_mut(place).unwrap() = (*value).clone();
            let told = strict::check(subject, &message).expect_err(place);
            let field = place.rsplit('/').find(|part| part.parse::<u8>().is_err());
            let named = told.contains(field.unwrap()) || told.contains("app_id_to_count");
            assert!(named, "{subject} {place} = {value}: {told}");
        }
    }
    for (answer, readable) in [
        (json!({"ok": true, "matched": 1}), true),
        (
            json!({"ok": false, "error": {"code": "busy", "message": "later", "retryable": true}}),
            true,
        ),
        (json!({"ok": false, "error": "later"}), false),
        (json!({"ok": false}), false),
        (json!({"ok": "yes"}), false),
    ] {
        assert_eq!(strict::check(inbox, &answer).is_ok(), readable, "{answer}");
    }
}

#[tokio::test]
async fn each_answer_is_counted_where_it_was_asked_for() {
    let host = Host::start().await;
    let nats = host.nats().clone();
    let mut twice = nats.subscribe("twice").await.unwrap();
    let _silent = host.watch("silent").await;
    tokio::spawn(async move {
        while let Some(message) = twice.next().await {
            for number in ["1", "2"] {
                let to = message.reply.clone().unwrap();
                nats.publish(to, number.into()).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    });
    let questions =
        [("silent", 0), ("twice", 1), ("silent", 0)].map(|(subject, answers)| Question {
            subject: subject.to_owned(),
            body: Vec::new(),
            answers,
        });
    let answers = host.ask_each(&questions).await;
    let counts: Vec<usize> = answers.iter().map(Vec::len).collect();
    assert_eq!(counts, [0, 2, 0]);
}
