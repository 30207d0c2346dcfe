//! Whether an app that was started serves: its port opens, or its state file says RUNNING. And whether one that opened
//! its port still listens there.

use crate::engine::Container;
use crate::host::blocking;
use crate::host::depot::disk::Disk;
use crate::instances::droplets::tree::{Symlinks, read_text};
use std::io::{self, Read};
use std::net::{SocketAddr, SocketAddrV4};
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

/// So many looks in a row must find that nobody listens.
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
        Check::Port(address) => {
            matches!(
                timeout(Duration::from_secs(1), TcpStream::connect(address)).await,
                Ok(Ok(_))
            )
        }
        Check::StateFile { disk, path } => {
            let (disk, path) = (Arc::clone(disk), path.clone());
            let read = blocking(move || read_text(&disk.upper(), &path, Symlinks::Refused));
            read.await
                .is_ok_and(|bytes| bytes.is_some_and(|bytes| says_running(&bytes)))
        }
    }
}

/// Looks every `interval` whether somebody in `container` listens at `address`; resolves once nobody did at [`LOOKS`]
/// looks in a row.
///
/// The kernel is asked, and no connection made: that would be accepted for an app that hangs, wait in its queue, and fail
/// for reasons that are not its own (a full table of connections, a firewall, a limit on bandwidth).
pub(super) async fn deaf(container: Container, address: SocketAddrV4, interval: Duration) {
    // Not all at once where many are adopted.
    let first = Instant::now() + interval + crate::random::share(interval);
    let mut looks = interval_at(first, interval);
    // After a pause of this host an app has its time again.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missed = 0;
    while missed < LOOKS {
        looks.tick().await;
        missed = next(missed, look(&container, address).await);
    }
}

/// How many looks in a row have found nobody, after this one.
fn next(missed: u32, look: Option<bool>) -> u32 {
    match look {
        Some(true) => 0,
        Some(false) => missed + 1,
        None => missed,
    }
}

/// Whether somebody listens; `None` if that cannot be found out, or if nobody is left who could: then its end is on its
/// way to us, and tells more.
async fn look(container: &Container, address: SocketAddrV4) -> Option<bool> {
    let sockets = format!("/proc/{}/net", container.pid());
    let read = move || -> io::Result<bool> {
        let v4 = text(&format!("{sockets}/tcp"))?;
        // A kernel may be without.
        let v6 = text(&format!("{sockets}/tcp6")).or_else(|error| {
            let absent = error.kind() == io::ErrorKind::NotFound;
            if absent {
                Ok(String::new())
            } else {
                Err(error)
            }
        })?;
        Ok(listens(&v4, &v6, address))
    };
    match blocking(read).await.ok()? {
        false if container.is_idle().await => None,
        listens => Some(listens),
    }
}

/// What a list of sockets says, if it is no longer than an agent can read each time: an app can make it as long as it likes.
/// The kernel lists those that listen first (`tcp_seek_last_pos` of net/ipv4/tcp_ipv4.c).
fn text(path: &str) -> io::Result<String> {
    /// Some 7,000 sockets.
    const MOST: u64 = 1 << 20;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MOST)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Whether a socket that can be reached at `address` is in state LISTEN (0A). The texts are those of `/proc/<pid>/net/tcp`
/// and `tcp6`: words of four address bytes as this machine's numbers (proc(5)).
fn listens(v4: &str, v6: &str, address: SocketAddrV4) -> bool {
    let ip = format!("{:08X}", u32::from_ne_bytes(address.ip().octets()));
    let any = "00000000";
    let mapped = format!("{any}{any}{:08X}", u32::from_ne_bytes([0, 0, 0xff, 0xff]));
    let here = |text: &str, addresses: [String; 2]| {
        let local = addresses.map(|ip| format!("{ip}:{:04X}", address.port()));
        text.lines().any(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let (at, state) = (words.next(), words.nth(1));
            state == Some("0A") && at.is_some_and(|at| local.iter().any(|local| local == at))
        })
    };
    here(v4, [any.to_owned(), ip.clone()]) || here(v6, [any.repeat(4), format!("{mapped}{ip}")])
}

/// Whether an app's state file says that it runs.
pub(crate) fn says_running(bytes: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(bytes)
        .is_ok_and(|json| json.get("state").and_then(|state| state.as_str()) == Some("RUNNING"))
}

#[cfg(test)]
mod tests {
    use super::{Check, LOOKS, healthy, listens, next, says_running, text};
    use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
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

    #[test]
    fn only_looks_in_a_row_count_and_only_those_that_tell_something() {
        let (yes, no, unknown) = (Some(true), Some(false), None);
        let mut missed = 0;
        for (look, wanted) in [
            (no, 1),
            (unknown, 1),
            (no, 2),
            (yes, 0),
            (unknown, 0),
            (no, 1),
            (no, 2),
            (no, LOOKS),
        ] {
            missed = next(missed, look);
            assert_eq!(missed, wanted);
        }
    }

    #[test]
    fn a_list_is_read_no_further_than_an_agent_can_each_time() {
        let path = std::env::temp_dir().join(format!("ostler-sockets-{}", std::process::id()));
        std::fs::write(&path, "x".repeat(3 << 20)).unwrap();
        let read = text(path.to_str().unwrap());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read.unwrap().len(), 1 << 20);
    }

    #[test]
    fn listeners_are_found_in_the_kernels_own_words() {
        let found = |address: SocketAddrV4| {
            let text = |name| text(&format!("/proc/self/net/{name}"));
            listens(
                &text("tcp").unwrap(),
                &text("tcp6").unwrap_or_default(),
                address,
            )
        };
        let port_of = |listener: &TcpListener| listener.local_addr().unwrap().port();
        for at in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0", "[::ffff:127.0.0.1]:0"] {
            let listener = match TcpListener::bind(at) {
                Ok(listener) => listener,
                // A kernel without IPv6.
                Err(_) if at.starts_with('[') => continue,
                Err(error) => panic!("{at}: {error}"),
            };
            let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port_of(&listener));
            assert!(found(address), "{at}");
            let elsewhere = SocketAddrV4::new([192, 0, 2, 1].into(), address.port());
            assert_eq!(found(elsewhere), !at.contains("127.0.0.1"), "{at}");
            // A connection is no listener.
            let _client = TcpStream::connect(address).unwrap();
            let _accepted = listener.accept().unwrap();
            drop(listener);
            assert!(!found(address), "{at}");
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
