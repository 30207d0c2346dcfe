//! What a writable layer may hold: images here, project quotas where the kernel has them.

use super::world::{World, create, fresh_handle, job, run, world};
use crate::engine::{
    Adopted, Container, DiskChange, DiskLimit, DiskUsage, DiskWay, Engine, EngineError,
};
use crate::host::depot::disk::{DiskError, Disks, Space};
use container::status::Status;
use container::sys::quota::{self, Quota};
use container::sys::{pidfd, process};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const MB: u64 = 1 << 20;

async fn engine(world: &World, disk: DiskWay) -> Engine {
    let mut config = world.config();
    config.disk = disk;
    Engine::open(config).await.unwrap()
}

async fn usage(container: &Container) -> DiskUsage {
    container.disk_usage().await.unwrap().unwrap()
}

async fn change(container: &Container, bytes: u64) -> Result<(), DiskError> {
    let change = DiskChange {
        bytes: Some(bytes),
        inodes: None,
    };
    match container.limit_disk(change).await {
        Err(EngineError::Disk(error)) => Err(error),
        other => {
            other.unwrap();
            Ok(())
        }
    }
}

/// Bytes that one more container can have, as seen now.
async fn left(engine: &Engine) -> u64 {
    engine.shared.lookout.look().await;
    engine.disk_left(std::iter::empty(), 1).unwrap()
}

/// Bytes that one more container could have beside one, if nothing were promised: records and output have their own
/// part.
fn unused(world: &World) -> u64 {
    let space = nix::sys::statvfs::statvfs(&world.base).unwrap();
    let spools = 2 * world.config().output_bytes();
    space.blocks_available() * space.fragment_size() - 64 * MB - spools
}

/// The same, but for what the depot's own file system writes down meanwhile.
fn near(one: u64, other: u64) {
    assert!(one.abs_diff(other) < MB, "{one} {other}");
}

/// Jobs are numbered through.
struct Jobs<'a>(&'a Container, u32);

impl Jobs<'_> {
    /// Runs a script that must end well, and gives back what it printed.
    async fn run(&mut self, script: &str) -> String {
        self.1 += 1;
        let told = job(self.0, self.1, script).await;
        assert_eq!(told.status, Some(Status::Exited(0)), "{script}: {told:?}");
        told.out().to_owned()
    }
}

/// Writes until nothing more fits, and says what the kernel said.
const FILL: &str = "cd; dd if=/dev/zero of=fill bs=64k count=1000 2>&1; \
                    dd if=/dev/zero of=last bs=64k count=1 2>&1; ls";

/// Makes files until none can be made, and says what the kernel said.
const FILES: &str = "cd; i=0; while echo -n 2>/dev/null >e$i && [ $i -lt 9000 ]; do i=$((i+1)); done; \
                     touch one-more 2>&1; ls | tail -1";

#[test]
fn images_limit_bytes_and_inodes_and_neighbours_are_unharmed() {
    world(|world| async move {
        let engine = engine(&world, DiskWay::Image).await;
        limits_hold(&world, &engine, "No space left on device").await;
        engine.close().await;
    });
}

