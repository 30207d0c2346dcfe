//! The process structure, as `ps` shows it and as `/proc` proves it.

use nix::sys::signal::Signal;
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use tests::{Droplet, Host, Process, Tree, rounds};

/// Sleeps with a name of its own.
fn app() -> Droplet {
    Droplet::shell(r#"exec perl -e '$0 = "theapp"; $| = 1; print "up\n"; sleep 1000'"#)
}

/// The base directory of the only container.
fn container(host: &Host) -> PathBuf {
    let mut entries = fs::read_dir(host.base.join("containers"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let found = entries.next().expect("a container");
    assert!(entries.next().is_none());
    found
}

/// The parent of the app, its parent and so on, up to `wshd`.
fn line_of(tree: &Tree, comm: &str) -> Vec<String> {
    let mut process = tree.one(comm);
    let mut line = vec![process.comm.clone()];
    while process.comm != "wshd" {
        process = tree
            .0
            .iter()
            .find(|one| one.pid == process.ppid)
            .expect("a parent");
        line.push(process.comm.clone());
    }
    line
}

/// The tree, once the app is there and what the agent starts beside it.
async fn whole(host: &Host) -> Tree {
    let wanted = ["theapp", "iomux-link", "oom"];
    host.tree_until("app with its followers", |tree| {
        wanted.iter().all(|name| tree.named(name).len() == 1)
    })
    .await
}

#[tokio::test]
async fn the_tree_is_the_one_of_the_design() {
    let host = Host::start().await;
    assert_eq!(
        host.tree().children(host.agent().pid()),
        Vec::<&Process>::new(),
        "no app, no helper"
    );
    host.run(host.message("app", &app())).await;
    let tree = whole(&host).await;
    let container = container(&host);
    let handle = container.file_name().unwrap().to_str().unwrap();
    assert_eq!(handle.len(), 11);
    let socket = container.join("run/wshd.sock");
    let socket = socket.to_str().unwrap();

    let mut helpers: Vec<&str> = tree
        .children(host.agent().pid())
        .iter()
        .map(|child| child.comm.as_str())
        .collect();
    helpers.sort_unstable();
    assert_eq!(helpers, ["iomux-link", "iomux-spawn", "oom"], "\n{tree}");

    let spawn = tree.one("iomux-spawn");
    let job = container.join("jobs/1");
    assert_eq!(spawn.argv[1], job.to_str().unwrap());
    assert!(spawn.argv[2].ends_with("/wsh"), "{spawn:?}");
    assert_eq!(
        spawn.argv[3..],
        ["--socket", socket, "--user", "vcap", "/bin/bash"]
    );
    let wsh = tree.child(spawn.pid);
    assert_eq!(wsh.comm, "wsh");
    assert_eq!(
        wsh.argv[1..],
        ["--socket", socket, "--user", "vcap", "/bin/bash"]
    );
    assert_eq!(tree.one("iomux-link").argv[1], job.to_str().unwrap());
    assert!(tree.one("oom").argv[1].contains(handle));

    let wshd = tree.one("wshd");
    assert_eq!(wshd.ppid, 1);
    assert_eq!(wshd.title(), format!("wshd: {handle}"));
    assert_eq!(
        line_of(&tree, "theapp"),
        ["theapp", "startup", "bash", "wshd"],
        "\n{tree}"
    );
    // All five are static: no loader, no library of the host in them.
    for name in ["iomux-spawn", "wsh", "iomux-link", "oom", "wshd"] {
        let maps = fs::read_to_string(format!("/proc/{}/maps", tree.one(name).pid)).unwrap();
        assert!(!maps.contains(".so"), "{name} is not static:\n{maps}");
    }
    // What went into the container is no file that could be written: it is sealed in memory.
    let exe = format!("/proc/{}/exe", wshd.pid);
    let program = fs::read_link(&exe).unwrap();
    assert_eq!(program.to_str(), Some("/memfd:wshd (deleted)"));
    let refused = fs::File::options().append(true).open(&exe).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ExecutableFileBusy);
    host.stop("app").await;
}

#[tokio::test]
async fn an_app_writes_straight_into_its_supervisors_pipes() {
    let host = Host::start().await;
    host.run(host.message("app", &app())).await;
    let tree = host
        .tree_until("app", |tree| !tree.named("theapp").is_empty())
        .await;
    let (app, spawn) = (tree.one("theapp").pid, tree.one("iomux-spawn").pid);
    for descriptor in [1, 2] {
        let pipe = fs::read_link(format!("/proc/{app}/fd/{descriptor}")).unwrap();
        assert!(pipe.to_str().unwrap().starts_with("pipe:["), "{pipe:?}");
        let holds_read_end = fs::read_dir(format!("/proc/{spawn}/fd"))
            .unwrap()
            .flatten()
            .any(|entry| {
                let number = entry.file_name().into_string().unwrap();
                let info = fs::read_to_string(format!("/proc/{spawn}/fdinfo/{number}"))
                    .unwrap_or_default();
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t"));
                let is_read = flags
                    .and_then(|flags| u32::from_str_radix(flags, 8).ok())
                    .is_some_and(|flags| flags & 3 == 0);
                fs::read_link(entry.path()).is_ok_and(|link| link == pipe) && is_read
            });
        assert!(
            holds_read_end,
            "iomux-spawn does not read descriptor {descriptor} of the app"
        );
    }
    assert_eq!(
        fs::read_link(format!("/proc/{app}/fd/0")).unwrap().to_str(),
        Some("/dev/null")
    );
    let open: Vec<_> = fs::read_dir(format!("/proc/{app}/fd"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    assert_eq!(
        open.len(),
        3,
        "descriptors of the host in the app: {open:?}"
    );
    let status = fs::read_to_string(format!("/proc/{app}/status")).unwrap();
    // Its user is 2000 inside, and nobody of the host.
    let map = fs::read_to_string(format!("/proc/{app}/uid_map")).unwrap();
    let map: Vec<u32> = map
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    assert!(map[1] >= 1 << 16 && map[2] == 65_536, "{map:?}");
    let user = map[1] + 2000;
    for line in [
        format!("Uid:\t{user}\t{user}\t{user}\t{user}"),
        format!("Groups:\t{user}"),
        "NoNewPrivs:\t1".to_owned(),
        "CapEff:\t0000000000000000".to_owned(),
        "CapBnd:\t0000000000000000".to_owned(),
    ] {
        assert!(status.contains(&line), "no {line:?} in\n{status}");
    }
    host.stop("app").await;
}

/// Bytes that a process has read and written, by its own account.
fn moved(process: &Process) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", process.pid)).unwrap();
    io.lines()
        .filter(|line| line.contains("char:"))
        .map(|line| line.split(' ').nth(1).unwrap().parse::<u64>().unwrap())
        .sum()
}

#[tokio::test]
async fn output_passes_neither_wsh_nor_wshd() {
    let megabytes = if rounds() < 3 { 10 } else { 100 };
    let host = Host::start().await;
    let mut output = host.output("pour").await;
    let script = format!(
        "trap 'kill $!; head -c {megabytes}M /dev/zero; echo poured' USR1; echo up; sleep infinity & wait; sleep infinity"
    );
    host.run(host.message("pour", &Droplet::shell(&script)))
        .await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    let tree = host.tree();
    let before: u64 = ["wsh", "wshd"]
        .iter()
        .map(|name| moved(tree.one(name)))
        .sum();
    let shell = tree
        .0
        .iter()
        .find(|process| process.title() == "bash main.sh")
        .expect("the app");
    shell.signal(Signal::SIGUSR1);
    output
        .until("all of it", |output| {
            output.stream(0, "stdout").bytes.ends_with(b"poured\n")
        })
        .await;
    let after: u64 = ["wsh", "wshd"]
        .iter()
        .map(|name| moved(tree.one(name)))
        .sum();
    assert!(
        after - before < 65536,
        "{megabytes} MB of output moved {} bytes through wsh and wshd",
        after - before
    );
    host.stop("pour").await;
}

#[tokio::test]
async fn killing_the_agent_ends_linkers_and_notifiers_and_nothing_else() {
    let mut host = Host::start().await;
    host.run(host.message("app", &app())).await;
    let before = whole(&host).await;
    host.kill9().await;
    let alone = host
        .tree_until("end of its followers", |tree| {
            tree.named("iomux-link").is_empty() && tree.named("oom").is_empty()
        })
        .await;
    for name in ["iomux-spawn", "wsh", "wshd", "startup", "theapp"] {
        assert_eq!(alone.one(name).pid, before.one(name).pid, "{name}");
    }
    assert_eq!(
        alone.one("iomux-spawn").ppid,
        1,
        "the agent is no subreaper"
    );

    host.start_agent().await;
    let after = host
        .tree_until("followers", |tree| {
            tree.named("iomux-link").len() == 1 && tree.named("oom").len() == 1
        })
        .await;
    assert_eq!(after.0.len(), before.0.len(), "\n{after}");
    for name in ["iomux-spawn", "wsh", "wshd", "startup", "theapp"] {
        assert!(before.one(name).lives(), "{name}\n{after}");
    }
    host.stop("app").await;
}

#[tokio::test]
async fn killed_followers_come_back() {
    let host = Host::start().await;
    host.run(host.message("app", &app())).await;
    for name in ["iomux-link", "oom"] {
        let tree = host
            .tree_until(name, |tree| tree.named(name).len() == 1)
            .await;
        let old = tree.one(name).clone();
        old.signal(Signal::SIGKILL);
        host.tree_until("new one", |tree| {
            tree.named(name).iter().any(|new| new.pid != old.pid)
        })
        .await;
    }
    host.stop("app").await;
}

#[tokio::test]
async fn a_killed_wsh_loses_no_status() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    host.run(host.message("app", &app())).await;
    let tree = host
        .tree_until("app", |tree| !tree.named("theapp").is_empty())
        .await;
    tree.one("wsh").signal(Signal::SIGKILL);
    host.tree_until("end of wsh", |tree| tree.named("wsh").is_empty())
        .await;
    assert!(tree.one("theapp").lives());
    tree.one("theapp").signal(Signal::SIGSEGV);
    let exit = exits.next().await;
    assert_eq!(exit["exit_status"], 139);
    assert_eq!(exit["signal"], 11);
}

#[tokio::test]
async fn a_killed_supervisor_is_replaced() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut output = host.output("counter").await;
    let script = "n=0; while :; do n=$((n + 1)); echo out $n; sleep 0.01; done";
    host.run(host.message("counter", &Droplet::shell(script)))
        .await;
    output
        .until("lines", |output| output.stream(0, "stdout").next > 100)
        .await;
    let tree = host.tree();
    let old = tree.one("iomux-spawn").clone();
    old.signal(Signal::SIGKILL);
    let taken = host
        .tree_until("successor", |tree| {
            tree.named("iomux-spawn")
                .iter()
                .any(|new| new.pid != old.pid)
        })
        .await;
    assert!(
        taken
            .one("iomux-spawn")
            .argv
            .iter()
            .any(|argument| argument == "--takeover")
    );
    assert!(tree.one("wshd").lives());
    let seen = output.stream(0, "stdout").next;
    output
        .until("more lines", |output| {
            output.stream(0, "stdout").next > seen + 500
        })
        .await;
    let stream = output.stream(0, "stdout");
    assert_eq!(stream.holes, [], "what is missing is named");
    let whole = stream
        .bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .unwrap()
        + 1;
    if stream.dropped == 0 {
        tests::numbered("out", &stream.bytes[..whole]).unwrap();
    }
    let shell = taken
        .0
        .iter()
        .find(|process| process.title() == "bash main.sh")
        .expect("the app");
    shell.signal(Signal::SIGKILL);
    let exit = exits.next().await;
    assert_eq!(
        (&exit["exit_status"], &exit["signal"]),
        (&json!(137), &json!(9)),
        "its status is not lost"
    );
}

#[tokio::test]
async fn wsh_gives_a_person_a_shell() {
    let host = Host::start().await;
    host.run(host.message("app", &app())).await;
    let tree = host
        .tree_until("app", |tree| !tree.named("theapp").is_empty())
        .await;
    let wsh = &tree.one("wsh").argv[0];
    let wsh = if wsh.starts_with('/') {
        wsh.clone()
    } else {
        tree.one("iomux-spawn").argv[2].clone()
    };
    let socket = container(&host).join("run/wshd.sock");
    // util-linux's script(1) is the terminal; what it is told to type comes from a here-document.
    let typed = r#"script --quiet --return --command "stty rows 33 cols 99; exec $WSH --socket $SOCKET --user vcap /bin/bash" /dev/null <<'END' || echo "code $?"
echo "size $(stty size) tty $(tty) user $(id -un) jobs $-"
sleep 100 & jobs; kill %1
exit 7
END"#;
    let typed = format!(
        "WSH={wsh} SOCKET={}; export WSH SOCKET\n{typed}",
        socket.display()
    );
    let said = tests::tool("bash", &["-c", &typed]);
    assert!(
        said.contains("size 33 99 tty /dev/pts/0 user vcap jobs"),
        "{said}"
    );
    assert!(said.contains("Running"), "job control: {said}");
    assert!(said.contains("code 7"), "{said}");
    // Without a terminal it is a pipe like any other program.
    let plain = format!(
        "echo 'id -u; echo oops >&2; exit 5' | {wsh} --socket {} --user vcap /bin/bash 2>&1; echo code $?",
        socket.display()
    );
    assert_eq!(tests::tool("bash", &["-c", &plain]), "2000\noops\ncode 5\n");
    let absent = format!(
        "{wsh} --socket {} --user vcap /no/such/program 2>&1; echo code $?",
        socket.display()
    );
    assert!(tests::tool("bash", &["-c", &absent]).ends_with("code 127\n"));
    host.stop("app").await;
}

#[tokio::test]
async fn every_helper_teaches_a_person() {
    let host = Host::start().await;
    host.run(host.message("app", &app())).await;
    let tree = host
        .tree_until("app", |tree| !tree.named("theapp").is_empty())
        .await;
    let wsh = PathBuf::from(&tree.one("iomux-spawn").argv[2]);
    for helper in ["wshd", "wsh", "iomux-spawn", "iomux-link", "oom"] {
        let help = tests::tool(wsh.with_file_name(helper).to_str().unwrap(), &["--help"]);
        assert!(
            help.contains(helper) && help.lines().count() >= 3,
            "{helper} --help says:\n{help}"
        );
    }
    let followed = tests::tool(
        wsh.with_file_name("iomux-link").to_str().unwrap(),
        &[
            container(&host).join("jobs/1").to_str().unwrap(),
            "--no-follow",
        ],
    );
    assert_eq!(followed, "up\n");
    host.stop("app").await;
}
