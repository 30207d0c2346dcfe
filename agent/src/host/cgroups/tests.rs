//! Against the real kernel, as root, on whatever hierarchies this host has.

use super::layout::{Layout, Place, Version};
use super::*;
use std::io::{BufRead, BufReader, Write};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// A parent of this test alone; everything below it is killed and removed at the end, also when the
/// test fails.
pub(crate) struct Parent {
    cgroups: Cgroups,
}

impl Parent {
    pub(crate) fn new() -> Self {
        Self {
            cgroups: Cgroups::open(&Self::fresh_name()).unwrap(),
        }
    }

    fn fresh_name() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!(
            "ostler-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// The directories of the parent itself.
    fn directories(&self) -> Vec<PathBuf> {
        let layout = &self.layout;
        layout
            .places()
            .iter()
            .map(|place| place.mount.join(&layout.parent))
            .collect()
    }
}

impl Deref for Parent {
    type Target = Cgroups;

    fn deref(&self) -> &Cgroups {
        &self.cgroups
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for handle in self.list().unwrap_or_default() {
            let group = self.group(&handle);
            if let Some(place) = &self.layout.freezer {
                // Not left to `kill`, which may be what failed.
                let _thawed = write(&group.directory(place).join("freezer.state"), "THAWED");
            }
            group.kill();
            let left = group
                .wait_empty(DEADLINE)
                .and_then(|()| group.remove(DEADLINE));
            if let Err(error) = left {
                eprintln!("left behind: {error}");
            }
        }
        self.remove_parent();
    }
}

/// A shell in a group, until dropped.
pub(crate) struct Inside {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Inside {
    /// Starts `script` in the group and returns once it has joined.
    pub(crate) fn start(group: &Group, script: &str) -> Self {
        let files = group.join_files().unwrap();
        let this = std::process::id();
        let mut join: Vec<String> = files
            .v1_tasks
            .iter()
            .map(|f| format!("/proc/{this}/fd/{}", f.as_raw_fd()))
            .collect();
        if let Some(directory) = &files.v2_dir {
            join.push(format!(
                "/proc/{this}/fd/{}/cgroup.procs",
                directory.as_raw_fd()
            ));
        }
        let script = format!(
            "for f in {}; do echo 0 > $f; done\necho in\n{script}",
            join.join(" ")
        );
        #[expect(clippy::disallowed_methods, reason = "a shell to put into a group")]
        let mut command = Command::new("/bin/sh");
        let mut child = command
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut inside = Self { child, lines };
        assert_eq!(inside.line(), "in");
        inside
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // Not waited for: it may be frozen, which its parent's guard ends.
        let _dead = self.child.kill();
    }
}

/// Eats memory until the kernel says no: 2, 4, 8 … MB of text.
pub(crate) const EAT: &str = "x=0123456789abcdef; while :; do x=$x$x; done";

/// A shell script that holds about 16 MB, says so, and waits for a line.
const HOLD_16_MB: &str = "x=0123456789abcdef; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 \
                          19 20; do x=$x$x; done; echo full; read y";

fn limits(memory_mib: u64, pids: u64) -> Limits {
    Limits {
        memory_bytes: Some(memory_mib * MIB),
        cpu_shares: Some(512),
        cpu_percent: None,
        pids: Some(pids),
    }
}

/// The kernel's own words for a group's limits: memory, memory with swap (v2: swap), weight, pids.
fn read_back(group: &Group) -> [String; 4] {
    let read = |place: &Place, v1: &str, v2: &str| {
        let file = if place.version == Version::V1 { v1 } else { v2 };
        let text = fs::read_to_string(group.directory(place).join(file));
        text.map_or_else(|_| "absent".to_owned(), |text| text.trim().to_owned())
    };
    let layout = &group.layout;
    [
        read(&layout.memory, "memory.limit_in_bytes", "memory.max"),
        read(
            &layout.memory,
            "memory.memsw.limit_in_bytes",
            "memory.swap.max",
        ),
        read(&layout.cpu, "cpu.shares", "cpu.weight"),
        read(&layout.pids, "pids.max", "pids.max"),
    ]
}

fn expected(
    group: &Group,
    memory_mib: u64,
    shares_and_weight: (u64, u64),
    pids: u64,
) -> [String; 4] {
    let bytes = (memory_mib * MIB).to_string();
    let swap = group
        .memory_dir()
        .join(limits::swap_file(group.layout.memory.version));
    let swap = match (swap.exists(), group.layout.memory.version) {
        (false, _) => "absent".to_owned(),
        (true, Version::V1) => bytes.clone(),
        (true, Version::V2) => "0".to_owned(),
    };
    let weight = match group.layout.cpu.version {
        Version::V1 => shares_and_weight.0,
        Version::V2 => shares_and_weight.1,
    };
    [bytes, swap, weight.to_string(), pids.to_string()]
}

/// In MiB, what may be in TCP's queues; `None` where the kernel has no such limit.
fn tcp_limit(group: &Group) -> Option<u64> {
    let file = group.memory_dir().join(limits::TCP_FILE);
    file.exists()
        .then(|| usage::read_number(&file).unwrap() / MIB)
}

#[test]
fn limits_are_written_and_change_in_both_directions() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 20)).unwrap();
    assert_eq!(read_back(&group), expected(&group, 64, (512, 59), 20));
    for mib in [128, 32, 256, 16] {
        group.limit(&limits(mib, 30)).unwrap();
        assert_eq!(read_back(&group), expected(&group, mib, (512, 59), 30));
        assert_eq!(tcp_limit(&group).unwrap_or(mib), mib);
    }
    assert_eq!(group.memory_limit(), Some(16 * MIB));

    group
        .limit(&Limits {
            cpu_shares: Some(1 << 40),
            ..Limits::default()
        })
        .unwrap();
    assert_eq!(
        read_back(&group),
        expected(&group, 16, (262_144, 10_000), 30),
        "others stay"
    );

    let unlimited = parent.create("two", &Limits::default()).unwrap();
    assert_eq!(unlimited.memory_limit(), None);
    println!("{}", parent.describe());
}

