//! What may pass and what may not, tried with packets on the real kernel.

use super::testbed::{
    Container, DEADLINE, HOST, Namespace, OUTSIDE, a_while, assert_rejected, attached, connect,
    converse, datagrams, eventually, exchange, ip, listed, listen, on_host, open, open_hospitable,
    outside, received, run, without,
};
use super::{Lease, Network, NetworkConfig, NetworkError, sysctl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::cell::Cell;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";

/// Without counters.
fn ruleset() -> String {
    listed("list ruleset")
}

/// The names of the links; their state changes a little later than they do.
fn links() -> String {
    let listing = ip("-brief link");
    let names = listing
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    names.map(|name| format!("{name}\n")).collect()
}

#[test]
fn a_container_reaches_outside_with_the_hosts_address() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let listener = outside.listen(80);
        let mut client = container.namespace.connect(OUTSIDE, 80).unwrap();
        let server = converse(&listener, &mut client);
        assert_eq!(server.peer_addr().unwrap().ip(), HOST);
    });
}

#[test]
fn outside_reaches_the_mapped_port_and_nothing_else() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let listener = container.namespace.listen(8080);
        let port = network.take_port().unwrap();
        network.map_port(ONE, port, 8080).await.unwrap();
        // Again is the same mapping; another one is refused.
        network.map_port(ONE, port, 8080).await.unwrap();
        network.map_port(ONE, port, 8081).await.unwrap_err();
        let mut client = outside.connect(HOST, port).unwrap();
        let server = converse(&listener, &mut client);
        assert_eq!(server.peer_addr().unwrap().ip(), OUTSIDE);
        let unmapped = outside.connect(HOST, port + 1).unwrap_err();
        assert_eq!(unmapped.kind(), io::ErrorKind::ConnectionRefused);
        assert_rejected(outside.connect(container.lease.container, 8080));
        without(network, "forward");
        outside.connect(container.lease.container, 8080).unwrap();
    });
}

#[test]
fn the_host_reaches_the_mapped_port_on_each_of_its_addresses() {
    on_host(|| async {
        let (_outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let listener = container.namespace.listen(8080);
        let port = network.take_port().unwrap();
        network.map_port(ONE, port, 8080).await.unwrap();
        for address in [HOST, Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 53)] {
            let server = converse(&listener, &mut connect(address, port).unwrap());
            let peer = server.peer_addr().unwrap().ip();
            let seen = if address == HOST {
                HOST
            } else {
                container.lease.host
            };
            assert_eq!(peer, seen, "{address}");
        }
        let direct = container.lease.container;
        converse(&listener, &mut connect(direct, 8080).unwrap());
    });
}

#[test]
fn a_container_reaches_no_other_container() {
    on_host(|| async {
        let (_outside, network) = (outside(), open().await);
        let one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        let _listener = two.namespace.listen(8080);
        let port = network.take_port().unwrap();
        network.map_port(TWO, port, 8080).await.unwrap();
        assert_rejected(one.namespace.connect(two.lease.container, 8080));
        assert_rejected(one.namespace.connect(HOST, port));
        assert_rejected(one.namespace.connect(one.lease.host, port));
        without(network, "forward");
        one.namespace.connect(two.lease.container, 8080).unwrap();
    });
}

#[test]
fn a_container_reaches_the_host_only_where_that_is_allowed() {
    on_host(|| async {
        let (_outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let listener = listen(22);
        for address in [HOST, container.lease.host] {
            assert_rejected(container.namespace.connect(address, 22));
            assert!(echo(&container.namespace, address), "{address}");
        }
        drop(network);
        let _network = open_hospitable().await;
        let mut client = container.namespace.connect(HOST, 22).unwrap();
        converse(&listener, &mut client);
    });
}

/// Whether an ICMP echo request is answered.
fn echo(from: &Namespace, to: Ipv4Addr) -> bool {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
        setsockopt, socket, sockopt::ReceiveTimeout,
    };
    use std::os::fd::AsRawFd as _;
    let socket = from.inside(|| {
        let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
        socket(family, SockType::Raw, flags, SockProtocol::Icmp).unwrap()
    });
    let deadline = nix::sys::time::TimeVal::new(10, 0);
    setsockopt(&socket, ReceiveTimeout, &deadline).unwrap();
    // Type 8, code 0, checksum, identifier 1, sequence 1.
    let request = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    let address = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
    sendto(socket.as_raw_fd(), &request, &address, MsgFlags::empty()).unwrap();
    let mut answer = [0; 64];
    recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).is_ok_and(|_| answer[20] == 0)
}

#[test]
fn a_borrowed_source_address_is_dropped() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let borrowed = Ipv4Addr::new(10, 254, 0, 6);
        container
            .namespace
            .inside(|| ip(&format!("addr add {borrowed}/32 dev eth0")));
        let receiver = outside.datagrams(OUTSIDE, 9000);
        let lying = container.namespace.datagrams(borrowed, 0);
        let honest = container.namespace.datagrams(container.lease.container, 0);
        lying.send_to(b"lying", (OUTSIDE, 9000)).unwrap();
        honest.send_to(b"honest", (OUTSIDE, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "honest");
        without(network, "raw_in");
        // The kernel's own check of the reverse path would drop it as well.
        std::fs::write(format!("/proc/sys/net/ipv4/conf/os-{ONE}/rp_filter"), "0").unwrap();
        // Nor has anybody said what that address may reach.
        run("nft", "flush chain inet ostler outgoing");
        lying.send_to(b"lying", (OUTSIDE, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "lying");
    });
}

