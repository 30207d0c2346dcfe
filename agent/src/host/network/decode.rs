//! What the kernel says over nfnetlink, taken apart. Numbers are those of
//! linux/netfilter/{nfnetlink,nf_tables}.h.

pub(super) const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NF_INET_FORWARD: u32 = 2;
const NF_DROP: u32 = 0;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_DORMANT: u32 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_USE: u16 = 6;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_EXPR: u16 = 7;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_LIMIT_RATE: u16 = 1;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
/// Bits of an attribute's number that tell how it is encoded.
const NLA_FLAGS: u16 = 0xc000;

/// One message: struct nlmsghdr without the length, and what follows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    /// The port of the socket that asked for it; of an event, for what it tells of.
    pub(super) port: u32,
    pub(super) body: &'a [u8],
}

/// The messages of a received packet. Of a torn or lying one, what there is.
pub(super) fn messages(mut packet: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let (header, rest) = packet.split_first_chunk::<16>()?;
        let [l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, p0, p1, p2, p3] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let body = length.checked_sub(16).and_then(|length| rest.get(..length));
        let next = length.max(16).checked_next_multiple_of(4);
        packet = next.and_then(|next| packet.get(next..)).unwrap_or(&[]);
        Some(Message {
            kind: u16::from_ne_bytes([t0, t1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            port: u32::from_ne_bytes([p0, p1, p2, p3]),
            body: body.unwrap_or(rest),
        })
    })
}

/// Numbers and payloads of attributes (struct nlattr).
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[l0, l1, k0, k1], rest) = bytes.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let payload = rest.get(..length.checked_sub(4)?)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((u16::from_ne_bytes([k0, k1]) & !NLA_FLAGS, payload))
    })
}

/// The payload of the first attribute with this number.
pub(super) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, payload)| (found == kind).then_some(payload))
}

fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let text = find(bytes, kind)?.strip_suffix(&[0])?;
    Some(String::from_utf8_lossy(text).into_owned())
}

fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*find(bytes, kind)?.first_chunk()?))
}

/// The family and the attributes of a message's body: struct nfgenmsg goes before them.
fn split(body: &[u8]) -> Option<(u8, &[u8])> {
    let (&[family, ..], attributes) = body.split_first_chunk::<4>()?;
    Some((family, attributes))
}

/// Whether the chains of the table that a message is about do nothing (NFT_TABLE_F_DORMANT).
pub(super) fn is_dormant(body: &[u8]) -> bool {
    let flags = split(body).and_then(|(_, rest)| number(rest, NFTA_TABLE_FLAGS));
    flags.unwrap_or(0) & NFT_TABLE_F_DORMANT != 0
}

/// Family and name of the table that a message is about.
pub(super) fn table(body: &[u8]) -> Option<(u8, String)> {
    let (family, attributes) = split(body)?;
    Some((family, text(attributes, NFTA_TABLE_NAME)?))
}

/// Family and name of the table, and the name of the set, that a message about elements is about.
pub(super) fn set(body: &[u8]) -> Option<((u8, String), String)> {
    let (family, attributes) = split(body)?;
    let table = text(attributes, NFTA_SET_ELEM_LIST_TABLE)?;
    Some(((family, table), text(attributes, NFTA_SET_ELEM_LIST_SET)?))
}

