//! What containers may reach outside, and on the host where something is allowed there, with packets.

use super::testbed::{
    Container, DEADLINE, HOST, Namespace, OUTSIDE, assert_rejected, attached, connect, converse,
    listed, listen, on_host, open, outside, received, run,
};
use super::{
    Attached, EgressRule, HostService, Network, NetworkConfig, Posture, Traffic, Transport,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::time::Instant;

const ONE: &str = "0000000000a";
const TWO: &str = "0000000000b";
/// Another address of the host outside.
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 130);

fn rule(first: Ipv4Addr, last: Ipv4Addr, traffic: Traffic) -> EgressRule {
    EgressRule {
        destination: (first, last),
        traffic,
        log: false,
    }
}

fn everywhere(traffic: Traffic) -> EgressRule {
    rule(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, traffic)
}

fn with(rules: &[EgressRule]) -> impl FnOnce(&mut Attached) {
    |attached| attached.egress = rules.to_vec()
}

/// A host outside that has two addresses and listens on some ports.
fn listening(ports: &[u16]) -> (Namespace, Vec<TcpListener>) {
    let outside = outside();
    outside.inside(|| run("ip", &format!("addr add {OTHER}/24 dev uplink")));
    let listeners = ports.iter().map(|port| outside.listen(*port)).collect();
    (outside, listeners)
}

/// Addresses and ports that could be connected to.
type Reached = Vec<(Ipv4Addr, u16)>;

/// Tries each address and port, and tells which connected. The others were rejected.
fn reached(container: &Container) -> Reached {
    let mut reached = Vec::new();
    for address in [OUTSIDE, OTHER] {
        for port in [80, 81, 443] {
            match container.namespace.connect(address, port) {
                Ok(_) => reached.push((address, port)),
                refused => assert_rejected(refused),
            }
        }
    }
    reached
}

const ALL: [(Ipv4Addr, u16); 6] = [
    (OUTSIDE, 80),
    (OUTSIDE, 81),
    (OUTSIDE, 443),
    (OTHER, 80),
    (OTHER, 81),
    (OTHER, 443),
];

async fn opened(how: impl FnOnce(&mut NetworkConfig)) -> Network {
    let mut config = NetworkConfig::default();
    how(&mut config);
    Network::open(&config).await.unwrap()
}

#[test]
fn bridges_that_docker_could_have_made_are_others_networks() {
    on_host(|| async {
        let (_outside, _listeners) = listening(&[80]);
        for to in [
            "link add br-0123456789ab type bridge",
            "link set br-0123456789ab up",
            "link set up0 master br-0123456789ab",
            "addr flush dev up0",
            "addr add 192.0.2.1/24 dev br-0123456789ab",
            "addr add 203.0.113.1/32 dev lo",
        ] {
            run("ip", to);
        }
        let at =
            |address: Ipv4Addr| move |config: &mut NetworkConfig| config.local_ip = Some(address);
        let network = opened(at([203, 0, 113, 1].into())).await;
        let container = Container::new(&network, ONE).await;
        assert_rejected(container.namespace.connect(OUTSIDE, 80));
        // Not where it is the host's own way out.
        let network = opened(at(HOST)).await;
        assert!(container.namespace.connect(OUTSIDE, 80).is_ok());
        drop(network);
        // Nor where it is the way to the world.
        run("ip", &format!("route add default via {OUTSIDE}"));
        let _network = opened(at([203, 0, 113, 1].into())).await;
        assert!(container.namespace.connect(OUTSIDE, 80).is_ok());
    });
}

/// Rules, and what is reached by them.
fn cases() -> Vec<(Vec<EgressRule>, Reached)> {
    vec![
        (
            vec![rule(OUTSIDE, OUTSIDE, Traffic::Tcp(vec![(80, 80)]))],
            vec![(OUTSIDE, 80)],
        ),
        (
            vec![everywhere(Traffic::Tcp(vec![(80, 81)]))],
            vec![(OUTSIDE, 80), (OUTSIDE, 81), (OTHER, 80), (OTHER, 81)],
        ),
        // Two that overlap in part, in addresses and in ports.
        (
            vec![
                rule(
                    [192, 0, 2, 0].into(),
                    [192, 0, 2, 130].into(),
                    Traffic::Tcp(vec![(1, 80), (443, 443)]),
                ),
                rule(
                    [192, 0, 2, 128].into(),
                    [192, 0, 3, 9].into(),
                    Traffic::Tcp(vec![(80, 81)]),
                ),
            ],
            vec![
                (OUTSIDE, 80),
                (OUTSIDE, 443),
                (OTHER, 80),
                (OTHER, 81),
                (OTHER, 443),
            ],
        ),
        (
            vec![rule(OTHER, OTHER, Traffic::All)],
            vec![(OTHER, 80), (OTHER, 81), (OTHER, 443)],
        ),
        (vec![everywhere(Traffic::Tcp(Vec::new()))], ALL.to_vec()),
        (
            vec![
                everywhere(Traffic::Udp(Vec::new())),
                everywhere(Traffic::Icmp(None, None)),
            ],
            vec![],
        ),
    ]
}

