//! Whether an app that was started serves: its port opens, or its state file says RUNNING. And whether one that
//! did so still does.

use crate::host::depot::disk::Disk;
use crate::instances::droplets::tree::{Symlinks, read_text};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

/// Between two looks (DEA: 0.5 s). An app gives no sign of its own that it listens.
const INTERVAL: Duration = Duration::from_millis(500);

/// The first looks come sooner: 10, 20, 40 … ms, so that a fast app is not kept waiting.
const FIRST: Duration = Duration::from_millis(10);

/// A state file's limit (DEA: 300 s, whatever the message says).
pub(super) const STATE_FILE_TIMEOUT: Duration = Duration::from_secs(300);

/// What a connection may take that is accepted by the kernel alone. After a second a lost SYN is sent again (RFC 6298).
const ACCEPTED_WITHIN: Duration = Duration::from_secs(1);

/// So many looks in a row must find nobody before an app counts as unresponsive.
const LOOKS: u32 = 3;

/// What is looked at.
#[derive(Debug)]
pub(super) enum Check {
    /// Nothing: healthy at once.
    None,
    /// A connection to this address is accepted.
    Port(SocketAddr),
    /// This file, inside the container's writable layer, is JSON with state `RUNNING`.
    StateFile {
        /// What holds the writable layer.
        disk: Arc<Disk>,
        /// The file, relative to it.
        path: String,
    },
}

/// Resolves to `true` once healthy, to `false` after `limit`.
pub(super) async fn healthy(check: Check, limit: Duration) -> bool {
    timeout(limit, until_healthy(&check)).await.is_ok()
}

async fn until_healthy(check: &Check) {
    let mut wait = FIRST;
    while !looks_healthy(check).await {
        sleep(wait).await;
        wait = (wait * 2).min(INTERVAL);
    }
}

async fn looks_healthy(check: &Check) -> bool {
    match check {
        Check::None => true,
        Check::Port(address) => accepts(*address).await == Some(true),
        Check::StateFile { disk, path } => {
            let (disk, path) = (Arc::clone(disk), path.clone());
            let read =
                crate::host::blocking(move || read_text(&disk.upper(), &path, Symlinks::Refused));
            read.await
                .is_ok_and(|bytes| bytes.is_some_and(|bytes| says_running(&bytes)))
        }
    }
}

/// Looks at `address` every `interval`; resolves once nobody has accepted there for [`LOOKS`] looks in a row.
pub(super) async fn unresponsive(address: SocketAddr, interval: Duration) {
    let mut looks = interval_at(Instant::now() + interval, interval);
    // After a pause of this host an app has its time again.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missed = 0;
    while missed < LOOKS {
        looks.tick().await;
        missed = match accepts(address).await {
            Some(true) => 0,
            Some(false) => missed + 1,
            None => missed,
        };
    }
}

/// Whether a connection is accepted there; `None` if that cannot be found out.
async fn accepts(address: SocketAddr) -> Option<bool> {
    match timeout(ACCEPTED_WITHIN, TcpStream::connect(address)).await {
        Ok(connected) => told(&connected.map(drop)),
        Err(_late) => Some(false),
    }
}

/// What a connect tells of who should accept it. What this host lacks (descriptors, ports, memory) tells nothing.
fn told(connected: &io::Result<()>) -> Option<bool> {
    let Err(error) = connected else {
        return Some(true);
    };
    let theirs = [
        io::ErrorKind::ConnectionRefused,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::TimedOut,
    ];
    theirs.contains(&error.kind()).then_some(false)
}

fn says_running(bytes: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(bytes)
        .is_ok_and(|json| json.get("state").and_then(|state| state.as_str()) == Some("RUNNING"))
}

#[cfg(test)]
mod tests {
    use super::{Check, LOOKS, healthy, says_running, told, unresponsive};
    use nix::errno::Errno;
    use std::time::Duration;
    use tokio::time::timeout;

    #[test]
    fn only_running_is_running() {
        assert!(says_running(br#"{"state":"RUNNING"}"#));
        for other in [
            &b"{"[..],
            b"[]",
            br#"{"state":"STARTING"}"#,
            br#"{"state":1}"#,
            b"",
        ] {
            assert!(!says_running(other));
        }
    }

    #[test]
    fn what_this_host_lacks_is_no_fault_of_an_app() {
        assert_eq!(told(&Ok(())), Some(true));
        for theirs in [Errno::ECONNREFUSED, Errno::ECONNRESET, Errno::ETIMEDOUT] {
            assert_eq!(told(&Err(theirs.into())), Some(false), "{theirs}");
        }
        for ours in [
            Errno::EMFILE,
            Errno::ENFILE,
            Errno::EADDRNOTAVAIL,
            Errno::ENOBUFS,
            Errno::ENOMEM,
            Errno::EPERM,
            Errno::ENETUNREACH,
        ] {
            assert_eq!(told(&Err(ours.into())), None, "{ours}");
        }
    }

    #[tokio::test]
    async fn only_looks_in_a_row_make_an_app_unresponsive() {
        let often = Duration::from_millis(20);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let watching = tokio::spawn(unresponsive(address, often));
        let accepted = tokio::task::spawn_blocking(move || {
            // One look more than would be enough, had they found nobody.
            for _ in 0..=LOOKS {
                listener.accept().unwrap();
            }
            listener
        });
        let listener = accepted.await.unwrap();
        assert!(!watching.is_finished());
        drop(listener);
        timeout(Duration::from_secs(60), watching)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_port_that_opens_late_is_healthy_and_a_closed_one_is_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(healthy(Check::Port(address), Duration::from_secs(5)).await);
        drop(listener);
        assert!(!healthy(Check::Port(address), Duration::from_millis(100)).await);
        let late = tokio::spawn(healthy(Check::Port(address), Duration::from_secs(20)));
        let _listener = std::net::TcpListener::bind(address).unwrap();
        assert!(late.await.unwrap());
    }
}
