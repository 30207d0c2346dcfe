//! What an app that opens connections without end does to the host and to its neighbours.

use super::table::CONNECTIONS_MAX;
use super::testbed::{
    Container, HOST, Namespace, OUTSIDE, assert_rejected, attached, converse, datagrams, exchange,
    on_host, open, open_hospitable, outside, received, run, without,
};
use super::{Network, NetworkConfig};
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReuseAddr;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket,
};
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd as _;

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";

/// How many connections the kernel remembers in the namespace of the calling thread.
fn remembered() -> u32 {
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    let count = std::fs::read_to_string(path).unwrap();
    count.trim().parse().unwrap()
}

/// Begins so many, each from a port of its own to the same service; a refusal is told to a later one.
fn flood(container: &Container, to: std::net::Ipv4Addr, count: u16) {
    let flooder = container
        .namespace
        .datagrams(container.lease.container, 20_000);
    for port in 0..count {
        let _refused = flooder.send_to(b"x", (to, 10_000 + port));
    }
}

#[test]
fn a_flooder_has_its_connections_and_a_neighbour_has_its_own() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        let listener = outside.listen(80);
        // Nobody hears the rest, and nobody says so.
        outside.inside(|| {
            run("nft", "add table ip deaf");
            let hook = "{ type filter hook input priority 0 ; }";
            run("nft", &format!("add chain ip deaf input {hook}"));
            run("nft", "add rule ip deaf input udp dport != 80 drop");
        });
        flood(&one, OUTSIDE, 6000);
        let count = remembered();
        assert!(
            (CONNECTIONS_MAX..CONNECTIONS_MAX + 50).contains(&count),
            "{count}"
        );
        assert_rejected(one.namespace.connect(OUTSIDE, 80));
        converse(&listener, &mut two.namespace.connect(OUTSIDE, 80).unwrap());
        let crowded = run("nft", "list chain inet ostler crowded");
        assert!(!crowded.contains("packets 0 "), "{crowded}");
        // What is open goes on, and what others began is not the flooder's.
        let inner = one.namespace.listen(8080);
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
        without(network, "admitted");
        // A late refusal of the first ones can cost one its turn.
        (0..3).for_each(|_| flood(&one, OUTSIDE, 6000));
        assert!(remembered() >= 6000, "{}", remembered());
    });
}

#[test]
fn connections_to_the_host_count_too() {
    on_host(|| async {
        let (_outside, network) = (outside(), open_hospitable().await);
        let one = Container::new(&network, ONE).await;
        let _deaf = datagrams(HOST, 9);
        run("nft", "add table ip deaf");
        let hook = "{ type filter hook input priority 100 ; }";
        run("nft", &format!("add chain ip deaf input {hook}"));
        flood(&one, HOST, 6000);
        assert!(remembered() < CONNECTIONS_MAX + 50, "{}", remembered());
    });
}

/// Begins so many connections to a mapped port of the host, each from a port of its own, and completes none.
fn knock(outside: &Namespace, count: u16) {
    outside.inside(|| {
        for port in 0..count {
            let from = SockaddrIn::new(192, 0, 2, 2, 10_000 + port);
            let kind = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Inet, SockType::Stream, kind, None).unwrap();
            setsockopt(&socket, ReuseAddr, &true).unwrap();
            bind(socket.as_raw_fd(), &from).unwrap();
            let to = SocketAddrV4::new(HOST, 61_001);
            let begun = connect(socket.as_raw_fd(), &SockaddrIn::from(to));
            assert_eq!(begun, Err(Errno::EINPROGRESS));
        }
    });
}

/// For how many more seconds each one is remembered that is only begun. The line: ipv4 2 tcp 6 <seconds left> SYN_SENT …
fn half_open() -> Vec<u32> {
    let text = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
    let lines = text.lines().filter(|line| line.contains("SYN_SENT"));
    let left = lines.map(|line| line.split_whitespace().nth(4).unwrap());
    left.map(|left| left.parse().unwrap()).collect()
}

