//! Changes of nftables over netlink: a batch of messages that the kernel applies whole or not at all.
//!
//! A batch is `BATCH_BEGIN`, the changes, `BATCH_END`, sent in one packet. The kernel works it off
//! inside `sendmsg` (some 50 µs, but others' transactions go first), so every answer lies in the socket
//! when the call returns, one for each message. A message has one element or many. Numbers are those of linux/netfilter/{nfnetlink,nf_tables}.h.

use super::NetworkError;
use super::decode::{self, Chain, NFPROTO_INET, RulePlace, messages};
use super::element::{BURST, Element, Encoded, Value, encode};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname,
    recv, sendto, setsockopt, socket, sockopt,
};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_UNSPEC: u8 = 0;

const NLM_F_REQUEST: u16 = 0x1;
pub(super) const NLM_F_ACK: u16 = 0x4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;

const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_DELSETELEM: u16 = 14;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_EXPR: u16 = 7;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_LIMIT_RATE: u16 = 1;
const NFTA_LIMIT_UNIT: u16 = 2;
const NFTA_LIMIT_BURST: u16 = 3;
const NFTA_LIMIT_TYPE: u16 = 4;
const NFTA_LIMIT_FLAGS: u16 = 5;
const NFT_LIMIT_PKT_BYTES: u32 = 1;
/// Matches what is over the limit.
const NFT_LIMIT_F_INV: u32 = 1;

/// How many changes one transaction has at most, where they need not be one: for each the kernel keeps
/// an answer, and the socket has room for some 250 (net.core.rmem_default).
pub(super) const CHANGES_MAX: usize = 100;

/// How many bytes of elements one message has at most: their list says its length in 16 bits.
const LIST_MAX: usize = 32 << 10;

/// How much may be sent at once: all that one container may have, and once more what that replaces, come to
/// a quarter.
const SEND_MAX: usize = 8 << 20;

/// Elements that go and others that come in one transaction.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// What is there and shall not be.
    pub(super) removed: Vec<Encoded>,
    /// What shall be and is not there.
    pub(super) added: Vec<Element>,
}

/// What a table is but for its sets: which chains it has, and which rules in which order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    dormant: bool,
    chains: Vec<Chain>,
    rules: Vec<RulePlace>,
}

impl Layout {
    /// How many chains and rules there are.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.chains.len(), self.rules.len())
    }

    /// Whether packets come to any of it.
    pub(super) fn acts(&self) -> bool {
        !self.dormant && self.chains.iter().any(Chain::is_base)
    }
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

/// A socket to ask the kernel's parts of netfilter something.
#[derive(Debug)]
pub(super) struct Socket {
    descriptor: OwnedFd,
    /// The number of the next request.
    pub(super) sequence: u32,
}

impl Nftables {
    /// A socket for changes of the `inet` table of this name.
    pub(super) fn open(table: &'static str) -> Result<Self, NetworkError> {
        let socket = Socket::open().map_err(|errno| refused("open a socket to", table, errno))?;
        Ok(Self {
            table,
            socket: Mutex::new(socket),
        })
    }

    /// The number by which the kernel knows the socket.
    pub(super) fn port(&self) -> Result<u32, NetworkError> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let address = getsockname::<NetlinkAddr>(socket.descriptor.as_raw_fd());
        let address = address.map_err(|errno| refused("open a socket to", self.table, errno))?;
        Ok(address.pid())
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

    /// Makes a difference, wholly or not at all, however many elements it is. Fails where one that goes is
    /// not there.
    pub(super) fn change(&self, difference: &Difference) -> Result<(), NetworkError> {
        let removed = difference.removed.iter();
        let removed = removed.map(|(set, key, _)| (*set, removal(key)));
        let mut changes = self.lists(NFT_MSG_DELSETELEM, removed);
        let added = difference.added.iter();
        let added = added.map(|element| (element.set, addition(element)));
        changes.extend(self.lists(NFT_MSG_NEWSETELEM, added));
        match self.transact(&changes).into_iter().next() {
            None => Ok(()),
            Some((_, errno)) => Err(refused("change elements of", self.table, errno)),
        }
    }