#[test]
fn the_hosts_loopback_is_out_of_a_containers_reach() {
    on_host(|| async {
        let network = open_hospitable().await;
        let container = Container::new(&network, ONE).await;
        let (loopback, gateway) = (Ipv4Addr::LOCALHOST, container.lease.host);
        // A root of its own network namespace can route 127/8 to the host.
        container.namespace.inside(|| {
            ip("addr flush dev lo");
            std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
            ip(&format!(
                "route add 127.0.0.0/8 via {gateway} src {}",
                container.lease.container
            ));
        });
        let receiver = datagrams(Ipv4Addr::UNSPECIFIED, 9000);
        let sender = container.namespace.datagrams(container.lease.container, 0);
        sender.send_to(b"loopback", (loopback, 9000)).unwrap();
        sender.send_to(b"gateway", (gateway, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "gateway");
        without(network, "raw_in");
        sender.send_to(b"loopback", (loopback, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "loopback");
    });
}

#[test]
fn a_container_speaks_no_ipv6() {
    on_host(|| async {
        let network = open_hospitable().await;
        let container = Container::new(&network, ONE).await;
        let off = format!("ipv6/conf/os-{ONE}/disable_ipv6");
        assert_eq!(sysctl::read(&off).unwrap(), "1");
        // Even if somebody turns it on again.
        sysctl::write(&off, "0").unwrap();
        ip(&format!("-6 addr add fd00::1/64 dev os-{ONE} nodad"));
        let (here, there) = (Ipv6Addr::from_bits(0xfd00 << 112 | 1), "fd00::2");
        container
            .namespace
            .inside(|| ip(&format!("-6 addr add {there}/64 dev eth0 nodad")));
        let receiver = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 9000)).unwrap();
        receiver.set_read_timeout(Some(DEADLINE)).unwrap();
        let six = container
            .namespace
            .inside(|| UdpSocket::bind((there, 0)).unwrap());
        let four = container.namespace.datagrams(container.lease.container, 0);
        // Neighbour discovery is IPv6 too.
        let link = ip(&format!("-o link show os-{ONE}"));
        let mac = link
            .split_once("link/ether ")
            .unwrap()
            .1
            .split(' ')
            .next()
            .unwrap();
        container
            .namespace
            .inside(|| ip(&format!("-6 neigh add {here} lladdr {mac} dev eth0")));
        six.send_to(b"six", SocketAddrV6::new(here, 9000, 0, 0))
            .unwrap();
        four.send_to(b"four", (container.lease.host, 9000)).unwrap();
        assert_eq!(received(&receiver).0, "four");
        without(network, "raw_in");
        six.send_to(b"six", SocketAddrV6::new(here, 9000, 0, 0))
            .unwrap();
        assert_eq!(received(&receiver).0, "six");
    });
}

/// The host's ruleset, legacy rules, forwarding and links.
fn state() -> String {
    [
        ruleset(),
        run("iptables-legacy", "-S"),
        sysctl::read("ipv4/ip_forward").unwrap(),
        links(),
    ]
    .join("\n")
}

/// Two more hosts with this one between them, and no part of ours in it: what FORWARD does to others.
fn strangers() -> (Namespace, Namespace) {
    let left = Namespace::beside("left0", [198, 51, 100, 1].into(), [198, 51, 100, 2].into());
    let right = Namespace::beside("right0", [203, 0, 113, 1].into(), [203, 0, 113, 2].into());
    (left, right)
}

/// `strangers` cannot pass, a container can both ways; and nothing of it is left.
async fn passes_where_others_are_dropped(setup: &[(&'static str, &str)]) {
    let (outside, (left, right)) = (outside(), strangers());
    sysctl::write("ipv4/ip_forward", "0").unwrap();
    for (program, arguments) in setup {
        run(program, arguments);
    }
    let before = state();
    let network = open().await;
    let container = Container::new(&network, ONE).await;
    let (inner, outer) = (container.namespace.listen(8080), outside.listen(80));
    let port = network.take_port().unwrap();
    network.map_port(ONE, port, 8080).await.unwrap();
    converse(&inner, &mut outside.connect(HOST, port).unwrap());
    converse(
        &outer,
        &mut container.namespace.connect(OUTSIDE, 80).unwrap(),
    );
    dropped(&left, &right);
    // A second agent after a killed one finds the accepts, and makes no others.
    let with = state();
    drop(network);
    let network = open().await;
    assert_eq!(state(), with);
    network
        .detach(&attached(ONE, &container.lease, &[(port, 8080)]))
        .await;
    network.close().await;
    drop((container, inner));
    gone(ONE);
    assert_eq!(state(), before);
}

/// A datagram does not get through; one that needs no forwarding does, and later.
fn dropped(from: &Namespace, to: &Namespace) {
    let receiver = to.datagrams([203, 0, 113, 2].into(), 9000);
    let forwarded = from.datagrams(Ipv4Addr::UNSPECIFIED, 0);
    forwarded
        .send_to(b"forwarded", ("203.0.113.2", 9000))
        .unwrap();
    let direct = datagrams(Ipv4Addr::UNSPECIFIED, 0);
    direct.send_to(b"direct", ("203.0.113.2", 9000)).unwrap();
    assert_eq!(received(&receiver).0, "direct");
}

/// Waits until a link died with its namespace: the kernel tells in its own time.
fn gone(handle: &str) {
    let link = format!("os-{handle}");
    let end = Instant::now() + DEADLINE;
    while nix::net::if_::if_nametoindex(link.as_str()).is_ok() {
        assert!(Instant::now() < end, "{link} is still there");
        std::thread::yield_now();
    }
}

#[test]
fn a_forward_policy_of_nft_iptables_is_passed_and_left_as_it_was() {
    on_host(|| passes_where_others_are_dropped(&[("iptables-nft", "-P FORWARD DROP")]));
}

#[test]
fn a_forward_policy_of_legacy_iptables_is_passed_and_left_as_it_was() {
    on_host(|| passes_where_others_are_dropped(&[("iptables-legacy", "-P FORWARD DROP")]));
}

#[test]
fn a_last_rule_that_rejects_is_passed_and_left_as_it_was() {
    const RULE: &str = "-A FORWARD -j REJECT --reject-with icmp-host-prohibited";
    on_host(|| passes_where_others_are_dropped(&[("iptables-nft", RULE)]));
}

#[test]
fn a_link_that_has_a_name_as_ours_keeps_its_traffic() {
    on_host(|| async {
        run("ip", "link add os-mgmt type veth peer name other");
        let error = Network::open(&NetworkConfig::default()).await.unwrap_err();
        assert!(error.to_string().contains("\"os-mgmt\""), "{error}");
        assert_eq!(ruleset(), "");
        run("ip", "link del os-mgmt");
        open().await.close().await;
    });
}

#[test]
fn dockers_forward_chain_is_passed_and_left_as_it_was() {
    on_host(|| {
        passes_where_others_are_dropped(&[
            ("iptables-nft", "-P FORWARD DROP"),
            ("iptables-nft", "-N DOCKER-USER"),
            ("iptables-nft", "-A DOCKER-USER -j RETURN"),
            ("iptables-nft", "-N DOCKER-FORWARD"),
            ("iptables-nft", "-A FORWARD -j DOCKER-USER"),
            ("iptables-nft", "-A FORWARD -j DOCKER-FORWARD"),
        ])
    });
}

#[test]
fn a_filter_table_that_iptables_cannot_read_is_no_obstacle() {
    on_host(|| async {
        let (outside, chain) = (outside(), "type filter hook forward priority 0 ; }");
        run("nft", "add table ip filter");
        run("nft", &format!("add chain ip filter FORWARD {{ {chain}"));
        run(
            "nft",
            "add rule ip filter FORWARD ct state established accept",
        );
        super::program::run("iptables-nft", &["-S"], "").unwrap_err();
        let before = run("nft", "--stateless list table ip filter");
        let network = open().await;
        let container = Container::new(&network, ONE).await;
        let listener = outside.listen(80);
        converse(
            &listener,
            &mut container.namespace.connect(OUTSIDE, 80).unwrap(),
        );
        network.close().await;
        assert_eq!(run("nft", "--stateless list table ip filter"), before);
    });
}

#[test]
fn an_adopted_container_of_an_earlier_pool_keeps_its_way_out() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        drop(network);
        let config = NetworkConfig {
            pool: ([10, 9, 8, 0].into(), 24),
            ..NetworkConfig::default()
        };
        let network = Network::open(&config).await.unwrap();
        network.adopt_lease(&container.lease).unwrap();
        let live = [attached(ONE, &container.lease, &[])];
        network.rebuild(&live).await.unwrap();
        let listener = outside.listen(80);
        let mut client = container.namespace.connect(OUTSIDE, 80).unwrap();
        let server = converse(&listener, &mut client);
        assert_eq!(server.peer_addr().unwrap().ip(), HOST);
    });
}

