//! Noticing that somebody else has changed what lets containers' packets pass.
//!
//! ```text
//! kernel ── nftables' events ─▶ the thread: does it concern us? ─ waits for more ─▶ `mend`
//! ```
//!
//! `nft flush ruleset` (a reload of nftables' unit) takes our table with it, Docker gives FORWARD the
//! policy DROP when it starts, and `iptables -F` takes our accepts. The kernel tells of all that. It tells
//! of nothing that iptables-legacy does: that is looked at again at the next event, and at the agent's start.
//! Who hears that forwarding was switched off ([`super::tend`]) wakes this.

use super::NetworkError;
use super::decode::{self, Chain, Message, NFPROTO_INET, RulePlace, messages};
use super::foreign::PLACES;
use super::table::{SET_NAMES, TABLE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// The multicast group 7, `NFNLGRP_NFTABLES`, as bind(2) wants it.
const GROUPS: u32 = 1 << 6;
const NEWTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8;
const DELTABLE: u16 = NEWTABLE | 2;
const NEWCHAIN: u16 = NEWTABLE | 3;
const DELCHAIN: u16 = NEWTABLE | 5;
const NEWRULE: u16 = NEWTABLE | 6;
const DELRULE: u16 = NEWTABLE | 8;
const DELSETELEM: u16 = NEWTABLE | 14;

/// How long what goes on may go on before it is looked at.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// How soon what could not be mended is tried again: first, and at last after doubling.
pub(super) const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Since when something has not been as it shall be, though that was tried. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Unmended(Arc<Mutex<Option<Instant>>>);

impl Unmended {
    /// It was looked at, and is so afterwards, or not.
    pub(super) fn looked(&self, so: bool) {
        let mut since = self.since();
        let before = since.take();
        *since = (!so).then(|| before.unwrap_or_else(Instant::now));
    }

    /// For how long; nothing where all is so.
    pub(super) fn time(&self) -> Duration {
        let since = *self.since();
        since.map(|since| since.elapsed()).unwrap_or_default()
    }

    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How soon something wants to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Heed {
    /// Not at all.
    Never,
    /// When the one who changes things has had time to finish.
    Soon,
    /// Containers are cut off.
    Now,
}

/// The events of the network namespace in which this was opened.
#[derive(Debug)]
pub(super) struct Changes {
    socket: OwnedFd,
    /// The port of the socket that changes elements here.
    own: AtomicU32,
}

impl Changes {
    /// Whatever happens from here on is an event.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let opened = listen(SockProtocol::NetlinkNetFilter, GROUPS);
        let socket = opened.map_err(|errno| NetworkError::Watch(errno.into()))?;
        let own = AtomicU32::new(0);
        Ok(Self { socket, own })
    }

    /// What is asked for by the socket with this port is no news.
    pub(super) fn ignore(&self, port: u32) {
        self.own.store(port, Ordering::Relaxed);
    }

    /// Takes all events there are, and tells how urgent the most urgent one is. Never waits.
    pub(super) fn drain(&self) -> Heed {
        let mut most = Heed::Never;
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            most = most.max(
                match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Ok(length) => {
                        let own = self.own.load(Ordering::Relaxed);
                        let all = messages(buffer.get(..length).unwrap_or(&[]));
                        let others = all.filter(|message| message.port != own);
                        others.map(heed).max().unwrap_or(Heed::Never)
                    }
                    Err(Errno::EINTR) => Heed::Never,
                    // Some were lost, and nobody knows which.
                    Err(Errno::ENOBUFS) => Heed::Soon,
                    Err(_empty) => return most,
                },
            );
        }
    }
}

/// A netlink socket that hears what these multicast groups are told, and never waits.
pub(super) fn listen(protocol: SockProtocol, groups: u32) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(descriptor)
}

/// Elements are most events, and nearly all of them our own.
fn heed(message: Message<'_>) -> Heed {
    let concerns = match message.kind {
        NEWTABLE | DELTABLE => {
            decode::table(message.body).is_some_and(|table| table == (NFPROTO_INET, TABLE.into()))
        }
        NEWCHAIN | DELCHAIN => Chain::parse(message.body).is_some_and(|chain| {
            chain.is_in(TABLE) || chain.sees_forwarded() || PLACES.contains(&chain.name.as_str())
        }),
        NEWRULE | DELRULE => RulePlace::parse(message.body).is_some_and(|rule| {
            rule.is_in(TABLE) || (rule.is_ipv4() && PLACES.contains(&rule.chain.as_str()))
        }),
        // What somebody adds, as another table's script that was mistaken, cuts nobody off: it goes with the next look.
        DELSETELEM => decode::set(message.body).is_some_and(|(table, set)| {
            table == (NFPROTO_INET, TABLE.into()) && SET_NAMES.contains(&set.as_str())
        }),
        _ => false,
    };
    match (concerns, message.kind) {
        (false, _) => Heed::Never,
        (true, DELTABLE) => Heed::Now,
        (true, _) => Heed::Soon,
    }
}