/// One fills its bytes, one its inodes; a third, and whoever looks, see nothing of it.
async fn limits_hold(world: &World, engine: &Engine, full: &str) {
    let handles = [fresh_handle(), fresh_handle(), fresh_handle()];
    let [bytes, files, neighbour] = &handles.each_ref().map(|handle| world.spec(handle));
    let [bytes, files, neighbour] = [
        create(engine, bytes.clone()).await.unwrap(),
        create(engine, files.clone()).await.unwrap(),
        create(engine, neighbour.clone()).await.unwrap(),
    ];
    let fresh = usage(&bytes).await;
    assert!((1..MB).contains(&fresh.bytes), "{fresh:?}");
    assert_eq!(fresh.limit.bytes, 16 * MB);
    let (most, exact) = (fresh.limit.inodes, 1000);
    assert!((exact..exact + exact / 4).contains(&most), "{fresh:?}");

    let said = Jobs(&bytes, 0).run(FILL).await;
    assert_eq!(said.matches(full).count(), 2, "{said}");
    let used = usage(&bytes).await;
    assert!((15 * MB..=16 * MB).contains(&used.bytes), "{used:?}");
    let said = Jobs(&files, 0).run(FILES).await;
    assert!(said.contains(full), "{said}");
    let used = usage(&files).await;
    assert!(used.inodes + 8 > most && used.bytes < 4 * MB, "{used:?}");

    let script = "cd; dd if=/dev/zero of=x bs=1M count=8 2>&1; touch a b c d; ls";
    let said = Jobs(&neighbour, 0).run(script).await;
    assert!(said.ends_with("a\nb\nc\nd\nx\n"), "{said}");
    let used = usage(&neighbour).await;
    assert!((8 * MB..9 * MB).contains(&used.bytes), "{used:?}");
    for container in [bytes, files, neighbour] {
        container.destroy().await.unwrap();
    }
    for handle in &handles {
        world.nothing_left(handle).await;
    }
}

#[test]
fn an_image_grows_and_shrinks_while_it_is_used_and_an_adopted_one_too() {
    world(|world| async move {
        let first = engine(&world, DiskWay::Image).await;
        let container = create(&first, world.spec(&world.handle)).await.unwrap();
        limits_change(&container, 0, "No space left on device").await;
        let image = world
            .base
            .join("containers")
            .join(&world.handle)
            .join("disk.img");
        let taken = || fs::metadata(&image).unwrap().blocks() * 512;
        assert!((8 * MB..11 * MB).contains(&taken()), "{}", taken());
        let saved = container.saved();
        drop((container, first));

        let second = engine(&world, DiskWay::Image).await;
        let Adopted::Alive(container) = second.adopt(&saved).await.unwrap() else {
            panic!("dead");
        };
        limits_change(&container, 100, "No space left on device").await;
        assert!((8 * MB..11 * MB).contains(&taken()), "{}", taken());
        let beyond = change(&container, 1 << 40).await.unwrap_err();
        assert!(matches!(beyond, DiskError::Beyond { .. }), "{beyond}");
        inodes_stay(&container).await;
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        second.close().await;
    });
}

/// The inodes of an image are made with it: who asks for others is refused, and for bytes beside them, too.
async fn inodes_stay(container: &Container) {
    let before = usage(container).await.limit;
    let ask = |inodes| DiskChange {
        bytes: Some(before.bytes + MB),
        inodes: Some(inodes),
    };
    for inodes in [before.inodes - 1, before.inodes + 1] {
        let error = container.limit_disk(ask(inodes)).await.unwrap_err();
        let EngineError::Disk(DiskError::Inodes { have }) = error else {
            panic!("{error}");
        };
        assert_eq!(
            (have, usage(container).await.limit),
            (before.inodes, before)
        );
    }
    container.limit_disk(ask(before.inodes)).await.unwrap();
    assert_eq!(usage(container).await.limit.bytes, before.bytes + MB);
}

