//! `dea.<id>.scale`: this host converges an app to so many instances of its own.

use serde_json::{Value, json};
use tests::{Droplet, Host, Process, Setup, get};

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
