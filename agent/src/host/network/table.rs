//! The one nftables table, `inet ostler`: what may go where.
//!
//! ```text
//!                    ┌ sources: which address may speak on which link; rates: how much
//! container → raw_in ┴→ forward → outgoing → masquerade → outside   what `egress` says; to no container
//!                     └→ input                → host      refused, but ICMP, answers, what is configured
//! outside   → nat_in  ─→ forward               → container what `ports` maps, and answers
//! host      → nat_out ─→ (masquerade if 127/8) → container anything
//!                └ ports: host port → address and port
//! ```
//!
//! Its rules are the same for one instance and for a thousand: an instance is one element of
//! `sources`, one of `ports` for each mapped port, and what its egress rules are (`egress`), so what a
//! packet costs does not grow. An accept in this table is no accept in another's; see `foreign`.
//!
//! ```text
//! outgoing ┬ open? ───────────────▶ outside ─▶ allow, deny, no bridge of Docker's, else accepted
//!          └ hosts, networks ─▶ services (icmp) ─▶ anything ─▶ decided: passed, logged
//!                └──────── nothing of it ─────────────▶ unlisted ─▶ allow, else refused
//! whatever is accepted ─▶ admitted ─▶ so many at once, else crowded: refused
//! what comes to a mapped port ─▶ welcomed ─▶ so many at once, else swamped: dropped
//! ```

use super::conntrack::Connection;
use super::egress::{
    EVERYTHING, HOSTS, LOGGED, NETWORKS, OPEN, Posture, SERVICE_RANGES, SERVICES, mark,
};
use super::element::{Element, Encoded, Part, Value};
use super::{Attached, EgressRule, Lease, NetworkError, egress, link};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// The table's name, in the family `inet`.
pub(super) const TABLE: &str = "ostler";
/// Concatenation of link name and source address.
const SOURCES: &str = "sources";
/// TCP port of the host to address and port of a container.
const PORTS: &str = "ports";
/// Source addresses whose packets are dropped beyond a rate.
pub(super) const RATES: &str = "rates";

/// What containers have open: their addresses, each with the connections that the kernel counts for it.
const CONNECTIONS: &str = "connections";
/// How long what is closed is remembered.
const BRIEF: &str = "brief";
/// How many connections to the host or outside a container may have open at once. The kernel remembers
/// `nf_conntrack_max` in all, mostly 65,536 or 262,144, and drops what would be one more, whosever it is.
/// To count them it looks at each, once in a tick at most, and forgets eight that were closed: whoever
/// opens and closes more than those is refused, too.
pub(super) const CONNECTIONS_MAX: u32 = 4096;
/// For how many seconds a closed one, which is not counted, is remembered: the last packet of its end may
/// have to be sent again. Linux has 120.
const CLOSED_SECONDS: u32 = 5;

/// What others have open to containers: these containers' addresses, each with the connections that the kernel counts for it.
const VISITS: &str = "visits";
/// How long what others opened, or are about to, is remembered.
const VISIT: &str = "visit";
/// How many connections others may have open to a container at once, as [`CONNECTIONS_MAX`] for its own. More, because many
/// wait (web sockets) where an app serves many; not many more, because it is the host that pays for the count.
pub(super) const VISITS_MAX: u32 = 8192;
/// For how many seconds one is remembered that was not completed, from the last packet on. Linux has 120 and 60: whoever
/// completes none would need fewer packets to keep an app full. A server repeats its word after 1, 2, 4, 8.
const HALF_OPEN_SECONDS: u32 = 10;

/// How long what was asked of a name server is remembered.
const QUESTION: &str = "question";
/// For how many seconds, from the last packet on: a resolver waits 5 for an answer, mostly. Linux has 30, and an app
/// that asks for a name a hundred times a second, as one without a cache may, would have as many open as it may have.
const ASKED_SECONDS: u32 = 10;

