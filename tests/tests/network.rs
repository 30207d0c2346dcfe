//! What an instance may reach and how fast, by its start message and by the agent's configuration.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{Droplet, Host, Network, Setup, patience, tool};

/// A start message for a probe with these rules, ready when it listens.
fn probe(host: &Host, droplet: &str, rules: Value) -> Value {
    let mut message = host.message(droplet, &Droplet::probe());
    message["uris"] = json!([format!("{droplet}.example.net")]);
    message["egress_network_rules"] = rules;
    message
}

/// The port that leads to a droplet's instance.
async fn port(host: &Host, droplet: &str) -> u16 {
    let find = json!({"droplet": droplet, "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    let port = found["stats"]["port"].as_u64().unwrap();
    port.try_into().unwrap()
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(patience())).unwrap();
    stream
}

fn told(port: u16, order: &str) -> String {
    let mut stream = connect(port);
    writeln!(stream, "{order}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim().to_owned()
}

fn reaches(port: u16, address: &str, far: u16) -> bool {
    match told(port, &format!("try {address} {far}")).as_str() {
        "open" => true,
        "shut" => false,
        other => panic!("{other:?}"),
    }
}

/// Listens outside on two ports.
fn outside(host: &Host) -> ([TcpListener; 2], [u16; 2]) {
    let listeners = host
        .network
        .outside(|| [0, 0].map(|port: u16| TcpListener::bind((Network::OUTSIDE, port)).unwrap()));
    let ports = [&listeners[0], &listeners[1]].map(|one| one.local_addr().unwrap().port());
    (listeners, ports)
}

fn table() -> String {
    tool("nft", &["list", "table", "inet", "ostler"])
}

#[tokio::test]
async fn rules_of_the_start_message_bind_while_agents_come_and_go() {
    let mut host = Host::start().await;
    let (_listeners, [one, two]) = outside(&host);
    let question = host
        .network
        .outside(|| UdpSocket::bind((Network::OUTSIDE, 0)).unwrap());
    let udp = question.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((_, from)) = question.recv_from(&mut [0; 16]) {
            question.send_to(b"answer", from).unwrap();
        }
    });
    host.run(probe(&host, "free", json!([]))).await;
    let rules = json!([
        {"protocol": "tcp", "destination": "198.51.100.0/24", "ports": format!("1,{one}"), "log": true},
        {"protocol": "udp", "destination": "198.51.100.1-198.51.100.3", "ports": "1-9"},
        {"protocol": "icmp", "destination": "0.0.0.0/0", "type": 8, "code": 0},
        {"protocol": "all", "destination": "203.0.113.7"}
    ]);
    host.run(probe(&host, "bound", rules)).await;
    let (free, bound) = (port(&host, "free").await, port(&host, "bound").await);
    let holds = || {
        for far in [one, two] {
            assert!(reaches(free, Network::OUTSIDE, far));
            assert_eq!(reaches(bound, Network::OUTSIDE, far), far == one);
        }
        let ask = format!("ask {} {udp}", Network::OUTSIDE);
        assert_eq!(told(free, &ask), "answer");
        assert_eq!(told(bound, &ask), "shut");
    };
    holds();
    let before = table();
    host.kill9().await;
    holds();
    host.start_agent().await;
    holds();
    assert_eq!(table(), before);
    host.stop("bound").await;
    host.stop("free").await;
    // Stopped is told when its processes are dead; the rest follows.
    let end = Instant::now() + patience();
    while table().contains("elements") {
        assert!(Instant::now() < end, "{}", table());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_closed_host_opens_what_is_configured_and_what_a_start_names() {
    let host = Host::with(Setup {
        config: &[(
            "[cgroup]",
            "egress = \"closed\"\nallow = [\"203.0.113.0/24\"]\n\
             host_allow = [\"tcp/7001-7002\"]\n[cgroup]",
        )],
        ..Default::default()
    })
    .await;
    let (_listeners, [one, two]) = outside(&host);
    let listener = host.network.outside(|| {
        tool("ip", &["addr", "add", "203.0.113.9/32", "dev", "lo"]);
        TcpListener::bind(("203.0.113.9", 0)).unwrap()
    });
    let allowed = listener.local_addr().unwrap().port();
    let _own = [7001, 7003].map(|port: u16| TcpListener::bind((Network::HOST, port)).unwrap());
    host.run(probe(&host, "closed", json!([]))).await;
    let rules =
        json!([{"protocol": "tcp", "destination": Network::OUTSIDE, "ports": two.to_string()}]);
    host.run(probe(&host, "named", rules)).await;
    let (closed, named) = (port(&host, "closed").await, port(&host, "named").await);
    for (probe, far) in [(closed, None), (named, Some(two))] {
        for port in [one, two] {
            let reached = reaches(probe, Network::OUTSIDE, port);
            assert_eq!(reached, far == Some(port), "{port} {far:?}");
        }
        assert!(reaches(probe, Network::HOST, 7001));
        assert!(!reaches(probe, Network::HOST, 7003));
        assert!(reaches(probe, "203.0.113.9", allowed));
    }
    host.stop("closed").await;
    host.stop("named").await;
}

/// How long it takes until this many bytes have come from, or gone to, an instance.
fn timed(port: u16, order: &str, bytes: usize) -> Duration {
    let mut stream = connect(port);
    let begin = Instant::now();
    writeln!(stream, "{order}").unwrap();
    if order == "take" {
        stream.write_all(&vec![0; bytes]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert_eq!(answer.trim(), bytes.to_string());
    } else {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), bytes);
    }
    begin.elapsed()
}

#[tokio::test]
async fn bandwidth_is_as_configured_also_by_the_next_agent() {
    const LIMITS: &str = "[instance]\nbandwidth_in_kbit = 8000\nbandwidth_out_kbit = 8000\n";
    let limits = format!("{LIMITS}[network]");
    let mut host = Host::with(Setup {
        config: &[("[network]", &limits)],
        ..Default::default()
    })
    .await;
    host.run(probe(&host, "probe", json!([]))).await;
    let port = port(&host, "probe").await;
    let orders = [("send 4000000", 4_000_000), ("take", 4_000_000)];
    // A megabyte per second, and one at most that had not been used before.
    let least = Duration::from_millis(2500);
    for (order, bytes) in orders {
        let time = timed(port, order, bytes);
        assert!(time > least, "{order}: {time:?}");
        assert!(time < patience(), "{order}: {time:?}");
    }
    let config = host.base.parent().unwrap().join("agent.toml");
    let text = fs::read_to_string(&config).unwrap();
    host.kill9().await;
    let time = timed(port, orders[0].0, orders[0].1);
    assert!(time > least, "without an agent: {time:?}");
    fs::write(&config, text.replace(LIMITS, "")).unwrap();
    host.start_agent().await;
    let deadline = Instant::now() + patience();
    for (order, bytes) in orders {
        // Soon after its start.
        while timed(port, order, bytes) > least {
            assert!(Instant::now() < deadline, "{order} is still limited");
        }
    }
    host.kill9().await;
    fs::write(&config, text).unwrap();
    host.start_agent().await;
    host.tree_until("limits", |_| {
        table().contains("limit rate over 1000000 bytes")
    })
    .await;
    let time = timed(port, orders[0].0, orders[0].1);
    assert!(time > least, "limited again: {time:?}");
    host.stop("probe").await;
}

#[tokio::test]
async fn what_somebody_does_to_a_link_is_undone_and_told() {
    let mut host = Host::start().await;
    host.run(probe(&host, "probe", json!([]))).await;
    let port = port(&host, "probe").await;
    let links = tool("ip", &["-o", "link", "show", "type", "veth"]);
    let link = links.split([' ', '@']).find(|word| word.starts_with("os-"));
    let link = link.unwrap();
    let serves = || told(port, "try 127.0.0.1 1") == "shut";
    assert!(serves());
    let was = format!("link={link:?} was=");
    tool("ip", &["address", "flush", "dev", link]);
    host.logged(
        0,
        &format!("{was}\"without its address, without its neighbour\""),
    )
    .await;
    assert!(serves());
    // While nobody looks.
    host.kill9().await;
    tool("ip", &["link", "set", link, "down"]);
    host.start_agent().await;
    host.logged(0, &format!("{was}\"down, without its neighbour\""))
        .await;
    assert!(serves());
    // Somebody else's, with such a name.
    tool("ip", &["link", "add", "os-mgmt", "type", "bridge"]);
    host.logged(0, "os-mgmt").await;
    tool("ip", &["link", "delete", "os-mgmt"]);
    host.stop("probe").await;
}

#[tokio::test]
async fn a_host_that_gets_another_address_moves_its_routes() {
    let host = Host::start().await;
    let mut registers = host.watch("router.register").await;
    let mut unregisters = host.watch("router.unregister").await;
    host.run(probe(&host, "probe", json!([]))).await;
    let first = registers.next().await;
    assert_eq!(first["host"], Network::HOST, "{first}");
    let link = tool("ip", &["-o", "route", "get", Network::OUTSIDE]);
    let link = link
        .split_whitespace()
        .skip_while(|word| *word != "dev")
        .nth(1)
        .unwrap();
    let second = "198.51.100.77";
    tool("ip", &["address", "flush", "dev", link]);
    tool(
        "ip",
        &["address", "add", &format!("{second}/24"), "dev", link],
    );
    tool(
        "ip",
        &["route", "replace", "default", "via", Network::OUTSIDE],
    );
    let moved = registers
        .until("another host", |route| route["host"] == second)
        .await;
    assert_eq!(moved["port"], first["port"]);
    let back = unregisters.next().await;
    assert_eq!(
        (&back["host"], &back["port"]),
        (&first["host"], &first["port"])
    );
    let find = host
        .request(
            "dea.find.droplet",
            &json!({"droplet": "probe", "include_stats": true}),
        )
        .await;
    assert_eq!(find["stats"]["host"], second, "{find}");
    host.stop("probe").await;
}

/// Sends to so many addresses that nobody has, as if they were at the other end of its link (198.18.0.0 and on), and
/// says how many the kernel took; again and again.
const KNOCKER: &str = r#"exec perl -e '
  use Socket; $| = 1;
  socket my $socket, PF_INET, SOCK_DGRAM, 0 or die;
  setsockopt $socket, SOL_SOCKET, 25, "eth0" or die "SO_BINDTODEVICE: $!";
  for (1 .. 120) {
    my $sent = 0;
    # MSG_DONTROUTE, MSG_DONTWAIT
    for my $n (1 .. 4000) { $sent++ if send $socket, "x", 0x44, pack_sockaddr_in(9, pack "N", 0xc6120000 + $n) }
    print "$sent\n";
    select undef, undef, undef, 0.5;
  }'"#;

/// The kernel's table of neighbours has room for 1024, and is one for all namespaces.
#[tokio::test]
async fn an_app_that_looks_for_strangers_costs_nobody_his_neighbours() {
    let host = Host::start().await;
    let (_listeners, [open, _]) = outside(&host);
    host.run(probe(&host, "neighbour", json!([]))).await;
    let neighbour = port(&host, "neighbour").await;
    let mut knocker = host.output("knocker").await;
    let message = host.message("knocker", &Droplet::shell(KNOCKER));
    host.run(message).await;
    for round in 1..=3 {
        knocker
            .until("another round", |output| {
                output.text(0, "stdout").lines().count() >= round
            })
            .await;
        // Where the kernel takes its time, it takes less.
        let sent = knocker.text(0, "stdout");
        assert!(sent.lines().all(|line| line != "0"), "{sent}");
        assert!(reaches(neighbour, Network::OUTSIDE, open));
    }
    // One that is made meanwhile, and that nobody has spoken with.
    host.run(probe(&host, "later", json!([]))).await;
    let later = port(&host, "later").await;
    assert!(reaches(later, Network::OUTSIDE, open));
    for droplet in ["knocker", "neighbour", "later"] {
        host.stop(droplet).await;
    }
}
