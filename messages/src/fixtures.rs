//! Every example of the protocol reference is understood, or printed back, as it stands.

use crate::command::{Asked, Command, parse};
use crate::outgoing::{
    Advertise, Component, DiskUse, DropletStatus, Exited, FindReply, Goodbye, Heartbeat,
    HeartbeatEntry, Hello, PlacementProperties, Reason, Route, Stats, StatusReply, ToBytes, Usage,
    uptime, usage_time,
};
use crate::start::StartRequest;
use crate::state::State;
use crate::subjects::Incoming;
use serde_json::Value;
use std::path::PathBuf;

fn text(name: &str) -> String {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/messages");
    std::fs::read_to_string(dir.join(format!("{name}.json"))).unwrap()
}

fn value(name: &str) -> Value {
    serde_json::from_str(&text(name)).unwrap()
}

fn asked(incoming: Incoming, name: &str) -> Asked {
    parse(incoming, text(name).as_bytes()).unwrap().0
}

/// What goes out is the example to the byte, but for whitespace between its tokens.
fn same(ours: &impl ToBytes, name: &str) {
    let ours = String::from_utf8(ours.to_bytes()).unwrap();
    assert_eq!(ours, packed(&text(name)), "{name}");
}

/// JSON without whitespace between its tokens.
fn packed(json: &str) -> String {
    let (mut quoted, mut escaped) = (false, false);
    json.chars()
        .filter(|&char| {
            let kept = quoted || !char.is_ascii_whitespace();
            quoted ^= char == '"' && !escaped;
            escaped = quoted && char == '\\' && !escaped;
            kept
        })
        .collect()
}

fn start() -> StartRequest {
    let Asked::Command(Command::Start(request)) = asked(Incoming::Start, "dea.start") else {
        panic!("no start");
    };
    *request
}

#[test]
fn a_component_is_told_as_it_was() {
    let component = Component {
        r#type: "DEA",
        index: 0,
        uuid: "0-4f2a9b7c1d3e4f5a8b9c0d1e2f3a4b5c".into(),
        host: "10.0.16.23:34501".into(),
        credentials: ["varz".into(), "p4ss".into()],
        start: usage_time(1_399_370_401),
        uptime: Some(uptime(312)),
    };
    same(&component, "vcap.component.discover-reply");
    assert_eq!(uptime(86_400 + 2 * 3600 + 59), "1d:2h:0m:59s");
}

#[test]
fn a_start_is_understood_in_full() {
    let start = start();
    assert_eq!(
        start.droplet.as_str(),
        "5c1f7a0e-33d2-4b68-9a3f-0c6c7f1b2a91"
    );
    assert_eq!(
        (start.index, start.limits.mem, start.limits.fds),
        (1, 256, 16384)
    );
    assert_eq!(
        start.env[1],
        ("CF_PROCESS_TYPE".to_owned(), "web".to_owned())
    );
    assert_eq!(start.start_command, None);
    assert_eq!(start.egress_network_rules.len(), 2);
    assert_eq!(start.health_check_timeout, Some(90));
}