#[test]
fn close_leaves_the_host_as_the_first_agent_found_it() {
    on_host(|| async {
        sysctl::write("ipv4/ip_forward", "0").unwrap();
        // Does not even make the empty tables of either iptables.
        let before = ruleset() + &links();
        let first = open().await;
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "1");
        drop(first);
        open().await.close().await;
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
        assert_eq!(ruleset() + &links(), before);
        let legacy = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names");
        assert_eq!(legacy.unwrap_or_default(), "");
        // Where it was on, it stays on.
        sysctl::write("ipv4/ip_forward", "1").unwrap();
        open().await.close().await;
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "1");
    });
}

#[test]
fn forwarding_stays_on_for_those_who_came_to_need_it() {
    let docker: [&[(&'static str, &str)]; 3] = [
        &[("iptables-nft", "-P FORWARD DROP")],
        &[
            ("iptables-legacy", "-N DOCKER"),
            ("iptables-legacy", "-A FORWARD -o docker0 -j DOCKER"),
        ],
        &[
            ("nft", "add table ip docker-bridges"),
            (
                "nft",
                "add chain ip docker-bridges fw { type filter hook forward priority 0 ; }",
            ),
            (
                "nft",
                "add rule ip docker-bridges fw oifname docker0 accept",
            ),
        ],
    ];
    for commands in docker {
        on_host(|| async {
            sysctl::write("ipv4/ip_forward", "0").unwrap();
            // These were here before us, and nothing was forwarded.
            run("iptables-nft", "-t mangle -P FORWARD DROP");
            run("nft", "add table inet filter");
            let chain = "forward { type filter hook forward priority 0 ; policy drop ; }";
            run("nft", &format!("add chain inet filter {chain}"));
            open().await.close().await;
            assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
            drop(open().await);
            for (program, arguments) in commands {
                run(program, arguments);
            }
            open().await.close().await;
            assert_eq!(
                sysctl::read("ipv4/ip_forward").unwrap(),
                "1",
                "{commands:?}"
            );
            assert!(!ruleset().contains("ostler"));
        });
    }
}

#[test]
fn forwarding_stays_on_for_those_who_joined_a_chain_that_was_there() {
    for program in ["iptables-nft", "iptables-legacy"] {
        on_host(|| async {
            sysctl::write("ipv4/ip_forward", "0").unwrap();
            run(program, "-P FORWARD DROP");
            run(program, "-A FORWARD -i eth9 -j DROP");
            open().await.close().await;
            // Our own accepts were no reason.
            assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
            drop(open().await);
            run(program, "-I FORWARD -i virbr0 -j ACCEPT");
            open().await.close().await;
            assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "1", "{program}");
        });
    }
}

#[test]
fn notes_of_an_older_agent_have_no_numbers() {
    on_host(|| async {
        run("iptables-nft", "-P FORWARD DROP");
        run("nft", "add table inet ostler");
        for note in ["ip_forward_was_off", "found/2/filter/FORWARD"] {
            run("nft", &format!("add chain inet ostler {note}"));
        }
        open().await.close().await;
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
    });
}

#[test]
fn what_lives_notices_neither_a_new_agent_nor_a_rebuild() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let listener = container.namespace.listen(8080);
        let ports = vec![(network.take_port().unwrap(), 8080)];
        network.map_port(ONE, ports[0].0, 8080).await.unwrap();
        let mut client = outside.connect(HOST, ports[0].0).unwrap();
        let mut server = converse(&listener, &mut client);
        // Datagrams in both directions, one at a time and never repeated: a single drop shows.
        let far = outside.datagrams(OUTSIDE, 9000);
        let near = container.namespace.datagrams(container.lease.container, 0);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let traffic = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Relaxed) {
                near.send_to(b"near", (OUTSIDE, 9000)).unwrap();
                let (_, from) = received(&far);
                far.send_to(b"far", from).unwrap();
                assert_eq!(received(&near).0, "far");
                rounds += 1;
            }
            rounds
        });
        drop(network);
        let live = [attached(ONE, &container.lease, &ports)];
        for _ in 0..5 {
            let network = open().await;
            // Also new connections, and also before the rebuild.
            converse(
                &listener,
                &mut outside.connect(HOST, live[0].ports[0].0).unwrap(),
            );
            network.rebuild(&live).await.unwrap();
            exchange(&mut client, &mut server);
            converse(
                &listener,
                &mut outside.connect(HOST, live[0].ports[0].0).unwrap(),
            );
        }
        stop.store(true, Ordering::Relaxed);
        let rounds = traffic.join().unwrap();
        assert!(rounds > 5, "{rounds}");
    });
}