#[test]
fn what_others_open_to_an_app_leaves_room_for_its_neighbours() {
    on_host(|| async {
        // A few, so that all are begun before the first is forgotten.
        let few = NetworkConfig {
            visits: 512,
            ..NetworkConfig::default()
        };
        let (outside, network) = (outside(), Network::open(&few).await.unwrap());
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        network.map_port(TWO, 61_002, 8080).await.unwrap();
        let inner = [&one, &two].map(|container| container.namespace.listen(8080));
        let mut early = outside.connect(HOST, 61_001).unwrap();
        let mut kept = converse(&inner[0], &mut early);
        // It accepts what comes, and never says so.
        one.namespace.inside(|| {
            run("nft", "add table ip deaf");
            let hook = "{ type filter hook input priority 0 ; }";
            run("nft", &format!("add chain ip deaf input {hook}"));
            run(
                "nft",
                "add rule ip deaf input tcp flags & (syn | ack) == syn drop",
            );
        });
        knock(&outside, 800);
        let count = remembered();
        assert!((512..512 + 50).contains(&count), "{count}");
        let swamped = run("nft", "list chain inet ostler swamped");
        assert!(!swamped.contains("packets 0 "), "{swamped}");
        let left = half_open();
        assert!(!left.is_empty() && left.iter().all(|left| *left <= 10));
        // What is open goes on; the app's own, and its neighbour's, are others.
        exchange(&mut early, &mut kept);
        let listener = outside.listen(80);
        converse(&listener, &mut one.namespace.connect(OUTSIDE, 80).unwrap());
        converse(&inner[1], &mut outside.connect(HOST, 61_002).unwrap());
        without(network, "welcomed");
        knock(&outside, 800);
        assert!(remembered() >= 800, "{}", remembered());
        assert!(half_open().iter().any(|left| *left > 10));
    });
}

#[test]
fn a_table_of_an_older_agent_gets_the_bound_and_connections_go_on() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let one = Container::new(&network, ONE).await;
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        let inner = one.namespace.listen(8080);
        let mut early = outside.connect(HOST, 61_001).unwrap();
        let mut kept = converse(&inner, &mut early);
        without(network, "forward");
        for old in [
            "add rule inet ostler forward ct state established,related accept",
            "add rule inet ostler forward ct status dnat accept",
            "flush chain inet ostler welcomed",
            "delete chain inet ostler welcomed",
            "delete chain inet ostler swamped",
            "delete set inet ostler visits",
            "delete ct timeout inet ostler visit",
        ] {
            run("nft", old);
        }
        exchange(&mut early, &mut kept);
        let network = open().await;
        let live = [attached(ONE, &one.lease, &[(61_001, 8080)])];
        network.rebuild(&live).await.unwrap();
        exchange(&mut early, &mut kept);
        converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
        let counted = run("nft", "list set inet ostler visits");
        assert!(
            counted.contains(&one.lease.container.to_string()),
            "{counted}"
        );
    });
}

/// An app that asks for names again and again has not all of its questions open.
#[test]
fn what_was_asked_of_a_name_server_is_soon_forgotten() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let one = Container::new(&network, ONE).await;
        let asker = one.namespace.datagrams(one.lease.container, 20_000);
        let left = [53, 54].map(|port| {
            let server = outside.datagrams(OUTSIDE, port);
            asker.send_to(b"?", (OUTSIDE, port)).unwrap();
            let (_, from) = received(&server);
            server.send_to(b"!", from).unwrap();
            received(&asker);
            let text = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
            let mut lines = text.lines();
            let line = lines.find(|line| line.contains(&format!("dport={port} ")));
            // ipv4 2 udp 17 <seconds left> src=…
            let seconds = line.and_then(|line| line.split_whitespace().nth(4));
            // Forgotten already: both were known when the question came through.
            seconds.map_or(0, |seconds| seconds.parse::<u32>().unwrap())
        });
        assert!(left[0] <= 10 && left[1] > 10, "{left:?}");
    });
}

#[test]
fn what_is_closed_is_soon_forgotten() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let one = Container::new(&network, ONE).await;
        let open_and_close = |port| {
            let listener = outside.listen(port);
            let mut client = one.namespace.connect(OUTSIDE, port).unwrap();
            drop(converse(&listener, &mut client));
        };
        open_and_close(81);
        // Once both sides have heard of the end. The line: ipv4 2 tcp 6 <seconds left> TIME_WAIT …
        let seconds_left = |port: u16| loop {
            let text = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
            let mut lines = text.lines();
            let Some(line) = lines.find(|line| line.contains(&format!("dport={port} "))) else {
                return 0;
            };
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields[5] == "TIME_WAIT" {
                return fields[4].parse::<u32>().unwrap();
            }
            std::thread::yield_now();
        };
        let left = seconds_left(81);
        assert!(left <= 5, "{left}");
        without(network, "admitted");
        open_and_close(82);
        let left = seconds_left(82);
        assert!(left > 5, "{left}");
    });
}
