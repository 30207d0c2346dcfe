//! `dea.<id>.scale`: this host converges an app to so many instances of its own.

use serde_json::{Value, json};
use std::time::Duration;
use tests::{Body, Droplet, Host, Output, Process, Setup, get};

async fn scale(host: &Host, droplet: &str, instances: u32) -> Value {
    let message = json!({"droplet": droplet, "instances": instances, "wait": "running"});
    host.request(&host.subject("scale"), &message).await
}

async fn scaled(host: &Host, droplet: &str, instances: u32) {
    let answer = scale(host, droplet, instances).await;
    assert_eq!(answer["ok"], true, "{answer}\n{}", host.log());
}

/// The indices in the next heartbeat that shows `count` running instances.
async fn indices(host: &Host, count: usize) -> Vec<u64> {
    let mut heartbeats = host.watch("dea.heartbeat").await;
    let running = |beat: &Value| {
        let entries = beat["droplets"].as_array().unwrap();
        entries.len() == count && entries.iter().all(|entry| entry["state"] == "RUNNING")
    };
    let beat = heartbeats.until("heartbeat with so many", running).await;
    let entries = beat["droplets"].as_array().unwrap().iter();
    let mut indices: Vec<u64> = entries
        .map(|entry| entry["index"].as_u64().unwrap())
        .collect();
    indices.sort_unstable();
    indices
}

#[tokio::test]
async fn a_second_instance_is_one_more_set_of_processes() {
    let host = Host::start().await;
    let mut registered = host.watch("router.register").await;
    let mut message = host.message("sinatra", &Droplet::sample("sinatra"));
    message["uris"] = json!(["sinatra.example.net"]);
    host.run(message).await;
    let one = host
        .tree_until("all of it", |tree| tree.named("oom").len() == 1)
        .await;
    let first = registered.next().await;

    scaled(&host, "sinatra", 2).await;
    let two = host
        .tree_until("two sets", |tree| tree.named("oom").len() == 2)
        .await;
    for name in ["iomux-spawn", "wsh", "iomux-link", "oom", "wshd", "startup"] {
        assert_eq!(two.named(name).len(), 2, "{name}\n{two}");
    }
    assert!(
        one.0.iter().all(Process::lives),
        "index 0 is untouched\n{one}\n{two}"
    );
    assert_eq!(indices(&host, 2).await, [0, 1]);
    let second = registered
        .until("another route", |route| route["port"] != first["port"])
        .await;
    assert_eq!(second["private_instance_index"], "1");
    let (_, body) = get(&format!("127.0.0.1:{}", second["port"]), "/")
        .await
        .unwrap();
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["index"], 1);

    // Down: the highest index goes. Up again: the lowest free index comes.
    scaled(&host, "sinatra", 1).await;
    assert_eq!(indices(&host, 1).await, [0]);
    assert!(one.0.iter().all(Process::lives));
    scaled(&host, "sinatra", 3).await;
    assert_eq!(indices(&host, 3).await, [0, 1, 2]);
    host.publish("dea.stop", &json!({"droplet": "sinatra", "indices": [1]}))
        .await;
    assert_eq!(indices(&host, 2).await, [0, 2]);
    scaled(&host, "sinatra", 3).await;
    assert_eq!(indices(&host, 3).await, [0, 1, 2]);
    // As it is: nothing happens.
    let same = host.tree();
    scaled(&host, "sinatra", 3).await;
    assert!(same.named("wshd").iter().all(|wshd| wshd.lives()));
    host.stop("sinatra").await;
}

#[tokio::test]
async fn an_app_at_zero_is_remembered_also_by_a_new_agent() {
    let mut host = Host::start().await;
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    scaled(&host, "sleeper", 0).await;
    host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
        .await;
    host.restart().await;
    scaled(&host, "sleeper", 2).await;
    assert_eq!(indices(&host, 2).await, [0, 1]);
    scaled(&host, "sleeper", 0).await;
}

/// The names below the directory of droplets that hold this digest.
fn unpacked(host: &Host, digest: &str) -> Vec<String> {
    let entries = std::fs::read_dir(host.base.join("droplets")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| !name.starts_with('.') && name.contains(digest))
        .collect()
}

