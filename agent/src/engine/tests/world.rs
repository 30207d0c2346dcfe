//! A place for one test: a network namespace, a base directory and a control group of its own, and the
//! means to look whether anything was left there.

use crate::engine::{
    Bandwidth, Container, DiskLimit, DiskWay, Engine, EngineConfig, EngineError, Followed, Limits,
    NetworkConfig, Spec,
};
use crate::host::cgroups::Cgroups;
use container::frames::Frame;
use container::job::JobRequest;
use container::spool::{Record, Stream};
use container::status::Status;
use container::sys::pidfd;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// For anything that a test waits for.
pub(super) fn patience() -> Duration {
    let seconds = std::env::var("OSTLER_PATIENCE").map_or(30, |seconds| seconds.parse().unwrap());
    Duration::from_secs(seconds)
}

/// For everything that a test waits for.
pub(super) fn deadline() -> Duration {
    2 * patience()
}

pub(super) struct World {
    pub(super) base: PathBuf,
    pub(super) stack: PathBuf,
    /// A host directory that containers see as `/shared`.
    pub(super) shared: PathBuf,
    /// The name of the test's container: never used before, as the kernel's log outlives the test.
    pub(super) handle: String,
    pub(super) parent: String,
}

/// Runs a test in a world of its own; what it leaves is removed, however it ends.
pub(super) fn world<F: Future<Output = ()>>(test: impl FnOnce(World) -> F + Send + 'static) {
    world_within(deadline(), test);
}