/// Begins and ends with 8 MB or 16 MB, and few of them used.
async fn limits_change(container: &Container, first_job: u32, full: &str) {
    let mut jobs = Jobs(container, first_job);
    change(container, 24 * MB).await.unwrap();
    assert_eq!(usage(container).await.limit.bytes, 24 * MB);
    let said = jobs
        .run("cd; dd if=/dev/zero of=a bs=1M count=20 2>&1")
        .await;
    assert!(!said.contains(full), "{said}");

    // What does not fit changes nothing, and what is said to be safe is.
    let error = change(container, 8 * MB).await.unwrap_err();
    let DiskError::InUse { smallest } = error else {
        panic!("{error}");
    };
    assert_eq!(smallest.bytes, 21 * MB);
    assert_eq!(usage(container).await.limit.bytes, 24 * MB);
    change(container, smallest.bytes).await.unwrap();
    let said = jobs
        .run("cd; dd if=/dev/zero of=b bs=1M count=20 2>&1; :")
        .await;
    assert!(said.contains(full), "{said}");
    assert!(usage(container).await.bytes <= smallest.bytes);

    // Not while it is full: the last block may be gone.
    jobs.run("cd; rm b; echo kept >c; sync; rm a").await;
    change(container, 8 * MB).await.unwrap();
    let said = jobs
        .run("cd; cat c; dd if=/dev/zero of=a bs=1M count=20 2>&1; rm a")
        .await;
    assert!(said.contains(full) && said.starts_with("kept\n"), "{said}");
    assert_eq!(usage(container).await.limit.bytes, 8 * MB);
}

/// Mounts a file system of its own there, in this thread's own mount namespace: what is free does not change with
/// what others do. The path as text.
fn mount_depot(base: &Path, size: &str) -> String {
    mount_depot_of(base, size, &["ext4", "-m", "0"])
}

/// [`mount_depot`] of a kind, after which there may be what its `mkfs` is told.
fn mount_depot_of(base: &Path, size: &str, kind: &[&str]) -> String {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    run(&["mount", "--make-rprivate", "/"]);
    let image = base.with_file_name("depot.img").display().to_string();
    let base = base.display().to_string();
    run(&["truncate", "-s", size, &image]);
    let mkfs = [&["mkfs", "-t"], kind, &["-q", &image]].concat();
    run(&mkfs);
    run(&["mount", "-o", "loop", &image, &base]);
    base
}

/// Where files are copied to be written, what is written once more takes more than it had.
#[test]
fn what_an_image_was_given_is_enough_on_btrfs_however_often_it_is_written() {
    run(&["sh", "-c", "modprobe btrfs 2>/dev/null || true"]);
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    if !known.contains("btrfs") {
        return tests::skip("btrfs, which this kernel does not have");
    }
    world(|world| async move {
        let base = mount_depot_of(&world.base, "640M", &["btrfs"]);
        // A directory whose files are compressed is no obstacle.
        let containers = format!("{base}/containers");
        run(&["mkdir", &containers]);
        run(&["chattr", "+c", &containers]);
        let engine = engine(&world, DiskWay::Auto).await;
        assert_eq!(engine.shared.disks.describe(), "images");
        // The second one is written after the pattern of the first.
        let (first, second) = (fresh_handle(), fresh_handle());
        let mut containers = Vec::new();
        for handle in [&first, &second] {
            let mut spec = world.spec(handle);
            spec.disk.bytes = 64 * MB;
            containers.push(create(&engine, spec).await.unwrap());
        }
        // Somebody else has the rest, but for what the agent itself writes.
        let fill = "cd $0; head -c 16M /dev/zero >own; cat /dev/zero >filler; sync -f .; rm own; sync -f .";
        run(&["sh", "-c", fill, &base]);
        for container in &containers {
            let mut jobs = Jobs(container, 0);
            for letter in ["a", "b", "c", "d"] {
                let script = format!(
                    "cd; tr '\\0' {letter} </dev/zero | dd of=file bs=64k count=800 iflag=fullblock conv=notrunc,fsync 2>&1; \
                     tr -d {letter} <file | wc -c"
                );
                let said = jobs.run(&script).await;
                assert!(said.ends_with("\n0\n"), "{said}");
            }
            let said = jobs.run(FILL).await;
            assert!(said.contains("No space left on device"), "{said}");
        }
        run(&["rm", &format!("{base}/filler")]);
        for container in containers {
            container.destroy().await.unwrap();
        }
        for handle in [&first, &second] {
            world.nothing_left(handle).await;
        }
        engine.close().await;
        run(&["umount", &base]);
    });
}

