//! What a person is told of this host's firewall. Nothing of the host's own is changed.

use super::foreign::FORWARD;
use super::link::{PREFIX, handle};
use super::table::{self, Policy, TABLE};
use super::{NetworkError, program};
use nix::errno::Errno;
use nix::net::if_::if_nameindex;
use rtnetlink::LinkVeth;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::timeout;

/// How long the kernel may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Loads our table into this thread's network namespace, which must be a throw-away one. Blocks.
///
/// # Errors
/// `nft` is missing, or the kernel lacks something that the rules use.
pub fn try_rules() -> Result<(), NetworkError> {
    let script = table::script(&Policy::default(), &BTreeSet::new(), &[]);
    program::run("nft", &["-f", "-"], &script).map(drop)
}

/// Makes a pair of links in this thread's network namespace, which must be a throw-away one. Blocks.
///
/// # Errors
/// What the kernel says.
pub fn try_link() -> Result<(), String> {
    let words = |error: &dyn std::error::Error| error.to_string();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| words(&error))?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| words(&error))?;
        let connection = tokio::spawn(connection);
        let pair = LinkVeth::new("os-probe-0", "os-probe-1").build();
        let made = timeout(DEADLINE, handle.link().add(pair).execute()).await;
        connection.abort();
        match made {
            Ok(made) => made.map_err(|error| words(&error)),
            Err(_) => Err("the kernel does not answer".to_owned()),
        }
    })
}

/// Limits the bandwidth of `lo` in this thread's network namespace, which must be a throw-away one: in one
/// direction by a token bucket, in the other by a rule. Blocks.
///
/// # Errors
/// `tc` or `nft` is missing, or the kernel lacks one of the two.
pub fn try_bandwidth() -> Result<(), NetworkError> {
    let rule = "add table inet probe\n\
                add chain inet probe in { type filter hook prerouting priority raw; }\n\
                add rule inet probe in limit rate over 1 mbytes/second drop\n";
    program::run("nft", &["-f", "-"], rule)?;
    let bucket = "qdisc add dev lo root tbf rate 1mbit burst 10kb latency 25ms";
    program::run("tc", &bucket.split(' ').collect::<Vec<_>>(), "").map(drop)
}

/// Links of this thread's network namespace that are no containers', and have names that begin as theirs do: the agent
/// does not start beside one.
///
/// # Errors
/// What the kernel says.
pub fn strange_links() -> Result<Vec<String>, Errno> {
    let links = if_nameindex()?;
    let names = links.iter().map(|link| link.name().to_string_lossy());
    let strange = names.filter(|name| name.starts_with(PREFIX) && handle(name).is_none());
    Ok(strange.map(String::from).collect())
}

/// Others' chains that drop or reject what is forwarded unless a rule of theirs accepts it, as `ip filter FORWARD`.
/// Blocks.
///
/// # Errors
/// `nft` is missing or failed.
pub fn dropping_chains() -> Result<Vec<String>, NetworkError> {
    program::run("nft", &["--stateless", "--terse", "list", "ruleset"], "")
        .map(|rules| dropping(&rules))
}

/// Whether a chain, as [`dropping_chains`] names it, is one that the agent edits.
#[must_use]
pub fn is_iptables(chain: &str) -> bool {
    chain == FORWARD
}

/// Whether the agent could put its accepts into chains of iptables. Blocks.
///
/// # Errors
/// `iptables-nft` is missing, or it does not understand what is there.
pub fn try_accepts() -> Result<(), NetworkError> {
    program::run("iptables-nft", &["-w", "5", "-S"], "").map(drop)
}

fn dropping(rules: &str) -> Vec<String> {
    let (mut table, mut chain, mut found) = ("", "", Vec::new());
    // Of the chain: whether it sees what is forwarded, and drops what gets to the end of what was read of it.
    let (mut forwards, mut drops) = (false, false);
    for line in rules.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {");
        } else if let Some(name) = line.strip_prefix("chain ") {
            (chain, forwards, drops) = (name.trim_end_matches(" {"), false, false);
        } else if line.starts_with("type ") && line.contains(" hook forward ") {
            (forwards, drops) = (true, line.contains("policy drop"));
        } else if line == "}" {
            if forwards && drops && !table.ends_with(&format!(" {TABLE}")) {
                found.push(format!("{table} {chain}"));
            }
            forwards = false;
        } else if forwards {
            drops |= refuses_the_rest(line);
        }
    }
    found
}

/// Whether a rule refuses all that no rule before it took, as the last one of firewalld does.
fn refuses_the_rest(rule: &str) -> bool {
    let rule = rule.strip_prefix("counter ").unwrap_or(rule);
    let first = rule.split_whitespace().next();
    matches!(first, Some("drop" | "reject")) || rule == "xt target \"REJECT\""
}

#[cfg(test)]
mod tests {
    use super::super::testbed::{on_host, run};
    use super::{dropping_chains, is_iptables, try_accepts, try_bandwidth, try_link, try_rules};

    #[test]
    fn links_and_their_bandwidth_are_tried_in_the_namespace_of_the_thread() {
        on_host(|| async {
            let tried = std::thread::spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                (
                    try_link(),
                    try_link(),
                    try_bandwidth().map_err(|error| error.to_string()),
                )
            });
            let (first, second, bandwidth) = tried.join().unwrap();
            assert_eq!((first, bandwidth), (Ok(()), Ok(())));
            assert!(
                second.unwrap_err().contains("File exists"),
                "it really was made"
            );
            assert!(!run("ip", "link").contains("os-probe"));
        });
    }

    #[test]
    fn only_chains_that_drop_what_is_forwarded_are_named() {
        on_host(|| async {
            assert_eq!(dropping_chains().unwrap(), Vec::<String>::new());
            run("nft", "add table inet others");
            for (chain, hook) in [("in", "input"), ("passing", "forward"), ("fine", "forward")] {
                let policy = if chain == "fine" { "accept" } else { "drop" };
                let what = format!("{{ type filter hook {hook} priority 10 ; policy {policy} ; }}");
                run("nft", &format!("add chain inet others {chain} {what}"));
            }
            // As firewalld has it.
            let last = "type filter hook forward priority 10 ; policy accept ;";
            run("nft", &format!("add chain inet others last {{ {last} }}"));
            for rule in [
                "ct state established accept",
                "iifname lo drop",
                "reject with icmpx admin-prohibited",
            ] {
                run("nft", &format!("add rule inet others last {rule}"));
            }
            run("nft", "add rule inet others fine iifname lo drop");
            run("iptables-nft", "-A FORWARD -j REJECT");
            try_rules().unwrap();
            let found = [
                "inet others passing",
                "inet others last",
                "ip filter FORWARD",
            ];
            assert_eq!(dropping_chains().unwrap(), found);
            try_accepts().unwrap();
        });
    }

    #[test]
    fn a_chain_of_iptables_that_it_cannot_edit_is_told() {
        on_host(|| async {
            run("nft", "add table ip filter");
            let what = "{ type filter hook forward priority 0 ; policy drop ; }";
            run("nft", &format!("add chain ip filter FORWARD {what}"));
            run(
                "nft",
                "add rule ip filter FORWARD ct state established accept",
            );
            let [chain] = &dropping_chains().unwrap()[..] else {
                panic!("one");
            };
            assert!(is_iptables(chain));
            try_accepts().unwrap_err();
        });
    }
}
