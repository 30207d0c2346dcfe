//! Each limit is exceeded, and binds; and what a container must not see or reach.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::Instant;
use tests::{Droplet, Host, Network, Running, Setup, Tree, patience, skip, tool};

#[tokio::test]
async fn memory_ends_the_hog_and_no_neighbour() {
    let host = Host::start().await;
    host.run(host.message("neighbour", &Droplet::sample("sleeper")))
        .await;
    let neighbour = host.tree().one("wshd").clone();
    let mut ooms = host.watch("droplet.oom").await;
    for round in ["first", "second"] {
        let mut message = host.message(round, &Droplet::sample("hog"));
        message["limits"]["mem"] = json!(32);
        host.publish(&host.subject("start"), &message).await;
        let oom = ooms.until("OOM of it", |oom| oom["droplet"] == round).await;
        assert_eq!(oom["victim"]["comm"], "hog", "{oom}");
        // A notifier that was killed comes back and tells the next one.
        let tree = host
            .tree_until("notifier", |tree| tree.named("oom").len() == 1)
            .await;
        let old = tree.one("oom").clone();
        old.signal(Signal::SIGKILL);
        host.tree_until("new notifier", |tree| {
            tree.named("oom").iter().any(|new| new.pid != old.pid)
        })
        .await;
    }
    assert!(neighbour.lives());
    host.stop("neighbour").await;
}

/// 256 MB of swap, for the whole machine, until this is dropped.
struct Swap;

impl Swap {
    const FILE: &str = "/var/tmp/ostler-test-swap";

    fn on() -> Self {
        let of = format!("of={}", Self::FILE);
        tool(
            "dd",
            &["if=/dev/zero", &of, "bs=1M", "count=256", "status=none"],
        );
        tool("chmod", &["600", Self::FILE]);
        tool("mkswap", &[Self::FILE]);
        tool("swapon", &[Self::FILE]);
        Self
    }

    /// Pages that were written to it so far (proc(5), `/proc/vmstat`).
    fn written() -> u64 {
        let text = fs::read_to_string("/proc/vmstat").unwrap();
        let pages = text.lines().find_map(|line| line.strip_prefix("pswpout "));
        pages.unwrap().parse().unwrap()
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        tool("swapoff", &[Self::FILE]);
        fs::remove_file(Self::FILE).unwrap();
    }
}

/// In the virtual machine only: swap is the whole machine's.
#[tokio::test]
async fn memory_beyond_the_limit_is_not_had_from_swap() {
    if std::env::var_os("OSTLER_VM").is_none() {
        return skip("swap, here: it is tried in the virtual machine");
    }
    let _swap = Swap::on();
    let (group, limit) = match tests::is_cgroup_v2() {
        true => ("/sys/fs/cgroup/swaps", "memory.max"),
        false => ("/sys/fs/cgroup/memory/swaps", "memory.limit_in_bytes"),
    };
    // Whoever has no limit but that of memory gets the rest from swap.
    let before = Swap::written();
    let script = format!(
        "mkdir {group}; echo $((32 << 20)) >{group}/{limit}; \
         (echo $BASHPID >{group}/cgroup.procs; exec perl -e '$x = \"x\" x (80 << 20); print \"lived\"'); \
         rmdir {group}"
    );
    assert_eq!(tool("bash", &["-c", &script]), "lived");
    let swapped = Swap::written() - before;
    assert!(swapped > (40 << 20) / 4096, "{swapped} pages");

    let host = Host::start().await;
    let mut ooms = host.watch("droplet.oom").await;
    let before = Swap::written();
    let mut message = host.message("hog", &Droplet::sample("hog"));
    message["limits"]["mem"] = json!(32);
    host.publish(&host.subject("start"), &message).await;
    let oom = ooms.next().await;
    assert_eq!(oom["victim"]["comm"], "hog", "{oom}");
    let swapped = Swap::written() - before;
    assert!(swapped < (4 << 20) / 4096, "{swapped} pages");
}