#[test]
fn what_the_depot_does_not_have_is_promised_to_nobody() {
    world(|world| async move {
        let base = mount_depot(&world.base, "1G");
        let engine = engine(&world, DiskWay::Image).await;
        let free = left(&engine).await;
        let mut spec = world.spec(&world.handle);
        spec.disk.bytes = free + MB;
        let error = create(&engine, spec).await.unwrap_err();
        let EngineError::Disk(DiskError::NotEnough { needed, .. }) = error else {
            panic!("{error}");
        };
        assert_eq!(needed, free + MB);
        world.nothing_left(&world.handle).await;

        // A promise is kept: all of it is taken at once.
        let mut spec = world.spec(&world.handle);
        spec.disk.bytes = 512 * MB;
        let container = create(&engine, spec).await.unwrap();
        let image = world
            .base
            .join("containers")
            .join(&world.handle)
            .join("disk.img");
        let taken = fs::metadata(&image).unwrap().blocks() * 512;
        assert!((512 * MB..540 * MB).contains(&taken), "{taken}");
        let limit = world.spec(&world.handle).disk;
        let limit = |bytes| DiskLimit { bytes, ..limit };
        assert!(taken <= engine.disk_needs(limit(512 * MB)), "{taken}");
        // What a look has counted is not taken twice, however old the look is; what it has not is taken.
        let free = left(&engine).await;
        near(free, unused(&world));
        let beside = |handle: &str, bytes| {
            let here = std::iter::once((handle, limit(bytes)));
            engine.disk_left(here, 1).unwrap()
        };
        assert_eq!(beside(&world.handle, 512 * MB), free);
        assert_eq!(beside(&world.handle, 520 * MB), free - 8 * MB);
        let takes = engine.disk_needs(limit(16 * MB)) + world.config().output_bytes();
        assert_eq!(beside("planned", 16 * MB), free - takes);
        change(&container, 520 * MB).await.unwrap();
        near(beside(&world.handle, 520 * MB), unused(&world));
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        engine.close().await;
        run(&["umount", &base]);
    });
}

#[test]
fn what_the_kernel_takes_out_of_an_image_stays_promised() {
    world(|world| async move {
        let base = mount_depot(&world.base, "512M");
        let engine = engine(&world, DiskWay::Image).await;
        let mut spec = world.spec(&world.handle);
        spec.disk.bytes = 256 * MB;
        let container = create(&engine, spec).await.unwrap();
        // As the loop driver does where ext4 has zeros to write: an app that fills its disk and writes into
        // preallocated files can make it do so.
        let image = format!("{base}/containers/{}/disk.img", world.handle);
        let before = left(&engine).await;
        near(before, unused(&world));
        run(&[
            "fallocate",
            "--punch-hole",
            "--offset",
            "64MiB",
            "--length",
            "8GiB",
            &image,
        ]);
        let free = unused(&world);
        assert!(free > before + 64 * MB, "{before} {free}");
        let after = left(&engine).await;
        assert!(after.abs_diff(before) < MB, "{before} {after}");

        let mut other = world.spec(&fresh_handle());
        other.disk.bytes = free - 48 * MB;
        let error = create(&engine, other.clone()).await.unwrap_err();
        assert!(
            matches!(error, EngineError::Disk(DiskError::NotEnough { .. })),
            "{error}"
        );
        other.disk.bytes = 32 * MB;
        let other = create(&engine, other).await.unwrap();
        let error = change(&other, free - 48 * MB).await.unwrap_err();
        assert!(matches!(error, DiskError::NotEnough { .. }), "{error}");
        change(&other, 48 * MB).await.unwrap();
        other.destroy().await.unwrap();
        container.destroy().await.unwrap();
        engine.close().await;
        run(&["umount", &base]);
    });
}

