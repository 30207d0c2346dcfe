//! What a controller places by: advertisements, `dea.status`, `dea.discover`, and capacity.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tests::{Body, Droplet, Frozen, Host, Network, Setup, patience};

/// Silence for so long is no answer: others came much sooner.
const SILENCE: Duration = Duration::from_secs(1);

/// A start that is accepted and then waits for its droplet.
fn waiting(host: &Host, droplet: &str, index: u32) -> Value {
    let mut message = host.message(droplet, &Droplet::shell(""));
    message["executableUri"] = json!(host.files.put("silent.tgz", Body::Silent));
    message["index"] = json!(index);
    message
}

async fn accepted(host: &Host, message: &Value) {
    let answer = host.request(&host.subject("start"), message).await;
    assert_eq!(answer["ok"], true, "{answer}");
}

fn discover(droplet: &str, mem: u64, disk: u64) -> Value {
    let mut message = Host::fixture("dea.discover");
    message["droplet"] = json!(droplet);
    message["limits"] = json!({"mem": mem, "disk": disk, "fds": 64});
    message
}

/// This is offered, if not at once.
async fn offered(host: &Host, wanted: &Value) {
    let deadline = Instant::now() + patience();
    while host
        .request_all("dea.discover", wanted, (0, SILENCE))
        .await
        .is_empty()
    {
        assert!(Instant::now() < deadline, "{wanted}\n{}", host.log());
    }
}

/// This is not offered.
async fn not_offered(host: &Host, wanted: &Value) {
    let offers = host.request_all("dea.discover", wanted, (0, SILENCE)).await;
    assert_eq!(offers, Vec::<Value>::new(), "{wanted}");
}

#[tokio::test]
async fn a_status_tells_of_capacity_reserve_and_use() {
    let host = Host::with(Setup {
        config: &[Setup::NO_TIMER],
        ..Default::default()
    })
    .await;
    let mut output = host.output("hog").await;
    let mut hog = host.message("hog", &Droplet::sample("hog"));
    hog["env"] = json!(["HOG_MB=64"]);
    host.run(hog).await;
    accepted(&host, &waiting(&host, "waits", 0)).await;
    output
        .until("its memory", |output| !output.text(0, "stdout").is_empty())
        .await;
    // It says so before it takes the memory, or after: the status follows what it has.
    let status = loop {
        let status = host.request("dea.status", &json!({})).await;
        if status["used_memory"].as_u64().unwrap() >= 64 {
            break status;
        }
    };
    assert_eq!(status["id"], host.id);
    assert_eq!(status["ip"], Network::HOST);
    assert!(status["version"].is_string(), "{status}");
    assert_eq!(status["max_memory"], 4096);
    assert_eq!(status["reserved_memory"], 256);
    assert!(status["used_memory"].as_u64().unwrap() <= 128, "{status}");
    assert_eq!(status["num_clients"], Value::Null);
    // The bodies of such requests say nothing, whatever they are.
    assert_eq!(host.request_many("dea.status", "", 1).await.len(), 1);
    host.stop("hog").await;
    let status = host.request("dea.status", &json!({})).await;
    assert_eq!(
        (&status["reserved_memory"], &status["used_memory"]),
        (&json!(128), &json!(0))
    );
}

#[tokio::test]
async fn a_droplet_status_tells_of_what_starts_and_runs() {
    let host = Host::start().await;
    let mut exits = host.watch("droplet.exited").await;
    let mut runs = host.message("runs", &Droplet::sample("sinatra"));
    runs["uris"] = json!(["one.example.net", "two.example.net/path"]);
    runs["name"] = json!("that runs");
    host.run(runs).await;
    let mut starts = waiting(&host, "starts", 0);
    starts["name"] = json!("that starts");
    accepted(&host, &starts).await;
    accepted(&host, &host.message("crashed", &Droplet::shell("exit 1"))).await;
    exits.next().await;
    let mut deaf = host.message("deaf", &Droplet::shell("trap '' TERM; exec sleep 1000"));
    deaf["stop_grace"] = json!(600);
    host.run(deaf).await;
    let tree = host
        .tree_until("deaf app", |tree| tree.named("sleep").len() == 1)
        .await;
    host.request("dea.stop", &json!({"droplet": "deaf"})).await;
    let stopping = json!({"droplet": "deaf", "states": ["STOPPING"]});
    while host.request(&host.subject("find"), &stopping).await["matched"] == 0 {}

    let mut told = host
        .request_all("droplet.status", &json!({}), (2, SILENCE))
        .await;
    told.sort_by_key(|status| status["name"].to_string());
    let wanted = [
        json!({"name": "that runs", "uris": ["one.example.net", "two.example.net/path"]}),
        json!({"name": "that starts", "uris": []}),
    ];
    assert_eq!(told, wanted);
    tree.one("sleep").signal(Signal::SIGKILL);
    host.stop("runs").await;
    host.stop("starts").await;
}