/// Bytes in the queues of all TCP connections of the machine (`/proc/net/sockstat`, in pages).
fn tcp_queues() -> u64 {
    let text = fs::read_to_string("/proc/net/sockstat").unwrap();
    let tcp = text.lines().find(|line| line.starts_with("TCP:")).unwrap();
    let pages = tcp.split(' ').next_back().unwrap();
    pages.parse::<u64>().unwrap() * 4096
}

/// v1 counts them for nothing unless they have a limit of their own, v2 as memory.
#[tokio::test]
async fn an_apps_tcp_queues_hold_no_more_than_its_memory() {
    if tests::is_cgroup_v2() {
        return;
    }
    let host = Host::start().await;
    let script = r#"exec perl -MIO::Socket::INET -e '
  $| = 1;
  my @all;
  my $server = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") or die;
  for (1 .. 100) {
    my $one = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $server->sockport) or die;
    push @all, $one, scalar $server->accept;
  }
  for (@all) { $_->blocking(0); 1 while syswrite $_, "x" x 65536 }
  print "full\n"; sleep 1000;'"#;
    let mut output = host.output("full").await;
    let mut message = host.message("full", &Droplet::shell(script));
    message["limits"]["mem"] = json!(64);
    let before = tcp_queues();
    host.run(message).await;
    output
        .until("its end", |output| output.text(0, "stdout") == "full\n")
        .await;
    // Each socket may have a little beyond it; what others of this machine send meanwhile does not stay.
    let mut looks = Vec::new();
    for _ in 0..20 {
        looks.push(tcp_queues().saturating_sub(before));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let queued = looks.into_iter().min().unwrap();
    assert!((32 << 20..96 << 20).contains(&queued), "{queued}");
    host.stop("full").await;
}

/// A program of the host that each core is piped to, and leaves a file with the name of who crashed. What the machine
/// had before it has again when this is dropped.
struct Cores(String);

impl Cores {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";

    fn piped() -> Self {
        let before = fs::read_to_string(Self::PATTERN).unwrap();
        fs::write(Self::PATTERN, "|/bin/touch /run/core-of-%e").unwrap();
        Self(before)
    }

    fn of(name: &str) -> bool {
        Path::new("/run").join(format!("core-of-{name}")).exists()
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        fs::write(Self::PATTERN, &self.0).unwrap();
    }
}

