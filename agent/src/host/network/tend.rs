//! Noticing that somebody else has changed the host's end of a container's link, and putting it back.
//!
//! ```text
//! kernel ── rtnetlink's events ─▶ which link? ─ waits for more ─▶ up, address, settings, limit
//! ```
//!
//! `ip link set down`, `ip address flush` and a manager of networks that takes all links for its own cut a
//! container off; `tc qdisc del` frees it of its limit; `sysctl net.ipv4.ip_forward=0` cuts off all of them.
//! The kernel tells of all that. It tells of links that come and go as well: one message finds that these
//! are nobody's. A link that somebody removes is gone, for the container's end goes with it.

use super::decode::{Message, find, messages};
use super::link::{self, HostEnd, Links};
use super::rules::Rules;
use super::watch::{AGAIN, PATIENCE, Watch, listen};
use super::{Lease, NetworkError};
use crate::host::{blocking, watched};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol, recv, setsockopt, sockopt::RcvBufForce};
use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Weak};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

/// Multicast groups of linux/rtnetlink.h, as bind(2) wants them: LINK, TC, IPV4_IFADDR, IPV4_NETCONF.
const GROUPS: u32 = 1 | 1 << 3 | 1 << 4 | 1 << 23;
const RTM_NEWLINK: u16 = 16;
const RTM_DELADDR: u16 = 21;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWNETCONF: u16 = 80;
const IFLA_IFNAME: u16 = 3;
const IFA_LABEL: u16 = 3;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
/// The index that stands for all links there.
const NETCONFA_IFINDEX_ALL: i32 = -1;
const IFF_UP: u32 = 1;

/// Bytes of events that may wait: those of some hundred links that go at once.
const EVENTS: usize = 4 << 20;

/// What an event may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touched {
    /// The link of this index.
    Link(u32),
    /// Whether this host forwards at all.
    Forwarding,
}

fn touched(message: Message<'_>) -> Option<Touched> {
    let body = message.body;
    let word = |at: usize| Some(u32::from_ne_bytes(*body.get(at..)?.first_chunk()?));
    // A name, or a label, which is the name: ends with a zero.
    let named = |header: usize, kind: u16| {
        let name = find(body.get(header..)?, kind)?.strip_suffix(&[0])?;
        str::from_utf8(name)
            .ok()
            .filter(|name| name.starts_with(link::PREFIX))
    };
    match message.kind {
        // struct ifinfomsg; one that is up is of interest only when it has no name of ours.
        RTM_NEWLINK => {
            let name = named(16, IFLA_IFNAME)?;
            let fine = word(8)? & IFF_UP != 0 && link::handle(name).is_some();
            (!fine).then_some(Touched::Link(word(4)?))
        }
        // struct ifaddrmsg.
        RTM_DELADDR => named(8, IFA_LABEL).and_then(|_| Some(Touched::Link(word(4)?))),
        // struct tcmsg.
        RTM_DELQDISC => Some(Touched::Link(word(4)?)),
        // struct netconfmsg.
        RTM_NEWNETCONF => {
            let number = |kind| {
                Some(i32::from_ne_bytes(
                    *find(body.get(4..)?, kind)?.first_chunk()?,
                ))
            };
            let off = number(NETCONFA_FORWARDING)? == 0;
            match number(NETCONFA_IFINDEX)? {
                NETCONFA_IFINDEX_ALL => off.then_some(Touched::Forwarding),
                index => Some(Touched::Link(u32::try_from(index).ok().filter(|_| off)?)),
            }
        }
        _ => None,
    }
}

/// What is to be looked at.
#[derive(Debug, Default)]
struct Wanted {
    all: bool,
    links: BTreeSet<u32>,
}

impl Wanted {
    fn is_empty(&self) -> bool {
        !self.all && self.links.is_empty()
    }
}

/// Tends the links of containers until it is dropped.
#[derive(Debug)]
pub(super) struct Tending {
    all: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Tending {
    /// Whatever happens from here on is noticed; in the network namespace of the calling thread.
    pub(super) fn start(
        links: Arc<Links>,
        rules: &Arc<Rules>,
        watch: &Arc<Watch>,
    ) -> Result<Self, NetworkError> {
        let open = || {
            let socket = listen(SockProtocol::NetlinkRoute, GROUPS)?;
            setsockopt(&socket, RcvBufForce, &EVENTS)?;
            watched(socket, Interest::READABLE)
        };
        let all = Arc::new(Notify::new());
        let tender = Tender {
            events: open().map_err(NetworkError::Watch)?,
            all: Arc::clone(&all),
            links,
            rules: Arc::downgrade(rules),
            watch: Arc::downgrade(watch),
            strangers: BTreeSet::new(),
        };
        let task = tokio::spawn(tender.tend());
        Ok(Self { all, task })
    }

    /// Looks at all links soon.
    pub(super) fn look_at_all(&self) {
        self.all.notify_one();
    }

    /// Nothing is put back any more.
    pub(super) fn end(&self) {
        self.task.abort();
    }
}

impl Drop for Tending {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Debug)]
struct Tender {
    events: AsyncFd<OwnedFd>,
    all: Arc<Notify>,
    links: Arc<Links>,
    /// Weak, as the next: they end when the network is dropped.
    rules: Weak<Rules>,
    watch: Weak<Watch>,
    /// Links that have names as ours and are not, which were told.
    strangers: BTreeSet<u32>,
}

