//! What is mounted in a container, where and how, and that neither side sees the other's mounts. The lists
//! here are the tests' own, after the table of measures that the wall was designed by. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test, its harness included"
)]

#[allow(dead_code, reason = "a part of it is for wall.rs")]
mod support;

use container::launch::{Access, Bind};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};
use nix::sys::statvfs::statvfs;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use support::{Files, Place, wait_until};

/// What says too much of the host or does too much to it.
const HIDDEN: [&str; 19] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/diskstats",
    "/proc/fs/ext4",
    "/proc/fs/jbd2",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/partitions",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/ext4",
];
/// What nobody writes to.
const PROTECTED: [&str; 6] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/pressure",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// The only devices.
const DEVICES: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Those of a list that this kernel has. What is masked for this test itself is there all the same.
fn present<'a>(paths: &'a [&str]) -> impl Iterator<Item = &'a str> {
    paths
        .iter()
        .copied()
        .filter(|path| Path::new(path).exists())
}

/// A line of `/proc/<pid>/mountinfo`.
#[derive(Debug)]
struct Mount {
    /// What of the file system it shows.
    root: String,
    kind: String,
    /// Those of `ro nosuid nodev noexec` that hold for it.
    flags: Vec<String>,
    /// `shared:1`, `master:1` and the like: whom it hears of mounts from, or tells of them.
    propagation: Vec<String>,
}

/// All mounts that a process sees, by their place; of several at one place the last, which covers the others.
fn mounts(process: &str) -> BTreeMap<String, Mount> {
    let text = std::fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    let line = |line: &str| {
        let (about, kind) = line.split_once(" - ").unwrap();
        let words: Vec<&str> = about.split(' ').collect();
        let known = ["ro", "nosuid", "nodev", "noexec"];
        let flags: BTreeSet<&str> = words[5].split(',').collect();
        let flags = known.into_iter().filter(|flag| flags.contains(flag));
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let mount = Mount {
            root: words[3].to_owned(),
            kind: kind.split(' ').next().unwrap().to_owned(),
            flags: flags.map(str::to_owned).collect(),
            propagation: owned(&words[6..]),
        };
        (words[4].to_owned(), mount)
    };
    text.lines().map(line).collect()
}

fn inside(place: &Place) -> BTreeMap<String, Mount> {
    mounts(&place.pid.to_string())
}

/// A path of the container, as the host can look at it.
fn seen(place: &Place, path: &str) -> PathBuf {
    format!("/proc/{}/root{path}", place.pid).into()
}

/// This thread leaves the machine's mounts alone from here on.
fn apart() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    propagate("/", MsFlags::MS_PRIVATE);
}

fn propagate(path: &str, how: MsFlags) {
    let how = how | MsFlags::MS_REC;
    mount(None::<&str>, path, None::<&str>, how, None::<&str>).unwrap();
}

fn mount_tmpfs(path: &Path) {
    let (none, kind) = (MsFlags::empty(), Some("tmpfs"));
    mount(kind, path, kind, none, None::<&str>).unwrap();
}

fn unmount(path: &Path) {
    umount2(path, MntFlags::MNT_DETACH).unwrap();
}

fn bind(files: &mut Files, source: &str, target: &str, access: Access) {
    let (source, target) = (files.dir.join(source), target.into());
    files.launch.binds.push(Bind {
        source,
        target,
        access,
    });
}

#[test]
fn every_mount_inside_is_as_it_was_designed() {
    apart();
    let mut files = support::files();
    // Two file systems on which everything is allowed, one below the other.
    let data = files.dir.join("data");
    for mount in [&data, &data.join("below")] {
        std::fs::create_dir(mount).unwrap();
        mount_tmpfs(mount);
    }
    files.launch.binds.clear();
    bind(&mut files, "data", "/read", Access::ReadOnly);
    bind(&mut files, "data", "/write", Access::ReadWrite);
    let place = Place::make(files, &[], None);
    unmount(&data);

    let device = "ro nosuid noexec";
    let (plain, nothing) = ("nosuid nodev noexec", "ro nosuid nodev noexec");
    let mut designed = BTreeMap::from([
        ("/", "nosuid nodev"),
        ("/proc", plain),
        ("/sys", nothing),
        ("/dev", plain),
        // Terminals are devices.
        ("/dev/pts", "nosuid noexec"),
        ("/dev/shm", plain),
        ("/read", "ro nosuid nodev"),
        ("/read/below", "ro nosuid nodev"),
        ("/write", "nosuid nodev"),
        ("/write/below", "nosuid nodev"),
    ]);
    let nodes = DEVICES.map(|(name, _, _)| format!("/dev/{name}"));
    designed.extend(nodes.iter().map(|node| (node.as_str(), device)));
    if Path::new("/proc/sys/fs/mqueue").exists() {
        designed.insert("/dev/mqueue", plain);
    }
    for path in present(&HIDDEN) {
        let is_directory = Path::new(path).is_dir();
        designed.insert(path, if is_directory { nothing } else { device });
    }
    designed.extend(present(&PROTECTED).map(|path| (path, nothing)));

    let found = inside(&place);
    let found: BTreeMap<&str, String> = found
        .iter()
        .map(|(path, mount)| (path.as_str(), mount.flags.join(" ")))
        .collect();
    let designed = designed.into_iter();
    let designed: BTreeMap<&str, String> = designed
        .map(|(path, flags)| (path, flags.to_owned()))
        .collect();
    assert_eq!(found, designed);
}