async fn removed(host: &Host, digest: &str) {
    let deadline = tokio::time::Instant::now() + tests::patience();
    while !unpacked(host, digest).is_empty() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "{digest} is still there\n{}",
            host.log()
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_droplet_goes_when_neither_an_instance_nor_a_later_scale_can_use_it() {
    let mut host = Host::with(Setup {
        config: &[("[intervals]", "[intervals]\ndroplets = 1")],
        ..Default::default()
    })
    .await;
    let [old, kept, live, newer] = ["old", "kept", "live", "newer"]
        .map(|name| Droplet::shell(&format!("echo {name}; exec sleep infinity")));
    host.run(host.message("zero", &old)).await;
    host.stop("zero").await;
    host.run(host.message("zero", &kept)).await;
    scaled(&host, "zero", 0).await;
    // Of an app the newest message counts for a scale, so the first droplet is its instance's alone.
    host.run(host.message("live", &live)).await;
    let mut second = host.message("live", &newer);
    second["index"] = json!(1);
    host.run(second).await;
    // It spares what was just asked for, of which only the next agent knows nothing.
    for droplet in [&old, &kept, &live, &newer] {
        assert_eq!(unpacked(&host, &droplet.sha1()).len(), 1, "{}", host.log());
    }
    host.restart().await;
    removed(&host, &old.sha1()).await;
    // Another one goes by a look that began after that one.
    let nobodys = format!("sha1-{}", "0".repeat(40));
    std::fs::create_dir(host.base.join("droplets").join(&nobodys)).unwrap();
    removed(&host, &nobodys).await;
    for (what, droplet) in [("kept", &kept), ("live", &live), ("newer", &newer)] {
        let found = unpacked(&host, &droplet.sha1()).len();
        assert_eq!(found, 1, "{what}\n{}", host.log());
    }
    scaled(&host, "zero", 1).await;
    host.stop("zero").await;
    host.stop("live").await;
}

#[tokio::test]
async fn what_cannot_be_scaled_is_refused_and_changes_nothing() {
    let little = ("memory_mb = 4096", "memory_mb = 300");
    let host = Host::with(Setup {
        config: &[little],
        ..Default::default()
    })
    .await;
    let unknown = scale(&host, "nobody", 1).await;
    assert_eq!(unknown["error"]["code"], "unknown_app", "{unknown}");
    host.run(host.message("sleeper", &Droplet::sample("sleeper")))
        .await;
    let wshd = host.tree().one("wshd").clone();
    let much = scale(&host, "sleeper", 3).await;
    assert_eq!(much["error"]["code"], "not_enough_memory", "{much}");
    for body in [
        json!({"droplet": "sleeper"}),
        json!({"droplet": "sleeper", "instances": -1}),
        json!({"droplet": "sleeper", "instances": "2"}),
        json!({"instances": 2}),
    ] {
        assert_eq!(
            host.request(&host.subject("scale"), &body).await["ok"],
            false,
            "{body}"
        );
    }
    assert_eq!(indices(&host, 1).await, [0]);
    assert!(wshd.lives());
    host.stop("sleeper").await;
}

#[tokio::test]
async fn limits_change_while_it_runs() {
    let host = Host::start().await;
    let mut message = host.message("hog", &Droplet::sample("hog"));
    message["env"] = json!(["HOG_MB=64"]);
    let mut output = host.output("hog").await;
    host.run(message).await;
    output
        .until("64 MB", |output| {
            output.text(0, "stdout").ends_with("holds 64 MB\n")
        })
        .await;
    let wshd = host.tree().one("wshd").clone();
    let limits =
        json!({"droplet": "hog", "instances": 1, "limits": {"mem": 256, "disk": 256, "fds": 1024}});
    assert_eq!(
        host.request(&host.subject("scale"), &limits).await["ok"],
        true
    );
    let find = json!({"droplet": "hog", "include_stats": true});
    let deadline = tokio::time::Instant::now() + tests::patience();
    while host.request("dea.find.droplet", &find).await["stats"]["mem_quota"] != 268_435_456 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the new limit is not applied\n{}",
            host.log()
        );
    }
    // Less than it holds does not fit: it stays as it is, and nobody is killed for it.
    let small = json!({"droplet": "hog", "instances": 1, "limits": {"mem": 32}});
    host.request(&host.subject("scale"), &small).await;
    let mut heartbeats = host.watch("dea.heartbeat").await;
    heartbeats.next().await;
    heartbeats.next().await;
    let found = host.request("dea.find.droplet", &find).await;
    assert_eq!(
        (&found["state"], &found["stats"]["mem_quota"]),
        (&json!("RUNNING"), &json!(268_435_456))
    );
    assert!(wshd.lives());
    host.stop("hog").await;
}

