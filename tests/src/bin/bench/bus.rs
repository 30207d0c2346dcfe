//! What the bus costs: how soon a request is answered, how many are, and what the agent spends on being there.

use std::cell::Cell;
use std::collections::HashSet;
use std::convert::Infallible;
use std::thread;
use std::time::{Duration, Instant};

use async_nats::{Message, Subscriber};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use nix::time::ClockId;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::{Body, Droplet, Host, Running, Setup, patience};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::peers::APP;
use crate::report::{as_f64, figure, latency, percentile, progress};
use crate::{fleet, message, starts};

/// How many starts a second are wanted beside the requests.
const STARTS: u32 = 50;
/// No more of them are on their way at once: a machine that is too slow starts fewer.
const ON_THEIR_WAY: usize = 32;
/// From one heartbeat to the next; an agent says at most one in 100 ms.
const BEAT: Duration = Duration::from_millis(250);
/// How many instances a heartbeat tells of.
const TOLD: [usize; 3] = [10, 100, 1000];
/// Where the peer answers, and what.
const ECHO: &str = "bench.echo";
const OK: &str = r#"{"ok":true}"#;

/// All figures of the bus, on a host with the intervals of a default configuration. 20 rounds measure the idle
/// agent beside 250 instances, fewer beside fewer.
pub async fn figures(rounds: usize) {
    let host = Host::with(Setup {
        config: &[
            (
                "heartbeat = 1\nadvertise = 1\nrouter_register = 1",
                "heartbeat = 10\nadvertise = 5\nrouter_register = 20",
            ),
            ("memory_mb = 4096", "memory_mb = 16384"),
            // A port rests after use, and many are used.
            ("[network]", "[network]\nports = \"10001-32000\""),
            // Droplets that never come are waited for as long as the figures take.
            ("[cgroup]", "[droplets]\ninactivity = 600\n[cgroup]"),
        ],
        ..Default::default()
    })
    .await;
    let peer = responder().await;
    answers(&host, rounds).await;
    rate(&host, rounds).await;
    host.publish(ECHO, &Value::Null).await;
    peer.join().expect("no panic");
    heartbeats(&host, rounds).await;
    idle(&host, rounds).await;
}

/// The peer: answers each request at once, with a connection and a thread of its own. It listens when this
/// returns, and ends at a message without a reply-to.
async fn responder() -> thread::JoinHandle<()> {
    let (ready, listens) = oneshot::channel();
    let answer = async || {
        let nats = async_nats::connect(Host::BUS).await.expect("it accepts");
        let mut requests = nats.subscribe(ECHO).await.expect("a good subject");
        nats.flush().await.expect("connected");
        ready.send(()).expect("the bench waits");
        while let Some(Message {
            reply: Some(inbox), ..
        }) = requests.next().await
        {
            nats.publish(inbox, OK.into()).await.expect("connected");
        }
    };
    let peer = thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(answer());
    });
    listens.await.expect("it has said so");
    peer
}

/// How long answers took.
#[derive(Default)]
struct Answers {
    find: Vec<Duration>,
    stop: Vec<Duration>,
    echo: Vec<Duration>,
}

/// From a request to its answer, one at a time, in turns with the peer: of an idle agent, and of one that starts
/// and stops instances meanwhile.
async fn answers(host: &Host, rounds: usize) {
    let mut start = message(host, "found", &Droplet::shell(APP));
    start["limits"] = json!({"mem": 32, "disk": 16, "fds": 1024});
    host.run(start.clone()).await;
    progress("bus: answers of an idle agent");
    // The first ones are no figures.
    ask(host, 20).await;
    ask(host, rounds * 50).await.tell("idle");
    progress(&format!("bus: answers beside {STARTS} starts a second"));
    start["droplet"] = json!("burst");
    let running = Cell::new(0);
    let answers = async {
        // The first have run: starts and stops are in each of their steps.
        while running.get() < ON_THEIR_WAY {
            sleep(Duration::from_millis(10)).await;
        }
        let (before, begin) = (running.get(), Instant::now());
        let answers = ask(host, (rounds * 25).max(100)).await;
        (answers, running.get() - before, begin.elapsed())
    };
    let (answers, started, took) = tokio::select! {
        answers = answers => answers,
        never = lives(host, &start, &running) => match never {},
    };
    answers.tell("under_starts");
    let reached = as_f64(started) / took.as_secs_f64();
    let wanted = Some(("wanted", f64::from(STARTS)));
    figure("starts_beside", "1/s", reached, wanted, started);
    host.stop("burst").await;
    host.stop("found").await;
}