/// Every set and map, with its type. `rates` wants a limit of its own, which no element has.
const SETS: [(&str, &str, &str); 9] = [
    ("set", SOURCES, "ifname . ipv4_addr"),
    ("map", PORTS, "inet_service : ipv4_addr . inet_service"),
    ("set", RATES, "ipv4_addr; limit rate over 1 bytes/second"),
    ("set", OPEN, "ipv4_addr"),
    ("map", HOSTS, "ipv4_addr . ipv4_addr : classid"),
    ("map", NETWORKS, "ipv4_addr . ipv4_addr : classid"),
    (
        "map",
        SERVICES,
        "ipv4_addr . classid . inet_proto . inet_service : classid",
    ),
    (
        "map",
        SERVICE_RANGES,
        "ipv4_addr . classid . inet_proto . inet_service : classid",
    ),
    ("map", EVERYTHING, "ipv4_addr . classid : classid"),
];

/// The names of all sets and maps.
pub(super) const SET_NAMES: [&str; 9] = [
    SOURCES,
    PORTS,
    RATES,
    OPEN,
    HOSTS,
    NETWORKS,
    SERVICES,
    SERVICE_RANGES,
    EVERYTHING,
];

/// What the operator lets containers do.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    /// What they may open connections to on the host itself.
    pub(super) host: HostAccess,
    /// What an instance without rules may do.
    pub(super) posture: Posture,
    /// First and last addresses outside that all may reach.
    pub(super) allow: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Those that nobody may reach without a rule of its own.
    pub(super) deny: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// How many connections others may have open to each at once.
    pub(super) visits: u32,
    /// Links with the host's own address or its way to the world: no bridges of Docker's, whatever they look like.
    pub(super) uplinks: BTreeSet<String>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            host: HostAccess::default(),
            posture: Posture::default(),
            allow: Vec::new(),
            deny: Vec::new(),
            visits: VISITS_MAX,
            uplinks: BTreeSet::new(),
        }
    }
}

/// What containers may open connections to on the host itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HostAccess {
    /// Everything.
    All,
    /// These services.
    Only(Vec<HostService>),
}

impl Default for HostAccess {
    fn default() -> Self {
        Self::Only(Vec::new())
    }
}

/// Ports of the host that containers may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostService {
    /// TCP or UDP.
    pub protocol: Transport,
    /// First and last.
    pub ports: (u16, u16),
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
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
/// rules. What is there already is added again without complaint, if its type is the same; elements stay.
/// `notes` are names of chains that no packet passes.
pub(super) fn script(policy: &Policy, notes: &BTreeSet<String>, elements: &[Element]) -> String {
    let mut text = String::from("add table inet ostler\nflush table inet ostler\n");
    for (kind, name, of) in SETS {
        let _ = writeln!(text, "add {kind} inet ostler {name} {{ type {of}; }}");
    }
    text.push_str(&crowd());
    for (chain, hook) in BASE_CHAINS {
        let _ = writeln!(
            text,
            "add chain inet ostler {chain} {{ type {hook}; policy accept; }}"
        );
    }
    for chain in CHAINS.into_iter().chain(notes.iter().map(String::as_str)) {
        let _ = writeln!(text, "add chain inet ostler {chain}");
    }
    for rule in rules(policy) {
        let _ = writeln!(text, "add rule inet ostler {rule}");
    }
    for element in elements {
        let set = element.set;
        let _ = writeln!(text, "add element inet ostler {set} {{ {element} }}");
    }
    text
}

/// What the kernel fills by itself, and empties.
fn crowd() -> String {
    format!(
        "add set inet ostler {CONNECTIONS} {{ type ipv4_addr; size 65535; flags dynamic; }}\n\
         add ct timeout inet ostler {BRIEF} {{ protocol tcp; l3proto ip; \
         policy = {{ close : {CLOSED_SECONDS}, time_wait : {CLOSED_SECONDS} }}; }}\n\
         add set inet ostler {VISITS} {{ type ipv4_addr; size 65535; flags dynamic; }}\n\
         add ct timeout inet ostler {VISIT} {{ protocol tcp; l3proto ip; \
         policy = {{ syn_sent : {HALF_OPEN_SECONDS}, syn_recv : {HALF_OPEN_SECONDS}, \
         close : {CLOSED_SECONDS}, time_wait : {CLOSED_SECONDS} }}; }}\n\
         add ct timeout inet ostler {QUESTION} {{ protocol udp; l3proto ip; \
         policy = {{ unreplied : {ASKED_SECONDS}, replied : {ASKED_SECONDS} }}; }}\n"
    )
}

