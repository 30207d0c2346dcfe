//! The virtual cables between host and containers, over rtnetlink.
//!
//! The kernel works under one lock (RTNL) that the removal of namespaces can hold for tens of
//! milliseconds, and `sendmsg` waits for it. So one thread of its own sends the messages, and the
//! runtime's workers only ever wait for its answers.

use super::super::blocking;
use super::{Lease, NetworkError, sysctl};
use container::launch::hardware_addresses;
use futures_util::TryStreamExt as _;
use nix::errno::Errno;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::thread;
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};

/// What the name of every host end begins with.
pub(super) const PREFIX: &str = "os-";
/// The container's end, inside.
pub(super) const INSIDE: &str = "eth0";

/// What a link carries when nobody says otherwise.
pub(super) const ETHERNET_MTU: u32 = 1500;

/// The host end's name: `os-` and the handle, 14 of the 15 characters that the kernel has room for.
pub(super) fn name(handle: &str) -> String {
    format!("{PREFIX}{handle}")
}

/// The handle in a host end's name; `None` when the name has not the shape that ours have.
pub(super) fn handle(name: &str) -> Option<&str> {
    let handle = name.strip_prefix(PREFIX)?;
    let ours = handle.len() == 11
        && handle
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'v'));
    ours.then_some(handle)
}

/// The links of the network namespace in which this was opened.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) handle: Handle,
    /// Held by whoever changes how much a container may receive.
    shaping: Arc<Mutex<()>>,
    /// Ends the thread when it is dropped; the connection itself would outlive its last handle.
    _alive: oneshot::Sender<()>,
}

/// A link whose name begins as those of host ends do.
#[derive(Debug)]
pub(super) struct HostEnd {
    /// Its name.
    pub(super) link: String,
    /// Whose it is; `None`: no container's.
    pub(super) handle: Option<String>,
    /// Whether it is up.
    pub(super) up: bool,
    /// Whether nobody is asked on it for hardware addresses. An older agent's containers ask, and answer.
    pub(super) silent: bool,
    /// Its hardware address.
    pub(super) hardware: Vec<u8>,
}

/// An IPv4 address of this host.
#[derive(Debug, Clone)]
pub(super) struct HostAddress {
    pub(super) address: Ipv4Addr,
    pub(super) link: String,
    pub(super) mtu: u32,
    /// Whether others than this host can use it.
    pub(super) scope: Scope,
}

/// How far an address goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    Global,
    Host,
}

impl Links {
    /// Starts the thread, which ends when this is dropped.
    pub(super) async fn open() -> Result<Self, NetworkError> {
        let (answer, opened) = oneshot::channel();
        let (alive, dropped) = oneshot::channel();
        let thread = thread::Builder::new().name("netlink".to_owned());
        thread
            .spawn(move || serve(answer, dropped))
            .map_err(NetworkError::Netlink)?;
        let ended = || Err(io::Error::other("the netlink thread ended"));
        let handle = opened
            .await
            .unwrap_or_else(|_| ended())
            .map_err(NetworkError::Netlink)?;
        Ok(Self {
            handle,
            shaping: Arc::default(),
            _alive: alive,
        })
    }

