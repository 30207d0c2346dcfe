//! What a hostile container and a hostile neighbour of the host try, with packets of their own making.
//! Each attack is shown to come through where the one rule against it is taken out.

use super::sysctl;
use super::testbed::{
    Container, DEADLINE, HOST, Namespace, OUTSIDE, datagrams, ip, on_host, open, open_hospitable,
    outside, received, run, without,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
    setsockopt, socket, sockopt::ReceiveTimeout,
};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";

/// The host's end of the first container's link.
const HOST_END: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 1);

fn raw_socket(protocol: SockProtocol) -> OwnedFd {
    let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
    let socket = socket(family, SockType::Raw, flags, protocol).unwrap();
    let deadline = nix::sys::time::TimeVal::new(10, 0);
    setsockopt(&socket, ReceiveTimeout, &deadline).unwrap();
    socket
}

fn send(socket: &OwnedFd, packet: &[u8], to: Ipv4Addr) {
    let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
    sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty()).unwrap();
}

/// An IPv4 packet with a datagram for port 9000 in it, from whomever it pleases. The kernel fills in
/// length and checksum of the header; a datagram may have none.
fn forged(from: Ipv4Addr, to: Ipv4Addr, text: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let length = u16::try_from(8 + text.len()).unwrap();
    for word in [9001_u16, 9000, length, 0] {
        packet.extend(word.to_be_bytes());
    }
    packet.extend(text);
    packet
}

#[test]
fn packets_for_127_from_outside_do_not_reach_the_loopback() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let _container = Container::new(&network, ONE).await;
        // Somebody lets 127/8 in from everywhere, as kube-proxy does (CVE-2020-8558).
        sysctl::write("ipv4/conf/all/route_localnet", "1").unwrap();
        let receiver = datagrams(Ipv4Addr::LOCALHOST, 9000);
        let honest = datagrams(HOST, 9000);
        let attacker = outside.inside(|| {
            ip("addr flush dev lo");
            sysctl::write("ipv4/conf/all/route_localnet", "1").unwrap();
            ip(&format!("route add 127.0.0.0/8 via {HOST} src {OUTSIDE}"));
            datagrams(OUTSIDE, 0)
        });
        let loopback = (Ipv4Addr::LOCALHOST, 9000);
        attacker.send_to(b"first", loopback).unwrap();
        attacker.send_to(b"honest", (HOST, 9000)).unwrap();
        assert_eq!(received(&honest).0, "honest");
        without(network, "raw_in");
        attacker.send_to(b"second", loopback).unwrap();
        assert_eq!(received(&receiver).0, "second");
    });
}

#[test]
fn forged_packets_of_a_raw_socket_are_dropped() {
    on_host(|| async {
        let (outside, network) = (outside(), open_hospitable().await);
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        let far = outside.datagrams(OUTSIDE, 9000);
        let near = datagrams(HOST, 9000);
        let raw = one.namespace.inside(|| raw_socket(SockProtocol::Raw));
        let from = |who: Ipv4Addr, text: &[u8]| {
            for to in [OUTSIDE, HOST] {
                send(&raw, &forged(who, to, text), to);
            }
        };
        // Its neighbour, the host's own addresses, anybody in the world.
        let liars = [
            two.lease.container,
            one.lease.host,
            HOST,
            Ipv4Addr::new(203, 0, 113, 9),
        ];
        for liar in liars {
            from(liar, b"forged");
        }
        from(one.lease.container, b"honest");
        assert_eq!(received(&far).0, "honest");
        assert_eq!(received(&near).0, "honest");
        without(network, "raw_in");
        // The kernel's own check of the reverse path would drop it as well.
        sysctl::write(&format!("ipv4/conf/os-{ONE}/rp_filter"), "0").unwrap();
        from(two.lease.container, b"forged");
        assert_eq!(received(&far).0, "forged");
        assert_eq!(received(&near).0, "forged");
    });
}

#[test]
fn a_packet_that_names_its_own_route_is_dropped() {
    on_host(|| async {
        let network = open_hospitable().await;
        let container = Container::new(&network, ONE).await;
        // Somebody lets such packets in from everywhere.
        sysctl::write("ipv4/conf/all/accept_source_route", "1").unwrap();
        let near = datagrams(HOST_END, 9000);
        let raw = container.namespace.inside(|| raw_socket(SockProtocol::Raw));
        let from = container.lease.container;
        // Loose source and record route (RFC 791) through one station, which is behind it, and a filler.
        let mut routed = forged(from, HOST_END, b"routed");
        routed[0] = 0x47;
        routed.splice(20..20, [131, 7, 8, 10, 254, 0, 1, 0]);
        send(&raw, &routed, HOST_END);
        send(&raw, &forged(from, HOST_END, b"honest"), HOST_END);
        assert_eq!(received(&near).0, "honest");
        sysctl::write(&format!("ipv4/conf/os-{ONE}/accept_source_route"), "1").unwrap();
        send(&raw, &routed, HOST_END);
        assert_eq!(received(&near).0, "routed");
    });
}