/// Chain and rule, in order.
fn rules(policy: &Policy) -> Vec<String> {
    let lines = RULES.lines().map(str::trim);
    let mut rules: Vec<String> = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        match line {
            "$addresses" => rules.extend(ladder(32).map(|(mask, mark)| {
                let (mask, mark) = (Ipv4Addr::from_bits(mask), Ipv4Addr::from_bits(mark));
                format!(
                    "outgoing meta priority set ip saddr . (ip daddr & {mask} ^ {mark}) \
                     map @{NETWORKS} goto services"
                )
            })),
            "$ports" => rules.extend(port_ladder("services", "dport")),
            "$messages" => rules.extend(port_ladder("messages", "sport")),
            "$host" => rules.extend(to_host(&policy.host)),
            "$allow" => rules.extend(to(&policy.allow, "unlisted", "goto passed")),
            "$allow_open" => rules.extend(to(&policy.allow, "outside", "goto admitted")),
            "$count" => rules.push(format!(
                "admitted add @{CONNECTIONS} {{ ip saddr ct count over {CONNECTIONS_MAX} }} goto crowded"
            )),
            "$count_visits" => rules.push(format!(
                "welcomed add @{VISITS} {{ ip daddr ct count over {} }} goto swamped",
                policy.visits
            )),
            "$deny" => rules.extend(to(
                &policy.deny,
                "outside",
                "reject with icmpx admin-prohibited",
            )),
            "$bridges" => rules.extend(to_bridges(&policy.uplinks)),
            rule => rules.push(rule.replace("$logged", &LOGGED.to_string())),
        }
    }
    rules
}

/// Mask and mark of all lengths of a prefix but the whole width and nothing, the longest first.
fn ladder(width: u32) -> impl Iterator<Item = (u32, u32)> {
    let full = u32::MAX >> (32 - width);
    let lengths = (1..width).rev();
    lengths.map(move |length| (full & (full << (width - length)), mark(length, width)))
}

fn port_ladder(chain: &'static str, port: &'static str) -> impl Iterator<Item = String> {
    ladder(16).map(move |(mask, mark)| {
        format!(
            "{chain} meta priority set ip saddr . meta priority . meta l4proto . \
             (th {port} & {mask} ^ {mark}) map @{SERVICE_RANGES} goto decided"
        )
    })
}

fn to(ranges: &[(Ipv4Addr, Ipv4Addr)], chain: &str, verdict: &str) -> Option<String> {
    let ranges = ranges.iter().map(|(a, b)| (a.to_bits(), b.to_bits()));
    let ranges = union(ranges.collect());
    let ranges = ranges.into_iter().map(|(first, last)| {
        let (first, last) = (Ipv4Addr::from_bits(first), Ipv4Addr::from_bits(last));
        range(first, last)
    });
    let list = ranges.collect::<Vec<_>>().join(", ");
    (!list.is_empty()).then(|| format!("{chain} ip daddr {{ {list} }} {verdict}"))
}

fn to_host(host: &HostAccess) -> Vec<String> {
    let HostAccess::Only(services) = host else {
        return vec!["input goto admitted".to_owned()];
    };
    let mut rules = Vec::new();
    for (protocol, name) in [(Transport::Tcp, "tcp"), (Transport::Udp, "udp")] {
        let of = services.iter().filter(|one| one.protocol == protocol);
        let ports = of.map(|one| (one.ports.0.into(), one.ports.1.into()));
        let ports = union(ports.collect()).into_iter();
        let list = ports.map(|(first, last)| range(first, last));
        let list = list.collect::<Vec<_>>().join(", ");
        if !list.is_empty() {
            rules.push(format!("input {name} dport {{ {list} }} goto admitted"));
        }
    }
    rules.push("input reject with icmpx admin-prohibited".to_owned());
    rules
}

/// Docker's networks, by the names that it gives their bridges: `docker0`, and `br-` with the beginning of the
/// network's id, in hexadecimal digits.
fn to_bridges(uplinks: &BTreeSet<String>) -> impl Iterator<Item = String> {
    let but = uplinks.iter().map(|link| format!("oifname != \"{link}\" "));
    let but: String = but.collect();
    let names = (0..16).map(|digit| format!("br-{digit:x}*"));
    names.chain(["docker*".to_owned()]).map(move |name| {
        format!(
            "outside {but}oifname \"{name}\" meta oifkind \"bridge\" reject with icmpx admin-prohibited"
        )
    })
}

