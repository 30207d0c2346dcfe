//! Starts and stops: how long one takes, and how many there are per second.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::Value;
use tests::{Droplet, Host, patience};
use tokio::time::{sleep, timeout};

use crate::message;
use crate::peers::{APP, Peers};
use crate::report::{as_f64, figure, latency, milliseconds, percentile, progress};

/// How many start and stop at a time.
const LANES: [usize; 4] = [1, 2, 4, 8];

/// From the request to the first byte at a subscriber, to the answer that it runs, and from a stop's
/// request to the answer that it is gone.
pub async fn figures(host: &Host, peers: &Peers, rounds: usize) {
    progress("starts and stops, one at a time, in turns with the peers");
    let message = message(host, "single", &Droplet::shell(APP));
    // The droplet is fetched once, and programs of all are in the page cache afterwards.
    start(host, &message).await;
    host.stop("single").await;
    settled(host).await;
    let before = cpu(host);
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
    figure(
        "agent_cpu_per_start_stop",
        "ms",
        (cpu(host) - before) / as_f64(rounds),
        None,
        rounds,
    );
}

/// Waits until every container that was made is gone: a stop is answered before.
pub async fn settled(host: &Host) {
    let end = Instant::now() + patience();
    while host.took(EVENTS[0]).len() > host.took(EVENTS[1]).len() {
        assert!(Instant::now() < end, "containers are not destroyed");
        sleep(Duration::from_millis(10)).await;
    }
}

/// What the agent and the helpers that it has reaped have used so far, in milliseconds. The inits and the
/// apps are not its children.
fn cpu(host: &Host) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", host.agent().pid())).expect("an agent");
    let (_, fields) = stat.rsplit_once(')').expect("proc_pid_stat(5)");
    // utime, stime, cutime, cstime in ticks of 10 ms.
    let ticks = fields.split_whitespace().skip(11).take(4);
    ticks
        .map(|ticks| ticks.parse::<f64>().expect("a number") * 10.0)
        .sum()
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
    let messages: Vec<Value> = (0..8)
        .map(|lane| message(host, &format!("lane{lane}"), &app))
        .collect();
    for lanes in LANES {
        let cycles = (rounds / 2).div_ceil(lanes).max(1);
        progress(&format!("starts and stops, {lanes} at a time"));
        let (mut ours, mut theirs) = (Spent::default(), Spent::default());
        let (mut starts, mut stops) = (vec![], vec![]);
        let warm = EVENTS.map(|event| host.took(event).len());
        for _ in 0..cycles {
            let meter = Meter::start();
            let cycles = messages.iter().take(lanes);
            let took = join_all(cycles.map(|message| cycle(host, message))).await;
            ours.add(&meter);
            for (start, stop) in took {
                starts.push(start);
                stops.push(stop);
            }
            let meter = Meter::start();
            thread::scope(|scope| {
                for _ in 0..lanes {
                    scope.spawn(|| peers.runc_once());
                }
            });
            theirs.add(&meter);
        }
        let count = lanes * cycles;
        let each = |spent: f64| spent / as_f64(count);
        let peer = Some(("runc", 1.0 / each(theirs.seconds)));
        let metric = format!("start_stop_rate_{lanes}");
        figure(&metric, "1/s", 1.0 / each(ours.seconds), peer, count);
        let peer = Some(("runc", each(theirs.cpu_ms)));
        let metric = format!("machine_cpu_per_start_stop_{lanes}");
        figure(&metric, "ms", each(ours.cpu_ms), peer, count);
        settled(host).await;
        let [creates, destroys] = std::array::from_fn(|n| host.took(EVENTS[n]).split_off(warm[n]));
        for (metric, times) in [
            ("create", creates),
            ("start", starts),
            ("stop", stops),
            ("destroy", destroys),
        ] {
            let value = milliseconds(percentile(&times, 50));
            figure(
                &format!("{metric}_{lanes}_p50"),
                "ms",
                value,
                None,
                times.len(),
            );
        }
    }
}

/// What the agent's log has the times of.
const EVENTS: [&str; 2] = ["container created", "container destroyed"];

/// Time, and processor time of the whole machine: of whatever else it does, too.
#[derive(Default)]
struct Spent {
    seconds: f64,
    cpu_ms: f64,
}

impl Spent {
    fn add(&mut self, since: &Meter) {
        self.seconds += since.began.elapsed().as_secs_f64();
        self.cpu_ms += machine_cpu() - since.cpu_ms;
    }
}

struct Meter {
    began: Instant,
    cpu_ms: f64,
}

impl Meter {
    fn start() -> Self {
        Self {
            began: Instant::now(),
            cpu_ms: machine_cpu(),
        }
    }
}

/// Processor time of the whole machine since it was booted, in milliseconds.
fn machine_cpu() -> f64 {
    let stat = fs::read_to_string("/proc/stat").expect("/proc is mounted");
    let mut fields = stat.lines().next().expect("a line").split_whitespace();
    assert_eq!(fields.next(), Some("cpu"), "proc_stat(5)");
    let ticks: Vec<f64> = fields
        .map(|ticks| ticks.parse().expect("a number"))
        .collect();
    // user, nice, system, then not idle and iowait, then irq and softirq, in ticks of 10 ms.
    let busy = [0, 1, 2, 5, 6].map(|field| ticks[field]);
    busy.iter().sum::<f64>() * 10.0
}

/// How long a start and a stop took.
async fn cycle(host: &Host, message: &Value) -> (Duration, Duration) {
    let begin = Instant::now();
    host.run(message.clone()).await;
    let start = begin.elapsed();
    let begin = Instant::now();
    host.stop(message["droplet"].as_str().expect("an id")).await;
    (start, begin.elapsed())
}
