//! Other people's forward chains.
//!
//! Every base chain at a hook must let a packet pass; our accept does not outvote their drop. Docker
//! (and ufw) give `FORWARD` of iptables the policy DROP, others a last rule that rejects. There, and only
//! there, two commented accepts go in, into `DOCKER-USER` where it is (Docker leaves that chain alone),
//! else into `FORWARD`; they leave with the agent. Our own table still refuses what it refuses.

use super::decode::Chain;
use super::look;
use super::table::TABLE;
use super::{NetworkError, program};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use tracing::{info, warn};

/// What marks a rule as ours.
const COMMENT: &str = "ostler";

/// From containers, and to them what answers or was mapped. `-I` puts them at the head in this order
/// reversed; neither hides the other.
const ACCEPTS: [&[&str]; 2] = [
    &[
        "-i",
        "os-+",
        "-m",
        "comment",
        "--comment",
        COMMENT,
        "-j",
        "ACCEPT",
    ],
    &[
        "-o",
        "os-+",
        "-m",
        "conntrack",
        "--ctstate",
        "RELATED,ESTABLISHED,DNAT",
        "-m",
        "comment",
        "--comment",
        COMMENT,
        "-j",
        "ACCEPT",
    ],
];

/// The chains that they may stand in.
pub(super) const PLACES: [&str; 2] = ["DOCKER-USER", "FORWARD"];

/// What iptables says of a table that others have made, and that it cannot read.
const NATIVE: &str = "incompatible";

/// Docker's own chain.
const DOCKER: &str = "DOCKER";
/// The chain that they edit, as it is listed.
pub(super) const FORWARD: &str = "ip filter FORWARD";

/// What shall be so afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accepts {
    /// Exactly two where FORWARD drops, none elsewhere.
    WhereNeeded,
    /// None.
    Nowhere,
}

/// Puts the accepts in or takes them out, in each iptables that is in use here. Blocks: one process
/// to read, and one for each change. What others' rules do not allow is told. Tells whether it is so now,
/// or will be only when others have changed something.
pub(super) fn settle(accepts: Accepts) -> bool {
    let mut so = true;
    for program in ["iptables-nft", "iptables-legacy"] {
        // Reading with the legacy program would make its tables where there are none yet.
        if program == "iptables-legacy" && !legacy_in_use() {
            continue;
        }
        match program::run(program, &["-w", "5", "-S"], "") {
            Ok(rules) => so &= carry_out(program, &plan(&rules, accepts)),
            // Without the program there is nobody who could have used it here. In a mount namespace
            // of our own somebody outside might have.
            Err(NetworkError::Missing { .. }) => tell_of_chains(accepts),
            Err(error) => {
                // A native nft table "ip filter" with more in it than iptables knows.
                so &= matches!(&error, NetworkError::Program { detail, .. } if detail.contains(NATIVE));
                warn!(
                    error = &error as &dyn Error,
                    "a filter table cannot be read by iptables and stays as it is: if its forward chain \
                     drops, let it accept what comes from and goes to \"os-*\""
                );
            }
        }
    }
    so
}

/// What looks as if it were iptables' can be somebody's of nft.
fn tell_of_chains(accepts: Accepts) {
    if accepts == Accepts::Nowhere {
        return;
    }
    let chains = look::dropping_chains().unwrap_or_default();
    if let Some(chain) = chains.iter().find(|chain| look::is_iptables(chain)) {
        warn!(
            chain,
            "a chain drops what is forwarded, and without iptables no accepts can be put there: install the package \"iptables\", \
             or see to it that it lets packets from and to \"os-*\" through"
        );
    }
}

/// Tells whether nothing was refused.
fn carry_out(program: &'static str, plan: &Plan) -> bool {
    let mut done = true;
    for change in &plan.changes {
        let mut arguments = vec!["-w", "5"];
        arguments.extend(change.iter().map(String::as_str));
        if let Err(error) = program::run(program, &arguments, "") {
            let adding = change.first().is_some_and(|word| word == "-I");
            warn!(
                error = &error as &dyn Error,
                "an accept in a foreign chain could not be {}: do it by hand",
                if adding { "added" } else { "removed" }
            );
            // The old accepts must do while there are no new ones.
            if adding {
                return false;
            }
            done = false;
        }
    }
    if let (Some(chain), false) = (plan.chain, plan.changes.is_empty()) {
        info!(
            chain,
            program, "a foreign chain that drops was told to accept containers' traffic"
        );
    }
    done
}

