//! The one nftables table, `inet ostler`: what may go where.
//!
//! ```text
//!                    ┌ sources: which address may speak on which link
//! container → raw_in ┴→ forward → masquerade → outside     allowed, unless it goes to a container
//!                     └→ input                 → host      refused, but ICMP and answers
//! outside   → nat_in  ─→ forward               → container what `ports` maps, and answers
//! host      → nat_out ─→ (masquerade if 127/8) → container anything
//!                └ ports: host port → address and port
//! ```
//!
//! Its rules are the same for one instance and for a thousand: an instance is one element of
//! `sources` and one of `ports` for each mapped port, so what a packet costs does not grow. An accept
//! in this table is no accept in another's; see `foreign`.

use super::nfnetlink::Element;
use super::{Attached, Lease, link};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// The table's name, in the family `inet`.
pub(super) const TABLE: &str = "ostler";
/// Concatenation of link name and source address.
pub(super) const SOURCES: &str = "sources";
/// TCP port of the host to address and port of a container.
pub(super) const PORTS: &str = "ports";

/// Whether containers may open connections to the host itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HostAccess {
    Allowed,
    Refused,
}

/// What becomes of elements that nobody known has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elements {
    /// They stay: those of a former agent's containers, which may be alive.
    Kept,
    /// They go.
    Removed,
}

/// The input of one `nft -f -`, and so one transaction: there is no moment without the old or the new
/// rules. What is there already is added again without complaint, if its type is the same. `notes` are
/// names of chains that no packet passes.
pub(super) fn script(
    host: HostAccess,
    notes: &BTreeSet<String>,
    attached: &BTreeMap<String, Attached>,
    others: Elements,
) -> String {
    let host = match host {
        HostAccess::Allowed => "accept",
        HostAccess::Refused => "reject with icmpx admin-prohibited",
    };
    let mut text = String::from(
        "add table inet ostler\n\
         flush table inet ostler\n\
         add set inet ostler sources { type ifname . ipv4_addr; }\n\
         add map inet ostler ports { type inet_service : ipv4_addr . inet_service; }\n",
    );
    for (chain, hook) in CHAINS {
        let _ = writeln!(
            text,
            "add chain inet ostler {chain} {{ type {hook}; policy accept; }}"
        );
    }
    for note in notes {
        let _ = writeln!(text, "add chain inet ostler {note}");
    }
    for line in RULES.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let _ = writeln!(text, "add rule inet ostler {}", line.replace("$host", host));
    }
    if others == Elements::Removed {
        let _ = writeln!(
            text,
            "flush set inet ostler {SOURCES}\nflush map inet ostler {PORTS}"
        );
    }
    for attached in attached.values() {
        let [sources, ports] = split_elements(attached);
        for (set, elements) in [(SOURCES, sources), (PORTS, ports)] {
            for element in elements {
                let _ = writeln!(text, "add element inet ostler {set} {{ {element} }}");
            }
        }
    }
    text
}

/// The same without what a table of this name has now: its layout may be another.
pub(super) fn afresh(script: &str) -> String {
    ["add table inet ostler\ndelete table inet ostler\n", script].concat()
}

/// A container's elements, as `nft` writes them.
pub(super) fn elements(attached: &Attached) -> Vec<String> {
    split_elements(attached).concat()
}

/// Those of `sources`, those of `ports`.
fn split_elements(attached: &Attached) -> [Vec<String>; 2] {
    let (link, address) = (link::name(&attached.handle), attached.lease.container);
    let ports = attached.ports.iter();
    let ports = ports.map(|(outer, inner)| format!("{outer} : {address} . {inner}"));
    [vec![format!("\"{link}\" . {address}")], ports.collect()]
}