#[tokio::test]
async fn a_discover_is_answered_the_later_the_fuller_a_host_is() {
    let host = Host::with(Setup {
        config: &[Setup::NO_TIMER],
        ..Default::default()
    })
    .await;
    let reserved = async || host.request("dea.status", &json!({})).await["reserved_memory"].clone();
    for index in 0..10 {
        let mut message = waiting(&host, "app", index);
        message["limits"] = json!({"mem": 256, "disk": 16, "fds": 64});
        accepted(&host, &message).await;
    }
    assert_eq!(reserved().await, 2560);
    // 2560 of 4096 MB are 62 ms; and 10 instances of the app itself are 100 ms.
    for (droplet, least) in [("another", 62), ("app", 162)] {
        let began = Instant::now();
        let offer = host
            .request("dea.discover", &discover(droplet, 1536, 16))
            .await;
        let took = began.elapsed();
        assert_eq!(offer["id"], host.id);
        assert_eq!(offer["ip"], Network::HOST);
        assert!(took >= Duration::from_millis(least), "{droplet}: {took:?}");
    }
    assert_eq!(reserved().await, 2560, "an offer reserves nothing");
    not_offered(&host, &discover("another", 1537, 16)).await;
    not_offered(&host, &discover("another", 16, 16 * 1024 + 1)).await;
    not_offered(&host, &json!({"droplet": "another"})).await;
    // V1 names no disk.
    let mut old = discover("17", 1536, 0);
    (old["droplet"], old["limits"]) = (json!(17), json!({"mem": 1536}));
    assert_eq!(host.request("dea.discover", &old).await["id"], host.id);
    host.stop("app").await;
}

/// On a host with two places of a kind.
async fn a_third_is_not_offered(pool: (&str, &str)) {
    let host = Host::with(Setup {
        config: &[Setup::NO_TIMER, pool],
        ..Default::default()
    })
    .await;
    let wanted = discover("third", 16, 16);
    let mut adverts = host.watch("dea.advertise").await;
    let places = |advert: &Value| advert["available_memory"].as_i64() > Some(0);
    accepted(&host, &waiting(&host, "first", 0)).await;
    let of_first = |advert: &Value| advert["app_id_to_count"]["first"] == 1;
    let advert = adverts.until("the first", of_first).await;
    assert!(places(&advert), "{advert}");
    // As often as anybody asks: an offer uses nothing up.
    for _ in 0..3 {
        assert_eq!(host.request("dea.discover", &wanted).await["id"], host.id);
    }
    accepted(&host, &waiting(&host, "second", 0)).await;
    not_offered(&host, &wanted).await;
    adverts.until("no place", |advert| !places(advert)).await;
    let third = waiting(&host, "third", 0);
    let answer = host.request(&host.subject("start"), &third).await;
    assert_eq!(answer["error"]["code"], "host_full", "{answer}");
    // One that had its place only for the time of a download leaves it as it was.
    host.stop("second").await;
    adverts.until("a place again", places).await;
    offered(&host, &wanted).await;
    host.stop("first").await;
}

#[tokio::test]
async fn what_has_no_port_is_not_offered() {
    a_third_is_not_offered(("[network]", "[network]\nports = \"61001-61002\"")).await;
}

#[tokio::test]
async fn what_has_no_address_is_not_offered() {
    a_third_is_not_offered(("10.254.0.0/16", "10.254.0.0/29")).await;
}

#[tokio::test]
async fn what_has_no_room_in_a_heartbeat_is_not_offered() {
    let few = ("[resources]", "[resources]\ninstances = 2");
    a_third_is_not_offered(few).await;
}