/// Those of others' chains that show that somebody relies on forwarding: what Docker makes, and chains
/// that do something to forwarded packets. By names that tell them apart, with the number of rules that each
/// has. Blocks.
pub(super) fn forwarders(chains: &[Chain]) -> Result<BTreeMap<String, u32>, NetworkError> {
    let mut found: BTreeMap<String, u32> = chains
        .iter()
        .filter(|chain| !chain.is_in(TABLE))
        .filter(|chain| chain.name == DOCKER || (chain.sees_forwarded() && chain.acts()))
        .map(|chain| {
            let family = chain.family().to_string();
            (name(&family, &chain.table, &chain.name), chain.uses)
        })
        .collect();
    if legacy_in_use() {
        let rules = program::run("iptables-legacy", &["-w", "5", "-S"], "")?;
        for line in rules.lines().map(str::trim) {
            let mut has = |chain, more| {
                *found.entry(name("legacy", "filter", chain)).or_insert(0) += more;
            };
            if line == "-P FORWARD DROP" {
                has("FORWARD", 0);
            } else if line.starts_with("-A FORWARD ") && !is_ours(&words(line)) {
                has("FORWARD", 1);
            } else if line.strip_prefix("-N ") == Some(DOCKER) {
                has(DOCKER, 0);
            }
        }
    }
    Ok(found)
}

/// A chain's name, and room for a number, in what `nft` takes for the name of a chain: fewer characters
/// than the kernel, and 128 at most.
fn name(family: &str, table: &str, chain: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    format!("found/{family}/{table}/{chain}")
        .chars()
        .map(|c| if plain(c) { c } else { '_' })
        .take(110)
        .collect()
}

/// The name of a chain of ours that keeps that this was found.
pub(super) fn note(name: &str, rules: u32) -> String {
    format!("{name}/{rules}")
}

/// Whether a chain that was found with so many rules has been noted, and not with fewer. An older agent's
/// notes have no numbers.
pub(super) fn is_noted(notes: &BTreeSet<String>, name: &str, rules: u32) -> bool {
    let with_number = |note: &str| {
        let number = note.strip_prefix(name)?.strip_prefix('/')?;
        number.parse::<u32>().ok()
    };
    notes.contains(name)
        || notes
            .iter()
            .filter_map(|note| with_number(note))
            .any(|noted| noted >= rules)
}

/// Whether the legacy `filter` table exists in this network namespace.
fn legacy_in_use() -> bool {
    fs::read_to_string("/proc/thread-self/net/ip_tables_names")
        .is_ok_and(|names| names.lines().any(|name| name == "filter"))
}

#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Where the accepts are, once the changes are made.
    chain: Option<&'static str>,
    /// Arguments of one call each.
    changes: Vec<Vec<String>>,
}

/// From what `iptables -S` prints to what must be changed.
fn plan(rules: &str, accepts: Accepts) -> Plan {
    let has = |wanted: &str| rules.lines().any(|line| line.trim() == wanted);
    let chain = match accepts {
        Accepts::WhereNeeded if has("-P FORWARD DROP") || rules.lines().any(refuses_the_rest) => {
            let docker = has("-N DOCKER-USER") && has("-A FORWARD -j DOCKER-USER");
            let [user, forward] = PLACES;
            Some(if docker { user } else { forward })
        }
        Accepts::WhereNeeded | Accepts::Nowhere => None,
    };
    // Whatever else bears our comment is somebody else's.
    let lines = rules.lines().map(words);
    let ours: Vec<Vec<&str>> = lines.filter(|words| is_ours(words)).collect();
    let in_place = |chain| {
        let there = |accept: &&[&str]| {
            ours.iter()
                .any(|rule| rule.split_at_checked(2) == Some((&["-A", chain], *accept)))
        };
        ours.len() == ACCEPTS.len() && ACCEPTS.iter().all(there)
    };
    if chain.is_some_and(in_place) {
        return Plan {
            chain,
            changes: Vec::new(),
        };
    }
    // The new ones first: live connections are never without.
    let added = chain.into_iter().flat_map(|chain| {
        ACCEPTS
            .iter()
            .map(move |accept| call(&[&["-I", chain], *accept].concat()))
    });
    let removed = ours
        .iter()
        .map(|rule| call(&[&["-D"], rule.get(1..).unwrap_or(&[])].concat()));
    Plan {
        chain,
        changes: added.chain(removed).collect(),
    }
}

