//! `make bench`: one JSON line per figure on stdout, progress on stderr.
//!
//! Everything is measured on hosts of the harness (one for the bus, before it one for the rest), in their
//! network namespaces, and beside peers in the same run, in turns: `runc` (a bundle of the same stack with
//! the same command), `bwrap`, plain fork+exec, a plain pipe, a responder on the bus. `ratio` is ours
//! divided by theirs. `BENCH_N` (20) says how many starts are measured; the other figures follow it.
//!
//! Two processes: a failure ends the measuring one on the spot (release programs abort), and the other
//! one then removes what it has left.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a bench fails by panicking, and it starts and ends the peers' processes"
)]

mod bus;
mod fleet;
mod network;
mod output;
mod peers;
mod report;
mod starts;
mod tidy;

use std::process::{Child, Command, ExitCode};
use std::{env, io, process};

use serde_json::{Value, json};
use tests::{Droplet, Host, Setup};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use peers::Peers;

const HELP: &str = "bench: prints one JSON line per figure (BENCH_N=20: more or fewer rounds)";

fn main() -> ExitCode {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    match env::args().nth(1).as_deref() {
        None => match runtime.block_on(supervise()) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("bench: {error}");
                ExitCode::FAILURE
            }
        },
        Some("measure") => {
            runtime.block_on(measure());
            ExitCode::SUCCESS
        }
        Some(_) => {
            eprintln!("{HELP}");
            ExitCode::from(2)
        }
    }
}

/// Runs the measuring process to its end, or to ours, and tidies up. Whether all went well.
async fn supervise() -> io::Result<bool> {
    let mut ended = signal(SignalKind::child())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut command = Command::new(env::current_exe()?);
    command.arg("measure");
    if env::var_os("OSTLER_PATIENCE").is_none() {
        command.env("OSTLER_PATIENCE", "120");
    }
    let mut child = command.spawn()?;
    let pid = child.id();
    let good = loop {
        tokio::select! {
            _ = ended.recv() => match child.try_wait()? {
                Some(status) => break status.success(),
                None => continue,
            },
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        end(&mut child)?;
        break false;
    };
    let left = tidy::after(pid);
    left.iter()
        .for_each(|what| eprintln!("bench: left over: {what}"));
    Ok(good && left.is_empty())
}

fn end(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    child.wait().map(drop)
}

async fn measure() {
    let rounds = report::rounds();
    // The throughput of output is asked for, not what happens when the spool is full.
    let spool = ("[network]", "[output]\nspool_mb = 256\n[network]");
    let mut host = Host::with(Setup {
        config: &[spool],
        ..Default::default()
    })
    .await;
    let peers = Peers::new(process::id());
    fleet::figures(&mut host, rounds).await;
    starts::figures(&host, &peers, rounds).await;
    starts::rates(&host, &peers, rounds).await;
    output::throughput(&host, &peers, rounds).await;
    output::by_hand(&host, &peers, rounds).await;
    output::line_latency(&host, &peers).await;
    output::oom_latency(&host, &peers, rounds).await;
    network::figures(&host, rounds.div_ceil(2)).await;
    report::progress("ending the agent and looking for leftovers");
    drop(host);
    bus::figures(rounds).await;
    report::progress("that was all; no leftovers");
}

/// The harness's start message without egress rules: what the peers run is not filtered, either.
fn message(host: &Host, droplet: &str, package: &Droplet) -> Value {
    let mut message = host.message(droplet, package);
    message["egress_network_rules"] = json!([]);
    message
}
