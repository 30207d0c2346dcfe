//! Changes of nftables over netlink: a batch of messages that the kernel applies whole or not at all.
//!
//! A batch is `BATCH_BEGIN`, the changes, `BATCH_END`, sent in one packet. The kernel works it off
//! inside `sendmsg` (some 50 µs, but others' transactions go first), so every answer lies in the socket
//! when the call returns, one for each change. Numbers are those of linux/netfilter/{nfnetlink,nf_tables}.h.

use super::NetworkError;
use super::decode::{Chain, NFPROTO_INET, messages};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_UNSPEC: u8 = 0;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;

const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

/// One element of a set or map of an `inet` table, in the kernel's encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// The set or map.
    pub(super) set: &'static str,
    /// Parts of a concatenation each fill whole words of 4 bytes.
    pub(super) key: Vec<u8>,
    /// What a map leads to.
    pub(super) data: Option<Vec<u8>>,
}

/// A message of a batch.
#[derive(Debug)]
struct Change {
    kind: u16,
    flags: u16,
    attributes: Vec<u8>,
}

/// A netlink socket in the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Nftables {
    table: &'static str,
    socket: Mutex<Socket>,
}

#[derive(Debug)]
struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
}

impl Nftables {
    /// A socket for changes of the `inet` table of this name.
    pub(super) fn open(table: &'static str) -> Result<Self, NetworkError> {
        let open = || {
            let descriptor = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkNetFilter,
            )?;
            bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
            Ok(descriptor)
        };
        let descriptor = open().map_err(|errno| refused("open a socket to", table, errno))?;
        Ok(Self {
            table,
            socket: Mutex::new(Socket {
                descriptor,
                sequence: 0,
            }),
        })
    }

    /// Adds elements, all or none. One that is there already, with the same data, is no error.
    pub(super) fn add(&self, elements: &[Element]) -> Result<(), NetworkError> {
        let changes: Vec<_> = elements
            .iter()
            .map(|element| self.element(NFT_MSG_NEWSETELEM, element))
            .collect();
        match self.transact(&changes).into_iter().next() {
            None => Ok(()),
            Some((_, errno)) => Err(refused("add elements to", self.table, errno)),
        }
    }

    /// Removes elements, all or none. One that is not there is no error.
    pub(super) fn remove(&self, elements: &[Element]) -> Result<(), NetworkError> {
        let mut changes: Vec<_> = elements
            .iter()
            .map(|element| self.element(NFT_MSG_DELSETELEM, element))
            .collect();
        // An absent element fails the whole batch (the message that would not, DESTROYSETELEM, came
        // with Linux 6.3). The kernel names all that failed, so the second batch holds the others.
        while !changes.is_empty() {
            let failed = self.transact(&changes);
            if failed.is_empty() {
                break;
            }
            if let Some((_, errno)) = failed.iter().find(|(_, errno)| *errno != Errno::ENOENT) {
                return Err(refused("remove elements from", self.table, *errno));
            }
            let mut index = 0;
            changes.retain(|_| {
                index += 1;
                !failed.iter().any(|(absent, _)| *absent == index - 1)
            });
        }
        Ok(())
    }

    /// Removes the table with everything in it. No table is no error.
    pub(super) fn remove_table(&self) -> Result<(), NetworkError> {
        let attributes = attribute(NFTA_TABLE_NAME, &text(self.table));
        let change = Change {
            kind: NFT_MSG_DELTABLE,
            flags: 0,
            attributes,
        };
        match self.transact(&[change]).into_iter().next() {
            None | Some((_, Errno::ENOENT)) => Ok(()),
            Some((_, errno)) => Err(refused("remove", self.table, errno)),
        }
    }

    /// All chains of all tables in the namespace.
    pub(super) fn chains(&self) -> Result<Vec<Chain>, NetworkError> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let listed = socket.dump(nftables(NFT_MSG_GETCHAIN), Chain::parse);
        listed.map_err(|errno| refused("list the chains beside", self.table, errno))
    }

    fn element(&self, kind: u16, element: &Element) -> Change {
        let value = |kind, bytes: &[u8]| nested(kind, &attribute(NFTA_DATA_VALUE, bytes));
        let mut content = value(NFTA_SET_ELEM_KEY, &element.key);
        // A removal names the key only: whatever the map leads to, it goes.
        if kind == NFT_MSG_NEWSETELEM
            && let Some(data) = &element.data
        {
            content.extend(value(NFTA_SET_ELEM_DATA, data));
        }
        let attributes = [
            attribute(NFTA_SET_ELEM_LIST_TABLE, &text(self.table)),
            attribute(NFTA_SET_ELEM_LIST_SET, &text(element.set)),
            nested(
                NFTA_SET_ELEM_LIST_ELEMENTS,
                &nested(NFTA_LIST_ELEM, &content),
            ),
        ];
        let flags = if kind == NFT_MSG_NEWSETELEM {
            NLM_F_CREATE
        } else {
            0
        };
        Change {
            kind,
            flags,
            attributes: attributes.concat(),
        }
    }

    /// Applies all changes or none; gives back which ones (by position) failed, and why. A failure of
    /// the batch as a whole is told of position 0.
    fn transact(&self, changes: &[Change]) -> Vec<(usize, Errno)> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let first = socket.sequence;
        let mut sequence = first;
        let batch = |kind, sequence| {
            message(
                kind,
                0,
                NFPROTO_UNSPEC,
                NFNL_SUBSYS_NFTABLES.to_be(),
                sequence,
                &[],
            )
        };
        let mut packet = batch(NFNL_MSG_BATCH_BEGIN, first.wrapping_sub(1));
        for change in changes {
            let flags = NLM_F_ACK | change.flags;
            let kind = nftables(change.kind);
            packet.extend(message(
                kind,
                flags,
                NFPROTO_INET,
                0,
                sequence,
                &change.attributes,
            ));
            sequence = sequence.wrapping_add(1);
        }
        packet.extend(batch(NFNL_MSG_BATCH_END, sequence));
        socket.exchange(&packet, first, changes.len())
    }
}