/// What the kernel allows the only container of `droplet`, in bytes.
fn kernel_limit(host: &Host, handle: &str) -> u64 {
    let file = if tests::is_cgroup_v2() {
        "memory.max"
    } else {
        "memory.limit_in_bytes"
    };
    let text = std::fs::read_to_string(host.group("memory", handle).join(file)).unwrap();
    text.trim().parse().unwrap()
}

#[tokio::test]
async fn limits_that_change_while_a_container_is_made_are_applied() {
    let host = Host::start().await;
    // At USR1 it writes as much as its disk takes, and says how much that was.
    let script = "fill() { dd if=/dev/zero of=$HOME/zeros bs=1M count=100 2>/dev/null; wc -c <$HOME/zeros; }\n\
                  trap fill USR1; echo up; while :; do sleep 0.05; done";
    let filler = Droplet::shell(script);
    for round in 0..tests::rounds() {
        let droplet = format!("app-{round}");
        let mut output = host.output(&droplet).await;
        let mut message = host.message(&droplet, &filler);
        message["limits"] = json!({"mem": 64, "disk": 16, "fds": 1024});
        let answer = host.request(&host.subject("start"), &message).await;
        tokio::time::sleep(std::time::Duration::from_millis(10 * round % 70)).await;
        let limits =
            json!({"droplet": droplet, "instances": 1, "limits": {"mem": 200, "disk": 64}});
        let scaled = host.request(&host.subject("scale"), &limits).await;
        assert_eq!(scaled["ok"], true, "{scaled}");
        let lines = |output: &tests::Output| output.text(0, "stdout").matches('\n').count();
        output.until("its start", |output| lines(output) == 1).await;
        let handle = answer["handle"].as_str().unwrap();
        assert_eq!(kernel_limit(&host, handle), 200 << 20, "round {round}");
        let tree = host.tree();
        let shell = tree.0.iter().find(|one| one.title() == "bash main.sh");
        let shell = shell.expect("the app");
        shell.signal(nix::sys::signal::Signal::SIGUSR1);
        output
            .until("a full disk", |output| lines(output) == 2)
            .await;
        let text = output.text(0, "stdout");
        let written: u64 = text.trim_start_matches("up\n").trim().parse().unwrap();
        assert!(written > 60 << 20, "round {round}: {written}");
        host.stop(&droplet).await;
    }
}

#[tokio::test]
async fn refused_limits_are_named_and_never_come_back() {
    let host = Host::start().await;
    let script = "trap 'unset x; echo small' USR1; x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo big; while :; do sleep 0.05; done";
    let mut output = host.output("app").await;
    let answer = host.run(host.message("app", &Droplet::shell(script))).await;
    output
        .until("big", |output| output.text(0, "stdout") == "big\n")
        .await;
    let handle = answer["handle"].as_str().unwrap();
    let scale = json!({"droplet": "app", "instances": 1, "limits": {"mem": 30}});
    let scaled = host.request(&host.subject("scale"), &scale).await;
    assert_eq!(scaled["refused"], json!([handle]), "{scaled}");
    let why = &scaled["why"][handle];
    let words = why["message"].as_str().unwrap_or_default();
    assert!(
        words.starts_with("a limit of 31457280 bytes does not fit"),
        "{why}"
    );
    let smallest = why["smallest"]["mem"].as_u64().unwrap();
    assert!((50..100).contains(&smallest), "{why}");
    let shell = host.tree();
    let shell = shell.0.iter().find(|one| one.title() == "bash main.sh");
    shell
        .expect("the app")
        .signal(nix::sys::signal::Signal::SIGUSR1);
    output
        .until("small", |output| {
            output.text(0, "stdout").ends_with("small\n")
        })
        .await;
    let find = json!({"droplet": "app", "include_stats": true});
    for _ in 0..3 {
        let found = host.request("dea.find.droplet", &find).await;
        assert_eq!(found["stats"]["mem_quota"], 128 << 20, "{found}");
    }
    assert_eq!(kernel_limit(&host, handle), 128 << 20);
    host.stop("app").await;
}

