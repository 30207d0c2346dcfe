//! What the kernel remembers of an address that was given back, tried with packets.

use super::testbed::{
    Container, Namespace, OUTSIDE, attached, converse, datagrams, on_host, outside, received, run,
};
use super::{Attached, Network, NetworkConfig, Posture};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd as _;

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";

/// A container that may reach everything, on a host where others may reach nothing; and one datagram
/// each way between it and outside.
async fn spoken(network: &Network, outside: &Namespace) -> (Container, UdpSocket) {
    let all = super::EgressRule {
        destination: (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST),
        traffic: super::Traffic::All,
        log: false,
    };
    let how = |attached: &mut Attached| attached.egress = vec![all];
    let container = Container::with(network, ONE, how).await;
    let far = outside.datagrams(OUTSIDE, 9000);
    let near = container
        .namespace
        .datagrams(container.lease.container, 5000);
    near.send_to(b"ping", (OUTSIDE, 9000)).unwrap();
    let (_, from) = received(&far);
    far.send_to(b"pong", from).unwrap();
    assert_eq!(received(&near).0, "pong");
    (container, far)
}

async fn closed() -> Network {
    let config = NetworkConfig {
        egress: Posture::Closed,
        ..NetworkConfig::default()
    };
    Network::open(&config).await.unwrap()
}

/// Another container with the address of one that is gone.
async fn heir(network: &Network, gone: Container) -> Namespace {
    network.remove_link(ONE).await.unwrap();
    let namespace = Namespace::new();
    let heir = Attached::new(TWO, gone.lease.clone());
    network.attach(heir, namespace.0.as_fd()).await.unwrap();
    namespace.move_in(TWO, &gone.lease);
    namespace
}

/// Sends from the port that the first container had spoken from.
fn speak(heir: &Namespace, address: Ipv4Addr) -> UdpSocket {
    let near = heir.datagrams(address, 5000);
    near.connect((OUTSIDE, 9000)).unwrap();
    near.send(b"again").unwrap();
    near
}

#[test]
fn connections_are_forgotten_with_the_address() {
    on_host(|| async {
        let (outside, network) = (outside(), closed().await);
        let (container, far) = spoken(&network, &outside).await;
        let address = container.lease.container;
        network.detach(&attached(ONE, &container.lease, &[])).await;
        let heir = heir(&network, container).await;
        let refused = speak(&heir, address).recv(&mut [0; 8]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::HostUnreachable);
        far.set_nonblocking(true).unwrap();
        assert!(far.recv(&mut [0; 8]).is_err());
    });
}

#[test]
fn connections_that_are_not_forgotten_are_the_next_ones() {
    on_host(|| async {
        let (outside, network) = (outside(), closed().await);
        let (container, far) = spoken(&network, &outside).await;
        let (gone, address) = (
            attached(ONE, &container.lease, &[]),
            container.lease.container,
        );
        // All that a release does but this one thing.
        let detached = network.with(move |rules| rules.detach(&gone)).await;
        detached.unwrap();
        let heir = heir(&network, container).await;
        let _near = speak(&heir, address);
        assert_eq!(received(&far).0, "again");
    });
}

#[test]
fn of_a_mapped_port_too_and_of_nobody_else() {
    on_host(|| async {
        let (outside, network) = (outside(), closed().await);
        let (container, _far) = spoken(&network, &outside).await;
        let listener = container.namespace.listen(8080);
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        let mut client = outside.connect(super::testbed::HOST, 61_001).unwrap();
        let _server = converse(&listener, &mut client);
        // The host's own, and a neighbour's.
        let far = outside.datagrams(OUTSIDE, 9001);
        datagrams(super::testbed::HOST, 5001)
            .send_to(b"host", (OUTSIDE, 9001))
            .unwrap();
        assert_eq!(received(&far).0, "host");
        let two = Container::new(&network, TWO).await;
        let near = datagrams(two.lease.host, 5002);
        let inner = two.namespace.datagrams(two.lease.container, 5003);
        near.send_to(b"near", (two.lease.container, 5003)).unwrap();
        assert_eq!(received(&inner).0, "near");
        let of = |port: u16| {
            let text = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
            text.matches(&format!("port={port} ")).count()
        };
        // Each stands in both directions.
        for port in [61_001, 8080, 5000, 5001, 5002] {
            assert!(of(port) > 0, "{port}");
        }
        let gone = attached(ONE, &container.lease, &[(61_001, 8080)]);
        network.detach(&gone).await;
        for port in [61_001, 8080, 5000] {
            assert_eq!(of(port), 0, "{port}");
        }
        for port in [5001, 5002] {
            assert!(of(port) > 0, "{port}");
        }
    });
}

#[test]
fn many_connections_are_forgotten() {
    on_host(|| async {
        let (outside, network) = (outside(), closed().await);
        let (container, _far) = spoken(&network, &outside).await;
        let near = container.namespace.datagrams(container.lease.container, 0);
        for port in 1..=2000 {
            // Refused by the other side in its own time.
            let _ = near.send_to(b"many", (OUTSIDE, port));
        }
        let count = || {
            let listed = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
            listed.matches("src=10.254.").count()
        };
        assert!(count() > 1000, "{}", count());
        network.detach(&attached(ONE, &container.lease, &[])).await;
        assert_eq!(count(), 0, "{}", run("nft", "list table inet ostler"));
    });
}
