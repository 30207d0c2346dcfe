//! Five apps that take whatever they can get, side by side: what it does to a sixth one and to the agent.

use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};
use tests::{Droplet, Host, Network, get, patience};

/// Seconds after which an attacker gives up by itself, whatever becomes of this test.
const SECONDS: u64 = 240;

/// Forks without end, as every one of its children does.
const FORKER: &str = "exec perl -e '$0 = \"forker\"; fork while time < $^T + SECONDS'";

/// Takes memory until it is killed for it, again and again.
const EATER: &str = "for i in $(seq SECONDS); do perl -e '$0 = \"eater\"; push @held, \"x\" x (1 << 20) while 1'; done";

/// Makes files in memory without end, each of them empty.
const FILLER: &str = r#"exec perl -e '
  $| = 1; $0 = "filler";
  my ($made, $told) = (0, 0);
  while (time < $^T + SECONDS) {
    if (open my $file, ">", "/dev/shm/" . $made) { $made++ }
    elsif (!$told++) { print "full after $made: $!\n" }
  }'"#;

/// Writes until its disk has no more bytes, then makes files until it has no more inodes, again and again.
const WRITER: &str = r#"exec perl -e '
  $| = 1; $0 = "writer";
  my $told = 0;
  while (time < $^T + SECONDS) {
    my ($bytes, $files) = (0, 0);
    open my $big, ">", "big" or die;
    while (my $done = syswrite $big, "x" x (1 << 20)) { $bytes += $done }
    my $full = "$!";
    close $big; unlink "big";
    $files++ while open my $one, ">", "f" . $files;
    print "full after $bytes bytes: $full, after $files files: $!\n" unless $told++;
    unlink map "f$_", 0 .. $files;
  }'"#;

/// Opens sockets without end, and sends from each without end, to the neighbour and to the outside.
const FLOODER: &str = r#"exec perl -e '
  use Socket; $| = 1; $0 = "flooder";
  my @to = map { pack_sockaddr_in(9, inet_aton($_)) } "NEIGHBOUR", "OUTSIDE";
  my ($sent, @sockets) = (0);
  while (socket my $one, PF_INET, SOCK_DGRAM, 0) { push @sockets, $one }
  print "sockets ", scalar @sockets, "\n";
  while (time < $^T + SECONDS) {
    for my $one (@sockets) { for my $to (@to) { send $one, "x" x 1400, 0, $to } }
    print "sent\n" unless $sent++;
  }'"#;

/// Asks so often and gives how long each answer took, sorted. Every one must come.
async fn ask<T>(times: usize, mut once: impl AsyncFnMut() -> T) -> Vec<Duration> {
    let mut took = Vec::new();
    for _ in 0..times {
        let began = Instant::now();
        let answer = tokio::time::timeout(patience(), once()).await;
        assert!(answer.is_ok(), "no answer in {:?}", patience());
        took.push(began.elapsed());
    }
    took.sort();
    took
}

fn figures(what: &str, took: &[Duration]) {
    let at = |percent: usize| took[(took.len() - 1) * percent / 100].as_secs_f64() * 1000.0;
    println!(
        "{what}: {} answers, median {:.2} ms, 99 % within {:.2} ms, longest {:.2} ms",
        took.len(),
        at(50),
        at(99),
        at(100)
    );
}

/// The median of the neighbour's and of the agent's answers.
async fn measure(host: &Host, when: &str, address: &str) -> [Duration; 2] {
    let page = async || {
        let (code, body) = get(address, "/env/PORT").await.unwrap();
        assert_eq!(code, 200, "{body}");
    };
    let neighbour = ask(100, page).await;
    figures(&format!("neighbour {when}"), &neighbour);
    let find = json!({"droplet": "neighbour", "include_stats": true});
    let agent = async || {
        let found = host.request("dea.find.droplet", &find).await;
        assert_eq!(found["state"], "RUNNING", "{found}");
    };
    let agent = ask(50, agent).await;
    figures(&format!("agent {when}"), &agent);
    [neighbour, agent].map(|took| took[took.len() / 2])
}

async fn attack(host: &Host, droplet: &str, script: &str) -> Value {
    let script = script
        .replace("SECONDS", &SECONDS.to_string())
        // The first address of the pool is the neighbour's gateway, the second one is its own.
        .replace("NEIGHBOUR", "10.254.0.2")
        .replace("OUTSIDE", Network::OUTSIDE);
    let mut message = host.message(droplet, &Droplet::shell(&script));
    message["egress_network_rules"] = json!([]);
    // Soon full.
    message["limits"]["disk"] = json!(64);
    message["oom_group"] = json!(false);
    message["stop_grace"] = json!(0);
    host.run(message).await
}

#[tokio::test]
async fn five_that_take_all_they_can_get_leave_a_neighbour_alone() {
    let host = Host::start().await;
    let mut message = host.message("neighbour", &Droplet::sample("sinatra"));
    message["uris"] = json!(["neighbour.example.net"]);
    host.run(message).await;
    let wshd = host.tree().one("wshd").clone();
    let find = json!({"droplet": "neighbour", "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    let address = format!("127.0.0.1:{}", found["stats"]["port"]);
    let alone = measure(&host, "alone", &address).await;

    let mut ooms = host.watch("droplet.oom").await;
    let [mut filler, mut flood] = [host.output("filler").await, host.output("flooder").await];
    let mut writer = host.output("writer").await;
    let forker = attack(&host, "forker", FORKER).await;
    attack(&host, "eater", EATER).await;
    attack(&host, "filler", FILLER).await;
    attack(&host, "flooder", FLOODER).await;
    attack(&host, "writer", WRITER).await;
    // Each is at its limit before anything is measured. (No look at the processes: the arguments of one
    // that forks all the time can hardly be read.)
    let refused = host
        .group("pids", forker["handle"].as_str().unwrap())
        .join("pids.events");
    let end = Instant::now() + patience();
    while fs::read_to_string(&refused).unwrap().starts_with("max 0") {
        assert!(Instant::now() < end, "no fork was refused");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ooms.until("kill of the eater", |oom| oom["droplet"] == "eater")
        .await;
    filler
        .until("full", |output| !output.text(0, "stdout").is_empty())
        .await;
    writer
        .until("full", |output| {
            let text = output.text(0, "stdout");
            text.matches("No space left on device").count() == 2
        })
        .await;
    flood
        .until("sent", |output| {
            output.text(0, "stdout").ends_with("sent\n")
        })
        .await;
    println!(
        "filler: {}writer: {}flooder: {}",
        filler.text(0, "stdout"),
        writer.text(0, "stdout"),
        flood.text(0, "stdout").replace('\n', " ")
    );
    let beside = measure(&host, "beside five", &address).await;
    // They have a part of the processors like everybody, and nothing more: seconds would be another thing.
    for (alone, beside) in alone.into_iter().zip(beside) {
        let most = alone * 20 + Duration::from_millis(100);
        assert!(beside < most, "{beside:?} beside {alone:?}");
    }

    assert!(wshd.lives());
    let kills = ooms.arrived();
    assert!(kills.iter().all(|oom| oom["droplet"] != "neighbour"));
    println!("{} kills meanwhile", kills.len());
    for droplet in ["forker", "eater", "filler", "flooder", "writer"] {
        let find = json!({"droplet": droplet});
        let found = host.request("dea.find.droplet", &find).await;
        assert_eq!(found["state"], "RUNNING", "still at it: {found}");
        host.stop(droplet).await;
    }
    host.stop("neighbour").await;
}