impl Tender {
    async fn tend(mut self) {
        let mut wanted = Wanted::default();
        let (mut due, mut pause) = (None, AGAIN.0);
        loop {
            let later = due.unwrap_or_else(Instant::now);
            tokio::select! {
                // Who changes something all the time shall not keep the rest from being put back.
                biased;
                () = sleep_until(later), if due.is_some() => {
                    wanted = self.look(wanted).await;
                    due = (!wanted.is_empty()).then(|| Instant::now() + pause);
                    pause = if due.is_none() { AGAIN.0 } else { AGAIN.1.min(pause * 2) };
                    continue;
                }
                () = self.all.notified() => wanted.all = true,
                read = read(&self.events) => match read {
                    Ok(Some(events)) => self.heed(&events, &mut wanted),
                    // Some were lost, and nobody knows which.
                    Ok(None) => wanted.all = true,
                    Err(error) => {
                        warn!(%error, "changes of containers' links are noticed no longer");
                        return;
                    }
                },
            }
            if due.is_none() && !wanted.is_empty() {
                due = Some(Instant::now() + PATIENCE);
            }
        }
    }

    fn heed(&self, events: &[u8], wanted: &mut Wanted) {
        for touched in messages(events).filter_map(touched) {
            match touched {
                Touched::Link(index) => {
                    wanted.links.insert(index);
                }
                Touched::Forwarding => {
                    self.watch.upgrade().inspect(|watch| watch.wake());
                }
            }
        }
    }

    /// Looks at what is wanted, and gives back what could not be put back.
    async fn look(&mut self, mut wanted: Wanted) -> Wanted {
        let mut left = Wanted::default();
        if wanted.all {
            match self.links.host_ends().await {
                Ok(all) => wanted.links.extend(all.into_keys()),
                Err(error) => {
                    warn!(
                        error = &error as &dyn Error,
                        "containers' links were not looked at"
                    );
                    left.all = true;
                }
            }
        }
        for index in wanted.links {
            if let Err(error) = self.mend(index).await {
                let error = &error as &dyn Error;
                warn!(error, "a container's link is not as it shall be");
                left.links.insert(index);
            }
        }
        left
    }

    /// Puts back what is not as it shall be of this link, if it is one of a container that is attached.
    async fn mend(&mut self, index: u32) -> Result<(), NetworkError> {
        let Some(end) = self.links.host_end(index).await? else {
            self.strangers.remove(&index);
            return Ok(());
        };
        let HostEnd { link, handle, up } = end;
        let Some(handle) = handle else {
            if self.strangers.insert(index) {
                warn!(
                    link,
                    "a link that is not a container's has a name that begins as theirs do: the host's rules for containers \
                     hold for its traffic until it is renamed"
                );
            }
            return Ok(());
        };
        let Some((lease, _)) = self.shall(&handle).await else {
            return Ok(());
        };
        let mut was = Vec::new();
        if !up {
            self.links.set_up(index, &link).await?;
            was.push("down");
        }
        if self.links.give(index, &link, &lease).await? {
            was.push("without its address");
        }
        if self.links.set(&link).await? {
            was.push("not forwarding");
        }
        if self.shape(&handle, &link).await? {
            was.push("without its limit");
        }
        if !was.is_empty() {
            let was = was.join(", ");
            warn!(
                handle,
                link, was, "a container's link was changed by somebody and is put back"
            );
        }
        Ok(())
    }

    /// Puts back how much a container may receive; tells whether it was otherwise.
    async fn shape(&self, handle: &str, link: &str) -> Result<bool, NetworkError> {
        let _turn = self.links.turn().await;
        let Some((_, Some(rate))) = self.shall(handle).await else {
            return Ok(false);
        };
        let other = self.links.shaped(link).await? != Some(rate);
        if other {
            self.links.shape(link, Some(rate)).await?;
        }
        Ok(other)
    }

    /// The addresses of a container that is attached, and how much it may receive.
    async fn shall(&self, handle: &str) -> Option<(Lease, Option<u64>)> {
        let (rules, handle) = (Weak::clone(&self.rules), handle.to_owned());
        blocking(move || rules.upgrade()?.end_of(&handle)).await
    }
}

/// Some events; `None`: more came than can wait.
async fn read(events: &AsyncFd<OwnedFd>) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; 64 * 1024];
    let read = events.async_io(Interest::READABLE, |socket| {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::ENOBUFS) => Ok(None),
            Err(error) => Err(error.into()),
        }
    });
    let length = read.await?;
    Ok(length.map(|length| {
        buffer.truncate(length);
        buffer
    }))
}