impl Socket {
    /// Sends a packet of `count` requests numbered from `first` and collects the refusals. A request
    /// without any answer counts as refused.
    fn exchange(&mut self, packet: &[u8], first: u32, count: usize) -> Vec<(usize, Errno)> {
        // The numbers before and after are those of the batch's frame.
        self.sequence = u32::try_from(count)
            .map_or(first, |count| first.wrapping_add(count))
            .wrapping_add(2);
        let descriptor = self.descriptor.as_raw_fd();
        if let Err(errno) = sendto(
            descriptor,
            packet,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        ) {
            return vec![(0, errno)];
        }
        let mut answers = Vec::new();
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            match recv(descriptor, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => answers.extend(acknowledgements(buffer.get(..length).unwrap_or(&[]))),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(errno) => return vec![(0, errno)],
            }
        }
        refusals(&answers, first, count)
    }
}

impl Socket {
    /// Asks for all objects of a kind, in all families. The kernel makes each part of the answer when
    /// the one before is taken, so there is always one until the last.
    fn dump<T>(&mut self, kind: u16, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>, Errno> {
        let request = message(kind, NLM_F_DUMP, NFPROTO_UNSPEC, 0, self.sequence, &[]);
        self.sequence = self.sequence.wrapping_add(1);
        let (descriptor, kernel) = (self.descriptor.as_raw_fd(), NetlinkAddr::new(0, 0));
        sendto(descriptor, &request, &kernel, MsgFlags::empty())?;
        let mut found = Vec::new();
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let length = recv(descriptor, &mut buffer, MsgFlags::MSG_DONTWAIT)?;
            for message in messages(buffer.get(..length).unwrap_or(&[])) {
                match message.kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => {
                        let error = message.body.first_chunk().copied();
                        return Err(Errno::from_raw(-error.map_or(0, i32::from_ne_bytes)));
                    }
                    _ => found.extend(parse(message.body)),
                }
            }
        }
    }
}