/// As `nft` has it, which does not take a range of one.
fn range<T: PartialEq + ToString>(first: T, last: T) -> String {
    if first == last {
        return first.to_string();
    }
    format!("{}-{}", first.to_string(), last.to_string())
}

/// Ranges that neither overlap nor touch: the kernel refuses others.
fn union(mut ranges: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    ranges.sort_unstable();
    let mut union: Vec<(u32, u32)> = Vec::new();
    for (first, last) in ranges {
        match union.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => union.push((first, last)),
        }
    }
    union
}

/// The same without what a table of this name has now: its layout may be another.
pub(super) fn afresh(script: &str) -> String {
    ["add table inet ostler\ndelete table inet ostler\n", script].concat()
}

/// A container's elements: first those that its way in and out hang on.
///
/// # Errors
/// [`NetworkError::TooManyRules`]
pub(super) fn elements(policy: &Policy, attached: &Attached) -> Result<Vec<Element>, NetworkError> {
    let (container, ports) = (attached.lease.container, attached.ports.iter());
    let ports = ports.map(|(outer, inner)| port(container, *outer, *inner));
    let rate = attached.bandwidth.out.map(|bytes| rate(container, bytes));
    let mut elements = vec![source(&attached.handle, &attached.lease)];
    elements.extend(ports.chain(rate));
    elements.extend(egress::elements(
        container,
        &attached.egress,
        policy.posture,
    )?);
    Ok(elements)
}

/// How many chains and rules there are after a script of [`script`].
pub(super) fn script_size(script: &str) -> (usize, usize) {
    let count = |what: &str| {
        let lines = script.lines();
        lines.filter(|line| line.starts_with(what)).count()
    };
    (count("add chain "), count("add rule "))
}

/// Whether elements of this set are what every container has, a few, and what its packets are dropped
/// without. The others say what it may reach by its rules, or receive.
pub(super) fn is_way(set: &str) -> bool {
    [SOURCES, PORTS, RATES, OPEN].contains(&set)
}

/// The address of the container that an element belongs to.
pub(super) fn owner((set, key, value): &Encoded) -> Option<Ipv4Addr> {
    let address = match *set {
        // Behind the link's name.
        SOURCES => key.get(16..)?.first_chunk(),
        PORTS => value.first_chunk(),
        _ => key.first_chunk(),
    };
    let address: [u8; 4] = *address?;
    Some(address.into())
}

/// Whether the table would refuse this connection's next packet, if it were its first: of or to one of
/// these containers, by their addresses.
pub(super) fn refuses(
    policy: &Policy,
    attached: &BTreeMap<Ipv4Addr, &Attached>,
    connection: &Connection,
) -> bool {
    if let Some(container) = attached.get(&connection.source) {
        // Whoever goes outside by way of the table is masqueraded. What is not goes to a neighbour, or to
        // the host, and is made again if it may.
        let masqueraded = connection.answered != connection.source;
        let (to, port) = (connection.answering, connection.port);
        let named = |rule: &EgressRule| rule.names(to, connection.protocol, port);
        let among =
            |ranges: &[(Ipv4Addr, Ipv4Addr)]| ranges.iter().any(|(a, b)| (*a..=*b).contains(&to));
        let open = container.egress.is_empty() && policy.posture == Posture::Open;
        let allowed = among(&policy.allow)
            || (open && !among(&policy.deny))
            || container.egress.iter().any(named);
        return !(masqueraded && allowed && !attached.contains_key(&to));
    }
    let Some(container) = attached.get(&connection.answering) else {
        return false;
    };
    let mapped = connection.destination != connection.answering;
    // The host's own have the address of its end of the link.
    !mapped && connection.source != container.lease.host
}

/// Those that packets come to by themselves.
const BASE_CHAINS: [(&str, &str); 6] = [
    ("raw_in", "filter hook prerouting priority raw"),
    ("nat_in", "nat hook prerouting priority dstnat"),
    ("nat_out", "nat hook output priority -100"),
    ("nat_post", "nat hook postrouting priority srcnat"),
    ("forward", "filter hook forward priority filter"),
    ("input", "filter hook input priority filter"),
];

