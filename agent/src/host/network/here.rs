//! Under which address others reach this host, and the largest packet of the way there.
//!
//! Found when the agent starts, and again when addresses or default routes of the host change: a host may boot before its network, and its
//! address may go. One that the host has, and whose way leads out, is kept: routers know it.

use super::NetworkError;
use super::link::{ETHERNET_MTU, HostAddress, Links, Scope};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::warn;

/// What is known of it.
#[derive(Debug)]
pub(super) struct Here {
    configured: Option<Ipv4Addr>,
    mtu: Option<u32>,
    now: Mutex<Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    address: Ipv4Addr,
    mtu: u32,
    /// It is the one that packets to the world leave with, or was when it was found.
    leads_out: bool,
}

impl Here {
    /// With what the operator has said, and with which addresses this host has.
    pub(super) fn new(
        configured: Option<Ipv4Addr>,
        mtu: Option<u32>,
        addresses: &[HostAddress],
    ) -> Self {
        let place = place(configured, None, outgoing(), addresses);
        if place.address.is_loopback() && configured.is_none() {
            warn!(
                "this host has no address under which others could reach it: it is known as {} until it has one, unless \
                 `network.local_ip` says otherwise",
                place.address
            );
        }
        Self {
            configured,
            mtu,
            now: Mutex::new(place),
        }
    }

    /// The address.
    pub(super) fn address(&self) -> Ipv4Addr {
        self.now().address
    }

    /// Bytes of the largest packet.
    pub(super) fn mtu(&self) -> u32 {
        self.mtu.unwrap_or_else(|| self.now().mtu)
    }

    /// The links that lead to others.
    pub(super) fn uplinks<'a>(
        &self,
        addresses: &'a [HostAddress],
    ) -> impl Iterator<Item = &'a str> + use<'a> {
        let now = *self.now();
        // One of Docker's, where there is no other yet, leads nowhere.
        let known = now.leads_out.then_some(now.address);
        let ways = [known, outgoing()].map(|way| way.filter(|way| !way.is_loopback()));
        let uplinks = addresses
            .iter()
            .filter(move |one| ways.contains(&Some(one.address)));
        uplinks.map(|one| &*one.link)
    }

    /// Looks again: the host's addresses have changed.
    pub(super) async fn look(&self, links: &Links) -> Result<(), NetworkError> {
        let addresses = links.addresses().await?;
        let before = *self.now();
        let place = place(self.configured, Some(before), outgoing(), &addresses);
        *self.now() = place;
        if place.address != before.address {
            let (now, before) = (place.address, before.address);
            warn!(%now, %before, "this host is known under another address from now on");
        }
        Ok(())
    }

    fn now(&self) -> MutexGuard<'_, Place> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(
    configured: Option<Ipv4Addr>,
    before: Option<Place>,
    outgoing: Option<Ipv4Addr>,
    addresses: &[HostAddress],
) -> Place {
    let has = |address| addresses.iter().any(|one| one.address == address);
    // Also one that is gone for a while, until there is another way out: there may be an interface that is just set up anew.
    let kept = before.filter(|old| old.leads_out && (has(old.address) || outgoing.is_none()));
    let found = configured.or(kept.map(|kept| kept.address)).or(outgoing);
    let global = addresses.iter().find(|one| one.scope == Scope::Global);
    let least = global.map_or(Ipv4Addr::LOCALHOST, |one| one.address);
    let address = found.unwrap_or(least);
    Place {
        address,
        mtu: mtu_at(&[Some(address), outgoing], addresses),
        leads_out: found.is_some(),
    }
}

/// The address that a packet to the wide world would leave with; none is sent.
fn outgoing() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(1, 1, 1, 1), 53)).ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    }
}

/// The smallest of the links that have one of these addresses: that under which this host is known need not be on the
/// link that leads out, nor on any.
fn mtu_at(ways: &[Option<Ipv4Addr>], addresses: &[HostAddress]) -> u32 {
    let at = addresses.iter().filter(|one| {
        // The loopback's 64 KiB are for the loopback alone, and more than a veth takes.
        one.link != "lo" && ways.contains(&Some(one.address))
    });
    let smallest = at.map(|one| one.mtu).min();
    smallest.unwrap_or(ETHERNET_MTU)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_kept_while_the_host_has_it_and_it_was_known_to_lead_out() {
        let [one, two, docker] = [1, 2, 3].map(|last| Ipv4Addr::new(192, 0, 2, last));
        let has = |addresses: &[Ipv4Addr]| -> Vec<HostAddress> {
            let each = addresses.iter().map(|address| HostAddress {
                address: *address,
                link: format!("link-{address}"),
                mtu: 1000 + u32::from(address.octets()[3]),
                scope: Scope::Global,
            });
            each.collect()
        };
        let nothing = place(None, None, None, &[]);
        assert_eq!(
            (nothing.address, nothing.mtu),
            (Ipv4Addr::LOCALHOST, ETHERNET_MTU)
        );
        // Of several without a way out the first, until there is one.
        let some = place(None, Some(nothing), None, &has(&[docker]));
        assert_eq!((some.address, some.leads_out), (docker, false));
        let out = place(None, Some(some), Some(one), &has(&[docker, one]));
        assert_eq!((out.address, out.mtu, out.leads_out), (one, 1001, true));
        // Another way out for a while, and none.
        let other = place(None, Some(out), Some(two), &has(&[docker, one, two]));
        assert_eq!((other.address, other.leads_out), (one, true));
        assert_eq!(place(None, Some(out), None, &has(&[docker, one])), out);
        let gone = place(None, Some(out), None, &has(&[docker]));
        assert_eq!((gone.address, gone.leads_out), (one, true));
        let moved = place(None, Some(out), Some(two), &has(&[docker, two]));
        assert_eq!((moved.address, moved.mtu), (two, 1002));
        let said = place(Some(docker), Some(out), Some(two), &has(&[docker, two]));
        assert_eq!((said.address, said.mtu), (docker, 1002));
    }
}