/// The kernel's own words for the cap on processor time.
fn cap(group: &Group) -> String {
    let place = &group.layout.cpu;
    let file = match place.version {
        Version::V1 => "cpu.cfs_quota_us",
        Version::V2 => "cpu.max",
    };
    let text = fs::read_to_string(group.directory(place).join(file)).unwrap();
    text.trim().trim_end_matches(" 100000").replace("max", "-1")
}

#[test]
fn processor_time_is_capped_and_the_cap_changes() {
    let capped = |percent| Limits {
        cpu_percent: Some(percent),
        ..limits(64, 20)
    };
    let parent = Parent::new();
    let group = parent.create("one", &capped(20)).unwrap();
    assert_eq!(cap(&group), "20000");
    let _busy = Inside::start(&group, "while :; do :; done");
    // A fifth of one processor; with no cap it would have had most of one. The kernel takes back later what
    // it gave too much of, which it does where its clock ticks seldom.
    let within = (0..5).any(|_| {
        let (began, before) = (Instant::now(), group.usage().unwrap().cpu_ns);
        while began.elapsed() < Duration::from_secs(1) {
            members::pause(Duration::from_millis(50));
        }
        let used = group.usage().unwrap().cpu_ns - before;
        let most = u64::try_from(began.elapsed().as_nanos()).unwrap() / 5 + 40_000_000;
        println!("used {used} ns of processor time, of {most}");
        used > 10_000_000 && used < most
    });
    assert!(within, "never within its cap");

    group.limit(&capped(150)).unwrap();
    assert_eq!(cap(&group), "150000");
    group.limit(&limits(64, 20)).unwrap();
    assert_eq!(cap(&group), "150000", "it stays");
    let wrong = Limits {
        pids: Some(5_000_000),
        ..capped(50)
    };
    group.limit(&wrong).unwrap_err();
    assert_eq!(cap(&group), "150000", "all or none");
    group.limit(&capped(u64::MAX)).unwrap();
    assert_eq!(cap(&group), "-1");
}