    /// Makes the pair, its inner end in `netns` from the first moment (down and without an address:
    /// that is the container's own to do), its outer end up and addressed, without ARP. Undone on failure.
    pub(super) async fn create(
        &self,
        handle: &str,
        netns: BorrowedFd<'_>,
        lease: &Lease,
        mtu: u32,
    ) -> Result<(), NetworkError> {
        let link = name(handle);
        let [ours, theirs] = hardware_addresses(handle).map(Vec::from);
        let inside = LinkUnspec::new_with_name(INSIDE)
            .address(theirs)
            .mtu(mtu)
            .setns_by_fd(netns.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(link.clone())
            .address(ours)
            .arp(false)
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
            .up()
            .build();
        self.handle
            .link()
            .add(pair)
            .execute()
            .await
            .map_err(|error| failed("make", &link, error))?;
        let ready = self.configure(handle, &link, lease).await;
        if ready.is_err() {
            // The first error is the one to tell; the link dies with its namespace anyway.
            let _ = self.delete(&link).await;
        }
        ready
    }

    /// The other end is still down, so nothing passes before the settings hold.
    async fn configure(&self, handle: &str, link: &str, lease: &Lease) -> Result<(), NetworkError> {
        self.set(link).await?;
        let missing = || failed("find", link, rtnetlink::Error::RequestFailed);
        let index = self.index(link).await?.ok_or_else(missing)?;
        self.give(index, link, lease).await?;
        self.introduce(index, (handle, link), lease).await
    }

    /// Gives a host end its settings; tells whether it did not forward.
    pub(super) async fn set(&self, link: &str) -> Result<bool, NetworkError> {
        let link = link.to_owned();
        blocking(move || set(&link)).await
    }

    /// Gives a host end its address; tells whether it had not.
    pub(super) async fn give(
        &self,
        index: u32,
        link: &str,
        lease: &Lease,
    ) -> Result<bool, NetworkError> {
        let host = IpAddr::V4(lease.host);
        let add = self.handle.address().add(index, host, lease.prefix);
        match add.execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(false),
            Err(error) => Err(failed("give an address to", link, error)),
        }
    }

    /// Sets a host end up.
    pub(super) async fn set_up(&self, index: u32, link: &str) -> Result<(), NetworkError> {
        let up = LinkUnspec::new_with_index(index).up().build();
        let set = self.handle.link().set(up).execute().await;
        set.map_err(|error| failed("set up", link, error))
    }

    /// Until it is dropped nobody else changes how much a container may receive.
    pub(super) async fn turn(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.shaping).lock_owned().await
    }

    /// Removes a link and with it its other end. None of that name is no error. The kernel takes tens
    /// of milliseconds: where a link can die with its namespace, let it.
    pub(super) async fn delete(&self, link: &str) -> Result<(), NetworkError> {
        let Some(index) = self.index(link).await? else {
            return Ok(());
        };
        match self.handle.link().del(index).execute().await {
            Err(error) if errno(&error) != Some(Errno::ENODEV) => {
                Err(failed("remove", link, error))
            }
            _ => Ok(()),
        }
    }

    /// All links whose names begin as those of host ends do, by index.
    pub(super) async fn host_ends(&self) -> Result<BTreeMap<u32, HostEnd>, NetworkError> {
        let mut links = self.handle.link().get().execute();
        let mut found = BTreeMap::new();
        let listing = |error| failed("list", "all", error);
        while let Some(link) = links.try_next().await.map_err(listing)? {
            found.extend(host_end(&link).map(|end| (link.header.index, end)));
        }
        Ok(found)
    }

    /// The one of them that has this index.
    pub(super) async fn host_end(&self, index: u32) -> Result<Option<HostEnd>, NetworkError> {
        let get = self.handle.link().get().match_index(index);
        match get.execute().try_next().await {
            Ok(found) => Ok(found.as_ref().and_then(host_end)),
            Err(error) if errno(&error) == Some(Errno::ENODEV) => Ok(None),
            Err(error) => Err(failed("find", &format!("number {index}"), error)),
        }
    }

    /// The IPv4 addresses of this host, except those of host ends.
    pub(super) async fn addresses(&self) -> Result<Vec<HostAddress>, NetworkError> {
        let listing = |error| failed("list the addresses of", "all", error);
        let mut found = Vec::new();
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses.try_next().await.map_err(listing)? {
            if let Some(address) = v4_of(&message) {
                found.push((message.header.index, address, message.header.scope));
            }
        }
        let mut links = HashMap::new();
        let mut all = self.handle.link().get().execute();
        while let Some(link) = all.try_next().await.map_err(listing)? {
            if let Some(name) = name_of(&link).filter(|name| handle(name).is_none()) {
                links.insert(link.header.index, (name.to_owned(), mtu_of(&link)));
            }
        }
        Ok(found
            .into_iter()
            .filter_map(|(index, address, scope)| {
                let (link, mtu) = links.get(&index)?.clone();
                let global = scope == AddressScope::Universe && !address.is_loopback();
                let scope = if global { Scope::Global } else { Scope::Host };
                Some(HostAddress {
                    address,
                    link,
                    mtu,
                    scope,
                })
            })
            .collect())
    }

    pub(super) async fn index(&self, link: &str) -> Result<Option<u32>, NetworkError> {
        match self
            .handle
            .link()
            .get()
            .match_name(link)
            .execute()
            .try_next()
            .await
        {
            Ok(found) => Ok(found.map(|message| message.header.index)),
            Err(error) if errno(&error) == Some(Errno::ENODEV) => Ok(None),
            Err(error) => Err(failed("find", link, error)),
        }
    }
}