/// Key and what comes with it (data, or rate) of the elements that a message is about.
pub(super) fn elements(body: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let list = split(body).and_then(|(_, rest)| find(rest, NFTA_SET_ELEM_LIST_ELEMENTS));
    attributes(list.unwrap_or(&[]))
        .filter_map(|(_, element)| {
            let key = find(find(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?;
            Some((key.to_vec(), value(element).unwrap_or_default()))
        })
        .collect()
}

fn value(element: &[u8]) -> Option<Vec<u8>> {
    if let Some(limit) = find(element, NFTA_SET_ELEM_EXPR) {
        return Some(find(find(limit, NFTA_EXPR_DATA)?, NFTA_LIMIT_RATE)?.to_vec());
    }
    let data = find(element, NFTA_SET_ELEM_DATA)?;
    find(data, NFTA_DATA_VALUE).map(<[u8]>::to_vec)
}

/// Where a rule is that a message is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RulePlace {
    family: u8,
    table: String,
    pub(super) chain: String,
    /// No other rule of the table ever has the same, and what a rule does never changes.
    pub(super) number: u64,
}

impl RulePlace {
    /// From the body of a message about a rule.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let (family, attributes) = split(body)?;
        Some(Self {
            family,
            table: text(attributes, NFTA_RULE_TABLE)?,
            chain: text(attributes, NFTA_RULE_CHAIN)?,
            number: find(attributes, NFTA_RULE_HANDLE)
                .and_then(|bytes| bytes.first_chunk().copied())
                .map_or(0, u64::from_be_bytes),
        })
    }

    /// Whether it is in the `inet` table of this name.
    pub(super) fn is_in(&self, table: &str) -> bool {
        self.family == NFPROTO_INET && self.table == table
    }

    /// Whether it is in a table of IPv4 alone, as those of `iptables` are.
    pub(super) fn is_ipv4(&self) -> bool {
        self.family == NFPROTO_IPV4
    }
}

/// A chain of some table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    family: u8,
    pub(super) table: String,
    pub(super) name: String,
    hook: Option<u32>,
    policy: Option<u32>,
    /// Of a base chain: how many rules it has. Of another one also how many lead to it.
    pub(super) uses: u32,
}

impl Chain {
    /// From the body of a message about a chain.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let (family, attributes) = split(body)?;
        let hook = find(attributes, NFTA_CHAIN_HOOK);
        Some(Self {
            family,
            table: text(attributes, NFTA_CHAIN_TABLE)?,
            name: text(attributes, NFTA_CHAIN_NAME)?,
            hook: hook.and_then(|hook| number(hook, NFTA_HOOK_HOOKNUM)),
            policy: number(attributes, NFTA_CHAIN_POLICY),
            uses: number(attributes, NFTA_CHAIN_USE).unwrap_or(0),
        })
    }

    /// Whether it is in the `inet` table of this name.
    pub(super) fn is_in(&self, table: &str) -> bool {
        self.family == NFPROTO_INET && self.table == table
    }

    /// Whether packets come to it by themselves.
    pub(super) fn is_base(&self) -> bool {
        self.hook.is_some()
    }

    /// Whether forwarded IPv4 packets come to it by themselves.
    pub(super) fn sees_forwarded(&self) -> bool {
        matches!(self.family, NFPROTO_INET | NFPROTO_IPV4) && self.hook == Some(NF_INET_FORWARD)
    }

    /// Whether it does anything to the packets that come to it by themselves.
    pub(super) fn acts(&self) -> bool {
        self.uses > 0 || self.policy == Some(NF_DROP)
    }

    /// The family's number as linux/netfilter.h has it.
    pub(super) fn family(&self) -> u8 {
        self.family
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_or_lying_attribute_ends_them() {
        let all: Vec<_> = attributes(&[5, 0, 3, 0x80, b'a', 0, 0, 0, 4, 0, 7, 0]).collect();
        assert_eq!(all, [(3, &b"a"[..]), (7, &[][..])]);
        for wrong in [&[3, 0, 1, 0][..], &[9, 0, 1, 0, 1, 2, 3, 4], &[4, 0, 1]] {
            assert_eq!(attributes(wrong).count(), 0, "{wrong:?}");
        }
    }

    #[test]
    fn a_message_ends_where_it_says() {
        let packet = [
            [18, 0, 0, 0, 3, 10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0].to_vec(),
            [16, 0, 0, 0, 5, 10, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0].to_vec(),
        ]
        .concat();
        let told = |packet| -> Vec<_> {
            let told = |message: Message<'_>| (message.kind, message.sequence, message.body.len());
            messages(packet).map(told).collect()
        };
        assert_eq!(told(&packet), [(0x0a03, 7, 2), (0x0a05, 8, 0)]);
        assert_eq!(told(&packet[..35]), [(0x0a03, 7, 2)]);
    }
}
