//! Forgetting connections over netlink, when the address that they are to or from is given back, and when
//! they were made while the table was not as it shall be.
//!
//! What the kernel remembers is let through without being looked at again (`forward`), and goes where it
//! went: the next container with the address would get what was meant for this one, and could go where
//! only this one was allowed to. Numbers are those of linux/netfilter/nfnetlink_conntrack.h.

use super::NetworkError;
use super::decode::find;
use super::egress::ICMP;
use super::nfnetlink::{CHANGES_MAX, NLM_F_ACK, Socket, attribute, message, nested};
use nix::errno::Errno;
use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = (NFNL_SUBSYS_CTNETLINK << 8) | 1;
const IPCTNL_MSG_CT_DELETE: u16 = (NFNL_SUBSYS_CTNETLINK << 8) | 2;
const AF_INET: u8 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTO_ICMP_CODE: u16 = 6;
const CTA_ID: u16 = 12;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// The source address of a tuple counts, and nothing else of it (net/netfilter/nf_internals.h).
const CTA_FILTER_F_CTA_IP_SRC: u32 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;

/// A connection that the kernel remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Connection {
    /// Who began it.
    pub(super) source: Ipv4Addr,
    /// With whom.
    pub(super) destination: Ipv4Addr,
    /// Who answers: another one where the destination is mapped.
    pub(super) answering: Ipv4Addr,
    /// To whom: another one where the source is masqueraded.
    pub(super) answered: Ipv4Addr,
    pub(super) protocol: u8,
    /// Of the one who answers; of ICMP type and code of the first packet, of others nothing.
    pub(super) port: u16,
}

/// The connections of the network namespace in which this was opened.
#[derive(Debug)]
pub(super) struct Tracked(Mutex<Socket>);

impl Tracked {
    pub(super) fn open() -> Result<Self, NetworkError> {
        let socket = Socket::open().map_err(NetworkError::Connections)?;
        Ok(Self(Mutex::new(socket)))
    }

    /// Forgets the connections that a container began, and those that lead to it, also by a mapped port:
    /// the answers come from its address. Blocks; the kernel looks through all connections twice, some
    /// milliseconds.
    pub(super) fn forget(&self, container: Ipv4Addr) -> Result<(), NetworkError> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let forget = |socket: &mut Socket| {
            for (tuple, flags) in [
                (CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS),
                (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS),
            ] {
                let filter = from(container, tuple, flags);
                let found = socket.dump(IPCTNL_MSG_CT_GET, AF_INET, &filter, exactly)?;
                for some in found.chunks(CHANGES_MAX) {
                    delete(socket, some)?;
                }
            }
            Ok(())
        };
        forget(&mut socket).map_err(NetworkError::Connections)
    }

    /// Forgets those that are `refused`, and tells how many they were. Blocks; the kernel lists all, some
    /// milliseconds for ten thousand.
    pub(super) fn forget_those(
        &self,
        refused: impl Fn(&Connection) -> bool,
    ) -> Result<usize, NetworkError> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let named = |body: &[u8]| {
            let connection = Connection::parse(body)?;
            refused(&connection).then(|| exactly(body)).flatten()
        };
        let forget = |socket: &mut Socket| {
            let found = socket.dump(IPCTNL_MSG_CT_GET, AF_INET, &[], named)?;
            let mut some = found.chunks(CHANGES_MAX);
            some.try_for_each(|some| delete(socket, some))?;
            Ok(found.len())
        };
        forget(&mut socket).map_err(NetworkError::Connections)
    }
}

impl Connection {
    fn parse(body: &[u8]) -> Option<Self> {
        let attributes = body.get(4..)?;
        let first = find(attributes, CTA_TUPLE_ORIG)?;
        let answer = find(attributes, CTA_TUPLE_REPLY)?;
        let address = |tuple, kind| {
            let bytes: [u8; 4] = *find(find(tuple, CTA_TUPLE_IP)?, kind)?.first_chunk()?;
            Some(Ipv4Addr::from(bytes))
        };
        let of = |tuple, kind| find(find(tuple, CTA_TUPLE_PROTO)?, kind);
        let byte = |kind| of(first, kind)?.first().copied();
        let protocol = byte(CTA_PROTO_NUM)?;
        let port = if protocol == ICMP {
            [byte(CTA_PROTO_ICMP_TYPE)?, byte(CTA_PROTO_ICMP_CODE)?]
        } else {
            let port = of(answer, CTA_PROTO_SRC_PORT);
            port.and_then(|port| port.first_chunk().copied())
                .unwrap_or_default()
        };
        Some(Self {
            source: address(first, CTA_IP_V4_SRC)?,
            destination: address(first, CTA_IP_V4_DST)?,
            answering: address(answer, CTA_IP_V4_SRC)?,
            answered: address(answer, CTA_IP_V4_DST)?,
            protocol,
            port: u16::from_be_bytes(port),
        })
    }
}

/// What matches if the source of this tuple is the container. Linux 6.11 could delete by it, older ones
/// can list by it (5.8).
fn from(container: Ipv4Addr, tuple: u16, flags: u16) -> Vec<u8> {
    let source = attribute(CTA_IP_V4_SRC, &container.octets());
    let flags = attribute(flags, &CTA_FILTER_F_CTA_IP_SRC.to_ne_bytes());
    [
        nested(tuple, &nested(CTA_TUPLE_IP, &source)),
        nested(CTA_FILTER, &flags),
    ]
    .concat()
}

/// What names one connection: of a listed one its first tuple and its number, as they came.
fn exactly(body: &[u8]) -> Option<Vec<u8>> {
    let attributes = body.get(4..)?;
    let tuple = nested(CTA_TUPLE_ORIG, find(attributes, CTA_TUPLE_ORIG)?);
    let number = attribute(CTA_ID, find(attributes, CTA_ID)?);
    Some([tuple, number].concat())
}

/// One that has ended meanwhile is fine.
fn delete(socket: &mut Socket, connections: &[Vec<u8>]) -> Result<(), Errno> {
    let first = socket.sequence;
    let mut packet = Vec::new();
    let mut sequence = first;
    for connection in connections {
        packet.extend(message(
            IPCTNL_MSG_CT_DELETE,
            NLM_F_ACK,
            AF_INET,
            0,
            sequence,
            connection,
        ));
        sequence = sequence.wrapping_add(1);
    }
    let refused = socket.exchange(&packet, first, connections.len());
    let refused = refused.into_iter().map(|(_, errno)| errno);
    refused
        .filter(|errno| *errno != Errno::ENOENT)
        .try_for_each(Err)
}
