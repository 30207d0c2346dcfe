//! Whether an app that was started serves: its port opens, or its state file says RUNNING.

use crate::host::depot::disk::Disk;
use crate::instances::droplets::tree::{Symlinks, read_text};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// Between two looks (DEA: 0.5 s). An app gives no sign of its own that it listens.
const INTERVAL: Duration = Duration::from_millis(500);

/// The first looks come sooner: 10, 20, 40 … ms, so that a fast app is not kept waiting.
const FIRST: Duration = Duration::from_millis(10);

/// A state file's limit (DEA: 300 s, whatever the message says).
pub(super) const STATE_FILE_TIMEOUT: Duration = Duration::from_secs(300);

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
        Check::Port(address) => {
            matches!(
                timeout(Duration::from_secs(1), TcpStream::connect(address)).await,
                Ok(Ok(_))
            )
        }
        Check::StateFile { disk, path } => {
            let (disk, path) = (Arc::clone(disk), path.clone());
            let read =
                crate::host::blocking(move || read_text(&disk.upper(), &path, Symlinks::Refused));
            read.await
                .is_ok_and(|bytes| bytes.is_some_and(|bytes| says_running(&bytes)))
        }
    }
}

fn says_running(bytes: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(bytes)
        .is_ok_and(|json| json.get("state").and_then(|state| state.as_str()) == Some("RUNNING"))
}

#[cfg(test)]
mod tests {
    use super::{Check, healthy, says_running};
    use std::time::Duration;

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