/// Mounts ext4 with project quotas there. False where the kernel has none: then the depot can have none either.
fn has_projects(base: &Path) -> bool {
    let has = mount_with_projects(base, "ext4");
    assert!(has || Disks::quota(Space::new(base, 0)).is_err());
    has
}

/// Mounts a file system with project quotas there, in this thread's own mount namespace. False where the
/// kernel has none, and for XFS also where nothing can make one.
fn mount_with_projects(base: &Path, kind: &str) -> bool {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    run(&["mount", "--make-rprivate", "/"]);
    let image = base.with_file_name("depot.img").display().to_string();
    let (lacks, options, size) = match kind {
        "xfs" => ("CONFIG_XFS_QUOTA is not set", "", "320M"),
        _ => ("CONFIG_QFMT_V2 is not set", "-Oquota,project", "256M"),
    };
    let script = format!("command -v mkfs.{kind} || true");
    let config = run(&["sh", "-c", "zcat /proc/config.gz 2>/dev/null || true"]);
    if config.contains(lacks) || run(&["sh", "-c", &script]).is_empty() {
        return false;
    }
    run(&["truncate", "-s", size, &image]);
    let mkfs = format!("mkfs.{kind} -q {options} {image}");
    run(&["sh", "-c", &mkfs]);
    let base = base.display().to_string();
    run(&["mount", "-t", kind, "-o", "loop,prjquota", &image, &base]);
    true
}

#[test]
fn project_quotas_limit_bytes_and_inodes_where_the_kernel_has_them() {
    world(|world| async move {
        if !mount_with_projects(&world.base, "ext4") {
            let mut config = world.config();
            config.disk = DiskWay::Quota;
            let error = Engine::open(config).await.unwrap_err().to_string();
            assert!(error.contains("does not work in"), "{error}");
            let engine = engine(&world, DiskWay::Auto).await;
            assert_eq!(engine.shared.disks.describe(), "images");
            return engine.close().await;
        }
        let engine = engine(&world, DiskWay::Auto).await;
        assert_eq!(engine.shared.disks.describe(), "project quotas");
        limits_hold(&world, &engine, "Disk quota exceeded").await;
        engine.close().await;
        run(&["umount", &world.base.display().to_string()]);
    });
}

#[test]
fn project_quotas_are_taken_also_where_a_full_disk_lets_nobody_try_them() {
    world(|world| async move {
        if !has_projects(&world.base) {
            return;
        }
        engine(&world, DiskWay::Auto).await.close().await;
        let fill = "for size in 64M 4M 256K 16K 4K; do i=0; \
                    while fallocate -l $size \"$0/f$size.$i\" 2>/dev/null; do i=$((i+1)); done; done; \
                    i=0; while mkdir \"$0/d$i\" 2>/dev/null; do i=$((i+1)); done";
        run(&["sh", "-c", fill, &world.base.display().to_string()]);
        let engine = engine(&world, DiskWay::Auto).await;
        assert_eq!(engine.shared.disks.describe(), "project quotas");
        engine.close().await;
        run(&["umount", &world.base.display().to_string()]);
    });
}

/// A kernel may have one file system's quotas and not the other's.
#[test]
fn project_quotas_of_xfs_limit_bytes_and_inodes_where_the_kernel_has_them() {
    world(|world| async move {
        if !mount_with_projects(&world.base, "xfs") {
            assert!(
                std::env::var_os("OSTLER_VM").is_none(),
                "Debian's kernel has it"
            );
            return;
        }
        let engine = engine(&world, DiskWay::Auto).await;
        assert_eq!(engine.shared.disks.describe(), "project quotas");
        // XFS has one word for a full project and a full disk (`xfs_trans_dqresv`).
        limits_hold(&world, &engine, "No space left on device").await;
        engine.close().await;
        run(&["umount", &world.base.display().to_string()]);
    });
}