#[test]
fn a_rebuild_leaves_the_living_alone_and_nothing_else() {
    on_host(|| async {
        let network = open().await;
        let _one = Container::new(&network, ONE).await;
        let two = Container::new(&network, TWO).await;
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        network.map_port(TWO, 61_002, 8080).await.unwrap();
        run("nft", "add rule inet ostler input accept");
        let live = [attached(TWO, &two.lease, &[(61_002, 8080)])];
        network.rebuild(&live).await.unwrap();
        let rebuilt = ruleset();
        assert!(
            rebuilt.contains(&format!("\"os-{TWO}\" . 10.254.0.6")),
            "{rebuilt}"
        );
        assert!(rebuilt.contains("61002 : 10.254.0.6 . 8080"), "{rebuilt}");
        assert!(
            !rebuilt.contains(ONE) && !rebuilt.contains("61001"),
            "{rebuilt}"
        );
        // The same elements as netlink adds, and the same rules as a first agent's.
        network
            .detach(&attached(TWO, &two.lease, &live[0].ports))
            .await;
        let emptied = ruleset();
        assert!(!emptied.contains("elements"), "{emptied}");
        network.close().await;
        let _fresh = open().await;
        assert_eq!(ruleset(), emptied);
    });
}

#[test]
fn detaching_twice_or_what_is_half_there_succeeds() {
    on_host(|| async {
        let network = open().await;
        let empty = ruleset();
        let container = Container::new(&network, ONE).await;
        let ports = [(61_001, 8080), (61_002, 8081), (61_003, 8082)];
        for (outer, inner) in [ports[0], ports[2]] {
            network.map_port(ONE, outer, inner).await.unwrap();
        }
        network
            .detach(&attached(ONE, &container.lease, &ports))
            .await;
        assert_eq!(ruleset(), empty);
        network
            .detach(&attached(ONE, &container.lease, &ports))
            .await;
        assert_eq!(ruleset(), empty);
        network.close().await;
        network
            .detach(&attached(ONE, &container.lease, &ports))
            .await;
        assert!(network.map_port(ONE, 61_001, 8080).await.is_err());
        drop(container);
        gone(ONE);
    });
}

#[test]
fn what_a_refused_detach_leaves_goes_soon() {
    on_host(|| async {
        let network = open().await;
        network.rebuild(&[]).await.unwrap();
        // The load itself is looked at.
        a_while().await;
        let empty = ruleset();
        let container = Container::new(&network, ONE).await;
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        // Nobody names the port, but it is known.
        network.detach(&attached(ONE, &container.lease, &[])).await;
        assert_eq!(ruleset(), empty);
        let container = Container::new(&network, TWO).await;
        network.map_port(TWO, 61_001, 8080).await.unwrap();
        // More than the kernel takes in one message.
        let too_many: Vec<_> = (10_000..30_000).map(|port| (port, 80)).collect();
        network
            .detach(&attached(TWO, &container.lease, &too_many))
            .await;
        eventually("nothing is left", || ruleset() == empty).await;
    });
}

#[test]
fn a_flushed_table_comes_back_with_what_is_attached() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let (inner, outer) = (container.namespace.listen(8080), outside.listen(80));
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        let before = ruleset();
        run("nft", "flush ruleset");
        eventually("the table is back", || ruleset() == before).await;
        converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
        converse(
            &outer,
            &mut container.namespace.connect(OUTSIDE, 80).unwrap(),
        );
        network
            .detach(&attached(ONE, &container.lease, &[(61_001, 8080)]))
            .await;
        run("nft", "flush ruleset");
        eventually("the table is back", || ruleset().contains("ostler")).await;
        assert!(!ruleset().contains("elements"), "{}", ruleset());
    });
}

/// From here on mounts of this thread, and of those that begin on it, are its own.
fn mount_for_ourselves() {
    use nix::sched::{CloneFlags, unshare};
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(none, "/", none, private, none).unwrap();
}

/// The first directory in which programs are looked for.
const PROGRAMS: &str = "/usr/local/sbin";

/// A shell script takes the place of `nft`, and ends with it.
fn before_nft(script: &str) {
    use std::os::unix::fs::PermissionsExt;
    mount_for_ourselves();
    let none = None::<&str>;
    mount(none, PROGRAMS, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let (path, script) = (
        format!("{PROGRAMS}/nft"),
        format!("#!/bin/sh\ncd {PROGRAMS}\n{script}\nexec /usr/sbin/nft \"$@\"\n"),
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

#[test]
fn elements_of_rules_do_not_go_through_nft() {
    on_host(|| async {
        before_nft("[ \"$1\" = -f ] && { cat > text; exec /usr/sbin/nft -f text; }");
        let network = open().await;
        let rule = super::EgressRule {
            destination: (OUTSIDE, OUTSIDE),
            traffic: super::Traffic::All,
            log: false,
        };
        let with_rules = |attached: &mut super::Attached| attached.egress = vec![rule];
        let _one = Container::with(&network, ONE, with_rules).await;
        let _two = Container::new(&network, TWO).await;
        let before = ruleset();
        run("nft", "flush ruleset");
        eventually("the table is back", || ruleset() == before).await;
        let text = std::fs::read_to_string(format!("{PROGRAMS}/text")).unwrap();
        // What they are cut off without comes with the rules.
        assert!(text.contains("add element inet ostler sources"), "{text}");
        assert!(text.contains("add element inet ostler open"), "{text}");
        assert!(!text.contains("element inet ostler hosts"), "{text}");
    });
}

/// The table of an agent that had the two parts of a source the other way round.
fn turn_sources_round(handle: &str, address: Ipv4Addr) {
    let table = run("nft", "list table inet ostler")
        .replace("type ifname . ipv4_addr", "type ipv4_addr . ifname")
        .replace(
            &format!("\"os-{handle}\" . {address}"),
            &format!("{address} . \"os-{handle}\""),
        )
        .replace("iifname . ip saddr", "ip saddr . iifname");
    // What `nft` cannot read again of its own listing looks prefixes up; there are none here.
    let lines = table.lines().filter(|line| !line.contains(" | "));
    let table: String = lines.flat_map(|line| [line, "\n"]).collect();
    let script = format!("delete table inet ostler\n{table}");
    super::program::run("nft", &["-f", "-"], &script).unwrap();
}

#[test]
fn what_lives_does_not_notice_that_an_older_table_is_replaced() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let address = container.lease.container;
        drop(network);
        turn_sources_round(ONE, address);
        let far = outside.datagrams(OUTSIDE, 9000);
        let near = container.namespace.datagrams(address, 0);
        let said = |word: &[u8]| {
            near.send_to(word, (OUTSIDE, 9000)).unwrap();
            received(&far).0.into_bytes() == word
        };
        assert!(said(b"by the old"));
        let network = open().await;
        assert!(said(b"by the old still"));
        let older = run("nft", "list set inet ostler sources");
        assert!(older.contains("ipv4_addr . ifname"), "{older}");
        let live = [attached(ONE, &container.lease, &[])];
        network.rebuild(&live).await.unwrap();
        assert!(said(b"by the new"));
        let newer = run("nft", "list set inet ostler sources");
        assert!(newer.contains("ifname . ipv4_addr"), "{newer}");
    });
}

