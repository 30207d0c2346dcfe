//! Ports, egress rules and bandwidth of a container, as its holder asks for them.

use super::world::{Told, shell, world};
use super::{create, fs, run};
use crate::engine::{Adopted, Bandwidth, EgressRule, Traffic};
use container::spool::Cursor;
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

#[test]
fn a_mapped_port_is_any_a_chosen_one_or_a_pair() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let any = container.map_port(None, None).await.unwrap();
        assert_eq!(any.0, any.1);
        let inside = container.map_port(None, Some(8080)).await.unwrap();
        assert!(inside.0 != any.0 && inside.1 == 8080);
        let chosen = container.map_port(Some(64_000), None).await.unwrap();
        assert_eq!(chosen, (64_000, 64_000));
        // Also one that no pool has.
        let pair = container.map_port(Some(7002), Some(80)).await.unwrap();
        assert_eq!(pair, (7002, 80));
        for taken in [64_000, 7002, any.0] {
            container.map_port(Some(taken), Some(81)).await.unwrap_err();
        }
        assert_eq!(container.saved().ports, [any, inside, chosen, pair]);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn rules_and_bandwidth_are_saved_adopted_and_changed() {
    world(|world| async move {
        let engine = world.engine().await;
        let mut spec = world.spec(&world.handle);
        spec.egress = vec![EgressRule {
            destination: (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST),
            traffic: Traffic::Tcp(vec![(80, 90)]),
            log: true,
        }];
        spec.bandwidth = Bandwidth {
            into: Some(1_000_000),
            out: Some(2_000_000),
        };
        let (rules, first) = (spec.egress.clone(), spec.bandwidth);
        let container = create(&engine, spec).await.unwrap();
        assert_eq!(container.bandwidth().await.unwrap(), first);
        let second = Bandwidth {
            into: None,
            out: Some(3_000_000),
        };
        container.limit_bandwidth(second).await.unwrap();
        assert_eq!(container.bandwidth().await.unwrap(), second);
        let text = serde_json::to_string(&container.saved()).unwrap();
        let saved: crate::engine::Saved = serde_json::from_str(&text).unwrap();
        assert_eq!((&saved.egress, saved.bandwidth), (&rules, second));
        // As an older agent wrote it.
        let mut older: serde_json::Value = serde_json::from_str(&text).unwrap();
        for key in ["egress", "bandwidth"] {
            older.as_object_mut().unwrap().remove(key).unwrap();
        }
        let older: crate::engine::Saved = serde_json::from_value(older).unwrap();
        assert_eq!(older.bandwidth, Bandwidth::default());
        drop((container, engine));
        let engine = world.engine().await;
        let Adopted::Alive(container) = engine.adopt(&saved).await.unwrap() else {
            panic!("it lives")
        };
        engine.rebuild_network(&[&saved]).await.unwrap();
        assert_eq!(container.bandwidth().await.unwrap(), second);
        assert_eq!(container.saved(), saved);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

/// Stands in for a program at its own path, notes that it was started, and starts it.
fn watch_program(desk: &Path, log: &Path, program: &Path) {
    let name = program.file_name().unwrap();
    let (real, stand_in) = (desk.join("real").join(name), desk.join(name));
    fs::copy(program, &real).unwrap();
    // As a link to it may be called: by the name it goes by.
    let script = format!(
        "#!/bin/bash\necho \"$0\" >>{}\nexec -a \"$0\" {} \"$@\"\n",
        log.display(),
        real.display()
    );
    fs::write(&stand_in, script).unwrap();
    fs::set_permissions(&stand_in, fs::Permissions::from_mode(0o755)).unwrap();
    let paths = [&stand_in, program].map(|path| path.display().to_string());
    run(&["mount", "--bind", &paths[0], &paths[1]]);
}

/// What was started until nothing more is: an engine looks at its table once more a second later, or when it comes to it.
async fn at_rest(log: &Path) -> String {
    let started = || fs::read_to_string(log).unwrap();
    let (mut before, mut unchanged) = (started(), 0);
    while unchanged < 2 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = started();
        unchanged = if now == before { unchanged + 1 } else { 0 };
        before = now;
    }
    before
}

#[test]
fn no_program_for_networks_runs_on_an_instances_path() {
    world(|world| async move {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        run(&["mount", "--make-rprivate", "/"]);
        let (desk, log) = (world.shared.join("programs"), world.shared.join("started"));
        fs::create_dir_all(desk.join("real")).unwrap();
        fs::write(&log, "").unwrap();
        let mut watched = BTreeSet::new();
        for name in ["nft", "iptables", "ip6tables", "ip", "tc", "conntrack"] {
            for directory in ["/usr/sbin", "/usr/bin", "/usr/local/sbin"] {
                let Ok(program) = Path::new(directory).join(name).canonicalize() else {
                    continue;
                };
                if watched.insert(program.clone()) {
                    watch_program(&desk, &log, &program);
                }
            }
        }
        assert!(watched.len() >= 3, "{watched:?}");
        let started = || fs::read_to_string(&log).unwrap();

        let engine = world.engine().await;
        assert!(started().contains("/nft\n"), "who starts one is seen");
        let before = at_rest(&log).await;
        let mut spec = world.spec(&world.handle);
        spec.egress = vec![EgressRule {
            destination: ([192, 0, 2, 0].into(), [192, 0, 2, 255].into()),
            traffic: Traffic::Tcp(vec![(80, 443)]),
            log: true,
        }];
        spec.bandwidth = Bandwidth {
            into: Some(1_000_000),
            out: Some(2_000_000),
        };
        let container = create(&engine, spec.clone()).await.unwrap();
        container.map_port(None, None).await.unwrap();
        container.map_port(None, Some(8080)).await.unwrap();
        container.spawn(1, "vcap", shell("exit 0")).await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        Told::default().rest(&mut records).await;
        container
            .limit_bandwidth(Bandwidth::default())
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(started(), before);

        let saved = container.saved();
        drop((records, container, engine));
        let engine = world.engine().await;
        engine.rebuild_network(&[&saved]).await.unwrap();
        let before = at_rest(&log).await;
        let Adopted::Alive(container) = engine.adopt(&saved).await.unwrap() else {
            panic!("it lives")
        };
        container.limit_bandwidth(spec.bandwidth).await.unwrap();
        container.destroy().await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(started(), before);
        world.nothing_left(&world.handle).await;
        engine.close().await;
    });
}
