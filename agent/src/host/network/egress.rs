//! What an instance may reach outside, as elements of hash tables: what a packet and a change cost
//! depends neither on the number of instances nor on that of rules.
//!
//! The kernel has sets of ranges, but to take one element out of a large one takes it milliseconds, and
//! rules overlap where its elements must not. So the rules of an instance become *regions*: ranges of
//! addresses that do not overlap, each with a class, a number of the instance's own. All addresses of a
//! class may be reached in the same ways (protocols, ports), which do not overlap either. Ranges become
//! prefixes, and a prefix is found by asking for it in all lengths: 32 of an address, 16 of a port.
//!
//! A prefix of 31 bits or less is written as its bits, a one, and zeros: `10.0.0.0/8` is 10.128.0.0. So
//! prefixes of all lengths stand in one map. Those of full length, one address or one port, would be
//! mistaken for others; they stand in another. There is none of length 0: that is two of length 1.

use super::NetworkError;
use super::element::{Element, Part, Value};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Addresses without rules, who may reach whatever is not denied.
pub(super) const OPEN: &str = "open";
/// Source and destination address to the class of the region that the destination is alone in.
pub(super) const HOSTS: &str = "hosts";
/// The same for prefixes.
pub(super) const NETWORKS: &str = "networks";
/// Source, class, protocol and port to what becomes of it: [`PASSED`] or [`LOGGED`]. No verdict: for each
/// new one the kernel looks through all that there are, whether they lead round in a circle.
pub(super) const SERVICES: &str = "services";
/// The same for prefixes of ports.
pub(super) const SERVICE_RANGES: &str = "service_ranges";
/// Source and class to what becomes of what is not among the services.
pub(super) const EVERYTHING: &str = "everything";
/// It may pass.
pub(super) const PASSED: u16 = 1;
/// It may pass and is logged.
pub(super) const LOGGED: u16 = 2;

/// Most rules of one instance.
pub const RULES_MAX: usize = 1000;
/// Most elements that they may become.
const ELEMENTS_MAX: usize = 20_000;

pub(super) const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// One thing that an instance may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressRule {
    /// First and last address.
    pub destination: (Ipv4Addr, Ipv4Addr),
    /// What may go there.
    pub traffic: Traffic,
    /// Whether the kernel logs each new connection.
    pub log: bool,
}

/// Protocols, and what narrows them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Traffic {
    /// Everything.
    All,
    /// These TCP ports, first and last; all if empty.
    Tcp(Vec<(u16, u16)>),
    /// These UDP ports, first and last; all if empty.
    Udp(Vec<(u16, u16)>),
    /// This ICMP type and code; `None` is any.
    Icmp(Option<u8>, Option<u8>),
}

/// Who may do what, where a rule of the instance says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Posture {
    /// An instance without rules may reach everything outside; one with rules what they name.
    #[default]
    Open,
    /// An instance without rules may reach nothing.
    Closed,
}

/// The ways in which a region may be reached. They do not overlap.
#[derive(Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Ways {
    services: Vec<Service>,
    /// What is not among the services; `None`: not at all.
    everything: Option<Noted>,
}

/// A protocol, and first and last port. The port of ICMP is type and code.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Service {
    protocol: u8,
    ports: (u16, u16),
    noted: Noted,
}

/// Whether what passes is logged. A logging rule wins, as with Warden, where they stood at the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Noted {
    No,
    Yes,
}

impl Noted {
    fn value(self) -> Value {
        Value::Parts(vec![Part::Class(match self {
            Self::No => PASSED,
            Self::Yes => LOGGED,
        })])
    }
}

impl EgressRule {
    /// Whether it lets something pass there. The port of ICMP is type and code.
    pub(super) fn names(&self, to: Ipv4Addr, protocol: u8, port: u16) -> bool {
        let [kind, code] = port.to_be_bytes();
        let inside = |ports: &Vec<(u16, u16)>| {
            ports.is_empty() || ports.iter().any(|(a, b)| (*a..=*b).contains(&port))
        };
        (self.destination.0..=self.destination.1).contains(&to)
            && match &self.traffic {
                Traffic::All => true,
                Traffic::Tcp(ports) => protocol == TCP && inside(ports),
                Traffic::Udp(ports) => protocol == UDP && inside(ports),
                Traffic::Icmp(k, c) => {
                    protocol == ICMP && k.is_none_or(|k| k == kind) && c.is_none_or(|c| c == code)
                }
            }
    }
}

