//! Trace context: what a command comes with goes to its answer, to the app, to what is told of the app, and into the log.

use async_nats::{HeaderMap, Message, Request, Subscriber};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tests::{Droplet, Host, Setup, patience};
use tokio::time::timeout;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const OTHER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
const STATE: &str = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE";

/// Asks with these headers.
async fn ask(host: &Host, subject: &str, headers: &[(&str, &str)], body: &Value) -> Message {
    let mut all = HeaderMap::new();
    for (name, value) in headers {
        all.append(*name, *value);
    }
    let request = Request::new()
        .headers(all)
        .payload(body.to_string().into())
        .timeout(Some(patience()));
    host.nats()
        .send_request(subject.to_owned(), request)
        .await
        .unwrap()
}

/// The trace headers of a message.
fn traced(message: &Message) -> [Option<String>; 2] {
    ["traceparent", "tracestate"].map(|name| {
        let headers = message.headers.as_ref();
        headers?.get(name).map(ToString::to_string)
    })
}

fn both(parent: &str, state: &str) -> [Option<String>; 2] {
    [Some(parent.to_owned()), Some(state.to_owned())]
}

async fn listen(host: &Host, subject: &str) -> Subscriber {
    let heard = host.nats().subscribe(subject.to_owned()).await.unwrap();
    host.nats().flush().await.unwrap();
    heard
}

/// The next message about this app.
async fn about(heard: &mut Subscriber, droplet: &str) -> Message {
    let next = async {
        loop {
            let message = heard.next().await.unwrap();
            let body: Value = serde_json::from_slice(&message.payload).unwrap();
            if body["droplet"] == droplet {
                return message;
            }
        }
    };
    timeout(patience(), next).await.unwrap()
}

#[tokio::test]
async fn a_trace_goes_to_the_answer_the_app_and_what_is_told_of_it_also_by_the_next_agent() {
    let mut host = Host::start().await;
    let app =
        Droplet::shell("echo \"trace=$TRACEPARENT state=$TRACESTATE mine=$MINE\"; exec sleep 1000");
    let mut start = host.message("app", &app);
    start["env"] = json!(["MINE=$TRACEPARENT"]);
    start["wait"] = json!("running");
    let mut output = host.output("app").await;
    let headers = [("Traceparent", PARENT), ("TRACESTATE", STATE)];
    let answer = ask(&host, &host.subject("start"), &headers, &start).await;
    assert_eq!(traced(&answer), both(PARENT, STATE), "{answer:?}");
    output
        .until("the environment", |output| {
            output.text(0, "stdout").ends_with('\n')
        })
        .await;
    assert_eq!(
        output.text(0, "stdout"),
        format!("trace={PARENT} state={STATE} mine={PARENT}\n")
    );

    // Others who ask have their own, or none.
    let find = json!({"droplet": "app"});
    let answer = ask(
        &host,
        &host.subject("find"),
        &[("traceparent", OTHER)],
        &find,
    )
    .await;
    assert_eq!(traced(&answer), [Some(OTHER.into()), None]);
    let answer = ask(&host, &host.subject("find"), &[], &find).await;
    assert_eq!(traced(&answer), [None, None]);

    // What began it is told with its end, whoever asked for that.
    host.restart().await;
    let mut exits = listen(&host, "droplet.exited").await;
    let stop = json!({"droplet": "app", "wait": "stopped"});
    let answer = ask(
        &host,
        &host.subject("stop"),
        &[("traceparent", OTHER)],
        &stop,
    )
    .await;
    assert_eq!(traced(&answer), [Some(OTHER.into()), None]);
    assert_eq!(traced(&about(&mut exits, "app").await), both(PARENT, STATE));

    // An instance that a scale begins belongs to the scale, not to the start before.
    let scale = json!({"droplet": "app", "instances": 1, "wait": "running"});
    let answer = ask(
        &host,
        &host.subject("scale"),
        &[("traceparent", OTHER)],
        &scale,
    )
    .await;
    assert_eq!(traced(&answer), [Some(OTHER.into()), None]);
    host.stop("app").await;
    let exit = about(&mut exits, "app").await;
    assert_eq!(traced(&exit), [Some(OTHER.into()), None]);
}

