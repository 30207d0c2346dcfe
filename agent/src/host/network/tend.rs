//! Noticing that somebody else has changed the host's end of a container's link, and putting it back.
//!
//! ```text
//! kernel ── rtnetlink's events ─▶ which link? ─ waits for more ─▶ up, address, neighbour, settings, limit
//! ```
//!
//! `ip link set down`, `ip address flush`, `ip neigh del` and a manager of networks that takes all links for its own cut
//! a container off; `tc qdisc del` frees it of its limit; `sysctl net.ipv4.ip_forward=0` cuts off all of them.
//! The kernel tells of all that, and of links that come and go as well: these are nobody's when they are looked
//! at. A link that somebody removes is gone, for the container's end goes with it. A limit that somebody changes
//! stays as he wants it until the next agent looks. Addresses of the host itself are heeded for [`super::here`].

use super::decode::{Message, find, messages};
use super::here::Here;
use super::link::{self, Links, failed};
use super::rules::{FORWARDING, Rules};
use super::watch::{AGAIN, PATIENCE, Unmended, Watch, listen};
use super::{Lease, NetworkError, sysctl};
use crate::host::blocking;
use nix::errno::Errno;
use nix::net::if_::if_indextoname;
use nix::sys::socket::{MsgFlags, SockProtocol, recv, setsockopt, sockopt::RcvBufForce};
use rtnetlink::Error::RequestFailed;
use std::collections::BTreeSet;
use std::error::Error;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tracing::{error, warn};

/// Multicast groups of linux/rtnetlink.h, as bind(2) wants them: LINK, NEIGH, TC, IPV4_IFADDR, IPV4_ROUTE, IPV4_NETCONF.
const GROUPS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 23;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELNEIGH: u16 = 29;
const RTM_DELQDISC: u16 = 37;
const RT_TABLE_MAIN: u8 = 254;
const AF_INET: u8 = 2;
const RTM_NEWNETCONF: u16 = 80;
const IFLA_IFNAME: u16 = 3;
const IFA_LABEL: u16 = 3;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
/// The index that stands for all links there.
const NETCONFA_IFINDEX_ALL: i32 = -1;
const IFF_UP: u32 = 1;

/// Bytes of events that may wait, of which the kernel takes twice as many: those of some hundred links that go at once.
const EVENTS: usize = 1 << 20;

/// How often it is listened. A start and a stop are some twenty events: whoever woke for each of them would cost the
/// machine more than what he waits for.
const LISTEN: Duration = Duration::from_millis(250);

/// How long one look may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// What an event may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touched {
    /// The link of this index.
    Link(u32),
    /// Whether this host forwards at all.
    Forwarding,
    /// The host's own addresses, or its way out.
    Addresses,
}

