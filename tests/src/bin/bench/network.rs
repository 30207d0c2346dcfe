//! What a packet and an instance cost where many are attached. The many are links with the elements that
//! the agent gives an instance with three egress rules, in its own table; nobody lives behind them.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io, process, thread};

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::json;
use tests::{Droplet, Host, Network, tool};

use crate::message;
use crate::peers::APP;
use crate::report::{figure, percentile, progress};

const PACKETS: usize = 2000;
const MANY: [u32; 2] = [10, 1000];
/// Outside answers here.
const ECHO: u16 = 7;

/// Round trips of datagrams between a container and outside, of a known flow and of new ones, and starts
/// and stops of a real instance, at ten attached ones and at a thousand.
pub async fn figures(host: &Host, rounds: usize) {
    let peers = namespace();
    // An agent looks at its table once more after it has loaded it, and takes out what is not its own.
    tokio::time::sleep(Duration::from_secs(2)).await;
    host.network.outside(|| {
        let echo = UdpSocket::bind((Network::OUTSIDE, ECHO)).expect("nobody has it");
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = echo.recv_from(&mut buffer) {
                let _gone = echo.send_to(&buffer[..length], from);
            }
        });
    });
    let mut attached = 0;
    for many in MANY {
        progress(&format!("network: {many} attached"));
        attach(&peers, attached..many);
        attached = many;
        let inside = |work: fn() -> Vec<f64>| {
            thread::scope(|scope| {
                let there = scope.spawn(|| {
                    setns(&peers, CLONE).expect("our namespace");
                    work()
                });
                there.join().expect("no panic")
            })
        };
        for (name, times) in [("flow", inside(flow)), ("new_flow", inside(new_flows))] {
            let metric = format!("packet_{name}_{many}_p50");
            figure(&metric, "us", percentile(&times, 50), None, times.len());
        }
        let (mut starts, mut stops) = (vec![], vec![]);
        let mut message = message(host, "wired", &Droplet::shell(APP));
        message["egress_network_rules"] = json!([
            {"protocol": "tcp", "destination": "0.0.0.0/0", "ports": "443"},
            {"protocol": "udp", "destination": Network::OUTSIDE, "ports": "53"},
            {"protocol": "icmp", "destination": "0.0.0.0/0", "type": 8, "code": 0}
        ]);
        for _ in 0..rounds {
            let begin = Instant::now();
            host.run(message.clone()).await;
            starts.push(begin.elapsed().as_secs_f64() * 1e3);
            let begin = Instant::now();
            host.stop("wired").await;
            stops.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        for (name, times) in [("start", starts), ("stop", stops)] {
            let metric = format!("attached_{many}_{name}_p50");
            figure(&metric, "ms", percentile(&times, 50), None, times.len());
        }
    }
}

const CLONE: CloneFlags = CloneFlags::CLONE_NEWNET;

fn namespace() -> fs::File {
    let made = thread::spawn(|| {
        unshare(CLONE).expect("unshare(CLONE_NEWNET)");
        fs::File::open("/proc/thread-self/ns/net").expect("/proc is mounted")
    });
    made.join().expect("no panic")
}

/// Host end and container of a block of the pool that no agent gives out: it is another pool.
fn addresses(number: u32) -> (Ipv4Addr, Ipv4Addr) {
    let first = Ipv4Addr::new(10, 253, 0, 0).to_bits() + 4 * number;
    (
        Ipv4Addr::from_bits(first + 1),
        Ipv4Addr::from_bits(first + 2),
    )
}

/// Makes links and elements. The first one's inner end can speak.
fn attach(peers: &fs::File, numbers: std::ops::Range<u32>) {
    let there = format!("/proc/{}/fd/{}", process::id(), peers.as_raw_fd());
    let (mut links, mut elements) = (String::new(), String::new());
    for number in numbers.clone() {
        let (host, container) = addresses(number);
        let name = format!("os-bench{number:06}");
        let _ = writeln!(
            links,
            "link add {name} type veth peer name peer{number} netns {there}\n\
             address add {host}/30 dev {name}\nlink set {name} up"
        );
        for (set, element) in [
            ("sources", format!("\"{name}\" . {container}")),
            ("ports", format!("{} : {container} . 8080", 30_000 + number)),
            ("networks", format!("{container} . 64.0.0.0 : 0:1")),
            ("networks", format!("{container} . 192.0.0.0 : 0:1")),
            ("services", format!("{container} . 0:1 . 6 . 443 : 0:1")),
            ("services", format!("{container} . 0:1 . 17 . {ECHO} : 0:1")),
            ("services", format!("{container} . 0:1 . 1 . 2048 : 0:1")),
        ] {
            let _ = writeln!(elements, "add element inet ostler {set} {{ {element} }}");
        }
    }
    run("ip", &["-batch", "-"], &links);
    run("nft", &["-f", "-"], &elements);
    if numbers.start > 0 {
        return;
    }
    let (host, container) = addresses(0);
    thread::scope(|scope| {
        let there = scope.spawn(|| {
            setns(peers, CLONE).expect("our namespace");
            for command in [
                format!("address add {container}/30 dev peer0"),
                "link set peer0 up".to_owned(),
                format!("route add default via {host}"),
            ] {
                tool("ip", &command.split(' ').collect::<Vec<_>>());
            }
        });
        there.join().expect("no panic");
    });
}

fn run(program: &str, arguments: &[&str], input: &str) {
    use io::Write;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .expect("it is installed");
    let mut pipe = child.stdin.take().expect("a pipe");
    pipe.write_all(input.as_bytes()).expect("it reads");
    drop(pipe);
    assert!(child.wait().expect("our child").success(), "{program}");
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind((addresses(0).1, 0)).expect("our address");
    let patience = Some(Duration::from_secs(10));
    socket.set_read_timeout(patience).expect("not zero");
    socket
        .connect((Network::OUTSIDE, ECHO))
        .expect("there is a route");
    socket
}

/// In microseconds.
fn round_trip(socket: &UdpSocket) -> f64 {
    let begin = Instant::now();
    socket.send(b"ping").expect("not refused");
    socket.recv(&mut [0; 8]).expect("an answer in time");
    begin.elapsed().as_secs_f64() * 1e6
}

fn flow() -> Vec<f64> {
    let socket = socket();
    (0..PACKETS).map(|_| round_trip(&socket)).collect()
}

fn new_flows() -> Vec<f64> {
    (0..PACKETS).map(|_| round_trip(&socket())).collect()
}