/// The same with another deadline.
pub(super) fn world_within<F: Future<Output = ()>>(
    deadline: Duration,
    test: impl FnOnce(World) -> F + Send + 'static,
) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        run(&["ip", "link", "set", "lo", "up"]);
        let world = World::new();
        // Dropped after the runtime, which waits for what still removes something.
        let _cleanup = Cleanup {
            base: world.base.clone(),
            parent: world.parent.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (home, handle) = (world.base.display().to_string(), world.handle.clone());
        runtime.block_on(async {
            let ended = timeout(deadline, test(world)).await;
            let running = || [processes(&home), processes(&handle)].concat();
            assert!(ended.is_ok(), "not done in time; running: {:#?}", running());
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests look at the machine with its own tools"
)]
pub(super) fn run(command: &[&str]) -> String {
    let output = std::process::Command::new(command[0])
        .args(&command[1..])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The directory with the helpers that `cargo helpers` built.
fn helpers() -> PathBuf {
    let named = std::env::var_os("HELPERS").map(PathBuf::from);
    let built = || {
        let target = std::env::current_exe()
            .unwrap()
            .ancestors()
            .nth(3)
            .unwrap()
            .to_owned();
        target.join("x86_64-unknown-linux-gnu/helpers")
    };
    let path = named.unwrap_or_else(built);
    assert!(
        path.join("wshd").exists(),
        "run `cargo helpers` first: nothing in {}",
        path.display()
    );
    path
}

impl World {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "ost-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let home = Path::new("/tmp").join(&name);
        let world = Self {
            base: home.join("base"),
            stack: home.join("stack"),
            shared: home.join("shared"),
            handle: fresh_handle(),
            parent: format!("{name}/containers"),
        };
        for path in [&world.base, &world.stack, &world.shared] {
            fs::create_dir_all(path).unwrap();
        }
        // Owners of a bind mount are not mapped: only a mode can let a container write.
        fs::set_permissions(&world.shared, PermissionsExt::from_mode(0o777)).unwrap();
        make_stack(&world.stack);
        world
    }

    pub(super) fn config(&self) -> EngineConfig {
        EngineConfig {
            base: self.base.clone(),
            helpers: helpers(),
            cgroup_parent: self.parent.clone(),
            network: NetworkConfig::default(),
            spool_bytes: 4 << 20,
            jobs: 3,
            disk: DiskWay::Auto,
        }
    }

    pub(super) async fn engine(&self) -> Engine {
        Engine::open(self.config()).await.unwrap()
    }

    pub(super) fn spec(&self, handle: &str) -> Spec {
        Spec {
            handle: handle.to_owned(),
            stack: self.stack.clone(),
            layers: Vec::new(),
            hostname: "app".to_owned(),
            limits: Limits {
                memory_bytes: Some(64 << 20),
                cpu_shares: None,
                cpu_percent: None,
                pids: Some(100),
            },
            disk: DiskLimit {
                bytes: 16 << 20,
                inodes: 1000,
            },
            tmpfs_bytes: 1 << 20,
            files: Vec::new(),
            dns: vec!["9.9.9.9".parse().unwrap()],
            binds: vec![container::launch::Bind {
                source: self.shared.clone(),
                target: "/shared".into(),
                access: container::launch::Access::ReadWrite,
            }],
            egress: Vec::new(),
            bandwidth: Bandwidth::default(),
        }
    }

    /// Fails unless nothing of a container is left on the machine. The kernel takes links away in its
    /// own time, so it is asked until the deadline.
    pub(super) async fn nothing_left(&self, handle: &str) {
        let began = Instant::now();
        loop {
            let left = self.left(handle);
            if left.is_empty() {
                return;
            }
            assert!(began.elapsed() < patience(), "left: {left:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(super) fn left(&self, handle: &str) -> Vec<String> {
        let mut left = Vec::new();
        let contains =
            |path: &str, what: &str| fs::read_to_string(path).unwrap_or_default().contains(what);
        if Cgroups::open(&self.parent)
            .unwrap()
            .list()
            .unwrap()
            .contains(&handle.to_owned())
        {
            left.push("control group".to_owned());
        }
        let directory = self.base.join("containers").join(handle);
        let trash = fs::read_dir(self.base.join("trash")).into_iter().flatten();
        let paths = trash.flatten().map(|entry| entry.path());
        left.extend(
            paths
                .chain([directory])
                .filter(|path| path.exists())
                .map(|path| path.display().to_string()),
        );
        // This thread's own namespace: that of the test.
        if contains("/proc/thread-self/net/dev", &format!("os-{handle}")) {
            left.push("link".to_owned());
        }
        if contains("/proc/self/mountinfo", &self.base.display().to_string()) {
            left.push("mount".to_owned());
        }
        if run(&["nft", "list", "ruleset"]).contains(handle) {
            left.push("set elements".to_owned());
        }
        left.extend(
            processes(handle)
                .into_iter()
                .map(|(pid, title)| format!("{pid} {title}")),
        );
        left.extend(loop_devices(&self.base.join("containers").join(handle)));
        left
    }
}

/// Loop devices on files below `directory`.
fn loop_devices(directory: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let files = devices.map(|device| device.path().join("loop/backing_file"));
    files
        .filter_map(|file| fs::read_to_string(file).ok())
        .filter(|file| Path::new(file).starts_with(directory))
        .collect()
}

/// Removes what a test has left when it ends, however it ends.
struct Cleanup {
    base: PathBuf,
    parent: String,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Ok(cgroups) = Cgroups::open(&self.parent) {
            for handle in cgroups.list().unwrap_or_default() {
                let group = cgroups.group(&handle);
                group.kill();
                let _ = group.wait_empty(Duration::from_secs(5));
                let _ = group.remove(Duration::from_secs(5));
            }
            cgroups.remove_parent();
        }
        let home = self.base.parent().unwrap();
        for (pid, _) in processes(&home.display().to_string()) {
            let _ = pidfd::open(pid).and_then(|fd| pidfd::send_signal(fd, 9));
        }
        // A depot of its own is still mounted where a test failed.
        let _ = umount2(&self.base, MntFlags::MNT_DETACH);
        let removed = fs::remove_dir_all(home);
        // A second panic would hide the first one.
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// A container in a place of its own.
pub(super) async fn create(engine: &Engine, spec: Spec) -> Result<Container, EngineError> {
    engine.create(spec, engine.reserve()?).await
}

/// Eleven digits from the time and a counter.
pub(super) fn fresh_handle() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let micros = std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() & 0xff_ffff_ffff;
    format!(
        "{micros:010x}{:x}",
        NEXT.fetch_add(1, Ordering::Relaxed) % 16
    )
}

fn make_stack(stack: &Path) {
    for directory in [
        "bin",
        "etc",
        "home/vcap",
        "root",
        "proc",
        "sys",
        "dev",
        "tmp",
        "shared",
        "usr/bin",
    ] {
        fs::create_dir_all(stack.join(directory)).unwrap();
    }
    chown(stack.join("home/vcap"), Some(1000), Some(1000)).unwrap();
    fs::copy("/bin/busybox", stack.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "dd", "echo", "env", "hostname", "id", "ip", "ls", "sleep", "stat", "tail",
        "touch",
    ] {
        symlink("busybox", stack.join("bin").join(applet)).unwrap();
    }
    let users = "root:x:0:0::/root:/bin/sh\nvcap:x:1000:1000::/home/vcap:/bin/sh\n";
    fs::write(stack.join("etc/passwd"), users).unwrap();
    fs::write(stack.join("etc/group"), "root:x:0:\nvcap:x:1000:\n").unwrap();
}

/// Processes of the host whose title contains this; not the test itself.
pub(super) fn processes(what: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let title = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let title = String::from_utf8_lossy(&title).replace('\0', " ");
        if title.contains(what) && pid.unsigned_abs() != std::process::id() {
            found.push((pid, title));
        }
    }
    found
}

/// Kills the one process whose title contains both; false while there is none, or a copy of it that
/// becomes another one.
#[must_use]
pub(super) fn kill(program: &str, job: &Path) -> bool {
    let job = job.display().to_string();
    let victims: Vec<i32> = processes(&job)
        .into_iter()
        .filter(|(_, title)| {
            title
                .split(' ')
                .next()
                .is_some_and(|path| path.ends_with(program))
        })
        .map(|(pid, _)| pid)
        .collect();
    let [victim] = victims[..] else {
        return false;
    };
    pidfd::open(victim)
        .and_then(|victim| pidfd::send_signal(victim, 9))
        .is_ok()
}

/// The same, as soon as there is one.
pub(super) async fn killed(program: &str, job: &Path) {
    while !kill(program, job) {
        sleep(Duration::from_millis(5)).await;
    }
}

pub(super) fn shell(script: &str) -> JobRequest {
    let argv = ["/bin/sh", "-c", script]
        .map(|arg| arg.as_bytes().to_vec())
        .to_vec();
    JobRequest {
        argv,
        ..JobRequest::default()
    }
}

pub(super) async fn frame(records: &mut mpsc::Receiver<Followed>) -> Option<Frame> {
    match records.recv().await? {
        Followed::Frame(frame) => Some(frame),
        Followed::Lost(reason) => panic!("lost: {reason}"),
    }
}

/// What a job said, whole.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    /// Bytes in gaps.
    pub(super) missing: u64,
    pub(super) started: bool,
    pub(super) status: Option<Status>,
    pub(super) ended: bool,
}

impl Told {
    /// Checks that every offset follows from what came before.
    pub(super) fn take(&mut self, record: Record) {
        assert!(!self.ended, "nothing follows the end");
        match record {
            Record::Started => self.started = true,
            Record::Output {
                stream,
                offset,
                bytes,
                ..
            } => {
                let own = match stream {
                    Stream::Stdout => &mut self.stdout,
                    Stream::Stderr => &mut self.stderr,
                };
                if self.missing == 0 {
                    assert_eq!(offset, own.len() as u64, "no repeat and no hole");
                }
                own.extend(bytes);
            }
            Record::Gap { bytes, .. } => self.missing += bytes,
            Record::Exit { status, .. } => self.status = Some(status),
            Record::End { stdout, stderr } => {
                let told = (self.stdout.len() + self.stderr.len()) as u64;
                assert_eq!(stdout + stderr, told + self.missing);
                self.ended = true;
            }
        }
    }

    pub(super) async fn rest(mut self, records: &mut mpsc::Receiver<Followed>) -> Self {
        while let Some(frame) = frame(records).await {
            self.take(frame.record);
        }
        self
    }

    pub(super) fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// Runs a job to its end.
pub(super) async fn job(container: &Container, number: u32, script: &str) -> Told {
    container
        .spawn(number, "vcap", shell(script))
        .await
        .unwrap();
    let mut records = container.follow(number, container::spool::Cursor::default());
    Told::default().rest(&mut records).await
}

/// Waits until a file is there.
pub(super) async fn appears(path: &Path) {
    while !path.exists() {
        sleep(Duration::from_millis(5)).await;
    }
}
