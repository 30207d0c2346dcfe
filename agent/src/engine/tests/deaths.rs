//! What happens when the agent, an init, or an app dies.

use super::fs;
use super::world::{
    Told, appears, create, frame, fresh_handle, job, killed, processes, shell, world,
};
use crate::engine::adopt::{INIT_DIED, REBOOTED};
use crate::engine::{Adopted, Container, Level, Saved};
use container::spool::Cursor;
use container::status::Status;
use container::sys::pidfd;
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::sleep;

/// The one process of a container that is not its init, as the host counts.
async fn app(container: &Container) -> i32 {
    loop {
        let pids = container.inner.group.pids();
        if let [pid] = pids
            .into_iter()
            .filter(|pid| *pid != container.pid())
            .collect::<Vec<_>>()[..]
        {
            return pid;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

async fn dead(pid: i32) {
    // A child of another process: it is gone when its parent, or the host's init, has reaped it.
    let state = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    while state(pid)
        .rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    {
        sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn another_agent_adopts_what_lives() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        let port = container.map_port(None, None).await.unwrap();
        let script = "echo one; until [ -e /shared/go ]; do sleep 0.01; done; echo two; exit 4";
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        let mut told = Told::default();
        let mut cursor = Cursor::default();
        while told.stdout.is_empty() {
            let frame = frame(&mut records).await.unwrap();
            cursor = frame.next;
            told.take(frame.record);
        }
        let text = serde_json::to_string(&container.saved()).unwrap();
        let pid = container.pid();
        drop((records, container, engine));

        let saved: Saved = serde_json::from_str(&text).unwrap();
        let engine = world.engine().await;
        let Adopted::Alive(container) = engine.adopt(&saved).await.unwrap() else {
            panic!("it lives")
        };
        assert_eq!((container.pid(), container.saved()), (pid, saved.clone()));
        engine.rebuild_network(&[&saved]).await.unwrap();
        assert!(super::run(&["nft", "list", "ruleset"]).contains(&port.0.to_string()));
        assert_eq!(
            engine
                .sweep(&HashSet::from([world.handle.clone()]))
                .await
                .cleared,
            0
        );
        engine
            .adopt(&saved)
            .await
            .expect_err("its address is in use");
        fs::write(world.shared.join("go"), "").unwrap();
        let mut records = container.follow(1, cursor);
        let told = told.rest(&mut records).await;
        assert_eq!(
            (told.out(), told.status),
            ("one\ntwo\n", Some(Status::Exited(4)))
        );
        assert_eq!(job(&container, 2, "echo three").await.out(), "three\n");
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn the_dead_are_told_why_and_removed() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container.map_port(None, None).await.unwrap();
        let script = "echo last; touch /shared/up; sleep 1000";
        container.spawn(1, "vcap", shell(script)).await.unwrap();
        appears(&world.shared.join("up")).await;
        let saved = container.saved();
        let pid = container.pid();
        drop((container, engine));
        pidfd::send_signal(pidfd::open(pid).unwrap(), 9).unwrap();
        dead(pid).await;

        let rebooted = Saved {
            boot_id: "another".to_owned(),
            ..saved.clone()
        };
        let engine = world.engine().await;
        let Adopted::Dead { reason, container } = engine.adopt(&rebooted).await.unwrap() else {
            panic!("of another boot")
        };
        assert_eq!(reason, REBOOTED);
        // What it held is held until it is destroyed, or the agent is gone.
        engine
            .adopt(&saved)
            .await
            .expect_err("its address is in use");
        drop((container, engine));

        let engine = world.engine().await;
        let Adopted::Dead { reason, container } = engine.adopt(&saved).await.unwrap() else {
            panic!("its init was killed")
        };
        assert_eq!(reason, INIT_DIED);
        engine.rebuild_network(&[]).await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        let told = Told::default().rest(&mut records).await;
        assert_eq!((told.out(), told.ended), ("last\n", true));
        container.destroy().await.unwrap();
        engine.destroy_handle(&saved).await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn a_record_is_enough_to_destroy() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container.map_port(None, None).await.unwrap();
        container
            .spawn(1, "vcap", shell("sleep 1000"))
            .await
            .unwrap();
        let saved = container.saved();
        drop((container, engine));

        // Alive as well as gone.
        let engine = world.engine().await;
        engine.destroy_handle(&saved).await.unwrap();
        engine.destroy_handle(&saved).await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn what_is_gone_already_is_destroyed() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container.map_port(None, None).await.unwrap();
        container
            .spawn(1, "vcap", shell("sleep 1000"))
            .await
            .unwrap();
        let saved = container.saved();
        pidfd::send_signal(pidfd::open(container.pid()).unwrap(), 9).unwrap();
        container.died().await;
        let group = container.inner.group.clone();
        while !group.is_empty() || !processes(&world.handle).is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
        // Somebody has cleaned up by hand.
        group.remove(Duration::from_secs(5)).unwrap();
        super::run(&["nft", "delete", "table", "inet", "ostler"]);
        let directory = world.base.join("containers").join(&world.handle);
        fs::remove_dir_all(directory).unwrap();
        container.destroy().await.unwrap();
        container.destroy().await.unwrap();
        engine.destroy_handle(&saved).await.unwrap();
        // What it had can be had again.
        let Adopted::Dead { container, .. } = engine.adopt(&saved).await.unwrap() else {
            panic!("it is gone");
        };
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn what_no_record_knows_is_swept() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container
            .spawn(1, "vcap", shell("sleep 1000"))
            .await
            .unwrap();
        let kept = engine
            .create(world.spec(&fresh_handle()), engine.reserve().unwrap())
            .await
            .unwrap();
        let saved = kept.saved();
        drop((container, kept, engine));
        fs::create_dir_all(world.base.join("containers/not-a-handle")).unwrap();
        fs::create_dir_all(world.base.join("trash/99/a")).unwrap();

        let engine = world.engine().await;
        let Adopted::Alive(kept) = engine.adopt(&saved).await.unwrap() else {
            panic!("it lives");
        };
        let known = HashSet::from([kept.handle().to_owned()]);
        engine.rebuild_network(&[&saved]).await.unwrap();
        assert_eq!(engine.sweep(&known).await.cleared, 1);
        world.nothing_left(&world.handle).await;
        assert!(world.base.join("containers/not-a-handle").exists());
        assert!(!world.base.join("trash/99").exists());
        assert_eq!(job(&kept, 1, "echo kept").await.out(), "kept\n");
        kept.destroy().await.unwrap();
    });
}

#[test]
fn an_init_that_dies_is_noticed_and_its_jobs_end() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container
            .spawn(1, "vcap", shell("echo x; sleep 1000"))
            .await
            .unwrap();
        let mut records = container.follow(1, Cursor::default());
        let mut told = Told::default();
        while told.stdout.is_empty() {
            told.take(frame(&mut records).await.unwrap().record);
        }
        let watch = container.clone();
        let died = tokio::spawn(async move { watch.died().await });
        pidfd::send_signal(pidfd::open(container.pid()).unwrap(), 9).unwrap();
        died.await.unwrap();
        let told = told.rest(&mut records).await;
        assert_eq!((told.out(), told.status, told.ended), ("x\n", None, true));
        container.signal(15).await.expect_err("nobody to ask");
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

#[test]
fn a_supervisor_killed_with_its_container_still_ends_the_job() {
    world(|world| async move {
        let engine = world.engine().await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        container
            .spawn(1, "vcap", shell("echo x; sleep 1000"))
            .await
            .unwrap();
        app(&container).await;
        killed("iomux-spawn", &container.inner.directory.job(1)).await;
        container.kill().await.unwrap();
        let mut records = container.follow(1, Cursor::default());
        let told = Told::default().rest(&mut records).await;
        assert!(told.ended && told.status.is_none(), "{told:?}");
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}

/// Whether the kernel said in which group this victim was: of ten kills in five seconds it does.
fn logged(pid: i32) -> bool {
    let log = super::run(&["dmesg"]);
    log.lines()
        .any(|line| line.contains("oom-kill:") && line.contains(&format!("pid={pid},")))
}

#[test]
fn a_kill_for_memory_is_reported_with_its_victim() {
    world(|world| async move {
        let engine = world.engine().await;
        let mut spec = world.spec(&world.handle);
        spec.limits.memory_bytes = Some(16 << 20);
        let container = create(&engine, spec).await.unwrap();
        let mut reports = container.oom(0);
        let mut victims = Vec::new();
        for number in 1..=2 {
            let go = world.shared.join(format!("go{number}"));
            let eat = format!(
                "touch /shared/up{number}; until [ -e /shared/go{number} ]; do :; done; \
                 exec tail /dev/zero"
            );
            container.spawn(number, "vcap", shell(&eat)).await.unwrap();
            appears(&world.shared.join(format!("up{number}"))).await;
            let pid = app(&container).await;
            if number == 2 {
                let memory = container.inner.group.memory_dir();
                killed("oom", &memory).await;
            }
            fs::write(go, "").unwrap();
            let report = reports.recv().await.unwrap();
            assert_eq!(
                (report.count, report.level),
                (number.into(), Level::Container)
            );
            match &report.victim {
                Some(victim) => assert_eq!((victim.pid, victim.comm.as_str()), (pid, "tail")),
                None => assert!(!logged(pid), "{report:?}"),
            }
            assert_eq!(report.limit_bytes, Some(16 << 20));
            victims.push(report);
            let mut records = container.follow(number, Cursor::default());
            let told = Told::default().rest(&mut records).await;
            assert_eq!(told.status, Some(Status::Signaled(9)));
        }
        let later: Vec<_> = container
            .oom_now(0)
            .await
            .into_iter()
            .map(|r| (r.count, r.victim))
            .collect();
        let seen: Vec<_> = victims.into_iter().map(|r| (r.count, r.victim)).collect();
        assert_eq!(later, seen);
        assert_eq!(container.oom_now(2).await, []);
        // Nobody looked when it happened: the baseline tells.
        let mut late = container.oom(1);
        assert_eq!(late.recv().await.unwrap().count, 2);
        drop(late);
        container.destroy().await.unwrap();
        assert_eq!(reports.recv().await, None, "the group is gone");
        world.nothing_left(&world.handle).await;
        assert!(
            processes("oom ")
                .iter()
                .all(|(_, title)| !title.contains(world.handle.as_str()))
        );
    });
}

/// The kernel's log knows most victims by their user only: of kills in a row it says the group of ten.
#[test]
fn a_kill_of_who_had_the_ids_before_is_not_told() {
    world(|world| async move {
        let engine = world.engine().await;
        let mut spec = world.spec(&world.handle);
        spec.limits.memory_bytes = Some(16 << 20);
        let former = create(&engine, spec.clone()).await.unwrap();
        let eat = "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do tail /dev/zero; done";
        former.spawn(1, "vcap", shell(eat)).await.unwrap();
        let mut records = former.follow(1, Cursor::default());
        Told::default().rest(&mut records).await;
        let ids = former.inner.directory.ids();
        former.destroy().await.unwrap();
        let depot = &engine.shared.depot;
        while depot.ranges_taken() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        depot.prefer_range(ids.unwrap());

        let container = create(&engine, spec).await.unwrap();
        assert_eq!(container.inner.directory.ids(), ids);
        let eat = "touch /shared/up; until [ -e /shared/go ]; do :; done; exec tail /dev/zero";
        container.spawn(1, "vcap", shell(eat)).await.unwrap();
        appears(&world.shared.join("up")).await;
        let pid = app(&container).await;
        fs::write(world.shared.join("go"), "").unwrap();
        let mut records = container.follow(1, Cursor::default());
        let told = Told::default().rest(&mut records).await;
        assert_eq!(told.status, Some(Status::Signaled(9)));
        let victims: Vec<_> = container
            .oom_now(0)
            .await
            .into_iter()
            .map(|report| report.victim.map(|victim| victim.pid))
            .collect();
        assert_eq!(victims, [Some(pid)]);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
    });
}