#[test]
fn an_instance_with_rules_reaches_what_they_name_and_nothing_else() {
    on_host(|| async {
        let (_outside, _listeners) = listening(&[80, 81, 443]);
        let network = open().await;
        let free = Container::new(&network, ONE).await;
        assert_eq!(reached(&free), ALL);
        for (rules, expected) in cases() {
            let container = Container::with(&network, TWO, with(&rules)).await;
            assert_eq!(reached(&container), expected, "{rules:?}");
            // The neighbour's rules are the neighbour's.
            assert_eq!(reached(&free), ALL);
            let mut gone = attached(TWO, &container.lease, &[]);
            with(&rules)(&mut gone);
            network.detach(&gone).await;
            network.remove_link(TWO).await.unwrap();
        }
        let left = listed("list table inet ostler");
        assert_eq!(left.matches("elements").count(), 2, "{left}");
    });
}

/// Whether an ICMP message of this type, with code 0, gets an answer.
fn answered(container: &Container, kind: u8) -> bool {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
        setsockopt, socket, sockopt::ReceiveTimeout,
    };
    use std::os::fd::AsRawFd as _;
    let socket = container.namespace.inside(|| {
        let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
        socket(family, SockType::Raw, flags, SockProtocol::Icmp).unwrap()
    });
    let deadline = nix::sys::time::TimeVal::new(10, 0);
    setsockopt(&socket, ReceiveTimeout, &deadline).unwrap();
    // A timestamp request has three times behind number and sequence (RFC 792).
    let mut request = [
        kind, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let sum = (u16::from(kind) << 8) + 2;
    request[2..4].copy_from_slice(&(!sum).to_be_bytes());
    let address = SockaddrIn::from(std::net::SocketAddrV4::new(OUTSIDE, 0));
    sendto(socket.as_raw_fd(), &request, &address, MsgFlags::empty()).unwrap();
    let mut answer = [0; 128];
    recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
    // 0 and 14 are the answers; 3 is the host's refusal.
    matches!(answer[20], 0 | 14)
}

#[test]
fn rules_for_datagrams_and_icmp_name_ports_types_and_codes() {
    on_host(|| async {
        let (outside, network) = (outside(), open().await);
        let rules = [
            rule(OUTSIDE, OUTSIDE, Traffic::Udp(vec![(53, 53)])),
            rule(OUTSIDE, OUTSIDE, Traffic::Icmp(Some(8), Some(0))),
        ];
        let container = Container::with(&network, ONE, with(&rules)).await;
        let [allowed, refused] = [53, 54].map(|port| outside.datagrams(OUTSIDE, port));
        let sender = container.namespace.datagrams(container.lease.container, 0);
        sender.connect((OUTSIDE, 54)).unwrap();
        sender.send(b"refused").unwrap();
        // The refusal comes back as an error.
        let error = sender.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::HostUnreachable);
        sender.connect((OUTSIDE, 53)).unwrap();
        sender.send(b"allowed").unwrap();
        assert_eq!(received(&allowed).0, "allowed");
        assert!(answered(&container, 8) && !answered(&container, 13));
        let any = [everywhere(Traffic::Icmp(Some(13), None))];
        let other = Container::with(&network, TWO, with(&any)).await;
        assert!(answered(&other, 13) && !answered(&other, 8));
        refused.set_nonblocking(true).unwrap();
        assert!(refused.recv(&mut [0; 8]).is_err());
    });
}

#[test]
fn a_closed_host_lets_instances_reach_what_is_allowed_and_their_own_rules() {
    on_host(|| async {
        let (_outside, _listeners) = listening(&[80, 81, 443]);
        let network = opened(|config| {
            config.egress = Posture::Closed;
            // They overlap, too.
            config.allow = vec![(OTHER, OTHER), (OTHER, [192, 0, 2, 131].into())];
            config.deny = vec![([192, 0, 2, 0].into(), [192, 0, 2, 255].into())];
        })
        .await;
        let other = [(OTHER, 80), (OTHER, 81), (OTHER, 443)];
        let one = Container::new(&network, ONE).await;
        assert_eq!(reached(&one), other);
        let rules = [rule(OUTSIDE, OUTSIDE, Traffic::Tcp(vec![(443, 443)]))];
        let two = Container::with(&network, TWO, with(&rules)).await;
        assert_eq!(reached(&two), [&[(OUTSIDE, 443)], &other[..]].concat());
    });
}