/// As with a kernel without `CONFIG_CFS_BANDWIDTH`: a cap that cannot be is refused and not forgotten.
#[test]
fn where_no_group_has_a_quota_nobody_is_capped() {
    let parent = Parent::new();
    // It was not made, so it has no file.
    let group = Group {
        layout: Arc::clone(&parent.layout),
        handle: "nobody".into(),
    };
    let capped = |percent| Limits {
        cpu_percent: Some(percent),
        ..Limits::default()
    };
    let refused = group.apply(&capped(50));
    assert!(matches!(refused, Err(CgroupError::NoCpuCap)), "{refused:?}");
    group.apply(&capped(u64::MAX)).unwrap();
    group.apply(&Limits::default()).unwrap();
}

#[test]
fn a_memory_limit_that_does_not_fit_changes_nothing_and_kills_nobody() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(128, 20)).unwrap();
    let mut holder = Inside::start(&group, HOLD_16_MB);
    assert_eq!(holder.line(), "full");
    let refused = group.limit(&limits(8, 25)).unwrap_err();
    let CgroupError::MemoryInUse {
        limit,
        usage,
        smallest,
    } = refused
    else {
        panic!("{refused}")
    };
    assert_eq!(limit, 8 * MIB);
    assert!(usage > 16 * MIB && usage < 100 * MIB, "{usage}");
    assert_eq!(
        read_back(&group),
        expected(&group, 128, (512, 59), 20),
        "pids were put back too"
    );
    assert_eq!(group.oom_kills().unwrap(), 0);

    assert!(
        (usage + MIB..=usage + 2 * MIB).contains(&smallest),
        "{usage}, {smallest}"
    );
    group.limit(&limits(smallest / MIB, 25)).unwrap();
    assert_eq!(
        read_back(&group),
        expected(&group, smallest / MIB, (512, 59), 25),
        "what it was told is applied"
    );
    assert_eq!(group.oom_kills().unwrap(), 0);
    holder.tell("go on");
    assert!(holder.wait().success(), "it was not disturbed");
}

/// Fills the queues of TCP connections to itself with 30 MB or so, says so, and waits for a line.
const QUEUE_30_MB: &str = r#"exec perl -MIO::Socket::INET -e '
  $| = 1;
  my ($bytes, @all) = (0);
  my $server = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") or die;
  while ($bytes < 30 << 20) {
    my $one = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $server->sockport) or die;
    push @all, $one, scalar $server->accept;
    $one->blocking(0);
    while (my $more = syswrite $one, "x" x 65536) { $bytes += $more }
  }
  print "full\n"; <STDIN>;'"#;

/// v1 counts them apart from memory; v2 as memory, which is tried above.
#[test]
fn what_waits_in_tcp_queues_is_in_use() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 20)).unwrap();
    if tcp_limit(&group).is_none() {
        return;
    }
    let mut holder = Inside::start(&group, QUEUE_30_MB);
    assert_eq!(holder.line(), "full");
    let refused = group.limit(&limits(24, 25)).unwrap_err();
    let CgroupError::MemoryInUse {
        usage, smallest, ..
    } = refused
    else {
        panic!("{refused}")
    };
    assert!((24 * MIB..64 * MIB).contains(&usage), "{usage}");
    assert_eq!(read_back(&group), expected(&group, 64, (512, 59), 20));
    assert_eq!(tcp_limit(&group), Some(64));
    let smallest = smallest / MIB;
    group.limit(&limits(smallest, 20)).unwrap();
    assert_eq!(tcp_limit(&group), Some(smallest));
    holder.tell("go on");
    assert!(holder.wait().success());
}

#[test]
fn page_cache_gives_way_to_a_lower_limit() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(128, 20)).unwrap();
    let file = std::env::temp_dir().join(format!("ostler-cache-{}", std::process::id()));
    let path = file.display();
    // Written and synced: clean page cache, charged to the group. tmpfs would not do (it is not cache).
    let script = format!(
        "dd if=/dev/zero of={path} bs=1048576 count=40 conv=fsync 2>/dev/null; echo full; read y"
    );
    let mut holder = Inside::start(&group, &script);
    assert_eq!(holder.line(), "full");
    let full = group.usage().unwrap();
    let outcome = group.limit(&limits(24, 20));
    fs::remove_file(&file).unwrap();
    outcome.unwrap();
    assert_eq!(group.memory_limit(), Some(24 * MIB));
    assert!(
        full.memory_bytes < 40 * MIB && full.charged_bytes > full.memory_bytes,
        "unused cache is no working set: {full:?}"
    );
    assert_eq!(group.oom_kills().unwrap(), 0);
    assert_eq!(group.pids(), [holder.pid()]);
}