/// Which of `count` requests numbered from `first` were refused, or not answered at all.
fn refusals(answers: &[(u32, i32)], first: u32, count: usize) -> Vec<(usize, Errno)> {
    let position =
        |sequence: u32| usize::try_from(sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
    let mut refused: Vec<_> = answers
        .iter()
        .filter(|(_, error)| *error != 0)
        .map(|&(sequence, error)| (position(sequence), Errno::from_raw(-error)))
        .map(|(position, errno)| (if position < count { position } else { 0 }, errno))
        .collect();
    let answered = answers
        .iter()
        .filter(|(sequence, _)| position(*sequence) < count)
        .count();
    if refused.is_empty() && answered < count {
        refused.push((0, Errno::ENODATA));
    }
    refused
}

/// The (number, error) pairs of a received packet; error 0 says that it was done, others are negative.
fn acknowledgements(packet: &[u8]) -> Vec<(u32, i32)> {
    messages(packet)
        .filter(|message| message.kind == NLMSG_ERROR)
        // struct nlmsgerr begins with the error.
        .filter_map(|message| Some((message.sequence, message.body.first_chunk()?)))
        .map(|(sequence, error)| (sequence, i32::from_ne_bytes(*error)))
        .collect()
}

fn refused(doing: &'static str, table: &'static str, errno: Errno) -> NetworkError {
    NetworkError::Table {
        doing,
        table,
        errno,
    }
}

fn nftables(kind: u16) -> u16 {
    (NFNL_SUBSYS_NFTABLES << 8) | kind
}

/// struct nlmsghdr, struct nfgenmsg, attributes.
fn message(
    kind: u16,
    flags: u16,
    family: u8,
    resource: u16,
    sequence: u32,
    body: &[u8],
) -> Vec<u8> {
    let length = u32::try_from(20 + body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(20 + body.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, 0]);
    bytes.extend(resource.to_ne_bytes());
    bytes.extend(body);
    bytes
}

/// struct nlattr and its payload, filled up to a whole word. A payload too long for its length field
/// (none of ours comes near) is refused by the kernel, because the attribute then claims too much.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity((4 + payload.len()).next_multiple_of(4));
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, attributes)
}

fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), &[0]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(
            attribute(3, b"abcde"),
            [9, 0, 3, 0, b'a', b'b', b'c', b'd', b'e', 0, 0, 0]
        );
        assert_eq!(nested(1, &attribute(2, &[])), [8, 0, 1, 0x80, 4, 0, 2, 0]);
    }

    #[test]
    fn a_message_tells_its_whole_length() {
        let bytes = message(0x0a0c, NLM_F_ACK, NFPROTO_INET, 0, 7, &[1, 2, 3, 4]);
        assert_eq!(
            bytes,
            [
                24, 0, 0, 0, 0x0c, 0x0a, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4
            ]
        );
    }

    #[test]
    fn reads_every_answer_of_a_packet_and_survives_a_torn_one() {
        let answer = |sequence: u32, error: i32| {
            let mut bytes = vec![36, 0, 0, 0, 2, 0, 0, 0];
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(error.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        let packet = [answer(5, 0), answer(6, -2)].concat();
        assert_eq!(acknowledgements(&packet), [(5, 0), (6, -2)]);
        assert_eq!(acknowledgements(&packet[..50]), [(5, 0)]);
        let mut lying = answer(5, 0);
        lying[0] = 0;
        assert_eq!(acknowledgements(&lying)[0], (5, 0));
    }

    #[test]
    fn a_request_without_an_answer_was_refused() {
        assert_eq!(refusals(&[(5, 0), (6, 0)], 5, 2), []);
        assert_eq!(refusals(&[(5, 0)], 5, 2), [(0, Errno::ENODATA)]);
        assert_eq!(refusals(&[(5, 0), (6, -2)], 5, 2), [(1, Errno::ENOENT)]);
        // The batch's own frame: not one change, all of them.
        assert_eq!(refusals(&[(4, -1)], 5, 2), [(0, Errno::EPERM)]);
    }
}