#[test]
fn all_that_tells_of_the_machine_is_covered_by_nothing() {
    let place = Place::new();
    let mounts = inside(&place);
    let mut covered = 0;
    for path in present(&HIDDEN) {
        let mount = mounts.get(path).unwrap_or_else(|| panic!("{path} shows"));
        let shown = seen(&place, path);
        if Path::new(path).is_dir() {
            assert_eq!((&*mount.kind, &*mount.root), ("tmpfs", "/"), "{path}");
            let count = std::fs::read_dir(&shown).unwrap().count();
            let room = statvfs(&shown).unwrap();
            assert_eq!((count, room.files()), (0, 1), "{path}");
        } else {
            let file = std::fs::metadata(&shown).unwrap();
            let number = (major(file.rdev()), minor(file.rdev()));
            assert!(file.file_type().is_char_device(), "{path}");
            assert_eq!((number, &*mount.root), ((1, 3), "/null"), "{path}");
        }
        covered += 1;
    }
    assert!(covered >= 4, "every kernel has some of them: {covered}");
}

#[test]
fn nothing_has_more_room_in_memory_than_it_was_given() {
    let place = Place::new();
    let room = |path: &str| {
        let stat = statvfs(&seen(&place, path)).unwrap();
        (stat.blocks() * stat.fragment_size(), stat.files())
    };
    assert_eq!(room("/dev"), (64 << 10, 256));
    assert_eq!(room("/dev/shm"), (1 << 20, 65_536));
    // And that it bounds; inodes that are there already count.
    let script = "for file in /dev/fill /dev/shm/fill; do head -c 2000000 /dev/zero > $file; stat -c %s $file; done; \
        : > /dev/fill; made=0; while echo -n > /dev/$made; do made=$((made + 1)); done; \
        [ $made -gt 200 ] && [ $made -lt 256 ] && echo full";
    assert_eq!(place.run_inside(script), "65536\n1048576\nfull\n");
}

/// What a host's `/dev` could have in the place of a device: a file, another device (the machine's memory), a
/// disk with the number of the null device, a symlink to the device.
const DECOYS: [(SFlag, (u64, u64)); 4] = [
    (SFlag::S_IFREG, (0, 0)),
    (SFlag::S_IFCHR, (1, 1)),
    (SFlag::S_IFBLK, (1, 3)),
    (SFlag::S_IFLNK, (0, 0)),
];

fn node(path: &Path, kind: SFlag, (major, minor): (u64, u64)) {
    let mode = Mode::from_bits_truncate(0o666);
    match kind {
        SFlag::S_IFLNK => symlink("/dev/real", path).unwrap(),
        kind => mknod(path, kind, mode, makedev(major, minor)).unwrap(),
    }
}