/// The start fixture with one field set (or, with `None`, removed) must be refused with these words.
#[test]
fn each_wrong_field_of_a_start_is_named() {
    let cases: &[(&[&str], Option<&str>, &str)] = &[
        (&["droplet"], None, "`droplet` is missing"),
        (&["droplet"], Some("\"a.b\""), "one subject token"),
        (&["index"], Some("\"1\""), "`index` is \"1\""),
        (&["index"], Some("-1"), "`index` is -1"),
        (&["index"], Some("1.5"), "`index` is 1.5"),
        (&["version"], Some("null"), "`version` is null"),
        (&["uris"], Some("\"one\""), "`uris`"),
        (&["sha1"], Some("\"xyz\""), "40 hexadecimal digits"),
        (&["limits"], None, "`limits` is missing"),
        (&["limits"], Some("[]"), "`limits` is an array"),
        (
            &["limits", "mem"],
            Some("\"256\""),
            "`limits.mem` is \"256\"",
        ),
        (&["limits", "mem"], Some("0"), "`limits.mem` is 0"),
        (&["limits", "fds"], None, "`limits.fds` is missing"),
        (&["limits", "disk"], Some("99999999999999"), "`limits.disk`"),
        (&["services"], Some("null"), "`services` is null"),
        (
            &["services"],
            Some("[{\"name\":\"x\"}]"),
            "`services[].label` is missing",
        ),
        (
            &["services"],
            Some("[{\"name\":\"x\",\"label\":\"y\",\"plan\":null}]"),
            "services[].plan",
        ),
        (&["env"], Some("[1]"), "`env`"),
        (&["env"], Some("[\"=x\"]"), "NAME=value"),
        (&["cc_partition"], None, "`cc_partition` is missing"),
        (
            &["egress_network_rules"],
            Some("[{\"protocol\":\"sctp\",\"destination\":\"1.1.1.1\"}]"),
            "tcp, udp",
        ),
        (
            &["egress_network_rules"],
            Some("[{\"protocol\":\"tcp\",\"destination\":\"x\"}]"),
            "destination",
        ),
        (&["wait"], Some("\"stopped\""), "`wait`"),
        (&["request_id"], Some("\"\""), "`request_id`"),
        (&["stop_grace"], Some("601"), "`stop_grace`"),
    ];
    for (path, new, words) in cases {
        let mut message = value("dea.start");
        let (last, parents) = path.split_last().unwrap();
        let object = parents
            .iter()
            .fold(&mut message, |object, key| &mut object[*key]);
        match new {
            Some(json) => object[*last] = serde_json::from_str(json).unwrap(),
            None => drop(object.as_object_mut().unwrap().remove(*last)),
        }
        let error = StartRequest::from_value(&message).unwrap_err().to_string();
        assert!(error.contains(words), "{path:?} = {new:?} gave {error:?}");
    }
}

#[test]
fn egress_rules_have_bounds() {
    let mut message = value("dea.start");
    let rule = |ports: usize| {
        let ports = vec!["1"; ports].join(",");
        serde_json::json!({"protocol": "tcp", "destination": "1.1.1.1", "ports": ports})
    };
    for (rules, fits) in [
        (vec![rule(256); 2], true),
        (vec![rule(513)], false),
        (vec![rule(1); 513], false),
        (
            vec![serde_json::json!({"protocol": "all", "destination": "1.1.1.1"}); 1001],
            false,
        ),
    ] {
        message["egress_network_rules"] = rules.into();
        let read = StartRequest::from_value(&message);
        assert_eq!(read.is_ok(), fits);
        let told = read.err().map(|error| error.to_string());
        assert!(told.is_none_or(|told| told.contains("at most 1000 rules")));
        assert!(StartRequest::from_kept(&message).is_ok());
    }
}

#[test]
fn bounds_are_for_what_comes_and_not_for_what_was_accepted_once() {
    let long = || Value::from("x".repeat(1000));
    for (key, beyond) in [
        ("index", u64::MAX.into()),
        ("version", long()),
        ("cc_partition", long()),
        ("request_id", long()),
        ("stop_grace", u64::MAX.into()),
        (
            "limits",
            serde_json::json!({"mem": u64::MAX, "disk": 1, "fds": 8}),
        ),
        (
            "limits",
            serde_json::json!({"mem": 1, "disk": u64::MAX, "fds": 8}),
        ),
        ("limits", serde_json::json!({"mem": 1, "disk": 1, "fds": 7})),
    ] {
        let mut message = value("dea.start");
        message[key] = beyond.clone();
        let refused = StartRequest::from_value(&message).unwrap_err().message;
        assert!(refused.contains(key), "{refused}");
        assert!(
            StartRequest::from_kept(&message).is_ok(),
            "{key} = {beyond}"
        );
        message[key] = true.into();
        assert!(StartRequest::from_kept(&message).is_err(), "{key}");
    }
    let bytes = |version: usize| {
        let version = "v".repeat(version);
        HeartbeatEntry::bytes_at_most("app", "default", 0, &version)
    };
    assert_eq!((bytes(64), bytes(74)), (bytes(0), bytes(0) + 10));
}

