//! What comes from an app: how much per second, and how soon. And how soon a memory kill is told.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use async_nats::{Message, Subscriber};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tests::{Droplet, Host, patience};
use tokio::time::timeout;

use crate::message;
use crate::peers::{HOG, HOG_MB, Peers};
use crate::report::{figure, percentile, progress};

const BLOCKS: u64 = 1600;
const BLOCK: u64 = 64 * 1024;
const LINES: usize = 300;

/// Megabytes per second of an app that writes as fast as it can, from the first to the last byte.
pub async fn throughput(host: &Host, peers: &Peers, rounds: usize) {
    progress("output: 100 MB");
    let (mut ours, mut theirs) = (vec![], vec![]);
    for round in 0..rounds.div_ceil(7) {
        let droplet = format!("pour{round}");
        let mut output = subscribe(host, &droplet).await;
        let script = format!("{}; sleep infinity", writer());
        host.run(message(host, &droplet, &Droplet::shell(&script)))
            .await;
        ours.push(received(&mut output).await);
        host.stop(&droplet).await;
        theirs.push(piped(peers, &format!("{} | cat", writer())));
    }
    let peer = Some(("pipe", percentile(&theirs, 50)));
    let n = ours.len();
    figure("output_throughput", "MB/s", percentile(&ours, 50), peer, n);
}

/// A script that writes lines, as output is cut at their ends.
fn writer() -> String {
    format!(
        "perl -e 'my $block = (\"x\" x 127 . \"\\n\") x 512; syswrite STDOUT, $block for 1 .. {BLOCKS}'"
    )
}

async fn received(output: &mut Subscriber) -> f64 {
    let (mut bytes, mut begin) = (0, None);
    while bytes < BLOCKS * BLOCK {
        let message = next(output).await;
        begin.get_or_insert_with(Instant::now);
        let dropped = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get("Ostler-Dropped"));
        assert!(dropped.is_none(), "bytes were dropped: {dropped:?}");
        bytes += message.payload.len() as u64;
    }
    assert_eq!(bytes, BLOCKS * BLOCK, "every byte once");
    rate(begin.expect("at least one message"))
}

/// Megabytes per second of a job through its supervisor and a linker, without the agent and the bus.
pub async fn by_hand(host: &Host, peers: &Peers, rounds: usize) {
    progress("output: 100 MB through supervisor and linker");
    let (mut ours, mut theirs) = (vec![], vec![]);
    let answer = host
        .run(message(
            host,
            "hand",
            &Droplet::shell("exec sleep infinity"),
        ))
        .await;
    let handle = answer["handle"].as_str().expect("a handle");
    let container = host.base.join("containers").join(handle);
    let helpers = tests::path("OSTLER_HELPERS", "target/x86_64-unknown-linux-gnu/helpers");
    for round in 0..rounds.div_ceil(7) {
        let job = container.join(format!("jobs/{}", 900 + round));
        fs::create_dir(&job).expect("nobody has it");
        let mut supervisor = Command::new(helpers.join("iomux-spawn"))
            .env("IOMUX_SPOOL_BYTES", (256 << 20).to_string())
            .arg(&job)
            .arg(helpers.join("wsh"))
            .arg("--socket")
            .arg(container.join("run/wshd.sock"))
            .args(["--user", "vcap", "bash", "-c", &writer()])
            .stdout(Stdio::null())
            .spawn()
            .expect("a helper");
        while !job.join("link.sock").exists() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        ours.push(poured(Command::new(helpers.join("iomux-link")).arg(&job)));
        supervisor.wait().expect("our child");
        theirs.push(piped(peers, &format!("{} | cat", writer())));
    }
    host.stop("hand").await;
    let peer = Some(("pipe", percentile(&theirs, 50)));
    let n = ours.len();
    figure(
        "supervisor_linker_throughput",
        "MB/s",
        percentile(&ours, 50),
        peer,
        n,
    );
}

fn piped(peers: &Peers, script: &str) -> f64 {
    poured(&mut peers.plain(script))
}

fn poured(command: &mut Command) -> f64 {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it runs");
    let mut reader = child.stdout.take().expect("a pipe");
    let (mut bytes, mut begin, mut buffer) = (0, None, vec![0; 65536]);
    loop {
        let count = reader.read(&mut buffer).expect("a pipe can be read");
        begin.get_or_insert_with(Instant::now);
        bytes += count as u64;
        if count == 0 {
            break;
        }
    }
    assert_eq!(bytes, BLOCKS * BLOCK, "every byte once");
    let rate = rate(begin.expect("at least one read"));
    child.wait().expect("our child");
    rate
}