/// Those that a rule leads to.
pub(super) const CHAINS: [&str; 13] = [
    "outgoing", "services", "messages", "anything", "decided", "unlisted", "outside", "passed",
    "logged", "admitted", "crowded", "welcomed", "swamped",
];

/// By chain, in order. Before connection tracking (`raw_in`) a reply to 127.0.0.1 still bears the
/// link's address, so whatever names 127/8 there was made up: also on the uplink, where the mapping of a
/// port comes before the kernel's own check. `route_localnet`, which the replies need, and which
/// others (kube-proxy) set for all links, opens nothing because of that rule (CVE-2020-8558). A packet that tracking calls invalid would leave with
/// its private address. Nothing is keyed on the pool: what lives since an earlier configuration has
/// addresses outside of today's.
///
/// Containers of another engine on this host are others' containers. Its own table would keep an instance from
/// them, but for the accepts that it is made to have (`foreign`); older Docker drops by policy alone.
/// What it has published for all (`dnat`) is for instances, too.
///
/// The class of a destination, and then what becomes of the packet, travels in its priority, the one register that others set no
/// store by: `ip_forward` has just made it from the type of service. Who passes has none again. Where
/// ports would be, an ICMP message has its type and code. The kernel's log says by `IN=` who it was; many
/// messages at once are too many for it. What is refused is never remembered: a connection enters the
/// kernel's table behind the last chain. What others open beyond its number is dropped, as a full backlog does, so that they
/// try again in a second: a refusal would have a router take the app for gone.
const RULES: &str = r#"
    raw_in iifname != "lo" ip daddr 127.0.0.0/8 drop
    raw_in iifname != "os-*" accept
    raw_in meta nfproto ipv6 drop
    raw_in iifname . ip saddr != @sources drop
    raw_in ip saddr @rates drop

    nat_in iifname != "os-*" meta nfproto ipv4 meta l4proto tcp fib daddr type local dnat ip to tcp dport map @ports
    nat_out meta nfproto ipv4 meta l4proto tcp fib daddr type local dnat ip to tcp dport map @ports
    nat_post oifname "os-*" ip saddr 127.0.0.0/8 masquerade
    nat_post iifname "os-*" oifname != "os-*" meta nfproto ipv4 masquerade

    forward iifname != "os-*" oifname != "os-*" accept
    forward ct state established,related accept
    forward ct state invalid drop
    forward iifname "os-*" oifname "os-*" reject with icmpx admin-prohibited
    forward iifname "os-*" goto outgoing
    forward ct status dnat goto welcomed
    forward reject with icmpx admin-prohibited

    input iifname != "os-*" accept
    input ct state established,related accept
    input ct state invalid drop
    input meta l4proto icmp goto admitted
    $host

    outgoing ip saddr @open goto outside
    outgoing meta priority set ip saddr . ip daddr map @hosts goto services
    $addresses
    outgoing goto unlisted

    services meta l4proto icmp goto messages
    services meta priority set ip saddr . meta priority . meta l4proto . th dport map @services goto decided
    $ports
    services goto anything

    messages meta priority set ip saddr . meta priority . meta l4proto . th sport map @services goto decided
    $messages
    messages goto anything

    anything meta priority set ip saddr . meta priority map @everything goto decided
    anything goto unlisted

    $allow
    unlisted reject with icmpx admin-prohibited

    $allow_open
    $deny
    outside ct status dnat goto admitted
    $bridges
    outside goto admitted

    decided meta priority 0:$logged goto logged
    decided goto passed

    passed meta priority set none goto admitted
    logged limit rate 50/second burst 200 packets log prefix "ostler-out " level info
    logged goto passed

    $count
    admitted udp dport 53 ct timeout set "question"
    admitted meta l4proto tcp ct timeout set "brief"
    admitted accept
    crowded limit rate 1/second burst 5 packets log prefix "ostler-full " level info
    crowded counter reject with icmpx admin-prohibited

    $count_visits
    welcomed meta l4proto tcp ct timeout set "visit"
    welcomed accept
    swamped limit rate 1/second burst 5 packets log prefix "ostler-full " level info
    swamped counter drop