#[test]
fn what_old_controllers_send_is_taken() {
    let mut message = value("dea.start");
    message["droplet"] = 17.into();
    for (key, json) in [
        ("uris", "null"),
        ("env", "null"),
        ("health_check_timeout", "null"),
        ("warden_handle", "\"x\""),
    ] {
        message[key] = serde_json::from_str(json).unwrap();
    }
    let start = StartRequest::from_value(&message).unwrap();
    assert_eq!(start.droplet.as_str(), "17");
    assert!(start.uris.is_empty());
}

#[test]
fn every_other_request_is_understood() {
    for (incoming, name) in [
        (Incoming::Stop, "dea.stop-app"),
        (Incoming::Stop, "dea.stop-scale-down"),
        (Incoming::StopHere, "dea.stop-instance"),
        (Incoming::Update, "dea.update"),
        (Incoming::FindDroplet, "dea.find.droplet-request"),
        (Incoming::Discover, "dea.discover"),
        (Incoming::RouterStart, "router.start"),
    ] {
        asked(incoming, name);
    }
    for trigger in [
        Incoming::Locate,
        Incoming::Status,
        Incoming::HealthmanagerStart,
    ] {
        assert!(parse(trigger, b"").is_ok());
    }
    assert!(parse(Incoming::Stop, b"").is_err());
}

#[test]
fn any_bytes_are_an_answer_and_never_a_panic() {
    let subjects = [
        Incoming::Start,
        Incoming::Stop,
        Incoming::Update,
        Incoming::Scale,
        Incoming::FindDroplet,
        Incoming::Discover,
        Incoming::Status,
    ];
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let original = text("dea.start").into_bytes();
    for _ in 0..2000 {
        let mut bytes = original.clone();
        for _ in 0..4 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let at = usize::try_from(seed % bytes.len() as u64).unwrap();
            match seed >> 60 {
                0..=4 => bytes.truncate(at.max(1)),
                5..=9 => bytes[at] = b"\"{}[],:0-.\\n"[at % 12],
                _ => bytes[at] = seed.to_le_bytes()[3],
            }
        }
        for subject in subjects {
            if let Err(bad) = parse(subject, &bytes) {
                assert!(!bad.message.is_empty());
            }
        }
    }
}

