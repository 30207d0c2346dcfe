//! The requests of `fixtures/nats-cli/session.sh` and of `docs/bus.md`, byte for byte, without the CLI: what the script
//! waits for and what the page shows comes.

use futures_util::StreamExt;
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tests::{Body, Droplet, Host, Setup, fixtures, get, patience, tool};
use tokio::time::{Instant, sleep, timeout};

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

/// What the page shows as it is on any host. Of all else it shows what fields there are, and of what type.
const EXACT: [&str; 20] = [
    "code",
    "droplet",
    "exit_description",
    "exit_status",
    "fds_quota",
    "file",
    "index",
    "matched",
    "mem_quota",
    "name",
    "next",
    "offset",
    "ok",
    "oom",
    "retryable",
    "signal",
    "state",
    "text",
    "type",
    "uris",
];

/// The triggers, and where a host then says something.
const TRIGGERS: [(&str, &str); 3] = [
    ("dea.locate", "dea.advertise"),
    ("healthmanager.start", "dea.heartbeat"),
    ("router.start", "router.register"),
];

/// Crashes as the page shows: with these bytes in `stderr`, and a log file of its own.
const CRASHES: &str = r#"echo begins
echo more >../logs/app.log
echo "main.rb:3:in \`<main>': undefined method (NoMethodError)" >&2
exit 1"#;

/// The commands of docs/bus.md, in its order, each with the text of the answer that stands below it.
fn shown() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(fixtures().join("../docs/bus.md")).unwrap();
    let mut shown: Vec<(String, String)> = Vec::new();
    let mut within = false;
    for line in text.lines() {
        let code = line.strip_prefix("    ");
        within &= code.is_some();
        let Some(code) = code else { continue };
        if code.starts_with("nats ") {
            shown.push((code.to_owned(), String::new()));
            within = true;
        } else if within {
            let (command, answer) = shown.last_mut().unwrap();
            // A body in quotes may go on in the next lines.
            let open = command.matches('\'').count() % 2 == 1;
            let goes_on = if open { command } else { answer };
            goes_on.push('\n');
            goes_on.push_str(code);
        }
    }
    for verb in ["nats req ", "nats request ", "nats pub ", "nats sub "] {
        let taken = shown
            .iter()
            .filter(|(command, _)| command.starts_with(verb));
        let all = text.matches(verb).count();
        assert_eq!(taken.count(), all, "a `{verb}` cannot be pasted");
    }
    shown
}

/// What a shell hands to `nats` of a command: the verb, the subject and the body, if there is one. `$ID` is the host's id.
fn words(command: &str, id: &str) -> (String, String, String) {
    let script = format!("nats() {{ printf '%s\\0' \"$@\"; }}\nID={id}\n{command}");
    let said = tool("sh", &["-euc", &script]);
    let words = said.split_terminator('\0');
    let words: Vec<&str> = words.filter(|word| !word.starts_with("--")).collect();
    let (verb, subject, body) = match words[..] {
        ["sub", subject] => ("sub", subject, ""),
        [verb, subject, body] => (verb, subject, body),
        _ => panic!("{command}: a verb, a subject and a body, not {words:?}"),
    };
    let json = serde_json::from_str::<Map<String, Value>>(body);
    assert!(body.is_empty() || json.is_ok(), "{command}: {json:?}");
    (verb.to_owned(), subject.to_owned(), body.to_owned())
}

/// How an answer, found under `key`, differs from what the page shows; `None` if it does not.
fn difference(key: &str, ours: &Value, shown: &Value) -> Option<String> {
    let same = match (ours, shown) {
        (Value::Object(ours), Value::Object(shown)) if ours.keys().eq(shown.keys()) => {
            let mut all = shown.iter();
            return all.find_map(|(key, shown)| difference(key, &ours[key], shown));
        }
        (Value::Array(ours), Value::Array(shown)) => {
            let goes_on = shown.last().is_some_and(|last| last == "…");
            let shown = &shown[..shown.len() - usize::from(goes_on)];
            if ours.len() == shown.len() || (goes_on && ours.len() > shown.len()) {
                let mut all = ours.iter().zip(shown);
                return all.find_map(|(ours, shown)| difference(key, ours, shown));
            }
            false
        }
        _ if EXACT.contains(&key) => ours == shown,
        // What nothing counts on this machine.
        (Value::Null, Value::Number(_)) => true,
        (Value::Object(_), _) => false,
        _ => std::mem::discriminant(ours) == std::mem::discriminant(shown),
    };
    (!same).then(|| format!("`{key}` is {ours}, the page shows {shown}"))
}

/// Sends a request; one of its answers is what the page shows.
async fn is_answered(host: &Host, subject: &str, body: &str, shown: &str) {
    let shown = shown.replace(", …]", ",\"…\"]");
    let shown: Value = serde_json::from_str(&shown)
        .unwrap_or_else(|error| panic!("{subject}: the page shows no answer: {error}: {shown}"));
    // One of each instance, of which one has crashed.
    let count = if subject == "dea.find.droplet" { 2 } else { 1 };
    // What the agent is too busy to say it leaves out of these.
    let again = ["dea.find.droplet", "$SRV.STATS.ostler"].contains(&subject);
    let deadline = Instant::now() + patience();
    loop {
        let answers = host.request_many(subject, body, count).await;
        let other = { answers.iter() }.filter_map(|answer| difference("", answer, &shown));
        let other: Vec<String> = other.collect();
        if other.len() < answers.len() {
            return;
        }
        let late = !again || Instant::now() >= deadline;
        assert!(!late, "{subject} {body}: {other:?}\n{}", host.log());
    }
}

