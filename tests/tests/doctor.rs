//! `ostler doctor`, and the agent that refuses to be weaker than it says.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use tests::{Host, tool};

fn run(command: &mut Command) -> (i32, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let said = [stdout, stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (status.code().expect("it was not killed"), said)
}

/// The report's lines at this level, without the level.
fn lines<'a>(report: &'a str, level: &str) -> Vec<&'a str> {
    let lines = report.lines().filter_map(|line| line.strip_prefix(level));
    lines.map(str::trim_start).collect()
}

/// The mounts of this machine, without those that other tests make at the same time.
fn mounts(host: &Host) -> Vec<String> {
    let mark = host.base.parent().unwrap().file_name().unwrap();
    let mark = mark.to_str().unwrap();
    let of_others = |line: &&str| {
        let theirs = line.contains("ostler-test-") && !line.contains(mark);
        !theirs && !line.contains("/run/netns") && !line.contains("/dev/loop")
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter(of_others)
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn the_report_tells_what_this_machine_has_and_changes_nothing() {
    let host = Host::start().await;
    let before = (tool("nft", &["list", "ruleset"]), tool("ip", &["link"]));
    let mounts = mounts(&host);
    let (code, report) = run(&mut host.ostler("doctor"));
    assert_eq!(
        (code, lines(&report, "missing")),
        (0, Vec::new()),
        "{report}"
    );
    for line in [
        "kernel: Linux ",
        "user namespaces: ",
        "other namespaces: ",
        "seccomp filters: ",
        "sealed memory files: ",
        "base directory: ",
        "stack debian: ",
        "control group memory: v",
        "network rules: ",
        "helpers: ",
    ] {
        let found = lines(&report, "ok")
            .into_iter()
            .filter(|ok| ok.starts_with(line));
        assert_eq!(found.count(), 1, "{line}\n{report}");
    }
    assert_eq!(
        (tool("nft", &["list", "ruleset"]), tool("ip", &["link"])),
        before
    );
    assert_eq!(self::mounts(&host), mounts);
    let kept: Vec<String> = fs::read_dir(&host.base)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("probe"))
        .collect();
    assert_eq!(kept, Vec::<String>::new());
    // Before there is a configuration, too.
    let by = ["sh", "-c", "exec \"$0\" doctor --config /nonexistent"];
    let (code, report) = run(&mut host.ostler_by(&by, "doctor"));
    let [first, ..] = lines(&report, "missing")[..] else {
        panic!("{report}");
    };
    assert_eq!(code, 1);
    assert!(
        first.starts_with("configuration: ") && first.contains("/nonexistent"),
        "{report}"
    );
    assert!(report.contains("user namespaces: "), "{report}");
    let (_, report) = run(&mut host.ostler("doctor"));
    let (code, json) = run(host.ostler("doctor").arg("--json"));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["ok"]), (0, &Value::Bool(true)));
    assert_eq!(
        json["findings"].as_array().unwrap().len(),
        report.lines().count()
    );
}

/// Others' rules and settings, in this test's own network namespace.
#[tokio::test]
async fn what_is_weaker_is_a_warning_with_what_to_do() {
    let host = Host::start().await;
    tool(
        "nft",
        &[
            "add table inet others; add chain inet others passing { type filter hook forward priority 9; policy drop; }",
        ],
    );
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "32768 62000").unwrap();
    let (code, report) = run(&mut host.ostler("doctor"));
    assert_eq!(code, 0, "{report}");
    let warnings = lines(&report, "warn").join("\n");
    for words in [
        "others' firewalls: chain inet others passing drops what is forwarded, and the agent does not edit it. Let packets",
        "mapped ports: the host may take 61001 for a connection of its own, and then it leads nowhere. \
         Set net.ipv4.ip_local_reserved_ports to 61001-65000, by sysctl",
    ] {
        assert!(warnings.contains(words), "{words}\n{report}");
    }
    fs::write("/proc/sys/net/ipv4/ip_local_reserved_ports", "61001-65000").unwrap();
    let (_, report) = run(&mut host.ostler("doctor"));
    assert!(!report.contains("ip_local_reserved_ports"), "{report}");
    tool("ip", &["link", "add", "os-mgmt", "type", "bridge"]);
    let (code, report) = run(&mut host.ostler("doctor"));
    let found = "names of links: os-mgmt is taken for a container's";
    assert!(code == 1 && report.contains(found), "{report}");
    tool("ip", &["link", "delete", "os-mgmt"]);
    assert_eq!(run(&mut host.ostler("doctor")).0, 0);
}