/// In the virtual machine only: where cores go is the whole machine's.
#[tokio::test]
async fn a_crash_starts_no_program_of_the_host() {
    if std::env::var_os("OSTLER_VM").is_none() {
        return skip("pipes for core files, here: they are tried in the virtual machine");
    }
    let _cores = Cores::piped();
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    // The control is last: the kernel looks at no other limit than the one that the first has, not even at 0.
    for (name, before) in [("first", ""), ("last", "ulimit -c 0; ")] {
        let script = format!("{before}exec perl -e '$0 = \"{name}\"; kill SEGV => $$'");
        let message = host.message(name, &Droplet::shell(&script));
        host.publish(&host.subject("start"), &message).await;
        let exit = exits.until("its end", |exit| exit["droplet"] == name).await;
        assert_eq!(exit["signal"], json!(11), "{exit}");
    }
    let began = Instant::now();
    while !Cores::of("last") {
        assert!(began.elapsed() < patience(), "the program does not run");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(!Cores::of("first"));
}

#[tokio::test]
async fn a_kill_while_the_agent_is_down_is_found() {
    let mut host = Host::start().await;
    let mut output = host.output("later").await;
    let mut ooms = host.watch("droplet.oom").await;
    let script = "trap 'exec perl hog.pl' USR1; echo up; while :; do sleep 0.05; done\n";
    let hog = fs::read_to_string(tests::fixtures().join("apps/hog/app/hog.pl")).unwrap();
    let script = format!("cat >hog.pl <<'END'\n{hog}END\n{script}");
    let mut message = host.message("later", &Droplet::shell(&script));
    message["limits"]["mem"] = json!(48);
    host.run(message).await;
    output
        .until("first line", |output| output.text(0, "stdout") == "up\n")
        .await;
    let tree = host.tree();
    host.kill9().await;
    tree.0
        .iter()
        .find(|process| process.title() == "bash main.sh")
        .expect("the app")
        .signal(Signal::SIGUSR1);
    host.tree_until("end of the app", |tree| {
        tree.0
            .iter()
            .all(|process| process.comm != "hog" && process.title() != "bash main.sh")
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    host.start_agent().await;
    let oom = ooms.next().await;
    assert_eq!(oom["droplet"], "later", "{oom}");
    let exit = exits.next().await;
    assert_eq!(
        (&exit["oom"], &exit["exit_description"]),
        (&json!(true), &json!("out of memory")),
        "{exit}"
    );
}

#[tokio::test]
async fn processes_and_open_files_have_an_end() {
    let few = ("[network]", "[instance]\npids = 40\n[network]");
    let host = Host::with(Setup {
        config: &[few],
        ..Default::default()
    })
    .await;
    let mut output = host.output("greedy").await;
    let script = r#"exec perl -e '
  $| = 1;
  my ($files, @files) = (0);
  while (open my $file, "<", "/dev/null") { push @files, $file; $files++ }
  print "files $files\n";
  @files = ();
  my ($forks, $pid) = (0);
  while (defined($pid = fork)) { if (!$pid) { sleep 1000; exit } $forks++; last if $forks > 100 }
  print "forks $forks\n";
  sleep 1000;
'"#;
    let mut message = host.message("greedy", &Droplet::shell(script));
    message["limits"]["fds"] = json!(100);
    host.run(message).await;
    output
        .until("both", |output| output.text(0, "stdout").contains("forks"))
        .await;
    let text = output.text(0, "stdout");
    assert!(text.contains("files 97\n"), "{text}");
    let forks: u32 = text.trim().rsplit(' ').next().unwrap().parse().unwrap();
    // wshd, bash, startup and the app itself are counted too.
    assert!((30..40).contains(&forks), "{text}");
    host.stop("greedy").await;
}

/// What the kernel holds an instance to: processes, microseconds of each 100,000, and its weight.
fn held_to(host: &Host, handle: &str) -> [String; 3] {
    let [cap, weight] = match tests::is_cgroup_v2() {
        true => ["cpu.max", "cpu.weight"],
        false => ["cpu.cfs_quota_us", "cpu.shares"],
    };
    [("pids", "pids.max"), ("cpu", cap), ("cpu", weight)].map(|(controller, file)| {
        let text = fs::read_to_string(host.group(controller, handle).join(file)).unwrap();
        text.split_whitespace().next().unwrap().to_owned()
    })
}

#[tokio::test]
async fn processes_and_processor_time_are_as_configured_also_by_the_next_agent() {
    const LIMITS: &str = "[instance]\npids = 40\nmax_cpu_percent = 20\nmin_cpu_shares = 256\n";
    let limits = format!("{LIMITS}[network]");
    let mut host = Host::with(Setup {
        config: &[("[network]", &limits)],
        ..Default::default()
    })
    .await;
    let message = host.message("app", &Droplet::shell("exec sleep 1000"));
    let handle = host.run(message).await["handle"]
        .as_str()
        .unwrap()
        .to_owned();
    // Shares on v1, and what they weigh on v2.
    let [unlimited, most, less] = match tests::is_cgroup_v2() {
        true => ["max", "35", "17"],
        false => ["-1", "256", "100"],
    };
    assert_eq!(held_to(&host, &handle), ["40", "20000", most]);
    let config = host.base.parent().unwrap().join("agent.toml");
    let text = fs::read_to_string(&config).unwrap();
    let shares = "min_cpu_shares = 100\nmax_cpu_shares = 100\n";
    for (limits, wanted) in [
        (
            "pids = 60\nmax_cpu_percent = 150\nmin_cpu_shares = 256\n".to_owned(),
            ["60", "150000", most],
        ),
        (format!("pids = 30\n{shares}"), ["30", unlimited, less]),
    ] {
        host.kill9().await;
        fs::write(
            &config,
            text.replace(LIMITS, &format!("[instance]\n{limits}")),
        )
        .unwrap();
        host.start_agent().await;
        host.tree_until("limits", |_| held_to(&host, &handle) == wanted)
            .await;
    }
    host.stop("app").await;
}

/// The stats of an instance of `droplet`, once all of `keys` are in its usage: an instance that is too busy to measure
/// in time leaves them out.
async fn stats(host: &Host, droplet: &str, keys: &[&str]) -> Value {
    let find = json!({"droplet": droplet, "include_stats": true});
    let deadline = Instant::now() + patience();
    loop {
        let found = host.request("dea.find.droplet", &find).await;
        let usage = &found["stats"]["usage"];
        if keys.iter().all(|key| usage.get(key).is_some()) {
            return found["stats"].clone();
        }
        assert!(Instant::now() < deadline, "no {keys:?}: {found}");
    }
}

/// Bytes that an instance of `droplet` has on the disk, and may have.
async fn disk(host: &Host, droplet: &str) -> (u64, u64) {
    let stats = stats(host, droplet, &["disk"]).await;
    let used = stats["usage"]["disk"].as_u64();
    let most = stats["disk_quota"].as_u64();
    used.zip(most).unwrap_or_else(|| panic!("{stats}"))
}

#[tokio::test]
async fn a_full_disk_is_the_apps_own_and_its_limit_changes_while_it_runs() {
    let mut host = Host::start().await;
    if host.logged(0, "disk=\"").await.contains("disk=\"images\"") {
        host.logged(0, "project quotas are not used no_quota=")
            .await;
    }
    let mut output = host.output("filler").await;
    host.run(host.message("neighbour", &Droplet::sample("sleeper")))
        .await;
    let script = "fill() { dd if=/dev/zero of=$HOME/zeros bs=1M count=200 2>&1 | head -1; }\n\
                  trap fill USR1\nfill\nwhile :; do sleep 0.05; done\n";
    let mut message = host.message("filler", &Droplet::shell(script));
    message["limits"]["disk"] = json!(32);
    let answer = host.run(message).await;
    let scale = |disk: u64| json!({"droplet": "filler", "instances": 1, "limits": {"disk": disk}});
    for (full, most) in (1..).zip([32, 64, 96]) {
        if full > 1 {
            let scaled = host.request(&host.subject("scale"), &scale(most)).await;
            assert_eq!(scaled["ok"], true, "{scaled}");
            assert!(scaled.get("refused").is_none(), "{scaled}");
            let tree = host.tree();
            let app = tree.0.iter().find(|one| one.title() == "bash main.sh");
            app.expect("the app").signal(Signal::SIGUSR1);
        }
        output
            .until("full", |output| {
                let text = output.text(0, "stdout");
                text.matches("No space left on device").count() == full
            })
            .await;
        let (used, limit) = disk(&host, "filler").await;
        assert_eq!(limit, most << 20);
        assert!(((most - 1) << 20..=most << 20).contains(&used), "{used}");
        let (used, _) = disk(&host, "neighbour").await;
        assert!((1..1 << 20).contains(&used), "{used}");
        // What is not free any more is promised to nobody, and nothing changes.
        let scaled = host.request(&host.subject("scale"), &scale(16)).await;
        assert_eq!(scaled["refused"], json!([answer["handle"]]), "{scaled}");
        assert_eq!(disk(&host, "filler").await.1, most << 20);
        host.restart().await;
        assert!(disk(&host, "filler").await.0 >= (most - 1) << 20);
    }
    host.stop("filler").await;
    host.stop("neighbour").await;
}

/// How many files each process of a container but its init may have open: number, soft and hard limit.
fn open_files(host: &Host, handle: &str) -> Vec<(i32, u64, u64)> {
    let group = host.group("memory", handle).join("cgroup.procs");
    let members = fs::read_to_string(group).unwrap();
    let limits = members.lines().filter_map(|pid| {
        // It may have ended meanwhile.
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let limits =
            read("limits").filter(|_| read("comm").is_some_and(|comm| comm != "wshd\n"))?;
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"))?;
        let mut numbers = line.split_whitespace().map(|word| word.parse().ok());
        Some((pid.parse().ok()?, numbers.next()??, numbers.next()??))
    });
    limits.collect()
}

#[tokio::test]
async fn the_number_of_open_files_changes_while_it_runs() {
    let host = Host::start().await;
    // One that left its parent's session, one that wants fewer, and one that is always another process.
    let script = r#"perl -e '$0 = "theapp"; $SIG{USR1} = sub {
    my @files; while (open my $file, "<", "/dev/null") { push @files, $file } print "files ", scalar @files, "
"
  }; $| = 1; print "up
"; sleep 1 while 1' &
  setsid perl -e '$0 = "daemon"; sleep 1 while 1' &
  (ulimit -Sn 20; exec perl -e '$0 = "modest"; sleep 1 while 1') &
  perl -e '$0 = "hopper"; while (1) { exit if fork; select undef, undef, undef, 0.0005 }' &
  while :; do wait; sleep 0.1; done"#;
    let mut output = host.output("app").await;
    let answer = host.run(host.message("app", &Droplet::shell(script))).await;
    let handle = answer["handle"].as_str().unwrap();
    output
        .until("up", |output| output.text(0, "stdout") == "up\n")
        .await;
    let tree = host
        .tree_until("all", |tree| {
            tree.named("daemon").len() + tree.named("modest").len() == 2
        })
        .await;
    let modest = tree.one("modest").pid;
    let (scale, find) = (
        host.subject("scale"),
        json!({"droplet": "app", "include_stats": true}),
    );
    let limit = async |limits: Value| {
        let request = json!({"droplet": "app", "instances": 1, "limits": limits});
        host.request(&scale, &request).await
    };
    let is = |fds: u64| {
        let all = open_files(&host, handle);
        assert!(all.len() >= 5, "{all:?}");
        for (pid, soft, hard) in all {
            let wanted = if pid == modest { 20 } else { fds };
            assert_eq!((soft, hard), (wanted, fds), "{pid}\n{}", host.tree());
        }
    };
    is(1024);
    let mut fds = 1024;
    for _ in 0..tests::rounds() {
        let less = fds - 4;
        let answer = limit(json!({"fds": less})).await;
        if may_change(&tree) {
            assert_eq!(answer["refused"], json!(null), "{answer}");
            fds = less;
        } else {
            assert_eq!(answer["refused"], json!([handle]), "{answer}");
        }
        is(fds);
    }
    tree.one("theapp").signal(Signal::SIGUSR1);
    let most = format!("files {}\n", fds - 3);
    output
        .until("as many as it may", |output| {
            output.text(0, "stdout").ends_with(&most)
        })
        .await;

    // More than it began with: if the host lets its agent. All of a request is done, or nothing.
    let answer = limit(json!({"fds": 2000, "mem": 200})).await;
    let found = host.request("dea.find.droplet", &find).await;
    let memory = if tests::is_cgroup_v2() {
        "memory.max"
    } else {
        "memory.limit_in_bytes"
    };
    let memory = fs::read_to_string(host.group("memory", handle).join(memory)).unwrap();
    let (fds, mem) = if may_raise() {
        (2000, 200 << 20)
    } else {
        (fds, 128 << 20)
    };
    if !may_raise() {
        assert_eq!(answer["refused"], json!([handle]), "{answer}");
        let why = answer["why"][handle]["message"].as_str().unwrap();
        assert!(why.contains("CAP_SYS_RESOURCE"), "{answer}");
    }
    is(fds);
    assert_eq!(memory.trim(), (mem as u64).to_string(), "{answer}");
    let told = (&found["stats"]["fds_quota"], &found["stats"]["mem_quota"]);
    assert_eq!(told, (&json!(fds), &json!(mem)), "{found}");
    host.stop("app").await;
}

/// Whether an agent of ours may limit others at all: without that capability it takes a user namespace.
fn may_change(tree: &Tree) -> bool {
    let user = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    may_raise() || user(&tree.one("wshd").pid.to_string()) != user("self")
}

/// Whether we, and so the agent, have `CAP_SYS_RESOURCE`: bit 24.
fn may_raise() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let set = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    u64::from_str_radix(set.trim(), 16).unwrap() >> 24 & 1 == 1
}

#[tokio::test]
async fn processor_time_has_an_end_also_where_nobody_else_wants_it() {
    let capped = ("[network]", "[instance]\nmax_cpu_percent = 20\n[network]");
    let host = Host::with(Setup {
        config: &[capped],
        ..Default::default()
    })
    .await;
    let script = "exec perl -e '$0 = \"burner\"; 1 while 1'";
    host.run(host.message("burner", &Droplet::shell(script)))
        .await;
    let tree = host
        .tree_until("burner", |tree| tree.named("burner").len() == 1)
        .await;
    let (began, before) = (Instant::now(), ticks(&tree, "burner"));
    let tree = host
        .tree_until("a second and a half", |_| {
            began.elapsed().as_millis() > 1500
        })
        .await;
    let used = ticks(&tree, "burner") - before;
    let most = began.elapsed().as_millis() / 10 / 5 + 8;
    assert!(
        used > 3 && u128::from(used) < most,
        "{used} of {most} ticks"
    );
    // A fraction of one processor, since a question that is more than a second old.
    let first = cpu_of(&host, "burner").await;
    let asked = Instant::now();
    host.tree_until("another second", |_| asked.elapsed().as_millis() > 1200)
        .await;
    let cpu = cpu_of(&host, "burner").await;
    assert!((0.01..0.35).contains(&cpu), "{first}, then {cpu}");
    host.stop("burner").await;
}

/// What is told of the processor time of an app's instance, once it is: a busy machine leaves it out.
async fn cpu_of(host: &Host, droplet: &str) -> f64 {
    let filter = json!({"droplet": droplet, "include_stats": true});
    let deadline = Instant::now() + patience();
    loop {
        let found = host.request("dea.find.droplet", &filter).await;
        if let Some(cpu) = found["stats"]["usage"]["cpu"].as_f64() {
            return cpu;
        }
        assert!(Instant::now() < deadline, "{found}");
    }
}

/// Clock ticks that all processes called `comm` have used.
fn ticks(tree: &Tree, comm: &str) -> u64 {
    let used = |pid: i32| -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    tree.named(comm)
        .iter()
        .map(|process| used(process.pid))
        .sum()
}

#[tokio::test]
async fn cpu_goes_by_shares_where_it_is_short() {
    let host = Host::start().await;
    let burner = |name: &str| {
        Droplet::shell(&format!(
            "exec taskset -c 0 perl -e '$0 = \"{name}\"; 1 while 1'"
        ))
    };
    for (name, mem) in [("small", 64), ("large", 512)] {
        let mut message = host.message(name, &burner(name));
        message["limits"]["mem"] = json!(mem);
        host.run(message).await;
    }
    let start = host
        .tree_until("both", |tree| {
            tree.named("small").len() + tree.named("large").len() == 2
        })
        .await;
    let (small, large) = (ticks(&start, "small"), ticks(&start, "large"));
    // Until the large one has had one and a half seconds of CPU 0: a measurement, not a wait.
    let end = host
        .tree_until("CPU time", |tree| ticks(tree, "large") > large + 150)
        .await;
    let (small, large) = (ticks(&end, "small") - small, ticks(&end, "large") - large);
    assert!(
        large > 3 * small,
        "one to eight by limit; used {small} and {large} ticks"
    );
    host.stop("small").await;
    host.stop("large").await;
}

#[tokio::test]
async fn a_container_has_its_own_of_everything() {
    let host = Host::start().await;
    let mut output = host.output("look").await;
    let script = r#"
for space in mnt pid net ipc uts cgroup; do echo "$space $(readlink /proc/self/ns/$space)"; done
echo "root $(stat -f -c %T /) hostname $(hostname) processes $(ls -d /proc/[0-9]* | wc -l)"
echo "dev $(ls /dev | tr '\n' ' ')"
echo "kcore $(cat /proc/kcore 2>/dev/null | head -c 10 | wc -c)"
echo 1 2>/dev/null >/proc/sys/kernel/domainname || echo "sys is read-only"
ls /etc/resolv.conf /etc/hosts
getent hosts "$(hostname)" || grep -w "$(hostname)" /etc/hosts
echo end; sleep infinity"#;
    host.run(host.message("look", &Droplet::shell(script)))
        .await;
    output
        .until("all", |output| output.text(0, "stdout").ends_with("end\n"))
        .await;
    let text = output.text(0, "stdout");
    for space in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let ours = fs::read_link(format!("/proc/thread-self/ns/{space}")).unwrap();
        assert!(text.contains(&format!("{space} {space}:[")), "{text}");
        assert!(
            !text.contains(ours.to_str().unwrap()),
            "{space} is the host's: {text}"
        );
    }
    assert!(text.contains("root overlay"), "{text}");
    assert!(
        text.contains("kcore 0\n") && text.contains("sys is read-only"),
        "{text}"
    );
    let devices = text
        .lines()
        .find_map(|line| line.strip_prefix("dev "))
        .unwrap();
    for device in devices.split_whitespace() {
        let known = [
            "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm",
            "stderr", "stdin", "stdout", "tty", "urandom", "zero",
        ];
        assert!(known.contains(&device), "/dev/{device}");
    }
    host.stop("look").await;
}