#[test]
fn what_was_used_under_a_larger_limit_says_nothing_of_the_smaller_one() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(128, 20)).unwrap();
    let file = std::env::temp_dir().join(format!("ostler-peak-{}", std::process::id()));
    let path = file.display();
    let script = format!(
        "dd if=/dev/zero of={path} bs=1048576 count=100 2>/dev/null; rm {path}; echo gone; read y"
    );
    let mut holder = Inside::start(&group, &script);
    assert_eq!(holder.line(), "gone");
    assert!(group.memory_peak().unwrap() > 90 * MIB);
    group.limit(&limits(64, 20)).unwrap();
    assert!(!group.memory_ran_out());
    group.limit(&limits(96, 20)).unwrap();
    assert!(!group.memory_ran_out());
}

/// v1 alone would reclaim for as long as there is something to reclaim.
#[test]
fn a_limit_below_a_stream_of_page_cache_is_set_or_refused_in_time() {
    let parent = Parent::new();
    let limits = |memory: u64| Limits {
        memory_bytes: Some(memory * MIB),
        ..Limits::default()
    };
    let group = parent.create("one", &limits(200)).unwrap();
    // Beside whatever else the machine does.
    let ours = group.directory(&group.layout.cpu);
    let _v1 = fs::write(ours.parent().unwrap().join("cpu.shares"), "8192");
    // Gone with this descriptor, however the test ends.
    let file = std::env::temp_dir().join(format!("ostler-stream-{}", std::process::id()));
    let hole = File::create_new(&file).unwrap();
    fs::remove_file(&file).unwrap();
    hole.set_len(4 << 30).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), hole.as_raw_fd());
    let script = format!(
        "for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24; do \
         while :; do dd if={path} of=/dev/null bs=512K 2>/dev/null; done & done; sleep 2; echo up; wait"
    );
    let mut readers = Inside::start(&group, &script);
    assert_eq!(readers.line(), "up");
    let began = Instant::now();
    let outcome = group.limit(&limits(32));
    println!("{outcome:?} after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(40));
    let limit = match outcome {
        Ok(()) => 32 * MIB,
        Err(CgroupError::MemoryInUse { .. }) => 200 * MIB,
        Err(other) => panic!("{other}"),
    };
    assert_eq!(group.memory_limit(), Some(limit), "all or none");
    group.kill();
}

#[test]
fn the_pids_limit_binds() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 4)).unwrap();
    // A shell that cannot fork gives up or goes on, depending on the shell; either way four remain.
    let _shell = Inside::start(
        &group,
        "for i in 1 2 3 4 5 6 7 8; do sleep 60 & done; echo all; wait",
    );
    let events = group.directory(&group.layout.pids).join("pids.events");
    let end = Instant::now() + DEADLINE;
    while usage::read_key(&events, "max").unwrap() == 0 {
        assert!(Instant::now() < end, "no fork was refused");
        members::pause(Duration::from_millis(1));
    }
    assert!(group.usage().unwrap().pids <= 4);
}

#[test]
fn what_a_container_does_is_its_usage() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(128, 20)).unwrap();
    let before = group.usage().unwrap();
    assert_eq!((before.cpu_ns, before.pids), (0, 0));
    let mut holder = Inside::start(&group, HOLD_16_MB);
    assert_eq!(holder.line(), "full");
    let usage = group.usage().unwrap();
    assert!(
        (16 * MIB..100 * MIB).contains(&usage.memory_bytes),
        "{usage:?}"
    );
    assert!(
        (1_000_000..60_000_000_000).contains(&usage.cpu_ns),
        "{usage:?}"
    );
    assert_eq!(usage.pids, 1);
    assert_eq!(group.pids(), [holder.pid()]);
    assert!(group.memory_peak().unwrap() >= usage.memory_bytes);
    holder.tell("go on");
    holder.wait();
    group.wait_empty(DEADLINE).unwrap();
    assert!(group.is_empty());
    assert_eq!(group.usage().unwrap().pids, 0);
}

