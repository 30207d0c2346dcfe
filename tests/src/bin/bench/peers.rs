//! What Ostler is measured beside: `runc`, `bwrap`, plain fork+exec, a plain pipe.

use std::io::{Read, pipe};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::tool;

/// The app of most figures: one line, then asleep until TERM, also as process 1 of a container.
pub const APP: &str = "trap 'exit 0' TERM; echo up; sleep infinity & wait";

/// An app that says the time and then takes more than [`HOG_MB`].
pub const HOG: &str = "exec ruby -e '$stdout.sync = true; held = \"x\" * (40 << 20); \
    puts format(\"%.6f\", Process.clock_gettime(Process::CLOCK_REALTIME)); held + held'";

/// The limit of [`HOG`], in MB.
pub const HOG_MB: u64 = 64;

/// The peers of one run. Their processes have [`mark`] in their arguments.
#[derive(Debug)]
pub struct Peers {
    mark: String,
    directory: PathBuf,
    stack: PathBuf,
    containers: AtomicU32,
}

/// What the peers of the measuring process `pid` have in their arguments and their directory's name.
pub fn mark(pid: u32) -> String {
    format!("ostler-test-{pid}-peer")
}

/// Where the peers of one run keep their bundles and their state.
pub fn directory(mark: &str) -> PathBuf {
    Path::new("/tmp").join(mark)
}

/// `runc` with the state of one run.
pub fn runc(directory: &Path) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(directory.join("state"));
    command.stdin(Stdio::null());
    command
}

impl Peers {
    /// Makes the bundles.
    pub fn new(pid: u32) -> Self {
        let mark = mark(pid);
        let peers = Self {
            directory: directory(&mark),
            mark,
            stack: stack(),
            containers: AtomicU32::new(0),
        };
        peers.bundle("app", APP, 128);
        peers.bundle("once", "echo up", 128);
        peers.bundle("hog", HOG, HOG_MB);
        peers
    }

    /// A bundle as `runc spec` makes it, of our stack, with `script` and the limits of our instances.
    fn bundle(&self, name: &str, script: &str, megabytes: u64) {
        let bundle = self.directory.join(name);
        fs::create_dir_all(&bundle).expect("/tmp is writable");
        tool("runc", &["spec", "--bundle", &bundle.to_string_lossy()]);
        let file = bundle.join("config.json");
        let text = fs::read_to_string(&file).expect("just made");
        let mut spec: Value = serde_json::from_str(&text).expect("runc writes JSON");
        let mut set = |pointer: &str, value: Value| {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            let parent = spec.pointer_mut(parent).and_then(Value::as_object_mut);
            let parent = parent.unwrap_or_else(|| panic!("`runc spec` has no {pointer}"));
            parent.insert(key.to_owned(), value);
        };
        set("/process/terminal", json!(false));
        set("/process/args", json!(["bash", "-c", script, self.mark]));
        set("/process/user", json!({"uid": 2000, "gid": 2000}));
        set("/root/path", json!(self.stack));
        set("/linux/resources/memory", json!({"limit": megabytes << 20}));
        set("/linux/resources/pids", json!({"limit": 512}));
        set("/linux/resources/cpu", json!({"shares": 16}));
        fs::write(file, spec.to_string()).expect("/tmp is writable");
    }

    fn run(&self, bundle: &str, container: &str) -> Command {
        let mut command = runc(&self.directory);
        command.args(["run", "--bundle"]);
        command.arg(self.directory.join(bundle)).arg(container);
        command
    }

    fn container(&self) -> String {
        let number = self.containers.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", self.mark)
    }

    /// `runc run --detach`: until the first byte, and until `runc` says that it runs.
    pub fn runc_start(&self) -> (Duration, Duration) {
        let container = self.container();
        let (reader, writer) = pipe().expect("a pipe");
        let mut command = self.run("app", &container);
        command.arg("--detach").stdout(writer);
        let begin = Instant::now();
        let mut child = command.spawn().expect("runc runs");
        // It holds the pipe's writing end.
        drop(command);
        let first = thread::spawn(move || {
            read_first(reader);
            begin.elapsed()
        });
        succeed(&mut child, "runc run --detach");
        let running = begin.elapsed();
        let first = first.join().expect("no panic");
        let mut delete = runc(&self.directory);
        delete.args(["delete", "--force", &container]);
        succeed(&mut delete.spawn().expect("runc runs"), "runc delete");
        (first, running)
    }

    /// `runc kill` until `runc run` has seen the end and taken the container away.
    pub fn runc_stop(&self) -> Duration {
        let container = self.container();
        let mut run = self.run("app", &container);
        let mut run = run.stdout(Stdio::piped()).spawn().expect("runc runs");
        read_first(run.stdout.as_mut().expect("a pipe"));
        let begin = Instant::now();
        let mut kill = runc(&self.directory);
        kill.args(["kill", &container, "TERM"]);
        succeed(&mut kill.spawn().expect("runc runs"), "runc kill");
        succeed(&mut run, "runc run");
        begin.elapsed()
    }

    /// `runc run` of an app that ends by itself, from its start until nothing is left.
    pub fn runc_once(&self) {
        let mut run = self.run("once", &self.container());
        let mut run = run.stdout(Stdio::null()).spawn().expect("runc runs");
        succeed(&mut run, "runc run");
    }

    /// `runc run` of [`HOG`] to its end: what it has printed.
    pub fn runc_oom(&self) -> String {
        let run = self.run("hog", &self.container()).output();
        let run = run.expect("runc runs");
        assert_eq!(run.status.code(), Some(128 + 9), "runc run: {run:?}");
        String::from_utf8_lossy(&run.stdout).into_owned()
    }

    /// `bwrap --unshare-all` until the first byte.
    pub fn bwrap_start(&self) -> Duration {
        let mut command = Command::new("bwrap");
        command.args(["--unshare-all", "--die-with-parent", "--ro-bind"]);
        command.arg(&self.stack);
        command.args(["/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
        command.args(["bash", "-c", APP, &self.mark]);
        first_byte(command)
    }

    /// Plain fork+exec until the first byte.
    pub fn plain_start(&self) -> Duration {
        first_byte(self.plain(APP))
    }

    /// `script` by bash, right on this machine.
    pub fn plain(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", script, &self.mark]);
        command
    }
}

/// From the start of `command` to its first byte; then it is killed with its descendants.
fn first_byte(mut command: Command) -> Duration {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.process_group(0);
    let begin = Instant::now();
    let mut child = command.spawn().expect("it runs");
    read_first(child.stdout.as_mut().expect("a pipe"));
    let first = begin.elapsed();
    let group = Pid::from_raw(child.id().try_into().expect("a pid"));
    killpg(group, Signal::SIGKILL).expect("an unreaped child can be signalled");
    child.wait().expect("our child");
    first
}

fn read_first(mut reader: impl Read) {
    reader
        .read_exact(&mut [0])
        .expect("the peer's app prints something");
}

fn succeed(child: &mut Child, what: &str) {
    let status = child.wait().expect("our child");
    assert!(status.success(), "{what}: {status}");
}

/// The stack that the harness gives to apps.
fn stack() -> PathBuf {
    std::env::var_os("OSTLER_STACK").map_or_else(
        || {
            let recipe = tests::fixtures().join("stack/build.sh");
            tool(&recipe.to_string_lossy(), &["--where"]).trim().into()
        },
        PathBuf::from,
    )
}