#[tokio::test]
async fn two_containers_do_not_meet_and_both_get_out() {
    let host = Host::start().await;
    let listener = std::net::TcpListener::bind((Network::HOST, 0)).unwrap();
    let own = listener.local_addr().unwrap().port();
    let outside = host
        .network
        .outside(|| std::net::TcpListener::bind((Network::OUTSIDE, 0)).unwrap());
    let far = outside.local_addr().unwrap().port();
    let mut message = host.message("web", &Droplet::sample("sinatra"));
    message["uris"] = json!(["web.example.net"]);
    host.run(message).await;
    let web = host
        .request(
            "dea.find.droplet",
            &json!({"droplet": "web", "include_stats": true}),
        )
        .await;
    let port = &web["stats"]["port"];
    let address = tool("nft", &["list", "table", "inet", "ostler"]);
    let neighbour = address
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .find(|word| word.starts_with("10.254.") && word.split('.').count() == 4);
    let neighbour = neighbour.unwrap_or_else(|| panic!("no address in {address}"));
    let script = format!(
        "try() {{ timeout $4 bash -c \"</dev/tcp/$2/$3\" 2>/dev/null && echo \"$1 open\" || echo \"$1 shut\"; }}\n\
         try outside {} {far} 30; try host {} {own} 3; try neighbour {neighbour} {port} 3; echo end; sleep infinity",
        Network::OUTSIDE,
        Network::HOST
    );
    let mut output = host.output("probe").await;
    let mut message = host.message("probe", &Droplet::shell(&script));
    message["egress_network_rules"] = json!([]);
    host.run(message).await;
    output
        .until("all", |output| output.text(0, "stdout").ends_with("end\n"))
        .await;
    assert_eq!(
        output.text(0, "stdout"),
        "outside open\nhost shut\nneighbour shut\nend\n"
    );
    host.stop("probe").await;
    host.stop("web").await;
}