#[test]
fn the_calling_thread_joins_v1_groups_by_writing_0() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 20)).unwrap();
    let files = group.join_files().unwrap();
    for file in files.v1_tasks.iter().chain(&files.v2_dir) {
        let flags = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC);
    }
    assert_eq!(
        files.v1_tasks.len() + files.v2_dir.iter().count(),
        parent.directories().len()
    );
    let memory = fs::canonicalize(group.memory_dir().join("tasks"));
    let Ok(tasks) = memory else { return }; // a v2 host: nothing to join by thread
    let thread = std::thread::spawn(move || {
        for file in files.v1_tasks {
            File::from(file).write_all(b"0").unwrap();
        }
        let tid = nix::unistd::gettid().to_string();
        assert!(
            fs::read_to_string(tasks)
                .unwrap()
                .lines()
                .any(|line| line == tid)
        );
        assert!(File::open("/dev/null").is_ok() && File::open("/dev/urandom").is_ok());
        let kmsg = File::open("/dev/kmsg").unwrap_err();
        assert_eq!(
            kmsg.kind(),
            io::ErrorKind::PermissionDenied,
            "not among the devices"
        );
    });
    thread.join().unwrap();
}

#[test]
fn a_fork_storm_is_killed() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(512, 1000)).unwrap();
    // 63 shells, each forking all the time. Not against the limit: a shell that cannot fork gives up.
    let mut storm = Inside::start(
        &group,
        "f() { if [ $1 -gt 0 ]; then f $(($1 - 1)) & f $(($1 - 1)) & fi; while :; do /bin/true; done; }; f 5",
    );
    let end = Instant::now() + DEADLINE;
    while group.usage().unwrap().pids < 63 {
        assert!(Instant::now() < end, "no storm");
        members::pause(Duration::from_millis(1));
    }
    let busy = group.wait_empty(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(busy, CgroupError::Busy { .. }), "{busy}");
    let busy = group.remove(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(busy, CgroupError::Busy { .. }), "{busy}");
    group.kill();
    group.wait_empty(DEADLINE).unwrap();
    storm.wait();
    assert_eq!(read_back(&group)[3], "1000", "the limit is as before");
    group.remove(DEADLINE).unwrap();
    assert_eq!(parent.list().unwrap(), [""; 0]);
}

#[test]
fn a_frozen_group_is_killed() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 20)).unwrap();
    let mut shell = Inside::start(&group, "sleep 60 & sleep 60 & echo up; wait");
    assert_eq!(shell.line(), "up");
    match &group.layout.freezer {
        Some(place) => {
            let state = group.directory(place).join("freezer.state");
            write(&state, "FROZEN").unwrap();
            while fs::read_to_string(&state).unwrap().trim() != "FROZEN" {
                members::pause(Duration::from_millis(1));
            }
        }
        None => write(&group.memory_dir().join("cgroup.freeze"), "1").unwrap(),
    }
    group.kill();
    group.wait_empty(DEADLINE).unwrap();
    shell.wait();
    group.remove(DEADLINE).unwrap();
}

#[test]
fn removing_twice_is_as_good_and_a_removed_group_is_empty() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 20)).unwrap();
    parent.create("another", &Limits::default()).unwrap();
    assert_eq!(parent.list().unwrap(), ["another", "one"]);
    group.remove(DEADLINE).unwrap();
    group.remove(DEADLINE).unwrap();
    assert_eq!(parent.list().unwrap(), ["another"]);
    group.kill();
    group.wait_empty(DEADLINE).unwrap();
    assert!(group.is_empty());
    assert!(group.oom_kills().is_err(), "gone is not zero");
    assert!(group.usage().is_err() && group.limit(&limits(64, 20)).is_err());
    assert!(group.join_files().is_err());
    assert_eq!((group.memory_limit(), group.memory_peak()), (None, None));

    parent.remove_parent();
    assert_eq!(parent.list().unwrap(), ["another"], "a parent in use stays");
    parent.group("another").remove(DEADLINE).unwrap();
    parent.remove_parent();
    assert!(
        parent
            .directories()
            .iter()
            .all(|directory| !directory.exists())
    );
    assert_eq!(parent.list().unwrap(), [""; 0]);
    parent.create("one", &limits(64, 20)).unwrap();
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    let parent = Parent::new();
    let impossible = limits(64, 5_000_000);
    let refused = parent.create("one", &impossible).unwrap_err();
    assert!(matches!(refused, CgroupError::Refused { .. }), "{refused}");
    assert_eq!(
        refused.to_string(),
        format!(
            "cannot limit processes to 5000000 in '{}'",
            parent.group("one").directory(&parent.layout.pids).display()
        )
    );
    assert_eq!(parent.list().unwrap(), [""; 0]);

    let directories = parent.directories();
    let foreign = directories.last().unwrap().join("one");
    fs::create_dir(&foreign).unwrap();
    let taken = parent.create("one", &limits(64, 20)).unwrap_err();
    assert!(
        matches!(&taken, CgroupError::Taken(path) if *path == foreign),
        "{taken}"
    );
    let left: Vec<_> = directories
        .iter()
        .filter(|path| path.join("one").exists())
        .collect();
    assert_eq!(
        left,
        [directories.last().unwrap()],
        "only what was there before"
    );
}