fn rate(begin: Instant) -> f64 {
    let megabytes = u32::try_from(BLOCKS * BLOCK / 1000).expect("a small number");
    f64::from(megabytes) / 1000.0 / begin.elapsed().as_secs_f64()
}

/// From an app's line, which holds the time of its writing, to the subscriber.
pub async fn line_latency(host: &Host, peers: &Peers) {
    progress("output: a line every 5 ms");
    // `read` waits without a process, as nobody writes into that pipe.
    let writer = format!(
        "exec 3<> <(:); for ((i = 0; i < {LINES}; i++)); do echo $EPOCHREALTIME; read -rt 0.005 -u 3; done"
    );
    let mut output = subscribe(host, "clock").await;
    let script = format!("{writer}; sleep infinity");
    host.run(message(host, "clock", &Droplet::shell(&script)))
        .await;
    let (mut ours, mut rest) = (vec![], String::new());
    while ours.len() < LINES {
        let message = next(&mut output).await;
        let now = now();
        rest.push_str(std::str::from_utf8(&message.payload).expect("digits"));
        while let Some((line, after)) = rest.split_once('\n') {
            ours.push(now - seconds(line));
            rest = after.to_owned();
        }
    }
    host.stop("clock").await;
    let mut command = peers.plain(&writer);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("bash runs");
    let reader = BufReader::new(child.stdout.take().expect("a pipe"));
    let since = |line: std::io::Result<String>| {
        let line = line.expect("a pipe can be read");
        now() - seconds(&line)
    };
    let theirs: Vec<f64> = reader.lines().map(since).collect();
    child.wait().expect("our child");
    for share in [50, 99] {
        let of = |times: &[f64]| percentile(times, share) * 1e3;
        let metric = format!("line_latency_p{share}");
        let peer = Some(("pipe", of(&theirs)));
        figure(&metric, "ms", of(&ours), peer, ours.len());
    }
}

/// From an app's line before the allocation that is too much, to `droplet.oom` at a subscriber; with
/// `runc`, to the end of `runc run`. Most of both is the kernel's: it looks for other memory first.
pub async fn oom_latency(host: &Host, peers: &Peers, rounds: usize) {
    progress("memory kills");
    let mut events = host
        .nats()
        .subscribe("droplet.oom")
        .await
        .expect("a good subject");
    let (mut ours, mut theirs) = (vec![], vec![]);
    for round in 0..rounds.div_ceil(4) {
        let droplet = format!("hog{round}");
        let mut output = host.output(&droplet).await;
        let mut exits = host.watch("droplet.exited").await;
        let mut message = message(host, &droplet, &Droplet::shell(HOG));
        message["limits"]["mem"] = json!(HOG_MB);
        host.publish(&host.subject("start"), &message).await;
        let event = next(&mut events).await;
        let told = now();
        let event: Value = serde_json::from_slice(&event.payload).expect("JSON");
        assert_eq!(event["droplet"], droplet, "{event}");
        let exit = exits.next().await;
        let end = exit["output"]["stdout"].as_u64().expect("an end");
        output
            .until("the end", |output| output.stream(0, "stdout").next >= end)
            .await;
        let text = output.text(0, "stdout");
        ours.push(told - seconds(text.trim()));
        let text = peers.runc_oom();
        theirs.push(now() - seconds(text.trim()));
    }
    let median = |times: &[f64]| percentile(times, 50) * 1e3;
    let peer = Some(("runc", median(&theirs)));
    figure("oom_event_p50", "ms", median(&ours), peer, ours.len());
}

async fn subscribe(host: &Host, droplet: &str) -> Subscriber {
    let subject = format!("droplet.output.{droplet}.0.*.stdout");
    let output = host.nats().subscribe(subject).await;
    host.nats().flush().await.expect("connected");
    output.expect("a good subject")
}

async fn next(messages: &mut Subscriber) -> Message {
    let message = timeout(patience(), messages.next()).await;
    message.expect("a message in time").expect("connected")
}

/// The clock of this machine, which apps have too.
fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_secs_f64()
}

fn seconds(line: &str) -> f64 {
    line.parse()
        .unwrap_or_else(|_| panic!("{line:?} is no time"))
}
