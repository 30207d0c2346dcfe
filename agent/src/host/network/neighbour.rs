//! Who is at the other end of a container's link.
//!
//! The kernel has one table of link neighbours for all network namespaces (arp(7)). Nobody is asked for hardware
//! addresses on containers' links, so that no app fills it (`wshd` has the container's end of this, in its `network`); who is there
//! is told to the kernel. Containers that an older agent made ask and answer, and go on to.

use super::link::{HostEnd, Links, errno, failed};
use super::{Lease, NetworkError};
use container::launch::hardware_addresses;
use futures_util::StreamExt as _;
use nix::errno::Errno;
use rtnetlink::LinkUnspec;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::net::IpAddr;

impl Links {
    /// Tells the kernel who the neighbour of a host end is, for ever (`NUD_PERMANENT`): in the one table that all
    /// namespaces have, such an entry makes no room for others' and wants none of theirs (net/core/neighbour.c,
    /// `neigh_alloc`).
    pub(super) async fn introduce(
        &self,
        index: u32,
        (handle, link): (&str, &str),
        lease: &Lease,
    ) -> Result<(), NetworkError> {
        let [_, theirs] = hardware_addresses(handle);
        let neighbours = self.handle.neighbours();
        let add = neighbours.add(index, IpAddr::V4(lease.container));
        let added = add.link_layer_address(&theirs).replace().execute().await;
        added.map_err(|error| failed("name the neighbour of", link, error))
    }

    /// Gives a host end of ours its hardware address and its neighbour, and has it ask nobody; tells whether something was missing.
    /// The kernel drops the neighbour when somebody sets the link down, has it ask, or takes its last address. Of an older agent
    /// is what asks by a hardware address of its own.
    pub(super) async fn acquaint(
        &self,
        index: u32,
        (handle, end): (&str, &HostEnd),
        lease: &Lease,
    ) -> Result<bool, NetworkError> {
        let [ours, theirs] = hardware_addresses(handle);
        let same = end.hardware == ours;
        let of_an_older_agent = !end.silent && !same;
        let right = end.silent && same && self.knows(index, lease, &theirs).await?;
        if of_an_older_agent || right {
            return Ok(false);
        }
        if !(same && end.silent) {
            let ours = LinkUnspec::new_with_index(index)
                .address(ours.to_vec())
                .arp(false);
            let set = self.handle.link().set(ours.build()).execute().await;
            set.map_err(|error| failed("give a hardware address to", &end.link, error))?;
        }
        self.introduce(index, (handle, &end.link), lease).await?;
        Ok(true)
    }

    /// Whether the container's address is this neighbour's, for ever.
    async fn knows(
        &self,
        index: u32,
        lease: &Lease,
        hardware: &[u8],
    ) -> Result<bool, NetworkError> {
        let mut wanted = NeighbourMessage::default();
        (wanted.header.family, wanted.header.ifindex) = (AddressFamily::Inet, index);
        let address = NeighbourAddress::Inet(lease.container);
        wanted.attributes = vec![NeighbourAttribute::Destination(address)];
        let mut get = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(wanted));
        get.header.flags = NLM_F_REQUEST;
        let mut handle = self.handle.clone();
        let asking = |error| {
            failed(
                "look for the neighbour of",
                &format!("number {index}"),
                error,
            )
        };
        let answer = handle.request(get).map_err(asking)?.next().await;
        match answer.map(|answer| answer.payload) {
            Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(found))) => {
                let theirs = NeighbourAttribute::LinkLayerAddress(hardware.to_vec());
                let fixed = found.header.state == NeighbourState::Permanent;
                Ok(fixed && found.attributes.contains(&theirs))
            }
            Some(NetlinkPayload::Error(error)) => {
                let error = rtnetlink::Error::NetlinkError(error);
                match errno(&error) {
                    Some(Errno::ENOENT) => Ok(false),
                    _ => Err(asking(error)),
                }
            }
            _ => Err(asking(rtnetlink::Error::RequestFailed)),
        }
    }
}