#[test]
fn a_limit_that_fails_changes_nothing() {
    let parent = Parent::new();
    let group = parent.create("one", &limits(64, 20)).unwrap();
    let wrong = Limits {
        cpu_shares: Some(1024),
        ..limits(32, 5_000_000)
    };
    assert!(matches!(
        group.limit(&wrong),
        Err(CgroupError::Refused { .. })
    ));
    assert_eq!(read_back(&group), expected(&group, 64, (512, 59), 20));
}

#[test]
fn names_are_plain() {
    for name in ["", "/", "..", "a/../b", "a//b", "a b", "a\n", "ä"] {
        assert!(
            matches!(Cgroups::open(name), Err(CgroupError::BadName(_))),
            "{name:?}"
        );
    }
    let parent = Parent::new();
    for name in ["", ".", "..", "a/b", "../x", "a/", "a\0"] {
        let refused = parent.create(name, &Limits::default());
        assert!(matches!(refused, Err(CgroupError::BadName(_))), "{name:?}");
    }
    let nested = format!("/{}/a.b", Parent::fresh_name());
    let nested = Parent {
        cgroups: Cgroups::open(&nested).unwrap(),
    };
    let group = nested.create("one", &limits(64, 20)).unwrap();
    assert_eq!(read_back(&group), expected(&group, 64, (512, 59), 20));
    let outer: Vec<PathBuf> = nested
        .directories()
        .iter()
        .map(|path| path.parent().unwrap().to_owned())
        .collect();
    drop(nested);
    assert!(
        outer.iter().all(|directory| !directory.exists()),
        "the whole path is removed"
    );
}

/// v2 where this host has it only without controllers: joining, killing, waiting.
#[test]
fn a_v2_group_beside_v1_is_joined_killed_and_waited_for() {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let unified = mountinfo
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .unwrap();
    let mount = PathBuf::from(unified.split(' ').nth(4).unwrap());
    let ours = Parent::new();
    let place = Place {
        version: Version::V2,
        mount,
    };
    let layout = Layout {
        parent: ours.layout.parent.clone(),
        memory: ours.layout.memory.clone(),
        cpu: ours.layout.cpu.clone(),
        pids: ours.layout.pids.clone(),
        cpuacct: None,
        devices: place.clone(),
        freezer: None,
        unified: Some(place.clone()),
    };
    let parent = Parent {
        cgroups: Cgroups {
            devices: Confinement::open(&layout).unwrap(),
            layout: Arc::new(layout),
        },
    };
    let group = parent.create("one", &Limits::default()).unwrap();
    let mut shell = Inside::start(&group, "sleep 60 & sleep 60 & echo up; wait");
    assert_eq!(shell.line(), "up");
    assert_eq!(group.usage().unwrap().pids, 3);
    assert!(
        group.usage().unwrap().cpu_ns > 0,
        "counted without a controller"
    );
    write(&group.directory(&place).join("cgroup.freeze"), "1").unwrap();
    assert!(matches!(
        group.wait_empty(Duration::from_millis(20)),
        Err(CgroupError::Busy { .. })
    ));
    let waiter = {
        let group = group.clone();
        std::thread::spawn(move || group.wait_empty(DEADLINE))
    };
    group.kill();
    waiter.join().unwrap().unwrap();
    shell.wait();
    group.remove(DEADLINE).unwrap();
}