#[test]
fn what_is_taken_away_right_after_the_load_is_put_back() {
    on_host(|| async {
        before_nft(
            "[ \"$1\" = -f ] && rm once 2>/dev/null && {\n\
             /usr/sbin/nft \"$@\" && exec /usr/sbin/nft delete chain inet ostler nat_post\n}",
        );
        File::create(format!("{PROGRAMS}/once")).unwrap();
        let _network = open().await;
        assert!(!std::fs::exists(format!("{PROGRAMS}/once")).unwrap());
        let whole = ruleset();
        assert!(whole.contains("nat_post"), "{whole}");
    });
}

#[test]
fn what_could_not_be_mended_is_tried_again() {
    const SETTING: &str = "/proc/sys/net/ipv4/ip_forward";
    on_host(|| async {
        mount_for_ourselves();
        let (none, _network) = (None::<&str>, open().await);
        sysctl::write("ipv4/ip_forward", "0").unwrap();
        mount(Some(SETTING), SETTING, none, MsFlags::MS_BIND, none).unwrap();
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(none, SETTING, none, read_only, none).unwrap();
        sysctl::write("ipv4/ip_forward", "1").unwrap_err();
        run("nft", "flush ruleset");
        eventually("the table is back", || ruleset().contains("ostler")).await;
        // Whatever there was to be noticed has been.
        a_while().await;
        umount2(SETTING, MntFlags::MNT_DETACH).unwrap();
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
        let on = || sysctl::read("ipv4/ip_forward").unwrap() == "1";
        eventually("forwarding is on", on).await;
    });
}

#[test]
fn a_mapping_brings_a_table_back_that_is_gone() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let inner = container.namespace.listen(8080);
        run("nft", "flush ruleset");
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
        run("nft", "flush ruleset");
        let _other = Container::new(&network, TWO).await;
        converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
        let unknown = network.map_port("0000000000c", 61_002, 80);
        assert!(matches!(unknown.await, Err(NetworkError::Detached(_))));
    });
}

#[test]
fn a_forward_chain_that_begins_to_drop_is_noticed() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let outer = outside.listen(80);
        // As Docker does at its start. Somebody has switched forwarding off, too.
        sysctl::write("ipv4/ip_forward", "0").unwrap();
        run("iptables-nft", "-P FORWARD DROP");
        eventually("accepted", || {
            run("iptables-nft", "-S").contains("-A FORWARD -i os-+")
        })
        .await;
        run("iptables-nft", "-N DOCKER-USER");
        run("iptables-nft", "-I FORWARD -j DOCKER-USER");
        let moved = || {
            let rules = run("iptables-nft", "-S");
            rules.contains("-A DOCKER-USER -o os-+") && !rules.contains("-A FORWARD -i os-+")
        };
        eventually("accepted where Docker lets alone", moved).await;
        converse(
            &outer,
            &mut container.namespace.connect(OUTSIDE, 80).unwrap(),
        );
    });
}

#[test]
fn rules_that_somebody_removes_are_put_back_and_then_it_is_quiet() {
    on_host(|| async {
        let (_network, before) = (open().await, ruleset());
        run("nft", "flush chain inet ostler forward");
        eventually("the chain is whole", || ruleset() == before).await;
        run("iptables-nft", "-P FORWARD DROP");
        let accepted = |chain: &str| {
            let rules = run("iptables-nft", "-S");
            rules.contains(&format!("-A {chain} -i os-+"))
                && rules.contains(&format!("-A {chain} -o os-+"))
        };
        eventually("accepted", || accepted("FORWARD")).await;
        let accept = "-D FORWARD -i os-+ -m comment --comment ostler -j ACCEPT";
        run("iptables-nft", accept);
        eventually("accepted again", || accepted("FORWARD")).await;
        run("iptables-nft", "-N DOCKER-USER");
        run("iptables-nft", "-I FORWARD -j DOCKER-USER");
        eventually("accepted elsewhere", || accepted("DOCKER-USER")).await;
        run("iptables-nft", "-F DOCKER-USER");
        eventually("accepted there again", || accepted("DOCKER-USER")).await;
        // What was done to mend it is no news that leads to more.
        a_while().await;
        let numbered = || listed("--handle list ruleset");
        let settled = numbered();
        a_while().await;
        a_while().await;
        assert_eq!(numbered(), settled);
    });
}