#[test]
#[expect(
    clippy::too_many_lines,
    reason = "one literal after the other, each beside its fixture"
)]
fn what_goes_out_is_as_the_reference_shows() {
    let app = "5c1f7a0e-33d2-4b68-9a3f-0c6c7f1b2a91".to_owned();
    let version = "b7f0c2de-8f1e-4c55-8d0b-6a1e0f9d4c22".to_owned();
    let dea = "7d0c5b1e-2a6b-4d0c-9f0e-6b1d2f3a4c5e".to_owned();
    let entry = |instance: &str, index, state, state_timestamp| HeartbeatEntry {
        cc_partition: "default".into(),
        droplet: app.clone(),
        version: version.clone(),
        instance: instance.into(),
        index,
        state,
        state_timestamp,
    };
    let droplets = vec![
        entry(
            "6e4c1f0b9a7d4853b2e1c0d9f8a7b6c5",
            1,
            State::Running,
            1471351204.511,
        ),
        entry(
            "1c9d2e3f4a5b6c7d8e9f0a1b2c3d4e5f",
            0,
            State::Crashed,
            1471351111.02,
        ),
    ];
    same(
        &Heartbeat {
            dea: dea.clone(),
            droplets,
        },
        "dea.heartbeat",
    );
    let exited = Exited {
        cc_partition: "default".into(),
        droplet: app.clone(),
        version: version.clone(),
        instance: "1c9d2e3f4a5b6c7d8e9f0a1b2c3d4e5f".into(),
        index: 0,
        reason: Reason::Crashed,
        exit_status: 255,
        exit_description: "out of memory".into(),
        crash_timestamp: Some(1_471_351_111),
        signal: None,
        oom: None,
        output: None,
        handle: None,
    };
    same(&exited, "droplet.exited");
    let count = [(app.clone(), 2)];
    let advertise = Advertise {
        id: dea.clone(),
        stacks: vec!["cflinuxfs2".into()],
        url: None,
        available_memory: 12_032,
        available_disk: 90_112,
        app_id_to_count: count.clone().into(),
        placement_properties: PlacementProperties { zone: "z1".into() },
    };
    same(&advertise, "dea.advertise");
    let goodbye = Goodbye {
        id: dea.clone(),
        ip: "10.0.16.23".into(),
        version: "0.0.1".into(),
        app_id_to_count: count.into(),
    };
    same(&goodbye, "dea.shutdown");
    let route = Route {
        dea: dea.clone(),
        app: app.clone(),
        uris: vec!["orders.apps.example.net".into()],
        host: "10.0.16.23".into(),
        port: 61_018,
        tags: [("component".to_owned(), "dea-0".to_owned())].into(),
        private_instance_id: "e1a47c0d5b2948f6a0c3d7e8f9b1a2c4d5e6f708192a3b4c5d6e7f8091a2b3c4"
            .into(),
        private_instance_index: "1".into(),
    };
    same(&route, "router.register");
    same(&find_reply(app, version, dea), "dea.find.droplet-reply");
}

fn find_reply(droplet: String, version: String, dea: String) -> FindReply {
    FindReply {
        dea,
        droplet,
        version,
        instance: "6e4c1f0b9a7d4853b2e1c0d9f8a7b6c5".into(),
        index: 1,
        state: State::Running,
        state_timestamp: 1471351204.511,
        staged: "/6e4c1f0b9a7d4853b2e1c0d9f8a7b6c5".into(),
        stats: Some(Stats {
            name: "orders-api".into(),
            uris: vec!["orders.apps.example.net".into()],
            host: "10.0.16.23".into(),
            port: 61_018,
            uptime: 86,
            mem_quota: 268_435_456,
            disk_quota: Some(1_073_741_824),
            fds_quota: 16_384,
            usage: Usage {
                time: "2016-08-16 12:41:30 +0000".into(),
                cpu: Some(0.034),
                cores: None,
                mem: Some(88_604_672),
                mem_charged: None,
                disk: Some(DiskUse::Bytes(65_536)),
            },
        }),
    }
}

#[test]
fn greetings_are_as_the_reference_shows() {
    let hello = Hello {
        id: "0-4f2a9b7c1d3e4f5a8b9c0d1e2f3a4b5c".into(),
        ip: "10.0.16.23".into(),
        version: "0.0.1".into(),
        port: Some(34_567),
    };
    same(&hello, "dea.hello");
    let status = StatusReply {
        hello: Hello {
            port: None,
            ..hello
        },
        max_memory: 16_384,
        reserved_memory: 4_352,
        used_memory: 1_310,
        num_clients: None,
    };
    same(&status, "dea.status-reply");
    let droplet = DropletStatus {
        name: "orders-api".into(),
        uris: vec!["orders.apps.example.net".into()],
    };
    let ours = String::from_utf8(droplet.to_bytes()).unwrap();
    // The example is the oldest form, which went on: this much of it later ones have.
    let begins = ours.trim_end_matches('}');
    assert!(packed(&text("droplet.status-reply")).starts_with(begins));
}