/// What a root shell in the group says of making and opening this character device, and of opening null (1:3).
fn devices_in(group: &Group, (major, minor): (u64, u64)) -> [String; 3] {
    let node = std::env::temp_dir().join(format!(
        "ostler-node-{}-{}",
        group.handle,
        std::process::id()
    ));
    let node = node.display();
    // The node that it opens is there already, as one of a hostile root file system would be.
    let script = format!(
        "mknod {node}2 c {major} {minor} 2>/dev/null && echo made || echo not made; rm -f {node}2; \
         LC_ALL=C head -c 0 {node} 2>&1 | grep -q 'not permitted' && echo shut || echo open; \
         echo x 2>/dev/null >/dev/null && echo open || echo shut"
    );
    let made = nix::sys::stat::mknod(
        node.to_string().as_str(),
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::S_IRUSR,
        nix::sys::stat::makedev(major, minor),
    );
    made.unwrap();
    let mut shell = Inside::start(group, &script);
    let said = [(); 3].map(|()| shell.line());
    fs::remove_file(node.to_string()).unwrap();
    assert!(shell.wait().success());
    said
}

/// v2 where this host has it, whatever confines devices on it otherwise: so this is a v2 host, or a
/// hybrid one without v1's files.
fn with_filter(ours: &Parent) -> Parent {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let without_v1 = mountinfo.replace(",devices", ",misc");
    let controllers = |mount: &Path| fs::read_to_string(mount.join("cgroup.controllers")).unwrap();
    let layout = Layout::decide(&ours.layout.parent, &without_v1, controllers).unwrap();
    assert_eq!(layout.devices.version, Version::V2);
    let cgroups = Cgroups {
        devices: Confinement::open(&layout).unwrap(),
        layout: Arc::new(layout),
    };
    Parent { cgroups }
}

#[test]
fn a_container_has_its_devices_and_no_other() {
    let own = Parent::new();
    let filtered = with_filter(&own);
    let confined = [
        own.create("as-this-host-does", &limits(64, 20)).unwrap(),
        filtered.create("by-filter", &limits(64, 20)).unwrap(),
    ];
    // The machine's memory, the kernel's log, the console, tun, fuse.
    let others = [(1, 1), (1, 11), (5, 1), (10, 200), (10, 229)];
    for (group, device) in confined
        .iter()
        .flat_map(|group| others.map(|one| (group, one)))
    {
        let said = devices_in(group, device);
        assert_eq!(said, ["not made", "shut", "open"], "{device:?}");
    }
    let place = &own.layout.devices;
    if place.version == Version::V1 {
        let list = confined[0].directory(place).join("devices.list");
        let list = fs::read_to_string(list).unwrap();
        let numbers = ["1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:2", "136:*"];
        let expected = numbers.map(|number| format!("c {number} rw"));
        assert_eq!(list.lines().collect::<Vec<_>>(), expected);
    }
    // The control: the same groups without it.
    let free = filtered.group("free");
    for (_, directory) in free.directories() {
        fs::create_dir(directory).unwrap();
    }
    // A kernel that is locked down keeps its memory from everybody.
    for device in others.into_iter().skip(1) {
        let said = devices_in(&free, device);
        assert_eq!(said, ["made", "open", "open"], "{device:?}");
    }
}

#[test]
fn a_container_that_cannot_be_confined_is_not_made() {
    let own = Parent::new();
    let mut filtered = with_filter(&own);
    // No such program: a directory is none.
    let directory = File::open("/").unwrap();
    filtered.cgroups.devices = Confinement::Filter(Arc::new(directory.into()));
    let refused = filtered.create("one", &limits(64, 20)).unwrap_err();
    assert!(
        refused.to_string().starts_with("cannot confine devices in"),
        "{refused}"
    );
    assert_eq!(filtered.list().unwrap(), [""; 0]);
}