/// Fails unless both say exactly this is missing, and neither goes on.
fn both_refuse(host: &Host, wrapper: &[&str], begin: &str) {
    let (code, report) = run(&mut host.ostler_by(wrapper, "doctor"));
    let missing = lines(&report, "missing");
    assert_eq!(code, 1, "{report}");
    let told = missing.iter().find(|line| line.starts_with(begin));
    let told = told.unwrap_or_else(|| panic!("no {begin}\n{report}"));
    let (code, said) = run(&mut host.ostler_by(wrapper, "agent"));
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("lacks what containers need") && said.contains(told),
        "{told}\n{said}"
    );
}

#[tokio::test]
async fn a_stack_that_cannot_be_mapped_is_told_and_the_agent_refuses_in_the_same_words() {
    let host = Host::start().await;
    let config = fs::read_to_string(host.base.with_file_name("agent.toml")).unwrap();
    let stack = config
        .lines()
        .find_map(|line| line.strip_prefix("debian = "));
    let stack = stack.unwrap().trim_matches('"');
    // Of all file systems an overlay: mapping one is what the kernel never does.
    let script =
        "mount -t overlay overlay -o lowerdir=\"$0\":/var/empty \"$0\" || exit 9; exec \"$@\"";
    fs::create_dir_all("/var/empty").unwrap();
    let wrapper = ["unshare", "--mount", "sh", "-c", script, stack];
    let begin = format!(
        "stack debian: \"{stack}\" lies on a file system that cannot be mapped to a container's users ("
    );
    both_refuse(&host, &wrapper, &begin);
    let (code, report) = run(&mut host.ostler("doctor"));
    assert_eq!(code, 0, "the host itself is as it was: {report}");
}

#[tokio::test]
async fn a_host_without_user_namespaces_is_told_and_the_agent_refuses_in_the_same_words() {
    let host = Host::start().await;
    // The limit of the throw-away user namespace, not the host's.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
    let wrapper = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
    ];
    both_refuse(
        &host,
        &wrapper,
        "user namespaces: cannot be made (No space left on device). Set user.max_user_namespaces",
    );
    let (code, report) = run(&mut host.ostler("doctor"));
    assert_eq!(code, 0, "the host itself is as it was: {report}");
}

#[tokio::test]
async fn what_is_wrong_about_the_bus_is_told_before_an_agent_ends_of_it() {
    let host = Host::start().await;
    let wrong = ["env", "NATS_TIMEOUT=never"];
    let (code, report) = run(&mut host.ostler_by(&wrong, "doctor"));
    assert_eq!(code, 1, "{report}");
    let missing = lines(&report, "missing");
    assert!(missing[0].starts_with("bus: NATS_TIMEOUT "), "{report}");
    let (code, words) = run(&mut host.ostler_by(&wrong, "agent"));
    assert_eq!(code, 78, "{words}");
}

#[tokio::test]
async fn helpers_and_control_groups_that_are_missing_keep_the_agent_from_starting() {
    let host = Host::start().await;
    let config = fs::read_to_string(host.base.with_file_name("agent.toml")).unwrap();
    let helpers = config
        .lines()
        .find_map(|line| line.strip_prefix("helpers = "));
    let helpers = helpers.unwrap().trim_matches('"');
    let hide = "mount -t tmpfs tmpfs \"$0\" || exit 9; exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", hide, helpers];
    let begin = format!("helpers: \"{helpers}\" has no wshd, ");
    both_refuse(&host, &wrapper, &begin);
    // All are there, one of them of another build: its stamp differs.
    let other = "mount -t tmpfs tmpfs /mnt && for one in wshd wsh iomux-spawn iomux-link oom; do cp \"$0/$one\" /mnt; done && mount --bind /mnt \"$0\" && \
                 sed -i 's/, helpers of ./, helpers of z/' \"$0/oom\" || exit 9; exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", other, helpers];
    let begin = format!("helpers: in \"{helpers}\" oom is of another build than this program");
    both_refuse(&host, &wrapper, &begin);
    let unmount = "umount --recursive --lazy /sys/fs/cgroup || exit 9; exec \"$0\" \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", unmount];
    both_refuse(&host, &wrapper, "control groups: ");
}
