//! A network for one test: this thread's own namespace, and an outside behind a veth pair.

use std::os::fd::{AsRawFd, OwnedFd};
use std::{fs, process, thread};

use nix::sched::{CloneFlags, setns, unshare};

use crate::tool;

/// The namespaces of a test. The host's is the calling thread's (and that of all processes it starts
/// from then on), a second host's is one beside it; the outside is reached by [`Network::outside`]. They
/// die with their last user.
#[derive(Debug)]
pub struct Network {
    outside: OwnedFd,
    /// `None`: that of the calling thread.
    inside: Option<OwnedFd>,
}

impl Network {
    /// The host's address on its way out.
    pub const HOST: &str = "198.51.100.2";
    /// The neighbour's address: the host's default gateway.
    pub const OUTSIDE: &str = "198.51.100.1";
    /// The host's address for a second host beside it.
    pub const NEAR: &str = "192.0.2.1";
    /// The second host's address.
    pub const BESIDE: &str = "192.0.2.2";

    /// Moves the calling thread into a new namespace with `lo`, and `eth0` with a default route to an outside.
    #[must_use]
    pub fn enter() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("tests need root: unshare(CLONE_NEWNET)");
        ip("link set lo up");
        let network = Self {
            outside: new_namespace(),
            inside: None,
        };
        let there = path(&network.outside);
        ip(&format!(
            "link add eth0 type veth peer name eth0 netns {there}"
        ));
        ip(&format!("address add {}/24 dev eth0", Self::HOST));
        ip("link set eth0 up");
        network.outside(|| {
            ip("link set lo up");
            ip(&format!("address add {}/24 dev eth0", Self::OUTSIDE));
            ip("link set eth0 up");
        });
        ip(&format!("route add default via {}", Self::OUTSIDE));
        network
    }

    /// The network of a second host: a namespace of its own, whose outside and default gateway is this host.
    #[must_use]
    pub fn beside(&self) -> Self {
        let network = Self {
            outside: namespace(),
            inside: Some(new_namespace()),
        };
        let there = network.inside.as_ref().map(path).expect("just made");
        ip(&format!(
            "link add beside type veth peer name eth0 netns {there}"
        ));
        ip(&format!("address add {}/24 dev beside", Self::NEAR));
        ip("link set beside up");
        network.inside(|| {
            ip("link set lo up");
            ip(&format!("address add {}/24 dev eth0", Self::BESIDE));
            ip("link set eth0 up");
            ip(&format!("route add default via {}", Self::NEAR));
        });
        network
    }

    /// Does `work` in the host's namespace; what it starts there stays there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.inside {
            None => work(),
            Some(inside) => in_thread(|| {
                setns(inside, CloneFlags::CLONE_NEWNET).expect("setns(CLONE_NEWNET)");
                work()
            }),
        }
    }

    /// Does `work` in the outside namespace, in a thread that may block and may start processes there.
    pub fn outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            setns(&self.outside, CloneFlags::CLONE_NEWNET).expect("setns(CLONE_NEWNET)");
            work()
        })
    }

    /// GETs `path` from `port` of the host, as a client outside: the status and the body.
    #[must_use]
    pub fn get_from_outside(&self, port: u64, path: &str) -> (u16, String) {
        self.outside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let address = format!("{}:{port}", Self::HOST);
            runtime
                .expect("a runtime")
                .block_on(crate::get(&address, path))
                .expect("an answer")
        })
    }
}

/// The calling thread's namespace.
fn namespace() -> OwnedFd {
    OwnedFd::from(fs::File::open("/proc/thread-self/ns/net").expect("/proc is mounted"))
}

fn new_namespace() -> OwnedFd {
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET)");
        namespace()
    })
}

fn path(namespace: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", process::id(), namespace.as_raw_fd())
}

fn ip(command: &str) {
    tool("ip", &command.split(' ').collect::<Vec<_>>());
}

/// Threads change their namespace for good, so each change gets a thread of its own.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