#[test]
fn what_is_denied_is_reached_by_a_rule_or_where_it_is_allowed_only() {
    on_host(|| async {
        let (_outside, _listeners) = listening(&[80, 81, 443]);
        let network = opened(|config| {
            config.allow = vec![(OTHER, OTHER)];
            config.deny = vec![([192, 0, 2, 0].into(), [192, 0, 2, 255].into())];
        })
        .await;
        let one = Container::new(&network, ONE).await;
        assert_eq!(reached(&one), [(OTHER, 80), (OTHER, 81), (OTHER, 443)]);
        let rules = [everywhere(Traffic::Tcp(vec![(80, 80)]))];
        let two = Container::with(&network, TWO, with(&rules)).await;
        let reached = reached(&two);
        assert!(reached.contains(&(OUTSIDE, 80)) && !reached.contains(&(OUTSIDE, 81)));
        // The same packet without the one rule against it.
        drop(network);
        run("nft", "flush chain inet ostler outside");
        one.namespace.connect(OUTSIDE, 80).unwrap();
    });
}

#[test]
fn rules_outlive_the_agent_and_a_rebuild_and_leave_with_the_instance() {
    on_host(|| async {
        let (_outside, listeners) = listening(&[80, 81, 443]);
        let network = open().await;
        let rules = [
            rule(OUTSIDE, OUTSIDE, Traffic::Tcp(vec![(80, 80)])),
            everywhere(Traffic::Tcp(vec![(443, 500)])),
        ];
        let container = Container::with(&network, ONE, with(&rules)).await;
        let expected = [(OUTSIDE, 80), (OUTSIDE, 443), (OTHER, 443)];
        assert_eq!(reached(&container), expected);
        let mut open_connection = container.namespace.connect(OUTSIDE, 80).unwrap();
        let table = || listed("list table inet ostler");
        let before = table();
        drop(network);
        assert_eq!(reached(&container), expected, "without an agent");
        let network = open().await;
        assert_eq!(reached(&container), expected, "before it knows what lives");
        let mut live = attached(ONE, &container.lease, &[]);
        with(&rules)(&mut live);
        network.rebuild(std::slice::from_ref(&live)).await.unwrap();
        assert_eq!(table(), before);
        assert_eq!(reached(&container), expected);
        // What somebody took away comes back with it.
        run("nft", "flush ruleset");
        let end = std::time::Instant::now() + DEADLINE;
        while listed_or_none() != before {
            assert!(std::time::Instant::now() < end, "{}", listed_or_none());
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(reached(&container), expected);
        // The first that were accepted have long been there: one is this connection.
        let accepted = listeners[0].accept().unwrap();
        drop(accepted);
        std::io::Write::write_all(&mut open_connection, b"on").unwrap();
        network.detach(&live).await;
        assert!(!table().contains("elements"), "{}", table());
    });
}

fn listed_or_none() -> String {
    let list = ["--stateless", "list", "table", "inet", "ostler"];
    super::program::run("nft", &list, "").unwrap_or_default()
}

/// Whether the kernel logs for this test: for a network namespace that is not the first one it does so only where it
/// was told to, in the first one. Told here in the virtual machine, and by whoever owns the machine elsewhere.
fn logs_every_namespace() -> bool {
    let setting = "/proc/sys/net/netfilter/nf_log_all_netns";
    if std::env::var_os("OSTLER_VM").is_some() {
        std::fs::write(setting, "1").unwrap();
    }
    std::fs::read_to_string(setting).is_ok_and(|setting| setting.trim() == "1")
}

/// The kernel's log from here on.
fn kernel_log() -> File {
    let mut log = File::open("/dev/kmsg").unwrap();
    log.seek(SeekFrom::End(0)).unwrap();
    log
}

/// The first record that has `what` in it.
fn noted(mut log: File, what: &str) -> String {
    let end = Instant::now() + DEADLINE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(log.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(left).unwrap();
        assert_eq!(poll(&mut ready, wait), Ok(1), "no {what:?} in the log");
        let mut record = [0; 8192];
        // Many at once may have displaced what would have come next.
        let length = log.read(&mut record).unwrap_or(0);
        let record = String::from_utf8_lossy(&record[..length]);
        if record.contains(what) {
            return record.into_owned();
        }
    }
}

#[test]
fn a_logging_rule_counts_tells_the_kernels_log_and_lets_pass() {
    let telling = logs_every_namespace();
    on_host(|| async move {
        let (_outside, _listeners) = listening(&[80, 81, 443]);
        let network = open().await;
        let mut rules = [
            everywhere(Traffic::Tcp(Vec::new())),
            rule(OTHER, OTHER, Traffic::Tcp(vec![(443, 443)])),
        ];
        rules[1].log = true;
        let container = Container::with(&network, ONE, with(&rules)).await;
        drop(network);
        let chain = run("nft", "list chain inet ostler logged");
        assert!(chain.contains("log prefix \"ostler-out \""), "{chain}");
        run("nft", "insert rule inet ostler logged counter");
        let logged = || {
            let text = run("nft", "list chain inet ostler logged");
            let (_, rest) = text.split_once("counter packets ").unwrap();
            rest.split(' ').next().unwrap().to_owned()
        };
        let log = kernel_log();
        container.namespace.connect(OUTSIDE, 443).unwrap();
        assert_eq!(logged(), "0");
        container.namespace.connect(OTHER, 443).unwrap();
        assert_eq!(logged(), "1");
        if telling {
            let line = noted(log, &format!("ostler-out IN=os-{ONE} "));
            let destination = format!(" SRC={} DST={OTHER} ", container.lease.container);
            for part in [" OUT=up0 ", &destination, " PROTO=TCP ", " DPT=443 "] {
                assert!(line.contains(part), "{part}: {line}");
            }
        }
        assert_eq!(reached(&container), ALL);
    });
}

#[test]
fn an_instance_with_hundreds_of_rules_comes_and_goes() {
    on_host(|| async {
        let (_outside, _listeners) = listening(&[80, 81, 443]);
        let network = open().await;
        let mut rules: Vec<_> = (0..999_u16)
            .map(|n| {
                let [a, b] = n.to_be_bytes();
                let address = Ipv4Addr::new(203, a, b, 1);
                rule(address, address, Traffic::Tcp(vec![(n, n + 1)]))
            })
            .collect();
        rules.push(rule(OTHER, OTHER, Traffic::Tcp(vec![(80, 80)])));
        let container = Container::with(&network, ONE, with(&rules)).await;
        assert_eq!(reached(&container), [(OTHER, 80)]);
        let gone = attached(ONE, &container.lease, &[]);
        network.detach(&gone).await;
        let without = listed("list table inet ostler");
        assert!(!without.contains("elements"), "{without}");
        // One more is refused, and nothing is left of the attempt.
        rules.push(everywhere(Traffic::All));
        let (namespace, lease) = (Namespace::new(), network.reserve().unwrap().0);
        let mut too_many = Attached::new(TWO, lease);
        with(&rules)(&mut too_many);
        network
            .attach(too_many, namespace.0.as_fd())
            .await
            .unwrap_err();
        assert_eq!(listed("list table inet ostler"), without);
    });
}

#[test]
fn of_the_host_a_container_reaches_exactly_what_is_allowed() {
    on_host(|| async {
        let _outside = outside();
        let service = |protocol, ports| HostService { protocol, ports };
        let network = opened(|config| {
            config.host_allow = vec![
                service(Transport::Udp, (53, 53)),
                service(Transport::Tcp, (8080, 8090)),
            ];
        })
        .await;
        let container = Container::new(&network, ONE).await;
        let _listeners = [53, 8079, 8080, 8090].map(listen);
        for address in [HOST, container.lease.host] {
            for port in [8080, 8090] {
                container.namespace.connect(address, port).unwrap();
            }
            for port in [53, 8079] {
                assert_rejected(container.namespace.connect(address, port));
            }
        }
        let server = super::testbed::datagrams(Ipv4Addr::UNSPECIFIED, 53);
        let client = container.namespace.datagrams(container.lease.container, 0);
        client.send_to(b"query", (HOST, 53)).unwrap();
        let (query, from) = received(&server);
        assert_eq!(query, "query");
        server.send_to(b"answer", from).unwrap();
        assert_eq!(received(&client).0, "answer");
        // The loopback of the host is nobody's but the host's.
        let local = listen(8085);
        converse(&local, &mut connect(Ipv4Addr::LOCALHOST, 8085).unwrap());
    });
}
