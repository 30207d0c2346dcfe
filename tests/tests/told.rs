//! What a host says on its own: routes are taken back for good, and nothing is said without an end.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::{Droplet, Host, Setup, Watch};
use tokio::time::Instant;

/// A web app with a route.
fn web(host: &Host) -> Value {
    let mut message = host.message("web", &Droplet::sample("sinatra"));
    message["uris"] = json!(["web.example.net", "www.example.net"]);
    message
}

/// Waits until the record of an instance says so.
async fn recorded(host: &Host, handle: &Value, words: &str) {
    let record = host.base.join("instances").join(handle.as_str().unwrap());
    let record = record.join("record.json");
    let text = || std::fs::read_to_string(&record).unwrap_or_default();
    host.tree_until(words, |_| text().contains(words)).await;
}

/// The app's route is taken back, and once more, and then it is forgotten.
async fn is_taken_back(host: &Host, taken_back: &mut Watch, route: &Value) {
    for _ in 0..2 {
        let gone = taken_back.next().await;
        for key in ["host", "port", "uris", "app", "private_instance_id"] {
            assert_eq!(gone[key], route[key], "{key} of {gone}");
        }
    }
    let mut beats = host.watch("dea.heartbeat").await;
    for _ in 0..3 {
        beats.next().await;
    }
    assert_eq!(taken_back.arrived(), Vec::<Value>::new());
}

#[tokio::test]
async fn a_route_of_an_app_that_died_without_agent_and_bus_is_taken_back() {
    let mut host = Host::start().await;
    let mut registered = host.watch("router.register").await;
    let mut taken_back = host.watch("router.unregister").await;
    let answer = host.run(web(&host)).await;
    let route = registered.next().await;
    host.stop_bus().await;
    host.kill9().await;
    registered.arrived();
    host.tree().one("wshd").signal(Signal::SIGKILL);
    host.spawn_agent();
    recorded(&host, &answer["handle"], "\"state\":\"CRASHED\"").await;
    host.start_bus().await;
    is_taken_back(&host, &mut taken_back, &route).await;
    assert_eq!(registered.arrived(), Vec::<Value>::new());
}

#[tokio::test]
async fn a_route_that_was_taken_back_into_the_void_is_taken_back_by_the_next_agent() {
    let mut host = Host::start().await;
    let mut registered = host.watch("router.register").await;
    let mut taken_back = host.watch("router.unregister").await;
    let answer = host.run(web(&host)).await;
    let route = registered.next().await;
    host.stop_bus().await;
    host.tree().one("wshd").signal(Signal::SIGKILL);
    recorded(&host, &answer["handle"], "\"exit\":{").await;
    for _ in 0..2 {
        host.kill9().await;
        host.spawn_agent();
        recorded(&host, &answer["handle"], "\"taken_back\":[{").await;
    }
    host.start_bus().await;
    is_taken_back(&host, &mut taken_back, &route).await;
    // It is known to be heard, also by whoever comes after.
    recorded(&host, &answer["handle"], "\"taken_back\":[]").await;
    host.restart().await;
    let mut beats = host.watch("dea.heartbeat").await;
    for _ in 0..3 {
        beats.next().await;
    }
    assert_eq!(taken_back.arrived(), Vec::<Value>::new());
}

#[tokio::test]
async fn a_new_connection_hears_every_route() {
    let mut host = Host::start().await;
    let uris =
        |count: usize| -> Vec<String> { (0..count).map(|n| format!("{n}.example.net")).collect() };
    let mut message = web(&host);
    message["uris"] = json!(uris(3000));
    let mut registered = host.watch("router.register").await;
    let mut taken_back = host.watch("router.unregister").await;
    host.run(message).await;
    let route = registered.next().await;
    assert_eq!(route["uris"], json!(uris(3000)));
    let update = json!({"droplet": "web", "uris": uris(1000), "version": "v2"});
    host.request("dea.update", &update).await;
    let gone = taken_back.next().await;
    assert_eq!(gone["uris"].as_array().unwrap().len(), 2000);
    assert_eq!(gone["port"], route["port"]);
    host.stop_bus().await;
    registered.arrived();
    host.start_bus().await;
    let route = registered.next().await;
    assert_eq!(route["uris"], json!(uris(1000)));
    host.stop("web").await;
}

#[tokio::test]
async fn a_new_version_is_the_same_process_at_the_same_place() {
    let host = Host::start().await;
    let mut registered = host.watch("router.register").await;
    let mut taken_back = host.watch("router.unregister").await;
    host.run(web(&host)).await;
    let route = registered.next().await;
    let init = host.tree().one("wshd").pid;
    let update = json!({"droplet": "web", "uris": ["two.example.net"], "version": "v2"});
    host.request("dea.update", &update).await;
    let is_new = |route: &Value| route["uris"] == json!(["two.example.net"]);
    let added = registered.until("its new route", is_new).await;
    let gone = taken_back.next().await;
    for one in [added, gone] {
        for key in [
            "host",
            "port",
            "private_instance_id",
            "private_instance_index",
        ] {
            assert_eq!(one[key], route[key], "{key} of {one}");
        }
    }
    assert_eq!(host.tree().one("wshd").pid, init);
    host.stop("web").await;
}

#[tokio::test]
async fn a_port_rests_also_after_a_shutdown() {
    let mut host = Host::with(Setup {
        config: &[("[network]", "[network]\nports = \"61001-61001\"")],
        ..Default::default()
    })
    .await;
    host.run(web(&host)).await;
    host.end(Signal::SIGTERM).await;
    host.start_agent().await;
    let answer = host.request(&host.subject("start"), &web(&host)).await;
    assert_eq!(answer["error"]["code"], "host_full", "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("1 resting"), "{message}");
}

/// Each of these at most ten times in a second, and at its beginning.
fn at_most(began: Instant, said: usize, what: &str) {
    let pauses = began.elapsed().as_millis() / 100;
    assert!(
        said as u128 <= pauses + 2,
        "{said} {what} in {pauses} pauses"
    );
}

#[tokio::test]
async fn a_burst_of_changes_is_told_now_and_then_and_its_last_state_for_sure() {
    let host = Host::start().await;
    let sleeper = Droplet::sample("sleeper");
    for index in 0..10 {
        let mut message = host.message("many", &sleeper);
        message["index"] = json!(index);
        host.run(message).await;
    }
    let began = Instant::now();
    let mut beats = host.watch("dea.heartbeat").await;
    let mut adverts = host.watch("dea.advertise").await;
    // 500 changes, each of which a heartbeat must tell.
    for round in 0..50 {
        let version = format!("round-{round}");
        let update = json!({"droplet": "many", "uris": [], "version": version});
        let answer = host.request("dea.update", &update).await;
        assert_eq!(answer["matched"], 10, "{answer}");
    }
    for _ in 0..500 {
        host.publish("healthmanager.start", &json!({})).await;
        host.publish("dea.locate", &json!({})).await;
    }
    let last = |beat: &Value| {
        let entries = beat["droplets"].as_array().unwrap();
        entries.len() == 10 && entries.iter().all(|entry| entry["version"] == "round-49")
    };
    beats.until("the last state", last).await;
    beats.arrived();
    adverts.arrived();
    at_most(began, beats.all().len(), "heartbeats");
    at_most(began, adverts.all().len(), "advertisements");
    host.stop("many").await;
}