/// The elements that say what `container` may reach by its rules.
///
/// # Errors
/// [`NetworkError::TooManyRules`]
pub(super) fn elements(
    container: Ipv4Addr,
    rules: &[EgressRule],
    posture: Posture,
) -> Result<Vec<Element>, NetworkError> {
    let source = Part::Address(container);
    if rules.is_empty() {
        let open = Element {
            set: OPEN,
            key: vec![source],
            value: Value::None,
        };
        return Ok(match posture {
            Posture::Open => vec![open],
            Posture::Closed => Vec::new(),
        });
    }
    if rules.len() > RULES_MAX {
        return Err(NetworkError::TooManyRules);
    }
    let mut elements = Vec::new();
    let mut classes: BTreeMap<Ways, u16> = BTreeMap::new();
    for (first, last, ways) in regions(rules) {
        let next = u16::try_from(classes.len() + 1).map_err(|_| NetworkError::TooManyRules)?;
        let class = *classes.entry(ways).or_insert(next);
        for (bits, length) in prefixes(first, last, 32) {
            let address = Part::Address(Ipv4Addr::from_bits(marked(bits, length, 32)));
            elements.push(Element {
                set: if length == 32 { HOSTS } else { NETWORKS },
                key: vec![source.clone(), address],
                value: Value::Parts(vec![Part::Class(class)]),
            });
        }
    }
    for (ways, class) in &classes {
        // Not after all were made: classes and their services multiply.
        if elements.len() > ELEMENTS_MAX {
            break;
        }
        elements.extend(of_class(&source, *class, ways));
    }
    if elements.len() > ELEMENTS_MAX {
        return Err(NetworkError::TooManyRules);
    }
    Ok(elements)
}

fn of_class(source: &Part, class: u16, ways: &Ways) -> Vec<Element> {
    let key = [source.clone(), Part::Class(class)];
    let everything = ways.everything.map(|noted| Element {
        set: EVERYTHING,
        key: key.to_vec(),
        value: noted.value(),
    });
    let mut elements: Vec<_> = everything.into_iter().collect();
    for service in &ways.services {
        let (first, last) = service.ports;
        for (bits, length) in prefixes(first.into(), last.into(), 16) {
            let port = u16::try_from(marked(bits, length, 16)).unwrap_or(u16::MAX);
            let rest = [Part::Protocol(service.protocol), Part::Port(port)];
            elements.push(Element {
                set: if length == 16 {
                    SERVICES
                } else {
                    SERVICE_RANGES
                },
                key: [key.clone(), rest].concat(),
                value: service.noted.value(),
            });
        }
    }
    elements
}

/// First and last address of ranges that do not overlap, and how each may be reached.
fn regions(rules: &[EgressRule]) -> Vec<(u32, u32, Ways)> {
    let range = |rule: &EgressRule| {
        let (first, last) = rule.destination;
        (u64::from(first.to_bits()), u64::from(last.to_bits()) + 1)
    };
    let borders: BTreeSet<u64> = rules.iter().map(range).flat_map(|(a, b)| [a, b]).collect();
    let mut regions: Vec<(u32, u32, Ways)> = Vec::new();
    for (from, to) in borders.iter().zip(borders.iter().skip(1)) {
        let covers = |rule: &&EgressRule| range(rule).0 <= *from && *to <= range(rule).1;
        let ways = ways(rules.iter().filter(covers));
        // Both are addresses: the last border is one beyond.
        let (Ok(first), Ok(last)) = (u32::try_from(*from), u32::try_from(to - 1)) else {
            continue;
        };
        if ways == Ways::default() {
            continue;
        }
        match regions.last_mut() {
            Some((_, end, same)) if u64::from(*end) + 1 == *from && *same == ways => *end = last,
            _ => regions.push((first, last, ways)),
        }
    }
    regions
}