    /// Messages that have as many elements as there is room for: each is acknowledged but once.
    fn lists(
        &self,
        kind: u16,
        elements: impl Iterator<Item = (&'static str, Vec<u8>)>,
    ) -> Vec<Change> {
        let mut sets: BTreeMap<&'static str, Vec<Vec<u8>>> = BTreeMap::new();
        for (set, element) in elements {
            let lists = sets.entry(set).or_default();
            match lists.last_mut() {
                Some(list) if list.len() + element.len() <= LIST_MAX => list.extend(element),
                _ => lists.push(element),
            }
        }
        let lists = sets.iter();
        let lists = lists.flat_map(|(set, lists)| lists.iter().map(move |list| (*set, list)));
        lists
            .map(|(set, list)| self.list(kind, set, list))
            .collect()
    }

    /// Puts an element in the place of the one with the same key, in one transaction.
    pub(super) fn replace(&self, element: &Element) -> Result<(), NetworkError> {
        let changes =
            [NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM].map(|kind| self.element(kind, element));
        match self.transact(&changes).into_iter().next() {
            None => Ok(()),
            Some((0, Errno::ENOENT)) => self.add(std::slice::from_ref(element)),
            Some((_, errno)) => Err(refused("replace an element of", self.table, errno)),
        }
    }

    /// All elements of these sets and maps.
    pub(super) fn elements(&self, sets: &[&'static str]) -> Result<Vec<Encoded>, NetworkError> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for &set in sets {
            let attributes = [
                attribute(NFTA_SET_ELEM_LIST_TABLE, &text(self.table)),
                attribute(NFTA_SET_ELEM_LIST_SET, &text(set)),
            ];
            let (kind, body) = (nftables(NFT_MSG_GETSETELEM), attributes.concat());
            let listed = socket.dump(kind, NFPROTO_INET, &body, |body| {
                Some(decode::elements(body))
            });
            let listed =
                listed.map_err(|errno| refused("list the elements of", self.table, errno))?;
            let all = listed.into_iter().flatten();
            found.extend(all.map(|(key, value)| (set, key, value)));
        }
        Ok(found)
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

    /// As long as this is held, nobody gets an answer.
    #[cfg(test)]
    pub(super) fn hold(&self) -> std::sync::MutexGuard<'_, Socket> {
        self.socket.lock().unwrap()
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

    /// What the table is now. An absent one has nothing.
    pub(super) fn layout(&self) -> Result<Layout, NetworkError> {
        let mut chains = self.chains()?;
        chains.retain(|chain| chain.is_in(self.table));
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |errno| refused("list", self.table, errno);
        let dormant = |body: &[u8]| {
            let table = decode::table(body)?;
            (table == (NFPROTO_INET, self.table.to_owned())).then(|| decode::is_dormant(body))
        };
        let dormant = socket.dump(nftables(NFT_MSG_GETTABLE), NFPROTO_INET, &[], dormant);
        let body = attribute(NFTA_RULE_TABLE, &text(self.table));
        let kind = nftables(NFT_MSG_GETRULE);
        let rules = socket.dump(kind, NFPROTO_INET, &body, RulePlace::parse);
        Ok(Layout {
            dormant: dormant.map_err(told)?.contains(&true),
            chains,
            rules: rules.map_err(told)?,
        })
    }

    /// All chains of all tables in the namespace.
    pub(super) fn chains(&self) -> Result<Vec<Chain>, NetworkError> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = nftables(NFT_MSG_GETCHAIN);
        let listed = socket.dump(kind, NFPROTO_UNSPEC, &[], Chain::parse);
        listed.map_err(|errno| refused("list the chains beside", self.table, errno))
    }

    fn element(&self, kind: u16, element: &Element) -> Change {
        let content = match kind {
            NFT_MSG_NEWSETELEM => addition(element),
            _ => removal(&encode(&element.key)),
        };
        self.list(kind, element.set, &content)
    }

    /// A change of the elements in a list.
    fn list(&self, kind: u16, set: &str, list: &[u8]) -> Change {
        let attributes = [
            attribute(NFTA_SET_ELEM_LIST_TABLE, &text(self.table)),
            attribute(NFTA_SET_ELEM_LIST_SET, &text(set)),
            nested(NFTA_SET_ELEM_LIST_ELEMENTS, list),
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
    /// One in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, Errno> {
        let descriptor = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // Where it may not (CAP_NET_ADMIN of the host), what is large is refused (EMSGSIZE).
        let _ = setsockopt(&descriptor, sockopt::SndBufForce, &SEND_MAX);
        Ok(Self {
            descriptor,
            sequence: 0,
        })
    }

    /// Sends a packet of `count` requests numbered from `first` and collects the refusals. A request
    /// without any answer counts as refused.
    pub(super) fn exchange(
        &mut self,
        packet: &[u8],
        first: u32,
        count: usize,
    ) -> Vec<(usize, Errno)> {
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
            match self.receive(&mut buffer) {
                Ok(length) => answers.extend(acknowledgements(buffer.get(..length).unwrap_or(&[]))),
                Err(Errno::EAGAIN) => break,
                Err(errno) => return vec![(0, errno)],
            }
        }
        refusals(&answers, first, count)
    }
}

impl Socket {
    /// Asks for all objects of a kind. The kernel makes each part of the answer when the one before is
    /// taken, so there is always one until the last.
    pub(super) fn dump<T>(
        &mut self,
        kind: u16,
        family: u8,
        body: &[u8],
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Errno> {
        // While an earlier answer is not taken to its end, the kernel begins none (EBUSY).
        while self.receive(&mut [0; 4]).is_ok() {}
        let sequence = self.sequence;
        let request = message(kind, NLM_F_DUMP, family, 0, sequence, body);
        self.sequence = sequence.wrapping_add(1);
        let (descriptor, kernel) = (self.descriptor.as_raw_fd(), NetlinkAddr::new(0, 0));
        sendto(descriptor, &request, &kernel, MsgFlags::empty())?;
        let mut found = Vec::new();
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let length = self.receive(&mut buffer)?;
            let packet = buffer.get(..length).unwrap_or(&[]);
            if take_part(packet, sequence, &parse, &mut found)? == Part::Last {
                return Ok(found);
            }
        }
    }

