//! Hosts to test with: network namespaces of the test's own, joined by virtual cables.

use super::{Attached, Lease, Network, NetworkConfig, link, program};
use container::launch::hardware_addresses;
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::future::Future;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// For whatever shall happen; what shall not happen is refused at once or shown by what comes after.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);
/// The host under test, and a host beside it.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// Runs `test` on a thread, and a runtime, in a new network namespace: the host under test.
pub(super) fn on_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
}

fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        scope
            .spawn(work)
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// `ip`, in the namespace of the calling thread.
pub(super) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// A program that must succeed, in the namespace of the calling thread.
pub(super) fn run(program: &'static str, arguments: &str) -> String {
    let mut words: Vec<_> = arguments.split_whitespace().collect();
    if program == "iptables-legacy" {
        // It has one lock for all network namespaces, and tests run side by side.
        words.splice(..0, ["-w", "30"]);
    }
    program::run(program, &words, "").unwrap()
}

/// What `nft --stateless` lists, without what the kernel counts, and forgets in its own time.
pub(super) fn listed(arguments: &str) -> String {
    for counted in ["connections", "visits"] {
        let flush = ["flush", "set", "inet", "ostler", counted];
        let _no_table_yet = program::run("nft", &flush, "");
    }
    run("nft", &format!("--stateless {arguments}"))
}

/// Another network namespace; sockets made inside stay there.
pub(super) struct Namespace(pub(super) OwnedFd);

impl Namespace {
    pub(super) fn new() -> Self {
        Self(on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            File::open("/proc/thread-self/ns/net").unwrap().into()
        }))
    }

    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_thread(|| {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// A new namespace at the other end of a cable, whose end here is up.
    fn joined(link: &str, there: &str) -> Self {
        let namespace = Self::new();
        let descriptor = namespace.0.as_raw_fd();
        let path = format!("/proc/{}/fd/{descriptor}", std::process::id());
        ip(&format!(
            "link add {link} type veth peer name {there} netns {path}"
        ));
        ip(&format!("link set {link} up"));
        namespace
    }

    /// A new namespace at the other end of a cable, with its default route to here.
    pub(super) fn beside(link: &str, here: Ipv4Addr, there: Ipv4Addr) -> Self {
        let namespace = Self::joined(link, "uplink");
        ip(&format!("addr add {here}/24 dev {link}"));
        namespace.inside(|| {
            ip(&format!("addr add {there}/24 dev uplink"));
            ip("link set uplink up");
            ip(&format!("route add default via {here}"));
        });
        namespace
    }

    /// What `wshd` does for a container of this handle.
    pub(super) fn move_in(&self, handle: &str, lease: &Lease) {
        self.inside(|| {
            ip(&format!(
                "addr add {}/{} dev eth0",
                lease.container, lease.prefix
            ));
            ip("link set eth0 arp off up");
            let [host, _] = hardware_addresses(handle).map(|one| one.map(|b| format!("{b:02x}")));
            let (gateway, host) = (lease.host, host.join(":"));
            ip(&format!(
                "neigh add {gateway} lladdr {host} nud permanent dev eth0"
            ));
            ip(&format!("route add default via {gateway}"));
        });
    }

    pub(super) fn listen(&self, port: u16) -> TcpListener {
        self.inside(|| listen(port))
    }

    pub(super) fn connect(&self, address: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
        self.inside(|| connect(address, port))
    }

    pub(super) fn datagrams(&self, address: Ipv4Addr, port: u16) -> UdpSocket {
        self.inside(|| datagrams(address, port))
    }
}

pub(super) fn outside() -> Namespace {
    Namespace::beside("up0", HOST, OUTSIDE)
}

/// A container as `wshd` makes it: attached, its end up, addressed and routed.
pub(super) struct Container {
    pub(super) namespace: Namespace,
    pub(super) lease: Lease,
}

impl Container {
    pub(super) async fn new(network: &Network, handle: &str) -> Self {
        Self::with(network, handle, |_| {}).await
    }

    /// One that is attached in a special way.
    pub(super) async fn with(
        network: &Network,
        handle: &str,
        how: impl FnOnce(&mut Attached),
    ) -> Self {
        let (namespace, lease) = (Namespace::new(), network.reserve().unwrap().0);
        let mut attached = Attached::new(handle, lease.clone());
        how(&mut attached);
        network.attach(attached, namespace.0.as_fd()).await.unwrap();
        namespace.move_in(handle, &lease);
        Self { namespace, lease }
    }

    /// One that an agent has made whose containers asked for their neighbours, and that is not attached yet.
    pub(super) fn of_an_older_agent(network: &Network, handle: &str) -> Self {
        let lease = network.reserve().unwrap().0;
        let link = link::name(handle);
        let namespace = Namespace::joined(&link, "eth0");
        ip(&format!(
            "addr add {}/{} dev {link}",
            lease.host, lease.prefix
        ));
        namespace.inside(|| {
            ip(&format!(
                "addr add {}/{} dev eth0",
                lease.container, lease.prefix
            ));
            ip("link set eth0 up");
            ip(&format!("route add default via {}", lease.host));
        });
        Self { namespace, lease }
    }
}

/// A container with ports, as a record has it.
pub(super) fn attached(handle: &str, lease: &Lease, ports: &[(u16, u16)]) -> Attached {
    Attached {
        ports: ports.to_vec(),
        ..Attached::new(handle, lease.clone())
    }
}

/// Nobody closes it: what it made goes with the namespace.
pub(super) async fn open() -> Network {
    Network::open(&NetworkConfig::default()).await.unwrap()
}

/// The same where containers may reach the host's services.
pub(super) async fn open_hospitable() -> Network {
    let config = NetworkConfig {
        allow_host_access: true,
        ..NetworkConfig::default()
    };
    Network::open(&config).await.unwrap()
}

pub(super) fn listen(port: u16) -> TcpListener {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()
}

pub(super) fn connect(address: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddrV4::new(address, port).into(), DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

pub(super) fn datagrams(address: Ipv4Addr, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((address, port)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// One datagram: its text and where it seems to come from.
pub(super) fn received(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (String::from_utf8(buffer[..length].to_vec()).unwrap(), from)
}

/// Accepts the connection that `client` is, sends a word each way, and gives back the server's end.
pub(super) fn converse(listener: &TcpListener, client: &mut TcpStream) -> TcpStream {
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    exchange(client, &mut server);
    server
}

pub(super) fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    let mut word = [0; 4];
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"pong");
}

/// Without the chain that is tried, and whoever would mend it or is about to: shows that the packet would
/// have come through.
pub(super) fn without(network: Network, chain: &str) {
    let (rules, end) = (Arc::downgrade(&network.rules), Instant::now() + DEADLINE);
    drop(network);
    while rules.strong_count() > 0 {
        assert!(Instant::now() < end, "it is mended all the time");
        thread::yield_now();
    }
    run("nft", &format!("flush chain inet ostler {chain}"));
}

/// Waits for what another thread will do in its own time.
pub(super) async fn eventually(what: &str, so: impl Fn() -> bool) {
    let end = tokio::time::Instant::now() + DEADLINE;
    while !so() {
        assert!(tokio::time::Instant::now() < end, "not so: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Longer than events are let gather.
pub(super) async fn a_while() {
    tokio::time::sleep(Duration::from_millis(1500)).await;
}

/// What `reject with icmpx admin-prohibited` makes of a connect.
pub(super) fn assert_rejected(outcome: io::Result<TcpStream>) {
    assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::HostUnreachable);
}