/// What `nft` lists, taken apart into the table and its elements, whose order is nobody's.
pub(super) fn split(listing: &str) -> (String, BTreeSet<String>) {
    let (mut table, mut elements) = (String::new(), BTreeSet::new());
    let mut inside = false;
    for line in listing.lines() {
        let first = line.trim().strip_prefix("elements = {");
        inside |= first.is_some();
        if inside {
            let rest = first.unwrap_or(line).trim();
            inside = !rest.ends_with('}');
            let all = rest.trim_end_matches('}').split(',').map(str::trim);
            elements.extend(all.filter(|one| !one.is_empty()).map(str::to_owned));
        } else {
            table.push_str(line);
            table.push('\n');
        }
    }
    (table, elements)
}

/// How many chains and rules there are after a script of [`script`].
pub(super) fn script_size(script: &str) -> (usize, usize) {
    let count = |what: &str| {
        let lines = script.lines();
        lines.filter(|line| line.starts_with(what)).count()
    };
    (count("add chain "), count("add rule "))
}

/// How many chains and rules `nft` lists.
pub(super) fn listing_size(listing: &str) -> (usize, usize) {
    let (mut chains, mut rules, mut inside) = (0, 0, false);
    for line in listing.lines().map(str::trim) {
        if line.ends_with('{') {
            inside = line.starts_with("chain ");
            chains += usize::from(inside);
        } else if line == "}" {
            inside = false;
        } else if inside && !line.starts_with("type ") {
            rules += 1;
        }
    }
    (chains, rules)
}

const CHAINS: [(&str, &str); 6] = [
    ("raw_in", "filter hook prerouting priority raw"),
    ("nat_in", "nat hook prerouting priority dstnat"),
    ("nat_out", "nat hook output priority -100"),
    ("nat_post", "nat hook postrouting priority srcnat"),
    ("forward", "filter hook forward priority filter"),
    ("input", "filter hook input priority filter"),
];

/// By chain, in order. Before connection tracking (`raw_in`) a reply to 127.0.0.1 still bears the
/// link's address, so whatever names 127/8 there was made up. `route_localnet`, which the replies
/// need, opens nothing because of that rule. A packet that tracking calls invalid would leave with
/// its private address. Nothing is keyed on the pool: what lives since an earlier configuration has
/// addresses outside of today's.
const RULES: &str = r#"
    raw_in iifname != "os-*" accept
    raw_in meta nfproto ipv6 drop
    raw_in ip daddr 127.0.0.0/8 drop
    raw_in iifname . ip saddr != @sources drop

    nat_in iifname != "os-*" meta nfproto ipv4 meta l4proto tcp fib daddr type local dnat ip to tcp dport map @ports
    nat_out meta nfproto ipv4 meta l4proto tcp fib daddr type local dnat ip to tcp dport map @ports
    nat_post oifname "os-*" ip saddr 127.0.0.0/8 masquerade
    nat_post iifname "os-*" oifname != "os-*" meta nfproto ipv4 masquerade

    forward iifname != "os-*" oifname != "os-*" accept
    forward ct state established,related accept
    forward ct state invalid drop
    forward iifname "os-*" oifname "os-*" reject with icmpx admin-prohibited
    forward iifname "os-*" accept
    forward ct status dnat accept
    forward reject with icmpx admin-prohibited

    input iifname != "os-*" accept
    input ct state established,related accept
    input ct state invalid drop
    input meta l4proto icmp accept
    input $host
"#;

/// Lets the container speak from its address, and from no other.
pub(super) fn source(handle: &str, lease: &Lease) -> Element {
    // An `ifname` is 16 bytes (IFNAMSIZ), filled up with zeros.
    let mut key = link::name(handle).into_bytes();
    key.resize(16, 0);
    key.extend(lease.container.octets());
    Element {
        set: SOURCES,
        key,
        data: None,
    }
}

