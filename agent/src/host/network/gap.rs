//! What was connected while the table was away, tried with packets.

use super::testbed::{
    Container, HOST, Namespace, OUTSIDE, converse, datagrams, exchange, on_host, open, outside,
    received, run,
};
use super::{Attached, EgressRule, Traffic, program};
use std::io;
use std::net::UdpSocket;

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";

/// A word each way; what is sent on the connected end goes there from now on.
fn spoken(near: UdpSocket, far: &UdpSocket) -> UdpSocket {
    near.connect(far.local_addr().unwrap()).unwrap();
    near.send(b"ping").unwrap();
    let (_, from) = received(far);
    far.send_to(b"pong", from).unwrap();
    assert_eq!(received(&near).0, "pong");
    near
}

fn rule(traffic: Traffic) -> EgressRule {
    EgressRule {
        destination: (OUTSIDE, OUTSIDE),
        traffic,
        log: false,
    }
}

fn may(attached: &mut Attached) {
    let ports = vec![(80, 80), (9000, 9000)];
    attached.egress = vec![rule(Traffic::Tcp(ports.clone())), rule(Traffic::Udp(ports))];
}

/// What a container has connected to though the table would refuse it: to outside, to a neighbour, to the
/// host. And who has connected to it.
fn refused(
    one: &Container,
    two: &Container,
    outside: &Namespace,
) -> (Vec<(UdpSocket, UdpSocket)>, (UdpSocket, UdpSocket)) {
    let address = one.lease.container;
    let near = || one.namespace.datagrams(address, 0);
    let theirs = [
        outside.datagrams(OUTSIDE, 9001),
        two.namespace.datagrams(two.lease.container, 9000),
        datagrams(HOST, 9002),
    ];
    let ours = theirs.map(|far| (spoken(near(), &far), far));
    let inner = one.namespace.datagrams(address, 7000);
    let outer = spoken(outside.datagrams(OUTSIDE, 0), &inner);
    (ours.into(), (outer, inner))
}

/// Somebody else's rule, without which the kernel would track no connections while our table is away.
fn somebody_tracks() {
    run("nft", "add table ip others");
    let hook = "{ type filter hook prerouting priority 0 ; }";
    run("nft", &format!("add chain ip others seen {hook}"));
    run(
        "nft",
        "add rule ip others seen ct state established counter",
    );
}

fn told(near: &UdpSocket) -> io::ErrorKind {
    near.send(b"again").unwrap();
    near.recv(&mut [0; 8]).unwrap_err().kind()
}

fn heard(near: &UdpSocket, far: &UdpSocket) {
    near.send(b"again").unwrap();
    assert_eq!(received(far).0, "again");
}

/// What the table refuses ends when it is back, and nothing else.
fn ends_after(away: &'static str) {
    on_host(|| async {
        somebody_tracks();
        let (outside, network) = (outside(), open().await);
        let one = Container::with(&network, ONE, may).await;
        let two = Container::new(&network, TWO).await;
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        // Made by way of the table.
        let (listener, inner) = (outside.listen(80), one.namespace.listen(8080));
        let mut client = one.namespace.connect(OUTSIDE, 80).unwrap();
        let mut server = converse(&listener, &mut client);
        let mut mapped = outside.connect(HOST, 61_001).unwrap();
        let mut mapping = converse(&inner, &mut mapped);
        drop(network);
        run("nft", away);
        let (ours, (outer, _inner)) = refused(&one, &two, &outside);
        // The host's own, and what it may have, though not in this way.
        let host = spoken(
            datagrams(one.lease.host, 0),
            &one.namespace.datagrams(one.lease.container, 7001),
        );
        let far = outside.datagrams(OUTSIDE, 9000);
        let allowed = spoken(one.namespace.datagrams(one.lease.container, 0), &far);
        let remembered = |socket: &UdpSocket| {
            let text = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
            let port = socket.local_addr().unwrap().port();
            text.contains(&format!("sport={port} "))
        };
        assert!(remembered(&host) && remembered(&outer));

        let network = open().await;
        let live = |container: &Container, handle, ports| Attached {
            ports,
            ..Attached::new(handle, container.lease.clone())
        };
        let mut first = live(&one, ONE, vec![(61_001, 8080)]);
        may(&mut first);
        network
            .rebuild(&[first, live(&two, TWO, Vec::new())])
            .await
            .unwrap();
        for (near, far) in &ours {
            let to = far.local_addr().unwrap();
            assert_eq!(told(near), io::ErrorKind::HostUnreachable, "{to}");
        }
        assert_eq!(told(&outer), io::ErrorKind::HostUnreachable);
        exchange(&mut client, &mut server);
        exchange(&mut mapped, &mut mapping);
        assert!(remembered(&host));
        allowed.send(b"anew").unwrap();
        let (word, from) = received(&far);
        assert_eq!((word.as_str(), from.ip()), ("anew", HOST.into()));
    });
}

#[test]
fn what_was_made_while_the_table_was_gone_ends_with_its_return() {
    ends_after("delete table inet ostler");
}

#[test]
fn what_was_made_while_the_table_slept_ends_when_it_wakes() {
    ends_after("add table inet ostler { flags dormant ; }");
}

#[test]
fn what_is_not_forgotten_goes_on() {
    on_host(|| async {
        somebody_tracks();
        let (outside, network) = (outside(), open().await);
        let one = Container::with(&network, ONE, may).await;
        let two = Container::new(&network, TWO).await;
        drop(network);
        // What `nft` cannot read again of its own listing looks prefixes up; there are none here.
        let table = run("nft", "list table inet ostler");
        let lines = table.lines().filter(|line| !line.contains(" | "));
        let table: String = lines.flat_map(|line| [line, "\n"]).collect();
        run("nft", "delete table inet ostler");
        let (ours, (outer, inner)) = refused(&one, &two, &outside);
        program::run("nft", &["-f", "-"], &table).unwrap();
        for (near, far) in &ours {
            heard(near, far);
        }
        heard(&outer, &inner);
    });
}