#[test]
fn elements_that_somebody_takes_out_are_put_back() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let container = Container::new(&network, ONE).await;
        let (inner, outer) = (container.namespace.listen(8080), outside.listen(80));
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        // What was loaded is looked at.
        a_while().await;
        let before = ruleset();
        let own = container.lease.container;
        for change in [
            "flush set inet ostler sources",
            "flush map inet ostler ports",
            &format!("delete element inet ostler open {{ {own} }}"),
        ] {
            run("nft", change);
            eventually(change, || ruleset() == before).await;
            // What was put back is looked at.
            a_while().await;
        }
        converse(&inner, &mut outside.connect(HOST, 61_001).unwrap());
        converse(
            &outer,
            &mut container.namespace.connect(OUTSIDE, 80).unwrap(),
        );
    });
}

#[test]
fn a_table_that_is_right_is_not_written() {
    on_host(|| async {
        let network = open().await;
        // Numbers of rules are never used twice.
        let numbered = || listed("--handle list table inet ostler");
        let before = numbered();
        let container = Container::new(&network, ONE).await;
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        network
            .detach(&attached(ONE, &container.lease, &[(61_001, 8080)]))
            .await;
        run("nft", "add table ip other");
        let chain = "forward { type filter hook forward priority 0 ; }";
        run("nft", &format!("add chain ip other {chain}"));
        a_while().await;
        assert_eq!(numbered(), before);
    });
}

#[test]
fn a_rebuilt_table_is_mended_to_exactly_what_lives() {
    on_host(|| async {
        let network = open().await;
        let container = Container::new(&network, ONE).await;
        let live = [attached(ONE, &container.lease, &[(61_001, 8080)])];
        network.rebuild(&live).await.unwrap();
        // In which order the chains were made means nothing.
        let lines = || {
            let mut lines: Vec<_> = ruleset().lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let before = lines();
        run(
            "nft",
            "add element inet ostler ports { 61009 : 10.254.0.6 . 80 }",
        );
        run("nft", "delete chain inet ostler nat_post");
        eventually("as it was", || lines() == before).await;
    });
}

#[test]
fn a_network_that_is_closed_or_gone_mends_nothing() {
    on_host(|| async {
        let watching = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let name = |task: io::Result<std::fs::DirEntry>| {
                std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
            };
            tasks.filter_map(name).any(|name| name == "nftables\n")
        };
        let network = open().await;
        eventually("the thread runs", watching).await;
        network.close().await;
        a_while().await;
        assert!(!ruleset().contains("ostler"));
        drop(network);
        eventually("the thread ends", || !watching()).await;
        drop(open().await);
        eventually("the thread ends", || !watching()).await;
        run("nft", "flush ruleset");
        a_while().await;
        assert_eq!(ruleset(), "");
    });
}

/// A transaction for which the kernel makes all others wait.
fn large_transaction(rules: usize) {
    let rules = "add rule inet other c tcp dport 80 counter accept\n".repeat(rules);
    let script = format!("add table inet other\nadd chain inet other c\n{rules}");
    super::program::run("nft", &["-f", "-"], &script).unwrap();
}

/// How long the slowest mapping took while somebody's transaction ran, and how often another task went on
/// meanwhile.
async fn slowest_mapping(network: &Network, rules: usize) -> (Duration, u32) {
    let ticks = Cell::new(0);
    let here = File::open("/proc/thread-self/ns/net").unwrap();
    let large = std::thread::spawn(move || {
        Namespace(here.into()).inside(|| large_transaction(rules));
    });
    let ticking = async {
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        loop {
            tick.tick().await;
            ticks.set(ticks.get() + 1);
        }
    };
    let mapping = async {
        let mut slowest = (Duration::ZERO, 0);
        while !large.is_finished() {
            let (begun, before) = (std::time::Instant::now(), ticks.get());
            network.map_port(ONE, 61_001, 8080).await.unwrap();
            slowest = slowest.max((begun.elapsed(), ticks.get() - before));
            tokio::task::yield_now().await;
        }
        slowest
    };
    let slowest = tokio::select! {
        () = ticking => (Duration::ZERO, 0),
        slowest = mapping => slowest,
    };
    large.join().unwrap();
    slowest
}

#[test]
fn a_large_transaction_of_others_delays_one_mapping_and_no_task() {
    on_host(|| async {
        let network = open().await;
        let _container = Container::new(&network, ONE).await;
        // How large is large depends on the machine.
        let mut slowest = (Duration::ZERO, 0);
        for rules in [10_000, 40_000, 80_000, 160_000] {
            slowest = slowest_mapping(&network, rules).await;
            if slowest.1 > 5 {
                return;
            }
        }
        panic!("no mapping was delayed, or other tasks were too: {slowest:?}");
    });
}

#[test]
fn an_attach_that_fails_leaves_nothing_and_harms_nobody() {
    on_host(|| async {
        let network = open().await;
        let container = Container::new(&network, ONE).await;
        let before = ruleset() + &links();
        let other = Namespace::new();
        let again = network
            .attach(attached(ONE, &container.lease, &[]), other.0.as_fd())
            .await
            .unwrap_err();
        assert!(
            matches!(&again, NetworkError::Link { doing: "make", .. }),
            "{again}"
        );
        assert!(again.to_string().contains(&format!("os-{ONE}")), "{again}");
        let lease = network.reserve().unwrap().0;
        let file = File::open("/dev/null").unwrap();
        network
            .attach(attached(TWO, &lease, &[]), file.as_fd())
            .await
            .unwrap_err();
        assert_eq!(ruleset() + &links(), before);
        // The last step fails: those before it are undone.
        network.close().await;
        network
            .attach(attached(TWO, &lease, &[]), other.0.as_fd())
            .await
            .unwrap_err();
        assert!(!links().contains(TWO));
        other.inside(|| assert!(!links().contains("eth0")));
    });
}

#[test]
fn a_link_of_a_dead_container_goes_also_where_its_namespace_is_held() {
    on_host(|| async {
        let network = open().await;
        let one = Container::new(&network, ONE).await;
        let _two = Container::new(&network, TWO).await;
        network.detach(&attached(ONE, &one.lease, &[])).await;
        network.release(one.lease.clone());
        network.see_off(ONE);
        // Nobody.
        network.see_off("0000000000c");
        let there = |handle| ip("link").contains(&format!("os-{handle}"));
        eventually("it is gone", || !there(ONE)).await;
        assert!(there(TWO));
    });
}