fn touched(message: Message<'_>) -> Option<Touched> {
    let body = message.body;
    let word = |at: usize| Some(u32::from_ne_bytes(*body.get(at..)?.first_chunk()?));
    // A name, or a label, which is the name: ends with a zero.
    let name = |header: usize, kind: u16| find(body.get(header..)?, kind)?.strip_suffix(&[0]);
    let is_end = |name: &[u8]| name.starts_with(link::PREFIX.as_bytes());
    match message.kind {
        // struct ifinfomsg; one that is up is of interest only when it has no name of ours.
        RTM_NEWLINK => {
            let name = name(16, IFLA_IFNAME).filter(|name| is_end(name))?;
            let ours = str::from_utf8(name).is_ok_and(|name| link::handle(name).is_some());
            let fine = word(8)? & IFF_UP != 0 && ours;
            (!fine).then_some(Touched::Link(word(4)?))
        }
        // struct ifaddrmsg.
        RTM_NEWADDR | RTM_DELADDR => match (message.kind, is_end(name(8, IFA_LABEL)?)) {
            (_, false) => Some(Touched::Addresses),
            (RTM_DELADDR, true) => Some(Touched::Link(word(4)?)),
            (_, true) => None,
        },
        // struct rtmsg: a default route.
        RTM_NEWROUTE => {
            let &[_, length, _, _, table, ..] = body.first_chunk::<12>()?;
            (length == 0 && table == RT_TABLE_MAIN).then_some(Touched::Addresses)
        }
        // struct ndmsg; the kernel drops others' all the time, which costs a look at the name of their link.
        RTM_DELNEIGH => (*body.first()? == AF_INET).then_some(Touched::Link(word(4)?)),
        // struct tcmsg; what has no handle was there before anybody put something.
        RTM_DELQDISC => (word(8)? != 0).then_some(Touched::Link(word(4)?)),
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
    addresses: bool,
}

impl Wanted {
    fn is_empty(&self) -> bool {
        !self.all && !self.addresses && self.links.is_empty()
    }
}

/// Tends the links of containers until it is dropped.
#[derive(Debug)]
pub(super) struct Tending {
    all: Arc<Notify>,
    task: JoinHandle<()>,
    unmended: Unmended,
}

impl Tending {
    /// With what [`events`] opened, in the same network namespace.
    pub(super) fn start(
        events: OwnedFd,
        links: Arc<Links>,
        here: Arc<Here>,
        rules: &Arc<Rules>,
        watch: &Arc<Watch>,
    ) -> Self {
        let (all, unmended) = (Arc::new(Notify::new()), Unmended::default());
        let tender = Tender {
            unmended: unmended.clone(),
            events,
            buffer: vec![0; 64 * 1024],
            wanted: Wanted::default(),
            all: Arc::clone(&all),
            links,
            here,
            rules: Arc::downgrade(rules),
            watch: Arc::downgrade(watch),
            strangers: BTreeSet::new(),
        };
        // What changed before anybody listened.
        all.notify_one();
        let task = tokio::spawn(tender.tend());
        Self {
            all,
            task,
            unmended,
        }
    }

    /// For how long mending has been in vain.
    pub(super) fn unmended(&self) -> Duration {
        self.unmended.time()
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

/// Where the kernel tells of links, in the network namespace of the calling thread. Whatever happens from here on waits there.
pub(super) fn events() -> nix::Result<OwnedFd> {
    let socket = listen(SockProtocol::NetlinkRoute, GROUPS)?;
    // Whoever may not has to look at all links the more often.
    let _as_many_as_others = setsockopt(&socket, RcvBufForce, &EVENTS);
    Ok(socket)
}

#[derive(Debug)]
struct Tender {
    events: OwnedFd,
    buffer: Vec<u8>,
    wanted: Wanted,
    unmended: Unmended,
    all: Arc<Notify>,
    links: Arc<Links>,
    here: Arc<Here>,
    /// Weak, as the next: they end when the network is dropped.
    rules: Weak<Rules>,
    watch: Weak<Watch>,
    /// Links that have names as ours and are not, which were told.
    strangers: BTreeSet<u32>,
}

impl Tender {
    async fn tend(mut self) {
        let (mut due, mut pause) = (None, AGAIN.0);
        let mut ticks = interval(LISTEN);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let later = due.unwrap_or_else(Instant::now);
            tokio::select! {
                // Who changes something all the time shall not keep the rest from being put back.
                biased;
                () = sleep_until(later), if due.is_some() => {
                    let so = self.look().await;
                    self.unmended.looked(so);
                    due = (!self.wanted.is_empty()).then(|| Instant::now() + pause);
                    pause = if due.is_none() { AGAIN.0 } else { AGAIN.1.min(pause * 2) };
                }
                () = self.all.notified() => {
                    self.want_all();
                    due = soon(due);
                }
                _ = ticks.tick() => match self.hear() {
                    Ok(true) => due = soon(due),
                    Ok(false) => {}
                    Err(error) => {
                        self.unmended.looked(false);
                        error!(%error, "changes of containers' links are noticed no longer: they stay until the agent is started again");
                        return;
                    }
                },
            }
        }
    }

    fn want_all(&mut self) {
        self.wanted.all = true;
        self.wanted.addresses = true;
    }

    fn mend_forwarding(&self) {
        self.watch.upgrade().inspect(|watch| watch.wake());
    }

    /// Takes all events there are; tells whether one is of interest.
    fn hear(&mut self) -> nix::Result<bool> {
        let mut news = false;
        loop {
            let length = match recv(self.events.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => length,
                // Some were lost, and nobody knows which.
                Err(Errno::ENOBUFS) => {
                    self.want_all();
                    news = true;
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok(news),
                Err(error) => return Err(error),
            };
            let events = messages(self.buffer.get(..length).unwrap_or(&[]));
            for touched in events.filter_map(touched) {
                match touched {
                    Touched::Link(index) => {
                        self.wanted.links.insert(index);
                    }
                    Touched::Addresses => self.wanted.addresses = true,
                    Touched::Forwarding => {
                        self.mend_forwarding();
                        continue;
                    }
                }
                news = true;
            }
        }
    }

    /// Looks at what is wanted. What could not be put back is wanted again; tells whether all could.
    async fn look(&mut self) -> bool {
        let mut so = true;
        // What was lost is lost until nothing waits: the kernel drops all as long as something does.
        if let Err(error) = self.hear() {
            warn!(%error, "changes of containers' links may have been missed");
        }
        let mut wanted = std::mem::take(&mut self.wanted);
        if wanted.all && !sysctl::read(FORWARDING).is_ok_and(|forwards| forwards != "0") {
            self.mend_forwarding();
        }
        if wanted.addresses
            && let Err(error) = in_time(self.here.look(&self.links)).await
        {
            let error = &error as &dyn Error;
            warn!(error, "the host's addresses were not looked at");
            self.wanted.addresses = true;
            so = false;
        }
        if wanted.all {
            match in_time(self.links.host_ends()).await {
                Ok(all) => wanted.links.extend(all.into_keys()),
                Err(error) => {
                    let error = &error as &dyn Error;
                    warn!(error, "containers' links were not looked at");
                    self.wanted.all = true;
                    so = false;
                }
            }
        }
        for index in wanted.links {
            if let Err(error) = in_time(self.mend(index)).await {
                let error = &error as &dyn Error;
                warn!(error, "a container's link is not as it shall be");
                self.wanted.links.insert(index);
                so = false;
            }
            // Nothing else is to wait, or to get lost, while there are many.
            if let Err(error) = self.hear() {
                warn!(%error, "changes of containers' links may have been missed");
            }
        }
        so
    }

    /// Puts back what is not as it shall be of this link, if it is one of a container that is attached.
    async fn mend(&mut self, index: u32) -> Result<(), NetworkError> {
        // Of others' links, which need not be such that a message about them is understood, the kernel is asked no more.
        let name = if_indextoname(index).unwrap_or_default();
        if !name.to_bytes().starts_with(link::PREFIX.as_bytes()) {
            self.strangers.remove(&index);
            return Ok(());
        }
        let Some(end) = self.links.host_end(index).await? else {
            return Ok(());
        };
        let link = end.link.as_str();
        let Some(handle) = end.handle.as_deref() else {
            if self.strangers.insert(index) {
                warn!(
                    link,
                    "a link that is not a container's has a name that begins as theirs do: the host's rules for containers \
                     hold for its traffic until it is renamed"
                );
            }
            return Ok(());
        };
        let Some((lease, _)) = self.shall(handle).await else {
            return Ok(());
        };
        let up = match end.up {
            true => Ok(false),
            false => self.links.set_up(index, link).await.map(|()| true),
        };
        let address = self.links.give(index, link, &lease).await;
        let neighbour = self.links.acquaint(index, (handle, &end), &lease).await;
        let steps = [
            ("down", up),
            ("without its address", address),
            ("without its neighbour", neighbour),
            ("not forwarding", self.links.set(link).await),
            ("without its limit", self.shape(handle, link).await),
        ];
        let done = steps.iter().filter(|(_, done)| matches!(done, Ok(true)));
        let was: Vec<_> = done.map(|(what, _)| *what).collect();
        if !was.is_empty() {
            let was = was.join(", ");
            warn!(
                handle,
                link, was, "a container's link was changed by somebody and is put back"
            );
        }
        let outcome = steps.into_iter().try_for_each(|(_, done)| done.map(drop));
        // It may have died meanwhile.
        match outcome {
            Err(_) if self.links.host_end(index).await?.is_none() => Ok(()),
            other => other,
        }
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

/// The kernel answers in its own time, but not for ever.
async fn in_time<T>(
    work: impl Future<Output = Result<T, NetworkError>>,
) -> Result<T, NetworkError> {
    let late = |_| Err(failed("look at", "all", RequestFailed));
    timeout(DEADLINE, work).await.unwrap_or_else(late)
}

/// A second from now, unless it is due before.
fn soon(due: Option<Instant>) -> Option<Instant> {
    let soon = Instant::now() + PATIENCE;
    Some(due.map_or(soon, |due| due.min(soon)))
}
