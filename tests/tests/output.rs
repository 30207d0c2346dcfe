//! A job's output on the bus: every byte, at its offset, soon, and never at the app's expense.

use futures_util::StreamExt;
use nix::sys::signal::Signal;
use serde_json::json;
use std::time::Instant;
use tests::{Droplet, Host, numbered, patience};
use tokio::time::timeout;

#[tokio::test]
async fn both_streams_arrive_at_a_megabyte_a_second() {
    let host = Host::start().await;
    let mut output = host.output("lines").await;
    let mut exits = host.watch("droplet.exited").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=2000000", "LINES=40000"]);
    host.publish(&host.subject("start"), &message).await;
    for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
        output
            .until("all", |output| output.stream(0, stream).next >= 4_000_000)
            .await;
        let got = output.stream(0, stream);
        assert_eq!((got.next, got.dropped, got.holes.len()), (4_000_000, 0, 0));
        assert_eq!(numbered(word, &got.bytes), Ok(40000));
    }
    let exit = exits.next().await;
    assert_eq!(exit["exit_status"], 0);
    assert_eq!(
        exit["output"],
        json!({"stdout": 4_000_000, "stderr": 4_000_000})
    );
}

#[tokio::test]
async fn small_lines_that_follow_each_other_go_together() {
    const LINES: usize = 8000;
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut messages = host
        .nats()
        .subscribe("droplet.output.drip.>")
        .await
        .unwrap();
    let script = format!(
        "exec perl -e '$| = 1; for (1 .. {LINES}) {{ print \"x\\n\"; select undef, undef, undef, 0.0002 }}'"
    );
    let start = host.message("drip", &Droplet::shell(&script));
    host.publish(&host.subject("start"), &start).await;
    let (mut bytes, mut count, mut first) = (0, 0, None);
    while bytes < 2 * LINES {
        let message = timeout(patience(), messages.next()).await;
        bytes += message.expect("all of it").unwrap().payload.len();
        count += 1;
        first.get_or_insert_with(Instant::now);
    }
    let took = first.unwrap().elapsed();
    assert_eq!(exits.next().await["output"]["stdout"], 2 * LINES);
    assert_eq!(bytes, 2 * LINES);
    // One in two milliseconds, and some whose first ones came late.
    let most = took.as_millis() / 2 + 200;
    assert!(count < most, "{count} messages in {took:?}");
}

#[tokio::test]
async fn a_line_arrives_soon_also_without_its_end() {
    let host = Host::start().await;
    let mut output = host.output("prompt").await;
    host.run(host.message("prompt", &Droplet::shell("printf 'name? '; sleep infinity")))
        .await;
    output
        .until("prompt", |output| output.text(0, "stdout") == "name? ")
        .await;
    host.stop("prompt").await;
}

#[tokio::test]
async fn messages_are_cut_at_line_ends() {
    use futures_util::StreamExt;
    let host = Host::start().await;
    let mut messages = host
        .nats()
        .subscribe("droplet.output.lines.0.*.stdout")
        .await
        .unwrap();
    host.nats().flush().await.unwrap();
    let mut message = host.message("lines", &Droplet::sample("lines"));
    message["env"] = json!(["RATE=0", "LINES=20000"]);
    host.publish(&host.subject("start"), &message).await;
    let (mut bytes, mut torn, mut count) = (0, 0, 0);
    while bytes < 2_000_000 {
        let message = tokio::time::timeout(tests::patience(), messages.next())
            .await
            .unwrap()
            .unwrap();
        assert!(message.payload.len() <= 65536);
        bytes += message.payload.len();
        torn += u32::from(!message.payload.ends_with(b"\n"));
        count += 1;
    }
    assert!(
        torn * 3 <= count,
        "{torn} of {count} messages end within a line"
    );
}

#[tokio::test]
async fn a_stopped_linker_stops_the_bus_and_not_the_app() {
    let host = Host::start().await;
    let mut output = host.output("lines").await;
    let mut message = host.message("lines", &Droplet::sample("lines"));
    // 12 MB in all: less than the spool keeps.
    message["env"] = json!(["RATE=2000000", "LINES=60000"]);
    host.run(message).await;
    output
        .until("lines", |output| output.stream(0, "stdout").next > 100)
        .await;
    let tree = host.tree();
    tree.one("iomux-link").signal(Signal::SIGSTOP);
    // The app gets to its end while nobody reads for the bus.
    host.tree_until("end of the app", |tree| tree.named("lines").is_empty())
        .await;
    assert!(output.stream(0, "stdout").next < 6_000_000);
    tree.one("iomux-link").signal(Signal::SIGCONT);
    for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
        output
            .until("all", |output| output.stream(0, stream).next >= 6_000_000)
            .await;
        let got = output.stream(0, stream);
        assert_eq!((got.next, got.dropped, got.holes.len()), (6_000_000, 0, 0));
        assert_eq!(numbered(word, &got.bytes), Ok(60000));
    }
}

#[tokio::test]
async fn what_cannot_be_kept_is_named() {
    let spool = ("[network]", "[output]\nspool_mb = 4\n[network]");
    let host = Host::with(tests::Setup {
        config: &[spool],
        ..Default::default()
    })
    .await;
    let mut output = host.output("pour").await;
    let script = "trap go=1 USR1; echo up; until [ \"$go\" ]; do sleep 0.05; done; \
        head -c 20M /dev/zero | tr '\\0' x; echo; echo the end; sleep infinity";
    host.run(host.message("pour", &Droplet::shell(script)))
        .await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    let tree = host.tree();
    tree.one("iomux-link").signal(Signal::SIGSTOP);
    let app = tree.0.iter().find(|one| one.title() == "bash main.sh");
    app.unwrap().signal(Signal::SIGUSR1);
    // It can write all of it: the last thing that it does is to sleep.
    host.tree_until("end of the pouring", |tree| {
        tree.named("head").is_empty()
            && tree
                .0
                .iter()
                .any(|process| process.title() == "sleep infinity")
    })
    .await;
    tree.one("iomux-link").signal(Signal::SIGCONT);
    output
        .until("the end", |output| {
            output.text(0, "stdout").ends_with("the end\n")
        })
        .await;
    let got = output.stream(0, "stdout");
    assert_eq!(got.holes, []);
    assert!(got.dropped > 10 << 20, "{}", output.summary());
    assert_eq!(got.next, 3 + (20 << 20) + 1 + 8);
    host.stop("pour").await;
}

#[tokio::test]
async fn dev_stdout_works_for_the_apps_user() {
    let host = Host::start().await;
    let mut output = host.output("reopen").await;
    let script = "echo first >/dev/stdout; echo second >/dev/stderr; echo third >/proc/self/fd/1; sleep infinity";
    host.run(host.message("reopen", &Droplet::shell(script)))
        .await;
    output
        .until("lines", |output| {
            output.text(0, "stdout") == "first\nthird\n" && output.text(0, "stderr") == "second\n"
        })
        .await;
    host.stop("reopen").await;
}