fn ways<'a>(rules: impl Iterator<Item = &'a EgressRule>) -> Ways {
    let mut everything = None;
    let mut by_protocol: BTreeMap<u8, Vec<(u16, u16, Noted)>> = BTreeMap::new();
    for rule in rules {
        let noted = if rule.log { Noted::Yes } else { Noted::No };
        let all = [(0, u16::MAX)];
        let (protocol, ports) = match &rule.traffic {
            Traffic::All => {
                everything = everything.max(Some(noted));
                continue;
            }
            Traffic::Tcp(ports) if ports.is_empty() => (TCP, all.to_vec()),
            Traffic::Udp(ports) if ports.is_empty() => (UDP, all.to_vec()),
            Traffic::Tcp(ports) => (TCP, ports.clone()),
            Traffic::Udp(ports) => (UDP, ports.clone()),
            Traffic::Icmp(kind, code) => (ICMP, messages(*kind, *code)),
        };
        let ports = ports.iter().map(|&(first, last)| (first, last, noted));
        by_protocol.entry(protocol).or_default().extend(ports);
    }
    // What passes anyway, and as it would pass anyway, need not be named.
    let tells = |noted: Noted| everything.is_none_or(|anyway| noted > anyway);
    let mut services = Vec::new();
    for (protocol, ranges) in by_protocol {
        let all = disjoint(&ranges).into_iter();
        let all = all.filter(|(_, _, noted)| tells(*noted));
        services.extend(all.map(|(first, last, noted)| Service {
            protocol,
            ports: (first, last),
            noted,
        }));
    }
    Ways {
        services,
        everything,
    }
}

/// ICMP types and codes as ranges of `type * 256 + code`.
fn messages(kind: Option<u8>, code: Option<u8>) -> Vec<(u16, u16)> {
    let kinds = kind.map_or(0..=u8::MAX, |kind| kind..=kind);
    match (kind, code) {
        (None, None) => vec![(0, u16::MAX)],
        (_, Some(code)) => kinds
            .map(|kind| u16::from_be_bytes([kind, code]))
            .map(|one| (one, one))
            .collect(),
        (Some(kind), None) => vec![(
            u16::from_be_bytes([kind, 0]),
            u16::from_be_bytes([kind, u8::MAX]),
        )],
    }
}

/// The union of ranges, in pieces that do not overlap.
fn disjoint(ranges: &[(u16, u16, Noted)]) -> Vec<(u16, u16, Noted)> {
    let borders = ranges.iter();
    let borders = borders.flat_map(|(first, last, _)| [u32::from(*first), u32::from(*last) + 1]);
    let borders: BTreeSet<u32> = borders.collect();
    let mut pieces: Vec<(u16, u16, Noted)> = Vec::new();
    for (from, to) in borders.iter().zip(borders.iter().skip(1)) {
        let (Ok(first), Ok(last)) = (u16::try_from(*from), u16::try_from(to - 1)) else {
            continue;
        };
        let covers = |range: &&(u16, u16, Noted)| range.0 <= first && last <= range.1;
        let Some(noted) = ranges.iter().filter(covers).map(|range| range.2).max() else {
            continue;
        };
        match pieces.last_mut() {
            Some((_, end, same)) if u32::from(*end) + 1 == *from && *same == noted => *end = last,
            _ => pieces.push((first, last, noted)),
        }
    }
    pieces
}

/// The prefixes, of `width` bits at most and one at least, that make up the numbers from `first` to
/// `last`: bits and length.
fn prefixes(first: u32, last: u32, width: u32) -> Vec<(u32, u32)> {
    let (mut next, end) = (u64::from(first), u64::from(last) + 1);
    let mut prefixes = Vec::new();
    while next < end {
        // As large as where it begins allows, and as what is left.
        let aligned = next.trailing_zeros().min(width - 1);
        let left = (end - next).ilog2();
        let size = aligned.min(left);
        prefixes.push((u32::try_from(next).unwrap_or(u32::MAX), width - size));
        next += 1 << size;
    }
    prefixes
}

/// A prefix as a number that says its length, too: where bits are left, the first of them is one.
pub(super) fn marked(bits: u32, length: u32, width: u32) -> u32 {
    bits | mark(length, width)
}

/// The one behind a prefix of this length; 0 if there is no room.
pub(super) fn mark(length: u32, width: u32) -> u32 {
    (width - length)
        .checked_sub(1)
        .map_or(0, |place| 1 << place)
}

#[cfg(test)]
mod tests {
    use super::super::element::encode;
    use super::*;

    fn rule(first: &str, last: &str, traffic: Traffic, log: bool) -> EgressRule {
        EgressRule {
            destination: (first.parse().unwrap(), last.parse().unwrap()),
            traffic,
            log,
        }
    }