/// Publishes a trigger: the host says what it must.
async fn triggers(host: &Host, subject: &str, body: &str) {
    let trigger = TRIGGERS.iter().find(|(trigger, _)| *trigger == subject);
    let (_, said) = trigger.unwrap_or_else(|| panic!("{subject} is no trigger"));
    let mut said = host.watch(said).await;
    // What was said before this has arrived, and is forgotten.
    host.request("dea.status", &json!({})).await;
    said.arrived();
    host.publish_bytes(subject, body).await;
    said.next().await;
}

/// Waits until this command finds so many.
async fn finds(host: &Host, verb: &str, body: &Value, count: usize) {
    let subject = host.subject(verb);
    let found = async {
        while host.request(&subject, body).await["matched"] != count {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let found = timeout(patience(), found).await;
    assert!(found.is_ok(), "{verb} {body}: not {count}\n{}", host.log());
}

/// An instance of `hello` crashes, and what it left is kept.
async fn crash(host: &Host) {
    let message = host.message("hello", &Droplet::shell(CRASHES));
    let answer = host.request(&host.subject("start"), &message).await;
    assert_eq!(answer["ok"], true, "{answer}");
    finds(host, "logs", &json!({"droplet": "hello"}), 1).await;
}

/// All that a host listens to: what nats-server sends it, and the commands to it alone that it tells of.
async fn subjects(host: &Host) -> BTreeSet<String> {
    let info = host.request("$SRV.INFO", &Value::Null).await;
    let endpoints = info["endpoints"].as_array().unwrap().iter();
    let endpoints = endpoints.map(|endpoint| endpoint["subject"].as_str().unwrap().to_owned());
    let (_, told) = get("127.0.0.1:8222", "/connz?subs=1").await.unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    let mut connections = told["connections"].as_array().unwrap().iter();
    let name = format!("ostler/{}", host.id);
    let connection = connections.find(|connection| connection["name"] == *name);
    let heard = connection.unwrap()["subscriptions_list"]
        .as_array()
        .unwrap();
    let heard = heard.iter().map(|subject| subject.as_str().unwrap());
    let heard = heard.filter(|subject| {
        !subject.starts_with("$SRV.") && !subject.starts_with("_INBOX") && !subject.ends_with(".*")
    });
    heard.map(str::to_owned).chain(endpoints).collect()
}

#[tokio::test]
async fn whatever_the_page_on_the_bus_lets_one_paste_does_what_it_shows() {
    // However full its disk is, a crash is kept; and collectors of DEA's time are answered, too.
    let all = "[crashes]\nmax_block_usage = 1.0\nmax_inode_usage = 1.0\n\
               [metrics]\nlisten = \"0.0.0.0:9464\"\n[network]";
    let host = Host::with(Setup {
        config: &[Setup::NO_TIMER, ("[network]", all)],
        bus: &["--http_port", "8222"],
        ..Setup::default()
    })
    .await;
    // What a reader puts there himself, beside the host's id. The digest on the page is that of the sample.
    let sample = Body::Bytes(Droplet::sample("sinatra").0);
    let url = host.files.put("sinatra.tgz", sample);
    let shown = shown().into_iter().map(|(command, answer)| {
        let command = command.replace("file:///srv/sinatra.tgz", &url);
        (words(&command, &host.id), answer)
    });
    let (readers, asked): (Vec<_>, Vec<_>) = shown.partition(|((verb, ..), _)| verb == "sub");
    let mut read = Vec::new();
    for ((_, subject, _), _) in readers {
        read.push(host.nats().subscribe(subject).await.unwrap());
    }
    let mut pasted = BTreeSet::new();
    let stopped = json!({"droplet": "hello", "states": ["STOPPED"]});
    for ((verb, subject, body), answer) in asked {
        // A reader is slower: what a line before has stopped is removed, too.
        finds(&host, "find", &stopped, 0).await;
        if subject == host.subject("logs") && !pasted.contains(&subject) {
            crash(&host).await;
        }
        match verb.as_str() {
            "req" | "request" => is_answered(&host, &subject, &body, &answer).await,
            "pub" => triggers(&host, &subject, &body).await,
            _ => panic!("the test knows no `nats {verb}`"),
        }
        pasted.insert(subject);
    }
    for output in &mut read {
        let first = timeout(patience(), output.next()).await;
        assert!(first.unwrap().unwrap().headers.is_some());
    }
    let subjects = subjects(&host).await;
    assert!(subjects.len() >= 15, "{subjects:?}");
    let missing: Vec<&String> = subjects.difference(&pasted).collect();
    assert!(missing.is_empty(), "the page has no line for {missing:?}");
    host.stop("hello").await;
}