#[tokio::test]
async fn the_smallest_limit_that_a_refusal_names_is_safe() {
    let host = Host::start().await;
    for round in 0..tests::rounds() {
        let droplet = format!("hog-{round}");
        let mut message = host.message(&droplet, &Droplet::sample("hog"));
        message["env"] = json!(["HOG_MB=64"]);
        let mut output = host.output(&droplet).await;
        let answer = host.run(message).await;
        output
            .until("64 MB", |output| {
                output.text(0, "stdout").ends_with("holds 64 MB\n")
            })
            .await;
        let handle = answer["handle"].as_str().unwrap();
        let limit = async |mem: u64| {
            let scale = json!({"droplet": droplet, "instances": 1, "limits": {"mem": mem}});
            host.request(&host.subject("scale"), &scale).await
        };
        let refused = limit(16).await;
        let smallest = refused["why"][handle]["smallest"]["mem"].as_u64();
        let smallest = smallest.unwrap_or_else(|| panic!("{refused}"));
        assert_eq!(
            kernel_limit(&host, handle),
            128 << 20,
            "nothing was changed"
        );
        let taken = limit(smallest).await;
        assert_eq!(taken["refused"], Value::Null, "{refused}\n{taken}");
        assert_eq!(kernel_limit(&host, handle), smallest << 20);
        let find = json!({"droplet": droplet, "include_stats": true});
        let found = host.request("dea.find.droplet", &find).await;
        assert_eq!(found["state"], "RUNNING", "{found}");
        host.stop(&droplet).await;
    }
}

#[tokio::test]
async fn what_a_scale_leaves_out_stays() {
    let host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let mut message = host.message("app", &sleeper);
    message["limits"]["mem"] = json!(64);
    host.run(message).await;
    let quotas = async |count: usize| {
        let find = json!({"droplet": "app", "include_stats": true});
        let wait = std::time::Duration::from_millis(500);
        let found = host
            .request_all("dea.find.droplet", &find, (count, wait))
            .await;
        assert_eq!(found.len(), count, "{found:?}");
        let quota = |one: &Value, key: &str| one["stats"][key].as_u64().unwrap();
        found
            .iter()
            .map(|one| {
                (
                    quota(one, "mem_quota") >> 20,
                    quota(one, "disk_quota") >> 20,
                )
            })
            .collect::<Vec<_>>()
    };
    for (limits, wanted) in [
        (json!({"mem": 96}), (96, 256)),
        (json!({"disk": 128}), (96, 128)),
    ] {
        let scale = json!({"droplet": "app", "instances": 1, "limits": limits});
        let scaled = host.request(&host.subject("scale"), &scale).await;
        assert_eq!(scaled["ok"], true, "{scaled}");
        assert_eq!(quotas(1).await, [wanted]);
    }
    // Others of the same app are like it.
    let scale = json!({"droplet": "app", "instances": 2, "limits": {"fds": 64}, "wait": "running"});
    let scaled = host.request(&host.subject("scale"), &scale).await;
    assert_eq!(scaled["ok"], true, "{scaled}");
    assert_eq!(quotas(2).await, [(96, 128), (96, 128)]);
    let find = host
        .request(&host.subject("find"), &json!({"droplet": "app"}))
        .await;
    assert_eq!(find["matched"], 2, "{find}");
    host.stop("app").await;
}

