//! The requests of `fixtures/nats-cli/session.sh`, byte for byte, without the CLI: what it waits for comes.

use nix::sys::signal::Signal;
use serde_json::Value;
use std::time::Duration;
use tests::{Body, Droplet, Host, fixtures};

/// Silence after which no further answer comes.
const SILENCE: Duration = Duration::from_millis(1500);

/// The session's requests: name, subject and body of each.
fn requests(host: &Host) -> Vec<(String, String, String)> {
    let url = |app: &str| {
        let droplet = Droplet::sample(app);
        let sha1 = droplet.sha1();
        let url = host
            .files
            .put(&format!("{app}.tgz"), Body::Bytes(droplet.0));
        (url, sha1)
    };
    let ((lines, lines_sha1), (_, hog_sha1)) = (url("lines"), url("hog"));
    let files = lines.strip_suffix("/lines.tgz").unwrap();
    let text = std::fs::read_to_string(fixtures().join("nats-cli/requests")).unwrap();
    let text = text
        .replace("@ID@", &host.id)
        .replace("@FILES@", files)
        .replace("@SHA1:lines@", &lines_sha1)
        .replace("@SHA1:hog@", &hog_sha1)
        .replace("@NONCE@", "1");
    assert!(!text.lines().skip(1).any(|line| line.contains('@')));
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.splitn(3, ' ');
            let mut next = || words.next().unwrap_or_default().to_owned();
            (next(), next(), next())
        })
        .collect()
}

async fn ask(host: &Host, subject: &str, body: &str) -> Value {
    let answer = host.request_bytes(subject, body).await;
    serde_json::from_slice(&answer.payload).unwrap()
}

#[tokio::test]
async fn a_session_of_the_stock_cli_is_answered_as_its_script_expects() {
    let host = Host::start().await;
    let mut output = host.output("cli-lines").await;
    let (mut kills, mut exits) = (
        host.watch("droplet.oom").await,
        host.watch("droplet.exited").await,
    );
    let mut handle = Value::Null;
    let mut said = Vec::new();
    for (name, subject, body) in requests(&host) {
        if name == "droplets" {
            let body = serde_json::from_str(&body).unwrap();
            let found = host.request_all(&subject, &body, (3, SILENCE)).await;
            assert_eq!(found.len(), 3, "{found:?}");
            assert_eq!(found[0]["stats"]["mem_quota"], 64 << 20, "{found:?}");
            said.push(name);
            continue;
        }
        let answer = ask(&host, &subject, &body).await;
        match name.as_str() {
            "status" => assert_eq!(answer["id"], host.id),
            "start" => {
                assert_eq!(answer["ok"], true, "{answer}");
                handle = answer["handle"].clone();
                let first = |output: &tests::Output| output.stream(0, "stdout").next > 100;
                output.until("the first lines", first).await;
                assert!(
                    output
                        .stream(0, "stdout")
                        .bytes
                        .starts_with(b"out 000000001 ")
                );
            }
            "again" => assert_eq!(answer["handle"], handle, "{answer}"),
            "find" => {
                let found = answer["instances"].as_array().unwrap();
                let running = found.iter().filter(|one| one["state"] == "RUNNING");
                assert_eq!(running.count(), 3, "{answer}");
            }
            "oom" => {
                assert_eq!(answer["ok"], true, "{answer}");
                assert_eq!(kills.next().await["victim"]["comm"], "hog");
                let hog = |exit: &Value| exit["droplet"] == "cli-hog";
                let exit = exits.until("the end of hog", hog).await;
                assert_eq!(exit["exit_description"], "out of memory", "{exit}");
            }
            "broken" => assert_eq!(answer["error"]["code"], "bad_field", "{answer}"),
            "stop" => assert_eq!(answer["matched"], 1, "{answer}"),
            "nobody" => assert_eq!(answer["matched"], 0, "{answer}"),
            "services" => assert_eq!(answer["endpoints"][0]["num_errors"], 1, "{answer}"),
            "scale" | "grow" => assert_eq!(answer["ok"], true, "{answer}"),
            other => panic!("the test knows no {other}"),
        }
        said.push(name);
    }
    // The script asks for all of them, in this order.
    let script = std::fs::read_to_string(fixtures().join("nats-cli/session.sh")).unwrap();
    let asked: Vec<&str> = script
        .lines()
        .filter_map(|line| line.strip_prefix("ask "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(asked, said);
    // Then it drains the agent that it was given, which says so.
    let drain = "  listen goodbye dea.shutdown 1\n  sleep 1\n  kill -USR1 \"$1\"\n  heard goodbye;";
    assert!(script.contains(drain), "it drains in another way");
    let mut goodbyes = host.watch("dea.shutdown").await;
    host.agent().signal(Signal::SIGUSR1);
    let goodbye = goodbyes.next().await;
    assert_eq!(goodbye["id"], host.id, "{goodbye}");
    let (_, subject, body) = requests(&host)
        .into_iter()
        .find(|(name, ..)| name == "oom")
        .unwrap();
    let answer = ask(&host, &subject, &body).await;
    assert_eq!(answer["error"]["code"], "shutting_down", "{answer}");
}

/// What stands in the documentation to be pasted: (subject, body).
fn documented() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(fixtures().join("../docs/bus.md")).unwrap();
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(command) = line.strip_prefix("    nats req ") else {
            continue;
        };
        // A body in quotes may go on in the next lines.
        let mut command = command.to_owned();
        while command.matches('\'').count() % 2 == 1 {
            command.push_str(lines.next().unwrap().trim_start());
        }
        let quoted: Vec<&str> = command.split('\'').collect();
        let outside = quoted.iter().step_by(2).flat_map(|text| text.split(' '));
        let mut words: Vec<String> = outside
            .filter(|word| !word.is_empty() && !word.starts_with("--"))
            .map(str::to_owned)
            .collect();
        words.extend(
            quoted
                .iter()
                .skip(1)
                .step_by(2)
                .map(|&text| text.to_owned()),
        );
        assert_eq!(words.len(), 2, "{command}: a subject and a body");
        let body = words.pop().unwrap();
        found.push((words.pop().unwrap(), body));
    }
    found
}

#[tokio::test]
async fn what_the_documentation_lets_one_paste_is_answered() {
    let host = Host::start().await;
    // The digest in the documentation is that of the sample.
    let url = host.files.put(
        "sinatra.tgz",
        Body::Bytes(Droplet::sample("sinatra").0.clone()),
    );
    let documented = documented();
    for (subject, body) in &documented {
        let subject = subject.replace("$ID", &host.id);
        let body = body.replace("file:///srv/sinatra.tgz", &url);
        let answer = ask(&host, &subject, &body).await;
        let nothing_crashed = body.contains("\"file\"") && answer["error"]["code"] == "unknown_app";
        let good = answer.get("ok").is_none_or(|ok| *ok == true);
        assert!(good || nothing_crashed, "{subject} {body}: {answer}");
    }
    let info = host.request("$SRV.INFO", &Value::Null).await;
    for endpoint in info["endpoints"].as_array().unwrap() {
        let subject = endpoint["subject"].as_str().unwrap();
        let subject = subject.replace(&host.id, "$ID");
        let there = documented.iter().any(|(other, _)| *other == subject);
        // On one host it is told by its text, and pasted as on all.
        assert!(
            there || subject == "dea.stop",
            "{subject} is not documented"
        );
    }
    host.stop("hello").await;
}