#[tokio::test]
async fn a_foreign_chain_that_drops_does_not_cut_us_off() {
    let drop: &[&[&str]] = &[&["iptables", "-P", "FORWARD", "DROP"]];
    let host = Host::with(Setup {
        before: drop,
        ..Default::default()
    })
    .await;
    // The control: a veth pair of nobody's is cut off.
    let holder = [
        "--pdeathsig",
        "KILL",
        "unshare",
        "--net",
        "sleep",
        "infinity",
    ];
    let holder = Running::start(Path::new("setpriv"), &holder, Path::new("/dev/null"));
    let of = format!("/proc/{}/ns/net", holder.pid());
    let ours = fs::read_link("/proc/thread-self/ns/net").unwrap();
    host.tree_until("namespace", |_| {
        fs::read_link(&of).is_ok_and(|of| of != ours)
    })
    .await;
    let control = "ip link add p0 type veth peer name eth0 netns PID && ip addr add 10.9.9.1/30 dev p0 && ip link set p0 up && \
        nsenter --net=/proc/PID/ns/net sh -c 'ip addr add 10.9.9.2/30 dev eth0 && ip link set eth0 up && ip route add default via 10.9.9.1'";
    let control = control.replace("PID", &holder.pid().to_string());
    tool("bash", &["-c", &control]);
    let probe = format!(
        "timeout 2 bash -c '</dev/tcp/{}/1' 2>&1; echo code $?",
        Network::OUTSIDE
    );
    host.network
        .outside(|| tool("ip", &["route", "add", "10.9.9.0/30", "via", Network::HOST]));
    let inside = format!("--net={of}");
    let said = tool("nsenter", &[&inside, "bash", "-c", &probe]);
    holder.end();
    assert!(said.contains("code 124"), "dropped, not refused: {said}");

    let outside = host
        .network
        .outside(|| std::net::TcpListener::bind((Network::OUTSIDE, 0)).unwrap());
    let mut output = host.output("out").await;
    let script = format!(
        "timeout 30 bash -c '</dev/tcp/{}/{}' && echo out works; exec puma --quiet --bind tcp://0.0.0.0:$PORT config.ru",
        Network::OUTSIDE,
        outside.local_addr().unwrap().port()
    );
    let mut message = host.message("out", &Droplet::sample("sinatra"));
    message["egress_network_rules"] = json!([]);
    message["start_command"] = json!(script);
    message["uris"] = json!(["out.example.net"]);
    host.run(message).await;
    output
        .until("way out", |output| {
            output.text(0, "stdout").contains("out works\n")
        })
        .await;
    let found = host
        .request(
            "dea.find.droplet",
            &json!({"droplet": "out", "include_stats": true}),
        )
        .await;
    let port = found["stats"]["port"].as_u64().unwrap();
    assert_eq!(
        host.network.get_from_outside(port, "/env/PORT"),
        (200, port.to_string())
    );
    let rules = tool("iptables", &["-S", "FORWARD"]);
    assert_eq!(rules.matches("ostler").count(), 2, "{rules}");
    host.stop("out").await;
}

