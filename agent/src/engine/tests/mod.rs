//! Real containers, from a root that has busybox and nothing else.

mod copies;
mod deaths;
mod disk;
mod rounds;
mod wires;
mod world;

use super::{Container, EngineError, SeedFile};
use crate::host::cgroups::CgroupError;
use crate::host::helpers::Ended;
use container::spool::Cursor;
use container::status::Status;
use nix::errno::Errno;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::timeout;
use world::{Told, appears, create, frame, job, kill, processes, run, shell, world};

#[test]
fn a_container_lives_and_leaves_nothing() {
    world(|world| async move {
        let engine = world.engine().await;
        let mut spec = world.spec(&world.handle);
        let (path, bytes) = (
            "home/vcap/startup".into(),
            b"#!/bin/sh\necho seeded\n".to_vec(),
        );
        spec.files.push(SeedFile {
            path,
            mode: 0o755,
            uid: 1000,
            gid: 1000,
            bytes,
        });
        let container = create(&engine, spec).await.unwrap();
        let ports = container.map_port(None, Some(8080)).await.unwrap();
        assert_eq!(container.saved().ports, [ports]);
        assert!(run(&["nft", "list", "ruleset"]).contains(&ports.0.to_string()));
        let told = job(
            &container,
            1,
            "echo out; echo err >&2; ./startup; hostname; cat /etc/resolv.conf; id -u; pwd; \
             stat -c %u:%a /home/vcap; ls /proc | sort -n | head -1; exit 7",
        )
        .await;
        let there = world.left(&world.handle);
        assert_eq!(
            there[0], "control group",
            "what is looked for is there to be found"
        );
        assert_eq!(there[2..4], ["link", "set elements"]);
        assert!(there[4].contains("wshd: "), "{there:?}");
        assert!(told.started && told.ended);
        assert_eq!(told.status, Some(Status::Exited(7)));
        assert_eq!(String::from_utf8_lossy(&told.stderr), "err\n");
        let expected = "out\nseeded\napp\nnameserver 9.9.9.9\n1000\n/home/vcap\n1000:755\n";
        assert!(told.out().starts_with(expected), "{}", told.out());
        assert!(container.usage().await.unwrap().memory_bytes > 0);
        let gateway = container.saved().lease.host;
        let way = job(&container, 2, "ip route").await;
        assert!(
            way.out().contains(&format!("default via {gateway}")),
            "{way:?}"
        );
        let (first, second) = tokio::join!(container.destroy(), container.destroy());
        first.and(second).unwrap();
        timeout(Duration::from_secs(1), container.died())
            .await
            .unwrap();
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        engine.close().await;
        assert!(!run(&["nft", "list", "ruleset"]).contains("ostler"));
    });
}

/// Every line in its order, and the last one.
fn assert_numbered(out: &str) {
    let lines: Vec<&str> = out.lines().collect();
    let (last, lines) = lines.split_last().unwrap();
    assert_eq!(*last, "last");
    let mut numbers = lines.iter().enumerate();
    assert!(numbers.all(|(i, line)| *line == format!("line {i}")));
}

