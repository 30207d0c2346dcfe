//! Noticing that somebody else has changed what lets containers' packets pass.
//!
//! ```text
//! kernel ── nftables' events ─▶ the thread: does it concern us? ─ waits for more ─▶ `mend`
//! ```
//!
//! `nft flush ruleset` (a reload of nftables' unit) takes our table with it, and Docker gives FORWARD
//! the policy DROP when it starts. The kernel tells of both. It tells of nothing that iptables-legacy
//! does, nor of settings: those are looked at again at the next event, and at the agent's start.

use super::NetworkError;
use super::decode::{self, Chain, Message, NFPROTO_INET, messages};
use super::table::TABLE;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// The multicast group 7, `NFNLGRP_NFTABLES`, as bind(2) wants it.
const GROUPS: u32 = 1 << 6;
const NEWTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8;
const DELTABLE: u16 = NEWTABLE | 2;
const NEWCHAIN: u16 = NEWTABLE | 3;
const DELCHAIN: u16 = NEWTABLE | 5;

/// How long what goes on may go on before it is looked at, in milliseconds.
const PATIENCE_MS: u16 = 1000;

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
pub(super) struct Changes(OwnedFd);

impl Changes {
    /// Whatever happens from here on is an event.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let open = || {
            let descriptor = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::NetlinkNetFilter,
            )?;
            bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
            Ok(Self(descriptor))
        };
        open().map_err(|errno: Errno| NetworkError::Watch(errno.into()))
    }

    /// Takes all events there are, and tells how urgent the most urgent one is. Never waits.
    pub(super) fn drain(&self) -> Heed {
        let mut most = Heed::Never;
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            most = most.max(
                match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Ok(length) => {
                        let heeds = messages(buffer.get(..length).unwrap_or(&[])).map(heed);
                        heeds.max().unwrap_or(Heed::Never)
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

/// Elements, which are most events and mostly our own, concern nobody.
fn heed(message: Message<'_>) -> Heed {
    let concerns = match message.kind {
        NEWTABLE | DELTABLE => {
            decode::table(message.body).is_some_and(|table| table == (NFPROTO_INET, TABLE.into()))
        }
        NEWCHAIN | DELCHAIN => Chain::parse(message.body).is_some_and(|chain| {
            chain.is_in(TABLE) || chain.sees_forwarded() || chain.name == "DOCKER-USER"
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
    // Never written to: it hangs up.
    _alive: OwnedFd,
}

impl Watch {
    /// Starts it. `mend` runs on it after every event that concerns us, once for those of a second.
    pub(super) fn start(
        changes: Changes,
        mend: impl Fn(&Changes) + Send + 'static,
    ) -> Result<Self, NetworkError> {
        let start = || {
            let (ended, alive) = io::pipe()?;
            thread::Builder::new()
                .name("nftables".to_owned())
                .spawn(move || watch(&changes, &ended.into(), mend))?;
            Ok(Self {
                _alive: alive.into(),
            })
        };
        start().map_err(NetworkError::Watch)
    }
}

fn watch(changes: &Changes, ended: &OwnedFd, mend: impl Fn(&Changes)) {
    let hung_up = |ended: &PollFd<'_>| ended.any() != Some(false);
    loop {
        let mut both = [ended, &changes.0].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
        match poll(&mut both, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(error) => {
                tracing::warn!(%error, "changes of nftables are noticed no longer");
                return;
            }
            Ok(_) => {}
        }
        let [end, _] = &both;
        if hung_up(end) {
            return;
        }
        match changes.drain() {
            Heed::Never => continue,
            Heed::Now => {}
            Heed::Soon => {
                let mut end = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
                // A signal that ends the wait early does no harm.
                if poll(&mut end, PATIENCE_MS).is_ok_and(|ready| ready > 0) {
                    return;
                }
            }
        }
        mend(changes);
    }
}