/// Whether a line of `iptables -S` refuses all that no rule before it took, as hosts with iptables-services have it
/// instead of a policy.
fn refuses_the_rest(line: &str) -> bool {
    let words = words(line);
    let Some(rule) = words.strip_prefix(&["-A", "FORWARD"]) else {
        return false;
    };
    let rule = match rule {
        ["-m", "comment", "--comment", rest @ ..] => {
            let quoted = rest.first().is_some_and(|word| word.starts_with('"'));
            let last = rest
                .iter()
                .position(|word| !quoted || word.len() > 1 && word.ends_with('"'));
            last.and_then(|last| rest.get(last + 1..)).unwrap_or(&[])
        }
        rule => rule,
    };
    matches!(rule, ["-j", "REJECT" | "DROP", ..])
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Whether a line of `iptables -S` is one of our accepts.
fn is_ours(words: &[&str]) -> bool {
    match words.split_at_checked(2) {
        Some((["-A", chain], rule)) => PLACES.contains(chain) && ACCEPTS.contains(&rule),
        _ => false,
    }
}

fn call(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: &str = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n";
    const CLOSED: &str = "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n";
    const DOCKER: &str = "-P FORWARD DROP\n-N DOCKER\n-N DOCKER-USER\n\
                          -A FORWARD -j DOCKER-USER\n-A FORWARD -o docker0 -j DOCKER\n";

    fn lines(rules: &str, accepts: Accepts) -> Vec<String> {
        plan(rules, accepts)
            .changes
            .iter()
            .map(|change| change.join(" "))
            .collect()
    }

    /// `rules` as they read with the accepts in `chain`.
    fn settled(rules: &str, chain: &str) -> String {
        let accepts = ACCEPTS
            .iter()
            .map(|accept| format!("-A {chain} {}\n", accept.join(" ")));
        [rules.to_owned(), accepts.collect()].concat()
    }

    #[test]
    fn nothing_is_touched_where_nobody_drops() {
        let plan = plan(OPEN, Accepts::WhereNeeded);
        assert_eq!(
            plan,
            Plan {
                chain: None,
                changes: Vec::new()
            }
        );
    }

    #[test]
    fn a_rule_that_refuses_the_rest_is_as_a_policy_that_does() {
        for rule in [
            "-j REJECT --reject-with icmp-host-prohibited",
            "-j DROP",
            "-m comment --comment rest -j DROP",
            "-m comment --comment \"all the rest\" -j REJECT",
        ] {
            let rules = format!("{OPEN}-A FORWARD {rule}\n");
            assert_eq!(lines(&rules, Accepts::WhereNeeded).len(), 2, "{rule}");
            assert!(lines(&settled(&rules, "FORWARD"), Accepts::WhereNeeded).is_empty());
        }
        for rule in [
            "-A FORWARD -i eth1 -j DROP",
            "-A INPUT -j DROP",
            "-A FORWARD -j DROPS",
        ] {
            let rules = format!("{OPEN}{rule}\n");
            assert!(lines(&rules, Accepts::WhereNeeded).is_empty(), "{rule}");
        }
    }

    #[test]
    fn two_accepts_go_where_forward_drops() {
        let changes = lines(CLOSED, Accepts::WhereNeeded);
        assert_eq!(
            changes,
            [
                "-I FORWARD -i os-+ -m comment --comment ostler -j ACCEPT",
                "-I FORWARD -o os-+ -m conntrack --ctstate RELATED,ESTABLISHED,DNAT \
                 -m comment --comment ostler -j ACCEPT",
            ]
        );
        let docker = lines(DOCKER, Accepts::WhereNeeded);
        assert_eq!(docker.len(), 2);
        assert!(
            docker
                .iter()
                .all(|change| change.starts_with("-I DOCKER-USER "))
        );
    }

    #[test]
    fn an_unused_docker_user_chain_is_no_place() {
        let rules = format!("{CLOSED}-N DOCKER-USER\n");
        assert_eq!(plan(&rules, Accepts::WhereNeeded).chain, Some("FORWARD"));
    }

    #[test]
    fn what_is_in_place_stays() {
        assert!(lines(&settled(DOCKER, "DOCKER-USER"), Accepts::WhereNeeded).is_empty());
    }

    #[test]
    fn what_is_elsewhere_moves_and_what_is_not_needed_goes() {
        let moved = lines(&settled(DOCKER, "FORWARD"), Accepts::WhereNeeded);
        assert_eq!(moved.len(), 4);
        assert!(
            moved[..2]
                .iter()
                .all(|change| change.starts_with("-I DOCKER-USER "))
        );
        assert!(
            moved[2..]
                .iter()
                .all(|change| change.starts_with("-D FORWARD "))
        );
        let gone = lines(&settled(OPEN, "FORWARD"), Accepts::WhereNeeded);
        assert_eq!(gone, lines(&settled(CLOSED, "FORWARD"), Accepts::Nowhere));
        assert!(gone.len() == 2 && gone.iter().all(|change| change.starts_with("-D FORWARD ")));
    }

    #[test]
    fn rules_of_others_are_never_removed() {
        let rules = format!(
            "{CLOSED}-A FORWARD -i os-+ -j ACCEPT\n\
             -A FORWARD -m comment --comment ostlerish -j DROP\n\
             -A INPUT -p tcp -m tcp --dport 4222 -m comment --comment ostler -j ACCEPT\n\
             -A FORWARD -s 10.0.0.1/32 -i os-+ -m comment --comment ostler -j ACCEPT\n"
        );
        assert!(lines(&rules, Accepts::Nowhere).is_empty());
        assert_eq!(lines(&rules, Accepts::WhereNeeded).len(), 2);
        // Nor one like ours where we put none.
        let elsewhere = settled(&format!("{CLOSED}-N ADMIN\n"), "ADMIN");
        assert!(lines(&elsewhere, Accepts::Nowhere).is_empty());
    }
}