#[test]
fn a_killed_linker_comes_back_without_loss_or_repeat() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let script = "i=0; until [ -e /shared/go ]; do echo line $i; i=$((i+1)); \
                      [ $((i % 100)) = 0 ] && sleep 0.02; done; echo last";
        assert!(container.is_idle().await);
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        let mut told = Told::default();
        let mut kills = 0;
        while let Some(frame) = frame(&mut records).await {
            told.take(frame.record);
            if told.stdout.len() < kills * 6000 + 1000 {
                continue;
            }
            if kills == 3 {
                fs::write(world.shared.join("go"), "").unwrap();
            } else if kill("iomux-link", &container.inner.directory.job(1)) {
                // The job goes on, beside whatever follows it.
                assert!(!container.is_idle().await);
                kills += 1;
            }
        }
        assert_eq!(kills, 3);
        assert_numbered(told.out());
        assert_eq!((told.status, told.missing), (Some(Status::Exited(0)), 0));
        assert!(container.is_idle().await);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn a_killed_supervisor_is_taken_over_and_the_app_goes_on() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let script = "i=0; until [ -e /shared/go ]; do echo line $i; i=$((i+1)); sleep 0.01; done; \
                      echo last; exit 9";
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        let mut told = Told::default();
        for round in 1..=2 {
            while told.stdout.len() < round * 100 {
                told.take(frame(&mut records).await.unwrap().record);
            }
            while !kill("iomux-spawn", &container.inner.directory.job(1)) {
                told.take(frame(&mut records).await.unwrap().record);
            }
        }
        while told.stdout.len() < 500 {
            told.take(frame(&mut records).await.unwrap().record);
        }
        fs::write(world.shared.join("go"), "").unwrap();
        let told = told.rest(&mut records).await;
        assert_numbered(told.out());
        assert_eq!((told.status, told.missing), (Some(Status::Exited(9)), 0));
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn nobody_reading_stops_no_app() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let script = "dd if=/dev/zero bs=64k count=320 2>/dev/null; touch /shared/done";
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        appears(&world.shared.join("done")).await;
        let told = Told::default().rest(&mut records).await;
        assert_eq!(told.status, Some(Status::Exited(0)));
        assert!(
            told.missing > 0,
            "the spool keeps 4 MiB, and says what it dropped"
        );
        assert_eq!(told.stdout.len() as u64 + told.missing, 320 << 16);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn dropping_the_receiver_ends_the_linker() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container
            .spawn(1, "vcap", shell("echo x; sleep 1000"))
            .await
            .unwrap();
        let linkers = || {
            processes("iomux-link")
                .iter()
                .filter(|(_, t)| t.contains(&world.handle))
                .count()
        };
        let mut records = container.follow(1, Cursor::default());
        frame(&mut records).await.unwrap();
        assert_eq!(linkers(), 1);
        drop(records);
        while linkers() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let again = container.spawn(1, "vcap", shell("true")).await;
        assert!(matches!(again, Err(EngineError::JobInUse(1))), "{again:?}");
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn a_term_reaches_every_process_but_the_init() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let script = "trap : TERM; sh -c 'trap \"echo bye; exit 3\" TERM; touch /shared/up; \
                      while :; do sleep 0.1; done'; echo $?";
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        appears(&world.shared.join("up")).await;
        container.signal(15).await.unwrap();
        let mut lost = container.follow(77, Cursor::default());
        let mut records = container.follow(1, Cursor::default());
        let told = Told::default().rest(&mut records).await;
        assert!(told.out().ends_with("bye\n3\n"), "{told:?}");
        container
            .signal(15)
            .await
            .expect("nobody left to signal is fine");
        assert!(
            timeout(Duration::from_millis(50), container.died())
                .await
                .is_err()
        );
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        let Some(super::Followed::Lost(reason)) = lost.recv().await else {
            panic!("no such job")
        };
        assert_eq!(reason, "the container was destroyed");
        let after = container.spawn(2, "vcap", shell("true")).await;
        assert!(after.is_err(), "{after:?}");
    });
}