"#;

/// Lets the container speak from its address, and from no other.
fn source(handle: &str, lease: &Lease) -> Element {
    Element {
        set: SOURCES,
        key: vec![
            Part::Link(link::name(handle)),
            Part::Address(lease.container),
        ],
        value: Value::None,
    }
}

/// Leads a TCP port of the host into the container.
pub(super) fn port(container: Ipv4Addr, outer: u16, inner: u16) -> Element {
    Element {
        set: PORTS,
        key: vec![Part::Port(outer)],
        value: Value::Parts(vec![Part::Address(container), Part::Port(inner)]),
    }
}

/// Lets a container send so many bytes per second, and drops the rest.
pub(super) fn rate(container: Ipv4Addr, bytes: u64) -> Element {
    Element {
        set: RATES,
        key: vec![Part::Address(container)],
        value: Value::Over(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testbed::{on_host, run};
    use super::super::{Bandwidth, EgressRule, Traffic, program};
    use super::*;
    use crate::host::network::nfnetlink::{Difference, Nftables};

    fn attached() -> Attached {
        let lease = Lease {
            host: [10, 254, 0, 1].into(),
            container: [10, 254, 0, 2].into(),
            prefix: 30,
        };
        Attached {
            ports: vec![(61_001, 8080)],
            ..Attached::new("0123456789a", lease)
        }
    }

    fn policy() -> Policy {
        let net = |a: [u8; 4], b: [u8; 4]| (a.into(), b.into());
        Policy {
            allow: vec![
                net([10, 1, 0, 0], [10, 1, 255, 255]),
                net([10, 1, 128, 0], [10, 2, 0, 0]),
                net([192, 0, 2, 9], [192, 0, 2, 9]),
            ],
            deny: vec![net([169, 254, 0, 0], [169, 254, 255, 255])],
            ..Policy::default()
        }
    }

    #[test]
    fn elements_are_encoded_as_nft_does() {
        let all = elements(&Policy::default(), &attached()).unwrap();
        let encoded: Vec<_> = all.iter().map(Element::encoded).collect();
        let name = b"os-0123456789a\0\0\x0a\xfe\0\x02".to_vec();
        assert_eq!(encoded[0], (SOURCES, name, Vec::new()));
        let inner = vec![10, 254, 0, 2, 0x1f, 0x90, 0, 0];
        assert_eq!(encoded[1], (PORTS, vec![0xee, 0x49], inner));
        assert_eq!(encoded[2], (OPEN, vec![10, 254, 0, 2], Vec::new()));
    }

    #[test]
    fn the_script_fills_in_what_is_configured() {
        let none = BTreeSet::new();
        let kept = script(&Policy::default(), &none, &[]);
        assert!(kept.contains("inet ostler input reject with icmpx admin-prohibited\n"));
        assert!(kept.contains("{ ip daddr ct count over 8192 } goto swamped\n"));
        assert!(kept.contains("(ip daddr & 255.0.0.0 ^ 0.128.0.0) map @networks"));
        assert!(kept.contains("(th dport & 65280 ^ 128) map @service_ranges"));
        for absent in ["$", "element", "ip daddr {"] {
            assert!(!kept.contains(absent), "{absent}");
        }
        let notes = BTreeSet::from(["a_note".to_owned()]);
        let all = elements(&Policy::default(), &attached()).unwrap();
        let everything = Policy {
            host: HostAccess::All,
            ..policy()
        };
        let filled = script(&everything, &notes, &all);
        assert!(filled.contains("inet ostler input goto admitted\n"));
        assert!(filled.contains("add chain inet ostler a_note\n"));
        assert!(filled.contains("ip daddr { 10.1.0.0-10.2.0.0, 192.0.2.9 } goto passed\n"));
        assert!(filled.contains("ip daddr { 169.254.0.0-169.254.255.255 } reject"));
        assert!(filled.ends_with(
            "\n\
             add element inet ostler sources { \"os-0123456789a\" . 10.254.0.2 }\n\
             add element inet ostler ports { 61001 : 10.254.0.2 . 8080 }\n\
             add element inet ostler open { 10.254.0.2 }\n"
        ));
    }

    #[test]
    fn services_of_the_host_are_one_rule_for_each_protocol() {
        let service = |protocol, first, last| HostService {
            protocol,
            ports: (first, last),
        };
        let host = HostAccess::Only(vec![
            service(Transport::Udp, 53, 53),
            service(Transport::Tcp, 8000, 8010),
            service(Transport::Tcp, 53, 53),
            service(Transport::Tcp, 8005, 8080),
        ]);
        assert_eq!(
            to_host(&host),
            [
                "input tcp dport { 53, 8000-8080 } goto admitted",
                "input udp dport { 53 } goto admitted",
                "input reject with icmpx admin-prohibited",
            ]
        );
    }

    /// One of every kind.
    fn with_rules() -> Attached {
        let rule = |traffic, log| EgressRule {
            destination: ([10, 0, 0, 7].into(), [10, 0, 1, 255].into()),
            traffic,
            log,
        };
        Attached {
            egress: vec![
                rule(Traffic::Tcp(vec![(80, 80), (1024, 2000)]), true),
                rule(Traffic::Icmp(Some(8), None), true),
                rule(Traffic::All, false),
            ],
            bandwidth: Bandwidth {
                into: None,
                out: Some(1_000_000),
            },
            ..attached()
        }
    }

    #[test]
    fn elements_mean_the_same_to_nft_and_to_netlink() {
        on_host(|| async {
            let all = elements(&policy(), &with_rules()).unwrap();
            let wanted: BTreeSet<_> = all.iter().map(Element::encoded).collect();
            let sets: BTreeSet<_> = wanted.iter().map(|one| one.0).collect();
            assert_eq!(sets.len(), SET_NAMES.len() - 1, "all but `open`: {sets:?}");
            let nftables = Nftables::open(TABLE).unwrap();
            let there = || nftables.elements(&SET_NAMES).unwrap().into_iter();
            let load = |elements: &[Element], how: fn(&str) -> String| {
                let script = script(&policy(), &BTreeSet::new(), elements);
                program::run("nft", &["-f", "-"], &how(&script)).unwrap();
            };
            load(&[], str::to_owned);
            nftables.add(&all).unwrap();
            assert_eq!(there().collect::<BTreeSet<_>>(), wanted);
            let by_netlink = run("nft", "list table inet ostler");
            // Again, in the text's words, over what is there and in its place.
            for how in [str::to_owned, afresh] {
                load(&all, how);
                assert_eq!(there().collect::<BTreeSet<_>>(), wanted);
                assert_eq!(run("nft", "list table inet ostler"), by_netlink);
            }
            nftables.remove(&all).unwrap();
            assert_eq!(there().count(), 0);
            // As one difference, there and back.
            let mut difference = Difference {
                added: all.clone(),
                ..Difference::default()
            };
            nftables.change(&difference).unwrap();
            assert_eq!(there().collect::<BTreeSet<_>>(), wanted);
            assert_eq!(run("nft", "list table inet ostler"), by_netlink);
            difference.removed = wanted.into_iter().collect();
            nftables.change(&difference).unwrap();
            assert_eq!(run("nft", "list table inet ostler"), by_netlink);
            difference.added.clear();
            nftables.change(&difference).unwrap();
            assert_eq!(there().count(), 0);
            nftables.change(&difference).unwrap_err();
        });
    }

    #[test]
    fn the_layout_of_all_that_was_loaded_is_as_large_as_the_script() {
        on_host(|| async {
            let notes = BTreeSet::from(["a_note".to_owned(), "found/2/filter/FORWARD".to_owned()]);
            let all = elements(&policy(), &with_rules()).unwrap();
            let script = script(&policy(), &notes, &all);
            let nftables = Nftables::open(TABLE).unwrap();
            let listed = || nftables.layout().unwrap().size();
            program::run("nft", &["-f", "-"], &afresh(&script)).unwrap();
            let size = script_size(&script);
            assert_eq!(size, (21, rules(&policy()).len()));
            assert_eq!(listed(), size);
            run("nft", "delete chain inet ostler a_note");
            assert_eq!(listed().0, 20);
            run("nft", "flush chain inet ostler raw_in");
            assert_eq!(listed().1, size.1 - 5);
        });
    }
}