/// Only a v2 host can show it: v1 and a hierarchy without controllers have nothing to hand on.
#[test]
fn a_parent_below_a_group_with_processes_is_refused() {
    let outer = Parent::new();
    let Some(place) = &outer.layout.unified else {
        return;
    };
    let busy = outer.create("busy", &Limits::default()).unwrap();
    let _shell = Inside::start(&busy, "read y");
    let name = format!("{}/busy/inner", outer.layout.parent.display());
    let refused = Cgroups::open(&name).unwrap_err();
    for (_, directory) in busy.directories() {
        assert!(!directory.join("inner").exists(), "what was begun is gone");
    }
    assert!(
        matches!(&refused, CgroupError::Occupied(group) if *group == busy.directory(place)),
        "{refused}"
    );
}

/// A v2 host in plain files, removed at the end.
struct Fake {
    root: PathBuf,
    cgroups: Cgroups,
}

impl Fake {
    fn new() -> Self {
        let root = std::env::temp_dir().join(format!("ostler-v2-{}", std::process::id()));
        let mountinfo = format!("1 0 0:1 / {} rw - cgroup2 none rw", root.display());
        let layout = Layout::decide(Path::new("ostler"), &mountinfo, |_| {
            "cpu memory pids".into()
        });
        let fake = Self {
            root,
            cgroups: Cgroups {
                layout: Arc::new(layout.unwrap()),
                devices: Confinement::Files,
            },
        };
        let group = fake.root.join("ostler/one");
        fs::create_dir_all(&group).unwrap();
        let files = [
            ("memory.current", "41943040\n"),
            (
                "memory.stat",
                "anon 1\ninactive_file_x 7\ninactive_file 10485760\nactive_file 3\n",
            ),
            (
                "memory.events",
                "low 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n",
            ),
            ("memory.peak", "52428800\n"),
            ("memory.max", "max\n"),
            ("memory.swap.max", "max\n"),
            ("cpu.stat", "usage_usec 1234\nuser_usec 1000\n"),
            ("pids.current", "3\n"),
        ];
        for (file, text) in files {
            fs::write(group.join(file), text).unwrap();
        }
        fake
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.root);
    }
}

/// Which values end up in which files.
#[test]
fn v2_limits_and_usage_are_in_these_files() {
    let fake = Fake::new();
    assert_eq!(
        fake.cgroups.describe(),
        "memory v2, cpu v2, pids v2, devices v2, freezer v2, swap not limited (no swap accounting)"
    );
    let one = fake.cgroups.group("one");
    let usage = Usage {
        memory_bytes: 30 * MIB,
        charged_bytes: 40 * MIB,
        cpu_ns: 1_234_000,
        pids: 3,
    };
    assert_eq!(one.usage().unwrap(), usage);
    assert_eq!((one.oom_kills().unwrap(), one.memory_limit()), (2, None));
    assert_eq!(one.memory_peak(), Some(50 * MIB));
    one.limit(&Limits {
        cpu_shares: Some(1024),
        ..limits(64, 50)
    })
    .unwrap();
    assert_eq!(
        read_back(&one),
        [
            (64 * MIB).to_string(),
            "0".into(),
            "100".into(),
            "50".into()
        ]
    );

    let refused = one.limit(&limits(32, 60)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "a limit of 33554432 bytes does not fit: 41943040 bytes of memory are in use, the smallest limit \
         that is safe has 42991616"
    );
    assert_eq!(
        read_back(&one),
        [
            (64 * MIB).to_string(),
            "0".into(),
            "100".into(),
            "50".into()
        ]
    );
}

#[test]
fn messages_say_what_to_do() {
    let occupied = CgroupError::Occupied("/sys/fs/cgroup".into());
    assert_eq!(
        occupied.to_string(),
        "'/sys/fs/cgroup' has processes of its own, so its children cannot have controllers: move them \
         into a group of their own, such as '/sys/fs/cgroup/init', before the agent starts"
    );
    let busy = CgroupError::Busy {
        group: "/c/ostler/h".into(),
        waited: Duration::from_secs(5),
    };
    assert_eq!(
        busy.to_string(),
        "control group '/c/ostler/h' still has processes after 5s"
    );
    let taken = CgroupError::Taken("/c/ostler/h".into());
    assert_eq!(
        taken.to_string(),
        "control group '/c/ostler/h' exists already: its handle is in use"
    );
}