#[tokio::test]
async fn two_starts_for_the_last_place_on_the_disk_are_one_instance_and_one_refusal() {
    // Of 4 GB, some 3.7 are to be had.
    let host = Host::with(Setup {
        config: &[
            Setup::NO_TIMER,
            ("[network]", "[instance]\ndisk = \"image\"\n[network]"),
        ],
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    let mut exits = host.watch("droplet.exited").await;
    let mut advertised = host.watch("dea.advertise").await;
    let start = host.subject("start");
    let large = discover("another", 16, 2400);
    offered(&host, &large).await;
    let mut waits = waiting(&host, "waits", 0);
    let mut runs = host.message("runs", &Droplet::sample("sleeper"));
    let mut late = host.message("late", &Droplet::sample("sleeper"));
    for message in [&mut waits, &mut runs, &mut late] {
        message["limits"]["disk"] = json!(2400);
        message["wait"] = json!(null);
    }
    runs["wait"] = json!("running");
    // The first has no container when the second comes, and then has one.
    for first in [waits, runs] {
        let answers = host
            .burst(&[(&start, first.clone()), (&start, late.clone())])
            .await;
        assert_eq!(answers[0]["ok"], true, "{answers:?}");
        let error = &answers[1]["error"];
        assert_eq!(error["code"], "not_enough_disk", "{answers:?}");
        not_offered(&host, &large).await;
        host.publish_bytes("dea.locate", "").await;
        let rest = |one: &Value| (1000..1400).contains(&one["available_disk"].as_i64().unwrap());
        advertised.until("the rest", rest).await;
        // It is counted once.
        let mut rest = host.message("rest", &Droplet::sample("sleeper"));
        rest["limits"]["disk"] = json!(800);
        host.run(rest).await;
        for app in ["rest", first["droplet"].as_str().unwrap()] {
            host.stop(app).await;
        }
        offered(&host, &large).await;
    }
    let refused = exits
        .until("refusals", |exit| exit["droplet"] == "late")
        .await;
    assert_eq!(refused["exit_status"], -1, "{refused}");
    let crashed = exits
        .all()
        .iter()
        .find(|exit| exit["reason"] == "CRASHED" && exit["droplet"] != "late");
    assert_eq!(crashed, None);
}

#[tokio::test]
async fn a_droplet_takes_nothing_of_the_disk_that_is_promised_or_the_agents_own() {
    let host = Host::with(Setup {
        config: &[(
            "[network]",
            "[output]\nspool_mb = 1\n[instance]\ndisk = \"image\"\n[network]",
        )],
        before: &[Frozen::OWN_DISK],
        ..Default::default()
    })
    .await;
    let mut adverts = host.watch("dea.advertise").await;
    let free = |advert: &Value| advert["available_disk"].as_u64().unwrap();
    let all = free(&adverts.next().await);
    let mut large = host.message("large", &Droplet::sample("sleeper"));
    large["limits"]["disk"] = json!(all - 100);
    host.run(large).await;
    adverts.until("the rest", |advert| free(advert) < 200).await;
    // A small archive of what is some 100 MB more than there is, and less than what others have beside.
    let zeros = "\0".repeat(220 << 20);
    let droplet = Droplet::of_files(&[("app/main.sh", "exec sleep 1000"), ("app/zeros", &zeros)]);
    let mut greedy = host.message("greedy", &droplet);
    greedy["limits"]["disk"] = json!(8);
    let mut exits = host.watch("droplet.exited").await;
    accepted(&host, &greedy).await;
    let exit = exits.next().await;
    let why = exit["exit_description"].as_str().unwrap();
    assert!(
        why.starts_with("failed to start: the droplet was given up: not enough disk"),
        "{exit}"
    );
    // Nothing of it stays, and what fits is taken.
    adverts.arrived();
    adverts
        .until("the rest", |advert| (50..200).contains(&free(advert)))
        .await;
    let mut small = host.message("small", &Droplet::sample("sleeper"));
    small["limits"]["disk"] = json!(8);
    host.run(small).await;
    for app in ["small", "large"] {
        host.stop(app).await;
    }
}

#[tokio::test]
async fn what_is_overcommitted_can_be_reserved_and_no_more() {
    let host = Host::with(Setup {
        config: &[
            Setup::NO_TIMER,
            (
                "memory_mb = 4096\ndisk_mb = 16384",
                "memory_mb = 200\nmemory_overcommit_factor = 2.5\ndisk_mb = 1000\ndisk_overcommit_factor = 1.5",
            ),
        ],
        ..Default::default()
    })
    .await;
    let mut advertised = host.watch("dea.advertise").await;
    host.publish_bytes("dea.locate", "").await;
    let free = advertised.next().await;
    let told = (&free["available_memory"], &free["available_disk"]);
    assert_eq!(told, (&json!(500), &json!(1500)));
    let status = host.request("dea.status", &json!({})).await;
    assert_eq!(status["max_memory"], 500);
    let start = |droplet: &str, mem: u64, disk: u64| {
        let mut message = waiting(&host, droplet, 0);
        message["limits"] = json!({"mem": mem, "disk": disk, "fds": 64});
        message
    };
    accepted(&host, &start("most", 400, 1400)).await;
    for (mem, disk, code) in [
        (101, 100, "not_enough_memory"),
        (100, 101, "not_enough_disk"),
        (101, 101, "not_enough_disk"),
    ] {
        let answer = host
            .request(&host.subject("start"), &start("more", mem, disk))
            .await;
        assert_eq!(answer["error"]["code"], code, "{answer}");
    }
    accepted(&host, &start("rest", 100, 100)).await;
    advertised
        .until("nothing left", |one| {
            one["available_memory"] == 0 && one["available_disk"] == 0
        })
        .await;
    host.stop("most").await;
    host.stop("rest").await;
}