#[test]
fn links_of_nobody_are_swept() {
    on_host(|| async {
        let network = open().await;
        let _one = Container::new(&network, ONE).await;
        let _two = Container::new(&network, TWO).await;
        ip("link add os-br0 type veth peer name other");
        ip("link add os-0000000000c type bridge");
        let known = HashSet::from([ONE.to_owned()]);
        assert_eq!(network.sweep_links(&known).await.unwrap(), 1);
        assert_eq!(network.sweep_links(&known).await.unwrap(), 0);
        let links = links();
        assert!(!links.contains(TWO), "{links}");
        for kept in [ONE, "os-br0", "os-0000000000c"] {
            assert!(links.contains(kept), "{links}");
        }
    });
}

#[test]
fn a_table_of_another_layout_is_replaced() {
    on_host(|| async {
        run("nft", "add table inet ostler");
        run(
            "nft",
            "add map inet ostler ports { type inet_service : ipv4_addr ; }",
        );
        run(
            "nft",
            "add chain inet ostler forward { type filter hook forward priority 7 ; }",
        );
        // What the older agent noted is not forgotten with its table.
        run("nft", "add chain inet ostler ip_forward_was_off");
        sysctl::write("ipv4/ip_forward", "1").unwrap();
        let older = run("nft", "list table inet ostler");
        let network = open().await;
        assert_eq!(run("nft", "list table inet ostler"), older);
        network.rebuild(&[]).await.unwrap();
        let replaced = ruleset();
        assert!(replaced.contains("ip_forward_was_off"), "{replaced}");
        assert!(replaced.contains("ipv4_addr . inet_service"), "{replaced}");
        network.close().await;
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
        let _network = open().await;
        assert_eq!(ruleset(), replaced);
    });
}

#[test]
fn a_chain_of_an_older_layout_goes_with_the_rebuild() {
    on_host(|| async {
        let fresh = open().await;
        let usual = ruleset();
        drop(fresh);
        let chain = "older { type filter hook forward priority 7 ; }";
        run("nft", &format!("add chain inet ostler {chain}"));
        let numbered = || listed("--handle list table inet ostler");
        let network = open().await;
        let loaded = numbered();
        a_while().await;
        assert_eq!(numbered(), loaded, "it is so");
        network.rebuild(&[]).await.unwrap();
        eventually("only what shall be", || ruleset() == usual).await;
    });
}

#[test]
fn addresses_and_ports_are_given_out_once() {
    on_host(|| async {
        let config = NetworkConfig {
            pool: ([10, 9, 8, 0].into(), 29),
            ports: 65_534..=65_535,
            port_quarantine: Duration::ZERO,
            ..NetworkConfig::default()
        };
        let network = Network::open(&config).await.unwrap();
        let second = Lease {
            host: [10, 9, 8, 5].into(),
            container: [10, 9, 8, 6].into(),
            prefix: 30,
        };
        network.adopt_lease(&second).unwrap();
        let taken = network.adopt_lease(&second).unwrap_err();
        assert_eq!(taken.to_string(), "\"10.9.8.6\" is in use already");
        let (lease, port) = network.reserve().unwrap();
        assert_eq!(
            (lease.container, port),
            (Ipv4Addr::new(10, 9, 8, 2), 65_534)
        );
        network.release(second);
        let empty = network.reserve().unwrap_err().to_string();
        assert_eq!(
            empty,
            "no free address: 1 in use, 1 resting; a larger network pool has more"
        );
        network.adopt_port(65_534).unwrap_err();
        network.adopt_port(80).unwrap();
        assert_eq!(network.take_port().unwrap(), 65_535);
        assert!(matches!(
            network.take_port(),
            Err(NetworkError::NoPort {
                in_use: 3,
                resting: 0
            })
        ));
        network.release_port(80);
        network.release_port(65_534);
        assert_eq!(network.take_port().unwrap(), 65_534);
    });
}

/// A directory that goes when the test ends, however it ends.
struct Goes(std::path::PathBuf);

impl Goes {
    fn new(name: &str) -> Self {
        let name = format!("ostler-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Goes {
    fn drop(&mut self) {
        let _gone_already = std::fs::remove_dir_all(&self.0);
    }
}

/// Waits until it is kept that these ports rest.
async fn kept(path: &std::path::Path, ports: &[u16]) {
    eventually("it is kept", || {
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        let rests = |port| {
            kept.lines()
                .any(|line| line.starts_with(&format!("{port} ")))
        };
        ports.iter().all(rests)
    })
    .await;
}

#[test]
fn what_rests_is_not_given_out_by_the_next_agent() {
    on_host(|| async {
        let mut scenes = 0;
        let (_directory, mut config, network, more) = loop {
            let directory = Goes::new(&format!("rests-{scenes}"));
            let path = directory.0.join("pools");
            let config = NetworkConfig {
                pool: ([10, 9, 8, 0].into(), 29),
                ports: 61_001..=61_003,
                standing: Some(path.clone()),
                ..NetworkConfig::default()
            };
            let network = Network::open(&config).await.unwrap();
            let leases = [(); 2].map(|()| network.reserve().unwrap());
            let more = network.take_port().unwrap();
            let released = Instant::now();
            // All were used: the one behind the last has come back last.
            for (lease, port) in leases.clone() {
                network.release(lease);
                network.release_port(port);
            }
            kept(&path, &leases.map(|(_, port)| port)).await;
            drop(network);
            let network = Network::open(&config).await.unwrap();
            let refused = network.reserve();
            // Whole seconds are kept: addresses rest for at least four.
            scenes += 1;
            if released.elapsed() >= Duration::from_secs(4) && scenes < 10 {
                continue;
            }
            assert!(
                matches!(refused, Err(NetworkError::NoAddress { resting: 2, .. })),
                "{refused:?}"
            );
            break (directory, config, network, more);
        };
        assert_eq!(network.take_port().unwrap(), more);
        assert!(matches!(
            network.take_port(),
            Err(NetworkError::NoPort { resting: 2, .. })
        ));
        // Who comes back with one has it.
        network
            .adopt_port(if more == 61_001 { 61_002 } else { 61_001 })
            .unwrap();
        drop(network);
        config.port_quarantine = Duration::ZERO;
        let network = Network::open(&config).await.unwrap();
        network.take_port().unwrap();
        network.close().await;
    });
}

#[test]
fn a_slow_disk_delays_nobody() {
    on_host(|| async {
        let directory = Goes::new("slow");
        let (path, new) = (directory.0.join("pools"), directory.0.join("pools.new"));
        let config = NetworkConfig {
            standing: Some(path.clone()),
            ..NetworkConfig::default()
        };
        let network = Network::open(&config).await.unwrap();
        // Opening it to write waits for a reader.
        nix::unistd::mkfifo(&new, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let ports: Vec<_> = (0..100).map(|_| network.reserve().unwrap().1).collect();
        for port in &ports {
            network.release_port(*port);
        }
        let first = std::fs::read_to_string(&new).unwrap();
        assert!(first.lines().count() <= 101, "{first}");
        // In the place of what was written into the first one.
        network.take_port().unwrap();
        eventually("a file is there", || path.is_file()).await;
        kept(&path, &ports).await;
        network.close().await;
        // They rest also for the next agent, and what comes now is of no interest.
        let last = std::fs::read_to_string(&path).unwrap();
        network.reserve().unwrap();
        a_while().await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), last);
        assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 1);
    });
}

