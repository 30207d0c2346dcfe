//! Elements of the table's sets and maps, in the kernel's words and in those of `nft`.

use std::fmt::{self, Display, Formatter};
use std::net::Ipv4Addr;

/// One element of a set or map of an `inet` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// The set or map.
    pub(super) set: &'static str,
    /// More than one part: a concatenation.
    pub(super) key: Vec<Part>,
    /// What comes with the key.
    pub(super) value: Value,
}

/// What comes with a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// Nothing: an element of a set.
    None,
    /// What a map leads to.
    Parts(Vec<Part>),
    /// The element is only matched beyond this many bytes per second.
    Over(u64),
}

/// A part of a key or of a map's data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// A link's name (`ifname`).
    Link(String),
    /// `ipv4_addr`
    Address(Ipv4Addr),
    /// `classid`, the type of `meta priority`; of its two halves the lower.
    Class(u16),
    /// `inet_proto`
    Protocol(u8),
    /// `inet_service`
    Port(u16),
}

/// As the kernel has an element: the set, the key, and what comes with it (data, or rate).
pub(super) type Encoded = (&'static str, Vec<u8>, Vec<u8>);

impl Element {
    /// To compare with what the kernel says.
    pub(super) fn encoded(&self) -> Encoded {
        let value = match &self.value {
            Value::None => Vec::new(),
            Value::Parts(parts) => encode(parts),
            Value::Over(rate) => rate.to_be_bytes().to_vec(),
        };
        (self.set, encode(&self.key), value)
    }
}

/// Parts of a concatenation each fill whole words of 4 bytes.
pub(super) fn encode(parts: &[Part]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Link(name) => {
                // An `ifname` is 16 bytes (IFNAMSIZ), filled up with zeros.
                bytes.extend(name.as_bytes());
                bytes.resize(bytes.len().next_multiple_of(16), 0);
            }
            Part::Address(address) => bytes.extend(address.octets()),
            // The only one in the host's byte order.
            Part::Class(class) => bytes.extend(u32::from(*class).to_ne_bytes()),
            Part::Protocol(number) => bytes.push(*number),
            Part::Port(port) => bytes.extend(port.to_be_bytes()),
        }
        if parts.len() > 1 {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

/// How many bytes more than its rate a limit lets pass at once, beside those of one second. More than the
/// 64 KiB that a container sends as one packet: what is larger than the bucket would never pass.
pub(super) const BURST: u32 = 128 << 10;

impl Display for Element {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Joined(&self.key))?;
        match &self.value {
            Value::None => Ok(()),
            Value::Parts(parts) => write!(f, " : {}", Joined(parts)),
            Value::Over(rate) => write!(
                f,
                " limit rate over {rate} bytes/second burst {BURST} bytes"
            ),
        }
    }
}

struct Joined<'a>(&'a [Part]);

impl Display for Joined<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, part) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(" . ")?;
            }
            match part {
                Part::Link(name) => write!(f, "\"{name}\"")?,
                Part::Address(address) => write!(f, "{address}")?,
                Part::Class(class) => write!(f, "0:{class:x}")?,
                Part::Protocol(number) => write!(f, "{number}")?,
                Part::Port(port) => write!(f, "{port}")?,
            }
        }
        Ok(())
    }
}