    /// What lies in the socket; never waits.
    fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match recv(self.descriptor.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EINTR) => {}
                other => return other,
            }
        }
    }
}

/// Whether more of an answer comes.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    More,
    Last,
}

/// Takes a packet of the answer to the request of this number. What answers another, which was left
/// unread, is none.
fn take_part<T>(
    packet: &[u8],
    sequence: u32,
    parse: impl Fn(&[u8]) -> Option<T>,
    found: &mut Vec<T>,
) -> Result<Part, Errno> {
    for message in messages(packet).filter(|message| message.sequence == sequence) {
        match message.kind {
            NLMSG_DONE => return Ok(Part::Last),
            NLMSG_ERROR => {
                let error = message.body.first_chunk().copied();
                return Err(Errno::from_raw(-error.map_or(0, i32::from_ne_bytes)));
            }
            _ => found.extend(parse(message.body)),
        }
    }
    Ok(Part::More)
}

/// Which of `count` requests numbered from `first` were refused, or not answered at all. Answers to
/// others, which an earlier request left unread, do not count.
fn refusals(answers: &[(u32, i32)], first: u32, count: usize) -> Vec<(usize, Errno)> {
    let position =
        |sequence: u32| usize::try_from(sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
    // The batch's own frame has the numbers before and behind.
    let ours = |sequence: u32| position(sequence.wrapping_add(1)) < count.saturating_add(2);
    let mut refused: Vec<_> = answers
        .iter()
        .filter(|(sequence, error)| *error != 0 && ours(*sequence))
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

/// An element of a list of those that come.
fn addition(element: &Element) -> Vec<u8> {
    let bytes = |parts| attribute(NFTA_DATA_VALUE, &encode(parts));
    let mut content = nested(NFTA_SET_ELEM_KEY, &bytes(&element.key));
    content.extend(match &element.value {
        Value::None => Vec::new(),
        Value::Parts(parts) => nested(NFTA_SET_ELEM_DATA, &bytes(parts)),
        Value::Over(rate) => nested(NFTA_SET_ELEM_EXPR, &over(*rate)),
    });
    nested(NFTA_LIST_ELEM, &content)
}

/// An element of a list of those that go. It has the key only: whatever the map leads to, it goes.
fn removal(key: &[u8]) -> Vec<u8> {
    let key = nested(NFTA_SET_ELEM_KEY, &attribute(NFTA_DATA_VALUE, key));
    nested(NFTA_LIST_ELEM, &key)
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
pub(super) fn message(
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
pub(super) fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity((4 + payload.len()).next_multiple_of(4));
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

pub(super) fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, attributes)
}

fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), &[0]].concat()
}