#[tokio::test]
async fn an_app_reads_in_its_environment_what_it_was_told_to_be() {
    let host = Host::start().await;
    let mut output = host.output("app").await;
    let script = Droplet::shell("echo \"$VCAP_APPLICATION\"; exec sleep 1000");
    host.run(host.message("app", &script)).await;
    let update = json!({"droplet": "app", "uris": ["new.example.net"], "version": "newer"});
    assert_eq!(host.request("dea.update", &update).await["ok"], true);
    let scale = json!({"droplet": "app", "instances": 2, "limits": {"mem": 96}});
    let scaled = host.request(&host.subject("scale"), &scale).await;
    assert_eq!(scaled["ok"], true, "{scaled}");
    let said = |output: &Output| output.text(1, "stdout").ends_with('\n');
    output.until("the second one's words", said).await;
    let words = output.text(1, "stdout");
    let told: Value = serde_json::from_str(&words).unwrap();
    // What the message did not tell it is not told.
    assert_eq!(
        told["limits"],
        json!({"disk": 1024, "fds": 16384, "mem": 96})
    );
    for key in ["uris", "application_uris"] {
        assert_eq!(told[key], json!(["new.example.net"]), "{told}");
    }
    for key in ["version", "application_version"] {
        assert_eq!(told[key], "newer", "{told}");
    }
    assert_eq!(told["space_name"], "prod", "{told}");
    host.stop("app").await;
    // Also of what came while it was on its way.
    let script = Droplet::shell("echo \"$VCAP_APPLICATION\"; exec sleep 1001");
    let mut late = host.message("late", &script);
    let slow = Body::Slow(script.0, Duration::from_secs(10));
    late["executableUri"] = json!(host.files.put("late.tgz", slow));
    let mut output = host.output("late").await;
    let started = host.request(&host.subject("start"), &late).await;
    assert_eq!(started["ok"], true, "{started}");
    let scale = json!({"droplet": "late", "instances": 1, "limits": {"mem": 96}});
    let scaled = host.request(&host.subject("scale"), &scale).await;
    assert_eq!(scaled["ok"], true, "{scaled}");
    let update = json!({"droplet": "late", "uris": [], "version": "newer"});
    assert_eq!(host.request("dea.update", &update).await["ok"], true);
    let said = |output: &Output| output.text(0, "stdout").ends_with('\n');
    output.until("its words", said).await;
    let told: Value = serde_json::from_str(&output.text(0, "stdout")).unwrap();
    assert_eq!(told["limits"]["mem"], 96, "{told}");
    assert_eq!(told["version"], "newer", "{told}");
    host.stop("late").await;
}

#[tokio::test]
async fn what_a_scale_promises_is_reserved() {
    let host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    let mut message = host.message("app", &sleeper);
    message["limits"]["mem"] = json!(16);
    host.run(message).await;
    scaled(&host, "app", 16).await;
    // Of two commands in one piece the second sees what the first was promised, though most instances
    // have not taken it yet: 4096 MB in all.
    let grow = json!({"droplet": "app", "instances": 16, "limits": {"mem": 200}});
    let mut big = host.message("big", &sleeper);
    big["limits"]["mem"] = json!(1500);
    let inbox = host.nats().new_inbox();
    let mut answers = host.watch(&format!("{inbox}.*")).await;
    for (number, (subject, body)) in [(host.subject("scale"), grow), (host.subject("start"), big)]
        .into_iter()
        .enumerate()
    {
        let to = format!("{inbox}.{number}");
        let sent = host
            .nats()
            .publish_with_reply(subject, to, body.to_string().into());
        sent.await.unwrap();
    }
    let both = [answers.next().await, answers.next().await];
    let refused: Vec<_> = both.iter().filter(|answer| answer["ok"] == false).collect();
    assert_eq!(refused.len(), 1, "{both:?}");
    assert_eq!(refused[0]["error"]["code"], "not_enough_memory", "{both:?}");
    host.stop("app").await;
}

#[tokio::test]
async fn a_scale_is_answered_when_its_stops_are_kept() {
    let mut host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    for _ in 0..tests::rounds() {
        scaled(&host, "app", 4).await;
        scaled(&host, "app", 1).await;
        let _ = host.restart().await;
        assert_eq!(indices(&host, 1).await, [0]);
    }
    host.stop("app").await;
}

#[tokio::test]
async fn limits_that_no_host_has_are_refused_whole() {
    let host = Host::start().await;
    host.run(host.message("app", &Droplet::sample("sleeper")))
        .await;
    let subject = host.subject("scale");
    let request = json!({"droplet": "app", "instances": 1, "limits": {"mem": 900_000}});
    let answer = host.request(&subject, &request).await;
    assert_eq!(answer["error"]["code"], "not_enough_memory", "{answer}");
    let find = host.subject("find");
    let found = host.request(&find, &json!({"droplet": "app"})).await;
    assert_eq!(found["instances"][0]["state"], "RUNNING", "{found}");
    host.stop("app").await;
}