#[test]
fn a_failed_creation_is_undone_and_says_why() {
    world(|world| async move {
        let engine = world.engine().await;
        let mut spec = world.spec(&world.handle);
        spec.stack = world.stack.join("missing");
        let error = create(&engine, spec).await.unwrap_err();
        assert!(matches!(&error, EngineError::Layer { path, .. } if path.ends_with("missing")));
        world.nothing_left(&world.handle).await;

        // Found out by the init, when everything else is there.
        let mut spec = world.spec(&world.handle);
        spec.binds[0].source = world.shared.join("missing");
        let error = create(&engine, spec).await.unwrap_err();
        assert!(
            matches!(
                error,
                EngineError::Init {
                    source: Errno::ENOENT,
                    ..
                }
            ),
            "{error}"
        );
        world.nothing_left(&world.handle).await;

        let mut spec = world.spec(&world.handle);
        spec.limits.memory_bytes = Some(1);
        let _ = create(&engine, spec).await.expect_err("one byte of memory");
        world.nothing_left(&world.handle).await;

        let error = create(&engine, world.spec("../23456789"))
            .await
            .unwrap_err();
        assert!(matches!(error, EngineError::Handle(_)), "{error}");

        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let error = create(&engine, world.spec(&world.handle))
            .await
            .unwrap_err();
        assert!(matches!(error, EngineError::HandleInUse(_)), "{error}");
        let mut spec = world.spec(&world.handle);
        spec.stack = world.stack.join("missing");
        let _ = create(&engine, spec).await.unwrap_err();
        let mut spec = world.spec(&world.handle);
        spec.files.push(SeedFile {
            path: "/".into(),
            mode: 0,
            uid: 0,
            gid: 0,
            bytes: vec![],
        });
        let _ = create(&engine, spec).await.unwrap_err();
        assert_eq!(job(&container, 1, "echo alive").await.out(), "alive\n");
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn helpers_that_are_missing_or_broken_leave_nothing() {
    world(|world| async move {
        let mut config = world.config();
        // What goes into containers is not to be read from a file later.
        config.helpers = world.stack.clone();
        let error = super::Engine::open(config).await.unwrap_err();
        assert!(matches!(error, EngineError::Helpers(_)), "{error}");

        // An init that ends without a word, and one that says nothing.
        for (number, script) in [(252, "exit 3"), (251, "exec sleep 1251")] {
            let silent = world.stack.join(format!("silent{number}"));
            fs::create_dir(&silent).unwrap();
            fs::write(silent.join("wshd"), format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(silent.join("wshd"), fs::Permissions::from_mode(0o755)).unwrap();
            let mut config = world.config();
            config.helpers = silent.clone();
            config.network.pool = (std::net::Ipv4Addr::new(10, number, 0, 0), 22);
            let mut other = super::Engine::open(config).await.unwrap();
            if number == 251 {
                let shared = Arc::get_mut(&mut other.shared).unwrap();
                shared.launch_patience = Duration::from_secs(2);
            }
            let error = create(&other, world.spec(&world.handle)).await.unwrap_err();
            let expected = match number {
                252 => matches!(
                    &error,
                    EngineError::InitDied {
                        launcher: Ended::Exited(3)
                    }
                ),
                _ => matches!(&error, EngineError::Deadline { .. }),
            };
            assert!(expected, "{error}");
            world.nothing_left(&world.handle).await;
            while !processes("sleep 1251").is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
}

/// The kernel calls a control group busy that has another one in it.
#[test]
fn what_could_not_be_undone_is_undone_later() {
    world(|world| async move {
        let slow = world.stack.join("slow");
        fs::create_dir(&slow).unwrap();
        let go = slow.join("go");
        let waits = format!("until [ -e {} ]; do sleep 0.01; done", go.display());
        fs::write(slow.join("wshd"), format!("#!/bin/sh\n{waits}\nexit 3\n")).unwrap();
        let mut config = world.config();
        config.helpers = slow;
        let engine = super::Engine::open(config).await.unwrap();
        let group = engine.shared.cgroups.group(&world.handle).memory_dir();
        let inner = group.join("inner");
        let block = async {
            while fs::create_dir(&inner).is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            fs::write(&go, "").unwrap();
        };
        let (made, ()) = tokio::join!(create(&engine, world.spec(&world.handle)), block);
        let error = made.unwrap_err();
        assert!(matches!(error, EngineError::InitDied { .. }), "{error}");
        assert!(inner.exists() && engine.shared.depot.ranges_taken() == 1);
        fs::remove_dir(&inner).unwrap();
        while engine.shared.depot.ranges_taken() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn a_creation_that_nobody_waits_for_leaves_nothing() {
    world(|world| async move {
        let engine = world.engine().await;
        for wait_ms in [0, 1, 2, 4, 8, 12, 16, 20, 25, 30, 40, 60] {
            let handle = world::fresh_handle();
            let wait = Duration::from_millis(wait_ms);
            if let Ok(container) = timeout(wait, create(&engine, world.spec(&handle))).await {
                container.unwrap().destroy().await.unwrap();
            }
            // Creation and destruction go on without us, and hold the engine.
            while Arc::strong_count(&engine.shared) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            world.nothing_left(&handle).await;
        }
    });
}

#[test]
fn limits_change_while_it_runs() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let limits = super::Limits {
            memory_bytes: Some(32 << 20),
            ..super::Limits::default()
        };
        container.limit(limits).await.unwrap();
        assert_eq!(container.inner.group.memory_limit(), Some(32 << 20));
        let limits = super::Limits {
            memory_bytes: Some(4096),
            ..super::Limits::default()
        };
        let error = container.limit(limits).await.unwrap_err();
        let in_use = matches!(error, EngineError::Cgroup(CgroupError::MemoryInUse { .. }));
        assert!(in_use, "{error}");
        assert_eq!(container.inner.group.memory_limit(), Some(32 << 20));
        assert_eq!(job(&container, 1, "echo alive").await.out(), "alive\n");
        container.destroy().await.unwrap();
    });
}

#[test]
fn twenty_in_a_row() {
    world(|world| async move {
        let engine = world.engine().await;
        let mut times = Vec::new();
        for _ in 0..20 {
            let handle = world::fresh_handle();
            let began = Instant::now();
            let container: Container = create(&engine, world.spec(&handle)).await.unwrap();
            let created = began.elapsed();
            container.destroy().await.unwrap();
            eprintln!(
                "{handle}: created in {created:?}, destroyed in {:?}",
                began.elapsed() - created
            );
            times.push(created);
            world.nothing_left(&handle).await;
        }
        times.sort_unstable();
        assert!(times[10] < Duration::from_secs(5), "{times:?}");
        let mode = fs::metadata(world.base.join("containers"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        engine.close().await;
    });
}