/// A limit that matches beyond `rate` bytes per second. Its bucket holds those of a second and `BURST`.
fn over(rate: u64) -> Vec<u8> {
    let limit = [
        attribute(NFTA_LIMIT_RATE, &rate.to_be_bytes()),
        attribute(NFTA_LIMIT_UNIT, &1_u64.to_be_bytes()),
        attribute(NFTA_LIMIT_BURST, &BURST.to_be_bytes()),
        attribute(NFTA_LIMIT_TYPE, &NFT_LIMIT_PKT_BYTES.to_be_bytes()),
        attribute(NFTA_LIMIT_FLAGS, &NFT_LIMIT_F_INV.to_be_bytes()),
    ];
    [
        attribute(NFTA_EXPR_NAME, &text("limit")),
        nested(NFTA_EXPR_DATA, &limit.concat()),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::super::testbed::{on_host, run};
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
        assert_eq!(refusals(&[(7, -1)], 5, 2), [(0, Errno::EPERM)]);
    }

    #[test]
    fn answers_to_others_are_no_refusals() {
        for stale in [(3, -2), (8, -2), (3, 0)] {
            assert_eq!(refusals(&[stale, (5, 0), (6, 0)], 5, 2), []);
        }
        assert_eq!(refusals(&[(3, 0), (5, 0)], 5, 2), [(0, Errno::ENODATA)]);
        assert_eq!(refusals(&[(u32::MAX, 0), (0, 0)], u32::MAX, 2), []);
    }

    #[test]
    fn parts_of_another_answer_are_none_of_this_one() {
        let part = |kind: u16, sequence, body| message(kind, 0, 0, 0, sequence, body);
        let taken = |packet: &[u8]| {
            let mut found = Vec::new();
            let parse = |body: &[u8]| body.get(4).copied();
            let part = take_part(packet, 7, parse, &mut found);
            (part, found)
        };
        let stale = [part(20, 6, &[1; 4]), part(NLMSG_DONE, 6, &[])].concat();
        let ours = part(20, 7, &[2; 4]);
        assert_eq!(taken(&stale), (Ok(Part::More), vec![]));
        let both = [&stale[..], &ours].concat();
        assert_eq!(taken(&both), (Ok(Part::More), vec![2]));
        let end = [both, part(NLMSG_DONE, 7, &[]), ours].concat();
        assert_eq!(taken(&end), (Ok(Part::Last), vec![2]));
    }

    #[test]
    fn an_answer_that_nobody_took_is_not_taken_for_a_later_one() {
        on_host(|| async {
            run("nft", "add table inet t");
            run("nft", "add chain inet t first");
            let mut socket = Socket::open().unwrap();
            let chains = |socket: &mut Socket| {
                let kind = nftables(NFT_MSG_GETCHAIN);
                let all = socket.dump(kind, NFPROTO_UNSPEC, &[], Chain::parse);
                let all = all.unwrap().into_iter();
                all.map(|chain| chain.name).collect::<Vec<_>>()
            };
            // Asked for, and left.
            let kind = nftables(NFT_MSG_GETCHAIN);
            let request = message(kind, NLM_F_DUMP, NFPROTO_UNSPEC, 0, socket.sequence, &[]);
            socket.sequence += 1;
            let kernel = NetlinkAddr::new(0, 0);
            let descriptor = socket.descriptor.as_raw_fd();
            sendto(descriptor, &request, &kernel, MsgFlags::empty()).unwrap();
            run("nft", "rename chain inet t first second");
            assert_eq!(chains(&mut socket), ["second"]);
            assert_eq!(chains(&mut socket), ["second"]);
        });
    }
}