#[test]
fn what_was_just_released_is_not_given_out_by_the_next_agent() {
    on_host(|| async {
        let directory = Goes::new("pools");
        let path = directory.0.join("pools");
        let config = NetworkConfig {
            pool: ([10, 9, 8, 0].into(), 28),
            ports: 61_001..=61_004,
            standing: Some(path.clone()),
            ..NetworkConfig::default()
        };
        let mut seen = Vec::new();
        for _agent in 0..3 {
            let network = Network::open(&config).await.unwrap();
            let (lease, port) = network.reserve().unwrap();
            network.release(lease.clone());
            network.release_port(port);
            kept(&path, &[port]).await;
            seen.push((lease.container, port));
        }
        let fresh: HashSet<_> = seen.iter().map(|(address, _)| address).collect();
        assert_eq!(fresh.len(), 3, "{seen:?}");
        let fresh: HashSet<_> = seen.iter().map(|(_, port)| port).collect();
        assert_eq!(fresh.len(), 3, "{seen:?}");
        // Garbage, or what another configuration has left: somewhere.
        for garbage in ["", "no address 1\n", "192.0.2.7 61003           \n"] {
            std::fs::write(&path, garbage).unwrap();
            let network = Network::open(&config).await.unwrap();
            let (lease, port) = network.reserve().unwrap();
            assert!(config.ports.contains(&port), "{port}");
            assert_eq!(lease.container.octets()[..3], [10, 9, 8], "{lease:?}");
            let new = || std::fs::read_to_string(&path).unwrap() != garbage;
            eventually("it is kept", new).await;
        }
        Network::open(&config).await.unwrap().close().await;
        assert!(!path.exists(), "nothing rests");
        // An agent that is told to end has the last word.
        let network = Network::open(&config).await.unwrap();
        let (_, port) = network.reserve().unwrap();
        network.release_port(port);
        network.close().await;
        kept(&path, &[port]).await;
    });
}

#[test]
fn a_host_with_nothing_but_loopback_will_do() {
    on_host(|| async {
        let network = open().await;
        assert_eq!(
            (network.local_ip(), network.mtu()),
            (Ipv4Addr::LOCALHOST, 1500)
        );
        let container = Container::new(&network, ONE).await;
        let listener = container.namespace.listen(8080);
        network.map_port(ONE, 61_001, 8080).await.unwrap();
        converse(&listener, &mut connect(network.local_ip(), 61_001).unwrap());
    });
}

#[test]
fn a_host_that_gets_its_address_later_is_known_by_it() {
    on_host(|| async {
        let network = open().await;
        assert_eq!(network.local_ip(), Ipv4Addr::LOCALHOST);
        // Docker's, before there is a way out.
        ip("link add docker0 type bridge");
        ip("addr add 172.17.0.1/16 dev docker0");
        let is = |address: [u8; 4]| {
            let network = &network;
            move || network.local_ip() == Ipv4Addr::from(address)
        };
        eventually("known by what it has", is([172, 17, 0, 1])).await;
        ip("link add wan type bridge");
        ip("link set wan mtu 1400 up");
        ip("addr add 198.51.100.7/24 dev wan");
        a_while().await;
        ip("route add default via 198.51.100.1");
        eventually("known by what leads out", is([198, 51, 100, 7])).await;
        assert_eq!(network.mtu(), 1400);
        // Another lease.
        ip("addr add 198.51.100.8/24 dev wan");
        a_while().await;
        assert_eq!(network.local_ip(), Ipv4Addr::from([198, 51, 100, 7]));
        ip("addr flush dev wan");
        a_while().await;
        assert_eq!(network.local_ip(), Ipv4Addr::from([198, 51, 100, 7]));
        ip("addr add 198.51.100.8/24 dev wan");
        ip("route replace default via 198.51.100.1");
        eventually("known by the other", is([198, 51, 100, 8])).await;
    });
}

#[test]
fn the_local_address_is_the_one_that_leads_out() {
    on_host(|| async {
        let _outside = outside();
        ip("link set up0 mtu 1400");
        let network = open().await;
        assert_eq!((network.local_ip(), network.mtu()), (HOST, 1400));
        let container = Container::new(&network, ONE).await;
        container
            .namespace
            .inside(|| assert!(ip("link show eth0").contains("mtu 1400")));
        ip("addr add 192.0.2.9/24 dev up0");
        ip(&format!("route add default via {OUTSIDE} src 192.0.2.9"));
        // Others know it by an address that is translated on the way.
        let floating = NetworkConfig {
            local_ip: Some([198, 51, 100, 77].into()),
            ..NetworkConfig::default()
        };
        assert_eq!(Network::open(&floating).await.unwrap().mtu(), 1400);
        // The containers' own links are no reason to refuse the pool, nor an address of the host.
        assert_eq!(open().await.local_ip(), Ipv4Addr::new(192, 0, 2, 9));
        ip("addr add 10.254.3.1/16 dev up0");
        let refused = Network::open(&NetworkConfig::default()).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "network pool \"10.254.0.0/22\" contains \"10.254.3.1\" of \"up0\": choose another pool"
        );
    });
}