/// The thread's work: what the connection sends it sends from here.
fn serve(answer: oneshot::Sender<io::Result<Handle>>, dropped: oneshot::Receiver<()>) {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return drop(answer.send(Err(error))),
    };
    runtime.block_on(async {
        match rtnetlink::new_connection() {
            Ok((connection, handle, _)) => {
                drop(answer.send(Ok(handle)));
                tokio::select! {
                    // No order is better: after either nothing is left to do.
                    biased;
                    _ = dropped => {}
                    () = connection => {}
                }
            }
            Err(error) => drop(answer.send(Err(error))),
        }
    });
}

/// Replies to 127.0.0.1 come back over this link; `raw_in` of the table drops whatever else names
/// 127/8. Blocks: some settings wait for RTNL. Tells whether it did not forward.
fn set(link: &str) -> Result<bool, NetworkError> {
    sysctl::write(&format!("ipv4/conf/{link}/route_localnet"), "1")?;
    sysctl::write(&format!("ipv4/conf/{link}/rp_filter"), "1")?;
    let forwards = sysctl::write(&format!("ipv4/conf/{link}/forwarding"), "1")?;
    // On for new links, and off for all of them unless somebody changes that.
    sysctl::write(&format!("ipv4/conf/{link}/accept_source_route"), "0")?;
    // A kernel without IPv6 has nothing to turn off.
    sysctl::write_if_there(&format!("ipv6/conf/{link}/disable_ipv6"), "1")?;
    Ok(forwards)
}

fn host_end(link: &LinkMessage) -> Option<HostEnd> {
    let name = name_of(link).filter(|name| name.starts_with(PREFIX))?;
    Some(HostEnd {
        link: name.to_owned(),
        handle: handle(name).filter(|_| is_veth(link)).map(str::to_owned),
        up: link.header.flags.contains(LinkFlags::Up),
        silent: link.header.flags.contains(LinkFlags::Noarp),
        hardware: hardware_of(link).to_vec(),
    })
}

fn hardware_of(link: &LinkMessage) -> &[u8] {
    let hardware = link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::Address(hardware) = attribute {
            Some(hardware.as_slice())
        } else {
            None
        }
    });
    hardware.unwrap_or_default()
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            Some(name.as_str())
        } else {
            None
        }
    })
}

fn mtu_of(link: &LinkMessage) -> u32 {
    let mtu = link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::Mtu(mtu) = attribute {
            Some(*mtu)
        } else {
            None
        }
    });
    mtu.unwrap_or(ETHERNET_MTU)
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(parts)
            if parts.contains(&LinkInfo::Kind(InfoKind::Veth)))
    })
}

fn v4_of(address: &AddressMessage) -> Option<Ipv4Addr> {
    address.attributes.iter().find_map(|attribute| {
        if let AddressAttribute::Local(IpAddr::V4(v4)) = attribute {
            Some(*v4)
        } else {
            None
        }
    })
}

pub(super) fn failed(doing: &'static str, link: &str, source: rtnetlink::Error) -> NetworkError {
    NetworkError::Link {
        doing,
        link: link.to_owned(),
        source,
    }
}

pub(super) fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    if let rtnetlink::Error::NetlinkError(message) = error {
        return message.code.map(|code| Errno::from_raw(-code.get()));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_our_shape_are_ours() {
        assert_eq!(handle(&name("0123456789v")), Some("0123456789v"));
        assert!(name("0123456789v").len() <= 15);
        for foreign in [
            "os-br0",
            "os-0123456789w",
            "os-0123456789",
            "eth0",
            "os-0123456789ab",
        ] {
            assert_eq!(handle(foreign), None, "{foreign}");
        }
    }
}