#[test]
fn a_project_quota_changes_and_is_adopted_and_promises_are_counted() {
    world(|world| async move {
        if !has_projects(&world.base) {
            return;
        }
        let first = engine(&world, DiskWay::Quota).await;
        let container = create(&first, world.spec(&world.handle)).await.unwrap();
        limits_change(&container, 0, "Disk quota exceeded").await;
        let saved = container.saved();
        drop((container, first));
        let second = engine(&world, DiskWay::Quota).await;
        let Adopted::Alive(container) = second.adopt(&saved).await.unwrap() else {
            panic!("dead");
        };
        change(&container, 16 * MB).await.unwrap();
        fewer_inodes(&container).await;
        promises_are_counted(&world, &second, &container).await;
        let number = project_of(&world, &world.handle).unwrap();
        assert_eq!(quota_of(&world, number).most_bytes, 16 * MB);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        second.close().await;
        assert_eq!(quota_of(&world, number), Quota::default());
        run(&["umount", &world.base.display().to_string()]);
    });
}

/// What root in these namespaces of a container is told, when it says something about the project of a directory.
fn told_inside(
    container: &Container,
    namespaces: CloneFlags,
    path: &str,
    say: fn(BorrowedFd<'_>) -> nix::Result<()>,
) -> nix::Result<()> {
    let init = pidfd::open(container.pid()).unwrap();
    let child = process::fork(|| {
        let told = setns(&init, namespaces).and_then(|()| {
            let directory = open(path, OFlag::O_DIRECTORY, Mode::empty())?;
            say(directory.as_fd())
        });
        process::exit_now(told.map_or_else(|errno| errno as i32, |()| 0))
    });
    let ended = waitpid(Pid::from_raw(child.unwrap()), None).unwrap();
    let WaitStatus::Exited(_, code) = ended else {
        panic!("{ended:?}");
    };
    (code == 0).then_some(()).ok_or(Errno::from_raw(code))
}

#[test]
fn a_container_leaves_its_project_by_no_way() {
    world(|world| async move {
        if !has_projects(&world.base) {
            return;
        }
        let engine = engine(&world, DiskWay::Quota).await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        Jobs(&container, 0).run("cd; mkdir own").await;
        let leave = |directory: BorrowedFd<'_>| quota::set_project(directory, 0);
        let inside = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS;
        for path in ["/home/vcap/own", "/home/vcap", "/"] {
            for way in [leave, quota::end_inheritance] {
                let told = told_inside(&container, inside, path, way);
                assert_eq!(told, Err(Errno::EINVAL), "{path}");
            }
        }
        assert!(
            Jobs(&container, 1)
                .run(FILL)
                .await
                .contains("Disk quota exceeded")
        );
        // Root of the host can, at the same place.
        let host = CloneFlags::CLONE_NEWNS;
        told_inside(&container, host, "/home/vcap/own", leave).unwrap();
        let script = "cd own; dd if=/dev/zero of=more bs=1M count=8 2>&1";
        let said = Jobs(&container, 2).run(script).await;
        assert!(!said.contains("exceeded"), "{said}");
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        engine.close().await;
        run(&["umount", &world.base.display().to_string()]);
    });
}

#[test]
fn an_operators_project_is_no_containers() {
    world(|world| async move {
        if !has_projects(&world.base) {
            return;
        }
        let number = 42;
        let base = fs::File::open(&world.base).unwrap();
        quota::set_quota(base.as_fd(), number, 64 * MB, 10_000).unwrap();
        quota::set_project(base.as_fd(), number).unwrap();
        let engine = engine(&world, DiskWay::Unlimited).await;
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        assert_eq!(container.disk_usage().await.unwrap(), None);
        container.destroy().await.unwrap();
        engine.close().await;
        assert_eq!(quota_of(&world, number).most_bytes, 64 * MB);
        drop(base);
        run(&["umount", &world.base.display().to_string()]);
    });
}

#[test]
fn what_has_its_own_project_leaves_the_trash_of_a_depot_in_an_operators() {
    world(|world| async move {
        if !has_projects(&world.base) {
            return;
        }
        let number = 42;
        let base = fs::File::open(&world.base).unwrap();
        quota::set_project(base.as_fd(), number).unwrap();
        // An agent without project quotas has made the depot.
        engine(&world, DiskWay::Unlimited).await.close().await;
        let trash = world.base.join("trash");
        let inherit = || {
            let directory = File::open(world.base.join("trash")).unwrap();
            quota::project(directory.as_fd()).unwrap()
        };
        fs::remove_dir(&trash).unwrap();
        fs::create_dir(&trash).unwrap();
        assert_eq!(inherit(), Some(number));

        let engine = engine(&world, DiskWay::Quota).await;
        assert_eq!(inherit(), None);
        let container = create(&engine, world.spec(&world.handle)).await.unwrap();
        Jobs(&container, 0)
            .run("cd; mkdir -p a/b; echo >a/b/c")
            .await;
        let own = project_of(&world, &world.handle).unwrap();
        assert_ne!(own, number);
        container.destroy().await.unwrap();
        world.nothing_left(&world.handle).await;
        assert_eq!(fs::read_dir(&trash).unwrap().count(), 0);
        engine.close().await;
        assert_eq!(quota_of(&world, own), Quota::default());
        drop(base);
        run(&["umount", &world.base.display().to_string()]);
    });
}

async fn fewer_inodes(container: &Container) {
    let used = usage(container).await.inodes;
    let inodes = |inodes| DiskChange {
        bytes: None,
        inodes: Some(inodes),
    };
    let error = container.limit_disk(inodes(used - 1)).await.unwrap_err();
    let EngineError::Disk(DiskError::InUse { smallest }) = error else {
        panic!("{error}");
    };
    assert_eq!(smallest.inodes, used);
    container.limit_disk(inodes(used + 2)).await.unwrap();
    let said = Jobs(container, 200).run(FILES).await;
    assert!(said.contains("Disk quota exceeded"), "{said}");
    assert_eq!(usage(container).await.inodes, used + 2);
}

/// What others were promised is not free, used or not.
async fn promises_are_counted(world: &World, engine: &Engine, container: &Container) {
    let most = usage(container).await;
    let promised = most.limit.bytes - most.bytes;
    let free = unused(world);
    near(left(engine).await, free - promised);
    let mut spec = world.spec(&fresh_handle());
    spec.disk.bytes = free - promised / 2;
    let error = create(engine, spec.clone()).await.unwrap_err();
    assert!(
        matches!(error, EngineError::Disk(DiskError::NotEnough { .. })),
        "{error}"
    );
    let error = change(container, most.limit.bytes + free)
        .await
        .unwrap_err();
    assert!(matches!(error, DiskError::NotEnough { .. }), "{error}");
    spec.disk.bytes = free - promised - MB;
    create(engine, spec).await.unwrap().destroy().await.unwrap();
}

fn project_of(world: &World, handle: &str) -> Option<u32> {
    let directory = world.base.join("containers").join(handle).join("disk");
    quota::project(File::open(directory).unwrap().as_fd()).unwrap()
}

fn quota_of(world: &World, number: u32) -> Quota {
    quota::quota(File::open(&world.base).unwrap().as_fd(), number).unwrap()
}

#[test]
fn a_depot_that_is_too_small_is_no_depot_without_bounds() {
    world(|world| async move {
        let base = mount_depot(&world.base, "48M");
        let engine = engine(&world, DiskWay::Auto).await;
        assert_eq!(engine.shared.disks.describe(), "images");
        let error = create(&engine, world.spec(&world.handle)).await;
        let error = error.unwrap_err();
        assert!(
            matches!(
                error,
                EngineError::Disk(DiskError::NotEnough { free: 0, .. })
            ),
            "{error}"
        );
        engine.close().await;
        run(&["umount", &base]);
    });
}