    type Table = BTreeMap<(&'static str, Vec<u8>), Value>;

    fn table(elements: &[Element]) -> Table {
        let all = elements.iter();
        all.map(|one| ((one.set, one.encoded().1), one.value.clone()))
            .collect()
    }

    /// As the chains of the table look a packet up.
    fn verdict(table: &Table, to: Ipv4Addr, protocol: u8, port: u16) -> Option<u16> {
        let source = Part::Address([10, 254, 0, 2].into());
        let find = |set, key: Vec<Part>| table.get(&(set, encode(&key)));
        let goto = |value: Option<&Value>| match value {
            Some(Value::Parts(parts)) => match parts[..] {
                [Part::Class(what)] => Some(what),
                _ => None,
            },
            _ => None,
        };
        let ladder = |number: u32, width: u32| {
            (1..width).rev().map(move |length| {
                let kept = u32::MAX << (width - length);
                (number & kept) ^ mark(length, width)
            })
        };
        let address = |bits| vec![source.clone(), Part::Address(Ipv4Addr::from_bits(bits))];
        let region = find(HOSTS, address(to.to_bits()))
            .or_else(|| ladder(to.to_bits(), 32).find_map(|bits| find(NETWORKS, address(bits))));
        let Some(Value::Parts(class)) = region else {
            return None;
        };
        let service = |port: u32| {
            let port = Part::Port(u16::try_from(port & 0xffff).unwrap());
            let rest = vec![Part::Protocol(protocol), port];
            [vec![source.clone()], class.clone(), rest].concat()
        };
        goto(find(SERVICES, service(port.into())))
            .or_else(|| {
                let mut ports = ladder(port.into(), 16);
                goto(ports.find_map(|port| find(SERVICE_RANGES, service(port))))
            })
            .or_else(|| goto(find(EVERYTHING, [vec![source], class.clone()].concat())))
    }

    fn elements_of(rules: &[EgressRule]) -> Vec<Element> {
        elements([10, 254, 0, 2].into(), rules, Posture::Open).unwrap()
    }

    #[test]
    fn a_range_is_the_fewest_prefixes_none_of_length_zero() {
        assert_eq!(prefixes(0, u32::MAX, 32), [(0, 1), (1 << 31, 1)]);
        assert_eq!(prefixes(0, 0xffff, 16), [(0, 1), (1 << 15, 1)]);
        assert_eq!(prefixes(80, 80, 16), [(80, 16)]);
        assert_eq!(prefixes(u32::MAX, u32::MAX, 32), [(u32::MAX, 32)]);
        assert_eq!(prefixes(1, 4, 16), [(1, 16), (2, 15), (4, 16)]);
        assert_eq!(prefixes(1, u32::MAX - 1, 32).len(), 62);
    }

    #[test]
    fn prefixes_of_all_lengths_are_different_numbers() {
        assert_eq!(
            Ipv4Addr::from_bits(marked(0x0a00_0000, 8, 32)),
            Ipv4Addr::new(10, 128, 0, 0)
        );
        let all: BTreeSet<u32> = (1..32).map(|length| marked(0, length, 32)).collect();
        assert_eq!(all.len(), 31);
        assert_eq!(marked(0xffff, 16, 16), 0xffff);
    }

    /// What the rules say, one after the other.
    fn straight(rules: &[EgressRule], to: Ipv4Addr, protocol: u8, port: u16) -> Option<u16> {
        let matches = |rule: &&EgressRule| rule.names(to, protocol, port);
        let log = rules.iter().filter(matches).map(|rule| rule.log).max();
        log.map(|log| if log { LOGGED } else { PASSED })
    }

    /// Rules that overlap in every way.
    fn overlapping() -> [EgressRule; 12] {
        [
            rule(
                "10.0.0.0",
                "10.0.0.255",
                Traffic::Tcp(vec![(80, 80), (443, 443)]),
                false,
            ),
            rule(
                "10.0.0.7",
                "10.0.1.3",
                Traffic::Tcp(vec![(79, 1024), (100, 2000)]),
                false,
            ),
            rule("10.0.0.9", "10.0.0.9", Traffic::Tcp(vec![(443, 443)]), true),
            rule("10.0.0.128", "10.0.0.255", Traffic::Udp(Vec::new()), false),
            rule(
                "0.0.0.0",
                "255.255.255.255",
                Traffic::Udp(vec![(53, 53)]),
                false,
            ),
            rule(
                "10.0.0.0",
                "10.0.0.31",
                Traffic::Icmp(Some(8), Some(0)),
                false,
            ),
            rule("10.0.0.16", "10.0.0.31", Traffic::Icmp(Some(3), None), true),
            rule(
                "10.0.0.250",
                "10.0.0.250",
                Traffic::Icmp(None, Some(4)),
                false,
            ),
            rule("192.0.2.7", "192.0.2.9", Traffic::All, false),
            rule("192.0.2.8", "192.0.2.8", Traffic::Tcp(vec![(22, 22)]), true),
            rule(
                "192.0.2.8",
                "192.0.2.8",
                Traffic::Tcp(vec![(25, 25)]),
                false,
            ),
            rule("192.0.2.9", "192.0.2.9", Traffic::All, true),
        ]
    }

    #[test]
    fn every_packet_gets_what_the_rules_say_however_they_overlap() {
        let rules = overlapping();
        let elements = elements_of(&rules);
        let table = table(&elements);
        assert_eq!(table.len(), elements.len(), "no key twice");
        let ports = [
            0, 4, 22, 25, 52, 53, 54, 78, 79, 80, 100, 443, 768, 800, 1024, 1025, 2000, 2001, 2048,
            2049, 65_535,
        ];
        let mut seen = BTreeSet::new();
        for high in [0x0a00_0000_u32, 0x0a00_0100, 0xc000_0200, 0xffff_ff00, 0] {
            // Around every border.
            let borders = [
                0, 3, 4, 6, 7, 8, 9, 10, 15, 16, 31, 32, 127, 128, 250, 251, 255,
            ];
            for low in borders {
                let to = Ipv4Addr::from_bits(high | low);
                for protocol in [ICMP, TCP, UDP, 47] {
                    for port in ports {
                        let shall = straight(&rules, to, protocol, port);
                        let found = verdict(&table, to, protocol, port);
                        assert_eq!(found, shall, "{to} {protocol} {port}");
                        seen.insert(found);
                    }
                }
            }
        }
        assert_eq!(seen.len(), 3, "all verdicts were tried");
    }

    #[test]
    fn rules_that_say_the_same_are_few_elements() {
        let one = rule("0.0.0.0", "255.255.255.255", Traffic::All, false);
        assert_eq!(elements_of(std::slice::from_ref(&one)).len(), 3);
        let more = rule(
            "10.0.0.0",
            "10.255.255.255",
            Traffic::Tcp(vec![(1, 9)]),
            false,
        );
        assert_eq!(elements_of(&[one.clone(), more.clone(), one]).len(), 3);
        // The most that one range can be, and one port.
        let widest = rule(
            "0.0.0.1",
            "255.255.255.254",
            Traffic::Tcp(vec![(80, 80)]),
            false,
        );
        assert_eq!(elements_of(&[widest]).len(), 63);
    }

    #[test]
    fn without_rules_the_posture_decides() {
        let address = Ipv4Addr::new(10, 254, 0, 2);
        let open = elements(address, &[], Posture::Open).unwrap();
        assert_eq!(open.len(), 1);
        assert_eq!(open[0].to_string(), "10.254.0.2");
        assert!(elements(address, &[], Posture::Closed).unwrap().is_empty());
    }

    #[test]
    fn more_rules_than_the_table_is_meant_for_are_refused() {
        let many: Vec<_> = (0..=1000_u32)
            .map(|n| EgressRule {
                destination: (Ipv4Addr::from_bits(n), Ipv4Addr::from_bits(n)),
                traffic: Traffic::All,
                log: false,
            })
            .collect();
        let refused = elements([10, 254, 0, 2].into(), &many, Posture::Open);
        assert!(matches!(refused, Err(NetworkError::TooManyRules)));
        assert!(elements([10, 254, 0, 2].into(), &many[1..], Posture::Open).is_ok());

        // Few rules whose product is large: each host has a message of its own, and all the ports.
        let mut product: Vec<_> = (0..200_u8)
            .map(|n| EgressRule {
                destination: ([192, 0, 2, n].into(), [192, 0, 2, n].into()),
                traffic: Traffic::Icmp(Some(n), Some(0)),
                log: false,
            })
            .collect();
        let ports = (0..200).map(|n| (2 * n + 1, 2 * n + 1)).collect();
        product.push(EgressRule {
            destination: ([0, 0, 0, 0].into(), [255, 255, 255, 255].into()),
            traffic: Traffic::Tcp(ports),
            log: false,
        });
        let refused = elements([10, 254, 0, 2].into(), &product, Posture::Open);
        assert!(matches!(refused, Err(NetworkError::TooManyRules)));
    }
}
