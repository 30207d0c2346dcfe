//! Each limit is exceeded, and binds; and what a container must not see or reach.

use nix::sys::signal::Signal;
use serde_json::json;
use std::fs;
use tests::{Droplet, Host, Network, Setup, Tree, tool};

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
        "try() {{ timeout 3 bash -c \"</dev/tcp/$2/$3\" 2>/dev/null && echo \"$1 open\" || echo \"$1 shut\"; }}\n\
         try outside {} {far}; try host {} {own}; try neighbour {neighbour} {port}; echo end; sleep infinity",
        Network::OUTSIDE,
        Network::HOST
    );
    let mut output = host.output("probe").await;
    host.run(host.message("probe", &Droplet::shell(&script)))
        .await;
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
    let control = "ip netns add x && ip link add p0 type veth peer name eth0 netns x && ip addr add 10.9.9.1/30 dev p0 && ip link set p0 up && \
        ip netns exec x sh -c 'ip addr add 10.9.9.2/30 dev eth0 && ip link set eth0 up && ip route add default via 10.9.9.1'";
    let control = control
        .replace(" x ", &format!(" control-{} ", std::process::id()))
        .replace("netns x", &format!("netns control-{}", std::process::id()));
    tool("bash", &["-c", &control]);
    let name = format!("control-{}", std::process::id());
    let probe = format!(
        "timeout 2 bash -c '</dev/tcp/{}/1' 2>&1; echo code $?",
        Network::OUTSIDE
    );
    host.network
        .outside(|| tool("ip", &["route", "add", "10.9.9.0/30", "via", Network::HOST]));
    let said = tool("ip", &["netns", "exec", &name, "bash", "-c", &probe]);
    tool("ip", &["netns", "delete", &name]);
    assert!(said.contains("code 124"), "dropped, not refused: {said}");

    let outside = host
        .network
        .outside(|| std::net::TcpListener::bind((Network::OUTSIDE, 0)).unwrap());
    let mut output = host.output("out").await;
    let script = format!(
        "timeout 5 bash -c '</dev/tcp/{}/{}' && echo out works; exec puma --quiet --bind tcp://0.0.0.0:$PORT config.ru",
        Network::OUTSIDE,
        outside.local_addr().unwrap().port()
    );
    let mut message = host.message("out", &Droplet::sample("sinatra"));
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