#[tokio::test]
async fn kills_and_refusals_bear_their_trace_and_the_log_names_it() {
    let host = Host::start().await;
    let mut ooms = listen(&host, "droplet.oom").await;
    let mut exits = listen(&host, "droplet.exited").await;
    let eater = host.message("eater", &Droplet::shell("exec tail /dev/zero"));
    let headers = [("traceparent", PARENT), ("tracestate", STATE)];
    let answer = ask(&host, &host.subject("start"), &headers, &eater).await;
    assert_eq!(traced(&answer), both(PARENT, STATE), "{answer:?}");
    assert_eq!(
        traced(&about(&mut ooms, "eater").await),
        both(PARENT, STATE)
    );
    assert_eq!(
        traced(&about(&mut exits, "eater").await),
        both(PARENT, STATE)
    );
    // What the agent logs of it names the trace, what it logs of others names none.
    let other = host.message("other", &Droplet::shell("exec tail /dev/zero"));
    let other = host.request(&host.subject("start"), &other).await;
    about(&mut exits, "other").await;
    let eater: Value = serde_json::from_slice(&answer.payload).unwrap();
    let id = format!("trace=\"{}\"", &PARENT[3..35]);
    for (one, traced) in [(eater, true), (other, false)] {
        let handle = one["handle"].as_str().unwrap();
        let last = format!("handle=\"{handle}\" state=\"CRASHED\"");
        let all = ["accepted a start", "out of memory", "entered a state"];
        let deadline = std::time::Instant::now() + patience();
        let lines: Vec<String> = loop {
            let log = host.logged(0, &last).await;
            let lines = log.lines().filter(|line| line.contains(handle));
            let lines: Vec<String> = lines.map(str::to_owned).collect();
            let has = |words: &&str| lines.iter().any(|line| line.contains(words));
            if all.iter().all(has) {
                break lines;
            }
            assert!(std::time::Instant::now() < deadline, "{lines:#?}");
        };
        for line in lines {
            assert_eq!(line.contains(&id), traced, "{line}");
            assert_eq!(line.contains("trace="), traced, "{line}");
        }
    }

    // A refusal of the agent's, and one of the parser's.
    for wrong in [json!({"stack": "none"}), json!({"uris": 7})] {
        let mut refused = host.message("refused", &Droplet::shell("exit 0"));
        for (key, value) in wrong.as_object().unwrap() {
            refused[key] = value.clone();
        }
        let answer = ask(
            &host,
            &host.subject("start"),
            &[("traceparent", OTHER)],
            &refused,
        )
        .await;
        assert!(
            answer
                .headers
                .as_ref()
                .unwrap()
                .get("Nats-Service-Error")
                .is_some()
        );
        assert_eq!(traced(&answer), [Some(OTHER.into()), None]);
        let exit = about(&mut exits, "refused").await;
        assert_eq!(traced(&exit), [Some(OTHER.into()), None]);
    }
    let id = &OTHER[3..35];
    host.logged(0, &format!("trace=\"{id}\"")).await;
}

#[tokio::test]
async fn a_broken_trace_is_none_and_the_command_is_done() {
    let host = Host::start().await;
    let app = Droplet::shell("echo \"[${TRACEPARENT-none}]\"; exec sleep 1000");
    for (number, headers) in [
        vec![
            ("traceparent", "00-zz-b7ad6b7169203331-01"),
            ("tracestate", STATE),
        ],
        vec![("traceparent", PARENT), ("traceparent", OTHER)],
        vec![("tracestate", STATE)],
    ]
    .iter()
    .enumerate()
    {
        let droplet = format!("app{number}");
        let mut output = host.output(&droplet).await;
        let start = host.message(&droplet, &app);
        let answer = ask(&host, &host.subject("start"), headers, &start).await;
        let body: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(body["ok"], true, "{body}");
        assert_eq!(traced(&answer), [None, None], "{headers:?}");
        output
            .until("a line", |output| output.text(0, "stdout").ends_with('\n'))
            .await;
        assert_eq!(output.text(0, "stdout"), "[none]\n", "{headers:?}");
    }
    // A state that nobody can read goes alone.
    let headers = [("traceparent", PARENT), ("tracestate", "no list")];
    let answer = ask(&host, &host.subject("find"), &headers, &json!({})).await;
    assert_eq!(traced(&answer), [Some(PARENT.into()), None]);
}

#[tokio::test]
async fn an_answer_that_fits_without_its_trace_comes_without_it() {
    let config = std::env::temp_dir().join(format!("ostler-narrow-{}", std::process::id()));
    std::fs::write(&config, "max_payload: 2000\n").unwrap();
    let host = Host::with(Setup {
        bus: &["--config", config.to_str().unwrap()],
        ..Default::default()
    })
    .await;
    std::fs::remove_file(&config).unwrap();
    let mut start = host.message("app", &Droplet::shell("exec sleep 1000"));
    start["egress_network_rules"] = json!([]);
    host.run(start).await;
    let uris = json!(["x".repeat(1200)]);
    let update = json!({"droplet": "app", "uris": uris});
    host.request("dea.update", &update).await;
    let long = format!("a={}", "x".repeat(510));
    let headers = [("traceparent", PARENT), ("tracestate", long.as_str())];
    let find = json!({"droplet": "app", "include_stats": true});
    let answer = ask(&host, "dea.find.droplet", &headers, &find).await;
    assert_eq!(traced(&answer), [None, None], "{answer:?}");
    let body: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(body["stats"]["uris"], uris, "{body}");
    // A server closes the connection to whoever says too much at once.
    assert!(!host.log().contains("connects=2"), "{}", host.log());
    host.stop("app").await;
}