/// Leads a TCP port of the host into the container.
pub(super) fn port(container: Ipv4Addr, outer: u16, inner: u16) -> Element {
    let mut data = container.octets().to_vec();
    data.extend(inner.to_be_bytes());
    data.extend([0, 0]);
    Element {
        set: PORTS,
        key: outer.to_be_bytes().to_vec(),
        data: Some(data),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testbed::{on_host, run};
    use super::*;

    fn lease() -> Lease {
        Lease {
            host: [10, 254, 0, 1].into(),
            container: [10, 254, 0, 2].into(),
            prefix: 30,
        }
    }

    #[test]
    fn elements_are_encoded_as_nft_does() {
        let element = source("0123456789a", &lease());
        assert_eq!(element.key, *b"os-0123456789a\0\0\x0a\xfe\0\x02");
        assert_eq!(element.data, None);
        let element = port(lease().container, 61_001, 8080);
        assert_eq!(element.key, [0xee, 0x49]);
        assert_eq!(element.data.unwrap(), [10, 254, 0, 2, 0x1f, 0x90, 0, 0]);
    }

    fn live() -> BTreeMap<String, Attached> {
        let attached = Attached {
            handle: "0123456789a".to_owned(),
            lease: lease(),
            ports: vec![(61_001, 8080)],
        };
        BTreeMap::from([(attached.handle.clone(), attached)])
    }

    #[test]
    fn the_script_fills_in_what_is_configured() {
        let kept = script(
            HostAccess::Refused,
            &BTreeSet::new(),
            &BTreeMap::new(),
            Elements::Kept,
        );
        assert!(kept.contains("inet ostler input reject with icmpx admin-prohibited\n"));
        assert!(!kept.contains('$') && !kept.contains("flush set") && !kept.contains("element"));
        let notes = BTreeSet::from(["a_note".to_owned()]);
        let filled = script(HostAccess::Allowed, &notes, &live(), Elements::Removed);
        assert!(filled.contains("inet ostler input accept\n"));
        assert!(filled.contains("add chain inet ostler a_note\n"));
        assert!(filled.ends_with(
            "flush set inet ostler sources\nflush map inet ostler ports\n\
             add element inet ostler sources { \"os-0123456789a\" . 10.254.0.2 }\n\
             add element inet ostler ports { 61001 : 10.254.0.2 . 8080 }\n"
        ));
    }

    #[test]
    fn a_listing_is_split_into_table_and_elements() {
        let listing = "table inet ostler {\n\
                       \tset sources {\n\
                       \t\ttype ifname . ipv4_addr\n\
                       \t\telements = { \"os-b\" . 10.254.0.6,\n\
                       \t\t\t     \"os-0123456789a\" . 10.254.0.2 }\n\
                       \t}\n\
                       \tmap ports {\n\
                       \t\telements = { 61001 : 10.254.0.2 . 8080, 61002 : 10.254.0.2 . 80 }\n\
                       \t}\n}\n";
        let (table, found) = split(listing);
        assert_eq!(
            table,
            "table inet ostler {\n\tset sources {\n\t\ttype ifname . ipv4_addr\n\t}\n\
             \tmap ports {\n\t}\n}\n"
        );
        assert_eq!(found.len(), 4);
        for attached in live().values() {
            assert!(elements(attached).iter().all(|one| found.contains(one)));
        }
    }

    #[test]
    fn a_listing_of_all_that_was_loaded_is_as_large_as_the_script() {
        use super::super::program;
        on_host(|| async {
            let notes = BTreeSet::from(["a_note".to_owned(), "found/2/filter/FORWARD".to_owned()]);
            let script = script(HostAccess::Refused, &notes, &live(), Elements::Removed);
            let listed = || {
                let listing = run("nft", "--stateless list table inet ostler");
                listing_size(&split(&listing).0)
            };
            program::run("nft", &["-f", "-"], &afresh(&script)).unwrap();
            let rules = RULES.lines().filter(|line| !line.trim().is_empty()).count();
            assert_eq!(script_size(&script), (8, rules));
            assert_eq!(listed(), script_size(&script));
            run("nft", "delete chain inet ostler a_note");
            assert_eq!(listed().0, 7);
            run("nft", "flush chain inet ostler raw_in");
            assert_eq!(listed().1, script_size(&script).1 - 4);
        });
    }
}
