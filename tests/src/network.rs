//! A network for one test: this thread's own namespace, and an outside behind a veth pair.

use std::os::fd::{AsRawFd, OwnedFd};
use std::{fs, process, thread};

use nix::sched::{CloneFlags, setns, unshare};

use crate::tool;

/// The namespaces of a test. The host's is the calling thread's (and that of all processes it starts
/// from then on); the outside is reached by [`Network::outside`]. Both die with their last user.
#[derive(Debug)]
pub struct Network {
    outside: OwnedFd,
}

impl Network {
    /// The host's address on its way out.
    pub const HOST: &str = "198.51.100.2";
    /// The neighbour's address: the host's default gateway.
    pub const OUTSIDE: &str = "198.51.100.1";

    /// Moves the calling thread into a new namespace with `lo`, and `eth0` with a default route to an outside.
    #[must_use]
    pub fn enter() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("tests need root: unshare(CLONE_NEWNET)");
        ip("link set lo up");
        let outside = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET)");
            OwnedFd::from(fs::File::open("/proc/thread-self/ns/net").expect("/proc is mounted"))
        });
        let network = Self { outside };
        let there = format!("/proc/{}/fd/{}", process::id(), network.outside.as_raw_fd());
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

fn ip(command: &str) {
    tool("ip", &command.split(' ').collect::<Vec<_>>());
}

/// Threads change their namespace for good, so each change gets a thread of its own.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
