//! Starts and stops: how long one takes, and how many there are per second.

use std::thread;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::Value;
use tests::{Droplet, Host, patience};
use tokio::time::timeout;

use crate::peers::{APP, Peers};
use crate::report::{figure, latency, progress};

/// How many start and stop at a time where many do.
const LANES: usize = 8;

/// From the request to the first byte at a subscriber, to the answer that it runs, and from a stop's
/// request to the answer that it is gone.
pub async fn figures(host: &Host, peers: &Peers, rounds: usize) {
    progress("starts and stops, one at a time, in turns with the peers");
    let message = host.message("single", &Droplet::shell(APP));
    // The droplet is fetched once, and programs of all are in the page cache afterwards.
    start(host, &message).await;
    host.stop("single").await;
    peers.runc_start();
    peers.bwrap_start();
    let (mut first, mut running, mut stop) = (vec![], vec![], vec![]);
    let (mut runc_first, mut runc_running, mut runc_stop) = (vec![], vec![], vec![]);
    let (mut bwrap, mut plain) = (vec![], vec![]);
    for _ in 0..rounds {
        let (first_byte, answer) = start(host, &message).await;
        first.push(first_byte);
        running.push(answer);
        let begin = Instant::now();
        host.stop("single").await;
        stop.push(begin.elapsed());
        let (first_byte, answer) = peers.runc_start();
        runc_first.push(first_byte);
        runc_running.push(answer);
        runc_stop.push(peers.runc_stop());
        bwrap.push(peers.bwrap_start());
        plain.push(peers.plain_start());
    }
    let others: [(&str, &[Duration]); 3] = [
        ("runc", &runc_first),
        ("bwrap", &bwrap),
        ("fork+exec", &plain),
    ];
    latency("start_to_first_byte", &first, &others);
    latency("start_to_running", &running, &[("runc", &runc_running)]);
    latency("stop", &stop, &[("runc", &runc_stop)]);
}

async fn start(host: &Host, message: &Value) -> (Duration, Duration) {
    let mut output = host
        .nats()
        .subscribe("droplet.output.single.>")
        .await
        .expect("a good subject");
    host.nats().flush().await.expect("connected");
    let begin = Instant::now();
    let first = async {
        let message = timeout(patience(), output.next()).await;
        message.expect("the first byte").expect("connected");
        begin.elapsed()
    };
    let running = async {
        host.run(message.clone()).await;
        begin.elapsed()
    };
    tokio::join!(first, running)
}

/// Starts and stops per second.
pub async fn rates(host: &Host, peers: &Peers, rounds: usize) {
    let app = Droplet::shell(APP);
    let messages: Vec<Value> = (0..LANES)
        .map(|lane| host.message(&format!("lane{lane}"), &app))
        .collect();
    for (lanes, cycles) in [(1, rounds.div_ceil(2)), (LANES, rounds.div_ceil(10))] {
        progress(&format!("starts and stops, {lanes} at a time"));
        let (mut ours, mut theirs) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..cycles {
            let begin = Instant::now();
            join_all(
                messages
                    .iter()
                    .take(lanes)
                    .map(|message| cycle(host, message)),
            )
            .await;
            ours += begin.elapsed();
            let begin = Instant::now();
            thread::scope(|scope| {
                for _ in 0..lanes {
                    scope.spawn(|| peers.runc_once());
                }
            });
            theirs += begin.elapsed();
        }
        let count = lanes * cycles;
        let rate = |time: Duration| as_f64(count) / time.as_secs_f64();
        let metric = format!("start_stop_rate_{lanes}");
        let peer = Some(("runc", rate(theirs)));
        figure(&metric, "1/s", rate(ours), peer, count);
    }
}

async fn cycle(host: &Host, message: &Value) {
    host.run(message.clone()).await;
    host.stop(message["droplet"].as_str().expect("an id")).await;
}

fn as_f64(count: usize) -> f64 {
    u32::try_from(count).expect("a small number").into()
}