#[test]
fn only_the_real_devices_are_bound_and_mask_anything() {
    apart();
    let dev = Path::new("/dev");
    mount_tmpfs(dev);
    for (name, major, minor) in DEVICES {
        node(&dev.join(name), SFlag::S_IFCHR, (major, minor));
    }
    for (name, ..) in DEVICES {
        let (path, real) = (dev.join(name), dev.join("real"));
        std::fs::rename(&path, &real).unwrap();
        for (kind, number) in DECOYS {
            node(&path, kind, number);
            let state = || {
                let file = std::fs::symlink_metadata(&path).unwrap();
                (file.mode(), file.uid(), file.ctime_nsec())
            };
            let before = state();
            let files = support::files();
            let told = support::try_make(&files);
            let refused = format!("fstat(/dev/{name} is another file): ENODEV");
            assert_eq!(told, refused, "{kind:?} {number:?}");
            assert_eq!(state(), before, "it is left as it was");
            let ours = files.dir.to_str().unwrap();
            let mut mounts = mounts("thread-self").into_keys();
            assert!(!mounts.any(|path| path.starts_with(ours)));
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::rename(&real, &path).unwrap();
    }
    std::fs::remove_file(dev.join("null")).unwrap();
    let told = support::try_make(&support::files());
    assert_eq!(told, "open(/dev/null): ENOENT");
    node(&dev.join("null"), SFlag::S_IFCHR, (1, 3));
    assert_eq!(support::try_make(&support::files()), "made");
}

#[test]
fn no_mount_of_either_side_reaches_the_other() {
    // A host whose mounts all tell of each other, as systemd makes it; but not the one that we run on.
    apart();
    propagate("/", MsFlags::MS_SHARED);
    let watch = File::open("/proc/thread-self/mountinfo").unwrap();
    // proc_pid_mountinfo(5): whatever is mounted or unmounted here makes it an exceptional event.
    let changed = || {
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    };
    let files = support::files();
    let later = files.dir.join("run/later");
    std::fs::create_dir(&later).unwrap();
    assert!(!changed());
    let place = Place::make(files, &[], None);
    assert!(!changed(), "nothing was mounted here while it was made");
    mount_tmpfs(&later);
    assert!(changed(), "the control: a mount is an event");
    let all = inside(&place);
    assert!(all.contains_key("/bound") && !all.contains_key("/bound/later"));
    for (path, mount) in all {
        assert!(mount.propagation.is_empty(), "{path}: {mount:?}");
    }
    unmount(&later);
    drop(place);

    // As the host has them, its mounts would show here, and the root could not be left.
    assert!(changed());
    let mut files = support::files();
    files.without = vec!["--without=private-mounts"];
    assert_eq!(support::try_make(&files), "pivot_root(.): EINVAL");
    let root = files.launch.root.to_str().unwrap();
    let shown = mounts("thread-self");
    assert!(changed() && shown[root].kind == "overlay");
    // The layers as they are mapped, too: nothing may lie on what is to be removed.
    let left = shown.keys().map(Path::new).rev();
    left.filter(|path| path.starts_with(&files.dir))
        .for_each(unmount);
}

/// Session and controlling terminal of a process, proc_pid_stat(5); `None` once it is gone.
fn session(pid: i32) -> Option<(i32, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some((fields[3].parse().ok()?, fields[4].parse().ok()?))
}

#[test]
fn the_init_has_a_session_of_its_own_and_no_terminal() {
    // Made by somebody who has a terminal, and who stays when the launcher has ended.
    let pty = openpty(None, None).unwrap();
    let mut files = support::files();
    let at = files.dir.display().to_string();
    let leader = format!(
        "echo $$ > {at}/leader; {} \"$@\"; code=$?; exec 3>&- 4>&-; echo $code > {at}/code; read hangup",
        files.wshd.display()
    );
    let tty = nix::unistd::ttyname(&pty.slave).unwrap();
    let script = format!(
        "#!/bin/sh\nsetsid --ctty sh -c '{leader}' sh \"$@\" < {} &\nread code < {at}/code\nexit $code\n",
        tty.display()
    );
    nix::unistd::mkfifo(&files.dir.join("code"), Mode::S_IRWXU).unwrap();
    files.wshd = files.dir.join("launcher");
    std::fs::write(&files.wshd, script).unwrap();
    std::fs::set_permissions(&files.wshd, PermissionsExt::from_mode(0o755)).unwrap();
    let place = Place::make(files, &[], None);
    let leader = std::fs::read_to_string(place.dir.join("leader")).unwrap();
    let leader: i32 = leader.trim().parse().unwrap();
    let (of_leader, terminal) = session(leader).unwrap();
    assert!(of_leader == leader && terminal != 0, "the control");
    assert_eq!(session(place.pid), Some((place.pid, 0)));
    assert_eq!(place.run_inside("cut -d' ' -f6,7 /proc/1/stat"), "1 0\n");
    drop(pty);
    wait_until("the terminal is hung up", || {
        session(leader).is_none_or(|(_, terminal)| terminal == 0)
    });
    assert_eq!(place.run_inside("echo lives"), "lives\n");
}