/// Something mounted over a directory, until it goes.
struct Covered(std::path::PathBuf);

impl Covered {
    fn cover(path: std::path::PathBuf) -> Self {
        tool("mount", &["-t", "tmpfs", "none", path.to_str().unwrap()]);
        Self(path)
    }
}

impl Drop for Covered {
    fn drop(&mut self) {
        tool("umount", &[self.0.to_str().unwrap()]);
    }
}

#[tokio::test]
async fn what_cannot_be_measured_is_left_out() {
    let host = Host::start().await;
    let answer = host
        .run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let group = host.group("memory", answer["handle"].as_str().unwrap());
    let covered = Covered::cover(group);
    let without = stats(&host, "app", &["disk"]).await;
    drop(covered);
    assert_eq!(without["mem_quota"], 128 << 20, "{without}");
    for key in ["mem", "mem_charged", "cpu"] {
        assert_eq!(without["usage"].get(key), None, "{without}");
    }
    assert!(without["usage"]["disk"].is_u64(), "{without}");
    let stats = stats(&host, "app", &["mem", "cpu"]).await;
    let [mem, charged, cores] =
        ["mem", "mem_charged", "cores"].map(|key| stats["usage"][key].as_u64().unwrap());
    assert!(mem > 0 && charged >= mem && cores > 0, "{stats}");
    assert!(stats["usage"]["cpu"].is_f64(), "{stats}");
    host.stop("app").await;
}

#[tokio::test]
async fn where_nothing_counts_a_disk_its_use_is_null_and_not_0() {
    let unlimited = ("[network]", "[instance]\ndisk = \"unlimited\"\n[network]");
    let host = Host::with(Setup {
        config: &[unlimited],
        ..Default::default()
    })
    .await;
    host.run(host.message(
        "writer",
        &Droplet::shell("echo x >file; exec sleep infinity"),
    ))
    .await;
    let stats = stats(&host, "writer", &["mem"]).await;
    for (object, key) in [(&stats, "disk_quota"), (&stats["usage"], "disk")] {
        assert_eq!(object.get(key), Some(&Value::Null), "{stats}");
    }
    assert!(stats["usage"]["mem"].as_u64() > Some(0), "{stats}");
    host.stop("writer").await;
}