impl Answers {
    fn tell(&self, when: &str) {
        for (name, times) in [("find", &self.find), ("stop", &self.stop)] {
            let metric = format!("{name}_answer_{when}");
            latency(&metric, times, &[("echo", &self.echo)]);
        }
    }
}

async fn ask(host: &Host, count: usize) -> Answers {
    let (find, stop) = (host.subject("find"), host.subject("stop"));
    let (found, nobody) = (r#"{"droplet":"found"}"#, r#"{"droplet":"nobody"}"#);
    let mut answers = Answers::default();
    for _ in 0..count {
        answers.find.push(answer(host, &find, found).await);
        answers.stop.push(answer(host, &stop, nobody).await);
        answers.echo.push(answer(host, ECHO, nobody).await);
        sleep(Duration::from_millis(5)).await;
    }
    answers
}

async fn answer(host: &Host, subject: &str, body: &str) -> Duration {
    let begin = Instant::now();
    let answer = host.request_bytes(subject, body).await;
    let took = begin.elapsed();
    good(&answer);
    took
}

fn good(answer: &Message) {
    let body: Value = serde_json::from_slice(&answer.payload).expect("JSON");
    assert_eq!(body["ok"], true, "{body}");
}

/// Starts [`STARTS`] instances a second, and stops each as soon as it runs; counts those that have run.
async fn lives(host: &Host, start: &Value, running: &Cell<usize>) -> Infallible {
    let mut tick = interval(Duration::from_secs(1) / STARTS);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lives = FuturesUnordered::new();
    let mut indices = 0..;
    loop {
        tokio::select! {
            _ = tick.tick(), if lives.len() < ON_THEIR_WAY => {
                let mut start = start.clone();
                start["index"] = json!(indices.next());
                lives.push(life(host, start, running));
            }
            Some(()) = lives.next(), if !lives.is_empty() => {}
        }
    }
}

async fn life(host: &Host, start: Value, running: &Cell<usize>) {
    let mut stop = json!({"droplet": start["droplet"], "wait": "stopped"});
    stop["indices"] = json!([start["index"]]);
    host.run(start).await;
    running.set(running.get() + 1);
    let answer = host.request(&host.subject("stop"), &stop).await;
    assert_eq!(answer["ok"], true, "{answer}\n{}", host.log());
}

/// Commands a second, all sent before the first answer is waited for: stops for nobody, below one inbox.
async fn rate(host: &Host, rounds: usize) {
    progress("bus: commands a second");
    let count = rounds * 250;
    let (mut ours, mut theirs) = (vec![], vec![]);
    for _ in 0..rounds.div_ceil(4) {
        ours.push(pipelined(host, &host.subject("stop"), count).await);
        theirs.push(pipelined(host, ECHO, count).await);
    }
    let peer = Some(("echo", percentile(&theirs, 50)));
    let n = count * ours.len();
    figure("commands_rate", "1/s", percentile(&ours, 50), peer, n);
}

async fn pipelined(host: &Host, subject: &str, count: usize) -> f64 {
    let inbox = host.nats().new_inbox();
    let mut inboxes = subscribe(host, &format!("{inbox}.*")).await;
    let begin = Instant::now();
    let asked = async {
        for number in 0..count {
            let (subject, inbox) = (subject.to_owned(), format!("{inbox}.{number}"));
            let body = r#"{"droplet":"nobody"}"#.into();
            let sent = host.nats().publish_with_reply(subject, inbox, body).await;
            sent.expect("connected");
        }
        host.nats().flush().await.expect("connected");
    };
    let answered = async {
        let mut answers = Vec::new();
        while answers.len() < count {
            answers.push(next(&mut inboxes).await);
        }
        (answers, begin.elapsed())
    };
    let ((), (answers, took)) = tokio::join!(asked, answered);
    answers.iter().for_each(good);
    let each: HashSet<_> = answers
        .iter()
        .map(|answer| answer.subject.as_str())
        .collect();
    assert_eq!(each.len(), count, "one answer to each");
    as_f64(count) / took.as_secs_f64()
}

async fn subscribe(host: &Host, subject: &str) -> Subscriber {
    let subscriber = host.nats().subscribe(subject.to_owned()).await;
    host.nats().flush().await.expect("connected");
    subscriber.expect("a good subject")
}

async fn next(subscriber: &mut Subscriber) -> Message {
    let message = timeout(patience(), subscriber.next()).await;
    message.expect("it comes in time").expect("connected")
}

/// The size of a heartbeat, and what the agent spends on one that was asked for: the difference between the medians of
/// quiet times and of such with one, taken in turns. The instances wait for a droplet that never comes: they have no
/// containers.
async fn heartbeats(host: &Host, rounds: usize) {
    starts::settled(host).await;
    let unknown = Droplet::shell("not fetched before");
    let mut start = message(host, "told", &unknown);
    start["executableUri"] = json!(host.files.put("silent.tgz", Body::Silent));
    start["limits"] = json!({"mem": 1, "disk": 1, "fds": 64});
    let mut heard = host.watch("dea.heartbeat").await;
    let mut told = 0;
    for many in TOLD {
        progress(&format!("bus: heartbeats of {many} instances"));
        let indices: Vec<usize> = (told..many).collect();
        for some in indices.chunks(50) {
            let each = some.iter().map(|index| accepted(host, &start, *index));
            join_all(each).await;
        }
        told = many;
        host.publish("healthmanager.start", &json!({})).await;
        let whole = |beat: &Value| beat["droplets"].as_array().is_some_and(|d| d.len() == many);
        heard.until("heartbeat of all", whole).await;
        calm(host).await;
        let (mut quiet, mut asked, mut sizes) = (vec![], vec![], vec![]);
        for _ in 0..rounds.max(5) {
            let before = processor(host.agent());
            sleep(BEAT).await;
            quiet.push(processor(host.agent()) - before);
            let (spent, size) = beat(host).await;
            asked.push(spent);
            sizes.push(size);
        }
        let (size, n) = (percentile(&sizes, 50), sizes.len());
        figure(&format!("heartbeat_{many}_size"), "B", size, None, n);
        let each = (percentile(&asked, 50) - percentile(&quiet, 50)) * 1e6;
        figure(&format!("heartbeat_{many}_cpu"), "us", each, None, n);
    }
    host.stop("told").await;
}

async fn accepted(host: &Host, start: &Value, index: usize) {
    let mut start = start.clone();
    start["index"] = json!(index);
    let answer = host.request(&host.subject("start"), &start).await;
    assert_eq!(answer["ok"], true, "{answer}\n{}", host.log());
}

/// Waits until the agent has done what it was left with: it spends less than a hundredth of a second in
/// one. An agent that does not come to rest is measured as it is.
async fn calm(host: &Host) {
    let end = Instant::now() + patience();
    while Instant::now() < end {
        let before = processor(host.agent());
        sleep(Duration::from_secs(1)).await;
        if processor(host.agent()) - before < 0.01 {
            return;
        }
    }
    progress("bus: the agent does not come to rest");
}

/// Asks for a heartbeat: the seconds of processor time that the agent spends until the next one can be asked for, and
/// its size.
async fn beat(host: &Host) -> (f64, f64) {
    let mut heard = subscribe(host, "dea.heartbeat").await;
    let (before, pause) = (processor(host.agent()), sleep(BEAT));
    host.publish("healthmanager.start", &json!({})).await;
    let size = next(&mut heard).await.payload.len();
    pause.await;
    (processor(host.agent()) - before, as_f64(size))
}

/// Processor time of the agent and of nats-server, in percent of one processor, while nothing happens.
async fn idle(host: &Host, rounds: usize) {
    let instances = (rounds * 25).div_ceil(2).clamp(1, 250);
    progress(&format!("bus: idle beside {instances} instances"));
    let mut start = message(host, "fleet", &Droplet::shell(APP));
    start["limits"] = json!({"mem": 32, "disk": 16, "fds": 1024});
    host.run(start).await;
    for some in (50..instances).step_by(50).chain([instances]) {
        fleet::scale(host, some).await;
    }
    calm(host).await;
    let times = || (processor(host.agent()), processor(host.bus()));
    let (begin, (agent, bus)) = (Instant::now(), times());
    // 20 rounds see each interval of the configuration at least once.
    sleep(Duration::from_secs_f64(as_f64(rounds.clamp(5, 60)))).await;
    let (now, seconds) = (times(), begin.elapsed().as_secs_f64());
    let percent = |since: f64, until: f64| (until - since) / seconds * 100.0;
    let peer = Some(("nats-server", percent(bus, now.1)));
    let metric = format!("agent_idle_cpu_{instances}");
    figure(&metric, "%", percent(agent, now.0), peer, instances);
    host.stop("fleet").await;
}

/// Seconds of processor time that all threads of a process have had, those that have ended, too.
fn processor(process: &Running) -> f64 {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(process.pid()));
    let time = clock.and_then(ClockId::now).expect("it runs");
    Duration::from(time).as_secs_f64()
}