/// The thread that watches. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    /// Hangs up when dropped; a byte wakes the thread.
    thread: UnixStream,
    handle: Mutex<Option<JoinHandle<()>>>,
    unmended: Unmended,
}

impl Watch {
    /// Starts it. `mend` runs on it after every event that concerns us, once for those of a second. It
    /// tells whether all is so afterwards; else it runs again, as at the start if all is not `so` then.
    pub(super) fn start(
        changes: Changes,
        so: bool,
        mend: impl Fn(&Changes) -> bool + Send + 'static,
    ) -> Result<Self, NetworkError> {
        let start = || {
            let (ours, thread) = UnixStream::pair()?;
            for end in [&ours, &thread] {
                end.set_nonblocking(true)?;
            }
            let unmended = Unmended::default();
            unmended.looked(so);
            let told = unmended.clone();
            let named = thread::Builder::new().name("nftables".to_owned());
            let handle = named.spawn(move || watch(&changes, &ours, &told, so, mend))?;
            Ok(Self {
                thread,
                handle: Mutex::new(Some(handle)),
                unmended,
            })
        };
        start().map_err(NetworkError::Watch)
    }

    /// Something is not as it shall be: it is mended at once.
    pub(super) fn wake(&self) {
        // Full: it will wake.
        let _ = (&self.thread).write(&[0]);
    }

    /// For how long mending has been in vain.
    pub(super) fn unmended(&self) -> Duration {
        self.unmended.time()
    }

    /// Ends it, and waits for the program that it may be running. Blocks.
    pub(super) fn end(&self) {
        // Its end hears of it; that cannot fail but for one that is gone.
        let _ = self.thread.shutdown(Shutdown::Both);
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if handle.take().is_some_and(|handle| handle.join().is_err()) {
            tracing::warn!("who noticed changes of nftables had failed");
        }
    }
}

fn watch(
    changes: &Changes,
    agent: &UnixStream,
    unmended: &Unmended,
    so: bool,
    mend: impl Fn(&Changes) -> bool,
) {
    let mut pause = AGAIN.0;
    let mut due = (!so).then(|| Instant::now() + pause);
    loop {
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        // Whole milliseconds: one more than is left, lest it comes back too early again and again.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            let left = left.saturating_add(Duration::from_millis(1));
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut both =
            [agent.as_fd(), changes.socket.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut both, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                unmended.looked(false);
                tracing::error!(%error, "changes of nftables are noticed no longer: they stay until the agent is started again");
                return;
            }
        }
        let woken = match (&*agent).read(&mut [0; 64]) {
            Ok(0) => return,
            Ok(_) => Heed::Now,
            Err(_nothing) => Heed::Never,
        };
        let now = Instant::now();
        let wanted = match changes.drain().max(woken) {
            Heed::Never => None,
            Heed::Soon => Some(now + PATIENCE),
            Heed::Now => Some(now),
        };
        due = due.into_iter().chain(wanted).min();
        if due.is_some_and(|due| due <= now) {
            let so = mend(changes);
            unmended.looked(so);
            due = (!so).then(|| Instant::now() + pause);
            pause = if so { AGAIN.0 } else { AGAIN.1.min(pause * 2) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testbed::{DEADLINE, on_host, run};
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    /// When mendings ran. The first `vain` ones are in vain.
    fn mendings(vain: usize, so: bool) -> (Watch, Receiver<Instant>) {
        let (ran, times) = channel();
        let count = std::sync::atomic::AtomicUsize::new(0);
        let mend = move |_: &Changes| {
            let _ = ran.send(Instant::now());
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= vain
        };
        let changes = Changes::open().unwrap();
        (Watch::start(changes, so, mend).unwrap(), times)
    }

    #[test]
    fn what_could_not_be_mended_is_tried_again_ever_more_seldom() {
        on_host(|| async {
            let (watch, times) = mendings(2, true);
            watch.wake();
            let next = || times.recv_timeout(DEADLINE).unwrap();
            let three = [next(), next(), {
                // Since the first, and it is tried again.
                assert!(watch.unmended() >= AGAIN.0);
                next()
            }];
            assert!(three[1] - three[0] >= AGAIN.0, "{three:?}");
            assert!(three[2] - three[1] >= AGAIN.0 * 2, "{three:?}");
            let fourth = times.recv_timeout(AGAIN.0 * 5);
            assert!(fourth.is_err(), "the third was not in vain");
            assert_eq!(watch.unmended(), Duration::ZERO);
            let (_watch, times) = mendings(0, false);
            times.recv_timeout(DEADLINE).unwrap();
        });
    }

    #[test]
    fn what_cuts_containers_off_does_not_wait_for_what_may() {
        on_host(|| async {
            // While these take longer, the machine is too slow to tell.
            let soon = (0..10).any(|_| {
                let (_watch, times) = mendings(0, true);
                let before = Instant::now();
                run("nft", "add table inet ostler");
                run("nft", "delete table inet ostler");
                times.recv_timeout(DEADLINE).unwrap() - before < PATIENCE
            });
            assert!(soon);
        });
    }
}