#[test]
fn an_icmp_redirect_of_a_container_is_not_heard() {
    on_host(|| async {
        let network = open().await;
        let container = Container::new(&network, ONE).await;
        let hears = raw_socket(SockProtocol::Icmp);
        let raw = container
            .namespace
            .inside(|| raw_socket(SockProtocol::Icmp));
        // A redirect (RFC 792), which would lead the host's packets astray, and an echo request.
        let redirect = [5, 1, 0xfa, 0xfe, 0, 0, 0, 0];
        let echo = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
        let first = || {
            send(&raw, &redirect, container.lease.host);
            send(&raw, &echo, container.lease.host);
            let mut packet = [0; 64];
            loop {
                recv(hears.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
                // After the header of 20 bytes. The host's own answers are heard, too.
                if packet[20] != 0 {
                    return packet[20];
                }
            }
        };
        assert_eq!(first(), 8);
        without(network, "input");
        assert_eq!(first(), 5);
    });
}

/// The link-local address of a link of this namespace, and its hardware address.
fn link_local(link: &str) -> (Ipv6Addr, String) {
    let text = ip(&format!("-o link show {link}"));
    let mac = text.split_once("link/ether ").unwrap().1;
    let mac = mac.split(' ').next().unwrap().to_owned();
    let bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let b: Vec<u8> = bytes.map(Result::unwrap).collect();
    let tail = [b[0] ^ 2, b[1], b[2], 0xff, 0xfe, b[3], b[4], b[5]];
    let tail = u64::from_be_bytes(tail);
    (Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(tail)), mac)
}

/// Gives a link its link-local address at once, whoever had turned IPv6 off.
fn turn_ipv6_on(link: &str) -> (Ipv6Addr, String) {
    sysctl::write(&format!("ipv6/conf/{link}/disable_ipv6"), "0").unwrap();
    sysctl::write(&format!("ipv6/conf/{link}/accept_dad"), "0").unwrap();
    let (address, mac) = link_local(link);
    // It may have come by itself.
    run(
        "ip",
        &format!("-6 addr replace {address}/64 dev {link} nodad"),
    );
    (address, mac)
}

fn index(link: &str) -> u32 {
    nix::net::if_::if_nametoindex(link).unwrap()
}

fn six(address: Ipv6Addr, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((address, port)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

#[test]
fn link_local_ipv6_is_no_side_door_to_the_host() {
    on_host(|| async {
        let network = open_hospitable().await;
        let container = Container::new(&network, ONE).await;
        let (there, mac) = turn_ipv6_on(&format!("os-{ONE}"));
        let receiver = six(Ipv6Addr::UNSPECIFIED, 9000);
        let (sender, scope) = container.namespace.inside(|| {
            turn_ipv6_on("eth0");
            ip(&format!("-6 neigh replace {there} lladdr {mac} dev eth0"));
            (six(Ipv6Addr::UNSPECIFIED, 0), index("eth0"))
        });
        let four = container.namespace.datagrams(container.lease.container, 0);
        let everybody = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let knock = || {
            [(there, "host"), (everybody, "all")].map(|(address, text)| {
                let to = SocketAddrV6::new(address, 9000, 0, scope);
                sender.send_to(text.as_bytes(), to).is_ok()
            })
        };
        // First without the rule: addresses come up in their own time.
        without(network, "raw_in");
        let mut heard = BTreeSet::new();
        while heard.len() < 2 {
            if knock() == [true; 2] {
                heard.insert(received(&receiver).0);
            }
        }
        let _network = open_hospitable().await;
        receiver.set_nonblocking(true).unwrap();
        while receiver.recv(&mut [0; 64]).is_ok() {}
        receiver.set_nonblocking(false).unwrap();
        assert_eq!(knock(), [true; 2]);
        four.send_to(b"four", (container.lease.host, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "four");
    });
}

#[test]
fn ipv6_is_no_side_door_to_a_neighbour() {
    on_host(|| async {
        let network = open().await;
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        // Everything that could help: addresses, routes, neighbours, forwarding.
        let net = |n: u128, host: u128| Ipv6Addr::from_bits(0xfd00 << 112 | n << 64 | host);
        sysctl::write("ipv6/conf/all/forwarding", "1").unwrap();
        for (n, handle, container) in [(1, ONE, &one), (2, TWO, &two)] {
            let link = format!("os-{handle}");
            let (_, mac) = turn_ipv6_on(&link);
            run(
                "ip",
                &format!("-6 addr add {}/64 dev {link} nodad", net(n, 1)),
            );
            let inner = container.namespace.inside(|| {
                let (_, inner) = turn_ipv6_on("eth0");
                ip(&format!("-6 addr add {}/64 dev eth0 nodad", net(n, 2)));
                ip(&format!(
                    "-6 neigh replace {} lladdr {mac} dev eth0",
                    net(n, 1)
                ));
                ip(&format!("-6 route add default via {}", net(n, 1)));
                inner
            });
            ip(&format!(
                "-6 neigh replace {} lladdr {inner} dev {link}",
                net(n, 2)
            ));
        }
        let inside = |container: &Container, address, port| {
            let namespace: &Namespace = &container.namespace;
            namespace.inside(|| six(address, port))
        };
        let receiver = inside(&two, Ipv6Addr::UNSPECIFIED, 9000);
        let sender = inside(&one, net(1, 2), 0);
        let neighbour = (net(2, 2), 9000);
        // First without the two rules that are against it: addresses come up in their own time.
        without(network, "raw_in");
        run("nft", "flush chain inet ostler forward");
        let soon = Duration::from_secs(1);
        receiver.set_read_timeout(Some(soon)).unwrap();
        let arrives = || {
            sender.send_to(b"six", neighbour).unwrap();
            receiver.recv_from(&mut [0; 64]).is_ok()
        };
        assert!((0..20).any(|_| arrives()));
        let _network = open().await;
        receiver.set_nonblocking(true).unwrap();
        while receiver.recv(&mut [0; 64]).is_ok() {}
        receiver.set_nonblocking(false).unwrap();
        receiver.set_read_timeout(Some(DEADLINE)).unwrap();
        sender.send_to(b"six", neighbour).unwrap();
        let host = datagrams(Ipv4Addr::UNSPECIFIED, 0);
        host.send_to(b"host", (two.lease.container, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "host");
    });
}
